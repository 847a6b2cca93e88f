"""python3 tests: sets up what the tests need (pytest, in .venv when it is missing) and runs them all.

What follows is given to pytest: `python3 tests -k store -x`.
"""

import importlib.util
import os
import subprocess
import sys
import venv

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)


def python_with_pytest() -> str:
    """This Python if it has pytest, else the one of .venv, made and filled on the first run."""
    if importlib.util.find_spec("pytest"):
        return sys.executable
    folder = os.path.join(ROOT, ".venv")
    python = os.path.join(folder, "Scripts", "python.exe") if os.name == "nt" else os.path.join(folder, "bin", "python")
    ready = os.path.join(folder, "pytest-is-installed")
    if not os.path.exists(ready):
        print("pytest is missing: making .venv and installing it there", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        subprocess.check_call([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "pytest"])
        open(ready, "w").close()
    return python


if __name__ == "__main__":
    sys.exit(subprocess.call([python_with_pytest(), "-m", "pytest", "-q", "-ra", HERE] + sys.argv[1:], cwd=ROOT))

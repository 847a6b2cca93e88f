"""python3 tests: sets up what the tests need (pytest, in .venv when it is missing) and runs them all.

They mostly wait for processes, so several parts run side by side.  What follows is given to one pytest instead:
`python3 tests -k store -x`.
"""

import contextlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import venv

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
# Parts that take about as long as each other; everything else is one more.
PARTS = (
    ("test_windows.py", "test_versions.py", "test_fuzz.py"),
    ("test_client.py", "test_wire.py", "test_commands.py", "interop"),
    ("test_restarts.py", "test_clocks.py", "test_namespaces.py", "test_guest.py"),
    ("test_access.py", "test_http.py", "test_connections.py", "test_browser.py", "test_lasting.py"),
)


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


def run_parts(pytest) -> int:
    """All parts, what the others say after what the one with everything else says; 0 if all passed."""
    parts = [[os.path.join(HERE, name) for name in names] for names in PARTS]
    parts = [[path for path in part if os.path.exists(path)] for part in parts]
    others = [HERE] + [f"--ignore={path}" for part in parts for path in part]
    with contextlib.ExitStack() as files:
        running = []
        for part in parts:
            said = files.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace"))
            process = subprocess.Popen(pytest + part, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
            running.append((process, said))
        first = subprocess.Popen(pytest + others, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        heard = [""]
        for line in first.stdout:
            heard[0] += line.decode("utf-8", "replace")
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()
        codes = [first.wait()]
        for process, said in running:
            codes.append(process.wait())
            said.seek(0)
            heard.append(said.read())
            print(heard[-1], flush=True)
    print(", ".join(f"{count(heard, word)} {word}" for word in ("passed", "failed", "skipped")))
    return next((code for code in codes if code), 0)


def count(heard, word: str) -> int:
    """The sum of a number in the last lines of all runs of pytest; an error counts as a failure."""
    words = word + "|errors?" if word == "failed" else word
    return sum(int(n) for said in heard for n in re.findall(rf"(\d+) (?:{words})", said.strip().split("\n")[-1]))


if __name__ == "__main__":
    PYTEST = [python_with_pytest(), "-m", "pytest", "-q", "-ra"]
    if sys.argv[1:]:
        sys.exit(subprocess.call(PYTEST + [HERE] + sys.argv[1:], cwd=ROOT))
    sys.exit(run_parts(PYTEST))

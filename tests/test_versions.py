"""The oldest and the newest Python 3 found on this machine (3.8 to 3.13; PATH, pyenv and the one that runs the tests):
the same end-to-end test on each, and with the server on one and the client on the other; and the example file on each.
"""

import functools
import glob
import json
import os
import subprocess
import sys

import pytest

from harness import PATIENCE, ROOT, alive, read, shell, until

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals, sh and /proc: Windows has a file of its own")

FLOOR, NEWEST = (3, 8), (3, 13)
ASK = "import json, sys; print(json.dumps([sys.version_info[:2], sys.executable]))"


@functools.lru_cache(maxsize=None)
def pythons():
    """{(major, minor): its program} of the Pythons here that start: a shim may have no Python behind it."""
    names = [f"python3.{minor}" for minor in range(FLOOR[1], NEWEST[1] + 1)]
    folders = [folder for folder in os.environ.get("PATH", "").split(os.pathsep) if os.path.basename(folder) != "shims"]
    paths = glob.glob(os.path.expanduser("~/.pyenv/versions/*/bin/python"))
    paths += [os.path.join(folder, name) for folder in folders for name in names]
    found = {}
    for program in sorted({os.path.realpath(path) for path in paths if os.access(path, os.X_OK)}):
        try:
            said = subprocess.run(
                [program, "-c", ASK],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                timeout=PATIENCE,
            ).stdout
            version, path = json.loads(said)
        except (OSError, ValueError, subprocess.TimeoutExpired):
            continue
        found[tuple(version)] = path
    found[sys.version_info[:2]] = sys.executable
    return {version: path for version, path in sorted(found.items()) if FLOOR <= version <= NEWEST}


def python(which):
    """The program of the oldest or the newest Python; skips the test where there are no two."""
    found = pythons()
    if len(found) < 2:
        here = " and ".join("Python %d.%d" % version for version in found) or "no Python"
        pytest.skip(f"the {which} Python: only {here} of 3.8 to 3.13 was found here")
    return found[min(found) if which == "oldest" else max(found)]


# A shell, its child and its grandchild, none of which minds TERM; writes the three process numbers.
TREE = """trap "" TERM; sh -c 'sleep 600 & echo $1 $$ $! >tree; wait' sh $$ & wait; sleep 600"""
STEP = 'echo $1 >>runs; until [ -e "$1" ]; do sleep 0.05; done; exit $2'


@pytest.mark.parametrize("on_server, on_client", [
    ("oldest", "oldest"), ("newest", "newest"), ("oldest", "newest"), ("newest", "oldest"),
])  # fmt: skip
def test_from_qsub_to_a_clean_stop_all_works_with_this_python_on_the_server_and_that_on_the_client(
    lab, on_server, on_client
):
    server_python, client_python = python(on_server), python(on_client)
    # with an input that does not end: a thread that waits for it must be in nobody's way
    server = lab.server("--until-eof", stdin=subprocess.PIPE, python=server_python)
    flags = ("--kill-delay", "4", "--hostname", "pc")  # a busy machine takes a while to end what obeys TERM
    client = lab.client(server, *flags, max_jobs=8, python=client_python)

    def command(*words, python=client_python, code=0):
        done = lab.command(*words, server=server, python=python)
        assert done[0] == code, done
        return done[1]

    def qsub(script, *arguments, options=()):
        return command("qsub", *options, "--", *shell(script, *arguments)).strip()

    def runs():
        return sorted(read(lab.path("runs")).split())

    def qstat(*options):
        return json.loads(command("qstat", "-F", "json", *options))["Jobs"]

    timeout = qsub(TREE, options=("-l", "walltime=2", "-N", "tree"))
    one, two, deleted = qsub(STEP, "one", "3"), qsub(STEP, "two", "0"), qsub(STEP, "three", "0")
    failed = qsub("echo 'ä out'; echo err >&2; exit 7")

    # a failed exit code, and its output; a running job deleted
    command("qwait", failed, code=7)
    assert (command("qcat", failed, python=server_python), command("qcat", "-e", failed)) == ("ä out\n", "err\n")
    until(lambda: runs() == ["one", "three", "two"])
    command("qdel", deleted)
    assert (server.over(deleted)["Status"], server.job(deleted)["ExitStatus"]) == ("deleted", 256 + 15)

    # kill -9 of the client: a job that ends meanwhile, and those that go on, are the next client's
    assert {(number, job["job_state"]) for number, job in qstat().items()} >= {(one, "R"), (two, "R")}
    client.kill()
    client.wait()
    lab.write("one", "")
    client = lab.client(server, *flags, max_jobs=8, python=client_python)
    assert server.over(one)["ExitStatus"] == 3
    assert server.job(two)["State"] == "R"
    lab.write("two", "")
    job = server.over(two)
    assert (job["Status"], job["ExitStatus"], job["RunCount"], runs()) == ("finished", 0, 1, ["one", "three", "two"])

    # a job that ignores TERM, with all it started
    tree = [int(number) for number in until(lambda: read(lab.path("tree"))).split()]
    assert len(set(tree)) == 3
    job = server.over(timeout)
    assert (job["Status"], job["ExitStatus"], job["RunCount"]) == ("timeout", -11, 1)
    until(lambda: not any(map(alive, tree)), "the tree to be gone")

    # what qstat says, a second client refused with one line, a clean stop, and the same from the database
    ends = {number: (job["Status"], job["Exit_status"], job["exec_host"]) for number, job in qstat("-x").items()}
    assert ends == {
        timeout: ("timeout", -11, "pc"),
        one: ("failed", 3, "pc"),
        two: ("finished", 0, "pc"),
        deleted: ("deleted", 256 + 15, "pc"),
        failed: ("failed", 7, "pc"),
    }
    env = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}  # it must be heard without
    second = lab.client(server, python=client_python, log="second.log", env=env)
    assert second.wait(PATIENCE) == 1
    assert [line[:11] for line in lab.log("second.log").splitlines()] == ["client.py: "]
    client.terminate()
    assert (client.wait(PATIENCE), server.stop()) == (0, 0)
    assert not os.path.exists(server.db + ".journal")
    database = json.loads(read(server.db))
    assert sorted(str(job["Number"]) for job in database["Finished"].values()) == sorted(ends)
    assert not any(database[bucket] for bucket in ("Available", "Leased", "Held"))
    server = lab.server(python=client_python)
    assert {n: (job["Status"], job["Exit_status"], job["exec_host"]) for n, job in qstat("-x").items()} == ends


@pytest.mark.parametrize("which", ["oldest", "newest"])
def test_a_client_that_is_started_in_its_own_folder_goes_to_its_workdir_and_runs_jobs(lab, which):
    server = lab.server()
    flags = ["--server", server.url, "--spool", lab.path("spool"), "--workdir", lab.folder]
    env = {**os.environ, "TMPDIR": lab.folder}
    with open(lab.path("client.log"), "wb") as log:
        lab.processes.append(
            subprocess.Popen([python(which), "client.py", *flags], cwd=ROOT, stderr=log, stdout=log, env=env)
        )
    (number,) = server.add(["pwd"])
    assert server.over(number)["Status"] == "finished", lab.log("client.log")
    assert server.get("/output", id=number)[1]["StdOut"] == os.path.realpath(lab.folder) + "\n"


@pytest.mark.parametrize("which", ["oldest", "newest"])
def test_the_example_runs_on_this_python_and_every_job_finishes(lab, which):
    code, out, err = lab.command("run", os.path.join(ROOT, "jobs.json.example"), python=python(which))
    assert code == 0, err
    assert "5 of 5 jobs finished" in out


@pytest.mark.parametrize("program", ["server.py", "client.py", "jobrunner.py"])
def test_a_python_that_is_too_old_is_told_so_in_a_line(program):
    """As if this Python were older: few machines have one that is."""
    code = "import runpy, sys; sys.version_info = (3, 7, 16); runpy.run_path(sys.argv[1], run_name='__main__')"
    path = os.path.join(ROOT, program)
    env = {**os.environ, "PYTHONPATH": ROOT}
    done = subprocess.run([sys.executable, "-c", code, path], stderr=subprocess.PIPE, env=env, timeout=PATIENCE)
    err = done.stderr.decode()
    assert done.returncode == 1 and err.startswith("jobrunner needs Python 3.8 or newer") and err.count("\n") == 1, err

"""Clients whose clock is set back and forth an hour, whose processes' numbers went to strangers, and whose spools hold
what they never wrote: no job is ended or lives longer for it, no stranger is touched, and all else goes on.

The clock is time.time of the client and of its keeper, and what ps says of when a process was started; what counts the
seconds since the machine was started goes on, as it does on a machine whose clock is set.
"""

import concurrent.futures
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from harness import PATIENCE, ROOT, Lab, read, shell, until

pytestmark = pytest.mark.skipif(os.name == "nt", reason="ps, signals and sh")

HOUR = 3600
FLAGS = ("--kill-delay", "0.2")

# ---------------------------------------------------------------------------------------------------------------------
# A client with a clock of its own
# ---------------------------------------------------------------------------------------------------------------------

# As a program: the client.  As the Python that the client starts its keeper with: whatever follows -c.
BOOT = """import os, sys, time
real = time.time
def fake():
    try:
        with open({clock!r}) as file:
            return real() + float(file.read() or 0)
    except OSError:
        return real()
time.time = fake
if "-c" in sys.argv:
    sys.argv = sys.argv[sys.argv.index("-c") + 1:]
    exec(compile(sys.argv[0], "<string>", "exec"), {{"__name__": "__main__"}})
else:
    sys.path.insert(0, {root!r})
    sys.executable = {python!r}
    import client
    code = client.main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(code)
"""
PYTHON = """#!/bin/sh
exec {real} -S -E {boot} "$@"
"""
# Start times move with the clock: the system counts them from its own start, which it knows by the clock as it is.
PS = """#!{real} -SE
import re, subprocess, sys, time
if {failing!r} and time.time() < float(open({failing!r}).read() or 0):
    sys.exit(1)
done = subprocess.run(["/usr/bin/ps"] + sys.argv[1:], stdout=subprocess.PIPE)
offset = float(open({clock!r}).read() or 0)
def moved(words):
    moment = time.mktime(time.strptime(words.group(), "%a %b %d %H:%M:%S %Y"))
    return time.strftime("%a %b %e %H:%M:%S %Y", time.localtime(moment + offset))
sys.stdout.write(re.sub(r"[A-Z][a-z]{{2}} [A-Z][a-z]{{2}} [ \\d]\\d \\d\\d:\\d\\d:\\d\\d \\d{{4}}$", moved, done.stdout.decode(), flags=re.M))
sys.exit(done.returncode)
"""


class Machine:
    """A client of that name, with a spool and a clock of its own, that can be killed and started again."""

    def __init__(self, lab, server, name):
        self.lab, self.server, self.name = lab, server, name
        self.clock = lab.write(name + ".clock", "0")
        self.set_clock(0)
        tools = lab.path(name + ".bin")
        os.mkdir(tools)
        words = {"clock": self.clock, "root": ROOT, "real": sys.executable, "failing": ""}
        words["python"], boot = os.path.join(tools, "python"), os.path.join(tools, "boot.py")
        lab.write(boot, BOOT.format(**words))
        for path, text in ((words["python"], PYTHON), (os.path.join(tools, "ps"), PS)):
            lab.write(path, text.format(boot=boot, **words))
            os.chmod(path, 0o755)
        self.boot, self.path = boot, tools + os.pathsep + os.environ["PATH"]
        self.start()

    def start(self):
        words = [sys.executable, self.boot, "--server", self.server.url, "--hostname", self.name, "--spool", self.name]
        env = {**os.environ, "PATH": self.path, "TMPDIR": self.lab.folder}
        with open(self.lab.path(self.name + ".log"), "ab") as err:
            self.process = subprocess.Popen(
                [*words, "--max-jobs", "8", *FLAGS], cwd=self.lab.folder, env=env, stdin=subprocess.DEVNULL, stderr=err
            )
        self.lab.processes.append(self.process)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def kill_keeper(self):
        for name in os.listdir(self.lab.path(self.name, "keepers")):
            os.kill(int(read(self.lab.path(self.name, "keepers", name))), signal.SIGKILL)

    def set_clock(self, offset):
        """s beside the true time; at once, whoever reads it just now."""
        self.lab.write(self.name + ".clock.new", str(offset))
        os.replace(self.lab.path(self.name + ".clock.new"), self.clock)

    def run(self, params, **record):
        """The number of a job that runs here, once its process is noted."""
        before = self.noted()
        (number,) = self.server.add({"Params": params, "Requires": ["host=" + self.name], **record})
        until(lambda: self.noted() > before, "the job to run")
        return number

    def noted(self):
        return sum('"Pid"' in text for text in self.logs().values())

    def logs(self):
        """{path: text} of the logs in its spool."""
        folder = self.lab.path(self.name, "jobs")
        names = os.listdir(folder) if os.path.isdir(folder) else []
        paths = [os.path.join(folder, name, "log") for name in names]
        return {path: read(path) for path in paths if os.path.isfile(path)}

    def log(self):
        return self.lab.log(self.name + ".log")


LIMIT = 4  # s of walltime
SHORT = shell("sleep 2; exit 3")
# An hour more or less is what a clock that was set would make of it.
LONG = shell('date +%s.%N >"$1"; while :; do date +%s.%N >"$1.new" && mv "$1.new" "$1.until"; sleep 0.1; done')


def lasted(machine, name):
    """s for which a job of LONG ran."""
    first, last = (float(read(machine.lab.path(name + end))) for end in ("", ".until"))
    return last - first


def check(machine, short, long, name):
    """The short job ended by itself, the long one by its walltime, when it was over."""
    job = machine.server.over(short)
    assert (job["Status"], job["ExitStatus"], job["RunCount"]) == ("failed", 3, 1), job
    job = machine.server.over(long, 2 * PATIENCE)
    assert (job["Status"], job["ExitStatus"], job["RunCount"]) == ("timeout", -11, 1), job
    assert LIMIT * 0.6 < lasted(machine, name) < LIMIT * 5, lasted(machine, name)
    for moment in (job["StartTime"], job["EndTime"]):
        assert moment[:4] == time.strftime("%Y")


def begin(lab, server, name):
    machine = Machine(lab, server, name)
    path = lab.path(name + ".long")
    long = machine.run([*LONG, path], Runtime=LIMIT)
    until(lambda: read(path + ".until"), "it to say so")
    return machine, machine.run(SHORT, Runtime=LIMIT), long


def set_meanwhile(lab, server, name, offsets):
    machine, short, long = begin(lab, server, name)
    for offset in offsets:
        machine.set_clock(offset)
        time.sleep(0.5)  # for the client to look at it
    check(machine, short, long, name + ".long")


def set_across_a_restart(lab, server, name, offsets):
    machine, short, long = begin(lab, server, name)
    for times in range(1, 16):  # the clock goes the same way each time: who begins to count anew never comes to an end
        machine.kill()
        machine.set_clock(times * offsets[0])
        machine.start()
        until(
            lambda: machine.log().count("server.found") == times + 1 or server.job(long)["State"] == "F", "the client"
        )
        time.sleep(LIMIT / 2)
        if server.job(long)["State"] == "F":
            break
    check(machine, short, long, name + ".long")


def set_across_a_restart_without_keeper(lab, server, name, offsets):
    """Its own process is found by number and start alone, and is still ours; how it ends by itself nobody knows."""
    machine, short, long = begin(lab, server, name)
    machine.kill()
    machine.kill_keeper()
    machine.set_clock(offsets[0])
    machine.start()
    job = server.over(long, 2 * PATIENCE)
    assert (job["Status"], job["ExitStatus"], job["RunCount"]) == ("timeout", -11, 1), job
    assert LIMIT * 0.6 < lasted(machine, name + ".long") < LIMIT + PATIENCE
    job = server.over(short)
    assert (job["ExitStatus"], job["RunCount"]) == (3, 2), job  # run again when its process was gone


SET = {"forth": [HOUR], "back": [-HOUR], "forth and back": [HOUR, -HOUR]}


@pytest.fixture(scope="module")
def courses(tmp_path_factory):
    """{(course, how the clock is set): its future}: all at the same time, since they wait for walltimes."""
    with Lab(str(tmp_path_factory.mktemp("clocks"))) as lab, concurrent.futures.ThreadPoolExecutor(8) as pool:
        server, futures = lab.server(), {}
        for course in (set_meanwhile, set_across_a_restart, set_across_a_restart_without_keeper):
            for how, offsets in SET.items():
                if len(offsets) == 1 or course is set_meanwhile:
                    name = f"{course.__name__}-{how}".replace("_", "-").replace(" ", "-")
                    futures[course, how] = pool.submit(course, lab, server, name, offsets)
        concurrent.futures.wait(futures.values())
        yield futures


@pytest.mark.parametrize("how", SET)
def test_no_walltime_is_over_or_longer_because_the_clock_was_set_meanwhile(courses, how):
    courses[set_meanwhile, how].result()


@pytest.mark.parametrize("how", ["forth", "back"])
def test_no_walltime_is_over_or_longer_because_the_clock_was_set_while_there_was_no_client(courses, how):
    courses[set_across_a_restart, how].result()


@pytest.mark.parametrize("how", ["forth", "back"])
def test_a_process_whose_keeper_is_gone_is_known_again_though_the_clock_was_set(courses, how):
    courses[set_across_a_restart_without_keeper, how].result()


# ---------------------------------------------------------------------------------------------------------------------
# Strangers
# ---------------------------------------------------------------------------------------------------------------------

OURS = 'echo $$ >>"$1"; [ -e "$1.again" ] && exit 5; trap "" TERM; while :; do sleep 0.1; done'


class Stranger:
    """A process of somebody else's that got the number of a job's: as jobs are, it is the leader of its group."""

    def __init__(self, lab):
        self.process = subprocess.Popen(["sleep", "600"], cwd=lab.folder, start_new_session=True)
        lab.processes.append(self.process)


def reuse(lab, server, name, ending, ps_fails=False, **record):
    """The end of a job whose number has gone to a stranger while neither client nor keeper lived, and the stranger."""
    machine, path = Machine(lab, server, name), lab.path(name + ".runs")
    number = machine.run(shell(OURS, path), **record)
    (pid,) = [int(word) for word in until(lambda: read(path).endswith("\n") and read(path), "it to run").split()]
    began = time.monotonic()
    (log,) = machine.logs()
    if ending:
        assert server.post("/delete", {"IDs": [str(number)]})[0] == 200
        until(lambda: '"Ending"' in read(log), "the client to begin ending it")
    machine.kill()
    machine.kill_keeper()
    os.killpg(pid, signal.SIGKILL)
    lab.write(path + ".again", "")
    until(lambda: time.monotonic() - began > 7, "the stranger to be a later process beyond doubt")
    stranger = Stranger(lab)
    text = read(log)
    with open(log, "w") as file:
        file.write(re.sub(rf"\b{pid}\b", str(stranger.process.pid), text))
    if ps_fails:
        failing = lab.write(name + ".failing", str(time.time() + 1.5))
        ps = os.path.join(lab.path(name + ".bin"), "ps")
        lab.write(ps, read(ps).replace("if '' and", f"if {failing!r} and").replace("open('')", f"open({failing!r})"))
    machine.start()
    job = server.over(number)
    time.sleep(1)  # longer than --kill-delay and the looks at it
    return job, stranger.process.poll(), read(path).split(), machine


STRANGERS = {
    "once": dict(ending=False, Rerunable=False),
    "again": dict(ending=False),
    "deleted": dict(ending=True),
    "deleted while ps fails": dict(ending=True, ps_fails=True),
    "walltime is over while ps fails": dict(ending=False, ps_fails=True, Rerunable=False, Runtime=4),
}


@pytest.fixture(scope="module")
def strangers(tmp_path_factory):
    with Lab(str(tmp_path_factory.mktemp("strangers"))) as lab, concurrent.futures.ThreadPoolExecutor(8) as pool:
        server = lab.server()
        futures = {
            name: pool.submit(reuse, lab, server, name.replace(" ", "-"), **how) for name, how in STRANGERS.items()
        }
        concurrent.futures.wait(futures.values())
        yield futures


@pytest.mark.parametrize("name", STRANGERS)
def test_a_stranger_that_has_the_number_of_a_job_lives(strangers, name):
    job, stranger, runs, machine = strangers[name].result()
    assert stranger is None, (job, machine.log())


@pytest.mark.parametrize("name, status, exit_status, runs", [
    ("once", "lost", -103, 1), ("again", "failed", 5, 2), ("deleted", "deleted", None, 1)
])  # fmt: skip
def test_a_job_whose_number_a_stranger_has_is_lost_or_run_again_or_was_deleted(
    strangers, name, status, exit_status, runs
):
    job, _, said, machine = strangers[name].result()
    assert (job["Status"], len(said)) == (status, runs), (job, machine.log())
    assert exit_status is None or job["ExitStatus"] == exit_status


# ---------------------------------------------------------------------------------------------------------------------
# Spools that hold what no client wrote there
# ---------------------------------------------------------------------------------------------------------------------

WAITS = 'echo x >>"$1"; until [ -e "$1.go" ]; do sleep 0.05; done; exit 6'


def damaged(log):
    """{folder: what is in its log} of runs that cannot be read, made from the true log of another one."""
    first, *rest = log.splitlines(keepends=True)
    job = json.loads(first)
    record = {**job["Job"], "ID": "0" * 8 + job["Job"]["ID"][8:], "Number": 900}
    made = json.dumps({**job, "Job": record}) + "\n"
    return {
        "empty.1": "",
        "torn.1": first[: len(first) // 2],
        "binary.1": "\0\1\2\n" * 50,
        "list.1": '[1, 2]\n"x"\n7\nnull\n',
        "nojob.1": "".join(rest),
        "wrong-job.1": json.dumps({**job, "Job": 5}) + "\n",
        "wrong-params.1": json.dumps({**job, "Job": {**record, "Params": "x"}}) + "\n",
        "wrong-pid.1": made + '{"Pid": "x", "StartTime": 1}\n',
        "wrong-start.1": made + '{"Pid": 999999999, "StartTime": "yesterday"}\n',
        "wrong-keeper.1": json.dumps({**job, "Job": record, "Keeper": [1]}) + "\n",
        "wrong-outputs.1": json.dumps({**job, "Job": record, "StdOut": 0, "StdErr": {}}) + "\n",
        "wrong-temp.1": json.dumps({**job, "Job": record, "Temp": 3}) + "\n",
        "wrong-end.1": made + '{"ExitStatus": "zero", "EndTime": 3}\n',
        "future.1": json.dumps({**job, "Job": record, "Format": 999}) + "\n",
    }


@pytest.fixture
def machine(lab):
    """A client with two jobs that wait, killed."""
    machine = Machine(lab, lab.server(), "here")
    machine.numbers = [machine.run(shell(WAITS, lab.path(name))) for name in "ab"]
    until(lambda: read(lab.path("a")) and read(lab.path("b")), "the jobs to say so")
    machine.kill()
    return machine


def goes_on(machine):
    """True if both jobs that waited and a new one end as they should, each run once."""
    lab, server = machine.lab, machine.server
    for name in "ab":
        lab.write(name + ".go", "")
    (new,) = server.add(["true"])
    jobs = [server.over(number) for number in (*machine.numbers, new)]
    assert [(job["ExitStatus"], job["RunCount"]) for job in jobs] == [(6, 1), (6, 1), (0, 1)], machine.log()
    assert (read(lab.path("a")), read(lab.path("b"))) == ("x\n", "x\n")
    return machine.process.poll() is None


def test_a_damaged_run_in_the_spool_is_named_and_left_there_and_all_others_go_on(machine):
    """One client for each, since the first that stops a client would hide the others."""
    log, jobs = next(iter(machine.logs().values())), machine.lab.path("here", "jobs")
    for name, text in damaged(log).items():
        os.mkdir(os.path.join(jobs, name))
        with open(os.path.join(jobs, name, "log"), "w") as file:
            file.write(text)
        with open(os.path.join(jobs, name, "precious"), "w") as file:
            file.write("results")
    machine.start()
    assert goes_on(machine)
    said = machine.log()
    assert "Traceback" not in said, said
    unnamed = [name for name in damaged(log) if name not in said]
    assert not unnamed, (unnamed, said)
    kept = set(damaged(log)) - {"empty.1"}  # nothing was begun for that one
    gone = [name for name in kept if not os.path.exists(os.path.join(jobs, name, "precious"))]
    assert not gone, (gone, said)


def test_what_is_nobodys_in_the_spool_stays_where_it_is_and_is_in_nobodys_way(machine):
    spool, strange = machine.lab.path("here"), []
    for folder in (".", "jobs", "keepers", "nodes", "output"):
        for name, is_folder in (("README.txt", False), ("a folder", True), ("2", True)):
            path = os.path.join(spool, folder, name)
            if is_folder:
                os.mkdir(path)
                path = os.path.join(path, "precious")
            with open(path, "w") as file:
                file.write("results")
            strange.append(path)
    os.symlink("/nowhere", os.path.join(spool, "jobs", "link"))
    for name in ("lock", "keepers/0-dead.lock"):
        with open(os.path.join(spool, name), "w") as file:
            file.write("\0not a number\n")
    machine.start()
    assert goes_on(machine)
    assert "Traceback" not in machine.log()
    assert not [path for path in strange if read(path) != "results"], machine.log()


@pytest.mark.parametrize("text", ["", "\0\0\0", "x" * 5000], ids=["empty", "zeros", "long"])
def test_a_client_whose_id_is_damaged_makes_itself_another_and_forgets_no_job(machine, text):
    with open(machine.lab.path("here", "client"), "w") as file:
        file.write(text)
    machine.start()
    assert goes_on(machine)
    known = read(machine.lab.path("here", "client"))[:100]
    assert re.match(r"[0-9a-f]{16}\s", known), known

"""A network that is cut and healed again, for real: a server and two clients, each in a network namespace of its own.

One cut is made for all tests, longer than --node-timeout and --requeue-after.  Each job says in a file how often it was
begun, ends when its run's file is there, and returns 10 and the number of its run: so its exit status tells which run
it was that counted.  Needs root, and `ip netns`.
"""

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
import time
import uuid

import pytest

from harness import Lab, ROOT, Server, alive, read, shell, until

NODE_TIMEOUT, REQUEUE_AFTER = 2, 8  # s; the latter is how much longer the first run is
ADDRESS = "10.211.7.{}"
SERVER, FAR, NEAR = 1, 2, 3  # the last byte of each one's address

# ---------------------------------------------------------------------------------------------------------------------
# Namespaces
# ---------------------------------------------------------------------------------------------------------------------


def ip(*words):
    """Runs ip; raises OSError with what it said."""
    done = subprocess.run(["ip", *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stdout.decode().strip()}")


class Net:
    """Three namespaces, joined by a bridge in the server's; the machine's own network has no part in it."""

    def __init__(self):
        word = uuid.uuid4().hex[:6]
        self.names = {who: f"jr-{word}-{who}" for who in (SERVER, FAR, NEAR)}

    def __enter__(self):
        try:
            self.build()
        except BaseException:
            self.__exit__()
            raise
        return self

    def build(self):
        for name in self.names.values():
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        center = self.names[SERVER]
        ip("-n", center, "link", "add", "hub", "type", "bridge")
        ip("-n", center, "addr", "add", ADDRESS.format(SERVER) + "/24", "dev", "hub")
        ip("-n", center, "link", "set", "hub", "up")
        for who in (FAR, NEAR):
            far = self.names[who]
            ip("link", "add", "wire", "netns", far, "type", "veth", "peer", "name", f"port{who}", "netns", center)
            ip("-n", center, "link", "set", f"port{who}", "master", "hub", "up")
            ip("-n", far, "addr", "add", ADDRESS.format(who) + "/24", "dev", "wire")
            ip("-n", far, "link", "set", "wire", "up")

    def __exit__(self, *_):
        for name in self.names.values():
            with contextlib.suppress(OSError):
                ip("netns", "del", name)  # and what is in it

    def link(self, who, state):
        ip("-n", self.names[SERVER], "link", "set", f"port{who}", state)

    def python(self, who, *words):
        """How to start Python there; ip becomes it, so the process is the program's."""
        return ["ip", "netns", "exec", self.names[who], sys.executable, *words]

    @contextlib.contextmanager
    def entered(self, who):
        """This thread is in that namespace meanwhile."""
        with open("/proc/thread-self/ns/net") as home, open("/run/netns/" + self.names[who]) as there:
            enter(there)
            try:
                yield
            finally:
                enter(home)


def enter(namespace):
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace.fileno(), 0):
        raise OSError(ctypes.get_errno(), "setns")


class FarServer(Server):
    """A server that is asked from within its namespace."""

    net = None

    def fetch(self, *words, **more):
        with self.net.entered(SERVER):
            return super().fetch(*words, **more)


# ---------------------------------------------------------------------------------------------------------------------
# The cut
# ---------------------------------------------------------------------------------------------------------------------

# Clients that ask more often, so that nobody waits half a minute for a request into a cut network to be given up.
HASTY = """import os, sys
sys.path.insert(0, {root!r})
import client
client.POLL_WAIT = 2
client.Backoff.next = lambda self: setattr(self, "failures", self.failures + 1) or 0.5
code = client.main(sys.argv[1:])
sys.stderr.flush()
os._exit(code)
"""
RUN = """run=$JOBRUNNER_RUN_COUNT
echo "start $run $$" >>"$1"
until [ -e "$1.go.$run" ]; do sleep 0.05; done
echo "end $run $$" >>"$1"
exit $((10 + run))"""
JOBS = {
    "both": {},  # runs at both ends when the network heals
    "kept": {"Requires": ["far"]},  # queued again, and given to nobody else
    "over": {"Requires": ["far"]},  # ends while it is cut off
    "over first": {},  # ends while it is cut off, after a run that lasted longer than the other one has
    "over early": {},  # ends while it is cut off, and the other run is the longer one by now
    "once": {"Rerunable": False},  # lost, until it is heard of again
}


class Cut:
    """What became of each job when the far client was cut off and came back."""

    def __init__(self, lab, net):
        self.lab, self.net = lab, net
        self.boot = lab.write("hasty.py", HASTY.format(root=ROOT))
        self.server = self.start_server()
        self.clients = {who: self.start_client(who, name) for who, name in ((FAR, "far"), (NEAR, "near"))}
        self.nodes_until(far="free", near="free")
        self.mark("offline", "near")
        self.added = time.time()
        self.numbers = dict(zip(JOBS, self.server.add(*[self.record(name) for name in JOBS])))
        until(lambda: all(self.said(name) for name in JOBS), "all jobs to run at the far client")
        until(lambda: self.noted('"Pid"') == len(JOBS), "their processes to be noted")

    def start_server(self):
        flags = ("--bind", ADDRESS.format(SERVER), "--node-timeout", NODE_TIMEOUT, "--requeue-after", REQUEUE_AFTER)
        server = self.lab.server(*flags, python=self.net.python(SERVER))
        server.__class__, server.net = FarServer, self.net
        return server

    def start_client(self, who, name):
        command = self.net.python(who, self.boot)
        flags = ["--hostname", name, "--property", name, "--spool", name, "--kill-delay", "0.5", "--max-jobs", "8"]
        with open(self.lab.path(name + ".log"), "ab") as err:
            words = [*command, "--server", self.server.url, *flags]
            process = subprocess.Popen(words, cwd=self.lab.folder, stdin=subprocess.DEVNULL, stderr=err)
        self.lab.processes.append(process)
        return process

    def record(self, name):
        return {"Params": shell(RUN, self.lab.path(name)), "Name": name, **JOBS[name]}

    def job(self, name):
        return self.server.job(self.numbers[name])

    def said(self, name):
        return read(self.lab.path(name))

    def go(self, name, run):
        """Lets that run of a job end."""
        self.lab.write(f"{name}.go.{run}", "")

    def noted(self, words, spool="far"):
        """In how many logs of a spool it says that."""
        folder = self.lab.path(spool, "jobs")
        return sum(words in read(os.path.join(folder, name, "log")) for name in os.listdir(folder))

    def mark(self, action, host):
        words = ("-o", host) if action == "offline" else ("-r", host)
        program = self.net.python(SERVER, os.path.join(ROOT, "jobrunner.py"))
        subprocess.run([*program, "pbsnodes", "--server", self.server.url, *words], check=True, timeout=60)

    def nodes_until(self, **wanted):
        """Waits until those nodes are in those states."""

        def as_wanted():
            found = {node["Host"]: node["State"] for node in self.server.get("/nodes")[1]["Nodes"]}
            return all(wanted[host] in found.get(host, "") for host in wanted)

        until(as_wanted, f"nodes to be {wanted}")

    def play(self):
        self.net.link(FAR, "down")
        self.mark("online", "near")
        self.go("over", 1), self.go("over early", 1)
        self.nodes_until(far="down")
        elsewhere = ("both", "over first", "over early")
        until(lambda: all("start 2" in self.said(name) for name in elsewhere), "the near client to run what it can")
        until(
            lambda: (self.job("once")["Status"], self.job("kept")["State"]) == ("lost", "Q"),
            "the others to be given up",
        )
        self.given_up = {name: self.job(name) for name in JOBS}
        # Now the near client's run of it is to be longer than the far client's, which ended when the network was cut.
        seen, lasted = time.time(), os.stat(self.lab.path("over early.go.1")).st_mtime - self.added + 1
        until(lambda: time.time() - seen > lasted, "the second run to be the longer one", 60)
        self.go("over first", 1)  # only now, so that it stays the longer one
        until(lambda: self.noted('"ExitStatus"') == 3, "three runs to be over at the far client")
        self.net.link(FAR, "up")
        until(lambda: self.job("both")["Host"] == "far", "the far client to have its job back")
        self.healed = {name: self.job(name) for name in JOBS}
        until(lambda: not self.running("both", 2), "the shorter run to be ended")
        for name in ("both", "kept", "once"):
            self.go(name, 1)
        self.go("over early", 2)
        self.ends = {name: self.server.over(number, 60) for name, number in self.numbers.items()}
        for spool in ("far", "near"):
            until(lambda: not os.listdir(self.lab.path(spool, "jobs")), f"the spool of {spool} to be empty")
        self.ends = {name: self.job(name) for name in JOBS}

    def pids(self, name, run):
        words = [line.split() for line in self.said(name).splitlines()]
        return [int(pid) for what, number, pid in words if what == "start" and int(number) == run]

    def running(self, name, run):
        return any(map(alive, self.pids(name, run)))


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    if sys.platform != "linux" or os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need Linux, root and the program ip")
    with contextlib.ExitStack() as stack:
        try:
            net = stack.enter_context(Net())
            with net.entered(SERVER):
                pass
        except OSError as error:
            pytest.skip(f"no network namespaces here: {error}")
        lab = stack.enter_context(Lab(str(tmp_path_factory.mktemp("cut"))))
        cut = Cut(lab, net)
        cut.play()
        yield cut


def result(job):
    return job["Status"], job["ExitStatus"], job["Host"]


def test_what_is_silent_for_long_is_given_to_others_or_lost_and_its_comment_says_so(cut):
    assert result(cut.given_up["once"])[:2] == ("lost", -103)
    assert (cut.given_up["kept"]["State"], cut.given_up["both"]["Host"]) == ("Q", "near")
    assert all("not heard of" in cut.given_up[name]["Comment"] for name in ("once", "kept"))


def test_of_two_runs_the_longer_one_wins_and_the_other_is_told_to_stop(cut):
    assert result(cut.ends["both"]) == ("failed", 11, "far")
    assert "end 2" not in cut.said("both") and cut.said("both").count("start") == 2
    assert "longer" in cut.healed["both"]["Comment"] and "near" in cut.healed["both"]["Comment"]
    (told,) = [
        line for line in read(cut.lab.path("near.log")).splitlines() if f"job.end job={cut.numbers['both']} " in line
    ]
    assert "far" in told, told  # and not just that it is deleted


def test_a_longer_run_that_ended_while_it_was_cut_off_wins_too(cut):
    assert result(cut.ends["over first"]) == ("failed", 11, "far")
    assert "end 2" not in cut.said("over first")


def test_a_shorter_run_that_ended_while_it_was_cut_off_changes_nothing(cut):
    assert result(cut.ends["over early"]) == ("failed", 12, "near")
    assert cut.healed["over early"]["State"] == "R" and cut.healed["over early"]["Host"] == "near"


@pytest.mark.parametrize("name", ["kept", "over", "once"])
def test_a_run_that_nobody_else_has_begun_meanwhile_is_kept(cut, name):
    assert result(cut.ends[name]) == ("failed", 11, "far") and cut.ends[name]["RunCount"] == 1
    assert cut.said(name).count("start") == 1


def test_no_process_of_any_run_is_left_and_each_run_began_once(cut):
    for name in JOBS:
        starts = [line.split()[1] for line in cut.said(name).splitlines() if line.startswith("start")]
        assert starts == sorted(set(starts)), (name, cut.said(name))
        assert not any(cut.running(name, run) for run in (1, 2)), name
    assert all(client.poll() is None for client in cut.clients.values())

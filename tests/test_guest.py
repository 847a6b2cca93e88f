"""The client as a guest on its machine and as a keeper of its word: clocks that are set, strangers with a job's number,
a spool with damaged and foreign files, hours, free memory and disk, priority, allow files, placeholders, old outputs,
outputs that are streamed.  Where the server is only listened to, a small one of its own stands in for it.
"""

import argparse
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from unittest import mock

import pytest

import client
from client import AllowList, Usage, fill, in_hours, parse_hours
from harness import PATIENCE, FakeServer, alive, read, shell, until
from jobrunner import BadRequest, Job

pytestmark = pytest.mark.skipif(os.name == "nt", reason="sh and /proc: Windows has a file of its own")

GIB = 1 << 30


class Desk(FakeServer):
    """A server that hands out the given records once, says what it is told to, and keeps what it hears.

    refuse  statuses to answer the next requests with;  requests, reports, streams  what came, in order
    """

    def __init__(self, *records, **status):
        self.jobs, self.status = list(records), status
        self.signals, self.refuse, self.extra, self.follow = [], [], {}, True
        self.requests, self.reports, self.streams = [], [], []
        super().__init__()

    def reply(self, command, path, data):
        status, value = self.answer(path, json.loads(data) if data else None)
        return status, json.dumps(value).encode()

    def answer(self, path, body):
        if path == "/status":
            return 200, self.status
        if path == "/stream":
            self.streams += body
            return 200, [{"ID": entry["ID"], "Follow": self.follow} for entry in body]
        if path != "/request":
            return 200, []
        self.requests.append(body)
        self.reports += body.get("Reports", [])
        if self.refuse:
            return self.refuse.pop(), {"Error": "no"}
        free = body["Slots"]
        jobs, self.jobs = self.jobs[:free], self.jobs[free:]
        signals, self.signals = self.signals, []
        if not (jobs or signals or body.get("Reports")):
            time.sleep(min(body["Wait"], 0.2))  # it holds requests open, but not for long
        return 200, {"Jobs": jobs, "Signals": signals, "Reported": [], **self.extra}

    def node(self):
        return self.requests[-1]["Node"]

    def running(self):
        return self.requests[-1]["Running"] if self.requests else []

    def report(self, number=0):
        return until(lambda: self.reports[number:], "a report")[0]


@pytest.fixture
def desk():
    made = []

    def make(*records, **status):
        made.append(Desk(*records, **status))
        return made[-1]

    yield make
    for one in made:
        one.http.shutdown()
        one.http.server_close()


def record(params, number=1, **more):
    ident = f"81b82367-c5c4-439b-a290-{number:012d}"
    return {"ID": ident, "Number": number, "Params": params, "Lease": f"l{number}", "RunCount": 1, "State": "R", **more}


def spool_run(lab, name="81b82367-c5c4-439b-a290-000000000001.1", *lines, **job):
    """A run's folder in the spool, as a client before has left it; lines are values, or bytes as they are."""
    folder = lab.path("jobrunner-spool", "jobs", name)
    os.makedirs(folder)
    os.makedirs(lab.path("jobrunner-spool", "keepers"), exist_ok=True)
    open(lab.path("jobrunner-spool", "keepers", "x.lock"), "a").close()  # of a keeper that was killed
    first = {"Job": {**record(["sleep", "600"], int(name[24:36])), **job}, "Keeper": "x.lock"}
    with open(os.path.join(folder, "log"), "wb") as file:
        for line in (first, *lines):
            file.write(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n")
    return folder


def warned(lab):
    return [line for line in lab.log("client.py.log").splitlines() if " WARNING " in line]


# -- clocks and strangers ---------------------------------------------------------------------------------------------

# A client in whose eyes the time of day is off by what the file `offset` says; its keeper and ps see the true one.
FAKE_CLOCK = """if True:
    import os, runpy, sys, time
    true = time.time
    time.time = lambda: true() + float(open("offset").read() or 0)
    sys.argv = sys.argv[1:]
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")"""


def test_the_clock_set_back_and_forth_an_hour_ends_no_job_and_lets_none_live_longer(lab):
    lab.write("offset", "0")
    fake = [sys.executable, lab.write("fake.py", FAKE_CLOCK)]
    server = lab.server()
    first = lab.client(server, max_jobs=3, python=fake)
    script = 'echo x >>"$1.runs"; until [ -e "$1" ]; do sleep 0.05; done; exit 3'
    waits = {"Params": shell(script, lab.path("go")), "Runtime": 600}
    (long,) = server.add(waits)
    (short,) = server.add({"Params": ["sleep", "600"], "Runtime": 4})
    until(lambda: len(server.get("/jobs", state="R")[1]["Jobs"]) == 2 and lab_pids(lab) == 2, "both to run")
    lab.write("offset", "3600")
    first.kill(), first.wait()
    again = lab.client(server, max_jobs=3, python=fake, log="second.log")
    until(lambda: lab.log("second.log").count("job.adopt") == 2)
    lab.write("offset", "-3600")
    assert server.over(short, patience=15)["Status"] == "timeout"
    again.kill(), again.wait()
    lab.client(server, max_jobs=3, python=fake, log="third.log")
    until(lambda: "job.adopt" in lab.log("third.log"))
    lab.write("go", "")
    job = server.over(long)
    assert (job["ExitStatus"], job["RunCount"], read(lab.path("go.runs"))) == (3, 1, "x\n")


def lab_pids(lab):
    path = lab.path("jobrunner-spool", "jobs")
    return sum('"Pid"' in read(os.path.join(path, name, "log")) for name in os.listdir(path))


@pytest.fixture
def stranger():
    process = subprocess.Popen(["sleep", "600"], start_new_session=True)
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("facts", [
    {"Started": "here", "Boot": "other"}, {"Started": "earlier", "Boot": "this"}, {"StartTime": -3600},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("ending", ["", "timeout"])
def test_a_stranger_with_a_jobs_number_is_not_the_job_and_lives(lab, desk, stranger, facts, ending):
    clock = client.boot_clock()
    facts = dict(facts, StartTime=time.time() + facts.get("StartTime", 0), Clock=time.monotonic() - 100)
    if "Boot" in facts:
        facts["Started"] = clock - (0 if facts["Started"] == "here" else 3600)
        facts["Boot"] = client.boot_id() if facts["Boot"] == "this" else "another"
    else:
        del facts["Clock"]
    lines = [{"Pid": stranger.pid, **facts}] + ([{"Ending": ending}] if ending else [])
    folder = spool_run(lab, "81b82367-c5c4-439b-a290-000000000001.1", *lines, Rerunable=False, Runtime=10)
    server = desk()
    lab.client(server.url, "--kill-delay", "0")
    told = server.report()
    assert (told["Status"], told["ExitStatus"]) == (("timeout", -11) if ending else ("lost", -103))
    until(lambda: not os.path.exists(folder), "the folder to go")
    assert alive(stranger.pid)


@pytest.mark.parametrize("old", [False, True])
def test_a_job_whose_keeper_died_is_known_by_its_start_also_from_an_older_clients_log_and_its_limits_hold(
    lab, desk, stranger, old
):
    facts = {"Pid": stranger.pid, "StartTime": time.time()}
    if not old:
        facts.update(Clock=time.monotonic(), Started=client.boot_clock(), Boot=client.boot_id())
    spool_run(lab, "81b82367-c5c4-439b-a290-000000000001.1", facts, Runtime=2)
    server = desk()
    lab.client(server.url, "--kill-delay", "0")
    until(lambda: server.running() and server.running()[0]["Seconds"] > 1.5, "it to be known as running")
    told = until(lambda: stranger.poll() is not None and server.report(), "its end")
    assert (told["Status"], told["ExitStatus"]) == ("timeout", -11)


def test_before_a_kill_a_run_without_a_keeper_is_looked_at_once_more(stranger):
    """Between its last look and the kill its process may have ended and its number gone to another."""
    agent = client.Agent.__new__(client.Agent)
    agent.tools, agent.log = client.LinuxTools(logging.getLogger("test")), logging.getLogger("test")
    run = client.Run(Job(["a"]), "", 0.0)
    run.pid, run.adopted = stranger.pid, True

    class Keepers:
        lives = False
        keeper_lives = lambda self, name: self.lives  # noqa: E731

    agent.spool = Keepers()
    run.started = client.boot_clock()
    assert [process.pid for process in agent._members(run)] == [stranger.pid]
    run.started -= 60
    assert agent._members(run) is None
    run.started = None
    assert agent._members(run) is None
    agent.spool.lives = True
    assert agent._members(run) is not None


def test_what_a_job_has_used_is_still_known_to_the_next_client():
    usage, later = Usage(), Usage()
    for cpu in (5.0, 2.0):  # a child with 3 s has ended unseen
        usage.update([client.Process(10, 1, 10, cpu, 1 << 20)])
    later.restore(json.loads(json.dumps(usage.save())))
    later.update([client.Process(10, 1, 10, 2.5, 1)])
    assert (later.cpu, later.max_memory) == (5.5, 1 << 20)
    for strange in ([1], {"a": 1}, ["x", 1, 2], [float("nan")] * 3, None, [-1, 0, 0]):
        fresh = Usage()
        fresh.restore(strange)
        assert fresh.cpu == 0


def test_that_limits_are_not_watched_where_ps_fails_is_said_once(lab, desk):
    lab.write("ps", "#!/bin/sh\necho x >>asked\necho ps: unknown option -- A >&2\nexit 1\n")
    os.chmod(lab.path("ps"), 0o755)
    server = desk(record(["sleep", "600"], 1, Memory=GIB))
    env = {**os.environ, "TMPDIR": lab.folder, "PATH": f"{lab.folder}:{os.environ['PATH']}"}
    lab.client(server.url, "--usage-interval", "0.2", env=env)
    until(lambda: read(lab.path("asked")).count("x") > 3, "ps to be called")
    assert [line.count("memory, CPU time") for line in warned(lab) if "tool.failed" in line] == [1]


def test_that_batch_files_never_count_as_dead_is_said_once(caplog):
    agent = client.Agent.__new__(client.Agent)
    agent.tools, agent.log, agent.said = client.WindowsTools(None), logging.getLogger("test"), {}
    agent.options = argparse.Namespace(dead_after=1)
    with caplog.at_level("WARNING"):
        for program in ("run.bat", "RUN.CMD", "run.bat. ", "C:\\Windows\\cmd.exe", "cmd", "powershell", "sh.exe", "py"):
            assert agent._dead_watch(Job([program])) is None
    assert [entry.message.count("cmd.exe") for entry in caplog.records] == [1]


def test_what_starts_another_program_on_windows_and_waits_for_it_does_not_count_as_dead(tmp_path):
    for name in ("venv/Scripts", "uv/bin", "python"):
        os.makedirs(tmp_path / name)
    for name in ("venv/pyvenv.cfg", "uv/pyvenv.cfg"):
        (tmp_path / name).write_text("home = C:\\python\n")
    tools, found = client.WindowsTools(None), str(tmp_path)
    for launcher in (
        found + "/venv/Scripts/python.exe", found + "/uv/bin/python.exe", "C:\\Python\\Scripts\\tool.exe",
        "C:\\Program Files\\Common Files\\Oracle\\Java\\javapath\\java.exe",
    ):  # fmt: skip
        assert not tools.cpu_visible(launcher), launcher
    for worker in (
        found + "/python/python.exe",
        "python",
        "C:\\Java\\bin\\java.exe",
        "C:\\Scripts\\x\\y.exe",
        "happy.exe",
    ):
        assert tools.cpu_visible(worker), worker


def test_what_a_junction_in_a_runs_folder_leads_to_keeps_its_rights_when_the_folder_is_made_removable(
    tmp_path, monkeypatch
):
    """A junction, which is no link to Python before 3.12, seems to be the folder it leads to."""
    for folder in ("own", "junction"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "file").write_text("")
        (tmp_path / folder / "file").chmod(0o400)
    lstat, junction = os.lstat, argparse.Namespace(st_mode=0o040500, st_reparse_tag=0xA0000003)
    monkeypatch.setattr(os, "lstat", lambda path: junction if str(path).endswith("junction") else lstat(path))
    monkeypatch.setattr(client, "WINDOWS", True)
    client._make_removable(str(tmp_path))
    modes = [(tmp_path / folder / "file").stat().st_mode & 0o777 for folder in ("own", "junction")]
    assert modes == [0o700, 0o400]


# -- the spool --------------------------------------------------------------------------------------------------------


def run_name(number):
    return f"81b82367-c5c4-439b-a290-{number:012d}.1"


def test_damaged_and_foreign_files_in_the_spool_are_named_and_nothing_else_is_lost(lab, desk):
    torn = spool_run(lab, run_name(1), b'{"Pid": 12', Rerunable=False)
    ended = spool_run(lab, run_name(2), b'{"Ending": "ti\n', {"ExitStatus": 7})
    kinds = {"Pid": "x", "Clock": [], "StdOut": 3, "Temp": "/etc", "Ending": "no", "EndTime": "soon", "Keeper": {}}
    kinds.update(Started="x", Boot=1, Why=2, Seconds=True)
    odd = spool_run(lab, run_name(3), kinds, {"Pid": -1}, {"Pid": 1}, b"[1]\n", b"7\n", b"\xff\n", {"ExitStatus": 8})
    future = spool_run(lab, run_name(4), {"Format": 2, "Pid": "new"})
    jobs = os.path.dirname(torn)
    left = [future] + [
        os.path.join(jobs, name) for name in ("notes.txt", "my folder", run_name(5), run_name(6), run_name(7))
    ]
    lab.write(left[1], "hello")
    for folder in left[2:]:
        os.mkdir(folder)
    lab.write(os.path.join(left[2], "thesis"), "")
    lab.write(os.path.join(left[3], "log"), "")
    os.mkdir(os.path.join(left[4], "log"))
    lab.write(os.path.join(left[5], "log"), '{"Job": [1, 2]}\n')
    moment = time.time() - 1000
    for number, folder in enumerate((odd, torn, ended)):
        os.utime(os.path.join(folder, "log"), (moment + number, moment + number))
    os.mkdir(os.path.join(jobs, "81b8.3"))  # one that was just being made
    lab.write(os.path.join(jobs, "..", "client"), "\0\0\0")
    server = desk(record(["true"], 9))
    lab.client(server.url)
    until(lambda: len(server.reports) >= 4, "all to be reported")
    assert [(r["ID"][-1], r["ExitStatus"]) for r in server.reports] == [("3", 8), ("1", -103), ("2", 7), ("9", 0)]
    said = "\n".join(warned(lab))
    for path in (torn, ended, odd, *left, lab.path("jobrunner-spool", "client")):
        assert path in said, path
    del left[3]  # nothing was in it
    names = lambda: [name for name in os.listdir(jobs) if "." in name or " " in name]  # noqa: E731
    until(lambda: sorted(os.path.join(jobs, name) for name in names()) == sorted(left), "what was reported to go")
    assert os.path.exists("/etc") and os.path.exists(os.path.join(left[2], "thesis"))
    assert not os.path.exists(os.path.join(jobs, "81b8.3"))
    assert "Traceback" not in lab.log("client.py.log")


def test_after_a_reboot_what_may_runs_again_with_minus_2_and_what_was_never_started_runs_whatever_it_is(lab, desk):
    spool_run(lab, run_name(1), {"Pid": 99999999, "StartTime": 1.7e9, "Clock": 5.0, "Started": 5.0, "Boot": "another"})
    spool_run(lab, run_name(2), {"Pid": 99999999, "StartTime": 1.7e9, "Clock": 5.0, "Started": 5.0, "Boot": "another"},
              Rerunable=False)  # fmt: skip
    folder = spool_run(lab, run_name(3), Rerunable=False)
    log = os.path.join(folder, "log")
    lab.write(log, read(log).replace("x.lock", "ended-in-peace.lock"))
    server = desk()
    lab.client(server.url)
    until(lambda: len(server.reports) == 3, "all to be reported")
    ends = {report["ID"][-1]: (report["Status"], report["ExitStatus"]) for report in server.reports}
    assert ends == {"1": ("released", -2), "2": ("lost", -103), "3": ("released", -8)}


def test_a_line_after_a_torn_one_is_whole(tmp_path):
    (tmp_path / "log").write_bytes(b'{"Pid": 5}\n{"Endi')
    client.note(str(tmp_path), {"ExitStatus": 3})
    assert client.read_log(str(tmp_path)) == ({"Pid": 5, "ExitStatus": 3}, ["line 2 is torn or damaged"])


def test_a_spool_copied_from_another_machine_gets_an_id_of_its_own_and_leaves_that_ones_runs_alone(lab, desk):
    folder = spool_run(lab, run_name(1), {"Machine": "elsewhere"})
    lab.write(os.path.join("jobrunner-spool", "client"), "0123456789abcdef elsewhere\n")
    server = desk()
    first = lab.client(server.url)
    until(lambda: len(server.requests) > 2)
    assert server.node()["Client"] != "0123456789abcdef" and server.node()["Machine"] == socket.gethostname()
    assert not server.running() and os.path.exists(folder) and folder in "\n".join(warned(lab))
    known = server.node()["Client"]
    assert read(lab.path("jobrunner-spool", "client")).split() == [known, socket.gethostname()]
    first.kill(), first.wait()
    del server.requests[:]
    server.refuse.append(409)
    lab.client(server.url)
    until(lambda: len(server.requests) > 2)
    assert server.requests[0]["Node"]["Client"] == known != server.node()["Client"]
    assert "new id " + server.node()["Client"] in "\n".join(warned(lab))


def test_an_id_without_a_machine_is_kept(tmp_path):
    (tmp_path / "client").write_text("0123456789abcdef\n")
    assert client.Spool(str(tmp_path), logging.getLogger("test"), "here").client == "0123456789abcdef"
    assert (tmp_path / "client").read_text() == "0123456789abcdef here\n"


def test_a_warning_of_the_servers_is_logged_once_and_so_is_that_anybody_may_run_anything(lab, desk):
    server = desk(Tokens=False)
    server.extra["Warning"] = "another client goes by this name"
    lab.client(server.url)
    until(lambda: len(server.requests) > 4)
    assert "".join(warned(lab)).count("another client") == 1 == "".join(warned(lab)).count("client.open")
    closed = desk(Tokens=True)
    lab.client(closed.url, "--spool", "two", log="two.log")
    until(lambda: closed.requests)
    assert "client.open" not in lab.log("two.log")


def test_old_outputs_go_but_not_those_of_runs_that_are_here(lab, desk):
    outputs = {name: lab.path("jobrunner-spool", "output", name) for name in ("a.o1", "sleep.o1", "new.o3")}
    keep = {"StdOut": outputs["sleep.o1"], "StdErr": outputs["sleep.o1"]}
    spool_run(lab, run_name(1), keep, {"ExitStatus": 0})
    os.makedirs(os.path.dirname(outputs["a.o1"]))
    for name, path in outputs.items():
        lab.write(path, name)
        if name != "new.o3":
            os.utime(path, (1e9, 1e9))
    server = desk()
    server.refuse = [503] * 50  # so its report waits
    first = lab.client(server.url)
    until(lambda: not os.path.exists(outputs["a.o1"]), "the old one to go")
    first.kill(), first.wait()
    assert sorted(os.listdir(os.path.dirname(outputs["a.o1"]))) == ["new.o3", "sleep.o1"]


# -- when jobs are welcome --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, inside, outside", [
    ("19:00-07:00", [1140, 1439, 0, 419], [420, 720, 1139]),
    ("8:00-9:30", [480, 569], [479, 570]),
    ("19:00-07:00, 12:00-13:00", [1200, 720, 779], [780, 719]),
    ("00:00-24:00", [0, 1439], []),
    ("07:00-07:00", [0, 420, 1439], []),
    ("22:00-24:00", [1320, 1439], [0, 1319]),
])  # fmt: skip
def test_hours_may_go_over_midnight_and_be_the_whole_day(text, inside, outside):
    hours = parse_hours(text)
    assert all(in_hours(hours, minute) for minute in inside)
    assert not any(in_hours(hours, minute) for minute in outside)


@pytest.mark.parametrize("text", ["", "19-7", "24:00-01:00", "19:60-07:00", "19:00-24:01", "19:00-07:00,", "a:bb-c:dd"])
def test_what_are_no_hours_is_refused(text):
    with pytest.raises(BadRequest, match="no hours"):
        parse_hours(text)


def test_outside_its_hours_a_client_takes_nothing_waits_with_until_empty_and_wakes_when_they_begin(lab):
    minute = client.minute_of_day(time.time())
    clock = lambda minutes: "%02d:%02d" % divmod(minutes % 1440, 60)  # noqa: E731
    lab.write("offset", "0")
    server = lab.server()
    (number,) = server.add(["true"])
    fake = [sys.executable, lab.write("fake.py", FAKE_CLOCK)]
    hours = f"{clock(minute + 120)}-{clock(minute + 180)}"
    worker = lab.client(server, "--until-empty", "--hours", hours, python=fake)
    until(lambda: "client.pause" in lab.log("client.py.log") and "server.found" in lab.log("client.py.log"))
    (node,) = until(lambda: server.get("/nodes")[1]["Nodes"])
    assert node["Slots"] == 2 and server.job(number)["State"] == "Q" and worker.poll() is None
    lab.write("offset", str(150 * 60))
    assert worker.wait(PATIENCE) == 0 and server.job(number)["Status"] == "finished"


@pytest.mark.parametrize("flags, words", [
    (["--min-free-memory", "900tb"], "memory"), (["--min-free-disk", "900tb"], "jobrunner-spool"),
    (["--hours", "{away}"], "hours"),
], ids=lambda value: str(value)[:25])  # fmt: skip
def test_with_too_little_of_something_no_slot_is_free_and_the_node_says_why(lab, desk, flags, words):
    minute = (client.minute_of_day(time.time()) + 300) % 1440
    away = "%02d:%02d-%02d:%02d" % (*divmod(minute, 60), *divmod((minute + 60) % 1440, 60))
    server = desk(record(["true"]))
    lab.client(server.url, *[flag.replace("{away}", away) for flag in flags])
    until(lambda: len(server.requests) > 3)
    assert {request["Slots"] for request in server.requests} == {0}
    assert words in server.node()["Pause"] and server.node()["Nice"] == 10
    assert server.node().get("Hours") == (away if words == "hours" else None)


def test_there_is_memory_and_disk(tmp_path):
    total, free = client.machine_memory()
    assert 1 << 26 < free < total
    assert client.free_disk(str(tmp_path)) > 0


@pytest.mark.parametrize("flags, nice", [([], 10), (["--nice", "0"], 0), (["--nice", "19"], 19)])
def test_jobs_stand_back_for_other_programs(lab, desk, flags, nice):
    own = os.nice(0)
    server = desk(record(shell("nice")))
    lab.client(server.url, *flags)
    assert int(server.report()["StdOutTail"]) == min(19, own + nice)


# -- what may run -----------------------------------------------------------------------------------------------------


@pytest.fixture
def allow_file(tmp_path):
    path = tmp_path / "allow" / "list"
    path.parent.mkdir()
    path.write_text("# ours\n\n  echo 'two words'\r\ntrue\n")
    path.chmod(0o644)
    return path


def test_an_allow_file_is_read_again_when_it_changes_and_allows_nothing_while_it_is_wrong(allow_file, tmp_path):
    allow = AllowList([["own"]], [str(allow_file)], [str(tmp_path / "spool")])
    assert allow.prefixes() == [["own"], ["echo", "two words"], ["true"]]
    allow_file.write_text("false\n")
    assert allow.prefixes() == [["own"], ["false"]]
    for text in ("", "# nothing\n", "java 'x\n", '""x\n"\n', "#" + "x" * ((1 << 20) - 6) + "\njava -jar job.jar\n"):
        allow_file.write_text(text)
        with pytest.raises(BadRequest, match="nothing may run until it is right"):
            allow.prefixes()
    allow_file.write_text("true\n")
    assert allow.prefixes() == [["own"], ["true"]]
    for mode in (0o664, 0o646):
        allow_file.chmod(mode)
        with pytest.raises(BadRequest, match="chmod go-w"):
            allow.prefixes()
    os.remove(allow_file)
    with pytest.raises(BadRequest, match="No such file"):
        allow.prefixes()
    assert AllowList([], [], []).prefixes() is None


def test_an_allow_file_that_jobs_could_write_is_refused_also_through_links(allow_file, tmp_path):
    jobs = allow_file.parent
    (tmp_path / "link").symlink_to(jobs)
    (tmp_path / "file").symlink_to(allow_file)
    for path in (allow_file, tmp_path / "link" / "list", tmp_path / "file"):
        for folder in (jobs, tmp_path / "link", tmp_path):
            with pytest.raises(BadRequest, match="where jobs write"):
                AllowList([], [str(path)], [str(folder)]).prefixes()
    (tmp_path / "allowed").mkdir()
    assert AllowList([], [str(allow_file)], [str(tmp_path / "allowed"), str(tmp_path / "all")]).prefixes()


def test_a_client_obeys_its_allow_file_and_does_not_start_with_a_wrong_one(lab, desk, tmp_path_factory):
    path = tmp_path_factory.mktemp("etc") / "allow"
    path.write_text("true\n")
    path.chmod(0o600)
    server = desk(record(["true"], 1), record(["false"], 2))
    worker = lab.client(server.url, "--allow-file", path)
    until(lambda: len(server.reports) == 2)
    assert {(r["ID"][-1], r["Status"], r["ExitStatus"]) for r in server.reports} == {
        ("1", "finished", 0), ("2", "refused", -102),
    }  # fmt: skip
    path.write_text("")
    until(lambda: server.node()["Pause"], "it to be seen")
    assert str(path) in server.node()["Pause"] and server.requests[-1]["Slots"] == 0
    assert "client.open" not in lab.log("client.py.log")
    worker.kill(), worker.wait()
    assert lab.client(server.url, "--allow-file", path, log="second.log").wait(PATIENCE) == 1
    assert lab.log("second.log").splitlines()[-1].startswith("client.py: cannot go by --allow-file")


FILLED = ["{ncpus}", "-Xmx{memory_gb}g", "{hostname}{ncpus}", "{index}", "{}", "{{ncpus}}", "{ncpus", "{NCPUS}"]


@pytest.mark.parametrize("job, memory", [
    ({"ncpus": 2, "memory": 3 * GIB + 5}, 3), ({"ncpus": 2, "memory": 5}, 1), ({"ncpus": 2}, 15),
    ({"ncpus": 2, "memory": 40 * GIB}, 40),
])  # fmt: skip
def test_placeholders_are_filled_in_and_all_other_braces_stay(job, memory):
    words = fill(Job(FILLED).but(**job), "pc{ncpus}", 4, 31 * GIB)
    assert words == ["2", f"-Xmx{memory}g", "pc{ncpus}2", "{index}", "{}", "{2}", "{ncpus", "{NCPUS}"]


def test_a_job_of_more_slots_than_there_are_has_no_more_than_the_whole_machine():
    assert fill(Job(["{memory_gb}"]).but(ncpus=8), "pc", 4, 31 * GIB + 7) == ["31"]


def test_only_jobs_that_ask_for_it_are_filled_in_before_the_allow_list_and_never_a_script(lab, desk):
    script = {"Script": "echo {ncpus} $1\n", "ScriptName": "s", "Fill": True}
    server = desk(record(["echo", "{ncpus}", "{hostname}"], 1, Fill=True), record(["echo", "{ncpus}"], 2))
    lab.client(server.url, "--hostname", "pc", "--allow-prefix", "echo 1", "--allow-prefix", "echo {ncpus}")
    until(lambda: len(server.reports) == 2)
    assert {r["StdOutTail"] for r in server.reports} == {"1 pc\n", "{ncpus}\n"}
    other = desk(record(["s", "{ncpus}{hostname}"], 3, **script))
    lab.client(other.url, "--hostname", "pc", "--spool", "two", log="two.log")
    assert other.report()["StdOutTail"] == "{ncpus} 1pc\n"


# -- told to stop, streamed, full disks -------------------------------------------------------------------------------


def test_a_run_that_is_told_to_stop_says_why_also_when_the_next_client_reports_it(lab, desk):
    server = desk(record(shell('trap "" TERM; echo up >up; sleep 600; sleep 600'), 1))
    first = lab.client(server.url, "--kill-delay", "300", max_jobs=1)
    until(lambda: read(lab.path("up")))
    until(lambda: server.running() and server.running()[0]["Seconds"] > 0)
    server.signals = [{"ID": record([])["ID"], "Signal": "delete", "Comment": "a longer run on b won"}]
    until(lambda: lab.log("client.py.log").count("a longer run on b won"))
    until(lambda: server.running()[0].get("Signal") == "delete")
    first.kill(), first.wait()
    lab.client(server.url, "--kill-delay", "1", max_jobs=1)
    told = server.report()
    assert (told["Status"], told["ExitStatus"], told["Comment"]) == (
        "deleted",
        265,
        "told to stop: a longer run on b won",
    )


def test_a_followed_run_streams_its_last_64_kib_and_then_what_is_new_until_nobody_reads(lab, desk):
    script = 'head -c 100000 /dev/zero | tr "\\0" x; echo up >up; until [ -e go ]; do sleep 0.05; done; echo é; echo e >&2; sleep 600'
    server = desk(record(shell(script), 1))
    lab.client(server.url, max_jobs=1)
    until(lambda: read(lab.path("up")) and server.running())
    server.signals = [{"ID": record([])["ID"], "Signal": "follow"}]
    (first,) = until(lambda: server.streams)
    assert first["StdOut"] == {"At": 100000 - 65536, "Text": "x" * 65536} and "StdErr" not in first
    assert first["Lease"] == "l1" and first["Hostname"]
    until(lambda: server.running()[0].get("Follow") is True)
    lab.write("go", "")
    until(lambda: any("StdErr" in entry for entry in server.streams))
    pieces = {key: [e[key] for e in server.streams[1:] if key in e] for key in ("StdOut", "StdErr")}
    assert pieces == {"StdOut": [{"At": 100000, "Text": "é\n"}], "StdErr": [{"At": 0, "Text": "e\n"}]}
    server.follow = False
    lab.write(os.path.join("jobrunner-spool", "output", "sh.o1"), "anew")
    until(lambda: "Follow" not in server.running()[0], "it to stop")


def test_a_reader_stays_with_an_output_that_grows_fast_and_one_that_begins_anew(tmp_path):
    path = str(tmp_path / "out")
    (tmp_path / "out").write_bytes(b"a" * 200_000)
    assert client.read_piece(path, None) == (200_000 - 65536, b"a" * 65536)
    assert client.read_piece(path, 199_999) == (199_999, b"a")
    assert client.read_piece(path, 10) == (200_000 - 65536, b"a" * 65536)
    assert client.read_piece(path, 200_001)[0] == 200_000 - 65536
    assert client.read_piece(str(tmp_path), 5) == (5, b"")


def test_a_full_disk_is_said_by_name_and_ends_nobody(lab, desk, tmp_path):
    """As root: a small file system is the spool.  It is filled by the first job, and empty again after it."""
    os.mkdir(lab.path("small"))
    if subprocess.call(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "small", lab.path("small")], stderr=subprocess.DEVNULL
    ):
        pytest.skip("cannot mount: not root")
    try:
        server = desk(record(shell("cat /dev/zero >small/big; until [ -e go ]; do sleep 0.05; done; exit 3"), 1))
        worker = lab.client(server.url, "--hostname", "pc", "--spool", "small/spool", "--min-free-disk", 0, max_jobs=2)
        until(lambda: os.path.exists(lab.path("small", "big")) and os.statvfs(lab.path("small")).f_bavail == 0)
        server.jobs = [record(["true"], 2, StdOut="/dev/null", StdErr="/dev/null")]
        told = server.report()
        assert (told["ID"][-1], told["ExitStatus"]) == ("2", -8)
        assert told["Comment"].startswith("the disk of pc is full: ") and lab.path("small") in told["Comment"]
        lab.write("go", "")
        told = server.report(1)
        assert (told["ID"][-1], told["ExitStatus"]) == ("1", 3)
        os.remove(lab.path("small", "big"))
        server.jobs = [record(["true"], 3)]
        assert server.report(2)["ExitStatus"] == 0 and worker.poll() is None
    finally:
        for process in lab.processes:
            process.kill(), process.wait()
        lab._end_jobs()
        subprocess.call(["umount", "-l", lab.path("small")])


# -- what goes wrong around the client --------------------------------------------------------------------------------


def test_a_client_whose_spool_is_gone_gives_back_what_comes_and_goes_on_with_what_runs(lab, desk):
    server = desk(record(shell('until [ -e "$1" ]; do sleep 0.05; done; exit 7', lab.path("go")), 1))
    lab.client(server.url)
    until(lambda: server.running() and server.running()[0]["Seconds"], "the job to run")
    os.rename(lab.path("jobrunner-spool"), lab.path("gone"))
    server.jobs.append(record(["true"], 2))
    told = server.report()
    assert (told["ID"][-1], told["Status"], told["ExitStatus"]) == ("2", "released", -8)
    assert "has lost its spool" in told["Comment"]
    until(lambda: server.node()["Pause"], "it to pause")
    assert server.node()["Pause"] == f"its spool {lab.path('jobrunner-spool')} is gone: start the client again"
    lab.write("go", "")
    told = server.report(1)
    assert (told["ID"][-1], told["Status"], told["ExitStatus"]) == ("1", "failed", 7)
    assert [line.count("folder.gone") for line in warned(lab) if "folder.gone" in line] == [1]


def test_a_client_whose_working_folder_is_gone_reports_what_runs_and_takes_no_more(lab, desk):
    server = desk(record(shell('until [ -e "$1" ]; do sleep 0.05; done; exit 7', lab.path("go")), 1))
    os.mkdir(lab.path("work"))
    lab.client(server.url, "--workdir", "work")
    until(lambda: server.running() and server.running()[0]["Seconds"], "the job to run")
    os.rmdir(lab.path("work"))
    server.jobs.append(record(["true"], 2))
    told = server.report()
    assert (told["ID"][-1], told["Status"], told["ExitStatus"]) == ("2", "released", -8)
    assert f"has lost its working folder {lab.path('work')}" in told["Comment"]
    lab.write("go", "")
    told = server.report(1)
    assert (told["ID"][-1], told["Status"], told["ExitStatus"]) == ("1", "failed", 7)
    until(lambda: "work is gone" in server.node()["Pause"], "it to pause")


def test_a_client_that_is_waited_for_ends_when_its_spool_is_gone_and_nothing_runs(lab, desk):
    server = desk()
    server.extra["Waiting"] = 1
    worker = lab.client(server.url, "--until-empty")
    until(lambda: server.requests and server.requests[-1]["Slots"], "it to be ready")
    os.rename(lab.path("jobrunner-spool"), lab.path("gone"))
    assert worker.wait(PATIENCE) == 1
    assert "jobrunner-spool is gone: start the client again" in lab.log("client.py.log").splitlines()[-1]


@pytest.mark.parametrize("lost", ["", "lock", "jobs", "output"])
def test_a_spool_is_gone_when_a_part_of_it_is_and_when_another_is_in_its_place(tmp_path, lost):
    spool = client.Spool(str(tmp_path / "spool"), logging.getLogger("test"), "here")
    assert not spool.is_gone() and not spool.has_keeper("x.lock")
    os.rename(tmp_path / "spool" / lost, tmp_path / "away")
    assert spool.is_gone() and spool.has_keeper("x.lock")  # or a run without a process would count as never begun
    if not lost:
        other = client.Spool(str(tmp_path / "spool"), logging.getLogger("test"), "here")
        assert spool.is_gone() and not other.is_gone()


def test_a_file_of_the_working_directory_is_no_module_of_the_keeper(lab, desk):
    for name in ("selectors", "json", "client"):
        lab.write(f"{name}.py", "raise SystemExit('a stranger')\n")
    server = desk(record(["true"], 1))
    lab.client(server.url)
    assert server.report()["Status"] == "finished"


def bare_agent(**more):
    agent = client.Agent.__new__(client.Agent)
    agent.log, agent.lock, agent.clock = logging.getLogger("test"), threading.RLock(), time.monotonic
    agent.tools, agent.runs, agent.ordering = client.LinuxTools(agent.log), {}, threading.Lock()
    agent.refused = {}
    vars(agent).update(more)
    return agent


def test_no_order_goes_to_a_keeper_that_has_died_or_is_not_ready(tmp_path):
    read_end, write_end = os.pipe()
    with os.fdopen(read_end, "rb"), os.fdopen(write_end, "wb") as orders:
        agent = bare_agent(keeper=argparse.Namespace(stdin=orders), keeper_name="new.lock", keeper_ready=False)
        run = client.Run(Job(["a"]), "folder", 0.0)
        run.keeper = "new.lock"
        assert not agent._give_to_keeper(run, b"order\n") and not agent.runs
        agent.keeper_ready, run.keeper = True, "old.lock"
        assert not agent._give_to_keeper(run, b"order\n") and not agent.runs
        run.keeper = "new.lock"
        assert agent._give_to_keeper(run, b"order\n") and agent.runs == {"folder": run}
        assert os.read(read_end, 99) == b"order\n"


@pytest.mark.parametrize("same_boot", [True, False])
def test_a_group_with_a_runs_number_is_the_runs_only_in_the_boot_it_ran_in(lab, same_boot):
    lab.write("pid", "")
    leader = subprocess.Popen(["sh", "-c", "sleep 600 & echo $! >pid"], cwd=lab.folder, start_new_session=True)
    leader.wait()
    left = int(read(lab.path("pid")))
    agent = bare_agent()
    run = client.Run(Job(["a"]), "folder", 0.0)
    run.pid, run.ending, run.kill_at = leader.pid, "deleted", 0.0
    run.started = client.boot_clock() if same_boot else None
    try:
        assert agent._something_is_left(run) is same_boot
        if same_boot:
            assert run.kill_at > time.monotonic()  # what does not go is not killed without a pause
            until(lambda: not alive(left), "it to be killed")
        assert alive(left) is not same_boot
    finally:
        if not same_boot:
            os.kill(left, 9)


def test_what_is_left_of_a_run_is_killed_with_what_it_has_started_meanwhile(lab):
    job = 'setsid sh -c "setsid sleep 600 & echo \\$\\$ \\$! >pids; sleep 600" & exit'
    leader = subprocess.Popen(["sh", "-c", job], cwd=lab.folder, start_new_session=True)
    leader.wait()
    left, its_child = map(int, until(lambda: read(lab.path("pids")).split(), "both to be there"))
    agent = bare_agent()
    run = client.Run(Job(["a"]), "folder", 0.0)
    run.pid, run.started, run.ending, run.kill_at = leader.pid, client.boot_clock(), "timeout", 0.0
    run.members = {left: agent.tools.snapshot()[left].start}  # when it was asked to end
    try:
        assert agent._something_is_left(run)
        until(lambda: not alive(left) and not alive(its_child), "both to be killed")
    finally:
        for pid in filter(alive, (left, its_child)):
            os.kill(pid, 9)


def test_the_main_thread_does_not_spin_for_a_run_that_its_keeper_has_not_begun_in_time():
    agent = bare_agent()
    run = agent.runs["a"] = client.Run(Job(["a"], runtime=1), "a", agent.clock() - 60)
    assert agent._until_next() > 0
    run.pid = 10
    assert agent._until_next() == 0


def test_all_orphans_are_looked_for_in_one_snapshot_taken_after_their_keeper_died():
    taken = []
    agent = bare_agent(orphans_seen=(-1e9, None), clock=lambda: len(taken) + 0.01)
    agent.tools = argparse.Namespace(snapshot=lambda: taken.append(1) or {})
    runs = [client.Run(Job(["a"]), name, 0.0) for name in "abc"]
    for run in runs:
        agent._orphans_snapshot(run)
    assert len(taken) == 3  # each may have been its keeper's last deed
    agent.clock = lambda: 100.0
    for run in runs:
        agent._orphans_snapshot(run)
    assert len(taken) == 4


def test_a_log_that_cannot_be_read_just_now_is_no_end_that_nobody_saw(tmp_path, monkeypatch):
    (tmp_path / "log").write_text('{"Pid": 99999999}\n{"ExitStatus": 7}\n')
    over = []
    spool, options = argparse.Namespace(keeper_lives=lambda name: False), argparse.Namespace(hostname="pc")
    agent = bare_agent(spool=spool, options=options, said={})
    agent._over = lambda folder, end: over.append(end["ExitStatus"])
    run = client.Run(Job(["a"]), str(tmp_path), 0.0)
    run.pid, run.adopted = 99999999, True
    with monkeypatch.context() as scanned:
        scanned.setattr(client, "open", mock.Mock(side_effect=PermissionError(13, "Permission denied")), raising=False)
        agent._look_at_adopted(run, {})
    assert over == []
    agent._look_at_adopted(run)
    assert over == [7]


# -- what is not for jobs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["allow", "linked", "jobrunner-spool/client", "jobrunner-spool/jobs/x/log"])
def test_a_jobs_output_is_never_one_of_the_clients_own_files(lab, desk, place):
    lab.write("allow", "echo\n")
    os.chmod(lab.path("allow"), 0o600)
    os.symlink(lab.path("allow"), lab.path("linked"))
    os.mkdir(lab.path("work"))
    outputs = [{"StdOut": lab.path(place)}, {"StdErr": os.path.join("..", place), "WorkDir": lab.path("work")}]
    server = desk(*(record(["echo", "sh"], number + 1, **output) for number, output in enumerate(outputs)))
    lab.client(server.url, "--allow-file", "allow", "--workdir", "work")
    until(lambda: len(server.reports) == 2, "both to be reported")
    assert {(report["ExitStatus"], "client's own files" in report["Comment"]) for report in server.reports} == {
        (-9, True)
    }
    assert read(lab.path("allow")) == "echo\n"


@pytest.mark.parametrize("path, plain", [
    (r"C:\a\client.py", r"C:\a\client.py"), (r"\\?\C:\a\client.py", r"C:\a\client.py"), ("//./c:/a/b. .", "c:/a/b"),
    (r"\\?\unc\host\share\b::$DATA", r"\\host\share\b"), (r"\\host\share\b ", r"\\host\share\b"), ("C:\\a\\", "C:\\a\\"),
    (r"C:\a.b\c:x", r"C:\a.b\c"), ("C:\\a\\b:\n", r"C:\a\b"),
])  # fmt: skip
def test_a_file_of_windows_is_known_by_any_of_its_names(path, plain):
    assert client.plain_windows_path(path) == plain


def test_the_spool_is_its_owners_alone_also_if_it_was_not(lab, desk):
    os.mkdir(lab.path("jobrunner-spool"), 0o755)
    server = desk()
    lab.client(server.url)
    until(lambda: server.requests, "a request")
    assert os.stat(lab.path("jobrunner-spool")).st_mode & 0o777 == 0o700


def test_of_a_folder_with_other_things_in_it_only_what_is_the_clients_is_its_owners_alone(lab, desk):
    os.mkdir(lab.path("home"), 0o755)
    lab.write("home/thesis", "")
    server = desk()
    lab.client(server.url, "--spool", "home")
    until(lambda: server.requests, "a request")
    names = (".", "jobs", "output", "keepers", "nodes")
    assert [os.stat(lab.path("home", name)).st_mode & 0o777 for name in names] == [0o755] + [0o700] * 4


def test_a_client_that_ends_says_farewell(lab, desk):
    server = desk()
    process = lab.client(server.url)
    until(lambda: server.requests, "a request")
    process.terminate()
    assert process.wait(PATIENCE) == 0
    assert server.requests[-1]["Node"]["Stopped"] is True and server.requests[-1]["Slots"] == 0


def test_a_client_that_can_have_no_thread_goes_on_and_streams_when_it_is_told_again(monkeypatch):
    agent = bare_agent(following=False)
    run = client.Run(Job(["a"]), "folder", 0.0)
    run.outputs = {"StdOut": "out"}
    with monkeypatch.context() as none_left:
        none_left.setattr(threading.Thread, "start", mock.Mock(side_effect=RuntimeError("can't start new thread")))
        agent._follow(run)
    assert (agent.following, run.follow) == (False, None)
    monkeypatch.setattr(threading.Thread, "start", lambda thread: None)
    agent._follow(run)
    assert (agent.following, run.follow) == (True, {})


def test_with_its_farewell_a_client_gives_back_what_came_while_it_was_being_stopped(tmp_path):
    sent = []
    wire = argparse.Namespace(one_at_a_time=False, request=lambda wish, reports, timeout: (
        sent.append((wish["Running"], reports)) or client.Reply([], [], bool(reports))))  # fmt: skip
    agent = bare_agent(wire=wire, node={}, polls=0, open_polls=[], outbox={}, under_way={}, carries_reports=True)
    agent.away, agent.poll_at, agent.away_until, agent.refused = client.Backoff(), None, 0.0, {}
    agent.temp, agent.spool = argparse.Namespace(give_back=None), argparse.Namespace(remove=None)
    agent.poll_news = threading.Condition(agent.lock)
    agent._give_back(Job.from_record({"Params": ["a"], "ID": "x", "Lease": "l", "RunCount": 1}), "it was stopped")
    agent._say_farewell()
    ((running, reports),) = sent
    assert [entry["ID"] for entry in running] == ["x"] == [report["ID"] for report in reports]
    assert (reports[0]["Status"], agent.outbox) == ("released", {})


@pytest.mark.parametrize("answers, sent_again", [
    ([("x",)], [False]), ([()], [True]), ([None], [False]), ([None, ()], [False, True]), ([(), ()], [True, False]),
    ([(), ("x",), ()], [True, False, True]),
])  # fmt: skip
def test_a_report_that_was_refused_is_sent_once_more_to_a_server_that_says_it_knows_the_job(answers, sent_again):
    agent = bare_agent(outbox={}, poll_at=None, away_until=0.0)
    agent.poll_news = agent.report_news = threading.Condition(agent.lock)
    run = client.Run(Job(["a"]), "folder", 0.0)
    for unknown, again in zip(answers, sent_again):
        agent.refused, agent.outbox = {"folder": {"ID": "x", "Lease": "l", "Run": run}}, {}
        agent._mind_refused(agent._running(), unknown)
        assert (list(agent.outbox), list(agent.refused)) == (["folder"], [])[:: 1 if again else -1]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="a small disk is mounted, which takes root")
def test_a_job_that_fails_on_a_full_disk_says_which(lab, desk, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.call(["mount", "-t", "tmpfs", "-o", "size=400k", "none", str(disk)]):
        pytest.skip("no tmpfs can be mounted here")
    try:
        server = desk(record(shell("cat /dev/zero >big"), StdOut=str(disk / "out"), WorkDir=str(disk)))
        lab.client(server.url, "--hostname", "pc7")
        (report,) = until(lambda: server.reports, "its report")
        assert report["Status"] == "failed" and report["Comment"] == f"the disk of pc7 is full: no room in {disk}"
    finally:
        subprocess.call(["umount", "-l", str(disk)])


def test_locks_of_keepers_that_were_killed_go_unless_a_run_names_them(lab, desk):
    spool_run(lab, run_name(1), {"Pid": 99999999, "Boot": "another"})
    first, folder = json.loads(read(lab.path("jobrunner-spool", "jobs", run_name(1), "log")).splitlines()[0]), "keepers"
    for name in ("99999998-0a0a0a0a.lock", "99999999-0b0b0b0b.lock", "notes"):
        lab.write(os.path.join("jobrunner-spool", folder, name), "")
    lab.write(os.path.join("jobrunner-spool", "jobs", run_name(1), "log"),
              json.dumps({**first, "Keeper": "99999998-0a0a0a0a.lock"}) + "\n")  # fmt: skip
    server = desk()
    lab.client(server.url)
    until(lambda: server.reports, "its report")
    names = set(os.listdir(lab.path("jobrunner-spool", folder)))
    assert {"99999998-0a0a0a0a.lock", "notes", "x.lock"} <= names and "99999999-0b0b0b0b.lock" not in names

"""Days and months: files that are their owner's alone, jobs that leave the queue for the archive, a clock that is set, a
file system that turns read-only, and logs that go round.
"""

import errno
import glob
import json
import os
import random
import re
import stat
import subprocess
import sys
import threading
import types
from unittest import mock

import pytest
from harness import PATIENCE, ROOT, read, until
from test_http import start
from test_queueing import Lab as QueueLab

import jobrunner
import server as server_module
from server import Archive

DAY = 86400


@pytest.fixture
def queue(tmp_path):
    made = QueueLab(str(tmp_path))
    made.archive = Archive(made.queue, os.path.join(made.folder, "kept"), 30 * DAY)
    yield made
    made.queue.store.close(clean=False)


def archived(folder):
    """The records in an archive, in the order they came."""
    found = []
    for path in sorted(glob.glob(os.path.join(folder, "finished-*.jsonl"))):
        with open(path, encoding="utf-8") as file:
            found += [json.loads(line) for line in file]
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps such things in the folder")
def test_every_file_is_its_owners_alone_whatever_the_umask_and_whatever_was_there(lab):
    for name in ("jobs.json", "jobs.json.lock", "jobs.json.new"):
        lab.write(name, '{"Available":{}}' if name == "jobs.json" else "")
        os.chmod(lab.path(name), 0o644)
    subprocess.run([sys.executable, os.path.join(ROOT, "server.py"), "--add-token", "submit:me", "--token-file", "mine"],
                   cwd=lab.folder, check=True, stdout=subprocess.DEVNULL)  # fmt: skip
    before = os.umask(0)
    try:
        server = lab.server("--log-file", "server.log", "--accounting", "accounts", "--keep-finished", "0.00001")
    finally:
        os.umask(before)
    with_output(server, 1)
    until(lambda: archived(lab.path("accounts")), "the job to be archived")
    with_output(server, 2)
    assert glob.glob(lab.path("jobs.json.journal"))
    assert server.stop() == 0
    assert {"accounts", "jobs.json", "jobs.json.output", "server.log", "mine"} <= set(os.listdir(lab.folder))
    open_to_all = {}
    for folder, folders, names in os.walk(lab.folder):
        for name in folders + names:
            mode = stat.S_IMODE(os.stat(os.path.join(folder, name)).st_mode)
            open_to_all.update({name: oct(mode)} if mode & 0o077 else {})
    assert set(open_to_all) <= {"server.py.log"}, open_to_all  # which is the test's own


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps such things in the folder")
def test_what_an_earlier_version_left_open_to_all_is_the_owners_alone_from_the_start(lab):
    lab.write("jobs.json", '{"Available":{}}')
    os.makedirs(lab.path("jobs.json.output", "000"))
    lab.write("jobrunner.tokens", '{"Tokens": []}')
    for name, mode in (("jobs.json", 0o644), ("jobs.json.output", 0o755), ("jobrunner.tokens", 0o640)):
        os.chmod(lab.path(name), mode)
    server = lab.server()
    modes = [oct(os.stat(lab.path(name)).st_mode & 0o777) for name in ("jobs.json", "jobs.json.output")]
    assert modes == ["0o600", "0o700"]
    assert "chmod 600" in lab.log("server.py.log")  # a person's file, which others may have to read
    assert server.stop() == 0


def test_a_database_that_is_a_folder_is_refused_and_the_folder_stays_as_it_is(lab):
    os.makedirs(lab.path("folder"), 0o755)
    server = lab.popen("server.py", "--port", "0", "--db", "folder")
    assert server.wait(PATIENCE) == 1 and "start with --db folder/jobs.json" in lab.log("server.py.log")
    assert sorted(os.listdir(lab.folder)) == ["folder", "server.py.log"]
    assert os.stat(lab.path("folder")).st_mode & 0o777 == 0o755


def with_output(server, number):
    """A job that has ended and left some output."""
    server.add(["true"])
    status, answer = server.post("/request", {"Hostname": "h", "Slots": 1})
    (job,) = answer["Jobs"]
    report = {"ID": job["ID"], "Lease": job["Lease"], "Hostname": "h", "ExitStatus": 0, "StdOutTail": f"said {number}"}
    assert server.post("/finish", report)[0] == 200
    return job["ID"]


# ---------------------------------------------------------------------------------------------------------------------
# Jobs that leave the queue
# ---------------------------------------------------------------------------------------------------------------------


def test_jobs_that_have_been_over_for_long_leave_with_all_that_is_known_of_them(queue):
    first, second, third = queue.add("a", "b", "c")
    job = queue.start()
    queue.end(first, StdOutTail="out\udcff", StdErrTail="err")
    whole = queue.job(first).public()
    queue.moment += 20 * DAY
    queue.run(second)
    queue.moment += 11 * DAY
    queue.archive.tick()
    (record,) = archived(queue.archive.folder)
    assert record == {**whole, "StdOutTail": "out\udcff", "StdErrTail": "err"} and "Lease" not in record
    assert sorted(queue.queue.numbers) == [second, third]
    assert queue.queue.store.read_output(job, "out") == b"" and not os.listdir(queue.queue.store.output_path)
    assert queue.queue.status()["Statuses"]["finished"] == 1
    for clean in (False, True):  # from the journal, and from the snapshot
        queue.restart(clean)
        assert sorted(queue.queue.numbers) == [second, third]
    assert queue.add("d") == [third + 1]


def test_nothing_leaves_that_is_not_over_or_not_for_long_or_that_others_wait_for(queue):
    over, running, queued = queue.add("over", "running", "queued")
    queue.run(over)
    queue.start()
    queue.moment += 31 * DAY
    young = queue.add("young")[0]
    queue.run(young)
    queue.queue.awaited[str(over)] = {f"afterany:{over}": {"x": None}}
    queue.archive.tick()
    assert archived(queue.archive.folder) and over in queue.queue.numbers  # noted, but it stayed
    queue.queue.awaited.clear()
    queue.moment += 3601
    queue.archive.tick()
    assert sorted(queue.queue.numbers) == [running, queued, young]


def test_an_array_leaves_as_a_whole_when_its_last_subjob_may(queue):
    (number,) = queue.add({"Params": ["run"], "Array": "1-3"})
    for index in (1, 2):
        queue.run(f"{number}[{index}]")
    queue.moment += 31 * DAY
    queue.archive.tick()
    assert archived(queue.archive.folder) == [] and len(queue.queue.jobs) == 3
    queue.run(f"{number}[3]")
    queue.moment += 29 * DAY
    queue.archive.tick()
    assert len(queue.queue.jobs) == 3
    queue.moment += 2 * DAY
    queue.archive.tick()
    assert [record["Label"] for record in archived(queue.archive.folder)] == [f"{number}[{i}]" for i in (1, 2, 3)]
    assert not queue.queue.jobs and not queue.queue.arrays and not queue.queue.array_ids
    queue.restart()
    assert not queue.queue.jobs and not queue.queue.arrays


def test_thousands_leave_in_slices_and_large_arrays_too(queue, monkeypatch):
    monkeypatch.setattr(server_module, "FORGET_SLICE", 7)
    monkeypatch.setattr(server_module, "WHOLE_ARRAY", 10)
    queue.add(*["x"] * 30)
    queue.add({"Params": ["run"], "Array": "1-25"})
    for job in queue.poll(slots=100):
        queue.end(job["ID"])
    queue.moment += 31 * DAY
    slices = []
    forget = queue.queue.forget
    monkeypatch.setattr(queue.queue, "forget", lambda jobs: slices.append(len(jobs)) or forget(jobs))
    until(lambda: queue.archive.tick() or not queue.queue.jobs, "all to leave")
    assert len(archived(queue.archive.folder)) == 55 and max(slices) == 7 and not queue.queue.arrays


def test_a_job_that_is_run_again_just_then_stays(queue, monkeypatch):
    (number,) = queue.add("x")
    queue.run(number)
    queue.moment += 31 * DAY
    append = server_module.append_durably

    def and_meanwhile(path, lines):
        append(path, lines)
        queue.verb("rerun", number)

    monkeypatch.setattr(server_module, "append_durably", and_meanwhile)
    queue.archive.tick()
    assert queue.state(number) == "Q"


def test_a_job_that_leaves_just_then_costs_no_other_report_that_comes_with_its_own(queue, monkeypatch):
    old, new = queue.add("x", "y")
    first = queue.start()
    queue.end(old)
    queue.moment += 31 * DAY
    second, keep = queue.start(), queue.queue._keep_outputs
    reports = [{"ID": job.id, "Lease": job.lease, "Hostname": "pc", "CPU": 1, "Mem": 1} for job in (second, first)]

    def and_meanwhile(job, report, wish):
        keep(job, report, wish)
        queue.archive.tick()

    monkeypatch.setattr(queue.queue, "_keep_outputs", and_meanwhile)
    stale = {"ID": first.id, "Stale": True}
    assert queue.do("report", reports, "finish") == [{"ID": second.id}, stale]
    assert list(queue.queue.jobs) == [second.id] and queue.state(new) == "F finished"
    monkeypatch.setattr(queue.queue, "_report_fields", lambda report: (report["ID"], report["Lease"], "pc"))
    assert queue.do("sample", reports) == [{"ID": second.id}, stale]
    assert queue.queue.stream(reports[1:]) == [{"ID": first.id, "Follow": False}]
    queue.restart()
    assert queue.state(new) == "F finished"


def test_where_the_archive_cannot_be_written_the_jobs_stay_and_it_is_tried_again(queue, monkeypatch, caplog):
    (number,) = queue.add("x")
    queue.run(number)
    queue.moment += 31 * DAY

    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(server_module.os, "fsync", full)
        queue.archive.tick()
    assert number in queue.queue.numbers and archived(queue.archive.folder) == [] and "No space" in caplog.text
    queue.moment += 61
    queue.archive.tick()
    assert not queue.queue.jobs and len(archived(queue.archive.folder)) == 1


def test_where_the_journal_cannot_be_written_the_jobs_are_still_there(queue, monkeypatch):
    numbers = [*queue.add("x"), *queue.add({"Params": ["run"], "Array": "1-2"})]
    for job in queue.poll(slots=9):
        queue.end(job["ID"])
    queue.moment += 31 * DAY

    def full(data):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(queue.queue.store, "_append", full)
        queue.archive.tick()
    assert [queue.state(number) for number in numbers] == ["F finished", "F"]
    assert queue.queue.counts[server_module.State.FINISHED] == 3
    queue.moment += 61
    queue.archive.tick()
    assert not queue.queue.jobs and not queue.queue.arrays


@pytest.mark.parametrize(
    "text, lines", [(b"", 1), (b"{}\n", 2), (b'{}\n{"tor', 2), (b'{"tor', 1), (b"{}\n" + b"x" * 70000, 2)]
)
def test_half_a_line_that_a_kill_left_is_cut_off_before_others_follow(tmp_path, text, lines):
    path = str(tmp_path / "a")
    with open(path, "wb") as file:
        file.write(text)
    server_module.append_durably(path, b"{}\n")
    with open(path, "rb") as file:
        assert file.read() == b"{}\n" * lines


def test_kills_at_any_moment_lose_no_job_between_queue_and_archive(lab):
    """Eight rounds: jobs end and leave at once, while the server is killed."""
    rounds, ended = random.Random(3), set()
    for _ in range(8):
        server = lab.server("--keep-finished", "0")
        for number in range(40):
            ended.add(with_output(server, number))
        timer = threading.Timer(rounds.random() * 1.5, server.process.kill)
        timer.start()
        server.process.wait(PATIENCE)
    server = lab.server("--keep-finished", "9999")
    in_queue = {job["ID"] for job in server.get("/jobs")[1]["Jobs"]}
    records = archived(lab.path("jobs.json.accounting"))  # every line of them is whole
    assert in_queue | {record["ID"] for record in records} == ended
    assert all(record["StdOutTail"].startswith("said ") for record in records) and records
    kept = {name for _, _, names in os.walk(lab.path("jobs.json.output")) for name in names}
    assert len(kept) <= len(in_queue)


# ---------------------------------------------------------------------------------------------------------------------
# No threads to be had
# ---------------------------------------------------------------------------------------------------------------------


def test_a_server_that_can_have_no_thread_for_its_snapshot_goes_on_and_makes_it_later(queue, monkeypatch):
    queue.add("x")
    start_thread, refused, looks = threading.Thread.start, [], []

    def start_second(thread):
        if not refused:
            refused.append(thread)
            raise RuntimeError("can't start new thread")
        start_thread(thread)
        thread.join()

    monkeypatch.setattr(threading.Thread, "start", start_second)
    monkeypatch.setattr(server_module, "IDLE_SNAPSHOT", -1)
    stop = types.SimpleNamespace(wait=lambda seconds: looks.append(seconds) or len(looks) > 2)
    server_module.run_until_stopped(types.SimpleNamespace(queue=queue.queue, stop=stop), None)
    assert refused and queue.queue.store.snapshot_bytes > 0


# ---------------------------------------------------------------------------------------------------------------------
# A clock that is set
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def clocks(tmp_path):
    """A queue with a clock that can be set, and one that cannot."""
    made = QueueLab(str(tmp_path))
    made.queue.store.close(clean=False)
    made.steady = 0.0
    made.queue = server_module.Queue(
        server_module.Store(os.path.join(made.folder, "jobs.json")),
        clock=lambda: made.moment,
        steady=lambda: made.steady,
    )
    made.queue.load()

    def passes(seconds):
        made.moment, made.steady = made.moment + seconds, made.steady + seconds
        made.queue.tick()

    made.passes = passes
    yield made
    made.queue.store.close(clean=False)


@pytest.mark.parametrize("jump", [7200, -7200, 10 * DAY, -400 * DAY])
@pytest.mark.parametrize("original", [False, True])
def test_a_lease_ends_neither_earlier_nor_later_because_the_clock_was_set(clocks, jump, original):
    (number,) = clocks.add(Runtime=3000)
    clocks.do("lease", "old") if original else clocks.start()
    clocks.passes(1800)
    clocks.moment += jump
    clocks.passes(1)
    assert clocks.state(number) == "R"
    clocks.passes(1790)
    assert clocks.state(number) == "R"
    clocks.passes(20)
    assert clocks.state(number) == "Q"


@pytest.mark.parametrize("jump", [7200, -7200])
def test_a_lease_that_was_renewed_between_the_jump_and_its_notice_is_whole(clocks, jump):
    (number,) = clocks.add()
    job = clocks.start()
    clocks.passes(1800)
    clocks.moment += jump
    running = [{"ID": job.id, "Lease": job.lease}]
    clocks.do("poll", {"Hostname": "pc", "Slots": 0, "Running": running, "Node": {"Slots": 1}}, lambda: True)
    clocks.passes(3590)
    assert clocks.state(number) == "R"
    clocks.passes(20)
    assert clocks.state(number) == "Q"


@pytest.mark.parametrize("jump", [7200, -7200])
def test_clients_count_as_down_after_the_silence_that_was(clocks, jump, caplog):
    clocks.poll()
    clocks.moment += jump
    clocks.passes(290)
    assert clocks.queue.node_records()[0]["State"] == "free"
    assert "queue.clock" in caplog.text
    clocks.passes(20)
    assert clocks.queue.node_records()[0]["State"] == "down"
    assert clocks.queue.status()["Uptime"] == 310


def test_of_too_many_clients_the_longest_silent_that_have_nothing_here_are_forgotten(clocks, monkeypatch):
    monkeypatch.setattr(server_module, "MOST_NODES", 20)
    ask = {"Hostname": "busy", "Slots": 1, "Node": {"Slots": 1, "Session": "x" * 9000}}
    clocks.add()
    assert clocks.do("poll", ask, lambda: True)["Jobs"]
    for number in range(100):
        clocks.passes(1)
        clocks.do("poll", {**ask, "Hostname": f"pc{number}", "Node": {"Client": "c"}}, lambda: True)
        clocks.queue.refusals[f"pc{number}"] = "it would not"
    hosts = {record["Host"] for record in clocks.queue.node_records()}
    assert {"busy", *(f"pc{number}" for number in range(90, 100))} < hosts and len(hosts) <= 20
    assert len(clocks.queue.refusals) <= 20 and len(clocks.queue.nodes["busy", ""].session) < 300


def test_a_start_time_that_somebody_asked_for_is_by_the_clock_on_the_wall(clocks):
    (number,) = clocks.add(StartAfter=jobrunner.format_time(clocks.moment + 3600))
    clocks.passes(10)
    assert clocks.state(number) == "W"
    clocks.moment += 3600
    clocks.passes(1)
    assert clocks.state(number) == "Q"


def test_a_pause_before_a_retry_is_not(clocks):
    (number,) = clocks.add(Retries=1)
    clocks.start()
    clocks.end(number, 1)
    assert clocks.state(number) == "W"
    clocks.moment -= 7200
    clocks.passes(1)
    assert clocks.state(number) == "W"
    clocks.passes(40)
    assert clocks.state(number) == "Q"


def test_a_clock_that_is_slewed_is_not_one_that_was_set(clocks, caplog):
    for _ in range(100):
        clocks.moment += 1
        clocks.passes(1)
    assert "queue.clock" not in caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# A file system that turns read-only
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("snapshot", [False, True])
def test_a_journal_on_a_read_only_file_system_answers_507_and_goes_on_when_it_can_be_written(
    queue, monkeypatch, snapshot
):
    """As a system does that remounts a failing disk: nothing can be written, opened for writing or renamed."""
    queue.add("before")
    journal, fake = queue.queue.store.journal, OSError(errno.EROFS, "Read-only file system")

    def refuse(*_):
        raise fake

    real_open = os.open

    def read_only(path, flags, *more, **named):
        if flags & (os.O_RDWR | os.O_WRONLY | os.O_CREAT):
            refuse()
        return real_open(path, flags, *more, **named)

    with monkeypatch.context() as patch:
        for name in ("write", "replace", "ftruncate", "fsync"):
            patch.setattr(server_module.os, name, refuse)
        patch.setattr(server_module.os, "open", read_only)
        for _ in range(2):
            if snapshot:
                assert queue.queue.snapshot() is False
                taken = real_open(os.devnull, os.O_RDONLY)  # gets the number that the journal had
                os.close(taken)
            with pytest.raises(server_module.DiskFailed, match="Read-only|Bad file") as refused:
                queue.add("meanwhile")
            assert refused.value.status == 507
    assert journal >= 0 and [str(job) for job in queue.queue.picture()] == ["1"]
    assert queue.add("after") == [4]  # numbers that were refused are not given again
    assert queue.queue.snapshot() is True
    queue.restart()
    assert [job.params[-1] for job in queue.queue.picture()] == ["before", "after"]


def test_what_there_is_no_memory_to_write_is_not_taken_for_written(queue, monkeypatch):
    queue.add("before")
    with monkeypatch.context() as patch:
        patch.setattr(queue.queue.store, "_append", mock.Mock(side_effect=MemoryError))
        with pytest.raises(server_module.DiskFailed, match="MemoryError"):
            queue.add("meanwhile")
    queue.add("after")
    queue.restart()
    assert [job.params[-1] for job in queue.queue.picture()] == ["before", "after"]


# ---------------------------------------------------------------------------------------------------------------------
# The log
# ---------------------------------------------------------------------------------------------------------------------


def test_a_log_file_goes_round_and_is_its_owners_alone(tmp_path):
    path = str(tmp_path / "log")
    program = "import jobrunner, logging, sys; jobrunner.start_log('info', sys.argv[1], 1000, 2)\n"
    program += "for i in range(100): logging.getLogger('x').info('line=%d é \\udcff', i)"
    subprocess.run([sys.executable, "-c", program, path], check=True, cwd=ROOT, timeout=PATIENCE)
    names = sorted(os.listdir(str(tmp_path)))
    assert names == ["log", "log.1", "log.2"]
    for name in names:
        about = os.stat(str(tmp_path / name))
        assert about.st_size <= 1000 and (os.name == "nt" or stat.S_IMODE(about.st_mode) == 0o600)
    assert "line=99 " in read(path) + read(path + ".1")


def test_what_a_client_calls_itself_begins_no_line_of_the_log_and_moves_no_cursor(lab):
    server = start(lab, "--log-file", "my.log")
    for number, end in enumerate(("\n", "\r", "\u2028", "\x1b[2J", "\x85", "\u202e")):
        forged = f"pc{number}{end}2026-01-01T00:00:00Z ERROR forged"
        assert server.post("/request", {"Hostname": forged, "Slots": 0})[0] == 200
    server.stop()
    with open(lab.path("my.log"), "rb") as file:
        lines = [line for line in file.read().decode().splitlines() if "forged" in line]
    assert len(lines) == 6 and all(re.match(r"\S+ INFO node\.new host=pc\d\\[nrux]\S* ?", line) for line in lines)
    assert all(line.isprintable() for line in lines)


def test_a_server_logs_to_its_file_and_says_when_it_cannot(lab):
    server = start(lab, "--log-file", "my.log", "--log-level", "debug")
    server.add(["true"])
    server.stop()
    assert "server.stop" in read(lab.path("my.log")) and lab.log("server.py.log") == ""
    command = [sys.executable, os.path.join(ROOT, "server.py"), "--log-file", "no/such/folder", "--port", "0"]
    done = subprocess.run(command, cwd=lab.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=PATIENCE)
    assert done.returncode == 1 and b"no/such/folder" in done.stderr and b"Traceback" not in done.stderr

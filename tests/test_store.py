"""The store (DESIGN.md section 6), with servers that are killed for real: what an answer means, kill -9 at any instant,
what a start makes of whatever it finds on the disk, numbers, clean stops, full disks, and two servers on one database.

The disk is the real one.  Three tests need it to stand still, or the server to die, at one exact step: there server.py
runs unchanged under a Python whose os.fsync (or each of the calls that change the disk) waits, or is the last one made.
"""

import concurrent.futures
import errno
import glob
import http.client
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.parse

import pytest
from harness import ROOT, Lab, Server, until

sys.path.insert(0, ROOT)
import server as server_module  # noqa: E402

# ---------------------------------------------------------------------------------------------------------------------
# What the tests share
# ---------------------------------------------------------------------------------------------------------------------

RUN = "sys.argv.pop(0); sys.path[0] = os.path.dirname(sys.argv[0]); runpy.run_path(sys.argv[0], run_name='__main__')\n"

# fsync of files whose name ends in $HOLD is noted in the file `fsyncs`, and lasts as long as there is a file `held`
STILL_DISK = """
import os, runpy, sys, time
def fsync(fd, real=os.fsync):
    if os.readlink(f"/proc/self/fd/{fd}").endswith(os.environ["HOLD"]):
        with open("fsyncs", "ab") as file:
            file.write(b".")
        while os.path.exists("held"):
            time.sleep(0.005)
    real(fd)
os.fsync = fsync
""" + RUN

# the call number $STEP among those that change the disk is not made, a write half of it, and nothing after it
DEADLY_STEP = """
import itertools, os, runpy, signal, sys
steps = itertools.count(1)
def deadly(name, real):
    def call(*words):
        if next(steps) == int(os.environ["STEP"]):
            if name == "write":
                real(words[0], words[1][:len(words[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*words)
    return call
for name in ("write", "fsync", "ftruncate", "replace", "remove"):
    setattr(os, name, deadly(name, getattr(os, name)))
""" + RUN


def under(code, **environment):
    """What makes lab.server run server.py under one of the disks above."""
    environment = {key: str(value) for key, value in environment.items()}
    return {"python": [sys.executable, "-c", code], "env": {**os.environ, **environment}}


def refusal(lab, db="jobs.json"):
    """The one line a server says that will not start with a database; fails if it starts, or says more."""
    log = f"refused-{random.getrandbits(64):x}.log"
    process = lab.popen("server.py", "--bind", "127.0.0.1", "--port", 0, "--db", db, log=log, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"", "it started"
    assert process.wait(30) == 1
    words = lab.log(log)
    assert words.startswith("server.py: ") and words.count("\n") == 1 and words.endswith("\n"), words
    return words


def all_jobs(server):
    """{ID: record} of /dump, with the bucket as Bucket."""
    status, dump = server.get("/dump")
    assert status == 200
    return {key: {**job, "Bucket": bucket} for bucket, jobs in dump.items() for key, job in jobs.items()}


def picture(server):
    """All that must be as it was: the jobs, and the counts in /status."""
    status = server.status()
    return all_jobs(server), status["Jobs"], status["States"], status["Statuses"]


def bare(picture):
    """Without the end of our clients' leases, which count anew from a restart on."""
    jobs, *counts = picture
    return {key: {k: v for k, v in job.items() if k != "Expiry"} for key, job in jobs.items()}, counts


def numbers(server):
    return {key: job["Number"] for key, job in all_jobs(server).items()}


def words_of(server):
    """The last word of every job's Params, sorted: a short name for each."""
    return sorted(job["Params"][-1] for job in all_jobs(server).values())


def files(lab):
    """{name: bytes} of the database's files, but for the lock."""
    names = [os.path.basename(path) for path in glob.glob(lab.path("jobs.json*")) if os.path.isfile(path)]
    return {name: read(lab.path(name)) for name in names if not name.endswith(".lock")}


def read(path):
    with open(path, "rb") as file:
        return file.read()


def until_snapshot(lab, server):
    """Returns the moment a snapshot is begun; no harness.until, which looks 50 times a second and would be late."""
    deadline = time.monotonic() + 30
    while not glob.glob(lab.path("jobs.json.journal.*")) and server.process.poll() is None:
        assert time.monotonic() < deadline


def put(lab, **contents):
    """Leaves just these files of the database; the names are jobs, journal, journal_1 ..."""
    for name in files(lab):
        os.remove(lab.path(name))
    for name, data in contents.items():
        name = "jobs.json" if name == "jobs" else "jobs.json." + name.replace("_", ".")
        with open(lab.path(name), "wb") as file:
            file.write(data)


class Adders:
    """Connections that add jobs, one after the other, until the server is gone: GET, POST, and POST with a list.

    sent    [[word]]                what was sent, request by request
    acked   {ID: (Number, word)}    what was acknowledged
    others  {status}                answers that acknowledged nothing
    """

    _names = itertools.count()

    def __init__(self):
        self.sent, self.acked, self.others, self.threads = [], {}, set(), []

    def start(self, server, connections=4):
        work = [(server.port, next(self._names)) for _ in range(connections)]
        self.threads = [threading.Thread(target=self._add, args=words) for words in work]
        for thread in self.threads:
            thread.start()

    def join(self):
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive()

    def _add(self, port, name):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            for turn in itertools.count():
                words = [f"{name}-{turn}-{place} <ä>" for place in range((1, 1, 5)[turn % 3])]
                jobs = [{"Params": ["true", word], "Runtime": 60} for word in words]
                self.sent.append(words)
                if turn % 3 == 0:
                    connection.request("GET", "/add?" + urllib.parse.urlencode({"configuration": json.dumps(jobs[0])}))
                else:
                    connection.request("POST", "/add", json.dumps(jobs if turn % 3 == 2 else jobs[0]))
                answer = connection.getresponse()
                added = json.loads(answer.read())
                if answer.status != 200:
                    self.others.add(answer.status)
                    return
                added = added if isinstance(added, list) else [added]
                assert len(added) == len(words)
                self.acked.update((job["ID"], (job["Number"], word)) for job, word in zip(added, words))
        except (OSError, http.client.HTTPException):
            pass  # the server is gone
        finally:
            connection.close()

    def check(self, server):
        """Every acknowledged job is there as it was acknowledged, every list all or not at all, and nothing else."""
        jobs = all_jobs(server)
        there = {key: (job["Number"], job["Params"][1]) for key, job in jobs.items()}
        assert {key: there.get(key) for key in self.acked} == self.acked
        words = [word for _, word in there.values()]
        assert len({number for number, _ in there.values()}) == len(set(words)) == len(words)
        known = set(words)
        parts = [sum(word in known for word in sent) for sent in self.sent]
        assert [part for part, sent in zip(parts, self.sent) if part not in (0, len(sent))] == []
        assert sum(parts) == len(words)


# ---------------------------------------------------------------------------------------------------------------------
# An answer means it is on disk
# ---------------------------------------------------------------------------------------------------------------------


def test_twenty_rounds_of_kill_9_under_four_adding_connections_lose_nothing_acknowledged(lab):
    adders = Adders()
    for turn in range(20):
        server = lab.server()
        adders.check(server)
        before = len(adders.acked)
        adders.start(server)
        until(lambda: len(adders.acked) > before, "the first answer")
        time.sleep(random.uniform(0, 0.1))
        if turn % 4 == 3:  # a clean stop that is killed while it makes the snapshot
            server.process.terminate()
            until_snapshot(lab, server)
            time.sleep(random.uniform(0, 0.02))
        server.kill()
        adders.join()
        assert adders.others <= {503, 507}
        if os.path.exists(server.db):
            json.loads(read(server.db))
    adders.check(lab.server())
    assert len(adders.acked) > 200


def test_a_clean_stop_under_adding_connections_has_everything_acknowledged_in_jobs_json_alone(lab):
    adders = Adders()
    for turn in range(4):
        server = lab.server()
        before = len(adders.acked)
        adders.start(server)
        until(lambda: len(adders.acked) > before + 50, "some answers")
        assert server.stop() == 0
        adders.join()
        assert adders.others <= {503, 507}
        alone = json.loads(read(server.db))
        assert set(adders.acked) <= set(alone["Available"]), f"stop {turn}"
        assert list(files(lab)) == ["jobs.json"]
    adders.check(lab.server())


def test_a_kill_at_any_step_the_store_makes_loses_nothing_acknowledged(lab):
    """Start, two additions, a clean stop; each server dies one step later than the one before, until one does not."""
    acked, fixed = [], ("--bind", "127.0.0.1", "--port", 0, "--db", "jobs.json")
    for step in range(1, 60):
        process = lab.popen("server.py", *fixed, stdout=subprocess.PIPE, **under(DEADLY_STEP, STEP=step))
        line = process.stdout.readline().decode()
        if line:
            server = Server(process, line.split(" at ")[1].strip(), lab.path("jobs.json"))
            assert set(acked) <= set(numbers(server)), f"before step {step}"
            try:
                for _ in range(2):
                    acked.append(server.get("/add", configuration='{"Params":["true"]}')[1]["ID"])
                server.process.terminate()
            except (OSError, http.client.HTTPException):
                pass  # it died
        if process.wait(30) == 0:
            break
        assert process.returncode == -9, lab.log("server.py.log")
    assert step > 10  # so many steps there are at the least
    assert set(acked) <= set(json.loads(read(lab.path("jobs.json")))["Available"])
    assert set(acked) <= set(numbers(lab.server()))


def test_no_change_is_answered_before_it_is_on_disk_and_those_that_wait_share_one_fsync(lab):
    server = lab.server(**under(STILL_DISK, HOLD=".journal"))
    server.add(*[["true", str(n)] for n in range(4)])
    ours = server.post("/request", {"Hostname": "ours", "Slots": 2})[1]["Jobs"]
    assert server.get("/request", hostname="original")[0] == 200
    report, sample = ({"ID": job["ID"], "Lease": job["Lease"]} for job in ours)
    asked = len(read(lab.path("fsyncs")))
    lab.write("held", "")
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(server.post, "/add", {"Params": ["first"]})]
        until(lambda: len(read(lab.path("fsyncs"))) > asked, "the disk to be asked")
        waiting += [
            pool.submit(server.get, "/add", configuration='{"Params":["second"]}'),
            pool.submit(server.post, "/add", [{"Params": ["third"]}, {"Params": ["fourth"]}]),
            pool.submit(server.post, "/finish", {**report, "ExitStatus": 0}),
            pool.submit(server.post, "/usage", {**sample, "CPU": 1, "Mem": 2}),
            pool.submit(server.post, "/request", {"Hostname": "another", "Slots": 1}),
        ]
        try:
            until(lambda: picture(server)[1:3] == (8, {"Q": 4, "H": 0, "W": 0, "R": 3, "F": 1}), "all to be taken in")
            until(lambda: all_jobs(server)[sample["ID"]]["CPUUsed"] == [1], "the sample")
            assert not any(answer.done() for answer in waiting)
        finally:
            os.remove(lab.path("held"))
        assert [answer.result()[0] for answer in waiting] == [200] * 6
    assert len(read(lab.path("fsyncs"))) == asked + 2  # the first, and one for all that came meanwhile


@pytest.mark.parametrize("second", ["the same report", "the same report, the original's way", "GET /job"])
def test_nobody_is_told_of_a_jobs_end_before_it_is_on_disk(lab, second):
    server = lab.server(**under(STILL_DISK, HOLD=".journal"))
    server.add(["true"])
    if "original" in second:
        query = {"hostname": "h", "configuration": json.dumps(server.get("/request", hostname="h")[1])}
        report = [server.get, "/finish?" + urllib.parse.urlencode(query)]
    else:
        job = server.post("/request", {"Hostname": "h", "Slots": 1})[1]["Jobs"][0]
        report = [server.post, "/finish", {"ID": job["ID"], "Lease": job["Lease"], "ExitStatus": 0}]
    asked = len(read(lab.path("fsyncs")))
    lab.write("held", "")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(*report)
        until(lambda: len(read(lab.path("fsyncs"))) > asked, "the disk to be asked")
        again = pool.submit(*(report if "same" in second else [server.get, "/job?id=1&wait=60"]))
        concurrent.futures.wait([again], 0.3)  # only a wrong answer comes now, and it comes at once
        early = again.done()
        os.remove(lab.path("held"))
        assert first.result()[0] == again.result()[0] == 200
    assert server.job(1)["State"] == "F"
    assert not early


def test_the_tails_of_a_jobs_output_are_on_disk_before_its_report_is_answered(lab):
    server = lab.server()
    server.add(["true"], ["true"])
    tails = {"StdOutTail": "out \udce4 ä\n" * 1000, "StdErrTail": "err\r\n"}  # \udce4: a byte that is no UTF-8
    jobs = server.post("/request", {"Hostname": "h", "Slots": 2})[1]["Jobs"]
    reports = [{"ID": job["ID"], "Lease": job["Lease"], "ExitStatus": 0, **tails} for job in jobs]
    assert server.fetch("/finish", json.dumps(reports).encode())[0] == 200
    server.kill()
    kept = [read(path) for path in sorted(glob.glob(lab.path("jobs.json.output", "*", "*")))]
    assert kept == [b"err\r\n", tails["StdOutTail"].encode("utf-8", "surrogateescape")] * 2
    server = lab.server()
    for number in (1, 2):
        status, output = server.get("/output", id=number)
        assert (status, output["StdOut"], output["StdErr"]) == (200, tails["StdOutTail"], tails["StdErrTail"])
        assert server.job(number)["State"] == "F"


def test_requests_go_on_while_a_snapshot_is_written_and_a_kill_then_loses_nothing(lab):
    """The one test of a snapshot in the background, which comes five seconds after the start at the earliest."""
    lab.write("held", "")
    server = lab.server(**under(STILL_DISK, HOLD=".new"))
    many = server.add(*[["true", "x" * 65000, str(n)] for n in range(400)])  # a large journal makes it due
    until(lambda: os.path.exists(lab.path("fsyncs")), "a snapshot")
    adders = Adders()
    adders.start(server)
    until(lambda: len(adders.acked) > 100, "answers")
    leased = server.post("/request", {"Hostname": "h", "Slots": 3})[1]["Jobs"]
    server.kill()
    adders.join()
    assert sorted(files(lab)) == ["jobs.json.journal", "jobs.json.journal.1", "jobs.json.new"]
    server = lab.server()
    after = all_jobs(server)
    assert {key: after[key]["Number"] for key in adders.acked} == {k: n for k, (n, _) in adders.acked.items()}
    assert [job["Number"] for job in after.values() if job["Bucket"] == "Leased"] == many[:3] == [
        job["Number"] for job in leased
    ]
    assert set(many) <= {job["Number"] for job in after.values()}
    assert server.stop() == 0
    assert list(files(lab)) == ["jobs.json"]


def test_a_list_is_added_whole_or_not_at_all(lab):
    server = lab.server()
    server.add(["true"])
    before = picture(server), files(lab)
    for place in range(3):
        jobs = [{"Params": ["true"]}, {"Params": ["true"]}]
        jobs.insert(place, {"Params": []})
        status, answer = server.post("/add", jobs)
        assert status == 400 and f"job {place + 1} of 3" in answer["Error"]
        assert (picture(server), files(lab)) == before
    assert [job["Number"] for job in server.post("/add", [{"Params": ["true"]}] * 3)[1]] == [2, 3, 4]
    server.kill()
    assert sorted(numbers(lab.server()).values()) == [1, 2, 3, 4]


# ---------------------------------------------------------------------------------------------------------------------
# A restart, after a clean stop or kill -9, knows what was
# ---------------------------------------------------------------------------------------------------------------------


def a_job_of_every_kind(server):
    """Adds them, and makes them what they are; {name: what /request answered} of those that run."""
    ends = ["finished", "failed", "timeout", "dead", "refused", "original finish", "original timeout", "original dead"]
    names = ends + ["deleted", "sampled", "ours", "original", "queued", "held", "waiting"]
    more = {"Runtime": 60, "Colour": {"any": ["<ä>", 1.5, None]}}
    plain = [{"Params": ["true", name], "Name": name, **more} for name in names]
    plain[names.index("held")]["Hold"] = True
    plain[names.index("waiting")]["StartAfter"] = "2099-01-01T00:00:00+01:00"
    by_name = dict(zip(names, server.add(*plain)))
    full = {"Queue": "long", "Priority": -5, "Memory": 1 << 33, "CpuTime": 9, "Ncpus": 2, "Requires": ["windows"]}
    full.update({"Env": {"A": "1"}, "WorkDir": "C:\\x", "Owner": "me@here", "Rerunable": False, "StdOut": "out"})
    server.queue("long", MaxRun=7, Priority=3)
    server.add({"Params": ["a b", "", "\\"], **full})
    assert server.post("/delete", {"IDs": [str(by_name["deleted"])]})[0] == 200
    leased = {}
    for name in names[: names.index("queued")]:
        if "original" in name:
            leased[name] = server.get("/request", hostname="old")[1]
        elif name != "deleted":
            leased[name] = server.post("/request", {"Hostname": "h-" + name, "Slots": 1})[1]["Jobs"][0]
        assert name == "deleted" or leased[name]["Params"][1] == name
    for name, url, words in [
        ("finished", "/finish", {"ExitStatus": 0, "CpuTimeUsed": 1.5, "MaxMem": 1000}),
        ("failed", "/finish", {"ExitStatus": 4294967295, "Comment": "ö"}),
        ("timeout", "/timeout", {"ExitStatus": -11}),
        ("dead", "/dead", {"ExitStatus": -101}),
        ("refused", "/finish", {"Status": "refused", "Comment": "not allowed"}),
        ("sampled", "/usage", {"CPU": 4677, "Mem": 1765376, "CpuTimeUsed": 2.25, "Seconds": 60}),
        ("sampled", "/usage", {"CPU": 1, "Mem": 2, "CpuTimeUsed": 3, "Seconds": 60}),
    ]:
        status, answer = server.post(url, {"ID": leased[name]["ID"], "Lease": leased[name]["Lease"], **words})
        assert (status, answer) == (200, [{"ID": leased[name]["ID"]}])
    for url in ("finish", "timeout", "dead"):
        job = json.dumps(leased["original " + url])
        assert server.get("/" + url, hostname="old", configuration=job) == (200, None)
    return leased


@pytest.mark.parametrize("end", ["kill", "stop"])
def test_jobs_leases_and_counts_are_after_a_restart_what_they_were(lab, end):
    server = lab.server()
    leased = a_job_of_every_kind(server)
    before = picture(server)
    assert before[2] == {"Q": 3, "H": 1, "W": 1, "R": 3, "F": 8}  # or there is little to compare
    for _ in range(2):
        getattr(server, end)()
        server = lab.server()
        after = picture(server)
        assert bare(after) == bare(before)
        assert after[0][leased["original"]["ID"]] == before[0][leased["original"]["ID"]]  # with its Expiry
    right = {key: leased["ours"][key] for key in ("ID", "Lease")}
    wrong = {**right, "Lease": "no"}
    assert server.post("/finish", wrong)[1] == [{"ID": wrong["ID"], "Stale": True}]
    assert server.job(wrong["ID"])["State"] == "R"
    assert server.post("/finish", right)[1] == [{"ID": right["ID"]}]
    assert server.get("/finish", hostname="old", configuration=json.dumps(leased["original"]))[0] == 200
    assert [server.job(leased[name]["ID"])["Status"] for name in ("ours", "original")] == ["finished"] * 2


ODD = "".join(map(chr, [0, 1, 10, 27, 127, 133, 155, 0x2028, 0x202E, 0xD800, 0xDCFF]))


@pytest.mark.parametrize("status", ["failed", "released", "refused"])
def test_no_text_of_a_clients_keeps_the_server_from_starting_again(lab, status):
    server = lab.server("--offline-after", "1")
    server.add(["true"], ["true"])
    assert server.get("/request", hostname="a\0b")[0] == 400
    node = {"Client": ODD[1:], "Machine": ODD, "Pause": "", "Session": ODD, "Properties": [ODD], "x": {ODD: ODD}}
    (job,) = server.post("/request", {"Hostname": "h" + ODD[1:], "Node": node})[1]["Jobs"]
    end = {"ID": job["ID"], "Lease": job["Lease"], "Status": status, "ExitStatus": -8, "Comment": f"why{ODD}"}
    assert server.post("/finish", {**end, "StdOutTail": ODD, "StdErrTail": ODD}) == (200, [{"ID": job["ID"]}])
    assert server.get("/request", hostname="old" + ODD[1:-2])[1]["ID"]
    before = picture(server)
    server.kill()
    server = lab.server()
    assert bare(picture(server)) == bare(before)
    server.stop()
    assert bare(picture(lab.server())) == bare(before)


def test_numbers_go_on_after_a_restart_and_none_is_given_twice(lab):
    given = []
    for end in ("kill", "stop", "kill"):
        server = lab.server()
        given += server.add(["true"], ["true"])
        getattr(server, end)()
    assert given == list(range(1, 7))
    assert sorted(numbers(lab.server()).values()) == given


def test_after_a_clean_stop_jobs_json_alone_is_the_whole_truth_a_job_a_line(lab):
    server = lab.server()
    leased = a_job_of_every_kind(server)
    before = picture(server)
    assert server.stop() == 0
    assert list(files(lab)) == ["jobs.json"]
    text = read(lab.path("jobs.json")).decode()
    lines = [line for line in text.splitlines() if '"Params":' in line]
    assert sorted(line[1:37] for line in lines) == sorted(before[0])  # each begins with a job's ID, and holds just one
    assert all(json.JSONDecoder().raw_decode(line, 39)[0]["ID"] == line[1:37] for line in lines)
    assert list(json.loads(text)) == ["Server", "Available", "Leased", "Finished", "Held"]
    os.mkdir(lab.path("elsewhere"))
    shutil.copy(lab.path("jobs.json"), lab.path("elsewhere"))
    server = lab.server(db="elsewhere/jobs.json")
    assert bare(picture(server)) == bare(before)
    assert server.add(["true"]) == [max(job["Number"] for job in before[0].values()) + 1]
    assert server.post("/finish", {"ID": leased["ours"]["ID"], "Lease": leased["ours"]["Lease"]})[1] == [
        {"ID": leased["ours"]["ID"]}
    ]


def test_a_saved_dump_is_a_database_too_and_its_numbers_are_kept(lab):
    server = lab.server()
    server.add(["a"], ["b"], ["c"])
    before = picture(server)
    lab.write("saved.json", server.fetch("/dump")[2].decode())
    server = lab.server(db="saved.json")
    assert picture(server) == before
    assert server.add(["d"]) == [4]


# ---------------------------------------------------------------------------------------------------------------------
# What a start finds: the original's files, and those made by hand
# ---------------------------------------------------------------------------------------------------------------------

A, B, C, D, E = (f"81b82367-c5c4-439b-a290-b16b1a13781{n}" for n in "abcde")
ORIGINAL_DB = (
    '{"Available":{"A":{"ID":"A","Params":["echo","\\u003ca\\u0026b\\u003e ä"],"Runtime":60},'
    '"B":{"ID":"B","Params":["true"],"Runtime":0}},'
    '"Leased":{"C":{"ID":"C","Params":["sleep","1"],"Runtime":60,"Host":"hostA",'
    '"StartTime":"2026-11-23T17:27:00.923836298Z","Expiry":"2099-11-23T17:38:00.923836354+01:00",'
    '"MemUsed":[1765376,-1],"CPUUsed":[4677,0]}},'
    '"Finished":{"D":{"ID":"D","Params":["true"],"Runtime":60,"Host":"hostB",'
    '"StartTime":"2026-11-23T18:27:00.9+01:00","EndTime":"2026-11-23T18:27:30-05:30","MemUsed":null,"CPUUsed":null,'
    '"Status":"timeout"},"E":{"ID":"E","Params":["true"],"Runtime":60,"Host":"\\u003cunknown\\u003e",'
    '"StartTime":"2026-11-23T17:27:00.923836Z","EndTime":"2026-11-23T17:27:01Z","MemUsed":null,"CPUUsed":null,'
    '"Status":"finished"}}}'
)
for letter, uuid in zip("ABCDE", (A, B, C, D, E)):
    ORIGINAL_DB = ORIGINAL_DB.replace(f'"{letter}"', f'"{uuid}"')


def test_the_originals_database_loads_as_it_is(lab):
    lab.write("jobs.json", ORIGINAL_DB)
    server = lab.server()
    jobs = all_jobs(server)
    assert {key: (job["Bucket"], job["State"]) for key, job in jobs.items()} == {
        A: ("Available", "Q"), B: ("Available", "Q"), C: ("Leased", "R"), D: ("Finished", "F"), E: ("Finished", "F"),
    }  # fmt: skip
    assert jobs[A]["Params"] == ["echo", "<a&b> ä"] and (jobs[A]["Runtime"], jobs[B]["Runtime"]) == (60, 0)
    assert {key: jobs[C][key] for key in ("Host", "StartTime", "Expiry", "MemUsed", "CPUUsed")} == {
        "Host": "hostA", "StartTime": "2026-11-23T17:27:00.923836Z", "Expiry": "2099-11-23T16:38:00.923836Z",
        "MemUsed": [1765376, -1], "CPUUsed": [4677, 0],
    }  # fmt: skip
    assert (jobs[D]["StartTime"][:21], jobs[D]["EndTime"][:19]) == ("2026-11-23T17:27:00.9", "2026-11-23T23:57:30")
    assert (jobs[D]["Status"], jobs[E]["Status"], jobs[E]["Host"]) == ("timeout", "finished", "<unknown>")
    assert server.status()["Statuses"]["timeout"] == 1
    assert read(lab.path("jobs.json")).decode() == ORIGINAL_DB
    # an original client goes on with the job it had
    job = json.dumps({"ID": C, "Params": ["sleep", "1"], "Runtime": 60})
    assert server.get("/finish", hostname="hostA", configuration=job) == (200, None)
    assert server.job(C)["Status"] == "finished"


def test_jobs_of_the_original_get_numbers_in_the_files_order_and_keep_them(lab):
    lab.write("jobs.json", ORIGINAL_DB)
    server = lab.server()
    given = numbers(server)
    assert [given[key] for key in (A, B, C, D, E)] == [1, 2, 3, 4, 5]
    for end in ("kill", "stop", "kill"):
        new = server.post("/add", {"Params": ["true"]})[1][0]
        given[new["ID"]] = new["Number"]
        job = server.get("/request", hostname="h")[1]  # a job of the original's changes, too
        getattr(server, end)()
        server = lab.server()
        assert numbers(server) == given
        assert server.job(given[job["ID"]])["ID"] == job["ID"]
    assert sorted(given.values()) == list(range(1, 9))


def by_hand(text):
    return text.replace("A1", A).replace("B1", B)


@pytest.mark.parametrize(
    "data, ids",
    [
        pytest.param(b"{}", {}, id="empty object"),
        pytest.param(b'{"Available":null,"Leased":null,"Finished":null}', {}, id="buckets null"),
        pytest.param(
            json.dumps(json.loads(ORIGINAL_DB), indent="\t").replace("\n", "\r\n"),
            dict(zip((A, B, C, D, E), "QQRFF")),
            id="indented",
        ),
        pytest.param("\ufeff" + ORIGINAL_DB + "\n\n", dict(zip((A, B, C, D, E), "QQRFF")), id="byte order mark"),
        pytest.param(
            by_hand('{"Available":null,"Finished":{"A1":{"ID":"A1","Params":["x"],"Runtime":1,"Status":"finished",'
                    '"StartTime":"2026-11-23T17:27:00.923836+00:00","EndTime":"2026-11-23T17:28:00.000001+00:00"}}}'),
            {A: "F"},
            id="Python's times",
        ),
        pytest.param(
            by_hand('{"Available":{"first":{"ID":"A1","Params":["x"]},"second":{"ID":"B1","Params":["x"]}}}'),
            {A: "Q", B: "Q"},
            id="keys that differ from the ID",
        ),
        pytest.param(by_hand('{"Held":{"A1":{"params":["x"],"RUNTIME":5}}}'), {A: "H"}, id="ID and state in the keys"),
        pytest.param(
            by_hand('{"Available":{"A1":{"ID":"A1","Params":["x"],"Number":7},"B1":{"ID":"B1","Params":["x"]}}}'),
            {A: "Q", B: "Q"},
            id="some with numbers",
        ),
    ],
)  # fmt: skip
def test_a_database_made_by_hand_loads(lab, data, ids):
    put(lab, jobs=data if isinstance(data, bytes) else data.encode())
    server = lab.server()
    assert {key: job["State"] for key, job in all_jobs(server).items()} == ids
    given = numbers(server)
    assert len(set(given.values())) == len(given) and min(given.values(), default=1) > 0
    new = server.add(["true"])[0]
    assert new > max(given.values(), default=0)
    server.kill()
    server = lab.server()
    assert {key: numbers(server)[key] for key in given} == given
    assert server.job(new)["Params"] == ["true"]


GOOD = ",\n".join(f'"{uuid}":{{"ID":"{uuid}","Params":["true"],"Runtime":60}}' for uuid in (A, B))
GOOD = f'{{"Available":{{\n{GOOD}\n}}}}\n'


@pytest.mark.parametrize(
    "data, place",
    [
        pytest.param("", "line 1 column 1", id="empty"),
        pytest.param(b"\0" * 4096, "line 1 column 1", id="zeros"),
        pytest.param(GOOD[: GOOD.index(B)], "line 3 column 1", id="truncated in a key"),
        pytest.param(GOOD[: GOOD.rindex("\n}}")], "line 3 column 116", id="truncated after a job"),
        pytest.param(GOOD.replace("},\n", "}\n"), "line 3 column 1", id="a comma missing"),
        pytest.param(GOOD + "}", "line 5 column 1", id="something behind the end"),
        pytest.param(GOOD.replace(B, "\xff", 1).encode("latin-1"), "line 3 column 2", id="not UTF-8"),
        pytest.param(GOOD.encode("utf-16"), "line 1 column 1", id="UTF-16, as PowerShell writes"),
        pytest.param("[]", "line 1 column 1", id="a list"),
        pytest.param('{"Available":[]}', "line 1 column 14", id="a bucket that is a list"),
        pytest.param(GOOD.replace("60", "NaN"), "line 2", id="NaN"),
        pytest.param('{"More":\n' + "[" * 100000, "line 2", id="nested without end"),
        pytest.param(GOOD.replace('["true"]', "[]"), "line 2", id="a job without Params"),
        pytest.param(GOOD.replace("60}\n", '"60"}\n'), "line 3", id="Runtime is text"),
        pytest.param('{"Available":{\n"a":5}}', "line 2", id="a job that is a number"),
        pytest.param(GOOD.replace(B, A), "line 3", id="two jobs with one ID"),
        pytest.param('{"Leased":{\n"a":{"Params":["x"],"StartTime":"today"}}}', "line 2", id="a time that is none"),
        pytest.param('{"Server":[],\n"Available":{}}', "line 1", id="Server is a list"),
        pytest.param('{"Available":{},\n"Server":{"Next":"x"}}', "line 2", id="the next number is text"),
        pytest.param('{"Available":{},\n"Server":{"Journal":null}}', "line 2", id="the journal's number is null"),
    ],
)  # fmt: skip
def test_a_damaged_database_is_refused_with_the_place_and_not_touched(lab, data, place):
    data = data if isinstance(data, bytes) else data.encode()
    put(lab, jobs=data)
    words = refusal(lab)
    assert lab.path("jobs.json") in words and place in words and "not changed" in words and "--db" in words
    assert files(lab) == {"jobs.json": data}


def test_a_database_of_a_later_format_is_refused_and_not_touched(lab):
    data = b'{"Server":{"Format":2,"Journal":1,"Next":1},"Available":{}}'
    put(lab, jobs=data)
    words = refusal(lab)
    assert "format 2" in words and "newer server.py" in words
    assert files(lab) == {"jobs.json": data}


# ---------------------------------------------------------------------------------------------------------------------
# What a start finds: journals
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def journal(tmp_path_factory):
    """The lines of a journal, as a killed server left them: its number, then the jobs a, b and c."""
    with Lab(str(tmp_path_factory.mktemp("journal"))) as lab:
        server = lab.server()
        for word in "abc":
            server.add([word])
        server.kill()
        lines = read(lab.path("jobs.json.journal")).splitlines(keepends=True)
        assert len(lines) == 4
        return lines


@pytest.mark.parametrize(
    "tail",
    [
        pytest.param(lambda line: line[:1], id="its first byte"),
        pytest.param(lambda line: line[: len(line) // 2], id="half of it"),
        pytest.param(lambda line: line[:-1], id="all but the line end"),
        pytest.param(lambda line: line[: line.index("ö".encode()) + 1], id="half a letter"),
        pytest.param(lambda line: b"\0" * 4096, id="zeros, as a power cut leaves"),
    ],
)
def test_a_torn_last_line_is_dropped_with_a_warning_and_the_rest_stays(lab, journal, tail):
    torn = tail(journal[3].replace(b'"c"', '"ö"'.encode()))
    put(lab, journal=b"".join(journal[:3]) + torn)
    server = lab.server()
    warning = [line for line in lab.log("server.py.log").splitlines() if "WARNING" in line]
    assert len(warning) == 1 and "torn" in warning[0] and "jobs.json.journal" in warning[0] and "dropped" in warning[0]
    assert words_of(server) == ["a", "b"]
    server.add(["d"])
    server.kill()
    server = lab.server()
    assert words_of(server) == ["a", "b", "d"]
    assert lab.log("server.py.log").count("WARNING") == 1  # it is gone from the file, too


@pytest.mark.parametrize(
    "line, damage",
    [
        pytest.param(1, lambda line: line[:5] + b"\n", id="the first one cut short"),
        pytest.param(1, lambda line: b'{"Put":[]}\n', id="the first one lost its number"),
        pytest.param(2, lambda line: line[: len(line) // 2] + b"\n", id="cut short"),
        pytest.param(3, lambda line: b"\0" * (len(line) - 1) + b"\n", id="zeros"),
        pytest.param(3, lambda line: line.replace(b":", b"\xff", 1), id="a byte changed"),
        pytest.param(3, lambda line: b"\n", id="blank"),
        pytest.param(3, lambda line: b"[]\n", id="a list"),
        pytest.param(3, lambda line: line.replace(b'"Params"', b'"Parans"'), id="a letter changed"),
        pytest.param(3, lambda line: line.replace(b'"Put"', b'"But"'), id="no known change"),
        pytest.param(3, lambda line: b'{"Put":5}\n', id="no list of jobs"),
        pytest.param(3, lambda line: b'{"Sample":["x",1,2,3,4]}\n', id="a sample of no job"),
    ],
)
def test_a_damaged_line_that_others_follow_is_refused_by_its_number_and_not_touched(lab, journal, line, damage):
    changed = [damage(text) if at == line else text for at, text in enumerate(journal, 1)]
    assert changed != journal
    put(lab, journal=b"".join(changed))
    before = files(lab)
    words = refusal(lab)
    assert lab.path("jobs.json.journal") in words
    # a whole first line that has no number says of which database the journal is: of none
    assert f"line {line} " in words or (line == 1 and "does not continue" in words)
    assert files(lab) == before


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """What servers left: {"first": journal 1 (a, b), "snapshot": a, b, "second": journal 2 that continues it (c),
    "another": another database as old as the snapshot}."""
    found = {"original": ORIGINAL_DB.encode(), "": b""}
    with Lab(str(tmp_path_factory.mktemp("pieces"))) as lab:
        server = lab.server()
        server.add(["a"], ["b"])
        server.kill()
        found["first"] = read(lab.path("jobs.json.journal"))
        assert list(files(lab)) == ["jobs.json.journal"]
        assert lab.server().stop() == 0
        found["snapshot"] = read(lab.path("jobs.json"))
        server = lab.server()
        server.add(["c"])
        server.kill()
        found["second"] = read(lab.path("jobs.json.journal"))
        assert read(lab.path("jobs.json")) == found["snapshot"]
        server = lab.server(db="another.json")
        server.add(["x"])
        assert server.stop() == 0
        found["another"] = read(lab.path("another.json"))
    return {**found, "half": found["snapshot"][: len(found["snapshot"]) // 2]}


@pytest.mark.parametrize(
    "found, words",
    [
        ({"jobs": "snapshot", "journal_1": "first"}, "ab"),
        ({"jobs": "snapshot", "journal_1": "first", "journal": ""}, "ab"),
        ({"jobs": "snapshot", "journal_1": "first", "journal": "second"}, "abc"),
        ({"jobs": "snapshot", "journal_2": "second"}, "abc"),
        ({"jobs": "snapshot", "journal_1": "first", "journal_2": "second", "new": "half"}, "abc"),
        ({"journal_1": "first"}, "ab"),
        ({"journal_1": "first", "journal": "", "new": "half"}, "ab"),
        ({"journal_1": "first", "journal": "second", "new": "snapshot"}, "abc"),
        ({"journal_1": "first", "journal_2": "second"}, "abc"),
        ({"journal_1": "first", "journal_2": "second", "journal_3": "", "journal": ""}, "abc"),
        ({"journal_1": "", "new": "half"}, ""),
        ({"jobs": "snapshot", "journal": ""}, "ab"),
        ({"jobs": "snapshot", "journal": "second", "new": "half"}, "abc"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else None,
)
def test_whatever_a_kill_leaves_between_two_steps_of_a_snapshot_loads(lab, pieces, found, words):
    put(lab, **{name: pieces[piece] for name, piece in found.items()})
    server = lab.server()
    assert words_of(server) == sorted(words)
    server.add(["z"])
    server.kill()
    assert words_of(lab.server()) == sorted(words + "z")


@pytest.mark.parametrize(
    "found",
    [
        pytest.param({"jobs": "snapshot", "journal": "first"}, id="an earlier one"),
        pytest.param({"journal": "second"}, id="its snapshot gone"),
        pytest.param({"jobs": "original", "journal": "second"}, id="a later one"),
        pytest.param({"journal_2": "second"}, id="a rotated one with its snapshot gone"),
        pytest.param({"jobs": "original", "journal": "first"}, id="the original's file put in its place"),
        pytest.param({"jobs": "another", "journal": "second"}, id="another database of the same age"),
    ],
)
def test_a_journal_that_is_not_the_snapshots_is_refused_and_nothing_touched(lab, pieces, found):
    put(lab, **{name: pieces[piece] for name, piece in found.items()})
    before = files(lab)
    words = refusal(lab)
    assert "jobs.json.journal" in words and "put back the database" in words
    assert files(lab) == before


# ---------------------------------------------------------------------------------------------------------------------
# A full disk
# ---------------------------------------------------------------------------------------------------------------------


class SmallDisk:
    def __init__(self, folder):
        self.folder, self.db, self.filler = folder, os.path.join(folder, "jobs.json"), os.path.join(folder, "filler")

    def fill(self, but=0):
        """Takes all the room there is, but for some bytes."""
        with open(self.filler, "wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"\0" * 4096)
            except OSError:
                file.truncate(file.tell() - but)

    def make_room(self):
        os.remove(self.filler)


@pytest.fixture
def small_disk(tmp_path_factory):
    """A file system of 400 KB of its own.  (Ask for it before `lab`, so that it outlives the servers on it.)"""
    folder = str(tmp_path_factory.mktemp("small-disk"))
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "jobrunner-test", folder]
    if not hasattr(os, "geteuid") or os.geteuid() or subprocess.call(mount, stderr=subprocess.DEVNULL):
        pytest.skip("a full disk is a small tmpfs, and to mount one takes root")
    try:
        yield SmallDisk(folder)
    finally:
        subprocess.check_call(["umount", "-l", folder])


BIG = "x" * 9000  # more than what is left of a file's last page


def test_a_full_disk_answers_507_changes_nothing_and_recovers_when_there_is_room(small_disk, lab):
    server = lab.server(db=small_disk.db)
    server.add(["true", BIG, "a"], ["true", BIG, "b"], ["true", BIG, "c"])
    run = server.post("/request", {"Hostname": "ours", "Slots": 1})[1]["Jobs"][0]
    old = server.get("/request", hostname="old")[1]
    report = {"ID": run["ID"], "Lease": run["Lease"], "ExitStatus": 0}
    job = {"Params": ["true", BIG]}
    changes = {
        "POST /add": lambda: server.post("/add", job),
        "POST /add, a list": lambda: server.post("/add", [job] * 3),
        "GET /add": lambda: server.get("/add", configuration=json.dumps(job)),
        "POST /request": lambda: server.post("/request", {"Hostname": "ours", "Slots": 5, "Node": {"Client": "spool"}}),
        "GET /request": lambda: server.get("/request", hostname="old"),
        "POST /delete": lambda: server.post("/delete", {"IDs": ["3"]}),
        "GET /finish": lambda: server.get("/finish", hostname="old", configuration=json.dumps({"ID": old["ID"]})),
        "POST /finish": lambda: server.post("/finish", report),
        "POST /finish with output": lambda: server.post("/finish", {**report, "StdOutTail": "o" * 60000}),
    }
    picture_of = lambda: (picture(server), server.get("/output", id=1), server.get("/job", id=3))  # noqa: E731
    before, log = picture_of(), read(small_disk.db + ".journal")
    small_disk.fill()
    for name, change in changes.items():
        status, answer = change()
        assert status == 507 and list(answer) == ["Error"] and "No space left" in answer["Error"], (name, status)
        assert picture_of() == before, name
        assert read(small_disk.db + ".journal") == log, name
    small_disk.make_room()
    for name in ("POST /finish with output", "GET /finish", "POST /request", "POST /add, a list"):
        status, answer = changes[name]()
        assert status == 200, (name, answer)
    assert server.get("/output", id=1)[1]["StdOut"] == "o" * 60000
    after = picture_of()
    assert after[0][1:3] == (6, {"Q": 3, "H": 0, "W": 0, "R": 1, "F": 2})
    small_disk.fill()
    assert changes["POST /add"]()[0] == changes["GET /add"]()[0] == 507
    server.kill()
    small_disk.make_room()
    server = lab.server(db=small_disk.db)
    assert bare(picture(server)) == bare(after[0])
    assert "WARNING" not in lab.log("server.py.log")  # such as: a torn line
    assert server.stop() == 0
    assert sorted(os.listdir(small_disk.folder)) == ["jobs.json", "jobs.json.lock", "jobs.json.output"]


def test_a_report_whose_output_does_not_fit_leaves_the_former_output_whole(small_disk, lab):
    server = lab.server(db=small_disk.db)
    server.add(["true"])
    run = server.post("/request", {"Hostname": "h", "Slots": 1})[1]["Jobs"][0]
    first = {"ID": run["ID"], "Lease": run["Lease"], "Status": "released", "StdOutTail": "first"}
    assert server.post("/finish", first)[0] == 200
    run = server.post("/request", {"Hostname": "h", "Slots": 1})[1]["Jobs"][0]
    assert run["ID"] == first["ID"]
    report = {"ID": run["ID"], "Lease": run["Lease"], "ExitStatus": 0, "StdOutTail": "o" * 60000}
    before = picture(server)
    small_disk.fill(but=12288)
    assert server.post("/finish", report)[0] == 507
    assert picture(server) == before
    assert server.get("/output", id=1)[1]["StdOut"] == "first"
    small_disk.make_room()
    assert server.post("/finish", report)[0] == 200
    assert server.get("/output", id=1)[1]["StdOut"] == "o" * 60000


def test_adding_connections_on_a_disk_that_fills_up_lose_nothing_acknowledged(small_disk, lab):
    server = lab.server(db=small_disk.db)
    adders = Adders()
    adders.start(server)  # 400 KB are full in a moment; each connection leaves with its first 507
    adders.join()
    assert adders.others == {507} and len(adders.acked) > 100
    adders.check(server)
    server.kill()
    adders.check(lab.server(db=small_disk.db))


def test_a_clean_stop_on_a_full_disk_keeps_the_journal_and_loses_nothing(small_disk, lab):
    server = lab.server(db=small_disk.db)
    server.add(["true", "snapshot"])
    assert server.stop() == 0
    snapshot = read(small_disk.db)
    server = lab.server(db=small_disk.db)
    server.add(["true", BIG, "journal"])
    before = picture(server)
    small_disk.fill()
    server.stop()
    assert read(small_disk.db) == snapshot and not os.path.exists(small_disk.db + ".new")
    small_disk.make_room()
    server = lab.server(db=small_disk.db)
    assert picture(server) == before
    assert server.stop() == 0
    assert sorted(json.loads(read(small_disk.db))["Available"]) == sorted(before[0])


# ---------------------------------------------------------------------------------------------------------------------
# Two servers on one database
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["jobs.json", "same/jobs.json", "folder/link.json"])
def test_a_second_server_on_the_same_database_is_refused_while_the_first_goes_on(lab, spelling):
    put(lab, jobs=b'{"Available":{"x":{"Params":["a"]}}}')
    os.mkdir(lab.path("folder"))
    os.symlink(lab.path("jobs.json"), lab.path("folder", "link.json"))
    os.symlink(lab.folder, lab.path("same"))
    server = lab.server()
    server.add(["b"])
    before = files(lab)
    words = refusal(lab, spelling)
    assert f"in use by another server (process {server.process.pid})" in words and "--db" in words
    assert files(lab) == before
    server.add(["c"])
    server.kill()
    server = lab.server(db=spelling)
    assert words_of(server) == ["a", "b", "c"]
    assert server.stop() == 0
    assert len(json.loads(read(lab.path("jobs.json")))["Available"]) == 3


# ---------------------------------------------------------------------------------------------------------------------
# A report and the next lease in one request
# ---------------------------------------------------------------------------------------------------------------------


class Between:
    """A Queue's lock that does something once, right after it was let go for the first time since `armed`."""

    def __init__(self, lock):
        self.lock, self.armed = lock, None

    def __enter__(self):
        self.lock.acquire()

    def __exit__(self, *_):
        self.lock.release()
        action, self.armed = self.armed, None
        if action:
            action()


def test_a_report_that_could_not_be_written_is_not_acknowledged_with_the_lease_that_could(tmp_path, monkeypatch):
    import server as module

    queue = module.Queue(module.Store(str(tmp_path / "jobs.json")))
    queue.load()
    queue.store.wait(queue.add([{"Params": ["first"]}, {"Params": ["second"]}])[1])
    reply, batch = queue.poll({"Hostname": "h", "Slots": 1}, lambda: True)
    queue.store.wait(batch)
    (run,) = reply["Jobs"]

    def full(data):
        raise OSError(errno.ENOSPC, "No space left on device")

    def disk_is_full_for_a_moment():
        with monkeypatch.context() as patch:
            patch.setattr(queue.store, "_append", full)
            with pytest.raises(module.DiskFailed):
                queue.store.wait(queue.store.unwritten())

    queue.lock = Between(queue.lock)
    queue.lock.armed = disk_is_full_for_a_moment
    report = {"ID": run["ID"], "Lease": run["Lease"], "Hostname": "h", "ExitStatus": 0}
    with pytest.raises(module.DiskFailed):
        queue.poll({"Hostname": "h", "Slots": 1, "Reports": [report]}, lambda: True)
    assert queue.find("1").state is module.State.RUNNING  # undone: so its client must report it again
    queue.stop()


# ---------------------------------------------------------------------------------------------------------------------
# A database of many lines, which is read many at a time
# ---------------------------------------------------------------------------------------------------------------------


def many_lines(count=4000):
    """The lines of a database as the server writes it; job n stands in line n + 2."""
    record = '"00000000-0000-4000-8000-%012x":{"ID":"00000000-0000-4000-8000-%012x","Params":["true","%d"],"Runtime":60,'
    record += '"Number":%d,"State":"Q","SubmitTime":"2026-11-23T12:00:00.250000Z"},'
    lines = ['{"Server":{"Format":1,"Id":"x","Journal":1,"Next":%d},' % (count + 1), '"Available":{']
    lines += [record % (n, n, n, n) for n in range(1, count + 1)]
    lines[-1] = lines[-1][:-1] + "},"
    return lines + ['"Leased":{},', '"Finished":{},', '"Held":{}}']


def loaded(folder, text, lot, monkeypatch):
    """{Number: Params} of a database read so many characters at a time, or the sentence with which it is refused."""
    path = os.path.join(folder, "jobs.json")
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.write(text)
    monkeypatch.setattr(server_module, "LOT", lot)
    queue = server_module.Queue(server_module.Store(path))
    try:
        queue.load()
    except server_module.JobrunnerError as error:
        queue.store.lock.release()
        return str(error)
    queue.store.close(clean=True)
    return {job.number: job.params for job in queue.jobs.values()}


@pytest.mark.parametrize("old, new", [("", ""), ("\n", "\r\n"), ("\n", ""), ("\n", "\n\n"), (",", ", "), ("{", "{\n")])
def test_a_database_of_many_lines_is_read_whole_in_any_layout(tmp_path, monkeypatch, old, new):
    text = "\n".join(many_lines()) + "\n"
    assert len(text) > 2 * server_module.LOT
    found = loaded(tmp_path, text.replace(old, new) if old else text, server_module.LOT, monkeypatch)
    assert found == {n: ["true", str(n)] for n in range(1, 4001)}


@pytest.mark.parametrize("number", [1, 2, 1500, 3000, 4000])
@pytest.mark.parametrize(
    "pattern, new, words",
    [
        ('"Runtime":60', '"Runtime":-60', "column 40: job '00000000"),
        ('"Runtime":60', '"Runtime":6x0', "Expecting ',' delimiter"),
        ('"true"', "NaN", "NaN is not JSON"),
        ("$", ",", "Expecting value"),
        ('^"', "", "expected a key in quotes"),
        ('^"[^"]*":{"ID":"[^"]*', '"k":{"ID":"00000000-0000-4000-8000-000000000fa0', "line 4002 column 40: two jobs have"),
    ],
)
def test_what_is_wrong_in_one_of_many_lines_is_told_with_its_place(tmp_path, monkeypatch, number, pattern, new, words):
    lines = many_lines()
    lines[number + 1] = re.sub(pattern, new, lines[number + 1], count=1)
    text = "\n".join(lines) + "\n"
    said = [loaded(tmp_path, text, lot, monkeypatch) for lot in (1 << 18, 10000, len(text))]
    assert said[0] == said[1] == said[2]  # read line by line, in the last of them
    if number != 4000:  # there some of them are other mistakes, or none
        assert words in said[0] and ("two jobs" in words or f" line {number + 2} column " in said[0]), said[0]

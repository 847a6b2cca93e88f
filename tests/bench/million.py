"""A million queued jobs: adding them, memory, /request while nothing else happens and while the snapshot is written,
kill -9 and the start after it, a clean stop and the start after that.

    1  the jobs are added by POST /add, 100,000 at a time; memory is read when no snapshot is being written
    2  GET /request and POST /request in turn, on one connection, each leasing a job: 3,000 of each
    3  the journal is filled (jobs leased and given back by the thousand) to just below what makes a snapshot due, and
       then /request goes on in turn until one has been begun and ended: what overlaps with it counts
    4  the journal is filled again, and then comes kill -9: the start reads the snapshot and the longest journal
    5  TERM; the start reads the snapshot alone

One server, one round: the ratios are those of step 3 to step 2.
"""

import http.client
import json
import os
import re
import sys
import time

from common import ROOT, Connection, arguments, get, lab, limit, machine, memory, percentile, post, say, table, until
from common import verdict

sys.path.insert(0, ROOT)
from server import SMALL_SNAPSHOT  # noqa: E402

AT_ONCE = 100000  # jobs in one POST /add
GIVEN_BACK = 2000  # leased and given back at a time
NEARLY = 1 << 20  # bytes of journal that the measured requests themselves have to fill
NODE = {"Client": "0123456789abcdef", "Session": "fedcba9876543210", "Slots": 8, "Properties": ["linux"]}
REQUESTS = {
    "GET /request": get("/request?hostname=bench"),
    "POST /request": post("/request", json.dumps({"Hostname": "bench", "Slots": 1, "Wait": 0, "Node": NODE}).encode()),
}


class Bench:
    """A server with its database, and what was measured of it: rows of (what, value)."""

    def __init__(self, made):
        self.lab = made
        self.rows = []
        self.server = None

    def start(self, what):
        began = time.monotonic()
        self.server = self.lab.server()
        self.note(f"start, {what}", f"{time.monotonic() - began:.1f} s")
        return time.monotonic() - began

    def note(self, what, value):
        self.rows.append([what, value])
        say(f"{what}: {value}")

    def call(self, path, value):
        """The answer to a POST, however long it takes."""
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=600)
        connection.request("POST", path, json.dumps(value))
        response = connection.getresponse()
        body = response.read()
        connection.close()
        assert response.status == 200, body[:1000]
        return json.loads(body)

    # -- the steps

    def add(self, count):
        """The longest time that adding AT_ONCE took."""
        times = []
        for first in range(0, count, AT_ONCE):
            numbers = range(first, min(count, first + AT_ONCE))
            jobs = [{"Params": ["java", "-jar", "job.jar", str(number)], "Runtime": 3600} for number in numbers]
            body = json.dumps(jobs).encode()
            began = time.monotonic()
            status = self.server.fetch("/add", body, timeout=600)[0]
            times.append(time.monotonic() - began)
            assert status == 200
            say(f"added {numbers[-1] + 1} of {count}")
        self.note(f"adding {count} jobs", f"{sum(times):.1f} s")
        self.note(f"adding {min(count, AT_ONCE)} of them, the slowest time", f"{max(times):.2f} s")

    def memory(self, what, count, empty):
        """Bytes a job."""
        used, most = (memory(self.server.process.pid, key) for key in ("VmRSS", "VmHWM"))
        each = (used - empty) / count
        self.note(f"memory {what}", f"{used >> 20} MB, {each:.0f} bytes a job (at most {most >> 20} MB)")
        return each

    def quiet(self, count):
        """{kind: [ms]} of requests while nothing else happens."""
        times = {kind: [] for kind in REQUESTS}
        with Connection(self.server.port) as connection:
            for _ in range(count):
                for kind in REQUESTS:
                    times[kind].append(self.ask(connection, kind)[1] * 1e3)
        return times

    @staticmethod
    def ask(connection, kind):
        """(when a request was sent, the seconds until its answer with a job was here)."""
        began = time.perf_counter()
        status, body = connection.ask(REQUESTS[kind])
        seconds = time.perf_counter() - began
        assert status == 200 and b'"Params"' in body, (status, body[:1000])
        return began, seconds

    def during_a_snapshot(self):
        """{kind: [ms]} of requests that overlap with the writing of a snapshot."""
        for _ in range(5):
            self.fill_journal()
            if not self.writing():  # else it was filled too far, and the beginning would be missed
                break
        written, samples, deadline = self.snapshots(), [], time.monotonic() + 300
        log, size = self.lab.path("server.py.log"), 0
        with Connection(self.server.port) as connection:
            while time.monotonic() < deadline:
                for kind in REQUESTS:
                    samples.append((kind,) + self.ask(connection, kind))
                if os.path.getsize(log) != size:
                    size = os.path.getsize(log)
                    if len(self.snapshots()) > len(written):
                        break
            else:
                raise SystemExit("no snapshot was written within 300 s: has the rule when to write one changed?")
        took = float(self.snapshots()[-1])
        begun = time.perf_counter() - took - 0.01
        self.note("a snapshot took, with those requests", f"{took:.1f} s")
        self.note("its size", f"{os.path.getsize(self.server.db) >> 20} MB")
        overlapping = [(kind, seconds * 1e3) for kind, sent, seconds in samples if sent + seconds >= begun]
        return {kind: [ms for other, ms in overlapping if other == kind] for kind in REQUESTS}

    def fill_journal(self):
        """Brings the journal to NEARLY below what makes a snapshot due."""
        until(lambda: not self.writing(), "the end of a snapshot", 300)
        while not self.writing():
            due = max(SMALL_SNAPSHOT, (os.path.getsize(self.server.db) if os.path.exists(self.server.db) else 0) // 2)
            size = os.path.getsize(self.server.db + ".journal")
            say(f"journal {size >> 20} of {due >> 20} MB")
            if size > due - NEARLY:
                break
            leased = self.call("/request", {"Hostname": "filler", "Slots": GIVEN_BACK})["Jobs"]
            back = [{"ID": j["ID"], "Lease": j["Lease"], "Hostname": "filler", "Status": "released"} for j in leased]
            self.call("/finish", back)

    def writing(self):
        return os.path.exists(self.server.db + ".new")

    def snapshots(self):
        """The seconds of each snapshot so far, as the log has them."""
        return re.findall(r"store\.snapshot .*seconds=([\d.]+)", self.lab.log("server.py.log"))

    def kill(self):
        """kill -9; notes what the next start has to read."""
        self.server.kill()
        journals = [name for name in os.listdir(self.lab.folder) if name.startswith("jobs.json.journal")]
        size = sum(os.path.getsize(self.lab.path(name)) for name in journals)
        self.note("journal at kill -9, to be read on top of the snapshot", f"{size >> 20} MB")

    def stop(self):
        began = time.monotonic()
        assert self.server.stop() == 0, self.lab.log("server.py.log")
        self.note("clean stop", f"{time.monotonic() - began:.1f} s")


def main():
    parser = arguments(__doc__)
    parser.add_argument("--jobs", type=int, default=1000000)
    options = parser.parse_args()
    print(machine())
    with limit(3600), lab() as made:
        bench = Bench(made)
        bench.start("empty")
        empty = memory(bench.server.process.pid)
        bench.note("memory, empty", f"{empty >> 20} MB")
        bench.add(options.jobs)
        until(lambda: not bench.writing(), "the end of a snapshot", 300)
        each = [bench.memory("with the jobs added", options.jobs, empty)]
        quiet = bench.quiet(min(3000, options.jobs // 20))
        busy = bench.during_a_snapshot()
        bench.memory("after that", options.jobs, empty)
        bench.fill_journal()  # the longest there can be, so that the start has most to do
        bench.kill()
        starts = [bench.start("after kill -9")]
        assert bench.server.status()["Jobs"] == options.jobs, bench.server.status()
        each.append(bench.memory("after kill -9", options.jobs, empty))
        bench.stop()
        starts.append(bench.start("from the snapshot"))
        assert bench.server.status()["Jobs"] == options.jobs, bench.server.status()
        each.append(bench.memory("from the snapshot", options.jobs, empty))
        bench.server.kill()
    say("")
    report(options, bench.rows, quiet, busy, max(each), max(starts))


def report(options, rows, quiet, busy, each, start):
    print(f"\n{options.jobs} queued jobs\n")
    table(["", "this run"], rows)
    print()
    rows = []
    for kind in REQUESTS:
        for words, times in (("quiet", quiet[kind]), ("while a snapshot is written", busy[kind])):
            values = [percentile(times, p) for p in (50, 99, 99.9)] + [max(times)]
            ratio = percentile(times, 99) / percentile(quiet[kind], 99)
            rows.append([f"{kind}, {words}", len(times)] + [f"{value:.2f}" for value in values] + [f"{ratio:.1f}"])
    table(["milliseconds", "requests", "median", "p99", "p99.9", "most", "p99 : quiet"], rows)
    print()
    if options.jobs != 1000000:
        print("The targets are those for a million; fewer share what the server takes once among them.")
    worst = max(percentile(times, 99) for times in busy.values())
    print(verdict(worst < 5, f"/request while a snapshot is written: {worst:.2f} ms at p99, under 5 wanted"))
    print(verdict(each < 1024, f"memory: {each:.0f} bytes a job, under 1024 wanted"))
    print(verdict(start < 15, f"restart: {start:.1f} s, under 15 wanted"))


if __name__ == "__main__":
    main()

"""An idle client: from the submission of a job to its process being there.

The job says itself when it runs: `sh -c 'date +%s%N'`, by the clock that this program reads just before it submits.  So
the start of sh and of date is part of what is measured; what they take alone is the row `Popen`, the same job started
directly.

qsub          from the start of `python jobrunner.py qsub -- ...`, a new Python each time; the row `python -c pass` is
              the part of that which any Python program takes
POST /add     from sending it on a connection that is kept alive
"""

import json
import os
import subprocess
import sys
import time

from common import ROOT, Connection, arguments, get, in_turn, lab, limit, machine, percentile, post
from common import table, until, verdict

STAMP = ["sh", "-c", "date +%s%N"]
QUIET = 0.1  # s that the client is left alone before the next one


class Bench:
    """A server, a client that has nothing to do, and what is sent to them."""

    def __init__(self, made):
        self.lab = made
        self.server = made.server()
        made.client(self.server)
        until(lambda: self.server.status()["Nodes"]["free"] == 1, "the client")
        self.connection = Connection(self.server.port)

    def stamped(self, number, began):
        """ms from `began` (ns) until the job said that it ran; the client has been idle for a while then."""
        job = self.ask(f"/job?id={number}&wait=30")
        assert job["Status"] == "finished", job
        stamp = int(self.ask(f"/output?id={number}")["StdOut"])
        until(lambda: self.server.status()["States"]["F"] == self.server.status()["Jobs"], "the queue to be empty")
        time.sleep(QUIET)
        return (stamp - began) / 1e6

    def ask(self, path):
        status, body = self.connection.ask(get(path))
        assert status == 200, body
        return json.loads(body)

    def by_qsub(self):
        command = [sys.executable, os.path.join(ROOT, "jobrunner.py"), "qsub", "--server", self.server.url, "--"]
        began = time.time_ns()
        done = subprocess.run(command + STAMP, stdout=subprocess.PIPE, check=True, timeout=60)
        return self.stamped(int(done.stdout), began)

    def by_post(self):
        request = post("/add", json.dumps({"Params": STAMP}).encode())
        began = time.time_ns()
        status, body = self.connection.ask(request)
        assert status == 200, body
        return self.stamped(json.loads(body)[0]["Number"], began)

    def answered(self):
        """How long the POST alone takes, until its answer is here: the job is on disk then."""
        request = post("/add", json.dumps({"Params": STAMP}).encode())
        began = time.time_ns()
        status, body = self.connection.ask(request)
        seconds = (time.time_ns() - began) / 1e6
        self.stamped(json.loads(body)[0]["Number"], began)
        return seconds


def directly():
    began = time.time_ns()
    done = subprocess.run(STAMP, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True)
    return (int(done.stdout) - began) / 1e6


def python_alone():
    began = time.time_ns()
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    return (time.time_ns() - began) / 1e6


def main():
    parser = arguments(__doc__)
    parser.add_argument("--times", type=int, default=50)
    options = parser.parse_args()
    print(machine())
    with limit(1200), lab() as made:
        bench = Bench(made)
        results = in_turn(options.times, {
            "qsub, until the job runs": bench.by_qsub,
            "POST /add, until the job runs": bench.by_post,
            "POST /add, until it is answered": bench.answered,
            "Popen, until the job runs": directly,
            "python -c pass, as a whole": python_alone,
        })  # fmt: skip
    floor = percentile(results["Popen, until the job runs"], 50)
    print(f"\nmilliseconds, {options.times} each, in turn\n")
    rows = [
        [name, f"{min(times):.1f}"] + [f"{percentile(times, p):.1f}" for p in (50, 95)]
        + [f"{max(times):.1f}", f"{percentile(times, 50) / floor:.1f}"]
        for name, times in results.items()
    ]  # fmt: skip
    table(["", "least", "median", "p95", "most", "median : Popen's"], rows)
    print()
    for name in list(results)[:2]:
        median = percentile(results[name], 50)
        print(verdict(median < 50, f"{name}: {median:.1f} ms at the median, under 50 wanted"))


if __name__ == "__main__":
    main()

"""Submission of 100,000 jobs: `qsub --file` (JSON Lines), the same jobs as the one POST /add that it comes down to, and
the same again as an array, `qsub -J 1-100000`.

The jobs are the researcher's: java -jar job.jar 1 ... 100000, each with its walltime.  qsub is timed as a program, from
its start to its end, its 100,000 numbers printed to a pipe.  What nobody can do without in Python stands beside it:
reading the same file line by line with json, writing it again as JSON and syncing that; and, with --hq-python,
HyperQueue's Client.submit of as many tasks, without a worker and without a journal (nothing is on disk).
"""

import json
import subprocess
import sys
import time

from common import arguments, cpu, in_turn, lab, limit, machine, memory, percentile, table, verdict

FLOOR = """
import json, os, sys
with open(sys.argv[1]) as file:
    jobs = [json.loads(line) for line in file]
with open(sys.argv[1] + ".copy", "w") as file:
    for job in jobs:
        file.write(json.dumps(job) + "\\n")
    file.flush()
    os.fsync(file.fileno())
"""

HYPERQUEUE = """
import os, sys, time
from hyperqueue import Job, LocalCluster
path = os.path.join(os.path.dirname(os.path.abspath(sys.argv[1])), "hq")
os.mkdir(path)
with LocalCluster(path) as cluster:
    client = cluster.client()
    began = time.perf_counter()
    job = Job()
    for number in range(int(sys.argv[2])):
        job.program(["java", "-jar", "job.jar", str(number)])
    client.submit(job)
    print(time.perf_counter() - began, flush=True)
    os._exit(0)
"""


def jobs_file(made, count):
    lines = ('{"Params":["java","-jar","job.jar","%d"],"Runtime":3600}\n' % number for number in range(count))
    return made.write("sweep.jsonl", "".join(lines))


def with_qsub(count):
    """{"seconds", and the server's "cpu" and "memory"}."""
    with lab() as made:
        server, path = made.server(), jobs_file(made, count)
        used, began = cpu(server.process.pid)[0], time.perf_counter()
        code, printed, complaint = made.command("qsub", "--file", path, server=server)
        seconds = time.perf_counter() - began
        assert (code, len(printed.split())) == (0, count), complaint
        return outcome(server, count, seconds, used)


def with_array(count):
    with lab() as made:
        server = made.server()
        words = ("-J", f"1-{count}", "-l", "walltime=1:00:00", "--", "java", "-jar", "job.jar", "{index}")
        used, began = cpu(server.process.pid)[0], time.perf_counter()
        code, printed, complaint = made.command("qsub", *words, server=server)
        seconds = time.perf_counter() - began
        assert (code, printed) == (0, "1[]\n"), complaint
        return outcome(server, count, seconds, used)


def with_post(count):
    with lab() as made:
        server, path = made.server(), jobs_file(made, count)
        with open(path) as file:
            body = b"[" + ",".join(file).encode() + b"]"
        used, began = cpu(server.process.pid)[0], time.perf_counter()
        status, _, added = server.fetch("/add", body, timeout=600)
        seconds = time.perf_counter() - began
        assert status == 200 and len(json.loads(added)) == count, added[:1000]
        return outcome(server, count, seconds, used)


def outcome(server, count, seconds, used):
    pid = server.process.pid
    assert server.status()["States"]["Q"] == count, server.status()
    return {"seconds": seconds, "cpu": cpu(pid)[0] - used, "memory": memory(pid)}


def with_program(python, code, count, own_clock=False):
    """The same of a Python program that gets the file and the count."""
    with lab() as made:
        command = [python, "-c", code, jobs_file(made, count), str(count)]
        began = time.perf_counter()
        printed = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=made.folder, timeout=300).stdout
        return {"seconds": float(printed.split()[-1]) if own_clock else time.perf_counter() - began}


def main():
    parser = arguments(__doc__)
    parser.add_argument("--jobs", type=int, default=100000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hq-python", metavar="PATH", help="a Python that has hyperqueue")
    options = parser.parse_args()
    count = options.jobs
    contenders = {
        "qsub --file": lambda: with_qsub(count),
        "POST /add": lambda: with_post(count),
        "qsub -J, an array": lambda: with_array(count),
        "json in, json out, sync": lambda: with_program(sys.executable, FLOOR, count),
    }
    if options.hq_python:
        contenders["HyperQueue, in memory"] = lambda: with_program(options.hq_python, HYPERQUEUE, count, own_clock=True)
    print(machine())
    with limit(1800):
        results = in_turn(options.rounds, contenders)
    best = {name: min(rounds, key=lambda result: result["seconds"]) for name, rounds in results.items()}
    floor = best["json in, json out, sync"]["seconds"]
    print(f"\nsubmission of {count} jobs, best of {options.rounds} rounds\n")
    rows = []
    for name, result in best.items():
        median = percentile([r["seconds"] for r in results[name]], 50)
        rows.append([name, f"{result['seconds']:.2f}", f"{median:.2f}", f"{result['seconds'] / count * 1e6:.1f}",
                     f"{result['seconds'] / floor:.2f}", f"{result['cpu']:.2f}" if "cpu" in result else "",
                     f"{result['memory'] / 2**20:.0f}" if "memory" in result else ""])  # fmt: skip
    table(["", "best s", "median s", "us a job", "it : json alone", "server CPU s", "server MB after"], rows)
    share = count / 100000
    print()
    for name, most in (("qsub --file", 2), ("qsub -J, an array", 1)):
        seconds = best[name]["seconds"] / share
        words = "" if share == 1 else f" (scaled up from {count}, its start too)"
        print(verdict(seconds < most, f"{name}: {seconds:.2f} s for 100,000, under {most} s wanted{words}"))


if __name__ == "__main__":
    main()

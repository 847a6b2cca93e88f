"""2,000 jobs of `true` on two slots: our server and one client against what a user would pick instead.

ours, client started   the jobs are queued over HTTP and a client with --until-empty is started: until that has ended
ours, client idle      a client is there and waits, as HyperQueue's worker is: from the POST /add until all are finished
HyperQueue             LocalCluster and one worker with two CPUs, no journal, outputs captured as by default: from the
                       submission until the last output is written (its own wait looks once a second).  It listens on
                       a port of its choice on every address meanwhile: the package has no option for that
xargs, parallel        from their start to their end; xargs captures no output
Popen                  a loop in Python: two processes at a time, two output files each, nothing else

Ours is durable: each job is on disk before it is acknowledged, and its end before it is forgotten.
CPU is of everything that took part, that of the 2,000 processes themselves included.
"""

import json
import os
import signal
import subprocess
import sys
import time

from common import ROOT, adopt_orphans, arguments, cpu, cpu_at_end, folder, in_turn, keeper_pid, lab, limit, machine
from common import percentile, table, verdict

POPEN = """
import os, subprocess, sys
running, count = {}, int(sys.argv[1])
def wait():
    child, out, err = running.pop(os.wait()[0])
    child.returncode = 0
    out.close()
    err.close()
for number in range(count):
    if len(running) == 2:
        wait()
    out, err = open(f"{number}.out", "wb"), open(f"{number}.err", "wb")
    child = subprocess.Popen(["true"], stdin=subprocess.DEVNULL, stdout=out, stderr=err)
    running[child.pid] = child, out, err
while running:
    wait()
"""

HYPERQUEUE = """
import os, sys, time
from hyperqueue import Job, LocalCluster
from hyperqueue.cluster import WorkerConfig
count = int(sys.argv[1])
os.mkdir("server")
os.mkdir("output")
with LocalCluster(os.path.abspath("server"), WorkerConfig(cores=2)) as cluster:
    client = cluster.client()
    job = Job(default_workdir=os.path.abspath("output"))
    for number in range(count):
        job.program(["true"])
    began = time.time()
    client.wait_for_jobs([client.submit(job)])
    written = [entry.stat().st_mtime for entry in os.scandir("output")]
assert len(written) == 2 * count, len(written)
print(max(written) - began)
"""


def ours_with_client_started(count):
    """{"seconds", "cpu", and the parts of that}."""
    with lab() as made:
        server = made.server()
        jobs = json.dumps([{"Params": ["true"]}] * count).encode()
        before, began = cpu(server.process.pid)[0], time.perf_counter()
        assert server.fetch("/add", jobs)[0] == 200
        client = made.client(server, "--until-empty")
        keeper = keeper_pid(made, client)
        in_client = cpu_at_end(client.pid)[0]
        seconds = time.perf_counter() - began
        assert client.wait() == 0
        in_keeper, in_jobs = cpu_at_end(keeper) if keeper else (0, 0)
        if keeper:
            os.waitpid(keeper, 0)
        return outcome(made, server, count, seconds, cpu(server.process.pid)[0] - before, in_client, in_keeper, in_jobs)


def ours_with_client_idle(count):
    with lab() as made:
        server = made.server()
        client = made.client(server)
        keeper = keeper_pid(made)
        server.over(server.add(["true"])[0])
        jobs = json.dumps([{"Params": ["true"]}] * count).encode()
        pids = (server.process.pid, client.pid, keeper)
        before, began = [cpu(pid) for pid in pids], time.perf_counter()
        assert server.fetch("/add", jobs)[0] == 200
        while server.status()["Statuses"]["finished"] != count + 1:
            last = count + 1 if server.job(count + 1)["State"] != "F" else count
            server.get("/job", id=last, wait=50)
        seconds = time.perf_counter() - began
        parts = [after[0] - earlier[0] for after, earlier in zip(map(cpu, pids), before)]
        in_jobs = cpu(keeper)[1] - before[2][1]
        client.send_signal(signal.SIGTERM)
        client.wait()
        os.waitpid(keeper, 0)
        return outcome(made, server, count + 1, seconds, *parts, in_jobs)


def outcome(made, server, count, seconds, in_server, in_client, in_keeper, in_jobs):
    """The result of one of ours, having checked that every job ran once and that its outputs are there."""
    status = server.status()
    assert status["Jobs"] == status["Statuses"]["finished"] == count, status
    outputs = os.listdir(made.path("jobrunner-spool", "output"))
    assert len(outputs) == 2 * count, len(outputs)
    parts = {"server": in_server, "client": in_client, "keeper": in_keeper, "jobs": in_jobs}
    return {"seconds": seconds, "cpu": sum(parts.values()), **parts}


def other(command, lines=b"", count=0, own_clock=False, **environment):
    """The same of another program in a folder of its own; own_clock: it prints the seconds itself."""
    with folder() as path:
        with open(os.path.join(path, "input"), "wb") as file:
            file.write(lines)
        began = time.perf_counter()
        with open(os.path.join(path, "input"), "rb") as stdin, open(os.path.join(path, "printed"), "w+") as printed:
            env = {**os.environ, "TMPDIR": path, "HOME": path, **environment}
            child = subprocess.Popen(command, cwd=path, stdin=stdin, stdout=printed, stderr=subprocess.PIPE, env=env)
            try:
                complaint = child.stderr.read()
                used = cpu_at_end(child.pid)
                seconds = time.perf_counter() - began
                assert child.wait() == 0, complaint.decode()[:3000]
            finally:
                child.kill()
                child.wait()
                child.stderr.close()
            printed.seek(0)
            return {"seconds": float(printed.read().split()[-1]) if own_clock else seconds, "cpu": sum(used)}


def hyperqueue_python(path, wanted):
    """(a Python that has hyperqueue, its version) or ("", why there is none); made in the folder if none is given."""
    python = wanted or os.path.join(path, "hq", "bin", "python")
    if not wanted:
        install = [python, "-m", "pip", "install", "-q", "hyperqueue==0.27.*"]
        for command in ([sys.executable, "-m", "venv", "hq"], install):
            done, printed = tried(command, path)
            if not done:
                return "", f"{' '.join(command[1:])} failed: {printed.splitlines()[-1] if printed else 'silently'}"
    ask = "import hyperqueue, importlib.metadata as m; print(m.version('hyperqueue'))"
    done, printed = tried([python, "-c", ask], path)
    return (python, printed) if done else ("", f"{python} has no hyperqueue: {printed}")


def tried(command, path=None):
    """(whether it worked, what it printed)."""
    try:
        done = subprocess.run(command, cwd=path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300)
        return done.returncode == 0, done.stdout.decode().strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, str(error)


def contenders(options, hq_python, hq_version):
    """{name: function}, and the names of those that are skipped, with the reason."""
    count, numbers = options.jobs, "".join(f"{n}\n" for n in range(options.jobs)).encode()
    found = {
        "ours, client started": lambda: ours_with_client_started(count),
        "ours, client idle": lambda: ours_with_client_idle(count),
    }
    skipped = []
    if hq_python:
        found[f"HyperQueue {hq_version}"] = lambda: other([hq_python, "-c", HYPERQUEUE, str(count)], own_clock=True)
    else:
        skipped.append(f"HyperQueue: {hq_version}")
    parallel = tried(["parallel", "--version"])[1].partition("\n")[0]
    if parallel.startswith("GNU"):
        found[parallel] = lambda: other(["parallel", "-j2", "--will-cite", "true"], numbers)
    else:
        skipped.append("GNU parallel: not installed (apt-get install parallel)")
    if tried(["xargs", "--version"])[0]:
        found["xargs -P2"] = lambda: other(["xargs", "-P2", "-n1", "true"], numbers)
    else:
        skipped.append("xargs: not installed")
    found["Popen and two files"] = lambda: other([sys.executable, "-c", POPEN, str(count)])
    return found, skipped


def main():
    parser = arguments(__doc__)
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hq-python", metavar="PATH", help="a Python that has hyperqueue (default: one made with pip)")
    options = parser.parse_args()
    print(machine())
    with limit(3600), folder() as path:
        adopt_orphans()
        found, skipped = contenders(options, *hyperqueue_python(path, options.hq_python))
        results = in_turn(options.rounds, found)
    report(options, results, skipped)


def report(options, results, skipped):
    best = {name: min(rounds, key=lambda result: result["seconds"]) for name, rounds in results.items()}
    started, idle = (best[name]["seconds"] for name in list(best)[:2])
    print(f"\n{options.jobs} jobs of true on 2 slots, best of {options.rounds} rounds\n")
    rows = []
    for name, result in best.items():
        seconds, median = result["seconds"], percentile([r["seconds"] for r in results[name]], 50)
        rows.append([name, f"{options.jobs / seconds:.0f}", f"{seconds:.2f}", f"{median:.2f}",
                     f"{seconds / started:.2f}", f"{seconds / idle:.2f}", f"{result['cpu']:.2f}"])  # fmt: skip
    table(["", "jobs/s", "best s", "median s", "ours started : it", "ours idle : it", "CPU s"], rows)
    for line in skipped:
        print(f"skipped {line}")
    print(f"\nCPU seconds of ours (a job in microseconds; everything in {ROOT})\n")
    parts = ("server", "client", "keeper", "jobs")
    rows = [
        [name] + [f"{best[name][part]:.2f} ({best[name][part] / options.jobs * 1e6:.0f})" for part in parts]
        for name in list(best)[:2]
    ]
    table([""] + list(parts), rows)
    print()
    for name, result in best.items():
        factor = 1 if name.startswith("HyperQueue") else 2 if "parallel" in name else 0
        if factor:
            for words, seconds in (("started", started), ("idle", idle)):
                ratio = result["seconds"] / seconds
                print(verdict(ratio >= factor, f"client {words}: {ratio:.2f} of {name}, at least {factor} wanted"))


if __name__ == "__main__":
    main()

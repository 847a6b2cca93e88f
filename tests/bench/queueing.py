"""Queueing: arrays and lists submitted, /request with a million jobs in 10 queues with 20 sets of requirements, and an
array with a limit drained by several clients.

    1  an array, and a list, of 100,000 jobs are added by POST /add, in turn, the best round of each counting
    2  an array of 100,000 that may run 10 at a time is drained by 4 clients in turn, each over its own connection and
       reporting what it runs with its next request: the most that ever ran, the order, jobs/s
    3  a million jobs are added, 100,000 at a time, their queues and requirements taking turns; then three kinds of
       clients ask in turn, each request leasing a job: an original one, one that has all properties, and one that has a
       single property and serves three of the queues
    4  the same requests when the queues are at their max_run, but for the last; and with 1,000 arrays that have limits
       of their own queued before all others, and all at them

One server for each of 1, 2 and 3 with 4.
"""

import json
import random
import time

from common import Connection, arguments, get, in_turn, lab, limit, machine, memory, percentile, post, say, table
from common import verdict

AT_ONCE = 100000  # jobs in one POST /add
QUEUES = [f"queue{number}" for number in range(10)]
PROPERTIES = [f"has{number}" for number in range(9)]
REQUIREMENTS = [[]] + [[word] for word in PROPERTIES] + [["linux", word] for word in PROPERTIES] + [["linux"]]
JOB = {"Params": ["java", "-jar", "job.jar", "{index}"], "Runtime": 3600}


def request(name, **node):
    """A POST /request of a client with one free slot."""
    node = {"Client": name, "Session": "s", "Slots": 8, **node}
    return post("/request", json.dumps({"Hostname": name, "Slots": 1, "Wait": 0, "Node": node}).encode())


REQUESTS = {
    "GET /request": get("/request?hostname=bench"),
    "POST, all properties": request("all", Properties=["linux"] + PROPERTIES),
    "POST, one property, 3 queues": request("one", Properties=PROPERTIES[-1:], Queues=QUEUES[-3:]),
}


def seconds(server, path, value):
    """How long a POST takes, the encoding of its body left out."""
    body = json.dumps(value).encode()
    began = time.monotonic()
    status, _, answer = server.fetch(path, body, timeout=600)
    assert status == 200, answer[:1000]
    return time.monotonic() - began


# ---------------------------------------------------------------------------------------------------------------------
# The steps
# ---------------------------------------------------------------------------------------------------------------------


def submissions(count, rounds):
    """{what: [s]}."""
    with lab() as made:
        server = made.server()
        array = {**JOB, "Array": f"1-{count}"}
        limited = {**array, "MaxRunSubjobs": 10, "Env": {"N": "{index}"}, "StdOut": "out.{index}"}
        jobs = [{**JOB, "Params": JOB["Params"][:3] + [str(number)]} for number in range(count)]
        contenders = {
            f"an array of {count}": lambda: seconds(server, "/add", array),
            f"an array of {count} with a limit, Env and StdOut": lambda: seconds(server, "/add", limited),
            f"a list of {count}": lambda: seconds(server, "/add", jobs),
        }
        return in_turn(rounds, contenders)


def drained(count, clients=4):
    """(most that ran at a time, whether they began in order, s) of an array that may run 10 at a time."""
    chance, runs, begun, most = random.Random(1), {n: [] for n in range(clients)}, [], 0
    with lab() as made:
        server = made.server()
        seconds(server, "/add", {**JOB, "Array": f"1-{count}", "MaxRunSubjobs": 10})
        connections, began = [Connection(server.port) for _ in range(clients)], time.monotonic()
        ended = 0
        while ended < count:
            n = chance.randrange(clients)
            over = [job for job in runs[n] if chance.random() < 0.5]
            runs[n] = [job for job in runs[n] if job not in over]
            reports = [{**job, "Hostname": f"h{n}", "ExitStatus": 0} for job in over]
            wish = {"Hostname": f"h{n}", "Slots": 4, "Reports": reports, "Node": {"Client": f"c{n}", "Slots": 8}}
            status, body = connections[n].ask(post("/request", json.dumps(wish).encode()))
            assert status == 200, body[:1000]
            ended += len(over)
            for job in json.loads(body)["Jobs"]:
                runs[n].append({"ID": job["ID"], "Lease": job["Lease"]})
                begun.append(job["Index"])
            most = max(most, sum(map(len, runs.values())))
            if ended % 1000 < len(over):
                say(f"drained {ended} of {count}")
        took = time.monotonic() - began
        for connection in connections:
            connection.__exit__()
    return most, begun == sorted(begun), took


def fill(server, count):
    """Adds jobs whose queues and requirements take turns."""
    for number, name in enumerate(QUEUES):
        server.queue(name, Priority=number)
    for first in range(0, count, AT_ONCE):
        numbers = range(first, min(count, first + AT_ONCE))
        jobs = [{**JOB, "Queue": QUEUES[n % 10], "Requires": REQUIREMENTS[n // 10 % 20]} for n in numbers]
        jobs = [job if job["Requires"] else {k: v for k, v in job.items() if k != "Requires"} for job in jobs]
        seconds(server, "/add", jobs)
        say(f"added {numbers[-1] + 1} of {count}")


def asked(server, count):
    """{kind: [ms]} of requests in turn, each of which is given a job."""
    times = {kind: [] for kind in REQUESTS}
    with Connection(server.port) as connection:
        for number in range(count):
            say(f"request {number} of {count}") if number % 100 == 0 else None
            for kind, data in REQUESTS.items():
                began = time.perf_counter()
                status, body = connection.ask(data)
                times[kind].append((time.perf_counter() - began) * 1e3)
                assert status == 200 and b'"Params"' in body, (kind, status, body[:1000])
    return times


def limits_reached(server):
    """Every queue but the one with the lowest priority that the third kind of client serves is at its max_run."""
    for name in QUEUES:
        if name != QUEUES[-3]:
            status, answer = server.post("/queue", {"Name": name, "Action": "set", "Set": {"MaxRun": 1}})
            assert status == 200, answer


def arrays_at_their_limits(server, count=1000):
    """Arrays before all other jobs of that queue, each with one subjob running and one that may run."""
    seconds(server, "/add", [{**JOB, "Queue": QUEUES[-3], "Array": "1-10", "MaxRunSubjobs": 1, "Priority": 9}] * count)
    status, answer = server.post("/request", {"Hostname": "fast", "Slots": count, "Node": {"Queues": QUEUES[-3:]}})
    assert status == 200 and len(answer["Jobs"]) == count, answer


def main():
    parser = arguments(__doc__)
    parser.add_argument("--jobs", type=int, default=1000000, help="how many in step 3 (default: a million)")
    parser.add_argument("--array", type=int, default=100000, help="how many subjobs in steps 1 and 2")
    parser.add_argument("--requests", type=int, default=1000, help="of each kind in each part of steps 3 and 4")
    parser.add_argument("--rounds", type=int, default=3, help="of step 1")
    options = parser.parse_args()
    print(machine())
    with limit(1800):
        submitted = submissions(options.array, options.rounds)
        most, in_order, took = drained(options.array)
        with lab() as made:
            server = made.server()
            empty = memory(server.process.pid)
            fill(server, options.jobs)
            each = (memory(server.process.pid) - empty) / options.jobs
            parts = {"": asked(server, options.requests)}
            limits_reached(server)
            parts[", 9 of 10 queues at max_run"] = asked(server, options.requests)
            arrays_at_their_limits(server)
            parts[", 1000 arrays at theirs too"] = asked(server, options.requests)
    say("")
    print()
    rows = [[what, f"{min(times):.2f}", f"{max(times):.2f}"] for what, times in submitted.items()]
    table(["seconds to add", "best", "worst"], rows)
    print()
    speed = f"{took:.1f} s, {options.array / took:.0f} jobs/s"
    print(f"{options.array} subjobs drained, 10 at a time, by 4 clients: {speed}")
    print(f"{options.jobs} jobs in 10 queues with 20 sets of requirements: {each:.0f} bytes a job")
    print()
    rows = [
        [kind + part, len(values)] + [f"{percentile(values, p):.2f}" for p in (50, 99, 99.9)] + [f"{max(values):.2f}"]
        for part, times in parts.items()
        for kind, values in times.items()
    ]
    table(["milliseconds", "requests", "median", "p99", "p99.9", "most"], rows)
    print()
    worst = {part: max(percentile(values, 99) for values in times.values()) for part, times in parts.items()}
    array, _, jobs = (min(times) for times in submitted.values())
    print(verdict(array < 1, f"an array added in {array:.2f} s, under 1 wanted"))
    print(verdict(jobs < 2, f"a list added in {jobs:.2f} s, under 2 wanted"))
    print(verdict(most <= 10 and in_order, f"at most {most} of the array at a time, 10 allowed; in order: {in_order}"))
    for part, value in worst.items():
        print(verdict(value < 5, f"/request{part}: {value:.2f} ms at p99, under 5 wanted"))


if __name__ == "__main__":
    main()

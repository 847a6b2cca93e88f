"""What waiting costs: 500 clients that long-poll, and one client that watches 8 jobs.

clients    500 connections, each with a POST /request of a client of its own held open for 30 s and sent again, as
           clients do that have nothing to run; after --seconds 500 jobs are added at once, and every client must have
           one.  All 500 are in this process, which asks by hand: the server's CPU and memory are what is looked at
watching   real clients with their keepers, 8 jobs of `sleep` each: one whose jobs have no limits, and one that
           samples them, for --dead-after and a memory limit; each on a server of its own.  CPU is that of the client,
           its keeper and the ps that it starts, over --seconds (in hundredths of a second: use 30 and more)
"""

import collections
import glob
import json
import resource
import selectors
import socket
import time

from common import Connection, answer_end, arguments, cpu, keeper_pid, lab, limit, machine, memory, own_memory
from common import percentile, post, say, table, until, verdict

WAIT = 30  # s, as client.py


class Crowd:
    """Clients that have nothing to run: each a connection with a request held open."""

    def __init__(self, port, count):
        self.selector = selectors.DefaultSelector()
        self.polls = collections.Counter()  # requests sent, by client
        self.data = collections.defaultdict(bytearray)
        self.jobs = {}  # ID by client
        self.times = []  # when each got its job, monotonic
        for number in range(count):
            sock = socket.create_connection(("127.0.0.1", port), 60)
            self.selector.register(sock, selectors.EVENT_READ, number)
            self.ask(sock, number)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for key in list(self.selector.get_map().values()):
            key.fileobj.close()
        self.selector.close()

    def ask(self, sock, number):
        self.polls[number] += 1
        node = {"Client": f"{number:016x}", "Session": "1", "Slots": 1, "Properties": ["linux"]}
        wish = {"Slots": 1, "Wait": WAIT, "Running": [], "Poll": self.polls[number], "Open": []}
        sock.sendall(post("/request", json.dumps({"Hostname": f"h{number}", "Node": node, **wish}).encode()))

    def listen(self, seconds, enough=None):
        """Takes answers in for so long, or until `enough` clients have a job."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and len(self.jobs) != enough:
            for key, _ in self.selector.select(max(0, deadline - time.monotonic())):
                self.read(key.fileobj, key.data)

    def read(self, sock, number):
        data = self.data[number]
        more = sock.recv(1 << 16)
        assert more, f"the server hung up on client {number}"
        data += more
        if not answer_end(data):
            return
        assert data.startswith(b"HTTP/1.1 200"), data[:1000]
        jobs = json.loads(data[data.index(b"\r\n\r\n") :])["Jobs"]
        del data[:]
        if jobs:
            assert len(jobs) == 1 and number not in self.jobs, jobs
            self.jobs[number] = jobs[0]["ID"]
            self.times.append(time.monotonic())
        else:
            self.ask(sock, number)


def crowd(count, seconds):
    """What a crowd of waiting clients costs the server, and how soon they are served."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(soft, 2 * count + 100)  # also the server's, which inherits it
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(hard, wanted), hard))
    with lab() as made:
        server = made.server()
        pid = server.process.pid
        empty = memory(pid)
        with Crowd(server.port, count) as waiting, Connection(server.port) as adding:
            until(lambda: sum(server.status()["Nodes"].values()) == count, "every client to be seen")
            say(f"{count} clients wait for {seconds} s")
            before, began = cpu(pid)[0], time.monotonic()
            waiting.listen(seconds)
            share = (cpu(pid)[0] - before) / (time.monotonic() - began) * 100
            asked, used = sum(waiting.polls.values()) - count, memory(pid)
            began = time.monotonic()
            adding.socket.sendall(post("/add", json.dumps([{"Params": ["true"]}] * count).encode()))
            waiting.listen(60, enough=count)
            served, most = len(set(waiting.jobs.values())), memory(pid, "VmHWM")
            times = [(moment - began) * 1e3 for moment in waiting.times]
        assert server.status()["States"]["R"] == served, server.status()
    print(f"\n{count} clients that wait, for {seconds} s\n")
    megabytes = " / ".join(f"{value / 2**20:.0f} MB" for value in (empty, used, most))
    table(["", "this run"], [
        ["server's memory: empty / while they wait / at most", megabytes],
        ["server's CPU while they wait", f"{share:.2f} % of a core ({asked} requests sent again)"],
        ["clients served", f"{served} of {count}"],
        ["from the POST /add to the median client's job, the last one's",
         f"{percentile(times, 50):.0f} ms, {percentile(times, 100):.0f} ms"],
    ])  # fmt: skip
    print()
    print(verdict(served == count, f"{served} of {count} clients served"))
    print(verdict(most < 250 << 20, f"server: {most >> 20} MB at most, under 250 MB wanted"))


# ---------------------------------------------------------------------------------------------------------------------
# Watching
# ---------------------------------------------------------------------------------------------------------------------


class Watcher:
    """A client that runs `sleep`s, on a server of its own."""

    def __init__(self, made, count, seconds, words, limits):
        server = made.server()
        self.client = made.client(server, *words, max_jobs=count)
        server.add(*[{"Params": ["sleep", str(seconds + 300)], **limits}] * count)
        until(lambda: self.started(made) == count, "the jobs to run")
        self.pids = self.client.pid, keeper_pid(made)
        self.server, self.count = server, count

    @staticmethod
    def started(made):
        """How many jobs have a process, by the keeper's word in the spool."""
        logs = glob.glob(made.path("jobrunner-spool", "jobs", "*", "log"))
        return sum('"Pid"' in made.log(path) for path in logs)

    def begin(self):
        self.before, self.began = [cpu(pid) for pid in self.pids], time.monotonic()

    def end(self):
        """Percent of a core: client, its ps, keeper; bytes of client and keeper, and the same as PSS."""
        seconds = time.monotonic() - self.began
        assert self.server.status()["States"]["R"] == self.count, self.server.status()
        (client, tools), (keeper, _) = [
            [(after - before) / seconds * 100 for before, after in zip(earlier, cpu(pid))]
            for earlier, pid in zip(self.before, self.pids)
        ]
        return (client, tools, keeper), [memory(pid) for pid in self.pids], [own_memory(pid) for pid in self.pids]


def watching(count, seconds):
    with lab() as plain, lab() as sampled:
        watchers = {
            "no limits": Watcher(plain, count, seconds, (), {}),
            "sampled: --dead-after, a memory limit": Watcher(
                sampled, count, seconds, ("--dead-after", 600), {"Memory": 1 << 30}
            ),
        }
        say(f"clients watch {count} jobs each for {seconds} s")
        time.sleep(3)  # until what starting them took is over
        for watcher in watchers.values():
            watcher.begin()
        time.sleep(seconds)
        results = {name: watcher.end() for name, watcher in watchers.items()}
    print(f"\na client that watches {count} jobs, for {seconds} s\n")
    rows = [
        [name] + [f"{value:.2f}" for value in (sum(shares),) + shares]
        + [" + ".join(f"{value / 2**20:.1f}" for value in used)]
        + [" + ".join("?" if value is None else f"{value / 2**20:.1f}" for value in own)]
        for name, (shares, used, own) in results.items()
    ]  # fmt: skip
    head = ["% of a core", "whole", "client", "its ps", "keeper", "client + keeper, MB", "the same, as PSS"]
    table(head, rows)
    print()
    for name, (shares, used, _) in results.items():
        print(verdict(sum(shares) < 1, f"{name}: {sum(shares):.2f} % of a core, under 1 wanted"))
        print(verdict(sum(used) < 40 << 20, f"{name}: {sum(used) / 2**20:.1f} MB, under 40 wanted"))


def main():
    parser = arguments(__doc__)
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--seconds", type=int, default=60)
    options = parser.parse_args()
    print(machine())
    with limit(300 + 3 * options.seconds):
        crowd(options.clients, options.seconds)
        watching(options.jobs, options.seconds)


if __name__ == "__main__":
    main()

"""Requests a second on the GET forms: /add, /request, and a job's whole cycle of add, request and finish.

One job a request, durable: answered when it is on disk.  At 1, 8 and 64 kept-alive connections and at 8 that close;
each against Python's stock ThreadingHTTPServer, which answers `{}` and does nothing, in the same run.  Two settings
let that one compete at all: TCP_NODELAY (without it a kept-alive connection gets 25 answers a second) and a longer
queue of connections (with 5 some wait a second to be let in).

The original's figures were measured once, elsewhere, on 2 cores too, with nothing on disk: they are constants here. The
stock server's 6,500 requests a second at 8 connections there tell how this machine, as busy as it is now, compares.

The load comes from wrk (apt-get install wrk), or, where that is missing or with --python-load, from a process of this
program, which takes a core and is the bottleneck at times.  A fresh server and database for each measurement.
"""

import collections
import functools
import json
import os
import re
import selectors
import shutil
import socket
import subprocess
import sys
import time
from urllib.parse import quote

from common import answer_end, arguments, cpu, get, in_turn, lab, limit, machine, percentile, table, verdict

JOB = '{"Params":["java","-jar","job.jar","169"],"Runtime":3600}'
PATHS = {"add": "/add?configuration=" + quote(JOB, safe=""), "request": "/request?hostname=h", "stock": "/"}
FINISH = '/finish?hostname=h&configuration={"ID":"%s"}'
SHAPES = ((1, False), (8, False), (64, False), (8, True))  # connections, and whether each closes after its answer

# requests/s, and jobs/s of the cycle, of the original
ORIGINAL = {
    ("add", 1, False): 12100,
    ("add", 8, False): 44800,
    ("add", 64, False): 51000,
    ("add", 8, True): 18200,
    ("cycle", 8, False): 14500,
}
NAMES = {"stock": "stock http.server, {}", "cycle": "add + request + finish, as jobs/s"}
STOCK_THERE = 6500  # the stock server, 8 kept-alive connections, on that machine
WANTED = [("add", 8, False), ("add", 64, False)]  # at least a quarter

STOCK = """
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # its two writes an answer would wait 40 ms for an acknowledgement in between
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")
ThreadingHTTPServer.request_queue_size = 128
server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_address[1], flush=True)
server.serve_forever()
"""

# A cycle: whatever was leased is finished, else a job is requested for each that was added.
WRK_CYCLE = """
local adds, asks, leased = 0, 0, {}
function request()
    if #leased > 0 then
        local id = table.remove(leased)
        return wrk.format("GET", "/finish?hostname=h&configuration=%7B%22ID%22%3A%22" .. id .. "%22%7D")
    end
    if adds > asks then asks = asks + 1; return wrk.format("GET", "/request?hostname=h") end
    adds = adds + 1
    return wrk.format("GET", "ADD")
end
function response(status, headers, body)
    local id = body:match('"ID":"([^"]+)","Params"')
    if id then leased[#leased + 1] = id end
end
""".replace("ADD", PATHS["add"])
WRK_BAD = """
function done(summary, latency, requests)
    local e = summary.errors
    io.write(string.format("bad %d\\n", e.connect + e.read + e.write + e.status + e.timeout))
end
"""

# ---------------------------------------------------------------------------------------------------------------------
# Load
# ---------------------------------------------------------------------------------------------------------------------


def wrk_load(folder, port, kind, connections, closing, seconds):
    """(requests/s, ms at the 99th percentile, bad answers)."""
    script = os.path.join(folder, "load.lua")
    with open(script, "w") as file:
        file.write((WRK_CYCLE if kind == "cycle" else "") + WRK_BAD)
    close = ["-H", "Connection: close"] if closing else []
    url = f"http://127.0.0.1:{port}{PATHS.get(kind, '/')}"
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "-s", script] + close + [url]
    printed = subprocess.run(command, stdout=subprocess.PIPE, timeout=seconds + 60, check=True).stdout.decode()
    number, unit = re.search(r"99%\s+([\d.]+)(us|ms|s)", printed).groups()
    per_second = float(re.search(r"Requests/sec:\s+([\d.]+)", printed)[1])
    return per_second, float(number) * {"us": 1e-3, "ms": 1, "s": 1e3}[unit], int(re.search(r"bad (\d+)", printed)[1])


def python_load(folder, port, kind, connections, closing, seconds):
    """The same from a process of this program."""
    words = [str(word) for word in (port, kind, connections, int(closing), seconds)]
    command = [sys.executable, os.path.abspath(__file__), "--load"] + words
    printed = subprocess.run(command, stdout=subprocess.PIPE, timeout=seconds + 60, check=True).stdout
    return tuple(json.loads(printed))


class Load:
    """The load generator: one thread, all connections."""

    def __init__(self, port, kind, connections, closing, seconds):
        self.port, self.kind, self.closing, self.seconds = port, kind, closing, seconds
        self.selector = selectors.DefaultSelector()
        self.leased = collections.deque()
        self.adds = self.asks = self.bad = 0
        self.times = []
        for _ in range(connections):
            self.connect()

    def connect(self):
        sock = socket.create_connection(("127.0.0.1", self.port), 60)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.selector.register(sock, selectors.EVENT_READ, [time.perf_counter(), bytearray()])
        sock.sendall(self.request())

    def request(self):
        path = PATHS.get(self.kind) or self.next_of_cycle()
        request = get(path)
        return request[:-2] + b"Connection: close\r\n\r\n" if self.closing else request

    def next_of_cycle(self):
        if self.leased:
            return quote(FINISH % self.leased.popleft(), safe="/?=&")
        if self.adds > self.asks:
            self.asks += 1
            return PATHS["request"]
        self.adds += 1
        return PATHS["add"]

    def run(self):
        """(requests/s, ms at the 99th percentile, bad answers)."""
        began = time.perf_counter()
        while time.perf_counter() < began + self.seconds:
            for key, _ in self.selector.select(1):
                self.read(key.fileobj, *key.data)
        return len(self.times) / (time.perf_counter() - began), percentile(self.times, 99) * 1e3, self.bad

    def read(self, sock, began, data):
        more = sock.recv(1 << 16)
        data += more
        if more and not answer_end(data):
            return
        self.times.append(time.perf_counter() - began)
        self.bad += not data.startswith(b"HTTP/1.1 20")
        found = re.search(rb'"ID":"([^"]+)","Params"', data) if self.kind == "cycle" else None
        if found:
            self.leased.append(found[1].decode())
        if self.closing:
            self.selector.unregister(sock)
            sock.close()
            self.connect()
        else:
            self.selector.modify(sock, selectors.EVENT_READ, [time.perf_counter(), bytearray()])
            sock.sendall(self.request())


# ---------------------------------------------------------------------------------------------------------------------
# Measurements
# ---------------------------------------------------------------------------------------------------------------------


def measure_ours(load, kind, connections, closing, seconds):
    """(requests/s, p99 in ms, CPU s of the server a request)."""
    with lab() as made:
        server = made.server()
        if kind != "add":  # a stock to take from; the cycle needs a little, since a request may overtake its add
            jobs = b"[" + b",".join([JOB.encode()] * (1000 if kind == "cycle" else 30000 * seconds)) + b"]"
            assert server.fetch("/add", jobs)[0] == 200
        before = cpu(server.process.pid)[0]
        per_second, p99, bad = load(made.folder, server.port, kind, connections, closing, seconds)
        used = cpu(server.process.pid)[0] - before
        status = server.status()
        assert not bad, f"{bad} answers of /{kind} were no 200, or none came"
        assert kind == "add" or status["States"]["Q"], "the queue ran dry: this measured 204s"
        assert kind != "cycle" or status["Statuses"]["finished"] > per_second * seconds / 3 * 0.9, status
        return per_second, p99, used / (per_second * seconds)


def measure_stock(load, kind, connections, closing, seconds):
    """The same of the stock server."""
    with lab() as made:
        stock = subprocess.Popen([sys.executable, "-c", STOCK], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        made.processes.append(stock)
        port = int(stock.stdout.readline())
        before = cpu(stock.pid)[0]
        per_second, p99, _ = load(made.folder, port, kind, connections, closing, seconds)
        return per_second, p99, (cpu(stock.pid)[0] - before) / (per_second * seconds)


def main():
    if sys.argv[1:2] == ["--load"]:
        port, connections, closing, seconds = map(int, sys.argv[2:3] + sys.argv[4:])
        print(json.dumps(Load(port, sys.argv[3], connections, bool(closing), seconds).run()))
        return
    parser = arguments(__doc__)
    parser.add_argument("--seconds", type=int, default=3, help="of each measurement (default 3)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", default="add,request,cycle", help="(default add,request,cycle)")
    parser.add_argument("--python-load", action="store_true", help="do not use wrk")
    options = parser.parse_args()
    print(machine())
    load = python_load if options.python_load or not shutil.which("wrk") else wrk_load
    contenders = {}
    for shape in SHAPES:
        for kind in ["stock"] + options.kinds.split(","):
            measure = measure_stock if kind == "stock" else measure_ours
            contenders[(kind,) + shape] = functools.partial(measure, load, kind, *shape, options.seconds)
    with limit(3600):
        results = in_turn(options.rounds, contenders)
    report(options, {name: max(rounds) for name, rounds in results.items()}, load)


def report(options, best, load):
    source = load.__name__.split("_")[0]
    print(f"\nrequests/s, best of {options.rounds} rounds of {options.seconds} s, load from {source}\n")
    rows = []
    for (kind, connections, closing), (per_second, p99, used) in best.items():
        stock, original = best["stock", connections, closing][0], ORIGINAL.get((kind, connections, closing))
        shown = per_second / 3 if kind == "cycle" else per_second
        rows.append([NAMES.get(kind, f"GET /{kind}"), f"{connections}{' closing' if closing else ''}", f"{shown:.0f}",
                     f"{p99:.1f}", f"{used * 1e6:.0f}", f"{per_second / stock:.2f}", original or "",
                     f"{shown / original:.2f}" if original else ""])  # fmt: skip
    head = ["", "connections", "a second", "p99 ms", "server CPU us a request", "requests : stock",
            "original (elsewhere)", "ours : original"]  # fmt: skip
    table(head, rows)
    here = best["stock", 8, False][0] / STOCK_THERE
    print(f"\nThis machine, now, by the stock server at 8 connections: {here:.2f} of the original's.\n")
    for case in WANTED:
        if case in best:
            ratio = best[case][0] / ORIGINAL[case]
            words = f"GET /{case[0]} at {case[1]} connections: {ratio:.2f} of the original's {ORIGINAL[case]}"
            words += f" ({ratio / here:.2f} for this machine's speed), at least 0.25 wanted"
            print(verdict(ratio >= 0.25, words))


if __name__ == "__main__":
    main()

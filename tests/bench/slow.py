"""What 500 connections that send a byte a second cost the others, while a client runs 50 jobs.

Half of them send the head of a request, half a body.  Meanwhile three kinds of requests are made in turn, as a client
and commands make them: GET /status and POST /request on a connection that stays, and GET /job on a new one.
"""

import contextlib
import json
import socket
import threading
import time
import urllib.request

from common import arguments, lab, limit, machine, percentile, table, verdict

WANTED = 250  # ms at the 99th percentile
HEADS = (
    b"GET /status HTTP/1.1\r\nX: " + b"y" * 1000,
    b"POST /add HTTP/1.1\r\nContent-Length: 900\r\n\r\n" + b"[" * 900,
)


def drip(connections, port, over):
    """A byte a second on each; those that were closed are opened again, as a bad peer would."""
    sent = [0] * len(connections)
    began = time.monotonic()
    while not over.wait(max(0, began + 1 - time.monotonic())):
        began = time.monotonic()
        for number, connection in enumerate(connections):
            try:
                connection.send(HEADS[number % 2][sent[number] : sent[number] + 1])
                sent[number] += 1
            except OSError:
                connection.close()
                connections[number], sent[number] = socket.create_connection(("127.0.0.1", port), 60), 0
            if number % 50 == 49:  # spread over the second
                over.wait(max(0, began + (number + 1) / len(connections) - time.monotonic()))


def measure(server, seconds):
    """s that each request took."""
    times, ask = [], json.dumps({"Hostname": "measure", "Slots": 0, "Wait": 0}).encode()
    body = b"POST /request HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(ask), ask)
    staying = socket.create_connection(("127.0.0.1", server.port), 60)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for data in (b"GET /status HTTP/1.1\r\nHost: x\r\n\r\n", body):
            began = time.perf_counter()
            staying.sendall(data)
            staying.recv(65536)
            times.append(time.perf_counter() - began)
        began = time.perf_counter()
        with contextlib.closing(urllib.request.urlopen(server.url + "/job?id=1", timeout=60)) as answer:
            answer.read()
        times.append(time.perf_counter() - began)
        time.sleep(0.02)
    staying.close()
    return times


def run(slow, jobs, seconds):
    """(s of each request, s until all jobs had ended)."""
    with lab() as made:
        server, over = made.server(), threading.Event()
        connections = [socket.create_connection(("127.0.0.1", server.port), 60) for _ in range(slow)]
        dripping = threading.Thread(target=drip, args=(connections, server.port, over))
        dripping.start()
        try:
            server.add(*[["sleep", "0.2"]] * jobs)
            began, ended = time.monotonic(), []
            made.client(server, max_jobs=2)

            def wait_for_jobs():
                while server.status()["Statuses"]["finished"] < jobs:
                    time.sleep(0.1)
                ended.append(time.monotonic() - began)

            waiting = threading.Thread(target=wait_for_jobs)
            waiting.start()
            times = measure(server, seconds)
            waiting.join()
            return times, ended[0]
        finally:
            over.set()
            dripping.join()
            for connection in connections:
                connection.close()


def main():
    parser = arguments(__doc__)
    parser.add_argument("--seconds", type=int, default=30, help="that the connections are held (default 30)")
    parser.add_argument("--slow", type=int, default=500, help="slow connections (default 500)")
    parser.add_argument("--jobs", type=int, default=50)
    options = parser.parse_args()
    print(machine() + "\n")
    rows, worst = [], 0
    with limit(600):
        for slow in (0, options.slow):
            times, ended = run(slow, options.jobs, options.seconds)
            worst = percentile(times, 99) * 1e3
            row = [f"{slow} slow connections", len(times)] + [f"{percentile(times, p) * 1e3:.1f}" for p in (50, 99)]
            rows.append(row + [f"{max(times) * 1e3:.0f}", f"{ended:.1f}"])
    table(["", "requests", "median ms", "p99 ms", "longest ms", f"s for {options.jobs} jobs"], rows)
    print(
        "\n"
        + verdict(worst < WANTED, f"p99 with {options.slow} slow connections: {worst:.0f} ms, under {WANTED} wanted")
    )


if __name__ == "__main__":
    main()

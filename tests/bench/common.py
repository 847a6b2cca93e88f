"""What the benchmarks share: a lab in a temporary folder, clocks, CPU and memory of processes, connections, tables.

Each benchmark is one command, run by hand on a machine that does nothing else:  python3 tests/bench/true_jobs.py
It prints a table whose ratios were measured in one run: rounds of all contenders in turn, the best round of each
counting, so that a noisy machine hurts little.  Everything is on loopback and in a temporary folder (TMPDIR says where:
a real disk, or every sync is free), ends by itself, and whatever was started ends with it, by pid.

Linux only: CPU and memory come from /proc.
"""

import argparse
import contextlib
import ctypes
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path.insert(0, os.path.dirname(HERE))  # harness

from harness import Lab, until  # noqa: E402

# ---------------------------------------------------------------------------------------------------------------------
# A run of a benchmark
# ---------------------------------------------------------------------------------------------------------------------


def arguments(doc):
    """A parser that shows the benchmark's docstring."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


@contextlib.contextmanager
def limit(seconds):
    """Ends the benchmark, cleaning up, when it takes longer than `seconds`, or at TERM."""

    def too_long(*_):
        raise SystemExit(f"given up after {seconds} s")

    def ended(*_):
        raise SystemExit("ended by TERM")

    signal.signal(signal.SIGALRM, too_long)
    signal.signal(signal.SIGTERM, ended)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


@contextlib.contextmanager
def folder():
    """A temporary folder that goes in the end."""
    path = tempfile.mkdtemp(prefix="jobrunner-bench-")
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def lab():
    """A Lab in a temporary folder: what it started, and the jobs and keepers that clients left, end with it."""
    with folder() as path, Lab(path) as made:
        yield made


def in_turn(rounds, contenders):
    """{name: [result of each round]} of {name: function}: all of them in turn, `rounds` times."""
    results = {name: [] for name in contenders}
    for number in range(1, rounds + 1):
        for name, run in contenders.items():
            say(f"round {number} of {rounds}: {name}")
            results[name].append(run())
    say("")
    return results


def say(text):
    """What goes on, on a terminal alone."""
    if sys.stderr.isatty():
        sys.stderr.write("\r\033[K" + text)
        sys.stderr.flush()


def machine():
    """What a table must say to mean something: the machine, its load, and what a sync costs where the database is."""
    with folder() as path, open("/proc/cpuinfo") as file:
        model = re.search(r"model name\s*: (.*)", file.read())
        kind = subprocess.run(["stat", "-f", "-c", "%T", path], stdout=subprocess.PIPE).stdout.decode().strip()
        sync = sync_seconds(path)
    cores = len(os.sched_getaffinity(0))
    return (
        f"{cores} cores ({model[1] if model else platform.machine()}), Linux {platform.release()}, "
        f"Python {platform.python_version()}\n"
        f"{tempfile.gettempdir()}: {kind}, a sync of 250 bytes {sync * 1e3:.2f} ms at the median; "
        f"load before the run {os.getloadavg()[0]:.1f}"
    )


def sync_seconds(path, count=50):
    """Median of appending a journal's line and syncing it."""
    times = []
    file = os.open(os.path.join(path, "sync"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for _ in range(count):
        began = time.perf_counter()
        os.write(file, b"x" * 250)
        os.fsync(file)
        times.append(time.perf_counter() - began)
    os.close(file)
    return percentile(times, 50)


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def table(head, rows):
    """Prints a Markdown table, so that it can go into docs/performance.md as it is; the first column is text."""
    cells = [[str(cell) for cell in row] for row in [head] + rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    rule = ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]]
    for row in [cells[0], rule] + cells[1:]:
        words = [row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
        print("| " + " | ".join(words) + " |")
    sys.stdout.flush()


def verdict(reached, words):
    """A target and whether this run met it."""
    return f"{words}: {'met' if reached else 'MISSED'}"


def percentile(values, percent):
    """The value that `percent` of them do not exceed; nan of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] if ordered else float("nan")


# ---------------------------------------------------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------------------------------------------------

TICK = os.sysconf("SC_CLK_TCK")


def cpu(pid):
    """(CPU seconds of a process, of its children that it waited for), also of one that is over and not yet reaped."""
    with open(f"/proc/{pid}/stat") as file:
        words = file.read().rsplit(")", 1)[1].split()
    own, own_kernel, children, children_kernel = (int(word) / TICK for word in words[11:15])
    return own + own_kernel, children + children_kernel


def cpu_at_end(pid):
    """cpu() of a child of ours once it is over; somebody must wait for it still."""
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    return cpu(pid)


def adopt_orphans():
    """From now on processes whose parent ends become children of this one: so a keeper's CPU time can be read when its
    client, and then it itself, is over."""
    if ctypes.CDLL(None, use_errno=True).prctl(36, 1, 0, 0, 0):  # PR_SET_CHILD_SUBREAPER
        raise OSError(ctypes.get_errno(), "prctl")


def memory(pid, key="VmRSS"):
    """Bytes of a process: VmRSS now, VmHWM at most."""
    with open(f"/proc/{pid}/status") as file:
        return int(re.search(rf"{key}:\s*(\d+)", file.read())[1]) * 1024


def own_memory(pid):
    """Bytes of a process, what it shares counted by halves, thirds ... (PSS); None where the kernel does not tell."""
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            return int(re.search(r"Pss:\s*(\d+)", file.read())[1]) * 1024
    except OSError:
        return None


def keeper_pid(lab, client=None, spool="jobrunner-spool"):
    """The pid of the keeper of the client with that spool, as soon as there is one; 0 if the client is over first."""
    path = lab.path(spool, "keepers")

    def found():
        for name in os.listdir(path) if os.path.isdir(path) else []:
            with contextlib.suppress(OSError, ValueError), open(os.path.join(path, name)) as file:
                return int(file.read())
        return -1 if client and client.poll() is not None else 0

    return max(0, until(found, "a keeper"))


# ---------------------------------------------------------------------------------------------------------------------
# HTTP by hand: what a client library would cost is not the server's
# ---------------------------------------------------------------------------------------------------------------------


def post(path, body):
    """The bytes of a POST with a JSON body."""
    return b"POST %s HTTP/1.1\r\nHost: bench\r\nContent-Length: %d\r\n\r\n%s" % (path.encode(), len(body), body)


def get(path):
    return b"GET %s HTTP/1.1\r\nHost: bench\r\n\r\n" % path.encode()


_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


def answer_end(data):
    """Bytes of the first whole answer in `data`; 0: there is none yet."""
    head = data.find(b"\r\n\r\n") + 4
    if head == 3:
        return 0
    length = _LENGTH.search(data, 0, head)
    end = head + (int(length[1]) if length else 0)
    return end if len(data) >= end else 0


class Connection:
    """A kept-alive connection for answers with a Content-Length."""

    def __init__(self, port, timeout=60):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def ask(self, request):
        """(status, body) of a request given as bytes."""
        self.socket.sendall(request)
        data = bytearray()
        while not answer_end(data):
            more = self.socket.recv(1 << 20)
            if not more:
                raise ConnectionError("the server hung up")
            data += more
        return int(data[9:12]), bytes(data[data.index(b"\r\n\r\n") + 4 :])

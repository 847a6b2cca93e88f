"""Throws requests at a server that no client sends: python3 tests/fuzz.py --count 20000 --seed 1

Methods, URLs, headers, bodies, JSON of every shape, truncated and pipelined, with every token and none; among them enough
good ones that jobs are added, run, end, and are altered and deleted.  After each round the queue must be what it was but
for what was answered with 2xx.  At the end: no 500, no traceback in the log, the same process still serving; then it is
killed, and the next one loads the same jobs.  The same seed makes the same requests, as far as answers do not differ.
"""

import argparse
import base64
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), HERE]

from harness import Lab, Server  # noqa: E402

import server as server_module  # noqa: E402

TOKENS = {"view": "jr_v", "agent": "jr_a", "submit": "jr_s"}
# Long polls and late answers are tested elsewhere, and would only take time here.
PROGRAM = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import server
server.LONGEST_POLL, server.LATE = 0.02, 0.001
sys.exit(server.main())
"""
CONNECTIONS, PIPELINED = 16, 16  # of a round, and requests of one connection at most
GOOD = {200, 204, 400, 401, 403, 404, 405, 409, 411, 413, 414, 431}
READERS = sorted(path for path, route in server_module.ROUTES.items() if route.role in ("view", "any"))
PATHS = sorted(set(server_module.ROUTES) - {"/shutdown"})
KEYS = [
    "ID", "Number", "Index", "Params", "Runtime", "Name", "Queue", "Priority", "Memory", "CpuTime", "Ncpus", "Requires",
    "Env", "WorkDir", "Owner", "StdOut", "StdErr", "StartAfter", "Depend", "Hold", "Rerunable", "Retries", "State",
    "Comment", "Host", "Lease", "RunCount", "EndTime", "Status", "ExitStatus", "CPUUsed", "MemUsed", "Script", "Array",
    "Items", "MaxRunSubjobs", "MaxFails", "Hostname", "Slots", "Wait", "Running", "Node", "Reports", "Poll", "Open", "IDs",
    "Select", "Set", "Force", "Action", "Hosts", "CPU", "Mem", "Seconds", "StdOutTail", "StdErrTail", "CpuTimeUsed",
    "MaxMem", "Fill", "Join", "Shell", "Account", "params", "PARAMS", "x", "",
]  # fmt: skip


class Answer:
    def __init__(self, status, body):
        self.status, self.body = status, body


class Requests:
    """Makes requests, some of them out of what answers have told."""

    def __init__(self, seed, tokens):
        self.random = random.Random(seed)
        self.tokens = tokens
        self.ids = ["81b82367-c5c4-439b-a290-b16b1a13781f"]
        self.runs = []  # (ID, Lease, Hostname)

    def one_of(self, *makers):
        return self.random.choice(makers)()

    def connection(self):
        """[(bytes, method, path)] of one connection."""
        made = [self.request() for _ in range(self.random.choice([1, 2, 4, PIPELINED]))]
        if self.random.random() < 0.15:  # the last one is not whole
            data, method, path = made[-1]
            made[-1] = (data[: self.random.randrange(len(data))], method, path)
        return made

    def request(self):
        choose, path = self.random, self.path()
        method = choose.choice(["GET", "POST"] * 24 + ["PUT", "DELETE", "OPTIONS", "get", "B-REW", "G\tT", ""])
        body = b"" if method == "GET" and choose.random() < 0.9 else self.body(path)
        lines = [b"Host: localhost"]
        if body or choose.random() < 0.3:
            lines.append(b"Content-Length: %d" % len(body))
        lines += [self.header() for _ in range(choose.choice([0] * 14 + [1, 3]))]
        if self.tokens and choose.random() < 0.95:
            lines.append(self.authorization())
        choose.shuffle(lines)
        version = (
            "HTTP/1.1"
            if choose.random() < 0.99
            else choose.choice(["HTTP/1.0", "HTTP/2.0", "HTTP/1.1 ", "", "http/1.1"])
        )
        head = f"{method} {path}{self.query(path)} {version}".encode("utf-8", "surrogatepass")
        end = b"\r\n" if choose.random() < 0.99 else choose.choice([b"\n", b"\r", b"\n\n", b"\r\n "])
        data = end.join([head, *lines]) + b"\r\n\r\n" + body
        if choose.random() < 0.02:  # a byte is another one
            at = choose.randrange(len(data))
            data = data[:at] + bytes([choose.randrange(256)]) + data[at + 1 :]
        return data, method, path

    def path(self):
        choose = self.random
        if choose.random() < 0.93:
            path = choose.choice(PATHS)
            return path if path not in ("/dump", "/jobs") or choose.random() < 0.2 else "/add"
        odd = [
            "/",
            "",
            "//add",
            "/add/",
            "/%61dd",
            "/a\u00e4",
            "/../jobs.json",
            "http://localhost/add",
            "*",
            "/\ud800",
            "/add#x",
            "/" + "a" * 5000,
        ]
        return choose.choice(odd)

    def query(self, path):
        choose = self.random
        if choose.random() < 0.3:
            return ""
        pairs = []
        for _ in range(choose.choice([1, 1, 2, 4])):
            key = choose.choice(
                ["configuration"] * 5 + ["id", "hostname", "cpu", "mem", "wait", "state", "limit", "fields", "x"]
            )
            value = (
                json.dumps(self.configuration(path))
                if key == "configuration"
                else str(self.one_of(self.word, self.number, self.id))
            )
            pairs.append(f"{key}={urllib.parse.quote(value, errors='surrogatepass')}")
        text = "&".join(pairs)
        if choose.random() < 0.05:
            text = text[: choose.randrange(len(text) + 1)] + choose.choice(
                ["%", "%zz", "%ff", "%00", "&&", "=", "\u00ff", "+"]
            )
        return choose.choice(["?"] * 20 + ["??", "&"]) + text

    def header(self):
        odd = [
            b"Content-Length: 5", b"Content-Length: -1", b"Content-Length: 99999999999999999999", b"Content-Length: 1e3",
            b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity", b"Expect: 100-continue", b"Connection: close",
            b"Connection: keep-alive", b"Host: evil.example", b"Origin: http://evil.example", b"Origin: null",
            b"Sec-Fetch-Site: cross-site", b"User-Agent: Mozilla/5.0", b"Referer: x", b"X: " + b"y" * 70000, b"X : y",
            b" folded: y", b"no colon", b"X: \x00", b"X: a\rb", b"\xe4: x", b": x", b"X:", b"Content-Type: text/plain",
        ]  # fmt: skip
        return self.random.choice(odd)

    def authorization(self):
        token = self.random.choice(
            [TOKENS["submit"]] * 6 + [TOKENS["agent"]] * 3 + [TOKENS["view"], "jr_x", "", "\u00e4"]
        )
        if self.random.random() < 0.5:
            return b"Authorization: Bearer " + token.encode()
        return (
            b"Authorization: Basic " + base64.b64encode(b"u:" + token.encode())[: self.random.choice([99, 99, 99, 3])]
        )

    def body(self, path):
        if self.random.random() < 0.1:
            odd = [
                b"",
                b"{",
                b"[" * 100000,
                b'{"a":' * 3000,
                b"\xff\xfe",
                b"\xef\xbb\xbf{}",
                b"NaN",
                b"1e999",
                b'"\\ud800"',
                b"\0",
                b"nul",
            ]
            return self.random.choice(odd)
        return json.dumps(self.one_of(*[lambda: self.configuration(path)] * 9, lambda: self.value(0))).encode()

    def configuration(self, path):
        """Something like what a path takes."""
        choose = self.random
        if path == "/add":
            job = {"Params": [self.word() or "x" for _ in range(choose.randrange(1, 4))]}
            job = self.spoilt(job) if choose.random() < 0.5 else job
            return [job] * choose.randrange(3) if choose.random() < 0.2 else job
        if path == "/request":
            named = [{"ID": i, "Lease": lease} for i, lease, _ in choose.sample(self.runs, min(len(self.runs), 2))]
            return self.spoilt(
                {
                    "Hostname": choose.choice(["h1", "h2"] * 9 + ["h\0"]),
                    "Slots": choose.choice([0, 1, 2]),
                    "Running": named,
                }
            )
        if path in ("/finish", "/timeout", "/dead", "/usage"):
            job_id, lease, host = (
                choose.choice(self.runs) if self.runs and choose.random() < 0.7 else (self.id(), "x", "h1")
            )
            report = {
                "ID": job_id,
                "Lease": lease,
                "Hostname": host,
                "ExitStatus": choose.choice([0, 1, None]),
                "CPU": 1,
                "Mem": 1,
                "Comment": self.word(),
            }
            return choose.choice([report, [report], [report, report], self.spoilt(report)])
        wish = {"IDs": [choose.choice([self.id(), "1", "2[1]", "3[]", "1[1-3]", self.word()])]}
        wish.update(
            choose.choice([{}, {"Set": {choose.choice(KEYS): self.value(1)}}, {"Queue": "default"}, {"Force": True}])
        )
        if path in ("/queue", "/node"):
            wish.update(
                Name=self.word(),
                Hosts=["h1"],
                Action=choose.choice(["create", "set", "delete", "offline", "clear", "x"]),
            )
        return self.spoilt(wish)

    def spoilt(self, record):
        """A record with some keys more, or other values."""
        record = dict(record)
        for _ in range(self.random.choice([0, 0, 1, 1, 2])):
            key = self.random.choice(KEYS + list(record))
            record[key] = self.value(1)
        return record

    def value(self, depth):
        makers = [
            self.word,
            self.word,
            self.number,
            self.number,
            self.id,
            lambda: self.random.choice([None, True, False]),
        ]
        if depth < 3:
            makers += [
                lambda: [self.value(depth + 1) for _ in range(self.random.randrange(4))],
                lambda: {self.random.choice(KEYS): self.value(depth + 1) for _ in range(self.random.randrange(4))},
            ]
        return self.one_of(*makers)

    def word(self):
        words = [
            "", "true", "x", "a b", "1-3", "1-3:2", "{index}", "afterok:1", "afterany:2:3", "2199-01-01T00:00:00Z", "Q", "F",
            "default", "h1", "../../etc/passwd", "C:\\con", "\x00", "\ud800", "\U0001f600", "%s%n", "<script>", "'; --", "~" * 3000,
            "512mb", "-1", "linux", "host=h1", "17", "finished", "failed", "refused", "released",
        ]  # fmt: skip
        return self.random.choice(words)

    def number(self):
        return self.random.choice(
            [0, 1, 2, -1, 17, 3.5, -0.0, 1e308, 1 << 31, 1 << 63, -(1 << 64), 10**30, float("nan"), float("inf")]
        )

    def id(self):
        return self.random.choice(self.ids[-200:])

    def learn(self, answers):
        """Takes IDs and leases from answers."""
        for answer in answers:
            value = as_json(answer.body) if answer.status == 200 else None
            jobs = value.get("Jobs") if isinstance(value, dict) else None
            for job in jobs if isinstance(jobs, list) else []:
                if isinstance(job, dict) and job.get("Lease"):
                    self.runs.append((job["ID"], job["Lease"], job["Host"]))
        self.runs = self.runs[-50:]


def as_json(body):
    try:
        return json.loads(body)
    except ValueError:
        return None


def converse(port, made):
    """Sends requests on one connection; the answers that came until it was closed."""
    data = b"".join(data for data, _, _ in made)
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.settimeout(60)
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it has been closed for what came first
        with connection.makefile("rb") as file:
            try:
                return read_answers(file)
            except ConnectionError:
                return []


def read_answers(file):
    found = []
    while True:
        line = file.readline()
        if not line:
            return found
        words = re.match(rb"HTTP/1\.1 (\d\d\d) [A-Za-z ]+\r\n\Z", line)
        assert words, f"no status line: {line!r}"
        headers = {}
        for line in iter(file.readline, b"\r\n"):
            assert line.endswith(b"\r\n"), f"half an answer: {line!r}"
            name, _, value = line.partition(b":")
            headers[name.lower()] = value.strip()
        status = int(words[1])
        if status != 100:
            found.append(Answer(status, read_body(file, status, headers)))


def read_body(file, status, headers):
    if status == 204:
        return b""
    if b"content-length" in headers:
        return file.read(int(headers[b"content-length"]))
    if b"transfer-encoding" not in headers:
        return file.read()
    pieces = []
    while True:
        size = int(file.readline(), 16)
        pieces.append(file.read(size))
        file.readline()
        if not size:
            return b"".join(pieces)


class Fuzz:
    """One server, and what it must still be after each round."""

    def __init__(self, lab, seed, tokens):
        self.lab, self.tokens = lab, tokens
        self.requests = Requests(seed, tokens)
        if tokens:
            records = [{"Name": role, "Role": role, "Token": token} for role, token in TOKENS.items()]
            lab.write("jobrunner.tokens", json.dumps({"Tokens": records}))
        self.server = self.start()
        self.statuses = {}
        self.answered = 0

    def start(self):
        command = [sys.executable, "-c", PROGRAM, os.path.dirname(HERE), "--bind", "127.0.0.1", "--port", "0"]
        with open(self.lab.path("server.log"), "ab") as log:
            process = subprocess.Popen(command, cwd=self.lab.folder, stdout=subprocess.PIPE, stderr=log)
        self.lab.processes.append(process)
        line = process.stdout.readline().decode()
        assert " at http://" in line, self.lab.log("server.log")
        return Server(process, line.split(" at ")[1].strip(), self.lab.path("jobs.json"))

    def dump(self):
        """{ID: record} of all jobs, each with its bucket."""
        token = b"Authorization: Bearer jr_s\r\n" if self.tokens else b""
        (answer,) = converse(self.server.port, [(b"GET /dump HTTP/1.1\r\n%b\r\n" % token, "", "")])
        assert answer.status == 200, answer.body
        return {
            i: {**job, "Bucket": bucket} for bucket, jobs in json.loads(answer.body).items() for i, job in jobs.items()
        }

    def run(self, count):
        before = self.dump()
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            while self.answered < count:
                made = [self.requests.connection() for _ in range(CONNECTIONS)]
                answers = list(pool.map(lambda one: converse(self.server.port, one), made))
                before = self.check(before, made, answers)
        assert self.server.process.poll() is None
        self.kill_and_load(before)
        log = self.lab.log("server.log")
        assert "Traceback" not in log and "bug" not in log, log[-3000:]

    def check(self, before, made, answers):
        """The queue after a round; it differs from the one before only by what was answered well."""
        came = [answer for found in answers for answer in found]
        self.answered += len(came)
        for answer in came:
            self.statuses[answer.status] = self.statuses.get(answer.status, 0) + 1
            assert answer.status in GOOD, (answer.status, answer.body, made)
            assert answer.status < 400 or isinstance(as_json(answer.body), dict), answer.body
        after = self.dump()
        added = {
            entry["ID"]: entry["Number"] for answer in came if answer.status == 200 for entry in accepted(answer.body)
        }
        new = {job_id: job for job_id, job in after.items() if job_id not in before}
        assert {job["Number"] for job in new.values()} == set(added.values()), (new, added)
        assert set(added) >= {i for i, job in new.items() if job.get("Index") is None}
        assert set(before) <= set(after)
        changed = any(
            answer.status < 300 and path not in READERS
            for one, found in zip(made, answers)
            for answer, (_, _, path) in zip(found, one)
        )
        assert changed or after == before, "refused requests have changed something"
        self.requests.ids += list(added)
        self.requests.learn(came)
        return after

    def kill_and_load(self, before):
        self.server.kill()
        self.server = self.start()
        after = self.dump()
        for jobs in (before, after):
            for job in jobs.values():
                job.pop("Expiry", None)  # leases begin anew
        assert after == before
        assert self.server.stop() == 0


def accepted(body):
    """What an answer says was added."""
    value = as_json(body)
    entries = value if isinstance(value, list) else [value]
    return [
        entry
        for entry in entries
        if isinstance(entry, dict) and {"ID", "Number"} <= set(entry) <= {"ID", "Number", "Array"}
    ]


def fuzz(count, seed, folder):
    """{status: answers} of so many answered requests, half of them to a server with tokens; raises AssertionError."""
    statuses = {}
    for tokens in (False, True):
        os.mkdir(os.path.join(folder, str(tokens)))
        with Lab(os.path.join(folder, str(tokens))) as lab:
            one = Fuzz(lab, seed * 2 + tokens, tokens)
            one.run(count // 2)
        for status, times in one.statuses.items():
            statuses[status] = statuses.get(status, 0) + times
    return statuses


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=20000, help="requests that are answered (default 20000)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="(default: another one each time)")
    options = parser.parse_args()
    print(f"--count {options.count} --seed {options.seed}", flush=True)
    began = time.time()
    with tempfile.TemporaryDirectory() as folder:
        statuses = fuzz(options.count, options.seed, folder)
    print(f"{time.time() - began:.0f} s; answers by status: {dict(sorted(statuses.items()))}")


if __name__ == "__main__":
    main()

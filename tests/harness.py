"""What the tests start and ask: a Lab has a folder, and ends every process it started, by pid.

Nothing here sleeps to wait for a thing: `until` polls with a deadline.  Ports come from the system, all on loopback.
"""

import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PATIENCE = 30  # s until a test gives up waiting; machines are slow and busy

_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def until(condition, what="it to happen", patience=PATIENCE):
    """The first true value of condition(); fails after `patience` seconds."""
    deadline = time.monotonic() + patience
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {patience} s for {what}")
        time.sleep(0.02)


def read(path):
    """What is in a file, "" while there is none; bytes that are no UTF-8 as Python has them in file names."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except OSError:
        return ""


def shell(script, *arguments):
    """The Params of a job that is a piece of sh; the arguments are its $1, $2 ..."""
    return ["sh", "-c", script, "sh", *arguments]


def alive(pid):
    """True if the process exists and is no zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


class FakeServer:
    """What answers a client in this process: `reply` says what, (status, bytes)."""

    def __init__(self):
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self):
                data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                status, body = outer.reply(self.command, self.path, data)
                self.send_response(status)
                if body:
                    self.send_header("Content-Type", "application/json")
                if status != 204:
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = answer

            def log_message(self, *_):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.handle_error = lambda *_: None  # clients here are killed while they listen
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def reply(self, command, path, data):
        raise NotImplementedError


class Server:
    """A running server.py."""

    def __init__(self, process, url, db):
        self.process, self.url, self.db = process, url, db
        self.port = int(url.rsplit(":", 1)[1])

    def fetch(self, path, body=None, method=None, timeout=60):
        """(status, headers, bytes) of a request; body: a value sent as JSON, or bytes sent as they are."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, method=method)
        try:
            with _direct.open(request, timeout=timeout) as answer:
                return answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read()

    def get(self, path, **query):
        """(status, value) of a GET; the value is None when the body is empty."""
        status, _, data = self.fetch(path + ("?" + urllib.parse.urlencode(query) if query else ""))
        return status, json.loads(data) if data else None

    def post(self, path, body):
        """(status, value) of a POST with JSON."""
        status, _, data = self.fetch(path, body)
        return status, json.loads(data) if data else None

    def add(self, *jobs):
        """The numbers of jobs added; each is a record, or a list of Params."""
        status, added = self.post("/add", [job if isinstance(job, dict) else {"Params": job} for job in jobs])
        assert status == 200, added
        return [entry["Number"] for entry in added]

    def queue(self, name, **attributes):
        """Makes a named queue."""
        status, answer = self.post("/queue", {"Name": name, "Action": "create", "Set": attributes})
        assert status == 200, answer
        return answer["Queue"]

    def job(self, name):
        """One job's record, as /job has it."""
        status, job = self.get("/job", id=name)
        assert status == 200, job
        return job

    def over(self, name, patience=PATIENCE):
        """One job's record once it is finished."""
        return until(lambda: (lambda job: job if job["State"] == "F" else None)(self.job(name)), f"job {name} to end", patience)

    def status(self):
        return self.get("/status")[1]

    def kill(self):
        """kill -9."""
        self.process.kill()
        self.process.wait()

    def stop(self):
        """A clean stop (TERM); the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)


class Lab:
    """A folder, and everything that is started in it."""

    def __init__(self, folder):
        self.folder = folder
        self.processes = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        self._end_jobs()
        self._end_what_is_here()

    def _end_what_is_here(self):
        """Ends what jobs started that has left their groups, known from the folder it is in."""
        for name in filter(str.isdigit, os.listdir("/proc")) if os.path.isdir("/proc") else ():
            try:
                folder = os.readlink(f"/proc/{name}/cwd")
                if int(name) != os.getpid() and os.path.commonpath([folder, self.folder]) == self.folder:
                    os.kill(int(name), signal.SIGKILL)
            except (OSError, ValueError):
                pass  # it has ended by itself, or is none of ours

    def _end_jobs(self):
        """Ends the jobs and keepers that clients left behind, known from their spools."""
        for folder, _, names in os.walk(self.folder):
            for name in names:
                path = os.path.join(folder, name)
                try:
                    if name == "log" and os.path.basename(os.path.dirname(folder)) == "jobs":
                        for pid in re.findall(r'"Pid": (\d+)', open(path).read()):
                            if int(pid) > 1:  # what a test has damaged may say anything; the group 1 is everybody
                                os.killpg(int(pid), signal.SIGKILL)
                    elif os.path.basename(folder) == "keepers":
                        os.kill(int(open(path).read()), signal.SIGKILL)
                except (OSError, ValueError, KeyError):
                    pass  # it has ended by itself

    def path(self, *names):
        return os.path.join(self.folder, *names)

    def write(self, name, text):
        """A file in the folder; its path."""
        with open(self.path(name), "w", encoding="utf-8") as file:
            file.write(text)
        return self.path(name)

    def log(self, name):
        """What a program wrote to its log so far."""
        with open(self.path(name), encoding="utf-8", errors="replace") as file:
            return file.read()

    def popen(self, program, *arguments, python=sys.executable, log=None, **kwargs):
        """One of the three programs, started in the folder; what it writes to stderr goes to the file `log`."""
        command = ([python] if isinstance(python, str) else list(python)) + [os.path.join(ROOT, program)]
        kwargs.setdefault("env", {**os.environ, "TMPDIR": self.folder})  # where clients that are killed leave folders
        err = open(self.path(log or program + ".log"), "ab")
        process = subprocess.Popen(command + [str(a) for a in arguments], cwd=self.folder, stderr=err, **kwargs)
        err.close()
        self.processes.append(process)
        return process

    def server(self, *arguments, db="jobs.json", port=0, python=sys.executable, **kwargs):
        """A running server on a free port."""
        fixed = ("--bind", "127.0.0.1", "--port", port, "--db", db)
        process = self.popen("server.py", *fixed, *arguments, python=python, stdout=subprocess.PIPE, **kwargs)
        line = process.stdout.readline().decode()
        assert " at http://" in line, (line, self.log("server.py.log"))
        return Server(process, line.split(" at ")[1].strip(), self.path(db))

    def client(self, server, *arguments, max_jobs=2, python=sys.executable, **kwargs):
        """A running client."""
        url = server if isinstance(server, str) else server.url
        fixed = ("--server", url, "--max-jobs", max_jobs)
        return self.popen("client.py", *fixed, *arguments, python=python, stdout=subprocess.DEVNULL, **kwargs)

    def command(self, *arguments, server=None, stdin=None, python=sys.executable, timeout=120, env=None):
        """(exit code, stdout, stderr) of `jobrunner.py ...`."""
        environment = {**os.environ, **({"JOBRUNNER_SERVER": server.url} if server else {}), **(env or {})}
        done = subprocess.run(
            ([python] if isinstance(python, str) else list(python))
            + [os.path.join(ROOT, "jobrunner.py")]
            + [str(a) for a in arguments],
            cwd=self.folder,
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            encoding="utf-8",
            errors="surrogateescape",
            timeout=timeout,
        )
        return done.returncode, done.stdout, done.stderr

"""Clients and servers that are killed at random moments, again and again, under jobs that count their runs: each ends
once with its true exit status, and nothing is left.  What waits in the spool gets through whoever comes back first.

More rounds by hand, or those of a seed that failed:  python3 tests/test_restarts.py ROUNDS SEED
"""

import concurrent.futures
import contextlib
import http.server
import itertools
import json
import os
import random
import re
import signal
import sys
import tempfile
import threading
import time

import pytest

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), HERE]

from harness import Lab, PATIENCE, alive, read, shell, until  # noqa: E402
import test_windows as on_windows  # noqa: E402

JOBS = 8  # at once
linux_only = pytest.mark.skipif(os.name == "nt", reason="signals, sh and /proc: Windows has a test of its own")


def bearing(word):
    """The processes that have this text in their command line, zombies left out."""
    return {pid: line for pid, line in on_windows.bearing(word).items() if alive(pid)}


# ---------------------------------------------------------------------------------------------------------------------
# Storms
# ---------------------------------------------------------------------------------------------------------------------

# Its end is written by itself as well, so a run that was cut off is seen, and one that was begun twice.
COUNTED = 'echo start >>"$1"; sleep "$2"; echo end >>"$1"; [ "$3" -lt 256 ] || kill -$(($3 - 256)) $$; exit "$3"'
KILLS = (signal.SIGKILL,) * 4 + (signal.SIGINT, signal.SIGTERM)


class Storm:
    """One server and one spool that go on through all rounds, while what uses them is killed and started again."""

    flags = ("--kill-delay", "0.5")
    codes = (0, 0, 1, 3, 127, 255, 256 + 9, 256 + 15)
    slower = 1  # so many times longer takes everything

    def __init__(self, lab, seed):
        self.lab, self.seed, self.chance = lab, seed, random.Random(seed)
        self.server = lab.server()
        self.client = self.start_client()
        self.jobs = {}  # number: (file, exit status)

    def words(self, *more):
        """What to say when something is wrong."""
        return (f"seed {self.seed}, round {len(self.jobs) // JOBS}", *more)

    def shown(self, path):
        """A path as the jobs' system writes it."""
        return path

    def start_client(self):
        return self.lab.client(self.server, *self.flags, max_jobs=JOBS)

    def params(self, path, seconds, code):
        return shell(COUNTED, path, f"{seconds:.2f}", str(code))

    def stop_client(self):
        self.client.send_signal(self.chance.choice(KILLS))
        self.client.wait(PATIENCE)

    def round(self):
        """Eight jobs run while client and server are killed and started again: all end well."""
        chance, slower = self.chance, self.slower
        plans = [(self.lab.path(f"job-{len(self.jobs) + i}"), chance.choice(self.codes)) for i in range(JOBS)]
        records = [{"Params": self.params(path, chance.uniform(0.2, 1.4) * slower, code)} for path, code in plans]
        new = dict(zip(self.server.add(*records), plans))
        self.jobs.update(new)
        moments = [(chance.uniform(0, 1.2) * slower, self.restart_client) for _ in range(chance.choice([1, 1, 2]))]
        moments += [(chance.uniform(0, 1.2) * slower, self.restart_server) for _ in range(chance.choice([0, 0, 1]))]
        began = time.monotonic()
        for moment, restart in sorted(moments, key=lambda pair: pair[0]):
            time.sleep(max(0.0, began + moment - time.monotonic()))
            restart()
        for number, (path, code) in new.items():
            job = self.over(number)
            got, wanted = (job["Status"], job["ExitStatus"]), ("failed" if code else "finished", code)
            assert got == wanted, self.words(job, read(path))
            assert read(path) == "start\nend\n", self.words(job, read(path))

    def over(self, number):
        try:
            return self.server.over(number)
        except AssertionError as error:
            raise AssertionError(self.words(str(error), self.server.job(number))) from None

    def restart_client(self):
        self.stop_client()
        time.sleep(self.chance.choice([0, 0, 0.05, 0.3]))
        self.client = self.start_client()

    def restart_server(self):
        self.server.process.send_signal(self.chance.choice(KILLS))
        self.server.process.wait(PATIENCE)
        time.sleep(self.chance.choice([0, 0, 0.05, 0.3]))
        self.server = self.lab.server(port=self.server.port)

    def check_nothing_is_left(self):
        """After the last round: no job, no keeper but one, nothing in the spool, and no job that ran again later."""
        spool, ours = self.lab.path("jobrunner-spool"), self.shown(self.lab.path("job-"))
        until(lambda: not os.listdir(os.path.join(spool, "jobs")), self.words("the spool to be empty"))
        until(lambda: len(os.listdir(os.path.join(spool, "keepers"))) == 1, self.words("the old keepers to end"))
        assert not bearing(ours), self.words(bearing(ours))
        states = self.server.status()["States"]
        assert {state: n for state, n in states.items() if n} == {"F": len(self.jobs)}, self.words(states)
        for number, (path, _) in self.jobs.items():
            assert read(path) == "start\nend\n", self.words(number, read(path))
        said = self.lab.log("client.py.log") + self.lab.log("server.py.log")
        said = re.sub(
            r"Traceback .*\n(?:[ \t].*\n|\n)*.*\n\n(?:During|The above).*\n\n", "", said
        )  # the last one counts
        ends = re.findall(r"Traceback .*\n(?:[ \t].*\n|\n)*(.*)", said)
        # Ctrl-C before there is a handler: while Python itself starts
        assert all(end.startswith("KeyboardInterrupt") for end in ends) and ".bug" not in said, self.words(
            ends, said[-3000:]
        )


def weather(folder, seed, rounds):
    with Lab(folder) as lab:
        storm = Storm(lab, seed)
        for _ in range(rounds):
            storm.round()
        storm.check_nothing_is_left()


def storms(folder, seed, rounds, at_once=3):
    """So many rounds, a few side by side, since they mostly wait."""
    folders = [os.path.join(folder, str(i)) for i in range(at_once)]
    shares = [rounds // at_once + (i < rounds % at_once) for i in range(at_once)]
    for path in folders:
        os.makedirs(path)
    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        # all of them end before the first failure is told
        futures = [pool.submit(weather, *words) for words in zip(folders, itertools.count(seed), shares)]
    for future in futures:
        future.result()


@linux_only
def test_in_50_rounds_of_kills_every_job_ends_once_with_its_true_exit_status_and_nothing_is_left(tmp_path):
    storms(str(tmp_path), seed=random.randrange(10**6), rounds=50)


# ---------------------------------------------------------------------------------------------------------------------
# Reports that wait
# ---------------------------------------------------------------------------------------------------------------------

WAITS = 'echo start >>"$1"; until [ -e "$1.go" ]; do sleep 0.05; done; echo end >>"$1"; exit "$2"'


def runs(lab):
    """{what is in a run's log: its folder}, in no order."""
    path = lab.path("jobrunner-spool", "jobs")
    folders = [os.path.join(path, name) for name in os.listdir(path)]
    return {read(os.path.join(folder, "log")): folder for folder in folders}


def waiting(lab):
    """How many runs in the spool are over."""
    return sum('"ExitStatus"' in text for text in runs(lab))


def noted_or_told(lab, server, path, number):
    """True once the end of the job that waits for path.go is in its log, or has come to the server."""
    log = "".join(text for text in runs(lab) if path in text)
    told = server.process.poll() is None and server.job(number)["State"] == "F"
    return '"ExitStatus"' in log or told


ORDERS = sorted(
    {
        order
        for order in itertools.permutations(["-server", "-client", "+server", "+client"])
        if all(order.index("-" + who) < order.index("+" + who) for who in ("server", "client"))
    }
)


def back_in_order(order, folder):
    """Client and server go and come in that order, and after each step a job ends; all are told as they were."""
    with Lab(folder) as lab:
        server, client = lab.server(), None
        client = lab.client(server, max_jobs=JOBS)
        plans = [(lab.path(f"job-{i}"), code) for i, code in enumerate((3, 0, 265, 7, 1))]
        script = WAITS.replace('exit "$2"', '[ "$2" -lt 256 ] || kill -9 $$; exit "$2"')
        numbers = server.add(*[shell(script, path, str(code)) for path, code in plans])
        until(lambda: all(read(path) for path, _ in plans), "all to run")
        for step, (path, _), number in zip(order + ("",), plans, numbers):
            if step == "-server":
                server.kill()
            elif step == "-client":
                client.kill()
                client.wait()
            elif step == "+server":
                server = lab.server(port=server.port)
            elif step == "+client":
                client = lab.client(server, max_jobs=JOBS)
            lab.write(os.path.basename(path) + ".go", "")
            until(lambda: noted_or_told(lab, server, path, number), f"{order}: job {number} to end after {step}")
        for number, (path, code) in zip(numbers, plans):
            job = server.over(number)
            assert (job["ExitStatus"], job["RunCount"]) == (code, 1), (order, job)
            assert read(path) == "start\nend\n", (order, job)
        until(lambda: not runs(lab), "the spool to be empty")


@linux_only
def test_reports_get_through_whichever_of_client_and_server_goes_and_comes_first(tmp_path):
    folders = [str(tmp_path / str(i)) for i in range(len(ORDERS))]
    for folder in folders:
        os.mkdir(folder)
    assert len(ORDERS) == 6
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        list(pool.map(back_in_order, ORDERS, folders))


class Notary(http.server.BaseHTTPRequestHandler):
    """A server that knows no job, and writes down the reports it is sent in the order they come."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer({})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        reports = body.get("Reports", []) if isinstance(body, dict) else body
        self.server.reports.extend(report["ID"] for report in reports)
        if self.path == "/request":
            # taken: the client waits half a second, or it would ask without end
            threading.Event().wait(0 if reports else 0.5)
            return self.answer({"Jobs": [], "Signals": [], "Reported": len(reports)})
        self.answer([{"ID": report["ID"]} for report in reports])

    def answer(self, value):
        data = json.dumps(value).encode()
        with contextlib.suppress(OSError):  # the client may be gone
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)


@linux_only
@pytest.mark.parametrize("restarted", [False, True], ids=["the client goes on", "the client is killed"])
def test_reports_wait_in_the_order_in_which_the_jobs_ended(lab, restarted):
    server = lab.server()
    client = lab.client(server, max_jobs=JOBS)
    paths = [lab.path(f"job-{i}") for i in range(JOBS)]
    numbers = server.add(*[shell(WAITS, path, "0") for path in paths])
    until(lambda: all(map(read, paths)), "all to run")
    ids = [server.job(number)["ID"] for number in numbers]
    server.kill()
    for i in range(JOBS):
        lab.write(f"job-{i}.go", "")
        until(lambda: waiting(lab) == i + 1, f"job {i} to end")
    if restarted:
        client.kill()
        client.wait()
    with http.server.ThreadingHTTPServer(("127.0.0.1", server.port), Notary) as notary:
        notary.reports = []
        threading.Thread(target=notary.serve_forever, daemon=True).start()
        if restarted:
            lab.client(server, max_jobs=JOBS)
        try:
            until(lambda: len(notary.reports) >= JOBS and not runs(lab), "the reports")
        finally:
            notary.shutdown()
    assert notary.reports == ids


# ---------------------------------------------------------------------------------------------------------------------
# Windows
# ---------------------------------------------------------------------------------------------------------------------

STEPS = """if True:
    import sys, time
    say = lambda word: open(sys.argv[1], "a", newline="").write(word + "\\n")
    say("start"); time.sleep(float(sys.argv[2])); say("end"); sys.exit(int(sys.argv[3]))"""


class WindowsStorm(Storm):
    """The client and its jobs are Windows programs, killed as Linux kills and as Windows does; the server is ours."""

    codes = (0, 3, 255, 0xC0000005, 0xFFFFFFFF)
    slower = 3

    def __init__(self, lab, desktop, seed):
        self.desktop = desktop
        super().__init__(lab, seed)

    def shown(self, path):
        return on_windows.native(path, "windows")

    def start_client(self):
        python = on_windows.python_of(self.chance.choice(["3.8", "3.13"]))
        return self.desktop.client(self.server, *self.flags, max_jobs=JOBS, python=python, log="client.py.log")

    def params(self, path, seconds, code):
        signed = str(code - (1 << 32) if code >> 31 else code)  # as sys.exit takes it
        return [on_windows.EXE["3.8"], "-S", "-E", "-c", STEPS, self.shown(path), f"{seconds:.2f}", signed]

    def stop_client(self):
        owner = read(self.lab.path("jobrunner-spool", "lock")).strip()
        if owner and self.chance.random() < 0.5:
            with contextlib.suppress(AssertionError):  # it may have no lock yet, and the number be an earlier one's
                on_windows.taskkill(owner, self.lab.folder)
        on_windows.end(self.client)


@pytest.fixture(scope="module")
def windows(tmp_path_factory):
    """Windows, up for as long as the tests take, and the names of its Pythons."""
    folder, booted = tmp_path_factory.mktemp("boot"), []
    try:
        for version in ("3.8", "3.13"):
            process, on_windows.EXE[version] = on_windows.boot(version, folder)
            booted.append(process)
        yield
    finally:
        for process in booted:
            on_windows.end(process)


def test_on_windows_too_every_job_ends_once_with_its_true_exit_status_and_nothing_is_left(windows, tmp_path):
    with Lab(str(tmp_path)) as lab, on_windows.WindowsLab(str(tmp_path)) as desktop:
        storm = WindowsStorm(lab, desktop, random.randrange(10**6))
        for _ in range(4):
            storm.round()
        storm.check_nothing_is_left()


if __name__ == "__main__":
    ROUNDS, SEED = (int(word) for word in sys.argv[1:3])
    with tempfile.TemporaryDirectory() as place:
        storms(place, SEED, ROUNDS)
    print(f"{ROUNDS} rounds of {JOBS} jobs: each ended once with its true exit status")

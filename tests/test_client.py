"""The client with real jobs: how they end, what they are given, limits, outputs, restarts of everything, stopping,
the original's flags and the original's server.

Two clients are shared by the tests that leave them as they were: `shop`, and `limits`, whose slow jobs all run at once.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.parse

import pytest

from harness import FakeServer, Lab, PATIENCE, ROOT, alive, read, shell, until
from jobrunner import parse_time

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals, sh and /proc: Windows has a file of its own")

TAIL = 64 * 1024
ARGV = "import json, sys; print(json.dumps(sys.argv[1:]))"


def python(code, *arguments):
    """The Params of a job that is a piece of Python."""
    return [sys.executable, "-S", "-E", "-c", code, *arguments]


def pids(path):
    """The process numbers a job wrote to a file, once its line is whole."""
    return [int(word) for word in until(lambda: read(path).endswith("\n") and read(path), path).split()]


def gone(numbers):
    """True once none of the processes is there."""
    return until(lambda: not any(map(alive, numbers)), f"{numbers} to be gone")


def qcat(server, number, *options):
    """What qcat prints, byte for byte."""
    program = [sys.executable, os.path.join(ROOT, "jobrunner.py")]
    command = [*program, "qcat", "--server", server.url, *options, str(number)]
    return subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=60).stdout


def overlap(jobs):
    """The most jobs that ran at one moment, by their StartTime and EndTime."""
    starts, ends = [job["StartTime"] for job in jobs], [job["EndTime"] for job in jobs]
    return max(sum(s <= moment < e for s, e in zip(starts, ends)) for moment in starts)


def folders(lab, spool="jobrunner-spool"):
    """The folders in a spool, by what stands before the dot: the job's ID."""
    path = lab.path(spool, "jobs")
    return {name.split(".")[0]: os.path.join(path, name) for name in os.listdir(path)} if os.path.isdir(path) else {}


def noted(lab, key):
    """How many folders in the spool hold a certain key, in whichever of their files."""
    files = ([os.path.join(folder, name) for name in os.listdir(folder)] for folder in folders(lab).values())
    return sum(any(f'"{key}"' in read(path) for path in paths) for paths in files)


def keeper(lab):
    """The process of the one keeper in the default spool."""
    path = lab.path("jobrunner-spool", "keepers")
    names = lambda: os.listdir(path) if os.path.isdir(path) else []  # noqa: E731
    (number,) = until(lambda: list(filter(str.strip, (read(os.path.join(path, n)) for n in names()))), "a keeper")
    return int(number)


def over(server, number):
    """A job's record if it is finished."""
    job = server.job(number)
    return job if job["State"] == "F" else None


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Shop:
    """A lab with one server and one client that many tests use."""

    def __init__(self, lab, *flags, max_jobs):
        self.lab, self.server = lab, lab.server("--offline-after", 0)
        self.client = lab.client(self.server, *flags, max_jobs=max_jobs)

    def run(self, params, **record):
        """The finished record of one job."""
        (number,) = self.server.add({"Params": params, **record})
        return self.server.over(number)

    def output(self, params, **record):
        """What a job that finished printed."""
        job = self.run(params, **record)
        assert job["Status"] == "finished", job
        return self.server.get("/output", id=job["ID"])[1]["StdOut"]


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    with Lab(str(tmp_path_factory.mktemp("shop"))) as lab:
        yield Shop(lab, "--hostname", "shop", max_jobs=3)


# ---------------------------------------------------------------------------------------------------------------------
# How many at once, how they end
# ---------------------------------------------------------------------------------------------------------------------


def test_six_jobs_of_a_second_with_two_slots_all_finish_and_never_more_than_two_run(lab):
    server = lab.server()
    numbers = server.add(*[["sleep", "1"]] * 6)
    lab.client(server, max_jobs=2)
    jobs = [server.over(number) for number in numbers]
    assert [(job["Status"], job["ExitStatus"], job["RunCount"]) for job in jobs] == [("finished", 0, 1)] * 6
    assert overlap(jobs) == 2
    assert [job["StartTime"] for job in jobs] == sorted(job["StartTime"] for job in jobs)  # first in, first out


def test_a_job_takes_as_many_slots_as_its_ncpus(lab):
    server = lab.server()
    numbers = server.add(*[{"Params": ["sleep", "0.3"], "Ncpus": 2}] * 3)
    lab.client(server, max_jobs=3)
    assert overlap([server.over(number, patience=10) for number in numbers]) == 1


@pytest.mark.parametrize("script, status, exit_status", [
    ("exit 0", "finished", 0),
    ("exit 3", "failed", 3),
    ("exit 255", "failed", 255),
    ("kill -9 $$", "failed", 256 + 9),
    ("kill -TERM $$", "failed", 256 + 15),
    ("kill -SEGV $$", "failed", 256 + 11),
])  # fmt: skip
def test_a_jobs_exit_status_is_its_own_or_256_and_its_signal(shop, script, status, exit_status):
    job = shop.run(shell(script))
    assert (job["Status"], job["ExitStatus"], job["State"], job["Host"]) == (status, exit_status, "F", "shop")


@pytest.mark.parametrize("record, exit_status, words", [
    ({"Params": ["no-such-program", "x"]}, -8, ["no-such-program", "No such file"]),
    ({"Params": ["/etc/passwd"]}, -8, ["/etc/passwd", "Permission denied"]),
    ({"Params": ["{folder}"]}, -8, ["{folder}", "Permission denied"]),
    ({"Params": ["{folder}/not-a-program"]}, -8, ["{folder}/not-a-program", "Exec format"]),
    ({"Params": ["true", "x" * 200_000]}, -8, ["true", "too long"]),
    ({"Params": ["true"], "WorkDir": "/no/such/folder"}, -8, ["/no/such/folder", "No such file"]),
    ({"Params": ["true"], "WorkDir": "/etc/passwd"}, -8, ["/etc/passwd", "Not a directory"]),
    ({"Params": ["true"], "StdOut": "/no/such/folder/out"}, -9, ["/no/such/folder/out", "No such file"]),
    ({"Params": ["true"], "StdErr": "/no/such/folder/"}, -9, ["/no/such/folder/true.e", "No such file"]),
    ({"Params": ["true"], "StdOut": "x" * 300}, -9, ["xxx", "too long"]),
], ids=lambda value: str(value)[:40])  # fmt: skip
def test_a_job_that_cannot_be_started_has_failed_and_its_comment_names_the_file_and_the_error(
    shop, record, exit_status, words
):
    folder = shop.lab.path()
    path = shop.lab.write("not-a-program", "\0\0\0")
    os.chmod(path, 0o755)
    here = [word.replace("{folder}", folder.rstrip("/")) for word in record["Params"]]
    job = shop.run(**{"params": here, **{key: value for key, value in record.items() if key != "Params"}})
    assert (job["Status"], job["ExitStatus"]) == ("failed", exit_status)
    for word in words:
        assert word.replace("{folder}", folder.rstrip("/")) in job["Comment"]
    assert "\n" not in job["Comment"]
    assert shop.run(["true"])["Status"] == "finished"  # the client lives on


def test_commands_of_any_length_keep_client_and_keeper_from_nothing(lab):
    server = lab.server("--offline-after", 0)
    numbers = server.add(*[["x" * 200_000]] * 20, ["true"])
    lab.client(server, max_jobs=10)
    assert server.over(numbers[-1])["Status"] == "finished"
    job = server.over(numbers[0])
    assert job["ExitStatus"] == -8 and job["Comment"].endswith("File name too long") and len(job["Comment"]) < 700


# ---------------------------------------------------------------------------------------------------------------------
# What a job is given
# ---------------------------------------------------------------------------------------------------------------------

WORDS = [
    "", "two words", "  ", "'", '"', '\\"', "a;b", "a&&b", "a|b", "$HOME", "`id`", "$(id)", "*", "%PATH%", "^", "<x>",
    "line\nline\r\n", "\t", "\x01\x7f", "é ü ß", "日本語", "😀", "\u2028", "--", "-c", "{index}", "x" * 10_000,
    "",
]  # fmt: skip


def test_params_come_through_to_the_letter(shop):
    assert json.loads(shop.output(python(ARGV, *WORDS))) == WORDS


def test_bytes_that_are_no_utf8_come_through_to_the_letter(shop):
    code = "import os, sys; print(os.fsencode(sys.argv[1]).hex(), os.environb[b'RAW'].hex())"
    name = b"caf\xe9\xff".decode("utf-8", "surrogateescape")
    assert shop.output(python(code, name), Env={"RAW": name}).split() == [b"caf\xe9\xff".hex()] * 2


SURROGATE = "\ud800x"


def test_half_a_surrogate_pair_ends_neither_client_nor_keeper(lab):
    server = lab.server("--offline-after", 0)
    client = lab.client(server)
    before = keeper(lab)
    for record, wanted in (
        ({"Params": ["true"], "Name": SURROGATE}, [0]),
        ({"Params": ["echo", SURROGATE]}, [-8]),
        ({"Params": [SURROGATE]}, [-8]),
        ({"Params": ["true"], "Env": {"A": SURROGATE}}, [-8]),
        ({"Params": ["true"], "Env": {SURROGATE: "a"}}, [-8]),
        ({"Params": ["true"], "WorkDir": SURROGATE}, [-8, -9]),
        ({"Params": ["true"], "StdOut": SURROGATE}, [-9]),
        ({"Params": ["true"], "StdErr": SURROGATE}, [-9]),
    ):
        (number,) = server.add(record)
        job = until(lambda: over(server, number) or client.poll() is not None)  # noqa: B023
        assert client.poll() is None and alive(before), (record, lab.log("client.py.log"))
        assert job["ExitStatus"] in wanted and job["RunCount"] == 1, (record, job)
    assert server.over(*server.add(["true"]))["Status"] == "finished"


def test_a_job_gets_its_env_on_top_of_the_clients_its_workdir_and_nothing_on_standard_input(shop, tmp_path):
    code = """if True:
        import json, os, sys
        print(json.dumps([os.getcwd(), os.environ["A"], "PATH" in os.environ, sys.stdin.read()]))"""
    printed = json.loads(shop.output(python(code), Env={"A": "b  $c"}, WorkDir=str(tmp_path)))
    assert printed == [os.path.realpath(tmp_path), "b  $c", True, ""]


def test_a_job_without_workdir_runs_where_its_client_was_started(shop):
    assert shop.output(["pwd"]).strip() == os.path.realpath(shop.lab.path())


def test_outputs_go_to_the_files_a_job_names_and_relative_ones_are_in_its_workdir(shop, tmp_path):
    script, absolute = "echo out; echo err >&2", str(tmp_path / "errors")
    job = shop.run(shell(script), WorkDir=str(tmp_path), StdOut="out put", StdErr=absolute)
    assert ((tmp_path / "out put").read_text(), (tmp_path / "errors").read_text()) == ("out\n", "err\n")
    assert (qcat(shop.server, job["Number"]), qcat(shop.server, job["Number"], "-e")) == (b"out\n", b"err\n")


def test_one_file_for_both_outputs_holds_both(shop, tmp_path):
    both = str(tmp_path / "both")
    shop.run(shell("echo out; echo err >&2; echo out"), StdOut=both, StdErr=both)
    assert read(both) == "out\nerr\nout\n"


@pytest.mark.parametrize("join, record, named", [
    ("oe", {}, ".o"), ("eo", {}, ".e"), ("oe", {"StdOut": "one", "StdErr": "/no/such/folder/x"}, "one"),
    ("eo", {"StdOut": "one", "StdErr": "two"}, "two"),
])  # fmt: skip
def test_joined_outputs_are_both_in_the_one_file_and_told_once(shop, tmp_path, join, record, named):
    job = shop.run(shell("echo out; echo err >&2; echo out"), Join=join, WorkDir=str(tmp_path), **record)
    number = job["Number"]
    path = os.path.join(tmp_path, named) if record else shop.lab.path("jobrunner-spool", "output", f"sh{named}{number}")
    assert read(path) == "out\nerr\nout\n"
    assert os.listdir(tmp_path) == ([named] if record else [])
    assert (qcat(shop.server, number), qcat(shop.server, number, "-e")) == (b"out\nerr\nout\n", b"")


def test_pbs_variables_in_the_path_of_an_output_are_the_jobs_own(shop, tmp_path):
    record = {"WorkDir": str(tmp_path), "Name": "sweep", "StdErr": "${PBS_JOBNAME}$PBS_NONE$HOME"}
    job = shop.run(shell("echo out; echo err >&2"), StdOut="o.$PBS_JOBID.txt", **record)
    assert sorted(os.listdir(tmp_path)) == sorted([f"o.{job['Number']}.txt", "sweep$PBS_NONE$HOME"])
    assert qcat(shop.server, job["Number"]) == b"out\n"


def test_a_folder_for_the_outputs_of_an_array_needs_no_slash(shop, tmp_path):
    (tmp_path / "logs").mkdir()
    record = {"Params": shell("echo $PBS_ARRAYID"), "Array": "3-4", "StdOut": str(tmp_path / "logs")}
    (number,) = shop.server.add(record)
    for index in (3, 4):
        shop.server.over(f"{number}[{index}]")
        assert read(tmp_path / "logs" / f"sh.o{number}.{index}") == f"{index}\n"


def test_an_output_that_is_a_folder_gets_a_file_with_the_jobs_name_and_number(shop, tmp_path):
    (tmp_path / "there").mkdir()
    record = {"WorkDir": str(tmp_path), "Name": "my/job"}
    job = shop.run(shell("echo out; echo err >&2"), StdOut="there/", StdErr=str(tmp_path / "there"), **record)
    assert sorted(os.listdir(tmp_path / "there")) == [f"my_job.{letter}{job['Number']}" for letter in "eo"]
    assert (qcat(shop.server, job["Number"]), qcat(shop.server, job["Number"], "-e")) == (b"out\n", b"err\n")


def test_subjobs_have_outputs_of_their_own_and_those_they_name_to_the_letter(shop, tmp_path):
    record = {"Params": shell('echo "$1"', "{index}"), "Array": "1-2", "StdErr": f"{tmp_path}/e{{index}}"}
    (number,) = shop.server.add(record)
    for index in "12":
        assert shop.server.over(f"{number}[{index}]")["Status"] == "finished"
        assert read(shop.lab.path("jobrunner-spool", "output", f"sh.o{number}.{index}")) == index + "\n"
    assert sorted(os.listdir(tmp_path)) == ["e1", "e2"]


def test_an_output_to_dev_null_is_nowhere_and_one_to_a_pipe_is_not_waited_for(shop, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    job = shop.run(shell("echo out; echo err >&2"), StdOut="/dev/null", StdErr=str(tmp_path / "pipe"))
    assert (job["Status"], os.read(reader, 100)) == ("finished", b"err\n")
    os.close(reader)
    assert (qcat(shop.server, job["Number"]), qcat(shop.server, job["Number"], "-e")) == (b"", b"")


@pytest.mark.parametrize("place", ["/dev/stdout", "/dev/fd/0"])
def test_an_output_is_not_what_the_client_and_its_keeper_talk_over(shop, place):
    job = shop.run(shell("echo 5; printf x"), StdOut=place)
    assert (job["Status"], job["ExitStatus"]) == ("failed", -9) and f"cannot open {place}: " in job["Comment"]
    assert shop.client.poll() is None and shop.run(["true"])["Status"] == "finished"


def test_outputs_without_a_name_are_whole_in_the_spool_under_the_jobs_name_and_number(shop):
    job = shop.run(shell("seq 100000"), Name="my/job")
    (name,) = [n for n in os.listdir(shop.lab.path("jobrunner-spool", "output")) if n.endswith(f".o{job['Number']}")]
    assert read(shop.lab.path("jobrunner-spool", "output", name)) == "".join(f"{n}\n" for n in range(1, 100001))


def test_of_megabytes_printed_the_server_has_exactly_the_last_64_kib_of_each_byte_for_byte(shop):
    code = """if True:
        import sys
        block = bytes(range(256)) * 4 + "é😀\\r\\n".encode() * 100 + b"\\xed\\xa0\\x80"
        sys.stdout.buffer.write(block * 1500 + b"end")
        sys.stderr.buffer.write(b"\\xff\\n" * 1000000)"""
    printed = (bytes(range(256)) * 4 + "é😀\r\n".encode() * 100 + b"\xed\xa0\x80") * 1500 + b"end"
    job = shop.run(python(code))
    assert len(printed) > 2_000_000
    assert qcat(shop.server, job["Number"]) == printed[-TAIL:]
    assert qcat(shop.server, job["Number"], "-e") == (b"\xff\n" * 1000000)[-TAIL:]


def test_the_spool_folder_is_there_before_the_process_starts_and_gone_after_the_acknowledgement(shop):
    jobs = shop.lab.path("jobrunner-spool", "jobs")
    code = "import os, sys, json; os.chdir(sys.argv[1]); print(json.dumps({n: os.listdir(n) for n in os.listdir()}))"
    job = shop.run(python(code, jobs))
    seen = json.loads(shop.server.get("/output", id=job["ID"])[1]["StdOut"])
    assert seen[f"{job['ID']}.1"]
    until(lambda: not os.listdir(jobs), "the folder to go")


def test_children_are_waited_for_so_no_zombies_gather(shop):
    numbers = shop.server.add(*[["true"]] * 150)
    ps, most = ["ps", "-o", "stat=", "--ppid", str(keeper(shop.lab))], 0

    def children():
        return [stat[:1] for stat in subprocess.run(ps, stdout=subprocess.PIPE, timeout=30).stdout.split()]

    while not over(shop.server, numbers[-1]):
        most = max(most, children().count(b"Z"))
    assert most <= 3  # a job holds its slot until it is waited for
    until(lambda: not children(), "the keeper to have no children")


# ---------------------------------------------------------------------------------------------------------------------
# Limits: all these jobs run at once
# ---------------------------------------------------------------------------------------------------------------------

BUSY = "while True: pass"
BURSTS = """if True:
    import os, sys, time
    while not os.path.exists(sys.argv[1]):  # a second of work, and then some sleep
        begun = time.process_time()
        while time.process_time() < begun + 1.1: pass
        time.sleep(1)"""
BUSY_UNTIL = "import os, sys\nwhile not os.path.exists(sys.argv[1]): pass"
POLITE = """if True:
    import signal, sys, time
    def end(*_):
        time.sleep(0.5)
        open(sys.argv[1], "w").write("saved")
        sys.exit()
    signal.signal(signal.SIGTERM, end)
    open(sys.argv[1], "w").write("ready")
    time.sleep(600)"""
ONE_PYTHON = f"{sys.executable} -S -E -c"


def _limited(path):
    """{name: record}; each job writes its process and its child's to the file it is given."""
    tree = {
        "ignores TERM": 'trap "" TERM; sleep 600 & echo $$ $! >"$1"; wait; sleep 600',
        "its child ignores TERM": '(trap "" TERM; exec sleep 600) & echo $$ $! >"$1"; wait',
        "its child has left the group": 'trap "" TERM; setsid sleep 600 & echo $$ $! >"$1"; wait; sleep 600',
        "its child left and ignores TERM": '(trap "" TERM; exec setsid sleep 600) & echo $$ $! >"$1"; wait',
    }
    jobs = {name: {"Params": shell(script, path(name)), "Runtime": 2} for name, script in tree.items()}
    jobs["child saves"] = {"Params": shell(f"{ONE_PYTHON} '{POLITE}' \"$1\" & sleep 600", path("saved")), "Runtime": 2}
    big = "import time; b = b'x' * (150 << 20); time.sleep(600)"
    for name, code, limit in (("mem", big, {"Memory": 100 << 20}), ("cput", BUSY, {"CpuTime": 1})):
        for where in ("", "setsid "):  # one that has left the group is still in the tree
            script = f'{where}{ONE_PYTHON} "{code}" & echo $$ $! >"$1"; wait'
            jobs[where + name] = {"Params": shell(script, path(where + name)), **limit}
    jobs["dead"] = {"Params": shell(f"{ONE_PYTHON} '{BURSTS}' /; echo $$ >\"$1\"; sleep 600", path("dead"))}
    jobs["busy in a child"] = {"Params": shell(f"{ONE_PYTHON} '{BUSY_UNTIL}' \"$1\" & wait", path("enough"))}
    jobs["bursts"] = {"Params": python(BURSTS, path("enough"))}
    return jobs


@pytest.fixture(scope="module")
def limits(tmp_path_factory):
    """A shop whose client has slots for all of them and looks every second."""
    with Lab(str(tmp_path_factory.mktemp("limits"))) as lab:
        shop = Shop(lab, "--usage-interval", "0.5", "--kill-delay", "1.5", "--dead-after", "0.1", max_jobs=20)
        jobs = _limited(lab.path)
        shop.number = dict(zip(jobs, shop.server.add(*jobs.values())))
        yield shop


@pytest.mark.parametrize("name", [
    "ignores TERM", "its child ignores TERM", "its child has left the group", "its child left and ignores TERM"
])  # fmt: skip
def test_past_its_runtime_a_whole_tree_goes_whoever_in_it_ignores_term(limits, name):
    numbers = pids(limits.lab.path(name))
    job = limits.server.over(limits.number[name])
    assert (job["Status"], job["ExitStatus"]) == ("timeout", -11)
    assert "2 s" in job["Comment"]
    assert len(numbers) == 2 and gone(numbers)


def test_what_a_job_started_has_the_kill_delay_too_when_the_job_itself_ends_at_once(limits):
    """`sh run.sh` dies of TERM at once; the java it started writes its checkpoint meanwhile."""
    assert limits.server.over(limits.number["child saves"])["Status"] == "timeout"
    until(lambda: read(limits.lab.path("saved")) == "saved", "the checkpoint", patience=5)


@pytest.mark.parametrize("name, status, exit_status", [
    ("mem", "memory", -10), ("cput", "cputime", -12), ("setsid mem", "memory", -10), ("setsid cput", "cputime", -12)
])  # fmt: skip
def test_limits_count_the_whole_tree_also_when_the_parent_idles(limits, name, status, exit_status):
    numbers = pids(limits.lab.path(name))
    job = limits.server.over(limits.number[name])
    assert (job["Status"], job["ExitStatus"]) == (status, exit_status)
    assert job["MaxMem"] > 100 << 20 if status == "memory" else job["CpuTimeUsed"] > 1
    assert gone(numbers)


def test_usage_samples_arrive_while_a_job_runs(limits):
    number = limits.number["busy in a child"]
    job = until(lambda: (lambda job: job if any(job.get("CPUUsed") or ()) else None)(limits.server.job(number)))
    assert job["State"] == "R" and job["SampleSeconds"] >= 1
    assert len(job["CPUUsed"]) == len(job["MemUsed"])
    assert 100 <= max(job["CPUUsed"]) <= 30000  # percent of one core x 100; ps tells whole seconds
    assert all(1 << 20 < memory < 1 << 30 for memory in job["MemUsed"][1:])


def test_a_job_that_stops_working_is_dead_one_that_works_in_a_child_or_now_and_then_is_not(limits):
    (number,) = pids(limits.lab.path("dead"))
    job = limits.server.over(limits.number["dead"])
    assert (job["Status"], job["ExitStatus"]) == ("dead", -101)
    assert gone([number])
    others = [limits.number["busy in a child"], limits.number["bursts"]]
    assert [limits.server.job(number)["State"] for number in others] == ["R", "R"]
    limits.lab.write("enough", "")
    assert [limits.server.over(number)["Status"] for number in others] == ["finished"] * 2


# ---------------------------------------------------------------------------------------------------------------------
# Deleted and altered while they run
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script, exit_status", [
    ('echo $$ >"$1"; exec sleep 600', 271),
    ('trap "exit 0" TERM; echo $$ >"$1"; sleep 600 & wait', 271),
    ('trap "exit 7" TERM; echo $$ >"$1"; sleep 600 & wait', 271),
    ('trap "" TERM; echo $$ >"$1"; sleep 600; sleep 600', 265),
], ids=["dies of TERM", "returns 0", "returns 7", "ignores it"])  # fmt: skip
def test_a_deleted_job_has_271_whatever_it_returns_at_term_or_265_if_killed(limits, tmp_path, script, exit_status):
    (number,) = limits.server.add(shell(script, str(tmp_path / "pid")))
    (process,) = pids(str(tmp_path / "pid"))
    assert limits.server.post("/delete", {"IDs": [str(number)]})[0] == 200
    job = limits.server.over(number)
    assert (job["Status"], job["ExitStatus"], job["Comment"]) == ("deleted", exit_status, "deleted while it ran")
    assert gone([process])


def alter(server, number, **changes):
    status, answer = server.post("/alter", {"IDs": [str(number)], "Set": changes})
    assert status == 200, answer


@pytest.mark.parametrize("name, code, limit, exit_status", [
    ("mem", "import time; b = b'x' * (150 << 20); time.sleep(600)", {"Memory": 100 << 20}, -10),
    ("cput", BUSY, {"CpuTime": 1}, -12),
    ("walltime", "import time; time.sleep(600)", {"Runtime": 1}, -11),
])  # fmt: skip
def test_a_limit_that_a_running_job_is_given_holds_at_once(limits, name, code, limit, exit_status):
    (number,) = limits.server.add(python(code))
    until(lambda: limits.server.job(number)["State"] == "R")
    alter(limits.server, number, **limit)
    job = limits.server.over(number)
    assert job["ExitStatus"] == exit_status and "deleted" not in job["Comment"], job


def test_a_walltime_taken_back_or_made_longer_counts_from_the_start_and_holds_for_the_next_client_too(lab):
    server = lab.server()
    client = lab.client(server, max_jobs=3)
    free, longer, shorter = server.add(*[{"Params": ["sleep", "600"], "Runtime": 3}] * 3)
    until(lambda: noted(lab, "Pid") == 3)
    for number, runtime in ((free, 0), (longer, 5), (shorter, 600)):
        alter(server, number, Runtime=runtime)
    until(lambda: lab.log("client.py.log").count("job.alter") == 3, "the client to be told")
    alter(server, shorter, Runtime=4)
    until(lambda: lab.log("client.py.log").count("job.alter") == 4, "the client to be told")
    client.kill()
    client.wait()
    lab.client(server, max_jobs=3, log="second.log")
    for number, seconds in ((shorter, 4), (longer, 5)):
        job = server.over(number)
        assert (job["Status"], job["ExitStatus"]) == ("timeout", -11) and f"{seconds} s" in job["Comment"]
        assert seconds <= elapsed(job) < seconds + 3
    assert server.job(free)["State"] == "R"
    assert "job.alter" not in lab.log("second.log")  # it names the limits it has found, which are the server's


def elapsed(job):
    """Seconds between its StartTime and EndTime."""
    return parse_time(job["EndTime"]) - parse_time(job["StartTime"])


# ---------------------------------------------------------------------------------------------------------------------
# What a client refuses
# ---------------------------------------------------------------------------------------------------------------------


def test_a_command_outside_allow_prefix_is_refused_says_so_and_another_client_takes_it(lab):
    server = lab.server()
    picky = ["--allow-prefix", "echo 'two words'", "--allow-prefix", "true", "--hostname", "picky"]
    lab.client(server, *picky, "--spool", "one")
    fits, other, longer = server.add(["echo", "two words", "x"], ["echo", "two", "words"], ["truer"])
    assert server.over(fits)["Host"] == "picky"
    for number in (other, longer):
        job = until(lambda: (lambda job: job if job.get("Comment") else None)(server.job(number)))
        assert job["State"] == "H" and "picky: runs only" in job["Comment"] and "two words" in job["Comment"]
    lab.client(server, "--hostname", "easy", "--spool", "two")
    assert [server.over(number)["Host"] for number in (other, longer)] == ["easy"] * 2
    assert server.over(other)["Status"] == "finished"


def test_a_client_of_some_queues_runs_nothing_of_the_others(lab):
    server = lab.server()
    for name in ("long", "night", "other"):
        assert server.post("/queue", {"Name": name, "Action": "create"})[0] == 200
    jobs = [{"Params": ["true"], "Queue": name} for name in ("default", "other", "night", "long")]
    numbers = server.add(*jobs)
    flags = ["--queue", "long,night", "--queue", "more", "--until-empty"]
    assert lab.client(server, *flags).wait(PATIENCE) == 0
    assert [server.job(number)["State"] for number in numbers] == ["Q", "Q", "F", "F"]
    assert lab.client(server, "--until-empty").wait(PATIENCE) == 0
    assert {server.job(number)["State"] for number in numbers} == {"F"}


# ---------------------------------------------------------------------------------------------------------------------
# Everything goes away and comes back
# ---------------------------------------------------------------------------------------------------------------------

STEP = 'echo "$1" >>runs; until [ -e "$2" ]; do sleep 0.05; done; exit "$3"'


def test_jobs_go_on_while_the_server_is_away_and_each_is_reported_once(lab):
    server = lab.server()
    lab.client(server, max_jobs=3)
    codes = {"a": "3", "b": "4", "c": "0"}
    numbers = server.add(*[shell(STEP, name, lab.path(name), code) for name, code in codes.items()])
    numbers += server.add(shell(STEP, "d", "/", "0"))  # it waits for a slot
    until(lambda: len(read(lab.path("runs")).split()) == 3)
    ids = [server.job(number)["ID"] for number in numbers]
    server.kill()
    lab.write("a", ""), lab.write("b", "")
    until(lambda: noted(lab, "ExitStatus") == 2, "two to end")
    assert set(folders(lab)) == set(ids[:3])
    server = lab.server(port=server.port)
    lab.write("c", "")
    jobs = [server.over(number) for number in numbers]
    assert [(job["ExitStatus"], job["RunCount"]) for job in jobs] == [(3, 1), (4, 1), (0, 1), (0, 1)]
    assert sorted(read(lab.path("runs")).split()) == ["a", "b", "c", "d"]
    until(lambda: not folders(lab), "the folders to go")


def test_reports_that_are_too_long_for_the_server_come_one_by_one_and_shorter_if_they_must(lab):
    server = lab.server("--max-body", "200kb")
    lab.client(server, max_jobs=3)
    code = "import os, sys; os.write(1, bytes([255]) * 70000 + sys.argv[1].encode()); sys.exit(4)"
    jobs = [server.over(number) for number in server.add(*(python(code, name) for name in "abc"))]
    assert [job["ExitStatus"] for job in jobs] == [4] * 3
    for job, name in zip(jobs, "abc"):
        output = server.get("/output", id=job["ID"])[1]["StdOut"]
        assert 10000 < len(output) < TAIL and output[-2:] == "\udcff" + name
    until(lambda: not folders(lab), "the folders to go")


def test_a_run_that_a_restored_database_counts_once_more_is_ended_and_taken_for_no_other(lab):
    server = lab.server()
    (number,) = server.add(shell(f"echo $$ >>pids; {STEP}", "a", lab.path("go"), "3"))
    assert server.stop() == 0
    before = read(lab.path("jobs.json"))
    server = lab.server(port=server.port)
    lab.client(server, max_jobs=2)
    (first,) = pids(lab.path("pids"))
    server.kill()
    os.remove(lab.path("jobs.json.journal"))
    lab.write("jobs.json", before)
    server = lab.server(port=server.port)
    until(lambda: len(read(lab.path("pids")).split()) == 2, "it to be run again")
    assert gone([first])
    assert server.job(number)["State"] == "R"  # the end of the first is not that of the second
    lab.write("go", "")
    assert server.over(number)["ExitStatus"] == 3
    until(lambda: not folders(lab), "the folders to go")


def test_a_server_that_is_started_on_another_database_by_mistake_ends_nothing_and_no_result_is_lost(lab):
    server = lab.server()
    lab.client(server, "--usage-interval", "1", max_jobs=3)
    numbers = server.add(*[shell(f"echo said; {STEP}", name, lab.path(name), "7") for name in ("a", "b")])
    until(lambda: len(read(lab.path("runs")).split()) == 2, "both to run")
    server.kill()
    other = lab.server(db="other.json", port=server.port)
    lab.write("a", "")
    until(lambda: "report.refused" in lab.log("client.py.log"), "its report to be refused")
    assert other.over(*other.add(["true"]))["Status"] == "finished"
    (node,) = other.get("/nodes")[1]["Nodes"]
    assert "is not in this database" in node["Comment"]
    other.kill()
    server = lab.server(port=server.port)
    lab.write("b", "")
    for number in numbers:
        job = server.over(number)
        assert (job["Status"], job["ExitStatus"], job["RunCount"], qcat(server, number)) == ("failed", 7, 1, b"said\n")
    until(lambda: not folders(lab), "the folders to go")
    assert sorted(read(lab.path("runs")).split()) == ["a", "b"]


def test_a_result_that_the_wrong_server_did_not_want_is_not_lost_where_the_right_one_takes_its_place_unseen(lab):
    server = lab.server()
    client = lab.client(server, max_jobs=1)
    (number,) = server.add(shell(STEP, "a", lab.path("a"), "7"))
    until(lambda: read(lab.path("runs")), "it to run")
    server.kill()
    other = lab.server(db="other.json", port=server.port)
    lab.write("a", "")
    until(lambda: "report.refused" in lab.log("client.py.log"), "its report to be refused")
    until(lambda: "is not in this database" in str(other.get("/nodes")), "the next request")
    client.send_signal(signal.SIGSTOP)  # its machine sleeps
    other.kill()
    server = lab.server(port=server.port)
    client.send_signal(signal.SIGCONT)
    assert server.over(*server.add(["true"]))["Status"] == "finished"
    job = server.over(number)
    assert (job["Status"], job["ExitStatus"], job["RunCount"], read(lab.path("runs"))) == ("failed", 7, 1, "a\n")
    until(lambda: not folders(lab), "the folder to go")


def test_a_client_that_is_to_end_when_nothing_is_left_does_not_wait_for_what_the_server_did_not_want(lab):
    server = lab.server()
    client = lab.client(server, max_jobs=1)
    server.add(shell(STEP, "a", lab.path("a"), "7"))
    until(lambda: read(lab.path("runs")), "it to run")
    server.kill()
    client.kill()
    client.wait()
    other = lab.server(db="other.json", port=server.port)
    lab.write("a", "")
    client = lab.client(other, "--until-empty", max_jobs=1)
    assert client.wait(PATIENCE) == 0
    assert "report.refused" in lab.log("client.py.log") and len(folders(lab)) == 1


def test_a_client_whose_reports_the_server_has_no_room_for_is_heard_and_told_all_the_same(lab):
    server = lab.server()
    lab.client(server, max_jobs=2)
    numbers = server.add(*[shell(f"echo said; {STEP}", name, lab.path(name), "7") for name in ("a", "b")])
    until(lambda: len(read(lab.path("runs")).split()) == 2, "both to run")
    lab.write("jobs.json.output", "")  # no folder, so outputs cannot be kept there
    lab.write("a", "")
    until(lambda: "cannot write" in lab.log("client.py.log"), "its report not to be taken")
    assert server.post("/delete", {"IDs": [str(numbers[1])]})[0] == 200
    until(lambda: "job.end" in lab.log("client.py.log"), "the other to be told to end")
    assert server.job(numbers[0])["State"] == "R"
    os.remove(lab.path("jobs.json.output"))
    jobs = [server.over(number) for number in numbers]
    assert [(job["Status"], job["RunCount"]) for job in jobs] == [("failed", 1), ("deleted", 1)]
    assert (jobs[0]["ExitStatus"], qcat(server, numbers[0])) == (7, b"said\n")


def test_a_client_whose_server_is_not_there_keeps_trying(lab):
    port = free_port()
    client = lab.client(f"127.0.0.1:{port}")
    until(lambda: lab.log("client.py.log").count("server.away"), "the first try")
    assert client.poll() is None and "Traceback" not in lab.log("client.py.log")
    server = lab.server(port=port)
    assert server.over(*server.add(["true"]))["Status"] == "finished"


def test_after_kill_9_a_new_client_on_the_spool_reports_how_jobs_ended_also_meanwhile(lab):
    server = lab.server()
    client = lab.client(server, max_jobs=3)
    numbers = server.add(*[shell(STEP, name, lab.path(name), code) for name, code in (("a", "3"), ("b", "4"))])
    limited = server.add({"Params": shell('echo $$ >"$1"; exec sleep 600', lab.path("pid")), "Runtime": 2})[0]
    until(lambda: len(read(lab.path("runs")).split()) == 2)
    (process,) = pids(lab.path("pid"))
    client.kill()
    client.wait()
    lab.write("a", "")
    until(lambda: noted(lab, "ExitStatus"), "one to end meanwhile")
    lab.client(server, max_jobs=3)
    assert server.over(numbers[0])["ExitStatus"] == 3
    assert server.job(numbers[1])["State"] == "R"
    lab.write("b", "")
    assert server.over(numbers[1])["ExitStatus"] == 4
    late = server.over(limited)
    assert (late["Status"], late["ExitStatus"]) == ("timeout", -11) and gone([process])
    assert sorted(read(lab.path("runs")).split()) == ["a", "b"]
    until(lambda: not folders(lab), "the folders to go")


def test_a_job_its_keeper_was_slow_to_start_is_not_run_twice_when_the_client_is_killed(lab):
    server = lab.server()
    client = lab.client(server)
    server.over(*server.add(["true"]))  # so the keeper has said that it is ready
    old = keeper(lab)
    os.kill(old, signal.SIGSTOP)  # as on a machine that pages
    (number,) = server.add(shell("echo a >>runs"))
    until(lambda: folders(lab), "the job to be handed over")
    client.kill()
    client.wait()
    lab.client(server, log="second.log")
    until(lambda: "job.adopt" in lab.log("second.log"))
    # a bystander that runs meanwhile gives the second client every chance to do it wrong
    assert server.over(*server.add(["true"]))["Status"] == "finished"
    os.kill(old, signal.SIGCONT)
    assert server.over(number)["Status"] == "finished"
    until(lambda: not alive(old), "the first keeper to end")
    assert read(lab.path("runs")) == "a\n"


def test_a_job_that_its_client_was_killed_before_it_ordered_does_not_wait_for_the_keepers_other_jobs(lab):
    server = lab.server()
    client = lab.client(server, max_jobs=1)
    numbers = server.add(shell(STEP, "a", lab.path("go"), "3"), shell("echo b >>runs; exit 4"))
    until(lambda: noted(lab, "Pid"), "the first to run")
    (folder,) = folders(lab).values()
    notes = json.loads(read(os.path.join(folder, "log")).splitlines()[0])
    (job,) = server.post("/request", {"Hostname": "same client", "Slots": 1})[1]["Jobs"]
    made = lab.path("jobrunner-spool", "jobs", f"{job['ID']}.1")
    os.mkdir(made)
    lab.write(os.path.join(made, "log"), json.dumps({**notes, "Job": job}) + "\n")
    client.kill()
    client.wait()
    lab.client(server, max_jobs=2)
    second = server.over(numbers[1])
    assert (second["ExitStatus"], second["RunCount"]) == (4, 2)
    assert server.job(numbers[0])["State"] == "R"
    lab.write("go", "")
    assert server.over(numbers[0])["ExitStatus"] == 3
    assert read(lab.path("runs")).split() == ["a", "b"]


def test_when_the_keeper_is_killed_its_jobs_go_on_and_are_run_again_or_lost_but_never_forgotten(lab):
    server = lab.server()
    client = lab.client(server, max_jobs=6)
    script = 'echo $$ >>"$1"; until [ -e "$1.go" ]; do sleep 0.05; done'
    jobs = {name: {"Params": shell(script, lab.path(name)), "Rerunable": name != "once"} for name in ("once", *"abcd")}
    once, *again = server.add(*jobs.values())
    processes = [pid for name in jobs for pid in pids(lab.path(name))]
    until(lambda: noted(lab, "Pid") == 5)
    os.kill(keeper(lab), signal.SIGKILL)
    until(lambda: "keeper.died" in lab.log("client.py.log"))
    assert all(map(alive, processes)) and client.poll() is None
    for name in jobs:
        lab.write(f"{name}.go", "")
    lost = server.over(once)
    assert (lost["Status"], lost["ExitStatus"], lost["RunCount"]) == ("lost", -103, 1) and "must not run twice" in lost["Comment"]
    reruns = [server.over(number) for number in again]
    assert [(job["Status"], job["ExitStatus"], job["RunCount"]) for job in reruns] == [("finished", 0, 2)] * 4
    assert [len(pids(lab.path(name))) for name in jobs] == [1, 2, 2, 2, 2]


def test_a_second_client_on_the_same_spool_is_refused_with_one_line(lab):
    server = lab.server()
    first = lab.client(server)
    keeper(lab)
    second = lab.client(server, log="second.log")
    assert second.wait(PATIENCE) == 1
    (line,) = lab.log("second.log").splitlines()
    assert line.startswith("client.py: ") and lab.path("jobrunner-spool") in line and str(first.pid) in line
    assert server.over(*server.add(["true"]))["Status"] == "finished"


# ---------------------------------------------------------------------------------------------------------------------
# Stopping
# ---------------------------------------------------------------------------------------------------------------------


def test_ctrl_c_leaves_jobs_running_says_so_and_the_next_client_reports_them(lab):
    server = lab.server()
    client = lab.client(server)
    (number,) = server.add(shell("echo $$ >pid; until [ -e go ]; do sleep 0.05; done; exit 7", "\x1b[2J\n"))
    (process,) = pids(lab.path("pid"))
    until(lambda: noted(lab, "Pid"))
    client.send_signal(signal.SIGINT)
    assert client.wait(PATIENCE) == 0
    assert alive(process)
    said = [line for line in lab.log("client.py.log").splitlines() if line.startswith("client.py: ")]
    assert f"job {number} goes on (process {process})" in said[0] and "again" in said[1] and said[0].isprintable()
    lab.write("go", "")
    lab.client(server)
    assert server.over(number)["ExitStatus"] == 7


def test_with_on_stop_kill_ctrl_c_ends_jobs_and_gives_them_back(lab):
    server = lab.server()
    client = lab.client(server, "--on-stop", "kill", "--kill-delay", "0.5", max_jobs=3)  # and so it asks for a third
    script = 'echo $$ >>"$1"; exec sleep 600', 'trap "" TERM; echo $$ >>"$1"; sleep 600; sleep 600'
    numbers = server.add(*[shell(text, lab.path(f"pid{i}")) for i, text in enumerate(script)])
    pids(lab.path("pid0")), pids(lab.path("pid1"))
    client.send_signal(signal.SIGINT)
    assert client.wait(PATIENCE) == 0
    assert [server.job(number)["State"] for number in numbers] == ["Q", "Q"]
    assert [server.job(number)["RunCount"] for number in numbers] == [1, 1]
    assert all("given back" in server.job(number)["Comment"] for number in numbers)
    assert gone(pids(lab.path("pid0")) + pids(lab.path("pid1")))
    assert "goes on" not in lab.log("client.py.log")


def test_a_client_that_is_stopping_begins_no_job(lab):
    server = lab.server()
    client = lab.client(server, "--on-stop", "kill", "--kill-delay", "1", max_jobs=3)
    server.add(shell('trap "" TERM; echo $$ >pid; sleep 600; sleep 600'))
    pids(lab.path("pid"))
    client.send_signal(signal.SIGINT)
    until(lambda: "status=released" in lab.log("client.py.log"), "it to be stopping")
    (late,) = server.add(["touch", lab.path("late")])
    assert client.wait(PATIENCE) == 0
    assert server.job(late)["State"] == "Q" and not os.path.exists(lab.path("late"))


def test_a_second_ctrl_c_ends_the_client_at_once(lab):
    server = lab.server()
    client = lab.client(server, "--on-stop", "kill", "--kill-delay", "300")
    server.add(shell('trap "" TERM; echo $$ >pid; sleep 600; sleep 600'))
    (process,) = pids(lab.path("pid"))
    client.send_signal(signal.SIGINT)
    until(lambda: "status=released" in lab.log("client.py.log"), "the first to be obeyed")
    client.send_signal(signal.SIGINT)
    assert client.wait(PATIENCE) == 130
    assert "at once" in lab.log("client.py.log").splitlines()[-1] and alive(process)
    os.killpg(process, signal.SIGKILL)


def test_until_empty_ends_when_nothing_is_queued_or_running_for_it(lab):
    server = lab.server()
    numbers = server.add(["true"], shell("sleep 0.5; exit 3"), ["true"], {"Params": ["true"], "Requires": ["gpu"]})
    assert lab.client(server, "--until-empty").wait(PATIENCE) == 0
    assert [server.job(number).get("ExitStatus") for number in numbers] == [0, 3, 0, None]
    assert not folders(lab) and server.job(numbers[3])["State"] == "Q"
    assert lab.client(server, "--until-empty", "--property", "gpu").wait(PATIENCE) == 0
    assert server.job(numbers[3])["ExitStatus"] == 0


# ---------------------------------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------------------------------


def test_the_originals_flags_mean_what_they_meant(lab):
    server = lab.server()
    os.mkdir(lab.path("work"))
    flags = ["-client", "-maxjobs", "2", "-hostname", "x", "-master", server.url, "-safeexpr", "sh -c", "-workdir",
             lab.path("work"), "-minimumcpupercent", "3", "-killdeadprocessafterminutes", "0"]  # fmt: skip
    lab.popen("client.py", *flags, stdout=subprocess.DEVNULL)
    fits, other = server.add(shell("pwd"), ["true"])
    job = server.over(fits)
    assert (job["Status"], job["Host"]) == ("finished", "x")
    assert server.get("/output", id=fits)[1]["StdOut"].strip() == os.path.realpath(lab.path("work"))
    until(lambda: "refused by every client: x" in server.job(other).get("Comment", ""))
    assert server.get("/nodes")[1]["Nodes"][0]["Slots"] == 2


@pytest.mark.parametrize("flags", [
    ["--nonsense"], ["job.jar"], ["--max-jobs", "0"], ["--max-jobs", "two"], ["-maxjobs", "-1"], ["--hostname"],
    ["--server", "http://"], ["--server", "ftp://here"], ["--server", "here:port"], ["--kill-delay", "-1"],
    ["--kill-delay", "nan"],
    ["--dead-after", "1h"], ["--on-stop", "perhaps"], ["--log-level", "loud"],
    ["--allow-prefix", "java -jar 'job.jar"],
    ["--queue", ""], ["--queue", "a,,b"],
    ["--allow-prefix", ""],  # an unset variable in a start script must not allow everything
], ids=" ".join)  # fmt: skip
def test_wrong_flags_end_with_usage_and_exit_code_2(lab, flags):
    client = lab.popen("client.py", "--spool", "s", "--server", "127.0.0.1:1", *flags, stdout=subprocess.PIPE)
    try:
        assert client.wait(10) == 2
    except subprocess.TimeoutExpired:
        pytest.fail(f"it runs with {flags}")
    said = lab.log("client.py.log")
    assert said.startswith("usage: client.py") and "error: " in said.splitlines()[-1] and "Traceback" not in said


@pytest.mark.parametrize("flags", [["--workdir", "/no/such/folder"], ["--spool", "/proc/spool"]], ids=" ".join)
def test_a_folder_that_cannot_be_used_is_one_plain_line(lab, flags):
    client = lab.client("127.0.0.1:1", *flags)
    assert client.wait(PATIENCE) == 1
    (line,) = lab.log("client.py.log").splitlines()
    assert line.startswith("client.py: ") and flags[1] in line


# ---------------------------------------------------------------------------------------------------------------------
# The original's server
# ---------------------------------------------------------------------------------------------------------------------


class Original(FakeServer):
    """An imitation of the original's server, as ORIGINAL.md has it: any method, the query alone, empty answers.

    calls  [(method, path, raw query, {key: value})]
    """

    def __init__(self, *jobs):
        self.waiting = [{"ID": f"81b82367-c5c4-439b-a290-{n:012d}", **job} for n, job in enumerate(jobs)]
        self.leased, self.over, self.calls = {}, {}, []
        super().__init__()

    def reply(self, command, path, data):
        path, _, raw = path.partition("?")
        query = dict(urllib.parse.parse_qsl(raw, keep_blank_values=True))
        self.calls.append((command, path, raw, query))
        return self.answer(path, query)

    def answer(self, path, query):
        if path == "/request":
            if not self.waiting:
                return 204, b""
            job = self.waiting.pop(0)
            self.leased[job["ID"]] = job
            return 200, json.dumps(job).encode()
        if path in ("/finish", "/timeout", "/dead", "/usage"):
            try:
                job_id = json.loads(query["configuration"])["ID"]
                int(query["cpu"]) + int(query["mem"]) if path == "/usage" else None
            except (KeyError, ValueError):
                return 400, b""
            if job_id not in self.leased:
                return 400, b""
            if path != "/usage":
                self.over[self.leased.pop(job_id)["Params"][-1]] = path[1:]
            return 200, b""
        return 404, b""

    def of(self, path):
        return [(method, raw, query) for method, called, raw, query in self.calls if called == path]


@pytest.fixture
def original():
    started = []

    def start(*jobs):
        started.append(Original(*jobs))
        return started[-1]

    yield start
    for server in started:
        server.http.shutdown()
        server.http.server_close()


def test_the_originals_server_is_worked_for_with_exactly_its_own_calls(lab, original):
    jobs = [{"Params": shell("exit 3", "<é & %>"), "Runtime": 60}, {"Params": ["sleep", "60.0"], "Runtime": 2},
            {"Params": ["no-such-program", "x"], "Runtime": 60},
            {"Params": shell("sleep 1.5", "last"), "Runtime": 60}]  # fmt: skip
    server = original(*jobs)
    lab.client(server.url, "--hostname", "test 1", "--usage-interval", "0.5")
    until(lambda: len(server.over) == 4, "all to be reported")
    assert server.over == {"<é & %>": "finish", "60.0": "timeout", "x": "finish", "last": "finish"}
    until(lambda: not folders(lab), "the folders to go")
    assert {path for _, path, _, _ in server.calls} == {"/status", "/request", "/finish", "/timeout", "/usage"}
    for path, keys in {
        "/request": ["hostname"],
        "/finish": ["configuration", "hostname"],
        "/timeout": ["configuration", "hostname"],
        "/usage": ["configuration", "cpu", "hostname", "mem"],
    }.items():
        for method, raw, query in server.of(path):
            assert (method, [pair.split("=")[0] for pair in raw.split("&")]) == ("GET", keys)
            assert query["hostname"] == "test 1"
            if "configuration" in query:
                job = json.loads(query["configuration"])
                assert sorted(job) == ["ID", "Params", "Runtime"]
                assert {"Params": job["Params"], "Runtime": job["Runtime"]} in jobs
    assert int(server.of("/usage")[-1][2]["mem"]) > 0
    assert len(server.of("/finish")) + len(server.of("/timeout")) == 4  # each once


def test_a_server_of_ours_in_the_originals_place_is_told_exit_statuses_and_outputs(lab, original):
    """The client notices nothing of the change: all its slots are taken."""
    script = "echo out; until [ -e gate ]; do sleep 0.05; done; exit 3"
    old = original({"Params": shell(script), "Runtime": 600})
    lab.client(old.url, "--hostname", "here", max_jobs=1)
    until(lambda: noted(lab, "Pid"), "the job to run")
    ((job_id, job),) = old.leased.items()
    times = {"StartTime": "2026-11-23T17:27:00.923836298Z", "Expiry": "2096-11-23T17:38:00.923836354Z"}
    leased = {job_id: {**job, "Host": "here", **times}}
    lab.write("jobs.json", json.dumps({"Available": {}, "Leased": leased, "Finished": {}}))
    new = lab.server()
    old.reply = lambda command, path, data: new.fetch(path, data or None)[::2]
    lab.write("gate", "")
    over = new.over(job_id)
    assert (over["Status"], over["ExitStatus"], qcat(new, job_id)) == ("failed", 3, b"out\n")
    (number,) = new.add({"Params": shell("exit $A"), "Env": {"A": "5"}})
    assert new.over(number)["ExitStatus"] == 5


def test_a_job_never_run_or_given_back_is_not_told_to_the_originals_server_as_finished(lab, original):
    server = original(
        {"Params": ["echo", "refused"], "Runtime": 60},
        {"Params": ["true", "fits"], "Runtime": 60},
        {"Params": ["sleep", "600"], "Runtime": 600},
    )
    flags = ["--allow-prefix", "true", "--allow-prefix", "sleep", "--on-stop", "kill", "--kill-delay", "1"]
    client = lab.client(server.url, *flags, max_jobs=3)
    until(lambda: "fits" in server.over and len(server.leased) >= 1 and not server.waiting)
    until(lambda: noted(lab, "Pid"), "the long one to run")
    client.send_signal(signal.SIGINT)
    client.wait(PATIENCE)
    assert server.over == {"fits": "finish"}  # the others are offered again when their leases end

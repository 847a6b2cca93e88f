"""The user's commands, run as programs against a real server and client: qsub, qstat, qdel, qcat, qwait, pbsnodes,
qterm, run; and what each says when something is wrong.

Most tests share `desk`, a server with one client; a job that must not run needs the property "nowhere".
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types

import pytest

from harness import PATIENCE, ROOT, FakeServer, Lab, alive, until

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the jobs here are sh: Windows has a file of its own")

NOWHERE = {"Requires": ["nowhere"]}


class Desk:
    """A server, a client and somebody who types commands."""

    def __init__(self, lab):
        self.lab, self.server = lab, lab.server("--offline-after", 0)  # jobs here name programs there are not
        self.client = lab.client(self.server, "--hostname", "node07", max_jobs=4)

    def __call__(self, *words, **kwargs):
        """What a command that succeeds prints."""
        code, out, err = self.lab.command(*words, server=self.server, **kwargs)
        assert code == 0, err
        return out

    def fails(self, *words, code=1, **kwargs):
        """The one line that a command that fails says."""
        exit_code, out, err = self.lab.command(*words, server=self.server, **kwargs)
        assert (exit_code, out) == (code, ""), err
        return one_line(err)


def one_line(err):
    (line,) = err.splitlines()
    assert line.startswith("jobrunner: ") and "Traceback" not in err
    return line


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    with Lab(str(tmp_path_factory.mktemp("desk"))) as lab:
        yield Desk(lab)


@pytest.fixture
def queued(desk):
    """Makes queued jobs that no client takes."""
    return lambda **record: desk.server.add({"Params": ["true"], **record, **NOWHERE})[0]


# ---------------------------------------------------------------------------------------------------------------------
# qsub
# ---------------------------------------------------------------------------------------------------------------------


def test_qsub_prints_the_number_and_what_follows_the_dashes_is_the_jobs_to_the_letter(desk):
    words = ["printf", "%s|", "", "-N", "x", "--", "--server", "nowhere", "--help", "two words", "'", '"', "$HOME",
             "a;b|c&", "*", "\\", "line\nline", "é日😀", "{index}"]  # fmt: skip
    number = desk("qsub", "-N", "x y", "-l", "walltime=60", "--", *words).strip()
    job = desk.server.over(number)
    assert (job["Params"], job["Name"], str(job["Number"])) == (words, "x y", number)
    assert desk("qcat", number) == "|".join(words[2:]) + "|"


def test_qsub_takes_bytes_that_are_no_utf8(desk):
    number = desk("qsub", "--", "printf", b"caf\xe9".decode("utf-8", "surrogateescape")).strip()
    assert desk.server.over(number)["Status"] == "finished"
    assert desk("qcat", number).encode("utf-8", "surrogateescape") == b"caf\xe9"


@pytest.mark.parametrize("flags, wanted", [
    ([], {"Name": "prog.sh", "Runtime": 0, "Queue": "default", "Priority": 0}),
    (["-N", "sweep é 1"], {"Name": "sweep é 1"}),
    (["-l", "walltime=1:02:03"], {"Runtime": 3723}),
    (["-l", "walltime=90s"], {"Runtime": 90}),
    (["-l", "walltime=3d,mem=512mb"], {"Runtime": 259200, "Memory": 512 << 20}),
    (["-l", "mem=4gb", "-l", "cput=30m", "-l", "ncpus=2"], {"Memory": 4 << 30, "CpuTime": 1800, "Ncpus": 2}),
    (["-l", "walltime=1:00", "-l", "walltime=2:00"], {"Runtime": 120}),
], ids=" ".join)  # fmt: skip
def test_qsubs_options_are_in_the_record(desk, flags, wanted):
    number = desk("qsub", *flags, "--", "/no/such/prog.sh", "169").strip()
    job = desk.server.over(number)
    assert {key: job.get(key, 0) for key in wanted} == wanted
    assert "@" in job["Owner"] and job["Params"] == ["/no/such/prog.sh", "169"]


JOBS = [{"Params": ["true", "1"], "Runtime": 5, **NOWHERE}, {"Params": ["true", "é"], "Name": "own", **NOWHERE}]
LINES = "\n".join(map(json.dumps, JOBS))


@pytest.mark.parametrize("text", [
    json.dumps(JOBS), json.dumps(JOBS, indent=2), LINES, LINES + "\n", "\n" + LINES.replace("\n", "\r\n\r\n"),
    "\ufeff" + json.dumps(JOBS, ensure_ascii=False),
    json.dumps({"Available": dict(zip("ab", JOBS)), "Finished": {"c": {}}}),
], ids=["list", "indented", "lines", "lines with an end", "blank lines", "byte order mark", "database"])  # fmt: skip
def test_qsub_file_takes_a_list_or_lines_from_a_file_or_standard_input(desk, text):
    path = desk.lab.write("jobs", text)
    for out in (desk("qsub", "-N", "given", "--file", path), desk("qsub", "-N", "given", "--file", "-", stdin=text)):
        jobs = [desk.server.job(number) for number in out.split()]
        assert [job["Params"] for job in jobs] == [job["Params"] for job in JOBS]
        assert [(job["Runtime"], job["Name"]) for job in jobs] == [(5, "given"), (0, "own")]
        assert jobs[1]["Number"] == jobs[0]["Number"] + 1


@pytest.mark.parametrize("text, words", [
    (LINES + "\n{oops", "line 3"),
    ('[{"Params":["true"]}', "jobs"),
    ('[{"Params":["true"]},{"Params":[]}]', "job 2 of 2"),
    ('{"Params":["true"]}\n{"Params":"true"}', "job 2 of 2"),
    ("[1]", "object"),
    ("\0\xff", "jobs"),
], ids=ascii)  # fmt: skip
def test_a_file_with_a_fault_is_refused_as_a_whole_and_the_line_says_where(desk, text, words):
    before = desk.server.status()["Jobs"]
    assert words in desk.fails("qsub", "--file", desk.lab.write("jobs", text))
    assert desk.server.status()["Jobs"] == before


@pytest.mark.parametrize("script, code", [("exit 0", 0), ("exit 3", 3)])
def test_qsub_block_waits_and_exits_with_the_jobs_status(desk, script, code):
    exit_code, out, _ = desk.lab.command("qsub", "-W", "block=true", "--", "sh", "-c", script, server=desk.server)
    assert exit_code == code
    assert desk.server.job(out.strip())["State"] == "F"


# ---------------------------------------------------------------------------------------------------------------------
# qstat
# ---------------------------------------------------------------------------------------------------------------------

NAMES = ["plain", "two words", "line\nline", 'quo"te', "{}]", "x" * 300, "é日😀", "\x1b[31m", "\u2028", " ", "-", "\\"]


def test_qstat_prints_two_lines_of_head_and_the_state_is_the_fifth_word_whatever_the_name(desk, queued):
    numbers = [str(queued(Name=name)) for name in NAMES]
    numbers += [str(queued(Name="held", Hold=True)), str(queued(Owner="a person@host")), str(queued(Owner=""))]
    lines = desk("qstat", *numbers).splitlines()
    assert lines[0].startswith("Job id") and set(lines[1]) == {"-", " "}
    rows = [line.split() for line in lines[2:]]
    assert [row[0] for row in rows] == numbers
    assert [row[4] for row in rows] == ["Q"] * len(NAMES) + ["H", "Q", "Q"]
    assert all(len(row) == 6 and row[5] == "default" for row in rows)


def test_qstat_lists_what_is_not_over_with_x_everything_and_named_jobs_always(desk, queued):
    waits, (over,) = str(queued()), desk.server.add(["true"])
    desk.server.over(over)

    def listed(*flags):
        return [line.split()[0] for line in desk("qstat", *flags).splitlines()[2:]]

    assert waits in listed() and str(over) not in listed()
    assert {waits, str(over)} <= set(listed("-x"))
    job_id = desk.server.job(over)["ID"]
    assert listed(str(over), job_id, job_id[:13]) == [str(over)] * 3


def test_qstat_n1_says_where_a_job_runs_at_the_end_of_its_line_and_qstat_takes_a_queues_name(desk, queued):
    name = str(queued())
    (line,) = [line.split() for line in desk("qstat", "-n1", name).splitlines()[2:]]
    assert (line[0], line[-3:]) == (name, ["Q", "--", "--"])
    assert name in {line.split()[0] for line in desk("qstat", "default").splitlines()[2:]}
    assert desk("qstat", "-q", "default") == desk("qstat", "-Q", "default")


def test_qstat_of_an_empty_queue_prints_nothing_and_its_json_is_a_document(lab):
    server = lab.server()
    assert lab.command("qstat", server=server) == (0, "", "")
    assert json.loads(lab.command("qstat", "-F", "json", server=server)[1])["Jobs"] == {}


def test_qstat_f_says_everything_in_a_line_each(desk):
    (number,) = desk.server.add({"Params": ["sh", "-c", "exit 3"], "Name": "a\nb", "Runtime": 60, "Env": {"A": "x\ny"}})
    desk.server.over(number)
    lines = desk("qstat", "-f", str(number)).splitlines()
    assert lines[0] == f"Job Id: {number}" and lines[-1] == ""
    fields = dict(line.strip().split(" = ", 1) for line in lines[1:-1])
    assert (fields["Job_Name"], fields["job_state"], fields["Exit_status"]) == ("a?b", "F", "3")
    assert (fields["Resource_List.walltime"], fields["exec_host"]) == ("00:01:00", "node07")
    assert fields["Variable_List.A"] == "x?y"
    assert "exit status 3" in fields["comment"]


def test_qstat_f_says_in_words_what_a_number_of_ours_means(desk):
    (number,) = desk.server.add(["no-such-program"])
    desk.server.over(number)
    full = desk("qstat", "-f", str(number))
    assert "Exit_status = -8" in full and "cannot start no-such-program" in full


def test_qstat_json_is_one_document_with_openpbs_keys_whatever_the_names(desk, queued):
    numbers = [queued(Name=name, Params=["true", name]) for name in [*NAMES, "\ud800"]]
    failing = {"Params": ["sh", "-c", "exit 3"], "Owner": "me@here", "Runtime": 3661, "Memory": 1 << 30}
    numbers += desk.server.add(failing)
    desk.server.over(numbers[-1])
    document = json.loads(desk("qstat", "-x", "-F", "json"))
    assert sorted(document) == ["Jobs", "pbs_server", "pbs_version", "timestamp"]
    assert abs(document["timestamp"] - time.time()) < 3600 and isinstance(document["pbs_version"], str)
    jobs = [document["Jobs"][str(number)] for number in numbers]
    assert [job["Job_Name"] for job in jobs[:-1]] == [*NAMES, "\ud800"]
    for job in jobs:
        assert {"Job_Name", "job_state", "queue", "Resource_List", "Priority", "ctime"} <= set(job)
    assert jobs[0]["job_state"] == "Q" and "Exit_status" not in jobs[0] and "stime" not in jobs[0]
    over = jobs[-1]
    assert (over["job_state"], over["Exit_status"], over["exec_host"]) == ("F", 3, "node07")
    assert over["Resource_List"] == {"walltime": "01:01:01", "mem": "1048576kb", "ncpus": 1}
    assert over["Job_Owner"] == "me@here"
    assert over["resources_used"]["walltime"].count(":") == 2


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_console_that_cannot_show_a_character_gets_an_escape_and_no_error(desk, queued, encoding):
    number = queued(Name="日é")
    for flags in ([], ["-f"], ["-F", "json"]):
        out = desk("qstat", *flags, str(number), env={"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"})
        assert str(number) in out


# ---------------------------------------------------------------------------------------------------------------------
# qdel, qcat, qwait
# ---------------------------------------------------------------------------------------------------------------------


def test_qdel_of_a_queued_job_ends_it_at_once(desk, queued):
    numbers = [queued(), queued(Hold=True)]
    assert desk("qdel", *numbers) == ""
    for job in map(desk.server.job, numbers):
        assert (job["State"], job["Status"], job.get("RunCount", 0)) == ("F", "deleted", 0)
    code, out, err = desk.lab.command("qdel", numbers[0], server=desk.server)  # it is what it was to be
    assert (code, out) == (0, "") and "it is finished" in err and err.count("\n") == 1


def test_qdel_of_a_running_job_ends_it_through_its_client_and_says_so_meanwhile(desk):
    path = desk.lab.path("deleted")
    script = 'trap "sleep 0.5; exit 7" TERM; echo $$ >"$1"; while :; do sleep 0.1; done'
    (number,) = desk.server.add(["sh", "-c", script, "sh", path])
    process = int(until(lambda: os.path.exists(path) and open(path).read()))
    code, out, err = desk.lab.command("qdel", number, server=desk.server)
    assert (code, out) == (0, "") and f"job {number}: being deleted: node07" in err
    meanwhile = desk.server.job(number)
    assert meanwhile["State"] == "F" or "being deleted" in meanwhile["Comment"]
    job = desk.server.over(number)
    assert (job["Status"], job["ExitStatus"]) == ("deleted", 271) and not alive(process)


def test_a_job_that_qdel_killed_has_256_and_the_signal(desk):
    (number,) = desk.server.add(["sleep", "600"])
    until(lambda: desk.server.job(number)["State"] == "R")
    desk("qdel", number)
    job = desk.server.over(number)
    assert (job["Status"], job["ExitStatus"] in (271, 265)) == ("deleted", True)


def test_qdel_deletes_each_for_itself_and_says_what_it_could_not(desk, queued):
    one, two, over = [str(queued()) for _ in range(3)]
    desk("qdel", over)
    code, out, err = desk.lab.command("qdel", one, "999999", over, two, server=desk.server)
    assert (code, out) == (153, "") and len(err.splitlines()) == 2 and "999999" in err
    assert [desk.server.job(number)["Status"] for number in (one, two)] == ["deleted", "deleted"]


def test_qcat_prints_what_a_job_printed_and_e_its_errors(desk):
    (number,) = desk.server.add(["sh", "-c", "printf 'out\\r\\n\\377'; printf err >&2"])
    desk.server.over(number)
    for flags, printed in (([], b"out\r\n\xff"), (["-e"], b"err")):
        program = [sys.executable, os.path.join(ROOT, "jobrunner.py"), "qcat", "--server", desk.server.url]
        assert subprocess.run(program + flags + [str(number)], stdout=subprocess.PIPE, timeout=60).stdout == printed


class Reader:
    """A `qcat -f`, and what it has printed so far."""

    def __init__(self, desk, *words):
        env = {**os.environ, "JOBRUNNER_SERVER": desk.server.url}
        program = [sys.executable, os.path.join(ROOT, "jobrunner.py"), "qcat", "-f", *map(str, words)]
        self.process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
        desk.lab.processes.append(self.process)

    def line(self):
        return self.process.stdout.readline().decode()

    def rest(self):
        out, err = self.process.communicate(timeout=PATIENCE)
        assert self.process.returncode == 0, err
        return out, err.decode()


def test_qcat_f_follows_a_running_job_to_its_end_and_e_its_errors(desk):
    script = 'echo one; echo bad >&2; until [ -e "$1" ]; do sleep 0.05; done; printf "\\377two"; echo worse >&2; exit 3'
    go = desk.lab.path("go")
    (number,) = desk.server.add(["sh", "-c", script, "sh", go])
    readers = [Reader(desk, number), Reader(desk, number), Reader(desk, "-e", number)]
    assert [reader.line() for reader in readers] == ["one\n", "one\n", "bad\n"]
    desk.lab.write("go", "")
    assert [reader.rest() for reader in readers] == [(b"\xfftwo", "")] * 2 + [(b"worse\n", "")]
    assert Reader(desk, number).rest() == (b"one\n\xfftwo", "")  # over long ago


def test_qcat_f_of_a_queued_job_says_so_and_waits(desk, queued):
    number = queued(Params=["echo", "at last"])
    reader = Reader(desk, number)
    desk("qalter", number, "-l", "host=node07")
    assert reader.rest()[0] == b"at last\n"


def test_qcat_f_goes_on_with_the_next_run(desk):
    go = desk.lab.path("again")
    script = 'echo run $JOBRUNNER_RUN_COUNT; until [ -e "$1.$JOBRUNNER_RUN_COUNT" ]; do sleep 0.05; done'
    (number,) = desk.server.add(["sh", "-c", script, "sh", go])
    reader = Reader(desk, number)
    assert reader.line() == "run 1\n"
    desk("qrerun", number)
    assert reader.line() == "run 2\n"
    desk.lab.write("again.2", "")
    out, err = reader.rest()
    assert out == b"" and "run 2 begins" in err


@pytest.mark.parametrize("meanwhile", [False, True], ids=["goes on", "ends meanwhile"])
def test_qcat_f_waits_for_a_server_that_is_started_again(lab, meanwhile):
    server = lab.server()
    client = lab.client(server)
    script = "echo one; until [ -e two ]; do sleep 0.05; done; echo two; until [ -e end ]; do sleep 0.05; done"
    (number,) = server.add(["sh", "-c", script])
    reader = Reader(types.SimpleNamespace(server=server, lab=lab), number)
    assert reader.line() == "one\n"
    server.kill()
    while "waiting for it" not in reader.process.stderr.readline().decode():
        assert reader.process.poll() is None
    lab.write("two", "")
    if meanwhile:
        os.kill(reader.process.pid, signal.SIGSTOP)
        lab.write("end", "")
    server = lab.server(port=server.port)
    if meanwhile:
        server.over(number)
        os.kill(reader.process.pid, signal.SIGCONT)
    else:
        assert reader.line() == "two\n"
    lab.write("end", "")
    out, err = reader.rest()
    assert (out, "ended meanwhile" in err, client.poll()) == (b"", meanwhile, None)


def test_qcat_f_stays_with_a_job_that_prints_faster_than_can_be_sent(desk):
    script = 'echo begin; until [ -e "$1" ]; do sleep 0.05; done; yes | head -c 50000000; printf the-end'
    (number,) = desk.server.add(["sh", "-c", script, "sh", desk.lab.path("flood")])
    reader = Reader(desk, number)
    assert reader.line() == "begin\n"
    desk.lab.write("flood", "")
    out, err = reader.rest()
    assert out.endswith(b"y\nthe-end") and len(out) < 50000000 and "bytes left out" in err


def test_qcat_of_a_job_that_is_not_over_says_when_its_output_comes(desk, queued):
    code, out, err = desk.lab.command("qcat", queued(), server=desk.server)
    assert (code, out) == (0, "") and "when it is over" in one_line(err)


def test_what_a_host_calls_itself_moves_no_cursor_where_commands_say_it(lab):
    server = lab.server()
    server.add(["true"])
    assert server.get("/request", hostname="pc\x1b[2J\x9b\u202e\njobrunner: forged")[0] == 200
    for command, exit_code in (("qcat", 0), ("qrerun", 1)):
        code, out, err = lab.command(command, "1", server=server)
        assert (code, out) == (exit_code, "") and "pc\\x1b[2J" in err and one_line(err).isprintable()


@pytest.mark.parametrize("scripts, code", [
    (["exit 0"], 0), (["exit 3"], 3), (["exit 0", "sleep 0.3; exit 4", "exit 0"], 4), (["exit 5", "exit 6"], 5),
], ids=str)  # fmt: skip
def test_qwait_exits_with_the_first_status_that_is_not_0(desk, scripts, code):
    numbers = desk.server.add(*[["sh", "-c", script] for script in scripts])
    assert desk.lab.command("qwait", *numbers, server=desk.server) == (code, "", "")


@pytest.mark.parametrize("params", [["sh", "-c", "kill -9 $$"], ["no-such-program"]], ids=" ".join)
def test_qwait_is_not_0_for_a_job_whose_status_no_program_can_exit_with(desk, params):
    (number,) = desk.server.add(params)
    code, out, err = desk.lab.command("qwait", number, server=desk.server)
    assert 0 < code < 256 and code != 2 and out + err == ""


@pytest.mark.parametrize("command", [("qwait", "1"), ("qcat", "-f", "1")], ids=" ".join)
def test_who_waits_for_a_job_waits_on_where_the_server_has_no_room_or_is_just_stopping(lab, command):
    class Busy(FakeServer):
        times, over = 1, {"State": "F", "Status": "failed", "ExitStatus": 3, "Host": "pc", "Run": 1, "Original": False}

        def reply(self, *_):
            self.times += 1
            if self.times == 3:
                return 503, b'{"Error": "the server is stopping"}'
            piece = {"State": "R", "StdOut": {"At": 0, "Text": "x", "Next": 1}} if self.times == 2 else {}
            return 200, json.dumps({**self.over, **piece}).encode()

    code, out, err = lab.command(*command, server=Busy())
    assert (code, out) == ((3, "") if command[0] == "qwait" else (0, "x"))
    assert "the server is stopping; waiting for it" in err


def test_qwait_gives_up_after_its_timeout(desk, queued):
    number = queued()
    assert f"job {number} is not over" in desk.fails("qwait", "--timeout", "0", number)


# ---------------------------------------------------------------------------------------------------------------------
# pbsnodes, qterm
# ---------------------------------------------------------------------------------------------------------------------


def test_pbsnodes_lists_clients_their_states_and_jobs(lab):
    server = lab.server()
    numbers = server.add(*[["sleep", "60"]] * 3)
    lab.client(server, "--hostname", "busy", "--property", "gpu", "--spool", "one", max_jobs=2)
    until(lambda: server.status()["States"]["R"] == 2)
    lab.client(server, "--hostname", "half", "--spool", "two", max_jobs=2)
    until(lambda: server.status()["States"]["R"] == 3)
    blocks = lab.command("pbsnodes", server=server)[1].strip().split("\n\n")
    busy, half = (dict(line.strip().split(" =", 1) for line in block.splitlines()[1:]) for block in blocks)
    busy, half = ({key: value.strip() for key, value in node.items()} for node in (busy, half))
    assert [block.splitlines()[0] for block in blocks] == ["busy", "half"]
    assert (busy["state"], half["state"]) == ("job-busy", "free")
    assert (busy["resources_available.ncpus"], busy["resources_assigned.ncpus"]) == ("2", "2")
    assert busy["jobs"] == f"{numbers[0]}, {numbers[1]}" and "gpu" in busy["properties"]
    for state, hosts in {"free": ["half"], "up": ["busy", "half"], "all": ["busy", "half"], "down": []}.items():
        lines = lab.command("pbsnodes", "-l", state, server=server)[1].splitlines()
        assert [line.split()[0] for line in lines] == hosts
    document = json.loads(lab.command("pbsnodes", "-F", "json", server=server)[1])
    assert sorted(document) == ["nodes", "pbs_server", "pbs_version", "timestamp"]
    assert {name: node["state"] for name, node in document["nodes"].items()} == {"busy": "job-busy", "half": "free"}


def test_qterm_stops_the_server_with_everything_in_one_file(lab):
    server = lab.server()
    (number,) = server.add(["true"])
    assert lab.command("qterm", server=server) == (0, "", "")
    assert server.process.wait(PATIENCE) == 0
    with open(server.db, encoding="utf-8") as file:
        assert [job["Number"] for job in json.load(file)["Available"].values()] == [number]
    assert "cannot reach" in one_line(lab.command("qstat", server=server)[2])


# ---------------------------------------------------------------------------------------------------------------------
# run
# ---------------------------------------------------------------------------------------------------------------------

RUN_JOBS = [{"Params": ["echo", "one é"]}, {"Params": ["echo", "two"], "Runtime": 60, "Name": "second"}]


@pytest.mark.parametrize("text, stdin", [
    (json.dumps(RUN_JOBS), False),
    ("\n".join(map(json.dumps, RUN_JOBS)), True),
], ids=["list in a file", "lines on standard input"])  # fmt: skip
def test_run_runs_every_job_of_a_list_lines_or_standard_input_and_leaves_nothing_behind(lab, text, stdin):
    before = set(os.listdir(lab.path()))
    file = "-" if stdin else lab.write("jobs", text)
    code, out, err = lab.command("run", file, stdin=text if stdin else None)
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0].split()[:4] == ["Job", "Name", "Status", "Exit"]
    assert lines[1].split()[:4] == ["1", "echo", "finished", "0"] and lines[1].endswith("one é")
    assert lines[2].split()[:4] == ["2", "second", "finished", "0"] and lines[2].endswith("two")
    assert lines[3] == "2 of 2 jobs finished"
    assert "\r" not in err and err.splitlines()[-1].startswith("2 done, 0 failed, 0 running, 0 queued")
    assert set(os.listdir(lab.path())) - before <= {"jobs"}


def test_run_exits_1_when_a_job_failed_and_the_table_says_which_and_why(lab):
    jobs = [["true"], ["sh", "-c", "echo sorry >&2; exit 3"], ["no-such-program"], ["sleep", "600"]]
    records = [{"Params": params, "Runtime": 1} for params in jobs]
    code, out, _ = lab.command("run", lab.write("jobs", json.dumps(records)))
    assert code == 1
    rows = [line.split() for line in out.splitlines()[1:5]]
    assert [row[2:4] for row in rows] == [["finished", "0"], ["failed", "3"], ["failed", "-8"], ["timeout", "-11"]]
    assert rows[1][-1] == "sorry" and "cannot start no-such-program" in out
    assert out.splitlines()[-1] == "1 of 4 jobs finished"


def test_run_waits_for_jobs_whose_time_or_whose_turn_comes_later(lab):
    soon = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 2))
    jobs = [
        {"Params": ["true"], "StartAfter": soon},
        {"Params": ["true"]},
        {"Params": ["echo", "{index}"], "Array": "1-3"},
    ]
    code, out, err = lab.command("run", lab.write("jobs", json.dumps(jobs)))
    assert code == 0 and "5 of 5 jobs finished" in out, (out, err)


def test_run_j_says_how_many_run_at_once(lab):
    script = "echo + >>at; sleep 0.2; echo - >>at"
    records = [{"Params": ["sh", "-c", script]} for _ in range(5)]
    code, _, err = lab.command("run", lab.write("jobs", json.dumps(records)), "-j", "2")
    assert code == 0, err
    now = most = 0
    with open(lab.path("at")) as file:
        for sign in file.read().split():
            now += 1 if sign == "+" else -1
            most = max(most, now)
    assert (now, most) == (0, 2)


def test_run_works_in_a_folder_whose_name_the_console_cannot_show(lab):
    os.mkdir(lab.path("日本"))
    jobs = lab.write(os.path.join("日本", "jobs"), '{"Params": ["true"]}')
    command = ("run", jobs, "--db", os.path.join("日本", "db.json"))
    code, out, err = lab.command(*command, env={"PYTHONIOENCODING": "cp1252"})  # as on Windows into a pipe
    assert code == 0 and "1 of 1 jobs finished" in out and "\\u65e5\\u672c" in out, err


def test_run_with_db_is_stopped_by_ctrl_c_and_run_again_goes_on_where_it_was(lab):
    wait = '[ "$1" = a ] || { echo $$ >>"pid$1"; until [ -e go ]; do sleep 0.05; done; }'
    script = f'echo "$1" >>log; {wait}; echo "$1" over >>log'
    jobs = [{"Params": ["sh", "-c", script, "sh", name]} for name in "abcd"]
    command = ("run", lab.write("jobs", json.dumps(jobs)), "--db", "sweep.json", "-j", "2")
    first = lab.popen("jobrunner.py", *command, stdout=subprocess.DEVNULL, log="run.log")
    until(lambda: os.path.exists(lab.path("pidb")) and os.path.exists(lab.path("pidc")), "b and c to run")
    first.send_signal(signal.SIGINT)
    assert first.wait(PATIENCE) != 0
    for name in ("pidb", "pidc"):
        with open(lab.path(name)) as file:
            process = int(file.read())
        until(lambda: not alive(process), f"{name} to be gone")  # noqa: B023
    assert "Traceback" not in lab.log("run.log")
    with open(lab.path("sweep.json"), encoding="utf-8") as file:
        document = json.load(file)
    assert [len(document[bucket]) for bucket in ("Available", "Leased", "Finished")] == [3, 0, 1]
    lab.write("go", "")
    os.remove(lab.path("jobs"))  # what counts now is the database
    code, out, err = lab.command(*command)
    assert (code, "4 of 4 jobs finished" in out) == (0, True), err
    with open(lab.path("log")) as file:
        lines = file.read().splitlines()
    assert sorted(lines) == ["a", "a over", "b", "b", "b over", "c", "c", "c over", "d", "d over"]


@pytest.mark.parametrize("text, words", [
    (None, "cannot read"), ("{oops", "not JSON"), ('[{"Params":["a"],"Runtime":"x"}]', "Runtime"),
], ids=str)  # fmt: skip
def test_run_says_in_one_line_what_is_wrong_with_its_file(lab, text, words):
    path = lab.write("jobs", text) if text is not None else lab.path("jobs")
    code, out, err = lab.command("run", path)
    assert (code, out) == (1, "") and words in one_line(err)


def test_run_of_no_jobs_at_all_is_done(lab):
    code, out, err = lab.command("run", lab.write("jobs", "[]"))
    assert (code, out) == (0, "0 of 0 jobs finished\n"), err


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [
    "qsub -- true", "qstat", "qstat -F json", "qstat 1", "qdel 1", "qcat 1", "pbsnodes", "qterm"
])  # fmt: skip
def test_a_server_that_cannot_be_reached_is_one_plain_line(lab, words):
    env = {"JOBRUNNER_SERVER": "127.0.0.1:1"}
    code, out, err = lab.command(*words.split(), env=env)
    assert (code, out) == (1, "")
    assert "127.0.0.1:1" in one_line(err) and "is server.py running there?" in err


def test_what_is_no_jobrunner_server_is_one_plain_line(desk):
    line = desk.fails("qstat", "--server", desk.server.url + "/elsewhere")
    assert "/elsewhere" in line


@pytest.mark.parametrize("program", ["server.py", "client.py"])
@pytest.mark.parametrize("beside, flags, words", [
    (None, [], "needs jobrunner.py beside it: copy it to"), ("", ["-I"], "does not look for jobrunner.py in"),
    ("from typing import *", [], "are of different versions: copy both"),
])  # fmt: skip
def test_a_program_that_does_not_find_its_jobrunner_says_so_in_a_line(lab, program, beside, flags, words):
    shutil.copy(os.path.join(ROOT, program), lab.folder)
    if beside is not None:
        lab.write("jobrunner.py", beside)
    done = subprocess.run([sys.executable, *flags, lab.path(program)], stderr=subprocess.PIPE, timeout=PATIENCE)
    (line,) = done.stderr.decode().splitlines()
    assert done.returncode == 1 and words in line


@pytest.mark.parametrize("command", ["qstat", "qdel", "qcat", "qwait"])
@pytest.mark.parametrize("name", ["999999", "1[3]", "../é"])
def test_an_unknown_job_is_one_plain_line_that_names_it(desk, command, name):
    line = desk.fails(command, name, code=153)  # PBS's
    assert "Unknown Job Id" in line and name in line


@pytest.mark.parametrize("words", [
    "", "nonsense", "qsub", "qsub true", "qsub --", "qsub -l walltime=soon -- true", "qsub -l nonsense=1 -- true",
    "qsub -l mem=4xb -- true", "qsub -W sometimes -- true", "qsub --file jobs -- true", "qsub --nonsense -- true",
    "qstat --nonsense", "qstat -F xml", "qstat --server ftp://x", "qdel", "qcat", "qcat 1 2", "qwait",
    "qwait --timeout soon 1", "pbsnodes -F xml", "run", "run x -j 0", "run x -j many",
])  # fmt: skip
def test_wrong_usage_ends_with_exit_code_2_and_the_last_line_says_what_is_wrong(lab, words):
    code, out, err = lab.command(*words.split(), env={"JOBRUNNER_SERVER": "127.0.0.1:1"})
    assert (code, out) == (2, ""), err
    assert "Traceback" not in err and ": error: " in err.splitlines()[-1]


@pytest.mark.parametrize("words, instead", [
    ("qsub -I", "qcat -f"), ("qsub -F 1 job.sh", "stand behind it"), ("qsub -l vmem=1gb -- true", "mem="),
    ("qsub -l nodes=1:ppn=2:gpus=1 -- true", "--property gpu"), ("qsub -l feature=x -- true", "-l linux"),
    ("qsub -W stagein=x -- true", "no files are copied"), ("qalter -h u 1", "qrls"), ("qalter -q long 1", "qmove"),
    ("qdel all", "--owner NAME"), ("qdel -t 1-3 17[]", "17[1-9]"), ("qdel -W 30 1", "--kill-delay"), ("qstat -H", "-x"),
    ("qstat -fT", "-s says"), ("qselect -h u", "--state H"), ("pbsnodes -aSj", "-l all"), ("qsig -s HUP 1", "qdel"),
    ("qorder 1 2", "qalter -p"), ("qdisable long", "enabled = false"), ("qhold -h x 1", "write u"),
])  # fmt: skip
def test_what_clusters_have_and_is_not_here_is_wrong_usage_and_says_what_to_do_instead(lab, words, instead):
    code, out, err = lab.command(*words.split(), env={"JOBRUNNER_SERVER": "127.0.0.1:1"})
    assert (code, out) == (2, "") and ": error: " in err.splitlines()[-1] and instead in err.splitlines()[-1], err


@pytest.mark.parametrize("command", ["", "qsub", "run"])
def test_help_says_how_and_is_no_error(lab, command):
    code, out, err = lab.command(*command.split(), "--help")
    assert (code, err) == (0, "") and out.startswith("usage: jobrunner.py")

"""Queueing as people who come from a cluster type it, run as programs against a real server and client: qmgr, qsub in
full, arrays, and the commands that change jobs by name and by selection.

All tests share `desk`, a server with one client; a job that must not run needs the property "nowhere".
"""

import json
import os
import subprocess
import sys

import pytest

from harness import ROOT, Lab, until
from test_commands import Desk, one_line

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the jobs here are sh: Windows has a file of its own")

NOWHERE = ("-l", "nowhere")


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    with Lab(str(tmp_path_factory.mktemp("queueing"))) as lab:
        yield Desk(lab)


@pytest.fixture
def queued(desk):
    """Submits jobs that no client takes: qsub's options in, the job's name out."""

    def submit(*options, command=("true",)):
        return desk("qsub", *NOWHERE, *options, "--", *command).strip()

    return submit


@pytest.fixture(scope="module")
def long(desk):
    """A queue."""
    desk("qmgr", "-c", "create queue long")
    return "long"


def states(desk, name):
    return [job["State"] for job in subjobs(desk, name)]


def subjobs(desk, name):
    """The records of an array's subjobs."""
    return desk.server.get("/jobs", number=name.split("[")[0])[1]["Jobs"]


def listed(desk, *words):
    """(name, state) in each line of a table."""
    lines = [line.split() for line in desk("qstat", *words).splitlines()[2:]]
    return [(line[0], line[4]) for line in lines]


# ---------------------------------------------------------------------------------------------------------------------
# Queues
# ---------------------------------------------------------------------------------------------------------------------


def queues(desk):
    return {queue["Name"]: queue for queue in desk.server.get("/queues")[1]["Queues"]}


def test_qmgr_makes_sets_and_deletes_a_queue(desk):
    assert desk("qmgr", "-c", "create queue night queue_type = Execution, max_run = 3") == ""
    desk("qmgr", "-c", "set queue night Priority = 5, enabled = false, resources_max.walltime = 24:00:00")
    night = queues(desk)["night"]
    assert (night["MaxRun"], night["Priority"], night["Enabled"], night["MaxWalltime"]) == (3, 5, False, 86400)
    desk("qmgr", "-c", "unset queue night max_run,enabled")
    assert (queues(desk)["night"]["MaxRun"], queues(desk)["night"]["Enabled"]) == (0, True)
    desk("qmgr", "-c", "delete queue night")
    assert "night" not in queues(desk)


@pytest.mark.parametrize(
    "command, words",
    [
        ("create queue default", "it is there already"),
        ("delete queue default", "cannot delete queue default"),
        ("set queue nowhere max_run = 1", "there is no queue nowhere"),
        ("list queue nowhere", "there is no queue nowhere"),
        ("explode", "qmgr knows no 'explode'"),
        ("set queue default max_run = -1", "max_run: '-1' is not a number"),
    ],
)
def test_what_qmgr_cannot_do_is_one_plain_line(desk, command, words):
    assert words in desk.fails("qmgr", "-c", command)


def test_what_qmgr_prints_makes_the_same_queues_on_another_server(desk, lab):
    desk("qmgr", "-c", "create queue copied max_run=2,started=false,resources_default.walltime=60")
    printed, other = desk("qmgr", "-c", "print queue default,copied"), lab.server()
    code, out, err = lab.command("qmgr", server=other, stdin=printed)
    assert (code, out, err) == (0, "", "")
    made = {queue["Name"]: queue for queue in other.get("/queues")[1]["Queues"]}
    assert made["copied"] == queues(desk)["copied"] and list(made) == ["default", "copied"]


def test_a_fault_in_what_qmgr_reads_is_said_with_its_line(desk):
    line = desk.fails("qmgr", stdin="# first\ncreate queue half\nset queue half max_run = x\ncreate queue other\n")
    assert "line 3: max_run: 'x'" in line and "what stands before it is done" in line
    assert "half" in queues(desk) and "other" not in queues(desk)


def test_qstat_q_lists_queues_in_text_and_json(desk, queued):
    desk("qmgr", "-c", "create queue shown max_run = 7, Priority = 3")
    queued("-q", "shown")
    queued("-q", "shown", "-h")
    head, rule, row = (line.split() for line in desk("qstat", "-Q", "shown").splitlines())
    assert head[:5] == ["Queue", "Max", "Tot", "Ena", "Str"]
    assert row == "shown 7 2 yes yes 1 0 1 0 0 0 Exec".split()
    document = json.loads(desk("qstat", "-Q", "-f", "-F", "json", "shown"))["Queue"]
    assert list(document) == ["shown"] and (document["shown"]["max_run"], document["shown"]["total_jobs"]) == (7, 2)
    full = desk("qstat", "-Q", "-f", "shown")
    assert full.startswith("Queue: shown\n") and "    max_run = 7\n" in full
    assert desk("qmgr", "-c", "list queue shown") == full.replace("Queue: ", "Queue ")
    assert "there is no queue nowhere" in desk.fails("qstat", "-Q", "nowhere")


def test_qstat_b_shows_the_server(desk):
    assert desk("qstat", "-B").split()[-1] == "Active"
    assert "server_state = Active" in desk("qstat", "-B", "-f")
    assert list(json.loads(desk("qstat", "-B", "-F", "json"))["Server"]) == ["127.0.0.1"]


# ---------------------------------------------------------------------------------------------------------------------
# qsub
# ---------------------------------------------------------------------------------------------------------------------


def test_qsubs_options_arrive(desk, long, queued):
    first = queued()
    name = queued(
        *["-N", "sim", "-q", long, "-p", "-7", "-l", "walltime=1:00:00,mem=1gb,ncpus=2", "-l", "host=node07", "-h"],
        *["-r", "n", "-v", "A='1,2',B", "-o", "/dev/null", "-e", "DIR/", "-j", "oe", "-d", "/tmp", "-S", "/bin/bash"],
        *["-W", f"depend=afterany:{first},retry=2", "-A", "acc", "-P", "proj", "-m", "n", "-M", "a@b", "-k", "oe"],
        *["-l", "place=free", "-a", "202701010000"],
    )  # fmt: skip
    job = desk.server.job(name)
    wanted = {
        "Name": "sim", "Queue": "long", "Priority": -7, "Runtime": 3600, "Memory": 1 << 30, "Ncpus": 2, "Hold": True,
        "Requires": ["nowhere", "host=node07"], "Rerunable": False, "StdOut": "/dev/null", "StdErr": "DIR/",
        "Join": "oe", "WorkDir": "/tmp", "Shell": "/bin/bash", "Depend": [f"afterany:{first}"], "Retries": 2,
        "State": "H", "SubmitDir": desk.lab.folder, "Account": "acc", "Project": "proj", "MailPoints": "n",
        "MailUsers": "a@b", "KeepFiles": "oe", "Place": "free", "Env": {"A": "1,2", "B": "from here"},
    }  # fmt: skip
    assert {key: job.get(key) for key in wanted} == wanted and job["StartAfter"].endswith("Z")


@pytest.fixture(autouse=True)
def variable(monkeypatch):
    monkeypatch.setenv("B", "from here")


SCRIPT = "#!/bin/sh\n#PBS -N scripted\n#PBS -l nowhere,walltime=60\necho \"$1\" 'é'\n"


@pytest.mark.parametrize("words, stdin, name, arguments", [
    (["job.sh"], None, "job.sh", []), (["job.sh", "-N", "x y"], None, "job.sh", ["-N", "x y"]),
    ([], SCRIPT, "STDIN", []), (["-"], SCRIPT, "STDIN", []),
], ids=str)  # fmt: skip
def test_a_scripts_text_travels_with_its_options_and_arguments(desk, words, stdin, name, arguments):
    desk.lab.write("job.sh", SCRIPT)
    job = desk.server.job(desk("qsub", "-l", "walltime=90", *words, stdin=stdin).strip())
    assert (job["Script"], job["ScriptName"], job["Params"]) == (SCRIPT, name, [name, *arguments])
    assert (job["Name"], job["Runtime"], job["Requires"]) == ("scripted", 90, ["nowhere"])


def test_a_script_runs_with_its_arguments_and_knows_its_own_name(desk):
    says = 'echo "$PBS_JOBID $PBS_JOBNAME $1 $PBS_O_WORKDIR"'
    desk.lab.write("run.sh", f"#!/bin/sh\n#PBS -l walltime=60\n{says}\nexit 3\n")
    code, out, err = desk.lab.command("qsub", "-N", "x", "-Wblock=true", "run.sh", "a b", server=desk.server)
    assert code == 3, err
    assert desk("qcat", out.strip()) == f"{out.strip()} x a b {desk.lab.folder}\n"


@pytest.mark.parametrize("words, script, code, sentence", [
    (["job.sh"], "#PBS -Z\n", 1, "job.sh line 1: there is no option -Z"),
    (["job.sh"], "#PBS -l nodes=2:ppn=4\n", 1, "job.sh line 1: -l: nodes: '2:ppn=4' is not one node"),
    (["-q", "no-such", "job.sh"], "true", 1, "there is no queue no-such"),
    (["-W", "depend=afterok:999999", "job.sh"], "true", 1, "999999"),
    (["nothing.sh"], "", 2, "cannot read nothing.sh"),
    (["-Z", "job.sh"], "", 2, "there is no option -Z"),
    ([], "", 2, "nothing to run"),
], ids=str)  # fmt: skip
def test_what_cannot_be_submitted_is_refused_with_the_reason(desk, words, script, code, sentence):
    desk.lab.write("job.sh", script)
    exit_code, out, err = desk.lab.command("qsub", *words, server=desk.server)
    assert (exit_code, out) == (code, "") and sentence in err.splitlines()[-1]


def test_z_prints_nothing_and_V_brings_every_variable(desk):
    assert desk("qsub", "-z", *NOWHERE, "--", "true") == ""
    job = desk.server.job(desk("qsub", "-V", "-v", "PATH=/mine", *NOWHERE, "--", "true").strip())
    assert (job["Env"]["B"], job["Env"]["PATH"]) == ("from here", "/mine")


# ---------------------------------------------------------------------------------------------------------------------
# Arrays
# ---------------------------------------------------------------------------------------------------------------------


def test_an_array_runs_a_subjob_for_each_index_and_block_waits_for_all(desk):
    code, out, err = desk.lab.command(
        "qsub", "-J", "1-7:2%2", "-Wblock=true", "--", "echo", "{index}{}", server=desk.server
    )
    name = out.strip()
    assert code == 0 and name.endswith("[]"), err
    assert listed(desk, "-x", name) == [(name, "F")]
    labels = [f"{name[:-1]}{index}]" for index in (1, 3, 5, 7)]
    assert [desk("qcat", label) for label in labels] == ["1{}\n", "3{}\n", "5{}\n", "7{}\n"]
    assert listed(desk, "-t", name) == listed(desk, *labels) == [(label, "F") for label in labels]
    assert [label for label, _ in listed(desk, f"{name[:-1]}1-5:2]")] == labels[:3]


def test_block_exits_with_1_when_a_subjob_failed(desk):
    command = ["qsub", "-t", "0,1", "-W", "block=true", "--", "sh", "-c", "exit {index}"]
    assert desk.lab.command(*command, server=desk.server)[0] == 1


def test_each_line_of_a_file_is_a_subjob(desk, queued):
    desk.lab.write("lines", "one\r\n\ntwo; $x\n")
    name = queued("--each-line", "lines", command=["run", "{item}", "{index}", '{"a":1}'])
    assert [job["Params"] for job in subjobs(desk, name)] == [
        ["run", "one", "1", '{"a":1}'], ["run", "two; $x", "2", '{"a":1}'],
    ]  # fmt: skip


def test_each_combination_of_a_sweep_is_a_subjob_the_first_name_slowest(desk, queued):
    paths = ["-o", "{alpha}.{beta}.out", "-e", "{alpha}.err"]
    name = queued("--sweep", "alpha=0.1,0.2", "beta=1,2", *paths, command=["run", "{alpha}", "{beta}"])
    jobs = subjobs(desk, name)
    assert [job["Params"][1:] for job in jobs] == [["0.1", "1"], ["0.1", "2"], ["0.2", "1"], ["0.2", "2"]]
    assert [job["StdOut"] for job in jobs] == ["0.1.1.out", "0.1.2.out", "0.2.1.out", "0.2.2.out"]
    assert [job["StdErr"] for job in jobs] == ["0.1.err.1", "0.1.err.2", "0.2.err.3", "0.2.err.4"]


@pytest.mark.parametrize("given, path", [
    ("out", "out.3"), ("{name}.txt", "sweep.txt.3"), ("^array_index^.txt", "3.txt"), ("logs/", "logs/"),
    ("/dev/null", "/dev/null"), ("NUL", "NUL"), ("$PBS_JOBID.txt", "$PBS_JOBID.txt"),
    ("${PBS_ARRAYID}%.txt", "${PBS_ARRAYID}%.txt"), ("$PBS_JOBNAME%", "$PBS_JOBNAME%.3"),
])  # fmt: skip
def test_each_subjob_prints_to_a_file_of_its_own_also_after_qalter(desk, queued, given, path):
    name = queued("-J", "3-4", "-N", "sweep", "-o", given, "-h")
    assert subjobs(desk, name)[0]["StdOut"] == path
    desk("qalter", "-o", "other", name)
    assert [job["StdOut"] for job in subjobs(desk, name)] == ["other.3", "other.4"]
    desk("qalter", "-o", given, name)
    assert subjobs(desk, name)[0]["StdOut"] == path


def test_qstat_shows_an_array_as_one_line_and_in_json(desk, queued):
    name = queued("-J", "1-3%2")
    assert (name, "Q") in listed(desk) and (name, "Q") in listed(desk, "-J")
    number = name[:-2]
    assert [label for label, _ in listed(desk, "-t") if label.startswith(number + "[")] == [
        f"{number}[{index}]" for index in (1, 2, 3)
    ]
    document = json.loads(desk("qstat", "-f", "-F", "json", "-x", name, f"{number}[2]"))["Jobs"]
    assert list(document) == [name, f"{number}[2]"]
    array = document[name]
    assert (array["array"], array["array_indices_submitted"], array["max_run_subjobs"]) == ("True", "1-3", 2)
    assert array["array_state_count"].startswith("Queued:3 Running:0 ")
    desk("qalter", "-W", "max_run_subjobs=1", name)
    assert desk.server.job(name)["MaxRunSubjobs"] == 1


# ---------------------------------------------------------------------------------------------------------------------
# Changing jobs
# ---------------------------------------------------------------------------------------------------------------------


def test_qhold_and_qrls_of_jobs_arrays_subjobs_and_ranges(desk, queued):
    job, array = queued(), queued("-J", "1-4")
    number = array[:-2]
    assert desk("qhold", job, f"{number}[2]", f"{number}[3-4]") == ""
    assert desk.server.job(job)["State"] == "H" and states(desk, array) == ["Q", "H", "H", "H"]
    desk("qhold", "-h", "u", array)
    assert states(desk, array) == ["H"] * 4
    desk("qrls", "-h", "u", job, array)
    assert desk.server.job(job)["State"] == "Q" and states(desk, array) == ["Q"] * 4
    assert "release needs a job that is held" in desk.fails("qrls", job)


def test_qalter_changes_what_qsub_said(desk, long, queued):
    job = queued("-N", "before", "-v", "A=1")
    desk("qalter", "-N", "after", "-p", "5", "-l", "walltime=120,mem=2gb", "-r", "n", "-W", "retry=3", "-v", "B=2", job)
    record = desk.server.job(job)
    assert (record["Name"], record["Priority"], record["Runtime"], record["Memory"]) == ("after", 5, 120, 2 << 30)
    assert (record["Rerunable"], record["Retries"], record["Env"]) == (False, 3, {"B": "2"})
    assert "-1024 to 1023" in desk.lab.command("qalter", "-p", "5000", job, server=desk.server)[2]
    desk("qalter", job, "-p", "6")
    assert desk.server.job(job)["Priority"] == 6


def test_qmove_puts_jobs_into_another_queue(desk, long, queued):
    jobs = [queued("-N", "mover") for _ in range(2)]
    desk("qmove", long, jobs[0])
    assert [desk.server.job(job)["Queue"] for job in jobs] == ["long", "default"]
    desk("qmove", long, "--name", "mover")
    assert desk.server.job(jobs[1])["Queue"] == "long"


def test_only_the_failures_of_a_sweep_run_again(desk):
    script = 'test -e "again" || exit {index}'
    name = desk("qsub", "-N", "sweep", "-J", "0-2", "--", "sh", "-c", script).strip()
    desk.lab.command("qwait", name, server=desk.server)
    desk.lab.write("again", "")
    desk("qrerun", "--name", "sweep", "--status", "failed")
    assert desk("qwait", name) == ""
    assert [job["RunCount"] for job in subjobs(desk, name)] == [1, 2, 2]
    assert "no job has name sweep and status failed" in desk.fails("qrerun", "--name", "sweep", "--status", "failed")


def test_qselect_prints_the_names_of_jobs_for_other_commands(desk, queued):
    one, array = queued("-N", "selected"), queued("-N", "selected", "-J", "1-2", "-h")
    number = array[:-2]
    assert desk("qselect", "-N", "selected").split() == [one, f"{number}[1]", f"{number}[2]"]
    assert desk("qselect", "--name", "selected", "-J").split() == [one, array]
    assert desk("qselect", "--name", "selected", "--state", "H").split() == [f"{number}[1]", f"{number}[2]"]
    assert desk("qselect", "-N", "nobody") == ""
    desk("qdel", one)
    assert one not in desk("qselect", "-N", "selected").split()
    assert json.loads(desk("qselect", "-x", "-N", "selected", "--status", "deleted", "-F", "json"))["Jobs"] == [one]


def test_qdel_by_selection_and_by_force(desk, queued):
    jobs = [queued("-N", "victim") for _ in range(3)]
    desk("qdel", "--name", "victim", jobs[0])
    assert {desk.server.job(job)["Status"] for job in jobs} == {"deleted"}
    (running,) = desk.server.add(["sleep", "600"])
    until(lambda: desk.server.job(running)["State"] == "R")
    code, out, err = desk.lab.command("qdel", "-W", "force", running, server=desk.server)
    assert (code, out, err) == (0, "", "")
    assert desk.server.job(running)["State"] == "F"


def test_qrerun_of_a_running_job_says_that_its_client_ends_it_first(desk):
    (number,) = desk.server.add(["sleep", "600"])
    until(lambda: desk.server.job(number)["State"] == "R")
    code, out, err = desk.lab.command("qrerun", number, server=desk.server)
    assert (code, out) == (0, "") and f"job {number}: being rerun: node07 is told to end it" in err
    until(lambda: desk.server.job(number).get("RunCount") == 2)
    desk("qdel", number)


def test_tracejob_prints_what_happened_and_when(desk):
    (number,) = desk.server.add({"Params": ["sh", "-c", "exit 3"], "Hold": True, "Owner": "ann@pc7", "Name": "traced"})
    desk("qrls", number)
    desk.server.over(number)
    head, _, *lines = desk("tracejob", number).rstrip("\n").split("\n")
    assert head == f"Job: {number}"
    told = [line.split("  ", 1)[1] for line in lines]
    assert told[0] == "queued by ann@pc7, named traced" and "released" in told
    assert told[-2:] == ["leased by node07, run 1", "failed, exit status 3"]
    document = json.loads(desk("tracejob", "-F", "json", number))["Jobs"][str(number)]["history"]
    assert [line["event"] for line in document] == told


# ---------------------------------------------------------------------------------------------------------------------
# Listings
# ---------------------------------------------------------------------------------------------------------------------


def test_qstat_u_a_n_and_s_have_two_lines_of_head_and_the_name_first(desk, queued):
    held = queued("-h")
    desk.server.add({"Params": ["true"], "Owner": "bob@pc9", "Hold": True})
    user = desk.server.job(held)["Owner"].split("@")[0]
    assert {line.split()[1] for line in desk("qstat", "-u", user).splitlines()[2:]} == {user[:8]}
    assert [line.split()[1] for line in desk("qstat", "-u", "bob").splitlines()[2:]] == ["bob"]
    lines = desk("qstat", "-n", "-s", held).splitlines()
    assert lines[0].startswith("Job ID") and lines[2].split()[0] == held
    assert lines[3:] == ["   --", "   held by a person"]
    assert desk("qstat", "-a", held).splitlines()[2:] == [lines[2]]


def test_why_a_job_does_not_run_is_in_its_full_listing(desk, queued):
    first = queued()
    second = queued("-W", f"depend=afterok:{first}")
    assert "comment = needs nowhere: no client has it" in desk("qstat", "-f", first)
    assert f"comment = held by afterok:{first}" in desk("qstat", "-f", second)


# ---------------------------------------------------------------------------------------------------------------------
# What tools that drive PBS rely on
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [
    "qstat", "qdel", "qhold", "qrls", "qrerun", "qalter -p 1", "qmove default", "tracejob", "qcat", "qwait",
])  # fmt: skip
@pytest.mark.parametrize("name", ["999999", "999999[]", "999999[1-2]"])
def test_an_unknown_job_is_exit_code_153_and_a_line_on_stderr(desk, words, name):
    line = desk.fails(*words.split(), name, code=153)
    assert "Unknown Job Id" in line and name.split("[")[0] in line


def test_qstat_lists_the_jobs_it_knows_and_names_the_others(desk, queued):
    job = queued()
    code, out, err = desk.lab.command("qstat", "-f", "-F", "json", "-x", "999999", job, server=desk.server)
    assert (code, list(json.loads(out)["Jobs"])) == (153, [job]) and "999999" in one_line(err)
    code, out, err = desk.lab.command("qstat", "999999", job, server=desk.server)
    assert (code, len(out.splitlines())) == (153, 3) and "999999" in one_line(err)


@pytest.mark.parametrize("link", [os.symlink, lambda path, name: open(name, "wb").write(open(path, "rb").read())])
def test_a_link_or_copy_under_a_commands_name_is_that_command(desk, tmp_path, link):
    for name in ("qsub", "qstat", "qdel"):
        link(os.path.join(ROOT, "jobrunner.py"), str(tmp_path / name))

    def run(name, *words, code=0):
        environment = {**os.environ, "JOBRUNNER_SERVER": desk.server.url}
        done = subprocess.run([sys.executable, str(tmp_path / name), *words], env=environment, stdout=subprocess.PIPE,
                              cwd=desk.lab.folder, encoding="utf-8", timeout=60)  # fmt: skip
        assert done.returncode == code
        return done.stdout

    options = ['-N="my job"', "-V", "-l select=1:ncpus=2:mpiprocs=2:mem=1gb", "-l place=scatter:shared", "-l nowhere"]
    lines = ["#!/bin/bash", *(f"#PBS {option}" for option in [*options, "-e /dev/null", "-o /dev/null"]), "", "true"]
    desk.lab.write("psij.job", "\n".join(lines))
    name = run("qsub", desk.lab.path("psij.job")).split()[-1]
    job = json.loads(run("qstat", "-f", "-F", "json", "-x", name))["Jobs"][name]
    assert (job["Job_Name"], job["job_state"], job["Resource_List"]["ncpus"]) == ("my job", "Q", 2)
    assert job["comment"] and job["Variable_List"]["B"] == "from here"
    assert run("qstat", name).splitlines()[2].split()[4] == "Q"
    assert run("qdel", name) == ""
    assert json.loads(run("qstat", "-f", "-F", "json", "-x", name))["Jobs"][name]["job_state"] == "F"


@pytest.mark.parametrize("words", [
    "qhold", "qrls --name", "qrerun", "qalter 17", "qalter -p", "qalter -Z 17", "qmove", "qdel -W sometimes 17",
    "qselect 17", "tracejob", "qmgr create", "qsub -W max_fails=1 -- true", "qsub -J 1-x -- true",
    "qsub --sweep a -- true", "qsub -a soon -- true", "qstat -F xml",
])  # fmt: skip
def test_wrong_usage_is_exit_code_2(lab, words):
    code, out, err = lab.command(*words.split(), env={"JOBRUNNER_SERVER": "127.0.0.1:1"})
    assert (code, out) == (2, "") and ": error: " in err.splitlines()[-1]


# ---------------------------------------------------------------------------------------------------------------------
# Beside an original client
# ---------------------------------------------------------------------------------------------------------------------


def test_an_original_client_runs_subjobs_beside_ours(lab):
    server = lab.server()
    ran = lab.path("ran")
    record = {"Params": ["sh", "-c", 'echo "$1 by $0" >>"$2"', "{index}", "x{index}", ran], "Runtime": 60}
    (number,) = server.add({**record, "Array": "1-12", "MaxRunSubjobs": 3})

    def original():
        """One job, as an original client gets, runs and reports it; its ID."""
        status, job = server.get("/request", hostname="old")
        if status == 204:
            return None
        assert set(job) == {"ID", "Params", "Runtime"}
        subprocess.run(job["Params"], check=True, timeout=30)
        assert server.get("/finish", hostname="old", configuration=json.dumps(job)) == (200, None)
        return job["ID"]

    first, second = original(), original()
    lab.client(server, "--hostname", "new")
    until(lambda: server.get("/jobs", host="new")[1]["Total"], "our client to have one")
    until(lambda: (original() or True) and server.status()["States"]["F"] == 12, "all subjobs to be over")
    jobs = server.get("/jobs", number=number)[1]["Jobs"]
    assert {job["Status"] for job in jobs} == {"finished"} and {job["Host"] for job in jobs} == {"old", "new"}
    assert [job["Index"] for job in jobs if job["ID"] in (first, second)] == [1, 2]
    assert sorted(open(ran).read().split("\n")[:-1]) == sorted(f"x{n} by {n}" for n in range(1, 13))


# ---------------------------------------------------------------------------------------------------------------------
# pbsnodes
# ---------------------------------------------------------------------------------------------------------------------


def test_pbsnodes_takes_a_host_out_of_use_returns_it_and_lets_its_client_end(lab):
    desk = Desk(lab)
    client = desk.client
    gate = lab.path("gate")
    (running,) = desk.server.add(["sh", "-c", 'while [ ! -e "$1" ]; do sleep 0.05; done', "sh", gate])
    until(lambda: desk.server.job(running)["State"] == "R")
    desk("pbsnodes", "-o", "node07", "-C", "new disk")
    assert "state = offline\n" in desk("pbsnodes") and desk("pbsnodes", "-l").split() == ["node07", "offline", "new", "disk"]
    (waiting,) = desk.server.add(["true"])
    assert "every client that is connected is offline" in desk("qstat", "-f", waiting)
    desk("pbsnodes", "-r", "node07")
    assert desk.server.over(waiting)["Status"] == "finished" and desk("pbsnodes", "-l") == ""

    desk("pbsnodes", "--drain", "node07")
    (left,) = desk.server.add(["true"])
    assert desk.server.job(running)["State"] == "R" and client.poll() is None
    lab.write("gate", "")
    assert client.wait(30) == 0
    assert (desk.server.job(running)["Status"], desk.server.job(left)["State"]) == ("finished", "Q")
    assert "no-such-host" in desk.fails("pbsnodes", "-o", "no-such-host")

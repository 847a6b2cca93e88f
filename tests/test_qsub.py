"""What qsub, #PBS lines, qalter and qmgr understand: text in, keys of the record out.  No server, no process."""

import os
from datetime import datetime

import pytest

import jobrunner
from jobrunner import BadRequest, WrongUsage, parse_time


def read(*words):
    """What qsub's options among the words put into the record."""
    return jobrunner.read_options(list(words), jobrunner.QSUB_OPTIONS)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Resources
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, record",
    [
        ("host=node07", {"Requires": ["host=node07"]}),
        ("windows", {"Requires": ["windows"]}),
        ("java17,big-disk", {"Requires": ["java17", "big-disk"]}),
        ("bigmem=True", {"Requires": ["bigmem"]}),
        ("procs=4", {"Ncpus": 4}),
        ("place=scatter:shared", {"Place": "scatter:shared"}),
        ("select=1:ncpus=2:mpiprocs=2:mem=1gb", {"Ncpus": 2, "Memory": 1 << 30}),
        ("select=ncpus=2", {"Ncpus": 2}),
        ("select=1", {}),
        ("select=1:host=node07:ncpus=3,walltime=60", {"Requires": ["host=node07"], "Ncpus": 3, "Runtime": 60}),
        ("nodes=1:ppn=2", {"Ncpus": 2}),
        ("nodes=1:ppn=2:java17:mem=1kb", {"Ncpus": 2, "Requires": ["java17"], "Memory": 1024}),
        ("nodes=node07:ppn=2", {"Ncpus": 2, "Requires": ["host=node07"]}),
        ("nodes=1", {}),
    ],
)
def test_resources_in_the_ways_of_pbs_pro_and_torque(text, record):
    assert jobrunner.parse_resources(text) == record


@pytest.mark.parametrize(
    "text", ["select=2:ncpus=1", "nodes=4:ppn=2", "nodes=1:ppn=2+1:ppn=1", "nodes=a+b", "select=0"]
)
def test_resources_of_more_than_one_node_are_refused_with_the_reason(text):
    with pytest.raises(BadRequest, match="is not one node, and a job here runs on one"):
        jobrunner.parse_resources(text)


@pytest.mark.parametrize(
    "text, named",
    [
        ("ngpus=1", "ngpus=1"),
        ("select=1:ngpus=1", "ngpus=1"),
        ("nodes=1:gpus=2", "gpus=2"),
        ("a b", "a b"),
        ("x=", "x="),
    ],
)
def test_a_resource_that_cannot_be_given_is_refused_by_name(text, named):
    with pytest.raises(BadRequest, match=f"there is no '{named}'"):
        jobrunner.parse_resources(text)


def test_several_l_come_together_and_another_host_stands_for_the_first():
    given = read("-l", "walltime=60,java17", "-lncpus=2,host=a", "-l", "walltime=90,host=b,java17")
    assert given == {"Runtime": 90, "Ncpus": 2, "Requires": ["host=b", "java17"]}


# ---------------------------------------------------------------------------------------------------------------------
# Variables and quotes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, pieces",
    [
        ("", []),
        ("a,b", ["a", "b"]),
        ("a,,b", ["a", "", "b"]),
        ("'a,b',c", ["a,b", "c"]),
        ('A="1,2",B=\'3,"4\'', ["A=1,2", 'B=3,"4']),
        (r"A=1\,2,B", ["A=1,2", "B"]),
        (r"A=C:\dir\x,B=\\host\share", [r"A=C:\dir\x", r"B=\\host\share"]),
        ("A=it's,B=5\"", ["A=it's", 'B=5"']),
        ('A={"x":1}', ['A={"x":1}']),
        ("A='x'y,B", ["A='x'y", "B"]),
        ("A=x=y", ["A=x=y"]),
        ("A=line\nline", ["A=line\nline"]),
    ],
    ids=ascii,
)
def test_commas_part_what_is_not_quoted_and_everything_else_is_data(text, pieces):
    assert jobrunner.split_quoted(text) == pieces


def test_a_variable_without_a_value_has_the_callers():
    caller = {"B": "x,y=z", "C": ""}
    assert jobrunner.parse_variables("A=1,B, C,D=", caller) == {"A": "1", "B": "x,y=z", "C": "", "D": ""}


@pytest.mark.parametrize("text", ["NO_SUCH", "=1", 'A={"a":1,"b":2}', "A=1,,B=2"])
def test_what_is_no_variable_is_refused(text):
    with pytest.raises(BadRequest, match="variable"):
        jobrunner.parse_variables(text, {})


def test_all_of_the_callers_variables_are_taken_with_V_and_v_wins(monkeypatch):
    monkeypatch.setenv("JOBRUNNER_TEST", "caller")
    given = jobrunner.with_items(read("-v", "JOBRUNNER_OTHER=mine,PATH=/x", "-V"))
    assert given["Env"] == {**os.environ, "JOBRUNNER_OTHER": "mine", "PATH": "/x"}
    assert given["Env"]["JOBRUNNER_TEST"] == "caller" and set(given) == {"Env"}


# ---------------------------------------------------------------------------------------------------------------------
# Attributes, dependencies, arrays
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, record",
    [
        ("depend=afterok:17", {"Depend": ["afterok:17"]}),
        ("depend=afterok:17:18,afterany:19[],block=true",
         {"Depend": ["afterok:17", "afterok:18", "afterany:19[]"], "block": True}),
        ("block=true,depend=after:1[3],retry=2", {"block": True, "Depend": ["after:1[3]"], "Retries": 2}),
        ("depend=afterokarray:17[]", {"Depend": ["afterok:17[]"]}),
        ("depend=", {"Depend": []}),
        ("depend=none", {"Depend": []}),
        ("block=false", {"block": False}),
        ("max_fails=3,max_run_subjobs=0", {"MaxFails": 3, "MaxRunSubjobs": 0}),
        ("umask=022", {"Umask": "022"}),
    ],
)  # fmt: skip
def test_attributes(text, record):
    assert jobrunner.parse_attributes(text) == record


@pytest.mark.parametrize(
    "text, words",
    [
        ("sometimes", "there is no 'sometimes'"),
        ("stagein=a@b:c", "there is no 'stagein=a@b:c'"),
        ("depend=before:17", "'before:17' is no dependency"),
        ("depend=afterok", "'afterok' is no dependency"),
        ("depend=afterok:17:", "is no dependency"),
        ("retry=-1", "'-1' is not a number"),
        ("block=perhaps", "neither yes nor no"),
    ],
)
def test_what_is_no_attribute_is_refused(text, words):
    with pytest.raises(BadRequest, match=words):
        jobrunner.parse_attributes(text)


@pytest.mark.parametrize(
    "text, record",
    [
        ("1-100", {"Array": "1-100"}),
        ("1-100:2%10", {"Array": "1-100:2", "MaxRunSubjobs": 10}),
        ("1,10,50-100%5", {"Array": "1,10,50-100", "MaxRunSubjobs": 5}),
        ("0", {"Array": "0"}),
    ],
)
def test_arrays_in_the_ways_of_pbs_pro_and_torque(text, record):
    assert jobrunner.parse_array(text) == record


@pytest.mark.parametrize("text", ["", "x", "5-1", "1-", "-1", "1-5:0", "1,,2", "1-5%", "1-5%0", "1-5%x", "1 - 5", "١"])
def test_what_are_no_indices_is_refused(text):
    with pytest.raises(BadRequest):
        jobrunner.parse_array(text)


def test_ranges_hold_the_indices_that_were_meant():
    assert [list(indices) for indices in jobrunner.parse_ranges("1-10:3,0,20-21")] == [[1, 4, 7, 10], [0], [20, 21]]


def test_a_sweep_has_every_combination_and_the_first_name_changes_most_slowly():
    given = jobrunner.with_items(read("--sweep", "a=1,2", "b='x,y',", "--sweep=c=é"))
    assert given["Items"] == [{"a": a, "b": b, "c": "é"} for a in "12" for b in ("x,y",)]
    assert jobrunner.sweep_items({"a": ["1", "2"], "b": ["3", "4"]}) == [
        {"a": "1", "b": "3"}, {"a": "1", "b": "4"}, {"a": "2", "b": "3"}, {"a": "2", "b": "4"},
    ]  # fmt: skip


def test_a_sweep_that_is_larger_than_any_array_is_refused_before_it_is_made():
    with pytest.raises(BadRequest, match="1000000000000 combinations"):
        jobrunner.sweep_items({name: ["x"] * 1000 for name in "abcd"})


@pytest.mark.parametrize("text", ["a", "=1", "1a=2", "a b=1", "é=1"])
def test_what_cannot_be_swept_over_is_refused(text):
    with pytest.raises(BadRequest, match="nothing to sweep over"):
        jobrunner.parse_sweep(text)


def test_each_line_that_is_not_blank_is_an_item(tmp_path):
    path = tmp_path / "lines"
    path.write_bytes("\ufeffone\r\n\n two \u2028x\n  \n\xe9\n".encode() + b"caf\xe9")
    items = jobrunner.with_items(read("--each-line", str(path)))["Items"]
    assert items == ["one", " two \u2028x", "\xe9", b"caf\xe9".decode("utf-8", "surrogateescape")]
    path.write_text("\n \n")
    with pytest.raises(WrongUsage, match="no line"):
        jobrunner.with_items(read("--each-line", str(path)))


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--each-line", "x", "--sweep", "a=1"], "two arrays"),
        (["-W", "max_fails=1"], "max_fails is for arrays"),
        (["-W", "max_run_subjobs=1"], "max_run_subjobs is for arrays"),
    ],
)
def test_arrays_that_make_no_sense_are_refused(words, sentence):
    with pytest.raises(WrongUsage, match=sentence):
        jobrunner.with_items(read(*words))


# ---------------------------------------------------------------------------------------------------------------------
# Times
# ---------------------------------------------------------------------------------------------------------------------

NOON = datetime(2026, 11, 24, 12, 0, 30).timestamp()


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("1300", (2026, 11, 24, 13, 0)),
        ("1201.15", (2026, 11, 24, 12, 1, 15)),
        ("1200", (2026, 11, 25, 12, 0)),
        ("0000", (2026, 11, 25, 0, 0)),
        ("250130", (2026, 11, 25, 1, 30)),
        ("240130", (2026, 12, 24, 1, 30)),
        ("310000", (2026, 12, 31, 0, 0)),
        ("12010000", (2026, 12, 1, 0, 0)),
        ("01020304", (2027, 1, 2, 3, 4)),
        ("02290000", (2028, 2, 29, 0, 0)),
        ("2703040506", (2027, 3, 4, 5, 6)),
        ("202703040506.07", (2027, 3, 4, 5, 6, 7)),
        ("202003040506", (2020, 3, 4, 5, 6)),
    ],
)
def test_a_time_in_pbs_way_is_the_next_that_fits_in_local_time(text, wanted):
    assert parse_time(jobrunner.parse_start(text, NOON)) == datetime(*wanted).timestamp()


def test_a_time_in_the_records_way_is_itself():
    assert jobrunner.parse_start("2026-11-23T17:27:00+01:00") == "2026-11-23T16:27:00.000000Z"


@pytest.mark.parametrize(
    "text", ["", "soon", "2500", "1260", "12", "12345", "1200.60", "202602300000", "13010000", "12:00"]
)
def test_what_is_no_time_is_refused(text):
    with pytest.raises(BadRequest, match="is not a time"):
        jobrunner.parse_start(text, NOON)


# ---------------------------------------------------------------------------------------------------------------------
# Command lines
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, record",
    [
        (["-N", "x y", "-q", "long", "-p", "-5"], {"Name": "x y", "Queue": "long", "Priority": -5}),
        (["-Nx", "-p+7"], {"Name": "x", "Priority": 7}),
        (["-N=x", "-A=a=b"], {"Name": "x", "Account": "a=b"}),
        (["-N", ""], {"Name": ""}),
        (["-hVz"], {"Hold": True, "environ": True, "quiet": True}),
        (["-hN", "x"], {"Hold": True, "Name": "x"}),
        (["-r", "n"], {"Rerunable": False}),
        (["-r", "y"], {"Rerunable": True}),
        (["-o", "/dev/null", "-e", "DIR/", "-j", "oe"], {"StdOut": "/dev/null", "StdErr": "DIR/", "Join": "oe"}),
        (["-o", r"C:\out\x"], {"StdOut": r"C:\out\x"}),
        (["-S", "/bin/bash", "-d", "/tmp"], {"Shell": "/bin/bash", "WorkDir": "/tmp"}),
        (["-w", "/home/ann"], {"SubmitDir": "/home/ann"}),
        (["-m", "n", "-M", "a@b,c", "-k", "eo"], {"MailPoints": "n", "MailUsers": "a@b,c", "KeepFiles": "eo"}),
        (["-A", "acc", "-P", "proj"], {"Account": "acc", "Project": "proj"}),
        (["-v", "A=1", "-v", "B=2,A=3"], {"Env": {"A": "3", "B": "2"}}),
        (["-J", "1-4%2"], {"Array": "1-4", "MaxRunSubjobs": 2}),
        (["-t", "1,3"], {"Array": "1,3"}),
        (["--file=x"], {"file": "x"}),
        (["--server", "here"], {"server": "http://here:8088"}),
    ],
    ids=" ".join,
)
def test_each_option_of_qsub_is_in_the_record(words, record):
    assert read(*words) == record


@pytest.mark.parametrize(
    "words, left",
    [
        (["-N", "x", "job.sh", "-N", "y"], ["job.sh", "-N", "y"]),
        (["-h", "--", "prog", "-h"], ["--", "prog", "-h"]),
        (["-", "-h"], ["-", "-h"]),
        (["--sweep", "a=1", "b=2", "job.sh", "c=3"], ["job.sh", "c=3"]),
        ([], []),
    ],
)
def test_options_end_at_the_first_word_that_is_none(words, left):
    assert jobrunner.read_options(words, jobrunner.QSUB_OPTIONS)[1] == left


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["-Z"], "there is no option -Z"),
        (["-hZ"], "there is no option -Z"),
        (["--nonsense=1"], "there is no option --nonsense"),
        (["-I"], "there is no option -I: a job has no terminal"),
        (["-N"], "-N needs a value"),
        (["-l", "walltime=soon"], "-l: walltime: 'soon' is not a duration"),
        (["-p", "high"], "-p: 'high' is not a whole number"),
        (["-p", "1024"], "-p: the priority must be from -1024 to 1023"),
        (["-r", "maybe"], "-r: 'maybe' is neither"),
        (["-j", "x"], "-j: 'x' joins nothing"),
        (["-o", "node07:/out"], "-o: 'node07:/out' names a host"),
    ],
    ids=" ".join,
)
def test_what_qsub_does_not_know_is_refused_by_name(words, sentence):
    with pytest.raises(WrongUsage, match=sentence):
        read(*words)


@pytest.mark.parametrize("flag", ["-q", "-h", "-J", "-t", "-V", "--sweep", "--file", "-C"])
def test_qalter_does_not_take_what_cannot_be_altered(flag):
    with pytest.raises(WrongUsage, match=f"there is no option {flag}"):
        jobrunner.read_options([flag, "x=1"], jobrunner.QALTER_OPTIONS)


def test_qalter_takes_qsubs_options_and_a_selection():
    words = ["-l", "walltime=60", "--name", "sweep", "--status=failed", "-W", "max_run_subjobs=3", "17[]"]
    given, names = jobrunner.read_options(words, jobrunner.QALTER_OPTIONS)
    assert given["select"] == {"Name": "sweep", "Status": "failed"} and names == ["17[]"]
    assert jobrunner.sent(given) == {"Runtime": 60, "MaxRunSubjobs": 3}


@pytest.mark.parametrize(
    "program, words",
    [
        ("jobrunner.py", ["qstat", "-x"]),
        ("/usr/local/bin/qstat", ["-x"]),
        ("qstat.py", ["-x"]),
        ("QSTAT.PY", ["-x"]),
        ("./qstat.exe", ["-x"]),
    ],
)
def test_started_under_the_name_of_a_command_it_is_that_command(program, words):
    assert jobrunner.command_line([program, *words]) == ["qstat", "-x"]


def test_every_command_that_talks_to_the_server_can_be_started_under_its_name():
    subparsers = next(a for a in jobrunner.arguments()._actions if a.dest == "command")
    assert jobrunner.COMMANDS == set(subparsers.choices) - {"run"}
    assert jobrunner.command_line(["qsub", "--version"]) == ["--version"]


# ---------------------------------------------------------------------------------------------------------------------
# Scripts
# ---------------------------------------------------------------------------------------------------------------------

PSIJ = """#!/bin/bash

#PBS -N="my job"
#PBS -V
#PBS -l select=1:ncpus=2:mpiprocs=2
#PBS -l place=scatter:shared

#PBS -l walltime=0:10:00
#PBS -e /dev/null
#PBS -o /dev/null

echo "$PBS_JOBID"
#PBS -N late
"""


def test_a_scripts_options_are_those_before_its_first_command():
    assert jobrunner.script_options(PSIJ) == {
        "Name": "my job", "environ": True, "Ncpus": 2, "Place": "scatter:shared", "Runtime": 600,
        "StdErr": "/dev/null", "StdOut": "/dev/null",
    }  # fmt: skip


@pytest.mark.parametrize(
    "line, words",
    [
        ('#PBS -N "two words"', ["-N", "two words"]),
        ("#PBS -N 'two words' -h", ["-N", "two words", "-h"]),
        ("#PBS -v A='x,y'", ["-v", "A=x,y"]),
        ("#PBS -v \"A='x,y'\"", ["-v", "A='x,y'"]),
        (r"#PBS -o C:\out\new", ["-o", r"C:\out\new"]),
        ("#PBS -N x # a comment", ["-N", "x"]),
        ("#PBS -N a#b", ["-N", "a#b"]),
        ("#PBS\t-h\r", ["-h"]),
        ("#PBS", []),
        ("REM PBS -h", ["-h"]),
        ("@rem PBS -h", ["-h"]),
        ("::PBS -h", ["-h"]),
    ],
    ids=ascii,
)
def test_the_words_of_a_line_with_options(line, words):
    assert list(jobrunner.script_lines(line)) == [(1, words)]


@pytest.mark.parametrize("line", ["##PBS -h", "# PBS -h", "#PBSX -h", " #PBS -h", "echo #PBS -h", "#pbs -h"])
def test_lines_that_only_look_like_options_are_none(line):
    assert jobrunner.script_options(line) == {}


def test_a_byte_order_mark_a_batch_files_head_and_another_prefix_do_no_harm():
    assert jobrunner.script_options("\ufeff#PBS -h\r\n\r\n#PBS -N x\r\n") == {"Hold": True, "Name": "x"}
    assert jobrunner.script_options("@echo off\r\nREM PBS -N x\r\nset A=1\r\nREM PBS -h\r\n") == {"Name": "x"}
    assert jobrunner.script_options("#PBS -h\n#JOB -N x\n", "#JOB") == {"Name": "x"}


@pytest.mark.parametrize(
    "text, words",
    [
        ("#!/bin/sh\n#PBS -Z x", "line 2: there is no option -Z"),
        ("#PBS -N two words", "line 1: 'words' is no option"),
        ("\n\n#PBS -N 'x", "line 3: a quote is opened"),
        ("#PBS --server here", "line 1: there is no option --server"),
        ("#PBS -l nodes=2", "line 1: -l: nodes: '2' is not one node"),
    ],
)
def test_a_script_with_a_wrong_option_is_refused_with_its_line(text, words):
    with pytest.raises(BadRequest, match=words):
        jobrunner.script_options(text)


def test_the_command_line_wins_over_the_script(tmp_path):
    path = tmp_path / "job.sh"
    path.write_text("#!/bin/sh\n#PBS -N script -l walltime=60,ncpus=2 -v A=1,B=1\necho\n")
    given, left = jobrunner.read_options(
        ["-N", "line", "-lncpus=3", "-vB=2", str(path), "-N", "x"], jobrunner.QSUB_OPTIONS
    )
    _, (job,) = jobrunner._to_submit(given, left)
    assert (job["Name"], job["Runtime"], job["Ncpus"], job["Env"]) == ("line", 60, 3, {"A": "1", "B": "2"})
    assert (job["Params"], job["ScriptName"]) == (["job.sh", "-N", "x"], "job.sh")
    assert job["Script"] == path.read_text() and job["SubmitDir"] == os.getcwd() and "@" in job["Owner"]
    assert all(key[0].isupper() for key in job)


def test_a_script_that_is_not_there_or_no_text_is_refused_and_the_way_for_a_command_named(tmp_path):
    with pytest.raises(WrongUsage, match="cannot read java: .* put it after --: qsub -- java"):
        jobrunner._to_submit({}, ["java", "-jar"])
    path = tmp_path / "prog"
    path.write_bytes(b"\x7fELF\0")
    with pytest.raises(WrongUsage, match="is no text"):
        jobrunner._to_submit({}, [str(path)])


# ---------------------------------------------------------------------------------------------------------------------
# qmgr
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, wish",
    [
        ("create queue long", ("create", ["long"], {})),
        ("create queue long queue_type=execution", ("create", ["long"], {})),
        ("create queue a,b max_run = 3", ("create", ["a", "b"], {"MaxRun": 3})),
        ("set queue long max_run = 10", ("set", ["long"], {"MaxRun": 10})),
        ("set queue long max_run=10,enabled=true , Priority = -5",
         ("set", ["long"], {"MaxRun": 10, "Enabled": True, "Priority": -5})),
        ("set queue long resources_max.walltime = 24:00:00", ("set", ["long"], {"MaxWalltime": 86400})),
        ('set queue long resources_default.walltime = "1:00:00"', ("set", ["long"], {"DefaultWalltime": 3600})),
        ("s q long started = False", ("set", ["long"], {"Started": False})),
        ("set queue long max_run = [o:PBS_ALL=7]", ("set", ["long"], {"MaxRun": 7})),
        ("set queue long max_running = 7", ("set", ["long"], {"MaxRun": 7})),
        ("set queue long MAX_RUN = 0", ("set", ["long"], {"MaxRun": 0})),
        ("unset queue long max_run, enabled", ("unset", ["long"], {"MaxRun": 0, "Enabled": True})),
        ("delete queue long", ("delete", ["long"], {})),
        ("list queue", ("list", [], {})),
        ("list queue @default", ("list", [], {})),
        (" print  queue  long ", ("print", ["long"], {})),
        ("p s", ("print", [], {})),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_qmgrs_commands_as_in_pbs(text, wish):
    assert jobrunner.parse_qmgr(text) == wish


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "qmgr knows no ''"),
        ("explode queue long", "qmgr knows no 'explode queue long'"),
        ("create node pc", "knows no 'node'"),
        ("set server scheduling = true", "knows no 'server'"),
        ("create queue", "say which"),
        ("delete queue", "say which"),
        ("set queue long", "say what"),
        ("set queue long max_run", "NAME = VALUE"),
        ("set queue long max_run += 1", "NAME = VALUE"),
        ("set queue long max_run =", "NAME = VALUE"),
        ("set queue long max_run = many", "max_run: 'many' is not a number"),
        ("set queue long acl_users = a", "a queue has no acl_users: its attributes are Priority"),
        ("set queue long enabled = perhaps", "enabled: 'perhaps' is neither"),
        ("set queue long queue_type = route", "a queue has no queue_type"),
        ("unset queue long max_run = 1", "its name"),
        ("delete queue long max_run = 1", "cannot be done"),
    ],
)
def test_what_qmgr_cannot_do_is_refused_with_the_word_at_fault(text, words):
    with pytest.raises(BadRequest, match=words):
        jobrunner.parse_qmgr(text)


def test_qmgr_reads_a_command_a_line_or_several_and_skips_comments():
    text = "# all\n\ncreate queue a; set queue a max_run = 1;\r\n  # more\n list queue\n"
    assert list(jobrunner.qmgr_commands(text)) == [
        (3, "create queue a"),
        (3, "set queue a max_run = 1"),
        (5, "list queue"),
    ]


QUEUE = {"Name": "long", "Priority": 5, "Enabled": True, "Started": False, "MaxRun": 10, "DefaultWalltime": 3600,
         "MaxWalltime": 0, "States": {"Q": 3, "H": 1, "W": 0, "R": 2, "F": 9}}  # fmt: skip


def test_what_qmgr_prints_makes_the_same_queue_again():
    text = "\n".join(jobrunner.qmgr_print(QUEUE))
    made = {}
    for _, command in jobrunner.qmgr_commands(text):
        wish = jobrunner.parse_qmgr(command)
        assert wish.names == ["long"]
        made.update(wish.attributes)
    assert made == {key: QUEUE[key] for key in ("Priority", "Enabled", "Started", "MaxRun", "DefaultWalltime")}
    assert "create queue long" in text
    assert "create" not in "".join(jobrunner.qmgr_print({**QUEUE, "Name": "default"})[3:])


def test_what_is_swept_over_twice_is_refused_and_not_dropped():
    with pytest.raises(jobrunner.WrongUsage, match="a is swept over twice"):
        jobrunner.read_options(["--sweep", "a=1", "b=2", "a=3"], jobrunner.QSUB_OPTIONS)

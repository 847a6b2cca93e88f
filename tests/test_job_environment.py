"""What a job is given: its script and what runs it, its environment, a folder for temporary files; all with real jobs.

One client is shared by the tests that leave it as it was.  Its own environment holds what that of a job of a cluster
does, since a client may well be one, and its temporary files go to the lab's folder `tmp`.
"""

import json
import os
import stat

import pytest

from harness import Lab, PATIENCE, read, shell, until
from test_client import WORDS, Shop, folders, noted, python

pytestmark = pytest.mark.skipif(os.name == "nt", reason="sh and /proc: Windows has a file of its own")

INHERITED = {"PBS_JOBID": "99[9].cluster", "PBS_ARRAY_INDEX": "9", "PBS_WALLTIME": "9", "PBS_O_WORKDIR": "/there",
             "PBS_NODEFILE": "/there/nodes", "PBS_EXEC": "/opt/pbs"}  # fmt: skip
ENVIRON = "import json, os; print(json.dumps(dict(os.environ)))"


def start(lab, *flags, **kwargs):
    """A client that has inherited the environment of a job of a cluster."""
    os.makedirs(lab.path("tmp"), exist_ok=True)
    return lab.client(*flags, env={**os.environ, **INHERITED, "TMPDIR": lab.path("tmp"), "TEMP": lab.path()}, **kwargs)


class Yard(Shop):
    """A shop whose client was started so."""

    def __init__(self, lab):
        self.lab, self.server = lab, lab.server("--offline-after", 0)
        self.client = start(lab, self.server, "--hostname", "yard", "--kill-delay", "0.5", max_jobs=4)

    def script(self, text, *arguments, name="job.sh", **record):
        """What a script that finished printed."""
        return self.output([name, *arguments], Script=text, ScriptName=name, **record)

    def environ(self, **record):
        return json.loads(self.output(python(ENVIRON), **record))


@pytest.fixture(scope="module")
def yard(tmp_path_factory):
    with Lab(str(tmp_path_factory.mktemp("yard"))) as lab:
        yield Yard(lab)


def temp_folders(lab):
    """The private folders of runs; a spare one for the runs to come is empty and bears no run's name."""
    (own,) = os.listdir(lab.path("tmp"))
    return [os.path.join(lab.path("tmp", own), name) for name in os.listdir(lab.path("tmp", own))]


# ---------------------------------------------------------------------------------------------------------------------
# Scripts
# ---------------------------------------------------------------------------------------------------------------------


def test_a_script_runs_by_its_hash_bang_line_else_by_sh_and_by_its_shell_before_either(yard):
    code = "#!/usr/bin/env python3\nimport json, sys; print(json.dumps(sys.argv[1:]))\n"
    assert json.loads(yard.script(code, *WORDS, name="job.py")) == WORDS
    assert {"e", "u"} <= set(yard.script("#! /bin/sh -eu \necho $-"))
    assert yard.script("readlink /proc/$$/exe") == os.path.realpath("/bin/sh") + "\n"
    shell = "echo ${BASH_VERSION:+bash}"
    assert [yard.script(f"#!/bin/{at}\n{shell}", Shell="/bin/bash") for at in ("sh", "no")] == ["bash\n"] * 2
    assert yard.script("", name="STDIN") == ""


def test_a_script_from_windows_runs_its_hash_bang_line_has_a_carriage_return(yard):
    text = "#!/bin/sh\r\nif true; then\r\n  printf '%s.' a b\r\nfi\r\n"
    assert yard.script(text) == "a.b."
    assert yard.script("\ufeffprintf '%s.' a b\r\nexit\r\n") == "a.b."


def test_else_a_script_is_kept_to_the_byte(yard):
    odd = b"caf\xe9\xff".decode("utf-8", "surrogateescape")
    text = f'cat "$0"\nexit\nline\r\nlone \r {odd} é日😀\t\x01 no line end'
    assert yard.script(text) == text


@pytest.mark.parametrize("name", ["log", "../../log", "日本 x.sh", "-x", "a\nb'\"; c", "x" * 300 + ".sh", "con.bat"])
def test_whatever_a_script_is_called_its_file_is_in_the_runs_folder_and_nothing_else_is_touched(yard, name):
    path = yard.script('echo "$0"; test -s "${0%/*}/log"', name=name).strip("\n")
    folder, file = os.path.split(path)
    assert os.path.dirname(folder) == yard.lab.path("jobrunner-spool", "jobs") and file.startswith("script-")
    assert len(file) < 100
    until(lambda: not os.path.exists(folder), "the folder to go")


@pytest.mark.parametrize("params, record, words", [
    ([], {"Script": "#!/no/such/shell\n"}, ["/no/such/shell", "No such file"]),
    ([], {"Script": "true", "Shell": "/no/such/shell"}, ["/no/such/shell", "No such file"]),
    ([], {"Script": "echo \ud800"}, ["cannot start job.sh", "surrogate"]),
    (["x" * 200_000], {"Script": "true"}, ["too long"]),
    ([], {"Script": "true", "Env": {"A": "x" * 200_000}}, ["too long"]),
])  # fmt: skip
def test_a_script_that_cannot_be_run_has_failed_with_minus_8_and_its_comment_says_why(yard, params, record, words):
    job = yard.run(["job.sh", *params], ScriptName="job.sh", **record)
    assert (job["Status"], job["ExitStatus"]) == ("failed", -8), job
    assert all(word in job["Comment"] for word in words) and "\n" not in job["Comment"], job["Comment"]
    until(lambda: job["ID"] not in folders(yard.lab), "its folder to go")


def test_a_client_with_allow_prefix_refuses_scripts_whatever_they_are_called_and_says_so(lab):
    server = lab.server()
    lab.client(server, "--allow-prefix", "echo", "--hostname", "picky")
    (number,) = server.add({"Params": ["echo"], "Script": "touch ran", "ScriptName": "echo"})
    words = until(lambda: (lambda text: "refused by" in text and text)(server.job(number).get("Comment") or ""), "its refusal")
    assert "refused by every client: picky: runs only" in words and "'echo', and no script" in words
    assert not os.path.exists(lab.path("ran"))


# ---------------------------------------------------------------------------------------------------------------------
# Its environment
# ---------------------------------------------------------------------------------------------------------------------


def pbs(environ):
    """What there is of PBS's, but for the paths, which each test looks at itself."""
    names = {name for name in environ if name.startswith(("PBS_", "JOBRUNNER_")) or name == "NCPUS"}
    return {name: environ[name] for name in names - {"PBS_NODEFILE", "PBS_JOBDIR"}}


def test_a_job_is_told_what_pbs_tells_it_and_nothing_of_the_job_its_client_runs_in(yard, tmp_path):
    record = {"Name": "my 'job'", "Ncpus": 2, "Runtime": 90, "SubmitDir": "/home/ann/é", "Owner": "ann@desk.lan"}
    (number,) = yard.server.add({"Params": python(ENVIRON), "WorkDir": str(tmp_path), **record})
    job = yard.server.over(number)
    environ = json.loads(yard.server.get("/output", id=number)[1]["StdOut"])
    assert pbs(environ) == {
        "PBS_JOBID": str(number), "PBS_JOBNAME": "my 'job'", "PBS_QUEUE": "default", "PBS_ENVIRONMENT": "PBS_BATCH",
        "PBS_O_WORKDIR": "/home/ann/é", "PBS_O_HOST": "desk.lan", "PBS_O_LOGNAME": "ann", "PBS_NP": "2", "NCPUS": "2",
        "PBS_WALLTIME": "90", "JOBRUNNER_RUN_COUNT": "1", "PBS_EXEC": "/opt/pbs",
    }  # fmt: skip
    assert environ["PBS_JOBDIR"] == str(tmp_path)
    assert not any("lease" in name.lower() or text == job.get("Lease", "") for name, text in environ.items())


def test_a_job_that_says_little_is_told_little_and_runs_in_its_clients_folder(yard):
    environ = yard.environ()
    assert not {"PBS_WALLTIME", "PBS_O_WORKDIR", "PBS_O_HOST", "PBS_ARRAY_INDEX", "PBS_ARRAYID"} & set(environ)
    assert environ["PBS_JOBDIR"] == os.path.realpath(yard.lab.path()) and environ["NCPUS"] == "1"


def test_a_subjob_is_told_its_index_as_pbs_and_as_torque_call_it(yard):
    (number,) = yard.server.add({"Params": python(ENVIRON), "Array": "3-5:2"})
    for index in ("3", "5"):
        yard.server.over(f"{number}[{index}]")
        environ = json.loads(yard.server.get("/output", id=f"{number}[{index}]")[1]["StdOut"])
        assert (environ["PBS_JOBID"], environ["PBS_ARRAY_ID"]) == (f"{number}[{index}]", f"{number}[]")
        assert environ["PBS_ARRAY_INDEX"] == environ["PBS_ARRAYID"] == index


def test_its_own_env_does_not_change_what_pbs_says_of_it_but_the_place_for_temporary_files_it_may(yard):
    given = {"PBS_JOBID": "1", "PBS_ARRAY_INDEX": "7", "PBS_O_HOME": "/home/ann", "TMPDIR": "/somewhere", "A": ""}
    environ = yard.environ(Env=given)
    assert environ["PBS_JOBID"] != "1" and "PBS_ARRAY_INDEX" not in environ
    assert (environ["PBS_O_HOME"], environ["TMPDIR"], environ["A"]) == ("/home/ann", "/somewhere", "")


QUOTES = "'\"; rm -rf $HOME `id`\n&|%PATH%"


@pytest.mark.parametrize("text", [QUOTES, "é日本😀", "x" * 10_000], ids=["quotes", "é", "long"])
def test_names_and_values_come_to_the_process_to_the_letter_and_its_files_have_safe_names(yard, text):
    environ = yard.environ(Name=text, Env={"A b": text, text: "b"}, SubmitDir=text)
    assert [environ[name] for name in ("PBS_JOBNAME", "A b", "PBS_O_WORKDIR", text)] == [text, text, text, "b"]
    (name,) = [n for n in os.listdir(yard.lab.path("jobrunner-spool", "output")) if f".o{environ['PBS_JOBID']}" in n]
    assert name.isascii() and len(name) < 130 and not set(name) & set(" '\";$`&|%/\n")


def test_the_node_file_names_the_host_once_for_each_slot_also_after_a_job_has_spoiled_it(yard):
    show = 'cat "$PBS_NODEFILE"; echo x >"$PBS_NODEFILE"'
    assert [yard.output(shell(show), Ncpus=ncpus) for ncpus in (3, 1, 3)] == ["yard\n" * 3, "yard\n", "yard\n" * 3]
    assert yard.output(shell('rm "$PBS_NODEFILE"'), Ncpus=3) == ""
    assert yard.output(shell(show), Ncpus=3) == "yard\n" * 3


# ---------------------------------------------------------------------------------------------------------------------
# Its folder for temporary files
# ---------------------------------------------------------------------------------------------------------------------


def test_each_run_has_an_empty_private_folder_for_temporary_files_until_it_is_reported(yard):
    script = 'stat -c "%a %u" "$TMPDIR"; ls -A "$TMPDIR"; echo "$TMPDIR"; echo >"$TMPDIR/file"; chmod 755 "$TMPDIR"'
    for seen in range(3):
        mode, path = yard.output(shell(script)).splitlines()
        assert mode == f"700 {os.getuid()}" and os.path.dirname(os.path.dirname(path)) == yard.lab.path("tmp")
        until(lambda: not os.path.exists(path), "it to go")  # noqa: B023
    paths = [yard.output(shell('echo "$TMPDIR"')).strip() for _ in range(3)]
    assert len(set(paths)) == 3 and len(os.path.basename(paths[0])) <= 8
    until(lambda: not any(map(os.path.exists, paths)), "them to go")


def test_the_folder_goes_whatever_a_job_leaves_in_it_and_what_its_links_lead_to_stays(yard, tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir(mode=0o755)
    (kept / "file").write_text("kept")
    script = """cd "$TMPDIR"; mkdir -p a/b c; echo >a/b/x; ln -s "$1" a/link; ln -s "$1/file" f; mkfifo p; ln -s / c/root
        echo >c/y; chmod 0 a/b c; chmod 500 a .; echo "$TMPDIR" """
    path = yard.output(shell(script, str(kept))).strip()
    until(lambda: not os.path.exists(path), "it to go")
    assert (kept / "file").read_text() == "kept" and stat.S_IMODE(kept.stat().st_mode) == 0o755


def test_a_client_that_adopts_a_script_removes_its_folders_and_what_a_killed_client_left_behind(lab):
    server = lab.server()
    client = start(lab, server)
    text = 'echo "$TMPDIR" $PBS_JOBID >pid.txt; until [ -e go ]; do sleep 0.05; done; echo >"$TMPDIR/x"; exit 3'
    (number,) = server.add({"Params": ["job"], "Script": text, "ScriptName": "job", "StdOut": "out/"})
    os.mkdir(lab.path("out"))
    path, name = until(lambda: read(lab.path("pid.txt")).split(), "the script to run")
    until(lambda: noted(lab, "Pid"))
    client.kill()
    client.wait()
    (folder,) = folders(lab).values()
    os.mkdir(os.path.join(os.path.dirname(path), "left"))
    os.mkdir(lab.path("jobrunner-spool", "jobs", "begun.1"))  # killed between making it and writing into it
    start(lab, server)
    until(lambda: temp_folders(lab) == [path], "what was left behind to go")
    lab.write("go", "")
    assert server.over(number)["ExitStatus"] == 3 and name == str(number)
    until(lambda: not folders(lab) and not os.path.exists(path) and not os.path.exists(folder), "them to go")
    assert os.listdir(lab.path("out")) == [f"job.o{number}"]


@pytest.mark.parametrize("old, new", [('"Format": 1', '"Format": 2'), ('{"Format"', "\0")])
def test_a_run_that_a_client_cannot_read_and_leaves_keeps_its_temporary_files(lab, old, new):
    server = lab.server()
    client = start(lab, server)
    server.add(shell('echo "$TMPDIR" >path.txt; echo >"$TMPDIR/work"; until [ -e go ]; do sleep 0.05; done'))
    until(lambda: noted(lab, "Pid") and os.path.exists(os.path.join(read(lab.path("path.txt")).strip(), "work")))
    client.kill()
    client.wait()
    (folder,) = folders(lab).values()
    log = read(os.path.join(folder, "log"))
    lab.write(os.path.join(folder, "log"), log.replace(old, new, 1))
    start(lab, server)
    assert server.over(*server.add(["true"]))["Status"] == "finished"
    assert os.path.exists(os.path.join(read(lab.path("path.txt")).strip(), "work"))
    assert "spool.damaged" in lab.log("client.py.log")


def test_a_client_that_ends_in_peace_leaves_nothing_among_the_temporary_files(lab):
    server = lab.server()
    server.add(*[["true"]] * 3)
    assert start(lab, server, "--until-empty").wait(PATIENCE) == 0
    until(lambda: os.listdir(lab.path("tmp")) == [], "it to be empty")


def test_a_folder_for_temporary_files_that_somebody_else_was_first_to_make_is_not_used(lab):
    server, show = lab.server(), shell('echo "$TMPDIR"')
    paths = []
    for _ in range(2):
        (number,) = server.add(show)
        assert start(lab, server, "--until-empty").wait(PATIENCE) == 0
        paths.append(server.get("/output", id=number)[1]["StdOut"])
        own = os.path.dirname(paths[0])
        if not os.path.exists(own):
            os.mkdir(own)
            os.chmod(own, 0o777)
    assert paths[0].startswith(lab.path("tmp", "jr-"))
    assert paths[1].startswith(lab.path(os.path.basename(own)) + "/") and os.listdir(own) == []

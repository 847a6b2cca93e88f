"""Server, client and commands as real Windows programs, in every mix with Linux ones: how jobs end, what they are
given, limits, dead detection and usage from tasklist, restarts of both programs, refusals, the example file.

Windows is ../shared/windows/winpy (Python 3.8 and 3.13 for Windows, under Wine); where it does not work all of this is
skipped.  Its processes are seen in /proc with their command lines, so jobs here bear a word to be found by: process
numbers say little, Windows gives them out again at once.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import uuid

import pytest

from harness import Lab, PATIENCE, ROOT, read, until
from test_guest import Desk, record as leased

WINPY = os.path.normpath(os.path.join(ROOT, "..", "shared", "windows", "winpy"))
LINUX = "linux"
EXE = {LINUX: sys.executable}  # and of each Windows Python, as it calls itself


# ---------------------------------------------------------------------------------------------------------------------
# Windows programs: starting, seeing and ending them
# ---------------------------------------------------------------------------------------------------------------------


def native(path, system="3.8"):
    """A path of this machine as that system writes it."""
    return path if system == LINUX else "Z:\\host" + path.replace("/", "\\")


def start_of(system, program):
    """How to start one of the three programs on that system."""
    on_windows = [WINPY, "-" + system, "/host" + ROOT + "/" + program]
    return [sys.executable, os.path.join(ROOT, program)] if system == LINUX else on_windows


def command(system, folder, *words):
    """What `jobrunner.py ...` did on that system, its outputs in bytes."""
    line = start_of(system, "jobrunner.py") + [str(word) for word in words]
    return subprocess.run(
        line, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=2 * PATIENCE
    )


def taskkill(number, folder):
    """Ends a Windows process the hard way: it gets to do nothing any more."""
    code = "import subprocess, sys; sys.exit(subprocess.call(['taskkill', '/F', '/PID', sys.argv[1]]))"
    done = subprocess.run([WINPY, "-3.8", "-c", code, number], cwd=folder, stdin=subprocess.DEVNULL, timeout=PATIENCE)
    assert done.returncode == 0


def bearing(word):
    """{number: command line} of the processes, as Linux numbers them, that have this text in theirs."""
    found = {}
    for number in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{number}/cmdline", "rb") as file:
                line = file.read()
        except OSError:
            continue  # it has ended meanwhile
        if word.encode() in line:
            found[int(number)] = line.decode("utf-8", "replace")
    return found


def gone(*words):
    """Waits until no process bears one of these texts, which must be nobody else's: say uuids."""
    try:
        until(lambda: not any(map(bearing, words)), "what the jobs started to be gone")
    except AssertionError as error:
        raise AssertionError(f"{error}: {[bearing(word) for word in words]}") from None


def end(process):
    """Ends a program started by winpy, which is a bash that waits for it."""
    if process.poll() is None:
        with contextlib.suppress(OSError), open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
            for number in file.read().split():
                os.kill(int(number), signal.SIGKILL)
        process.kill()
    process.wait()


class WindowsLab(Lab):
    """A Lab whose programs run on Windows; `python` is [WINPY, "-3.8"] or the like."""

    def popen(self, program, *arguments, log=None, **kwargs):
        return super().popen("/host" + ROOT + "/" + program, *arguments, log=log or program + ".log", **kwargs)

    def __exit__(self, *_):
        for process in self.processes:
            end(process)
        super().__exit__()

    def _end_jobs(self):
        """Keepers are told the folder in their command lines; so are all jobs here that may outlive their client."""
        for number in bearing(native(self.folder)):
            try:
                os.kill(number, signal.SIGKILL)
            except ProcessLookupError:
                pass


def python_of(system):
    """What a Lab's `python` is for that system."""
    return EXE[LINUX] if system == LINUX else [WINPY, "-" + system]


def boot(version, folder):
    """A Windows Python that waits for the end of its input, and what it calls itself; skips where there is none."""
    if sys.platform != "linux" or not os.path.exists(WINPY):
        pytest.skip(f"no Windows Python here: there is no {WINPY}")
    path = folder / version  # a file, not a pipe: Windows' services keep open what they were started with
    line = [WINPY, "-" + version, "-c", "import sys; print(sys.executable, flush=True); sys.stdin.read()"]
    with open(path, "wb") as out:
        process = subprocess.Popen(line, cwd=folder, stdin=subprocess.PIPE, stdout=out, stderr=subprocess.STDOUT)
    with contextlib.suppress(AssertionError):
        until(lambda: path.read_bytes().endswith(b"\n") or process.poll() is not None, "Windows", 60)
    said = path.read_text(errors="replace").strip()
    if not said.endswith("python.exe"):
        end(process)
        pytest.skip(f"no Windows Python {version} here: `winpy -{version}` said {said[-200:]!r}: run its setup")
    return process, said


@pytest.fixture(scope="module", autouse=True)
def windows(tmp_path_factory):
    """Windows, up for as long as these tests take: it goes down with its last program, and booting costs a second."""
    folder, booted = tmp_path_factory.mktemp("boot"), []
    try:
        for version in ("3.8", "3.13"):
            process, EXE[version] = boot(version, folder)
            booted.append(process)
        yield
    finally:
        for process in booted:
            end(process)


@pytest.fixture
def windows_lab(tmp_path):
    with WindowsLab(str(tmp_path)) as lab:
        yield lab


# ---------------------------------------------------------------------------------------------------------------------
# Dead detection and usage: begun first, since it takes its time, and looked at last
# ---------------------------------------------------------------------------------------------------------------------

MIB = 1 << 20
WORK = """if True:
    import os, sys, time
    block = bytearray(os.urandom(1 << 20)) * 64
    cpu, wall, sleep = map(float, sys.argv[1:4])
    end = time.monotonic() + wall
    while time.process_time() < cpu or time.monotonic() < end:
        sum(range(1000000))  # asking for the time alone would keep Wine busy, not this process
    time.sleep(sleep)"""


@pytest.fixture(scope="module", autouse=True)
def watched(windows, tmp_path_factory):
    """(server, {name: number}): jobs of two clients, an English one and a German one, that end what sleeps for 12 s.

    tasklist counts whole seconds of CPU: what gets a tenth of a core on a busy machine looks idle for up to 10 s.
    """
    linux, folder = str(tmp_path_factory.mktemp("watch")), str(tmp_path_factory.mktemp("watched"))
    flags = ("--dead-after", "0.2", "--usage-interval", "1", "--kill-delay", "0.5")
    with Lab(linux) as lab, WindowsLab(folder) as desktops:
        server = lab.server("--offline-after", 0)
        jobs = {}
        for language, version, names in (("en", "3.8", ["stops"]), ("de", "3.13", ["works", "stops"])):
            env = {**os.environ, "TASKLIST_LOCALE": language}
            own = ("--hostname", language, "--spool", language)
            desktops.client(server, *flags, *own, python=python_of(version), env=env, log=language + ".log")
            for name in names:
                seconds = {"stops": ["1.5", "0", "600"], "works": ["3", "15", "0"]}[name]
                params = [EXE[version], "-S", "-E", "-c", WORK, *seconds, native(folder)]
                jobs[f"{name} {language}"] = {"Params": params, "Requires": ["host=" + language]}
        yield server, dict(zip(jobs, server.add(*jobs.values())))


# ---------------------------------------------------------------------------------------------------------------------
# One server and one client, in every mix
# ---------------------------------------------------------------------------------------------------------------------


class Room:
    """A server on one system, a client on another, and a desk where commands are typed, always on Windows."""

    def __init__(self, server_lab, server_on, client_lab, client_on):
        self.lab, self.system, self.desk = client_lab, client_on, "3.8" if client_on == LINUX else client_on
        self.server = server_lab.server("--offline-after", 0, python=python_of(server_on))
        flags = ("--hostname", "room", "--kill-delay", "1")
        self.client = client_lab.client(self.server, *flags, max_jobs=4, python=python_of(client_on))
        self.python = [EXE[client_on], "-S", "-E"]

    def command(self, *words, system=None):
        words = (words[0], "--server", self.server.url, *words[1:])
        return command(system or self.desk, self.lab.folder, *words)

    def output(self, number):
        """What a job printed."""
        return self.server.get("/output", id=number)[1]["StdOut"]

    def run(self, *jobs):
        """The finished records of jobs that run at the same time."""
        return [self.server.over(number) for number in self.server.add(*jobs)]


MIXES = [(LINUX, "3.8"), ("3.13", LINUX), ("3.8", "3.13")]


@pytest.fixture(scope="module", params=MIXES, ids="server {0[0]}, client {0[1]}".format)
def room(request, tmp_path_factory):
    server_on, client_on = request.param
    folders = {"Linux": str(tmp_path_factory.mktemp("linux")), "Windows": str(tmp_path_factory.mktemp("windows"))}
    with Lab(folders["Linux"]) as linux, WindowsLab(folders["Windows"]) as windows:
        labs = [linux if system == LINUX else windows for system in request.param]
        yield Room(labs[0], server_on, labs[1], client_on)


def test_jobs_end_with_their_true_exit_status_on_windows_32_bits_of_it(room):
    python, bat = room.python, room.lab.write("three.bat", "@echo off\r\necho got %1 %2\r\nexit /b 3\r\n")
    wanted = [([*python, "-c", f"raise SystemExit({code})"], code) for code in (0, 7, 255)]
    if room.system == LINUX:
        wanted.append(([*python, "-c", "import os; os.kill(os.getpid(), 9)"], 256 + 9))
    else:
        end = "import ctypes; ctypes.windll.kernel32.ExitProcess(%d)"
        wanted += [([*python, "-c", end % code], code) for code in (256, 0xC0000005, 0xFFFFFFFF)]
        wanted.append(([native(bat), "plain", "two words"], 3))
    jobs = room.run(*[params for params, _ in wanted])
    assert [job["ExitStatus"] for job in jobs] == [code for _, code in wanted]
    assert [job["Status"] for job in jobs] == ["failed" if code else "finished" for _, code in wanted]
    assert {(job["Host"], job["RunCount"]) for job in jobs} == {("room", 1)}
    if room.system != LINUX:
        assert room.command("qcat", jobs[-1]["Number"]).stdout == b'got plain "two words"\r\n'


def test_what_cannot_be_started_has_failed_with_minus_8_and_a_comment_that_says_why(room):
    bat = native(room.lab.write("echoes.bat", "@echo %*>ran\r\n"), room.system)
    wanted = [({"Params": ["no-such-program", "x"]}, ["no-such-program"])]
    nowhere = native(room.lab.path("no such folder"), room.system)
    wanted.append(({"Params": [*room.python, "-c", "1"], "WorkDir": nowhere}, [f"cannot start {nowhere}: "]))
    if room.system != LINUX:
        for path, word in ((bat, "a&b"), (bat, "%PATH%"), (bat, 'a"b'), ("echoes", "x|y")):  # found with its extension
            wanted.append(({"Params": [path, word]}, ["batch file", repr(word), "cmd.exe"]))
    for job, (_, words) in zip(room.run(*[record for record, _ in wanted]), wanted):
        assert (job["Status"], job["ExitStatus"]) == ("failed", -8), job
        assert all(word in job["Comment"] for word in words) and len(job["Comment"].splitlines()) == 1, job["Comment"]
    assert not os.path.exists(room.lab.path("ran"))


def test_a_path_to_a_program_begins_in_the_folder_that_its_job_runs_in_whatever_that_is_called(room):
    bat = "@echo off\r\necho got %1 %2\r\nexit /b 3\r\n"
    name, text = ("run", "#!/bin/sh\necho got $1 $2\nexit 3\n") if room.system == LINUX else ("run.bat", bat)
    jobs = []
    for folder in ("plain", "R&D, (one)", "R&D,(two)"):
        os.mkdir(room.lab.path(folder))
        os.chmod(room.lab.write(os.path.join(folder, name), text), 0o700)
        path = native(room.lab.path(folder), room.system)
        begin = "./" if room.system == LINUX else ".\\"
        jobs += [{"Params": [begin + name, "a", "b"], "WorkDir": path}]
        jobs += [{"Params": [begin + "run", "a", "b"], "WorkDir": path}]  # Windows finds its extension
        jobs += [{"Params": [native(room.lab.path(folder, name), room.system), "a", "b"]}]
    for job in room.run(*jobs):
        assert (job["ExitStatus"], room.output(job["ID"]).split()) == (3, ["got", "a", "b"]), job


WORDS = [
    "", "two words", "  ", "'", '"', '\\"', '"a b"', "C:\\dir\\", "C:\\with blank\\", "\\\\host\\share", "a\\\\\"b",
    "a&b", "a|b", "%PATH%", "!x!", "^", "<x>", "$HOME", "*", "?", "/c", "--", "line\nline\r\n", "\t", "é ü ß",
    "日本語", "😀", "x" * 10_000, "\\",
]  # fmt: skip
GIVEN = """if True:
    import json, os, sys
    print(json.dumps([sys.argv[1:], os.getcwd(), os.environ["A b"], "PATH" in os.environ, sys.stdin.read()]))"""
PIECE = b"line\r\nline\n\r\xff\x00\x1a\xe2\x82"  # 0x1a ends a text on Windows
PRINT = """if True:
    import sys
    data = bytes.fromhex(sys.argv[1]) * 6000
    sys.stdout.buffer.write(data)
    sys.stderr.buffer.write(data[:9])"""


def test_params_env_and_workdir_come_to_a_job_to_the_letter_and_its_output_back_byte_for_byte(room):
    os.mkdir(room.lab.path("work dir é日"))
    workdir = native(room.lab.path("work dir é日"), room.system)
    given = {"Params": [*room.python, "-c", GIVEN, *WORDS], "WorkDir": workdir, "Env": {"A b": "c  %PATH% é日"}}
    printer = {"Params": [*room.python, "-c", PRINT, PIECE.hex()]}
    job, printed = room.run(given, printer)
    assert (job["Status"], printed["Status"]) == ("finished", "finished"), (job, printed)
    answer = json.loads(room.command("qcat", job["Number"], system=LINUX).stdout)
    assert answer == [WORDS, workdir, "c  %PATH% é日", True, ""]
    for system in (LINUX, room.desk):
        assert room.command("qcat", printed["Number"], system=system).stdout == (PIECE * 6000)[-64 * 1024 :]
    assert room.command("qcat", "-e", printed["Number"]).stdout == PIECE[:9]


SAYS = """#!/usr/bin/env -S python3 -S -E
import json, sys
print(json.dumps([sys.argv[1:], sys.flags.no_site, open(sys.argv[0], "rb").read().count(b"\\r"), "é日"]))
"""
GOTO = "@echo off\ngoto there\necho not here\n:there\necho got %1 %2\nexit /b 3\n"  # with no line end of Windows'


def test_a_script_runs_by_what_its_name_or_its_hash_bang_line_or_its_shell_says(room):
    def script(name, text, *arguments, **record):
        return {"Params": [name, *arguments], "ScriptName": name, "Script": text, **record}

    folder = EXE[room.system].rpartition("\\")[0]
    says, words = {"Env": {"PYTHONIOENCODING": "utf-8"}}, [word for word in WORDS if word.isprintable()]
    if room.system != LINUX:
        says["Env"]["PATH"] = folder + ";C:\\windows\\system32"
    jobs = [
        script("a b.py", SAYS, *words, **says),
        script("STDIN", SAYS.replace("\n", "\r\n").partition("\n")[2], "x", Shell=EXE[room.system], **says),
    ]
    if room.system != LINUX:
        room.lab.write("powershell.bat", "@echo %*\r\n")  # Wine's own does nothing
        jobs += [script("x.BAT", GOTO, "plain", "two words"), script("é.cmd", GOTO, Shell="cmd.exe"),
                 script("x.PS1", "exit", "one", Env={"PATH": native(room.lab.folder)})]  # fmt: skip
    ends = room.run(*jobs)
    printed = [room.output(job["ID"]) for job in ends]
    assert [job["ExitStatus"] for job in ends] == [0, 0, 3, 3, 0][: len(jobs)], ends
    assert json.loads(printed[0]) == [words, 1, 0, "é日"]
    assert json.loads(printed[1]) == [["x"], 0, 0 if room.system == LINUX else 2, "é日"]
    if room.system != LINUX:
        assert [text.split() for text in printed[2:4]] == [["got", "plain", '"two', 'words"'], ["got"]]
        *flags, file, argument = printed[4].split()
        assert flags == ["-NoProfile", "-ExecutionPolicy", "Bypass", "-File"] and argument == "one"
        assert file.startswith(native(room.lab.folder)) and file.endswith("\\script-x.PS1")
    until(lambda: not os.listdir(room.lab.path("jobrunner-spool", "jobs")), "the scripts to go")


def test_a_script_that_nothing_on_this_machine_runs_has_failed_with_minus_8_and_its_comment_says_why(room):
    wanted = [("x.sh", "#!/usr/bin/no-such-shell\n", [], {}, ["no-such-shell"]),
              ("x.sh", "true", [], {"Shell": "/no/such shell"}, ["/no/such shell"])]  # fmt: skip
    if room.system != LINUX:
        wanted += [("x.sh", "true", [], {}, ["x.sh", ".bat", "#! line", "-S"]),
                   ("x.sh", "echo", [], {"Shell": "cmd.exe"}, ["cmd.exe", ".bat"])]  # fmt: skip
        wanted += [("x.bat", "echo >ran", [word], {}, ["batch file", repr(word)]) for word in ("a&b", "%PATH%", 'a"b')]
    jobs = [{"Params": [name, *arguments], "ScriptName": name, "Script": text, **more}
            for name, text, arguments, more, _ in wanted]  # fmt: skip
    for job, (*_, words) in zip(room.run(*jobs), wanted):
        assert (job["Status"], job["ExitStatus"]) == ("failed", -8), job
        assert all(word in job["Comment"] for word in words) and len(job["Comment"].splitlines()) == 1, job["Comment"]
    assert not os.path.exists(room.lab.path("ran"))


TOLD = """if True:
    import json, os
    temp = os.environ["TMPDIR"]
    print(json.dumps([dict(os.environ), os.listdir(temp), open(os.environ["PBS_NODEFILE"]).read()]))
    path = os.path.join(temp, "read-only")
    open(path, "w").close()
    os.chmod(path, 0o400)"""


def test_a_job_is_told_what_pbs_tells_it_and_has_a_folder_for_temporary_files_of_its_own(room):
    text = "'; é日\n&|%PATH%" + "x" * 10_000
    record = {"Params": [*room.python, "-c", TOLD], "Name": text, "Ncpus": 2, "Runtime": 90, "Owner": "ann@desk"}
    given = {"PBS_JOBID": "1", "LONG": text, **({"pbs_np": "9"} if room.system != LINUX else {})}
    (number,) = room.server.add({**record, "Env": given, "Array": "7"})
    job = room.server.over(f"{number}[7]")
    assert job["Status"] == "finished", job
    environ, inside, nodes = json.loads(room.output(f"{number}[7]"))
    told = {"PBS_JOBID": f"{number}[7]", "PBS_ARRAY_INDEX": "7", "PBS_ARRAY_ID": f"{number}[]", "PBS_JOBNAME": text,
            "PBS_NP": "2", "NCPUS": "2", "PBS_WALLTIME": "90", "PBS_O_HOST": "desk", "LONG": text}  # fmt: skip
    assert {name: environ.get(name) for name in told} == told
    assert (inside, nodes) == ([], "room\nroom\n")
    if room.system != LINUX:
        assert environ["TEMP"] == environ["TMP"] == environ["TMPDIR"] and len(environ["TEMP"]) < 80
    check = [*room.python, "-c", "import os, sys; sys.exit(os.path.exists(sys.argv[1]))", environ["TMPDIR"]]
    until(lambda: not any(job["ID"] in name for name in os.listdir(room.lab.path("jobrunner-spool", "jobs"))))
    (end,) = room.run(check)
    assert end["ExitStatus"] == 0, environ["TMPDIR"]


def test_outputs_join_or_go_nowhere_on_windows_too(room):
    code = "import sys; print(1); sys.stdout.flush(); print(2, file=sys.stderr)"
    job = {"Params": [*room.python, "-c", code]}
    nowhere = "/dev/null" if room.system == LINUX else "NUL"
    jobs = {**job, "Join": "oe"}, {**job, "StdOut": "/dev/null"}, {**job, "StdOut": nowhere}
    for ended, words in zip(room.run(*jobs), (["1", "2"], [], [])):
        assert ended["Status"] == "finished" and room.output(ended["ID"]).split() == words
    if room.system != LINUX:
        (ended,) = room.run({**job, "StdOut": "aux"})
        assert ended["ExitStatus"] == -9 and "aux" in ended["Comment"], ended


def test_qsub_typed_on_windows_gives_words_to_the_letter_waits_and_exits_with_the_jobs_status(room):
    words = [word for word in WORDS if len(word) < 100]
    code = "import json, sys; print(json.dumps(sys.argv[1:])); sys.exit(7)"
    done = room.command("qsub", "-N", "ä 日本", "-W", "block=true", "--", *room.python, "-c", code, *words)
    assert done.returncode == 7, done
    number = done.stdout.decode().strip()
    assert json.loads(room.command("qcat", number).stdout) == words
    listed = json.loads(room.command("qstat", "-F", "json", number).stdout)["Jobs"][number]
    assert (listed["Job_Name"], listed["Exit_status"], listed["exec_host"]) == ("ä 日本", 7, "room")
    table = room.command("qstat", "-x")
    assert table.returncode == 0 and number.encode() in table.stdout


TREE = """if True:
    import signal, subprocess, sys, time
    if sys.argv[1] != "0":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    open(sys.argv[2], "a").write("x")
    if sys.argv[1] > "1":
        subprocess.Popen([sys.executable, sys.argv[0], str(int(sys.argv[1]) - 1)] + sys.argv[2:])
    time.sleep(600)"""


def test_past_its_walltime_or_deleted_a_job_is_gone_and_so_is_all_it_started(room):
    words = {name: uuid.uuid4().hex for name in ("timeout", "deleted")}
    script, folder = (native(path, room.system) for path in (room.lab.write("tree.py", TREE), room.lab.folder))

    def job(name, depth):
        return {"Params": [*room.python, script, depth, words[name], folder], "Name": name}

    timeout, deleted = room.server.add({**job("timeout", "3"), "Runtime": 3}, job("deleted", "0"))
    until(lambda: read(room.lab.path(words["deleted"])), "the job to run")
    assert len(bearing(words["deleted"])) == 1
    assert room.command("qdel", deleted).returncode == 0
    end = room.server.over(deleted)
    assert (end["Status"], end["ExitStatus"]) == ("deleted", 256 + 15 if room.system == LINUX else 256 + 9)
    end = room.server.over(timeout)
    assert (end["Status"], end["ExitStatus"]) == ("timeout", -11)
    assert read(room.lab.path(words["timeout"])) == "xxx"  # a job, its child and its grandchild were there
    gone(*words.values())


def test_a_second_client_on_the_same_spool_is_refused_with_one_line(room):
    room.run([*room.python, "-c", "1"])  # by now the first one has its spool
    second = room.lab.client(room.server, log="second.log", python=python_of(room.system))
    assert second.wait(PATIENCE) == 1
    (line,) = room.lab.log("second.log").splitlines()
    owner = read(room.lab.path("jobrunner-spool", "lock")).strip()
    assert line.startswith("client.py: ") and "in use" in line and f"process {owner}" in line
    assert [job["Status"] for job in room.run([*room.python, "-c", "1"])] == ["finished"]


# ---------------------------------------------------------------------------------------------------------------------
# Restarts, stops and refusals of Windows programs
# ---------------------------------------------------------------------------------------------------------------------

STEP = """if True:
    import os, sys, time
    open("runs-of-" + sys.argv[1], "a").write("x")
    while not os.path.exists(sys.argv[1]): time.sleep(0.05)
    sys.exit(int(sys.argv[2]))"""


def test_a_windows_client_killed_stopped_and_upgraded_reports_how_each_of_its_jobs_ended(lab, tmp_path_factory):
    server = lab.server()
    with WindowsLab(str(tmp_path_factory.mktemp("desktop"))) as desktop:
        jobs = desktop.path("jobrunner-spool", "jobs")
        python, mark, word = [EXE["3.8"], "-S", "-E", "-c"], native(desktop.folder), uuid.uuid4().hex
        client = desktop.client(server, max_jobs=4, python=python_of("3.8"))
        steps = (("one", "3"), ("two", "-1073741819"), ("three", "0"))  # 0xC0000005, as sys.exit takes it
        numbers = server.add(*[[*python, STEP, name, code, mark] for name, code in steps])
        (limited,) = server.add({"Params": [*python, STEP, "never", "0", mark, word], "Runtime": 3})
        runs = [desktop.path("runs-of-" + name) for name in ("one", "two", "three", "never")]
        until(lambda: all(map(read, runs)), "four jobs to run")
        taskkill(read(desktop.path("jobrunner-spool", "lock")).strip(), desktop.folder)
        assert client.wait(PATIENCE) != 0

        desktop.write("one", "")  # ends while there is no client
        logs = [os.path.join(jobs, name, "log") for name in os.listdir(jobs)]
        until(lambda: any('"ExitStatus": 3' in read(path) for path in logs), "the keeper to note its end")
        flags, newer = ("--until-eof", "--kill-delay", "1"), python_of("3.13")
        client = desktop.client(server, *flags, max_jobs=4, python=newer, stdin=subprocess.PIPE, log="eof.log")
        assert server.over(numbers[0])["ExitStatus"] == 3
        desktop.write("two", "")  # ends under another client than it was started by
        assert server.over(numbers[1])["ExitStatus"] == 0xC0000005
        late = server.over(limited)
        assert (late["Status"], late["ExitStatus"]) == ("timeout", -11)
        gone(word)

        client.stdin.close()
        assert client.wait(PATIENCE) == 0
        assert f"job {numbers[2]} goes on" in desktop.log("eof.log")
        desktop.client(server, python=python_of("3.8"))
        desktop.write("three", "")
        assert [server.over(number)["Status"] for number in numbers] == ["failed", "failed", "finished"]
        assert [server.job(number)["RunCount"] for number in numbers] == [1, 1, 1]
        assert list(map(read, runs)) == ["x", "x", "x", "x"]  # each was run once
        until(lambda: not os.listdir(jobs), "the folders to go")


OWN = """if True:
    import json, os, sys
    sys.path.insert(0, sys.argv[1])
    import client
    open(sys.argv[2], "w").write(json.dumps({"Pid": os.getpid(), "Started": client.creation_time(-1), "Boot": ""}))
    sys.stdin.read()"""


def test_without_its_keeper_a_process_is_a_jobs_only_if_it_was_created_at_that_very_moment(windows_lab):
    """Windows gives out numbers again at once: a stranger that has a job's is left alone."""
    processes, folder = [], windows_lab.folder
    desk = Desk()
    try:
        for number, (name, earlier) in enumerate((("ours", 0), ("stranger", 1), ("unknown", None)), 1):
            path = windows_lab.path(name)
            line = [WINPY, "-3.8", "-c", OWN, native(ROOT), native(path)]
            processes.append(subprocess.Popen(line, cwd=folder, stdin=subprocess.PIPE))
            facts = until(lambda: read(path).endswith("}") and json.loads(read(path)))  # noqa: B023
            facts["Started"] = None if earlier is None else facts["Started"] - earlier
            job = leased(["x"], number, Runtime=3, Rerunable=False)
            os.makedirs(windows_lab.path("jobrunner-spool", "jobs", job["ID"] + ".1"))
            lines = {"Job": job, "Keeper": "x.lock", "StdOut": "NUL", "StdErr": "NUL"}, facts
            windows_lab.write(f"jobrunner-spool/jobs/{job['ID']}.1/log", "".join(json.dumps(l) + "\n" for l in lines))
        windows_lab.client(desk.url, "--kill-delay", "0", python=python_of("3.8"))
        until(lambda: len(desk.reports) == 3, "the reports")
        told = {report["ID"][-1]: (report["Status"], report["ExitStatus"]) for report in desk.reports}
        assert told == {"1": ("timeout", -11), "2": ("lost", -103), "3": ("lost", -103)}
        processes[0].wait(PATIENCE)
        assert [process.poll() for process in processes[1:]] == [None, None]
    finally:
        for process in processes:
            process.stdin.close()
            process.wait(PATIENCE)
        desk.http.shutdown()
        desk.http.server_close()


BUCKETS = ("Available", "Leased", "Finished", "Held")


def ids(database):
    return {bucket: set(database[bucket]) for bucket in BUCKETS}


BEGIN = """
import ctypes, msvcrt, subprocess, sys
sys.path.insert(0, sys.argv[1])
import client, jobrunner, server
kernel32, number = ctypes.windll.kernel32, ctypes.c_uint32
"""
IN_A_CONSOLE = """
import subprocess, sys
line = [sys.executable, "-S", "-c"] + sys.argv[2:0:-1]
print(subprocess.run(line, stdout=subprocess.PIPE, creationflags=0x08000000, check=True).stdout.decode())"""


def from_inside(lab, code, console=False):
    """What some lines print that look at the three programs from inside, on Windows; `number()` can be given to a function
    of `kernel32` by reference."""
    words = [BEGIN + textwrap.dedent(code), native(ROOT)]
    line = [*python_of("3.8"), "-S", "-c", *([IN_A_CONSOLE] + words[::-1] if console else words)]
    done = subprocess.run(line, cwd=lab.folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=PATIENCE)
    assert done.returncode == 0, done
    return done.stdout.decode().strip().splitlines()


def test_at_log_off_windows_ends_the_client_then_its_keeper_and_the_jobs_after_them(windows_lab):
    code = """
        def level():
            found = number(), number()
            assert kernel32.GetProcessShutdownParameters(*map(ctypes.byref, found))
            return found[0].value

        levels = [level()]
        client.keep("lock")  # its input has ended
        levels.append(level())
        client.Agent.run = lambda agent: 0
        assert client.main(["--server", "127.0.0.1:1"]) == 0
        print(*levels, level())"""
    assert from_inside(windows_lab, code)[-1] == "640 1022 1023"


def test_a_job_that_crashes_on_windows_does_not_wait_for_somebody_who_reads_what_windows_says_of_it(windows_lab):
    # what it starts inherits that (Wine has no such windows, and passes it on to nobody)
    code = "kernel32.SetErrorMode(4); client.keep('lock'); print(hex(kernel32.GetErrorMode()))"
    assert from_inside(windows_lab, code)[-1] == "0x8007"


def test_the_number_of_a_job_that_is_being_ended_is_nobody_elses_though_it_ends_by_itself_meanwhile(windows_lab):
    code = """
        import time

        def end(job):
            job.communicate(b"x")
            job._handle.Close()  # its keeper has no more to do with it

        line = [sys.executable, "-S", "-c", "import sys; sys.stdin.read()"]
        job, other = (subprocess.Popen(line, stdin=subprocess.PIPE) for _ in range(2))
        created, deadline = client.creation_time(job._handle), time.monotonic() + 20
        with client.WindowsTools(None).held(job.pid):
            end(job)
            end(other)
            while client.creation_time_of(other.pid) is not None and time.monotonic() < deadline:
                time.sleep(0.05)
            print(client.creation_time_of(other.pid), client.creation_time_of(job.pid) == created)"""
    assert from_inside(windows_lab, code)[-1] == "None True"


def test_a_click_into_its_window_does_not_hold_up_a_client_or_server_that_writes_there(windows_lab):
    code = """
        def mode():
            found = number()
            with open("CONIN$", "rb") as console:
                handle = ctypes.c_void_p(msvcrt.get_osfhandle(console.fileno()))
                assert kernel32.GetConsoleMode(handle, ctypes.byref(found))
            return found.value

        modes = []
        client.work = server.serve = lambda options: modes.append(mode()) or 0
        for program in client, server:
            modes.append(mode())
            assert program.main([]) == 0
        print(*[mode & 0x40 for mode in modes + [mode()]])  # ENABLE_QUICK_EDIT_MODE"""
    assert from_inside(windows_lab, code, console=True)[-1] == "64 0 64 0 64"


def test_ctrl_c_ends_a_command_on_windows_while_the_server_lets_it_wait(windows_lab):
    code = """
        import os, signal, socket
        silent = socket.create_server(("127.0.0.1", 0))
        line = [sys.executable, os.path.join(sys.argv[1], "jobrunner.py"), "qwait", "--server"]
        line += ["127.0.0.1:%d" % silent.getsockname()[1], "1"]
        qwait = subprocess.Popen(line)
        connection, _ = silent.accept()
        assert connection.recv(1)
        signal.signal(signal.SIGINT, lambda *_: None)
        assert kernel32.GenerateConsoleCtrlEvent(0, 0)  # to all in this console
        try:
            print(qwait.wait(20))
        finally:
            qwait.kill()"""
    assert from_inside(windows_lab, code, console=True)[-1] == "130"


def test_a_command_on_windows_whose_output_nobody_reads_any_more_says_nothing_of_it(windows_lab, lab):
    code = f"""
        import os
        line = [sys.executable, os.path.join(sys.argv[1], "jobrunner.py"), "qstat", "-B", "--server", {lab.server().url!r}]
        qstat = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        qstat.stdout.close()
        print(qstat.stderr.read(), qstat.wait())"""
    assert from_inside(windows_lab, code)[-1] == "b'' 1"


def test_a_connection_to_a_windows_server_takes_no_8_mb_of_memory(windows_lab):
    """There a stack whose size is asked for is taken from what memory and paging file have together, used or not."""
    assert from_inside(windows_lab, "import threading; server.tune(); print(threading.stack_size())")[-1] == "0"


def test_json_nested_however_deep_ends_no_server(room):
    for depth in (500, 2500, 10_000, 100_000):
        for begin, end in ((b"[", b"]"), (b'{"a":', b"}"), (b'[{"a":', b"}]")):
            for body in (begin * depth, begin * depth + b"1" + end * depth):
                assert room.server.fetch("/add", body)[0] == 400
    assert room.server.fetch("/status")[0] == 200


def test_a_windows_server_keeps_its_database_to_itself_loses_nothing_when_killed_and_leaves_it_whole(windows_lab, lab):
    server = windows_lab.server(python=python_of("3.8"))
    numbers = server.add({"Params": ["ä 日本", "a&b"], "Name": "é"}, ["b"], ["c"])
    flags = ("--port", 0, "--db", "jobs.json")
    second = windows_lab.popen("server.py", *flags, python=python_of("3.13"), log="second.log")
    assert second.wait(PATIENCE) == 1
    (line,) = windows_lab.log("second.log").splitlines()
    owner = read(server.db + ".lock").strip()
    assert line.startswith("server.py: ") and "in use by another server" in line and f"process {owner}" in line

    taskkill(owner, windows_lab.folder)
    assert server.process.wait(PATIENCE) != 0
    server = windows_lab.server("--until-eof", stdin=subprocess.PIPE, python=python_of("3.13"))
    assert server.post("/delete", {"IDs": [str(numbers[1])]})[0] == 200
    leased = server.get("/request", hostname="pc")[1]
    assert leased["Params"] == ["ä 日本", "a&b"]
    before = ids(server.get("/dump")[1])
    assert [len(before[bucket]) for bucket in BUCKETS] == [1, 1, 1, 0]

    done = command("3.8", windows_lab.folder, "qterm", "--server", server.url)
    assert (done.returncode, done.stderr) == (0, b"")
    assert server.process.wait(PATIENCE) == 0
    left = {name for name in os.listdir(windows_lab.folder) if name.startswith("jobs.json")}
    assert left <= {"jobs.json", "jobs.json.lock"}
    assert ids(json.loads(read(server.db))) == before
    assert ids(lab.server(db=server.db).get("/dump")[1]) == before  # a Linux server takes it as it is


@pytest.mark.parametrize("version", ["3.8", "3.13"])
def test_the_example_runs_on_windows_and_every_job_finishes(tmp_path, version):
    done = command(version, str(tmp_path), "run", native(os.path.join(ROOT, "jobs.json.example")))
    assert done.returncode == 0, done
    assert b"5 of 5 jobs finished" in done.stdout


# ---------------------------------------------------------------------------------------------------------------------
# What became of the watched jobs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", ["en", "de"])
def test_a_job_that_stops_working_is_dead_told_by_a_tasklist_in_that_language(watched, language):
    server, numbers = watched
    job = server.over(numbers["stops " + language])
    assert (job["Status"], job["ExitStatus"]) == ("dead", -101)
    assert job["CpuTimeUsed"] >= 1  # it had worked before
    assert 64 * MIB <= max(job["MemUsed"]) == job["MaxMem"] < 640 * MIB
    assert len(job["CPUUsed"]) == len(job["MemUsed"]) and min(job["CPUUsed"]) == 0 < max(job["CPUUsed"])


def test_a_job_that_works_longer_than_the_time_for_the_dead_goes_on(watched):
    server, numbers = watched
    job = server.over(numbers["works de"])
    assert (job["Status"], job["ExitStatus"], job["RunCount"]) == ("finished", 0, 1), job
    assert job["CpuTimeUsed"] >= 1 and sum(job["CPUUsed"]) > 0  # as of the last sample

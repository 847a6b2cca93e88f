#!/usr/bin/env python3
"""jobrunner client -- runs jobs for a server:  python client.py --server host --max-jobs 2

    pollers  -> POST /request, held open by the server: jobs, signals; also the heartbeat, and brings reports along
    Agent    -> the runs here: starts them, watches their limits, ends them
    keeper   -> a small process of its own: the parent of the jobs, writes down how they end
    reporter -> POST /finish, /timeout, /dead, /usage until each is acknowledged
    follower -> POST /stream, while somebody reads what a job prints

A run:  leased -> its folder in the spool -> started by the keeper -> [ending: asked to end, later killed] -> over
        -> reported -> acknowledged: the folder goes, its output stays

The keeper outlives the client: a crash or an upgrade of the client leaves the jobs running and their exit statuses
written down, for the next client to find.  It costs one process a client instead of one a job, and works alike on
Windows, which has no wait for other people's children.

The spool (--spool):
    lock                      locked by the client that uses it
    client                    the id this client goes by, whatever its name, and the machine it was made on
    jobs/ID.RUN/log           here from before its process starts; a JSON line each: the job as it was leased, which
                              keeper has it and what was made for it, the keeper's word of its process, the job again
                              when its limits were altered, why we are ending it if we are, and the keeper's word of
                              its end
    jobs/ID.RUN/usage         what it has used so far, from a minute after its start on
    jobs/ID.RUN/script-NAME   what it runs, if it is a script
    output/NAME.oNUMBER       what it prints (.e for errors), where the job names no file itself; kept --keep-output
    keepers/N.lock            locked by keeper N as long as it lives
    nodes/N                   this host's name N times, a line each: the PBS_NODEFILE of jobs of N slots
In the system's place for temporary files, jr-HASH/ has a folder for each run, its TMPDIR.

Monitoring goes through ps / kill and tasklist / taskkill, one snapshot a round for all jobs.  Parsers and verdicts are
pure functions.  Clocks: the time this system was awake for limits and waiting, the time since it was booted for
telling processes apart, wall time only where it is shown: it may be set while jobs run.

The keeper must stay small, so what it has no use for is imported where it is used: the keeper and the client together
are to take no more than a program that nobody notices.

Sections: clocks and process starts, what ps and tasklist print, process tools, verdicts, a good guest, the keeper, the
spool, what a job is given, a run, the wire, the agent, main.
"""

import argparse
import collections
import contextlib
import errno
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Tuple, Union

try:
    import jobrunner
    from jobrunner import (
        EXIT_CPUTIME,
        EXIT_DEAD,
        EXIT_GONE,
        EXIT_LOST,
        EXIT_MEMORY,
        EXIT_NO_OUTPUT,
        EXIT_NOT_STARTED,
        EXIT_REFUSED,
        EXIT_SIGNALLED,
        EXIT_WALLTIME,
        TOKEN_FILE,
        VERSION,
        WINDOWS,
        BadRequest,
        FileLock,
        Job,
        JobrunnerError,
        ServerApi,
        ServerAway,
        ServerRefused,
        as_text,
        format_time,
        now,
        os_words,
    )
except ImportError as error:
    if error.name != "jobrunner":
        raise
    _folder = os.path.dirname(os.path.abspath(__file__))
    if not os.path.exists(os.path.join(_folder, "jobrunner.py")):
        sys.exit(f"client.py needs jobrunner.py beside it: copy it to {_folder}")
    if isinstance(error, ModuleNotFoundError):  # Windows' embeddable Python, which looks beside itself only
        sys.exit(f"this Python does not look for jobrunner.py in {_folder}: delete the file in "
                 f"{os.path.dirname(sys.executable)} whose name ends in ._pth")  # fmt: skip
    sys.exit(f"client.py and jobrunner.py in {_folder} are of different versions: copy both there")

HERE = os.path.dirname(os.path.abspath(__file__))  # found now: before 3.9 it is relative, and --workdir leads elsewhere
POLL_WAIT = 30  # s a request is held open by the server when there is nothing to say
HEARTBEAT_DELAY = 0.5  # s before a client without a free slot polls again: short jobs end sooner
ORIGINAL_POLL = 5  # s between requests to the original's server, which holds none open
OUTPUT_TAIL = 64 * 1024  # bytes of each output that go to the server
LIMIT_SAMPLE = 10  # s between samples when a job here has a limit on memory or cputime
KEEPER_AGAIN = 5  # s after which a keeper that could not be started again is tried once more
KILL_AGAIN = 5  # s after which a kill that did not help is tried again
ORPHAN_POLL = 2.0  # s between looks at the process of a job whose keeper is gone
ADOPTED_POLL = 0.25  # s between looks at the folder of a job that another client's keeper has
REPORTS_AT_ONCE = 200
FORMAT = 1  # of the runs' logs
START_TOLERANCE = 3  # s that two accounts of a process's start may differ by: ps tells whole seconds
GUEST_STEP = 5  # s between looks at whether jobs are welcome here (hours, memory, disk)
FAREWELL_TIME = 3  # s that a client which ends waits for the server to hear it
FOLLOW_STEP = 0.5  # s between looks at an output that somebody follows
FOLLOW_ALIVE = 10  # s after which a stream with nothing new says so
LONGEST_COMMENT = 600  # characters of what a keeper says to an end: many messages are to fit into its pipe
MAX_ALLOW = 1 << 20  # characters of an --allow-file
NO_ROOM = 64 << 10  # bytes free on a disk that is full
CLIENT_LEVEL, KEEPER_LEVEL = 0x3FF, 0x3FE  # of those that Windows ends first: the client, its keeper, then the jobs
SWEEP = 3600  # s between looks for outputs that have been kept long enough

# ---------------------------------------------------------------------------------------------------------------------
# Clocks and process starts
# ---------------------------------------------------------------------------------------------------------------------


_kernel32: Any = None


def kernel32() -> Any:
    """Windows' own functions.  (On Linux nothing here imports ctypes, which is 1.5 MB.)"""
    global _kernel32
    if _kernel32 is None:
        import ctypes

        library = ctypes.WinDLL("kernel32")  # type: ignore[attr-defined]
        library.OpenProcess.restype = ctypes.c_void_p
        _kernel32 = library
    return _kernel32


def awake_clock() -> float:
    """Seconds that this system was awake, the same for all its processes: what limits count in."""
    if WINDOWS:  # where time.monotonic counts sleep, too
        import ctypes

        ticks = ctypes.c_uint64()
        if kernel32().QueryUnbiasedInterruptTime(ctypes.byref(ticks)):
            return ticks.value / 1e7
    return time.monotonic()


def boot_clock() -> float:
    """Seconds since this system was booted, asleep or awake; Linux."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def boot_id() -> str:
    """Which boot of the system this is; "" where it does not tell."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return ""


def start_of(pid: int) -> Optional[float]:
    """When a process was started, in seconds since boot, as Linux itself has it; None = it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rsplit(b")", 1)[1].split()[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError):
        return None


def creation_time(handle: Any) -> Optional[int]:
    """When the process of a Windows handle was created, in 100 ns: no two processes have number and this in common."""
    import ctypes

    times = [ctypes.c_uint64() for _ in range(4)]
    done = kernel32().GetProcessTimes(ctypes.c_void_p(handle), *map(ctypes.byref, times))
    return times[0].value if done else None


def creation_time_of(pid: int) -> Optional[int]:
    """The same of a process by its number; None = there is none, or it is not for us to see."""
    import ctypes

    library = kernel32()
    handle = library.OpenProcess(0x1000, False, pid)  # PROCESS_QUERY_LIMITED_INFORMATION
    if not handle:
        return None
    try:
        return creation_time(handle)
    finally:
        library.CloseHandle(ctypes.c_void_p(handle))


def ends_before(level: int) -> None:
    """Windows: at log-off and shutdown this process is ended before those of lower levels; all begin at 0x280.  A keeper
    that outlived its jobs there would write down as the end of each how Windows ended it."""
    if WINDOWS:
        kernel32().SetProcessShutdownParameters(level, 1)  # SHUTDOWN_NORETRY


def shows_no_errors() -> None:
    """Windows: what this process starts and all they start end at once when they crash, or lack a DLL, with the code that
    says so.  Else Windows may show a window first, and they last until somebody has closed it."""
    if WINDOWS:
        # SEM_FAILCRITICALERRORS, SEM_NOGPFAULTERRORBOX, SEM_NOOPENFILEERRORBOX
        kernel32().SetErrorMode(kernel32().GetErrorMode() | 0x8003)


# ---------------------------------------------------------------------------------------------------------------------
# What ps and tasklist print
# ---------------------------------------------------------------------------------------------------------------------


class Process(NamedTuple):
    """One line of a snapshot.  ppid and pgid are 0 where the system does not tell (Windows).

    cpu     s, with that of its children that are over and were waited for, where the system tells (Linux)
    memory  bytes
    start   seconds since boot; None = not told
    zombie  it is over, but nobody has waited for it yet
    """

    pid: int
    ppid: int
    pgid: int
    cpu: float
    memory: int
    start: Optional[float] = None
    zombie: bool = False


# S with bsdtime: CPU time includes children that are over; S changes no other time column.
PS = ["ps", "S", "-A"]
# etimes, not lstart, which moves whenever somebody sets the clock
PS_COLUMNS = ("pid", "ppid", "pgid", "bsdtime", "rss", "stat", "etimes")
_PS_LINE = re.compile(
    r"\s*(\d+)\s+(\d+)\s+(\d+)\s+(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)(?:\.\d+)?\s+(\d+)\s+([A-Za-z]\S*)\s+(\S+)\s*\Z",
    re.ASCII,
)


def parse_ps(text: str, clock: float) -> Dict[int, Process]:
    """The processes in the output of PS with PS_COLUMNS at a moment in seconds since boot; CPU time in any of ps's
    forms, [[DD-]HH:]MM:SS."""
    found = {}
    for line in text.splitlines():
        words = _PS_LINE.match(line)
        if words:
            pid, ppid, pgid, days, hours, minutes, seconds, rss = (int(word or 0) for word in words.groups()[:8])
            cpu = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
            age, zombie = words.group(10), words.group(9)[0] in "ZX"
            start = clock - int(age) if age.isdigit() else None
            if start is not None and start < -START_TOLERANCE:
                start = clock  # ps counts below 0, and round, where a process was started while it looked
            found[pid] = Process(pid, ppid, pgid, cpu, rss * 1024, start, zombie)
    return found


def parse_tasklist(text: str) -> Dict[int, Process]:
    """The processes in the output of `tasklist /v /fo csv /nh`, in whatever language.

    Told by its shape alone, since every word of it is translated: a process is a CSV row of eight fields or more whose
    second is a number; of the memory the digits count (KiB, whatever separates the thousands), of the CPU time the
    groups of digits.  `INFO: No tasks are running ...` has one field.
    """
    import csv

    found = {}
    for line in text.replace("\0", "").splitlines():
        row = next(csv.reader([line]), [])  # line by line: a window title's odd quote must not swallow the next process
        if len(row) >= 8 and row[1].isdigit():
            kib = re.sub(r"\D", "", row[4], flags=re.ASCII)
            clock = [int(group) for group in re.findall(r"\d+", row[7], re.ASCII)]
            cpu = clock[0] * 3600 + clock[1] * 60 + clock[2] if len(clock) == 3 else 0
            found[int(row[1])] = Process(int(row[1]), 0, 0, cpu, int(kib or 0) * 1024)
    return found


def tree(processes: Dict[int, Process], root: int) -> List[Process]:
    """The process `root`, its group, and all their descendants, also those that have left the group."""
    children = collections.defaultdict(list)
    for process in processes.values():
        children[process.ppid].append(process)
    members = {p.pid: p for p in processes.values() if p.pid == root or (p.pgid == root and p.pgid)}
    pending = list(members.values())
    while pending:
        for child in children.get(pending.pop().pid, ()):
            if child.pid not in members:
                members[child.pid] = child
                pending.append(child)
    return list(members.values())


# ---------------------------------------------------------------------------------------------------------------------
# Process tools: the same methods for Linux and Windows
# ---------------------------------------------------------------------------------------------------------------------


def run_tool(argv: List[str], log: Any) -> Optional[bytes]:
    """What a process tool prints, or None if it failed: the only place that starts one."""
    flags = {"creationflags": 0x08000000} if WINDOWS else {}  # CREATE_NO_WINDOW
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            timeout=60,
            env={**os.environ, "LC_ALL": "C"},
            **flags,  # type: ignore[arg-type]
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("tool.failed tool=%s error=%r", argv[0], str(error))
        return None
    if done.returncode:
        log.debug("tool.exit tool=%s exit=%d stderr=%r", " ".join(argv), done.returncode, done.stderr[:200])
        return None
    return done.stdout


class LinuxTools:
    """ps and kill.  A job is the leader of a process group and session of its own."""

    name, lister = "linux", "ps"
    popen = {"start_new_session": True}

    def __init__(self, log: Any):
        self.log = log
        self.boot = boot_id()
        self.own_start = start_of(os.getpid()) or 0.0

    def snapshot(self) -> Optional[Dict[int, Process]]:
        """Every process there is; None if ps failed, which says nothing about anybody."""
        before = boot_clock()
        printed = run_tool(PS + [word for column in PS_COLUMNS for word in ("-o", column + "=")], self.log)
        if printed is None:
            return None
        text = printed.decode("utf-8", "replace")
        found = parse_ps(text, before)
        own = found.get(os.getpid())
        # ps may have begun long after it was called, on a machine that pages or slept: our own age tells
        late = self.own_start - own.start if own and own.start is not None else 0.0
        if 0 < late < boot_clock() - before + 1:
            return parse_ps(text, before + late) or None
        # In some containers ps reckons ages from an uptime that is not the system's; below 0 they cannot be told from 0
        if own and (own.start in (None, before) or abs(late) > START_TOLERANCE):
            return {pid: process._replace(start=start_of(pid)) for pid, process in found.items()}
        return found or None

    def is_same(self, process: Process, started: Optional[float]) -> bool:
        """True if that process of a snapshot is the one that was started then (see Keeper)."""
        return None not in (started, process.start) and abs(process.start - started) < START_TOLERANCE

    held = staticmethod(contextlib.nullcontext)  # here numbers are not given out again so soon

    def end(self, pid: int, members: Iterable[int]) -> None:
        """Asks the job to end: TERM to its group, and to what left the group."""
        self._kill("-TERM", pid, members)

    def kill(self, pid: int, members: Iterable[int]) -> None:
        self._kill("-KILL", pid, members)

    def _kill(self, signal_name: str, pid: int, members: Iterable[int]) -> None:
        targets = [f"-{pid}"] + [str(member) for member in members if member != pid]
        run_tool(["kill", signal_name, "--"] + targets, self.log)

    def cpu_visible(self, program: str) -> bool:
        return True


class WindowsTools:
    """tasklist and taskkill, which knows a process's tree.  tasklist does not: CPU time is the job's own process's."""

    name, lister = "windows", "tasklist"
    # CREATE_NEW_PROCESS_GROUP: a Ctrl-C in the client's window is not for the job; CREATE_NO_WINDOW: nor is the window
    popen = {"creationflags": 0x00000200 | 0x08000000}

    boot = ""

    def __init__(self, log: Any):
        self.log = log

    def is_same(self, process: Process, started: Optional[float]) -> bool:
        """By the time it was created, which tasklist does not tell: numbers are given out again at once here."""
        return started is not None and creation_time_of(process.pid) == started

    def snapshot(self) -> Optional[Dict[int, Process]]:
        printed = run_tool(["tasklist", "/v", "/fo", "csv", "/nh"], self.log)
        return parse_tasklist(printed.decode("utf-8", "replace")) or None if printed is not None else None

    @contextlib.contextmanager
    def held(self, pid: int) -> Iterator[None]:
        """As long as it is entered, nobody else is given the number of the process that has it now: between the look at
        who that is and its end lies the start of taskkill."""
        handle = kernel32().OpenProcess(0x1000, False, pid)
        try:
            yield
        finally:
            if handle:
                import ctypes

                kernel32().CloseHandle(ctypes.c_void_p(handle))

    def end(self, pid: int, members: Iterable[int]) -> None:
        """Asks politely; console programs refuse that, and are killed after the delay."""
        run_tool(["taskkill", "/PID", str(pid), "/T"], self.log)

    def kill(self, pid: int, members: Iterable[int]) -> None:
        run_tool(["taskkill", "/PID", str(pid), "/T", "/F"], self.log)

    def cpu_visible(self, program: str) -> bool:
        """False of what leaves the work to its children, whose CPU time cannot be seen here: batch files and shells, and
        what does no more than start another program, as all do in the Scripts of a Python or a virtual environment."""
        folder, beside = os.path.dirname(program), ("pyvenv.cfg", os.path.join(os.pardir, "pyvenv.cfg"))
        launcher = re.search(r"[/\\](scripts|javapath|shims)[/\\][^/\\]*\Z", program, re.IGNORECASE)
        launcher = launcher or any(os.path.exists(os.path.join(folder, name)) for name in beside)
        return not (launcher or is_batch(program) or _is_program(program.rstrip(". "), SHELLS))


# ---------------------------------------------------------------------------------------------------------------------
# Verdicts: numbers and clocks in, decisions out
# ---------------------------------------------------------------------------------------------------------------------


class DeadWatch:
    """Tells when a job has stopped working: its tree's CPU stayed under `percent` of one core for `window` seconds.

    A sample above starts the window anew, and so does a gap between samples, because then the machine slept.
    """

    def __init__(self, window: float, percent: float, gap: float):
        self.window, self.percent, self.gap = window, percent, gap
        self.since: Optional[float] = None  # monotonic: when the quiet began
        self.last: Optional[Tuple[float, float]] = None

    def is_dead(self, clock: float, cpu: float) -> bool:
        """Takes in a sample: monotonic seconds, total CPU seconds of the tree so far."""
        last, self.last = self.last, (clock, cpu)
        if last is None or clock - last[0] > self.gap or self.since is None:
            self.since = clock
        elif (cpu - last[1]) * 100 >= self.percent * (clock - last[0]):
            self.since = clock
        return clock - self.since >= self.window


class Usage:
    """What a job's tree has used, from snapshots.

    A process that ends takes its CPU time to its parent, if that waits for it, and else out of the tree: where the
    tree's total falls, what fell is kept.
    """

    def __init__(self) -> None:
        self.cpu = 0.0  # s, total so far; never falls
        self.memory = 0  # bytes, now
        self.max_memory = 0
        self._gone = 0.0
        self._total = 0.0

    def update(self, members: List[Process]) -> None:
        total = sum(process.cpu for process in members)
        self._gone += max(0.0, self._total - total)
        self._total = total
        self.cpu = self._gone + total
        self.memory = sum(process.memory for process in members)
        self.max_memory = max(self.max_memory, self.memory)

    def save(self) -> List[float]:
        return [round(self._gone, 3), round(self._total, 3), self.max_memory]

    def restore(self, saved: Any) -> None:
        """Goes on from what an earlier client has saved; anything else is ignored."""
        if isinstance(saved, list) and len(saved) == 3 and all(_is_number(value) and value >= 0 for value in saved):
            self._gone, self._total, self.max_memory = saved[0], saved[1], int(saved[2])
            self.cpu = self._gone + self._total


def over_limit(job: Job, usage: Usage, over_memory_before: bool) -> str:
    """The Status a job is to be ended with for what it used ("memory", "cputime"), or "".

    Memory must be over its limit in two samples in a row: a short peak is no reason to throw away days.
    """
    if job.memory and usage.memory > job.memory and over_memory_before:
        return "memory"
    if job.cputime and usage.cpu > job.cputime:
        return "cputime"
    return ""


def split_words(text: str) -> List[str]:
    """A command's words; quotes hold words together, and a backslash is just a backslash, as in Windows' paths."""
    import shlex

    lexer = shlex.shlex(text, posix=True)
    lexer.whitespace_split, lexer.escape, lexer.commenters = True, "", ""
    try:
        words = list(lexer)
    except ValueError as error:
        raise BadRequest(f"{text!r} is no command: {error}") from None
    if not words:
        raise BadRequest(
            "a prefix without a word would allow every command: leave --allow-prefix away if that is meant"
        )
    return words


def prefix_words(prefix: List[str]) -> str:
    """A prefix as a person would write it."""
    return "'" + " ".join(f'"{word}"' if re.search(r"\s", word) or not word else word for word in prefix) + "'"


def allowed(params: List[str], prefixes: List[List[str]]) -> bool:
    """True if the command starts with the words of one of the prefixes, or if there are none."""
    return not prefixes or any(params[: len(prefix)] == prefix for prefix in prefixes)


class Backoff:
    """Seconds to wait after each failure in a row: 1, 2, 4 ... 60, each up to a quarter longer or shorter, so that a
    room of clients does not come back in step."""

    def __init__(self, chance: Callable[[], float] = lambda: int.from_bytes(os.urandom(4), "big") / 2**32):
        self.chance = chance
        self.failures = 0

    def next(self) -> float:
        self.failures += 1
        return min(60.0, 2.0 ** min(self.failures - 1, 6)) * (0.75 + self.chance() / 2)

    def reset(self) -> None:
        self.failures = 0


# ---------------------------------------------------------------------------------------------------------------------
# A good guest: when jobs are welcome here, which ones, and how much there is for them
# ---------------------------------------------------------------------------------------------------------------------


class Hours(NamedTuple):
    """When jobs may start: (first minute, minute of the end) of the day, local time, each."""

    text: str
    spans: List[Tuple[int, int]]


def parse_hours(text: str) -> Hours:
    """`19:00-07:00,12:00-13:00`; raises BadRequest.

    An end that is not after its beginning is the next day's; one that is the same makes it the whole day.
    """
    spans = []
    for span in text.split(","):
        words = re.match(r"\s*(\d{1,2}):(\d\d)\s*-\s*(\d{1,2}):(\d\d)\s*\Z", span, re.ASCII)
        times = [int(word) for word in words.groups()] if words else [99] * 4
        begin, end = times[0] * 60 + times[1], times[2] * 60 + times[3]
        if max(times[1], times[3]) > 59 or begin >= 1440 or end > 1440:
            raise BadRequest(f"{span!r} are no hours: write 19:00-07:00, and more of them after a comma")
        spans.append((begin, end))
    return Hours(text, spans)


def in_hours(hours: Hours, minute: int) -> bool:
    """True if that minute of the day is within one of the spans."""
    return any(
        begin <= minute < end if begin < end else minute >= begin or minute < end % 1440 or begin == end
        for begin, end in hours.spans
    )


def minute_of_day(moment: float) -> int:
    local = time.localtime(moment)
    return local.tm_hour * 60 + local.tm_min


def machine_memory() -> Tuple[int, int]:
    """(bytes there are, bytes free for programs); raises OSError."""
    if WINDOWS:
        import ctypes

        # MEMORYSTATUSEX: two DWORDs, then numbers of 8 bytes of which the first is all and the second what is free
        status = (ctypes.c_uint64 * 8)(64)
        if not kernel32().GlobalMemoryStatusEx(ctypes.byref(status)):
            raise OSError("GlobalMemoryStatusEx failed")
        return status[1], status[2]
    found = {}
    with open("/proc/meminfo") as file:
        for line in file:
            words = line.split()
            if words[0] in ("MemTotal:", "MemAvailable:"):
                found[words[0]] = int(words[1]) * 1024
    return found.get("MemTotal:", 0), found.get("MemAvailable:", 0)


def free_disk(path: str) -> int:
    """Bytes that a user may still write on the disk of a folder; raises OSError."""
    if WINDOWS:
        import shutil

        return shutil.disk_usage(path).free
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


def pause_words(options: argparse.Namespace, spool: str, moment: float) -> str:
    """Why no job is to start at this moment (wall time), one sentence; "" = it may."""
    if options.hours and not in_hours(options.hours, minute_of_day(moment)):
        return f"it takes jobs only in its hours, {options.hours.text}"
    for what, flag, wanted, look in (
        ("memory", "--min-free-memory", options.min_free_memory, lambda: machine_memory()[1]),
        (f"the disk of {spool}", "--min-free-disk", options.min_free_disk, lambda: free_disk(spool)),
    ):
        try:
            free = look() if wanted else 0
        except OSError as error:
            return f"it cannot tell how much of {what} is free: {os_words(error)}"
        if free < wanted:
            return f"only {free >> 20} MB of {what} are free, less than its {flag} {wanted >> 20}mb"
    return ""


def disk_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT) or getattr(error, "winerror", None) in (39, 112)


_PLACEHOLDER = re.compile(r"\{(ncpus|memory_gb|hostname)\}")


def fill(job: Job, host: str, max_jobs: int, total: int) -> List[str]:
    """The params of a job with what this machine has for it filled in; total: bytes of memory of the machine.

    Its share of the memory is its limit, or by its slots; in whole GiB rounded down, but 1 at least.
    """
    memory = job.memory or total * min(1.0, job.ncpus / max_jobs)
    values = {"ncpus": str(job.ncpus), "memory_gb": str(max(1, int(memory) >> 30)), "hostname": host}
    return [_PLACEHOLDER.sub(lambda found: values[found.group(1)], word) for word in job.params]


class NoOutput(BadRequest):
    """An output that is not for a job to write to."""


class AllowList:
    """What may run here: --allow-prefix, and the lines of each --allow-file, read again when it changes.

    own      [[word]]
    files    absolute paths
    jobs     folders that jobs write to, where no such file may be
    """

    def __init__(self, own: List[List[str]], files: List[str], jobs: List[str]):
        self.own, self.files, self.jobs = own, files, jobs
        self.read: Dict[str, Tuple[Any, List[List[str]]]] = {}  # state, prefixes

    def prefixes(self) -> Optional[List[List[str]]]:
        """None = everything may run; raises BadRequest while a file cannot be gone by: then nothing may."""
        if not self.own and not self.files:
            return None
        return self.own + [prefix for path in self.files for prefix in self._of(path)]

    def _of(self, path: str) -> List[List[str]]:
        try:
            found = os.stat(path)
            state = found.st_mtime_ns, found.st_size, found.st_ino, found.st_mode
            known = self.read.get(path)  # looked up once: other threads look at the files, too
            if known is None or known[0] != state:
                self._judge(path, found.st_mode)
                with open(path, encoding="utf-8-sig") as file:
                    text = file.read(MAX_ALLOW + 1)
                if len(text) > MAX_ALLOW:  # what is left of a line that is cut off would allow more than it says
                    raise BadRequest(f"it is over {MAX_ALLOW} characters")
                lines = [line.strip() for line in text.split("\n")]
                prefixes = [split_words(line) for line in lines if line and not line.startswith("#")]
                if not prefixes:
                    raise BadRequest("it names no command")
                known = self.read[path] = state, prefixes
            return known[1]
        except (OSError, UnicodeError, BadRequest) as error:
            self.read.pop(path, None)
            words = os_words(error) if isinstance(error, OSError) else str(error)
            raise BadRequest(f"cannot go by --allow-file {path}: {words}; nothing may run until it is right") from None

    def _judge(self, path: str, mode: int) -> None:
        """Raises BadRequest for a file that jobs or other people could change."""
        for place in (os.path.abspath(path), os.path.realpath(path)):
            for folder in self.jobs:
                if within(place, folder):
                    raise BadRequest(f"it is in {folder}, where jobs write: keep it in another folder")
        if not WINDOWS and mode & 0o022:
            raise BadRequest("its group or others may write to it: chmod go-w")


def within(path: str, folder: str) -> bool:
    """True if a path is in a folder or its subfolders, or is it; links in the folders' own names do not hide that."""
    parent, name = os.path.split(os.path.abspath(path))
    path, folder = (
        os.path.normcase(text) for text in (os.path.join(os.path.realpath(parent), name), os.path.realpath(folder))
    )
    return path == folder or path.startswith(os.path.join(folder, ""))


def plain_windows_path(path: str) -> str:
    """An absolute path without what leads to the same file all the same: `\\\\?\\` before it, the name of a stream, dots and
    blanks behind it."""
    device = re.match(r"[\\/]{2}[?.][\\/](UNC[\\/])?", path, re.IGNORECASE)
    path = ("\\\\" if device[1] else "") + path[device.end() :] if device else path
    folder, name = re.match(r"(.*[\\/])?(.*)\Z", path, re.DOTALL).groups()  # type: ignore[union-attr]  # fits anything
    return (folder or "") + re.sub(r"[. ]*(:.*)?\Z", "", name, flags=re.DOTALL)


# ---------------------------------------------------------------------------------------------------------------------
# The keeper: the jobs' parent, a process of its own (see Agent._start_keeper)
# ---------------------------------------------------------------------------------------------------------------------


class Keeper:
    """Starts jobs as it is told on standard input and says on standard output, and in their folders, how they end.

    In:  {"Folder", "Params", "Env", "WorkDir", "StdOut", "StdErr"}   a line each; in Env, null: not to be there
    Out: {"Ready"} once it holds its lock
         {"Folder", "Pid", "StartTime", "Clock", "Started", "Boot"} when a job runs: Clock is the awake clock then,
         Started tells its process from others with its number: seconds since boot, on Windows the creation time
         {"Folder", "ExitStatus", "Comment", "EndTime", "Seconds", "DiskFull"} when it is over
    Ends when its input has ended and no job is left.  Priority is that of the jobs: on Linux the keeper has it too, and
    they inherit it.
    """

    def __init__(self, lock_path: str, nice: int = 0) -> None:
        keepers, self.name = os.path.split(lock_path)
        self.jobs = os.path.join(os.path.dirname(keepers), "jobs")
        self.children: Dict[subprocess.Popen, Tuple[str, float]] = {}  # folder, awake clock at its start
        self.environ = dict(os.environ)
        self.unwritten: List[Tuple[str, Dict[str, Any]]] = []  # what the disk had no room for
        self.boot = boot_id()
        self.popen = dict((WindowsTools if WINDOWS else LinuxTools).popen)
        if WINDOWS and nice:
            self.popen["creationflags"] |= 0x4000 if nice < 15 else 0x40  # below normal; idle

    def start(self, order: Dict[str, Any]) -> Optional[subprocess.Popen]:
        try:
            with contextlib.ExitStack() as files:
                out = files.enter_context(open(order["StdOut"], "wb", opener=_at_once))
                same = order["StdErr"] == order["StdOut"]
                err = out if same else files.enter_context(open(order["StdErr"], "wb", opener=_at_once))
                child = self._spawn(order, out, err)
        except OSError as error:
            words = f"cannot open {error.filename}: {os_words(error)}"
            self._over(order["Folder"], EXIT_NO_OUTPUT, words, DiskFull=disk_full(error))
            return None
        except ValueError as error:
            self._over(order["Folder"], EXIT_NO_OUTPUT, f"cannot open {order['StdOut']} or {order['StdErr']}: {error}")
            return None
        if child:
            clock = awake_clock()
            self.children[child] = (order["Folder"], clock)
            started = creation_time(child._handle) if WINDOWS else round(boot_clock(), 3)  # type: ignore[attr-defined]
            facts = {"Pid": child.pid, "StartTime": time.time(), "Clock": round(clock, 3)}
            self._note(order["Folder"], {**facts, "Started": started, "Boot": self.boot})
            self._say({"Folder": order["Folder"], **facts, "Started": started, "Boot": self.boot})
        return child

    def _spawn(self, order: Dict[str, Any], out: Any, err: Any) -> Optional[subprocess.Popen]:
        params = order["Params"]
        env = {name: text for name, text in {**self.environ, **order["Env"]}.items() if text is not None}
        try:
            return subprocess.Popen(
                program(params, env, order["WorkDir"]),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=order["WorkDir"] or None,
                env=env,
                **self.popen,
            )
        except OSError as error:
            nowhere = getattr(error, "winerror", None) == 267  # so Windows says it, and names no folder
            at_fault = order["WorkDir"] if nowhere or error.filename == order["WorkDir"] else params[0]
            comment, full = f"cannot start {at_fault}: {os_words(error)}", disk_full(error)
        except (ValueError, BadRequest) as error:  # what no program can be given: a lone half of a surrogate pair
            comment, full = f"cannot start {params[0]}: {error}", False
        self._over(order["Folder"], EXIT_NOT_STARTED, comment, DiskFull=full)
        return None

    def ended(self, child: subprocess.Popen) -> None:
        """The child's returncode is known."""
        folder, began = self.children.pop(child)
        code, seconds = child.returncode, round(awake_clock() - began, 3)
        # A power cut must not lose the end of a long run; for a short one the sync would cost more than the run.
        self._over(folder, EXIT_SIGNALLED - code if code < 0 else code, "", sync=seconds > 10, Seconds=seconds)

    def give_back(self) -> None:
        """Its input has ended, and so has its client: what that had made ready, and not yet ordered, nobody will begin.
        While another job keeps this keeper alive, the next client could not tell that."""
        begun = {folder for folder, _ in self.unwritten}
        for folder in [os.path.join(self.jobs, name) for name in _names(self.jobs)]:
            notes = read_notes(folder)
            if notes.get("Keeper") == self.name and notes.keys().isdisjoint(("Pid", "ExitStatus")):
                if folder not in begun:
                    words = "its client was ended before it had started it: run again"
                    self._over(folder, EXIT_NOT_STARTED, words, Status="released")

    def _over(self, folder: str, exit_status: int, comment: str, sync: bool = False, **more: Any) -> None:
        end = {"ExitStatus": exit_status, "Comment": _short(comment), "EndTime": format_time(now()), **more}
        self._note(folder, end, sync)
        self._say({"Folder": folder, **end})

    def _note(self, folder: str, event: Dict[str, Any], sync: bool = False) -> None:
        """Writes it into the run's log, as soon as the disk has room for it."""
        try:
            note(folder, event, sync)
        except OSError:
            self.unwritten.append((folder, event))

    def write_again(self) -> None:
        """Tries once more what could not be written; what a client has meanwhile heard and reported has no folder."""
        waiting, self.unwritten = self.unwritten, []
        for folder, event in waiting:
            if os.path.isdir(folder):
                self._note(folder, event)

    @property
    def pause(self) -> Optional[float]:
        """Seconds until write_again has something to do."""
        return 5.0 if self.unwritten else None

    def _say(self, message: Dict[str, Any]) -> None:
        try:
            os.write(1, json.dumps(message).encode() + b"\n")
        except OSError:
            pass  # no client any more: the next one reads the folders


def _short(text: str) -> str:
    """A text without the middle of what would be too long: what is wrong with a name stands behind it."""
    half = LONGEST_COMMENT // 2
    return text if len(text) <= LONGEST_COMMENT else f"{text[:half]} ... {text[-half:]}"


def _names(folder: str) -> List[str]:
    """What is in a folder; nothing if it cannot be looked at."""
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _at_once(path: str, flags: int) -> int:
    """Opens an output without waiting: a pipe that nobody reads would hold up every other job."""
    file = os.open(path, flags | getattr(os, "O_NONBLOCK", 0), 0o600)
    if not WINDOWS:
        # /dev/stdout is, here, where the client hears of its jobs, and what comes in at /dev/stdin is done
        if any(os.path.samestat(os.fstat(file), os.fstat(own)) for own in (0, 1)):
            os.close(file)
            raise OSError(errno.EPERM, "that is the client's own: choose another place for output", path)
        os.set_blocking(file, True)
    return file


def windows_program(name: str, path: Optional[str], workdir: str) -> str:
    """The file of that name, found on the PATH unless it is a path, also without its extension; the name if there is
    none."""
    if not os.path.dirname(name):
        import shutil

        return shutil.which(name, path=path) or name
    name = os.path.join(workdir, name)  # shutil.which finds extensions of paths from Python 3.12 on
    endings = [ending for ending in os.environ.get("PATHEXT", "").lower().split(os.pathsep) if ending]
    known = name.lower().endswith(tuple(endings))
    return next(filter(os.path.isfile, [] if known else [name + ending for ending in endings]), name)


BATCH = (".bat", ".cmd")
SHELLS = "cmd|sh|bash|dash|zsh|powershell|pwsh|py|pyw"


def is_batch(program: str) -> bool:
    return program.rstrip(". ").lower().endswith(BATCH)  # Windows drops dots and blanks at a name's end


def program(params: List[str], env: Dict[str, str], workdir: str = "") -> Union[List[str], str]:
    """What to start.  On Windows the program is found first, with its extension, and a path to it begins in `workdir`, as
    it does on Linux; BadRequest where cmd.exe would change an argument."""
    if not WINDOWS:
        return params
    found = windows_program(params[0], env.get("PATH"), workdir)
    if is_batch(found):
        # A batch file is run by cmd.exe, which parses the command line once more, quotes or not.
        for word in params[1:]:
            if re.search(r'[&|<>^%!"\r\n]', word):
                raise BadRequest(f"a batch file cannot be given {word!r} safely: cmd.exe would act on its characters")
        # In quotes it acts on none of these, in the name of a folder say; Popen sets them only where there are blanks.
        if re.search(r"[&^()@,;=]", found):
            return f'"{found}" {subprocess.list2cmdline(params[1:])}'
    return [found] + params[1:]


def keep(lock_path: str, priority: str = "0") -> int:
    """The keeper's main."""
    nice = int(priority)
    if nice and not WINDOWS:
        os.nice(nice)
    ends_before(KEEPER_LEVEL)
    shows_no_errors()
    parent = os.getppid()
    while True:
        try:
            lock = FileLock(lock_path)
            break
        except (OSError, FileLock.Busy):
            # the disk is full: until there is room, the client asks for no jobs; or another client is just looking at it
            time.sleep(0.5)
            if os.getppid() != parent:
                return 1
    keeper = Keeper(lock_path, nice)
    keeper._say({"Ready": True})
    (_keep_windows if WINDOWS else _keep_linux)(keeper)
    lock.release()
    for _ in range(20):
        try:
            os.remove(lock_path)
        except FileNotFoundError:  # the spool is gone
            break
        except OSError:  # Windows, while a client looks at it
            time.sleep(0.1)
    return 0


def _keep_linux(keeper: Keeper) -> None:
    """One thread: waits for orders, and for SIGCHLD through a pipe."""
    import selectors

    wake_read, wake_write = os.pipe()
    for end in (wake_read, wake_write):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    selector = selectors.DefaultSelector()
    selector.register(0, selectors.EVENT_READ)
    selector.register(wake_read, selectors.EVENT_READ)
    orders, open_input = b"", True
    while open_input or keeper.children or keeper.unwritten:
        keeper.write_again()
        for key, _ in selector.select(keeper.pause):
            data = os.read(key.fd, 1 << 16)
            if key.fd == wake_read:
                for child in [child for child in keeper.children if child.poll() is not None]:
                    keeper.ended(child)
            elif not data:
                open_input = False
                selector.unregister(0)
                keeper.give_back()
            else:
                *lines, orders = (orders + data).split(b"\n")
                for line in lines:
                    keeper.start(json.loads(line))


def _keep_windows(keeper: Keeper) -> None:
    """A thread for the orders and one a job: Windows waits for pipes and processes in no other way."""
    import queue

    events: "queue.Queue[Tuple[str, Any]]" = queue.Queue()

    def read_orders() -> None:
        for line in sys.stdin.buffer:
            events.put(("start", json.loads(line)))
        events.put(("closed", None))

    def wait_for(child: subprocess.Popen) -> None:
        child.wait()
        events.put(("ended", child))

    threading.Thread(target=read_orders, daemon=True).start()
    open_input = True
    while open_input or keeper.children or keeper.unwritten:
        keeper.write_again()
        try:
            event, value = events.get(timeout=keeper.pause)
        except queue.Empty:
            continue
        if event == "closed":
            open_input = False
            keeper.give_back()
        elif event == "ended":
            keeper.ended(value)
        else:
            child = keeper.start(value)
            if child:
                threading.Thread(target=wait_for, args=(child,), daemon=True).start()


# ---------------------------------------------------------------------------------------------------------------------
# The spool
# ---------------------------------------------------------------------------------------------------------------------


def note(folder: str, event: Dict[str, Any], sync: bool = False) -> None:
    """Adds a line to a run's log; raises OSError.

    One file, only ever appended to: on a busy disk making and renaming files costs more than all else a short job does.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
    file = os.open(os.path.join(folder, "log"), flags, 0o600)
    try:
        size = os.lseek(file, 0, os.SEEK_END)
        line = json.dumps(event).encode() + b"\n"
        if size and os.lseek(file, size - 1, os.SEEK_SET) >= 0 and os.read(file, 1) != b"\n":
            line = b"\n" + line  # the last one is torn: it must not spoil this one
        if os.write(file, line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.path.join(folder, "log"))
        if sync:
            os.fsync(file)
    finally:
        os.close(file)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e18  # and no NaN


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_temp(value: Any) -> bool:
    """A folder that this client makes: what is in it will be removed."""
    place = re.split(r"[/\\]", value)[-2:] if isinstance(value, str) else []
    return value == "" or (len(place) == 2 and bool(re.match(r"jr-[0-9a-f]{8}\Z", place[0])))


def _is_time(value: Any) -> bool:
    try:
        return jobrunner.parse_time(value) > 0
    except (BadRequest, TypeError, AttributeError):
        return False


# What the keys of a log may hold.  A number of 1 or less is no job's process, and as a group it means far more.
NOTES: Dict[str, Callable[[Any], bool]] = {
    "Pid": lambda value: isinstance(value, int) and 1 < value < 1 << 32,
    "ExitStatus": lambda value: value is None or (isinstance(value, int) and _is_number(value)),
    "Ending": lambda value: isinstance(value, str) and value in ENDINGS,
    "Status": lambda value: value == "released",
    "Temp": _is_temp,
    "EndTime": _is_time,
    "Started": lambda value: value is None or _is_number(value),
    **dict.fromkeys(("StartTime", "Clock", "Seconds", "EndingClock", "Format"), _is_number),
    **dict.fromkeys(("Keeper", "StdOut", "StdErr", "Boot", "Machine", "Comment", "Why"), _is_text),
}


def read_log(folder: str) -> Tuple[Dict[str, Any], List[str]]:
    """All that a run's log says, later lines over earlier ones, and what in it cannot be used; raises OSError."""
    notes: Dict[str, Any] = {}
    strange = []
    with open(os.path.join(folder, "log"), "rb") as file:
        lines = file.read().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            found = json.loads(line) if line else {}
            if not isinstance(found, dict):
                raise ValueError
        except (ValueError, RecursionError):
            strange.append(f"line {number} is torn or damaged")
            continue
        for key, value in found.items():
            if key not in NOTES or NOTES[key](value):
                notes[key] = value
            else:
                strange.append(f"line {number} has a strange {key}")
    return notes, strange


def read_notes(folder: str) -> Dict[str, Any]:
    """What a run's log says; nothing if it cannot be read just now."""
    try:
        return read_log(folder)[0]
    except OSError:
        return {}


class Spool:
    """The folders of the jobs here; see the head of this file.  Raises JobrunnerError if it cannot be had."""

    def __init__(self, path: str, log: Any, machine: str):
        self.path, self.log, self.machine = os.path.abspath(path), log, machine
        folders = [os.path.join(self.path, name) for name in ("jobs", "output", "keepers", "nodes")]
        self.jobs, self.output, self.keepers, self.nodes = self.folders = folders
        try:
            os.makedirs(self.path, mode=0o700, exist_ok=True)
            for folder in folders:
                os.makedirs(folder, mode=0o700, exist_ok=True)
            for folder in [self.path] * self._has_only_ours() + folders:
                with contextlib.suppress(OSError):  # somebody else's, say, who lets us write to it
                    os.chmod(folder, 0o700)
            self.lock = FileLock(os.path.join(self.path, "lock"))
            self.client = self._client_id()
        except FileLock.Busy as error:
            raise JobrunnerError(
                f"the spool {self.path} is in use by another client ({error}): stop that one, or start with another "
                "--spool"
            ) from None
        except OSError as error:
            raise JobrunnerError(
                f"cannot use the spool {self.path}: {os_words(error)}: choose another --spool"
            ) from None

    def _has_only_ours(self) -> bool:
        """False of a folder with other things in it, /tmp or a home say, which others may have to get at."""
        ours = {os.path.basename(folder) for folder in self.folders} | {"lock", "client"}
        return ours.issuperset(os.listdir(self.path))

    def _client_id(self) -> str:
        """The id in the file `client`: a new one on the first run, and in a folder copied from another machine."""
        path = os.path.join(self.path, "client")
        known = b""
        with contextlib.suppress(FileNotFoundError):
            with open(path, "rb") as file:
                known = file.read(1000)
        words = known.decode("utf-8", "replace").split()
        if not known.strip():
            return self.new_client_id()
        if not re.match(r"[0-9a-f]{16}\Z", words[0]):
            self.log.warning("spool.damaged file=%s: it holds no id: this client goes by a new one", path)
            return self.new_client_id()
        if len(words) > 1 and words[1] != self.machine:
            self.log.warning(
                "spool.copied path=%s: it comes from %s and this is %s: this client goes by an id of its own",
                self.path, words[1], self.machine,
            )  # fmt: skip
            return self.new_client_id()
        return words[0] if len(words) > 1 else self.new_client_id(words[0])

    def new_client_id(self, name: str = "") -> str:
        """Makes an id, or takes one that was without its machine, and writes it down; raises OSError."""
        self.client = name or os.urandom(8).hex()
        path = os.path.join(self.path, "client")
        with open(path + ".new", "w", encoding="utf-8", errors="replace") as file:
            file.write(f"{self.client} {self.machine}\n")
        jobrunner.replace_file(path + ".new", path)
        return self.client

    def is_gone(self) -> bool:
        """True if somebody has removed the spool, or put another one in its place: what is written there from now on
        is known to no later client.  (Windows removes no file that is open, so there the lock is the one it was.)"""
        try:
            held, found = os.fstat(self.lock.file.fileno()), os.stat(self.lock.file.name)
        except OSError:
            return True
        return not (WINDOWS or os.path.samestat(held, found)) or not all(map(os.path.isdir, self.folders))

    def folder_of(self, job: Job) -> str:
        return os.path.join(self.jobs, f"{_file_name(job.id)}.{job.run_count}")

    def make(self, job: Job, notes: Dict[str, Any]) -> str:
        """The folder of a run, with the job in its log and what else is to be known of the run; raises OSError."""
        folder = self.folder_of(job)
        os.mkdir(folder, 0o700)
        try:
            note(folder, {"Format": FORMAT, "Job": job.to_record(), "Machine": self.machine, **notes})
        except OSError as error:
            with contextlib.suppress(OSError):
                self.remove(folder)
            error.filename = error.filename or os.path.join(folder, "log")
            raise
        return folder

    def output_file(self, job: Job, letter: str, folder: str = "") -> str:
        """Where a job prints to that names no file, or no more than the folder: NAME.oNUMBER or NAME.eNUMBER."""
        number = str(job.number) if job.number else job.id[:8]
        return os.path.join(folder or self.output, f"{_file_name(job.title)}.{letter}{_file_name(number)}") + (
            "" if job.index is None else f".{job.index}"
        )

    def node_file(self, host: str, ncpus: int) -> str:
        """A file with the host's name for each slot; the same for all jobs of so many, as making it costs more than
        looking whether a job has spoiled it.  Raises OSError."""
        path, lines = os.path.join(self.nodes, str(ncpus)), (sayable(host) + "\n").encode("utf-8", "replace") * ncpus
        try:
            spoiled = os.stat(path).st_size != len(lines)
        except FileNotFoundError:
            spoiled = True
        if spoiled:
            with open(path, "wb") as file:
                file.write(lines)
        return path

    def remove(self, folder: str) -> None:
        """Forgets a run whose report is acknowledged, with all that is in its folder; raises OSError."""
        for name in ("log", "usage"):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                os.remove(os.path.join(folder, name))
        remove_tree(folder)

    def has_keeper(self, name: str) -> bool:
        """False if the keeper of that name has ended in peace, which takes its file away, or was never there; True if
        that cannot be told, because all files are gone."""
        return self.is_gone() or os.path.exists(os.path.join(self.keepers, _file_name(name)))

    def keeper_lives(self, name: str) -> bool:
        """True if the keeper with that lock file still runs, and so will write down how its jobs end."""
        path = os.path.join(self.keepers, _file_name(name))
        if not os.path.isfile(path):
            return False
        try:
            FileLock(path).release()
        except FileLock.Busy:
            return True
        except OSError as error:
            return not disk_full(error)  # which is for want of room for our number; else it cannot be told just now
        return False

    def sweep_keepers(self, needed: Iterable[str]) -> None:
        """Removes the locks of keepers that were killed, but for those that a run names."""
        for name in set(os.listdir(self.keepers)).difference(needed):
            with contextlib.suppress(OSError):
                if re.match(r"\d+-[0-9a-f]{8}\.lock\Z", name) and not self.keeper_lives(name):
                    os.remove(os.path.join(self.keepers, name))

    def sweep(self, older: float, keep: Iterable[str]) -> int:
        """Removes outputs that nobody has written to since then (wall time), but for those; how many."""
        needed, removed = set(keep), 0
        with os.scandir(self.output) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    old = entry.is_file(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_mtime < older
                    if old and entry.path not in needed:
                        os.remove(entry.path)
                        removed += 1
        return removed


_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?\Z", re.IGNORECASE)


def _file_name(text: str) -> str:
    """A text as one name that every system takes and that leads nowhere else."""
    name = re.sub(r"[^\w.+-]", "_", text, flags=re.ASCII)[:100].strip(".") or "_"
    return "_" + name if _RESERVED.match(name) else name


def remove_tree(path: str) -> None:
    """Removes a folder with all that is in it; raises OSError if something stays.  Where links lead is none of ours."""
    if os.path.islink(path):
        return os.unlink(path)
    try:
        return os.rmdir(path)  # as a rule it is empty
    except FileNotFoundError:
        return
    except OSError:
        import shutil

        shutil.rmtree(path, ignore_errors=True)
    if os.path.lexists(path):
        _make_removable(path)
        shutil.rmtree(path)


def _make_removable(path: str) -> None:
    """What a job has made read-only is to go too: folders, and on Windows files as well."""
    os.chmod(path, 0o700)
    for folder, folders, files in os.walk(path):
        folders[:] = [name for name in folders if not _leads_elsewhere(os.path.join(folder, name))]
        for name in folders + (files if WINDOWS else []):
            inner = os.path.join(folder, name)
            if not os.path.islink(inner):
                os.chmod(inner, 0o700)


def _leads_elsewhere(folder: str) -> bool:
    """True of a link, and of a junction, as Windows' packages are full of: what is behind them is none of ours."""
    try:
        return os.path.islink(folder) or getattr(os.lstat(folder), "st_reparse_tag", 0) == 0xA0000003
    except OSError:
        return True


def read_piece(path: str, at: Optional[int]) -> Tuple[int, bytes]:
    """(offset, bytes) of what is new in an output since that offset, 64 KiB at most: the last, so that whoever reads
    stays with it however fast it grows.  at None: from the beginning.  What cannot be read has nothing new."""
    try:
        if os.path.isfile(path):  # /dev/null has nothing, and a pipe would keep us waiting
            with open(path, "rb") as file:
                size = file.seek(0, os.SEEK_END)
                at = max(0 if at is None or at > size else at, size - OUTPUT_TAIL)
                file.seek(at)
                return at, file.read(OUTPUT_TAIL)
    except (OSError, ValueError):
        pass
    return at or 0, b""


# ---------------------------------------------------------------------------------------------------------------------
# What a job is given: its command, its environment, a folder for temporary files
# ---------------------------------------------------------------------------------------------------------------------


def is_script(job: Job) -> bool:
    return bool(job.script or job.script_name)


def script_file(name: str) -> str:
    """What a script is called in its run's folder; the end of it says on Windows what runs it."""
    return "script-" + _file_name(name[-60:])


def script_bytes(name: str, text: str, windows: bool = WINDOWS) -> bytes:
    """A script as its system reads it; raises UnicodeEncodeError.

    A file that comes from Windows, which its first line tells, has a carriage return at the end of each line that sh
    would take for part of the last word, and may begin with a byte order mark.  cmd.exe misses labels where lines end
    without one.  All else stays as it is, odd bytes too.
    """
    if windows and _kind(name) in BATCH:
        text = re.sub("(?<!\r)\n", "\r\n", text)
    elif not windows and text.partition("\n")[0].endswith("\r"):
        text = text.replace("\r\n", "\n")
    return (text if windows else text.lstrip("\ufeff")).encode("utf-8", "surrogateescape")


def _kind(name: str) -> str:
    return os.path.splitext(script_file(name))[1].lower()


def hash_bang(text: str) -> List[str]:
    """A script's #! line as Linux takes it: the program, and all that follows as one argument; [] = it has none."""
    line = text.lstrip("\ufeff").partition("\n")[0]
    return line[2:].strip().split(None, 1) if line.startswith("#!") else []


def interpreter(job: Job) -> List[str]:
    """What to put before the file of a script; raises BadRequest if nothing here runs it."""
    words = [job.shell] if job.shell else hash_bang(job.script)
    return _windows_interpreter(job, words) if WINDOWS else words or ["/bin/sh"]


def _windows_interpreter(job: Job, words: List[str]) -> List[str]:
    """Nothing for a batch file, which Windows itself gives to cmd.exe.  #! lines name programs by their places on
    Linux: what counts is the name, found on the PATH."""
    kind = _kind(job.script_name)
    if kind in BATCH and (not job.shell or _is_program(job.shell, "cmd")):
        return []
    if kind == ".ps1" and not job.shell:
        words = ["powershell"]
    if words and _is_program(words[0], "env"):
        words = " ".join(words[1:]).split()
        if words[:1] == ["-S"]:
            words = words[1:]
    if not words:
        raise BadRequest(
            f"nothing on Windows runs the script {job.script_name!r}: it ends in none of .bat, .cmd and .ps1, has no "
            "#! line, and names no shell (qsub -S)"
        )
    if _is_program(words[0], "cmd"):
        raise BadRequest(f"cmd.exe runs no script {job.script_name!r}: its name must end in .bat or .cmd")
    powershell = _is_program(words[0], "powershell|pwsh")
    return [_on_path(words[0], job.env)] + words[1:] + (POWERSHELL if powershell else [])


# Without a person's profile, which no job has: it may print, go elsewhere, and take seconds.
POWERSHELL = ["-NoProfile", "-ExecutionPolicy", "Bypass", "-File"]


def _is_program(path: str, names: str) -> bool:
    return bool(re.match(rf"(.*[/\\])?({names})(\.exe)?\Z", path, re.IGNORECASE))


def _on_path(path: str, env: Dict[str, str]) -> str:
    """A program of that name on Windows; raises BadRequest."""
    import shutil

    name = re.split(r"[/\\]", path)[-1]
    names = [name if path.startswith("/") else path, name] + ["python"] * name.startswith("python")
    for candidate in names:  # python.org's has no python3.exe
        found = shutil.which(candidate, path=env.get("PATH"))
        if found:
            return found
    raise BadRequest(f"the script needs {path}, and there is no {name} on this machine's PATH")


def environment(job: Job, workdir: str, node_file: str, temp: str) -> Dict[str, Optional[str]]:
    """What a job of our server's has in its environment beside the client's own; None = it must not be there, though
    the client may have it, say because it runs in a job itself.  Its own Env does not change what PBS says of it, but
    may name another place for temporary files.  Nothing here is secret."""
    own = {name.upper(): text for name, text in job.env.items()} if WINDOWS else job.env
    if not job.number:
        return dict(own)
    user, _, host = job.owner.partition("@")
    ncpus, index = str(job.ncpus), "" if job.index is None else str(job.index)
    pbs = {
        "PBS_JOBID": str(job),
        "PBS_JOBNAME": sayable(job.title),
        "PBS_QUEUE": sayable(job.queue),
        "PBS_ENVIRONMENT": "PBS_BATCH",
        "PBS_O_WORKDIR": sayable(job.submit_dir),
        "PBS_O_HOST": sayable(host),
        "PBS_O_LOGNAME": sayable(user),
        "PBS_JOBDIR": sayable(workdir),
        "PBS_NODEFILE": node_file,
        "PBS_NP": ncpus,
        "NCPUS": ncpus,
        "PBS_WALLTIME": str(job.runtime or ""),
        "PBS_ARRAY_INDEX": index,
        "PBS_ARRAYID": index,  # Torque's name for it
        "PBS_ARRAY_ID": index and f"{job.number}[]",
        "JOBRUNNER_RUN_COUNT": str(job.run_count),
    }
    places = dict.fromkeys(("TMPDIR", "TEMP", "TMP") if WINDOWS else ("TMPDIR",), temp) if temp else {}
    return {**places, **own, **{name: text or None for name, text in pbs.items()}}


_PBS_VARIABLE = re.compile(r"\$(\{)?(PBS_[A-Z_]+)(?(1)\})")


def with_variables(path: str, job: Job, workdir: str) -> str:
    """A path for output with the job's PBS variables in it, as Torque takes it: `$PBS_JOBNAME.${PBS_JOBID}.log`."""
    if "$" not in path:
        return path
    known = environment(job, workdir, "", "")
    return _PBS_VARIABLE.sub(lambda found: (known[found[2]] or "") if found[2] in known else found[0], path)


def sayable(text: str) -> str:
    """A text that a process can be given: question marks for what this system cannot say, half a surrogate pair say."""
    try:
        os.fsencode(text)
        return text
    except UnicodeEncodeError:
        encoding = sys.getfilesystemencoding()
        return text.encode(encoding, "replace").decode(encoding)


class TempFolders:
    """A private folder for each run, all in one of this client's.

    One that is given back empty, as most are, is not removed but renamed for a run to come: that takes 10 us, where
    removing and making take 200 us on a disk.
    """

    def __init__(self, places: Iterable[str], name: str, most_spare: int):
        self.most_spare = most_spare
        self.spare: List[str] = []
        self.path = next(filter(_own_folder, (os.path.join(place, name) for place in places)), "")

    def take(self) -> str:
        """A new folder; raises OSError."""
        while self.spare:
            with contextlib.suppress(IndexError):  # another thread was quicker
                path = self.spare.pop()
                if os.path.isdir(path) and not os.path.islink(path):
                    return path
        path = self._new_name()
        if not _own_folder(self.path):  # whatever clears up /tmp has taken it
            raise OSError(f"{self.path} belongs to somebody else")
        os.mkdir(path, 0o700)
        return path

    def give_back(self, path: str) -> None:
        """The run is over and reported: its folder goes, with all that is in it; raises OSError."""
        try:
            if len(self.spare) < self.most_spare and not os.path.islink(path) and not os.listdir(path):
                os.chmod(path, 0o700)
                spare = self._new_name()
                os.rename(path, spare)
                return self.spare.append(spare)
        except OSError:
            pass
        remove_tree(path)

    def _new_name(self) -> str:
        return os.path.join(self.path, os.urandom(4).hex())

    def sweep(self, needed: Iterable[Optional[str]]) -> None:
        """Removes what an earlier client has left here, but for the folders that are needed."""
        with contextlib.suppress(OSError):
            for path in {os.path.join(self.path, name) for name in os.listdir(self.path)} - set(needed):
                with contextlib.suppress(OSError):
                    remove_tree(path)

    def close(self) -> None:
        """Leaves nothing that no run needs."""
        self.most_spare = 0
        with contextlib.suppress(OSError):
            while self.spare:
                os.rmdir(self.spare.pop())
            os.rmdir(self.path)


def _own_folder(path: str) -> bool:
    """True if the folder is there, or could be made, and is for us alone: in /tmp anybody may have been first."""
    try:
        os.mkdir(path, 0o700)
        return True
    except FileExistsError:
        found = os.lstat(path)
        return WINDOWS or (found.st_uid == os.geteuid() and found.st_mode & 0o170077 == 0o040000)
    except OSError:
        return False


def temp_name(spool: Spool) -> str:
    """A name for this client's folder among the temporary files of all: the same after a restart, another for a copy
    of the spool, and short, for the sockets that some programs make there."""
    import binascii

    return f"jr-{binascii.crc32((spool.client + spool.path).encode('utf-8', 'replace')):08x}"


def temp_places() -> List[str]:
    """Where temporary files may go, best first.  (The module tempfile would take 2 MB.)"""
    given = [os.environ[name] for name in ("TMPDIR", "TEMP", "TMP") if os.environ.get(name)]
    return [os.path.abspath(place) for place in given + ([] if WINDOWS else ["/tmp", "/var/tmp"])]


# ---------------------------------------------------------------------------------------------------------------------
# A run: one execution of a job here
# ---------------------------------------------------------------------------------------------------------------------


class Run:
    """One job that this client has been given and has not yet reported.

    outputs      {"StdOut": path, "StdErr": path}
    temp         its folder for temporary files; "" = none was made
    pid          0 until the keeper has started it
    started      what tells its process from a stranger with its number (see Keeper); None = not known
    began        s, awake clock: when its walltime began
    ended        s, awake clock: when its process was over; None = it is not
    ending       the Status it is being ended with; "" = it is not
    comment      why, where it is not a person's wish
    kill_at      s, awake clock: when to kill it, having asked it to end; None = not asked
    killed       it was killed, not just asked
    members      {pid: start} of its tree when it was asked to end
    end          {}   how its own process ended, while the rest of its tree is given the time to do so too
    tried_again  its report, which was refused, has been sent once more, since the server knew the job then
    orphan_since s, awake clock: when its keeper was first known to be gone; None = it is not
    log_size     bytes of its log when it was last read
    follow       {"StdOut": offset, "StdErr": offset} up to where its outputs are streamed; None = nobody reads them
    """

    def __init__(self, job: Job, folder: str, clock: float):
        self.job = job
        self.folder = folder
        self.outputs: Dict[str, str] = {}
        self.temp = ""
        self.pid = 0
        self.started: Optional[float] = None
        self.began = clock
        self.ended: Optional[float] = None
        self.adopted = False
        self.keeper = ""
        self.ending = ""
        self.comment = ""
        self.kill_at: Optional[float] = None
        self.killed = False
        self.members: Dict[int, Optional[float]] = {}
        self.end: Optional[Dict[str, Any]] = None
        self.tried_again = False
        self.looked_at = clock
        self.orphan_since: Optional[float] = None
        self.log_size = -1
        self.follow: Optional[Dict[str, int]] = None
        self.follow_at = 0.0
        self.usage = Usage()
        self.usage_at = clock
        self.usage_cpu: Optional[float] = 0.0  # None: not known at usage_at
        self.over_memory = False
        self.watch: Optional[DeadWatch] = None

    @property
    def limits(self) -> List[int]:
        """Walltime, memory, CPU time, as the server is told them."""
        return [self.job.runtime, self.job.memory, self.job.cputime]

    @property
    def deadline(self) -> float:
        """When its walltime is over, awake clock."""
        return self.began + self.job.runtime if self.job.runtime else float("inf")

    def seconds(self, clock: float) -> float:
        """How long it has run, awake."""
        if not self.pid:
            return 0
        return round(max(0.0, (clock if self.ended is None else self.ended) - self.began), 3)

    def sample(self, clock: float, cpu_before: float) -> Dict[str, Any]:
        """A usage report for the time since the last one."""
        seconds = max(clock - self.usage_at, 0.001)
        percent = round((self.usage.cpu - cpu_before) / seconds * 100 * 100)
        return {
            "CPU": max(0, percent),
            "Mem": self.usage.memory,
            "Seconds": max(1, round(seconds)),
            "CpuTimeUsed": round(self.usage.cpu, 3),
        }


EXIT_KILLED = EXIT_SIGNALLED + 9
# What a run that we ended is reported as, whatever its process returned: one that saves its work at TERM and returns 0
# has not done it, and on Windows a killed process just returns 1.
ENDINGS = {
    "timeout": (EXIT_WALLTIME, "walltime of {0.runtime} s is over"),
    "dead": (EXIT_DEAD, "used no CPU time to speak of for too long"),
    "memory": (EXIT_MEMORY, "used more than {0.memory} bytes of memory"),
    "cputime": (EXIT_CPUTIME, "used more than {0.cputime} s of CPU time"),
    "deleted": (EXIT_SIGNALLED + signal.SIGTERM, "deleted while it ran"),
    "released": (EXIT_SIGNALLED + signal.SIGTERM, "given back: its client was stopped"),
}


def end_report(run: Run, end: Dict[str, Any]) -> Dict[str, Any]:
    """What the server is told of a run that is over, but for outputs and our name."""
    exit_status, comment = end.get("ExitStatus"), end.get("Comment") or ""
    status = "failed" if exit_status else "finished"
    if end.get("Status"):
        status = end["Status"]
    elif run.ending:
        status = run.ending
        killed = run.killed or exit_status == EXIT_KILLED
        exit_status, words = ENDINGS[status]
        comment = comment or (f"told to stop: {run.comment}" if run.comment else words.format(run.job))
        if exit_status > EXIT_SIGNALLED and killed:
            exit_status = EXIT_KILLED
    return {
        "ID": run.job.id,
        "Lease": run.job.lease,
        "Status": status,
        "ExitStatus": exit_status,
        "Comment": comment,
        "EndTime": end.get("EndTime") or format_time(now()),
        "CpuTimeUsed": round(run.usage.cpu, 3),
        "MaxMem": run.usage.max_memory,
    }


# ---------------------------------------------------------------------------------------------------------------------
# The wire: our server, or the original's
# ---------------------------------------------------------------------------------------------------------------------


class Reply(NamedTuple):
    """What a request brought: jobs, signals, whether the reports that went with it were taken, whether the client is to
    end when it has no jobs any more, how many jobs wait for their time, a sentence for the log, and the IDs among those
    named that are not in the server's database; None = it does not tell."""

    jobs: List[Job]
    signals: List[Dict[str, Any]]
    reported: bool
    drain: bool = False
    waiting: int = 0
    warning: str = ""
    unknown: Optional[Tuple[str, ...]] = None


class OurWire:
    """POST with JSON: many jobs a request, leases, signals, exit statuses."""

    one_at_a_time = False
    is_open = False  # to everybody: it asks for no tokens

    def __init__(self, api: ServerApi, host: str, node: Dict[str, Any]):
        self.api, self.host, self.node = api, host, node

    def request(self, wish: Dict[str, Any], reports: List[Dict[str, Any]], timeout: float = 30) -> Reply:
        """Held open up to wish["Wait"] seconds, unless there are reports to acknowledge."""
        body = {"Hostname": self.host, "Node": self.node, **wish}
        if reports:
            body["Reports"] = [{**report, "Hostname": self.host} for report in map(_sent, reports)]
        reply = self.api.call("/request", body, timeout=wish["Wait"] + timeout)
        try:
            jobs = [Job.from_record(record) for record in reply["Jobs"]]
            told = (
                "Reported" in reply,
                reply.get("Drain") is True,
                int(reply.get("Waiting") or 0),
                reply.get("Warning") or "",
                tuple(map(str, reply.get("Unknown") or ())),
            )
            return Reply(jobs, list(reply.get("Signals", [])), *told)
        except (BadRequest, KeyError, TypeError, ValueError, AttributeError) as error:
            raise ServerAway(f"{self.api.url}/request answered something strange: {error!r}") from None

    def report(self, reports: List[Dict[str, Any]]) -> None:
        for kind, group in _grouped(reports):
            self.api.call(f"/{kind}", [{**report, "Hostname": self.host} for report in group])

    def usage(self, run: Run, sample: Dict[str, Any]) -> None:
        self.api.call("/usage", {"ID": run.job.id, "Lease": run.job.lease, "Hostname": self.host, **sample})

    def stream(self, entries: List[Dict[str, Any]]) -> List[str]:
        """Sends pieces of outputs; the IDs of the jobs whose outputs somebody still reads."""
        told = self.api.call("/stream", [{**entry, "Hostname": self.host} for entry in entries])
        try:
            return [entry["ID"] for entry in told if entry["Follow"] is True]
        except (KeyError, TypeError) as error:
            raise ServerAway(f"{self.api.url}/stream answered something strange: {error!r}") from None


class OriginalWire:
    """The original's GET forms: one job a request, no heartbeat, no exit statuses."""

    one_at_a_time = is_open = True

    def __init__(self, api: ServerApi, host: str):
        self.api, self.host = api, host

    def request(self, wish: Dict[str, Any], reports: List[Dict[str, Any]]) -> Reply:
        record = self.api.call("/request", query={"hostname": self.host}) if wish["Slots"] else None
        try:
            return Reply([Job.from_record(record)] if record else [], [], False)
        except BadRequest as error:
            raise ServerAway(f"{self.api.url}/request answered something strange: {error}") from None

    def report(self, reports: List[Dict[str, Any]]) -> None:
        for report in reports:
            if report["Status"] in ("refused", "released"):
                continue  # it knows no such report, and /finish would lose the job: when its lease ends it runs again
            kind = report["Status"] if report["Status"] in ("timeout", "dead") else "finish"
            query = {"hostname": self.host, "configuration": _configuration(report["Run"].job)}
            self.api.call(f"/{kind}", query=query)

    def usage(self, run: Run, sample: Dict[str, Any]) -> None:
        query = {
            "configuration": _configuration(run.job),
            "cpu": sample["CPU"],
            "mem": sample["Mem"],
            "hostname": self.host,
        }
        self.api.call("/usage", query=query)

    def stream(self, entries: List[Dict[str, Any]]) -> List[str]:
        return []  # our own server, which asked for it, is no more


def _grouped(reports: List[Dict[str, Any]]) -> Iterator[Tuple[str, List[Dict[str, Any]]]]:
    """(URL's name, reports for it), in order, with what only this side knows left out."""
    groups: Dict[str, List[Dict[str, Any]]] = {}
    for report in reports:
        kind = report["Status"] if report["Status"] in ("timeout", "dead") else "finish"
        groups.setdefault(kind, []).append(_sent(report))
    return iter(groups.items())


def _sent(report: Dict[str, Any]) -> Dict[str, Any]:
    return {key: value for key, value in report.items() if key != "Run"}


def _shorten(report: Dict[str, Any]) -> bool:
    """Leaves the last half of the outputs in a report; False if there is nothing in them."""
    tails = [key for key in ("StdOutTail", "StdErrTail") if report.get(key)]
    for key in tails:
        report[key] = report[key][(len(report[key]) + 1) // 2 :]
    return bool(tails)


def _configuration(job: Job) -> str:
    return jobrunner.to_json({"ID": job.id, "Params": job.params, "Runtime": job.runtime}).decode()


def connect(api: ServerApi, host: str, node: Dict[str, Any]) -> Any:
    """The wire the server understands; raises ServerAway.

    Told by /status, which changes nothing: the original, which takes any method for a GET, would answer a POST /request
    by leasing a job to nobody.
    """
    try:
        status = api.call("/status")
        wire = OurWire(api, host, node)
        wire.is_open = not (isinstance(status, dict) and status.get("Tokens"))
        return wire
    except ServerRefused as error:
        if error.status in (404, 405, 501):
            return OriginalWire(api, host)
        words = "" if error.status in (401, 403) else f"{api.url} answered {error.status}: "
        raise ServerAway(f"{words}{error}") from None


# ---------------------------------------------------------------------------------------------------------------------
# The agent
# ---------------------------------------------------------------------------------------------------------------------


def about_client(options: argparse.Namespace, spool: Spool, tools: Any) -> Dict[str, Any]:
    """What a client says of itself with each request."""
    node: Dict[str, Any] = {
        "Client": spool.client,
        "Session": os.urandom(8).hex(),
        "Slots": options.max_jobs,
        "Properties": [tools.name] + options.property,
        "System": sys.platform,
        "Version": VERSION,
        "Python": "%d.%d.%d" % sys.version_info[:3],
        "Cpus": os.cpu_count(),
        "Draining": False,
        "Machine": spool.machine,
        "Nice": options.nice,
        "Pause": "",
    }
    if options.hours:
        node["Hours"] = options.hours.text
    if options.queue:
        node["Queues"] = options.queue
    if options.until_empty:
        node["UntilEmpty"] = True  # the server then says whether there is more to come
    return node


class Agent:
    """Runs jobs for a server.  One lock for everything; nothing slow is done while it is held.

    Threads: two pollers (one may be held open by the server while the other brings the news of a free slot), a
    reporter, one that listens to the keeper, and the main one, which watches clocks and limits; now and then one that
    streams outputs while somebody reads them, and one that removes old ones.
    """

    def __init__(self, options: argparse.Namespace, api: ServerApi, spool: Spool, tools: Any, log: Any):
        self.options, self.api, self.spool, self.tools, self.log = options, api, spool, tools, log
        self.temp = TempFolders(temp_places() + [spool.path], temp_name(spool), options.max_jobs)
        self.lock = threading.RLock()
        # who is to look again: waking all for each piece of news costs more than a short job
        self.poll_news, self.report_news, self.main_news = (threading.Condition(self.lock) for _ in range(3))
        self.clock = awake_clock
        self.wall = time.time
        self.runs: Dict[str, Run] = {}  # by folder
        self.outbox: "collections.OrderedDict[str, Dict[str, Any]]" = collections.OrderedDict()  # reports by folder
        self.under_way: Dict[str, bool] = {}  # those of them that a thread is delivering
        self.refused: Dict[str, Dict[str, Any]] = {}  # those that the server, or its database, did not want
        self.carries_reports = True  # the server takes reports along with a request
        self.one_by_one = False  # one of them was refused: the reporter finds out which
        self.usage_box: List[Tuple[Run, Dict[str, Any]]] = []
        self.keeper: Optional[subprocess.Popen] = None
        self.keeper_name = ""
        self.keeper_ready = False  # it holds its lock: whoever comes after us will know that it lives
        self.folder = os.getcwd()  # where jobs run that name no other; it may be gone later
        self.allow = AllowList(options.allow_prefix, options.allow_file, [spool.path, self.folder])
        self.own_files = [os.path.join(HERE, name) for name in ("client.py", "jobrunner.py", "server.py", TOKEN_FILE)]
        self.own_files += [os.path.abspath(options.token_file)] if options.token_file else []
        self.allow.prefixes()  # one that cannot be gone by is no start
        self.pause = ""  # why it takes no jobs just now
        self.looked_around_at = self.swept_at = -1e9
        self.warning = ""  # the server's latest
        self.said: Dict[str, bool] = {}  # what is said once
        self.following = False  # a thread streams outputs
        self.total_memory = -1  # of the machine; it is asked for when needed
        self.wire: Any = None
        self.connecting = threading.Lock()
        self.ordering = threading.Lock()  # an order is one line, however long
        self.away = Backoff()
        self.away_until = 0.0
        # awake clock: when to send a request; None: one is open that will do.  The first as soon as the keeper is ready
        self.poll_at: Optional[float] = self.clock() + 1
        self.polls = 0  # requests sent so far: they are numbered
        self.open_polls: List[int] = []  # those that have no answer yet
        self.stopping = False
        self.draining = False  # the server says that it is to end when it is empty
        self.drained_at = 0  # the last request before that
        self.more_to_come = False  # jobs wait for their time
        self.done = False  # --until-empty found nothing more
        self.sampled_at = self.clock()
        self.orphans_seen: Tuple[float, Optional[Dict[int, Process]]] = (-1e9, None)  # when, snapshot
        self.node = about_client(options, spool, tools)

    # -- the whole

    def run(self) -> int:
        """Works until it is stopped, or, with --until-empty, until nothing is left for it; raises JobrunnerError where
        that would be never."""
        self._look_around()
        self._start_keeper()
        self._adopt()
        for target in (self._poll_loop, self._poll_loop, self._report_loop):
            threading.Thread(target=self._guarded, args=(target,), daemon=True).start()
        while not self.stopping and not self.done:
            with self.lock:
                self.main_news.wait(self._until_next())
            self._look_around()
            self._sweep_now_and_then()
            self._watch()
            self.done = self.done or self._is_drained()
            self._mind_lost_folder()
        if self.stopping:
            self._stop()
        self._say_farewell()
        self.temp.close()
        return 0

    def stop(self, *_: Any) -> None:
        """Ctrl-C, or TERM.  The second one ends the client at once."""
        if self.stopping:
            os.write(2, b"client.py: ended at once; its jobs go on\n")
            os._exit(130)
        self.stopping = True  # the main thread looks every second: a signal handler must not wait for the lock

    def _guarded(self, loop: Callable[[], None]) -> None:
        """A thread that dies of a mistake must not leave a client that looks alive and does nothing."""
        try:
            loop()
        except BaseException:
            self.log.exception("client.bug: please report this; the jobs go on, start the client again")
            os._exit(3)

    def _in_thread(self, what: Callable[[], None]) -> bool:
        """Does something that can wait in a thread of its own; False if there is none to be had just now, since jobs
        have all that a user may have."""
        try:
            threading.Thread(target=self._guarded, args=(what,), daemon=True).start()
            return True
        except RuntimeError as error:
            self.log.warning("client.thread error=%r", str(error))
            return False

    def _until_next(self) -> float:
        """Seconds until the main thread has something to look at; the caller holds the lock."""
        clock, due = self.clock(), [1.0]
        for run in self.runs.values():
            if run.kill_at is not None:
                due.append(run.kill_at - clock)
            elif run.pid:  # before that, its walltime is not judged
                due.append(run.deadline - clock)
            if run.adopted or run.end is not None:
                due.append(ADOPTED_POLL)
        return max(0.0, min(due))

    def _stop(self) -> None:
        with self.lock:
            running = list(self.runs.values())
        if self.options.on_stop == "kill":
            for run in running:
                self._end(run, "released")
            deadline = self.clock() + self.options.kill_delay + 10
            while (self.runs or self.outbox) and self.clock() < deadline:
                self._watch()
                time.sleep(0.05)
        for run in list(self.runs.values()):
            words = f"job {run.job} goes on (process {run.pid}): {' '.join(run.job.params)[:200]}"
            print(f"client.py: {jobrunner.one_line(words)}", file=sys.stderr)
        if self.runs:
            print(
                "client.py: start the client again with the same --spool, and their ends are reported", file=sys.stderr
            )

    def _say_farewell(self) -> None:
        """So that nobody counts on this client any more; where the server is away it finds that out by itself."""
        with self.lock:
            self.node["Stopped"], self.polls = True, self.polls + 1
            numbers = {"Poll": self.polls, "Open": list(self.open_polls)}
            wish = {"Slots": 0, "Wait": 0, "Running": self._running(), **numbers}
            # also that it has given back what came just now: the next client knows nothing of that
            batch = self._take_reports() if self.carries_reports else []
        with contextlib.suppress(JobrunnerError, OSError):
            if self.wire and not self.wire.one_at_a_time and not self.away.failures:
                reply = self.wire.request(wish, [report for _, report in batch], timeout=FAREWELL_TIME)
                if reply.reported:
                    self._acknowledged(batch)

    # -- asking for jobs

    def _poll_loop(self) -> None:
        while True:
            with self.lock:
                while self.poll_at is None or self.poll_at > self.clock():
                    self.poll_news.wait(None if self.poll_at is None else max(0.0, self.poll_at - self.clock()))
                wish, batch = self._wish()
            client = self.node["Client"]
            try:
                reply = self._wire().request(wish, [report for _, report in batch])
            except (ServerAway, ServerRefused) as error:
                self._undelivered(batch, error)
                if isinstance(error, ServerRefused) and error.status == 409:
                    self._is_a_copy(client, error, wish["Poll"])
                else:
                    self._server_away(error, wish["Poll"])
                continue
            self.away.reset()
            self._mind_refused(wish["Running"], reply.unknown)
            if reply.warning != self.warning:
                self.warning = reply.warning
                if self.warning:
                    self.log.warning("server.says %s", self.warning)
            for job in reply.jobs:
                self._start(job)
            self._drain(reply.drain)
            self._polled(wish, bool(reply.jobs), reply.waiting)
            for entry in reply.signals:
                self._obey(entry, wish["Running"])
            if reply.reported:
                self._acknowledged(batch)
            elif batch:  # a server that takes them at their own URLs only
                self.carries_reports = False
                self._undelivered(batch)

    def _wish(self) -> Tuple[Dict[str, Any], List[Tuple[str, Dict[str, Any]]]]:
        """What to ask the server for, and the reports to take along; the caller holds the lock."""
        self.polls += 1
        wish = {
            "Slots": self._free_slots(),
            "Running": self._running(),
            "Poll": self.polls,
            "Open": list(self.open_polls),
        }
        wish["Wait"] = POLL_WAIT
        if self.options.until_empty:
            wish["Wait"] = 0.25 if self.runs or self.outbox else 5 if self.more_to_come or self.pause else 0
        self.open_polls.append(self.polls)
        self.poll_at = None
        return wish, self._take_reports() if self.carries_reports else []

    def _polled(self, wish: Dict[str, Any], got_some: bool, waiting: int) -> None:
        """Sets when to poll again, unless another request is open, which will do."""
        with self.lock:
            self.open_polls.remove(wish["Poll"])
            self.away_until = 0.0  # also if the other poller was refused meanwhile: the next end is to be told at once
            self.more_to_come = waiting > 0
            refused = {report["Lease"] for report in self.refused.values()}  # nobody waits for those
            busy = self.runs or any(run["Lease"] not in refused for run in wish["Running"])
            nothing = wish["Slots"] and not busy and not got_some and not waiting
            self.done = self.done or bool(self.options.until_empty and nothing)
            if not self.open_polls:
                pause = 0.0 if self._free_slots() else HEARTBEAT_DELAY
                if self.wire and self.wire.one_at_a_time and not got_some:
                    pause = ORIGINAL_POLL
                at = self.clock() + pause
                self.poll_at = at if self.poll_at is None else min(at, self.poll_at)
            self.poll_news.notify()
            if self.done:
                self.main_news.notify()

    def _is_drained(self) -> bool:
        """True if there is nothing left, and no answer that may bring something still on its way."""
        with self.lock:
            late = any(number <= self.drained_at for number in self.open_polls)
            return self.draining and not self.runs and not self.outbox and not late

    def _mind_lost_folder(self) -> None:
        """Whoever waits for a client with --until-empty need not wait for one that takes no jobs any more."""
        if self.options.until_empty and self.pause and not self.runs and not self.outbox:
            lost = self._lost_folder()
            if lost:
                self.temp.close()
                raise JobrunnerError(f"{lost} is gone: start the client again")

    def _drain(self, drain: bool) -> None:
        """Takes no more jobs, and ends when it has none any more; or goes on, if it was told that before."""
        if drain is self.draining:
            return
        self.log.info("client.%s", "drain" if drain else "goes_on")
        with self.lock:
            self.draining = self.node["Draining"] = drain
            self.drained_at = self.polls
            self.main_news.notify()

    def _free_slots(self) -> int:
        if self.stopping or self.draining or self.pause or not self.keeper_ready:
            return 0
        return max(0, self.options.max_jobs - sum(run.job.ncpus for run in self.runs.values()))

    def _slot_freed(self) -> None:
        """Polls at once with the news, which sends an open request home; the caller holds the lock."""
        if self.away_until <= self.clock():
            self.poll_at = self.clock()
            self.poll_news.notify()

    def _running(self) -> List[Dict[str, Any]]:
        """Every lease this client holds: what runs here, and what is over but not yet acknowledged; also what the
        server did not want, since the next one takes what is not named for a run that never came here."""
        entries, clock = [], self.clock()
        for run in self.runs.values():
            known: Dict[str, Any] = {"Seconds": run.seconds(clock), "Limits": run.limits}
            if run.ending:
                known["Signal"] = "delete"  # once told is enough
            if run.follow is not None:
                known["Follow"] = True
            entries.append({"ID": run.job.id, "Lease": run.job.lease, **known})
        for report in itertools.chain(self.outbox.values(), self.refused.values()):
            known = {"Seconds": report["Run"].seconds(clock), "Signal": "delete"}
            entries.append({"ID": report["ID"], "Lease": report["Lease"], **known})
        return entries

    def _wire(self) -> Any:
        """How to talk to the server, found out anew after each time it was away, and of the original's each time: one of
        ours may have taken its place unseen, and must be told exit statuses and outputs.  Raises ServerAway."""
        with self.connecting:
            known = self.wire
            if known is None or known.one_at_a_time:
                wire = connect(self.api, self.options.hostname, self.node)
                if known and wire.one_at_a_time:
                    return known
                with self.lock:
                    self.wire, self.carries_reports = wire, not wire.one_at_a_time and not self.one_by_one
                    self.report_news.notify()  # what waited for a request may now be the reporter's
                original = " (the original's: one job at a time, no signals)" if wire.one_at_a_time else ""
                self.log.info("server.%s url=%s%s", "back" if self.away.failures else "found", self.api.url, original)
                if wire.is_open and not self.allow.own and not self.allow.files:
                    self._say_once(
                        "client.open: this client runs whatever anybody sends who can reach the server: see "
                        "--allow-prefix and --allow-file, and the server's --make-tokens"
                    )
            return self.wire

    def _server_away(self, error: JobrunnerError, poll: int) -> None:
        with self.lock:
            pause = self.away.next()
            self.away_until = self.clock() + pause
            self.open_polls.remove(poll)
            self.poll_at, self.wire = self.away_until, None
            self._send_again(list(self.refused))  # it may come back with another database
            self.poll_news.notify()
        self.log.warning("server.away error=%r again_in=%.1f running=%d", str(error), pause, len(self.runs))

    def _mind_refused(self, named: List[Dict[str, Any]], unknown: Optional[Tuple[str, ...]]) -> None:
        """The right server may have taken the place of a wrong one unseen: between two requests, or while this machine
        slept.  A report of a job that the server knows is tried once more."""
        with self.lock:
            names = {run["ID"] for run in named} if self.refused else set()
            for folder, report in list(self.refused.items()) if unknown is not None else ():
                if report["ID"] in unknown:
                    report["Run"].tried_again = False
                elif report["ID"] in names and not report["Run"].tried_again:
                    report["Run"].tried_again = True
                    self._send_again([folder])

    def _send_again(self, folders: List[str]) -> None:
        """Puts reports that were refused back among those to be sent; the caller holds the lock."""
        for folder in folders:
            self.outbox[folder] = self.refused.pop(folder)
            self._slot_freed()
            self.report_news.notify()

    def _is_a_copy(self, client: str, error: JobrunnerError, poll: int) -> None:
        """Another client goes by our id: our spool, or its, is a copy.  Its runs stay ours, by their leases."""
        with self.lock:
            self.open_polls.remove(poll)
            self.poll_at = self.clock() + 1
            if self.node["Client"] == client:  # else the other poller has been told, too
                try:
                    self.node["Client"] = self.spool.new_client_id()
                except OSError as trouble:
                    self.node["Client"] = self.spool.client
                    self.log.warning("spool.write file=client error=%r", os_words(trouble))
                self.log.warning("spool.copied: %s; this client goes by the new id %s", error, self.spool.client)
            self.poll_news.notify()

    def _say_once(self, words: str) -> None:
        if words not in self.said:
            self.said[words] = True
            self.log.warning("%s", words)

    def _obey(self, entry: Dict[str, Any], named: List[Dict[str, Any]]) -> None:
        """Does what the server says of a run that the request has named."""
        known = [lease for lease in named if lease["ID"] == entry.get("ID")]
        told = {lease["Lease"] for lease in known if "Signal" in lease}
        with self.lock:
            # of that very run: the job may have been given back and leased again meanwhile
            leases = {lease["Lease"] for lease in known}
            runs = [run for run in self.runs.values() if run.job.id == entry.get("ID") and run.job.lease in leases]
        for run in runs:
            if entry.get("Signal") == "alter":
                self._alter(run, entry)
            elif entry.get("Signal") == "follow":
                self._follow(run)
            elif entry.get("Signal") == "delete" and run.job.lease not in told:
                self._end(run, "deleted", str(entry.get("Comment") or ""))

    def _alter(self, run: Run, limits: Dict[str, Any]) -> None:
        """The limits of a run are others from now on; its walltime still counts from its start."""
        changes: Dict[str, Any] = {key: limits[key] for key in ("Runtime", "Memory", "CpuTime") if key in limits}
        try:
            with self.lock:
                run.job = Job.from_record({**run.job.to_record(), **changes})
                self.main_news.notify()
            note(run.folder, {"Job": run.job.to_record()})
        except (BadRequest, OSError) as error:
            self.log.warning("job.alter job=%s error=%r", run.job, str(error))
        else:
            self.log.info("job.alter job=%s walltime=%d mem=%d cput=%d", run.job, *run.limits)

    # -- starting

    def _start(self, job: Job) -> None:
        """Gives a job to the keeper; whatever is in the way of that is the job's end, never the client's."""
        host = self.options.hostname
        if job.fill:
            job = job.but(params=fill(job, host, self.options.max_jobs, self._total_memory()))
        if self.stopping:
            return self._give_back(job, f"the client on {host} was stopped")
        if self.options.hours and not in_hours(self.options.hours, minute_of_day(self.wall())):
            return self._give_back(job, f"{host} takes jobs only in its hours, {self.options.hours.text}")
        lost = self._lost_folder()
        if lost:
            return self._give_back_and_pause(job, f"{host} has lost {lost}")
        if os.path.lexists(self.spool.folder_of(job)):
            # a server with an older database counts its runs once more; given back, its next run has another number
            return self._give_back(job, f"{host} has a run {job.run_count} of it already, of another lease")
        try:
            prefixes = self.allow.prefixes()
        except BadRequest as error:
            return self._give_back_and_pause(job, f"{host} {error}")
        if prefixes is not None and (is_script(job) or not allowed(job.params, prefixes)):
            words = " or ".join(map(prefix_words, prefixes[:20]))
            words = f"{host} runs only what starts with {words}" + ", and no script" * is_script(job)
            return self._never_ran(job, "refused", EXIT_REFUSED, words)
        run = Run(job, "", self.clock())
        try:
            order = json.dumps(self._prepare(run)).encode() + b"\n"
        except NoOutput as error:
            self._unmake(run)
            return self._never_ran(job, "failed", EXIT_NO_OUTPUT, str(error))
        except (OSError, ValueError, BadRequest) as error:
            self._unmake(run)
            lost = self._lost_folder()
            if lost:
                return self._give_back_and_pause(job, f"{host} has lost {lost}")
            words = f"cannot start {job.title}: {error}"
            if isinstance(error, OSError):
                words = f"cannot make {error.filename or self.spool.path}, which it needs: {os_words(error)}"
                words = self._disk_full_words(words) if disk_full(error) else words
            return self._never_ran(job, "failed", EXIT_NOT_STARTED, words)
        run.watch = self._dead_watch(job)
        if not self._give_to_keeper(run, order):
            self._unmake(run)
            return self._give_back(job, f"the keeper on {host} has died, and the next one is not ready yet")
        self.log.debug("job.start job=%s params=%r", job, job.params)

    def _give_to_keeper(self, run: Run, order: bytes) -> bool:
        """False = there is no keeper that is known to have its lock: nobody after us could tell whether it lives."""
        with self.lock:
            if not self.keeper_ready or run.keeper != self.keeper_name:
                return False
            self.runs[run.folder], keeper = run, self.keeper
            if run.deadline - run.began < 2:
                self.main_news.notify()  # it looks every second by itself
        # Without the lock: a keeper that has much to say reads no order until _keeper_loop, which needs it, has listened
        with self.ordering:
            try:
                left = memoryview(order)
                while left:
                    left = left[os.write(keeper.stdin.fileno(), left) :]
            except OSError:
                pass  # it has just died: _keeper_loop, which is about to learn it, takes the run for an orphan
        return True

    def _full_disk_of(self, run: Run) -> str:
        """In words, a disk the job writes to that has no room, which may be why it failed; "" = none."""
        for path in dict.fromkeys([os.path.dirname(path) for path in run.outputs.values()] + [run.temp, self.folder]):
            with contextlib.suppress(OSError):
                if path and path != os.path.dirname(os.devnull) and free_disk(path) < NO_ROOM:
                    return self._disk_full_words(f"no room in {path}")
        return ""

    def _disk_full_words(self, words: str) -> str:
        return f"the disk of {self.options.hostname} is full: {words}"

    def _total_memory(self) -> int:
        if self.total_memory < 0:
            try:
                self.total_memory = machine_memory()[0]
            except OSError as error:
                self.log.warning("client.memory error=%r", os_words(error))
                return 0
        return self.total_memory

    def _prepare(self, run: Run) -> Dict[str, Any]:
        """Makes all that a run is to find, and the keeper's order; raises OSError, ValueError or BadRequest."""
        job = run.job
        runner = interpreter(job) if is_script(job) else []
        run.outputs = self._outputs(job)
        if job.number and "TMPDIR" not in job.env:
            run.temp = self.temp.take()
        run.keeper = self.keeper_name
        run.folder = self.spool.make(job, {"Keeper": run.keeper, "Temp": run.temp, **run.outputs})
        params = job.params
        if is_script(job):
            path = os.path.join(run.folder, script_file(job.script_name))
            with open(path, "wb") as file:
                file.write(script_bytes(job.script_name, job.script))
            params = runner + [path] + params[1:]
        workdir = os.path.abspath(os.path.join(self.folder, job.workdir)) if job.workdir else ""
        nodes = self.spool.node_file(self.options.hostname, job.ncpus)
        env = environment(job, workdir or self.folder, nodes, run.temp)
        return {"Folder": run.folder, "Params": params, "Env": env, "WorkDir": workdir, **run.outputs}

    def _is_own_file(self, path: str) -> bool:
        """True of a place where a job's output would change what this client goes by: who may run what, say.  Raises
        NoOutput where that cannot be told."""
        try:
            real = os.path.normcase(os.path.realpath(plain_windows_path(path) if WINDOWS else path))
        except ValueError:  # no file can have that name
            return False
        except OSError as error:  # aux and the like, which are devices of Windows' in every folder
            raise NoOutput(f"cannot open {path}: {os_words(error)}") from None
        mine = [os.path.join(self.spool.path, name) for name in ("lock", "client")] + self.allow.files + self.own_files
        folders = [self.spool.jobs, self.spool.keepers, self.spool.nodes]
        return real in {os.path.normcase(os.path.realpath(file)) for file in mine} or any(
            within(real, folder) for folder in folders
        )

    def _outputs(self, job: Job) -> Dict[str, str]:
        """The files a job prints to, also where it names a folder alone, or wants both outputs in one; raises NoOutput."""
        base, paths = os.path.abspath(os.path.join(self.folder, job.workdir)), {}
        for key, given, letter in (("StdOut", job.stdout, "o"), ("StdErr", job.stderr, "e")):
            path = self._output_path(os.path.join(base, with_variables(given, job, base)), job)
            if given == "/dev/null" or (WINDOWS and given.lower() == "nul"):
                paths[key] = os.devnull
            elif given and self._is_own_file(path):
                words = "it is one of the client's own files: choose another place for output"
                raise NoOutput(f"cannot open {path}: {words}")
            elif given and not (given[-1] in ("/", os.sep) or os.path.isdir(path)):
                paths[key] = path
            else:
                paths[key] = self.spool.output_file(job, letter, path if given else "")
        if job.join:
            paths = dict.fromkeys(paths, paths["StdOut" if job.join == "oe" else "StdErr"])
        return paths

    def _output_path(self, path: str, job: Job) -> str:
        """The path, but the folder where there is one: of an array's, the server has put the index behind it."""
        folder, dot, index = path.rpartition(".")
        meant = dot and index == str(job.index) and os.path.isdir(folder) and not os.path.exists(path)
        return folder if meant else path

    def _unmake(self, run: Run) -> None:
        """Removes what a run has here beside its output."""
        for path, remove in ((run.temp, self.temp.give_back), (run.folder, self.spool.remove)):
            try:
                if path:
                    remove(path)
            except OSError as error:
                self.log.warning("spool.remove folder=%s error=%r", path, os_words(error))

    def _dead_watch(self, job: Job) -> Optional[DeadWatch]:
        if not self.options.dead_after:
            return None
        words = job.params
        with contextlib.suppress(BadRequest):  # what runs it is not there any more
            words = (interpreter(job) if is_script(job) else []) or words
        path = {name.upper(): text for name, text in job.env.items()}.get("PATH")
        if not self.tools.cpu_visible(windows_program(words[0], path, job.workdir) if WINDOWS else words[0]):
            self._say_once(
                "job.watch: the CPU time of what batch files, shells such as cmd.exe, and launchers of programs start "
                "cannot be seen: they never count as dead"
            )
            return None
        step = self._sample_step()
        return DeadWatch(self.options.dead_after * 60, self.options.min_cpu_percent, gap=max(3 * step, step + 10))

    def _give_back(self, job: Job, words: str) -> None:
        self._never_ran(job, "released", EXIT_NOT_STARTED, f"given back: {words}")

    def _give_back_and_pause(self, job: Job, words: str) -> None:
        """The pause first: or the next request would ask for the same job."""
        self._look_around(again=True)
        self._give_back(job, words)

    def _never_ran(self, job: Job, status: str, exit_status: Optional[int], comment: str) -> None:
        self.log.warning("job.%s job=%s: %s", status, job, comment)
        run = Run(job, "", self.clock())
        self._put_in_outbox(
            f"{job.id}.{job.run_count}", run, {"Status": status, "ExitStatus": exit_status, "Comment": comment}
        )

    # -- the keeper

    def _start_keeper(self) -> None:
        """Starts the keeper; raises JobrunnerError if this Python cannot start itself."""
        self.keeper_name = f"{os.getpid()}-{os.urandom(4).hex()}.lock"
        lock_path = os.path.join(self.spool.keepers, self.keeper_name)
        try:
            # -S: it needs nothing but the standard library, and takes 5 MB less.  -I: what lies in the folder it runs in,
            # say somebody's queue.py, is no part of that.  Imported, not run as a script: so Python takes the compiled
            # file, where it could keep one, and 4 MB less again.
            code = f"import sys; sys.path.insert(0, {HERE!r}); import client; sys.exit(client.keep(*sys.argv[1:]))"
            self.keeper = subprocess.Popen(
                [sys.executable, "-S", "-I", "-c", code, lock_path, str(self.options.nice)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=jobrunner.jobs_environ(os.environ),  # jobs see it
                **self.tools.popen,
            )
        except OSError as error:
            raise JobrunnerError(f"cannot start {sys.executable}: {os_words(error)}") from None
        threading.Thread(target=self._guarded, args=(self._keeper_loop,), daemon=True).start()

    def _keeper_loop(self) -> None:
        """Takes in what the keeper says.  When it dies, what it had goes on, and a new one takes the jobs to come."""
        keeper, name, began = self.keeper, self.keeper_name, self.clock()
        for line in iter(keeper.stdout.readline, b""):
            try:
                message = json.loads(line)
            except ValueError:
                continue  # it was killed while it spoke
            if "Ready" in message:
                with self.lock:
                    self.keeper_ready = True
                    self._slot_freed()
            elif "Pid" in message:
                with self.lock:
                    run = self.runs.get(message["Folder"])
                    if run:
                        run.pid, run.started, run.began = message["Pid"], message["Started"], message["Clock"]
            else:
                self._over(message["Folder"], message)
        if self.stopping or self.done:
            return
        self.log.error("keeper.died pid=%d: its jobs go on; their exit statuses cannot be known", keeper.pid)
        with self.lock:
            self.keeper_ready = False
            orphans = [run for run in self.runs.values() if not run.adopted]
            for run in orphans:
                run.adopted, run.keeper = True, name
        if self.clock() < began + 1:
            time.sleep(1)  # whatever it dies of, it would again at once
        while True:
            try:
                return self._start_keeper()
            except JobrunnerError as error:  # no memory for a process just now, say
                self.log.error("keeper.failed: %s; tried again in %d s", error, KEEPER_AGAIN)
                time.sleep(KEEPER_AGAIN)

    def _over(self, folder: str, end: Dict[str, Any]) -> None:
        """A run is over: its slot is free, and its report goes to the outbox."""
        with self.lock:
            run = self.runs.get(folder)
        if run is None:
            return
        if run.ended is None:
            seconds = end.get("Seconds")
            run.ended = run.began + seconds if seconds is not None else self.clock()
        if end.get("DiskFull"):
            end = {**end, "Comment": self._disk_full_words(end["Comment"]), "DiskFull": False}
        if run.ending and self._something_is_left(run):
            run.end = end
        else:
            self._put_in_outbox(folder, run, end)

    def _put_in_outbox(self, folder: str, run: Run, end: Dict[str, Any]) -> None:
        report = {**end_report(run, end), "Run": run}
        if run.outputs:
            for key, path in run.outputs.items():
                begin, data = read_piece(path, None) if key == "StdOut" or path != run.outputs["StdOut"] else (0, b"")
                if data:
                    report[f"{key}Tail"], report[f"{key}Size"] = as_text(data), begin + len(data)
            if report["Status"] == "failed" and not report["Comment"]:
                report["Comment"] = self._full_disk_of(run)
        with self.lock:
            self.runs.pop(folder, None)
            self.outbox[folder] = report
            self._slot_freed()
            if not self.carries_reports:
                self.report_news.notify()
        self.log.debug("job.over job=%s status=%s exit=%s", run.job, report["Status"], report["ExitStatus"])

    # -- clocks and limits: the main thread

    def _watch(self) -> None:
        """One round: limits, kills, samples, and the jobs that another client's keeper has."""
        clock = self.clock()
        with self.lock:
            runs = list(self.runs.values())
        for run in runs:
            if run.end is not None:
                self._over(run.folder, run.end)
                continue
            if run.adopted:
                self._look_at_adopted(run)
                if run.ended is not None:
                    continue
            if run.pid and not run.ending and clock >= run.deadline:
                self._end(run, "timeout")
            elif run.kill_at is not None and clock >= run.kill_at:
                self._kill(run)
        if runs and clock - self.sampled_at >= self._sample_step():
            self.sampled_at = clock
            self._sample([run for run in runs if run.pid])

    def _sample_step(self) -> float:
        """Seconds between snapshots: the longer the better, since ps tells whole seconds of CPU time."""
        steps = [self.options.usage_interval]
        if self.options.dead_after:
            steps.append(max(0.2, self.options.dead_after * 60 / 4))
        with self.lock:
            if any(run.job.memory or run.job.cputime for run in self.runs.values()):
                steps.append(LIMIT_SAMPLE)
        return min(steps)

    def _sample(self, runs: List[Run]) -> None:
        """Takes a snapshot and judges every run by it; a snapshot that failed is no verdict on anybody."""
        processes = self.tools.snapshot()
        if processes is None:
            self._say_once(
                f"tool.failed: {self.tools.lister} lists no processes here: memory, CPU time and --dead-after are not "
                "watched while that is so (--log-level debug has what it says)"
            )
        if processes is None or not runs:
            return
        clock = self.clock()
        for run in runs:
            members = tree(processes, run.pid)
            if not members:
                continue  # it is just ending
            run.usage.update(members)
            run.usage_cpu = run.usage.cpu if run.usage_cpu is None else run.usage_cpu
            if not run.ending:
                verdict = over_limit(run.job, run.usage, run.over_memory)
                run.over_memory = bool(run.job.memory) and run.usage.memory > run.job.memory
                if run.watch and run.watch.is_dead(clock, run.usage.cpu):
                    verdict = verdict or "dead"
                if verdict:
                    self._end(run, verdict)
            if clock - run.usage_at >= self.options.usage_interval:
                sample = run.sample(clock, run.usage_cpu)
                run.usage_at, run.usage_cpu = clock, run.usage.cpu
                self._save_usage(run)
                with self.lock:
                    self.usage_box = self.usage_box[-1000:] + [(run, sample)]
                    self.report_news.notify()

    def _save_usage(self, run: Run) -> None:
        """For the next client: what processes have used that are gone cannot be seen any more."""
        try:
            with open(os.path.join(run.folder, "usage"), "w") as file:
                json.dump(run.usage.save(), file)
        except OSError as error:
            if os.path.isdir(run.folder):
                self.log.debug("spool.write folder=%s error=%r", run.folder, os_words(error))

    def _end(self, run: Run, status: str, comment: str = "") -> None:
        """Begins to end a run: asks it politely now, kills it after --kill-delay."""
        with self.lock:
            if run.ending:
                return
            run.ending, run.comment = status, comment
            clock = self.clock()
            run.kill_at = clock + self.options.kill_delay
            pid = run.pid
        self.log.info("job.end job=%s status=%s pid=%d%s", run.job, status, pid, comment and f": {comment}")
        try:
            note(run.folder, {"Ending": status, "Why": comment, "EndingClock": round(clock, 3)})
        except OSError as error:
            self.log.warning("spool.write folder=%s error=%r", run.folder, os_words(error))
        if pid and not self.options.kill_delay:
            self._kill(run)  # at once: asked to end first, it might be gone before
        elif pid:
            with self.tools.held(pid):
                members = self._members(run)
                if members is not None:
                    run.members = {process.pid: process.start for process in members}
                    self.tools.end(pid, run.members)

    def _members(self, run: Run) -> Optional[List[Process]]:
        """The processes of a run that is to be ended; None = what has its number is a stranger, or may be one.

        A keeper that lives has not waited for the job's process yet, so its number is nobody else's.
        """
        orphan = run.adopted and not self.spool.keeper_lives(run.keeper)
        processes = self.tools.snapshot() or {}
        process = processes.get(run.pid)
        if process and run.started is not None:
            stranger = not self.tools.is_same(process, run.started)
        else:
            stranger = orphan
        if stranger:
            self.log.warning(
                "job.gone job=%s pid=%d: it is not known to be the job's process: left alone", run.job, run.pid
            )
            return None
        return tree(processes, run.pid)

    def _kill(self, run: Run) -> None:
        run.kill_at = self.clock() + KILL_AGAIN
        if not run.pid:
            return
        with self.tools.held(run.pid):
            members = self._members(run)
            if members is not None:
                run.members.update((process.pid, process.start) for process in members)
                run.killed = True
                self.log.info("job.kill job=%s pid=%d processes=%d", run.job, run.pid, len(members))
                self.tools.kill(run.pid, [process.pid for process in members])

    def _something_is_left(self, run: Run) -> bool:
        """True while processes of a job's group or tree are there that its own process has left behind; they have the
        same time to end as it had, and are killed then.  (Windows: taskkill /T has ended the tree from its root.)"""
        processes = {} if WINDOWS else self.tools.snapshot() or {}
        # A group whose leader lives is a stranger's by now: ours is over.  So is one of another boot, whose numbers have
        # all been given out anew.
        lives = run.pid in processes and not processes[run.pid].zombie
        group = 0 if lives or run.started is None else run.pid
        left = [
            process.pid
            for process in processes.values()
            if not process.zombie
            and (
                (group and process.pgid == group)
                or (process.pid in run.members and self.tools.is_same(process, run.members[process.pid]))
            )
        ]
        found = [process for pid in left if group or pid != run.pid for process in tree(processes, pid)]
        # what they start meanwhile is the job's, too, and would be nobody's once they are gone
        run.members.update((process.pid, process.start) for process in found if not process.zombie)
        left = sorted({process.pid for process in found if not process.zombie})
        if left and self.clock() >= (run.kill_at or 0):
            run.killed, run.kill_at = True, self.clock() + KILL_AGAIN
            self.tools.kill(run.pid if group else left[0], left)
        return bool(left)

    # -- a good guest

    def _look_around(self, again: bool = False) -> None:
        """Finds out whether jobs are welcome here just now."""
        clock = self.clock()
        if again or clock >= self.looked_around_at + GUEST_STEP:
            self.looked_around_at = clock
            words = self._pause_words()
            with self.lock:
                changed = bool(words) != bool(self.pause)
                self.pause = self.node["Pause"] = words
                if changed:
                    self.log.info("client.%s", f"pause: {words}" if words else "takes jobs")
                    self._slot_freed()

    def _lost_folder(self) -> str:
        """What somebody has removed, or put another in the place of, so that jobs cannot be run here; "" = nothing."""
        if self.spool.is_gone():
            return f"its spool {self.spool.path}"
        try:  # Windows removes no folder that somebody works in
            if WINDOWS or os.path.samestat(os.stat(os.curdir), os.stat(self.folder)):
                return ""
        except OSError:
            pass
        return f"its working folder {self.folder}"

    def _pause_words(self) -> str:
        lost = self._lost_folder()
        if lost:
            words = f"{lost} is gone: start the client again"
            self._say_once(f"folder.gone: {words}; the jobs that run are watched and reported")
            return words
        try:
            self.allow.prefixes()
        except BadRequest as error:
            return str(error)
        return pause_words(self.options, self.spool.path, self.wall())

    def _sweep_now_and_then(self) -> None:
        """Removes outputs that are old enough; not before the runs here are known."""
        if self.options.keep_output and self.clock() >= self.swept_at + SWEEP:
            self.swept_at = self.clock()
            self._in_thread(self._sweep)

    def _sweep(self) -> None:
        with self.lock:
            reports = list(self.outbox.values()) + list(self.refused.values())
            runs = list(self.runs.values()) + [report["Run"] for report in reports]
            needed = [path for run in runs for path in run.outputs.values()]
        try:
            removed = self.spool.sweep(self.wall() - self.options.keep_output, needed)
        except OSError as error:
            self.log.warning("spool.sweep folder=%s error=%r", self.spool.output, os_words(error))
        else:
            if removed:
                self.log.info("spool.sweep folder=%s removed=%d", self.spool.output, removed)

    # -- streaming outputs that somebody reads just now

    def _follow(self, run: Run) -> None:
        with self.lock:
            if run.follow is None and run.outputs:
                run.follow, run.follow_at = {}, -1e9
            if not self.following:
                self.following = self._in_thread(self._follow_loop)
                if not self.following:
                    run.follow = None  # the server will say it again

    def _follow_loop(self) -> None:
        """Ends when nobody reads any more."""
        backoff = Backoff()
        while True:
            with self.lock:
                runs = [run for run in self.runs.values() if run.follow is not None]
                if not runs:
                    self.following = False
                    return
            sent = [(run,) + self._pieces(run) for run in runs]
            entries = [entry for _, entry, _ in sent if entry]
            try:
                readers = self._wire().stream(entries) if entries else []
            except ServerRefused as error:
                self.log.warning("stream.refused error=%r", str(error))
                readers = []
            except ServerAway:
                time.sleep(backoff.next())
                continue
            backoff.reset()
            with self.lock:
                for run, entry, at in sent:
                    if entry and run.follow is not None:
                        run.follow, run.follow_at = (at if entry["ID"] in readers else None), self.clock()
            time.sleep(FOLLOW_STEP)

    def _pieces(self, run: Run) -> Tuple[Optional[Dict[str, Any]], Dict[str, int]]:
        """What there is to send of a run's outputs, None = nothing; and up to where they are sent then."""
        at = dict(run.follow or {})
        entry: Dict[str, Any] = {"ID": run.job.id, "Lease": run.job.lease}
        for key, path in run.outputs.items():
            if key == "StdOut" or path != run.outputs["StdOut"]:
                begin, data = read_piece(path, at.get(key))
                if data:
                    entry[key] = {"At": begin, "Text": as_text(data)}
                    at[key] = begin + len(data)
        return (entry if len(entry) > 2 or self.clock() >= run.follow_at + FOLLOW_ALIVE else None), at

    # -- what was running before this client was started

    def _adopt(self) -> None:
        """Takes over the runs in the spool: reports those that are over, watches the others."""
        processes: Optional[Dict[int, Process]] = None
        needed: List[Optional[str]] = []
        keepers = {self.keeper_name}
        for folder in self._by_age(self.spool.jobs):
            known = self._read_run(folder)
            if known is None:
                needed.append(self._temp_of(folder))
                continue
            job, notes = known
            needed.append(notes.get("Temp", ""))
            keepers.add(notes.get("Keeper", ""))
            if self._is_elsewhere(folder, notes):
                continue
            processes = self.tools.snapshot() if processes is None else processes
            self._adopt_run(Run(job, folder, self.clock()), notes, processes)
        if None not in needed:
            self.temp.sweep(needed)
        self.spool.sweep_keepers(keepers)

    @staticmethod
    def _temp_of(folder: str) -> Optional[str]:
        """The TMPDIR of a run that is left as it is, since it may go on; None = that cannot be told."""
        return read_notes(folder).get("Temp") if os.path.lexists(os.path.join(folder, "log")) else ""

    def _by_age(self, path: str) -> List[str]:
        """What is in the folder, in the order in which the logs were last written: so the reports are in order."""
        found = []
        for name in os.listdir(path):
            folder = os.path.join(path, name)
            try:
                age = os.stat(os.path.join(folder, "log")).st_mtime_ns
            except OSError:
                age = 0
            found.append((age, folder))
        return [folder for _, folder in sorted(found)]

    def _read_run(self, folder: str) -> Optional[Tuple[Job, Dict[str, Any]]]:
        """The job and the notes of a run in the spool; None = it is none, or cannot be read, which the log says."""
        log = os.path.join(folder, "log")
        empty = os.path.isfile(log) and not os.path.getsize(log)
        if empty or not os.path.lexists(log):
            if empty:
                self.log.warning("spool.damaged file=%s: it is empty: its run was not begun; removed", log)
            if re.match(r"[\w+-]+\.\d+\Z", os.path.basename(folder), re.ASCII) and os.path.isdir(folder):
                self._unmake(Run(Job([]), folder, 0))  # it was being made, or removed, when its client was ended
            else:
                self.log.warning("spool.strange file=%s: it is no run's; left as it is", folder)
            return None
        try:
            notes, strange = read_log(folder)
            if notes.get("Format", FORMAT) > FORMAT:
                raise BadRequest("a newer jobrunner wrote it")
            job = Job.from_record(notes.get("Job") or {})
            if not job.id:
                raise BadRequest("it names no job")
        except (OSError, BadRequest, TypeError, ValueError, AttributeError, KeyError) as error:
            words = os_words(error) if isinstance(error, OSError) else str(error)
            self.log.warning("spool.damaged file=%s: %s; left as it is", log, words)
            return None
        for words in strange[:3]:
            self.log.warning("spool.damaged file=%s: %s; the rest of it counts", log, words)
        return job, notes

    def _is_elsewhere(self, folder: str, notes: Dict[str, Any]) -> bool:
        """True if a run may still go on on another machine, because this spool is a copy of that one's."""
        if notes.get("Machine", self.spool.machine) == self.spool.machine or "ExitStatus" in notes:
            return False
        if self.spool.keeper_lives(notes.get("Keeper", "")) or notes.get("Boot", "") == self.tools.boot != "":
            return False  # this machine has another name now
        self.log.warning("spool.copied folder=%s: its run was on %s; left as it is", folder, notes["Machine"])
        return True

    def _adopt_run(self, run: Run, notes: Dict[str, Any], processes: Optional[Dict[int, Process]]) -> None:
        known = notes.keys() >= {"StdOut", "StdErr"}  # an older client's log has them not
        run.outputs = {key: notes[key] for key in ("StdOut", "StdErr")} if known else self._outputs(run.job)
        run.temp = notes.get("Temp", "")
        run.keeper, run.adopted = notes.get("Keeper", ""), True
        self._take_notes(run, notes)
        run.watch = self._dead_watch(run.job)
        run.usage_cpu = None
        try:
            with open(os.path.join(run.folder, "usage")) as file:
                run.usage.restore(json.load(file))
        except (OSError, ValueError):
            pass  # it is young, or the machine went down meanwhile
        self.runs[run.folder] = run
        self.log.info("job.adopt job=%s pid=%d", run.job, run.pid)
        self._look_at_adopted(run, processes)

    def _take_notes(self, run: Run, notes: Dict[str, Any]) -> None:
        """The process of a run, its clock, and how far its end has come, from its log."""
        clock = self.clock()
        run.pid = notes.get("Pid", 0)
        run.ending, run.comment = run.ending or notes.get("Ending", ""), run.comment or notes.get("Why", "")
        same_boot = notes.get("Boot", self.tools.boot) == self.tools.boot
        if "Boot" in notes:
            run.started = notes.get("Started") if same_boot else None
            run.began = min(clock, notes.get("Clock", clock)) if same_boot else clock
        elif "StartTime" in notes:  # an older client's log has nothing but the time of day
            run.began = clock - max(0.0, time.time() - notes["StartTime"])
            run.started = None if WINDOWS else notes["StartTime"] - time.time() + boot_clock()
        if run.ending and run.kill_at is None:
            asked = notes.get("EndingClock", 0.0) if same_boot else 0.0
            run.kill_at = min(asked, clock) + self.options.kill_delay if asked else clock

    def _look_at_adopted(self, run: Run, processes: Optional[Dict[int, Process]] = None) -> None:
        """Finds out whether a run that is not our keeper's is over."""
        try:
            size = os.stat(os.path.join(run.folder, "log")).st_size
        except OSError:
            size = -1
        if size == run.log_size and processes is None and self.clock() < run.looked_at + ORPHAN_POLL:
            return
        run.log_size = size
        notes = self._notes_just_now(run)
        if notes is None:
            return
        if not run.pid and "Pid" in notes:
            self._take_notes(run, notes)  # its keeper was slow to start it
        if "ExitStatus" not in notes and not self.spool.keeper_lives(run.keeper):
            notes = self._notes_just_now(run)  # its last word may have come between
            if notes is None:
                return
            if "ExitStatus" not in notes:
                notes = self._unseen_end(run, processes) or notes
        else:
            run.looked_at = self.clock()
        if "ExitStatus" in notes:
            self._over(run.folder, notes)

    def _notes_just_now(self, run: Run) -> Optional[Dict[str, Any]]:
        """What a run's log says; None = it is there and cannot be read, as while a virus scanner has it, or a disk in
        the network is away: what it would say of the run's end is waited for."""
        try:
            return read_log(run.folder)[0]
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except OSError as error:
            run.log_size = -1  # looked at again in the next round
            self._say_once(f"spool.unreadable folder={run.folder}: {os_words(error)}; tried again")
            return None

    def _unseen_end(self, run: Run, processes: Optional[Dict[int, Process]]) -> Optional[Dict[str, Any]]:
        """The end of a run whose keeper is gone: None while its process is there."""
        if processes is None:
            if self.clock() < run.looked_at + ORPHAN_POLL:
                return None
            processes, run.looked_at = self._orphans_snapshot(run), self.clock()
        if processes is None:
            return None
        process = processes.get(run.pid)
        if process and not process.zombie and self.tools.is_same(process, run.started):
            return None
        if run.ending:
            return {"ExitStatus": None, "Comment": ""}  # as it was to end
        host = self.options.hostname
        if not run.pid and run.keeper and not self.spool.has_keeper(run.keeper):
            # a keeper that had its order and ended in peace has written how it ended
            words = f"the client on {host} was ended before it had started it: run again"
            return {"Status": "released", "ExitStatus": EXIT_NOT_STARTED, "Comment": words}
        if run.job.rerunable:
            words = f"its process on {host} ended unseen ({EXIT_GONE}): run again"
            return {"Status": "released", "ExitStatus": EXIT_GONE, "Comment": words}
        words = f"its process on {host} ended unseen, and it must not run twice"
        return {"Status": "lost", "ExitStatus": EXIT_LOST, "Comment": words}

    def _orphans_snapshot(self, run: Run) -> Optional[Dict[int, Process]]:
        """One for all orphans of a round; but taken since this run's keeper was known to be gone, which may have started
        its process as its last deed."""
        taken, processes = self.orphans_seen
        if run.orphan_since is None or taken < max(run.orphan_since, self.clock() - ADOPTED_POLL):
            run.orphan_since = self.clock() if run.orphan_since is None else run.orphan_since
            taken, processes = self.orphans_seen = self.clock(), self.tools.snapshot()
        return processes

    # -- reporting

    def _report_loop(self) -> None:
        """Sends usage samples, and the reports that requests do not take along."""
        backoff = Backoff()
        while True:
            with self.lock:
                while not self.usage_box and (self.carries_reports or len(self.outbox) == len(self.under_way)):
                    self.report_news.wait()
                batch = [] if self.carries_reports else self._take_reports()
                samples, self.usage_box = self.usage_box, []
            try:
                self._deliver(batch)
                for run, sample in samples:
                    self._send_sample(run, sample)
                backoff.reset()
                self._all_delivered()
            except (ServerAway, ServerRefused) as error:
                self._undelivered(batch)
                pause = backoff.next()
                self.log.warning("report.kept error=%r again_in=%.1f waiting=%d", str(error), pause, len(self.outbox))
                time.sleep(pause)

    def _send_sample(self, run: Run, sample: Dict[str, Any]) -> None:
        try:
            self._wire().usage(run, sample)
        except ServerRefused as error:
            if error.status != 400:
                raise
            self.log.debug("usage.refused job=%s: %s", run.job, error)  # there will be others

    def _all_delivered(self) -> None:
        """Requests may take reports along again once what had to be sent one by one has been."""
        with self.lock:
            if self.one_by_one and not self.outbox:
                self.one_by_one = False
                self.carries_reports = bool(self.wire) and not self.wire.one_at_a_time

    def _take_reports(self) -> List[Tuple[str, Dict[str, Any]]]:
        """The reports that nobody is delivering yet, oldest first; the caller holds the lock and must deliver them."""
        waiting = ((folder, report) for folder, report in self.outbox.items() if folder not in self.under_way)
        batch = list(itertools.islice(waiting, REPORTS_AT_ONCE))
        self.under_way.update((folder, True) for folder, _ in batch)
        return batch

    def _undelivered(self, batch: List[Tuple[str, Dict[str, Any]]], error: Optional[JobrunnerError] = None) -> None:
        """Reports that must be sent again; if it was they that were refused, one by one.  Also if the server has no
        room for them (507): so that requests go on without them, or for all the server knew this client were gone."""
        with self.lock:
            for folder, _ in batch:
                self.under_way.pop(folder, None)
            if batch and isinstance(error, ServerRefused) and error.status in (400, 413, 507):
                self.one_by_one, self.carries_reports = True, False
            self.report_news.notify()

    def _deliver(self, batch: List[Tuple[str, Dict[str, Any]]]) -> None:
        """Sends reports until they are acknowledged; raises ServerAway, or ServerRefused for what may pass."""
        if not batch:
            return
        try:
            self._wire().report([report for _, report in batch])
        except ServerRefused as error:
            if error.status not in (400, 404, 413):
                raise
            if len(batch) > 1:  # one of them is at fault, and must not keep back the others
                for single in batch:
                    self._deliver([single])
                return
            if error.status == 413:  # with less of its outputs, rather than never
                if not _shorten(batch[0][1]):
                    raise
                return self._deliver(batch)
            self.log.error("report.refused job=%s: %s; it is kept, and sent again when the server has been away",
                           batch[0][1]["ID"], error)  # fmt: skip
            self._delivered(batch, refused=True)
        else:
            self._acknowledged(batch)

    def _acknowledged(self, batch: List[Tuple[str, Dict[str, Any]]]) -> None:
        for _, report in batch:
            self._unmake(report["Run"])
        self._delivered(batch)

    def _delivered(self, batch: List[Tuple[str, Dict[str, Any]]], refused: bool = False) -> None:
        with self.lock:
            self.refused.update(batch if refused else [])
            for folder, _ in batch:
                self.outbox.pop(folder, None)
                self.under_way.pop(folder, None)


# ---------------------------------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------------------------------


def arguments() -> argparse.ArgumentParser:
    """The command line; each flag that the original had is taken in its spelling too."""
    parser = argparse.ArgumentParser(prog="client.py", description="Runs jobs for a jobrunner server.")
    add = parser.add_argument
    add("--server", "-master", "--master", default=os.environ.get("JOBRUNNER_SERVER", "http://localhost:8088"),
        metavar="HOST[:PORT]", type=jobrunner.argument(_server),
        help="the server, or its URL (default $JOBRUNNER_SERVER, or http://localhost:8088)")  # fmt: skip
    add("--max-jobs", "-maxjobs", "--maxjobs", type=_at_least_one, default=1, metavar="N",
        help="jobs to run at once (default %(default)s)")  # fmt: skip
    add("--hostname", "-hostname", metavar="NAME", help="the name to go by (default: this machine's)")
    add("--allow-prefix", "-safeexpr", "--safeexpr", action="append", default=[], metavar="COMMAND",
        type=jobrunner.argument(split_words),
        help="run only commands that start with these words, e.g. 'java -jar job.jar'; may be repeated")  # fmt: skip
    add("--allow-file", action="append", default=[], metavar="FILE", type=os.path.abspath,
        help="the same from a file, one a line, read again when it changes; may be repeated")  # fmt: skip
    add("--workdir", "-workdir", metavar="DIR", help="where jobs run that name no directory (default: here)")
    add("--queue", action="extend", default=[], metavar="NAME[,NAME]", type=jobrunner.argument(_queues),
        help="run jobs of these queues only; may be repeated")  # fmt: skip
    add("--property", action="append", default=[], metavar="WORD", help="something jobs may require; may be repeated")
    add(
        "--spool", default="jobrunner-spool", metavar="DIR", help="what is known of the jobs here (default %(default)s)"
    )
    add("--kill-delay", type=_seconds, default=10, metavar="S",
        help="seconds between asking a job to end and killing it (default %(default)s)")  # fmt: skip
    add("--dead-after", "-killdeadprocessafterminutes", "--killdeadprocessafterminutes", type=_seconds, default=0,
        metavar="MINUTES", help="kill a job that used next to no CPU time for so long; 0: never (default)")  # fmt: skip
    add("--min-cpu-percent", "-minimumcpupercent", "--minimumcpupercent", type=_seconds, default=3, metavar="PERCENT",
        help="what next to no CPU time means, in percent of one core (default %(default)s)")  # fmt: skip
    add("--usage-interval", type=_seconds, default=60, metavar="S", help="seconds between usage samples (default 60)")
    add("--on-stop", choices=("leave", "kill"), default="leave",
        help="what Ctrl-C does to running jobs: leave them running (default), or end them and give them back")  # fmt: skip
    add("--nice", type=_nice, default=10, metavar="N",
        help="how far jobs stand back for other programs, 0: not at all, to 19 (default %(default)s)")  # fmt: skip
    add("--hours", metavar="19:00-07:00[,..]", type=jobrunner.argument(parse_hours),
        help="start jobs only then, local time (default: always)")  # fmt: skip
    add("--min-free-memory", metavar="SIZE", type=jobrunner.argument(jobrunner.parse_size), default=0,
        help="start jobs only while so much memory is free, e.g. 512mb")  # fmt: skip
    add("--min-free-disk", metavar="SIZE", type=jobrunner.argument(jobrunner.parse_size), default=50 << 20,
        help="start jobs only while so much of the spool's disk is free")  # fmt: skip
    add("--keep-output", metavar="TIME", type=jobrunner.argument(jobrunner.parse_duration), default=30 * 86400,
        help="how long outputs are kept in the spool, e.g. 90d; 0: for ever (default 30d)")  # fmt: skip
    add(
        "--until-empty",
        action="store_true",
        help="end when nothing is queued or running for this client, or waits for its time",
    )
    add("--until-eof", action="store_true", help="stop, as with Ctrl-C, when standard input ends")
    add("--proxy", default="", metavar="URL", help="a proxy to go through (default: none, whatever the system says)")
    jobrunner.add_connection_options(parser)
    add("--log-file", default="", metavar="FILE", help="write the log there: 10 MB, and 5 older ones (default: stderr)")
    add("--log-level", default="info", choices=("debug", "info", "warning", "error"), help="(default %(default)s)")
    add("--version", action="version", version=f"jobrunner {VERSION}")
    add("-client", "--client", action="store_true", help=argparse.SUPPRESS)  # the original's switch between programs
    return parser


def _server(text: str) -> str:
    jobrunner.server_url(text)
    return text


def _queues(text: str) -> List[str]:
    if "" in text.split(","):
        raise BadRequest(f"{text!r} names no queue: leave --queue away for all of them")
    return text.split(",")


def _at_least_one(text: str) -> int:
    if not re.match(r"[1-9]\d{0,5}\Z", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of jobs, 1 or more")
    return int(text)


def _nice(text: str) -> int:
    if not re.match(r"1?\d\Z", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 19")
    return int(text)


def _seconds(text: str) -> float:
    if not re.match(r"\d{1,9}(\.\d+)?\Z", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number, 0 or more")
    return float(text)


def work(options: argparse.Namespace) -> int:
    import logging
    import socket

    log = logging.getLogger("client")
    options.hostname = options.hostname or socket.gethostname()
    api = jobrunner.connection(options, options.server, lambda words: log.warning("token.file: %s", words))
    ends_before(CLIENT_LEVEL)  # or it would see its keeper die, and start another
    spool = Spool(options.spool, log, socket.gethostname())
    if options.workdir:
        try:
            os.chdir(options.workdir)
        except OSError as error:
            raise JobrunnerError(f"cannot go to --workdir {options.workdir}: {os_words(error)}") from None
    tools = (WindowsTools if WINDOWS else LinuxTools)(log)
    agent = Agent(options, api, spool, tools, log)
    for name in ("SIGINT", "SIGTERM", "SIGBREAK"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), agent.stop)
    if options.until_eof:
        jobrunner.when_input_ends(agent.stop)
    log.info("client.start host=%s server=%s max_jobs=%d spool=%s", options.hostname, agent.api.url, options.max_jobs,
             spool.path)  # fmt: skip
    return agent.run()


def main(argv: Optional[List[str]] = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    options = arguments().parse_args(argv)
    make_selectable = jobrunner.unselectable_console()
    try:
        jobrunner.start_log(options.log_level, options.log_file)
        return work(options)
    except JobrunnerError as error:
        print(f"client.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before Agent.stop takes it
        return 130
    finally:
        make_selectable()


if __name__ == "__main__":
    code = main()
    for stream in filter(None, (sys.stdout, sys.stderr)):  # pythonw.exe has neither
        stream.flush()
    # Not sys.exit: that would wait for a poller that the server holds open for half a minute.
    os._exit(code)

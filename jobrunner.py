#!/usr/bin/env python3
"""jobrunner -- what the server and its clients agree on, and the user's commands.

Read this first: a job's whole life is here.

      add           request         finish | timeout | dead
    -------> [Q] ------------> [R] ------------------------> [F]
             ^ |                |                             |
     release | | hold           | lease ran out, refused,     | rerun
             | v                v given back, or to be retried v
             [H]               [Q] again, or [F] lost        [Q]

    [H] is held by a person, by the system, or by a dependency; [W] waits for its start time and becomes [Q] then.
    Any of Q, H, W is deleted or aborted straight to [F]; a job that is R is first ended by its client, unless that is
    forced.  One that was lost becomes R again if its client turns up with it.

Deployed by copying: the server's machine needs jobrunner.py and server.py, a client's machine jobrunner.py and
client.py, a user's machine this file alone.  server.py and client.py import this file and never each other.

Units: durations are seconds, memory is bytes, CPU is percent of one core (times 100 where a sample is stored), moments
are seconds since 1970 in UTC.  Conversion happens where a value enters or leaves, never in between.

Sections: vocabulary, errors, units, the record, JSON, files and locks, the server's address and calls, what commands
share, the commands, the run command, main.
"""

import argparse
import enum
import errno
import json
import os
import re
import sys
import time
from datetime import datetime, timedelta, timezone
from functools import lru_cache
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple, Union

VERSION = "0.1.0"
WINDOWS = os.name == "nt"
DEFAULT_PORT = 8088
UNKNOWN_HOST = "<unknown>"  # what the original calls a client that does not say its name

# ---------------------------------------------------------------------------------------------------------------------
# Vocabulary: states, events, statuses, exit statuses
# ---------------------------------------------------------------------------------------------------------------------


class State(enum.Enum):
    """Where a job is; the values are PBS's letters."""

    __hash__ = object.__hash__  # members are single; Enum's own hashes the name anew each time

    QUEUED = "Q"
    HELD = "H"
    WAITING = "W"
    RUNNING = "R"
    FINISHED = "F"


# The original's buckets, as /dump and jobs.json name them.
BUCKETS = {
    State.QUEUED: "Available",
    State.RUNNING: "Leased",
    State.FINISHED: "Finished",
    State.HELD: "Held",
    State.WAITING: "Held",
}

# The only way a job changes state.  Anything not listed is refused.
TRANSITIONS = {
    # state          event        next state
    (State.QUEUED,   "lease"):    State.RUNNING,
    (State.QUEUED,   "hold"):     State.HELD,
    (State.QUEUED,   "wait"):     State.WAITING,
    (State.QUEUED,   "alter"):    State.QUEUED,
    (State.QUEUED,   "move"):     State.QUEUED,
    (State.QUEUED,   "delete"):   State.FINISHED,
    (State.QUEUED,   "abort"):    State.FINISHED,
    (State.HELD,     "hold"):     State.HELD,      # held by a dependency, now by a person too
    (State.HELD,     "release"):  State.QUEUED,
    (State.HELD,     "alter"):    State.HELD,
    (State.HELD,     "move"):     State.HELD,
    (State.HELD,     "delete"):   State.FINISHED,
    (State.HELD,     "abort"):    State.FINISHED,
    (State.WAITING,  "ready"):    State.QUEUED,
    (State.WAITING,  "hold"):     State.HELD,
    (State.WAITING,  "alter"):    State.WAITING,
    (State.WAITING,  "move"):     State.WAITING,
    (State.WAITING,  "delete"):   State.FINISHED,
    (State.WAITING,  "abort"):    State.FINISHED,
    (State.RUNNING,  "alter"):    State.RUNNING,
    (State.RUNNING,  "end"):      State.FINISHED,
    (State.RUNNING,  "lose"):     State.FINISHED,
    (State.RUNNING,  "requeue"):  State.QUEUED,
    (State.RUNNING,  "delete"):   State.RUNNING,   # until its client has ended it, and so the next two
    (State.RUNNING,  "abort"):    State.RUNNING,
    (State.RUNNING,  "rerun"):    State.RUNNING,
    (State.RUNNING,  "force"):    State.FINISHED,  # deleted without waiting for its client
    (State.FINISHED, "recover"):  State.RUNNING,   # it was lost, and turned up after all
    (State.FINISHED, "rerun"):    State.QUEUED,
}  # fmt: skip
EVENTS = sorted({event for _, event in TRANSITIONS})

# How a finished job ended.
STATUSES = ("finished", "failed", "timeout", "dead", "memory", "cputime", "deleted", "lost", "refused")

# The runner's own exit statuses, numbered as Torque numbers them where it has a number.  0-255 are the program's own
# (on Windows any unsigned 32-bit number), 256 + n means killed by signal n.
EXIT_NOT_STARTED = -8
EXIT_NO_OUTPUT = -9
EXIT_MEMORY = -10
EXIT_WALLTIME = -11
EXIT_CPUTIME = -12
EXIT_DEAD = -101
EXIT_REFUSED = -102
EXIT_LOST = -103
EXIT_DEPENDENCY = -104
EXIT_ABORTED = -105
EXIT_SIGNALLED = 256
EXIT_WORDS = {
    EXIT_NOT_STARTED: "could not be executed",
    EXIT_NO_OUTPUT: "output file could not be opened",
    EXIT_MEMORY: "memory limit",
    EXIT_WALLTIME: "walltime limit",
    EXIT_CPUTIME: "cputime limit",
    EXIT_DEAD: "dead",
    EXIT_REFUSED: "refused by every client",
    EXIT_LOST: "host lost and job not rerunnable",
    EXIT_DEPENDENCY: "dependency can never be met",
    EXIT_ABORTED: "aborted with its array",
}


def next_state(job: "Job", event: str) -> State:
    """The state `event` leads to; raises BadState if it leads nowhere."""
    try:
        return TRANSITIONS[job.state, event]
    except KeyError:
        fits = " or ".join(s.name.lower() for s, e in TRANSITIONS if e == event)
        raise BadState(
            f"cannot {event} job {job}: it is {job.state.name.lower()}, and {event} needs a job that is {fits}"
        ) from None


def exit_words(exit_status: Optional[int]) -> str:
    """An exit status for a person: `0`, `3`, `-11 (walltime limit)`, `265 (killed by signal 9)`."""
    if exit_status is None:
        return "not known"
    if exit_status in EXIT_WORDS:
        return f"{exit_status} ({EXIT_WORDS[exit_status]})"
    if EXIT_SIGNALLED < exit_status <= EXIT_SIGNALLED + 64:
        return f"{exit_status} (killed by signal {exit_status - EXIT_SIGNALLED})"
    return str(exit_status)


# ---------------------------------------------------------------------------------------------------------------------
# Errors: each is one sentence for a person (what, why, what now), and knows its HTTP status
# ---------------------------------------------------------------------------------------------------------------------


class JobrunnerError(Exception):
    """Something the user can do something about; never a traceback."""

    status = 400


class BadRequest(JobrunnerError):
    """What was sent makes no sense."""


class WrongUsage(BadRequest):
    """The command line makes no sense: exit code 2."""


class UnknownJob(JobrunnerError):
    """No job, or more than one, goes by that name."""

    status = 404


class BadState(JobrunnerError):
    """The job is in a state that does not allow it."""

    status = 409


class ServerRefused(JobrunnerError):
    """The server answered with an error; `status` is its HTTP status."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class ServerAway(JobrunnerError):
    """The server could not be reached, or hung up."""

    status = 503


# ---------------------------------------------------------------------------------------------------------------------
# Units: durations, sizes, moments
# ---------------------------------------------------------------------------------------------------------------------

_DURATION_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_SIZE_UNITS = {"": 1, "b": 1, "kb": 1 << 10, "mb": 1 << 20, "gb": 1 << 30, "tb": 1 << 40}
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_FIRST_MOMENT = -62135596800  # the year 1, Go's zero time
_LAST_MOMENT = 253402300799  # the year 9999
_RFC3339 = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[Tt ](\d\d):(\d\d):(\d\d)(?:\.(\d{1,20}))?(?:([Zz])|([+-])(\d\d):?(\d\d))\Z", re.ASCII
)


def parse_duration(text: str) -> int:
    """Seconds in `[[HH:]MM:]SS`, `90s`, `30m`, `72h` or `3d`; raises BadRequest."""
    words = re.match(r"(?:(?:(\d{1,9}):)?(\d{1,9}):)?(\d{1,12})\Z", text, re.ASCII)
    if words:
        hours, minutes, seconds = (int(w or 0) for w in words.groups())
        return hours * 3600 + minutes * 60 + seconds
    unit = re.match(r"(\d{1,12})([smhd])\Z", text.lower(), re.ASCII)
    if unit:
        return int(unit.group(1)) * _DURATION_UNITS[unit.group(2)]
    raise BadRequest(f"{text!r} is not a duration: write HH:MM:SS, or 90s, 30m, 72h, 3d")


def format_duration(seconds: float) -> str:
    """`HH:MM:SS`, hours unbounded, as PBS prints it."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02d}:{minutes:02d}:{seconds:02d}"


def parse_size(text: str) -> int:
    """Bytes in `512mb` or `4gb` (b kb mb gb tb, of 1024 each; no unit: bytes); raises BadRequest."""
    words = re.match(r"(\d{1,18})([kmgt]?b)?\Z", text.lower(), re.ASCII)
    if not words:
        raise BadRequest(f"{text!r} is not a size: write 512mb or 4gb (b, kb, mb, gb, tb)")
    return int(words.group(1)) * _SIZE_UNITS[words.group(2) or ""]


def now() -> float:
    """The moment, rounded to what a record keeps (microseconds)."""
    return round(time.time(), 6)


@lru_cache(maxsize=1024)  # thousands of jobs are added at one moment
def format_time(moment: float) -> str:
    """RFC 3339 in UTC: `2026-11-23T17:27:00.923836Z`."""
    seconds, micros = divmod(round(moment * 1000000), 1000000)
    return f"{_format_second(seconds)}.{micros:06d}Z"


@lru_cache(maxsize=1024)
def _format_second(second: int) -> str:
    return (_EPOCH + timedelta(seconds=second)).strftime("%Y-%m-%dT%H:%M:%S").rjust(19, "0")


@lru_cache(maxsize=1024)
def parse_time(text: str) -> float:
    """Seconds since 1970 of an RFC 3339 time: any number of fraction digits, `Z` or an offset; raises BadRequest."""
    if len(text) == 27 and text[19] == "." and text[26] == "Z" and text.isascii() and text[20:26].isdigit():
        return round(
            _parse_second(text[:19]) + int(text[20:26]) / 1000000, 6
        )  # as we write it: a start reads a million
    found = _RFC3339.match(text)
    if not found:
        raise BadRequest(f"{text!r} is not a time: write it as 2026-11-23T17:27:00Z")
    year, month, day, hour, minute, second, fraction, _, sign, off_hours, off_minutes = found.groups()
    try:
        whole = datetime(int(year), int(month), int(day), int(hour), int(minute), int(second), tzinfo=timezone.utc)
    except ValueError as error:
        raise BadRequest(f"{text!r} is not a time: {error}") from None
    offset = (int(off_hours) * 3600 + int(off_minutes) * 60) * (-1 if sign == "-" else 1) if sign else 0
    moment = round((whole - _EPOCH).total_seconds() - offset + float("0." + (fraction or "0")), 6)
    if abs(offset) >= 86400 or not _FIRST_MOMENT <= moment < _LAST_MOMENT:
        raise BadRequest(f"{text!r} is not a time: its offset, or the year in UTC, cannot be")
    return moment


@lru_cache(maxsize=1024)
def _parse_second(text: str) -> float:
    return parse_time(text + "Z")


# ---------------------------------------------------------------------------------------------------------------------
# The record: one job, in memory, on the wire and on disk
# ---------------------------------------------------------------------------------------------------------------------

MAX_RUNTIME = 10 * 365 * 86400
MAX_SAMPLES = 256


class Field(NamedTuple):
    """One line of the record: its name in Python, its key in JSON, what it holds, and who may set it."""

    name: str
    key: str
    kind: str
    submitted: bool  # by whoever adds the job; False: only the server sets it


# The mapping between Python and JSON stands here and nowhere else.
FIELDS = tuple(
    Field(*line)
    for line in (
        ("id", "ID", "text", False),
        ("params", "Params", "argv", True),
        ("runtime", "Runtime", "runtime", True),
        ("number", "Number", "int", False),
        ("index", "Index", "int", False),
        ("state", "State", "state", False),
        ("name", "Name", "text", True),
        ("queue", "Queue", "word", True),
        ("priority", "Priority", "priority", True),
        ("memory", "Memory", "count", True),
        ("cputime", "CpuTime", "count", True),
        ("ncpus", "Ncpus", "ncpus", True),
        ("requires", "Requires", "texts", True),
        ("env", "Env", "env", True),
        ("workdir", "WorkDir", "text", True),
        ("owner", "Owner", "text", True),
        ("stdout", "StdOut", "text", True),
        ("stderr", "StdErr", "text", True),
        ("join", "Join", "join", True),
        ("script", "Script", "text", True),
        ("script_name", "ScriptName", "text", True),
        ("shell", "Shell", "text", True),
        ("submit_dir", "SubmitDir", "text", True),
        ("start_after", "StartAfter", "time", True),
        ("depend", "Depend", "texts", True),
        ("hold", "Hold", "bool", True),
        ("rerunable", "Rerunable", "bool", True),
        ("retries", "Retries", "count", True),
        ("retried", "Retried", "int", False),
        ("failed_on", "FailedOn", "texts", False),
        ("comment", "Comment", "text", False),
        ("submit_time", "SubmitTime", "time", False),
        ("queue_time", "QueueTime", "time", False),
        ("host", "Host", "text", False),
        ("start_time", "StartTime", "time", False),
        ("expiry", "Expiry", "time", False),
        ("lease", "Lease", "text", False),
        ("run_count", "RunCount", "int", False),
        ("refused_by", "RefusedBy", "texts", False),
        ("signal", "Signal", "text", False),
        ("end_time", "EndTime", "time", False),
        ("status", "Status", "text", False),
        ("exit_status", "ExitStatus", "int", False),
        ("cpu_used", "CPUUsed", "ints", False),
        ("mem_used", "MemUsed", "ints", False),
        ("sample_seconds", "SampleSeconds", "int", False),
        ("sample_skipped", "SampleSkipped", "int", False),
        ("cpu_time_used", "CpuTimeUsed", "number", False),
        ("max_mem", "MaxMem", "int", False),
        ("history", "History", "history", False),
    )
)
FIELD_OF_NAME = {field.name: field for field in FIELDS}
FIELD_OF_KEY = {field.key: field for field in FIELDS}


class Job:
    """One job.  Never changed, only replaced (see `but`), so whoever holds one may read it without a lock.

    id            text   UUID: the job, forever
    number        int    the submission, counted from 1; what people type
    index         int    array index; None = no array
    params        [str]  argv; run without a shell
    runtime       s      walltime limit; 0 = none
    state         State
    name          text   "" = the basename of params[0] (see `title`)
    queue         text
    priority      int    -1024..1023, higher first
    memory        bytes  limit over the process tree; 0 = none
    cputime       s      limit over the process tree; 0 = none
    ncpus         int    slots it takes
    requires      [str]  properties a client must have
    env           {}     added to the client's environment
    workdir       text   directory to run in; "" = the client's
    owner         text   user@host, as the submitter says
    stdout        text   path on the client; "" = in its spool; stderr likewise
    join          text   "oe": stderr goes where stdout goes, "eo": the other way round; "" = neither
    script        text   what to run, put into a file on the client; "" = params are the command
    script_name   text   the file's name where it came from; the end of it says on Windows what runs it
    shell         text   what runs the script; "" = its #! line, or /bin/sh
    submit_dir    text   where it was submitted from, on the submitter's machine
    start_after   time   not before; None = at once
    depend        [str]  what it still waits for, as `afterok:17`, one target each
    hold          bool   held by a person, or by the system
    rerunable     bool   may run again after its host is lost
    retries       int    how often it is run again after a failure
    retried       int    how often it has been
    failed_on     [str]  the clients it failed on, which are to be its last resort
    comment       text   why it is where it is, for a person
    submit_time   time   when it was added
    queue_time    time   when it last became ready to run; None = when it was added
    host          text   who has it, or had it last
    start_time    time   when the latest run began; None = not yet
    expiry        time   when the lease ends
    lease         text   the run's secret; "" = leased to an original client
    run_count     int    runs so far
    refused_by    [str]  clients that will not run it
    signal        text   why its client is to end it: "delete", "abort" or "rerun"; "" = it is not
    end_time      time   when it was over
    status        text   one of STATUSES
    exit_status   int    None = not known
    cpu_used      [int]  percent of one core x 100, a sample each sample_seconds; None = no sample yet
    mem_used      [int]  bytes, likewise
    sample_skipped s     since the last sample that was kept
    cpu_time_used s      total of the tree
    max_mem       bytes  peak of the tree
    history       [[text, text]]  what happened to it before its latest run: time, one sentence
    extra         {}     keys this version does not know, kept as they came
    """

    # A million queued jobs must fit: what every job has is a slot, everything else is in the instance's dictionary
    # only where it differs from the default below, and that dictionary is made only when needed.
    __slots__ = ("id", "params", "runtime", "number", "state", "submit_time", "__dict__")

    index: Optional[int] = None
    name = ""
    queue = "default"
    priority = 0
    memory = 0
    cputime = 0
    ncpus = 1
    requires: List[str] = []
    env: Dict[str, str] = {}
    workdir = ""
    owner = ""
    stdout = ""
    stderr = ""
    join = ""
    script = ""
    script_name = ""
    shell = ""
    submit_dir = ""
    start_after: Optional[float] = None
    depend: List[str] = []
    hold = False
    rerunable = True
    retries = 0
    retried = 0
    failed_on: List[str] = []
    comment = ""
    queue_time: Optional[float] = None
    host = ""
    start_time: Optional[float] = None
    expiry: Optional[float] = None
    lease = ""
    run_count = 0
    refused_by: List[str] = []
    signal = ""
    end_time: Optional[float] = None
    status = ""
    exit_status: Optional[int] = None
    cpu_used: Optional[List[int]] = None
    mem_used: Optional[List[int]] = None
    sample_seconds = 0
    sample_skipped = 0
    cpu_time_used: float = 0
    max_mem = 0
    history: List[List[str]] = []
    extra: Dict[str, Any] = {}

    def __init__(self, params: List[str], runtime: int = 0):
        self.id = ""
        self.params = params
        self.runtime = runtime
        self.number = 0
        self.state = State.QUEUED
        self.submit_time: Optional[float] = None

    def __str__(self) -> str:
        """What people type: `17`, or `17[3]` for a subjob."""
        return str(self.number) if self.index is None else f"{self.number}[{self.index}]"

    @property
    def title(self) -> str:
        """Its name, or the basename of its program."""
        return self.name or re.split(r"[/\\]", self.params[0])[-1] or self.params[0]

    @property
    def plain(self) -> bool:
        """True if an original client, which knows only Params and Runtime, would run it as meant."""
        return self.ncpus == 1 and not (
            self.env
            or self.workdir
            or self.requires
            or self.stdout
            or self.stderr
            or self.join
            or self.script
            or self.memory
            or self.cputime
        )

    def but(self, **changes: Any) -> "Job":
        """This job with some fields changed; a field set to its default takes no room."""
        other = Job.__new__(Job)
        for slot in _SLOTS:
            setattr(other, slot, getattr(self, slot))
        if self.__dict__:
            other.__dict__.update(self.__dict__)
        for name, value in changes.items():
            other._set(name, value)
        return other

    def _set(self, name: str, value: Any) -> None:
        if name in _SLOT_NAMES or value != getattr(Job, name):
            setattr(self, name, value)
        else:
            self.__dict__.pop(name, None)

    def sampled(self, cpu: int, mem: int, seconds: int) -> "Job":
        """This job with one more usage sample, of the last `seconds`; when full, every second one goes and the step
        doubles, and from then on samples are passed over until a whole step has gone by."""
        step, skipped, max_mem = self.sample_seconds or seconds, self.sample_skipped + seconds, max(self.max_mem, mem)
        if len(self.cpu_used or ()) < MAX_SAMPLES // 2:
            step = min(step, seconds)  # none has gone yet, and the first may have come late
        elif skipped + seconds / 2 < step:
            return self.but(sample_skipped=skipped, max_mem=max_mem)
        cpus, mems, skipped = (self.cpu_used or []) + [cpu], (self.mem_used or []) + [mem], 0
        if len(cpus) > MAX_SAMPLES:
            cpus, mems, skipped, step = cpus[1::2], mems[1::2], step, step * 2
        return self.but(cpu_used=cpus, mem_used=mems, sample_seconds=step, sample_skipped=skipped, max_mem=max_mem)

    def to_record(self) -> Dict[str, Any]:
        """The job as JSON has it; what is at its default is left out, but what the original always wrote is there."""
        record = {"ID": self.id, "Params": self.params, "Runtime": self.runtime, "Number": self.number}
        record["State"] = self.state.value
        if self.submit_time is not None:
            record["SubmitTime"] = format_time(self.submit_time)
        for name, value in self.__dict__.items():
            if name == "extra":
                record.update(value)
            else:
                field = FIELD_OF_NAME[name]
                record[field.key] = format_time(value) if field.kind == "time" else value
        if self.state is State.RUNNING or self.state is State.FINISHED:
            record.setdefault("MemUsed", None)
            record.setdefault("CPUUsed", None)
        if self.state is State.FINISHED:
            record.setdefault("ExitStatus", None)
        return record

    def public(self) -> Dict[str, Any]:
        """The record for a listing: defaults people ask for are spelled out, the lease's secret is not in it."""
        record = self.to_record()
        record.pop("Lease", None)
        record.update(Name=self.title, Queue=self.queue, Priority=self.priority, Label=str(self))
        return record

    @classmethod
    def from_record(cls, record: Dict[str, Any], submitted: bool = False) -> "Job":
        """The job in a JSON object, keys in any letter case, unknown keys kept; raises BadRequest.

        submitted: it comes from whoever adds it, so what only the server may set is ignored.
        """
        if not isinstance(record, dict):
            raise BadRequest(f"a job is a JSON object with Params, not {_kind(record)}")
        job = cls([])
        for key, value in record.items():
            reader = _READERS.get(key) or _READERS_BY_LOWER_KEY.get(key.lower())
            if reader is None:
                job.extra = {**job.extra, key: value}
                continue
            name, key, check, default, by_submitter = reader
            if value is not None and (by_submitter or not submitted):
                value = check(key, value)
                if value != default:
                    setattr(job, name, value)
        if not job.params:
            raise BadRequest('the job has no Params: give the program and its arguments, as in "Params":["hostname"]')
        return job


_SLOTS = Job.__slots__[:-1]
_SLOT_NAMES = frozenset(_SLOTS)


def _kind(value: Any) -> str:
    """What a JSON value is, in a person's words."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def _check_text(key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise BadRequest(f"{key} must be text, not {_kind(value)}")
    if "\0" in value:
        raise BadRequest(f"{key} holds a NUL character, which no program or file name can take")
    return value


def _check_word(key: str, value: Any) -> str:
    if not _check_text(key, value):
        raise BadRequest(f"{key} is empty")
    return value


def _check_argv(key: str, value: Any) -> List[str]:
    words = _check_texts(key, value)
    if not words or not words[0]:
        raise BadRequest(f"{key} {'is empty' if not words else 'starts with an empty text'}: give the program to run")
    return words


def _check_texts(key: str, value: Any) -> List[str]:
    if not isinstance(value, list):
        raise BadRequest(f"{key} must be a list of text, not {_kind(value)}")
    try:
        words = list(map(sys.intern, value))  # the same few words stand in thousands of jobs: one copy of each
        if "\0" not in "".join(words):
            return words
    except TypeError:
        pass
    return [_check_text(f"{key}[{place}]", word) for place, word in enumerate(value)]  # says which it is


def _check_env(key: str, value: Any) -> Dict[str, str]:
    if not isinstance(value, dict):
        raise BadRequest(f"{key} must be an object of text, not {_kind(value)}")
    for name, text in value.items():
        if not name or "=" in name or "\0" in name:
            raise BadRequest(f"{key}: {name!r} is not a variable's name")
        _check_text(f"{key}[{name!r}]", text)
    return value


def _check_int(key: str, value: Any) -> int:
    if type(value) is not int:
        raise BadRequest(f"{key} must be a whole number, not {value if isinstance(value, float) else _kind(value)}")
    return value


def _check_range(low: int, high: int, unit: str = "") -> Callable[[str, Any], int]:
    def check(key: str, value: Any) -> int:
        if not low <= _check_int(key, value) <= high:
            shown = str(value) if abs(value) < 1 << 70 else "that"
            raise BadRequest(f"{key} must be from {low} to {high}{unit}, not {shown}")
        return value

    return check


def _check_bool(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise BadRequest(f"{key} must be true or false, not {_kind(value)}")
    return value


def _check_number(key: str, value: Any) -> float:
    if type(value) not in (int, float):
        raise BadRequest(f"{key} must be a number, not {_kind(value)}")
    return value


def _check_ints(key: str, value: Any) -> List[int]:
    if not isinstance(value, list):
        raise BadRequest(f"{key} must be a list of numbers, not {_kind(value)}")
    return [_check_int(f"{key}[{place}]", number) for place, number in enumerate(value)]


def _check_join(key: str, value: Any) -> str:
    if value not in ("", "n", "oe", "eo"):
        raise BadRequest(f"{key} must be oe, eo or n, not {value!r}")
    return "" if value == "n" else value


def _check_history(key: str, value: Any) -> List[List[str]]:
    if not isinstance(value, list) or not all(isinstance(line, list) and len(line) == 2 for line in value):
        raise BadRequest(f"{key} must be a list of [time, sentence]")
    return [[_check_text(key, moment), _check_text(key, words)] for moment, words in value]


def _check_time(key: str, value: Any) -> float:
    return parse_time(_check_text(key, value))


def _check_state(key: str, value: Any) -> State:
    state = _STATE_OF_LETTER.get(value) if isinstance(value, str) else None
    if state is None:
        raise BadRequest(f"{key} must be one of Q, H, W, R, F, not {value!r}")
    return state


_STATE_OF_LETTER = {state.value: state for state in State}


_CHECKS: Dict[str, Callable[[str, Any], Any]] = {
    "text": _check_text,
    "word": _check_word,
    "argv": _check_argv,
    "texts": _check_texts,
    "env": _check_env,
    "int": _check_int,
    "ints": _check_ints,
    "number": _check_number,
    "bool": _check_bool,
    "join": _check_join,
    "history": _check_history,
    "time": _check_time,
    "state": _check_state,
    "runtime": _check_range(0, MAX_RUNTIME, " seconds (10 years); 0 = no limit"),
    "priority": _check_range(-1024, 1023),
    "count": _check_range(0, 1 << 62),
    "ncpus": _check_range(1, 1 << 20),
}
# What from_record needs of each field, ready to hand: (name, key, check, default, submitted).  What has a slot has no
# default here: object() equals nothing.
_READERS = {
    f.key: (f.name, f.key, _CHECKS[f.kind], object() if f.name in _SLOT_NAMES else getattr(Job, f.name), f.submitted)
    for f in FIELDS
}
_READERS_BY_LOWER_KEY = {key.lower(): reader for key, reader in _READERS.items()}

# ---------------------------------------------------------------------------------------------------------------------
# JSON: one way in, one way out
# ---------------------------------------------------------------------------------------------------------------------


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


_decode = json.JSONDecoder(parse_constant=_refuse_constant).decode
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
_encode_ascii = json.JSONEncoder(ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode


def from_json(data: Union[bytes, str], what: str = "the body") -> Any:
    """The value in some JSON; raises BadRequest for anything that is not JSON, however it is broken."""
    try:
        return _decode(data.decode("utf-8") if isinstance(data, bytes) else data)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"{what} is not JSON: {error}") from None


def to_json(value: Any) -> bytes:
    """Compact JSON in UTF-8; `<`, `>` and `&` are escaped as the original does; raises BadRequest if it cannot be."""
    try:
        text = _encode(value)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"this cannot be kept as JSON: {error}") from None
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError:
        # Half a surrogate pair: how Python shows a file name that is not UTF-8.  UTF-8 cannot say it, an escape can.
        data = _encode_ascii(value).encode("ascii")
    if b"<" in data or b">" in data or b"&" in data:
        data = data.replace(b"<", b"\\u003c").replace(b">", b"\\u003e").replace(b"&", b"\\u0026")
    return data


def check_shown(value: Any, depth: int = 32) -> None:
    """Raises BadRequest for a value that must not be kept, since a listing with it in could not be read any more:
    nested deeper than some JSON reader can follow, or infinite."""
    if depth == 0:
        raise BadRequest("what you send is nested too deeply: 32 levels can be kept")
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        raise BadRequest("a number you send is larger than JSON readers can hold")
    if isinstance(value, (dict, list)):
        for member in value.values() if isinstance(value, dict) else value:
            check_shown(member, depth - 1)


def read_jobs(path: str) -> List[Dict[str, Any]]:
    """The jobs to submit in a file (`-`: standard input): a database, a JSON list, or JSON Lines, one job each.

    Of a database those that are not over are taken; what is held stays held.  Raises BadRequest naming the line.
    """
    data = sys.stdin.buffer.read() if path == "-" else read_file(path)
    what = "standard input" if path == "-" else path
    data = data[3:] if data.startswith(b"\xef\xbb\xbf") else data
    try:
        whole = from_json(data, what)
    except BadRequest as error:
        whole = _read_lines(data, what, error)
    if isinstance(whole, dict) and not any(key.lower() == "params" for key in whole):
        return _unfinished(whole, what)
    return whole if isinstance(whole, list) else [whole]


def _unfinished(database: Dict[str, Any], what: str) -> List[Dict[str, Any]]:
    """The jobs of a database that are not over."""
    found = []
    for bucket in ("Available", "Leased", "Held"):
        jobs = database.get(bucket) or {}
        if not isinstance(jobs, dict) or not all(isinstance(job, dict) for job in jobs.values()):
            raise BadRequest(f"{what} is no database: {bucket} must be an object of jobs")
        found += [{**job, "Hold": True} if bucket == "Held" else job for job in jobs.values()]
    return found


def _read_lines(data: bytes, what: str, not_whole: BadRequest) -> List[Dict[str, Any]]:
    """JSON Lines; if not even the first line is JSON by itself, the fault is the one found reading it whole."""
    jobs: List[Any] = []
    lines = [(at, line) for at, line in enumerate(data.splitlines(), 1) if line.strip()]
    try:  # as one list, which takes a third of the time; where something is wrong, line by line, to say in which
        jobs = from_json(b"[" + b",".join(line for _, line in lines) + b"]")
        if len(jobs) == len(lines):
            return jobs
    except BadRequest:
        pass
    jobs = []
    for at, line in lines:
        try:
            jobs.append(from_json(line, f"{what} line {at}"))
        except BadRequest:
            if not jobs:
                raise not_whole from None
            raise
    return jobs


# ---------------------------------------------------------------------------------------------------------------------
# Files and locks: what both the store and the spool need
# ---------------------------------------------------------------------------------------------------------------------


def read_file(path: str) -> bytes:
    """The bytes of a file; raises JobrunnerError with a sentence that names it."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise JobrunnerError(f"cannot read {path}: {os_words(error)}") from None


def os_words(error: OSError) -> str:
    """What the system says of an error, without the number and the path."""
    return error.strerror or str(error)


def replace_file(temporary: str, path: str, patience: float = 0.5) -> None:
    """os.replace that outlasts a virus scanner; raises OSError.

    Windows refuses to replace a file that anybody has open, even for reading, and virus scanners open every file just
    written.  They let go within milliseconds, so it is tried for `patience` seconds before it is an error.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            return os.replace(temporary, path)
        except PermissionError:
            if not WINDOWS or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


class FileLock:
    """A lock that ends with the process that holds it, however that ends; raises Busy when somebody else has it.

    The file itself stays: what counts is the system's lock on it.
    """

    class Busy(JobrunnerError):
        """Somebody else holds the lock."""

    def __init__(self, path: str):
        self.file = open(path, "a+b")
        try:
            if WINDOWS:
                import msvcrt

                # far behind what is written, because a locked region cannot be read by others either
                self.file.seek(1 << 30)
                msvcrt.locking(self.file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.file.seek(0)
            owner = self.file.read(32).decode("ascii", "replace").strip()
            self.file.close()
            if not WINDOWS and error.errno not in (errno.EACCES, errno.EAGAIN):
                raise  # msvcrt.locking fails for no other reason, and does not always say even this one
            raise FileLock.Busy(f"process {owner or 'unknown'}") from None
        self.file.truncate(0)
        self.file.write(b"%d\n" % os.getpid())
        self.file.flush()

    def release(self) -> None:
        self.file.close()


# ---------------------------------------------------------------------------------------------------------------------
# The server's address, and calls to it
# ---------------------------------------------------------------------------------------------------------------------


def server_url(text: str) -> str:
    """`host`, `host:port` or a URL as a URL without a slash at the end; raises BadRequest."""
    from urllib.parse import urlsplit

    url = text if "://" in text else "http://" + text
    if not re.match(r"[!-~]+\Z", url):
        raise BadRequest(f"{text!r} is not a server's address: it holds a blank, or what is not ASCII")
    try:
        parts = urlsplit(url)
        port, host = parts.port, parts.hostname
    except ValueError as error:
        raise BadRequest(f"{text!r} is not a server's address: {error}") from None
    if parts.scheme not in ("http", "https") or not host or port == 0:
        raise BadRequest(f"{text!r} is not a server's address: write host, host:port or http://host:port")
    netloc = parts.netloc if port is not None or "://" in text else f"{parts.netloc.rstrip(':')}:{DEFAULT_PORT}"
    return f"{parts.scheme}://{netloc}{parts.path.rstrip('/')}"


class ServerApi:
    """Calls to one server, JSON in and out, over connections that are kept open.  Threads may share it.

    Talks directly: the system's proxy settings, which urllib takes up by default, send requests for the machine next
    door through an office's proxy, where they fail.  `proxy` is a URL for those who need one.
    """

    def __init__(self, server: str, proxy: str = ""):
        from urllib.parse import unquote, urlsplit, urlunsplit

        parts = urlsplit(server_url(server))
        user, _, place = parts.netloc.rpartition("@")
        self.url = urlunsplit((parts.scheme, place, parts.path, "", ""))
        self.headers = {"User-Agent": f"jobrunner/{VERSION}"}
        if user:
            import base64

            self.headers["Authorization"] = "Basic " + base64.b64encode(unquote(user).encode()).decode()
        self._opener, self._idle = _keepalive_opener({"http": proxy, "https": proxy} if proxy else {})

    def call(self, path: str, body: Any = None, query: Optional[Dict[str, Any]] = None, timeout: float = 60) -> Any:
        """The JSON value of the answer (None: no body); POST with a body, GET without.

        Raises ServerRefused (it said no) or ServerAway (not reached, hung up, or an answer that is no JSON).
        """
        status, data = self.fetch(path, None if body is None else to_json(body), query, timeout)
        try:
            return from_json(data, "the answer") if data else None
        except BadRequest as error:
            raise ServerAway(f"{self.url}{path} answered {status}, but {error}: is it a jobrunner server?") from None

    def fetch(
        self, path: str, body: Optional[bytes], query: Optional[Dict[str, Any]], timeout: float
    ) -> Tuple[int, bytes]:
        """(HTTP status, body) of an answer that is not an error; raises as `call`."""
        import http.client
        import urllib.error
        import urllib.request
        from urllib.parse import urlencode

        url = self.url + path + ("?" + urlencode(sorted(query.items())) if query else "")
        headers = {**self.headers, "Content-Type": "application/json"} if body is not None else self.headers
        try:
            response = self._opener.open(urllib.request.Request(url, body, headers), timeout=timeout)
            return response.status, self._read(response)
        except urllib.error.HTTPError as error:
            raise ServerRefused(error.code, self._error_words(error)) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            words = os_words(reason) if isinstance(reason, OSError) else str(reason) or type(reason).__name__
            raise ServerAway(f"cannot reach the server at {self.url}: {words}; is server.py running there?") from None

    def _read(self, response: Any) -> bytes:
        data = response.read()
        connection = getattr(response, "kept", None)
        if connection is not None:
            if response.will_close:
                connection.close()
            else:
                self._idle.append(connection)
        return data

    def _error_words(self, error: Any) -> str:
        try:
            return str(from_json(self._read(error.fp))["Error"])
        except Exception:  # whatever it was that answered, it was no jobrunner server: its status must do
            return f"{self.url} answered {error.code} {error.reason}"


def _keepalive_opener(proxies: Dict[str, str]) -> Tuple[Any, List[Any]]:
    """(an urllib opener, its idle connections).  urllib itself opens a connection a call, which costs both ends a
    third of their time; the handler here puts back what is left of one (ServerApi._read) and takes it again."""
    # imported here: 10 MB and 40 ms that the client's keeper and `--help` can do without
    import http.client
    import urllib.error
    import urllib.request

    idle: List[Any] = []

    class KeepAlive(urllib.request.HTTPHandler):
        def http_open(self, request: Any) -> Any:
            # A call on a kept connection that fails is made again, so it must be one that counts once however often
            # it comes.  All are, but /add.
            while idle and request.selector != "/add":
                try:
                    connection = idle.pop()
                    connection.sock.settimeout(request.timeout)
                    return self.exchange(connection, request)
                except (IndexError, http.client.RemoteDisconnected, ConnectionError):
                    pass  # another thread took it, or the server had closed it meanwhile: try the next, or a new one
            try:
                return self.exchange(http.client.HTTPConnection(request.host, timeout=request.timeout), request)
            except OSError as error:
                raise urllib.error.URLError(error)

        def exchange(self, connection: Any, request: Any) -> Any:
            try:
                headers = {**request.headers, **request.unredirected_hdrs}
                connection.request(request.get_method(), request.selector, request.data, headers)
                response = connection.getresponse()
            except BaseException:
                connection.close()
                raise
            response.kept, response.msg = connection, response.reason
            return response

    return urllib.request.build_opener(KeepAlive, urllib.request.ProxyHandler(proxies)), idle


# ---------------------------------------------------------------------------------------------------------------------
# What the three programs' command lines share
# ---------------------------------------------------------------------------------------------------------------------


def argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """`parse` for argparse: its BadRequest becomes a usage error with the same words."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except BadRequest as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def when_input_ends(action: Callable[[], None]) -> None:
    """Calls `action` from a thread of its own once standard input has ended (--until-eof)."""
    import threading

    def wait() -> None:
        while os.read(0, 4096):  # not sys.stdin's own, whose lock must be free when the program ends before its input
            pass
        action()

    threading.Thread(target=wait, daemon=True).start()


def start_log(level: str) -> None:
    """Log lines on stderr: time in UTC, level, event, then key=value."""
    import logging

    logging.Formatter.converter = time.gmtime
    logging.basicConfig(
        level=level.upper(), format="%(asctime)s %(levelname)s %(message)s", datefmt="%Y-%m-%dT%H:%M:%SZ"
    )


def parse_resources(text: str) -> Dict[str, Any]:
    """What `-l walltime=1:00:00,mem=4gb,cput=10:00,ncpus=2` puts into a record; raises BadRequest."""
    record: Dict[str, Any] = {}
    for word in text.split(","):
        name, _, value = word.partition("=")
        if name not in RESOURCES or not value:
            raise BadRequest(f"-l {word}: the resources are {', '.join(f'{known}=' for known in RESOURCES)}")
        key, parse = RESOURCES[name]
        record[key] = parse(value)
    return record


def _parse_count(text: str) -> int:
    if not re.match(r"[1-9]\d{0,8}\Z", text, re.ASCII):
        raise BadRequest(f"{text!r} is not a number, 1 or more")
    return int(text)


RESOURCES: Dict[str, Tuple[str, Callable[[str], int]]] = {
    "walltime": ("Runtime", parse_duration),
    "mem": ("Memory", parse_size),
    "cput": ("CpuTime", parse_duration),
    "ncpus": ("Ncpus", _parse_count),
}


def owner() -> str:
    """user@host of whoever runs this."""
    import getpass
    import socket

    try:
        user = getpass.getuser()
    except (OSError, KeyError, ImportError):  # no such user, and no variable that says one
        user = "unknown"
    return f"{user}@{socket.gethostname()}"


def _all_jobs(api: ServerApi, **query: Any) -> Iterator[Dict[str, Any]]:
    """Every job that /jobs finds, page by page."""
    offset = 0
    while True:
        page = api.call("/jobs", query={**query, "offset": offset})["Jobs"]
        yield from page
        if not page or len(page) < 10000:
            return
        offset += len(page)


def _job(api: ServerApi, name: str) -> Dict[str, Any]:
    return api.call("/job", query={"id": name})


def _out(text: str) -> None:
    """Prints a line whatever it holds: a console that cannot show a character shows its escape."""
    try:
        print(text)
    except UnicodeEncodeError:
        encoding = sys.stdout.encoding or "ascii"
        print(text.encode(encoding, "backslashreplace").decode(encoding))


def _printable(text: str) -> str:
    """A text that stays in its line."""
    return "".join(char if char.isprintable() else "?" for char in text)


def _column(text: str, width: int) -> str:
    """A text as one word of a table, so that the columns can be told by blanks: programs read them so."""
    return re.sub(r"\s", "_", _printable(text))[:width] or "-"


# ---------------------------------------------------------------------------------------------------------------------
# The commands
# ---------------------------------------------------------------------------------------------------------------------


def qsub(options: argparse.Namespace, api: ServerApi) -> int:
    """Queues a job, or with --file many; prints the numbers."""
    given: Dict[str, Any] = {"Owner": owner()}
    for resources in options.l:
        given.update(resources)
    if options.N is not None:
        given["Name"] = options.N
    if options.file and options.argv:
        raise WrongUsage("give either --file or a command after --, not both")
    if options.file:
        jobs = read_jobs(options.file)
        for job in jobs:
            for key, value in given.items() if isinstance(job, dict) else ():
                job.setdefault(key, value)
    elif options.argv:
        jobs = [{**given, "Params": options.argv}]
    elif options.words:
        raise WrongUsage(f"put the command after --, as in: qsub -- {' '.join(options.words)}")
    else:
        raise WrongUsage(
            "nothing to run: put the command after --, as in: qsub -l walltime=1:00:00 -- java -jar job.jar 169"
        )
    added = api.call("/add", jobs, timeout=600)
    sys.stdout.write("".join(f"{entry['Number']}\n" for entry in added))
    sys.stdout.flush()
    return _wait_for(api, [entry["ID"] for entry in added]) if options.block else 0


def _wait_for(api: ServerApi, names: List[str], seconds: float = float("inf")) -> int:
    """Waits until the jobs are over; the exit code is the first one's that is not 0, as a shell would see it."""
    deadline, code = time.monotonic() + seconds, 0
    for name in names:
        while True:
            left = deadline - time.monotonic()
            try:
                job = api.call("/job", query={"id": name, "wait": int(max(0, min(50, left)))}, timeout=90)
            except ServerAway as error:
                if left <= 0:
                    raise
                print(f"jobrunner: {error}; waiting for it", file=sys.stderr)
                time.sleep(min(5, left))
                continue
            if job["State"] == "F":
                break
            if left <= 0:
                raise JobrunnerError(f"job {name} is not over yet: it is {job['State']}")
        code = code or shell_code(job)
    return code


def shell_code(job: Dict[str, Any]) -> int:
    """A finished job's exit status as a program's exit code: 0 only if it finished; 1 where a shell has no number."""
    if job.get("Status") == "finished":
        return 0
    exit_status = job.get("ExitStatus")
    return exit_status if isinstance(exit_status, int) and 0 < exit_status < 256 else 1


def qwait(options: argparse.Namespace, api: ServerApi) -> int:
    """Waits until jobs are over, and exits with their status."""
    return _wait_for(api, options.jobs, options.timeout if options.timeout is not None else float("inf"))


def qdel(options: argparse.Namespace, api: ServerApi) -> int:
    """Deletes jobs: at once if they wait, through their client if they run."""
    for job in api.call("/delete", {"IDs": options.jobs})["Jobs"]:
        if job["State"] != "F":
            print(f"job {job['Label']}: {job['Comment']}", file=sys.stderr)
    return 0


def qcat(options: argparse.Namespace, api: ServerApi) -> int:
    """Prints the last 64 KiB of what a job printed."""
    output = api.call("/output", query={"id": options.job})
    text = output["StdErr" if options.e else "StdOut"]
    if not text and output["State"] != "F":
        where = f" on {output['Host']}" if output["State"] == "R" else ""
        state = State(output["State"]).name.lower()
        print(f"jobrunner: job {options.job} is {state}{where}: its output comes when it is over", file=sys.stderr)
    sys.stdout.flush()
    data = text.encode("utf-8", "surrogateescape")
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
    return 0


def pbsnodes(options: argparse.Namespace, api: ServerApi) -> int:
    """Lists the clients."""
    nodes = api.call("/nodes")["Nodes"]
    if options.F == "json":
        named: Dict[str, Any] = {}
        for node in nodes:  # two clients of one name are two entries
            copy = sum(1 for other in named if other.split("#")[0] == node["Host"])
            named[f"{node['Host']}#{copy + 1}" if copy else node["Host"]] = _pbs_node(node)
        _out(json.dumps(_pbs_head(api, "nodes", named), indent=4))
        return 0
    for node in nodes:
        _out(_printable(node["Host"]))
        for key, value in _pbs_node(node).items():
            _out(f"     {key} = {_printable(str(value))}")
        _out("")
    return 0


def _pbs_node(node: Dict[str, Any]) -> Dict[str, Any]:
    info = node["Info"]
    return {
        "state": node["State"],
        "resources_available.ncpus": node["Slots"],
        "resources_assigned.ncpus": node["Running"],
        "properties": ",".join(node["Properties"]),
        "jobs": ", ".join(node["Jobs"]),
        "last_used_time": node["LastSeen"],
        "version": info.get("Version", "the original's" if node["Original"] else ""),
    }


def _pbs_head(api: ServerApi, key: str, things: Dict[str, Any]) -> Dict[str, Any]:
    """The frame of OpenPBS's JSON listings."""
    from urllib.parse import urlsplit

    head = {
        "timestamp": int(time.time()),
        "pbs_version": f"jobrunner {VERSION}",
        "pbs_server": urlsplit(api.url).hostname,
    }
    return {**head, key: things}


def qstat(options: argparse.Namespace, api: ServerApi) -> int:
    """Lists jobs: those that are not over, with -x all, or the ones named."""
    if options.jobs:
        jobs = [_job(api, name) for name in options.jobs]
    else:
        jobs = list(_all_jobs(api, **({} if options.x else {"state": "Q,H,W,R"})))
    if options.F == "json":
        _out(json.dumps(_pbs_head(api, "Jobs", {job["Label"]: pbs_job(job) for job in jobs}), indent=4))
    elif options.f:
        for job in jobs:
            _print_full(job)
    elif jobs:
        _print_table(jobs)
    return 0


def _print_table(jobs: List[Dict[str, Any]]) -> None:
    """PBS's columns: two lines of head, then a job a line."""
    width = max(16, max(len(job["Label"]) for job in jobs))
    _out(f"{'Job id':{width}}  {'Name':16} {'User':16}  {'Time Use':>8} S {'Queue'}")
    _out(f"{'-' * width}  {'-' * 16} {'-' * 16}  {'-' * 8} - {'-' * 5}")
    for job in jobs:
        name, user = _column(job["Name"], 16), _column(job.get("Owner", "").split("@")[0], 16)
        used = format_duration(job.get("CpuTimeUsed") or 0)
        _out(f"{job['Label']:{width}}  {name:16} {user:16}  {used:>8} {job['State']} {_column(job['Queue'], 32)}")


def _print_full(job: Dict[str, Any]) -> None:
    _out(f"Job Id: {job['Label']}")
    for key, value in pbs_job(job).items():
        for name, text in ((f"{key}.{k}", v) for k, v in value.items()) if isinstance(value, dict) else [(key, value)]:
            words = " ".join(map(str, text)) if isinstance(text, list) else str(text)
            _out(f"    {name} = {_printable(words)}")
    _out("")


def pbs_job(job: Dict[str, Any]) -> Dict[str, Any]:
    """A job as OpenPBS lists it with `qstat -f -F json`, and what is only ours under the record's own keys."""
    limits = {
        "walltime": format_duration(job["Runtime"]) if job["Runtime"] else None,
        "mem": f"{-(-job['Memory'] // 1024)}kb" if job.get("Memory") else None,
        "cput": format_duration(job["CpuTime"]) if job.get("CpuTime") else None,
        "ncpus": job.get("Ncpus", 1),
    }
    started = job.get("StartTime")
    ended = job.get("EndTime") or (format_time(time.time()) if job["State"] == "R" else None)
    used = {
        "walltime": format_duration(max(0, parse_time(ended) - parse_time(started))) if started and ended else None,
        "cput": format_duration(job["CpuTimeUsed"]) if job.get("CpuTimeUsed") else None,
        "mem": f"{-(-job['MaxMem'] // 1024)}kb" if job.get("MaxMem") else None,
    }
    fields = {
        "Job_Name": job["Name"],
        "Job_Owner": job.get("Owner"),
        "job_state": job["State"],
        "queue": job["Queue"],
        "Priority": job["Priority"],
        "Resource_List": _known(limits),
        "resources_used": _known(used) if started else None,
        "exec_host": job.get("Host") if started else None,
        "Exit_status": job.get("ExitStatus") if job["State"] == "F" else None,
        "Status": job.get("Status"),
        "comment": _comment(job),
        "run_count": job.get("RunCount", 0),
        "ctime": _pbs_time(job.get("SubmitTime")),
        "qtime": _pbs_time(job.get("SubmitTime")),
        "stime": _pbs_time(started),
        "obittime": _pbs_time(job.get("EndTime")),
        "Rerunable": str(job.get("Rerunable", True)),
        "Submit_arguments": job["Params"],
        "Variable_List": job.get("Env"),
        "Output_Path": job.get("StdOut"),
        "Error_Path": job.get("StdErr"),
        "ID": job["ID"],
    }
    return _known(fields)


def _comment(job: Dict[str, Any]) -> Optional[str]:
    """Why the job is where it is: its Comment, and in words what its exit status says."""
    words = job.get("Comment")
    if job["State"] == "F" and not words and job.get("Status") not in (None, "finished"):
        return f"{job['Status']}: exit status {exit_words(job.get('ExitStatus'))}"
    return words


def _known(fields: Dict[str, Any]) -> Dict[str, Any]:
    return {key: value for key, value in fields.items() if value is not None}


def _pbs_time(text: Optional[str]) -> Optional[str]:
    """`Mon Nov 23 17:27:00 2026`, local time."""
    return (
        time.strftime(
            "%a %b %e %H:%M:%S %Y" if not WINDOWS else "%a %b %d %H:%M:%S %Y", time.localtime(parse_time(text))
        )
        if text
        else None
    )


def qterm(options: argparse.Namespace, api: ServerApi) -> int:
    """Stops the server of this machine cleanly, and waits until it has."""
    api.call("/shutdown", {})
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        try:
            api.call("/status")
            time.sleep(0.1)
        except ServerAway:
            return 0
    raise JobrunnerError("the server has not stopped in five minutes: its log says what it is doing")


# ---------------------------------------------------------------------------------------------------------------------
# The run command: a server and a client of its own, a progress bar, a table of results
# ---------------------------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace, api: None) -> int:
    """Runs every job of a file here; exit code 0 only if each of them finished."""
    import tempfile

    if options.db:
        return _run_in(options, os.path.abspath(options.db))
    with tempfile.TemporaryDirectory(prefix="jobrunner-") as folder:
        return _run_in(options, os.path.join(folder, "jobs.json"))


def _run_in(options: argparse.Namespace, database: str) -> int:
    """`run` with this database: what is in it already goes on where it was, else it begins with the file's jobs."""
    begun = os.path.exists(database) or os.path.exists(database + ".journal")
    jobs = [] if begun and options.db else read_jobs(options.file)
    programs: List[Any] = []
    try:
        api, server = _start_server(database)
        programs.append(server)
        if not api.call("/status")["Jobs"]:
            if begun and not jobs:
                jobs = read_jobs(options.file)
            if jobs:
                api.call("/add", jobs, timeout=600)
        programs.append(_start_client(options, database, api.url))
        _show_progress(api, programs[1])
        return _print_results(api, database if options.db else "")
    finally:
        _stop_programs(programs)


def _beside(name: str) -> str:
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), name)
    if not os.path.exists(path):
        raise JobrunnerError(f"`run` needs {name} beside jobrunner.py: copy it to {os.path.dirname(path)}")
    return path


def _own_group() -> Dict[str, Any]:
    """Popen's arguments for a program that a Ctrl-C here does not reach: it is told in its turn."""
    return {"creationflags": 0x00000200} if WINDOWS else {"start_new_session": True}


def _start_server(database: str) -> Tuple[ServerApi, Any]:
    """A private server on a free port of this machine, and calls to it."""
    import subprocess

    command = [sys.executable, _beside("server.py"), "--port", "0", "--bind", "127.0.0.1", "--db", database]
    command += ["--log-level", "warning", "--until-eof"]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **_own_group())
    line = server.stdout.readline().decode("utf-8", "replace")
    if " at http" not in line:
        server.wait()
        raise JobrunnerError("the server did not start: it says why above")
    return ServerApi(line.rsplit(" ", 1)[1].strip()), server


def _start_client(options: argparse.Namespace, database: str, url: str) -> Any:
    import subprocess

    slots = str(options.j or os.cpu_count() or 1)
    command = [sys.executable, _beside("client.py"), "--server", url, "--max-jobs", slots, "--until-empty"]
    command += ["--spool", database + ".spool", "--on-stop", "kill", "--kill-delay", "5", "--log-level", "error"]
    return subprocess.Popen(command + ["--until-eof"], stdin=subprocess.PIPE, **_own_group())


def _stop_programs(programs: List[Any]) -> None:
    """Ends the client, which gives back what it runs, then the server, which folds its journal in.

    Both stop when their input ends: Windows has no TERM, and should this program be killed, they end all the same.
    """
    import subprocess

    for program in reversed(programs):
        program.stdin.close()
        try:
            program.wait(30)
        except subprocess.TimeoutExpired:
            program.kill()
            program.wait()


def _show_progress(api: ServerApi, client: Any) -> None:
    """Shows how far it is until the client has nothing more to do: a bar on a terminal, else a line now and then."""
    bar, began, next_line, first = sys.stderr.isatty(), time.monotonic(), 1.0, None
    while True:
        over = client.poll() is not None
        status = api.call("/status")
        first = status["States"]["F"] if first is None else first
        seconds = time.monotonic() - began
        line = _progress_line(status, seconds, first, bar)
        if bar:
            sys.stderr.write("\r" + line + ("\n" if over else ""))
            sys.stderr.flush()
        elif over or seconds >= next_line:
            print(line, file=sys.stderr, flush=True)
            next_line = min(seconds * 2, seconds + 60)
        if over:
            return
        try:
            client.wait(0.2)
        except Exception as error:  # subprocess.TimeoutExpired, which is not imported for this alone
            if type(error).__name__ != "TimeoutExpired":
                raise


def _progress_line(status: Dict[str, Any], seconds: float, first: int, bar: bool) -> str:
    """How far a run is; first: jobs that were over when it began."""
    states, finished = status["States"], status["Statuses"]["finished"]
    total, over = sum(states.values()), states["F"]
    rate = (over - first) / seconds if seconds > 0 else 0
    left = (
        format_duration((total - over) / rate) if rate and total > over else "--:--:--" if total > over else "00:00:00"
    )
    waiting = states["Q"] + states["H"] + states["W"]
    words = (
        f"{finished} done, {over - finished} failed, {states['R']} running, {waiting} queued, {rate:.1f}/s, {left} left"
    )
    if not bar:
        return words
    import shutil

    room = shutil.get_terminal_size().columns - len(words) - 12
    width = max(0, min(40, room))
    full = width * over // total if total else width
    percent = 100 * over // total if total else 100
    return (f"[{'#' * full}{'.' * (width - full)}] " if width else "") + f"{percent:3d}% {words}  "


def _print_results(api: ServerApi, database: str) -> int:
    """The table of results; the exit code."""
    jobs = list(_all_jobs(api))
    bad = [job for job in jobs if job.get("Status") != "finished"]
    shown = jobs if len(jobs) <= 100 else bad[:100]
    if shown:
        _out(f"{'Job':>6}  {'Name':16}  {'Status':8}  {'Exit':>5}  {'Time':>9}  Output")
    for job in shown:
        exit_status = job.get("ExitStatus")
        status = job.get("Status") or State(job["State"]).name.lower()
        seconds = (
            parse_time(job["EndTime"]) - parse_time(job["StartTime"])
            if job.get("EndTime") and job.get("StartTime")
            else 0
        )
        words = job.get("Comment") or _last_line(api, job)
        code = "-" if exit_status is None else exit_status
        _out(
            f"{job['Label']:>6}  {_printable(job['Name'])[:16]:16}  {status:8}  {code:>5}  {seconds:8.2f}s  {words}".rstrip()
        )
    if len(bad) > len(shown):
        _out(f"... and {len(bad) - len(shown)} more that did not finish")
    _out(
        f"{len(jobs) - len(bad)} of {len(jobs)} jobs finished"
        + (f"; outputs are in {database}.spool" if database else "")
    )
    return 1 if bad else 0


def _last_line(api: ServerApi, job: Dict[str, Any]) -> str:
    output = api.call("/output", query={"id": job["ID"]})
    lines = (output["StdOut"] if job.get("Status") == "finished" else output["StdErr"] or output["StdOut"]).split("\n")
    return next((_printable(line.strip())[:60] for line in reversed(lines) if line.strip()), "")


# ---------------------------------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------------------------------


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jobrunner.py", description="Submits jobs to a jobrunner server and looks after them, in PBS's words."
    )
    parser.add_argument("--version", action="version", version=f"jobrunner {VERSION}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, function: Callable[..., int], *, remote: bool = True) -> argparse.ArgumentParser:
        words = (function.__doc__ or "").strip()
        sub = commands.add_parser(name, help=words.split("\n")[0], description=words)
        sub.set_defaults(function=function, parser=sub)
        if remote:
            sub.add_argument("--server", metavar="HOST[:PORT]", type=argument(server_url), help="the server, or its URL "
                             "(default: $JOBRUNNER_SERVER, or http://localhost:8088)")  # fmt: skip
            sub.add_argument("--proxy", default="", metavar="URL", help="a proxy to go through (default: none)")
        return sub

    def listing(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("-F", choices=("json",), metavar="json", help="one JSON document, laid out as OpenPBS's")

    sub = command("run", run, remote=False)
    sub.add_argument(
        "file", metavar="FILE", help="a database, a JSON list, or JSON Lines, one job each; -: standard input"
    )
    sub.add_argument("-j", type=argument(_parse_count), metavar="N", help="jobs at once (default: one per processor)")
    sub.add_argument("--db", metavar="F", help="keep the database here: stopped and run again, it goes on where it was")

    sub = command("qsub", qsub)
    sub.add_argument("-N", metavar="NAME", help="the job's name (default: the program's)")
    sub.add_argument("-l", action="append", default=[], metavar="RESOURCE=VALUE", type=argument(parse_resources),
                     help="limits and needs: walltime=1:00:00, mem=4gb, cput=30m, ncpus=2; may be repeated")  # fmt: skip
    sub.add_argument("-W", dest="block", type=argument(_parse_block), default=False, metavar="block=true",
                     help="wait until it is over, and exit with its status")  # fmt: skip
    sub.add_argument(
        "--file", metavar="FILE", help="submit many: a JSON list or JSON Lines, one job each; -: standard input"
    )
    sub.add_argument("words", nargs="*", help=argparse.SUPPRESS)  # only to say what is wrong with them
    sub.usage = "jobrunner.py qsub [options] -- COMMAND [ARGUMENT ...]"

    sub = command("qstat", qstat)
    sub.add_argument("jobs", nargs="*", metavar="JOB", help="a number, an ID, or the beginning of one")
    sub.add_argument("-f", action="store_true", help="everything about each job")
    sub.add_argument("-x", action="store_true", help="finished jobs too")
    listing(sub)

    sub = command("qdel", qdel)
    sub.add_argument("jobs", nargs="+", metavar="JOB")

    sub = command("qcat", qcat)
    sub.add_argument("job", metavar="JOB")
    sub.add_argument("-e", action="store_true", help="what it wrote to standard error")

    sub = command("qwait", qwait)
    sub.add_argument("jobs", nargs="+", metavar="JOB")
    sub.add_argument("--timeout", type=argument(parse_duration), metavar="TIME", help="give up after this time")

    listing(command("pbsnodes", pbsnodes))
    command("qterm", qterm)
    return parser


def _parse_block(text: str) -> bool:
    if text not in ("block=true", "block=false"):
        raise BadRequest(f"-W {text}: this version knows block=true and block=false")
    return text == "block=true"


def main(argv: Optional[List[str]] = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    command: List[str] = []
    if (
        argv[:1] == ["qsub"] and "--" in argv
    ):  # what follows is the job's, to the letter: argparse would take some of it
        command, argv = argv[argv.index("--") + 1 :], argv[: argv.index("--")]
    options = arguments().parse_args(argv)
    options.argv = command
    try:
        if options.function is run:
            return run(options, None)
        server = options.server or os.environ.get("JOBRUNNER_SERVER") or f"http://localhost:{DEFAULT_PORT}"
        return options.function(options, ServerApi(server, options.proxy))
    except WrongUsage as error:
        options.parser.error(str(error))
    except JobrunnerError as error:
        print(f"jobrunner: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `qstat | head` is no error
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())

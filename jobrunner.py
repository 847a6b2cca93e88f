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

Sections: vocabulary, errors, units, the record, JSON, files and locks, the server's address and calls, TLS, tokens, what
the three programs share, what qsub's options mean, qsub's command line, what qmgr understands, listings, what the
commands share, the commands, the run command, main.
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
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

if sys.version_info < (3, 8):  # server.py and client.py come by here before they need more than that has
    sys.exit(
        f"jobrunner needs Python 3.8 or newer, and {sys.executable} is {sys.version.split()[0]}: start it with another"
    )

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
    (State.RUNNING,  "recover"):  State.RUNNING,   # with an earlier run, which turned up and is the longer one
    (State.RUNNING,  "force"):    State.FINISHED,  # deleted without waiting for its client
    (State.FINISHED, "recover"):  State.RUNNING,   # it was lost, and turned up after all
    (State.FINISHED, "rerun"):    State.QUEUED,
}  # fmt: skip
EVENTS = sorted({event for _, event in TRANSITIONS})

# How a finished job ended.
STATUSES = ("finished", "failed", "timeout", "dead", "memory", "cputime", "deleted", "lost", "refused")

# The runner's own exit statuses, numbered as Torque numbers them where it has a number.  0-255 are the program's own
# (on Windows any unsigned 32-bit number), 256 + n means killed by signal n.
EXIT_GONE = -2
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
    EXIT_GONE: "its process was gone when its client came back",
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


class NotTrusted(ServerAway):
    """What is at the server's address is not shown to be the server: TLS failed, and nothing was sent."""


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
    """Bytes in `512mb`, `4gb` or `4g` (b kb mb gb tb, of 1024 each; no unit: bytes); raises BadRequest."""
    words = re.match(r"(\d{1,18})([kmgt]?)b?\Z", text.lower(), re.ASCII)
    if not words:
        raise BadRequest(f"{text!r} is not a size: write 512mb or 4gb (b, kb, mb, gb, tb)")
    return int(words.group(1)) * _SIZE_UNITS[words.group(2) and words.group(2) + "b"]


def now() -> float:
    """The moment, rounded to what a record keeps (microseconds)."""
    return round(time.time(), 6)


def local_time(moment: float) -> time.struct_time:
    """As time.localtime; in UTC where that knows no local time: on Windows before 1970, and from the year 3001 on."""
    try:
        return time.localtime(moment)
    except (OSError, OverflowError):
        return (_EPOCH + timedelta(seconds=moment)).timetuple()


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
MAX_SUBJOBS = 1000000  # of an array


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
        ("fill", "Fill", "bool", True),
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
        ("client", "Client", "word", False),
        ("start_time", "StartTime", "time", False),
        ("expiry", "Expiry", "time", False),
        ("lease", "Lease", "text", False),
        ("earlier", "Earlier", "history", False),
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
SECRET_KEYS = ("Lease", "Earlier")  # in no listing: who knows a run's lease may report its end
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
    fill          bool   the client fills {ncpus}, {memory_gb} and {hostname} in params in
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
    client        text   the id of that client, which tells those of one name apart; "" = an original one
    start_time    time   when the latest run began; None = not yet
    expiry        time   when the lease ends
    lease         text   the run's secret; "" = leased to an original client
    earlier       [[text, text]]  runs that were given up as lost and may still be going on: lease, start time
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
    fill = False
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
    client = ""
    start_time: Optional[float] = None
    expiry: Optional[float] = None
    lease = ""
    earlier: List[List[str]] = []
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
            or self.fill
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
        """The record for a listing: defaults people ask for are spelled out, secrets are not in it."""
        record = self.to_record()
        for key in SECRET_KEYS:
            record.pop(key, None)
        record.update(Name=self.title, Queue=self.queue, Priority=self.priority, Label=str(self))
        return record

    @classmethod
    def from_stored(cls, record: Dict[str, Any]) -> "Job":
        """As `from_record`, for records that mostly came from `to_record`, a million at a time: what each of those has is
        looked at here, one after the other, and only the rest of a record, or one that is not like that, there."""
        try:
            job = cls.__new__(cls)
            job.id, job.params, job.runtime, job.number = id_, params, runtime, number = (
                record["ID"], list(map(sys.intern, record["Params"])), record["Runtime"], record["Number"],
            )  # fmt: skip
            job.state, job.submit_time = _STATE_OF_LETTER[record["State"]], parse_time(record["SubmitTime"])
            sound = type(record["Params"]) is list and params[0] and "\0" not in "".join(params)
            sound = sound and type(id_) is str and type(number) is int and "\0" not in id_
            if not (sound and type(runtime) is int and 0 <= runtime <= MAX_RUNTIME):
                return cls.from_record(record)
        except (KeyError, TypeError, IndexError, BadRequest):
            return cls.from_record(record)
        if len(record) > len(_SLOT_KEYS):
            job._take({key: value for key, value in record.items() if key not in _SLOT_KEYS}, False)
        return job

    @classmethod
    def from_record(cls, record: Dict[str, Any], submitted: bool = False) -> "Job":
        """The job in a JSON object, keys in any letter case, unknown keys kept; raises BadRequest.

        submitted: it comes from whoever adds it, so what only the server may set is ignored.
        """
        if not isinstance(record, dict):
            raise BadRequest(f"a job is a JSON object with Params, not {_kind(record)}")
        job = cls([])
        job._take(record, submitted)
        if not job.params:
            raise BadRequest('the job has no Params: give the program and its arguments, as in "Params":["hostname"]')
        return job

    def _take(self, record: Dict[str, Any], submitted: bool) -> None:
        """Sets what a record says; raises BadRequest."""
        for key, value in record.items():
            reader = _READERS.get(key) or _READERS_BY_LOWER_KEY.get(key.lower())
            if reader is None:
                self.extra = {**self.extra, key: value}
                continue
            name, key, check, default, by_submitter = reader
            if value is not None and (by_submitter or not submitted):
                value = check(key, value)
                if value != default:
                    setattr(self, name, value)


_SLOTS = Job.__slots__[:-1]
_SLOT_NAMES = frozenset(_SLOTS)
_SLOT_KEYS = frozenset(field.key for field in FIELDS if field.name in _SLOT_NAMES)


def _kind(value: Any) -> str:
    """What a JSON value is, in a person's words."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def _check_text(key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise BadRequest(f"{key} must be text, not {_kind(value)}")
    if "\0" in value:
        raise BadRequest(f"{key} holds a NUL character, which no program or file name can take")
    return sys.intern(value) if len(value) < 256 else value  # thousands of jobs have the same owner, name, queue


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


def _check_shared_texts(key: str, value: Any) -> List[str]:
    """As `_check_texts`, for lists that thousands of jobs have alike: one copy of each."""
    return _shared_list(tuple(_check_texts(key, value)))


@lru_cache(maxsize=4096)
def _shared_list(words: Tuple[str, ...]) -> List[str]:
    return list(words)


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
    "texts": _check_shared_texts,
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


def _short_int(digits: str) -> int:
    """A number; raises ValueError for one that a Python of before September 2022, as the last one for Windows 7, would
    take minutes to read, and do nothing else meanwhile.  Later ones refuse it by themselves."""
    if len(digits) > 4300:
        raise ValueError("a number has over 4300 digits")
    return int(digits)


_parse_int = None if hasattr(sys, "set_int_max_str_digits") else _short_int
_decode = json.JSONDecoder(parse_constant=_refuse_constant, parse_int=_parse_int).decode
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


def os_words(error: Exception) -> str:
    """What the system says of an error, without the number and the path; of one that says nothing, what it is."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


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

    url, shown = text if "://" in text else "http://" + text, without_login(text)
    if not re.match(r"[!-~]+\Z", url):
        raise BadRequest(f"{shown!r} is not a server's address: it holds a blank, or what is not ASCII")
    try:
        parts = urlsplit(url)
        port, host = parts.port, parts.hostname
    except ValueError as error:  # which may quote a piece of the token
        words = (
            "its port or name cannot be, or a token before @ holds one of / ? # [ ]" if shown != text else str(error)
        )
        raise BadRequest(f"{shown!r} is not a server's address: {words}") from None
    if parts.scheme not in ("http", "https") or not host or port == 0:
        raise BadRequest(f"{shown!r} is not a server's address: write host, host:port or http://host:port")
    netloc = parts.netloc if port is not None or "://" in text else f"{parts.netloc.rstrip(':')}:{DEFAULT_PORT}"
    return f"{parts.scheme}://{netloc}{parts.path.rstrip('/')}"


def without_login(address: str) -> str:
    """A server's address without what stands before its @, which may be a token."""
    return re.sub(r"\A([A-Za-z]+://)?.*@", r"\1", address, flags=re.DOTALL)


class ServerApi:
    """Calls to one server, JSON in and out, over connections that are kept open.  Threads may share it.

    Talks directly: the system's proxy settings, which urllib takes up by default, send requests for the machine next
    door through an office's proxy, where they fail.  `proxy` is a URL for those who need one.

    token            text   sent with every call; what stands before an @ in the server's URL is sent instead of it
    tls_ca           path   PEM of the only CAs that may have signed an https server's certificate; "" = the system's
    tls_fingerprint  text   SHA-256 of the certificate, 64 hex digits; then neither CA nor host name matter
    token_source     text   where the token is from, for a sentence to a person
    renew            () -> (token, source); called when the server knows the token no more; None = there is no other

    Raises BadRequest where these do not go together, JobrunnerError for a file with CAs that cannot be used.
    """

    def __init__(
        self,
        server: str,
        proxy: str = "",
        token: str = "",
        tls_ca: str = "",
        tls_fingerprint: str = "",
        token_source: str = "",
        renew: Optional[Callable[[], Tuple[str, str]]] = None,
    ):
        from urllib.parse import unquote, urlsplit, urlunsplit

        parts = urlsplit(server_url(server))
        user, _, place = parts.netloc.rpartition("@")
        self.url = urlunsplit((parts.scheme, place, parts.path, "", ""))
        self.headers = {"User-Agent": f"jobrunner/{VERSION}"}
        self.token_source, self.renew = token_source, None if user else renew
        self._proxied_in_plain = bool(proxy) and parts.scheme == "http" and not proxy.startswith("https:")
        if user:
            import base64

            self.token_source = "the server's URL"
            self._authorize("Basic " + base64.b64encode(unquote(user).encode()).decode())
        elif token:
            self._authorize("Bearer " + check_token(token, token_source or "what was given"))
        proxies = {"http": proxy, "https": proxy} if proxy else {}
        self._tls = Tls(self.url, tls_ca, tls_fingerprint) if "https:" in f"{self.url} {proxy}" else None
        self._opener, self._idle = _keepalive_opener(proxies, self._tls)

    def _authorize(self, value: str) -> None:
        if self._proxied_in_plain:
            raise BadRequest(
                f"a token for {self.url} would pass the proxy in plain: give the server's URL as https://..."
            )
        self.headers = {**self.headers, "Authorization": value}

    def call(self, path: str, body: Any = None, query: Optional[Dict[str, Any]] = None, timeout: float = 60) -> Any:
        """The JSON value of the answer (None: no body); POST with a body, GET without.

        Raises ServerRefused (it said no) or ServerAway (not reached, hung up, not the right one, or an answer that is
        no JSON).
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
        from urllib.parse import urlencode

        url = self.url + path + ("?" + urlencode(sorted(query.items())) if query else "")
        headers = self.headers
        try:
            return self._send(url, body, headers, timeout)
        except ServerRefused as error:
            if error.status != 401 or not self._has_other_token(headers):
                raise
        return self._send(url, body, self.headers, timeout)

    def _has_other_token(self, sent: Dict[str, str]) -> bool:
        """True if there is another token by now than the one that was sent; it is then the one to come."""
        token, source = self.renew() if self.renew else ("", "")
        if token:
            self.token_source = source
            try:
                self._authorize("Bearer " + token)
            except BadRequest as error:
                raise ServerRefused(401, str(error)) from None
        return self.headers.get("Authorization") != sent.get("Authorization")

    def _send(self, url: str, body: Optional[bytes], headers: Dict[str, str], timeout: float) -> Tuple[int, bytes]:
        import http.client
        import urllib.error
        import urllib.request

        headers = {**headers, "Content-Type": "application/json"} if body is not None else headers
        try:
            response = self._opener.open(urllib.request.Request(url, body, headers), timeout=timeout)
            return response.status, self._read(response)
        except urllib.error.HTTPError as error:
            words = self._error_words(error)
            raise ServerRefused(error.code, self._locked_out() if error.code == 401 else words) from None
        except (OSError, http.client.HTTPException, UnicodeError) as error:  # UnicodeError: no host can have that name
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            raise (self._tls and self._tls.refusal(reason) or ServerAway(self._away_words(reason))) from None

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
            if error.code in (301, 302, 303, 307, 308):
                place = _shown(error.headers.get("Location") or "nowhere")
                return f"{self.url} sends callers on to {place}, and no call follows: is that the server's address?"
            return f"{self.url} answered {error.code} {_shown(str(error.reason))}"

    def _locked_out(self) -> str:
        if "Authorization" not in self.headers:
            return (f"the server at {self.url} lets no one in without a token: put one into a file {TOKEN_FILE} beside "
                    f"jobrunner.py, name its file with --token-file, or set {TOKEN_VARIABLE}")  # fmt: skip
        return (f"the server at {self.url} does not know the token from {self.token_source or 'here'}: ask whoever "
                "looks after it for one that is good")  # fmt: skip

    def _away_words(self, error: Any) -> str:
        import http.client

        words = os_words(error) if isinstance(error, OSError) else str(error) or type(error).__name__
        if isinstance(error, http.client.BadStatusLine) and not isinstance(error, OSError):
            words = "what it answers is not HTTP"
        hung_up = isinstance(error, (ConnectionResetError, http.client.BadStatusLine, BrokenPipeError))
        hint = ", or does it want https://?" if hung_up and self.url.startswith("http:") else "?"
        return f"cannot reach the server at {self.url}: {words}; is server.py running there{hint}"


def _shown(text: str) -> str:
    """What a stranger said, fit for a sentence: one line, not long."""
    return re.sub(r"[^ -~]", "?", text)[:200]


def _import_urllib() -> None:
    """Imports urllib, which is 10 MB and 30 ms that the client's keeper and `--help` can do without; and without ssl,
    another 1 MB and 8 ms, which it takes up where it is there.  Tls has a connection of its own, and needs it not."""
    left_out = "ssl" not in sys.modules
    if left_out:
        sys.modules["ssl"] = None  # type: ignore[assignment]
    try:
        import urllib.request  # noqa: F401
    finally:
        if left_out:
            del sys.modules["ssl"]


def _keepalive_opener(proxies: Dict[str, str], tls: Optional["Tls"]) -> Tuple[Any, List[Any]]:
    """(an urllib opener, its idle connections).  urllib itself opens a connection a call, which costs both ends a
    third of their time; the handler here puts back what is left of one (ServerApi._read) and takes it again."""
    _import_urllib()
    import http.client
    import urllib.error
    import urllib.request

    idle: List[Any] = []
    gone = (http.client.RemoteDisconnected, ConnectionError) + (tls.hung_up if tls else ())

    class KeepAlive(urllib.request.AbstractHTTPHandler):
        http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_

        def http_open(self, request: Any) -> Any:
            # A call on a kept connection that fails is made again, so it must be one that counts once however often
            # it comes.  All are, but /add.
            while idle and not request.selector.endswith("/add"):
                try:
                    connection = idle.pop()
                    connection.sock.settimeout(request.timeout)
                    return self.exchange(connection, request)
                except (IndexError, *gone):
                    pass  # another thread took it, or the server had closed it meanwhile: try the next, or a new one
            try:
                return self.exchange(self.connection(request), request)
            except OSError as error:
                raise urllib.error.URLError(error)

        https_open = http_open

        def connection(self, request: Any) -> Any:
            kind = tls.connection if tls and request.type == "https" else http.client.HTTPConnection
            connection = kind(request.host, timeout=request.timeout)
            if request._tunnel_host:  # https through a proxy, which is told no more than where to, and its own password
                login = request.headers.get("Proxy-authorization")
                connection.set_tunnel(request._tunnel_host, headers={"Proxy-Authorization": login} if login else {})
            return connection

        def exchange(self, connection: Any, request: Any) -> Any:
            try:
                headers = {**request.headers, **request.unredirected_hdrs}
                if request._tunnel_host:
                    headers.pop("Proxy-authorization", None)
                connection.request(request.get_method(), request.selector, request.data, headers)
                response = connection.getresponse()
            except BaseException:
                connection.close()
                raise
            response.kept, response.msg = connection, response.reason
            return response

    opener = urllib.request.OpenerDirector()  # build_opener's would follow redirects, and take the token along
    for handler in (urllib.request.ProxyHandler(proxies), KeepAlive(),
                    urllib.request.HTTPDefaultErrorHandler(), urllib.request.HTTPErrorProcessor()):  # fmt: skip
        opener.add_handler(handler)
    return opener, idle


# ---------------------------------------------------------------------------------------------------------------------
# TLS: which server is the right one
# ---------------------------------------------------------------------------------------------------------------------

HANDSHAKE_TIME = 15.0  # s for a connection and its handshake: a server without TLS may wait for the rest of a line


class Tls:
    """How an https server is made sure of: by its certificate's fingerprint, else by CA and host name.

    Nothing is sent before that is done, so a token goes to no one else.  `connection(host, timeout=)` is an HTTP
    connection over TLS 1.2 or newer; raises NotTrusted, OSError.
    """

    def __init__(self, url: str, ca: str, fingerprint: str):
        import ssl

        self.url, self.ca = url, os.path.abspath(ca) if ca else ""
        self.fingerprint = parse_fingerprint(fingerprint) if fingerprint else ""
        self.hung_up = (ssl.SSLEOFError, ssl.SSLZeroReturnError)
        self._ca_time = self._file_time()
        self.context = self._context()

    def _context(self) -> Any:
        import ssl

        if self.fingerprint:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        else:
            try:
                context = ssl.create_default_context(cafile=self.ca or None)
            except ssl.SSLError:
                raise JobrunnerError(f"{self.ca} holds no certificate: --tls-ca wants a file in PEM") from None
            except OSError as error:
                raise JobrunnerError(f"cannot read {self.ca}, given with --tls-ca: {os_words(error)}") from None
            if self.ca:
                # What Python has set from 3.13 on refuses CAs made with one line of openssl, which others accept.
                context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        return context

    def _file_time(self) -> float:
        try:
            return os.stat(self.ca).st_mtime if self.ca and not self.fingerprint else 0.0
        except OSError:
            return 0.0

    def _refresh(self) -> None:
        """Reads the file with CAs again if it has changed; one that cannot be used changes nothing."""
        moment = self._file_time()
        if moment != self._ca_time:
            self._ca_time = moment
            try:
                self.context = self._context()
            except JobrunnerError:
                pass  # the former one stays in use

    def connection(self, host: str, timeout: float) -> Any:
        self._refresh()
        import http.client
        import socket

        class Connection(http.client.HTTPConnection):
            default_port = 443

            def connect(self, tls: Tls = self) -> None:
                asked, self.timeout = self.timeout, min(self.timeout, HANDSHAKE_TIME)
                super().connect()
                try:
                    self.sock = tls.context.wrap_socket(self.sock, server_hostname=self._tunnel_host or self.host)
                except socket.timeout:
                    raise NotTrusted(tls.silent()) from None
                tls.check(self.sock.getpeercert(binary_form=True))
                self.timeout = asked
                self.sock.settimeout(asked)

        return Connection(host, timeout=timeout)

    def check(self, certificate: bytes) -> None:
        """Raises NotTrusted if a certificate is to have a fingerprint that it has not."""
        if not self.fingerprint:
            return
        import hashlib
        import hmac

        seen = hashlib.sha256(certificate).hexdigest()
        if not hmac.compare_digest(seen, self.fingerprint):
            raise NotTrusted(f"the certificate of {self.url} is not the one it is to have: its fingerprint is {seen}, and "
                             f"--tls-fingerprint wants {self.fingerprint}; if it was renewed, give the new one")  # fmt: skip

    def silent(self) -> str:
        return (f"the server at {self.url} says nothing to a TLS handshake: if it has no TLS, write http:// instead of "
                "https://")  # fmt: skip

    def refusal(self, error: Any) -> Optional["NotTrusted"]:
        """What to tell a person of an error that TLS is the reason of; None for another."""
        import ssl

        if isinstance(error, ssl.SSLCertVerificationError):
            return NotTrusted(self._distrust(error.verify_code, error.verify_message))
        if not isinstance(error, ssl.SSLError):
            return None
        if error.reason in ("WRONG_VERSION_NUMBER", "UNKNOWN_PROTOCOL", "HTTP_REQUEST", "RECORD_LAYER_FAILURE"):
            return NotTrusted(
                f"the server at {self.url} does not speak TLS: write http:// instead of https://, or start it with "
                "--tls-cert"
            )
        words = (error.reason or os_words(error)).replace("_", " ").lower()
        return NotTrusted(f"no TLS with the server at {self.url}: {words}; its log may say more")

    def _distrust(self, code: int, words: str) -> str:
        """OpenSSL's reason not to trust a certificate, and what to do about it."""
        whose = f"the certificate of {self.url}"
        if code == 10:
            return f"{whose} has expired: renew it at the server (or is this machine's clock wrong?)"
        if code == 9:
            return f"{whose} is not valid yet: look at the clocks, this machine's and the server's"
        if code in (62, 64):
            return (f"{whose} is for another host ({words.strip('.')}): use a name that it holds, or pin it with "
                    "--tls-fingerprint")  # fmt: skip
        by = f"a CA in {self.ca}" if self.ca else "a CA that this machine knows"
        return (f"{whose} is not signed by {by} ({words.strip('.')}): name the right one's file with --tls-ca, or pin "
                "the certificate with --tls-fingerprint")  # fmt: skip


def parse_fingerprint(text: str) -> str:
    """A SHA-256 fingerprint as 64 small hex digits; raises BadRequest."""
    digits = text.replace(":", "").lower()
    if not re.match(r"[0-9a-f]{64}\Z", digits):
        raise BadRequest(
            f"{text!r} is not a SHA-256 fingerprint: it is 64 hex digits, as server.py prints at its start"
        )
    return digits


# ---------------------------------------------------------------------------------------------------------------------
# Tokens
# ---------------------------------------------------------------------------------------------------------------------

TOKEN_FILE = "jobrunner.token"  # beside this file
TOKEN_VARIABLE = "JOBRUNNER_TOKEN"
TLS_VARIABLES = ("JOBRUNNER_TLS_CA", "JOBRUNNER_TLS_FINGERPRINT")
SERVER_VARIABLE = "JOBRUNNER_SERVER"


def check_token(text: str, source: str) -> str:
    """A token, from `source`; raises JobrunnerError if it cannot be one, without saying it."""
    if not re.match(r"[!-~]{1,1024}\Z", text):
        raise JobrunnerError(f"the token from {source} cannot be one: it is a single word of ASCII, as server.py "
                             "--make-tokens prints it")  # fmt: skip
    return text


def jobs_environ(environ: Mapping[str, str]) -> Dict[str, str]:
    """An environment as jobs may have it, and listings show it: without the token, also where it is part of the server's
    URL."""
    given = {name: value for name, value in environ.items() if name.upper() != TOKEN_VARIABLE}
    if "@" in given.get(SERVER_VARIABLE, ""):
        try:  # in a path an @ is as good as any other character
            server_url(given[SERVER_VARIABLE])
            given[SERVER_VARIABLE] = re.sub(r"\A([A-Za-z]+://)?[^/]*@", r"\1", given[SERVER_VARIABLE])
        except BadRequest:
            given[SERVER_VARIABLE] = without_login(given[SERVER_VARIABLE])
    return given


def find_token(path: str, warn: Callable[[str], None]) -> Tuple[str, str]:
    """(the token, where it is from): of the file `path`, else of the environment, else of the file beside this one;
    ("", "") if there is none.  Raises JobrunnerError for a file without one."""
    if not path and os.environ.get(TOKEN_VARIABLE):
        source = f"the variable {TOKEN_VARIABLE}"
        return check_token(os.environ[TOKEN_VARIABLE].strip(), source), source
    if not path:
        here = (os.path.abspath(__file__), os.path.realpath(__file__))  # a qsub that is a link to this file
        paths = [os.path.join(os.path.dirname(place), TOKEN_FILE) for place in here]
        path = next(filter(os.path.exists, paths), "")
        if not path:
            return "", ""
    data = read_file(path)
    # PowerShell's > writes UTF-16, and Notepad may put a mark before UTF-8
    wide = data[:2] in (b"\xff\xfe", b"\xfe\xff")
    token = data.decode("utf-16" if wide else "utf-8-sig", "replace").strip()
    if not token:
        raise JobrunnerError(f"{path} is empty: write a token into it, as server.py --make-tokens prints it")
    if not WINDOWS and os.stat(path).st_mode & 0o077:
        warn(f"{path} is open to other users of this machine, who may take the token: chmod 600 {path}")
    return check_token(token, path), path


def connection(options: argparse.Namespace, server: str, warn: Optional[Callable[[str], None]] = None) -> ServerApi:
    """Calls to the server with what the options (add_connection_options) and the environment say of token and TLS.

    warn: told of what is not as it should be, once; default: on stderr.  Raises JobrunnerError.
    """
    ca, fingerprint = options.tls_ca or "", options.tls_fingerprint or ""
    if (ca or fingerprint) and server_url(server).startswith("http:"):
        raise BadRequest("--tls-ca and --tls-fingerprint are for a server at https://, and this one is at http://")
    if not ca and not fingerprint:
        ca, fingerprint = (os.environ.get(name, "") for name in TLS_VARIABLES)
        if (ca or fingerprint) and server_url(server).startswith("http:"):
            raise BadRequest(f"{' or '.join(TLS_VARIABLES)} is set, which is for a server at https://, and this one is at "
                             "http://, where nothing can be checked: unset it, or say https://")  # fmt: skip
    if warn and "@" in server and any(server in word for word in sys.argv[1:]):  # a client's stays there for days
        warn("the token in the server's URL is seen by all users of this machine, in ps: put it into a file "
                        f"{TOKEN_FILE} beside jobrunner.py instead")  # fmt: skip
    # at once absolute, since a client goes to its --workdir
    path = os.path.abspath(options.token_file) if options.token_file is not None else ""
    token, source = find_token(path, warn or _warn)

    def renew() -> Tuple[str, str]:
        try:
            return find_token(path, lambda _: None)
        except JobrunnerError:  # just being written, say
            return "", ""

    return ServerApi(server, options.proxy or "", token, ca, fingerprint, source, renew)


def _warn(words: str) -> None:
    print(f"jobrunner: {one_line(words)}", file=sys.stderr)


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


def unselectable_console() -> Callable[[], None]:
    """Windows: a click into the console's window selects nothing any more.  Else it would keep whatever writes there
    waiting until somebody ends the selection, and with a line of the log every thread: no job is ended at its limit,
    nobody gets an answer.  What is returned makes it as it was."""
    try:
        import msvcrt

        console = os.open("CONIN$", os.O_RDWR)
    except (ImportError, OSError):  # not Windows; no console
        return lambda: None
    import ctypes

    handle = ctypes.c_void_p(msvcrt.get_osfhandle(console))  # type: ignore[attr-defined]
    kernel32, mode = ctypes.WinDLL("kernel32"), ctypes.c_uint32()  # type: ignore[attr-defined]
    if not kernel32.GetConsoleMode(handle, ctypes.byref(mode)):
        return lambda: None
    # ENABLE_EXTENDED_FLAGS without ENABLE_QUICK_EDIT_MODE
    kernel32.SetConsoleMode(handle, mode.value & ~0x40 | 0x80)
    return lambda: kernel32.SetConsoleMode(handle, mode.value | 0x80)


def start_log(level: str, path: str = "", max_bytes: int = 10 << 20, backups: int = 5) -> None:
    """Log lines on stderr, or in the file `path`: time in UTC, level, event, then key=value.

    A file of max_bytes becomes path.1, that path.2 and so on up to `backups`; all are for their owner only.  Raises
    JobrunnerError if it cannot be opened.
    """
    import logging

    logging.Formatter.converter = time.gmtime
    try:
        handler = _log_file(path, max_bytes, backups) if path else None
    except OSError as error:
        raise JobrunnerError(f"cannot write {path}: {os_words(error)}: choose another --log-file") from None

    class Line(logging.Formatter):
        def formatMessage(self, record: Any) -> str:
            return one_line(super().formatMessage(record))

    handler = handler or logging.StreamHandler()
    handler.setFormatter(Line("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%SZ"))
    logging.basicConfig(level=level.upper(), handlers=[handler])


def one_line(text: str) -> str:
    """Text in which line ends and other control characters are written as escapes: a host's name, or what a client said,
    begins no line of its own in a log, moves no terminal's cursor, and turns round no words that follow."""
    controls = "[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]"
    return re.sub(controls, lambda found: repr(found[0])[1:-1], text)


def _log_file(path: str, max_bytes: int, backups: int) -> Any:
    """A handler that writes to a file, and goes on when it can neither turn it over nor write: lines may be lost."""
    from logging.handlers import RotatingFileHandler

    class LogFile(RotatingFileHandler):
        def _open(self) -> Any:
            return open(self.baseFilename, "a", encoding="utf-8", errors="backslashreplace", opener=_owners_only)

        def doRollover(self) -> None:
            try:
                if self.stream:
                    self.stream.close()
                    self.stream = None
                os.rename(self.baseFilename, self.baseFilename)  # or the older ones would move first, and the oldest go
                super().doRollover()
            except OSError:  # Windows renames no file that somebody reads: this one grows until it can be
                self.stream = self.stream or self._open()

        def handleError(self, record: Any) -> None:
            if not isinstance(sys.exc_info()[1], OSError):  # of a full disk there is nobody to tell
                super().handleError(record)

    return LogFile(path, maxBytes=max_bytes, backupCount=backups)


def _owners_only(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def as_text(data: bytes) -> str:
    """An output's bytes as text that can be turned back into them."""
    return data.decode("utf-8", "surrogateescape")


def owner() -> str:
    """user@host of whoever runs this."""
    import getpass
    import socket

    try:
        user = getpass.getuser()
    except (OSError, KeyError, ImportError):  # no such user, and no variable that says one
        user = "unknown"
    return f"{user}@{socket.gethostname()}"


def _parse_count(text: str) -> int:
    if not re.match(r"[1-9]\d{0,8}\Z", text, re.ASCII):
        raise BadRequest(f"{text!r} is not a number, 1 or more")
    return int(text)


def _parse_limit(text: str) -> int:
    return 0 if text == "0" else _parse_count(text)


def _parse_bool(text: str) -> bool:
    """Yes or no, in any of the ways PBS takes; raises BadRequest."""
    if text.lower() in ("y", "yes", "t", "true", "1"):
        return True
    if text.lower() in ("n", "no", "f", "false", "0"):
        return False
    raise BadRequest(f"{text!r} is neither yes nor no: write y or n, true or false")


# ---------------------------------------------------------------------------------------------------------------------
# What qsub's options mean: resources, variables, dependencies, arrays, times.  Text in, keys of the record out
# ---------------------------------------------------------------------------------------------------------------------

Record = Dict[str, Any]
_WORD = re.compile(r"[A-Za-z_][\w.-]*\Z", re.ASCII)


def merged(record: Record, more: Record) -> Record:
    """The record with `more` in it: variables are set one by one, properties come together (but one host stands for
    another), anything else replaces what was there."""
    both = {**record, **more}
    for key, value in more.items():
        old = record.get(key)
        if old and key == "Requires":
            hosts = any(word.startswith("host=") for word in value)
            kept = [word for word in old if word not in value and not (hosts and word.startswith("host="))]
            both[key] = kept + value
        elif old and isinstance(value, dict):
            if key == "sweep" and set(old) & set(value):
                raise WrongUsage(f"{', '.join(value)} is swept over twice: give all its values at once")
            both[key] = {**old, **value}
    return both


def _named(name: str, parse: Callable[[str], Any], value: str) -> Any:
    """parse(value); raises BadRequest that says of what the value was."""
    try:
        return parse(value)
    except BadRequest as error:
        raise BadRequest(f"{name}: {error}") from None


def parse_resources(text: str) -> Record:
    """What `-l walltime=1:00:00,mem=4gb,ncpus=2,java17` puts into a record; raises BadRequest."""
    return _parse_resources(text.split(","))


def _parse_resources(words: List[str]) -> Record:
    record: Record = {}
    for word in words:
        name, _, value = word.partition("=")
        if name in RESOURCES and value:
            record = merged(record, _named(name, RESOURCES[name], value))
        elif name not in RESOURCES and _WORD.match(name) and value.lower() in ("", "true") and word[-1:] != "=":
            record = merged(record, {"Requires": [name]})
        else:
            known = ", ".join(f"{known}=" for known in RESOURCES if known not in _CHUNK_ONLY)
            instead = _OTHER_RESOURCES.get(name, f"there are {known} and clients' properties")
            raise BadRequest(f"there is no {word or 'empty resource'!r}: {instead}")
    return record


def _parse_one_node(text: str) -> Record:
    """`1:ncpus=2:mem=1gb`, what follows select= (PBS Pro) or nodes= (Torque)."""
    count, *words = text.split(":")
    number = re.match(r"\d+\Z", count, re.ASCII)
    if "+" in text or (number and int(count) != 1):
        raise BadRequest(f"{text!r} is not one node, and a job here runs on one: write 1:ncpus=8")
    if not number:  # then it is 1, and what stands here is the node's name, or a resource
        words.insert(0, count if "=" in count else f"host={count}")
    return _parse_resources(words)


# What stands in PBS's chunks (select=) and Torque's nodes (nodes=) only, and there may say what is so here anyhow.
_CHUNK_ONLY = ("ppn", "vnode", "mpiprocs", "ompthreads")
RESOURCES: Dict[str, Callable[[str], Record]] = {
    "walltime": lambda text: {"Runtime": parse_duration(text)},
    "mem": lambda text: {"Memory": parse_size(text)},
    "cput": lambda text: {"CpuTime": parse_duration(text)},
    "ncpus": lambda text: {"Ncpus": _parse_count(text)},
    "procs": lambda text: {"Ncpus": _parse_count(text)},
    "host": lambda text: {"Requires": [f"host={text}"]},
    "select": _parse_one_node,
    "nodes": _parse_one_node,
    "place": lambda text: {"Place": text},
    "ppn": lambda text: {"Ncpus": _parse_count(text)},
    "vnode": lambda text: {"Requires": [f"host={text}"]},
    "mpiprocs": lambda text: {},
    "ompthreads": lambda text: {},
}


# What clusters have and is not here: what to write instead.
_MEM_INSTEAD = "mem= is the limit of all that a job takes"
_PROPERTY_INSTEAD = "a client's property is asked for by its name alone, as in -l linux or -l java17"
_OTHER_RESOURCES = {
    **dict.fromkeys(("vmem", "pmem", "pvmem"), _MEM_INSTEAD),
    **dict.fromkeys(("arch", "opsys", "feature", "software"), _PROPERTY_INSTEAD),
    **dict.fromkeys(("gpus", "ngpus"), "start clients that have one with --property gpu, and ask for it with -l gpu"),
}


_PIECE = re.compile(r"""([^=,"']*=)?(?:"([^"]*)"|'([^']*)'|((?:\\,|[^,])*))(?:,|\Z)""")


def split_quoted(text: str) -> List[str]:
    r"""The pieces between commas.  A piece, or what stands after its `=`, may be in quotes, which go; commas within are
    data, and so is `\,`.  Any other quote, backslash or brace is data: `A=C:\x,B="1,2"` are `A=C:\x` and `B=1,2`."""
    pieces, at = [], 0
    while at < len(text):
        found = _PIECE.match(text, at)
        start, double, single, plain = found.groups()  # type: ignore[union-attr]  # the last of the three fits anything
        value = next(value for value in (double, single, (plain or "").replace("\\,", ",")) if value is not None)
        pieces.append((start or "") + value)
        at = found.end()  # type: ignore[union-attr]
    return pieces


def parse_variables(text: str, environ: Optional[Dict[str, str]] = None) -> Dict[str, str]:
    """The variables in `A=1,B="x,y",C`; one without a value has the caller's; raises BadRequest."""
    caller = jobs_environ(os.environ if environ is None else environ)
    variables = {}
    for piece in split_quoted(text):
        name, equals, value = piece.strip().partition("=")
        if not name or re.search(r"[\s\"']", name):
            raise BadRequest(
                f"{name or piece!r} is not a variable's name: put quotes around a value with commas, as in A='1,2'"
            )
        if not equals and name not in caller:
            raise BadRequest(f"there is no variable {name} here whose value the job could have: write {name}=VALUE")
        variables[name] = value if equals else caller[name]
    return variables


def parse_attributes(text: str) -> Record:
    """What `-W depend=afterok:17,afterany:18,block=true` puts into a record; raises BadRequest."""
    record: Record = {}
    words: List[str] = []
    for piece in split_quoted(text):
        if "=" in piece or not words:
            words.append(piece)
        else:
            words[-1] += "," + piece  # `,` also stands between dependencies
    for word in words:
        name, equals, value = word.partition("=")
        if name in ("stagein", "stageout"):
            raise BadRequest(f"there is no {word!r}: no files are copied, all must be where the job runs")
        if name not in ATTRIBUTES or not equals:
            raise BadRequest(f"there is no {word!r}: there are {', '.join(f'{known}=' for known in ATTRIBUTES)}")
        record.update(_named(name, ATTRIBUTES[name], value))
    return record


DEPENDENCIES = ("after", "afterok", "afternotok", "afterany")


def parse_depend(text: str) -> List[str]:
    """[`afterok:17`, `afterok:18`, `afterany:19[]`] of `afterok:17:18,afterany:19[]`, as Torque writes it too
    (`afteranyarray:19[]`); nothing, or `none`, are none; raises BadRequest."""
    found: List[str] = []
    for word in [] if text in ("", "none") else text.split(","):
        kind, *targets = word.split(":")
        kind = kind[: -len("array")] if kind.endswith("array") else kind
        if kind not in DEPENDENCIES or not targets or not all(targets):
            raise BadRequest(f"{word!r} is no dependency: write afterok:17, with {', '.join(DEPENDENCIES)}")
        found += [f"{kind}:{target}" for target in targets]
    return found


# What -W takes.  `block` is for qsub itself; the last two are kept in the record, and mean nothing here.
ATTRIBUTES: Dict[str, Callable[[str], Record]] = {
    "depend": lambda text: {"Depend": parse_depend(text)},
    "block": lambda text: {"block": _parse_bool(text)},
    "retry": lambda text: {"Retries": _parse_limit(text)},
    "max_fails": lambda text: {"MaxFails": _parse_limit(text)},
    "max_run_subjobs": lambda text: {"MaxRunSubjobs": _parse_limit(text)},
    "umask": lambda text: {"Umask": text},
    "group_list": lambda text: {"GroupList": text},
}


def parse_array(text: str) -> Record:
    """What `1-100:2%10` (PBS) or `1,10,50-100%5` (Torque) puts into a record; raises BadRequest."""
    indices, percent, most = text.partition("%")
    parse_ranges(indices)
    return {"Array": indices, **({"MaxRunSubjobs": _parse_count(most)} if percent else {})}


def parse_ranges(text: str) -> List[range]:
    """The ranges of indices in `1-100:2` or `1,10,50-100`; raises BadRequest."""
    found = []
    for word in text.split(","):
        numbers = re.match(r"(\d{1,9})(?:-(\d{1,9})(?::([1-9]\d{0,8}))?)?\Z", word, re.ASCII)
        indices = range(0)
        if numbers:
            indices = range(int(numbers[1]), int(numbers[2] or numbers[1]) + 1, int(numbers[3] or 1))
        if not indices:
            raise BadRequest(f"{text!r} are no indices: write 1-100, 1-100:2 or 1,10,50-100, and %10 for 10 at a time")
        found.append(indices)
    return found


def parse_sweep(text: str) -> Record:
    """One name of a sweep, `alpha=0.1,0.2`, and its values; raises BadRequest."""
    name, equals, values = text.partition("=")
    if not equals or not re.match(r"[A-Za-z_]\w*\Z", name, re.ASCII):
        raise BadRequest(f"{text!r} is nothing to sweep over: write a name and its values, as in alpha=0.1,0.2")
    return {"sweep": {name: split_quoted(values) or [""]}}


def sweep_items(values: Dict[str, List[str]]) -> List[Dict[str, str]]:
    """An item for each combination of the values, in order: the first name changes most slowly; raises BadRequest."""
    import itertools

    count = 1
    for texts in values.values():
        count *= len(texts)
    if count > MAX_SUBJOBS:
        raise BadRequest(f"--sweep has {count} combinations: an array has {MAX_SUBJOBS} subjobs at most")
    return [dict(zip(values, texts)) for texts in itertools.product(*values.values())]


def parse_start(text: str, moment: Optional[float] = None) -> str:
    """When a job is to start, for its record: PBS's `[[[[CC]YY]MM]DD]hhmm[.SS]` in local time, of what is left out the
    next that fits after `moment` (default: now); or as a record has it, 2026-11-23T17:27:00Z.  Raises BadRequest."""
    words = re.match(r"((?:\d\d){2,6})(?:\.(\d\d))?\Z", text, re.ASCII)
    if not words:
        return format_time(parse_time(text))
    digits, second = words.group(1).rjust(12), int(words.group(2) or 0)
    moment = time.time() if moment is None else moment
    year = digits[:4].strip() if digits[:2].strip() else digits[2:4].strip() and "20" + digits[2:4]
    month, day, hour, minute = (int(digits[at : at + 2].strip() or 0) for at in (4, 6, 8, 10))
    for y, m, d in _dates(datetime.fromtimestamp(moment), int(year or 0), month, day):
        try:
            start = datetime(y, m, d, hour, minute, second).timestamp()
        except (ValueError, OverflowError, OSError):
            continue
        if year or start >= moment:
            return format_time(start)
    raise BadRequest(f"{text!r} is not a time: write [[[[CC]YY]MM]DD]hhmm[.SS], or 2026-11-23T17:27:00Z")


def _dates(today: datetime, year: int, month: int, day: int) -> Iterator[Tuple[int, int, int]]:
    """The dates that may be meant, the nearest first; 0 = left out."""
    if year:
        yield year, month, day
    elif month:
        yield from ((today.year + years, month, day) for years in range(9))
    elif day:
        for months in range(today.month - 1, today.month + 12):
            yield today.year + months // 12, months % 12 + 1, day
    else:
        for date in (today, today + timedelta(days=1)):
            yield date.year, date.month, date.day


def _parse_path(text: str) -> str:
    if re.match(r"[\w.-]{2,}:", text):
        raise BadRequest(f"{text!r} names a host, and outputs stay where the job runs: give the path there")
    return text.replace("^array_index^", "{index}")  # as PBS Pro writes it


def _parse_priority(text: str) -> int:
    if not re.match(r"[+-]?\d{1,9}\Z", text, re.ASCII):
        raise BadRequest(f"{text!r} is not a whole number, -1024 to 1023")
    return _CHECKS["priority"]("the priority", int(text))


def _parse_join(text: str) -> str:
    if text not in ("oe", "eo", "n"):
        raise BadRequest(f"{text!r} joins nothing: write oe (errors into the output), eo, or n")
    return text


# ---------------------------------------------------------------------------------------------------------------------
# qsub's command line: one table for its options, for #PBS lines and for qalter
# ---------------------------------------------------------------------------------------------------------------------


class Option(NamedTuple):
    """An option that puts something into a job's record.

    flag    text   `-N` or `--sweep`
    value   text   what follows it, for --help; "" = nothing does
    parse   text -> Record; keys that begin small are for the command itself, and are not sent
    alters  bool   qalter takes it too
    help    text
    many    bool   more words of the same shape, NAME=..., may follow
    """

    flag: str
    value: str
    parse: Callable[[str], Record]
    alters: bool
    help: str
    many: bool = False


def _key(key: str, parse: Callable[[str], Any] = str) -> Callable[[str], Record]:
    return lambda text: {key: parse(text)}


# In qsub's own words and in #PBS lines.
OPTIONS = (
    Option("-N", "NAME", _key("Name"), True, "the job's name (default: its program's or script's)"),
    Option("-q", "QUEUE", _key("Queue"), False, "the queue (default: default)"),
    Option("-p", "PRIORITY", _key("Priority", _parse_priority), True, "-1024 to 1023, higher first (default: 0)"),
    Option("-l", "RESOURCES", parse_resources, True, "limits and needs: walltime=1:00:00,mem=4gb,cput=30m,ncpus=2,"
           "host=NAME, a client's property; PBS's select=1:ncpus=2 and Torque's nodes=1:ppn=2; may be repeated"),
    Option("-a", "TIME", _key("StartAfter", parse_start), True, "not before: [[[[CC]YY]MM]DD]hhmm[.SS] or RFC 3339"),
    Option("-h", "", _key("Hold", bool), False, "add it held; qrls lets it run"),
    Option("-r", "y|n", _key("Rerunable", _parse_bool), True, "may it run again when its client is lost (default: y)"),
    Option("-v", "A=1,B", _key("Env", parse_variables), True, "variables of the job; B: with the value it has here"),
    Option("-V", "", _key("environ", bool), False, "all variables there are here"),
    Option("-d", "FOLDER", _key("WorkDir"), True, "the folder to run in, on the client"),
    Option("-w", "FOLDER", _key("SubmitDir"), False, "what $PBS_O_WORKDIR is to be (default: the folder it is called in)"),
    Option("-o", "PATH", _key("StdOut", _parse_path), True, "where its output goes, on the client"),
    Option("-e", "PATH", _key("StdErr", _parse_path), True, "where its errors go, on the client"),
    Option("-j", "oe|eo|n", _key("Join", _parse_join), True, "oe: errors go where the output goes; eo: the other way"),
    Option("-J", "1-100[:2][%10]", parse_array, False, "an array: a job for each index, 10 at a time"),
    Option("-t", "1,5-9[%10]", parse_array, False, "an array, as Torque writes it"),
    Option("--each-line", "FILE", _key("each_line"), False, "an array: a job for each line, which is {item}; -: stdin"),
    Option("--sweep", "A=1,2", parse_sweep, False, "an array: a job for each combination; {A} is its value. More "
           "names may follow", many=True),
    Option("-W", "ATTRIBUTES", parse_attributes, True, "depend=afterok:17, block=true (wait, and exit with its "
           "status), retry=N, max_fails=N, max_run_subjobs=N"),
    Option("-S", "SHELL", _key("Shell"), True, "what runs the script (default: its #! line, or /bin/sh)"),
    Option("--fill", "", _key("Fill", bool), False, "{ncpus}, {memory_gb} and {hostname} in its arguments are replaced by "
           "what they are on its client"),
    Option("-A", "ACCOUNT", _key("Account"), True, "kept in the record"),
    Option("-P", "PROJECT", _key("Project"), False, "kept in the record"),
    Option("-m", "POINTS", _key("MailPoints"), True, "kept in the record: no mail is sent"),
    Option("-M", "USERS", _key("MailUsers"), True, "kept in the record"),
    Option("-k", "FILES", _key("KeepFiles"), False, "kept in the record: outputs always stay on the client"),
    Option("-c", "WHEN", _key("Checkpoint"), False, "kept in the record"),
    Option("-n", "", _key("Exclusive", bool), False, "kept in the record"),
)  # fmt: skip
_CONNECTION = (
    Option("--server", "HOST[:PORT]", _key("server", server_url), True, "the server, or its URL (default: "
           "$JOBRUNNER_SERVER, or http://localhost:8088)"),
    Option("--proxy", "URL", _key("proxy"), True, "a proxy to go through (default: none)"),
    Option("--token-file", "FILE", _key("token_file"), True, "whose line is the token that the server wants (default: "
           f"${TOKEN_VARIABLE}, or {TOKEN_FILE} beside this program)"),
    Option("--tls-ca", "FILE", _key("tls_ca"), True, "the CAs, in PEM, to trust alone when the server is at https:// "
           "(default: $JOBRUNNER_TLS_CA, or the system's)"),
    Option("--tls-fingerprint", "SHA256", _key("tls_fingerprint", parse_fingerprint), True, "trust the certificate "
           "that has this fingerprint, and no other (default: $JOBRUNNER_TLS_FINGERPRINT)"),
    Option("--help", "", _key("help", bool), True, "this"),
)  # fmt: skip
QSUB_OPTIONS = (
    *OPTIONS,
    Option("-C", "PREFIX", _key("prefix"), False, "what a script's lines with options begin with (default: #PBS)"),
    Option("-z", "", _key("quiet", bool), False, "do not print the number"),
    Option("--file", "FILE", _key("file"), False, "submit many: a JSON list or JSON Lines, one job each; -: stdin"),
    *_CONNECTION,
)


def add_connection_options(parser: argparse.ArgumentParser, options: Sequence[Option] = _CONNECTION[2:-1]) -> None:
    """Adds --token-file, --tls-ca and --tls-fingerprint, for `connection` to read."""
    for option in options:
        key = option.flag[2:].replace("-", "_")
        kind = argument(lambda text, option=option, key=key: option.parse(text)[key])
        parser.add_argument(option.flag, dest=key, metavar=option.value, type=kind, help=option.help)


# Which jobs, for all commands that change some: name of the option, key of Select, help.
SELECTIONS = (
    ("name", "Name", "jobs of this name"),
    ("status", "Status", "jobs that ended so: failed, timeout, ..."),
    ("state", "State", "jobs in these states: Q, H, W, R, F"),
    ("queue", "Queue", "jobs in this queue"),
    ("host", "Host", "jobs that run, or last ran, there"),
    ("owner", "Owner", "jobs of this user, or user@host"),
)
QALTER_OPTIONS = (
    *(option for option in OPTIONS if option.alters),
    *(Option(f"--{n}", n.upper(), lambda text, key=key: {"select": {key: text}}, True, h) for n, key, h in SELECTIONS),
    *_CONNECTION,
)
# What PBS has and is not here: what to do instead.
_INSTEAD = {
    "-I": "a job has no terminal: submit what it is to run, and follow what that prints with qcat -f",
    "-X": "a job has no screen",
    "-F": "a script's arguments stand behind it, as in: qsub script.sh 1 2",
    "-h": "qhold holds jobs, qrls lets them run",
    "-q": "qmove puts jobs into another queue",
    "-J": "subjobs are named as 17[1-9]",
    "-t": "subjobs are named as 17[1-9]",
}


def read_options(
    words: List[str], options: Iterable[Option], record: Optional[Record] = None
) -> Tuple[Record, List[str]]:
    """(what the options put into the record, the words from the first one on that is none); raises WrongUsage.

    As getopt reads them: `-N x`, `-Nx`, `-hV`, `--file x`, `--file=x`; and, as PSI/J writes it, `-N=x`.
    """
    known, record, words = {option.flag: option for option in options}, dict(record or {}), list(words)
    while words and words[0].startswith("-") and words[0] not in ("-", "--"):
        word = words.pop(0)
        flag, attached = (word[:2], word[2:]) if word[1] != "-" else word.partition("=")[::2]
        option = known.get(flag)
        if option is None:
            raise WrongUsage(f"there is no option {flag}" + (f": {_INSTEAD[flag]}" if flag in _INSTEAD else ""))
        if not option.value:
            words[:0] = [f"-{attached}"] if attached else []
            value = "y"
        elif attached or "=" in word:
            value = attached[1:] if attached.startswith("=") else attached
        elif words:
            value = words.pop(0)
        else:
            raise WrongUsage(f"{flag} needs a value: {flag} {option.value}")
        record = merged(record, _parsed(option, value))
        while option.many and words and re.match(r"[A-Za-z_]\w*=", words[0]):
            record = merged(record, _parsed(option, words.pop(0)))
    return record, words


def _parsed(option: Option, value: str) -> Record:
    try:
        return option.parse(value)
    except BadRequest as error:
        raise WrongUsage(f"{option.flag}: {error}") from None


# What may stand before a script's first command; #PBS lines after it are no options, as in PBS.  Batch files have
# comments of their own, and their options in them.
_COMMENT = re.compile(r"\s*(#|:|@?rem\b|@?echo\s+off\s*$|$)", re.IGNORECASE)
_BATCH_COMMENT = re.compile(r"\s*(@?rem\s+|::\s*)", re.IGNORECASE)


def script_lines(text: str, prefix: str = "#PBS") -> Iterator[Tuple[int, List[str]]]:
    """(number of the line, its words) for each line of a script that holds options; raises BadRequest.

    `#PBS -N "my job"  # a comment`; in a batch file `REM PBS` or `::PBS`.
    """
    for at, line in enumerate(text.lstrip("\ufeff").split("\n"), 1):
        if not prefix or not _COMMENT.match(line):
            return
        line = _BATCH_COMMENT.sub("#", line.rstrip("\r"))
        if line.startswith(prefix) and line[len(prefix) : len(prefix) + 1] in ("", " ", "\t"):
            yield at, _directive_words(line[len(prefix) :], at)


def _directive_words(text: str, at: int) -> List[str]:
    """The words of a line with options, quotes taken off; backslashes are data, for the paths of Windows."""
    import shlex

    lexer = shlex.shlex(text, posix=True)
    lexer.whitespace_split, lexer.escape, lexer.commenters = True, "", ""
    try:
        words = list(lexer)
    except ValueError:
        raise BadRequest(f"line {at}: a quote is opened and not closed") from None
    comment = next((place for place, word in enumerate(words) if word.startswith("#")), len(words))
    return words[:comment]


def script_options(text: str, prefix: str = "#PBS") -> Record:
    """What the options in a script put into the record; raises BadRequest naming the line."""
    record: Record = {}
    for at, words in script_lines(text, prefix):
        try:
            record, left = read_options(words, OPTIONS, record)
        except WrongUsage as error:
            raise BadRequest(f"line {at}: {error}") from None
        if left:
            raise BadRequest(f"line {at}: {left[0]!r} is no option: put a value with blanks into quotes")
    return record


def read_script(path: str) -> Tuple[str, str]:
    """(name, text) of a script; `-` is standard input.  Raises WrongUsage."""
    if path == "-":
        if sys.stdin.isatty():
            print("jobrunner: type the script; Ctrl-D ends it (Windows: Ctrl-Z and Return)", file=sys.stderr)
        name, data = "STDIN", sys.stdin.buffer.read()
        if not data:
            raise WrongUsage("nothing to run: name a script, or put a command after --, as in: "
                             "qsub -l walltime=1:00:00 -- java -jar job.jar 169")  # fmt: skip
    else:
        name = os.path.basename(path)
        try:
            data = read_file(path)
        except JobrunnerError as error:
            raise WrongUsage(
                f"{error}; if it is a command and no script, put it after --: qsub -- {path} ..."
            ) from None
    if b"\0" in data:
        raise WrongUsage(f"{path} is no text in UTF-8; if it is a program, put it after --: qsub -- {path} ...")
    return name, data.decode("utf-8", "surrogateescape")


def read_lines(path: str) -> List[str]:
    """The lines of a file (`-`: standard input) that are not blank."""
    data = sys.stdin.buffer.read() if path == "-" else read_file(path)
    lines = data.decode("utf-8-sig", "surrogateescape").split("\n")
    return [line.rstrip("\r") for line in lines if line.strip()]


def with_items(given: Record) -> Record:
    """What was given, its -V, --each-line and --sweep carried out; raises WrongUsage."""
    given = dict(given)
    if given.pop("environ", False):
        # "=C:" and the like are Windows' own; folders for temporary files are the job's own; the token is nobody's
        left_out = ("TMPDIR", *(("TEMP", "TMP") if WINDOWS else ()))
        environ = jobs_environ(os.environ)
        caller = {n: value for n, value in environ.items() if n and "=" not in n and n.upper() not in left_out}
        given["Env"] = {**caller, **given.get("Env", {})}
    lines, sweep = given.pop("each_line", None), given.pop("sweep", None)
    if lines is not None and sweep:
        raise WrongUsage("--each-line and --sweep are two arrays: give one of them")
    if lines is not None or sweep:
        given["Items"] = read_lines(lines) if lines is not None else sweep_items(sweep)
        if not given["Items"]:
            raise WrongUsage(f"--each-line: there is no line in {lines} to make a job of")
    limits = {"MaxRunSubjobs": "max_run_subjobs", "MaxFails": "max_fails"}
    for key in limits if not {"Array", "Items"} & set(given) else ():
        if key in given:
            raise WrongUsage(f"{limits[key]} is for arrays, and this is none: give -J, -t, --each-line or --sweep too")
    return given


def sent(given: Record) -> Record:
    """The keys that are for the server; those that begin small are for the command itself."""
    return {key: value for key, value in given.items() if key[0].isupper()}


# ---------------------------------------------------------------------------------------------------------------------
# What qmgr understands
# ---------------------------------------------------------------------------------------------------------------------


class Attribute(NamedTuple):
    """What qmgr can set: its key for the server, text -> value, value -> text, and what it is when unset."""

    key: str
    parse: Callable[[str], Any]
    show: Callable[[Any], Any]
    unset: Any


def _parse_max_run(text: str) -> int:
    """`10`, or as PBS Pro writes it `[o:PBS_ALL=10]`."""
    limit = re.match(r"\[o:PBS_ALL=(\d+)\]\Z", text)
    return _parse_limit(limit.group(1) if limit else text)


QUEUE_ATTRIBUTES = {
    "Priority": Attribute("Priority", _parse_priority, int, 0),
    "max_run": Attribute("MaxRun", _parse_max_run, int, 0),
    "resources_default.walltime": Attribute("DefaultWalltime", parse_duration, format_duration, 0),
    "resources_max.walltime": Attribute("MaxWalltime", parse_duration, format_duration, 0),
    "enabled": Attribute("Enabled", _parse_bool, str, True),
    "started": Attribute("Started", _parse_bool, str, True),
}
_ATTRIBUTES_BY_LOWER_NAME = {name.lower(): attribute for name, attribute in QUEUE_ATTRIBUTES.items()}
_ALIASES = {"max_running": "max_run"}  # Torque's


class QmgrCommand(NamedTuple):
    """One command of qmgr: verb, names of queues (none: all), attributes as the server takes them."""

    verb: str
    names: List[str]
    attributes: Record


_QMGR = ("create", "delete", "set", "unset", "list", "print")


def parse_qmgr(text: str) -> QmgrCommand:
    """What `set queue long max_run = 10, enabled = true` says; words may be as short as in PBS (`s q long ...`); raises
    BadRequest."""
    words = re.match(r"\s*(\w+)\s+(\w+)\s*(?:([@\w.,-]+)\s*)?(.*?)\s*\Z", text, re.DOTALL)
    verb, thing, names, rest = words.groups() if words else ("", "", "", "")
    found = [known for known in _QMGR if verb and known.startswith(verb.lower())]
    if len(found) != 1:
        raise BadRequest(f"qmgr knows no {text.strip()!r}: write {', '.join(_QMGR)}, then queue and its name")
    verb = found[0]
    everything = verb == "print" and "server".startswith(thing.lower())
    if not everything and not (thing and "queues".startswith(thing.lower())):
        raise BadRequest(f"qmgr {verb} knows no {thing!r}: here are queues only, as in: {verb} queue long")
    queues = [name for name in (names or "").split(",") if name and name != "@default"] if not everything else []
    if not queues and verb not in ("list", "print"):
        raise BadRequest(f"qmgr {verb} queue: say which, as in: {verb} queue long")
    return QmgrCommand(verb, queues, parse_queue_attributes(verb, rest))


def parse_queue_attributes(verb: str, text: str) -> Record:
    """{"MaxRun": 10} of `max_run = 10`, several with commas, or of `max_run` alone to unset it; raises BadRequest."""
    attributes: Record = {}
    shape = re.compile(r"\s*([\w.]+)\s*\Z" if verb == "unset" else r"\s*([\w.]+)\s*=\s*\"?(\S.*?)\"?\s*\Z", re.DOTALL)
    words = split_quoted(text)
    for word in words:
        found = shape.match(word)
        if not found or verb not in ("create", "set", "unset"):
            how = "its name" if verb == "unset" else "NAME = VALUE"
            raise BadRequest(f"qmgr {verb}: {word.strip()!r} cannot be done; an attribute is written as {how}")
        name = _ALIASES.get(found.group(1).lower(), found.group(1).lower())
        if name == "queue_type" and (verb == "unset" or found.group(2).lower() in ("e", "execution")):
            continue  # the only type there is, and what everybody writes
        known = _ATTRIBUTES_BY_LOWER_NAME.get(name)
        if known is None:
            raise BadRequest(f"a queue has no {name}: its attributes are {', '.join(QUEUE_ATTRIBUTES)}")
        attributes[known.key] = known.unset if verb == "unset" else _named(name, known.parse, found.group(2))
    if not words and verb in ("set", "unset"):
        raise BadRequest(f"qmgr {verb} queue: say what, as in: {verb} queue long max_run{' = 10' * (verb == 'set')}")
    return attributes


def qmgr_commands(text: str) -> Iterator[Tuple[int, str]]:
    """(number of the line, command) in what qmgr reads: a command a line, or several with `;`; # begins a comment."""
    for at, line in enumerate(text.split("\n"), 1):
        if line.strip().lower() in ("exit", "quit"):
            return
        if not line.lstrip().startswith("#"):
            yield from ((at, command.strip()) for command in line.split(";") if command.strip())


def qmgr_print(queue: Record) -> List[str]:
    """The commands that make a queue what it is, for qmgr to read again."""
    name = queue["Name"]
    lines = ["#", f"# Create queue {name}", "#"]
    lines += [f"create queue {name}", f"set queue {name} queue_type = Execution"] if name != "default" else []
    for attribute, known in QUEUE_ATTRIBUTES.items():
        if queue[known.key] != known.unset or known.unset is True:
            lines.append(f"set queue {name} {attribute} = {known.show(queue[known.key])}")
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# Listings: columns, `name = value`, and JSON, laid out as OpenPBS does
# ---------------------------------------------------------------------------------------------------------------------


def _out(text: str, flush: bool = False) -> None:
    """Prints a line whatever it holds: a console that cannot show a character shows its escape."""
    try:
        print(text, flush=flush)
    except UnicodeEncodeError:
        encoding = sys.stdout.encoding or "ascii"
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=flush)


def _printable(text: str) -> str:
    """A text that stays in its line."""
    return text if text.isprintable() else "".join(char if char.isprintable() else "?" for char in text)


def _column(text: str, width: int) -> str:
    """A text as one word of a table, so that the columns can be told by blanks: programs read them so."""
    return _printable(text).replace(" ", "_")[:width] or "-"  # any other white space is not printable


class Column(NamedTuple):
    """A column of a table; one that grows is as wide as what is in it, the others cut it off."""

    title: str
    width: int
    value: Callable[[Record], Any]
    right: bool = False
    grows: bool = False


def _is_array(job: Record) -> bool:
    """True for the entry of an array; not told by its keys, which any record may have."""
    return job.get("Label", "").endswith("[]")


def _user(job: Record) -> str:
    return job.get("Owner", "").split("@")[0]


def _memory(size: int) -> str:
    """A size in few characters: `4gb`, or `1500kb`."""
    for unit in ("tb", "gb", "mb"):
        if size and size % _SIZE_UNITS[unit] == 0:
            return f"{size // _SIZE_UNITS[unit]}{unit}"
    return _kilobytes(size)


def _kilobytes(size: int) -> str:
    return f"{-(-size // 1024)}kb"


def _hours(seconds: Optional[float]) -> str:
    return format_duration(seconds)[:-3] if seconds else "--"


# `qstat`.  The state must stay the fifth word: programs read it there.
JOB_COLUMNS = (
    Column("Job id", 16, lambda job: job["Label"], grows=True),
    Column("Name", 16, lambda job: job["Name"]),
    Column("User", 16, _user),
    Column("Time Use", 8, lambda job: format_duration(job.get("CpuTimeUsed") or 0), right=True, grows=True),
    Column("S", 1, lambda job: job["State"]),
    Column("Queue", 5, lambda job: job["Queue"][:32], grows=True),
)
# `qstat -a`, and with it -n, -s, -u, -r and -i.
WIDE_COLUMNS = (
    Column("Job ID", 15, lambda job: job["Label"], grows=True),
    Column("Username", 8, _user),
    Column("Queue", 8, lambda job: job["Queue"]),
    Column("Jobname", 10, lambda job: job["Name"]),
    Column("SessID", 6, lambda job: "--", right=True),
    Column("NDS", 3, lambda job: 1, right=True),
    Column("TSK", 3, lambda job: job.get("Ncpus", 1), right=True, grows=True),
    Column("Memory", 6, lambda job: _memory(job["Memory"]) if job.get("Memory") else "--", right=True, grows=True),
    Column("Time", 5, lambda job: _hours(job["Runtime"]), right=True, grows=True),
    Column("S", 1, lambda job: job["State"]),
    Column("Elapsed", 7, lambda job: _hours(_seconds_run(job)), right=True, grows=True),
)


def _in_states(title: str, *letters: str) -> Column:
    """How many jobs of a queue are in some states."""
    return Column(title, 5, lambda queue: sum(queue["States"][letter] for letter in letters), right=True, grows=True)


_TOTAL = _in_states("Tot", "Q", "H", "W", "R")
_STATES = (_in_states("Que", "Q"), _in_states("Run", "R"), _in_states("Hld", "H"), _in_states("Wat", "W"))
_NOT_HERE = (Column("Trn", 5, lambda queue: 0, right=True), Column("Ext", 5, lambda queue: 0, right=True))
QUEUE_COLUMNS = (
    Column("Queue", 16, lambda queue: queue["Name"], grows=True),
    Column("Max", 5, lambda queue: queue["MaxRun"], right=True, grows=True),
    _TOTAL,
    Column("Ena", 3, lambda queue: "yes" if queue["Enabled"] else "no", right=True),
    Column("Str", 3, lambda queue: "yes" if queue["Started"] else "no", right=True),
    *_STATES,
    *_NOT_HERE,
    Column("Type", 4, lambda queue: "Exec"),
)
SERVER_COLUMNS = (
    Column("Server", 16, lambda server: server["Name"], grows=True),
    Column("Max", 5, lambda server: 0, right=True),
    _TOTAL,
    *_STATES,
    *_NOT_HERE,
    Column("Status", 11, lambda server: "Active"),
)


def table(
    columns: Sequence[Column],
    things: List[Record],
    notes: Callable[[Record], List[str]] = lambda _: [],
    beside: bool = False,
) -> List[str]:
    """The lines of a table: two of head, one for each thing, and below it, or beside it, its notes."""
    rows = [
        [_column(str(column.value(thing)), 250 if column.grows else column.width) for column in columns]
        for thing in things
    ]
    widths = [
        max([column.width, *(len(row[at]) for row in rows)]) if column.grows else column.width
        for at, column in enumerate(columns)
    ]

    def line(words: Sequence[str]) -> str:
        aligned = (w.rjust(n) if column.right else w.ljust(n) for w, n, column in zip(words, widths, columns))
        return " ".join(aligned).rstrip()

    lines = [line([column.title for column in columns]), " ".join("-" * width for width in widths)]
    for thing, row in zip(things, rows):
        noted = [f"   {_printable(note)}" for note in notes(thing)]
        lines += ["".join([line(row), *noted])] if beside else [line(row), *noted]
    return lines


def full(head: str, fields: Record, indent: str = "    ") -> List[str]:
    """The lines of `-f`: a head, `name = value` for each field, and a blank one."""
    lines = [head]
    for key, value in fields.items():
        for name, text in ((f"{key}.{k}", v) for k, v in value.items()) if isinstance(value, dict) else [(key, value)]:
            words = " ".join(map(str, text)) if isinstance(text, list) else str(text)
            lines.append(indent + _printable(f"{name} = {words}"))
    return [*lines, ""]


def document(api: ServerApi, key: str, things: Any) -> str:
    """One of OpenPBS's JSON documents."""
    head = {"timestamp": int(time.time()), "pbs_version": f"jobrunner {VERSION}", "pbs_server": _host(api)}
    return json.dumps({**head, key: things}, indent=4)


def _host(api: ServerApi) -> Optional[str]:
    from urllib.parse import urlsplit

    return urlsplit(api.url).hostname


def pbs_job(job: Record) -> Record:
    """A job or array as OpenPBS lists it with `qstat -f -F json`, and what is only ours under the record's own keys."""
    started, over = job.get("StartTime"), job["State"] == "F"
    fields = {
        "Job_Name": job["Name"],
        "Job_Owner": job.get("Owner"),
        "job_state": job["State"],
        "queue": job["Queue"],
        "Priority": job["Priority"],
        "Resource_List": pbs_limits(job),
        "resources_used": _pbs_used(job) if started else None,
        "exec_host": job.get("Host") if started else None,
        "Exit_status": _exit_status(job) if over else None,
        "Status": job.get("Status"),
        "comment": _comment(job),
        "run_count": job.get("RunCount", 0),
        "ctime": _pbs_time(job.get("SubmitTime")),
        "qtime": _pbs_time(job.get("SubmitTime")),
        "etime": _pbs_time(job.get("QueueTime") or job.get("SubmitTime")) if job["State"] not in "HW" else None,
        "stime": _pbs_time(started),
        "obittime": _pbs_time(job.get("EndTime")),
        "mtime": _pbs_time(max(filter(None, map(job.get, _TIMES)), key=parse_time, default=None)),
        "Execution_Time": _pbs_time(job.get("StartAfter")),
        "Hold_Types": ("u" if job.get("Hold") else "") + ("s" if job.get("Depend") else "") or "n",
        "depend": ",".join(job.get("Depend", [])) or None,
        "Rerunable": str(job.get("Rerunable", True)),
        "retry": job.get("Retries"),
        "Submit_arguments": job["Params"],
        "Variable_List": job.get("Env"),
        "Shell_Path_List": job.get("Shell"),
        "Join_Path": job.get("Join"),
        "Output_Path": job.get("StdOut"),
        "Error_Path": job.get("StdErr"),
        **{name: job.get(key) for name, key in _ONLY_KEPT.items()},
        **_pbs_array(job),
        "ID": job["ID"],
    }
    return _known(fields)


_TIMES = ("SubmitTime", "QueueTime", "StartTime", "EndTime")
# What qsub takes and nothing here acts on: OpenPBS's name, key of the record.
_ONLY_KEPT = {
    "Account_Name": "Account",
    "project": "Project",
    "Mail_Points": "MailPoints",
    "Mail_Users": "MailUsers",
    "Keep_Files": "KeepFiles",
    "umask": "Umask",
    "group_list": "GroupList",
}


def pbs_limits(job: Record) -> Record:
    """What a job asks for, as Resource_List has it."""
    words = job.get("Requires", [])
    hosts = [word[len("host=") :] for word in words if word.startswith("host=")]
    limits = {
        "walltime": format_duration(job["Runtime"]) if job["Runtime"] else None,
        "mem": _kilobytes(job["Memory"]) if job.get("Memory") else None,
        "cput": format_duration(job["CpuTime"]) if job.get("CpuTime") else None,
        "ncpus": job.get("Ncpus", 1),
        "host": ",".join(hosts) or None,
        "properties": ",".join(word for word in words if not word.startswith("host=")) or None,
        "place": job.get("Place"),
    }
    return _known(limits)


def _pbs_used(job: Record) -> Record:
    seconds = _seconds_run(job)
    used = {
        "walltime": format_duration(seconds) if seconds is not None else None,
        "cput": format_duration(job["CpuTimeUsed"]) if job.get("CpuTimeUsed") else None,
        "mem": _kilobytes(job["MaxMem"]) if job.get("MaxMem") else None,
    }
    return _known(used)


def _seconds_run(job: Record) -> Optional[float]:
    """How long the latest run took, or has taken."""
    started, ended = job.get("StartTime"), job.get("EndTime")
    if not started or not (ended or job["State"] == "R"):
        return None
    return max(0, (parse_time(ended) if ended else time.time()) - parse_time(started))


def _pbs_array(job: Record) -> Record:
    """What an array has more than a job, or a subjob."""
    if job.get("Index") is not None:
        return {"array_id": f"{job['Number']}[]", "array_index": str(job["Index"])}
    if not _is_array(job):
        return {}
    states, statuses = job["States"], {status: n for status, n in job["Statuses"].items() if n}
    queued = states["Q"] + states["H"] + states["W"]
    return {
        "array": "True",
        "array_state_count": f"Queued:{queued} Running:{states['R']} Exiting:0 Expired:{states['F']} ",
        "array_indices_submitted": job["Array"],
        "max_run_subjobs": job.get("MaxRunSubjobs") or None,
        "max_fails": job.get("MaxFails") or None,
        "Statuses": statuses or None,
    }


def _exit_status(job: Record) -> Optional[int]:
    """A finished job's exit status; an array's is 0 if all its subjobs finished, else 1; that of one that was deleted
    without being run or waited for is as if it had been killed, as in OpenPBS: without one, programs think all is well."""
    if _is_array(job):
        return shell_code(job)
    deleted = job.get("Status") == "deleted" and job.get("ExitStatus") is None
    return EXIT_SIGNALLED + 9 if deleted else job.get("ExitStatus")


def _comment(job: Record) -> str:
    """Why the job is where it is, always something: PSI/J asks for it unseen.  Its Comment, or else what PBS says, and
    of one that failed what its exit status says in words."""
    words = job.get("Comment")
    if words:
        return words
    if _is_array(job):
        states = [(STATE_WORDS[letter], count) for letter, count in job["States"].items() if letter != "F"]
        return ", ".join(f"{count} {word}" for word, count in [*states, *job["Statuses"].items()] if count)
    if job["State"] == "F" and job.get("Status") not in (None, "finished"):
        return f"{job['Status']}: exit status {exit_words(job.get('ExitStatus'))}"
    if job.get("StartTime") and job["State"] in "RF":
        ran = f"Job run at {_pbs_time(job['StartTime'])} on ({job.get('Host')})"
        return ran + (" and finished" if job["State"] == "F" else "")
    return STATE_WORDS[job["State"]]


STATE_WORDS = {**{state.value: state.name.lower() for state in State}, "B": "begun"}


def _known(fields: Record) -> Record:
    return {key: value for key, value in fields.items() if value is not None}


def _pbs_time(text: Optional[str]) -> Optional[str]:
    """`Mon Nov 23 17:27:00 2026`, local time."""
    return time.asctime(local_time(parse_time(text))) if text else None


def history(job: Record, moment: float) -> List[Tuple[float, str]]:
    """(when, sentence) of what happened to a job: its latest run too, which is not in its History yet, and at `moment`
    why it is not over."""
    by = f" by {job['Owner']}" if job.get("Owner") else ""
    lines = [(job.get("SubmitTime"), f"queued{by}, named {job['Name']}"), *job.get("History", [])]
    over = job["State"] == "F"
    if job.get("StartTime") and job["State"] in "RF":
        lines.append((job["StartTime"], f"leased by {job.get('Host')}, run {job.get('RunCount', 1)}"))
    if over and job.get("EndTime"):
        words = f": {job['Comment']}" if job.get("Comment") else ""
        lines.append((job["EndTime"], f"{job['Status']}, exit status {exit_words(job.get('ExitStatus'))}{words}"))
    shown = sorted([(parse_time(when), words) for when, words in lines if when], key=lambda line: line[0])
    return shown if over else [*shown, (moment, f"{STATE_WORDS[job['State']]}: {_comment(job)}")]


def pbs_node(node: Record) -> Record:
    """A client as pbsnodes lists it."""
    info = node["Info"]
    fields = {
        "state": node["State"],
        "resources_available.ncpus": node["Slots"],
        "resources_assigned.ncpus": node["Running"],
        "properties": ",".join(node["Properties"]),
        "jobs": ", ".join(node["Jobs"]),
        "last_used_time": node["LastSeen"],
        "version": info.get("Version", "the original's" if node["Original"] else ""),
        "comment": node.get("Comment") or None,
        "drain": "True" if node.get("Drain") else None,
    }
    return _known(fields)


def _state_count(states: Dict[str, int]) -> str:
    letters = {"Queued": "Q", "Held": "H", "Waiting": "W", "Running": "R"}
    return (
        "Transit:0 " + " ".join(f"{word}:{states[letter]}" for word, letter in letters.items()) + " Exiting:0 Begun:0"
    )


def pbs_queue(queue: Record) -> Record:
    """A queue as OpenPBS lists it: what qmgr can set, and how many jobs are in it."""
    states = queue["States"]
    counts = {"total_jobs": sum(states.values()) - states["F"], "state_count": _state_count(states)}
    fields: Record = {"queue_type": "Execution", **counts}
    for name, attribute in QUEUE_ATTRIBUTES.items():
        value = queue.get(attribute.key)
        if value or isinstance(value, bool):
            outer, _, inner = name.partition(".")
            fields[outer] = {inner: attribute.show(value)} if inner else attribute.show(value)
    return fields


def pbs_server(status: Record) -> Record:
    """The server as OpenPBS lists it."""
    states = status["States"]
    return {
        "server_state": "Active",
        "default_queue": "default",
        "total_jobs": status["Jobs"],
        "state_count": _state_count(states),
        "pbs_version": f"jobrunner {status['Version']}",
    }


# ---------------------------------------------------------------------------------------------------------------------
# What the commands share: jobs by name and by selection
# ---------------------------------------------------------------------------------------------------------------------

UNKNOWN_JOB = 153  # PBS's exit code for it
Jobs = List[Record]


def _all_jobs(api: ServerApi, **query: Any) -> Jobs:
    """Every job that /jobs finds.  At once: between two pages jobs may change so that others are passed over."""
    return api.call("/jobs", query={**query, "limit": 10**9}, timeout=600)["Jobs"]


def _ask(api: ServerApi, *call: Any, **query: Any) -> Any:
    """An answer about jobs that were named; raises UnknownJob if there is none of a name."""
    try:
        return api.call(*call, **query)
    except ServerRefused as error:
        if error.status != 404:
            raise
        raise UnknownJob(str(error)) from None


def _job(api: ServerApi, name: str) -> Record:
    return _ask(api, "/job", query={"id": name})


_RANGE = re.compile(r"(\d+)\[(\d*[,:-][\d,:-]*)\]", re.ASCII)


def _jobs_named(api: ServerApi, name: str, subjobs: bool) -> Jobs:
    """The jobs of a name: one job or array, the subjobs of `17[1-9]`, and if they are wanted those of an array; raises
    UnknownJob, BadRequest."""
    words = _RANGE.match(name)
    if words:
        ranges = parse_ranges(words.group(2))
        found = [j for j in _all_jobs(api, number=words.group(1)) if any(j.get("Index") in r for r in ranges)]
        if not found:
            raise UnknownJob(f"there is no job {name}: qstat -x lists all there are")
        return found
    job = _job(api, name)
    return _all_jobs(api, number=job["Number"]) if subjobs and _is_array(job) else [job]


def _select(options: argparse.Namespace) -> Dict[str, str]:
    """What --name, --status and so on ask for, as the server takes it."""
    return {key: getattr(options, name) for name, key, _ in SELECTIONS if getattr(options, name) is not None}


def _change(api: ServerApi, path: str, names: List[str], select: Dict[str, str], **more: Any) -> Jobs:
    """Has the server change the jobs of these names, and those selected; says of one that runs what it waits for."""
    if not names and not select:
        raise WrongUsage(
            "say which jobs: their numbers, or what they have in common, as in --name sweep --status failed"
        )
    call = _ask if names else ServerApi.call
    jobs = call(api, path, {"IDs": names, "Select": select, **more}, timeout=600)["Jobs"]
    for job in jobs:
        waits = job["State"] == "R" and job.get("Signal") and path in ("/delete", "/rerun")
        if waits or (job["State"] == "F" and path == "/rerun"):  # at once: its dependency can still not be met
            print(_printable(f"job {job['Label']}: {job['Comment']}"), file=sys.stderr)
    return jobs


def shell_code(job: Record) -> int:
    """A finished job's exit status as a program's exit code: 0 only if it finished; 1 where a shell has no number, and
    for an array of which not all did."""
    if _is_array(job):
        return 0 if job["Statuses"]["finished"] == job["Count"] else 1
    if job.get("Status") == "finished":
        return 0
    exit_status = job.get("ExitStatus")
    return exit_status if isinstance(exit_status, int) and 0 < exit_status < 256 else 1


# ---------------------------------------------------------------------------------------------------------------------
# The commands
# ---------------------------------------------------------------------------------------------------------------------


def qsub(options: argparse.Namespace, api: ServerApi) -> int:
    """Queues a job, an array, or with --file many; prints the numbers."""
    import gc

    gc.disable()  # of a hundred thousand records none is garbage before the end, and looking takes a fifth of the time
    given, jobs = _to_submit(options.given, options.words)
    added = api.call("/add", jobs, timeout=600)
    if not given.get("quiet"):
        sys.stdout.write("".join(f"{entry['Number']}{'[]' if entry.get('Array') else ''}\n" for entry in added))
        sys.stdout.flush()
    return _wait_for(api, [entry["ID"] for entry in added]) if given.get("block") else 0


def _to_submit(given: Record, words: List[str]) -> Tuple[Record, Jobs]:
    """(what was given, in a script too; the records to add).  The words are a script and its arguments, or `--` and a
    command; raises WrongUsage, BadRequest."""
    if given.get("file"):
        if words:
            raise WrongUsage("give either --file or something to run, not both")
        job = {"Owner": owner(), **sent(with_items(given))}
        return given, [{**job, **line} if isinstance(line, dict) else line for line in read_jobs(given["file"])]
    if words[:1] == ["--"]:
        if not words[1:]:
            raise WrongUsage("nothing to run: put the command after --, as in: qsub -- java -jar job.jar 169")
        given = {**given, "Params": words[1:]}
    else:
        name, text = read_script(words[0] if words else "-")
        try:
            given = merged(script_options(text, given.get("prefix", "#PBS")), given)
        except BadRequest as error:
            raise BadRequest(f"{name} {error}") from None
        given = {**given, "Script": text, "ScriptName": name, "Params": [name, *words[1:]]}
    return given, [{"Owner": owner(), **_submit_dir(), **sent(with_items(given))}]


def _submit_dir() -> Record:
    try:
        return {"SubmitDir": os.getcwd()}
    except OSError:  # it has been removed
        return {}


def _wait_for(api: ServerApi, names: List[str], seconds: float = float("inf")) -> int:
    """Waits until the jobs are over; the exit code is the first one's that is not 0, as a shell would see it."""
    deadline, code = time.monotonic() + seconds, 0
    for name in names:
        while True:
            left = deadline - time.monotonic()
            try:
                job = _ask(api, "/job", query={"id": name, "wait": -int(-min(50, max(0, left)) // 1)}, timeout=90)
            except (ServerAway, ServerRefused) as error:
                if error.status != 503 or left <= 0 or isinstance(error, NotTrusted):  # 503: it stops, or has no room
                    raise
                _warn(f"{error}; waiting for it")
                time.sleep(min(5, left))
                continue
            if job["State"] == "F":
                break
            if left <= 0:
                raise JobrunnerError(f"job {name} is not over yet: it is {job['State']}")
        code = code or shell_code(job)
    return code


def qwait(options: argparse.Namespace, api: ServerApi) -> int:
    """Waits until jobs are over, and exits with their status."""
    names: List[str] = []
    for name in options.jobs:  # of a range, each
        names += [job["ID"] for job in _jobs_named(api, name, subjobs=False)] if _RANGE.match(name) else [name]
    return _wait_for(api, names, options.timeout if options.timeout is not None else float("inf"))


def qdel(options: argparse.Namespace, api: ServerApi) -> int:
    """Deletes jobs, each for itself as in PBS: at once if it waits, through its client if it runs."""
    names, select, force = options.jobs, _select(options), options.W == "force"
    if names == ["all"]:
        raise WrongUsage(
            "say whose: `qdel --owner NAME` deletes all of NAME's jobs, `qdel --state Q,H,W,R` everybody's"
        )
    if select or not names:
        _change(api, "/delete", [], select, Force=force)
    try:
        if names:
            _change(api, "/delete", names, {}, Force=force)
        return 0
    except (UnknownJob, ServerRefused) as error:
        return _delete_each(api, names, force) if len(names) > 1 else _not_deleted(error)


def _delete_each(api: ServerApi, names: List[str], force: bool) -> int:
    """One of the names cannot be deleted, and the server takes all or none."""
    code = 0
    for name in names:
        try:
            _change(api, "/delete", [name], {}, Force=force)
        except (UnknownJob, ServerRefused) as error:
            code = max(code, _not_deleted(error))
    return code


def _not_deleted(error: JobrunnerError) -> int:
    """Says so; the exit code: one that is over already is as good as deleted, and programs take another code for a
    failure of theirs."""
    if not isinstance(error, UnknownJob) and error.status != BadState.status:
        raise error
    print(_error_line(error), file=sys.stderr)
    return UNKNOWN_JOB if isinstance(error, UnknownJob) else 0


def qhold(options: argparse.Namespace, api: ServerApi) -> int:
    """Keeps waiting jobs from being run."""
    _change(api, "/hold", options.jobs, _select(options))
    return 0


def qrls(options: argparse.Namespace, api: ServerApi) -> int:
    """Lets held jobs run."""
    _change(api, "/release", options.jobs, _select(options))
    return 0


def qrerun(options: argparse.Namespace, api: ServerApi) -> int:
    """Queues jobs again that are over, or run: those are ended first."""
    _change(api, "/rerun", options.jobs, _select(options))
    return 0


def qmove(options: argparse.Namespace, api: ServerApi) -> int:
    """Puts waiting jobs into another queue."""
    _change(api, "/move", options.jobs, _select(options), Queue=options.destination)
    return 0


def qalter(options: argparse.Namespace, api: ServerApi) -> int:
    """Changes what qsub said of jobs; of those that run only -l walltime, cput and mem, and -p."""
    given, names = options.given, options.words
    if not sent(given):
        raise WrongUsage("say what to alter, as in: qalter -l walltime=2:00:00 17")
    _change(api, "/alter", names, given.get("select", {}), Set=sent(given))
    return 0


def qselect(options: argparse.Namespace, api: ServerApi) -> int:
    """Prints the names of the jobs that were selected, for other commands: those that are not over, with -x all."""
    query = {key.lower(): text for key, text in _select(options).items()}
    if not (options.x or options.status or options.state):
        query["state"] = "Q,H,W,R"
    if options.J:
        query["subjobs"] = "0"
    labels = [job["Label"] for job in _all_jobs(api, fields="Label", **query)]
    if options.F == "json":
        _out(document(api, "Jobs", labels))
    elif labels:
        _out("\n".join(labels))
    return 0


def tracejob(options: argparse.Namespace, api: ServerApi) -> int:
    """Prints what happened to a job, and when: queued, leased, ended, each run."""
    jobs = [job for name in options.jobs for job in _jobs_named(api, name, subjobs=False)]
    told = {job["Label"]: history(job, now()) for job in jobs}
    if options.F == "json":
        lines = {label: [{"time": format_time(when), "event": words} for when, words in told[label]] for label in told}
        _out(document(api, "Jobs", {label: {"history": lines[label]} for label in lines}))
        return 0
    for label, events in told.items():
        _out(f"Job: {label}\n")
        for when, words in events:
            _out(f"{time.strftime('%m/%d/%Y %H:%M:%S', local_time(when))}  {_printable(words)}")
        _out("")
    return 0


def qcat(options: argparse.Namespace, api: ServerApi) -> int:
    """Prints the last 64 KiB of what a job printed, or what it prints while it runs."""
    if options.f:
        return _follow(options, api)
    output = _ask(api, "/output", query={"id": options.job})
    text = output["StdErr" if options.e else "StdOut"]
    if not text and output["State"] != "F":
        where = f" on {output['Host']}" if output["State"] == "R" else ""
        state = STATE_WORDS[output["State"]]
        _warn(f"job {options.job} is {state}{where}: its output comes when it is over, or with qcat -f")
    _out_bytes(text)
    return 0


def _follow(options: argparse.Namespace, api: ServerApi) -> int:
    """Prints what a job prints until it is over, as its client sends it, beginning with the last 64 KiB there are."""
    key, other = ("StdErr", "err"), ("StdOut", "out")
    key, other = (key, other) if options.e else (other, key)
    asked: Record = {"id": options.job, "wait": 30, key[1]: 0, other[1]: 10**17, "run": 0}  # nothing of the other
    said, left_out, missed = "", 0, False
    while True:
        output, was_away = _next_output(api, asked)
        piece = output.get(key[0])
        missed = not piece and (missed or was_away)
        if output["State"] == "F" and not piece and not asked[key[1]]:  # it was over before anybody followed it
            _out_bytes(_ask(api, "/output", query={"id": options.job})[key[0]])
        if piece:
            again, skipped = output["Run"] != asked["run"], piece["At"] - asked[key[1]]
            if asked["run"] and again:
                _warn(f"job {options.job}: run {output['Run']} begins")
            elif asked["run"] and skipped > 0:
                left_out += skipped
            _out_bytes(piece["Text"])
            asked.update({key[1]: piece["Next"], "run": output["Run"]})
        if output["State"] == "F":
            if missed and asked[key[1]]:
                _warn(f"job {options.job} ended meanwhile: qcat {options.job} shows the end of its output")
            if left_out:
                words = f"{left_out} bytes left out, since it printed faster than could be sent"
                _warn(f"job {options.job}: {words}; all are in its file on {output['Host']}")
            return 0
        words = "" if output["State"] == "R" and not output["Original"] else STATE_WORDS[output["State"]]
        if output["Original"]:
            words += f" on {output['Host']}, an original client, which sends its output at the end at the earliest"
        if words and words != said:
            _warn(f"job {options.job} is {words}")
        said = words


def _next_output(api: ServerApi, asked: Record) -> Tuple[Record, bool]:
    """What there is to print, and whether the server was away meanwhile; raises ServerAway if it is from the beginning."""
    was_away = False
    while True:
        try:
            return _ask(api, "/output", query=asked, timeout=90), was_away
        except (ServerAway, ServerRefused) as error:
            if error.status != 503 or not asked["run"] or isinstance(error, NotTrusted):
                raise
            _warn(f"{error}; waiting for it")
            was_away = True
            time.sleep(2)


def _out_bytes(text: str) -> None:
    """Prints a job's output to the byte."""
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape"))
    sys.stdout.buffer.flush()


# What Torque's `pbsnodes -l STATE` may say, and the states that are meant.
NODE_STATES = {state: (state,) for state in ("free", "job-busy", "busy", "offline", "down")}
NODE_STATES.update(up=("free", "job-busy"), active=("job-busy",), all=tuple(NODE_STATES))


def pbsnodes(options: argparse.Namespace, api: ServerApi) -> int:
    """Lists the clients; takes some out of use, or returns them."""
    if options.action:
        if not options.hosts:
            raise WrongUsage("say which hosts, as in: pbsnodes -o pc7 -C 'new disk'")
        api.call("/node", {"Hosts": options.hosts, "Action": options.action, "Comment": options.C or ""})
        return 0
    nodes = api.call("/nodes")["Nodes"]
    if options.l and options.hosts and set(options.hosts) <= NODE_STATES.keys():
        states = {state for word in options.hosts for state in NODE_STATES[word]}
        nodes, options.hosts, options.l = [node for node in nodes if node["State"] in states], [], "all"
    for host in options.hosts:
        if host not in {node["Host"] for node in nodes}:
            raise JobrunnerError(f"there is no client on {host}: pbsnodes lists those there are")
    nodes = [node for node in nodes if not options.hosts or node["Host"] in options.hosts]
    if options.F == "json":
        named: Record = {}
        for node in nodes:  # two clients of one name are two entries
            copy = sum(1 for other in named if other.split("#")[0] == node["Host"])
            named[f"{node['Host']}#{copy + 1}" if copy else node["Host"]] = pbs_node(node)
        _out(document(api, "nodes", named))
    elif options.l:
        for node in nodes:
            if options.l == "all" or node["State"] not in NODE_STATES["up"]:
                _out(f"{_column(node['Host'], 250):20} {node['State']:20} {_printable(node['Comment'])}".rstrip())
    else:
        for node in nodes:
            _out("\n".join(full(_printable(node["Host"]), pbs_node(node), indent="     ")))
    return 0


def qstat(options: argparse.Namespace, api: ServerApi) -> int:
    """Lists jobs: those that are not over, with -x all, or the ones named."""
    if options.Q:
        return _list_queues(options, api)
    if options.B:
        return _list_server(options, api)
    jobs, unknown = _listed(options, api)
    if options.F == "json":
        _out(document(api, "Jobs", {job["Label"]: pbs_job(job) for job in jobs}))
    elif options.f:
        for job in jobs:
            _out("\n".join(full(f"Job Id: {job['Label']}", pbs_job(job))))
    elif jobs:
        wide = options.a or options.n or options.s or options.u or options.i or options.r
        columns = WIDE_COLUMNS if wide else JOB_COLUMNS
        _out("\n".join(table(columns, jobs, lambda job: _notes(options, job), beside=options.beside)))
    for error in unknown:
        print(_error_line(error), file=sys.stderr)
    return UNKNOWN_JOB if unknown else 0


def _listed(options: argparse.Namespace, api: ServerApi) -> Tuple[Jobs, List[UnknownJob]]:
    """(the jobs qstat is to list, an error for each name that is unknown)."""
    jobs: Jobs = []
    unknown = []
    for name in options.jobs:
        try:
            jobs += _jobs_named(api, name, subjobs=options.t)
        except UnknownJob as error:
            if name in {queue["Name"] for queue in api.call("/queues")["Queues"]}:
                jobs += _all_in(options, api, queue=name)
            else:
                unknown.append(error)
    if not options.jobs:
        jobs = _all_in(options, api)
    if options.J:
        jobs = [job for job in jobs if (job.get("Index") is not None if options.t else _is_array(job))]
    return jobs, unknown


def _all_in(options: argparse.Namespace, api: ServerApi, **where: str) -> Jobs:
    """The jobs that qstat lists where none is named; `where`: of those in a queue."""
    states = {} if options.x else {"state": "R" if options.r else "Q,H,W" if options.i else "Q,H,W,R"}
    owners = {"owner": options.u} if options.u else {}
    return _all_jobs(api, **states, **owners, **where, **({} if options.t else {"subjobs": 0}))


def _notes(options: argparse.Namespace, job: Record) -> List[str]:
    """What -n and -s say below a job's line."""
    host = job.get("Host") if job.get("StartTime") else None
    return ([host or "--"] if options.n else []) + ([_comment(job)] if options.s else [])


def _list_queues(options: argparse.Namespace, api: ServerApi) -> int:
    queues = _queues(api, options.jobs)
    if options.F == "json":
        _out(document(api, "Queue", {queue["Name"]: pbs_queue(queue) for queue in queues}))
    elif options.f:
        for queue in queues:
            _out("\n".join(full(f"Queue: {queue['Name']}", pbs_queue(queue))))
    else:
        _out("\n".join(table(QUEUE_COLUMNS, queues)))
    return 0


def _queues(api: ServerApi, names: List[str]) -> List[Record]:
    """The queues of these names, or all; raises BadRequest."""
    queues = {queue["Name"]: queue for queue in api.call("/queues")["Queues"]}
    for name in names:
        if name not in queues:
            raise BadRequest(f"there is no queue {name}: there are {', '.join(queues)}")
    return [queues[name] for name in names or queues]


def _list_server(options: argparse.Namespace, api: ServerApi) -> int:
    status = {**api.call("/status"), "Name": _host(api)}
    if options.F == "json":
        _out(document(api, "Server", {status["Name"]: pbs_server(status)}))
    elif options.f:
        _out("\n".join(full(f"Server: {status['Name']}", pbs_server(status))))
    else:
        _out("\n".join(table(SERVER_COLUMNS, [status])))
    return 0


def qmgr(options: argparse.Namespace, api: ServerApi) -> int:
    """Makes, changes and lists queues, as -c says, or standard input, a command a line: "create queue long", "set queue
    long max_run = 10"."""
    if options.c is not None:
        _manage(api, options.c)
        return 0
    for at, command in qmgr_commands(sys.stdin.read()):
        try:
            _manage(api, command)
        except (BadRequest, ServerRefused) as error:
            raise JobrunnerError(f"line {at}: {error}; what stands before it is done") from None
    return 0


def _manage(api: ServerApi, command: str) -> None:
    wish = parse_qmgr(command)
    if wish.verb in ("list", "print"):
        for queue in _queues(api, wish.names):
            shown = full(f"Queue {queue['Name']}", pbs_queue(queue)) if wish.verb == "list" else qmgr_print(queue)
            _out("\n".join(shown))
        return
    action = "set" if wish.verb == "unset" else wish.verb
    for name in wish.names:
        api.call("/queue", {"Name": name, "Action": action, "Set": wish.attributes})


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

    with tempfile.TemporaryDirectory(prefix="jobrunner-") as folder:  # nobody else can look into it
        return _run_in(
            options, os.path.abspath(options.db) if options.db else os.path.join(folder, "jobs.json"), folder
        )


def _run_in(options: argparse.Namespace, database: str, folder: str) -> int:
    """`run` with this database: what is in it already goes on where it was, else it begins with the file's jobs.  In
    the folder is what only the run itself may see."""
    begun = os.path.exists(database) or os.path.exists(database + ".journal")
    jobs = [] if begun and options.db else read_jobs(options.file)
    programs: List[Any] = []
    try:
        token = _new_token()
        api, server = _start_server(database, token, _tokens_file(folder, token))
        programs.append(server)
        if not api.call("/status")["Jobs"]:
            if begun and not jobs:
                jobs = read_jobs(options.file)
            if jobs:
                api.call("/add", jobs, timeout=600)
        programs.append(_start_client(options, database, api.url, token))
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


def _new_token() -> str:
    """As server.py --make-tokens makes them."""
    import base64

    return "jr_" + base64.urlsafe_b64encode(os.urandom(32)).rstrip(b"=").decode()


def _tokens_file(folder: str, token: str) -> str:
    """A file of the server's that lets this token in alone: other users of this machine reach the port, too."""
    import hashlib

    path = os.path.join(folder, "jobrunner.tokens")
    entry = {"Name": "run", "Role": "submit", "Sha256": hashlib.sha256(token.encode()).hexdigest()}
    with open(path, "wb", opener=_owners_only) as file:
        file.write(to_json({"Tokens": [entry]}))
    return path


def _start_server(database: str, token: str, tokens_file: str) -> Tuple[ServerApi, Any]:
    """A private server on a free port of this machine, and calls to it."""
    import subprocess

    command = [sys.executable, _beside("server.py"), "--port", "0", "--bind", "127.0.0.1", "--db", database]
    # jobs that cannot be started are to be tried one and all: it is the file that is wrong, not this machine
    command += ["--log-level", "warning", "--until-eof", "--token-file", tokens_file, "--offline-after", "0"]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **_own_group())
    line = server.stdout.readline().decode("utf-8", "replace")
    if " at http" not in line:
        server.wait()
        raise JobrunnerError("the server did not start: it says why above")
    return ServerApi(line.rsplit(" ", 1)[1].strip(), token=token), server


def _start_client(options: argparse.Namespace, database: str, url: str, token: str) -> Any:
    import subprocess

    slots = str(options.j or os.cpu_count() or 1)
    command = [sys.executable, _beside("client.py"), "--server", url, "--max-jobs", slots, "--until-empty"]
    command += ["--spool", database + ".spool", "--on-stop", "kill", "--kill-delay", "5", "--log-level", "error"]
    environ = {name: text for name, text in os.environ.items() if name not in TLS_VARIABLES}
    environ[TOKEN_VARIABLE] = token
    return subprocess.Popen(command + ["--until-eof"], stdin=subprocess.PIPE, env=environ, **_own_group())


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
    import subprocess

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
        except subprocess.TimeoutExpired:
            pass


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
    jobs = _all_jobs(api)
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
        words = _printable(job.get("Comment") or _last_line(api, job))
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


class _Lacking(argparse.Action):
    """An option that PBS has and is not here: using it is an error that says what to do instead."""

    def __init__(self, option_strings: List[str], dest: str, words: str):
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        self.words = words

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        parser.error(f"there is no option {self.option_strings[0]}: {self.words}")


class CommandParser(argparse.ArgumentParser):
    """argparse; but of the commands that take qsub's options it writes the help alone, and `read_options` reads them:
    argparse would take words of the job's for options."""

    table: Sequence[Option] = ()
    mixed = False  # options may stand behind other words, too

    def takes(self, options: Sequence[Option]) -> None:
        self.table = options
        for option in options:
            shape = {"metavar": option.value} if option.value else {"action": "store_true"}
            self.add_argument(
                option.flag, help=option.help.replace("%", "%%"), dest="_", default=argparse.SUPPRESS, **shape
            )

    def listing(self) -> None:
        self.add_argument("-F", choices=("json",), metavar="json", help="one JSON document, laid out as OpenPBS's")

    def flags(self, **helps: str) -> None:
        for letter, words in helps.items():
            self.add_argument(f"-{letter}", action="store_true", help=words)

    def lacks(self, **instead: str) -> None:
        """Options of PBS's that are not here, and what to do instead."""
        for letter, words in instead.items():
            self.add_argument(f"-{letter}", action=_Lacking, words=words)

    def ignores(self, *flags: str, **kind: Any) -> None:
        """Options of PBS's that would change nothing here."""
        for flag in flags:
            self.add_argument(flag, dest="_", help=argparse.SUPPRESS, **(kind or {"action": "store_true"}))

    def selecting(self, **short: str) -> None:
        """Options that say which jobs by what they have in common; `short` has one letter more for some."""
        for name, _, words in SELECTIONS:
            spellings = [f"-{short[name]}"] if name in short else []
            self.add_argument(*spellings, f"--{name}", dest=name, metavar=name.upper(), help=words)

    def named(self, count: str) -> None:
        words = "a number, 17[], 17[3], 17[1-9], an ID, or the beginning of one"
        self.add_argument("jobs", nargs=count, metavar="JOB", help=words)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Tuple[Any, List[str]]:
        if not self.table:
            options, strange = super().parse_known_args(args, namespace)
            if strange:  # said here, with this command's usage
                self.error(f"unrecognized arguments: {' '.join(strange)}")
            return options, strange
        try:
            given, words = read_options(args, self.table)
            names = []
            while words and self.mixed:
                names += words[:1] if words[0] != "--" else []
                given, words = read_options(words[1:], self.table, given)
            words = names if self.mixed else words
        except WrongUsage as error:
            self.error(str(error))
        if given.pop("help", False):
            self.print_help()
            self.exit()
        options, _ = super().parse_known_args([], namespace)
        for key in ("server", "proxy", "token_file", "tls_ca", "tls_fingerprint"):
            setattr(options, key, given.pop(key, None))
        options.given, options.words = given, words
        return options, []


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jobrunner.py", description="Submits jobs to a jobrunner server and looks after them, in PBS's words."
    )
    parser.add_argument("--version", action="version", version=f"jobrunner {VERSION}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=CommandParser)

    def command(
        function: Callable[..., int],
        *,
        remote: bool = True,
        options: Sequence[Option] = (),
        help_flags: Any = ("-h", "--help"),
    ) -> CommandParser:
        words = " ".join((function.__doc__ or "").split())
        sub = commands.add_parser(function.__name__, help=words, description=words, add_help=False)
        sub.set_defaults(function=function, parser=sub)
        sub.takes(options)
        if not options:
            sub.add_argument(*help_flags, action="help", help="this")
        if remote and not options:
            add_connection_options(sub, _CONNECTION[:-1])
        return sub

    for group in (_submitting, _listing, _changing, _looking, _managing):
        group(command)
    return parser


def _submitting(command: Callable[..., CommandParser]) -> None:
    """Those that run and submit."""
    sub = command(run, remote=False)
    sub.add_argument(
        "file", metavar="FILE", help="a database, a JSON list, or JSON Lines, one job each; -: standard input"
    )
    sub.add_argument("-j", type=argument(_parse_count), metavar="N", help="jobs at once (default: one per processor)")
    sub.add_argument("--db", metavar="F", help="keep the database here: stopped and run again, it goes on where it was")

    sub = command(qsub, options=QSUB_OPTIONS)
    what = ("-- COMMAND [ARGUMENT ...]", "[SCRIPT [ARGUMENT ...]]")
    sub.usage = "\n       ".join(f"jobrunner.py qsub [options] {words}" for words in what)
    sub.epilog = (
        "In an array {index}, {name}, {item} and the names of a sweep are replaced in the command, -v, -o and -e."
    )


def _listing(command: Callable[..., CommandParser]) -> None:
    """Those that list jobs."""
    sub = command(qstat)
    sub.named("*")
    sub.flags(f="everything about each", x="finished jobs too", t="subjobs, instead of a line for each array",
          J="arrays only (with -t: subjobs only)", a="in wide columns", n="and where they run", s="and why they do not",
          i="those that do not run", r="those that run", Q="queues instead", B="the server instead")  # fmt: skip
    sub.add_argument("-u", metavar="USER", help="jobs of this user (several: with commas)")
    sub.add_argument("-1", dest="beside", action="store_true", help="with -n and -s: in the job's own line")
    sub.add_argument("-q", dest="Q", action="store_true", help=argparse.SUPPRESS)
    sub.ignores("-w", "-e", "-E", "-G", "-M")
    sub.lacks(H="-x lists finished jobs too", T="-s says what each job waits for", p="-t lists subjobs, -f counts them")
    sub.listing()

    sub = command(qselect, help_flags=("--help",))
    sub.selecting(name="N", state="s", queue="q", owner="u")
    sub.lacks(h="--state H are the jobs that are held", l="`qstat -F json` has what each job asks for",
              t="`qstat -F json` has the times of each job")  # fmt: skip
    sub.flags(x="finished jobs too", J="arrays instead of their subjobs")
    sub.listing()


def _changing(command: Callable[..., CommandParser]) -> None:
    """Those that change jobs."""
    sub = command(qdel)
    sub.named("*")
    sub.selecting()
    sub.add_argument("-W", type=argument(_parse_deletion), metavar="force", help="forget at once one that runs: it is "
                     "not waited for")  # fmt: skip
    sub.add_argument("-p", dest="W", action="store_const", const="force", help="the same, as Torque spells it")
    sub.lacks(t=_INSTEAD["-t"], x="jobs that are over stay as long as the server's --keep-finished says")

    for function in (qhold, qrls):
        sub = command(function, help_flags=("--help",))
        sub.named("*")
        sub.selecting()
        sub.add_argument(
            "-h", metavar="u", type=argument(_parse_holds), help="as in PBS; there is one kind of hold here"
        )
        sub.lacks(t=_INSTEAD["-t"])

    sub = command(qrerun)
    sub.named("*")
    sub.selecting()

    sub = command(qmove)
    sub.add_argument("destination", metavar="QUEUE")
    sub.named("*")
    sub.selecting()

    sub = command(qalter, options=QALTER_OPTIONS)
    sub.mixed = True
    sub.usage = "jobrunner.py qalter [options] [JOB ...]"
    sub.epilog = "-v and -l properties replace what the job had."


def _parse_deletion(text: str) -> str:
    """What qdel's -W says: `force`, or PBS's suppress_email=N, which means nothing here; raises BadRequest."""
    if re.match(r"\d+\Z", text):
        raise BadRequest("the time from asking a job to end until it is killed is its client's: client.py --kill-delay")
    if text != "force" and not text.startswith("suppress_email="):
        raise BadRequest(f"there is no {text!r}: there is force")
    return text


def _parse_holds(text: str) -> str:
    if not re.match(r"[uosnp]+\Z", text):
        raise BadRequest(f"{text!r} is no hold: write u")
    return text


def _looking(command: Callable[..., CommandParser]) -> None:
    """Those that look at single jobs."""
    sub = command(tracejob)
    sub.named("+")
    sub.ignores("-n", type=int)  # days to look back: it knows all of them
    sub.listing()

    sub = command(qcat)
    sub.add_argument("job", metavar="JOB")
    sub.add_argument("-e", action="store_true", help="what it wrote to standard error")
    sub.add_argument("-f", action="store_true", help="follow it: print what it prints until it is over")

    sub = command(qwait)
    sub.named("+")
    sub.add_argument("--timeout", type=argument(parse_duration), metavar="TIME", help="give up after this time")


def _managing(command: Callable[..., CommandParser]) -> None:
    """Those that look after queues, clients and the server."""
    sub = command(qmgr)
    sub.add_argument("-c", metavar="COMMAND", help="create, set, unset, delete, list or print queue NAME; attributes: "
                     + ", ".join(QUEUE_ATTRIBUTES))  # fmt: skip

    sub = command(pbsnodes)
    sub.add_argument("hosts", nargs="*", metavar="HOST")
    for spellings, action, words in (
        (["-o"], "offline", "give these hosts no more jobs; those they have go on"),
        (["--drain"], "drain", "the same, and end their clients when these have no jobs any more"),
        (["-r", "-c"], "clear", "return these hosts"),
    ):
        sub.add_argument(*spellings, dest="action", action="store_const", const=action, help=words)
    sub.add_argument("-C", metavar="COMMENT", help="why, for whoever looks")
    sub.add_argument("-l", action="store_true", help="only those that are offline or down, a line each")
    sub.add_argument("-a", action="store_true", help="all, which is the default")
    sub.ignores("-v")
    sub.lacks(S="-l lists those that are out of use, a line each, `-l all` every one", N="-C says why, with -o",
              j="-l lists those that are out of use, `qstat -n` says where jobs run",
              x="-F json is for programs")  # fmt: skip
    sub.listing()
    command(qterm).ignores("-t", metavar="how")


def command_line(argv: List[str]) -> List[str]:
    """The words of the command line.  Started under the name qsub, qstat ... (a link, a copy), it is that command."""
    name = os.path.splitext(os.path.basename(argv[0]))[0].lower()
    words = ([name] if name in COMMANDS else []) + argv[1:]
    return words[1:] if words[1:] == ["--version"] else words


COMMANDS = frozenset(
    "qsub qstat qselect qdel qhold qrls qrerun qmove qalter tracejob qcat qwait qmgr pbsnodes qterm".split()
)


# PBS's commands that are not here: what to do instead.
_QUEUE_INSTEAD = 'qmgr -c "set queue long %s"'
_OTHER_COMMANDS = {
    "qsig": "jobs are sent no signals: qdel ends them, qhold keeps those that wait from running",
    "qmsg": "a running job cannot be told anything",
    "qorder": "qalter -p says which jobs go first",
    "qrun": "jobs start as soon as they can, and `qstat -s` says what they wait for; qalter -p says which go first",
    "qenable": _QUEUE_INSTEAD % "enabled = true",
    "qdisable": _QUEUE_INSTEAD % "enabled = false",
    "qstart": _QUEUE_INSTEAD % "started = true",
    "qstop": _QUEUE_INSTEAD % "started = false",
    "showq": "qstat -a",
    "checkjob": "qstat -f, and qstat -s for why it does not run",
    "pbs_rsub": "there are no reservations",
    "pbsdsh": "a job runs on one machine",
}


def _error_line(error: JobrunnerError) -> str:
    """What the server says may hold a host's name, which is as that host says."""
    return one_line(f"jobrunner: {'Unknown Job Id: ' if isinstance(error, UnknownJob) else ''}{error}")


_on_ctrl_c: Any = None


def end_at_ctrl_c() -> None:
    """Windows: Ctrl-C ends this program at once.  By itself Python hears of it there when what it waits for has come: while
    one waits for a job, the server's answer, most of a minute later."""
    global _on_ctrl_c
    if WINDOWS:
        import ctypes

        kind = ctypes.WINFUNCTYPE(ctypes.c_int, ctypes.c_uint32)  # type: ignore[attr-defined]
        _on_ctrl_c = kind(_console_event)
        ctypes.WinDLL("kernel32").SetConsoleCtrlHandler(_on_ctrl_c, True)  # type: ignore[attr-defined]


def _console_event(event: int) -> int:
    """Called by Windows in a thread of its own; 0 = it is for others to see to."""
    if event != 0:  # CTRL_C_EVENT
        return 0
    try:
        sys.stdout.flush()
    except (OSError, ValueError, AttributeError):  # nobody reads it; pythonw.exe has none
        pass
    os._exit(130)


def main(argv: Optional[List[str]] = None) -> int:
    words = command_line(sys.argv) if argv is None else argv
    if words and words[0] in _OTHER_COMMANDS:
        arguments().error(f"there is no {words[0]} here: {_OTHER_COMMANDS[words[0]]}")
    options = arguments().parse_args(words)
    try:
        if options.function is run:
            return run(options, None)
        end_at_ctrl_c()
        server = options.server or os.environ.get("JOBRUNNER_SERVER") or f"http://localhost:{DEFAULT_PORT}"
        code = options.function(options, connection(options, server))
        if sys.stdout:  # pythonw.exe has none
            sys.stdout.flush()
        return code
    except WrongUsage as error:
        options.parser.error(str(error))
    except JobrunnerError as error:
        print(_error_line(error), file=sys.stderr)
        return UNKNOWN_JOB if isinstance(error, UnknownJob) else 1
    except OSError as error:
        # EINVAL is what Windows says of a pipe that nobody reads any more
        if not isinstance(error, BrokenPipeError) and not (WINDOWS and error.errno == errno.EINVAL):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `qstat | head` is no error
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""jobrunner server -- keeps the queue:  python server.py --port 8088

    HTTP request -> Front, Handler -> ROUTES -> Queue (the rules, one lock) -> Store (jobs.json and its journal)

Queue    holds every job, changes jobs only through jobrunner.TRANSITIONS, and never sees a request.
Store    writes and reads, and never judges a state.
Gate     lets requests in, or not, by what their heads say: tokens and roles, and what browsers are kept from.
Handler  reads a request, calls its route, answers; a thread for each connection.
Front    does so in one thread for the connections that send nothing but small GETs.
Watch    closes connections that take too long.

An answer means it is on disk.  Every public Queue method that changes jobs takes the lock, appends the change to the
journal's open batch, lets go of the lock, and returns the batch with its result: the answer is sent when the batch is
written.  Whoever waits first writes it for all who came meanwhile, so requests that wait together share one fsync.  A
batch that cannot be written (full disk) is undone: jobs are never changed, only replaced, so the former ones are simply
put back.  A change and all that follows from it (dependents released, arrays aborted) is one line of the journal, so the
disk never holds one without the other: see Queue._record and Queue._consequences.

The snapshot (jobs.json) is written in the background from a list of jobs taken under the lock; what changes from then
on goes to the next journal.  Start = snapshot + the journals not older than it.

Clocks: wall time (seconds since 1970) in records and leases; monotonic time for waiting.

Sections: settings, the database file, the store, nodes, output that is followed, named queues and arrays, dependencies,
accounting, the queue, answers and routes, access, HTTP, main.
"""

import argparse
import base64
import collections
import contextlib
import errno
import functools
import gc
import glob
import hashlib
import heapq
import hmac
import io
import json
import logging
import os
import random
import re
import secrets
import select
import selectors
import signal
import socket
import socketserver
import stat
import sys
import threading
import time
import zlib
from http import HTTPStatus
from typing import (
    Any,
    Callable,
    Deque,
    Dict,
    FrozenSet,
    Generator,
    Iterable,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Set,
    Tuple,
    Union,
)
from urllib.parse import unquote_to_bytes

try:
    import jobrunner
    from jobrunner import (
        BUCKETS,
        DEFAULT_PORT,
        EXIT_ABORTED,
        EXIT_DEAD,
        EXIT_DEPENDENCY,
        EXIT_LOST,
        EXIT_NOT_STARTED,
        EXIT_NO_OUTPUT,
        EXIT_WALLTIME,
        MAX_SUBJOBS,
        STATUSES,
        UNKNOWN_HOST,
        VERSION,
        WINDOWS,
        BadRequest,
        BadState,
        FileLock,
        Job,
        JobrunnerError,
        State,
        UnknownJob,
        as_text,
        format_time,
        from_json,
        next_state,
        now,
        os_words,
        to_json,
    )
except ImportError as error:
    if error.name != "jobrunner":
        raise
    _folder = os.path.dirname(os.path.abspath(__file__))
    if not os.path.exists(os.path.join(_folder, "jobrunner.py")):
        sys.exit(f"server.py needs jobrunner.py beside it: copy it to {_folder}")
    if isinstance(error, ModuleNotFoundError):  # Windows' embeddable Python, which looks beside itself only
        sys.exit(f"this Python does not look for jobrunner.py in {_folder}: delete the file in "
                 f"{os.path.dirname(sys.executable)} whose name ends in ._pth")  # fmt: skip
    sys.exit(f"server.py and jobrunner.py in {_folder} are of different versions: copy both there")

from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

log = logging.getLogger("server")

# ---------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------

ORIGINAL_LEASE = 600  # s beyond its Runtime that a job stays leased to an original client, which sends no heartbeat
LONGEST_POLL = 60  # s a /request is held open at most, whatever Wait says
MAX_STARTS = 20  # a job that was started so often and never ended is held
RETRIED_STATUSES = ("failed", "dead")  # what Retries are for; who is over a limit would be over it again
_GIVEN_UP = ("released", "refused", "deleted")  # Status of reports that say nothing about how a job ends by itself
_RAN_STATUSES = ("finished", "timeout", "dead", "memory", "cputime")  # those of jobs that were started for sure
_NEVER_RUN_EXITS = (EXIT_ABORTED, EXIT_DEPENDENCY)
RETRY_FIRST, RETRY_LAST = 30, 3600  # s before the first retry; each pause is twice the one before, up to the last
NODE_FORGOTTEN = 30 * 86400  # s of silence after which a client is not listed any more
MOST_NODES = 10000  # clients that are known; of more, those are forgotten that have been silent longest
MOST_NAMED = 100000  # runs that one request of a client may name: others wait while they are looked up
MAX_HOST = 255  # characters of a client's name, as of a machine's
MAX_NODE = 16384  # bytes of what a client says of itself
MAX_COMMENT = 4096  # characters kept of what a report says for a person
BAD_HOST = 3  # jobs in a row that could not be started on a host, after which it is given no more
SURELY_STARTED = 10  # s after its lease that a job which has not been reported was started
MAX_EARLIER = 8  # runs of a job, given up as lost, that are remembered
CLOCK_JUMP = 5  # s between two looks that make it a clock somebody has set
MAX_HISTORY = 50  # lines kept of a job's history
MOST_STALE = 10000  # entries of a heap that may be out of date, beyond as many as hold
OUTPUT_TAIL = 64 * 1024  # bytes of each output that a report, or a piece of what is followed, may bring
FOLLOWED_BYTES = 4 * OUTPUT_TAIL  # kept of each output that somebody follows
FOLLOW_FOR = 30  # s after the latest read that a client still sends what its job prints
FOLLOW_AGAIN = 5  # s after which a client that does not is told again
SMALL_SNAPSHOT = 16 << 20  # bytes of journal that are worth a snapshot whatever its size
IDLE_SNAPSHOT = 60  # s after which even a short journal is folded in, where that costs little
SNAPSHOT_PAUSE = 0.0005  # s between the chunks of a snapshot, as long as making one takes: requests come first
PAGE = 10000  # jobs in a listing where nobody says how many
LOT = 1 << 18  # characters of the database that are read at a time
CHUNK = 32  # jobs turned into JSON at a time, so that requests come between

# ---------------------------------------------------------------------------------------------------------------------
# The database file: /dump's shape plus "Server"
# ---------------------------------------------------------------------------------------------------------------------

FORMAT = 1


class Damaged(JobrunnerError):
    """A file that does not hold what it must; the sentence says where."""


class BadFact(JobrunnerError):
    """A part of the database that can be read, but makes no sense; whoever knows where it stands makes it Damaged."""


class _Reader:
    """Walks through JSON text member by member, so that a million jobs need not all be dictionaries at once."""

    _blank = re.compile(r"[ \t\n\r]*").match
    _key = re.compile(
        r'[ \t\n\r]*"([^"\\\x00-\x1f]*)"[ \t\n\r]*:[ \t\n\r]*'
    ).match  # without escapes, as nearly all are
    _end = re.compile(r"[ \t\n\r]*([,}])").match
    _value = json.JSONDecoder(parse_constant=jobrunner._refuse_constant).raw_decode

    def __init__(self, text: str):
        self.text, self.at = text, 0
        self.start = 0  # where the latest value began

    def place(self) -> Tuple[int, int]:
        """Line and column of the latest value."""
        return self.text.count("\n", 0, self.start) + 1, self.start - self.text.rfind("\n", 0, self.start)

    def peek(self) -> str:
        """The next character that is no blank; "" at the end."""
        self.at = self._blank(self.text, self.at).end()
        return self.text[self.at : self.at + 1]

    def expect(self, mark: str) -> None:
        if self.peek() != mark:
            raise json.JSONDecodeError(f"expected {mark!r}", self.text, self.at)
        self.at += 1

    def value(self) -> Any:
        self.start = self.at = self._blank(self.text, self.at).end()
        value, self.at = self._value(self.text, self.at)
        return value

    def members(self) -> Iterator[str]:
        """The keys of the object that starts here; the caller reads each value before it asks for the next key."""
        if self.enter():
            yield from self.further_members()

    def enter(self) -> bool:
        """Goes into the object that starts here; False if that is empty, and read by that."""
        self.expect("{")
        if self.peek() != "}":
            return True
        self.at += 1
        return False

    def further_members(self) -> Iterator[str]:
        """The keys from here on, as `members`; one must come."""
        while True:
            simple = self._key(self.text, self.at)
            if simple:
                self.at = simple.end()
                yield simple.group(1)
            else:
                key = self.value()
                if not isinstance(key, str):
                    raise json.JSONDecodeError("expected a key in quotes", self.text, self.start)
                self.expect(":")
                yield key
            end = self._end(self.text, self.at)
            if not end:
                self.expect(",")  # which it is not: says where
                return
            self.at = end.end()
            if end.group(1) == "}":
                return


def read_database(reader: _Reader) -> Iterator[Tuple[str, Any]]:
    """("Server", object) and (bucket, Job) of all there is in a database; raises BadFact, or ValueError for what is no
    JSON (see `_damaged`).

    Takes what the original wrote and what people wrote by hand: any layout, null for a bucket, other keys than the IDs
    inside.
    """
    for bucket in reader.members():
        if bucket not in BUCKETS.values():
            yield bucket, reader.value()
        elif reader.peek() == "n":
            reader.value()
        elif reader.enter():
            yield from _read_lots(reader, bucket)
            for key in reader.further_members():
                yield bucket, _stored_job(bucket, key, reader.value())
    if reader.peek():
        raise json.JSONDecodeError("something follows the end", reader.text, reader.at)


def _read_lots(reader: _Reader, bucket: str) -> Iterator[Tuple[str, Job]]:
    """The first jobs of a bucket in which they stand one a line, as we write them: many lines at a time.  Whatever cannot
    be read so, the last ones among it, is left to who goes on from there one by one, and says what is wrong with it."""
    text = reader.text
    while True:
        end = text.find(",\n", reader.at + LOT)
        if end < 0:
            return
        try:
            entries = json.loads("{" + text[reader.at : end] + "}", parse_constant=jobrunner._refuse_constant)
            jobs = [_stored_job(bucket, key, record) for key, record in entries.items()]
        except (ValueError, RecursionError, BadFact):
            return
        if len(jobs) != text.count("\n", reader.at, end) + 1:  # another layout, or a key that comes twice
            return
        for place, job in enumerate(jobs):
            try:
                yield bucket, job
            except BadFact:  # thrown by whoever takes the jobs: it stands in this one's line
                for _ in range(place):
                    reader.at = text.index("\n", reader.at) + 1
                reader.start = text.index(":", reader.at + len(job.id)) + 1
                raise
        reader.at = end + 2


def _stored_job(bucket: str, key: str, record: Any) -> Job:
    """The job of one entry; the bucket tells the state where the record, as the original's, does not."""
    try:
        job = Job.from_stored(record)
    except BadRequest as error:
        raise BadFact(f"job {key!r} in {bucket}: {error}") from None
    job.id = job.id or key
    if not job.id:
        raise BadFact(f"a job in {bucket} has no ID")
    if BUCKETS[job.state] != bucket:
        job.state = next(state for state, name in BUCKETS.items() if name == bucket)
    return job


def _damage(path: str, line: int, column: int, what: str) -> str:
    return (
        f"{path} line {line} column {column}: {what}: the file was not changed; mend it or start with --db another.json"
    )


def database_chunks(jobs: List[Job], server: Optional[Dict[str, Any]] = None) -> Iterator[bytes]:
    """/dump's shape, a few jobs at a time.  With `server` it is the file: a job a line, with the leases' secrets."""
    start, between = (b"\n", b",\n") if server is not None else (b"", b",")
    opening = b"{" if server is None else b'{"Server":' + to_json(server) + between
    for bucket in ("Available", "Leased", "Finished", "Held"):
        yield opening + to_json(bucket) + b":{"
        chosen = [job for job in jobs if BUCKETS[job.state] == bucket]
        for at in range(0, len(chosen), CHUNK):
            lines = [_database_line(job, server is not None) for job in chosen[at : at + CHUNK]]
            yield (start if at == 0 else between) + between.join(lines)
        opening = b"}" + between
    yield b"}}" + start


def _database_line(job: Job, secrets: bool) -> bytes:
    record = job.to_record()
    for key in () if secrets else jobrunner.SECRET_KEYS:
        record.pop(key, None)
    return b'"' + job.id.encode() + b'":' + to_json(record)


# ---------------------------------------------------------------------------------------------------------------------
# The store: snapshot and journal
# ---------------------------------------------------------------------------------------------------------------------


class DiskFailed(JobrunnerError):
    """The change could not be written, and was undone."""

    status = 507


class Stopping(JobrunnerError):
    """The server takes no more changes, so that what it writes last is the whole truth."""

    status = 503

    def __init__(self) -> None:
        super().__init__("the server is stopping: try again when it is back")


Report = Tuple[Dict[str, Any], str, str, str, str]  # as it came, kind, ID, Lease, Hostname
Changes = List[Tuple[Any, Any]]  # of jobs, arrays and named queues: what there was, what there is


class Batch:
    """Changes that go to the disk together.

    lines    [bytes]       what the journal gets
    changes  [(old, new)]  what to put back if it does not
    """

    def __init__(self) -> None:
        self.lines: List[bytes] = []
        self.changes: Changes = []
        self.led = False  # somebody has undertaken to write it
        self.done = False
        self.error: Optional[DiskFailed] = None
        self.written = threading.Event()


class Store:
    """jobs.json, its journal, and the outputs that reports brought.

    PATH             the snapshot: the whole truth after a clean stop
    PATH.journal     one JSON line a change since the snapshot; its first line numbers it
    PATH.journal.N   an earlier one, still needed while the snapshot that replaces it is being written
    PATH.output/     last 64 KiB of what jobs printed
    PATH.lock        locked by the server that has the database open

    Locks, outermost first: `writing` (held while the journal is written), the Queue's lock, `_mutex`.
    """

    def __init__(self, path: str):
        self.path = os.path.realpath(path)
        self.journal_path = self.path + ".journal"
        self.output_path = self.path + ".output"
        self.undo: Callable[[Callable[[], Changes]], None] = lambda take: None  # the Queue's, see `_failed`
        self.account: Optional[Callable[[Changes], None]] = None  # is told what has come to the disk
        self.writing = threading.Lock()
        self._mutex = threading.Lock()
        self._open = Batch()
        self._under_way: Optional[Batch] = None  # closed, and being written
        self.generation = 1
        self.identity = ""  # of the database; its journals bear it too
        self.closed = False
        self.place = ""  # file and line that `replay` has come to
        self.journal = -1  # file descriptor
        self.journal_bytes = 0
        self.snapshot_bytes = 0
        if os.path.isdir(self.path):
            here = os.path.join(path, "jobs.json")
            raise JobrunnerError(f"{path} is a folder, and the database is a file: start with --db {here}")
        self.lock = self._lock()
        for found in (self.path, self.output_path):  # of an earlier version, or made by a person
            _make_private(found)

    def _lock(self) -> FileLock:
        try:
            os.close(_private(self.path + ".lock", os.O_RDWR | os.O_CREAT))
            return FileLock(self.path + ".lock")
        except FileLock.Busy as error:
            raise JobrunnerError(
                f"{self.path} is in use by another server ({error}): stop that one, or start with --db another.json"
            ) from None
        except OSError as error:
            raise JobrunnerError(f"cannot open {self.path}.lock: {os_words(error)}: choose another --db") from None

    # -- reading, at start

    def read(self) -> Generator[Tuple[str, Any], None, None]:
        """What read_database yields of the snapshot; nothing when there is none yet.  Raises Damaged."""
        if not os.path.exists(self.path):
            return
        data = jobrunner.read_file(self.path)
        self.snapshot_bytes = len(data)
        self.identity = f"{zlib.crc32(data):08x}"  # for one that the original, or a person, wrote
        reader = _Reader("")
        try:
            reader = _Reader(data.decode("utf-8-sig"))
            for key, value in read_database(reader):
                if key == "Server":
                    self._take_header(value)
                yield key, value
        except json.JSONDecodeError as error:
            raise Damaged(_damage(self.path, error.lineno, error.colno, error.msg)) from None
        except UnicodeDecodeError as error:
            line, column = data.count(b"\n", 0, error.start) + 1, error.start - data.rfind(b"\n", 0, error.start)
            raise Damaged(_damage(self.path, line, column, "not UTF-8 text")) from None
        except (BadFact, ValueError, RecursionError) as error:
            raise Damaged(_damage(self.path, *reader.place(), str(error))) from None

    def _take_header(self, server: Any) -> None:
        """What the snapshot's "Server" says to the store; raises BadFact."""
        numbers = ("Format", "Journal", "Next")
        if not isinstance(server, dict) or not all(type(server.get(key, 1)) is int for key in numbers):
            raise BadFact('"Server" must be an object whose Format, Journal and Next are numbers')
        if server.get("Format", FORMAT) != FORMAT:
            raise BadFact(f"this is format {server['Format']}, and this server knows {FORMAT}: use a newer server.py")
        self.generation = server.get("Journal", 1)
        self.identity = server.get("Id", self.identity)

    def replay(self) -> Iterator[Dict[str, Any]]:
        """Every change in the journals that the snapshot does not hold, in order; then opens the last one to go on.

        Call it after `read` is exhausted.  Raises Damaged.
        """
        for number, path in self._older_journals():
            if number >= self.generation:
                yield from self._read_journal(path)
                self.generation += 1
        self._good = 0
        if os.path.exists(self.journal_path):
            yield from self._read_journal(self.journal_path)
        self.identity = self.identity or os.urandom(8).hex()
        try:
            self._open_journal(self._good)
        except OSError as error:
            raise JobrunnerError(f"cannot write {self.journal_path}: {os_words(error)}: choose another --db") from None

    def _older_journals(self) -> List[Tuple[int, str]]:
        paths = glob.glob(glob.escape(self.journal_path) + ".*")
        return sorted((int(p.rsplit(".", 1)[1]), p) for p in paths if p.rsplit(".", 1)[1].isdigit())

    def _read_journal(self, path: str) -> Iterator[Dict[str, Any]]:
        """The changes in one journal; sets _good to the bytes that are whole lines.  Raises Damaged."""
        self._good = 0
        lines = jobrunner.read_file(path).split(b"\n")
        torn = lines.pop()  # what follows the last line's end: nothing, or a line that was being written
        for at, line in enumerate(lines):
            self.place = f"{path} line {at + 1} column 1"
            entry = _journal_entry(line)
            if entry is None:
                if any(_journal_entry(later) for later in lines[at + 1 :]):
                    raise Damaged(_damage(path, at + 1, 1, "no change stands here, but changes follow"))
                torn = line
                break
            if at == 0:
                self._check_number(path, entry)
            else:
                yield entry
            self._good += len(line) + 1
        if torn:
            log.warning("store.torn file=%s byte=%d: what follows was not finished when the server ended, so it was "
                        "never acknowledged: dropped", path, self._good)  # fmt: skip

    def _check_number(self, path: str, entry: Dict[str, Any]) -> None:
        """Journal N continues the snapshot that names N; any other one belongs to another database."""
        self.identity = self.identity or str(entry.get("Id"))  # no snapshot was written yet
        if entry.get("Journal") != self.generation or entry.get("Id") != self.identity:
            raise Damaged(
                f"{path} does not continue {self.path} (it is journal {entry.get('Journal')} of {entry.get('Id')}, not "
                f"{self.generation} of {self.identity}): put back the database it belongs to, or move it away if its "
                "changes may be lost"
            )

    def _open_journal(self, size: int) -> None:
        """Opens the journal to append behind its first `size` bytes; raises OSError."""
        self.journal_bytes = size
        self.journal = _private(self.journal_path, os.O_RDWR | os.O_CREAT)
        os.ftruncate(self.journal, size)
        os.lseek(self.journal, 0, os.SEEK_END)
        _sync_folder(self.path)

    # -- the journal: group commit

    def append(self, entry: Dict[str, Any], changes: Changes) -> Batch:
        """Hands over one change, a line of the journal.  The caller holds the Queue's lock, lets go, and then waits.
        Raises Stopping."""
        line = to_json(entry)
        with self._mutex:
            if self.closed:
                raise Stopping
            batch = self._open
            batch.lines.append(line)
            batch.changes.extend(changes)
        return batch

    def wait(self, batch: Optional[Batch]) -> None:
        """Returns when the batch is on disk; raises DiskFailed when it could not be written and was undone.

        Whoever comes first for a batch writes it, after the one before it; the others wait for that.
        """
        if batch is None:
            return
        if batch.led:
            batch.written.wait()
        else:  # should two come here at once, the second one finds it done
            batch.led = True
            with self.writing:
                if not batch.done:
                    self.write(self.close_batch())
        if batch.error:
            raise batch.error

    def unwritten(self) -> Optional[Batch]:
        """What an answer must wait for that tells of changes which others are still waiting for; None = nothing."""
        with self._mutex:
            return self._open if self._open.lines else self._under_way

    def close_batch(self) -> Batch:
        """The open batch, which takes no more changes from here on.  The caller holds `writing` and must write it."""
        with self._mutex:
            batch, self._open = self._open, Batch()
            self._under_way = batch if batch.lines else None
        return batch

    def write(self, batch: Batch) -> None:
        """Writes a closed batch, or undoes it and says so in its `error`.  The caller holds `writing`."""
        try:
            if batch.lines:
                self._append(b"\n".join(batch.lines) + b"\n")
        except (OSError, MemoryError) as error:  # whatever it is, nobody must be told that it is on disk
            self._failed(batch, error)
        finally:
            with self._mutex:
                self._under_way = None
            batch.done = True
            batch.written.set()
        if self.account and not batch.error:
            self.account(batch.changes)

    def _append(self, data: bytes) -> None:
        if self.journal < 0:  # the next one could not be opened
            self._open_journal(self.journal_bytes)
        if self.journal_bytes == 0:
            data = to_json({"Journal": self.generation, "Id": self.identity}) + b"\n" + data
        left = memoryview(data)
        while left:
            left = left[os.write(self.journal, left) :]
        os.fsync(self.journal)
        self.journal_bytes += len(data)

    def _failed(self, batch: Batch, error: Exception) -> None:
        """Cuts off what was half written; undoes the batch and the open one, which may have built on it."""
        log.error("store.failed file=%s error=%r", self.journal_path, os_words(error))
        batch.error = DiskFailed(
            f"cannot write {self.journal_path}: {os_words(error)}: nothing was changed; make room and try again"
        )
        built_on_it: List[Batch] = []

        def take() -> Changes:
            built_on_it.append(self.close_batch())
            return batch.changes + built_on_it[0].changes

        try:
            os.ftruncate(self.journal, self.journal_bytes)
            os.lseek(self.journal, 0, os.SEEK_END)
        except OSError as worse:
            log.error("store.failed file=%s error=%r", self.journal_path, os_words(worse))
        try:
            self.undo(take)
        finally:  # nobody must wait for ever, whatever went wrong
            for follower in built_on_it:
                follower.error, follower.done = batch.error, True
                follower.written.set()

    # -- the snapshot

    def next_journal(self) -> None:
        """Begins the next journal; the former stays as PATH.journal.N.  The caller holds `writing`.  Raises OSError."""
        size = self.journal_bytes
        self._close_journal()  # Windows renames no file that is open
        try:
            jobrunner.replace_file(self.journal_path, f"{self.journal_path}.{self.generation}")
            self.generation, size = self.generation + 1, 0
        finally:
            self._open_journal(size)

    def write_snapshot(self, jobs: List[Job], server: Dict[str, Any]) -> None:
        """Replaces jobs.json, on disk and whole, then removes the journals it holds; raises OSError."""
        server = {"Format": FORMAT, "Id": self.identity, **server}
        temporary = self.path + ".new"
        try:
            with open(temporary, "wb", opener=_private) as file:
                for chunk in database_chunks(jobs, server):
                    file.write(chunk)
                    if not self.closed:
                        time.sleep(SNAPSHOT_PAUSE)
                file.flush()
                os.fsync(file.fileno())
                self.snapshot_bytes = file.tell()
            jobrunner.replace_file(temporary, self.path)
        except OSError:
            _remove(temporary)
            raise
        _sync_folder(self.path)
        for number, path in self._older_journals():
            if number < server["Journal"]:
                _remove(path)

    def close(self, clean: bool) -> None:
        """Lets go of the database; after a snapshot that holds everything (clean) the empty journal goes too."""
        self._close_journal()
        if clean and self.journal_bytes == 0:
            _remove(self.journal_path)
        self.lock.release()

    def _close_journal(self) -> None:
        """Its number must not be used any more: a connection may get the same one next."""
        journal, self.journal = self.journal, -1
        if journal >= 0:
            os.close(journal)

    # -- outputs

    def write_output(self, job: Job, stream: str, data: bytes) -> None:
        """Keeps the tail of a job's output, durably; stream: "out" or "err".  Raises DiskFailed."""
        path = self._output_file(job, stream)
        try:
            _private_folder(self.output_path)
            _private_folder(os.path.dirname(path))
            with open(path + ".new", "wb", opener=_private) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            jobrunner.replace_file(path + ".new", path)
        except OSError as error:
            _remove(path + ".new")
            raise DiskFailed(f"cannot write {path}: {os_words(error)}: make room and try again") from None

    def read_output(self, job: Job, stream: str) -> bytes:
        """The tail kept of the job's latest run that printed; nothing if there is none."""
        try:
            with open(self._output_file(job, stream), "rb") as file:
                return file.read()
        except FileNotFoundError:
            return b""

    def forget_outputs(self, jobs: List[Job]) -> None:
        """Removes what was kept of the outputs of jobs that are gone."""
        for job in jobs:
            for stream in ("out", "err"):
                with contextlib.suppress(OSError):
                    os.remove(self._output_file(job, stream))
        for folder in {os.path.dirname(self._output_file(job, "out")) for job in jobs}:
            with contextlib.suppress(OSError):  # unless others are left in it
                os.rmdir(folder)

    def _output_file(self, job: Job, stream: str) -> str:
        # a thousand jobs a folder, and named by our own numbers alone: nothing a client sends becomes a path
        return os.path.join(self.output_path, f"{job.number // 1000:03d}", f"{job}.{stream}")


def _journal_entry(line: bytes) -> Optional[Dict[str, Any]]:
    try:
        entry = from_json(line)
    except BadRequest:
        return None
    return entry if isinstance(entry, dict) else None


def _private(path: str, flags: int) -> int:
    """Opens a file that is its owner's alone, also if it was there and was not; what `open` takes as its opener."""
    file = os.open(path, flags | getattr(os, "O_BINARY", 0), 0o600)
    if not WINDOWS:
        with contextlib.suppress(OSError):  # a file system that knows no owners
            os.fchmod(file, 0o600)
    return file


def _make_private(path: str) -> None:
    """Takes from all others what they may do with a file or folder of ours, if it is there; a device is nobody's."""
    if not WINDOWS:
        with contextlib.suppress(OSError):  # not there, another's, or on a file system that knows no owners
            mode = os.stat(path).st_mode
            if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
                os.chmod(path, stat.S_IMODE(mode) & 0o700)


def _private_folder(path: str) -> None:
    """Makes a folder that is its owner's alone; raises OSError."""
    os.makedirs(path, mode=0o700, exist_ok=True)


def _remove(path: str) -> None:
    try:
        os.remove(path)
    except OSError as error:
        log.debug("store.remove file=%s error=%r", path, os_words(error))


def _sync_folder(path: str) -> None:
    """Makes a rename in the file's folder durable, where the system has such a thing."""
    if not WINDOWS:
        folder = os.open(os.path.dirname(path), os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Nodes: the machines that clients run on
# ---------------------------------------------------------------------------------------------------------------------


class UnknownQueue(BadRequest):
    """No queue has that name."""


class UnknownNode(JobrunnerError):
    """No client has that name."""

    status = 404


class SameSpool(JobrunnerError):
    """Two clients live with one spool's id: somebody has copied the folder."""

    status = 409


class Poll:
    """One POST /request that is being answered, or held open until there is something to say.

    number   int  the client counts its requests; 0 = it does not
    slots    int  what it offers
    """

    def __init__(self, number: int, slots: int):
        self.number = number
        self.slots = slots
        self.superseded = False
        self.wake = threading.Event()


class Mark(NamedTuple):
    """What a person has said of a host: that it is to be given no more jobs.  Never changed, only replaced, as a Job is.

    drain    its clients are to end, too, when they have no jobs any more
    comment  why
    """

    host: str
    drain: bool
    comment: str

    def to_record(self) -> Dict[str, Any]:
        return {"Host": self.host, "Drain": self.drain, "Comment": self.comment}

    @classmethod
    def from_record(cls, record: Dict[str, Any]) -> "Mark":
        checked = jobrunner._check_word("Host", record["Host"]), jobrunner._check_bool("Drain", record["Drain"])
        return cls(*checked, jobrunner._check_text("Comment", record.get("Comment") or ""))


class Node:
    """What is known of one client.

    host        text    its name
    client      text    the id of its spool, which tells two clients of one name apart; "" = it has none
    original    bool    it speaks the GET forms: no heartbeat, no signals
    properties  {text}  what Requires is compared with
    last_seen   time    its latest request
    slots       int     how many jobs it runs at most; 0 = never said
    info        {}      what it says of itself (System, Version, ...)
    polls       [Poll]  the requests it has open
    settled     bool    what became of answers that it got, or not, before the server's start is known
    handed      {poll: [(id, lease)]}  what its latest answers gave it, until it has said that it got them
    named       {id: lease}  the runs that its latest request named and that are its own
    seconds     {id: s}      how long those had run then, and at what time (named_at) that was
    alike       text    another client goes by its name, in words; "" = none does
    strangers   text    it has runs of jobs that are not in the database, in words; "" = it has none
    """

    def __init__(self, host: str, client: str, original: bool):
        self.host = host
        self.client = client
        self.original = original
        self.properties = frozenset([f"host={host}"])
        self.queues: Optional[FrozenSet[str]] = None  # those it serves; None = all
        self.first_seen = self.last_seen = 0.0
        self.alike = ""
        self.strangers = ""
        self.slots = 0
        self.down = False
        self.info: Dict[str, Any] = {}
        self.polls: List[Poll] = []
        self.handed: Dict[int, List[Tuple[str, str]]] = {}
        self.named: Dict[str, str] = {}
        self.seconds: Dict[str, float] = {}
        self.named_at = 0.0
        self.settled = False  # it is known what became of the answers that the server gave before its start
        self.session: Any = object()  # none that a client may say
        self.old_sessions: Deque[Any] = collections.deque(maxlen=8)
        self.latest = 0  # number of its latest request

    def describe(self, info: Dict[str, Any]) -> None:
        """Takes in what a client says of itself: Slots, Properties, System and whatever else, kept for listings."""
        slots, words = info.get("Slots"), info.get("Properties")
        self.slots = slots if type(slots) is int and slots >= 0 else self.slots
        words = [word for word in words if isinstance(word, str)] if isinstance(words, list) else []
        self.properties = frozenset(words + [f"host={self.host}"])
        queues = info.get("Queues")
        self.queues = frozenset(word for word in queues if isinstance(word, str)) if isinstance(queues, list) else None
        self.info = info

    def is_new_session(self, info: Dict[str, Any]) -> bool:
        """True if the client was started anew since its latest request; it counts its requests anew, too.  Raises
        SameSpool if the one before speaks again."""
        session = info.get("Session")
        session = session if session is None else str(session)[:MAX_HOST]  # kept for a while
        if session == self.session:
            return False
        if session is not None and session in self.old_sessions:
            raise SameSpool(
                f"two clients, here on {self.host}, have the same spool's id {self.client}: one of the spools is a copy, "
                "and needs an id of its own (delete the file `client` in it)"
            )
        self.old_sessions.append(self.session)
        self.session, self.latest = session, 0
        return True

    def outdated(self, poll: Poll) -> bool:
        """True for a request that was overtaken on its way by a later one of the same client: what it says is old."""
        if poll.number and poll.number < self.latest:
            return True
        self.latest = poll.number
        return False

    @property
    def stopped(self) -> bool:
        """True after the farewell of a client that was stopped; the jobs it left go on."""
        return self.info.get("Stopped") is True

    @property
    def pause(self) -> str:
        """Why it takes no jobs just now, as it says itself; "" = it does."""
        words = self.info.get("Pause")
        return words if isinstance(words, str) else ""

    def to_record(self, running: int, mark: Optional[Mark]) -> Dict[str, Any]:
        full = self.slots and running >= self.slots
        state = "down" if self.down else "job-busy" if full else "busy" if self.pause else "free"
        if mark:  # as PBS writes both
            state = "offline,down" if self.down else "offline"
        return {
            "Host": self.host,
            "State": state,
            "Comment": "; ".join(filter(None, [mark.comment if mark else "", self.alike, self.pause, self.strangers])),
            "Drain": bool(mark and mark.drain),
            "Slots": self.slots,
            "Running": running,
            "LastSeen": format_time(self.last_seen),
            "Original": self.original,
            "Properties": sorted(self.properties),
            "Info": self.info,
        }


class Need(NamedTuple):
    """What a job asks of a client and of the rules; jobs of the same need wait in the same heap, so that a pick looks at
    heaps, not jobs.

    array      number of its array if that limits how many run at a time; 0 = it does not
    failed_on  clients that are to be its last resort
    """

    plain: bool
    ncpus: int
    requires: Tuple[str, ...]
    refused_by: Tuple[str, ...]
    queue: str
    array: int
    failed_on: Tuple[str, ...]

    def fits(self, node: Node, slots: int) -> bool:
        return (
            self.ncpus <= slots
            and (self.plain or not node.original)
            and node.host not in self.refused_by
            and (node.queues is None or self.queue in node.queues)
            and node.properties.issuperset(self.requires)
        )


# ---------------------------------------------------------------------------------------------------------------------
# Output that is being followed: in memory alone, since the files on the clients are the whole of it
# ---------------------------------------------------------------------------------------------------------------------


class Followed:
    """What a running job prints, as long as somebody reads it here.  Used under its own `news`.

    until    s, monotonic: when nobody reads any more
    lease    the run it is of
    told     [lease, s]  which run's client was told that somebody reads, and when, monotonic
    streams  {"StdOut": [at, bytes]}  the latest FOLLOWED_BYTES; at = where in the file they begin
    news     notified when there is more
    """

    def __init__(self) -> None:
        self.until = 0.0
        self.told: Tuple[str, float] = ("", 0.0)
        self.lease = ""
        self.streams: Dict[str, List[Any]] = {}
        self.news = threading.Condition()

    def is_to_be_told(self, lease: str) -> bool:
        """True if the client of that run is to be told (again) that somebody reads."""
        moment = time.monotonic()
        return moment <= self.until and (self.told[0] != lease or moment > self.told[1] + FOLLOW_AGAIN)

    def take(self, lease: str, key: str, at: int, data: bytes) -> None:
        """A piece of the output; where something is left out before it, what was is forgotten."""
        with self.news:
            if lease != self.lease:
                self.lease, self.streams = lease, {}
            stream = self.streams.setdefault(key, [at, b""])
            end = stream[0] + len(stream[1])
            if at > end:
                stream[:] = [at, data]
            elif at + len(data) > end:
                whole = stream[1] + data[end - at :]
                stream[:] = [stream[0] + max(0, len(whole) - FOLLOWED_BYTES), whole[-FOLLOWED_BYTES:]]
            self.news.notify_all()

    def read(self, lease: str, after: Dict[str, int]) -> Dict[str, Tuple[int, bytes]]:
        """{"StdOut": (at, bytes)}: what there is of each output from byte `after` on, if it is of that run."""
        found = {}
        for key, (at, data) in self.streams.items() if lease == self.lease else ():
            start = max(at, after.get(key, 0))
            if at + len(data) > start:
                found[key] = (start, data[start - at :])
        return found


# ---------------------------------------------------------------------------------------------------------------------
# Named queues and arrays: what jobs belong to
# ---------------------------------------------------------------------------------------------------------------------

DEFAULT_QUEUE = "default"


class NamedQueue(NamedTuple):
    """One of PBS's queues, as `qmgr` makes them.  Never changed, only replaced, as a Job is.

    priority          higher first, before the priorities of the jobs themselves
    enabled           takes submissions
    started           lets jobs run
    max_run           jobs of it that may run at a time; 0 = any number
    default_walltime  s, of a job that says none; 0 = none
    max_walltime      s, that a job may ask for; 0 = any
    """

    name: str
    priority: int = 0
    enabled: bool = True
    started: bool = True
    max_run: int = 0
    default_walltime: int = 0
    max_walltime: int = 0

    def to_record(self) -> Dict[str, Any]:
        return {key: getattr(self, name) for key, (name, _) in QUEUE_KEYS.items()}

    def altered(self, wish: Any) -> "NamedQueue":
        """This queue with some attributes set, {"MaxRun": 10}; raises BadRequest."""
        if not isinstance(wish, dict):
            raise BadRequest(f"Set must be an object of attributes, not {jobrunner._kind(wish)}")
        changes = {}
        for key, value in wish.items():
            if key not in QUEUE_KEYS or key == "Name":
                known = ", ".join(known for known in QUEUE_KEYS if known != "Name")
                raise BadRequest(f"a queue has no {key}: its attributes are {known}")
            name, kind = QUEUE_KEYS[key]
            changes[name] = jobrunner._CHECKS[kind](key, value)
        return self._replace(**changes)

    def admitted(self, job: Job) -> Job:
        """The job with this queue's walltime; raises BadRequest if it asks for more than the queue gives."""
        runtime = job.runtime or self.default_walltime or self.max_walltime
        if self.max_walltime and runtime > self.max_walltime:
            raise BadRequest(
                f"queue {self.name} runs jobs of {self.max_walltime} s at most, and this one asks for {runtime} s: ask "
                "for less, or choose another queue"
            )
        return job if runtime == job.runtime else job.but(runtime=runtime)


# key in JSON: (attribute, kind of value)
QUEUE_KEYS = {
    "Name": ("name", "word"),
    "Priority": ("priority", "priority"),
    "Enabled": ("enabled", "bool"),
    "Started": ("started", "bool"),
    "MaxRun": ("max_run", "count"),
    "DefaultWalltime": ("default_walltime", "runtime"),
    "MaxWalltime": ("max_walltime", "runtime"),
}


def parse_indices(text: str) -> List[int]:
    """The indices in `1-100:2` (PBS) or `1,10,50-100` (Torque), each once, in order; raises BadRequest."""
    ranges = jobrunner.parse_ranges(text)
    if sum(map(len, ranges)) > MAX_SUBJOBS:
        raise BadRequest(f"{text!r} are too many indices: an array has {MAX_SUBJOBS} subjobs at most")
    return sorted({index for indices in ranges for index in indices})


class ArraySpec(NamedTuple):
    """An array as it was submitted.  Never changed, only replaced, as a Job is.

    indices      as written: `1-100:2`
    max_running  subjobs that may run at a time; 0 = any number
    max_fails    subjobs that may fail before the others are aborted; 0 = any number
    template     what its subjobs are made of; its Params still have {index}
    """

    number: int
    id: str
    indices: str
    max_running: int
    max_fails: int
    template: Job

    def to_record(self) -> Dict[str, Any]:
        record = self.template.to_record()
        limits = {
            key: value for key, value in (("MaxRunSubjobs", self.max_running), ("MaxFails", self.max_fails)) if value
        }
        return {**record, "Array": self.indices, **limits}

    @classmethod
    def from_record(cls, record: Any, submitted: bool = False) -> Tuple["ArraySpec", List[Any]]:
        """The array in a record that has Array or Items, and its Items; raises BadRequest."""
        own = {key: record[key] for key in record if key.lower() in _ARRAY_KEYS}
        words = {_ARRAY_KEYS[key.lower()]: value for key, value in own.items() if value is not None}
        template = Job.from_record({key: value for key, value in record.items() if key not in own}, submitted)
        items = _check_items(words.get("Items") or [])
        indices = words.get("Array") or f"1-{len(items)}"
        if not isinstance(indices, str):
            raise BadRequest(f"Array must be text like 1-100:2, not {jobrunner._kind(indices)}")
        count = len(parse_indices(indices))
        if items and len(items) != count:
            raise BadRequest(f"the array has {count} indices and {len(items)} Items: give one for each")
        limits = [jobrunner._CHECKS["count"](key, words.get(key, 0)) for key in ("MaxRunSubjobs", "MaxFails")]
        return cls(template.number, template.id, indices, *limits, template), items

    def subjobs(self, items: List[Any]) -> Iterator[Job]:
        """Its jobs, made from the template: the tokens {index}, {name} (the job's) and {item}, or the names in the items, are
        replaced in Params, Env, StdOut and StdErr, once, and each job prints to files of its own.  They differ from each
        other in as little memory as they can."""
        job, of_items = self.template, set().union(*(item if isinstance(item, dict) else ("item",) for item in items))
        held = _TOKEN.findall("\n".join([*job.params, *job.env.values(), job.stdout, job.stderr]))
        names = {"index"} | (of_items | {"name"}).intersection(held)  # the items may have 100,000 more
        fill, unset = _filler(names), {**{name: "{%s}" % name for name in names}, "name": job.title}
        params, env = [fill(word) for word in job.params], {name: fill(text) for name, text in job.env.items()}
        given = [(name, getattr(job, name)) for name in ("stdout", "stderr")]
        paths = [(name, fill(_own_file(path, of_items))) for name, path in given if path]
        own_env = any(formatted for _, formatted in env.values())
        first, last = self.id[:24], int(self.id[24:], 16) + 1
        runtime, number, state, submit_time, shared = job.runtime, self.number, job.state, job.submit_time, job.__dict__
        make = Job.__new__
        for place, index in enumerate(parse_indices(self.indices)):
            item = items[place] if items else {}
            values = {**unset, "index": str(index), **(item if isinstance(item, dict) else {"item": item})}
            sub = make(Job)
            sub.id = "%s%012x" % (first, last + index & 0xFFFFFFFFFFFF)
            sub.params = [text % values if formatted else text for text, formatted in params]
            if not sub.params[0]:
                raise BadRequest(f"the program of subjob {index} is empty: give every item a text that is one")
            sub.runtime, sub.number, sub.state, sub.submit_time = runtime, number, state, submit_time
            own = sub.__dict__
            own["index"] = index
            own.update(shared)
            if own_env:
                own["env"] = {name: text % values if formatted else text for name, (text, formatted) in env.items()}
            for name, (text, formatted) in paths:
                own[name] = text % values if formatted else text
            yield sub


class NewArray(NamedTuple):
    """An array that is being added, with its subjobs: one change, made at once."""

    spec: ArraySpec
    jobs: List[Job]


_FIELD_KEYS = frozenset(jobrunner.FIELD_OF_KEY)
_ARRAY_KEYS = {key.lower(): key for key in ("Array", "Items", "MaxRunSubjobs", "MaxFails")}


def _is_array(record: Any) -> bool:
    """True for the record of an array: it has Array or Items."""
    if isinstance(record, dict) and _FIELD_KEYS.issuperset(record):
        return False  # the quick way for thousands of jobs
    return isinstance(record, dict) and any(record[key] and key.lower() in ("array", "items") for key in record)


def _check_items(items: Any) -> List[Any]:
    if not isinstance(items, list):
        raise BadRequest(f"Items must be a list, not {jobrunner._kind(items)}")
    for place, item in enumerate(items):
        for name, text in item.items() if isinstance(item, dict) else [("item", item)]:
            if not re.match(r"[A-Za-z_]\w*\Z", name, re.ASCII) or name == "index":
                raise BadRequest(
                    f"Items[{place}]: {name!r} cannot be put in braces: use letters, digits and _, not index"
                )
            jobrunner._check_text(f"Items[{place}]", text)
    return items


_TOKEN = re.compile(r"\{(\w+)\}")


def _filler(names: Any) -> Callable[[str], Tuple[str, bool]]:
    """A function that takes a text to (text, False) if it holds none of the tokens {name}, else to a %-format and True.
    Every other brace is data."""
    token = re.compile("\\{(%s)\\}" % "|".join(sorted(map(re.escape, names))))

    def fill(text: str) -> Tuple[str, bool]:
        return (token.sub(r"%(\1)s", text.replace("%", "%%")), True) if token.search(text) else (text, False)

    return fill


# Places for outputs that hold those of many jobs as they are: a folder, a device, a name with a variable in it.
_MANY_FIT = re.compile(r".*[/\\]\Z|/dev/|(?i:nul)\Z|.*\$\{?PBS_(JOBID|ARRAY)", re.DOTALL)


def _own_file(path: str, names: Iterable[str]) -> str:
    """An array's path for output, different for each of its jobs, or else they would write over each other's: it gets
    .INDEX at its end unless it holds {index} or every name in the items."""
    held = ["{%s}" % name in path for name in names] or [False]
    return path if not path or "{index}" in path or all(held) or _MANY_FIT.match(path) else path + ".{index}"


class Array:
    """What became of an array's subjobs.

    spec      ArraySpec   as it was submitted, and altered since
    members   {index: ID}
    states    {State: n}
    statuses  {status: n}
    begun     int         subjobs that have been started
    aborted   int         subjobs that were aborted with it
    """

    def __init__(self, spec: ArraySpec):
        self.spec = spec
        self.members: Dict[int, str] = {}
        self.states = {state: 0 for state in State}
        self.statuses: Dict[str, int] = {}
        self.begun = 0
        self.aborted = 0

    def count(self, job: Job, by: int) -> None:
        """Counts a subjob in (1) or out (-1)."""
        self.states[job.state] += by
        self.begun += by if job.run_count else 0
        if job.state is State.FINISHED:
            self.statuses[job.status] = self.statuses.get(job.status, 0) + by
            self.aborted += by if job.exit_status == EXIT_ABORTED else 0

    @property
    def running(self) -> int:
        return self.states[State.RUNNING]

    @property
    def is_over(self) -> bool:
        return self.states[State.FINISHED] == len(self.members)

    @property
    def failed(self) -> int:
        """Subjobs that failed by themselves."""
        good = self.statuses.get("finished", 0) + self.statuses.get("deleted", 0)
        return self.states[State.FINISHED] - good - self.aborted

    @property
    def letter(self) -> str:
        """Its state, as PBS has it: B(egun) once a subjob has been started, F when all are over."""
        if self.is_over:
            return "F"
        if self.begun or self.states[State.FINISHED]:
            return "B"
        return next((s.value for s in (State.QUEUED, State.WAITING, State.HELD) if self.states[s]), "Q")

    def to_record(self) -> Dict[str, Any]:
        """For listings: what its subjobs have in common, and how many are where."""
        spec = self.spec
        record = {**spec.template.public(), **spec.to_record()}
        record.update(ID=spec.id, Label=f"{spec.number}[]", State=self.letter, Count=len(self.members))
        record.update(MaxRunSubjobs=spec.max_running, MaxFails=spec.max_fails)
        record["States"] = {state.value: count for state, count in self.states.items()}
        record["Statuses"] = {status: self.statuses.get(status, 0) for status in STATUSES}
        record.pop("Comment", None)
        return record


# ---------------------------------------------------------------------------------------------------------------------
# Dependencies: verdicts on what is waited for
# ---------------------------------------------------------------------------------------------------------------------


def dependency_verdict(kind: str, over: bool, begun: bool, good: bool, bad: bool) -> Optional[bool]:
    """True: met; False: it can never be; None: that is not known yet.

    over   the job, or every subjob of the array, is finished
    begun  it was started (an array for `after`: every subjob was)
    good   it finished well (an array: every subjob did)
    bad    it is over and did not finish well (an array: one subjob at least)
    """
    if kind == "after":
        return True if begun else False if over else None
    if kind == "afterok":
        return False if bad else True if over and good else None
    if not over:
        return None
    return begun and (kind == "afterany" or not good)


class Depend(NamedTuple):
    """One of a job's dependencies, `afterok:17[3]`."""

    kind: str
    target: str

    @classmethod
    def parse(cls, texts: List[str]) -> List["Depend"]:
        """Those in [`afterok:17:18`, ...], each by itself; raises BadRequest."""
        words = [word for text in texts for word in jobrunner.parse_depend(text or ":")]  # here nothing is a mistake
        return [cls(kind, target) for kind, _, target in (word.partition(":") for word in words)]

    def __str__(self) -> str:
        return f"{self.kind}:{self.target}"


# ---------------------------------------------------------------------------------------------------------------------
# Accounting: one file a day, in PBS's format
# ---------------------------------------------------------------------------------------------------------------------


class Accounting:
    """Writes a line for each step of a job into FOLDER/YYYYMMDD, once that step is on disk.

    Lines are `MM/DD/YYYY HH:MM:SS;RECORD;ID;key=value ...`, local time, as in PBS; the records are Q queued, S started,
    E ended, D deleted, A aborted, R put back into the queue.  A value with blanks, quotes or semicolons is written as
    JSON writes it.  A line that cannot be written is lost, with a warning: it stops nobody's job.
    """

    def __init__(self, folder: str, clock: Callable[[], float] = now):
        self.folder = folder
        self.clock = clock
        _accounting_folder(folder)

    def write(self, changes: Changes) -> None:
        """The lines of some changes; one write, since a thousand jobs may have changed at once."""
        moment = time.localtime(self.clock())
        stamp = time.strftime("%m/%d/%Y %H:%M:%S", moment)
        lines = [f"{stamp};{line}\n" for old, new in changes for line in accounting_lines(old, new)]
        if not lines:
            return
        path = os.path.join(self.folder, time.strftime("%Y%m%d", moment))
        try:
            _append_lines(path, tail_bytes("".join(lines)))
        except OSError as error:
            log.warning("accounting.failed file=%s lines=%d error=%r", path, len(lines), str(error))


def _append_lines(path: str, lines: bytes) -> None:
    """Appends whole lines to a file; raises OSError, and then half of one does not stay for the next to be joined to."""
    with open(path, "a+b", buffering=0, opener=_private) as file:
        size = file.seek(0, os.SEEK_END)
        if size and file.seek(size - 1) >= 0 and file.read(1) != b"\n":  # left by a power cut
            lines = b"\n" + lines
        left = memoryview(lines)
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(size)
            raise


def _accounting_folder(path: str) -> None:
    """Makes the folder; raises JobrunnerError."""
    try:
        _private_folder(path)
    except OSError as error:
        raise JobrunnerError(f"cannot use {path}: {os_words(error)}: choose another --accounting") from None


def accounting_lines(old: Any, new: Any) -> Iterator[str]:
    """`RECORD;ID;key=value ...` of a change: none, or one."""
    if isinstance(new, NewArray):
        yield f"Q;{new.spec.number}[];{_pairs({'queue': new.spec.template.queue})}"
    if not isinstance(new, Job):
        return
    before, after = old.state if old else None, new.state
    if before is None:
        if new.index is None:
            yield f"Q;{new};{_pairs({'queue': new.queue})}"
    elif after is State.RUNNING and before is not State.RUNNING:
        yield f"S;{new};{_pairs(_accounted(new))}"
    elif after is State.RUNNING and new.signal == "delete" and old.signal != "delete":
        yield f"D;{new};{_pairs({'requestor': new.owner or '-'})}"
    elif after is State.FINISHED and (before is State.RUNNING or _ended_by_itself(new)):
        yield f"E;{new};{_pairs({**_accounted(new), **_accounted_end(new)})}"
    elif after is State.FINISHED and before is not State.FINISHED:
        deleted = new.status == "deleted"
        yield f"D;{new};{_pairs({'requestor': new.owner or '-'})}" if deleted else f"A;{new};{_one_line(new.comment)}"
    elif before in (State.RUNNING, State.FINISHED) and after not in (State.RUNNING, State.FINISHED):
        ended = old if old.end_time is not None else old.but(end_time=new.queue_time)
        run = {**_accounted(old), **_accounted_end(ended)} if old.start_time is not None else {"queue": new.queue}
        yield f"R;{new};{_pairs(run)}"


def _ended_by_itself(job: Job) -> bool:
    """True of a job that a client reported, though it had been given up and was queued again."""
    return job.start_time is not None and job.status != "deleted" and job.exit_status not in _NEVER_RUN_EXITS


def _accounted(job: Job) -> Dict[str, Any]:
    """What is said of a job at its start and at its end; times in seconds since 1970."""
    queued = job.queue_time if job.queue_time is not None else job.submit_time
    return {
        "user": job.owner.split("@")[0] or "-",
        "group": "-",  # readers of such files look for it behind user
        "account": job.extra.get("Account"),
        "jobname": job.title,
        "queue": job.queue,
        "ctime": _second(job.submit_time),
        "qtime": _second(queued),
        "etime": _second(queued),
        "start": _second(job.start_time),
        "owner": job.owner or "-",
        "exec_host": f"{job.host}/0" + (f"*{job.ncpus}" if job.ncpus > 1 else ""),
        "Resource_List.ncpus": job.ncpus,
        "Resource_List.walltime": jobrunner.format_duration(job.runtime) if job.runtime else None,
        "Resource_List.mem": f"{-(-job.memory // 1024)}kb" if job.memory else None,
        "Resource_List.cput": jobrunner.format_duration(job.cputime) if job.cputime else None,
    }


def _accounted_end(job: Job) -> Dict[str, Any]:
    walltime = (job.end_time or 0) - (job.start_time or 0)
    return {
        "session": 0,
        "end": _second(job.end_time),
        "Exit_status": job.exit_status,
        "resources_used.cput": jobrunner.format_duration(job.cpu_time_used),
        "resources_used.mem": f"{-(-job.max_mem // 1024)}kb",
        "resources_used.walltime": jobrunner.format_duration(max(0, walltime)),
        "run_count": job.run_count,
        "Status": job.status,
    }


def _second(moment: Optional[float]) -> Optional[int]:
    return None if moment is None else int(moment)


def _pairs(values: Dict[str, Any]) -> str:
    return " ".join(f"{key}={_accounting_value(value)}" for key, value in values.items() if value is not None)


def _one_line(text: str) -> str:
    return jobrunner.one_line(" ".join(text.split()))


def _accounting_value(value: Any) -> str:
    """A value as one word, in which nothing acts on the terminal of whoever looks at it."""
    text = str(value)
    plain = text.isprintable()
    return text if plain and re.match(r"[^\s;\"]+\Z", text) else json.dumps(text, ensure_ascii=not plain)


FORGET_SLICE = 400  # jobs that leave the queue at a time, so that nobody waits for it
WHOLE_ARRAY = 5000  # subjobs that leave together; larger arrays leave in slices


class Archive:
    """Moves jobs that have been over for long out of the queue, into FOLDER/finished-YYYYMM.jsonl: a job a line, as
    listings have it, with StdOutTail and StdErrTail where they were kept; the month is that of its end.

    A job is on disk there before the journal says that it has left: whatever ends the server in between, the job is
    in two places then, or twice in the file, and never in none.  An array leaves when all its subjobs may.

    keep  s that jobs stay in the queue after their end
    """

    def __init__(self, queue: "Queue", folder: str, keep: float):
        self.queue, self.folder, self.keep = queue, folder, keep
        self.look_at = -1.0  # steady time of the next look for such jobs
        self.leaving: Deque[List[Job]] = collections.deque()
        _accounting_folder(folder)

    def tick(self) -> None:
        """Moves some of those that are due, if any; called once a second."""
        if not self.leaving:
            moment = self.queue.steady()
            if moment < self.look_at:
                return
            self.look_at = moment + min(3600, max(1, self.keep / 24))
            self.leaving.extend(self._due(self.queue.clock() - self.keep))
        began = time.monotonic()
        while self.leaving and time.monotonic() - began < 0.1:
            try:
                self._move(self.leaving.popleft())
            except (OSError, DiskFailed) as error:
                self.leaving.clear()
                self.look_at = self.queue.steady() + 60
                log.error("archive.failed folder=%s error=%r: the jobs stay in the queue, and it is tried again",
                          self.folder, os_words(error) if isinstance(error, OSError) else str(error))  # fmt: skip

    def _due(self, limit: float) -> List[List[Job]]:
        """Those that ended before a moment, in slices; an array's stay together."""
        old: List[Job] = []
        arrays: Dict[int, List[Job]] = {}
        staying = set()
        for job in self.queue.picture():
            due = job.state is State.FINISHED and job.end_time is not None and job.end_time < limit
            if job.index is None:
                old += [job] if due else []
            elif due:
                arrays.setdefault(job.number, []).append(job)
            else:
                staying.add(job.number)
        slices = [old[at : at + FORGET_SLICE] for at in range(0, len(old), FORGET_SLICE)]
        for jobs in [arrays[number] for number in arrays if number not in staying]:
            step = len(jobs) if len(jobs) <= WHOLE_ARRAY else FORGET_SLICE
            slices += [jobs[at : at + step] for at in range(0, len(jobs), step)]
        return slices

    def _move(self, jobs: List[Job]) -> None:
        """Raises OSError, DiskFailed."""
        store, months = self.queue.store, collections.defaultdict(list)
        if jobs[0].index is not None and any(self.queue.jobs.get(job.id) is not job for job in jobs):
            return  # one of them is to run again, so the array stays
        for job in jobs:
            record = job.public()
            for key, stream in (("StdOutTail", "out"), ("StdErrTail", "err")):
                tail = store.read_output(job, stream)
                if tail:
                    record[key] = as_text(tail)
            months[time.strftime("%Y%m", time.localtime(job.end_time))].append(to_json(record) + b"\n")
        for month, lines in months.items():
            append_durably(os.path.join(self.folder, f"finished-{month}.jsonl"), b"".join(lines))
        gone, batch = self.queue.forget(jobs)
        store.wait(batch)
        store.forget_outputs(gone)
        log.info("archive.moved folder=%s jobs=%d", self.folder, len(gone))


def append_durably(path: str, lines: bytes) -> None:
    """Appends lines to a file, on disk, after whole ones only: half of one that was being written when the server ended
    is cut off.  Raises OSError, and then nothing was appended."""
    with open(path, "r+b" if os.path.exists(path) else "w+b", opener=_private) as file:
        size = end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        if end < size:
            file.truncate(end)
        try:
            file.seek(end)
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(end)
            raise
    _sync_folder(path)


# ---------------------------------------------------------------------------------------------------------------------
# The queue: the rules
# ---------------------------------------------------------------------------------------------------------------------


class Queue:
    """Every job, and every rule.  Safe to call from many threads; see the head of this file.

    clock         wall time
    node_timeout  s of silence after which a client of ours counts as down
    requeue_after s of silence after which its jobs are given to others; 0 = never
    offline_after jobs in a row that could not be started on a host, after which it is given no more; 0 = never
    steady        a clock that nobody sets; a `clock` that is given has none beside it
    """

    def __init__(
        self,
        store: Store,
        clock: Callable[[], float] = now,
        node_timeout: float = 300,
        requeue_after: float = 3600,
        offline_after: int = BAD_HOST,
        steady: Optional[Callable[[], float]] = None,
    ):
        self.store = store
        self.clock = clock
        self.steady = steady or (time.monotonic if clock is now else clock)
        self.ahead = clock() - self.steady()  # what the one is ahead of the other, see `_mind_clock`
        self.node_timeout = node_timeout
        self.requeue_after = requeue_after
        self.offline_after = offline_after
        self.lock = threading.Lock()
        self.started = clock()
        self.stopping = False
        self.jobs: Dict[str, Job] = {}
        self.numbers: Dict[int, str] = {}  # Number to ID, of jobs that belong to no array
        self.next_number = 1
        self.nodes: Dict[Tuple[str, str], Node] = {}  # by host and the client's own id
        self.lent: Dict[str, str] = {}  # {ID: name of the token} that original clients were given jobs with
        # Kept by `_put` alone:
        self.queues = {DEFAULT_QUEUE: NamedQueue(DEFAULT_QUEUE)}
        self.marks: Dict[str, Mark] = {}  # by host
        self.arrays: Dict[int, Array] = {}  # by Number
        self.array_ids: Dict[str, int] = {}
        self.queue_counts = {DEFAULT_QUEUE: {state: 0 for state in State}}
        self.awaited: Dict[str, Dict[str, Dict[str, None]]] = {}  # {target: {dependency: ids of those held by it}}
        self.ready: Dict[Need, List[Tuple[int, int, int, str]]] = {}  # heaps, first to run first; see `_pick`
        self.refused: Dict[str, None] = {}  # ids of those that are held because every client has refused them
        self.leased: Dict[str, Dict[str, None]] = {}  # ids of the running jobs by host, in order of their lease
        self.alarms: List[Tuple[float, str]] = []  # heap: when a lease ends or a waiting job is ready
        self.counts = {state: 0 for state in State}
        self.statuses = {status: 0 for status in STATUSES}
        self.ends: Deque[List[int]] = collections.deque()  # [minute, jobs that ended in it]
        self.watchers: Dict[str, List[threading.Event]] = {}  # who waits for a job's end
        self.inherited: Dict[
            str, str
        ] = {}  # {id: lease} of the jobs of our clients that ran when the server was started
        self.followed: Dict[str, Followed] = {}  # by ID: running jobs whose output somebody reads
        self.refusals: Dict[str, str] = {}  # by host: why it refused what it refused last
        self.unstartable: Dict[int, Set[str]] = {}  # by Number of an array: the hosts on which it could not be started
        self.misstarts: Dict[str, Dict[str, str]] = {}  # by host: {id: comment} of those it could not start, in a row
        self.tidy_at = 0.0
        self.snapshot_lock = threading.Lock()
        self.snapshot_time = time.monotonic()
        store.undo = self._undo

    # -- start and stop

    def load(self) -> None:
        """Takes in the database; raises Damaged.  What the original left without a number gets the next ones."""
        numberless = []
        snapshot = self.store.read()
        for key, value in snapshot:
            if isinstance(value, Job):
                if value.id in self.jobs:
                    snapshot.throw(BadFact(f"two jobs have ID {value.id}"))  # it knows where in the file
                self._put(None, value)
                self.next_number = max(self.next_number, value.number + 1)
                if not value.number:
                    numberless.append(value)
            elif key == "Server":
                try:
                    self._take_header(value)
                except (BadRequest, AttributeError, KeyError, TypeError, ValueError) as error:
                    snapshot.throw(BadFact(f'"Server" makes no sense: {error!r}'))
            else:
                log.warning("store.unknown file=%s key=%s: not a part of the database, dropped", self.store.path, key)
        for job in numberless:
            self._put(job, job.but(number=self.next_number))
            self.next_number += 1
        for entry in self.store.replay():
            try:
                self._replay(entry)
            except (JobrunnerError, KeyError, TypeError, ValueError) as error:
                raise Damaged(
                    f"{self.store.place}: a change that makes no sense ({error!r}): the file was not changed; put back "
                    "the database it belongs to, or start with --db another.json"
                ) from None
        self.jobs = dict(sorted(self.jobs.items(), key=lambda item: (item[1].number, item[1].index or 0)))
        self._grant_grace()
        with self.lock:  # of a database by hand: what this server writes has been judged
            waiting = {i for texts in self.awaited.values() for ids in texts.values() for i in ids}
            batch = self._commit_all(self._judged_anew(sorted(waiting)))
        self.store.wait(batch)

    def _take_header(self, server: Dict[str, Any]) -> None:
        """What the snapshot's "Server" says to the queue: it comes before the jobs.  Raises what comes of nonsense."""
        self.next_number = max(self.next_number, server.get("Next", 1))
        for record in server.get("Queues", []):
            self._put_queue_record(record)
        for record in server.get("Nodes", []):
            self._replay_mark(record)
        for record in server.get("Arrays", []):
            self._put(None, ArraySpec.from_record(record)[0])

    def _put_queue_record(self, record: Dict[str, Any]) -> None:
        name = record["Name"]
        attributes = {key: value for key, value in record.items() if key != "Name"}
        self._put(self.queues.get(name), NamedQueue(name).altered(attributes))

    def _replay(self, entry: Dict[str, Any]) -> None:
        """Makes a change of the journal again; raises what comes of one that makes no sense."""
        known = [key for key in _REPLAYED if key in entry]
        if not known:
            raise BadFact(f"none of {', '.join(_REPLAYED)} but {', '.join(entry)}")
        for key in known:
            _REPLAYED[key](self, entry[key])

    def _replay_put(self, records: List[Dict[str, Any]]) -> None:
        for record in records:
            job = Job.from_stored(record)
            self._put(self.jobs.get(job.id), job)
            self.next_number = max(self.next_number, job.number + 1)

    def _replay_arrays(self, records: List[Dict[str, Any]]) -> None:
        for record in records:
            spec, items = ArraySpec.from_record(record)
            self._put(None, NewArray(spec, list(spec.subjobs(items))))
            self.next_number = max(self.next_number, spec.number + 1)

    def _replay_limits(self, limits: List[Any]) -> None:
        for number, max_running, max_fails in limits:
            spec = self.arrays[number].spec
            self._put(spec, spec._replace(max_running=max_running, max_fails=max_fails))

    def _replay_sample(self, sample: List[Any]) -> None:
        job_id, cpu, mem, seconds, cpu_time = sample
        job = self.jobs[job_id]
        self._put(job, job.sampled(cpu, mem, seconds).but(cpu_time_used=cpu_time))

    def _replay_mark(self, record: Dict[str, Any]) -> None:
        mark = Mark.from_record(record)
        self._put(self.marks.get(mark.host), mark)

    def _replay_clear(self, host: str) -> None:
        self._put(self.marks[host], None)

    def _replay_queue(self, record: Dict[str, Any]) -> None:
        self._put_queue_record(record)

    def _replay_drop(self, name: str) -> None:
        self._put(self.queues[name], None)

    def _grant_grace(self) -> None:
        """While the server was off no client of ours could renew its leases: they count from now."""
        moment = self.clock()
        for job_id in [i for ids in self.leased.values() for i in ids]:
            job = self.jobs[job_id]
            if job.lease:
                self.inherited[job.id] = job.lease
                self._put(job, job.but(expiry=self._renewed(moment)))

    def stop(self) -> None:
        """Sends every held-open request home, then folds the journal into the snapshot; raises OSError."""
        with self.lock:
            self.stopping = True
            for node in self.nodes.values():
                for poll in node.polls:
                    poll.wake.set()
            for events in self.watchers.values():
                for event in events:
                    event.set()
        clean = self.snapshot()
        self.store.close(clean)

    def _refuse_waiting(self) -> None:
        """Raises Stopping while that is so: who came to wait would be sent home at once, and be back at once, again and
        again, as long as the snapshot takes."""
        if self.stopping:
            raise Stopping

    def snapshot(self) -> bool:
        """Writes the snapshot; False if it cannot be, which loses nothing: the journals stay."""
        with self.snapshot_lock:
            began = time.monotonic()
            try:
                with self.store.writing:
                    with self.lock:
                        jobs, batch = list(self.jobs.values()), self.store.close_batch()
                        self.store.closed = self.stopping
                        server = self._header()
                    self.store.write(batch)
                    if batch.error:
                        return False
                    self.store.next_journal()
                self.store.write_snapshot(jobs, server)
            except OSError as error:
                log.error("store.snapshot_failed file=%s error=%r: the journal is kept, and it is tried again",
                          self.store.path, os_words(error))  # fmt: skip
                return False
            finally:
                self.snapshot_time = time.monotonic()
            log.info("store.snapshot jobs=%d bytes=%d seconds=%.3f", len(jobs), self.store.snapshot_bytes,
                     self.snapshot_time - began)  # fmt: skip
            return True

    def _header(self) -> Dict[str, Any]:
        """The snapshot's "Server"."""
        header = {"Journal": self.store.generation + 1, "Next": self.next_number, "Version": VERSION}
        header["Queues"] = [named.to_record() for named in self.queues.values()]
        header["Nodes"] = [mark.to_record() for mark in self.marks.values()]
        return {**header, "Arrays": [array.spec.to_record() for array in self.arrays.values()]}

    def snapshot_due(self) -> bool:
        """True if the journal has grown so much, or a small one has waited so long, that folding it in is worth it."""
        journal, snapshot = self.store.journal_bytes, self.store.snapshot_bytes
        waited = time.monotonic() - self.snapshot_time
        return (journal > max(SMALL_SNAPSHOT, snapshot // 2) and waited > 5) or (
            journal > 0 and waited > IDLE_SNAPSHOT and snapshot < SMALL_SNAPSHOT
        )

    # -- the life of a job, in its order

    def add(self, records: List[Any]) -> Tuple[List[Union[Job, ArraySpec]], Optional[Batch]]:
        """Queues jobs and arrays, all or none, in the order given; raises BadRequest."""
        moment, added, place = self.clock(), [], 0
        try:
            for place, record in enumerate(records):
                added.append(self._submitted(record, moment))
            with self.lock:
                for place, (job, _, _) in enumerate(added):
                    self._check_submission(job)
                number = self.next_number
                self.next_number += len(added)
        except BadRequest as error:
            of_many = f"job {place + 1} of {len(records)}: {error}; none was added"
            raise BadRequest(of_many if len(records) > 1 else str(error)) from None
        entry: Dict[str, Any] = {"Put": []}
        changes: Changes = []
        things: List[Union[Job, ArraySpec]] = []
        for place, (job, spec, items) in enumerate(added):
            job.number = number + place
            if spec is None:
                entry["Put"].append(job.to_record())
                changes.append((None, job))
                things.append(job)
            else:
                spec = spec._replace(number=job.number, id=job.id, template=job)
                entry.setdefault("Arrays", []).append({**spec.to_record(), **({"Items": items} if items else {})})
                changes.append((None, NewArray(spec, list(spec.subjobs(items)))))
                things.append(spec)
        with self.lock:
            for queue in {job.queue for job, _, _ in added}:  # the lock was let go meanwhile
                self._queue_named(queue)
            for job in [job for job, _, _ in added if job.depend]:
                self._targets(job.depend)
            batch = self._commit(entry, changes)
            self._wake([job for _, new in changes for job in (new.jobs if isinstance(new, NewArray) else [new])])
        return things, batch

    def _submitted(self, record: Any, moment: float) -> Tuple[Job, Optional[ArraySpec], List[Any]]:
        """A new job as its submitter described it, or the template of an array, the array and its Items."""
        spec, items = ArraySpec.from_record(record, submitted=True) if _is_array(record) else (None, [])
        job = spec.template if spec else Job.from_record(record, submitted=True)
        if job.depend:
            job._set("depend", [str(depend) for depend in Depend.parse(job.depend)])
        if job.extra:
            jobrunner.check_shown(job.extra)
        job.id, job.submit_time = _new_id(), moment
        return job, spec, items

    def _check_submission(self, job: Job) -> None:
        """Gives a new job what its queue and the targets of its dependencies say of it; raises BadRequest.  The caller
        holds the lock, and nobody else has seen the job yet."""
        named = self._queue_named(job.queue)
        if not named.enabled:
            raise BadRequest(f"queue {named.name} takes no jobs now: it is not enabled")
        job.runtime = named.admitted(job).runtime
        if job.depend:
            job._set("depend", self._targets(job.depend))
        if job.depend or job.hold or job.start_after is not None:
            rested = self._rested(job)
            job.state = rested.state
            job._set("comment", rested.comment)

    def _queue_named(self, name: str) -> NamedQueue:
        named = self.queues.get(name)
        if named is None:
            raise UnknownQueue(f"there is no queue {name}: there are {', '.join(self.queues)}; qmgr makes others")
        return named

    def _targets(self, depend: List[str]) -> List[str]:
        """Dependencies with their targets as Numbers; raises BadRequest for targets that are not there."""
        found = []
        for kind, target in Depend.parse(depend):
            try:
                thing = self._find(target)
            except UnknownJob as error:
                raise BadRequest(f"Depend {kind}:{target}: {error}") from None
            found.append(str(Depend(kind, _label(thing))))
        return list(dict.fromkeys(found))

    def _rested(self, job: Job, comment: str = "") -> Job:
        """A job that is Q where it is to wait: held, waiting for its time, or ready to run."""
        if job.hold or job.depend:
            return self._moved(job, "hold", comment=_hold_words(job))
        moment = self.clock()
        if job.start_after is not None and job.start_after > moment:
            words = f"waits for {format_time(job.start_after)}"
            return self._moved(job, "wait", comment=f"{comment}; {words}" if comment else words)
        return job if job.comment == comment else job.but(comment=comment)

    def lease(self, host: str) -> Tuple[Optional[Job], Optional[Batch]]:
        """The next job for an original client, leased to it; None if there is none for it."""
        with self.lock:
            node = self._node(host, "", original=True)
            jobs, batch = self._lease(node, Poll(0, slots=1))
        return jobs[0] if jobs else None, batch

    def poll(self, request: Dict[str, Any], alive: Callable[[], bool]) -> Tuple[Dict[str, Any], Optional[Batch]]:
        """Our clients' heartbeat: renews the leases it names, and answers as soon as there is a job or a signal for it.

        request: Hostname, Slots (free ones), Wait (s), Running [{"ID","Lease"}], Node {}, Reports [as for `report`],
                 Poll (it counts its requests), Open [those it has no answer to yet]
        alive:   tells whether the client still listens, and may; nothing is leased to one that hung up while it waited
        """
        wish = _poll_wish(request)
        reports = self._checked_reports(request.get("Reports") or [], "finish", wish)
        if reports:
            wish = wish._replace(wait=0)  # their acknowledgement is something to say
        deadline = time.monotonic() + wish.wait
        with self.lock:
            self._refuse_waiting()
            node, mine, signals, reported, taken = self._take_in(wish, reports)
            batch = self.store.unwritten()
        jobs: List[Job] = []
        first = True
        try:
            while True:
                with self.lock:
                    if not first and not alive():
                        self._pass_on(mine)
                    if mine.slots > 0 and not mine.superseded and not self.stopping:
                        jobs, batch = self._lease(node, mine, batch)
                    signals = signals or self._signals(wish)
                    left, drain = deadline - time.monotonic(), self._is_to_drain(node)
                    if "Draining" in wish.info and drain is not wish.info["Draining"]:
                        break  # which is something to say, to a client that knows of it
                    if jobs or signals or left <= 0 or mine.superseded or self.stopping:
                        break
                    mine.wake.clear()
                first = False
                mine.wake.wait(left)
        finally:
            with self.lock:
                node.polls.remove(mine)
                waiting = self.counts[State.WAITING]
                if first or alive():
                    node.last_seen = self.clock()
        # The lock was let go between the two: what fails to be written of the first must not be acknowledged because
        # the second could be.  What was leased then is found out by the client's next request (_settle_polls).
        self.store.wait(taken)
        reply = {"Jobs": [job.but(earlier=[]).to_record() for job in jobs], "Signals": signals, "Drain": drain}
        unknown = self._strangers(wish.running)
        if unknown:
            reply["Unknown"] = unknown
        if node.alike:
            reply["Warning"] = node.alike
        if wish.info.get("UntilEmpty"):
            reply["Waiting"] = waiting
        if reports:
            reply["Reported"] = reported
        return reply, batch

    def _take_in(
        self, wish: "Wish", reports: List[Report]
    ) -> Tuple[Node, Poll, List[Dict[str, Any]], List[Dict[str, Any]], Optional[Batch]]:
        """What a request says: (its client, itself, signals about leases it has no right to, answers to its reports, what
        to wait for before they are given)."""
        node = self._node(wish.host, str(wish.info.get("Client") or ""), original=False)
        new_session = node.is_new_session(wish.info)
        node.describe(wish.info)
        mine, signals = Poll(wish.number, wish.slots), []
        mine.superseded = node.outdated(mine)
        if not mine.superseded:
            self._claim(node, wish, reports)
        reported, taken = self._take_reports(reports)
        if new_session:
            self._forget_refusals(node)
        if not mine.superseded:
            signals = self._renew(node, wish.running, wish.seconds)
            mine.slots -= self._settle_polls(node, wish)
        node.polls.append(mine)
        return node, mine, signals, reported, taken

    def _pass_on(self, poll: Poll) -> None:
        """Whoever held this request open has hung up: the work it was woken for is another's."""
        poll.superseded = True
        for node in self.nodes.values():
            for other in node.polls:
                other.wake.set()

    def _renew(
        self, node: Node, running: List[Tuple[str, str, str]], seconds: Dict[str, float]
    ) -> List[Dict[str, str]]:
        """Renews the leases a client names; signals for those it has no right to any more.

        What is not in the database goes on: the server may have been started on a wrong or an old one by mistake.
        """
        signals, moment = [], self.clock()
        self._note_strangers(node, self._strangers(running))
        node.named, node.seconds, node.named_at = {}, {}, moment
        for job_id, lease, known in running:
            job = self.jobs.get(job_id)
            run = self._still_running(job, node.host) if job and lease and job.lease == lease else None
            if run:
                node.named[job_id] = lease
                if job_id in seconds:
                    node.seconds[job_id] = seconds[job_id]
                if run is not job:
                    run = run.but(client=node.client)
                    self._commit_put(job, run)
                self._put(run, run.but(expiry=self._renewed(moment)))
            elif job and job.lease == lease and job.status != "deleted" and job.exit_status not in _NEVER_RUN_EXITS:
                pass  # its report was taken in, and the acknowledgement is on its way
            elif job and known != "delete":
                signals.append(_stop_signal(job_id, job))
        return signals

    def _strangers(self, running: List[Tuple[str, str, str]]) -> List[str]:
        """The IDs among what a client names that are not in the database."""
        return [job_id for job_id, _, _ in running if job_id not in self.jobs]

    def _note_strangers(self, node: Node, strangers: List[str]) -> None:
        before, node.strangers = node.strangers, ""
        if strangers:
            more = f" and {len(strangers) - 1} more" if len(strangers) > 1 else ""
            node.strangers = f"it has what is not in this database, and is left alone: job {strangers[0][:36]}{more}"
            if node.strangers != before:
                log.warning("node.strangers host=%s: %s", node.host, node.strangers)

    def _claim(self, node: Node, wish: "Wish", reports: List[Report]) -> None:
        """Gives jobs back to a client that was cut off, has gone on with them, and comes back when they were given to
        others already: the longer run wins.  A run that is over meanwhile is claimed with its report."""
        over = {(job_id, lease) for report, _, job_id, lease, _ in reports if report.get("Status") not in _GIVEN_UP}
        for job_id, lease, known in wish.running:
            job = self.jobs.get(job_id)
            if not job or (known == "delete" and (job_id, lease) not in over):
                continue
            start_time = self._longer(job, lease, wish)
            if start_time is not None:
                self._commit_all([(job, self._given_back(job, node, lease, start_time))])
                self._wake_host(job.host)

    def _longer(self, job: Job, lease: str, wish: "Wish") -> Optional[float]:
        """When the earlier run with that lease began, if it is longer than the job's present one and may still count."""
        began = [jobrunner.parse_time(start) for earlier, start in job.earlier if earlier == lease]
        if not began or job.signal:
            return None
        seconds = wish.seconds.get(job.id, self.clock() - began[0])
        return began[0] if seconds > self._seconds_run(job) else None

    def _seconds_run(self, job: Job) -> float:
        """How long a job has run, as far as is known: its client says for how long it was awake.  -1 = it does not run;
        no run is longer than one that is over."""
        moment = self.clock()
        if job.state is not State.RUNNING:
            return float("inf") if job.state is State.FINISHED and job.status != "lost" else -1.0
        for node in self.nodes.values():
            if node.host == job.host and node.named.get(job.id) == job.lease and job.id in node.seconds:
                return node.seconds[job.id] + moment - node.named_at
        return moment - (job.start_time or moment)

    def _given_back(self, job: Job, node: Node, lease: str, start_time: float) -> Job:
        """A job with an earlier run of its again, which has turned out to be the longer one."""
        words = f"{node.host} was given up as lost, and is back with its run"
        other = ""
        if job.state is State.RUNNING:
            other = f", which is longer than that of {job.host}, which is told to stop"
            log.warning("job.longer_run job=%s host=%s stopped=%s", job, node.host, job.host)
            job = self._noted(job, f"{_run_words(job)}; stopped: the run of {node.host} is longer")
        ready = self._moved(job, _READY_BY[job.state]) if _READY_BY.get(job.state) else job
        event = "recover" if ready.state in (State.RUNNING, State.FINISHED) else "lease"
        left = [line for line in job.earlier if line[0] != lease]
        fresh = dict(status="", exit_status=None, end_time=None, expiry=self._renewed(self.clock()), earlier=left)
        return self._moved(
            ready,
            event,
            host=node.host,
            client=node.client,
            lease=lease,
            start_time=start_time,
            comment=words + other,
            **fresh,
            **_NEW_RUN,
        )

    def _forget_refusals(self, node: Node) -> None:
        """A client that was started anew may have another --allow-prefix: it is offered again what it has refused, also
        what was held because every client had."""
        host = node.host
        for need in [need for need in self.ready if host in need.refused_by]:
            for entry in list(self.ready[need]):
                if self._waits_here(need, entry):
                    job = self.jobs[entry[3]]
                    others = [other for other in job.refused_by if other != host]
                    self._commit_put(job, job.but(refused_by=others))
        changes: Changes = []
        for job in [self.jobs[job_id] for job_id in self.refused]:
            others = [other for other in job.refused_by if other != host]
            ready = self._moved(job, "release", comment="", queue_time=self.clock(), refused_by=others)
            if self._need(ready).fits(node, max(node.slots, 1)):
                changes.append((job, self._rested(ready)))
        self._commit_all(changes)

    def _settle_polls(self, node: Node, wish: "Wish") -> int:
        """Sends a client's older requests home, since the new one says more, and finds out what became of the answers
        to them: requeues what was lost on the way.  Returns the slots that answers still on their way will take."""
        if not node.client or not wish.number:
            return 0
        for poll in node.polls:
            poll.superseded = True
            poll.wake.set()
        named, taken = {job_id for job_id, _, _ in wish.running}, 0
        for number in list(node.handed):
            for job_id, lease in node.handed[number]:
                job = self.jobs.get(job_id)
                if job_id in named or job is None or job.lease != lease or job.state is not State.RUNNING:
                    continue
                if number in wish.open:
                    taken += job.ncpus
                else:
                    again = self._requeued(job, f"the answer that gave it to {node.host} was lost", lease=job.lease)
                    self._commit_all([(job, again)])
            if number not in wish.open:
                del node.handed[number]
        if not node.settled and not wish.open:
            node.settled = True
            self._settle_earlier(node, named)
        return taken

    def _settle_earlier(self, node: Node, named: Set[str]) -> None:
        """Requeues what this client was given before the server's start and does not know of: an answer that was on its
        way when the server was killed."""
        jobs = [self.jobs[job_id] for job_id in self.leased.get(node.host, ()) if job_id not in named]
        lost = [job for job in jobs if job.client == node.client and self.inherited.get(job.id) == job.lease]
        words = f"the answer that gave it to {node.host} was lost"
        self._commit_all([(job, self._requeued(job, words, lease=job.lease)) for job in lost])

    def _signals(self, wish: "Wish") -> List[Dict[str, Any]]:
        """What a client is to do with the jobs it runs and has not been told yet.  Whatever a run is to be ended for,
        its client is told to `delete` it; what becomes of the job then is decided when it reports."""
        found: List[Dict[str, Any]] = []
        for job_id, lease, known in wish.running:
            job = self.jobs.get(job_id)
            if not job or job.lease != lease or job.state is not State.RUNNING:
                if job and known != "delete":
                    if job.lease == lease and job.status == "deleted":
                        found.append({"ID": job_id, "Signal": "delete"})  # by force
                    elif job.lease != lease:
                        found.append(_stop_signal(job_id, job))
                continue
            if job.signal:
                found += [{"ID": job_id, "Signal": "delete"}] if known != "delete" else []
            elif wish.limits.get(job_id, _limits(job)) != _limits(job):
                found.append({"ID": job_id, "Signal": "alter", **dict(zip(LIMITS, _limits(job)))})
            elif job_id in self.followed and job_id not in wish.follows:
                if self.followed[job_id].is_to_be_told(lease):
                    self.followed[job_id].told = (lease, time.monotonic())
                    found.append({"ID": job_id, "Signal": "follow"})
        return found

    def _renewed(self, moment: float) -> Optional[float]:
        """When a lease of ours ends that was renewed at `moment`; None = never."""
        return round(moment + self.requeue_after, 6) if self.requeue_after else None

    def _lease(self, node: Node, poll: Poll, before: Optional[Batch] = None) -> Tuple[List[Job], Optional[Batch]]:
        """The next jobs that fit into a request's slots, leased to its node, and the batch to wait for: `before` if
        there is no job.  The caller holds the lock."""
        self._mind_clock()
        leased: List[Job] = []
        changes = []
        moment, slots = self.clock(), poll.slots if node.host not in self.marks else 0
        while slots > 0:
            job = self._pick(node, slots)
            if job is None:
                break
            run = self._moved(
                job,
                "lease",
                host=node.host,
                client=node.client,
                start_time=moment,
                expiry=round(moment + job.runtime + ORIGINAL_LEASE, 6) if node.original else self._renewed(moment),
                lease="" if node.original else os.urandom(16).hex(),
                run_count=job.run_count + 1,
                comment="",
                earlier=job.earlier if not job.lease else _with_earlier(job),
                **(_NEW_RUN if job.run_count else {}),
            )
            slots -= run.ncpus
            leased.append(run)
            self._put(job, run)  # at once, so that the next pick does not find it again
            changes.append((job, run))
            if node.client and poll.number:
                node.handed.setdefault(poll.number, []).append((run.id, run.lease))
            log.debug("job.lease job=%s host=%s run=%d walltime=%d", run, run.host, run.run_count, run.runtime)
        if not leased:
            return [], before
        return leased, self._record({"Put": [job.to_record() for job in leased]}, changes)

    def _pick(self, node: Node, slots: int) -> Optional[Job]:
        """The first job in the queue's order that the node can run now, taken off its heap."""
        best: Optional[List[Tuple[int, int, int, str]]] = None
        first: Tuple[int, Any] = (0, None)
        for need, heap in list(self.ready.items()):  # the cheapest questions first: there may be thousands
            if not need.fits(node, slots) or any(self._limits_reached(need)):
                continue
            priority = -self.queues[need.queue].priority
            if best and heap and (priority, heap[0]) >= first:
                continue  # its head may be out of date, but what really comes first in it comes behind that
            if not self._has_head(need, heap):
                del self.ready[need]
            elif (best is None or (priority, heap[0]) < first) and not self._others_first(need, node):
                best, first = heap, (priority, heap[0])
        return self.jobs[heapq.heappop(best)[3]] if best else None

    def _has_head(self, need: Need, heap: List[Tuple[int, int, int, str]]) -> bool:
        """False if nothing is left in the heap; else its head is the first job of that need."""
        while heap and not self._waits_here(need, heap[0]):
            heapq.heappop(heap)
        return bool(heap)

    def _waits_here(self, need: Need, entry: Tuple[int, int, int, str]) -> bool:
        """Heaps are not searched when a job leaves or changes; what no longer holds is passed over when it comes up."""
        job = self.jobs.get(entry[3])
        return job is not None and job.state is State.QUEUED and _order(job) == entry and self._need(job) == need

    def _need(self, job: Job) -> Need:
        if _NEED_FIELDS.isdisjoint(job.__dict__):
            return _NO_NEED  # as of nearly all jobs that are no arrays
        array = self.arrays[job.number].spec.max_running if job.index is not None else 0
        return Need(
            job.plain,
            job.ncpus,
            tuple(job.requires),
            tuple(job.refused_by),
            job.queue,
            job.number if array else 0,
            tuple(job.failed_on),
        )

    def _limits_reached(self, need: Need) -> Tuple[bool, bool, bool]:
        """Which rules keep jobs of this need from running now, whatever the client: see `_limit_words`."""
        named, array = self.queues[need.queue], self.arrays[need.array] if need.array else None
        return (
            not named.started,
            0 < named.max_run <= self.queue_counts[named.name][State.RUNNING],
            array is not None and array.running >= array.spec.max_running,
        )

    def _limit_words(self, need: Need) -> List[str]:
        """The rules that do, for a person."""
        most = self.arrays[need.array].spec.max_running if need.array else 0
        words = (
            f"queue {need.queue} is not started",
            f"queue {need.queue} is at max_run {self.queues[need.queue].max_run}",
            f"array {need.array}[] is at max_run_subjobs {most}",
        )
        return [sentence for sentence, reached in zip(words, self._limits_reached(need)) if reached]

    def _others_first(self, need: Need, node: Node) -> bool:
        """True if the job has failed on this node, and there is another one that could run it."""
        return node.host in need.failed_on and any(
            self._takes_jobs(other) and other.host not in need.failed_on and need.fits(other, max(other.slots, 1))
            for other in self.nodes.values()
        )

    def report(self, reports: List[Any], kind: str) -> Tuple[List[Dict[str, Any]], Optional[Batch]]:
        """Takes in that runs ended.  Raises BadRequest (unknown job, or not a report), and then none counts.

        kind: finish, timeout or dead.  A report of a run that is not the job's present one changes nothing, so one sent
        twice counts once; answers {"ID"} each, with "Stale": true where it came from a run that is not the latest.
        """
        checked = self._checked_reports(reports, kind)
        with self.lock:
            return self._take_reports(checked)

    def _checked_reports(self, reports: Any, kind: str, wish: Optional["Wish"] = None) -> List[Report]:
        """(report, kind, ID, Lease, Hostname) of each, their outputs written; raises BadRequest, and then none counts.
        wish: the request that they came with."""
        if not isinstance(reports, list):
            raise BadRequest("reports come as a list")
        checked = []
        for report in _not_too_many(reports):
            job_id, lease, host = self._report_fields(report)
            if report.get("Comment"):  # no record can hold a NUL; a result is not refused for that, or for its length
                report = {**report, "Comment": report["Comment"][:MAX_COMMENT].replace("\0", "?")}
            by_status = (
                report.get("Status") if kind == "finish" and report.get("Status") in ("timeout", "dead") else kind
            )
            checked.append((report, by_status, job_id, lease, host))
        for report, _, job_id, _, _ in checked:
            job = self.jobs.get(job_id)
            if job:  # it may be leaving the queue just now
                self._keep_outputs(job, report, wish)
        return checked

    def _take_reports(self, checked: List[Report]) -> Tuple[List[Dict[str, Any]], Optional[Batch]]:
        answers, ended, changes = [], [], []
        marks: List[Mark] = []
        for report, kind, job_id, lease, host in checked:
            job = self.jobs.get(job_id)  # None: it was over, and has left the queue since the report was checked
            current = job is not None and self._is_current(job, lease, host)
            answers.append({"ID": job_id} if current else {"ID": job_id, "Stale": True})
            run = self._still_running(job, host) if job and current else None
            if run is None:
                continue
            over = self._ended(run, report, kind)
            self._put(job, over)
            ended.append(over)
            changes.append((job, over))
            marks += self._marked_if_bad(run, report)
        if not ended:  # what was reported before may be on its way to the disk just now
            return answers, self.store.unwritten()
        entry: Dict[str, Any] = {"Put": [job.to_record() for job in ended]}
        if marks:
            entry["Mark"] = [mark.to_record() for mark in marks]
        batch = self._record(entry, changes + [(None, mark) for mark in marks])
        self._tell(changes)
        return answers, batch

    def _marked_if_bad(self, run: Job, report: Dict[str, Any]) -> List[Mark]:
        """Takes a host offline on which one job after the other cannot be started, before it fails them all."""
        if report.get("Status") in _GIVEN_UP or not self.offline_after:
            return []
        if report.get("ExitStatus") not in (EXIT_NOT_STARTED, EXIT_NO_OUTPUT):
            self.misstarts.pop(run.host, None)
            return []
        if self._is_its_own_fault(run):
            return []
        failed = self.misstarts.setdefault(run.host, {})
        failed[run.id] = report.get("Comment") or ""
        if len(failed) < self.offline_after or run.host in self.marks:
            return []
        words = f"{len(failed)} jobs in a row could not be started, the latest {run}: {failed[run.id]}"
        log.warning("node.bad host=%s: %s", run.host, words)
        mark = Mark(run.host, False, f"{words}; pbsnodes -r {run.host} returns it")
        return [self._put(None, mark)]

    def _is_its_own_fault(self, run: Job) -> bool:
        """True of a subjob that could not be started where others of its array could not be on another host, and none
        ever was anywhere: a name that is mistyped must not close the whole room."""
        if run.index is None:
            return False
        hosts = self.unstartable.setdefault(run.number, set())
        hosts.add(run.host)
        while len(self.unstartable) > 1000:
            del self.unstartable[next(iter(self.unstartable))]
        statuses, moment = self.arrays[run.number].statuses, self.clock()
        if len(hosts) < 2 or any(statuses.get(status) for status in _RAN_STATUSES):
            return False
        running = (self.jobs[job_id] for ids in self.leased.values() for job_id in ids)
        return not any(
            job.number == run.number and moment - (job.start_time or moment) > SURELY_STARTED for job in running
        )

    def _still_running(self, job: Job, host: str) -> Optional[Job]:
        """The job as running, if its latest run may still be: also one that was given up, but that nobody else has
        begun since; None if it is over, or was never begun."""
        if job.state in _READY_BY and job.lease:
            ready = self._moved(job, _READY_BY[job.state]) if _READY_BY[job.state] else job
            return self._moved(ready, "lease", host=host, comment="")
        # lost by its lease's end, not by its client's word
        if job.status == "lost" and job.expiry is not None and (job.end_time or 0) >= job.expiry:
            moment = self.clock()
            expiry = self._renewed(moment) if job.lease else round(moment + ORIGINAL_LEASE, 6)
            again = dict(status="", exit_status=None, end_time=None, comment="", expiry=expiry)
            return self._moved(job, "recover", **again)
        return job if job.state is State.RUNNING else None

    @staticmethod
    def _is_current(job: Job, lease: str, host: str) -> bool:
        """True if that is the job's latest run: by its lease, or, of an original client, by its name."""
        return job.lease == lease if lease or job.lease else job.host == host

    def _report_fields(self, report: Any) -> Tuple[str, str, str]:
        """(ID, Lease, Hostname) of a report; raises BadRequest for what is none, and for unknown jobs."""
        if not isinstance(report, dict) or not isinstance(report.get("ID"), str):
            raise BadRequest("a report is a JSON object with the job's ID")
        if report["ID"] not in self.jobs:
            raise BadRequest(f"no job has ID {report['ID']!r}: it was never added here, or forgotten since")
        for key, kinds in _REPORT_KINDS.items():
            value = report.get(key)
            if value is not None and (not isinstance(value, kinds) or isinstance(value, bool) or value == float("inf")):
                raise BadRequest(f"{key} of a report must not be {jobrunner._kind(value)} like that")
        if report.get("Status") is not None and report["Status"] not in STATUSES + ("released",):
            raise BadRequest(f"Status of a report must be one of {', '.join(STATUSES)} or released")
        if report.get("EndTime") is not None:
            jobrunner.parse_time(report["EndTime"])
        return report["ID"], report.get("Lease") or "", _host_name(report.get("Hostname"))

    def _keep_outputs(self, job: Job, report: Dict[str, Any], wish: Optional["Wish"]) -> None:
        """Writes the tails that came with a report, before the report itself counts, or the run is claimed with it."""
        lease = report.get("Lease") or ""
        if job.lease == lease:
            counts = self._still_running(job, job.host) is not None
        else:
            named = wish is not None and any((job.id, lease) == entry[:2] for entry in wish.running)
            with self.lock:
                counts = named and report.get("Status") not in _GIVEN_UP and self._longer(job, lease, wish) is not None
        for key, stream in (("StdOutTail", "out"), ("StdErrTail", "err")):
            text = report.get(key)
            if text and counts:
                self.store.write_output(job, stream, tail_bytes(text)[-OUTPUT_TAIL:])
        if job.lease == report.get("Lease"):
            self._take_last_piece(job, report)

    def _ended(self, job: Job, report: Dict[str, Any], kind: str) -> Job:
        """The job after the end of its run."""
        if report.get("Status") == "refused":
            reason = report.get("Comment") or "the client does not run such commands"
            refused_by = job.refused_by + [job.host]
            self.refusals[job.host] = reason
            comment, run_count = f"refused by {', '.join(refused_by)}: {reason}", job.run_count - 1  # it never started
            again = self._requeued(job, comment, refused_by=refused_by, run_count=run_count, start_time=None)
            return self._held_if_refused_by_all(again)
        if report.get("Status") == "released":
            if not job.rerunable and not job.signal and report.get("ExitStatus") != EXIT_NOT_STARTED:
                return self._lost(
                    job, f"{job.host} ended it when it was stopped itself, and the job must not run twice"
                )
            return self._requeued(job, report.get("Comment") or f"given back by {job.host}")
        exit_status = report.get("ExitStatus")
        if exit_status is None:
            exit_status = {"timeout": EXIT_WALLTIME, "dead": EXIT_DEAD}.get(kind)
        status = kind if kind != "finish" else report.get("Status") or ("failed" if exit_status else "finished")
        comment = report.get("Comment") or ""
        if job.signal == "rerun":
            return self._requeued(job, "run again at a person's wish", ended=True)
        if job.signal == "abort":
            status, exit_status, comment = "failed", EXIT_ABORTED, _aborted_words(job)
        elif status in RETRIED_STATUSES and job.retried < job.retries and not job.signal:
            return self._to_be_retried(job, status, exit_status)
        moment = self.clock()
        end_time = jobrunner.parse_time(report["EndTime"]) if report.get("EndTime") else moment
        return self._moved(
            job,
            "end",
            status=status,
            exit_status=exit_status,
            comment=comment,
            end_time=max(min(end_time, moment), job.start_time or 0),
            cpu_time_used=max(job.cpu_time_used, report.get("CpuTimeUsed") or 0),
            max_mem=max(job.max_mem, report.get("MaxMem") or 0),
            signal="",
            earlier=[],
        )

    def _held_if_refused_by_all(self, job: Job) -> Job:
        """A job that was just refused: held, with what each client said, if there is none left that might run it."""
        need = self._need(job)
        others = need._replace(refused_by=())
        hosts = {node.host for node in self.nodes.values() if not node.down and others.fits(node, max(node.slots, 1))}
        if job.state is not State.QUEUED or hosts.difference(need.refused_by):
            return job
        reasons: Dict[str, List[str]] = {}
        for host in job.refused_by:
            words = self.refusals.get(host, "")
            reasons.setdefault(words[len(host) :].strip() if words.startswith(host) else words, []).append(host)
        said = "; ".join(f"{', '.join(hosts)}: {words}" for words, hosts in reasons.items())
        words = f"refused by every client: {said}: change the job or an --allow-prefix, then qrls {job}"
        return self._moved(job, "hold", comment=words)

    def _to_be_retried(self, job: Job, status: str, exit_status: Optional[int]) -> Job:
        """A job that failed and is to run again, later each time, and on another client first."""
        pause = min(RETRY_FIRST << min(job.retried, 16), RETRY_LAST)
        words = f"{status} on {job.host} with exit status {jobrunner.exit_words(exit_status)}"
        comment = f"{words}: retry {job.retried + 1} of {job.retries}"
        changes: Dict[str, Any] = {"retried": job.retried + 1, "start_after": round(self.clock() + pause, 6)}
        changes["failed_on"] = job.failed_on + [job.host] * (job.host not in job.failed_on)
        return self._requeued(job, comment, ended=True, **changes)

    def sample(self, samples: List[Any]) -> Tuple[List[Dict[str, Any]], Optional[Batch]]:
        """Keeps usage samples {"ID","Lease","CPU","Mem"[,"CpuTimeUsed","Seconds"]}; raises BadRequest."""
        words = [self._report_fields(sample) for sample in _not_too_many(samples)]
        for sample in samples:
            numbers = [sample.get("CPU"), sample.get("Mem"), sample.get("Seconds") or 60]
            if not all(type(number) is int and abs(number) < 1 << 62 for number in numbers) or numbers[2] < 1:
                raise BadRequest("a usage report needs CPU (percent of one core x 100) and Mem (bytes), whole numbers")
        batch, answers = self.store.unwritten(), []
        with self.lock:
            for sample, (job_id, lease, host) in zip(samples, words):
                job = self.jobs.get(job_id)
                current = job and self._is_current(job, lease, host if sample.get("Hostname") else job.host)
                answers.append({"ID": job_id} if current else {"ID": job_id, "Stale": True})
                if job and current and job.state is State.RUNNING:
                    batch = self._sample(job, sample)
        return answers, batch

    def _sample(self, job: Job, sample: Dict[str, Any]) -> Batch:
        seconds, cpu_time = sample.get("Seconds") or 60, max(job.cpu_time_used, sample.get("CpuTimeUsed") or 0)
        after = job.sampled(sample["CPU"], sample["Mem"], seconds).but(cpu_time_used=cpu_time)
        return self._commit({"Sample": [job.id, sample["CPU"], sample["Mem"], seconds, cpu_time]}, [(job, after)])

    # -- output that is followed while the job runs

    def follow(
        self, name: str, after: Dict[str, int], wait: float, run: int = 0
    ) -> Tuple[Job, Dict[str, Tuple[int, bytes]]]:
        """The job, and what it has printed from those bytes of run `run` on, or of another run from its beginning, as soon
        as there is some, or the job is over, or `wait` s have passed; raises UnknownJob, Stopping."""
        deadline = time.monotonic() + wait
        with self.lock:
            self._refuse_waiting()
            job = self._find(name)
            if isinstance(job, Array):
                raise UnknownJob(
                    f"{_label(job)} is an array, and has no output: name a subjob, as {job.spec.number}[1]"
                )
            followed = self.followed.setdefault(job.id, Followed())
            followed.until = time.monotonic() + wait + FOLLOW_FOR
            self._wake_host(job.host)
        while True:
            job = self.jobs.get(job.id, job)
            with followed.news:
                found = followed.read(job.lease, after if run in (0, job.run_count) else {})
                left = deadline - time.monotonic()
                if found or left <= 0 or job.state is State.FINISHED or self.stopping:
                    return job, found
                followed.news.wait(min(left, 0.5))  # what becomes of the job is not notified
            if job.state is State.RUNNING and followed.lease != job.lease and followed.is_to_be_told(job.lease):
                with self.lock:
                    self._wake_host(job.host)

    def stream(self, pieces: List[Any]) -> List[Dict[str, Any]]:
        """Takes in {"ID","Lease","StdOut":{"At","Text"},"StdErr":{..}}; answers whether anybody still reads; raises
        BadRequest."""
        answers = []
        for piece, (job_id, lease, _) in zip(pieces, [self._report_fields(piece) for piece in _not_too_many(pieces)]):
            job, followed = self.jobs.get(job_id), self.followed.get(job_id)
            wanted = bool(followed and lease and job and job.lease == lease and time.monotonic() <= followed.until)
            for key in ("StdOut", "StdErr"):
                part = piece.get(key)
                if part is not None:
                    at, data = _piece(key, part)
                    if followed and wanted:
                        followed.take(lease, key, at, data)
            answers.append({"ID": job_id, "Follow": wanted})
        return answers

    def _take_last_piece(self, job: Job, report: Dict[str, Any]) -> None:
        """The end of an output that is followed comes with the report."""
        followed = self.followed.get(job.id)
        for key in ("StdOut", "StdErr") if followed else ():
            size, data = report.get(f"{key}Size"), tail_bytes(report.get(f"{key}Tail") or "")
            if followed and type(size) is int and size >= len(data):
                followed.take(job.lease, key, size - len(data), data[-OUTPUT_TAIL:])

    # -- what people do with jobs: each all or none; a group (array, range, selection) stands for those that can be

    def delete(self, chosen: "Selection", force: bool = False) -> Tuple[List[Job], Optional[Batch]]:
        """Ends jobs: at once if they wait, through their client if they run, unless forced; raises UnknownJob, BadState."""

        def deleted(job: Job) -> Job:
            if job.state is not State.RUNNING:
                over = dict(status="deleted", end_time=self.clock(), comment="deleted before it ran")
                return self._moved(job, "delete", **over)
            if force:
                words = f"deleted by force: whether {job.host} has ended it was not waited for"
                return self._moved(job, "force", status="deleted", end_time=self.clock(), comment=words, signal="")
            return self._moved(job, "delete", signal="delete", comment=self._delete_words(job))

        return self._change(chosen, "delete", deleted)

    def _delete_words(self, job: Job) -> str:
        if job.lease:
            return f"being deleted: {job.host} is told to end it"
        return (
            f"being deleted: {job.host} runs an original client, which cannot be told; it ends with its report or lease"
        )

    def hold(self, chosen: "Selection") -> Tuple[List[Job], Optional[Batch]]:
        """Keeps jobs from being run until they are released."""

        def held(job: Job) -> Job:
            job = self._noted(job, "held by a person").but(hold=True)
            return self._moved(job, "hold", comment=_hold_words(job))

        return self._change(chosen, "hold", held)

    def release(self, chosen: "Selection") -> Tuple[List[Job], Optional[Batch]]:
        """Lets held jobs run, once what else they wait for has come."""

        def released(job: Job) -> Job:
            return self._made_ready(self._noted(job, "released").but(hold=False), "release")

        return self._change(chosen, "release", released)

    def _made_ready(self, job: Job, event: str) -> Job:
        """The job after an event that leads to Q, where it is to wait now."""
        ready = self._moved(job, event, comment="", queue_time=self.clock(), refused_by=[])
        return self._rested(ready)

    def rerun(self, chosen: "Selection") -> Tuple[List[Job], Optional[Batch]]:
        """Queues finished jobs again; ends running ones through their client, and queues them then."""

        def again(job: Job) -> Job:
            if job.state is State.FINISHED:
                if job.queue not in self.queues:
                    words = (
                        f"its queue {job.queue} has been deleted, and rerun needs one that is there: create it again"
                    )
                    raise BadState(f"cannot rerun job {job}: {words}")
                return self._made_ready(self._noted(job, _run_words(job)).but(**_NEVER_RAN), "rerun")
            after = self._moved(job, "rerun", signal="rerun", comment=f"being rerun: {job.host} is told to end it")
            if not job.rerunable:
                raise BadState(f"cannot rerun job {job}: it is running and not rerunable, and rerun needs one that is")
            if not job.lease:
                raise BadState(
                    f"cannot rerun job {job}: {job.host} runs an original client, which cannot be told to end it"
                )
            return after

        return self._change(chosen, "rerun", again)

    def move(self, chosen: "Selection", queue: str) -> Tuple[List[Job], Optional[Batch]]:
        """Puts jobs into another queue; raises UnknownQueue, BadRequest too."""

        def moved(job: Job) -> Job:
            named = self._queue_named(queue)
            if not named.enabled:
                raise BadState(f"cannot move job {job}: queue {queue} is not enabled, and move needs one that is")
            return named.admitted(
                self._moved(self._noted(job, f"moved from {job.queue} to {queue}"), "move", queue=queue)
            )

        return self._change(chosen, "move", moved)

    def alter(self, chosen: "Selection", wish: Dict[str, Any]) -> Tuple[List[Job], Optional[Batch]]:
        """Changes what was said of jobs at submission; of running ones only ALTERABLE_RUNNING.  Raises BadRequest too.

        wish: {key of the record: value}; MaxRunSubjobs and MaxFails are of whole arrays.
        """
        limits, wish = ({k: v for k, v in wish.items() if (k in ARRAY_LIMITS) is own} for own in (True, False))
        patch = Job.from_record({"Params": ["-"], **wish}, submitted=True)
        names = {jobrunner.FIELD_OF_KEY[key].name for key in wish if key in jobrunner.FIELD_OF_KEY}
        unknown = [key for key in wish if key not in ALTERABLE]
        if unknown or not (wish or limits):
            raise BadRequest(f"{', '.join(unknown) or 'nothing'} cannot be altered: say one of {', '.join(ALTERABLE)}")

        @functools.lru_cache(maxsize=None)  # the same for all jobs that are altered, of which there may be many
        def depend() -> Tuple[List[str], Dict[str, str]]:
            targets = self._targets(patch.depend)
            return targets, self._waited_for(targets)

        def altered(job: Job) -> Job:
            changes = {name: getattr(patch, name) for name in names}
            for name in {"stdout", "stderr"} & names if job.index is not None else ():
                text, formatted = _filler(("index", "name"))(_own_file(changes[name], ()))
                changes[name] = text % {"index": job.index, "name": job.title} if formatted else text
            if patch.extra:  # what is only kept
                changes["extra"] = {**job.extra, **patch.extra}
            if job.state is State.RUNNING and not set(wish) <= set(ALTERABLE_RUNNING):
                kept = ", ".join(key for key in wish if key not in ALTERABLE_RUNNING)
                raise BadState(f"cannot alter {kept} of job {job}: it is running, and that needs a job that is not")
            if _WHAT_RUNS.intersection(wish):  # runs of what it was are not its own if they come back
                changes.update(lease="", earlier=[])
            if patch.depend:
                changes["depend"], waited_for = depend()
                if job.id in waited_for:
                    words = f"it waits for {job} itself, at once or over other jobs"
                    raise BadRequest(f"{waited_for[job.id]} of job {job} would be a cycle: {words}")
            after = self._moved(self._noted(job, f"altered: {', '.join(wish)}"), "alter", **changes)
            after = self._queue_named(after.queue).admitted(after) if "Runtime" in wish else after
            if after.state is State.QUEUED:
                return self._rested(after, after.comment)
            if after.state in _READY_BY and {"Hold", "Depend", "StartAfter"} & set(wish):
                return self._made_ready(after, _READY_BY[after.state])
            return after

        with self.lock:
            specs = self._altered_arrays(chosen, limits) if limits else []
            changes = self._chosen(chosen, "alter", altered) if wish else []
            entry = {"Put": [after.to_record() for _, after in changes]}
            batch = self._commit({**entry, "Limits": [_limits_of(spec) for _, spec in specs]}, specs + changes)
            self._tell(changes)
            if specs:
                self._wake_all()
            return [self.jobs[job.id] for job, _ in changes], batch

    def _altered_arrays(self, chosen: "Selection", limits: Dict[str, Any]) -> Changes:
        """Arrays with another number of subjobs that may run, or fail; raises BadRequest for what is no whole array."""
        things = [self._find(name) if not _is_range(name) else None for name in chosen.names]
        if not things or chosen.filter or not all(isinstance(thing, Array) for thing in things):
            raise BadRequest(f"{' and '.join(limits)} are of whole arrays: name them as 17[]")
        words = {ARRAY_LIMITS[key]: jobrunner._CHECKS["count"](key, value) for key, value in limits.items()}
        specs = {thing.spec.number: thing.spec for thing in things if isinstance(thing, Array)}
        return [(spec, spec._replace(**words)) for spec in specs.values()]

    def _waited_for(self, depend: List[str]) -> Dict[str, str]:
        """{ID: the dependency that leads to it} of all jobs that these dependencies wait for, over however many."""
        pending, seen, found = [(text, text) for text in depend], set(), {}
        while pending:
            text, first = pending.pop()
            target = text.partition(":")[2]
            if target not in seen:
                seen.add(target)
                for job in self._all_of_name(target):
                    found.setdefault(job.id, first)
                    pending += [(further, first) for further in job.depend]
        return found

    def _change(
        self, chosen: "Selection", event: str, function: Callable[[Job], Job]
    ) -> Tuple[List[Job], Optional[Batch]]:
        """Replaces the chosen jobs by what the function makes of them, all or none; raises what it raises."""
        with self.lock:
            changes = self._chosen(chosen, event, function)
            batch = self._commit({"Put": [after.to_record() for _, after in changes]}, changes)
            self._tell(changes)
            for host in {job.host for job, _ in changes if job.state is State.RUNNING}:
                self._wake_host(host)  # also for what is over by force
            return [self.jobs[job.id] for job, _ in changes], batch

    def _chosen(self, chosen: "Selection", event: str, function: Callable[[Job], Job]) -> Changes:
        """(job, what the function makes of it) for those named one by one, and for those of a group that it does not
        refuse.  Raises UnknownJob, and BadState if it refuses one, or every job of a group."""
        found: Dict[str, Tuple[Job, Job]] = {}
        for name in chosen.names:
            thing = self._find(name) if not _is_range(name) else None
            if isinstance(thing, Job):
                found.setdefault(thing.id, (thing, function(thing)))
            else:
                self._add_group(found, self._all_of_name(name), event, name, function)
        if chosen.filter:
            matching = [job for job in self.jobs.values() if chosen.filter(job)]
            if not matching:
                raise UnknownJob(f"no job has {chosen.words}: qstat -x lists all there are")
            self._add_group(found, matching, event, chosen.words, function)
        return list(found.values())

    @staticmethod
    def _add_group(
        found: Dict[str, Tuple[Job, Job]], jobs: List[Job], event: str, words: str, function: Callable[[Job], Job]
    ) -> None:
        refusal, accepted = "", 0
        for job in jobs:
            try:
                found.setdefault(job.id, (job, function(job)))
                accepted += 1
            except BadState as error:
                refusal = refusal or str(error)  # not the error: that refers to this frame, and all jobs in it
        if refusal and not accepted:
            raise BadState(f"cannot {event} any job of {words}: {refusal}")

    # -- hosts

    def mark(self, hosts: List[str], action: str, comment: str) -> Tuple[List[Mark], Optional[Batch]]:
        """Gives hosts no more jobs (offline), lets their clients end, too (drain), or returns them (clear), all or none;
        raises BadRequest, UnknownNode."""
        if action not in ("offline", "drain", "clear"):
            raise BadRequest(f"Action must be offline, drain or clear, not {action!r}")
        with self.lock:
            known = {node.host for node in self.nodes.values()}.union(self.marks, self.leased)
            for host in hosts:
                if host not in known:
                    raise UnknownNode(f"there is no client on {host}: pbsnodes lists those there are")
            marks = [] if action == "clear" else [Mark(host, action == "drain", comment) for host in hosts]
            cleared = [self.marks[host] for host in hosts if host in self.marks] if action == "clear" else []
            changes: Changes = [(self.marks.get(mark.host), mark) for mark in marks] + [
                (mark, None) for mark in cleared
            ]
            entry = {"Mark": [mark.to_record() for mark in marks], "Clear": [mark.host for mark in cleared]}
            batch = self._commit(entry, changes)
            for host in hosts:
                self.misstarts.pop(host, None)
            self._wake_all()
        for host in hosts:
            log.info("node.%s host=%s comment=%r", action, host, comment)
        return marks, batch

    def _is_to_drain(self, node: Node) -> bool:
        mark = self.marks.get(node.host)
        return mark is not None and mark.drain

    def _takes_jobs(self, node: Node) -> bool:
        return not node.down and node.host not in self.marks and not node.pause

    # -- queues

    def change_queue(self, name: str, action: str, wish: Any) -> Tuple[Optional[NamedQueue], Optional[Batch]]:
        """Creates, sets or deletes a named queue; raises BadRequest, UnknownQueue, BadState."""
        with self.lock:
            old = self.queues.get(name)
            if action == "create":
                if old:
                    raise BadState(
                        f"cannot create queue {name}: it is there already, and create needs a name that is free"
                    )
                new: Optional[NamedQueue] = NamedQueue(_check_queue_name(name)).altered(wish)
            elif action == "set":
                new = self._queue_named(name).altered(wish)
            elif action == "delete":
                self._queue_named(name)
                self._check_unused(name)
                new = None
            else:
                raise BadRequest(f"Action must be create, set or delete, not {action!r}")
            entry = {"Queue": new.to_record()} if new else {"DropQueue": name}
            batch = self._commit(entry, [(old, new)])
            self._wake_all()
        return new, batch

    def _check_unused(self, name: str) -> None:
        left = sum(count for state, count in self.queue_counts[name].items() if state is not State.FINISHED)
        if name == DEFAULT_QUEUE:
            raise BadState(f"cannot delete queue {name}: it is where jobs go that name none, and it is always there")
        if left:
            raise BadState(f"cannot delete queue {name}: it holds {left} unfinished jobs, and delete needs one without")

    def queue_records(self) -> List[Dict[str, Any]]:
        """What GET /queues answers."""
        with self.lock:
            return [
                {**named.to_record(), "States": {s.value: n for s, n in self.queue_counts[named.name].items()}}
                for named in self.queues.values()
            ]

    # -- what follows from a change: dependents, and arrays that have failed too often

    def _judged_anew(self, ids: List[str]) -> Changes:
        """Those of these jobs that the present verdicts on their dependencies change."""
        verdicts: Dict[str, Optional[bool]] = {}  # thousands may wait for one array
        changes: Changes = []
        for job in [self.jobs[job_id] for job_id in ids]:
            if job.state is State.HELD and job.depend:
                for text in job.depend:
                    if text not in verdicts:
                        verdicts[text] = self._verdict(text)
                after = self._judged(job, verdicts)
                if after is not job:
                    changes.append((job, after))
        return changes

    def _judged(self, job: Job, verdicts: Dict[str, Optional[bool]]) -> Job:
        """A held job by the verdicts on its dependencies."""
        never = [text for text in job.depend if verdicts[text] is False]
        if never:
            words = f"{never[0]} can never be met: {self._target_words(never[0])}"
            over = dict(status="failed", exit_status=EXIT_DEPENDENCY, end_time=self.clock(), comment=words)
            return self._moved(job, "abort", **over)
        left = [text for text in job.depend if verdicts[text] is None]
        if left == job.depend:
            return job
        job = job.but(depend=left)
        if left or job.hold:
            return job.but(comment=_hold_words(job))
        return self._made_ready(job, "release")

    def _verdict(self, text: str) -> Optional[bool]:
        kind, thing = text.partition(":")[0], self._target(text)
        if thing is None:
            return False
        if isinstance(thing, Array):
            good, all_of_them = thing.statuses.get("finished", 0), len(thing.members)
            begun = thing.begun == all_of_them if kind == "after" else thing.begun > 0
            bad = thing.states[State.FINISHED] > good
            return dependency_verdict(kind, thing.is_over, begun, good == all_of_them, bad)
        over, good = thing.state is State.FINISHED, thing.status == "finished"
        begun = thing.run_count > 0 or (over and thing.start_time is not None)  # the original counts no runs
        return dependency_verdict(kind, over, begun, good, over and not good)

    def _target(self, text: str) -> Optional[Union[Job, Array]]:
        """What a dependency waits for; None if it is not there, as may be in a database by hand."""
        try:
            return self._find(text.partition(":")[2])
        except UnknownJob:
            return None

    def _target_words(self, text: str) -> str:
        thing = self._target(text)
        if thing is None:
            return "there is no such job"
        if isinstance(thing, Array):
            ends = ", ".join(f"{count} {status}" for status, count in thing.statuses.items() if count)
            return f"of array {_label(thing)} {ends}"
        ran = f"has {thing.status}" if thing.status in ("finished", "failed") else f"ended as {thing.status}"
        return f"job {thing} {ran}" + ("" if thing.run_count else " and never ran")

    def _consequences(self, changes: Changes) -> Changes:
        """What follows at once from some changes: arrays that have failed too often now are aborted, dependencies that
        are decided now are acted upon."""
        arrays: Dict[int, None] = {}
        ids: Dict[str, None] = {}
        texts: Dict[str, None] = {}
        for _, new in changes:
            if isinstance(new, ArraySpec):
                arrays[new.number] = None
            for job in new.jobs if isinstance(new, NewArray) else [new] if type(new) is Job else []:
                if job.state is State.HELD and job.depend:
                    ids[job.id] = None
                elif job.state in (State.RUNNING, State.FINISHED):
                    if job.index is not None and _has_failed(job):
                        arrays[job.number] = None
                    for target in (str(job), f"{job.number}[]") if job.index is not None else (str(job),):
                        texts.update(dict.fromkeys(self.awaited.get(target, ())))
        for text in texts:
            if self._verdict(text) is not None:
                ids.update(self.awaited[text.partition(":")[2]][text])
        aborted = [change for number in arrays for change in self._fails_over_limit(self.arrays[number])]
        for job, _ in aborted:
            ids.pop(job.id, None)
        return aborted + self._judged_anew(list(ids))

    def _fails_over_limit(self, array: Array) -> Changes:
        """The end of all other subjobs of an array that has failed too often."""
        limit = array.spec.max_fails
        if not limit or array.failed < limit or array.is_over:
            return []
        jobs = [self.jobs[job_id] for job_id in array.members.values()]
        return [
            (job, self._aborted(job, array))
            for job in jobs
            if job.state is not State.FINISHED and job.signal != "abort"
        ]

    def _aborted(self, job: Job, array: Array) -> Job:
        if job.state is State.RUNNING:
            return self._moved(
                job, "abort", signal="abort", comment=f"{_aborted_words(job)}: {job.host} is told to end it"
            )
        over = dict(status="failed", exit_status=EXIT_ABORTED, end_time=self.clock(), comment=_aborted_words(job))
        return self._moved(job, "abort", **over)

    def _commit_all(self, changes: Changes) -> Optional[Batch]:
        """Makes changes that nobody asked for, and tells whoever waits for such."""
        if not changes:
            return None
        batch = self._commit({"Put": [after.to_record() for _, after in changes]}, changes)
        self._tell(changes)
        return batch

    def _tell(self, changes: Changes) -> None:
        """Wakes whoever has been waiting for what the jobs have become."""
        self._wake([after for _, after in changes if after.state is State.QUEUED])
        for _, after in changes:
            self._wake_next(after)
            self._tell_watchers(after)
        for host in {after.host for _, after in changes if after.state is State.RUNNING}:
            self._wake_host(host)

    def tick(self) -> None:
        """Everything that only time causes: leases that end, jobs whose start time has come, nodes that fall silent."""
        changes: Changes = []
        with self.lock:
            self._mind_clock()
            moment = self.clock()
            due: Dict[str, None] = {}
            while self.alarms and self.alarms[0][0] <= moment:
                due[heapq.heappop(self.alarms)[1]] = None
            for job_id in due:
                job = self.jobs.get(job_id)
                if job is None:
                    continue
                if job.state is State.WAITING and (job.start_after or 0) <= moment:
                    changes.append((job, self._made_ready(job, "ready")))
                elif job.state is State.RUNNING and job.expiry is not None:
                    if self._is_being_named(job):
                        job = self._put(job, job.but(expiry=self._renewed(moment)))
                    if job.expiry is None:
                        continue  # renewed, and since the server's start leases never end
                    if job.expiry > moment:  # renewed since the alarm was set
                        heapq.heappush(self.alarms, (job.expiry, job_id))
                    else:
                        changes.append((job, self._expired(job)))
            batch = self._commit_all(changes)
            for job_id in [job_id for job_id, followed in self.followed.items() if followed.until < time.monotonic()]:
                del self.followed[job_id]
            for node in self.nodes.values():
                self._watch_node(node, moment)
            if moment >= self.tidy_at:
                self._tidy(moment)
        self.store.wait(batch)

    def _mind_clock(self) -> None:
        """If somebody has set the clock, what counts seconds from now on is set with it: no lease ends early for it, or
        lives longer.  What people asked for by the clock stays as it is.  The caller holds the lock."""
        ahead = self.clock() - self.steady()
        jump, self.ahead = ahead - self.ahead, ahead
        if abs(jump) <= CLOCK_JUMP:
            return
        log.warning("queue.clock seconds=%+.0f: the clock was set; leases go on as if it had not been", jump)
        for job in [self.jobs[job_id] for ids in self.leased.values() for job_id in ids]:
            if job.expiry is not None:
                self._put(job, job.but(expiry=round(job.expiry + jump, 6)))
        for job in [self.jobs[job_id] for job_id in {i for _, i in self.alarms} if job_id in self.jobs]:
            start, latest = job.start_after or 0, self.clock() - jump + RETRY_LAST
            if job.state is State.WAITING and job.retried and start <= latest:  # a pause of ours, before a retry
                self._put(job, job.but(start_after=round(start + jump, 6)))
        for node in self.nodes.values():
            node.last_seen += jump
        for end in self.ends:
            end[0] += int(jump // 60)
        self.tidy_at += jump
        self.started += jump

    def _tidy(self, moment: float) -> None:
        """Once an hour: forgets heaps in which nothing waits any more, and clients that nobody has heard of for long."""
        self.tidy_at = moment + 3600
        self.ready = {need: heap for need, heap in self.ready.items() if self._has_head(need, heap)}
        self._forget_nodes(moment - NODE_FORGOTTEN)

    def _forget_nodes(self, before: float) -> None:
        """Forgets the clients that have been silent since then, and have nothing here."""
        for key, node in list(self.nodes.items()):
            used = node.polls or node.host in self.marks or node.host in self.leased
            if not used and node.last_seen < before:
                del self.nodes[key]
        hosts = {node.host for node in self.nodes.values()}
        for by_host in (self.refusals, self.misstarts):
            for host in by_host.keys() - hosts:
                del by_host[host]  # type: ignore[attr-defined]

    def _is_being_named(self, job: Job) -> bool:
        """True while a request is held open that names the job's lease."""
        return bool(job.lease) and any(
            node.polls and node.named.get(job.id) == job.lease for node in self.nodes.values() if node.host == job.host
        )

    def _expired(self, job: Job) -> Job:
        """A running job whose lease is over: nobody has reported it."""
        log.warning("job.expired job=%s host=%s run=%d", job, job.host, job.run_count)
        if job.signal in ("delete", "abort"):
            return self._ended_as_told(job, f"deleted; {job.host} has not reported its end")
        if not job.rerunable:
            return self._lost(job, f"{job.host} was not heard of until the lease ended, and the job must not run twice")
        words = f"{job.host} was not heard of until the lease ended: queued again"
        return self._requeued(job, words, lease=job.lease)

    def _ended_as_told(self, job: Job, comment: str) -> Job:
        """A running job that was to be ended, and is, or is taken to be."""
        over = dict(status="deleted", comment=comment, signal="")
        if job.signal == "abort":
            over.update(status="failed", exit_status=EXIT_ABORTED, comment=_aborted_words(job))
        return self._moved(job, "end", end_time=self.clock(), **over)

    def _lost(self, job: Job, comment: str) -> Job:
        over = dict(status="lost", exit_status=EXIT_LOST, comment=comment, signal="")
        return self._moved(job, "lose", end_time=self.clock(), **over)

    def _watch_node(self, node: Node, moment: float) -> None:
        silent = node.stopped or (not node.polls and moment - node.last_seen > self.node_timeout)
        if silent and not node.down:
            log.warning("node.down host=%s silent=%d", node.host, moment - node.last_seen)
        node.down = silent

    # -- jobs that leave the queue

    def forget(self, jobs: List[Job]) -> Tuple[List[Job], Optional[Batch]]:
        """Takes finished jobs out, and arrays with their last subjob; what has changed meanwhile, or others wait for,
        stays.  Returns those that went."""
        with self.lock:
            gone = [job for job in jobs if self.jobs.get(job.id) is job and not self._is_needed(job)]
            if not gone:
                return [], None
            changes = self._forgotten(gone)
            batch = self._commit({"Forget": [job.id for job in gone]}, changes)
        return gone, batch

    def _is_needed(self, job: Job) -> bool:
        """True of a job that is not over, and of one that others wait for."""
        names = (str(job), f"{job.number}[]") if job.index is not None else (str(job),)
        return job.state is not State.FINISHED or any(name in self.awaited for name in names)

    def _forgotten(self, jobs: List[Job]) -> Changes:
        changes: Changes = [(job, None) for job in jobs]
        for number, count in collections.Counter(job.number for job in jobs if job.index is not None).items():
            if count == len(self.arrays[number].members):
                changes.append((self.arrays[number].spec, None))
        for job in jobs:
            self.lent.pop(job.id, None)
        return changes

    def _replay_forget(self, ids: List[str]) -> None:
        jobs = [self.jobs[job_id] for job_id in ids]
        for old, new in self._forgotten(jobs):
            self._put(old, new)
        self.store.forget_outputs(jobs)

    # -- the pictures people ask for

    def find(self, name: str) -> Union[Job, Array]:
        """The job, or array, that goes by a Number, `17[3]`, `17[]`, a UUID or the beginning of just one; raises
        UnknownJob."""
        with self.lock:
            return self._find(name)

    def _find(self, name: str) -> Union[Job, Array]:
        words = _JOB_NAME.match(name)
        if words:
            number, index = int(words.group(1)), words.group(3)
            array = self.arrays.get(number)
            if array and not index:
                return array
            if array and index.isdigit() and len(index) < 10 and int(index) in array.members:
                return self.jobs[array.members[int(index)]]
            if not words.group(2) and number in self.numbers:
                return self.jobs[self.numbers[number]]
        job = self.jobs.get(name)
        return job if job else self._find_by_prefix(name)

    def _find_by_prefix(self, name: str) -> Union[Job, Array]:
        text = name.lower()
        if text in self.array_ids:
            return self.arrays[self.array_ids[text]]
        # subjobs have the beginning of their array's ID: it stands for the array
        ids = [i for i in self.jobs if i.startswith(text) and self.jobs[i].index is None] if len(name) >= 4 else []
        arrays = [i for i in self.array_ids if i.startswith(text)] if len(name) >= 4 else []
        if len(ids) + len(arrays) > 1:
            raise UnknownJob(f"{len(ids) + len(arrays)} jobs have an ID that begins with {name}: type more of it")
        if arrays:
            return self.arrays[self.array_ids[arrays[0]]]
        if not ids:
            raise UnknownJob(f"there is no job {name}: {self._why_unknown(name)}")
        return self.jobs[ids[0]]

    def _why_unknown(self, name: str) -> str:
        words = _JOB_NAME.match(name)
        number = int(words.group(1)) if words else 0
        if number in self.numbers:
            return f"{number} is no array"
        if 0 < number < self.next_number and number not in self.arrays:
            return "it is over and has left the database (--keep-finished)"
        return "qstat -x lists all there are"

    def _all_of_name(self, name: str) -> List[Job]:
        """The job of a name, or all those of an array or a range of one; raises UnknownJob."""
        if not _is_range(name):
            thing = self._find(name)
            return self._all_of(thing.spec.number) if isinstance(thing, Array) else [thing]
        words = _JOB_NAME.match(name)
        array = self.arrays.get(int(words.group(1)))  # type: ignore[union-attr]
        if array is None:
            raise UnknownJob(f"there is no array {name}: qstat -x lists all there are")
        wanted = parse_indices(words.group(3))  # type: ignore[union-attr]
        found = [self.jobs[array.members[index]] for index in wanted if index in array.members]
        if not found:
            raise UnknownJob(
                f"array {_label(array)} has none of the subjobs {name}: its indices are {array.spec.indices}"
            )
        return found

    def _all_of(self, number: int) -> List[Job]:
        """The job of a Number, or all subjobs."""
        array = self.arrays.get(number)
        return [self.jobs[i] for i in (array.members.values() if array else [self.numbers[number]])]

    def wait_for_end(self, name: str, seconds: float) -> Union[Job, Array]:
        """The job or array, once it is finished or the time is over; raises UnknownJob, Stopping."""
        with self.lock:
            thing, event = self._find(name), threading.Event()
            if _is_over(thing) or seconds <= 0:
                return thing
            self._refuse_waiting()
            key = thing.id if isinstance(thing, Job) else thing.spec.id
            self.watchers.setdefault(key, []).append(event)
        event.wait(seconds)
        with self.lock:
            waiting = self.watchers.get(key, [])
            if event in waiting:
                waiting.remove(event)
            if not waiting:
                self.watchers.pop(key, None)
            return self._find(name)

    def _tell_watchers(self, job: Job) -> None:
        if not self.watchers or job.state is not State.FINISHED:
            return
        for event in self.watchers.get(job.id, ()):
            event.set()
        array = self.arrays.get(job.number) if job.index is not None else None
        for event in self.watchers.get(array.spec.id, ()) if array and array.is_over else ():
            event.set()

    def why_queued(self, job: Job) -> str:
        """Why a queued job does not run yet, for a person; "" if it is not queued any more."""
        with self.lock:
            return self._why_queued(job) if self.jobs.get(job.id) is job else ""

    def _why_queued(self, job: Job) -> str:
        need, nodes = self._need(job), [node for node in self.nodes.values() if not node.down]
        up, reasons = [node for node in nodes if self._takes_jobs(node)], self._limit_words(need)
        fitting = [node for node in up if need.fits(node, max(node.slots, 1))]
        if not up:
            reasons.append(_not_now("that is connected", nodes) if nodes else "no client is connected")
        elif not fitting:
            reasons += self._unmet(need, up, nodes) or ["no client has all that it needs together"]
        elif not reasons and any(node.host not in need.failed_on for node in fitting) and need.failed_on:
            reasons.append(f"waits for a free slot on another client than {', '.join(need.failed_on)}, where it failed")
        return "; ".join(reasons) or "waits for a free slot"

    @staticmethod
    def _unmet(need: Need, up: List[Node], connected: List[Node]) -> List[str]:
        """Which of a job's needs no client meets that takes jobs, each in words."""
        found = []
        if max(max(node.slots, 1) for node in up) < need.ncpus:
            found.append(f"needs {need.ncpus} slots: no client has so many")
        for word in need.requires:
            if not any(word in node.properties for node in up):
                having = [node for node in connected if word in node.properties]
                found.append(f"needs {word}: {_not_now('that has it', having) if having else 'no client has it'}")
        if all(node.queues is not None and need.queue not in node.queues for node in up):
            found.append(f"no client serves queue {need.queue}")
        if all(node.host in need.refused_by for node in up):
            found.append(f"needs a client other than {', '.join(need.refused_by)}: there is none")
        if not need.plain and all(node.original for node in up):
            found.append("needs a client of this version: there is none")
        return found

    def array_record(self, array: Array) -> Dict[str, Any]:
        """An array for a listing: what its subjobs have in common as it was submitted, what was altered of them since as
        it is of the first that is not over, and why that does not run."""
        with self.lock:
            jobs = map(self.jobs.__getitem__, array.members.values())
            first = next((job for job in jobs if job.state in _READY_BY), None)
            record = array.to_record()
            if first is None:
                return record
            now_so = first.public()
            record.update({key: now_so[key] for key in _ALTERED_OF_ARRAYS if key in now_so})
            why = self._why_queued(first) if first.state is State.QUEUED else ""
            record["Comment"] = "; ".join(filter(None, [first.comment, why]))
            return record

    def picture(self) -> List[Job]:
        """Every job at one moment."""
        with self.lock:
            return list(self.jobs.values())

    def status(self) -> Dict[str, Any]:
        """What GET /status answers."""
        with self.lock:
            minute, nodes = (
                int(self.clock() // 60),
                collections.Counter(self._node_record(node)["State"].split(",")[0] for node in self.nodes.values()),
            )
            return {
                "Version": VERSION,
                "StartTime": format_time(self.started),
                "Uptime": round(self.clock() - self.started, 3),
                "Database": self.store.path,
                "Jobs": len(self.jobs),
                "States": {state.value: count for state, count in self.counts.items()},
                "Statuses": dict(self.statuses),
                "Nodes": {"free": 0, "job-busy": 0, "offline": 0, "down": 0, **nodes},
                "Rates": {
                    "LastMinute": sum(count for at, count in self.ends if at >= minute - 1),
                    "LastHour": sum(count for at, count in self.ends if at >= minute - 60),
                },
            }

    def node_records(self) -> List[Dict[str, Any]]:
        """What GET /nodes answers: every client seen since the start, and those that have jobs."""
        with self.lock:
            records = [self._node_record(node) for node in self.nodes.values()]
            for record in records:
                record["Jobs"] = [str(self.jobs[job_id]) for job_id in self.leased.get(record["Host"], ())]
        return sorted(records, key=lambda record: record["Host"])

    def _node_record(self, node: Node) -> Dict[str, Any]:
        # of two that go by one name each has the runs that it names
        running = len(node.named) if node.alike else len(self.leased.get(node.host, ()))
        return node.to_record(running, self.marks.get(node.host))

    # -- under the lock: nodes, and how a job changes

    def _node(self, host: str, client: str, original: bool) -> Node:
        self._mind_clock()
        node = self.nodes.get((host, client))
        if node is None:
            if len(self.nodes) >= MOST_NODES:  # a tenth at once, since it takes a look at all
                self._forget_nodes(sorted(node.last_seen for node in self.nodes.values())[MOST_NODES // 10])
            node = self.nodes[host, client] = Node(host, client, original)
            node.first_seen = self.clock()
            log.info("node.new host=%s original=%s", host, original)
        if node.down:
            log.info("node.back host=%s", host)
        node.original, node.down, node.last_seen = original, False, self.clock()
        if client and len(self.nodes) > 1:
            self._tell_apart(node)
        return node

    def _tell_apart(self, node: Node) -> None:
        """Notices two clients that live at the same time under one name."""
        alike = [
            other
            for other in self.nodes.values()
            if other.host == node.host
            and other.client not in ("", node.client)
            and not other.down
            and other.last_seen > node.first_seen
            and node.last_seen > other.first_seen
        ]
        before, node.alike = node.alike, ""
        if alike:
            machines = " and ".join(sorted({str(other.info.get("Machine") or "?") for other in [node] + alike}))
            node.alike = f"{len(alike) + 1} clients go by the name {node.host} (machines {machines}): give each its own --hostname"
            if not before:
                log.warning("node.alike host=%s: %s", node.host, node.alike)

    def _moved(self, job: Job, event: str, **changes: Any) -> Job:
        """The job after an event of the transition table; raises BadState if it leads nowhere."""
        return job.but(state=next_state(job, event), **changes)

    def _noted(self, job: Job, words: str) -> Job:
        """The job with one more line in its history, the time being now."""
        return job.but(history=job.history[1 - MAX_HISTORY :] + [[format_time(self.clock()), words]])

    def _requeued(self, job: Job, comment: str, lease: str = "", ended: bool = False, **changes: Any) -> Job:
        """A running job back in the queue; over instead if it was to be ended; held instead if its run never `ended` and
        it was started too often to go on like that."""
        if job.signal in ("delete", "abort"):
            return self._ended_as_told(job, "deleted while it ran")
        if job.signal == "rerun":  # a person wants another run than this one and those before, also where it comes back
            lease, changes = "", {**changes, "earlier": []}
        words = dict(
            comment=comment, lease=lease, host="", client="", expiry=None, signal="", queue_time=self.clock(), **changes
        )
        queued = self._moved(self._noted(job, f"{_run_words(job)}; {comment}"), "requeue", **words)
        if job.run_count and job.run_count % MAX_STARTS == 0 and not ended and "run_count" not in changes:
            held = dict(hold=True, comment=f"held after {job.run_count} starts, this one without an end: {comment}")
            return self._moved(queued, "hold", **held)
        return self._rested(queued, comment)

    def _commit_put(self, old: Job, new: Job) -> Batch:
        return self._commit({"Put": [new.to_record()]}, [(old, new)])

    def _commit(self, entry: Dict[str, Any], changes: Changes) -> Batch:
        """Makes changes here and hands them to the journal; to be waited for outside the lock."""
        for old, new in changes:
            (self._put_job if type(new) is Job else self._put)(old, new)
        return self._record(entry, changes)

    def _record(self, entry: Dict[str, Any], changes: Changes) -> Batch:
        """Makes true what follows from changes that have been made, what follows from that, and so on, and hands all of
        it to the journal as one line, so that the disk never holds one without the other.  Raises Stopping or BadRequest
        for what cannot be written, having taken it all back."""
        everything = list(changes)
        step: Changes = changes
        try:
            while step and (self.awaited or self.arrays):  # else nothing can follow
                step = self._consequences(step)
                for old, new in step:
                    self._put(old, new)
                everything += step
            followed = everything[len(changes) :]
            if followed:
                entry = {**entry, "Put": entry.get("Put", []) + [after.to_record() for _, after in followed]}
            batch = self.store.append(entry, everything)
        except JobrunnerError:
            for old, new in reversed(everything):
                self._put(new, old)
            raise
        if followed:
            self._tell(followed)
        return batch

    def _undo(self, take: Callable[[], Changes]) -> None:
        """Puts back what could not be written, latest first."""
        with self.lock:
            changes = take()
            for old, new in reversed(changes):
                self._put(new, old)
            there = [self.jobs[old.id] for old, _ in changes if type(old) is Job and old.id in self.jobs]
            self._wake([job for job in there if job.state is State.QUEUED])

    def _put(self, old: Any, new: Any) -> Any:
        """Replaces a job, an array, a named queue or a host's mark (None: there was none, there is none) and everything
        that follows from it: the only place.  Returns the new one."""
        if type(new or old) is Job:
            return self._put_job(old, new)
        if isinstance(new or old, Mark):
            return self._put_mark(old, new)
        if isinstance(new or old, NewArray):
            return self._put_new_array(old, new)
        if isinstance(new or old, ArraySpec):
            return self._put_array(old, new)
        return self._put_queue(old, new)

    def _put_job(self, old: Optional[Job], new: Optional[Job]) -> Optional[Job]:
        if old:
            self._uncount(old)
        if new is None:
            if old:
                del self.jobs[old.id]
                self._known_by_number(old).pop(old.number if old.index is None else old.index, None)
            return None
        self.jobs[new.id] = new
        if old is None or old.number != new.number:
            self._known_by_number(new)[new.number if new.index is None else new.index] = new.id
        if new.queue not in self.queues:
            self._meet_queue(new)
        self._count(new)
        if new.state is State.QUEUED:
            entry, need = _order(new), self._need(new)
            if old is None or old.state is not State.QUEUED or _order(old) != entry or self._need(old) != need:
                heap = self.ready.setdefault(need, [])
                heapq.heappush(heap, entry)
                if len(heap) > 2 * self.counts[State.QUEUED] + MOST_STALE:
                    _sift(heap, lambda entry: self._waits_here(need, entry))
        elif new.state is State.RUNNING:
            self.leased.setdefault(new.host, {})[new.id] = None
            # a lease that is renewed needs no alarm of its own: the one there is asks again when it goes off
            before = old.expiry if old and old.state is State.RUNNING else None
            if new.expiry is not None and (before is None or new.expiry < before):
                self._set_alarm(new.expiry, new.id)
        elif new.state is State.WAITING:
            if old is None or old.state is not State.WAITING or old.start_after != new.start_after:
                self._set_alarm(new.start_after or 0, new.id)
        elif new.state is State.HELD:
            if new.refused_by and not new.hold and not new.depend:
                self.refused[new.id] = None
            for text in new.depend:
                target = text.partition(":")[2]
                self.awaited.setdefault(target, {}).setdefault(text, {})[new.id] = None
        elif old is not None:
            self._count_end()
        return new

    def _set_alarm(self, moment: float, job_id: str) -> None:
        heapq.heappush(self.alarms, (moment, job_id))
        if len(self.alarms) > 2 * (self.counts[State.RUNNING] + self.counts[State.WAITING]) + MOST_STALE:
            _sift(self.alarms, self._is_set)

    def _is_set(self, alarm: Tuple[float, str]) -> bool:
        """False for an alarm that has nothing to wake: its job is over, say, or waits for another time."""
        job = self.jobs.get(alarm[1])
        waits = job is not None and job.state is State.WAITING and (job.start_after or 0) == alarm[0]
        return waits or (job is not None and job.state is State.RUNNING)

    def _meet_queue(self, job: Job) -> None:
        """A queue that the database says nothing of: it is by hand, or by a version that knew no queues; or the queue
        has been deleted since the job was over."""
        self.queue_counts.setdefault(job.queue, {state: 0 for state in State})
        if job.state is not State.FINISHED:
            self._put_queue(None, NamedQueue(job.queue))

    def _known_by_number(self, job: Job) -> Dict[int, str]:
        """Where a job's ID is found by its Number, or by its Index; a subjob of an array that is not there makes one."""
        if job.index is None:
            return self.numbers
        if job.number not in self.arrays:
            self._put_array(None, ArraySpec(job.number, _new_id(), str(job.index), 0, 0, job))
        return self.arrays[job.number].members

    def _count(self, job: Job) -> None:
        self.counts[job.state] += 1
        self.queue_counts[job.queue][job.state] += 1
        if job.index is not None:
            self.arrays[job.number].count(job, 1)
        if job.state is State.FINISHED:
            self.statuses[job.status] = self.statuses.get(job.status, 0) + 1

    def _uncount(self, old: Job) -> None:
        self.counts[old.state] -= 1
        self.queue_counts[old.queue][old.state] -= 1
        if old.index is not None:
            self.arrays[old.number].count(old, -1)
        if old.state is State.RUNNING:
            ids = self.leased[old.host]
            del ids[old.id]
            if not ids:
                del self.leased[old.host]
        elif old.state is State.FINISHED:
            self.statuses[old.status] -= 1
        elif old.state is State.HELD:
            self.refused.pop(old.id, None)
            for text in old.depend:
                self._no_longer_awaited(text, old.id)

    def _no_longer_awaited(self, text: str, job_id: str) -> None:
        target = text.partition(":")[2]
        texts = self.awaited.get(target, {})
        waiting = texts.get(text, {})
        waiting.pop(job_id, None)
        if not waiting:
            texts.pop(text, None)  # which a record that says it twice has taken out already
        if not texts:
            self.awaited.pop(target, None)

    def _put_new_array(self, old: Optional[NewArray], new: Optional[NewArray]) -> Optional[NewArray]:
        """As `_put_job` for each subjob, but that what they have in common is done once: there may be a million."""
        if new is None:
            for job in old.jobs if old else ():
                self._put_job(job, None)
            self._put_array(old.spec if old else None, None)
            return None
        self._put_array(None, new.spec)
        array, jobs, ids = self.arrays[new.spec.number], new.jobs, [job.id for job in new.jobs]
        self.jobs.update(zip(ids, jobs))
        array.members.update((job.__dict__["index"], job.id) for job in jobs)
        state, queue = jobs[0].state, jobs[0].queue
        for counts in (self.counts, self.queue_counts[queue], array.states):
            counts[state] += len(jobs)
        if state is State.QUEUED:
            heap = self.ready.setdefault(self._need(jobs[0]), [])
            for entry in map(_order, jobs):
                heapq.heappush(heap, entry)
        elif state is State.WAITING:
            for job in jobs:
                heapq.heappush(self.alarms, (job.start_after or 0, job.id))
        else:
            for text in jobs[0].depend:
                self.awaited.setdefault(text.partition(":")[2], {}).setdefault(text, {}).update(dict.fromkeys(ids))
        return new

    def _put_array(self, old: Optional[ArraySpec], new: Optional[ArraySpec]) -> Optional[ArraySpec]:
        if new is None:
            if old:
                del self.arrays[old.number], self.array_ids[old.id]
                self.ready = {need: heap for need, heap in self.ready.items() if need.array != old.number}
        elif old is None:
            self.arrays[new.number] = Array(new)
            self.array_ids[new.id] = new.number
        else:
            array = self.arrays[new.number]
            array.spec = new
            if bool(old.max_running) != bool(new.max_running):  # its subjobs wait in another heap from now on
                for job in [self.jobs[job_id] for job_id in array.members.values()]:
                    if job.state is State.QUEUED:
                        heapq.heappush(self.ready.setdefault(self._need(job), []), _order(job))
        return new

    def _put_mark(self, old: Optional[Mark], new: Optional[Mark]) -> Optional[Mark]:
        if new:
            self.marks[new.host] = new
        elif old:
            del self.marks[old.host]
        return new

    def _put_queue(self, old: Optional[NamedQueue], new: Optional[NamedQueue]) -> Optional[NamedQueue]:
        if new is None:
            if old:
                del self.queues[old.name]
                self.ready = {need: heap for need, heap in self.ready.items() if need.queue != old.name}
        else:
            self.queues[new.name] = new
            self.queue_counts.setdefault(new.name, {state: 0 for state in State})
        return new

    def _count_end(self) -> None:
        minute = int(self.clock() // 60)
        if not self.ends or self.ends[-1][0] != minute:
            self.ends.append([minute, 0])
            while self.ends[0][0] < minute - 60:
                self.ends.popleft()
        self.ends[-1][1] += 1

    def _wake(self, jobs: List[Job]) -> None:
        """Wakes a waiting client for each job that became ready: one that can run it, and no more than there is work."""
        if not jobs:
            return
        waiting = [
            (node, poll)
            for node in self.nodes.values()
            for poll in node.polls
            if poll.slots > 0 and not poll.superseded and not poll.wake.is_set() and node.host not in self.marks
        ]
        for job in jobs if waiting else ():
            need = self._need(job)
            for node, poll in waiting:
                if (
                    job.state is State.QUEUED
                    and need.fits(node, poll.slots)
                    and not (need.failed_on and self._others_first(need, node))
                ):
                    poll.wake.set()
                    waiting.remove((node, poll))
                    break
            if not waiting:
                return

    def _wake_next(self, job: Job) -> None:
        """Wakes a client for the job that may run now that this one does not any more: only where a limit kept it back,
        since whoever has a free slot asks anyway."""
        if job.state is State.RUNNING:
            return
        array = job.number if job.index is not None and self.arrays[job.number].spec.max_running else 0
        named = self.queues.get(job.queue)  # none, if it was deleted since the job was over
        if not array and not (named and named.max_run):
            return
        for need, heap in self.ready.items():
            if (need.array == array if array else need.queue == job.queue) and self._has_head(need, heap):
                self._wake([self.jobs[heap[0][3]]])

    def _wake_host(self, host: str) -> None:
        """There is something to say to the clients of that name."""
        for node in self.nodes.values():
            for poll in node.polls if node.host == host else ():
                poll.wake.set()

    def _wake_all(self) -> None:
        """Rules have changed: whoever waits is to look again."""
        for node in self.nodes.values():
            for poll in node.polls:
                poll.wake.set()


# What the lines of a journal hold, and what makes them true again; within one line in this order.
_REPLAYED: Dict[str, Callable[[Queue, Any], Any]] = {
    "Queue": Queue._replay_queue,
    "DropQueue": Queue._replay_drop,
    "Mark": lambda queue, records: [queue._replay_mark(record) for record in records],
    "Clear": lambda queue, hosts: [queue._replay_clear(host) for host in hosts],
    "Arrays": Queue._replay_arrays,
    "Limits": Queue._replay_limits,
    "Put": Queue._replay_put,
    "Forget": Queue._replay_forget,
    "Sample": Queue._replay_sample,
}

LIMITS = ("Runtime", "Memory", "CpuTime")
_ALTERED_OF_ARRAYS = (
    "Name",
    "Queue",
    "Priority",
    "Runtime",
    "Memory",
    "CpuTime",
    "Ncpus",
    "Requires",
    "Depend",
    "Hold",
)
ARRAY_LIMITS = {"MaxRunSubjobs": "max_running", "MaxFails": "max_fails"}
ALTERABLE_RUNNING = ("Runtime", "Memory", "CpuTime", "Priority")
ALTERABLE = (
    *ALTERABLE_RUNNING, "Name", "Ncpus", "Requires", "StartAfter", "Rerunable", "Retries", "StdOut", "StdErr", "Join",
    "Depend", "Hold", "Env", "WorkDir", "Shell", "Account", "MailPoints", "MailUsers", *ARRAY_LIMITS,
)  # fmt: skip
_WHAT_RUNS = frozenset(("Env", "WorkDir", "Shell"))  # those of them that make another result

# What a Need is made of, and that of a job which has none of it: what is at its default is not in a job's dictionary.
_NEED_FIELDS = frozenset(
    ("index", "ncpus", "requires", "refused_by", "queue", "failed_on", "env", "workdir", "stdout", "stderr", "join",
     "script", "fill", "memory", "cputime")
)  # fmt: skip
_NO_NEED = Need(True, 1, (), (), DEFAULT_QUEUE, 0, ())

# The event that makes a job of these states ready to run.
_READY_BY = {State.QUEUED: "", State.HELD: "release", State.WAITING: "ready"}

# What a job begins its next run without.
_NEW_RUN: Dict[str, Any] = {
    name: getattr(Job, name)
    for name in ("cpu_used", "mem_used", "sample_seconds", "sample_skipped", "cpu_time_used", "max_mem")
}
# And what it begins anew without.
_NEVER_RAN: Dict[str, Any] = {
    **_NEW_RUN,
    **{
        name: getattr(Job, name)
        for name in (
            "status",
            "exit_status",
            "end_time",
            "retried",
            "failed_on",
            "signal",
            "lease",
            "earlier",
            "client",
            "host",
            "expiry",
        )
    },
}


class Selection(NamedTuple):
    """Jobs that a person means: by name, and by what they have in common.

    filter  what all jobs are tried with; None = only those named
    words   what it asks, for a person
    """

    names: List[str]
    filter: Optional[Callable[[Job], bool]] = None
    words: str = ""


_JOB_NAME = re.compile(
    r"(\d{1,18})(\[([\d,:-]{0,1000})\])?(?:\.[\w.-]+)?\Z", re.ASCII
)  # as in PBS, `.server` may follow


def _is_range(name: str) -> bool:
    """True for `17[1-9]`."""
    words = _JOB_NAME.match(name)
    return bool(words and words.group(3) and not words.group(3).isdigit())


def _not_now(which: str, nodes: List[Node]) -> str:
    """Why none of these clients takes a job that they could run."""
    pauses = "; ".join(sorted({f"{node.host}: {node.pause}" for node in nodes if node.pause}))
    offline = "" if all(node.pause for node in nodes) else "is offline"
    return f"every client {which} " + " or ".join(filter(None, [offline, pauses and f"takes no jobs now ({pauses})"]))


def _stop_signal(job_id: str, job: Job) -> Dict[str, Any]:
    """What a client is told of a run whose lease is not its job's."""
    signal: Dict[str, Any] = {"ID": job_id, "Signal": "delete"}
    if job.state is State.RUNNING:
        signal["Comment"] = f"the job runs on {job.host}, whose run is the one that counts"
    return signal


def _with_earlier(job: Job) -> List[List[str]]:
    """The job's `earlier`, with the run that was given up last: whoever had it may come back."""
    return (job.earlier + [[job.lease, format_time(job.start_time or 0)]])[-MAX_EARLIER:]


def _label(thing: Union[Job, Array]) -> str:
    """What people type: `17`, `17[3]`, `17[]`."""
    return f"{thing.spec.number}[]" if isinstance(thing, Array) else str(thing)


def _is_over(thing: Union[Job, Array]) -> bool:
    return thing.is_over if isinstance(thing, Array) else thing.state is State.FINISHED


def _limits(job: Job) -> List[int]:
    return [job.runtime, job.memory, job.cputime]


def _has_failed(job: Job) -> bool:
    """True of a job that ended badly by itself."""
    good = job.status in ("finished", "deleted") or job.exit_status == EXIT_ABORTED
    return job.state is State.FINISHED and not good


def _limits_of(spec: ArraySpec) -> List[int]:
    return [spec.number, spec.max_running, spec.max_fails]


def _hold_words(job: Job) -> str:
    """Why a job is held."""
    if not job.hold and not job.depend:
        return job.comment
    return "held by " + " and ".join((["a person"] if job.hold else []) + job.depend)


def _aborted_words(job: Job) -> str:
    return f"aborted with its array {job.number}[], of which as many have failed as may"


def _run_words(job: Job) -> str:
    """A line of history for a run that is over."""
    if job.start_time is None:
        return f"was over without a run: {job.comment or job.status}"
    ended = f", {job.status} with exit status {jobrunner.exit_words(job.exit_status)}" if job.status else ""
    ended = f" until {format_time(job.end_time)}{ended}" if job.end_time is not None else ""
    return f"run {job.run_count} on {job.host} from {format_time(job.start_time)}{ended}"


def _check_queue_name(name: Any) -> str:
    if not isinstance(name, str) or not re.match(r"[A-Za-z_][\w.-]{0,63}\Z", name, re.ASCII):
        raise BadRequest(f"{name!r} is no name for a queue: use letters, digits, _, - and ., a letter first")
    return name


def _sift(heap: List[Any], holds: Callable[[Any], bool]) -> None:
    """Takes out of a heap what does not hold any more, and what is in it twice: jobs that are altered every minute
    would fill the memory in weeks."""
    heap[:] = {entry for entry in heap if holds(entry)}
    heapq.heapify(heap)


def _order(job: Job) -> Tuple[int, int, int, str]:
    """What jobs of one queue are sorted by: priority, Number, Index."""
    return (-job.priority, job.number, job.index or 0, job.id)


_random = random.Random()  # seeded by the system; an ID is no secret
_ID_MASK = 0xFFFFFFFF_FFFF_0FFF_3FFF_FFFFFFFFFFFF
_ID_VERSION = 0x00000000_0000_4000_8000_000000000000


def _new_id() -> str:
    """A random UUID (version 4); uuid.uuid4 takes five times as long."""
    digits = "%032x" % (_random.getrandbits(128) & _ID_MASK | _ID_VERSION)
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def tail_bytes(text: str) -> bytes:
    """The bytes of an output that travelled as text, where bytes that are no UTF-8 are halves of surrogate pairs."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # halves that stand for no byte: whoever sent them did not make them from an output
        return text.encode("utf-8", "replace")


_REPORT_KINDS: Dict[str, Any] = {
    "Lease": str,
    "Hostname": str,
    "ExitStatus": int,
    "Status": str,
    "Comment": str,
    "EndTime": str,
    "CpuTimeUsed": (int, float),
    "MaxMem": int,
    "StdOutTail": str,
    "StdErrTail": str,
    "StdOutSize": int,
    "StdErrSize": int,
    "Seconds": int,
}


def _piece(key: str, value: Any) -> Tuple[int, bytes]:
    """{"At","Text"} of a followed output; raises BadRequest."""
    if not isinstance(value, dict) or not isinstance(value.get("Text"), str):
        raise BadRequest(f'{key} must be a piece of output: {{"At": byte, "Text": text}}')
    at, data = value.get("At"), tail_bytes(value["Text"])
    if type(at) is not int or not 0 <= at < 1 << 62 or len(data) > OUTPUT_TAIL:
        raise BadRequest(f"{key} must have At, a byte's place in the file, and at most {OUTPUT_TAIL} bytes of Text")
    return at, data


class Wish(NamedTuple):
    """What a POST /request says."""

    host: str
    slots: int
    wait: float
    running: List[Tuple[str, str, str]]  # ID, Lease, the signal it knows of
    info: Dict[str, Any]
    number: int
    open: List[Any]
    limits: Dict[str, List[int]]  # by ID, as the client has them: Runtime, Memory, CpuTime
    seconds: Dict[str, float]  # by ID: how long the run has run
    follows: FrozenSet[str]  # IDs of those whose output it sends


def _not_too_many(things: List[Any]) -> List[Any]:
    """What one request of a client names; raises BadRequest if that is too much."""
    if len(things) > MOST_NAMED:
        raise BadRequest(f"a request names {MOST_NAMED} runs at most: send several")
    return things


def _host_name(value: Any) -> str:
    """The name that a client goes by, which the record of its job is to hold; raises BadRequest."""
    host = jobrunner._check_text("Hostname", UNKNOWN_HOST if value is None else value) or UNKNOWN_HOST
    if len(host) > MAX_HOST:
        raise BadRequest(f"Hostname is over {MAX_HOST} characters: give the client a shorter --hostname")
    return host


def _poll_wish(request: Any) -> Wish:
    """A POST /request, checked; raises BadRequest."""
    if not isinstance(request, dict):
        raise BadRequest("a request is a JSON object with Hostname and Slots")
    host, slots, wait = _host_name(request.get("Hostname")), request.get("Slots", 1), request.get("Wait", 0)
    running, info = request.get("Running") or [], request.get("Node") or {}
    number, open_polls = request.get("Poll", 0), request.get("Open") or []
    if type(slots) is not int or not 0 <= slots <= 1 << 20:
        raise BadRequest("Slots must be a whole number, 0 or more")
    if isinstance(wait, bool) or not isinstance(wait, (int, float)) or not 0 <= wait < 1e9:
        raise BadRequest("Wait must be a number of seconds, 0 or more")
    for things in (running, open_polls):
        _not_too_many(things if isinstance(things, list) else [])
    if not isinstance(running, list) or not all(isinstance(r, dict) and isinstance(r.get("ID"), str) for r in running):
        raise BadRequest('Running must be a list of {"ID","Lease"}')
    if not isinstance(info, dict) or type(number) is not int or not isinstance(open_polls, list):
        raise BadRequest("Node must be an object, Poll a whole number and Open a list of them")
    jobrunner.check_shown(info)
    jobrunner._check_text("Client", str(info.get("Client") or ""))
    named = [(r["ID"], str(r.get("Lease") or ""), str(r.get("Signal") or "")) for r in running]
    limits = {r["ID"]: r["Limits"] for r in running if isinstance(r.get("Limits"), list)}
    seconds = {r["ID"]: r["Seconds"] for r in running if type(r.get("Seconds")) in (int, float)}
    follows = frozenset(r["ID"] for r in running if r.get("Follow") is True)
    fixed = (host, slots, min(wait, LONGEST_POLL), named, info, number, open_polls)
    return Wish(*fixed, limits, seconds, follows)


# ---------------------------------------------------------------------------------------------------------------------
# Answers and routes: what each URL does with what was sent
# ---------------------------------------------------------------------------------------------------------------------


class Caller(NamedTuple):
    """Who asks: the role and the name of a token; the name is "" where there are no tokens."""

    role: str
    name: str


EVERYBODY = Caller("submit", "")


class Forbidden(JobrunnerError):
    """The token is right, but not for this."""

    status = 403


class Request(NamedTuple):
    """What a route gets to see of an HTTP request."""

    method: str
    query: Dict[str, str]
    body: bytes
    alive: Callable[[], bool]  # False once it has hung up, or its token has been withdrawn
    local: bool  # it comes from this machine
    stop: Callable[[], None]  # ends the server
    caller: Caller = EVERYBODY


class Answer(NamedTuple):
    """What a route gives back; a body that is no bytes is sent piece by piece."""

    status: int
    body: Union[bytes, Iterator[bytes]] = b""
    headers: bytes = b"Content-Type: application/json\r\n"
    batch: Optional[Batch] = None  # not to be sent before this is on disk


def _json(value: Any, batch: Optional[Batch] = None) -> Answer:
    return Answer(200, to_json(value), batch=batch)


EMPTY = Answer(200, b"", b"")  # as the original answers a report: a client of its kind leaks what has a body
NOTHING = Answer(204, b"", b"")


def _error(status: int, sentence: str, headers: bytes = b"") -> Answer:
    return Answer(status, to_json({"Error": sentence}), Answer._field_defaults["headers"] + headers)


def _configuration(request: Request) -> Any:
    """The JSON in ?configuration=; raises BadRequest."""
    text = request.query.get("configuration")
    if not text:
        raise BadRequest("the query has no configuration: send ?configuration= with the job as JSON")
    return from_json(text, "configuration")


def _body(request: Request) -> Any:
    if not request.body:
        raise BadRequest("the request has no body: send JSON")
    return from_json(request.body)


def _body_list(request: Request) -> List[Any]:
    value = _body(request)
    return value if isinstance(value, list) else [value]


def get_dump(queue: Queue, request: Request) -> Answer:
    return Answer(200, database_chunks(queue.picture()))


def get_add(queue: Queue, request: Request) -> Answer:
    (job,), batch = queue.add([_configuration(request)])  # an array has ID and Number too
    return Answer(200, b'{"ID":"%b","Number":%d}' % (job.id.encode(), job.number), batch=batch)


def post_add(queue: Queue, request: Request) -> Answer:
    jobs, batch = queue.add(_body_list(request))
    return _json([_added(thing) for thing in jobs], batch)


def _added(thing: Union[Job, ArraySpec]) -> Dict[str, Any]:
    entry = {"ID": thing.id, "Number": thing.number}
    return entry if isinstance(thing, Job) else {**entry, "Array": True}


def get_request(queue: Queue, request: Request) -> Answer:
    job, batch = queue.lease(_host_name(request.query.get("hostname")))
    if job is None:
        return NOTHING
    if request.caller.name:
        queue.lent[job.id] = request.caller.name
    return _json({"ID": job.id, "Params": job.params, "Runtime": job.runtime}, batch)


def post_request(queue: Queue, request: Request) -> Answer:
    body = _body(request)
    if len(request.body) > MAX_NODE and isinstance(body, dict) and len(to_json(body.get("Node"))) > MAX_NODE:
        raise BadRequest(f"Node is over {MAX_NODE} bytes, and is kept: let the client say less of itself")
    _check_leases(request, body.get("Reports") if isinstance(body, dict) else None)
    return _json(*queue.poll(body, request.alive))


def _check_leases(request: Request, reports: Any) -> None:
    """An agent's token is good for the runs it was given: it must know their leases.  Raises Forbidden."""
    if request.caller.role == "agent" and isinstance(reports, list):
        known = [report for report in reports if isinstance(report, dict) and "ID" in report]
        if not all(report.get("Lease") for report in known):
            raise Forbidden("a report needs the Lease of its run: send the one that /request gave with the job")


def _is_lent(queue: Queue, request: Request, job_id: str) -> bool:
    """False if an original client's job is reported with another agent's token than the one it was given to.  (What was
    given out before a restart is not known any more, and counts as the reporter's.)"""
    name = request.caller.name
    return request.caller.role != "agent" or queue.lent.get(job_id, name) == name


def _get_report(kind: str) -> Callable[[Queue, Request], Answer]:
    def report(queue: Queue, request: Request) -> Answer:
        job_id = _id_of(_configuration(request))
        if not _is_lent(queue, request, job_id):
            return EMPTY
        _, batch = queue.report([{"ID": job_id, "Hostname": request.query.get("hostname")}], kind)
        return EMPTY._replace(batch=batch)

    return report


def _post_report(kind: str) -> Callable[[Queue, Request], Answer]:
    def report(queue: Queue, request: Request) -> Answer:
        reports = _body_list(request)
        _check_leases(request, reports)
        return _json(*queue.report(reports, kind))

    return report


def _id_of(configuration: Any) -> str:
    """The ID in what an original client sends back of a job; keys in any letter case."""
    if not isinstance(configuration, dict):
        raise BadRequest("configuration is not a job: it must be a JSON object with its ID")
    for key, value in configuration.items():
        if key.lower() == "id" and isinstance(value, str):
            return value
    raise BadRequest("configuration has no ID: send back the job as /request gave it")


def get_usage(queue: Queue, request: Request) -> Answer:
    job_id = _id_of(_configuration(request))
    words = [request.query.get(key, "") for key in ("cpu", "mem")]
    if not all(re.match(r"[+-]?\d{1,18}\Z", word, re.ASCII) for word in words):
        raise BadRequest("cpu (percent of one core x 100) and mem (bytes) must be whole numbers")
    sample = {"ID": job_id, "CPU": int(words[0]), "Mem": int(words[1]), "Hostname": request.query.get("hostname")}
    if not _is_lent(queue, request, job_id):
        return EMPTY
    _, batch = queue.sample([sample])
    return EMPTY._replace(batch=batch)


def post_usage(queue: Queue, request: Request) -> Answer:
    samples = _body_list(request)
    _check_leases(request, samples)
    return _json(*queue.sample(samples))


def get_status(queue: Queue, request: Request) -> Answer:
    return _json({**queue.status(), "Tokens": bool(request.caller.name)})


def get_nodes(queue: Queue, request: Request) -> Answer:
    return _json({"Nodes": queue.node_records()})


def get_job(queue: Queue, request: Request) -> Answer:
    name, wait = request.query.get("id", ""), request.query.get("wait", "0")
    if not name or not re.match(r"\d{1,4}\Z", wait, re.ASCII):
        raise BadRequest("say which job with ?id=, a Number or ID; wait= is a number of seconds")
    thing = queue.wait_for_end(name, min(int(wait), LONGEST_POLL))
    _check_withdrawn(request, int(wait))
    return _json(_public(queue, thing), queue.store.unwritten())


def _check_withdrawn(request: Request, waited: int) -> None:
    """Raises Forbidden if who waited is not to be told any more."""
    if waited and not request.alive():
        raise Forbidden("the token of this request was withdrawn while it waited: ask again with one that is good")


def _public(queue: Queue, job: Union[Job, Array]) -> Dict[str, Any]:
    """A job or array for a listing; a queued job always says why it waits."""
    if isinstance(job, Array):
        return queue.array_record(job)
    record = job.public()
    if job.state is State.QUEUED:
        record["Comment"] = "; ".join(filter(None, [job.comment, queue.why_queued(job)]))
    return record


def get_output(queue: Queue, request: Request) -> Answer:
    """The ends of a job's outputs; with wait=, out= or err= what a running one prints, from those bytes on."""
    if not {"wait", "out", "err"}.isdisjoint(request.query):
        return _followed_output(queue, request)
    job = queue.find(request.query.get("id", ""))
    if isinstance(job, Array):
        raise UnknownJob(f"{_label(job)} is an array, and has no output: name a subjob, as {job.spec.number}[1]")
    tails = {key: queue.store.read_output(job, stream) for key, stream in (("StdOut", "out"), ("StdErr", "err"))}
    return _json({**_output_of(job), **{key: as_text(data) for key, data in tails.items()}})


def _followed_output(queue: Queue, request: Request) -> Answer:
    out, err, wait, run = (_whole(request.query, key, 0) for key in ("out", "err", "wait", "run"))
    job, found = queue.follow(request.query.get("id", ""), {"StdOut": out, "StdErr": err}, min(wait, LONGEST_POLL), run)
    _check_withdrawn(request, wait)
    pieces = {key: {"At": at, "Text": as_text(data), "Next": at + len(data)} for key, (at, data) in found.items()}
    return _json(
        {**_output_of(job), "Run": job.run_count, "Original": job.state is State.RUNNING and not job.lease, **pieces}
    )


def _output_of(job: Job) -> Dict[str, Any]:
    return {"ID": job.id, "Number": job.number, "State": job.state.value, "Host": job.host}


def post_stream(queue: Queue, request: Request) -> Answer:
    return _json(queue.stream(_body_list(request)))


def _wish(request: Request) -> Dict[str, Any]:
    wish = _body(request)
    if not isinstance(wish, dict):
        raise BadRequest('say which jobs as {"IDs":["17", ...]}')
    return wish


def _selection(wish: Dict[str, Any]) -> Selection:
    """The jobs in {"IDs": [...], "Select": {...}}; raises BadRequest."""
    names, select = wish.get("IDs") or [], wish.get("Select") or {}
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BadRequest('say which jobs as {"IDs":["17", ...]}')
    if not isinstance(select, dict) or not all(isinstance(text, str) for text in select.values()):
        raise BadRequest('say which jobs as {"Select":{"Name":"sweep", "Status":"failed"}}')
    if not names and not select:
        raise BadRequest('say which jobs as {"IDs":["17", ...]} or {"Select":{"Name":"sweep"}}')
    keys = {key.lower(): text for key, text in select.items()}
    if set(keys) & set(_PAGING):
        raise BadRequest("Select takes State, Status, Name, Queue, Host, Owner and Number")
    words = " and ".join(f"{key} {text}" for key, text in keys.items())
    return Selection(names, _job_filter(keys) if keys else None, words)


def _changed(jobs: List[Job], batch: Optional[Batch]) -> Answer:
    return _json({"Total": len(jobs), "Jobs": [job.public() for job in jobs[:PAGE]]}, batch)


def _verb(method: Callable[..., Tuple[List[Job], Optional[Batch]]]) -> Callable[[Queue, Request], Answer]:
    """The route of a method that takes a Selection and nothing else."""
    return lambda queue, request: _changed(*method(queue, _selection(_wish(request))))


def post_delete(queue: Queue, request: Request) -> Answer:
    wish = _wish(request)
    return _changed(*queue.delete(_selection(wish), jobrunner._check_bool("Force", wish.get("Force") or False)))


def post_alter(queue: Queue, request: Request) -> Answer:
    wish = _wish(request)
    if not isinstance(wish.get("Set"), dict):
        raise BadRequest('say what to alter as {"Set":{"Priority":5}}')
    return _changed(*queue.alter(_selection(wish), wish["Set"]))


def post_move(queue: Queue, request: Request) -> Answer:
    wish = _wish(request)
    return _changed(*queue.move(_selection(wish), jobrunner._check_word("Queue", wish.get("Queue"))))


def get_queues(queue: Queue, request: Request) -> Answer:
    return _json({"Queues": queue.queue_records()})


def post_queue(queue: Queue, request: Request) -> Answer:
    wish = _wish(request)
    name = jobrunner._check_word("Name", wish.get("Name"))
    named, batch = queue.change_queue(name, str(wish.get("Action")), wish.get("Set") or {})
    return _json({"Queue": named.to_record() if named else None}, batch)


def post_node(queue: Queue, request: Request) -> Answer:
    wish = _wish(request)
    hosts = wish.get("Hosts")
    if not isinstance(hosts, list) or not hosts or not all(isinstance(host, str) for host in hosts):
        raise BadRequest('say which hosts as {"Hosts":["pc7"]}')
    comment = jobrunner._check_text("Comment", wish.get("Comment") or "")
    marks, batch = queue.mark(list(dict.fromkeys(hosts)), str(wish.get("Action")), comment)
    return _json({"Nodes": [mark.to_record() for mark in marks]}, batch)


def post_shutdown(queue: Queue, request: Request) -> Answer:
    if not request.local:
        return _error(403, "the server is stopped from its own machine only: run qterm there, or end its process")
    request.stop()
    return _json({"Stopping": True})


def get_jobs(queue: Queue, request: Request) -> Answer:
    """Jobs by number, filtered and paged; see docs/protocol.md."""
    chosen, fields = _job_filter(request.query), request.query.get("fields")
    jobs: List[Union[Job, Array]] = [job for job in queue.picture() if chosen(job)]
    if request.query.get("subjobs") == "0":
        jobs = _arrays_for_subjobs(queue, jobs)
    offset, limit = (_whole(request.query, key, default) for key, default in (("offset", 0), ("limit", PAGE)))
    page = jobs[offset : offset + limit]
    return Answer(200, _job_list(queue, page, len(jobs), fields.split(",") if fields else None))


def _arrays_for_subjobs(queue: Queue, jobs: List[Any]) -> List[Union[Job, Array]]:
    """The jobs, with each array in the place of its first subjob among them."""
    found: Dict[Any, Union[Job, Array]] = {}
    for job in jobs:
        array = queue.arrays.get(job.number) if job.index is not None else None
        found.setdefault(job.number if array else job.id, array or job)
    return list(found.values())


_PAGING = ("offset", "limit", "fields", "subjobs")


def _job_filter(query: Dict[str, str]) -> Callable[[Job], bool]:
    tests: List[Callable[[Job], bool]] = []
    for key, value in query.items():
        words = frozenset(value.split(","))
        if key == "state":
            letters = value.replace(",", "") or value  # `Q,R`, or as PBS's qselect has it `QR`
            states = frozenset(jobrunner._check_state("state", letter) for letter in letters or [""])
            tests.append(lambda job, states=states: job.state in states)
        elif key == "number":
            numbers = frozenset(_whole({"number": word}, "number", 0) for word in words)
            tests.append(lambda job, numbers=numbers: job.number in numbers)
        elif key == "name":
            tests.append(lambda job, name=value: job.title == name)
        elif key == "status" and not words.issubset(STATUSES):
            raise BadRequest(f"status must be one of {', '.join(STATUSES)}, not {value!r}")
        elif key in ("status", "queue", "host"):
            tests.append(lambda job, key=key, words=words: getattr(job, key) in words)
        elif key == "owner":
            tests.append(lambda job, words=words: job.owner in words or job.owner.split("@")[0] in words)
        elif key not in _PAGING:
            raise BadRequest(
                f"/jobs knows no {key}: use state, status, name, queue, host, owner, number, offset, limit, fields and "
                "subjobs"
            )
    return lambda job: all(test(job) for test in tests)


def _whole(query: Dict[str, str], key: str, default: int) -> int:
    word = query.get(key, str(default))
    if not re.match(r"\d{1,18}\Z", word, re.ASCII):
        raise BadRequest(f"{key} must be a whole number, 0 or more, not {word!r}")
    return int(word)


def _job_list(queue: Queue, jobs: List[Job], total: int, fields: Optional[List[str]]) -> Iterator[bytes]:
    yield b'{"Total":%d,"Jobs":[' % total
    for at in range(0, len(jobs), CHUNK):
        records = [_public(queue, job) for job in jobs[at : at + CHUNK]]
        if fields:
            records = [{key: record[key] for key in fields if key in record} for record in records]
        yield (b"," if at else b"") + b",".join(to_json(record) for record in records)
    yield b"]}"


class Route(NamedTuple):
    """What a URL does: the role it needs (see ROLES; "any" is any token), and what answers GET and POST.  Whatever is
    neither "view" nor "any" changes things, and is kept from other sites' pages."""

    role: str
    get: Optional[Callable[[Queue, Request], Answer]] = None
    post: Optional[Callable[[Queue, Request], Answer]] = None

    @property
    def methods(self) -> str:
        return ", ".join(name for name, function in (("GET", self.get), ("POST", self.post)) if function)


# Every URL the server answers.
ROUTES = {
    # the original's seven
    "/dump": Route("view", get_dump, get_dump),
    "/add": Route("submit", get_add, post_add),
    "/request": Route("agent", get_request, post_request),
    "/finish": Route("agent", _get_report("finish"), _post_report("finish")),
    "/timeout": Route("agent", _get_report("timeout"), _post_report("timeout")),
    "/dead": Route("agent", _get_report("dead"), _post_report("dead")),
    "/usage": Route("agent", get_usage, post_usage),
    # for our clients
    "/stream": Route("agent", post=post_stream),
    # for people and scripts
    "/status": Route("any", get_status),
    "/jobs": Route("view", get_jobs),
    "/job": Route("view", get_job),
    "/nodes": Route("view", get_nodes),
    "/output": Route("view", get_output),
    "/queues": Route("view", get_queues),
    "/delete": Route("submit", post=post_delete),
    "/hold": Route("submit", post=_verb(Queue.hold)),
    "/release": Route("submit", post=_verb(Queue.release)),
    "/rerun": Route("submit", post=_verb(Queue.rerun)),
    "/alter": Route("submit", post=post_alter),
    "/move": Route("submit", post=post_move),
    "/queue": Route("submit", post=post_queue),
    "/node": Route("submit", post=post_node),
    "/shutdown": Route("submit", post=post_shutdown),
}


def answer(queue: Queue, path: str, request: Request) -> Answer:
    """What the route says to a request; raises JobrunnerError."""
    route = ROUTES.get(path)
    if route is None:
        return _error(404, f"there is no {path} here: the URLs are {' '.join(ROUTES)}")
    function = {"GET": route.get, "POST": route.post}.get(request.method)
    if function is None:
        return _error(
            405, f"{path} takes {route.methods}, not {request.method}", b"Allow: %b\r\n" % route.methods.encode()
        )
    return function(queue, request)


# ---------------------------------------------------------------------------------------------------------------------
# Access: tokens and their roles, and what browsers are kept from
# ---------------------------------------------------------------------------------------------------------------------

TOKEN_FILE = "jobrunner.tokens"  # in the database's folder
# What the roles may ask for: the routes of these roles.
ROLES = {
    "view": frozenset(("view", "any")),
    "agent": frozenset(("agent", "any")),
    "submit": frozenset(("view", "agent", "submit", "any")),
}
FREE_FAILURES = 10  # refused requests of one address before each further one is answered late
LATE = 1.5  # s that then is
FORGIVEN = 600  # s after which an address's failures are forgotten
MOST_ADDRESSES = 4096  # whose failures are counted; more than those, and the oldest are forgotten


class Tokens:
    """The tokens that let people and clients in, hashed in a file; without the file everybody may do everything.

    A file that changes is read again, see `refresh`.  One that is damaged or gone then counts for nothing, and what it
    held last goes on: a mistake in it neither opens the server nor locks everybody out.
    """

    def __init__(self, path: str, needed: bool = False):
        self.path = path
        self.known: Optional[List[Tuple[str, Caller]]] = None  # (SHA-256 of the token in hex, whose it is)
        self._stamp = _stamp(path)
        if needed or _may_be_there(path):
            self.known = read_tokens(path)

    def refresh(self) -> None:
        """Reads the file again if it is another one than before; called once a second."""
        stamp = _stamp(self.path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self.known = read_tokens(self.path)
            log.info("access.tokens file=%s tokens=%d: read again", self.path, len(self.known))
        except JobrunnerError as error:
            log.error("access.tokens error=%r: the tokens known before stay as they are", str(error))

    def caller(self, headers: Dict[bytes, bytes]) -> Optional[Caller]:
        """Whose token a request has; None: no right one."""
        if self.known is None:
            return EVERYBODY
        token = _token_sent(headers.get(b"authorization", b""))
        digest, found = hashlib.sha256(token).hexdigest(), None
        for known, caller in self.known:  # all of them, whichever it is: the time taken tells nothing
            if hmac.compare_digest(known, digest):
                found = caller
        return found if token else None


def _token_sent(value: bytes) -> bytes:
    """The token in `Bearer TOKEN`, or in Basic as the password; b"" if there is none."""
    scheme, _, rest = value.partition(b" ")
    rest = rest.strip()
    if scheme.lower() == b"bearer":
        return rest
    if scheme.lower() != b"basic":
        return b""
    try:
        return base64.b64decode(rest, validate=True).partition(b":")[2]
    except ValueError:
        return b""


def _stamp(*paths: str) -> Any:
    """What changes when a file does; None while one of them is not there."""
    try:
        return [(about.st_mtime_ns, about.st_size, about.st_ino) for about in map(os.stat, paths)]
    except OSError:
        return None


def _may_be_there(path: str) -> bool:
    """False only if nothing goes by that name: a link that leads nowhere, or a folder that must not be looked into, is a
    file of tokens that cannot be read, and opens no door."""
    try:
        os.lstat(path)
        return True
    except FileNotFoundError:
        return False
    except OSError:
        return True


def read_tokens(path: str) -> List[Tuple[str, Caller]]:
    """The tokens in a file; raises JobrunnerError with the line at fault."""
    value, found = _token_records(path), []
    for place, record in enumerate(value["Tokens"]):
        words = [record.get(key) for key in ("Name", "Role")] if isinstance(record, dict) else [None, None]
        if not all(isinstance(word, str) and word for word in words) or words[1] not in ROLES:
            raise JobrunnerError(
                f"{path}: token {place + 1} needs a Name, and a Role that is one of {', '.join(ROLES)}"
            )
        digest, plain = record.get("Sha256"), record.get("Token")
        if isinstance(plain, str) and plain.isascii() and plain and digest is None:
            digest = hashlib.sha256(plain.encode()).hexdigest()
        if not isinstance(digest, str) or not re.match(r"[0-9a-fA-F]{64}\Z", digest):
            raise JobrunnerError(f"{path}: token {words[0]} needs Sha256, 64 hexadecimal digits (or Token, in ASCII)")
        found.append((digest.lower(), Caller(words[1], words[0])))
    with contextlib.suppress(OSError):  # replaced just now
        if not WINDOWS and os.stat(path).st_mode & 0o077:
            log.warning("access.tokens file=%s: others may read or write it: end that with chmod 600", path)
    return found


def _token_records(path: str) -> Dict[str, Any]:
    try:
        value = json.loads(jobrunner.read_file(path).decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise JobrunnerError(f"{path} line {error.lineno} column {error.colno}: {error.msg}: mend it") from None
    except (ValueError, RecursionError):
        raise JobrunnerError(f"{path} is no JSON: mend it, or make another with --make-tokens") from None
    if not isinstance(value, dict) or not isinstance(value.get("Tokens"), list):
        raise JobrunnerError(f'{path} line 1: it must hold {{"Tokens": [...]}}: mend it, or make another')
    return value


def make_tokens(path: str) -> List[Tuple[str, str]]:
    """Writes a file with one token a role; (role, token) of each.  Raises JobrunnerError if there is one already."""
    made = [(role, new_token()) for role in ROLES]
    records = [_token_record(role, role, token) for role, token in made]
    try:
        file = open(path, "xb", opener=_private)
    except FileExistsError:
        raise JobrunnerError(f"{path} is there already, and is not overwritten: --add-token adds to it") from None
    except OSError as error:
        raise JobrunnerError(f"cannot write {path}: {os_words(error)}: choose another --token-file") from None
    try:
        with file:
            file.write(_token_text({"Tokens": records}))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        _remove(path)  # half of it would keep the server from starting
        raise JobrunnerError(f"cannot write {path}: {os_words(error)}: choose another --token-file") from None
    return made


def add_token(path: str, role: str, name: str) -> str:
    """One more token in a file, which is made if need be; raises JobrunnerError."""
    if role not in ROLES or not name:
        raise JobrunnerError(f"say --add-token ROLE:NAME; the roles are {', '.join(ROLES)}")
    value = _token_records(path) if os.path.exists(path) else {"Tokens": []}
    if any(isinstance(record, dict) and record.get("Name") == name for record in value["Tokens"]):
        raise JobrunnerError(f"{path} has a token named {name}: choose another name, or take that one out first")
    token = new_token()
    value["Tokens"].append(_token_record(name, role, token))
    path = os.path.realpath(path)  # of a link, what it leads to is to change
    try:
        with open(path + ".new", "wb", opener=_private) as file:
            owner = os.stat(path).st_uid if not WINDOWS and os.path.exists(path) else -1
            if owner not in (-1, os.fstat(file.fileno()).st_uid):  # root adds to what the server's account is to read
                os.fchown(file.fileno(), owner, -1)
            file.write(_token_text(value))
            file.flush()
            os.fsync(file.fileno())
        jobrunner.replace_file(path + ".new", path)
    except OSError as error:
        _remove(path + ".new")
        raise JobrunnerError(f"cannot write {path}: {os_words(error)}: choose another --token-file") from None
    return token


def new_token() -> str:
    return "jr_" + secrets.token_urlsafe(32)


def _token_record(name: str, role: str, token: str) -> Dict[str, str]:
    return {"Name": name, "Role": role, "Sha256": hashlib.sha256(token.encode()).hexdigest()}


def _token_text(value: Dict[str, Any]) -> bytes:
    return json.dumps(value, indent=1).encode() + b"\n"


class Failures:
    """Requests that were refused for want of a right token, by address: who has many waits, and one line a minute."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self._mutex = threading.Lock()
        # {address: [failures, the latest, those not logged yet, when a line was logged]}, latest last
        self._known: Dict[Any, List[Any]] = collections.OrderedDict()

    def count(self, address: str) -> float:
        """Counts one more; the s that its answer is to wait."""
        key, moment = _neighbourhood(address), self.clock()
        with self._mutex:
            about = self._known.pop(key, None)
            if about is None or moment - about[1] > FORGIVEN:
                about = [0, moment, 0, moment - 61]
            self._known[key] = about
            while len(self._known) > MOST_ADDRESSES:
                del self._known[next(iter(self._known))]
            about[:3] = about[0] + 1, moment, about[2] + 1
            self._tell(address, about, moment)
            return LATE if about[0] > FREE_FAILURES else 0

    def tell(self) -> None:
        """The lines that are due; called once a second."""
        moment = self.clock()
        with self._mutex:
            for key, about in list(self._known.items()):
                self._tell(key, about, moment)
                if moment - about[1] > FORGIVEN:
                    del self._known[key]

    @staticmethod
    def _tell(address: Any, about: List[Any], moment: float) -> None:
        if about[2] and moment - about[3] > 60:
            log.warning("access.refused address=%s requests=%d: no right token came with them", address, about[2])
            about[2:] = 0, moment


def _neighbourhood(address: str) -> str:
    """What counts as one address: of IPv6, the 64 bits that one owner has at least."""
    if ":" not in address or address.startswith("::ffff:"):
        return address
    try:
        packed = socket.inet_pton(socket.AF_INET6, address.partition("%")[0])
    except OSError:
        return address
    return socket.inet_ntop(socket.AF_INET6, packed[:8] + bytes(8)) + "/64"


class Gate:
    """Decides, from the head of a request alone, whether it is let in: before a byte of its body is read."""

    def __init__(self, tokens: Tokens, hosts: List[str], scheme: str = "http"):
        self.tokens = tokens
        self.failures = Failures()
        name = socket.gethostname().lower()
        self.hosts = frozenset(["localhost", name, name.partition(".")[0]] + [host.lower() for host in hosts])
        self.scheme = scheme.encode()

    def admit(self, head: "Head") -> Union[Caller, Answer]:
        """Who asks, or what is answered instead."""
        path, headers = head.target.partition("?")[0], head.headers
        route = ROUTES.get(path)
        if _is_browsers(headers):
            words = self._browser_words(headers, route)
            if words:
                return _error(403, words)
        caller = self.tokens.caller(headers)
        if caller is None:
            return NO_TOKEN
        if route and route.role not in ROLES[caller.role]:
            return _error(
                403, f"a token with the role {caller.role} is not for {path}: use one that is for {route.role}"
            )
        return caller

    def _browser_words(self, headers: Dict[bytes, bytes], route: Optional["Route"]) -> str:
        """Why a browser's request is refused; "" if it is not.

        A page of another site can make its reader's browser ask us, with the token the browser has kept: what changes
        anything is only taken from our own pages.  And a name of its own can be made to mean our address: then the
        page is no other site's to the browser, but Host still has that name.
        """
        host = headers.get(b"host", b"")
        if not self._is_ours(host.decode("latin-1").lower()):
            return "this server does not go by that name for browsers: use its address, or start it with --allowed-host"
        if route is None or route.role in ("view", "any"):
            return ""
        origin, site = headers.get(b"origin"), headers.get(b"sec-fetch-site")
        own = self.scheme + b"://" + host.lower()
        foreign = site is not None and site.lower() not in (b"none", b"same-origin")
        if foreign or (origin is not None and origin.lower() != own):
            return "a page of another site asks for that: only this server's own pages and programs may"
        if origin is None and site is None and not self._is_unmarked_program(headers, own):
            return (
                "your browser does not say whose page asks for that, as over plain HTTP none does: use the commands or "
                "curl, or HTTPS"
            )
        return ""

    @staticmethod
    def _is_unmarked_program(headers: Dict[bytes, bytes], own: bytes) -> bool:
        """True of a request that no page of another site can have brought about though it has no mark of its origin.

        Browsers mark a picture or a link on another's page over HTTPS and to localhost only; over plain HTTP it looks
        as if a person had typed it in.  PowerShell calls itself a browser, which no page can make a browser call itself.
        """
        referer = headers.get(b"referer")
        if referer is not None:
            return (referer.lower() + b"/").startswith(own + b"/")
        return b"PowerShell/" in headers.get(b"user-agent", b"")

    def _is_ours(self, host: str) -> bool:
        """True of an address, and of a name that is ours, with a port or without."""
        name = re.sub(r":\d*\Z", "", host)
        if name.startswith("[") and name.endswith("]"):
            return _is_address(socket.AF_INET6, name[1:-1])
        return name.rstrip(".") in self.hosts or _is_address(socket.AF_INET, name)


NO_TOKEN = _error(
    401,
    "a token is needed: send it as Authorization: Bearer, or as the password of Basic",
    b'WWW-Authenticate: Basic realm="jobrunner"\r\n',
)
_BROWSERS_HEADERS = frozenset((b"origin", b"referer", b"sec-fetch-site", b"sec-fetch-mode", b"sec-fetch-dest"))


def _is_browsers(headers: Dict[bytes, bytes]) -> bool:
    agent = headers.get(b"user-agent")
    return not _BROWSERS_HEADERS.isdisjoint(headers) or (agent is not None and agent.startswith(b"Mozilla/"))


def _is_address(family: int, text: str) -> bool:
    try:
        socket.inet_pton(family, text)
        return True
    except (OSError, ValueError):
        return False


# ---------------------------------------------------------------------------------------------------------------------
# HTTP
# ---------------------------------------------------------------------------------------------------------------------

MAX_LINE = 1 << 20  # bytes of a request line: /add carries the whole job in it
MAX_HEADERS = 100
MAX_HEADER_LINE = 65536
MAX_HEAD = 1 << 18  # bytes of all header lines together
LONG_LINE, LONG_LINES = 65536, 64  # how many connections at a time may send a longer request line than that
LARGE = 65536  # bytes of a body beyond which it counts for what all may hold at a time
LARGE_ROOM = 64 << 20  # bytes that is at least
AGENT_BODY = 32 << 20  # bytes of a body from an agent, whose largest are reports; read, JSON can take 30 times as much
IDLE = 120  # s a connection is kept open without a request
HEAD_TIME = 20  # s that the head of a request may take from its first byte on
BODY_TIME = 30  # s that a body may take; a large one as long as it takes at
SLOWEST = 10000  # bytes/s
ANSWER_TIME = 60  # s that the other side may leave an answer unread; a large one see SLOWEST
HANDSHAKE_TIME = 10  # s that setting up TLS may take
STRANGER_TIME = 1  # s after which a connection must have been let in, if there is no room for others
LINGER_TIME, LINGER_BYTES = 5, 16 << 20  # what is still read of a request that was refused
FEW_FILES = 256  # open files that are not connections, at most
_STATUS_LINES = {s.value: b"HTTP/1.1 %d %b\r\n" % (s.value, s.phrase.encode()) for s in HTTPStatus}
# Of all answers: a browser must not take one for a script or a page, keep it, or show it to another site.
_GUARDS = b"X-Content-Type-Options: nosniff\r\nCache-Control: no-store\r\nCross-Origin-Resource-Policy: same-origin\r\n"
_SERVER = b"Server: jobrunner/%b\r\n" % VERSION.encode() + _GUARDS


class BadHttp(JobrunnerError):
    """What came is no HTTP that can be answered and gone on from: it is answered, and the connection closed."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status


class Head(NamedTuple):
    """The head of a request."""

    method: str
    target: str
    headers: Dict[bytes, bytes]  # names in lower case; several heads may share it
    keep: bool  # the connection is to be kept open
    chunks: bool  # it understands an answer in chunks


# Strict, because a proxy before us may understand a crooked head in another way, and let through what it must not.
_REQUEST_LINE = re.compile(rb"([!#$%&'*+.^_`|~\w-]+) ([!-~\x80-\xff]+) HTTP/1\.(\d)\r\n").fullmatch
# No two parts that could share a blank out in many ways: a line of blanks with one mistake would take a minute to refuse.
_HEADER_LINE = re.compile(rb"([!#$%&'*+.^_`|~\w-]+):([\t -~\x80-\xff]*)").fullmatch
_ABSOLUTE = re.compile(r"https?://([^/?#]*)", re.IGNORECASE).match  # as sent to proxies
_ONCE = frozenset((b"content-length", b"transfer-encoding", b"host", b"authorization"))


def read_head(readline: Callable[[int], bytes], long_line: Callable[[], Any]) -> Optional[Head]:
    """The head that comes next; None when the other side has closed; raises BadHttp, as does long_line(), called before
    the rest of a long request line is read, if it must not be."""
    first = readline(LONG_LINE)
    if not first:
        return None
    if len(first) == LONG_LINE and not first.endswith(b"\n"):
        long_line()
        first += readline(MAX_LINE + 1 - LONG_LINE)
    if len(first) > MAX_LINE:
        raise BadHttp(414, f"the URL is over {MAX_LINE} bytes: send the job as the body of a POST")
    if not _REQUEST_LINE(first):  # before the rest is waited for
        raise BadHttp(
            400, "this is not HTTP: the request must begin with METHOD /path HTTP/1.1, its lines ending in CRLF"
        )
    lines: List[bytes] = []
    size = 0
    while True:
        line = readline(MAX_HEADER_LINE + 1)
        size += len(line)
        if line == b"\r\n":
            return parse_head(first, b"".join(lines))
        if len(line) > MAX_HEADER_LINE or len(lines) >= MAX_HEADERS or size > MAX_HEAD:
            raise BadHttp(
                431,
                f"a header line is over {MAX_HEADER_LINE} bytes, or there are over {MAX_HEADERS} of them or {MAX_HEAD} "
                "bytes in all",
            )
        if not line.endswith(b"\r\n"):
            raise BadHttp(400, "a header line does not end in CRLF")
        lines.append(line)


def parse_head(first: bytes, block: bytes) -> Head:
    """The head of a request line and the lines after it, without the empty one; raises BadHttp."""
    words = _REQUEST_LINE(first)
    if not words:
        raise BadHttp(
            400, "this is not HTTP: the request must begin with METHOD /path HTTP/1.1, its lines ending in CRLF"
        )
    headers, closes = (_headers if len(block) < 2048 else _headers.__wrapped__)(block)
    target, modern = words[2].decode("latin-1"), words[3] != b"0"
    if not target.startswith("/"):
        absolute = _ABSOLUTE(target)
        if not absolute:
            raise BadHttp(400, "the URL must begin with a slash")
        headers = {**headers, b"host": absolute[1].encode("latin-1")}
        target = "/" + target[absolute.end() :].lstrip("/")
    return Head(words[1].decode("latin-1"), target, headers, modern and not closes, modern)


@functools.lru_cache(maxsize=512)  # a client sends the same ones with each request
def _headers(block: bytes) -> Tuple[Dict[bytes, bytes], bool]:
    """{name: value} of header lines, and whether they say `Connection: close`; raises BadHttp."""
    headers: Dict[bytes, bytes] = {}
    for line in block.split(b"\r\n")[:-1]:
        words = _HEADER_LINE(line)
        if not words:
            raise BadHttp(400, "a header line is not Name: value, or holds a character that must not be there")
        name, value = words[1].lower(), words[2].strip(b" \t")
        if name in headers:
            if name in _ONCE:
                raise BadHttp(400, f"there are two header lines of {name.decode()}: send one")
            value = headers[name] + b", " + value
        headers[name] = value
    length = headers.get(b"content-length")
    if b"transfer-encoding" in headers and length is not None:
        raise BadHttp(400, "there are Content-Length and Transfer-Encoding: send Content-Length alone")
    if length is not None and not (length.isdigit() and len(length) <= 18):
        raise BadHttp(400, "Content-Length is not a number of bytes")
    closes = any(word.strip() == b"close" for word in headers.get(b"connection", b"").lower().split(b","))
    return headers, closes


class Peer:
    """A connection, as `Watch` sees it.

    until     monotonic time at which it is closed if nothing has happened by then
    stranger  monotonic time since when it has been here without a request that was let in; FOR_EVER once there was one
    """

    __slots__ = ("connection", "until", "stranger")

    def __init__(self, connection: socket.socket, until: float):
        self.connection = connection
        self.until = until
        self.stranger = time.monotonic()

    def may_take(self, seconds: float) -> None:
        self.until = time.monotonic() + seconds


FOR_EVER = float("inf")


class Room:
    """What all connections together may hold of something at a time."""

    def __init__(self, most: int, what: str):
        self.left, self.what = most, what
        self._mutex = threading.Lock()

    @contextlib.contextmanager
    def take(self, amount: int) -> Iterator[None]:
        """Has so much as long as it is entered; raises BadHttp if there is not so much."""
        with self._mutex:
            if self.left < amount:
                raise BadHttp(503, f"too many {self.what} at a time: try again in a moment")
            self.left -= amount
        try:
            yield
        finally:
            with self._mutex:
                self.left += amount


class _Rest(io.RawIOBase):
    """What comes on a connection, beginning with what was read of it already."""

    def __init__(self, first: bytes, connection: socket.socket):
        self.first, self.connection = first, connection

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self.first:
            return self.connection.recv_into(buffer)
        piece = self.first[: len(buffer)]
        self.first = self.first[len(piece) :]
        buffer[: len(piece)] = piece
        return len(piece)


class Handler(BaseHTTPRequestHandler):
    """One connection, in a thread of its own.  Reads requests and writes answers itself: http.server's way, with an
    e-mail parser for the headers, a write for each line and a line of log, takes three quarters of a request's time."""

    server: "Server"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        unsent, first = b"", b""
        if self.server.front:
            unsent, first = self.server.front.handed_over.pop(self.connection)
        self.rest = _Rest(first, self.connection)
        self.rfile = io.BufferedReader(self.rest)
        self.peer = self.server.peers.get(self.connection) or Peer(self.connection, FOR_EVER)
        if WINDOWS:  # elsewhere `Watch` alone ends what takes too long: Python's time-outs cost a system call each
            self.connection.settimeout(IDLE)
        self.unsent = unsent

    def handle(self) -> None:
        try:
            if self.unsent:
                self.peer.may_take(ANSWER_TIME)
                self.connection.sendall(self.unsent)
            while self._one_request():
                pass
        except OSError:
            pass  # it hung up, or fell silent: nothing was half done, since answers are written when all is

    def _one_request(self) -> bool:
        """Reads one request and answers it; False: the connection is to be closed."""
        self.peer.may_take(IDLE)
        if not self.rfile.peek(1):
            return False
        self.peer.may_take(HEAD_TIME)
        try:
            with contextlib.ExitStack() as room:
                head = read_head(self.rfile.readline, lambda: room.enter_context(self.server.long_lines.take(1)))
                if head is None:
                    return False
                reply, keep = self._reply(head, room)
        except BadHttp as error:
            later = b"Retry-After: 5\r\n" if error.status == 503 else b""
            reply, keep, head = _error(error.status, str(error), later), False, None
        if head and head.method == "HEAD":
            reply = reply._replace(body=b"")  # no URL takes it; and an answer to it has no body
        if not isinstance(reply.body, bytes):
            keep = keep and bool(head and head.chunks)
        self._send(written(self.server.queue, reply), keep, bool(head and head.chunks))
        if not keep:
            self._linger()
        return keep

    def _reply(self, head: Head, room: contextlib.ExitStack) -> Tuple[Answer, bool]:
        """The answer to a request whose head has come, and whether the connection can be kept; raises BadHttp."""
        size, caller = self._body_size(head.headers), self.server.gate.admit(head)
        if isinstance(caller, Answer):
            self.peer.until = FOR_EVER
            if caller.status == 401:
                time.sleep(self.server.gate.failures.count(self.client_address[0]))
            return caller, head.keep and not size  # its body is not read
        if caller.role == "agent" and size > AGENT_BODY:
            raise BadHttp(413, f"the body is over {AGENT_BODY} bytes: send fewer reports at a time")
        self.peer.stranger = FOR_EVER
        body = self._read_body(size, head.headers, room) if size else b""
        self.peer.until = FOR_EVER  # the server may hold a request open

        def alive() -> bool:  # a token may be withdrawn meanwhile
            return self.server.gate.tokens.caller(head.headers) == caller and self._alive()

        return self.server.answer(head, body, self.client_address, alive, caller), head.keep

    def _body_size(self, headers: Dict[bytes, bytes]) -> int:
        if b"transfer-encoding" in headers:
            raise BadHttp(411, "send the body with a Content-Length, not in chunks")
        size = int(headers.get(b"content-length", b"0"))
        if size > self.server.max_body:
            raise BadHttp(
                413, f"the body is over {self.server.max_body} bytes: send fewer jobs at a time, or raise --max-body"
            )
        return size

    def _read_body(self, size: int, headers: Dict[bytes, bytes], room: contextlib.ExitStack) -> bytes:
        self.peer.may_take(max(BODY_TIME, size / SLOWEST))
        if headers.get(b"expect", b"").lower() == b"100-continue":
            self.connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        if size <= LARGE:
            return self._read_whole(size)
        pieces: List[bytes] = []
        while size:  # memory is taken as the bytes come, not as they are announced
            room.enter_context(self.server.large.take(min(size, LARGE)))
            pieces.append(self._read_whole(min(size, LARGE)))
            size -= len(pieces[-1])
        return b"".join(pieces)

    def _read_whole(self, size: int) -> bytes:
        data = self.rfile.read(size)
        if len(data) < size:
            raise ConnectionResetError("it hung up before the body was whole")
        return data

    def _send(self, reply: Answer, keep: bool, chunks: bool) -> None:
        if isinstance(reply.body, bytes):
            self._write(whole_answer(reply, keep))
        elif chunks:
            self._stream(_head(reply, keep), reply.body)
        else:  # HTTP/1.0: the body ends with the connection
            self._write(_head(reply, keep) + b"\r\n")
            for piece in reply.body:
                self._write(piece)

    def _stream(self, head: bytes, pieces: Iterator[bytes]) -> None:
        self._write(head + b"Transfer-Encoding: chunked\r\n\r\n")
        buffered: List[bytes] = []
        size = 0
        for piece in pieces:
            buffered.append(piece)
            size += len(piece)
            if size > 65536:
                self._write(b"%x\r\n" % size + b"".join(buffered) + b"\r\n")
                buffered, size = [], 0
        data = b"".join(buffered)
        self._write((b"%x\r\n%b\r\n" % (size, data) if size else b"") + b"0\r\n\r\n")

    def _write(self, data: bytes) -> None:
        self.peer.may_take(max(ANSWER_TIME, len(data) / SLOWEST))
        self.connection.sendall(data)
        self.peer.until = FOR_EVER

    def _alive(self) -> bool:
        """False if the other side has hung up, which is noticed only by looking."""
        try:
            if self.server.tls:
                return self._alive_in_tls()
            return not _readable(self.connection) or bool(self.connection.recv(1, socket.MSG_PEEK))
        except OSError:
            return False

    def _alive_in_tls(self) -> bool:
        """There is no peeking into TLS: what comes is kept for the next request."""
        if self.rest.first or not (self.connection.pending() or _readable(self.connection)):
            return True
        self.connection.setblocking(False)
        try:
            self.rest.first = self.connection.recv(65536)
            return bool(self.rest.first)
        except self.server.tls.not_yet:
            return True
        finally:
            self.connection.settimeout(IDLE if WINDOWS else None)

    def _linger(self) -> None:
        """Reads on for a moment before closing: closed at once, with something unread, the system would throw away
        the answer that is still on its way."""
        self.peer.may_take(LINGER_TIME)
        self.connection.settimeout(2)
        if self.server.tls:
            self.connection.unwrap()
        socket.socket.shutdown(self.connection, socket.SHUT_WR)
        left = LINGER_BYTES
        while left > 0:
            piece = self.connection.recv(65536)
            if not piece:
                break
            left -= len(piece)


class Front(threading.Thread):
    """One thread for all connections that send nothing but small GETs which need no waiting: the original's clients and
    scripts.  Whatever else comes first on a connection, it goes to a thread of its own, for good; so does whoever is
    not let in, since that may have to wait.

    Threads that take turns at the interpreter's lock for each such request cost more than the request; here, requests
    that come together are read one after the other and then written to disk and answered together.
    """

    PATHS = frozenset(("/add", "/request", "/finish", "/timeout", "/dead", "/usage", "/status"))

    def __init__(self, server: "Server"):
        super().__init__(daemon=True)
        self.server = server
        self.selector = selectors.DefaultSelector()
        self.connections: Dict[socket.socket, List[Any]] = {}  # [address, monotonic time of the latest request]
        # what a connection that goes to a thread has still to be sent, and what was read of it already
        self.handed_over: Dict[socket.socket, Tuple[bytes, bytes]] = {}

    def take(self, connection: socket.socket, address: Any) -> None:
        """A new connection; any thread may call this."""
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connections[connection] = [address, time.monotonic()]
        self.selector.register(connection, selectors.EVENT_READ)

    def run(self) -> None:
        swept = time.monotonic()
        while True:
            replies = []
            try:
                for key, _ in self.selector.select(IDLE / 4):
                    reply = self._read(key.fileobj)
                    if reply:
                        replies.append((key.fileobj, reply))
                for connection, reply in replies:
                    self._send(connection, written(self.server.queue, reply))
                if time.monotonic() - swept > IDLE / 4:
                    swept = time.monotonic()
                    self._sweep(swept - IDLE)
            except Exception:  # it serves everybody, and must outlive whatever one connection brings about
                log.exception("http.bug: please report this")

    def _read(self, connection: Any) -> Optional[Answer]:
        """The answer to what came on a connection; None if it was closed, or is a thread's affair."""
        about = self.connections[connection]
        about[1] = time.monotonic()
        try:
            came = connection.recv(65536, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except OSError:
            came = b""
        if not came:
            self._let_go(connection)
            self.server.shutdown_request(connection)
            return None
        head = self._simple(came)
        caller = self.server.gate.admit(head) if head else None
        if head is None or not isinstance(caller, Caller):
            self._hand_over(connection, b"", came)
            return None
        self.server.peers[connection].stranger = FOR_EVER
        return self.server.answer(head, b"", about[0], lambda: True, caller)

    def _simple(self, came: bytes) -> Optional[Head]:
        """The head of what came, if that is one whole GET that can be answered here."""
        if not came.startswith(b"GET /") or came.find(b"\r\n\r\n") != len(came) - 4 or came.count(b"\n") > MAX_HEADERS:
            return None
        at = came.index(b"\n") + 1
        try:
            head = parse_head(came[:at], came[at:-2])
        except BadHttp:
            return None
        if head.target.partition("?")[0] not in self.PATHS or not head.keep:
            return None
        return None if b"content-length" in head.headers or b"transfer-encoding" in head.headers else head

    def _send(self, connection: Any, reply: Answer) -> None:
        data = whole_answer(reply)
        try:
            sent = connection.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            sent = 0
        except OSError:
            return  # it has hung up, which the next read finds out
        if sent < len(data):  # nobody waits here for a peer that reads slowly
            self._hand_over(connection, data[sent:], b"")

    def _hand_over(self, connection: Any, unsent: bytes, came: bytes) -> None:
        """Gives a connection a thread of its own."""
        address = self._let_go(connection)
        self.handed_over[connection] = (unsent, came)
        if not self.server.start_thread(connection, address):
            del self.handed_over[connection]

    def _let_go(self, connection: Any) -> Any:
        self.selector.unregister(connection)
        return self.connections.pop(connection)[0]

    def _sweep(self, moment: float) -> None:
        """Closes the connections that have been silent since that moment."""
        for connection, about in list(self.connections.items()):
            if about[1] < moment:
                self._let_go(connection)
                self.server.shutdown_request(connection)


class Watch(threading.Thread):
    """Once a second: closes the connections that take too long for what they are about, and looks whether the files of
    tokens and certificates have changed."""

    def __init__(self, server: "Server"):
        super().__init__(daemon=True)
        self.server = server
        self.turned_away: Deque[Tuple[float, socket.socket]] = collections.deque()

    def run(self) -> None:
        while not self.server.stop.wait(1):
            try:
                self.look(time.monotonic())
                self.server.gate.tokens.refresh()
                self.server.gate.failures.tell()
                if self.server.tls:
                    self.server.tls.refresh()
            except Exception:  # without it slow connections would pile up
                log.exception("http.bug: please report this")

    def look(self, moment: float) -> None:
        for peer in list(self.server.peers.values()):
            if peer.until < moment:
                peer.until = FOR_EVER
                with contextlib.suppress(OSError):  # whoever reads or writes there is woken, and closes it
                    socket.socket.shutdown(peer.connection, socket.SHUT_RDWR)
        while self.turned_away and (self.turned_away[0][0] < moment - 1 or len(self.turned_away) > FEW_FILES // 2):
            self._close(self.turned_away.popleft()[1])

    def make_room(self) -> bool:
        """Hangs up on the one that has been here longest without a request that was let in; False if there is none, or
        too many are still being closed.  Else whoever holds all connections, silent, keeps out those with a token."""
        peers = list(self.server.peers.values())
        if len(peers) >= self.server.max_connections + FEW_FILES // 4:
            return False
        oldest = min(peers, key=lambda peer: peer.stranger)
        if oldest.stranger > time.monotonic() - STRANGER_TIME:
            return False
        oldest.stranger = FOR_EVER
        with contextlib.suppress(OSError):
            socket.socket.shutdown(oldest.connection, socket.SHUT_RDWR)
        return True

    @staticmethod
    def _close(connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection.setblocking(False)
            while connection.recv(65536):  # unread, it would have the answer thrown away
                pass
        connection.close()

    def turn_away(self, connection: socket.socket) -> None:
        """Answers 503 to a connection that is one too many, and closes it a moment later: it has yet to read that."""
        reply = _error(503, "too many connections: try again in a moment", b"Retry-After: 5\r\n")
        with contextlib.suppress(OSError):
            connection.setblocking(False)
            if not self.server.tls:
                connection.send(whole_answer(reply, keep=False))
            connection.shutdown(socket.SHUT_WR)
        if len(self.turned_away) >= FEW_FILES // 2:
            self._close(connection)
        else:
            self.turned_away.append((time.monotonic(), connection))


class Tls:
    """What HTTPS needs: a certificate and its key, read again when their files change."""

    def __init__(self, certificate: str, key: str = ""):
        import ssl  # which takes 20 ms and some MB

        self.ssl = ssl
        self.not_yet = (ssl.SSLWantReadError, ssl.SSLWantWriteError)
        self.files = [certificate, key or certificate]
        self._stamp = _stamp(*self.files)
        self.context, self.fingerprint = self._load()

    def _load(self) -> Tuple[Any, str]:
        """The context and the SHA-256 of the certificate in hex; raises JobrunnerError."""
        context = self.ssl.SSLContext(self.ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = self.ssl.TLSVersion.TLSv1_2
        certificate, key = self.files
        text = jobrunner.read_file(certificate).decode("latin-1")
        jobrunner.read_file(key)
        first = re.search(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", text, re.DOTALL)
        if not first:
            raise JobrunnerError(f"{certificate} holds no certificate in PEM: give --tls-cert the right file")
        try:
            context.load_cert_chain(certificate, key, password=lambda: b"")  # else it would ask on the terminal
            return context, hashlib.sha256(self.ssl.PEM_cert_to_DER_cert(first[0])).hexdigest()
        except (OSError, ValueError) as error:
            words = getattr(error, "reason", None) or str(error)
            raise JobrunnerError(
                f"cannot use {certificate} with the key in {key} ({words}): they must belong together, the key without "
                "a password"
            ) from None

    def refresh(self) -> None:
        """Reads the files again if they have changed; bad ones change nothing.  Called once a second."""
        stamp = _stamp(*self.files)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self.context, self.fingerprint = self._load()
            log.info("tls.certificate file=%s fingerprint=%s: read again", self.files[0], self.fingerprint)
        except JobrunnerError as error:
            log.error("tls.certificate error=%r: the former one stays in use", str(error))

    def wrap(self, connection: socket.socket) -> Any:
        """The connection as it is to be used, before the handshake; None if the other side speaks no TLS, and was told
        so.  Raises OSError."""
        connection.settimeout(HANDSHAKE_TIME)
        first = connection.recv(1, socket.MSG_PEEK)
        if first == b"\x16":
            return self.context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        if first:
            reply = _error(400, "this port speaks HTTPS: use an address that begins with https://")
            connection.sendall(whole_answer(reply, keep=False))
            connection.shutdown(socket.SHUT_WR)
            connection.settimeout(1)
            while connection.recv(65536):
                pass
        return None


def written(queue: Queue, reply: Answer) -> Answer:
    """The answer, once what it tells is on disk; another one if that cannot be."""
    try:
        queue.store.wait(reply.batch)
        return reply
    except DiskFailed as error:
        return _error(error.status, str(error))


def _head(reply: Answer, keep: bool) -> bytes:
    closing = b"" if keep else b"Connection: close\r\n"
    return _STATUS_LINES[reply.status] + _SERVER + _date() + reply.headers + closing


def whole_answer(reply: Answer, keep: bool = True) -> bytes:
    """An answer's bytes, head and body, for one write."""
    if reply.status == 204:
        return _head(reply, keep) + b"\r\n"
    return b"%bContent-Length: %d\r\n\r\n%b" % (_head(reply, keep), len(reply.body), reply.body)  # type: ignore[arg-type]


def _date() -> bytes:
    return _date_at(int(time.time()))


@functools.lru_cache(maxsize=4)
def _date_at(second: int) -> bytes:
    return time.strftime("Date: %a, %d %b %Y %H:%M:%S GMT\r\n", time.gmtime(second)).encode()


def _readable(connection: socket.socket) -> bool:
    """True if there is something to read, or the other side has closed."""
    if WINDOWS:
        return bool(select.select([connection], [], [], 0)[0])
    poll = select.poll()  # select.select knows no file descriptors over 1023
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(0))


LOOPBACK = ("127.0.0.1", "::1", "::ffff:127.0.0.1")


def parse_query(text: str) -> Dict[str, str]:
    """The first value of each name in a URL's query; raises BadRequest for bytes that are no UTF-8."""
    found: Dict[str, str] = {}
    for pair in text.split("&") if text else ():
        name, _, value = pair.partition("=")
        try:
            found.setdefault(_unquote(name), _unquote(value))
        except UnicodeDecodeError:
            raise BadRequest("the query is not UTF-8") from None
    return found


def _unquote(text: str) -> str:
    if "+" in text:
        text = text.replace("+", " ")
    return unquote_to_bytes(text.encode("latin-1")).decode("utf-8") if "%" in text or not text.isascii() else text


class Server(ThreadingHTTPServer):
    """Listens; every connection gets a thread once it sends what `Front` leaves to one; `queue` answers whom `gate`
    lets in."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 1024
    # On Windows this would let two servers share one port, each getting some of the requests.
    allow_reuse_address = not WINDOWS

    def __init__(
        self,
        bind: str,
        port: int,
        queue: Queue,
        gate: Gate,
        max_body: int,
        max_connections: int,
        tls: Optional[Tls] = None,
    ):
        self.queue = queue
        self.gate = gate
        self.max_body = max_body
        self.max_connections = max_connections
        self.tls = tls
        self.stop = threading.Event()
        self.peers: Dict[socket.socket, Peer] = {}  # every connection
        self.long_lines = Room(LONG_LINES, "long URLs")
        self.large = Room(max(2 * max_body, LARGE_ROOM), "large requests")
        self.complained = -FOR_EVER  # monotonic time when it last said that it can accept none
        self.address_family = socket.AF_INET if re.match(r"[\d.]+\Z", bind) else socket.AF_INET6
        # Windows has no MSG_DONTWAIT, and select for 512 at most; TLS has no such thing as what came so far
        self.front = None if WINDOWS or tls else Front(self)
        self.watch = Watch(self)
        super().__init__((bind, port), Handler)
        if self.front:
            self.front.start()
        self.watch.start()

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            # one socket for both: where localhost is ::1 first, a server on IPv4 alone costs each call a second
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        # not HTTPServer's, which looks up the machine's name and may wait for a name server
        socketserver.TCPServer.server_bind(self)

    def get_request(self) -> Tuple[Any, Any]:
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                if time.monotonic() - self.complained > 60:
                    self.complained = time.monotonic()
                    log.error("http.accept error=%r: connections wait until others are closed", os_words(error))
                time.sleep(0.1)  # it is asked again at once, and the connection still waits
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        if len(self.peers) >= self.max_connections and not self.watch.make_room():
            self.watch.turn_away(request)
            return
        self.peers[request] = Peer(request, FOR_EVER)
        if self.front:
            self.front.take(request, client_address)
        else:
            self.start_thread(request, client_address)

    def start_thread(self, request: Any, client_address: Any) -> bool:
        """Gives a connection a thread; False if none is to be had, and the connection is closed."""
        try:
            super().process_request(request, client_address)
            return True
        except RuntimeError as error:
            log.error("http.thread error=%r", str(error))
            self.shutdown_request(request)
            return False

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        if self.tls:
            request = self._in_tls(request, client_address)
        if request:
            super().process_request_thread(request, client_address)

    def _in_tls(self, request: Any, client_address: Any) -> Any:
        """The connection once the handshake is done; None if that failed, and it is closed."""
        peer = self.peers[request]
        peer.may_take(HANDSHAKE_TIME)
        wrapped = None
        try:
            wrapped = self.tls.wrap(request)  # type: ignore[union-attr]
            if wrapped:
                peer.connection = wrapped
                del self.peers[request]
                self.peers[wrapped] = peer
                wrapped.do_handshake()
                wrapped.settimeout(IDLE if WINDOWS else None)
                return wrapped
        except OSError as error:
            log.debug("tls.failed client=%s error=%r", client_address[0], str(error))
        self.shutdown_request(wrapped or request)
        return None

    def shutdown_request(self, request: Any) -> None:
        self.peers.pop(request, None)
        with contextlib.suppress(OSError):
            socket.socket.shutdown(request, socket.SHUT_WR)
        self.close_request(request)

    def answer(self, head: Head, body: bytes, address: Any, alive: Callable[[], bool], caller: Caller) -> Answer:
        """What is said to a request that was let in, whatever it is: a refusal is an Answer too."""
        try:
            path, _, query = head.target.partition("?")
            local = address[0] in LOOPBACK
            request = Request(head.method, parse_query(query), body, alive, local, self.stop.set, caller)
            return answer(self.queue, path, request)
        except JobrunnerError as error:
            return _error(error.status, str(error))
        except Exception:
            log.exception("http.bug client=%s: please report this", address[0])
            return _error(500, "the server made a mistake, which is in its log: nothing is known to have changed")

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.exception("http.bug client=%s: please report this", client_address[0])


# ---------------------------------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------------------------------


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="server.py", description="Keeps the queue of jobs and hands them to clients.")
    add = parser.add_argument
    add("--port", type=int, default=DEFAULT_PORT, help="port to listen on; 0: any free one (default %(default)s)")
    add("--bind", default="", metavar="ADDRESS", help="address to listen on (default: all of this machine's)")
    add("--db", default="jobs.json", metavar="FILE", help="the database (default %(default)s)")
    add("--node-timeout", type=_duration, default=300, metavar="TIME",
        help="silence after which a client counts as down (default 300)")  # fmt: skip
    add("--requeue-after", type=_duration, default=3600, metavar="TIME",
        help="silence after which its jobs are queued again; 0: never (default 3600)")  # fmt: skip
    add("--offline-after", type=_whole_number, default=BAD_HOST, metavar="N",
        help="jobs in a row that could not be started on a host, after which it is given no more; 0: never (default 3)")  # fmt: skip
    add("--accounting", metavar="DIR", help="write PBS's accounting records there, a file a day (default: none)")
    add("--keep-finished", type=_days, metavar="DAYS", help="move jobs that have been over for so long out of the "
        "queue, into finished-YYYYMM.jsonl in the accounting folder (default: keep them for ever)")  # fmt: skip
    add("--log-level", default="info", choices=("debug", "info", "warning", "error"),
        help="debug has a line for each job's steps (default %(default)s)")  # fmt: skip
    add("--log-file", default="", metavar="FILE", help="log there, the last 60 MB, instead of to stderr")
    add("--until-eof", action="store_true", help="stop when standard input ends")
    add("--version", action="version", version=f"jobrunner {VERSION}")
    _access_arguments(parser.add_argument_group("who may ask").add_argument)
    return parser


_whole_number = jobrunner.argument(lambda text: _whole({"the number": text}, "the number", 0))


def _access_arguments(add: Callable[..., Any]) -> None:
    add("--make-tokens", action="store_true", help="make the file of tokens, print one for each role, and end")
    add(
        "--add-token",
        metavar="ROLE:NAME",
        help=f"add a token to the file, print it, and end; roles: {', '.join(ROLES)}",
    )
    add("--token-file", metavar="FILE", help=f"tokens that let people in (default: {TOKEN_FILE} beside the database; "
        "without it everybody may do everything)")  # fmt: skip
    add("--tls-cert", metavar="PEM", help="speak HTTPS with this certificate")
    add("--tls-key", default="", metavar="PEM", help="its key (default: it is in the same file)")
    add("--allowed-host", action="append", default=[], metavar="NAME",
        help="a name of this server for browsers, beside its address, localhost and the machine's name")  # fmt: skip
    add("--max-body", type=_size, default=256 << 20, metavar="SIZE", help="largest request taken (default 256mb)")
    add("--max-connections", type=_count, default=2000, metavar="N",
        help="connections at a time; more are answered 503 (default %(default)s)")  # fmt: skip


def _parse_count(text: str) -> int:
    if not re.match(r"\d{1,6}\Z", text, re.ASCII) or not int(text):
        raise BadRequest(f"{text!r} is not a number from 1 to 999999")
    return int(text)


def _parse_days(text: str) -> float:
    if not re.match(r"\d{1,6}(\.\d{1,9})?\Z", text, re.ASCII):
        raise BadRequest(f"{text!r} is not a number of days")
    return float(text) * 86400


_count = jobrunner.argument(_parse_count)
_days = jobrunner.argument(_parse_days)
_size = jobrunner.argument(jobrunner.parse_size)
_duration = jobrunner.argument(lambda text: jobrunner._CHECKS["runtime"]("the time", jobrunner.parse_duration(text)))


def listen(options: argparse.Namespace, bind: str, queue: Queue) -> Server:
    """The listening server; raises JobrunnerError with what to do."""
    port = options.port
    try:
        tls = Tls(options.tls_cert, options.tls_key) if options.tls_cert else None
        gate = Gate(
            Tokens(token_path(options), bool(options.token_file)), options.allowed_host, "https" if tls else "http"
        )
        connections = room_for(options.max_connections)
        return Server(bind or "::", port, queue, gate, options.max_body, connections, tls)
    except OSError as error:
        if not bind and error.errno not in (errno.EADDRINUSE, errno.EACCES) and not _taken(error):
            return listen(options, "0.0.0.0", queue)  # a machine without IPv6
        if error.errno == errno.EADDRINUSE or _taken(error):
            raise JobrunnerError(f"port {port} is in use: stop what uses it, or choose another --port") from None
        raise JobrunnerError(f"cannot listen on {bind or 'any address'} port {port}: {os_words(error)}: choose another "
                             "--bind or --port") from None  # fmt: skip
    except OverflowError:
        raise JobrunnerError(f"{port} is no port: choose one from 0 to 65535") from None


def _taken(error: OSError) -> bool:
    return getattr(error, "winerror", None) in (10013, 10048)  # Windows: forbidden (somebody has it alone), in use


def room_for(connections: int) -> int:
    """How many connections there can be, once the limit on open files is raised as far as may be: the database must not
    go without a file because of them."""
    try:
        import resource
    except ImportError:
        return connections  # Windows has no such limit
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + FEW_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return connections
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    except (OSError, ValueError):
        most = soft
    if most < wanted:
        connections = max(most - FEW_FILES, most // 2)
        log.warning("http.limit connections=%d: no more files than %d may be open (ulimit -n)", connections, most)
    return connections


def token_path(options: argparse.Namespace) -> str:
    return options.token_file or os.path.join(os.path.dirname(os.path.realpath(options.db)), TOKEN_FILE)


def tune() -> None:
    """Sets the process up for a server with many threads, before there are any."""
    if hasattr(os, "sched_setaffinity"):
        # Threads that run on several cores fight for the interpreter's lock: held to one they answer twice as much.
        with contextlib.suppress(OSError):  # where that is forbidden it is merely slower
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    sys.setswitchinterval(0.001)  # or a request waits 5 ms for each turn while the snapshot is being made
    # JSON nested as deeply as Python lets it be needs 2 MB of stack; what is not touched takes no memory.  But on Windows
    # every thread of a size that was asked for has all of it at once: there Python's own, which that fits into, will do.
    if not WINDOWS:
        threading.stack_size(8 << 20)


def serve(options: argparse.Namespace) -> None:
    tune()
    queue = Queue(Store(options.db), now, options.node_timeout, options.requeue_after, options.offline_after)
    queue.store.account = Accounting(options.accounting).write if options.accounting else None
    archive = None
    if options.keep_finished is not None:
        archive = Archive(queue, options.accounting or queue.store.path + ".accounting", options.keep_finished)
    server = listen(options, options.bind, queue)
    gc.disable()  # nothing that is loaded is garbage
    queue.load()
    # Jobs refer to nothing that refers back, and a full collection stops everything for a second a million of them.
    gc.freeze()
    gc.set_threshold(10000, 50, 1 << 30)
    gc.enable()
    for name in ("SIGINT", "SIGTERM", "SIGBREAK"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda *_: server.stop.set())
    if options.until_eof:
        jobrunner.when_input_ends(server.stop.set)
    threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
    say_where(server, options.bind)
    run_until_stopped(server, archive)
    log.info("server.stop jobs=%d", len(queue.jobs))
    server.shutdown()
    server.server_close()
    queue.stop()


def say_where(server: Server, bind: str) -> None:
    """What a start prints, and what it warns of."""
    queue, port, tls, tokens = server.queue, server.server_address[1], server.tls, server.gate.tokens
    host = "localhost" if bind in ("", "::", "0.0.0.0") else bind
    url = f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"
    lines = [f"jobrunner {VERSION} serves {queue.store.path} ({len(queue.jobs)} jobs) at {url}"]
    if tls:
        lines.append(f"tls fingerprint SHA256 {tls.fingerprint}")
    jobrunner._out("\n".join(lines), flush=True)
    if tokens.known is not None:
        log.info("access.tokens file=%s tokens=%d", tokens.path, len(tokens.known))
    elif not (bind in LOOPBACK or bind == "localhost" or bind.startswith("127.")):
        log.warning("access.open port=%d: there are no tokens, so anybody who reaches this port can run programs on "
                    "every client: end that with `python server.py --make-tokens`", port)  # fmt: skip


def run_until_stopped(server: Server, archive: Optional["Archive"]) -> None:
    queue, snapshots = server.queue, None
    while not server.stop.wait(1):
        try:
            queue.tick()
            if archive:
                archive.tick()
        except JobrunnerError as error:
            log.error("queue.tick error=%r", str(error))
        if queue.snapshot_due() and not (snapshots and snapshots.is_alive()):
            snapshots = threading.Thread(target=queue.snapshot)
            try:
                snapshots.start()
            except RuntimeError as error:  # all that a user may have, in a container say, serve connections just now
                queue.snapshot_time = time.monotonic()  # not again at once
                log.error("queue.thread error=%r: the journal is kept, and the snapshot is made later", str(error))


def tokens_wanted(options: argparse.Namespace) -> bool:
    """Makes the tokens that were asked for; False if none were."""
    path = token_path(options)
    if options.make_tokens:
        for role, token in make_tokens(path):
            print(role, token)
        print(
            f"{path} now holds their hashes; the tokens themselves are shown this once. A server that finds the file "
            "lets nobody in without one. Put the agent's into jobrunner.token beside each client.py, and submit's or view's "
            "into jobrunner.token beside people's jobrunner.py, readable by their owners only.",
            file=sys.stderr,
        )
    elif options.add_token:
        role, _, name = options.add_token.partition(":")
        print(role, add_token(path, role, name))
    return options.make_tokens or bool(options.add_token)


def main(argv: Optional[List[str]] = None) -> int:
    options = arguments().parse_args(argv)
    os.umask(0o077)  # whatever it writes is its owner's alone
    make_selectable = jobrunner.unselectable_console()
    try:
        if tokens_wanted(options):
            return 0
        if options.tls_key and not options.tls_cert:
            raise JobrunnerError("--tls-key needs --tls-cert: give both")
        jobrunner.start_log(options.log_level, options.log_file)
        serve(options)
    except JobrunnerError as error:
        print(f"server.py: {error}", file=sys.stderr)
        return 1
    finally:
        make_selectable()
    return 0


if __name__ == "__main__":
    sys.exit(main())

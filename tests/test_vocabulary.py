"""What the programs agree on: the transition table, units, the job record, JSON in and out, files of jobs, addresses,
locks.  Pure functions where there are such; real files and real processes for the rest."""

import glob
import io
import json
import os
import re
import signal
import subprocess
import sys

import pytest

import jobrunner
from harness import ROOT, alive, until
from jobrunner import BadRequest, BadState, FileLock, Job, JobrunnerError, State

HOUR, DAY = 3600, 86400


def job(state=State.QUEUED, **fields):
    return Job(["hostname"]).but(number=17, state=state, **fields)


# -- states -----------------------------------------------------------------------------------------------------------

# Written out a second time on purpose: a change of the table is a change of what is promised.
LEADS_TO = {
    "Q": {"lease": "R", "hold": "H", "wait": "W", "alter": "Q", "move": "Q", "delete": "F", "abort": "F"},
    "H": {"hold": "H", "release": "Q", "alter": "H", "move": "H", "delete": "F", "abort": "F"},
    "W": {"ready": "Q", "hold": "H", "alter": "W", "move": "W", "delete": "F", "abort": "F"},
    "R": {
        "end": "F", "lose": "F", "requeue": "Q", "alter": "R", "delete": "R", "abort": "R", "rerun": "R", "force": "F",
        "recover": "R",
    },
    "F": {"rerun": "Q", "recover": "R"},
}
WORDS = {"Q": "queued", "H": "held", "W": "waiting", "R": "running", "F": "finished"}
EVERY_EVENT = sorted({event for events in LEADS_TO.values() for event in events})


def test_the_table_has_these_events_and_the_states_have_pbs_letters():
    assert jobrunner.EVENTS == EVERY_EVENT
    assert {state.value: state.name.lower() for state in State} == WORDS


@pytest.mark.parametrize("event", EVERY_EVENT)
@pytest.mark.parametrize("letter", WORDS)
def test_an_event_leads_where_the_table_says_or_is_refused_with_what_the_job_is_and_what_it_takes(letter, event):
    if event in LEADS_TO[letter]:
        assert jobrunner.next_state(job(State(letter)), event) is State(LEADS_TO[letter][event])
        return
    with pytest.raises(BadState) as refused:
        jobrunner.next_state(job(State(letter), index=3), event)
    needs, words = [WORDS[s] for s in LEADS_TO if event in LEADS_TO[s]], str(refused.value)
    assert words.startswith(f"cannot {event} job 17[3]: it is {WORDS[letter]}, and {event} needs a job that is ")
    assert sorted(words.rsplit(" that is ", 1)[1].split(" or ")) == sorted(needs)
    assert refused.value.status == 409


@pytest.mark.parametrize("letter", WORDS)
def test_an_event_nobody_knows_is_refused_in_every_state(letter):
    with pytest.raises(BadState):
        jobrunner.next_state(job(State(letter)), "explode")


def test_every_state_has_its_bucket_in_the_originals_dump():
    buckets = {state.value: bucket for state, bucket in jobrunner.BUCKETS.items()}
    assert buckets == {"Q": "Available", "R": "Leased", "F": "Finished", "H": "Held", "W": "Held"}


@pytest.mark.parametrize(
    "exit_status, words",
    [
        (0, "0"),
        (3, "3"),
        (255, "255"),
        (256, "256"),
        (257, "257 (killed by signal 1)"),
        (265, "265 (killed by signal 9)"),
        (320, "320 (killed by signal 64)"),
        (321, "321"),
        (3221225786, "3221225786"),  # Windows: ended by Ctrl-C
        (None, "not known"),
        (-8, "-8 (could not be executed)"),
        (-9, "-9 (output file could not be opened)"),
        (-10, "-10 (memory limit)"),
        (-11, "-11 (walltime limit)"),
        (-12, "-12 (cputime limit)"),
        (-101, "-101 (dead)"),
        (-102, "-102 (refused by every client)"),
        (-103, "-103 (host lost and job not rerunnable)"),
        (-104, "-104 (dependency can never be met)"),
        (-105, "-105 (aborted with its array)"),
        (-77, "-77"),
    ],
)
def test_an_exit_status_is_shown_with_its_words(exit_status, words):
    assert jobrunner.exit_words(exit_status) == words


@pytest.mark.parametrize(
    "status, exit_status, code",
    [
        ("finished", 0, 0),
        ("finished", None, 0),  # reported by an original client
        ("failed", 3, 3),
        ("failed", 255, 255),
        ("failed", 265, 1),
        ("failed", -8, 1),
        ("failed", 3221225786, 1),
        ("failed", None, 1),
        ("timeout", -11, 1),
        ("deleted", None, 1),
        ("deleted", 0, 1),  # it ended well when asked to, but did not do its work
    ],
)
def test_a_jobs_exit_status_as_an_exit_code_is_0_only_if_it_finished(status, exit_status, code):
    assert jobrunner.shell_code({"Status": status, "ExitStatus": exit_status}) == code


# -- units ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, seconds",
    [
        ("0", 0),
        ("45", 45),
        ("90:00", 90 * 60),
        ("1:00:00", HOUR),
        ("01:02:03", 3723),
        ("100:00:00", 100 * HOUR),
        ("90s", 90),
        ("30m", 30 * 60),
        ("72h", 72 * HOUR),
        ("3d", 3 * DAY),
        ("3D", 3 * DAY),
    ],
)
def test_a_duration_is_read(text, seconds):
    assert jobrunner.parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", " ", "-5", "1.5", "1.5h", "5 m", "5w", "h", "1:2:3:4", ":30", "1::2", "5\n", "٣", "1e3", "none"]
)
def test_what_is_no_duration_is_refused_with_how_to_write_one(text):
    with pytest.raises(BadRequest) as refused:
        jobrunner.parse_duration(text)
    assert repr(text) in str(refused.value) and "HH:MM:SS" in str(refused.value)


@pytest.mark.parametrize("seconds, text", [(0, "00:00:00"), (3723.9, "01:02:03"), (100 * HOUR, "100:00:00")])
def test_a_duration_is_printed_as_pbs_does_and_can_be_read_again(seconds, text):
    assert jobrunner.format_duration(seconds) == text
    assert jobrunner.parse_duration(text) == int(seconds)


@pytest.mark.parametrize(
    "text, size",
    [("0", 0), ("7", 7), ("7b", 7), ("2kb", 2 << 10), ("512mb", 512 << 20), ("4GB", 4 << 30), ("1t", 1 << 40)],
)
def test_a_size_is_read(text, size):
    assert jobrunner.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "gb", "-1gb", "1.5gb", "4 gb", "4pb", "4gib", "٤gb", "4gb\n"])
def test_what_is_no_size_is_refused_with_how_to_write_one(text):
    with pytest.raises(BadRequest, match="512mb"):
        jobrunner.parse_size(text)


NOON = 1795435200.0  # 2026-11-23T12:00:00Z


@pytest.mark.parametrize(
    "text, moment",
    [
        ("1970-01-01T00:00:00Z", 0.0),
        ("2026-11-23T12:00:00Z", NOON),
        ("2026-11-23t12:00:00z", NOON),
        ("2026-11-23 12:00:00Z", NOON),
        ("2026-11-23T13:00:00+01:00", NOON),
        ("2026-11-23T06:30:00-05:30", NOON),
        ("2026-11-23T12:00:00-00:00", NOON),
        ("2024-02-29T00:00:00Z", 1709164800.0),
        # the original's: nanoseconds, trailing zeros cut; hand-made ones: microseconds and +00:00
        ("2026-11-23T17:27:00.923836298Z", NOON + 5 * HOUR + 27 * 60 + 0.923836),
        ("2026-11-23T17:38:00.923836354Z", NOON + 5 * HOUR + 38 * 60 + 0.923836),
        ("2026-11-23T18:27:00.9+01:00", NOON + 5 * HOUR + 27 * 60 + 0.9),
        ("2026-11-23T17:27:00.923836+00:00", NOON + 5 * HOUR + 27 * 60 + 0.923836),
        ("2026-11-23T11:59:59.9999999Z", NOON),
        ("1969-12-31T23:59:59.5Z", -0.5),
    ],
)
def test_a_time_is_read_with_any_fraction_and_any_offset(text, moment):
    assert jobrunner.parse_time(text) == pytest.approx(moment, abs=1e-6)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "now",
        "2026-11-23",
        "2026-11-23T12:00:00",
        "2026-11-23T12:00Z",
        "2026-11-23T12:00:00Z\n",
        "2026-13-01T00:00:00Z",
        "2026-02-30T00:00:00Z",
        "2026-11-23T25:00:00Z",
        "2026-11-23T12:00:00.Z",
        "2026-11-23T12:00:00+1",
        "2026-11-23T12:00:00+99:99",
        "٢٠٢٦-11-23T12:00:00Z",
        "0000-01-01T00:00:00Z",
    ],
)
def test_what_is_no_time_is_refused(text):
    with pytest.raises(BadRequest, match="is not a time"):
        jobrunner.parse_time(text)


@pytest.mark.parametrize(
    "text", ["0001-01-01T00:00:00+01:00", "9999-12-31T23:59:59-01:00", "9999-12-31T23:59:59.9999999Z"]
)
def test_a_time_beyond_the_calendar_is_refused_where_it_comes_in(text):
    with pytest.raises(BadRequest, match="is not a time"):
        jobrunner.format_time(jobrunner.parse_time(text))


@pytest.mark.parametrize("moment", [0.0, 1.5, NOON, NOON + 0.000001, NOON + 0.999999, 4102444800.25, -0.5])
def test_a_time_is_written_in_utc_to_the_microsecond_and_read_back_the_same(moment):
    text = jobrunner.format_time(moment)
    assert len(text) == len("2026-11-23T17:27:00.923836Z") and text.endswith("Z")
    assert jobrunner.parse_time(text) == moment


# -- the record -------------------------------------------------------------------------------------------------------

FULL = {
    "ID": "81b82367-c5c4-439b-a290-b16b1a13781f",
    "Params": ["java", "-jar", "job.jar", "169", "", "ü <&>"],
    "Runtime": 60,
    "Number": 17,
    "Index": 3,
    "State": "F",
    "Name": "sweep",
    "Queue": "long",
    "Priority": -5,
    "Memory": 4 << 30,
    "CpuTime": 100,
    "Ncpus": 2,
    "Requires": ["windows", "host=pc7"],
    "Env": {"A": "1", "B": ""},
    "WorkDir": "C:\\runs",
    "Owner": "ann@pc7",
    "StdOut": "o.txt",
    "StdErr": "e.txt",
    "Join": "oe",
    "Script": "#!/bin/sh\necho $1\n",
    "ScriptName": "job.sh",
    "Shell": "/bin/bash",
    "SubmitDir": "/home/ann",
    "StartAfter": "2026-11-23T12:00:00.000000Z",
    "Depend": ["afterok:16"],
    "Hold": True,
    "Rerunable": False,
    "Retries": 4,
    "Retried": 1,
    "FailedOn": ["pc6"],
    "Comment": "why",
    "SubmitTime": "2026-11-23T12:00:00.250000Z",
    "QueueTime": "2026-11-23T12:00:00.500000Z",
    "Host": "pc7",
    "StartTime": "2026-11-23T12:00:01.000000Z",
    "Expiry": "2026-11-23T12:11:01.000000Z",
    "Lease": "secret",
    "RunCount": 2,
    "EndTime": "2026-11-23T12:01:00.500000Z",
    "Status": "failed",
    "ExitStatus": 3,
    "CPUUsed": [4677, 0],
    "MemUsed": [1765376, 0],
    "SampleSeconds": 60,
    "CpuTimeUsed": 1.5,
    "MaxMem": 1765376,
    "History": [["2026-11-23T12:00:00.400000Z", "failed on pc6"]],
}


def test_every_key_of_a_job_comes_back_as_it_came():
    assert Job.from_record(FULL).to_record() == FULL
    assert Job.from_record(json.loads(json.dumps(FULL))).to_record() == FULL


def read_by(reader, record):
    """What a job's record becomes, or the sentence with which it is refused."""
    try:
        return reader(record).to_record()
    except BadRequest as error:
        return str(error)


@pytest.mark.parametrize("left_out", [None, *FULL])
def test_a_stored_record_is_read_as_any_other(left_out):
    record = {key: value for key, value in FULL.items() if key != left_out}
    assert read_by(Job.from_stored, record) == read_by(Job.from_record, record)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"Params": value} for value in (None, [], [""], ["a", 5], ["a", "\0"], "ab", ("a",), {"a": 1})),
        *({"Runtime": value} for value in (-1, "5", 1.5, True, 10**12, None)),
        *({"State": value} for value in ("X", None, 5, [])),
        *({"SubmitTime": value} for value in ("yesterday", None, 5)),
        *({"Number": value} for value in ("5", None, 1.0, True)),
        *({"ID": value} for value in (5, None, "\0")),
        {"Priority": "high"},
        {"Colour": 1},
    ],
)
def test_a_stored_record_that_is_odd_or_wrong_is_read_or_refused_as_any_other(wrong):
    record = {**FULL, **wrong}
    assert read_by(Job.from_stored, record) == read_by(Job.from_record, record)


def test_every_key_of_the_contract_is_in_the_record_in_its_spelling():
    assert set(FULL) <= {field.key for field in jobrunner.FIELDS}


@pytest.mark.parametrize("spell", [str.lower, str.upper, str.swapcase])
def test_keys_are_taken_in_any_letter_case_and_written_in_their_own(spell):
    assert Job.from_record({spell(key): value for key, value in FULL.items()}).to_record() == FULL


def test_unknown_keys_are_kept_as_they_came_whatever_happens_to_the_job():
    unknown = {"Colour": {"a": [1, None, "ü"]}, "x-note": "", "zero": 0, "none": None}
    kept = Job.from_record({**FULL, **unknown}).but(state=State.QUEUED, status="", comment="again").sampled(1, 2, 60)
    record = Job.from_record(kept.to_record()).to_record()
    assert {key: record[key] for key in unknown} == unknown


def test_what_is_at_its_default_is_absent_from_the_record():
    assert Job.from_record({"Params": ["true"]}).to_record() == {
        "ID": "",
        "Params": ["true"],
        "Runtime": 0,
        "Number": 0,
        "State": "Q",
    }
    defaults = {"Priority": 0, "Queue": "default", "Ncpus": 1, "Rerunable": True, "Env": {}, "Requires": [], "Host": ""}
    assert set(Job.from_record({"Params": ["true"], **defaults}).to_record()) & set(defaults) == set()


def test_null_is_the_same_as_absent():
    record = {**dict.fromkeys(FULL), "Params": ["true"]}
    assert Job.from_record(record).to_record() == Job.from_record({"Params": ["true"]}).to_record()


@pytest.mark.parametrize("letter, keys", [("R", {"CPUUsed", "MemUsed"}), ("F", {"CPUUsed", "MemUsed", "ExitStatus"})])
def test_what_the_original_writes_as_null_is_there_as_null(letter, keys):
    record = Job.from_record({"Params": ["true"], "State": letter}).to_record()
    assert {key for key, value in record.items() if value is None} == keys


def test_of_a_submitted_job_only_what_its_owner_may_say_is_taken():
    taken = Job.from_record(FULL, submitted=True).to_record()
    may = "Params Runtime Name Queue Priority Memory CpuTime Ncpus Requires Env WorkDir Owner StdOut StdErr StartAfter"
    may += " Depend Hold Rerunable Retries Join Script ScriptName Shell SubmitDir"
    assert taken == {**{key: FULL[key] for key in may.split()}, "ID": "", "Number": 0, "State": "Q"}


@pytest.mark.parametrize(
    "record, words",
    [
        (None, "JSON object"),
        ([], "JSON object"),
        ("hostname", "JSON object"),
        ({}, "no Params"),
        ({"Params": None}, "no Params"),
        ({"Params": []}, "Params"),
        ({"Params": "hostname"}, "Params must be a list"),
        ({"Params": [""]}, "Params starts with an empty text"),
        ({"Params": ["", "a"]}, "Params starts with an empty text"),
        ({"Params": ["a", None]}, r"Params\[1\]"),
        ({"Params": ["a", 5]}, r"Params\[1\]"),
        ({"Params": ["a", "b\0c"]}, "NUL"),
        ({"Runtime": 1.5}, "Runtime"),
        ({"Runtime": "60"}, "Runtime"),
        ({"Runtime": True}, "Runtime"),
        ({"Runtime": -1}, "Runtime"),
        ({"Runtime": 10 * 365 * DAY + 1}, "10 years"),
        ({"Runtime": 10**400}, "Runtime"),
        ({"Runtime": float("inf")}, "Runtime"),
        ({"Priority": 1024}, "-1024 to 1023"),
        ({"Priority": -1025}, "-1024 to 1023"),
        ({"Priority": -(10**400)}, "Priority"),
        ({"Ncpus": 0}, "Ncpus"),
        ({"Memory": -1}, "Memory"),
        ({"Memory": 10**400}, "Memory"),
        ({"Retries": 1.0}, "Retries"),
        ({"Env": ["A=1"]}, "Env"),
        ({"Env": {"A": 1}}, "Env"),
        ({"Env": {"": "1"}}, "Env"),
        ({"Env": {"A=B": "1"}}, "Env"),
        ({"Env": {"A": "\0"}}, "NUL"),
        ({"Queue": ""}, "Queue is empty"),
        ({"Requires": "windows"}, "Requires must be a list"),
        ({"Requires": [1]}, r"Requires\[0\]"),
        ({"Hold": 1}, "Hold"),
        ({"Rerunable": "y"}, "Rerunable"),
        ({"StartAfter": 5}, "StartAfter"),
        ({"StartAfter": "tomorrow"}, "not a time"),
        ({"State": "X"}, "State"),
        ({"State": []}, "State"),
        ({"CPUUsed": [1.5]}, r"CPUUsed\[0\]"),
        ({"CpuTimeUsed": "1"}, "CpuTimeUsed"),
        ({"Name": 5}, "Name must be text, not a number"),
    ],
)
def test_what_is_no_job_is_refused_with_the_key_at_fault(record, words):
    record = {"Params": ["a"], **record} if isinstance(record, dict) and record and "Params" not in record else record
    with pytest.raises(BadRequest, match=words):
        Job.from_record(record)


ENDS = [("Runtime", (0, 10 * 365 * DAY)), ("Priority", (-1024, 1023)), ("Ncpus", (1, 9))]


@pytest.mark.parametrize("key, ends", ENDS)
def test_the_ends_of_a_range_are_in_it(key, ends):
    for end in ends:
        taken = Job.from_record({"Params": ["a"], key: end})
        assert getattr(taken, key.lower()) == end


def test_but_makes_another_job_and_leaves_this_one_alone():
    before = Job.from_record(FULL)
    after = before.but(state=State.QUEUED, host="", comment="again", extra={"New": 1}, env={})
    assert before.to_record() == FULL
    record = after.to_record()
    assert (record["State"], record["Comment"], record["New"]) == ("Q", "again", 1)
    assert not {"Host", "Env"} & set(record)
    untouched = set(FULL) - {"State", "Comment", "Host", "Env"}
    assert {key: record[key] for key in untouched} == {key: FULL[key] for key in untouched}


def test_but_refuses_a_field_that_does_not_exist():
    with pytest.raises(AttributeError):
        job().but(colour="red")


@pytest.mark.parametrize(
    "params, name, title",
    [
        (["/usr/bin/java", "-jar"], "", "java"),
        (["C:\\Tools\\run.exe"], "", "run.exe"),
        (["true"], "mine", "mine"),
        (["./"], "", "./"),
    ],
)
def test_a_job_goes_by_its_name_or_by_its_programs(params, name, title):
    assert Job(params).but(name=name).title == title


@pytest.mark.parametrize("key", ["Env", "WorkDir", "Requires", "StdOut", "StdErr", "Memory", "CpuTime", "Ncpus"])
def test_a_job_that_an_original_client_would_run_otherwise_is_not_plain(key):
    assert Job.from_record({"Params": ["true"], "Runtime": 60, "Name": "n", "Owner": "o"}).plain
    assert not Job.from_record({"Params": ["true"], key: FULL[key]}).plain


def test_a_listing_never_holds_the_leases_secret():
    public = Job.from_record({**FULL, "State": "R"}).public()
    assert "secret" not in json.dumps(public)
    assert (public["Label"], public["Queue"], public["Priority"]) == ("17[3]", "long", -5)


# -- samples ----------------------------------------------------------------------------------------------------------


def sampled(count, seconds=60):
    """A job with so many samples taken, the n-th of n CPU and 1000 n bytes."""
    taken = job(State.RUNNING)
    for number in range(1, count + 1):
        taken = taken.sampled(number, number * 1000, seconds)
    return taken


def test_256_samples_are_kept_as_they_are():
    assert sampled(256).cpu_used == list(range(1, 257))
    assert sampled(256).mem_used == [1000 * n for n in range(1, 257)]
    assert sampled(256).sample_seconds == 60


def test_when_256_are_full_every_second_one_goes_and_the_step_doubles():
    full = sampled(257)
    assert {b - a for a, b in zip(full.cpu_used, full.cpu_used[1:])} == {2}
    assert full.mem_used == [1000 * n for n in full.cpu_used]
    assert 127 <= len(full.cpu_used) <= 129
    assert full.sample_seconds == 120


def test_no_sample_is_passed_over_because_the_first_one_came_late():
    late = job(State.RUNNING).sampled(0, 1, 100)
    for number in range(1, 4):
        late = late.sampled(number, 1, 60)
    assert (late.cpu_used, late.sample_seconds) == ([0, 1, 2, 3], 60)


def test_the_peak_of_memory_outlives_its_sample():
    peak = sampled(1).sampled(0, 10**9, 60)
    for _ in range(600):
        peak = peak.sampled(0, 5, 60)
    assert peak.max_mem == 10**9 and len(peak.mem_used) == len(peak.cpu_used) <= 256


@pytest.mark.parametrize("hours", [1, 4, 5, 8, 24, 72])
def test_the_samples_times_their_step_is_how_long_the_job_ran(hours):
    taken = sampled(hours * 60)
    assert len(taken.cpu_used) <= 256
    assert len(taken.cpu_used) * taken.sample_seconds == pytest.approx(hours * HOUR, abs=2 * taken.sample_seconds)
    assert taken.sample_seconds <= hours * HOUR / 60


# -- JSON -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"nope",
        b"NaN",
        b"[Infinity]",
        b'{"a":-Infinity}',
        b'{"a":1} x',
        b'{"a":1',
        b"{'a':1}",
        b'"\xff"',
        b"\xef\xbb\xbf{}",
        b"\xff\xfe{\0}\0",
        b'"a\nb"',
        b"[" * 100_000,
        b'{"a":' * 100_000,
    ],
    ids=lambda data: repr(data[:20]),
)
def test_what_is_no_json_is_refused_however_it_is_broken(data):
    with pytest.raises(BadRequest, match="the thing is not JSON"):
        jobrunner.from_json(data, "the thing")


def newest_python():
    """The newest Python 3 on this machine, pyenv's too."""
    found = {sys.version_info[1]: sys.executable}
    for folder in ("~/.pyenv/versions/*/bin", "/usr/local/bin", "/usr/bin"):
        for path in glob.glob(os.path.expanduser(folder + "/python3.*")):
            minor = re.search(r"python3\.(\d+)\Z", path)
            if minor:
                found.setdefault(int(minor.group(1)), path)
    return found[max(found)]


def test_a_number_that_takes_minutes_to_read_is_refused_by_every_python():
    assert jobrunner.from_json(b"[1,-2,%s]" % (b"9" * 4300))[:2] == [1, -2]
    with pytest.raises(BadRequest, match="the body is not JSON"):
        jobrunner.from_json(b"9" * 4301)
    assert (jobrunner._short_int("-17"), jobrunner._short_int("9" * 4300)) == (-17, 10**4300 - 1)
    with pytest.raises(ValueError, match="4300 digits"):  # what one without a limit of its own is given
        jobrunner._short_int("9" * 4301)


def test_json_nested_however_deep_never_ends_a_server_not_even_on_the_newest_python(lab):
    server = lab.server(python=newest_python())
    for depth in (500, 2000, 4000, 9000, 100_000):
        status, _, data = server.fetch("/add", b'{"Params":["a"],"X":' + b"[" * depth + b"]" * depth + b"}")
        assert status in (200, 400), data
        assert server.get("/dump")[0] == 200
    assert status == 400


def test_text_is_written_compact_in_utf_8_with_the_originals_escapes():
    assert jobrunner.to_json({"ID": "a", "Params": ["ü€😀", "<b> & c"], "N": None, "B": True}) == (
        '{"ID":"a","Params":["ü€😀","\\u003cb\\u003e \\u0026 c"],"N":null,"B":true}'.encode()
    )


@pytest.mark.parametrize("text", ["\udc80", "a\ud83d", "\udc80 ü <b> & c"])
def test_half_a_surrogate_pair_survives_as_an_escape_beside_the_originals_escapes(text):
    data = jobrunner.to_json([text])
    assert jobrunner.from_json(data) == [text]
    assert not re.search(rb"[<>&]", data)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [-float("inf")], {"a": "\udc80", "b": float("nan")}])
def test_what_json_cannot_say_is_refused(value):
    with pytest.raises(BadRequest, match="JSON"):
        jobrunner.to_json(value)


def test_a_number_too_large_for_a_float_is_refused_at_the_latest_when_it_is_kept():
    with pytest.raises(BadRequest):
        jobrunner.to_json(Job.from_record(jobrunner.from_json(b'{"Params":["a"],"X":1e999}')).to_record())


def test_a_value_nested_too_deep_to_write_is_refused():
    value = []
    for _ in range(50_000):
        value = [value]
    with pytest.raises(BadRequest):
        jobrunner.to_json(value)


# -- files of jobs ----------------------------------------------------------------------------------------------------


def read(tmp_path, data):
    path = tmp_path / "jobs file"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return jobrunner.read_jobs(str(path))


A, B = {"Params": ["a"]}, {"Params": ["b", "ü"], "Runtime": 60}


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
@pytest.mark.parametrize(
    "text, jobs",
    [
        (json.dumps([A, B]), [A, B]),
        (json.dumps([A, B], indent=4), [A, B]),
        (json.dumps([A, B], ensure_ascii=False), [A, B]),
        (f"{json.dumps(A)}\n{json.dumps(B)}\n", [A, B]),
        (f"\r\n{json.dumps(A)}\r\n\r\n{json.dumps(B)}", [A, B]),
        (json.dumps(A), [A]),
        (json.dumps(A, indent=1), [A]),
        ("[]", []),
    ],
)
def test_jobs_are_read_from_a_list_and_from_lines(tmp_path, mark, text, jobs):
    assert read(tmp_path, mark + text.encode()) == jobs


@pytest.mark.parametrize("text", ['{"params":["a"]}', '{"params":["a"]}\n{"PARAMS":["b"]}', '[{"params":["a"]}]'])
def test_a_file_may_spell_its_keys_in_any_letter_case(tmp_path, text):
    assert [Job.from_record(record).params[0] for record in read(tmp_path, text)] == ["a", "b"][: text.count("\n") + 1]


def test_of_a_database_those_that_are_not_over_are_read_and_what_is_held_stays_held(tmp_path):
    database = {
        "Available": {"1": {**A, "ID": "1"}},
        "Leased": {"2": {**B, "ID": "2", "Host": "pc7"}},
        "Finished": {"3": {**A, "ID": "3", "Status": "finished"}},
        "Held": {"4": {**A, "ID": "4", "State": "H"}},
        "Server": {"Format": 1},
    }
    jobs = read(tmp_path, json.dumps(database, indent=1))
    assert [(job["ID"], job.get("Hold", False)) for job in jobs] == [("1", False), ("2", False), ("4", True)]


def test_the_originals_database_with_null_for_a_whole_bucket_is_read(tmp_path):
    jobs = read(tmp_path, json.dumps({"Available": {"x": {**A, "ID": "1"}}, "Leased": None, "Finished": {}}))
    assert [job["ID"] for job in jobs] == ["1"]


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"Params":["a"]}\n{"Params":["b"],}\n', "jobs file line 2"),
        ('{"Params":["a"]}\n\n\nnope\n', "jobs file line 4"),
        ('[\n  {"Params":["a"]},\n  {"Params":["b"],\n  }\n]', "line 4 column 3"),
        ('{"Available":{"1":{"Params":["a"]}}', "line 1 column"),
        ("nope", "jobs file is not JSON"),
        (b'{"Params":["a"]}\n{"Params":["\xff"]}\n', "jobs file line 2"),
    ],
)
def test_a_fault_in_a_file_is_told_with_its_line(tmp_path, text, words):
    with pytest.raises(BadRequest, match=words) as refused:
        read(tmp_path, text)
    assert str(tmp_path) in str(refused.value)


@pytest.mark.parametrize("text", ['{"Available":[1]}', '{"Available":5}', '{"Held":{"1":5}}', '{"Leased":{"1":null}}'])
def test_a_database_of_another_shape_is_refused_in_one_sentence(tmp_path, text):
    with pytest.raises(JobrunnerError):
        for record in read(tmp_path, text):
            Job.from_record(record)


def test_jobs_are_read_from_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"Params":["a"]}\n{"Params":["b"]}\n')))
    assert jobrunner.read_jobs("-") == [{"Params": ["a"]}, {"Params": ["b"]}]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"{}\nnope\n")))
    with pytest.raises(BadRequest, match="standard input line 2"):
        jobrunner.read_jobs("-")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(JobrunnerError, match="cannot read .*missing.json: No such file"):
        jobrunner.read_jobs(str(tmp_path / "missing.json"))


# -- addresses and options --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, url",
    [
        ("pc7", "http://pc7:8088"),
        ("pc7:", "http://pc7:8088"),
        ("pc7/", "http://pc7:8088"),
        ("pc7:90", "http://pc7:90"),
        ("10.0.0.7", "http://10.0.0.7:8088"),
        ("[::1]", "http://[::1]:8088"),
        ("[::1]:90", "http://[::1]:90"),
        ("http://pc7", "http://pc7"),
        ("http://pc7:90/", "http://pc7:90"),
        ("https://pc7/jobs/", "https://pc7/jobs"),
        ("http://ann:pw@pc7:90", "http://ann:pw@pc7:90"),
        ("ann:pw@pc7", "http://ann:pw@pc7:8088"),
    ],
)
def test_a_servers_address_becomes_its_url(text, url):
    assert jobrunner.server_url(text) == url


@pytest.mark.parametrize("text", ["", ":90", "http://", "ftp://pc7", "pc7:x", "pc7:70000", "pc7:0", "::1", "http://["])
def test_what_is_no_servers_address_is_refused(text):
    with pytest.raises(BadRequest, match="is not a server's address"):
        jobrunner.server_url(text)


@pytest.mark.parametrize("place", ["host:99999", "ho st", "host:x", "[::1", ""])
@pytest.mark.parametrize("token", ["jr_SECRET", "jr_SEC/SECRET", "jr_SEC#SECRET", "jr_SEC[SECRET", "jr_SEC\nSECRET"])
def test_an_address_that_makes_no_sense_is_refused_without_the_token_in_it(token, place):
    for scheme in ("http://", ""):
        with pytest.raises(BadRequest) as refusal:
            jobrunner.server_url(f"{scheme}any:{token}@{place}")
        assert "is not a server's address" in str(refusal.value) and "SEC" not in str(refusal.value)
    assert "SEC" not in jobrunner.jobs_environ({"JOBRUNNER_SERVER": f"any:{token}@{place}"})["JOBRUNNER_SERVER"]
    path = {"JOBRUNNER_SERVER": "http://host/a@b"}
    assert jobrunner.jobs_environ(path) == path


def test_resources_become_fields_of_the_record_in_its_units():
    assert jobrunner.parse_resources("walltime=1:00:00,mem=4gb,cput=30m,ncpus=2") == {
        "Runtime": HOUR,
        "Memory": 4 << 30,
        "CpuTime": 1800,
        "Ncpus": 2,
    }


@pytest.mark.parametrize("text", ["", "walltime", "walltime=", "disk=2", "mem=4gb,", "Mem=4gb"])
def test_an_unknown_resource_is_refused_with_those_there_are(text):
    with pytest.raises(BadRequest) as refused:
        jobrunner.parse_resources(text)
    assert all(name in str(refused.value) for name in ("walltime=", "mem=", "cput=", "ncpus="))


@pytest.mark.parametrize("text", ["walltime=soon", "mem=lots", "cput=-1", "ncpus=0", "ncpus=1.5", "ncpus=-1"])
def test_a_resource_with_a_value_that_makes_no_sense_is_refused(text):
    with pytest.raises(BadRequest, match=text.split("=")[1]):
        jobrunner.parse_resources(text)


# -- files and locks --------------------------------------------------------------------------------------------------


def test_a_file_is_replaced_whole(tmp_path):
    new, old = tmp_path / "new", tmp_path / "old"
    new.write_text("new")
    old.write_text("old")
    jobrunner.replace_file(str(new), str(old))
    assert old.read_text() == "new" and not new.exists()


def test_a_replace_that_cannot_be_is_an_error_and_leaves_what_was(tmp_path):
    (tmp_path / "old").write_text("old")
    with pytest.raises(OSError):
        jobrunner.replace_file(str(tmp_path / "missing"), str(tmp_path / "old"))
    assert (tmp_path / "old").read_text() == "old"


def test_on_windows_a_scanner_that_holds_the_file_is_outlasted_but_not_for_ever(tmp_path, monkeypatch):
    (tmp_path / "new").write_text("new")
    real, held = os.replace, [3]

    def replace(source, target):  # as Windows does while somebody has the target open
        held[0] -= 1
        if held[0] >= 0:
            raise PermissionError(13, "Access is denied")
        return real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(jobrunner, "WINDOWS", True)
    jobrunner.replace_file(str(tmp_path / "new"), str(tmp_path / "old"), patience=60)
    assert (tmp_path / "old").read_text() == "new"
    held[0] = 10**9
    with pytest.raises(PermissionError):
        jobrunner.replace_file(str(tmp_path / "new"), str(tmp_path / "old"), patience=0.05)


# Takes the lock, starts a program that outlives it, and says so.
HOLDER = """
import subprocess, sys, jobrunner
lock = jobrunner.FileLock(sys.argv[1])
child = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL)
print(child.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds a lock, and its child."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "lock")], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    child = int(process.stdout.readline())
    yield process, child
    process.kill()
    process.communicate()
    os.kill(child, signal.SIGKILL)


def test_a_lock_is_refused_naming_its_holder_and_ends_with_it_even_by_kill_9_and_with_children_left(tmp_path, holder):
    process, child = holder
    path = str(tmp_path / "lock")
    for _ in range(2):  # asking does not take it away
        with pytest.raises(FileLock.Busy, match=str(process.pid)):
            FileLock(path)
    process.kill()
    process.wait()
    assert alive(child)
    until(lambda: free(path), "the lock to be free", 5)


def free(path):
    try:
        FileLock(path).release()
        return True
    except FileLock.Busy:
        return False


def test_a_lock_that_is_released_can_be_taken_again_and_names_the_new_holder(tmp_path):
    path = str(tmp_path / "lock")
    FileLock(path).release()
    lock = FileLock(path)
    with pytest.raises(FileLock.Busy, match=f"process {os.getpid()}$"):
        FileLock(path)
    lock.release()
    assert free(path)


def test_a_lock_in_a_folder_that_is_not_there_is_an_error_of_the_system(tmp_path):
    with pytest.raises(OSError):
        FileLock(str(tmp_path / "no" / "lock"))

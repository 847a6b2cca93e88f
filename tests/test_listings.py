"""What qstat, qmgr and tracejob print of a record: tables, `name = value`, OpenPBS's keys.  No server, no process."""

import json
import time
from datetime import datetime

import pytest

import jobrunner
from jobrunner import JOB_COLUMNS, QUEUE_COLUMNS, SERVER_COLUMNS, WIDE_COLUMNS, format_time, parse_time, table

QUEUED = {
    "ID": "81b8", "Number": 17, "Label": "17", "Params": ["java", "-jar"], "Runtime": 5400, "State": "Q", "Name": "sim",
    "Queue": "default", "Priority": 0, "Owner": "ann@pc7", "SubmitTime": "2026-11-23T17:27:00.000000Z",
    "Memory": 4 << 30, "Ncpus": 2, "Requires": ["java17", "host=node07"], "Comment": "waits for a free slot",
}  # fmt: skip
OVER = {
    **QUEUED, "State": "F", "Host": "node07", "StartTime": "2026-11-23T17:28:00Z", "EndTime": "2026-11-23T17:29:30.5Z",
    "Status": "failed", "ExitStatus": 265, "CpuTimeUsed": 61.5, "MaxMem": 1025, "RunCount": 2, "Comment": "",
}  # fmt: skip
ARRAY = {
    **QUEUED, "Label": "18[]", "Number": 18, "State": "B", "Array": "1-9:2", "Count": 5, "MaxRunSubjobs": 2,
    "MaxFails": 0, "States": {"Q": 1, "H": 1, "W": 0, "R": 2, "F": 1}, "Statuses": {"finished": 1, "failed": 0},
    "Comment": "",
}  # fmt: skip
QUEUE = {
    "Name": "long", "Priority": 5, "Enabled": True, "Started": False, "MaxRun": 10, "DefaultWalltime": 3600,
    "MaxWalltime": 86400, "States": {"Q": 3, "H": 1, "W": 4, "R": 2, "F": 9},
}  # fmt: skip
NAMES = ["two words", "line\nline", "", " ", "\u2028", "\x1b[31m", "x" * 300, "日本", "-"]


def words(lines):
    return [line.split() for line in lines]


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def test_qstats_columns_are_those_of_pbs():
    lines = table(JOB_COLUMNS, [QUEUED, ARRAY])
    assert words(lines) == [
        ["Job", "id", "Name", "User", "Time", "Use", "S", "Queue"],
        ["-" * n for n in (16, 16, 16, 8, 1, 7)],
        ["17", "sim", "ann", "00:00:00", "Q", "default"],
        ["18[]", "sim", "ann", "00:00:00", "B", "default"],
    ]


def test_every_line_of_a_table_is_aligned_and_has_no_blanks_at_its_end():
    long = {**QUEUED, "Label": "1234567890123456[100000]", "CpuTimeUsed": 1e9, "Queue": "q" * 40}
    for columns in (JOB_COLUMNS, WIDE_COLUMNS):
        head, rule, *rows = table(columns, [QUEUED, long])
        ends = [at for at, char in enumerate(rule) if char == " "]
        assert all(line[end : end + 1] in (" ", "") for line in (head, *rows) for end in ends)
        assert all(line == line.rstrip() for line in (head, rule, *rows))


@pytest.mark.parametrize("name", NAMES, ids=ascii)
@pytest.mark.parametrize("columns, state, count", [(JOB_COLUMNS, 4, 6), (WIDE_COLUMNS, 9, 11)], ids=["usual", "wide"])
def test_a_job_is_a_line_of_as_many_words_as_columns_whatever_its_names(name, columns, state, count):
    job = {**QUEUED, "Name": name, "Owner": name + "@pc", "Queue": name}
    lines = table(columns, [job])
    assert len(lines) == 3 and all(line.isprintable() for line in lines)
    assert (len(lines[2].split()), lines[2].split()[state]) == (count, "Q")


def test_the_wide_columns_say_what_is_asked_for_and_how_long_it_ran():
    rows = words(table(WIDE_COLUMNS, [QUEUED, OVER, {**QUEUED, "Memory": 0, "Runtime": 0}]))[2:]
    assert rows[0][3:] == ["sim", "--", "1", "2", "4gb", "01:30", "Q", "--"]
    assert rows[1][9:] == ["F", "00:01"]
    assert rows[2][7:9] == ["--", "--"]


@pytest.mark.parametrize(
    "size, text", [(1 << 30, "1gb"), (3 << 20, "3mb"), (1536, "2kb"), (5 << 40, "5tb"), (1, "1kb")]
)
def test_a_size_is_shown_in_the_largest_unit_that_fits(size, text):
    assert jobrunner._memory(size) == text


def test_notes_stand_below_a_jobs_line():
    lines = table(WIDE_COLUMNS, [QUEUED, OVER], lambda job: [job["Comment"] or "\n"])
    assert lines[3] == "   waits for a free slot" and lines[5] == "   ?"


def test_queues_and_the_server_in_pbs_columns():
    head, _, row = words(table(QUEUE_COLUMNS, [QUEUE]))
    assert head == "Queue Max Tot Ena Str Que Run Hld Wat Trn Ext Type".split()
    assert row == "long 10 10 yes no 3 2 1 4 0 0 Exec".split()
    head, _, row = words(table(SERVER_COLUMNS, [{"Name": "pc7", "States": QUEUE["States"]}]))
    assert head == "Server Max Tot Que Run Hld Wat Trn Ext Status".split()
    assert row == "pc7 0 10 3 2 1 4 0 0 Active".split()


# ---------------------------------------------------------------------------------------------------------------------
# OpenPBS's keys
# ---------------------------------------------------------------------------------------------------------------------


def local(text):
    return time.ctime(parse_time(text))  # C's ctime is what PBS prints


def test_a_queued_job_in_openpbs_keys():
    job = jobrunner.pbs_job(QUEUED)
    assert job["Resource_List"] == {
        "walltime": "01:30:00", "mem": "4194304kb", "ncpus": 2, "host": "node07", "properties": "java17",
    }  # fmt: skip
    assert (job["Job_Name"], job["Job_Owner"], job["job_state"], job["queue"]) == ("sim", "ann@pc7", "Q", "default")
    assert job["ctime"] == job["qtime"] == job["etime"] == job["mtime"] == local(QUEUED["SubmitTime"])
    assert (job["comment"], job["Hold_Types"], job["Rerunable"]) == ("waits for a free slot", "n", "True")
    assert not {"stime", "Exit_status", "resources_used", "exec_host", "array", "depend"} & set(job)


def test_a_finished_job_in_openpbs_keys():
    job = jobrunner.pbs_job(OVER)
    assert (job["Exit_status"], job["exec_host"], job["Status"]) == (265, "node07", "failed")
    assert job["resources_used"] == {"walltime": "00:01:30", "cput": "00:01:01", "mem": "2kb"}
    assert (job["stime"], job["mtime"]) == (local(OVER["StartTime"]), local(OVER["EndTime"]))
    assert job["comment"] == "failed: exit status 265 (killed by signal 9)"


def test_what_a_job_waits_for_and_what_is_only_kept_is_listed():
    waits = {"State": "H", "Hold": True, "Depend": ["afterok:3", "afterany:4[]"], "StartAfter": "2027-01-01T00:00:00Z"}
    kept = {"Account": "acc", "Place": "free", "MailPoints": "n"}
    record = {**QUEUED, **waits, **kept, "Retries": 2, "Join": "oe", "Shell": "/bin/bash"}
    job = jobrunner.pbs_job(record)
    assert (job["Hold_Types"], job["depend"], job["retry"]) == ("us", "afterok:3,afterany:4[]", 2)
    assert (job["Account_Name"], job["Mail_Points"], job["Resource_List"]["place"]) == ("acc", "n", "free")
    assert (job["Join_Path"], job["Shell_Path_List"]) == ("oe", "/bin/bash")
    assert job["Execution_Time"] == local(record["StartAfter"]) and "etime" not in job


def test_an_array_in_openpbs_keys():
    job = jobrunner.pbs_job(ARRAY)
    assert (job["job_state"], job["array"], job["array_indices_submitted"]) == ("B", "True", "1-9:2")
    assert job["array_state_count"] == "Queued:2 Running:2 Exiting:0 Expired:1 "
    assert (job["max_run_subjobs"], job["Statuses"]) == (2, {"finished": 1})
    assert job["comment"] == "1 queued, 1 held, 2 running, 1 finished"
    assert not {"max_fails", "Exit_status"} & set(job)


@pytest.mark.parametrize("finished, code", [(5, 0), (4, 1)])
def test_an_arrays_exit_status_is_0_only_if_all_its_subjobs_finished(finished, code):
    over = {**ARRAY, "State": "F", "Statuses": {"finished": finished, "failed": 5 - finished}}
    assert jobrunner.pbs_job(over)["Exit_status"] == jobrunner.shell_code(over) == code


def test_a_subjob_names_its_array_and_its_index():
    job = jobrunner.pbs_job({**QUEUED, "Index": 0, "Label": "17[0]"})
    assert (job["array_id"], job["array_index"]) == ("17[]", "0") and "array" not in job


@pytest.mark.parametrize("changes", [
    {"State": "R"}, {"State": "F"}, {"State": "F", "Status": "finished", "ExitStatus": 0},
    {"State": "F", "Status": "deleted"}, {"State": "Q"}, {"State": "H"}, {"State": "W"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("ran", [False, True])
def test_every_job_has_a_comment_because_psij_asks_for_it_unseen(changes, ran):
    times = {"StartTime": OVER["StartTime"], "Host": "node07"} if ran else {}
    assert jobrunner.pbs_job({**QUEUED, "Comment": "", **changes, **times})["comment"]


def test_a_queue_lists_what_qmgr_can_set_and_what_is_in_it():
    assert jobrunner.pbs_queue(QUEUE) == {
        "queue_type": "Execution", "total_jobs": 10,
        "state_count": "Transit:0 Queued:3 Held:1 Waiting:4 Running:2 Exiting:0 Begun:0",
        "Priority": 5, "max_run": 10, "resources_default": {"walltime": "01:00:00"},
        "resources_max": {"walltime": "24:00:00"}, "enabled": "True", "started": "False",
    }  # fmt: skip


def test_the_full_listing_is_a_line_a_field_whatever_is_in_it():
    lines = jobrunner.full("Job Id: 17", {"a": "x\ny", "b": {"c": 1, "d": "é\u2028"}, "e": ["f", "g"], "h": True})
    assert lines == ["Job Id: 17", "    a = x?y", "    b.c = 1", "    b.d = é?", "    e = f g", "    h = True", ""]


@pytest.mark.parametrize("name", [*NAMES, 'quo"te', "\ud800", "{}]"], ids=ascii)
def test_the_json_listing_is_one_document_whatever_the_names(name):
    api = jobrunner.ServerApi("http://pc7:1")
    job = {**QUEUED, "Name": name, "Owner": name, "Env": {"A": name}, "Params": [name or "x"]}
    text = jobrunner.document(api, "Jobs", {"17": jobrunner.pbs_job(job)})
    document = json.loads(text)
    assert list(document) == ["timestamp", "pbs_version", "pbs_server", "Jobs"] and document["pbs_server"] == "pc7"
    assert document["Jobs"]["17"]["Job_Name"] == name and text.isascii()


# ---------------------------------------------------------------------------------------------------------------------
# A job's history
# ---------------------------------------------------------------------------------------------------------------------


def moment(second):
    return datetime(2026, 11, 23, 17, 27, second).timestamp()


def test_the_history_of_a_job_ends_with_its_latest_run():
    times = {"SubmitTime": moment(0), "StartTime": moment(20), "EndTime": moment(30)}
    before = {"History": [[format_time(moment(10)), "released"]], "Comment": "killed"}
    record = {**OVER, **before, **{key: format_time(when) for key, when in times.items()}}
    assert jobrunner.history(record, moment(59)) == [
        (moment(0), "queued by ann@pc7, named sim"),
        (moment(10), "released"),
        (moment(20), "leased by node07, run 2"),
        (moment(30), "failed, exit status 265 (killed by signal 9): killed"),
    ]


def test_the_history_of_a_job_that_is_not_over_says_last_why():
    assert jobrunner.history(QUEUED, moment(59))[-1] == (moment(59), "queued: waits for a free slot")
    assert jobrunner.history(ARRAY, moment(59))[-1] == (moment(59), "begun: 1 queued, 1 held, 2 running, 1 finished")


@pytest.mark.parametrize(
    "record, exit_status",
    [
        ({"Status": "deleted"}, 265),  # it never ran, or was not waited for
        ({"Status": "deleted", "ExitStatus": 271}, 271),
        ({"Status": "finished"}, None),  # reported by an original client, which does not say
        ({"Status": "failed", "ExitStatus": -104}, -104),
    ],
)
def test_whatever_did_not_end_well_has_an_exit_status_that_says_so(record, exit_status):
    job = {"Label": "17", "Number": 17, "Name": "n", "Queue": "default", "Priority": 0, "Params": ["x"], "Runtime": 0}
    shown = jobrunner.pbs_job({**job, "ID": "u", "State": "F", "SubmitTime": "2026-11-23T12:00:00Z", **record})
    assert shown.get("Exit_status") == exit_status


def test_what_waits_until_the_year_9999_is_listed_also_where_local_times_end_in_3000(monkeypatch):
    """As Windows' do."""
    text, local = "9999-01-01T10:00:00Z", time.localtime
    assert jobrunner._pbs_time("2026-11-23T17:27:00Z") == time.ctime(parse_time("2026-11-23T17:27:00Z"))

    def localtime(moment):
        if moment > 1 << 35:
            raise OSError(22, "Invalid argument")
        return local(moment)

    monkeypatch.setattr(time, "localtime", localtime)
    assert jobrunner._pbs_time(text) == "Fri Jan  1 10:00:00 9999"

"""What the client reads and decides: the output of ps and tasklist, trees of processes, usage, limits, the dead-process
watch, allowed commands, back-off, what is reported of an end.  Numbers and clocks in, verdicts out; where the system
itself must be asked, real processes."""

import logging
import os
import shutil
import signal
import subprocess
import sys
import types

import pytest

import client
from client import Backoff, DeadWatch, Process, Run, Usage
from harness import until
from jobrunner import STATUSES, BadRequest, Job, ServerAway

MIB = 1 << 20


def process(pid, ppid=1, pgid=None, cpu=0.0, memory=0):
    return Process(pid, ppid, pid if pgid is None else pgid, cpu, memory)


def table(*processes):
    return {p.pid: p for p in processes}


# -- ps ---------------------------------------------------------------------------------------------------------------

# Debian 12, Linux 6.18 x86_64, procps-ng 4.0.2, 12709 s after it was booted, cut to the lines of interest:
#   LC_ALL=C ps S -A -o pid=,ppid=,pgid=,bsdtime=,rss=,stat=,etimes=
# init, a kernel thread, a busy Python in a session of its own, a shell and its two children of which one has left its
# session, a zombie, a process that a debugger has stopped, one that SIGSTOP has.
PS = """\
    1     0     0 186:12 13188 SLl    12708
    2     0     0   0:00     0 S      12708
  443   394   443   0:01 13540 Ss         4
  444   394   444   0:00  1784 Ss         4
  445   394   393   0:00     0 Z          4
  446   444   446   0:00  1736 Ss         4
  447   444   444   0:00  1752 S          4
  448   394   393   0:00 11388 t          4
  449   394   393   0:00   188 T          4
"""
BOOTED = 12709.0
# ps -o time=, which no ps prints for bsdtime but others might, of two processes of which /proc/PID/stat was covered by a
# file with another utime: nobody waits three days for a fixture.
PS_LONG = """\
17121 17080 17121 22:30:00 13492 Ss   7
17127 17080 17121 3-04:05:06 1760 T   7
"""


def test_processes_are_read_from_ps_with_group_cpu_memory_and_start():
    found = client.parse_ps(PS, BOOTED)
    assert found[1] == Process(1, 0, 0, 186 * 60 + 12, 13188 * 1024, 1.0)
    assert found[443] == Process(443, 394, 443, 1, 13540 * 1024, 12705.0)
    assert found[446][:3] == (446, 444, 446)


def test_a_zombie_is_told_from_one_that_is_stopped():
    assert client.parse_ps(PS, BOOTED)[445].zombie
    assert not client.parse_ps(PS, BOOTED)[449].zombie


def test_a_process_that_a_debugger_has_stopped_is_still_one():
    assert client.parse_ps(PS, BOOTED)[448].memory == 11388 * 1024


@pytest.mark.parametrize("pid, cpu", [(17121, 22 * 3600 + 30 * 60), (17127, 3 * 86400 + 4 * 3600 + 5 * 60 + 6)])
def test_cpu_time_is_read_with_hours_and_with_days(pid, cpu):
    assert client.parse_ps(PS_LONG, BOOTED)[pid].cpu == cpu


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "error: unsupported SysV option\n\nUsage:\n ps [options]\n",
        "17121 17080\n",
        PS.splitlines()[2][:30],  # ps was killed in the middle of a line
    ],
)
def test_what_is_no_line_of_ps_is_no_process(text):
    assert client.parse_ps(text, BOOTED) == {}


def test_a_start_that_cannot_be_read_leaves_the_process_in():
    found = client.parse_ps("17121 17080 17121 00:00:01 13492 Ss   -", BOOTED)
    assert found[17121].start is None and found[17121].cpu == 1


def snapshot():
    return client.LinuxTools(logging.getLogger("test")).snapshot()


def test_a_snapshot_has_every_process_with_its_parent_its_group_and_its_start():
    before = client.boot_clock()
    child = subprocess.Popen(["sleep", "60"], start_new_session=True)
    after = client.boot_clock()
    try:
        found = snapshot()
    finally:
        child.kill()
        child.wait()
    assert found[child.pid][:4] == (child.pid, os.getpid(), child.pid, 0)
    assert before - 2 < found[child.pid].start < after + 2
    assert client.LinuxTools(None).is_same(found[child.pid], after)
    assert not client.LinuxTools(None).is_same(found[child.pid], after - 60)
    assert found[os.getpid()].memory > MIB


@pytest.mark.parametrize("age", ['"4123144320"', "$7 + 5000", '"-"'])
def test_where_ps_reckons_from_another_uptime_as_in_some_containers_a_job_is_still_known_by_its_start(
    monkeypatch, tmp_path, age
):
    (tmp_path / "ps").write_text(f"""#!/bin/sh\n{shutil.which("ps")} "$@" | awk '{{ $7 = {age}; print }}'\n""")
    (tmp_path / "ps").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    child = subprocess.Popen(["sleep", "60"])
    started = client.boot_clock()
    try:
        process = snapshot()[child.pid]
    finally:
        child.kill()
        child.wait()
    tools = client.LinuxTools(None)
    assert tools.is_same(process, started)
    assert not tools.is_same(process, started - 60) and not tools.is_same(process, started + 60)


def test_a_process_that_is_younger_than_the_look_of_ps_was_started_just_then():
    line = "27019 20351 27019 0:00 1752 Ss 4123168604\n"
    assert client.parse_ps(line, 19570.25)[27019].start == 19570.25
    assert client.parse_ps(line.replace("4123168604", "19570"), 19570.25)[27019].start == 0.25


def test_a_snapshot_that_failed_is_none_and_not_an_empty_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert snapshot() is None
    (tmp_path / "ps").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "ps").chmod(0o755)
    assert snapshot() is None


def test_cpu_time_of_children_that_came_and_went_between_two_snapshots_is_the_trees():
    # a job whose work is done by many short programs must not look dead, nor escape its cputime limit
    spin = f"{sys.executable} -SEc 'import time\nwhile time.process_time() < 0.4: pass'"
    job = subprocess.Popen(
        ["sh", "-c", f"{spin}; {spin}; {spin}; sleep 60; true"], start_new_session=True, stdout=subprocess.DEVNULL
    )
    try:
        until(lambda: reaped_cpu(job.pid) >= 1.1, "the children to end")
        usage = Usage()
        usage.update(client.tree(snapshot(), job.pid))
        assert usage.cpu >= 1
    finally:
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()


def reaped_cpu(pid):
    """CPU seconds of a process's children that are over."""
    with open(f"/proc/{pid}/stat") as file:
        words = file.read().rsplit(")", 1)[1].split()
    return (int(words[13]) + int(words[14])) / os.sysconf("SC_CLK_TCK")


# -- tasklist ---------------------------------------------------------------------------------------------------------

# `tasklist /v /fo csv /nh` and the same with /fi "PID eq 99999", the bytes as they came: ../shared/windows/tasklist.py,
# which prints what Windows prints in that language, under a Windows Python 3.11.9 and Wine 10; cut to two processes.
ROWS = {
    "en": b'"services.exe","56","Console","1","18,588 K","Running","PC\\user","0:00:00","N/A"\r\n'
    b'"python.exe","384","Console","1","31,124 K","Running","PC\\user","0:00:00","N/A"\r\n',
    "de": b'"services.exe","56","Console","1","18.588 K","Running","PC\\user","0:00:00","N/A"\r\n'
    b'"python.exe","424","Console","1","31.104 K","Running","PC\\user","0:00:00","N/A"\r\n',
    "fr": b'"services.exe","56","Console","1","18\xff588 Ko","Running","PC\\user","0:00:00","N/A"\r\n'
    b'"python.exe","464","Console","1","31\xff096 Ko","Running","PC\\user","0:00:00","N/A"\r\n',
    "ru": b'"services.exe","56","Console","1","18\xff588 \x8a\x81","Running","PC\\user","0:00:00","N/A"\r\n'
    b'"python.exe","504","Console","1","31\xff208 \x8a\x81","Running","PC\\user","0:00:00","N/A"\r\n',
    "no": b'"services.exe","56","Console","1","18\xff588 K","Running","PC\\user","0:00:00","N/A"\r\n'
    b'"python.exe","544","Console","1","31\xff176 K","Running","PC\\user","0:00:00","N/A"\r\n',
    "ch": b'"services.exe","56","Console","1","17\'920 K","Running","PC\\user","0:00:00","N/A"\r\n'
    b'"python.exe","584","Console","1","31\'152 K","Running","PC\\user","0:00:00","N/A"\r\n',
}
KIB = {
    "en": {56: 18588, 384: 31124},
    "de": {56: 18588, 424: 31104},
    "fr": {56: 18588, 464: 31096},
    "ru": {56: 18588, 504: 31208},
    "no": {56: 18588, 544: 31176},
    "ch": {56: 17920, 584: 31152},
}
NO_MATCH = {
    "en": b"INFO: No tasks are running which match the specified criteria.\r\n",
    "de": b"INFORMATION: Es werden keine Aufgaben mit den angegebenen Kriterien ausgef\x81hrt.\r\n",
    "fr": b"Information\xff: aucune t\x83che en service ne correspond aux crit\x8ares sp\x82cifi\x82s.\r\n",
    "ru": b"\x88\xad\xe4\xae\xe0\xac\xa0\xe6\xa8\xef: \xad\xa5\xe2 \xa2\xeb\xaf\xae\xab\xad\xef\xa5\xac\xeb\xe5 "
    b"\xa7\xa0\xa4\xa0\xe7, \xe1\xae\xae\xe2\xa2\xa5\xe2\xe1\xe2\xa2\xe3\xee\xe9\xa8\xe5 "
    b"\xaa\xe0\xa8\xe2\xa5\xe0\xa8\xef\xac.\r\n",
    "on two lines": b"INFORMATION: Es werden keine Aufgaben mit den angegebenen\r\nKriterien ausgef\x81hrt.\r\n",
}


def tasklist(printed):
    """As WindowsTools.snapshot reads it."""
    return client.parse_tasklist(printed.decode("utf-8", "replace"))


@pytest.mark.parametrize("language", ROWS)
def test_processes_are_read_from_tasklist_in_every_language(language):
    found = tasklist(ROWS[language])
    assert {pid: p.memory // 1024 for pid, p in found.items()} == KIB[language]
    assert all(p == Process(pid, 0, 0, 0, p.memory, None) for pid, p in found.items())


@pytest.mark.parametrize("language", NO_MATCH)
def test_the_line_that_says_nothing_matches_is_no_process_in_any_language(language):
    assert tasklist(NO_MATCH[language]) == {}


def row(title="N/A", pid=4711, memory="1,204,164 K", cpu="477:02:40"):
    return f'"java.exe","{pid}","Console","1","{memory}","Unknown","PC\\user","{cpu}","{title}"\r\n'.encode()


@pytest.mark.parametrize(
    "cpu, seconds",
    [("0:00:07", 7), ("0:59:59", 3599), ("477:02:40", 1717360), ("10000:00:00", 36_000_000), ("N/A", 0), ("", 0)],
)
def test_cpu_time_has_unbounded_hours_and_may_be_unknown(cpu, seconds):
    assert tasklist(row(cpu=cpu))[4711].cpu == seconds


@pytest.mark.parametrize(
    "memory, kib", [("1,204,164 K", 1204164), ("90 384 Ko", 90384), ("58,972 K", 58972), ("8 K", 8), ("N/A", 0)]
)
def test_of_the_memory_the_digits_count(memory, kib):
    assert tasklist(row(memory=memory))[4711].memory == kib * 1024


TITLES = ["a, b", 'say ""hi""', '"",""', 'say "hi" there', '5 "', 'x","y', "\udcff", "a\x0cb\0c"]


@pytest.mark.parametrize("title", TITLES, ids=ascii)
def test_a_window_title_of_any_kind_changes_and_hides_no_process(title):
    printed = row().replace(b"N/A", title.encode("utf-8", "surrogateescape")) + row(pid=4715)
    assert {pid: p.cpu for pid, p in tasklist(printed).items()} == {4711: 1717360, 4715: 1717360}


@pytest.mark.parametrize(
    "printed",
    [
        b"",
        b"\r\n",
        b'"java.exe","4711","Console","1","1,204,164 K"\r\n',  # without /v
        row().replace(b"4711", b"PID"),
        b"ERROR: Access denied\r\n",
    ],
)
def test_what_is_no_row_of_a_process_is_none(printed):
    assert tasklist(printed) == {}


# -- trees ------------------------------------------------------------------------------------------------------------


def pids(members):
    return sorted(member.pid for member in members)


def test_the_tree_of_the_capture_holds_the_child_that_left_its_session():
    assert pids(client.tree(client.parse_ps(PS, BOOTED), 444)) == [444, 446, 447]


def test_a_tree_is_the_group_and_all_descendants_also_of_members_whose_parent_is_gone():
    processes = table(
        process(10),
        process(11, ppid=10, pgid=10),
        process(12, ppid=11, pgid=12),  # left the group
        process(13, ppid=12, pgid=12),
        process(14, ppid=1, pgid=10),  # its parent is gone, the group tells
        process(15, ppid=14, pgid=15),
        process(20),
        process(21, ppid=20, pgid=20),
        process(1, ppid=0),
    )
    assert pids(client.tree(processes, 10)) == [10, 11, 12, 13, 14, 15]


def test_the_tree_of_a_leader_that_is_gone_is_what_is_left_of_its_group():
    assert pids(client.tree(table(process(1, ppid=0), process(11, pgid=10), process(12, ppid=11)), 10)) == [11, 12]
    assert client.tree(table(process(1, ppid=0), process(20)), 10) == []


def test_on_windows_where_no_parent_is_told_a_tree_is_the_process_alone():
    assert pids(client.tree(tasklist(row() + row(pid=4715) + row(pid=0)), 4711)) == [4711]


def test_a_circle_of_parents_ends():
    assert pids(client.tree(table(process(10, ppid=11), process(11, ppid=10)), 10)) == [10, 11]


# -- usage ------------------------------------------------------------------------------------------------------------


def used(*samples):
    """Usage after some snapshots, each {pid: cpu}."""
    usage = Usage()
    for sample in samples:
        usage.update([process(pid, cpu=cpu, memory=MIB) for pid, cpu in sample.items()])
    return usage


@pytest.mark.parametrize(
    "samples, cpu",
    [
        ([{10: 1, 11: 5}], 6),
        ([{10: 1}, {10: 4}], 4),
        ([{10: 1, 11: 5}, {10: 2}], 6),  # 11 has ended, and 10 did not wait for it
        ([{10: 1, 11: 5}, {10: 7}], 7),  # 11 has ended, and 10 has its CPU time now
        ([{10: 1, 11: 5}, {10: 1}, {10: 1, 12: 3}], 9),
        ([{10: 1, 11: 5}, {10: 1, 11: 2}], 6),  # 11 has ended, its number is another's
        ([{10: 1}, {}], 1),
        ([], 0),
    ],
)
def test_cpu_time_is_the_trees_and_that_of_processes_that_are_gone_is_kept(samples, cpu):
    assert used(*samples).cpu == cpu


def test_memory_is_what_is_used_now_and_its_peak_is_kept():
    usage = used({10: 0, 11: 0, 12: 0}, {10: 0})
    assert (usage.memory, usage.max_memory) == (MIB, 3 * MIB)


# -- limits -----------------------------------------------------------------------------------------------------------


def verdicts(job, *samples):
    """What over_limit says of snapshots (cpu, memory) in a row, as the agent asks it."""
    usage, before, said = Usage(), False, []
    for cpu, memory in samples:
        usage.update([process(10, cpu=cpu, memory=memory)])
        said.append(client.over_limit(job, usage, before))
        before = usage.memory > job.memory
    return said


def test_memory_must_be_over_its_limit_in_two_samples_in_a_row():
    job = Job(["a"]).but(memory=100)
    assert verdicts(job, (0, 101), (0, 99), (0, 101), (0, 100), (0, 102), (0, 101)) == ["", "", "", "", "", "memory"]


def test_cpu_time_is_over_its_limit_at_once_and_only_when_above():
    assert verdicts(Job(["a"]).but(cputime=10), (9, 0), (10, 0), (10.5, 0)) == ["", "", "cputime"]


def test_no_limit_is_never_over():
    assert verdicts(Job(["a"]), (10**9, 10**15), (10**9, 10**15)) == ["", ""]


# -- dead -------------------------------------------------------------------------------------------------------------


def dead_at(samples, window=600, percent=5, gap=180):
    """The clock at which a job with samples (clock, cpu so far) is found dead; None = never."""
    watch = DeadWatch(window, percent, gap)
    return next((clock for clock, cpu in samples if watch.is_dead(clock, cpu)), None)


def every_minute(*cpu_per_minute, start=1000):
    """Samples a minute apart, each having used so many seconds of CPU since the last."""
    total, samples = 0, [(start, 0)]
    for number, cpu in enumerate(cpu_per_minute, 1):
        total += cpu
        samples.append((start + 60 * number, total))
    return samples


@pytest.mark.parametrize(
    "cpu_per_minute, dead",
    [
        ([0] * 9, None),
        ([0] * 10, 1600),
        ([2] * 10, 1600),  # 5 % of a core are 3 s a minute
        ([3] * 100, None),
        ([60] * 5 + [0] * 10, 1900),
        ([0] * 9 + [3] + [0] * 9, None),
        ([0] * 9 + [3] + [0] * 10, 2200),
        ([0, 0, 0, 0, 3] * 20, None),
    ],
)
def test_a_job_is_dead_when_quiet_for_the_whole_window_and_one_busy_sample_starts_it_anew(cpu_per_minute, dead):
    assert dead_at(every_minute(*cpu_per_minute)) == dead


def test_a_gap_between_samples_starts_the_window_anew_because_the_machine_slept():
    asleep = every_minute(*[0] * 9) + [(9000, 0)]
    assert dead_at(asleep) is None
    again = [(9000 + 60 * minute, 0) for minute in range(1, 11)]
    assert dead_at(asleep + again) == 9600
    assert dead_at([(0, 0), (180, 0), (360, 0), (540, 0), (720, 0)]) == 720  # no longer apart than allowed


def test_the_first_sample_is_no_verdict_however_long_the_clock_has_run():
    assert dead_at([(10**9, 0)]) is None


@pytest.mark.parametrize("child_cpu, dead", [(0, True), (6, False)])
def test_a_busy_child_counts_also_one_that_left_the_group_and_one_that_takes_another_ones_place(child_cpu, dead):
    watch, usage = DeadWatch(600, 5, 180), Usage()
    found = False
    for minute in range(21):
        first, second = min(minute, 10) * child_cpu, max(0, minute - 10) * child_cpu
        children = [process(11, ppid=10, cpu=first)] if minute <= 10 else [process(12, ppid=10, cpu=second)]
        usage.update(client.tree(table(process(10), *children), 10))
        found = watch.is_dead(60.0 * minute, usage.cpu) or found
    assert found is dead


# -- commands that may run --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, words",
    [
        ("java -jar job.jar", ["java", "-jar", "job.jar"]),
        ("  java \t -jar ", ["java", "-jar"]),
        (r'"C:\Program Files\java.exe" -jar', [r"C:\Program Files\java.exe", "-jar"]),
        (r"C:\new\tool.exe \\server\share", [r"C:\new\tool.exe", r"\\server\share"]),
        ("sh -c 'a \"b\" c'", ["sh", "-c", 'a "b" c']),
        ("a ''", ["a", ""]),
        ('x" y "z', ["x y z"]),
        ("a # b", ["a", "#", "b"]),
        ("ä 'ö ü' a;b|c&d", ["ä", "ö ü", "a;b|c&d"]),
    ],
)
def test_a_command_is_split_at_blanks_with_quotes_and_without_escapes(text, words):
    assert client.split_words(text) == words


@pytest.mark.parametrize("text", ['java "', "it's"])
def test_a_quote_that_does_not_end_is_refused(text):
    with pytest.raises(BadRequest, match="is no command"):
        client.split_words(text)


@pytest.mark.parametrize(
    "params, prefixes, verdict",
    [
        (["rm", "-rf"], [], True),
        (["java", "-jar", "job.jar", "169"], ["java -jar job.jar"], True),
        (["java", "-jar", "job.jar"], ["java -jar job.jar"], True),
        (["java", "-jar", "job.jarx"], ["java -jar job.jar"], False),
        (["java", "-jar", "job.jar; rm"], ["java -jar job.jar"], False),
        (["java", "-jar"], ["java -jar job.jar"], False),
        (["java -jar job.jar"], ["java -jar job.jar"], False),
        (["javaw", "-jar", "job.jar"], ["java"], False),
        (["Java"], ["java"], False),
        (["/usr/bin/java"], ["java"], False),
        (["hostname"], ["java -jar job.jar", "hostname"], True),
        (["a b", "c"], ["'a b'"], True),
        (["a", "b"], ["'a b'"], False),
    ],
)
def test_a_command_may_run_if_it_starts_with_the_words_of_a_prefix(params, prefixes, verdict):
    assert client.allowed(params, [client.split_words(prefix) for prefix in prefixes]) is verdict


# -- back-off ---------------------------------------------------------------------------------------------------------


def test_back_off_doubles_from_one_second_to_sixty_and_begins_again_after_a_success():
    backoff = Backoff(lambda: 0.5)
    assert [backoff.next() for _ in range(8)] == [1, 2, 4, 8, 16, 32, 60, 60]
    backoff.reset()
    assert backoff.next() == 1


def test_a_server_that_is_away_for_days_is_still_asked_every_minute():
    backoff = Backoff(lambda: 0.5)
    assert [backoff.next() for _ in range(5000)][-1] == 60


@pytest.mark.parametrize("chance, factor", [(0.0, 0.75), (0.999999, 1.25)])
def test_each_wait_is_up_to_a_quarter_shorter_or_longer(chance, factor):
    backoff = Backoff(lambda: chance)
    assert [backoff.next() for _ in range(7)] == pytest.approx([n * factor for n in (1, 2, 4, 8, 16, 32, 60)], rel=1e-5)


def test_two_clients_do_not_come_back_in_step():
    one, two = Backoff(), Backoff()
    assert [one.next() for _ in range(20)] != [two.next() for _ in range(20)]


# -- how an end is reported -------------------------------------------------------------------------------------------


def report(end, ending="", killed=False, **fields):
    run = Run(Job(["a"], 60).but(id="81b8", lease="secret", **fields), "", 0.0)
    run.ending, run.killed = ending, killed
    run.usage.update([process(10, cpu=1.5, memory=5 * MIB)])
    return client.end_report(run, end)


@pytest.mark.parametrize(
    "end, ending, status, exit_status, comment",
    [
        ({"ExitStatus": 0}, "", "finished", 0, ""),
        ({"ExitStatus": 3}, "", "failed", 3, ""),
        ({"ExitStatus": 265}, "", "failed", 265, ""),
        ({"ExitStatus": 3221225786}, "", "failed", 3221225786, ""),
        ({"ExitStatus": -8, "Comment": "cannot start x"}, "", "failed", -8, "cannot start x"),
        ({"ExitStatus": -9, "Comment": "cannot open o"}, "", "failed", -9, "cannot open o"),
        ({"ExitStatus": 271}, "timeout", "timeout", -11, "walltime of 60 s"),
        ({"ExitStatus": 265}, "dead", "dead", -101, "no CPU time"),
        ({"ExitStatus": 265}, "memory", "memory", -10, "more than 4096 bytes"),
        ({"ExitStatus": 0}, "cputime", "cputime", -12, "more than 7 s"),
        ({"ExitStatus": 271}, "deleted", "deleted", 271, "deleted while it ran"),
        ({"ExitStatus": 271}, "released", "released", 271, "given back"),
        ({"Status": "lost", "ExitStatus": -103, "Comment": "unseen"}, "", "lost", -103, "unseen"),
        ({"Status": "refused", "ExitStatus": -102, "Comment": "only java"}, "", "refused", -102, "only java"),
    ],
)
def test_an_end_is_reported_with_its_status_exit_status_and_reason(end, ending, status, exit_status, comment):
    told = report(end, ending, memory=4096, cputime=7)
    assert (told["Status"], told["ExitStatus"]) == (status, exit_status)
    assert comment in told["Comment"] and bool(comment) == bool(told["Comment"])
    assert status in STATUSES or status == "released"
    assert (told["ID"], told["Lease"], told["CpuTimeUsed"], told["MaxMem"]) == ("81b8", "secret", 1.5, 5 * MIB)


@pytest.mark.parametrize("killed, exit_status", [(False, 271), (True, 265)])
def test_on_windows_where_a_killed_process_returns_1_the_report_says_what_was_done(monkeypatch, killed, exit_status):
    monkeypatch.setattr(client, "WINDOWS", True)
    assert report({"ExitStatus": 1}, "deleted", killed)["ExitStatus"] == exit_status
    assert report({"ExitStatus": 1}, "timeout", killed)["ExitStatus"] == -11


def test_the_moment_the_keeper_wrote_down_is_the_end_not_the_moment_of_the_report():
    written = "2026-11-23T12:00:00.000000Z"
    assert report({"ExitStatus": 0, "EndTime": written})["EndTime"] == written
    assert report({"ExitStatus": 0})["EndTime"] > "2026"


# -- names and outputs ------------------------------------------------------------------------------------------------

HOSTILE = [
    "",
    ".",
    "..",
    "...",
    "../../etc/passwd",
    "/etc/passwd",
    "..\\..\\boot.ini",
    "C:\\x",
    "file:stream",
    "a\nb",
    "a\0b",
    "a b ",
    "end.",
    "\u202egpj.exe",
    "\udc80",
    "ü" * 300,
    "x" * 300,
    "CON",
    "nul",
    "aux.h",
    "COM1.tar.gz",
    "lpt9.",
    "Prn",
]


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_a_hostile_text_becomes_one_name_that_leads_nowhere_else_and_is_a_file_on_every_system(text, tmp_path):
    name = client._file_name(text)
    assert name and set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.+-")
    assert not name.startswith(".") and not name.endswith(".") and len(name) <= 104
    assert name.split(".")[0].lower() not in ("con", "prn", "aux", "nul", "com1", "lpt9")
    (tmp_path / name).write_text("x")
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("text", ["java", "run-2.5+b_1.exe", "console", "com", "com10x", "nullify.txt"])
def test_a_harmless_name_stays_as_it_is(text):
    assert client._file_name(text) == text


KEPT = 64 * 1024


@pytest.mark.parametrize("size", [0, 1, KEPT - 1, KEPT, KEPT + 1, 3 * KEPT])
def test_the_last_64_kib_of_an_output_are_read_and_are_the_same_bytes(tmp_path, size):
    data = (bytes(range(256)) + "ü€😀".encode()) * (size // 200 + 1)
    (tmp_path / "out").write_bytes(data[:size])
    assert client.read_piece(str(tmp_path / "out"), None)[1] == data[:size][-KEPT:]


def test_a_letter_cut_in_two_at_the_beginning_of_the_tail_does_not_matter(tmp_path):
    data = ("€" * KEPT).encode()
    (tmp_path / "out").write_bytes(data)
    tail = client.as_text(client.read_piece(str(tmp_path / "out"), None)[1])
    assert tail.encode("utf-8", "surrogateescape") == data[-KEPT:] and tail.endswith("€" * 20000)


def test_an_output_that_is_not_there_or_is_no_file_has_no_tail(tmp_path):
    assert client.read_piece(str(tmp_path / "missing"), None) == (0, b"")
    assert client.read_piece(str(tmp_path), None) == (0, b"")
    assert client.read_piece(os.devnull, None) == (0, b"")


# -- what is started --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [["true"], ["run.bat", "a&b"], ["./x y", "", "%PATH%", '"']])
def test_on_linux_what_is_started_is_the_jobs_words_to_the_letter(params):
    assert client.program(params, {"PATH": "/nowhere"}) == params


@pytest.mark.parametrize("word", ["a&calc", "%PATH%", "a^b", 'a"b', "a|b", "<x", "a\nb", "!x!"])
def test_on_windows_a_batch_file_is_not_given_what_cmd_exe_would_act_on(monkeypatch, word):
    monkeypatch.setattr(client, "WINDOWS", True)
    with pytest.raises(BadRequest, match="cmd.exe"):
        client.program(["run.bat", "fine", word], {})


# Windows drops blanks and dots at the end of a file's name: `run.bat. .` starts run.bat (seen under Wine, too).
@pytest.mark.parametrize("name", ["RUN.CMD", "C:\\x\\run.bat", "run.bat.", "run.bat ", "run.cmd. ."])
def test_on_windows_a_batch_file_is_known_however_its_name_is_written(monkeypatch, name):
    monkeypatch.setattr(client, "WINDOWS", True)
    with pytest.raises(BadRequest, match="cmd.exe"):
        client.program([name, "a&calc"], {})


@pytest.mark.parametrize("params", [["run.bat", "a b", "-x=1", "ü"], ["java.exe", "a&b", "%PATH%"]])
def test_on_windows_harmless_words_and_other_programs_are_left_alone(monkeypatch, params):
    monkeypatch.setattr(client, "WINDOWS", True)
    assert client.program(params, {}) == params


# -- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reply", [
    {}, [], 1, None, {"Jobs": 1}, {"Jobs": [1]}, {"Jobs": [{}]}, {"Jobs": [], "Waiting": "x"}, {"Jobs": [], "Signals": 1}
])  # fmt: skip
def test_an_answer_that_makes_no_sense_counts_as_a_server_that_is_away(reply):
    api = types.SimpleNamespace(url="http://here:8088", call=lambda *_, **__: reply)
    with pytest.raises(ServerAway, match="http://here:8088/request answered something strange"):
        client.OurWire(api, "pc", {}).request({"Wait": 0}, [])

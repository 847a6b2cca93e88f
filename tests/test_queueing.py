"""Queues, order, arrays, dependencies, retries, what people do with jobs, accounting: the server's Queue with a clock of
its own, in this process, on a real disk; every test may start it anew from there."""

import json
import os
import re
import sys
import threading

import pytest
from harness import ROOT, until

sys.path.insert(0, ROOT)
import server as server_module
from jobrunner import BadRequest, BadState, State, UnknownJob
from server import (
    Queue,
    Selection,
    Stopping,
    Store,
    accounting_lines,
    dependency_verdict,
    parse_indices,
)

# ---------------------------------------------------------------------------------------------------------------------
# A queue in this process
# ---------------------------------------------------------------------------------------------------------------------


class Lab:
    """A Queue on a folder, its clock, and short ways to say what happens to it."""

    def __init__(self, folder):
        self.folder, self.moment = folder, 1.7e9
        self.accounting = []
        self.open()

    def open(self):
        self.queue = Queue(Store(os.path.join(self.folder, "jobs.json")), clock=lambda: self.moment)
        self.queue.store.account = self.accounting.extend
        self.queue.load()

    def restart(self, clean=False):
        if clean:
            self.queue.stop()
        else:
            self.queue.store.close(clean=False)  # what is on disk now is what kill -9 would leave
        self.open()

    def do(self, method, *words, **named):
        """The result of a method, once it is on disk."""
        result, batch = getattr(self.queue, method)(*words, **named)
        self.queue.store.wait(batch)
        return result

    def add(self, *records, **keys):
        """The numbers of jobs; each is a record, or the word after `run`; keys are of all of them."""
        records = [record if isinstance(record, dict) else {"Params": ["run", record]} for record in records or ("x",)]
        added = self.do("add", [{"Params": ["run"], **record, **keys} for record in records])
        return [thing.number for thing in added]

    def verb(self, name, *names, select=None, **named):
        words = " and ".join(f"{key} {text}" for key, text in (select or {}).items())
        chosen = Selection([str(n) for n in names], server_module._job_filter(select) if select else None, words)
        return self.do(name, chosen, **named)

    def poll(self, host="pc", slots=1, **node):
        """The jobs a client of ours is given."""
        node = {"Slots": slots, **node}
        return self.do("poll", {"Hostname": host, "Slots": slots, "Node": node}, lambda: True)["Jobs"]

    def start(self, host="pc"):
        """The next job, running; its name for people."""
        (record,) = self.poll(host)
        return self.queue.jobs[record["ID"]]

    def end(self, name, exit_status=0, **report):
        job = self.queue.find(str(name))
        status = "failed" if exit_status else "finished"
        report = {"ID": job.id, "Lease": job.lease, "ExitStatus": exit_status, "Status": status, **report}
        return self.do("report", [{"Hostname": job.host, **report}], "finish")

    def run(self, name, exit_status=0):
        """Lets one job run and end, whatever else is queued."""
        self.verb("alter", name, wish={"Priority": 1023})
        job = self.start()
        assert str(job) == str(name)
        self.end(name, exit_status)

    def job(self, name):
        return self.queue.find(str(name))

    def state(self, name):
        """`Q`, or of what is over `F finished`, `F -104`."""
        job = self.job(name)
        if isinstance(job, server_module.Array):
            return job.letter
        over = str(job.exit_status) if (job.exit_status or 0) < 0 else job.status
        return f"F {over}" if job.state is State.FINISHED else job.state.value

    def order(self, host="pc", slots=1000):
        return [job["Params"][-1] for job in self.poll(host, slots)]

    def pass_time(self, seconds):
        self.moment += seconds
        self.queue.tick()


@pytest.fixture
def lab(tmp_path):
    made = Lab(str(tmp_path))
    yield made
    made.queue.store.close(clean=False)


def create(lab, name, **attributes):
    return lab.do("change_queue", name, "create", attributes)


# ---------------------------------------------------------------------------------------------------------------------
# Order and queues
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("restarted", [False, True])
def test_the_queues_priority_comes_before_the_jobs_and_that_before_number_and_index(lab, restarted):
    create(lab, "urgent", Priority=5)
    create(lab, "later", Priority=-5)
    lab.add("later", Queue="later", Priority=1023)
    lab.add("low", Priority=-1024)
    lab.add("first", "second")
    lab.add({"Params": ["run", "{index}"], "Array": "3,1-2"})
    lab.add("high", Priority=7)
    lab.add("urgent", Queue="urgent", Priority=-1)
    if restarted:
        lab.restart()
    assert lab.order() == ["urgent", "high", "first", "second", "1", "2", "3", "low", "later"]


def test_jobs_that_are_altered_for_months_take_no_more_memory_and_keep_their_order_and_their_times(lab, monkeypatch):
    monkeypatch.setattr(server_module, "MOST_STALE", 10)
    jobs, late = lab.add("a", "b", "c"), lab.add("d", "e")
    for day in range(100):
        for place, number in enumerate(jobs):
            lab.verb("alter", number, wish={"Priority": (day + place) % 7})
        for number in late:
            lab.verb("alter", number, wish={"StartAfter": server_module.format_time(lab.moment + 1000 + day % 7)})
    assert sum(map(len, lab.queue.ready.values())) <= 2 * 3 + 10 and len(lab.queue.alarms) <= 2 * 2 + 10
    assert lab.order() == ["c", "b", "a"]  # 3, 2 and 1
    lab.pass_time(1000)
    assert lab.order() == []
    lab.pass_time(1)
    assert lab.order() == ["d", "e"]


def test_a_priority_altered_while_it_waits_moves_a_job(lab):
    a, b, c = lab.add("a", "b", "c")
    lab.verb("alter", c, wish={"Priority": 1})
    lab.do("change_queue", "default", "set", {"Priority": 4})
    lab.restart()
    assert lab.order() == ["c", "a", "b"]


def test_a_queue_that_is_not_started_or_at_max_run_keeps_its_jobs_and_says_so(lab):
    create(lab, "long", MaxRun=2)
    numbers = lab.add("1", "2", "3", Queue="long")
    assert lab.order() == ["1", "2"]
    assert lab.queue.why_queued(lab.job(numbers[2])) == "queue long is at max_run 2"
    lab.restart()
    assert lab.order() == []
    lab.end(numbers[0])
    assert lab.order() == ["3"]
    lab.do("change_queue", "long", "set", {"Started": False, "MaxRun": 0})
    (stopped,) = lab.add("4", Queue="long")
    assert lab.order() == []
    assert lab.queue.why_queued(lab.job(stopped)) == "queue long is not started"
    lab.do("change_queue", "long", "set", {"Started": True})
    assert lab.order() == ["4"]


def test_a_queue_that_is_not_enabled_takes_no_jobs_but_runs_those_it_has(lab):
    create(lab, "long")
    lab.add("1", Queue="long")
    lab.do("change_queue", "long", "set", {"Enabled": False})
    with pytest.raises(BadRequest, match="queue long takes no jobs now: it is not enabled"):
        lab.add("2", Queue="long")
    (other,) = lab.add("3")
    with pytest.raises(BadState, match=f"cannot move job {other}: queue long is not enabled"):
        lab.verb("move", other, queue="long")
    assert lab.order() == ["1", "3"]


def test_a_queue_gives_its_walltime_to_jobs_that_say_none_and_refuses_those_that_say_more(lab):
    create(lab, "short", DefaultWalltime=60, MaxWalltime=100)
    create(lab, "capped", MaxWalltime=50)
    a, b = lab.add({"Queue": "short"}, {"Queue": "capped"})
    assert (lab.job(a).runtime, lab.job(b).runtime) == (60, 50)
    with pytest.raises(BadRequest, match="queue short runs jobs of 100 s at most, and this one asks for 101 s"):
        lab.add("x", Queue="short", Runtime=101)
    with pytest.raises(BadRequest, match="queue capped runs jobs of 50 s at most"):
        lab.verb("move", a, queue="capped")
    with pytest.raises(BadRequest, match="queue short runs jobs of 100 s at most"):
        lab.verb("alter", a, wish={"Runtime": 1000})
    assert (lab.job(a).queue, lab.job(a).runtime) == ("short", 60)


def test_a_queue_is_deleted_only_when_it_holds_no_unfinished_job_and_default_never(lab):
    create(lab, "long")
    (number,) = lab.add("1", Queue="long")
    with pytest.raises(BadState, match="cannot delete queue long: it holds 1 unfinished jobs"):
        lab.do("change_queue", "long", "delete", {})
    with pytest.raises(BadState, match="cannot delete queue default"):
        lab.do("change_queue", "default", "delete", {})
    lab.run(number)
    lab.do("change_queue", "long", "delete", {})
    for clean in (False, True):
        assert list(lab.queue.queues) == ["default"]
        with pytest.raises(BadRequest, match="there is no queue long: there are default"):
            lab.add("2", Queue="long")
        with pytest.raises(BadState, match=f"cannot rerun job {number}: its queue long has been deleted"):
            lab.verb("rerun", number)
        lab.restart(clean)


@pytest.mark.parametrize("clean", [False, True])
def test_queues_are_after_a_restart_what_they_were(lab, clean):
    create(lab, "long", Priority=3, MaxRun=10, DefaultWalltime=60, MaxWalltime=120, Enabled=False, Started=False)
    lab.do("change_queue", "default", "set", {"Priority": -1})
    lab.add("x")
    before = lab.queue.queue_records()
    lab.restart(clean)
    assert lab.queue.queue_records() == before
    assert before[1]["MaxRun"] == 10 and before[0]["States"]["Q"] == 1


@pytest.mark.parametrize(
    "name, action, wish, words",
    [
        ("a b", "create", {}, "no name for a queue"),
        ("", "create", {}, "no name for a queue"),
        ("x" * 65, "create", {}, "no name for a queue"),
        ("default", "create", {}, "it is there already"),
        ("nowhere", "set", {}, "there is no queue nowhere"),
        ("nowhere", "delete", {}, "there is no queue nowhere"),
        ("default", "set", {"Maxrun": 1}, "a queue has no Maxrun: its attributes are Priority, "),
        ("default", "set", {"MaxRun": -1}, "MaxRun must be from 0"),
        ("default", "set", {"Enabled": 1}, "Enabled must be true or false"),
        ("default", "set", {"Name": "other"}, "a queue has no Name"),
        ("default", "explode", {}, "Action must be create, set or delete"),
    ],
)
def test_what_no_queue_can_be_is_refused_and_changes_nothing(lab, name, action, wish, words):
    before = lab.queue.queue_records()
    with pytest.raises(server_module.JobrunnerError, match=re.escape(words)):
        lab.do("change_queue", name, action, wish)
    assert lab.queue.queue_records() == before


def test_a_client_serves_the_queues_it_names_and_else_all(lab):
    create(lab, "long")
    create(lab, "short")
    one, two, three = lab.add(
        {"Params": ["1"], "Queue": "long"}, {"Params": ["2"], "Queue": "short"}, {"Params": ["3"]}
    )
    assert [job["Params"] for job in lab.poll("a", 5, Queues=["short", "no-such"])] == [["2"]]
    assert lab.queue.why_queued(lab.job(one)) == "no client serves queue long"
    assert [job["Params"] for job in lab.poll("b", 5)] == [["1"], ["3"]]


def test_why_a_job_waits_is_said_in_words_a_reason_each(lab):
    lab.poll("pc", 0, Properties=["linux"])
    wants = {"Requires": ["java17", "linux"], "Ncpus": 4}
    (number,) = lab.add(wants)
    job = lab.job(number)
    assert lab.queue.why_queued(job) == "needs 4 slots: no client has so many; needs java17: no client has it"
    (other,) = lab.add("x", Depend=[f"afterok:{number}"])
    assert lab.job(other).comment == f"held by afterok:{number}"
    create(lab, "long", Started=False)
    (third,) = lab.add("x", Queue="long", Requires=["java17"])
    assert lab.queue.why_queued(lab.job(third)) == "queue long is not started; needs java17: no client has it"
    lab.poll("other", 0)
    (retried,) = lab.add("x", Requires=["host=pc"], Retries=1)
    assert lab.queue.why_queued(lab.job(retried)) == "waits for a free slot"


# ---------------------------------------------------------------------------------------------------------------------
# Arrays
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, indices",
    [
        ("1-5", [1, 2, 3, 4, 5]),
        ("1-10:3", [1, 4, 7, 10]),
        ("0", [0]),
        ("7,1-3,2-4:2", [1, 2, 3, 4, 7]),
        ("5-5", [5]),
        ("1-4:99", [1]),
    ],
)
def test_indices_are_read_as_pbs_and_torque_write_them(text, indices):
    assert parse_indices(text) == indices


@pytest.mark.parametrize(
    "text", ["", "1-", "-1", "5-1", "1-5:0", "a", "1,,2", "1-5:2:2", "1.5", " 1", "1-1000001", "٣"]
)
def test_what_are_no_indices_is_refused(text):
    with pytest.raises(BadRequest):
        parse_indices(text)


@pytest.mark.parametrize("restarted", [None, False, True])
def test_tokens_are_replaced_once_in_arrays_and_every_other_brace_is_data(lab, restarted):
    record = {
        "Params": [
            "run",
            "{index}",
            "{index}{index}",
            '{"a":1}',
            "{item}",
            "{{index}}",
            "%(index)s %d",
            "{name}",
            "{Name}",
        ],
        "Env": {"I": "n{index}", "{index}": "kept"},
        "StdOut": "out.{index}",
        "StdErr": "{other}.txt",
        "WorkDir": "{index}",
        "Name": "{index} n",
    }
    array, alone = lab.add({**record, "Array": "7"}, record)
    if restarted is not None:
        lab.restart(restarted)
    sub = lab.job(f"{array}[7]")
    assert sub.params == ["run", "7", "77", '{"a":1}', "{item}", "{7}", "%(index)s %d", "{index} n", "{Name}"]
    assert (sub.env, sub.stdout, sub.stderr) == ({"I": "n7", "{index}": "kept"}, "out.7", "{other}.txt.7")
    assert (sub.workdir, sub.name) == ("{index}", "{index} n")
    one = lab.job(alone)
    assert (one.params, one.env, one.stdout) == (record["Params"], record["Env"], record["StdOut"])


def test_each_line_and_each_combination_is_a_subjob_and_their_texts_are_not_looked_at_again(lab):
    lines, sweep = lab.add(
        {"Params": ["run", "{item}"], "Items": ["{index}", "b c", "%s;&|"]},
        {
            "Params": ["{alpha}-{beta}", "{item}"],
            "Items": [{"alpha": "0.1", "beta": "{alpha}"}, {"alpha": "2"}],
            "Array": "5,9",
        },
    )
    lab.restart()
    assert [lab.job(f"{lines}[{i}]").params[1] for i in (1, 2, 3)] == ["{index}", "b c", "%s;&|"]
    assert lab.job(f"{sweep}[5]").params == ["0.1-{alpha}", "{item}"]
    assert lab.job(f"{sweep}[9]").params[0] == "2-{beta}"


def test_an_array_whose_items_all_have_a_name_of_their_own_takes_no_longer_than_others(lab):
    """The product of their numbers would take minutes."""
    items = [{f"k{place}": str(place)} for place in range(1, 50001)]
    (sweep,) = lab.add({"Params": ["run", "{k50000}", "{k1}"], "Items": items})
    assert lab.job(f"{sweep}[1]").params == ["run", "{k50000}", "1"]
    assert lab.job(f"{sweep}[50000]").params == ["run", "50000", "{k1}"]


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"Array": "1-x"}, "no indices"),
        ({"Array": 5}, "Array must be text"),
        ({"Array": "1-3", "Items": ["a"]}, "3 indices and 1 Items"),
        ({"Items": "abc"}, "Items must be a list"),
        ({"Items": [5]}, "must be text"),
        ({"Items": [{"a b": "x"}]}, "cannot be put in braces"),
        ({"Items": [{"index": "x"}]}, "cannot be put in braces"),
        ({"Items": [{"a": None}]}, "must be text"),
        ({"Array": "1-3", "MaxRunSubjobs": -1}, "MaxRunSubjobs must be from 0"),
        ({"Array": "1-3", "MaxFails": "x"}, "MaxFails must be a whole number"),
    ],
)
def test_what_is_no_array_is_refused(lab, keys, words):
    with pytest.raises(BadRequest, match=words):
        lab.add(keys)
    assert lab.queue.status()["Jobs"] == 0


def test_an_array_is_one_line_on_disk_and_its_subjobs_are_jobs_of_their_own(lab):
    (number,) = lab.add({"Params": ["run", "{index}"], "Array": "1-1000"})
    with open(lab.queue.store.journal_path, "rb") as file:
        head, line = file.read().splitlines()
    assert len(line) < 500
    jobs = list(lab.queue.jobs.values())
    assert len({job.id for job in jobs}) == 1000 == lab.queue.status()["States"]["Q"]
    dump = json.loads(b"".join(server_module.database_chunks(lab.queue.picture())))
    assert sorted(int(job["Params"][1]) for job in dump["Available"].values()) == list(range(1, 1001))
    before = {job.id: job.to_record() for job in jobs}
    for clean in (False, True):
        lab.restart(clean)
        assert {job.id: job.to_record() for job in lab.queue.jobs.values()} == before
        assert lab.job(f"{number}[]").spec.indices == "1-1000"


def test_at_most_so_many_subjobs_run_at_a_time_and_that_can_be_altered(lab):
    (number,) = lab.add({"Params": ["run", "{index}"], "Array": "1-9", "MaxRunSubjobs": 2})
    assert lab.order() == ["1", "2"]
    assert lab.queue.why_queued(lab.job(f"{number}[3]")) == f"array {number}[] is at max_run_subjobs 2"
    lab.end(f"{number}[1]")
    assert lab.order() == ["3"]
    lab.verb("alter", f"{number}[]", wish={"MaxRunSubjobs": 4})
    lab.restart()
    assert lab.order() == ["4", "5"]
    lab.verb("alter", number, wish={"MaxRunSubjobs": 0})
    assert lab.order() == ["6", "7", "8", "9"]


def test_a_limit_that_an_array_is_given_later_holds_too(lab):
    (number,) = lab.add({"Params": ["run", "{index}"], "Array": "1-5"})
    lab.verb("alter", number, wish={"MaxRunSubjobs": 1})
    assert lab.order() == ["1"]
    lab.restart()
    assert lab.order() == []


def test_limits_of_arrays_are_of_whole_arrays_only(lab):
    array, alone = lab.add({"Array": "1-3"}, {})
    for name in (alone, f"{array}[1]"):
        with pytest.raises(BadRequest, match="MaxRunSubjobs are of whole arrays: name them as 17"):
            lab.verb("alter", name, wish={"MaxRunSubjobs": 1})


@pytest.mark.parametrize("restarted", [False, True])
def test_as_soon_as_max_fails_subjobs_have_failed_the_rest_is_aborted(lab, restarted):
    (number,) = lab.add({"Params": ["run", "{index}"], "Array": "1-6", "MaxFails": 2})
    (cleanup,) = lab.add("cleanup", Depend=[f"afterany:{number}[]"])
    lab.poll("pc", 3)
    lab.end(f"{number}[1]", 1)
    assert lab.state(f"{number}[4]") == "Q"
    lab.end(f"{number}[2]", 7)
    if restarted:
        lab.restart()
    assert [lab.state(f"{number}[{i}]") for i in (1, 2, 3, 4, 5, 6)] == ["F failed"] * 2 + ["R"] + ["F -105"] * 3
    running = lab.job(f"{number}[3]")
    request = {"Hostname": "pc", "Slots": 0, "Running": [{"ID": running.id, "Lease": running.lease}]}
    assert lab.do("poll", request, lambda: True)["Signals"] == [{"ID": running.id, "Signal": "delete"}]
    assert lab.state(cleanup) == "H"
    lab.end(f"{number}[3]", 271, Status="deleted")
    assert lab.state(f"{number}[3]") == "F -105"
    assert lab.state(f"{number}[]") == "F" and lab.state(cleanup) == "Q"


@pytest.mark.parametrize(
    "name", ["{n}[]", "{n}", "{n}[1-4]", "{n}[1-4:2]", "{n}[2]", "{n}[2].server", "{id}", "{id12}"]
)
def test_every_verb_takes_an_array_a_range_of_it_a_subjob_and_an_id(lab, name):
    lab.add("other")
    (number,) = lab.add({"Array": "1-4"})
    array = lab.job(number).spec
    name = name.format(n=number, id=array.id, id12=array.id[:12])
    wanted = [2] if "[2]" in name else [1, 3] if ":" in name else [1, 2, 3, 4]
    assert [job.index for job in lab.verb("hold", name)] == wanted
    assert [job.index for job in lab.verb("release", name)] == wanted
    assert [job.index for job in lab.verb("alter", name, wish={"Name": "n"})] == wanted
    assert [job.index for job in lab.verb("delete", name)] == wanted
    assert [job.index for job in lab.verb("rerun", name)] == wanted
    assert lab.queue.counts[State.QUEUED] == 5


@pytest.mark.parametrize(
    "name", ["9", "9[]", "9[1]", "1[5]", "1[5-9]", "2[]", "2[1]", "2[1-2]", "abcd", "", "x[", "1[x]"]
)
def test_a_job_that_is_not_there_is_unknown(lab, name):
    lab.add({"Array": "1-4"}, {})
    with pytest.raises(UnknownJob):
        lab.verb("hold", name)


def test_a_job_that_is_no_array_is_said_to_be_none_and_not_to_have_left(lab):
    lab.add({})
    for name in ("1[]", "1[3]"):
        with pytest.raises(UnknownJob, match="1 is no array"):
            lab.verb("hold", name)


def test_a_group_stands_for_those_that_can_be_and_is_refused_when_none_can(lab):
    (number,) = lab.add({"Array": "1-3"})
    lab.start()
    assert [job.index for job in lab.verb("hold", number)] == [2, 3]
    with pytest.raises(
        BadState, match=rf"cannot rerun any job of {number}\[2-3\]: cannot rerun job {number}\[2\]: it is"
    ):
        lab.verb("rerun", f"{number}[2-3]")
    with pytest.raises(
        BadState, match="cannot hold job .* it is running, and hold needs a job that is queued or held or waiting"
    ):
        lab.verb("hold", f"{number}[2]", f"{number}[1]")


# ---------------------------------------------------------------------------------------------------------------------
# Dependencies
# ---------------------------------------------------------------------------------------------------------------------

# what becomes of a target -> {kind: what becomes of a job that waits for it}
FATES = {
    "waits": dict(after="H", afterok="H", afternotok="H", afterany="H"),
    "runs": dict(after="Q", afterok="H", afternotok="H", afterany="H"),
    "finished": dict(after="Q", afterok="Q", afternotok="F -104", afterany="Q"),
    "failed": dict(after="Q", afterok="F -104", afternotok="Q", afterany="Q"),
    "deleted": dict(after="F -104", afterok="F -104", afternotok="F -104", afterany="F -104"),
    "killed": dict(after="Q", afterok="F -104", afternotok="Q", afterany="Q"),
}


def meet(lab, target, fate):
    """Lets that become of a job, or of every subjob of an array."""
    thing = lab.job(target)
    jobs = [str(thing)] if not isinstance(thing, server_module.Array) else [f"{target}[{i}]" for i in thing.members]
    for name in [] if fate == "waits" else jobs:
        if fate == "deleted":
            lab.verb("delete", name)
        else:
            lab.verb("alter", name, wish={"Priority": 1000})
            assert str(lab.start()) == name
            if fate == "killed":
                lab.verb("delete", name)
            if fate != "runs":
                words = {"Status": "deleted"} if fate == "killed" else {}
                lab.end(name, {"failed": 3, "killed": 271}.get(fate, 0), **words)


@pytest.mark.parametrize("kind", ["after", "afterok", "afternotok", "afterany"])
@pytest.mark.parametrize("fate", FATES)
@pytest.mark.parametrize("target, dependent", [("job", "job"), ("array", "job"), ("subjob", "job"), ("job", "array")])
@pytest.mark.parametrize("when", ["before", "restarted", "at submission"])
def test_each_kind_of_dependency_is_met_or_not_or_can_never_be(lab, kind, fate, target, dependent, when):
    (number,) = lab.add({"Array": "4-5"} if target != "job" else {})
    name = f"{number}[4]" if target == "subjob" else f"{number}[]" if target == "array" else str(number)
    waiting = {"Depend": [f"{kind}:{name}"], **({"Array": "1-2"} if dependent == "array" else {})}
    if when != "at submission":
        (other,) = lab.add(waiting)
        names = [f"{other}[1]", f"{other}[2]"] if dependent == "array" else [other]
        assert [lab.state(n) for n in names] == ["H"] * len(names)
        assert lab.job(names[0]).comment == f"held by {kind}:{name}"
        if when == "restarted":
            lab.restart()
    meet(lab, name.replace("[]", ""), fate)
    if when == "at submission":
        (other,) = lab.add(waiting)
        names = [f"{other}[1]", f"{other}[2]"] if dependent == "array" else [other]
    if when == "restarted":
        lab.restart(clean=True)
    assert [lab.state(n) for n in names] == [FATES[fate][kind]] * len(names)
    if FATES[fate][kind] == "F -104":
        assert lab.job(names[0]).comment.startswith(f"{kind}:{name} can never be met: ")
        assert lab.job(names[0]).status == "failed"


@pytest.mark.parametrize(
    "kind, ends, state",
    [
        ("afterok", [0, None], "H"),
        ("afterok", [3, None], "F -104"),
        ("afterok", [0, 0], "Q"),
        ("afternotok", [3, None], "H"),
        ("afternotok", [3, 0], "Q"),
        ("afternotok", [0, 0], "F -104"),
        ("afterany", [0, None], "H"),
        ("afterany", [0, 3], "Q"),
        ("after", [0, None], "H"),
        ("after", [0, 3], "Q"),
    ],
)
def test_an_array_as_target_is_judged_by_all_its_subjobs(lab, kind, ends, state):
    (array,) = lab.add({"Array": "1-2"})
    (waiting,) = lab.add("x", Depend=[f"{kind}:{array}"])
    for index, exit_status in enumerate(ends, 1):
        if exit_status is not None:
            lab.run(f"{array}[{index}]", exit_status)
    assert lab.state(waiting) == state


def test_all_dependencies_must_hold_and_those_that_do_are_taken_out(lab):
    a, b, c = lab.add("a", "b", "c")
    (waiting,) = lab.add("x", Depend=[f"afterok:{a}:{b}", f"after:{c}"])
    lab.run(b)
    assert lab.job(waiting).depend == [f"afterok:{a}", f"after:{c}"]
    lab.run(a)
    lab.restart()
    assert (lab.state(waiting), lab.job(waiting).comment) == ("H", f"held by after:{c}")
    lab.run(c)
    assert (lab.state(waiting), lab.job(waiting).depend, lab.job(waiting).comment) == ("Q", [], "")


def test_one_that_can_never_be_met_ends_all_that_wait_for_it_in_turn(lab):
    (first,) = lab.add("first")
    last, chain = first, []
    for _ in range(3000):  # deeper than Python's own stack would go
        (last,) = lab.add("x", Depend=[f"afterok:{last}"])
        chain.append(last)
    (notok,) = lab.add("y", Depend=[f"afternotok:{last}"])
    lab.run(first, 1)
    assert {lab.state(number) for number in chain} == {"F -104"} == {lab.state(notok)}
    assert lab.job(chain[0]).comment == f"afterok:{first} can never be met: job {first} has failed"
    assert lab.job(chain[1]).comment == f"afterok:{chain[0]} can never be met: job {chain[0]} has failed and never ran"


def test_a_job_held_by_a_person_stays_so_when_its_dependencies_are_met_and_the_other_way_round(lab):
    a, b = lab.add("a", "b")
    (one,) = lab.add("x", Depend=[f"afterok:{a}"], Hold=True)
    assert lab.job(one).comment == f"held by a person and afterok:{a}"
    lab.run(a)
    assert (lab.state(one), lab.job(one).comment) == ("H", "held by a person")
    lab.verb("release", one)
    assert lab.state(one) == "Q"
    (two,) = lab.add("x", Depend=[f"afterok:{b}"])
    lab.verb("hold", two)
    lab.verb("release", two)
    assert (lab.state(two), lab.job(two).comment) == ("H", f"held by afterok:{b}")


@pytest.mark.parametrize(
    "depend", ["afterok:99", "afterok:1[7]", "afterok:", "afterok", "before:1", "on:1", ":1", "afterok:1:", ""]
)
def test_an_unknown_target_or_kind_is_refused_at_submission(lab, depend):
    lab.add({"Array": "1-2"})
    with pytest.raises(BadRequest):
        lab.add("x", Depend=[depend])
    assert lab.queue.status()["Jobs"] == 2


def test_a_cycle_is_refused_however_long_it_is_also_by_way_of_arrays(lab):
    (a,) = lab.add("a", Hold=True)
    (array,) = lab.add({"Array": "1-2", "Depend": [f"afterany:{a}"]})
    (c,) = lab.add("c", Depend=[f"afterok:{array}"])
    for name, depend in (
        (a, f"after:{c}"),
        (a, f"after:{array}[2]"),
        (a, f"after:{a}"),
        (f"{array}[1]", f"afterok:{c}"),
    ):
        with pytest.raises(BadRequest, match="would be a cycle"):
            lab.verb("alter", name, wish={"Depend": [depend]})
    assert lab.job(a).depend == []


def test_dependencies_can_be_altered_until_the_job_runs(lab):
    a, b = lab.add("a", "b")
    (c,) = lab.add("c")
    lab.verb("alter", c, wish={"Depend": [f"afterok:{a}"]})
    assert lab.state(c) == "H"
    lab.verb("alter", c, wish={"Depend": [f"afterok:{b}"]})
    lab.run(b)
    assert lab.state(c) == "Q"
    lab.verb("alter", c, wish={"Depend": [f"afterok:{b}"]})
    assert lab.state(c) == "Q"  # which is met already
    lab.verb("alter", c, wish={"Depend": [f"afterok:{a}"]})
    lab.verb("alter", c, wish={"Depend": []})
    assert lab.state(c) == "Q"


@pytest.mark.parametrize("kind", ["after", "afterok", "afternotok", "afterany"])
@pytest.mark.parametrize("over", [False, True])
def test_no_verdict_is_both_and_what_is_over_always_has_one(kind, over):
    for begun in (False, True):
        for good in (False, True):
            verdict = dependency_verdict(kind, over, begun, good, over and not good)
            assert (verdict is None) <= (not over)


# ---------------------------------------------------------------------------------------------------------------------
# What people do with jobs
# ---------------------------------------------------------------------------------------------------------------------


def test_a_held_job_does_not_run_until_it_is_released(lab):
    a, b = lab.add("a", "b")
    lab.verb("hold", a)
    lab.restart()
    assert (lab.state(a), lab.job(a).comment, lab.order()) == ("H", "held by a person", ["b"])
    lab.verb("release", a)
    assert lab.order() == ["a"]
    assert [words for _, words in lab.job(a).history] == ["held by a person", "released"]


def test_a_job_with_a_start_time_waits_for_it_also_after_a_hold(lab):
    (a,) = lab.add("a", StartAfter=server_module.format_time(lab.moment + 100))
    assert lab.state(a) == "W"
    lab.verb("hold", a)
    lab.verb("release", a)
    assert lab.state(a) == "W"
    lab.restart()
    lab.pass_time(101)
    assert (lab.state(a), lab.job(a).comment) == ("Q", "")
    lab.verb("alter", a, wish={"StartAfter": server_module.format_time(lab.moment + 100)})
    assert lab.state(a) == "W"


def test_only_the_failures_of_a_sweep_are_run_again(lab):
    (sweep,) = lab.add({"Params": ["run", "{index}"], "Array": "1-4", "Name": "sweep"})
    (other,) = lab.add("other")
    for index, code in ((1, 0), (2, 5), (3, 0), (4, 1)):
        lab.run(f"{sweep}[{index}]", code)
    lab.run(other, 1)
    again = lab.verb("rerun", select={"name": "sweep", "status": "failed"})
    assert [job.index for job in again] == [2, 4]
    lab.restart()
    job = lab.job(f"{sweep}[2]")
    assert (job.state, job.status, job.exit_status, job.end_time, job.run_count) == (State.QUEUED, "", None, None, 1)
    assert re.match(r"run 1 on pc from \S+ until \S+, failed with exit status 5\Z", job.history[-1][1])
    assert lab.order() == ["2", "4"]
    with pytest.raises(UnknownJob, match="no job has name sweep and status dead"):
        lab.verb("rerun", select={"name": "sweep", "status": "dead"})


def test_a_running_job_is_rerun_when_its_client_has_ended_it(lab):
    a, once = lab.add({}, {"Rerunable": False})
    lab.poll("pc", 2)
    assert lab.verb("rerun", a)[0].comment == "being rerun: pc is told to end it"
    lab.end(a, 271, Status="deleted")
    assert (lab.state(a), lab.job(a).run_count) == ("Q", 1)
    with pytest.raises(BadState, match=f"cannot rerun job {once}: it is running and not rerunable"):
        lab.verb("rerun", once)


def test_a_job_deleted_by_force_is_over_at_once_and_its_client_is_told_later(lab):
    (a,) = lab.add("a")
    job = lab.start()
    assert lab.verb("delete", a, force=True)[0].status == "deleted"
    assert lab.state(a) == "F deleted"
    request = {"Hostname": "pc", "Slots": 1, "Running": [{"ID": job.id, "Lease": job.lease}]}
    assert lab.do("poll", request, lambda: True)["Signals"] == [{"ID": job.id, "Signal": "delete"}]
    lab.end(a, 0)
    assert lab.state(a) == "F deleted"
    with pytest.raises(BadState):
        lab.verb("delete", a, force=True)


def test_limits_of_a_running_job_are_altered_and_its_client_is_told_until_it_has_them(lab):
    (a,) = lab.add("a", Runtime=60)
    job = lab.start()

    def signals(limits, **more):
        running = [{"ID": job.id, "Lease": job.lease, "Limits": limits, **more}]
        return lab.do("poll", {"Hostname": "pc", "Slots": 0, "Running": running}, lambda: True)["Signals"]

    assert signals([60, 0, 0]) == []
    lab.verb("alter", a, wish={"Runtime": 3600, "Memory": 1 << 30, "Priority": 3})
    wanted = {"ID": job.id, "Signal": "alter", "Runtime": 3600, "Memory": 1 << 30, "CpuTime": 0}
    assert signals([60, 0, 0]) == [wanted]
    lab.restart()
    assert signals([60, 0, 0]) == [wanted]
    assert signals([3600, 1 << 30, 0]) == []
    with pytest.raises(BadState, match=f"cannot alter Name of job {a}: it is running"):
        lab.verb("alter", a, wish={"Name": "x", "Runtime": 5})
    assert lab.job(a).runtime == 3600


@pytest.mark.parametrize(
    "wish",
    [
        {},
        {"ID": "x"},
        {"State": "F"},
        {"Params": ["x"]},
        {"Priority": 5000},
        {"Runtime": -1},
        {"Colour": 1},
        {"name": "x"},
    ],
)
def test_what_cannot_be_altered_is_refused(lab, wish):
    (a,) = lab.add("a")
    before = lab.job(a).to_record()
    with pytest.raises(BadRequest):
        lab.verb("alter", a, wish=wish)
    assert lab.job(a).to_record() == before


def test_a_job_is_moved_to_another_queue(lab):
    create(lab, "long", Started=False)
    (a,) = lab.add("a")
    lab.verb("move", a, queue="long")
    assert (lab.job(a).queue, lab.order()) == ("long", [])
    lab.restart()
    lab.verb("move", a, queue="default")
    assert lab.order() == ["a"]
    with pytest.raises(
        BadState, match=f"cannot move job {a}: it is running, and move needs a job that is queued or held or"
    ):
        lab.verb("move", a, queue="long")
    with pytest.raises(server_module.UnknownQueue):
        lab.verb("move", a, queue="nowhere")


# ---------------------------------------------------------------------------------------------------------------------
# Failures
# ---------------------------------------------------------------------------------------------------------------------


def test_a_failed_job_is_run_again_later_each_time_until_its_retries_are_used_up(lab):
    (a,) = lab.add("a", Retries=9)
    (waiting,) = lab.add("b", Depend=[f"afterok:{a}"])
    pauses = []
    for attempt in range(9):
        assert lab.start().number == a
        lab.end(a, 1)
        assert lab.state(a) == "W" and lab.job(a).comment.startswith(
            f"failed on pc with exit status 1: retry {attempt + 1} of 9"
        )
        pauses.append(lab.job(a).start_after - lab.moment)
        lab.restart()
        lab.pass_time(pauses[-1] - 0.5)
        assert lab.state(a) == "W"
        lab.pass_time(1)
        assert lab.state(a) == "Q"
    assert pauses == [30, 60, 120, 240, 480, 960, 1920, 3600, 3600]
    assert lab.state(waiting) == "H"
    lab.start()
    lab.end(a, 1)
    assert (lab.state(a), lab.job(a).run_count, lab.state(waiting)) == ("F failed", 10, "F -104")


@pytest.mark.parametrize("status, exit_status", [("timeout", -11), ("memory", -10), ("deleted", 271), ("finished", 0)])
def test_what_would_end_alike_again_is_not_retried(lab, status, exit_status):
    (a,) = lab.add("a", Retries=3)
    lab.start()
    lab.end(a, exit_status, Status=status)
    assert lab.job(a).state is State.FINISHED and lab.job(a).status == status


def test_a_retry_goes_to_another_client_first_if_there_is_one_that_could_run_it(lab):
    (a,) = lab.add("a", Retries=3)
    lab.start("bad")
    lab.end(a, 1)
    lab.pass_time(31)
    assert [job["ID"] for job in lab.poll("bad")] == [lab.job(a).id]  # it is the only one there is
    lab.end(a, 1)
    lab.poll("other", 0, Slots=1)
    lab.pass_time(61)
    assert lab.poll("bad") == []
    assert [job["ID"] for job in lab.poll("other")] == [lab.job(a).id]


def test_a_job_that_was_started_twenty_times_is_held_and_can_be_released(lab):
    (a,) = lab.add("a")
    for _ in range(20):
        assert lab.state(a) == "Q"
        lab.start()
        lab.end(a, None, Status="released")
    assert lab.state(a) == "H" and lab.job(a).comment.startswith("held after 20 starts, this one without an end")
    lab.restart()
    lab.verb("release", a)
    lab.start()
    lab.end(a, 0)
    assert lab.state(a) == "F finished"


# ---------------------------------------------------------------------------------------------------------------------
# Accounting
# ---------------------------------------------------------------------------------------------------------------------


def lines_of(lab):
    return [line for old, new in lab.accounting for line in accounting_lines(old, new)]


def test_every_step_of_a_job_is_one_accounting_record(lab):
    a, array = lab.add({"Owner": "ann@pc7", "Runtime": 60, "Ncpus": 1}, {"Array": "1-2"})
    lab.start()
    lab.verb("rerun", a)
    lab.end(a, 271, Status="deleted")
    lab.start()
    lab.verb("delete", a)
    lab.moment += 30
    lab.end(a, 271, Status="deleted", CpuTimeUsed=61, MaxMem=2049)
    lab.verb("delete", f"{array}[1]")
    lab.add("x", Depend=[f"afterok:{array}[1]"])
    lines = lines_of(lab)
    assert [line.split(";")[:2] for line in lines] == [
        ["Q", "1"], ["Q", "2[]"], ["S", "1"], ["R", "1"], ["S", "1"], ["D", "1"], ["E", "1"], ["D", "2[1]"], ["Q", "3"], ["A", "3"],
    ]  # fmt: skip
    values = dict(pair.split("=", 1) for pair in lines[6].split(";", 2)[2].split(" "))
    assert (values["user"], values["queue"], values["jobname"], values["exec_host"]) == (
        "ann",
        "default",
        "run",
        "pc/0",
    )
    assert lines[9] == "A;3;afterok:2[1] can never be met: job 2[1] ended as deleted and never ran"
    rerun = dict(pair.split("=", 1) for pair in lines[3].split(";", 2)[2].split(" "))
    assert (rerun["exec_host"], rerun["start"], rerun["run_count"]) == ("pc/0", values["ctime"], "1")
    assert (values["Exit_status"], values["Resource_List.walltime"], values["resources_used.walltime"]) == (
        "271",
        "00:01:00",
        "00:00:30",
    )
    assert (values["resources_used.cput"], values["resources_used.mem"]) == ("00:01:01", "3kb")
    assert int(values["end"]) - int(values["start"]) == 30 and values["ctime"] == str(int(lab.moment - 30))


@pytest.mark.parametrize(
    "name", ["a b", 'quo"te', "semi;colon", "new\nline", "日本 ü", "x" * 10000, "plain", "a=b", "\\", "a\x9b31mb",
             "\x1b[2J", "a\u202eb", "\x7f", "\ud800"]
)  # fmt: skip
def test_a_name_comes_through_accounting_in_one_line_and_can_be_read_back(lab, name):
    lab.add("x", Name=name, Owner="o@h")
    lab.start()
    (line,) = [line for line in lines_of(lab) if line.startswith("S;")]
    assert line.isprintable()
    text = re.search(r' jobname=("(?:[^"\\]|\\.)*"|\S+) queue=', line).group(1)
    assert (json.loads(text) if text.startswith('"') else text) == name


def test_accounting_goes_to_a_file_a_day_and_what_cannot_be_written_stops_nobody(tmp_path, lab):
    folder = str(tmp_path / "accounting")
    lab.queue.store.account = server_module.Accounting(folder, lambda: lab.moment).write
    lab.add("x")
    lab.moment += 86400
    lab.run(1)
    days = sorted(os.listdir(folder))
    assert len(days) == 2 and all(re.match(r"20\d{6}\Z", day) for day in days)
    with open(os.path.join(folder, days[1])) as file:
        lines = file.read().splitlines()
    assert [line.split(";")[1:3] for line in lines] == [["S", "1"], ["E", "1"]]
    assert re.match(r"\d\d/\d\d/\d{4} \d\d:\d\d:\d\d;S;1;user=", lines[0])
    os.rename(folder, folder + ".away")
    assert lab.add("y") == [2]


def test_half_a_record_that_the_disk_had_room_for_is_not_joined_to_the_next(tmp_path):
    resource = pytest.importorskip("resource")
    path, limits = str(tmp_path / "day"), resource.getrlimit(resource.RLIMIT_FSIZE)
    server_module._append_lines(path, b"one\n")
    resource.setrlimit(resource.RLIMIT_FSIZE, (7, limits[1]))
    try:
        with pytest.raises(OSError):
            server_module._append_lines(path, b"two, of which there is room for half\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with open(path, "ab") as file:
        assert file.tell() == 4
        file.write(b"torn")  # by a power cut
    server_module._append_lines(path, b"three\n")
    with open(path, "rb") as file:
        assert file.read() == b"one\ntorn\nthree\n"


# ---------------------------------------------------------------------------------------------------------------------
# Hosts that are offline
# ---------------------------------------------------------------------------------------------------------------------


def nodes(lab):
    return {node["Host"]: (node["State"], node["Comment"]) for node in lab.queue.node_records()}


def test_an_offline_host_is_given_nothing_more_keeps_what_it_has_and_says_why_until_it_is_returned(lab):
    first, second = lab.add("1", "2")
    lab.start("pc")
    lab.do("mark", ["pc"], "offline", "new disk")
    assert nodes(lab) == {"pc": ("offline", "new disk")} and lab.queue.status()["Nodes"]["offline"] == 1
    assert lab.poll("pc") == [] and lab.do("lease", "pc") is None
    assert lab.queue.why_queued(lab.job(second)) == "every client that is connected is offline"
    for clean in (False, True):
        lab.restart(clean)
        assert lab.poll("pc") == [] and lab.state(first) == "R"
    lab.end(first)
    assert lab.order("other") == ["2"]
    lab.do("mark", ["pc"], "clear", "")
    lab.restart()
    lab.add("3")
    assert lab.order("pc") == ["3"] and nodes(lab)["pc"] == ("free", "")


def test_a_client_that_is_to_drain_is_told_once_and_told_when_that_is_taken_back(lab):
    lab.poll("pc")

    def told(**node):
        request = {"Hostname": "pc", "Slots": 0, "Wait": 0, "Node": node}
        return lab.do("poll", request, lambda: True)["Drain"]

    assert told() is False
    lab.do("mark", ["pc"], "drain", "")
    assert told() is True and told(Draining=True) is True
    lab.do("mark", ["pc"], "offline", "")
    assert told(Draining=True) is False
    lab.do("mark", ["pc"], "drain", "")
    lab.do("mark", ["pc"], "clear", "")
    assert told(Draining=True) is False


@pytest.mark.parametrize(
    "hosts, action, words",
    [
        (["pc", "nowhere"], "offline", "there is no client on nowhere"),
        (["pc"], "explode", "Action must be offline, drain"),
    ],
)
def test_hosts_that_are_not_there_and_what_cannot_be_done_with_them_are_refused(lab, hosts, action, words):
    lab.poll("pc")
    with pytest.raises(server_module.JobrunnerError, match=words):
        lab.do("mark", hosts, action, "")
    assert nodes(lab) == {"pc": ("free", "")}


def test_a_host_is_marked_again_and_cleared_twice(lab):
    lab.poll("pc")
    lab.do("mark", ["pc"], "offline", "one")
    lab.do("mark", ["pc"], "drain", "two")
    lab.restart()
    assert lab.queue.marks["pc"] == ("pc", True, "two")
    lab.do("mark", ["pc"], "clear", "")
    lab.poll("pc")
    lab.do("mark", ["pc"], "clear", "")
    assert nodes(lab)["pc"] == ("free", "")


# ---------------------------------------------------------------------------------------------------------------------
# What reviews found
# ---------------------------------------------------------------------------------------------------------------------


def test_a_request_that_is_held_open_learns_of_a_delete_by_force_at_once(lab):
    (a,) = lab.add("a")
    job = lab.start()
    request = {"Hostname": "pc", "Slots": 0, "Wait": 30, "Running": [{"ID": job.id, "Lease": job.lease}]}
    told = []
    thread = threading.Thread(target=lambda: told.extend(lab.do("poll", request, lambda: True)["Signals"]))
    thread.start()
    until(lambda: any(node.polls for node in lab.queue.nodes.values()), "the request to be held open")
    lab.verb("delete", a, force=True)
    thread.join(10)
    assert told == [{"ID": job.id, "Signal": "delete"}]


def test_an_item_that_would_be_an_empty_program_is_refused_before_it_spoils_the_database(lab):
    with pytest.raises(BadRequest, match="the program of subjob 2 is empty"):
        lab.add({"Params": ["{item}"], "Items": ["true", ""]})
    lab.add({"Params": ["echo", "{item}"], "Items": ["x", ""]})
    lab.restart(clean=True)
    assert lab.queue.status()["Jobs"] == 2


def test_a_job_rerun_without_ever_having_run_has_no_run_in_the_accounting(lab):
    (a,) = lab.add("a", Hold=True)
    lab.verb("delete", a)
    lab.verb("rerun", a)
    assert lines_of(lab)[-1] == f"R;{a};queue=default"


def test_a_job_that_was_given_up_and_reported_after_all_has_ended_in_the_accounting(lab):
    (a,) = lab.add("a")
    lab.start()
    lab.pass_time(4000)
    assert lab.state(a) == "Q"
    lab.end(a, 0, Hostname="pc")
    assert lab.state(a) == "F finished" and lines_of(lab)[-1].startswith(f"E;{a};user=")


def test_one_name_that_cannot_be_written_costs_nobody_their_accounting(tmp_path, lab):
    folder = str(tmp_path / "accounting")
    lab.queue.store.account = server_module.Accounting(folder, lambda: lab.moment).write
    lab.add({"Name": "\ud800"}, {"Name": "fine"})
    lab.poll("pc", 2)
    (day,) = os.listdir(folder)
    with open(os.path.join(folder, day)) as file:
        assert [line.split(";")[1] for line in file] == ["Q", "Q", "S", "S"]


def test_an_array_is_listed_as_it_was_altered_and_says_why_it_does_not_run(lab):
    create(lab, "long", Started=False)
    (number,) = lab.add({"Array": "1-3", "Name": "old"})
    lab.verb("move", number, queue="long")
    lab.verb("alter", number, wish={"Name": "new", "Priority": 7, "Runtime": 60})
    record = lab.queue.array_record(lab.job(number))
    assert (record["Queue"], record["Name"], record["Priority"], record["Runtime"]) == ("long", "new", 7, 60)
    assert record["Comment"] == "queue long is not started; no client is connected"
    lab.verb("delete", number)
    assert "Comment" not in lab.queue.array_record(lab.job(number))


def test_what_is_only_kept_of_a_job_is_altered_too(lab):
    (a,) = lab.add("a", Account="one", Colour="red")
    lab.verb("alter", a, wish={"Account": "two"})
    lab.restart()
    assert lab.job(a).extra == {"Account": "two", "Colour": "red"}


def test_a_need_that_only_a_host_meets_which_is_offline_is_said_so(lab):
    lab.poll("one", 0, Properties=["java17"])
    lab.poll("other", 0)
    lab.do("mark", ["one"], "offline", "")
    (a,) = lab.add("a", Requires=["java17", "java99"])
    why = "needs java17: every client that has it is offline; needs java99: no client has it"
    assert lab.queue.why_queued(lab.job(a)) == why


def test_a_client_whose_latest_answer_gave_it_a_job_is_forgotten_too_once_others_have_that(lab):
    (number,) = lab.add("x")
    request = {"Hostname": "pc", "Slots": 1, "Poll": 1, "Node": {"Client": "spool", "Slots": 1}}
    assert len(lab.do("poll", request, lambda: True)["Jobs"]) == 1
    lab.pass_time(3601)
    assert lab.state(number) == "Q" and lab.queue.nodes
    lab.pass_time(31 * 86400)
    assert not lab.queue.nodes


def test_clients_that_nobody_has_heard_of_for_long_and_heaps_in_which_nothing_waits_are_forgotten(lab):
    lab.poll("gone", 0)
    lab.poll("marked", 0)
    lab.do("mark", ["marked"], "offline", "")
    for number in lab.add(*[{"Requires": [f"host={n}"]} for n in range(5)]):
        lab.verb("delete", number)
    lab.pass_time(31 * 86400)
    assert list(nodes(lab)) == ["marked"] and lab.queue.ready == {}


def test_a_retry_wakes_a_client_on_which_it_has_not_failed(lab):
    (a,) = lab.add("a", Retries=1)
    lab.start("bad")
    lab.poll("good", 0, Slots=1)
    lab.end(a, 1)
    given = []
    node = {"Slots": 1}
    threads = [
        threading.Thread(
            target=lambda host=host: given.extend(
                (host, job["ID"])
                for job in lab.do("poll", {"Hostname": host, "Slots": 1, "Wait": 50, "Node": node}, lambda: True)[
                    "Jobs"
                ]
            )
        )
        for host in ("bad", "good")
    ]
    for thread in threads:
        thread.start()
    until(lambda: sum(len(known.polls) for known in lab.queue.nodes.values()) == 2, "two requests to be held open")
    lab.pass_time(31)
    threads[1].join(30)  # less than it would wait if nobody woke it
    assert given == [("good", lab.job(a).id)]
    lab.queue.stopping = True
    lab.queue._wake_all()
    threads[0].join(10)


def test_a_server_that_is_stopping_is_not_asked_again_and_again_by_who_waits(lab):
    queued, over = lab.add("queued", "over")
    lab.run(over)
    lab.queue.stopping = True
    waiting = (
        lambda: lab.poll(slots=0),
        lambda: lab.queue.wait_for_end(str(queued), 5),
        lambda: lab.queue.follow(str(queued), {}, 5),
    )
    for wait in waiting:
        with pytest.raises(Stopping):
            wait()
    assert str(lab.queue.wait_for_end(str(over), 5)) == str(over)
    assert str(lab.queue.wait_for_end(str(queued), 0)) == str(queued)


def test_a_cycle_by_way_of_one_of_many_subjobs_is_refused_for_all_that_are_altered(lab):
    first, second = lab.add({"Array": "1-3000"}, {"Array": "1-3000"})
    assert len(lab.verb("alter", second, wish={"Depend": [f"afterok:{first}"]})) == 3000
    with pytest.raises(BadRequest, match="would be a cycle"):
        lab.verb("alter", first, wish={"Depend": [f"afterok:{second}[7]"]})
    assert not any(lab.job(f"{first}[{index}]").depend for index in (1, 7, 3000))


# ---------------------------------------------------------------------------------------------------------------------
# Clients that were cut off, refuse, cannot start anything, or go by one name
# ---------------------------------------------------------------------------------------------------------------------


def names_run(lab, job, host, seconds=None, over=None, **node):
    """The answer to a client that names a run, and reports its end if it is over."""
    entry = {"ID": job.id, "Lease": job.lease}
    entry.update({} if seconds is None else {"Seconds": seconds})
    request = {"Hostname": host, "Slots": 0, "Running": [entry], "Node": node}
    if over is not None:
        request["Reports"] = [{"ID": job.id, "Lease": job.lease, "Hostname": host, "ExitStatus": over,
                               "StdOutTail": f"said on {host}"}]  # fmt: skip
    return lab.do("poll", request, lambda: True)


def cut_off(lab, **keys):
    """A job with two runs: that of `a`, which was not heard of for two hours, and that of `b`, half an hour old."""
    lab.add("x", **keys)
    first = lab.start("a")
    lab.pass_time(7200)
    assert lab.state(1) == "Q"
    second = lab.start("b")
    lab.pass_time(1800)
    return first, second


@pytest.mark.parametrize("restarted", [False, True])
def test_the_longer_run_wins_and_the_other_is_told_to_stop(lab, restarted):
    first, second = cut_off(lab)
    if restarted:
        lab.restart()
    assert names_run(lab, first, "a")["Signals"] == []
    job = lab.job(1)
    assert (job.state, job.host, job.lease, job.start_time) == (State.RUNNING, "a", first.lease, first.start_time)
    assert "longer than that of b, which is told to stop" in job.comment
    (signal,) = names_run(lab, second, "b")["Signals"]
    assert (signal["ID"], signal["Signal"]) == (job.id, "delete") and "runs on a" in signal["Comment"]
    assert lab.do("report", [{"ID": job.id, "Lease": second.lease, "Hostname": "b", "ExitStatus": 7}], "finish")[0][
        "Stale"
    ]
    lab.end(1, 3)
    assert (lab.job(1).exit_status, lab.job(1).host, lab.job(1).run_count) == (3, "a", 2)


def test_a_run_that_slept_is_the_shorter_one(lab):
    first, second = cut_off(lab)
    names_run(lab, second, "b", seconds=1700)
    lab.pass_time(10)
    assert "runs on b" in names_run(lab, first, "a", seconds=1709)["Signals"][0]["Comment"]
    assert lab.job(1).lease == second.lease
    assert names_run(lab, first, "a", seconds=1711)["Signals"] == []
    assert lab.job(1).lease == first.lease


def test_the_longer_run_wins_also_if_it_is_over(lab):
    first, _ = cut_off(lab)
    assert names_run(lab, first, "a", seconds=5000, over=4)["Reported"] == [{"ID": first.id}]
    assert (lab.state(1), lab.job(1).exit_status, lab.job(1).host) == ("F failed", 4, "a")
    assert lab.queue.store.read_output(lab.job(1), "out") == b"said on a"


def test_the_shorter_run_and_one_whose_job_is_over_change_nothing(lab):
    first, second = cut_off(lab)
    assert names_run(lab, first, "a", seconds=10, over=0)["Reported"] == [{"ID": first.id, "Stale": True}]
    assert lab.job(1).lease == second.lease
    assert lab.queue.store.read_output(lab.job(1), "out") == b""
    lab.end(1, 5)
    assert names_run(lab, first, "a", seconds=99999, over=0)["Reported"] == [{"ID": first.id, "Stale": True}]
    assert lab.job(1).exit_status == 5


def test_a_run_is_taken_up_again_when_the_later_one_has_failed_and_is_to_be_retried(lab):
    first, _ = cut_off(lab, Retries=1)
    lab.end(1, 1)
    assert lab.state(1) == "W"
    assert names_run(lab, first, "a", seconds=9000)["Signals"] == []
    assert (lab.state(1), lab.job(1).lease) == ("R", first.lease)


def test_a_run_of_a_job_that_is_being_deleted_or_was_is_told_to_end(lab):
    first, second = cut_off(lab)
    lab.verb("delete", 1)
    assert names_run(lab, first, "a")["Signals"][0]["Signal"] == "delete" and lab.job(1).lease == second.lease
    lab.end(1, 271, Status="deleted")
    assert names_run(lab, first, "a")["Signals"][0]["Signal"] == "delete" and lab.state(1) == "F deleted"


def test_a_run_that_was_to_be_run_again_does_not_come_back_nor_do_those_before_it(lab):
    first, second = cut_off(lab)
    lab.verb("rerun", 1)
    lab.pass_time(7200)
    assert lab.state(1) == "Q"
    for run, host in ((first, "a"), (second, "b")):
        assert names_run(lab, run, host)["Signals"][0]["Signal"] == "delete"
        assert names_run(lab, run, host, over=0)["Reported"] == [{"ID": run.id, "Stale": True}]
    assert lab.state(1) == "Q"
    lab.start("c")
    lab.end(1, 3)
    assert (lab.job(1).exit_status, lab.job(1).host) == (3, "c")


def test_a_run_that_comes_back_is_not_that_of_a_job_which_was_altered_to_be_another(lab):
    lab.add("x", "y")
    runs = lab.start("a"), lab.start("a")
    lab.pass_time(7200)
    lab.verb("alter", 1, wish={"Env": {"SEED": "2"}})
    lab.verb("alter", 2, wish={"Priority": 5, "Runtime": 9000})
    told = [names_run(lab, run, "a", seconds=7000)["Signals"] for run in runs]
    assert [[signal["Signal"] for signal in signals] for signals in told] == [["delete"], []]
    assert [lab.state(number) for number in (1, 2)] == ["Q", "R"]


def test_leases_of_earlier_runs_are_in_no_listing_and_not_told_to_the_next_client(lab):
    first, second = cut_off(lab)
    dump = b"".join(server_module.database_chunks(lab.queue.picture())).decode()
    assert first.lease not in dump + json.dumps(lab.job(1).public()) and "Earlier" not in dump
    lab.pass_time(7200)
    (record,) = lab.poll("c")
    assert "Earlier" not in record
    assert [lease for lease, _ in lab.job(1).earlier] == [first.lease, second.lease]


def refuse(lab, host, words="runs only what starts with 'java'"):
    job = lab.start(host)
    lab.end(job, Status="refused", ExitStatus=-102, Comment=f"{host} {words}")


@pytest.mark.parametrize("restarted", [False, True])
def test_a_job_refused_by_every_client_is_held_with_what_each_said(lab, restarted):
    lab.add("x")
    for host in ("b", "c"):
        lab.poll(host, slots=0)
    refuse(lab, "b")
    assert lab.state(1) == "Q"
    lab.poll("w", slots=0, Queues=["other"])  # could not run it anyway
    refuse(lab, "c")
    comment = lab.job(1).comment
    assert lab.state(1) == "H" and comment.startswith(
        "refused by every client: b, c: runs only what starts with 'java'"
    )
    if restarted:
        lab.restart()
    lab.verb("release", 1)
    assert (lab.state(1), lab.job(1).refused_by) == ("Q", [])


def test_a_job_refused_by_every_client_is_offered_to_one_that_is_started_then(lab):
    lab.add("x")
    refuse(lab, "b")
    assert lab.state(1) == "H" and lab.poll("b") == [] and lab.poll("w", Queues=["other"]) == []
    assert [job["ID"] for job in lab.poll("b", Session="after a restart, with another --allow-prefix")] == [
        lab.job(1).id
    ]
    refuse_again = {"Status": "refused", "Comment": "b runs only java"}
    lab.end(1, **refuse_again)
    assert lab.state(1) == "H" and len(lab.poll("new")) == 1


def test_a_held_job_that_every_client_had_refused_says_who_holds_it(lab):
    lab.add("x")
    refuse(lab, "b")
    lab.verb("hold", 1)
    assert lab.job(1).comment == "held by a person" and lab.poll("new") == []
    lab.verb("release", 1)
    assert lab.state(1) == "Q"


def not_started(lab, host, exit_status=-8, **report):
    job = lab.start(host)
    lab.end(job, exit_status, Comment="cannot start run: no such file", **report)


@pytest.mark.parametrize("restarted", [False, True])
def test_a_host_that_cannot_start_three_jobs_in_a_row_is_offline_until_it_is_returned(lab, restarted):
    lab.add(*"abcdefghij")
    not_started(lab, "bad")
    not_started(lab, "bad", -9)
    lab.end(lab.start("bad"), 1)
    for exit_status in (-8, -8, -9):
        not_started(lab, "bad", exit_status)
    if restarted:
        lab.restart()
    assert lab.poll("bad") == [] and len(lab.poll("good")) == 1
    (node,) = [node for node in lab.queue.node_records() if node["Host"] == "bad"]
    assert node["State"] == "offline" and "3 jobs in a row could not be started" in node["Comment"]
    assert "cannot start run: no such file" in node["Comment"] and "pbsnodes -r bad" in node["Comment"]
    lab.do("mark", ["bad"], "clear", "")
    not_started(lab, "bad")
    assert len(lab.poll("bad")) == 1


def test_an_array_that_cannot_be_started_anywhere_takes_one_host_offline_and_not_the_room(lab):
    lab.add({"Params": ["jaav", "{index}"], "Array": "1-20"})
    for _ in range(3):
        not_started(lab, "a")
    for host in "bcb":
        for _ in range(3):
            not_started(lab, host)
    assert sorted(lab.queue.marks) == ["a"]
    lab.end(lab.start("d"), 0)  # so it can be, and b and c are at fault
    for _ in range(3):
        not_started(lab, "b")
    assert sorted(lab.queue.marks) == ["a", "b"]


def test_a_client_that_says_farewell_is_down_at_once_and_up_when_it_is_started_again(lab):
    node = {"Client": "1", "Session": "1"}
    lab.poll("pc", slots=0, **node)
    lab.poll("pc", slots=0, **node, Stopped=True)
    lab.pass_time(1)
    assert lab.queue.node_records()[0]["State"] == "down"
    lab.poll("pc", slots=0, Client="1", Session="2")
    lab.pass_time(1)
    assert lab.queue.node_records()[0]["State"] == "free"


def test_one_job_that_cannot_be_started_is_no_bad_host_however_often_it_is_tried(lab):
    lab.add("x", Retries=9)
    for _ in range(4):
        not_started(lab, "pc")
        lab.pass_time(3700)
    lab.add("y")
    assert len(lab.poll("pc", slots=5)) == 2


def test_what_was_on_its_way_when_the_server_was_killed_is_queued_again_and_nothing_else_is(lab):
    def beat(client, number, running=(), unanswered=(), slots=0):
        named = [{"ID": job.id, "Lease": job.lease} for job in running]
        node = {"Client": client, "Session": client, "Slots": 2}
        request = {"Hostname": "pc", "Slots": slots, "Running": named, "Poll": number, "Open": unanswered, "Node": node}
        return lab.do("poll", request, lambda: True)["Jobs"]

    lab.add("lost", "arrived", "the other client's")
    lost, arrived = (lab.queue.jobs[job["ID"]] for job in beat("1", 1, slots=2))
    (others,) = (lab.queue.jobs[job["ID"]] for job in beat("2", 1, slots=1))
    lab.restart()
    beat("1", 7, [arrived], unanswered=[6])  # an answer of before may still be on its way
    assert [lab.state(number) for number in (1, 2, 3)] == ["R", "R", "R"]
    beat("1", 8, [arrived])
    assert [lab.state(number) for number in (1, 2, 3)] == ["Q", "R", "R"] and "was lost" in lab.job(1).comment
    beat("1", 9, [arrived, lost])
    assert lab.state(1) == "R" and lab.job(1).lease == lost.lease
    beat("1", 10)
    assert [lab.state(number) for number in (1, 2, 3)] == ["R", "R", "R"] and lab.job(3).lease == others.lease


def test_two_clients_of_one_name_at_the_same_time_are_told_apart_and_warned(lab):
    def beat(client, **more):
        node = {"Client": client, "Session": client, "Machine": f"m{client}", "Slots": 2}
        request = {"Hostname": "pc", "Slots": 0, "Node": node, **more}
        return lab.do("poll", request, lambda: True)

    beat("1")
    lab.pass_time(20)
    assert "Warning" not in beat("2")  # the first may be gone: its spool deleted, say
    lab.pass_time(20)
    assert (
        "2 clients go by the name pc (machines m1 and m2)" in beat("1")["Warning"]
        and "--hostname" in beat("2")["Warning"]
    )
    lab.add("x", "y")
    job = lab.start("pc")
    beat("1", Running=[{"ID": job.id, "Lease": job.lease}])
    records = {node["Info"].get("Client"): node for node in lab.queue.node_records()}
    assert (records["1"]["Running"], records["2"]["Running"]) == (1, 0) and "2 clients" in records["2"]["Comment"]
    lab.pass_time(400)
    assert "Warning" not in beat("2")


def test_a_copied_spool_is_refused_so_that_its_client_makes_an_id_of_its_own(lab):
    beat = lambda session: lab.poll("pc", slots=0, Client="same", Session=session)
    for session in ("first", "first", "restarted", "restarted"):
        beat(session)
    with pytest.raises(server_module.SameSpool) as refused:
        beat("first")
    assert refused.value.status == 409 and "copy" in str(refused.value)
    beat("restarted")


def test_a_client_that_pauses_says_why_and_is_not_waited_for(lab):
    lab.add("x")
    lab.poll("pc", slots=0, Slots=2, Pause="outside --hours 19:00-07:00")
    (node,) = lab.queue.node_records()
    assert (node["State"], node["Comment"]) == ("busy", "outside --hours 19:00-07:00")
    why = "takes no jobs now (pc: outside --hours 19:00-07:00)"
    assert lab.queue.why_queued(lab.job(1)) == f"every client that is connected {why}"
    lab.add("y", Requires=["host=pc"])
    lab.poll("other", slots=0)
    assert lab.queue.why_queued(lab.job(2)) == f"needs host=pc: every client that has it {why}"


# ---------------------------------------------------------------------------------------------------------------------
# Output that is followed
# ---------------------------------------------------------------------------------------------------------------------


def piece(job, at, text, key="StdOut", **more):
    return {"ID": job.id, "Lease": job.lease, "Hostname": job.host, key: {"At": at, "Text": text}, **more}


def test_a_followed_jobs_client_is_told_and_what_it_sends_is_read_from_any_byte_on(lab):
    lab.add("x")
    job = lab.start()
    assert lab.queue.stream([piece(job, 0, "nobody reads")]) == [{"ID": job.id, "Follow": False}]
    assert lab.queue.follow("1", {}, 0)[1] == {}
    assert names_run(lab, job, "pc")["Signals"] == [{"ID": job.id, "Signal": "follow"}]
    assert names_run(lab, job, "pc")["Signals"] == []  # once is enough
    assert lab.queue.stream([piece(job, 100, "abc\udcff"), piece(job, 0, "e", "StdErr")])[0]["Follow"]
    assert lab.queue.follow("1", {}, 0)[1] == {"StdOut": (100, b"abc\xff"), "StdErr": (0, b"e")}
    lab.queue.stream([piece(job, 102, "c\udcffdef")])  # sent again in part
    assert lab.queue.follow("1", {"StdOut": 104, "StdErr": 1}, 0)[1] == {"StdOut": (104, b"def")}
    lab.queue.stream([piece(job, 1000, "later")])  # what is between was skipped
    assert lab.queue.follow("1", {"StdOut": 107, "StdErr": 1}, 0)[1] == {"StdOut": (1000, b"later")}
    lab.end(1, StdOutTail="later, and the last", StdOutSize=1019)
    over, found = lab.queue.follow("1", {"StdOut": 1005, "StdErr": 1}, 0)
    assert over.state is State.FINISHED and found == {"StdOut": (1005, b", and the last")}


def test_no_more_than_so_much_of_a_followed_output_is_kept_and_nothing_of_another_run(lab):
    lab.add("x")
    job = lab.start()
    lab.queue.follow("1", {}, 0)
    for at in range(0, 10 << 16, 1 << 16):
        lab.queue.stream([piece(job, at, "x" * (1 << 16))])
    at, data = lab.queue.follow("1", {}, 0)[1]["StdOut"]
    assert (at, len(data)) == (6 << 16, 4 << 16)
    assert lab.queue.stream([dict(piece(job, 10 << 16, "z"), Lease="stolen")]) == [{"ID": job.id, "Follow": False}]
    lab.verb("rerun", 1)
    lab.end(1, 271, Status="deleted")
    again = lab.start()
    assert lab.queue.follow("1", {}, 0)[1] == {}
    lab.queue.stream([piece(again, 0, "anew")])
    assert lab.queue.follow("1", {}, 0)[1] == {"StdOut": (0, b"anew")}


@pytest.mark.parametrize(
    "part", ["text", 5, {}, {"At": -1, "Text": ""}, {"At": 0}, {"At": True, "Text": ""}, {"At": 0, "Text": "x" * 65537}]
)
def test_what_is_no_piece_of_output_is_refused(lab, part):
    lab.add("x")
    job = lab.start()
    with pytest.raises(BadRequest):
        lab.queue.stream([{"ID": job.id, "Lease": job.lease, "Hostname": "pc", "StdErr": part}])

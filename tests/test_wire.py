"""Our own wire: POST with JSON, the long poll, and HTTP itself, asked by programs that behave and programs that do not.

Covered: lists and all-or-nothing, the long poll and the heartbeat, leases that end, stale and repeated reports,
signals, lost answers, clients of one name; keep-alive, pipelining and the corners of HTTP/1.x; every refusal with its
status and sentence; clients that hang up at every byte; the listings; and that docs/protocol.md names what the server
answers.
"""

import itertools
import json
import os
import re
import socket
import threading
import time
import urllib.parse
from datetime import timedelta

import pytest
from harness import ROOT, Lab, until
from test_original import UNKNOWN_ID, Wire, moment, where

import server as server_module


@pytest.fixture
def server(lab):
    return lab.server()


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One server for tests that change nothing in it; job 1 is queued, 2 runs, 3 is held, 4 is finished, 5 waits."""
    with Lab(str(tmp_path_factory.mktemp("shared"))) as lab:
        server = lab.server("--max-body", "1mb")
        queued, running = {"Params": ["q"], "Requires": ["nobody"]}, {"Params": ["r"], "Name": "a"}
        held, waiting = {"Params": ["h"], "Hold": True}, {"Params": ["w"], "StartAfter": "2199-01-01T00:00:00Z"}
        server.queue("big")
        server.add(queued, running, held, {"Params": ["f"], "Name": "a", "Queue": "big"}, waiting)
        first, second = poll(server, "keeper", slots=2)["Jobs"]
        assert server.post("/finish", report(second, ExitStatus=3))[0] == 200
        server.running = first
        yield server


@pytest.fixture(scope="module")
def lasting(tmp_path_factory):
    """One server for tests that keep to jobs of their own, see `lease_one`."""
    with Lab(str(tmp_path_factory.mktemp("lasting"))) as lab:
        yield lab.server()


def ask(host="h1", slots=1, wait=0, running=(), client=None, unanswered=()):
    """The body of a POST /request; a client with an id counts its requests, and says which are still unanswered."""
    named = [{key: job[key] for key in ("ID", "Lease", "Seconds") if key in job} for job in running]
    body = {"Hostname": host, "Slots": slots, "Wait": wait, "Running": named}
    return {**body, "Node": {"Client": client}, "Poll": next(_counter), "Open": list(unanswered)} if client else body


_counter = itertools.count(1)


def poll(server, *arguments, **kwargs):
    status, answer = server.post("/request", ask(*arguments, **kwargs))
    assert status == 200 and set(answer) - {"Unknown"} == {"Jobs", "Signals", "Drain"}, answer
    return answer


def lease_one(server, client=None):
    """A job that runs on a host of its own, so that no other test's client gets it."""
    host = f"host{next(_counter)}"
    server.add({"Params": ["true"], "Requires": [f"host={host}"]})
    (job,) = poll(server, host, client=client)["Jobs"]
    return job


def report(job, **more):
    return {"ID": job["ID"], "Lease": job["Lease"], "Hostname": job["Host"], **more}


def held_open(server, *arguments, **kwargs):
    """A POST /request that the server holds open: a connection whose answer is still to come."""
    wire, body = Wire(server), ask(*arguments, **{"wait": 60, **kwargs})
    seen = len(nodes(server, body["Hostname"]))
    before = [node["LastSeen"] for node in nodes(server, body["Hostname"])]
    wire.post("/request", body)

    def known():
        found = nodes(server, body["Hostname"])
        return len(found) > seen or (found and [node["LastSeen"] for node in found] != before)

    until(known, "the server to know of the request")
    assert wire.silent(0)
    return wire


def nodes(server, host):
    return [node for node in server.get("/nodes")[1]["Nodes"] if node["Host"] == host]


def assert_refused(answer, status):
    """A refusal as every one is: its status, and one sentence for a person."""
    code, value = answer
    assert code == status, value
    assert set(value) == {"Error"} and isinstance(value["Error"], str)
    assert len(value["Error"]) > 10 and "\n" not in value["Error"] and "Traceback" not in value["Error"]
    return value["Error"]


def picture(server):
    """Everything there is to see of the jobs and the clients."""
    with Wire(server) as wire:
        jobs, clients, counts = wire.go("/dump"), wire.go("/nodes"), wire.go("/status").json
    return jobs.body, clients.body, counts["Jobs"], counts["States"], counts["Statuses"]


def post(server, path, value):
    """(status, value) of a POST with any JSON value, null too."""
    with Wire(server) as wire:
        answer = wire.post(path, json.dumps(value).encode()).answer()
    return answer.status, answer.json


# ---------------------------------------------------------------------------------------------------------------------
# Adding
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 2, 3000])
def test_a_list_of_any_length_is_added_in_order_and_answered_in_order(lasting, count):
    first = lasting.status()["Jobs"] + 1
    status, added = lasting.post("/add", [{"Params": ["echo", str(i)], "Requires": ["nobody"]} for i in range(count)])
    assert status == 200 and [entry["Number"] for entry in added] == list(range(first, first + count))
    assert all(set(entry) == {"ID", "Number"} for entry in added) and len({entry["ID"] for entry in added}) == count
    jobs = lasting.get("/dump")[1]["Available"]
    assert [jobs[entry["ID"]]["Params"] for entry in added] == [["echo", str(i)] for i in range(count)]


def test_one_object_is_answered_as_a_list_of_one(lasting):
    number = lasting.status()["Jobs"] + 1
    status, added = lasting.post("/add", {"Params": ["true"], "Requires": ["nobody"]})
    assert status == 200 and [entry["Number"] for entry in added] == [number]


@pytest.mark.parametrize("place", [1, 2, 3])
def test_one_bad_job_in_a_list_keeps_out_all_and_is_named(shared, place):
    jobs = [{"Params": ["true"]} for _ in range(3)]
    jobs[place - 1] = {"Params": [""]}
    before = picture(shared)
    assert f"job {place} of 3" in assert_refused(shared.post("/add", jobs), 400)
    assert picture(shared) == before


def test_every_key_of_a_job_that_a_submitter_may_set_comes_back_as_it_was(server):
    job = {"Params": ["a", "", "b c"], "Runtime": 5, "Name": "n", "Queue": "q", "Priority": -3, "Memory": 1 << 31,
           "CpuTime": 7, "Ncpus": 2, "Requires": ["host=h1"], "Env": {"A": "ü<"}, "WorkDir": "w", "Owner": "me@here",
           "StdOut": "o", "StdErr": "e", "Rerunable": False, "Retries": 2, "Unknown": {"kept": [None, 1]}}  # fmt: skip
    server.queue("q")
    (number,) = server.add(job)
    record = server.job(number)
    assert {key: record[key] for key in job} == job
    (leased,) = poll(server, slots=2)["Jobs"]
    assert {key: leased[key] for key in job} == job


def test_what_only_the_server_sets_is_not_taken_from_a_submitter(server):
    mine = {"ID": UNKNOWN_ID, "Number": 9, "State": "F", "Status": "dead", "Lease": "x", "Host": "h", "RunCount": 9}
    (number,) = server.add({"Params": ["true"], **mine})
    record = server.job(number)
    assert (number, record["State"]) == (1, "Q") and record["ID"] != UNKNOWN_ID
    assert not {"Status", "Lease", "Host", "RunCount"} & set(record)


# ---------------------------------------------------------------------------------------------------------------------
# The long poll
# ---------------------------------------------------------------------------------------------------------------------


def test_a_request_is_held_open_until_a_job_is_added(server):
    with held_open(server, "h1") as wire:
        (number,) = server.add(["true"])
        (job,) = wire.answer().json["Jobs"]
    assert (job["Number"], job["State"], job["Host"], job["RunCount"]) == (number, "R", "h1", 1)
    assert len(job["Lease"]) >= 32
    assert server.job(number)["State"] == "R"


def test_a_request_is_answered_at_once_when_there_is_a_job(server):
    server.add(["true"])
    with Wire(server) as wire:
        assert len(wire.post("/request", ask(wait=60)).answer().json["Jobs"]) == 1


def test_a_request_with_nothing_to_say_ends_after_its_wait(shared):
    with Wire(shared) as wire:
        wire.post("/request", ask("waits", wait=0.4))
        assert wire.silent(0.2)
        assert wire.answer().json == {"Jobs": [], "Signals": [], "Drain": False}


def test_a_request_without_free_slots_gets_no_job(server):
    server.add(["true"])
    assert poll(server, slots=0)["Jobs"] == []
    assert server.job(1)["State"] == "Q"


def test_a_request_gets_as_many_jobs_as_fit_its_slots_by_priority_then_in_order(server):
    server.add(["1"], {"Params": ["2"], "Priority": 1}, {"Params": ["3"], "Ncpus": 3}, ["4"], ["5"])
    assert [job["Number"] for job in poll(server, slots=3)["Jobs"]] == [2, 1, 4]
    assert [job["Number"] for job in poll(server, slots=4)["Jobs"]] == [3, 5]


def test_a_job_goes_only_to_a_client_that_has_what_it_requires(server):
    server.add({"Params": ["true"], "Requires": ["host=h2", "gpu"]})
    assert poll(server, "h1")["Jobs"] == [] and poll(server, "h2")["Jobs"] == []
    wrong, right = ({**ask(host), "Node": {"Properties": ["gpu"]}} for host in ("h1", "h2"))
    assert server.post("/request", wrong)[1]["Jobs"] == []
    assert len(server.post("/request", right)[1]["Jobs"]) == 1


def test_a_waiting_client_that_cannot_run_the_job_does_not_keep_it_from_one_that_can(server):
    with held_open(server, "h1") as first, held_open(server, "h2") as second:
        server.add({"Params": ["true"], "Requires": ["host=h2"]})
        assert len(second.answer().json["Jobs"]) == 1
        assert first.silent()


@pytest.mark.parametrize("clients", [("c1", "c2"), (None, None)], ids=["with ids", "without ids"])
def test_two_clients_of_one_hostname_do_not_send_each_other_home(server, clients):
    wires = [held_open(server, "same", client=client) for client in clients]
    assert wires[0].silent()
    server.add(["1"], ["2"])
    jobs = [job["Number"] for wire in wires for job in wire.answer().json["Jobs"]]
    assert sorted(jobs) == [1, 2]


def test_a_client_that_asks_again_sends_its_own_former_request_home(server):
    with held_open(server, "h1", client="c1") as former, held_open(server, "h1", client="c1") as present:
        assert former.answer().json["Jobs"] == []
        server.add(["true"])
        assert len(present.answer().json["Jobs"]) == 1


def test_many_waiting_clients_get_one_job_each(server):
    wires = [held_open(server, f"h{i}") for i in range(20)]
    server.add(*([["true"]] * 20))
    assert sorted(job["Number"] for wire in wires for job in wire.answer().json["Jobs"]) == list(range(1, 21))


# ---------------------------------------------------------------------------------------------------------------------
# Leases: the heartbeat, and silence
# ---------------------------------------------------------------------------------------------------------------------


def test_a_heartbeat_renews_the_leases_it_names(server):
    server.add(["1"], ["2"])
    first, second = poll(server, slots=2)["Jobs"]
    poll(server, slots=0, running=[first])
    assert moment(server.job(1)["Expiry"]) > moment(first["Expiry"])
    assert moment(server.job(2)["Expiry"]) == moment(second["Expiry"])


def test_a_silent_clients_job_is_queued_again_and_a_renewed_one_is_not(lab):
    server = lab.server("--requeue-after", 2, "--node-timeout", 1)
    server.add(["renewed"], ["silent"], {"Params": ["once"], "Rerunable": False})
    (renewed,), (silent, once) = poll(server, "h1")["Jobs"], poll(server, "h2", slots=2)["Jobs"]

    def renew():
        assert poll(server, "h1", slots=0, running=[renewed])["Signals"] == []
        return server.job(2)["State"] == "Q"

    until(renew, "the silent client's job to be queued again")
    job = server.job(1)
    assert (job["State"], job["Host"], job["RunCount"]) == ("R", "h1", 1)
    assert "h2" in server.job(2)["Comment"]
    lost = server.over(3)
    assert (lost["Status"], lost["ExitStatus"], lost["RunCount"]) == ("lost", -103, 1) and "h2" in lost["Comment"]
    assert until(lambda: [node["State"] for node in nodes(server, "h2")] == ["down"], "the silent client to be down")
    (again,) = poll(server, "h3")["Jobs"]
    assert (again["ID"], again["RunCount"]) == (silent["ID"], 2) and again["Lease"] != silent["Lease"]
    before = picture(server)[0]
    for path in ("/finish", "/timeout", "/dead"):
        assert server.post(path, [report(silent, ExitStatus=0)])[1] == [{"ID": silent["ID"], "Stale": True}]
    assert picture(server)[0] == before
    # its client is back, and has it no more when the run that was begun meanwhile is the longer one
    signals = poll(server, "h2", slots=0, running=[{**silent, "Seconds": 0}])["Signals"]
    assert [(signal["ID"], signal["Signal"]) for signal in signals] == [(silent["ID"], "delete")]
    assert "h3" in signals[0]["Comment"] and picture(server)[0] == before
    # nobody else may begin the job that must not run twice, so its true end counts whenever it comes
    assert server.post("/finish", [report(once, ExitStatus=3)])[1] == [{"ID": once["ID"]}]
    job = server.job(3)
    assert (job["State"], job["Status"], job["ExitStatus"], job["RunCount"]) == ("F", "failed", 3, 1)


@pytest.fixture(scope="module")
def given_up(tmp_path_factory):
    """A server and two jobs whose clients were silent so long that they are queued again; nobody else began them."""
    with Lab(str(tmp_path_factory.mktemp("given_up"))) as lab:
        server = lab.server("--requeue-after", 1)
        jobs = [lease_one(server) for _ in range(2)]
        until(lambda: server.status()["States"]["Q"] == 2, "the leases to end")
        yield server, jobs


def test_a_client_that_comes_back_before_anybody_else_began_its_job_keeps_it(given_up):
    server, (job, _) = given_up
    assert poll(server, job["Host"], running=[job]) == {"Jobs": [], "Signals": [], "Drain": False}
    assert (server.job(1)["State"], server.job(1)["RunCount"]) == ("R", 1)
    assert server.post("/finish", [report(job, ExitStatus=0)])[1] == [{"ID": job["ID"]}]
    assert server.job(1)["Status"] == "finished"


def test_a_run_that_ended_while_its_client_was_cut_off_counts_if_nobody_else_began_it(given_up):
    """The report may well come before the next heartbeat; what was computed for hours is not computed again."""
    server, (_, job) = given_up
    assert server.post("/finish", [report(job, ExitStatus=0)])[1] == [{"ID": job["ID"]}]
    assert (server.job(2)["State"], server.job(2)["Status"]) == ("F", "finished")


def test_leases_survive_a_restart_of_the_server(lab, server):
    server.add(["true"])
    (job,) = poll(server)["Jobs"]
    server.kill()
    server = lab.server()
    assert poll(server, slots=1, running=[job]) == {"Jobs": [], "Signals": [], "Drain": False}
    assert server.post("/finish", report(job, ExitStatus=0))[1] == [{"ID": job["ID"]}]
    assert server.job(1)["Status"] == "finished"


def test_a_lost_answer_is_handed_out_again(lasting):
    """The client hangs up before it reads what it got, and asks again without naming the job."""
    (number,) = lasting.add({"Params": ["true"], "Requires": ["host=hasty"]})
    Wire(lasting).post("/request", ask("hasty", client="c1")).hang_up()
    until(lambda: lasting.job(number)["State"] == "R", "the job to be leased")
    (job,) = poll(lasting, "hasty", client="c1")["Jobs"]
    assert job["Number"] == number
    assert lasting.post("/finish", report(job, ExitStatus=0))[1] == [{"ID": job["ID"]}]


def test_a_job_that_was_handed_out_again_is_no_longer_the_former_runs(lasting):
    lost = lease_one(lasting, client="c1")
    (job,) = poll(lasting, lost["Host"], client="c1")["Jobs"]
    assert job["ID"] == lost["ID"] and job["Lease"] != lost["Lease"]
    assert lasting.post("/finish", report(lost, ExitStatus=0))[1] == [{"ID": job["ID"], "Stale": True}]
    assert poll(lasting, job["Host"], slots=0, running=[job], client="c1")["Signals"] == []


def test_an_answer_that_is_still_on_its_way_is_not_taken_for_lost(lasting):
    lasting.add({"Params": ["true"], "Requires": ["host=slow"]})
    first = ask("slow", client="c1")
    (job,) = lasting.post("/request", first)[1]["Jobs"]
    assert poll(lasting, "slow", client="c1", unanswered=[first["Poll"]])["Jobs"] == []
    assert poll(lasting, "slow", client="c1", running=[job])["Jobs"] == []
    assert lasting.job(job["ID"])["RunCount"] == 1
    assert lasting.post("/finish", report(job, ExitStatus=0))[1] == [{"ID": job["ID"]}]


@pytest.mark.parametrize("host, client", [("", "c2"), ("other", "c1"), ("other", "c2"), ("", None)])
def test_another_client_does_not_get_a_job_because_the_one_that_has_it_was_not_named(lasting, host, client):
    job = lease_one(lasting, client="c1")
    assert poll(lasting, host or job["Host"], client=client)["Jobs"] == []
    assert (lasting.job(job["ID"])["State"], lasting.job(job["ID"])["RunCount"]) == ("R", 1)


# ---------------------------------------------------------------------------------------------------------------------
# Reports
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path, more, status, exit_status",
    [
        ("/finish", {"ExitStatus": 0}, "finished", 0),
        ("/finish", {}, "finished", None),
        ("/finish", {"ExitStatus": 3}, "failed", 3),
        ("/finish", {"ExitStatus": 265}, "failed", 265),
        ("/finish", {"ExitStatus": 3221225477}, "failed", 3221225477),
        ("/finish", {"ExitStatus": -8, "Status": "failed", "Comment": "no such file"}, "failed", -8),
        ("/finish", {"ExitStatus": -10, "Status": "memory"}, "memory", -10),
        ("/finish", {"ExitStatus": -12, "Status": "cputime"}, "cputime", -12),
        ("/timeout", {}, "timeout", -11),
        ("/timeout", {"ExitStatus": -11}, "timeout", -11),
        ("/dead", {}, "dead", -101),
        ("/dead", {"Comment": "why " * 1500}, "dead", -101),
    ],
)
def test_a_report_ends_the_job_with_its_status(lasting, path, more, status, exit_status):
    job = lease_one(lasting)
    assert lasting.post(path, report(job, CpuTimeUsed=1.5, MaxMem=4096, **more)) == (200, [{"ID": job["ID"]}])
    record = lasting.job(job["ID"])
    assert (record["State"], record["Status"], record["ExitStatus"]) == ("F", status, exit_status)
    assert (record["CpuTimeUsed"], record["MaxMem"], record["Host"]) == (1.5, 4096, job["Host"])
    assert record.get("Comment") == (more.get("Comment") and more["Comment"][:4096])
    assert moment(record["StartTime"]) <= moment(record["EndTime"])


def test_a_list_of_reports_is_answered_in_order(lasting):
    jobs = [lease_one(lasting) for _ in range(5)][::-1]
    finished = lasting.status()["Statuses"]["finished"]
    answers = lasting.post("/finish", [report(job, ExitStatus=0) for job in jobs])[1]
    assert answers == [{"ID": job["ID"]} for job in jobs]
    assert lasting.status()["Statuses"]["finished"] == finished + 5


@pytest.mark.parametrize("again", ["/finish", "/timeout", "/dead", "/usage"])
def test_a_report_sent_twice_counts_once_and_a_later_one_does_not_replace_it(lasting, again):
    job = lease_one(lasting)
    finished = lasting.status()["Statuses"]["finished"]
    first = report(job, ExitStatus=0, StdOutTail="first")
    assert lasting.post("/finish", [first, first]) == (200, [{"ID": job["ID"]}] * 2)
    before = picture(lasting), lasting.get("/output", id=job["ID"])
    status, answers = lasting.post(again, [report(job, ExitStatus=7, CPU=1, Mem=1, StdOutTail="second", MaxMem=9)])
    assert (status, len(answers), answers[0]["ID"]) == (200, 1, job["ID"])
    assert (picture(lasting), lasting.get("/output", id=job["ID"])) == before
    assert before[1][1]["StdOut"] == "first"
    assert lasting.status()["Statuses"]["finished"] == finished + 1


@pytest.mark.parametrize("path", ["/finish", "/timeout", "/dead", "/usage"])
@pytest.mark.parametrize("lease", ["x", "", None])
def test_a_report_with_another_lease_is_stale_and_changes_nothing(lasting, path, lease):
    job = lease_one(lasting)
    before = picture(lasting), lasting.get("/output", id=job["ID"])
    stale = {**report(job, ExitStatus=0, CPU=1, Mem=1, StdOutTail="x"), "Lease": lease}
    assert lasting.post(path, stale) == (200, [{"ID": job["ID"], "Stale": True}])
    assert (picture(lasting), lasting.get("/output", id=job["ID"])) == before


def test_a_stale_report_in_a_list_does_not_keep_back_the_others(lasting):
    first, second = lease_one(lasting), lease_one(lasting)
    answers = lasting.post("/finish", [{**report(first), "Lease": "old"}, report(second, ExitStatus=0)])[1]
    assert answers == [{"ID": first["ID"], "Stale": True}, {"ID": second["ID"]}]
    assert (lasting.job(first["ID"])["State"], lasting.job(second["ID"])["State"]) == ("R", "F")


def test_reports_that_come_with_a_request_are_acknowledged_at_once_in_its_answer(lasting):
    job = lease_one(lasting)
    reports = [report(job, ExitStatus=3), report(job, ExitStatus=3), {**report(job), "Lease": "old"}]
    status, answer = lasting.post("/request", {**ask(job["Host"], wait=60), "Reports": reports})
    assert status == 200 and answer["Reported"] == [{"ID": job["ID"]}] * 2 + [{"ID": job["ID"], "Stale": True}]
    assert (lasting.job(job["ID"])["Status"], lasting.job(job["ID"])["ExitStatus"]) == ("failed", 3)


def test_a_refused_job_is_offered_to_others_only_and_says_why(server):
    poll(server, "h2", slots=0)
    server.add(["true"])
    (job,) = poll(server, "h1")["Jobs"]
    server.post("/finish", report(job, Status="refused", Comment="only java runs here"))
    record = server.job(1)
    assert record["State"] == "Q" and "h1" in record["Comment"] and "only java runs here" in record["Comment"]
    assert poll(server, "h1")["Jobs"] == []
    assert len(poll(server, "h2")["Jobs"]) == 1


def test_a_job_that_is_given_back_runs_again(server):
    server.add(["true"])
    (job,) = poll(server)["Jobs"]
    with held_open(server, "h2") as wire:
        server.post("/finish", report(job, Status="released"))
        (again,) = wire.answer().json["Jobs"]
    assert (again["ID"], again["RunCount"], again["Host"]) == (job["ID"], 2, "h2")
    assert server.post("/finish", report(job, ExitStatus=0))[1] == [{"ID": job["ID"], "Stale": True}]


def test_usage_samples_are_kept_in_order(lasting):
    job = lease_one(lasting)
    samples = [report(job, CPU=100 * i, Mem=10 - i, CpuTimeUsed=i, Seconds=60) for i in range(3)]
    assert lasting.post("/usage", samples) == (200, [{"ID": job["ID"]}] * 3)
    record = lasting.job(job["ID"])
    assert (record["CPUUsed"], record["MemUsed"], record["SampleSeconds"]) == ([0, 100, 200], [10, 9, 8], 60)
    assert (record["CpuTimeUsed"], record["MaxMem"]) == (2, 10)


def test_usage_samples_are_thinned_at_256(lasting):
    job = lease_one(lasting)
    lasting.post("/usage", [report(job, CPU=i, Mem=i, Seconds=60) for i in range(256)])
    assert lasting.job(job["ID"])["CPUUsed"] == list(range(256))
    lasting.post("/usage", report(job, CPU=256, Mem=256, Seconds=60))
    record = lasting.job(job["ID"])
    assert len(record["CPUUsed"]) == len(record["MemUsed"]) in (128, 129) and record["SampleSeconds"] == 120
    assert {after - before for before, after in zip(record["CPUUsed"], record["CPUUsed"][1:])} == {2}


def test_the_tails_of_the_outputs_come_with_the_report(lasting):
    job = lease_one(lasting)
    lasting.post("/finish", report(job, ExitStatus=0, StdOutTail="Grüße\n\udcff", StdErrTail="x" * 70000))
    status, output = lasting.get("/output", id=job["Number"])
    assert status == 200 and output["StdOut"] == "Grüße\n\udcff" and output["StdErr"] == "x" * 65536


# ---------------------------------------------------------------------------------------------------------------------
# Deleting, holding, waiting
# ---------------------------------------------------------------------------------------------------------------------


def test_a_queued_job_is_deleted_at_once(server):
    server.add(["true"])
    status, answer = server.post("/delete", {"IDs": ["1", "1"]})
    assert status == 200 and [job["Status"] for job in answer["Jobs"]] == ["deleted"]
    assert server.job(1)["State"] == "F" and poll(server)["Jobs"] == []


@pytest.mark.parametrize("held", [True, False], ids=["while a request is held open", "at the next request"])
def test_a_running_job_is_deleted_by_a_signal_to_its_client(lasting, held):
    job = lease_one(lasting)
    host, delete = job["Host"], {"IDs": [str(job["Number"])]}
    signal = [{"ID": job["ID"], "Signal": "delete"}]
    if held:
        with held_open(lasting, host, slots=0, running=[job]) as wire:
            assert lasting.post("/delete", delete)[0] == 200
            assert wire.answer().json["Signals"] == signal
    else:
        assert lasting.post("/delete", delete)[0] == 200
    record = lasting.job(job["ID"])
    assert record["State"] == "R" and host in record["Comment"]
    assert poll(lasting, host, slots=0, wait=60, running=[job])["Signals"] == signal
    known = {**ask(host, slots=0), "Running": [{"ID": job["ID"], "Lease": job["Lease"], "Signal": "delete"}]}
    assert lasting.post("/request", known)[1]["Signals"] == []  # or it would be told so without end
    lasting.post("/finish", report(job, Status="deleted", ExitStatus=271))
    assert (lasting.job(job["ID"])["State"], lasting.job(job["ID"])["Status"]) == ("F", "deleted")


def test_what_the_database_does_not_know_goes_on_and_is_shown(lasting):
    ghost = {"ID": UNKNOWN_ID, "Lease": "x"}
    answer = poll(lasting, "haunted", slots=0, running=[ghost])
    assert (answer["Signals"], answer["Unknown"]) == ([], [UNKNOWN_ID])
    words = f"it has what is not in this database, and is left alone: job {UNKNOWN_ID}"
    assert [node["Comment"] for node in lasting.get("/nodes")[1]["Nodes"] if node["Host"] == "haunted"] == [words]
    assert poll(lasting, "haunted", slots=0, running=[ghost] * 3)["Signals"] == []
    assert [node["Comment"] for node in lasting.get("/nodes")[1]["Nodes"] if node["Host"] == "haunted"] == [words + " and 2 more"]
    assert "Unknown" not in poll(lasting, "haunted", slots=0)
    assert [node["Comment"] for node in lasting.get("/nodes")[1]["Nodes"] if node["Host"] == "haunted"] == [""]


def test_a_held_job_is_not_handed_out_and_can_be_deleted(server):
    server.add({"Params": ["true"], "Hold": True})
    job = server.job(1)
    assert job["State"] == "H" and job["Comment"] and where(server, job["ID"])[0] == "Held"
    assert poll(server)["Jobs"] == []
    assert server.post("/delete", {"IDs": ["1"]})[0] == 200
    assert server.job(1)["Status"] == "deleted"


def test_a_job_with_a_later_start_waits_and_then_goes_to_a_waiting_client(server):
    with held_open(server, "h1") as wire:
        server.add({"Params": ["never"], "StartAfter": "2199-06-01T01:00:00+01:00"})
        soon = time.time() + 0.5
        server.add({"Params": ["soon"], "StartAfter": server_module.format_time(soon)})
        job = server.job(1)
        assert job["State"] == "W" and moment(job["StartAfter"]).year == 2199 and where(server, job["ID"])[0] == "Held"
        assert "2199" in job["Comment"]
        (job,) = wire.answer().json["Jobs"]
    assert job["Number"] == 2 and moment(job["StartTime"]).timestamp() >= round(soon, 6)
    assert server.job(1)["State"] == "W"


def test_a_start_that_is_past_does_not_hold_a_job_up(server):
    server.add({"Params": ["true"], "StartAfter": "2001-01-01T00:00:00Z"})
    assert len(poll(server)["Jobs"]) == 1


# ---------------------------------------------------------------------------------------------------------------------
# HTTP
# ---------------------------------------------------------------------------------------------------------------------


def test_a_connection_is_kept_alive_through_good_and_bad_answers(shared):
    with Wire(shared) as wire:
        for path, status in (("/status", 200), ("/nope", 404), ("/job?id=99", 404), ("/add", 400), ("/dump", 200)) * 3:
            answer = wire.go(path)
            assert answer.status == status and answer.headers.get("connection") != "close"
        assert wire.post("/add", {}).answer().status == 400
        assert wire.go("/status").status == 200


def test_pipelined_requests_are_answered_in_order(server):
    add = [json.dumps({"Params": ["echo", str(i)]}).encode() for i in range(50)]
    with Wire(server) as wire:
        wire.send(b"".join(b"POST /add HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (len(job), job) for job in add)
                  + b"GET /nope HTTP/1.1\r\n\r\nGET /dump HTTP/1.1\r\n\r\nGET /status HTTP/1.1\r\n\r\n")  # fmt: skip
        assert [wire.answer().json[0]["Number"] for _ in add] == list(range(1, 51))
        assert wire.answer().status == 404
        assert len(wire.answer().json["Available"]) == 50
        assert wire.answer().json["Jobs"] == 50
        assert wire.silent()


def test_pipelined_gets_are_answered_in_order(server):
    add = "/add?configuration=%7B%22Params%22%3A%5B%22true%22%5D%7D"
    targets = ["/status", add, "/status", "/job?id=1", "/request", "/job?id=1"]
    with Wire(server) as wire:
        wire.send(b"".join(b"GET %b HTTP/1.1\r\n\r\n" % target.encode() for target in targets))
        before, added, after, queued, leased, running = (wire.answer().json for _ in targets)
    assert (before["Jobs"], added["Number"], after["Jobs"]) == (0, 1, 1)
    assert (queued["State"], leased["ID"], running["State"]) == ("Q", added["ID"], "R")


def test_a_client_that_never_reads_its_answers_holds_up_nobody(lasting):
    with Wire(lasting) as deaf:
        deaf.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.socket.settimeout(0.2)
        try:
            for _ in range(5000):
                deaf.send(b"GET /status HTTP/1.1\r\n\r\n")
        except OSError:
            pass  # the server reads no more, or has hung up on it
        with Wire(lasting) as wire:
            assert wire.go("/status").status == 200
            assert wire.post("/request", ask("hears")).answer().status == 200


def test_a_request_that_is_pipelined_behind_a_long_poll_is_not_taken_for_a_hang_up(server):
    with held_open(server, "h1") as wire:
        wire.send(b"GET /status HTTP/1.1\r\n\r\n")
        server.add(["true"])
        assert len(wire.answer().json["Jobs"]) == 1
        assert wire.answer().json["Jobs"] == 1


def test_a_request_that_comes_byte_by_byte_is_understood(server):
    with Wire(server) as wire:
        for byte in b'POST /add HTTP/1.1\r\nHost: x\r\nContent-Length: 19\r\n\r\n{"Params":["true"]}':
            wire.send(bytes([byte]))
        assert wire.answer().json[0]["Number"] == 1


def test_header_names_are_taken_in_any_letter_case_and_blanks_around_values_do_not_count(server):
    with Wire(server) as wire:
        wire.send(b'POST /add HTTP/1.1\r\ncONTENT-length:   19  \r\n\r\n{"Params":["true"]}')
        assert wire.answer().json[0]["Number"] == 1


@pytest.mark.parametrize("path", ["/dump", "/jobs", "/status", "/nope"])
def test_http_1_0_gets_a_plain_body_up_to_the_end_of_the_connection(shared, path):
    with Wire(shared) as wire:
        wire.send(b"GET %b HTTP/1.0\r\n\r\n" % path.encode())
        answer = wire.answer()
        assert answer.status == (404 if path == "/nope" else 200)
        assert "transfer-encoding" not in answer.headers and answer.json
        assert wire.ended()


@pytest.mark.parametrize("header", [b"Connection: close", b"connection:CLOSE"])
def test_a_connection_is_closed_when_the_client_asks_for_it(shared, header):
    with Wire(shared) as wire:
        wire.send(b"GET /status HTTP/1.1\r\n%b\r\n\r\n" % header)
        answer = wire.answer()
        assert answer.status == 200 and answer.headers["connection"] == "close"
        assert wire.ended()


def test_a_client_that_waits_for_100_continue_is_told_to_go_on(server):
    with Wire(server) as wire:
        wire.send(b"POST /add HTTP/1.1\r\nContent-Length: 19\r\nExpect: 100-continue\r\n\r\n")
        assert wire.answer().status == 100
        assert wire.send(b'{"Params":["true"]}').answer().json[0]["Number"] == 1
        assert wire.go("/status").status == 200


@pytest.mark.parametrize("expect", [b"", b"Expect: 100-continue\r\n"])
def test_a_body_over_the_limit_is_413_before_it_is_read(shared, expect):
    before = picture(shared)
    with Wire(shared) as wire:
        wire.send(b"POST /add HTTP/1.1\r\nContent-Length: 1048577\r\n%b\r\n" % expect)
        answer = wire.answer()
        assert_refused((answer.status, answer.json), 413)
        assert wire.ended()
    assert picture(shared) == before


def test_a_refused_body_that_is_sent_all_the_same_does_not_cost_the_answer(shared):
    with Wire(shared) as wire:
        answer = wire.post("/add", b" " * 1048577).answer()
        assert_refused((answer.status, answer.json), 413)


def test_a_body_of_just_the_limit_is_read(shared):
    with Wire(shared) as wire:
        answer = wire.post("/add", b"{}".ljust(1 << 20)).answer()
        assert_refused((answer.status, answer.json), 400)


@pytest.mark.parametrize("path", ["/add", "/nope", "/status"])
def test_a_chunked_body_is_411(shared, path):
    before = picture(shared)
    body = b'13\r\n{"Params":["true"]}\r\n0\r\n\r\n'
    with Wire(shared) as wire:
        wire.send(b"POST %b HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" % path.encode() + body)
        answer = wire.answer()
        assert_refused((answer.status, answer.json), 411)
        assert wire.ended()
    assert picture(shared) == before


BROKEN = [
    (b"POST /add HTTP/1.1\r\nContent-Length: x\r\n\r\n", 400),
    (b"POST /add HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
    (b"POST /add HTTP/1.1\r\nContent-Length: +19\r\n\r\n", 400),
    (b"POST /add HTTP/1.1\r\nContent-Length: 1.5\r\n\r\n", 400),
    (b"POST /add HTTP/1.1\r\nContent-Length: 0x13\r\n\r\n", 400),
    (b"POST /add HTTP/1.1\r\nContent-Length:\r\n\r\n", 400),
    (b"POST /add HTTP/1.1\r\nContent-Length: 5, 5\r\n\r\n12345", 400),
    (b"POST /add HTTP/1.1\r\nContent-Length: %b\r\n\r\n" % (b"9" * 5000), 400),
    (b"GET /dump\r\n\r\n", 400),
    (b"GET\r\n\r\n", 400),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),  # TLS by mistake
    (b"SSH-2.0-OpenSSH_9.2\r\n", 400),
    (b"GET /dump HTTP/2.0\r\n\r\n", 400),
    (b"GET /dump x HTTP/1.1\r\n\r\n", 400),
    (b"GET /dump HTTP/1.1\r\nno colon here\r\n\r\n", 400),
    (b"GET /dump HTTP/1.1\r\nX: %b\r\n\r\n" % (b"y" * 100000), 431),
    (b"GET /dump HTTP/1.1\r\n" + b"".join(b"X%d: y\r\n" % i for i in range(500)) + b"\r\n", 431),
    (b"GET /add?configuration=" + b"x" * (1 << 20) + b" HTTP/1.1\r\n\r\n", 414),
]


@pytest.mark.parametrize("data, status", BROKEN, ids=[repr(data[:60]) for data, _ in BROKEN])
def test_what_is_no_http_is_refused_and_the_connection_closed(shared, data, status):
    before = picture(shared)
    with Wire(shared) as wire:
        answer = wire.send(data).answer()
        assert_refused((answer.status, answer.json), status)
        assert answer.headers["connection"] == "close" and wire.ended()
    assert picture(shared) == before


def test_a_url_of_half_a_megabyte_is_taken(server):
    with Wire(server) as wire:
        text = urllib.parse.quote(json.dumps({"Params": ["echo", "x" * 500000]}))
        assert wire.go("/add?configuration=" + text).json["Number"] == 1
    assert len(server.job(1)["Params"][1]) == 500000


# ---------------------------------------------------------------------------------------------------------------------
# Refusals: one sentence each, and nothing changed
# ---------------------------------------------------------------------------------------------------------------------

NOT_JSON = [b"", b" ", b"{", b"nope", b"\xff", b'{"Params":["true"]} x', b'\xef\xbb\xbf{"Params":["true"]}',
            b'{"Params":["true"],"X":NaN}', b'{"Params":["true"],"X":Infinity}', b'{"Params":["\xe9"]}', b"[" * 100000,
            b'{"Params":["true"],"Runtime":' + b"9" * 10000 + b"}"]  # fmt: skip


@pytest.mark.parametrize("body", NOT_JSON, ids=lambda body: repr(body[:30]))
def test_a_body_that_is_not_json_is_400_everywhere(shared, body):
    before = picture(shared)
    for path in ("/add", "/request", "/finish", "/timeout", "/dead", "/usage", "/delete"):
        status, _, data = shared.fetch(path, body, method="POST")
        assert_refused((status, json.loads(data)), 400)
    assert picture(shared) == before


BAD_JOBS = [
    *("text", 5, 1.5, True, None, [[]], {}),
    *({"Params": value} for value in (None, [], "true", 5, {}, [""], ["", "x"], [1], [None], [True], [["x"]])),
    {"Params": ["x", 1]},
    *({"Params": value} for value in (["a\0b"], ["x", "\0"])),
    *({"Params": ["x"], "Runtime": value} for value in ("60", 1.5, -1, True, [], {}, 10 * 365 * 86400 + 1, 1 << 64)),
    *({"Params": ["x"], "Runtime": value} for value in (60.0, 10**400, -(10**400))),
    *({"Params": ["x"], "Ncpus": value} for value in (0, -1, "2", 1.5)),
    *({"Params": ["x"], "Priority": value} for value in (1024, -1025, "high", 10**400)),
    *({"Params": ["x"], key: value} for key in ("Memory", "CpuTime", "Retries") for value in (-1, "4gb", 1.5, 10**400)),
    *({"Params": ["x"], "Env": value} for value in (["A=1"], {"A": 1}, {"": "x"}, {"A=B": "x"}, {"A": "\0"}, "A=1")),
    *({"Params": ["x"], "Requires": value} for value in ("linux", [1], [None], {}, ["a\0"])),
    *({"Params": ["x"], key: value} for key in ("Name", "WorkDir", "StdOut", "Owner") for value in (5, [], "\0")),
    *({"Params": ["x"], "Queue": value} for value in ("", 5)),
    *({"Params": ["x"], key: value} for key in ("Hold", "Rerunable") for value in ("yes", 1)),
    *({"Params": ["x"], "StartAfter": value} for value in ("tomorrow", 5, "2199-13-01T00:00:00Z", "2199-01-01T00:00")),
    *({"Params": ["x"], "StartAfter": value} for value in ("9999-12-31T23:59:59-23:59", "0001-01-01T00:00:00+23:59")),
]


@pytest.mark.parametrize("job", BAD_JOBS, ids=lambda job: repr(job)[:70])
def test_a_job_that_makes_no_sense_is_400_in_every_form_and_nothing_is_added(shared, job):
    before = picture(shared)
    assert_refused(post(shared, "/add", job), 400)
    assert_refused(post(shared, "/add", [{"Params": ["good"]}, job]), 400)
    assert_refused(shared.get("/add", configuration=json.dumps(job)), 400)
    assert picture(shared) == before


@pytest.mark.parametrize("query", ["", "?configuration=", "?configuration", "?x=1", "?Configuration=%7B%7D"])
def test_a_get_without_configuration_is_400(shared, query):
    for path in ("/add", "/finish", "/timeout", "/dead", "/usage"):
        assert "configuration" in assert_refused(shared.get(path + query), 400)


BAD_POLLS = [
    *([], "text", 5, None, True),
    *({"Slots": value} for value in (-1, "2", 1.5, True, [], None, 10**400)),
    *({"Wait": value} for value in (-1, "30", True, [], None)),
    *({"Running": value} for value in ("x", {"ID": "x"}, [1], ["x"], [{}], [{"ID": 5}], [None])),
    *({"Node": value} for value in ("x", [1], 5, {"Client": "a\0b"})),
    *({"Hostname": value} for value in (5, ["h"], {"a": 1}, True, "a\0b", "x" * 256)),
    {"Node": {"Machine": "x" * 16384}},
    *({key: [1] * 100001} for key in ("Running", "Open", "Reports")),
    *({"Reports": value} for value in ("x", [1], [{}], [{"ID": UNKNOWN_ID}])),
]


@pytest.mark.parametrize("body", BAD_POLLS, ids=lambda body: repr(body)[:60])
def test_a_request_for_jobs_that_makes_no_sense_is_400_and_leaves_no_node(shared, body):
    before = picture(shared)
    assert_refused(post(shared, "/request", {"Hostname": "bad", **body} if isinstance(body, dict) else body), 400)
    assert picture(shared) == before


BAD_REPORTS = [
    *("text", 5, None, True, [[]], {}, {"ID": None}, {"ID": 5}, {"ID": UNKNOWN_ID}, {"ID": ""}, {"ID": "2"}),
    *({"ExitStatus": value} for value in ("0", 1.5, True, [])),
    *({"Status": value} for value in ("great", 5, "")),
    *({"Lease": value} for value in (5, [])),
    *({"Hostname": value} for value in (5, [], "a\0b")),
    *({"EndTime": value} for value in ("yesterday", 5, "2026-13-01T00:00:00Z", "9999-12-31T23:59:59-23:59")),
    *({"CpuTimeUsed": value} for value in ("1", [], True)),
    *({"MaxMem": value} for value in ("1", 1.5)),
    *({key: value} for key in ("StdOutTail", "StdErrTail", "Comment") for value in (5, ["x"])),
]


@pytest.mark.parametrize("body", BAD_REPORTS, ids=lambda body: repr(body)[:60])
def test_a_report_that_makes_no_sense_is_400_and_not_one_of_its_list_counts(shared, body):
    good = report(shared.running, ExitStatus=0, CPU=1, Mem=1)
    if isinstance(body, dict) and body and "ID" not in body:
        body = {**good, **body}
    before = picture(shared)
    for path in ("/finish", "/timeout", "/dead", "/usage"):
        assert_refused(post(shared, path, body), 400)
        assert_refused(post(shared, path, [good, body]), 400)
    assert picture(shared) == before


@pytest.mark.parametrize("path", ["/finish", "/timeout", "/dead", "/usage", "/stream"])
def test_too_many_reports_at_once_are_400_before_one_is_looked_at(shared, path):
    assert "100000 runs at most" in assert_refused(post(shared, path, [1] * 100001), 400)


@pytest.mark.parametrize(
    "more", [{}, {"CPU": 1}, {"Mem": 1}, {"CPU": 1.5, "Mem": 1}, {"CPU": "1", "Mem": 1}, {"CPU": True, "Mem": 1}]
)
def test_usage_without_whole_numbers_is_400(shared, more):
    before = picture(shared)
    assert_refused(shared.post("/usage", report(shared.running, **more)), 400)
    assert picture(shared) == before


@pytest.mark.parametrize("end_time", ["2001-01-01T00:00:00Z", "2199-01-01T00:00:00Z"])
def test_an_end_before_the_start_or_to_come_is_taken_as_the_nearest_that_can_be(lasting, end_time):
    """A client's clock may be wrong by years; its report counts all the same."""
    job = lease_one(lasting)
    assert lasting.post("/finish", report(job, ExitStatus=0, EndTime=end_time))[0] == 200
    record = lasting.job(job["ID"])
    assert record["Status"] == "finished"
    assert moment(record["StartTime"]) <= moment(record["EndTime"]) <= moment(record["StartTime"]) + timedelta(hours=1)


@pytest.mark.parametrize(
    "body", [[], {}, "1", 5, {"IDs": []}, {"IDs": "1"}, {"IDs": [1]}, {"IDs": [None]}, {"IDs": {"1": 1}}], ids=repr
)
def test_a_delete_that_names_no_jobs_is_400(shared, body):
    before = picture(shared)
    assert_refused(shared.post("/delete", body), 400)
    assert picture(shared) == before


@pytest.mark.parametrize("path", ["/", "/nope", "/add/", "/Add", "/dump/x", "//dump", "/%00", "/../etc", "/\xe4"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_an_unknown_url_is_404_and_says_which_there_are(shared, path, method):
    with Wire(shared) as wire:
        wire.send(f"{method} {path} HTTP/1.1\r\nContent-Length: 2\r\n\r\n{{}}".encode("latin-1"))
        answer = wire.answer()
        assert "/dump" in assert_refused((answer.status, answer.json), 404)
        assert wire.go("/status").status == 200


@pytest.mark.parametrize("path", sorted(server_module.ROUTES))
def test_a_wrong_method_is_405_and_names_the_right_ones(shared, path):
    route, before = server_module.ROUTES[path], picture(shared)
    right = [name for name, function in (("GET", route.get), ("POST", route.post)) if function]
    with Wire(shared) as wire:
        for method in sorted({"GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "get", "BREW"} - set(right)):
            wire.send(b"%b %b HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}" % (method.encode(), path.encode()))
            answer = wire.answer()
            assert method in assert_refused((answer.status, answer.json), 405)
            assert re.split(r", ?", answer.headers["allow"]) == right
    assert picture(shared) == before


@pytest.mark.parametrize("path", ["/dump", "/status", "/nope"])
def test_the_answer_to_head_has_no_body_so_that_the_connection_can_go_on(shared, path):
    with Wire(shared) as wire:
        wire.send(b"HEAD %b HTTP/1.1\r\n\r\n" % path.encode())
        head = iter(wire.file.readline, b"\r\n")
        assert next(head).startswith(b"HTTP/1.1 ")
        assert all(b":" in line for line in head)
        assert wire.go("/status").status == 200


@pytest.mark.parametrize("name", ["6", "0", "9" * 20, "1[1]", "-1", "nope", UNKNOWN_ID, UNKNOWN_ID[:5], "\0", "ä", "*"])
def test_an_unknown_job_is_404(shared, name):
    before = picture(shared)
    for path in ("/job", "/output"):
        assert name in assert_refused(shared.get(path, id=name), 404)
    assert_refused(shared.post("/delete", {"IDs": ["1", name]}), 404)
    assert picture(shared) == before


def test_an_ambiguous_beginning_of_an_id_is_404_and_an_unambiguous_one_is_the_job(lab):
    ids = ["aaaabbbb-0000-4000-8000-000000000001", "aaaacccc-0000-4000-8000-000000000002"]
    jobs = {job_id: {"ID": job_id, "Params": ["true"], "Runtime": 0} for job_id in ids}
    lab.write("jobs.json", json.dumps({"Available": jobs, "Leased": {}, "Finished": {}}))
    server = lab.server()
    for name in ("aaaa", "AAAA"):
        assert name in assert_refused(server.get("/job", id=name), 404)
        assert_refused(server.post("/delete", {"IDs": [name]}), 404)
    assert [server.job(name)["ID"] for name in ("aaaab", "AAAAC", *ids, ids[0].upper())] == [*ids, *ids, ids[0]]
    assert server.status()["States"]["Q"] == 2


def test_a_state_that_does_not_allow_it_is_409_saying_what_it_is_and_what_it_would_have_to_be(shared):
    before = picture(shared)
    for names in (["4"], ["1", "4"], [shared.job(4)["ID"]]):
        sentence = assert_refused(shared.post("/delete", {"IDs": names}), 409)
        assert "job 4" in sentence and "finished" in sentence and "queued" in sentence and "held" in sentence
    assert picture(shared) == before


# ---------------------------------------------------------------------------------------------------------------------
# Clients that hang up
# ---------------------------------------------------------------------------------------------------------------------

_JOB = b'{"Params":["true"]}'
WHOLE = {
    "GET add": b"GET /add?configuration=%b HTTP/1.1\r\nHost: x\r\n\r\n" % urllib.parse.quote(_JOB).encode(),
    "POST add": b"POST /add HTTP/1.1\r\nHost: x\r\nContent-Length: 19\r\n\r\n" + _JOB,
    "GET request": b"GET /request?hostname=h1 HTTP/1.1\r\nHost: x\r\n\r\n",
    "POST request": b'POST /request HTTP/1.1\r\nHost: x\r\nContent-Length: 27\r\n\r\n{"Hostname":"h1","Slots":1}',
}


@pytest.mark.parametrize("whole", WHOLE.values(), ids=list(WHOLE))
def test_a_client_that_hangs_up_within_a_request_leaves_no_trace(server, whole):
    """Cut at every byte; what comes before the cut may hold a whole request line, whole headers, or half a body."""
    server.add(["true"])
    before = picture(server)
    for cut in range(len(whole)):
        with Wire(server) as wire:
            wire.send(whole[:cut]).socket.shutdown(1)
            assert not wire.file.read().startswith(b"HTTP/1.1 200"), whole[:cut]
        if cut % 5 == 0:
            Wire(server).send(whole[:cut]).hang_up(rudely=True)
    assert picture(server) == before
    threads = f"/proc/{server.process.pid}/task"
    if os.path.isdir(threads):
        until(lambda: len(os.listdir(threads)) < 10, "the connections' threads to end")
    with Wire(server) as wire:
        assert wire.send(whole).answer().status == 200
    assert picture(server) != before


@pytest.mark.parametrize("rudely", [False, True], ids=["closed", "reset"])
def test_no_job_is_leased_to_a_client_that_hung_up_while_it_waited(lab, server, rudely):
    held_open(server, "h1", client="c1").hang_up(rudely)
    server.add(["true"])
    (job,) = poll(server, "h2", wait=60)["Jobs"]
    assert (job["Host"], job["RunCount"]) == ("h2", 1)
    assert "Traceback" not in lab.log("server.py.log")


@pytest.mark.parametrize("rudely", [False, True], ids=["closed", "reset"])
def test_a_client_that_hung_up_while_it_waited_does_not_keep_a_job_from_another_that_waits(server, rudely):
    """The job is not to lie there until the other one's wait is over."""
    held_open(server, "h1", client="c1").hang_up(rudely)
    with held_open(server, "h2", client="c2", wait=50) as wire:
        server.add(["true"])
        wire.socket.settimeout(10)
        (job,) = wire.answer().json["Jobs"]
    assert job["Host"] == "h2"


def test_hanging_up_while_waiting_for_a_jobs_end_harms_nobody(lasting):
    job = lease_one(lasting)
    for rudely in (True, False):
        Wire(lasting).send(b"GET /job?id=%d&wait=60 HTTP/1.1\r\n\r\n" % job["Number"]).hang_up(rudely)
    assert lasting.post("/finish", report(job, ExitStatus=0))[0] == 200
    assert lasting.get("/job", id=job["ID"], wait=60)[1]["Status"] == "finished"


# ---------------------------------------------------------------------------------------------------------------------
# Listings
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "query, numbers",
    [
        ("", [1, 2, 3, 4, 5]),
        ("state=Q", [1]),
        ("state=R", [2]),
        ("state=H", [3]),
        ("state=F", [4]),
        ("state=W", [5]),
        ("state=Q,F", [1, 4]),
        ("status=failed", [4]),
        ("status=finished", []),
        ("status=finished,failed", [4]),
        ("name=a", [2, 4]),
        ("name=q", [1]),  # the program's, where the job has none
        ("queue=big", [4]),
        ("queue=default", [1, 2, 3, 5]),
        ("host=keeper", [2, 4]),
        ("host=nobody", []),
        ("number=3", [3]),
        ("number=5,1,77", [1, 5]),
        ("name=a&state=F", [4]),
        ("name=a&state=Q", []),
    ],
)
def test_jobs_can_be_filtered(shared, query, numbers):
    status, answer = shared.get("/jobs" + ("?" + query if query else ""))
    assert status == 200 and answer["Total"] == len(numbers)
    assert [job["Number"] for job in answer["Jobs"]] == numbers


@pytest.mark.parametrize(
    "query, numbers",
    [("limit=2", [1, 2]), ("offset=2&limit=2", [3, 4]), ("offset=4&limit=9", [5]), ("offset=9", []), ("limit=0", [])],
)
def test_jobs_come_in_pages(shared, query, numbers):
    status, answer = shared.get("/jobs?" + query)
    assert status == 200 and answer["Total"] == 5
    assert [job["Number"] for job in answer["Jobs"]] == numbers


def test_only_the_fields_asked_for_are_sent(shared):
    answer = shared.get("/jobs", fields="Number,State,Status,Nonsense", number="1,4")[1]
    assert answer["Jobs"] == [{"Number": 1, "State": "Q"}, {"Number": 4, "State": "F", "Status": "failed"}]


@pytest.mark.parametrize(
    "query",
    ["state=X", "state=", "state=queued", "number=x", "number=-1", "number=", "limit=-1", "limit=x", "offset=.", "a=b"],
)
def test_a_filter_that_makes_no_sense_is_400_and_not_everything(shared, query):
    assert_refused(shared.get("/jobs?" + query), 400)


@pytest.mark.parametrize("path", ["/jobs", "/job?id=2", "/dump", "/nodes", "/status", "/output?id=2"])
def test_no_listing_gives_away_a_leases_secret(shared, path):
    assert shared.running["Lease"].encode() not in shared.fetch(path)[2]


def test_status_counts_by_state_and_status_and_says_what_runs_here(shared):
    status, answer = shared.get("/status")
    assert status == 200 and answer["Jobs"] == 5
    assert answer["States"] == {"Q": 1, "H": 1, "W": 1, "R": 1, "F": 1}
    assert {name: count for name, count in answer["Statuses"].items() if count} == {"failed": 1}
    assert set(answer["Statuses"]) == set(server_module.STATUSES)
    assert answer["Rates"] == {"LastMinute": 1, "LastHour": 1} or answer["Rates"] == {"LastMinute": 0, "LastHour": 1}
    assert answer["Version"] == server_module.VERSION and answer["Uptime"] >= 0 and moment(answer["StartTime"])


def test_nodes_lists_each_client_with_its_slots_and_jobs(server):
    server.add(["1"], ["2"], ["3"])
    for host, slots, properties in (("busy", 2, ["gpu"]), ("free", 4, [])):
        node = {"Slots": slots, "Properties": properties, "System": "CP/M"}
        assert server.post("/request", {"Hostname": host, "Slots": 2, "Node": node})[0] == 200
    with Wire(server) as wire:
        assert wire.go("/request?hostname=old").status == 204
    status, answer = server.get("/nodes")
    busy, free, old = answer["Nodes"]
    assert status == 200 and [node["Host"] for node in (busy, free, old)] == ["busy", "free", "old"]
    assert (busy["State"], busy["Slots"], busy["Running"], busy["Jobs"]) == ("job-busy", 2, 2, ["1", "2"])
    assert (free["State"], free["Slots"], free["Running"], free["Jobs"]) == ("free", 4, 1, ["3"])
    assert (busy["Properties"], free["Properties"]) == (["gpu", "host=busy"], ["host=free"])
    assert busy["Info"]["System"] == "CP/M" and (busy["Original"], old["Original"]) == (False, True)
    assert moment(busy["LastSeen"])
    assert {"free": 2, "job-busy": 1, "down": 0}.items() <= server.status()["Nodes"].items()


@pytest.mark.parametrize("name", ["number", "id", "prefix"])
def test_job_with_wait_answers_when_the_job_is_over(lasting, name):
    job = lease_one(lasting)
    name = {"number": str(job["Number"]), "id": job["ID"], "prefix": job["ID"][:13]}[name]
    with Wire(lasting) as wire:
        wire.send(f"GET /job?id={name}&wait=60 HTTP/1.1\r\n\r\n".encode())
        assert wire.silent()
        lasting.post("/finish", report(job, ExitStatus=4))
        answer = wire.answer()
    assert (answer.status, answer.json["State"], answer.json["ExitStatus"]) == (200, "F", 4)


def test_job_with_wait_answers_what_the_job_is_when_the_time_is_over(shared):
    with Wire(shared) as wire:
        wire.send(b"GET /job?id=2&wait=1 HTTP/1.1\r\n\r\n")
        assert wire.silent(0.5)
        assert wire.answer().json["State"] == "R"
        assert wire.go("/job?id=4&wait=60").json["State"] == "F"


@pytest.mark.parametrize("query", ["", "?id=", "?wait=5", "?id=1&wait=x", "?id=1&wait=-1", "?id=1&wait="])
def test_job_without_a_name_or_with_no_number_to_wait_is_400(shared, query):
    assert_refused(shared.get("/job" + query), 400)


def test_many_threads_lease_and_report_and_no_job_is_run_twice(server):
    server.add(*([["true"]] * 300))
    seen, problems = [], []

    def work(host):
        try:
            while True:
                jobs = poll(server, host, slots=3)["Jobs"]
                if not jobs:
                    return
                seen.extend(job["Number"] for job in jobs)
                server.post("/finish", [report(job, ExitStatus=0) for job in jobs])
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(f"h{i}",)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems, problems
    assert sorted(seen) == list(range(1, 301))
    status = server.status()
    assert (status["States"]["F"], status["Statuses"]["finished"]) == (300, 300)


# ---------------------------------------------------------------------------------------------------------------------
# The document
# ---------------------------------------------------------------------------------------------------------------------


def test_the_protocol_document_has_a_heading_for_every_url_with_its_methods():
    with open(os.path.join(ROOT, "docs", "protocol.md"), encoding="utf-8") as file:
        headings = re.findall(r"^### +`?((?:(?:GET|POST) +)+)(/\w+)`? *$", file.read(), re.MULTILINE)
    documented = sorted((path, method) for methods, path in headings for method in methods.split())
    answered = [(path, method) for path, route in server_module.ROUTES.items() for method in route.methods.split(", ")]
    assert documented == sorted(answered)

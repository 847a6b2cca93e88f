"""Every verb in random order, against a model: the rules of docs/protocol.md once more, written to be read and not to
be fast, with lists and scans where server.py has heaps and counters.

A Course plays one course of steps on both, driving the routes in process on a clock of its own, and compares after each
step: what was answered, which jobs were given out in which order, and all jobs.  Now and then the server is stopped, or
dies, and is started again from its files; nobody must be able to tell.

By hand, until something fails or the steps are over:  python3 tests/test_model.py SEED STEPS [COURSES]
"""

import collections
import contextlib
import json
import logging
import os
import random
import shutil
import sys
import tempfile
import threading
import traceback

import pytest

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.environ.get("JOBRUNNER_UNDER_TEST") or os.path.dirname(HERE), HERE]

import server  # noqa: E402
from jobrunner import JobrunnerError, format_time  # noqa: E402

REQUEUE_AFTER, NODE_TIMEOUT, ORIGINAL_LEASE, MAX_STARTS = 3600, 300, 600, 20

# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------

JOB = {
    "State": "Q", "Runtime": 0, "Priority": 0, "Queue": "default", "Ncpus": 1, "Memory": 0, "Requires": [], "Env": {},
    "StartAfter": None, "Depend": [], "Hold": False, "Rerunable": True, "Retries": 0, "Retried": 0, "FailedOn": [],
    "RefusedBy": [], "RunCount": 0, "Host": "", "Lease": "", "Expiry": None, "Signal": "", "Status": "",
    "ExitStatus": None, "EndTime": None, "StartTime": None, "Name": "",
}  # fmt: skip
QUEUE = {"Priority": 0, "Enabled": True, "Started": True, "MaxRun": 0, "DefaultWalltime": 0, "MaxWalltime": 0}
ALLOWED = {"delete": "QHWR", "hold": "QHW", "release": "H", "rerun": "FR", "alter": "QHWR", "move": "QHW"}
ALTERABLE_RUNNING = {"Runtime", "Memory", "CpuTime", "Priority"}


class Refused(Exception):
    """The model refuses; `status` is what the server must answer."""

    def __init__(self, status):
        super().__init__(status)
        self.status = status


def _copies(things):
    return {key: dict(thing) for key, thing in things.items()}


class Model:
    """What docs/protocol.md says, on dictionaries that have the keys of the record.  Moments are whole seconds."""

    def __init__(self, now):
        self.now = now
        self.jobs = {}  # by what people type, in the order of Number and Index
        self.arrays = {}  # {Number: {"MaxRunSubjobs", "MaxFails"}}
        self.queues = {"default": dict(QUEUE)}
        self.nodes = {}  # by host and client
        self.inherited = {}  # {label: lease} of what ran when the server was started
        self.next = 1
        self.failing = set()  # arrays of which a subjob has just failed, or that may have fewer failures now

    def all_or_none(self, function, *words):
        """What the function returns, and 200; or None and the status of its refusal, nothing being changed."""
        kept = {**self.__dict__, **{name: _copies(self.__dict__[name]) for name in ("jobs", "queues", "arrays")}}
        try:
            result = function(*words)
        except Refused as refusal:
            self.__dict__.update(kept, failing=set())
            return refusal.status, None
        self.settle()
        return 200, result

    # -- names

    def subjobs(self, number):
        return [job for job in self.jobs.values() if job["Number"] == number and job["Index"] is not None]

    def named(self, name):
        """(jobs, whether the name is that of a group)."""
        number, bracket, index = name.partition("[")
        if name in self.jobs:
            return [self.jobs[name]], False
        subjobs = self.subjobs(int(number))
        if "-" in index:
            first, last = map(int, index.rstrip("]").split("-"))
            subjobs = [job for job in subjobs if first <= job["Index"] <= last]
        elif bracket and index != "]":
            subjobs = []
        if not subjobs:
            raise Refused(404)
        return subjobs, True

    # -- where a job that is to run has to wait, and what follows by itself

    def ready(self, job):
        """It was held, waiting or over, and may run now, if nothing else holds it; refusals are forgotten."""
        job["RefusedBy"] = []
        self.rest(job)

    def rest(self, job):
        waits = job["StartAfter"] is not None and job["StartAfter"] > self.now
        job["State"] = "H" if job["Hold"] or job["Depend"] else "W" if waits else "Q"

    def over(self, job, status, exit_status=None):
        job.update(State="F", Status=status, ExitStatus=exit_status, EndTime=self.now, Signal="")
        if self.has_failed(job):
            self.failing.add(job["Number"])

    @staticmethod
    def has_failed(job):
        """True if it failed by itself: neither deleted nor aborted with its array."""
        return job["State"] == "F" and job["Status"] not in ("finished", "deleted") and job["ExitStatus"] != -105

    def failures(self, number):
        return sum(map(self.has_failed, self.subjobs(number)))

    def settle(self):
        """Aborts and releases until nothing follows any more."""
        again = True
        while again:
            again = False
            failing, self.failing = self.failing, set()
            for number in failing & set(self.arrays):
                if 0 < self.arrays[number]["MaxFails"] <= self.failures(number):
                    for job in self.subjobs(number):
                        if job["State"] == "R" and job["Signal"] != "abort":
                            job["Signal"] = "abort"
                        elif job["State"] in "QHW":
                            self.over(job, "failed", -105)
                            again = True
            held = [job for job in self.jobs.values() if job["State"] == "H" and job["Depend"]]
            for job, verdicts in [(job, [self.verdict(text) for text in job["Depend"]]) for job in held]:
                left = [text for text, verdict in zip(job["Depend"], verdicts) if verdict is None]
                if False in verdicts:
                    self.over(job, "failed", -104)
                    again = True
                elif left != job["Depend"]:
                    job["Depend"] = left
                    if not left and not job["Hold"]:
                        self.ready(job)

    def verdict(self, text):
        kind, name = text.split(":")
        jobs, _ = self.named(name)
        over = all(job["State"] == "F" for job in jobs)
        good = [job["State"] == "F" and job["Status"] == "finished" for job in jobs]
        started = [job["RunCount"] > 0 for job in jobs]
        if kind == "after":
            return True if all(started) else False if over else None
        if kind == "afterok":
            bad = any(job["State"] == "F" and job["Status"] != "finished" for job in jobs)
            return False if bad else True if all(good) else None
        if not over:
            return None
        return any(started) and (kind == "afterany" or not all(good))

    # -- submission, queues

    def add(self, records):
        for record in records:
            queue = self.queues.get(record.get("Queue", "default"))
            if queue is None or not queue["Enabled"]:
                raise Refused(400)
            self.walltime(queue, dict(JOB, **record))
            self.targets(record.get("Depend", []))
        for record in records:
            indices = record.get("Array")
            template = {
                **JOB,
                **{key: value for key, value in record.items() if key in JOB},
                "Number": self.next,
                "Earlier": [],
            }
            template["Runtime"] = self.walltime(self.queues[template["Queue"]], template)
            template["Depend"] = self.targets(template["Depend"])
            if indices:
                self.arrays[self.next] = {key: record.get(key, 0) for key in ("MaxRunSubjobs", "MaxFails")}
            first, last, step = indices or (None, None, 1)
            for index in range(first, last + 1, step) if indices else [None]:
                job = {**template, "Index": index}
                job["Label"] = f"{self.next}" if index is None else f"{self.next}[{index}]"
                self.rest(job)
                self.jobs[job["Label"]] = job
            self.next += 1
        return list(range(self.next - len(records), self.next))

    @staticmethod
    def walltime(queue, job):
        runtime = job["Runtime"] or queue["DefaultWalltime"] or queue["MaxWalltime"]
        if queue["MaxWalltime"] and runtime > queue["MaxWalltime"]:
            raise Refused(400)
        return runtime

    def targets(self, depend):
        """Each dependency once, by itself, its target as a Number."""
        found = []
        for text in depend:
            kind, *names = text.split(":")
            for name in names:
                try:
                    jobs, group = self.named(name)
                except Refused:
                    raise Refused(400) from None
                found.append(f"{kind}:{jobs[0]['Number']}[]" if group else f"{kind}:{jobs[0]['Label']}")
        return list(dict.fromkeys(found))

    def queue(self, name, action, wish):
        if action == "create":
            if name in self.queues:
                raise Refused(409)
            self.queues[name] = dict(QUEUE, **wish)
        elif name not in self.queues:
            raise Refused(400)
        elif action == "set":
            self.queues[name].update(wish)
        else:
            if name == "default" or any(j["Queue"] == name and j["State"] != "F" for j in self.jobs.values()):
                raise Refused(409)
            del self.queues[name]

    # -- clients

    def fits(self, job, node, slots):
        plain = job["Ncpus"] == 1 and not (job["Requires"] or job["Env"] or job["Memory"])
        return (
            job["Ncpus"] <= slots
            and (plain or not node["Original"])
            and node["Host"] not in job["RefusedBy"]
            and (node["Queues"] is None or job["Queue"] in node["Queues"])
            and set(job["Requires"]) <= set(node["Properties"]) | {f"host={node['Host']}"}
        )

    def running(self, key, value):
        return sum(job["State"] == "R" and job[key] == value for job in self.jobs.values())

    def kept_back(self, job):
        """True if a limit keeps the job from running."""
        queue = self.queues[job["Queue"]]
        limit = self.arrays[job["Number"]]["MaxRunSubjobs"] if job["Index"] is not None else 0
        return (
            not queue["Started"]
            or (queue["MaxRun"] and self.running("Queue", job["Queue"]) >= queue["MaxRun"])
            or (limit and self.running("Number", job["Number"]) >= limit)
        )

    def others_first(self, job, node):
        """True if it failed here, and another client could run it."""
        others = [other for other in self.nodes.values() if not other["Down"] and other["Host"] not in job["FailedOn"]]
        return node["Host"] in job["FailedOn"] and any(self.fits(job, o, max(o["Slots"], 1)) for o in others)

    def place(self, job):
        return -self.queues[job["Queue"]]["Priority"], -job["Priority"], job["Number"], job["Index"] or 0

    def lease(self, node, slots):
        """The jobs given to a client, in order."""
        given = []
        while slots > 0:
            can = [job for job in self.jobs.values() if job["State"] == "Q" and self.fits(job, node, slots)]
            can = [job for job in can if not self.kept_back(job) and not self.others_first(job, node)]
            if not can:
                break
            job = min(can, key=self.place)
            ends = self.now + (job["Runtime"] + ORIGINAL_LEASE if node["Original"] else REQUEUE_AFTER)
            if job["Lease"]:  # its client was given up as lost, and may come back
                job["Earlier"] = (job["Earlier"] + [(job["Lease"], job["StartTime"])])[-8:]
            job.update(State="R", Host=node["Host"], StartTime=self.now, Expiry=ends, RunCount=job["RunCount"] + 1)
            job["Client"] = node["Client"]
            job.update(Lease="", Reported=False, LeaseEnded=False)  # `told` gives our clients' jobs a lease
            slots -= job["Ncpus"]
            given.append(job)
        return given

    def node(self, host, client, original):
        new = {"Host": host, "Client": client, "Settled": False, "Original": original, "Queues": None, "Properties": [], "Slots": 0, "Session": None,
               "Latest": 0, "Handed": {}, "Seconds": {}}  # fmt: skip
        node = self.nodes.setdefault((host, client), new)
        node.update(Down=False, Seen=self.now)
        return node

    def original(self, host):
        return self.lease(self.node(host, "", True), 1)

    def poll(self, request):
        """(jobs given out, {ID: signal}, those that may be told to end or not) of a POST /request."""
        info = request["Node"]
        self.check(request["Reports"])
        node = self.node(request["Hostname"], info["Client"], False)
        node.update({key: info[key] for key in ("Slots", "Properties", "Queues")})
        new_session = info["Session"] != node["Session"]
        if new_session:
            node.update(Session=info["Session"], Latest=0)
        slots, signals, may = request["Slots"], {}, set()
        overtaken = request["Poll"] < node["Latest"]  # then it says nothing
        if not overtaken:
            node["Latest"] = request["Poll"]
            self.claim(node, request)
        for report in request["Reports"]:
            self.take(report, "finish")
        self.settle()
        if new_session:
            self.forget_refusals(node)
        if overtaken:
            slots = 0
        else:
            node.update(Seconds={}, NamedAt=self.now)
            for named in request["Running"]:
                self.renew(node, named, signals, may)
            slots -= self.lost_answers(node, request)
        self.settle()
        given = self.lease(node, slots)
        self.settle()
        for named in request["Running"]:
            job = self.jobs[named["Label"]]
            if job["State"] == "R" and job["Lease"] == named["Lease"]:
                if job["Signal"]:
                    signals[job["Label"]] = "delete"
                elif named["Limits"] != [job["Runtime"], job["Memory"], 0]:
                    signals[job["Label"]] = "alter"
        for named in request["Running"]:
            if named["Signal"] == signals.get(named["Label"]) == "delete":
                del signals[named["Label"]]  # it knows
        return given, signals, may

    def forget_refusals(self, node):
        """A client that was started anew is offered again what it has refused."""
        for job in self.jobs.values():
            others = [host for host in job["RefusedBy"] if host != node["Host"]]
            if job["State"] == "Q":
                job["RefusedBy"] = others
            elif job["State"] == "H" and job["RefusedBy"] and not job["Hold"] and not job["Depend"]:
                if self.fits(dict(job, RefusedBy=others), node, max(node["Slots"], 1)):
                    job["RefusedBy"] = others
                    self.rest(job)

    def claim(self, node, request):
        """Runs that were given up, and whose jobs were leased again since: the longer one wins."""
        over = {(r["Label"], r["Lease"]) for r in request["Reports"]
                if r.get("Status") not in ("released", "refused", "deleted")}  # fmt: skip
        for named in request["Running"]:
            job = self.jobs[named["Label"]]
            starts = [start for lease, start in job["Earlier"] if lease == named["Lease"]]
            told = named["Signal"] == "delete" and (named["Label"], named["Lease"]) not in over
            if not starts or job["Signal"] or told or named.get("Seconds", self.now - starts[0]) <= self.has_run(job):
                continue
            left = [(lease, start) for lease, start in job["Earlier"] if lease != named["Lease"]]
            job.update(State="R", Host=node["Host"], Client=node["Client"], Lease=named["Lease"], StartTime=starts[0], Earlier=left, Status="",
                       ExitStatus=None, EndTime=None, LeaseEnded=False, Expiry=self.now + REQUEUE_AFTER)  # fmt: skip

    def has_run(self, job):
        if job["State"] != "R":
            return float("inf") if job["State"] == "F" and job["Status"] != "lost" else -1
        for node in self.nodes.values():
            if node["Host"] == job["Host"] and (job["Label"], job["Lease"]) in node["Seconds"]:
                return node["Seconds"][job["Label"], job["Lease"]] + self.now - node["NamedAt"]
        return self.now - job["StartTime"]

    def told(self, request, leases):
        """The server's answer has told the leases: {label: lease}."""
        node = self.nodes[request["Hostname"], request["Node"]["Client"]]
        for label, lease in leases.items():
            self.jobs[label]["Lease"] = lease
            node["Handed"].setdefault(request["Poll"], {})[label] = lease

    @staticmethod
    def resumes(job, host, client=None):
        """Whether the job's latest run goes on: it is running, or was given up with its lease; then it is again."""
        if job["State"] in "QHW" and job["Lease"]:
            job.update(State="R", Host=host, Client=client)
        elif job["State"] == "F" and job["Status"] == "lost" and job.get("LeaseEnded"):
            job.update(State="R", Status="", ExitStatus=None, EndTime=None, LeaseEnded=False, Client=client)
        return job["State"] == "R"

    def renew(self, node, named, signals, may):
        job = self.jobs[named["Label"]]
        if job["Lease"] != named["Lease"]:
            signals[job["Label"]] = "delete"
        elif job["State"] == "R" or self.resumes(job, node["Host"], node["Client"]):
            job["Expiry"] = self.now + REQUEUE_AFTER
            if "Seconds" in named:
                node["Seconds"][job["Label"], job["Lease"]] = named["Seconds"]
        elif job.get("Reported"):
            may.add(job["Label"])  # the acknowledgement is on its way
        else:
            signals[job["Label"]] = "delete"

    def lost_answers(self, node, request):
        """Queues again what never arrived; the slots of what may still."""
        named, taken = [named["Label"] for named in request["Running"]], 0
        for number, leases in list(node["Handed"].items()):
            for job in [self.jobs[label] for label, lease in leases.items() if self.jobs[label]["Lease"] == lease]:
                if job["Label"] in named or job["State"] != "R":
                    continue
                if number in request["Open"]:
                    taken += job["Ncpus"]
                else:
                    self.requeue(job, lease=job["Lease"])
            if number not in request["Open"]:
                del node["Handed"][number]
        if not node["Settled"] and not request["Open"]:  # what was on its way when the server was killed
            node["Settled"] = True
            for job in self.jobs.values():
                mine = job["State"] == "R" and (job["Host"], job["Client"]) == (node["Host"], node["Client"])
                if mine and job["Lease"] == self.inherited.get(job["Label"]) and job["Label"] not in named:
                    self.requeue(job, lease=job["Lease"])
        return taken

    def check(self, reports):
        for report in reports:
            if report["Label"] not in self.jobs or report.get("Status") == "nonsense":
                raise Refused(400)

    def report(self, reports, kind):
        self.check(reports)
        return [self.take(report, kind) for report in reports]

    def take(self, report, kind):
        """True if the report is stale."""
        job, lease = self.jobs[report["Label"]], report.get("Lease") or ""
        current = job["Lease"] == lease if lease or job["Lease"] else job["Host"] == report["Hostname"]
        if current and self.resumes(job, report["Hostname"]):
            self.end(job, report, kind)
            job["Reported"] = True
        return not current

    def end(self, job, report, kind):
        status, exit_status = report.get("Status"), report.get("ExitStatus")
        if kind == "finish" and status in ("timeout", "dead"):
            kind = status
        if status == "refused" and job["Signal"] not in ("delete", "abort"):
            job.update(RefusedBy=job["RefusedBy"] + [job["Host"]], RunCount=job["RunCount"] - 1, StartTime=None)
            self.requeue(job, started=False)
            return self.hold_if_refused_by_all(job)
        if status in ("released", "refused"):
            if status == "released" and not job["Rerunable"] and exit_status != -8 and not job["Signal"]:
                return self.over(job, "lost", -103)
            return self.requeue(job)
        if exit_status is None:
            exit_status = {"timeout": -11, "dead": -101}.get(kind)
        status = kind if kind != "finish" else status or ("failed" if exit_status else "finished")
        if job["Signal"] == "rerun":
            return self.requeue(job, started=False)
        if job["Signal"] == "abort":
            status, exit_status = "failed", -105
        elif status in ("failed", "dead") and job["Retried"] < job["Retries"] and not job["Signal"]:
            job.update(StartAfter=self.now + min(30 * 2 ** job["Retried"], 3600), Retried=job["Retried"] + 1)
            job["FailedOn"] = list(dict.fromkeys(job["FailedOn"] + [job["Host"]]))
            return self.requeue(job, started=False)
        self.over(job, status, exit_status)
        job["Earlier"] = []

    def hold_if_refused_by_all(self, job):
        able = [node for node in self.nodes.values() if not node["Down"]
                and self.fits(dict(job, RefusedBy=[]), node, max(node["Slots"], 1))]  # fmt: skip
        if job["State"] == "Q" and all(node["Host"] in job["RefusedBy"] for node in able):
            job["State"] = "H"

    def requeue(self, job, started=True, lease=""):
        """started: it counts as a start without an end."""
        if job["Signal"] in ("delete", "abort"):
            return self.expire(job)
        if job["Signal"] == "rerun":
            lease, job["Earlier"] = "", []
        job.update(Lease=lease, Host="", Expiry=None, Signal="")
        job["Hold"] = job["Hold"] or (started and job["RunCount"] % MAX_STARTS == 0 and job["RunCount"] > 0)
        self.rest(job)

    def expire(self, job):
        if job["Signal"] == "abort":
            self.over(job, "failed", -105)
        elif job["Signal"] == "delete":
            self.over(job, "deleted")
        elif not job["Rerunable"]:
            self.over(job, "lost", -103)
            job["LeaseEnded"] = True
        else:
            self.requeue(job, lease=job["Lease"])

    def tick(self, seconds):
        self.now += seconds
        for job in self.jobs.values():
            if job["State"] == "W" and job["StartAfter"] <= self.now:
                self.ready(job)
            elif job["State"] == "R" and job["Expiry"] <= self.now:
                self.expire(job)
        self.settle()
        for node in self.nodes.values():
            node["Down"] = self.now - node["Seen"] > NODE_TIMEOUT

    def restart(self):
        self.nodes = {}
        self.inherited = {}
        for job in self.jobs.values():
            if job["State"] == "R" and job["Lease"]:
                job["Expiry"] = self.now + REQUEUE_AFTER
                self.inherited[job["Label"]] = job["Lease"]

    # -- people

    def change(self, verb, wish):
        """The labels of the jobs that were changed.  A group stands for those of its jobs that can be."""
        if "Number" in wish.get("Set", {}):
            raise Refused(400)  # the server's alone
        limits = {key: value for key, value in wish.get("Set", {}).items() if key in ("MaxRunSubjobs", "MaxFails")}
        if limits:
            self.limit(limits, wish)
            if len(limits) == len(wish["Set"]):
                return set()
        changed = {}
        for name in wish.get("IDs", []):
            changed.update(self.changed(verb, wish, *self.named(name)))
        if "Select" in wish:
            tests = wish["Select"].items()
            jobs = [job for job in self.jobs.values() if all(job[key] in text.split(",") for key, text in tests)]
            changed.update(self.changed(verb, wish, jobs, True))
        self.jobs.update({label: changed.get(label, job) for label, job in self.jobs.items()})
        return set(changed)

    def limit(self, limits, wish):
        """Of whole arrays only."""
        named = [(self.named(name), name) for name in wish.get("IDs", [])]
        if not named or "Select" in wish or any(not is_group or "-" in name for (_, is_group), name in named):
            raise Refused(400)
        for (jobs, _), _ in named:
            self.arrays[jobs[0]["Number"]].update(limits)
            self.failing.add(jobs[0]["Number"])

    def changed(self, verb, wish, jobs, is_group):
        """{label: what a verb makes of the job}, of those jobs that it does not refuse; refused if it refuses all."""
        changed = {}
        if not jobs:
            raise Refused(404)
        for job in jobs:
            after = dict(job)
            try:
                getattr(self, verb)(after, wish)
                changed[job["Label"]] = after
            except Refused as refusal:
                if refusal.status != 409 or not is_group:
                    raise
        if not changed:
            raise Refused(409)
        return changed

    @staticmethod
    def need(verb, job):
        if job["State"] not in ALLOWED[verb]:
            raise Refused(409)

    def delete(self, job, wish):
        self.need("delete", job)
        if job["State"] == "R" and not wish.get("Force"):
            job["Signal"] = "delete"
        else:
            self.over(job, "deleted")

    def hold(self, job, wish):
        self.need("hold", job)
        job["Hold"] = True
        self.rest(job)

    def release(self, job, wish):
        self.need("release", job)
        job["Hold"] = False
        self.ready(job)

    def rerun(self, job, wish):
        if job["State"] == "F" and job["Queue"] not in self.queues:
            raise Refused(409)
        self.need("rerun", job)
        if job["State"] == "R":
            if not job["Rerunable"] or not job["Lease"]:
                raise Refused(409)
            job["Signal"] = "rerun"
        else:
            job.update(Status="", ExitStatus=None, EndTime=None, Retried=0, FailedOn=[], Lease="", Host="", Expiry=None)
            job.update(Reported=False, LeaseEnded=False, Earlier=[])
            self.ready(job)

    def move(self, job, wish):
        queue = self.queues.get(wish["Queue"])
        if queue is None:
            raise Refused(400)
        if not queue["Enabled"]:
            raise Refused(409)
        self.need("move", job)
        job.update(Queue=wish["Queue"], Runtime=self.walltime(queue, job))

    def alter(self, job, wish):
        changes = {key: value for key, value in wish["Set"].items() if key in JOB}
        if job["State"] == "R" and not set(changes) <= ALTERABLE_RUNNING:
            raise Refused(409)
        if changes.get("Depend"):
            changes["Depend"] = self.targets(changes["Depend"])
            if self.waits_for(changes["Depend"], job["Label"], []):
                raise Refused(400)
        self.need("alter", job)
        job.update(changes)
        if "Runtime" in changes:
            job["Runtime"] = self.walltime(self.queues[job["Queue"]], job)
        if job["State"] == "Q":
            self.rest(job)
        elif job["State"] in "HW" and {"Hold", "Depend", "StartAfter"} & set(changes):
            self.ready(job)

    def waits_for(self, depend, label, seen):
        """True if one of these targets is that job, or waits for it in turn."""
        for text in depend:
            for job in self.named(text.split(":")[1])[0]:
                if job["Label"] == label:
                    return True
                if job["Label"] not in seen and self.waits_for(job["Depend"], label, seen + [job["Label"]]):
                    return True
        return False


# ---------------------------------------------------------------------------------------------------------------------
# A course: random steps on both
# ---------------------------------------------------------------------------------------------------------------------

CLIENTS = ("a1", "a2", "b1", "c1")  # the first letter is the host's name
KINDS = ("after", "afterok", "afternotok", "afterany")
COMPARED = [key for key in JOB if key not in ("Env", "StartTime")]
COMPARED_OVER = [key for key in COMPARED if key not in ("Depend", "RefusedBy", "Expiry")]  # of no importance any more
TIMES = ("StartAfter", "Expiry", "EndTime")
ENDS = [
    {"ExitStatus": 0}, {"ExitStatus": 0}, {"ExitStatus": 0}, {"ExitStatus": 1}, {"ExitStatus": 1}, {"ExitStatus": 2},
    {}, {"Status": "timeout"}, {"Status": "dead"}, {"Status": "memory", "ExitStatus": -10}, {"Status": "released"},
    {"Status": "released", "ExitStatus": -8}, {"Status": "refused"}, {"Status": "lost", "ExitStatus": -103},
    {"Status": "nonsense"},
]  # fmt: skip


class Client:
    """A client of ours as the server sees it: what it runs, what it knows, which answers it has not got."""

    def __init__(self, host, name, chance):
        self.host, self.name, self.session, self.number = host, name, 1, 0
        self.slots = chance.choice([2, 2, 3, 8])
        self.properties = chance.choice([["linux"], ["linux", "java"], ["windows"]])
        self.queues = chance.choice([None, None, ["default", "long"], ["fast"]])
        self.runs = {}  # by label, what it says of it in Running
        self.open = []

    def info(self):
        return {"Client": self.name, "Session": self.session, "Slots": self.slots, "Properties": self.properties,
                "Queues": self.queues}  # fmt: skip


class Course:
    """One random course in a folder of its own."""

    def __init__(self, seed, folder):
        self.seed, self.folder, self.chance = seed, folder, random.Random(seed)
        self.model = Model(1700000000)
        self.clients = [Client(name[0], name, self.chance) for name in CLIENTS]
        self.past = []  # every run there ever was, as its report names it
        self.given = []  # what original clients run
        self.ids = {}
        self.log = []
        self.generation = 0
        self.start()

    # -- the server, in process

    def start(self):
        self.store = server.Store(os.path.join(self.folder, str(self.generation), "jobs.json"))
        self.queue = server.Queue(self.store, lambda: float(self.model.now), NODE_TIMEOUT, REQUEUE_AFTER)
        self.queue.load()

    def let_go(self):
        if not self.store.closed:
            os.close(self.store.journal)
            self.store.lock.release()
            self.store.closed = True

    def call(self, path, value=None, **query):
        """(status, answer) of a route; a value is posted."""
        route, body = server.ROUTES[path], b"" if value is None else json.dumps(value).encode()
        request = server.Request("", query, body, lambda: True, True, lambda: None)
        try:
            answer = (route.get if value is None else route.post)(self.queue, request)
            self.store.wait(answer.batch)
        except JobrunnerError as error:
            return error.status, str(error)
        text = answer.body if isinstance(answer.body, bytes) else b"".join(answer.body)
        return answer.status, json.loads(text) if text else None

    # -- steps

    def run(self, steps):
        os.makedirs(os.path.join(self.folder, "0"), exist_ok=True)
        try:
            for number in range(steps):
                self.step()
                self.compare()
                if number % 20 == 0:
                    self.check_counts()
        except Exception as error:
            steps = "\n".join(f"  {text}" for text in self.log[-25:])
            words = f"python3 tests/test_model.py {self.seed} {len(self.log)}: {error!r}"
            raise AssertionError(f"{words}\nthe last steps:\n{steps}") from error
        finally:
            self.let_go()

    def step(self):
        weights = {self.add: 12, self.tick: 12, self.poll: 34, self.report: 10, self.original: 6,
                   self.original_report: 5, self.people: 20, self.manage: 5, self.restart: 3, self.snapshot: 1}  # fmt: skip
        if len(self.model.jobs) > 120:
            del weights[self.add]
        self.chance.choices(list(weights), list(weights.values()))[0]()

    def note(self, *words):
        self.log.append(" ".join(str(word) for word in words))

    def both(self, path, value, function, *words):
        """The answers of both to a POST, which must be accepted or refused alike."""
        self.note(path, {key: value[key] for key in value} if isinstance(value, dict) else value)
        status, answer = self.call(path, value)
        expected, result = self.model.all_or_none(function, *words)
        self.log[-1] += f" -> {status}" + (f" {answer}" if status != 200 else "")
        assert status == expected, f"answered {status}, not {expected}: {answer}"
        return answer, result

    def add(self):
        records = [self.record() for _ in range(self.chance.choice([1, 1, 1, 2, 3]))]
        sent = [dict(record) for record in records]
        for record in sent:
            if "Array" in record:
                record["Array"] = "{}-{}:{}".format(*record["Array"])
            if "StartAfter" in record:
                record["StartAfter"] = format_time(record["StartAfter"])
        answer, numbers = self.both("/add", sent, self.model.add, records)
        if numbers:
            assert [entry["Number"] for entry in answer] == numbers
            for label in [label for label in self.model.jobs if label not in self.ids]:
                self.ids[label] = self.queue.find(label).id

    def record(self):
        pick, now = self.chance.choice, self.model.now
        record = {"Params": ["x", "{index}"], "Name": pick(["one", "two"])}
        may = {
            "Priority": [-5, 5, 1023], "Queue": ["long", "fast", "long", "fast", "nowhere"], "Ncpus": [2, 3],
            "Requires": [["windows"], ["java"], ["host=a"], ["linux", "java"]], "Env": [{"A": "1"}],
            "Memory": [1 << 30],
            "Runtime": [100, 5000], "StartAfter": [now - 50, now + 10, now + 300], "Hold": [True], "Rerunable": [False],
            "Retries": [1, 2, 25],
        }  # fmt: skip
        record.update({key: pick(values) for key, values in may.items() if self.chance.random() < 0.12})
        if self.chance.random() < 0.35:
            record["Depend"] = self.depend()
        if self.chance.random() < 0.3:
            first = pick([0, 1, 7])
            record.update(Array=(first, first + pick([0, 1, 2, 5]), pick([1, 1, 2])), MaxRunSubjobs=pick([0, 0, 1, 2]))
            record["MaxFails"] = pick([0, 0, 1, 2])
        return record

    def depend(self):
        names = [self.name(ranges=False) for _ in range(self.chance.choice([1, 1, 2]))]
        return [f"{self.chance.choice(KINDS)}:{name}" for name in names[:1]] + [
            self.chance.choice(KINDS) + ":" + ":".join(names[1:] * 2) for _ in names[1:]
        ]

    def name(self, ranges=True):
        """The name of a job or a group, mostly one of the latest."""
        labels, pick = list(self.model.jobs), self.chance.choice
        if not labels or self.chance.random() < 0.02:
            return "999"
        label = pick(labels[-15:]) if self.chance.random() < 0.5 else pick(labels)
        number, bracket, _ = label.partition("[")
        if not bracket:
            return label
        return pick([label, label, f"{number}[]", number] + [f"{number}[1-4]"] * ranges)

    def tick(self):
        seconds = self.chance.choice([1, 5, 31, 70, 200, 400, 1500, 3700])
        self.note("tick", seconds)
        self.model.tick(seconds)
        self.queue.tick()

    def poll(self):
        client, lose = self.chance.choice(self.clients), self.chance.random() < 0.1
        if self.chance.random() < 0.03:
            client.session, client.number, client.open = client.session + 1, 0, []
        client.number += 1
        reports = [self.end_of(run) for run in client.runs.values() if self.chance.random() < 0.2]
        for report in reports:
            if report.get("Status") == "nonsense":
                del report["Status"]
        running = [run for run in client.runs.values() if self.chance.random() < 0.97]
        if self.past and self.chance.random() < 0.1:
            old = self.chance.choice(self.past)
            if self.chance.random() < 0.5:
                old = dict(old, Seconds=self.chance.choice([0, 10, 100, 1000, 10000]))
            if old["Lease"] and all(run["Label"] != old["Label"] for run in running):
                running.append(dict(old, Signal="", Limits=[0, 0, 0]))
        request = {"Hostname": client.host, "Slots": self.chance.choice([0, 1, 2, client.slots]), "Running": running,
                   "Reports": reports, "Node": client.info(), "Poll": client.number, "Open": list(client.open)}  # fmt: skip
        if client.number > 1 and self.chance.random() < 0.02:
            request["Poll"] -= 1
        self.note("poll", client.name, "slots", request["Slots"], [f"{r['Label']}/{r['Lease'][:4]}" for r in running],
                  "ended", [(r["Label"], r.get("Status"), r.get("ExitStatus")) for r in reports],
                  "poll", request["Poll"], client.open, "" if not lose else "(answer lost)")  # fmt: skip
        status, answer = self.call("/request", request)
        expected, (given, signals, may) = self.model.all_or_none(self.model.poll, request)
        assert status == expected, f"answered {status}, not {expected}: {answer}"
        labels = [str(server.Job.from_record(record)) for record in answer["Jobs"]]
        self.log[-1] += f" -> {labels} {[(s['ID'][-4:], s['Signal']) for s in answer['Signals']]}"
        assert labels == [job["Label"] for job in given], f"given {labels}, not {[job['Label'] for job in given]}"
        self.model.told(request, {label: job["Lease"] for label, job in zip(labels, answer["Jobs"])})
        self.check_limits(labels)
        told = {next(r["Label"] for r in running if r["ID"] == s["ID"]): s["Signal"] for s in answer["Signals"]}
        sure = {label: told[label] for label in told if label not in may}
        assert sure.items() <= signals.items() and (not signals or told), f"signalled {told}, not {signals}"
        for report in reports:
            client.runs.pop(report["Label"], None)
        for label, record in zip(labels, answer["Jobs"]):
            run = {"ID": record["ID"], "Label": label, "Lease": record["Lease"], "Hostname": client.host}
            self.past.append(run)
            if not lose:
                limits = [record["Runtime"], record.get("Memory", 0), record.get("CpuTime", 0)]
                client.runs[label] = {**run, "Signal": "", "Limits": limits}
        if lose:
            client.open.append(client.number)
        client.open = [number for number in client.open if self.chance.random() < 0.7]
        for label, signal in told.items():
            if label in client.runs and signal == "delete":
                client.runs[label]["Signal"] = "delete"
            elif label in client.runs:
                job = self.model.jobs[label]
                client.runs[label]["Limits"] = [job["Runtime"], job["Memory"], 0]

    def end_of(self, run):
        """A report of a run."""
        end = dict(self.chance.choice(ENDS))
        if run.get("Signal") == "delete" and self.chance.random() < 0.8:
            end = {"Status": "deleted", "ExitStatus": 271}
        return {**{key: run[key] for key in ("ID", "Label", "Lease", "Hostname")}, **end}

    def report(self):
        """Some reports, of runs that may be long over, some of them twice."""
        if not self.past:
            return
        recent = self.past[-8:] if self.chance.random() < 0.7 else self.past
        reports = [self.end_of(self.chance.choice(recent)) for _ in range(self.chance.choice([1, 1, 2, 4]))]
        reports += self.chance.choice([[], [], reports[:1]])
        if self.chance.random() < 0.02:
            reports.append({"ID": "none", "Label": "none"})
        kind = self.chance.choice(["finish", "finish", "finish", "timeout", "dead"])
        answer, stale = self.both(f"/{kind}", reports, self.model.report, reports, kind)
        if stale:
            assert [bool(entry.get("Stale")) for entry in answer] == stale, f"{answer}, stale {stale}"
            for report in reports:
                for client in self.clients:
                    if client.runs.get(report["Label"], report)["Lease"] == report["Lease"]:
                        client.runs.pop(report["Label"], None)

    def original(self):
        host = self.chance.choice(["old", "a"])
        status, answer = self.call("/request", hostname=host)
        _, given = self.model.all_or_none(self.model.original, host)
        ids = [answer["ID"]] if answer else []
        self.note("GET /request", host, "->", [job["Label"] for job in given], ids)
        assert status == (200 if answer else 204) and ids == [self.ids[job["Label"]] for job in given]
        for job in given:
            self.given.append({"ID": ids[0], "Label": job["Label"], "Hostname": host})
            self.check_limits([job["Label"]])

    def original_report(self):
        if self.given:
            run, kind = self.chance.choice(self.given[-6:]), self.chance.choice(["finish", "finish", "timeout", "dead"])
            if self.chance.random() < 0.1:
                run = dict(run, Hostname="else", Label=self.name(ranges=False))
                run["ID"] = self.ids.get(run["Label"], "none")
            words = {"hostname": run["Hostname"], "configuration": json.dumps({"ID": run["ID"]})}
            status, answer = self.call(f"/{kind}", **words)
            expected, _ = self.model.all_or_none(self.model.report, [run], kind)
            self.note(f"GET /{kind}", run["Label"], run["Hostname"], "->", status)
            assert (status, answer) == (expected, None) or status == expected == 400

    def people(self):
        pick = self.chance.choice
        verb = pick(["delete", "hold", "release", "release", "rerun", "alter", "move"])
        wish = {"IDs": [self.name() for _ in range(pick([1, 1, 2, 3]))]}
        if self.chance.random() < 0.15:
            tests = {"State": ["Q", "H,W", "F", "R"], "Status": ["failed", "deleted,lost"], "Queue": ["long"],
                     "Host": ["a"], "Name": ["one"]}  # fmt: skip
            key = pick(list(tests))
            wish = {"Select": {key: pick(tests[key])}}
        if verb == "delete" and self.chance.random() < 0.3:
            wish["Force"] = True
        if verb == "move":
            wish["Queue"] = pick(["default", "long", "fast", "nowhere"])
        if verb == "alter":
            now = self.model.now
            may = {
                "Priority": [-9, 0, 9], "Runtime": [0, 100, 900, 5000], "Memory": [0, 1 << 20], "Ncpus": [1, 2],
                "Hold": [True, False], "Requires": [[], ["java"]], "StartAfter": [now - 1, now + 60, now + 500],
                "Rerunable": [True, False],
                "Retries": [0, 3], "Depend": [[]], "MaxRunSubjobs": [0, 1, 3], "MaxFails": [0, 1, 2], "Number": [3],
            }  # fmt: skip
            keys = self.chance.sample(list(may), pick([1, 1, 1, 2]))
            wish["Set"] = {key: pick(may[key]) for key in keys}
            if "Depend" in keys and self.chance.random() < 0.8:
                wish["Set"]["Depend"] = self.depend()
            if {"MaxRunSubjobs", "MaxFails"} & set(keys):
                wish["IDs"] = [name.partition("[")[0] + "[]" * ("[" in name) for name in wish.get("IDs", ["999"])]
        sent = json.loads(json.dumps(wish))
        if isinstance(sent.get("Set", {}).get("StartAfter"), int):
            sent["Set"]["StartAfter"] = format_time(sent["Set"]["StartAfter"])
        answer, labels = self.both(f"/{verb}", sent, self.model.change, verb, wish)
        if labels is not None:
            assert {job["Label"] for job in answer["Jobs"]} == labels, f"{answer['Jobs']}, not {labels}"

    def manage(self):
        name = self.chance.choice(["long", "long", "fast", "fast", "default"])
        action = self.chance.choice(["create", "create", "set", "set", "delete"])
        mostly = [True, True, False]
        may = {"Priority": [-3, 0, 7], "Enabled": mostly, "Started": mostly, "MaxRun": [0, 1, 2, 5],
               "DefaultWalltime": [0, 200], "MaxWalltime": [0, 0, 300, 4000]}  # fmt: skip
        wish = {key: self.chance.choice(values) for key, values in may.items() if self.chance.random() < 0.3}
        wish = wish if action != "delete" else {}
        self.both("/queue", {"Name": name, "Action": action, "Set": wish}, self.model.queue, name, action, wish)

    def snapshot(self):
        self.note("snapshot")
        assert self.queue.snapshot()

    def restart(self):
        """A start from the files alone: after a clean stop, or as a kill would have left them."""
        clean = self.chance.random() < 0.4
        self.note("restart", "after a clean stop" if clean else "after a kill")
        old, self.generation = os.path.join(self.folder, str(self.generation)), self.generation + 1
        if clean:
            self.queue.stop()
            left = sorted(os.listdir(old))
            assert left == ["jobs.json", "jobs.json.lock"], left
        shutil.copytree(old, os.path.join(self.folder, str(self.generation)))
        self.let_go()
        self.start()
        self.model.restart()

    # -- what must be so after each

    def compare(self):
        """All jobs are as in the model, in the same order."""
        jobs = {str(job): job for job in self.queue.picture()}
        assert list(jobs) == list(self.model.jobs), f"{list(jobs)}, not {list(self.model.jobs)}"
        for (label, job), expected in zip(jobs.items(), self.model.jobs.values()):
            record = job.to_record()
            for key in COMPARED if record["State"] != "F" else COMPARED_OVER:
                want = expected[key]
                want = format_time(want) if key in TIMES and want is not None else want
                there = record.get(key, JOB[key])
                assert there == want, f"job {label}: {key} is {there!r}, not {want!r}"

    def check_limits(self, labels):
        """Nothing was given out beyond what its queue or its array lets run."""
        running = [job for job in self.queue.picture() if job.state is server.State.RUNNING]
        for label in labels:
            queue = self.model.queues[self.model.jobs[label]["Queue"]]["MaxRun"]
            assert not queue or sum(job.queue == self.model.jobs[label]["Queue"] for job in running) <= queue
            number = self.model.jobs[label]["Number"]
            array = self.model.arrays.get(number, {"MaxRunSubjobs": 0})["MaxRunSubjobs"]
            assert not array or sum(job.number == number for job in running) <= array

    def check_counts_alone(self):
        """Every count equals a recount of /dump, and every job is in one bucket of it.  Returns the jobs of it."""
        dump, status = self.call("/dump")[1], self.call("/status")[1]
        jobs = [job for bucket in dump.values() for job in bucket.values()]
        assert len({job["ID"] for job in jobs}) == len(jobs) == status["Jobs"]
        assert status["States"] == {s: sum(job["State"] == s for job in jobs) for s in "QHWRF"}, status
        for name, count in status["Statuses"].items():
            assert count == sum(job.get("Status") == name for job in jobs), (name, status)
        for queue in self.call("/queues")[1]["Queues"]:
            mine = [job for job in jobs if job.get("Queue", "default") == queue["Name"]]
            assert queue["States"] == {s: sum(job["State"] == s for job in mine) for s in "QHWRF"}, queue
        return jobs

    def check_counts(self):
        """All that is counted, and what the model knows of queues and arrays."""
        jobs = self.check_counts_alone()
        assert len(jobs) == len(self.ids)
        queues = {queue["Name"]: {key: queue[key] for key in QUEUE} for queue in self.call("/queues")[1]["Queues"]}
        assert queues == self.model.queues
        for number, limits in self.model.arrays.items():
            array, mine = self.call("/job", id=f"{number}[]")[1], [job for job in jobs if job["Number"] == number]
            assert array["States"] == {s: sum(job["State"] == s for job in mine) for s in "QHWRF"}, array
            assert {key: array[key] for key in limits} == limits and array["Count"] == len(mine)
            statuses = collections.Counter(job["Status"] for job in mine if "Status" in job)
            assert {status: n for status, n in array["Statuses"].items() if n} == statuses
        for job in jobs:
            if job["State"] == "H" and job.get("Depend"):
                assert all(self.model.verdict(text) is None for text in job["Depend"]), job


@contextlib.contextmanager
def quick():
    """A disk that does not sync: a start here reads what was written, whether it has reached the disk or not."""
    real, level = os.fsync, logging.root.manager.disable
    os.fsync = lambda file: None
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        os.fsync = real
        logging.disable(level)


def play(seed, steps, folder):
    os.makedirs(os.path.join(folder, "0"))
    Course(seed, folder).run(steps)


@pytest.mark.parametrize("seed", range(20))
def test_every_verb_in_random_order_does_what_the_model_does(seed, tmp_path):
    with quick():
        play(seed, 300, str(tmp_path / "course"))


# ---------------------------------------------------------------------------------------------------------------------
# A disk that fails, with many at once
# ---------------------------------------------------------------------------------------------------------------------


class FailingStore(server.Store):
    """A store whose disk is full now and then, having written a part."""

    def __init__(self, path, seed):
        super().__init__(path)
        self.chance, self.often, self.failures = random.Random(seed), 0, 0

    def _append(self, data):
        if self.chance.random() < self.often:
            self.failures += 1
            if self.journal_bytes:
                os.write(self.journal, data[: self.chance.randrange(len(data))])
            raise OSError(28, "No space left on device")
        super()._append(data)


class Crowd(Course):
    """Threads that ask for whatever comes to their minds, of a server whose disk fails."""

    def start(self):
        os.makedirs(os.path.join(self.folder, str(self.generation)), exist_ok=True)
        self.store = FailingStore(os.path.join(self.folder, str(self.generation), "jobs.json"), self.seed)
        self.queue = server.Queue(self.store, lambda: float(self.model.now), NODE_TIMEOUT, 50)
        self.queue.load()
        self.acknowledged, self.errors = [], []

    def member(self, number, requests):
        chance, runs = random.Random(self.seed * 100 + number), []
        try:
            for poll in range(1, requests + 1):
                does = chance.choice([self.submits, self.changes] + 3 * [self.polls] + 2 * [self.ends])
                does(chance, number, runs, poll)
        except BaseException as error:  # a thread's own would be lost
            self.errors.append("".join(traceback.format_exception(type(error), error, error.__traceback__)))

    def submits(self, chance, number, runs, poll):
        array = {"Array": "1-4", "MaxFails": 1, "MaxRunSubjobs": 2}
        record = {"Params": ["x"], **chance.choice([{}, array, {"Retries": 1}])}
        record.update(chance.choice([{}, {"Queue": "long"}, {"Depend": [f"{chance.choice(KINDS)}:{self.some(chance)}"]},
                                     {"StartAfter": format_time(self.model.now + 20)}]))  # fmt: skip
        status, answer = self.call("/add", [record])
        self.acknowledged += [entry["Number"] for entry in answer] if status == 200 else []

    def some(self, chance):
        return str(max(1, self.queue.next_number - chance.randrange(15)))

    def polls(self, chance, number, runs, poll):
        named = [{"ID": job["ID"], "Lease": job["Lease"]} for job in runs]
        wish = {"Hostname": f"h{number % 2}", "Slots": chance.choice([0, 1, 3]), "Wait": chance.choice([0, 0.01]),
                "Running": named, "Poll": poll, "Node": {"Client": str(number), "Session": 1, "Slots": 3}}  # fmt: skip
        status, answer = self.call("/request", wish)
        runs += answer["Jobs"] if status == 200 else []

    def ends(self, chance, number, runs, poll):
        for job in runs[:2]:
            end = chance.choice([{"ExitStatus": 0}, {"ExitStatus": 1}, {"Status": "released"}])
            report = {"ID": job["ID"], "Lease": job["Lease"], "Hostname": f"h{number % 2}", **end}
            if self.call("/finish", [report])[0] == 200:
                runs.remove(job)

    def changes(self, chance, number, runs, poll):
        name, pick = self.some(chance), chance.choice
        action = pick(["create", "set", "delete"])
        self.call(*pick([
            ("/hold", {"IDs": [name]}), ("/release", {"IDs": [name]}), ("/delete", {"IDs": [name]}),
            ("/rerun", {"IDs": [name]}),
            ("/rerun", {"Select": {"Status": "failed"}}), ("/alter", {"IDs": [name], "Set": {"Priority": poll % 7}}),
            ("/alter", {"IDs": [name], "Set": {"MaxRunSubjobs": poll % 3, "MaxFails": poll % 2}}),
            ("/queue", {"Name": "long", "Action": action, "Set": {} if action == "delete" else {"MaxRun": poll % 3}}),
        ]))  # fmt: skip
        if number == 0:
            self.model.now += pick([0, 1, 3])
            with contextlib.suppress(JobrunnerError):
                self.queue.tick()
            if chance.random() < 0.1:
                self.queue.snapshot()

    def picture(self):
        """All that there is, but for the ends of leases, which are not written."""
        with self.queue.lock:
            queue = self.queue
            jobs = {job.id: {k: v for k, v in job.to_record().items() if k != "Expiry"} for job in queue.jobs.values()}
            arrays = [(a.spec.to_record(), a.states, {k: n for k, n in a.statuses.items() if n}, a.begun, a.aborted)
                      for _, a in sorted(queue.arrays.items())]  # fmt: skip
            awaited = {text: set(ids) for texts in queue.awaited.values() for text, ids in texts.items()}
            return jobs, arrays, awaited, queue.queues, dict(queue.counts)

    def lost(self):
        """Jobs that nothing would bring up any more: queued in no heap, or waiting for a time without an alarm."""
        queue, alarms = self.queue, {job_id for _, job_id in self.queue.alarms}
        for job in queue.jobs.values():
            if job.state is server.State.QUEUED and server._order(job) not in queue.ready.get(queue._need(job), []):
                yield job
            timed = job.state is server.State.WAITING or (job.state is server.State.RUNNING and job.expiry)
            if timed and job.id not in alarms:
                yield job


@pytest.mark.parametrize("seed", range(3))
def test_after_failures_of_the_disk_what_is_in_memory_is_what_a_start_reads(seed, tmp_path):
    with quick():
        crowd = Crowd(seed, str(tmp_path))
        crowd.store.often = 0.15
        threads = [threading.Thread(target=crowd.member, args=(number, 250)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not crowd.errors and not any(thread.is_alive() for thread in threads), crowd.errors
        assert crowd.store.failures > 20 and len(crowd.acknowledged) > 50
        crowd.store.often = 0
        crowd.store.wait(crowd.store.unwritten())
        crowd.check_counts_alone()
        before, acknowledged = crowd.picture(), crowd.acknowledged
        assert not [str(job) for job in crowd.lost()]
        crowd.let_go()
        crowd.start()
        after = crowd.picture()
        for what, there, here in zip(("jobs", "arrays", "awaited", "queues", "counts"), before, after):
            assert there == here, what
        for number in acknowledged:
            crowd.queue.find(str(number))
        crowd.let_go()


def test_an_array_with_a_limit_is_drained_in_order_and_never_over_it(tmp_path):
    with quick():
        crowd, runs, begun = Crowd(1, str(tmp_path)), {n: [] for n in range(4)}, []
        assert crowd.call("/add", {"Params": ["x"], "Array": "1-2000", "MaxRunSubjobs": 10})[0] == 200
        while len(begun) < 2000 or any(runs.values()):
            number = crowd.chance.randrange(4)
            over = [run for run in runs[number] if crowd.chance.random() < 0.5]
            runs[number] = [run for run in runs[number] if run not in over]
            wish = {"Hostname": f"h{number}", "Slots": 4, "Reports": [{**run, "ExitStatus": 0} for run in over]}
            for job in crowd.call("/request", wish)[1]["Jobs"]:
                runs[number].append({"ID": job["ID"], "Lease": job["Lease"], "Hostname": f"h{number}"})
                begun.append(job["Index"])
            running = crowd.call("/status")[1]["States"]["R"]
            assert running == sum(map(len, runs.values())) <= 10
        assert begun == list(range(1, 2001))
        crowd.let_go()


if __name__ == "__main__":
    first, length, courses = (int(word) for word in (sys.argv[1:] + ["1"])[:3])
    with quick():
        for number in range(first, first + courses):
            with tempfile.TemporaryDirectory() as place:
                play(number, length, os.path.join(place, "course"))
    print(f"{courses} courses of {length} steps: no difference")

"""The original's wire, spoken to our server: every table of ORIGINAL.md, byte for byte where bytes matter.

Covered: the client's exact requests and headers, the seven URLs' good and refused answers, the forms of times, texts
and keys, the lease's length, its db.json, and each thing that went wrong in the original's server.  `Wire` is one raw
connection; test_wire.py uses it too.
"""

import json
import re
import select
import socket
import struct
import threading
import urllib.parse
from datetime import datetime, timedelta, timezone
from typing import Dict, NamedTuple

import pytest
from harness import PATIENCE, Lab, until

REPORTS = ("/finish", "/timeout", "/dead", "/usage")
TIME = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.\d{1,9})?Z\Z")  # RFC 3339 in UTC, as Go reads it
UNKNOWN_ID = "81b82367-c5c4-439b-a290-b16b1a13781f"


class Answer(NamedTuple):
    """One HTTP answer as it came."""

    status: int
    headers: Dict[str, str]  # keys in lower case
    body: bytes
    version: str

    @property
    def json(self):
        return json.loads(self.body)


class Wire:
    """A raw connection to a server: bytes out, answers in."""

    def __init__(self, server):
        self.port = server.port
        self.socket = socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE)
        self.file = self.socket.makefile("rb")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()
        self.socket.close()

    def send(self, data):
        self.socket.sendall(data)
        return self

    def go(self, target, more=b""):
        """What Go's http.Client sends for a GET, to the letter; its answer."""
        host = b"Host: 127.0.0.1:%d\r\nUser-Agent: Go-http-client/1.1\r\n" % self.port
        self.send(b"GET %b HTTP/1.1\r\n%b%bAccept-Encoding: gzip\r\n\r\n" % (target.encode(), host, more))
        return self.answer()

    def post(self, path, body):
        """Sends a POST; see `answer`."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (path.encode(), len(data))
        return self.send(head + data)

    def answer(self):
        """The next answer, read as its headers say."""
        version, status = self.file.readline().decode().split(" ")[:2]
        headers = {}
        for line in iter(self.file.readline, b"\r\n"):
            assert line.endswith(b"\r\n"), line
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        return Answer(int(status), headers, self._body(int(status), headers), version)

    def _body(self, status, headers):
        if status in (100, 204):
            return b""
        if "content-length" in headers:
            return self.file.read(int(headers["content-length"]))
        if headers.get("transfer-encoding") != "chunked":
            return self.file.read()
        pieces = []
        while True:
            size = int(self.file.readline(), 16)
            pieces.append(self.file.read(size))
            assert self.file.readline() == b"\r\n"
            if not size:
                return b"".join(pieces)

    def silent(self, seconds=0.2):
        """True if nothing comes for a moment, and the connection stays open."""
        return not select.select([self.socket], [], [], seconds)[0]

    def ended(self):
        """Waits for the server to close; True if nothing more came."""
        return self.file.read() == b""

    def hang_up(self, rudely=False):
        """Closes for good: politely, or with a reset as a killed or unplugged client does."""
        if rudely:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.__exit__()


def go_json(value):
    """JSON as Go writes it: compact, <, > and & escaped, other text as it is."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def url(path, configuration=None, **query):
    """A target as the original's client builds it: keys sorted, values escaped as Go does."""
    if configuration is not None:
        query["configuration"] = configuration if isinstance(configuration, str) else go_json(configuration)
    return path + "?" + urllib.parse.urlencode(sorted(query.items())) if query else path


def report_url(path, job, host="test1"):
    """The report an original client sends of a job it got."""
    usage = {"cpu": 4677, "mem": 1765376} if path == "/usage" else {}
    return url(path, job, hostname=host, **usage)


def where(server, job_id):
    """(bucket, record) of a job in /dump."""
    found = [(name, jobs[job_id]) for name, jobs in server.get("/dump")[1].items() if job_id in jobs]
    assert len(found) == 1, found
    return found[0]


def moment(text):
    """The moment that a time in a record says."""
    whole, fraction = TIME.match(text).groups()
    return datetime.fromisoformat(whole + "+00:00") + timedelta(seconds=float(fraction or 0))


def assert_empty(answer):
    """An answer without a body that a client of the original's kind neither leaks nor waits for."""
    assert (answer.status, answer.body) == (200, b"")
    assert answer.headers["content-length"] == "0"
    assert "content-type" not in answer.headers and "transfer-encoding" not in answer.headers


def module_server(name):
    """A fixture: one server for many tests of a module, since a process for each of them takes its time."""

    @pytest.fixture(scope="module", name=name)
    def start(tmp_path_factory):
        with Lab(str(tmp_path_factory.mktemp(name))) as lab:
            yield lab.server()

    return start


shared = module_server("shared")  # never has a job: for tests that change nothing
lasting = module_server("lasting")  # see `server`


@pytest.fixture
def server(lasting):
    """A server with nothing queued; what former tests leased or finished is still there."""
    left = [job["ID"] for job in lasting.get("/jobs", state="Q,H,W", fields="ID")[1]["Jobs"]]
    assert not left or lasting.post("/delete", {"IDs": left})[0] == 200
    return lasting


@pytest.fixture
def leased(server):
    """A job that the original client test1 has."""
    server.add(["true"])
    with Wire(server) as wire:
        return wire.go("/request?hostname=test1").json


# ---------------------------------------------------------------------------------------------------------------------
# The tables: what is asked, what is answered
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path, status, exit_status", [("/finish", "finished", None), ("/timeout", "timeout", -11), ("/dead", "dead", -101)]
)
def test_the_clients_exact_requests_get_the_same_answers_and_buckets(server, path, status, exit_status):
    with Wire(server) as wire:  # one kept-alive connection for all of it, as Go's client has
        added = wire.go(url("/add", {"Params": ["true"], "Runtime": 60}))
        assert added.status == 200 and set(added.json) == {"ID", "Number"}
        job_id = added.json["ID"]
        assert re.match(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}\Z", job_id)

        bucket, record = where(server, job_id)
        assert bucket == "Available"
        assert {"ID": job_id, "Params": ["true"], "Runtime": 60}.items() <= record.items()

        got = wire.go("/request?hostname=test1")
        assert got.status == 200 and got.headers["content-type"] == "application/json"
        assert got.body == b'{"ID":"%b","Params":["true"],"Runtime":60}' % job_id.encode()
        assert wire.go("/request?hostname=test1").status == 204

        bucket, record = where(server, job_id)
        assert bucket == "Leased" and (record["Host"], record["MemUsed"], record["CPUUsed"]) == ("test1", None, None)
        moment(record["StartTime"]), moment(record["Expiry"])

        assert_empty(wire.go(report_url("/usage", got.json)))
        bucket, record = where(server, job_id)
        assert bucket == "Leased" and (record["CPUUsed"], record["MemUsed"]) == ([4677], [1765376])

        assert_empty(wire.go(report_url(path, got.json)))
        bucket, record = where(server, job_id)
        assert bucket == "Finished" and (record["Host"], record["Status"]) == ("test1", status)
        assert (record["CPUUsed"], record["MemUsed"]) == ([4677], [1765376])
        assert moment(record["StartTime"]) <= moment(record["EndTime"])
        assert record["ExitStatus"] == exit_status


def test_an_empty_queue_is_dumped_in_the_originals_shape_compact_and_without_a_newline(shared):
    with Wire(shared) as wire:
        answer = wire.go("/dump")
    assert (answer.status, answer.headers["content-type"], answer.version) == (200, "application/json", "HTTP/1.1")
    assert answer.body == b'{"Available":{},"Leased":{},"Finished":{},"Held":{}}'


@pytest.mark.parametrize("target", ["/request", "/request?hostname=test1", "/request?hostname="])
def test_no_job_is_204_without_a_body_and_the_connection_goes_on(shared, target):
    with Wire(shared) as wire:
        answer = wire.go(target)
        assert answer.status == 204
        assert not {"content-length", "content-type", "transfer-encoding"} & set(answer.headers)
        assert wire.go(target).status == 204


@pytest.mark.parametrize("path", REPORTS)
def test_the_answer_to_a_report_is_empty_with_a_length_of_0_and_no_type(server, leased, path):
    with Wire(server) as wire:
        assert_empty(wire.go(report_url(path, leased)))
        assert wire.go("/dump").status == 200


REFUSED = (
    ["/add", "/add?configuration=", "/add?hostname=x"]
    + [path + query for path in REPORTS for query in ("", "?configuration=", "?hostname=test1&cpu=1&mem=1")]
    + [url(path, value, hostname="t", cpu=1, mem=1) for path in REPORTS for value in ({}, {"Params": ["true"]})]
    + [url(path, {"ID": value}, hostname="t", cpu=1, mem=1) for path in REPORTS for value in (UNKNOWN_ID, "x", "", 5)]
)


@pytest.mark.parametrize("target", REFUSED)
def test_a_missing_parameter_no_id_and_an_unknown_id_are_400(shared, target):
    with Wire(shared) as wire:
        answer = wire.go(target)
        assert answer.status == 400 and len(answer.json["Error"]) > 10
        assert wire.go("/request").status == 204


@pytest.mark.parametrize("target", ["/", "/nope", "/dump/", "/Dump", "/add/x?configuration={}", "/favicon.ico"])
def test_any_other_url_is_404(shared, target):
    with Wire(shared) as wire:
        assert wire.go(target).status == 404


@pytest.mark.parametrize("name", ["cpu", "mem"])
def test_usage_that_is_missing_or_no_integer_is_400_and_leaves_no_sample(server, leased, name):
    other = "mem" if name == "cpu" else "cpu"
    with Wire(server) as wire:
        assert wire.go(url("/usage", leased, hostname="test1", **{other: 1})).status == 400
        for value in ("", "1.5", "x", "1e3", "0x10", "7 ", "--7"):
            answer = wire.go(url("/usage", leased, hostname="test1", **{other: 1, name: value}))
            assert answer.status == 400, value
    assert where(server, leased["ID"])[1]["CPUUsed"] is None


def test_usage_takes_a_plus_sign_and_negative_numbers(server, leased):
    with Wire(server) as wire:
        assert_empty(wire.go(url("/usage", leased, hostname="test1", cpu="+7", mem="-3")))
    record = where(server, leased["ID"])[1]
    assert (record["CPUUsed"], record["MemUsed"]) == ([7], [-3])


def test_usage_needs_no_hostname(server, leased):
    with Wire(server) as wire:
        assert_empty(wire.go(url("/usage", leased, cpu=1, mem=2)))
    assert where(server, leased["ID"])[1]["CPUUsed"] == [1]


@pytest.mark.parametrize("path", ["/finish", "/timeout", "/dead"])
def test_a_report_of_a_job_that_is_over_is_200_and_changes_nothing(server, leased, path):
    with Wire(server) as wire:
        assert_empty(wire.go(report_url(path, leased)))
        before = wire.go("/dump").body
        for again in REPORTS:
            assert_empty(wire.go(report_url(again, leased)))
            assert wire.go("/dump").body == before, again


@pytest.mark.parametrize("path", REPORTS)
def test_a_report_by_another_host_is_200_and_changes_nothing(server, leased, path):
    with Wire(server) as wire:
        before = wire.go("/dump").body
        assert_empty(wire.go(report_url(path, leased, host="test2")))
        assert wire.go("/dump").body == before


@pytest.mark.parametrize("path", REPORTS)
def test_a_report_of_a_job_that_was_never_leased_is_200_and_changes_nothing(server, path):
    with Wire(server) as wire:
        job = {"ID": wire.go(url("/add", {"Params": ["true"]})).json["ID"], "Params": ["true"], "Runtime": 0}
        before = wire.go("/dump").body
        assert_empty(wire.go(report_url(path, job)))
        assert wire.go("/dump").body == before


@pytest.mark.parametrize("path", REPORTS)
def test_an_original_client_cannot_report_a_job_that_one_of_ours_has_under_the_same_name(server, path):
    server.add(["true"])
    (job,) = server.post("/request", {"Hostname": "test1", "Slots": 1})[1]["Jobs"]
    with Wire(server) as wire:
        before = wire.go("/dump").body
        assert_empty(wire.go(report_url(path, {"ID": job["ID"], "Params": ["true"], "Runtime": 0})))
        assert wire.go("/dump").body == before


# ---------------------------------------------------------------------------------------------------------------------
# Forms: times, texts, keys
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", [0, 60, 86400])
def test_a_lease_ends_runtime_and_ten_minutes_after_it_began(server, runtime):
    (number,) = server.add({"Params": ["true"], "Runtime": runtime})
    with Wire(server) as wire:
        assert wire.go("/request?hostname=test1").json["Runtime"] == runtime
    job = server.job(number)
    assert moment(job["Expiry"]) - moment(job["StartTime"]) == timedelta(seconds=runtime + 600)
    assert abs(moment(job["StartTime"]) - datetime.now(timezone.utc)) < timedelta(seconds=PATIENCE)


@pytest.mark.parametrize("target", ["/request", "/request?hostname="])
def test_a_client_that_gives_no_hostname_is_unknown_and_can_report(server, target):
    server.add(["true"])
    with Wire(server) as wire:
        job = wire.go(target).json
        assert b'"Host":"\\u003cunknown\\u003e"' in wire.go("/dump").body
        assert where(server, job["ID"])[1]["Host"] == "<unknown>"
        assert_empty(wire.go(url("/finish", job)))
    assert where(server, job["ID"])[0] == "Finished"


def test_angle_brackets_and_ampersands_are_escaped_and_other_text_is_raw_utf_8(server):
    params = ["echo", "<a> & <b>", "Grüße", "日本", '"\\', "100%+1"]
    with Wire(server) as wire:
        job_id = wire.go(url("/add", {"Params": params})).json["ID"]
        dump, got = wire.go("/dump"), wire.go("/request?hostname=test1")
    assert got.json["Params"] == params
    assert got.body.decode() == go_json({"ID": job_id, "Params": params, "Runtime": 0})
    for body in (dump.body, got.body):
        assert b"\\u003ca\\u003e \\u0026 \\u003cb\\u003e" in body and "Grüße".encode() in body and "日本".encode() in body
        assert not re.search(rb"[<>&]", body)


@pytest.mark.parametrize(
    "text",
    [
        '{"params":["true"],"runtime":60}',
        '{"PARAMS":["true"],"RUNTIME":60}',
        '{"pArAmS":["true"],"rUnTiMe":60}',
        ' {"Params" : ["true"],\n "Runtime":60, "Unknown":{"a":[1]}} ',
        '{"ID":"mine","Params":["true"],"Runtime":60}',
        '{"ID":"%s","Params":["true"],"Runtime":60}' % UNKNOWN_ID,
        '{"ID":null,"Params":["true"],"Runtime":60}',
    ],
)
def test_add_takes_keys_in_any_letter_case_and_unknown_ones_and_replaces_an_id_that_was_sent(server, text):
    with Wire(server) as wire:
        job_id = wire.go(url("/add", text)).json["ID"]
        assert job_id not in ("mine", UNKNOWN_ID, "")
        assert wire.go("/request?hostname=test1").json == {"ID": job_id, "Params": ["true"], "Runtime": 60}


@pytest.mark.parametrize("text", ['{"Params":["true"]}', '{"Params":["true"],"Runtime":null}'])
def test_a_job_without_runtime_has_no_limit(server, text):
    with Wire(server) as wire:
        assert wire.go(url("/add", text)).status == 200
        assert wire.go("/request").json["Runtime"] == 0


@pytest.mark.parametrize("key", ["id", "ID", "Id"])
def test_a_report_takes_the_id_in_any_letter_case(server, leased, key):
    with Wire(server) as wire:
        assert_empty(wire.go(url("/finish", {key: leased["ID"]}, hostname="test1")))
    assert where(server, leased["ID"])[0] == "Finished"


def test_credentials_that_a_master_url_holds_do_no_harm(server):
    server.add(["true"])
    with Wire(server) as wire:
        answer = wire.go("/request?hostname=test1", more=b"Authorization: Basic dXNlcjpwYXNzd29yZA==\r\n")
    assert answer.status == 200 and answer.json["Params"] == ["true"]


@pytest.mark.parametrize("size", [50000, 500000, 8000000])
def test_a_job_of_any_size_reaches_the_client_whole(server, size):
    params = ["echo", "x" * size]
    server.add(params)
    with Wire(server) as wire:
        assert wire.go("/request?hostname=test1").json["Params"] == params
        assert wire.go("/request?hostname=test1").status == 204


def test_jobs_are_handed_out_in_the_order_they_came(server):
    with Wire(server) as wire:
        ids = [wire.go(url("/add", {"Params": ["echo", str(i)]})).json["ID"] for i in range(20)]
        assert [wire.go("/request?hostname=test1").json["ID"] for _ in ids] == ids


# ---------------------------------------------------------------------------------------------------------------------
# What an original client would not run as meant, it never gets
# ---------------------------------------------------------------------------------------------------------------------

MORE_THAN_PLAIN = [
    {"Env": {"A": "1"}},
    {"WorkDir": "/tmp"},
    {"Requires": ["linux"]},
    {"Requires": ["host=test1"]},
    {"StdOut": "out.txt"},
    {"StdErr": "err.txt"},
    {"Memory": 1 << 30},
    {"CpuTime": 60},
    {"Ncpus": 2},
]


@pytest.mark.parametrize("more", MORE_THAN_PLAIN, ids=lambda more: next(iter(more)))
def test_an_original_client_gets_the_next_job_that_it_runs_as_meant(server, more):
    special, plain = server.add({"Params": ["first"], **more}, ["second"])
    with Wire(server) as wire:
        assert wire.go("/request?hostname=test1").json["Params"] == ["second"]
        assert wire.go("/request?hostname=test1").status == 204
    assert server.job(special)["State"] == "Q" and server.job(plain)["State"] == "R"
    ours = {"Hostname": "test1", "Slots": 2, "Node": {"Properties": ["linux"]}}
    (job,) = server.post("/request", ours)[1]["Jobs"]
    assert job["Params"] == ["first"] and {key: job[key] for key in more} == more


@pytest.mark.parametrize("more", [{"Name": "n"}, {"Priority": 5}, {"Owner": "me@here"}, {"Ncpus": 1}, {"Env": {}}])
def test_what_only_the_server_looks_at_does_not_keep_a_job_from_an_original_client(server, more):
    server.add({"Params": ["true"], **more})
    with Wire(server) as wire:
        assert wire.go("/request?hostname=test1").json["Params"] == ["true"]


# ---------------------------------------------------------------------------------------------------------------------
# The original's db.json
# ---------------------------------------------------------------------------------------------------------------------

LEASED_ID, DONE_ID, OTHER_ID = (UNKNOWN_ID[:-1] + digit for digit in "abc")


def test_an_original_database_loads_and_goes_on(lab):
    """Hand-made as people do: indented, offsets and microseconds, null for a bucket, a key that differs from the ID."""
    started, expiry = "2026-11-23T18:27:00.923836298+01:00", "2199-11-23T17:38:00.5+00:00"
    database = {
        "Available": {"some-key": {"ID": UNKNOWN_ID, "Params": ["true"], "Runtime": 60}},
        "Leased": {
            LEASED_ID: {"ID": LEASED_ID, "Params": ["true"], "Runtime": 60, "Host": "test1", "StartTime": started,
                        "Expiry": expiry, "MemUsed": [1, 2], "CPUUsed": [3, 4]},
        },
        "Finished": None,
    }  # fmt: skip
    lab.write("db.json", json.dumps(database, indent=4))
    server = lab.server(db="db.json")
    bucket, record = where(server, LEASED_ID)
    assert bucket == "Leased" and (record["MemUsed"], record["CPUUsed"]) == ([1, 2], [3, 4])
    assert moment(record["StartTime"]) == datetime(2026, 11, 23, 17, 27, 0, 923836, timezone.utc)
    assert moment(record["Expiry"]) == datetime(2199, 11, 23, 17, 38, 0, 500000, timezone.utc)
    with Wire(server) as wire:
        assert wire.go("/request?hostname=test2").json == {"ID": UNKNOWN_ID, "Params": ["true"], "Runtime": 60}
        assert_empty(wire.go(report_url("/finish", {"ID": LEASED_ID, "Params": ["true"], "Runtime": 60})))
    bucket, record = where(server, LEASED_ID)
    assert bucket == "Finished" and (record["Host"], record["Status"]) == ("test1", "finished")


@pytest.mark.parametrize("status", ["finished", "timeout", "dead"])
def test_what_the_original_finished_is_dumped_as_it_was(lab, status):
    job = {"ID": DONE_ID, "Params": ["true"], "Runtime": 60, "Host": "hostB", "StartTime": "2026-11-23T17:27:00.5Z",
           "EndTime": "2026-11-23T17:28:00Z", "MemUsed": None, "CPUUsed": None, "Status": status}  # fmt: skip
    lab.write("db.json", go_json({"Available": {}, "Leased": {}, "Finished": {DONE_ID: job}}))
    bucket, record = where(lab.server(db="db.json"), DONE_ID)
    assert bucket == "Finished"
    assert moment(record["EndTime"]) - moment(record["StartTime"]) == timedelta(seconds=59.5)
    same = [key for key in job if not key.endswith("Time")]
    assert {key: record[key] for key in same} == {key: job[key] for key in same}


def test_a_lease_that_is_over_makes_the_job_available_again(lab):
    job = {"ID": OTHER_ID, "Params": ["true"], "Runtime": 60, "Host": "gone", "StartTime": "2020-01-01T00:00:00Z",
           "Expiry": "2020-01-01T00:11:00Z", "MemUsed": None, "CPUUsed": None}  # fmt: skip
    lab.write("db.json", go_json({"Available": {}, "Leased": {OTHER_ID: job}, "Finished": {}}))
    server = lab.server(db="db.json")
    until(lambda: where(server, OTHER_ID)[0] == "Available", "the lease to be over")
    with Wire(server) as wire:
        assert wire.go("/request?hostname=test1").json["ID"] == OTHER_ID
        before = wire.go("/dump").body
        assert_empty(wire.go(report_url("/finish", job, host="gone")))
        assert wire.go("/dump").body == before


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong there
# ---------------------------------------------------------------------------------------------------------------------

MALFORMED = [
    "{",
    "nope",
    "{'Params':['true']}",
    '{"ID":"nope","Params":["true"],"Runtime":1.5',
    '{"Params":["true"]} trailing',
    '\ufeff{"Params":["true"]}',
    '{"Params":["true"],}',
    '{"Params":["a\nb"]}',
    "NaN",
    "[" * 100000,
    '{"Runtime":' + "9" * 10000 + "}",
]


@pytest.mark.parametrize("text", MALFORMED, ids=lambda text: repr(text[:24]))
@pytest.mark.parametrize("path", ["/add"] + list(REPORTS))
def test_malformed_json_is_400_and_does_not_end_the_process(shared, path, text):
    with Wire(shared) as wire:
        assert wire.go(url(path, text, hostname="test1", cpu=1, mem=1)).status == 400
        assert wire.go("/dump").body == b'{"Available":{},"Leased":{},"Finished":{},"Held":{}}'
    assert shared.process.poll() is None


@pytest.mark.parametrize("text", MALFORMED, ids=lambda text: repr(text[:24]))
@pytest.mark.parametrize("path, status", [("/dump", 200), ("/request", 204)])
def test_malformed_json_where_none_is_read_does_not_matter(shared, path, status, text):
    with Wire(shared) as wire:
        assert wire.go(url(path, text)).status == status
        assert wire.go(url(path)).status == status


@pytest.mark.parametrize(
    "text",
    ["null", "{}", "[]", "5", '"true"', '{"Params":null}', '{"Params":[]}', '{"Params":[null]}', '{"Params":[""]}',
     '{"Params":["true",null]}', '{"Params":["true",5]}', '{"Params":"true"}', '{"Params":["true"],"Runtime":-1}',
     '{"Params":["true"],"Runtime":1.5}', '{"Params":["true"],"Runtime":"60"}', '[{"Params":["true"]}]'],
)  # fmt: skip
def test_a_job_that_can_never_run_is_refused_and_nothing_is_added(shared, text):
    with Wire(shared) as wire:
        answer = wire.go(url("/add", text))
        assert answer.status == 400 and len(answer.json["Error"]) > 10
        assert wire.go("/dump").body == b'{"Available":{},"Leased":{},"Finished":{},"Held":{}}'


@pytest.mark.parametrize("query", ["%ff", "%", "%zz", "\xff", "configuration=%80", "=", "&&", "configuration"])
@pytest.mark.parametrize("path", ["/add"] + list(REPORTS))
def test_a_broken_query_is_400(shared, path, query):
    with Wire(shared) as wire:
        wire.send(b"GET %b?%b HTTP/1.1\r\n\r\n" % (path.encode(), query.encode("latin-1")))
        assert wire.answer().status == 400
        assert wire.go("/request").status == 204


def test_a_peer_that_hangs_up_during_dump_harms_nobody(lab):
    server = lab.server()
    server.add(*([["echo", "x" * 4000]] * 3000))  # 12 MB: more than any socket's buffer takes
    for rudely in (True, False, True):
        wire = Wire(server).send(b"GET /dump HTTP/1.1\r\nHost: x\r\n\r\n")
        assert len(wire.file.read(1000)) == 1000
        wire.hang_up(rudely)
    assert server.process.poll() is None
    assert len(server.get("/dump")[1]["Available"]) == 3000
    with Wire(server) as wire:
        assert wire.go("/request?hostname=test1").status == 200


def test_dump_beside_add_is_always_a_whole_and_consistent_picture(lab):
    server = lab.server()
    stop, problems, dumps = threading.Event(), [], []
    added = [[] for _ in range(3)]  # by thread: IDs whose /add was answered

    def add(ids):
        with Wire(server) as wire:
            while not stop.is_set():
                ids.append(wire.go(url("/add", {"Params": ["echo", "<&>"], "Runtime": 60})).json["ID"])

    def cycle():
        with Wire(server) as wire:
            while not stop.is_set():
                got = wire.go("/request?hostname=test1")
                if got.status == 200:
                    assert_empty(wire.go(report_url("/usage", got.json)))
                    assert_empty(wire.go(report_url("/finish", got.json)))

    def dump():
        with Wire(server) as wire:
            for _ in range(25):
                acknowledged = [job_id for ids in added for job_id in list(ids)]
                buckets = wire.go("/dump").json
                seen = [job_id for bucket in buckets.values() for job_id in bucket]
                assert len(seen) == len(set(seen)), "a job is in two buckets"
                assert set(seen).issuperset(acknowledged), "a job that was there is missing"
                assert all(job["Status"] == "finished" for job in buckets["Finished"].values())
                dumps.append(len(seen))

    def guarded(function, *arguments):
        try:
            function(*arguments)
        except BaseException as error:
            problems.append(error)
            stop.set()

    workers = [threading.Thread(target=guarded, args=(add, ids)) for ids in added]
    workers.append(threading.Thread(target=guarded, args=(cycle,)))
    readers = [threading.Thread(target=guarded, args=(dump,)) for _ in range(2)]
    for thread in workers + readers:
        thread.start()
    for thread in readers:
        thread.join()
    stop.set()
    for thread in workers:
        thread.join()
    assert not problems, problems
    assert len(dumps) == 50 and dumps[-1] > 0
    assert sum(map(len, server.get("/dump")[1].values())) == sum(map(len, added))


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_every_acknowledged_add_is_there_after_a_term_and_after_a_kill(lab, end):
    server = lab.server()
    with Wire(server) as wire:
        ids = {wire.go(url("/add", {"Params": ["true"]})).json["ID"] for _ in range(100)}
        job = wire.go("/request?hostname=test1").json
        assert_empty(wire.go(report_url("/finish", job)))
    assert getattr(server, end)() in (0, None)
    buckets = lab.server().get("/dump")[1]
    assert set(buckets["Available"]) == ids - {job["ID"]} and set(buckets["Finished"]) == {job["ID"]}

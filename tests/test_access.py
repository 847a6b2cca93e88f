"""Who may ask the server for what: tokens and their roles, wrong ones, the file of tokens, and what browsers are kept from.

The matrix goes over the route table itself: a new route without a role that is known fails it.
"""

import base64
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import urllib.parse

import pytest
from harness import PATIENCE, ROOT, read, until
from test_original import UNKNOWN_ID, Wire, report_url, url

import server as server_module
from server import ROLES, ROUTES, Failures, Gate, Tokens

TOKENS = {role: f"jr_{role}-token" for role in ROLES}
METHODS = ("GET", "POST", "PUT", "HEAD", "OPTIONS")


def bearer(token):
    return b"Authorization: Bearer %b\r\n" % token.encode()


def basic(token, user="any"):
    return b"Authorization: Basic %b\r\n" % base64.b64encode(f"{user}:{token}".encode())


# Heads without a right token.
OUTSIDE = {
    "no token": b"",
    "a wrong token": bearer("jr_wrong"),
    "a wrong password": basic("jr_wrong"),
    "the token as user": b"Authorization: Basic %b\r\n" % base64.b64encode(b"jr_submit-token:"),
    "no scheme": b"Authorization: jr_submit-token\r\n",
    "another scheme": b"Authorization: Digest jr_submit-token\r\n",
    "empty": b"Authorization:\r\n",
    "an empty token": b"Authorization: Bearer \r\n",
    "an empty password": basic(""),
    "no base64": b"Authorization: Basic jr_submit-token!\r\n",
    "half of it": bearer("jr_submit"),
    "more than it": bearer("jr_submit-token1"),
    "its hash": bearer("0" * 64),
    "not ASCII": b"Authorization: Bearer \xe4\r\n",
}


def tokens_file(lab, tokens=TOKENS, name="jobrunner.tokens"):
    """A file of tokens, by hand; {role or ROLE:NAME: token}."""
    records = [{"Name": key, "Role": key.partition(":")[0], "Token": token} for key, token in tokens.items()]
    path = lab.path(name)
    with open(path + ".made", "w") as file:
        json.dump({"Tokens": records}, file)
    os.replace(path + ".made", path)
    return path


@pytest.fixture
def server(lab):
    tokens_file(lab)
    return lab.server()


def ask(server, method, path, more=b"", body=b""):
    """(status, value) of one request on a connection of its own."""
    with Wire(server) as wire:
        return send(wire, method, path, more, body)()


def send(wire, method, path, more=b"", body=b""):
    """Sends a request; what returns its answer's (status, value)."""
    head = b"%b %b HTTP/1.1\r\nHost: localhost:%d\r\n%bContent-Length: %d\r\n\r\n"
    wire.send(head % (method.encode(), path.encode(), wire.port, more, len(body)) + body)

    def answer():
        if method == "HEAD":
            return int(wire.file.readline().split()[1]), None
        found = wire.answer()
        return found.status, found.json if found.body else None

    return answer


def submit(server, *params):
    status, added = ask(server, "POST", "/add", bearer(TOKENS["submit"]), json.dumps({"Params": params}).encode())
    assert status == 200, added
    return added[0]["Number"]


# ---------------------------------------------------------------------------------------------------------------------
# The matrix
# ---------------------------------------------------------------------------------------------------------------------


def test_every_route_has_a_role_that_is_known():
    known = set().union(*ROLES.values())
    assert {path: route.role for path, route in ROUTES.items() if route.role not in known} == {}
    assert all(ROLES[role] == {role, "any"} for role in ("view", "agent")) and ROLES["submit"] == known


def expected(path, method, role):
    """The status of a request with the token of a role; None = whatever the route itself says."""
    route = ROUTES.get(path)
    if route is None:
        return 404
    if route.role not in ROLES[role]:
        return 403
    return None if method in route.methods.split(", ") else 405


@pytest.mark.parametrize("role", ROLES)
def test_the_matrix_of_roles(server, role):
    paths = sorted(set(ROUTES) - {"/shutdown"}) + ["/nope", "/shutdown"]  # the last one ends the server
    for path in paths:
        for method in sorted(METHODS, key=lambda method: method == "POST"):
            status, value = ask(server, method, path, bearer(TOKENS[role]), b"{}")
            want = expected(path, method, role)
            assert status == want if want else status not in (401, 403, 405, 500), (path, method, status, value)


@pytest.mark.parametrize("case", OUTSIDE)
def test_no_head_without_a_right_token_is_let_in(tmp_path, case):
    path = tmp_path / "tokens"
    path.write_text(json.dumps({"Tokens": [{"Name": "a", "Role": "submit", "Token": TOKENS["submit"]}]}))
    gate = Gate(Tokens(str(path)), [])
    for target in [*ROUTES, "/nope", "/", "*"]:
        for method in METHODS:
            head = server_module.parse_head(f"{method} /{target[1:]} HTTP/1.1\r\n".encode(), OUTSIDE[case])
            assert gate.admit(head) == server_module.NO_TOKEN
    assert gate.admit(head._replace(headers={b"authorization": b"bearer  jr_submit-token"})) == ("submit", "a")


@pytest.mark.parametrize("case", ["no token", "a wrong token", "no base64"])
def test_nobody_gets_in_without_a_right_token(server, case):
    wires = []
    try:
        for path in [*ROUTES, "/nope", "/"]:
            for method in METHODS:  # all at once: from the eleventh on they are answered late
                wires.append(Wire(server))
                wires.append(send(wires[-1], method, path, OUTSIDE[case], b"{}"))
        answers = [answer() for answer in wires[1::2]]
    finally:
        for wire in wires[::2]:
            wire.hang_up()
    assert {status for status, _ in answers} == {401}
    assert len({json.dumps(value) for _, value in answers if value}) == 1  # and no hint of what is wrong
    assert ask(server, "GET", "/status", bearer(TOKENS["view"]))[1]["Jobs"] == 0
    assert not re.search("jr_|Bearer|Basic", lab_log(server))


def lab_log(server):
    with open(os.path.join(os.path.dirname(server.db), "server.py.log")) as file:
        return file.read()


def test_without_tokens_everybody_may_do_everything_and_the_log_says_so_once(lab):
    server = lab.server()
    assert server.status()["Tokens"] is False
    server.add(["true"])
    assert server.get("/jobs")[0] == 200
    assert "access.open" not in lab.log("server.py.log")  # on loopback only this machine reaches it
    everywhere = lab.popen("server.py", "--port", 0, "--db", "b.json", log="all.log", stdout=subprocess.PIPE)
    everywhere.stdout.readline()
    until(lambda: "access.open" in lab.log("all.log"), "the warning")
    assert lab.log("all.log").count("--make-tokens") == 1


def test_a_refused_body_is_not_read(lab):
    tokens_file(lab)
    server = lab.server()
    with Wire(server) as wire:
        wire.send(b"POST /add HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 200000000\r\n\r\n")
        answer = wire.answer()  # with none of the body sent
        assert answer.status == 401 and answer.headers["connection"] == "close"
        assert answer.headers["www-authenticate"] == 'Basic realm="jobrunner"'


def test_an_agents_body_has_a_limit_of_its_own(server):
    head = b"POST %b HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 40000000\r\n%b\r\n"
    with Wire(server) as wire:
        wire.send(head % (b"/request", bearer(TOKENS["agent"])))
        assert wire.answer().status == 413
    with Wire(server) as wire:
        wire.send(head % (b"/add", bearer(TOKENS["submit"])))
        assert wire.file.readline() == b"HTTP/1.1 100 Continue\r\n"


@pytest.mark.parametrize("path, status", [("/status", 200), ("/nope", 404), ("/add", 403), ("/delete", 403)])
def test_a_connection_stays_open_through_refusals_without_a_body(server, path, status):
    with Wire(server) as wire:
        assert wire.go("/jobs").status == 401
        assert wire.go(path, bearer(TOKENS["view"])).status == status
        assert wire.go("/status", basic(TOKENS["agent"])).json["Tokens"] is True


# ---------------------------------------------------------------------------------------------------------------------
# Agents and their runs
# ---------------------------------------------------------------------------------------------------------------------


def poll(server, host="h1", token=TOKENS["agent"], **more):
    body = json.dumps({"Hostname": host, "Slots": 1, **more}).encode()
    return ask(server, "POST", "/request", bearer(token), body)


def test_an_agent_reports_the_runs_whose_lease_it_has_and_no_others(server):
    agent = bearer(TOKENS["agent"])
    submit(server, "true")
    (job,) = poll(server)[1]["Jobs"]
    for path in ("/finish", "/timeout", "/dead", "/usage"):
        report = {"ID": job["ID"], "Hostname": "h1", "ExitStatus": 0, "CPU": 1, "Mem": 1}
        for lease, status in (("", 403), (None, 403), ("0" * 32, 200)):
            got, value = ask(server, "POST", path, agent, json.dumps({**report, "Lease": lease}).encode())
            assert got == status, value
            assert status == 403 or value[0]["Stale"]
        assert ask(server, "GET", report_url(path, job, "h1"), agent) == (200, None)  # changes nothing
    assert poll(server, Reports=[{"ID": job["ID"], "ExitStatus": 0}])[0] == 403
    assert state(server, 1) == "R"
    done = json.dumps([{"ID": job["ID"], "Lease": job["Lease"], "Hostname": "h1", "ExitStatus": 0}]).encode()
    assert ask(server, "POST", "/finish", agent, done)[0] == 200
    assert state(server, 1) == "F"


def state(server, number):
    return ask(server, "GET", f"/job?id={number}", bearer(TOKENS["view"]))[1]["State"]


def test_what_an_original_client_was_given_is_reported_with_the_same_token(lab):
    tokens_file(lab, {**TOKENS, "agent:pc2": "jr_pc2"})
    server = lab.server()
    submit(server, "true")
    _, job = ask(server, "GET", "/request?hostname=test1", bearer(TOKENS["agent"]))
    assert ask(server, "GET", report_url("/finish", job), bearer("jr_pc2")) == (200, None)
    assert state(server, 1) == "R"
    assert ask(server, "GET", report_url("/finish", job), bearer(TOKENS["agent"])) == (200, None)
    assert state(server, 1) == "F"


def test_leases_and_tokens_are_in_no_listing_and_in_no_log(lab):
    tokens_file(lab)
    server = lab.server("--log-level", "debug")
    submit(server, "true")
    (job,) = poll(server, Node={"Client": "c"}, Poll=1)[1]["Jobs"]
    for path in ("/dump", "/jobs", "/job?id=1", "/nodes", "/output?id=1", "/status", "/queues"):
        for role in ("view", "submit"):
            with Wire(server) as wire:
                answer = wire.go(path, bearer(TOKENS[role]))
            assert answer.status == 200
            assert job["Lease"].encode() not in answer.body and b"jr_" not in answer.body
    log = lab.log("server.py.log")
    assert "job.lease" in log and job["Lease"] not in log and "jr_" not in log


# ---------------------------------------------------------------------------------------------------------------------
# Curl, and the original's client
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("curl"), reason="there is no curl here")
def test_curl_sends_a_token_as_password_and_as_bearer(server):
    def curl(*arguments):
        command = ["curl", "-s", "-o", os.devnull, "-w", "%{http_code}", "--noproxy", "*", *arguments]
        return subprocess.run(command, stdout=subprocess.PIPE, timeout=PATIENCE).stdout.decode()

    token, add = TOKENS["submit"], server.url + url("/add", {"Params": ["true"]})
    assert curl(add) == "401"
    assert curl("-u", "me:" + TOKENS["view"], add) == "403"
    assert curl("-u", "me:" + token, add) == "200"
    assert curl("-H", "Authorization: bearer " + token, "-d", '{"Params":["true"]}', server.url + "/add") == "200"
    assert curl(server.url.replace("://", f"://any:{token}@") + "/jobs") == "200"
    assert ask(server, "GET", "/status", bearer(token))[1]["Jobs"] == 2


def test_the_originals_client_gets_in_with_a_token_in_its_masters_address(server):
    """Go's http.Client sends the user and password of a URL as Basic with each request."""
    submit(server, "true")
    token = basic(TOKENS["agent"])
    with Wire(server) as wire:  # one connection, as it keeps it
        job = wire.go("/request?hostname=test1", token).json
        assert wire.go(report_url("/usage", job), token).status == 200
        assert wire.go(report_url("/finish", job), token).status == 200
        assert wire.go("/request?hostname=test1", token).status == 204
        assert wire.go("/dump", token).status == 403
    assert state(server, 1) == "F"


# ---------------------------------------------------------------------------------------------------------------------
# Wrong tokens again and again
# ---------------------------------------------------------------------------------------------------------------------


def test_from_the_eleventh_failure_of_an_address_on_answers_come_late_and_right_tokens_never(server):
    with Wire(server) as wire:
        for _ in range(server_module.FREE_FAILURES):
            assert wire.go("/status", bearer("jr_wrong")).status == 401
        wire.send(b"GET /status HTTP/1.1\r\n%b\r\n" % bearer("jr_wrong"))
        assert wire.silent(0.5)
        with Wire(server) as other:
            assert other.go("/status", bearer(TOKENS["view"])).status == 200
            assert other.post("/jobs", {}).answer().status == 401
        assert wire.answer().status == 401
    assert len(re.findall(r"access\.refused address=\S+ requests=1\b", lab_log(server))) == 1


def test_failures_are_counted_by_address_logged_once_a_minute_and_forgotten(caplog):
    moment = [0.0]
    failures = Failures(lambda: moment[0])
    late = [bool(failures.count("10.0.0.1")) for _ in range(12)]
    assert late == [False] * 10 + [True] * 2
    assert not failures.count("10.0.0.2") and not failures.count("::ffff:10.0.0.1")
    moment[0] = 61
    failures.tell()
    failures.tell()
    said = [record.getMessage().split(":")[0] for record in caplog.records if "=10.0.0.1 " in record.getMessage()]
    assert said == ["access.refused address=10.0.0.1 requests=1", "access.refused address=10.0.0.1 requests=11"]
    moment[0] += server_module.FORGIVEN + 1
    assert not failures.count("10.0.0.1")


def test_addresses_of_one_ipv6_network_count_as_one_and_memory_is_bounded():
    failures = Failures(lambda: 0.0)
    assert any([failures.count(f"2001:db8::{n:x}") for n in range(1, 12)])
    for n in range(10000):
        failures.count(f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}")
    assert len(failures._known) == server_module.MOST_ADDRESSES


# ---------------------------------------------------------------------------------------------------------------------
# The file
# ---------------------------------------------------------------------------------------------------------------------


def run(lab, *arguments):
    command = [sys.executable, os.path.join(ROOT, "server.py"), *arguments]
    done = subprocess.run(command, cwd=lab.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=PATIENCE)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_make_tokens_makes_one_for_each_role_which_let_in_and_are_kept_hashed(lab):
    code, out, err = run(lab, "--make-tokens")
    made = dict(line.split() for line in out.splitlines())
    assert code == 0 and list(made) == ["view", "agent", "submit"] and "jobrunner.token" in err
    path = lab.path("jobrunner.tokens")
    with open(path) as file:
        text = file.read()
    assert not any(token in text for token in made.values())
    assert all(re.match(r"jr_[\w-]{43}\Z", token) for token in made.values())
    assert os.name == "nt" or stat.S_IMODE(os.stat(path).st_mode) == 0o600
    server = lab.server()
    assert [ask(server, "GET", "/jobs", basic(made[role]))[0] for role in made] == [200, 403, 200]
    code, out, err = run(lab, "--make-tokens")
    assert (code, out) == (1, "") and "there already" in err
    with open(path) as file:
        assert file.read() == text


def test_add_token_adds_one_with_a_name_which_a_running_server_knows_at_once(lab):
    tokens_file(lab, name="mine")
    server = lab.server("--token-file", "mine")
    code, out, _ = run(lab, "--token-file", "mine", "--add-token", "view:ann")
    role, token = out.split()
    assert (code, role) == (0, "view")
    until(lambda: ask(server, "GET", "/jobs", bearer(token))[0] == 200, "the new token to count")
    code, out, err = run(lab, "--token-file", "mine", "--add-token", "view:ann")
    assert (code, out) == (1, "") and "ann" in err
    assert run(lab, "--token-file", "mine", "--add-token", "boss:ann")[0] == 1


@pytest.mark.skipif(os.name == "nt", reason="Windows has no owners to speak of, and links take a privilege")
def test_add_token_changes_the_file_that_a_link_leads_to_and_leaves_it_to_its_owner(lab):
    tokens_file(lab, name="mine")
    os.symlink("mine", lab.path("jobrunner.tokens"))
    owner = 12345 if os.geteuid() == 0 else os.geteuid()
    os.chown(lab.path("mine"), owner, -1)
    assert run(lab, "--add-token", "view:ann")[0] == 0
    found = os.stat(lab.path("mine"))
    assert os.path.islink(lab.path("jobrunner.tokens")) and '"ann"' in read(lab.path("mine"))
    assert (found.st_uid, stat.S_IMODE(found.st_mode)) == (owner, 0o600)
    assert set(os.listdir(lab.folder)) == {"mine", "jobrunner.tokens"}


def test_a_withdrawn_token_is_out_and_a_damaged_file_changes_nothing(server, lab):
    def status(role):
        return ask(server, "GET", "/status", bearer(TOKENS[role]))[0]

    assert status("view") == 200
    tokens_file(lab, {"agent": TOKENS["agent"]})
    until(lambda: status("view") == 401, "the token to be out")
    lab.write("jobrunner.tokens", '{"Tokens": [\n')
    until(lambda: "line 2" in lab.log("server.py.log"), "the damage to be noticed")
    assert (status("agent"), status("view")) == (200, 401)
    os.remove(lab.path("jobrunner.tokens"))
    until(lambda: lab.log("server.py.log").count("tokens known before") == 2, "the loss to be noticed")
    assert (status("agent"), status("view")) == (200, 401)
    tokens_file(lab)
    until(lambda: status("view") == 200, "the token to be in again")


def test_a_request_that_is_held_open_is_told_nothing_once_its_token_is_withdrawn(server, lab):
    submit, view, agent = (bearer(TOKENS[role]) for role in ("submit", "view", "agent"))
    job = {"Params": ["true"], "Hold": True}
    (added,) = ask(server, "POST", "/add", submit, json.dumps([job]).encode())[1]
    with Wire(server) as poll, Wire(server) as reader, Wire(server) as waiter:
        wish = json.dumps({"Hostname": "h", "Wait": 60}).encode()
        polled = send(poll, "POST", "/request", agent, wish)
        read = send(reader, "GET", "/output?id=1&wait=60", view)
        waited = send(waiter, "GET", "/job?id=1&wait=60", view)
        until(lambda: ask(server, "GET", "/nodes", submit)[1]["Nodes"], "the request to be held open")
        tokens_file(lab, {"submit": TOKENS["submit"]})
        until(lambda: ask(server, "GET", "/status", agent)[0] == 401, "the tokens to be out")
        assert ask(server, "POST", "/release", submit, b'{"IDs":["1"]}')[0] == 200
        assert polled()[1]["Jobs"] == []
        (record,) = ask(server, "POST", "/request", submit, b'{"Hostname":"x"}')[1]["Jobs"]
        assert record["ID"] == added["ID"]
        assert ask(server, "POST", "/delete", submit, b'{"IDs":["1"],"Force":true}')[0] == 200
        assert {answer()[0] for answer in (read, waited)} <= {401, 403}  # the former if they came late


def test_a_token_in_the_servers_url_reaches_neither_jobs_nor_listings(server, lab):
    """Job 1 has what the client has, job 2 what qsub -V has, job 3 what qsub -v has."""

    def at(role):
        return {
            **os.environ,
            "JOBRUNNER_SERVER": f"http://any:{TOKENS[role]}@localhost:{server.port}",
            "TMPDIR": lab.folder,
        }

    for words in ((), ("-V",), ("-v", "JOBRUNNER_SERVER")):
        code, _, err = lab.command("qsub", *words, "--", "sh", "-c", "env", env=at("submit"))
        assert code == 0, err
    code, _, err = lab.command(
        "qsub", "-v", "JOBRUNNER_TOKEN", "--", "env", env={**at("submit"), "JOBRUNNER_TOKEN": "jr_x"}
    )
    assert code != 0 and "jr_x" not in err
    lab.popen("client.py", "--until-empty", "--allow-prefix", "sh", env=at("agent")).wait(PATIENCE)
    view = bearer(TOKENS["view"])
    shown = [ask(server, "GET", f"/output?id={number}", view)[1]["StdOut"] for number in (1, 2, 3)]
    assert all(f"JOBRUNNER_SERVER=http://localhost:{server.port}\n" in text for text in shown)
    shown.append(json.dumps(ask(server, "GET", "/jobs", view)[1]))
    assert not any(token in text for token in TOKENS.values() for text in shown)


def test_a_server_without_tokens_takes_those_that_are_made_while_it_runs(lab):
    server = lab.server()
    assert server.get("/jobs")[0] == 200
    tokens_file(lab)
    until(lambda: server.get("/jobs")[0] == 401, "the tokens to count")


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "line 1 column 2"),
        ("[]", "line 1"),
        ("\xff", "JSON"),
        ('{"Tokens": [{"Name": "a", "Role": "boss", "Token": "x"}]}', "token 1"),
        ('{"Tokens": [{"Name": "a", "Role": "view"}]}', "token a"),
        ('{"Tokens": [{"Name": "a", "Role": "view", "Sha256": "12"}]}', "token a"),
        ('{"Tokens": [{"Name": "a", "Role": "view", "Token": ""}]}', "token a"),
        ('{"Tokens": ["jr_x"]}', "token 1"),
    ],
)
def test_a_server_does_not_start_on_a_file_that_makes_no_sense(lab, text, words):
    with open(lab.path("jobrunner.tokens"), "wb") as file:
        file.write(text.encode("latin-1"))
    code, out, err = run(lab, "--port", "0", "--bind", "127.0.0.1")
    assert (code, out) == (1, "") and words in err and "Traceback" not in err and len(err.splitlines()) == 1


@pytest.mark.skipif(os.name == "nt", reason="links are an administrator's there")
@pytest.mark.parametrize("target", ["nowhere", "jobrunner.tokens", "/dev/null/x"])
def test_a_file_of_tokens_that_cannot_be_looked_at_does_not_open_the_server(lab, target):
    os.symlink(target, lab.path("jobrunner.tokens"))
    code, out, err = run(lab, "--port", "0", "--bind", "127.0.0.1")
    assert (code, out) == (1, "") and "jobrunner.tokens" in err and len(err.splitlines()) == 1
    code, out, err = run(lab, "--make-tokens")  # nor is it written through
    assert (code, out) == (1, "") and not os.path.exists(lab.path("nowhere"))


def test_a_folder_in_the_place_of_the_tokens_changes_nothing(server, lab):
    os.remove(lab.path("jobrunner.tokens"))
    os.mkdir(lab.path("jobrunner.tokens"))
    until(lambda: "tokens known before" in lab.log("server.py.log"), "it to be noticed")
    assert [ask(server, "GET", "/status", more)[0] for more in (b"", bearer(TOKENS["view"]))] == [401, 200]


def test_tokens_that_cannot_be_written_leave_no_half_of_a_file(lab, monkeypatch):
    path = lab.path("jobrunner.tokens")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(server_module.os, "fsync", full)
    with pytest.raises(server_module.JobrunnerError, match="No space"):
        server_module.make_tokens(path)
    assert not os.path.exists(path)


def test_a_server_does_not_start_without_the_file_it_is_told_to_use(lab):
    code, _, err = run(lab, "--port", "0", "--bind", "127.0.0.1", "--token-file", "nope")
    assert code == 1 and "nope" in err


# ---------------------------------------------------------------------------------------------------------------------
# Browsers
# ---------------------------------------------------------------------------------------------------------------------

# What a browser sends along when a page of another site asks.
CROSS_SITE = {
    "a form": b"Origin: http://evil.example\r\nSec-Fetch-Site: cross-site\r\nSec-Fetch-Mode: navigate\r\n",
    "an old browser's form": b"Origin: http://evil.example\r\n",
    "a sandboxed frame": b"Origin: null\r\n",
    "an image": b"Sec-Fetch-Site: cross-site\r\nSec-Fetch-Mode: no-cors\r\nSec-Fetch-Dest: image\r\n",
    "another port": b"Origin: http://localhost:1\r\nSec-Fetch-Site: same-site\r\n",
    "another scheme": b"Origin: https://localhost:PORT\r\n",
    "a picture over plain HTTP": b"User-Agent: Mozilla/5.0 (X11) Firefox/140.0\r\nReferer: http://evil.example/\r\n",
    "one that hides its page": b"User-Agent: Mozilla/5.0 (X11) Firefox/140.0\r\nAccept: image/webp\r\n",
    "a page whose name begins like ours": b"Referer: http://localhost:PORT.evil.example/\r\n",
    "a page that says PowerShell": b"User-Agent: Mozilla/5.0\r\nReferer: http://evil.example/PowerShell/\r\n",
    "an empty mark": b"Sec-Fetch-Site:\r\n",
    "two origins": b"Origin: http://localhost:PORT\r\nOrigin: http://evil.example\r\n",
}


def changing():
    """(method, path) of all that changes anything."""
    readers = [path for path, route in ROUTES.items() if route.role in ("view", "any")]
    assert sorted(readers) == ["/dump", "/job", "/jobs", "/nodes", "/output", "/queues", "/status"]
    for path, route in ROUTES.items():
        for method in route.methods.split(", ") if path not in readers else ():
            yield method, path


@pytest.mark.parametrize("case", CROSS_SITE)
@pytest.mark.parametrize("tokens", [False, True])
def test_a_page_of_another_site_cannot_change_anything(lab, case, tokens):
    if tokens:
        tokens_file(lab)
    server = lab.server()
    kept = basic(TOKENS["submit"]) if tokens else b""  # the browser sends it along, whoever asks
    more = kept + CROSS_SITE[case].replace(b"PORT", b"%d" % server.port)
    for method, path in changing():
        query = "?configuration=" + urllib.parse.quote('{"Params":["true"]}') if method == "GET" else ""
        body = b'{"Params":["true"]}' if method == "POST" else b""
        status, value = ask(server, method, path + query, more, body)
        assert status == 403, (method, path, value)
    assert ask(server, "GET", "/status", kept)[1]["Jobs"] == 0
    assert server.process.poll() is None


@pytest.mark.parametrize(
    "more",
    [
        b"Origin: http://localhost:PORT\r\nSec-Fetch-Site: same-origin\r\n",
        b"Sec-Fetch-Site: none\r\nSec-Fetch-Mode: navigate\r\nUser-Agent: Mozilla/5.0\r\n",  # typed by a person
        b"Referer: http://localhost:PORT/jobs\r\nUser-Agent: Mozilla/5.0\r\n",
        b"User-Agent: Mozilla/5.0 (Windows NT; Windows NT 10.0; en-US) WindowsPowerShell/5.1.19041.1\r\n",
        b"User-Agent: curl/8\r\n",
        b"",
    ],
)
def test_our_own_pages_people_and_programs_can(lab, more):
    server = lab.server()
    body = b'{"Params":["true"]}'
    assert ask(server, "POST", "/add", more.replace(b"PORT", b"%d" % server.port), body)[0] == 200


NAMES = {
    "localhost": 200, "LOCALHOST:8088": 200, "127.0.0.1": 200, "192.168.7.9:8088": 200, "[::1]:8088": 200, "[fe80::1]": 200,
    "jobs.example:8088": 200, "Jobs.Example.": 200, "evil.example": 403, "evil.example:8088": 403, "localhost.evil.example": 403,
    "127.0.0.1.evil.example": 403, "[evil]": 403, "": 403, "127.1": 403, "2130706433": 403, "1.2.3.4.5": 403, "[::1": 403,
}  # fmt: skip


def test_browsers_must_use_a_name_of_this_server(lab):
    server = lab.server("--allowed-host", "jobs.example")
    marks = (
        b"Origin: http://x\r\n",
        b"Sec-Fetch-Site: none\r\n",
        b"Referer: http://x/\r\n",
        b"User-Agent: Mozilla/5\r\n",
    )
    for name, status in NAMES.items():
        for mark in marks:
            with Wire(server) as wire:
                wire.send(b"GET /dump HTTP/1.1\r\nHost: %b\r\n%b\r\n" % (name.encode(), mark))
                assert wire.answer().status == status, (name, mark)
        with Wire(server) as wire:  # a program is free to call it as it likes
            wire.send(b"GET /dump HTTP/1.1\r\nHost: %b\r\nUser-Agent: curl/8\r\n\r\n" % name.encode())
            assert wire.answer().status == 200
    with Wire(server) as wire:
        wire.send(b"GET /dump HTTP/1.1\r\nUser-Agent: Mozilla/5\r\n\r\n")
        assert wire.answer().status == 403
    with Wire(server) as wire:  # the name is in the URL, as a proxy gets it
        wire.send(b"GET http://evil.example/dump HTTP/1.1\r\nHost: localhost\r\nReferer: x\r\n\r\n")
        assert wire.answer().status == 403


def test_this_machines_name_is_one_of_them(monkeypatch, tmp_path):
    monkeypatch.setattr(server_module.socket, "gethostname", lambda: "PC7.lab.example")
    gate = Gate(Tokens(str(tmp_path / "none")), [])
    assert [gate._is_ours(name) for name in ("pc7", "pc7.lab.example:1", "lab.example")] == [True, True, False]


@pytest.mark.parametrize("path", ["/status", "/dump", "/nope", "/request"])
def test_browsers_are_told_to_take_no_answer_for_something_else_and_to_keep_none(lab, path):
    with Wire(lab.server()) as wire:
        headers = wire.go(path).headers
    assert headers["x-content-type-options"] == "nosniff" and headers["cache-control"] == "no-store"
    assert headers["cross-origin-resource-policy"] == "same-origin"


def test_an_unknown_job_is_told_with_a_token_only(server):
    assert ask(server, "GET", f"/job?id={UNKNOWN_ID}", bearer(TOKENS["view"]))[0] == 404
    assert ask(server, "GET", f"/job?id={UNKNOWN_ID}")[0] == 401

"""The caller's side of tokens and TLS: which server is the right one, what it is told, and what a person is told when it
goes wrong; from jobrunner.py and client.py.  Certificates are made here with openssl."""

import hashlib
import http.server
import json
import logging
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import types

import pytest

import jobrunner
import server
from harness import PATIENCE, ROOT, Lab, Server, read, shell, until
from jobrunner import BadRequest, JobrunnerError, NotTrusted, ServerApi, ServerAway, ServerRefused
from test_versions import python

pytestmark = pytest.mark.skipif(os.name == "nt", reason="processes, permissions and openssl as on Linux")

KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
HERE = "subjectAltName=DNS:localhost,IP:127.0.0.1"
TOKEN = "jr_" + "x" * 43


def openssl(folder, *words):
    done = subprocess.run(["openssl", *words], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout.decode()


class Room:
    """A folder with certificates and tokens, and a server on each certificate; `plain` has none."""

    def __init__(self, lab):
        self.lab, self.urls, self.seen = lab, {}, {}
        for name, names in (("good", HERE), ("other", HERE), ("elsewhere", "subjectAltName=DNS:elsewhere.example")):
            openssl(lab.folder, "req", "-x509", *KEY, "-keyout", f"{name}.key", "-out", f"{name}.pem", "-days", "30",
                    "-subj", "/CN=jobrunner", "-addext", names)  # fmt: skip
        lab.write("names", HERE)
        openssl(lab.folder, "req", "-new", "-key", "good.key", "-subj", "/CN=jobrunner", "-out", "request")
        openssl(lab.folder, "x509", "-req", "-in", "request", "-signkey", "good.key", "-days", "-1", "-extfile", "names",
                "-out", "expired.pem")  # fmt: skip
        shutil.copy(lab.path("good.key"), lab.path("expired.key"))
        made = lab.popen("server.py", "--make-tokens", "--token-file", "tokens", stdout=subprocess.PIPE)
        self.tokens = dict(line.split() for line in made.communicate()[0].decode().splitlines())
        for role, token in self.tokens.items():
            os.chmod(lab.write(role, token + "\n"), 0o600)
        for name in ("good", "expired", "elsewhere", "plain"):
            self.urls[name], self.seen[name] = self.start(name)

    def start(self, name, tokens="tokens", db=""):
        """(URL, fingerprint) of a server with this certificate."""
        tls = () if name == "plain" else ("--tls-cert", f"{name}.pem", "--tls-key", f"{name}.key")
        fixed = ("--bind", "127.0.0.1", "--port", 0, "--db", f"{db or name}.json", "--token-file", tokens)
        process = self.lab.popen("server.py", *fixed, *tls, stdout=subprocess.PIPE, log=f"{name}.log")
        line = process.stdout.readline().decode()
        assert " at http" in line, self.lab.log(f"{name}.log")
        fingerprint = process.stdout.readline().decode().split()[-1] if tls else ""
        return line.rsplit(" ", 1)[1].strip(), fingerprint


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    if not shutil.which("openssl"):
        pytest.skip("openssl, which makes the certificates, is missing")
    with Lab(str(tmp_path_factory.mktemp("room"))) as lab:
        yield Room(lab)


def bare(**more):
    """The environment, without a token or a server that it may name."""
    return {**{name: text for name, text in os.environ.items() if not name.startswith("JOBRUNNER_")}, **more}


# -- one plain sentence each


def cases(room):
    """name: (arguments, variables, what the sentence says)."""
    good, key = room.urls["good"], ("--token-file", room.lab.path("submit"))
    plain_as_tls = room.urls["plain"].replace("http:", "https:")
    ca = ("--tls-ca", room.lab.path("good.pem"))
    return {
        "unknown issuer": (good, key, {}, ["not signed by a CA that this machine knows", "--tls-ca", "--tls-fingerprint"]),
        "wrong CA": (good, ("--tls-ca", room.lab.path("other.pem"), *key), {}, ["not signed by a CA in", "other.pem"]),
        "wrong pin": (good, ("--tls-fingerprint", "ab:" * 31 + "AB", *key), {}, ["ab" * 32, room.seen["good"]]),
        "expired": (room.urls["expired"], ("--tls-ca", room.lab.path("expired.pem"), *key), {}, ["has expired"]),
        "another host": (room.urls["elsewhere"], ("--tls-ca", room.lab.path("elsewhere.pem"), *key), {},
                         ["is for another host", "127.0.0.1"]),
        "https to plain": (plain_as_tls, (*ca, *key), {}, ["does not speak TLS", "write http://"]),
        "http to TLS": (good.replace("https:", "http:"), key, {}, ["https://"]),
        "no token": (good, ca, {}, ["lets no one in without a token", "--token-file", "jobrunner.token"]),
        "wrong token": (good, ca, {"JOBRUNNER_TOKEN": TOKEN}, ["does not know the token from the variable JOBRUNNER_TOKEN"]),
        "wrong file": (good, (*ca, "--token-file", room.lab.path("wrong")), {}, ["does not know the token from", "/wrong"]),
    }  # fmt: skip


@pytest.mark.parametrize("which", ["oldest", "newest"])
def test_commands_say_in_one_sentence_why_they_do_not_get_through(room, which):
    os.chmod(room.lab.write("wrong", TOKEN), 0o600)
    for name, (url, arguments, variables, words) in cases(room).items():
        code, out, err = room.lab.command(
            "qstat", "--server", url, *arguments, python=python(which), env=bare(**variables)
        )
        assert (code, out, len(err.splitlines())) == (1, "", 1), (name, out, err)
        assert all(word in err for word in words), (name, err)
        assert "Traceback" not in err and TOKEN not in err and room.tokens["submit"] not in err


@pytest.mark.parametrize("which", ["oldest", "newest"])
def test_a_client_takes_the_same_for_a_server_that_is_away(room, which):
    os.chmod(room.lab.write("wrong", TOKEN), 0o600)
    started = {}
    for at, (name, (url, arguments, variables, words)) in enumerate(cases(room).items()):
        log = f"{which}-client-{at}.log"
        process = room.lab.client(url, *arguments, "--spool", f"{which}-{at}", python=python(which), log=log,
                                  env=bare(TMPDIR=room.lab.folder, **variables))  # fmt: skip
        started[name] = (process, log, words)
    for name, (process, log, words) in started.items():
        line = until(lambda: re.search(r".*server\.away.*\n", room.lab.log(log)), f"the client to say: {name}")[0]
        assert all(word in line for word in words) and "again_in=" in line, (name, line)
        assert process.poll() is None, (name, "it goes on trying")
        assert "Traceback" not in room.lab.log(log) and TOKEN not in room.lab.log(log)
        process.kill()


@pytest.mark.parametrize("which", ["oldest", "newest"])
def test_the_right_server_is_found_by_its_ca_or_its_fingerprint(room, which):
    pin = room.seen["expired"].upper()
    pin = ":".join(pin[at : at + 2] for at in range(0, 64, 2))
    for url, arguments, variables in (
        (room.urls["good"], ("--tls-ca", "good.pem"), {}),
        (room.urls["good"].replace("127.0.0.1", "localhost"), (), {"JOBRUNNER_TLS_CA": "good.pem"}),
        (room.urls["expired"], ("--tls-fingerprint", pin), {}),  # neither date nor name matter then
        (room.urls["elsewhere"], (), {"JOBRUNNER_TLS_FINGERPRINT": room.seen["elsewhere"]}),
        (room.urls["good"].replace("//", f"//me:{room.tokens['view']}@"), ("--tls-ca", "good.pem"), {}),
    ):
        given = () if "@" in url else ("--token-file", "view")
        code, out, err = room.lab.command("qstat", "-B", "--server", url, *given, *arguments, python=python(which),
                                          env=bare(**variables))  # fmt: skip
        assert (code, err) == (0, "") and "Active" in out, (url, err)


def test_a_role_that_does_not_do_is_said_with_the_role_that_would(room):
    code, _, err = room.lab.command("qsub", "--server", room.urls["good"], "--tls-ca", "good.pem", "--token-file", "view",
                                    "--", "true", env=bare())  # fmt: skip
    assert code == 1 and "view" in err and "submit" in err and len(err.splitlines()) == 1


def test_options_of_tls_are_refused_for_a_server_without(lab):
    code, _, err = lab.command("qstat", "--server", "127.0.0.1:1", "--tls-ca", "x.pem", env=bare())
    assert code == 1 and "https://" in err
    code, _, err = lab.command("qstat", "--server", "127.0.0.1:1", "--tls-fingerprint", "12:34", env=bare())
    assert code == 2 and "64 hex digits" in err
    code, _, err = lab.command("qstat", "--server", "127.0.0.1:1", env=bare(JOBRUNNER_TLS_FINGERPRINT="ab" * 32))
    assert code == 1 and "JOBRUNNER_TLS_FINGERPRINT is set" in err and len(err.splitlines()) == 1


# -- what is sent, and to whom


class Stub(http.server.ThreadingHTTPServer):
    """An HTTP server that notes (path, headers) of what it is asked, and the connections it took."""

    daemon_threads = True

    def __init__(self, answer, certificate="", key=""):
        self.asked, self.connections, self.answer = [], 0, answer
        super().__init__(("127.0.0.1", 0), StubHandler)
        self.url = f"http{'s' if certificate else ''}://127.0.0.1:{self.server_address[1]}"
        if certificate:
            self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.context.load_cert_chain(certificate, key)
            self.socket = self.context.wrap_socket(self.socket, server_side=True)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, *_):
        pass

    def process_request(self, *args):
        self.connections += 1
        super().process_request(*args)

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class StubHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.asked.append((self.path, dict(self.headers)))
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, headers, body = self.server.answer(self.path)
        self.send_response(status)
        for name, text in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_):
        pass


def yes(_):
    return 200, {}, b"{}"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_call_is_sent_on_to_another_place(status):
    with Stub(yes) as other, Stub(lambda path: (status, {"Location": other.url + path}, b"")) as stub:
        with pytest.raises(ServerRefused, match=re.escape(other.url)) as refused:
            ServerApi(stub.url, token=TOKEN).call("/status")
        assert refused.value.status == status and stub.asked[0][1]["Authorization"] == "Bearer " + TOKEN
        assert other.asked == []


def test_nothing_is_sent_to_a_server_with_another_certificate(room):
    """Not even after the handshake, which a pinned certificate does not end."""
    heard = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(room.lab.path("other.pem"), room.lab.path("other.key"))
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            with context.wrap_socket(listener.accept()[0], server_side=True) as peer:
                heard.append(peer.version())
                heard.append(peer.recv(1000))

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        api = ServerApi(f"https://127.0.0.1:{listener.getsockname()[1]}", "", TOKEN, "", room.seen["good"])
        with pytest.raises(NotTrusted):
            api.call("/status")
        thread.join(PATIENCE)
    assert heard[0] in ("TLSv1.2", "TLSv1.3") and heard[1:] == [b""]


def test_a_token_does_not_pass_a_proxy_in_plain():
    with Stub(yes) as proxy:
        for api in (
            lambda: ServerApi("http://far.example:1", proxy.url, TOKEN),
            lambda: ServerApi(f"http://me:{TOKEN}@far.example:1", proxy.url),
        ):
            with pytest.raises(BadRequest, match="in plain"):
                api()
        assert proxy.asked == []
        assert ServerApi("http://far.example:1", proxy.url).call("/status") == {}
        assert proxy.asked[0][0] == "http://far.example:1/status"


def test_a_proxy_on_the_way_to_https_sees_its_own_password_alone(room):
    heads = []
    with socket.create_server(("127.0.0.1", 0)) as listener, tls_stub(room) as stub:

        def carry(source, target):
            for data in iter(lambda: source.recv(65536), b""):
                target.sendall(data)

        def serve():
            near = listener.accept()[0]
            heads.append(near.recv(65536).decode())
            far = socket.create_connection(stub.server_address)
            near.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            threading.Thread(target=carry, args=(far, near), daemon=True).start()
            carry(near, far)

        threading.Thread(target=serve, daemon=True).start()
        proxy = f"http://me:secret@127.0.0.1:{listener.getsockname()[1]}"
        api = ServerApi(stub.url, proxy, TOKEN, room.lab.path("good.pem"))
        assert api.call("/status") == api.call("/status") == {}
    assert heads[0].startswith("CONNECT 127.0.0.1:") and "Proxy-Authorization: Basic" in heads[0]
    assert TOKEN not in heads[0]
    for path, headers in stub.asked:
        assert path == "/status" and headers["Authorization"] == "Bearer " + TOKEN
        assert "Proxy-Authorization" not in {name.title() for name in headers}


def tls_stub(room, answer=yes):
    return Stub(answer, room.lab.path("good.pem"), room.lab.path("good.key"))


def test_connections_with_tls_are_kept_and_made_anew_when_the_server_closed_them(room):
    with tls_stub(room, lambda path: (200, {"Connection": "close"} if path == "/last" else {}, b"{}")) as stub:
        api = ServerApi(stub.url, tls_ca=room.lab.path("good.pem"))
        for _ in range(3):
            api.call("/status")
        assert stub.connections == 1
        api.call("/last")
        api.call("/status", {})
        assert stub.connections == 2
        api._idle[0].sock.shutdown(socket.SHUT_RDWR)  # as after a time-out of the server's
        assert api.call("/status") == {} and stub.connections == 3


def test_a_server_that_answers_no_handshake_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(jobrunner, "HANDSHAKE_TIME", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        api = ServerApi(f"https://127.0.0.1:{listener.getsockname()[1]}")
        with pytest.raises(NotTrusted, match="if it has no TLS, write http://"):
            api.call("/status", timeout=3600)


def test_a_name_that_can_be_no_hosts_is_a_server_that_is_not_reached():
    with pytest.raises(ServerAway, match="cannot reach the server"):
        ServerApi("a..b:80").call("/status")


def test_a_token_found_later_does_not_pass_a_proxy_in_plain_either():
    with Stub(lambda path: (401, {}, b"")) as proxy:
        api = ServerApi("http://far.example:1", proxy.url, renew=lambda: (TOKEN, "a file"))
        with pytest.raises(ServerRefused, match="in plain"):
            api.call("/status")
        assert len(proxy.asked) == 1 and "Authorization" not in proxy.asked[0][1]


def test_a_server_that_hangs_up_may_want_https():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=lambda: listener.accept()[0].close(), daemon=True).start()
        with pytest.raises(ServerAway, match="or does it want https://"):
            ServerApi(f"http://127.0.0.1:{listener.getsockname()[1]}").call("/status")


def test_a_file_of_cas_that_is_put_right_is_taken_at_the_next_call(room):
    file = room.lab.path("changing.pem")
    shutil.copy(room.lab.path("other.pem"), file)
    os.utime(file, (1, 1))
    with tls_stub(room) as stub:
        api = ServerApi(stub.url, tls_ca=file)
        with pytest.raises(NotTrusted):
            api.call("/status")
        shutil.copy(room.lab.path("good.pem"), file)
        assert api.call("/status") == {}


# -- where tokens come from


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder that stands for that of the scripts; no token in the environment."""
    monkeypatch.setattr(jobrunner, "__file__", str(tmp_path / "jobrunner.py"))
    monkeypatch.delenv("JOBRUNNER_TOKEN", raising=False)
    return tmp_path


def token_file(path, data, mode=0o600):
    path.write_bytes(data)
    path.chmod(mode)
    return str(path)


def test_a_token_is_the_files_that_is_named_else_the_variables_else_that_of_the_file_beside(place, monkeypatch):
    find = lambda path="": jobrunner.find_token(path, pytest.fail)  # noqa: E731
    assert find() == ("", "")
    beside = token_file(place / "jobrunner.token", b"beside\n")
    assert find() == ("beside", beside)
    monkeypatch.setenv("JOBRUNNER_TOKEN", "variable")
    assert find() == ("variable", "the variable JOBRUNNER_TOKEN")
    named = token_file(place / "named", b"\xef\xbb\xbfnamed\r\n")
    assert find(named) == ("named", named)
    assert find(token_file(place / "wide", "wide\r\n".encode("utf-16")))[0] == "wide"  # PowerShell's >


@pytest.mark.skipif(os.name == "nt", reason="links take an administrator on Windows")
def test_a_token_is_found_beside_the_program_that_a_link_leads_to(tmp_path, monkeypatch):
    for name in ("opt", "pbs"):
        (tmp_path / name).mkdir()
    (tmp_path / "opt" / "jobrunner.py").touch()
    (tmp_path / "pbs" / "qsub").symlink_to(tmp_path / "opt" / "jobrunner.py")
    monkeypatch.setattr(jobrunner, "__file__", str(tmp_path / "pbs" / "qsub"))
    monkeypatch.delenv("JOBRUNNER_TOKEN", raising=False)
    token_file(tmp_path / "opt" / "jobrunner.token", b"there")
    assert jobrunner.find_token("", pytest.fail)[0] == "there"
    token_file(tmp_path / "pbs" / "jobrunner.token", b"nearer")
    assert jobrunner.find_token("", pytest.fail)[0] == "nearer"


@pytest.mark.parametrize(
    "data, words",
    [(b" \n", "is empty"), (b"two words", "single word"), ("t\u00f6ken".encode(), "ASCII"), (b"\xff\x00\xfe", "ASCII")],
)
def test_a_file_without_a_token_is_said_in_a_sentence_that_does_not_hold_it(place, data, words):
    with pytest.raises(JobrunnerError, match=words) as error:
        jobrunner.find_token(token_file(place / "bad", data), pytest.fail)
    assert "bad" in str(error.value) and "two" not in str(error.value)


def test_a_token_file_that_is_missing_is_an_error_and_not_no_token(lab):
    code, _, err = lab.command("qstat", "--server", "127.0.0.1:1", "--token-file", "none", env=bare())
    assert code == 1 and "cannot read" in err and len(err.splitlines()) == 1
    code, _, err = lab.command("qstat", "--server", "127.0.0.1:1", env=bare(JOBRUNNER_TOKEN="zwei Wörter"))
    assert code == 1 and "JOBRUNNER_TOKEN" in err and len(err.splitlines()) == 1


def test_a_token_file_that_others_can_read_is_warned_of_and_used(place):
    path, said = token_file(place / "open", TOKEN.encode(), 0o644), []
    assert jobrunner.find_token(path, said.append)[0] == TOKEN
    assert len(said) == 1 and f"chmod 600 {path}" in said[0]


def test_qsub_does_not_take_the_token_along_with_its_other_variables(monkeypatch):
    monkeypatch.setenv("JOBRUNNER_TOKEN", TOKEN)
    monkeypatch.setenv("OTHER", "1")
    env = jobrunner.with_items({"environ": True})["Env"]
    assert env["OTHER"] == "1" and TOKEN not in env.values()


# -- with a server of ours


def tls_options(room, token="submit"):
    return ("--tls-ca", room.lab.path("good.pem"), "--token-file", room.lab.path(token))


def test_a_job_goes_through_tls_with_a_token_and_never_sees_it(room):
    agent = room.tokens["agent"]
    room.lab.client(room.urls["good"], "--tls-ca", "good.pem", "--spool", "through", log="through.log",
                    env=bare(TMPDIR=room.lab.folder, JOBRUNNER_TOKEN=agent))  # fmt: skip
    until(lambda: "server.found" in room.lab.log("through.log"), "the client to get in")
    command = lambda *words: room.lab.command(*words[:1], "--server", room.urls["good"], *tls_options(room), *words[1:],  # noqa: E731
                                              env=bare(JOBRUNNER_TOKEN=room.tokens["submit"], SEEN="1"))  # fmt: skip
    code, out, err = command("qsub", "-V", "-W", "block=true", "--", "env")
    assert (code, err) == (0, ""), err
    code, printed, _ = command("qcat", out.strip())
    assert code == 0 and "SEEN=1" in printed and "PBS_JOBID" in printed
    _, everything, _ = command("qstat", "-x", "-f", out.strip())
    for text in (printed, everything, room.lab.log("through.log"), room.lab.log("good.log")):
        assert "JOBRUNNER_TOKEN" not in text and not any(token in text for token in room.tokens.values())


def entry(role, token):
    return {"Name": role, "Role": role, "Sha256": hashlib.sha256(token.encode()).hexdigest()}


def test_a_client_whose_token_is_withdrawn_keeps_its_job_and_goes_on_with_the_next_token(room):
    """Told of it in words; the job runs on, its report is kept, and nothing needs a restart."""
    lab, new = room.lab, "jr_" + "n" * 43
    tokens = {role: entry(role, token) for role, token in room.tokens.items()}

    def server_knows(**changed):
        lab.write("changing.new", json.dumps({"Tokens": list({**tokens, **changed}.values())}))
        os.chmod(lab.path("changing.new"), 0o600)
        os.replace(lab.path("changing.new"), lab.path("changing"))

    def client_has(token):
        os.chmod(lab.write("its.new", token), 0o600)
        os.replace(lab.path("its.new"), lab.path("its"))

    server_knows()
    client_has(room.tokens["agent"])
    url, _ = room.start("good", tokens="changing", db="withdrawn")
    ask = ServerApi(url, "", room.tokens["submit"], lab.path("good.pem"))
    lab.client(url, *tls_options(room, "its"), "--spool", "withdrawn", log="withdrawn.log")
    script = "touch $1.runs; until [ -e $1.go ]; do sleep 0.02; done; touch $1.over"
    jobs = ask.call("/add", [{"Params": shell(script, lab.path("held"))}])
    until(lambda: os.path.exists(lab.path("held.runs")), "the job to start")
    server_knows(agent=entry("agent", "another"))
    until(lambda: "changing tokens=3: read again" in lab.log("good.log"), "the server to know")
    lab.write("held.go", "")
    until(lambda: os.path.exists(lab.path("held.over")), "the job to end")
    until(lambda: "does not know the token from " + lab.path("its") in lab.log("withdrawn.log"), "a word about it")
    assert ask.call("/job", query={"id": jobs[0]["ID"]})["State"] == "R"
    client_has(new)
    server_knows(agent=entry("agent", new))
    job = until(lambda: (lambda job: job["State"] == "F" and job)(ask.call("/job", query={"id": jobs[0]["ID"]})))
    assert (job["Status"], job["ExitStatus"], job["RunCount"]) == ("finished", 0, 1)
    assert not any(token in lab.log("withdrawn.log") for token in (new, room.tokens["agent"]))


def test_nobody_else_gets_at_the_server_of_a_run(lab):
    job = {"Params": shell("env >seen; touch runs; until [ -e go ]; do sleep 0.02; done"), "WorkDir": lab.folder}
    lab.write("jobs", json.dumps([job]))
    running = lab.popen("jobrunner.py", "run", "jobs", "--db", "run.json", stdout=subprocess.DEVNULL)
    until(lambda: os.path.exists(lab.path("runs")), "the job to start")
    lines = [
        words for words in map(command_words, filter(str.isdigit, os.listdir("/proc"))) if lab.folder in "".join(words)
    ]
    (client,) = (words for words in lines if words[1:2] == [os.path.join(ROOT, "client.py")])
    server = Server(None, client[client.index("--server") + 1], "")
    assert server.get("/status")[0] == 401
    assert server.post("/add", [{"Params": ["true"]}])[0] == 401
    assert "jr_" not in str(lines)  # what ps shows
    assert "PBS_JOBID" in lab.log("seen") and "JOBRUNNER_TOKEN" not in lab.log("seen")
    lab.write("go", "")
    assert running.wait(PATIENCE) == 0


def test_a_run_goes_on_on_its_only_host_however_many_jobs_cannot_start(lab):
    lab.write("jobs", json.dumps([{"Params": ["/no/such/program"]}] * 12 + [{"Params": ["true"]}]))
    code, out, _ = lab.command("run", "jobs", "-j", "1")
    assert code == 1 and "1 of 13 jobs finished" in out


def command_words(pid):
    return read(f"/proc/{pid}/cmdline").split("\0")


@pytest.mark.parametrize("windows, timeout", [(True, server.IDLE), (False, None)])
def test_a_look_whether_a_tls_client_is_still_there_leaves_the_time_out_that_windows_needs(
    monkeypatch, windows, timeout
):
    """There nobody else can wake a thread that reads or writes."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        connection = types.SimpleNamespace(
            pending=lambda: 1, setblocking=ours.setblocking, recv=ours.recv, settimeout=ours.settimeout
        )
        handler = server.Handler.__new__(server.Handler)
        handler.connection, handler.rest = connection, types.SimpleNamespace(first=b"")
        handler.server = types.SimpleNamespace(tls=types.SimpleNamespace(not_yet=BlockingIOError))
        monkeypatch.setattr(server, "WINDOWS", windows)
        assert handler._alive_in_tls()
        assert ours.gettimeout() == timeout


# -- the log in a file


def test_a_log_file_is_its_owners_and_turns_over(tmp_path):
    path = tmp_path / "log"
    handler = jobrunner._log_file(str(path), 1000, 2)
    for number in range(100):
        handler.emit(logging.makeLogRecord({"msg": f"line {number:03d} \ud800 {'x' * 80}"}))
    handler.close()
    assert sorted(os.listdir(tmp_path)) == ["log", "log.1", "log.2"]
    for name in os.listdir(tmp_path):
        assert (tmp_path / name).stat().st_size <= 1000 and (tmp_path / name).stat().st_mode & 0o777 == 0o600
    assert "line 099" in path.read_text()


def test_a_log_that_cannot_turn_over_goes_on_where_it_is(tmp_path, monkeypatch, capsys):
    """As on Windows, where a file that somebody reads cannot be renamed."""

    def refuse(*_):
        raise PermissionError(13, "somebody reads it")

    path, rename = tmp_path / "log", os.rename
    for number in (1, 2):
        (tmp_path / f"log.{number}").write_text(f"older {number}")
    handler = jobrunner._log_file(str(path), 100, 2)
    monkeypatch.setattr(os, "rename", lambda old, new: refuse() if str(old) == str(path) else rename(old, new))
    for number in range(9):
        handler.emit(logging.makeLogRecord({"msg": f"line {number} {'x' * 80}"}))
    handler.close()
    assert len(path.read_text().splitlines()) == 9 and capsys.readouterr().err == ""
    assert [(tmp_path / f"log.{number}").read_text() for number in (1, 2)] == ["older 1", "older 2"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_log_on_a_full_disk_loses_lines_and_nothing_else(capsys):
    handler = jobrunner._log_file("/dev/full", 0, 0)
    handler.emit(logging.makeLogRecord({"msg": "a line"}))
    assert capsys.readouterr().err == ""


def test_a_client_logs_into_the_file_it_is_given(lab):
    lab.client("127.0.0.1:1", "--log-file", "its.log", log="stderr")
    until(lambda: "server.away" in read(lab.path("its.log")), "the client's log")
    assert "client.start" in lab.log("its.log") and lab.log("stderr") == ""
    assert os.stat(lab.path("its.log")).st_mode & 0o777 == 0o600
    refused = lab.client("127.0.0.1:1", "--log-file", "no/such/folder", log="refused")
    assert refused.wait(PATIENCE) == 1
    assert "--log-file" in lab.log("refused") and len(lab.log("refused").splitlines()) == 1


def test_plain_http_does_without_ssl():
    """It is 8 ms and 1 MB, of every command and every client."""
    code = ("import sys, jobrunner as j\ntry: j.ServerApi('http://127.0.0.1:1', token='t').call('/status')\n"
            "except j.ServerAway: print('ssl' in sys.modules)")  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE).stdout == b"False\n"

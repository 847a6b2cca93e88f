"""HTTP where it is taken strictly, and what bad peers may cost: forms by which requests are smuggled past a proxy, slow
and silent connections, too many of them, and HTTPS.
"""

import contextlib
import os
import select
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time

import pytest
from harness import PATIENCE, ROOT, Server, until
from test_access import TOKENS, bearer, tokens_file
from test_original import Wire
from test_wire import ask, assert_refused, picture

import server as server_module

ADD = b'{"Params":["true"]}'

PROGRAM = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import server
for name, value in (word.split("=") for word in sys.argv.pop(1).split()):
    setattr(server, name, float(value))
sys.exit(server.main())
"""


def start(lab, *arguments, log="server.py.log", **settings):
    """A server with other settings than it has; `start(lab, IDLE=1)`."""
    words = " ".join(f"{name}={value}" for name, value in settings.items())
    command = [sys.executable, "-c", PROGRAM, ROOT, words, "--bind", "127.0.0.1", "--port", "0", *map(str, arguments)]
    with open(lab.path(log), "ab") as file:
        process = subprocess.Popen(command, cwd=lab.folder, stdout=subprocess.PIPE, stderr=file)
    lab.processes.append(process)
    line = process.stdout.readline().decode()
    assert " at http" in line, lab.log(log)
    server = Server(process, line.split(" at ")[1].strip(), lab.path("jobs.json"))
    if server.url.startswith("https"):
        server.fingerprint = process.stdout.readline().decode().split()[-1]
    return server


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One server for tests that change nothing in it."""
    from harness import Lab

    with Lab(str(tmp_path_factory.mktemp("shared"))) as lab:
        yield lab.server()


# ---------------------------------------------------------------------------------------------------------------------
# Requests that two readers could understand differently
# ---------------------------------------------------------------------------------------------------------------------

LENGTH = b"Content-Length: 19\r\n"
SMUGGLED = {
    "two lengths": b"POST /add HTTP/1.1\r\n" + LENGTH + b"Content-Length: 5\r\n\r\n" + ADD,
    "two equal lengths": b"POST /add HTTP/1.1\r\n" + LENGTH + LENGTH + b"\r\n" + ADD,
    "a list of lengths": b"POST /add HTTP/1.1\r\nContent-Length: 19, 19\r\n\r\n" + ADD,
    "chunks and a length": b"POST /add HTTP/1.1\r\nTransfer-Encoding: chunked\r\n" + LENGTH + b"\r\n0\r\n\r\n",
    "a length and chunks": b"POST /add HTTP/1.1\r\n" + LENGTH + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "two codings": b"POST /add HTTP/1.1\r\nTransfer-Encoding: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a bare LF after the first line": b"POST /add HTTP/1.1\n" + LENGTH + b"\r\n" + ADD,
    "a bare LF after a header": b"POST /add HTTP/1.1\r\nContent-Length: 19\n\r\n" + ADD,
    "a bare LF at the end": b"POST /add HTTP/1.1\r\n" + LENGTH + b"\n" + ADD,
    "a bare CR in a value": b"POST /add HTTP/1.1\r\nX: a\rContent-Length: 19\r\n\r\n" + ADD,
    "a folded line": b"POST /add HTTP/1.1\r\nX: a\r\n b\r\n" + LENGTH + b"\r\n" + ADD,
    "a folded length": b"POST /add HTTP/1.1\r\nContent-Length:\r\n 19\r\n\r\n" + ADD,
    "a folded first line": b"POST /add HTTP/1.1\r\n " + LENGTH + b"\r\n" + ADD,
    "a blank before the colon": b"POST /add HTTP/1.1\r\nContent-Length : 19\r\n\r\n" + ADD,
    "a tab before the colon": b"POST /add HTTP/1.1\r\nTransfer-Encoding\t: chunked\r\n\r\n" + ADD,
    "a name in brackets": b"POST /add HTTP/1.1\r\n(X): a\r\n" + LENGTH + b"\r\n" + ADD,
    "a name not in ASCII": b"POST /add HTTP/1.1\r\n\xe4: a\r\n" + LENGTH + b"\r\n" + ADD,
    "an empty name": b"POST /add HTTP/1.1\r\n: a\r\n" + LENGTH + b"\r\n" + ADD,
    "a NUL in a name": b"POST /add HTTP/1.1\r\nX\0: a\r\n" + LENGTH + b"\r\n" + ADD,
    "a NUL in a value": b"POST /add HTTP/1.1\r\nX: a\0\r\n" + LENGTH + b"\r\n" + ADD,
    "a length with a plus": b"POST /add HTTP/1.1\r\nContent-Length: +19\r\n\r\n" + ADD,
    "a length with a blank": b"POST /add HTTP/1.1\r\nContent-Length: 1 9\r\n\r\n" + ADD,
    "a length of 19 digits": b"POST /add HTTP/1.1\r\nContent-Length: 0000000000000000019\r\n\r\n" + ADD,
    "a length in other digits": "POST /add HTTP/1.1\r\nContent-Length: ١٩\r\n\r\n".encode() + ADD,
    "two hosts": b"POST /add HTTP/1.1\r\nHost: a\r\nHost: b\r\n" + LENGTH + b"\r\n" + ADD,
    "two blanks": b"GET  /add HTTP/1.1\r\n\r\n",
    "a tab": b"GET\t/add HTTP/1.1\r\n\r\n",
    "a blank first": b" GET /add HTTP/1.1\r\n\r\n",
    "a blank last": b"GET /add HTTP/1.1 \r\n\r\n",
    "a NUL in the URL": b"GET /add\0 HTTP/1.1\r\n\r\n",
    "a form feed in the URL": b"GET /add\x0c HTTP/1.1\r\n\r\n",
    "no version": b"GET /add\r\n\r\n",
    "another version": b"GET /add HTTP/2.0\r\n\r\n",
    "a longer version": b"GET /add HTTP/1.11\r\n\r\n",
    "small letters": b"GET /add http/1.1\r\n\r\n",
    "no slash": b"GET add HTTP/1.1\r\n\r\n",
    "a star": b"OPTIONS * HTTP/1.1\r\n\r\n",
    "another scheme": b"GET ftp://x/add HTTP/1.1\r\n\r\n",
}


@pytest.mark.parametrize("case", SMUGGLED)
def test_what_two_readers_could_understand_differently_is_400_and_the_connection_closed(shared, case):
    before = picture(shared)
    with Wire(shared) as wire:
        wire.send(SMUGGLED[case] + b"GET /add?configuration=%7B%22Params%22:%5B%22x%22%5D%7D HTTP/1.1\r\n\r\n")
        answer = wire.answer()
        assert_refused((answer.status, answer.json), 400)
        assert answer.headers["connection"] == "close"
        assert wire.ended()
    assert picture(shared) == before


@pytest.mark.parametrize("coding", [b"chunked", b"identity", b"gzip", b"x"])
def test_any_transfer_coding_is_411(shared, coding):
    with Wire(shared) as wire:
        wire.send(b"POST /add HTTP/1.1\r\nTransfer-Encoding: %b\r\n\r\n0\r\n\r\n" % coding)
        answer = wire.answer()
        assert_refused((answer.status, answer.json), 411)
        assert wire.ended()


@pytest.mark.parametrize("target", [b"http://jobs/status", b"HTTP://jobs:8088/status?x=1", b"https://[::1]/status"])
def test_a_whole_url_as_proxies_are_sent_it_is_understood(shared, target):
    with Wire(shared) as wire:
        for _ in range(2):  # by Front and by a thread
            wire.send(b"GET %b HTTP/1.1\r\nHost: jobs\r\n\r\n" % target)
            assert wire.answer().status == 200


def test_values_may_hold_what_other_clients_put_there(shared):
    odd = b'Cookie: a=b; c="d"\r\nX-Y_z.1!: \t(x) \xe4\xff ,;:\t\r\nEmpty:\r\nAccept: a\r\nAccept: b\r\n'
    with Wire(shared) as wire:
        wire.send(b"GET /status HTTP/1.1\r\n" + odd + b"\r\n")
        assert wire.answer().status == 200


def test_https_to_a_plain_port_is_told_so_at_once(shared):
    context = ssl.create_default_context()
    with socket.create_connection(("127.0.0.1", shared.port), timeout=PATIENCE) as connection:
        with pytest.raises(ssl.SSLError):
            context.wrap_socket(connection, server_hostname="localhost")


# ---------------------------------------------------------------------------------------------------------------------
# Slow, silent and many
# ---------------------------------------------------------------------------------------------------------------------

SLOW = {
    "a head of which nothing comes": (b"", {"IDLE": 0.5}),
    "a head": (b"GET /status HTTP/1.1\r\nX: ", {"HEAD_TIME": 0.5}),
    "the first line": (b"GET /sta", {"HEAD_TIME": 0.5}),
    "a body": (b"POST /add HTTP/1.1\r\nContent-Length: 1000\r\n\r\n", {"BODY_TIME": 0.5}),
}


@pytest.mark.parametrize("case", SLOW)
def test_what_comes_too_slowly_is_cut_off_however_often_a_byte_comes(lab, case):
    begin, settings = SLOW[case]
    server = start(lab, **settings)
    with Wire(server) as wire:
        wire.send(begin)
        wire.socket.settimeout(0.1)

        def is_closed():
            try:
                if case != "a head of which nothing comes":
                    wire.send(b"x")
                return wire.socket.recv(1) == b""
            except socket.timeout:
                return False
            except OSError:
                return True

        until(is_closed, "the server to hang up")
    with Wire(server) as wire:
        assert wire.go("/status").json["Jobs"] == 0


def test_who_does_not_read_an_answer_is_cut_off(lab):
    server = start(lab, ANSWER_TIME=0.5, SLOWEST=1e9)
    server.add({"Params": ["echo", "x" * 1000000]})
    with Wire(server) as wire:
        wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        wire.send(b"GET /dump HTTP/1.1\r\n\r\n" * 20)
        until(lambda: connections(server) == 0, "the server to hang up")
    assert server.process.poll() is None


def connections(server):
    """How many connections the server has, by the system's word."""
    found = 0
    for name in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError), open(name) as file:
            for line in file.readlines()[1:]:
                words = line.split()
                found += words[1].endswith(f":{server.port:04X}") and words[3] == "01"
    return found


def test_a_long_poll_and_a_large_body_on_a_busy_line_are_not_cut_off(lab):
    server = start(lab, IDLE=0.3, HEAD_TIME=0.3, ANSWER_TIME=0.3)
    with Wire(server) as wire:
        wire.post("/request", ask("h1", wait=2))
        assert wire.silent(1.5)
        assert wire.answer().status == 200
    with Wire(server) as wire:
        wire.send(b"POST /add HTTP/1.1\r\nContent-Length: 19\r\n\r\n")
        assert wire.silent(1.5)
        assert wire.send(ADD).answer().status == 200


def test_500_slow_connections_cost_nobody_service(lab):
    """They send a byte a second while a client runs 50 jobs; how long its requests take: tests/bench/slow.py."""
    server = lab.server()
    numbers = server.add(*[["true"]] * 50)
    over = threading.Event()
    slow = [socket.create_connection(("127.0.0.1", server.port), PATIENCE) for _ in range(500)]
    heads = [
        b"GET /status HTTP/1.1\r\nX: " + b"y" * 1000,
        b"POST /add HTTP/1.1\r\nContent-Length: 900\r\n\r\n" + b"[" * 900,
    ]

    def drip():
        for at in range(900):
            for number, connection in enumerate(slow):
                with contextlib.suppress(OSError):  # after 20 s
                    connection.send(heads[number % 2][at : at + 1])
            if over.wait(1):
                return

    dripping = threading.Thread(target=drip)
    dripping.start()
    try:
        until(lambda: connections(server) >= 500, "500 connections")
        lab.client(server, max_jobs=4)
        until(lambda: server.status()["Statuses"]["finished"] == len(numbers), "the jobs to end", 60)
    finally:
        over.set()
        dripping.join()
        for connection in slow:
            connection.close()


def test_connections_over_the_limit_are_503_and_served_again_when_others_have_closed(lab):
    server = lab.server("--max-connections", 5)
    wires = [Wire(server) for _ in range(5)]
    assert all(wire.go("/status").status == 200 for wire in wires)
    for _ in range(200):  # more than are kept for a moment
        with Wire(server) as wire:
            wire.send(b"GET /status HTTP/1.1\r\n\r\n")
            answer = wire.answer()
            assert_refused((answer.status, answer.json), 503)
            assert int(answer.headers["retry-after"]) > 0 and wire.ended()
    assert wires[0].go("/status").status == 200
    for wire in wires[1:]:
        wire.hang_up()
    until(lambda: server.fetch("/status")[0] == 200, "room")
    wires[0].hang_up()


def test_who_holds_all_connections_without_being_let_in_makes_room_for_who_is(lab):
    """By Front, by a thread, with half a head, and refused: none of them is one that was let in."""
    tokens_file(lab)
    server = start(lab, "--max-connections", 8, STRANGER_TIME=0)
    ways = [b"", b"GET /sta", b"POST /add HTTP/1.1\r\nX: ", b"GET /status HTTP/1.1\r\n\r\n"]
    right = b"GET /status HTTP/1.1\r\n%b\r\n" % bearer(TOKENS["view"])
    with Wire(server) as first:
        assert first.send(right).answer().status == 200
        strangers = [Wire(server) for _ in range(16)]
        try:
            for number, wire in enumerate(strangers):
                with contextlib.suppress(OSError):  # the first ones have made room for the last ones
                    wire.send(ways[number % 4])
            for _ in range(8):
                with Wire(server) as wire:
                    assert wire.send(right).answer().status == 200
            assert first.send(right).answer().status == 200
        finally:
            for wire in strangers:
                wire.hang_up()


def test_strangers_are_not_hung_up_on_at_once(lab):
    server = start(lab, "--max-connections", 2, STRANGER_TIME=600)
    with Wire(server) as one, Wire(server) as two, Wire(server) as three:
        assert three.answer().status == 503
        assert one.go("/status").status == two.go("/status").status == 200


@pytest.mark.parametrize("path", ["/status", "/jobs"])
def test_a_long_line_with_a_mistake_at_its_end_holds_up_nobody(shared, path):
    """A minute, in which nobody else was served, when blanks could be shared out in many ways."""
    with Wire(shared) as wire:
        wire.send(b"GET %b HTTP/1.1\r\nX:%b\0\r\n\r\n" % (path.encode(), b" \t" * 32000))
        began = time.process_time()
        pattern = server_module._HEADER_LINE
        assert not pattern(b"X:" + b" \t" * 32000 + b"\0") and time.process_time() - began < 1
        assert wire.answer().status == 400


def test_all_header_lines_together_have_a_limit(shared):
    line = b"X: " + b"y" * 60000 + b"\r\n"
    for many, status in ((4, 200), (5, 431)):
        with Wire(shared) as wire:
            wire.send(b"GET /status HTTP/1.1\r\n" + line * many + b"\r\n")
            assert wire.answer().status == status


def test_long_urls_have_a_limit_in_number_and_are_taken_again(lab):
    server = start(lab, LONG_LINES=2)
    long = b"GET /status?x=" + b"y" * 70000
    with Wire(server) as one, Wire(server) as two:
        one.send(long), two.send(long)

        def is_refused():
            with Wire(server) as wire:
                wire.send(long + b" HTTP/1.1\r\n\r\n")
                return wire.answer().status == 503

        until(is_refused, "both to be read")
        assert server.get("/status")[0] == 200  # whose line is short
        assert one.send(b" HTTP/1.1\r\n\r\n").answer().status == 200
        assert one.send(long + b" HTTP/1.1\r\n\r\n").answer().status == 200


@pytest.mark.skipif(
    not os.path.exists("/proc/self/statm"), reason="there is no /proc here, by which memory is measured"
)
def test_bodies_that_are_being_read_have_a_limit_together_and_take_no_memory_before_they_come(lab):
    server = start(lab, "--max-body", "1gb", LARGE_ROOM=1, log="memory.log")
    before = memory(server)
    announced = [Wire(server) for _ in range(30)]
    try:
        for wire in announced:
            wire.send(b"POST /add HTTP/1.1\r\nContent-Length: 1000000000\r\n\r\n[")
        assert server.get("/status")[0] == 200
        assert memory(server) - before < 2 << 30  # 30 GB, were it taken at once: what Windows cannot give
    finally:
        for wire in announced:
            wire.hang_up()
    server = start(lab, "--max-body", "300kb", "--db", "other.json", LARGE_ROOM=1)
    half, rest = b'{"Params":["%b' % (b"x" * 270000), b'"]}'
    head = b"POST /add HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % (len(half) + len(rest))
    wires = [Wire(server) for _ in range(3)]
    try:
        for wire in wires:
            wire.send(head + half)
        refused = select.select([wire.socket for wire in wires], [], [], PATIENCE)[0]  # two fit, whichever they are
        assert refused and server.add(["true"])  # small ones are always taken
        for wire in wires:
            if wire.socket in refused:
                assert wire.answer().status == 503
    finally:
        for wire in wires:
            wire.hang_up()
    until(lambda: post_status(server, head + half + rest) == 200, "room")


def post_status(server, request):
    with Wire(server) as wire:
        return wire.send(request).answer().status


def memory(server):
    """Bytes of address space the server has."""
    with open(f"/proc/{server.process.pid}/statm") as file:
        return int(file.read().split()[0]) * 4096


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit on open files")
def test_a_server_that_may_open_few_files_takes_fewer_connections_and_goes_on(lab):
    limited = "import os, resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300)); os.execv(sys.executable, [sys.executable] + sys.argv[1:])"
    server = lab.server(python=[sys.executable, "-c", limited])
    assert "http.limit" in lab.log("server.py.log")
    held = []
    try:
        for _ in range(400):
            held.append(socket.create_connection(("127.0.0.1", server.port), PATIENCE))
            if len(held) in (1, 400):  # a connection that was let in is not closed for others
                held[0].sendall(b"GET /add?configuration=%7B%22Params%22:%5B%22x%22%5D%7D HTTP/1.1\r\n\r\n")
                assert held[0].recv(10000).startswith(b"HTTP/1.1 200")
    finally:
        for connection in held:
            connection.close()
    until(lambda: server.fetch("/status")[0] == 200, "room")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit on open files")
def test_a_server_without_any_file_left_goes_on_when_there_are_some(lab):
    server = start(lab, FEW_FILES=0)
    import resource

    if not hasattr(resource, "prlimit"):
        pytest.skip("no prlimit here")
    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (30, 4096))
    held = [socket.create_connection(("127.0.0.1", server.port), PATIENCE) for _ in range(60)]
    until(lambda: "http.accept" in lab.log("server.py.log"), "accept to fail")
    for connection in held:
        connection.close()
    until(lambda: server.fetch("/status")[0] == 200, "it to go on")
    assert "Traceback" not in lab.log("server.py.log")


def test_a_thousand_connections_at_once_are_all_answered(lab):
    server = lab.server()
    wires = [Wire(server) for _ in range(1000)]
    try:
        for number, wire in enumerate(wires):
            wire.send(b"GET /status HTTP/1.1\r\n\r\n" if number % 2 else b"GET /jobs HTTP/1.1\r\n\r\n")
        assert {wire.answer().status for wire in wires} == {200}
    finally:
        for wire in wires:
            wire.hang_up()


# ---------------------------------------------------------------------------------------------------------------------
# HTTPS
# ---------------------------------------------------------------------------------------------------------------------

needs_openssl = pytest.mark.skipif(not shutil.which("openssl"), reason="certificates are made with openssl, not here")


def certificate(folder, name):
    """A self-signed certificate for localhost, with its key: (certificate, key)."""
    paths = [os.path.join(str(folder), f"{name}.{kind}") for kind in ("crt", "key")]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-out", paths[0], "-keyout", paths[1]]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return paths


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    folder = tmp_path_factory.mktemp("certificates")
    return certificate(folder, "a"), certificate(folder, "b")


class Secure(Wire):
    """A Wire in TLS, which trusts one certificate."""

    def __init__(self, server, ca, name="localhost", **settings):
        context = ssl.create_default_context(cafile=ca)
        for key, value in settings.items():
            setattr(context, key, value)
        self.port = server.port
        plain = socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE)
        try:
            self.socket = context.wrap_socket(plain, server_hostname=name)
        except BaseException:
            plain.close()
            raise
        self.file = self.socket.makefile("rb")


@pytest.fixture
def secure(lab, certificates):
    (cert, key), _ = certificates
    return start(lab, "--tls-cert", cert, "--tls-key", key)


@needs_openssl
def test_https_works_as_http_does_with_the_right_certificate(secure, certificates):
    (cert, _), _ = certificates
    assert secure.url.startswith("https://127.0.0.1:")
    with Secure(secure, cert) as wire:
        for path, status in (("/status", 200), ("/nope", 404), ("/dump", 200)):
            assert wire.go(path).status == status
        assert wire.post("/add", {"Params": ["x" * 300000]}).answer().json[0]["Number"] == 1
        wire.send(b"GET /job?id=1 HTTP/1.1\r\n\r\n" * 3)  # pipelined
        assert {len(wire.answer().json["Params"][0]) for _ in range(3)} == {300000}
        printed = ssl.PEM_cert_to_DER_cert(ssl.DER_cert_to_PEM_cert(wire.socket.getpeercert(True)))
        assert server_module.hashlib.sha256(printed).hexdigest() == secure.fingerprint
    with Secure(secure, cert) as wire:
        wire.send(b"GET /dump HTTP/1.0\r\n\r\n")
        assert wire.answer().status == 200 and wire.ended()
    with Secure(secure, cert) as wire:
        wire.send(b"nonsense\r\n\r\n")
        assert wire.answer().status == 400 and wire.ended()


@needs_openssl
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
def test_another_certificate_is_not_trusted_and_old_versions_of_tls_are_refused(secure, certificates):
    (cert, _), (other, _) = certificates
    with pytest.raises(ssl.SSLCertVerificationError):
        Secure(secure, other)
    with pytest.raises(ssl.SSLCertVerificationError):
        Secure(secure, cert, name="evil.example")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    with socket.create_connection(("127.0.0.1", secure.port), timeout=PATIENCE) as plain:
        with pytest.raises(OSError):
            context.wrap_socket(plain)
    with Secure(secure, cert) as wire:
        assert wire.go("/status").status == 200


@needs_openssl
def test_plain_http_to_a_port_of_https_is_told_so(secure, certificates, lab):
    with Wire(secure) as wire:
        wire.send(b"GET /status HTTP/1.1\r\n\r\n")
        answer = wire.answer()
        assert "https://" in assert_refused((answer.status, answer.json), 400)
        assert wire.ended()
    with Wire(secure) as wire:
        wire.send(b"\x16\x03\x01nonsense that is no handshake\r\n\r\n")
        wire.file.read()  # an alert; it ends
    assert "Traceback" not in lab.log("server.py.log")


@needs_openssl
def test_a_handshake_that_does_not_go_on_is_cut_off_and_holds_up_nobody(lab, certificates):
    (cert, key), _ = certificates
    server = start(lab, "--tls-cert", cert, "--tls-key", key, HANDSHAKE_TIME=1)
    with Wire(server) as silent, Wire(server) as half:
        half.send(b"\x16\x03\x01\x02")
        with Secure(server, cert) as wire:
            assert wire.go("/status").status == 200
        assert silent.ended() and half.ended()


@needs_openssl
@pytest.mark.parametrize("politely", [True, False])
def test_a_client_that_hung_up_while_it_waited_gets_no_job_in_tls_either(secure, certificates, politely):
    (cert, _), _ = certificates
    wire = Secure(secure, cert)
    wire.post("/request", ask("gone", wait=20))
    with Secure(secure, cert) as other:
        until(lambda: other.go("/nodes").json["Nodes"], "the server to know of it")
        if politely:
            with contextlib.suppress(OSError):  # says so in TLS, and waits for the answer to that
                wire.socket.settimeout(0.1)
                wire.socket.unwrap()
        wire.hang_up()
        other.post("/add", {"Params": ["true"]})
        assert other.answer().status == 200
        other.post("/request", ask("there", wait=20))
        assert len(other.answer().json["Jobs"]) == 1


@needs_openssl
def test_a_request_behind_a_long_poll_is_answered_after_it_in_tls(secure, certificates):
    (cert, _), _ = certificates
    with Secure(secure, cert) as wire, Secure(secure, cert) as other:
        wire.post("/request", ask("h1", wait=20))
        until(lambda: other.go("/nodes").json["Nodes"], "the server to know of it")
        wire.send(b"GET /status HTTP/1.1\r\n\r\n")
        other.post("/add", {"Params": ["true"]})
        assert other.answer().status == 200
        assert len(wire.answer().json["Jobs"]) == 1
        assert wire.answer().json["Jobs"] == 1


@needs_openssl
def test_a_certificate_that_is_replaced_counts_at_once_and_a_bad_one_not_at_all(lab, certificates):
    old, new = certificates
    names = [lab.path("my.crt"), lab.path("my.key")]
    for source, name in zip(old, names):
        shutil.copy(source, name)
    server = start(lab, "--tls-cert", names[0], "--tls-key", names[1])

    def trusted(cert):
        try:
            with Secure(server, cert) as wire:
                return wire.go("/status").status == 200
        except ssl.SSLError:
            return False

    assert trusted(old[0])
    shutil.copy(new[0], names[0])  # which does not belong to the key
    until(lambda: "tls.certificate error" in lab.log("server.py.log"), "it to be noticed")
    assert trusted(old[0])
    shutil.copy(new[1], names[1])
    until(lambda: trusted(new[0]), "the new one to count")
    assert not trusted(old[0])


@needs_openssl
def test_an_expired_certificate_is_served_and_not_trusted(lab, tmp_path):
    made = [str(tmp_path / name) for name in ("crt", "key", "csr")]
    request = ["openssl", "req", "-new", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-keyout", made[1]]
    sign = ["openssl", "x509", "-req", "-in", made[2], "-signkey", made[1], "-days", "-1", "-out", made[0]]
    for command in (request + ["-out", made[2]], sign):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    server = start(lab, "--tls-cert", made[0], "--tls-key", made[1])
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        Secure(server, made[0])


@needs_openssl
@pytest.mark.parametrize("case", ["missing", "no certificate", "another key", "a key with a password", "a key alone"])
def test_a_server_does_not_start_with_a_certificate_it_cannot_use(lab, certificates, case):
    (cert, key), (_, other) = certificates
    if case == "a key with a password":
        key = lab.path("locked.key")
        subprocess.run(["openssl", "rsa", "-aes128", "-passout", "pass:x", "-in", certificates[0][1], "-out", key], check=True,
                       stderr=subprocess.DEVNULL)  # fmt: skip
    arguments = {
        "missing": ["--tls-cert", "nope"],
        "no certificate": ["--tls-cert", key],
        "another key": ["--tls-cert", cert, "--tls-key", other],
        "a key with a password": ["--tls-cert", cert, "--tls-key", key],
        "a key alone": ["--tls-key", key],
    }[case]
    command = [sys.executable, os.path.join(ROOT, "server.py"), "--port", "0", "--bind", "127.0.0.1", *arguments]
    done = subprocess.run(command, cwd=lab.folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          timeout=PATIENCE)  # fmt: skip
    said = done.stderr.decode()
    assert done.returncode == 1 and done.stdout == b""
    assert len(said.splitlines()) == 1 and "Traceback" not in said, said


@needs_openssl
@pytest.mark.skipif(not shutil.which("curl"), reason="there is no curl here")
def test_curl_speaks_https_with_it(secure, certificates):
    (cert, _), (other, _) = certificates
    url = secure.url.replace("127.0.0.1", "localhost") + "/dump"

    def curl(ca):
        return subprocess.run(
            ["curl", "-s", "--noproxy", "*", "--cacert", ca, url], stdout=subprocess.PIPE, timeout=PATIENCE
        )

    assert curl(cert).returncode == 0 and b"Available" in curl(cert).stdout
    assert curl(other).returncode == 60

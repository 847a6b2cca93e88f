"""A real browser, headless, on pages of other sites that try to make the server run something: it does not.

The server has no tokens here: with them a page could not get in anyway, for it has none.
"""

import json
import os
import shutil
import signal
import subprocess
import urllib.parse

import pytest

from harness import PATIENCE, until
from test_connections import Stub

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="chromium, the browser that tries it, is missing")

# Each way a page has to send a request elsewhere; that it is done with all goes to the page's own server.
PAGE = """<!doctype html><body><script>
const server = SERVER, job = '{"Params":["evil"]}', get = server + '/add?configuration=' + encodeURIComponent(job);
const went = (what) => (answer) => what + ' ' + (answer.type || 'loaded');
const failed = (what) => (error) => what + ' failed';
const sent = (what, url, more) => fetch(url, more).then(went(what), failed(what));
const frame = (what, method, action, value, name) => new Promise((resolve) => {
  const target = document.createElement('iframe'), form = document.createElement('form');
  target.name = what;
  document.body.append(target, form);
  Object.assign(form, {method: method, action: action, target: what, enctype: method == 'post' ? 'text/plain' : ''});
  const field = form.appendChild(document.createElement('input'));
  field.name = name; field.value = value;
  target.onload = () => {
    try { if (target.contentWindow.location.href == 'about:blank') return; } catch (anothers) { }
    resolve(what + ' loaded');
  };
  form.submit();
});
const picture = (url) => new Promise((resolve) => {
  const image = document.body.appendChild(new Image());
  image.onload = image.onerror = () => resolve('picture loaded');
  image.src = url;
});
Promise.all([
  sent('post', server + '/add', {method: 'POST', mode: 'no-cors', body: job}),
  sent('cookies', server + '/add', {method: 'POST', mode: 'no-cors', body: job, credentials: 'include'}),
  sent('get', get, {mode: 'no-cors'}),
  sent('json', server + '/add', {method: 'POST', body: job, headers: {'Content-Type': 'application/json'}}),
  sent('read', server + '/jobs'),
  frame('form', 'post', server + '/add', ':0}', '{"Params":["evil"],"Priority"'),
  frame('query', 'get', server + '/add', job.replace('evil', 'query'), 'configuration'),
  picture(get.replace('evil', 'picture')),
]).then((all) => fetch('/went', {method: 'POST', body: '', headers: {'X-Went': all.join(', ')}}));
</script>"""


@pytest.fixture
def browse(tmp_path):
    """Starts browsers; they end with the test."""
    started = []

    def start(url, *more, **kwargs):
        words = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                 "--disable-background-networking", "--disable-component-update", "--no-proxy-server",
                 f"--user-data-dir={tmp_path / f'browser{len(started)}'}", *more, url]  # fmt: skip
        started.append(subprocess.Popen(words, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                        start_new_session=True, **kwargs))  # fmt: skip
        return started[-1]

    yield start
    for process in started:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it has ended by itself
        process.wait()


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_a_page_of_another_site_adds_no_job_and_reads_none(lab, browse, host):
    """From another host, and from another port of the same."""
    server = lab.server()
    page = lambda url: (200, {"Content-Type": "text/html"}, PAGE.replace("SERVER", json.dumps(url)).encode())  # noqa: E731
    with Stub(lambda _: (200, {}, b"{}")) as open_to_all:
        with Stub(lambda path: page(open_to_all.url if path == "/control" else server.url)) as stub:
            for path in ("/control", "/"):
                browse(f"http://{host}:{stub.server_address[1]}{path}", stdout=subprocess.DEVNULL)
            went = until(lambda: went_to(stub), "both pages to have tried", 60)
    assert len([path for path, _ in open_to_all.asked if path.startswith("/add")]) >= 6  # so a browser does send them
    for tried in went:
        assert len(tried) == 8 and "json failed" in tried and "read failed" in tried, tried
    assert server.status()["Jobs"] == 0
    assert server.add(["good"]) == [1]  # the same from what is no page


def went_to(stub):
    """What became of all that the two pages tried; [] until both are done."""
    went = [headers["X-Went"].split(", ") for path, headers in stub.asked if path == "/went"]
    return went if len(went) == 2 else []


def test_a_name_of_a_strangers_that_leads_here_is_no_way_in(lab, browse):
    """DNS rebinding: the browser takes the page's site and the server for one."""
    server = lab.server()
    shown = {}
    for host in ("127.0.0.1", "evil.example"):
        query = urllib.parse.urlencode({"configuration": '{"Params":["evil"]}'})
        for path in ("/status", f"/add?{query}"):
            browser = browse(f"http://{host}:{server.port}{path}", "--dump-dom",
                             "--host-resolver-rules=MAP evil.example 127.0.0.1", stdout=subprocess.PIPE)  # fmt: skip
            shown[host, path[:4]] = browser.communicate(timeout=PATIENCE * 2)[0].decode()
    assert '"Statuses"' in shown["127.0.0.1", "/sta"]
    assert "allowed-host" in shown["evil.example", "/sta"] and "allowed-host" in shown["evil.example", "/add"]
    assert '"Number"' in shown["127.0.0.1", "/add"]  # a person who types it in, as with the original
    assert server.status()["Jobs"] == 1

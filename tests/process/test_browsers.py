"""A real browser: the API description without an internet, and what pages of strangers reach. Needs Chromium."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from browser_kit import CHROMIUM, Page, browse
from kit import running

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
REBOUND = "--host-resolver-rules=MAP evil.example 127.0.0.1, MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost"
SEND = "fetch('{}/jobs?model=echo', {{method: 'POST', mode: 'no-cors', body: 'x'}}).then(() => 'sent', () => 'lost')"
LISTEN = (
    "new Promise(done => {{ const s = new WebSocket('ws://{}/socket.io/?EIO=4&transport=websocket');"
    " s.onopen = () => done('open'); s.onerror = () => done('refused'); }})"
)


@contextmanager
def stranger() -> Iterator[str]:
    """The address of a page of another origin."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><title>stranger</title>")

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{made.server_address[1]}"
        made.shutdown()


def at(page: Page, url: str, title: str) -> None:
    page.open(url)
    page.until(f"document.title === {title!r} && document.readyState === 'complete'")


def statuses(page: Page, method: str, path: str) -> list[int]:
    return [one[2] for one in page.requests if one[:2] == (method, path)]


def test_a_browser_sees_the_description_without_an_internet_and_strangers_reach_nothing(tmp_path: Path) -> None:
    with running(tmp_path / "outputs", devices="cpu:1", models="echo") as server:
        here = f"127.0.0.1:{server.port}"
        with stranger() as there, browse(tmp_path, REBOUND) as page:
            at(page, server.url, "ImagePool")
            page.until("document.querySelectorAll('.opblock').length > 20")
            for button in ("[id$=models_models_get] .opblock-summary-control", ".try-out__btn", ".execute"):
                page.until(f"document.querySelector('{button}')")
                page.js(f"document.querySelector('{button}').click()")
            page.until("document.querySelector('.live-responses-table')?.innerText.includes('echo')")
            loaded = page.js("performance.getEntriesByType('resource').map(e => e.name)")
            assert loaded and all(one.startswith(("data:", server.url)) for one in loaded)
            assert not page.errors and all(status < 400 for *_, status in page.requests)
            assert page.js(LISTEN.format(here)) == "open", "a page of our own"

            at(page, there, "stranger")
            assert page.js(SEND.format(server.url)) == "sent"
            assert page.until(lambda: statuses(page, "POST", "/jobs")) == [403]
            assert page.js(LISTEN.format(here)) == "refused"

            page.requests.clear()
            page.open(f"http://evil.example:{server.port}/models")
            assert page.until(lambda: statuses(page, "GET", "/models")) == [421]
        assert server.get("/jobs").json()["jobs"] == []

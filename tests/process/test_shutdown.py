"""SIGTERM with work that does not end in time: everybody is answered as documented, and the end comes in time."""

from __future__ import annotations

import base64
import contextlib
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
from kit import TEST_MODELS, RunningServer, eventually, photo, running

from core.settings import Settings
from engine.shutdown import AFTER_GRACE

GRACE = 2.0
HANG = {"act": "hang"}
STUCK = """
adapter = "models.stub:Stub"
task = "{task}"
needs_mask = {mask}
[params.prompt]
type = "string"
default = ""
[params.act]
type = "string"
default = "hang"
"""


def stuck_models(folder: Path) -> Path:
    """A folder with the tests' models and two that never end: `edits` takes a prompt, `fills` a mask."""
    folder.mkdir()
    for file in TEST_MODELS.glob("*.toml"):
        (folder / file.name).write_text(file.read_text())
    (folder / "edits.toml").write_text(STUCK.format(task="edit", mask="false"))
    (folder / "fills.toml").write_text(STUCK.format(task="inpaint", mask="true"))
    return folder


@contextlib.contextmanager
def beside(*calls: Callable[[], Any]) -> Iterator[list[Any]]:
    """Make these calls at once, each in a thread; when the block is left, the list has what they gave, in order."""
    found: list[Any] = [None] * len(calls)

    def call(place: int) -> None:
        found[place] = calls[place]()

    threads = [threading.Thread(target=call, args=(place,)) for place in range(len(calls))]
    for thread in threads:
        thread.start()
    yield found
    for thread in threads:
        thread.join(60)


def post(server: RunningServer, path: str, **more: Any) -> httpx.Response:
    return httpx.post(server.url + path, timeout=60, **more)


def half_a_body(server: RunningServer, path: str) -> int:
    """The status that a client gets which announced a body and did not send it all."""
    with socket.create_connection(("127.0.0.1", server.port), 60) as link:
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/png\r\nContent-Length: 5000\r\n\r\n"
        link.sendall(head.encode() + bytes(100))
        return int(link.makefile("rb").readline().split()[1])


def events(server: RunningServer, job: str) -> str:
    """All of a job's event stream; raises when it breaks off."""
    with httpx.stream("GET", f"{server.url}/jobs/{job}/events", timeout=60) as stream:
        return "".join(stream.iter_text())


def test_work_whose_grace_is_over_is_answered_as_documented(tmp_path):
    models = str(stuck_models(tmp_path / "models"))
    flags = "--shutdown-grace", f"{GRACE}s", "--body-timeout", "60s", "--models-folder", models
    with running(tmp_path / "outputs", *flags, devices="cpu:4", models="stub,edits,fills") as server:
        server.wait_all_ready()
        durable = server.submit(1, **HANG)
        mask = base64.b64encode(photo(5)).decode()
        image = {"image": ("a.png", photo(2), "image/png")}
        with beside(
            lambda: post(server, "/run/stub?act=hang", content=photo(3), headers={"content-type": "image/png"}),
            lambda: post(server, "/v1/images/edits", files=image, data={"model": "edits", "prompt": "x"}),
            lambda: post(server, "/api/v1/inpaint", json={"image": base64.b64encode(photo(4)).decode(), "mask": mask}),
            lambda: half_a_body(server, "/run/stub"),
            lambda: half_a_body(server, "/jobs?model=stub"),
            lambda: events(server, durable),
        ) as answers:
            eventually(lambda: server.status()["running_requests"] == 4)
            began = time.monotonic()
            assert server.stop(signal.SIGTERM) == 0
            took = time.monotonic() - began
    run, openai, iopaint, *halves, stream = answers
    assert (run.status_code, run.json()["code"]) == (503, "worker_lost")
    assert run.headers["content-type"] == "application/problem+json" and int(run.headers["retry-after"]) >= 1
    assert openai.status_code == 503 and "stopped" in openai.json()["error"]["message"], openai.text
    assert iopaint.status_code == 503 and iopaint.json()["error"] == "WorkerLost"
    assert halves == [503, 503]
    assert stream.count("event: state") == 2, "the stream ends whole: queued, running"
    assert "event: stopping" in stream.split("\n\n")[-2], "and with a last word"
    assert GRACE <= took < GRACE + AFTER_GRACE
    told = server.log.read_text()
    assert "Traceback" not in told and "Application shutdown complete" in told, told[-3000:]
    assert "exceeded" not in told and "error    ]" not in told, told[-3000:]


def test_the_default_grace_and_all_after_it_end_within_25_seconds() -> None:
    assert Settings.read([]).shutdown_grace + AFTER_GRACE <= 25


def test_readiness_says_no_while_everything_is_still_served(tmp_path):
    with running(tmp_path / "outputs", "--drain-delay", "60s", devices="cpu:1") as server:
        server.process.send_signal(signal.SIGTERM)
        ready = eventually(lambda: (told := server.get("/health/ready")).status_code == 503 and told)
        assert "shutting down" in ready.json()["reason"]
        assert server.get("/health").status_code == 503
        assert server.wait_job(server.submit(1))["state"] == "succeeded"
        run = post(server, "/run/stub", content=photo(2), headers={"content-type": "image/png"})
        assert run.status_code == 200 and server.get("/health/live").status_code == 200
        assert server.stop(signal.SIGTERM, 30) == 0, "a second signal does not wait"
        assert "Traceback" not in server.log.read_text()


def test_after_the_delay_the_server_ends(tmp_path):
    with running(tmp_path / "outputs", "--drain-delay", "500ms", ready=False, devices="cpu:1") as server:
        assert server.stop(signal.SIGTERM, 30) == 0
        told = server.log.read_text()
        assert told.index("Serving on for 0.5 s") < told.index("Finishing what runs"), told[-3000:]


HANGS = """
import sys, time
from api import serve
from core.settings import Settings
from store.jobs import JobStore
serve.AFTER_GRACE = 1.0
JobStore.close = lambda self: time.sleep(3600)
sys.exit(serve.serve(Settings.load(sys.argv[1:])))
"""


def test_a_disk_that_hangs_at_the_end_holds_nobody_up(tmp_path):
    server = RunningServer(tmp_path / "outputs", "--shutdown-grace", "1s", devices="cpu:1")
    server._command[1:2] = ["-c", HANGS]
    server.start()
    tree = server.tree()
    assert server.stop(signal.SIGTERM, 30) == 1
    server.client.close()
    assert "could not end in good order" in server.log.read_text()
    _, alive = psutil.wait_procs(tree, timeout=10)
    assert not alive, "its workers go with it"

"""One line per request in the log: what was asked, how it was answered, for whom; nothing of what must stay private."""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus
from websockets.typing import Origin

from api.access import MOST_A_SECOND, AccessLog
from core.trace import Trace
from engine import logs
from tests.process.door_kit import listen
from tests.pure.api_kit import IMAGE, ended, submit, world

PNG = {"content-type": "image/png"}
KEY = "a-key-that-nobody-may-read"


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    stream = io.StringIO()
    logs.set_up("debug", "json", stream)
    yield stream
    root.handlers[:] = before
    root.setLevel(level)
    logging.captureWarnings(False)
    structlog.reset_defaults()


def lines(stream: io.StringIO, event: str = "request") -> list[dict[str, Any]]:
    return [line for line in map(json.loads, stream.getvalue().splitlines()) if line["event"] == event]


def keys_file(folder: Path) -> Path:
    file = folder / "keys.toml"
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    file.write_text(f'[[keys]]\nname = "k"\nsha256 = "{digest}"\ntenant = "shop"\ntier = "tight"\n')
    return file


async def test_every_refusal_has_a_line_and_what_goes_well_has_none(tmp_path: Path, written: io.StringIO) -> None:
    more = {"keys_file": keys_file(tmp_path), "tiers": {"tight": {"per_minute": 2}}, "min_free_disk": 1 << 60}
    async with world(tmp_path, **more) as server:
        mine = {**PNG, "X-API-Key": KEY, "X-Request-ID": "asked-by-me"}
        send = server.client.post
        stranger = await send("/run/echo?prompt=secret-wish", content=IMAGE, headers={**PNG, "X-API-Key": "wrong-key"})
        lost = await server.client.get("/nowhere?token=secret-wish", headers=mine)
        full = await send("/jobs?model=echo&prompt=secret-wish", content=IMAGE, headers=mine)
        well = await send("/run/echo", content=IMAGE, headers=mine)
        often = await send("/run/echo", content=IMAGE, headers=mine)
        await server.client.get("/health/ready")
    assert [one.status_code for one in (stranger, lost, full, well, often)] == [401, 404, 507, 200, 429]
    told = lines(written)
    assert [line["status"] for line in told] == [401, 404, 507, 429]
    assert [line["tenant"] for line in told] == [None, "shop", "shop", "shop"]
    assert told[0]["request"] == stranger.headers["x-request-id"] and told[1]["request"] == "asked-by-me"
    assert (told[1]["path"], told[1]["route"], told[1]["method"]) == ("/nowhere", "none", "GET")
    assert told[2]["route"] == "/jobs" and told[2]["received"] == len(IMAGE) and told[2]["sent"] == len(full.content)
    assert all(line["client"] and line["seconds"] >= 0 for line in told)
    text = written.getvalue()
    assert "secret-wish" not in text and KEY not in text and "wrong-key" not in text


async def test_all_requests_have_a_line_where_that_is_wanted(tmp_path: Path, written: io.StringIO) -> None:
    async with world(tmp_path, access_log="all") as server:
        run = await server.client.post("/run/echo", content=IMAGE, headers=PNG)
        await server.client.get("/health/live")
    told = lines(written)
    assert [(line["route"], line["level"]) for line in told] == [("/run/{model}", "info"), ("/health/live", "debug")]
    assert told[0]["jobs"] == [run.headers["x-job-id"]]


async def test_none_has_where_none_is_wanted(tmp_path: Path, written: io.StringIO) -> None:
    async with world(tmp_path, access_log="off") as server:
        assert (await server.client.get("/nowhere")).status_code == 404
    assert not lines(written)


async def test_the_lines_of_a_job_say_which_request_it_was_made_for(tmp_path: Path, written: io.StringIO) -> None:
    async with world(tmp_path) as server:
        job = await submit(server, headers={"X-Request-ID": "mine-1"})
        await ended(server, job)
        stored = server.engine._keeper.jobs.load(job["id"])
        assert stored is not None and stored.asked_by == "mine-1", "also after a restart"
    (line,) = [line for line in lines(written, "job ended") if line["job"] == job["id"]]
    assert (line["request"], line["tenant"]) == ("mine-1", "anonymous")


def test_a_flood_of_refusals_is_counted_and_fills_no_disk(written: io.StringIO) -> None:
    now = [1.5]
    access = AccessLog("errors", lambda: now[0])
    scope = {"path": "/x", "method": "GET", "trace": Trace("r"), "client": ("10.0.0.9", 1)}
    for _ in range(MOST_A_SECOND + 50):
        access.note(scope, "none", 401, 0.0, 0, 0)
    assert len(lines(written)) == MOST_A_SECOND
    now[0] = 2.1
    access.note(scope, "none", 401, 0.0, 0, 0)
    assert [line["count"] for line in lines(written, "requests without a line")] == [50]
    assert len(lines(written)) == MOST_A_SECOND + 1 and lines(written)[0]["client"] == "10.0.0.9"


SOCKET = "/socket.io/?EIO=4&transport=websocket&token=secret-wish"
SILENT = logging.Logger("client", logging.CRITICAL)


async def open_sockets(folder: Path, **given: Any) -> None:
    """One web socket that is opened and one that is not."""
    async with world(folder, **given) as server:
        app = server.client._transport.app  # type: ignore[attr-defined]
        async with listen(app, server.engine.settings) as port:
            async with connect(f"ws://127.0.0.1:{port}{SOCKET}", logger=SILENT) as socket:
                await socket.recv()
            with pytest.raises(InvalidStatus) as caught:
                await connect(f"ws://127.0.0.1:{port}{SOCKET.replace('EIO=4', 'EIO=3')}", logger=SILENT).__aenter__()
            assert caught.value.response.status_code == 403 and b"no web socket" in (caught.value.response.body or b"")
            with pytest.raises(InvalidStatus) as caught:
                strange = Origin("https://strange.example")
                await connect(f"ws://127.0.0.1:{port}{SOCKET}", origin=strange, logger=SILENT).__aenter__()
            assert caught.value.response.status_code == 403 and b"no web socket" in (caught.value.response.body or b"")


@pytest.mark.parametrize(("which", "statuses"), [("all", [101, 403, 403]), ("errors", [403, 403]), ("off", [])])
async def test_a_web_socket_has_a_line_as_other_requests_have_and_no_other(
    tmp_path: Path, written: io.StringIO, which: str, statuses: list[int]
) -> None:
    await open_sockets(tmp_path, access_log=which)
    found = [line for line in lines(written) if line["path"] == "/socket.io/"]
    assert [line["status"] for line in found] == statuses
    assert all(line["method"] == "GET" and line["client"] == "127.0.0.1" for line in found)
    text = written.getvalue()
    assert "secret-wish" not in text and "WebSocket" not in text
    assert "connection open" not in text and "connection closed" not in text and "connection rejected" not in text
    assert "without completing handshake" not in text

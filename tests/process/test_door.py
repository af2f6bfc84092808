"""The whole application behind a real uvicorn on a real socket, with clients that misbehave."""

from __future__ import annotations

import asyncio
import io
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import orjson
import pytest
from PIL import Image

from tests.process.door_kit import dial, listen, read_answer, until
from tests.pure.api_kit import IMAGE, held, nothing_happens, submit, world
from tests.pure.dialect_kit import Server


@dataclass(slots=True)
class Door:
    server: Server
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[Door]:
    given = {"header_timeout": 0.3, "body_timeout": 0.3, "max_body": 1 << 20, "allowed_hosts": ("here", "pool")}
    async with world(tmp_path, **given) as server:
        app = server.client._transport.app  # type: ignore[attr-defined]
        async with listen(app, server.engine.settings) as port:
            yield Door(server, port)


def post(path: str, length: int | None, body: bytes = b"", *more: bytes) -> bytes:
    size = b"Transfer-Encoding: chunked" if length is None else b"Content-Length: %d" % length
    lines = [b"POST %s HTTP/1.1" % path.encode(), b"Host: here", b"Content-Type: image/png", size, *more]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


async def code_of(reader: asyncio.StreamReader) -> tuple[int, str]:
    status, headers, body = await read_answer(reader)
    assert headers["content-type"] == "application/problem+json"
    return status, orjson.loads(body)["code"]


@pytest.mark.parametrize("path", ["/run/echo", "/jobs?model=echo"])
async def test_requests_of_every_framing_are_answered_on_one_connection(door: Door, path: str) -> None:
    pieces = [IMAGE[at : at + 50] for at in range(0, len(IMAGE), 50)]
    chunked = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    async with dial(door.port) as (reader, writer):
        for data in (post(path, len(IMAGE), IMAGE), post(path, None, chunked + b"0\r\n\r\n")):
            writer.write(data)
            status, headers, body = await read_answer(reader)
            assert status in (200, 202)
            assert body == IMAGE or headers["location"]


async def test_a_large_body_arrives_whole_and_in_order(door: Door) -> None:
    out = io.BytesIO()
    Image.frombytes("RGB", (500, 500), os.urandom(750_000)).save(out, "PNG")
    async with httpx.AsyncClient(base_url=door.url) as client:
        for _ in range(3):
            answer = await client.post("/run/echo", content=out.getvalue(), headers={"content-type": "image/png"})
            assert answer.content == out.getvalue()


@pytest.mark.parametrize("path", ["/run/echo", "/jobs?model=echo"])
@pytest.mark.parametrize("framing", [len(IMAGE), None])
async def test_a_body_that_falls_silent_is_a_408_and_leaves_nothing(door: Door, path: str, framing: int | None) -> None:
    async with dial(door.port) as (reader, writer), nothing_happens(door.server):
        writer.write(post(path, framing, b"5\r\nabcde\r\n" if framing is None else IMAGE[:10]))
        assert await code_of(reader) == (408, "request_timeout")


@pytest.mark.parametrize("path", ["/run/echo", "/jobs?model=echo"])
async def test_a_body_announced_too_large_is_refused_while_the_client_still_sends(door: Door, path: str) -> None:
    async with dial(door.port) as (reader, writer), nothing_happens(door.server):
        writer.write(post(path, 3 << 20))
        writer.write(bytes(3 << 20))
        assert await code_of(reader) == (413, "too_large")
        writer.write(b"GET /models HTTP/1.1\r\nHost: here\r\n\r\n")
        assert (await read_answer(reader))[0] == 200


@pytest.mark.parametrize("path", ["/run/echo", "/jobs?model=echo"])
async def test_a_body_too_large_without_an_announcement_is_refused_while_the_client_still_sends(
    door: Door, path: str
) -> None:
    async with dial(door.port) as (reader, writer), nothing_happens(door.server):
        writer.write(post(path, None))
        for _ in range(40):
            writer.write(b"10000\r\n" + bytes(1 << 16) + b"\r\n")
        assert await code_of(reader) == (413, "too_large")


async def test_a_client_that_waits_for_100_continue_is_refused_without_having_sent(door: Door) -> None:
    async with dial(door.port) as (reader, writer):
        writer.write(post("/run/echo", 3 << 20, b"", b"Expect: 100-continue"))
        assert await code_of(reader) == (413, "too_large")
    async with dial(door.port) as (reader, writer):
        writer.write(post("/run/echo", len(IMAGE), b"", b"Expect: 100-continue"))
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(IMAGE)
        assert (await read_answer(reader))[0] == 200


async def test_a_client_that_leaves_while_it_waits_cancels_its_job_at_once(door: Door) -> None:
    async with held(door.server):
        async with dial(door.port) as (_, writer):
            writer.write(post("/run/echo", len(IMAGE), IMAGE))
            await door.server.until_ran()
        await until(lambda: door.server.engine.snapshot()["jobs"]["cancelled"])


async def test_a_client_that_leaves_in_mid_upload_leaves_nothing(door: Door) -> None:
    async with nothing_happens(door.server):
        async with dial(door.port) as (_, writer):
            writer.write(post("/run/echo", len(IMAGE), IMAGE[:10]))
            await until(lambda: door.server.engine.snapshot()["receiving"]["bytes"] == 10)
        await until(lambda: not door.server.engine.snapshot()["receiving"]["bytes"])


async def test_a_client_that_leaves_a_durable_job_finds_it_again(door: Door) -> None:
    async with held(door.server), dial(door.port) as (_, writer):
        writer.write(post("/jobs?model=echo", len(IMAGE), IMAGE, b"Prefer: wait=60"))
        await door.server.until_ran()
    async with httpx.AsyncClient(base_url=door.url) as client:
        (job,) = (await client.get("/jobs")).json()["jobs"]
        await door.server.engine.wait(job["id"], 30)
        assert (await client.get(job["links"]["result"])).content == IMAGE


async def test_a_reader_of_events_may_leave_and_come_back(door: Door) -> None:
    async with httpx.AsyncClient(base_url=door.url) as client:
        async with held(door.server):
            job = await submit(door.server)
            async with client.stream("GET", job["links"]["events"]) as stream:
                line = await anext(stream.aiter_lines())
            number = line.removeprefix("id: ")
        rest = (await client.get(job["links"]["events"], headers={"last-event-id": number})).text
        assert f"id: {number}\n" not in rest
        assert '"state":"succeeded"' in rest


async def test_a_result_is_sent_in_parts_when_asked_for(door: Door) -> None:
    job = await submit(door.server, headers={"prefer": "wait=30"})
    async with httpx.AsyncClient(base_url=door.url) as client:
        answer = await client.get(job["links"]["result"], headers={"range": "bytes=4-9"})
    assert (answer.status_code, answer.content) == (206, IMAGE[4:10])


@pytest.mark.parametrize(
    "line", [b"X-Request-ID: a\rb", b"X-Request-ID: a\r\n b", b"X-Request-ID: a\x0bb", b"X-Request-ID: a\x01"]
)
async def test_a_line_break_in_a_header_never_comes_back(door: Door, line: bytes) -> None:
    async with dial(door.port) as (reader, writer):
        writer.write(post("/run/echo", len(IMAGE), IMAGE, line))
        status, headers, _ = await read_answer(reader)
        assert status in (200, 400)
        assert headers["x-request-id"].isalnum()


async def test_liveness_answers_while_every_connection_dawdles(door: Door) -> None:
    dawdlers = [await asyncio.open_connection("127.0.0.1", door.port) for _ in range(50)]
    for _, writer in dawdlers:
        writer.write(b"GET / HTTP/1.1\r\nX: ")
    async with httpx.AsyncClient(base_url=door.url) as client:
        assert (await client.get("/health/live")).status_code == 200
    for reader, writer in dawdlers:
        assert (await read_answer(reader))[0] == 408
        writer.close()

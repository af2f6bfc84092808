"""Large bodies and answers on a real socket: the way around the parser and past the transport."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from api.limits import TAKE, Body, whole
from engine.landing import Landing
from tests.process.door_kit import dial, listen, read_answer, settings, until
from workers.arena import Arena

TRAP = b"GET / HTTP/1.1\r\n\r\n"  # what a parser that lost its place would take for a request
BODY = (TRAP + bytes(range(256))) * 2_000


class Mirror:
    """Gives the body back out of a buffer that is overwritten as soon as `send` returns, as shared memory would be."""

    def __init__(self) -> None:
        self.kinds: set[type] = set()
        self.taken = 0  # bytes that came the short way
        self.left = 0   # clients that went away in the middle of a body
        self.header = (b"x-note", b"fine")
        self.arena = Arena(32 << 20)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/bytes":
            receive = whole(receive)
        try:
            buffer = await (self.fill if scope["path"] == "/fill" else self.read)(scope, receive)
        except ClientDisconnect:
            self.left += 1
            return
        headers = [(b"content-length", b"%d" % len(buffer)), self.header]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": memoryview(buffer)})
        buffer[:] = bytes(len(buffer))

    async def read(self, _: Scope, receive: Receive) -> bytearray:
        buffer = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                raise ClientDisconnect
            self.kinds.add(type(message["body"]))
            buffer += message["body"]
            more = message["more_body"]
        return buffer

    async def fill(self, scope: Scope, receive: Receive) -> bytearray:
        def take(room: memoryview) -> int:
            count: int = scope["extensions"][TAKE](room)
            self.taken += count
            return count

        body = Body(receive, 5.0, time.monotonic, take)
        body.limit = len(BODY)
        length = int(dict(scope["headers"])[b"content-length"])
        with Landing(self.arena, length) as landing:
            await body.fill(landing, length)
            return bytearray(landing.buffer)


@pytest.fixture
async def mirror() -> Mirror:
    return Mirror()


@pytest.fixture
async def port(mirror: Mirror, tmp_path: Path) -> AsyncIterator[int]:
    async with listen(mirror, settings(tmp_path)) as port:
        yield port


def post(body: bytes, path: str = "/", extra: bytes = b"") -> bytes:
    return b"POST %b HTTP/1.1\r\nHost: here\r\n%bContent-Length: %d\r\n\r\n%b" % (path.encode(), extra, len(body), body)


async def test_a_large_body_comes_whole_and_the_connection_serves_the_next_request(port: int, mirror: Mirror) -> None:
    async with dial(port) as (reader, writer):
        for body in (BODY, b"small", BODY[:40_000], b"", BODY):
            writer.write(post(body))
            assert (await read_answer(reader))[2] == body
    assert memoryview in mirror.kinds


@pytest.mark.parametrize("cut", [-3, -2, -1, 0, 1, 40])
async def test_a_head_cut_anywhere_at_its_end_does_not_confuse_head_and_body(port: int, cut: int) -> None:
    data = post(BODY)
    at = data.index(b"\r\n\r\n") + 4 + cut
    async with dial(port) as (reader, writer):
        writer.write(data[:at])
        await writer.drain()
        await asyncio.sleep(0.05)  # so that the pieces are read apart
        writer.write(data[at:] + post(b"next"))
        assert (await read_answer(reader))[2] == BODY
        assert (await read_answer(reader))[2] == b"next"


async def test_requests_behind_a_large_body_wait_for_their_turn(port: int) -> None:
    bodies = [BODY, b"second", BODY[::-1], b"fourth"]
    async with dial(port) as (reader, writer):
        writer.write(b"".join(map(post, bodies)))
        for body in bodies:
            assert (await read_answer(reader))[2] == body


async def test_a_body_goes_straight_to_where_it_is_wanted_and_no_byte_further(port: int, mirror: Mirror) -> None:
    bodies = [BODY, b"second", BODY[::-1], BODY[:40_000], b"last"]
    async with dial(port) as (reader, writer):
        writer.write(b"".join(post(body, "/fill") for body in bodies))
        for body in bodies:
            assert (await read_answer(reader))[2] == body
    assert mirror.taken > 0


async def test_a_body_in_pieces_comes_whole_whichever_way_each_piece_takes(port: int, mirror: Mirror) -> None:
    data = post(BODY, "/fill")
    async with dial(port) as (reader, writer):
        for start in range(0, len(data), 90_001):
            writer.write(data[start : start + 90_001])
            await writer.drain()
            await asyncio.sleep(0.01)
        assert (await read_answer(reader))[2] == BODY
        writer.write(post(b"next", "/fill"))
        assert (await read_answer(reader))[2] == b"next"


async def test_a_client_that_leaves_before_its_body_was_taken_is_missed(port: int, mirror: Mirror) -> None:
    async with dial(port) as (_, writer):
        writer.write(post(BODY, "/fill")[: len(BODY) // 2])
        await writer.drain()
        await until(lambda: mirror.taken > 0)
    await until(lambda: mirror.left)


async def test_an_answer_to_a_slow_reader_is_not_changed_by_what_happens_to_its_memory(port: int) -> None:
    body = BODY * 40  # more than socket buffers hold
    async with dial(port) as (reader, writer):
        writer.write(post(body))
        await writer.drain()
        await asyncio.sleep(0.2)  # the server has long sent what the kernel takes
        assert (await read_answer(reader))[2] == body


async def test_an_application_may_ask_for_bytes(port: int, mirror: Mirror) -> None:
    async with dial(port) as (reader, writer):
        writer.write(post(BODY, "/bytes"))
        assert (await read_answer(reader))[2] == BODY
    assert mirror.kinds == {bytes}


async def test_an_answer_that_ends_the_connection_says_so_and_ends_it(port: int) -> None:
    async with dial(port) as (reader, writer):
        writer.write(post(BODY, extra=b"Connection: close\r\n"))
        _, headers, body = await read_answer(reader)
        assert headers["connection"] == "close" and body == BODY
        assert await reader.read() == b""


@pytest.mark.parametrize("value", [b"one\r\nx-two: 2", b"one\nx-two: 2", b"nul\0"])
async def test_a_header_with_a_line_break_never_leaves(port: int, mirror: Mirror, value: bytes) -> None:
    mirror.header = (b"x-note", value)
    async with dial(port) as (reader, writer):
        writer.write(post(b"small"))
        status, headers, _ = await read_answer(reader)
        assert status == 500 and "x-two" not in headers


async def test_a_chunked_body_goes_through_the_parser(port: int) -> None:
    async with dial(port) as (reader, writer):
        writer.write(b"POST / HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\n")
        writer.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY))
        assert (await read_answer(reader))[2] == BODY

"""The hardened protocol on a real socket, before an application that only echoes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import orjson
import pytest
from starlette.types import Receive, Scope, Send

from api import protocol
from api.framing import MAX_TARGET
from api.limits import GONE
from core.errors import BadRequest
from tests.process.door_kit import dial, listen, read_answer, settings

GET = b"GET / HTTP/1.1\r\nHost: here\r\n\r\n"


class Echo:
    """Answers a request with the number of bytes of its body; `hasty` before it has read it."""

    def __init__(self) -> None:
        self.calls = 0
        self.gone = asyncio.Event()
        self.entered = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.calls += 1
        size = 0
        if scope["path"] != "/hasty":
            while True:
                try:
                    message = await receive()
                except BadRequest as fault:
                    await answer(send, 400, orjson.dumps({"code": fault.code}))
                    return
                if message["type"] == "http.disconnect":
                    self.gone.set()
                    return
                size += len(message["body"])
                if not message["more_body"]:
                    break
        if scope["path"] == "/watch":
            scope["extensions"][GONE](self.gone.set)
            self.entered.set()
            await self.gone.wait()
            return
        if scope["path"] == "/linger":
            self.entered.set()
            assert (await receive())["type"] == "http.disconnect"
            self.gone.set()
            return
        await answer(send, 200, str(size).encode())


async def answer(send: Send, status: int, body: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
async def echo() -> Echo:
    return Echo()


@pytest.fixture
async def port(echo: Echo, tmp_path: Path) -> AsyncIterator[int]:
    async with listen(echo, settings(tmp_path)) as port:
        yield port


async def answer_to(port: int, data: bytes) -> tuple[int, dict[str, str], bytes]:
    async with dial(port) as (reader, writer):
        writer.write(data)
        return await read_answer(reader)


async def test_headers_that_never_end_are_answered_with_408_and_the_connection_closes(port: int, echo: Echo) -> None:
    async with dial(port) as (reader, writer):
        writer.write(b"GET / HTTP/1.1\r\nHost: here\r\nX-Slow: ")
        status, headers, body = await read_answer(reader)
        assert await reader.read() == b""
    assert status == 408
    assert headers["content-type"] == "application/problem+json"
    assert orjson.loads(body)["code"] == "request_timeout"
    assert echo.calls == 0


async def test_a_connection_that_never_speaks_is_closed(port: int) -> None:
    async with dial(port) as (reader, _):
        status, _, _ = await read_answer(reader)
    assert status == 408


async def test_slow_headers_on_a_kept_connection_time_out_too(port: int) -> None:
    async with dial(port) as (reader, writer):
        writer.write(GET)
        assert (await read_answer(reader))[0] == 200
        writer.write(b"GET / HTTP/1.1\r\n")
        assert (await read_answer(reader))[0] == 408


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\n" + b"X-Many: 1\r\n" * 200 + b"\r\n",
        b"GET / HTTP/1.1\r\nX-Giant: " + b"a" * (protocol.MAX_HEAD + 1) + b"\r\n\r\n",
        b"GET /" + b"a" * (protocol.MAX_HEAD + 1) + b" HTTP/1.1\r\n\r\n",
        b"GET /?" + b"%" * MAX_TARGET + b" HTTP/1.1\r\nHost: here\r\n\r\n",
        b"GET / HTTP/1.1\r\nX-Endless: " + b"a" * (1 << 20),
    ],
    ids=["too many", "giant value", "giant path", "long query", "endless value"],
)
async def test_headers_beyond_the_limit_are_answered_with_431(port: int, echo: Echo, head: bytes) -> None:
    status, headers, body = await answer_to(port, head)
    assert (status, headers["connection"]) == (431, "close")
    assert orjson.loads(body)["code"] == "header_too_large"
    assert echo.calls == 0


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: here\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
        b"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: -1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: here\r\nX-Bad: a\x00b\r\n\r\n",
    ],
    ids=["TLS", "two lengths", "length and chunked", "negative length", "NUL in a header"],
)
async def test_what_is_no_http_is_answered_with_400(port: int, echo: Echo, data: bytes) -> None:
    status, _, body = await answer_to(port, data)
    assert status == 400
    assert orjson.loads(body)["code"] == "bad_request"


async def test_a_body_larger_than_announced_becomes_a_bad_second_request(port: int, echo: Echo) -> None:
    async with dial(port) as (reader, writer):
        writer.write(b"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: 3\r\n\r\nabcSMUGGLED stuff\r\n\r\n")
        _, _, body = await read_answer(reader)
    assert body == b"3"
    assert echo.calls == 1


async def test_a_flood_of_tiny_chunks_is_a_400_and_ends_the_connection(port: int, echo: Echo) -> None:
    async with dial(port) as (reader, writer):
        writer.write(b"POST / HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\n")
        writer.write(b"1\r\na\r\n" * (protocol.MAX_CHUNKS + 1))
        status, headers, body = await read_answer(reader)
        assert await reader.read() == b""
    assert (status, headers["connection"]) == (400, "close")
    assert orjson.loads(body)["code"] == "bad_request"


async def test_ordinary_chunks_are_read(port: int) -> None:
    body = b"400\r\n" + b"a" * 1024 + b"\r\n"
    head = b"POST / HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\n"
    data = head + body * (protocol.MAX_CHUNKS + 10) + b"0\r\n\r\n"
    assert (await answer_to(port, data))[2] == str(1024 * (protocol.MAX_CHUNKS + 10)).encode()


async def test_a_client_still_sending_gets_the_early_answer_and_may_go_on(port: int) -> None:
    async with dial(port) as (reader, writer):
        writer.write(b"POST /hasty HTTP/1.1\r\nHost: here\r\nContent-Length: 3000000\r\n\r\n")
        assert (await read_answer(reader))[0] == 200
        writer.write(b"a" * 3_000_000 + GET)
        assert (await read_answer(reader))[0] == 200


async def test_a_body_that_goes_on_for_ever_after_the_answer_is_cut_off(port: int) -> None:
    async with dial(port) as (reader, writer):
        writer.write(b"POST /hasty HTTP/1.1\r\nHost: here\r\nContent-Length: 1000000000\r\n\r\n")
        await read_answer(reader)
        with pytest.raises(ConnectionError):
            while True:
                writer.write(b"a" * (1 << 20))
                await writer.drain()


async def test_a_body_that_stops_after_the_answer_is_cut_off(port: int) -> None:
    async with dial(port) as (reader, writer):
        writer.write(b"POST /hasty HTTP/1.1\r\nHost: here\r\nContent-Length: 10\r\n\r\n")
        await read_answer(reader)
        assert await reader.read() == b""


async def test_the_application_hears_at_once_of_a_client_that_goes_away(port: int, echo: Echo) -> None:
    async with dial(port) as (_, writer):
        writer.write(b"POST /watch HTTP/1.1\r\nHost: here\r\nContent-Length: 300000\r\n\r\n" + b"a" * 300_000)
        await asyncio.wait_for(echo.entered.wait(), 30)
        assert not echo.gone.is_set()
    await asyncio.wait_for(echo.gone.wait(), 30)


@pytest.mark.parametrize("size", [0, 5, 300_000])
async def test_after_the_whole_body_the_only_message_is_the_disconnect(port: int, echo: Echo, size: int) -> None:
    async with dial(port) as (_, writer):
        writer.write(b"POST /linger HTTP/1.1\r\nHost: here\r\nContent-Length: %d\r\n\r\n" % size + b"a" * size)
        await asyncio.wait_for(echo.entered.wait(), 30)
    await asyncio.wait_for(echo.gone.wait(), 30)


async def test_a_pipelined_second_request_is_answered_after_the_first(port: int, echo: Echo) -> None:
    async with dial(port) as (reader, writer):
        writer.write(b"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: 2\r\n\r\nab" + GET)
        assert (await read_answer(reader))[2] == b"2"
        assert (await read_answer(reader))[2] == b"0"

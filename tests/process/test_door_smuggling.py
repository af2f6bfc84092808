"""Nothing in the body of a request is ever taken for a request, and nothing that waits behind one grows."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from starlette.types import Receive, Scope, Send

from core.errors import BadRequest
from tests.process.door_kit import Turns, dial, listen, read_answer, settings, until
from tests.pure.api_kit import nothing_happens, world

HOST = b"Host: here\r\n"
SMUGGLED = b"POST /jobs HTTP/1.1\r\nHost: here\r\nContent-Length: 0\r\n\r\n"
NEXT = b"GET /next HTTP/1.1\r\nHost: here\r\n\r\n"
SOCKET = b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
UPGRADES = {
    "h2c, as Java": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIA\r\n",
    "another": b"Connection: Upgrade\r\nUpgrade: foo\r\n",
    "several": b"Connection: keep-alive\r\nConnection: upgrade\r\nUpgrade: foo/2, websocket\r\n",
    "a web socket where none is": b"Connection: Upgrade\r\nUpgrade: websocket\r\n" + SOCKET,
    "none": b"Upgrade: h2c\r\n",
}


class Log:
    """Remembers what it was asked for; answers with the length of the body once `open` is set."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, bytes]] = []
        self.open = asyncio.Event()
        self.open.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            self.asked.append(("WS", scope["path"], b""))
            await receive()
            await send({"type": "websocket.accept"})
            return
        body, more = bytearray(), True
        while more:
            try:
                message = await receive()
            except BadRequest:
                break
            body += message.get("body", b"")
            more = message.get("more_body", False)
        self.asked.append((scope["method"], scope["path"], bytes(body)))
        await self.open.wait()
        text = str(len(body)).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(text))]})
        await send({"type": "http.response.body", "body": text})


@pytest.fixture
async def log() -> Log:
    return Log()


@pytest.fixture
async def port(log: Log, tmp_path: Path) -> AsyncIterator[int]:
    async with listen(log, settings(tmp_path, header_timeout=5, body_timeout=5)) as port:
        yield port


def framed(head: bytes, body: bytes, chunked: bool) -> bytes:
    if not chunked:
        return head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    halves = body[: len(body) // 2], body[len(body) // 2 :]
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(half), half) for half in halves if half)
    return head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"


@pytest.mark.parametrize("upgrade", UPGRADES.values(), ids=UPGRADES)
async def test_an_upgrade_that_is_not_served_is_not_heard(port: int, log: Log, upgrade: bytes) -> None:
    for times, chunked, pause in itertools.product((1, 4_000), (False, True), (False, True)):
        log.asked.clear()
        body = SMUGGLED * times
        data = framed(b"POST /run HTTP/1.1\r\n" + HOST + upgrade, body, chunked)
        async with dial(port) as (reader, writer):
            if pause:
                head, end, data = data.partition(b"\r\n\r\n")
                writer.write(head + end)
                await writer.drain()
                await asyncio.sleep(0.01)
            writer.write(data + NEXT)
            assert (await read_answer(reader))[2] == str(len(body)).encode()
            assert (await read_answer(reader))[2] == b"0"
        assert log.asked == [("POST", "/run", body), ("GET", "/next", b"")]


@pytest.mark.parametrize(
    ("method", "more"),
    [(b"GET", b"Content-Length: %d\r\n" % len(SMUGGLED)), (b"POST", b"Content-Length: %d\r\n" % len(SMUGGLED))],
    ids=["a body", "POST"],
)
async def test_a_handshake_with_a_body_is_an_ordinary_request(port: int, log: Log, method: bytes, more: bytes) -> None:
    head = method + b" /socket.io/ HTTP/1.1\r\n" + HOST + UPGRADES["a web socket where none is"] + more + b"\r\n"
    async with dial(port) as (reader, writer):
        writer.write(head + SMUGGLED + NEXT)
        assert (await read_answer(reader))[0] == 200
        assert (await read_answer(reader))[0] == 200
    assert log.asked == [(method.decode(), "/socket.io/", SMUGGLED), ("GET", "/next", b"")]


@pytest.mark.parametrize("lines", [SOCKET, b"Sec-WebSocket-Version: 7\r\n"], ids=["accepted", "refused"])
async def test_what_comes_right_behind_a_handshake_is_no_request(port: int, log: Log, lines: bytes) -> None:
    async with dial(port) as (reader, writer):
        writer.write(b"GET /socket.io/ HTTP/1.1\r\n" + HOST + b"Connection: Upgrade\r\nUpgrade: websocket\r\n" + lines)
        writer.write(b"\r\n" + SMUGGLED)
        await reader.read()
    assert all(kind == "WS" for kind, _, _ in log.asked)


async def test_blanks_around_a_header_s_value_are_no_part_of_it(tmp_path: Path) -> None:
    told: list[tuple[bytes, bytes]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        told.extend(scope["headers"])
        await Log()(scope, receive, send)

    async with listen(app, settings(tmp_path)) as port, dial(port) as (reader, writer):
        writer.write(b"POST /a HTTP/1.1\r\nHost:\t here \t\r\nX-API-Key: key \r\nX-A: a b \r\n")
        writer.write(b"Content-Length: 2 \r\n\r\nok")
        assert (await read_answer(reader))[2] == b"2"
    assert told == [(b"host", b"here"), (b"x-api-key", b"key"), (b"x-a", b"a b"), (b"content-length", b"2")]


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
async def test_curl_that_offers_http2_is_answered(port: int, log: Log) -> None:
    command = ["curl", "-sS", "--http2", "--data-binary", "hello", f"http://127.0.0.1:{port}/run"]
    curl = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    assert (await curl.communicate())[0] == b"5"
    assert log.asked == [("POST", "/run", b"hello")]


async def test_connect_is_refused_and_what_follows_is_no_request(port: int, log: Log) -> None:
    async with dial(port) as (reader, writer):
        writer.write(b"CONNECT here:80 HTTP/1.1\r\n" + HOST + b"\r\n" + SMUGGLED)
        assert (await read_answer(reader))[0] == 501
        assert await reader.read() == b""
    assert log.asked == []


async def test_another_coding_than_chunked_is_not_implemented(port: int, log: Log) -> None:
    async with dial(port) as (reader, writer):
        writer.write(b"POST / HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\n" + HOST + b"\r\n0\r\n\r\n" + SMUGGLED)
        assert (await read_answer(reader))[0] == 501
        assert await reader.read() == b""
    assert log.asked == []


async def test_a_line_of_rtsp_is_no_request_however_it_is_cut(port: int, log: Log) -> None:
    line = b"\r\nGET / RTSP/1.0\r\nHost: here\r\n\r\n"
    for cut in range(1, 18):
        async with dial(port) as (reader, writer):
            writer.write(line[:cut])
            await writer.drain()
            await asyncio.sleep(0.01)
            writer.write(line[cut:])
            assert (await read_answer(reader))[0] == 400
    assert log.asked == []


ODD = [
    b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost:\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: \r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: gzip\r\n\r\n0\r\n\r\n",
    b"GET / RTSP/1.0\r\nHost: here\r\n\r\n",
    b"POST / RTSP/1.1\r\nHost: here\r\nContent-Length: 0\r\n\r\n",
    b"DESCRIBE / RTSP/1.0\r\nHost: here\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
    b"GET / HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a@b\r\n\r\n",
    b"GET /\r\n\r\n",
    b"GET / HTTP/2.0\r\nHost: here\r\n\r\n",
    b"GET / HTTP/1.2\r\nHost: here\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET / HTTP/1.1\nHost: here\n\n",
    b"GET / HTTP/1.1\r\nHost: here\r\nX: a\r\n b\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: here\r\nX : a\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: here\r\nX: a\rb\r\n\r\n",
    b"GET http://there/ HTTP/1.1\r\nHost: here\r\n\r\n",
    b"GET /a#b HTTP/1.1\r\nHost: here\r\n\r\n",
    b"GET /\xc3\xa4 HTTP/1.1\r\nHost: here\r\n\r\n",
    b"GET here:80 HTTP/1.1\r\nHost: here\r\n\r\n",
    b"\r\n\r\n" * 8_000,
]


async def test_a_head_that_two_servers_could_read_differently_is_refused(port: int, log: Log) -> None:
    for head in ODD:
        async with dial(port) as (reader, writer):
            writer.write(head + SMUGGLED)
            status, headers, _ = await read_answer(reader)
            assert (status, headers["connection"]) == (400, "close"), head
            assert await reader.read() == b""
    assert log.asked == []


async def test_the_whole_address_of_this_host_is_a_path(port: int, log: Log) -> None:
    async with dial(port) as (reader, writer):
        writer.write(b"GET http://here/a?b HTTP/1.1\r\n" + HOST + b"\r\n")
        assert (await read_answer(reader))[0] == 200
    assert log.asked == [("GET", "/a", b"")]


async def test_requests_that_come_before_the_answer_wait_and_do_not_grow(port: int, log: Log) -> None:
    log.open.clear()
    async with dial(port) as (reader, writer):
        writer.write(NEXT * 300_000)
        await until(lambda: log.asked)
        with pytest.raises(TimeoutError):  # nobody reads: what the kernel holds is full
            await asyncio.wait_for(writer.drain(), 0.5)
        assert len(log.asked) == 1
        log.open.set()
        for _ in range(2_000):
            assert (await read_answer(reader))[2] == b"0"
        writer.transport.abort()


async def test_requests_that_came_at_once_are_answered_in_order(port: int, log: Log) -> None:
    sizes = [0, 5, 40_000, 3, 200_000, 0, 70_000, 1]
    data = b"".join(
        framed(b"POST /%d HTTP/1.1\r\n" % size + HOST, bytes(size), chunked)
        for size in sizes for chunked in (False, True)
    )  # fmt: skip
    async with dial(port) as (reader, writer):
        writer.write(data)
        for size in sizes:
            assert [(await read_answer(reader))[2] for _ in range(2)] == [str(size).encode()] * 2


async def test_requests_in_a_row_and_a_reset_leave_no_trace(
    port: int, log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    log.open.clear()
    async with dial(port) as (_, writer):
        writer.write(framed(b"POST /run HTTP/1.1\r\n" + HOST, b"image", False) * 3)
        await until(lambda: log.asked)
        writer.transport.abort()
    log.open.set()
    await asyncio.sleep(0.05)
    assert not [record for record in caplog.records if record.exc_info or record.levelname == "ERROR"]


MALFORMED = {
    "no number": b"z\r\nabc\r\n0\r\n\r\n",
    "a sign": b"-1\r\nabc\r\n",
    "0x": b"0x3\r\nabc\r\n0\r\n\r\n",
    "a space before": b" 3\r\nabc\r\n0\r\n\r\n",
    "too short": b"2\r\nabc\r\n0\r\n\r\n",
    "too long": b"4\r\nabc\r\n0\r\n\r\n",
    "a bare line feed": b"3\nabc\n0\n\n",
    "a carriage return in the extension": b"3;a\rb\r\nabc\r\n0\r\n\r\n",
    "an endless size": b"0" * 300 + b"3\r\nabc\r\n0\r\n\r\n",
    "a size beyond all": b"fffffffffffffffff\r\nabc",
    "an endless extension": b"3;" + b"a" * 300 + b"\r\nabc\r\n0\r\n\r\n",
    "a trailer that is none": b"3\r\nabc\r\n0\r\nPOST / HTTP/1.1\r\n\r\n",
    "endless trailers": b"3\r\nabc\r\n0\r\n" + b"X-A: b\r\n" * 3_000 + b"\r\n",
}


async def test_malformed_chunks_are_a_400_and_nothing_after_them_is_read(tmp_path: Path) -> None:
    async with world(tmp_path) as server, nothing_happens(server):
        app = server.client._transport.app  # type: ignore[attr-defined]
        async with listen(app, server.engine.settings) as port:
            for what, path in itertools.product(MALFORMED, (b"/run/echo", b"/jobs?model=echo", b"/v1/images/edits")):
                async with dial(port) as (reader, writer):
                    head = b"POST %b HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/png\r\n" % path
                    writer.write(head + b"Transfer-Encoding: chunked\r\n\r\n" + MALFORMED[what] + SMUGGLED)
                    status, headers, _ = await read_answer(reader)
                    assert await reader.read() == b""
                    assert (status, headers["connection"]) == (400, "close"), (what, path)


FLOODS = {
    "one-byte chunks": b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\na\r\n" * 300_000,
    "small chunks": b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    + (b"40\r\n" + b"a" * 64 + b"\r\n") * 50_000,
    "trailers": b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" + b"a:\r\n" * 300_000,
    "requests": NEXT * 50_000,
    "headers": b"GET / HTTP/1.1\r\n" + b"a:\r\n" * 300_000,
    "empty lines": b"\n" * (1 << 20),
}


@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS)
async def test_no_flood_holds_the_loop(port: int, flood: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    async with dial(port) as (reader, writer):
        turns = Turns(monkeypatch)
        for at in range(0, len(flood), 1 << 16):
            writer.write(flood[at : at + (1 << 16)])
            await asyncio.sleep(0)
        await read_answer(reader)
        writer.transport.abort()
    assert turns.longest < 0.02

"""Clients that ask for large answers and do not read them: they cost those who do so, and nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from starlette.types import Receive, Scope, Send

from tests.process.door_kit import dial, listen, read_answer, settings, until
from tests.process.test_slow_bodies import head, serving
from tests.pure.api_kit import IMAGE

LARGE = IMAGE + bytes(9 << 20)  # what follows a PNG is nobody's
POST = head("/run/echo", b"image/png", len(LARGE)) + LARGE
SMALL = head("/run/echo", b"image/png", len(IMAGE)) + IMAGE
Line = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@contextlib.asynccontextmanager
async def deaf(port: int, data: bytes, address: str = "127.0.0.5") -> AsyncIterator[socket.socket]:
    """A client of that address that has sent `data`, and reads nothing by itself."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.bind((address, 0))
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(sock, ("127.0.0.1", port))
        await loop.sock_sendall(sock, data)
        yield sock


async def is_dropped(sock: socket.socket) -> bool:
    """Whether the connection ends before the whole answer has come."""
    loop, came = asyncio.get_running_loop(), 0
    with contextlib.suppress(ConnectionError):
        while more := await loop.sock_recv(sock, 1 << 20):
            came += len(more)
            if came > len(LARGE):
                return False
    return True


@pytest.mark.parametrize("size", [3 << 20, 9 << 20])
async def test_who_does_not_read_is_dropped_and_leaves_nothing(tmp_path: Path, size: int) -> None:
    image = IMAGE + bytes(size)
    async with serving(tmp_path, body_timeout=0.5, arena_bytes=256 << 20) as (server, port):
        async with deaf(port, head("/run/echo", b"image/png", len(image)) + image) as sock:
            await until(lambda: server.ran)
            await until(lambda: not server.engine.arena.spans and not server.engine.intake.bytes)
            assert await is_dropped(sock)
        assert server.engine.intake.bodies == 0


async def test_who_reads_slowly_but_steadily_gets_it_whole(tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    async with (
        serving(tmp_path, body_timeout=0.5, arena_bytes=256 << 20) as (server, port),
        deaf(port, POST) as sock,
    ):
        await until(lambda: server.ran)
        came = bytearray()
        for _ in range(60):  # several windows, in which the kernel's own buffer takes nothing more
            came += await loop.sock_recv(sock, 2048)
            await asyncio.sleep(0.03)
        while b"\r\n\r\n" not in came or len(came) - came.index(b"\r\n\r\n") - 4 < len(LARGE):
            more = await loop.sock_recv(sock, 1 << 20)
            assert more, "the connection has ended"
            came += more
        assert came.endswith(LARGE)
        assert server.engine.arena.spans == server.engine.intake.bytes == 0


async def test_an_address_that_reads_nothing_is_refused_and_others_are_served(tmp_path: Path) -> None:
    given: dict[str, Any] = {"body_bytes": 40 << 20, "address_share": 0.5, "arena_bytes": 64 << 20}
    async with serving(tmp_path, **given) as (server, port), contextlib.AsyncExitStack() as stack:
        lines = [await stack.enter_async_context(deaf(port, POST)) for _ in range(2)]
        await until(lambda: server.engine.intake.bytes == 2 * len(LARGE))
        third = await stack.enter_async_context(deaf(port, POST))
        reader, _ = await asyncio.open_connection(sock=third.dup())
        status, headers, body = await read_answer(reader)
        told = orjson.loads(body)
        assert (status, told["code"]) == (503, "overloaded") and int(headers["retry-after"]) >= 1
        assert "answers of your address" in told["detail"]
        for request, answer in ((POST, LARGE), (SMALL, IMAGE)):
            async with dial(port) as (reader, writer):
                writer.write(request)
                assert (await read_answer(reader))[2] == answer
        assert len(lines) == 2


async def test_who_reads_nothing_keeps_no_shared_memory_from_others(tmp_path: Path) -> None:
    async with serving(tmp_path, arena_bytes=64 << 20) as (server, port), contextlib.AsyncExitStack() as stack:
        for number in range(1, 13):
            await stack.enter_async_context(deaf(port, POST))
            await until(lambda number=number: len(server.ran) == number)  # type: ignore[misc]
            await until(lambda number=number: server.engine.intake.bytes == number * len(LARGE))  # type: ignore[misc]
        assert server.engine.arena.used < server.engine.arena.size // 2
        async with dial(port) as (reader, writer):
            writer.write(POST)
            assert (await read_answer(reader))[2] == LARGE


async def test_of_answers_sent_as_one_an_address_leaves_no_more_unread_than_its_share(tmp_path: Path) -> None:
    image = IMAGE + bytes(3 << 20 | 900_000)
    request = head("/run/echo", b"image/png", len(image)) + image
    given: dict[str, Any] = {"body_bytes": 10 << 20, "address_share": 0.5, "arena_bytes": 256 << 20}
    async with serving(tmp_path, **given) as (server, port), contextlib.AsyncExitStack() as stack:
        for _ in range(8):
            await stack.enter_async_context(deaf(port, request))
            await asyncio.sleep(0.02)
            await until(lambda: not server.engine.metrics.http_in_progress)
            assert server.engine.intake.bytes <= 5 << 20
        assert server.engine.intake.bytes > 1 << 20


async def test_a_stream_of_events_that_has_nothing_to_say_stays_and_one_that_is_not_read_ends(tmp_path: Path) -> None:
    ended = asyncio.Event()

    async def events(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"event\n\n", "more_body": True})
        if scope["path"] == "/quiet":
            await asyncio.sleep(1.5)
        while not ended.is_set() and scope["path"] != "/quiet":
            await send({"type": "http.response.body", "body": bytes(1 << 16), "more_body": True})
            if (await asyncio.wait([gone := asyncio.ensure_future(receive())], timeout=0.001))[0]:
                ended.set()
            gone.cancel()
        await send({"type": "http.response.body", "body": b"last"})

    async with listen(events, settings(tmp_path, body_timeout=0.4)) as port:
        async with dial(port) as (reader, writer):
            writer.write(b"GET /quiet HTTP/1.1\r\nHost: here\r\n\r\n")
            assert b"last" in await reader.readuntil(b"last")
        async with deaf(port, b"GET /loud HTTP/1.1\r\nHost: here\r\n\r\n"):
            async with asyncio.timeout(30):
                await ended.wait()

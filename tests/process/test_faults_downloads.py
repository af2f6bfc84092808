"""Clients that leave, and results that are removed, in the middle of a download or of an event stream."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from core.errors import JobNotFound
from tests.process.door_kit import listen, until
from tests.pure.api_kit import held, submit, world
from tests.pure.dialect_kit import Server
from tests.pure.engine_kit import png

LARGE = png(1, 1600, 1200)  # noise: its 6 MB fit no socket's buffers


@dataclass(slots=True)
class Door:
    server: Server
    port: int
    outputs: Path

    async def job(self) -> str:
        """The result's path of a job that has ended."""
        headers = {"content-type": "image/png", "prefer": "wait=30"}
        answer = await self.server.client.post("/jobs", params={"model": "echo"}, content=LARGE, headers=headers)
        assert answer.status_code == 200
        return answer.json()["links"]["result"]

    def open_results(self) -> list[str]:
        """The results that this process has open."""
        links = []
        for fd in os.listdir("/proc/self/fd"):  # noqa: PTH208
            try:
                links.append(os.readlink(f"/proc/self/fd/{fd}"))  # noqa: PTH115
            except OSError:
                continue
        return [link for link in links if link.startswith(str(self.outputs)) and ".png" in link]

    def busy(self) -> int:
        """Requests that are being answered."""
        return self.server.engine.metrics.http_in_progress


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[Door]:
    async with world(tmp_path, max_body=16 << 20) as server:
        app = server.client._transport.app  # type: ignore[attr-defined]
        async with listen(app, server.engine.settings) as port:
            yield Door(server, port, tmp_path / "outputs")


@asynccontextmanager
async def slow_reader(port: int, head: bytes, body: bytes = b"") -> AsyncIterator[asyncio.StreamReader]:
    """A client with little room for what comes, whose connection is cut (not closed in good order) at the end."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=sock, limit=4096)
    writer.write(head + b" HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/png\r\n")
    writer.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)
    try:
        yield reader
    finally:
        writer.transport.abort()


async def test_a_client_that_leaves_in_mid_download_leaves_no_file_open(door: Door) -> None:
    link = await door.job()
    for _ in range(5):
        async with slow_reader(door.port, b"GET " + link.encode()) as reader:
            await reader.readexactly(20_000)
            assert door.open_results(), "it is being sent"
        await until(lambda: not door.open_results() and not door.busy())
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{door.port}") as client:
        assert (await client.get(link)).content == LARGE


async def test_a_client_that_leaves_while_its_answer_is_sent_gives_its_memory_back(door: Door) -> None:
    for _ in range(5):
        async with slow_reader(door.port, b"POST /run/echo", LARGE) as reader:
            await reader.readexactly(20_000)
        await until(lambda: not door.busy() and not door.server.engine.arena.spans)
    assert not door.server.engine.register.live and door.server.engine.admission.bytes == 0


async def test_a_result_that_retention_removes_during_its_download_arrives_whole(door: Door) -> None:
    link = await door.job()
    engine = door.server.engine
    async with slow_reader(door.port, b"GET " + link.encode()) as reader:
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"content-length: %d" % len(LARGE) in head.lower()
        engine._keeper._max_age = 1e-9
        await engine.forget_old()
        assert not list(door.outputs.glob("*.png")), "it is gone for everybody else"
        with pytest.raises(JobNotFound):
            await engine.job(link.split("/")[2])
        assert await reader.readexactly(len(LARGE)) == LARGE
    assert (await door.server.client.get(link)).status_code == 404


async def test_a_reader_of_events_that_leaves_is_forgotten_at_once(door: Door) -> None:
    engine = door.server.engine
    async with held(door.server):
        job = await submit(door.server)
        for _ in range(5):
            async with slow_reader(door.port, b"GET " + job["links"]["events"].encode()) as reader:
                await reader.readuntil(b"event: state")
                assert engine.watched
            await until(lambda: not engine.watched and not door.busy())
        feed = engine.register.live[job["id"]].feed
        assert feed is not None and feed.readers == 0
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{door.port}") as client:
        assert '"state":"succeeded"' in (await client.get(job["links"]["events"])).text


async def test_a_picture_of_its_own_for_each_of_many_slow_readers(door: Door) -> None:
    """Shared memory of an answer that is still being sent is given to nobody else."""
    pictures = [png(seed, 1000 + seed, 700) for seed in range(6)]

    async def ask(picture: bytes) -> bytes:
        async with slow_reader(door.port, b"POST /run/echo", picture) as reader:
            await reader.readuntil(b"\r\n\r\n")
            for _ in range(20):
                await asyncio.sleep(0)
            return await reader.readexactly(len(picture))

    assert await asyncio.gather(*(ask(picture) for picture in pictures)) == pictures
    await until(lambda: not door.server.engine.arena.spans)

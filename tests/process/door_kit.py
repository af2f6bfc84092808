"""A real uvicorn with the hardened protocol on a real socket, and a client that can misbehave byte by byte."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.types import ASGIApp

from api.listening import uvicorn_config
from core.settings import Settings


@contextlib.asynccontextmanager
async def listen(app: ASGIApp, settings: Settings) -> AsyncIterator[int]:
    """Serve the app on a free port of the loopback interface; yields the port."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        config = uvicorn_config(settings, app, lifespan="off", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        task = asyncio.create_task(server._serve([sock]))
        await until(lambda: server.started)
        try:
            yield sock.getsockname()[1]
        finally:
            server.should_exit = True
            await task


async def until(true: Callable[[], object]) -> None:
    """Let others run until it is true; the test's own timeout bounds it."""
    while not true():  # noqa: ASYNC110
        await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def dial(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A bare connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    """One answer: status, headers in lower case, body."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return int(head[0].split()[1]), headers, body


def settings(folder: Path, **given: Any) -> Settings:
    """Settings whose timeouts are short enough to be waited for."""
    return Settings(**{
        "outputs": folder / "outputs", "header_timeout": 0.2, "body_timeout": 0.2, "allowed_hosts": ("here", "x"),
        **given,
    })  # fmt: skip


class Turns:
    """The longest turn of the event loop, in seconds of this thread's CPU time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.longest = 0.0
        run: Any = asyncio.Handle._run

        def timed(handle: asyncio.Handle) -> None:
            began = time.thread_time()
            run(handle)
            self.longest = max(self.longest, time.thread_time() - began)

        monkeypatch.setattr(asyncio.Handle, "_run", timed)

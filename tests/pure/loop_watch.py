"""Measures what each callback of an event loop costs, while clients of other threads send to a server on it.

It counts the CPU time of the loop's thread, so a busy machine does not matter. Collections of garbage are left out:
they depend on what else the test process holds (a server freezes its own heap at the start).
"""

from __future__ import annotations

import asyncio
import gc
import socket
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

from api.app import create_app
from tests.process.door_kit import listen
from tests.pure import dialect_kit, engine_kit
from workers.memory_pool import Work
from workers.messages import RunItem

LIMIT = 0.020  # seconds of CPU time that a callback may take
READ_AT_ONCE = 1 << 20


class Watch:
    """The longest callback so far, in seconds, and what it was."""

    def __init__(self) -> None:
        self.longest, self.what = 0.0, ""

    def note(self, seconds: float, handle: asyncio.Handle) -> None:
        """What the pool in memory does, a worker of another process would do."""
        if seconds > self.longest and "MemoryPool" not in (what := repr(handle)):
            self.longest, self.what = seconds, what[:600]


@contextmanager
def watch() -> Iterator[Watch]:
    """Measure all callbacks of this process's loops while this block is open."""
    found, run = Watch(), asyncio.events.Handle._run

    def measured(handle: asyncio.Handle) -> None:
        began = time.thread_time()
        run(handle)
        found.note(time.thread_time() - began, handle)

    gc.disable()
    asyncio.events.Handle._run = measured  # type: ignore[method-assign]
    try:
        yield found
    finally:
        asyncio.events.Handle._run = run  # type: ignore[method-assign]
        gc.enable()


def small(_: RunItem, data: bytes) -> bytes:
    """What the workers answer: a small image, whatever they get."""
    return dialect_kit.png()


@asynccontextmanager
async def server(folder: Path, work: Work = small, **given: Any) -> AsyncIterator[int]:
    """The whole application on a free port, over a pool in memory; yields the port."""
    async with (
        engine_kit.engine(folder / "outputs", work, **given) as (engine, _),
        listen(create_app(engine, engine.settings), engine.settings) as port,
    ):
        yield port


async def ask(port: int, head: bytes, body: bytes | Iterable[bytes] = b"") -> bytes:
    """The beginning of the answer to a request that a thread sends: its status line and what came with it; empty when
    the server hung up."""
    return await asyncio.to_thread(_ask, port, head, body)


def _ask(port: int, head: bytes, body: bytes | Iterable[bytes]) -> bytes:
    answer = bytearray()
    with socket.create_connection(("127.0.0.1", port), timeout=30) as sock:
        with suppress(ConnectionError):  # it may have answered, and ended the connection, before it had read all
            sock.sendall(head)
            for piece in [body] if isinstance(body, bytes) else body:
                sock.sendall(piece)
        with suppress(ConnectionError):
            while more := sock.recv(READ_AT_ONCE):
                answer += more[: 4096 - len(answer)]
    return bytes(answer)


def post(path: str, body: bytes, kind: str = "application/json", *headers: str) -> tuple[bytes, bytes]:
    """The head and the body of a request on a connection of its own."""
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Type: {kind}", f"Content-Length: {len(body)}",
             "Connection: close", *headers]  # fmt: skip
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n", body

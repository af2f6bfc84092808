"""A whole server for dialect tests: the real door, app, engine, scheduler and store over a pool in memory."""

from __future__ import annotations

import asyncio
import hashlib
import io
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from api.app import create_app
from core.settings import Settings
from engine.build import build
from engine.engine import Engine
from workers.memory_pool import MemoryPool, Work, same_bytes
from workers.messages import RunItem

KEY, OTHER_KEY = "key-of-acme", "key-of-zenith"


def png(width: int = 64, height: int = 48, colour: str = "teal") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(out, "PNG")
    return out.getvalue()


def keys_file(folder: Path, tier: str = "", priority: str = "normal") -> Path:
    """Two tenants with a key each; the first one's has this tier and priority."""
    digests = [hashlib.sha256(key.encode()).hexdigest() for key in (KEY, OTHER_KEY)]
    file = folder / "keys.toml"
    file.write_text(
        f'[[keys]]\nsha256 = "{digests[0]}"\ntenant = "acme"\ntier = "{tier}"\npriority = "{priority}"\n'
        f'[[keys]]\nsha256 = "{digests[1]}"\ntenant = "zenith"\n'
    )
    return file


@dataclass(slots=True)
class Server:
    client: httpx.AsyncClient
    engine: Engine
    pool: MemoryPool

    @property
    def ran(self) -> list[RunItem]:
        """Everything that reached a worker."""
        return [item for worker in self.pool.workers.values() for batch in worker.ran for item in batch.items]

    async def until_ready(self) -> None:
        await until(lambda: bool(self.engine.snapshot()["ready"]))

    async def until_ran(self, number: int = 1) -> None:
        await until(lambda: len(self.ran) >= number)


async def until(condition: Callable[[], bool]) -> None:
    """Let everybody else run until it holds."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.001)  # not 0: a loop that never waits keeps the store from the interpreter lock


@asynccontextmanager
async def serve(
    folder: Path, *, workers: Sequence[str] = ("cpu:0", "cpu:1"), work: Work = same_bytes, boots: bool = True,
    **settings: Any,
) -> AsyncIterator[Server]:
    config = Settings(**{"outputs": folder / "outputs", "allowed_hosts": ("pool",), **settings})
    pools: list[MemoryPool] = []

    def make_pool(plans: object, catalogue: object, arena: Any) -> MemoryPool:
        pools.append(MemoryPool(arena, workers, work, root=str(config.outputs), boots=boots))
        return pools[0]

    engine = build(config, make_pool)
    await engine.start()
    transport = httpx.ASGITransport(create_app(engine, config))
    async with httpx.AsyncClient(transport=transport, base_url="http://pool") as client:
        server = Server(client, engine, pools[0])
        if boots:
            await server.until_ready()
        try:
            yield server
        finally:
            server.pool.release()
            await engine.stop(0.0)

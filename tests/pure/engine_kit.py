"""An engine with the in-memory pool: everything real but the worker processes."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from core.header import read_header
from core.model import read_spec
from core.request import ImagePart, ImageRequest
from core.settings import Settings
from engine.build import build
from engine.engine import Engine
from workers.memory_pool import MemoryPool, Work, same_bytes

TEST_MODELS = Path(__file__).resolve().parents[2] / "models" / "repository_test"


STUB = read_spec((TEST_MODELS / "stub.toml").read_text(), "stub")


def png(seed: int = 0, width: int = 16, height: int = 12) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def part(data: bytes | None = None, role: str = "image") -> ImagePart:
    data = data if data is not None else png()
    return ImagePart(role, data, read_header(data), len(data))  # type: ignore[arg-type]


def request(data: bytes | None = None, **more: Any) -> ImageRequest:
    """A request for the model `stub`, with its default parameters."""
    more.setdefault("model", "stub")
    more.setdefault("params", STUB.check_params({}))
    return ImageRequest(images=(part(data),), **more)


def settings(outputs: Path, **more: Any) -> Settings:
    given = {"outputs": outputs, "models_folder": TEST_MODELS, "devices": "cpu:2", "min_free_disk": 0, **more}
    return Settings(**given)


@asynccontextmanager
async def engine(
    outputs: Path,
    work: Work = same_bytes,
    boots: bool = True,
    workers: tuple[str, ...] = ("cpu:0", "cpu:1"),
    **more: Any,
) -> AsyncIterator[tuple[Engine, MemoryPool]]:
    """A started engine and its pool; stopped, checked and found without leftovers at the end."""
    pools: list[MemoryPool] = []

    def make_pool(_: Any, __: Any, arena: Any) -> MemoryPool:
        pools.append(MemoryPool(arena, workers, work, str(outputs), boots))
        return pools[-1]

    made = build(settings(outputs, **more), make_pool)
    await made.start()
    try:
        yield made, pools[0]
        made.scheduler.check()
    finally:
        await made.stop(grace=0)

"""The native API for tests: toy models over the real engine and a pool in memory."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import orjson

from tests.pure.dialect_kit import Server, png, serve

ECHO = """
adapter = "nowhere:Echo"
task = "stub"
description = "Gives the image back."
raw = true
[params.strength]
type = "float"
default = 0.5
min = 0
max = 1
[params.steps]
type = "int"
default = 20
min = 1
max = 100
[params.prompt]
type = "string"
default = ""
[params.mode]
type = "string"
default = "soft"
choices = ["soft", "hard"]
description = "How hard."
"""
FILL = """
adapter = "nowhere:Fill"
task = "inpaint"
needs_mask = true
[params.seed]
type = "int"
required = true
"""
IMAGE = png()
TEXT = base64.b64encode(IMAGE).decode()


def world(folder: Path, **given: Any) -> AbstractAsyncContextManager[Server]:
    """A server that offers `echo` and `fill`; settings as given."""
    models = folder / "models"
    models.mkdir(exist_ok=True)
    (models / "echo.toml").write_text(ECHO)
    (models / "fill.toml").write_text(FILL)
    return serve(folder, **{"models_folder": models, "models": ("echo", "fill"), "arena_bytes": 64 << 20, **given})


async def submit(server: Server, **more: Any) -> dict[str, Any]:
    """A job of `echo` that has been accepted."""
    headers = {"content-type": "image/png", **more.pop("headers", {})}
    answer = await server.client.post("/jobs", params={"model": "echo", **more}, content=IMAGE, headers=headers)
    assert answer.status_code in (200, 202), answer.text
    found: dict[str, Any] = answer.json()
    return found


async def ended(server: Server, job: dict[str, Any]) -> dict[str, Any]:
    """The job when it has ended."""
    await server.engine.wait(job["id"], 30)
    found: dict[str, Any] = (await server.client.get(job["links"]["self"])).json()
    return found


@asynccontextmanager
async def nothing_happens(server: Server) -> AsyncIterator[None]:
    """Meanwhile no job is accepted, no worker is touched; no room in the queue is taken after it."""
    before, ran = server.engine.snapshot()["jobs"], len(server.ran)
    yield
    await asyncio.sleep(0)
    after = server.engine.snapshot()
    assert after["jobs"] == before
    assert len(server.ran) == ran
    assert after["queue"]["bytes"] == after["receiving"]["bytes"] == 0
    assert server.engine.arena.spans == 0


def problem(answer: httpx.Response) -> dict[str, Any]:
    """The problem document of a refusal, checked for what every one must have."""
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    told: dict[str, Any] = orjson.loads(answer.content)
    assert told["status"] == answer.status_code
    assert told["detail"] and told["title"] and told["request_id"] == answer.headers["x-request-id"]
    assert "Traceback" not in answer.text and str(Path(__file__).parent) not in answer.text
    return told


@asynccontextmanager
async def held(server: Server) -> AsyncIterator[None]:
    """Workers take batches but do not answer while this is open."""
    server.pool.hold()
    try:
        yield
    finally:
        server.pool.release()

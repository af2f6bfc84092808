"""Is it alive, can it serve, and its numbers for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from fastapi import APIRouter
from starlette.responses import Response

from api import openapi
from api.shared_page import SharedPage
from engine.engine import Engine

METRICS_LIFETIME = 1.0  # seconds in which all who ask for the metrics get the same page


def router(engine: Engine, render: Callable[[], Coroutine[Any, Any, tuple[bytes, str]]]) -> APIRouter:
    """The routes. `render` gives the metrics page and its content type."""
    api = APIRouter(tags=["system"])
    numbers = SharedPage(render, METRICS_LIFETIME)

    @api.get("/health/live", **openapi.answers("Alive", 200))
    async def live() -> Response:
        """200 as long as the server answers at all."""
        return Response(b'{"status":"alive"}', media_type="application/json")

    @api.get("/health/ready", **openapi.answers("Ready", 200, 503))
    async def ready() -> Response:
        """200 when a device can serve, else 503 with the reason; the state of each device and of the disk either
        way. A full disk keeps jobs that are stored from being taken, but not `/run`: it is told, and stays 200."""
        told = engine.snapshot()
        body = {
            "ready": told["ready"],
            "reason": told["reason"],
            "storage": told["storage"]["state"],
            "storage_reason": told["storage"]["reason"],
            "devices": [
                {
                    "device": worker["worker"], "state": worker["state"], "detail": worker["detail"],
                    "refused": worker["refused"],
                }
                for worker in told["workers"]
            ],
        }
        headers = {} if told["ready"] else {"retry-after": "1", "retry-after-ms": "1000"}
        return Response(orjson.dumps(body), 200 if told["ready"] else 503, headers, "application/json")

    @api.get("/metrics", **openapi.answers("text", 200))
    async def metrics() -> Response:
        """Metrics in Prometheus' text format, as they were at most a second ago."""
        page, kind = await numbers()
        return Response(page, headers={"content-type": kind})

    return api

"""The whole door: every dialect behind one ASGI application.

A dialect is a module with `router(engine, settings) -> APIRouter`; one with its own error shape has `dress(error,
request_id) -> (status, body)`, `FAULT`, the model of such a body, and `PREFIXES`, the paths whose errors wear it.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import importlib.util
import time
from collections.abc import Callable, Sequence
from typing import Any

import orjson
from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Lifespan, Receive, Scope, Send

from api import docs_page, jobs, run, system
from api.auth import Keys
from api.description import Description, Part
from api.errors import Wardrobe, from_http, from_validation, problem
from api.limits import CLIENT_GONE, Door, whole
from api.run import PREFIX, Run
from core import VERSION
from core.disk import disk_fault
from core.errors import ImagePoolError, InternalError
from core.settings import Settings
from engine.engine import Engine

DIALECTS = ("i2ii", "imagen", "iopaint", "lama_gateway", "kserve", "openai", "imagegenx", "lora", "web")
EXPOSED = (
    "Location", "Retry-After", "ETag", "X-Request-ID", "X-Job-Id", "X-Device", "X-Batch-Size", "X-Compute-Ms",
    "X-Ignored", "Server-Timing", "RateLimit", "RateLimit-Policy", "Preference-Applied", "X-Seed",
    "X-Inference-Time-Ms",
)  # fmt: skip


class Switch:
    """`/run/...` goes the short way, everything else through the framework. HEAD is answered as GET; the protocol
    leaves the body out."""

    def __init__(self, run: Run, api: FastAPI) -> None:
        self.run, self.api = run, api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(PREFIX):
            await self.run(scope, receive, send)
        else:
            if scope.get("method") == "HEAD":
                scope = {**scope, "method": "GET"}
            await self.api(scope, whole(receive), send)


def create_app(
    engine: Engine,
    settings: Settings,
    *,
    lifespan: Lifespan[FastAPI] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> ASGIApp:
    """The application. Raises ValueError when the keys file cannot be read or a dialect is not known."""
    wardrobe = Wardrobe()
    api = create_api(engine, settings, wardrobe, lifespan)
    door: ASGIApp = Door(
        Switch(Run(engine, settings), api), settings, Keys(settings.keys_file, clock, settings.tiers), wardrobe,
        engine.metrics, clock, engine.signer, lambda: engine.draining, engine.intake,
    )
    if not settings.cors_origins:
        return door
    return CORSMiddleware(
        door,
        allow_origins=settings.cors_origins,
        allow_methods=("GET", "POST", "PUT", "DELETE"),
        allow_headers=("*",),
        expose_headers=EXPOSED,
    )


def create_api(
    engine: Engine, settings: Settings, wardrobe: Wardrobe, lifespan: Lifespan[FastAPI] | None = None
) -> FastAPI:
    """The framework's part: routers, their errors and the API description."""
    api = FastAPI(
        title="ImagePool",
        description="Image models over every GPU of a host.",
        version=VERSION,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
    )
    parts = [
        Part("", system.router(engine, engine.render_metrics), system.__doc__),
        Part("run", APIRouter(), run.__doc__),  # served by the switch; it has nothing to include
    ]
    wardrobe.hang(("/health/",), problem)
    there = [name for name in DIALECTS if importlib.util.find_spec(f"api.{name}") is not None]
    wanted = settings.dialects or ("jobs", *there)
    for name in wanted:
        if name not in ("jobs", *there):
            raise ValueError(f"there is no dialect '{name}'; there are: jobs, {', '.join(there)}")
    if "jobs" in wanted:
        parts.append(Part("", jobs.router(engine, settings), jobs.__doc__))
    parts += [_part(name, engine, settings, wardrobe) for name in there if name in wanted]
    for part in parts:
        api.include_router(part.router)
    api.include_router(docs_page.router(settings.docs))
    _handle_errors(api, wardrobe)
    _describe(api, parts, wardrobe, settings)
    return api


def _part(name: str, engine: Engine, settings: Settings, wardrobe: Wardrobe) -> Part:
    """A dialect, whose errors wear its dress from now on."""
    dialect = importlib.import_module(f"api.{name}")
    if hasattr(dialect, "dress"):
        wardrobe.hang(dialect.PREFIXES, dialect.dress, dialect.FAULT)
    return Part(name, dialect.router(engine, settings), dialect.__doc__)


def _describe(api: FastAPI, parts: Sequence[Part], wardrobe: Wardrobe, settings: Settings) -> None:
    """Serve the document at `/openapi.json`: made when it is first asked for, in a thread, because it takes a third of
    a second, and kept as it is sent."""

    @functools.cache
    def document() -> dict[str, Any]:
        keys = settings.keys_file is not None
        made = Description(wardrobe, keys).make(api.title, api.version, api.description, parts)
        return made | ({"servers": [{"url": settings.public_url}]} if settings.public_url else {})

    @functools.cache
    def page() -> bytes:
        return orjson.dumps(document())

    made: bytes | None = None

    async def show(_: Request) -> Response:
        nonlocal made
        if made is None:
            made = await asyncio.to_thread(page)
        return Response(made, media_type="application/json")

    api.openapi = document  # type: ignore[method-assign]
    api.router.routes.insert(0, Route("/openapi.json", show, include_in_schema=False))  # before the framework's own


def methods_at(api: FastAPI, scope: Scope) -> list[str]:
    """The methods that are served at a path. (The framework tells those of one route, of several at the path.)"""
    return [
        method for method in ("GET", "POST", "PUT", "DELETE")
        if any(route.matches({**scope, "method": method})[0] is Match.FULL for route in api.routes)
    ]  # fmt: skip


def _handle_errors(api: FastAPI, wardrobe: Wardrobe) -> None:
    def dressed(request: Request, error: ImagePoolError) -> Response:
        return wardrobe.respond(error, request.scope["path"], request.scope["request_id"])

    @api.exception_handler(ImagePoolError)
    async def ours(request: Request, fault: ImagePoolError) -> Response:
        return dressed(request, fault)

    @api.exception_handler(HTTPException)
    async def frameworks(request: Request, fault: HTTPException) -> Response:
        cause = fault.__cause__  # the framework wraps what the door raised while a body was read
        if fault.status_code == 405:
            fault = HTTPException(405, headers={"Allow": ", ".join(methods_at(api, request.scope))})
        if isinstance(cause, OSError):  # where it spooled a form
            cause = disk_fault(cause)
        return dressed(request, cause if isinstance(cause, ImagePoolError) else from_http(fault))

    @api.exception_handler(RequestValidationError)
    async def validation(request: Request, fault: RequestValidationError) -> Response:
        return dressed(request, from_validation(fault))

    @api.exception_handler(ClientDisconnect)
    async def gone(request: Request, fault: Exception) -> Response:
        return Response(status_code=CLIENT_GONE)

    @api.exception_handler(Exception)
    async def defect(request: Request, fault: Exception) -> Response:
        name = request.scope["request_id"]
        return dressed(request, InternalError(f"the server has a defect; tell its operator the request id {name}"))

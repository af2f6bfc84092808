"""The whole door: every dialect behind one ASGI application.

A dialect is a module with `router(engine, settings) -> APIRouter`; one with its own error shape has `dress(error,
request_id) -> (status, body)` and `PREFIXES`, the paths whose errors wear it.
"""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import ASGIApp, Lifespan, Receive, Scope, Send

from api import docs_page, jobs, openapi, system
from api.auth import Keys
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
        Switch(Run(engine, settings), api), settings, Keys(settings.keys_file, clock), wardrobe, engine.metrics, clock,
        engine.signer, lambda: engine.draining, engine.intake,
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
    api.include_router(system.router(engine, engine.render_metrics))
    wardrobe.hang(("/health/",), problem)
    there = [name for name in DIALECTS if importlib.util.find_spec(f"api.{name}") is not None]
    wanted = settings.dialects or ("jobs", *there)
    for name in wanted:
        if name not in ("jobs", *there):
            raise ValueError(f"there is no dialect '{name}'; there are: jobs, {', '.join(there)}")
    if "jobs" in wanted:
        api.include_router(jobs.router(engine, settings))
    for name in there:
        if name in wanted:
            _include(api, importlib.import_module(f"api.{name}"), engine, settings, wardrobe)
    api.include_router(docs_page.router(settings.docs))
    _handle_errors(api, wardrobe)
    api.openapi = lambda: openapi.describe(api, settings)  # type: ignore[method-assign]
    return api


def _include(api: FastAPI, dialect: Any, engine: Engine, settings: Settings, wardrobe: Wardrobe) -> None:
    api.include_router(dialect.router(engine, settings))
    if hasattr(dialect, "dress"):
        wardrobe.hang(dialect.PREFIXES, dialect.dress)


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

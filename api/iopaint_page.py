"""IOPaint's own page, unmodified, out of the `iopaint` package when that is installed (without its dependencies):

    pip install --no-deps iopaint==1.6.0

It is served at `/iopaint`, and at `/` of a port of its own (`iopaint_port`). It asks for `/assets`, `/api/v1` and
`/socket.io` by absolute paths, so these are where they are on both.
"""

from __future__ import annotations

import importlib.util
import mimetypes
from collections.abc import Sequence
from pathlib import Path

from fastapi import APIRouter
from starlette.responses import FileResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from api.errors import NotFound

HINT = "IOPaint's page is not installed here; its operator may: pip install --no-deps iopaint==1.6.0"
FOREVER = "public, max-age=31536000, immutable"  # the names of assets hold a hash of their content
PLACES = {"/": "/iopaint/", "/index.html": "/iopaint/", "/favicon.ico": "/iopaint/favicon.ico"}


def files() -> dict[str, Path]:
    """The page's files by their paths below its root; none when the package is not installed."""
    package = importlib.util.find_spec("iopaint")  # finds it, but does not import it
    if package is None or package.origin is None:
        return {}
    root = Path(package.origin).parent / "web_app"
    return {file.relative_to(root).as_posix(): file for file in root.rglob("*") if file.is_file()}


def router(origins: Sequence[str]) -> APIRouter:
    """`/iopaint/` and `/assets/`. Pages of `origins` may show it in a frame."""
    routes = APIRouter(include_in_schema=False)
    served = files()
    framing = {"content-security-policy": " ".join(("frame-ancestors 'self'", *origins))}

    def answer(name: str, cache: str) -> Response:
        if name not in served:
            raise NotFound(HINT if not served else "there is no such file")
        kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
        return FileResponse(served[name], media_type=kind, headers={"cache-control": cache, **framing})

    @routes.get("/iopaint")
    @routes.get("/iopaint/")
    async def page() -> Response:
        return answer("index.html", "no-cache")

    @routes.get("/iopaint/favicon.ico")
    async def icon() -> Response:
        return answer("favicon.ico", "max-age=86400")

    @routes.get("/assets/{name}")
    async def asset(name: str) -> Response:
        return answer(f"assets/{name}", FOREVER)

    return routes


class OwnPort:
    """The application, with the page at `/` for those who come by that port."""

    def __init__(self, app: ASGIApp, port: int) -> None:
        self._app, self._port = app, port

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = PLACES.get(scope.get("path", ""))
        if scope["type"] == "http" and path and scope["server"][1] == self._port:
            scope = {**scope, "path": path, "raw_path": path.encode()}
        await self._app(scope, receive, send)

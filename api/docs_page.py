"""The API description as a page: Swagger UI out of the `fastapi-offline` package, so a browser without an internet
sees it too. Addresses are relative: the page works behind a proxy's prefix as well.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from fastapi import APIRouter
from starlette.responses import FileResponse, HTMLResponse, PlainTextResponse, RedirectResponse, Response

from api.errors import NotFound
from core import VERSION

FILES = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}
POLICY = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data: blob:; media-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
}
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>ImagePool</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""
START = """SwaggerUIBundle({
  url: "openapi.json", dom_id: "#swagger-ui", deepLinking: true, validatorUrl: null,
  presets: [SwaggerUIBundle.presets.apis, SwaggerUIBundle.SwaggerUIStandalonePreset], layout: "BaseLayout",
});
"""
GREETING = f"""ImagePool {VERSION}

/openapi.json   every route with its fields
/health/ready   whether a device can serve
"""


def swagger_ui() -> Path:
    """The folder of its files. Raises ValueError when the package is not installed."""
    package = importlib.util.find_spec("fastapi_offline")  # finds it, but does not import it
    if package is None or package.origin is None:
        raise ValueError("the page /docs is not installed: pip install -r requirements.txt, or start with --no-docs")
    return Path(package.origin).parent / "static"


def router(shown: bool) -> APIRouter:
    """`/`, and where the description is `shown` as a page, `/docs` with its files. Raises ValueError."""
    routes = APIRouter(include_in_schema=False)
    if not shown:
        routes.add_api_route("/", lambda: PlainTextResponse(GREETING), response_class=Response)
        return routes
    folder = swagger_ui()

    @routes.get("/")
    async def bare() -> Response:
        return RedirectResponse("docs")

    @routes.get("/docs")
    async def page() -> Response:
        return HTMLResponse(PAGE, headers=POLICY)

    @routes.get("/docs/start.js")
    async def start() -> Response:
        return Response(START, media_type="text/javascript")

    @routes.get("/docs/{name}")
    async def asset(name: str) -> Response:
        if name not in FILES:
            raise NotFound("there is no such file")
        return FileResponse(folder / name, media_type=FILES[name], headers={"cache-control": "max-age=3600"})

    return routes

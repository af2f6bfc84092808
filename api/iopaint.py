"""IOPaint 1.6's API: `/api/v1/inpaint` and what its page needs beside it. Its clients need not change. Events go to the
page by `/socket.io/` (Socket.IO 5, long polling or a web socket), for which a description has no words.

Images travel as base64 in JSON one way and as bare bytes the other. Every error body is `{"error", "detail", "body",
"errors"}`; `errors` is the sentence that the page shows. A request that is wrong gets a 4xx; IOPaint often says 500.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from fastapi import APIRouter, Request, UploadFile
from starlette.responses import JSONResponse, Response

from api import iopaint_events, iopaint_page, iopaint_plugins, iopaint_sockets
from api.answers import base64_response, image_response
from api.auth import caller
from api.dialect import UploadRoute
from api.errors import HttpError, ValidationFailed, status_of
from api.forms import content
from api.images import read_image
from api.iopaint_desk import Desk, short_body
from api.iopaint_events import Events
from api.iopaint_images import as_mask, file_name, parameters
from api.iopaint_schema import (
    SAMPLERS,
    Fault,
    GenInfo,
    InpaintRequest,
    ModelInfo,
    PluginInfo,
    Refused,
    ServerConfig,
    SwitchModel,
    answers,
    read,
    takes,
)
from api.limits import file_limit
from api.troubles import WAITS
from core.errors import ImagePoolError, TooLarge
from core.request import OutputFormat
from core.settings import Settings
from engine.engine import Engine
from engine.results import MEDIA_TYPES

ROUTES = (
    "inpaint", "server-config", "model", "samplers", "inputimage", "gen-info", "adjust_mask", "run_plugin_gen_mask",
    "run_plugin_gen_image", "switch_plugin_model", "save_image", "medias", "media_file", "media_thumbnail_file",
)  # fmt: skip
PREFIXES = tuple(f"/api/v1/{route}" for route in ROUTES)
FAULT = Fault
NO_INPUT = "No input image configured"
MAX_STEPS = 1000  # that a page is told of, whatever `sd_steps` says


def dress(error: ImagePoolError, request_id: str) -> tuple[int, dict[str, Any]]:
    """IOPaint's error body. Of its own refusals `errors` begins with the status, as there."""
    status = status_of(error)
    if isinstance(error, HttpError):
        kind, sentence = "HTTPException", f"{status}: {error.message}"
    else:
        kind, sentence = type(error).__name__, error.message
    detail = error.details["errors"] if isinstance(error, ValidationFailed) else error.message
    return status, {"error": kind, "detail": detail, "body": "", "errors": sentence}


class FileRoute(UploadRoute):
    """A route that takes one file as a form."""

    settings: Settings

    def most(self, request: Request) -> int:
        return file_limit(caller(request), self.settings)

    def too_large(self, most: int) -> TooLarge:
        return TooLarge(f"the file has more than {most} bytes")


def router(engine: Engine, settings: Settings) -> APIRouter:
    """All routes, with the page and its events."""
    routes = APIRouter(tags=["iopaint"])
    forms = APIRouter(route_class=type("FormRoute", (FileRoute,), {"settings": settings}))
    desk = Desk(engine, settings, "iopaint")
    events = Events(engine)

    @routes.post(
        "/api/v1/inpaint",
        operation_id="iopaint_inpaint",
        summary="Fill what the mask covers",
        response_class=Response,
        openapi_extra=takes(InpaintRequest, WAITS),
        responses=answers(
            *MEDIA_TYPES.values(), "text/plain", headers={"X-Seed": {"schema": {"type": "integer"}}}
        ),
    )
    async def inpaint(request: Request) -> Response:
        began = time.perf_counter()
        desk.visit(request)
        body = await desk.read(request, InpaintRequest)
        with desk.watch(request):
            image = await desk.part(request, body.take("image"))
            mask = as_mask(await desk.part(request, body.take("mask"), "mask"), image)
            spec = desk.models.of(caller(request).tenant)
            as_text = wants_text(request)
            output = OutputFormat(
                "png" if as_text else image.header.format, settings.iopaint_quality, keep_metadata=True,
                subsampling="420",
            )
            progress = Progress(events, request, body.sd_steps)
            _, result = await desk.run(
                request, spec.name, (image, mask), body.params_for(spec), output, progress.heard
            )
        events.emit(request, "diffusion_finish")
        headers = {
            "x-seed": str(body.sd_seed), "x-inference-time-ms": f"{(time.perf_counter() - began) * 1000:.1f}",
        }  # fmt: skip
        return base64_response(result, headers) if as_text else image_response(result, headers)

    @routes.get("/api/v1/server-config", operation_id="iopaint_server_config", summary="What this server offers",
                response_model=ServerConfig)
    async def server_config(request: Request) -> Response:
        offered = iopaint_plugins.offered(engine.catalogue)
        upscalers, removers = (
            [plugin.model for plugin in offered if plugin.name == name] for name in ("RealESRGAN", "RemoveBG")
        )
        told = ServerConfig(
            plugins=[
                PluginInfo(name=one.name, support_gen_image=True, support_gen_mask=one.gives_mask) for one in offered
            ],
            modelInfos=[ModelInfo.of(spec) for spec in desk.models.all()],
            removeBGModel=removers[0] if removers else "",
            removeBGModels=removers,
            realesrganModel=upscalers[0] if upscalers else "",
            realesrganModels=upscalers,
        )
        return JSONResponse(told.model_dump())

    @routes.get("/api/v1/model", operation_id="iopaint_model", summary="The model in use", response_model=ModelInfo,
                responses=answers())
    async def model(request: Request) -> Response:
        return JSONResponse(ModelInfo.of(desk.models.of(caller(request).tenant)).model_dump())

    @routes.post("/api/v1/model", operation_id="iopaint_switch_model", summary="Use another model from now on",
                 response_model=ModelInfo, openapi_extra=takes(SwitchModel), responses=answers())
    async def switch(request: Request) -> Response:
        name = read(SwitchModel, await short_body(request)).name
        return JSONResponse(ModelInfo.of(desk.models.choose(caller(request).tenant, name)).model_dump())

    @routes.get("/api/v1/samplers", operation_id="iopaint_samplers", summary="Names of diffusion samplers",
                response_model=list[str])
    async def samplers() -> Response:
        return JSONResponse(SAMPLERS)

    @routes.get("/api/v1/inputimage", operation_id="iopaint_inputimage", summary="The image to begin with",
                response_class=Response)
    async def input_image() -> Response:
        if settings.iopaint_input is None:
            return JSONResponse(dress(Refused(200, NO_INPUT), "")[1])
        try:
            data = await asyncio.to_thread(settings.iopaint_input.read_bytes)
        except OSError:
            raise Refused(404, "Input image not found") from None
        return Response(data, media_type=MEDIA_TYPES[read_image(data, max_pixels=settings.max_pixels).header.format])

    @forms.post("/api/v1/gen-info", operation_id="iopaint_gen_info", summary="The prompts that a PNG was made with",
                response_model=GenInfo, responses=answers())
    async def gen_info(file: UploadFile) -> Response:
        found = parameters(await content(file), max_pixels=settings.max_pixels)
        prompt, _, rest = found.partition("Negative prompt: ")
        negative = rest.partition("Negative prompt: ")[0].partition("\n")[0]
        return JSONResponse({"prompt": prompt.strip(), "negative_prompt": negative.strip()})

    @forms.post("/api/v1/save_image", operation_id="iopaint_save_image", summary="Keep an image on the server",
                response_model=None, responses=answers())
    async def save_image(request: Request, file: UploadFile) -> Response:
        if engine.saved is None:
            raise Refused(400, "Output directory not configured or doesn't exist")
        name, data = file_name(file.filename), await content(file)
        read_image(data, max_pixels=settings.max_pixels)
        await asyncio.to_thread(engine.saved.put, name, data, caller(request).tenant)
        return JSONResponse(None)

    routes.include_router(forms)
    routes.include_router(iopaint_plugins.router(engine, desk))
    routes.include_router(iopaint_events.router(events))
    routes.include_router(iopaint_sockets.router(events))
    routes.include_router(iopaint_page.router(settings.cors_origins))
    return routes


class Progress:
    """Tells a request's page of each step once. A model speaks of fractions; the page counts steps, from 0."""

    def __init__(self, events: Events, request: Request, steps: int) -> None:
        self._events, self._request, self._steps = events, request, min(max(1, steps), MAX_STEPS)
        self._last = -1

    def heard(self, fraction: float) -> None:
        step = min(int(fraction * self._steps), self._steps - 1)
        if step > self._last:
            self._last = step
            self._events.emit(self._request, "diffusion_progress", {"step": step})


def wants_text(request: Request) -> bool:
    """Whether the client asks for base64 text, as the lama-triton gateway gives it, and would take nothing else: some
    HTTP libraries name text/plain beside everything."""
    kinds = {kind.partition(";")[0].strip().lower() for kind in request.headers.get("accept", "").split(",")}
    return "text/plain" in kinds and not any(kind == "*/*" or kind.startswith("image/") for kind in kinds)

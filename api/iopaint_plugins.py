"""IOPaint's plugins, as far as our models do the same, and its mask tool.

RemoveBG cuts out, or gives the mask of what it would cut out; RealESRGAN enlarges. A mask comes back as the page draws
one: its brush colour on nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from api.answers import image_response
from api.iopaint_desk import Desk, short_body
from api.iopaint_schema import AdjustMask, Lenient, Refused, RunPlugin, SwitchPluginModel, answers, read, takes
from api.troubles import WAITS
from core.errors import InvalidParameter
from core.model import Catalogue
from core.request import ImagePart, OutputFormat
from engine.engine import Engine

MASK_MODEL = "mask_tools"


@dataclass(frozen=True, slots=True)
class Plugin:
    """A plugin of IOPaint's and the model that stands for it, and for those that IOPaint knows. `mask`: the parameters
    that make it give a mask."""

    name: str
    model: str
    mask: Mapping[str, Any] | None = None
    known: tuple[str, ...] = ()

    @property
    def gives_mask(self) -> bool:
        return self.mask is not None

    def params(self, body: RunPlugin) -> dict[str, Any]:
        """The parameters of a run that gives an image. Raises `InvalidParameter`."""
        if self.name != "RealESRGAN":
            return {}
        if body.scale not in (2, 4):
            raise InvalidParameter("scale must be 2 or 4", parameter="scale")
        return {"scale": int(body.scale)}


REMOVERS = (
    "briaai/RMBG-1.4", "briaai/RMBG-2.0", "u2net", "u2netp", "u2net_human_seg", "u2net_cloth_seg", "silueta",
    "isnet-general-use", "birefnet-general", "birefnet-general-lite", "birefnet-portrait", "birefnet-dis",
    "birefnet-hrsod", "birefnet-cod", "birefnet-massive",
)  # fmt: skip
UPSCALERS = ("realesr-general-x4v3", "RealESRGAN_x4plus", "RealESRGAN_x4plus_anime_6B")
PLUGINS = (
    Plugin("RemoveBG", "background_remove", {"output": "mask"}, REMOVERS),
    Plugin("RealESRGAN", "upscale", None, UPSCALERS),
)


def offered(catalogue: Catalogue) -> list[Plugin]:
    """Those whose model this server offers; without the mask tool they give no masks."""
    there = [plugin for plugin in PLUGINS if plugin.model in catalogue]
    return there if MASK_MODEL in catalogue else [replace(plugin, mask=None) for plugin in there]


def router(engine: Engine, desk: Desk) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["iopaint"])
    plugins = {plugin.name: plugin for plugin in offered(engine.catalogue)}

    def find(name: str, *, mask: bool) -> Plugin:
        plugin = plugins.get(name)
        if plugin is None:
            raise Refused(422, "Plugin not found")
        if mask and not plugin.gives_mask:
            raise Refused(422, "Plugin does not support output image")  # IOPaint's words
        return plugin

    def described(kind: type[Lenient], name: str, about: str) -> dict[str, Any]:
        return {
            "operation_id": f"iopaint_{name}", "summary": about, "response_class": Response,
            "openapi_extra": takes(kind, WAITS), "responses": answers("image/png"),
        }  # fmt: skip

    async def tool(request: Request, mask: ImagePart, operate: str, kernel_size: int = 0) -> Response:
        plain = replace(mask, role="image", header=replace(mask.header, alpha=False))
        params = {"operate": operate, "kernel_size": kernel_size}
        _, result = await desk.run(request, MASK_MODEL, (plain,), params)
        return image_response(result)

    @routes.post("/api/v1/adjust_mask", **described(AdjustMask, "adjust_mask", "Grow, shrink or reverse a mask"))
    async def adjust_mask(request: Request) -> Response:
        desk.visit(request)
        body = await desk.read(request, AdjustMask)
        with desk.watch(request):
            mask = await desk.part(request, body.mask, "mask")
            return await tool(request, mask, body.operate, body.kernel_size)

    @routes.post("/api/v1/run_plugin_gen_mask", **described(RunPlugin, "run_plugin_gen_mask", "Mask what it finds"))
    async def gen_mask(request: Request) -> Response:
        desk.visit(request)
        body = await desk.read(request, RunPlugin)
        plugin = find(body.name, mask=True)
        with desk.watch(request):
            image = await desk.part(request, body.image)
            _, found = await desk.run(request, plugin.model, (image,), plugin.mask or {})
            return await tool(request, desk.again(found, "mask"), "brush")

    @routes.post("/api/v1/run_plugin_gen_image", **described(RunPlugin, "run_plugin_gen_image", "Change an image"))
    async def gen_image(request: Request) -> Response:
        desk.visit(request)
        body = await desk.read(request, RunPlugin)
        plugin = find(body.name, mask=False)
        with desk.watch(request):
            image = await desk.part(request, body.image)
            output = OutputFormat("png", keep_metadata=True)
            _, found = await desk.run(request, plugin.model, (image,), plugin.params(body), output)
            return image_response(found)

    @routes.post("/api/v1/switch_plugin_model", operation_id="iopaint_switch_plugin_model", response_model=None,
                 summary="Choose a plugin's model", openapi_extra=takes(SwitchPluginModel), responses=answers())
    async def switch(request: Request) -> Response:
        body = read(SwitchPluginModel, await short_body(request))
        plugin = plugins.get(body.plugin_name)
        if plugin is not None and body.model_name not in (plugin.model, *plugin.known):
            raise Refused(422, f"{plugin.name} has one model here: {plugin.model}")
        return JSONResponse(None)

    return routes

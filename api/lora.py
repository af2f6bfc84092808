"""LoRAs of the diffusion models: upload, list, remove. No restart is needed; requests name them as `lora_name`.

All tenants share one folder. Where the server has API keys, only those of priority paid or better change it. Answers
and errors wear ImageGenX's envelope, whose route this is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Any
from weakref import WeakValueDictionary

from fastapi import APIRouter
from fastapi import Path as PathField
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from api import lora_upload
from api.auth import caller
from api.errors import HttpError, NotFound
from api.imagegenx import dress
from api.imagegenx_docs import Envelope, answers
from api.imagegenx_tasks import envelope
from api.limits import ENVELOPE, LORA_UPLOAD, content_length
from core.errors import InvalidParameter
from core.loras import Lora, LoraFacts, checked_name
from core.request import Priority
from core.settings import Settings
from engine.engine import Engine
from engine.intake import network

Found = list[tuple[Lora, LoraFacts]]
PREFIXES = ("/api/v1/lora",)
FAULT = Envelope
__all__ = ["PREFIXES", "dress", "router"]
BODY = {
    "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": {
        "type": "object", "required": ["file"],
        "properties": {
            "file": {"type": "string", "contentMediaType": "application/octet-stream"},
            "name": {"type": "string", "description": "Left out: the file's own, without its ending."},
        },
    }}}},
}  # fmt: skip


def lora_json(lora: Lora, facts: LoraFacts) -> dict[str, Any]:
    """One LoRA as clients see it. `base` is empty where the file does not tell which models it was made for."""
    return {
        "name": lora.name,
        "size": lora.size,
        "rank": facts.rank,
        "layers": facts.layers,
        "base": facts.base,
        "upload_time": datetime.fromtimestamp(lora.modified / 1e9, UTC).isoformat(timespec="seconds"),
    }


class Looks:
    """Looks at the folder, one at a time: who comes while one is under way shares the next with all others who do."""

    def __init__(self, look: Callable[[], Found]) -> None:
        self._look, self._turn = look, asyncio.Lock()
        self._next: asyncio.Task[Found] | None = None

    async def next(self) -> Found:
        """What a look sees that begins now or later."""
        if self._next is None:
            self._next = asyncio.create_task(self._wait())
        return await asyncio.shield(self._next)

    async def _wait(self) -> Found:
        async with self._turn:
            self._next = None
            return await asyncio.to_thread(self._look)


class Uploads:
    """Checks of uploaded files, one at a time. Of those of one owner at most one waits for that, so whoever sends many
    waits for himself."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._owners: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def keep(
        self, owner: str, check: Callable[[], LoraFacts], keep: Callable[[LoraFacts], Lora]
    ) -> tuple[Lora, LoraFacts]:
        """Both are called in threads. Raises what they raise."""
        async with self._owners.setdefault(owner, asyncio.Lock()):
            async with self._turn:
                facts = await asyncio.to_thread(check)
            return await asyncio.to_thread(keep, facts), facts


def router(engine: Engine, settings: Settings) -> APIRouter:
    """The routes."""
    api = APIRouter(prefix="/api/v1/lora", tags=["lora"])
    loras = engine.loras
    assert loras is not None
    looks, uploads = Looks(loras.list), Uploads()

    def check_right(request: Request) -> None:
        if settings.keys_file is not None and caller(request).ceiling > Priority.PAID:
            raise HttpError(403, "LoRAs may be changed with an API key of priority 'paid' or better")

    def owner(request: Request) -> str:
        """A tenant; without keys, a network."""
        if settings.keys_file is not None or request.client is None:
            return caller(request).tenant
        return network(request.client.host)

    @api.post(LORA_UPLOAD.removeprefix(api.prefix), operation_id="lora_upload", summary="Upload a LoRA",
              openapi_extra=BODY, **answers())
    async def upload(request: Request) -> Response:
        check_right(request)
        if settings.lora_max == 0:
            raise HttpError(403, "this server takes no LoRAs; its operator puts them into their folder")
        expected = max(0, (content_length(dict(request.scope["headers"])) or 0) - ENVELOPE)
        await asyncio.to_thread(loras.expect, expected)
        incoming = loras.receive()
        try:
            name = await lora_upload.receive(request, incoming)
            check, keep = partial(loras.check, incoming), partial(loras.keep, name, incoming)
            found = await uploads.keep(owner(request), check, keep)
        finally:
            await asyncio.to_thread(incoming.close)
        return JSONResponse(envelope(lora_json(*found)))

    @api.get("/list", operation_id="lora_list", summary="All LoRAs", **answers())
    async def list_() -> Response:
        found = await looks.next()
        return JSONResponse(envelope({"loras": [lora_json(*one) for one in found], "total": len(found)}))

    @api.delete("/{name}", operation_id="lora_delete", summary="Remove a LoRA", **answers())
    async def delete(request: Request, name: Annotated[str, PathField(max_length=200)]) -> Response:
        check_right(request)
        try:
            await asyncio.to_thread(loras.delete, name)
        except InvalidParameter as fault:
            raise NotFound(fault.message) from None
        return JSONResponse(envelope({"name": checked_name(name)}))

    return api

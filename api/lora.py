"""LoRAs of the diffusion models: upload, list, remove. No restart is needed; requests name them as `lora_name`.

All tenants share one folder. Where the server has API keys, only those of priority paid or better change it. Answers
and errors wear ImageGenX's envelope, whose route this is.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter
from fastapi import Path as PathField
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from api.auth import caller
from api.errors import HttpError, NotFound
from api.imagegenx import dress
from api.imagegenx_docs import answers
from api.imagegenx_tasks import envelope
from api.limits import LORA_UPLOAD
from api.submission import media_type
from core.errors import BadRequest, InvalidParameter, UnsupportedEncoding
from core.loras import SUFFIX, Lora, LoraFacts, checked_name
from core.request import Priority
from core.settings import Settings
from engine.engine import Engine

PREFIXES = ("/api/v1/lora",)
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


def router(engine: Engine, settings: Settings) -> APIRouter:
    """The routes."""
    api = APIRouter(prefix="/api/v1/lora", tags=["lora"])
    loras = engine.loras
    assert loras is not None

    def check_right(request: Request) -> None:
        if settings.keys_file is not None and caller(request).ceiling > Priority.PAID:
            raise HttpError(403, "LoRAs may be changed with an API key of priority 'paid' or better")

    @api.post(LORA_UPLOAD.removeprefix(api.prefix), operation_id="lora_upload", summary="Upload a LoRA",
              openapi_extra=BODY, **answers())
    async def upload(request: Request) -> Response:
        check_right(request)
        if settings.lora_max == 0:
            raise HttpError(403, "this server takes no LoRAs; its operator puts them into their folder")
        if media_type(request.headers.get("content-type", "")) != "multipart/form-data":
            raise UnsupportedEncoding("send multipart/form-data with the .safetensors file as 'file'")
        try:  # a large file is spooled to the disk as it comes
            form = await MultiPartParser(request.headers, request.stream(), max_files=1, max_fields=8).parse()
        except MultiPartException as fault:
            raise BadRequest(f"the multipart body cannot be read: {fault.message}") from None
        try:
            file, name = form.get("file"), form.get("name")
            if not isinstance(file, UploadFile) or isinstance(name, UploadFile):
                raise InvalidParameter("'file' is missing; send the .safetensors file in it", parameter="file")
            found = await asyncio.to_thread(loras.put, _name(name, file), file.file)
        finally:
            await form.close()
        return JSONResponse(envelope(lora_json(*found)))

    @api.get("/list", operation_id="lora_list", summary="All LoRAs", **answers())
    async def list_() -> Response:
        found = await asyncio.to_thread(loras.list)
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


def _name(given: str | None, file: UploadFile) -> str:
    """The name it is to have: the one given, or that of the file, of which only the last part counts."""
    own = (file.filename or "").replace("\\", "/").rpartition("/")[2]
    if not own.lower().endswith(SUFFIX):
        raise InvalidParameter(f"a LoRA is a {SUFFIX} file; others can hold code and are not taken", parameter="file")
    return checked_name(given or own[: -len(SUFFIX)])

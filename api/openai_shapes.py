"""What OpenAI's clients are answered: images, events of a stream, models. Tokens are not counted: they are all 0."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, Field

from api.openai_requests import ImagesRequest
from api.openapi import DESCRIPTIONS, IMAGE
from api.troubles import SERVES_FILE, SIGNED, WAITS, raises
from core.job import Job
from core.model import ModelSpec

USAGE = {
    "input_tokens": 0, "input_tokens_details": {"image_tokens": 0, "text_tokens": 0}, "output_tokens": 0,
    "total_tokens": 0,
}  # fmt: skip
QUALITIES = ("low", "medium", "high", "xhigh", "max")


class Image(BaseModel):
    """One image: as base64, or where it lies."""

    b64_json: str | None = None
    url: str | None = None


class Images(BaseModel):
    """The answer of the three routes that make images."""

    created: int
    data: list[Image]
    output_format: str
    size: str = Field(description="Width and height of the first, as in 1024x1024.")
    background: str
    quality: str | None = None
    usage: dict[str, Any] = Field(description="Tokens, which are not counted here.")


class Model(BaseModel):
    """A model that is offered."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "imagepool"


class ModelPage(BaseModel):
    """All of them."""

    object: str = "list"
    data: list[Model]


class Fault(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """Every error of this API."""

    error: Fault


def model(spec: ModelSpec, created: int) -> dict[str, Any]:
    """A model; `created` is when the server began to offer it."""
    return {"id": spec.name, "object": "model", "created": created, "owned_by": "imagepool"}


def images(asked: ImagesRequest, jobs: Sequence[Job], data: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """The answer to a request whose jobs have succeeded."""
    quality = {"quality": asked.quality} if asked.quality in QUALITIES else {}
    return {
        "created": int(time.time()), "data": list(data), "output_format": asked.output_format,
        "size": _size(jobs[0]), "background": _background(asked), **quality, "usage": USAGE,
    }  # fmt: skip


def partial_image(kind: str, asked: ImagesRequest, job: Job, image: str, index: int) -> dict[str, Any]:
    """The event with a preview, which is a JPEG whatever format the image itself will have."""
    return _event(f"{kind}.partial_image", asked, job, image) | {"partial_image_index": index, "output_format": "jpeg"}


def completed(kind: str, asked: ImagesRequest, job: Job, image: str) -> dict[str, Any]:
    """The event with the image."""
    return _event(f"{kind}.completed", asked, job, image) | {"usage": USAGE}


def _event(kind: str, asked: ImagesRequest, job: Job, image: str) -> dict[str, Any]:
    return {
        "type": kind, "b64_json": image, "created_at": int(time.time()), "size": _size(job),
        "quality": asked.quality if asked.quality in QUALITIES else "auto", "background": _background(asked),
        "output_format": asked.output_format,
    }  # fmt: skip


def _background(asked: ImagesRequest) -> str:
    return "transparent" if asked.background == "transparent" else "opaque"


def _size(job: Job) -> str:
    return f"{job.result.width}x{job.result.height}" if job.result else "auto"


def answers(kind: str, *files: str, prompt: bool = True) -> dict[str, Any]:
    """Keyword arguments of a route: the body it takes, of this content type, with these files and perhaps a prompt, and
    its answers."""
    schema = ImagesRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    binary = {"type": "string", "contentMediaType": "application/octet-stream"}
    schema["properties"] = {**dict.fromkeys(files, binary), **schema["properties"]}
    schema["required"] = [*(["prompt"] if prompt else ()), *(["image"] if "image" in files else ())]
    body = {"required": True, "content": {kind: {"schema": schema}}}
    events = {"description": DESCRIPTIONS[200], "content": {"text/event-stream": {}}}
    return {
        "openapi_extra": {"requestBody": body, **raises(WAITS)}, "response_model": Images, "responses": {200: events},
    }  # fmt: skip


def image_answers() -> dict[str, Any]:
    """Keyword arguments of a route: what one that serves an image answers."""
    responses = {
        200: {"description": DESCRIPTIONS[200], "content": IMAGE},
        304: {"description": DESCRIPTIONS[304]},
        403: {"description": "The signed address is over or was changed"},
    }
    return {"responses": responses, "openapi_extra": raises(WAITS, SERVES_FILE, SIGNED)}

"""What clients of OpenAI's Images API send: JSON or a form with files, and what our models make of the fields.

Fields that mean nothing here (`user`, `moderation`, `style`, `quality`, ...) are taken and have no effect. Beside
OpenAI's there are those that other servers of this API have: a seed, steps, guidance, a negative prompt.
"""

from __future__ import annotations

import random
import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from starlette.requests import Request

from api import choice, strict_json
from api.fields import Real, Whole
from api.images import read_base64
from api.json_pieces import LongText
from api.submission import MAX_IMAGES, Submission, media_type, read_form
from core.errors import BadRequest, InvalidParameter, UnsupportedEncoding
from core.model import ModelSpec
from core.request import ImagePart, OutputFormat

SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")
MOST = 10  # images of one request
THEIR_WORDS = {"steps": "num_inference_steps", "guidance": "guidance_scale"}  # by the model's
RANDOM = -1  # the seed that lets the server draw one


class ImagesRequest(BaseModel):
    """The fields of all three routes. Numbers may come as texts, as they do in forms."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())

    prompt: str = Field("", max_length=32_000, description="What to draw, or how to change the image.")
    model: str | None = Field(None, description="A name of `GET /v1/models`; any other lets the server choose.")
    n: Whole = Field(1, ge=1, le=MOST, description="How many; each has a seed of its own.")
    size: str | None = Field(None, description="`auto`, or width and height as in `1024x1024`.")
    response_format: Literal["url", "b64_json"] | None = Field(
        None, description="Left out: `b64_json`, but `url` for a model called dall-e-..., as there."
    )
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: Whole | None = Field(None, ge=0, le=100, description="Quality of a JPEG or WebP.")
    background: Literal["transparent", "opaque", "auto"] = Field(
        "auto", description="`transparent`: the subject is cut out, where this server has a model for it."
    )
    quality: Literal["standard", "hd", "low", "medium", "high", "xhigh", "max", "auto"] = "auto"
    stream: bool = Field(False, description="Server-sent events instead of one answer.")
    partial_images: Whole = Field(0, ge=0, le=3, description="How many previews a stream shows at most.")
    moderation: str | None = None
    style: str | None = None
    complexity: str | None = None
    input_fidelity: str | None = None
    user: str | None = None
    safety_identifier: str | None = None
    negative_prompt: str | None = Field(None, description="Not OpenAI's, as those that follow.")
    seed: Whole | None = None
    num_inference_steps: Whole | None = None
    guidance_scale: Real | None = None
    true_cfg_scale: Real | None = None
    strength: Real | None = None
    width: Whole | None = None
    height: Whole | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        """null is how this API's clients say nothing."""
        return {name: value for name, value in given.items() if value is not None}

    @field_validator("size")
    @classmethod
    def _readable(cls, size: str) -> str:
        if size != "auto" and not SIZE.fullmatch(size):
            raise ValueError("must be 'auto' or WIDTHxHEIGHT, as in 1024x1024")
        return size

    @model_validator(mode="after")
    def _one_stream(self) -> ImagesRequest:
        if self.stream and self.n > 1:
            raise ValueError("Streaming is only supported with n=1.")
        if self.stream and self.response_format == "url":
            raise ValueError("a stream holds its image as b64_json")
        return self

    @property
    def as_url(self) -> bool:
        """Whether the answer names addresses instead of holding the images."""
        if self.response_format is None:
            return (self.model or "").startswith("dall-e") and not self.stream
        return self.response_format == "url"

    @property
    def output(self) -> OutputFormat:
        quality = None if self.output_compression is None else max(1, self.output_compression)
        return OutputFormat(self.output_format, None if self.output_format == "png" else quality)

    def params(self, spec: ModelSpec, image: ImagePart | None) -> list[dict[str, Any]]:
        """The model's parameters, once for each of the `n` images: seeds count up, from a drawn one when none was
        given, or -1. Raises `InvalidParameter`."""
        asked = {
            "prompt": self.prompt if self.prompt or "prompt" in spec.params else None,
            "negative_prompt": self.negative_prompt,
            "steps": self.num_inference_steps,
            "guidance": self.guidance_scale,
            "true_cfg_scale": self.true_cfg_scale,
            "strength": self.strength,
            "seed": self.seed,
            **self._size(spec, image),
        }
        with choice.in_their_words(THEIR_WORDS | ({"width": "size", "height": "size"} if self.size else {})):
            return self._checked(spec, asked)

    def _checked(self, spec: ModelSpec, asked: dict[str, Any]) -> list[dict[str, Any]]:
        if "seed" not in spec.params:
            return [spec.check_params(_given(asked))] * self.n
        seed = random.getrandbits(31) if self.seed in (None, RANDOM) else self.seed
        return [spec.check_params(_given(asked | {"seed": seed + number})) for number in range(self.n)]

    def _size(self, spec: ModelSpec, image: ImagePart | None) -> dict[str, int | None]:
        found = SIZE.fullmatch(self.size or "")
        width, height = (int(found[1]), int(found[2])) if found else (self.width, self.height)
        if width is None and height is None:
            return {}
        if {"width", "height"} <= spec.params.keys():
            return {"width": width, "height": height}
        have = (image.header.upright_width, image.header.upright_height) if image else None
        if (width, height) != have:
            raise InvalidParameter(
                f"model '{spec.name}' does not change an image's size; leave 'size' out, or say 'auto'",
                parameter="size",
            )
        return {}


def _given(asked: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in asked.items() if value is not None}


async def read(request: Request, max_file: int) -> tuple[ImagesRequest, Submission]:
    """The fields and the files of a request. Raises `BadRequest` and what lies under it."""
    found = Submission()
    kind = media_type(request.headers.get("content-type", ""))
    if kind == "multipart/form-data":
        await read_form(found, request.headers, request.stream(), max_file)
    elif kind == "application/json":
        given = await strict_json.read(request.stream(), ("image_url",))
        if not isinstance(given, dict):
            raise BadRequest("the JSON body must be an object")
        await _read_references(found, given, max_file)
        found.fields = given
    else:
        raise UnsupportedEncoding("send application/json, or multipart/form-data with the images as files")
    try:
        return ImagesRequest.model_validate(found.fields), found
    except ValidationError as fault:
        raise _refusal(fault) from None


async def _read_references(found: Submission, given: dict[str, Any], max_file: int) -> None:
    """Images in JSON: `images: [{"image_url": "data:..."}]` and `mask` alike, as newer clients may send them."""
    references = given.pop("images", None) or []
    mask = given.pop("mask", None)
    if not isinstance(references, list):
        raise InvalidParameter("'images' must be a list of objects with an image_url", parameter="images")
    check_number(len(references))
    for role, sent in (("image", references), ("mask", [mask] if mask else [])):
        for one in sent:
            url = one.get("image_url") if isinstance(one, dict) else None
            if not isinstance(url, str | LongText) or not url.startswith("data:"):
                raise InvalidParameter(f"'{role}' must hold an image_url that is a data: URL", parameter=role)
            found.add_image(role, await read_base64(url, role, max_bytes=max_file))  # type: ignore[arg-type]


def check_number(images: int) -> None:
    """Raise `InvalidParameter` for more images than one request may have, its mask not counted."""
    if images > MAX_IMAGES:
        raise InvalidParameter(
            f"Invalid 'image': {images} images were sent; the most is {MAX_IMAGES}.", parameter="image"
        )


def _refusal(fault: ValidationError) -> InvalidParameter:
    first = fault.errors(include_input=False, include_url=False)[0]
    name = ".".join(str(part) for part in first["loc"])[:64]
    if first["type"] == "extra_forbidden":
        return InvalidParameter(f"Unknown parameter: '{name}'.", parameter=name)
    why = first["msg"].removeprefix("Value error, ")
    return InvalidParameter(f"'{name}': {why}" if name else why, parameter=name or "stream")

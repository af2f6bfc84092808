"""The lama-triton gateway's `/api/v1/inpaint/preprocessed`: image and mask come as the network's own float tensors.

As JSON, the tensors in base64, as that gateway has it; or raw: `Inference-Header-Content-Length` bytes of the same JSON
without the tensors, then the image's bytes, then the mask's. The tensors become 8-bit images again (a worker does that)
and go the way of all others, to `lama` where it is offered (whatever model a page has chosen), with `hd_strategy`
Original: what the client padded is cut off, the model pads as it does, outside the mask every byte stays.

The rest of that gateway's contract: `Accept: text/plain` at `/api/v1/inpaint` (`api.iopaint`), `backend_live` and
`backend_ready` in `/health` (`api.i2ii`).
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from api.answers import base64_response, image_response
from api.auth import caller
from api.errors import ValidationFailed, status_of
from api.iopaint import wants_text
from api.iopaint_desk import SHORT, Desk
from api.iopaint_images import as_mask, decode
from api.iopaint_schema import InpaintRequest, Lenient, read, takes
from api.pictures import Picture
from api.spool import collect
from api.troubles import WAITS
from core.data import Data
from core.errors import BadRequest, ImagePoolError, InvalidImage, InvalidParameter, TooLarge
from core.header import ImageHeader
from core.request import ImagePart
from core.settings import Settings
from engine.engine import Engine
from engine.results import ResultBody

PATH = "/api/v1/inpaint/preprocessed"
PREFIXES = (PATH,)
MODEL = "tensor_image"
FLOAT = 4  # bytes
MULTIPLE = 8  # of which the network's sides must be
HEAD_LENGTH = "inference-header-content-length"
ORIGINAL = b'{"hd_strategy": "Original"}'
FAILED_HERE = ("model_failed", "bad_output", "out_of_memory", "poisonous_job", "worker_lost")


def dress(error: ImagePoolError, request_id: str) -> tuple[int, dict[str, Any]]:
    """422 in FastAPI's words; 502 `{"error"}` when the inference failed; 503 `{"status": "error", "detail"}`."""
    status = status_of(error)
    if isinstance(error, ValidationFailed):
        return 422, {"detail": error.details["errors"]}
    if error.code in FAILED_HERE:
        return 502, {"error": f"Inference failed: {error.message}"}
    if status == 503:
        return 503, {"status": "error", "detail": error.message}
    return status, {"detail": error.message}


class Fault(BaseModel):
    """Most errors."""

    detail: str | list[dict[str, Any]]


class Failed(BaseModel):
    """An inference that failed."""

    error: str


class NotNow(BaseModel):
    """Nothing can serve at present."""

    status: str
    detail: str


FAULT = Fault
Shape = tuple[int, int, int, int]


class Shapes(Lenient):
    """What both forms say about the tensors."""

    image_shape: Shape = Field(description="1, 3, height, width: multiples of 8.")
    mask_shape: Shape = Field(description="1, 1, height, width.")
    original_height: int = Field(ge=1, description="Rows that are no padding.")
    original_width: int = Field(ge=1, description="Columns that are no padding.")


class Preprocessed(Shapes):
    """The JSON form."""

    image_tensor_b64: Picture = Field(description="base64 of float32, little-endian, 0..1, RGB planes.")
    mask_tensor_b64: Picture = Field(description="base64 of float32, little-endian, 0 or 1.")


def check(shapes: Shapes, max_pixels: int) -> None:
    """Raises `InvalidParameter` or `TooLarge`."""
    *head, height, width = shapes.image_shape
    if head != [1, 3]:
        raise InvalidParameter("image_shape must be [1, 3, height, width]: one image", parameter="image_shape")
    if shapes.mask_shape != (1, 1, height, width):
        raise InvalidParameter(f"mask_shape must be [1, 1, {height}, {width}] for this image", parameter="mask_shape")
    if min(height, width) < MULTIPLE or height % MULTIPLE or width % MULTIPLE:
        raise InvalidParameter(f"height and width must be multiples of {MULTIPLE}", parameter="image_shape")
    if shapes.original_height > height or shapes.original_width > width:
        raise InvalidParameter(
            f"original_height and original_width must be at most {height} and {width}", parameter="original_height"
        )
    if height * width > max_pixels or max(height, width) > 0xFFFF:
        raise TooLarge(f"the tensor has {height} x {width} pixels; at most {max_pixels:,} are accepted")


def tensor(name: str, data: Data, shape: Shape) -> ImagePart:
    """A tensor as `tensor_image` takes it. Raises `InvalidImage` when it is not as long as its shape."""
    _, channels, height, width = shape
    want = channels * height * width * FLOAT
    if len(data) != want:
        raise InvalidImage(f"the {name} tensor has {len(data)} bytes; its shape needs {want}", parameter=name)
    return ImagePart("image", data, ImageHeader("png", width, height), len(data))


def split(body: Data, head_length: str) -> tuple[Shapes, Data, Data]:
    """The raw form: shapes, image, mask. Raises `BadRequest` and what lies under it."""
    if not head_length.isdecimal() or len(head_length) > 9 or not 0 < int(head_length) <= len(body):
        raise BadRequest("Inference-Header-Content-Length must be the length of the JSON that the body begins with")
    end = int(head_length)
    if end > SHORT:
        raise TooLarge(f"the JSON that the body begins with has more than {SHORT} bytes")
    view = memoryview(body)
    shapes = read(Shapes, bytes(view[:end]))
    pixels = shapes.image_shape[2] * shapes.image_shape[3]
    middle = end + max(0, pixels) * 3 * FLOAT
    return shapes, view[end:middle], view[middle:]


def router(engine: Engine, settings: Settings) -> APIRouter:
    """The route."""
    routes = APIRouter(tags=["lama-triton"])
    desk = Desk(engine, settings, "lama_gateway")
    description = takes(Preprocessed, WAITS) | {"parameters": [{
        "name": "Inference-Header-Content-Length", "in": "header", "required": False,
        "schema": {"type": "integer", "minimum": 1}, "description": "Length of the JSON that a raw body begins with.",
    }]}  # fmt: skip
    description["requestBody"]["content"]["application/octet-stream"] = {"schema": {"type": "string"}}

    async def picture(request: Request, part: ImagePart, shape: Shape, shapes: Shapes) -> ResultBody:
        """One of the tensors as a PNG."""
        _, channels, height, width = shape
        params = {
            "channels": channels, "height": height, "width": width, "rows": shapes.original_height,
            "columns": shapes.original_width,
        }  # fmt: skip
        return (await desk.run(request, MODEL, (part,), params))[1]

    async def pictures(request: Request, image: Data, mask: Data, shapes: Shapes) -> tuple[ImagePart, ImagePart]:
        """Both tensors as pictures. When one of them is none, nobody waits for the other."""
        given = tensor("image", image, shapes.image_shape), tensor("mask", mask, shapes.mask_shape)
        try:
            async with asyncio.TaskGroup() as group:
                shown = group.create_task(picture(request, given[0], shapes.image_shape, shapes))
                hole = group.create_task(picture(request, given[1], shapes.mask_shape, shapes))
        except ExceptionGroup as faults:
            raise faults.exceptions[0] from None
        part = desk.again(shown.result())
        return part, as_mask(desk.again(hole.result(), "mask"), part)

    @routes.post(
        PATH,
        operation_id="lama_gateway_preprocessed",
        summary="Fill what the mask covers, both given as tensors",
        response_class=Response,
        openapi_extra=description,
        responses={
            200: {
                "description": "A PNG, in base64 unless it came raw.",
                "content": {"text/plain": {}, "image/png": {}},
            },
            502: {"model": Failed, "description": "The inference failed."},
            503: {"model": NotNow, "description": "Not now; see Retry-After."},
        },
    )
    async def preprocessed(request: Request) -> Response:
        began = time.perf_counter()
        desk.visit(request)
        head_length = request.headers.get(HEAD_LENGTH)
        given = await desk.read(request, Preprocessed) if head_length is None else None
        body = await collect(request.stream()) if given is None else b""
        with desk.watch(request):
            if given is not None:
                check(given, settings.max_pixels)
                shapes: Shapes = given
                image: Data = await decode(given.image_tensor_b64, "image_tensor_b64")
                mask: Data = await decode(given.mask_tensor_b64, "mask_tensor_b64")
            else:
                shapes, image, mask = split(body, head_length or "")
                check(shapes, settings.max_pixels)
            parts = await pictures(request, image, mask, shapes)
            spec = desk.models.of(caller(request).tenant)
            params = read(InpaintRequest, ORIGINAL).params_for(spec)
            _, result = await desk.run(request, spec.name, parts, params)
        headers = {"x-inference-time-ms": f"{(time.perf_counter() - began) * 1000:.1f}"}
        if wants_text(request) or (head_length is None and "image/" not in request.headers.get("accept", "")):
            return base64_response(result, headers)
        return image_response(result, headers)

    return routes

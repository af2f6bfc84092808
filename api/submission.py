"""A request of the native API as it comes: multipart, JSON or a bare image; the same fields out of all three."""

from __future__ import annotations

import urllib.parse
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers, UploadFile
from starlette.requests import Request

from api import forms, strict_json
from api.auth import Caller
from api.images import check_mask, read_base64, read_image
from api.json_pieces import LongText
from api.options import read_flag, read_options, single
from api.spool import collect
from core.data import Data
from core.errors import BadRequest, InvalidParameter, TooLarge, UnsupportedEncoding
from core.model import Catalogue, ModelSpec
from core.request import ROLES, ImagePart, ImageRequest, Role
from core.turns import Turn

MAX_IMAGES = 16
MAX_QUERY = 64
FIELDS: dict[str, Role] = {role: role for role in ROLES} | {f"{role}[]": role for role in ROLES}


@dataclass(slots=True)
class Submission:
    """What was sent: images still encoded, fields still unchecked."""

    images: dict[Role, list[Data]] = field(default_factory=lambda: {role: [] for role in ROLES})
    fields: dict[str, Any] = field(default_factory=dict)

    def add_image(self, role: Role, data: Data) -> None:
        self.images[role].append(data)

    def add_field(self, name: str, value: Any) -> None:
        self.fields[name] = single(name, value, self.fields)


async def read_submission(request: Request, max_file: int) -> Submission:
    """Read the whole body by its content type. Raises `BadRequest` and what lies under it."""
    kind = media_type(request.headers.get("content-type", ""))
    found = Submission()
    read_query(found, request.scope["query_string"])
    if kind == "multipart/form-data":
        await read_form(found, request.headers, request.stream(), max_file)
    elif kind == "application/json":
        await _read_json(found, request, max_file)
    elif kind.startswith("image/") or kind == "application/octet-stream":
        found.add_image("image", await collect(request.stream()))
    else:
        raise UnsupportedEncoding("send multipart/form-data, application/json or the image itself as image/*")
    return found


def media_type(header: str) -> str:
    """The type of a Content-Type header without its parameters, in lower case."""
    return header.partition(";")[0].strip().lower()


def read_query(found: Submission, query: bytes) -> None:
    """Add the fields of a query string. Raises `BadRequest`."""
    if not query:
        return
    try:
        pairs = urllib.parse.parse_qsl(query.decode("ascii"), True, max_num_fields=MAX_QUERY, errors="strict")
    except ValueError:
        raise BadRequest(f"the query cannot be read: it is not UTF-8 or has more than {MAX_QUERY} fields") from None
    for name, value in pairs:
        found.add_field(name, value)


async def read_form(found: Submission, headers: Headers, body: AsyncIterator[bytes], max_file: int) -> None:
    """Add the files and fields of a multipart body. Raises `BadRequest`, `TooLarge`, `InvalidParameter`."""
    # One file more than is taken, so that the 17th image gets a sentence of its own.
    form = await forms.read(headers, body, max_files=MAX_IMAGES + 2)
    try:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                role = FIELDS.get(name)
                if role is None:
                    raise InvalidParameter(
                        f"a file goes into {', '.join(ROLES)}, not '{name[:64]}'", parameter=name[:64]
                    )
                found.add_image(role, _limited(await forms.content(value), role, max_file))
            elif name in FIELDS:
                raise InvalidParameter(f"'{name}' must be a file (a part with a filename)", parameter=name)
            else:
                found.add_field(name, value)
    finally:
        await form.close()


async def _read_json(found: Submission, request: Request, max_file: int) -> None:
    given = await strict_json.read(request.stream(), FIELDS)
    if not isinstance(given, dict):
        raise BadRequest("the JSON body must be an object")
    for name, value in given.items():
        if name not in FIELDS:
            found.add_field(name, value)
            continue
        texts = value if isinstance(value, list) else [] if value is None else [value]
        if len(texts) > MAX_IMAGES:
            raise _too_many(len(texts))
        for text in texts:
            if not isinstance(text, str | LongText):
                raise InvalidParameter(f"'{name}' must be base64 text or a data: URL", parameter=name)
            found.add_image(FIELDS[name], await read_base64(text, FIELDS[name], max_bytes=max_file))


def _limited(data: Data, role: Role, max_file: int) -> Data:
    if len(data) > max_file:
        raise TooLarge(f"the {role} has {len(data)} bytes; the most is {max_file}", parameter=role)
    return data


def _too_many(count: int) -> InvalidParameter:
    return InvalidParameter(f"{count} images in one request; the most is {MAX_IMAGES}", parameter="image")


async def shape_request(
    found: Submission, catalogue: Catalogue, caller: Caller, *, max_file: int, max_pixels: int, **more: Any
) -> ImageRequest:
    """The request that a submission asks for; `more` are further fields of `ImageRequest`. Raises `UnknownModel`,
    `InvalidParameter`, `InvalidImage`, `UnsupportedImage`, `TooLarge`."""
    fields = dict(found.fields)
    name, previews = fields.pop("model", None), read_flag("previews", fields.pop("previews", None))
    if not isinstance(name, str) or not name:
        raise InvalidParameter("'model' is required; GET /models lists them", parameter="model")
    spec = catalogue[name]
    options = read_options(spec, caller, fields)
    return ImageRequest(
        model=spec.name,
        images=await read_parts(spec, found, max_file, max_pixels),
        params=options.params,
        output=options.output,
        priority=options.priority,
        tenant=caller.tenant,
        previews=previews,
        **{"deadline": options.deadline, **more},
    )


async def read_parts(spec: ModelSpec, found: Submission, max_file: int, max_pixels: int) -> tuple[ImagePart, ...]:
    """The images, in the order of their roles, as many of each as the model takes. Raises as `shape_request`."""
    count = sum(len(sent) for role, sent in found.images.items() if role != "mask")
    if count > MAX_IMAGES:
        raise _too_many(count)
    check_counts(spec, {role: len(sent) for role, sent in found.images.items()})
    if found.images["mask"] and not found.images["image"]:
        raise InvalidParameter("a mask belongs to an image; send that too", parameter="mask")
    parts: dict[Role, list[ImagePart]] = {role: [] for role in ROLES}
    turn = Turn()
    for role, sent in found.images.items():
        for data in sent:
            parts[role].append(read_image(_limited(data, role, max_file), role, max_pixels=max_pixels))
            await turn.over()
    for mask in parts["mask"]:
        check_mask(parts["image"][0], mask)
    return tuple(part for role in ROLES for part in parts[role])


def check_counts(spec: ModelSpec, images: Mapping[Role, int]) -> None:
    """Raise `InvalidParameter` unless the model takes so many images of each role."""
    for role in ROLES:
        sent, (least, most) = images.get(role, 0), spec.parts.get(role, (0, 0))
        if not least <= sent <= most:
            raise InvalidParameter(
                f"model '{spec.name}' {_wants(role, least, most)}; {sent} {'was' if sent == 1 else 'were'} sent",
                parameter=role,
            )


def _wants(role: Role, least: int, most: int) -> str:
    if most == 0:
        return f"takes no {role}"
    verb = "needs" if role == "mask" and least else "takes"
    return f"{verb} one {role}" if least == most == 1 else f"{verb} {least} to {most} images as {role}"

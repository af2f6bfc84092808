"""Images as IOPaint's clients send them, base64 in JSON.

Decoding is as tolerant as IOPaint's, and more: any data: URL of an image or of application/octet-stream, line breaks,
the URL-safe alphabet, missing padding, characters that do not belong there.
"""

from __future__ import annotations

import zlib
from dataclasses import replace

from api.images import DATA_URL, MAX_HEAD, read_base64, read_image
from api.iopaint_schema import Refused
from api.pictures import Picture
from core.data import Data
from core.errors import BadRequest, InvalidImage, InvalidParameter
from core.headers import png
from core.request import ImagePart, Role

MAX_TEXT = 64 << 10  # bytes of a PNG's text


async def read_part(text: Picture | None, role: Role, *, max_bytes: int, max_pixels: int) -> ImagePart:
    """An image of the body. Raises `InvalidParameter` when there is none, `InvalidImage`, `UnsupportedImage` or
    `TooLarge`."""
    if text is None:
        raise InvalidParameter(f"'{role}' is missing: send it as base64 or as a data: URL", parameter=role)
    return read_image(await decode(text, role, max_bytes=max_bytes), role, max_pixels=max_pixels)


def as_mask(mask: ImagePart, image: ImagePart) -> ImagePart:
    """The mask by its brightness alone: strokes are drawn onto a transparent one. Raises IOPaint's 400 when its size is
    not the image's (both upright)."""
    have, want = ((part.header.upright_height, part.header.upright_width) for part in (mask, image))
    if have != want:
        raise Refused(400, f"Image size({want}) and mask size({have}) not match.")
    return replace(mask, header=replace(mask.header, alpha=False))


async def decode(text: Picture, role: str, *, max_bytes: int = 1 << 40) -> Data:
    """The bytes of a base64 text or data: URL. Raises `InvalidImage`, `TooLarge`."""
    return await read_base64(text, role, max_bytes=max_bytes, lenient=True, open_url=_opened)


def _opened(text: bytes, role: str) -> bytes:
    if text[:5].lower() != DATA_URL:
        return text
    head, comma, rest = text.partition(b",")
    kind, *extras = head[5:MAX_HEAD].lower().split(b";")
    image = kind.startswith(b"image/") or kind == b"application/octet-stream"
    if not comma or b"base64" not in extras or not image:
        raise InvalidImage(f"the {role} is a data: URL, but not of an image in base64", parameter=role)
    return rest


def parameters(data: Data, *, max_pixels: int = 25_000_000) -> str:
    """The text called "parameters" of a PNG, "" when it has none or is another image. Raises as `read_image`."""
    if read_image(data, max_pixels=max_pixels).header.format != "png":
        return ""
    view = memoryview(data)
    for name, start, end in png.walk(view):
        if name in (b"tEXt", b"zTXt", b"iTXt") and bytes(view[start : start + 11]) == b"parameters\0":
            return _text(name, bytes(view[start + 11 : min(end, start + MAX_TEXT)]))
    return ""


def _text(chunk: bytes, body: bytes) -> str:
    """The text of such a chunk; of a compressed one its first 64 KiB, and nothing of one that is damaged."""
    encoding = "latin-1"
    packed = chunk == b"zTXt"
    if packed:
        body = body[1:]
    elif chunk == b"iTXt":
        encoding, packed = "utf-8", body[:1] == b"\1"
        body = body[2:].partition(b"\0")[2].partition(b"\0")[2]
    try:
        return (zlib.decompressobj().decompress(body, MAX_TEXT) if packed else body).decode(encoding, "replace")
    except zlib.error:
        return ""


def file_name(given: str | None) -> str:
    """The last part of a file's name. Raises `BadRequest` for one that no file should have."""
    name = (given or "").replace("\\", "/").rpartition("/")[2].strip()
    if not name.isprintable() or name.startswith(".") or not 0 < len(name.encode()) <= 200:
        raise BadRequest("the file needs a name: of letters one can read, and not beginning with a dot")
    return name


"""Images as IOPaint's clients send them, base64 in JSON, and back.

Decoding is as tolerant as IOPaint's, and more: any data: URL of an image or of application/octet-stream, line breaks,
the URL-safe alphabet, missing padding, characters that do not belong there. Large texts are worked off in pieces,
between which the event loop serves others.
"""

from __future__ import annotations

import asyncio
import binascii
import zlib
from dataclasses import replace

from pydantic import ConfigDict, TypeAdapter, ValidationError

from api.images import read_image
from api.iopaint_schema import Refused
from core.data import Data
from core.errors import BadRequest, InvalidImage, InvalidParameter, TooLarge
from core.headers import png
from core.request import ImagePart, Role

PIECE = 1 << 20  # characters at a time, a multiple of 4; about half a millisecond
MAX_TEXT = 64 << 10  # bytes of a PNG's text
MAX_HEAD = 256  # characters of a data: URL before its comma
URL_SAFE = bytes.maketrans(b"-_", b"+/")
STRANGE = bytes(code for code in range(128) if not chr(code).isalnum() and code not in b"+/-_")

# Several times as quick as binascii, and at ease with both alphabets and with missing padding.
_BASE64: TypeAdapter[bytes] = TypeAdapter(bytes, config=ConfigDict(val_json_bytes="base64"))


async def read_part(text: str | None, role: Role, *, max_bytes: int, max_pixels: int) -> ImagePart:
    """An image of the body. Raises `InvalidParameter` when there is none, `InvalidImage`, `UnsupportedImage` or
    `TooLarge`."""
    if text is None:
        raise InvalidParameter(f"'{role}' is missing: send it as base64 or as a data: URL", parameter=role)
    data = await decode(text, role)
    if len(data) > max_bytes:
        raise TooLarge(f"the {role} has {len(data)} bytes; the most is {max_bytes}", parameter=role)
    return read_image(data, role, max_pixels=max_pixels)


def as_mask(mask: ImagePart, image: ImagePart) -> ImagePart:
    """The mask by its brightness alone: strokes are drawn onto a transparent one. Raises IOPaint's 400 when its size is
    not the image's (both upright)."""
    have, want = ((part.header.upright_height, part.header.upright_width) for part in (mask, image))
    if have != want:
        raise Refused(400, f"Image size({want}) and mask size({have}) not match.")
    return replace(mask, header=replace(mask.header, alpha=False))


async def decode(text: str, role: str) -> bytes:
    """The bytes of a base64 text or data: URL. Raises `InvalidImage`."""
    if text[:5].lower() == "data:":
        head, comma, text = text.partition(",")
        kind, *extras = head[5:MAX_HEAD].lower().split(";")
        if not comma or "base64" not in extras or not (kind.startswith("image/") or kind == "application/octet-stream"):
            raise InvalidImage(f"the {role} is a data: URL, but not of an image in base64", parameter=role)
    try:
        return await _decode(text)
    except ValidationError:
        pass
    try:
        return await _decode(await _clean(text))
    except ValidationError:
        raise InvalidImage(f"the {role} is not base64", parameter=role) from None


async def _clean(text: str) -> str:
    """What belongs to base64, up to its padding."""
    text = text.partition("=")[0]
    kept = bytearray()
    for at in range(0, len(text), PIECE):
        kept += text[at : at + PIECE].encode("ascii", "ignore").translate(URL_SAFE, STRANGE)
        await asyncio.sleep(0)
    return kept.decode("ascii")


async def _decode(text: str) -> bytes:
    if len(text) <= PIECE:
        return _BASE64.validate_strings(text)
    found = bytearray()
    for at in range(0, len(text), PIECE):
        found += _BASE64.validate_strings(text[at : at + PIECE])
        await asyncio.sleep(0)
    return bytes(found)


async def encode(data: bytes) -> bytes:
    """base64."""
    piece = PIECE // 4 * 3
    if len(data) <= piece:
        return binascii.b2a_base64(data, newline=False)
    found = bytearray()
    for at in range(0, len(data), piece):
        found += binascii.b2a_base64(data[at : at + piece], newline=False)
        await asyncio.sleep(0)
    return bytes(found)


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


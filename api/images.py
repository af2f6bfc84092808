"""Reads what a client sent into an `ImagePart`: the header only, never a pixel."""

from __future__ import annotations

import binascii

from starlette.datastructures import UploadFile

from api.spool import spooled
from core.data import Data
from core.errors import BadRequest, InvalidImage, InvalidParameter, TooLarge, UnsupportedEncoding
from core.header import read_header
from core.request import ImagePart, Role

MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp", "avif": "image/avif"}

_SPACE = b" \t\r\n\v\f"
_URL_SAFE = bytes.maketrans(b"-_", b"+/")


def read_image(data: Data, role: Role = "image", *, max_pixels: int = 25_000_000) -> ImagePart:
    """An encoded image as a part. Raises `InvalidImage`, `UnsupportedImage` or `TooLarge`, each naming the role."""
    if not data:
        raise InvalidImage(f"the {role} is empty (0 bytes)", parameter=role)
    try:
        return ImagePart(role, data, read_header(data, max_pixels=max_pixels), len(data))
    except BadRequest as fault:
        message = fault.message if role == "image" else f"{role}: {fault.message}"
        raise type(fault)(message, **{"parameter": role, **fault.details}) from None


async def read_upload(upload: UploadFile, role: Role = "image", *, max_bytes: int, max_pixels: int) -> ImagePart:
    """A file of a multipart form as a part; its bytes are the truth, its name and content type are not looked at."""
    if upload.size is not None and upload.size > max_bytes:
        raise TooLarge(f"the {role} has {upload.size} bytes; the most is {max_bytes}", parameter=role)
    return read_image(spooled(upload.file), role, max_pixels=max_pixels)


def check_mask(image: ImagePart, mask: ImagePart | None) -> None:
    """Raise `InvalidParameter` unless the mask is as large as the image, both upright (EXIF orientation applied)."""
    if mask is None:
        return
    have = mask.header.upright_width, mask.header.upright_height
    want = image.header.upright_width, image.header.upright_height
    if have != want:
        raise InvalidParameter(
            f"the mask is {have[0]}x{have[1]} but the image is {want[0]}x{want[1]}; both must have the same size",
            parameter="mask",
        )


def decode_base64(text: str | bytes, role: Role = "image", *, max_bytes: int = 64 << 20) -> bytes:
    """The bytes of a base64 text or of a `data:image/...;base64,` URL.

    White space, the URL-safe alphabet and missing padding are taken. Raises `InvalidImage` when it is no base64,
    `UnsupportedEncoding` for a data: URL of another type, `TooLarge` above `max_bytes`.
    """
    try:
        data = text.encode("ascii") if isinstance(text, str) else text
    except UnicodeEncodeError:
        raise InvalidImage(f"the {role} is not base64: it holds characters beyond ASCII", parameter=role) from None
    if data[:16].lstrip(_SPACE)[:5].lower() == b"data:":
        data = _data_url(data.lstrip(_SPACE), role)
    if len(data) // 4 * 3 > max_bytes + 3 and len(data.translate(None, _SPACE)) // 4 * 3 > max_bytes + 3:
        raise TooLarge(f"the {role} has more than {max_bytes} bytes", parameter=role)
    try:
        return binascii.a2b_base64(data, strict_mode=True)
    except binascii.Error:
        return _tolerant(data, role)


def _data_url(data: bytes, role: Role) -> bytes:
    head, comma, body = data.partition(b",")
    kind, *extras = (part.strip().lower() for part in head[5:256].split(b";"))
    if not comma or not kind.startswith(b"image/"):
        raise UnsupportedEncoding(f"the {role} is a data: URL of another type than an image", parameter=role)
    if b"base64" not in extras:
        raise UnsupportedEncoding(f"the {role} is a data: URL without ';base64'; encode it so", parameter=role)
    return body


def _tolerant(data: bytes, role: Role) -> bytes:
    data = data.translate(_URL_SAFE, _SPACE).rstrip(b"=")
    try:
        return binascii.a2b_base64(data + b"=" * (-len(data) % 4), strict_mode=True)
    except binascii.Error:
        raise InvalidImage(f"the {role} is not valid base64", parameter=role) from None

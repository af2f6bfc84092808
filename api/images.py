"""Reads what a client sent into an `ImagePart`: the header only, never a pixel."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

from starlette.datastructures import UploadFile

from api.base64_pieces import SPACE, Decoder, characters
from api.forms import content
from api.json_pieces import LongText
from api.spool import Spool
from core.data import Data
from core.errors import BadRequest, InvalidImage, InvalidParameter, TooLarge, UnsupportedEncoding
from core.header import read_header
from core.request import ImagePart, Role
from core.turns import Turn

MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp", "avif": "image/avif"}

DATA_URL = b"data:"
MAX_HEAD = 256  # bytes of a data: URL before its comma


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
    return read_image(await content(upload), role, max_pixels=max_pixels)


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
    """The bytes of a short base64 text or `data:image/...;base64,` URL.

    White space, the URL-safe alphabet and missing padding are taken. Raises `InvalidImage` when it is no base64,
    `UnsupportedEncoding` for a data: URL of another type, `TooLarge` above `max_bytes`.
    """
    data = text.encode("ascii", "replace") if isinstance(text, str) else text
    decoder = Decoder(role)
    found = decoder.feed(open_image_url(data, role)) + decoder.end()
    if len(found) > max_bytes:
        raise _too_large(role, max_bytes)
    return found


async def read_base64(
    text: str | LongText, role: str, *, max_bytes: int, lenient: bool = False,
    open_url: Callable[[bytes, str], bytes] | None = None,
) -> Data:  # fmt: skip
    """The same of a text of any length, in pieces; beyond 4 MiB in a file. `lenient`: see `Decoder`; `open_url(text,
    role)` leaves the head of a data: URL out, as `open_image_url` does. Raises as `decode_base64`, and `BadRequest`
    for a long string that is no JSON."""
    decoder, turn = Decoder(role, lenient=lenient), Turn()
    with Spool() as spool:
        async for piece in _opened(characters(text), role, open_url or open_image_url):
            await spool.write(decoder.feed(piece))
            if spool.size > max_bytes:
                raise _too_large(role, max_bytes)
            await turn.over()
        await spool.write(decoder.end())
        if spool.size > max_bytes:
            raise _too_large(role, max_bytes)
        return await spool.finish()


async def _opened(
    text: AsyncIterator[bytes], role: str, open_url: Callable[[bytes, str], bytes]
) -> AsyncIterator[bytes]:  # fmt: skip
    """The text without the head of a data: URL, for which its first bytes are gathered."""
    head, inside = b"", False
    async for piece in text:
        if inside:
            yield piece
            continue
        head += piece
        if len(head) > 2 * MAX_HEAD:
            inside = True
            yield open_url(head, role)
    if not inside:
        yield open_url(head, role)


def open_image_url(data: bytes, role: str) -> bytes:
    """What follows the head of a data: URL; all of what is none. Raises `UnsupportedEncoding`."""
    if data[:16].lstrip(SPACE)[:5].lower() != DATA_URL:
        return data
    head, comma, body = data.lstrip(SPACE).partition(b",")
    kind, *extras = (part.strip().lower() for part in head[5:MAX_HEAD].split(b";"))
    if not comma or not kind.startswith(b"image/"):
        raise UnsupportedEncoding(f"the {role} is a data: URL of another type than an image", parameter=role)
    if b"base64" not in extras:
        raise UnsupportedEncoding(f"the {role} is a data: URL without ';base64'; encode it so", parameter=role)
    return body


def _too_large(role: str, most: int) -> TooLarge:
    return TooLarge(f"the {role} has more than {most} bytes", parameter=role)

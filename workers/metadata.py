"""What an image file tells beside its pixels and goes from input to output when a client wants it kept.

EXIF without its orientation (the pixels are upright by then) and without its thumbnail (which would still show what was
painted over); the resolution; and the PNG text "parameters", in which image generators keep their prompt. Metadata is
never a reason to refuse an image: what is damaged or too long is left out.
"""

from __future__ import annotations

import struct
import warnings
from dataclasses import dataclass

from isal import isal_zlib
from PIL import Image

from core.header import ImageFormat
from core.headers.jpeg import segments
from core.headers.png import walk
from core.headers.webp import chunks

MAX_EXIF = 65_527  # what one JPEG segment holds
MAX_TEXT = 64 << 10
INCH = 0.0254

warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")  # damage is no news here

_EXIF_HEAD = b"Exif\0\0"
_KEYWORD = b"parameters"
_ORIENTATION = 0x0112
_APP0, _APP1 = 0xE0, 0xE1


@dataclass(frozen=True, slots=True)
class Metadata:
    """`exif`: a TIFF block of at most `MAX_EXIF` bytes. `dpi`: dots per inch, across and down. `parameters`: at most
    `MAX_TEXT` bytes as UTF-8."""

    exif: bytes | None = None
    dpi: tuple[float, float] | None = None
    parameters: str | None = None


def read(data: memoryview, format: ImageFormat) -> Metadata:
    """What a whole file that was decoded holds. Of AVIF nothing is kept."""
    try:
        if format == "png":
            return _read_png(data)
        if format == "jpeg":
            return _read_jpeg(data)
        if format == "webp":
            return Metadata(next((_exif(data[at:end]) for name, at, end in chunks(data) if name == b"EXIF"), None))
    except (struct.error, IndexError):
        pass
    return Metadata()


def _read_png(data: memoryview) -> Metadata:
    exif = dpi = text = None
    for name, start, end in walk(data):
        body = data[start:end]
        if name == b"eXIf":
            exif = exif or _exif(body)
        elif name == b"pHYs":
            across, down, unit = struct.unpack(">IIB", body)
            dpi = (across * INCH, down * INCH) if unit == 1 and across and down else None
        elif name in (b"tEXt", b"zTXt", b"iTXt") and bytes(body[:11]) == _KEYWORD + b"\0":
            text = text or _text(name, bytes(body[11:]))
    return Metadata(exif, dpi, text)


def _text(kind: bytes, body: bytes) -> str | None:
    """The text of a chunk, of which keyword and zero have been taken off."""
    packed = kind == b"zTXt"
    if packed:
        body = body[1:]
    elif kind == b"iTXt":
        packed = body[:1] == b"\1"
        body = body[2:].split(b"\0", 2)[2]
    if packed:
        stream = isal_zlib.decompressobj()
        try:
            body = stream.decompress(body, MAX_TEXT + 1)
        except isal_zlib.IsalError:  # type: ignore[misc]  # the stub declares an instance
            return None
    text = body.decode("utf-8" if kind == b"iTXt" else "latin-1", "replace")
    return text if text and "\0" not in text and len(text.encode("utf-8")) <= MAX_TEXT else None


def _read_jpeg(data: memoryview) -> Metadata:
    exif = dpi = None
    for marker, body in segments(data):
        if marker == _APP0 and bytes(body[:5]) == b"JFIF\0":
            unit, across, down = struct.unpack_from(">BHH", body, 7)
            factor = {1: 1.0, 2: 2.54}.get(unit, 0.0)
            dpi = (across * factor, down * factor) if factor and across and down else None
        elif marker == _APP1 and bytes(body[:6]) == _EXIF_HEAD:
            exif = exif or _exif(body)
    return Metadata(exif, dpi)


def _exif(block: memoryview) -> bytes | None:
    """The block written anew, without orientation and thumbnail. None when nothing is left, or it is damaged."""
    if len(block) > MAX_EXIF + len(_EXIF_HEAD):
        return None
    exif = Image.Exif()
    try:
        exif.load(bytes(block))
        if not len(exif):
            return None
        exif.pop(_ORIENTATION, None)
        written = bytes(exif.tobytes()).removeprefix(_EXIF_HEAD) if len(exif) else b""
    except Exception:  # what Pillow raises for a damaged block is its to choose
        return None
    return written if 0 < len(written) <= MAX_EXIF else None


def png_chunks(metadata: Metadata) -> list[tuple[bytes, bytes]]:
    """(name, body) of the chunks that stand before the pixels."""
    found: list[tuple[bytes, bytes]] = []
    if metadata.dpi:
        found.append((b"pHYs", struct.pack(">IIB", *(_bounded(one / INCH, 0x7FFFFFFF) for one in metadata.dpi), 1)))
    if metadata.exif:
        found.append((b"eXIf", metadata.exif))
    if metadata.parameters:
        text = metadata.parameters.encode("utf-8")
        plain = text.isascii()
        found.append((b"tEXt", _KEYWORD + b"\0" + text) if plain else (b"iTXt", _KEYWORD + b"\0\0\0\0\0" + text))
    return found


def into_jpeg(jpeg: bytes, metadata: Metadata) -> bytes:
    """The file, which begins with SOI and JFIF, with its density set and EXIF behind it."""
    head = 4 + int.from_bytes(jpeg[4:6], "big")
    jfif, exif = bytearray(jpeg[:head]), b""
    if metadata.dpi:
        struct.pack_into(">BHH", jfif, 13, 1, *(_bounded(one, 0xFFFF) for one in metadata.dpi))
    if metadata.exif:
        body = _EXIF_HEAD + metadata.exif
        exif = b"\xff\xe1" + struct.pack(">H", 2 + len(body)) + body
    return b"".join((jfif, exif, jpeg[head:]))


def _bounded(value: float, most: int) -> int:
    return min(max(1, round(value)), most)

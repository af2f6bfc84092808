"""PNG: IHDR for the size, then only the chunks' names: tRNS, eXIf, and whether the file is whole. Of an animation the
first picture counts.

`walk` and `Layout` are used by the decoder in the worker as well.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from core.errors import InvalidImage
from core.headers import Facts
from core.headers.exif import orientation

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_CHUNKS = 10_000  # 64 MiB in libpng's usual 8 KiB pieces

_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
_CHUNK = struct.Struct(">I4s")
_IHDR = struct.Struct(">IIBBBBB")


class Layout(NamedTuple):
    """What IHDR says: size in pixels, bits per pixel, whether it is interlaced, whether it has an alpha channel."""

    width: int
    height: int
    bits: int
    interlaced: bool
    alpha: bool


def layout(data: memoryview) -> Layout:
    length, name = _CHUNK.unpack_from(data, 8)
    if name != b"IHDR" or length != 13:
        raise InvalidImage("the PNG file does not begin with a header chunk; save it again and resend it")
    width, height, depth, colour, compression, filtering, interlace = _IHDR.unpack_from(data, 16)
    if depth not in _DEPTHS.get(colour, ()) or compression or filtering or interlace > 1:
        raise InvalidImage("the PNG file's header is not valid; save it again and resend it")
    return Layout(width, height, depth * _CHANNELS[colour], bool(interlace), colour in (4, 6))


def walk(data: memoryview) -> Iterator[tuple[bytes, int, int]]:
    """(name, start, end) of each chunk's body up to and with IEND. Raises when the file ends first."""
    at = len(SIGNATURE)
    for _ in range(MAX_CHUNKS):
        length, name = _CHUNK.unpack_from(data, at)
        start, end = at + 8, at + 8 + length
        at = end + 4
        if at > len(data):
            raise InvalidImage("the PNG file is cut off; send the complete file")
        yield name, start, end
        if name == b"IEND":
            return
    raise InvalidImage(f"the PNG file has more than {MAX_CHUNKS:,} chunks; save it again and resend it")


def read(data: memoryview) -> Facts:
    width, height, _, _, alpha = layout(data)
    turned, pixels = 0, False
    for name, start, end in walk(data):
        if name == b"IDAT":
            pixels = True
        elif name == b"tRNS":
            alpha = True
        elif name == b"eXIf" and not turned:
            turned = orientation(data[start:end])
    if not pixels:
        raise InvalidImage("the PNG file holds no pixels; save it again and resend it")
    return Facts(width, height, turned or 1, alpha)

"""TIFF: the first directory, which says all that its decoder allocates by.

What is not a plain picture of 1 to 16 bits is refused by name: BigTIFF, numbers with a sign or a point, planes apart,
compressions beyond the usual ones. The size that is told is upright: the decoder applies the orientation itself.
"""

from __future__ import annotations

import struct

from core.errors import InvalidImage, UnsupportedImage
from core.headers import ACCEPTED, Facts

MAX_ENTRIES = 512
MAX_TILE = 1 << 24  # pixels

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _COLOURS, _ORIENTATION = 256, 257, 258, 259, 262, 274
_SAMPLES, _PLANES, _TILE_WIDTH, _TILE_HEIGHT, _EXTRA, _NUMBERS = 277, 284, 322, 323, 338, 339
_BY_SAMPLE = {_BITS, _EXTRA, _NUMBERS}
_PIXELS = {273, 324}  # where strips or tiles begin
_READ = {_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _COLOURS, _ORIENTATION, _SAMPLES, _PLANES, _TILE_WIDTH, _TILE_HEIGHT,
         _EXTRA, _NUMBERS}  # fmt: skip
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
_SERVED = {1: "none", 2: "CCITT", 3: "fax 3", 4: "fax 4", 5: "LZW", 7: "JPEG", 8: "deflate", 32773: "PackBits",
           32946: "deflate"}  # fmt: skip
_DEPTHS = {1: (1, 2, 4, 8, 16), 2: (8, 16), 3: (8, 16), 4: (8, 16), 5: (8,)}  # bits by samples a pixel
_GREY, _RGB, _PALETTE, _CMYK, _YCC = (0, 1), 2, 3, 5, 6


def read(data: memoryview) -> Facts:
    order = "<" if data[0] == 0x49 else ">"
    (at,) = struct.unpack_from(order + "I", data, 4)
    found = _directory(data, at, order)
    if not {_WIDTH, _HEIGHT, _COLOURS} <= found.keys() or not found.keys() & _PIXELS:
        raise _broken()
    (width,), (height,) = found[_WIDTH], found[_HEIGHT]
    samples = found.get(_SAMPLES, (1,))[0]
    bits = set(found.get(_BITS, (1,)))
    colours = found[_COLOURS][0]
    plain = (
        found.get(_COMPRESSION, (1,))[0] in _SERVED
        and len(bits) == 1 and bits <= set(_DEPTHS.get(samples, ()))
        and set(found.get(_NUMBERS, (1,))) == {1}
        and found.get(_PLANES, (1,))[0] == 1
        and ((colours in (*_GREY, _PALETTE) and samples <= 2) or (colours in (_RGB, _YCC) and samples in (3, 4))
             or (colours == _CMYK and samples == 4))
    )  # fmt: skip
    if not plain:
        raise UnsupportedImage(f"this is a TIFF of an unusual kind, which is not served; send a plain {ACCEPTED} file")
    if found.get(_TILE_WIDTH, (1,))[0] * found.get(_TILE_HEIGHT, (1,))[0] > MAX_TILE:
        raise InvalidImage("the TIFF file's tiles are too large; save it again, in strips, and resend it")
    if found.get(_ORIENTATION, (1,))[0] in (5, 6, 7, 8):
        width, height = height, width
    return Facts(width, height, 1, samples in (2, 4) and colours in (*_GREY, _RGB))


def _directory(data: memoryview, at: int, order: str) -> dict[int, tuple[int, ...]]:
    """The entries that count, and those that say where pixels are, without their values. Readers differ in which of two
    equal tags they believe, and read what every entry points to: so tags are single, and what they hold no more than
    the file."""
    (count,) = struct.unpack_from(order + "H", data, at)
    if count > MAX_ENTRIES:
        raise _broken()
    found: dict[int, tuple[int, ...]] = {}
    pointed = 0
    for entry in range(at + 2, at + 2 + 12 * count, 12):
        tag, kind, number = struct.unpack_from(order + "HHI", data, entry)
        size = _SIZES.get(kind, 1) * number
        pointed += size
        if tag in found or pointed > len(data):
            raise _broken()
        if tag in _PIXELS:
            found[tag] = ()
        elif tag in _READ:
            if kind not in (3, 4) or not 1 <= number <= (5 if tag in _BY_SAMPLE else 1):
                raise _broken()
            place = entry + 8 if size <= 4 else struct.unpack_from(order + "I", data, entry + 8)[0]
            found[tag] = struct.unpack_from(f"{order}{number}{'H' if kind == 3 else 'I'}", data, place)
    return found


def _broken() -> InvalidImage:
    return InvalidImage("the TIFF file does not describe its picture; save it again and resend it")

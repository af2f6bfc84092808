"""PNG, the format that costs most, around the fastest deflate there is (ISA-L's igzip). Both ways free the GIL.

Writing: one filter for the whole image, done by numpy, then igzip level 1: a third of OpenCV's time, the same bytes.
Filter "up" suits photographs ("average" saves 2 % of bytes and costs a fifth more time to write and read), "none" suits
drawings and masks, where equal pixels follow each other.

Reading: the chunks that matter are checked and kept, all others (text, profiles, time) never reach a decoder; igzip
inflates at most what the header promises; libpng then undoes the filters from a copy that is stored, not compressed.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import imagecodecs
import numpy as np
from isal import isal_zlib

from core.errors import InvalidImage
from core.headers.png import SIGNATURE, Layout, layout, walk

MAX_ICC = 4 << 20

_COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}  # by channels
_NONE, _UP = 0, 2
_FLAT = 0.6  # share of equal neighbours from which on an image counts as drawn
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_STORED = 65_535  # the most bytes of one stored deflate block


def write(image: np.ndarray, icc: bytes | None = None, more: Sequence[tuple[bytes, bytes]] = ()) -> bytes:
    """A PNG file of uint8 H x W (grey), H x W x 3 (RGB) or H x W x 4 (RGBA). `more`: further chunks before the pixels,
    as (name, body)."""
    height, width = image.shape[:2]
    channels = 1 if image.ndim == 2 else image.shape[2]
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOUR_TYPES[channels], 0, 0, 0)
    rows = np.ascontiguousarray(image).reshape(height, width * channels)
    parts = [SIGNATURE, *_chunk(b"IHDR", header)]
    if icc:
        parts += _chunk(b"iCCP", b"ICC profile\0\0" + isal_zlib.compress(icc, 1))
    for name, body in more:
        parts += _chunk(name, body)
    parts += _chunk(b"IDAT", isal_zlib.compress(_filter(rows, channels), 1))
    parts += _chunk(b"IEND", b"")
    return b"".join(parts)


def _filter(rows: np.ndarray, step: int) -> np.ndarray:
    """The rows as PNG filters them, each with its filter's number in front. `step` is a pixel's bytes."""
    out = np.empty((rows.shape[0], rows.shape[1] + 1), np.uint8)
    sample = rows[::8]
    if np.count_nonzero(sample[:, step:] == sample[:, :-step]) >= _FLAT * sample[:, step:].size:
        out[:, 0], out[:, 1:] = _NONE, rows
    else:
        out[:, 0], out[0, 1:] = _UP, rows[0]
        np.subtract(rows[1:], rows[:-1], out=out[1:, 1:])
    return out


def _chunk(name: bytes, body: bytes) -> tuple[bytes, bytes, bytes]:
    check = isal_zlib.crc32(body, isal_zlib.crc32(name))
    return struct.pack(">I", len(body)) + name, body, struct.pack(">I", check)


class Raw(NamedTuple):
    """`pixels`: uint8 or uint16, H x W (grey) or H x W x 2, 3, 4 (grey + alpha, RGB, RGBA). `icc`: up to `MAX_ICC`."""

    pixels: np.ndarray
    icc: bytes | None


def read(data: memoryview) -> Raw:
    """Decode a PNG of any colour type and depth; a palette and a transparent colour are written out. Raises
    `InvalidImage` for a bad checksum and for pixels that are too few or too many; libpng may raise its own error."""
    kept: dict[bytes, bytes] = {}
    pixels, icc = [], None
    for name, start, end in walk(data):
        if name in (b"IHDR", b"PLTE", b"tRNS", b"IDAT"):
            if isal_zlib.crc32(data[start - 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
                raise InvalidImage("the PNG file is damaged (a checksum is wrong); save it again and resend it")
            if name == b"IDAT":
                pixels.append(data[start:end])
            else:
                kept.setdefault(name, bytes(data[start - 8 : end + 4]))
        elif name == b"iCCP":
            icc = _profile(data[start:end])
    plain = _inflate(pixels[0] if len(pixels) == 1 else b"".join(pixels), _raw_size(layout(data)))
    parts = [SIGNATURE, *(kept[name] for name in (b"IHDR", b"PLTE", b"tRNS") if name in kept)]
    parts += *_chunk(b"IDAT", _store(plain)), *_chunk(b"IEND", b"")
    del plain
    return Raw(imagecodecs.png_decode(b"".join(parts)), icc)


def _raw_size(of: Layout) -> int:
    """Bytes of the filtered rows, filter numbers included."""
    size = 0
    for x, y, across, down in _ADAM7 if of.interlaced else ((0, 0, 1, 1),):
        width, height = -(-(of.width - x) // across), -(-(of.height - y) // down)
        if width > 0 and height > 0:
            size += height * (1 + (width * of.bits + 7) // 8)
    return size


def _inflate(packed: bytes | memoryview, size: int) -> bytes:
    """Exactly `size` bytes, checksum verified, never more than one byte above `size` allocated."""
    stream = isal_zlib.decompressobj()
    try:
        plain: bytes = stream.decompress(packed, size + 1)
    except isal_zlib.IsalError:  # type: ignore[misc]  # the stub declares an instance
        raise InvalidImage("the PNG file is damaged (its pixels do not unpack); save it again and resend it") from None
    if len(plain) < size or (len(plain) == size and not stream.eof):
        raise InvalidImage("the PNG file holds fewer pixels than its header says; send the complete file")
    if len(plain) > size:
        raise InvalidImage("the PNG file holds more pixels than its header says; save it again and resend it")
    return plain


def _store(plain: bytes) -> bytes:
    """A zlib stream of blocks that are stored as they are."""
    parts: list[bytes | memoryview] = [b"\x78\x01"]
    view = memoryview(plain)
    for at in range(0, len(view), _STORED):
        block = view[at : at + _STORED]
        last = at + _STORED >= len(view)
        parts += struct.pack("<BHH", last, len(block), len(block) ^ 0xFFFF), block
    parts.append(struct.pack(">I", isal_zlib.adler32(view)))
    return b"".join(parts)


def _profile(body: memoryview) -> bytes | None:
    """The profile of an iCCP chunk, None when it is broken or larger than `MAX_ICC` unpacked."""
    _, _, packed = bytes(body).partition(b"\0")
    stream = isal_zlib.decompressobj()
    try:
        profile: bytes = stream.decompress(packed[1:], MAX_ICC)
    except isal_zlib.IsalError:  # type: ignore[misc]  # the stub declares an instance
        return None
    return profile if stream.eof else None

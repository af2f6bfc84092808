"""WebP: the RIFF container's first chunk (VP8, VP8L or VP8X), and with VP8X the chunks' names for pixels and EXIF."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from core.errors import InvalidImage
from core.headers import Facts
from core.headers.exif import orientation

MAX_CHUNKS = 1_000

_ANIMATED, _ALPHA = 0x02, 0x10
_CHUNK = struct.Struct("<4sI")


def chunks(data: memoryview) -> Iterator[tuple[bytes, int, int]]:
    """(name, start, end) of each chunk's body."""
    at, end = 12, int.from_bytes(data[4:8], "little") + 8
    for _ in range(MAX_CHUNKS):
        if at + 8 > end:
            return
        name, length = _CHUNK.unpack_from(data, at)
        yield name, at + 8, at + 8 + length
        at += 8 + length + (length & 1)


def read(data: memoryview) -> Facts:
    (size,) = struct.unpack_from("<I", data, 4)
    if size + 8 > len(data):
        raise InvalidImage("the WebP file is cut off; send the complete file")
    name, _ = _CHUNK.unpack_from(data, 12)
    if name != b"VP8X":
        return _frame(name, data, 20)
    flags, low, high, low_h, high_h = struct.unpack_from("<B3xHBHB", data, 20)
    canvas = (low | high << 16) + 1, (low_h | high_h << 16) + 1
    turned, frame = 0, None
    for name, start, end in chunks(data):
        if name == b"EXIF" and not turned:
            turned = orientation(data[start:end])
        elif flags & _ANIMATED and frame is None and name == b"ANMF":
            frame = _first(data, start, end, canvas)
        elif not flags & _ANIMATED and frame is None and name in (b"VP8 ", b"VP8L"):
            frame = _frame(name, data, start)
    if frame is None or (frame[:2] != canvas and not flags & _ANIMATED):
        raise InvalidImage("the WebP file's canvas and its picture differ in size; save it again and resend it")
    return Facts(*canvas, turned or 1, bool(flags & _ALPHA) or frame.alpha)


def animated(data: memoryview) -> bool:
    """Whether a file that `read` let pass is an animation."""
    return bytes(data[12:16]) == b"VP8X" and bool(data[20] & _ANIMATED)


def _first(data: memoryview, start: int, end: int, canvas: tuple[int, int]) -> Facts:
    """The first picture of an animation, which lies within its canvas."""
    x, x_high, y, y_high, width, width_high, height, height_high = struct.unpack_from("<HBHBHBHB", data, start)
    left, top = (x | x_high << 16) * 2, (y | y_high << 16) * 2
    size = (width | width_high << 16) + 1, (height | height_high << 16) + 1
    at = start + 16
    for _ in range(2):  # alpha may stand before the picture
        name, length = _CHUNK.unpack_from(data, at)
        if name in (b"VP8 ", b"VP8L"):
            frame = _frame(name, data, at + 8)
            inside = left + size[0] <= canvas[0] and top + size[1] <= canvas[1]
            if inside and at + 8 + length <= end and frame[:2] == size:
                return frame
            break
        at += 8 + length + (length & 1)
    raise InvalidImage("the WebP file's first picture does not fit its canvas; save it again and resend it")


def _frame(name: bytes, data: memoryview, at: int) -> Facts:
    """Size and alpha of a bitstream that begins at `at`: lossy (VP8) or lossless (VP8L)."""
    if name == b"VP8 ":
        key, magic, width, height = struct.unpack_from("<B2x3sHH", data, at)
        if key & 1 or magic != b"\x9d\x01\x2a":
            raise InvalidImage("the WebP file's picture does not begin as one; save it again and resend it")
        return Facts(width & 0x3FFF, height & 0x3FFF)
    if name == b"VP8L":
        magic, bits = struct.unpack_from("<BI", data, at)
        if magic != 0x2F:
            raise InvalidImage("the WebP file's picture does not begin as one; save it again and resend it")
        return Facts((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, 1, bool(bits >> 28 & 1))
    raise InvalidImage("the WebP file does not begin with a picture; save it again and resend it")

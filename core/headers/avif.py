"""AVIF: the boxes of `meta` that say how large the primary picture is, how it is turned, and whether it has alpha.

libavif scales a picture to the size that its box claims, so a box could promise a thumbnail and cost a poster: the size
in each AV1 stream's own sequence header must equal the box's. Rotation is told by `irot` and `imir` alone; the format
says that EXIF orientation does not count here. Grids (a picture put together from tiles) are not served.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from core.errors import InvalidImage, UnsupportedImage
from core.headers import ACCEPTED, Facts

MAX_BOXES = 256  # of one container, and of items
MAX_LINKS = 1_024  # between items and properties

_ALPHA = b"auxiliary:alpha\0"
_TURNS = {  # (quarter turns anti-clockwise, mirror axis) -> EXIF orientation
    (0, None): 1, (1, None): 8, (2, None): 3, (3, None): 6,
    (0, 0): 4, (1, 0): 5, (2, 0): 2, (3, 0): 7,
    (0, 1): 2, (1, 1): 7, (2, 1): 4, (3, 1): 5,
}  # fmt: skip


def read(data: memoryview) -> Facts:
    meta = next((body for name, body in _boxes(data) if name == b"meta"), None)
    if meta is None:
        raise _broken()
    parts = dict(_boxes(meta[4:]))
    if not {b"pitm", b"iloc", b"iinf", b"iprp"} <= parts.keys():
        raise _broken()
    (primary,) = struct.unpack_from(">I" if parts[b"pitm"][0] else ">H", parts[b"pitm"], 4)
    kinds = _kinds(parts[b"iinf"])
    if kinds.get(primary) != b"av01":
        what = "made of tiles" if kinds.get(primary) == b"grid" else "without a plain AV1 picture"
        raise UnsupportedImage(f"this is an AVIF {what}, which is not served; send a plain {ACCEPTED} file")
    properties = _properties(parts[b"iprp"])
    places = _places(parts[b"iloc"])
    for item, kind in kinds.items():
        size = properties.get(item, {}).get(b"ispe")
        if kind == b"av01" and size is not None and item in places:
            inside, at, length = places[item]
            payload = (parts.get(b"idat", data[:0]) if inside else data)[at : at + length]
            if _stream_size(payload) != struct.unpack_from(">II", size, 4):
                raise InvalidImage("the AVIF file claims another size than its picture has; save it again")
    own = properties.get(primary, {})
    if b"ispe" not in own or primary not in places:
        raise _broken()
    width, height = struct.unpack_from(">II", own[b"ispe"], 4)
    angle = own[b"irot"][0] & 3 if b"irot" in own else 0
    axis = own[b"imir"][0] & 1 if b"imir" in own else None
    alpha = any(bytes(of[b"auxC"][4:64]).find(_ALPHA) >= 0 for of in properties.values() if b"auxC" in of)
    return Facts(width, height, _TURNS[angle, axis], alpha)


def _broken() -> InvalidImage:
    return InvalidImage("the AVIF file does not describe its picture; save it again and resend it")


def _boxes(data: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """(name, body) of each box that lies in `data`."""
    at = 0
    for _ in range(MAX_BOXES):
        if at + 8 > len(data):
            return
        size, name = struct.unpack_from(">I4s", data, at)
        head = 8
        if size == 1:
            (size,), head = struct.unpack_from(">Q", data, at + 8), 16
        elif size == 0:
            size = len(data) - at
        if size < head:
            raise _broken()
        if at + size > len(data) and name != b"mdat":
            raise IndexError
        yield name, data[at + head : at + size]
        at += size


def _kinds(iinf: memoryview) -> dict[int, bytes]:
    """Item id -> type (`av01`, `grid`, `Exif`, ...)."""
    kinds = {}
    for name, infe in _boxes(iinf[8 if iinf[0] else 6 :]):
        if name == b"infe" and infe[0] >= 2:
            item, kind = struct.unpack_from(">I2x4s" if infe[0] == 3 else ">H2x4s", infe, 4)
            kinds[item] = kind
    return kinds


def _properties(iprp: memoryview) -> dict[int, dict[bytes, memoryview]]:
    """Item id -> its properties by name."""
    known: list[tuple[bytes, memoryview]] = []
    owned: dict[int, dict[bytes, memoryview]] = {}
    budget = MAX_LINKS
    for name, body in _boxes(iprp):
        if name == b"ipco":
            known = list(_boxes(body))
        elif name == b"ipma":
            item_form = ">IB" if body[0] else ">HB"
            wide = body[3] & 1
            (count,) = struct.unpack_from(">I", body, 4)
            at = 8
            for _ in range(count):
                item, links = struct.unpack_from(item_form, body, at)
                at += 5 if body[0] else 3
                budget -= links + 1
                if budget < 0:
                    raise _broken()
                for _ in range(links):
                    index = (body[at] << 8 | body[at + 1]) & 0x7FFF if wide else body[at] & 0x7F
                    at += 2 if wide else 1
                    if 0 < index <= len(known):
                        owned.setdefault(item, {}).setdefault(*known[index - 1])
    return owned


def _places(iloc: memoryview) -> dict[int, tuple[bool, int, int]]:
    """Item id -> (lies in `idat`?, offset, length) of its first extent."""
    version = iloc[0]
    sizes = iloc[4] >> 4, iloc[4] & 15, iloc[5] >> 4, iloc[5] & 15 if version else 0
    offset_size, length_size, base_size, index_size = sizes
    id_size = 4 if version == 2 else 2
    at = 6

    def take(size: int) -> int:
        nonlocal at
        at += size
        if at > len(iloc):
            raise IndexError
        return int.from_bytes(iloc[at - size : at], "big")

    places = {}
    for _ in range(min(take(id_size), MAX_BOXES)):
        item = take(id_size)
        inside = bool(version and take(2) & 15)
        take(2)
        base, extents = take(base_size), take(2)
        if extents:
            take(index_size)
            places[item] = inside, base + take(offset_size), take(length_size)
            take((extents - 1) * (index_size + offset_size + length_size))
    return places


def _stream_size(stream: memoryview) -> tuple[int, int]:
    """Width and height in the sequence header of an AV1 stream (AV1 specification, 5.5.1)."""
    at = 0
    for _ in range(8):
        head = stream[at]
        at += 2 if head & 4 else 1
        size = shift = 0
        for _ in range(8 if head & 2 else 0):  # leb128
            byte = stream[at]
            size, shift, at = size | (byte & 127) << shift, shift + 7, at + 1
            if not byte & 128:
                break
        if head >> 3 & 15 == 1:
            return _frame_size(bytes(stream[at : at + 256]))
        at += size
    raise _broken()


def _frame_size(header: bytes) -> tuple[int, int]:
    bits, left = int.from_bytes(header, "big"), 8 * len(header)

    def take(count: int) -> int:
        nonlocal left
        left -= count
        if left < 0:
            raise IndexError
        return bits >> left & (1 << count) - 1

    take(4)  # profile, still picture
    if take(1):  # reduced still picture header
        take(5)
    else:
        if take(1):
            raise UnsupportedImage(f"this is an AVIF with video timing; send a still {ACCEPTED} file")
        delays = take(1)
        for _ in range(take(5) + 1):
            take(12)
            if take(5) > 7:
                take(1)
            if delays and take(1):
                take(4)
    wide, high = take(4) + 1, take(4) + 1
    return take(wide) + 1, take(high) + 1

"""AVIF: the boxes of `meta` that say how large the primary picture is, how it is turned, and whether it has alpha.

libavif scales a picture to the size that its box claims, so a box could promise a thumbnail and cost a poster: every
sequence header and frame of every AV1 stream (`core.headers.av1`) must have its box's size, and none be larger than
the primary picture. What one reader could take differently than another (doubled boxes and items, empty extents) is
refused. Rotation is told by `irot` and `imir` alone; the format says that EXIF orientation does not count here. Grids
(a picture put together from tiles) are not served.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from core.errors import InvalidImage, UnsupportedImage
from core.headers import ACCEPTED, Facts, av1

MAX_BOXES = 256  # of one container, and of items
MAX_LINKS = 1_024  # between items and properties

_ALPHA = b"auxiliary:alpha\0"
_UNIQUE = frozenset({b"pitm", b"iloc", b"iinf", b"iprp", b"idat"})
_TURNS = {  # (quarter turns anti-clockwise, mirror axis) -> EXIF orientation
    (0, None): 1, (1, None): 8, (2, None): 3, (3, None): 6,
    (0, 0): 4, (1, 0): 5, (2, 0): 2, (3, 0): 7,
    (0, 1): 2, (1, 1): 7, (2, 1): 4, (3, 1): 5,
}  # fmt: skip


def read(data: memoryview) -> Facts:
    meta = next((body for name, body in _boxes(data) if name == b"meta"), None)
    if meta is None:
        raise _broken()
    parts = _once(_boxes(meta[4:]))
    if not {b"pitm", b"iloc", b"iinf", b"iprp"} <= parts.keys():
        raise _broken()
    (primary,) = struct.unpack_from(">I" if parts[b"pitm"][0] else ">H", parts[b"pitm"], 4)
    kinds = _kinds(parts[b"iinf"])
    if kinds.get(primary) != b"av01" or b"grid" in kinds.values():
        what = "made of tiles" if b"grid" in kinds.values() else "without a plain AV1 picture"
        raise UnsupportedImage(f"this is an AVIF {what}, which is not served; send a plain {ACCEPTED} file")
    properties = _properties(parts[b"iprp"])
    places = _places(parts[b"iloc"])
    own = properties.get(primary, {})
    if b"ispe" not in own:
        raise _broken()
    width, height = struct.unpack_from(">II", own[b"ispe"], 4)
    for item, kind in kinds.items():
        if kind == b"av01":
            if item not in places or b"ispe" not in properties.get(item, {}):
                raise _broken()
            size = struct.unpack_from(">II", properties[item][b"ispe"], 4)
            if size[0] * size[1] > width * height:
                raise InvalidImage("the AVIF file has a second picture that is larger than its first; save it again")
            av1.check(_payload(data, parts.get(b"idat", data[:0]), *places[item]), *size)
    angle = own[b"irot"][0] & 3 if b"irot" in own else 0
    axis = own[b"imir"][0] & 1 if b"imir" in own else None
    alpha = any(bytes(of[b"auxC"][4:64]).find(_ALPHA) >= 0 for of in properties.values() if b"auxC" in of)
    return Facts(width, height, _TURNS[angle, axis], alpha)


def _broken() -> InvalidImage:
    return InvalidImage("the AVIF file does not describe its picture; save it again and resend it")


def _once(boxes: Iterator[tuple[bytes, memoryview]]) -> dict[bytes, memoryview]:
    """Boxes by name. Raises `InvalidImage` when one that matters is there twice."""
    found: dict[bytes, memoryview] = {}
    for name, body in boxes:
        if name in found and name in _UNIQUE:
            raise _broken()
        found[name] = body
    return found


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
    if at < len(data):
        raise _broken()


def _kinds(iinf: memoryview) -> dict[int, bytes]:
    """Item id -> type (`av01`, `grid`, `Exif`, ...)."""
    kinds = {}
    for name, infe in _boxes(iinf[8 if iinf[0] else 6 :]):
        if name == b"infe" and infe[0] >= 2:
            item, kind = struct.unpack_from(">I2x4s" if infe[0] == 3 else ">H2x4s", infe, 4)
            if item in kinds:
                raise _broken()
            kinds[item] = kind
    return kinds


def _properties(iprp: memoryview) -> dict[int, dict[bytes, memoryview]]:
    """Item id -> its properties by name."""
    known: list[tuple[bytes, memoryview]] = []
    owned: dict[int, dict[bytes, memoryview]] = {}
    budget = MAX_LINKS
    for name, body in _boxes(iprp):
        if name == b"ipco":
            if known:
                raise _broken()
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


def _places(iloc: memoryview) -> dict[int, tuple[bool, list[tuple[int, int]]]]:
    """Item id -> (lies in `idat`?, offset and length of its extents)."""
    version = iloc[0]
    sizes = iloc[4] >> 4, iloc[4] & 15, iloc[5] >> 4, iloc[5] & 15 if version else 0
    offset_size, length_size, base_size, index_size = sizes
    id_size = 4 if version == 2 else 2
    at, budget = 6, MAX_LINKS

    def take(size: int) -> int:
        nonlocal at
        at += size
        if at > len(iloc):
            raise IndexError
        return int.from_bytes(iloc[at - size : at], "big")

    places: dict[int, tuple[bool, list[tuple[int, int]]]] = {}
    for _ in range(take(id_size)):
        item = take(id_size)
        method = take(2) & 15 if version else 0
        take(2)
        base, count = take(base_size), take(2)
        budget -= count + 1
        if budget < 0 or method > 1 or item in places:
            raise _broken()
        extents = []
        for _ in range(count):
            take(index_size)
            extents.append((base + take(offset_size), take(length_size)))
        places[item] = bool(method), extents
    return places


def _payload(data: memoryview, idat: memoryview, inside: bool, extents: list[tuple[int, int]]) -> memoryview:
    """An item's bytes."""
    source = idat if inside else data
    left = len(source)
    for at, length in extents:
        left -= length
        if length == 0 or left < 0:
            raise _broken()
        if at + length > len(source):
            raise IndexError
    if len(extents) == 1:
        (at, length), = extents
        return source[at : at + length]
    return memoryview(b"".join(source[at : at + length] for at, length in extents))

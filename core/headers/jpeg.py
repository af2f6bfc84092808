"""JPEG: the segments up to the first scan, for the frame header (SOF) and the EXIF orientation (APP1)."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from core.errors import InvalidImage, UnsupportedImage
from core.headers import ACCEPTED, Facts
from core.headers.exif import orientation

MAX_STEPS = 4_096  # segments, fill bytes and stray bytes together

_SERVED = {0xC0, 0xC1, 0xC2}  # baseline, extended, progressive; all Huffman
_OTHER = {0xC3: "a lossless", 0xC5: "a hierarchical", 0xC6: "a hierarchical", 0xC7: "a hierarchical"} | dict.fromkeys(
    (0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF), "an arithmetic-coded"
)
_ALONE = {0x00, 0x01, *range(0xD0, 0xD9)}  # markers without a length
_APP1, _END, _SCAN = 0xE1, 0xD9, 0xDA
_SOF = struct.Struct(">BHHB")


def segments(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """(marker, body) of each segment before the first scan. Raises when there is no scan."""
    at = 2
    for _ in range(MAX_STEPS):
        marker = data[at + 1]
        if data[at] != 0xFF or marker == 0xFF:  # stray and fill bytes: decoders skip them, so do we
            at += 1
            continue
        at += 2
        if marker in _ALONE:
            continue
        if marker == _END:
            raise InvalidImage("the JPEG file ends before its pixels; send the complete file")
        if marker == _SCAN:
            return
        (length,) = struct.unpack_from(">H", data, at)
        yield marker, data[at + 2 : at + length]
        at += length
    raise InvalidImage("the JPEG file has too much before its pixels; save it again and resend it")


def read(data: memoryview) -> Facts:
    turned, frame = 0, None
    for marker, body in segments(data):
        if marker in _SERVED:
            if frame:
                raise InvalidImage("the JPEG file has two frame headers; save it again and resend it")
            depth, height, width, components = _SOF.unpack_from(body)
            if depth != 8 or components not in (1, 3, 4):
                raise UnsupportedImage(
                    f"this is a JPEG of {components} components at {depth} bits, which is not served; "
                    f"send an 8-bit grey, colour or CMYK JPEG, or another {ACCEPTED} file"
                )
            frame = width, height
        elif marker in _OTHER:
            raise UnsupportedImage(
                f"this is {_OTHER[marker]} JPEG, which is not served; save it as a baseline or progressive JPEG"
            )
        elif marker == _APP1 and not turned and bytes(body[:6]) == b"Exif\0\0":
            turned = orientation(body)
    if frame is None:
        raise InvalidImage("the JPEG file has no frame header; save it again and resend it")
    return Facts(*frame, turned or 1)

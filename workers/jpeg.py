"""Reading JPEG by libjpeg-turbo, which frees the GIL. Its warnings are errors here: they tell a whole picture from half
of one.

libjpeg tells only the first warning of a file. Where that may be one of those that cost no pixels (an unknown version,
colour transform or range of coefficients, all of which it replaces by the usual one), the usual one is written in its
place and the file is read again, so that nothing stands before a warning that matters.
"""

from __future__ import annotations

import io
import re
from typing import Literal

import numpy as np
import simplejpeg
from PIL import Image

from core.errors import InvalidImage
from core.headers.jpeg import segments

MAX_SCANS = 100  # of a progressive JPEG; each costs a pass over the whole picture, and encoders write about ten

_ICC_HEAD = b"ICC_PROFILE\0"
_JFIF, _ICC, _ADOBE, _PROGRESSIVE = 0xE0, 0xE2, 0xEE, 0xC2
_SCAN = re.compile(rb"(\xff\xda\0(?:\x08\x01.{2}|\x0a\x02.{4}|\x0c\x03.{6}|\x0e\x04.{8})).{3}", re.DOTALL)
_BEGIN, _END, _STRAY = b"\xff\xda\0", b"\xff\xd9", b"\x55" * 256
_BEHIND_SCAN = re.compile(rb"\xff(?:[\xc4\xda]\0|\xd9)")
_ALL_COEFFICIENTS = b"\0\x3f\0"  # what a scan that is not progressive holds


def size(data: memoryview) -> tuple[int, int]:
    """Width and height by the decoder's own reading. Raises `InvalidImage` when the file has too many scans."""
    if len(re.findall(rb"\xff\xda", data)) > MAX_SCANS:
        raise InvalidImage(f"the JPEG file has more than {MAX_SCANS} scans; save it again and resend it")
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except ValueError:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            return image.size
    return width, height


def read(data: memoryview) -> tuple[np.ndarray, bytes | None]:
    """The pixels, uint8 H x W x 1 or H x W x 3 (RGB), and the profile. Raises ValueError when some of them are missing.

    Four colours are taken as Adobe's programs and all others write them, inverted, and mixed as Pillow does.
    """
    try:
        _, _, stored, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except ValueError:
        return _subsampled(data), _profile(data)
    space: Literal["GRAY", "CMYK", "RGB"]
    space = "GRAY" if stored == "Gray" else "CMYK" if stored in ("CMYK", "YCCK") else "RGB"
    try:
        pixels = simplejpeg.decode_jpeg(data, space)
    except ValueError:
        usual = _usual(data, four_colours=space == "CMYK")
        if usual == data:
            raise
        pixels = simplejpeg.decode_jpeg(usual, space)
    if space == "CMYK":
        height, width = pixels.shape[:2]
        mixed = Image.frombuffer("CMYK", (width, height), pixels.data, "raw", "CMYK;I", 0, 1)
        pixels = np.array(mixed.convert("RGB"))
    return pixels, _profile(data)


def _subsampled(data: memoryview) -> np.ndarray:
    """Four colours, some in fewer samples, which TurboJPEG does not know. Pillow reads them but tells of no cut, so it
    reads twice: bytes that follow a whole scan change nothing, while one that was cut takes them for its rest."""
    pixels, file = _by_pillow(data), bytes(data)
    begin = file.find(_BEGIN) + len(_BEGIN)
    strayed = file[:begin] + _BEHIND_SCAN.sub(lambda marker: _STRAY + marker[0], file[begin:])
    if _END not in file[begin:] or not np.array_equal(pixels, _by_pillow(strayed)):
        raise ValueError("the file is cut off")
    return pixels


def _by_pillow(data: memoryview | bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
        if image.mode != "CMYK":
            raise ValueError(f"unknown sampling of {image.mode}")
        return np.array(image.convert("RGB"))


def _usual(data: memoryview, *, four_colours: bool) -> bytes:
    """The file with what libjpeg takes an unknown value for in that value's place."""
    file = bytearray(data)
    progressive = False
    for marker, body in segments(memoryview(file)):
        if marker == _JFIF and len(body) >= 14 and bytes(body[:5]) == b"JFIF\0":
            body[5] = 1
        elif marker == _ADOBE and len(body) >= 12 and bytes(body[:5]) == b"Adobe" and body[11] != 0:
            body[11] = 2 if four_colours else 1
        progressive |= marker == _PROGRESSIVE
    return bytes(file if progressive else _SCAN.sub(lambda scan: scan[1] + _ALL_COEFFICIENTS, file))


def _profile(data: memoryview) -> bytes | None:
    pieces = {
        body[12]: bytes(body[14:])
        for marker, body in segments(data)
        if marker == _ICC and len(body) > 14 and bytes(body[:12]) == _ICC_HEAD
    }
    return b"".join(pieces[number] for number in sorted(pieces)) or None

"""BMP: the size and the kind of pixels in its second header, of which there are several lengths."""

from __future__ import annotations

import struct

from core.errors import InvalidImage, UnsupportedImage
from core.headers import ACCEPTED, Facts

_OLD = 12  # bytes of OS/2's header, whose numbers are short
_HEADERS = (_OLD, 40, 52, 56, 64, 108, 124)
_KINDS = {0: (1, 4, 8, 16, 24, 32), 1: (8,), 2: (4,), 3: (16, 32)}  # bits a pixel: plain, two RLEs, bit fields
_FIELDS = 3


def read(data: memoryview) -> Facts:
    (length,) = struct.unpack_from("<I", data, 14)
    kind = 0
    if length == _OLD:
        width, height, planes, bits = struct.unpack_from("<HHHH", data, 18)
    elif length in _HEADERS:
        width, height, planes, bits, kind = struct.unpack_from("<iiHHI", data, 18)
    else:
        raise InvalidImage("the BMP file's header is not valid; save it again and resend it")
    if bits not in _KINDS.get(kind, ()) or planes != 1:
        raise UnsupportedImage(f"this is a BMP of an unusual kind, which is not served; send a plain {ACCEPTED} file")
    height = abs(height)  # below 0: written from the top
    (begin,) = struct.unpack_from("<I", data, 10)
    if kind in (0, _FIELDS) and begin + (width * bits + 31) // 32 * 4 * height > len(data) and width > 0:
        raise InvalidImage("the BMP file is cut off; send the complete file")
    return Facts(width, height, 1, kind == _FIELDS and bits == 32)

"""GIF: the screen's size and the blocks up to the first picture, the only one that is looked at."""

from __future__ import annotations

import struct

from core.errors import InvalidImage
from core.headers import Facts

MAX_BLOCKS = 4_096  # of comments and the like before the picture, in pieces of up to 255 bytes


def read(data: memoryview) -> Facts:
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at = 13 + _palette(flags)
    clear = False
    for _ in range(MAX_BLOCKS):
        kind = data[at]
        if kind == 0x2C:
            left, top, across, down, flags = struct.unpack_from("<HHHHB", data, at + 1)
            if not across or not down or left + across > width or top + down > height:
                raise InvalidImage("the GIF file's picture lies outside its screen; save it again and resend it")
            code_size = data[at + 10 + _palette(flags)]
            if not 1 <= code_size <= 11:
                raise InvalidImage("the GIF file's picture does not begin as one; save it again and resend it")
            return Facts(width, height, 1, clear or (across, down) != (width, height))
        if kind == 0x21 and data[at + 1] == 0xF9:
            clear = bool(data[at + 3] & 1)
        if kind == 0x21:
            at += 2
        elif kind == 0x3B:
            break
        else:
            raise InvalidImage("the GIF file is damaged before its picture; save it again and resend it")
        for _ in range(MAX_BLOCKS):
            size = data[at]
            at += 1 + size
            if not size:
                break
        else:
            break
    raise InvalidImage("the GIF file has no picture where one should be; save it again and resend it")


def _palette(flags: int) -> int:
    """Bytes of the table of colours that follows."""
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0

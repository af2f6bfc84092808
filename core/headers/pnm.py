"""PNM (PBM, PGM, PPM), plain or raw: a few numbers in words, with comments between them."""

from __future__ import annotations

import re

from core.errors import InvalidImage
from core.headers import Facts

_HEAD = 1_024  # bytes in which the numbers stand
_NUMBER = re.compile(rb"(?:[ \t\r\n\v\f]+|#[^\r\n]*[\r\n])*?([0-9]{1,5})(?=[\s#])")
_CHANNELS = {b"4": 1, b"5": 1, b"6": 3}


def read(data: memoryview) -> Facts:
    head = bytes(data[:_HEAD])
    numbers, at = [], 2
    for _ in range(2 if head[1:2] in b"14" else 3):
        found = _NUMBER.match(head, at)
        if found is None:
            raise InvalidImage("the PNM file's header is not valid; save it again and resend it")
        numbers.append(int(found[1]))
        at = found.end()
    width, height, *most = numbers
    if most and not 0 < most[0] <= 0xFFFF:
        raise InvalidImage("the PNM file's largest value must be from 1 to 65535; save it again and resend it")
    channels = _CHANNELS.get(head[1:2])
    if channels:
        row = width * channels * (1 if most[0] < 256 else 2) if most else (width + 7) // 8
        if at + 1 + row * height > len(data):
            raise InvalidImage("the PNM file is cut off; send the complete file")
    return Facts(width, height)

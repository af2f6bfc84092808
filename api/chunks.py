"""The chunked transfer coding undone (RFC 9112, 7.1), strictly.

The parser of heads cannot do it: it does not tell where a body ends, and what follows the body is to wait unparsed.
"""

from __future__ import annotations

import re
from enum import Enum, auto

from core.errors import BadRequest

MAX_LINE = 256      # bytes of a chunk's size and extensions
MAX_TRAILER = 8192  # bytes of fields after the last chunk, which nobody reads
MALFORMED = "the chunks of the body are malformed"
WHOLE = re.compile(rb"([0-9A-Fa-f]{1,4})\r\n")  # a line of the plain kind, which nearly all are
SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?\r\n")
FIELD = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e\x80-\xff]*\r\n")


class Place(Enum):
    """Where in the body the next byte belongs."""

    SIZE = auto()
    DATA = auto()
    END = auto()      # the line break after a chunk's data
    TRAILER = auto()
    DONE = auto()


class Chunks:
    """One chunked body. `done`: its end has been read."""

    __slots__ = ("_left", "_line", "_place", "_trailer")

    def __init__(self) -> None:
        self._place, self._left, self._trailer = Place.SIZE, 0, 0
        self._line = b""  # the beginning of a line that has not come whole

    @property
    def done(self) -> bool:
        return self._place is Place.DONE

    @property
    def ahead(self) -> int:
        """How many of the bytes that come next are the rest of one chunk."""
        return self._left if self._place is Place.DATA else 0

    def read(self, data: bytes, at: int, most: int = 1 << 30) -> tuple[int, bytes, int]:
        """The position after what belongs to the body in `data` from `at` on, of `most` pieces at the most; what the
        chunks there hold, joined; and in how many pieces it came. Raises `BadRequest` for what is no chunk."""
        parts: list[bytes] = []
        while at < len(data) and self._place is not Place.DONE and len(parts) < most:
            if self._place is Place.SIZE and not self._line:
                at = _read_whole(data, at, parts, most)
                if at == len(data) or len(parts) >= most:
                    break
            if self._place is Place.DATA:
                part = data[at : at + self._left]
                at += len(part)
                self._left -= len(part)
                if not self._left:
                    self._place = Place.END
                parts.append(part)
                continue
            longest = MAX_LINE if self._place is Place.SIZE else 2 if self._place is Place.END else MAX_TRAILER
            end = data.find(b"\n", at, at + longest) + 1
            line = self._line + (data[at:end] if end else data[at : at + longest])
            if len(line) > longest or (not end and len(line) == longest):
                raise BadRequest(MALFORMED)
            at = end or len(data)
            if end:
                self._line = b""
                self._read_line(line)
            else:
                self._line = line
        return at, parts[0] if len(parts) == 1 else b"".join(parts), len(parts)

    def _read_line(self, line: bytes) -> None:
        if self._place is Place.SIZE:
            found = SIZE.fullmatch(line)
            if found is None:
                raise BadRequest(MALFORMED)
            self._left = int(found[1], 16)
            self._place = Place.DATA if self._left else Place.TRAILER
        elif self._place is Place.END:
            if line != b"\r\n":
                raise BadRequest(MALFORMED)
            self._place = Place.SIZE
        elif line == b"\r\n":
            self._place = Place.DONE
        else:
            self._trailer += len(line)
            if self._trailer > MAX_TRAILER or FIELD.fullmatch(line) is None:
                raise BadRequest(MALFORMED)


def _read_whole(data: bytes, at: int, parts: list[bytes], most: int) -> int:
    """Append what the next chunks hold, as long as they are plain, have data and are there to their ends, and there are
    not `most` parts; the position after them. Short, for there may be thousands."""
    match, append = WHOLE.match, parts.append
    while len(parts) < most and (found := match(data, at)) is not None:
        begin = found.end()
        end = begin + int(found[1], 16)
        if end == begin or data[end : end + 2] != b"\r\n":
            break
        append(data[begin:end])
        at = end + 2
    return at

"""JSON taken apart as it arrives: its skeleton, which is small, and its long strings, which may be large.

A string of more than `SHORT` bytes is lifted out of the text and kept as the pieces in which it came; in the skeleton
`NaN`, which no JSON may hold, stands for it. So nothing is ever joined, copied or decoded in one go that is larger than
the skeleton may be, and what is too much is refused before all of it has come.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator

from api.spool import IN_MEMORY, Spool
from core.errors import BadRequest, TooLarge
from core.turns import PIECE

SHORT = 255           # characters or escapes of a string that stays where it is
MAX_SKELETON = 64 << 10  # bytes of a JSON text beside its long strings
MAX_VALUES = 10_000
MAX_LONG = 1_000      # long strings
MAX_TEXT = 360 << 10  # bytes of a long string that is text, as JSON has it; or of a watermark of 256 KiB
BEGIN = 16
LIFTED = b"NaN"

_SHORT = re.compile(rb'(?:[^"]++|"[^"\\]{0,255}+"|"(?:[^"\\]|\\.){0,255}+")*+', re.DOTALL)
_INSIDE = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_ESCAPES = re.compile(rb"(?:[^\\]++|\\u[0-9a-fA-F]{4}|\\[^u])*+", re.DOTALL)
_UNDECIDED = 2 * SHORT + 2  # bytes after a quote in which a short string would have ended
_LONGEST_ESCAPE = 6


class LongText:
    """A long string of a JSON text: pieces of UTF-8 with JSON's escapes, still unchecked; on the disk where it is much.
    `size` is in bytes."""

    __slots__ = ("_begin", "_escaped", "_pieces", "_spool", "size")

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._spool: Spool | None = None
        self._begin = b""
        self._escaped = False
        self.size = 0

    def __repr__(self) -> str:
        return f"<LongText of {self.size} bytes>"

    def add(self, piece: bytes, escaped: bool) -> None:
        """What came next; `escaped`: whether it holds escapes."""
        self._pieces.append(piece)
        if len(self._begin) < BEGIN:
            self._begin += piece[:BEGIN]
        self._escaped |= escaped
        self.size += len(piece)

    def startswith(self, prefix: str) -> bool:
        """Whether it begins so; the prefix has at most `BEGIN` characters, of ASCII."""
        return self._begin.startswith(prefix.encode())

    async def spill(self) -> None:
        """Move what is much out of memory. Raises `StorageFull` and `StorageFailed`."""
        if self.size > IN_MEMORY:
            self._spool = self._spool or Spool()
            for piece in self._pieces:
                await self._spool.write(piece)
            self._pieces.clear()

    def close(self) -> None:
        """Nobody wants it."""
        self._pieces.clear()
        if self._spool is not None:
            self._spool.close()

    def quoted(self) -> bytes:
        """The string as JSON has it, of one that is short enough to be text."""
        return b'"%b"' % b"".join(self._pieces)

    async def take(self) -> AsyncIterator[bytes]:
        """The string piece by piece without escapes, to be gone through once. Characters beyond ASCII, which base64 has
        not, become others that it has not. Raises `BadRequest` for what is no JSON."""
        rest = b""
        async for piece in self._all():
            if self._escaped:
                whole = _ESCAPES.match(rest + piece)
                assert whole is not None
                piece, rest = whole[0], whole.string[whole.end() :]
                if len(rest) >= _LONGEST_ESCAPE:
                    raise BadRequest("the JSON cannot be read: Invalid \\escape in a long string")
                piece = _unescaped(piece)
            yield piece
        if rest:
            raise BadRequest("the JSON cannot be read: Invalid \\escape in a long string")

    async def _all(self) -> AsyncIterator[bytes]:
        if self._spool is not None:
            data = await self._spool.finish()
            for at in range(0, len(data), PIECE):
                yield bytes(data[at : at + PIECE])
        pieces, self._pieces = self._pieces[::-1], []
        while pieces:
            yield pieces.pop()


def _unescaped(piece: bytes) -> bytes:
    if b"\\" not in piece:
        return piece
    try:
        found: str = json.loads(f'"{piece.decode("latin-1")}"')
    except json.JSONDecodeError as fault:
        raise BadRequest(f"the JSON cannot be read: {fault.msg} in a long string") from None
    return found.encode("ascii", "replace")


class Scanner:
    """Takes a JSON text apart. `skeleton` and `texts`, in their order, are whole after `end`."""

    def __init__(self) -> None:
        self.skeleton = bytearray()
        self.texts: list[LongText] = []
        self._inside = False  # a long string
        self._rest = b""      # of which it cannot be said yet where it belongs

    def feed(self, data: bytes) -> None:
        """At most `PIECE` bytes more. Raises `TooLarge` as soon as it is."""
        data, self._rest = self._rest + data if self._rest else data, b""
        at = 0
        while at < len(data):
            at = self._go_on(data, at) if self._inside else self._look(data, at)
        if len(self.skeleton) > MAX_SKELETON:
            raise TooLarge(
                f"the JSON has more than {MAX_SKELETON} bytes beside its long strings; send less in one request"
            )

    def end(self) -> None:
        """All has come. Raises `BadRequest` for what is no JSON, `TooLarge`."""
        self.skeleton += self._rest
        bare = _STRING.sub(b"", self.skeleton)
        if bare.count(LIFTED) != len(self.texts) or b"Infinity" in bare:
            raise BadRequest(f"the JSON holds {'Infinity' if b'Infinity' in bare else 'NaN'}, which is no number")
        if sum(map(bare.count, (b",", b"[", b"{", b":"))) > MAX_VALUES:
            raise TooLarge(f"the JSON holds more than {MAX_VALUES} values")
        if self._inside:
            raise BadRequest("the JSON cannot be read: it ends within a string")

    def close(self) -> None:
        """Let go of what has come."""
        for text in self.texts:
            text.close()

    def _look(self, data: bytes, at: int) -> int:
        """Outside of long strings: up to where the next one begins, or to what is not decided yet."""
        match = _SHORT.match(data, at)
        assert match is not None
        end = match.end()
        self.skeleton += data[at:end]
        if end == len(data):
            return end
        if len(data) - end <= _UNDECIDED:
            self._rest = data[end:]
            return len(data)
        if len(self.texts) == MAX_LONG:
            raise TooLarge(f"the JSON holds more than {MAX_LONG} long strings")
        self.texts.append(LongText())
        self.skeleton += LIFTED
        self._inside = True
        return end + 1

    def _go_on(self, data: bytes, at: int) -> int:
        """Inside of a long string: to its end, or as far as the data goes."""
        end = data.find(b'"', at)
        escaped = data.find(b"\\", at, len(data) if end < 0 else end) >= 0
        if escaped:
            match = _INSIDE.match(data, at)
            assert match is not None
            end = match.end()
        elif end < 0:
            end = len(data)
        self.texts[-1].add(data[at:end], escaped)
        if end == len(data):
            return end
        if data[end] != ord('"'):  # half an escape
            self._rest = data[end:]
            return len(data)
        self._inside = False
        return end + 1

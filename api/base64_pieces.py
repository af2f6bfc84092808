"""base64 in pieces, both ways, so that no image keeps the event loop for long."""

from __future__ import annotations

import binascii
from collections.abc import AsyncIterator, Iterator

import pybase64

from api.json_pieces import LongText
from core.data import Data
from core.errors import InvalidImage
from core.turns import PIECE

SPACE = b" \t\r\n\v\f"
URL_SAFE = bytes.maketrans(b"-_", b"+/")
STRANGE = bytes(code for code in range(256) if (not chr(code).isalnum() and code not in b"+/-_=") or code > 127)
ENCODED = PIECE // 3 * 3  # bytes that are encoded at a time


class Decoder:
    """Takes base64 in pieces that may end anywhere. White space, the URL-safe alphabet and missing padding are taken;
    where it is `lenient`, characters that do not belong there are passed over, and nothing after the padding counts.
    All methods raise `InvalidImage`, which names the role."""

    def __init__(self, role: str, *, lenient: bool = False) -> None:
        self._role, self._drop, self._lenient = role, STRANGE if lenient else SPACE, lenient
        self._rest = b""  # less than four characters
        self._ended = False  # its padding has come

    def feed(self, piece: bytes) -> bytes:
        """The bytes that are certain now."""
        if self._ended:
            self._check_tail(piece)
            return b""
        begin = -len(self._rest) % 4
        end = len(piece) - (len(piece) - begin) % 4
        try:
            first = pybase64.b64decode(self._rest + piece[:begin], validate=True) if begin else b""
            found = pybase64.b64decode(memoryview(piece)[begin:end], validate=True)
        except (binascii.Error, ValueError):
            return self._clean(self._rest + piece)
        if len(first) < 3 * bool(begin) or len(found) < (end - begin) // 4 * 3:  # there was padding
            return self._clean(self._rest + piece)
        self._rest = piece[end:]
        return first + found if first else found

    def end(self) -> bytes:
        """The last bytes."""
        found = self._clean(self._rest)
        return found + self._decode(self._rest + b"=" * (-len(self._rest) % 4))

    def _clean(self, data: bytes) -> bytes:
        data, padding, tail = data.translate(URL_SAFE, self._drop).partition(b"=")
        if padding:
            self._ended = True
            self._check_tail(tail)
        whole = len(data) & ~3
        self._rest = data[whole:]
        return self._decode(data[:whole])

    def _check_tail(self, tail: bytes) -> None:
        if not self._lenient and tail.strip(SPACE + b"="):
            raise self._invalid()

    def _decode(self, data: bytes) -> bytes:
        try:
            return pybase64.b64decode(data, validate=True)
        except (binascii.Error, ValueError):
            raise self._invalid() from None

    def _invalid(self) -> InvalidImage:
        return InvalidImage(f"the {self._role} is not valid base64", parameter=self._role)


async def characters(text: str | bytes | LongText) -> AsyncIterator[bytes]:
    """A text as pieces of ASCII; what is none stays what base64 has no character for."""
    if isinstance(text, LongText):
        async for piece in text.take():
            yield piece
        return
    for at in range(0, len(text), PIECE):
        part = text[at : at + PIECE]
        yield part.encode("ascii", "replace") if isinstance(part, str) else part


def encoded(data: Data) -> Iterator[bytes]:
    """The base64 of all of it, piece by piece; none is longer than 64 KiB of what is encoded."""
    with memoryview(data) as view:
        for at in range(0, len(view), ENCODED):
            yield pybase64.b64encode(view[at : at + ENCODED])


def encoded_length(size: int) -> int:
    """How many characters so many bytes become."""
    return -(-size // 3) * 4

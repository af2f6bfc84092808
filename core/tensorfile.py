"""What a .safetensors file says of itself, read without torch and without its tensors.

The format (Hugging Face, safetensors 0.x): 8 bytes, little-endian, the length of a JSON header; the header, which gives
each tensor's dtype, shape and place; then the tensors' bytes without gaps. Such a file holds no code.

Whatever the format's own library refuses is refused here, and what two readers could take differently, too. The header
is read member by member, so that a long one does not hold the interpreter while others wait for it.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

LONGEST_HEADER = 100_000_000  # bytes; what the format's own library allows
LONGEST_ENTRY = 1024  # characters that tell of one tensor; real ones take a tenth of it
MOST_SIDES = 16
MOST = (1 << 64) - 1  # of a side, an offset, a number of elements or of bits
BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F4": 4,
    "F6_E2M3": 6, "F6_E3M2": 6, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
NOTES = "__metadata__"
FIELDS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """One tensor of a file: its dtype as the format names it ("F16"), its shape, its bytes."""

    dtype: str
    shape: tuple[int, ...]
    size: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class TensorFile:
    """The header of a file: its tensors by name, and the texts that its maker left."""

    tensors: Mapping[str, TensorHeader]
    notes: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(
        cls, file: Path, longest: int = LONGEST_HEADER, most: int = MOST, pause: Callable[[], None] = lambda: None
    ) -> TensorFile:
        """`longest`: the most bytes that its header may have, `most`: how many tensors and notes together. `pause()` is
        called for each of them. Raises ValueError with half a sentence (what the file is instead), OSError when it
        cannot be read."""
        whole = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(LONGEST_HEADER, whole - 8):
                raise ValueError("it is no safetensors file, or a damaged one")
            if length > longest:
                raise ValueError(f"its header has {length} bytes; the most is {longest}")
            raw = stream.read(length)
        tensors: dict[str, TensorHeader] = {}
        places: list[tuple[int, int]] = []
        try:
            notes = _read(_Scanner(raw.decode(), most, pause), tensors, places)
        except TooManyEntries:
            raise
        except (ValueError, TypeError, KeyError, RecursionError):
            raise ValueError("its safetensors header cannot be read") from None
        if _end(places) != whole - 8 - length:
            raise ValueError("it was cut off, or has more bytes than its header tells of")
        return cls(tensors, notes)


class TooManyEntries(ValueError):
    """More tensors and notes than whoever reads the file allows."""


class _Scanner:
    """JSON, read piece by piece, with at most so many members of objects. Everything raises ValueError."""

    def __init__(self, text: str, most: int, pause: Callable[[], None]) -> None:
        self._text, self._at = text, 0
        self._most, self._left, self._pause = most, most, pause

    def members(self) -> Iterator[str]:
        """The keys of the object that begins here, none twice. Whoever gets a key reads its value next."""
        seen = set()
        more = self._take("{") and not self._sees("}")
        while more:
            key = self.string()
            if key in seen:
                raise ValueError
            seen.add(key)
            if not self._left:
                raise TooManyEntries(f"its header tells of more than {self._most} tensors and notes")
            self._left -= 1
            self._pause()
            self._take(":")
            yield key
            more = self._sees(",") and self._take(",")
        self._take("}")

    def string(self) -> str:
        """A text that UTF-8 can hold."""
        if not self._sees('"'):
            raise ValueError
        found, self._at = _STRING.raw_decode(self._text, self._at)
        if not found.isascii():
            found.encode()  # half a surrogate pair
        return str(found)

    def entry(self) -> Any:
        """An object without another one in it, and without a closing brace in its texts."""
        self._sees("{")
        end = self._text.find("}", self._at, self._at + LONGEST_ENTRY) + 1
        if not end:
            raise ValueError
        begin, self._at = self._at, end
        return _ENTRY.decode(self._text[begin:end])

    def null(self) -> bool:
        """Whether it stands here; then it is passed."""
        there = self._sees("null")
        self._at += 4 * there
        return there

    def end(self) -> None:
        """Nothing but blanks may follow."""
        if _BLANKS.match(self._text, self._at).end() != len(self._text):  # type: ignore[union-attr]
            raise ValueError

    def _sees(self, word: str) -> bool:
        self._at = _BLANKS.match(self._text, self._at).end()  # type: ignore[union-attr]
        return self._text.startswith(word, self._at)

    def _take(self, sign: str) -> bool:
        if not self._sees(sign):
            raise ValueError
        self._at += len(sign)
        return True


def _read(header: _Scanner, tensors: dict[str, TensorHeader], places: list[tuple[int, int]]) -> dict[str, str]:
    """The notes; tensors and where each begins and ends go into what was given."""
    notes = {}
    for name in header.members():
        if name != NOTES:
            tensors[name], place = _tensor(header.entry())
            places.append(place)
        elif not header.null():
            notes = {key: header.string() for key in header.members()}
    header.end()
    return notes


def _tensor(entry: Mapping[str, Any]) -> tuple[TensorHeader, tuple[int, int]]:
    shape, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
    whole = all(type(number) is int and number <= MOST for number in (*shape, start, end))
    if not whole or len(shape) > MOST_SIDES:  # before anything is computed: "a" * side would be a text of that length
        raise ValueError
    elements = 1
    for side in shape:
        elements *= side
        if elements > MOST:
            raise ValueError
    bits = elements * BITS[entry["dtype"]]
    if bits > MOST or bits != 8 * (end - start):
        raise ValueError
    return TensorHeader(entry["dtype"], shape, end - start), (start, end)


def _end(places: list[tuple[int, int]]) -> int:
    """Where the last tensor ends, in bytes after the header. Raises ValueError unless they lie one after another."""
    ends = {start: end for start, end in places if start != end}
    ended, place = {0}, 0
    while place in ends:
        place = ends.pop(place)
        ended.add(place)
    doubled = sum(start != end for start, end in places) != len(ended) - 1
    if ends or doubled or not all(start in ended for start, _ in places):
        raise ValueError("its tensors overlap, or leave gaps")
    return place


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs) or found.keys() != FIELDS:
        raise ValueError
    return found


def _natural(digits: str) -> int:
    if digits.startswith("-"):  # also -0, which is no integer to other readers
        raise ValueError
    return int(digits)


def _no(_: str) -> NoReturn:
    raise ValueError


_BLANKS = re.compile(r"[ \t\n\r]*")
_STRING = json.JSONDecoder()
_ENTRY = json.JSONDecoder(object_pairs_hook=_fields, parse_int=_natural, parse_float=_no, parse_constant=_no)

"""AV1 streams: the size that each sequence header and frame of a still picture claims (AV1 specification, 5.3 to 5.9).

A decoder allocates by these, whatever the container says, so all of them are read, not the first alone. A frame that
overrides its sequence's size is refused: still pictures have no use for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from core.errors import InvalidImage, UnsupportedImage
from core.headers import ACCEPTED

MAX_UNITS = 256  # of a stream; encoders of still pictures write three
MAX_FRAMES = 4  # as many layers as a progressive picture can have; each may stay in the decoder's memory

_SEQUENCE, _FRAME_HEADER, _FRAME, _REDUNDANT, _TILE_LIST = 1, 3, 6, 7, 8
_HEAD = 256  # bytes in which what is read of a header lies
_CHOSEN_LATER = 2  # a frame says it, not its sequence


@dataclass(frozen=True, slots=True)
class _Sequence:
    """What a sequence header says of its frames. `reduced`: they have no header of their own worth the name;
    `screen`, `motion`: 0, 1 or `_CHOSEN_LATER`; `id_bits`: of a frame's number, 0 where frames have none."""

    width: int
    height: int
    reduced: bool
    screen: int
    motion: int
    id_bits: int


def check(stream: memoryview, width: int, height: int) -> None:
    """Raise `InvalidImage` unless every sequence header and every frame of the stream has this size, `UnsupportedImage`
    for what no still picture has."""
    sequence: _Sequence | None = None
    frames = 0
    for kind, body in _units(stream):
        if kind == _SEQUENCE:
            sequence = _read_sequence(_Bits(body))
            if (sequence.width, sequence.height) != (width, height):
                raise InvalidImage("the AVIF file claims another size than its picture has; save it again")
        elif kind in (_FRAME_HEADER, _FRAME, _REDUNDANT):
            if sequence is None:
                raise _broken()
            _read_frame(_Bits(body), sequence)
            frames += 1
        elif kind == _TILE_LIST:
            raise _video()
        if frames > MAX_FRAMES:
            raise _video()
    if sequence is None:
        raise _broken()


def _broken() -> InvalidImage:
    return InvalidImage("the AVIF file's picture cannot be read; save it again and resend it")


def _video() -> UnsupportedImage:
    return UnsupportedImage(f"this is an AVIF whose picture is a video; send a still {ACCEPTED} file")


def _units(stream: memoryview) -> Iterator[tuple[int, memoryview]]:
    """(type, body) of each open bitstream unit."""
    at = 0
    for _ in range(MAX_UNITS):
        if at >= len(stream):
            return
        head = stream[at]
        at += 2 if head & 4 else 1
        size = len(stream) - at
        if head & 2:
            size = 0
            for shift in range(0, 56, 7):  # leb128
                byte = stream[at]
                size, at = size | (byte & 127) << shift, at + 1
                if not byte & 128:
                    break
            else:
                raise _broken()
        if head & 128 or at + size > len(stream):
            raise _broken()
        yield head >> 3 & 15, stream[at : at + size]
        at += size
    if at < len(stream):
        raise _broken()


class _Bits:
    """Reads the first bits of a unit."""

    def __init__(self, body: memoryview) -> None:
        part = bytes(body[:_HEAD])
        self._bits, self._left = int.from_bytes(part, "big"), 8 * len(part)

    def take(self, count: int) -> int:
        """Raises IndexError behind the end."""
        self._left -= count
        if self._left < 0:
            raise IndexError
        return self._bits >> self._left & (1 << count) - 1


def _read_sequence(bits: _Bits) -> _Sequence:
    take = bits.take
    take(4)  # profile, still picture
    if reduced := bool(take(1)):
        take(5)
    else:
        if take(1):
            raise UnsupportedImage(f"this is an AVIF with video timing; send a still {ACCEPTED} file")
        delays = take(1)
        for _ in range(take(5) + 1):
            take(12)
            if take(5) > 7:
                take(1)
            if delays and take(1):
                take(4)
    wide, high = take(4) + 1, take(4) + 1
    width, height = take(wide) + 1, take(high) + 1
    if reduced:
        return _Sequence(width, height, reduced, _CHOSEN_LATER, _CHOSEN_LATER, 0)
    id_bits = take(4) + take(3) + 3 if take(1) else 0
    take(3)  # superblocks of 128, filters
    take(4)  # compound prediction, warped motion, dual filter
    if take(1):  # order hints
        take(2)
    screen = _CHOSEN_LATER if take(1) else take(1)
    motion = _CHOSEN_LATER
    if screen:
        motion = _CHOSEN_LATER if take(1) else take(1)
    return _Sequence(width, height, reduced, screen, motion, id_bits)


def _read_frame(bits: _Bits, sequence: _Sequence) -> None:
    """Raise `InvalidImage` for a frame of a size of its own. Others have their sequence's."""
    if sequence.reduced:
        return
    take = bits.take
    if take(1):  # shows a frame that was there before
        return
    kind, shown = take(2), take(1)
    if not shown:
        take(1)  # showable
    if kind != 3 and not (kind == 0 and shown):
        take(1)  # error resilient
    take(1)  # no update of probabilities
    screen = take(1) if sequence.screen == _CHOSEN_LATER else sequence.screen
    if screen and sequence.motion == _CHOSEN_LATER:
        take(1)
    take(sequence.id_bits)
    if kind == 3 or take(1):
        raise InvalidImage("the AVIF file's picture has frames of several sizes; save it again and resend it")

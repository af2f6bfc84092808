"""Where a body lands in shared memory: room that grows with what has come, never with what was only announced."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from core.data import Data
from core.request import ImagePart, Span
from workers.arena import Arena

FIRST = 1 << 20   # bytes reserved before any has come, so that ordinary images are received without a copy
SCARCE = 64 << 10  # the same, while others hold much
PIECE = 1 << 20   # bytes copied before others have their turn


class Landing:
    """Room for at most `most` bytes, which doubles as often as needed. Leave its `with` block to give it back, unless
    it was handed over. Making it raises `StorageFull`."""

    __slots__ = ("_arena", "_most", "_span", "buffer")

    def __init__(self, arena: Arena, most: int) -> None:
        self._arena, self._most = arena, most
        first = FIRST if arena.plenty else SCARCE
        self._span: Span | None = arena.take_input(min(most, first))
        self.buffer = arena.view(self._span)

    async def grow(self) -> memoryview:
        """The buffer of twice the length, or of `most` bytes. Raises `StorageFull`, and then nothing has changed."""
        assert self._span is not None
        larger = self._arena.take_input(min(self._most, 2 * self._span.size))
        try:
            await copy(self._arena.view(larger), self.buffer)
        except BaseException:
            self._arena.give(larger)
            raise
        self._arena.give(self._span)
        self._span, self.buffer = larger, self._arena.view(larger)
        return self.buffer

    def hand_over(self, size: int) -> Span:
        """The span, of which the first `size` bytes are the body; somebody else gives it back from now on."""
        assert self._span is not None
        span, self._span = self._span, None
        return span if span.size == size else replace(span, size=size)

    def __enter__(self) -> Landing:
        return self

    def __exit__(self, *_: object) -> None:
        if self._span is not None:
            self._arena.give(self._span)
            self._span = None


async def copy(room: memoryview, data: Data) -> None:
    """Copy `data` to the beginning of `room`, in pieces between which the event loop serves others."""
    source = memoryview(data)
    for at in range(0, len(source), PIECE):
        if at:
            await asyncio.sleep(0)
        piece = source[at : at + PIECE]
        room[at : at + len(piece)] = piece


async def images_into_arena(arena: Arena, images: Sequence[ImagePart]) -> tuple[tuple[ImagePart, ...], list[Span]]:
    """Images that came as bytes, copied into shared memory, and the spans taken for them; those that are there already
    stay as they are. Raises `StorageFull`; whenever it raises it holds nothing."""
    parts: list[ImagePart] = []
    spans: list[Span] = []
    try:
        for part in images:
            if not isinstance(part.data, Span | str):
                spans.append(arena.take_input(len(part.data)))
                await copy(arena.view(spans[-1]), part.data)
                part = replace(part, data=spans[-1])
            parts.append(part)
    except BaseException:
        for span in spans:
            arena.give(span)
        raise
    return tuple(parts), spans

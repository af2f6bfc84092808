"""Turns on the event loop, and beside it: long work is done in small pieces, between which others are served."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

PIECE = 64 << 10  # bytes that are worked on at a time
COPIED = 1 << 20  # bytes that are copied at a time
TURN = 0.002  # seconds of work after which others are served
THREAD_TURN = 0.001  # seconds of a thread's work after which it sleeps for as long


class Turn:
    """The time that one piece of work has had without a pause."""

    __slots__ = ("_began",)

    def __init__(self) -> None:
        self._began = time.perf_counter()

    async def over(self) -> None:
        """To be called after each piece: lets others run when this work has had its time."""
        if time.perf_counter() - self._began > TURN:
            await asyncio.sleep(0)
            self._began = time.perf_counter()


class Rests:
    """The pauses of a thread that works for long. The interpreter runs one thread at a time, and changes between them
    after 5 ms only; the event loop's is to have it sooner."""

    __slots__ = ("_began",)

    def __init__(self) -> None:
        self._began = time.perf_counter()

    def __call__(self) -> None:
        """To be called after each piece."""
        if time.perf_counter() - self._began > THREAD_TURN:
            time.sleep(THREAD_TURN)
            self._began = time.perf_counter()


def pieces(data: bytes, size: int = PIECE) -> Iterator[bytes]:
    """Bytes as pieces of at most `size` bytes."""
    if len(data) <= size:
        yield data
    else:
        yield from (data[at : at + size] for at in range(0, len(data), size))


async def copied(view: memoryview) -> bytes | bytearray:
    """A copy of memory that is another's."""
    if len(view) <= COPIED:
        return bytes(view)
    turn, found = Turn(), bytearray(len(view))
    for at in range(0, len(view), COPIED):
        found[at : at + COPIED] = view[at : at + COPIED]
        await turn.over()
    return found

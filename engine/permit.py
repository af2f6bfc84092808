"""Room for one request: a place in the bounded queue, and shared memory for its bytes when it asks for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType

from core.errors import StorageFull
from core.request import ImagePart, Span
from scheduler.admission import Grant
from workers.arena import Arena


class Permit:
    """Given by `Engine.admit` before a body is read. `Engine.submit` takes it over; one that is never used is given
    back when its `with` block is left."""

    __slots__ = ("_arena", "_grant", "_size", "_span")

    def __init__(self, grant: Grant, arena: Arena, size: int) -> None:
        self._grant: Grant | None = grant
        self._arena = arena
        self._size = size
        self._span: Span | None = None

    @property
    def span(self) -> Span:
        """The admitted bytes in shared memory, reserved at the first call. Raises `StorageFull`."""
        if self._span is None:
            self._span = self._arena.take_input(self._size)
        return self._span

    @property
    def buffer(self) -> memoryview:
        """Where the body may be written as it arrives: the span's bytes."""
        return self._arena.view(self.span)

    def hand_over(self) -> tuple[Grant, Span | None]:
        """The job takes over what the permit holds. Raises ValueError when it holds nothing any more."""
        if self._grant is None:
            raise ValueError("this permit has been used already")
        grant, span = self._grant, self._span
        self._grant = self._span = None
        return grant, span

    def transfer(self) -> Permit:
        """A permit that holds what this one held; this one holds nothing any more."""
        grant, span = self.hand_over()
        heir = Permit(grant, self._arena, self._size)
        heir._span = span
        return heir

    def release(self) -> None:
        """Give everything back. A second call, or one after `submit`, does nothing."""
        if self._span is not None:
            self._arena.give(self._span)
        if self._grant is not None:
            self._grant.release()
        self._grant = self._span = None

    def __enter__(self) -> Permit:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def images_into_arena(arena: Arena, images: Sequence[ImagePart]) -> tuple[tuple[ImagePart, ...], list[Span]]:
    """Images that came as bytes, copied into shared memory, and the spans taken for them; those that are there already
    stay as they are. Raises `StorageFull`, and then holds nothing."""
    parts: list[ImagePart] = []
    spans: list[Span] = []
    try:
        for part in images:
            if not isinstance(part.data, Span | str):
                spans.append(arena.take_input(len(part.data)))
                arena.view(spans[-1])[:] = part.data
                part = replace(part, data=spans[-1])
            parts.append(part)
    except StorageFull:
        for span in spans:
            arena.give(span)
        raise
    return tuple(parts), spans

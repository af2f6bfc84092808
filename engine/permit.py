"""Room for one request: a place in the bounded queue, and shared memory for its bytes when it asks for it."""

from __future__ import annotations

from types import TracebackType

from core.request import Span
from scheduler.admission import Grant
from workers.arena import Arena


class Permit:
    """Given by `Engine.admit`. `Engine.submit` takes it over; one that is never used is given back when its `with`
    block is left. `span`: shared memory that holds the bytes already, from now on the permit's."""

    __slots__ = ("_arena", "_grant", "_size", "_span")

    def __init__(self, grant: Grant, arena: Arena, size: int, span: Span | None = None) -> None:
        self._grant: Grant | None = grant
        self._arena = arena
        self._size = size
        self._span = span

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
        return Permit(grant, self._arena, self._size, span)

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

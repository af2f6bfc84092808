"""Where long computations ask whether anybody still wants what they compute.

The worker says which items are being worked on (`wanted_for`); filters and loops deep below call `checkpoint()`, which
costs a microsecond and raises `Abandoned` once none of these items is wanted. Pixels do not depend on it. It is also
where the worker shows that it lives and ends what takes too long (`beating`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar

from core.errors import Cancelled
from models.base import Item, Output

_items: ContextVar[Sequence[Item]] = ContextVar("items", default=())
_beat: ContextVar[Callable[[], None] | None] = ContextVar("beat", default=None)
_renew: ContextVar[Callable[[bool], None] | None] = ContextVar("renew", default=None)


class Abandoned(Exception):
    """Nobody wants any of the items that are being computed."""


class OutOfTime(Exception):
    """What is being computed has run for as long as it may."""


@contextlib.contextmanager
def beating(beat: Callable[[], None], renew: Callable[[bool], None] | None = None) -> Iterator[None]:
    """Within this block every checkpoint calls `beat`, which may raise `OutOfTime`, and every `next_part` calls `renew`
    with its `long`."""
    tokens = _beat.set(beat), _renew.set(renew)
    try:
        yield
    finally:
        _beat.reset(tokens[0])
        _renew.reset(tokens[1])


@contextlib.contextmanager
def wanted_for(items: Sequence[Item]) -> Iterator[None]:
    """Within this block it is these items that are computed."""
    token = _items.set(items)
    try:
        yield
    finally:
        _items.reset(token)


def checkpoint() -> None:
    """Raise `Abandoned` when all items that are being computed were cancelled, `OutOfTime` when they take too long."""
    if (beat := _beat.get()) is not None:
        beat()
    items = _items.get()
    if items and all(item.cancelled() for item in items):
        raise Abandoned


def next_part(*, long: bool = False) -> None:
    """A checkpoint before each part of work that is known to end, as a forward of many: a part that has ended is
    progress, and the next may take as long as the whole otherwise. `long`: it may take so long without a sign."""
    if (renew := _renew.get()) is not None:
        renew(long)
    checkpoint()


def in_parts(
    parts: Iterable[Sequence[Item]], work: Callable[[Sequence[Item]], Sequence[Output | Exception]]
) -> list[Output | Exception]:
    """What `work` gives for each part, one behind the other. A part is left when all its items were cancelled, and
    `Cancelled` stands for each of them; the others go on."""
    done: list[Output | Exception] = []
    for part in parts:
        try:
            with wanted_for(part):
                checkpoint()
                done += work(part)
        except Abandoned:
            done += [cancelled() for _ in part]
    return done


def cancelled() -> Cancelled:
    """What stands for a result that nobody wants."""
    return Cancelled("the job was cancelled while it ran")

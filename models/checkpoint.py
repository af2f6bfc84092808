"""Where long computations ask whether anybody still wants what they compute.

The worker says which items are being worked on (`wanted_for`); filters and loops deep below call `checkpoint()`, which
costs a microsecond and raises `Abandoned` once none of these items is wanted. Pixels do not depend on it. It is also
where the worker shows that it lives and ends what takes too long (`beating`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar

import torch

from core.errors import Cancelled
from models.base import Item, Output

_items: ContextVar[Sequence[Item]] = ContextVar("items", default=())
_beat: ContextVar[Callable[[], None] | None] = ContextVar("beat", default=None)
_renew: ContextVar[Callable[[bool], None] | None] = ContextVar("renew", default=None)
_recalled: ContextVar[Callable[[], bool]] = ContextVar("recalled", default=lambda: False)


class Abandoned(Exception):
    """Nobody wants any of the items that are being computed."""


class OutOfTime(Exception):
    """What is being computed has run for as long as it may."""


class Later(Exception):
    """Stands for the result of an item that was not begun, because the master wants it back."""


@contextlib.contextmanager
def recallable(recalled: Callable[[], bool]) -> Iterator[None]:
    """Within this block no further part is begun once `recalled` is true."""
    token = _recalled.set(recalled)
    try:
        yield
    finally:
        _recalled.reset(token)


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


def parts(items: Sequence[Item], device: torch.device, most: int) -> list[Sequence[Item]]:
    """The items as they are computed together: one by one on a CPU, where a wider batch gains nothing and leaves the
    caches; at most `most` on a GPU."""
    size = max(1, most) if device.type == "cuda" else 1
    return [items[start : start + size] for start in range(0, len(items), size)]


def in_parts(
    split: Iterable[Sequence[Item]], work: Callable[[Sequence[Item]], Sequence[Output | Exception]]
) -> list[Output | Exception]:
    """What `work` gives for each part, one behind the other; each item is handed over as its part is done. A part is
    left when all its items were cancelled, and `Cancelled` stands for each of them; the others go on. When the batch is
    recalled, `Later` stands for those of the parts that were not begun; the first always is."""
    done: list[Output | Exception] = []
    for part in split:
        if done and _recalled.get()():
            done += [Later() for _ in part]
            continue
        try:
            with wanted_for(part):
                checkpoint()
                results = list(work(part))
        except Abandoned:
            results = [cancelled() for _ in part]
        for item, result in zip(part, results, strict=True):
            item.done(result)
        done += results
    return done


def cancelled() -> Cancelled:
    """What stands for a result that nobody wants."""
    return Cancelled("the job was cancelled while it ran")

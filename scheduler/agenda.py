"""A heap whose items' keys change under it: the one data structure of the scheduler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush, heapreplace
from typing import Generic, TypeVar

T = TypeVar("T")


class Agenda(Generic[T]):
    """Items by a key that is asked again when an item comes up, so a risen key costs nothing until then.

    Only when a key has become *less* must the item be added again. Equal keys come in turn: whoever was filed (or
    refiled) first. `add`, `discard` and `first` are O(log n), spread over the calls; the memory is O(items).
    """

    __slots__ = ("_heap", "_key", "_listed", "_turn")

    def __init__(self, key: Callable[[T], float]) -> None:
        self._key = key
        self._heap: list[tuple[float, int, T]] = []
        self._listed: dict[T, float] = {}  # the key of each item's valid entry; its other entries are leftovers
        self._turn = 0

    def add(self, item: T) -> None:
        """File an item, or file it anew because its key may have become less."""
        key = self._key(item)
        listed = self._listed.get(item)
        if listed is None or key < listed:
            self._listed[item] = key
            self._turn += 1
            heappush(self._heap, (key, self._turn, item))

    def discard(self, item: T) -> None:
        """Forget an item, if it is here."""
        if self._listed.pop(item, None) is not None and len(self._heap) > 2 * len(self._listed) + 32:
            self._heap = [entry for entry in self._heap if self._listed.get(entry[2]) == entry[0]]
            heapify(self._heap)

    def first(self) -> T | None:
        """The item with the least key."""
        heap, listed = self._heap, self._listed
        while heap:
            filed, _, item = heap[0]
            if listed.get(item) != filed:
                heappop(heap)
            elif (key := self._key(item)) > filed:
                listed[item] = key
                self._turn += 1
                heapreplace(heap, (key, self._turn, item))
            else:
                return item
        return None

    def due(self, now: float) -> T | None:
        """The first item if its key is at most `now`. Costs next to nothing when there is none."""
        heap = self._heap
        if not heap or heap[0][0] > now:
            return None
        item = self.first()
        return item if item is not None and self._key(item) <= now else None

    def least(self) -> float | None:
        """The least key."""
        item = self.first()
        return None if item is None else self._key(item)

    def check(self) -> None:
        """No key has become less without its item being filed anew."""
        assert all(filed <= self._key(item) for item, filed in self._listed.items()), "a key fell unnoticed"

    def __len__(self) -> int:
        return len(self._listed)

    def __iter__(self) -> Iterator[T]:
        return iter(self._listed)

    def __contains__(self, item: object) -> bool:
        return item in self._listed

"""Places in the queue that are kept for who was refused and told when to come back.

Whoever keeps to it is let in before those that come for the first time. A place is kept for `GRACE` seconds after its
time, and only for whom the admission can recognise: a caller is any text that is the same when it comes back.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import defaultdict

EARLY, GRACE = 0.1, 2.0  # seconds before and after its time in which a place can be taken


class Places:
    """`len` is how many are kept. Times are the caller's clock, in seconds, and never go back."""

    def __init__(self) -> None:
        self._of: defaultdict[str, list[float]] = defaultdict(list)
        self._callers: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._callers)

    def keep(self, caller: str, at: float) -> None:
        """A place for it, at that time."""
        insort(self._callers, (at, caller))
        insort(self._of[caller], at)

    def of(self, caller: str) -> int:
        """How many are kept for it."""
        return len(self._of.get(caller, ()))

    def has(self, caller: str, now: float) -> bool:
        """Whether the caller's time has come."""
        self._forget(now)
        own = self._of.get(caller)
        return bool(own and own[0] <= now + EARLY)

    def take(self, caller: str, now: float) -> None:
        """The caller's place is used, if it has one."""
        if self.has(caller, now):
            self._remove(self._of[caller][0], caller)

    def due(self, by: float) -> int:
        """How many are kept for times up to `by`."""
        return bisect_right(self._callers, (by, "\U0010ffff"))

    def _forget(self, now: float) -> None:
        while self._callers and self._callers[0][0] < now - GRACE:
            self._remove(*self._callers[0])

    def _remove(self, at: float, caller: str) -> None:
        del self._callers[bisect_left(self._callers, (at, caller))]
        self._of[caller].remove(at)
        if not self._of[caller]:
            del self._of[caller]

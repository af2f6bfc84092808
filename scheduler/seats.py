"""The seats of one worker: the stepped jobs that it runs side by side, forward by forward.

Each is a batch of one. Jobs share the device, so how long one took says little; what counts is its part of the time.
`share` is the virtual time of processor sharing: it grows by 1 / (jobs that step) per second, so that a job's part of
the device is by how much it grew while the job sat there and was not parked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from scheduler.work import Batch


class Seats:
    """Of a batch here, `parked`: it waits for others, `warm`: its model had been loaded when it came, `share`: its part
    of the device in seconds, once it has left.

    cost: of all that sit here. patience: seconds without a forward after which the worker counts as hung; 0 when nobody
    sits here. sign: when the worker last showed that it goes on. halted: nobody steps, since a model is loaded.
    """

    __slots__ = ("_at", "_held", "_parked", "_share", "cost", "halted", "patience", "sign")

    def __init__(self) -> None:
        self._held: dict[int, Batch] = {}
        self._share = self._at = 0.0
        self._parked = 0
        self.cost = self.patience = 0.0
        self.sign = -math.inf
        self.halted = False

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._held.values())

    def __contains__(self, batch: Batch) -> bool:
        return self._held.get(batch.number) is batch

    def get(self, number: int) -> Batch | None:
        """The batch of that number, if it sits here."""
        return self._held.get(number)

    def take(self, batch: Batch, now: float) -> None:
        """A job sits down."""
        self._pass(now)
        if not self._held:
            self.sign = now
        batch.share = -self._share
        self._held[batch.number] = batch
        self.cost += batch.cost
        self.patience = max(self.patience, batch.patience)

    def leave(self, batch: Batch, now: float) -> None:
        """Its job has left for good; `batch.share` is what it had of the device."""
        self._pass(now)
        del self._held[batch.number]
        if batch.parked:
            self._parked -= 1
        else:
            batch.share += self._share
        self.cost = sum(other.cost for other in self)  # anew, for sums of floats drift
        self.patience = max((other.patience for other in self), default=0.0)

    def park(self, batch: Batch, parked: bool, now: float) -> None:
        """It waits at its worker, or goes on."""
        if batch.parked is parked:
            return
        self._pass(now)
        batch.parked = parked
        batch.share += self._share if parked else -self._share
        self._parked += 1 if parked else -1

    def halt(self, halted: bool, now: float) -> None:
        """From now on nobody steps, or all go on."""
        self._pass(now)
        self.halted = halted
        self.sign = now

    def clear(self) -> None:
        """The worker is lost."""
        self.__init__()  # type: ignore[misc]

    def _pass(self, now: float) -> None:
        """Share out the time since the last change."""
        stepping = len(self._held) - self._parked
        if stepping and not self.halted:
            self._share += (now - self._at) / stepping
        self._at = now

    def check(self) -> None:
        """The sums are those of the jobs."""
        assert abs(self.cost - sum(batch.cost for batch in self)) < 1e-6
        assert self._parked == sum(batch.parked for batch in self)
        assert all(batch.size == 1 and batch.group.group.stepped and batch.started is not None for batch in self)

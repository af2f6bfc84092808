"""Batches at workers, and the shared memory that they use.

The rule that keeps a late or dying worker from writing into somebody else's image: no span of a batch, neither an
input nor the place of a result, is used for anything else before the worker has let go of the batch or is reaped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from core.errors import StorageFull
from core.request import Span
from engine.live import Live, output_size
from scheduler.commands import Dispatch
from workers.arena import Arena
from workers.messages import RunBatch, RunItem

Key = tuple[str, int, int]  # worker, incarnation, batch


@dataclass(slots=True)
class Flight:
    """A batch, or a stepped job, at a worker. `places` says where the results go of the jobs that it has not answered.
    """

    worker: str
    batch: int
    model: str
    group: str
    since: float
    size: int
    stepped: bool
    places: dict[str, tuple[Live, Span]]


class Flights:
    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._flights: dict[Key, Flight] = {}
        self.batches: Counter[str] = Counter()  # done so far, by worker
        self.images: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._flights)

    def at(self, worker: str) -> Iterator[Flight]:
        """The batches and stepped jobs of a worker, in the order in which they left."""
        return (flight for flight in self._flights.values() if flight.worker == worker)

    def take_off(self, order: Dispatch, lives: Sequence[Live], now: float) -> RunBatch:
        """Reserve the places of the results; the message that hands the batch out. Raises `StorageFull` when shared
        memory is used up, and then holds nothing."""
        places: dict[str, tuple[Live, Span]] = {}
        try:
            for live in lives:
                places[live.job.id] = live, self._arena.take(output_size(live))
        except StorageFull:
            for _, span in places.values():
                self._arena.give(span)
            raise
        group = order.tickets[0].group
        self._flights[order.worker, order.incarnation, order.batch] = Flight(
            order.worker, order.batch, group.model, str(group), now, len(lives), group.stepped, places
        )
        items = []
        for live in lives:
            live.flights += 1
            live.batch_size = len(lives)
            job = live.job
            items.append(
                RunItem(
                    job.id, job.request.images, job.request.params, job.request.output, places[job.id][1],
                    live.spec.canvas(job.request.frame, job.request.params), int(job.request.priority),
                    job.request.previews,
                )
            )
        return RunBatch(order.batch, group.model, tuple(items))

    def answered(self, key: Key, job: str) -> tuple[Live, Span] | None:
        """The job that a worker has answered and the span of its result, which is the caller's from now on. None when
        it was answered before or never asked."""
        flight = self._flights.get(key)
        if flight is None or job not in flight.places:
            return None
        live, span = flight.places.pop(job)
        self._let_go(live)
        self.images[key[0]] += 1
        return live, span

    def land(self, key: Key) -> None:
        """The worker holds nothing of the batch any more."""
        flight = self._flights.pop(key, None)
        if flight is None:
            return
        self.batches[key[0]] += 1
        for live, span in flight.places.values():
            self._arena.give(span)
            self._let_go(live)

    def crash(self, worker: str, incarnation: int) -> None:
        """That incarnation is reaped, with everything it held."""
        for key in [key for key in self._flights if key[:2] == (worker, incarnation)]:
            self.land(key)
            self.batches[worker] -= 1

    def ended(self, live: Live) -> None:
        """The job has ended: its inputs are given back as soon as no batch can read them."""
        if live.flights == 0:
            for span in live.spans:
                self._arena.give(span)
            live.spans.clear()

    def _let_go(self, live: Live) -> None:
        live.flights -= 1
        if live.job.state.ended:
            self.ended(live)

"""How a batch, or a stepped job, leaves for its worker: as soon as there is shared memory for its results.

When that is used up, batches wait in their order for others to land, for a while. What is too much even then is halved,
and only a single job that does not fit, or for which nothing is given back, fails.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

from core.errors import StorageFull
from core.states import State
from engine.endings import Endings
from engine.flights import Flights
from engine.live import Live
from engine.metrics import Metrics, resolution_class
from engine.register import Register
from scheduler.commands import Dispatch
from scheduler.events import BatchEnded, BatchOutOfMemory, Event, ItemEnded
from workers.arena import Arena
from workers.contract import WorkerPool

LOOK_EVERY = 0.02  # seconds


class Departures:
    """`tell(event)` tells the scheduler what became of a batch that did not leave. `patience` is in seconds, less than
    a batch may take before its worker counts as hung."""

    def __init__(
        self,
        register: Register,
        flights: Flights,
        endings: Endings,
        arena: Arena,
        pool: WorkerPool,
        metrics: Metrics,
        tell: Callable[[Event], None],
        patience: float,
    ) -> None:
        self._register, self._flights, self._endings = register, flights, endings
        self._arena, self._pool, self._metrics, self._tell = arena, pool, metrics, tell
        self._patience = patience
        self._waiting: deque[tuple[Dispatch, float]] = deque()

    def dispatch(self, order: Dispatch) -> None:
        """The jobs run from now on."""
        at = time.time()
        for ticket in order.tickets:
            self._register.move(self._register.live[ticket.id], State.RUNNING, at, device=order.worker)
        self._waiting.append((order, asyncio.get_running_loop().time()))
        if len(self._waiting) == 1:
            self._leave()

    def forget(self, worker: str, incarnation: int) -> None:
        """That worker is gone: what waits for it does not leave."""
        if self._waiting:
            gone = (worker, incarnation)
            self._waiting = deque(
                (order, since) for order, since in self._waiting if (order.worker, order.incarnation) != gone
            )

    def _leave(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            order, since = self._waiting.popleft()
            lives = [live for ticket in order.tickets if (live := self._wanted(ticket.id))]
            try:
                self._take_off(order, lives)
            except StorageFull as fault:
                ours = sum(len(live.spans) for live in lives)
                if self._arena.spans > ours and loop.time() - since < self._patience:
                    self._waiting.appendleft((order, since))
                    loop.call_later(LOOK_EVERY, self._leave)
                    return
                self._does_not_fit(order, lives, fault)

    def _wanted(self, job: str) -> Live | None:
        live = self._register.live.get(job)
        return None if live is None or live.concluding else live

    def _take_off(self, order: Dispatch, lives: list[Live]) -> None:
        if not lives:  # all cancelled meanwhile
            self._tell(BatchEnded(order.worker, order.incarnation, order.batch, 0.0))
            return
        batch = self._flights.take_off(order, lives, asyncio.get_running_loop().time())
        self._pool.send(order.worker, order.incarnation, batch)
        group = order.tickets[0].group
        if not group.stepped:
            self._metrics.batch_dispatched(batch.model, resolution_class(group.height * group.width), len(lives))

    def _does_not_fit(self, order: Dispatch, lives: list[Live], fault: StorageFull) -> None:
        place = order.worker, order.incarnation, order.batch
        if len(lives) > 1:
            self._tell(BatchOutOfMemory(*place, fault.message))
            return
        for live in lives:  # as if the worker had answered so
            self._tell(ItemEnded(*place, live.job.id, fault.info()))
            self._endings.without_result(live, State.FAILED, fault.info())
        self._tell(BatchEnded(*place, 0.0))

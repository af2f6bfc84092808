"""The workers: who is free, who is next, who will be free soon, who does not come back.

Round robin with load feedback. Idle workers stand in a ring; the first of the ring whose burden is within a margin of
the least gets the batch, the others it passed stand behind. A worker's burden is its measured pace, made worse by what
others do to its device. It is asked in a heap, so nothing is scanned.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from scheduler.agenda import Agenda
from scheduler.config import SchedulerConfig
from scheduler.work import Batch

SLOTS = 2  # one batch runs, one more may follow
LOOK = 16  # ring places looked at before the least burdened is taken instead
STALE = 300.0  # seconds after which an idle worker's pace is doubted, so that one passed over gets another try
TIGHT = 2.0  # a device without free memory counts as so much slower
OVERDUE = 2.0  # a batch this many times over its expected time says nothing about when its worker will be free


@dataclass(slots=True, eq=False)
class Worker:
    """One device's worker. What was learned about it outlives its incarnations.

    batches: what it holds, in the order in which it runs them; the first is running. loaded: the models of which this
    incarnation has ended a batch. closing: it gets nothing more (draining, or told to restart). hung: its `Restart` has
    been asked for. freed: when it last became idle. pace: seconds it takes for what takes a device of pace 1 one
    second, None until measured. doubted: the pace is unknown or old, and worth another try. utilisation: 0-1, by others
    than us. crowded: its device has next to no free memory. done, items: batches and jobs it has ended.
    """

    name: str
    incarnation: int = -1
    alive: bool = False
    closing: bool = False
    hung: bool = False
    batches: deque[Batch] = field(default_factory=deque)
    loaded: set[str] = field(default_factory=set)
    pace: float | None = None
    doubted: bool = True
    measured: float = -math.inf
    freed: float = -math.inf
    utilisation: float = 0.0
    crowded: bool = False
    done: int = 0
    items: int = 0

    @property
    def open(self) -> bool:
        """It may get another batch. One that holds a suspect gets none beside it."""
        held = self.batches
        return self.alive and not self.closing and (not held or (len(held) < SLOTS and not held[0].alone))

    @property
    def burden(self) -> float:
        """How long a piece of work takes here, relative to others; 0 while doubted, so that it gets a try."""
        if self.doubted or self.pace is None:
            return 0.0
        return self.pace / (1.0 - min(self.utilisation, 0.9)) * (TIGHT if self.crowded else 1.0)

    @property
    def ends(self) -> float:
        """When its running batch should end; infinite when nothing like it was ever measured."""
        return self.batches[0].ends

    @property
    def hangs(self) -> float:
        """From when on its running batch counts as hung."""
        return self.batches[0].hangs

    @property
    def state(self) -> Literal["ready", "closing", "hung", "dead"]:
        return "dead" if not self.alive else "hung" if self.hung else "closing" if self.closing else "ready"

    def __repr__(self) -> str:
        held = "+".join(str(batch.size) for batch in self.batches) or "idle"
        pace = "?" if self.pace is None else f"{self.pace:.2f}"
        return f"{self.name}#{self.incarnation} {self.state} {held} pace {pace}"


class Roster:
    """All workers by name, each filed where its state belongs. `file` it again after every change."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.workers: dict[str, Worker] = {}
        self._margin = config.margin
        self._ring: OrderedDict[Worker, None] = OrderedDict()
        self._idle: Agenda[Worker] = Agenda(lambda worker: worker.burden)
        self._ending: Agenda[Worker] = Agenda(lambda worker: worker.ends)
        self._running: Agenda[Worker] = Agenda(lambda worker: worker.hangs)

    def worker(self, name: str) -> Worker:
        """The worker of that name; a new one if it was never heard of."""
        worker = self.workers.get(name)
        if worker is None:
            worker = self.workers[name] = Worker(name)
        return worker

    def holding(self, name: str, incarnation: int, number: int) -> Batch | None:
        """The batch of that number, if that very incarnation holds it."""
        worker = self.workers.get(name)
        if worker is None or worker.incarnation != incarnation:
            return None
        return next((batch for batch in worker.batches if batch.number == number), None)

    def file(self, worker: Worker) -> None:
        """Put it among the idle, those that may get one more batch, and those that are watched, as it is now."""
        idle = worker.open and not worker.batches
        if idle:
            if worker not in self._ring:
                self._ring[worker] = None
            self._idle.add(worker)
        elif worker in self._ring:
            del self._ring[worker]
            self._idle.discard(worker)
        if worker.open and worker.batches:
            self._ending.add(worker)
        else:
            self._ending.discard(worker)
        if worker.batches and not worker.hung:
            self._running.add(worker)
        else:
            self._running.discard(worker)

    @property
    def idle(self) -> int:
        """How many could start a batch at once."""
        return len(self._ring)

    @property
    def open(self) -> int:
        """How many may get another batch, now or when theirs has ended."""
        return len(self._ring) + len(self._ending)

    def next_idle(self) -> Worker | None:
        """The idle worker whose turn it is."""
        best = self._idle.first()
        if best is None:
            return None
        limit = best.burden * self._margin
        for _ in range(min(len(self._ring), LOOK)):
            worker = next(iter(self._ring))
            if worker.burden <= limit:
                return worker
            self._ring.move_to_end(worker)
        return best

    def next_ending(self, now: float) -> Worker | None:
        """The open worker whose running batch should end first. One far overdue is no longer believed in."""
        while (worker := self._ending.first()) is not None:
            batch = worker.batches[0]
            if batch.expected is None:
                return None
            if now <= batch.ends + OVERDUE * batch.expected:
                return worker
            self._ending.discard(worker)
        return None

    def next_end(self) -> float:
        """When the first of the busy open workers should be free; infinite when unknown."""
        worker = self._ending.first()
        return math.inf if worker is None else worker.ends

    def hung(self, now: float) -> Worker | None:
        """A worker whose running batch has passed its time."""
        return self._running.due(now)

    def next_hang(self) -> float | None:
        """When the next batch would count as hung."""
        return self._running.least()

    def doubt(self, worker: Worker, now: float) -> None:
        """What is known of an idle worker ages: passed over for long, it is tried again."""
        if not worker.batches and now - worker.measured > STALE:
            worker.doubted = True
        self.file(worker)

    def batches(self) -> Iterator[Batch]:
        """All that is in flight."""
        return (batch for worker in self.workers.values() for batch in worker.batches)

    def check(self) -> None:
        """Every worker is filed where its state belongs."""
        for worker in self.workers.values():
            held = worker.batches
            assert len(held) <= SLOTS, f"{worker} holds too much"
            assert worker.alive or not held, f"{worker} is dead and holds work"
            assert (worker in self._ring) == (worker in self._idle) == (worker.open and not held), f"{worker} idle?"
            assert (worker in self._running) == (bool(held) and not worker.hung), f"{worker} watched?"
            assert worker not in self._ending or (worker.open and held), f"{worker} open?"
            assert all((batch.started is not None) == (batch is held[0]) for batch in held), f"{worker} runs what?"
            assert len(held) < 2 or not any(batch.alone for batch in held), f"{worker} has company for a suspect"
            assert all(batch.worker is worker for batch in held)

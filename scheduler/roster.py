"""The workers: who is free, who is next, who will be free soon, who does not come back.

Round robin with load feedback. Idle workers stand in a ring; the first of the ring whose burden is within a margin of
the least gets the batch, the others it passed stand behind. A worker's burden is its measured pace, made worse by what
others do to its device. A stepped job goes where a seat is free and the least work is held, by cost and pace. Both are
asked in heaps, so nothing is scanned.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from scheduler.agenda import Agenda
from scheduler.config import SchedulerConfig
from scheduler.seats import Seats
from scheduler.work import Batch

SLOTS = 2  # one batch runs, one more may follow
LOOK = 16  # ring places looked at before the least burdened is taken instead
STALE = 300.0  # seconds after which an idle worker's pace is doubted, so that one passed over gets another try
TIGHT = 2.0  # a device without free memory counts as so much slower
BESIDE = 2.0  # so does, for a batch, one that steps: the two take turns
OVERDUE = 2.0  # a batch this many times over its expected time says nothing about when its worker will be free


@dataclass(slots=True, eq=False)
class Worker:
    """One device's worker. What was learned about it outlives its incarnations.

    batches: what it holds, in the order in which it runs them; the first is running. seats: the stepped jobs that it
    runs beside them. loading: the batch for which it loads a model now, and by when it must be done. stuck: the batch
    that alone is to blame for its restart. loaded: the models of which this incarnation has ended a batch. closing: it
    gets nothing more (draining, or told to restart). hung: its `Restart` has been asked for. kept: it gets nothing more
    until it is free for a suspect. freed: when it last became idle. pace: seconds it takes for what takes a device of
    pace 1 one second, None until measured. doubted: the pace is unknown or old, and worth another try. utilisation:
    0-1, by others than us. crowded: its device has next to no free memory. done, items: batches and jobs it has ended.
    """

    name: str
    incarnation: int = -1
    alive: bool = False
    closing: bool = False
    hung: bool = False
    kept: bool = False
    batches: deque[Batch] = field(default_factory=deque)
    seats: Seats = field(default_factory=Seats)
    loading: tuple[Batch, float] | None = None
    stuck: Batch | None = None
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
    def empty(self) -> bool:
        """It holds nothing."""
        return not self.batches and not self.seats

    @property
    def open(self) -> bool:
        """It may get more. One that holds a suspect gets nothing beside it."""
        if not self.alive or self.closing or self.kept:
            return False
        first = self.batches[0] if self.batches else next(iter(self.seats), None)
        return first is None or not first.alone

    @property
    def burden(self) -> float:
        """How long a batch takes here, relative to others; 0 while doubted, so that it gets a try."""
        if self.doubted or self.pace is None:
            return 0.0
        return self.pace * self._strain * (BESIDE if self.seats else 1.0)

    @property
    def load(self) -> float:
        """How long what it holds and a little more would take, relative to others."""
        pace = 1.0 if self.doubted or self.pace is None else self.pace
        return (1.0 + self.seats.cost + sum(batch.cost for batch in self.batches)) * pace * self._strain

    @property
    def _strain(self) -> float:
        """How much slower it is for what others do to its device."""
        return (TIGHT if self.crowded else 1.0) / (1.0 - min(self.utilisation, 0.9))

    @property
    def ends(self) -> float:
        """When its running batch should end; infinite when nothing like it was ever measured."""
        return self.batches[0].ends

    @property
    def hangs(self) -> float:
        """From when on it counts as hung: a batch does not end, or its seats make no step. Each may wait for the other,
        for a forward or a batch at the most, and all of them for a model that is loaded. Without seats, a batch that
        nobody wants ends sooner."""
        if self.loading is not None:
            return self.loading[1]
        limit = self.batch_hangs
        if self.seats:
            batch = self.batches[0].patience if self.batches else 0.0
            return min(limit, self.seats.sign + self.seats.patience + batch)
        return min(limit, self.batches[0].leaves) if self.batches else limit

    @property
    def batch_hangs(self) -> float:
        """The same of its running batch alone; infinite when there is none."""
        if not self.batches:
            return math.inf
        return self.batches[0].hangs + max(self.batches[0].delay, self.seats.patience)

    def forsaken(self, now: float) -> bool:
        """It does not hang yet, but runs a batch that nobody wants, and does not leave it."""
        return bool(self.batches) and not self.seats and self.batches[0].leaves <= now < self.batch_hangs

    @property
    def state(self) -> Literal["ready", "closing", "hung", "dead"]:
        return "dead" if not self.alive else "hung" if self.hung else "closing" if self.closing else "ready"

    def __repr__(self) -> str:
        held = "+".join(str(batch.size) for batch in self.batches) or "idle"
        seated = f" {len(self.seats)} seated" if self.seats else ""
        pace = "?" if self.pace is None else f"{self.pace:.2f}"
        return f"{self.name}#{self.incarnation} {self.state} {held}{seated} pace {pace}"


class Roster:
    """All workers by name, each filed where its state belongs. `file` it again after every change."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.workers: dict[str, Worker] = {}
        self._margin = config.margin
        self._seats, self._all_seats = config.seats, config.seats + config.urgent_seats
        self._ring: OrderedDict[Worker, None] = OrderedDict()
        self._idle: Agenda[Worker] = Agenda(lambda worker: worker.burden)
        self._empty: Agenda[Worker] = Agenda(lambda worker: worker.burden)
        self._seated: Agenda[Worker] = Agenda(lambda worker: worker.load)
        self._urgent: Agenda[Worker] = Agenda(lambda worker: worker.load)
        self._kept: Worker | None = None
        self._ending: Agenda[Worker] = Agenda(lambda worker: worker.ends)
        self._longest: Agenda[Worker] = Agenda(lambda worker: -worker.ends)
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
        held = next((batch for batch in worker.batches if batch.number == number), None)
        return held or worker.seats.get(number)

    def file(self, worker: Worker) -> None:
        """Put it among the idle, those that may get more, and those that are watched, as it is now."""
        ready, busy, seated = worker.open, len(worker.batches), len(worker.seats)
        if ready and not busy:
            if worker not in self._ring:
                self._ring[worker] = None
            self._idle.add(worker)
        elif worker in self._ring:
            del self._ring[worker]
            self._idle.discard(worker)
        _list(self._empty, worker, ready and not busy and not seated)
        _list(self._ending, worker, ready and 0 < busy < SLOTS)
        _list(self._seated, worker, ready and seated < self._seats)
        _list(self._urgent, worker, ready and seated < self._all_seats)
        _list(self._longest, worker, worker.alive and busy > 0 and not worker.hung)
        _list(self._running, worker, bool(busy or seated) and not worker.hung)

    @property
    def living(self) -> int:
        """How many have a process that takes batches."""
        return sum(worker.alive for worker in self.workers.values())

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

    def next_seat(self, *, urgent: bool = False) -> Worker | None:
        """The worker with a free seat that holds the least work. Some seats are for urgent jobs alone."""
        return (self._urgent if urgent else self._seated).first()

    def next_empty(self) -> Worker | None:
        """A worker for a suspect, which runs alone: one that holds nothing."""
        kept = self._kept
        if kept is not None and kept.alive and not kept.closing and kept.empty:
            return kept
        return self._empty.first()

    def keep_free(self, wanted: bool) -> None:
        """While a suspect waits, one worker gets nothing more, so that it comes free."""
        kept = self._kept
        if kept is not None and not (wanted and kept.alive and not kept.closing):
            self._kept, kept.kept = None, False
            self.file(kept)
        if wanted and self._kept is None and (worker := self._urgent.first()) is not None:
            self._kept, worker.kept = worker, True
            self.file(worker)

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

    def next_recall(self) -> Worker | None:
        """The worker that should hold what it has for the longest, if there is more to it than what it computes now.
        Nothing is asked back twice, nor from a suspect or an urgent job."""
        while (worker := self._longest.first()) is not None:
            held = worker.batches
            if sum(len(batch.jobs) for batch in held) > 1 and not any(
                batch.recalled or batch.alone or batch.urgent for batch in held
            ):
                return worker
            self._longest.discard(worker)
        return None

    def next_end(self) -> float:
        """When the first of the busy open workers should be free; infinite when unknown."""
        worker = self._ending.first()
        return math.inf if worker is None else worker.ends

    def hung(self, now: float) -> Worker | None:
        """A worker that has shown nothing for longer than it may."""
        return self._running.due(now)

    def next_hang(self) -> float | None:
        """When the next worker would count as hung."""
        return self._running.least()

    def doubt(self, worker: Worker, now: float) -> None:
        """What is known of an idle worker ages: passed over for long, it is tried again."""
        if worker.empty and now - worker.measured > STALE:
            worker.doubted = True
        self.file(worker)

    def batches(self) -> Iterator[Batch]:
        """All that is in flight."""
        return (batch for worker in self.workers.values() for batch in (*worker.batches, *worker.seats))

    def check(self) -> None:
        """Every worker is filed where its state belongs."""
        for agenda in (self._idle, self._empty, self._seated, self._urgent, self._ending, self._longest, self._running):
            agenda.check()
        for worker in self.workers.values():
            held, seats, ready = worker.batches, worker.seats, worker.open
            seats.check()
            assert len(held) <= SLOTS and len(seats) <= self._all_seats, f"{worker} holds too much"
            assert worker.alive or worker.empty, f"{worker} is dead and holds work"
            assert (worker in self._ring) == (worker in self._idle) == (ready and not held), f"{worker} idle?"
            assert (worker in self._empty) == (ready and worker.empty), f"{worker} empty?"
            assert (worker in self._seated) == (ready and len(seats) < self._seats), f"{worker} has seats?"
            assert (worker in self._urgent) == (ready and len(seats) < self._all_seats), f"{worker} has urgent seats?"
            assert (worker in self._running) == (not worker.empty and not worker.hung), f"{worker} watched?"
            assert worker not in self._ending or (ready and held), f"{worker} open?"
            assert worker.kept == (worker is self._kept), f"{worker} kept?"
            assert all((batch.started is not None) == (batch is held[0]) for batch in held), f"{worker} runs what?"
            here = [*held, *seats]
            assert len(here) < 2 or not any(batch.alone for batch in here), f"{worker} has company for a suspect"
            assert all(batch.worker is worker for batch in here)


def _list(agenda: Agenda[Worker], worker: Worker, belongs: bool) -> None:
    if belongs:
        agenda.add(worker)
    else:
        agenda.discard(worker)

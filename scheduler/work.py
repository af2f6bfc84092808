"""What the scheduler remembers of a job and of a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from core.request import Priority
from core.ticket import Ticket

if TYPE_CHECKING:
    from scheduler.backlog import GroupQueue, Lane
    from scheduler.roster import Worker

SUSPICIOUS, GUILTY = 3, 10  # so many workers in a row that others killed ran the job, and none was killed that did not
LEAVE = 10.0  # seconds that a batch has to end when nobody wants it any more
NOTES = 32  # a job's story keeps its beginning and its last so many lines


@dataclass(slots=True, eq=False)
class Job:
    """One living ticket: it waits in a lane, or among the suspects (both None), or runs in a batch.

    number: its place in the order of arrival; negative when it goes before all that arrive. deaths: workers that died
    while they ran it. doubt: that happened once while it ran alone, for want of memory that others may have taken.
    strikes: workers in a row that were killed from outside while they ran it; struck: which one was the last.
    charged: its cost has been taken from its tenant's share (once, however often it is retried).
    """

    ticket: Ticket
    number: int
    since: float
    lane: Lane | None = None
    batch: Batch | None = None
    deaths: int = 0
    doubt: bool = False
    strikes: int = 0
    struck: int = 0
    charged: bool = False
    ended: bool = False
    notes: tuple[tuple[float, str], ...] = ()

    @property
    def suspect(self) -> bool:
        """Two workers died under it, or whoever kills workers from outside meets it each time: it runs alone."""
        return self.deaths >= 2 or self.strikes >= SUSPICIOUS

    def strike(self, number: int) -> None:
        """The `number`-th worker that was killed from outside ran it."""
        self.strikes = self.strikes + 1 if self.struck == number - 1 else 1
        self.struck = number

    def note(self, now: float, text: str) -> None:
        """One more line of its story."""
        self.notes = (*self.notes[-NOTES:], (now, text))

    def story(self) -> list[str]:
        """What happened to it, in order, with seconds since it came."""
        ticket = self.ticket
        head = f"+0.000 submitted at {self.since:.3f}: P{int(ticket.priority)} {ticket.group} cost {ticket.cost:g}"
        return [head, *(f"+{now - self.since:.3f} {text}" for now, text in self.notes)]

    def __repr__(self) -> str:
        where = "ended" if self.ended else "waits" if self.batch is None else f"in batch {self.batch.number}"
        return f"<Job {self.ticket.id} {where}>"


@dataclass(slots=True, eq=False)
class Batch:
    """Jobs of one group at one worker; a stepped job is a batch of its own, and has a seat.

    jobs: those that the worker has not answered yet, cancelled ones among them. expected: seconds it should take, None
    when nothing like it was measured yet. patience: seconds until it counts as hung; those for which it had to wait
    for a forward come on top, at most `delay` for those of stepped jobs that have left since. sign: when it was last
    said that it goes on; the seconds count from then. gap: the longest without a sign. unwanted: since when all its
    unanswered jobs have ended some other way. alone: it holds a suspect, and nothing is sent beside it. started: when
    it became its worker's running batch, or got its seat. spoilt: a job of it failed or was revoked, so that its time
    says nothing about others. recalled: what it has not begun was asked back. parked, warm, share: see `Seats`.
    """

    number: int
    worker: Worker
    group: GroupQueue
    jobs: dict[str, Job]
    size: int
    cost: float
    expected: float | None
    patience: float
    delay: float = 0.0
    alone: bool = False
    started: float | None = None
    sign: float = -math.inf
    gap: float = 0.0
    unwanted: float = math.inf
    spoilt: bool = False
    recalled: bool = False
    parked: bool = False
    warm: bool = False
    share: float = 0.0

    @property
    def urgent(self) -> bool:
        """A P0 job is in it."""
        return any(job.ticket.priority == Priority.URGENT for job in self.jobs.values())

    def give_back(self, names: Sequence[str]) -> list[Job]:
        """It has never had these jobs: those of them that live."""
        jobs = [job for name in names if (job := self.jobs.pop(name, None)) is not None]
        self.size -= len(jobs)
        self.cost -= sum(job.ticket.cost for job in jobs)
        self.group.running -= len(jobs)
        return [job for job in jobs if not job.ended]

    @property
    def ends(self) -> float:
        """When it should end; infinite while it waits behind another, or unknown."""
        return math.inf if self.started is None or self.expected is None else self.started + self.expected

    @property
    def hangs(self) -> float:
        """From when on it counts as hung."""
        return math.inf if self.started is None else max(self.started, self.sign) + self.patience

    def signed(self, now: float) -> None:
        """It shows that it goes on, or ends."""
        if self.started is not None:
            self.gap = max(self.gap, now - max(self.started, self.sign))
        self.sign = now

    @property
    def leaves(self) -> float:
        """From when on it should have ended because nobody wants it; infinite while somebody does."""
        return math.inf if self.started is None else max(self.started, self.sign, self.unwanted) + LEAVE

    def __repr__(self) -> str:
        return f"<Batch {self.number} {self.group.group} x{self.size} on {self.worker.name}>"

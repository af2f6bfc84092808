"""What the scheduler wants done. The engine performs commands in order; what happens comes back as events."""

from __future__ import annotations

from dataclasses import dataclass

from core.errors import ErrorInfo
from core.states import State
from core.ticket import Ticket


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Hand these tickets (one group, at most its limit) to that incarnation as batch number `batch`. A stepped job goes
    alone, as a batch of one, beside whatever that worker runs."""

    worker: str
    incarnation: int
    batch: int
    tickets: tuple[Ticket, ...]


@dataclass(frozen=True, slots=True)
class Revoke:
    """The job is in flight and no longer wanted: tell the worker to drop it when it can. Its `Finish` comes beside it;
    the slot stays taken until the batch ends."""

    worker: str
    incarnation: int
    batch: int
    job: str


@dataclass(frozen=True, slots=True)
class Recall:
    """What that batch has not begun is wanted back: the worker ends it where it can, and `BatchEnded` tells which jobs
    it has not begun. A batch that cannot be left between two of its jobs ends as it would have."""

    worker: str
    incarnation: int
    batch: int


@dataclass(frozen=True, slots=True)
class Requeue:
    """The job was in flight and waits again (its worker was lost, its batch was halved, or it was recalled)."""

    job: str
    why: str


@dataclass(frozen=True, slots=True)
class Finish:
    """The scheduler ended the job: cancelled, expired, or failed (poisonous_job, out_of_memory)."""

    job: str
    state: State
    error: ErrorInfo


@dataclass(frozen=True, slots=True)
class Restart:
    """That incarnation does not come back from its batch (hang): kill it. `WorkerLost` follows."""

    worker: str
    incarnation: int
    why: str


Command = Dispatch | Revoke | Recall | Requeue | Finish | Restart

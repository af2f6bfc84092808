"""What the scheduler is told. One frozen class per thing that happens; `Scheduler.handle(event, now) -> commands`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from core.errors import ErrorInfo
from core.ticket import Ticket


@dataclass(frozen=True, slots=True)
class Submitted:
    """A job was admitted and waits. `front`: it was running before a restart and goes first in its queue."""

    ticket: Ticket
    front: bool = False


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Somebody no longer wants the job. Unknown or ended ids are ignored."""

    job: str


@dataclass(frozen=True, slots=True)
class ItemEnded:
    """One job of a batch left the worker for good: its result is stored, or it failed for its own fault
    (`error`), or the worker dropped it after a `Revoke`."""

    worker: str
    incarnation: int
    batch: int
    job: str
    error: ErrorInfo | None = None


@dataclass(frozen=True, slots=True)
class BatchEnded:
    """The worker is done with a batch: its slot is free. `seconds` is the time the batch took in the device loop. Every
    job of it has had its `ItemEnded` before (jobs that have not are put back to the front: the worker lied), but those
    `returned` after a `Recall`, which it has not begun."""

    worker: str
    incarnation: int
    batch: int
    seconds: float
    returned: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BatchOutOfMemory:
    """The device had no room for the batch; nothing of it ran. The slot is free."""

    worker: str
    incarnation: int
    batch: int
    message: str = ""


@dataclass(frozen=True, slots=True)
class Stepped:
    """That incarnation has ended a forward of its stepped jobs: it does not hang."""

    worker: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class Loading:
    """That incarnation has begun to load a model for a batch that it holds, or (`done`) is through with it, well or
    not. Nothing else runs there meanwhile, and no time of it counts for anybody."""

    worker: str
    incarnation: int
    batch: int
    done: bool = False


@dataclass(frozen=True, slots=True)
class Alive:
    """What that incarnation computes or encodes of that batch goes on; it may show nothing more for `patience` seconds,
    where that is more than is known of it."""

    worker: str
    incarnation: int
    batch: int
    patience: float = 0.0


@dataclass(frozen=True, slots=True)
class Stuck:
    """A stepped job's image keeps a thread of that incarnation busy for longer than the job's timeout, beside others
    that step."""

    worker: str
    incarnation: int
    batch: int


@dataclass(frozen=True, slots=True)
class Parked:
    """A stepped job waits at its worker for others, its state kept (`parked`), or goes on."""

    worker: str
    incarnation: int
    job: str
    parked: bool


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """A new incarnation of a worker has loaded and warmed up and takes batches."""

    worker: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """That incarnation is dead (and reaped). Everything it held goes back to the front of its queue.

    `blame`: "running" when what ran is the cause (the deaths of its jobs are counted), "memory" when the kernel killed
    it for memory that others may have taken as well (a job that runs alone then gets a second chance), "outside" when
    somebody else killed or stopped it (nobody is blamed, unless it is the same job again and again), "none" when it
    was stopped on purpose."""

    worker: str
    incarnation: int
    cause: str
    blame: Literal["running", "memory", "outside", "none"] = "running"


@dataclass(frozen=True, slots=True)
class WorkerDraining:
    """Send nothing more to that worker; what it holds may finish."""

    worker: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class LoadReport:
    """Load feedback: the device's utilisation 0-1 by others than us (None: unknown) and free memory, bytes."""

    worker: str
    utilisation: float | None = None
    memory_free: int | None = None
    memory_total: int | None = None


@dataclass(frozen=True, slots=True)
class Drain:
    """The server is going away: dispatch nothing more, let running batches finish."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Nothing happened but time (the engine wakes at `next_deadline()`)."""


Event = (
    Submitted | Cancelled | ItemEnded | BatchEnded | BatchOutOfMemory | Loading | Stepped | Alive | Stuck | Parked
    | WorkerReady | WorkerLost | WorkerDraining | LoadReport | Drain | Tick
)

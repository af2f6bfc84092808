"""What the scheduler sees of a job: never pixels."""

from __future__ import annotations

from dataclasses import dataclass

from core.request import Priority


@dataclass(frozen=True, slots=True)
class Group:
    """What must be equal for jobs to share a batch.

    `height` and `width` are padded pixels. `fixed` holds every parameter that the network takes once per batch, as
    (name, value) pairs in the spec's order. `limit` is the most items a batch of this group may have anywhere: the
    least of the model's own maximum and the cap of the resolution. `stepped`: its jobs form no batches here; each takes
    a seat of a worker and shares single forwards with whoever else sits there.
    """

    model: str
    version: str
    height: int
    width: int
    dtype: str = "float32"
    fixed: tuple[tuple[str, object], ...] = ()
    limit: int = 1
    stepped: bool = False

    def __str__(self) -> str:
        extra = "".join(f" {name}={value}" for name, value in self.fixed)
        return f"{self.model}:{self.version} {self.width}x{self.height}{extra}"


@dataclass(frozen=True, slots=True)
class Ticket:
    """One job as the scheduler knows it. All times are seconds on the engine's monotonic clock.

    `cost` is relative work (1.0 = a 512x512 image on this model's own scale of work); `size` the bytes it holds;
    `timeout` the most seconds one batch of this model may run, or one forward of a stepped one.
    """

    id: str
    group: Group
    cost: float = 1.0
    priority: Priority = Priority.NORMAL
    tenant: str = "anonymous"
    deadline: float | None = None
    size: int = 0
    timeout: float = 600.0

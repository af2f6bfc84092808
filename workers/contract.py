"""What the engine sees of a pool of workers: this much, and no process behind it. Two classes keep it: `pool.Pool`
(real processes) and `memory_pool.MemoryPool` (its twin in memory)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from workers.messages import FromWorker, ToWorker


@dataclass(frozen=True, slots=True)
class WorkerUp:
    """That incarnation is loaded, warm and takes batches. `refused`: by name, why it lacks some of the models."""

    worker: str
    incarnation: int
    refused: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class WorkerDown:
    """That incarnation is dead and reaped: it can touch no memory any more. `cause` in words, `kind` for counting and
    for the blame: what was stopped on purpose or killed by somebody else is not held against the jobs that it ran, and
    what the kernel killed for its memory only half."""

    worker: str
    incarnation: int
    cause: str
    kind: Literal["died", "killed", "memory", "hung", "boot_failed", "stopped"] = "died"


@dataclass(frozen=True, slots=True)
class Said:
    """A message about batches, from a living incarnation."""

    worker: str
    incarnation: int
    message: FromWorker


PoolEvent = WorkerUp | WorkerDown | Said


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One wanted device as status answers show it. `state`: starting | ready | restarting | given_up | draining |
    stopped. `facts` is what the child told when it was ready."""

    worker: str
    index: int
    kind: str
    name: str
    state: str
    detail: str
    pid: int | None
    alive: bool
    incarnation: int
    restarts: int
    progress: float
    facts: Mapping[str, Any] = field(default_factory=dict)


class WorkerPool(Protocol):
    async def start(self, listener: Callable[[PoolEvent], None]) -> None:
        """Begin to start workers; returns at once. What happens is told to `listener`, on the event loop."""

    def send(self, worker: str, incarnation: int, *messages: ToWorker) -> None:
        """To an incarnation that is gone it is a no-op."""

    def kill(self, worker: str, incarnation: int, why: str) -> None:
        """SIGKILL; `WorkerDown` follows when it is reaped, and a new incarnation after that."""

    def retire(self, worker: str, incarnation: int) -> None:
        """Ask one to finish what it holds and go; `WorkerDown` of kind stopped follows, then a new incarnation."""

    def revive(self) -> list[str]:
        """Start the devices that were given up, and say which."""

    async def stop(self, grace: float) -> None:
        """Ask all to finish and go; after `grace` seconds kill those that have not."""

    def view(self) -> list[WorkerView]:
        """All wanted devices, in their order."""

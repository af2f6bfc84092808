"""Decides which worker processes should be started, and when: reconciliation of wanted devices with live ones.

Pure, like the scheduler: time is an argument, starting and killing are somebody else's work. What it knows:
"cannot boot" (the child says so, or exits by itself before it is ready) differs from "died" (it was ready, or somebody
killed it). Only the first counts towards giving a device up; both back off exponentially, and a worker that has
finished a batch since has a clean slate, so that its first restart comes at once. What somebody else kills teaches
nothing and starts again at once. A device that was given up is tried again after a long pause, or when asked to.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum


class WorkerState(StrEnum):
    WAITING = "waiting"    # no process; starts at `at`
    STARTING = "starting"  # the process loads and warms up; must be ready by `at`
    READY = "ready"        # takes batches
    DYING = "dying"        # told to go or killed; not reaped yet
    STOPPED = "stopped"    # ended on purpose, not to be started again
    GIVEN_UP = "given_up"  # failed to boot too often; tried once more at `at`


DORMANT = (WorkerState.WAITING, WorkerState.GIVEN_UP)


@dataclass(slots=True)
class Life:
    """One wanted device: its present incarnation and what its past ones have taught."""

    worker: str
    state: WorkerState = WorkerState.WAITING
    incarnation: int = 0
    at: float = 0.0
    restarts: int = 0
    boot_failures: int = 0
    quick_deaths: int = 0
    served: bool = False  # this incarnation was ready
    detail: str = "not started yet"


@dataclass(frozen=True, slots=True)
class Start:
    worker: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class Kill:
    worker: str
    incarnation: int
    why: str


@dataclass(frozen=True, slots=True)
class SupervisorConfig:
    """All in seconds. Each part of a boot (a model, a shape that is compiled) may take `boot_timeout`; the n-th failure
    in a row waits `backoff` * 2^(n-1), at most `backoff_max`; after `give_up_after` boots in a row that failed by
    themselves a device is given up, and tried once every `revive_after`."""

    boot_timeout: float = 600.0
    backoff: float = 0.5
    backoff_max: float = 30.0
    give_up_after: int = 5
    revive_after: float = 300.0


@dataclass(slots=True)
class Supervisor:
    config: SupervisorConfig
    lives: dict[str, Life] = field(default_factory=dict)
    draining: bool = False

    @classmethod
    def of(cls, workers: Iterable[str], config: SupervisorConfig) -> Supervisor:
        return cls(config, {worker: Life(worker) for worker in workers})

    def tick(self, now: float) -> list[Start | Kill]:
        """What has to be done now."""
        actions: list[Start | Kill] = []
        for life in self.lives.values():
            if life.state in DORMANT and now >= life.at and not self.draining:
                life.incarnation += 1
                life.restarts = life.incarnation - 1
                life.state, life.at = WorkerState.STARTING, now + self.config.boot_timeout
                life.detail = "process started"
                actions.append(Start(life.worker, life.incarnation))
            elif life.state is WorkerState.STARTING and now >= life.at:
                life.boot_failures += 1
                why = f"did not become ready within {self.config.boot_timeout:g} s"
                life.state, life.detail = WorkerState.DYING, why
                actions.append(Kill(life.worker, life.incarnation, why))
        return actions

    def next_at(self) -> float | None:
        """When `tick` next has something to do; None when only an event can change anything."""
        waiting = (WorkerState.STARTING,) if self.draining else (*DORMANT, WorkerState.STARTING)
        return min((life.at for life in self.lives.values() if life.state in waiting), default=None)

    def booting(self, worker: str, now: float) -> None:
        """The incarnation has come to the next part of its boot."""
        life = self.lives[worker]
        if life.state is WorkerState.STARTING:
            life.at = now + self.config.boot_timeout

    def ready(self, worker: str) -> None:
        """The incarnation has loaded and warmed up."""
        life = self.lives[worker]
        life.state, life.detail, life.boot_failures, life.served = WorkerState.READY, "ready", 0, True

    def worked(self, worker: str) -> None:
        """It finished a batch: whatever happened before is forgiven."""
        self.lives[worker].quick_deaths = 0

    def dying(self, worker: str, why: str) -> None:
        """Its process is being ended by us."""
        life = self.lives[worker]
        if life.state in (WorkerState.STARTING, WorkerState.READY):
            life.state, life.detail = WorkerState.DYING, why

    def exited(
        self, worker: str, now: float, why: str, *, failed_to_boot: bool = False, on_purpose: bool = False,
        outside: bool = False,
    ) -> None:
        """The process is dead and reaped. `failed_to_boot`: it ended by its own doing before it was ready.
        `on_purpose`: it was asked to make place for its successor, which starts at once. `outside`: somebody else
        killed it; one that was still loading starts again after the shortest pause."""
        life = self.lives[worker]
        loading, life.served = not life.served, False
        if self.draining:
            life.state, life.detail = WorkerState.STOPPED, why
            return
        life.detail = why
        if on_purpose:
            life.state, life.at = WorkerState.WAITING, now
            return
        if outside:
            life.state, life.at = WorkerState.WAITING, now + (self.config.backoff if loading else 0.0)
            return
        life.boot_failures += failed_to_boot
        if life.boot_failures >= self.config.give_up_after:
            life.state, life.at = WorkerState.GIVEN_UP, now + self.config.revive_after
            return
        failures = life.boot_failures or life.quick_deaths
        life.quick_deaths += 1
        wait = min(self.config.backoff * 2 ** (failures - 1), self.config.backoff_max) if failures else 0.0
        life.state, life.at = WorkerState.WAITING, now + wait

    def revive(self, now: float) -> list[str]:
        """Start what was given up, with a clean slate. The names of these."""
        given_up = [life for life in self.lives.values() if life.state is WorkerState.GIVEN_UP and not self.draining]
        for life in given_up:
            life.state, life.at, life.boot_failures = WorkerState.WAITING, now, 0
        return [life.worker for life in given_up]

    def stop(self) -> None:
        """Nothing is started any more; what has no process is stopped."""
        self.draining = True
        for life in self.lives.values():
            if life.state is WorkerState.WAITING:
                life.state, life.detail = WorkerState.STOPPED, "stopped before it was started"

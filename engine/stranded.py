"""When no device can serve any more: who waits is told so, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from core.errors import NoDevice
from core.job import Job
from core.states import State
from workers.contract import PoolEvent, WorkerDown

if TYPE_CHECKING:
    from engine.engine import Engine


def no_device(engine: Engine) -> NoDevice | None:
    """Why nothing can run here; None while any device serves, or may come to."""
    views = [] if engine.up else engine.pool.view()
    if not views or any(view.state not in ("given_up", "stopped") for view in views):
        return None
    return NoDevice(
        f"no device can serve: every worker has been given up ({views[0].worker}: {views[0].detail or 'stopped'}); "
        "they are tried again every few minutes",
        retry_after=60.0,
    )


def waits_for(engine: Engine, job: Job) -> str | None:
    """Why a job that waits does not run, where that is no matter of its turn."""
    fault = no_device(engine) if job.state is State.QUEUED else None
    return fault.message if fault else None


def hearing(engine: Engine, take_in: Callable[[PoolEvent], None]) -> Callable[[PoolEvent], None]:
    """Hears what the pool tells. When nothing can run any more, ephemeral jobs end at once; durable ones wait."""

    def hear(event: PoolEvent) -> None:
        take_in(event)
        if not isinstance(event, WorkerDown) or engine.draining or (fault := no_device(engine)) is None:
            return
        for live in list(engine.register.live.values()):
            if not live.job.request.durable:
                engine.send_away(live, fault)

    return hear

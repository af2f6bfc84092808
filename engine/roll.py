"""A rolling restart: each worker in turn takes nothing new, finishes what it holds, and makes place for its successor.

The others serve meanwhile, so a request notices nothing. With a single worker requests wait for the time of one start.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from scheduler.events import WorkerDraining

if TYPE_CHECKING:
    from engine.engine import Engine

log = structlog.get_logger("engine")
LOOK_EVERY = 0.05  # seconds


async def replace_workers(engine: Engine) -> None:
    """Returns when every worker that was ready has been replaced, or when one does not come back."""
    for worker, incarnation in list(engine.up.items()):
        if engine.announced:
            log.warning("no rolling restart: the server is shutting down")
            return
        engine.tell(WorkerDraining(worker, incarnation))
        while engine.up.get(worker) == incarnation and any(engine.flights.at(worker)):  # noqa: ASYNC110
            await asyncio.sleep(LOOK_EVERY)
        engine.pool.retire(worker, incarnation)
        while engine.up.get(worker, 0) <= incarnation:
            given_up = {view.worker for view in engine.pool.view() if view.state == "given_up"}
            if engine.draining or worker in given_up:
                log.warning("rolling restart ends early", device=worker)
                return
            await asyncio.sleep(LOOK_EVERY)
    log.info("rolling restart is done")

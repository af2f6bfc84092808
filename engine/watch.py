"""What the engine does by the clock: read the devices, tell waiting readers their place, remove what is old."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import TYPE_CHECKING

import structlog

from core.errors import StorageFailed, StorageFull
from core.states import State
from scheduler.events import LoadReport
from workers.monitor import Monitor

if TYPE_CHECKING:
    from engine.engine import Engine

log = structlog.get_logger("engine")

HOUSEKEEPING_EVERY = 30.0  # seconds, like the others
DEVICES_EVERY = 2.0
POSITIONS_EVERY = 0.5


async def old_jobs(engine: Engine) -> None:
    """Apply retention."""
    while True:
        try:
            await engine.forget_old()
        except (StorageFailed, StorageFull) as fault:
            log.error("old jobs cannot be removed now; it is tried again", why=fault.message)
        except Exception:
            log.exception("housekeeping failed; it is tried again")
        await asyncio.sleep(HOUSEKEEPING_EVERY)


async def positions(engine: Engine) -> None:
    """Tell readers of event streams where their waiting job stands, when that has changed."""
    told: dict[str, int] = {}
    while True:
        await asyncio.sleep(POSITIONS_EVERY)
        now: dict[str, int] = {}
        for job_id in list(engine.watched):
            live = engine.register.live.get(job_id)
            if live is None or live.feed is None or live.job.state is not State.QUEUED:
                continue
            place = engine.position(job_id)
            if place is not None:
                now[job_id] = place
                if told.get(job_id) != place:
                    live.feed.add("position", {"position": place}, time.time())
        told = now


async def devices(engine: Engine, monitor: Monitor) -> None:
    """Read what devices and processes say of themselves, and tell the scheduler of it."""
    done: Counter[str] = Counter()
    while True:
        pids = {view.worker: view.pid for view in engine.pool.view()}
        try:
            engine.readings = await asyncio.to_thread(monitor.read, pids)
        except Exception:
            log.exception("devices could not be read; it is tried again")
        for worker, reading in engine.readings.items():
            if reading.memory_total is not None and reading.memory_used is not None:
                free = reading.memory_total - reading.memory_used
                # what a device does for us, now or since the last look, tells nothing of strangers
                ours = any(engine.flights.at(worker)) or engine.flights.batches[worker] != done[worker]
                done[worker] = engine.flights.batches[worker]
                engine.tell(LoadReport(worker, None if ours else reading.utilisation, free, reading.memory_total))
        await asyncio.sleep(DEVICES_EVERY)

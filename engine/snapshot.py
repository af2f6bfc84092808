"""The state of the whole server as plain data: what /system/status, /metrics and readiness are shaped from."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from core.states import State
from engine.flights import Flight
from scheduler.views import waiting_by_group, waiting_by_priority
from workers.contract import WorkerView

if TYPE_CHECKING:
    from engine.engine import Engine


def take(engine: Engine) -> dict[str, Any]:
    """Everything that status answers tell. All values are plain; nothing is awaited."""
    views = engine.pool.view()
    paces = {worker.worker: worker.pace for worker in engine.scheduler.workers()}
    stepped = any(spec.stepped for spec in engine.catalogue)
    workers = [_worker(engine, view, paces.get(view.worker), stepped) for view in views]
    ready = any(worker["state"] in ("ready", "busy") for worker in workers) and not engine.announced
    counts = engine.register.counts
    running = counts[State.RUNNING] + counts[State.PARKED]  # at a worker
    ended = {state.value: counts[state] for state in State if state.ended}
    return {
        "uptime": time.monotonic() - engine.started_at,
        "ready": ready,
        "reason": None if ready else _reason(engine, views),
        "draining": engine.draining,
        "storage": {
            "state": engine.storage.state,
            "reason": engine.storage.why,
            "free_bytes": engine.storage.free,
            "min_free_bytes": engine.settings.min_free_disk,
            "promised_bytes": engine.storage.promised,
            "waiting": engine.storage.waiting,
        },
        "workers": workers,
        "queue": {
            "queued": counts[State.QUEUED],
            "running": running,
            "parked": counts[State.PARKED],
            "by_priority": {str(priority): count for priority, count in waiting_by_priority(engine.scheduler).items()},
            "by_group": {str(group): count for group, count in waiting_by_group(engine.scheduler).items()},
            "bytes": engine.admission.bytes,
            "limit_jobs": engine.settings.queue_jobs,
            "limit_bytes": engine.settings.queue_bytes,
        },
        "receiving": {
            "bodies": engine.intake.bodies,
            "bytes": engine.intake.bytes,
            "limit_bytes": engine.intake.most,
        },
        "jobs": {
            "total": sum(counts.values()),
            "queued": counts[State.QUEUED],
            "running": running,
            **ended,
        },
    }


def _reason(engine: Engine, views: list[WorkerView]) -> str:
    """Why nothing can be served, in words."""
    if engine.announced:
        return "the server is shutting down"
    if not views:
        return "no device is configured"
    return "no worker is ready: " + "; ".join(f"{view.worker} {view.state} ({view.detail})" for view in views[:8])


def _worker(engine: Engine, view: WorkerView, pace: float | None, stepped: bool) -> dict[str, Any]:
    reading = engine.readings.get(view.worker)
    held = list(engine.flights.at(view.worker))
    batch = next((flight for flight in held if not flight.stepped), None)
    batches, images = engine.flights.batches[view.worker], engine.flights.images[view.worker]
    return {
        "worker": view.worker,
        "index": view.index,
        "device": view.kind,
        "name": view.facts.get("name") or view.name,
        "state": "busy" if held and view.state == "ready" else view.state,
        "detail": view.detail,
        "refused": dict(view.facts.get("refused", {})),
        "progress": view.progress,
        "pid": view.pid,
        "alive": view.alive,
        "incarnation": view.incarnation,
        "restarts": view.restarts,
        "memory_total": reading.memory_total if reading else None,
        "memory_used": reading.memory_used if reading else None,
        "utilisation": reading.utilisation if reading else None,
        "temperature": reading.temperature if reading else None,
        "power": reading.power if reading else None,
        "rss": reading.rss if reading else None,
        "cpu_percent": reading.cpu_percent if reading else None,
        "current_batch": batch and _current(batch),
        "steps": engine.steps.told(view.worker) if stepped else None,
        "batches": batches,
        "images": images,
        "mean_batch": round(images / batches, 3) if batches else None,
        "pace": pace,
    }


def _current(batch: Flight) -> dict[str, Any]:
    return {
        "id": batch.batch, "model": batch.model, "group": batch.group, "size": batch.size,
        "seconds": round(time.monotonic() - batch.since, 3),
    }

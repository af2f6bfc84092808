"""What the i2ii API answers: its words, its shapes, and how the engine's snapshot becomes them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

from core.states import State

WORDS: Mapping[State, str] = {
    State.QUEUED: "queued",
    State.RUNNING: "running",
    State.PARKED: "running",
    State.SUCCEEDED: "completed",
    State.FAILED: "error",
    State.CANCELLED: "error",
    State.EXPIRED: "error",
}
WORKER_WORDS: Mapping[str, str] = {
    "starting": "starting",
    "ready": "worker_ready",
    "busy": "worker_ready",
    "restarting": "died",
    "given_up": "initialization_failed",
    "draining": "stopping",
    "stopped": "stopped",
}


class Submitted(BaseModel):
    """The answer of `POST /edit`."""

    request_id: UUID
    status: str = Field(examples=["submitted"])
    message: str
    ready_workers: int
    total_requests: int
    estimated_position: int


class Status(BaseModel):
    """A request's status. A field whose description names a status is there in that status only."""

    model_config = ConfigDict(extra="allow")

    request_id: UUID
    status: str = Field(description="queued, running, completed or error")
    progress: float = Field(ge=0, le=1)
    submitted_at: float = Field(description="Unix seconds.")
    request_number: int
    assigned_gpu: int | None = Field(description="null until a GPU has taken the request")
    history: list[dict[str, Any]]
    estimated_position: int | None = Field(None, description="queued")
    started_at: float | None = Field(None, description="running")
    output_path: str | None = Field(None, description="completed")
    processing_time: float | None = Field(None, description="completed")
    request_count: int | None = Field(None, description="completed")
    gpu_id: int | None = Field(None, description="completed, error")
    completed_at: float | None = Field(None, description="completed, error")
    attempts: int | None = Field(None, description="completed, error")
    error: str | None = Field(None, description="error")
    error_type: str | None = Field(None, description="error")
    retryable: bool | None = Field(None, description="error")


class NoResult(Status):
    """The status of a request that has no picture, and a sentence."""

    detail: str


class Totals(BaseModel):
    """Requests since the job database began. Cancelled and expired ones are counted elsewhere."""

    total_requests: int
    completed_requests: int
    failed_requests: int


class Health(Totals):
    """Whether requests can be served."""

    status: str = Field(description="healthy, degraded or unhealthy")
    timestamp: float
    ready_workers: int
    total_gpus: int
    backend_live: bool = Field(description="For clients of the lama-triton gateway, as the next.")
    backend_ready: bool
    error: str | None = Field(None, description="unhealthy: why")


class SystemStatus(Totals):
    """Workers, devices and the queue."""

    model_config = ConfigDict(extra="allow")

    total_gpus: int
    alive_processes: int
    ready_workers: int
    queued_requests: int = Field(description="Waiting and running.")
    worker_status: dict[str, str] = Field(description=f"By GPU number: {', '.join(sorted({*WORKER_WORDS.values()}))}.")
    processes_info: dict[str, dict[str, Any]] = Field(description="By GPU number: is_alive, pid, status.")
    running_requests: int
    devices: list[dict[str, Any]] = Field(description="What each device is, how it is and what it has done.")
    queue: dict[str, Any] = Field(description="Depth by priority and group, bytes, limits.")


class Detail(BaseModel):
    """Every error of this API."""

    detail: str | list[dict[str, Any]]


def errors(described: Mapping[int, str]) -> dict[int | str, dict[str, Any]]:
    """What is special about the error answers of a route, for its description."""
    return {status: {"description": text} for status, text in described.items()}


def ready_workers(now: Mapping[str, Any]) -> int:
    """How many workers serve, from the engine's snapshot."""
    return sum(worker["state"] in ("ready", "busy") for worker in now["workers"])


def health(now: Mapping[str, Any]) -> dict[str, Any]:
    """healthy (every worker serves), degraded (some do) or unhealthy (nothing can serve, `error` says why)."""
    ready, total = ready_workers(now), len(now["workers"])
    told = {
        "status": "unhealthy" if not now["ready"] else "healthy" if ready == total else "degraded",
        "timestamp": time.time(),
        "ready_workers": ready,
        "total_gpus": total,
        "backend_live": True,
        "backend_ready": bool(now["ready"]),
        **_totals(now),
    }
    return told if now["ready"] else told | {"error": now["reason"] or "no worker is ready"}


def system_status(now: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of old, then what is new."""
    workers, jobs = now["workers"], now["jobs"]
    words = {str(worker["index"]): WORKER_WORDS.get(worker["state"], "unknown") for worker in workers}
    processes = {
        number: {"is_alive": bool(worker["alive"]), "pid": worker["pid"], "status": word}
        for worker, (number, word) in zip(workers, words.items(), strict=True)
    }
    return {
        "total_gpus": len(workers),
        "alive_processes": sum(bool(worker["alive"]) for worker in workers),
        "ready_workers": ready_workers(now),
        **_totals(now),
        "queued_requests": jobs["queued"] + jobs["running"],  # of old, a running request was still "queued"
        "worker_status": words,
        "processes_info": processes,
        "running_requests": jobs["running"],
        "cancelled_requests": jobs["cancelled"],
        "expired_requests": jobs["expired"],
        "uptime": now["uptime"],
        "ready": now["ready"],
        "reason": now["reason"],
        "draining": now["draining"],
        "storage": now["storage"],
        "devices": [_device(worker) for worker in workers],
        "queue": now["queue"],
    }


def _device(worker: Mapping[str, Any]) -> dict[str, Any]:
    same = ("index", "name", "state", "detail", "refused", "memory_total", "memory_used", "utilisation", "temperature",
            "power", "incarnation", "restarts", "current_batch", "steps", "batches", "images", "pace")  # fmt: skip
    told = {key: worker[key] for key in same}
    return {"device": worker["worker"], **told, "mean_batch_size": worker["mean_batch"]}


def _totals(now: Mapping[str, Any]) -> dict[str, int]:
    jobs = now["jobs"]
    return {
        "total_requests": jobs["total"],
        "completed_requests": jobs["succeeded"],
        "failed_requests": jobs["failed"],
    }

"""SKELETON: the signatures the dialects are written against; the body is being written."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from core.job import Job
from core.model import Catalogue
from core.request import ImagePart, ImageRequest
from core.states import State


class Permit:
    """Room in the bounded queue (jobs and bytes), given by `Engine.admit` before the body is read. `submit` takes it
    over; if it is never used, leaving the `with` block gives it back."""

    def __enter__(self) -> "Permit": ...
    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None) -> None: ...
    def release(self) -> None: ...


@dataclass(frozen=True, slots=True)
class JobEvent:
    """One line of a job's event stream. `number` rises by one per job (SSE id). `kind`: state | position | progress."""

    number: int
    kind: str
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ResultBody:
    """An encoded result: bytes in memory (ephemeral) or a file, and what it is."""

    data: bytes | memoryview | Path
    media_type: str  # image/png ...
    format: str
    size: int


class Engine:
    catalogue: Catalogue
    settings: Any  # core.settings.Settings

    def admit(self, size: int, tenant: str = "anonymous", jobs: int = 1) -> Permit:
        """Raises Overloaded, Draining, NoDevice (none can ever serve: all given up) or StorageFull."""
        raise InterruptedError

    async def submit(self, request: ImageRequest, permit: Permit | None = None) -> Job:
        """Accept a request. Durable ones are on disk when this returns. With `idempotency_key` an equal earlier
        request's job is returned; raises IdempotencyMismatch / IdempotencyInFlight, and all that `admit` raises."""
        raise InterruptedError

    async def wait(self, job_id: str, timeout: float | None = None) -> Job:
        """Until the job ended or the time is over; the job as it is then."""
        raise InterruptedError

    async def run(self, request: ImageRequest, permit: Permit | None = None) -> tuple[Job, ResultBody | None]:
        """Ephemeral: submit, wait, give the result. Cancelling this coroutine cancels the job at once."""
        raise InterruptedError

    async def job(self, job_id: str, tenant: str | None = None) -> Job:
        """From memory or the store. Raises JobNotFound, also for another tenant's job (tenant None: sees all)."""
        raise InterruptedError

    async def jobs(self, tenant: str | None, *, state: State | None = None, model: str | None = None,
                   limit: int = 50, before: str | None = None) -> list[Job]:
        """Newest first; `before` is the id of the last job of the page before."""
        raise InterruptedError

    async def cancel(self, job_id: str, tenant: str | None = None) -> Job:
        """In any state; a second time, or after the end, it changes nothing."""
        raise InterruptedError

    async def result(self, job_id: str, tenant: str | None = None) -> ResultBody:
        """Raises JobNotFound, JobNotFinished (details: state), the job's own error when it failed, ResultGone."""
        raise InterruptedError

    def events(self, job_id: str, tenant: str | None = None, after: int = 0) -> AsyncIterator[JobEvent]:
        """Events numbered > after: those kept, then live ones; ends after the job's final state event."""
        raise InterruptedError

    def position(self, job_id: str) -> int | None:
        """How many jobs will probably be handed out before it, plus one; None when it does not wait."""
        raise InterruptedError

    def snapshot(self) -> dict[str, Any]:
        """All that /system/status tells, as plain data:
        {"uptime", "ready": bool, "reason": str|None, "draining": bool,
         "workers": [{"worker": "cpu:0", "index": 0, "device": "...", "name", "state": "starting|ready|busy|restarting|
            given_up|draining|stopped", "detail": str, "pid", "alive": bool, "incarnation", "restarts",
            "memory_total", "memory_used", "utilisation", "temperature", "power", "rss", "cpu_percent",
            "current_batch": {"id","model","group","size","seconds"}|None, "batches", "images", "mean_batch", "pace"}],
         "queue": {"queued", "running", "by_priority": {"0":n,..}, "by_group": {str: n}, "bytes", "limit_jobs",
            "limit_bytes"},
         "jobs": {"total","succeeded","failed","cancelled","expired","queued","running"}}"""
        raise InterruptedError

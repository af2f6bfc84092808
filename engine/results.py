"""What a finished job answers with."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from core.errors import ErrorInfo, JobNotFinished, ResultGone, from_info
from core.job import Job
from engine.keeper import Keeper

MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp", "avif": "image/avif"}


@dataclass(frozen=True, slots=True)
class ResultBody:
    """An encoded result: bytes in memory (ephemeral jobs) or a file, and what it is. `size` is in bytes."""

    data: bytes | Path
    media_type: str
    format: str
    size: int

    @classmethod
    def of(cls, data: bytes | Path, format: str, size: int) -> ResultBody:
        return cls(data, MEDIA_TYPES.get(format, "application/octet-stream"), format, size)


async def stored_result(job: Job, keeper: Keeper) -> ResultBody:
    """The result of a durable job. Raises JobNotFinished, the job's own error when it failed, or ResultGone."""
    if not job.state.ended:
        raise JobNotFinished(
            f"the job is {job.state.value}; its result comes when it has succeeded",
            state=job.state.value, progress=job.progress,
        )
    if job.result is None:
        raise from_info(job.error or ErrorInfo("internal_error", "the job has no result"))
    assert isinstance(job.result.data, str)
    path = await asyncio.to_thread(keeper.result_path, job.result.data)
    if path is None:
        raise ResultGone("the job succeeded, but its result has been removed; submit it again")
    return ResultBody.of(path, job.result.format, job.result.size)

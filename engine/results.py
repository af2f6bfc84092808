"""What a finished job answers with."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from core.data import Data
from core.errors import ErrorInfo, JobNotFinished, ResultGone, from_info
from core.job import Job
from core.request import Span
from engine.keeper import Keeper
from workers.arena import Arena

MEDIA_TYPES = {
    "png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp", "avif": "image/avif", "gif": "image/gif",
    "bmp": "image/bmp", "tiff": "image/tiff", "ppm": "image/ppm",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ResultBody:
    """An encoded result: bytes in memory (ephemeral jobs) or a file, and what it is. `size` is in bytes."""

    data: Data | Path
    media_type: str
    format: str
    size: int

    @classmethod
    def of(cls, data: Data | Path, format: str, size: int) -> ResultBody:
        return cls(data, MEDIA_TYPES.get(format, "application/octet-stream"), format, size)

    async def read(self) -> Data:
        """The bytes, wherever they are. Raises `ResultGone`."""
        if not isinstance(self.data, Path):
            return self.data
        try:
            return await asyncio.to_thread(self.data.read_bytes)
        except OSError:
            raise ResultGone("the job succeeded, but its result has been removed; submit it again") from None


class Loan:
    """The result of an ephemeral job where its worker wrote it, in shared memory, which is given back when this block
    is left. `data` and `size` are the encoded bytes and their number."""

    __slots__ = ("_arena", "_span", "data", "format", "media_type", "size")

    def __init__(self, arena: Arena, span: Span, format: str) -> None:
        self._arena, self._span = arena, span
        self.data = arena.view(span)
        self.size, self.format = span.size, format
        self.media_type = MEDIA_TYPES.get(format, "application/octet-stream")

    def __enter__(self) -> Loan:
        return self

    def __exit__(self, *_: object) -> None:
        self.data.release()
        self._arena.give(self._span)


async def stored_result(job: Job, keeper: Keeper) -> ResultBody:
    """The result of a durable job. Raises JobNotFinished, the job's own error when it failed, or ResultGone."""
    if not job.state.ended:
        raise JobNotFinished(
            f"the job is {job.state.value}; its result comes when it has succeeded",
            state=job.state.value,
            progress=job.progress,
        )
    if job.result is None:
        raise from_info(job.error or ErrorInfo("internal_error", "the job has no result"))
    assert isinstance(job.result.data, str)
    path = await asyncio.to_thread(keeper.result_path, job.result.data)
    if path is None:
        raise ResultGone("the job succeeded, but its result has been removed; submit it again")
    return ResultBody.of(path, job.result.format, job.result.size)

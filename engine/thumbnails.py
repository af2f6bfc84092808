"""Small copies of results: made when one is first asked for, kept beside the result, removed with it.

At most one is made of a result at a time; whoever asks meanwhile waits for the same one, and when all of them have left
it is given up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import structlog

from core.errors import ResultGone, StorageFailed, StorageFull
from engine.keeper import Keeper

log = structlog.get_logger("thumbnails")


@dataclass(slots=True)
class _Making:
    task: asyncio.Task[bytes]
    waiting: int = 0


class Thumbnails:
    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._making: dict[str, _Making] = {}  # by job

    async def get(
        self, job_id: str, result: str, begin: Callable[[], None], make: Callable[[], Coroutine[Any, Any, bytes]]
    ) -> bytes:
        """The thumbnail (WebP) of a job whose result is kept under that name. `begin()` is called by who has it made,
        before `make()`, and may raise what forbids that. Raises `ResultGone`, and what comes of the making."""
        if await asyncio.to_thread(self._keeper.result_path, result) is None:
            raise ResultGone("the job succeeded, but its result has been removed; submit it again")
        kept = await asyncio.to_thread(self._keeper.files.thumbnail, job_id)
        if kept is not None:
            return kept
        making = self._making.get(job_id)
        if making is None:
            begin()
            making = self._making[job_id] = _Making(asyncio.ensure_future(self._make(job_id, result, make)))
        making.waiting += 1
        try:
            return await asyncio.shield(making.task)
        finally:
            making.waiting -= 1
            if not making.waiting:
                making.task.cancel()  # does nothing to one that has ended
                if self._making.get(job_id) is making:
                    del self._making[job_id]

    async def _make(self, job_id: str, result: str, make: Callable[[], Coroutine[Any, Any, bytes]]) -> bytes:
        data = await make()
        await asyncio.to_thread(self._keep, job_id, result, data)
        return data

    def _keep(self, job_id: str, result: str, data: bytes) -> None:
        files = self._keeper.files
        try:
            files.room(len(data))
            files.put_thumbnail(job_id, data)
        except (StorageFull, StorageFailed) as fault:
            log.warning("a thumbnail is not kept", job=job_id, why=fault.message)
        if self._keeper.result_path(result) is None:  # retention came by meanwhile
            files.delete(job_id)

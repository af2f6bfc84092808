"""Durable jobs: accepted on disk before anybody is told, concluded on disk before anybody hears, found again after a
crash.

Every call of the store that touches a disk happens in threads; the event loop only awaits.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import structlog

from core.data import Data
from core.errors import IdempotencyInFlight, IdempotencyMismatch, ImagePoolError, StorageFailed, StorageFull
from core.job import Job
from core.request import ImagePart, ImageRequest, Span
from core.states import State
from store.files import FileStore
from store.jobs import JobStore
from store.lock import FolderLock
from store.retention import expired

log = structlog.get_logger("keeper")
RETRY = 1.0  # seconds between two tries to store the end of a job on a disk that is full


def fingerprint(request: ImageRequest) -> str:
    """What makes two requests the same to an Idempotency-Key: model, parameters, format and every image byte."""
    digest = hashlib.sha256()
    digest.update(orjson.dumps([request.model, dict(request.params), request.output],
                               option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS))
    for image in request.images:
        assert not isinstance(image.data, Span | str)
        digest.update(f"{image.role} {image.size} ".encode())
        digest.update(image.data)
    return digest.hexdigest()


class Keeper:
    def __init__(self, lock: FolderLock, jobs: JobStore, files: FileStore, max_age: float, max_bytes: int) -> None:
        self.jobs, self.files = jobs, files
        self._lock = lock
        self._max_age, self._max_bytes = max_age, max_bytes
        self._accepting: set[tuple[str, str]] = set()
        self.disk_full = False  # a finished job waits for the disk
        self.refused = False    # the disk refused something since it was last seen to take something

    @asynccontextmanager
    async def once(self, request: ImageRequest) -> AsyncIterator[Job | None]:
        """While this block is open nobody else is accepted with the same Idempotency-Key. Gives the job that an equal
        request has made before. Raises the two idempotency errors."""
        if request.idempotency_key is None:
            yield None
            return
        key = (request.tenant, request.idempotency_key)
        if key in self._accepting:
            raise IdempotencyInFlight(
                "the first request with this Idempotency-Key is still being accepted; repeat it in a second",
                retry_after=1.0,
            )
        self._accepting.add(key)
        try:
            yield await self._duplicate(request, key)
        finally:
            self._accepting.discard(key)

    async def _duplicate(self, request: ImageRequest, key: tuple[str, str]) -> Job | None:
        found = await asyncio.to_thread(self.jobs.find_key, *key)
        if found is None:
            return None
        if found[1] != await asyncio.to_thread(fingerprint, request):
            raise IdempotencyMismatch(
                "this Idempotency-Key was used for another request; use a new key for a new request"
            )
        return await asyncio.to_thread(self.jobs.load, found[0])

    async def accept(self, job: Job) -> Job:
        """Write the inputs and the record of a new job. On return all of it is on disk. Raises StorageFull/Failed and
        leaves nothing behind."""
        request = job.request
        try:
            names = await asyncio.to_thread(self._put_inputs, job)
            parts = tuple(replace(part, data=name) for part, name in zip(request.images, names, strict=True))
            print_ = await asyncio.to_thread(fingerprint, request) if request.idempotency_key else None
            job.request = replace(request, images=parts)
            await asyncio.wrap_future(self.jobs.insert(job, print_))
        except BaseException as fault:
            self.refused |= isinstance(fault, StorageFull | StorageFailed)
            await asyncio.to_thread(self.files.delete, job.id)
            raise
        return job

    def _put_inputs(self, job: Job) -> list[str]:
        self.files.room(sum(image.size for image in job.request.images))
        return self.files.put_inputs(
            job.id, [(part.role, part.header.format, _bytes(part)) for part in job.request.images]
        )

    async def store_result(self, job_id: str, format: str, data: bytes | memoryview) -> str:
        """Write a result; its name. A full disk is waited out: an accepted job is not lost for want of room."""
        name: str = await self._insist(lambda: asyncio.to_thread(self.files.put_result, job_id, format, data))
        return name

    async def save(self, job: Job) -> None:
        """Write the job's end; also waits out a full disk."""
        await self._insist(lambda: asyncio.wrap_future(self.jobs.save(job)))
        if job.state.ended:
            try:
                await asyncio.to_thread(self.files.delete_inputs, job.id)
            except (StorageFull, StorageFailed) as fault:  # the end is stored, and so it counts; a sweep takes the rest
                log.warning("the inputs of an ended job cannot be removed now", **job.facts(), why=fault.message)

    async def _insist(self, write: Callable[[], Any]) -> Any:
        while True:
            try:
                done = await write()
                self.disk_full = False
                return done
            except (StorageFull, StorageFailed) as fault:
                if not self.disk_full:
                    log.error("a finished job cannot be stored; trying again until it can", why=fault.message)
                self.disk_full = self.refused = True
                await asyncio.sleep(RETRY)

    def check_room(self) -> None:
        """Raise `StorageFull` when a new durable job has no place."""
        if self.disk_full:
            raise StorageFull("the disk is full; no new job is taken until finished ones could be stored",
                              retry_after=5.0)

    async def recover(self) -> list[Job]:
        """Jobs that a former life of the server accepted and did not end, oldest first; leftovers are swept away."""
        jobs = await asyncio.to_thread(self.jobs.unfinished)
        kept = await asyncio.to_thread(self.jobs.kept)
        waiting = {id_ for id_, ended_at, _ in kept if ended_at is None}
        if len(waiting) > len(jobs):
            log.error("stored jobs cannot be read and do not run", count=len(waiting) - len(jobs))
        await asyncio.to_thread(self.files.sweep, {id_ for id_, _, _ in kept}, waiting)
        return jobs

    async def forget_old(self, now: float) -> list[str]:
        """Apply retention; the ids of the jobs that are gone."""
        kept = await asyncio.to_thread(self.jobs.kept)
        ids = expired(kept, now, self._max_age, self._max_bytes)
        if ids:
            await asyncio.wrap_future(self.jobs.delete(ids))  # first: a file without a record is swept, not missed
            for id_ in ids:
                await asyncio.to_thread(self.files.delete, id_)
            log.info("old jobs removed", count=len(ids))
        return ids

    def result_path(self, name: str) -> Path | None:
        """Where a stored result lies; None when it is gone."""
        path = self.files.path(name)
        return path if path.exists() else None

    async def close(self) -> None:
        await asyncio.to_thread(self.jobs.close)
        self._lock.close()


def _bytes(part: ImagePart) -> Data:
    if isinstance(part.data, Span | str):
        raise ImagePoolError("a durable job needs the bytes of its images")
    return part.data


def resumed(job: Job, at: float) -> bool:
    """Put a job of a former life back to `queued`; whether it had been handed to a worker."""
    was_running = job.state in (State.RUNNING, State.PARKED)
    if was_running:
        job.move(State.QUEUED, at, why="the server was restarted")
    return was_running

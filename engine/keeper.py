"""Durable jobs: accepted on disk before anybody is told, concluded on disk before anybody hears, found again after a
crash.

Every call of the store that touches a disk happens in threads; the event loop only awaits.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import orjson
import structlog

from core.data import Data
from core.errors import IdempotencyInFlight, IdempotencyMismatch, ImagePoolError, StorageFailed, StorageFull
from core.job import Job
from core.request import ImagePart, ImageRequest, Span
from core.states import State
from engine.promises import Promises
from store import codec
from store.faults import damaged
from store.files import FileStore
from store.jobs import JobStore
from store.lock import FolderLock
from store.orphans import PREFIX
from store.recovery import Found, recover
from store.retention import expired

log = structlog.get_logger("keeper")
Done = TypeVar("Done")
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
    """`found` is what was seen when the database was opened; `timed(what, seconds)` is told what the disk takes."""

    def __init__(
        self, lock: FolderLock, jobs: JobStore, files: FileStore, max_age: float, max_bytes: int, found: Found,
        timed: Callable[[str, float], None] = lambda what, seconds: None,
    ) -> None:
        self.jobs, self.files = jobs, files
        self._lock, self._found = lock, found
        self._max_age, self._max_bytes = max_age, max_bytes
        self._accepting: set[tuple[str, str]] = set()
        self._timed = timed
        self.promises = Promises()
        self.waiting = 0      # finished jobs that wait for the disk
        self.refused = False  # the disk refused something since it was last seen to take something

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

    async def accept(self, job: Job, pixels: int) -> Job:
        """Write the inputs and the record of a new job, whose result will have so many pixels. On return all of it is
        on disk, and there is room for the result. Raises StorageFull/Failed and leaves nothing behind."""
        began = time.monotonic()
        self.promises.add(job, pixels)
        try:
            print_ = await asyncio.to_thread(fingerprint, job.request) if job.request.idempotency_key else None
            row = await asyncio.to_thread(self._put_inputs, job, print_)
            stored = self.jobs.insert_row(row)
            stored.add_done_callback(lambda done: self._tell(job.id, done))  # by the writer, before anybody hears of it
            await asyncio.wrap_future(stored)
        except BaseException as fault:
            self.refused |= isinstance(fault, StorageFull | StorageFailed)
            self.promises.settle(job.id)
            await asyncio.to_thread(self.files.delete, job.id)
            raise
        self._timed("accept", time.monotonic() - began)
        return job

    def _tell(self, job_id: str, stored: Future[None]) -> None:
        if stored.exception() is None:
            with suppress(StorageFull, StorageFailed):  # it is in the database, and so it counts
                self.files.tell(job_id)

    def _put_inputs(self, job: Job, print_: str | None) -> codec.Row:
        """The job's row. Afterwards its request names the files."""
        request = job.request
        row: codec.Row = {}

        def record(names: list[str]) -> bytes:
            parts = tuple(replace(part, data=name) for part, name in zip(request.images, names, strict=True))
            job.request = replace(request, images=parts)
            row.update(codec.encode(job, print_))
            return orjson.dumps(row)

        images = [(part.role, part.header.format, _bytes(part)) for part in request.images]
        self.files.room(sum(image.size for image in request.images) + int(self.promises.bytes))
        self.files.put_inputs(job.id, images, record)
        return row

    async def store_result(
        self, job_id: str, format: str, data: bytes | memoryview, wanted: Callable[[], bool] = lambda: True
    ) -> str | None:
        """Write a result; its name. A full disk is waited out, for an accepted job is not lost for want of room, unless
        the result is not `wanted` any more: then None."""
        began = time.monotonic()
        name: str | None = await self._insist(
            lambda: asyncio.to_thread(self.files.put_result, job_id, format, data), wanted
        )
        self._timed("result", time.monotonic() - began)
        return name

    async def save(self, job: Job) -> None:
        """Write the job's end; also waits out a full disk. An end without a result makes room there."""
        began = time.monotonic()
        await self._insist(lambda: self._save(job))
        self._timed("end", time.monotonic() - began)
        if job.state.ended:
            try:
                await asyncio.to_thread(self.files.delete_inputs, job.id)
            except (StorageFull, StorageFailed) as fault:  # the end is stored, and so it counts; a sweep takes the rest
                log.warning("the inputs of an ended job cannot be removed now", **job.facts(), why=fault.message)

    async def _save(self, job: Job) -> None:
        try:
            await self._with_reserve(lambda: asyncio.wrap_future(self.jobs.save(job)))
        except StorageFull:
            if job.state.ended and job.result is None:  # whatever comes, it shall not run any more
                await asyncio.to_thread(self.files.delete_inputs, job.id)
            raise

    async def _with_reserve(self, write: Callable[[], Awaitable[Done]]) -> Done:
        """What frees room in the end may take the reserve."""
        try:
            return await write()
        except StorageFull:
            await asyncio.to_thread(self.files.spend_reserve)
            return await write()

    async def _insist(self, write: Callable[[], Awaitable[Done]], wanted: Callable[[], bool] = lambda: True,
                      ) -> Done | None:
        waits = False
        try:
            while wanted():
                try:
                    return await write()
                except (StorageFull, StorageFailed) as fault:
                    if not self.waiting:
                        log.error("a finished job cannot be stored; trying again until it can", why=fault.message)
                    self.waiting += not waits
                    waits = self.refused = True
                    await asyncio.sleep(RETRY)
            return None
        finally:
            self.waiting -= waits

    def check_room(self) -> None:
        """Raise `StorageFull` when a new durable job has no place, `StorageFailed` when it could not be found again."""
        if self.jobs.damaged:
            raise damaged()
        if self.waiting:
            raise StorageFull("the disk is full; no new job is taken until finished ones could be stored",
                              retry_after=5.0)

    async def recover(self) -> list[Job]:
        """Jobs that a former life of the server accepted and did not end, oldest first. What had to be done to find
        them is in the log."""
        found = await asyncio.to_thread(recover, self.jobs, self.files, self._found)
        if told := found.told():
            log.error(told)
        return found.jobs

    def mend(self) -> list[str]:
        """Make again what somebody has taken away while the server runs: folders, the lock, the database. What that
        was. Blocks; raises `StorageFull` or `StorageFailed`."""
        again = self.files.make_folders()
        if self._lock.renew():
            again.append("the lock")
        if self.jobs.is_gone():
            self.jobs.make_again(self.files.temporary(), self.files.orphans.take_database)
            again.append("the job database, with all that was in it")
        return again

    async def forget_old(self, now: float) -> list[str]:
        """Apply retention; the ids of the jobs that are gone."""
        orphans = await asyncio.to_thread(self.files.orphans.kept)
        kept = await asyncio.to_thread(self.jobs.kept)
        doomed = expired([*kept, *orphans], now, self._max_age, self._max_bytes)
        ids = [name for name in doomed if not name.startswith(PREFIX)]
        for name in doomed:
            if name.startswith(PREFIX):
                await asyncio.to_thread(self.files.orphans.delete, name)
            else:
                await asyncio.to_thread(self.files.delete_inputs, name)  # else its record would look like a lost job's
        if ids:  # their rows first: a file without one is moved, not missed
            await self._with_reserve(lambda: asyncio.wrap_future(self.jobs.delete(ids)))
            for id_ in ids:
                await asyncio.to_thread(self.files.delete, id_)
            log.info("old jobs removed", count=len(ids))
        return ids

    async def count(self, ended: Counter[State]) -> None:
        """Store how many ephemeral jobs have ended, and take them from `ended`."""
        now = +ended
        if now:
            await asyncio.wrap_future(self.jobs.count_past(now))
            ended.subtract(now)

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

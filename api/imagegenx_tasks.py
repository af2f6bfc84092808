"""ImageGenX's tasks: one durable job each, or two where the image is enlarged after it was made.

A task's id is its job's idempotency key, so it is found through the store, after a restart too. The ids of a batch are
one series: they differ in their last two digits only. The second job of a task has the first one's key with `.2`
behind: however often it is asked for, there is one.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import orjson
import structlog

from api import fetch
from api.callbacks import Callbacks
from api.images import read_image
from core.errors import IdempotencyInFlight, IdempotencyMismatch, ImagePoolError, JobNotFinished, JobNotFound
from core.job import Job
from core.request import ImageRequest, OutputFormat, Watermark
from core.states import State
from engine.engine import Engine
from engine.results import ResultBody

log = structlog.get_logger("imagegenx")
DIALECT = "imagegenx"
TASK, BATCH = re.compile(r"img([0-9]{19})[0-9]{2}"), re.compile(r"batch([0-9]{19})00")
SECOND = ".2"
SHARE = 0.8  # of a task's progress, the first of two jobs
MOST_TOLD = 10_000  # batches whose end is remembered as told
TRIES = 3
LINK_SECONDS = 7 * 86_400.0  # that an address of an image serves
RETRY = 2.0  # seconds between two tries to have a second job accepted
EXTENSIONS = {"jpeg": "jpg"}
WORDS: Mapping[State, str] = {
    State.QUEUED: "waiting",
    State.RUNNING: "processing",
    State.PARKED: "processing",
    State.SUCCEEDED: "success",
    State.FAILED: "failed",
    State.CANCELLED: "cancelled",
    State.EXPIRED: "failed",
}


Link = Callable[[str, str], str]


def new_series() -> str:
    """19 digits: the day, and a number that nobody can guess."""
    return f"{datetime.now(UTC):%Y%m%d}{secrets.randbelow(10**11):011d}"


@dataclass(frozen=True, slots=True)
class Task:
    """A task as it is now. `jobs`: the first, and the second where there is one already. `fault`: why there cannot be
    a second one, and so the task has failed."""

    id: str
    jobs: tuple[Job, ...]
    fault: ImagePoolError | None = None

    @property
    def last(self) -> Job:
        return self.jobs[-1]

    @property
    def waits_for_second(self) -> bool:
        """The first job has succeeded, and the second has not been accepted yet."""
        return not self.fault and "then" in self.last.request.client and self.last.state is State.SUCCEEDED

    @property
    def ended(self) -> bool:
        """Whether its state is final: that of its last job, but a success that is only the first of two."""
        return self.last.state.ended and not self.waits_for_second

    @property
    def word(self) -> str:
        if self.fault:
            return "failed"
        started = self.last.state.ended or len(self.jobs) > 1
        return WORDS[self.last.state] if self.ended or not started else "processing"

    @property
    def progress(self) -> int:
        """0-100."""
        first, second = self.jobs[0].progress, self.jobs[1].progress if len(self.jobs) > 1 else 0.0
        chained = "then" in self.jobs[0].request.client
        return int(100 * (SHARE * first + (1 - SHARE) * second if chained else first))

    def object_name(self) -> str:
        """What its image is called: day, id, size and format."""
        result = self.last.result
        assert result is not None
        kind = EXTENSIONS.get(result.format, result.format)
        return f"{self.id[3:11]}/{self.id}_{result.width}x{result.height}.{kind}"

    @property
    def thumbnail(self) -> str:
        """The path of its thumbnail."""
        return f"/temp/{self.id}_thumb.webp"

    def tell(self, link: Link) -> dict[str, Any]:
        """The task as its clients see it. `link(path, tenant)`: a path with what lets it serve without a key; "" when
        it is a thumbnail's and none can be made."""
        told: dict[str, Any] = {
            "task_id": self.id,
            "status": self.word,
            "progress": self.progress,
            "query_url": f"/api/v1/image/task/{self.id}",
            "create_time": _iso(self.jobs[0].created_at),
            "finish_time": _iso(self.last.ended_at) if self.ended and self.last.ended_at else None,
        }
        if self.word == "success" and (result := self.last.result):
            base, tenant = str(self.last.request.client.get("base", "")), self.last.request.tenant
            told["result"] = {
                "original_url": base + link(f"/api/v1/image/file/{self.object_name()}", tenant),
                **({"thumb_url": base + small} if (small := link(self.thumbnail, tenant)) else {}),
                "resolution": f"{result.width}×{result.height}",
                "format": EXTENSIONS.get(result.format, result.format),
                "size": result.size,
            }
        if fault := self.fault or self.last.error:
            told["error_msg"] = fault.message
        return told


def envelope(data: Any, message: str = "success", code: int = 200) -> dict[str, Any]:
    """The shape of every answer."""
    return {"code": code, "message": message, "data": data}


def task_envelope(task: Task, link: Link) -> dict[str, Any]:
    """A task's answer; that of a failed one has the code 500, whatever the status of its HTTP answer."""
    told = task.tell(link)
    return envelope(told, told.get("error_msg", "failed"), 500) if told["status"] == "failed" else envelope(told)


def batch_json(batch: str, tasks: Sequence[Task], link: Link) -> dict[str, Any]:
    """A batch as its clients see it: counts, and every task."""
    total = int(tasks[0].last.request.client.get("total", len(tasks)))
    words = [task.word for task in tasks]
    return {
        "batch_task_id": batch,
        "total": total,
        "success_count": words.count("success"),
        "failed_count": words.count("failed") + words.count("cancelled"),
        "waiting_count": words.count("waiting") + words.count("processing"),
        "progress": sum(100 if task.ended else task.progress for task in tasks) // max(1, total),
        "query_url": f"/api/v1/image/batch-task/{batch}",
        "download_url": f"/api/v1/image/batch-task/{batch}/download",
        "tasks": [task.tell(link) for task in tasks],
    }


class Tasks:
    """All tasks, through the engine; nothing of them is kept here that a restart could lose."""

    def __init__(self, engine: Engine, reach: fetch.Reach) -> None:
        self._engine = engine
        self.callbacks = Callbacks(reach, lambda: engine.leaving)
        self._told: dict[str, None] = {}  # batches whose end was told, the oldest first
        self.seconds = 5.0  # that one job takes, as lately measured
        engine.follow(DIALECT, self._ended)

    async def submit(self, requests: Sequence[ImageRequest], batch: bool = False) -> tuple[str, list[Task]]:
        """Accept tasks, all or none; the series, and the tasks. Raises what `Engine.submit` raises."""
        for attempt in range(TRIES):
            series = new_series()
            try:
                return series, await self._submit(_keyed(series, requests, batch))
            except (IdempotencyMismatch, IdempotencyInFlight):  # somebody has drawn the same number
                if attempt == TRIES - 1:
                    raise
        raise AssertionError("not reached")

    async def _submit(self, requests: Sequence[ImageRequest]) -> list[Task]:
        with ExitStack() as room:  # for all, before the first is accepted
            permits = [
                room.enter_context(self._engine.admit(one.size, one.tenant, urgent=one.urgent))
                for one in requests
            ]
            done = await asyncio.gather(*map(self._engine.submit, requests, permits), return_exceptions=True)
        jobs = [job for job in done if isinstance(job, Job)]
        for fault in done:
            if isinstance(fault, BaseException):
                await asyncio.gather(*(self._engine.cancel(job.id) for job in jobs))
                raise fault
        return [Task(str(job.request.client["task"]), (job,)) for job in jobs]

    async def find(self, task_id: str, tenant: str) -> Task:
        """Raises `JobNotFound`."""
        jobs = await self._engine.register.keyed(tenant, task_id) if TASK.fullmatch(task_id) else []
        jobs = [job for job in jobs if job.request.dialect == DIALECT]
        if not jobs:
            raise JobNotFound(f"Task {task_id[:64]} not found")
        return await self._with_second(Task(task_id, tuple(jobs)))

    async def batch(self, batch_id: str, tenant: str) -> list[Task]:
        """The tasks of a batch, in the order of its texts. Raises `JobNotFound`."""
        found = BATCH.fullmatch(batch_id)
        members: dict[str, list[Job]] = defaultdict(list)
        for job in await self._engine.register.keyed(tenant, f"img{found[1]}") if found else []:
            if job.request.client.get("batch") == batch_id:
                members[str(job.request.client["task"])].append(job)
        if not members:
            raise JobNotFound(f"Task {batch_id[:64]} not found")
        tasks = [Task(id_, tuple(jobs)) for id_, jobs in sorted(members.items())]
        return [await self._with_second(task) for task in tasks]

    async def cancel(self, task: Task) -> Task:
        """In whatever state; after the end nothing changes. Raises what `Engine.submit` raises when its second job,
        due just now, cannot be accepted to be cancelled."""
        if task.waits_for_second:
            task = Task(task.id, (*task.jobs, await self._accept_second(task)))
        job = await self._engine.cancel(task.last.id)
        return replace(task, jobs=(*task.jobs[:-1], job))

    async def result(self, task: Task) -> ResultBody:
        """Its image. Raises `JobNotFinished`, the error of its last job, why there is none, or `ResultGone`."""
        if not task.ended:
            raise JobNotFinished(f"Task {task.id} is {task.word}; its image comes when it is a success")
        if task.fault:
            raise task.fault
        return await self._engine.result(task.last.id)

    def link(self, path: str, tenant: str) -> str:
        """The path of one of its tenant's images; it serves as long as the platform's own did. "" for a thumbnail that
        this server has no model to make."""
        if path.startswith("/temp/") and all(spec.name != "resize" for spec in self._engine.offered):
            return ""
        return self._engine.link(path, tenant, LINK_SECONDS)

    def estimate(self, task: Task) -> int:
        """Seconds until it will probably be done."""
        ready = max(1, len(self._engine.up))
        return max(1, round(self.seconds * (1 + (self._engine.position(task.last.id) or 1) // ready)))

    # --- what follows the end of a job --------------------------------------------------------------------------------

    async def _with_second(self, task: Task) -> Task:
        """The task, its second job accepted when it is due: should the server have died just before that. While there
        is no room for it, the task is told as it is; when it can never be, as failed."""
        if not task.waits_for_second:
            return task
        try:
            return Task(task.id, (*task.jobs, await self._accept_second(task)))
        except ImagePoolError as fault:
            return task if fault.retryable else replace(task, fault=fault)

    async def _accept_second(self, task: Task) -> Job:
        job = task.last
        then = job.request.client["then"]
        body = await self._engine.result(job.id)
        data = await body.read()
        output = then["output"]
        request = ImageRequest(
            model=then["model"],
            images=(read_image(data, max_pixels=len(data) * 8_192),),  # made here: no stranger's bomb
            params=self._engine.catalogue[then["model"]].check_params(then["params"]),
            output=OutputFormat(**{**output, "watermark": output["watermark"] and Watermark(**output["watermark"])}),
            priority=job.request.priority,
            tenant=job.request.tenant,
            dialect=DIALECT,
            idempotency_key=f"{task.id}{SECOND}",
            client={name: value for name, value in job.request.client.items() if name != "then"},
        )
        try:
            return await self._engine.submit(request)
        except IdempotencyInFlight:
            found = await self.find(task.id, job.request.tenant)
            return found.last

    async def _ended(self, job: Job) -> None:
        task = Task(str(job.request.client["task"]), (job,))
        if job.started_at and job.ended_at:
            self.seconds += 0.2 * (job.ended_at - job.started_at - self.seconds)
        while task.waits_for_second:
            try:
                await self._accept_second(task)
                return
            except ImagePoolError as fault:
                if not fault.retryable:
                    log.error("an image cannot be enlarged", task=task.id, why=fault.message)
                    break
                if self._engine.draining:
                    log.warning("an image is not enlarged before it is asked for, the server goes away", task=task.id)
                    return
                await asyncio.sleep(fault.retry_after or RETRY)
        await self._call_back(job)

    async def _call_back(self, job: Job) -> None:
        url, batch = job.request.client.get("callback"), job.request.client.get("batch")
        if not url:
            return
        tenant = job.request.tenant
        if batch is None:
            body = task_envelope(await self.find(str(job.request.client["task"]), tenant), self.link)
        else:
            tasks = await self.batch(str(batch), tenant)
            if batch in self._told or not all(task.ended for task in tasks):
                return
            self._remember(str(batch))
            body = envelope(batch_json(str(batch), tasks, self.link))
        began = time.monotonic()
        try:
            taken = await self.callbacks.send(str(url), orjson.dumps(body), tenant)
        except asyncio.CancelledError:
            log.warning("a callback was given up, the server goes away", **job.facts())
            raise
        if not taken:
            log.warning("a callback was not taken", **job.facts(), seconds=round(time.monotonic() - began, 1))

    def _remember(self, batch: str) -> None:
        self._told[batch] = None
        if len(self._told) > MOST_TOLD:
            del self._told[next(iter(self._told))]


def _keyed(series: str, requests: Sequence[ImageRequest], batch: bool) -> list[ImageRequest]:
    """The requests with the ids of their tasks, as keys to be found by, and that of their batch."""
    whole = {"batch": f"batch{series}00", "total": len(requests)} if batch else {}
    ids = [f"img{series}{number:02d}" for number in range(len(requests))]
    return [
        replace(one, idempotency_key=id_, client={**one.client, **whole, "task": id_})
        for id_, one in zip(ids, requests, strict=True)
    ]


def _iso(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")

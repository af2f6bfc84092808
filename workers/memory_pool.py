"""The pool's twin in memory: the same interface, the same messages, no process. It is what engine and dialects are
tested with, and it can be told to lie.

`work(item, image_bytes) -> bytes` makes the result of one item (by default the first image's own bytes). An exception
of our tree becomes the item's error. `hold()` keeps batches back until `release()`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.errors import Cancelled, ImagePoolError
from core.request import Span
from workers.arena import ArenaView
from workers.contract import PoolEvent, Said, WorkerDown, WorkerUp, WorkerView
from workers.messages import BatchDone, Drop, Finished, FromWorker, ItemsDone, RunBatch, RunItem, ToWorker

Work = Callable[[RunItem, bytes], bytes]


def same_bytes(_: RunItem, data: bytes) -> bytes:
    return data


@dataclass(slots=True)
class FakeWorker:
    name: str
    incarnation: int = 0
    up: bool = False
    held: list[RunBatch] = field(default_factory=list)
    ran: list[RunBatch] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)


class MemoryPool:
    def __init__(
        self, arena: ArenaView, workers: Sequence[str] = ("cpu:0", "cpu:1"), work: Work = same_bytes, root: str = ".",
        boots: bool = True,
    ) -> None:
        self.workers = {name: FakeWorker(name) for name in workers}
        self._arena, self._work, self._root, self._boots = arena, work, root, boots
        self.facts: Mapping[str, Any] = {}  # that every result comes with
        self._held = False
        self._stopped = False
        self._given_up = False
        self._listener: Callable[[PoolEvent], None] = lambda _: None

    async def start(self, listener: Callable[[PoolEvent], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        if self._boots:
            for name in self.workers:
                self._loop.call_soon(self.boot, name)

    def boot(self, name: str) -> None:
        """A new incarnation becomes ready."""
        worker = self.workers[name]
        worker.incarnation += 1
        worker.up = True
        self._listener(WorkerUp(name, worker.incarnation))

    def crash(self, name: str, cause: str = "killed by SIGKILL") -> None:
        """The incarnation dies with all it holds; another one boots."""
        worker = self.workers[name]
        worker.up = False
        worker.held.clear()
        self._listener(WorkerDown(name, worker.incarnation, cause))
        if not self._stopped:
            self._loop.call_soon(self.boot, name)

    def hold(self) -> None:
        """Batches are taken but not answered."""
        self._held = True

    def release(self) -> None:
        """Answer what was held back, and everything from now on."""
        self._held = False
        for name, worker in self.workers.items():
            for _ in list(worker.held):
                self.answer(name)

    def answer(self, name: str, job: str | None = None) -> None:
        """Answer the oldest batch that one worker holds, or that of a job: those that step end in any order."""
        worker = self.workers[name]
        held = (batch for batch in worker.held if job is None or any(item.job == job for item in batch.items))
        batch = next(held)
        worker.held.remove(batch)
        self._run(worker, worker.incarnation, batch)

    def say(self, name: str, message: FromWorker) -> None:
        """Let a worker say anything."""
        self._listener(Said(name, self.workers[name].incarnation, message))

    def send(self, worker: str, incarnation: int, *messages: ToWorker) -> None:
        fake = self.workers[worker]
        if not fake.up or fake.incarnation != incarnation:
            return
        for message in messages:
            if isinstance(message, Drop):
                fake.dropped.append(message.job)
            elif isinstance(message, RunBatch):
                fake.ran.append(message)
                if self._held:
                    fake.held.append(message)
                else:
                    self._loop.call_soon(self._run, fake, incarnation, message)

    def kill(self, worker: str, incarnation: int, why: str) -> None:
        if self.workers[worker].incarnation == incarnation:
            self._loop.call_soon(self.crash, worker, why)

    def retire(self, worker: str, incarnation: int) -> None:
        fake = self.workers[worker]
        if fake.up and fake.incarnation == incarnation:
            fake.up = False
            self._listener(WorkerDown(worker, incarnation, "stopped", "stopped"))
            self._loop.call_soon(self.boot, worker)

    def give_up(self) -> None:
        """Every worker dies, and none can be started again."""
        self._given_up = True
        for worker in self.workers.values():
            worker.up = False
            worker.held.clear()
            self._listener(WorkerDown(worker.name, worker.incarnation, "no driver", "boot_failed"))

    def revive(self) -> list[str]:
        revived, self._given_up = list(self.workers) if self._given_up else [], False
        for name in revived:
            self._loop.call_soon(self.boot, name)
        return revived

    async def stop(self, grace: float) -> None:
        self._stopped = True
        for worker in self.workers.values():
            if worker.up:
                worker.up = False
                self._listener(WorkerDown(worker.name, worker.incarnation, "stopped", "stopped"))

    def view(self) -> list[WorkerView]:
        return [
            WorkerView(
                worker=fake.name, index=index, kind="cpu", name="in memory",
                state="ready" if fake.up else "stopped" if self._stopped else "given_up" if self._given_up
                else "starting", detail="no driver" if self._given_up else "", pid=None,
                alive=fake.up, incarnation=fake.incarnation, restarts=max(0, fake.incarnation - 1), progress=1.0,
            )
            for index, fake in enumerate(self.workers.values())
        ]

    def _run(self, worker: FakeWorker, incarnation: int, batch: RunBatch) -> None:
        if worker.up and worker.incarnation == incarnation:
            items = tuple(self._finish(worker, item) for item in batch.items)
            self._listener(Said(worker.name, incarnation, ItemsDone(batch.batch, items)))
            self._listener(Said(worker.name, incarnation, BatchDone(batch.batch, 0.001)))

    def _finish(self, worker: FakeWorker, item: RunItem) -> Finished:
        try:
            if item.job in worker.dropped:
                raise Cancelled("the job was cancelled before it ran")
            data = self._work(item, self._bytes(item))
        except ImagePoolError as fault:
            return Finished(item.job, error=fault.info())
        self._arena.room(item.output)[: len(data)] = data
        height, width = item.size
        return Finished(item.job, len(data), item.format.format, width, height, {"compute": 0.001}, self.facts)

    def _bytes(self, item: RunItem) -> bytes:
        if not item.images:
            return b""
        data = item.images[0].data
        if isinstance(data, Span):
            return bytes(self._arena.view(data))
        return Path(self._root, data).read_bytes() if isinstance(data, str) else bytes(data)

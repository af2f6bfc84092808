"""Whatever happens in whatever order: every job ends once, somebody hears of it, and nothing is left."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest
from engine_kit import engine, png, request

from core import errors
from core.request import Priority
from core.states import State
from workers.messages import BatchDidNotFit, BatchDone, Finished, ItemsDone, JobProgress

WORKERS = ("cpu:0", "cpu:1", "cpu:2")
SIZES = ((16, 12), (32, 16), (64, 64))


class Storm:
    """Clients and accidents, drawn by one generator."""

    def __init__(self, made, pool, chance: random.Random) -> None:
        self.made, self.pool, self.chance = made, pool, chance
        self.durable: list[str] = []
        self.running: list[asyncio.Task] = []
        self.outcomes: Counter[str] = Counter()

    async def submit(self) -> None:
        asked = self._request()
        try:
            self.durable.append((await self.made.submit(asked)).id)
        except (errors.Overloaded, errors.Draining):
            self.outcomes["refused"] += 1

    async def run(self) -> None:
        self.running.append(asyncio.create_task(self._follow(self._request(durable=False))))

    def _request(self, **more):
        width, height = self.chance.choice(SIZES)
        deadline = self.chance.choice([None, None, None, 0.02, 5.0])
        priority = Priority(self.chance.randrange(4))
        body = png(self.chance.randrange(1000), width, height)
        return request(body, deadline=deadline, priority=priority, tenant=self.chance.choice("abc"), **more)

    async def _follow(self, asked) -> None:
        try:
            _, body = await self.made.run(asked)
            assert body.data == asked.images[0].data, "another job's image"
            self.outcomes["succeeded"] += 1
        except errors.ImagePoolError as fault:
            self.outcomes[fault.code] += 1

    async def leave(self) -> None:
        if self.running:
            self.chance.choice(self.running).cancel()

    async def cancel(self) -> None:
        if self.durable:
            await self.made.cancel(self.chance.choice(self.durable))

    async def crash(self) -> None:
        name = self.chance.choice(WORKERS)
        if self.pool.workers[name].up:
            self.pool.crash(name)

    async def answer(self) -> None:
        if busy := [name for name in WORKERS if self.pool.workers[name].held]:
            self.pool.answer(self.chance.choice(busy))

    async def answer_late(self) -> None:
        """A batch is answered twice, with progress in between, and the end of another that never was."""
        if busy := [name for name in WORKERS if self.pool.workers[name].held]:
            name = self.chance.choice(busy)
            batch = self.pool.workers[name].held[0]
            self.pool.answer(name)
            for item in batch.items:
                self.pool.say(name, JobProgress(item.job, 0.5))
                self.pool.say(name, ItemsDone(batch.batch, (Finished(item.job, 1),)))
            self.pool.say(name, BatchDone(batch.batch, 1.0))
            self.pool.say(name, BatchDone(10**6, 1.0))

    async def forget_items(self) -> None:
        """The worker says that a batch is done of which it has answered the half."""
        if busy := [name for name in WORKERS if self.pool.workers[name].held]:
            name = self.chance.choice(busy)
            self.pool.say(name, BatchDone(self.pool.workers[name].held.pop(0).batch, 0.1))

    async def run_out_of_memory(self) -> None:
        if busy := [name for name in WORKERS if self.pool.workers[name].held]:
            name = self.chance.choice(busy)
            self.pool.say(name, BatchDidNotFit(self.pool.workers[name].held.pop(0).batch, "full"))

    async def breathe(self) -> None:
        await asyncio.sleep(self.chance.choice([0, 0, 0.001, 0.005]))


@pytest.mark.parametrize("seed", range(12))
async def test_a_storm_of_clients_and_accidents(tmp_path, seed):
    chance, defects = random.Random(seed), []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: defects.append(context))
    arena = (1 if seed % 2 else 64) << 20  # room for everything, or for some batches only
    async with engine(tmp_path, workers=WORKERS, queue_jobs=60, arena_bytes=arena) as (made, pool):
        pool.hold()
        storm = Storm(made, pool, chance)
        acts = [storm.submit, storm.run, storm.answer, storm.breathe] * 3
        acts += [storm.leave, storm.cancel, storm.crash, storm.answer_late, storm.forget_items, storm.run_out_of_memory]
        for _ in range(400):
            await chance.choice(acts)()
            made.scheduler.check()
        pool.release()
        await asyncio.wait_for(asyncio.gather(*storm.running, return_exceptions=True), 30)
        faults = [task.exception() for task in storm.running if not task.cancelled() and task.exception()]
        assert not faults
        ended = [await made.wait(job, 30) for job in storm.durable]
        assert all(job.state.ended for job in ended)
        for job in ended:
            assert sum(move.state.ended for move in job.history) == 1
            stored = made._keeper.jobs.load(job.id)
            assert (stored.state, stored.history, stored.error) == (job.state, job.history, job.error)
            assert job.error is None or job.error.code != "storage_full", "it was accepted"
            if job.state is State.SUCCEEDED:
                assert (await made.result(job.id)).size > 0
        async with asyncio.timeout(30):
            while made.flights or made.register.live:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        assert made.arena.spans == 0 and made.admission.jobs == 0 and made.admission.bytes == 0
        assert not any((tmp_path / "inputs").iterdir())
        assert storm.outcomes["succeeded"]
    assert not defects, defects[:3]


@pytest.mark.parametrize("seed", range(6))
async def test_a_stop_in_the_middle_of_a_storm_loses_no_durable_job(tmp_path, seed):
    chance, defects = random.Random(seed), []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: defects.append(context))
    async with engine(tmp_path, workers=WORKERS) as (made, pool):
        pool.hold()
        storm = Storm(made, pool, chance)
        acts = [storm.submit, storm.run, storm.answer, storm.breathe] * 3 + [storm.leave, storm.crash, storm.cancel]
        for _ in range(60):
            await chance.choice(acts)()
        if seed % 2:
            made.drain()
            for _ in range(20):
                await chance.choice(acts)()
        await made.stop(grace=0)
        await asyncio.wait_for(asyncio.gather(*storm.running, return_exceptions=True), 30)
        assert made.arena.spans == 0
    async with engine(tmp_path, workers=WORKERS) as (made, _):
        ended = [await made.wait(job, 30) for job in storm.durable]
        assert all(job.state.ended for job in ended)
        assert {job.error.code for job in ended if job.state is State.FAILED} <= {"poisonous_job"}
    assert not defects, defects[:3]

"""Accidents that meet: a cancel and an end, a disk that does not flush, a late word from the dead."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import time
from concurrent.futures import Future
from dataclasses import replace

import pytest
from engine_kit import engine, png, request

from core import errors
from core.states import State
from engine import keeper
from workers.contract import Said
from workers.messages import BatchDone, Finished, ItemsDone, JobProgress

SUCCESS, CANCELLED = State.SUCCEEDED, State.CANCELLED


async def until(what, seconds=10.0):
    async with asyncio.timeout(seconds):
        while not what():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def test_a_cancel_that_races_the_end_gives_one_end_and_everybody_hears_the_same(tmp_path):
    chance, ends = random.Random(1), set()
    async with engine(tmp_path, workers=("cpu:0",)) as (made, pool):
        pool.hold()

        async def pause():
            for _ in range(chance.randrange(0, 20)):
                await asyncio.sleep(0 if chance.random() < 0.8 else 0.0005)

        async def answer():
            while True:
                await pause()
                if pool.workers["cpu:0"].held:
                    pool.answer("cpu:0")
                await asyncio.sleep(0)

        async def race(number):
            job = await made.submit(request(png(number)))
            stream = asyncio.create_task(read(job))
            await until(lambda: job.state is not State.QUEUED)
            await pause()
            heard = (await made.cancel(job.id)).state
            again = (await made.cancel(job.id)).state
            end = (await made.wait(job.id, 10)).state
            assert heard == again == end
            assert [move.state for move in job.history if move.state.ended] == [end] == (await stream)[-1:]
            stored = made._keeper.jobs.load(job.id)
            assert stored.state is end and stored.history == job.history
            if end is SUCCESS:
                assert (await made.result(job.id)).data.read_bytes() == png(number)
            else:
                with pytest.raises(errors.Cancelled):
                    await made.result(job.id)
            return end

        async def read(job):
            return [State(event.data["state"]) async for event in made.events(job.id) if event.kind == "state"]

        answering = asyncio.create_task(answer())
        for first in range(0, 60, 6):
            ends |= set(await asyncio.gather(*(race(number) for number in range(first, first + 6))))
        await until(lambda: not made.flights)
        answering.cancel()
        assert made.arena.spans == 0 and made.admission.jobs == 0 and made.admission.bytes == 0
        stored = {file.stem for file in tmp_path.glob("*.png")}
        succeeded = {job.id for job in await made.jobs(None, limit=100) if job.state is SUCCESS}
        assert stored == succeeded, "a cancelled job leaves no result behind"
    assert ends == {SUCCESS, CANCELLED}, "both happened"


async def test_a_flush_that_fails_refuses_new_jobs_and_holds_ended_ones_until_it_works_again(tmp_path, monkeypatch):
    monkeypatch.setattr(keeper, "RETRY", 0.01)
    broken, flush, tries = False, os.fsync, 0

    def fsync(fd):
        nonlocal tries
        tries += broken
        if broken:
            raise OSError(errno.EIO, "Input/output error")
        flush(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    async with engine(tmp_path, workers=("cpu:0",)) as (made, pool):
        pool.hold()
        job = await made.submit(request(png(1)))
        await until(lambda: pool.workers["cpu:0"].held)
        broken = True
        with pytest.raises(errors.StorageFailed) as refused:
            await made.submit(request(png(2)))
        assert refused.value.retryable and str(tmp_path) not in refused.value.message
        assert len(list((tmp_path / "inputs").iterdir())) == 1 and made.admission.jobs == 1, "nothing of it stays"
        pool.release()
        tries = 0
        await until(lambda: tries > 3)
        assert job.state is State.RUNNING and made._keeper.waiting
        assert (await made.run(request(png(3), durable=False)))[1].data == png(3), "what stores nothing goes on"
        broken = False
        assert (await made.wait(job.id, 10)).state is SUCCESS
        assert (await made.result(job.id)).data.read_bytes() == png(1)
        assert (await made.wait((await made.submit(request(png(4)))).id, 10)).state is SUCCESS
        assert not made._keeper.waiting


async def test_a_job_that_cannot_be_written_down_leaves_neither_files_nor_a_place_in_the_queue(tmp_path, monkeypatch):
    async with engine(tmp_path) as (made, _):

        def insert(*_):
            future = Future()
            future.set_exception(errors.StorageFailed("the disk refuses"))
            return future

        keyed = replace(request(png(1)), idempotency_key="k")
        with monkeypatch.context() as patch:
            patch.setattr(made._keeper.jobs, "insert_row", insert)
            with pytest.raises(errors.StorageFailed):
                await made.submit(keyed)
        assert not any((tmp_path / "inputs").iterdir()) and made._keeper.files.usage() == 0
        assert made.admission.jobs == 0 and not made.register.live
        job = await made.submit(keyed)
        assert (await made.wait(job.id, 10)).state is SUCCESS, "its key is free again"


async def test_of_two_equal_requests_at_once_the_second_is_refused_before_it_writes_anything(tmp_path, monkeypatch):
    async with engine(tmp_path) as (made, _):
        written, real = [], made._keeper.files.put_inputs
        monkeypatch.setattr(
            made._keeper.files, "put_inputs", lambda id_, *more: written.append(id_) or real(id_, *more)
        )
        keyed = replace(request(png(1)), idempotency_key="k")
        outcomes = await asyncio.gather(*(made.submit(keyed) for _ in range(5)), return_exceptions=True)
        (job,) = [one for one in outcomes if not isinstance(one, Exception)]
        assert written == [job.id]
        assert all(isinstance(one, errors.IdempotencyInFlight) and one.retryable for one in outcomes if one is not job)


async def test_a_reader_of_events_loses_none_when_the_clock_is_set_back_an_hour(tmp_path, monkeypatch):
    async with engine(tmp_path, workers=("cpu:0",)) as (made, pool):
        pool.hold()
        job = await made.submit(request(png(1)))
        await until(lambda: job.state is State.RUNNING)
        made.register.live[job.id].event_feed()
        real = time.time
        seen = []
        for step, fraction in ((0, 0.2), (-3600, 0.4), (-1800, 0.6), (3600, 0.8)):
            monkeypatch.setattr(time, "time", lambda step=step: real() + step)
            pool.say("cpu:0", JobProgress(job.id, fraction))
            after = seen[-1].number if seen else 0
            stream = made.events(job.id, after=after)  # as one who comes back after every event
            while (event := await anext(stream)).data.get("progress") != fraction:
                seen.append(event)
            seen.append(event)
            await stream.aclose()
        pool.release()
        seen += [event async for event in made.events(job.id, after=seen[-1].number)]
        told = [event.data["progress"] for event in seen if event.kind == "progress"]
        assert told == [0.2, 0.4, 0.6, 0.8], "each once, in order"
        assert seen[-1].data["state"] == "succeeded"
        numbers = [event.number for event in seen]
        assert numbers == sorted(set(numbers))


async def test_retention_that_cannot_remove_a_record_removes_no_file(tmp_path, monkeypatch):
    async with engine(tmp_path) as (made, _):
        job = await made.wait((await made.submit(request(png(1)))).id, 10)

        def delete(_):
            raise errors.StorageFailed("the disk refuses")

        monkeypatch.setattr(made._keeper, "_max_age", 1e-9)
        with monkeypatch.context() as patch:
            patch.setattr(made._keeper.jobs, "delete", delete)
            with pytest.raises(errors.StorageFailed):
                await made.forget_old()
        assert (await made.result(job.id)).data.read_bytes() == png(1), "never a job whose image is gone"
        await made.forget_old()
        assert not list(tmp_path.glob("*.png"))


async def test_a_worker_that_is_lost_while_its_result_is_being_stored_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(keeper, "RETRY", 0.01)
    async with engine(tmp_path, workers=("cpu:0",)) as (made, pool):
        real, stuck = made._keeper.files.put_result, True

        def put_result(*given):
            if stuck:
                raise errors.StorageFull("the disk is full")
            return real(*given)

        monkeypatch.setattr(made._keeper.files, "put_result", put_result)
        pool.hold()
        job = await made.submit(request(png(1)))
        await until(lambda: pool.workers["cpu:0"].held)
        batch = pool.workers["cpu:0"].held[0]
        place = batch.items[0].output
        made.arena.room(place)[: len(png(1))] = png(1)
        pool.say("cpu:0", ItemsDone(batch.batch, (Finished(job.id, len(png(1)), "png", 16, 12),)))
        await until(lambda: made._keeper.waiting)
        pool.crash("cpu:0")
        pool.release()
        others = [await made.run(request(png(seed), durable=False)) for seed in range(20, 40)]
        assert [body.data for _, body in others] == [png(seed) for seed in range(20, 40)]
        stuck = False
        assert (await made.wait(job.id, 10)).state is SUCCESS and job.attempts == 1
        assert (await made.result(job.id)).data.read_bytes() == png(1), "its memory was nobody else's meanwhile"


async def test_memory_of_a_batch_is_nobody_elses_before_its_worker_is_reaped_or_lets_go(tmp_path):
    async with engine(tmp_path, workers=("cpu:0",)) as (made, pool):
        pool.hold()
        leaving = asyncio.create_task(made.run(request(png(1), durable=False)))
        await until(lambda: pool.workers["cpu:0"].held)
        batch = pool.workers["cpu:0"].held[0]
        ours = {batch.items[0].output.offset, batch.items[0].images[0].data.offset}
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        spans = [made.arena.take(len(png(1))) for _ in range(50)] + [made.arena.take(70_000) for _ in range(50)]
        assert not ours & {span.offset for span in spans}, "the worker may still read and write there"
        pool.say("cpu:0", ItemsDone(batch.batch, (Finished(batch.items[0].job, 3, "png", 16, 12),)))
        later = [made.arena.take(len(png(1))) for _ in range(50)]
        pool.say("cpu:0", BatchDone(batch.batch, 0.1))
        assert made.arena.spans == 100 + len(later), "then everything has come back"
        for span in spans + later:
            made.arena.give(span)


async def test_words_of_a_dead_incarnation_end_no_job_and_free_no_memory(tmp_path):
    async with engine(tmp_path, workers=("cpu:0",)) as (made, pool):
        pool.hold()
        job = await made.submit(request(png(1)))
        await until(lambda: pool.workers["cpu:0"].held)
        old = pool.workers["cpu:0"].held[0]
        pool.crash("cpu:0")
        await until(lambda: pool.workers["cpu:0"].held)
        new, spans = pool.workers["cpu:0"].held[0], made.arena.spans
        for number in (old.batch, new.batch):
            for message in (ItemsDone(number, (Finished(job.id, 3, "png", 16, 12),)), BatchDone(number, 0.1)):
                made._arrivals.take_in(Said("cpu:0", 1, message))
        await asyncio.sleep(0)
        assert job.state is State.RUNNING and made.arena.spans == spans and len(made.flights) == 1
        pool.release()
        assert (await made.wait(job.id, 10)).state is SUCCESS
        assert (await made.result(job.id)).data.read_bytes() == png(1)


async def test_a_steady_stream_of_jobs_leaves_nothing_behind_in_the_master(tmp_path):
    async with engine(tmp_path) as (made, _):
        always = len(made._tasks)
        for round_ in range(3):
            await asyncio.gather(*(made.run(request(png(seed), durable=False)) for seed in range(40)))
            await asyncio.gather(*(leave(made, seed) for seed in range(20)))
            jobs = [await made.submit(request(png(round_ * 100 + seed))) for seed in range(10)]
            for job in jobs:
                await made.wait(job.id, 10)
            await until(lambda: not made.flights and not made.register.live)
            await until(lambda: len(made._tasks) <= always)
            assert made.arena.spans == made.admission.jobs == made.admission.bytes == 0
            assert not made.watched and not made._keeper._accepting
        assert made.scheduler.position(jobs[0].id) is None


async def leave(made, seed):
    task = asyncio.create_task(made.run(request(png(seed), durable=False)))
    for _ in range(seed % 7):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)

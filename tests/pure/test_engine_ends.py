"""The engine where ends meet accidents: draining, stopping, a disk that refuses at that moment, a changed model."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections import Counter

import pytest
from engine_kit import TEST_MODELS, engine, png, request

from core import errors
from core.states import State
from engine.feed import KEPT
from workers.messages import BatchDone, Finished, ItemsDone, JobProgress


async def until(what, seconds=10.0):
    async with asyncio.timeout(seconds):
        while not what():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def test_a_stop_in_the_middle_of_a_batch_tells_its_client_and_releases_everything(tmp_path):
    async with engine(tmp_path, workers=("cpu:0",)) as (made, pool):
        pool.hold()
        running = asyncio.create_task(made.run(request(png(1), durable=False)))
        durable = await made.submit(request(png(2)))
        await until(lambda: pool.workers["cpu:0"].held and made.register.live)
        await made.stop(grace=0)
        with pytest.raises(errors.WorkerLost):
            await running
        assert made.arena.spans == 0 and made.admission.jobs == 1, "only the durable job still has its place"
    async with engine(tmp_path) as (made, _):  # the folder is free, and the job is found
        assert (await made.wait(durable.id, 10)).state is State.SUCCEEDED


async def test_a_request_whose_body_arrived_while_the_server_began_to_drain_is_sent_away_at_once(tmp_path):
    async with engine(tmp_path) as (made, _):
        permit = made.admit(100)
        permit.buffer[:2] = b"ab"
        made.drain()
        with pytest.raises(errors.Draining):
            await made.run(request(png(1), durable=False), permit)
        assert made.arena.spans == 0 and made.admission.jobs == 0


async def test_a_request_that_loses_its_worker_while_the_server_drains_is_sent_away_at_once(tmp_path):
    async with engine(tmp_path, workers=("cpu:0",)) as (made, pool):
        pool.hold()
        running = asyncio.create_task(made.run(request(png(1), durable=False)))
        durable = await made.submit(request(png(2)))
        await until(lambda: pool.workers["cpu:0"].held)
        made.drain()
        pool.crash("cpu:0")
        with pytest.raises(errors.Draining):
            await asyncio.wait_for(running, 10)
        assert durable.state is State.QUEUED, "it waits for the next start"


async def test_the_grace_of_a_stop_counts_from_the_moment_it_was_asked_for(tmp_path):
    async with engine(tmp_path, workers=("cpu:0",)) as (made, pool):
        pool.hold()
        await made.submit(request(png(1)))
        await until(lambda: pool.workers["cpu:0"].held)
        made.drain()
        made._shutdown._began -= 3600  # an hour ago
        await asyncio.wait_for(made.stop(grace=3600), 30)


async def test_the_end_of_a_job_is_stored_as_it_is_told(tmp_path):
    async with engine(tmp_path) as (made, _):
        told = await made.wait((await made.submit(request(png(1)))).id, 10)
        stored = made._keeper.jobs.load(told.id)
        assert stored.ended_at == told.ended_at and stored.history == told.history


async def test_a_job_whose_inputs_cannot_be_removed_ends_all_the_same(tmp_path):
    async with engine(tmp_path, workers=("cpu:0",)) as (made, pool):
        pool.hold()
        job = await made.submit(request(png(1)))
        (tmp_path / "inputs" / job.id / "strange").mkdir()
        pool.release()
        assert (await made.wait(job.id, 10)).state is State.SUCCEEDED
        (tmp_path / "inputs" / job.id / "strange").rmdir()


async def test_inputs_of_an_ended_job_that_a_crash_left_are_swept_at_the_next_start(tmp_path):
    async with engine(tmp_path) as (made, _):
        job = await made.wait((await made.submit(request(png(1)))).id, 10)
        await until(lambda: not any((tmp_path / "inputs").iterdir()))
        await asyncio.to_thread(made._keeper.files.put_input, job.id, 0, "image", "png", png(1))
    async with engine(tmp_path) as (made, _):
        assert not any((tmp_path / "inputs").iterdir())
        assert (await made.result(job.id)).data.exists()


async def test_an_answer_that_the_store_cannot_keep_fails_its_job_instead_of_leaving_it_running(tmp_path):
    async with engine(tmp_path, workers=("cpu:0",)) as (made, pool):
        pool.hold()
        job = await made.submit(request(png(1)))
        await until(lambda: pool.workers["cpu:0"].held)
        batch = pool.workers["cpu:0"].held.pop()
        answer = Finished(job.id, 3, "png", 16, 12, facts={"what": object()})
        for message in (ItemsDone(batch.batch, (answer,)), BatchDone(batch.batch, 0.1)):
            pool.say("cpu:0", message)
        assert (await made.wait(job.id, 10)).state is State.FAILED
        assert job.error.code == "internal_error" and job.result is None
        assert made._keeper.jobs.load(job.id).error == job.error
        assert made.arena.spans == 0 and made.admission.jobs == 0


async def test_a_result_in_a_format_that_no_file_can_have_fails_its_job(tmp_path):
    async with engine(tmp_path, workers=("cpu:0",)) as (made, pool):
        pool.hold()
        job = await made.submit(request(png(1)))
        await until(lambda: pool.workers["cpu:0"].held)
        batch = pool.workers["cpu:0"].held.pop()
        pool.say("cpu:0", ItemsDone(batch.batch, (Finished(job.id, 3, "../x", 16, 12),)))
        assert (await made.wait(job.id, 10)).error.code == "internal_error"
        pool.say("cpu:0", BatchDone(batch.batch, 0.1))


async def test_jobs_stored_for_a_model_that_has_changed_since_do_not_keep_the_server_from_starting(tmp_path):
    models = tmp_path / "models"
    models.mkdir()
    stub = (TEST_MODELS / "stub.toml").read_text()
    (models / "stub.toml").write_text(stub)
    async with engine(tmp_path / "o", boots=False, models_folder=models) as (made, _):
        job = await made.submit(request(png(1)))
    (models / "stub.toml").write_text(stub + '\n[params.added]\ntype = "int"\nrequired = true\ngroup = true\n')
    async with engine(tmp_path / "o", models_folder=models) as (made, _):
        ended = await made.wait(job.id, 10)
        assert ended.state is State.FAILED
        assert ended.error.code == "invalid_parameter" and "added" in ended.error.message
    (models / "stub.toml").write_text(stub)
    async with engine(tmp_path / "o", boots=False, models_folder=models) as (made, _):
        job = await made.submit(request(png(2)))
    (models / "stub.toml").write_text(stub + '\n[params.added]\ntype = "int"\ndefault = 3\ngroup = true\n')
    async with engine(tmp_path / "o", models_folder=models) as (made, _):
        ended = await made.wait(job.id, 10)
        assert ended.state is State.SUCCEEDED, "a parameter with a default is filled in"


async def test_a_second_signal_does_not_wait_for_a_disk_that_is_full(tmp_path, monkeypatch):
    async with engine(tmp_path, workers=("cpu:0",)) as (made, _):

        def full(*_):
            raise errors.StorageFull("the disk is full")

        monkeypatch.setattr(made._keeper.files, "put_result", full)
        job = await made.submit(request(png(1)))
        await until(lambda: made._keeper.waiting)
        made.drain()
        made.hurry()
        await asyncio.wait_for(made.stop(grace=3600), 30)
        assert job.state is State.RUNNING
    async with engine(tmp_path) as (made, _):
        assert (await made.wait(job.id, 10)).state is State.SUCCEEDED


async def test_a_second_signal_is_heard_while_the_first_waits_for_a_disk_that_is_full(tmp_path, monkeypatch):
    async with engine(tmp_path, workers=("cpu:0",)) as (made, _):

        def full(*_):
            raise errors.StorageFull("the disk is full")

        monkeypatch.setattr(made._keeper.files, "put_result", full)
        await made.submit(request(png(1)))
        await until(lambda: made._keeper.waiting)
        stopping = asyncio.create_task(made.stop(grace=3600))
        await until(lambda: made.draining and not made.flights)
        await asyncio.sleep(0.1)
        made.hurry()
        await asyncio.wait_for(stopping, 30)


async def test_shared_memory_that_a_permit_took_for_a_durable_job_is_given_back(tmp_path):
    async with engine(tmp_path) as (made, _):
        permit = made.admit(1000)
        permit.buffer[:3] = b"abc"
        job = await made.submit(request(png(1)), permit)
        await made.wait(job.id, 10)
        assert made.arena.spans == 0


async def test_the_disk_is_not_asked_on_the_event_loop(tmp_path, monkeypatch):
    asked: list[threading.Thread] = []
    async with engine(tmp_path) as (made, _):
        real = made._keeper.files.room
        monkeypatch.setattr(
            made._keeper.files, "room", lambda extra=0: (asked.append(threading.current_thread()), real(extra))
        )
        await made.submit(request(png(1)))
    assert asked and threading.main_thread() not in asked


async def test_who_waits_for_a_job_that_waits_is_let_go_when_the_server_begins_to_stop(tmp_path):
    async with engine(tmp_path, workers=("cpu:0",)) as (made, pool):
        pool.hold()
        running = await made.submit(request(png(1)))
        await until(lambda: running.state is State.RUNNING)
        queued = await made.submit(request(png(2, 64, 64)))

        async def read(job):
            return [event.data.get("state", event.kind) async for event in made.events(job.id)
                    if event.kind in ("state", "stopping")]

        waiting = asyncio.create_task(made.wait(queued.id, 3600))
        streams = [asyncio.create_task(read(job)) for job in (running, queued)]
        await until(lambda: len(made.watched) == 2)
        made.drain()
        assert (await asyncio.wait_for(waiting, 10)).state is State.QUEUED
        assert await asyncio.wait_for(streams[1], 10) == ["queued", "stopping"]
        assert await asyncio.wait_for(read(queued), 10) == ["queued", "stopping"], "also one who comes later"
        pool.release()
        assert await streams[0] == ["queued", "running", "succeeded"]
        assert not made.watched


async def test_a_long_stream_of_progress_does_not_make_a_reader_miss_a_state(tmp_path):
    async with engine(tmp_path, workers=("cpu:0",)) as (made, pool):
        pool.hold()
        job = await made.submit(request(png(1)))
        await until(lambda: job.state is State.RUNNING)
        made.register.live[job.id].event_feed()
        for step in range(2 * KEPT):
            pool.say("cpu:0", JobProgress(job.id, step / (2 * KEPT)))
        pool.release()
        events = [event async for event in made.events(job.id)]
        assert [event.data["state"] for event in events if event.kind == "state"] == ["queued", "running", "succeeded"]
        assert len(events) <= KEPT + 2


async def test_a_batch_waits_for_shared_memory_that_others_hold_and_no_accepted_job_fails_for_it(tmp_path):
    async with engine(tmp_path, arena_bytes=4 << 20) as (made, pool):
        pool.hold()
        jobs = [await made.submit(request(png(seed, 600, 500))) for seed in range(4)]  # 2 MB for each result
        await until(lambda: any(worker.held for worker in pool.workers.values()))
        assert len(made.flights) == 1, "there is room for one result only"
        cancelled = next(job for job in jobs if not any(job.id == item.job for worker in pool.workers.values()
                                                        for batch in worker.held for item in batch.items))
        await made.cancel(cancelled.id)
        pool.release()
        states = Counter([(await made.wait(job.id, 30)).state for job in jobs])
        assert states == {State.SUCCEEDED: 3, State.CANCELLED: 1}
        await until(lambda: not made.flights)
        assert made.arena.spans == 0


async def test_a_batch_that_waits_for_shared_memory_goes_elsewhere_when_its_worker_dies(tmp_path):
    async with engine(tmp_path, arena_bytes=4 << 20) as (made, pool):
        pool.hold()
        jobs = [await made.submit(request(png(seed, 600, 500))) for seed in range(2)]
        await until(lambda: [job.state for job in jobs] == [State.RUNNING, State.RUNNING])
        waits = next(name for name, worker in pool.workers.items() if not worker.held)
        pool.crash(waits)
        pool.release()
        assert [(await made.wait(job.id, 30)).state for job in jobs] == [State.SUCCEEDED] * 2


async def test_a_stored_job_that_cannot_be_read_does_not_keep_the_server_or_the_others_from_running(tmp_path):
    async with engine(tmp_path, boots=False) as (made, _):
        damaged, whole = [await made.submit(request(png(seed))) for seed in range(2)]
    with sqlite3.connect(tmp_path / "jobs.sqlite") as db:
        db.execute("UPDATE jobs SET life = '{' WHERE id = ?", (damaged.id,))
    async with engine(tmp_path) as (made, _):
        assert (await made.wait(whole.id, 10)).state is State.SUCCEEDED
        assert (tmp_path / "inputs" / damaged.id).exists(), "a person may still want to look at it"


async def test_after_a_restart_all_counts_go_on_or_none(tmp_path):
    async with engine(tmp_path) as (made, _):
        for seed in range(3):
            await made.run(request(png(seed), durable=False))
        ended = [await made.wait((await made.submit(request(png(seed)))).id, 10) for seed in range(2)]
        before = made.snapshot()["jobs"]
        assert (before["total"], before["succeeded"]) == (5, 5)
    async with engine(tmp_path, retention_age=1e-9) as (made, _):
        assert made.snapshot()["jobs"] == before
        await made.forget_old()
        with pytest.raises(errors.JobNotFound):
            await made.job(ended[0].id)
    async with engine(tmp_path, boots=False) as (made, _):
        assert made.snapshot()["jobs"] == before, "also those that retention has removed"
        await made.submit(request(png(9)))
    async with engine(tmp_path, boots=False) as (made, _):
        assert made.snapshot()["jobs"] == before | {"total": 6, "queued": 1}


async def test_a_clock_that_is_set_does_not_change_for_how_long_the_server_is_up(tmp_path, monkeypatch):
    async with engine(tmp_path) as (made, _):
        monkeypatch.setattr("time.time", lambda: 0.0)
        assert 0 <= made.snapshot()["uptime"] < 3600

"""The engine with everything real but the processes: every accepted job ends once, and somebody hears of it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest
import structlog
from engine_kit import engine, png, request

from core import errors
from core.states import State
from engine.stranded import waits_for


async def until(what, seconds=10.0):
    async with asyncio.timeout(seconds):
        while not what():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def test_an_ephemeral_request_gets_its_own_bytes_back_and_leaves_nothing(tmp_path):
    async with engine(tmp_path) as (made, _):
        bodies = [png(seed) for seed in range(20)]
        answers = await asyncio.gather(*(made.run(request(body, durable=False)) for body in bodies))
        assert [body.data for _, body in answers] == bodies
        assert all(job.state is State.SUCCEEDED for job, _ in answers)
        await until(lambda: not made.flights)
        assert made.arena.spans == 0 and made.admission.bytes == 0 and not made.register.live
        assert await made.jobs(None) == []


async def test_a_durable_job_is_on_disk_before_its_acceptance_is_told(tmp_path):
    async with engine(tmp_path, boots=False) as (made, _):
        job = await made.submit(request())
        stored = made._keeper.jobs.load(job.id)
        assert stored is not None and stored.state is State.QUEUED
        assert (tmp_path / stored.request.images[0].data).read_bytes() == png()


async def test_a_durable_job_ends_with_its_result_stored_its_inputs_gone_and_its_history_kept(tmp_path):
    async with engine(tmp_path) as (made, _):
        job = await made.wait((await made.submit(request(png(5)))).id, 10)
        body = await made.result(job.id)
        assert body.data.read_bytes() == png(5) and body.media_type == "image/png"
        stored = made._keeper.jobs.load(job.id)
        assert stored.state is State.SUCCEEDED and stored.result.device.startswith("cpu:")
        assert [move.state for move in stored.history] == [State.QUEUED, State.RUNNING, State.SUCCEEDED]
        await until(lambda: not any((tmp_path / "inputs").iterdir()))
        assert made.arena.spans == 0 and made.admission.bytes == 0


async def test_jobs_of_a_lost_worker_run_again_and_nobody_notices(tmp_path):
    async with engine(tmp_path) as (made, pool):
        pool.hold()
        waiting = [asyncio.create_task(made.run(request(png(seed), durable=False))) for seed in range(6)]
        await until(lambda: any(worker.held for worker in pool.workers.values()))
        for name, worker in pool.workers.items():
            if worker.held:
                pool.crash(name)
        pool.release()
        answers = await asyncio.gather(*waiting)
        assert [body.data for _, body in answers] == [png(seed) for seed in range(6)]
        assert max(job.attempts for job, _ in answers) == 2
        await until(lambda: not made.flights)
        assert made.arena.spans == 0


async def test_a_job_that_kills_every_worker_is_blamed_and_its_batch_mates_are_not(tmp_path):
    async with engine(tmp_path) as (made, pool):
        pool.hold()
        jobs = [await made.submit(request(png(seed))) for seed in range(3)]
        poison = jobs[1].id

        def kill_holders_of_poison():
            for name, worker in pool.workers.items():
                if worker.held and any(item.job == poison for item in worker.held[0].items):
                    pool.crash(name)
                elif worker.held:
                    pool.answer(name)

        async with asyncio.timeout(10):
            while not all(job.state.ended for job in jobs):
                kill_holders_of_poison()
                await asyncio.sleep(0.001)
        assert jobs[1].state is State.FAILED and jobs[1].error.code == "poisonous_job"
        assert [jobs[0].state, jobs[2].state] == [State.SUCCEEDED, State.SUCCEEDED]


async def test_a_client_that_leaves_cancels_its_job_in_the_queue_and_at_the_worker(tmp_path):
    async with engine(tmp_path, workers=("cpu:0",)) as (made, pool):
        pool.hold()
        running = asyncio.create_task(made.run(request(png(1), durable=False)))
        await until(lambda: pool.workers["cpu:0"].held)
        waiting = asyncio.create_task(made.run(request(png(2, 64, 64), durable=False)))
        await until(lambda: len(made.register.live) == 2)
        for task in (running, waiting):
            task.cancel()
        await asyncio.gather(running, waiting, return_exceptions=True)
        assert not made.register.live and made.admission.bytes == 0
        assert len(pool.workers["cpu:0"].dropped) >= 1
        assert made.arena.spans > 0, "memory of a batch that still runs must not be given away"
        pool.release()
        await until(lambda: made.arena.spans == 0)


async def test_cancel_in_every_state_and_twice(tmp_path):
    async with engine(tmp_path, workers=("cpu:0",)) as (made, pool):
        pool.hold()
        running = await made.submit(request(png(1)))
        queued = await made.submit(request(png(2, 64, 64)))
        await until(lambda: running.state is State.RUNNING)
        for job in (running, queued, running, queued):
            assert (await made.cancel(job.id)).state is State.CANCELLED
        pool.release()
        done = await made.wait((await made.submit(request(png(3)))).id, 10)
        assert (await made.cancel(done.id)).state is State.SUCCEEDED
        assert made._keeper.jobs.load(running.id).state is State.CANCELLED
        with pytest.raises(errors.Cancelled):
            await made.result(running.id)


async def test_a_deadline_expires_a_waiting_job(tmp_path):
    async with engine(tmp_path, boots=False) as (made, _):
        job = await made.submit(request(deadline=0.05))
        assert (await made.wait(job.id, 10)).state is State.EXPIRED
        with pytest.raises(errors.DeadlineExceeded):
            await made.result(job.id)


async def test_another_tenants_job_does_not_exist(tmp_path):
    async with engine(tmp_path) as (made, _):
        job = await made.submit(request(tenant="alice"))
        for ask in (made.job, made.result, made.cancel):
            with pytest.raises(errors.JobNotFound):
                await ask(job.id, "mallory")
        assert (await made.job(job.id, "alice")).id == job.id
        assert await made.jobs("mallory") == []


async def test_a_full_queue_refuses_with_a_time_and_takes_again_later(tmp_path):
    async with engine(tmp_path, queue_jobs=2) as (made, pool):
        pool.hold()
        first = [await made.submit(request(png(seed))) for seed in range(2)]
        with pytest.raises(errors.Overloaded) as refused:
            await made.submit(request())
        assert refused.value.retry_after and refused.value.retryable
        assert len(list((tmp_path / "inputs").iterdir())) == 2, "a refused job must store nothing"
        pool.release()
        for job in first:
            await made.wait(job.id, 10)
        await made.submit(request())


async def test_queued_and_running_jobs_of_a_dead_server_are_taken_up_by_the_next(tmp_path):
    async with engine(tmp_path, workers=("cpu:0",)) as (made, pool):
        pool.hold()
        jobs = [await made.submit(request(png(seed, 16 + 16 * seed))) for seed in range(5)]
        await until(lambda: jobs[0].state is State.RUNNING)
    async with engine(tmp_path) as (made, _):
        ended = [await made.wait(job.id, 10) for job in jobs]
        assert all(job.state is State.SUCCEEDED for job in ended)
        for seed, job in enumerate(ended):
            assert (await made.result(job.id)).data.read_bytes() == png(seed, 16 + 16 * seed)
        assert (await made.submit(request())).number == 6, "numbers go on over a restart"


async def test_idempotency_same_key_same_job_other_payload_refused_at_once_twice_in_flight(tmp_path):
    async with engine(tmp_path) as (made, _):
        keyed = replace(request(png(1)), idempotency_key="k")
        outcomes = await asyncio.gather(made.submit(keyed), made.submit(keyed), return_exceptions=True)
        first = next(job for job in outcomes if not isinstance(job, Exception))
        assert [type(fault) for fault in outcomes if isinstance(fault, Exception)] == [errors.IdempotencyInFlight]
        assert (await made.submit(keyed)).id == first.id
        with pytest.raises(errors.IdempotencyMismatch):
            await made.submit(replace(request(png(2)), idempotency_key="k"))
        other = await made.submit(replace(keyed, tenant="bob"))
        assert other.id != first.id
    async with engine(tmp_path) as (made, _):
        assert (await made.submit(keyed)).id == first.id, "a key outlives the server"


async def test_a_client_that_leaves_in_the_middle_of_its_upload_leaves_a_whole_job_or_none(tmp_path):
    async with engine(tmp_path) as (made, _):
        for pause in range(30):
            task = asyncio.create_task(made.submit(request(png(pause))))
            for _ in range(pause % 6):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await until(lambda: not made.register.live and made.admission.bytes == 0)
        jobs = await made.jobs(None, limit=100)
        ended = [await made.wait(job.id, 10) for job in jobs]
        assert {job.state for job in ended} <= {State.SUCCEEDED}


async def test_events_tell_every_state_and_go_on_where_a_reader_was(tmp_path):
    async with engine(tmp_path) as (made, pool):
        pool.hold()
        job = await made.submit(request())
        seen = []
        async for event in made.events(job.id):
            seen.append(event)
            pool.release()
        states = [event.data["state"] for event in seen if event.kind == "state"]
        assert states == ["queued", "running", "succeeded"]
        assert [event.number for event in seen] == sorted({event.number for event in seen})
        again = [event async for event in made.events(job.id, after=seen[0].number)]
        assert [event.data.get("state") for event in again if event.kind == "state"] == ["running", "succeeded"]
    async with engine(tmp_path) as (made, _):
        later = [event async for event in made.events(job.id, after=seen[0].number)]
        assert [event.data["state"] for event in later] == ["running", "succeeded"], "also after a restart"


async def test_a_clock_that_is_set_back_an_hour_loses_nothing_and_keeps_events_in_order(tmp_path, monkeypatch):
    async with engine(tmp_path) as (made, pool):
        pool.hold()
        job = await made.submit(request(deadline=5))
        real = time.time
        for step in (-3600, +3600):
            monkeypatch.setattr(time, "time", lambda step=step: real() + step)
            await made.submit(request(png(step % 7)))
        pool.release()
        assert (await made.wait(job.id, 10)).state is State.SUCCEEDED
        numbers = [event.number async for event in made.events(job.id)]
        assert numbers == sorted(set(numbers))


async def test_draining_refuses_new_work_sends_waiting_clients_away_and_keeps_durable_jobs(tmp_path):
    async with engine(tmp_path, workers=("cpu:0",)) as (made, pool):
        pool.hold()
        running = asyncio.create_task(made.run(request(png(1), durable=False)))
        await until(lambda: pool.workers["cpu:0"].held)
        waiting = asyncio.create_task(made.run(request(png(2, 64, 64), durable=False)))
        durable = await made.submit(request(png(3, 128, 64)))
        await until(lambda: len(made.register.live) == 3)
        made.drain()
        with pytest.raises(errors.Draining):
            await waiting
        with pytest.raises(errors.Draining):
            await made.submit(request())
        pool.release()
        assert (await running)[1].data == png(1), "what ran may finish"
        assert durable.state is State.QUEUED
    async with engine(tmp_path) as (made, _):
        assert (await made.wait(durable.id, 10)).state is State.SUCCEEDED


async def test_no_device_left_is_said_so(tmp_path):
    async with engine(tmp_path, boots=False) as (made, pool):
        await pool.stop(0)
        with pytest.raises(errors.NoDevice):
            made.admit(10)
        assert made.snapshot()["ready"] is False and made.snapshot()["reason"]


async def test_when_every_device_is_given_up_who_waits_is_told_and_a_revival_runs_the_rest(tmp_path):
    async with engine(tmp_path) as (made, pool):
        pool.hold()
        waiting = asyncio.create_task(made.run(request(png(1))))
        durable = await made.submit(request(png(2), durable=True))
        while not pool.workers["cpu:0"].held and not pool.workers["cpu:1"].held:  # noqa: ASYNC110
            await asyncio.sleep(0)
        pool.give_up()
        with pytest.raises(errors.NoDevice, match="no driver"):
            await asyncio.wait_for(waiting, 10)
        with pytest.raises(errors.NoDevice):
            await made.run(request(png(3)))
        assert durable.state is State.QUEUED and "no driver" in waits_for(made, durable)
        pool.release()
        made.roll()
        assert (await made.wait(durable.id, 10)).state is State.SUCCEEDED


async def test_a_result_taken_by_retention_is_gone_and_said_so(tmp_path):
    async with engine(tmp_path) as (made, _):
        job = await made.wait((await made.submit(request())).id, 10)
        (tmp_path / job.result.data).unlink()
        with pytest.raises(errors.ResultGone):
            await made.result(job.id)
    async with engine(tmp_path, retention_age=1e-9) as (made, _):
        await made.forget_old()
        with pytest.raises(errors.JobNotFound):
            await made.job(job.id)


async def test_shared_memory_used_up_fails_the_batch_with_a_sentence_and_the_server_goes_on(tmp_path):
    async with engine(tmp_path, arena_bytes=2 << 20) as (made, _):
        with pytest.raises(errors.StorageFull):
            await made.run(request(png(1, 2000, 300), durable=False))
        assert (await made.run(request(png(2), durable=False)))[1].data == png(2)
        assert made.arena.spans == 0


async def test_the_snapshot_tells_devices_queue_and_jobs(tmp_path):
    async with engine(tmp_path, workers=("cpu:0",)) as (made, pool):
        pool.hold()
        jobs = [await made.submit(request(png(seed))) for seed in range(3)]
        await until(lambda: jobs[0].state is State.RUNNING)
        told = made.snapshot()
        assert told["ready"] and told["workers"][0]["state"] == "busy"
        assert told["workers"][0]["current_batch"]["model"] == "stub"
        assert told["queue"]["queued"] + told["queue"]["running"] == 3
        assert sum(told["queue"]["by_priority"].values()) == told["queue"]["queued"]
        pool.release()
        for job in jobs:
            await made.wait(job.id, 10)
        told = made.snapshot()
        assert told["jobs"]["succeeded"] == 3 and told["workers"][0]["images"] == 3
        assert b"imagepool_jobs_total" in (await made.render_metrics())[0]


async def test_the_log_tells_of_each_durable_job_what_where_and_how_it_ended(tmp_path, caplog):
    with structlog.testing.capture_logs() as lines, caplog.at_level("DEBUG", "job"):
        async with engine(tmp_path) as (made, _):
            job = await made.wait((await made.submit(request(png(1, 40, 30)))).id, 10)
            await made.run(request(png(2), durable=False))
    told = [line for line in lines if line["event"] == "job ended"]
    assert [line["log_level"] for line in told] == ["info", "debug"]
    assert told[0] | {"seconds": 0} == {
        "event": "job ended", "log_level": "info", "job": job.id, "state": "succeeded", "model": "stub",
        "resolution": "40x30", "device": job.device, "dialect": "jobs", "attempts": 1, "seconds": 0,
        "request": None, "tenant": "anonymous",
    }  # fmt: skip

"""The engine with stepped jobs: seats, parking, previews, what is told of steps, and the ends of it all."""

from __future__ import annotations

import asyncio
import base64
import time
from dataclasses import replace

import httpx
import orjson
import pytest
from dialect_kit import serve, until
from engine_kit import engine, png
from engine_kit import request as plain_request

from core import errors
from core.model import read_spec
from core.request import Priority
from core.states import State
from engine.engine import Engine
from engine.steps import StepBook
from tests.step_model import SPEC, write_spec
from workers.messages import BatchDone, Finished, ItemsDone, JobParked, JobPreview, JobProgress, StepReport

ADDER = read_spec(SPEC.format(folder="", timeout=30.0), "adder")
ONE = ("cpu:0",)


def request(seed=1, **more):
    params = ADDER.check_params(more.pop("params", {}))
    return plain_request(png(seed), model="adder", params=params, **more)


def steps(tmp_path, **more):
    """An engine that offers `adder`, on one worker unless told otherwise."""
    write_spec(tmp_path / "models")
    return engine(tmp_path / "outputs", models_folder=tmp_path / "models", **{"workers": ONE, **more})


def report(forwards=0, rows=0, preemptions=0, speed=0.0, running=0, parked=0):
    return StepReport(forwards, rows, preemptions, speed, running, parked)


def held(pool, name="cpu:0"):
    return [item.job for batch in pool.workers[name].held for item in batch.items]


async def seated(made: Engine, pool, *seeds, **more):
    """Jobs that their workers hold."""
    pool.hold()
    jobs = [await made.submit(request(seed, **more)) for seed in seeds]
    await until(lambda: all(job.state is State.RUNNING for job in jobs))
    return jobs


async def test_stepped_jobs_leave_one_by_one_as_long_as_there_are_seats_and_end_in_any_order(tmp_path):
    async with steps(tmp_path, seats=2) as (made, pool):
        one, two = await seated(made, pool, 1, 2, priority=Priority.PAID)
        three = await made.submit(request(3))
        urgent = await made.submit(request(4, priority=Priority.URGENT, previews=True))
        await until(lambda: len(held(pool)) == 3)
        assert held(pool) == [one.id, two.id, urgent.id] and three.state is State.QUEUED
        items = [item for batch in pool.workers["cpu:0"].held for item in batch.items]
        assert [(item.priority, item.previews) for item in items] == [(1, False), (1, False), (0, True)]
        assert made.position(three.id) == 1
        pool.answer("cpu:0", two.id)
        await made.wait(two.id, 10)
        pool.answer("cpu:0", urgent.id)
        await until(lambda: three.id in held(pool))
        pool.release()
        assert {(await made.wait(job.id, 10)).state for job in (one, three, urgent)} == {State.SUCCEEDED}
        assert made.metrics.render()[0].count(b"imagepool_batch_size_bucket") == 0, "a seat is no batch"


async def test_a_parked_job_is_told_as_such_goes_on_and_has_run_once(tmp_path):
    async with steps(tmp_path) as (made, pool):
        (job,) = await seated(made, pool, 1)
        events = made.events(job.id)
        pool.say("cpu:0", JobProgress(job.id, 0.5))
        pool.say("cpu:0", JobParked(job.id, True))
        started = job.started_at
        assert job.state is State.PARKED and job.progress == 0.5 and made.scheduler.jobs[job.id].batch.parked
        queue = made.snapshot()["queue"]
        assert (queue["running"], queue["parked"]) == (1, 1)
        assert await made.jobs(None, state=State.PARKED) == [job]
        pool.say("cpu:0", JobParked(job.id, False))
        assert job.state is State.RUNNING and (job.attempts, job.started_at, job.device) == (1, started, "cpu:0")
        pool.release()
        assert (await made.wait(job.id, 10)).state is State.SUCCEEDED
        told = [event.data["state"] async for event in events if event.kind == "state"]
        assert told == ["queued", "running", "parked", "running", "succeeded"]


async def test_a_parked_job_that_is_answered_ran_again_and_one_that_failed_did_not(tmp_path):
    async with steps(tmp_path) as (made, pool):
        good, bad = await seated(made, pool, 1, 2)
        for job in (good, bad):
            pool.say("cpu:0", JobParked(job.id, True))
        number = pool.workers["cpu:0"].held[1].batch
        pool.say("cpu:0", ItemsDone(number, (Finished(bad.id, error=errors.ModelFailed("no").info()),)))
        pool.say("cpu:0", BatchDone(number, 0.1))
        pool.answer("cpu:0", good.id)
        assert (await made.wait(good.id, 10)).state is State.SUCCEEDED
        assert (await made.wait(bad.id, 10)).state is State.FAILED
        assert [move.state.value for move in bad.history] == ["queued", "running", "parked", "failed"]
        pool.workers["cpu:0"].held.clear()


async def test_a_word_about_a_job_that_is_elsewhere_or_over_moves_nothing(tmp_path):
    async with steps(tmp_path, workers=("cpu:0", "cpu:1")) as (made, pool):
        one, two = await seated(made, pool, 1, 2)
        assert {one.device, two.device} == {"cpu:0", "cpu:1"}
        pool.say(two.device, JobParked(one.id, True))
        pool.say(one.device, JobParked("nobody", True))
        await made.cancel(two.id)
        pool.say(two.device, JobParked(two.id, True))
        pool.say(two.device, JobPreview(two.id, b"jpeg"))
        assert one.state is State.RUNNING and two.state is State.CANCELLED
        pool.release()
        await made.wait(one.id, 10)


@pytest.mark.parametrize("end", ["cancel", "deadline", "crash"])
async def test_a_parked_job_can_end_or_come_back_in_every_way(tmp_path, end):
    async with steps(tmp_path) as (made, pool):
        (job,) = await seated(made, pool, 1, deadline=0.3 if end == "deadline" else None)
        pool.say("cpu:0", JobParked(job.id, True))
        if end == "cancel":
            assert (await made.cancel(job.id)).state is State.CANCELLED
            assert pool.workers["cpu:0"].dropped == [job.id]
        elif end == "deadline":
            assert (await made.wait(job.id, 10)).state is State.EXPIRED
        else:
            pool.crash("cpu:0")
            await until(lambda: job.state is State.RUNNING)
            assert made.scheduler.jobs[job.id].deaths == 0, "who was parked is not to blame"
            assert job.attempts == 2
        pool.release()
        await made.wait(job.id, 10)
        await until(lambda: not made.flights)
        assert made.arena.spans == 0


async def test_all_who_sat_at_a_lost_worker_come_back_and_end_once(tmp_path):
    async with steps(tmp_path, workers=("cpu:0", "cpu:1")) as (made, pool):
        jobs = await seated(made, pool, *range(8))
        pool.say("cpu:0", report(5, 20, running=4))
        pool.crash("cpu:0")
        assert made.snapshot()["workers"][0]["steps"]["running"] == 0
        pool.release()
        assert [(await made.wait(job.id, 10)).state for job in jobs] == [State.SUCCEEDED] * 8
        assert sorted(job.attempts for job in jobs) == [1] * 4 + [2] * 4


async def test_seats_that_make_no_step_cost_the_worker_its_life_and_reports_keep_it(tmp_path):
    write_spec(tmp_path / "models", timeout=0.3)
    async with engine(tmp_path / "outputs", models_folder=tmp_path / "models", workers=ONE) as (made, pool):
        (job,) = await seated(made, pool, 1)
        for forwards in range(8):
            await asyncio.sleep(0.1)
            pool.say("cpu:0", report(forwards + 1, forwards + 1, running=1))
        assert pool.workers["cpu:0"].incarnation == 1
        async with asyncio.timeout(10):
            while pool.workers["cpu:0"].incarnation == 1:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        pool.release()
        assert (await made.wait(job.id, 10)).state is State.SUCCEEDED
        assert any("made a step within 0.3 s" in (move.why or "") for move in job.history)


async def test_a_server_that_drains_finishes_who_sits_and_keeps_who_waits(tmp_path):
    async with steps(tmp_path, seats=1) as (made, pool):
        (sits,) = await seated(made, pool, 1)
        waits = await made.submit(request(2))
        pool.say("cpu:0", JobParked(sits.id, True))
        leaving = asyncio.create_task(made.stop(grace=10))
        await asyncio.sleep(0.05)
        pool.release()
        await leaving
        assert sits.state is State.SUCCEEDED and waits.state is State.QUEUED
    async with steps(tmp_path) as (made, _):
        assert (await made.wait(waits.id, 10)).state is State.SUCCEEDED


async def test_a_deadline_that_passes_while_a_job_fails_for_want_of_memory_changes_nothing(tmp_path, monkeypatch):
    def no_memory(*_):
        time.sleep(0.3)
        raise errors.StorageFull("no shared memory is left")

    async with steps(tmp_path, boots=False) as (made, pool):
        monkeypatch.setattr(made.flights, "take_off", no_memory)
        wanted = replace(request(1, durable=False, deadline=0.25), images=())
        waiting = [asyncio.create_task(made.run(wanted)) for _ in range(2)]
        await until(lambda: len(made.register.live) == 2)
        pool.boot("cpu:0")
        ends = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(end) for end in ends] == [errors.StorageFull] * 2
        assert not made.register.live and not made.scheduler.jobs


async def test_a_client_that_leaves_frees_its_seat(tmp_path):
    async with steps(tmp_path, seats=1) as (made, pool):
        pool.hold()
        first = asyncio.create_task(made.run(request(1, durable=False)))
        await until(lambda: bool(held(pool)))
        job = held(pool)[0]
        second = await made.submit(request(2))
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        assert pool.workers["cpu:0"].dropped == [job]
        assert second.state is State.QUEUED, "the seat is free when the worker has let go"
        pool.release()
        assert (await made.wait(second.id, 10)).state is State.SUCCEEDED


# --- previews -------------------------------------------------------------------------------------------------------


async def test_previews_reach_who_asked_for_them_and_only_the_latest_is_kept(tmp_path):
    async with steps(tmp_path) as (made, pool):
        asked, not_asked = (await seated(made, pool, 1, previews=True)) + (await seated(made, pool, 2))
        for job in (asked, not_asked):
            pool.say("cpu:0", JobProgress(job.id, 0.25))
            pool.say("cpu:0", JobPreview(job.id, b"first"))
            pool.say("cpu:0", JobPreview(job.id, b"second"))
        events = {job.id: made.events(job.id) for job in (asked, not_asked)}
        pool.release()
        shown = {id_: [event.data async for event in events[id_] if event.kind == "preview"] for id_ in events}
        assert shown == {
            asked.id: [{"jpeg": base64.b64encode(b"second").decode(), "progress": 0.25}], not_asked.id: []
        }


async def test_who_waits_for_an_ephemeral_job_sees_its_previews(tmp_path):
    async with steps(tmp_path) as (made, pool):
        pool.hold()
        seen = []
        task = asyncio.create_task(made.lend(request(1, durable=False, previews=True), seen=seen.append))
        await until(lambda: bool(held(pool)))
        pool.say("cpu:0", JobPreview(held(pool)[0], b"jpeg"))
        pool.release()
        _, loan = await task
        with loan:
            assert seen == [b"jpeg"]


async def test_a_waiter_that_fails_to_hear_of_its_job_still_gets_the_image(tmp_path):
    def fail(_):
        raise ZeroDivisionError

    async with steps(tmp_path) as (made, pool):
        pool.hold()
        waiting = asyncio.create_task(made.lend(request(1, durable=False, previews=True), heard=fail, seen=fail))
        await until(lambda: bool(held(pool)))
        (id_,) = held(pool)
        pool.say("cpu:0", JobProgress(id_, 0.25))
        pool.say("cpu:0", JobPreview(id_, b"one"))
        assert made.register.live[id_].feed is not None, "others see the preview"
        pool.release()
        job, loan = await waiting
        with loan:
            assert job.state is State.SUCCEEDED and job.progress >= 0.25


async def test_over_http_previews_are_asked_for_with_a_field_and_come_as_events(tmp_path):
    write_spec(tmp_path / "models")
    async with serve(tmp_path, models_folder=tmp_path / "models", models=("adder",), arena_bytes=64 << 20) as server:
        server.pool.hold()

        async def post(**fields: str) -> httpx.Response:
            files = {"image": ("a.png", png())}
            return await server.client.post("/jobs", files=files, data={"model": "adder", **fields})

        refused = await post(previews="maybe")
        assert refused.status_code == 422 and "previews" in refused.json()["detail"]
        job = (await post(previews="true")).json()
        await until(lambda: bool(server.engine.flights))
        name = server.engine.register.live[job["id"]].job.device
        server.pool.say(name, JobPreview(job["id"], b"\xff\xd8jpeg"))
        server.pool.say(name, JobParked(job["id"], True))
        assert (await server.client.get(job["links"]["self"])).json()["state"] == "parked"
        stream = asyncio.create_task(server.client.get(job["links"]["events"]))
        await until(lambda: bool(server.engine.watched))
        server.pool.release()
        lines = [line.removeprefix("data: ") for line in (await stream).text.splitlines() if line.startswith("data: ")]
        data = [orjson.loads(line) for line in lines]
        assert [base64.b64decode(each["jpeg"]) for each in data if "jpeg" in each] == [b"\xff\xd8jpeg"]
        assert [each["state"] for each in data if "state" in each][-3:] == ["parked", "running", "succeeded"]


# --- what is told ---------------------------------------------------------------------------------------------------


def test_counts_go_on_over_incarnations_and_rows_per_forward_are_those_of_late():
    book = StepBook()
    assert book.told("cpu:0") == {
        "forwards": 0, "rows": 0, "rows_per_forward": None, "steps_per_second": 0.0, "preemptions": 0, "running": 0,
        "parked": 0,
    }
    book.heard("cpu:0", report(10, 30, 1, 4.0, running=3, parked=1))
    assert book.told("cpu:0") == {
        "forwards": 10, "rows": 30, "rows_per_forward": 3.0, "steps_per_second": 4.0, "preemptions": 1, "running": 3,
        "parked": 1,
    }
    book.lost("cpu:0")
    assert book.told("cpu:0")["running"] == 0 and book.told("cpu:0")["forwards"] == 10
    for forwards in range(1, 41):
        book.heard("cpu:0", report(forwards, forwards, 0, 2.0, running=1))
    told = book.told("cpu:0")
    assert (told["forwards"], told["rows"], told["preemptions"]) == (50, 70, 1) and told["rows_per_forward"] == 1.0
    book.heard("cpu:0", report(41, 41, 0, 2.0))
    assert book.told("cpu:0")["steps_per_second"] == 0.0, "nobody steps any more"


async def test_status_and_metrics_tell_of_steps_where_models_step(tmp_path):
    async with steps(tmp_path) as (made, pool):
        await until(lambda: bool(made.up))
        pool.say("cpu:0", report(4, 12, 2, 8.0, running=3, parked=1))
        (worker,) = made.snapshot()["workers"]
        assert worker["steps"]["rows_per_forward"] == 3.0 and worker["steps"]["parked"] == 1
        page = (await made.render_metrics())[0].decode()
        for line in ('step_forwards_total{device="cpu:0"} 4.0', 'step_rows_per_forward{device="cpu:0"} 3.0',
                     'step_preemptions_total{device="cpu:0"} 2.0', 'step_jobs_parked{device="cpu:0"} 1.0'):
            assert f"imagepool_{line}" in page
    async with engine(tmp_path / "other") as (made, _):
        assert made.snapshot()["workers"][0]["steps"] is None
        assert b"imagepool_step" not in (await made.render_metrics())[0]


async def test_a_random_seed_is_drawn_once_so_that_a_second_run_gives_the_same_image(tmp_path, monkeypatch):
    text = SPEC.format(folder="", timeout=30.0) + "\n[params.seed]\ntype = \"int\"\ndefault = -1\nmin = -1\n"
    chancy = read_spec(text, "adder")
    async with steps(tmp_path) as (made, _):
        monkeypatch.setitem(made.catalogue._specs, "adder", chancy)
        asked = plain_request(png(1), model="adder", params=chancy.check_params({}))
        seeds = {(await made.submit(asked)).request.params["seed"] for _ in range(3)}
        assert len(seeds) == 3 and min(seeds) >= 0
        kept = plain_request(png(1), model="adder", params=chancy.check_params({"seed": 7}))
        assert (await made.submit(kept)).request.params["seed"] == 7

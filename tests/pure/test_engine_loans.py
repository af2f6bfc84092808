"""Results that are lent out of shared memory, and given back whatever happens to who borrowed them."""

from __future__ import annotations

import asyncio

import pytest

from core.errors import ImagePoolError
from tests.pure.engine_kit import engine, png, request


async def until(true):
    async with asyncio.timeout(30):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def test_a_loan_is_the_workers_own_bytes_and_is_given_back_with_its_block(tmp_path):
    async with engine(tmp_path) as (made, _):
        job, loan = await made.lend(request(png(3), durable=False))
        with loan:
            assert loan.data == png(3) and loan.size == len(png(3)) and loan.media_type == "image/png"
            assert made.arena.spans == 1, "only the result; the input went with the job"
            assert job.result is not None and job.result.size == loan.size
        assert made.arena.spans == 0
        with pytest.raises(ValueError, match="released"):
            bytes(loan.data)


async def test_a_client_that_leaves_in_the_moment_of_success_leaves_no_memory_behind(tmp_path, monkeypatch):
    async with engine(tmp_path, workers=("cpu:0",)) as (made, pool):
        pool.hold()
        waiting = asyncio.create_task(made.lend(request(png(1), durable=False)))
        await until(lambda: made.register.live and pool.workers["cpu:0"].held)
        live = next(iter(made.register.live.values()))
        move = made.register.move

        def move_and_leave(*given, **named):
            move(*given, **named)
            if live.done.done():  # who waits has not woken up yet
                waiting.cancel()

        monkeypatch.setattr(made.register, "move", move_and_leave)
        pool.release()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await until(lambda: made.arena.spans == 0)


async def test_a_job_that_fails_lends_nothing(tmp_path):
    async with engine(tmp_path, workers=("cpu:0",)) as (made, pool):
        pool.hold()
        waiting = asyncio.create_task(made.lend(request(png(1), durable=False)))
        await until(lambda: made.register.live and pool.workers["cpu:0"].held)
        await made.cancel(next(iter(made.register.live)))
        with pytest.raises(ImagePoolError):
            await waiting
        pool.release()
        await until(lambda: made.arena.spans == 0)

"""The whole engine on a small real disk that is full: what frees room still works, and what was accepted finds room."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from core.errors import StorageFull
from core.states import State
from engine.disk import look
from tests.process.store_kit_process import small_disk
from tests.process.test_store_disk import ballast
from tests.pure.engine_kit import engine, png, request


async def until(what) -> None:
    async with asyncio.timeout(20):
        while not what():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_jobs_are_cancelled_and_expire_on_a_disk_without_a_byte_left(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "4m") as disk:
        async with engine(disk, workers=("cpu:0",), min_free_disk=512 << 10) as (made, pool):
            await until(lambda: (disk / ".reserve").exists())
            pool.hold()
            runs = await made.submit(request(png(1, 300, 300)))
            await until(lambda: runs.state is State.RUNNING)
            late = await made.submit(request(png(2, 300, 300), deadline=2.0))
            waits = [await made.submit(request(png(seed, 300, 300))) for seed in range(3, 6)]
            room = ballast(disk)
            assert (await made.cancel(waits[0].id)).state is State.CANCELLED
            assert (await made.wait(late.id, 20)).state is State.EXPIRED
            assert (await made.cancel(waits[1].id)).state is State.CANCELLED
            assert made._keeper.jobs.load(waits[1].id).state is State.CANCELLED
            ballast(disk)  # also where the reserve was
            os.truncate(room, room.stat().st_size - 150_000)
            pool.release()
            await until(lambda: made._keeper.waiting)
            told = look(made._keeper)
            assert (told.state, bool(told.waiting)) == ("full", True) and "disk" in told.why
            assert (await made.cancel(runs.id)).state is State.CANCELLED, "its result found no room"
            assert not (disk / "inputs" / runs.id).exists()
            room.unlink()
            assert (await made.wait(waits[2].id, 20)).state is State.SUCCEEDED
            assert look(made._keeper).state == "ok" and (disk / ".reserve").exists()


async def test_what_was_accepted_finds_room_for_its_results(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "8m") as disk:
        async with engine(disk, workers=("cpu:0",), min_free_disk=512 << 10) as (made, pool):
            pool.hold()
            jobs = []
            try:
                while True:
                    jobs.append(await made.submit(request(png(len(jobs), 300, 300))))  # 270 KB, and as much again
            except StorageFull:
                pass
            assert len(jobs) > 5
            pool.release()
            for job in jobs:
                await made.wait(job.id, 20)
                assert made._keeper.waiting == 0
            assert [job.state for job in jobs] == [State.SUCCEEDED] * len(jobs)
            assert made._keeper.promises.bytes == 0

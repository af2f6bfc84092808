"""The promise: every accepted job ends exactly once with the right image, whoever is killed meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from collections import Counter
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from kit import RunningServer, eventually, photo, pixels, running

from bench.chaos import measure

pytestmark = pytest.mark.alone

ENDS = {"succeeded", "failed", "cancelled", "expired"}
SIZES = [(48, 32), (32, 48), (64, 64), (40, 40)]


def image_of(number: int) -> bytes:
    return photo(number, *SIZES[number % len(SIZES)])


def expected(number: int) -> np.ndarray:
    """What the model gives when it runs alone (its definition: inverted, plus the offset, modulo 256)."""
    return (255 - pixels(image_of(number)) + number % 7).astype(np.uint8)


def form(number: int) -> dict[str, str]:
    times = {"base_ms": "10", "per_item_ms": "2"}
    return {"model": "stub", "offset": str(number % 7), "priority": str(number % 4), **times}


def shared_memory() -> set[str]:
    folder = Path("/dev/shm")
    return {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()


def kill_a_worker(server: RunningServer, chance: random.Random) -> bool:
    """SIGKILL to a random worker that takes batches (killed while booting: tests/process/test_pool.py)."""
    status = server.status()
    pids = [status["processes_info"][str(device["index"])]["pid"] for device in status["devices"]
            if device["state"] in ("ready", "busy")]
    if pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(chance.choice(pids), signal.SIGKILL)
    return bool(pids)


async def one(client: httpx.AsyncClient, number: int) -> str:
    """A job of either kind, followed to its end; 'right' when the image is the one it must be."""
    if number % 2:
        files = {"image": ("a.png", image_of(number), "image/png")}
        answer = await client.post(f"/run/{form(number)['model']}", files=files, params={
            key: value for key, value in form(number).items() if key != "model"
        })
        assert answer.status_code == 200, answer.text
        return "right" if np.array_equal(pixels(answer.content), expected(number)) else "wrong image"
    answer = await client.post("/jobs", files={"image": ("a.png", image_of(number))}, data=form(number))
    assert answer.status_code == 202, answer.text
    job = answer.json()["id"]
    while True:
        told = (await client.get(f"/jobs/{job}", headers={"Prefer": "wait=5"})).json()
        if told["state"] in ENDS:
            break
        await asyncio.sleep(0.1)
    ends = [move["state"] for move in told["history"] if move["state"] in ENDS]
    assert ends == [told["state"]], f"ended {len(ends)} times"
    if told["state"] != "succeeded":
        return f"{told['state']}: {told['error']}"
    data = (await client.get(f"/jobs/{job}/result")).content
    return "right" if np.array_equal(pixels(data), expected(number)) else "wrong image"


def in_proof_too(few: int, many: int) -> pytest.MarkDecorator:
    """A few jobs in every run, many in `make proof`."""
    return pytest.mark.parametrize("number_of_jobs", [few, pytest.param(many, marks=pytest.mark.proof)])


@pytest.mark.timeout(600)
@in_proof_too(400, 2000)
async def test_mixed_jobs_while_a_random_worker_is_killed_every_half_second(tmp_path, number_of_jobs):
    before = shared_memory()
    chance = random.Random(2)
    with running(tmp_path / "outputs", "--restart-backoff", "50ms", devices="cpu:4", models="stub") as server:
        server.wait_all_ready()
        kills = 0

        async def murderer() -> None:
            nonlocal kills
            while True:
                await asyncio.sleep(0.5)
                kills += await asyncio.to_thread(kill_a_worker, server, chance)

        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(base_url=server.url, timeout=500, limits=limits) as client:
            hunt = asyncio.create_task(murderer())
            gate = asyncio.Semaphore(48)

            async def guarded(number: int) -> str:
                async with gate:
                    return await one(client, number)

            outcomes = Counter(await asyncio.gather(*(guarded(number) for number in range(number_of_jobs))))
            hunt.cancel()
        assert kills >= 3
        assert outcomes == {"right": number_of_jobs}
        assert server.process.poll() is None
        status = server.status()
        assert status["queue"]["queued"] == status["queue"]["running"] == 0
    assert shared_memory() <= before
    assert not list((tmp_path / "outputs" / "tmp").iterdir())
    assert not list((tmp_path / "outputs" / "inputs").iterdir())


@pytest.mark.timeout(600)
@in_proof_too(200, 1000)
def test_the_master_is_killed_three_times_during_durable_jobs(tmp_path, number_of_jobs):
    before = shared_memory()
    server = RunningServer(tmp_path / "outputs", devices="cpu:2", models="stub").start()
    accepted: dict[int, str] = {}
    seen: dict[str, str] = {}
    waiting = list(range(number_of_jobs))
    chance = random.Random(3)
    try:
        for life in range(4):
            upto = number_of_jobs * (life + 1) // 4
            tree = server.tree()
            while waiting and len(accepted) < upto:
                number = waiting.pop(0)
                answer = server.client.post(
                    "/jobs", files={"image": ("a.png", image_of(number))}, data=form(number),
                    headers={"Idempotency-Key": f"job-{number}"},
                )
                assert answer.status_code == 202, answer.text
                accepted[number] = answer.json()["id"]
            if life < 3:
                for job in chance.sample(list(accepted.values()), 20):
                    told = server.job(job)
                    if told["state"] in ENDS:
                        seen[job] = told["ended_at"]
                server.kill()
                _, alive = psutil.wait_procs(tree, timeout=10)
                assert not alive, "workers outlived their master"
                server.client.close()
                server = RunningServer(tmp_path / "outputs", devices="cpu:2", models="stub").start(ready=False)
        eventually(lambda: server.status()["queue"]["queued"] + server.status()["queue"]["running"] == 0, 240, 0.5)
        assert len(set(accepted.values())) == number_of_jobs
        for number, job in accepted.items():
            told = server.job(job)
            assert told["state"] == "succeeded", told
            assert [move["state"] for move in told["history"] if move["state"] in ENDS] == ["succeeded"]
            assert job not in seen or told["ended_at"] == seen[job], "a finished job was run again"
            assert np.array_equal(pixels(server.get(f"/jobs/{job}/result").content), expected(number))
    finally:
        tree = server.tree()
        server.stop()
        server.client.close()
    _, alive = psutil.wait_procs(tree, timeout=10)
    assert not alive
    assert shared_memory() <= before
    outputs = tmp_path / "outputs"
    assert not list((outputs / "tmp").iterdir()) and not list((outputs / "inputs").iterdir())
    assert len([file for file in outputs.iterdir() if file.suffix == ".png"]) == number_of_jobs
    assert os.path.exists(outputs / "jobs.sqlite")  # noqa: PTH110


@pytest.mark.timeout(600)
def test_a_sample_of_the_bench_of_chaos_loses_doubles_and_blames_nobody():
    told = measure(10)
    assert told.done.total() == 10 and told.done["server killed"] == 1
    assert not told.faults, told.faults[:5]
    assert told.counts["right"] == len(told.accepted) > 0 and told.counts["run"] > 0

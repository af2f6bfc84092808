"""A real server with a model that runs in steps: shared forwards, overtaking, and what its clients see of accidents."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import shutil
import signal

import httpx
import numpy as np
import psutil
import pytest
from kit import TEST_MODELS, RunningServer, eventually, photo, pixels, running

from tests.step_model import expected, write_spec

LONG = {"steps": "400", "forward_ms": "10"}


def flags(folder, timeout=3.0) -> list[str]:
    """A models folder with `adder` and `stub`, and quick restarts."""
    write_spec(folder / "models", timeout)
    shutil.copy(TEST_MODELS / "stub.toml", folder / "models")
    return ["--models-folder", str(folder / "models"), "--restart-backoff", "50ms", "--ping-interval", "200ms"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("steps")
    with running(folder / "outputs", *flags(folder), models="adder,stub") as made:
        made.wait_all_ready()
        yield made


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A server of one worker."""
    folder = tmp_path_factory.mktemp("alone")
    with running(folder / "outputs", *flags(folder), models="adder,stub", devices="cpu:1") as made:
        yield made


def right(server: RunningServer, job: str, seed: int, steps: int = 5) -> bool:
    return np.array_equal(pixels(server.get(f"/jobs/{job}/result").content), expected(pixels(photo(seed)), steps))


def submit(server: RunningServer, seed: int, **params: object) -> str:
    return server.submit(seed, "adder", **{name: str(value) for name, value in params.items()})


def draw(server: RunningServer, **params: object) -> str:
    """A job without an image, 24 x 16."""
    data = {"model": "adder", "width": "24", "height": "16", **{name: str(value) for name, value in params.items()}}
    answer = server.client.post("/jobs", json=data)
    assert answer.status_code == 202, answer.text
    return answer.json()["id"]


def until_it_steps(server: RunningServer, job: str, least: float = 0.0) -> None:
    """Some steps of it are done."""
    eventually(lambda: server.job(job)["progress"] > least, every=0.01)


def totals(server: RunningServer) -> dict[str, int]:
    """Of all devices together."""
    devices = [device["steps"] for device in server.workers()]
    names = ("forwards", "rows", "preemptions", "running", "parked")
    return {name: sum(device[name] for device in devices) for name in names}


def pid_of(server: RunningServer, device: str) -> int:
    told = server.status()
    index = next(each["index"] for each in told["devices"] if each["device"] == device)
    return told["processes_info"][str(index)]["pid"]


# --- sharing --------------------------------------------------------------------------------------------------------


def test_jobs_share_forwards_and_each_gets_its_own_image(server):
    server.wait_all_ready()
    before = totals(server)
    jobs = [submit(server, seed, steps=30 + seed, forward_ms=20) for seed in range(8)]
    told = [server.wait_job(job) for job in jobs]
    assert {job["state"] for job in told} == {"succeeded"} and {job["device"] for job in told} == {"cpu:0", "cpu:1"}
    assert all(right(server, job, seed, 30 + seed) for seed, job in enumerate(jobs))
    eventually(lambda: totals(server)["running"] == 0)
    after = totals(server)
    forwards, rows = after["forwards"] - before["forwards"], after["rows"] - before["rows"]
    assert rows == sum(30 + seed for seed in range(8)) and forwards < rows / 1.5
    page = server.get("/metrics").text
    assert 'imagepool_step_forwards_total{device="cpu:0"}' in page and "imagepool_step_preemptions_total" in page


def test_batches_are_served_while_jobs_step_and_progress_is_told(server):
    jobs = [submit(server, seed, **LONG) for seed in range(4)]
    for job in jobs:
        until_it_steps(server, job)
    plain = [server.submit(seed, base_ms="5") for seed in range(10)]
    assert {server.wait_job(job)["state"] for job in plain} == {"succeeded"}
    assert {server.job(job)["state"] for job in jobs} <= {"running", "parked"}
    for job in jobs:
        assert server.client.delete(f"/jobs/{job}").json()["state"] == "cancelled"
    eventually(lambda: totals(server)["running"] == 0)


def test_a_later_urgent_job_overtakes(alone):
    before = totals(alone)["preemptions"]
    plain = [submit(alone, seed, **LONG) for seed in range(3)]
    for job in plain:
        until_it_steps(alone, job)
    urgent = draw(alone, steps=40, forward_ms=10, priority="urgent")  # of another size, it cannot come aboard
    assert alone.wait_job(urgent)["state"] == "succeeded"
    drawn = pixels(alone.get(f"/jobs/{urgent}/result").content)
    assert np.array_equal(drawn, expected(np.zeros((16, 24, 3), np.uint8), 40))
    assert all(alone.job(job)["state"] in ("running", "parked") for job in plain)
    eventually(lambda: totals(alone)["preemptions"] > before)
    assert [alone.wait_job(job)["state"] for job in plain] == ["succeeded"] * 3
    assert all(right(alone, job, seed, 400) for seed, job in enumerate(plain))


# --- leaving early --------------------------------------------------------------------------------------------------


def test_a_job_cancelled_in_mid_run_leaves_and_its_companion_goes_on(alone):
    before = totals(alone)["rows"]
    leaves, stays = submit(alone, 1, **LONG), submit(alone, 2, **{**LONG, "steps": "100"})
    until_it_steps(alone, leaves)
    assert alone.client.delete(f"/jobs/{leaves}").json()["state"] == "cancelled"
    eventually(lambda: totals(alone)["running"] <= 1)
    assert alone.wait_job(stays)["state"] == "succeeded" and right(alone, stays, 2, 100)
    eventually(lambda: totals(alone)["running"] == 0)
    assert 0 < totals(alone)["rows"] - before < 400


def test_a_client_that_goes_away_takes_its_job_along(alone):
    before = totals(alone)["rows"]
    with contextlib.suppress(httpx.TimeoutException):
        headers = {"Content-Type": "image/png"}
        httpx.post(f"{alone.url}/run/adder", content=photo(1), headers=headers, params=LONG, timeout=1.0)
    eventually(lambda: alone.status()["queue"]["running"] == 0 and totals(alone)["running"] == 0, 10)
    assert 0 < totals(alone)["rows"] - before < 400 and alone.status()["queue"]["bytes"] == 0


def test_a_deadline_in_mid_run_ends_the_job(alone):
    before = totals(alone)["rows"]
    job = submit(alone, 1, **LONG, deadline="1")
    told = alone.wait_job(job)
    assert told["state"] == "expired" and "was running" in told["error"]["message"]
    eventually(lambda: totals(alone)["running"] == 0)
    assert 0 < totals(alone)["rows"] - before < 400


# --- workers --------------------------------------------------------------------------------------------------------


def test_jobs_of_a_worker_killed_in_mid_run_start_again_and_give_the_same_images(server):
    server.wait_all_ready()
    jobs = [submit(server, seed, steps=150, forward_ms=10, add=7) for seed in range(6)]
    for job in jobs:
        until_it_steps(server, job, 0.1)
    killed = server.job(jobs[0])["device"]
    os.kill(pid_of(server, killed), signal.SIGKILL)
    told = [server.wait_job(job) for job in jobs]
    assert {job["state"] for job in told} == {"succeeded"} and max(job["attempts"] for job in told) == 2
    for seed, job in enumerate(jobs):
        image = pixels(server.get(f"/jobs/{job}/result").content)
        assert np.array_equal(image, expected(pixels(photo(seed)), 150, 7))
    server.wait_all_ready()


def test_a_step_that_hangs_costs_its_worker_and_nobody_a_job(server):
    server.wait_all_ready()
    jobs = [submit(server, seed, steps=60, forward_ms=10) for seed in range(4)]
    jobs.append(submit(server, 4, steps=60, act="hang", at=20, once="hang-once"))
    told = [server.wait_job(job) for job in jobs]
    assert {job["state"] for job in told} == {"succeeded"}
    assert all(right(server, job, seed, 60) for seed, job in enumerate(jobs))
    why = [move["why"] for job in told for move in job["history"] if move["why"]]
    assert any("made a step within 3.0 s" in each for each in why), why
    server.wait_all_ready()


def test_a_job_that_kills_its_worker_at_a_step_is_blamed_alone(server):
    server.wait_all_ready()
    good = [submit(server, seed, steps=80, forward_ms=5) for seed in range(5)]
    poison = submit(server, 9, steps=80, act="crash", at=10)
    good += [submit(server, seed, steps=80, forward_ms=5) for seed in range(5, 8)]
    told = server.wait_job(poison)
    assert told["state"] == "failed" and told["error"]["code"] == "poisonous_job"
    assert [server.wait_job(job)["state"] for job in good] == ["succeeded"] * 8
    assert all(right(server, job, seed, 80) for seed, job in enumerate(good))
    server.wait_all_ready()


def test_what_does_not_fit_together_runs_apart_and_what_never_fits_is_told(server):
    jobs = [submit(server, seed, steps=20, act="oom", at=5, fits=1) for seed in range(6)]
    large = submit(server, 9, steps=20, act="oom", at=5)
    assert [server.wait_job(job)["state"] for job in jobs] == ["succeeded"] * 6
    assert all(right(server, job, seed, 20) for seed, job in enumerate(jobs))
    assert server.wait_job(large)["error"]["code"] == "out_of_memory"


# --- going ----------------------------------------------------------------------------------------------------------


def test_sigterm_lets_seated_jobs_finish_and_keeps_those_without_a_seat(tmp_path):
    words = flags(tmp_path)
    with running(tmp_path / "outputs", *words, "--seats", "2", models="adder", devices="cpu:1") as server:
        sit = [submit(server, seed, steps=100, forward_ms=10) for seed in range(2)]
        for job in sit:
            until_it_steps(server, job)
        waits = submit(server, 5)
        assert server.job(waits)["state"] == "queued"
        tree = server.tree()
        assert server.stop(signal.SIGTERM) == 0
        _, alive = psutil.wait_procs(tree, timeout=10)
        assert not alive
    with running(tmp_path / "outputs", *words, models="adder", devices="cpu:1") as server:
        assert [(server.job(job)["state"], server.job(job)["attempts"]) for job in sit] == [("succeeded", 1)] * 2
        assert server.wait_job(waits)["state"] == "succeeded" and right(server, waits, 5)


def test_a_rolling_restart_finishes_who_sits(server):
    server.wait_all_ready()
    jobs = [submit(server, seed, steps=150, forward_ms=10) for seed in range(4)]
    for job in jobs:
        until_it_steps(server, job)
    server.process.send_signal(signal.SIGHUP)
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        told = list(threads.map(server.wait_job, jobs))
    assert [(job["state"], job["attempts"]) for job in told] == [("succeeded", 1)] * 4
    eventually(lambda: "rolling restart is done" in server.log.read_text(), 60)
    server.wait_all_ready()

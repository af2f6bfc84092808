"""Models that a real server loads when they are first asked for: whose time that is, and what becomes of the others."""

from __future__ import annotations

import numpy as np
import pytest
from kit import TEST_MODELS, RunningServer, eventually, photo, pixels, running

from tests.step_model import SPEC, expected

LOAD, TIMEOUT = 3.0, 1.5  # seconds: what a model needs to load, and what its jobs may take


def write_models(folder, load_seconds: float = LOAD) -> list[str]:
    """A models folder with `adder` and `stub`, both loaded when they are needed; the flags that name it."""
    models = folder / "models"
    models.mkdir()
    options = f'preload = false\n[options]\nload_seconds = {load_seconds}\n'
    adder = SPEC.format(folder=folder, timeout=TIMEOUT).replace("[options]\n", options)
    stub = (TEST_MODELS / "stub.toml").read_text().replace("timeout = 30.0", f"timeout = {TIMEOUT}")
    stub = stub.replace("models.stub:Stub", "tests.step_model:SlowStub").replace("[options]\n", options)
    (models / "adder.toml").write_text(adder)
    (models / "stub.toml").write_text(stub.replace('folder = ""', f'folder = "{folder}"'))
    return ["--models-folder", str(models), "--restart-backoff", "50ms", "--ping-interval", "200ms"]


def adder(server: RunningServer, seed: int, **params: object) -> str:
    return server.submit(seed, "adder", **{name: str(value) for name, value in params.items()})


def right(server: RunningServer, job: str, seed: int, steps: int) -> bool:
    return np.array_equal(pixels(server.get(f"/jobs/{job}/result").content), expected(pixels(photo(seed)), steps))


def life(folder) -> list[str]:
    """What happened to models, in order."""
    return (folder / "life.txt").read_text().splitlines()


@pytest.mark.parametrize("model", ["adder", "stub"])
def test_loading_a_model_takes_none_of_its_jobs_time(tmp_path, model):
    with running(tmp_path / "outputs", *write_models(tmp_path), models="adder,stub", devices="cpu:1") as server:
        jobs = [server.submit(seed, model) for seed in range(3)]
        eventually(lambda: server.workers()[0]["detail"] == f"loading {model}", every=0.01)
        told = [server.wait_job(job) for job in jobs]
        assert [(job["state"], job["attempts"]) for job in told] == [("succeeded", 1)] * 3
        (device,) = server.workers()
        assert device["restarts"] == 0 and device["detail"] == "ready" and len(life(tmp_path)) == 1


def test_jobs_that_step_wait_for_another_model_to_load_and_go_on(tmp_path):
    with running(tmp_path / "outputs", *write_models(tmp_path), models="adder,stub", devices="cpu:1") as server:
        steps = adder(server, 1, steps=300, forward_ms=10)
        eventually(lambda: server.job(steps)["progress"] > 0, every=0.01)
        plain = server.submit(2)
        assert server.wait_job(plain)["state"] == "succeeded"
        told = server.wait_job(steps)
        assert (told["state"], told["attempts"]) == ("succeeded", 1) and right(server, steps, 1, 300)
        assert life(tmp_path) == ["loading Adder", "loading SlowStub"]


def test_a_model_that_never_loads_costs_its_worker_after_the_time_for_booting_and_nobody_a_job(tmp_path):
    words = [*write_models(tmp_path, load_seconds=0.0), "--boot-timeout", "12s"]
    with running(tmp_path / "outputs", *words, models="adder,stub", devices="cpu:1") as server:
        steps = adder(server, 1, steps=1000, forward_ms=20)
        eventually(lambda: server.job(steps)["progress"] > 0, every=0.01)
        (tmp_path / "stay").touch()
        plain = server.submit(2)
        told = server.wait_job(plain)
        assert (told["state"], told["attempts"]) == ("succeeded", 2)
        assert any("model 'stub' was not loaded within 12.0 s" in (move["why"] or "") for move in told["history"])
        server.client.delete(f"/jobs/{steps}")


def test_of_models_beyond_the_most_the_one_not_used_for_longest_is_closed_and_comes_back(tmp_path):
    words = [*write_models(tmp_path, load_seconds=0.0), "--loaded-models", "1"]
    with running(tmp_path / "outputs", *words, models="adder,stub", devices="cpu:1") as server:
        for turn in range(3):
            job = adder(server, turn)
            assert server.wait_job(job)["state"] == "succeeded" and right(server, job, turn, 5)
            assert server.wait_job(server.submit(turn))["state"] == "succeeded"
        both = ["loading Adder", "closed Adder", "loading SlowStub", "closed SlowStub"]
        assert sorted(life(tmp_path)) == sorted((both * 3)[:-1])
        assert server.workers()[0]["restarts"] == 0


def test_a_job_stuck_in_a_codec_thread_beside_others_is_found_out_and_they_end_well(tmp_path):
    with running(
        tmp_path / "outputs", *write_models(tmp_path, load_seconds=0.0), models="adder,stub", devices="cpu:1"
    ) as server:
        good = [adder(server, seed, steps=400, forward_ms=10) for seed in range(3)]
        for job in good:
            eventually(lambda job=job: server.job(job)["progress"] > 0, every=0.01)
        stuck = adder(server, 9, act="encode")
        told = server.wait_job(stuck)
        assert told["state"] == "failed" and told["error"]["code"] == "poisonous_job", told
        whys = [move["why"] or "" for move in told["history"]]
        assert any(f"the image of job {stuck} kept a thread for longer than 1.5 s" in why for why in whys), whys
        ends = [server.wait_job(job) for job in good]
        assert {job["state"] for job in ends} == {"succeeded"}
        assert all(right(server, job, seed, 400) for seed, job in enumerate(good))

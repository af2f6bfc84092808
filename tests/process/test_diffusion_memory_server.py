"""Two diffusion models in one worker, on a device with room for one: both serve, and their weights travel seldom."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.diffusion_models import write_crowded
from tests.process.kit import RunningServer, eventually, pixels, running

STEPS = 40


def draw(server: RunningServer, model: str, **fields: object) -> str:
    body = {"model": model, "prompt": "a cat", "steps": STEPS, "width": 64, "height": 64, **fields}
    answer = server.client.post("/jobs", json=body)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def drawn(server: RunningServer, job: str) -> np.ndarray:
    told = server.wait_job(job)
    assert told["state"] == "succeeded", told
    return pixels(server.get(f"/jobs/{job}/result").content)


def test_two_models_that_do_not_fit_together_serve_by_turns_and_their_weights_travel_seldom(tmp_path: Path) -> None:
    moves = write_crowded(tmp_path / "models") / "moves"
    flags = ("--models-folder", str(tmp_path / "models"))
    with running(tmp_path / "outputs", *flags, devices="cpu:1", models="sd15,sdxl") as server:

        def told() -> tuple[int, int]:
            """How often weights came to the device, and how many forwards there were."""
            drawn(server, draw(server, "sd15", steps=1))
            eventually(lambda: server.status()["queue"]["running"] == 0)
            return int(moves.read_text()), server.workers()[0]["steps"]["forwards"]

        kinds = ["sd15", "sdxl"] * 8
        alone = [drawn(server, draw(server, kind, seed=seed)) for seed, kind in enumerate(kinds[:4])]
        before = told()
        jobs = [draw(server, kind, seed=seed % 4) for seed, kind in enumerate(kinds)]
        for seed, job in enumerate(jobs):
            image = drawn(server, job)
            assert int(np.abs(image.astype(int) - alone[seed % 4]).max()) <= 1
        travelled, forwards = (after - first for after, first in zip(told(), before, strict=True))
        assert 2 < travelled < forwards / 4, f"weights came {travelled} times for {forwards} forwards"
        assert server.workers()[0]["restarts"] == 0

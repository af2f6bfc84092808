"""i2ii's and imagen's routes when diffusion models stand behind them: which model, and what it is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.pure.dialect_kit import Server, png, serve
from tests.pure.engine_kit import TEST_MODELS

FILE = ("photo.png", png(), "image/png")
OURS = {"models_folder": TEST_MODELS}


async def edited(server: Server, **fields: Any) -> tuple[str, dict[str, Any]]:
    """The model and the parameters that a request of /edit reached a worker with."""
    answer = await server.client.post("/edit", files={"image": FILE}, data={"prompt": "sunset", **fields})
    assert answer.status_code == 200, answer.text
    return await reached(server, answer.json()["request_id"])


async def imagen(server: Server, path: str, **fields: Any) -> tuple[str, dict[str, Any]]:
    """The same of imagen's routes."""
    answer = await server.client.post(f"/api/v1/images/{path}", files={"file": FILE}, data=fields)
    assert answer.status_code == 200, answer.text
    return await reached(server, answer.json()["job_id"])


async def reached(server: Server, job_id: str) -> tuple[str, dict[str, Any]]:
    job = await server.engine.wait(job_id)
    assert job.result is not None
    return job.request.model, dict(job.request.params)


def stepped_folder(folder: Path) -> Path:
    """A folder of one more model, which edits in steps and knows no strength."""
    models = folder / "models"
    models.mkdir()
    text = (TEST_MODELS / "repaint.toml").read_text().replace('task = "edit"', 'task = "edit"\nstepped = true')
    (models / "qwen.toml").write_text(text.replace("[params.strength]", "[params.ignored]"))
    return models


async def test_the_wanted_model_edits(tmp_path: Path) -> None:
    async with serve(tmp_path, edit_model="repaint", **OURS) as server:
        model, params = await edited(
            server, negative_prompt="fog", num_inference_steps=30, true_cfg_scale=6.5, seed=-7
        )
        assert model == "repaint"
        assert (params["prompt"], params["negative_prompt"], params["steps"]) == ("sunset", "fog", 30)
        assert (params["true_cfg_scale"], params["seed"]) == (6.5, -7)
        _, params = await edited(server)
        assert (params["steps"], params["true_cfg_scale"], params["seed"]) == (50, 4.0, 0)
        _, params = await edited(server, num_inference_steps=1000, true_cfg_scale=99)
        assert (params["steps"], params["true_cfg_scale"]) == (100, 10.0)


async def test_a_stepped_model_that_edits_is_the_default(tmp_path: Path) -> None:
    async with serve(tmp_path, models_folder=stepped_folder(tmp_path), models=("edit", "qwen")) as server:
        assert (await edited(server))[0] == "qwen"


async def test_without_one_the_classical_model_edits(tmp_path: Path) -> None:
    async with serve(tmp_path, **OURS) as server:
        model, params = await edited(server, true_cfg_scale=6.0)
        assert model == "edit" and params["guidance"] == 6.0


@pytest.mark.parametrize("name", ["none", "lama", "stub2"])
async def test_a_wanted_model_that_cannot_edit_stops_the_start(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="--edit-model"):
        async with serve(tmp_path, edit_model=name, **OURS):
            pass


async def test_imagen_s_routes_give_the_service_s_own_words(tmp_path: Path) -> None:
    wanted = ("enhance=paint", "style_comic=paint", "style_aged=paint")
    async with serve(tmp_path, imagen_models=wanted, **OURS) as server:
        model, params = await imagen(server, "enhance", strength=0.4, guidance_scale=9)
        assert model == "paint" and params["prompt"] == "high quality, detailed, sharp"
        assert (params["strength"], params["guidance"], params["steps"]) == (0.4, 9.0, 20)
        _, params = await imagen(server, "style/comic", prompt="a cat")
        assert params["prompt"] == "a cat, ghibli style, comic, cartoon, vibrant colors"
        assert (params["strength"], params["guidance"], params["steps"]) == (0.6, 8.0, 30)
        _, params = await imagen(server, "style/aged")
        assert params["prompt"].startswith("aged photograph, ")
        assert params["negative_prompt"] == "modern, digital, sharp, vibrant colors"
        job = (await server.engine.jobs(None))[0]
        told = (await server.client.get(f"/api/v1/jobs/{job.id}")).json()
        assert told["type"] == "style-aged" and told["params"]["strength"] == 0.6
        assert (await imagen(server, "upscale"))[0] == "upscale"


@pytest.mark.parametrize("word", ["upscale=paint", "enhance", "enhance=none", "style_comic=lama"])
async def test_a_word_that_names_no_such_model_stops_the_start(tmp_path: Path, word: str) -> None:
    with pytest.raises(ValueError, match="--imagen-models"):
        async with serve(tmp_path, imagen_models=(word,), **OURS):
            pass

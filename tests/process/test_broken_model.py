"""A model whose files are broken beside good ones: these serve, and everybody is told why the other does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from kit import TEST_MODELS, eventually, photo, running

WHY = "damaged: "
SPEC = """
adapter = "models.diffusion.adapter:Diffusion"
task = "generate"
stepped = true
takes = {{image = [0, 1]}}

[options]
source = "{source}"

[params.prompt]
type = "string"
required = true
"""


def broken(folder: Path) -> Path:
    """A model folder with the test's own models and one whose weights were cut off."""
    weights = folder / "weights"
    (weights / "unet").mkdir(parents=True)
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    (weights / "model_index.json").write_text(json.dumps(index))
    (weights / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(bytes(100))
    models = folder / "models"
    models.mkdir()
    for file in TEST_MODELS.glob("*.toml"):
        (models / file.name).write_text(file.read_text())
    (models / "bad.toml").write_text(SPEC.format(source=weights))
    (models / "lost.toml").write_text('adapter = "lost:Lost"\ntask = "style"\npreload = false\n')
    return models


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("broken")
    flags = "--models-folder", str(broken(folder))
    with running(folder / "outputs", *flags, models="bad,lost,stub", devices="cpu:2") as made:
        made.wait_all_ready()
        yield made


def test_the_good_one_serves_and_the_bad_one_says_why(server):
    assert server.wait_job(server.submit(1))["state"] == "succeeded"
    refused = server.client.post("/jobs", json={"model": "bad", "prompt": "a cat"})
    assert refused.status_code == 500 and refused.headers["x-should-retry"] == "false"
    assert refused.json()["code"] == "model_failed"
    assert "model 'bad' cannot be loaded: the weights diffusion_pytorch_model" in refused.json()["detail"]
    assert str(server.outputs.parent) not in refused.text
    run = server.client.post("/run/bad", files={"image": ("a.png", photo(1))}, data={"prompt": "a cat"})
    assert run.status_code == 500 and WHY in run.text


def test_status_readiness_and_the_list_of_models_tell_it(server):
    ready = server.get("/health/ready")
    assert ready.status_code == 200 and all(WHY in told["refused"]["bad"] for told in ready.json()["devices"])
    assert all(sorted(told["refused"]) == ["bad", "lost"] and told["restarts"] == 0 for told in server.workers())
    models = {told["name"]: told["refused"] for told in server.get("/models").json()["models"]}
    assert WHY in models["bad"] and "put lost.py beside" in models["lost"] and models["stub"] is None
    assert [told["id"] for told in server.get("/v1/models").json()["data"]] == ["stub"]
    told = server.client.post("/v1/images/generations", json={"prompt": "a cat"}).json()["error"]
    assert told["code"] == "model_not_found"


def test_where_no_model_can_be_loaded_nothing_is_ready_and_it_says_why(tmp_path):
    models = str(broken(tmp_path))
    flags = "--models-folder", models, "--give-up-after", "1"
    with running(tmp_path / "outputs", *flags, models="lost", devices="cpu:1", ready=False) as server:
        ready = eventually(lambda: "given_up" in (told := server.get("/health/ready")).text and told)
        assert ready.status_code == 503 and "put lost.py beside the model's TOML file" in ready.json()["reason"]

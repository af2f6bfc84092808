"""A real server with a tiny diffusion model: the example's model file, requests of every task, what is told of them."""

from __future__ import annotations

import io
import tomllib
from pathlib import Path

import numpy as np
import pytest
from diffusion_kit import same
from kit import RunningServer, photo, pixels, running
from PIL import Image

from tests import tiny_models

EXAMPLE = Path(__file__).parents[2] / "examples" / "models" / "sd15.toml"


def model_file(folder: Path) -> Path:
    """The example, with the tiny model for a source and its ControlNet."""
    text, net = EXAMPLE.read_text("utf-8"), tiny_models.folder("sd15-controlnet") / "controlnet"
    options = tomllib.loads(text)["options"]
    text = text.replace(options["source"], str(tiny_models.folder("sd15"))).replace('variant = "fp16"\n', "")
    for named in options["controlnets"].values():
        text = text.replace(named, str(net))
    folder.mkdir()
    (folder / "sd15.toml").write_text(text, "utf-8")
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diffusion")
    models = model_file(folder / "models")
    with running(folder / "outputs", "--models-folder", str(models), models="sd15", devices="cpu:1") as made:
        yield made


def mask() -> bytes:
    covered = np.zeros((32, 48), np.uint8)
    covered[8:24, 12:36] = 255
    data = io.BytesIO()
    Image.fromarray(covered).save(data, "png")
    return data.getvalue()


def done(server: RunningServer, job: str) -> np.ndarray:
    ended = server.wait_job(job)
    assert ended["state"] == "succeeded", ended
    return pixels(server.get(f"/jobs/{job}/result").content)


def ask(server: RunningServer, *files: tuple[str, bytes], **params: object) -> str:
    data = {"model": "sd15", "prompt": "a cat", "steps": "3", "seed": "1"}
    data |= {name: str(value) for name, value in params.items()}
    parts = [(name, (f"{name}.png", content, "image/png")) for name, content in files]
    more = {"data": data, "files": parts} if parts else {"json": data}
    answer = server.client.post("/jobs", **more)
    assert answer.status_code == 202, answer.text
    return answer.json()["id"]


def test_all_tasks_of_one_model_share_its_steps(server):
    before = server.workers()[0]["steps"]["forwards"]
    jobs = [
        ask(server, width=64, height=40), ask(server, ("image", photo(1)), strength=0.9),
        ask(server, ("image", photo(1)), ("mask", mask())), ask(server, ("image", photo(1)), control_type="canny"),
    ]
    drawn, changed, filled, guided = (done(server, job) for job in jobs)
    assert drawn.shape == (40, 64, 3) and changed.shape == filled.shape == guided.shape == (32, 48, 3)
    outside = np.asarray(Image.open(io.BytesIO(mask()))) == 0
    assert np.array_equal(filled[outside], pixels(photo(1))[outside])
    assert not np.array_equal(filled[~outside], pixels(photo(1))[~outside])
    assert server.workers()[0]["steps"]["forwards"] > before
    assert same(done(server, ask(server, width=64, height=40)), drawn), "the same seed, the same picture"


def test_a_map_alone_gives_the_picture_its_size(server):
    sent = "control", photo(1)
    assert done(server, ask(server, sent, control_type="depth")).shape == (32, 48, 3)
    assert done(server, ask(server, sent, control_type="depth", width=64, height=40)).shape == (40, 64, 3)


@pytest.mark.parametrize(("params", "about"), [
    ({"lora_name": "nobody"}, "no LoRA"), ({"scheduler": "magic"}, "no sampler"),
    ({"control_type": "depth"}, "needs a control map"), ({"strength": 0.1}, "less than one step"),
    ({"control_type": "canny", "control_start": 0.9, "control_end": 0.1}, "does not take this request"),
])
def test_what_cannot_be_done_fails_its_job_with_a_sentence(server, params, about):
    files = [("image", photo(2))] if {"strength", "control_start"} & params.keys() else []
    ended = server.wait_job(ask(server, *files, **params))
    assert ended["state"] == "failed" and ended["error"]["code"] == "invalid_parameter", ended
    assert about in ended["error"]["message"]

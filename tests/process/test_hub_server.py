"""The command that fetches, and a server that starts with a model of the hub: in processes, by the real environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests import model_hub, tiny_models
from tests.diffusion_models import EXAMPLES
from tests.process.kit import ROOT, eventually, pixels, running

UNET = "unet/diffusion_pytorch_model.fp16.safetensors"
NAME = "stable-diffusion-v1-5/stable-diffusion-v1-5"
CONTROLS = [f"lllyasviel/control_v11{name}" for name in ("p_sd15_canny", "f1p_sd15_depth", "p_sd15_openpose")]


def ready_file(folder: Path) -> Path:
    """The ready file of Stable Diffusion 1.5, as it is."""
    folder.mkdir()
    return Path(shutil.copy(EXAMPLES / "sd15.toml", folder))


def in_half(folder: Path) -> Path:
    """The tiny model, with its weights in half precision alone, as `variant = "fp16"` has it."""
    shutil.copytree(tiny_models.folder("sd15"), folder)
    for file in list(folder.rglob("*.safetensors")):
        file.rename(file.with_suffix(".fp16.safetensors"))
    return folder


def fetch(file: Path, environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "models.diffusion.fetch", str(file)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environ, capture_output=True, text=True, timeout=120)


def test_a_model_of_the_hub_is_served(tmp_path: Path) -> None:
    file = ready_file(tmp_path / "models")
    with model_hub.hub() as hub:
        control = tiny_models.folder("sd15-controlnet") / "controlnet"
        hub.repos |= {NAME: in_half(tmp_path / "half"), **dict.fromkeys(CONTROLS, control)}
        environ = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_TOKEN": model_hub.TOKEN}
        hub.cuts[UNET].append(1_000_000)
        flags = ("--models-folder", str(file.parent))
        with running(tmp_path / "outputs", *flags, devices="cpu:1", models="sd15", **environ) as server:
            assert len(hub.downloads(UNET)) == 2, "broken off once, taken up again"
            asked = {"model": "sd15", "prompt": "a cat", "steps": 3, "seed": 1, "width": 64, "height": 64}
            job = server.client.post("/jobs", json=asked).json()["id"]
            assert server.wait_job(job)["state"] == "succeeded"
            assert pixels(server.get(f"/jobs/{job}/result").content).shape == (64, 64, 3)
        hub.heard.clear()
        hub.down = True
        done = fetch(file, environ)
        assert done.returncode == 0 and "unet 2." in done.stdout, done.stderr
        assert not hub.downloads(".safetensors")


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    file = ready_file(tmp_path / "models")
    with model_hub.hub() as hub:
        done = fetch(file, {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "cache")})
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"sd15: '{NAME}' cannot be had from the Hugging Face hub: there is no model of that name")
    assert "Traceback" not in done.stderr


def test_a_server_whose_model_cannot_be_had_says_so(tmp_path: Path) -> None:
    file = ready_file(tmp_path / "models")
    with model_hub.hub() as hub:
        environ = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "cache")}
        flags = ("--models-folder", str(file.parent))
        with running(tmp_path / "outputs", *flags, devices="cpu:1", models="sd15", ready=False, **environ) as server:
            told = eventually(lambda: (now := server.workers()[0]["detail"]) and "cannot be had" in now and now)
    assert f"'{NAME}' cannot be had from the Hugging Face hub: there is no model of that name" in told

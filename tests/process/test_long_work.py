"""A real server: work that takes too long within all limits ends by itself, and its worker lives."""

from __future__ import annotations

import io
import time

import httpx
import numpy as np
from kit import ROOT, running
from lama_kit import save_network
from PIL import Image

TIMEOUT = 3.0  # seconds that `upscale` gives one request here


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def noise(side: int) -> bytes:
    return png(np.random.default_rng(1).integers(0, 256, (side, side, 3), np.uint8))


def test_work_that_takes_too_long_is_told_what_to_ask_less_of_and_kills_no_worker(tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    spec = (ROOT / "models" / "repository" / "upscale.toml").read_text(encoding="utf-8")
    (folder / "upscale.toml").write_text(spec.replace("timeout = 300.0", f"timeout = {TIMEOUT}"), encoding="utf-8")
    with running(tmp_path / "outputs", "--models-folder", str(folder), "--hang-floor", "1s",
                 devices="cpu:1", models="upscale") as server:
        url = f"{server.url}/run/upscale?scale=4"
        assert httpx.post(f"{url}&steps=1", content=noise(16), timeout=60).status_code == 200
        born = [(one.pid, one.create_time()) for one in server.tree()]
        began = time.monotonic()
        answer = httpx.post(f"{url}&steps=100", content=noise(500), timeout=60)
        assert answer.status_code == 504 and time.monotonic() - began >= TIMEOUT
        told = answer.json()
        assert told["code"] == "deadline_exceeded" and "fewer steps, a smaller scale" in told["detail"]
        assert httpx.post(f"{url}&steps=1", content=noise(16), timeout=60).status_code == 200
        assert [(one.pid, one.create_time()) for one in server.tree()] == born
        assert server.workers()[0]["restarts"] == 0


def test_a_job_of_many_forwards_takes_the_time_that_it_takes(tmp_path):
    """400 crops: some ten seconds, where one forward may take three and no sign may be longer away."""
    folder, side = tmp_path / "models", 1200
    folder.mkdir()
    spec = (ROOT / "models" / "repository" / "lama.toml").read_text(encoding="utf-8")
    (folder / "lama.toml").write_text(spec.replace("timeout = 300.0", "timeout = 3.0"), encoding="utf-8")
    mask = np.zeros((side, side), np.uint8)
    mask[30::60, 30::60] = 255
    files = {"image": noise(side), "mask": png(mask)}
    with running(tmp_path / "outputs", "--models-folder", str(folder), "--hang-floor", "1s", devices="cpu:1",
                 models="lama", LAMA_MODEL_URL=str(save_network(tmp_path / "tiny-lama.pt"))) as server:
        answer = httpx.post(f"{server.url}/run/lama", files=files, timeout=300)
        assert answer.status_code == 200, answer.text
        assert server.workers()[0]["restarts"] == 0

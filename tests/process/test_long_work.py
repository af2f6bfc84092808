"""A real server: work that takes too long within all limits ends by itself, and its worker lives."""

from __future__ import annotations

import io
import time

import httpx
import numpy as np
from kit import ROOT, running
from PIL import Image

TIMEOUT = 3.0  # seconds that `upscale` gives one request here


def noise(side: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (side, side, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


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

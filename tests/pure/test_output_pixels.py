"""A result has no more pixels than its model gives: told from the request, before a job exists, in every dialect."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from engine_kit import STUB, TEST_MODELS

from core.errors import BadOutput, InvalidParameter, TooLarge
from core.header import ImageHeader
from core.model import read_spec
from core.request import ImagePart
from models.base import Item
from tests.pure.dialect_kit import Server, png, serve
from workers.messages import RunItem
from workers.session_checks import check_output

PICTURE = png(100, 80)
TEXT = base64.b64encode(PICTURE).decode()
MOST = 20_000  # 100 × 80 twofold is 32,000
GROWS = """
adapter = "nowhere:Grow"
task = "upscale"
scale_param = "scale"
max_output_pixels = 1000
[params.scale]
type = "int"
default = 2
"""


def made(item: RunItem, _: bytes) -> bytes:
    return png(item.size[1], item.size[0])


@asynccontextmanager
async def world(folder: Path, **given: Any) -> AsyncIterator[Server]:
    models = ("paint", "upscale", "resize", "background_remove", "edit", "cv2")
    settings = {"models_folder": TEST_MODELS, "models": models, "max_output_pixels": MOST, "arena_bytes": 256 << 20}
    async with serve(folder, work=made, **settings | given) as server:
        yield server


def part(width: int, height: int, orientation: int = 1) -> ImagePart:
    return ImagePart("image", b"", ImageHeader("png", width, height, orientation), 1)


def test_the_refusal_tells_the_numbers_and_what_to_change() -> None:
    spec = read_spec(GROWS, "grow")
    spec.check_size(part(25, 10), {"scale": 2}, "png")
    with pytest.raises(TooLarge) as told:
        spec.check_size(part(26, 10, orientation=6), {"scale": 2}, "png")
    assert "20 × 52 = 1,040" in told.value.message and "1,000" in told.value.message and "scale" in told.value.message
    assert told.value.details["max_output_pixels"] == 1000 and told.value.details["parameter"] == "scale"


def test_a_worker_takes_no_larger_answer_either() -> None:
    spec = read_spec(GROWS, "grow")
    image = np.full((40, 40, 3), 200, np.uint8)
    with pytest.raises(BadOutput, match="1,000 pixels"):
        check_output(image, Item({}, image, size=(40, 40)), spec)
    assert check_output(image, Item({}, image, size=(40, 40)), STUB) is image


LONG = png(4200, 1)


@pytest.mark.parametrize(("format", "side"), [("webp", 16_383), ("jpeg", 65_500), ("avif", 65_535), ("png", 65_535)])
def test_a_side_that_the_format_cannot_hold_is_refused_by_its_number(format: Any, side: int) -> None:
    spec = read_spec(GROWS.replace("= 1000", "= 1000000"), "grow")
    spec.check_size(part(side // 4, 1), {"scale": 4}, format)
    with pytest.raises(InvalidParameter, match=f"{side:,}") as told:
        spec.check_size(part(1, side // 4 + 1), {"scale": 4}, format)
    assert told.value.details["parameter"] == "format" and str(side // 4 * 4 + 4) in told.value.message


@pytest.mark.parametrize(("url", "more"), [
    ("/run/upscale?scale=4&format=webp", {"content": LONG}),
    ("/run/upscale", {"files": {"image": LONG}, "data": {"scale": "4", "format": "webp"}}),
    ("/jobs", {"json": {
        "model": "upscale", "image": base64.b64encode(LONG).decode(), "params": {"scale": 4}, "format": "webp",
    }}),
])  # fmt: skip
async def test_such_a_result_is_refused_before_there_is_a_job(tmp_path: Path, url: str, more: dict[str, Any]) -> None:
    async with world(tmp_path, max_output_pixels=1_000_000) as server:
        answer = await server.client.post(url, **more)
        assert answer.status_code == 422 and "16,383" in answer.text and "png" in answer.text
        assert server.engine.snapshot()["jobs"]["total"] == 0 and not server.ran


FORM = {"file": ("a.png", PICTURE, "image/png")}
REFUSED: dict[str, dict[str, Any]] = {
    "run": {"url": "/run/upscale?scale=2", "content": PICTURE},
    "run, a form": {"url": "/run/upscale", "files": {"image": PICTURE}, "data": {"scale": "2"}},
    "run, width and height": {"url": "/run/resize?width=4000&height=4000", "content": PICTURE},
    "run, one side": {"url": "/run/resize?width=8000", "content": PICTURE},
    "run, no parameter": {"url": "/run/edit?prompt=sunset", "content": png(200, 101)},
    "jobs": {"url": "/jobs", "json": {"model": "upscale", "image": TEXT, "params": {"scale": 2}}},
    "jobs, from words": {"url": "/jobs", "json": {"model": "paint", "prompt": "x", "width": 512, "height": 512}},
    "i2ii": {"url": "/edit", "files": {"image": png(200, 101)}, "data": {"prompt": "sunset"}},
    "imagen": {"url": "/api/v1/images/upscale", "files": FORM, "data": {"scale": "4"}},
    "openai": {"url": "/v1/images/generations", "json": {"prompt": "x", "size": "256x256"}},
    "openai, a cut-out": {
        "url": "/v1/images/generations", "json": {"prompt": "x", "size": "256x256", "background": "transparent"}},
    "imagegenx": {"url": "/api/v1/image/generate", "json": {"text": "x", "params": {"resolution": "256×256"}}},
    "imagegenx, enlarged": {"url": "/api/v1/image/generate", "json": {
        "text": "x", "params": {"resolution": "128×128", "postprocess": {"super_resolution": "2x"}}}},
    "iopaint, a plugin": {
        "url": "/api/v1/run_plugin_gen_image", "json": {"name": "RealESRGAN", "image": TEXT, "scale": 4}},
    "iopaint": {"url": "/api/v1/inpaint", "json": {
        "image": base64.b64encode(png(200, 101)).decode(), "mask": base64.b64encode(png(200, 101, "white")).decode()}},
}  # fmt: skip


def refused(answer: httpx.Response) -> None:
    assert answer.status_code == 413, answer.text
    assert f"{MOST:,}" in answer.text, "what is the most"


@pytest.mark.parametrize("case", REFUSED)
async def test_too_large_a_result_is_refused_before_there_is_a_job(tmp_path: Path, case: str) -> None:
    async with world(tmp_path) as server:
        refused(await server.client.post(**REFUSED[case]))
        assert server.engine.snapshot()["jobs"]["total"] == 0 and not server.ran
        assert server.engine.arena.spans == 0 and server.engine.snapshot()["queue"]["bytes"] == 0


async def test_what_is_published_is_what_holds(tmp_path: Path) -> None:
    async with world(tmp_path) as server:
        told = (await server.client.get("/models/upscale")).json()["limits"]["max_output_pixels"]
        assert told == MOST
        assert (await server.client.post("/run/resize?width=200&height=100", content=PICTURE)).status_code == 200
        refused(await server.client.post("/run/resize?width=201&height=100", content=PICTURE))


async def test_a_kept_job_fails_when_the_bound_has_come_down(tmp_path: Path) -> None:
    async with world(tmp_path, boots=False, max_output_pixels=50_000) as server:
        answer = await server.client.post("/jobs", json={"model": "upscale", "image": TEXT, "params": {"scale": 2}})
        assert answer.status_code == 202, answer.text
    async with world(tmp_path) as server:
        job = await server.engine.wait(answer.json()["id"], 10)
        assert job.error is not None and job.error.code == "too_large" and not server.ran

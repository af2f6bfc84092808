"""The lama-triton gateway's tensors, as JSON and raw, and what is wrong with some of them."""

from __future__ import annotations

import asyncio
import base64
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from core.errors import InvalidImage, ModelFailed
from core.request import Span
from tests.pure.dialect_kit import Server, serve
from tests.pure.image_kit import save
from tests.pure.iopaint_kit import IMAGE, MODELS, world
from workers.messages import RunItem

PATH = "/api/v1/inpaint/preprocessed"
HEIGHT, WIDTH = 48, 64  # of IMAGE, which the pool in memory takes for every tensor
TENSOR = np.random.default_rng(0).random((1, 3, HEIGHT, WIDTH), np.float32)
MASK = np.zeros((1, 1, HEIGHT, WIDTH), np.float32)


def fake(item: RunItem, data: bytes) -> bytes:
    """A tensor becomes the picture of the kit, a picture stays."""
    return IMAGE if "channels" in item.params else data


def shapes(**more: Any) -> dict[str, Any]:
    return {
        "image_shape": list(TENSOR.shape), "mask_shape": list(MASK.shape), "original_height": HEIGHT,
        "original_width": WIDTH, **more,
    }  # fmt: skip


def body(**more: Any) -> dict[str, Any]:
    tensors = {
        name: base64.b64encode(tensor.tobytes()).decode()
        for name, tensor in (("image_tensor_b64", TENSOR), ("mask_tensor_b64", MASK))
    }
    return tensors | shapes(**more)


async def raw(server: Server, head: dict[str, Any], *tensors: np.ndarray, **headers: str) -> httpx.Response:
    text = json.dumps(head).encode()
    content = b"".join([text, *(tensor.tobytes() for tensor in tensors)])
    given = {"content-type": "application/octet-stream", "inference-header-content-length": str(len(text)), **headers}
    return await server.client.post(PATH, content=content, headers=given)


def arrived(server: Server) -> list[tuple[str, dict[str, Any], int]]:
    """(model, parameters, bytes of the first image) of what reached a worker, in order."""
    batches = [batch for worker in server.pool.workers.values() for batch in worker.ran]
    found = []
    for batch in sorted(batches, key=lambda one: one.batch):
        for item in batch.items:
            span = item.images[0].data
            assert isinstance(span, Span)
            found.append((batch.model, dict(item.params), span.size))
    return found


async def test_tensors_go_the_way_of_an_image_and_come_back_as_base64(tmp_path: Path) -> None:
    async with world(tmp_path, work=fake, models=("cv2", "tensor_image")) as server:
        answer = await server.client.post(PATH, json=body())
        ran = arrived(server)
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain")
    assert base64.b64decode(answer.text) == IMAGE
    assert float(answer.headers["x-inference-time-ms"]) >= 0
    assert sorted((params["channels"], size) for model, params, size in ran if model == "tensor_image") == [
        (1, MASK.nbytes), (3, TENSOR.nbytes),
    ]  # fmt: skip
    assert ran[-1][0] == "cv2" and ran[-1][1]["hd_strategy"] == "Original"


async def test_the_raw_form_is_answered_raw(tmp_path: Path) -> None:
    async with world(tmp_path, work=fake) as server:
        bare = await raw(server, shapes(), TENSOR, MASK)
        as_text = await raw(server, shapes(), TENSOR, MASK, accept="text/plain")
        as_image = await server.client.post(PATH, json=body(), headers={"accept": "image/png"})
    assert bare.headers["content-type"] == as_image.headers["content-type"] == "image/png"
    assert bare.content == as_image.content == base64.b64decode(as_text.text) == IMAGE


@pytest.mark.parametrize(("given", "status"), [
    ({"original_height": 9999}, 422),
    ({"original_height": -5}, 422),
    ({"original_width": 0}, 422),
    ({"image_shape": [2, 3, HEIGHT, WIDTH]}, 422),
    ({"image_shape": [1, 3, HEIGHT - 1, WIDTH]}, 422),
    ({"image_shape": [1, 3, -HEIGHT, WIDTH]}, 422),
    ({"image_shape": [1, 3, HEIGHT]}, 422),
    ({"mask_shape": [1, 3, HEIGHT, WIDTH]}, 422),
    ({"image_shape": [1, 3, HEIGHT, WIDTH + 8], "mask_shape": [1, 1, HEIGHT, WIDTH + 8]}, 400),
    ({"image_shape": [1, 3, 80_000, 80_000], "mask_shape": [1, 1, 80_000, 80_000]}, 413),
    ({"image_tensor_b64": "AAAA"}, 400),
    ({"mask_tensor_b64": "A"}, 400),
    ({"mask_tensor_b64": "AAAA"}, 400),
    ({"mask_tensor_b64": None}, 422),
])  # fmt: skip
async def test_tensors_that_do_not_fit_are_refused_before_a_worker_sees_them(
    tmp_path: Path, given: dict[str, Any], status: int
) -> None:
    async with world(tmp_path, work=fake) as server:
        answer = await server.client.post(PATH, json=body(**given))
        assert answer.status_code == status, answer.text
        assert set(answer.json()) == {"detail"} and not server.ran


@pytest.mark.parametrize("length", ["0", "-1", "99999999", "x", ""])
async def test_the_raw_form_must_say_where_its_tensors_begin(tmp_path: Path, length: str) -> None:
    async with world(tmp_path, work=fake) as server:
        answer = await raw(server, shapes(), TENSOR, MASK, **{"inference-header-content-length": length})
        assert answer.status_code == 400
        assert (await raw(server, shapes(), TENSOR, MASK[..., :-1])).status_code == 400
        told = await raw(server, {"image_shape": 5}, TENSOR, MASK)
        assert told.status_code == 422 and told.json()["detail"][0]["loc"] == ["body", "image_shape"]
        assert not server.ran


async def test_when_one_tensor_is_refused_nobody_works_on_the_other(tmp_path: Path) -> None:
    def fail(item: RunItem, data: bytes) -> bytes:
        raise InvalidImage("the tensor holds NaN or infinity")

    async with world(tmp_path, work=fail) as server:
        server.pool.hold()
        waiting = asyncio.create_task(server.client.post(PATH, json=body()))
        await server.until_ran(2)
        server.pool.answer(next(name for name, worker in server.pool.workers.items() if worker.held))
        assert (await waiting).status_code == 400
        jobs = server.engine.snapshot()["jobs"]
        assert jobs["queued"] + jobs["running"] == 0
        server.pool.release()


async def test_tensors_may_be_as_large_as_images(tmp_path: Path) -> None:
    large = save(Image.new("1", (6000, 5000)))  # of few bytes
    async with world(tmp_path, work=lambda *_: large, max_pixels=30_000_000) as server:
        assert base64.b64decode((await server.client.post(PATH, json=body())).text) == large


async def test_a_server_that_cannot_read_tensors_says_why(tmp_path: Path) -> None:
    async with world(tmp_path, models=("cv2",)) as server:
        answer = await server.client.post(PATH, json=body())
        assert answer.status_code == 404 and "'tensor_image'" in answer.json()["detail"] and not server.ran


async def test_a_failed_inference_is_a_502_and_a_full_queue_a_503(tmp_path: Path) -> None:
    def fail(item: RunItem, data: bytes) -> bytes:
        if "channels" in item.params:
            return IMAGE
        raise ModelFailed("model 'inpaint' could not process this image")

    async with world(tmp_path, work=fail) as server:
        answer = await server.client.post(PATH, json=body())
        assert answer.status_code == 502
        assert answer.json() == {"error": "Inference failed: model 'inpaint' could not process this image"}
        server.engine.drain()
        answer = await server.client.post(PATH, json=body())
    assert answer.status_code == 503 and answer.headers["retry-after"]
    assert set(answer.json()) == {"status", "detail"} and answer.json()["status"] == "error"


async def test_health_says_what_that_gateway_s_clients_look_for(tmp_path: Path) -> None:
    async with serve(tmp_path, models=MODELS, boots=False) as server:
        early = await server.client.get("/health")
        assert early.status_code == 503 and early.json()["backend_live"] and not early.json()["backend_ready"]
    async with world(tmp_path) as server:
        assert (await server.client.get("/health")).json()["backend_ready"] is True

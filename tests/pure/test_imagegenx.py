"""ImageGenX's API without a process: limits, errors, keys, priorities, and the second job of a task."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from api import imagegenx
from core.request import Priority
from tests.pure.dialect_kit import KEY, OTHER_KEY, Server, keys_file, png, serve
from tests.pure.engine_kit import TEST_MODELS
from workers.messages import RunItem

MODELS = {"models_folder": TEST_MODELS, "models": ("paint", "upscale", "resize")}
PICTURE = base64.b64encode(png()).decode()


def picture(item: RunItem, _: bytes) -> bytes:
    return png(item.size[1], item.size[0])


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with serve(tmp_path, work=picture, **MODELS) as made:
        yield made


async def post(server: Server, route: str = "generate", **body: Any) -> httpx.Response:
    headers = body.pop("headers", {})
    return await server.client.post(f"/api/v1/image/{route}", json={"text": "x", **body}, headers=headers)


def refused(answer: httpx.Response, status: int) -> str:
    told = answer.json()
    assert answer.status_code == told["code"] == status and told["data"] is None and told["request_id"]
    message: str = told["message"]
    return message


async def ended(server: Server, task_id: str) -> dict[str, Any]:
    for job in await server.engine.register.keyed("anonymous", task_id):
        await server.engine.wait(job.id)
    told: dict[str, Any] = (await server.client.get(f"/api/v1/image/task/{task_id}")).json()["data"]
    return told


@pytest.mark.parametrize(("body", "about"), [
    ({"params": {"resolution": "512"}}, "resolution"), ({"params": {"resolution": "9999×64"}}, "width"),
    ({"params": {"steps": 101}}, "steps"), ({"params": {"cfg_scale": 21}}, "'cfg_scale'"),
    ({"params": 5}, "must be an object"),
    ({"params": {"lora_name": "../x"}}, "LoRA"), ({"params": {"lora_name": "a,b,c,d"}}, "LoRA"),
    ({"params": {"lora_weight": 2.1}}, "lora_weight"), ({"params": {"sampler": "Oiler"}}, "Euler"),
    ({"params": {"postprocess": {"super_resolution": "3x"}}}, "super_resolution"),
    ({"params": {"postprocess": {"format": "tiff"}}}, "format"), ({"text": " "}, "text"), ({"priority": 4}, "priority"),
    ({"params": {"postprocess": {"watermark": {"text": "a", "color": "red"}}}}, "color"),
    ({"params": {"postprocess": {"watermark": {"text": "a", "transparency": 2}}}}, "transparency"),
    ({"params": {"postprocess": {"watermark": {"text": "a", "position": "left"}}}}, "position"),
    ({"params": {"postprocess": {"watermark": {"type": "text"}}}}, "text"),
    ({"callback_url": "http://127.0.0.1/"}, "callback_url"), ({"callback_url": "file:///x"}, "callback_url"),
])  # fmt: skip
async def test_what_does_not_fit_is_named_and_leaves_nothing(server: Server, body: dict[str, Any], about: str) -> None:
    assert about in refused(await post(server, **body), 422)
    assert server.engine.snapshot()["jobs"]["total"] == 0


async def test_a_watermark_is_no_path(server: Server) -> None:
    for path in ("/etc/passwd", "../../logo.png", ""):
        mark = {"type": "image", "image_path": path}
        answer = await post(server, params={"postprocess": {"watermark": mark}})
        assert answer.status_code == 400


async def test_a_watermark_s_pixels_are_bounded(server: Server) -> None:
    mark = {"type": "image", "image_path": base64.b64encode(png(2100, 2000)).decode()}
    refused(await post(server, params={"postprocess": {"watermark": mark}}), 413)


async def test_nulls_say_nothing(server: Server) -> None:
    for params in (None, {"postprocess": None}, {"postprocess": {"watermark": {"enable": False, "text": None}}}):
        assert (await post(server, params=params, callback_url=None)).status_code == 200
    refused(await post(server, text=None), 422)


@pytest.mark.parametrize(("route", "model"), [("generate", "upscale"), ("inpaint", "upscale")])
async def test_a_model_that_was_named_must_take_the_images(tmp_path: Path, route: str, model: str) -> None:
    async with serve(tmp_path, work=picture, models_folder=TEST_MODELS, models=("paint", "upscale")) as server:
        answer = await post(server, route, model_type=model, image_url=PICTURE, mask_url=PICTURE)
        assert model in refused(answer, 422)
        assert not server.ran


async def test_a_tenant_has_so_many_images_fetched_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imagegenx, "MOST_FETCHES", 1)
    asked, answer = asyncio.Event(), asyncio.Event()

    async def slow(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.set()
        await answer.wait()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(png()) + png())
        writer.close()

    host = await asyncio.start_server(slow, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{host.sockets[0].getsockname()[1]}/"
    async with serve(tmp_path, work=picture, fetch="any", **MODELS) as server, host:
        first = asyncio.ensure_future(post(server, "img2img", image_url=url))
        await asked.wait()
        second = await post(server, "img2img", image_url=url)
        refused(second, 503)
        assert second.headers["retry-after"] == "1"
        answer.set()
        assert (await first).status_code == 200
        assert (await post(server, "img2img", image_url=url)).status_code == 200


async def test_edges_are_found_by_a_model_that_follows_them(tmp_path: Path) -> None:
    models = {"models_folder": TEST_MODELS, "models": ("repaint", "paint"), "imagegenx_model": "repaint"}
    async with serve(tmp_path, work=picture, **models) as server:
        assert (await post(server, "controlnet", image_url=PICTURE)).status_code == 200
        await server.until_ran()
        (job,) = await server.engine.jobs(None)
        assert job.request.model == "paint"


async def test_the_tasks_of_a_batch_share_their_watermark(server: Server) -> None:
    server.pool.hold()
    mark = {"type": "image", "image_path": PICTURE}
    await post(server, "batch-generate", texts=["x"] * 3, params={"postprocess": {"watermark": mark}})
    marks = [live.job.request.output.watermark for live in server.engine.register.live.values()]
    assert len(marks) == 3 and len({id(mark) for mark in marks}) == 1


async def test_a_batch_has_a_hundred_texts_at_most_and_is_not_cut(server: Server) -> None:
    assert "texts" in refused(await post(server, "batch-generate", texts=["x"] * 101), 422)
    assert "texts" in refused(await post(server, "batch-generate", texts=[]), 422)
    whole = (await post(server, "batch-generate", texts=[f"n{n}" for n in range(100)], resolution="8x8")).json()["data"]
    assert whole["total"] == len(set(whole["task_ids"])) == 100
    for task_id in whole["task_ids"]:
        await ended(server, task_id)
    told = (await server.client.get(whole["query_url"])).json()["data"]
    assert (told["success_count"], told["progress"]) == (100, 100)


async def test_a_batch_is_accepted_whole_or_not_at_all(tmp_path: Path) -> None:
    async with serve(tmp_path, work=picture, queue_jobs=5, **MODELS) as server:
        refused(await post(server, "batch-generate", texts=["x"] * 6), 503)
        assert server.engine.snapshot()["jobs"]["total"] == 0
        assert (await post(server, "batch-generate", texts=["x"] * 5)).status_code == 200


async def test_what_is_not_there(server: Server) -> None:
    for path in ("task/img0000", f"batch-task/batch{'1' * 21}", f"batch-task/batch{'1' * 19}00", "task/..%2F..%2Fetc"):
        refused(await server.client.get(f"/api/v1/image/{path}"), 404)
    gone = await server.client.get(f"/api/v1/image/task/img{'1' * 21}")
    assert refused(gone, 404) == f"Task img{'1' * 21} not found"
    assert (await server.client.get("/temp/../secret")).status_code == 404
    assert refused(await server.client.get(f"/temp/img{'1' * 21}_thumb.webp"), 404)


async def test_keys_and_tenants(tmp_path: Path) -> None:
    async with serve(tmp_path, work=picture, keys_file=keys_file(tmp_path), **MODELS) as server:
        assert refused(await post(server), 401) == "X-API-Key header is required"
        refused(await post(server, headers={"x-api-key": "wrong"}), 403)
        made = (await post(server, headers={"x-api-key": KEY})).json()["data"]
        for key, status in ((KEY, 200), (OTHER_KEY, 404)):
            assert (await server.client.get(made["query_url"], headers={"x-api-key": key})).status_code == status
        assert refused(await post(server, priority=1, headers={"x-api-key": KEY}), 422)


async def test_priorities(server: Server) -> None:
    made = (await post(server, priority=1)).json()["data"]
    (job,) = await server.engine.register.keyed("anonymous", made["task_id"])
    assert job.request.priority is Priority.PAID


async def test_an_unfinished_task_has_no_image(server: Server) -> None:
    server.pool.hold()
    made = (await post(server)).json()["data"]
    assert refused(await server.client.get(made["temp_url"]), 409)
    assert refused(await server.client.get(f"/api/v1/image/file/20260101/{made['task_id']}_1x1.webp"), 409)


async def test_a_second_job_that_was_never_accepted_is_made_up_for(server: Server) -> None:
    """As if the server had died between the end of the first job and the acceptance of the second."""
    server.engine.register.followers.clear()
    params = {"resolution": "16x8", "postprocess": {"super_resolution": "4x", "watermark": {"text": "mine"}}}
    task_id = (await post(server, params=params)).json()["data"]["task_id"]
    (first,) = await server.engine.register.keyed("anonymous", task_id)
    await server.engine.wait(first.id)
    assert first.request.output.format == "png" and first.request.output.watermark is None
    told = await ended(server, task_id)
    assert told["status"] in ("processing", "success")
    told = await ended(server, task_id)
    assert told["status"] == "success" and told["result"]["resolution"] == "64×32"
    _, second = await server.engine.register.keyed("anonymous", task_id)
    assert second.request.output.format == "webp" and second.request.output.watermark.text == "mine"


async def test_a_task_whose_second_job_has_no_room_is_told_all_the_same(tmp_path: Path) -> None:
    async with serve(tmp_path, work=picture, queue_jobs=1, workers=("cpu:0",), **MODELS) as server:
        server.engine.register.followers.clear()
        params = {"resolution": "16x8", "postprocess": {"super_resolution": "4x"}}
        task_id = (await post(server, params=params)).json()["data"]["task_id"]
        (first,) = await server.engine.register.keyed("anonymous", task_id)
        await server.engine.wait(first.id)
        server.pool.hold()
        assert [(await post(server)).status_code for _ in range(4)][-1] == 503
        path = f"/api/v1/image/task/{task_id}"
        assert (await server.client.get(path)).json()["data"]["status"] == "processing"
        refused(await server.client.delete(path), 503)


async def test_no_model_that_draws(tmp_path: Path) -> None:
    async with serve(tmp_path, models=("edit",)) as server:
        assert "generate" in refused(await post(server), 404)
        assert refused(await post(server, model_type="sd15"), 404)


async def test_a_second_job_that_can_never_be_fails_its_task_alone(tmp_path: Path) -> None:
    """The model that enlarges is lost while the first job runs."""
    def lose(item: RunItem, data: bytes) -> bytes:
        for worker in servers[0].engine.up:
            servers[0].engine._arrivals._refused[worker] = {"upscale": "it cannot be loaded"}
        return picture(item, data)

    servers: list[Server] = []
    async with serve(tmp_path, work=lose, **MODELS) as server:
        servers.append(server)
        params = {"resolution": "16x8", "postprocess": {"super_resolution": "2x"}}
        batch = (await post(server, "batch-generate", texts=["x", "y"], params=params)).json()["data"]
        told = [await ended(server, task) for task in batch["task_ids"]]
        assert [one["status"] for one in told] == ["failed"] * 2 and "cannot be loaded" in told[0]["error_msg"]
        whole = (await server.client.get(batch["query_url"])).json()["data"]
        assert (whole["failed_count"], whole["progress"]) == (2, 100)

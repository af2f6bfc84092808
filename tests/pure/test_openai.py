"""OpenAI's API without a process: which model serves, what is refused, and that nothing is left of a refusal."""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.pure.dialect_kit import KEY, Server, keys_file, png, serve, until
from tests.pure.engine_kit import TEST_MODELS

FILES = {"image": ("a.png", png(), "image/png")}


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with serve(tmp_path, models_folder=TEST_MODELS, models=("paint", "repaint", "edit")) as made:
        yield made


async def generate(server: Server, **fields: Any) -> httpx.Response:
    return await server.client.post("/v1/images/generations", json={"prompt": "x", **fields})


def error(answer: httpx.Response) -> dict[str, Any]:
    told: dict[str, Any] = answer.json()["error"]
    assert set(told) == {"message", "type", "param", "code"} and told["message"]
    return told


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 0}, "n"), ({"n": 11}, "n"), ({"size": "wide"}, "size"), ({"size": "0x64"}, "size"),
        ({"output_format": "gif"}, "output_format"), ({"background": "transparent"}, "background"),
        ({"stream": True, "n": 2}, "stream"), ({"num_inference_steps": 1000}, "num_inference_steps"),
        ({"prompt": "  "}, "prompt"), ({"partial_images": 4}, "partial_images"), ({"no_such": 1}, "no_such"),
        ({"width": 5000}, "width"), ({"size": "5000x64"}, "size"),
    ],
)  # fmt: skip
async def test_what_does_not_fit_is_named(server: Server, fields: dict[str, Any], param: str) -> None:
    answer = await generate(server, **fields)
    assert answer.status_code == 400
    assert error(answer)["param"] == param and error(answer)["type"] == "invalid_request_error"
    assert not server.ran and server.engine.snapshot()["jobs"]["total"] == 0


async def test_a_stream_is_of_one_image_as_there(server: Server) -> None:
    assert error(await generate(server, stream=True, n=2))["message"] == "Streaming is only supported with n=1."


async def send_images(server: Server, count: int, mask: bool = False, **fields: Any) -> httpx.Response:
    files = [("image[]", (f"{number}.png", png(), "image/png")) for number in range(count)]
    files += [("mask", ("mask.png", png(), "image/png"))] if mask else []
    return await server.client.post("/v1/images/edits", files=files, data={"prompt": "x", **fields})


@pytest.mark.parametrize("count", [17, 18, 19, 40])
async def test_more_than_sixteen_images_are_a_bad_request(server: Server, count: int) -> None:
    answer = await send_images(server, count)
    assert answer.status_code == 400 and error(answer)["type"] == "invalid_request_error"
    if count <= 18:
        assert error(answer)["param"] == "image" and f"{count} images were sent" in error(answer)["message"]
    url = f"data:image/png;base64,{base64.b64encode(png()).decode()}"
    body = {"prompt": "x", "images": [{"image_url": url}] * count}
    answer = await server.client.post("/v1/images/edits", json=body)
    assert answer.status_code == 400 and error(answer)["param"] == "image"
    assert not server.ran


async def test_more_images_than_the_models_take_are_a_bad_request(server: Server) -> None:
    answer = await send_images(server, 16, mask=True)
    assert answer.status_code == 400 and error(answer)["param"] == "image"
    most = 1 + server.engine.catalogue["repaint"].parts["reference"][1]
    assert f"take {most} at most" in error(answer)["message"]
    assert (await send_images(server, most)).status_code == 200


async def test_sixteen_images_and_a_mask_fit_where_the_model_takes_them(tmp_path: Path) -> None:
    text = (TEST_MODELS / "repaint.toml").read_text()
    models = tmp_path / "models"
    models.mkdir()
    (models / "many.toml").write_text(re.sub(r"reference = \[0, \d+\]", "reference = [0, 15]", text))
    async with serve(tmp_path, models_folder=models, models=("many",)) as server:
        assert (await send_images(server, 16, mask=True)).status_code == 200
        assert [part.role for part in server.ran[0].images].count("reference") == 15


async def test_a_transparent_background_is_cut_out_by_a_second_job(tmp_path: Path) -> None:
    models = {"models_folder": TEST_MODELS, "models": ("paint", "background_remove")}
    async with serve(tmp_path, work=lambda item, data: png(), **models) as server:
        answer = await generate(server, n=2, background="transparent", output_format="webp", size="64x48")
        assert answer.status_code == 200 and answer.json()["background"] == "transparent"
        ran = [(batch.model, item) for worker in server.pool.workers.values() for batch in worker.ran
               for item in batch.items]
        assert sorted(model for model, _ in ran) == ["background_remove"] * 2 + ["paint"] * 2
        assert {item.format.format for model, item in ran if model == "paint"} == {"png"}, "nothing is lost between"
        assert {item.format.format for model, item in ran if model != "paint"} == {"webp"}
        refused = await generate(server, background="transparent", output_format="jpeg")
        assert refused.status_code == 400 and error(refused)["param"] == "background"


async def test_a_remover_that_could_not_be_loaded_is_told_before_anything_is_drawn(tmp_path: Path) -> None:
    models = {"models_folder": TEST_MODELS, "models": ("paint", "background_remove")}
    async with serve(tmp_path, work=lambda item, data: png(), **models) as server:
        for worker in server.engine.up:
            server.engine._arrivals._refused[worker] = {"background_remove": "it cannot be loaded"}
        refused = await generate(server, background="transparent")
        assert refused.status_code == 400 and error(refused)["param"] == "background"
        assert not any(worker.ran for worker in server.pool.workers.values())


async def test_nulls_and_fields_without_effect_are_taken(server: Server) -> None:
    without = {"user": "u", "moderation": "low", "style": "vivid", "safety_identifier": "s", "quality": "hd"}
    answer = await generate(server, size=None, seed=None, **without)
    assert answer.status_code == 200 and "quality" not in answer.json()


async def test_the_setting_names_the_model(tmp_path: Path) -> None:
    models = {"models_folder": TEST_MODELS, "models": ("repaint", "paint")}
    async with serve(tmp_path / "a", **models) as server:
        await server.client.post("/v1/images/edits", files=FILES, data={"prompt": "x"})
        await generate(server)
        assert [batch.model for worker in server.pool.workers.values() for batch in worker.ran] == ["repaint", "paint"]
    async with serve(tmp_path / "b", **models, openai_model="paint", workers=("cpu:0",)) as server:
        await server.client.post("/v1/images/edits", files=FILES, data={"prompt": "x"})
        assert [batch.model for batch in server.pool.workers["cpu:0"].ran] == ["paint"]


async def test_without_a_diffusion_model(tmp_path: Path) -> None:
    async with serve(tmp_path, models=("edit", "upscale")) as server:
        refused = await generate(server)
        assert refused.status_code == 404 and error(refused)["code"] == "model_not_found"
        assert "generate" in error(refused)["message"]
        edited = await server.client.post("/v1/images/edits", files=FILES, data={"prompt": "warmer"})
        assert base64.b64decode(edited.json()["data"][0]["b64_json"]) == png()
        unread = await server.client.post("/v1/images/edits", files=FILES, data={"prompt": "qwertz"})
        assert unread.status_code == 400
        sized = await server.client.post("/v1/images/edits", files=FILES, data={"prompt": "warmer", "size": "64x48"})
        assert sized.status_code == 200
        resized = await server.client.post("/v1/images/edits", files=FILES, data={"prompt": "warmer", "size": "9x9"})
        assert error(resized)["param"] == "size"


async def test_a_failing_sister_cancels_the_others(server: Server) -> None:
    server.pool.hold()
    asked = server.engine._loop.create_task(generate(server, n=3, response_format="url"))
    await until(lambda: len(server.engine.register.live) == 3)
    await server.engine.cancel(next(iter(server.engine.register.live)))
    server.pool.release()
    assert (await asked).status_code == 409
    states = {job.state.value for job in await server.engine.jobs(None)}
    assert states <= {"cancelled", "succeeded"} and not server.engine.register.live


async def test_json_edits_hold_data_urls(server: Server) -> None:
    url = f"data:image/png;base64,{base64.b64encode(png()).decode()}"
    body = {"prompt": "x", "images": [{"image_url": url}], "mask": {"image_url": url}, "seed": 3}
    answer = await server.client.post("/v1/images/edits", json=body)
    assert answer.status_code == 200
    assert [part.role for part in server.ran[0].images] == ["image", "mask"]
    refused = await server.client.post("/v1/images/edits", json={**body, "images": [{"file_id": "f"}]})
    assert refused.status_code == 400


async def test_keys(tmp_path: Path) -> None:
    async with serve(tmp_path, models=("edit",), keys_file=keys_file(tmp_path)) as server:
        refused = await server.client.get("/v1/models")
        assert refused.status_code == 401 and error(refused)["code"] == "invalid_api_key"
        let_in = await server.client.get("/v1/models", headers={"authorization": f"Bearer {KEY}"})
        assert let_in.json()["data"][0]["id"] == "edit"


async def test_previews_become_partial_images(server: Server) -> None:
    server.pool.hold()
    asked = server.engine._loop.create_task(generate(server, stream=True, partial_images=1))
    await until(lambda: any(live.feed for live in server.engine.register.live.values()))
    (live,) = server.engine.register.live.values()
    assert live.feed is not None
    for picture in ("Zmlyc3Q=", "c2Vjb25k"):  # only the latest is kept
        live.feed.add("preview", {"jpeg": picture}, live.job.created_at + 1)
    server.pool.release()
    lines = (await asked).text.split("\n\n")
    assert [line.partition("\n")[0] for line in lines if line] == [
        "event: image_generation.partial_image", "event: image_generation.completed"
    ]  # fmt: skip
    assert '"b64_json":"c2Vjb25k"' in lines[0] and '"partial_image_index":0' in lines[0]


async def test_a_variation_is_of_an_image(server: Server) -> None:
    answer = await server.client.post("/v1/images/variations", files={"n": (None, "1")})
    assert answer.status_code == 400 and error(answer)["param"] == "image"
    assert not server.ran


async def test_the_seed_minus_1_is_drawn_and_counted_up_from(server: Server) -> None:
    assert (await generate(server, n=3, seed=-1)).status_code == 200
    seeds = sorted(item.params["seed"] for item in server.ran)
    assert seeds == [seeds[0] + number for number in range(3)] and seeds[0] >= 0


async def test_who_waits_for_an_address_while_the_server_drains_has_the_grace_and_then_a_503(server: Server) -> None:
    server.pool.hold()
    runs = [asyncio.create_task(generate(server, response_format="url", seed=seed)) for seed in range(2)]
    await until(lambda: server.engine.snapshot()["jobs"]["running"] == 2)
    server.engine.drain()
    await asyncio.wait(runs, timeout=0.1)
    assert not any(run.done() for run in runs)
    server.pool.release()
    assert [(await run).status_code for run in runs] == [200, 200], "what ran may finish"


async def test_who_waits_for_an_address_when_the_grace_ends_is_told_to_ask_again(server: Server) -> None:
    server.pool.hold()
    runs = [asyncio.create_task(generate(server, response_format="url", seed=seed)) for seed in range(2)]
    await until(lambda: server.engine.snapshot()["jobs"]["running"] == 2)
    server.engine.hurry()
    for run in runs:
        answer = await run
        assert answer.status_code == 503 and error(answer)["code"] == "draining" and answer.headers["retry-after"]

"""The plugins and the mask tool of IOPaint's page, and which of our models they run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.pure.dialect_kit import Server, png
from tests.pure.iopaint_kit import IMAGE, MASK, painted, refusal, text, url, world


def ran(server: Server) -> list[tuple[str, dict[str, Any]]]:
    """(model, parameters) of what reached a worker."""
    batches = [batch for worker in server.pool.workers.values() for batch in worker.ran]
    return [(batch.model, dict(item.params)) for batch in sorted(batches, key=lambda one: one.batch)
            for item in batch.items]


async def plugin(server: Server, kind: str, **body: Any) -> Any:
    return await server.client.post(f"/api/v1/run_plugin_gen_{kind}", json={"image": url(IMAGE), **body})


async def test_a_mask_is_adjusted_by_a_worker(tmp_path: Path) -> None:
    async with world(tmp_path) as server:
        body = {"mask": url(painted()), "operate": "expand"}
        answers = [await server.client.post("/api/v1/adjust_mask", json=body | more)
                   for more in ({}, {"operate": "shrink", "kernel_size": 12})]
        assert ran(server) == [
            ("mask_tools", {"operate": "expand", "kernel_size": 5}),
            ("mask_tools", {"operate": "shrink", "kernel_size": 12}),
        ]
        assert not server.ran[0].images[0].header.alpha
    assert all(answer.status_code == 200 and answer.headers["content-type"] == "image/png" for answer in answers)


@pytest.mark.parametrize("given", [{"operate": "explode"}, {"kernel_size": 101}, {"kernel_size": -1}, {"mask": None}])
async def test_a_mask_cannot_be_adjusted_anyhow(tmp_path: Path, given: dict[str, Any]) -> None:
    async with world(tmp_path) as server:
        body = {"mask": text(MASK), "operate": "expand", **given}
        refusal(await server.client.post("/api/v1/adjust_mask", json=body), 422)
        assert not server.ran


async def test_remove_bg_gives_the_cut_out_or_its_mask(tmp_path: Path) -> None:
    async with world(tmp_path) as server:
        image = await plugin(server, "image", name="RemoveBG")
        mask = await plugin(server, "mask", name="RemoveBG", clicks=[[1, 2, 1, 0]])
        models = ran(server)
        assert server.ran[0].format.keep_metadata
    assert [answer.headers["content-type"] for answer in (image, mask)] == ["image/png"] * 2
    assert [model for model, _ in models] == ["background_remove", "background_remove", "mask_tools"]
    assert [params["output"] for _, params in models[:2]] == ["rgba", "mask"] and models[2][1]["operate"] == "brush"


async def test_realesrgan_enlarges_by_two_or_four(tmp_path: Path) -> None:
    async with world(tmp_path) as server:
        for more in ({}, {"scale": 4.0}):
            assert (await plugin(server, "image", name="RealESRGAN", **more)).status_code == 200
        assert [params["scale"] for _, params in ran(server)] == [2, 4]
        told = refusal(await plugin(server, "image", name="RealESRGAN", scale=3), 422)
    assert told["errors"] == "scale must be 2 or 4"


async def test_a_plugin_that_is_not_there_is_told_in_iopaint_s_words(tmp_path: Path) -> None:
    async with world(tmp_path, models=("upscale", "mask_tools")) as server:
        unknown = refusal(await plugin(server, "mask", name="RemoveBG"), 422)
        unable = refusal(await plugin(server, "mask", name="RealESRGAN"), 422)
        crooked = await plugin(server, "image", name="RealESRGAN", clicks=[[0.5, 1, 1]])
    assert unknown["detail"] == "Plugin not found" and unknown["errors"] == "422: Plugin not found"
    assert unable["detail"] == "Plugin does not support output image"
    assert crooked.status_code == 422


async def test_without_the_mask_tool_no_masks_are_offered(tmp_path: Path) -> None:
    async with world(tmp_path, models=("background_remove",)) as server:
        (told,) = (await server.client.get("/api/v1/server-config")).json()["plugins"]
        assert told == {"name": "RemoveBG", "support_gen_image": True, "support_gen_mask": False}
        refusal(await plugin(server, "mask", name="RemoveBG"), 422)
        body = {"mask": text(MASK), "operate": "expand"}
        missing = refusal(await server.client.post("/api/v1/adjust_mask", json=body), 404)
        assert "'mask_tools'" in missing["errors"] and not server.ran


async def test_a_found_mask_may_be_as_large_as_an_image(tmp_path: Path) -> None:
    async with world(tmp_path, max_pixels=30_000_000) as server:
        assert (await plugin(server, "mask", name="RemoveBG", image=text(png(6000, 5000)))).status_code == 200


async def test_a_plugin_s_model_can_be_named_but_there_is_one(tmp_path: Path) -> None:
    async with world(tmp_path) as server:
        for plugin_name, model_name, status in (
            ("RemoveBG", "background_remove", 200), ("Nobody", "u2net", 200), ("RemoveBG", "u2net", 200),
            ("RemoveBG", "else", 422),
        ):  # fmt: skip
            body = {"plugin_name": plugin_name, "model_name": model_name}
            answer = await server.client.post("/api/v1/switch_plugin_model", json=body)
            assert answer.status_code == status
            if status == 200:
                assert answer.json() is None
        body = {"plugin_name": "RemoveBG", "model_name": "x" * 100_000}
        refusal(await server.client.post("/api/v1/switch_plugin_model", json=body), 413)

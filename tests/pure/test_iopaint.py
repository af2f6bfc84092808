"""IOPaint's clients against our server: `/api/v1/inpaint` and the small routes beside it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from api.iopaint_schema import InpaintRequest
from core.errors import ModelFailed
from core.request import OutputFormat, Priority
from tests.pure.dialect_kit import KEY, OTHER_KEY, keys_file, until
from tests.pure.image_kit import chunk, exif, insert_after_header, save
from tests.pure.iopaint_kit import IMAGE, MASK, inpaint, page_body, painted, png, refusal, text, url, world
from workers.messages import JobProgress


async def test_the_page_s_own_body_is_taken_with_its_misspelt_names(tmp_path: Path) -> None:
    async with world(tmp_path) as server:
        await server.client.post("/api/v1/model", json={"name": "cv2"})
        answer = await server.client.post("/api/v1/inpaint", json=page_body())
        assert answer.status_code == 200, answer.text
        (item,) = server.ran
    assert answer.content == IMAGE  # the pool in memory gives back what it got
    assert answer.headers["content-type"] == "image/png"
    assert 1 <= int(answer.headers["x-seed"]) <= 99_999_999
    assert dict(item.params) == {
        "hd_strategy": "Crop", "hd_strategy_crop_trigger_size": 800, "hd_strategy_crop_margin": 128,
        "hd_strategy_resize_limit": 1280, "sd_keep_unmasked_area": True, "cv2_flag": "INPAINT_NS", "cv2_radius": 5,
    }  # fmt: skip


async def test_a_mask_counts_by_its_brightness_whatever_its_alpha(tmp_path: Path) -> None:
    async with world(tmp_path) as server:
        await inpaint(server, mask=url(painted()))
        image, mask = server.ran[0].images
    assert (image.role, mask.role) == ("image", "mask")
    assert not mask.header.alpha


async def test_the_seed_that_was_used_is_told(tmp_path: Path) -> None:
    async with world(tmp_path) as server:
        default, given, drawn = [await inpaint(server, **more) for more in ({}, {"sd_seed": 7}, {"sd_seed": -1})]
        seeds = [item.params["seed"] for item in server.ran]
        more = {(await inpaint(server, sd_seed=-1)).headers["x-seed"] for _ in range(3)}
    assert seeds == [42, 7, int(drawn.headers["x-seed"])]
    assert len(more) > 1
    assert (default.headers["x-seed"], given.headers["x-seed"]) == ("42", "7")


@pytest.mark.parametrize(("format", "kind"), [("PNG", "png"), ("JPEG", "jpeg"), ("WEBP", "webp"), ("AVIF", "avif")])
async def test_the_answer_is_of_the_image_s_own_kind_and_full_quality(tmp_path: Path, format: str, kind: str) -> None:
    image = save(Image.new("RGB", (64, 48), "navy"), format)
    async with world(tmp_path) as server:
        answer = await inpaint(server, image=url(image, "image/whatever"))
        (item,) = server.ran
    assert answer.headers["content-type"] == f"image/{kind}"
    assert item.format == OutputFormat(kind, 100, keep_metadata=True, subsampling="420")  # type: ignore[arg-type]


async def test_the_quality_is_a_setting(tmp_path: Path) -> None:
    async with world(tmp_path, iopaint_quality=80) as server:
        await inpaint(server)
        assert server.ran[0].format.quality == 80


async def test_base64_text_is_given_to_who_wants_nothing_else(tmp_path: Path) -> None:
    image = save(Image.new("RGB", (64, 48), "navy"), "JPEG")
    async with world(tmp_path) as server:
        plain = await inpaint(server, {"accept": "text/plain"}, image=text(image))
        usual = await inpaint(server, {"accept": "application/json, text/plain, */*"}, image=text(image))
        assert [item.format.format for item in server.ran] == ["png", "jpeg"]
    assert plain.headers["content-type"].startswith("text/plain") and plain.text == text(image)
    assert float(plain.headers["x-inference-time-ms"]) >= 0
    assert usual.headers["content-type"] == "image/jpeg" and usual.content == image


async def test_sizes_are_compared_upright_and_a_mismatch_is_told_in_iopaint_s_words(tmp_path: Path) -> None:
    turned = save(Image.new("RGB", (48, 64)), "JPEG", exif=exif(6))
    async with world(tmp_path) as server:
        assert (await inpaint(server, image=text(turned))).status_code == 200
        told = refusal(await inpaint(server, mask=text(png(48, 64))), 400)
    assert told == {
        "error": "HTTPException",
        "detail": "Image size((48, 64)) and mask size((64, 48)) not match.",
        "body": "",
        "errors": "400: Image size((48, 64)) and mask size((64, 48)) not match.",
    }


@pytest.mark.parametrize(("given", "status", "error"), [
    ({"image": None}, 422, "InvalidParameter"),
    ({"mask": None}, 422, "InvalidParameter"),
    ({"image": ""}, 400, "InvalidImage"),
    ({"image": "!?."}, 400, "InvalidImage"),
    ({"image": "aGVsbG8="}, 400, "InvalidImage"),
    ({"image": "A"}, 400, "InvalidImage"),
    ({"image": "data:image/png," + text(IMAGE)}, 400, "InvalidImage"),
    ({"image": "data:text/html;base64," + text(IMAGE)}, 400, "InvalidImage"),
    ({"image": text(IMAGE[:60])}, 400, "InvalidImage"),
    ({"mask": text(MASK[:60])}, 400, "InvalidImage"),
    ({"image": text(b"8BPS" + bytes(60))}, 415, "UnsupportedImage"),
    ({"image": text(png(6000, 5000))}, 413, "TooLarge"),
    ({"hd_strategy_crop_margin": -1}, 422, "InvalidParameter"),
    ({"image": 5}, 422, "ValidationFailed"),
    ({"sd_seed": 20.5}, 422, "ValidationFailed"),
    ({"sd_scale": 0}, 422, "ValidationFailed"),
    ({"sd_strength": 1.1}, 422, "ValidationFailed"),
    ({"cv2_flag": "NS"}, 422, "ValidationFailed"),
    ({"prompt": None}, 422, "ValidationFailed"),
    ({"powerpaint_task": "x"}, 422, "ValidationFailed"),
    ({"controlnet_conditioning_scale": 2}, 422, "ValidationFailed"),
])  # fmt: skip
async def test_bad_input_is_the_client_s_fault_and_touches_no_worker(
    tmp_path: Path, given: dict[str, Any], status: int, error: str
) -> None:
    async with world(tmp_path, models=("cv2",)) as server:
        told = refusal(await inpaint(server, **given), status)
        assert told["error"] == error and not server.ran
        assert server.engine.snapshot()["queue"]["bytes"] == 0


async def test_what_does_not_fit_is_listed_as_fastapi_does_without_the_input(tmp_path: Path) -> None:
    async with world(tmp_path) as server:
        told = refusal(await inpaint(server, sd_seed="x" * 50), 422)
        broken = refusal(await server.client.post("/api/v1/inpaint", content=b'{"image": '), 422)
    (item,) = told["detail"]
    assert item["loc"] == ["body", "sd_seed"] and item["type"] == "int_parsing" and "xxx" not in json.dumps(told)
    assert broken["detail"][0]["type"] == "json_invalid"


async def test_numbers_may_come_as_text_and_strange_names_are_ignored(tmp_path: Path) -> None:
    async with world(tmp_path) as server:
        answer = await inpaint(server, sd_seed="20", sd_keep_unmasked_area="true", use_keras_upscale=[{"a": None}])
        assert answer.status_code == 200 and server.ran[0].params["seed"] == 20


@pytest.mark.parametrize("unused", [
    {"hd_strategy_resize_limit": 0},
    {"hd_strategy": "Resize", "hd_strategy_crop_margin": -1},
    {"hd_strategy": "Original", "hd_strategy_resize_limit": -1, "hd_strategy_crop_margin": -1},
])  # fmt: skip
async def test_a_number_that_the_strategy_does_not_look_at_may_be_any(tmp_path: Path, unused: dict[str, Any]) -> None:
    async with world(tmp_path, models=("cv2",)) as server:
        assert (await inpaint(server, **unused)).status_code == 200
        assert server.ran[0].params["hd_strategy"] == unused.get("hd_strategy", "Crop")
        used = {"hd_strategy": "Resize", "hd_strategy_resize_limit": 200, "hd_strategy_crop_trigger_size": 7}
        await inpaint(server, **used)
        await inpaint(server, **used | {"hd_strategy": "Crop"})
        limits = [item.params["hd_strategy_resize_limit"] for item in server.ran[1:]]
        assert (limits, server.ran[2].params["hd_strategy_crop_trigger_size"]) == ([200, 1280], 7)


async def test_a_number_of_steps_beyond_measure_hurts_nobody(tmp_path: Path) -> None:
    async with world(tmp_path, workers=("cpu:0",)) as server:
        server.pool.hold()
        waiting = asyncio.create_task(inpaint(server, sd_steps=10**400))
        await server.until_ran()
        server.pool.say("cpu:0", JobProgress(server.ran[0].job, 0.5))
        server.pool.release()
        assert (await waiting).status_code == 200


def test_of_features_that_exclude_each_other_one_wins() -> None:
    both = InpaintRequest(
        use_extender=True, sd_strength=0.5, enable_controlnet=True, enable_brushnet=True, sd_lcm_lora=True
    )
    assert (both.sd_strength, both.controlnet_conditioning_scale) == (1.0, 0.0)
    assert not both.enable_controlnet and not both.sd_lcm_lora
    alone = InpaintRequest(sd_strength=0.5, enable_controlnet=True, sd_lcm_lora=True)
    assert (alone.sd_strength, alone.controlnet_conditioning_scale) == (0.5, 0.4)
    assert alone.enable_controlnet and alone.sd_lcm_lora


async def test_a_full_queue_is_a_503_that_says_when_to_come_again(tmp_path: Path) -> None:
    async with world(tmp_path, queue_jobs=1) as server:
        server.pool.hold()
        waiting = asyncio.create_task(inpaint(server))
        await server.until_ran()
        answer = await inpaint(server)
        server.pool.release()
        assert (await waiting).status_code == 200
    assert refusal(answer, 503)["error"] == "Overloaded"
    assert int(answer.headers["retry-after"]) >= 1


async def test_a_model_that_fails_is_told_without_its_insides(tmp_path: Path) -> None:
    def fail(*_: object) -> bytes:
        raise ModelFailed("model 'inpaint' could not process this image")

    async with world(tmp_path, work=fail) as server:
        assert refusal(await inpaint(server), 500)["errors"] == "model 'inpaint' could not process this image"


async def test_a_large_body_is_worked_off_in_pieces(tmp_path: Path) -> None:
    noise = save(np.random.default_rng(1).integers(0, 256, (800, 900, 3), np.uint8))
    async with world(tmp_path) as server:
        turns = 0

        async def others() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        task = asyncio.create_task(others())
        answer = await inpaint(server, image=url(noise), mask=text(save(np.zeros((800, 900), np.uint8))))
        task.cancel()
    assert answer.content == noise
    assert turns > len(noise) // (1 << 20)


# --- models ---------------------------------------------------------------------------------------------------------


async def test_switching_the_model_counts_for_later_requests_only(tmp_path: Path) -> None:
    async with world(tmp_path) as server:
        server.pool.hold()
        early = asyncio.create_task(inpaint(server))
        await server.until_ran()
        switched = await server.client.post("/api/v1/model", json={"name": "cv2"})
        late = asyncio.create_task(inpaint(server))
        await server.until_ran(2)
        server.pool.release()
        assert [(await task).status_code for task in (early, late)] == [200, 200]
        models = [batch.model for worker in server.pool.workers.values() for batch in worker.ran]
        now = (await server.client.get("/api/v1/model")).json()
    assert switched.json() == now and now["name"] == "cv2" and now["model_type"] == "inpaint"
    assert sorted(models) == ["cv2", "inpaint"]


async def test_a_body_that_is_to_hold_a_name_is_not_read_for_long(tmp_path: Path) -> None:
    async with world(tmp_path) as server:
        refusal(await server.client.post("/api/v1/model", json={"name": "x" * 100_000}), 413)


@pytest.mark.parametrize("name", ["sd-inpaint", "../lama", "background_remove", "mask_tools", ""])
async def test_a_wrong_model_name_changes_nothing(tmp_path: Path, name: str) -> None:
    async with world(tmp_path) as server:
        assert refusal(await server.client.post("/api/v1/model", json={"name": name}), 404)["error"] == "UnknownModel"
        assert (await server.client.get("/api/v1/model")).json()["name"] == "inpaint"
        assert (await inpaint(server)).status_code == 200


async def test_each_tenant_has_its_own_model(tmp_path: Path) -> None:
    async with world(tmp_path, keys_file=keys_file(tmp_path, tier="enterprise")) as server:
        ours, theirs = ({"x-api-key": key} for key in (KEY, OTHER_KEY))
        await server.client.post("/api/v1/model", json={"name": "cv2"}, headers=ours)
        names = [(await server.client.get("/api/v1/model", headers=who)).json()["name"] for who in (ours, theirs)]
        assert names == ["cv2", "inpaint"]
        refusal(await server.client.get("/api/v1/model"), 401)


async def test_a_job_is_its_caller_s_and_lives_no_longer_than_a_request(tmp_path: Path) -> None:
    keys = keys_file(tmp_path, tier="enterprise", priority="paid")
    async with world(tmp_path, keys_file=keys, request_timeout=77.0) as server:
        server.pool.hold()
        waiting = asyncio.create_task(inpaint(server, {"x-api-key": KEY}))
        await server.until_ran()
        (live,) = server.engine.register.live.values()
        asked = live.job.request
        server.pool.release()
        assert (await waiting).status_code == 200
    assert (asked.tenant, asked.priority, asked.deadline, asked.durable) == ("acme", Priority.PAID, 77.0, False)


async def test_a_body_that_the_queue_never_holds_is_refused_by_its_announced_length(tmp_path: Path) -> None:
    async with world(tmp_path, queue_bytes=1 << 20) as server:
        told = refusal(await inpaint(server, prompt="x" * (1 << 20)), 413)
        assert "queues" in told["errors"] and not server.ran


async def test_a_server_without_inpainting_models_says_so(tmp_path: Path) -> None:
    async with world(tmp_path, models=("upscale",)) as server:
        refusal(await inpaint(server), 404)
        refusal(await server.client.get("/api/v1/model"), 404)
        told = (await server.client.get("/api/v1/server-config")).json()
    assert told["modelInfos"] == [] and [plugin["name"] for plugin in told["plugins"]] == ["RealESRGAN"]


async def test_the_server_s_configuration_has_every_field_the_page_reads(tmp_path: Path) -> None:
    async with world(tmp_path) as server:
        told = (await server.client.get("/api/v1/server-config")).json()
        samplers = (await server.client.get("/api/v1/samplers")).json()
    assert set(told) == {
        "plugins", "modelInfos", "removeBGModel", "removeBGModels", "realesrganModel", "realesrganModels",
        "interactiveSegModel", "interactiveSegModels", "enableFileManager", "enableAutoSaving", "enableControlnet",
        "controlnetMethod", "disableModelSwitch", "isDesktop", "samplers",
    }  # fmt: skip
    assert told["plugins"] == [
        {"name": "RemoveBG", "support_gen_image": True, "support_gen_mask": True},
        {"name": "RealESRGAN", "support_gen_image": True, "support_gen_mask": False},
    ]
    assert {model["name"] for model in told["modelInfos"]} == {"inpaint", "cv2"}
    assert set(told["modelInfos"][0]) == {
        "name", "path", "model_type", "is_single_file_diffusers", "need_prompt", "controlnets", "brushnets",
        "support_strength", "support_outpainting", "support_lcm_lora", "support_controlnet", "support_brushnet",
        "support_powerpaint_v2",
    }  # fmt: skip
    assert not (told["isDesktop"] or told["disableModelSwitch"] or told["enableFileManager"])
    assert samplers == told["samplers"] and len(samplers) == 19 and samplers[17:] == ["UniPC", "LCM"]


# --- the small routes -----------------------------------------------------------------------------------------------


async def test_without_an_input_image_the_page_hears_so_with_200(tmp_path: Path) -> None:
    async with world(tmp_path) as server:
        told = refusal(await server.client.get("/api/v1/inputimage"), 200)
    assert told["errors"] == "200: No input image configured"


async def test_the_input_image_is_served_as_what_it_is(tmp_path: Path) -> None:
    file = tmp_path / "start.bin"
    file.write_bytes(save(Image.new("RGB", (9, 9)), "JPEG"))
    async with world(tmp_path, iopaint_input=file) as server:
        answer = await server.client.get("/api/v1/inputimage")
        assert answer.content == file.read_bytes() and answer.headers["content-type"] == "image/jpeg"
        assert "content-disposition" not in answer.headers
        file.unlink()
        refusal(await server.client.get("/api/v1/inputimage"), 404)


PROMPT = "a cat, 猫\nNegative prompt: dog, fish\nSteps: 20"


@pytest.mark.parametrize(("data", "prompt", "negative"), [
    (insert_after_header(IMAGE, chunk(b"tEXt", b"parameters\0a cat\nNegative prompt: dog\nSteps: 20")), "a cat", "dog"),
    (insert_after_header(IMAGE, chunk(b"iTXt", b"parameters\0\0\0\0\0" + PROMPT.encode())), "a cat, 猫", "dog, fish"),
    (insert_after_header(IMAGE, chunk(b"tEXt", b"parameters\0only this")), "only this", ""),
    (insert_after_header(IMAGE, chunk(b"zTXt", b"parameters\0\0not packed")), "", ""),
    (insert_after_header(IMAGE, chunk(b"tEXt", b"Software\0parameters")), "", ""),
    (IMAGE, "", ""),
    (save(Image.new("RGB", (9, 9)), "JPEG"), "", ""),
])
async def test_the_prompt_of_a_png_is_read(tmp_path: Path, data: bytes, prompt: str, negative: str) -> None:
    async with world(tmp_path) as server:
        answer = await server.client.post("/api/v1/gen-info", files={"file": ("a.png", data)})
    assert answer.json() == {"prompt": prompt, "negative_prompt": negative}


async def test_a_compressed_prompt_cannot_be_a_bomb(tmp_path: Path) -> None:
    import zlib

    bomb = zlib.compress(b"a" * (32 << 20), 9)
    data = insert_after_header(IMAGE, chunk(b"zTXt", b"parameters\0\0" + bomb))
    async with world(tmp_path) as server:
        answer = await server.client.post("/api/v1/gen-info", files={"file": ("a.png", data)})
        assert answer.json()["prompt"] == "a" * (64 << 10)
        refusal(await server.client.post("/api/v1/gen-info", files={"file": ("a.png", b"no image")}), 400)


async def test_the_bound_on_pixels_is_the_server_s_in_every_route(tmp_path: Path) -> None:
    file = tmp_path / "large.png"
    file.write_bytes(png(6000, 5000))
    async with world(tmp_path, max_pixels=30_000_000, iopaint_input=file) as server:
        for path in ("gen-info", "save_image"):
            answer = await server.client.post(f"/api/v1/{path}", files={"file": ("a.png", file.read_bytes())})
            assert answer.status_code == 200
        assert (await server.client.get("/api/v1/inputimage")).status_code == 200


async def test_a_file_has_the_bound_of_its_sender(tmp_path: Path) -> None:
    keys = keys_file(tmp_path, tier="small")
    async with world(tmp_path, keys_file=keys, tiers={"small": {"max_file": 1 << 10}}) as server:
        for path in ("gen-info", "save_image"):
            file = {"file": ("a.png", insert_after_header(IMAGE, chunk(b"teXt", bytes(2 << 20))))}
            answer = await server.client.post(f"/api/v1/{path}", files=file, headers={"x-api-key": KEY})
            assert refusal(answer, 413)["error"] == "TooLarge"


async def test_an_image_is_saved_under_its_own_name(tmp_path: Path) -> None:
    async with world(tmp_path) as server:
        for data in (MASK, IMAGE):
            answer = await server.client.post("/api/v1/save_image", files={"file": ("my café.png", data)})
            assert answer.status_code == 200 and answer.json() is None
    saved = tmp_path / "outputs" / "saved"
    assert [file.name for file in saved.iterdir()] == ["my café.png"]
    assert (saved / "my café.png").read_bytes() == IMAGE


@pytest.mark.parametrize("name", ["../../escaped.png", "/etc/cron.d/escaped.png", "..\\..\\escaped.png"])
async def test_only_the_last_part_of_a_name_counts(tmp_path: Path, name: str) -> None:
    async with world(tmp_path) as server:
        await server.client.post("/api/v1/save_image", files={"file": (name, IMAGE)})
    found = [file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("escaped.png")]  # noqa: ASYNC240
    assert found == ["outputs/saved/escaped.png"]


@pytest.mark.parametrize(("name", "data", "status"), [
    ("..", IMAGE, 400), (".hidden", IMAGE, 400), ("a/", IMAGE, 400), ("x" * 300 + ".png", IMAGE, 400),
    ("page.html", b"<html>", 400), ("a.psd", b"8BPS" + bytes(60), 415),
])  # fmt: skip
async def test_what_is_no_image_or_has_no_proper_name_is_not_saved(
    tmp_path: Path, name: str, data: bytes, status: int
) -> None:
    async with world(tmp_path) as server:
        refusal(await server.client.post("/api/v1/save_image", files={"file": (name, data)}), status)
    assert not (tmp_path / "outputs" / "saved").exists()


async def test_each_tenant_saves_into_its_own_folder(tmp_path: Path) -> None:
    async with world(tmp_path, keys_file=keys_file(tmp_path, tier="enterprise")) as server:
        for key, image in ((KEY, IMAGE), (OTHER_KEY, MASK)):
            file = {"file": ("a.png", image)}
            answer = await server.client.post("/api/v1/save_image", files=file, headers={"x-api-key": key})
            assert answer.status_code == 200
    saved = tmp_path / "outputs" / "saved"
    assert [(saved / f"of-{tenant}" / "a.png").read_bytes() for tenant in ("acme", "zenith")] == [IMAGE, MASK]


async def test_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    form = b"--b\r\nContent-Disposition: form-data; name=file; filename=\"\\ud800.png\"\r\n\r\n%b\r\n--b--\r\n" % IMAGE
    kind = {"content-type": "multipart/form-data; boundary=b; charset=unicode_escape"}
    async with world(tmp_path) as server:
        refusal(await server.client.post("/api/v1/save_image", content=form, headers=kind), 400)


async def test_saving_has_a_bound_and_can_be_turned_off(tmp_path: Path) -> None:
    async with world(tmp_path, iopaint_saved=len(IMAGE) + 10) as server:
        answers = [
            await server.client.post("/api/v1/save_image", files={"file": (name, IMAGE)}) for name in ("a.png", "b.png")
        ]
    assert answers[0].status_code == 200
    refusal(answers[1], 507)
    async with world(tmp_path, iopaint_saved=0) as server:
        refusal(await server.client.post("/api/v1/save_image", files={"file": ("c.png", IMAGE)}), 400)


@pytest.mark.parametrize("path", ["medias?tab=input", "media_file?tab=input&filename=/etc/hostname",
                                  "media_thumbnail_file?tab=input&filename=../x", "nonsense"])
async def test_there_is_no_file_manager_to_climb_out_of(tmp_path: Path, path: str) -> None:
    async with world(tmp_path) as server:
        answer = await server.client.get(f"/api/v1/{path}")
    assert answer.status_code == 404 and "root" not in answer.text


async def test_jobs_and_images_of_the_neighbouring_api_keep_their_own_errors(tmp_path: Path) -> None:
    async with world(tmp_path) as server:
        answer = await server.client.get("/api/v1/jobs/00000000-0000-4000-8000-000000000000")
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "JOB_NOT_FOUND"


async def test_the_description_of_the_api_knows_the_body(tmp_path: Path) -> None:
    async with world(tmp_path) as server:
        told = (await server.client.get("/openapi.json")).json()["paths"]["/api/v1/inpaint"]["post"]
    properties = told["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert properties["hd_strategy_crop_trigger_size"]["default"] == 800
    assert set(told["responses"]["200"]["content"]) >= {"image/png", "image/jpeg", "image/webp", "image/avif"}


# --- clients that leave ---------------------------------------------------------------------------------------------


async def test_forty_clients_that_leave_cost_no_forward_but_the_one_that_runs(tmp_path: Path) -> None:
    async with world(tmp_path, workers=("cpu:0",), models=("cv2",)) as server:
        server.pool.hold()
        tasks = [asyncio.create_task(inpaint(server, image=text(png(64, 48, "red")))) for _ in range(41)]
        await until(lambda: server.engine.snapshot()["jobs"]["total"] == 41)
        begun = len(server.ran)
        assert begun < 40
        for task in tasks[:40]:
            task.cancel()
        await asyncio.wait(tasks[:40])
        snapshot = server.engine.snapshot()["jobs"]
        assert snapshot["queued"] + snapshot["running"] <= begun + 1
        server.pool.release()
        assert (await tasks[40]).status_code == 200
        assert len(server.ran) <= begun + 1
        assert server.engine.arena.spans == 0

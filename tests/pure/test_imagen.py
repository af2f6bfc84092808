"""The imagen API as its clients see it, over the real engine and a pool in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from core.errors import ModelFailed, RateLimited
from core.settings import Settings
from tests.pure.dialect_kit import KEY, OTHER_KEY, Server, keys_file, png, serve
from workers.messages import RunItem

NO_ONE = "00000000-0000-4000-8000-000000000000"
PATHS = {
    "upscale": ("upscale", "upscale"),
    "enhance": ("enhance", "enhance"),
    "style/comic": ("style-comic", "style_comic"),
    "style/aged": ("style-aged", "style_aged"),
    "background/remove": ("background-remove", "background_remove"),
}


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with serve(tmp_path) as server:
        yield server


async def post(
    server: Server, path: str, image: bytes | None = None, *, key: str = "", query: dict[str, Any] | None = None,
    **form: Any,
) -> httpx.Response:  # fmt: skip
    return await server.client.post(
        f"/api/v1/images/{path}",
        params=query or {},
        data=form,
        files={"file": ("../../photo.png", png() if image is None else image, "image/png")},
        headers={"X-API-Key": key} if key else {},
    )


async def final(server: Server, job_id: str) -> dict[str, Any]:
    while True:
        told: dict[str, Any] = (await server.client.get(f"/api/v1/jobs/{job_id}")).json()
        if told["status"] in ("completed", "failed"):
            return told
        await asyncio.sleep(0.001)  # not 0: a loop that never waits keeps the store from the interpreter lock


async def params_of(server: Server, path: str, **sent: Any) -> dict[str, Any]:
    """The parameters that reach the worker."""
    before = len(server.ran)
    answer = await post(server, path, **sent)
    assert answer.status_code == 200, answer.text
    await server.until_ran(before + 1)
    job_id = answer.json()["job_id"]
    await final(server, job_id)
    return next(dict(item.params) for item in server.ran if item.job == job_id)


def code_of(answer: httpx.Response) -> tuple[int, str]:
    """Status and code of an error; its envelope is checked on the way."""
    error = answer.json()["error"]
    assert set(answer.json()) == {"error"} and set(error) <= {"code", "message", "request_id", "details"}
    assert error["message"] and error["request_id"] == answer.headers["x-request-id"]
    return answer.status_code, error["code"]


@pytest.mark.parametrize("path", PATHS)
async def test_a_job_is_queued_told_and_downloaded(server: Server, path: str) -> None:
    picture = png(40, 60)
    answer = await post(server, path, picture)
    assert answer.status_code == 200
    job_id = answer.json()["job_id"]
    assert answer.json() == {"job_id": job_id, "status": "queued", "message": "Job queued successfully"}
    told = await final(server, job_id)
    assert {
        "job_id", "type", "status", "input_path", "output_path", "output_url", "params", "error", "created_at",
        "updated_at",
    } <= set(told)  # fmt: skip
    assert (told["job_id"], told["type"], told["status"], told["error"]) == (job_id, PATHS[path][0], "completed", None)
    assert datetime.fromisoformat(told["created_at"]) <= datetime.fromisoformat(told["updated_at"])
    assert told["input_path"] is None  # it is removed by then
    assert told["output_path"] == f"outputs/{job_id}.png"
    result = await server.client.get(told["output_url"])
    assert (result.status_code, result.headers["content-type"], result.content) == (200, "image/png", picture)
    assert (await server.engine.job(job_id)).request.model == PATHS[path][1]


@pytest.mark.parametrize(
    "path, name, low, high",
    [
        ("upscale", "prompt", "", "sharp"), ("upscale", "num_inference_steps", 2, 90), ("upscale", "scale", 2, 4),
        ("upscale", "guidance_scale", 1.5, 15.0), ("upscale", "negative_prompt", "", "blurry"),
        ("enhance", "prompt", "soft", "sharp"), ("enhance", "strength", 0.2, 0.9),
        ("enhance", "guidance_scale", 2.0, 12.0), ("style/comic", "prompt", "", "black and white"),
        ("style/comic", "strength", 0.2, 0.9), ("style/comic", "guidance_scale", 2.0, 12.0),
        ("style/aged", "prompt", "", "grain"), ("style/aged", "strength", 0.2, 0.9),
        ("style/aged", "guidance_scale", 2.0, 12.0),
    ],
)  # fmt: skip
async def test_every_parameter_reaches_the_model_from_query_and_form(
    server: Server, path: str, name: str, low: Any, high: Any
) -> None:
    lows = await params_of(server, path, query={name: low})
    highs = await params_of(server, path, query={name: high})
    assert lows != highs
    assert await params_of(server, path, **{name: high}) == highs
    assert await params_of(server, path, query={name: low}, **{name: high}) == highs, "the form wins"


async def test_defaults_are_those_of_the_contract(server: Server) -> None:
    told = {path: (await final(server, (await post(server, path)).json()["job_id"]))["params"] for path in PATHS}
    assert told["upscale"] == {
        "prompt": "", "negative_prompt": "", "num_inference_steps": 20, "guidance_scale": 7.5, "scale": 4
    }  # fmt: skip
    assert told["enhance"] == {"prompt": "high quality, detailed, sharp", "strength": 0.3, "guidance_scale": 7.5}
    assert told["style/comic"] == told["style/aged"] == {"prompt": "", "strength": 0.6, "guidance_scale": 8.0}
    assert told["background/remove"] == {}


@pytest.mark.parametrize(
    "path, name, value",
    [
        ("upscale", "num_inference_steps", 0), ("upscale", "num_inference_steps", 101), ("upscale", "scale", 3),
        ("upscale", "guidance_scale", 20.5), ("upscale", "guidance_scale", "nan"), ("enhance", "strength", 0.05),
        ("enhance", "strength", 1.01), ("enhance", "strength", "strong"), ("style/comic", "guidance_scale", 0),
        ("style/aged", "strength", "1e400"), ("upscale", "num_inference_steps", 10**30),
    ],
)  # fmt: skip
@pytest.mark.parametrize("where", ["query", "form"])
async def test_a_parameter_out_of_range_is_a_validation_error(
    server: Server, path: str, name: str, value: Any, where: str
) -> None:
    sent = {"query": {name: value}} if where == "query" else {name: value}
    assert code_of(await post(server, path, **sent)) == (422, "VALIDATION_ERROR")
    assert server.engine.snapshot()["jobs"]["total"] == 0


@pytest.mark.parametrize("path", PATHS)
async def test_a_missing_file_is_a_validation_error(server: Server, path: str) -> None:
    assert code_of(await server.client.post(f"/api/v1/images/{path}")) == (422, "VALIDATION_ERROR")


@pytest.mark.parametrize("content", [b"", b"x", b"GIF89a" + bytes(40), png(31, 100), png(8193, 32)])
async def test_what_is_no_image_or_out_of_bounds_is_an_invalid_image(server: Server, content: bytes) -> None:
    assert code_of(await post(server, "upscale", content)) == (400, "INVALID_IMAGE")
    assert server.engine.snapshot()["jobs"]["total"] == 0


@pytest.mark.parametrize("size", [32, 8192])
async def test_the_bounds_themselves_are_taken(server: Server, size: int) -> None:
    assert (await post(server, "background/remove", png(size, 32))).status_code == 200


@pytest.mark.parametrize("tail", ["", "/result"])
@pytest.mark.parametrize("job_id", [NO_ONE, "nobody", "%00", "x" * 5000])
async def test_an_unknown_job_is_not_found(server: Server, job_id: str, tail: str) -> None:
    assert code_of(await server.client.get(f"/api/v1/jobs/{job_id}{tail}")) == (404, "JOB_NOT_FOUND")


async def test_a_waiting_job_is_queued_then_processing_and_has_no_result_yet(tmp_path: Path) -> None:
    async with serve(tmp_path, boots=False, workers=["cpu:0"]) as server:
        server.pool.hold()
        job_id = (await post(server, "enhance")).json()["job_id"]
        assert (await server.client.get(f"/api/v1/jobs/{job_id}")).json()["status"] == "queued"
        server.pool.boot("cpu:0")
        await server.until_ran()
        told = (await server.client.get(f"/api/v1/jobs/{job_id}")).json()
        assert (told["status"], told["output_url"], told["output_path"]) == ("processing", None, None)
        early = await server.client.get(f"/api/v1/jobs/{job_id}/result")
        assert code_of(early) == (409, "ERR_409") and early.json()["error"]["details"]["status"] == "processing"


async def test_a_failed_job_tells_why_and_its_result_is_a_processing_error(tmp_path: Path) -> None:
    def fail(item: RunItem, data: bytes) -> bytes:
        raise ModelFailed("the model raised")

    async with serve(tmp_path, work=fail) as server:
        job_id = (await post(server, "enhance")).json()["job_id"]
        told = await final(server, job_id)
        assert (told["status"], told["error"], told["output_url"]) == ("failed", "the model raised", None)
        assert code_of(await server.client.get(f"/api/v1/jobs/{job_id}/result")) == (500, "JOB_PROCESSING_ERROR")


async def test_a_cancelled_job_is_failed_so_that_polling_ends(tmp_path: Path) -> None:
    async with serve(tmp_path, boots=False) as server:
        job_id = (await post(server, "upscale")).json()["job_id"]
        await server.engine.cancel(job_id)
        assert (await final(server, job_id))["error"]


async def test_ready_tells_the_truth(tmp_path: Path) -> None:
    async with serve(tmp_path, boots=False) as server:
        nobody = await server.client.get("/ready")
        assert nobody.status_code == 503 and nobody.json()["status"] != "ready" and nobody.headers["retry-after"]
        server.pool.boot("cpu:0")
        somebody = await server.client.get("/ready")
        assert (somebody.status_code, somebody.json()) == (200, {"status": "ready"})


async def test_a_full_queue_is_503_with_retry_after(tmp_path: Path) -> None:
    async with serve(tmp_path, queue_jobs=1) as server:
        server.pool.hold()
        await post(server, "upscale")
        answer = await post(server, "upscale")
        assert code_of(answer) == (503, "ERR_503") and int(answer.headers["retry-after"]) > 0


async def test_limits_are_those_of_the_keys_tier(tmp_path: Path) -> None:
    async with serve(tmp_path, keys_file=keys_file(tmp_path, tier="pro")) as server:
        told = (await server.client.get("/api/v1/images/limits", headers={"X-API-Key": KEY})).json()
        assert told == {
            "tier": "pro",
            "rate_limits": {"requests_per_minute": 60, "requests_per_hour": 1000, "requests_per_day": 10000},
            "max_file_size_mb": 25,
            "max_image_dimension": 8192,
        }
        free = (await server.client.get("/api/v1/images/limits", headers={"X-API-Key": OTHER_KEY})).json()
        assert free["tier"] == "unlimited" and free["rate_limits"]["requests_per_minute"] is None


async def test_an_open_server_has_no_rate_limits(server: Server) -> None:
    told = (await server.client.get("/api/v1/images/limits")).json()
    assert (told["tier"], told["max_file_size_mb"]) == ("anonymous", 64)
    assert set(told["rate_limits"].values()) == {None}


async def test_a_file_beyond_the_tiers_size_is_too_large(tmp_path: Path) -> None:
    async with serve(tmp_path, keys_file=keys_file(tmp_path, tier="free")) as server:
        just = png() + bytes(5 * 2**20 - len(png()))
        assert (await post(server, "enhance", just, key=KEY)).status_code == 200
        assert (await post(server, "enhance", just + b"x", key=OTHER_KEY)).status_code == 200
        over = await post(server, "enhance", just + b"x", key=KEY)
        assert code_of(over) == (413, "ERR_413") and "5 MB" in over.json()["error"]["message"]
        assert code_of(await post(server, "enhance", bytes(30 << 20), key=KEY)) == (413, "ERR_413")


async def test_too_many_requests_are_a_429_of_this_dialect(tmp_path: Path) -> None:
    tiers = Settings(keys_file=tmp_path / "keys.toml", tiers="slow=1/-/-/-").tiers
    async with serve(tmp_path, keys_file=keys_file(tmp_path, tier="slow"), tiers=tiers) as server:
        assert (await post(server, "enhance", key=KEY)).status_code == 200
        answer = await post(server, "enhance", key=KEY)
        assert code_of(answer) == (429, "RATE_LIMIT_EXCEEDED") and int(answer.headers["retry-after"]) > 0
        assert answer.headers["x-ratelimit-limit"] == "1" and answer.headers["x-ratelimit-remaining"] == "0"


def test_a_prompt_stresses_detail_by_its_words_and_their_degree() -> None:
    from api.imagen_params import stress

    rising = ["very blurry", "soft", "", "slightly sharp", "sharp", "extremely sharp"]
    values = [stress(prompt) for prompt in rising]
    assert values == sorted(values) and len(set(values)) == len(values) and stress("") == 1.0
    assert stress("", "blurry") > 1 > stress("", "sharp") and min(values) >= 0.25 and max(values) <= 4


@pytest.mark.parametrize("wait, code", [(3.0, "RATE_LIMIT_EXCEEDED"), (40_000.0, "QUOTA_EXCEEDED")])
def test_a_days_quota_has_its_own_code(wait: float, code: str) -> None:
    from api.imagen import dress

    status, body = dress(RateLimited("no more", retry_after=wait), "id")
    assert (status, body["error"]["code"]) == (429, code)


async def test_with_keys_a_strangers_job_does_not_exist(tmp_path: Path) -> None:
    async with serve(tmp_path, keys_file=keys_file(tmp_path)) as server:
        assert code_of(await post(server, "upscale")) == (401, "ERR_401")
        job_id = (await post(server, "upscale", key=KEY)).json()["job_id"]
        for tail in ("", "/result"):
            answer = await server.client.get(f"/api/v1/jobs/{job_id}{tail}", headers={"X-API-Key": OTHER_KEY})
            assert code_of(answer) == (404, "JOB_NOT_FOUND")
        assert (await server.client.get(f"/api/v1/jobs/{job_id}", headers={"X-API-Key": KEY})).status_code == 200


async def test_openapi_tells_every_route_its_parameters_and_answers(server: Server) -> None:
    paths = (await server.client.get("/openapi.json")).json()["paths"]
    for path in PATHS:
        post_ = paths[f"/api/v1/images/{path}"]["post"]
        assert set(post_["responses"]) >= {"200", "400", "401", "413", "422", "429", "503"}
        assert list(post_["requestBody"]["content"]) == ["multipart/form-data"]
    names = {each["name"] for each in paths["/api/v1/images/upscale"]["post"]["parameters"]}
    assert names == {"prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "scale"}
    assert {"/api/v1/jobs/{job_id}", "/api/v1/jobs/{job_id}/result", "/api/v1/images/limits", "/ready"} <= set(paths)


async def test_an_empty_number_is_no_number_in_query_and_form(server: Server) -> None:
    path = "/api/v1/images/style/comic"
    for query, form in (("?strength=&guidance_scale=9", {}), ("", {"strength": "", "guidance_scale": "9"})):
        answer = await server.client.post(path + query, files={"file": ("a.png", png(40, 60))}, data=form)
        assert answer.status_code == 200, answer.text
        told = (await server.client.get(f"/api/v1/jobs/{answer.json()['job_id']}")).json()
        assert (told["params"]["strength"], told["params"]["guidance_scale"]) == (0.6, 9)


async def test_details_are_always_an_object(server: Server) -> None:
    answer = await server.client.post("/api/v1/images/upscale?scale=x", files={"file": ("a.png", png(40, 60))})
    assert code_of(answer) == (422, "VALIDATION_ERROR")
    assert answer.json()["error"]["details"]["errors"][0]["loc"]

"""The i2ii API as its clients see it, over the real engine and a pool in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from api.dialect import Meter
from core.errors import InvalidParameter, ModelFailed, TooLarge
from core.request import ImageRequest
from engine.engine import Engine
from tests.pure.dialect_kit import KEY, OTHER_KEY, Server, keys_file, png, serve
from workers.contract import Said
from workers.messages import JobProgress, RunItem

NO_ONE = "00000000-0000-4000-8000-000000000000"


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with serve(tmp_path) as server:
        yield server


async def edit(server: Server, image: bytes | None = None, **fields: Any) -> httpx.Response:
    files = {"image": ("photo.png", png() if image is None else image, "image/png")}
    headers = {"X-API-Key": fields.pop("key")} if "key" in fields else {}
    return await server.client.post("/edit", files=files, data={"prompt": "sunset", **fields}, headers=headers)


async def final(server: Server, request_id: str) -> dict[str, Any]:
    """Poll as i2ii's own client does: until "completed" or "error"."""
    while True:
        told: dict[str, Any] = (await server.client.get(f"/status/{request_id}")).json()
        if told["status"] in ("completed", "error"):
            return told
        await asyncio.sleep(0.001)  # not 0: a loop that never waits keeps the store from the interpreter lock


async def test_an_edit_is_submitted_followed_and_downloaded(server: Server, tmp_path: Path) -> None:
    picture = png(70, 50)
    answer = await edit(server, picture)
    told = answer.json()
    assert answer.status_code == 200
    assert set(told) == {
        "request_id", "status", "message", "ready_workers", "total_requests", "estimated_position"
    }  # fmt: skip
    assert (told["status"], told["message"]) == ("submitted", "Request submitted successfully")
    assert (told["ready_workers"], told["total_requests"], told["estimated_position"]) == (2, 1, 1)

    request_id = told["request_id"]
    done = await final(server, request_id)
    assert done["status"] == "completed" and done["request_id"] == request_id
    assert done["output_path"] == f"outputs/{request_id}.png"
    assert done["gpu_id"] in (0, 1) and done["processing_time"] >= 0 and done["request_count"] == 1
    assert done["submitted_at"] <= done["completed_at"] and done["assigned_gpu"] == done["gpu_id"]
    assert [move["status"] for move in done["history"]] == ["queued", "running", "completed"]

    result = await server.client.get(f"/result/{request_id}")
    assert result.status_code == 200 and result.headers["content-type"] == "image/png"
    assert f"{request_id}.png" in result.headers["content-disposition"]
    assert result.content == picture == (tmp_path / "outputs" / f"{request_id}.png").read_bytes()


async def test_while_a_request_waits_and_runs_its_state_and_progress_are_seen(tmp_path: Path) -> None:
    async with serve(tmp_path, workers=["cpu:0"], boots=False) as server:
        server.pool.hold()
        request_id = (await edit(server)).json()["request_id"]
        waiting = (await server.client.get(f"/status/{request_id}")).json()
        assert waiting["status"] == "queued" and waiting["assigned_gpu"] is None
        assert waiting["request_number"] == 1 and waiting["submitted_at"] > 0 and waiting["estimated_position"] == 1

        server.pool.boot("cpu:0")
        await server.until_ran()
        server.pool._listener(Said("cpu:0", 1, JobProgress(request_id, 0.25)))
        running = (await server.client.get(f"/status/{request_id}")).json()
        assert (running["status"], running["progress"], running["assigned_gpu"]) == ("running", 0.25, 0)
        early = await server.client.get(f"/result/{request_id}")
        assert early.status_code == 409 and early.json()["status"] == "running" and "detail" in early.json()

        server.pool.release()
        assert (await final(server, request_id))["progress"] == 1.0


@pytest.mark.parametrize(
    "sent, steps, guidance",
    [((1000, 99), 100, 10.0), ((1, 0.1), 10, 1.0), ((-5, -2.5), 10, 1.0), ((42, 2.5), 42, 2.5)],
)
async def test_steps_and_cfg_are_clamped_not_refused(
    server: Server, sent: tuple[int, float], steps: int, guidance: float
) -> None:
    assert (await edit(server, num_inference_steps=sent[0], true_cfg_scale=sent[1])).status_code == 200
    await server.until_ran()
    assert (server.ran[0].params["steps"], server.ran[0].params["guidance"]) == (steps, guidance)


async def test_every_field_reaches_the_model_stripped(server: Server) -> None:
    await edit(server, prompt="  sunset, grain ", negative_prompt=" grain\n", seed=7)
    await server.until_ran()
    params = server.ran[0].params
    assert (params["prompt"], params["negative_prompt"], params["seed"]) == ("sunset, grain", "grain", 7)
    assert server.ran[0].format.format == "png"


@pytest.mark.parametrize("seed", [-1, 0, 2**31, 2**63 - 1, 2**70, -(2**70) - 3])
async def test_any_whole_number_is_a_seed(server: Server, seed: int) -> None:
    answer = await edit(server, seed=seed)
    assert answer.status_code == 200 and (await final(server, answer.json()["request_id"]))["status"] == "completed"
    used = server.ran[0].params["seed"]
    assert -(2**63) <= used < 2**63 and (used - seed) % 2**64 == 0


@pytest.mark.parametrize("prompt", ["", "   ", "\n\t "])
async def test_a_blank_prompt_is_told_so(server: Server, prompt: str) -> None:
    answer = await edit(server, prompt=prompt)
    assert (answer.status_code, answer.json()) == (400, {"detail": "Prompt cannot be empty"})


async def test_a_prompt_that_asks_for_nothing_known_is_a_400_with_a_sentence(server: Server) -> None:
    answer = await edit(server, prompt="qwertz")
    assert answer.status_code == 400 and set(answer.json()) == {"detail"} and "understood" in answer.json()["detail"]
    assert server.engine.snapshot()["jobs"]["total"] == 0


@pytest.mark.parametrize("content", [b"", b"x", b"<svg/>", b"GIF89a" + bytes(40), png()[:20]])
async def test_what_is_no_image_is_a_400_that_says_why(server: Server, content: bytes) -> None:
    answer = await edit(server, content)
    assert answer.status_code == 400 and answer.json()["detail"].startswith("Invalid image: ")
    assert server.engine.snapshot()["jobs"]["total"] == 0


@pytest.mark.parametrize("size", [10 * 1024 * 1024 + 1, 12 * 1024 * 1024])
async def test_more_than_10_mib_is_too_large_before_its_format_is_looked_at(server: Server, size: int) -> None:
    answer = await edit(server, bytes(size))
    assert (answer.status_code, answer.json()) == (413, {"detail": "Image too large"})


async def test_too_large_is_also_found_without_a_content_length(server: Server) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        for _ in range(12):
            yield bytes(1 << 20)
        yield b"\r\n--b--\r\n"

    kind = {"content-type": "multipart/form-data; boundary=b"}
    answer = await server.client.post("/edit", content=body(), headers=kind)
    assert (answer.status_code, answer.json()) == (413, {"detail": "Image too large"})


@pytest.mark.parametrize("left, passes", [(10, 10), (0, 0), (-1, 0)])
async def test_beyond_its_limit_a_body_is_read_to_its_end_but_not_kept(left: int, passes: int) -> None:
    chunks = [bytes(2)] * 20
    sent = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    sent.append({"type": "http.request", "body": b"x", "more_body": False})

    async def receive() -> dict[str, Any]:
        return sent.pop(0)

    meter, kept = Meter(receive, left, TooLarge("no")), 0
    with pytest.raises(TooLarge):
        while True:
            kept += len((await meter())["body"])
    assert (kept, sent) == (passes, [])


async def test_exactly_10_mib_is_not_too_large(server: Server) -> None:
    picture = png()
    answer = await edit(server, picture + bytes(10 * 1024 * 1024 - len(picture)))
    assert answer.status_code == 200


async def test_a_picture_with_too_many_pixels_is_too_large(tmp_path: Path) -> None:
    async with serve(tmp_path, max_pixels=1000) as server:
        answer = await edit(server)
        assert answer.status_code == 413 and answer.json()["detail"].startswith("Image too large: ")


@pytest.mark.parametrize(
    "fields, where",
    [
        ({"num_inference_steps": "many"}, "num_inference_steps"), ({"true_cfg_scale": "nan"}, "true_cfg_scale"),
        ({"true_cfg_scale": "inf"}, "true_cfg_scale"), ({"seed": "1.5"}, "seed"), ({"seed": "9" * 5000}, "seed"),
    ],
)  # fmt: skip
async def test_a_field_that_is_no_number_gets_fastapis_list(server: Server, fields: dict[str, str], where: str) -> None:
    answer = await edit(server, **fields)
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["body", where] and answer.json()["detail"][0]["msg"]


async def test_missing_fields_get_fastapis_list(server: Server) -> None:
    no_prompt = await server.client.post("/edit", files={"image": ("a.png", png())})
    no_image = await server.client.post("/edit", data={"prompt": "sunset"})
    assert [(a.status_code, a.json()["detail"][0]["loc"]) for a in (no_prompt, no_image)] == [
        (422, ["body", "prompt"]), (422, ["body", "image"])
    ]  # fmt: skip


@pytest.mark.parametrize("body", [b"", b"--x", b"\0\xff" * 50])
async def test_a_broken_form_is_a_4xx_of_this_dialect(server: Server, body: bytes) -> None:
    kind = {"content-type": "multipart/form-data; boundary=b"}
    answer = await server.client.post("/edit", content=body, headers=kind)
    assert answer.status_code in (400, 422) and set(answer.json()) == {"detail"}


@pytest.mark.parametrize("path", ["status", "result"])
@pytest.mark.parametrize("request_id", [NO_ONE, "nobody", "..%2f..%2fetc", "%00", "x" * 5000])
async def test_an_unknown_request_is_not_found(server: Server, path: str, request_id: str) -> None:
    answer = await server.client.get(f"/{path}/{request_id}")
    assert answer.status_code == 404 and "detail" in answer.json()
    if "%2f" not in request_id:
        assert answer.json() == {"detail": "Request not found"}


async def test_a_failed_request_tells_its_error_and_is_never_downloaded_as_a_picture(tmp_path: Path) -> None:
    def fail(item: RunItem, data: bytes) -> bytes:
        raise ModelFailed("the model raised while it ran this job")

    async with serve(tmp_path, work=fail) as server:
        request_id = (await edit(server)).json()["request_id"]
        told = await final(server, request_id)
        assert told["status"] == "error" and told["error"] == "the model raised while it ran this job"
        assert told["error_type"] == "ModelFailed" and told["gpu_id"] in (0, 1)
        assert [move["status"] for move in told["history"]] == ["queued", "running", "error"]
        answer = await server.client.get(f"/result/{request_id}")
        assert answer.status_code == 409 and answer.headers["content-type"] == "application/json"
        assert answer.json()["status"] == "error" and answer.json()["error"] == told["error"]


async def test_a_cancelled_and_an_expired_request_are_errors_so_that_polling_ends(tmp_path: Path) -> None:
    async with serve(tmp_path, boots=False) as server:
        cancelled = (await edit(server)).json()["request_id"]
        await server.engine.cancel(cancelled)
        told = await final(server, cancelled)
        assert (told["status"], told["error_type"], told["gpu_id"]) == ("error", "Cancelled", None)

        expiring = await submit_with_deadline(server.engine, cancelled, 0.001)
        told = await final(server, expiring)
        assert (told["status"], told["error_type"]) == ("error", "DeadlineExceeded")
        system = (await server.client.get("/system/status")).json()
        assert (system["failed_requests"], system["cancelled_requests"], system["expired_requests"]) == (0, 1, 1)


async def submit_with_deadline(engine: Engine, like: str, seconds: float) -> str:
    from api.images import read_image

    params = (await engine.job(like)).request.params
    request = ImageRequest("edit", (read_image(png()),), params, deadline=seconds)
    return (await engine.submit(request)).id


async def test_a_request_survives_its_worker_and_its_history_says_so(server: Server) -> None:
    server.pool.hold()
    request_id = (await edit(server)).json()["request_id"]
    await server.until_ran()
    running = (await server.client.get(f"/status/{request_id}")).json()
    server.pool.crash(f"cpu:{running['assigned_gpu']}")
    await server.until_ran(2)
    server.pool.release()
    told = await final(server, request_id)
    assert told["status"] == "completed" and told["attempts"] == 2
    assert [move["status"] for move in told["history"]] == ["queued", "running", "queued", "running", "completed"]


async def test_a_result_that_retention_removed_is_not_found(server: Server, tmp_path: Path) -> None:
    request_id = (await edit(server)).json()["request_id"]
    await final(server, request_id)
    (tmp_path / "outputs" / f"{request_id}.png").unlink()
    answer = await server.client.get(f"/result/{request_id}")
    assert (answer.status_code, answer.json()) == (404, {"detail": "Result file not found"})


async def test_health_is_healthy_degraded_and_unhealthy_as_workers_are(tmp_path: Path) -> None:
    async with serve(tmp_path, boots=False) as server:
        none = await server.client.get("/health")
        assert none.status_code == 503 and none.json()["status"] == "unhealthy" and none.json()["error"]
        assert int(none.headers["retry-after"]) > 0
        for name, word in (("cpu:0", "degraded"), ("cpu:1", "healthy")):
            server.pool.boot(name)
            some = await server.client.get("/health")
            assert (some.status_code, some.json()["status"]) == (200, word)
        assert {
            "timestamp", "ready_workers", "total_gpus", "total_requests", "completed_requests", "failed_requests"
        } <= set(some.json())  # fmt: skip
        server.engine.drain()
        assert (await server.client.get("/health")).status_code == 503


async def test_a_full_queue_is_503_with_retry_after(tmp_path: Path) -> None:
    async with serve(tmp_path, queue_jobs=1) as server:
        server.pool.hold()
        await edit(server)
        answer = await edit(server)
        assert answer.status_code == 503 and set(answer.json()) == {"detail"} and int(answer.headers["retry-after"]) > 0


async def test_a_server_that_shuts_down_is_503_with_retry_after(server: Server) -> None:
    server.engine.drain()
    answer = await edit(server)
    assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0


async def test_system_status_keeps_its_old_keys_and_tells_each_device(server: Server) -> None:
    for _ in range(3):
        await final(server, (await edit(server)).json()["request_id"])
    server.pool.hold()
    await edit(server)
    await server.until_ran(4)
    told = (await server.client.get("/system/status")).json()
    counts = ("total_gpus", "alive_processes", "ready_workers", "total_requests", "completed_requests",
              "failed_requests", "queued_requests", "running_requests")  # fmt: skip
    assert [told[key] for key in counts] == [2, 2, 2, 4, 3, 0, 1, 1]
    assert told["worker_status"] == {"0": "worker_ready", "1": "worker_ready"}
    assert told["processes_info"]["0"] == {"is_alive": True, "pid": None, "status": "worker_ready"}
    assert len(told["devices"]) == 2 and {
        "device", "name", "memory_total", "memory_used", "utilisation", "temperature", "incarnation", "restarts",
        "current_batch", "batches", "images", "mean_batch_size", "pace",
    } <= set(told["devices"][0])  # fmt: skip
    assert sum(device["images"] for device in told["devices"]) == 3
    batches = [device["current_batch"] for device in told["devices"] if device["current_batch"]]
    assert len(batches) == 1 and batches[0]["size"] == 1
    assert {"by_priority", "by_group"} <= set(told["queue"])


@pytest.mark.parametrize("state, word", [
    ("starting", "starting"), ("ready", "worker_ready"), ("busy", "worker_ready"), ("restarting", "died"),
    ("given_up", "initialization_failed"), ("draining", "stopping"), ("stopped", "stopped"), ("other", "unknown"),
])  # fmt: skip
async def test_worker_states_have_their_old_words(server: Server, state: str, word: str) -> None:
    from api.i2ii_shapes import system_status

    now = server.engine.snapshot()
    now["workers"][0]["state"] = state
    assert system_status(now)["worker_status"]["0"] == word


async def test_with_keys_a_strangers_request_does_not_exist(tmp_path: Path) -> None:
    async with serve(tmp_path, keys_file=keys_file(tmp_path, priority="paid")) as server:
        refused = await edit(server)
        assert refused.status_code == 401 and set(refused.json()) == {"detail"}
        request_id = (await edit(server, key=KEY)).json()["request_id"]
        own, other = ({"X-API-Key": key} for key in (KEY, OTHER_KEY))
        assert (await server.client.get(f"/status/{request_id}", headers=own)).status_code == 200
        for path in ("status", "result"):
            strange = await server.client.get(f"/{path}/{request_id}", headers=other)
            assert (strange.status_code, strange.json()) == (404, {"detail": "Request not found"})
        job = await server.engine.job(request_id)
        assert (job.request.tenant, job.request.priority.name, job.request.dialect) == ("acme", "PAID", "i2ii")


async def test_openapi_lists_the_five_routes_and_every_answer(server: Server) -> None:
    paths = (await server.client.get("/openapi.json")).json()["paths"]
    answers = {path: set(paths[path]["post" if path == "/edit" else "get"]["responses"]) for path in (
        "/edit", "/status/{request_id}", "/result/{request_id}", "/system/status", "/health"
    )}  # fmt: skip
    assert answers["/edit"] >= {"200", "400", "401", "413", "422", "429", "503"}
    assert answers["/status/{request_id}"] >= {"200", "404"}
    assert answers["/result/{request_id}"] >= {"200", "404", "409"}
    assert answers["/health"] >= {"200", "503"}
    assert list(paths["/edit"]["post"]["requestBody"]["content"]) == ["multipart/form-data"]


@pytest.mark.parametrize("make", [lambda: InvalidParameter("a sentence"), lambda: ModelFailed("another")])
def test_every_error_body_is_a_detail(make: Callable[[], InvalidParameter | ModelFailed]) -> None:
    from api.i2ii import dress

    error = make()
    assert dress(error, "id")[1] == {"detail": error.message}

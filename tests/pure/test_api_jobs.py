"""The native API: three ways in, watching, fetching, cancelling, and who may see what."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from api.jobs import event_lines, read_prefer
from core.errors import ModelFailed
from engine.feed import JobEvent
from tests.pure.api_kit import IMAGE, TEXT, ended, held, problem, submit, world
from tests.pure.dialect_kit import Server, png
from tests.pure.key_kit import KEY, OTHER_KEY, keys_file


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with world(tmp_path) as server:
        yield server


# --- in ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sent",
    [
        {"files": {"image": IMAGE}, "data": {"model": "echo", "steps": "7", "params": '{"strength": 0.25}'}},
        {"files": {"image[]": IMAGE}, "data": {"model": "echo", "params": '{"strength": 0.25, "steps": 7}'}},
        {"json": {"model": "echo", "image": TEXT, "params": {"strength": 0.25}, "steps": 7}},
        {"json": {"model": "echo", "image": [f"data:image/png;base64,{TEXT}"], "strength": 0.25, "steps": 7}},
        {"params": {"model": "echo", "strength": "0.25", "steps": "7"}, "content": IMAGE},
    ],
    ids=["form", "form with brackets", "json", "data URL", "bare"],
)
async def test_a_job_comes_in_by_form_json_or_bare_image(server: Server, sent: dict[str, Any]) -> None:
    headers = {"content-type": "image/png"} if "content" in sent else {}
    answer = await server.client.post("/jobs", headers=headers, **sent)
    job = answer.json()
    assert answer.status_code == 202
    assert answer.headers["location"] == f"/jobs/{job['id']}" == job["links"]["self"]
    assert job["params"] == {"strength": 0.25, "steps": 7, "prompt": "", "mode": "soft"}
    job = await ended(server, job)
    assert (job["state"], job["progress"], job["attempts"], job["error"]) == ("succeeded", 1.0, 1, None)
    assert job["device"] in ("cpu:0", "cpu:1")
    assert [move["state"] for move in job["history"]] == ["queued", "running", "succeeded"]
    assert job["created_at"] <= job["started_at"] <= job["ended_at"]
    assert (job["width"], job["height"], job["batch_size"]) == (64, 48, 1)
    assert "compute" in job["timings"]
    assert (await server.client.get(job["links"]["result"])).content == IMAGE


async def test_an_image_and_its_mask_reach_the_worker(server: Server) -> None:
    mask = png(colour="white")
    files = {"image": IMAGE, "mask": mask}
    answer = await server.client.post("/jobs", data={"model": "fill", "seed": "5"}, files=files)
    await ended(server, answer.json())
    (item,) = server.ran
    assert [part.role for part in item.images] == ["image", "mask"]
    assert item.params == {"seed": 5}


async def test_options_reach_the_job(server: Server) -> None:
    job = await submit(server, priority="urgent", format="webp", quality="80", deadline="100")
    await ended(server, job)
    (item,) = server.ran
    assert (item.format.format, item.format.quality) == ("webp", 80)
    assert job["priority"] == 0


async def test_prefer_wait_answers_with_the_ended_job(server: Server) -> None:
    answer = await server.client.post(
        "/jobs", params={"model": "echo"}, content=IMAGE, headers={"content-type": "image/png", "prefer": "wait=20"}
    )
    assert (answer.status_code, answer.json()["state"]) == (200, "succeeded")
    assert answer.headers["preference-applied"] == "wait=20"


async def test_prefer_wait_gives_up_after_its_time_and_the_job_goes_on(server: Server) -> None:
    async with held(server):
        job = await submit(server, headers={"prefer": "wait=0"})
        assert job["state"] in ("queued", "running")
    assert (await ended(server, job))["state"] == "succeeded"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], (0.0, None)),
        (["respond-async"], (0.0, "respond-async")),
        (["respond-async, wait=10"], (0.0, "respond-async")),
        (["wait=\xb2"], (0.0, None)),
        (["handling=strict", 'Wait="7"'], (7.0, "wait=7")),
        (["wait=99999"], (300.0, "wait=300")),
        (["wait=-1"], (0.0, None)),
        (["wait=x, wait = 3"], (3.0, "wait=3")),
    ],
)
def test_preferences_are_read(values: list[str], expected: tuple[float, str | None]) -> None:
    assert read_prefer(values) == expected


# --- out -----------------------------------------------------------------------------------------------------------


async def test_a_result_has_an_etag_and_a_safe_name(server: Server) -> None:
    job = await ended(server, await submit(server))
    answer = await server.client.get(job["links"]["result"])
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["content-disposition"] == f'attachment; filename="{job["id"]}.png"'
    assert answer.headers["x-content-type-options"] == "nosniff"
    for known in (f"W/{answer.headers['etag']}", "*"):
        again = await server.client.get(job["links"]["result"], headers={"if-none-match": known})
        assert (again.status_code, again.content) == (304, b"")


async def test_a_result_that_is_not_there_yet_is_a_409_with_the_state(server: Server) -> None:
    async with held(server):
        job = await submit(server)
        await server.until_ran()
        answer = await server.client.get(job["links"]["result"])
        told = problem(answer)
        assert (answer.status_code, told["code"], told["state"]) == (409, "job_not_finished", "running")
        assert answer.headers["x-should-retry"] == "false"


async def test_a_failed_job_tells_its_own_error(tmp_path: Path) -> None:
    def fail(*_: object) -> bytes:
        raise ModelFailed("the model raised ValueError")

    async with world(tmp_path, work=fail) as server:
        job = await ended(server, await submit(server))
        assert job["state"] == "failed"
        assert job["error"] == {"code": "model_failed", "message": "the model raised ValueError", "retryable": False}
        answer = await server.client.get(job["links"]["result"])
        assert (answer.status_code, problem(answer)["code"]) == (500, "model_failed")
        assert answer.headers["x-should-retry"] == "false"


async def test_a_result_that_was_removed_is_gone(server: Server, tmp_path: Path) -> None:
    job = await ended(server, await submit(server))
    for file in (tmp_path / "outputs").rglob(f"{job['id']}*"):
        file.unlink()
    answer = await server.client.get(job["links"]["result"])
    assert (answer.status_code, problem(answer)["code"]) == (410, "result_gone")


async def test_cancelling_twice_is_the_same_as_once(server: Server) -> None:
    async with held(server):
        job = await submit(server)
        first = await server.client.delete(job["links"]["self"])
        second = await server.client.delete(job["links"]["self"])
        assert (first.status_code, second.status_code) == (200, 200)
        assert first.json()["state"] == second.json()["state"] == "cancelled"
        answer = await server.client.get(job["links"]["result"])
        assert (answer.status_code, problem(answer)["code"]) == (409, "cancelled")


async def test_a_queued_job_has_a_position(server: Server) -> None:
    async with held(server):
        jobs = [await submit(server, strength=str(i / 10)) for i in range(8)]
        told = [(await server.client.get(job["links"]["self"])).json() for job in jobs]
        assert all((job["position"] is not None) == (job["state"] == "queued") for job in told)


async def test_jobs_are_listed_newest_first_by_pages(server: Server) -> None:
    jobs = [await ended(server, await submit(server)) for _ in range(5)]
    ids = [job["id"] for job in reversed(jobs)]
    first = (await server.client.get("/jobs", params={"limit": 2})).json()
    assert [job["id"] for job in first["jobs"]] == ids[:2]
    second = (await server.client.get("/jobs", params={"limit": 3, "before": first["next"]})).json()
    assert [job["id"] for job in second["jobs"]] == ids[2:]
    assert second["next"] is None
    for query, count in (({"state": "succeeded"}, 5), ({"state": "failed"}, 0), ({"model": "fill"}, 0)):
        assert len((await server.client.get("/jobs", params=query)).json()["jobs"]) == count


# --- events --------------------------------------------------------------------------------------------------------


def parse(text: str) -> list[dict[str, str]]:
    return [
        dict(line.split(": ", 1) for line in block.splitlines())
        for block in text.split("\n\n")
        if block and not block.startswith(":")
    ]


async def test_an_event_stream_tells_the_states_and_ends(server: Server) -> None:
    async with held(server):
        job = await submit(server)
        stream = asyncio.create_task(server.client.get(job["links"]["events"]))
        await server.until_ran()
    answer = await stream
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = parse(answer.text)
    states = [orjson.loads(event["data"])["state"] for event in events if event["event"] == "state"]
    assert states == ["queued", "running", "succeeded"]
    numbers = [int(event["id"]) for event in events]
    assert numbers == sorted(set(numbers))


async def test_an_event_stream_goes_on_after_the_last_event_seen(server: Server) -> None:
    job = await ended(server, await submit(server))
    whole = parse((await server.client.get(job["links"]["events"])).text)
    rest = await server.client.get(job["links"]["events"], headers={"last-event-id": whole[-2]["id"]})
    assert parse(rest.text) == whole[-1:]
    odd = await server.client.get(job["links"]["events"], headers={"last-event-id": "x"})
    assert parse(odd.text) == whole


async def test_a_silent_event_stream_shows_that_it_is_alive() -> None:
    closed = asyncio.Event()

    async def silent() -> AsyncIterator[JobEvent]:
        try:
            yield JobEvent(1, "state", {"state": "queued"})
            await asyncio.Event().wait()
        finally:
            closed.set()

    lines = event_lines(silent(), 0.001)
    assert await anext(lines) == b'id: 1\nevent: state\ndata: {"state":"queued"}\n\n'
    assert await anext(lines) == b":keepalive\n\n"
    assert await anext(lines) == b":keepalive\n\n"
    await lines.aclose()  # type: ignore[attr-defined]
    assert closed.is_set()


# --- idempotency ---------------------------------------------------------------------------------------------------


async def test_the_same_idempotency_key_gives_the_same_job(server: Server) -> None:
    headers = {"idempotency-key": "order-1"}
    job = await submit(server, headers=headers)
    again = await submit(server, headers=headers)
    assert again["id"] == job["id"]
    await ended(server, job)
    assert len(server.ran) == 1


async def test_an_idempotency_key_with_another_payload_is_refused(server: Server) -> None:
    await submit(server, headers={"idempotency-key": "order-1"})
    headers = {"content-type": "image/png", "idempotency-key": "order-1"}
    answer = await server.client.post("/jobs", params={"model": "echo", "steps": "3"}, content=IMAGE, headers=headers)
    assert (answer.status_code, problem(answer)["code"]) == (422, "idempotency_mismatch")


async def test_an_idempotency_key_used_twice_at_once_never_makes_two_jobs(server: Server) -> None:
    headers = {"content-type": "image/png", "idempotency-key": "order-1"}
    posts = [server.client.post("/jobs", params={"model": "echo"}, content=IMAGE, headers=headers) for _ in range(4)]
    answers = await asyncio.gather(*posts)
    assert {answer.status_code for answer in answers} <= {200, 202, 409}
    assert len({answer.json()["id"] for answer in answers if answer.status_code < 300}) == 1
    for answer in answers:
        if answer.status_code == 409:
            assert problem(answer)["code"] == "idempotency_in_flight"
            assert answer.headers["x-should-retry"] == "true"


# --- who may see what ----------------------------------------------------------------------------------------------


async def test_another_tenants_job_is_not_found(tmp_path: Path) -> None:
    async with world(tmp_path, keys_file=keys_file(tmp_path)) as server:
        job = await submit(server, headers={"x-api-key": KEY})
        await server.engine.wait(job["id"], 30)
        for method, link in (("GET", "self"), ("GET", "result"), ("GET", "events"), ("DELETE", "self")):
            answer = await server.client.request(method, job["links"][link], headers={"x-api-key": OTHER_KEY})
            assert (answer.status_code, problem(answer)["code"]) == (404, "job_not_found")
            assert (await server.client.request(method, job["links"][link])).status_code == 401
        listed = await server.client.get("/jobs", headers={"x-api-key": OTHER_KEY})
        assert listed.json()["jobs"] == []
        listed = await server.client.get("/jobs", headers={"x-api-key": KEY})
        assert [each["id"] for each in listed.json()["jobs"]] == [job["id"]]


async def test_an_unknown_id_is_not_found(server: Server) -> None:
    answer = await server.client.get("/jobs/6f1b9e0e-0000-4000-8000-000000000000/result")
    assert (answer.status_code, problem(answer)["code"]) == (404, "job_not_found")


# --- models --------------------------------------------------------------------------------------------------------


async def test_models_tell_their_parameters_in_the_words_of_json_schema(server: Server) -> None:
    models = (await server.client.get("/models")).json()["models"]
    assert [model["name"] for model in models] == ["echo", "fill"]
    echo = (await server.client.get("/models/echo")).json()
    assert echo == models[0]
    assert echo["params"]["steps"] == {"type": "integer", "default": 20, "minimum": 1, "maximum": 100}
    assert echo["params"]["mode"]["enum"] == ["soft", "hard"]
    assert echo["limits"]["max_pixels"] == 25_000_000
    assert models[1]["required"] == ["seed"] and models[1]["needs_mask"]

"""`/run`: an image in, an image out, nothing stored."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Message

from api.limits import GONE
from core.errors import OutOfMemory
from core.request import Span
from tests.pure.api_kit import IMAGE, TEXT, held, nothing_happens, problem, world
from tests.pure.dialect_kit import Server, png

PNG = {"content-type": "image/png"}


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with world(tmp_path) as server:
        yield server


async def pieces() -> AsyncIterator[bytes]:
    for at in range(0, len(IMAGE), 10):
        yield IMAGE[at : at + 10]


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("kind", ["image/png", "application/octet-stream", "image/jpeg"])
async def test_the_result_comes_back_with_its_facts_in_headers(server: Server, announced: bool, kind: str) -> None:
    content: Any = IMAGE if announced else pieces()
    answer = await server.client.post("/run/echo", content=content, headers={"content-type": kind})
    assert (answer.status_code, answer.content) == (200, IMAGE)
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["x-device"] in ("cpu:0", "cpu:1")
    assert answer.headers["x-batch-size"] == "1"
    assert float(answer.headers["x-compute-ms"]) == 1.0
    assert "compute;dur=1.00" in answer.headers["server-timing"]
    assert len(answer.headers["x-job-id"]) == 36


async def test_the_body_goes_into_shared_memory_and_nothing_is_left_there(server: Server) -> None:
    for _ in range(3):
        await server.client.post("/run/echo", content=IMAGE, headers=PNG)
    assert all(isinstance(item.images[0].data, Span) for item in server.ran)
    await asyncio.sleep(0)
    assert server.engine.snapshot()["queue"]["bytes"] == 0
    assert server.engine.arena.spans == 0
    assert (await server.client.get("/jobs")).json()["jobs"] == []


async def test_options_come_in_the_query(server: Server) -> None:
    query = {"steps": "9", "format": "jpeg", "quality": "70", "priority": "test", "deadline": "50"}
    answer = await server.client.post("/run/echo", params=query, content=IMAGE, headers=PNG)
    (item,) = server.ran
    assert answer.headers["content-type"] == "image/jpeg"
    assert item.params["steps"] == 9
    assert (item.format.format, item.format.quality) == ("jpeg", 70)


async def test_an_image_and_its_mask_come_as_a_form(server: Server) -> None:
    files = {"image": IMAGE, "mask": png(colour="white")}
    answer = await server.client.post("/run/fill", data={"seed": "4"}, files=files)
    assert (answer.status_code, answer.content) == (200, IMAGE)
    (item,) = server.ran
    assert [part.role for part in item.images] == ["image", "mask"]
    assert item.params == {"seed": 4}


async def test_another_method_is_told_which_one_is_right(server: Server) -> None:
    answer = await server.client.get("/run/echo")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert problem(answer)["code"] == "method_not_allowed"


async def test_a_job_that_fails_tells_its_own_error(tmp_path: Path) -> None:
    def fail(*_: object) -> bytes:
        raise OutOfMemory("it needs 9 GiB; choose a smaller image")

    async with world(tmp_path, work=fail) as server:
        answer = await server.client.post("/run/echo", content=IMAGE, headers=PNG)
        assert (answer.status_code, problem(answer)["code"]) == (500, "out_of_memory")
        assert answer.headers["x-should-retry"] == "false"


async def test_a_full_queue_is_a_503_before_the_body_is_read(tmp_path: Path) -> None:
    async with world(tmp_path, queue_jobs=1) as server, held(server):
        first = asyncio.create_task(server.client.post("/run/echo", content=IMAGE, headers=PNG))
        await server.until_ran()
        read = 0

        async def body() -> AsyncIterator[bytes]:
            nonlocal read
            read += 1
            yield IMAGE

        headers = {**PNG, "content-length": str(len(IMAGE))}
        answer = await server.client.post("/run/echo", content=body(), headers=headers)
        assert (answer.status_code, problem(answer)["code"]) == (503, "overloaded")
        assert int(answer.headers["retry-after"]) >= 1
        server.pool.release()
        assert (await first).status_code == 200


async def test_while_the_server_drains_it_says_so(server: Server) -> None:
    server.engine.drain()
    answer = await server.client.post("/run/echo", content=IMAGE, headers=PNG)
    assert (answer.status_code, problem(answer)["code"]) == (503, "draining")


class Connection:
    """An ASGI connection whose client can go away: by message, or by our protocol's call back."""

    def __init__(self, server: Server, extension: bool) -> None:
        self.transport = server.client._transport
        self.messages: asyncio.Queue[Message] = asyncio.Queue()
        self.sent: list[Message] = []
        self.on_gone: Callable[[], None] | None = None
        self.extension = extension

    def watch(self, on_gone: Callable[[], None] | None) -> None:
        self.on_gone = on_gone

    def leave(self) -> None:
        if self.extension:
            assert self.on_gone is not None
            self.on_gone()
        else:
            self.messages.put_nowait({"type": "http.disconnect"})

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    async def post(self, length: int = len(IMAGE)) -> None:
        scope = {
            "type": "http", "method": "POST", "path": "/run/echo", "raw_path": b"/run/echo", "query_string": b"",
            "headers": [(b"content-type", b"image/png"), (b"content-length", b"%d" % length)],
            "extensions": {GONE: self.watch} if self.extension else {},
        }  # fmt: skip
        await self.transport.app(scope, self.messages.get, self.send)  # type: ignore[attr-defined]


@pytest.mark.parametrize("extension", [True, False])
async def test_a_client_that_goes_away_cancels_its_job_at_once(server: Server, extension: bool) -> None:
    async with held(server):
        connection = Connection(server, extension)
        connection.messages.put_nowait({"type": "http.request", "body": IMAGE})
        request = asyncio.create_task(connection.post())
        await server.until_ran()
        (job,) = (item.job for item in server.ran)
        connection.leave()
        await request
        assert connection.sent == []
        assert job in [dropped for worker in server.pool.workers.values() for dropped in worker.dropped]
    assert server.engine.snapshot()["jobs"]["cancelled"] == 1


@pytest.mark.parametrize("extension", [True, False])
async def test_a_request_after_the_end_of_a_watch_is_not_disturbed(server: Server, extension: bool) -> None:
    connection = Connection(server, extension)
    connection.messages.put_nowait({"type": "http.request", "body": IMAGE})
    await connection.post()
    assert connection.sent[0]["status"] == 200
    assert connection.on_gone is None


async def test_a_client_that_goes_away_in_mid_upload_leaves_nothing(server: Server) -> None:
    async with nothing_happens(server):
        connection = Connection(server, False)
        connection.messages.put_nowait({"type": "http.request", "body": IMAGE[:20], "more_body": True})
        connection.messages.put_nowait({"type": "http.disconnect"})
        await connection.post()
        assert connection.sent == []


@pytest.mark.parametrize("length", [len(IMAGE) - 5, len(IMAGE) + 5])
async def test_a_body_of_another_length_than_announced_is_refused(server: Server, length: int) -> None:
    async with nothing_happens(server):
        connection = Connection(server, False)
        connection.messages.put_nowait({"type": "http.request", "body": IMAGE})
        await connection.post(length)
        assert connection.sent[0]["status"] == 400


async def test_a_json_body_belongs_to_jobs(server: Server) -> None:
    answer = await server.client.post("/run/echo", json={"image": TEXT})
    assert answer.status_code == 415


async def test_words_of_the_prompt_without_effect_are_told_in_a_header(server: Server) -> None:
    for words, told in (([], None), (["dragons", "眼睛", "a\r\nb"], "dragons, %E7%9C%BC%E7%9D%9B, a%0D%0Ab")):
        server.pool.facts = {"recipe": [], "ignored": words}
        answer = await server.client.post("/run/echo", content=IMAGE, headers={"content-type": "image/png"})
        assert answer.status_code == 200 and answer.headers.get("x-ignored") == told
    server.pool.facts = {"ignored": ["眼" * 32] * 32}
    answer = await server.client.post("/run/echo", content=IMAGE, headers={"content-type": "image/png"})
    assert 0 < len(answer.headers["x-ignored"]) <= 1024

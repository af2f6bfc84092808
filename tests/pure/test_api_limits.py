"""The door alone, before an application that only reads."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from api.auth import Keys
from api.errors import STATUS, Wardrobe
from api.limits import MIN_RATE, Body, Door, request_id
from core.errors import BY_CODE, ImagePoolError, Overloaded
from core.settings import Settings, Tier
from engine.metrics import Metrics
from tests.pure.key_kit import KEY, keys_file


class Reader:
    """Answers with the size of the body; a fault that is set is raised, `late` after the answer began."""

    def __init__(self) -> None:
        self.scopes: list[Scope] = []
        self.fault: Exception | None = None
        self.late = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        if self.late:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        if self.fault:
            raise self.fault
        body = await Request(scope, receive).body()
        await Response(str(len(body)))(scope, receive, send)


class World:
    """The door, its application and a client."""

    def __init__(self, folder: Path, **given: Any) -> None:
        self.settings = Settings(**{"outputs": folder / "outputs", "allowed_hosts": ("pool",), **given})
        self.app, self.metrics = Reader(), Metrics()
        self.door = Door(self.app, self.settings, Keys(self.settings.keys_file), Wardrobe(), self.metrics)
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(self.door), base_url="http://pool")

    async def post(self, content: Any = b"", path: str = "/x", **headers: str) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.client.post(path, content=content, headers=named)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path, max_body=2048)


def code(answer: httpx.Response) -> Any:
    return answer.json()["code"]


async def test_a_body_within_the_limit_passes(world: World) -> None:
    assert (await world.post(bytes(2048))).text == "2048"


async def test_a_body_announced_too_large_is_refused_unread(world: World) -> None:
    answer = await world.post(bytes(2049))
    assert (answer.status_code, code(answer)) == (413, "too_large")
    assert world.app.scopes == []


async def test_a_body_too_large_without_an_announcement_is_refused_while_it_comes(world: World) -> None:
    sent = 0

    async def stream() -> Any:
        nonlocal sent
        for _ in range(1000):
            sent += 100
            yield bytes(100)

    answer = await world.post(stream())
    assert (answer.status_code, code(answer)) == (413, "too_large")


@pytest.mark.parametrize("length", ["-1", "1e3", "abc", "9" * 30, "0x10"])
async def test_a_length_that_is_no_number_is_refused(world: World, length: str) -> None:
    assert (await world.post(b"a", content_length=length)).status_code == 400


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate", "identity, gzip"])
async def test_a_compressed_body_is_refused_before_it_could_burst(world: World, encoding: str) -> None:
    answer = await world.post(b"\x1f\x8b", content_encoding=encoding)
    assert (answer.status_code, code(answer)) == (415, "unsupported_encoding")
    assert world.app.scopes == []


async def test_identity_is_no_compression(world: World) -> None:
    assert (await world.post(b"ab", content_encoding="identity")).text == "2"


async def test_a_silent_body_times_out() -> None:
    async def never() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    body = Body(never, 0.001, lambda: 0.0)
    with pytest.raises(ImagePoolError) as caught:
        await body()
    assert caught.value.code == "request_timeout"
    assert caught.value.retryable


def paced(*steps: tuple[float, int]) -> Body:
    """A body whose pieces come after so many seconds each, of so many bytes; the window is of ten seconds."""
    now, coming = 0.0, iter(steps)

    async def receive() -> Message:
        nonlocal now
        seconds, size = next(coming)
        now += seconds
        await asyncio.sleep(0)
        return {"type": "http.request", "body": bytes(size), "more_body": True}

    body = Body(receive, 10.0, lambda: now)
    body.limit = 1 << 30
    return body


@pytest.mark.parametrize(
    "steps",
    [
        [(1.0, MIN_RATE // 2)] * 20,  # never silent
        [(9.0, 1)] * 3,
        [(0.0, 50 << 20), (1.0, 10), *[(1.0, 10)] * 20],  # no credit for what came before
        [*[(1.0, MIN_RATE)] * 30, *[(1.0, MIN_RATE // 2)] * 20],
    ],
)
async def test_a_trickle_times_out_within_two_windows(steps: list[tuple[float, int]]) -> None:
    body = paced(*steps)
    with pytest.raises(ImagePoolError) as caught:
        for _ in steps:
            await body()
    assert caught.value.code == "request_timeout"


@pytest.mark.parametrize(
    "steps", [[(1.0, MIN_RATE)] * 60, [(9.0, 20 * MIN_RATE)] * 10, [(0.0, 1), (9.5, 1), (0.4, 11 * MIN_RATE)]]
)
async def test_a_slow_client_that_keeps_the_rate_is_served(steps: list[tuple[float, int]]) -> None:
    body = paced(*steps)
    for _ in steps:
        await body()
    assert body.size == sum(size for _, size in steps)


def spoken(*pieces: bytes) -> Body:
    """A body that comes in these pieces, from a server that is not ours."""
    messages: list[Message] = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    messages[-1]["more_body"] = False

    async def receive() -> Message:
        return messages.pop(0)

    body = Body(receive, 1.0, lambda: 0.0)
    body.limit = 100
    return body


class Shelf:
    """Room that grows by one byte at a time."""

    def __init__(self, length: int) -> None:
        self.buffer, self._most = memoryview(bytearray(1)), length

    async def grow(self) -> memoryview:
        assert len(self.buffer) < self._most
        self.buffer = memoryview(bytearray(self.buffer) + bytes(1))
        return self.buffer


async def test_a_body_fills_the_room_that_was_made_for_it() -> None:
    room = Shelf(5)
    await spoken(b"ab", b"cde", b"").fill(room, 5)
    assert room.buffer == b"abcde"


async def test_a_body_of_unknown_length_fills_what_room_it_needs() -> None:
    room = Shelf(9)
    body = spoken(b"ab", b"", b"cde")
    await body.gather(room, 9)
    assert room.buffer[: body.size] == b"abcde"
    with pytest.raises(ImagePoolError) as caught:
        await spoken(b"ab", b"cde").gather(Shelf(4), 4)
    assert caught.value.code == "too_large"


async def test_what_lies_ready_is_taken_without_waiting_and_room_grows_as_it_comes() -> None:
    ready = bytearray(b"abcdefgh")

    def take(buffer: memoryview) -> int:
        size = min(len(buffer), len(ready), 3)
        buffer[:size] = ready[:size]
        del ready[:size]
        return size

    async def never() -> Message:
        raise AssertionError

    room = Shelf(8)
    body = Body(never, 1.0, lambda: 0.0, take)
    body.limit = 100
    await body.fill(room, 8)
    assert room.buffer == b"abcdefgh"


@pytest.mark.parametrize("length", [3, 6])
async def test_a_body_that_does_not_fill_its_room_is_refused(length: int) -> None:
    with pytest.raises(ImagePoolError) as caught:
        await spoken(b"ab", b"cde").fill(Shelf(length), length)
    assert caught.value.code == "bad_request"


async def test_waiting_for_the_client_to_leave_has_no_timeout() -> None:
    messages: list[Message] = [{"type": "http.request", "body": b"a"}, {"type": "http.disconnect"}]

    async def receive() -> Message:
        return messages.pop(0)

    body = Body(receive, 1.0, lambda: 0.0)
    body.limit = 10
    await body()
    assert (await body())["type"] == "http.disconnect"


@pytest.mark.parametrize("given", ["", "a" * 129, "a b", "a\tb", "ä", "<b>"])
async def test_a_harmful_request_id_is_replaced(world: World, given: str) -> None:
    answer = await world.client.post("/x", headers=[(b"x-request-id", given.encode())])
    assert answer.headers["x-request-id"] != given
    assert answer.headers["x-request-id"].isalnum()


def test_a_request_id_with_a_line_break_is_replaced() -> None:
    assert "\r" not in request_id(b"a\r\nSet-Cookie: b")


async def test_a_good_request_id_comes_back_also_in_an_error(world: World) -> None:
    assert (await world.post(b"", x_request_id="abc-1.2_3")).headers["x-request-id"] == "abc-1.2_3"
    answer = await world.post(bytes(9999), x_request_id="abc")
    assert answer.headers["x-request-id"] == answer.json()["request_id"] == "abc"
    assert answer.headers["x-response-time"].endswith("ms")
    assert answer.headers["content-type"] == "application/problem+json"


async def test_a_defect_is_told_without_its_message(world: World) -> None:
    world.app.fault = RuntimeError("/secret/path")
    answer = await world.post()
    assert (answer.status_code, code(answer)) == (500, "internal_error")
    assert "secret" not in answer.text
    assert answer.headers["x-should-retry"] == "false"


async def test_an_error_after_the_answer_began_does_not_begin_another(world: World) -> None:
    world.app.fault, world.app.late = Overloaded("full"), True
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.request", "body": b""}

    scope = {"type": "http", "method": "POST", "path": "/x", "headers": []}
    await world.door(scope, receive, send)
    assert len(sent) == 1


@pytest.mark.parametrize(("wait", "seconds", "more"), [(None, "1", "1000"), (0.25, "1", "250"), (7.5, "8", "7500")])
async def test_a_refusal_for_now_says_when_to_come_back(
    world: World, wait: float | None, seconds: str, more: str
) -> None:
    world.app.fault = Overloaded("the queue is full", retry_after=wait)
    answer = await world.post()
    assert answer.status_code == 503
    assert (answer.headers["retry-after"], answer.headers["retry-after-ms"]) == (seconds, more)
    assert answer.headers["x-should-retry"] == "true"
    assert answer.json()["retryable"] is True


async def test_with_keys_a_request_without_a_good_one_is_refused(tmp_path: Path) -> None:
    world = World(tmp_path, keys_file=keys_file(tmp_path))
    missing = await world.post()
    assert (missing.status_code, code(missing)) == (401, "unauthorised")
    assert missing.headers["www-authenticate"].startswith("Bearer")
    assert "ApiKey" in missing.headers["www-authenticate"]
    assert (await world.post(x_api_key="wrong")).status_code == 401
    assert world.app.scopes == []
    assert (await world.post(x_api_key=KEY)).status_code == 200
    assert (await world.post(authorization=f"Bearer {KEY}")).status_code == 200
    assert world.app.scopes[-1]["caller"].tenant == "acme"
    for path in ("/health/live", "/health", "/metrics"):
        assert (await world.client.get(path)).status_code == 200


async def test_a_tier_limits_requests_and_the_size_of_files(tmp_path: Path) -> None:
    tiers = {"small": Tier(per_minute=2, max_file=3000)}
    world = World(tmp_path, keys_file=keys_file(tmp_path, tier="small"), tiers=tiers)
    assert (await world.post(bytes(200_000), x_api_key=KEY)).status_code == 413
    first = await world.post(x_api_key=KEY)
    assert first.headers["ratelimit"].startswith('"minute";r=0')
    second = await world.post(x_api_key=KEY)
    assert (second.status_code, code(second)) == (429, "rate_limited")
    assert 0 < int(second.headers["retry-after"]) <= 30
    assert second.headers["x-should-retry"] == "true"
    assert (await world.client.get("/x", headers={"x-api-key": KEY})).status_code == 200


async def test_requests_are_counted_by_route_never_by_path(world: World) -> None:
    await world.post(b"abc", path="/run/thing")
    await world.post(bytes(9999), path="/anything/goes")
    page = world.metrics.render()[0].decode()
    assert 'route="/run/{model}"' in page
    assert 'status="413"' in page or 'status_code="413"' in page
    assert "anything" not in page


def test_every_error_has_a_status() -> None:
    def tree(kind: type[ImagePoolError]) -> set[str]:
        return {kind.code}.union(*map(tree, kind.__subclasses__()))

    assert set(BY_CODE) | tree(ImagePoolError) - {"http_error"} <= set(STATUS)


def test_the_longest_prefix_gives_the_dress() -> None:
    wardrobe = Wardrobe()
    wardrobe.hang(("/a",), lambda error, name: (418, {"a": error.message}))
    wardrobe.hang(("/a/b",), lambda error, name: (400, {"b": name}))
    fault = Overloaded("full", odd=object())
    assert orjson.loads(wardrobe.respond(fault, "/a/c", "id").body) == {"a": "full"}
    assert orjson.loads(wardrobe.respond(fault, "/a/b/c", "id").body) == {"b": "id"}
    assert orjson.loads(wardrobe.respond(fault, "/c", "id").body)["code"] == "overloaded"


def test_the_documented_statuses_are_those_of_the_code() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "api.md").read_text()
    told: dict[str, int] = {}
    for line in page.splitlines():
        if found := re.match(r"\| ((?:`\w+`(?:, )?)+) \| ([\d, ]+) \|", line):
            codes, statuses = re.findall(r"`(\w+)`", found[1]), [int(word) for word in found[2].split(",")]
            told |= dict(zip(codes, statuses * (len(codes) if len(statuses) == 1 else 1), strict=True))
    assert told == STATUS


async def test_a_load_balancer_s_trace_names_the_request(world: World) -> None:
    answer = await world.post(b"", x_cloud_trace_context="105445aa7843bc8bf206b12000100000/1;o=1")
    assert answer.headers["x-request-id"] == "105445aa7843bc8bf206b12000100000"

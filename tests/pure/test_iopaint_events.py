"""The page's events: Socket.IO over long polling and web sockets, told to the page whose request they are about."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from api import iopaint_events
from api.auth import Caller
from api.iopaint_events import KEPT, MAX_OF_BROWSER, MAX_SESSIONS, PING_EVERY, PING_TIMEOUT, Events
from tests.process.door_kit import listen
from tests.pure.dialect_kit import KEY, Server, keys_file, until
from tests.pure.iopaint_kit import inpaint, world
from workers.messages import JobProgress

QUERY = {"EIO": "4", "transport": "polling"}
FINISHED = '42["diffusion_finish"]'


class Browser:
    """A page of some browser at some address, polling by hand."""

    def __init__(self, server: Server, address: str = "10.0.0.1") -> None:
        app = server.client._transport.app  # type: ignore[attr-defined]
        transport = httpx.ASGITransport(app, client=(address, 50_000))
        self.client = httpx.AsyncClient(transport=transport, base_url="http://pool")
        self.query = dict(QUERY)

    async def open(self) -> dict[str, Any]:
        answer = await self.client.get("/socket.io/", params=self.query)
        assert answer.text[0] == "0"
        told: dict[str, Any] = json.loads(answer.text[1:])
        self.query["sid"] = told["sid"]
        return told

    async def connect(self) -> Browser:
        await self.open()
        assert (await self.send("40")).text == "ok"
        assert (await self.poll()).startswith('40{"sid":')
        return self

    async def send(self, payload: str) -> httpx.Response:
        return await self.client.post("/socket.io/", params=self.query, content=payload)

    async def poll(self) -> str:
        return (await self.client.get("/socket.io/", params=self.query)).text

    async def inpaint(self) -> None:
        assert (await inpaint(SimpleNamespace(client=self.client))).status_code == 200  # type: ignore[arg-type]


async def test_the_handshake_is_iopaint_s(tmp_path: Path) -> None:
    async with world(tmp_path) as server:
        told = await Browser(server).open()
    sid = told.pop("sid")
    assert len(sid) > 15
    assert told == {"upgrades": ["websocket"], "pingInterval": 25_000, "pingTimeout": 20_000, "maxPayload": 1_000_000}


async def test_the_end_of_a_request_is_told_to_its_browser_and_to_nobody_else(tmp_path: Path) -> None:
    async with world(tmp_path) as server:
        one = await Browser(server).connect()
        neighbour = await Browser(server).connect()  # of the same address
        polls = [asyncio.create_task(page.poll()) for page in (one, neighbour)]
        await one.inpaint()
        assert await polls[0] == FINISHED
        await neighbour.inpaint()
        assert await polls[1] == FINISHED


async def test_what_a_script_does_is_told_to_the_pages_of_its_address(tmp_path: Path) -> None:
    async with world(tmp_path) as server:
        here, there = await Browser(server, "10.0.0.1").connect(), await Browser(server, "10.0.0.2").connect()
        await Browser(server, "10.0.0.1").inpaint()
        await there.inpaint()
        await there.inpaint()
        assert await here.poll() == FINISHED
        assert await there.poll() == f"{FINISHED}\x1e{FINISHED}"


async def test_progress_is_told_in_steps_each_once(tmp_path: Path) -> None:
    async with world(tmp_path, workers=("cpu:0",)) as server:
        page = await Browser(server).connect()
        server.pool.hold()
        request = asyncio.create_task(page.inpaint())
        await server.until_ran()
        for fraction in (0.0, 0.01, 0.5, 0.505, 1.0):
            server.pool.say("cpu:0", JobProgress(server.ran[0].job, fraction))
        server.pool.release()
        await request
        told = [json.loads(packet[2:]) for packet in (await page.poll()).split("\x1e")]
    steps = [event[1]["step"] for event in told[:-1]]
    assert steps == [0, 25, 49] and {event[0] for event in told[:-1]} == {"diffusion_progress"}
    assert told[-1] == ["diffusion_finish"]


async def test_a_poll_that_a_newer_one_replaces_takes_no_event_with_it(tmp_path: Path) -> None:
    async with world(tmp_path) as server:
        page = await Browser(server).connect()
        old = asyncio.create_task(page.poll())
        await asyncio.sleep(0)
        new = asyncio.create_task(page.poll())
        assert await old == "6"
        await page.inpaint()
        assert await new == FINISHED


async def test_nothing_for_long_is_a_ping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iopaint_events, "PING_EVERY", 0.01)
    async with world(tmp_path) as server:
        page = await Browser(server).connect()
        assert await page.poll() == "2"
        assert (await page.send("3")).text == "ok"


async def test_what_a_page_says_counts_against_no_rate(tmp_path: Path) -> None:
    tiers = {"slow": {"per_minute": 1}}
    async with world(tmp_path, tiers=tiers, keys_file=keys_file(tmp_path, tier="slow")) as server:
        page = Browser(server)
        page.client.headers["x-api-key"] = KEY
        await page.connect()
        for _ in range(5):
            assert (await page.send("3")).text == "ok"
        await page.inpaint()


async def test_open_polls_end_when_the_server_goes_away(tmp_path: Path) -> None:
    async with world(tmp_path) as server:
        page = await Browser(server).connect()
        poll = asyncio.create_task(page.poll())
        await until(lambda: server.engine.metrics.http_in_progress)
        server.engine.drain()
        assert await poll == "1"


@pytest.mark.parametrize(("query", "code"), [
    ({"EIO": "3"}, 5), ({"transport": "websocket"}, 0), ({"sid": "unknown"}, 1),
])  # fmt: skip
async def test_what_is_not_understood_is_refused_by_the_protocol_s_numbers(
    tmp_path: Path, query: dict[str, str], code: int
) -> None:
    async with world(tmp_path) as server:
        for method in ("GET", "POST"):
            answer = await server.client.request(method, "/socket.io/", params=QUERY | query)
            assert answer.status_code == 400 and answer.json()["code"] == code


async def test_a_post_needs_a_session_and_a_measure(tmp_path: Path) -> None:
    async with world(tmp_path) as server:
        assert (await server.client.post("/socket.io/", params=QUERY, content="40")).json()["code"] == 2
        page = await Browser(server).connect()
        assert (await page.send("4" * 1_000_001)).json()["code"] == 3


async def test_a_namespace_that_is_not_there_is_refused_and_events_of_the_page_do_nothing(tmp_path: Path) -> None:
    async with world(tmp_path) as server:
        page = await Browser(server).connect()
        await page.send('42["shutdown",{}]\x1e40/admin,{"a":1}')
        assert await page.poll() == '44/admin,{"message":"Invalid namespace"}'


async def test_a_page_that_leaves_is_forgotten(tmp_path: Path) -> None:
    async with world(tmp_path) as server:
        page = await Browser(server).connect()
        await page.send("1")
        answer = await page.client.get("/socket.io/", params=page.query)
        assert answer.status_code == 400 and answer.json()["code"] == 1


def request(address: str = "10.0.0.1", tenant: str = "anonymous", **cookies: str) -> Any:
    client, scope = SimpleNamespace(host=address), {"caller": Caller(tenant)}
    return SimpleNamespace(cookies=cookies, client=client, scope=scope, query_params={})


async def test_sessions_and_their_packets_are_bounded() -> None:
    now = 0.0
    events = Events(SimpleNamespace(), lambda: now)  # type: ignore[arg-type]
    session = events.open(request())
    events.receive(session, "40")
    for _ in range(10 * KEPT):
        events.emit(request(), "diffusion_finish")
    assert len(session.packets) == KEPT
    for _ in range(MAX_SESSIONS + 50):
        events.open(request())
    assert len(events) == MAX_SESSIONS and not session.closed
    now = PING_EVERY + PING_TIMEOUT + 1
    events.open(request())
    assert len(events) == 1


FLOODS = {
    "tenant": lambda n: {"address": f"10.1.{n >> 8}.{n & 255}", "tenant": "zenith"},
    "address": lambda n: {"address": "10.0.0.2", "imagepool_page": f"other{n}"},
    "network": lambda n: {"address": f"2001:db8::{n:x}"},
    "browser": lambda n: {"imagepool_page": "greedy"},
}


@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS)
async def test_one_s_handshakes_end_nobody_else_s_pages(flood: Callable[[int], dict[str, str]]) -> None:
    now = 0.0
    events = Events(SimpleNamespace(), lambda: now)  # type: ignore[arg-type]
    pages = [events.open(request(tenant="acme", imagepool_page=f"page{number}")) for number in range(3)]
    now = 1.0
    for number in range(2 * MAX_SESSIONS):
        events.open(request(**{"tenant": "acme", **flood(number)}))
    assert not any(page.closed for page in pages) and len(events) <= MAX_SESSIONS


async def test_pages_that_came_back_stay_whoever_shakes_hands_at_their_address() -> None:
    now = 0.0
    engine = SimpleNamespace(leaving=asyncio.get_running_loop().create_future(), draining=False)
    events = Events(engine, lambda: now)  # type: ignore[arg-type]
    connected, polling, moved, gone = (events.open(request()) for _ in range(4))
    events.receive(connected, "40")
    moved.moved = True
    poll = asyncio.create_task(events.poll(polling))
    await asyncio.sleep(0)
    now = 1.0
    for _ in range(2 * MAX_SESSIONS):
        events.open(request())
    assert not (connected.closed or polling.closed or moved.closed) and gone.closed and len(events) == MAX_SESSIONS
    poll.cancel()


async def test_when_all_pages_are_live_one_of_whoever_has_the_most_goes() -> None:
    events = Events(SimpleNamespace(), lambda: 0.0)  # type: ignore[arg-type]
    page = events.open(request("10.0.0.2"))
    others = [events.open(request()) for _ in range(MAX_SESSIONS - 1)]
    for session in (page, *others):
        events.receive(session, "40")
    newcomer = events.open(request("10.0.0.3"))
    assert others[0].closed and not page.closed and not newcomer.closed


async def test_a_browser_of_many_pages_keeps_those_that_came_back() -> None:
    events = Events(SimpleNamespace(), lambda: 0.0)  # type: ignore[arg-type]
    page = events.open(request(imagepool_page="same"))
    events.receive(page, "40")
    for _ in range(3 * MAX_OF_BROWSER):
        events.open(request(imagepool_page="same"))
    assert not page.closed and len(events) == MAX_OF_BROWSER


async def test_a_full_house_lets_a_newcomer_in(tmp_path: Path) -> None:
    events = Events(SimpleNamespace(), lambda: 0.0)  # type: ignore[arg-type]
    for number in range(MAX_SESSIONS):
        events.open(request(address=f"10.1.{number >> 8}.{number & 255}", tenant="zenith"))
    made = [events.open(request(tenant="acme")) for _ in range(MAX_SESSIONS // 2)]
    assert not any(page.closed for page in made) and len(events) == MAX_SESSIONS
    events.open(request(tenant="acme"))
    assert made[0].closed, "as many as the other has, and no more"


async def test_a_page_that_hears_much_is_pinged_too(tmp_path: Path) -> None:
    now = 0.0
    events = Events(SimpleNamespace(draining=False), lambda: now)  # type: ignore[arg-type]
    session = events.open(request())
    session.send("42[]")
    assert await events.poll(session) == "42[]"
    now = PING_EVERY + 1
    session.send("42[]")
    assert await events.poll(session) == "42[]\x1e2"


@asynccontextmanager
async def listening(tmp_path: Path, **settings: Any) -> AsyncIterator[tuple[Server, str]]:
    """The application on a socket, with its address (without a scheme)."""
    async with world(tmp_path, **settings) as server:
        app = server.client._transport.app  # type: ignore[attr-defined]
        async with listen(app, server.engine.settings) as port:
            yield server, f"127.0.0.1:{port}"


async def ask(address: str) -> None:
    async with httpx.AsyncClient(base_url=f"http://{address}") as client:
        assert (await inpaint(SimpleNamespace(client=client))).status_code == 200  # type: ignore[arg-type]


@pytest.mark.parametrize(("transports", "ends_as"), [
    (["polling"], "polling"), (["websocket"], "websocket"), (["polling", "websocket"], "websocket"),
])  # fmt: skip
async def test_a_client_of_the_protocol_that_others_wrote_hears_it(
    tmp_path: Path, transports: list[str], ends_as: str
) -> None:
    socketio = pytest.importorskip("socketio")
    pytest.importorskip("aiohttp")
    async with listening(tmp_path) as (_, address):
        client, heard = socketio.AsyncClient(), []
        client.on("diffusion_finish", handler=lambda *_: heard.append("finish"))
        await client.connect(f"http://{address}", transports=transports)
        for count in (1, 2):
            await ask(address)
            await until(lambda count=count: len(heard) == count)
        assert client.transport() == ends_as
        await client.disconnect()


SOCKET = "/socket.io/?EIO=4&transport=websocket"


async def test_a_page_moves_to_its_web_socket_and_nothing_is_lost_on_the_way(tmp_path: Path) -> None:
    async with listening(tmp_path) as (server, address):
        page = await Browser(server, "127.0.0.1").connect()
        waiting = asyncio.create_task(page.poll())
        await until(lambda: server.engine.metrics.http_in_progress)
        async with connect(f"ws://{address}{SOCKET}&sid={page.query['sid']}") as socket:
            await socket.send("2probe")
            assert await socket.recv() == "3probe" and await waiting == "6"
            await ask(address)
            assert await page.poll() == "6", "an event of this moment waits for the socket"
            await socket.send("5")
            assert await socket.recv() == FINISHED
            assert (await page.client.get("/socket.io/", params=page.query)).json()["code"] == 3
            server.engine.drain()
            assert await socket.recv() == "1"


async def test_a_page_that_fails_to_move_goes_on_polling(tmp_path: Path) -> None:
    async with listening(tmp_path) as (server, address):
        page = await Browser(server, "127.0.0.1").connect()
        for words in (["5"], ["2probe", "4nonsense"], ["2probe"]):
            async with connect(f"ws://{address}{SOCKET}&sid={page.query['sid']}") as socket:
                with suppress(ConnectionClosed):
                    for word in words:
                        await socket.send(word)
                        await socket.recv()
        await ask(address)
        while (said := await page.poll()) == "6":
            pass
        assert said == FINISHED


async def test_a_web_socket_that_closes_takes_its_session_with_it(tmp_path: Path) -> None:
    async with listening(tmp_path) as (server, address):
        async with connect(f"ws://{address}{SOCKET}") as socket:
            told = json.loads((await socket.recv())[1:])
            assert told["upgrades"] == [] and (socket.response.headers["set-cookie"]).startswith("imagepool_page=")
            await socket.send("40")
            assert (await socket.recv()).startswith("40{")
            await socket.send(b"binary")
            with pytest.raises(ConnectionClosed):
                await socket.recv()
        answer = await server.client.get("/socket.io/", params=QUERY | {"sid": told["sid"]})
        assert answer.json()["code"] == 1


@pytest.mark.parametrize("path", [
    "/socket.io/?EIO=3&transport=websocket", "/socket.io/?EIO=4", f"{SOCKET}&sid=unknown", "/jobs", "/socket.io/more",
])  # fmt: skip
async def test_a_web_socket_elsewhere_or_of_another_protocol_is_refused(tmp_path: Path, path: str) -> None:
    async with listening(tmp_path) as (_, address):
        with pytest.raises(InvalidStatus):
            await connect(f"ws://{address}{path}").__aenter__()


async def test_a_strange_page_opens_no_web_socket_but_an_invited_one_does(tmp_path: Path) -> None:
    invited = "https://paint.example"
    async with listening(tmp_path, cors_origins=(invited,)) as (_, address):
        for origin in (invited, f"http://{address}"):
            async with connect(f"ws://{address}{SOCKET}", origin=origin) as socket:
                assert (await socket.recv())[:1] == "0"
        with pytest.raises(InvalidStatus):
            await connect(f"ws://{address}{SOCKET}", origin="https://strange.example").__aenter__()


async def test_a_web_socket_needs_a_key_where_requests_do(tmp_path: Path) -> None:
    async with listening(tmp_path, keys_file=keys_file(tmp_path)) as (_, address):
        with pytest.raises(InvalidStatus):
            await connect(f"ws://{address}{SOCKET}").__aenter__()
        async with connect(f"ws://{address}{SOCKET}", additional_headers={"X-API-Key": KEY}) as socket:
            assert (await socket.recv())[:1] == "0"

"""Callbacks to real hosts: bounded, fair to quick ones, tried again, not lost without a word when the server stops."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from api import callbacks, fetch
from api.callbacks import Callbacks
from engine import shutdown
from tests.pure.dialect_kit import Server, png, serve, until
from tests.pure.engine_kit import TEST_MODELS

TAKEN = b"HTTP/1.1 204 No Content\r\ncontent-length: 0\r\n\r\n"
BUSY = b"HTTP/1.1 503 Busy\r\ncontent-length: 0\r\n\r\n"


class Receiver:
    """A host of many addresses (127.0.0.1, 127.0.0.2, ...) that answers when `free` is set: what it hears, and how many
    wait for its answer at once, in all and at each address."""

    def __init__(self) -> None:
        self.free = asyncio.Event()
        self.answer = TAKEN
        self.heard: list[bytes] = []
        self.now: Counter[str] = Counter()
        self.most, self.most_of_one = 0, 0
        self.port = 0

    def url(self, address: int = 1) -> str:
        return f"http://127.0.0.{address}:{self.port}/told"

    async def hear(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r")[0])
        body = await reader.readexactly(length)
        self.heard.append(body)
        name = writer.get_extra_info("sockname")[0]
        self.now[name] += 1
        self.most, self.most_of_one = max(self.most, self.now.total()), max(self.most_of_one, *self.now.values())
        gone, free = asyncio.ensure_future(reader.read(1)), asyncio.ensure_future(self.free.wait())
        try:
            await asyncio.wait({gone, free}, return_when=asyncio.FIRST_COMPLETED)
            writer.write(self.answer)
            await writer.drain()
        finally:
            gone.cancel()
            free.cancel()
            self.now[name] -= 1
            writer.close()


@asynccontextmanager
async def listening() -> AsyncIterator[Receiver]:
    made = Receiver()
    server = await asyncio.start_server(made.hear, "0.0.0.0", 0)  # all of 127.0.0.x
    made.port = server.sockets[0].getsockname()[1]
    try:
        yield made
    finally:
        made.free.set()
        server.close()


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with listening() as made:
        yield made


def made() -> tuple[Callbacks, asyncio.Future[None]]:
    leaving = asyncio.get_running_loop().create_future()
    return Callbacks("any", lambda: leaving), leaving


async def stays(receiver: Receiver, count: int) -> None:
    """So many wait for its answer, and no more come."""
    await until(lambda: receiver.now.total() == count)
    for _ in range(20):
        await asyncio.sleep(0.001)
    assert receiver.now.total() == count


async def test_so_many_at_a_time_and_few_to_one_host(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks, "MOST", 32)
    sender, _ = made()
    urls = [receiver.url(1 + number % 20) for number in range(200)]
    sent = [
        asyncio.create_task(sender.send(url, b"%d" % number, f"tenant{number % 7}")) for number, url in enumerate(urls)
    ]
    await stays(receiver, callbacks.MOST)
    assert sender.under_way == 200
    receiver.free.set()
    assert all(await asyncio.gather(*sent))
    assert receiver.most == callbacks.MOST
    assert sorted(map(int, receiver.heard)) == list(range(200)) and sender.under_way == 0
    assert not sender._hosts and not sender._tenants


async def test_one_tenant_s_hosts_that_hang_hold_back_nobody_else_s_callbacks(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "CALLBACK_SECONDS", 60.0)  # they hang for as long as the test takes
    sender, _ = made()
    urls = [receiver.url(1 + number % 80) for number in range(640)]
    slow = [asyncio.create_task(sender.send(url, b"slow", "acme")) for url in urls]
    await stays(receiver, callbacks.MOST_OF_TENANT)
    async with listening() as quick:
        quick.free.set()
        assert await sender.send(quick.url(), b"{}", "zenith")
    other = [asyncio.create_task(sender.send(receiver.url(), b"other", "zenith")) for _ in range(9)]
    await until(lambda: receiver.heard.count(b"other") == callbacks.MOST_OF_HOST)  # though it hangs for the first
    assert not any(task.done() for task in slow)
    receiver.free.set()
    assert all(await asyncio.gather(*slow, *other))


async def test_a_host_that_did_not_answer_has_one_place_until_it_does(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "CALLBACK_SECONDS", 0.2)
    monkeypatch.setattr(callbacks, "PAUSES", (1000.0,))
    sender, leaving = made()
    slow = [asyncio.create_task(sender.send(receiver.url(), b"slow", "acme")) for _ in range(20)]
    await until(lambda: len(receiver.heard) == callbacks.MOST_OF_HOST)
    monkeypatch.setattr(fetch, "CALLBACK_SECONDS", 60.0)
    await stays(receiver, 1)
    receiver.free.set()
    await until(lambda: len(receiver.heard) == 20)
    receiver.free.clear()
    more = [asyncio.create_task(sender.send(receiver.url(), b"more", "acme")) for _ in range(20)]
    await stays(receiver, callbacks.MOST_OF_HOST)
    receiver.free.set()
    leaving.set_result(None)
    assert all(await asyncio.gather(*slow, *more))


async def test_one_tenant_does_not_fill_the_room_of_all(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks, "MOST_WAITING_OF_TENANT", 3)
    sender, _ = made()
    sent = [asyncio.create_task(sender.send(receiver.url(1 + number), b"{}", "acme")) for number in range(3)]
    await until(lambda: sender.under_way == 3)
    assert not await sender.send(receiver.url(9), b"{}", "acme")
    receiver.free.set()
    assert await sender.send(receiver.url(9), b"{}", "zenith")
    assert all(await asyncio.gather(*sent))


async def test_a_host_that_hangs_keeps_only_its_own_waiting(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "CALLBACK_SECONDS", 60.0)  # it hangs for as long as the test takes
    sender, _ = made()
    slow = [asyncio.create_task(sender.send(receiver.url(), b"slow", "acme")) for _ in range(100)]
    await until(lambda: receiver.now.total() == callbacks.MOST_OF_HOST)
    async with listening() as quick:
        quick.free.set()
        assert all(await asyncio.gather(*(sender.send(quick.url(), b"quick", "acme") for _ in range(50))))
    assert receiver.now.total() == callbacks.MOST_OF_HOST and not any(task.done() for task in slow)
    receiver.free.set()
    assert all(await asyncio.gather(*slow))


async def test_a_host_that_is_busy_is_asked_again(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks, "PAUSES", (0.001, 0.001, 0.001))
    sender, _ = made()
    receiver.free.set()
    receiver.answer = BUSY
    assert not await sender.send(receiver.url(), b"{}", "acme") and len(receiver.heard) == 4
    receiver.answer = BUSY.replace(b"503", b"410")
    assert not await sender.send(receiver.url(), b"{}", "acme") and len(receiver.heard) == 5, "it will never take it"


async def test_who_pauses_holds_no_turn(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks, "PAUSES", (1000.0,))
    sender, leaving = made()
    receiver.free.set()
    receiver.answer = BUSY
    count = callbacks.MOST_OF_HOST * 3
    paused = [asyncio.create_task(sender.send(receiver.url(), b"{}", "acme")) for _ in range(count)]
    await until(lambda: len(receiver.heard) == len(paused))
    receiver.answer = TAKEN
    assert await sender.send(receiver.url(), b"{}", "acme")
    leaving.set_result(None)  # now nobody pauses any more: one last try
    assert all(await asyncio.gather(*paused))


@pytest.mark.parametrize(("asked", "paused"), [("300", 300.0), ("86400", 600.0), ("2", 5.0)])
async def test_a_host_is_left_alone_for_as_long_as_it_asks_within_reason(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch, asked: str, paused: float
) -> None:
    monkeypatch.setattr(callbacks, "PAUSES", (5.0,))
    pauses: list[float] = []

    async def wait(leaving: Any, timeout: float) -> None:
        pauses.append(timeout)

    usual = {"Semaphore": asyncio.Semaphore, "Lock": asyncio.Lock}
    monkeypatch.setattr(callbacks, "asyncio", SimpleNamespace(wait=wait, **usual))
    sender, _ = made()
    receiver.free.set()
    receiver.answer = BUSY.replace(b"\r\n", b"\r\nretry-after: " + asked.encode() + b"\r\n", 1)
    assert not await sender.send(receiver.url(), b"{}", "acme") and len(receiver.heard) == 2
    assert pauses == [paused]


async def test_a_stop_does_not_wait_for_as_long_as_a_host_asks(receiver: Receiver) -> None:
    sender, leaving = made()
    receiver.free.set()
    receiver.answer = BUSY.replace(b"\r\n", b"\r\nretry-after: 500\r\n", 1)
    sent = asyncio.create_task(sender.send(receiver.url(), b"{}", "acme"))
    await until(lambda: bool(receiver.heard))
    leaving.set_result(None)
    assert not await sent and len(receiver.heard) == 2, "one last try"


async def test_after_the_last_try_it_is_given_up(receiver: Receiver) -> None:
    sender, leaving = made()
    leaving.set_result(None)
    receiver.free.set()
    receiver.answer = BUSY
    assert not await sender.send(receiver.url(), b"{}", "acme") and len(receiver.heard) == 1


async def test_no_more_wait_than_a_bound(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks, "MOST_WAITING", 3)
    sender, _ = made()
    sent = [asyncio.create_task(sender.send(receiver.url(), b"{}", "acme")) for _ in range(3)]
    await until(lambda: sender.under_way == 3)
    assert not await sender.send(receiver.url(), b"{}", "acme")
    receiver.free.set()
    assert all(await asyncio.gather(*sent))


async def test_a_host_that_is_gone_does_not_fill_the_room_of_all(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callbacks, "MOST_WAITING", 12)
    monkeypatch.setattr(callbacks, "MOST_WAITING_OF_HOST", 6)
    monkeypatch.setattr(callbacks, "PAUSES", (1000.0,))
    sender, leaving = made()
    receiver.free.set()
    receiver.answer = BUSY
    gone = [asyncio.create_task(sender.send(receiver.url(), b"{}", "acme")) for _ in range(20)]
    await until(lambda: sum(task.done() for task in gone) == 14)  # refused at once, while six pause
    assert sender.under_way == 6
    receiver.answer = TAKEN
    assert await sender.send(receiver.url(2), b"{}", "acme"), "another host has room"
    leaving.set_result(None)
    assert sum(await asyncio.gather(*gone)) == 6 and not sender._hosts


async def test_a_host_has_one_name(receiver: Receiver) -> None:
    sender, _ = made()
    names = [f"http://{name}:{receiver.port}/{number}" for number in range(9) for name in ("localhost", "LOCALHOST")]
    sent = [asyncio.create_task(sender.send(url, b"{}", "acme")) for url in names]
    await stays(receiver, callbacks.MOST_OF_HOST)
    receiver.free.set()
    assert all(await asyncio.gather(*sent))
    assert callbacks._name("http://Host/a") == callbacks._name("http://host:80/b") != callbacks._name("https://host/a")


async def generate(server: Server, url: str) -> str:
    answer = await server.client.post("/api/v1/image/generate", json={"text": "x", "callback_url": url})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["data"]["task_id"])


def whole(folder: Path) -> Any:
    settings = {"models_folder": TEST_MODELS, "models": ("paint",), "fetch": "any"}
    return serve(folder, work=lambda item, data: png(), **settings)


async def test_a_stop_waits_for_what_is_under_way(receiver: Receiver, tmp_path: Path) -> None:
    async with whole(tmp_path) as server:
        task = await generate(server, receiver.url())
        await until(lambda: bool(receiver.heard))
        stop = asyncio.create_task(server.engine.stop(0.0))
        await until(lambda: server.engine.draining)
        assert not stop.done()
        receiver.free.set()
        await stop
    assert task.encode() in receiver.heard[0] and b'"success"' in receiver.heard[0]
    assert len(receiver.heard) == 1


async def test_a_task_whose_second_job_can_never_be_is_told_of(receiver: Receiver, tmp_path: Path) -> None:
    def lose(item: object, data: bytes) -> bytes:
        for worker in servers[0].engine.up:
            servers[0].engine._arrivals._refused[worker] = {"upscale": "it cannot be loaded"}
        return png()

    servers: list[Server] = []
    receiver.free.set()
    settings = {"models_folder": TEST_MODELS, "models": ("paint", "upscale"), "fetch": "any"}
    async with serve(tmp_path, work=lose, **settings) as server:
        servers.append(server)
        params = {"postprocess": {"super_resolution": "2x"}}
        body = {"text": "x", "callback_url": receiver.url(), "params": params}
        assert (await server.client.post("/api/v1/image/generate", json=body)).status_code == 200
        await until(lambda: bool(receiver.heard))
    assert b'"failed"' in receiver.heard[0] and b"cannot be loaded" in receiver.heard[0]


async def test_what_a_stop_gives_up_is_in_the_log(
    receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutdown, "LAST_WORDS", 0.05)
    async with whole(tmp_path) as server:
        await generate(server, receiver.url())
        await until(lambda: bool(receiver.heard))
        await server.engine.stop(0.0)
    assert "a callback was given up" in capsys.readouterr().out


async def test_who_is_in_a_hurry_waits_for_nobody(receiver: Receiver, tmp_path: Path) -> None:
    async with whole(tmp_path) as server:
        await generate(server, receiver.url())
        await until(lambda: bool(receiver.heard))
        server.engine.hurry()
        await server.engine.stop(1000.0)
    assert fetch.CALLBACK_SECONDS < shutdown.LAST_WORDS, "one try fits into what a stop waits at least"

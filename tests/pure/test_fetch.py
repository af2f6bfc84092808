"""What the server asks of other hosts: never what a stranger must not reach, never more or longer than allowed."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from email.utils import format_datetime, formatdate
from types import SimpleNamespace
from typing import Any

import pytest

from api import fetch, lookups
from core.errors import BadRequest, InvalidParameter, TooLarge
from tests.pure.dialect_kit import until

Answer = Callable[[str, str], bytes]


@asynccontextmanager
async def host(answer: Answer, address: str = "127.0.0.1") -> AsyncIterator[tuple[str, list[bytes]]]:
    """A bare HTTP server: its address, and the requests that it has heard. `answer(path, method)` is all it sends."""
    heard: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        heard.append(head)
        method, path, _ = head.decode().split(" ", 2)
        writer.write(answer(path, method))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, address, 0)
    try:
        yield f"http://{address}:{server.sockets[0].getsockname()[1]}", heard
    finally:
        server.close()


def ok(body: bytes = b"picture", extra: str = "") -> bytes:
    return f"HTTP/1.1 200 OK\r\n{extra}content-length: {len(body)}\r\n\r\n".encode() + body


@pytest.fixture(autouse=True)
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long was slept before a refusal; nobody sleeps."""
    found: list[float] = []

    async def sleep(seconds: float) -> None:
        found.append(seconds)

    usual = {"timeout": asyncio.timeout, "to_thread": asyncio.to_thread}
    monkeypatch.setattr(fetch, "asyncio", SimpleNamespace(sleep=sleep, **usual))
    return found


def resolves(monkeypatch: pytest.MonkeyPatch, names: dict[str, tuple[str, ...]]) -> None:
    """Have these names these addresses, and no other name any."""

    def resolve(name: str, port: int, **_: Any) -> list[Any]:
        if name not in names:
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return [(2, 1, 6, "", (address, port)) for address in names[name]]

    monkeypatch.setattr(lookups.socket, "getaddrinfo", resolve)


def moved(to: str) -> bytes:
    return f"HTTP/1.1 302 Found\r\nlocation: {to}\r\ncontent-length: 0\r\n\r\n".encode()


async def get(url: str, reach: fetch.Reach = "any", most: int = 1000) -> bytes:
    return await fetch.fetch(url, "image_url", reach=reach, max_bytes=most)


@pytest.mark.parametrize("address", [
    "127.0.0.1", "127.8.8.8", "0.0.0.0", "10.0.0.1", "172.16.3.4", "192.168.1.1", "169.254.169.254", "100.64.0.1",
    "224.0.0.1", "255.255.255.255", "192.0.2.1", "::1", "::", "fe80::1", "fd00::1", "ff02::1", "::ffff:127.0.0.1",
    "::ffff:10.0.0.1", "fec0::1", "2002:7f00:1::", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe",
    "192.88.99.1", "::ffff:192.88.99.255", "64:ff9b::c058:6301",
])  # fmt: skip
def test_addresses_that_a_stranger_must_not_reach(address: str) -> None:
    assert not fetch.public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_addresses_of_the_open_internet(address: str) -> None:
    assert fetch.public(ipaddress.ip_address(address))


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "127.1", "[::1]",
                                  "[::ffff:7f00:1]"])  # fmt: skip
async def test_this_host_is_not_reached_by_any_of_its_names(name: str) -> None:
    async with host(lambda *_: ok()) as (url, heard):
        port = url.rpartition(":")[2]
        with pytest.raises(BadRequest):
            await get(f"http://{name}:{port}/", "public")
        assert (await fetch.post(f"http://{name}:{port}/", b"{}", reach="public")).taken is False
        assert not heard


@pytest.mark.parametrize("url", [
    "file:///etc/passwd", "ftp://example.org/a", "gopher://x", "http://", "http://a:b@example.org/", "//example.org/a",
    "http://[::1", "http://example.org:port/", "http://example.org/" + "a" * 3000, "http://exam\nple.org/", "",
])  # fmt: skip
async def test_what_is_no_web_address_is_refused(url: str) -> None:
    with pytest.raises(InvalidParameter):
        await get(url)


async def test_off_is_off() -> None:
    async with host(lambda *_: ok()) as (url, heard):
        with pytest.raises(InvalidParameter, match="fetches nothing"):
            await get(url, "off")
        assert (await fetch.post(url, b"{}", reach="off")).taken is False and not heard


async def test_a_redirect_is_looked_at_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = ipaddress.ip_address("127.0.0.1")
    monkeypatch.setattr(fetch, "public", lambda address: address == allowed)
    async with host(lambda *_: ok(), "127.0.0.2") as (inner, heard_inside):
        async with host(lambda path, _: moved(inner) if path == "/away" else ok(b"here")) as (outer, _):
            assert await get(outer, "public") == b"here"
            with pytest.raises(InvalidParameter, match="open internet"):
                await get(f"{outer}/away", "public")
        assert not heard_inside


async def test_a_name_whose_addresses_are_partly_private_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    resolves(monkeypatch, {"rebinding.example": ("8.8.8.8", "10.0.0.1")})
    with pytest.raises(BadRequest, match="open internet"):
        await get("http://rebinding.example/", "public")


async def test_the_host_sees_its_own_name_and_relative_redirects_work() -> None:
    async with host(lambda path, _: moved("/b") if path == "/a" else ok()) as (url, heard):
        named = url.replace("127.0.0.1", "localhost")
        assert await get(f"{named}/a") == b"picture"
        assert all(f"host: {named.removeprefix('http://')}".encode() in head.lower() for head in heard)
        assert [head.split(b" ")[1] for head in heard] == [b"/a", b"/b"]


async def test_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    async with host(lambda path, _: moved("/") if path == "/" else ok(b"x" * 2000)) as (url, heard):
        with pytest.raises(BadRequest, match="redirects"):
            await get(url)
        assert len(heard) == fetch.MAX_REDIRECTS + 1
        with pytest.raises(TooLarge):
            await get(f"{url}/big")
    async with host(lambda *_: b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n") as (url, _):
        with pytest.raises(BadRequest, match="broke off"):
            await get(url)
    monkeypatch.setattr(fetch, "FETCH_SECONDS", 0.05)

    async def silent(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.5)
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    with pytest.raises(BadRequest, match="cannot be reached"):
        await get(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/")
    server.close()


async def test_refusals_of_the_host() -> None:
    async with host(lambda *_: b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n") as (url, _):
        with pytest.raises(BadRequest, match="404"):
            await get(url)
    async with host(lambda *_: ok(extra="content-encoding: gzip\r\n")) as (url, _):
        with pytest.raises(BadRequest, match="compressed"):
            await get(url)


async def test_whether_a_callback_is_worth_another_try() -> None:
    statuses = iter([500, 429, 408, 302, 404, 204])

    def answer(*_: str) -> bytes:
        return f"HTTP/1.1 {next(statuses)} X\r\nlocation: http://127.0.0.1/\r\ncontent-length: 0\r\n\r\n".encode()

    async with host(answer) as (url, heard):
        told = [(await fetch.post(url, b"{}", reach="any")).taken for _ in range(6)]
        assert told == [None, None, None, False, False, True]
        assert len(heard) == 6, "a redirect is not followed"


@pytest.mark.parametrize("name", ["a..b", f"{'a' * 70}.example", ".example.org", "xn--a"])
async def test_a_name_that_no_host_can_have(name: str) -> None:
    with pytest.raises(BadRequest, match="cannot be reached"):
        await get(f"http://{name}/")
    assert (await fetch.post(f"http://{name}/", b"{}", reach="any")).taken is None


async def test_of_a_callback_s_answer_only_the_status_counts() -> None:
    endless = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 1000000000\r\n\r\nno gzip"
    async with host(lambda *_: endless) as (url, heard):
        assert (await fetch.post(url, b"{}", reach="any")).taken
        assert len(heard) == 1


async def test_an_error_does_not_tell_whether_an_internal_name_resolves(
    monkeypatch: pytest.MonkeyPatch, slept: list[float]
) -> None:
    resolves(monkeypatch, {"db.internal": ("10.0.0.1",), "here.internal": ("127.0.0.1", "::1"), "gone.example": ()})
    told = set()
    for name in ("db.internal", "here.internal", "nowhere.internal", "gone.example", "127.1"):
        with pytest.raises(BadRequest) as refused:
            await get(f"http://{name}:9/", "public")
        told.add((refused.value.code, refused.value.message, *refused.value.details.items()))
    assert len(told) == 1
    assert len(slept) == 5 and min(slept) > fetch.REFUSAL_SECONDS / 2, "nor does the time that it takes"


async def test_a_host_that_does_not_answer_is_told_in_the_same_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "public", lambda _: True)
    monkeypatch.setattr(fetch, "FETCH_SECONDS", 0.05)
    done = asyncio.Event()

    async def silent(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await done.wait()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    told = set()
    for address in (f"127.0.0.1:{port}", "127.0.0.1:1", "nowhere.invalid"):
        with pytest.raises(BadRequest) as refused:
            await get(f"http://{address}/", "public")
        told.add(refused.value.message)
    assert len(told) == 1
    done.set()
    server.close()


async def test_a_redirect_does_not_tell_it_either(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = ipaddress.ip_address("127.0.0.1")
    monkeypatch.setattr(fetch, "public", lambda address: address == allowed)
    names = {"db.internal": ("10.0.0.1",)}
    async with host(lambda path, _: moved(f"http://{path[1:]}/")) as (outer, _):
        resolves(monkeypatch, names | {"127.0.0.1": ("127.0.0.1",)})
        told = set()
        for name in ("db.internal", "nowhere.internal"):
            with pytest.raises(BadRequest) as refused:
                await get(f"{outer}/{name}", "public")
            told.add((refused.value.code, refused.value.message))
    assert len(told) == 1


async def test_names_that_take_long_keep_no_thread_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    free, asked = threading.Event(), []

    def resolve(name: str, port: int, **_: Any) -> list[Any]:
        asked.append(name)
        free.wait(10)
        return []

    monkeypatch.setattr(lookups.socket, "getaddrinfo", resolve)
    found, most = lookups.Lookups(), lookups.MOST_OF_TENANT
    waiting = [asyncio.create_task(found.find(f"{number}.example", 80)) for number in range(most * 3)]
    await until(lambda: len(asked) == most)
    for _ in range(20):  # and no more come
        await asyncio.sleep(0.001)
    assert len(asked) == most
    assert await asyncio.to_thread(len, asked) == most, "the threads of others are free"
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "lookup"), "nor the process's end"
    other = asyncio.create_task(found.find("other.example", 80, "zenith"))
    await until(lambda: asked[-1] == "other.example")  # another tenant waits for none of them
    for task in waiting[most :]:
        task.cancel()
    free.set()
    assert await asyncio.gather(*waiting[: most]) == [[]] * most
    assert await other == await found.find("late.example", 80) == []
    assert len(asked) == most + 2, "not for who left"


@pytest.mark.parametrize(("text", "seconds"), [
    ("120", 120), ("0", 0), ("", 0), ("-5", 0), ("1.5", 0), ("soon", 0), ("9" * 4000, 999_999_999), ("\u0661", 0),
    (formatdate(1_000_060, usegmt=True), 60), (formatdate(999_000, usegmt=True), 0),
    (format_datetime(datetime.fromtimestamp(1_000_060, UTC)), 60), ("Thu, 01 Jan 1970 08:49:37 -0000", 0),
    ("Mon, 99 Foo 99999999 99:99:99 GMT", 0), ("x" * 100_000, 0),
])  # fmt: skip
def test_how_long_a_host_asks_to_be_left_alone(text: str, seconds: float) -> None:
    assert fetch.retry_after(text, 1_000_000.0) == seconds


async def test_certificates_are_read_once_and_not_by_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[threading.Thread] = []
    create = ssl.create_default_context

    def reading(*args: Any, **more: Any) -> Any:
        read.append(threading.current_thread())
        return create(*args, **more)

    fetch._trust.cache_clear()
    monkeypatch.setattr(ssl, "create_default_context", reading)
    async with host(lambda *_: ok()) as (url, _):
        for _ in range(3):
            await get(url)
            assert (await fetch.post(url, b"{}", reach="any")).taken
    assert len(read) == 1 and read[0] is not threading.main_thread()


async def test_a_busy_host_s_wish_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    statuses = iter([503, 429, 400])

    def answer(*_: str) -> bytes:
        return f"HTTP/1.1 {next(statuses)} X\r\nretry-after: 7\r\ncontent-length: 0\r\n\r\n".encode()

    async with host(answer) as (url, _):
        told = [await fetch.post(url, b"{}", reach="any") for _ in range(3)]
    assert [(one.taken, one.after) for one in told] == [(None, 7), (None, 7), (False, 0)]

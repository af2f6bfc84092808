"""Clients that declare much and send little, or send slowly: they cost those who do so, and nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from tests.process.door_kit import dial, listen, read_answer, until
from tests.pure.api_kit import IMAGE, world
from tests.pure.dialect_kit import KEY, OTHER_KEY, Server, keys_file

HUGE = 60 << 20
PNG = {"content-type": "image/png"}
FORM = b"multipart/form-data; boundary=b"
OPENING = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
# path, content type, how its errors name what was wrong
DIALECTS = {
    "run": ("/run/echo", b"image/png", lambda told: told["code"]),
    "run form": ("/run/fill", FORM, lambda told: told["code"]),
    "jobs": ("/jobs?model=echo", b"image/png", lambda told: told["code"]),
    "jobs form": ("/jobs?model=echo", FORM, lambda told: told["code"]),
    "jobs json": ("/jobs", b"application/json", lambda told: told["code"]),
    "openai": ("/v1/images/edits", FORM, lambda told: told["error"]["type"]),
    "imagegenx": ("/api/v1/image/generate", b"application/json", lambda told: told["code"]),
    "iopaint": ("/api/v1/inpaint", b"application/json", lambda told: told["detail"]),
    "iopaint form": ("/api/v1/gen-info", FORM, lambda told: told["detail"]),
    "imagen": ("/api/v1/images/enhance", FORM, lambda told: told),
    "i2ii": ("/edit", FORM, lambda told: told["detail"]),
}
LORA = "/api/v1/lora/upload", FORM


def head(path: str, kind: bytes, length: int | None, *more: bytes) -> bytes:
    size = b"Transfer-Encoding: chunked" if length is None else b"Content-Length: %d" % length
    lines = [b"POST %s HTTP/1.1" % path.encode(), b"Host: here", b"Content-Type: " + kind, size, *more]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def beginning(kind: bytes, size: int) -> bytes:
    """The first bytes of a body of that kind, which does not end."""
    if kind == FORM:
        return OPENING + bytes(size - len(OPENING))
    return b'{"a": "' + b"a" * (size - 7) if kind == b"application/json" else bytes(size)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


@contextlib.asynccontextmanager
async def serving(folder: Path, **given: Any) -> AsyncIterator[tuple[Server, int]]:
    given = {"body_timeout": 30.0, "address_share": 1.0, "allowed_hosts": ("here",), **given}
    async with world(folder, **given) as server:
        app = server.client._transport.app  # type: ignore[attr-defined]
        async with listen(app, server.engine.settings) as port:
            yield server, port


@contextlib.asynccontextmanager
async def dawdlers(port: int, number: int, data: bytes) -> AsyncIterator[None]:
    """So many connections that have sent `data` and then nothing."""
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(number):
            _, writer = await stack.enter_async_context(dial(port))
            writer.write(data)
            await writer.drain()
        yield


@pytest.mark.parametrize("number", [32, 200])
@pytest.mark.parametrize("dialect", ["run", "jobs", "iopaint"])
async def test_what_is_only_declared_keeps_nobody_out(tmp_path: Path, number: int, dialect: str) -> None:
    path, kind, _ = DIALECTS[dialect]
    async with serving(tmp_path) as (server, port), httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        async with dawdlers(port, number, head(path, kind, HUGE) + beginning(kind, 600)):
            await until(lambda: server.engine.intake.bodies == number)
            assert server.engine.intake.bytes == number * 600
            assert (await client.post("/run/echo", content=IMAGE, headers=PNG)).status_code == 200
            answer = await client.post("/jobs?model=echo", content=IMAGE, headers={**PNG, "prefer": "wait=30"})
            assert answer.json()["state"] == "succeeded"
            page = (await client.get("/metrics")).text
            assert f"imagepool_receiving_bodies {number}.0" in page
        await until(lambda: not server.engine.intake.bodies and not server.engine.arena.spans)


async def test_a_large_body_that_really_comes_is_received_whole(tmp_path: Path) -> None:
    image = IMAGE + bytes(9 << 20)  # what follows a PNG is nobody's
    async with serving(tmp_path) as (server, port), httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:

        async def pieces() -> AsyncIterator[bytes]:
            for at in range(0, len(image), 100_000):
                yield image[at : at + 100_000]

        for content in (image, pieces()):
            answer = await client.post("/run/echo", content=content, headers=PNG)
            assert (answer.status_code, answer.content == image) == (200, True)
            answer = await client.post("/jobs?model=echo", content=pieces(), headers={**PNG, "prefer": "wait=30"})
            assert (await client.get(answer.json()["links"]["result"])).content == image
        assert server.engine.arena.spans == server.engine.intake.bytes == 0


async def trickle(port: int, path: str, kind: bytes, chunked: bool) -> int:
    """The status that a body gets which begins and then comes byte by byte."""
    start = beginning(kind, 300)
    async with dial(port) as (reader, writer):
        writer.write(head(path, kind, None if chunked else HUGE) + (chunk(start) if chunked else start))
        answer = asyncio.create_task(read_answer(reader))
        while not answer.done():
            writer.write(chunk(b"a") if chunked else b"a")
            await asyncio.wait([answer], timeout=0.05)
        return answer.result()[0]


async def test_a_trickle_is_dropped_within_two_windows_whatever_the_dialect(tmp_path: Path) -> None:
    routes = [(path, kind, chunked) for path, kind, *_ in (*DIALECTS.values(), LORA) for chunked in (False, True)]
    async with serving(tmp_path, body_timeout=0.4) as (server, port):
        told = await asyncio.gather(*(trickle(port, *route) for route in routes))
        assert {route: status for route, status in zip(routes, told, strict=True) if status != 408} == {}
        assert server.engine.intake.bytes == 0


async def test_what_is_over_the_budget_is_refused_in_the_words_of_the_dialect(tmp_path: Path) -> None:
    async with serving(tmp_path, body_bytes=1 << 20) as (server, port):
        async with dawdlers(port, 1, head("/jobs", b"image/png", HUGE) + bytes(1_000_000)):
            await until(lambda: server.engine.intake.bytes == 1_000_000)
            for path, kind, word in DIALECTS.values():
                for length in (HUGE, None):
                    data = beginning(kind, 100_000)
                    async with dial(port) as (reader, writer):
                        writer.write(head(path, kind, length) + (chunk(data) if length is None else data))
                        status, headers, body = await read_answer(reader)
                        assert status == 503 and int(headers["retry-after"]) >= 1, path
                        assert word(orjson.loads(body)), path
            assert server.engine.intake.bytes == 1_000_000
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            refusals = f'imagepool_refusals_total{{reason="bodies_server"}} {2.0 * len(DIALECTS)}'
            assert refusals in (await client.get("/metrics")).text


async def test_an_address_has_its_part_and_no_more(tmp_path: Path) -> None:
    request = head("/run/echo", b"image/png", 100_000) + bytes(100_000)
    async with (
        serving(tmp_path, body_bytes=1 << 20, address_share=0.5) as (server, port),
        dawdlers(port, 1, head("/jobs", b"image/png", HUGE) + bytes(500_000)),
    ):
        await until(lambda: server.engine.intake.bytes == 500_000)
        async with dial(port) as (reader, writer):
            writer.write(request)
            assert (await read_answer(reader))[0] == 503
        with socket.socket() as other:
            other.bind(("127.0.0.2", 0))
            other.setblocking(False)
            await asyncio.get_running_loop().sock_connect(other, ("127.0.0.1", port))
            reader, writer = await asyncio.open_connection(sock=other)
            writer.write(request)
            assert (await read_answer(reader))[0] == 400, "it was received: zeros are no image"
            writer.close()


async def test_a_lora_takes_nothing_from_images(tmp_path: Path) -> None:
    path, kind = LORA
    async with serving(tmp_path, body_bytes=1 << 20) as (server, port):
        data = beginning(kind, 3 << 20)
        async with dawdlers(port, 1, head(path, kind, HUGE) + data):
            async with dial(port) as (reader, writer):
                writer.write(head("/run/echo", b"image/png", len(IMAGE)) + IMAGE)
                assert (await read_answer(reader))[0] == 200
            assert server.engine.intake.bytes == 0


async def test_a_tenant_has_its_part_and_no_more(tmp_path: Path) -> None:
    given: dict[str, Any] = {"body_bytes": 1 << 20, "tenant_share": 0.5, "keys_file": keys_file(tmp_path)}
    async with serving(tmp_path, **given) as (server, port):
        lines = [b"X-API-Key: " + key.encode() for key in (KEY, OTHER_KEY)]
        async with dawdlers(port, 1, head("/jobs", b"image/png", HUGE, lines[0]) + bytes(500_000)):
            await until(lambda: server.engine.intake.bytes == 500_000)
            for line, status in zip(lines, (503, 400), strict=True):
                async with dial(port) as (reader, writer):
                    writer.write(head("/run/echo", b"image/png", 100_000, line) + bytes(100_000))
                    assert (await read_answer(reader))[0] == status


async def test_a_client_that_waits_for_100_continue_has_a_whole_window_after_it(tmp_path: Path) -> None:
    async with serving(tmp_path, body_timeout=0.4) as (_, port), dial(port) as (reader, writer):
        writer.write(head("/run/echo", b"image/png", len(IMAGE), b"Expect: 100-continue"))
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        await asyncio.sleep(0.1)
        writer.write(IMAGE)
        assert (await read_answer(reader))[0] == 200


async def test_bytes_of_a_job_that_runs_are_not_counted_as_coming(tmp_path: Path) -> None:
    async with serving(tmp_path) as (server, port), httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        server.pool.hold()
        waiting = [
            asyncio.create_task(client.post(path, content=IMAGE, headers={**PNG, "prefer": "wait=60"}))
            for path in ("/run/echo", "/jobs?model=echo")
        ]
        await server.until_ran(2)
        await until(lambda: server.engine.intake.bytes == 0)
        assert server.engine.admission.bytes == 2 * len(IMAGE)
        server.pool.release()
        assert [answer.status_code for answer in await asyncio.gather(*waiting)] == [200, 200]

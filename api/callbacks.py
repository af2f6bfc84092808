"""Callbacks: JSON posted to addresses that clients have named, so many at a time, again while a host does not take it.

A host that is slow or gone must not keep the others from hearing: each try takes a turn of its own, a host has few of
them, and whoever pauses holds none. When the server goes away nobody pauses any more: what is under way gets one last
try.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from api import fetch

MOST = 32  # tries at a time
MOST_OF_HOST = 4  # of these, to one host
MOST_WAITING = 10_000  # callbacks that are under way or wait for their turn
PAUSES = 1.0, 5.0, 25.0  # seconds before the second try and those after it


@dataclass(slots=True)
class _Host:
    turns: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MOST_OF_HOST))
    users: int = 0


class Callbacks:
    """`leaving()`: the future that is resolved when the server begins to go away. `under_way`: how many callbacks have
    not been taken or given up yet."""

    def __init__(self, reach: fetch.Reach, leaving: Callable[[], asyncio.Future[None]]) -> None:
        self._reach, self._leaving = reach, leaving
        self._turns = asyncio.Semaphore(MOST)
        self._hosts: dict[str, _Host] = {}
        self.under_way = 0

    async def send(self, url: str, body: bytes) -> bool:
        """Whether the host took it, at last. What it will never take (4xx) is not sent again; nothing is sent when
        `MOST_WAITING` wait already."""
        if self.under_way >= MOST_WAITING:
            return False
        self.under_way += 1
        try:
            for pause in (*PAUSES, None):
                last = pause is None or self._leaving().done()
                async with self._turn(urlsplit(url).netloc):
                    taken = await fetch.post(url, body, reach=self._reach)
                if taken is not None or last:
                    return bool(taken)
                await asyncio.wait({self._leaving()}, timeout=pause)
            raise AssertionError("not reached")
        finally:
            self.under_way -= 1

    @asynccontextmanager
    async def _turn(self, name: str) -> AsyncIterator[None]:
        """First the host's, then one of all: who waits for a slow host takes nobody else's place."""
        host = self._hosts.setdefault(name, _Host())
        host.users += 1
        try:
            async with host.turns, self._turns:
                yield
        finally:
            host.users -= 1
            if not host.users:
                del self._hosts[name]

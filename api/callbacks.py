"""Callbacks: JSON posted to addresses that clients have named, so many at a time, again while a host does not take it.

A host that is slow or gone must not keep the others from hearing: each try takes a turn of its own, a host has few of
them, and whoever pauses holds none; nor may those of one host fill the room in which all wait. When the server goes
away nobody pauses any more: what is under way gets one last try.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from api import fetch

MOST = 32  # tries at a time
MOST_OF_HOST = 4  # of these, to one host
MOST_WAITING = 10_000  # callbacks that are under way, wait for their turn or pause
MOST_WAITING_OF_HOST = 1_000  # of these, to one host
PAUSES = 1.0, 5.0, 25.0  # seconds before the second try and those after it, unless the host asks for more
LONGEST_PAUSE = 600.0  # whatever it asks for


@dataclass(slots=True)
class _Host:
    turns: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MOST_OF_HOST))
    under_way: int = 0


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
        `MOST_WAITING` wait already, or `MOST_WAITING_OF_HOST` for this host."""
        name = _name(url)
        if self.under_way >= MOST_WAITING or self._waiting(name) >= MOST_WAITING_OF_HOST:
            return False
        with self._counted(name) as host:
            for pause in (*PAUSES, None):
                last = pause is None or self._leaving().done()
                async with host.turns, self._turns:  # who waits for a slow host takes nobody else's place
                    told = await fetch.post(url, body, reach=self._reach)
                if told.taken is not None or last:
                    return bool(told.taken)
                await asyncio.wait({self._leaving()}, timeout=min(max(pause or 0.0, told.after), LONGEST_PAUSE))
        raise AssertionError("not reached")

    def _waiting(self, name: str) -> int:
        return self._hosts[name].under_way if name in self._hosts else 0

    @contextmanager
    def _counted(self, name: str) -> Iterator[_Host]:
        host = self._hosts.setdefault(name, _Host())
        host.under_way += 1
        self.under_way += 1
        try:
            yield host
        finally:
            self.under_way -= 1
            host.under_way -= 1
            if not host.under_way:
                del self._hosts[name]


def _name(url: str) -> str:
    """A host and its port, however they are written."""
    parts = urlsplit(url)
    return f"{parts.hostname}:{parts.port or (443 if parts.scheme == 'https' else 80)}"

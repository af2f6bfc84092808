"""Callbacks: JSON posted to addresses that clients have named, so many at a time, again while a host does not take it.

A host that is slow or gone must not keep the others from hearing: each try takes a turn of its own, a tenant has a part
of them and each of its hosts few, and whoever pauses holds none. Tenants count apart even at the same host. Nor may
those of one host, or of one tenant, fill the room in which all wait. When the server goes away nobody pauses any more:
what is under way gets one last try.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from api import fetch

MOST = 256  # tries at a time
MOST_OF_TENANT = 64  # of these, of one tenant
MOST_OF_HOST = 4  # of these, to one host; 1 while it does not answer
MOST_WAITING = 10_000  # callbacks that are under way, wait for their turn or pause
MOST_WAITING_OF_TENANT = 2_500  # of these, of one tenant
MOST_WAITING_OF_HOST = 1_000  # of these, to one host
PAUSES = 1.0, 5.0, 25.0  # seconds before the second try and those after it, unless the host asks for more
LONGEST_PAUSE = 600.0  # whatever it asks for
Post = Callable[[], Awaitable[fetch.Told]]


@dataclass(slots=True)
class _Tenant:
    turns: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MOST_OF_TENANT))
    under_way: int = 0


@dataclass(slots=True)
class _Host:
    """Of one tenant. `silent`: it did not answer the last time; until it does, `alone` is held by whoever tries."""

    turns: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MOST_OF_HOST))
    alone: asyncio.Lock = field(default_factory=asyncio.Lock)
    silent: bool = False
    under_way: int = 0


class Callbacks:
    """`leaving()`: the future that is resolved when the server begins to go away. `under_way`: how many callbacks have
    not been taken or given up yet."""

    def __init__(self, reach: fetch.Reach, leaving: Callable[[], asyncio.Future[None]]) -> None:
        self._reach, self._leaving = reach, leaving
        self._turns = asyncio.Semaphore(MOST)
        self._tenants: dict[str, _Tenant] = {}
        self._hosts: dict[tuple[str, str], _Host] = {}
        self.under_way = 0

    async def send(self, url: str, body: bytes, tenant: str) -> bool:
        """Whether the host took it, at last. What it will never take (4xx) is not sent again; nothing is sent when
        as many wait already as may: in all, of this tenant, or of its callbacks to this host."""
        name = _name(url)
        if not self._has_room(tenant, name):
            return False
        with self._counted(tenant, name) as (owner, host):
            for pause in (*PAUSES, None):
                last = pause is None or self._leaving().done()
                told = await self._try(owner, host, lambda: fetch.post(url, body, reach=self._reach, tenant=tenant))
                if told.taken is not None or last:
                    return bool(told.taken)
                await asyncio.wait({self._leaving()}, timeout=min(max(pause or 0.0, told.after), LONGEST_PAUSE))
        raise AssertionError("not reached")

    async def _try(self, owner: _Tenant, host: _Host, post: Post) -> fetch.Told:
        """Once, when it is its turn. Who waits for a slow host takes nobody else's place."""
        async with host.turns:
            if not host.silent:
                async with owner.turns, self._turns:
                    if not host.silent:  # still not
                        return await _listen(host, post)
            async with host.alone, owner.turns, self._turns:
                return await _listen(host, post)

    def _has_room(self, tenant: str, name: str) -> bool:
        owner, host = self._tenants.get(tenant), self._hosts.get((tenant, name))
        return (
            self.under_way < MOST_WAITING
            and (owner is None or owner.under_way < MOST_WAITING_OF_TENANT)
            and (host is None or host.under_way < MOST_WAITING_OF_HOST)
        )

    @contextmanager
    def _counted(self, tenant: str, name: str) -> Iterator[tuple[_Tenant, _Host]]:
        owner = self._tenants.setdefault(tenant, _Tenant())
        host = self._hosts.setdefault((tenant, name), _Host())
        self.under_way += 1
        owner.under_way += 1
        host.under_way += 1
        try:
            yield owner, host
        finally:
            self.under_way -= 1
            owner.under_way -= 1
            host.under_way -= 1
            if not owner.under_way:
                del self._tenants[tenant]
            if not host.under_way:
                del self._hosts[tenant, name]


async def _listen(host: _Host, post: Post) -> fetch.Told:
    told = await post()
    host.silent = not told.answered
    return told


def _name(url: str) -> str:
    """A host and its port, however they are written."""
    parts = urlsplit(url)
    return f"{parts.hostname}:{parts.port or (443 if parts.scheme == 'https' else 80)}"

"""Names of hosts, looked up by threads of their own.

Whoever names a host may also answer for its name, as slowly as he likes. Such a look-up cannot be broken off; here it
keeps neither the threads that read results nor the process from its end, and those of one tenant leave threads to the
others.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import threading
from collections import Counter, deque
from contextlib import suppress

MOST = 64  # look-ups at a time
MOST_OF_TENANT = 16  # of these, of one tenant
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Answer = asyncio.Future[list[Address]]
Question = tuple[str, int, Answer]


class Lookups:
    """May be used by several event loops."""

    def __init__(self) -> None:
        self._asked: dict[str, deque[Question]] = {}  # by tenant, whoever was served last at the end
        self._busy: Counter[str] = Counter()
        self._changed = threading.Condition()
        self._threads = 0

    async def find(self, name: str, port: int, tenant: str = "") -> list[Address]:
        """The addresses of a name, each once; none when it has none or cannot be looked up."""
        answer: Answer = asyncio.get_running_loop().create_future()
        with self._changed:
            self._asked.setdefault(tenant, deque()).append((name, port, answer))
            self._changed.notify()
            if grows := self._threads < MOST:
                self._threads += 1
        if grows:
            threading.Thread(target=self._work, name="lookup", daemon=True).start()
        return await answer

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._next() is not None)
                tenant, (name, port, answer) = self._take()
            try:
                if not answer.cancelled():
                    found = _find(name, port)
                    with suppress(RuntimeError):  # its loop has ended
                        answer.get_loop().call_soon_threadsafe(_tell, answer, found)
            finally:
                with self._changed:
                    self._busy[tenant] -= 1
                    self._busy += Counter()  # forget those of none
                    self._changed.notify()

    def _next(self) -> str | None:
        """Whose look-up may begin."""
        return next((tenant for tenant in self._asked if self._busy[tenant] < MOST_OF_TENANT), None)

    def _take(self) -> tuple[str, Question]:
        tenant = self._next()
        assert tenant is not None
        line = self._asked.pop(tenant)
        question = line.popleft()
        if line:
            self._asked[tenant] = line
        self._busy[tenant] += 1
        return tenant, question


def _tell(answer: Answer, found: list[Address]) -> None:
    if not answer.done():
        answer.set_result(found)


def _find(name: str, port: int) -> list[Address]:
    try:
        found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):  # the latter for a label that no name can have
        return []
    return list(dict.fromkeys(ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found))

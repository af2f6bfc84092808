"""Names of hosts, looked up by threads of their own.

Whoever names a host may also answer for its name, as slowly as he likes. Such a look-up cannot be broken off; here it
keeps neither the threads that read results nor the process from its end.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import threading
from contextlib import suppress
from queue import SimpleQueue

MOST = 16  # look-ups at a time
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Answer = asyncio.Future[list[Address]]


class Lookups:
    """May be used by several event loops."""

    def __init__(self) -> None:
        self._asked: SimpleQueue[tuple[str, int, Answer]] = SimpleQueue()
        self._threads = 0

    async def find(self, name: str, port: int) -> list[Address]:
        """The addresses of a name, each once; none when it has none or cannot be looked up."""
        answer: Answer = asyncio.get_running_loop().create_future()
        self._asked.put((name, port, answer))
        if self._threads < MOST:
            self._threads += 1
            threading.Thread(target=self._work, name="lookup", daemon=True).start()
        return await answer

    def _work(self) -> None:
        while True:
            name, port, answer = self._asked.get()
            if not answer.cancelled():
                found = _find(name, port)
                with suppress(RuntimeError):  # its loop has ended
                    answer.get_loop().call_soon_threadsafe(_tell, answer, found)


def _tell(answer: Answer, found: list[Address]) -> None:
    if not answer.done():
        answer.set_result(found)


def _find(name: str, port: int) -> list[Address]:
    try:
        found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):  # the latter for a label that no name can have
        return []
    return list(dict.fromkeys(ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found))

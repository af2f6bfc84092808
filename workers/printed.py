"""What a worker's process prints, its own code and the libraries in it, as lines of the master's log.

Where people read, a worker writes to the same terminal. Where each line must be one JSON object, it writes into a pipe,
and what comes together becomes one line: a traceback whole, other text line by line.
"""

from __future__ import annotations

import asyncio
import os

import structlog

log = structlog.get_logger("worker")
PAUSE = 0.1          # seconds after which what was written together is told
MOST = 64 << 10      # bytes that are told together
TRACES = ("Traceback (most recent call last)", "Fatal Python error", "Exception Group Traceback")


class Printed:
    """The reading end of one incarnation's pipe. The event loop's; `fd` is closed with it."""

    def __init__(self, fd: int, device: str, incarnation: int) -> None:
        self._fd, self._facts = fd, {"device": device, "incarnation": incarnation}
        self._loop = asyncio.get_running_loop()
        self._data = bytearray()
        self._timer: asyncio.TimerHandle | None = None
        os.set_blocking(fd, False)
        self._loop.add_reader(fd, self._read)

    def close(self) -> None:
        """The process has ended: what is there is told, and no more is awaited of what it has started."""
        if self._fd >= 0:
            self._read()
        if self._fd >= 0:
            self._end()
        self._tell()

    def _read(self) -> None:
        try:
            data = os.read(self._fd, MOST)
        except BlockingIOError:
            return
        if not data:
            self._end()
            return
        self._data += data
        if len(self._data) >= MOST:
            self._tell()
        elif self._timer is None:
            self._timer = self._loop.call_later(PAUSE, self._tell)

    def _end(self) -> None:
        self._loop.remove_reader(self._fd)
        os.close(self._fd)
        self._fd = -1

    def _tell(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        text = self._data.decode("utf-8", "replace").strip()
        self._data.clear()
        if any(trace in text for trace in TRACES):
            log.error("worker wrote", **self._facts, exception=text)
        elif text:
            for line in text.splitlines():
                if line.strip():
                    log.warning("worker wrote", **self._facts, text=line)

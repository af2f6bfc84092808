"""Whether a client reads what it is sent: who does not would hold memory and a place for as long as it likes.

Watched while a transport's buffer is full, and by what the other side has acknowledged: the kernel's own buffer takes
nothing more until a third of it is free, so by what it took a slow reader of a fast line would look like a dead one.
"""

from __future__ import annotations

import asyncio
import fcntl
import struct
import termios


class Progress:
    """One connection. Its transport is aborted when less than `least` bytes were read in `window` seconds of waiting;
    `fd` is the socket's, or -1 where it is not known."""

    __slots__ = ("_fd", "_least", "_owed", "_timer", "_transport", "_window")

    def __init__(self, transport: asyncio.Transport, fd: int, window: float, least: float) -> None:
        self._transport, self._fd, self._window, self._least = transport, fd, window, least
        self._timer: asyncio.TimerHandle | None = None
        self._owed = 0

    def watch(self) -> None:
        """The buffer is full from now on."""
        self._owed = self._unread()
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._window, self._look)

    def rest(self) -> None:
        """It is not full any more, or the connection has ended."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        if self._owed - self._unread() < self._least:
            self._transport.abort()
        else:
            self.watch()

    def _unread(self) -> int:
        """Bytes that were written and that the other side has not acknowledged."""
        size = self._transport.get_write_buffer_size()
        if self._fd >= 0:
            size += struct.unpack("i", fcntl.ioctl(self._fd, termios.TIOCOUTQ, bytes(4)))[0]
        return size

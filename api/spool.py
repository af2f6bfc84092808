"""Bytes as they arrive: in memory while they are few, beyond that in a file without a name, which dies with its owner.

Files lie in `tempfile.tempdir`, which the server sets to the `tmp` folder of its outputs: /tmp may be memory.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import tempfile
from collections.abc import AsyncIterable
from tempfile import SpooledTemporaryFile
from typing import IO, Any

from core.data import Data
from core.disk import disk_faults

IN_MEMORY = 4 << 20  # bytes of a body that are kept in memory
AT_ONCE = 1 << 20    # of one that is larger, how much goes to the disk at once


class Spool:
    """One body that comes in pieces. Leave its `with` block to free what was not finished."""

    def __init__(self) -> None:
        self.size = 0  # bytes so far
        self._pieces: list[bytes | memoryview] = []
        self._held = 0  # bytes of them
        self._file: IO[bytes] | None = None

    async def write(self, piece: bytes | memoryview) -> None:
        """Add a piece of at most a few MiB, which nobody changes any more. Raises `StorageFull` and `StorageFailed`."""
        self._pieces.append(piece)
        self._held += len(piece)
        self.size += len(piece)
        if self._held > (IN_MEMORY if self._file is None else AT_ONCE):
            await asyncio.to_thread(self._spill)

    async def finish(self) -> Data:
        """All of it, read-only: in memory, or a mapped file whose room is given back when nobody holds it any more.
        Nothing can be written after this. Raises as `write`."""
        if self._file is None:
            data = b"".join(self._pieces)
            self._forget()
            return data
        return await asyncio.to_thread(self._map)

    def close(self) -> None:
        """Free what has come. What `finish` gave stays. A second call does nothing."""
        self._forget()
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _spill(self) -> None:
        with disk_faults():
            if self._file is None:
                self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - it is closed with the spool
            _write(self._file.fileno(), b"".join(self._pieces))
        self._forget()

    def _forget(self) -> None:
        self._pieces, self._held = [], 0

    def _map(self) -> mmap.mmap:
        self._spill()
        assert self._file is not None
        found = _mapped(self._file)
        self.close()
        return found


async def collect(pieces: AsyncIterable[bytes | memoryview]) -> Data:
    """A whole body. Raises what reading it raises, `StorageFull` and `StorageFailed`."""
    with Spool() as spool:
        async for piece in pieces:
            await spool.write(piece)
        return await spool.finish()


def spooled(file: SpooledTemporaryFile[bytes] | Any) -> Data:
    """What a form's parser has put into such a file, as `Spool.finish` gives it; the file may be closed after that.
    Blocks while it is read from the disk. Raises `StorageFull` and `StorageFailed`."""
    with disk_faults():
        if getattr(file, "_rolled", False):
            file.flush()
            return _mapped(file)
        file.seek(0)
        data: bytes = file.read()
        return data


def _write(fd: int, data: bytes) -> None:
    with memoryview(data) as whole:
        sent = 0
        while sent < len(whole):
            sent += os.write(fd, whole[sent:])


def _mapped(file: IO[bytes]) -> mmap.mmap:
    with disk_faults():
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

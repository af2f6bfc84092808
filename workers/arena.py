"""Shared memory for encoded images: one anonymous file that the master owns and every worker maps.

An anonymous file (memfd) has no name, so nothing can be left behind, whoever is killed and however; and it does not
count against the size of /dev/shm (64 MB in most containers). It is sparse: only pages that were touched take memory.

The allocator is segregated by size class (four per power of two, so at most 25 % is lost to rounding): take and give
are O(1). Freed spans stay warm, their pages mapped, up to `keep` bytes; beyond that their pages go back to the system.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from collections import defaultdict

from core.errors import StorageFull
from core.request import Span

PAGE = 4096
PLENTY = 8  # much is one part of so many of the arena


def size_class(size: int) -> int:
    """What is reserved for `size` bytes: the next multiple of a quarter of its power of two, in whole pages."""
    pages = max(1, -(-size // PAGE))
    step = max(1, 1 << max(0, pages.bit_length() - 3))
    return -(-pages // step) * step * PAGE


def used_up() -> StorageFull:
    """The error for a request that finds no room."""
    return StorageFull(
        "shared memory is full of images that come, wait, run or are being sent; try again in about 1 s",
        retry_after=1.0,
    )


def _anonymous_file(size: int) -> int:
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("imagepool")
    else:  # not Linux: a file that is unlinked before anybody can see it
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, size)
    return fd


class ArenaView:
    """A mapping of the arena: all that a worker has of it."""

    def __init__(self, fd: int, size: int) -> None:
        self.fd = fd
        self.size = size
        self._map = mmap.mmap(fd, size)
        self._view = memoryview(self._map)

    def view(self, span: Span) -> memoryview:
        """The span's `size` bytes, writable."""
        return self._view[span.offset : span.offset + span.size]

    def room(self, span: Span) -> memoryview:
        """All `capacity` bytes of the span, writable."""
        return self._view[span.offset : span.offset + span.capacity]

    def close(self) -> None:
        """Unmap, once. Views that somebody still holds keep the mapping alive until they go."""
        if self.fd < 0:
            return
        self._view.release()
        with contextlib.suppress(BufferError):
            self._map.close()
        os.close(self.fd)
        self.fd = -1


class Arena(ArenaView):
    """The master's side: it alone takes and gives spans."""

    def __init__(self, size: int, keep: int = 64 << 20) -> None:
        size = -(-size // PAGE) * PAGE
        super().__init__(_anonymous_file(size), size)
        self._keep = keep
        self._end = 0  # everything beyond has never been used
        self._warm_bytes = 0
        self._used = 0
        self._warm: dict[int, list[int]] = defaultdict(list)
        self._cold: dict[int, list[int]] = defaultdict(list)
        self._taken: dict[int, int] = {}  # offset -> capacity

    def __repr__(self) -> str:
        return f"<Arena {len(self._taken)} spans, {self.used >> 10} KiB used, {self._warm_bytes >> 10} KiB warm>"

    @property
    def used(self) -> int:
        """Bytes reserved by spans that are out."""
        return self._used

    @property
    def plenty(self) -> bool:
        """Whether not much is used yet."""
        return self._used < self.size // PLENTY

    @property
    def spans(self) -> int:
        """How many spans are out."""
        return len(self._taken)

    def take_input(self, size: int) -> Span:
        """Room for an image that waits. Inputs never take more than half of the arena: results must find a place, or
        nothing that waits could ever end. Raises `StorageFull`."""
        if self._used + size > self.size // 2:
            raise used_up()
        return self.take(size)

    def take(self, size: int) -> Span:
        """Reserve room for `size` bytes. Raises `StorageFull` when the arena is used up."""
        capacity = size_class(size)
        if warm := self._warm[capacity]:
            offset = warm.pop()
            self._warm_bytes -= capacity
        elif cold := self._cold[capacity]:
            offset = cold.pop()
        elif self._end + capacity <= self.size:
            offset, self._end = self._end, self._end + capacity
        else:
            offset, capacity = self._larger(capacity)
        self._taken[offset] = capacity
        self._used += capacity
        return Span(offset, size, capacity)

    def give(self, span: Span) -> None:
        """Give a span back. Giving it twice is a defect and raises KeyError."""
        capacity = self._taken.pop(span.offset)
        self._used -= capacity
        if self._warm_bytes + capacity <= self._keep:
            self._warm[capacity].append(span.offset)
            self._warm_bytes += capacity
        else:
            self._drop_pages(span.offset, capacity)
            self._cold[capacity].append(span.offset)
        if not self._taken:
            self._forget_classes()

    def _larger(self, capacity: int) -> tuple[int, int]:
        for spans in (self._cold, self._warm):
            for other in sorted(size for size, offsets in spans.items() if offsets and size > capacity):
                if spans is self._warm:
                    self._warm_bytes -= other
                return spans[other].pop(), other
        raise used_up()

    def _forget_classes(self) -> None:
        """Nothing is out: if most of the address space was carved into classes, start afresh."""
        if self._end > self.size // 2:
            self._drop_pages(0, self._end)
            self._warm.clear()
            self._cold.clear()
            self._end = self._warm_bytes = 0

    def _drop_pages(self, offset: int, size: int) -> None:
        if hasattr(mmap, "MADV_REMOVE"):
            self._map.madvise(mmap.MADV_REMOVE, offset, size)

"""The folder of LoRAs as its users change it: a file appears whole and looked at, or not at all."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

from core.errors import BadRequest, StorageFull, TooLarge
from core.loras import Lora, LoraFacts, LoraFolder, inspect
from core.turns import Rests
from core.units import show_size
from store.faults import disk_faults
from store.files import check_disk
from store.modes import FILE_MODE, make_folder

TEMPORARY = f".{'[0-9a-f]' * 32}"
NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
RETRY_AFTER = 3600.0  # seconds: somebody has to remove a LoRA first
Grow = Callable[[int, int], None]


class StoredLoras:
    """Files of at most `max_bytes` each; the folder takes no more when it holds `most` of them or `most_bytes`, and
    leaves `min_free` bytes of its disk alone. All methods block and may be called from any thread.

    What was read of a file is remembered as long as the file stays the same. One file is looked into at a time.
    """

    def __init__(self, folder: Path, max_bytes: int, *, most: int, most_bytes: int, min_free: int) -> None:
        self.max_bytes = max_bytes
        self._path, self._folder = folder, LoraFolder(folder)
        self._most, self._most_bytes, self._min_free = most, most_bytes, min_free
        self._known: dict[Lora, LoraFacts | None] = {}
        self._used = 0  # bytes in the folder, with what is on its way
        self._lock, self._looking = threading.Lock(), threading.Lock()
        for leftover in folder.glob(TEMPORARY):  # of a server that died while it wrote
            leftover.unlink(missing_ok=True)

    def list(self) -> list[tuple[Lora, LoraFacts]]:
        """All of them that are usable, by name."""
        before = set(self._known)
        found = [(lora, self._facts(lora)) for lora in self._folder.list()]
        for gone in before.difference(lora for lora, _ in found):
            self._known.pop(gone, None)
        return [(lora, facts) for lora, facts in found if facts is not None]

    def expect(self, size: int) -> None:
        """Whether there will be room for a LoRA of `size` bytes (0: nobody has told), before any of them is read.
        Raises `TooLarge`, `StorageFull` or `StorageFailed`."""
        with self._lock, disk_faults():
            make_folder(self._path)
            sizes = _sizes(self._path)
            self._used = sum(sizes)
            if len(sizes) >= self._most:
                raise _full(f"{self._most} files", "--lora-files")
            self._check(0, size)

    def receive(self) -> IncomingLora:
        """A file to be written piece by piece, then to be given to `keep`; in the end to be closed."""
        return IncomingLora(self._path / f".{uuid4().hex}", self._grow)

    def check(self, incoming: IncomingLora) -> LoraFacts:
        """What it is, once it has come whole. Raises `BadRequest` for what is no LoRA, `StorageFull` or
        `StorageFailed`."""
        with disk_faults(), self._looking:
            incoming.open()
            return inspect(incoming.place, Rests())

    def keep(self, name: str, incoming: IncomingLora, facts: LoraFacts) -> Lora:
        """Give it a name; a LoRA of that name is replaced in one step. `facts` are what `check` said. Raises
        `InvalidParameter` for a bad name, `StorageFull` or `StorageFailed`; then nothing has changed."""
        place = self._folder.file(name)
        with disk_faults():
            incoming.flush()
            with self._lock:
                if not place.exists() and len(_sizes(self._path)) > self._most:  # others came meanwhile
                    raise _full(f"{self._most} files", "--lora-files")
                incoming.rename(place)
        lora = self._folder.get(name)
        self._known[lora] = facts
        return lora

    def delete(self, name: str) -> None:
        """Remove it. Raises `InvalidParameter` when there is none of that name."""
        with disk_faults():
            self._folder.file(self._folder.get(name).name).unlink(missing_ok=True)

    def _facts(self, lora: Lora) -> LoraFacts | None:
        """None: it is broken, or was just removed."""
        if lora not in self._known:
            with self._looking:
                if lora not in self._known:  # still not
                    try:
                        self._known[lora] = inspect(self._folder.file(lora.name), Rests())
                    except BadRequest:
                        self._known[lora] = None
                    except OSError:
                        return None
        return self._known.get(lora)

    def _grow(self, written: int, more: int) -> None:
        """So many bytes more of a file that has so many come in; fewer than none when it goes away again."""
        with self._lock:
            if more > 0:
                self._check(written, more)
            self._used += more

    def _check(self, written: int, more: int) -> None:
        if written + more > self.max_bytes:
            raise TooLarge(f"the LoRA has more than {show_size(self.max_bytes)}", parameter="file")
        if self._used + more > self._most_bytes:
            raise _full(show_size(self._most_bytes), "--lora-bytes")
        check_disk(self._path, more, self._min_free, "this LoRA")


class IncomingLora:
    """A file on its way, under a name that no request can say. It is made with its first bytes, and gone when it is
    closed without having been given a name. `grow(written, more)` raises what speaks against more bytes."""

    def __init__(self, place: Path, grow: Grow) -> None:
        self.place, self._grow = place, grow
        self._fd = -1
        self._written = 0

    def write(self, data: bytes) -> int:
        """Append. Raises `TooLarge`, `StorageFull` or `StorageFailed`."""
        self._grow(self._written, len(data))
        self._written += len(data)
        with disk_faults():
            self.open()
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        return len(data)

    def flush(self) -> None:
        """All of it is on the disk. Raises OSError."""
        self.open()
        os.fsync(self._fd)

    def rename(self, place: Path) -> None:
        """It is whole, and stays. Raises OSError."""
        self.place.replace(place)
        self._written = 0

    def close(self) -> None:
        """Gone, unless it has been given a name. A second time changes nothing."""
        self._grow(0, -self._written)
        self._written = 0
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self.place.unlink(missing_ok=True)

    def open(self) -> None:
        """It is there, if with nothing in it. Raises OSError."""
        if self._fd < 0:
            self._fd = os.open(self.place, NEW, FILE_MODE)


def _sizes(folder: Path) -> list[int]:
    """Of all files in the folder, with those on their way. Raises OSError."""
    with os.scandir(folder) as entries:
        return [entry.stat().st_size for entry in entries if entry.is_file(follow_symlinks=False)]


def _full(what: str, flag: str) -> StorageFull:
    return StorageFull(
        f"the folder of LoRAs has reached the {what} set for it; remove one that nobody needs "
        f"(DELETE /api/v1/lora/NAME), or have the operator set {flag}",
        retry_after=RETRY_AFTER,
    )

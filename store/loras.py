"""The folder of LoRAs as its users change it: a file appears whole and looked at, or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from core.errors import BadRequest, TooLarge
from core.loras import Lora, LoraFacts, LoraFolder, inspect
from store.faults import disk_faults
from store.files import FileStore

CHUNK = 1 << 20
TEMPORARY = f".{'[0-9a-f]' * 32}"


class StoredLoras:
    """Files of at most `max_bytes` each. All methods block and may be called from any thread."""

    def __init__(self, folder: Path, max_bytes: int, files: FileStore) -> None:
        self.max_bytes = max_bytes
        self._folder, self._files = LoraFolder(folder), files
        for leftover in folder.glob(TEMPORARY):  # of a server that died while it wrote
            leftover.unlink(missing_ok=True)

    def list(self) -> list[tuple[Lora, LoraFacts]]:
        """All of them that are usable, by name."""
        found = []
        for lora in self._folder.list():
            try:
                found.append((lora, inspect(self._folder.file(lora.name))))
            except (BadRequest, OSError):  # broken, or just removed
                continue
        return found

    def put(self, name: str, source: BinaryIO) -> tuple[Lora, LoraFacts]:
        """Keep what `source` gives; a LoRA of that name is replaced in one step. Raises `InvalidParameter` for a bad
        name, `BadRequest` for what is no LoRA, `TooLarge`, `StorageFull` or `StorageFailed`."""
        place = self._folder.file(name)
        temporary = place.with_name(f".{uuid4().hex}")
        with disk_faults():
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._write(temporary, source)
                facts = inspect(temporary)
                temporary.replace(place)
            finally:
                temporary.unlink(missing_ok=True)
        return self._folder.get(name), facts

    def delete(self, name: str) -> None:
        """Remove it. Raises `InvalidParameter` when there is none of that name."""
        with disk_faults():
            self._folder.file(self._folder.get(name).name).unlink(missing_ok=True)

    def _write(self, file: Path, source: BinaryIO) -> None:
        size = 0
        with file.open("wb") as out:
            while chunk := source.read(CHUNK):
                size += len(chunk)
                if size > self.max_bytes:
                    raise TooLarge(f"the LoRA has more than {self.max_bytes >> 20} MiB", parameter="file")
                self._files.room(len(chunk))
                out.write(chunk)
            out.flush()
            os.fsync(out.fileno())

"""What lies in the outputs folder and belongs to no job: a start moves it aside, retention removes it in time."""

from __future__ import annotations

import shutil
import time
from contextlib import suppress
from pathlib import Path

from store.faults import disk_faults
from store.modes import make_folder
from store.sqlite import BESIDE

PREFIX = "orphans/"


class Orphans:
    """Folders under `root`: one for each job that nothing is known of, one for each database that was given up. All
    methods block and raise `StorageFull` or `StorageFailed`."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def place(self, name: str) -> Path:
        """The folder of that name, made if it is not there."""
        with disk_faults():
            make_folder(self._root)
            make_folder(self._root / name)
        return self._root / name

    def take_database(self, path: Path) -> Path:
        """Move what is there of a database; where it lies now."""
        folder = self.place(f"database-{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**6:06}")
        with disk_faults():
            for ending in BESIDE:
                with suppress(FileNotFoundError):
                    Path(f"{path}{ending}").replace(folder / f"{path.name}{ending}")
        return folder / path.name

    def kept(self) -> list[tuple[str, float | None, int]]:
        """(name, unix time of its arrival, bytes) of every folder: what `retention.expired` wants."""
        found: list[tuple[str, float | None, int]] = []
        with disk_faults(), suppress(FileNotFoundError):
            for folder in list(self._root.iterdir()):
                if folder.is_dir() and not folder.is_symlink():
                    size = sum(file.lstat().st_size for file in folder.iterdir())
                    found.append((f"{PREFIX}{folder.name}", folder.stat().st_mtime, size))
        return found

    def delete(self, name: str) -> None:
        """Remove a folder, by its name from `kept`."""
        with disk_faults(), suppress(FileNotFoundError):
            shutil.rmtree(self._root / name.removeprefix(PREFIX))

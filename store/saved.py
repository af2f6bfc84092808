"""Images that people asked to be kept under a name of their own: files in `saved/`, beside those of jobs.

The folder has a bound of its own, and no retention: who saved an image wants to find it again.
"""

from __future__ import annotations

import re
import threading
import urllib.parse
from pathlib import Path
from uuid import uuid4

from core.data import Data
from core.errors import BadRequest, StorageFull
from store.faults import disk_faults
from store.files import FileStore
from store.modes import make_file, make_folder

SAVED = "saved"
MOST = 10_000  # images, however small
NAME = re.compile(r"[^./\\\0][^/\\\0]*")


class SavedImages:
    """At most `max_bytes` and `MOST` images under `saved/` of the files' root; a tenant with a name has a folder of its
    own there. All methods block and may be called from any thread."""

    def __init__(self, files: FileStore, max_bytes: int) -> None:
        self._files, self._max_bytes = files, max_bytes
        self._root = files.root / SAVED
        self._lock = threading.Lock()
        self._used, self._count = max_bytes, MOST  # as far as is known: the folder is looked at when it seems full

    def put(self, name: str, data: Data, tenant: str = "anonymous") -> None:
        """Keep the image; one of that name is replaced in one step. Raises `BadRequest` for what is no plain file name,
        `StorageFull` or `StorageFailed`."""
        if not NAME.fullmatch(name) or len(name.encode()) > 200:
            raise BadRequest("an image is saved under a plain file name, which does not begin with a dot")
        folder = self._root if tenant == "anonymous" else self._root / f"of-{urllib.parse.quote(tenant, safe='')}"
        self._files.room(len(data))
        temporary = self._root / f".{uuid4().hex}"
        with self._lock, disk_faults():
            make_folder(self._root)
            make_folder(folder)
            self._check(len(data))
            before = _size(folder / name)
            try:
                make_file(temporary)
                temporary.write_bytes(data)
                temporary.replace(folder / name)
            finally:
                temporary.unlink(missing_ok=True)
            self._used += len(data) - (before or 0)
            self._count += before is None

    def _check(self, more: int) -> None:
        """Raises `StorageFull` when there is no room for so many bytes more, `OSError`."""
        if self._used + more > self._max_bytes or self._count >= MOST:
            sizes = [file.stat().st_size for file in self._root.rglob("*") if file.is_file()]
            self._used, self._count = sum(sizes), len(sizes)
        if self._used + more > self._max_bytes or self._count >= MOST:
            raise StorageFull(
                f"the saved images have reached the {self._max_bytes >> 20} MiB or the {MOST:,} files set for them; "
                "let the operator move some away",
                retry_after=3600.0,
            )


def _size(file: Path) -> int | None:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return None

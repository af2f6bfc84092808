"""One server per outputs folder: an advisory lock that the kernel drops when its process dies, however it dies."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType

from core.errors import StorageFailed
from store.faults import disk_faults
from store.modes import FILE_MODE, make_folder, tighten

LOCK = ".lock"


class FolderLock:
    """Holds the folder from construction to `close`. Raises `StorageFailed` when another server holds it.

    From then on no other user may look into it. The file stays when the lock goes: removing it would let two servers
    lock two files of the same name.
    """

    def __init__(self, root: Path | str) -> None:
        self._root = Path(root)
        self._fd = self._take()
        tighten(self._root)
        tighten(self._root / LOCK)

    def renew(self) -> bool:
        """Take the file anew when somebody has removed or replaced it; whether that was so. Raises `StorageFailed` when
        another server was faster."""
        with disk_faults():
            mine = os.fstat(self._fd)
            try:
                if os.path.samestat(mine, (self._root / LOCK).stat()):
                    return False
            except FileNotFoundError:
                pass
        old, self._fd = self._fd, self._take()
        os.close(old)
        return True

    def _take(self) -> int:
        try:
            make_folder(self._root)
            fd = os.open(self._root / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
        except OSError as fault:
            why = (fault.strerror or "unknown fault").lower()
            raise StorageFailed(f"the outputs folder cannot be used ({why}); set another one with --outputs") from None
        with disk_faults():
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.truncate(fd, 0)
                os.pwrite(fd, str(os.getpid()).encode(), 0)
            except BlockingIOError:
                holder = os.pread(fd, 20, 0).decode("ascii", "replace") or "unknown"
                os.close(fd)
                raise StorageFailed(
                    f"another server (process {holder}) uses this outputs folder; stop it, "
                    "or give this server an outputs folder of its own"
                ) from None
            except OSError:
                os.close(fd)
                raise
        return fd

    def close(self) -> None:
        """Let the folder go. A second time changes nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

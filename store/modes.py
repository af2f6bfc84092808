"""Who may look at what is kept here: the user that the server runs as, and nobody else, whatever the umask says."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

FILE_MODE, FOLDER_MODE = 0o600, 0o700
OTHERS = stat.S_IRWXG | stat.S_IRWXO


def make_folder(folder: Path) -> bool:
    """Make it if it is not there, and those above it with the usual rights; whether it was made. Raises OSError."""
    try:
        folder.mkdir(FOLDER_MODE, parents=True)
    except FileExistsError:
        return False
    return True


def make_file(file: Path) -> None:
    """Make it, empty, if it is not there: whoever creates it otherwise leaves it to the umask. Raises OSError."""
    with suppress(FileExistsError):
        os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE))


def tighten(path: str | Path) -> None:
    """Take the rights of others from what an older server left. What is not ours to change stays as it is: links, files
    that have a second name elsewhere, folders that all may write in (/tmp), what another user owns."""
    with suppress(OSError):
        if _too_open(os.lstat(path)):
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:  # as opened: somebody may have put a link there meanwhile
                if _too_open(state := os.fstat(fd)):
                    os.fchmod(fd, stat.S_IMODE(state.st_mode) & ~OTHERS)
            finally:
                os.close(fd)


def tighten_all(folder: Path) -> None:
    """The folder and everything in it. It may be missing."""
    tighten(folder)
    if not folder.is_symlink():
        for path, folders, files in os.walk(folder):  # which does not follow links
            for name in (*folders, *files):
                tighten(os.path.join(path, name))  # noqa: PTH118  (thousands of them at each start)


def _too_open(state: os.stat_result) -> bool:
    of_one = stat.S_ISREG(state.st_mode) and state.st_nlink == 1
    of_all = state.st_mode & stat.S_ISVTX
    return bool(state.st_mode & OTHERS) and (of_one or (stat.S_ISDIR(state.st_mode) and not of_all))


def open_to_others(folder: Path) -> bool:
    """Whether others may look into it. Raises OSError."""
    return bool(folder.stat().st_mode & OTHERS)

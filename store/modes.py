"""Who may look at what is kept here: the user that the server runs as, and nobody else, whatever the umask says."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

FILE_MODE, FOLDER_MODE = 0o600, 0o700
OTHERS = stat.S_IRWXG | stat.S_IRWXO


def make_folder(folder: Path) -> bool:
    """Make it if it is not there, and the folders above it as they usually are; whether it was made. Raises OSError."""
    try:
        folder.mkdir(FOLDER_MODE, parents=True)
    except FileExistsError:
        return False
    return True


def make_file(file: Path) -> None:
    """Make it, empty, unless it is there. Raises OSError."""
    os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, FILE_MODE))


def tighten(path: Path, mode: int) -> None:
    """Take the rights of all others from a file or folder of an older server, if it is ours to change: `mode` is its
    `st_mode`. Links are left alone, and folders that everybody may write in and nobody owns (/tmp)."""
    open_to_others, shared = mode & OTHERS, mode & stat.S_ISVTX
    if open_to_others and not shared and (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        with suppress(PermissionError):
            path.chmod(stat.S_IMODE(mode) & ~OTHERS)

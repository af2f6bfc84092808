"""What the disk's refusals are called: `StorageFull` when room is missing, `StorageFailed` for everything else."""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as NoConnection

from core.errors import ImagePoolError, InternalError, StorageFailed, StorageFull

RETRY_AFTER = 30.0  # seconds: retention or the operator has to make room first
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
SPARE = 64 * 1024  # bytes: less is full, whatever the database calls it


def full() -> StorageFull:
    """The error for a write that found no room."""
    return StorageFull(
        "the server's disk is full, so nothing was stored; try again later, or let the operator make room",
        retry_after=RETRY_AFTER,
    )


def failed(why: str) -> StorageFailed:
    """The error for a disk or database that refuses for another reason; `why` holds no path."""
    return StorageFailed(f"the server's storage does not work ({why}); try again later, and tell the operator")


@contextmanager
def disk_faults() -> Iterator[None]:
    """Inside, an `OSError` becomes one of ours."""
    try:
        yield
    except OSError as fault:
        if fault.errno in NO_ROOM:
            raise full() from fault
        raise failed(errno.errorcode.get(fault.errno or 0, "unknown fault")) from fault


@contextmanager
def database_faults(path: Path) -> Iterator[None]:
    """Inside, an error of the database at `path` becomes one of ours."""
    try:
        yield
    except IntegrityError as fault:
        raise InternalError("the job was stored before under the same id") from fault
    except DBAPIError as fault:
        raise _database_fault(fault.orig, path) from fault
    except NoConnection as fault:
        raise failed("too many readers at once") from fault
    except UnicodeEncodeError as fault:
        raise InternalError("the job names a tenant, a model or a key that is no text") from fault


def _database_fault(fault: BaseException | None, path: Path) -> ImagePoolError:
    code = getattr(fault, "sqlite_errorcode", None)
    if code is None:
        return failed(type(fault).__name__)
    # Growing the shared-memory index on a full disk is reported as an I/O error, so the disk itself is asked.
    if code == sqlite3.SQLITE_FULL or (code & 0xFF == sqlite3.SQLITE_IOERR and _free(path) < SPARE):
        return full()
    return failed(getattr(fault, "sqlite_errorname", "unknown fault"))


def _free(path: Path) -> int:
    try:
        disk = os.statvfs(path.parent)
    except OSError:
        return SPARE
    return disk.f_bavail * disk.f_frsize

"""What the refusals of disk and database are called: `StorageFull` when room is missing, else `StorageFailed`."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as NoConnection

from core.disk import READ_ONLY, RETRY_AFTER, disk_faults, failed, full
from core.errors import ImagePoolError, InternalError, StorageFailed

__all__ = ["RETRY_AFTER", "database_faults", "disk_faults", "failed", "full"]
DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
SPARE = 64 * 1024  # bytes: less is full, whatever the database calls it


class DatabaseDamaged(StorageFailed):
    """The database contradicts itself, or is none."""


def damaged() -> DatabaseDamaged:
    """The error for a database that is no longer whole."""
    return DatabaseDamaged(
        "the server's job database is damaged; try again when its operator has restarted the server, which makes a new "
        "one of what can still be read"
    )


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


@contextmanager
def raw_database_faults(path: Path) -> Iterator[None]:
    """The same for what the driver itself raises."""
    try:
        yield
    except sqlite3.Error as fault:
        raise _database_fault(fault, path) from fault


def _database_fault(fault: BaseException | None, path: Path) -> ImagePoolError:
    code = getattr(fault, "sqlite_errorcode", None)
    if code is None:
        return failed(type(fault).__name__)
    if code & 0xFF in DAMAGED:
        return damaged()
    if code & 0xFF == sqlite3.SQLITE_READONLY:
        return failed(READ_ONLY)
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

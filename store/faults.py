"""What the refusals of disk and database are called: `StorageFull` when room is missing, else `StorageFailed`."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as NoConnection

from core.disk import RETRY_AFTER, disk_faults, failed, full
from core.errors import ImagePoolError, InternalError

__all__ = ["RETRY_AFTER", "database_faults", "disk_faults", "failed", "full"]
SPARE = 64 * 1024  # bytes: less is full, whatever the database calls it


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

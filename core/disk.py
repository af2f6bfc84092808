"""What a disk's refusals are called: `StorageFull` when room is missing, `StorageFailed` for everything else."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from core.errors import ImagePoolError, StorageFailed, StorageFull

RETRY_AFTER = 30.0  # seconds: retention or the operator has to make room first
READ_ONLY = "it is read-only"
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def full() -> StorageFull:
    """The error for a write that found no room."""
    return StorageFull(
        "the server's disk is full, so nothing was stored; try again later, or let the operator make room",
        retry_after=RETRY_AFTER,
    )


def failed(why: str) -> StorageFailed:
    """The error for a disk or database that refuses for another reason; `why` holds no path."""
    return StorageFailed(f"the server's storage does not work ({why}); try again later, and tell the operator")


def disk_fault(fault: OSError) -> ImagePoolError:
    """What one of ours an `OSError` of the disk is."""
    if fault.errno in NO_ROOM:
        return full()
    return failed(READ_ONLY if fault.errno == errno.EROFS else errno.errorcode.get(fault.errno or 0, "unknown fault"))


@contextmanager
def disk_faults() -> Iterator[None]:
    """Inside, an `OSError` becomes one of ours."""
    try:
        yield
    except OSError as fault:
        raise disk_fault(fault) from fault

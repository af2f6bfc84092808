"""What a person is told whose job the scheduler ended."""

from __future__ import annotations

import re

from core.errors import Cancelled, DeadlineExceeded, ImagePoolError, OutOfMemory, PoisonousJob
from scheduler.work import Job


def cancelled() -> ImagePoolError:
    """Somebody asked for it."""
    return Cancelled("the job was cancelled")


def expired(job: Job, now: float) -> ImagePoolError:
    """Its deadline came first."""
    where = "waited for a device" if job.batch is None else "was running"
    return DeadlineExceeded(
        f"the deadline passed {now - job.since:.1f} s after submission, while the job {where}; "
        "allow more time or submit it at a higher priority"
    )


def poisonous(job: Job) -> ImagePoolError:
    """It has killed alone."""
    deaths = max(job.deaths, job.strikes)
    return PoisonousJob(
        f"{deaths} workers were lost while they ran this job, the last one while it ran nothing else, so it is not "
        "tried again; check its image and its parameters",
        deaths=deaths,
    )


def does_not_fit(job: Job, device: str, message: str) -> ImagePoolError:
    """Alone, and still too much. Of the device's own message only the amount that it lacked is told."""
    group = job.ticket.group
    lacked = re.search(r"allocate (\d+(?:\.\d+)? ?[KMGT]i?B)", message)
    return OutOfMemory(
        f"a {group.width}x{group.height} image does not fit the memory of {device} even alone with model "
        f"'{group.model}'{f' ({lacked[1]} more were needed)' if lacked else ''}; send a smaller image",
        model=group.model, width=group.width, height=group.height, device=device, needed=lacked[1] if lacked else None,
    )

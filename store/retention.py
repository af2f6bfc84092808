"""Which ended jobs have to go. Pure: the caller brings the jobs and the time, and deletes what is named."""

from __future__ import annotations

from collections.abc import Iterable


def expired(
    jobs: Iterable[tuple[str, float | None, int]], now: float, max_age: float | None, max_bytes: int | None
) -> list[str]:
    """The ids to delete, oldest end first.

    `jobs` are (id, ended_at in unix seconds or None, bytes of its files). A job goes when it ended more than `max_age`
    seconds ago, or when all files together exceed `max_bytes` and no older end is left to go first. None means no
    limit. A job that has not ended counts with its bytes, but is never named.
    """
    kept = list(jobs)
    total = sum(size for _, _, size in kept)
    doomed: list[str] = []
    for ended_at, job_id, size in sorted((at, job_id, size) for job_id, at, size in kept if at is not None):
        too_old = max_age is not None and now - ended_at > max_age
        too_much = max_bytes is not None and total > max_bytes
        if not (too_old or too_much):
            break
        doomed.append(job_id)
        total -= size
    return doomed

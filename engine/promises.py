"""Room for the results of what was accepted: how many bytes they will probably take, learned from those that came."""

from __future__ import annotations

from collections import Counter

from core.job import Job

Kind = tuple[str, str]  # model, format
UNKNOWN = {"png": 3.0}  # bytes a pixel before a result has come: an image that cannot be compressed
OTHERS = 1.0
FORGET = 0.1  # how much of the difference a smaller result takes away


class Promises:
    """What results take is learned in bytes a pixel, by model and format. Of late ones the largest count: a job is
    rather promised too much. `bytes` is what all jobs that have not ended will probably take."""

    def __init__(self) -> None:
        self.bytes = 0.0
        self._jobs: dict[str, tuple[Kind, int]] = {}
        self._pixels: Counter[Kind] = Counter()
        self._learned: dict[Kind, float] = {}

    def add(self, job: Job, pixels: int) -> None:
        """A job will have a result of so many pixels. A second time changes nothing."""
        if job.id not in self._jobs:
            kind = job.request.model, job.request.output.format
            self._jobs[job.id] = kind, pixels
            self._pixels[kind] += pixels
            self.bytes += pixels * self._each(kind)

    def settle(self, job_id: str, size: int | None = None) -> None:
        """The job has ended, with a result of `size` bytes (None: without), or was not accepted."""
        if job_id not in self._jobs:
            return
        kind, pixels = self._jobs.pop(job_id)
        self._pixels[kind] -= pixels
        self.bytes -= pixels * self._each(kind)
        if size is not None and pixels:
            self._learn(kind, size / pixels)
        if not self._jobs:
            self.bytes = 0.0  # no rest of rounding

    def _each(self, kind: Kind) -> float:
        return self._learned.get(kind, UNKNOWN.get(kind[1], OTHERS))

    def _learn(self, kind: Kind, seen: float) -> None:
        before, known = self._each(kind), kind in self._learned
        now = max(seen, before - FORGET * (before - seen)) if known else seen
        self._learned[kind] = now
        self.bytes += self._pixels[kind] * (now - before)

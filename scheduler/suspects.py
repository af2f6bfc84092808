"""Who is to blame when a worker is lost, and when the suspects run."""

from __future__ import annotations

from typing import Literal

from scheduler.roster import Roster
from scheduler.work import GUILTY, Job

Blame = Literal["running", "memory", "outside", "none"]


class Suspects(dict[Job, None]):
    """Those that wait, in their order. Each runs alone, so that the next death tells."""

    def __init__(self) -> None:
        super().__init__()
        self._rest_first = False  # what was handed out last was a suspect
        self._killed = 0  # workers, from outside

    def lost(self, blame: Blame) -> None:
        """A worker was lost; those that it ran are blamed next."""
        self._killed += blame == "outside"

    def blame(self, job: Job, blame: Blame) -> bool:
        """Hold a worker's death against a job that it ran, and say whether that proves it.

        A suspect that was alone has proved it; if others may have taken the memory, only the second time; if the
        worker was killed from outside, only when that meets this job time after time, and no other worker between."""
        alone = blame != "none" and job.batch is not None and job.batch.alone
        if blame == "outside":
            job.strike(self._killed)
            return alone and job.strikes >= GUILTY
        proved = alone and (blame == "running" or job.doubt)
        job.doubt |= alone
        job.deaths += blame != "none"
        return proved

    def dispatched(self, *, alone: bool) -> None:
        """Something was handed out."""
        self._rest_first = alone

    def may_go(self, roster: Roster, *, others: bool) -> bool:
        """While others wait, suspects have one worker of several; where only one lives, it takes turns."""
        if not self or not others:
            return bool(self)
        running = any(batch.alone for batch in roster.batches())
        return not running and not (self._rest_first and roster.living == 1)

"""When the rest of a long batch is better done elsewhere, and whose it is."""

from __future__ import annotations

from scheduler.backlog import Backlog
from scheduler.commands import Recall
from scheduler.roster import Roster
from scheduler.work import Batch

SPLIT = 3  # jobs of a batch from which on an idle worker is of use to it: one runs, one follows there, one elsewhere


class Recalls:
    """One worker is asked at a time. What goes on for less than `least` seconds is let be."""

    def __init__(self, least: float) -> None:
        self._least = least
        self._asked: Batch | None = None

    def next(self, roster: Roster, backlog: Backlog, now: float) -> list[Recall]:
        """What a long batch has not begun comes back when it is a P0 job's turn and nobody is free for it, or when a
        worker has nothing to do."""
        urgent = not roster.idle and backlog.urgent
        if not urgent and (backlog.count or not roster.idle):
            return []
        if self._asked is not None and self._asked in self._asked.worker.batches:
            return []
        worker = roster.next_recall()
        if worker is None or self._soon(worker.ends, now) or (urgent and self._soon(roster.next_end(), now)):
            return []
        if not urgent and sum(len(batch.jobs) for batch in worker.batches) < SPLIT:
            return []
        self._asked = worker.batches[0]
        for batch in worker.batches:
            batch.recalled = True
        return [Recall(worker.name, worker.incarnation, batch.number) for batch in worker.batches]

    def _soon(self, moment: float, now: float) -> bool:
        return now <= moment < now + self._least

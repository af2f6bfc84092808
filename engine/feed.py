"""A job's event stream: what has happened, numbered so that a reader who lost his connection can go on where he was.

An event's number is the microsecond of the job's life at which it happened (always rising): a server that was restarted
in between goes on counting without having stored anything.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Literal

from core.job import Job, Move

Kind = Literal["state", "position", "progress", "preview", "stopping"]
LEAVING = "this server stops; the job is kept and goes on when it starts again: ask for the events again then"
KEPT = 256  # events per living job; beyond it, all but the states are forgotten


@dataclass(frozen=True, slots=True)
class JobEvent:
    """One line of the stream. `number` rises within a job; it is the SSE id."""

    number: int
    kind: Kind
    data: dict[str, Any]


def state_data(move: Move) -> dict[str, Any]:
    """A state event's payload."""
    data: dict[str, Any] = {"state": move.state.value, "at": move.at}
    if move.device:
        data["device"] = move.device
    if move.why:
        data["why"] = move.why
    return data


def past_events(job: Job) -> list[JobEvent]:
    """The state events of a job, from its history alone."""
    events: list[JobEvent] = []
    number = 0
    for move in job.history:
        number = max(number + 1, int((move.at - job.created_at) * 1e6))
        events.append(JobEvent(number, "state", state_data(move)))
    return events


class Feed:
    """The stream of one living job."""

    def __init__(self, job: Job) -> None:
        self._created_at = job.created_at
        self._events: deque[JobEvent] = deque(past_events(job))
        self._closed = False
        self._changed = asyncio.Event()
        self.readers = 0

    def add(self, kind: Kind, data: dict[str, Any], at: float) -> None:
        """Append an event of unix time `at`. Of previews only the latest is kept."""
        last = self._events[-1].number if self._events else 0
        if len(self._events) >= KEPT and (old := next((e for e in self._events if e.kind != "state"), None)):
            self._events.remove(old)
        if kind == "preview" and (old := next((e for e in self._events if e.kind == "preview"), None)):
            self._events.remove(old)
        self._events.append(JobEvent(max(last + 1, int((at - self._created_at) * 1e6)), kind, data))
        self._wake()

    def close(self) -> None:
        """The job has ended; readers finish after the last event."""
        self._closed = True
        self._wake()

    def leave(self, at: float) -> None:
        """The server goes away before the job ends: that is the last event."""
        if not self._closed:
            self.add("stopping", {"why": LEAVING}, at)
            self.close()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def read(self, after: int) -> AsyncIterator[JobEvent]:
        """Events numbered above `after`, as they come, until the job has ended."""
        self.readers += 1
        try:
            while True:
                changed = self._changed
                for event in [event for event in self._events if event.number > after]:
                    after = event.number
                    yield event
                if changed.is_set():
                    continue
                if self._closed:
                    return
                await changed.wait()
        finally:
            self.readers -= 1

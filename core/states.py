"""The states of a job and the only moves between them (drawn with lettered arrows in docs/states.md)."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class State(StrEnum):
    QUEUED = "queued"        # accepted, waits for a worker
    RUNNING = "running"      # handed to a worker in a batch
    PARKED = "parked"        # preempted between steps, its state kept
    SUCCEEDED = "succeeded"  # the result is stored
    FAILED = "failed"        # ended with an error
    CANCELLED = "cancelled"  # ended because somebody asked for it
    EXPIRED = "expired"      # its deadline passed first

    @property
    def ended(self) -> bool:
        return not MOVES[self]


MOVES: Mapping[State, frozenset[State]] = {
    State.QUEUED: frozenset({State.RUNNING, State.FAILED, State.CANCELLED, State.EXPIRED}),
    State.RUNNING: frozenset(
        {State.QUEUED, State.PARKED, State.SUCCEEDED, State.FAILED, State.CANCELLED, State.EXPIRED}
    ),
    State.PARKED: frozenset({State.RUNNING, State.QUEUED, State.FAILED, State.CANCELLED, State.EXPIRED}),
    State.SUCCEEDED: frozenset(),
    State.FAILED: frozenset(),
    State.CANCELLED: frozenset(),
    State.EXPIRED: frozenset(),
}


class IllegalMove(RuntimeError):
    """A move that the table does not know. The job is left as it was."""


def check_move(old: State, new: State) -> None:
    """Raise `IllegalMove` unless `old -> new` is in the table."""
    if new not in MOVES[old]:
        raise IllegalMove(f"{old} -> {new} is no legal move (legal: {', '.join(sorted(MOVES[old])) or 'none'})")

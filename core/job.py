"""A job: a request that was admitted, with an id and a life."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from core.errors import ErrorInfo
from core.request import ImageRequest, Span
from core.states import State, check_move


def new_id() -> str:
    """A random UUID (version 4) as text; `uuid.uuid4` takes three times as long."""
    text = os.urandom(16).hex()
    return f"{text[:8]}-{text[8:12]}-4{text[13:16]}-{'89ab'[int(text[16], 16) & 3]}{text[17:20]}-{text[20:]}"


@dataclass(frozen=True, slots=True)
class Move:
    """One line of a job's history: when (unix seconds), to which state, where and why."""

    at: float
    state: State
    device: str | None = None
    why: str | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """A finished image. `data` is a `Span` of the arena (ephemeral) or a file name relative to the outputs folder.

    `timings` are seconds by stage: decode, wait (in the worker), compute, encode. `facts` is what the model tells
    beside the pixels (a seed, the recipe it read, ...).
    """

    data: Span | str
    size: int
    format: str
    width: int
    height: int
    device: str
    batch_size: int
    timings: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Job:
    """The life of one request. Only `move` writes `state`, so an illegal move raises and changes nothing.

    `created_at`, `started_at`, `ended_at` are unix seconds; `progress` goes from 0.0 to 1.0; `attempts` counts how
    often it was handed to a worker. `asked_by` is the id of the HTTP request that it was made for.
    """

    id: str
    request: ImageRequest
    created_at: float
    number: int = 0  # the how-manieth job of this server's life
    asked_by: str | None = None
    state: State = State.QUEUED
    started_at: float | None = None
    ended_at: float | None = None
    device: str | None = None
    attempts: int = 0
    progress: float = 0.0
    result: Result | None = None
    error: ErrorInfo | None = None
    history: list[Move] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.history:
            self.history.append(Move(self.created_at, State.QUEUED))

    def facts(self) -> dict[str, Any]:
        """What every line of the log about it says."""
        return {"job": self.id, "request": self.asked_by, "tenant": self.request.tenant}

    def move(self, new: State, at: float, *, device: str | None = None, why: str | None = None) -> None:
        """Go to `new`. Raises `IllegalMove` (and changes nothing) when the table does not allow it."""
        check_move(self.state, new)
        old, self.state = self.state, new
        self.history.append(Move(at, new, device, why))
        if new is State.RUNNING and old is State.QUEUED:
            self.attempts += 1
            self.device = device
            self.started_at = at
        elif new is State.QUEUED:
            self.device, self.started_at, self.progress = None, None, 0.0
        elif new.ended:
            self.ended_at = at
            if new is State.SUCCEEDED:
                self.progress = 1.0

"""A batch shows that it lives, and is ended by its own worker when it takes too long."""

from __future__ import annotations

import time

from core.errors import DeadlineExceeded
from core.model import ModelSpec
from models.checkpoint import OutOfTime
from workers.channel import WorkerEnd
from workers.messages import Alive

EVERY = 0.25  # seconds between two signs of one batch


class Pulse:
    """Called at every checkpoint of a batch that may take `seconds` from now on. Raises `OutOfTime` after that."""

    def __init__(self, channel: WorkerEnd, batch: int, seconds: float) -> None:
        self._channel, self._batch, self._seconds = channel, batch, seconds
        now = time.monotonic()
        self._next, self._until = now + EVERY, now + seconds

    def __call__(self) -> None:
        now = time.monotonic()
        if now >= self._until:
            raise OutOfTime
        if now >= self._next:
            self._next = now + EVERY
            self._channel.send(Alive(self._batch))

    def renew(self, long: bool) -> None:
        """The next part begins, and has all of the time. `long`: it may take all of it without a sign."""
        self._until = time.monotonic() + self._seconds
        if long:
            self._channel.send(Alive(self._batch, self._seconds))


def took_too_long(spec: ModelSpec) -> DeadlineExceeded:
    """What the client of such a job is told."""
    less = [f"fewer {spec.steps_param}"] if spec.steps_param else []
    less += [f"a smaller {spec.scale_param}"] if spec.scale_param else []
    return DeadlineExceeded(
        f"model '{spec.name}' was not done after the {spec.timeout:g} s that one request may take; "
        f"ask for {', '.join([*less, 'a smaller image'])}",
        timeout_seconds=spec.timeout,
    )

"""How long forwards take on the device, told without making the host wait for each."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch

from models.stepping.costs import Variety

DEPTH = 2  # forwards under way: the next one is prepared while the device computes, and no decision is made earlier


@dataclass(slots=True)
class _Flight:
    key: Hashable
    rows: int
    variety: Variety
    began: torch.cuda.Event
    ended: torch.cuda.Event


class ForwardClock:
    """Times forwards and hands each to `learn(key, rows, seconds, variety)`: at once on a CPU, on a GPU after the
    device has passed it. There it also keeps the host at most two forwards ahead."""

    def __init__(
        self, device: torch.device, learn: Callable[[Hashable, int, float, Variety], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._device, self._learn, self._clock = device, learn, clock
        self._flights: deque[_Flight] = deque()
        self._began = 0.0
        self._event: torch.cuda.Event | None = None

    def begin(self) -> None:
        """A forward starts."""
        if self._device.type != "cuda":
            self._began = self._clock()
            return
        while len(self._flights) >= DEPTH:
            self._land()
        self._event = self._mark()

    def end(self, key: Hashable, rows: int, variety: Variety = Variety.NONE) -> None:
        """It is started in full; on a CPU: it is done. One that failed is simply not ended."""
        if self._event is None:
            self._learn(key, rows, self._clock() - self._began, variety)
        else:
            self._flights.append(_Flight(key, rows, variety, self._event, self._mark()))

    def settle(self) -> None:
        """Wait until the device has done all."""
        while self._flights:
            self._land()

    def _mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _land(self) -> None:
        flight = self._flights.popleft()
        flight.ended.synchronize()
        seconds = flight.began.elapsed_time(flight.ended) / 1e3
        self._learn(flight.key, flight.rows, seconds, flight.variety)

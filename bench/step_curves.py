"""The worker's side of W4 with real processes: a model whose network sleeps published step times, and the policy that
the worker's stepper asks.

All of the worker is as it is shipped, but for its stepper: that is given a clock as quick as the network, for what the
batcher knows in seconds (ages, patience), and for a rival that one's policy instead of the batcher.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np
import torch

from bench.step_load import OURS, POLICIES, Request, seconds
from models.base import Item, Output
from models.stepping import stepper
from models.stepping.batcher import StepBatcher
from models.stepping.contract import Lane, StepAdapter, StepCall, StepRun
from models.stepping.costs import variety_of

POLICY, FASTER = "BENCH_STEP_POLICY", "BENCH_STEP_FASTER"  # environment: the policy's name; curve seconds in a real one
MOST_LATE = 0.001  # seconds by which a sleep that lasted too long shortens the next one
_Stepper = stepper.Stepper  # as it is shipped


def faster() -> float:
    return float(os.environ.get(FASTER, "1"))


class Sleeper:
    """A network that takes its time, as a GPU does: the interpreter is free meanwhile, and no time is lost to a timer
    that rings late."""

    name = "sleeper"

    def __init__(self) -> None:
        self._late = 0.0

    def forward(self, calls: Sequence[StepCall]) -> list[None]:
        variety = variety_of(call.variant for call in calls)
        took = seconds(calls[0].key, len(calls), variety)  # type: ignore[arg-type]
        due = time.perf_counter() + took / faster() - self._late
        time.sleep(max(0.0, due - time.perf_counter()))
        self._late = min(MOST_LATE, max(0.0, time.perf_counter() - due))
        return [None] * len(calls)


class Drawing:
    """A request's run: an encode, its steps, a decode. `request` is for policies that look beyond the call."""

    def __init__(self, request: Request, network: Sleeper, size: tuple[int, int]) -> None:
        self.request, self.progress = request, 0.0
        self._network, self._size = network, size
        self._run = self._draw()

    def send(self, answer: Any, /) -> StepCall:
        return self._run.send(answer)

    def throw(self, fault: BaseException, /) -> StepCall:
        return self._run.throw(fault)

    def close(self) -> None:
        self._run.close()

    def _draw(self) -> Generator[StepCall, None, Output]:
        request = self.request
        for _ in range(request.calls):
            yield StepCall(self._network, (), {}, 1, request.key(), Lane(request.lane()), request.variant())
            request.done += 1
            self.progress = max(0, min(request.done - 1, request.steps)) / request.steps
        return Output(np.full((*self._size, 3), 127, np.uint8))


class Curve(StepAdapter):
    """Requests of the option `kind`. The network is one for all kinds, as the device is."""

    network = Sleeper()

    def load(self) -> None:
        self.kind = str(self.options["kind"])
        stepper.Stepper = SteppedAs  # type: ignore[misc, assignment]

    def warm_up(self) -> None:
        """One request by a stepper of its own: the worker's learns nothing from it."""
        self.run([Item({"steps": 1, "adapters": 0}, size=(16, 16))])

    def start(self, item: Item) -> Drawing:
        steps, adapters = int(item.params["steps"]), int(item.params["adapters"])
        return Drawing(Request(0, 0.0, self.kind, steps, adapters, priority=2), self.network, item.size)

    def remaining(self, item: Item) -> float:
        return float(item.params["steps"])


class SteppedAs(_Stepper):
    """The stepper, asking the policy of that name (ours: the batcher that it was given), at the network's pace."""

    def __init__(self, device: torch.device, batcher: StepBatcher, events: stepper.StepEvents) -> None:
        name, pace = os.environ.get(POLICY, OURS), faster()
        self.requests: dict[int, Request] = {}  # by run: what rivals look up
        rival: Any = batcher if name == OURS else POLICIES[name](self.requests)  # type: ignore[arg-type]
        super().__init__(device, rival, events, clock=lambda: time.monotonic() * pace)

    def join(
        self, run_id: int, run: StepRun, *, priority: int, remaining: float, cancelled: Callable[[], bool]
    ) -> None:
        assert isinstance(run, Drawing)
        self.requests[run_id] = run.request
        super().join(run_id, run, priority=priority, remaining=remaining, cancelled=cancelled)

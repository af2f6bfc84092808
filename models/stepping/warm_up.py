"""What a model's forwards cost, measured before anybody waits: synthetic requests go through its networks, first one
alone, then two, four and eight in each forward.

They are like real ones (`trial.py`), and what is learnt of them holds for those. The costs are the batcher's own: the
first burst is at once as wide as pays.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch

from core.errors import Cancelled
from core.model import ModelSpec
from models.base import Output
from models.stepping import trial
from models.stepping.batcher import StepBatcher, Waiting
from models.stepping.contract import Lane, StepAdapter, StepRun
from models.stepping.costs import StepCosts, Variety
from models.stepping.stepper import StepEvents, Stepper

WIDTHS = 1, 2, 4, 8  # calls in one forward
TIMES = trial.STEPS  # forwards of each width: the first also pays for being the first, two more are not doubted
GAIN = 0.97  # a width that does not bring the time of a row below so much of that of the width before is the last


@dataclass(frozen=True, slots=True)
class Measured:
    """How long one forward took that carried so many calls of so many rows."""

    calls: int
    rows: int
    seconds: float


def sizes(options: Mapping[str, Any], usual: tuple[int, int], device: torch.device) -> list[tuple[int, int]]:
    """Heights and widths of the requests to warm up with: the option `warm_up`, a list of "WIDTHxHEIGHT"; without it
    the usual size on a GPU and none on a CPU. Raises `ModelFailed` for an option that says something else."""
    named = trial.named_sizes(options, "warm_up")
    return named if named is not None else [usual] if device.type == "cuda" else []


def wanted(spec: ModelSpec, device: torch.device) -> bool:
    """Whether anything is to be measured. Raises `ModelFailed` for options that cannot be read."""
    return bool(sizes(spec.options, trial.usual_size(spec), device))


# --- the measurement --------------------------------------------------------------------------------------------------


class FixedWidth:
    """A batcher that sends everybody on together, up to so many calls of one key: all encode before one denoises, so
    that all meet there. What forwards cost, and what does not fit, the real batcher is told.

    `seconds`: by key, of its last forward of the full width in the denoiser. `full`: how often each such key had one.
    `refused`: the memory was too small for the width.
    """

    def __init__(self, batcher: StepBatcher, width: int) -> None:
        self._batcher, self._width = batcher, width
        self._waiting: list[Waiting] = []
        self._sent: deque[tuple[Hashable, int]] = deque()  # forwards whose time is not known yet: key, rows that count
        self.seconds: dict[Hashable, float] = {}
        self.rows: dict[Hashable, int] = {}
        self.full: dict[Hashable, int] = {}
        self.refused = False

    @property
    def costs(self) -> StepCosts:
        """Where the stepper tells what forwards took; here it passes by."""
        return cast(StepCosts, self)

    def learn(self, key: Hashable, rows: int, seconds: float, variety: Variety = Variety.NONE) -> None:
        """A forward took so long."""
        self._batcher.costs.learn(key, rows, seconds, variety)
        sent, counted = self._sent.popleft() if self._sent else (key, 0)  # else it was tried in parts
        if counted == rows:
            self.seconds[sent] = seconds

    def add(self, waiting: Waiting) -> None:
        """A call begins to wait."""
        self._waiting.append(waiting)

    def remove(self, waiting: Waiting) -> None:
        """It waits no longer."""
        self._waiting.remove(waiting)

    def limit(self, key: Hashable, rows: int) -> None:
        """More rows did not fit the memory."""
        self.refused = True
        self._sent.clear()
        self._batcher.limit(key, rows)

    def next(self, welcome: Callable[[Waiting], bool] | None = None) -> list[Waiting]:
        """The calls of the next forward, taken out."""
        if not self._waiting:
            return []
        first = min(self._waiting, key=lambda one: one.lane)
        chosen = [one for one in self._waiting if one.key == first.key][: self._width]
        for one in chosen:
            self.remove(one)
        rows = sum(one.rows for one in chosen)
        whole = first.lane == Lane.DENOISE and len(chosen) == self._width
        self._sent.append((first.key, rows if whole else 0))
        if whole:
            self.full[first.key] = self.full.get(first.key, 0) + 1
            self.rows[first.key] = rows
        return chosen

    @property
    def enough(self) -> bool:
        """Whether every key of the denoiser has had its forwards."""
        return bool(self.full) and min(self.full.values()) >= TIMES


def measure(
    device: torch.device, batcher: StepBatcher, start: Callable[[], tuple[StepRun, float]], until: float,
    tell: Callable[[int], None] = lambda _: None, clock: Callable[[], float] = time.monotonic,
) -> list[Measured]:
    """Let the batcher's costs learn what forwards of these requests take, width by width, as long as the time of a row
    falls, the memory suffices, and `until` has not come. The first request goes its whole way, so that decoding has
    been done once, too.

    start: a new run of the request, and how many forwards it will need. tell: hears of each width before it is tried.
    What was measured of the denoiser, by width. Raises what ended the request.
    """
    found: list[Measured] = []
    for width in WIDTHS:
        if found and (found[-1].rows * 2 > batcher.most_rows or clock() + 2 * TIMES * found[-1].seconds > until):
            break
        tell(width)
        fixed = _together(device, batcher, start, width, until, clock)
        if fixed.refused or not fixed.enough or not fixed.seconds:
            break
        before = found[-1] if found else None
        found.append(Measured(width, max(fixed.rows.values()), sum(fixed.seconds.values())))
        if before and found[-1].seconds / width > GAIN * before.seconds / before.calls:
            break
    return found


def _together(
    device: torch.device, batcher: StepBatcher, start: Callable[[], tuple[StepRun, float]], width: int, until: float,
    clock: Callable[[], float],
) -> FixedWidth:
    """So many requests side by side, until enough is known; a single one to its end."""
    fixed, ends, over = FixedWidth(batcher, width), [], False

    def ended(_: int, end: Output | Exception) -> None:
        ends.append(end)

    stepper = Stepper(device, cast(StepBatcher, fixed), StepEvents(ended), clock)
    with torch.no_grad():  # the caller's own setting comes back
        for number in range(width):
            run, remaining = start()
            stepper.join(number, run, priority=2, remaining=remaining, cancelled=lambda: over)
        while stepper.busy and not fixed.refused and clock() < until and not (width > 1 and fixed.enough):
            stepper.advance()
        stepper.settle()
        over = True
        while stepper.busy:
            stepper.advance()
    if not fixed.enough:
        for end in _faults(ends):
            raise end
    return fixed


def _faults(ends: list[Output | Exception]) -> Iterator[Exception]:
    return (end for end in ends if isinstance(end, Exception) and not isinstance(end, Cancelled))


def warm_up(
    adapter: StepAdapter, spec: ModelSpec, batcher: StepBatcher, until: float,
    tell: Callable[[str], None] = lambda _: None, clock: Callable[[], float] = time.monotonic,
) -> dict[tuple[int, int], list[Measured]]:
    """Measure a loaded model's forwards at each of the sizes (height, width) that its options name. `tell` hears what
    is being done. Raises `ModelFailed` for options that cannot be read, and what ended a request."""
    found = {}
    for size in sizes(spec.options, trial.usual_size(spec), adapter.device):
        if clock() >= until:
            break

        def start(size: tuple[int, int] = size) -> tuple[StepRun, float]:
            item = trial.request(spec, size)
            return adapter.start(item), adapter.remaining(item)

        def told(width: int, size: tuple[int, int] = size) -> None:
            tell(f"measuring {spec.name} at {size[1]}x{size[0]}, {width} at once")

        found[size] = measure(adapter.device, batcher, start, until, told, clock)
    return found

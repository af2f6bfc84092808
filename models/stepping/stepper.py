"""The runs of one device: asks the batcher whose calls go next, runs them as one forward, and lets their runs go on.

Everything happens in the thread that calls `advance`, so a run never works while another does, and nothing is locked.
A run leaves when it has ended, when it fails (alone: its companions go on) and when nobody wants it any more.
"""

from __future__ import annotations

import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from core.errors import Cancelled, OutOfMemory
from models.base import Item, Output
from models.calls import lacks_memory
from models.stepping.batcher import StepBatcher, Waiting
from models.stepping.clock import ForwardClock
from models.stepping.contract import Lane, StepAdapter, StepCall, StepRun
from models.stepping.costs import StepCosts, variety_of
from models.stepping.shelter import Shelter

PARKED_AFTER = 2.0  # seconds of other runs' forwards, after which a run that has begun is said to be parked
WINDOW = 10.0  # seconds over which steps per second are counted
URGENT = 0  # the priority that preempts


def _ignore(*_: Any) -> None:
    pass


@dataclass(frozen=True, slots=True)
class StepEvents:
    """What a stepper tells. `ended(run, output or what ended it instead)`, once for each run that joined;
    `progress(run, 0.0 to 1.0)`; `parked(run, whether)`; `preview(run, uint8 height x width x 3)`."""

    ended: Callable[[int, Output | Exception], None]
    progress: Callable[[int, float], None] = _ignore
    parked: Callable[[int, bool], None] = _ignore
    preview: Callable[[int, np.ndarray], None] = _ignore


@dataclass(frozen=True, slots=True)
class StepCounters:
    """Since the start. `forwards` of denoisers and the `rows` they carried; `merged`: those of the rows that shared
    their forward with another call; `steps`: answered calls. Now: runs `resident` and those of them `parked`."""

    forwards: int
    rows: int
    merged: int
    steps: int
    preemptions: int
    steps_per_second: float
    resident: int
    parked: int

    @property
    def rows_per_forward(self) -> float:
        return self.rows / self.forwards if self.forwards else 0.0


@dataclass(eq=False, slots=True)
class _Resident:
    """A run, what it waits for, and what has become of it."""

    id: int
    run: StepRun
    priority: int
    expected: float  # denoiser forwards, as was said when it joined
    cancelled: Callable[[], bool]
    joined: float
    parked: list[_Parked] = field(default_factory=list)  # its calls without an answer
    answers: list[Any] = field(default_factory=list)
    single: bool = True  # it yielded a call, not a list
    steps: int = 0  # denoiser forwards it has had
    progress: float = 0.0
    waits_since: float = 0.0  # seconds of forwards, of all runs, when it began to wait
    said_parked: bool = False
    aboard: int = -1  # the last forward that carried it
    preempted: bool = False

    def remaining(self) -> float:
        """Denoiser forwards still to come: by what its progress has cost so far, or else as was said."""
        if self.progress > 0 and self.steps:
            return max(1.0, self.steps * (1 - self.progress) / self.progress)
        return max(1.0, self.expected - self.steps)


@dataclass(eq=False, slots=True)
class _Parked:
    """A call that waits for its forward. `answers` tells the list it belongs to: a run may have gone on without it."""

    resident: _Resident
    place: int
    call: StepCall
    waiting: Waiting
    answers: list[Any]


class Stepper:
    """Drives runs. `join` and `advance` are called by one thread, which keeps autograd off from the first `advance` on:
    a pipeline's own `no_grad` left in another order than entered would switch gradients on for the others."""

    def __init__(
        self, device: torch.device, batcher: StepBatcher, events: StepEvents,
        clock: Callable[[], float] = time.monotonic, shelter: Shelter | None = None,
    ) -> None:
        self._device, self._batcher, self._events, self._clock = device, batcher, events, clock
        self._timer = ForwardClock(device, batcher.costs.learn, clock)
        self._shelter = shelter or Shelter(device)
        self._joining: deque[_Resident] = deque()
        self._residents: dict[int, _Resident] = {}
        self._parked: dict[Waiting, _Parked] = {}
        self._forward_seconds = 0.0
        self._forwards = self._rows = self._merged = self._steps = self._preemptions = self._number = 0
        self._recent: deque[tuple[float, int]] = deque()

    @property
    def busy(self) -> bool:
        """Whether any run is here."""
        return bool(self._residents or self._joining)

    def join(
        self, run_id: int, run: StepRun, *, priority: int, remaining: float, cancelled: Callable[[], bool]
    ) -> None:
        """A new run; it starts with the next `advance`. `priority`: 0 urgent to 3 test. `remaining`: the denoiser
        forwards it will need, an estimate. `cancelled()`: whether nobody wants it any more, asked at each step."""
        if run_id in self._residents or any(one.id == run_id for one in self._joining):
            raise ValueError(f"run {run_id} is here already")
        self._joining.append(_Resident(run_id, run, priority, remaining, cancelled, self._clock()))

    def advance(self) -> None:
        """One turn: start who joined, let go of who is cancelled, one forward, on with its runs."""
        torch.set_grad_enabled(False)
        while self._joining:
            resident = self._joining.popleft()
            self._residents[resident.id] = resident
            if not self._leaves(resident):
                self._go_on(resident)
        for resident in list(self._residents.values()):
            self._leaves(resident)
        aboard = [self._take(waiting) for waiting in self._batcher.next(self._welcome)]
        if not aboard:
            return
        began = self._clock()
        answers = list(self._forward(aboard))
        self._forward_seconds += self._clock() - began
        self._count(aboard)
        for one, answer in answers:
            self._deliver(one, answer)
        self._tell_parked()

    def settle(self) -> None:
        """Wait until the device has done all that it was given, and its time is known."""
        self._timer.settle()

    def counters(self) -> StepCounters:
        """What was done so far."""
        self._forget_old_steps()
        return StepCounters(
            self._forwards, self._rows, self._merged, self._steps, self._preemptions,
            sum(steps for _, steps in self._recent) / WINDOW, len(self._residents) + len(self._joining),
            sum(one.said_parked for one in self._residents.values()),
        )

    # --- one forward ------------------------------------------------------------------------------------------------

    def _welcome(self, waiting: Waiting) -> bool:
        """Whether its network can run without driving out weights that have just come; who is urgent need not ask."""
        ask = getattr(self._parked[waiting].call.network, "welcome", None)
        return waiting.priority == URGENT or ask is None or ask()

    def _take(self, waiting: Waiting) -> _Parked:
        parked = self._parked.pop(waiting)
        parked.resident.parked.remove(parked)
        return parked

    def _forward(self, aboard: Sequence[_Parked]) -> Iterator[tuple[_Parked, Any]]:
        """Each call with its answer, or with the exception that is its own.

        What does not fit the memory is tried in halves; a call that does not fit alone, once more after the others
        have left the device. After another fault each call runs alone, so that only the guilty run gets it.
        """
        width = len(aboard)
        while aboard:
            part, answers = aboard[:width], self._try(aboard[:width])
            if isinstance(answers, Exception) and len(part) > 1:
                width = 1
                if isinstance(answers, OutOfMemory):
                    width = (len(part) + 1) // 2
                    self._batcher.limit(part[0].call.key, sum(one.call.rows for one in part[:width]))
                continue
            yield from zip(part, [answers] if isinstance(answers, Exception) else answers, strict=True)
            aboard = aboard[width:]

    def _try(self, aboard: Sequence[_Parked]) -> list[Any] | Exception:
        """The answers, or why there are none: `OutOfMemory` or whatever the network raised."""
        calls = [one.call for one in aboard]
        for _ in range(2):
            try:
                self._shelter.bring_back(calls)
                self._timer.begin()
                answers = calls[0].network.forward(calls)
                rows = sum(call.rows for call in calls)
                self._timer.end(calls[0].key, rows, variety_of(call.variant for call in calls))
                if len(answers) != len(calls):
                    raise ValueError(f"{calls[0].network.name} gave {len(answers)} answers to {len(calls)} calls")
                return answers
            except Exception as fault:
                if not lacks_memory(fault):
                    return fault
            # Past the handler: the exception would keep alive what filled the memory.
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            if len(aboard) > 1 or not self._make_room():
                break
        return OutOfMemory(
            "this image does not fit the device's memory even alone; send a smaller one, or let the model work with "
            "less: lower precision, tiled decoding, offload"
        )

    def _make_room(self) -> bool:
        """Whether anything that waits could leave the device. The host's memory, too, may be used up."""
        try:
            return self._shelter.move_out(one.call for one in self._parked.values()) > 0
        except Exception as fault:
            if not lacks_memory(fault):
                raise
            return False

    def _count(self, aboard: Sequence[_Parked]) -> None:
        if aboard[0].call.lane is not Lane.DENOISE:
            return
        rows = sum(one.call.rows for one in aboard)
        self._forwards += 1
        self._rows += rows
        self._merged += rows if len(aboard) > 1 else 0
        self._steps += len(aboard)
        self._recent.append((self._clock(), len(aboard)))
        self._forget_old_steps()
        self._count_preemptions(aboard)

    def _count_preemptions(self, aboard: Sequence[_Parked]) -> None:
        """Runs that were on their way and now wait because an urgent one has taken the forward."""
        self._number += 1
        urgent = any(one.resident.priority == URGENT for one in aboard)
        for one in aboard:
            one.resident.aboard, one.resident.preempted = self._number, False
        for resident in self._residents.values() if urgent else ():
            passed_over = resident.aboard == self._number - 1 and resident.parked and resident.priority > URGENT
            if passed_over and not resident.preempted:
                resident.preempted = True
                self._preemptions += 1

    def _forget_old_steps(self) -> None:
        horizon = self._clock() - WINDOW
        while self._recent and self._recent[0][0] < horizon:
            self._recent.popleft()

    # --- runs -------------------------------------------------------------------------------------------------------

    def _deliver(self, one: _Parked, answer: Any) -> None:
        """Hand a call its answer; with the last one that it waited for, its run goes on."""
        resident = one.resident
        if resident.answers is not one.answers:
            return
        if one.call.lane is Lane.DENOISE:
            resident.steps += 1
        if resident.said_parked:
            resident.said_parked = False
            self._events.parked(resident.id, False)
        if isinstance(answer, Exception):
            self._withdraw(resident)
            self._go_on(resident, fault=answer)
            return
        one.answers[one.place] = answer
        if not resident.parked and not any(value is _NONE_YET for value in one.answers):
            self._go_on(resident, one.answers[0] if resident.single else one.answers)

    def _go_on(self, resident: _Resident, answers: Any = None, fault: Exception | None = None) -> None:
        try:
            asked = resident.run.throw(fault) if fault else resident.run.send(answers)
            while asked == []:
                asked = resident.run.send([])
            if not all(isinstance(call, StepCall) for call in (asked if isinstance(asked, list) else [asked])):
                raise TypeError(f"a run asked for {asked!r:.80} instead of forwards")
        except StopIteration as end:
            output = end.value if isinstance(end.value, Output) else TypeError("the run ended without an output")
            self._end(resident, output)
        except Exception as error:
            self._end(resident, error)
        else:
            self._tell_progress(resident)
            self._park(resident, asked)

    def _park(self, resident: _Resident, asked: StepCall | list[StepCall]) -> None:
        resident.single = isinstance(asked, StepCall)
        calls = [asked] if isinstance(asked, StepCall) else asked
        resident.answers = [_NONE_YET] * len(calls)
        resident.waits_since = self._forward_seconds
        remaining = resident.remaining()
        for place, call in enumerate(calls):
            waiting = Waiting(
                resident.id, call.key, call.rows, int(call.lane), resident.priority, remaining, resident.joined,
                call.variant,
            )
            parked = self._parked[waiting] = _Parked(resident, place, call, waiting, resident.answers)
            resident.parked.append(parked)
            self._batcher.add(waiting)

    def _tell_progress(self, resident: _Resident) -> None:
        """Where a run shows how far it is, as `PipelineRun` does."""
        progress = getattr(resident.run, "progress", 0.0)
        if progress > resident.progress:
            resident.progress = progress
            self._events.progress(resident.id, progress)
        preview = getattr(resident.run, "preview", None)
        if preview is not None:
            resident.run.preview = None  # type: ignore[attr-defined]
            self._events.preview(resident.id, preview)

    def _tell_parked(self) -> None:
        for resident in self._residents.values():
            waited = self._forward_seconds - resident.waits_since
            if waited >= PARKED_AFTER and resident.steps and resident.parked and not resident.said_parked:
                resident.said_parked = True
                self._events.parked(resident.id, True)

    def _leaves(self, resident: _Resident) -> bool:
        """Whether it is cancelled, and so has ended here, without another forward."""
        if not resident.cancelled():
            return False
        self._withdraw(resident)
        try:
            resident.run.close()
        except Exception:  # it failed on its way out; nobody wants to know but who looks after the model
            traceback.print_exc()
        self._end(resident, Cancelled("the job was cancelled while it ran"))
        return True

    def _withdraw(self, resident: _Resident) -> None:
        for parked in resident.parked:
            self._batcher.remove(parked.waiting)
            del self._parked[parked.waiting]
        resident.parked.clear()
        resident.answers = []

    def _end(self, resident: _Resident, end: Output | Exception) -> None:
        del self._residents[resident.id]
        self._events.ended(resident.id, end)


_NONE_YET = object()


def run_all(adapter: StepAdapter, items: Sequence[Item]) -> list[Output | Exception]:
    """All items by a stepper of their own; in their order the outputs, or what ended a run instead."""
    ends: dict[int, Output | Exception] = {}
    events = StepEvents(ends.__setitem__, lambda number, fraction: items[number].report(fraction))
    stepper = Stepper(adapter.device, StepBatcher(StepCosts()), events)
    with torch.no_grad():  # the caller's own setting comes back
        for number, item in enumerate(items):
            stepper.join(
                number, adapter.start(item), priority=2, remaining=adapter.remaining(item), cancelled=item.cancelled
            )
        while stepper.busy:
            stepper.advance()
    return [ends[number] for number in range(len(items))]

"""The stepped jobs of a worker: decoded by codec threads like others, then run side by side, forward by forward.

The device loop calls `join` and `advance`; between two steps it takes messages and, at most, runs one ordinary batch.
After a batch that took longer than a step, steps go on for as long: both have half of the device, whichever is longer.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import torch

from core.errors import ErrorInfo
from core.model import ModelSpec
from models.base import Adapter, Output
from models.stepping.contract import StepAdapter
from workers.channel import WorkerEnd
from workers.codecs import encode
from workers.messages import JobParked, JobPreview, JobProgress, RunItem, StepReport, Stuck

if TYPE_CHECKING:
    from models.stepping.batcher import StepBatcher
    from models.stepping.stepper import Stepper
    from workers.session import Decoded, Prepared

PROGRESS_EVERY = 0.1  # seconds between two progress messages of one job
PREVIEW_EVERY = 1.0  # the same of previews
REPORT_EVERY = 0.5  # the same of the report that the steps go on
LONGEST_TURN = 5.0  # seconds of steps for which a batch waits after another, at most
PREVIEW_SIDE, PREVIEW_QUALITY = 512, 75
Done = TypeVar("Done")


class Host(Protocol):
    """What the session does for its stepped jobs as for all others."""

    def adapter(self, spec: ModelSpec, batch: int) -> Adapter:
        """The loaded model, for a batch."""

    def decoded(self, prepared: Prepared) -> Decoded:
        """The one job of the batch, decoded. Raises what its decoding raised, and `Cancelled`."""

    def told(self, fault: Exception, job: str, spec: ModelSpec) -> ErrorInfo:
        """The fault as clients are told it. Does not return when it broke the device."""

    def finish(
        self, prepared: Prepared, decoded: Decoded | None, output: Output | ErrorInfo, timings: dict[str, float]
    ) -> None:
        """Encode and answer, in a codec thread."""


@dataclass(slots=True)
class Seated:
    """A job that steps. `began`: when it joined; `told`, `shown`: its last progress message and preview."""

    prepared: Prepared
    item: RunItem
    spec: ModelSpec
    decoded: Decoded
    began: float
    told: float = 0.0
    shown: float = 0.0


class Steps:
    """`holding`: batches that have come and not been finished yet, those still being decoded among them."""

    def __init__(self, device: torch.device, host: Host, channel: WorkerEnd, codecs: Executor) -> None:
        self._device, self._host, self._channel, self._codecs = device, host, channel, codecs
        self._seated: dict[int, Seated] = {}
        self._batcher: StepBatcher | None = None  # made when first needed: it brings libraries that few workers need
        self._stepper: Stepper | None = None  # likewise
        self._reported = self._owed = 0.0
        self._in_codecs: set[tuple[int, float]] = set()  # batches that codec threads are busy with, and until when
        self.holding: set[int] = set()

    @property
    def busy(self) -> bool:
        """Whether there is a step to make."""
        return self._stepper is not None and self._stepper.busy

    @property
    def first(self) -> bool:
        """Whether steps go before the next batch."""
        return self.busy and self._owed > 0

    def waited(self, seconds: float) -> None:
        """For a batch, that long."""
        self._owed = min(seconds, LONGEST_TURN)

    def join(self, prepared: Prepared, spec: ModelSpec) -> None:
        """A job that is decoded sits down."""
        batch, (item,) = prepared.batch.batch, prepared.batch.items
        decoded = None
        try:
            decoded = self._host.decoded(prepared)
            adapter = self._host.adapter(spec, batch)
            if not isinstance(adapter, StepAdapter):
                raise TypeError(f"model '{spec.name}' is said to be stepped, but its adapter is not")
            run, remaining = adapter.start(decoded.item), adapter.remaining(decoded.item)
        except Exception as fault:
            self.holding.discard(batch)
            self._host.finish(prepared, decoded, self._host.told(fault, item.job, spec), {})
            return
        self._seated[batch] = Seated(prepared, item, spec, decoded, time.perf_counter())
        self._stepper = self._stepper or self._new_stepper()
        self._stepper.join(
            batch, run, priority=item.priority, remaining=remaining, cancelled=decoded.item.cancelled
        )

    def advance(self) -> None:
        """One step, if there is one to make."""
        if self._stepper is None or not self._stepper.busy:
            return
        began = time.monotonic()
        self._stepper.advance()
        now = time.monotonic()
        self._owed -= now - began
        if now - self._reported >= REPORT_EVERY or not self._stepper.busy:
            self._reported = now
            self._tell_stuck(now)
            told = self._stepper.counters()
            self._channel.send(StepReport(
                told.forwards, told.rows, told.preemptions, told.steps_per_second, told.resident - told.parked,
                told.parked,
            ))

    def _new_stepper(self) -> Stepper:
        from models.stepping.stepper import StepEvents, Stepper

        events = StepEvents(self._ended, self._progress, self._parked, self._preview)
        return Stepper(self._device, self._the_batcher(), events)

    def _the_batcher(self) -> StepBatcher:
        """The one of this device; what it has learnt of costs holds for all its models."""
        if self._batcher is None:
            from models.stepping.batcher import StepBatcher
            from models.stepping.costs import StepCosts

            self._batcher = StepBatcher(StepCosts())
        return self._batcher

    # --- models that come and go ------------------------------------------------------------------------------------

    def measure(self, adapter: Adapter, spec: ModelSpec, until: float, tell: Callable[[str], None]) -> None:
        """Learn what a loaded model's forwards cost, until that moment (monotonic seconds) at the longest; `tell` hears
        what is being done. A request that fails at it is told to the log: real ones may do better. Raises `ModelFailed`
        for an option that cannot be read."""
        from models.stepping import warm_up

        if not isinstance(adapter, StepAdapter) or not warm_up.wanted(spec, self._device):
            return
        try:
            warm_up.warm_up(adapter, spec, self._the_batcher(), until, tell)
        except Exception as fault:
            print(f"model '{spec.name}' could not be warmed up:", file=sys.stderr)
            traceback.print_exception(fault)

    def uses(self, model: str) -> bool:
        """Whether a job of that model is here."""
        return any(seated.spec.name == model for seated in self._seated.values())

    def forget(self, adapter: Adapter) -> None:
        """Nothing is kept of a model's networks."""
        if isinstance(adapter, StepAdapter) and self._batcher is not None:
            if self._stepper is not None:
                self._stepper.settle()
            self._batcher.forget(adapter.owns)

    # --- codec threads ----------------------------------------------------------------------------------------------

    def watched(self, batch: int, limit: float, work: Callable[..., Done], *args: Any) -> Done:
        """Do a codec thread's work for a job; the master hears if it takes longer than `limit` seconds."""
        entry = batch, time.monotonic() + limit
        self._in_codecs.add(entry)
        try:
            return work(*args)
        finally:
            self._in_codecs.discard(entry)

    def _tell_stuck(self, now: float) -> None:
        for entry in self._in_codecs.copy():
            batch, until = entry
            if now > until and entry in self._in_codecs:  # threads end while this one looks
                self._in_codecs.discard(entry)
                self._channel.send(Stuck(batch))

    # --- what the stepper tells; the number of a run is that of its batch -------------------------------------------

    def _ended(self, batch: int, output: Output | Exception) -> None:
        seated = self._seated.pop(batch)
        prepared, decoded = seated.prepared, seated.decoded
        prepared.seconds = time.perf_counter() - seated.began
        timings = {
            "decode": decoded.seconds,
            "wait": max(0.0, seated.began - prepared.arrived - decoded.seconds),
            "compute": prepared.seconds,
        }
        if isinstance(output, Exception):
            answer: Output | ErrorInfo = self._host.told(output, seated.item.job, seated.spec)
        else:
            answer = output
        self.holding.discard(batch)
        self._host.finish(prepared, decoded, answer, timings)

    def _progress(self, batch: int, fraction: float) -> None:
        seated, now = self._seated[batch], time.monotonic()
        if now - seated.told >= PROGRESS_EVERY:
            seated.told = now
            self._channel.send(JobProgress(seated.item.job, min(max(fraction, 0.0), 1.0)))

    def _parked(self, batch: int, parked: bool) -> None:
        self._channel.send(JobParked(self._seated[batch].item.job, parked))

    def _preview(self, batch: int, image: np.ndarray) -> None:
        seated, now = self._seated[batch], time.monotonic()
        if seated.item.previews and now - seated.shown >= PREVIEW_EVERY:
            seated.shown = now
            job = seated.item.job
            self._codecs.submit(lambda: self._channel.send(JobPreview(job, small_jpeg(image))))


def small_jpeg(image: np.ndarray) -> bytes:
    """A picture (uint8 height x width x 3) as a JPEG of at most 512 pixels a side; coarse, for a glance."""
    every = -(-max(image.shape[:2]) // PREVIEW_SIDE)
    return bytes(encode(np.ascontiguousarray(image[::every, ::every]), "jpeg", quality=PREVIEW_QUALITY))

"""What the pool tells: results, progress, deaths; where each goes."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Mapping
from typing import Literal, TypeVar

import structlog

from core.states import State
from engine.departures import Departures
from engine.endings import Endings
from engine.flights import Flights, Key
from engine.live import Live
from engine.metrics import Metrics
from engine.register import Register
from engine.steps import StepBook
from scheduler import events
from scheduler.events import BatchEnded, BatchOutOfMemory, Event, ItemEnded, Parked, Stepped, WorkerLost, WorkerReady
from workers.arena import Arena
from workers.contract import PoolEvent, Said, WorkerDown, WorkerUp
from workers.messages import (
    Alive,
    BatchDidNotFit,
    BatchDone,
    Finished,
    FromWorker,
    ItemsDone,
    JobParked,
    JobPreview,
    JobProgress,
    Loading,
    StepReport,
    Stuck,
)

log = structlog.get_logger("engine")
Told = TypeVar("Told")

BLAME: Mapping[str, Literal["outside", "memory", "none"]] = {"stopped": "none", "killed": "outside", "memory": "memory"}


class Arrivals:
    """`tell(event)` tells the scheduler. `up`: ready workers and their incarnation."""

    def __init__(
        self,
        register: Register,
        flights: Flights,
        departures: Departures,
        endings: Endings,
        arena: Arena,
        metrics: Metrics,
        tell: Callable[[Event], None],
    ) -> None:
        self._register, self._flights, self._departures, self._endings = register, flights, departures, endings
        self._arena, self._metrics, self._tell = arena, metrics, tell
        self.up: dict[str, int] = {}
        self._refused: dict[str, Mapping[str, str]] = {}
        self.steps = StepBook()

    def take_in(self, event: PoolEvent) -> None:
        """Whatever the pool has to tell."""
        match event:
            case Said(worker, incarnation, message):
                self._hear(worker, incarnation, message)
            case WorkerUp(worker, incarnation, refused):
                self.up[worker], self._refused[worker] = incarnation, refused
                self._tell(WorkerReady(worker, incarnation))
            case WorkerDown(worker, incarnation, cause, kind):
                self.up.pop(worker, None)
                self._refused.pop(worker, None)
                self.steps.lost(worker)
                self._departures.forget(worker, incarnation)
                self._flights.crash(worker, incarnation)
                if kind != "stopped":
                    self._metrics.restart(worker, kind)
                self._tell(WorkerLost(worker, incarnation, cause, BLAME.get(kind, "running")))

    def refusal(self, model: str) -> str | None:
        """Why no ready worker has a model; None when one has, or no worker is ready."""
        why = None
        for refused in self._refused.values():
            why = refused.get(model)
            if why is None:
                return None
        return why

    def _hear(self, worker: str, incarnation: int, message: FromWorker) -> None:
        match message:
            case ItemsDone(batch, items):
                for finished in items:
                    self._item_done((worker, incarnation, batch), finished)
            case BatchDone(batch, seconds, returned):
                self._flights.land((worker, incarnation, batch))
                self._tell(BatchEnded(worker, incarnation, batch, seconds, returned))
            case BatchDidNotFit(batch, text):
                self._flights.land((worker, incarnation, batch))
                self._tell(BatchOutOfMemory(worker, incarnation, batch, text))
            case Loading(batch, _, done):
                self._tell(events.Loading(worker, incarnation, batch, done))
            case Alive(batch, patience):
                self._tell(events.Alive(worker, incarnation, batch, patience))
            case Stuck(batch):
                self._tell(events.Stuck(worker, incarnation, batch))
            case JobProgress(job, fraction):
                self._progress(job, fraction)
            case JobPreview(job, jpeg):
                self._preview(job, jpeg)
            case JobParked(job, parked):
                self._parked(worker, job, parked)
                self._tell(Parked(worker, incarnation, job, parked))
            case StepReport():
                self.steps.heard(worker, message)
                self._tell(Stepped(worker, incarnation))

    def _item_done(self, key: Key, finished: Finished) -> None:
        answered = self._flights.answered(key, finished.job)
        if answered is None:
            return
        live, span = answered
        self._tell(ItemEnded(*key, finished.job, finished.error))
        if live.concluding or finished.error is not None:
            self._arena.give(span)
            if finished.error is not None:
                self._endings.without_result(live, State.FAILED, finished.error)
        else:
            self._go_on(live)
            self._endings.succeed(live, key[0], span, finished)

    def _progress(self, job: str, fraction: float) -> None:
        live = self._register.live.get(job)
        if live is None or live.job.state is not State.RUNNING:
            return
        live.job.progress = max(live.job.progress, fraction)
        if live.heard:
            _tell_waiter(live, live.heard, live.job.progress)
        if live.feed:
            live.feed.add("progress", {"progress": round(live.job.progress, 4)}, time.time())

    def _preview(self, job: str, jpeg: bytes) -> None:
        live = self._register.live.get(job)
        if live is None or live.concluding or not live.job.request.previews:
            return
        if live.seen:
            _tell_waiter(live, live.seen, jpeg)
        text = base64.b64encode(jpeg).decode()
        live.event_feed().add("preview", {"jpeg": text, "progress": round(live.job.progress, 4)}, time.time())

    def _parked(self, worker: str, job: str, parked: bool) -> None:
        live = self._register.live.get(job)
        if live is None or live.concluding or live.job.device != worker:
            return
        if not parked:
            self._go_on(live)
        elif live.job.state is State.RUNNING:
            self._register.move(live, State.PARKED, time.time(), device=worker, why="other jobs go first")

    def _go_on(self, live: Live) -> None:
        """A parked job runs again."""
        if live.job.state is State.PARKED:
            self._register.move(live, State.RUNNING, time.time(), device=live.job.device)


def _tell_waiter(live: Live, told: Callable[[Told], None], what: Told) -> None:
    """Whoever waits hears of his job on the way. What he makes of it must not harm the job, or what else has come."""
    try:
        told(what)
    except Exception:
        log.exception("a waiter of a job failed to hear of it", **live.job.facts(), dialect=live.job.request.dialect)

"""How a job ends: once, and, when it is durable, on disk before anybody hears of it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import structlog

from core.errors import Cancelled, ErrorInfo, InternalError
from core.job import Result
from core.request import Span
from core.states import State
from engine.flights import Flights
from engine.keeper import Keeper
from engine.live import Live, timings
from engine.metrics import Metrics
from engine.register import Register
from workers.arena import Arena
from workers.messages import Finished

DEFECT = InternalError("the result could not be kept because of a defect of the server; its log has the details").info()
TOO_LATE = Cancelled("nobody wanted the result any more before the server's disk had room for it").info()

log = structlog.get_logger("job")
stdlib = logging.getLogger("job")


class Endings:
    """`background(coroutine)` runs what has to wait for the disk."""

    def __init__(
        self,
        register: Register,
        flights: Flights,
        keeper: Keeper,
        arena: Arena,
        metrics: Metrics,
        background: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        self._register, self._flights, self._keeper = register, flights, keeper
        self._arena, self._metrics, self._background = arena, metrics, background

    def succeed(self, live: Live, worker: str, span: Span, finished: Finished) -> None:
        """The worker has written the result into `span`, which is ours now."""
        result = Result(
            span, finished.size, finished.format, finished.width, finished.height, worker, live.batch_size,
            timings(finished.timings), finished.facts,
        )  # fmt: skip
        written = Span(span.offset, finished.size, span.capacity)
        if live.job.request.durable:
            live.concluding = True
            self._background(self._store_success(live, result, span, self._arena.view(written)))
        else:
            live.result = written
            self._end(live, State.SUCCEEDED, time.time(), result, None)

    def without_result(self, live: Live, state: State, error: ErrorInfo) -> None:
        """Failed, cancelled or expired. A job whose end is decided already keeps that end."""
        if live.concluding:
            return
        live.concluding = True
        if live.job.request.durable:
            self._background(self._store_end(live, state, None, error))
        else:
            self._end(live, state, time.time(), None, error)

    async def _store_success(self, live: Live, result: Result, span: Span, data: memoryview) -> None:
        name, failed = None, False
        try:
            name = await self._keeper.store_result(live.job.id, result.format, data, lambda: _unwanted(live) is None)
        except Exception:
            failed = True
            log.exception("a result cannot be kept", **live.job.facts())
        finally:
            data.release()
            self._arena.give(span)
        if failed:
            await self._store_end(live, State.FAILED, None, DEFECT)
        elif name is None:
            await self._store_end(live, _unwanted(live) or State.CANCELLED, None, TOO_LATE)
        else:
            await self._store_end(live, State.SUCCEEDED, replace(result, data=name), None)

    async def _store_end(self, live: Live, state: State, result: Result | None, error: ErrorInfo | None) -> None:
        """Write the end, then let it be seen: whoever hears of it will find it after a crash, too."""
        job, at = live.job, time.time()
        ended = replace(job, history=list(job.history), result=result, error=error)
        ended.move(state, at, device=job.device, why=error.message if error else None)
        try:
            await self._keeper.save(ended)
        except Exception:  # no disk that refuses (that is waited out), but a defect: it must not leave the job running
            log.exception("the end of a job cannot be stored", **job.facts(), state=state.value)
            if result is not None:
                await self._store_end(live, State.FAILED, None, DEFECT)
                return
        self._end(live, state, at, result, error)

    def _end(self, live: Live, state: State, at: float, result: Result | None, error: ErrorInfo | None) -> None:
        live.concluding = True
        job = live.job
        job.result, job.error = result, error
        self._keeper.promises.settle(job.id, result.size if result else None)
        self._register.move(live, state, at, device=job.device, why=error.message if error else None)
        live.grant.release()
        self._flights.ended(live)
        asyncio.get_running_loop().call_soon(self._note, live)  # after whoever waits has answered its client

    def _note(self, live: Live) -> None:
        self._metrics.job_ended(live.job)
        _log_end(live)


def _unwanted(live: Live) -> State | None:
    """How a job ends whose result cannot be stored and that nobody wants any more; None while somebody does."""
    deadline = live.ticket.deadline
    if deadline is not None and asyncio.get_running_loop().time() > deadline:
        return State.EXPIRED
    return State.CANCELLED if live.cancelled else None


def _log_end(live: Live) -> None:
    """One line per job: at info when it is durable, at debug when it is one of many that nobody will ask for again."""
    job = live.job
    quiet = not job.request.durable and job.error is None
    if quiet and not stdlib.isEnabledFor(logging.DEBUG):  # spares the hot path a line that is made and thrown away
        return
    tell = log.debug if quiet else log.info
    group = live.ticket.group
    tell(
        "job ended",
        **job.facts(),
        state=job.state.value,
        model=group.model,
        resolution=f"{group.width}x{group.height}",
        device=job.device,
        dialect=job.request.dialect,
        attempts=job.attempts,
        seconds=round((job.ended_at or 0.0) - job.created_at, 4),
        **({"code": job.error.code} if job.error is not None else {}),
    )

"""How the server goes away, in stages that each end in time.

announced   readiness says no, everything is served: whoever balances loads looks elsewhere (`drain_delay`)
draining    nothing is admitted or handed out any more; what runs may finish (`shutdown_grace`)
grace over  ephemeral jobs that still run end with an error that says so; event streams end
stopping    workers go, results and last callbacks are written: at most `AFTER_GRACE` seconds in all
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from core.errors import Draining, ImagePoolError, WorkerLost
from core.states import State
from engine.keeper import Keeper
from engine.live import Live
from scheduler.events import Cancelled, Drain

if TYPE_CHECKING:
    from engine.engine import Engine

# Seconds after the end of the grace, each counted from there.
ANSWERS = 1.0       # until then clients may take the answers that they were given
WORKERS = 2.0       # until then workers may go by themselves
STORED = 3.5        # until then results that are there may be written
LAST_WORDS = 5.0    # until then clients are told of the last ends
AFTER_GRACE = 6.0   # then the process is gone
REAPING = 0.5       # seconds for killed processes to be gone


class Shutdown:
    """`tasks` are all that run in the background, `followers` those of them that tell somebody of an end."""

    def __init__(
        self, engine: Engine, keeper: Keeper, tasks: set[asyncio.Task[Any]], followers: set[asyncio.Task[Any]]
    ) -> None:
        self._engine, self._keeper, self._tasks, self._followers = engine, keeper, tasks, followers
        self.announced = self.draining = self.hurried = False
        self._began = self._end = 0.0  # of the grace, on the loop's clock

    def announce(self) -> None:
        """Readiness says no from now on; nothing else changes."""
        self.announced = True

    def drain(self) -> None:
        """Dispatch nothing more and admit nothing more. Whoever waits for a job that waits hears so at once."""
        if self.draining:
            return
        loop, engine = asyncio.get_running_loop(), self._engine
        self.announced = self.draining = True
        self._began = loop.time()
        self._end = self._began + engine.settings.shutdown_grace
        self._timer = loop.call_at(self._end, self.end_grace)
        engine.leaving.set_result(None)
        engine.tell(Drain())
        for live in list(engine.register.live.values()):
            if live.job.state is State.QUEUED:
                self.leave_waiting(live)

    def leave_waiting(self, live: Live) -> None:
        """This server will not run it any more. A durable job waits for the next start; an ephemeral one ends."""
        if not live.job.request.durable:
            self.send_away(live, draining_error())
        elif live.feed:
            live.feed.leave(time.time())

    def end_grace(self) -> None:
        """What still runs is interrupted, and clients hear of it. A durable job runs again at the next start."""
        for live in list(self._engine.register.live.values()):
            if not live.job.request.durable:
                self.send_away(live, WorkerLost(
                    "the server was stopped before this was done; send the request again", retry_after=10.0
                ))
            elif live.feed and not live.concluding:
                live.feed.leave(time.time())

    def hurry(self) -> None:
        """Asked twice to stop: do not wait for what runs."""
        self.drain()
        self.hurried = True
        self._end = min(self._end, asyncio.get_running_loop().time())
        self.end_grace()

    async def stop(self, grace: float) -> None:
        """Drain, wait for the grace to end or for nothing to run, and stop everything. `grace` in seconds, counted
        from the begin of the drain."""
        self.drain()
        if not self.hurried:
            self._end = self._began + grace
        engine = self._engine
        while engine.flights and self._left():  # noqa: ASYNC110
            await asyncio.sleep(0.05)  # a poll is enough on the way out
        self.end_grace()
        await engine.pool.stop(0.0 if self.hurried else self._left(WORKERS))
        storing = [live.done for live in engine.register.live.values() if live.concluding]
        while not all(done.done() for done in storing) and self._left(STORED) and not self.hurried:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        while self._followers and self._left(LAST_WORDS) and not self.hurried:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=REAPING)
        self._timer.cancel()
        with suppress(ImagePoolError):
            await self._keeper.count(engine.register.unstored)
        await self._keeper.close()

    def _left(self, stage: float = 0.0) -> float:
        """Seconds until that stage is over, counted from the end of the grace."""
        return max(0.0, self._end + stage - asyncio.get_running_loop().time())

    def send_away(self, live: Live, error: ImagePoolError) -> None:
        """An ephemeral job ends with that error."""
        live.job.error = replace(error.info(), details={"retry_after": error.retry_after})
        self._engine.tell(Cancelled(live.job.id))


def draining_error() -> Draining:
    """Why nothing is admitted any more."""
    return Draining(
        "the server is shutting down; send the request again, to another server or in a minute", retry_after=10.0
    )

"""The one place that knows scheduler, pool and store. A request goes down through it once, its result comes up once.

The scheduler decides (`tell` is the only place that talks to it), this class performs: it moves jobs from state to
state, hands batches to the pool, gives memory back, and lets those hear who wait. All of it happens on one event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any

import structlog

from core.errors import (
    InvalidParameter,
    ModelFailed,
    Overloaded,
    StorageFailed,
    StorageFull,
    TooLarge,
    UnknownModel,
    from_info,
)
from core.job import Job, new_id
from core.model import Catalogue, ModelSpec
from core.request import ImageRequest, Span
from core.settings import Settings
from core.signing import Signer
from core.states import State
from core.ticket import Ticket
from core.trace import CURRENT, caller
from core.turns import copied
from engine import disk, roll, snapshot, stranded, watch
from engine.arrivals import Arrivals
from engine.departures import Departures
from engine.endings import Endings
from engine.feed import JobEvent, past_events
from engine.flights import Flights
from engine.intake import Intake
from engine.keeper import Keeper, resumed
from engine.landing import Landing, images_into_arena
from engine.live import Live, pixels
from engine.metrics import Metrics
from engine.permit import Permit
from engine.register import Register
from engine.results import Loan, ResultBody, stored_result
from engine.shutdown import Shutdown, draining_error
from engine.thumbnails import Thumbnails
from scheduler.admission import Admission, Grant
from scheduler.commands import Command, Dispatch, Finish, Recall, Requeue, Restart, Revoke
from scheduler.events import Cancelled, Event, Submitted, Tick
from scheduler.scheduler import Scheduler
from store.loras import StoredLoras
from store.saved import SavedImages
from workers.arena import Arena
from workers.contract import WorkerPool
from workers.messages import Drop, GiveBack
from workers.monitor import Monitor, Reading

log = structlog.get_logger("engine")
CANCELLED_WITHIN = 5.0  # seconds that a cancel waits for the disk


class Engine:
    def __init__(
        self,
        settings: Settings,
        catalogue: Catalogue,
        scheduler: Scheduler,
        admission: Admission,
        pool: WorkerPool,
        arena: Arena,
        keeper: Keeper,
        metrics: Metrics,
        monitor: Monitor | None = None,
        saved: SavedImages | None = None,
        loras: StoredLoras | None = None,
        signer: Signer | None = None,
    ) -> None:
        self.settings, self.catalogue, self.metrics = settings, catalogue, metrics
        self.saved, self.loras, self.signer = saved, loras, signer
        self.scheduler, self.admission, self.pool, self.arena = scheduler, admission, pool, arena
        self.readings: dict[str, Reading] = {}
        self.storage = disk.Storage()
        self.started_at = time.monotonic()
        self._rolling = False
        self.intake = Intake(settings.body_bytes, address_share=settings.address_share,
                             tenant_share=settings.tenant_share, refused=metrics.refused)
        self.register = Register(keeper.jobs)
        self.flights = Flights(arena)
        self.watched: Counter[str] = Counter()  # jobs by open event streams
        self._keeper, self._monitor = keeper, monitor
        self._endings = Endings(self.register, self.flights, keeper, arena, metrics, self._background)
        patience = min(10.0, settings.hang_floor / 2)
        self._departures = Departures(
            self.register, self.flights, self._endings, arena, pool, metrics, self.tell, patience
        )
        self._arrivals = Arrivals(
            self.register, self.flights, self._departures, self._endings, arena, metrics, self.tell
        )
        self.thumbnails = Thumbnails(keeper)
        self.up = self._arrivals.up  # ready workers and their incarnation
        self.steps, self.refusal = self._arrivals.steps, self._arrivals.refusal
        self._events: deque[Event] = deque()
        self._telling = self._setting_timer = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at: float | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._followers: set[asyncio.Task[Any]] = set()  # of these, those that tell somebody of an end
        self._shutdown = Shutdown(self, keeper, self._tasks, self._followers)
        self.send_away = self._shutdown.send_away

    def __repr__(self) -> str:
        return f"<Engine {len(self.register.live)} jobs, {len(self.flights)} batches at workers, {self.scheduler!r}>"

    # --- life -------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Take up the jobs of a former life and begin to start workers; returns before any worker is ready."""
        self._loop = asyncio.get_running_loop()
        self.leaving = self._loop.create_future()  # resolved when the server begins to go away
        await self.register.load()
        recovered = await self._keeper.recover()
        for job in recovered:
            self._resume(job)
        if recovered:
            log.info("jobs of the former run taken up", count=len(recovered))
        await self.pool.start(stranded.hearing(self, self._arrivals.take_in))
        self._background(watch.old_jobs(self))
        self._background(disk.watch(self, self._keeper))
        self._background(watch.positions(self))
        if self._monitor:
            self._background(watch.devices(self, self._monitor))

    async def stop(self, grace: float | None = None) -> None:
        """Take no new jobs, let running batches finish, keep queued durable jobs for the next start, stop workers."""
        await self._shutdown.stop(self.settings.shutdown_grace if grace is None else grace)
        if self._timer:
            self._timer.cancel()
        self.arena.close()

    def announce(self) -> None:
        """Readiness says no from now on, while everything is served: the end is near."""
        self._shutdown.announce()

    def drain(self) -> None:
        """Dispatch nothing more and admit nothing more. Whoever waits for a job that waits hears so at once."""
        self._shutdown.drain()

    def hurry(self) -> None:
        """Asked twice to stop: do not wait for what runs. Durable jobs run again at the next start."""
        self._shutdown.hurry()

    @property
    def draining(self) -> bool:
        """Whether nothing is admitted any more."""
        return self._shutdown.draining

    @property
    def announced(self) -> bool:
        """Whether the end of this server was announced."""
        return self._shutdown.announced

    def roll(self) -> None:
        """Replace every worker by a fresh one, one after the other, without refusing or losing anything. Those that
        were given up are tried again."""
        self.pool.revive()
        if not self._rolling:
            self._rolling = True
            self._background(self._roll())

    async def _roll(self) -> None:
        try:
            await roll.replace_workers(self)
        finally:
            self._rolling = False

    # --- what dialects ask ------------------------------------------------------------------------------------------

    def ask(self, size: int, tenant: str = "anonymous", *, urgent: bool = False) -> None:
        """Whether a job of `size` bytes would be admitted now; nothing is reserved. For before a body is read: raises
        as `admit`. `urgent`: it is, or may turn out to be, of P0, which has some room more."""
        self._check_serving()
        try:
            self.admission.ask(size, tenant=tenant, caller=caller(), urgent=urgent)
        except Overloaded:
            self.metrics.refused("overloaded")
            raise

    def land(self, most: int) -> Landing:
        """Room for a body of at most `most` bytes, to be received in shared memory. Raises StorageFull."""
        return Landing(self.arena, most)

    def admit(self, size: int, tenant: str = "anonymous", jobs: int = 1, landing: Landing | None = None, *,
              urgent: bool = False) -> Permit:
        """Room for `jobs` jobs of `size` bytes together. `landing`: where those bytes lie; the permit takes it over.
        Raises Overloaded, Draining or NoDevice, and then holds nothing."""
        self._check_serving()
        try:
            grant = self.admission.admit(size, jobs=jobs, tenant=tenant, caller=caller(), urgent=urgent)
        except Overloaded:
            self.metrics.refused("overloaded")
            raise
        return Permit(grant, self.arena, size, landing.hand_over(size) if landing else None)

    def _check_serving(self) -> None:
        if self.draining:
            raise draining_error()
        if (fault := stranded.no_device(self)) is not None:
            raise fault

    @property
    def offered(self) -> Catalogue:
        """The models without those that no ready worker could load."""
        if not any(map(self.refusal, (spec.name for spec in self.catalogue))):
            return self.catalogue
        return Catalogue([spec for spec in self.catalogue if not self.refusal(spec.name)])

    def _served(self, request: ImageRequest) -> ModelSpec:
        """The model of a request that can be served. Raises `UnknownModel`, `ModelFailed`, or `TooLarge` for a result
        of more pixels than the model gives, `InvalidParameter` for one that its format cannot hold."""
        if why := self.refusal(request.model):
            raise ModelFailed(f"{why}; its operator can mend that and restart the server")
        spec = self.catalogue[request.model]
        spec.check_size(request.frame, request.params, request.output.format)
        return spec

    async def submit(self, request: ImageRequest, permit: Permit | None = None) -> Job:
        """Accept a durable request: on return it is on disk. With an `idempotency_key` an equal earlier request's job
        comes back. Raises what `admit` raises and the idempotency errors."""
        permit = permit or self.admit(request.size, request.tenant, urgent=request.urgent)
        task = self._loop.create_task(self._submit(request, permit.transfer()))
        return await asyncio.shield(task)  # a client that leaves now leaves a whole job behind, not a half one

    async def _submit(self, request: ImageRequest, permit: Permit) -> Job:
        with permit:
            spec = self._served(request)
            try:
                self._keeper.check_room()
                async with self._keeper.once(request) as duplicate:
                    if duplicate is not None:
                        return self.register.current(duplicate)
                    job = await self._keeper.accept(self._new_job(request), pixels(spec, request))
            except StorageFull:
                self.metrics.refused("storage_full")
                raise
            if not self.draining:  # accepted on disk while the doors closed: the next start runs it
                grant, span = permit.hand_over()
                self._admit_live(job, spec, grant, [span] if span else [])
            return job

    async def run(
        self, request: ImageRequest, permit: Permit | None = None, heard: Callable[[float], None] | None = None
    ) -> tuple[Job, ResultBody]:
        """As `lend`, with a result of its own."""
        job, loan = await self.lend(request, permit, heard)
        with loan:
            return job, ResultBody.of(await copied(loan.data), loan.format, loan.size)

    async def lend(
        self, request: ImageRequest, permit: Permit | None = None, heard: Callable[[float], None] | None = None,
        seen: Callable[[bytes], None] | None = None,
    ) -> tuple[Job, Loan]:
        """Run a request that lives as long as its client waits: submit, wait, result. Cancelling this coroutine cancels
        the job at once. `heard(fraction)` is told of progress, `seen(jpeg)` gets the previews, where the request asks
        for them. Raises the job's own error when it failed."""
        spec = self._served(request)
        with permit or self.admit(request.size, request.tenant, urgent=request.urgent) as permit:
            parts, spans = await images_into_arena(self.arena, request.images)
            fault = draining_error() if self.draining else stranded.no_device(self)
            if fault is not None:  # it began while the body was read
                for taken in spans:
                    self.arena.give(taken)
                raise fault
            job = self._new_job(replace(request, images=parts, durable=False) if spans or request.durable else request)
            grant, span = permit.hand_over()
        live = self._admit_live(job, spec, grant, [*spans, *([span] if span else [])])
        live.heard, live.seen = heard, seen
        try:
            await live.done  # nobody else's wait is harmed when it is cancelled with this one: the job goes with it
        except asyncio.CancelledError:
            self.tell(Cancelled(job.id))
            if live.result is not None:  # it had just succeeded
                self.arena.give(live.result)
            raise
        if job.error is not None:
            raise from_info(job.error)
        assert live.result is not None and job.result is not None
        return job, Loan(self.arena, live.result, job.result.format)

    async def wait(self, job_id: str, timeout: float | None = None) -> Job:
        """The job when it has ended, the time is over or the server goes away. Raises JobNotFound."""
        live = self.register.live.get(job_id)
        if live is None:
            return await self.job(job_id)
        await asyncio.wait([live.done, self.leaving], timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        return live.job

    async def job(self, job_id: str, tenant: str | None = None) -> Job:
        """A job from memory or the store. Raises JobNotFound, also for another tenant's (`tenant` None sees all)."""
        return await self.register.find(job_id, tenant)

    async def jobs(
        self, tenant: str | None, *, state: State | None = None, model: str | None = None, limit: int = 50,
        before: str | None = None,
    ) -> list[Job]:
        """Durable jobs, newest first; `before` is the id of the last job of the page before."""
        return await self.register.page(tenant, state, model, limit, before)

    async def cancel(self, job_id: str, tenant: str | None = None) -> Job:
        """In any state; a second time, or after the end, it changes nothing. The job as it is after that."""
        job = await self.job(job_id, tenant)
        live = self.register.live.get(job_id)
        if live is not None:
            live.cancelled = True
            self.tell(Cancelled(job_id))
            if live.concluding and not (await asyncio.wait([live.done], timeout=CANCELLED_WITHIN))[0]:
                raise StorageFailed("the job does not run any more, but the server's disk does not take its end yet; "
                                    "ask for the job later", retry_after=CANCELLED_WITHIN)
        return job

    async def result(self, job_id: str, tenant: str | None = None) -> ResultBody:
        """The encoded result. Raises JobNotFound, JobNotFinished, the job's own error, or ResultGone."""
        return await stored_result(await self.job(job_id, tenant), self._keeper)

    async def events(self, job_id: str, tenant: str | None = None, after: int = 0) -> AsyncIterator[JobEvent]:
        """Events numbered above `after`: past ones, then live ones; ends after the job's final state, or when the
        server goes away before the job can run."""
        job = await self.job(job_id, tenant)
        live = self.register.live.get(job_id)
        if live is None:
            for event in past_events(job):
                if event.number > after:
                    yield event
            return
        feed = live.event_feed()
        if self.draining and live.job.state is State.QUEUED:
            feed.leave(time.time())
        self.watched[job_id] += 1
        try:
            async for event in feed.read(after):
                yield event
        finally:
            self.watched[job_id] -= 1
            if not self.watched[job_id]:
                del self.watched[job_id]

    def link(self, path: str, tenant: str, seconds: float | None = None) -> str:
        """A path of this server's, to be answered to a tenant whose image is there: where clients need a key, signed,
        so that it serves without one for so many seconds (None: as the setting says)."""
        if self.signer is None:
            return path
        return self.signer.signed(path, tenant, self.settings.url_lifetime if seconds is None else seconds)

    def follow(self, dialect: str, follower: Callable[[Job], Coroutine[Any, Any, None]]) -> None:
        """`follower(job)` runs in the background when a durable job of that dialect has ended; also one that a former
        life of this server accepted. When the server goes away it has until the end of the grace, and some seconds at
        least (`leaving` tells it), before it is cancelled."""
        self.register.followers[dialect] = lambda job: self._followers.add(self._background(follower(job)))

    def position(self, job_id: str) -> int | None:
        """How many jobs will probably be handed out before it, plus one; None when it does not wait."""
        return self.scheduler.position(job_id)

    def snapshot(self) -> dict[str, Any]:
        """All that /system/status tells, as plain data."""
        return snapshot.take(self)

    # --- down: a job is born and waits ------------------------------------------------------------------------------

    def _new_job(self, request: ImageRequest) -> Job:
        params = self.catalogue[request.model].settled(request.params)
        if params is not request.params:
            request = replace(request, params=params)
        job = Job(new_id(), request, time.time(), self.register.number())
        if (trace := CURRENT.get()) is not None:
            job.asked_by = trace.request
            trace.jobs.append(job.id)
        return job

    def _admit_live(
        self, job: Job, spec: ModelSpec, grant: Grant, spans: Sequence[Span] = (), front: bool = False
    ) -> Live:
        request, now = job.request, self._loop.time()
        left = None if request.deadline is None else request.deadline - (time.time() - job.created_at)
        frame = request.frame
        ticket = Ticket(
            id=job.id, group=spec.group(frame, request.params, self.settings.resolution_caps),
            cost=spec.cost(frame, request.params), priority=request.priority, tenant=request.tenant,
            deadline=None if left is None else now + left,
            size=sum(part.size for part in request.images), timeout=spec.timeout,
        )
        live = Live(job, spec, ticket, grant, self._loop.create_future(), list(spans))
        self.register.add(live)
        self.tell(Submitted(ticket, front))
        self.metrics.job_created(job)  # counted when it is on its way: until then a device may be idle
        return live

    def _resume(self, job: Job) -> None:
        front = resumed(job, time.time())
        grant = self.admission.force(sum(image.size for image in job.request.images), tenant=job.request.tenant)
        try:
            spec = self.catalogue[job.request.model]
            job.request = replace(job.request, params=spec.check_params(job.request.params))
            spec.check_size(job.request.frame, job.request.params, job.request.output.format)
        except (UnknownModel, InvalidParameter, TooLarge) as fault:  # the model has gone or changed since
            spec = ModelSpec(job.request.model, "", "")
            live = Live(job, spec, Ticket(job.id, spec.group(job.request.frame, {}, ())), grant,
                        self._loop.create_future())
            self.register.add(live)
            self._endings.without_result(live, State.FAILED, fault.info())
            return
        self._keeper.promises.add(job, pixels(spec, job.request))
        self._admit_live(job, spec, grant, front=front)

    # --- the scheduler decides, this performs -----------------------------------------------------------------------

    def tell(self, event: Event) -> None:
        """Tell the scheduler and perform what it wants. Events that arise meanwhile wait their turn."""
        self._events.append(event)
        if self._telling:
            return
        self._telling = True
        try:
            while self._events:
                for command in self.scheduler.handle(self._events.popleft(), self._loop.time()):
                    self._perform(command)
        finally:
            self._telling = False
        if not self._setting_timer:  # once a turn of the loop, however much is told in it
            self._setting_timer = True
            self._loop.call_soon(self._set_timer)

    def _set_timer(self) -> None:
        self._setting_timer = False
        at = self.scheduler.next_deadline()
        if at == self._timer_at:
            return
        if self._timer:
            self._timer.cancel()
        self._timer_at = at
        self._timer = self._loop.call_at(at, self._tick) if at is not None else None

    def _tick(self) -> None:
        self._timer = self._timer_at = None
        self.tell(Tick())

    def _perform(self, command: Command) -> None:
        match command:
            case Dispatch():
                self._departures.dispatch(command)
            case Finish(job, state, error):
                live = self.register.live.get(job)
                if live is not None:  # else it has just ended, and the scheduler hears of that next
                    self._endings.without_result(live, state, live.job.error or error)
            case Requeue(job, why):
                live = self.register.live[job]
                self.register.move(live, State.QUEUED, time.time(), why=why)
                if self.draining:
                    self._shutdown.leave_waiting(live)
            case Revoke(worker, incarnation, batch, job):
                self.pool.send(worker, incarnation, Drop(batch, job))
            case Recall(worker, incarnation, batch):
                self.pool.send(worker, incarnation, GiveBack(batch))
            case Restart(worker, incarnation, why):
                self.pool.kill(worker, incarnation, why)

    # --- in the background ------------------------------------------------------------------------------------------

    async def forget_old(self) -> None:
        """Remove ended jobs that retention does not keep, and store how many have ended."""
        await self._keeper.count(self.register.unstored)
        for id_ in await self._keeper.forget_old(time.time()):
            self.register.forget(id_)

    async def render_metrics(self) -> tuple[bytes, str]:
        """The page for Prometheus, with the gauges of this moment, and its content type. A large page takes tens of
        milliseconds, which the event loop does not have."""
        self.metrics.devices(self.snapshot())
        return await asyncio.to_thread(self.metrics.render)

    def _background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)
        return task

    def _task_ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        self._followers.discard(task)
        if not task.cancelled() and (fault := task.exception()):
            log.error("a background task failed", exc_info=fault)

"""The scheduler: told what happened, it says what to do.

`handle(event, now)` takes one event in, then does what time has brought (deadlines, hangs), then fills free slots; the
commands come back in the order in which they are to be performed. Time is an argument, and never runs backwards here.
`next_deadline()` says when to send a `Tick` if nothing else happens before.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from core.errors import ImagePoolError
from core.request import Priority
from core.states import State
from core.ticket import Group
from scheduler import events, verdicts, views
from scheduler.agenda import Agenda
from scheduler.backlog import Backlog, GroupQueue
from scheduler.batching import expected_seconds, hold_until, patience, portion, prefetch_at, widest
from scheduler.commands import Command, Dispatch, Finish, Requeue, Restart, Revoke
from scheduler.config import SchedulerConfig
from scheduler.pace import learn
from scheduler.recalls import Recalls
from scheduler.roster import Roster, Worker
from scheduler.suspects import Blame, Suspects
from scheduler.work import Batch, Job

CROWDED = 0.05  # of a device's memory: with less of it free, others do not leave us enough
FRONT = 1 << 40  # a job that goes to the front is numbered before all that arrive


class Scheduler:
    """Every submitted ticket ends exactly once: by an `ItemEnded` that was taken in, or by a `Finish` given out."""

    def __init__(self, config: SchedulerConfig | None = None) -> None:
        self.config = config or SchedulerConfig()
        self.backlog = Backlog(self.config.shares, self.config.kept_groups)  # what waits for a place in a batch
        self.stepped = Backlog(self.config.shares, self.config.kept_groups)  # what waits for a seat
        self.roster = Roster(self.config)
        self.jobs: dict[str, Job] = {}
        self.suspects = Suspects()
        self.draining = False
        self.now = 0.0
        self._ended: OrderedDict[str, Job] = OrderedDict()
        self._deadlines: Agenda[Job] = Agenda(_deadline)
        self._wake: float | None = None  # when a held or prefetched batch is due
        self._recalls = Recalls(self.config.recall_from)
        self._batches = 0
        self._arrivals = 0
        self._commands: list[Command] = []
        self._take_in: Mapping[type, Callable[[Any], None]] = {
            events.Submitted: self._submitted,
            events.Cancelled: self._cancelled,
            events.ItemEnded: self._item_ended,
            events.BatchEnded: self._batch_ended,
            events.BatchOutOfMemory: self._batch_out_of_memory,
            events.Loading: self._loading,
            events.Stepped: self._stepped,
            events.Alive: self._alive,
            events.Stuck: self._stuck,
            events.Parked: self._parked,
            events.WorkerReady: self._worker_ready,
            events.WorkerLost: self._worker_lost,
            events.WorkerDraining: self._worker_draining,
            events.LoadReport: self._load_report,
            events.Drain: self._drain,
            events.Tick: self._tick,
        }

    # --- the main path ----------------------------------------------------------------------------------------------

    def handle(self, event: events.Event, now: float) -> list[Command]:
        """Take one event in at `now` (seconds on any monotonic clock) and say what to do."""
        self.now = max(self.now, now)
        self._commands = []
        self._take_in[type(event)](event)
        while (job := self._deadlines.due(self.now)) is not None:
            self._finish(job, State.EXPIRED, verdicts.expired(job, self.now))
        while (worker := self.roster.hung(self.now)) is not None:
            if worker.forsaken(self.now) and not self._awaited(worker):
                worker.batches[0].unwanted = self.now  # it may go on until somebody else comes
                self.roster.file(worker)
            else:
                self._give_up(worker)
        self._fill()
        return self._commands

    def next_deadline(self) -> float | None:
        """When time itself will matter next: always later than the last `handle`, None when it never will."""
        moments = (self._deadlines.least(), self.roster.next_hang(), self._wake)
        soonest = min((moment for moment in moments if moment is not None), default=math.inf)
        return None if soonest == math.inf else soonest

    def _fill(self) -> None:
        """Hand out what can be handed out: a suspect, alone and beside the rest; then seats; then batches."""
        self._wake = None
        if self.draining:
            return
        while self.suspect_may_go() and (worker := self.roster.next_empty()) is not None:
            suspect = next(iter(self.suspects))
            del self.suspects[suspect]
            self._dispatch(worker, self._known(suspect.ticket.group), [suspect], alone=True)
        self.roster.keep_free(self.suspect_may_go())
        if self.stepped.count:
            self._fill_seats()
        if self.backlog.count:
            self._fill_slots()
        self._commands += self._recalls.next(self.roster, self.backlog, self.now)

    def suspect_may_go(self) -> bool:
        """A suspect waits, and it is its turn."""
        return self.suspects.may_go(self.roster, others=bool(self.backlog.count or self.stepped.count))

    def _fill_seats(self) -> None:
        """Whoever's turn it is, as long as a seat is free; then urgent jobs, which have some more."""
        while self.stepped.count:
            worker, urgent = self.roster.next_seat(), False
            if worker is None and self.stepped.ranks[Priority.URGENT].count:
                worker, urgent = self.roster.next_seat(urgent=True), True
            if worker is None:
                return
            job = self.stepped.take_next(urgent=urgent)
            self._dispatch(worker, self.stepped.group(job.ticket.group), [job])

    def _fill_slots(self) -> None:
        """Whoever's turn it is, as long as a worker is idle or about to be. The last idle one may wait for a fuller
        batch, if no other group wants it."""
        while self.backlog.count:
            idle = self.roster.next_idle()
            worker = idle or self.roster.next_ending(self.now)
            if worker is None:
                return
            queue = self.backlog.next_group()
            only = queue.count == self.backlog.count
            most = widest(queue, worker, only, self.now, self.config)
            if idle and only and queue.count < most and self.roster.idle == 1:
                due = hold_until(queue, worker.freed, self.roster.next_end() - self.now, self.config)
            else:
                due = self.now if idle else prefetch_at(worker, queue, most, only, self.config)
            if due > self.now:
                self._wake = due
                return
            if only:
                until_free = self.roster.next_end() - self.now if idle else math.inf
                most = portion(queue, most, self.roster.idle, self.roster.open, until_free)
            self._dispatch(worker, queue, self.backlog.take(queue, most))

    def _dispatch(self, worker: Worker, queue: GroupQueue, jobs: list[Job], *, alone: bool = False) -> None:
        self._batches += 1
        stepped = queue.group.stepped
        cost = sum(job.ticket.cost for job in jobs)
        expected = None if stepped else expected_seconds(queue, worker, cost)
        quiet = queue.quiet.seconds(cost)
        limit = patience(expected, quiet, max(job.ticket.timeout for job in jobs), self.config)
        batch = Batch(self._batches, worker, queue, {}, len(jobs), cost, expected, limit, alone=alone)
        self.suspects.dispatched(alone=alone)
        note = f"dispatched to {worker.name}#{worker.incarnation} in batch {batch.number} of {batch.size}"
        for job in jobs:
            job.batch = batch
            batch.jobs[job.ticket.id] = job
            job.note(self.now, note)
        queue.running += batch.size
        if stepped:
            batch.started, batch.warm = self.now, queue.group.model in worker.loaded
            worker.seats.take(batch, self.now)
            self.roster.file(worker)
        else:
            worker.batches.append(batch)
            self._start_next(worker)
        tickets = tuple(job.ticket for job in jobs)
        self._commands.append(Dispatch(worker.name, worker.incarnation, batch.number, tickets))

    def _start_next(self, worker: Worker) -> None:
        """The first batch that a worker holds is running, from the moment it became the first."""
        if not worker.batches:
            worker.freed = self.now
        elif worker.batches[0].started is None:
            worker.batches[0].started = self.now
        self.roster.file(worker)

    def _awaited(self, worker: Worker) -> bool:
        """Somebody waits who could run there."""
        waiting = self.backlog.count or self.stepped.count or self.suspects or len(worker.batches) > 1
        return bool(waiting) and not self.roster.idle and not self.draining

    def _give_up(self, worker: Worker) -> None:
        forsaken = worker.forsaken(self.now)
        worker.closing = worker.hung = True
        self.roster.file(worker)
        if worker.loading is not None:
            batch = worker.loading[0]
            why = f"model '{batch.group.group.model}' was not loaded within {self.config.load_timeout:.1f} s"
        elif worker.stuck is not None:
            job = next(iter(worker.stuck.jobs), "gone")
            why = f"the image of job {job} kept a thread for longer than {worker.stuck.patience:.1f} s"
        elif forsaken:
            why = f"batch {worker.batches[0].number} does not end, nobody wants it any more, and others wait"
        elif worker.batches and worker.hangs == worker.batch_hangs:
            batch = worker.batches[0]
            why = f"batch {batch.number} ({batch.group.group} x{batch.size}) did not end within {batch.patience:.1f} s"
        else:
            why = f"none of {len(worker.seats)} stepped jobs made a step within {worker.seats.patience:.1f} s"
        self._commands.append(Restart(worker.name, worker.incarnation, why))

    # --- how jobs end and come back -----------------------------------------------------------------------------------

    def _end(self, job: Job, how: str) -> None:
        job.ended = True
        job.batch = None
        job.note(self.now, how)
        self._deadlines.discard(job)
        del self.jobs[job.ticket.id]
        self._ended[job.ticket.id] = job
        if len(self._ended) > self.config.kept_stories:
            self._ended.popitem(last=False)

    def _finish(self, job: Job, state: State, error: ImagePoolError) -> None:
        """End a job by our own decision, wherever it is. In flight, its batch keeps its slot until it ends."""
        self._commands.append(Finish(job.ticket.id, state, error.info()))
        if (batch := job.batch) is not None and job.ticket.id in batch.jobs:
            batch.spoilt = True
            self._commands.append(Revoke(batch.worker.name, batch.worker.incarnation, batch.number, job.ticket.id))
            self._forsake(batch, job)
        elif job.lane is not None:
            self._backlog(job.ticket.group).remove(job)
        else:
            self.suspects.pop(job, None)
        self._end(job, f"{state}: {error.code}")

    def _forsake(self, batch: Batch, last: Job) -> None:
        """A job of it has ended. If nobody waits for any other, the worker has a while to leave it."""
        if batch.jobs and all(job.ended or job is last for job in batch.jobs.values()):
            batch.unwanted = self.now
            self.roster.file(batch.worker)

    def _put_back(self, job: Job, why: str, blame: Blame = "none") -> None:
        """A job that its batch did not answer waits again, before all that came after it; unless it is to blame."""
        proved = self.suspects.blame(job, blame)
        job.batch = None
        if proved:
            self._finish(job, State.FAILED, verdicts.poisonous(job))
            return
        job.note(self.now, f"back to the front: {why}")
        self._commands.append(Requeue(job.ticket.id, why))
        if job.suspect:
            self.suspects[job] = None
        else:
            self._backlog(job.ticket.group).add(job, self._known(job.ticket.group), back=True)

    def _backlog(self, group: Group) -> Backlog:
        return self.stepped if group.stepped else self.backlog

    def _known(self, group: Group) -> GroupQueue:
        return self._backlog(group).group(group)

    def _release(self, batch: Batch) -> list[Job]:
        """Take a batch from its worker; the next one starts. The jobs that it has not answered."""
        worker = batch.worker
        batch.group.running -= batch.size
        if worker.loading is not None and worker.loading[0] is batch:
            worker.loading = None
            worker.seats.halt(False, self.now)
        if batch in worker.seats:
            if worker.batches:  # it may have waited for this one, and begins only now
                worker.batches[0].delay = max(worker.batches[0].delay, worker.seats.patience)
            worker.seats.leave(batch, self.now)
            worker.seats.sign = self.now  # its last step may be told a moment later than its end
            self.roster.file(worker)
        else:
            worker.batches.remove(batch)
            worker.seats.sign = self.now  # whoever sits there may have had to wait for it
            self._start_next(worker)
        return [job for job in batch.jobs.values() if not job.ended]

    # --- events -------------------------------------------------------------------------------------------------------

    def _submitted(self, event: events.Submitted) -> None:
        ticket = event.ticket
        if ticket.id in self.jobs:
            return  # it lives already, and ends once
        self._arrivals += 1
        job = Job(ticket, self._arrivals - FRONT if event.front else self._arrivals, self.now)
        self.jobs[ticket.id] = job
        queue = self._known(ticket.group)
        self._backlog(ticket.group).add(job, queue, back=event.front)
        if not event.front:
            queue.arrivals.came(self.now, queue.count + queue.running)
        if ticket.deadline is not None:
            self._deadlines.add(job)

    def _cancelled(self, event: events.Cancelled) -> None:
        if (job := self.jobs.get(event.job)) is not None:
            self._finish(job, State.CANCELLED, verdicts.cancelled())

    def _item_ended(self, event: events.ItemEnded) -> None:
        batch = self.roster.holding(event.worker, event.incarnation, event.batch)
        job = batch.jobs.pop(event.job, None) if batch is not None else None
        if job is None or batch is None or job.ended:
            return
        batch.spoilt |= event.error is not None
        self._forsake(batch, job)
        self._end(job, f"failed: {event.error.code}" if event.error is not None else "succeeded")

    def _batch_ended(self, event: events.BatchEnded) -> None:
        batch = self.roster.holding(event.worker, event.incarnation, event.batch)
        if batch is None:
            return
        worker = batch.worker
        returned = batch.give_back(event.returned)
        whole = batch.started is not None and not batch.spoilt and not batch.jobs and batch.size > 0
        batch.group.arrivals.answered(self.now)
        worker.done, worker.items = worker.done + 1, worker.items + batch.size
        left = self._release(batch)
        if whole:
            self._learn(batch, event.seconds)
        for job in left:
            self._put_back(job, "its batch ended without an answer", "running")
        for job in returned:
            self._put_back(job, "not begun, and better elsewhere")

    def _learn(self, batch: Batch, seconds: float) -> None:
        """Take in how long a batch took (a stepped job: its part of the device); a model's first one in an incarnation
        only for want of a better."""
        worker, curve, model = batch.worker, batch.group.curve, batch.group.group.model
        batch.signed(self.now)
        if batch.group.group.stepped:
            known, seconds = batch.warm, batch.share
        else:
            known, whole = model in worker.loaded, self.now - (batch.started or self.now)
            if not known or seconds <= 0:  # the worker's own count holds the time for loading, too
                seconds = min(seconds, whole) if seconds > 0 else whole
            if known:
                batch.group.quiet.learn(batch.gap, batch.cost)
        if known or not curve.count:
            worker.pace = learn(curve, worker.pace, batch.cost, seconds)
            batch.group.widths[worker.name].learn(batch.size, seconds / batch.cost, self.now)
            worker.measured, worker.doubted = self.now, False
        worker.loaded.add(model)
        self.roster.file(worker)

    def _batch_out_of_memory(self, event: events.BatchOutOfMemory) -> None:
        batch = self.roster.holding(event.worker, event.incarnation, event.batch)
        if batch is None:
            return
        name, caps = batch.worker.name, batch.group.caps
        caps[name] = min(caps.get(name, batch.size), max(1, batch.size // 2))
        for job in self._release(batch):
            job.batch = None
            if batch.size > 1:
                self._put_back(job, f"no memory for {batch.size} at {name}, {caps[name]} at most from now on")
            else:
                self._finish(job, State.FAILED, verdicts.does_not_fit(job, name, event.message))

    def _worker_ready(self, event: events.WorkerReady) -> None:
        worker = self.roster.worker(event.worker)
        if event.incarnation <= worker.incarnation:
            return
        self._lose(worker, "a newer incarnation took its place", "none")
        worker.incarnation, worker.alive = event.incarnation, True
        worker.measured = worker.freed = self.now
        self.roster.file(worker)

    def _worker_lost(self, event: events.WorkerLost) -> None:
        worker = self.roster.worker(event.worker)
        if event.incarnation < worker.incarnation:
            return
        self._lose(worker, event.cause, event.blame if event.incarnation == worker.incarnation else "none")
        worker.incarnation = event.incarnation

    def _lose(self, worker: Worker, cause: str, blame: Blame) -> None:
        self.suspects.lost(blame)
        if worker.loading is not None:  # nothing else ran
            ran = [worker.loading[0]]
        elif worker.stuck is not None:
            ran = [worker.stuck]
        else:
            ran = [*list(worker.batches)[:1], *(batch for batch in worker.seats if not batch.parked)]
        held = [*worker.batches, *worker.seats]
        worker.alive = worker.closing = worker.hung = False
        worker.loading = worker.stuck = None
        worker.batches.clear()
        worker.seats.clear()
        worker.loaded.clear()
        self.roster.file(worker)
        for batch in held:
            batch.group.running -= batch.size
            for job in batch.jobs.values():
                if not job.ended:
                    why = f"{worker.name}#{worker.incarnation} was lost: {cause}"
                    self._put_back(job, why, blame if batch in ran else "none")

    def _loading(self, event: events.Loading) -> None:
        """The time that it takes is nobody's: afterwards what runs there has all of its own again."""
        batch = self.roster.holding(event.worker, event.incarnation, event.batch)
        if batch is None or batch.worker.hung:  # what it is ended for stays
            return
        worker = batch.worker
        worker.loading = None if event.done else (batch, self.now + self.config.load_timeout)
        worker.seats.halt(not event.done, self.now)
        if event.done and worker.batches:
            worker.batches[0].started = self.now
        self.roster.file(worker)

    def _stepped(self, event: events.Stepped) -> None:
        worker = self.roster.workers.get(event.worker)
        if worker is not None and worker.incarnation == event.incarnation:
            worker.seats.sign = self.now

    def _alive(self, event: events.Alive) -> None:
        batch = self.roster.holding(event.worker, event.incarnation, event.batch)
        if batch is not None and not batch.worker.hung:
            batch.signed(self.now)
            batch.patience = max(batch.patience, event.patience)
            self.roster.file(batch.worker)

    def _stuck(self, event: events.Stuck) -> None:
        batch = self.roster.holding(event.worker, event.incarnation, event.batch)
        if batch is not None and not batch.worker.hung:
            batch.worker.stuck = batch
            self._give_up(batch.worker)

    def _parked(self, event: events.Parked) -> None:
        job = self.jobs.get(event.job)
        batch = job.batch if job is not None else None
        if job is None or batch is None or batch not in batch.worker.seats:
            return
        worker = batch.worker
        if (worker.name, worker.incarnation) == (event.worker, event.incarnation):
            worker.seats.park(batch, event.parked, self.now)
            job.note(self.now, "parked for others" if event.parked else "goes on")

    def _worker_draining(self, event: events.WorkerDraining) -> None:
        worker = self.roster.workers.get(event.worker)
        if worker is not None and worker.incarnation == event.incarnation:
            worker.closing = True
            self.roster.file(worker)

    def _load_report(self, event: events.LoadReport) -> None:
        worker = self.roster.workers.get(event.worker)
        if worker is not None:
            worker.utilisation = event.utilisation or 0.0
            free, total = event.memory_free, event.memory_total
            worker.crowded = free is not None and total is not None and free < CROWDED * total
            self.roster.doubt(worker, self.now)

    def _drain(self, event: events.Drain) -> None:
        self.draining = True

    def _tick(self, event: events.Tick) -> None:
        pass

    # --- told and checked ---------------------------------------------------------------------------------------------

    def position(self, job_id: str) -> int | None:
        """How many jobs will probably be handed out before it, plus one: an estimate. None when it does not wait."""
        job = self.jobs.get(job_id)
        if job is None or job.batch is not None:
            return None
        return self._backlog(job.ticket.group).position(job) if job.lane is not None else 1

    @property
    def holding(self) -> bool:
        """Jobs are held back for now, and a moment is set at which they go."""
        return self._wake is not None and self._wake > self.now

    def story(self, job_id: str) -> list[str]:
        """What happened to a job, line by line. Known for living jobs and for the last that ended; else empty."""
        job = self.jobs.get(job_id) or self._ended.get(job_id)
        return [] if job is None else job.story()

    def workers(self) -> Sequence[views.WorkerView]:
        """Every worker ever heard of: its state, what it holds, how fast it is."""
        return [views.view(worker) for worker in self.roster.workers.values()]

    def check(self) -> None:
        """Verify every invariant. Raises AssertionError with the story of the job it is about."""
        views.check(self)

    def __repr__(self) -> str:
        return views.describe(self)


def _deadline(job: Job) -> float:
    deadline = job.ticket.deadline
    assert deadline is not None
    return deadline

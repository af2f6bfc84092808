"""The scheduler told and checked: plain views of its workers, its one-line summary, all its invariants."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from core.ticket import Group
from scheduler.backlog import GroupQueue
from scheduler.roster import Worker
from scheduler.work import Batch, Job

if TYPE_CHECKING:
    from scheduler.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class BatchView:
    """A batch in flight. `jobs`: the ids not answered yet; `started`: None while it waits behind another;
    `expected`: seconds it should take, None when unknown."""

    number: int
    group: Group
    size: int
    jobs: tuple[str, ...]
    started: float | None
    expected: float | None


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker. `pace`: how long it takes for what takes a device of pace 1 one second, None until measured;
    `batches` and `items`: how many it has ended in all its incarnations; `held`: running first; `seated`: its stepped
    jobs."""

    worker: str
    incarnation: int
    state: Literal["ready", "closing", "hung", "dead"]
    pace: float | None
    batches: int
    items: int
    held: tuple[BatchView, ...]
    seated: tuple[BatchView, ...] = ()


def view(worker: Worker) -> WorkerView:
    """A worker as plain data."""
    return WorkerView(worker.name, worker.incarnation, worker.state, worker.pace, worker.done, worker.items,
                      tuple(map(_batch, worker.batches)), tuple(map(_batch, worker.seats)))


def _batch(batch: Batch) -> BatchView:
    return BatchView(batch.number, batch.group.group, batch.size, tuple(batch.jobs), batch.started, batch.expected)


def waiting_by_priority(scheduler: Scheduler) -> dict[int, int]:
    """How many wait, by priority; suspects among them."""
    pairs = zip(scheduler.backlog.ranks, scheduler.stepped.ranks, strict=True)
    counts = {rank.priority: rank.count + stepped.count for rank, stepped in pairs}
    for job in scheduler.suspects:
        counts[job.ticket.priority] += 1
    return counts


def waiting_by_group(scheduler: Scheduler) -> dict[Group, int]:
    """How many wait, by group, where any do."""
    queues = (*scheduler.backlog.groups.values(), *scheduler.stepped.groups.values())
    counts = {queue.group: queue.count for queue in queues if queue.count}
    for job in scheduler.suspects:
        counts[job.ticket.group] = counts.get(job.ticket.group, 0) + 1
    return counts


def describe(scheduler: Scheduler) -> str:
    """In one line: what waits and what runs."""
    waiting = " ".join(f"P{priority}:{count}" for priority, count in waiting_by_priority(scheduler).items() if count)
    workers = ", ".join(map(repr, list(scheduler.roster.workers.values())[:8]))
    more = len(scheduler.roster.workers) - 8
    drains = " draining" if scheduler.draining else ""
    return f"<Scheduler{drains} waiting [{waiting}] workers [{workers}{f', {more} more' if more > 0 else ''}]>"


def check(scheduler: Scheduler) -> None:
    """Verify every invariant. Raises AssertionError."""
    scheduler.backlog.check()
    scheduler.stepped.check()
    scheduler.roster.check()
    for name, job in scheduler.jobs.items():
        try:
            _check_job(scheduler, name, job)
        except AssertionError as fault:
            raise AssertionError("\n".join([f"{job}: {fault}", *job.story()])) from None
    held: Counter[GroupQueue] = Counter()
    for batch in scheduler.roster.batches():
        assert {job.ticket.group for job in batch.jobs.values()} <= {batch.group.group}, f"{batch} mixes groups"
        assert batch.size <= batch.group.group.limit, f"{batch} is over its limit"
        for name, job in batch.jobs.items():
            assert job.ended or scheduler.jobs.get(name) is job, f"{batch} holds a stranger, {job}"
        held[batch.group] += batch.size
    for queue in (*scheduler.backlog.groups.values(), *scheduler.stepped.groups.values()):
        assert queue.running == held[queue], f"{queue.running} jobs of {queue.group} are not in flight"
    waiting = sum(job.batch is None for job in scheduler.jobs.values())
    listed = scheduler.backlog.count + scheduler.stepped.count + len(scheduler.suspects)
    assert waiting == listed, "a job waits nowhere"
    stepped = (queue.group.stepped for queue in scheduler.backlog.groups.values())
    assert not any(stepped) and all(queue.group.stepped for queue in scheduler.stepped.groups.values()), "mixed up"
    _check_time(scheduler)


def _check_job(scheduler: Scheduler, name: str, job: Job) -> None:
    assert name == job.ticket.id and not job.ended, "ended and still listed"
    waits, suspected, runs = job.lane is not None, job in scheduler.suspects, job.batch is not None
    assert waits + suspected + runs == 1, f"waits: {waits}, suspected: {suspected}, runs: {runs}"
    assert not waits or not job.suspect, "a suspect waits among others"
    if job.batch is not None:
        assert job.batch.jobs.get(name) is job, "its batch does not know it"
        worker = job.batch.worker
        assert job.batch in (worker.seats if job.ticket.group.stepped else worker.batches), "its batch is not in flight"
        assert not job.suspect or (job.batch.alone and job.batch.size == 1), "a suspect has company"


def _check_time(scheduler: Scheduler) -> None:
    """Nothing is due that was not done, and no device idles without a reason."""
    deadline = scheduler.next_deadline()
    assert deadline is None or deadline > scheduler.now, f"{deadline} is over at {scheduler.now}"
    if scheduler.draining:
        return
    roster, urgent = scheduler.roster, scheduler.stepped.ranks[0].count
    assert not scheduler.suspect_may_go() or roster.next_empty() is None, "a device idles while a suspect waits"
    assert not roster.idle or not scheduler.backlog.count or scheduler.holding, "a device idles while jobs wait"
    assert not scheduler.stepped.count or roster.next_seat() is None, "a seat is free while stepped jobs wait"
    assert not urgent or roster.next_seat(urgent=True) is None, "a seat is free while urgent jobs wait"

"""Which jobs there are: those that live, those lately ended, and, in the store, all that were accepted and kept."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Callable

from core.errors import JobNotFound
from core.job import Job
from core.states import State
from engine.feed import state_data
from engine.live import Live
from store.jobs import JobStore

REMEMBERED = 1000  # ended durable jobs kept in memory; older ones are read from the store


class Register:
    """The only writer of a job's state. `counts` are jobs by state, over all lives of the server; `unstored` are those
    ended ones of them that the store does not know of yet."""

    def __init__(self, store: JobStore) -> None:
        self.live: dict[str, Live] = {}
        self.counts = dict.fromkeys(State, 0)
        self.unstored: Counter[State] = Counter()
        self._numbered = 0
        self.followers: dict[str, Callable[[Job], None]] = {}  # by dialect: told of each durable job that has ended
        self._store = store
        self._remembered: OrderedDict[str, Job] = OrderedDict()

    async def load(self) -> None:
        """Read what the store knows; open jobs count when they are added again."""
        stored = await asyncio.to_thread(self._store.counts)
        self.counts.update({state: count for state, count in stored.items() if state.ended})
        self._numbered = await asyncio.to_thread(self._store.total)

    def number(self) -> int:
        """The number of a new job."""
        self._numbered += 1
        return self._numbered

    def add(self, live: Live) -> None:
        """A job begins (or resumes) its life here."""
        self.live[live.job.id] = live
        self.counts[live.job.state] += 1

    def move(self, live: Live, state: State, at: float, *, device: str | None = None, why: str | None = None) -> None:
        """To another state, at unix time `at`; one that ends the job makes it leave the living and tells waiters."""
        job, old = live.job, live.job.state
        job.move(state, at, device=device, why=why)
        self.counts[old] -= 1
        self.counts[state] += 1
        if live.feed:
            move = job.history[-1]
            live.feed.add("state", state_data(move) | {"progress": job.progress}, move.at)
        if state.ended:
            if not job.request.durable:
                self.unstored[state] += 1
            self._leave(live)

    def _leave(self, live: Live) -> None:
        job = live.job
        del self.live[job.id]
        if live.feed:
            live.feed.close()
        if job.request.durable:
            self._remembered[job.id] = job
            if len(self._remembered) > REMEMBERED:
                self._remembered.popitem(last=False)
        if not live.done.done():
            live.done.set_result(job)
        if job.request.durable and (follower := self.followers.get(job.request.dialect)):
            follower(job)

    def forget(self, job_id: str) -> None:
        """Retention has removed the job."""
        self._remembered.pop(job_id, None)

    def current(self, job: Job) -> Job:
        """The living object of a job that came from the store."""
        live = self.live.get(job.id)
        return live.job if live else job

    async def find(self, job_id: str, tenant: str | None = None) -> Job:
        """Raises JobNotFound, also for another tenant's job (`tenant` None sees all)."""
        live = self.live.get(job_id)
        job = live.job if live else self._remembered.get(job_id) or await asyncio.to_thread(self._store.load, job_id)
        if job is None or (tenant is not None and job.request.tenant != tenant):
            raise JobNotFound("there is no job of that id; ended jobs are removed after a while")
        return job

    async def keyed(self, tenant: str, prefix: str) -> list[Job]:
        """The tenant's durable jobs whose idempotency keys begin so, in the order of the keys."""
        return [self.current(job) for job in await asyncio.to_thread(self._store.keyed, tenant, prefix)]

    async def page(
        self, tenant: str | None, state: State | None, model: str | None, limit: int, before: str | None
    ) -> list[Job]:
        """Durable jobs, newest first; `before` is the id of the last job of the page before. The store does not follow
        a living job from queued to running and back, so those two are told from memory."""
        if state is None or state.ended:
            stored = await asyncio.to_thread(self._store.page, tenant, state, model, limit, before)
            return [self.current(job) for job in stored]
        living = [
            live.job for live in self.live.values()
            if live.job.state is state and live.job.request.durable
            and tenant in (None, live.job.request.tenant) and model in (None, live.job.request.model)
        ]
        newest = sorted(living, key=lambda job: job.number, reverse=True)
        places = [place for place, job in enumerate(newest) if job.id == before]
        start = places[0] + 1 if places else 0
        return newest[start : start + limit]

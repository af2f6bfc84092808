"""Who is next: every waiting job, in the one place where it waits, and the fair order among them.

Start-time fair queueing on two floors: priorities share by weight, the tenants of a priority equally, both by cost.
Everybody who waits carries a *tag*: the virtual time at which its next job is due. The least tag goes first and grows
by cost / weight. Whoever comes back from idling starts at the present virtual time: no credit is saved up. Within a
tenant the order is that of arrival.

A batch is the fair order restricted to one group, so that a batch headed by one tenant is filled up with others'
matching jobs. Such a ride out of turn is charged too, but the debt is bounded (`_charge`): places that would have
stayed empty must not starve the rider later.

A *lane* holds the jobs of one (priority, tenant, group), and is found from both sides: by its flow (the tenant) for
the order of arrival, by its group for filling a batch. Nothing here costs more than O(log n), whatever waits.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from heapq import heappop, heappush

from core.request import Priority
from core.ticket import Group
from scheduler.agenda import Agenda
from scheduler.pace import Arrivals, Curve, Quiet, Widths
from scheduler.work import Job


class GroupQueue:
    """One group: its lanes by priority, and what has been learned about it.

    cost: of its latest job. caps: by worker name, the most items that fitted its memory where the group's own limit
    did not. widths: by worker name, what a job costs by the width of its batch. running: jobs in flight. quiet: how
    long its batches show no sign of life."""

    __slots__ = ("arrivals", "caps", "cost", "count", "curve", "group", "lanes", "quiet", "running", "widths")

    def __init__(self, group: Group) -> None:
        self.group = group
        self.lanes: tuple[Agenda[Lane], ...] = tuple(Agenda(_due) for _ in range(4))
        self.count = 0
        self.running = 0
        self.cost = 1.0
        self.curve = Curve()
        self.quiet = Quiet()
        self.widths: defaultdict[str, Widths] = defaultdict(Widths)
        self.arrivals = Arrivals()
        self.caps: dict[str, int] = {}

    def room(self, worker: str) -> int:
        """The most items a batch may have there."""
        return min(self.group.limit, self.caps.get(worker, self.group.limit))

    @property
    def oldest(self) -> float:
        """When the one that has waited longest came. O(tenants here): ask only while few wait."""
        return min(lane.head.since for lanes in self.lanes for lane in lanes)


class Lane:
    """The waiting jobs of one (priority, tenant, group) in order of arrival.

    New ones go to `fresh`; those that come back go to `returned`, a heap, and are all older. Jobs that ended while
    they waited stay as corpses until they come up or outnumber the living."""

    __slots__ = ("count", "flow", "fresh", "queue", "returned")

    def __init__(self, flow: Flow, queue: GroupQueue) -> None:
        self.flow = flow
        self.queue = queue
        self.fresh: deque[Job] = deque()
        self.returned: list[tuple[int, Job]] = []
        self.count = 0

    @property
    def head(self) -> Job:
        """The next to go. There must be one."""
        while self.returned:
            if self.returned[0][1].lane is self:
                return self.returned[0][1]
            heappop(self.returned)
        while self.fresh[0].lane is not self:
            self.fresh.popleft()
        return self.fresh[0]

    def pop(self) -> Job:
        """Take the head out."""
        job = self.head
        if self.returned:
            heappop(self.returned)
        else:
            self.fresh.popleft()
        return job

    def bury(self) -> None:
        """Drop the corpses when there are more of them than of the living."""
        if len(self.fresh) > 2 * self.count + 32:
            self.fresh = deque(job for job in self.fresh if job.lane is self)

    def ahead(self, job: Job) -> float:
        """About how many here arrived before it, from its place between the first and the last."""
        first, last = self.head.number, self.fresh[-1].number if self.fresh else self.returned[-1][0]
        if job.number <= first:
            return 0.0
        share = (job.number - first) / (last - first) if last > first else 1.0
        return (self.count - 1) * share if share <= 1 else self.count

    def __iter__(self) -> Iterator[Job]:
        yield from (job for _, job in sorted(self.returned, key=_number) if job.lane is self)
        yield from (job for job in self.fresh if job.lane is self)


class Flow:
    """A tenant inside a priority: its lanes by their oldest job, its tag, how many of its jobs wait."""

    __slots__ = ("count", "lanes", "order", "rank", "tag", "tenant")

    def __init__(self, rank: Rank, tenant: str) -> None:
        self.rank = rank
        self.tenant = tenant
        self.tag = rank.virtual
        self.count = 0
        self.lanes: dict[GroupQueue, Lane] = {}
        self.order: Agenda[Lane] = Agenda(_head_number)


class Rank:
    """A priority: its tenants by tag, its own tag among the priorities, its weight, how many of its jobs wait."""

    __slots__ = ("_sweep_at", "count", "flows", "order", "priority", "tag", "virtual", "weight")

    def __init__(self, priority: int, weight: float) -> None:
        self.priority = priority
        self.weight = weight
        self.tag = self.virtual = 0.0
        self.count = 0
        self.flows: dict[str, Flow] = {}
        self.order: Agenda[Flow] = Agenda(_tag)
        self._sweep_at = 64

    def flow(self, tenant: str) -> Flow:
        """The tenant's flow. Idle ones are kept while they owe something, and forgotten after."""
        flow = self.flows.get(tenant)
        if flow is None:
            if len(self.flows) >= self._sweep_at:
                self.flows = {name: old for name, old in self.flows.items() if old.count or old.tag > self.virtual}
                self._sweep_at = 2 * len(self.flows) + 64
            flow = self.flows[tenant] = Flow(self, tenant)
        return flow


def _tag(flow: Flow) -> float:
    return flow.tag


def _due(lane: Lane) -> float:
    return lane.flow.tag


def _head_number(lane: Lane) -> int:
    return lane.head.number


def _number(entry: tuple[int, Job]) -> int:
    return entry[0]


class Backlog:
    """All that waits. `next_group` says whose turn it is, `take` takes a batch of a group in fair order."""

    def __init__(self, shares: Sequence[float], kept_groups: int = 4_096) -> None:
        self.ranks = tuple(Rank(priority, share) for priority, share in enumerate(shares))
        self.groups: dict[Group, GroupQueue] = {}
        self.count = 0
        self._virtual = 0.0
        self._least_share = min(shares)
        self._kept_groups = self._sweep_at = kept_groups

    def group(self, group: Group) -> GroupQueue:
        """What is known of a group. Of very many groups, those that nobody uses are forgotten, oldest first."""
        queue = self.groups.get(group)
        if queue is None:
            if len(self.groups) >= self._sweep_at:
                idle = [old for old in self.groups.values() if not old.count and not old.running]
                for old in sorted(idle, key=lambda old: old.arrivals.last)[: len(idle) // 2 + 1]:
                    del self.groups[old.group]
                self._sweep_at = max(self._kept_groups, 2 * len(self.groups))
            queue = self.groups[group] = GroupQueue(group)
        return queue

    def add(self, job: Job, queue: GroupQueue, *, back: bool = False) -> None:
        """A job begins to wait: at the end of its lane, or (`back`) where it once stood."""
        ticket = job.ticket
        rank = self.ranks[ticket.priority]
        flow = rank.flow(ticket.tenant)
        lane = flow.lanes.get(queue)
        if lane is None:
            lane = flow.lanes[queue] = Lane(flow, queue)
        job.lane = lane
        queue.cost = ticket.cost
        if back:
            heappush(lane.returned, (job.number, job))
        else:
            lane.fresh.append(job)
        if not rank.count:
            rank.tag = max(rank.tag, self._virtual)
        if not flow.count:
            flow.tag = max(flow.tag, rank.virtual)
            rank.order.add(flow)
        lane.count += 1
        flow.count += 1
        rank.count += 1
        queue.count += 1
        self.count += 1
        if back or lane.count == 1:
            flow.order.add(lane)
            queue.lanes[ticket.priority].add(lane)

    def remove(self, job: Job) -> None:
        """A waiting job ends where it stands."""
        assert job.lane is not None, f"{job} does not wait"
        lane, job.lane = job.lane, None
        self._leave(lane)

    def next_group(self) -> GroupQueue:
        """The group of the job whose turn it is. There must be one."""
        flow = self._first_rank(self.ranks).order.first()
        lane = flow.order.first() if flow is not None else None
        assert lane is not None
        return lane.queue

    @property
    def urgent(self) -> bool:
        """It is the turn of a P0 job."""
        return self.count > 0 and self._first_rank(self.ranks).priority == Priority.URGENT

    def take(self, queue: GroupQueue, most: int) -> list[Job]:
        """Take up to `most` jobs of a group, each the one whose turn it is among those of the group."""
        jobs: list[Job] = []
        while queue.count and len(jobs) < most:
            rank = self._first_rank([rank for rank in self.ranks if queue.lanes[rank.priority]])
            lane = queue.lanes[rank.priority].first()
            assert lane is not None
            job = lane.pop()
            if not job.charged:
                self._charge(job, lane.flow, most)
            job.lane = None
            self._leave(lane)
            jobs.append(job)
        return jobs

    def take_next(self, *, urgent: bool = False) -> Job:
        """Take the job whose turn it is; with `urgent`, among those of P0 alone. There must be one."""
        flow = self._first_rank(self.ranks[:1] if urgent else self.ranks).order.first()
        lane = flow.order.first() if flow is not None else None
        assert flow is not None and lane is not None
        job = lane.pop()
        if not job.charged:
            self._charge(job, flow, 1)
        job.lane = None
        self._leave(lane)
        return job

    def _first_rank(self, ranks: Sequence[Rank]) -> Rank:
        best = None
        for rank in ranks:
            if rank.count and (best is None or rank.tag < best.tag):
                best = rank
        assert best is not None, "nobody waits"
        return best

    def _charge(self, job: Job, flow: Flow, most: int) -> None:
        """Move both tags on. A rider out of turn never owes more than one full batch of its cost beyond the present:
        in turn, the bound is never reached."""
        rank, cost = flow.rank, job.ticket.cost
        first = rank.order.first()
        assert first is not None
        rank.virtual = max(rank.virtual, first.tag)
        self._virtual = max(self._virtual, self._first_rank(self.ranks).tag)
        flow.tag = max(flow.tag, min(flow.tag + cost, rank.virtual + most * cost))
        bound = self._virtual + most * cost / self._least_share
        rank.tag = max(rank.tag, min(rank.tag + cost / rank.weight, bound))
        job.charged = True

    def _leave(self, lane: Lane) -> None:
        """Counts and agendas after a job left its lane (or died in it)."""
        flow = lane.flow
        rank, queue = flow.rank, lane.queue
        lane.count -= 1
        flow.count -= 1
        rank.count -= 1
        queue.count -= 1
        self.count -= 1
        if not lane.count:
            flow.order.discard(lane)
            queue.lanes[rank.priority].discard(lane)
            del flow.lanes[queue]
            if not flow.count:
                rank.order.discard(flow)
        else:
            lane.bury()
        if not rank.count:  # nobody waits any more to whom a debt could be paid
            rank.virtual = max(rank.virtual, flow.tag)

    def position(self, job: Job) -> int:
        """How many jobs will probably go before it, plus one: an estimate in O(groups + tenants + priorities).

        Its own tenant's older jobs all go first; of every other tenant as many as of its own; of every other priority
        as its share says."""
        lane = job.lane
        assert lane is not None
        own = sum(other.ahead(job) for other in lane.flow.lanes.values())
        rank = lane.flow.rank
        same = own + sum(min(flow.count, own) for flow in rank.order if flow is not lane.flow)
        others = (min(r.count, same * r.weight / rank.weight) for r in self.ranks if r is not rank)
        return 1 + round(same + sum(others))

    def check(self) -> None:
        """Every count is that of the jobs, every lane is listed where it must be, virtual time is behind all tags."""
        assert self.count == sum(rank.count for rank in self.ranks) == sum(q.count for q in self.groups.values())
        by_group: dict[GroupQueue, int] = dict.fromkeys(self.groups.values(), 0)
        for rank in self.ranks:
            assert rank.count == sum(flow.count for flow in rank.flows.values()), f"count of P{rank.priority}"
            assert not rank.count or rank.tag >= self._virtual, f"P{rank.priority} has a credit"
            for flow in rank.flows.values():
                assert (flow.count > 0) == (flow in rank.order), f"tenant {flow.tenant} is listed wrongly"
                assert not flow.count or flow.tag >= rank.virtual, f"tenant {flow.tenant} has a credit"
                assert flow.count == sum(lane.count for lane in flow.lanes.values()), f"count of {flow.tenant}"
                for queue, lane in flow.lanes.items():
                    jobs = list(lane)
                    assert lane.count == len(jobs) > 0, f"count of a lane of {flow.tenant}"
                    assert lane in flow.order and lane in queue.lanes[rank.priority], "a lane is lost"
                    assert [j.number for j in jobs] == sorted(j.number for j in jobs), "a lane is out of order"
                    assert all(j.ticket.group == queue.group and not j.ended and j.batch is None for j in jobs)
                    by_group[queue] += len(jobs)
        assert all(queue.count == count for queue, count in by_group.items()), "count of a group"

"""Who may come in: a bounded number of jobs and of bytes, and for each tenant a bounded part of them.

`admit` hands out a `Grant` or raises `Overloaded` with the time after which there is probably room, from how fast jobs
have been leaving lately and how many others were told to come back before. Until then a place is kept for who was
refused. The clock is the caller's; without one the estimate is a constant, and no place is kept.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

from core.errors import Overloaded, TooLarge
from scheduler.places import Places

MEMORY = 10.0  # seconds over which the rate of leaving is averaged
SOONEST, LATEST = 1.0, 60.0  # seconds that a client is told to stay away
URGENT_PART, URGENT_JOBS = 16, 4  # P0 has a sixteenth more room, at least for four jobs
UNKNOWN = 5.0  # the same, when nothing has left lately
SLACK = 1.1  # jobs leave in batches, and faster or slower than lately
SOON = 2.0  # seconds: newcomers leave room for those who are told to come until then
PART = 0.5  # of the queue, at most, is kept free for them
MOST = 10_000  # places that are kept


class Grant:
    """Room that was given to `jobs` jobs of `size` bytes in all. Give it back once; a second time does nothing."""

    __slots__ = ("_admission", "jobs", "size", "tenant")

    def __init__(self, admission: Admission, size: int, jobs: int, tenant: str) -> None:
        self._admission: Admission | None = admission
        self.size = size
        self.jobs = jobs
        self.tenant = tenant

    def release(self) -> None:
        """The jobs have ended, or never came."""
        if self._admission is not None:
            admission, self._admission = self._admission, None
            admission._take_back(self)

    def __repr__(self) -> str:
        return f"<Grant {self.jobs} jobs, {self.size} bytes{'' if self._admission else ', given back'}>"


class Rate:
    """How much leaves per second, newer news counting more."""

    __slots__ = ("_amount", "_at")

    def __init__(self) -> None:
        self._amount, self._at = 0.0, -math.inf

    def add(self, amount: float, now: float) -> None:
        """So much left just now."""
        self._amount = self.at(now) * MEMORY + amount
        self._at = now

    def at(self, now: float) -> float:
        """Per second."""
        return self._amount * math.exp((self._at - now) / MEMORY) / MEMORY


class Admission:
    """`jobs` and `bytes` are what is inside now. `tenant_share` (0-1] is the part of either bound that one tenant may
    hold; its first job always has a place, as far as the whole queue has. Urgent jobs have some room more, also beyond
    their tenant's part, so that they get in when all others fill the queue."""

    def __init__(self, max_jobs: int, max_bytes: int, *, tenant_share: float = 1.0,
                 clock: Callable[[], float] | None = None) -> None:
        if max_jobs < 1 or max_bytes < 1 or not 0 < tenant_share <= 1:
            raise ValueError("the queue needs room for at least one job and one byte, and a tenant a share up to 1")
        self.max_jobs = max_jobs
        self.max_bytes = max_bytes
        self.jobs = 0
        self.bytes = 0
        self._share = tenant_share
        self._clock = clock
        self._jobs_of: Counter[str] = Counter()
        self._bytes_of: Counter[str] = Counter()
        self._left_jobs, self._left_bytes = Rate(), Rate()
        self.places = Places()

    def admit(
        self, size: int, *, jobs: int = 1, tenant: str = "anonymous", caller: str = "", urgent: bool = False
    ) -> Grant:
        """Room for `jobs` jobs of `size` bytes in all. Raises as `ask`."""
        self.ask(size, jobs=jobs, tenant=tenant, caller=caller, urgent=urgent)
        if self._clock is not None:
            self.places.take(f"{tenant} {caller}", self._clock())
        return self.force(size, jobs=jobs, tenant=tenant)

    def ask(
        self, size: int, *, jobs: int = 1, tenant: str = "anonymous", caller: str = "", urgent: bool = False
    ) -> None:
        """Raise `TooLarge` when so much would not fit an empty queue either, `Overloaded` when it does not fit now.
        Then a place is kept for the `caller`, a text that is the same when it comes back."""
        if jobs < 1 or size < 0:
            raise ValueError(f"room for {jobs} jobs of {size} bytes makes no sense")
        if jobs > self.max_jobs or size > self.max_bytes:
            raise TooLarge(f"{jobs} jobs of {size} bytes are more than this server ever queues "
                           f"({self.max_jobs} jobs, {self.max_bytes} bytes); send less at once")
        more_jobs = max(URGENT_JOBS, self.max_jobs // URGENT_PART) if urgent else 0
        more_bytes = self.max_bytes // URGENT_PART if urgent else 0
        over_jobs = self.jobs + jobs - self.max_jobs - more_jobs
        over_bytes = self.bytes + size - self.max_bytes - more_bytes
        kept = 0 if urgent else self._kept_from(f"{tenant} {caller}")
        if over_jobs + kept > 0 or over_bytes > 0:
            raise self._come_back(f"{tenant} {caller}", over_jobs, over_bytes)
        held_jobs, held_bytes = self._jobs_of.get(tenant, 0), self._bytes_of.get(tenant, 0)
        over_jobs = held_jobs + jobs - max(1, int(self._share * self.max_jobs)) - more_jobs
        over_bytes = held_bytes + size - int(self._share * self.max_bytes) - more_bytes
        if held_jobs and (over_jobs > 0 or over_bytes > 0):
            inside = held_jobs / self.jobs
            raise self._overloaded("your own jobs fill your part of the queue", over_jobs, over_bytes, inside)

    def force(self, size: int, *, jobs: int = 1, tenant: str = "anonymous") -> Grant:
        """The same without asking whether there is room: for jobs that were accepted before a restart."""
        self.jobs += jobs
        self.bytes += size
        self._jobs_of[tenant] += jobs
        self._bytes_of[tenant] += size
        return Grant(self, size, jobs, tenant)

    def _take_back(self, grant: Grant) -> None:
        self.jobs -= grant.jobs
        self.bytes -= grant.size
        self._jobs_of[grant.tenant] -= grant.jobs
        self._bytes_of[grant.tenant] -= grant.size
        if not self._jobs_of[grant.tenant]:
            del self._jobs_of[grant.tenant], self._bytes_of[grant.tenant]
        if self._clock is not None:
            now = self._clock()
            self._left_jobs.add(grant.jobs, now)
            self._left_bytes.add(grant.size, now)

    def _kept_from(self, caller: str) -> int:
        """How much of the free room is kept for others."""
        if self._clock is None or self.places.has(caller, now := self._clock()):
            return 0
        return min(self.places.due(now + SOON), math.ceil(PART * self.max_jobs))

    def _come_back(self, caller: str, over_jobs: int, over_bytes: int) -> Overloaded:
        """Behind all who were told so before."""
        wait = max(self._wait(over_jobs + len(self.places), self._left_jobs, 1.0),
                   self._wait(over_bytes, self._left_bytes, 1.0))
        if self._clock is None:
            return _overloaded("the queue is full", wait)
        wait = math.ceil(wait * SLACK + SOONEST)  # whole seconds, as most clients read them
        if wait < LATEST and len(self.places) < MOST and self.places.of(caller) < self.max_jobs:
            self.places.keep(caller, self._clock() + wait)
        return _overloaded("the queue is full", min(wait, LATEST))

    def _overloaded(self, what: str, over_jobs: int, over_bytes: int, part: float) -> Overloaded:
        """`part`: how much of what leaves makes the room that is missing."""
        wait = max(self._wait(over_jobs, self._left_jobs, part), self._wait(over_bytes, self._left_bytes, part))
        return _overloaded(what, wait)

    def _wait(self, over: int, left: Rate, part: float) -> float:
        if over <= 0:
            return SOONEST
        rate = left.at(self._clock()) * part if self._clock is not None else 0.0
        return min(max(over / rate, SOONEST), LATEST) if rate > 1e-6 else UNKNOWN

    def check(self) -> None:
        """The sums are those of the tenants, and nothing is below zero."""
        assert self.jobs == sum(self._jobs_of.values()) and self.bytes == sum(self._bytes_of.values())
        assert min(self._jobs_of.values(), default=1) > 0 and min(self._bytes_of.values(), default=0) >= 0

    def __repr__(self) -> str:
        return f"<Admission {self.jobs}/{self.max_jobs} jobs, {self.bytes}/{self.max_bytes} bytes>"


def _overloaded(what: str, wait: float) -> Overloaded:
    return Overloaded(f"{what}; try again in about {wait:.0f} s", retry_after=wait)

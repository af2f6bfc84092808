"""When a batch goes, and what to expect of it.

An idle device takes what there is, unless a fuller batch is worth the wait. A busy one is given its next batch as late
as it can be without starving: a full one a moment before the running batch ends (its images are decoded meanwhile), a
partial one at the last moment. What is not yet handed out can still be filled up, overtaken or sent elsewhere.
"""

from __future__ import annotations

import math
from bisect import bisect_right

from scheduler.backlog import GroupQueue
from scheduler.config import SchedulerConfig
from scheduler.roster import Worker

RETURN = 2.0  # a wait must bring so many times what it costs: it also keeps the device from later work
SHARED = 0.85  # small batches cost more than one: sharing must bring the end of all so much nearer
LAST_MOMENT = 0.002  # seconds before a batch ends at which what follows must be sent, at the least
ALONE, BESIDE_OTHERS = 10.0, 2.0  # seconds of the longest batch while one group waits, or several do
BURST = 2.0  # typical gaps without an arrival after which a burst counts as over


def hold_until(queue: GroupQueue, since: float, until_free: float, config: SchedulerConfig) -> float:
    """Until when the last idle device, idle `since` then, waits for more jobs of the only group that waits."""
    wait, start = queue.arrivals.next()
    if not _pays(queue, wait, until_free):
        return since
    return min(start + BURST * wait, max(since, queue.oldest) + config.max_queue_delay)


def widest(queue: GroupQueue, worker: Worker, only: bool, now: float, config: SchedulerConfig) -> int:
    """How many jobs a batch may hold there: what fits, no wider than pays, and no longer than `longest_batch`; one is
    always allowed."""
    most = queue.widths[worker.name].most(queue.room(worker.name), now)
    longest = config.longest_batch or (ALONE if only else BESIDE_OTHERS)

    def seconds(jobs: int) -> float:
        return (worker.pace or 1.0) * (queue.curve.seconds(jobs * queue.cost) or 0.0)

    if seconds(most) <= longest:
        return most
    return max(1, bisect_right(range(1, most + 1), longest, key=seconds))


def portion(queue: GroupQueue, most: int, idle: int, devices: int, until_free: float) -> int:
    """How many of its jobs the next device takes, of at most `most`, when no other group waits: an even part if others
    are idle too; else, of what one batch could hold, an even part for all `devices` if all are done clearly sooner so.
    `until_free`: seconds until another device is free; infinite when unknown."""
    sharers = idle if idle > 1 else devices
    part = -(-queue.count // max(sharers, 1))
    if idle > 1 or devices < 2 or queue.count > most:
        return min(most, part) if idle > 1 else most
    seconds = [queue.curve.seconds(jobs * queue.cost) for jobs in (queue.count, part, min(part, queue.count - part))]
    whole, share, rest = (one or math.inf for one in seconds)
    wait = until_free if until_free < math.inf else share * (1 - 1 / devices)
    return part if max(share, wait + rest) < SHARED * whole else queue.count


def prefetch_at(worker: Worker, queue: GroupQueue, most: int, only: bool, config: SchedulerConfig) -> float:
    """From when on a busy worker may be given its next batch. A partial one never, if its group is the only one that
    waits and it is worth waiting for the running one's clients to come back: it is decided anew when that has ended."""
    batch = worker.batches[0]
    if queue.count >= most:
        return batch.ends - config.prefetch_lead
    if only and config.max_queue_delay and _pays(queue, queue.arrivals.echo, math.inf, batch.size):
        return math.inf
    return batch.ends - min(max(0.1 * (batch.expected or 0.0), LAST_MOMENT), config.prefetch_lead)


def _pays(queue: GroupQueue, wait: float, until_free: float, leaving: int = 0) -> bool:
    """Whether to wait for one more job pays. Those who wait lose `wait` each, and so does the one they wait for; it
    gains the time until a device would be free for it, or what this batch takes if that is less. Nobody is awaited
    when as many are here as there ever are, and an urgent job never waits for others."""
    gained = min(until_free, queue.curve.seconds(queue.count * queue.cost) or 0.0)
    here = queue.count + queue.running - leaving
    return here < queue.arrivals.peak and RETURN * wait * (queue.count + 1) < gained and not queue.lanes[0]


def expected_seconds(queue: GroupQueue, worker: Worker, cost: float) -> float | None:
    """How long a batch should take there. None when this group or this worker was never measured, and for a model's
    first batch in an incarnation, which may have to load the weights."""
    base = queue.curve.seconds(cost)
    if base is None or worker.pace is None or queue.group.model not in worker.loaded:
        return None
    return base * worker.pace


def patience(expected: float | None, quiet: float | None, timeout: float, config: SchedulerConfig) -> float:
    """Seconds without a sign of life after which a batch counts as hung. `quiet`: the longest silence that is known of
    its like, where any is."""
    if expected is None:
        return timeout
    limit = min(timeout, max(config.hang_floor, config.hang_factor * expected))
    return limit if quiet is None else min(limit, max(config.quiet_floor, config.hang_factor * quiet))

"""What the scheduler learns about time: how long batches take, how fast a device is, how often jobs arrive.

The expected time of a batch is `curve(cost) x pace`: the curve belongs to the group (seconds on a device of pace 1, a
straight line over the batch's cost), the pace to the worker (2.0: twice as long as a device of pace 1). Only their
product is ever compared with a measurement, so neither needs a reference device.
"""

from __future__ import annotations

import math

FAR = 4.0  # a measurement this many times off is not noise: a model was loaded, a device changed its clock
LATELY = 16  # batches
WORSE = 1.15  # a width at which a job costs so many times more than at a narrower one does not pay
SURE = 3  # measurements of a width without which nothing is concluded
DOUBTED = 300.0  # seconds after which a width is tried again


class Curve:
    """Seconds over cost: a line through recent batches, of which newer ones count more."""

    __slots__ = ("_cov", "_var", "_x", "_y", "count")

    def __init__(self) -> None:
        self.count = 0
        self._x = self._y = self._var = self._cov = 0.0

    def seconds(self, cost: float) -> float | None:
        """How long a batch of that cost takes at pace 1; None before the first measurement."""
        if not self.count:
            return None
        steepest = self._y / self._x  # through the origin: no fixed part at all
        known = self._var > 1e-3 * self._x * self._x
        slope = min(max(self._cov / self._var, 0.0), steepest) if known else steepest / 2
        return max(self._y + slope * (cost - self._x), 1e-6)

    def learn(self, cost: float, seconds: float) -> None:
        """A batch of that cost took so long (at pace 1)."""
        self.count += 1
        weight = max(1.0 / self.count, 0.05)
        dx, dy = cost - self._x, seconds - self._y
        self._x += weight * dx
        self._y += weight * dy
        self._var = (1 - weight) * (self._var + weight * dx * dx)
        self._cov = (1 - weight) * (self._cov + weight * dx * dy)

    def forget(self) -> None:
        """What was measured so far is worthless."""
        self.__init__()  # type: ignore[misc]


class Widths:
    """What a job of a group costs at one worker by how many share its batch: seconds for a cost of 1. Widths up to the
    same power of two count as one. Not shared among workers: a CPU gains nothing where a GPU gains most."""

    __slots__ = ("_known",)

    def __init__(self) -> None:
        self._known: dict[int, tuple[float, int, float]] = {}  # seconds, measurements, when last

    def learn(self, size: int, each: float, now: float) -> None:
        """A batch of `size` jobs took so many seconds for each unit of cost."""
        width = 1 << (size - 1).bit_length()
        old, count, _ = self._known.get(width, (each, 0, now))
        self._known[width] = old + (each - old) * max(1 / (count + 1), 0.2), count + 1, now

    def most(self, most: int, now: float) -> int:
        """How wide a batch of at most `most` jobs may be: no wider than the first width at which a job was found to
        cost clearly more than at a narrower one. What was found long ago is tried again."""
        best, allowed = math.inf, 1
        for width, (each, count, when) in sorted(self._known.items()):
            if count >= SURE and now - when < DOUBTED:
                if each > WORSE * best:
                    return min(most, allowed)
                best = min(best, each)
            allowed = width
        return most


def learn(curve: Curve, pace: float | None, cost: float, seconds: float) -> float:
    """Take a measured batch into its group's curve and give the worker's new pace (None: it had none yet)."""
    seconds = max(seconds, 1e-6)
    base = curve.seconds(cost)
    if base is None:
        new = pace or 1.0
    elif pace is None or seconds < base * pace / FAR:
        # Far quicker than thought: either the curve's few batches were slow for once (they loaded the model), or this
        # device is the quick one. A young curve is doubted first.
        if curve.count < 8 and seconds < base * (pace or 1.0) / FAR:
            curve.forget()
            new = pace or 1.0
        else:
            new = min(seconds / base, FAR * FAR)
    else:
        seconds = min(seconds, FAR * base * pace)
        new = pace * (seconds / (base * pace)) ** 0.2
    curve.learn(cost, seconds / new)
    return new


class Arrivals:
    """Whether the next job of a group is worth a wait.

    gap: how soon, typically, a job follows the one before; echo: how soon one follows the end of a batch, since clients
    that were answered come back. Both are geometric means: jobs come in bursts, and what counts is the gap within.
    peak: the most jobs (waiting or running) that there were at once lately; when all of them are here, nobody is
    awaited.
    """

    __slots__ = ("_batches", "_before", "_most", "echo", "ended", "gap", "last")

    def __init__(self) -> None:
        self.gap = self.echo = math.inf
        self.last = self.ended = -math.inf
        self._batches = self._most = self._before = 0

    def came(self, now: float, alive: int) -> None:
        """A job has arrived; with it, so many are waiting or running."""
        if self.ended > self.last:
            self.echo = _blend(self.echo, now - self.ended)
        if self.last > -math.inf:
            self.gap = _blend(self.gap, now - self.last)
        self.last = now
        self._most = max(self._most, alive)

    def answered(self, now: float) -> None:
        """A batch has ended. Every so many of them, an older peak is forgotten."""
        self.ended = now
        self._batches += 1
        if self._batches % LATELY == 0:
            self._before, self._most = self._most, 0

    @property
    def peak(self) -> int:
        return max(self._most, self._before)

    def next(self) -> tuple[float, float]:
        """The typical wait for the next one, and the moment from which it is counted."""
        return (self.echo, self.ended) if self.ended > self.last else (self.gap, self.last)


def _blend(old: float, seconds: float) -> float:
    seconds = max(seconds, 1e-5)
    return seconds if old == math.inf else old * (seconds / old) ** 0.1


class Quiet:
    """How long a group's batches go without a sign of life, at the longest: a forward, or an item between two signs."""

    __slots__ = ("_cost", "_count", "_longest")
    ENOUGH = 3  # batches, before anything is said
    FADES = 0.9  # one long silence is forgotten by and by

    def __init__(self) -> None:
        self._longest, self._cost, self._count = 0.0, 0.0, 0

    def learn(self, gap: float, cost: float) -> None:
        """A batch of that cost has ended well, with no silence longer than `gap` seconds."""
        self._count += 1
        faded = self._longest * self.FADES
        if gap >= faded:
            self._longest, self._cost = gap, cost
        else:
            self._longest = faded

    def seconds(self, cost: float) -> float | None:
        """The longest silence to expect of a batch of that cost; None while too little is known."""
        return None if self._count < self.ENOUGH else self._longest * max(1.0, cost / self._cost)

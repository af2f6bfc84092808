"""What a forward costs: measured seconds by key (network, shapes) and rows, from which it follows what width pays.

Every forward that ran is told with `learn`. Between measured widths the seconds are a straight line; beyond the widest
they go on as they went at last. A key with one measured width is taken to cost the same at any: hope makes the batcher
try a wider forward, and the measurement then speaks. `reach` lets it at most double the width, so that neither time
nor memory leaps.

A forward that carries a variant of its network (a LoRA set) is measured apart from one without, and one that carries
several apart from both: that is its *variety*. One that never ran is hoped to cost what the others of its key do.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from enum import IntEnum

KEPT_KEYS = 1_024
STALE = 1_000  # forwards of a key, after which a width that was not among them is forgotten, to be tried again
DOUBTED = 100  # the same of a width that was measured twice only: the device may have hiccuped just then
SHARE = 0.2  # of a new measurement in the seconds of its width
FAR = 2.0  # a measurement more than this many times off counts as this many times off: the device hiccuped


class Variety(IntEnum):
    """How many variants of its network a forward carries."""

    NONE = 0
    ONE = 1
    SEVERAL = 2


def variety_of(variants: Iterable[Hashable]) -> Variety:
    """Of the calls of a forward; None: the network as it is."""
    different = set(variants)
    return Variety.SEVERAL if len(different) > 1 else Variety.NONE if different <= {None} else Variety.ONE


@dataclass(slots=True)
class _Width:
    """Seconds of a forward of so many rows; how often it was measured, and at which forward of its key at last."""

    seconds: float
    count: int
    last: int


class _Curve:
    """Forwards of one key and variety: the measured widths."""

    __slots__ = ("points", "widths")

    def __init__(self) -> None:
        self.widths: list[int] = []  # in order
        self.points: dict[int, _Width] = {}

    def seconds(self, rows: int) -> float:
        """At least one width must have been measured."""
        widths, points = self.widths, self.points
        if (point := points.get(rows)) is not None:
            return point.seconds
        if rows < widths[0]:  # between a part for each row and no such part
            return points[widths[0]].seconds * (0.5 + 0.5 * rows / widths[0])
        if len(widths) == 1:
            return points[widths[0]].seconds
        after = min(bisect_left(widths, rows), len(widths) - 1)
        low, high = widths[after - 1], widths[after]
        slope = (points[high].seconds - points[low].seconds) / (high - low)
        if rows > high:
            return points[high].seconds + max(0.0, slope) * (rows - high)
        return points[low].seconds + slope * (rows - low)

    def price(self, rows: int) -> float:
        """Seconds per row of the best forward of at most so many rows."""
        # Along a straight line seconds/row is least at one of its ends.
        return min(self.seconds(width) / width for width in (rows, *(one for one in self.widths if one < rows)))

    def learn(self, rows: int, seconds: float, promised: float, now: int, alone: bool) -> None:
        """`promised`: what it was expected to take; `now`: which forward of its key it is; `alone`: whether nothing is
        known of its key but this curve."""
        point = self.points.get(rows)
        if point is None:
            # The first forward of a width also pays for being the first (buffers, kernels chosen or compiled): while
            # others are known, it is believed no more than they promised, so that there is a second.
            self.points[rows] = _Width(min(seconds, promised), 1, now)
            self.widths.insert(bisect_left(self.widths, rows), rows)
        elif point.count == 1:
            # With no other width known, the first may be too long; otherwise it may be too hopeful.
            point.seconds = min(point.seconds, seconds) if alone and len(self.points) == 1 else seconds
            point.count, point.last = 2, now
        else:
            bounded = min(max(seconds, point.seconds / FAR), point.seconds * FAR)
            point.seconds += SHARE * (bounded - point.seconds)
            point.count, point.last = point.count + 1, now

    def forget(self, now: int) -> None:
        """What was not measured for long."""
        self.points = {width: point for width, point in self.points.items()
                       if now - point.last < (STALE if point.count > 2 else DOUBTED)}
        self.widths = sorted(self.points)


class _Key:
    """One key: a curve for each variety that ran."""

    __slots__ = ("count", "curves")

    def __init__(self) -> None:
        self.count = 0
        self.curves: dict[Variety, _Curve] = {}

    def seconds(self, rows: int, variety: Variety) -> float:
        return min(curve.seconds(rows) for curve in self._nearest(variety))

    def price(self, rows: int, variety: Variety) -> float:
        return min(curve.price(rows) for curve in self._nearest(variety))

    def learn(self, rows: int, seconds: float, variety: Variety) -> None:
        self.count += 1
        promised = self.seconds(rows, variety) if self.curves else seconds
        own = self.curves.setdefault(variety, _Curve())
        own.learn(rows, seconds, promised, self.count, alone=len(self.curves) == 1)
        if self.count % DOUBTED == 0:
            for curve in self.curves.values():
                curve.forget(self.count)
            self.curves = {variety: curve for variety, curve in self.curves.items() if curve.widths}

    def _nearest(self, variety: Variety) -> Iterable[_Curve]:
        """The variety's own curve, or those that give hope."""
        own = self.curves.get(variety)
        return self.curves.values() if own is None else (own,)


class StepCosts:
    """Seconds by key, rows and variety. Of very many keys, those that were not measured for longest are forgotten."""

    def __init__(self, kept_keys: int = KEPT_KEYS) -> None:
        self._kept_keys = kept_keys
        self._keys: dict[Hashable, _Key] = {}  # the one measured last stands last

    def seconds(self, key: Hashable, rows: int, variety: Variety = Variety.NONE) -> float | None:
        """What a forward of so many rows takes; None while nothing is known of the key."""
        known = self._keys.get(key)
        return None if known is None else known.seconds(rows, variety)

    def price(self, key: Hashable, rows: int, variety: Variety = Variety.NONE) -> float | None:
        """Seconds per row of the best forward of at most so many rows; None while nothing is known of the key."""
        known = self._keys.get(key)
        return None if known is None else known.price(rows, variety)

    def reach(self, key: Hashable) -> int:
        """The most rows that a forward should try: twice the widest width that was measured more than once, or the only
        measured ones again; 0 while nothing is known."""
        known = self._keys.get(key)
        if known is None:
            return 0
        points = [(width, point.count) for curve in known.curves.values() for width, point in curve.points.items()]
        trusted = max((width for width, count in points if count > 1), default=0)
        return max(2 * trusted, min(width for width, _ in points))

    def learn(self, key: Hashable, rows: int, seconds: float, variety: Variety = Variety.NONE) -> None:
        """A forward of that key with so many rows (at least 1) took so long."""
        known = self._keys.pop(key, None) or _Key()
        if len(self._keys) >= self._kept_keys:
            del self._keys[next(iter(self._keys))]
        self._keys[key] = known
        known.learn(rows, max(seconds, 1e-9), variety)

    def forget(self, gone: Callable[[object], bool]) -> None:
        """Nothing is kept of keys that hold a part of which `gone` is true."""
        for key in [key for key in self._keys if mentions(key, gone)]:
            del self._keys[key]

    def check(self) -> None:
        """Raises AssertionError when an invariant does not hold."""
        assert len(self._keys) <= self._kept_keys
        assert all(known.curves for known in self._keys.values()), "a key without a measurement is kept"
        for curve in (curve for known in self._keys.values() for curve in known.curves.values()):
            assert curve.widths == sorted(curve.points) and curve.widths, "widths and points differ"
            assert all(width >= 1 and point.seconds > 0 for width, point in curve.points.items())

    def __repr__(self) -> str:
        return f"StepCosts({len(self._keys)} keys)"


def mentions(key: object, part: Callable[[object], bool]) -> bool:
    """Whether `part` is true of the key or, where it is a tuple, of anything in it."""
    return part(key) or (isinstance(key, tuple) and any(mentions(one, part) for one in key))

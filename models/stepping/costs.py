"""What a forward costs: measured seconds by key (network, shapes) and rows, from which it follows what width pays.

Every forward that ran is told with `learn`. Between measured widths the seconds are a straight line; beyond the widest
they go on as they went at last. A key with one measured width is taken to cost the same at any: hope makes the batcher
try a wider forward, and the measurement then speaks. `reach` lets it at most double the width, so that neither time
nor memory leaps.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Hashable
from dataclasses import dataclass

KEPT_KEYS = 1_024
STALE = 1_000  # forwards of a key, after which a width that was not among them is forgotten, to be tried again
DOUBTED = 100  # the same of a width that was measured twice only: the device may have hiccuped just then
SHARE = 0.2  # of a new measurement in the seconds of its width
FAR = 2.0  # a measurement more than this many times off counts as this many times off: the device hiccuped


@dataclass(slots=True)
class _Width:
    """Seconds of a forward of so many rows; how often it was measured, and at which forward of its key at last."""

    seconds: float
    count: int
    last: int


class _Curve:
    """One key: its measured widths."""

    __slots__ = ("count", "points", "widths")

    def __init__(self) -> None:
        self.count = 0
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

    def learn(self, rows: int, seconds: float) -> None:
        self.count += 1
        point = self.points.get(rows)
        if point is None:
            # The first forward of a width also pays for being the first (buffers, kernels chosen or compiled): while
            # others are known, it is believed no more than they promised, so that there is a second.
            expected = self.seconds(rows) if self.points else seconds
            self.points[rows] = _Width(min(seconds, expected), 1, self.count)
            self.widths.insert(bisect_left(self.widths, rows), rows)
        elif point.count == 1:
            # With no other width known, the first may be too long; otherwise it may be too hopeful.
            point.seconds = min(point.seconds, seconds) if len(self.points) == 1 else seconds
            point.count, point.last = 2, self.count
        else:
            bounded = min(max(seconds, point.seconds / FAR), point.seconds * FAR)
            point.seconds += SHARE * (bounded - point.seconds)
            point.count, point.last = point.count + 1, self.count
        if self.count % DOUBTED == 0:
            self._forget()

    def _forget(self) -> None:
        self.points = {width: point for width, point in self.points.items()
                       if self.count - point.last < (STALE if point.count > 2 else DOUBTED)}
        self.widths = sorted(self.points)


class StepCosts:
    """Seconds by key and rows. Of very many keys, those that were not measured for longest are forgotten."""

    def __init__(self, kept_keys: int = KEPT_KEYS) -> None:
        self._kept_keys = kept_keys
        self._curves: dict[Hashable, _Curve] = {}  # the one measured last stands last

    def seconds(self, key: Hashable, rows: int) -> float | None:
        """What a forward of so many rows takes; None while nothing is known of the key."""
        curve = self._curves.get(key)
        return None if curve is None else curve.seconds(rows)

    def price(self, key: Hashable, rows: int) -> float | None:
        """Seconds per row of the best forward of at most so many rows; None while nothing is known of the key."""
        curve = self._curves.get(key)
        if curve is None:
            return None
        # Along a straight line seconds/row is least at one of its ends.
        return min(curve.seconds(width) / width for width in (rows, *(one for one in curve.widths if one < rows)))

    def reach(self, key: Hashable) -> int:
        """The most rows that a forward should try: twice the widest width that was measured more than once, or the only
        measured ones again; 0 while nothing is known."""
        curve = self._curves.get(key)
        if curve is None:
            return 0
        trusted = max((width for width, point in curve.points.items() if point.count > 1), default=0)
        return max(2 * trusted, curve.widths[0])

    def learn(self, key: Hashable, rows: int, seconds: float) -> None:
        """A forward of that key with so many rows (at least 1) took so long."""
        curve = self._curves.pop(key, None) or _Curve()
        if len(self._curves) >= self._kept_keys:
            del self._curves[next(iter(self._curves))]
        self._curves[key] = curve
        curve.learn(rows, max(seconds, 1e-9))

    def forget(self, gone: Callable[[object], bool]) -> None:
        """Nothing is kept of keys that hold a part of which `gone` is true."""
        for key in [key for key in self._curves if mentions(key, gone)]:
            del self._curves[key]

    def check(self) -> None:
        """Raises AssertionError when an invariant does not hold."""
        assert len(self._curves) <= self._kept_keys
        for curve in self._curves.values():
            assert curve.widths == sorted(curve.points) and curve.widths, "widths and points differ"
            assert all(width >= 1 and point.seconds > 0 for width, point in curve.points.items())

    def __repr__(self) -> str:
        return f"StepCosts({len(self._curves)} keys)"


def mentions(key: object, part: Callable[[object], bool]) -> bool:
    """Whether `part` is true of the key or, where it is a tuple, of anything in it."""
    return part(key) or (isinstance(key, tuple) and any(mentions(one, part) for one in key))

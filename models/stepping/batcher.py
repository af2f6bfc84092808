"""Which parked calls go next, and how many of them in one forward. Pure: no torch, no clock, no thread.

**Order.** All waiting calls stand in one line, by *due*: when their run joined, less a head start. The less work a run
has left, the larger its head start: `favour x U x (U / left)` seconds, where `left` is its remaining work, divided by
the weight of its priority, and `U` the usual remaining work here. That is Smith's rule (weight / time; shortest
remaining first, where weights are equal) with linear ageing, and since all who wait age alike, the line stays as it is
while time goes by. An urgent run, and a call that encodes or decodes, have a head start of `patience` seconds or twice
that besides: urgent runs pass everybody, a decode ends a run, and an encode shows with whom a run can share forwards.
Every head start is bounded, so nobody waits for whoever joined later than that.

**Width.** The first in line goes, together with those that next in line wait for the same key. How many is decided by
measured seconds: for each width, what everybody who waits would be delayed if all calls of the key went in forwards of
that width, each delay times its run's weight; the width of the least sum is taken. Where one more row costs little,
forwards are wide, and the wider the more runs wait behind; where two rows take twice as long as one, one run finishes
after the other.

**Company.** Calls of a key may want different variants of its network (LoRA sets). A forward that carries several has
its own measured seconds, so the same sum says which is better: all in order, or those of the first one's variant alone
and the other variants after them, each by itself.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from models.stepping.costs import StepCosts, Variety, mentions, variety_of

ENCODE, DENOISE = 0, 1  # lanes, as in `contract.Lane`; what is neither decodes
URGENT = 0
SHORTEST = 1 / 20  # of the usual work: who has less left is favoured no more than that
KEPT_LIMITS = 1_024
LOOK = 4  # times the most rows of a forward: how far behind others of the first one's variant are looked for


@dataclass(eq=False, slots=True)
class Waiting:
    """One parked call as the batcher sees it.

    run: whose call it is. rows: at least 1. lane: 0 encodes, 1 denoises, 2 decodes; one key has one lane. priority: 0
    urgent to 3 test. remaining: denoiser forwards that the run still needs, this one included. joined: when the run
    joined (monotonic seconds). variant: of the network that the call wants, None: the network as it is.
    """

    run: int
    key: Hashable
    rows: int
    lane: int
    priority: int
    remaining: float
    joined: float
    variant: Hashable = None


_Place = tuple[float, int, Waiting]  # due, turn; turns differ, so that calls are never compared


class StepBatcher:
    """All parked calls of one device. `add` and `next` cost O(log n) for n calls of a key, and little for each key.

    costs: what forwards take; whoever runs them tells it. most_rows: of one forward. weights: of priorities 0 to 3.
    favour: how much a run with little work left is preferred; 0: first come, first served. patience: seconds by which
    an urgent run, or a call that encodes or decodes, may pass one that joined earlier.
    """

    def __init__(
        self, costs: StepCosts, *, most_rows: int = 16, weights: Sequence[int] = (5, 3, 1, 1), favour: float = 0.1,
        patience: float = 600.0,
    ) -> None:  # fmt: skip
        self.costs = costs
        self._most_rows, self._weights, self._favour, self._patience = most_rows, tuple(weights), favour, patience
        self._lines: dict[Hashable, list[_Place]] = {}  # by key, in order
        self._places: dict[Waiting, _Place] = {}
        self._runs: dict[int, int] = {}  # how many calls of each run wait
        self._weight = 0  # of all runs that wait
        self._limits: dict[Hashable, int] = {}
        self._turn = self._seen = 0
        self._usual = 0.0  # seconds of work that a run has left, the mean of recent steps

    def add(self, waiting: Waiting) -> None:
        """A call begins to wait."""
        self._turn += 1
        place = self._places[waiting] = (self._due(waiting, waiting.rows), self._turn, waiting)
        insort(self._lines.setdefault(waiting.key, []), place)
        others = self._runs.get(waiting.run, 0)
        self._runs[waiting.run] = others + 1
        if not others:
            self._weight += self._weights[waiting.priority]

    def remove(self, waiting: Waiting) -> None:
        """It waits no longer. It must have waited."""
        place = self._places.pop(waiting)
        line = self._lines[waiting.key]
        del line[bisect_left(line, place)]
        if not line:
            del self._lines[waiting.key]
        self._runs[waiting.run] -= 1
        if not self._runs[waiting.run]:
            del self._runs[waiting.run]
            self._weight -= self._weights[waiting.priority]

    def next(self, welcome: Callable[[Waiting], bool] | None = None) -> list[Waiting]:
        """The calls of the next forward, taken out: all of one key; none when nobody waits. The time does not matter,
        since all who wait age alike. `welcome`: who should rather go, if anybody waits that it is true of."""
        if not self._lines:
            return []
        lines = list(self._lines.values())
        preferred = [line for line in lines if welcome(line[0][2])] if welcome and len(lines) > 1 else lines
        chosen = self._company(min(preferred or lines, key=self._head))
        self._learn_usual(chosen[0])
        for waiting in chosen:
            self.remove(waiting)
        return chosen

    def limit(self, key: Hashable, rows: int) -> None:
        """More rows did not fit the memory: no forward of that key has more from now on, unless one call does."""
        rows = min(rows, self._limits.pop(key, rows))
        if len(self._limits) >= KEPT_LIMITS:
            del self._limits[next(iter(self._limits))]
        self._limits[key] = max(1, rows)

    def forget(self, gone: Callable[[object], bool]) -> None:
        """Networks have gone: nothing is kept of keys that hold a part of which `gone` is true. No such call waits."""
        self.costs.forget(gone)
        self._limits = {key: rows for key, rows in self._limits.items() if not mentions(key, gone)}

    @property
    def most_rows(self) -> int:
        """Of one forward."""
        return self._most_rows

    # --- order --------------------------------------------------------------------------------------------------------

    def _head(self, line: list[_Place]) -> tuple[float, int]:
        """The first of a line, by which lines are compared: when it is due if it shares its forwards."""
        _, turn, waiting = line[0]
        return self._due(waiting, self._rows_within(line, self._most_rows)), turn

    def _due(self, waiting: Waiting, rows: int) -> float:
        """Less is earlier. rows: of the forwards that it may share."""
        leaps = 2 * (waiting.priority == URGENT) + (waiting.lane != DENOISE)
        return waiting.joined - leaps * (self._patience + self._most_favour) - self._head_start(waiting, rows)

    def _head_start(self, waiting: Waiting, rows: int) -> float:
        price = self.costs.price(waiting.key, rows, variety_of([waiting.variant])) or 0.0
        left = price * waiting.rows * (max(1.0, waiting.remaining) if waiting.lane == DENOISE else 1.0)
        left = max(left / self._weights[waiting.priority], SHORTEST * self._usual)
        return self._favour * self._usual * self._usual / left if left else 0.0

    @property
    def _most_favour(self) -> float:
        """The longest head start that little work is worth, in seconds."""
        return self._favour * self._usual / SHORTEST

    def _learn_usual(self, waiting: Waiting) -> None:
        seconds = self.costs.seconds(waiting.key, waiting.rows, variety_of([waiting.variant]))
        if waiting.lane == DENOISE and seconds is not None:
            self._seen += 1
            self._usual += (seconds * waiting.remaining - self._usual) / min(self._seen, 1_000)

    # --- width --------------------------------------------------------------------------------------------------------

    def _company(self, line: list[_Place]) -> list[Waiting]:
        """The first of a line and who goes along: those that make the weighted delay of all who wait least."""
        first = line[0][2]
        everybody = list(_within(line, self._most_rows))
        best, least = self._width(everybody, [])
        if any(one.variant != first.variant for one in everybody):
            near = islice(line, LOOK * self._most_rows)
            alike = list(_within((place for place in near if place[2].variant == first.variant), self._most_rows))
            others = [one for one in everybody if one.variant != first.variant]
            apart, delay = self._width(alike, others)
            if delay < least:
                best = apart
        return best

    def _width(self, calls: list[Waiting], others: list[Waiting]) -> tuple[list[Waiting], float]:
        """How many of these calls of a key go, the first ones, and the weighted delay of all who wait. others: more
        calls of the key, which go after them, each variant by itself."""
        key, rows, weight = calls[0].key, 0, 0
        ends = self._ends(calls)
        all_rows, all_weight = sum(one.rows for one in calls), sum(ends) + sum(self._ends(others))
        going, staying = _varieties(calls), [*reversed(_varieties(calls[::-1])), Variety.NONE]
        apart, each = _apart(others), _apart([*calls[1:], *others])
        room = self._room(key)
        best, least = 1, float("inf")
        for count, (waiting, added) in enumerate(zip(calls, ends, strict=True), 1):
            rows += waiting.rows
            weight += added
            if rows > room and count > 1:
                break
            if added:  # half of what a run waits for does not let it go on
                after = [(all_rows - rows, staying[count]), *apart] if count > 1 else each
                delay = self._delay(key, rows, going[count - 1], after, weight, all_weight - weight)
                if delay < least:
                    best, least = count, delay
        return calls[:best], least

    def _ends(self, calls: list[Waiting]) -> list[int]:
        """For each of these calls the weight of the run that goes on once it is answered: 0 where more calls of the
        run follow."""
        following = [*(one.run for one in calls[1:]), None]
        return [0 if one.run == after else self._weights[one.priority]
                for one, after in zip(calls, following, strict=False)]

    def _delay(
        self, key: Hashable, rows: int, variety: Variety, after: list[tuple[int, Variety]], aboard: int, left: int
    ) -> float:
        """Weighted seconds that everybody waits if so many rows go now and the rest after them, equally wide.

        after: the rest, rows that go together and how. aboard, left: the weights of those who go and of those who go
        after; the latter do not all wait until the last of their forwards has ended."""
        first = self.costs.seconds(key, rows, variety) or 0.0
        seconds, forwards = 0.0, 0
        for rest, kind in after:
            full, last = divmod(rest, rows)
            if full:
                seconds += full * (self.costs.seconds(key, rows, kind) or 0.0)
            if last:
                seconds += self.costs.seconds(key, last, kind) or 0.0
            forwards += full + (last > 0)
        behind = self._weight - aboard - left
        return self._weight * first + (behind + left * (1 + 1 / max(1, forwards)) / 2) * seconds

    def _room(self, key: Hashable) -> int:
        """The most rows of a forward."""
        return min(self._most_rows, self._limits.get(key, self._most_rows), self.costs.reach(key))

    def _rows_within(self, line: list[_Place], most: int) -> int:
        """The rows of the first calls of a line, as many as fit."""
        return sum(waiting.rows for waiting in _within(line, most))

    # --- to be told and checked ---------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._places)

    def __repr__(self) -> str:
        lines = ", ".join(f"{len(line)} x {line[0][2].rows} rows" for line in self._lines.values())
        return f"StepBatcher({len(self)} calls of {len(self._runs)} runs: {lines or 'nobody waits'})"

    def check(self) -> None:
        """Raises AssertionError when an invariant does not hold."""
        runs: dict[int, int] = {}
        for key, line in self._lines.items():
            assert line and line == sorted(line), "a line is empty or out of order"
            for place in line:
                waiting = place[2]
                assert waiting.key == key and self._places[waiting] is place, "a call stands in the wrong line"
                runs[waiting.run] = runs.get(waiting.run, 0) + 1
        assert sum(runs.values()) == len(self._places), "a call stands in no line"
        assert runs == self._runs, "calls of a run are not counted"
        priorities = {waiting.run: waiting.priority for waiting in self._places}
        assert self._weight == sum(self._weights[one] for one in priorities.values()), "weights are not counted"
        assert all(rows >= 1 for rows in self._limits.values())


def _varieties(calls: Sequence[Waiting]) -> list[Variety]:
    """Of a forward of the first of these calls, of the first two, and so on."""
    first = calls[0].variant
    mixed = next((place for place, one in enumerate(calls) if one.variant != first), len(calls))
    return [variety_of([first])] * mixed + [Variety.SEVERAL] * (len(calls) - mixed)


def _apart(calls: Sequence[Waiting]) -> list[tuple[int, Variety]]:
    """How many rows each variant has, and how it goes by itself."""
    rows: dict[Hashable, int] = {}
    for one in calls:
        rows[one.variant] = rows.get(one.variant, 0) + one.rows
    return [(count, variety_of([variant])) for variant, count in rows.items()]


def _within(line: Iterable[_Place], most: int) -> Iterator[Waiting]:
    """The first calls of a line whose rows are at most so many together, but at least one call."""
    rows = 0
    for *_, waiting in line:
        rows += waiting.rows
        if rows > most and rows > waiting.rows:
            return
        yield waiting

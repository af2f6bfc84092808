"""The work of W4 on a fake clock: requests of two kinds of diffusion model, published step times, and policies.

A request is a chain of calls: an encode, its steps, a decode. One device runs one forward at a time; what a forward
takes is its curve, give or take two percent. A policy has what the stepper asks of a batcher (`add`, `remove`, `next`,
`limit`, `costs.learn`), so that the same one can be simulated here and driven by the real stepper.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

from models.stepping.batcher import StepBatcher, Waiting
from models.stepping.costs import StepCosts, Variety, variety_of

ENCODE, DENOISE, DECODE = range(3)
CAP = 8

STEP = {"sd": {1: 0.167, 3: 0.186, 8: 0.425}, "edit": {1: 0.243, 2: 0.474, 3: 0.711}}
"""Seconds of a step by rows: Qwen-Image, compiled, on an H200, at 512 x 512 and 1024 x 1024 (sglang#22183). Beyond the
last published width a curve goes on as it went at last."""

ENCODES, DECODES = {"sd": 0.05, "edit": 0.15}, {"sd": 1.5, "edit": 0.11}
"""In steps of one row, from counted FLOPs; they are compute-bound, so two take twice as long."""

STEPS = {"sd": (30, 4), "edit": (50, 8)}  # as usual, and distilled
USUAL = 0.7  # of the requests of a kind have the usual number of steps
ADAPTERS = (0.60, 0.25, 0.15)  # shares of three LoRA sets, the first is none
MIX = 1.05  # what a forward of several LoRA sets takes more than one of a single set (`bench/lora.py` measures it)
PRIORITIES = (0.10, 0.20, 0.60, 0.10)

Key = tuple[int, str]  # lane, kind


@dataclass(eq=False, slots=True)
class Request:
    """One image wanted at a moment `came`; `done`: how many of its calls are; `ended`: when the last was."""

    id: int
    came: float
    kind: str
    steps: int
    adapters: int
    priority: int
    done: int = 0
    ended: float = 0.0

    @property
    def calls(self) -> int:
        return self.steps + 2

    @property
    def latency(self) -> float:
        return self.ended - self.came

    def lane(self) -> int:
        """What its next call does."""
        return ENCODE if not self.done else DECODE if self.done > self.steps else DENOISE

    def key(self) -> Key:
        """Of its next call: what may share a forward with it."""
        return self.lane(), self.kind

    def variant(self) -> int | None:
        """The LoRA set of its next call."""
        return self.adapters or None if self.lane() == DENOISE else None

    def waiting(self) -> Waiting:
        """Its next call as a batcher sees it."""
        left = self.steps - max(0, self.done - 1)
        return Waiting(self.id, self.key(), 1, self.lane(), self.priority, left, self.came, self.variant())


class Costs(Protocol):
    def learn(self, key: Key, rows: int, seconds: float, variety: Variety) -> None: ...


class Policy(Protocol):
    """What the stepper asks of a batcher."""

    costs: Costs

    def add(self, waiting: Waiting) -> None: ...
    def remove(self, waiting: Waiting) -> None: ...
    def next(self, welcome: Any = None) -> list[Waiting]: ...
    def limit(self, key: Key, rows: int) -> None: ...


def seconds(key: Key, rows: int, variety: Variety = Variety.NONE) -> float:
    """What a forward takes."""
    lane, kind = key
    if lane != DENOISE:
        return (ENCODES if lane == ENCODE else DECODES)[kind] * STEP[kind][1] * rows
    points = sorted(STEP[kind].items())
    low, high = next(((low, high) for low, high in pairwise(points) if rows <= high[0]), points[-2:])
    found = low[1] + (high[1] - low[1]) * (rows - low[0]) / (high[0] - low[0])
    return found * MIX if variety is Variety.SEVERAL else found


def alone(kind: str, steps: int) -> float:
    """Seconds that a request takes when nobody else is there."""
    return seconds((ENCODE, kind), 1) + steps * seconds((DENOISE, kind), 1) + seconds((DECODE, kind), 1)


def requests(seed: int, load: float, count: int) -> list[Request]:
    """Poisson arrivals. load: seconds of work, were they run one at a time, that come in a second; both kinds bring
    equally much."""
    chance = random.Random(seed)
    usual = {kind: USUAL * alone(kind, many) + (1 - USUAL) * alone(kind, few) for kind, (many, few) in STEPS.items()}
    share = usual["edit"] / (usual["sd"] + usual["edit"])
    gap = (share * usual["sd"] + (1 - share) * usual["edit"]) / load
    came, made = 0.0, []
    for number in range(count):
        came += chance.expovariate(1 / gap)
        kind = "sd" if chance.random() < share else "edit"
        steps = STEPS[kind][chance.random() >= USUAL]
        (adapters,) = chance.choices(range(3), ADAPTERS)
        (priority,) = chance.choices(range(4), PRIORITIES)
        made.append(Request(number, came, kind, steps, adapters, priority))
    return made


@dataclass(frozen=True, slots=True)
class Forward:
    """One that ran: from when to when, of whom."""

    began: float
    ended: float
    key: Key
    aboard: tuple[int, ...]


def simulate(work: Sequence[Request], policy: Policy, seed: int = 0) -> list[Forward]:
    """Run all requests; each then knows when it ended. The forwards in order."""
    chance, now, arrived, left, forwards = random.Random(seed), 0.0, 0, len(work), []
    while left:
        while arrived < len(work) and work[arrived].came <= now:
            policy.add(work[arrived].waiting())
            arrived += 1
        chosen = policy.next()
        if not chosen:
            now = work[arrived].came
            continue
        variety = variety_of(one.variant for one in chosen)
        took = seconds(chosen[0].key, len(chosen), variety) * chance.uniform(0.98, 1.02)
        forwards.append(Forward(now, now + took, chosen[0].key, tuple(one.run for one in chosen)))
        now += took
        policy.costs.learn(chosen[0].key, len(chosen), took, variety)
        for one in chosen:
            request = work[one.run]
            request.done += 1
            if request.done == request.calls:
                request.ended, left = now, left - 1
            else:
                policy.add(request.waiting())
    return forwards


# --- policies ---------------------------------------------------------------------------------------------------------


class _Plain(ABC):
    """Those that learn nothing. Requests are numbered as they came."""

    def __init__(self, work: Sequence[Request]) -> None:
        self.work, self.costs = work, self
        self.here: dict[int, Waiting] = {}

    def learn(self, key: Key, rows: int, seconds: float, variety: Variety) -> None:
        return  # it keeps its order, whatever forwards take

    def limit(self, key: Key, rows: int) -> None:
        return  # it has a cap of its own

    def add(self, waiting: Waiting) -> None:
        self.here[waiting.run] = waiting

    def remove(self, waiting: Waiting) -> None:
        del self.here[waiting.run]

    def next(self, welcome: Any = None) -> list[Waiting]:
        return [self.here.pop(run) for run in self.choose()] if self.here else []

    @abstractmethod
    def choose(self) -> list[int]:
        """Whose calls go; somebody waits. A forward has one LoRA set."""

    def shares(self, run: int) -> tuple[Key, int | None]:
        """What is equal for those that may share a forward."""
        request = self.work[run]
        return request.key(), request.variant()


class OneAtATime(_Plain):
    """First come, first served."""

    def choose(self) -> list[int]:
        return [min(self.here)]


class Static(_Plain):
    """A batch starts and ends together: at most eight of one kind, LoRA set and number of steps, the oldest first."""

    def __init__(self, work: Sequence[Request]) -> None:
        super().__init__(work)
        self.batch: list[int] = []

    def choose(self) -> list[int]:
        self.batch = [run for run in self.batch if run in self.here]
        if not self.batch:
            like = self._like(min(self.here))
            self.batch = [run for run in sorted(self.here) if self._like(run) == like][:CAP]
        return self.batch

    def _like(self, run: int) -> tuple[str, int, int]:
        request = self.work[run]
        return request.kind, request.adapters, request.steps


class Continuous(_Plain):
    """Requests join and leave between steps: the oldest steps, and whoever waits for the same, at most eight."""

    def choose(self) -> list[int]:
        first = self.shares(min(self.here))
        return [run for run in sorted(self.here) if self.shares(run) == first][:CAP]


class InTurn(_Plain):
    """The same, but the oldest eight take the device in turn, key by key: nobody waits long for a first step."""

    def __init__(self, work: Sequence[Request]) -> None:
        super().__init__(work)
        self.residents: list[int] = []
        self.turns: dict[tuple[Key, int | None], int] = {}
        self.turn = 0

    def choose(self) -> list[int]:
        self.residents = [run for run in self.residents if run in self.here]
        new = (run for run in sorted(self.here) if run not in self.residents)
        self.residents += [run for run, _ in zip(new, range(CAP - len(self.residents)), strict=False)]
        keys = {self.shares(run) for run in self.residents}
        key = min(keys, key=lambda key: (self.turns.get(key, 0), key[0], key[1] or 0))
        self.turn += 1
        self.turns[key] = self.turn
        return [run for run in self.residents if self.shares(run) == key]


def ours(_: Sequence[Request] = ()) -> StepBatcher:
    """The batcher as it is shipped, knowing nothing yet."""
    return StepBatcher(StepCosts())


OURS = "ImagePool"
POLICIES: dict[str, Callable[[Sequence[Request]], Policy]] = {
    OURS: ours, "one at a time": OneAtATime, "static ≤ 8": Static, "continuous ≤ 8": Continuous,
    "keys in turn ≤ 8": InTurn,
}  # fmt: skip
RIVALS = ("one at a time", "static ≤ 8", "continuous ≤ 8")  # those that the goal names

"""What tests of shared steps need: requests that come at different turns, their images made alone, a plain batcher."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image

from models.base import Output
from models.stepping.batcher import Waiting
from models.stepping.contract import Lane
from models.stepping.costs import Variety
from models.stepping.merge import MergedNetwork
from models.stepping.rendezvous import Networks, PipelineRun, SharedPipeline
from models.stepping.shelter import Shelter
from models.stepping.stepper import StepCounters, StepEvents, Stepper
from tests import tiny_models

torch.set_num_threads(1)
CPU = torch.device("cpu")
CLOSE = 1e-5  # of a sample, of 1.0
WORDS = "a cat", "a photo of a red house, low quality", "remove the person", "night sky with a tree and a dog"


class Costs:
    def __init__(self) -> None:
        self.learned: list[tuple[Hashable, int, float]] = []

    def learn(self, key: Hashable, rows: int, seconds: float, variety: Variety = Variety.NONE) -> None:
        self.learned.append((key, rows, seconds))


class Fifo:
    """A batcher that is always as wide as it can be, so that tests of what is merged see it merged: the most urgent
    call, of these the oldest, and all that may share its forward."""

    def __init__(self, most_rows: int = 64) -> None:
        self.costs, self.limits = Costs(), {}
        self.waiting: list[Waiting] = []
        self._most_rows = most_rows

    def add(self, waiting: Waiting) -> None:
        self.waiting.append(waiting)

    def remove(self, waiting: Waiting) -> None:
        self.waiting.remove(waiting)

    def limit(self, key: Hashable, rows: int) -> None:
        self.limits[key] = rows

    def next(self, welcome: Callable[[Waiting], bool] | None = None) -> list[Waiting]:
        if not self.waiting:
            return []
        first = min(self.waiting, key=lambda one: one.priority)
        room = self.limits.get(first.key, self._most_rows) - first.rows
        taken = [first]
        for one in self.waiting:
            if one is not first and one.key == first.key and one.rows <= room:
                taken.append(one)
                room -= one.rows
        self.waiting = [one for one in self.waiting if one not in taken]
        return taken


# --- pictures -------------------------------------------------------------------------------------------------------


def picture(seed: int = 0, width: int = 64, height: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def hole(width: int = 64, height: int = 64) -> Image.Image:
    mask = np.zeros((height, width), np.uint8)
    mask[height // 4:height // 2, width // 4:] = 255
    return Image.fromarray(mask)


# --- requests -------------------------------------------------------------------------------------------------------


@dataclass
class Request:
    """One image wanted: of which pipeline (a class; None: the model's own), with which arguments, from which turn."""

    arguments: dict[str, Any]
    kind: type | None = None
    seed: int = 0
    turn: int = 0
    scheduler: Any = None

    def call(self) -> dict[str, Any]:
        return {**self.arguments, "generator": torch.Generator().manual_seed(self.seed), "output_type": "pt"}

    def but(self, **changes: Any) -> Request:
        return Request({**self.arguments, **changes}, self.kind, self.seed, self.turn, self.scheduler)


def of(kind: type | None = None, seed: int = 0, turn: int = 0, scheduler: Any = None, **arguments: Any) -> Request:
    return Request(arguments, kind, seed, turn, scheduler)


@cache
def stock(model: str, kind: type | None = None) -> Any:
    """The stock pipeline over the tiny model's components."""
    pipeline = tiny_models.load(model)
    if kind is None or kind is type(pipeline):
        return pipeline
    wanted = kind._get_signature_keys(kind)[0]
    parts = {name: part for name, part in pipeline.components.items() if name in wanted}
    more = {"requires_safety_checker": False} if "requires_safety_checker" in kind.__init__.__code__.co_varnames else {}
    made = kind(**parts, **more)
    made.set_progress_bar_config(disable=True)
    return made


def alone(model: str, request: Request) -> torch.Tensor:
    """The image that the stock pipeline makes of it: batch x 3 x height x width, 0.0 to 1.0."""
    pipeline = copy.copy(stock(model, request.kind))
    pipeline.__dict__["scheduler"] = copy.deepcopy(request.scheduler or pipeline.scheduler)
    return pipeline(**request.call()).images


@dataclass
class Told:
    """What a stepper told."""

    ends: dict[int, Output | Exception] = field(default_factory=dict)
    progress: dict[int, list[float]] = field(default_factory=dict)
    parked: list[tuple[int, bool]] = field(default_factory=list)
    previews: list[int] = field(default_factory=list)

    def events(self) -> StepEvents:
        def ended(run: int, end: Output | Exception) -> None:
            assert run not in self.ends
            self.ends[run] = end

        return StepEvents(
            ended, lambda run, fraction: self.progress.setdefault(run, []).append(fraction),
            lambda run, whether: self.parked.append((run, whether)), lambda run, _: self.previews.append(run),
        )

    def image(self, run: int) -> torch.Tensor:
        end = self.ends[run]
        if isinstance(end, Exception):
            raise end
        return end.facts["image"]


class Desk:
    """A stepper with a tiny model's pipelines."""

    def __init__(self, model: str, row_sizes: Sequence[int] = (), shelter: Shelter | None = None) -> None:
        self.model, self.told, self.batcher = model, Told(), Fifo()
        self.stepper = Stepper(CPU, self.batcher, self.told.events(), shelter=shelter)
        self.networks = Networks(row_sizes)
        self._shared: dict[Any, SharedPipeline] = {}
        self.cancelled: set[int] = set()
        self.turn = 0

    def shared(self, kind: type | None) -> SharedPipeline:
        if kind not in self._shared:
            self._shared[kind] = SharedPipeline(stock(self.model, kind), self.networks)
        return self._shared[kind]

    def run(self, request: Request) -> PipelineRun:
        return self.shared(request.kind).start(
            request.call(), lambda result: Output(facts={"image": result.images}), request.scheduler
        )

    def join(self, number: int, request: Request, priority: int = 2, run: Any = None) -> None:
        self.stepper.join(
            number, run or self.run(request), priority=priority,
            remaining=float(request.arguments.get("num_inference_steps", 1)),
            cancelled=lambda: number in self.cancelled,
        )

    def until_done(self, requests: Sequence[Request] = (), between: Callable[[int], None] = lambda _: None) -> Told:
        waiting = dict(enumerate(requests))
        try:
            while waiting or self.stepper.busy:
                for number in [number for number, request in waiting.items() if request.turn <= self.turn]:
                    self.join(number, waiting.pop(number))
                self.stepper.advance()
                self.turn += 1
                between(self.turn)
                assert self.turn < 2000
        finally:
            torch.set_grad_enabled(True)  # other tests share this thread
        return self.told


@dataclass
class Comparison:
    differences: list[float]
    counters: StepCounters

    def equal(self) -> bool:
        return max(self.differences) <= CLOSE


def compare(model: str, requests: Sequence[Request], originals: Sequence[Request] | None = None) -> Comparison:
    """The requests together against the originals (the same, if not said otherwise) each alone."""
    desk = Desk(model)
    told = desk.until_done(requests)
    differences = [
        float((told.image(number) - alone(model, request)).abs().max())
        for number, request in enumerate(originals or requests)
    ]
    return Comparison(differences, desk.stepper.counters())


def prove(model: str, requests: Sequence[Request], rows_per_forward: float = 1.5) -> Comparison:
    """Each is the stock pipeline's image, and forwards were shared."""
    found = compare(model, requests)
    assert found.equal(), found.differences
    assert found.counters.rows_per_forward >= rows_per_forward, found.counters
    return found


@contextmanager
def spied() -> Iterator[list[tuple[str, Lane, int]]]:
    """The forwards of all networks while it lasts: (network, lane, calls)."""
    seen: list[tuple[str, Lane, int]] = []
    plain = MergedNetwork.forward

    def forward(self: MergedNetwork, calls: Any) -> Any:
        seen.append((self.name, calls[0].lane, len(calls)))
        return plain(self, calls)

    MergedNetwork.forward = forward  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        MergedNetwork.forward = plain  # type: ignore[method-assign]

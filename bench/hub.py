"""What it costs that requests share steps: CPU time per request and step, with greenlets and with threads.

    python -m bench.hub [--runs 5] [--steps 50] [--quick]

A pipeline's loop over a network that answers at once: by itself, and 1, 8 and 32 of them through the stepper, where
each sleeps at every call in a greenlet (what we use) or in a thread. The difference to the loop by itself is the hub:
stand-in, key, batcher, merge, split, and waking up. The batcher is the plainest there is. CPU time, because a machine
that is busy with something else should not count; it flatters threads, whose waiting for each other is left out. Writes
bench/results/hub.json and hub.png.
"""

from __future__ import annotations

import gc
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any
from unittest import mock

import torch
from torch import nn

from bench.common import machine_facts, write_result
from bench.runs import goal, parser, plot, print_tables, save, show, spread, table
from models.base import Output
from models.stepping import rendezvous
from models.stepping.contract import StepCall
from models.stepping.stepper import StepEvents, Stepper

COUNTS = (1, 8, 32)
FLOOR = 100.0  # microseconds per request and step


class UNet2DConditionModel(nn.Module):
    """Merged like the real one, by its name; it answers at once."""

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> tuple[torch.Tensor]:
        return (sample,)


class Loop:
    """What a diffusers pipeline does between two calls of its network, without the arithmetic."""

    def __init__(self) -> None:
        self.unet = UNet2DConditionModel()
        self.num_timesteps = 0

    @property
    def components(self) -> dict[str, Any]:
        return {"unet": self.unet}

    def __call__(self, steps: int, callback_on_step_end: Any = None) -> torch.Tensor:
        self.num_timesteps = steps
        latents, words = torch.zeros(2, 4, 8, 8), torch.zeros(2, 77, 32)
        for index, timestep in enumerate(torch.arange(steps)):
            latents = self.unet(latents, timestep, encoder_hidden_states=words, return_dict=False)[0]
            if callback_on_step_end is not None:
                callback_on_step_end(self, index, timestep, {"latents": latents})
        return latents


class ThreadRun(rendezvous.PipelineRun):
    """The same run, asleep in a thread of its own."""

    def send(self, answer: Any, /) -> StepCall:
        if self._greenlet is None:
            self._asked: SimpleQueue[Any] = SimpleQueue()
            self._answers: SimpleQueue[Any] = SimpleQueue()
            self._greenlet = threading.Thread(target=lambda: self._asked.put(self._work()))
            self._greenlet.start()
        else:
            self._answers.put(answer)
        asked = self._asked.get()
        if isinstance(asked, Output):
            self._greenlet.join()
            raise StopIteration(asked)
        return asked

    def ask(self, call: StepCall) -> Any:
        self._asked.put(call)
        return self._answers.get()


class Widest:
    """Everything that waits goes next."""

    class costs:
        @staticmethod
        def learn(key: Any, rows: int, seconds: float, variety: Any) -> None:
            pass

    def __init__(self) -> None:
        self._waiting: list[Any] = []

    def add(self, waiting: Any) -> None:
        self._waiting.append(waiting)

    def next(self, welcome: Any = None) -> list[Any]:
        taken, self._waiting = self._waiting, []
        return taken


def by_itself(count: int, steps: int) -> float:
    """CPU seconds of so many loops, one after the other."""
    loop = Loop()
    began = time.process_time()
    for _ in range(count):
        loop(steps, lambda *_: {})
    return time.process_time() - began


def together(count: int, steps: int) -> float:
    """CPU seconds of so many loops that share every forward."""
    shared = rendezvous.SharedPipeline(Loop(), rendezvous.Networks())
    ended: list[int] = []
    stepper = Stepper(torch.device("cpu"), Widest(), StepEvents(lambda run, _: ended.append(run)))  # type: ignore[arg-type]
    began = time.process_time()
    for number in range(count):
        run = shared.start({"steps": steps}, lambda result: Output())
        stepper.join(number, run, priority=2, remaining=steps, cancelled=lambda: False)
    while stepper.busy:
        stepper.advance()
    assert len(ended) == count
    return time.process_time() - began


@contextmanager
def sleeping_in(kind: type) -> Iterator[None]:
    with mock.patch.object(rendezvous, "PipelineRun", kind):
        yield


def measure(runs: int, steps: int) -> dict[str, dict[int, list[float]]]:
    """Microseconds per request and step beyond the loop by itself: by kind and number of requests, round by round."""
    kinds = {"greenlets": rendezvous.PipelineRun, "threads": ThreadRun}
    found: dict[str, dict[int, list[float]]] = {name: {count: [] for count in COUNTS} for name in kinds}
    for _ in range(runs + 1):
        for count in COUNTS:
            gc.collect()
            alone = by_itself(count, steps)
            for name, kind in kinds.items():
                with sleeping_in(kind):
                    found[name][count].append((together(count, steps) - alone) / count / steps * 1e6)
    return {name: {count: rounds[1:] for count, rounds in told.items()} for name, told in found.items()}  # one warms up


def draw(found: dict[str, dict[int, list[float]]]) -> None:
    figure, axis = plot().subplots(figsize=(5, 3.2), layout="constrained")
    for name, colour in (("greenlets", "#d1495b"), ("threads", "#30638e")):
        axis.plot(COUNTS, [statistics.median(found[name][count]) for count in COUNTS], "o-", color=colour, label=name)
    axis.axhline(FLOOR, color="#666666", linestyle=":", linewidth=1)
    axis.set_xscale("log", base=2)
    axis.set_xticks(COUNTS, [str(count) for count in COUNTS])
    axis.set_ylim(0)
    axis.set_xlabel("requests that share their steps", fontsize=8)
    axis.set_ylabel("CPU µs per request and step", fontsize=8)
    axis.legend(fontsize=8)
    figure.suptitle("What the hub costs (dotted: the most it may)", fontsize=10)
    save(figure, "hub")


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--steps", type=int, default=50)
    given = arguments.parse_args()
    runs = 2 if given.quick else given.runs
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    facts = machine_facts(("torch", "greenlet"))
    found = measure(runs, given.steps)
    shown = [table("CPU µs per request and step", ["sleeping in", *(f"{count} requests" for count in COUNTS)], (
        [name, *(show(spread(told[count], 1), "{:.0f}") for count in COUNTS)] for name, told in found.items()
    ))]
    reached = [
        goal(f"CPU of the hub per request and step, {count} at once", "≤ 100 µs", spread(found["greenlets"][count], 1),
             spread(found["greenlets"][count], 1)["median"] <= FLOOR, "{:.0f}", " µs")
        for count in COUNTS
    ]
    print_tables(shown, reached)
    write_result("hub", facts, {
        "about": "what it costs that requests share steps: a pipeline's loop around a network that answers at once",
        "runs": runs, "steps": given.steps, "goals": reached, "tables": shown, "microseconds": found,
    })  # fmt: skip
    draw(found)


if __name__ == "__main__":
    main()

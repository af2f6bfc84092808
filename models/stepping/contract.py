"""What a run, a network and an adapter of the step machinery are to each other.

A run is a coroutine: it yields the forwards that it waits for (`StepCall`) and is sent their answers. `Stepper` holds
the runs of one device and decides with a `StepBatcher` which calls go next; a `Network` runs them as one forward.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol

from models.base import Adapter, Item, Output


class Lane(IntEnum):
    """What a forward is for: text and image encoders; denoiser and ControlNet; the VAE's way back to pixels."""

    ENCODE = 0
    DENOISE = 1
    DECODE = 2


@dataclass(eq=False, slots=True)
class StepCall:
    """One forward of one network that a run waits for. `args` and `kwargs` are what the network's `forward` takes.

    `rows`: how many samples it carries. Calls of equal `key` may share a forward: it names the network object, all
    shapes, and whatever else the network takes once for the whole batch (position ids, flags, ...).

    `variant`: what each call brings of its own, as its LoRAs; None: nothing. Calls of one key and different variants
    may share a forward where that is measured to pay; each forward is measured by whether it carried none, one or
    several.
    """

    network: Network
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rows: int
    key: Hashable
    lane: Lane
    variant: Hashable = None


class Network(Protocol):
    """One network's weights on the device. `name` is for people and for measurements, as "unet"."""

    name: str

    def forward(self, calls: Sequence[StepCall]) -> list[Any]:
        """One merged forward of calls of one key; their answers in the calls' order.

        Raises whatever the network raises, for all of them: the caller finds out whose fault it was.
        """


class StepRun(Protocol):
    """One image's way through its networks: a generator, or what behaves like one.

    `send(None)` starts it. A list of calls may run in any order or together, and is answered by a list. The value of
    its StopIteration is the `Output`.
    """

    def send(self, answer: Any, /) -> StepCall | list[StepCall]:
        """The answer to what it waits for; what it waits for next."""

    def throw(self, fault: BaseException, /) -> StepCall | list[StepCall]:
        """A fault in place of the answer; a run that survives it asks for something else."""

    def close(self) -> None:
        """End it where it waits, without another forward."""


class StepAdapter(Adapter):
    """A model whose items run step by step, so that they share forwards, wait for more urgent ones and report.

    An adapter of this kind that is asked for a whole batch (`run`) gives the batch a stepper of its own.
    """

    @abstractmethod
    def start(self, item: Item) -> StepRun:
        """The item's run, not started."""

    def remaining(self, item: Item) -> float:
        """How many forwards of the denoiser the item will need, as far as can be told before it starts."""
        return 1.0

    def owns(self, part: object) -> bool:
        """Whether it is one of this model's networks, as they stand in the keys of its calls."""
        return False

    def run(self, items: Sequence[Item]) -> list[Output | Exception]:
        """In the items' order their outputs, or what ended a run instead."""
        from models.stepping.stepper import run_all  # it is built on these words

        return run_all(self, items)

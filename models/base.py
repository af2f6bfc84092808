"""What a worker asks of a model: `Adapter.run(items) -> outputs`, one batch of one group at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from core.errors import OutOfMemory
from core.model import ModelSpec


def _ignore(_: object) -> None:
    pass


def _never() -> bool:
    return False


@dataclass(slots=True)
class Item:
    """One decoded job. `image` is uint8 H x W x 3, RGB, upright; `mask` uint8 H x W (255 = change here) or None;
    `alpha` uint8 H x W or None, the image's own transparency, which the worker puts back onto the result by itself.
    `control` uint8 H x W x 3 guides the drawing (edges, depth, a pose), `references` are further pictures to look at,
    of any size; what is made from words alone has no image. `size` is height and width that the result must have. Raw
    models (`ModelSpec.raw`) get `data`, the encoded bytes, and no pixels. `previews`: somebody wants to see a stepped
    model's image grow. `report(fraction)` tells progress 0.0-1.0; `cancelled()` turns true when nobody wants the result
    any more. `done(result)` may hand the result over, at most once, while others of the batch still run: it is encoded
    and answered at once."""

    params: Mapping[str, Any]
    image: np.ndarray | None = None
    mask: np.ndarray | None = None
    alpha: np.ndarray | None = None
    control: np.ndarray | None = None
    references: Sequence[np.ndarray] = ()
    size: tuple[int, int] = (0, 0)
    data: memoryview | None = None
    previews: bool = False
    report: Callable[[float], None] = _ignore
    cancelled: Callable[[], bool] = _never
    done: Callable[[Output | Exception], None] = _ignore


@dataclass(slots=True)
class Output:
    """One result. `image` is uint8 h x w x 3 (RGB), h x w x 4 (RGBA) or h x w (grey); raw models give `data`, which may
    be a view of an item's.
    `facts` is plain data told to the client beside the pixels."""

    image: np.ndarray | None = None
    data: bytes | memoryview | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


class DoesNotFit(OutOfMemory):
    """The model is too large for the device even if it had it to itself."""


class Adapter(ABC):
    """One model on one device. Constructors build, `load` loads, `prepare` looks ahead, `run` runs. What runs for long
    calls `models.checkpoint.checkpoint()` between its parts, so that a client that left does not keep the device."""

    def __init__(self, options: Mapping[str, Any], device: torch.device) -> None:
        self.options = options
        self.device = device

    def load(self) -> None:  # noqa: B027  (most have nothing to load)
        """Bring weights to the device. Classical models have none."""

    def warm_up(self) -> None:  # noqa: B027
        """Run once so that the first request does not pay for lazy initialisation."""

    def compile(self, spec: ModelSpec, tell: Callable[[str], None]) -> None:  # noqa: B027
        """What takes minutes and is done only before the worker says that it is ready, after `warm_up`: never for a
        model that is loaded by its first request. `spec`: what requests of the model are like. `tell(what)` before each
        part: the boot may take that long anew. What it raises is told to the log, and the model serves."""

    def prepare(self, item: Item) -> None:  # noqa: B027
        """What an item needs that can be done before the device has time for it, as reading a file. Called once for
        each, in a codec thread, beside whatever else the model does; what it raises fails the item."""

    def close(self) -> None:  # noqa: B027
        """It will not run any more: give back what would not go by itself. Also called where `load` has failed."""

    @abstractmethod
    def run(self, items: Sequence[Item]) -> Sequence[Output | Exception]:
        """Outputs in the items' order, also of those already handed over (`Item.done`); an exception in place of one
        fails that item alone. All items are of one group: of one image size, unless the model's spec says
        `mixed_sizes`; their parameters may differ.

        An item's result must not depend on its companions. Raises `torch.cuda.OutOfMemoryError` (or MemoryError) when
        the batch does not fit; any other exception makes the worker run each item alone to find the guilty one."""

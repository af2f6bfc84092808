"""Where a host would wait for its device, seen on a CPU: what would lie on the device is marked, and whoever asks for
the value of something marked is counted.

A GPU works behind the host. The host waits for it when it asks for a value (`item`, `if tensor`, an index), when it
copies to the host, and when it copies memory that is not pinned to the device.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from step_kit import Fifo
from torch import Tensor
from torch.overrides import TorchFunctionMode

from models.base import Item, Output
from models.stepping.contract import StepAdapter, StepCall
from models.stepping.merge import MergedNetwork, each_tensor
from models.stepping.stepper import StepEvents, Stepper

VALUES = {
    "item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__contains__", "__array__",
    "nonzero", "argwhere", "unique", "masked_select", "equal", "allclose", "is_nonzero", "bincount", "__complex__",
    "__format__",
}  # fmt: skip
MAKERS = {"tensor", "as_tensor"}  # from what the host has; `full`, `zeros` and the like are made where they are wanted
FILLERS = {"zeros", "ones", "full", "empty", "arange", "linspace", "eye", "rand", "randn", "empty_strided"}


class Far(Tensor):
    """A tensor that would lie on the device; so does whatever is computed from it."""


def far(tensor: Tensor) -> Tensor:
    return tensor if isinstance(tensor, Far) else tensor.as_subclass(Far)


class Watch(TorchFunctionMode):
    """While it is on. `waits`: by what and where, how often the host would have waited. A device that is given as
    `torch.device` is the device, "cpu" is the host."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return func(*args, **kwargs)
        marked = any(isinstance(one, Far) for one in args[:1])
        if marked and (name in VALUES or (name in ("to", "copy_") and _to_host(name, args, kwargs))):
            self._count(name)
            return _plain(func(*args, **kwargs))
        if name in ("__getitem__", "__setitem__") and _asks(args[0], args[1]):
            self._count("index")
        if name in MAKERS and (isinstance(args[0], Far) or _holds_far(args[0])):
            self._count(name)  # what holds numbers of the device is read there
            return _plain(func(*args, **kwargs))
        answer = func(*args, **kwargs)
        device = kwargs.get("device")
        if name in MAKERS and isinstance(device, torch.device):
            self._count(f"{name} to the device")
            return far(answer)
        if name == "randn" and kwargs.get("generator") is not None:
            self._count("noise to the device")  # it is drawn on the host, whatever is asked for: so do our requests
            return far(answer)
        if name in FILLERS and isinstance(device, torch.device):
            return far(answer)
        if name == "to" and not marked and _device_of(args, kwargs) is not None:
            if not kwargs.get("non_blocking") and not _on_device(args[0]):
                self._count("to the device")
            return far(answer)
        return answer

    def _count(self, what: str) -> None:
        self.waits[f"{what} in {_place()}"] += 1


def _device_of(args: Any, kwargs: Any) -> torch.device | None:
    found = [one for one in (*args[1:], *kwargs.values()) if isinstance(one, (torch.device, Tensor))]
    return (found[0] if isinstance(found[0], torch.device) else found[0].device) if found else None


def _on_device(tensor: Any) -> bool:
    return isinstance(tensor, (Far, torch.nn.Parameter))


def _to_host(name: str, args: Any, kwargs: Any) -> bool:
    return name == "to" and ("cpu" in args[1:] or kwargs.get("device") == "cpu") and not (
        isinstance(kwargs.get("device"), torch.device))


def _asks(tensor: Any, index: Any) -> bool:
    """Whether the index's values decide what comes out: a mask of the device, or a table of the host."""
    for one in index if isinstance(index, tuple) else (index,):
        if isinstance(one, Far) and (one.dtype is torch.bool or not _on_device(tensor)):
            return True
    return False


def _holds_far(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and any(isinstance(one, Far) or _holds_far(one) for one in value)


def _plain(value: Any) -> Any:
    return value.as_subclass(Tensor) if isinstance(value, Far) else value


def _place() -> str:
    """The nearest line that is not torch's or this file's."""
    frame = sys._getframe(2)
    while frame and any(part in frame.f_code.co_filename for part in ("/torch/", "sync_kit")):
        frame = frame.f_back
    return f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_code.co_name}" if frame else "?"


def steady(made: StepAdapter, *items: Item) -> list[Counter[str]]:
    """What is waited for between one forward of the denoiser and the next, while these requests share every forward;
    the first entry is of the first step. The answers of all networks count as being on the device."""
    watch, told, plain = Watch(), [], MergedNetwork.forward
    ends: dict[int, Any] = {}
    stepper = Stepper(made.device, Fifo(), StepEvents(ends.__setitem__))  # type: ignore[arg-type]

    def forward(self: MergedNetwork, calls: Sequence[StepCall]) -> list[Any]:
        if self.name in ("unet", "transformer"):
            told.append(Counter(watch.waits))
        return each_tensor(plain(self, calls), far)

    MergedNetwork.forward = forward  # type: ignore[method-assign]
    try:
        with torch.no_grad(), watch:
            for number, item in enumerate(items):
                stepper.join(number, made.start(item), priority=2, remaining=1.0, cancelled=item.cancelled)
            while stepper.busy:
                stepper.advance()
    finally:
        MergedNetwork.forward = plain  # type: ignore[method-assign]
    assert len(ends) == len(items) and all(isinstance(end, Output) for end in ends.values()), ends
    return [after - before for before, after in pairwise(told)]

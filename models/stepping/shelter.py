"""What a waiting run needs on the device can wait in host memory: its call's tensors move there in place, and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from models.stepping.contract import StepCall


class Shelter:
    """Moves tensors of parked calls to the host (pinned, where the device is a GPU) and back, exactly as they were.

    In place: whoever holds a tensor, the sleeping pipeline above all, holds it still. Weights stay where they are. On
    a device that shares the host's memory there is nothing to move.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._needed = device.type != "cpu"
        self._away: WeakIdKeyDictionary = WeakIdKeyDictionary()  # a run that ends forgets its tensors by itself

    def move_out(self, calls: Iterable[StepCall]) -> int:
        """Bytes of device memory that the calls no longer need."""
        moved = 0
        for tensor in _tensors([(call.args, call.kwargs) for call in calls]) if self._needed else ():
            if tensor.device.type == self._device.type and tensor not in self._away:
                moved += tensor.numel() * tensor.element_size()
                tensor.data = self._out(tensor)
                self._away[tensor] = True
        return moved

    def bring_back(self, calls: Iterable[StepCall]) -> int:
        """How many tensors had to come back so that the calls can run. Raises torch's error if there is no room."""
        if not self._away:
            return 0
        back = 0
        for tensor in _tensors([(call.args, call.kwargs) for call in calls]):
            if tensor in self._away:
                tensor.data = self._back(tensor)
                del self._away[tensor]  # not before: without room for it, it is still away
                back += 1
        return back

    def _out(self, tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor)

    def _back(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, non_blocking=True)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in it that is no weight."""
    if isinstance(value, Tensor):
        if not isinstance(value, nn.Parameter):
            yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)

"""Networks whose weights come to the device when they run, with the LoRAs of the request that runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from models.diffusion.lora import Adapters, LoraRack
from models.diffusion.memory import DeviceMemory
from models.stepping.contract import Lane, StepCall
from models.stepping.merge import MergedNetwork
from models.stepping.rendezvous import Networks


class HostedNetworks(Networks):
    """The networks of one model with one set of LoRAs."""

    def __init__(self, memory: DeviceMemory, rack: LoraRack, adapters: Adapters, row_sizes: Sequence[int] = ()) -> None:
        super().__init__(row_sizes)
        self._memory, self._rack, self._adapters = memory, rack, adapters

    def make(self, name: str, module: nn.Module, lane: Lane, method: str) -> HostedNetwork:
        return HostedNetwork(name, module, lane, method, self._row_sizes, self._memory, self._rack, self._adapters)


class HostedNetwork(MergedNetwork):
    """One network with one set of LoRAs. Two of the same module and set are equal: their calls share forwards, and what
    was learnt of one's cost holds for the other."""

    def __init__(
        self, name: str, module: nn.Module, lane: Lane, method: str, row_sizes: Sequence[int], memory: DeviceMemory,
        rack: LoraRack, adapters: Adapters,
    ) -> None:
        super().__init__(name, module, lane, method, row_sizes)
        self._memory, self._rack, self._adapters = memory, rack, adapters
        self._identity = id(module), method, adapters
        memory.enter(module)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HostedNetwork) and other._identity == self._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    def welcome(self) -> bool:
        """Whether it can run now without driving other weights out that have just come."""
        return self._memory.welcome(self.module)

    def forward(self, calls: Sequence[StepCall]) -> list[Any]:
        self._memory.bring(self.module)
        self._rack.activate(self.module, self._adapters)
        return super().forward(calls)

"""Networks whose weights come to the device when they run, with the LoRAs of the request that runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from models.diffusion.lora import Adapters, LoraRack
from models.diffusion.memory import DeviceMemory
from models.stepping.compiled import CompiledForward, Compilers
from models.stepping.contract import Lane, StepCall
from models.stepping.merge import MergedNetwork
from models.stepping.rendezvous import Networks

COMPILED_ROWS = (1, 2, 4, 8)


class HostedNetworks(Networks):
    """The networks of one model with one set of LoRAs. `compilers`: of its denoisers; compiled forwards have fixed row
    sizes, `COMPILED_ROWS` unless others are given."""

    def __init__(
        self, memory: DeviceMemory, rack: LoraRack, adapters: Adapters, row_sizes: Sequence[int] = (),
        compilers: Compilers | None = None,
    ) -> None:
        super().__init__(row_sizes)
        self._memory, self._rack, self._adapters = memory, rack, adapters
        self._compilers = compilers or Compilers()

    def make(self, name: str, module: nn.Module, lane: Lane, method: str) -> HostedNetwork:
        sizes, compiled = self._row_sizes, None
        if lane is Lane.DENOISE and (compiled := self._compilers.of(name, module)):
            sizes = sizes or COMPILED_ROWS
        return HostedNetwork(name, module, lane, method, sizes, self._memory, self._rack, self._adapters, compiled)


class HostedNetwork(MergedNetwork):
    """One network with one set of LoRAs. Two of the same module and set are equal: their calls share forwards, and what
    was learnt of one's cost holds for the other."""

    def __init__(
        self, name: str, module: nn.Module, lane: Lane, method: str, row_sizes: Sequence[int], memory: DeviceMemory,
        rack: LoraRack, adapters: Adapters, compiled: CompiledForward | None = None,
    ) -> None:
        super().__init__(name, module, lane, method, row_sizes, compiled)
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

    def compilable(self, calls: Sequence[StepCall]) -> bool:
        """Forwards with LoRAs run as they are written: what was compiled has none."""
        return not self._adapters

    def forward(self, calls: Sequence[StepCall]) -> list[Any]:
        self._memory.bring(self.module)
        self._rack.activate(self.module, self._adapters)
        return super().forward(calls)

    def prepare(self, call: StepCall, tell: Callable[[str], None], tokens: Sequence[int] = ()) -> None:
        self._memory.bring(self.module)
        super().prepare(call, tell, tokens)

"""Networks whose weights come to the device when they run, with the LoRAs of the requests that run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from models.diffusion.lora import LoraRack
from models.diffusion.lora_mix import Adapters, Unmixable
from models.diffusion.memory import DeviceMemory
from models.stepping.contract import Lane, StepCall
from models.stepping.merge import MergedNetwork, merges, set_apart
from models.stepping.rendezvous import Networks


class HostedNetworks(Networks):
    """The networks of one model as requests with one set of LoRAs call them."""

    def __init__(self, memory: DeviceMemory, rack: LoraRack, adapters: Adapters, row_sizes: Sequence[int] = ()) -> None:
        super().__init__(row_sizes)
        self._memory, self._rack, self._adapters = memory, rack, adapters

    def make(self, name: str, module: nn.Module, lane: Lane, method: str) -> HostedNetwork:
        return HostedNetwork(name, module, lane, method, self._row_sizes, self._memory, self._rack, self._adapters)


class HostedNetwork(MergedNetwork):
    """One network as requests with one set of LoRAs call it. Two of the same module are equal, whatever their sets:
    their calls share forwards, in which each row has its own set (see `lora_mix.py`).

    Where sets cannot be mixed, or bits must not depend on the company (`row_sizes`), the set is part of the calls' key.
    """

    def __init__(
        self, name: str, module: nn.Module, lane: Lane, method: str, row_sizes: Sequence[int], memory: DeviceMemory,
        rack: LoraRack, adapters: Adapters,
    ) -> None:
        super().__init__(name, module, lane, method, row_sizes)
        self.adapters = rack.worn(module, adapters)
        self._memory, self._rack = memory, rack
        self._identity = id(module), method
        self._strict = bool(row_sizes)
        memory.enter(module)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HostedNetwork) and other._identity == self._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    def welcome(self) -> bool:
        """Whether it can run now without driving other weights out that have just come."""
        return self._memory.welcome(self.module)

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> StepCall:
        made = super().call(args, kwargs)
        if not self.adapters:
            return made
        if merges(made) and not self._strict and self._rack.mixes(self.module, self.adapters):
            made.variant = self.adapters
        else:
            set_apart(made, self.adapters)
        return made

    def forward(self, calls: Sequence[StepCall]) -> list[Any]:
        self._memory.bring(self.module)
        rows: list[Adapters] = []
        for call in calls:
            assert isinstance(call.network, HostedNetwork)
            rows += [call.network.adapters] * call.rows
        if len(set(rows)) == 1:
            self._rack.wear(self.module, rows[:1])  # filled-up rows, too
            return super().forward(calls)
        try:
            self._rack.wear(self.module, rows)
            return super().forward(calls)
        except Unmixable:
            self._rack.separate(self.module)
        return self._by_sets(calls)

    def _by_sets(self, calls: Sequence[StepCall]) -> list[Any]:
        """One forward for each set, for calls that turn out not to be mixed; the next will have keys of their own."""
        groups: dict[Adapters, list[int]] = {}
        for place, call in enumerate(calls):
            groups.setdefault(call.network.adapters, []).append(place)  # type: ignore[attr-defined]
        answers: dict[int, Any] = {}
        for places in groups.values():
            answers.update(zip(places, self.forward([calls[place] for place in places]), strict=True))
        return [answers[place] for place in range(len(calls))]

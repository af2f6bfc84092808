"""Networks whose weights come to the device when they run, with the LoRAs of the requests that run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from models.diffusion.lora import LoraRack
from models.diffusion.lora_mix import Adapters, Unmixable
from models.diffusion.memory import DeviceMemory
from models.stepping.compiled import CompiledForward, Compilers
from models.stepping.contract import Lane, StepCall
from models.stepping.merge import MergedNetwork, merges, set_apart
from models.stepping.rendezvous import Networks

COMPILED_ROWS = (1, 2, 4, 8)


class HostedNetworks(Networks):
    """The networks of one model as requests with one set of LoRAs call them. `compilers`: of its denoisers; compiled
    forwards have fixed row sizes, `COMPILED_ROWS` unless others are given."""

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
        return HostedNetwork(
            name, module, lane, method, sizes, self._memory, self._rack, self._adapters, compiled,
            strict=bool(self._row_sizes),
        )


class HostedNetwork(MergedNetwork):
    """One network as requests with one set of LoRAs call it. Two of the same module are equal, whatever their sets:
    their calls share forwards, in which each row has its own set (see `lora_mix.py`).

    Where sets cannot be mixed, or bits must not depend on the company (`strict`), the set is part of the calls' key.
    """

    def __init__(
        self, name: str, module: nn.Module, lane: Lane, method: str, row_sizes: Sequence[int], memory: DeviceMemory,
        rack: LoraRack, adapters: Adapters, compiled: CompiledForward | None = None, *, strict: bool = False,
    ) -> None:
        super().__init__(name, module, lane, method, row_sizes, compiled)
        self.adapters = rack.worn(module, adapters)
        self._memory, self._rack = memory, rack
        self._identity = id(module), method
        self._strict = strict
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
        rows += rows[-1:] * self._missing(len(rows))
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

    def compilable(self, calls: Sequence[StepCall]) -> bool:
        """Forwards with LoRAs run as they are written: what was compiled has none."""
        return not any(call.network.adapters for call in calls)  # type: ignore[attr-defined]

    def prepare(self, call: StepCall, tell: Callable[[str], None], tokens: Sequence[int] = ()) -> None:
        self._memory.bring(self.module)
        super().prepare(call, tell, tokens)

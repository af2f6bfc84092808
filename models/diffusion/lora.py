"""LoRAs of a model: attached when a request names them, worn by its rows only.

Files are attached beside each other with diffusers and peft; which of them count for which row is decided before each
forward (`lora_mix.py`), so requests with different sets are under way at the same time and share forwards. The folder
is looked at for every request: a file that is new, or has another size or date than the attached one, is attached again
under another name; what nobody uses any more is taken off.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from itertools import count
from typing import Any, NoReturn

import torch
from torch import nn

from core.errors import BadRequest, InvalidParameter, OutOfMemory
from core.loras import Lora, LoraFolder
from models.calls import lacks_memory
from models.diffusion.lora_file import examine
from models.diffusion.lora_mix import Adapters, LoraMix, tuner_layers
from models.diffusion.memory import DeviceMemory

LEAST_SHARE = 0.5  # of a file's layers that must find their place, or it was made for another model
KNOWN_FILES = 256  # of which is remembered what they are


class LoraSet:
    """What a request has on. As long as it lives, its adapters stay attached."""

    __slots__ = ("__weakref__", "adapters")

    def __init__(self, adapters: Adapters = ()) -> None:
        self.adapters = adapters


NONE = LoraSet()


class LoraRack:
    """The LoRAs that are attached to a model's networks. `most`: how many stay attached while nobody uses them."""

    def __init__(self, pipeline: Any, folder: LoraFolder | None, memory: DeviceMemory, most: int = 8) -> None:
        self._pipeline, self._folder, self._memory, self._most = pipeline, folder, memory, most
        self._attached: dict[Lora, str] = {}  # the least recently asked first
        self._refused: dict[Lora, str] = {}
        self._sets: weakref.WeakSet[LoraSet] = weakref.WeakSet()
        self._numbers = count(1)
        self._examined: dict[Lora, int] = {}  # their numbers of layers; codec threads write here too
        self._mixes: dict[int, LoraMix] = {}  # by module

    def read(self, wanted: Sequence[tuple[str, float]]) -> None:
        """Read and check the files, which then lie in the system's cache; may be called in any thread. Raises
        `InvalidParameter` when one of them is not there or is broken."""
        for name, _ in wanted if self._folder else ():
            self._layers_in(self._folder.get(name))

    def take(self, wanted: Sequence[tuple[str, float]]) -> LoraSet:
        """The set of these names and weights, attached. Raises `InvalidParameter` when one of them is not there, is
        broken or was made for another model."""
        if not wanted:
            return NONE
        if self._folder is None or not hasattr(self._pipeline, "load_lora_weights"):
            raise InvalidParameter("this model takes no LoRA", parameter="lora_name")
        known = [(self._folder.get(name), weight) for name, weight in wanted]
        chosen = LoraSet(tuple((self._adapter(lora), weight) for lora, weight in known))
        self._sets.add(chosen)
        self._tidy()
        return chosen

    def worn(self, module: nn.Module, adapters: Adapters) -> Adapters:
        """Those of a set that change anything in this module."""
        return self._mix(module).of(adapters)

    def mixes(self, module: nn.Module, adapters: Adapters) -> bool:
        """Whether a row with these may share a forward of the module with others."""
        return self._mix(module).mixes(adapters)

    def wear(self, module: nn.Module, rows: Sequence[Adapters]) -> None:
        """Have the rows of the module's next forward run with these and no others; one entry stands for all rows.
        Raises `Unmixable` for sets that differ and cannot be mixed."""
        self._mix(module).wear(rows)

    def separate(self, module: nn.Module) -> None:
        """Sets of this module do not mix after all. It holds until a LoRA comes or goes."""
        self._mix(module).separate()

    def __len__(self) -> int:
        return len(self._attached)

    # --- attaching and taking off -----------------------------------------------------------------------------------

    def _adapter(self, lora: Lora) -> str:
        name = self._attached.pop(lora, None) or self._attach(lora)
        self._attached[lora] = name
        return name

    def _attach(self, lora: Lora) -> str:
        assert self._folder is not None
        expected = self._layers_in(lora)
        file, name = self._folder.file(lora.name), f"lora{next(self._numbers)}"
        why = ""
        try:
            with torch.inference_mode(False), torch.no_grad():  # what is made here is used under other modes too
                self._pipeline.load_lora_weights(
                    str(file.parent), weight_name=file.name, adapter_name=name, local_files_only=True
                )
                found = self._settle(name)
            if found < expected * LEAST_SHARE:
                why = f"only {found} of its {expected} layers have a place in this model"
        except Exception as fault:
            if lacks_memory(fault) or isinstance(fault, OutOfMemory):
                self._take_off(name)
                raise
            print(f"LoRA {lora.name}: {type(fault).__name__}: {fault}", file=sys.stderr)
            why = "its layers do not fit this model's; it was made for another one"
        if why:
            self._take_off(name)
            self._refuse(lora, why)
        return name

    def _layers_in(self, lora: Lora) -> int:
        """How many layers the file has. Raises `InvalidParameter` for one that cannot be used."""
        if lora in self._refused:
            raise InvalidParameter(self._refused[lora], parameter="lora_name")
        layers = self._examined.get(lora)
        if layers is None:
            assert self._folder is not None
            try:
                layers = examine(self._folder.file(lora.name)).layers
            except BadRequest as fault:
                self._refuse(lora, fault.message)
            _keep(self._examined, lora, layers)
        return layers

    def _refuse(self, lora: Lora, why: str) -> NoReturn:
        sentence = f"the LoRA '{lora.name}' cannot be used: {why}"
        _keep(self._refused, lora, sentence)
        raise InvalidParameter(sentence, parameter="lora_name")

    def _settle(self, name: str) -> int:
        """Count the layers that were attached, and measure their networks anew."""
        self._forget_mixes()
        touched = {module: layers for module in self._modules() if (layers := self._with(module, name))}
        for module in touched:
            module.eval()
            self._memory.enter(module)
        return sum(map(len, touched.values()))

    def _tidy(self) -> None:
        """Take off what is attached beyond the most, or was replaced by another file of its name."""
        needed = {name for loras in self._sets for name, _ in loras.adapters}
        newest = {lora.name: lora for lora in self._attached}
        for lora, name in list(self._attached.items()):
            too_many = len(self._attached) > self._most
            if name not in needed and (too_many or newest[lora.name] != lora):
                del self._attached[lora]
                self._take_off(name)

    def _take_off(self, name: str) -> None:
        self._forget_mixes()
        touched = {module: layers for module in self._modules() if (layers := self._with(module, name))}
        for module, layers in touched.items():
            for layer in layers:
                layer.delete_adapter(name)
            getattr(module, "peft_config", {}).pop(name, None)
        for module in touched:
            self._memory.enter(module)

    def _forget_mixes(self) -> None:
        for mix in self._mixes.values():
            mix.release()
        self._mixes.clear()

    def _modules(self) -> list[nn.Module]:
        return [module for module in self._pipeline.components.values() if isinstance(module, nn.Module)]

    def _with(self, module: nn.Module, name: str) -> list[Any]:
        return [layer for layer in tuner_layers(module) if name in layer._all_available_adapter_names()]

    def _mix(self, module: nn.Module) -> LoraMix:
        found = self._mixes.get(id(module))
        if found is None:
            found = self._mixes[id(module)] = LoraMix(module)
            self._memory.accompany(module, found.forget)
        return found


def _keep(known: dict[Lora, Any], lora: Lora, what: Any) -> None:
    """Remember it, and not too many others."""
    known[lora] = what
    for oldest in list(known)[:-KNOWN_FILES]:
        known.pop(oldest, None)

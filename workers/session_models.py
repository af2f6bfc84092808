"""The models of one worker. One that cannot be loaded is refused with a sentence, and the others serve."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable, Sequence

import torch

from core.errors import ImagePoolError, ModelFailed, OutOfMemory
from core.model import ModelSpec
from models.base import Adapter
from models.calls import lacks_memory
from workers.process import boot_failure_words


class Shelf:
    """`adapters`: the loaded models by name. `refused`: why others could not be loaded.

    alike: all devices of the server are of one kind, so that what does not fit this one fits none. Otherwise such a
    device is given up as a whole: jobs would fail here that another device could do.
    """

    def __init__(self, specs: Sequence[ModelSpec], *, warm_up: bool, alike: bool) -> None:
        self._specs, self._warm_up, self._alike = specs, warm_up, alike
        self.adapters: dict[str, Adapter] = {}
        self.refused: dict[str, str] = {}

    def fill(self, device: torch.device, tell: Callable[[str, float], None]) -> None:
        """Load what is to be loaded at the start; `tell(model, fraction)` before each. Raises when no model is left, or
        when the device is to blame: out of memory, or broken."""
        preload = [spec for spec in self._specs if spec.preload]
        for done, spec in enumerate(preload):
            tell(spec.name, (done + 0.5) / (len(preload) + 1))
            try:
                self.adapter(spec, device)
            except Exception as fault:
                said = f"model '{spec.name}' cannot be loaded: {boot_failure_words(fault)}"
                if self._blames(fault, device) or len(self.refused) == len(self._specs) - 1:
                    raise ModelFailed(said) from fault
                traceback.print_exception(fault)
                self.refused[spec.name] = said

    def adapter(self, spec: ModelSpec, device: torch.device) -> Adapter:
        """The loaded model. Raises whatever keeps it from loading, `ModelFailed` where it was refused."""
        if spec.name in self.refused:
            raise ModelFailed(self.refused[spec.name])
        if spec.name not in self.adapters:
            module, _, name = spec.adapter.partition(":")
            adapter: Adapter = getattr(importlib.import_module(module), name)(spec.options, device)
            adapter.load()
            if self._warm_up:
                adapter.warm_up()
            self.adapters[spec.name] = adapter
        return self.adapters[spec.name]

    def _blames(self, fault: Exception, device: torch.device) -> bool:
        """Whether it is the device that failed, rather than the model."""
        if isinstance(fault, OutOfMemory):
            return not self._alike
        if lacks_memory(fault):
            return True
        if device.type != "cuda" or isinstance(fault, ImagePoolError):
            return False
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:
            return True
        return False

"""The models that a worker has loaded: loaded and warmed up when they are first needed, closed when room is needed.

One that should be preloaded and cannot be is refused with a sentence, and the others serve; where the host has just no
memory for it, its first request tries again. Models that are preloaded stay. Of the others the one not used for longest
is closed when more are loaded than the operator wants, or when another one finds no memory; its next request loads it
again.
"""

from __future__ import annotations

import gc
import sys
import time
import traceback

import torch

from core.errors import ModelFailed, OutOfMemory
from core.model import ModelSpec
from models.base import Adapter, DoesNotFit
from models.calls import lacks_memory
from models.classes import adapter_class, add_folder, check_module
from workers.channel import WorkerEnd
from workers.messages import Boot, Loading, Progress
from workers.process import boot_failure_words
from workers.session_steps import Steps

LONGEST = 120.0  # seconds that one model's forwards may be measured
BRIEF = 10.0  # the same of one that is loaded for a request, while all others wait
SHARE = 0.5  # of what is left of the time for booting that they may be measured


class Models:
    """`refused`: by name, why models could not be preloaded."""

    def __init__(self, boot: Boot, device: torch.device, channel: WorkerEnd, steps: Steps) -> None:
        self._boot, self._device, self._channel, self._steps = boot, device, channel, steps
        self._loaded: dict[str, Adapter] = {}  # the one used last stands last
        self.refused: dict[str, str] = {}
        self._booting = False
        add_folder(boot.models_folder)

    def __len__(self) -> int:
        return len(self._loaded)

    def __contains__(self, name: object) -> bool:
        return name in self._loaded

    def preload(self) -> None:
        """Load what is to be loaded before the worker is ready, and tell how far that is. Raises when no model is left,
        or when the device is to blame: out of memory, or broken."""
        specs = [spec for spec in self._boot.specs if spec.preload]
        self._refuse_missing()
        self._booting, lacking = True, len(self.refused)
        for done, spec in enumerate(specs):
            self._told = (done + 0.5) / (len(specs) + 1)
            self._channel.send(Progress(f"loading {spec.name}", self._told))
            try:
                self.get(spec)
            except Exception as fault:
                said = f"model '{spec.name}' cannot be loaded: {boot_failure_words(fault)}"
                lacking += 1
                if self._blames(fault) or lacking == len(self._boot.specs):
                    raise ModelFailed(said) from fault
                if _lacks_room(fault):
                    print(f"{said}; its first request tries again", file=sys.stderr)
                    continue
                traceback.print_exception(fault)
                self.refused[spec.name] = said
        self._booting = False

    def _refuse_missing(self) -> None:
        """Of models that are loaded when they are asked for, those whose code is not there. Raises when no model is
        left."""
        for spec in self._boot.specs:
            if not spec.preload:
                try:
                    check_module(spec.adapter, self._boot.models_folder)
                except ModelFailed as fault:
                    self.refused[spec.name] = f"model '{spec.name}' cannot be loaded: {fault.message}"
        if self._boot.specs and len(self.refused) == len(self._boot.specs):
            raise ModelFailed(next(iter(self.refused.values())))

    def get(self, spec: ModelSpec, batch: int | None = None) -> Adapter:
        """The loaded model. The master hears when it is loaded for a batch. Raises whatever keeps it from loading,
        `ModelFailed` where it was refused."""
        if spec.name in self.refused:
            raise ModelFailed(self.refused[spec.name])
        adapter = self._loaded.pop(spec.name, None)
        if adapter is None:
            if batch is None:
                adapter = self._load_somehow(spec)
            else:
                self._channel.send(Loading(batch, spec.name, done=False))
                try:
                    adapter = self._load_somehow(spec)
                finally:
                    self._channel.send(Loading(batch, spec.name, done=True))
        self._loaded[spec.name] = adapter
        return adapter

    def ready(self, name: str) -> Adapter | None:
        """The model if it is loaded now; may be asked in any thread."""
        return self._loaded.get(name)

    def close(self, name: str) -> None:
        """Let go of a loaded model that nobody uses, and of all that it holds."""
        adapter = self._loaded.pop(name)
        self._steps.forget(adapter)
        _close(adapter)
        del adapter
        self.free_memory()

    def free_memory(self) -> None:
        """Give back what is no longer in use."""
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    # --- loading ------------------------------------------------------------------------------------------------------

    def _load_somehow(self, spec: ModelSpec) -> Adapter:
        """Load it, with less company where there is no room."""
        idle = self._idle()
        most = self._boot.loaded_models
        while most and not spec.preload and len(self._others()) >= most and idle:
            self.close(idle.pop(0))
        while True:
            try:
                return self._load(spec)
            except Exception as fault:
                if not idle or not (lacks_memory(fault) or _lacks_room(fault)):
                    raise
            # Past the handler: the exception would keep alive what filled the memory.
            self.close(idle.pop(0))

    def _blames(self, fault: Exception) -> bool:
        """Whether it is the device that failed, rather than the model. Where devices differ, one that is too small for
        a model is given up: jobs would fail there that another can do."""
        if isinstance(fault, DoesNotFit):
            return not self._boot.alike
        if lacks_memory(fault):
            return True
        return self._broken()

    def _broken(self) -> bool:
        """Whether the device answers every call with an error, whatever the fault was that a model has shown."""
        if self._device.type != "cuda":
            return False
        try:
            torch.cuda.synchronize(self._device)
        except RuntimeError:
            return True
        return False

    def _others(self) -> list[str]:
        """Loaded, and not to stay; the one not used for longest first."""
        stay = {spec.name for spec in self._boot.specs if spec.preload}
        return [name for name in self._loaded if name not in stay]

    def _idle(self) -> list[str]:
        """Those of the others that may be closed."""
        return [name for name in self._others() if not self._steps.uses(name)]

    def _load(self, spec: ModelSpec) -> Adapter:
        adapter = adapter_class(spec.adapter, self._boot.models_folder)(spec.options, self._device)
        since = time.time()
        try:
            adapter.load()
            if self._boot.warm_up:
                adapter.warm_up()
                if self._booting:
                    self._compile(adapter, spec)
                    since = time.time()
                self._measure(adapter, spec, since)
                if self._broken():  # what these two fail at is else no more than told
                    raise ModelFailed("the device failed while it was warmed up; the worker's log has the details")
        except BaseException:
            self._steps.forget(adapter)
            _close(adapter)
            raise
        return adapter

    def _compile(self, adapter: Adapter, spec: ModelSpec) -> None:
        """It makes a model faster; one that it fails for is as slow as it was."""
        try:
            adapter.compile(spec, lambda what: self._tell(f"{spec.name}: {what}"))
        except Exception as fault:
            print(f"model '{spec.name}' could not be compiled for all that it should be:", file=sys.stderr)
            traceback.print_exception(fault)

    def _measure(self, adapter: Adapter, spec: ModelSpec, since: float) -> None:
        """A stepped model's forwards, for as long as there is time. What takes longer than booting may, counted from
        `since`, is taken to hang; while the worker boots, each thing told counts anew."""
        if spec.stepped:
            left = SHARE * (self._boot.boot_timeout - (time.time() - since))
            most = LONGEST if self._booting else BRIEF
            self._steps.measure(adapter, spec, time.monotonic() + min(most, left), self._tell)

    def _tell(self, what: str) -> None:
        if self._booting:
            self._channel.send(Progress(what, self._told))


def _lacks_room(fault: Exception) -> bool:
    """Whether others have left too little memory for a model, which they may give back."""
    return isinstance(fault, OutOfMemory) and not isinstance(fault, DoesNotFit)


def _close(adapter: Adapter) -> None:
    """What a model fails at on its way out is not what keeps the worker from going on."""
    try:
        adapter.close()
    except Exception:
        print(f"{type(adapter).__name__} could not be closed:", file=sys.stderr)
        traceback.print_exc()

"""The weights of networks on their way between host and device, as `residency.py` decides.

All networks of all diffusion models of a process that share a device share its memory. A network's weights come to the
device before its forward; while the device is too small for all, they also stay on the host in pinned memory, so that
to leave the device is to be forgotten there, and to come back is one copy. A model whose weights are larger than the
device runs in the same way, one network at a time (diffusers calls that model offload).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from functools import cache, partial
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from core.errors import OutOfMemory
from models.base import DoesNotFit
from models.diffusion.residency import Residency

SHARE = 0.85  # of the device's memory for weights; the rest is for what they compute


class HostedModule:
    """One module's weights. `device`: where they run; they start wherever they are.

    A weight's data is replaced where it is. Quantized weights are made of several tensors and cannot be changed in that
    way, so there the module is given another weight.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module = module
        self._device = device
        self._host: dict[Tensor, Tensor] = {}  # by weight, its data on the host while it is on the device
        self._host_made: dict[tuple[nn.Module, str], nn.Parameter] = {}  # the same of quantized ones, by their place

    def size(self) -> int:
        """Bytes of its weights."""
        made = {id(weight): weight for *_, weight in self._made()}
        plain = (*self._tensors(), *(part for weight in made.values() for part in _parts(weight)))
        return sum(tensor.numel() * tensor.element_size() for tensor in plain)

    @torch.inference_mode(False)  # weights made under it could not be used elsewhere
    def bring(self, keep: bool) -> None:
        """To the device. `keep`: what lies on the host stays there, for the way back."""
        kept: dict[Tensor, Tensor] = {}
        for tensor in self._tensors():
            if tensor.device != self._device:
                host = tensor.data
                if keep:
                    host = kept[tensor] = self._pinned(host)
                tensor.data = host.to(self._device, non_blocking=True)
            elif tensor in self._host:
                kept[tensor] = self._host[tensor]
        self._host = kept
        self._bring_made(keep)

    @torch.inference_mode(False)
    def drop(self) -> None:
        """Off the device. What is not on the host yet is copied there."""
        for tensor in self._tensors():
            if tensor.device != torch.device("cpu"):
                kept = self._host.get(tensor)
                tensor.data = tensor.data.to("cpu") if kept is None else kept
        self._host.clear()
        for owner, name, weight in self._made():
            if weight.device != torch.device("cpu"):
                kept_made = self._host_made.get((owner, name))
                owner._parameters[name] = _changed(weight, Tensor.cpu) if kept_made is None else kept_made
        self._host_made.clear()

    def _bring_made(self, keep: bool) -> None:
        kept: dict[tuple[nn.Module, str], nn.Parameter] = {}
        for owner, name, weight in self._made():
            place = owner, name
            if weight.device != self._device:
                if keep:
                    weight = kept[place] = _changed(weight, self._pinned)
                owner._parameters[name] = _changed(weight, partial(Tensor.to, device=self._device, non_blocking=True))
            elif place in self._host_made:
                kept[place] = self._host_made[place]
        self._host_made = kept

    def _tensors(self) -> Iterator[Tensor]:
        for weight in (*self.module.parameters(), *self.module.buffers()):
            if not is_traceable_wrapper_subclass(weight):
                yield weight

    def _made(self) -> list[tuple[nn.Module, str, nn.Parameter]]:
        """The quantized weights with their places."""
        return [
            (owner, name, weight) for owner in self.module.modules() for name, weight in owner._parameters.items()
            if weight is not None and is_traceable_wrapper_subclass(weight)
        ]

    def _pinned(self, host: Tensor) -> Tensor:
        return host.pin_memory() if self._device.type == "cuda" and not host.is_pinned() else host


def _nothing() -> None:
    pass


def _parts(weight: Any) -> Iterator[Tensor]:
    """The plain tensors that a quantized weight is made of."""
    for name in weight.__tensor_flatten__()[0]:
        part = getattr(weight, name)
        yield from _parts(part) if is_traceable_wrapper_subclass(part) else (part,)


def _changed(weight: Any, change: Callable[[Tensor], Tensor]) -> nn.Parameter:
    """A weight made of the changed parts of another."""
    names, context = weight.__tensor_flatten__()
    parts = {name: change(getattr(weight, name)) for name in names}
    made = type(weight.data).__tensor_unflatten__(parts, context, weight.size(), weight.stride())
    return nn.Parameter(made, requires_grad=False)


class DeviceMemory:
    """The weights of all networks of one device. `budget`: bytes for them."""

    def __init__(
        self, device: torch.device, budget: int, clock: Callable[[], float] = time.monotonic,
        host: Callable[[nn.Module, torch.device], HostedModule] = HostedModule,
    ) -> None:
        self.device = device
        self.residency = Residency(budget)
        self._clock, self._host = clock, host
        self._modules: dict[Hashable, HostedModule] = {}
        self._companions: dict[Hashable, Callable[[], None]] = {}
        self._whole, self._bounds = budget, dict[int, int]()

    def bound(self, model: object, budget: int | None) -> None:
        """As long as that model is loaded, there are so many bytes at most; None: it has nothing more to say."""
        if budget is None:
            self._bounds.pop(id(model), None)
        else:
            self._bounds[id(model)] = budget
        self.residency.budget = min((self._whole, *self._bounds.values()))

    def enter(self, module: nn.Module) -> None:
        """Have the module's weights looked after, or, if they are, measured anew. Raises `OutOfMemory` when they are
        too large for the budget, alone."""
        hosted = self._modules.get(id(module)) or self._host(module, self.device)
        try:
            self.residency.enter(id(module), hosted.size())
        except ValueError:
            raise OutOfMemory(f"a network of {readable(hosted.size())} does not fit this device, which has "
                              f"{readable(self.residency.budget)} for weights") from None
        self._modules[id(module)] = hosted
        if id(module) in self.residency:
            hosted.bring(keep=self.residency.crowded)  # something was added to it

    def leave(self, module: nn.Module) -> None:
        """It will not run any more."""
        if self._modules.pop(id(module), None):
            self.residency.forget(id(module))
        self._companions.pop(id(module), None)

    def accompany(self, module: nn.Module, forget: Callable[[], None]) -> None:
        """Something that is no weight lies on the device beside the module's: `forget` lets go of it whenever they
        leave. One for each module."""
        self._companions[id(module)] = forget

    def bring(self, module: nn.Module) -> None:
        """Its weights are on the device when this returns, or at least before anything that is asked of it later."""
        hosted = self._modules.get(id(module))
        if hosted is None:
            return
        was_there = id(module) in self.residency
        for leaving in self.residency.use(id(module), self._clock()):
            self._modules[leaving].drop()
            self._companions.get(leaving, _nothing)()
        if was_there:
            return
        try:
            hosted.bring(keep=self.residency.crowded)
        except BaseException:
            hosted.drop()
            self.residency.left(id(module))
            raise

    def welcome(self, module: nn.Module) -> bool:
        """Whether it can run now without driving out weights that have just come."""
        return id(module) not in self._modules or self.residency.welcome(id(module), self._clock())


@cache
def memory_of(device: torch.device) -> DeviceMemory:
    """The one that all models of this process share."""
    return DeviceMemory(device, int(SHARE * capacity(device)))


def capacity(device: torch.device) -> int:
    """Bytes of memory that the device has."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)


def bytes_of(module: nn.Module) -> int:
    """What a network's weights take, quantized ones too."""
    return HostedModule(module, torch.device("cpu")).size()


def sizes_of(parts: Mapping[str, Any]) -> dict[str, int]:
    """By name, the bytes of those parts that are networks."""
    return {name: bytes_of(part) for name, part in parts.items() if isinstance(part, nn.Module)}


def refuse_too_large(sizes: dict[str, int], budget: int, offload: bool) -> None:
    """Raises `DoesNotFit` with the numbers when networks of these sizes, in bytes, cannot run within the budget: all
    of them at once, or with `offload` one at a time."""
    whole = sum(sizes.values())
    largest = max(sizes, key=sizes.__getitem__, default="")
    if not sizes or (sizes[largest] if offload else whole) <= budget:
        return
    if not offload:
        advice = "set the model's option 'offload' to true (one network at a time), " if len(sizes) > 1 else ""
        raise DoesNotFit(
            f"its weights need {readable(whole)} and this device has {readable(budget)} for weights; {advice}choose "
            "a 'dtype' of fewer bits, or a device with more memory"
        )
    raise DoesNotFit(
        f"even alone, its {largest} needs {readable(sizes[largest])} and this device has {readable(budget)} for "
        "weights; choose a 'dtype' of fewer bits, or a device with more memory"
    )


def available() -> int:
    """Bytes of the host's memory that are free, or can be made so."""
    return int(psutil.virtual_memory().available)


def refuse_without_room(sizes: dict[str, int], free: int) -> None:
    """Raises `OutOfMemory` with the numbers when networks of these sizes, in bytes, would fill the host's memory, of
    which so much is free: the kernel would end the process in the middle of loading them."""
    whole = sum(sizes.values())
    if whole > free:
        raise OutOfMemory(  # others may give it back
            f"its weights need {readable(whole)} of the host's memory, of which {readable(free)} are free; offer fewer "
            "models, have fewer stay loaded (--loaded-models), or choose a 'dtype' of fewer bits"
        )


def readable(size: int) -> str:
    """A number of bytes for people."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"

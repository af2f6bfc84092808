"""Rows with different LoRAs in one forward of a network, each with its own weights.

A LoRA adds to a layer `up(down(x)) * scale`, two thin matrices around its rank. Those of all rows lie side by side
along the rank, as if they were one LoRA; each row's scales say which parts of it count for that row, and are zero for
those that do not. So a mix runs as many kernels as a single LoRA, whatever the number of sets, and one set is a mix of
one: there is no second way. Layers of other kinds (DoRA, embeddings, LoKr ...) do not work like that: a set with such a
part runs by peft's own code, in forwards of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.diffusion.memory import bytes_of

Adapters = tuple[tuple[str, float], ...]
"""What a row has on: peft's names, with weights."""

KEPT = 4  # unions of adapters whose matrices stay joined
SHARE = 1 / 16  # of a network's own bytes that joined matrices may take; others are joined anew in each forward
DOUBLING = {"QwenImageTransformer2DModel"}  # with `zero_cond_t` some layers get all rows, and then all rows once more


class Unmixable(Exception):
    """A layer's input does not tell which of its entries belong to which row."""


@dataclass(frozen=True, slots=True)
class _Part:
    """One adapter in one layer. `scale`: at weight 1. `plain`: two matrices and nothing else."""

    down: nn.Module
    up: nn.Module
    scale: float
    plain: bool

    @property
    def rank(self) -> int:
        return len(self.down.weight)


@dataclass(frozen=True, slots=True)
class Scales:
    """What the parts of a layer are multiplied by: `values`, rows x ranks, or ranks where all rows have the same.
    `absent`: where a row has not that part; None where all have it, or nothing can overflow."""

    values: Tensor
    absent: Tensor | None = None


class MixedLayer:
    """Runs in the place of a peft layer's `forward`: the layer below, and what is `worn` on it."""

    __slots__ = ("_base", "_conv", "_doubling", "_down", "_scales", "_up")

    def __init__(self, base: nn.Module, doubling: bool) -> None:
        self._base, self._doubling = base, doubling
        self.take_off()

    def take_off(self) -> None:
        """It is the layer below and nothing else."""
        self._down: Sequence[Tensor] = ()
        self._up: Sequence[Tensor] = ()
        self._scales: Scales | None = None
        self._conv: Any = None

    def wear(self, down: Sequence[Tensor], up: Sequence[Tensor], scales: Scales, pattern: nn.Module) -> None:
        """Add these parts. `down`: ranks x inputs (and a kernel's height x width), `up`: outputs x ranks, each one
        tensor or several to be joined along the ranks. `pattern`: one of the parts' modules that go down."""
        self._down, self._up, self._scales = down, up, scales
        self._conv = pattern if isinstance(pattern, nn.Conv2d) else None

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Raises `Unmixable`."""
        y: Tensor = self._base(x, *args, **kwargs)
        if self._scales is None:
            return y
        down = self._down[0] if len(self._down) == 1 else torch.cat(list(self._down))
        up = self._up[0] if len(self._up) == 1 else torch.cat(list(self._up), 1)
        if x.dtype != down.dtype:
            x = x.to(down.dtype)
        if (conv := self._conv) is not None:
            inner = nn.functional.conv2d(x, down, None, conv.stride, conv.padding, conv.dilation)
        else:
            inner = nn.functional.linear(x, down)
        self._weigh(inner, self._scales)
        if y.dtype != up.dtype:
            return (y + self._outer(inner, up)).to(y.dtype)
        if self._conv is None and y.is_contiguous():
            y.view(-1, len(up)).addmm_(inner.reshape(-1, inner.shape[-1]), up.t())
            return y
        return y.add_(self._outer(inner, up))

    def _outer(self, inner: Tensor, up: Tensor) -> Tensor:
        return nn.functional.linear(inner, up) if self._conv is None else nn.functional.conv2d(inner, up)

    def _weigh(self, inner: Tensor, scales: Scales) -> None:
        """In place. Zero times infinity is not a number: where a part can overflow, it is taken out of the rows that
        have not got it, or it would spoil them too."""
        inner.mul_(self._spread(scales.values, inner))
        if scales.absent is not None:
            inner.masked_fill_(self._spread(scales.absent, inner), 0.0)

    def _spread(self, values: Tensor, inner: Tensor) -> Tensor:
        """Rows x ranks in the shape of rows x ... x ranks, or rows x ranks x height x width."""
        if values.ndim == 1:
            return values if self._conv is None else values[:, None, None]
        rows, count = len(values), len(inner)
        if rows != count:
            if not self._doubling or count != 2 * rows:
                raise Unmixable(f"a layer gets {count} entries for {rows} rows")
            values = values.repeat(2, 1)
        between = (1,) * (inner.ndim - 2)
        shape = (count, *between, values.shape[1]) if self._conv is None else (count, values.shape[1], *between)
        return values.view(shape)


class LoraMix:
    """All LoRA layers of one module, as long as no adapter comes or goes."""

    def __init__(self, module: nn.Module) -> None:
        from peft.tuners.lora.layer import Conv2d, Linear

        doubling = type(module).__name__ in DOUBLING
        self._layers = tuner_layers(module)
        self._separate: set[str] = set()  # adapters that cannot be mixed
        self._mixed: list[tuple[Any, MixedLayer, dict[str, _Part]]] = []
        for layer in self._layers:
            parts = _parts(layer) if isinstance(layer, (Conv2d, Linear)) else {}
            self._separate |= {name for name in layer._all_available_adapter_names()
                               if name not in parts or not parts[name].plain}
            self._mixed.append((layer, MixedLayer(layer.get_base_layer(), doubling), parts))
        self._known = {name for layer in self._layers for name in layer._all_available_adapter_names()}
        self._room = SHARE * bytes_of(module)
        self._broken = False
        self._worn: tuple[Adapters, ...] | None = None
        self._unions: dict[tuple[str, ...], list[tuple[Sequence[Tensor], Sequence[Tensor]]]] = {}

    def of(self, adapters: Adapters) -> Adapters:
        """Those that change anything here. Their order counts where one of them cannot be mixed: a DoRA starts from
        what those before it have left."""
        felt = tuple((name, weight) for name, weight in adapters if name in self._known and weight)
        return tuple(sorted(felt)) if self.mixes(felt) else felt

    def mixes(self, adapters: Adapters) -> bool:
        """Whether rows with these may share a forward with others."""
        return not self._broken and not any(name in self._separate for name, _ in adapters)

    def separate(self) -> None:
        """From now on every set runs by itself: a layer of this module cannot tell the rows apart."""
        self._broken = True

    def wear(self, rows: Sequence[Adapters]) -> None:
        """The next forward's rows have these on, each its own; one entry stands for all rows. Raises `Unmixable` for
        several sets that cannot be mixed."""
        company = tuple(rows)
        if len(set(company)) == 1:
            company = company[:1]
        if company == self._worn:
            return
        if len(company) > 1 and not all(map(self.mixes, company)):
            raise Unmixable("sets that cannot be mixed share a forward")
        self._worn = None
        names = tuple(sorted({name for adapters in company for name, _ in adapters}))
        if any(name in self._separate for name in names):
            self._by_peft(company)
        else:
            self._by_mixing(company, names)
        self._worn = company

    def forget(self) -> None:
        """Let go of everything that lies on the device beside the weights."""
        self._unions.clear()
        self._worn = None
        for _, mixed, _ in self._mixed:
            mixed.take_off()

    def release(self) -> None:
        """The layers are peft's again."""
        self.forget()
        for layer in self._layers:
            layer.__dict__.pop("forward", None)

    # --- one way, and the other -------------------------------------------------------------------------------------

    def _by_peft(self, company: tuple[Adapters, ...]) -> None:
        for layer in self._layers:
            layer.__dict__.pop("forward", None)
            layer.set_adapter([name for name, _ in company[0]], inference_mode=True)
            for name, weight in company[0]:
                layer.set_scale(name, weight)

    @torch.inference_mode(False)  # what is made here is used under other modes too
    @torch.no_grad()
    def _by_mixing(self, company: tuple[Adapters, ...], names: tuple[str, ...]) -> None:
        known: dict[Any, Scales] = {}
        for (layer, mixed, parts), (down, up) in zip(self._mixed, self._union(names), strict=True):
            layer.forward = mixed
            worn = [(name, parts[name]) for name in names if name in parts]
            if not worn:
                mixed.take_off()
                continue
            first = worn[0][1].down
            tensor = down[0]
            # Most layers have parts of the same ranks and scales, so that a few tensors do for all.
            sort = tensor.device, tensor.dtype, *((name, part.rank, part.scale) for name, part in worn)
            if sort not in known:
                known[sort] = _scales(company, worn, tensor)
            mixed.wear(down, up, known[sort], first)

    def _union(self, names: tuple[str, ...]) -> list[tuple[Sequence[Tensor], Sequence[Tensor]]]:
        """For each layer the matrices that go down and up, joined if there is room for that."""
        found = self._unions.pop(names, None)
        if found is None:
            found = [_matrices(names, parts) for *_, parts in self._mixed]
            size = sum(map(_joined_bytes, found))
            while self._unions and (len(self._unions) >= KEPT or self._used() + size > self._room):
                del self._unions[next(iter(self._unions))]
            if size > self._room:
                return found
            found = [(_joined(down, 0), _joined(up, 1)) for down, up in found]
        self._unions[names] = found  # the last used is the last to go
        return found

    def _used(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for union in self._unions.values() for pair in union
                   for tensors in pair for tensor in tensors if not isinstance(tensor, nn.Parameter))


def tuner_layers(module: nn.Module) -> list[Any]:
    """The module's layers that peft has put around its own."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [part for part in module.modules() if isinstance(part, BaseTunerLayer)]


def _parts(layer: Any) -> dict[str, _Part]:
    """What adapters add to a linear layer or a 2D convolution, by name."""
    found = {}
    for name, down in layer.lora_A.items():
        up = layer.lora_B[name]
        conv = isinstance(down, nn.Conv2d)
        plain = name not in layer.lora_variant and up.bias is None and not (conv and layer.get_base_layer().groups > 1)
        layer.set_scale(name, 1.0)
        found[name] = _Part(down, up, float(layer.scaling[name]), plain)
    return found


def _scales(company: tuple[Adapters, ...], worn: list[tuple[str, _Part]], like: Tensor) -> Scales:
    """Kept in float32 at least, so that a weight is not rounded before it is used."""
    exact = torch.float64 if like.dtype == torch.float64 else torch.float32
    values = []
    for adapters in company:
        weights = dict(adapters)
        values.append([weights.get(name, 0.0) * part.scale for name, part in worn for _ in range(part.rank)])
    table = _to(torch.tensor(values, dtype=exact), like.device)
    if len(company) == 1:
        return Scales(table[0])
    return Scales(table, table == 0 if like.dtype == torch.float16 else None)


def _to(table: Tensor, device: torch.device) -> Tensor:
    return table if device.type == "cpu" else table.pin_memory().to(device, non_blocking=True)


def _matrices(names: tuple[str, ...], parts: dict[str, _Part]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    worn = [parts[name] for name in names if name in parts]
    return [part.down.weight for part in worn], [part.up.weight for part in worn]


def _joined(tensors: Sequence[Tensor], along: int) -> Sequence[Tensor]:
    """As one tensor; a single one is not copied."""
    return tensors if len(tensors) < 2 else (torch.cat(list(tensors), along),)


def _joined_bytes(pair: tuple[Sequence[Tensor], Sequence[Tensor]]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensors in pair if len(tensors) > 1 for tensor in tensors)

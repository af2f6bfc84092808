"""How one argument of a network goes into a merged forward: what must be equal for that, and how the values are joined.

A `Column` looks at one argument of one call (`key`) and later joins the values of several calls (`join`). What cannot
be shared without a doubt raises `Alone`: such a call runs by itself, which costs time but is never wrong.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


class Alone(Exception):
    """This call cannot share a forward."""


class Column(Protocol):
    def key(self, value: Any, rows: int) -> Hashable:
        """What must be equal for this value to be joined with others; None: it keeps no call from another. `rows`: how
        many samples the call carries. Raises `Alone`."""

    def last(self, value: Any) -> Any:
        """The value of the call's last sample, as of a call of its own."""

    def join(self, values: Sequence[Any], rows: Sequence[int], device: torch.device) -> Any:
        """One value for all calls; `rows` are theirs, in order."""


class Samples:
    """Tensors whose first dimension counts samples, alone or in lists, tuples and dictionaries: concatenated."""

    def key(self, value: Any, rows: int) -> Hashable:
        if isinstance(value, Tensor):
            if not value.ndim or value.shape[0] != rows:
                raise Alone
            return tuple(value.shape[1:]), value.dtype, value.device
        if isinstance(value, (list, tuple)):
            return type(value), *(self.key(part, rows) for part in value)
        if isinstance(value, dict):
            return tuple((name, self.key(part, rows)) for name, part in sorted(value.items()))
        return frozen(value)

    def last(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[-1:]
        if isinstance(value, (list, tuple)):
            return type(value)(self.last(part) for part in value)
        return {name: self.last(part) for name, part in value.items()} if isinstance(value, dict) else value

    def join(self, values: Sequence[Any], rows: Sequence[int], device: torch.device) -> Any:
        first = values[0]
        if isinstance(first, Tensor):
            return torch.cat(list(values))
        if isinstance(first, (list, tuple)):
            return type(first)(self.join(parts, rows, device) for parts in zip(*values, strict=True))
        if isinstance(first, dict):
            return {name: self.join([value[name] for value in values], rows, device) for name in first}
        return first


class OnePerSample:
    """A number per sample (timestep, guidance); a call may give one for all of its samples: a vector over all rows."""

    def key(self, value: Any, rows: int) -> Hashable:
        if isinstance(value, Tensor) and value.ndim and tuple(value.shape) not in ((1,), (rows,)):
            raise Alone
        return "one per sample"

    def last(self, value: Any) -> Any:
        return value[-1:] if isinstance(value, Tensor) and value.ndim else value

    def join(self, values: Sequence[Any], rows: Sequence[int], device: torch.device) -> Tensor:
        return torch.cat([self._spread(value, count, device) for value, count in zip(values, rows, strict=True)])

    def _spread(self, value: Any, rows: int, device: torch.device) -> Tensor:
        if isinstance(value, Tensor):
            return value.to(device, non_blocking=True).expand(rows)
        return torch.full((rows,), value, device=device)


class Plain:
    """Of no influence on who goes together: one call's word stands for all."""

    def key(self, value: Any, rows: int) -> Hashable:
        return None

    def last(self, value: Any) -> Any:
        return value

    def join(self, values: Sequence[Any], rows: Sequence[int], device: torch.device) -> Any:
        return values[0]


class Shared(Plain):
    """Taken once for the whole batch, as position ids are: calls share a forward when the values are equal.

    Of a tensor of three dimensions or more the networks take the first sample's, without a word about the others.
    """

    def __init__(self) -> None:
        self._digests: WeakIdKeyDictionary = WeakIdKeyDictionary()  # they are looked at each step, and rarely change

    def key(self, value: Any, rows: int) -> Hashable:
        return self._digest(value) if isinstance(value, Tensor) else frozen(value)

    def _digest(self, tensor: Tensor) -> Hashable:
        version = None if tensor.is_inference() else tensor._version
        known = self._digests.get(tensor, None)  # type: ignore[no-untyped-call]
        if known is None or known[0] != version:
            taken = tensor[0] if tensor.ndim > 2 else tensor
            content = taken.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            value = tuple(taken.shape), tensor.ndim, taken.dtype, tensor.device, hashlib.blake2b(content).digest()
            known = self._digests[tensor] = version, value
        digest: Hashable = known[1]
        return digest


class OneShape:
    """A list with the same entry for every sample (Qwen's `img_shapes`); the networks look at the first one only."""

    def key(self, value: Any, rows: int) -> Hashable:
        entries = {frozen(entry) for entry in value}
        if len(entries) != 1:
            raise Alone
        return entries.pop()

    def last(self, value: Any) -> Any:
        return value[-1:]

    def join(self, values: Sequence[Any], rows: Sequence[int], device: torch.device) -> list[Any]:
        return [values[0][0]] * sum(rows)


class Text(Samples):
    """Samples x tokens x channels; the table pads them to one number of tokens, with a mask, before they are joined."""

    def key(self, value: Any, rows: int) -> Hashable:
        if value.shape[0] != rows:
            raise Alone
        return value.shape[2], value.dtype, value.device


class Levelled(Samples):
    """Made alike by the network's table before it is joined: it keeps no call from another."""

    def key(self, value: Any, rows: int) -> Hashable:
        return None


class Private(Plain):
    """Whoever says more about this than False runs alone."""

    def key(self, value: Any, rows: int) -> Hashable:
        if value is not False:
            raise Alone
        return None


def frozen(value: Any) -> Hashable:
    """Plain data as something that can be compared; its type counts, since 1, 1.0 and True are equal in Python.
    Raises `Alone` for anything else: a tensor nobody has told us about may belong to one sample."""
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return type(value), value
    if isinstance(value, (list, tuple)):
        return type(value), *(frozen(part) for part in value)
    if isinstance(value, dict):
        return dict, *((name, frozen(part)) for name, part in sorted(value.items()))
    raise Alone

"""What an effect knows of the batch it works on, and how strengths become amounts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.checkpoint import checkpoint
from models.fields import Grid

STRIP_PIXELS = 1_500_000


@dataclass(frozen=True, slots=True)
class Scene:
    """One effect on a batch of h x w pictures: per item its strength (1.0 is normal), seed, filter passes and what
    else the recipe says. A pointwise effect sees the picture strip by strip, through `grid`."""

    grid: Grid
    strengths: Sequence[float]
    passes: Sequence[int]
    params: Sequence[dict[str, Any]]

    def each(self, values: Sequence[float]) -> Tensor:
        """One number per item, n x 1 x 1 x 1."""
        return torch.tensor(values, dtype=torch.float32, device=self.grid.device).view(-1, 1, 1, 1)

    def amount(self, normal: float) -> Tensor:
        """A blend weight in 0..1 that is `normal` at strength 1, rises with it and never passes 1; n x 1 x 1 x 1."""
        return self.each([1 - (1 - normal) ** strength for strength in self.strengths])

    def times(self, normal: float, most: float = 1e9) -> Tensor:
        """`normal` times the strength, at most `most`; n x 1 x 1 x 1."""
        return self.each([min(most, normal * strength) for strength in self.strengths])

    def pixels(self, share: float) -> float:
        """A share of the picture's longer side in pixels."""
        return share * self.grid.unit


def strips(height: int, width: int, items: int) -> Iterator[tuple[int, int]]:
    """The rows of a picture cut so that a strip of the whole batch stays small; a checkpoint before each."""
    rows = max(1, STRIP_PIXELS // (width * items))
    for top in range(0, height, rows):
        checkpoint()
        yield top, min(height, top + rows)


def colour(code: str, like: Tensor) -> Tensor:
    """A hex colour as 1 x 3 x 1 x 1."""
    values = [int(code[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, 3, 1, 1)


def mix(one: Tensor, other: Tensor, amount: Tensor | float) -> Tensor:
    """`one` where amount is 0, `other` where it is 1. In place where shapes allow: pictures may have 300 MB."""
    gap = other - one
    if isinstance(amount, Tensor) and torch.broadcast_shapes(gap.shape, amount.shape) != gap.shape:
        return one + gap * amount
    return gap.mul_(amount).add_(one)


def screen(below: Tensor, above: Tensor) -> Tensor:
    """Light added as by two projectors."""
    dark = (1 - above) * (1 - below)
    return dark.neg_().add_(1)

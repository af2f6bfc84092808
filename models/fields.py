"""Fields over the picture that come from a seed: noise, clouds and particles.

Everything is a function of (seed, row, column), never of a generator's state. So a field is the same alone, in a batch,
strip by strip, and (up to rounding) on CUDA. Coordinates are in units of the longer side: a field looks alike at any
size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def mix_seed(seed: int) -> int:
    """Any whole number folded to 32 bits; near seeds come out far apart (splitmix64)."""
    z = (seed + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (z ^ (z >> 31)) & _MASK


@dataclass(frozen=True, slots=True)
class Grid:
    """Rows `top` to `bottom` of an h x w picture, for a batch whose items have the `seeds` (of `mix_seed`)."""

    height: int
    width: int
    top: int
    bottom: int
    seeds: Sequence[int]
    device: torch.device

    @property
    def unit(self) -> int:
        """Pixels of the longer side."""
        return max(self.height, self.width)

    @property
    def down(self) -> Tensor:
        """0 at the top edge to 1 at the bottom edge, 1 x 1 x rows x 1."""
        return self._rows().add(0.5).div(self.height).view(1, 1, -1, 1)

    @property
    def across(self) -> Tensor:
        """0 at the left edge to 1 at the right edge, 1 x 1 x 1 x w."""
        return self._columns().add(0.5).div(self.width).view(1, 1, 1, -1)

    def _rows(self) -> Tensor:
        return torch.arange(self.top, self.bottom, device=self.device, dtype=torch.float32)

    def _columns(self) -> Tensor:
        return torch.arange(self.width, device=self.device, dtype=torch.float32)

    def white(self, stream: int) -> Tensor:
        """One number in 0..1 per pixel, n x 1 x rows x w."""
        return self._draw(stream, self.top, self.bottom, self.width)

    def grain(self, stream: int, size: float) -> Tensor:
        """About normal noise, mean 0, deviation about 1, in grains of `size` pixels; n x 1 x rows x w."""
        if size <= 1:
            return (self.white(stream) + self.white(stream + 1) + self.white(stream + 2) - 1.5) * 2
        return (self.clouds(stream, self.unit / size, octaves=1) - 0.5) * 6

    def clouds(self, stream: int, cells: float, octaves: int = 4) -> Tensor:
        """Value noise in 0..1: `cells` lattice cells along the longer side, each octave twice as fine and half as
        strong; n x 1 x rows x w. (Perlin 1985 calls the sum turbulence.)"""
        total, weight = None, 0.0
        for octave in range(octaves):
            share = 0.5**octave
            layer = self._lattice(stream * 31 + octave, cells * 2**octave) * share
            total = layer if total is None else total + layer
            weight += share
        assert total is not None
        return total / weight

    def particles(self, stream: int, cells: float, rarity: float, drift: float = 0.0) -> Particles:
        """One point at most per cell of a jittered lattice, `cells` along the longer side; a cell is empty with
        probability `rarity`. `drift` shears the lattice so that columns of points do not line up."""
        y, x = self._rows() * (cells / self.unit), self._columns() * (cells / self.unit)
        row = y.floor()
        x = x.view(1, -1) + (row * drift).view(-1, 1)
        column = x.floor()
        height, width = int(self.height * cells / self.unit) + 1, int(self.width * cells / self.unit) + 2
        width += int(height * abs(drift)) + 1
        index = (row.long().view(-1, 1) * width + column.long()).flatten()

        def attribute(number: int) -> Tensor:
            table = self._draw(stream * 31 + number, 0, height, width).flatten(2)
            return table[:, :, index].view(len(self.seeds), 1, len(y), -1)

        size = attribute(3)
        margin = 0.5 - 0.45 * size
        dy = (y - row).view(1, 1, -1, 1) - 0.5 - (attribute(0) - 0.5) * 2 * margin
        dx = (x - column).view(1, 1, len(y), -1) - 0.5 - (attribute(1) - 0.5) * 2 * margin
        return Particles(dy, dx, size, attribute(4), (attribute(2) >= rarity).float())

    def _lattice(self, stream: int, cells: float) -> Tensor:
        scale = cells / self.unit
        table = self._draw(stream, 0, int(self.height * scale) + 2, int(self.width * scale) + 2)
        y, x = self._rows() * scale, self._columns() * scale
        row, column = y.floor().long(), x.floor().long()
        fy, fx = y - row, x - column
        fy, fx = fy * fy * (3 - 2 * fy), fx * fx * (3 - 2 * fx)
        rows = table[:, :, row] * (1 - fy).view(-1, 1) + table[:, :, row + 1] * fy.view(-1, 1)
        return rows[..., column] * (1 - fx) + rows[..., column + 1] * fx

    def _draw(self, stream: int, top: int, bottom: int, width: int) -> Tensor:
        """Uniform 0..1 per (item, row, column): the lowbias32 hash (Wellons 2018) in 64-bit integers."""
        keys = torch.tensor([mix_seed(seed + 0x10001 * stream) for seed in self.seeds], device=self.device)
        y = torch.arange(top, bottom, device=self.device).view(1, 1, -1, 1)
        x = torch.arange(width, device=self.device)
        h = ((y * 0x85EBCA6B & _MASK) ^ (x * 0xC2B2AE35 & _MASK)) ^ keys.view(-1, 1, 1, 1)
        for shift, factor in ((16, 0x7FEB352D), (15, 0x046CA68B)):
            h = (h ^ (h >> shift)) * factor & _MASK
        return ((h ^ (h >> 16)) >> 8).float() * 2.0**-24


@dataclass(frozen=True, slots=True)
class Particles:
    """Per pixel: offset (dy, dx) to its cell's point in cells, the point's size 0..1, a free random number, and whether
    the cell holds a point at all (1 or 0). All n x 1 x rows x w."""

    dy: Tensor
    dx: Tensor
    size: Tensor
    chance: Tensor
    there: Tensor

    def discs(self, radius: float) -> Tensor:
        """Soft round flakes; `radius` of the largest, in cells (at most 0.45)."""
        reach = radius * (0.4 + 0.6 * self.size)
        distance = (self.dy * self.dy + self.dx * self.dx).sqrt()
        return ((1 - distance / reach) * 1.6).clamp(0, 1) * self.there

    def rings(self, radius: float) -> Tensor:
        """Bubbles: a bright rim, a faint inside and a glint."""
        reach = radius * (0.4 + 0.6 * self.size)
        distance = (self.dy * self.dy + self.dx * self.dx).sqrt() / reach
        rim = (1 - (distance - 0.85).abs() * 7).clamp_min(0)
        glint_y, glint_x = self.dy / reach + 0.35, self.dx / reach + 0.35
        glint = (1 - (glint_y * glint_y + glint_x * glint_x).sqrt() * 5).clamp(0, 1)
        return (rim * 0.8 + glint + (distance < 0.85) * 0.12).clamp(0, 1) * self.there

    def stars(self, radius: float) -> Tensor:
        """A hot core with four rays, as a star filter gives."""
        reach = radius * (0.3 + 0.7 * self.size)
        y, x = self.dy.abs() / reach, self.dx.abs() / reach
        fade = (1 - (y * y + x * x).sqrt()).clamp_min(0)
        core = (1 - (y * y + x * x) * 30).clamp_min(0)
        rays = 0.02 / (0.02 + torch.minimum(y, x)) * fade * fade
        return (core + rays).clamp(0, 1) * self.there

    def leaves(self, radius: float) -> Tensor:
        """Pointed ovals, each turned its own way."""
        reach = radius * (0.5 + 0.5 * self.size)
        turn = self.chance * 2 - 1
        along = (self.dy * (1 - turn.abs()) + self.dx * turn) / reach
        side = (self.dx * (1 - turn.abs()) - self.dy * turn) / reach
        length = ((1 - turn.abs()) * (1 - turn.abs()) + turn * turn).sqrt()
        along, side = along / length, side / length
        return ((1 - along * along - side.abs() * 2.2) * 6).clamp(0, 1) * self.there

    def streaks(self) -> Tensor:
        """Falling rain: short slanted lines."""
        line = (1 - (self.dx + self.dy * 0.2).abs() * 14).clamp_min(0)
        return line * (1 - self.dy.abs() * 2.2).clamp_min(0) * self.there

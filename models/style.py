"""`style_comic` and `style_aged`: two looks with one strength each, and a prompt that may add operations of `edit`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.recipe import Operation, find_operations, read_prompt
from models.base import Adapter, Item, Output
from models.checkpoint import in_parts
from models.edit import apply_recipes, chunks
from models.effects import grain
from models.fields import Grid, mix_seed
from models.filters import wide_blur
from models.moods import corners, palette
from models.painting import drawn
from models.scene import Scene, mix, strips
from models.tensors import luminance, to_float, to_uint8

NORMAL_GUIDANCE = 8.0


class _Style(Adapter):
    """What both share: the batch, then the look, then the prompt's own operations. A prompt word that is not understood
    has no effect; `facts["recipe"]` tells which were, `facts["ignored"]` which were not."""

    own: frozenset[str] = frozenset()  # operations the look is already made of

    def warm_up(self) -> None:
        self.run([Item({"strength": 0.6}, np.full((32, 32, 3), 128, np.uint8))])

    @torch.inference_mode()
    def run(self, items: Sequence[Item]) -> list[Output | Exception]:
        return in_parts(chunks(items, self.device), self._run_part)

    def _run_part(self, items: Sequence[Item]) -> list[Output]:
        recipes = [self._wishes(item) for item in items]
        batch = self.look(to_float(items, self.device), items).clamp_(0, 1)
        for item in items:
            item.report(0.7)
        plain = [Item({"seed": item.params.get("seed", 0)}, cancelled=item.cancelled) for item in items]
        images = to_uint8(apply_recipes(batch, plain, recipes))
        return [
            Output(image, facts={
                "recipe": [step.plain() for step in recipe], "ignored": read_prompt(item.params.get("prompt", ""))[1]
            })
            for image, item, recipe in zip(images, items, recipes, strict=True)
        ]

    @abstractmethod
    def look(self, batch: Tensor, items: Sequence[Item]) -> Tensor:
        """n x 3 x h x w in 0..1 to the same, in this style."""

    def _wishes(self, item: Item) -> tuple[Operation, ...]:
        """The prompt's operations beside the look; turning the picture is no style."""
        found = find_operations(item.params.get("prompt", ""), item.params.get("negative_prompt", ""))
        return tuple(step for step in found if step.name not in self.own | {"mirror", "flip", "rotate"})


class Comic(_Style):
    """Line drawing over flat colour: flow-based XDoG lines (Winnemoeller, Kyprianidis, Olsen 2012; Kang et al. 2007),
    Kuwahara abstraction (Papari et al. 2007), soft colour quantisation (Winnemoeller, Olsen, Gooch 2006)."""

    own = frozenset({"comic"})

    def look(self, batch: Tensor, items: Sequence[Item]) -> Tensor:
        scene = _scene(batch, items)
        gains = scene.each([_guidance(item) for item in items])
        passes = [1 + (strength > 0.4) + (strength > 0.8) for strength in scene.strengths]
        scene = Scene(scene.grid, scene.strengths, passes, scene.params)
        return mix(batch, drawn(batch, scene, gains), scene.amount(0.98))


class Aged(_Style):
    """An old photograph: dyes faded towards sepia, softened lens, silver grain (after Newson et al. 2017), fallen-off
    corners, scratches and dust. `guidance` weighs the damage: grain, scratches, dust, corners."""

    own = frozenset({"vintage"})

    def look(self, batch: Tensor, items: Sequence[Item]) -> Tensor:
        height, width = batch.shape[2:]
        lens = wide_blur(batch, max(batch.shape[2:]) / 900)
        for top, bottom in strips(height, width, len(items)):
            batch[:, :, top:bottom] = self._faded(
                batch[:, :, top:bottom], lens[:, :, top:bottom], _scene(batch, items, top, bottom), items
            )
        return batch

    def _faded(self, sharp: Tensor, lens: Tensor, scene: Scene, items: Sequence[Item]) -> Tensor:
        grid = scene.grid
        grey = luminance(lens)
        uneven = (grid.clouds(70, 3) - 0.5) * 0.12  # the print did not fade everywhere alike
        print_ = palette((grey * 0.86 + 0.08 + uneven).clamp(0, 1), ("2a1c12", "97704a", "f3e3bd"))
        old = mix(lens, print_, 0.8)
        faded = mix(sharp, old, scene.amount(0.97))
        wear = [_guidance(item) * strength for item, strength in zip(items, scene.strengths, strict=True)]
        damage = Scene(grid, [min(2.0, 0.75 * amount) for amount in wear], scene.passes, scene.params)
        faded = grain(faded, damage)
        faded = faded * (1 - corners(scene) * damage.amount(0.5))
        marks = (_scratches(grid) + _dust(grid)).clamp(0, 1)
        return mix(faded, torch.full_like(faded, 0.93), marks * damage.times(0.75, most=1.0))


def _scratches(grid: Grid) -> Tensor:
    """Thin, broken, nearly upright lines, n x 1 x rows x w."""
    points = grid.particles(71, 9, 0.82, drift=0.41)
    bend = points.dx + points.dy * (points.chance - 0.5) * 0.35
    line = (1 - bend.abs() * 130).clamp_min(0) * (1 - points.dy.abs() * 2.4).clamp_min(0)
    return line * points.there * (0.4 + 0.6 * points.size)


def _dust(grid: Grid) -> Tensor:
    return grid.particles(72, 34, 0.94, drift=0.29).discs(0.09)


def _guidance(item: Item) -> float:
    return float(item.params.get("guidance", NORMAL_GUIDANCE)) / NORMAL_GUIDANCE


def _scene(batch: Tensor, items: Sequence[Item], top: int = 0, bottom: int | None = None) -> Scene:
    height, width = batch.shape[2:]
    seeds = [mix_seed(int(item.params.get("seed", 0))) for item in items]
    grid = Grid(height, width, top, height if bottom is None else bottom, seeds, batch.device)
    params: list[dict[str, Any]] = [{} for _ in items]
    return Scene(grid, [float(item.params.get("strength", 0.6)) for item in items], [1] * len(items), params)

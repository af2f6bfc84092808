"""`edit`: a prompt is read into a recipe (`core.recipe`), the recipe is applied as image operations (`models.effects`).

No network: what the prompt asks for is done by published filters, named where they are written. All items of a batch
walk the same fixed order of operations; each takes part in those of its own recipe, with its own strengths and seed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from core.recipe import Operation, read_prompt, read_recipe
from core.vocabulary import STAGES
from models.base import Adapter, Item, Output
from models.checkpoint import in_parts, parts
from models.effects import EFFECTS
from models.fields import Grid, mix_seed
from models.filters import resize
from models.scene import Scene, strips
from models.tensors import to_float, to_uint8

NORMAL_GUIDANCE = 4.0
STEPS_PER_PASS = 25
CHUNK_PIXELS = 4_000_000


class Edit(Adapter):
    """Applies the prompt's operations. Output keeps the input's size; `facts["recipe"]` says what was understood,
    `facts["ignored"]` which words were not."""

    def warm_up(self) -> None:
        self.run([Item({"prompt": "sunset", "steps": 10}, np.full((32, 32, 3), 128, np.uint8))])

    @torch.inference_mode()
    def run(self, items: Sequence[Item]) -> list[Output | Exception]:
        """Raises `InvalidParameter` when a prompt is not understood."""
        return in_parts(chunks(items, self.device), self._run_part)

    def _run_part(self, items: Sequence[Item]) -> list[Output]:
        recipes = [read_recipe(item.params["prompt"], item.params.get("negative_prompt", "")) for item in items]
        ignored = [read_prompt(item.params["prompt"])[1] for item in items]
        result = to_uint8(self._edit(to_float(items, self.device), items, recipes))
        return [
            Output(
                _with_turned_alpha(image, item, recipe),
                facts={"recipe": [step.plain() for step in recipe], "ignored": words},
            )
            for image, item, recipe, words in zip(result, items, recipes, ignored, strict=True)
        ]

    def _edit(self, batch: Tensor, items: Sequence[Item], recipes: Sequence[Sequence[Operation]]) -> Tensor:
        """By working size: items whose `max_side` makes them smaller are edited small and enlarged again."""
        h, w = batch.shape[2:]
        sizes = [working_size(h, w, int(item.params.get("max_side", 0))) for item in items]
        if all(size == (h, w) for size in sizes):
            return apply_recipes(batch, items, recipes)
        for size in sorted(set(sizes)):
            picked = [i for i, own in enumerate(sizes) if own == size]
            small = resize(batch[picked], *size)
            edited = apply_recipes(small, [items[i] for i in picked], [recipes[i] for i in picked])
            batch[picked] = resize(edited, h, w)
        return batch


def chunks(items: Sequence[Item], device: torch.device) -> list[Sequence[Item]]:
    """The items in parts whose pixels fit the memory that one pass may take."""
    if not items or items[0].image is None:
        return []
    h, w = items[0].image.shape[:2]
    return parts(items, device, CHUNK_PIXELS // (h * w))


def working_size(height: int, width: int, max_side: int) -> tuple[int, int]:
    """Height and width with the longer side at most `max_side` (0: as they are), never enlarged."""
    factor = max(height, width) / max_side if max_side > 0 else 1.0
    if factor <= 1:
        return height, width
    return max(1, round(height / factor)), max(1, round(width / factor))


def apply_recipes(batch: Tensor, items: Sequence[Item], recipes: Sequence[Sequence[Operation]]) -> Tensor:
    """n x 3 x h x w in 0..1 through every item's operations, in the vocabulary's order. Tells progress on the way."""
    wanted = [{step.name: step.params for step in recipe} for recipe in recipes]
    names = [name for name in STAGES if any(name in own for own in wanted)]
    for name in names:
        members = [i for i, own in enumerate(wanted) if name in own and not items[i].cancelled()]
        if members:
            settings = [wanted[i][name] for i in members]
            together = len(members) == len(items)
            part = apply(name, batch if together else batch[members], [items[i] for i in members], settings)
            if together:
                batch = part
            else:
                batch[members] = part
        for i in members:
            own = list(wanted[i])
            items[i].report((own.index(name) + 1) / len(own) * 0.95)
    return batch


def apply(name: str, image: Tensor, items: Sequence[Item], settings: Sequence[dict[str, object]]) -> Tensor:
    """One operation on the items that want it. Pointwise ones run strip by strip: no full-size temporaries."""
    effect = EFFECTS[name]
    height, width = image.shape[2:]
    seeds = [mix_seed(int(item.params.get("seed", 0))) for item in items]
    guidance = [float(item.params.get("guidance", NORMAL_GUIDANCE)) / NORMAL_GUIDANCE for item in items]
    strengths = [float(own["strength"]) * gain for own, gain in zip(settings, guidance, strict=True)]  # type: ignore[arg-type]
    passes = [max(1, round(int(item.params.get("steps", 50)) / STEPS_PER_PASS)) for item in items]

    def scene(top: int, bottom: int) -> Scene:
        return Scene(Grid(height, width, top, bottom, seeds, image.device), strengths, passes, settings)

    if not effect.pointwise:
        return effect.apply(image, scene(0, height)).clamp(0, 1)
    out = torch.empty_like(image)
    for top, bottom in strips(height, width, len(items)):
        out[:, :, top:bottom] = effect.apply(image[:, :, top:bottom], scene(top, bottom)).clamp(0, 1)
    return out


def _with_turned_alpha(image: np.ndarray, item: Item, recipe: Sequence[Operation]) -> np.ndarray:
    """A mirrored picture needs its transparency mirrored too, so it cannot be left to the worker."""
    names = {step.name for step in recipe}
    if item.alpha is None or not names & {"mirror", "flip", "rotate"}:
        return image
    alpha = item.alpha
    if "mirror" in names:
        alpha = alpha[:, ::-1]
    if "flip" in names:
        alpha = alpha[::-1]
    if "rotate" in names:
        alpha = alpha[::-1, ::-1]
    return np.dstack([image, alpha])

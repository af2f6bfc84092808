"""A prompt for models that draw nothing by themselves (`upscale`, `enhance`): the edits it names are made first.

A word that is not understood has no effect. Words about sharpness are left out: such a model has a parameter for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from core.recipe import Operation, find_operations
from models.base import Item
from models.edit import apply_recipes, chunks
from models.tensors import to_float, to_uint8

LEFT_OUT = frozenset({"sharpen", "smooth", "soft", "blur", "mirror", "flip", "rotate"})


def wishes(item: Item) -> tuple[Operation, ...]:
    """The operations that the item's prompt asks for and its negative prompt does not take out."""
    found = find_operations(item.params.get("prompt", ""), item.params.get("negative_prompt", ""))
    return tuple(step for step in found if step.name not in LEFT_OUT)


@torch.inference_mode()
def granted(items: Sequence[Item], device: torch.device) -> list[Item]:
    """The items with their wishes fulfilled; one that has none keeps its image, bit for bit."""
    recipes = [wishes(item) for item in items]
    wishing = [number for number, recipe in enumerate(recipes) if recipe]
    done = list(items)
    for part in chunks([items[number] for number in wishing], device):
        numbers, wishing = wishing[: len(part)], wishing[len(part) :]
        plain = [Item({}, cancelled=item.cancelled) for item in part]  # the model's own strength is not the edit's
        edited = to_uint8(apply_recipes(to_float(part, device), plain, [recipes[number] for number in numbers]))
        for number, image in zip(numbers, edited, strict=True):
            done[number] = replace(items[number], image=image)
    return done

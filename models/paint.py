"""A stand-in for diffusion models in tests: paints plain colours, so that every parameter's way to it can be seen."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from core.errors import ModelFailed
from models.base import Adapter, Item, Output

STEP = 0.02  # seconds of each step where the prompt says "slowly"


class Paint(Adapter):
    """Gives each item the `colour` of its parameters, mixed with its image by `strength`, inside its mask only. Facts
    tell the parameters and the roles of the images. A prompt with "slowly" takes its time, one with "fail" fails."""

    def run(self, items: Sequence[Item]) -> list[Output | Exception]:
        """Outputs in the items' order, an error in place of one that is to fail."""
        return [self._paint(item) for item in items]

    def _paint(self, item: Item) -> Output | Exception:
        prompt, steps = str(item.params["prompt"]), int(item.params["steps"])
        for step in range(steps if "slowly" in prompt else 0):
            if item.cancelled():
                break
            item.report(step / steps)
            time.sleep(STEP)
        if "fail" in prompt:
            return ModelFailed("this prompt was told to fail")
        picture = np.empty((*item.size, 3), np.uint8)
        picture[:] = colour(item.params)
        if item.image is not None and item.image.shape == picture.shape:
            strength = float(item.params["strength"])
            picture = np.rint(strength * picture + (1 - strength) * item.image).astype(np.uint8)
            if item.mask is not None:
                picture[item.mask <= 127] = item.image[item.mask <= 127]
        return Output(picture, facts={"params": dict(item.params), "images": _images(item)})


def _images(item: Item) -> dict[str, list[int]]:
    """The first pixel of each image, by role."""
    there = {"image": item.image, "mask": item.mask, "control": item.control}
    return {
        name: np.atleast_1d(pixels[0, 0]).tolist() for name, pixels in there.items() if pixels is not None
    } | {f"reference {n}": pixels[0, 0].tolist() for n, pixels in enumerate(item.references)}


def colour(params: Mapping[str, Any]) -> tuple[int, int, int]:
    """What these parameters are painted as; other ones nearly always give another colour."""
    digest = hashlib.sha256(json.dumps(dict(params), sort_keys=True).encode()).digest()
    return (40 + digest[0] % 200, 40 + digest[1] % 200, 40 + digest[2] % 200)

"""Requests that nobody has sent, with which a model is compiled and measured before the first real one.

They have the parameters that a request has by default and only the pictures that it must have. So a model's own adapter
starts them like real ones, their calls have the keys of real ones, and what holds for them holds for those.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from core.errors import ModelFailed
from core.model import ModelSpec
from models.base import Item

STEPS = 3  # forwards of the denoiser
WORDS = "a photo of a red house at a lake in the evening, with a boat and two people in front of it"
SIZE = re.compile(r"([1-9]\d{1,4})x([1-9]\d{1,4})")


def named_sizes(options: Mapping[str, Any], option: str) -> list[tuple[int, int]] | None:
    """The heights and widths that an option names, a list of "WIDTHxHEIGHT"; None where it is left out. Raises
    `ModelFailed` for an option that says something else."""
    named = options.get(option)
    if named is None:
        return None
    found = [SIZE.fullmatch(str(one)) for one in named] if isinstance(named, (list, tuple)) else [None]
    read = [(int(match[2]), int(match[1])) for match in found if match]
    if len(read) < len(found):
        raise ModelFailed(
            f'the option "{option}" must be a list of sizes (width x height), as in {option} = ["1024x768"]'
        )
    return read


def usual_size(spec: ModelSpec) -> tuple[int, int]:
    """Height and width of a request that says nothing of them."""
    return spec.canvas(None, {name: param.default for name, param in spec.params.items()})


def request(spec: ModelSpec, size: tuple[int, int], words: str = WORDS) -> Item:
    """A request of that height and width as its clients send it who name nothing but what they must; of few steps."""
    params = spec.check_params({name: _filling(param, words) for name, param in spec.params.items() if param.required})
    fixed = {"height": size[0], "width": size[1], "seed": 0}
    params |= {name: value for name, value in fixed.items() if name in params}
    if spec.steps_param:
        params[spec.steps_param] = math.ceil(STEPS / min(1.0, float(params.get("strength") or 1.0)))
    item = Item(params, size=size)
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    for role, (least, _) in spec.parts.items():
        if least and role == "mask":
            item.mask = np.where(np.arange(size[1]) < size[1] // 2, 255, 0).astype(np.uint8)[None].repeat(size[0], 0)
        elif least and role == "image":
            item.image = noise
        elif least and role == "control":
            item.control = noise
        else:
            item.references = (*item.references, *[noise] * least)
    return item


def _filling(param: Any, words: str) -> Any:
    if param.type == "string":
        return param.choices[0] if param.choices else words
    return False if param.type == "bool" else param.min if param.min is not None else 1

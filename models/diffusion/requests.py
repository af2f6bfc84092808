"""What one request asks of a pipeline: its parameters as the arguments of the pipeline's own call.

A parameter of the model's file reaches the pipeline if its call takes an argument of that name, or of the name that
`ARGUMENTS` has for it; a parameter that a task has no use for (the `strength` of a text-to-image request) is left out.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from core.errors import InvalidParameter
from models.base import Item, Output
from models.diffusion import pixels
from models.diffusion.tasks import SEVERAL_PICTURES, Brings, call_arguments, edits

ARGUMENTS = {
    "steps": "num_inference_steps", "guidance": "guidance_scale", "controlnet_scale": "controlnet_conditioning_scale",
    "control_start": "control_guidance_start", "control_end": "control_guidance_end",
}  # fmt: skip
OURS = frozenset({
    "seed", "scheduler", "sampler", "width", "height", "max_side", "keep_unmasked", "control_type", "canny_low",
    "canny_high", "lora_name", "lora_weight", "generator", "output_type", "image", "mask_image", "control_image",
})  # fmt: skip
EDIT_SIDE, IMAGE_SIDE = 768, 1024  # pixels of the longest side, for editing models and others, unless told otherwise
RANDOM = -1


@dataclass(frozen=True, slots=True)
class Control:
    """How a request is guided: by which kind of map, and the map (uint8 H x W x 3). `drawn`: the map was made from the
    request's image, which then is not also the picture to start from."""

    kind: str
    map: np.ndarray
    drawn: bool


def control_of(item: Item, kinds: Sequence[str]) -> Control | None:
    """The control of a request to a model that has ControlNets of these kinds. Raises `InvalidParameter`."""
    kind = str(item.params.get("control_type") or "").strip().lower()
    if not kind and item.control is None:
        return None
    if not kinds:
        raise InvalidParameter("this model has no ControlNet; send no control map", parameter="control_type")
    if not kind and len(kinds) == 1:
        kind = kinds[0]
    if kind not in kinds and list(kinds) != [""]:
        raise InvalidParameter(
            f"'control_type' must be one of {', '.join(kinds)} for this model", parameter="control_type"
        )
    if item.control is not None:
        return Control(kind, item.control, drawn=False)
    if kind != "canny" or item.image is None:
        needs = "a control map, or an image to take the edges from," if kind == "canny" else "a control map"
        raise InvalidParameter(f"control type '{kind}' needs {needs} in the request", parameter="control")
    low, high = item.params.get("canny_low"), item.params.get("canny_high")
    edges = pixels.canny(
        item.image, pixels.CANNY_LOW if low is None else int(low), pixels.CANNY_HIGH if high is None else int(high)
    )
    return Control(kind, edges, drawn=True)


def brings(item: Item, control: Control | None) -> Brings:
    """What the request has beside words."""
    drawn = control is not None and control.drawn and item.mask is None
    return Brings(
        image=item.image is not None and not drawn, mask=item.mask is not None, control=control is not None,
        references=bool(item.references),
    )


def seed_of(params: Mapping[str, Any]) -> int:
    """The request's seed; a random one where it has none or says -1."""
    seed = params.get("seed")
    return secrets.randbits(32) if seed is None or int(seed) == RANDOM else int(seed)


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as a call of one pipeline class, and what is to become of its answer."""

    kind: type
    item: Item
    arguments: dict[str, Any]
    size: tuple[int, int]  # height and width at which the pipeline works
    seed: int

    def finish(self, result: Any) -> Output:
        """The pipeline's answer as the result of the request, at the size that it must have."""
        item = self.item
        answered = pixels.to_bytes(getattr(result, "images", result))
        picture = pixels.resized(answered, _size(item) or answered.shape[:2])
        if item.mask is not None and item.image is not None and item.params.get("keep_unmasked", True):
            picture = pixels.outside_kept(picture[..., :3], item.image, item.mask)
        height, width = answered.shape[:2]
        facts = {"seed": self.seed, "worked_at": [width, height]}
        return Output(picture, facts=facts)


def ask(kind: type, item: Item, control: Control | None, multiple: int, options: Mapping[str, Any]) -> Asked:
    """The call of a pipeline of that class. `multiple`: what heights and widths must be multiples of. The model's
    options may hold `max_side`. Raises `InvalidParameter`."""
    takes = call_arguments(kind)
    size = _working_size(kind, item, multiple, options)
    seed = seed_of(item.params)
    arguments = _from_parameters(item.params, takes)
    _check_strength(arguments)
    arguments |= _pictures(kind, item, control, size)
    fixed = {
        "height": size[0], "width": size[1], "max_area": size[0] * size[1], "_auto_resize": False,
        "generator": torch.Generator("cpu").manual_seed(seed), "output_type": "pt",
    }
    arguments |= {name: value for name, value in fixed.items() if name in takes}
    return Asked(kind, item, arguments, size, seed)


def _from_parameters(params: Mapping[str, Any], takes: frozenset[str]) -> dict[str, Any]:
    named = {ARGUMENTS.get(name, name): value for name, value in params.items() if name not in OURS}
    arguments = {name: value for name, value in named.items() if name in takes and value is not None}
    if "prompt" in takes:
        arguments.setdefault("prompt", "")
    return arguments


def _check_strength(arguments: Mapping[str, Any]) -> None:
    steps, strength = int(arguments.get("num_inference_steps") or 50), float(arguments.get("strength", 1.0))
    if int(steps * strength) < 1:
        raise InvalidParameter(
            f"{steps} steps at strength {strength:g} are less than one step; raise either", parameter="strength"
        )


def _pictures(kind: type, item: Item, control: Control | None, size: tuple[int, int]) -> dict[str, Any]:
    """The arguments that are pictures, at the size at which the pipeline works."""
    takes = call_arguments(kind)
    found: dict[str, Any] = {}
    if control is not None:
        name = "control_image" if "control_image" in takes else "image"
        found[name] = _picture(pixels.resized(control.map, size))
    if item.image is not None and "image" in takes and "image" not in found:
        found["image"] = _picture(pixels.resized(item.image, size))
    if item.mask is not None:
        found["mask_image"] = _picture(pixels.resized(item.mask, size))
    if SEVERAL_PICTURES.search(kind.__name__) and (found.get("image") or item.references):
        own = [found["image"]] if "image" in found else []
        found["image"] = [*own, *(_picture(np.ascontiguousarray(one)) for one in item.references)]
    return found


def _picture(array: np.ndarray) -> Image.Image:
    return Image.fromarray(array)


def _working_size(kind: type, item: Item, multiple: int, options: Mapping[str, Any]) -> tuple[int, int]:
    size = _size(item) or (512, 512)
    usual = EDIT_SIDE if edits(kind) else IMAGE_SIDE
    longest = item.params.get("max_side")
    longest = options.get("max_side", usual) if longest is None else longest
    asked = item.params.get("width") or item.params.get("height")
    given = item.image is not None or (item.control is not None and not asked)
    return pixels.working_size(size, int(longest) if given else 0, multiple)


def _size(item: Item) -> tuple[int, int] | None:
    """Height and width that the result must have, as far as the request tells."""
    if all(item.size):
        return item.size
    asked = int(item.params.get("height") or 0), int(item.params.get("width") or 0)
    if all(asked):
        return asked
    return None if item.image is None else (item.image.shape[0], item.image.shape[1])

"""Which of diffusers' pipelines a request needs: one set of weights, its task follows from what the request brings.

diffusers has a class for each task of a family, named by one rule: `StableDiffusionPipeline` makes pictures from words,
`StableDiffusionImg2ImgPipeline` changes one, `...InpaintPipeline` fills a mask, `...ControlNet...Pipeline` follows a
map. They take the same networks, so all of them can stand around one set of weights. Editing models (Flux Kontext,
Qwen-Image-Edit, ...) are asked with a picture as they are.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from core.errors import InvalidParameter, ModelFailed

TASK_WORDS = re.compile(r"ControlNet|Img2Img|Inpaint(?:ing)?|Pipeline")
SEVERAL_PICTURES = re.compile(r"EditPlus|^Flux2|Omni")  # their `image` may be a list that belongs to one request
NEEDS_PICTURE = re.compile(r"Edit|Pix2Pix|Upscale")


@dataclass(frozen=True, slots=True)
class Brings:
    """What a request has beside words."""

    image: bool = False
    mask: bool = False
    control: bool = False
    references: bool = False


@cache
def call_arguments(kind: type) -> frozenset[str]:
    """The names that `kind.__call__` takes."""
    return frozenset(inspect.signature(kind.__call__).parameters) - {"self"}


def edits(kind: type) -> bool:
    """Whether it takes a picture to look at, rather than one to start from."""
    names = call_arguments(kind)
    return "image" in names and not names & {"strength", "mask_image", "controlnet_conditioning_scale"}


def choose(base: type, brings: Brings, only_masks: bool = False) -> type:
    """The class for such a request around the weights of a `base`. `only_masks`: the network takes the masked picture
    as further channels, so it can do nothing else. Raises `InvalidParameter` when there is none."""
    if brings.mask and not brings.image:
        raise InvalidParameter("a mask belongs to an image; send the image too", parameter="image")
    if only_masks and not brings.mask:
        raise InvalidParameter("this model fills masks; send an image and a mask", parameter="mask")
    found = _control(base, brings) if brings.control else _plain(base, brings)
    if found is None:
        words = [word for word, given in (("an image", brings.image), ("a mask", brings.mask),
                                          ("a control map", brings.control)) if given]
        raise InvalidParameter(f"this model cannot work with {' and '.join(words) or 'words alone'}", parameter="image")
    if brings.references and not SEVERAL_PICTURES.search(found.__name__):
        raise InvalidParameter("this model looks at one picture only; send no references", parameter="reference")
    return found


def _plain(base: type, brings: Brings) -> type | None:
    if brings.mask:
        return base if "mask_image" in call_arguments(base) else _named(base, "Inpaint")
    if brings.image or brings.references:
        own = base if edits(base) else None
        return own or _named(base, "Img2Img") or (base if "image" in call_arguments(base) else None)
    if edits(base):
        return None if NEEDS_PICTURE.search(base.__name__) else base
    return _named(base, "") or (base if "image" not in call_arguments(base) else None)


def _control(base: type, brings: Brings) -> type | None:
    return _named(base, "ControlNet" + ("Inpaint" if brings.mask else "Img2Img" if brings.image else ""))


def _named(base: type, words: str) -> type | None:
    import diffusers

    found = getattr(diffusers, f"{TASK_WORDS.sub('', base.__name__)}{words}Pipeline", None)
    return found if isinstance(found, type) else None


def build(kind: type, pipeline: Any, device: torch.device, **more: Any) -> Any:
    """A pipeline of that class around the networks of another; nothing is copied. `more`: parts that the other has not
    got. `device`: where it makes its tensors, wherever its networks are at that moment."""
    parts = {**dict(pipeline.config), **pipeline.components, **more}
    wanted = inspect.signature(kind.__init__).parameters  # type: ignore[misc]
    given = {name: parts[name] for name in wanted if name in parts}
    missing = [
        name for name, parameter in wanted.items()
        if name not in given and name != "self" and parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    ]
    if missing:
        raise ModelFailed(f"for this task the model lacks its {' and '.join(missing)}")
    return _bound(kind, device)(**given)


@cache
def _bound(kind: type, device: torch.device) -> type:
    """The class, told where its networks run: diffusers would ask the networks, which may be on the host just now."""
    return type(kind.__name__, (kind,), {"_execution_device": device, "__module__": kind.__module__})


def control_nets(pipeline: Any, named: Mapping[str, Any]) -> dict[str, Any]:
    """By control type, the ControlNets there are: those of the options, or the one that the pipeline came with."""
    own = getattr(pipeline, "controlnet", None)
    return dict(named) or ({"": own} if own is not None else {})

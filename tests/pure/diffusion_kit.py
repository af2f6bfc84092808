"""What tests of diffusion models need: tiny models as the server loads them, requests, the stock pipeline's image."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from core.model import ModelSpec, read_spec
from models.base import Item, Output
from models.diffusion.adapter import Diffusion
from tests import tiny_models

torch.set_num_threads(1)
CPU = torch.device("cpu")
EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "models"
CLOSE, FEW = 1, 0.005  # of 255, and of all values: a difference of 1e-5 rounds so few of them to the other side


def picture(seed: int = 0, width: int = 64, height: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def hole(width: int = 64, height: int = 64) -> np.ndarray:
    mask = np.zeros((height, width), np.uint8)
    mask[height // 4 : height // 2, width // 4 :] = 255
    return mask


def item(image: Any = None, mask: Any = None, control: Any = None, references: Any = (), size: Any = None,
         **params: Any) -> Item:
    """A request; its result has the image's size, or 64 x 64."""
    usual = {"prompt": "a cat", "steps": 3, "seed": 0}
    wanted = size or (image.shape[:2] if image is not None else (64, 64))
    return Item({**usual, **params}, image=image, mask=mask, control=control, references=references, size=wanted)


def build(kind: str, **options: Any) -> Diffusion:
    """A tiny model, loaded as the server loads it."""
    made = Diffusion({"source": str(tiny_models.folder(kind)), **options}, CPU)
    made.load()
    return made


@cache
def model(kind: str) -> Diffusion:
    """The tiny model of that kind without options; one for all tests of a run."""
    return build(kind)


def images(made: Diffusion, *items: Item) -> list[np.ndarray]:
    """What the requests, under way together, come to."""
    return [output.image for output in outputs(made, *items)]


def outputs(made: Diffusion, *items: Item) -> list[Output]:
    ends = made.run(items)
    for end in ends:
        if isinstance(end, Exception):
            raise end
    return ends


def only(made: Diffusion, wanted: Item) -> np.ndarray:
    return images(made, wanted)[0]


def stock(kind: str, named: str | None = None) -> Any:
    """The stock pipeline, or another class of diffusers around its parts."""
    import diffusers

    pipeline = tiny_models.load(kind)
    if named is None or named == type(pipeline).__name__:
        return copy.copy(pipeline)
    wanted = getattr(diffusers, named)
    names = wanted._get_signature_keys(wanted)[0]
    checked = "requires_safety_checker" in wanted.__init__.__code__.co_varnames
    more = {"requires_safety_checker": False} if checked else {}
    return wanted(**{name: part for name, part in pipeline.components.items() if name in names}, **more)


def alone(pipeline: Any, seed: int = 0, **arguments: Any) -> np.ndarray:
    """The stock pipeline's own image, by its own way to bytes."""
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"prompt": "a cat", "num_inference_steps": 3, **arguments}
    made = pipeline(**arguments, generator=torch.Generator().manual_seed(seed), output_type="pil")
    return np.asarray(made.images[0])


def pil(array: np.ndarray) -> Image.Image:
    return Image.fromarray(array)


def same(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether the floats that these bytes were rounded from can have been within 1e-5 of each other."""
    if first.shape != second.shape:
        return False
    apart = np.abs(first.astype(int) - second.astype(int))
    return int(apart.max()) <= CLOSE and float((apart > 0).mean()) < FEW


def folder_of(kind: str) -> Path:
    return tiny_models.folder(kind)


def example_spec(name: str, **options: Any) -> ModelSpec:
    """The model's file among the examples, with further options."""
    spec = read_spec((EXAMPLES / f"{name}.toml").read_text("utf-8"), name)
    return replace(spec, options={**spec.options, **options})

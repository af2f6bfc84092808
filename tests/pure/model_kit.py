"""What the model tests share: the sample photographs, the catalogue's specs, measures of images."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from core.model import ModelSpec, read_spec
from models.base import Adapter, Item

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[2]
ODD_SIZES = [(1, 1), (3, 1), (1, 257), (37, 53), (8191, 7)]


def spec(name: str) -> ModelSpec:
    return read_spec((ROOT / "models" / "repository" / f"{name}.toml").read_text(encoding="utf-8"), name)


def adapter(name: str) -> Adapter:
    """The adapter that the model's file names, as the worker would build it."""
    module, _, cls = spec(name).adapter.partition(":")
    built: Adapter = getattr(importlib.import_module(module), cls)(spec(name).options, torch.device("cpu"))
    built.load()
    return built


def photo(name: str, size: tuple[int, int] | None = None) -> np.ndarray:
    """A photograph of examples/ as uint8 H x W x 3, scaled to (width, height) where given."""
    with Image.open(ROOT / "examples" / f"{name}.jpg") as image:
        return np.asarray(image.convert("RGB") if size is None else image.convert("RGB").resize(size))


def photo_mask(name: str, size: tuple[int, int] | None = None) -> np.ndarray:
    with Image.open(ROOT / "examples" / f"{name}_mask.png") as image:
        return np.asarray(image.convert("L") if size is None else image.convert("L").resize(size))


def noise_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def item(name: str, image: np.ndarray, mask: np.ndarray | None = None, **params: Any) -> Item:
    """An item with the model's defaults and these parameters, checked as the master checks them."""
    return Item(spec(name).check_params(params), image, mask)


def run(name: str, image: np.ndarray, mask: np.ndarray | None = None, **params: Any) -> np.ndarray:
    """The one result for one image."""
    result = adapter(name).run([item(name, image, mask, **params)])[0].image
    assert result is not None
    return result


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(-10 * np.log10(((a.astype(np.float64) - b) ** 2).mean() / 255**2))


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Mean absolute difference in grey values."""
    return float(np.abs(a.astype(np.float64) - b).mean())

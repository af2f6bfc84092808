"""Pictures and the model runs that the tests of edit, style and background share. Threads: one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from core.model import read_spec
from models.base import Adapter, Item

torch.set_num_threads(1)

ROOT = Path(__file__).parents[2]
ODD_SIZES = [(1, 1), (3, 1), (1, 257), (37, 53), (2, 2)]


def spec(name: str) -> Any:
    """The model's spec as the server reads it."""
    file = next((ROOT / "models").glob(f"repository*/{name}.toml"))
    return read_spec(file.read_text(encoding="utf-8"), name)


def params(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """What the worker would be handed for these parameters."""
    return dict(spec(name).check_params(given))


def photo(name: str, side: int = 128) -> np.ndarray:
    """One of examples/, uint8 H x W x 3, its longer side at most `side`."""
    with Image.open(ROOT / "examples" / f"{name}.jpg") as image:
        image.thumbnail((side, side))
        return np.array(image.convert("RGB"))


def random_picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def run(adapter: Adapter, model: str, image: np.ndarray, **given: Any) -> np.ndarray:
    """One picture through the model, alone."""
    output = adapter.run([Item(params(model, given), image)])[0]
    assert output.image is not None
    return output.image


def change(one: np.ndarray, other: np.ndarray) -> float:
    """Mean absolute difference per byte."""
    return float(np.abs(one.astype(np.int16) - other.astype(np.int16)).mean())

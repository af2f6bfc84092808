"""What a job finds stored is checked, and what a model answers: an image of the right size, plain data beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from core.errors import BadOutput, StorageFailed
from core.model import ModelSpec
from models.base import Item


def stored_input(file: Path, size: int) -> bytes:
    """A durable job's input as it was accepted. Raises `StorageFailed`: what has become of it since is no client's
    fault."""
    try:
        data = file.read_bytes()
    except OSError:
        data = None
    if data is None or len(data) != size:
        raise StorageFailed("the server has lost the stored input of this job; submit it again")
    return data


def plain(facts: Mapping[str, Any], spec: ModelSpec) -> dict[str, Any]:
    """The facts as plain data, which alone can leave the process. Raises `BadOutput`."""
    if not facts:
        return {}
    try:
        known: dict[str, Any] = orjson.loads(orjson.dumps(dict(facts), option=orjson.OPT_SERIALIZE_NUMPY))
    except (TypeError, ValueError):
        raise BadOutput(f"model '{spec.name}' tells something beside its image that is no plain data") from None
    return known


def _is_light(given: np.ndarray | None) -> bool:
    return given is None or bool(given.max() > 32)


def check_output(image: np.ndarray | None, item: Item, spec: ModelSpec) -> np.ndarray:
    """The model's answer if it is an image of the size it must have. Raises `BadOutput` with what it is instead."""
    if image is None or not isinstance(image, np.ndarray):
        raise BadOutput(f"model '{spec.name}' answered no image")
    if image.dtype != np.uint8:
        if np.issubdtype(image.dtype, np.floating) and not np.isfinite(image).all():
            raise BadOutput(f"model '{spec.name}' answered NaN instead of an image; try another seed or fewer effects")
        raise BadOutput(f"model '{spec.name}' answered {image.dtype} samples instead of 8-bit ones")
    if image.ndim >= 2 and image.shape[0] * image.shape[1] > spec.max_output_pixels:
        raise BadOutput(f"model '{spec.name}' answered more than the {spec.max_output_pixels:,} pixels that it may")
    wanted = item.size
    if image.shape[:2] != wanted or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))):
        raise BadOutput(f"model '{spec.name}' answered an array of shape {image.shape} for an image of {wanted}")
    if image.ndim == 3 and image.shape[2] == 3 and not image.any() and _is_light(item.image):
        raise BadOutput(f"model '{spec.name}' answered an all-black image; try another seed or prompt")
    return image

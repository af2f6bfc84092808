"""Pictures on their way into a pipeline and out of it: sizes, edges, bytes, what lies outside the mask."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from core.errors import BadOutput

CANNY_LOW, CANNY_HIGH = 100, 200


def working_size(size: tuple[int, int], longest: int, multiple: int) -> tuple[int, int]:
    """Height and width at which a pipeline works for a result of that size: the longer side at most `longest` (0: any),
    the aspect kept as far as whole multiples allow."""
    height, width = size
    scale = min(1.0, longest / max(height, width)) if longest else 1.0
    return _rounded(height * scale, multiple), _rounded(width * scale, multiple)


def _rounded(side: float, multiple: int) -> int:
    return max(1, round(side / multiple)) * multiple


def resized(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 H x W (x channels) at another height and width; the same array where nothing is to be done."""
    height, width = picture.shape[:2]
    if (height, width) == size:
        return picture
    smaller = size[0] * size[1] < height * width
    return cv2.resize(picture, size[::-1], interpolation=cv2.INTER_AREA if smaller else cv2.INTER_CUBIC)


def canny(picture: np.ndarray, low: int = CANNY_LOW, high: int = CANNY_HIGH) -> np.ndarray:
    """The edges of uint8 H x W x 3 as white lines on black, of the same shape (Canny 1986)."""
    edges = cv2.Canny(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), low, high)
    return cv2.cvtColor(edges, cv2.COLOR_GRAY2RGB)


def outside_kept(result: np.ndarray, original: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The result where the mask is 255, the original's bytes where it is 0, a blend between. All uint8, of one size."""
    if mask.all() and mask.min() == 255:
        return result
    share = mask.astype(np.uint16)[..., None]
    blended = (result.astype(np.uint16) * share + original.astype(np.uint16) * (255 - share) + 127) // 255
    return blended.astype(np.uint8)


def to_bytes(pictures: Any) -> np.ndarray:
    """What a pipeline answers (a tensor N x 3 x H x W in 0..1, or a list of pictures), its first picture as uint8
    H x W x 3, rounded as diffusers rounds. Raises `BadOutput` for what is none."""
    if not isinstance(pictures, Tensor):
        return _from_list(pictures)
    picture = pictures[0].float() if pictures.ndim == 4 else pictures.float()
    if picture.ndim != 3 or picture.shape[0] not in (1, 3, 4):
        raise BadOutput(f"the pipeline answered a tensor of shape {tuple(pictures.shape)} instead of a picture")
    told = torch.stack([picture.isfinite().all(), (picture > 0).any()]).tolist()
    if not told[0]:
        raise BadOutput("the pipeline answered NaN instead of a picture; try another seed, or a model in bfloat16")
    if not told[1]:
        raise BadOutput(
            "the pipeline answered an all-black picture: its safety checker has struck, or its numbers ran over; try "
            "another seed or prompt"
        )
    scaled = (picture * 255).round().clamp(0, 255).to(torch.uint8)
    return np.ascontiguousarray(scaled.expand(max(3, len(scaled)), -1, -1).permute(1, 2, 0).cpu().numpy())


def _from_list(pictures: Any) -> np.ndarray:
    first = pictures[0] if isinstance(pictures, (list, tuple)) and pictures else pictures
    while isinstance(first, (list, tuple)) and first:
        first = first[0]
    found = np.asarray(first)
    if np.issubdtype(found.dtype, np.floating):
        return to_bytes(torch.from_numpy(found[0] if found.ndim == 4 else found).permute(2, 0, 1))
    if found.dtype != np.uint8 or found.ndim not in (2, 3):
        raise BadOutput("the pipeline answered something that is no picture")
    return found if found.ndim == 3 else np.repeat(found[..., None], 3, axis=2)

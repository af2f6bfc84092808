"""Masks as IOPaint makes them, compared with its own steps written down anew."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from models.base import Item
from models.mask_tools import BRUSH, MaskTools
from tests.pure.model_kit import spec

TOOL = MaskTools({}, torch.device("cpu"))
PICTURE = np.random.default_rng(3).integers(0, 256, (37, 53, 3), np.uint8)
PICTURE[8:20, 10:30] = 255


def run(image: np.ndarray, **params: Any) -> np.ndarray:
    (output,) = TOOL.run([Item(spec("mask_tools").check_params(params), image)])
    assert output.image is not None
    return output.image


def painted(on: np.ndarray) -> np.ndarray:
    found = np.zeros((*on.shape, 4), np.uint8)
    found[on] = (255, 203, 0, 186)
    return found


@pytest.mark.parametrize("operate", ["expand", "shrink"])
@pytest.mark.parametrize("size", [0, 1, 5, 12])
def test_an_ellipse_grows_and_shrinks(operate: str, size: int) -> None:
    grey = np.asarray(Image.fromarray(PICTURE).convert("L"))
    binary = np.where(grey >= 127, 255, 0).astype(np.uint8)
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * size + 1, 2 * size + 1))
    wanted = (cv2.dilate if operate == "expand" else cv2.erode)(binary, kernel, iterations=1)
    assert (run(PICTURE, operate=operate, kernel_size=size) == painted(wanted > 128)).all()


def test_the_threshold_is_127_and_reverse_turns_it() -> None:
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    assert (run(ramp, operate="expand", kernel_size=0)[0] == painted(np.arange(256) >= 127)).all()
    assert (run(ramp, operate="reverse")[0] == painted(np.arange(256) < 127)).all()


def test_a_found_mask_gets_a_margin_of_four_pixels() -> None:
    found = np.zeros((30, 30, 3), np.uint8)
    found[10:12, 10:12] = 129
    found[25, 25] = 128
    on = np.zeros((30, 30), bool)
    on[6:16, 6:16] = True
    assert (run(found, operate="brush") == painted(on)).all()


def test_the_brush_is_the_page_s_colour() -> None:
    assert (255, 203, 0, int(255 * 0.73)) == BRUSH


def test_masks_of_different_sizes_go_together() -> None:
    params = spec("mask_tools").check_params({"operate": "reverse"})
    items = [Item(params, np.zeros((height, 5, 3), np.uint8)) for height in (3, 9)]
    assert [output.image.shape for output in TOOL.run(items) if output.image is not None] == [(3, 5, 4), (9, 5, 4)]

"""Crops: IOPaint's as long as it can be done in its time, shared by many holes, and refused before any work."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from core.errors import InvalidParameter
from models import crops as module
from models.crops import MOST_HOLES, SEPARATE, Box, count_holes, crops, holes


def specks(side: int, step: int, size: int = 1) -> np.ndarray:
    """Squares of `size` pixels, `step` apart."""
    mask = np.zeros((side, side), np.uint8)
    for row in range(size):
        for column in range(size):
            mask[row::step, column::step] = 255
    return mask


def test_the_bounding_boxes_are_those_of_the_contours_one_by_one_and_in_their_order() -> None:
    rng = np.random.default_rng(7)
    for share in (0.0, 0.02, 0.2, 0.4, 0.6, 1.0):
        hole = np.where(rng.random((90, 70)) < share, np.uint8(255), np.uint8(0))
        contours, _ = cv2.findContours(hole, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        plain = [(x, y, x + w, y + h) for x, y, w, h in map(cv2.boundingRect, contours)]
        assert holes(hole).tolist() == [list(box) for box in plain]


def test_holes_are_counted_as_they_would_be_cut_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_HOLES", 0)
    rng = np.random.default_rng(8)
    for share in (0.02, 0.2, 0.35, 0.6, 0.97):
        hole = np.where(rng.random((90, 70)) < share, np.uint8(255), np.uint8(0))
        assert count_holes(hole) == len(holes(hole))


def test_noise_is_refused_on_its_count_before_a_contour_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "holes", lambda hole: pytest.fail("the work came before the check"))
    with pytest.raises(InvalidParameter, match="562,500 holes") as refused:
        crops(specks(1500, 2), 0)
    assert "fewer" in str(refused.value) and "Resize" in str(refused.value)


def test_a_ring_around_noise_is_one_hole() -> None:
    mask = specks(400, 2)
    assert count_holes(mask) > MOST_HOLES
    mask[:3], mask[-3:], mask[:, :3], mask[:, -3:] = 255, 255, 255, 255
    assert crops(mask, 128) == [Box(0, 0, 400, 400)]


def test_up_to_a_thousand_holes_have_a_crop_each() -> None:
    few = specks(310, 10)
    assert len(crops(few, 20)) == 31 * 31 <= SEPARATE
    assert len(crops(specks(320, 10), 20)) == 1


def test_the_dust_on_a_scan_is_cropped_around_its_cells() -> None:
    dust = specks(3000, 40, 3)
    found = crops(dust, 128)
    assert len(found) == 36 and sum(box.pixels for box in found) < 3 * dust.size
    alone = 5625 * 256**2
    assert sum(box.pixels for box in found) < alone / 10


def test_around_every_hole_of_a_shared_crop_the_margin_stays() -> None:
    rng, side, margin = np.random.default_rng(9), 1600, 40
    mask = np.zeros((side, side), np.uint8)
    for x, y in rng.integers(0, side - 9, (2500, 2)):
        mask[y : y + 3, x : x + 9] = 255
    boxes, shared = holes(mask), crops(mask, margin)
    assert len(boxes) > SEPARATE and len(shared) == 16
    least = margin - 1  # IOPaint halves downwards
    wanted = np.hstack([np.maximum(boxes[:, :2] - least, 0), np.minimum(boxes[:, 2:] + least, side)])
    for left, top, right, bottom in wanted:
        assert any(a <= left and b <= top and c >= right and d >= bottom for a, b, c, d in shared)


@pytest.mark.parametrize("margin", [0, 128, 2**63, 2**64 - 1])
def test_a_margin_may_be_any_number(margin: int) -> None:
    mask = np.zeros((60, 80), np.uint8)
    mask[20:30, 10:20] = 255
    (box,) = crops(mask, margin)
    assert box == (Box(10, 20, 20, 30) if margin == 0 else Box(0, 0, 80, 60))


def test_crops_that_are_too_large_together_are_refused() -> None:
    with pytest.raises(InvalidParameter, match="900 holes"):
        crops(specks(3000, 100, 2), 900)

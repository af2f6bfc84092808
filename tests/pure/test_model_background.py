"""`background_remove` finds what stands out, cuts it cleanly, and does not fall over pictures without a subject."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from models.background import BackgroundRemove
from models.base import Item
from tests.pure.picture_kit import ODD_SIZES, change, params, photo, random_picture, run

MODEL = BackgroundRemove({}, torch.device("cpu"))
NAME = "background_remove"


def disc(height: int, width: int, y: float, x: float, radius: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A textured disc before a textured background, and its true mask."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    inside = (rows - y) ** 2 + (columns - x) ** 2 < radius**2
    waves = (np.sin(rows / 5) * np.cos(columns / 7) * 25)[..., None]
    ground = np.array([70, 110, 80]) + waves + rng.normal(0, 12, (height, width, 3))
    thing = np.array([205, 120, 60]) - waves + rng.normal(0, 12, (height, width, 3))
    return np.clip(np.where(inside[..., None], thing, ground), 0, 255).astype(np.uint8), inside


@pytest.mark.parametrize(
    ("height", "width", "y", "x", "radius"),
    [(160, 160, 80, 80, 35), (140, 220, 60, 80, 28), (300, 200, 190, 110, 60), (160, 160, 90, 60, 20)],
)
def test_a_disc_on_a_textured_background_is_found(height: int, width: int, y: int, x: int, radius: int) -> None:
    image, truth = disc(height, width, y, x, radius, seed=radius)
    found = run(MODEL, NAME, image, output="mask") > 127
    assert (found & truth).sum() / (found | truth).sum() > 0.9


def test_the_cup_is_kept_and_the_table_goes() -> None:
    coffee = photo("coffee", 400)
    cut = run(MODEL, NAME, coffee)
    h, w = coffee.shape[:2]
    assert cut.shape == (h, w, 4)
    assert cut[int(h * 0.35) : int(h * 0.6), int(w * 0.35) : int(w * 0.5), 3].mean() > 240
    corners = [cut[:20, :20, 3], cut[:20, -20:, 3], cut[-20:, :20, 3], cut[-20:, -20:, 3]]
    assert max(corner.mean() for corner in corners) < 15


def test_mask_and_alpha_are_the_same_cut_and_inner_colours_are_untouched() -> None:
    image, truth = disc(120, 120, 60, 60, 30, seed=1)
    cut, mask = run(MODEL, NAME, image), run(MODEL, NAME, image, output="mask")
    assert mask.ndim == 2 and np.array_equal(cut[..., 3], mask)
    solid = mask == 255
    assert solid.sum() > truth.sum() * 0.7
    assert np.array_equal(cut[..., :3][solid], image[solid])


def test_the_colour_of_a_soft_edge_is_cleared_of_the_background() -> None:
    height = width = 120
    rows, columns = np.mgrid[:height, :width]
    far = np.sqrt((rows - 60.0) ** 2 + (columns - 60.0) ** 2)
    share = np.clip((35 - far) / 6 + 0.5, 0, 1)[..., None]
    image = (share * np.array([220, 60, 40]) + (1 - share) * np.array([20, 200, 40])).astype(np.uint8)
    cut = run(MODEL, NAME, image, softness=0.5).astype(np.float32)
    edge = (cut[..., 3] > 90) & (cut[..., 3] < 165)
    assert edge.sum() > 20
    assert cut[..., 1][edge].mean() < image[..., 1][edge].mean() - 10  # less of the old green


@pytest.mark.parametrize("given", [{"output": "mask"}, {"threshold": 0.95}, {"softness": 0.0}, {"softness": 1.0}])
def test_every_parameter_has_an_effect(given: dict[str, Any]) -> None:
    image = photo("astronaut", 200)
    plain, other = run(MODEL, NAME, image), run(MODEL, NAME, image, **given)
    assert plain.shape != other.shape or change(plain[..., 3], other[..., 3]) > 0.05


def test_a_lower_threshold_keeps_more() -> None:
    image = photo("astronaut", 200)
    kept = [run(MODEL, NAME, image, output="mask", threshold=t).mean() for t in (0.2, 0.5, 0.9)]
    assert kept[0] > kept[2] and kept[0] >= kept[1] >= kept[2]


def test_softness_widens_the_edge() -> None:
    image, _ = disc(120, 120, 60, 60, 30, seed=2)
    masks = [run(MODEL, NAME, image, output="mask", softness=s) for s in (0.0, 0.3, 1.0)]
    widths = [((mask > 5) & (mask < 250)).sum() for mask in masks]
    assert widths[0] < widths[1] < widths[2]


def test_the_pictures_own_transparency_stays() -> None:
    image, _ = disc(100, 100, 50, 50, 25, seed=3)
    alpha = np.full((100, 100), 255, np.uint8)
    alpha[:50] = 0
    cut = MODEL.run([Item(params(NAME, {}), image, alpha=alpha)])[0].image
    assert cut is not None and cut[:50, :, 3].max() == 0 and cut[55:70, 45:55, 3].min() > 200


@pytest.mark.parametrize("size", ODD_SIZES)
def test_odd_sizes(size: tuple[int, int]) -> None:
    image = random_picture(*size)
    assert run(MODEL, NAME, image).shape == (*size, 4)
    assert run(MODEL, NAME, image, output="mask").shape == size


def test_where_nothing_stands_out_nothing_is_removed() -> None:
    output = MODEL.run([Item(params(NAME, {}), np.full((64, 80, 3), 77, np.uint8))])[0]
    assert output.image is not None and output.image[..., 3].min() == 255
    assert output.facts["subject"] == 1.0


def test_a_result_is_the_same_bytes_alone_and_in_any_company() -> None:
    items = [Item(params(NAME, {"softness": s, "threshold": t}), disc(90, 90, 45, 40 + i * 5, 20, i)[0])
             for i, (s, t) in enumerate([(0.3, 0.5), (0.0, 0.2), (1.0, 0.8)])]  # fmt: skip
    alone = [MODEL.run([item])[0].image for item in items]
    together = [output.image for output in MODEL.run(items)]
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))

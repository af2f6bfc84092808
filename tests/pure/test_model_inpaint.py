"""Inpainting: texture is reconstructed, what is not masked is sacred, companions do not matter."""

from __future__ import annotations

import numpy as np
import pytest

from core.errors import Cancelled
from tests.pure.model_kit import ODD_SIZES, adapter, difference, item, noise_image, photo, photo_mask, run


def hole(height: int, width: int, top: int, left: int, bottom: int, right: int) -> np.ndarray:
    mask = np.zeros((height, width), np.uint8)
    mask[top:bottom, left:right] = 255
    return mask


def weave(height: int = 96, width: int = 112) -> np.ndarray:
    """A periodic texture of 8 x 12 pixels in three colours."""
    y, x = np.mgrid[:height, :width]
    red = np.where((y // 4 + x // 6) % 2, 220, 40)
    return np.stack([red, (x % 12) * 20, (y % 8) * 30], -1).astype(np.uint8)


def test_a_periodic_texture_is_continued_through_the_hole() -> None:
    image, mask = weave(), hole(96, 112, 30, 35, 66, 80)
    damaged = np.where(mask[..., None] > 0, 128, image).astype(np.uint8)
    filled = run("inpaint", damaged, mask)
    inside = mask > 0
    mean_fill = np.broadcast_to(image[~inside].mean(0), image.shape)
    assert difference(filled[inside], image[inside]) < 0.1 * difference(mean_fill[inside], image[inside])


def test_random_texture_keeps_its_contrast_and_does_not_become_a_blot() -> None:
    coarse = noise_image(32, 32, 5).repeat(4, 0).repeat(4, 1)
    mask = hole(128, 128, 40, 40, 90, 90)
    filled = run("inpaint", np.where(mask[..., None] > 0, 0, coarse).astype(np.uint8), mask)
    assert filled[mask > 0].std() > 0.8 * coarse.std()


def test_an_object_is_removed_from_a_photograph() -> None:
    image, mask = photo("rocket", (256, 171)), photo_mask("rocket", (256, 171))
    filled = run("inpaint", image, mask)
    before, after = image[70:120, 125:140], filled[70:120, 125:140]  # the white rocket stood before a dark blue sky
    assert (before.mean(-1) > 120).mean() > 0.3
    assert (after.mean(-1) > 120).mean() < 0.02
    assert (after[..., 2] > after[..., 0]).mean() > 0.9


def test_every_byte_outside_the_mask_stays() -> None:
    image, mask = photo("coffee", (128, 85)), photo_mask("coffee", (128, 85)).copy()
    mask[mask < 8] = 0
    filled = run("inpaint", image, mask)
    assert np.array_equal(filled[mask == 0], image[mask == 0])
    assert difference(filled[mask > 0], image[mask > 0]) > 5


def test_the_ripples_that_jpeg_leaves_in_a_black_mask_change_nothing() -> None:
    image = photo("cat", (64, 48))
    ripples = (noise_image(48, 64)[..., 0] % 8).astype(np.uint8)
    assert np.array_equal(run("inpaint", image, ripples), image)


def test_a_black_mask_gives_the_image_back() -> None:
    image = photo("cat", (64, 48))
    result = run("inpaint", image, np.zeros((48, 64), np.uint8))
    assert np.array_equal(result, image)
    assert result is not image


def test_a_white_mask_gives_a_plain_picture_and_does_not_crash() -> None:
    image = photo("cat", (64, 48))
    result = run("inpaint", image, np.full((48, 64), 255, np.uint8))
    assert np.abs(result.mean((0, 1)) - image.mean((0, 1))).max() < 4


def test_a_grey_mask_blends() -> None:
    image = np.full((48, 48, 3), 200, np.uint8)
    image[16:32, 16:32] = 0
    mask = hole(48, 48, 14, 14, 34, 34)
    half = np.where(mask > 0, 128, 0).astype(np.uint8)
    assert np.abs(run("inpaint", image, mask)[20:28, 20:28].astype(int) - 200).max() < 3
    assert np.abs(run("inpaint", image, half)[20:28, 20:28].astype(int) - 100).max() < 4


def test_the_object_under_the_mask_leaves_no_trace() -> None:
    image, mask = photo("cat", (96, 64)), hole(64, 96, 20, 30, 44, 60)
    other = image.copy()
    other[mask > 0] = noise_image(64, 96)[mask > 0]
    assert np.array_equal(run("inpaint", image, mask), run("inpaint", other, mask))


def test_a_hole_at_the_corner_is_filled() -> None:
    image, mask = weave(), hole(96, 112, 0, 0, 20, 24)
    filled = run("inpaint", np.where(mask[..., None] > 0, 255, image).astype(np.uint8), mask)
    assert difference(filled[mask > 0], image[mask > 0]) < 12


@pytest.mark.parametrize("size", ODD_SIZES)
@pytest.mark.parametrize("share", [0.2, 1.0])
def test_odd_sizes_work(size: tuple[int, int], share: float) -> None:
    height, width = size
    mask = hole(height, width, 0, 0, max(1, int(height * share)), width)
    result = run("inpaint", noise_image(height, width), mask, rounds=1)
    assert result.shape == (height, width, 3) and result.dtype == np.uint8


def test_an_item_has_the_same_bits_alone_and_in_a_mixed_batch() -> None:
    size = (96, 64)
    items = [
        item("inpaint", photo("cat", size), hole(64, 96, 20, 30, 44, 60), seed=1),
        item("inpaint", photo("coffee", size), hole(64, 96, 10, 10, 30, 50), seed=2**64 - 1),
        item("inpaint", photo("rocket", size), hole(64, 96, 5, 60, 60, 90), patch=5),
        item("inpaint", photo("rocket", size), hole(64, 96, 30, 40, 34, 44), seed=1),
        item("inpaint", photo("cat", size), np.zeros((64, 96), np.uint8)),
        item("inpaint", photo("cat", size), np.full((64, 96), 255, np.uint8), rounds=1),
    ]
    model = adapter("inpaint")
    together = [output.image for output in model.run(items)]
    alone = [model.run([one])[0].image for one in items]
    backwards = [output.image for output in model.run(items[::-1])][::-1]
    assert all(map(np.array_equal, alone, together))
    assert all(map(np.array_equal, alone, backwards))


@pytest.mark.parametrize("change", [{"seed": 7}, {"patch": 3}, {"rounds": 5}])
def test_every_parameter_has_an_effect(change: dict[str, int]) -> None:
    image, mask = photo("coffee", (128, 85)), hole(85, 128, 20, 30, 60, 90)
    assert not np.array_equal(run("inpaint", image, mask), run("inpaint", image, mask, **change))
    assert np.array_equal(run("inpaint", image, mask, **change), run("inpaint", image, mask, **change))


def test_progress_rises_to_the_end() -> None:
    told: list[float] = []
    one = item("inpaint", photo("cat", (96, 64)), hole(64, 96, 20, 30, 44, 60))
    one.report = told.append
    adapter("inpaint").run([one])
    assert len(told) >= 3 and told == sorted(told) and told[-1] == 1.0


def test_a_cancelled_job_ends_early_and_without_an_image() -> None:
    told: list[float] = []
    one = item("inpaint", photo("cat", (96, 64)), hole(64, 96, 20, 30, 44, 60))
    one.report, one.cancelled = told.append, lambda: True
    assert isinstance(adapter("inpaint").run([one])[0], Cancelled)
    assert told == []


def test_a_hole_too_large_to_search_at_full_size_is_copied_by_a_coarser_field(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.inpaint.SEARCHED", 400)
    image, mask = weave(192, 224), hole(192, 224, 60, 70, 130, 160)
    filled = run("inpaint", np.where(mask[..., None] > 0, 128, image).astype(np.uint8), mask)
    inside = mask > 0
    assert difference(filled[inside], image[inside]) < 0.5 * difference(np.full_like(image, 128)[inside], image[inside])

"""Upscaling: nearer to the truth than bicubic, sharper, without rings; companions do not matter."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tests.pure.model_kit import ODD_SIZES, adapter, difference, item, noise_image, photo, psnr, run


def shrunk(image: np.ndarray, scale: int, how: Image.Resampling) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((image.shape[1] // scale, image.shape[0] // scale), how))


def bicubic(image: np.ndarray, scale: int) -> np.ndarray:
    size = (image.shape[1] * scale, image.shape[0] * scale)
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


@pytest.mark.parametrize("how", [Image.Resampling.BICUBIC, Image.Resampling.LANCZOS, Image.Resampling.BOX])
@pytest.mark.parametrize("name", ["astronaut", "cat", "coffee", "rocket"])
def test_a_photograph_comes_back_nearer_to_the_original_than_bicubic(name: str, how: Image.Resampling) -> None:
    truth = photo(name)
    truth = truth[: truth.shape[0] // 2 * 2, : truth.shape[1] // 2 * 2]
    small = shrunk(truth, 2, how)
    assert psnr(run("upscale", small), truth) > psnr(bicubic(small, 2), truth) + 0.15


def test_four_times_is_nearer_to_the_original_than_bicubic() -> None:
    truth = photo("astronaut")[:256, 100:356]
    small = shrunk(truth, 4, Image.Resampling.BICUBIC)
    assert psnr(run("upscale", small, scale=4), truth) > psnr(bicubic(small, 4), truth) + 0.5


def test_scaling_down_again_gives_the_source_back() -> None:
    small = photo("coffee", (96, 64))
    again = shrunk(run("upscale", small, scale=4), 4, Image.Resampling.BOX)
    assert difference(again, small) < 1.5


def test_a_step_edge_gets_steeper_than_bicubic_and_does_not_ring() -> None:
    small = np.full((24, 24, 3), 60, np.uint8)
    small[:, 12:] = 190
    large = run("upscale", small, scale=4)
    assert large.min() >= 54 and large.max() <= 196
    width = ((large[48, :, 0] > 70) & (large[48, :, 0] < 180)).sum()
    soft = bicubic(small, 4)
    assert width < ((soft[48, :, 0] > 70) & (soft[48, :, 0] < 180)).sum()


def test_a_diagonal_line_has_fewer_stairs_than_bicubic() -> None:
    def disc(side: int) -> np.ndarray:
        y, x = np.mgrid[: side * 4, : side * 4] / (side * 4) - 0.5
        inside = (np.hypot(x, y * 1.7) < 0.35).reshape(side, 4, side, 4).mean((1, 3))
        return np.repeat((40 + 180 * inside)[..., None], 3, 2).round().astype(np.uint8)

    assert psnr(run("upscale", disc(40), scale=4), disc(160)) > psnr(bicubic(disc(40), 4), disc(160)) + 1


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize("size", ODD_SIZES)
def test_odd_sizes_work(size: tuple[int, int], scale: int) -> None:
    height, width = size
    result = run("upscale", noise_image(height, width), scale=scale, steps=2)
    assert result.shape == (height * scale, width * scale, 3) and result.dtype == np.uint8


def test_a_plain_image_stays_plain() -> None:
    assert (run("upscale", np.full((9, 11, 3), (10, 128, 250), np.uint8)) == (10, 128, 250)).all()


def test_an_item_has_the_same_bits_alone_and_in_a_mixed_batch() -> None:
    size = (53, 37)
    items = [
        item("upscale", photo("cat", size)),
        item("upscale", photo("coffee", size), sharpness=2),
        item("upscale", photo("rocket", size), steps=3),
        item("upscale", photo("rocket", size), scale=4),
        item("upscale", photo("astronaut", size), sharpness=0),
    ]
    model = adapter("upscale")
    together = [output.image for output in model.run(items)]
    assert all(np.array_equal(model.run([one])[0].image, image) for one, image in zip(items, together, strict=True))


@pytest.mark.parametrize("change", [{"steps": 1}, {"steps": 100}, {"sharpness": 0.0}, {"sharpness": 1.0}])
def test_every_parameter_has_an_effect(change: dict[str, float]) -> None:
    image = photo("astronaut", (64, 64))
    assert not np.array_equal(run("upscale", image), run("upscale", image, **change))
    assert np.array_equal(run("upscale", image, **change), run("upscale", image, **change))


def test_more_sharpness_means_steeper_gradients() -> None:
    image = photo("coffee", (96, 64))
    results = [run("upscale", image, sharpness=sharpness).astype(int) for sharpness in (0, 0.5, 1, 2)]
    steepness = [np.percentile(np.abs(np.diff(result, axis=1)), 99) for result in results]
    assert steepness == sorted(steepness) and steepness[-1] > 1.1 * steepness[0]


def test_tiles_meet_without_a_visible_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    image = photo("cat", (160, 112))
    whole = run("upscale", image)
    monkeypatch.setattr("models.upscale.TILE", 48)
    assert np.abs(run("upscale", image).astype(int) - whole).max() <= 2


def test_progress_is_told_and_cancelling_stops_it() -> None:
    told: list[float] = []
    one = item("upscale", photo("cat", (64, 48)))
    one.report = told.append
    adapter("upscale").run([one])
    assert told[-1] == 1.0
    one.cancelled = lambda: True
    told.clear()
    adapter("upscale").run([one])
    assert told == []

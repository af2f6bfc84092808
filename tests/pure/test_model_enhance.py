"""Enhancement: more local contrast, less noise, stronger with strength; companions do not matter."""

from __future__ import annotations

import numpy as np
import pytest

from tests.pure.model_kit import ODD_SIZES, adapter, difference, item, noise_image, photo, run


def local_contrast(image: np.ndarray) -> float:
    """Mean standard deviation of the grey values in 8 x 8 blocks."""
    grey = image.astype(np.float64).mean(-1)
    height, width = grey.shape[0] // 8 * 8, grey.shape[1] // 8 * 8
    return float(grey[:height, :width].reshape(height // 8, 8, width // 8, 8).std((1, 3)).mean())


def flat_photo() -> np.ndarray:
    return (photo("cat", (160, 112)) * 0.3 + 90).astype(np.uint8)


def test_a_flat_photograph_gains_local_contrast() -> None:
    image = flat_photo()
    assert local_contrast(run("enhance", image)) > 1.3 * local_contrast(image)


def test_a_noisy_plain_wall_gets_calmer() -> None:
    rng = np.random.default_rng(0)
    wall = np.clip(128 + rng.normal(0, 8, (96, 96, 3)), 0, 255).astype(np.uint8)
    for strength in (0.3, 0.6, 1.0):
        assert run("enhance", wall, strength=strength).std() < 0.7 * wall.std()


def test_an_edge_survives_the_noise_filter() -> None:
    rng = np.random.default_rng(0)
    step = np.full((64, 64, 3), 70.0)
    step[:, 32:] = 180
    result = run("enhance", np.clip(step + rng.normal(0, 6, step.shape), 0, 255).astype(np.uint8))
    rows = result.astype(float).mean((0, 2))
    assert rows[33] - rows[30] > 90


def test_strength_is_monotone_and_visible() -> None:
    image = photo("coffee", (160, 107))
    changes = [difference(run("enhance", image, strength=s), image) for s in (0.1, 0.2, 0.3, 0.5, 0.75, 1.0)]
    assert changes == sorted(changes)
    assert changes[0] > 0.5 and changes[-1] > 4 * changes[0]


def test_guidance_raises_detail() -> None:
    image = photo("rocket", (160, 107))
    contrasts = [local_contrast(run("enhance", image, guidance=g)) for g in (1, 5, 10, 20)]
    assert contrasts == sorted(contrasts) and contrasts[-1] > 1.1 * contrasts[0]


def test_edges_get_no_halo() -> None:
    step = np.full((96, 96, 3), 60, np.uint8)
    step[:, 48:] = 200
    result = run("enhance", step, strength=1.0).astype(int)
    for side in (result[48, :48, 0], result[48, 48:, 0]):
        assert side.max() - side.min() < 24  # the two pixels at the edge may overshoot a little
    for side in (result[48, :46, 0], result[48, 50:, 0]):
        assert side.max() - side.min() < 9


def test_colours_keep_their_hue() -> None:
    image = np.zeros((32, 96, 3), np.uint8)
    image[:, :32], image[:, 32:64], image[:, 64:] = (180, 60, 50), (60, 170, 70), (60, 70, 190)
    result = run("enhance", image)
    assert [int(result[16, x].argmax()) for x in (16, 48, 80)] == [0, 1, 2]


@pytest.mark.parametrize("size", ODD_SIZES)
def test_odd_sizes_work(size: tuple[int, int]) -> None:
    result = run("enhance", noise_image(*size))
    assert result.shape == (*size, 3) and result.dtype == np.uint8


@pytest.mark.parametrize("value", [0, 128, 255])
def test_a_plain_image_stays_plain(value: int) -> None:
    result = run("enhance", np.full((20, 30, 3), value, np.uint8), strength=1.0)
    assert np.abs(result.astype(int) - value).max() <= 2


def test_an_item_has_the_same_bits_alone_and_in_a_mixed_batch() -> None:
    size = (53, 37)
    items = [
        item("enhance", photo(name, size), strength=strength, guidance=guidance)
        for name, strength, guidance in [("cat", 0.3, 7.5), ("coffee", 1.0, 20), ("rocket", 0.1, 1), ("cat", 0.8, 3)]
    ]
    model = adapter("enhance")
    together = [output.image for output in model.run(items)]
    assert all(np.array_equal(model.run([one])[0].image, image) for one, image in zip(items, together, strict=True))


def test_tiles_meet_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    image = photo("cat", (448, 300))
    whole = run("enhance", image, strength=0.8)
    monkeypatch.setattr("models.enhance.TILE", 96)
    assert np.array_equal(run("enhance", image, strength=0.8), whole)


def test_progress_is_told_and_cancelling_stops_it() -> None:
    told: list[float] = []
    one = item("enhance", photo("cat", (64, 48)))
    one.report = told.append
    adapter("enhance").run([one])
    assert told == [1.0]
    one.cancelled = lambda: True
    adapter("enhance").run([one])
    assert told == [1.0]

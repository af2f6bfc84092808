"""`style_comic` and `style_aged`: a visible look, monotone strength, every parameter heard, nobody disturbed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from models.base import Item
from models.style import Aged, Comic
from tests.pure.picture_kit import ODD_SIZES, change, params, photo, random_picture, run

MODELS = {"style_comic": Comic({}, torch.device("cpu")), "style_aged": Aged({}, torch.device("cpu"))}


@pytest.fixture(scope="module")
def portrait() -> np.ndarray:
    return photo("astronaut", 160)


@pytest.mark.parametrize("name", MODELS)
def test_more_strength_is_more_change(name: str, portrait: np.ndarray) -> None:
    steps = [change(run(MODELS[name], name, portrait, strength=s), portrait) for s in (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)]
    assert steps == sorted(steps) and steps[-1] > 10 and steps[0] < steps[-1] / 2


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "given",
    [{"strength": 0.9}, {"guidance": 18.0}, {"prompt": "black and white"}, {"prompt": "夜晚"}],
)
def test_every_parameter_has_an_effect(name: str, given: dict[str, Any], portrait: np.ndarray) -> None:
    assert change(run(MODELS[name], name, portrait), run(MODELS[name], name, portrait, **given)) > 0.5


def test_seed_moves_the_grain_and_a_negative_prompt_takes_wishes_back(portrait: np.ndarray) -> None:
    aged, comic = MODELS["style_aged"], MODELS["style_comic"]
    assert change(run(aged, "style_aged", portrait, seed=1), run(aged, "style_aged", portrait, seed=2)) > 1
    wish = {"prompt": "film grain, night", "negative_prompt": "night", "seed": 1}
    other = wish | {"seed": 2}
    assert change(run(comic, "style_comic", portrait, **wish), run(comic, "style_comic", portrait, **other)) > 0.5
    only = run(comic, "style_comic", portrait, prompt="film grain", seed=1)
    assert np.array_equal(run(comic, "style_comic", portrait, **wish), only)


@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_that_means_nothing_does_nothing(name: str, portrait: np.ndarray) -> None:
    plain = run(MODELS[name], name, portrait)
    assert np.array_equal(plain, run(MODELS[name], name, portrait, prompt="a picture of my aunt"))


def test_a_comic_has_dark_lines_on_edges_and_fewer_shades() -> None:
    image = np.full((96, 96, 3), 200, np.uint8)
    image[30:66, 30:66] = (90, 120, 160)
    noisy = np.clip(image + np.random.default_rng(0).normal(0, 6, image.shape), 0, 255).astype(np.uint8)
    comic = run(MODELS["style_comic"], "style_comic", noisy, strength=1.0).astype(np.float32)
    edge = comic[28:33, 40:56].mean(2).min(0)
    assert edge.mean() < 60  # a line
    assert comic[40:56, 40:56].std((0, 1)).mean() < noisy[40:56, 40:56].std((0, 1)).mean() * 0.5  # flat colour


def test_an_aged_picture_is_faded_warm_grainy_and_dark_in_the_corners() -> None:
    image = np.full((120, 120, 3), (90, 140, 230), np.uint8)
    aged = run(MODELS["style_aged"], "style_aged", image, strength=1.0).astype(np.float32)
    assert (aged[..., 0] - aged[..., 2]).mean() > 0  # blue has become warm
    assert aged[50:70, 50:70].std((0, 1)).mean() > 3
    assert aged[:12, :12].mean() < aged[50:70, 50:70].mean() - 10


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", ODD_SIZES)
def test_odd_sizes(name: str, size: tuple[int, int]) -> None:
    image = random_picture(*size)
    assert run(MODELS[name], name, image, prompt="sunset, soft").shape == image.shape


@pytest.mark.parametrize("name", MODELS)
def test_a_result_is_the_same_bytes_alone_and_in_any_company(name: str) -> None:
    image = photo("cat", 100)
    wishes = ("", "night", "soft, sepia", "snow", "")
    items = [
        Item(
            params(name, {"strength": 0.2 * i + 0.15, "guidance": 1 + 4 * i, "seed": i, "prompt": wish}),
            np.roll(image, 9 * i, 0),
        )
        for i, wish in enumerate(wishes)
    ]
    alone = [MODELS[name].run([item])[0].image for item in items]
    together = [output.image for output in MODELS[name].run(items)]
    backwards = [output.image for output in MODELS[name].run(items[::-1])][::-1]
    for one, two, three in zip(alone, together, backwards, strict=True):
        assert np.array_equal(one, two) and np.array_equal(one, three)


def test_facts_tell_which_words_were_understood(portrait: np.ndarray) -> None:
    wish = {"prompt": "ghibli style, comic, vibrant colors"}
    output = MODELS["style_comic"].run([Item(params("style_comic", wish), portrait)])
    assert output[0].facts["recipe"] == [{"operation": "vivid", "strength": 1.0}]

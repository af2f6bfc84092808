"""Resampling: the size that was asked for, the mean kept, and the same bytes alone or among others."""

from __future__ import annotations

import numpy as np
import pytest

from models.base import Item
from tests.pure.model_kit import adapter, photo


@pytest.mark.parametrize("size", [(1, 1), (40, 64), (33, 7), (300, 500)])
def test_the_size_is_the_one_asked_for(size: tuple[int, int]) -> None:
    image = photo("cat", (160, 120))
    (output,) = adapter("resize").run([Item({}, image, size=size)])
    assert output.image.shape == (*size, 3)
    assert np.abs(output.image.mean(axis=(0, 1)) - image.mean(axis=(0, 1))).max() < 3


def test_companions_do_not_matter() -> None:
    items = [Item({}, photo("cat", (160, 120)), size=(30, 40)), Item({}, photo("coffee", (90, 70)), size=(140, 180))]
    alone = [adapter("resize").run([item])[0].image for item in items]
    together = [output.image for output in adapter("resize").run(items)]
    assert all((one == other).all() for one, other in zip(alone, together, strict=True))

"""Resampling to a given size: averages where it shrinks, bicubic where it grows. Thumbnails are made so."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from models.base import Adapter, Item, Output


class Resize(Adapter):
    """The params `width` and `height` have become the item's size by the time it is here."""

    def run(self, items: Sequence[Item]) -> list[Output]:
        """Outputs in the items' order, each of its item's size."""
        return [Output(_resized(item)) for item in items]


def _resized(item: Item) -> np.ndarray:
    import cv2  # late: a model that is offered but not asked for costs nothing

    assert item.image is not None
    height, width = item.size
    shrinks = height <= item.image.shape[0] and width <= item.image.shape[1]
    return cv2.resize(item.image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)

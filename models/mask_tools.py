"""`mask_tools`: masks as IOPaint's page paints them, grown, shrunk, reversed, or made of another model's mask."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from models.base import Adapter, Item, Output

BRUSH = (255, 203, 0, 186)  # RGBA of the page's brush
ON = 127  # from this brightness on a pixel belongs to a mask that somebody painted
SURE = 128  # above it, to one that a model found
MARGIN = np.ones((9, 9), np.uint8)  # such a mask grows by four pixels


class MaskTools(Adapter):
    """`operate`: expand, shrink (by an ellipse of `kernel_size` pixels each way), reverse, or brush (a found mask with
    its margin). Outputs are H x W x 4: the brush's colour on nothing."""

    def run(self, items: Sequence[Item]) -> list[Output]:
        """The items' brightness is the mask; their alpha is not looked at."""
        return [Output(_painted(_adjusted(item))) for item in items]


def _adjusted(item: Item) -> np.ndarray:
    """bool H x W."""
    assert item.image is not None
    grey = _grey(item.image)
    operate = item.params["operate"]
    if operate == "brush":
        return cv2.dilate(grey, MARGIN) > SURE
    mask = np.where(grey >= ON, 255, 0).astype(np.uint8)
    if operate == "reverse":
        return mask == 0
    side = 2 * int(item.params["kernel_size"]) + 1
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
    return (cv2.dilate if operate == "expand" else cv2.erode)(mask, kernel) > 0


def _grey(image: np.ndarray) -> np.ndarray:
    """uint8 H x W: luminance (ITU-R 601), rounded as Pillow's "L" is."""
    red, green, blue = (image[..., channel].astype(np.uint32) for channel in range(3))
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).astype(np.uint8)


def _painted(mask: np.ndarray) -> np.ndarray:
    painted = np.zeros((*mask.shape, 4), np.uint8)
    painted[mask] = BRUSH
    return painted

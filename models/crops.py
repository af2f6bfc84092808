"""Where a large picture is cut: around every hole of its mask, or, of very many, around those that lie together.

Sizes, rounding and order are those of IOPaint 1.6.0, as long as every hole has a crop of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from core.errors import InvalidParameter

MOST_HOLES = 1 << 14  # of one mask; one with more is noise
MOST = 1 << 30  # pixels of all crops of one picture
SEPARATE = 1_000  # holes that have a crop each, as in IOPaint; of more, those in one cell share one
CELL = 512  # a cell's sides, in pixels


class Box(NamedTuple):
    left: int
    top: int
    right: int
    bottom: int

    @property
    def pixels(self) -> int:
        return (self.right - self.left) * (self.bottom - self.top)


def crops(hole: np.ndarray, margin: int) -> list[Box]:
    """The crops of a mask, uint8 H x W, 0 or 255, with `margin` pixels around the holes, in the order in which they are
    pasted. Raises `InvalidParameter`, before any work on single holes, for a mask that cannot be meant."""
    if (count := count_holes(hole)) > MOST_HOLES:
        raise _too_many(count, f"at most {MOST_HOLES:,}")
    boxes = holes(hole)
    if len(boxes) > SEPARATE:
        boxes = together(boxes)
    found = [Box(*box) for box in grow(boxes, margin, hole.shape).tolist()]
    if sum(box.pixels for box in found) > MOST:
        raise _too_many(count, "with smaller crops")
    return found


def _too_many(count: int, most: str) -> InvalidParameter:
    return InvalidParameter(
        f"the mask has {count:,} holes, too many to crop the image around them; send a mask with fewer ({most}), or "
        "the hd_strategy Original or Resize",
        parameter="mask",
    )


def count_holes(hole: np.ndarray) -> int:
    """How many holes there are. What lies inside the ring of another one is part of it."""
    count = _count(hole)
    if count <= MOST_HOLES:
        return count
    import cv2  # late: a model that is offered but not asked for costs nothing

    outside = np.pad(hole, 1)
    cv2.floodFill(outside, None, (0, 0), 1)
    return _count((outside != 1).view(np.uint8))


def _count(hole: np.ndarray) -> int:
    import cv2

    return int(cv2.connectedComponents(hole, connectivity=8)[0]) - 1


def holes(hole: np.ndarray) -> np.ndarray:
    """The bounding box of every hole in OpenCV's order of contours: int N x 4; left, top, right, bottom."""
    import cv2

    contours, _ = cv2.findContours(hole, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    if not contours:
        return np.empty((0, 4), int)
    points = np.concatenate(contours).reshape(-1, 2).astype(int)
    starts = np.cumsum([0, *map(len, contours[:-1])])
    return np.hstack([np.minimum.reduceat(points, starts), np.maximum.reduceat(points, starts) + 1])


def together(boxes: np.ndarray) -> np.ndarray:
    """One box around all those whose centres lie in the same cell, row by row of cells."""
    cells = (boxes[:, :2] + boxes[:, 2:]) // (2 * CELL)
    order = np.lexsort((cells[:, 0], cells[:, 1]))
    boxes, cells = boxes[order], cells[order]
    starts = np.flatnonzero(np.r_[True, (cells[1:] != cells[:-1]).any(1)])
    return np.hstack([np.minimum.reduceat(boxes[:, :2], starts), np.maximum.reduceat(boxes[:, 2:], starts)])


def grow(boxes: np.ndarray, margin: int, shape: tuple[int, ...]) -> np.ndarray:
    """The crops around holes in a picture of `shape` (height, width): `margin` more on every side; what the border
    cuts off on one side is added on the other, where there is room."""
    margin = min(margin, max(shape))  # a larger one makes no difference
    start, end, sides = boxes[:, :2], boxes[:, 2:], np.array(shape[1::-1])
    centre, half = (start + end) // 2, (end - start + 2 * margin) // 2
    low = centre - half
    high = np.maximum(centre + half, low + 1)  # of one pixel without a margin, one stays
    left_top = np.maximum(0, low - np.maximum(0, high - sides))
    return np.hstack([left_top, np.minimum(sides, high + np.maximum(0, -low))])

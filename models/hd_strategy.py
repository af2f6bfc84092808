"""How IOPaint brings a large picture to an erase model: cropped around its holes, made smaller, or as it is.

`fill` yields pieces, already padded to what the network takes, and receives their fillings; it knows nothing of
networks. Sizes, rounding, padding and the order of pasting are IOPaint 1.6.0's, so that the same network gives the same
pixels, with one exception: where cubic enlargement overshoots 0..255, IOPaint's bytes wrap round; ours are clipped.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from core.errors import InvalidParameter

HALF = 127  # of a mask: above it is hole
AT_ONCE = 1 << 24  # pixels of the crops that are in memory together
MOST = 1 << 30  # pixels of all crops of one picture; a mask that is noise would need thousands of times as many


class Piece(NamedTuple):
    """`image` uint8 h x w x 3 and `mask` uint8 h x w (not 0 = fill), contiguous, sides multiples of the pad."""

    image: np.ndarray
    mask: np.ndarray


class Box(NamedTuple):
    left: int
    top: int
    right: int
    bottom: int

    @property
    def pixels(self) -> int:
        return (self.right - self.left) * (self.bottom - self.top)


@dataclass(frozen=True, slots=True)
class Strategy:
    """`name`: Crop, Resize, or anything else for the whole picture. Crop: pictures with a side above `trigger` are cut
    around each hole with `margin` pixels more on every side. Resize: sides above `limit` are made smaller for the
    network. `keep`: outside the hole every byte stays; else the network's own colours stand there. `pad`: a piece's
    sides are filled up to a multiple of it, by mirroring."""

    name: str = "Crop"
    trigger: int = 800
    margin: int = 128
    limit: int = 1280
    keep: bool = True
    pad: int = 8

    @classmethod
    def of(cls, params: Mapping[str, Any], pad: int) -> Strategy:
        """From the parameters as IOPaint's clients name them."""
        return cls(
            name=str(params["hd_strategy"]),
            trigger=int(params["hd_strategy_crop_trigger_size"]),
            margin=int(params["hd_strategy_crop_margin"]),
            limit=int(params["hd_strategy_resize_limit"]),
            keep=bool(params["sd_keep_unmasked_area"]),
            pad=pad,
        )


Filling = Generator[list[Piece], list[np.ndarray], np.ndarray]


def fill(image: np.ndarray, mask: np.ndarray, how: Strategy) -> Filling:
    """The picture with its holes filled, uint8 H x W x 3. `image` is uint8 H x W x 3, `mask` uint8 H x W, hole where it
    is above 127. Yields the pieces that can be filled at the same time; expects uint8 h x w x 3 for each."""
    hole = np.where(mask > HALF, np.uint8(255), np.uint8(0))
    side = max(image.shape[:2])
    if how.name == "Crop" and side > how.trigger:
        return (yield from _crop(image, hole, how))
    if how.name == "Resize" and side > how.limit:
        return (yield from _resize(image, hole, how))
    (whole,) = yield from _padded([Piece(image, hole)], how.pad)
    return _kept(whole, image, hole) if how.keep else whole


def _crop(image: np.ndarray, hole: np.ndarray, how: Strategy) -> Filling:
    """Every crop sees the untouched picture; where crops overlap, the later one stays. Raises `InvalidParameter` for a
    mask of so many holes that it cannot be meant."""
    boxes = [grow(box, how.margin, hole.shape) for box in holes(hole)]
    if sum(box.pixels for box in boxes) > MOST:
        raise InvalidParameter(
            f"the mask has {len(boxes):,} holes, too many to crop the image around each; send a mask with fewer, or "
            "the hd_strategy Original or Resize",
            parameter="mask",
        )
    result = image.copy()
    for some in _in_turns(boxes):
        pieces = [Piece(image[t:b, left:r], hole[t:b, left:r]) for left, t, r, b in some]
        fillings = yield from _padded(pieces, how.pad)
        for box, piece, filling in zip(some, pieces, fillings, strict=True):
            place = result[box.top : box.bottom, box.left : box.right]
            place[:] = _kept(filling, piece.image, piece.mask) if how.keep else filling
    return result


def _in_turns(boxes: list[Box]) -> Iterator[list[Box]]:
    """The boxes in their order: always one, and as many after it as `AT_ONCE` allows."""
    turn: list[Box] = []
    pixels = 0
    for box in boxes:
        if turn and pixels + box.pixels > AT_ONCE:
            yield turn
            turn, pixels = [], 0
        turn.append(box)
        pixels += box.pixels
    if turn:
        yield turn


def _resize(image: np.ndarray, hole: np.ndarray, how: Strategy) -> Filling:
    """The small mask is soft. Its network sees all that is not 0 as hole; the blend with the small picture is soft."""
    import cv2  # late: a model that is offered but not asked for costs nothing

    height, width = hole.shape
    ratio = how.limit / max(height, width)
    size = max(1, int(width * ratio + 0.5)), max(1, int(height * ratio + 0.5))
    small = Piece(*(cv2.resize(plane, size, interpolation=cv2.INTER_CUBIC) for plane in (image, hole)))
    (filling,) = yield from _padded([small], how.pad)
    result = image.copy()
    inside = hole > HALF
    if not how.keep:
        result[inside] = cv2.resize(filling, (width, height), interpolation=cv2.INTER_CUBIC)[inside]
        return result
    share = small.mask[:, :, np.newaxis] / 255
    blend = filling * share + small.image * (1 - share)  # float64, as IOPaint's
    for channel in range(3):  # one after the other, for as float64 a large picture is very large
        plane = cv2.resize(blend[:, :, channel].copy(), (width, height), interpolation=cv2.INTER_CUBIC)
        result[:, :, channel][inside] = np.clip(plane[inside], 0, 255).astype(np.uint8)
    return result


def _padded(pieces: list[Piece], multiple: int) -> Generator[list[Piece], list[np.ndarray], list[np.ndarray]]:
    fillings = yield [Piece(pad(piece.image, multiple), pad(piece.mask, multiple)) for piece in pieces]
    sizes = [piece.mask.shape for piece in pieces]
    return [filling[:height, :width] for (height, width), filling in zip(sizes, fillings, strict=True)]


def _kept(filling: np.ndarray, image: np.ndarray, hole: np.ndarray) -> np.ndarray:
    return np.where(hole[:, :, np.newaxis] > 0, filling, image)


def pad(plane: np.ndarray, multiple: int) -> np.ndarray:
    """H x W or H x W x 3, mirrored at the bottom and the right up to multiples of `multiple`; contiguous."""
    height, width = plane.shape[:2]
    more = [(0, -height % multiple), (0, -width % multiple), (0, 0)]
    if more[0][1] or more[1][1]:
        return np.pad(plane, more[: plane.ndim], mode="symmetric")
    return np.ascontiguousarray(plane)


def holes(hole: np.ndarray) -> list[Box]:
    """The bounding box of every connected hole, in OpenCV's order of contours. `hole` is uint8 H x W, 0 or 255."""
    import cv2

    contours, _ = cv2.findContours(hole, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    found = (cv2.boundingRect(contour) for contour in contours)
    return [Box(x, y, x + width, y + height) for x, y, width, height in found]


def grow(box: Box, margin: int, shape: tuple[int, ...]) -> Box:
    """The crop around a hole in a picture of `shape` (height, width): `margin` more on every side; what the border
    cuts off on one side is added on the other, where there is room."""
    left, right = _grow(box.left, box.right, margin, shape[1])
    top, bottom = _grow(box.top, box.bottom, margin, shape[0])
    return Box(left, top, right, bottom)


def _grow(start: int, end: int, margin: int, length: int) -> tuple[int, int]:
    centre, half = (start + end) // 2, (end - start + 2 * margin) // 2
    low, high = centre - half, max(centre + half, centre - half + 1)  # of one pixel without a margin, one stays
    return max(0, low - max(0, high - length)), min(length, high + max(0, -low))

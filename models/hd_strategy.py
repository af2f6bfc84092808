"""How IOPaint brings a large picture to an erase model: cropped around its holes, made smaller, or as it is.

`fill` yields pieces, already padded to what the network takes, and receives their fillings; it knows nothing of
networks. Sizes, rounding, padding and the order of pasting are IOPaint 1.6.0's, so that the same network gives the same
pixels, with one exception: where cubic enlargement overshoots 0..255, IOPaint's bytes wrap round; ours are clipped.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from models.crops import Box, crops

HALF = 127  # of a mask: above it is hole
AT_ONCE = 1 << 24  # pixels of the crops that are in memory together
LEAST = 16  # pixels of a side: three halvings leave two, of which LaMa mirrors one


class Piece(NamedTuple):
    """`image` uint8 h x w x 3 and `mask` uint8 h x w (not 0 = fill), contiguous, sides multiples of the pad."""

    image: np.ndarray
    mask: np.ndarray


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
Check = Callable[[Sequence[np.ndarray]], None]


def _allow(masks: Sequence[np.ndarray]) -> None:
    pass


def fill(image: np.ndarray, mask: np.ndarray, how: Strategy, check: Check = _allow) -> Filling:
    """The picture with its holes filled, uint8 H x W x 3. `image` is uint8 H x W x 3, `mask` uint8 H x W, hole where it
    is above 127. Yields the pieces that can be filled at the same time; expects uint8 h x w x 3 for each. `check` is
    shown the masks of all pieces (not 0 = fill) before the first of them is yielded, and may raise."""
    hole = np.where(mask > HALF, np.uint8(255), np.uint8(0))
    side = max(image.shape[:2])
    if how.name == "Crop" and side > how.trigger:
        return (yield from _crop(image, hole, how, check))
    if how.name == "Resize" and side > how.limit:
        return (yield from _resize(image, hole, how, check))
    check([hole])
    (whole,) = yield from _padded([Piece(image, hole)], how.pad)
    return _kept(whole, image, hole) if how.keep else whole


def _crop(image: np.ndarray, hole: np.ndarray, how: Strategy, check: Check) -> Filling:
    """Every crop sees the untouched picture; where crops overlap, the later one stays. Raises `InvalidParameter` for a
    mask of so many holes that it cannot be meant."""
    boxes = crops(hole, how.margin)
    check([hole[t:b, left:r] for left, t, r, b in boxes])
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


def _resize(image: np.ndarray, hole: np.ndarray, how: Strategy, check: Check) -> Filling:
    """The small mask is soft. Its network sees all that is not 0 as hole; the blend with the small picture is soft."""
    import cv2  # late: a model that is offered but not asked for costs nothing

    height, width = hole.shape
    ratio = how.limit / max(height, width)
    size = max(1, int(width * ratio + 0.5)), max(1, int(height * ratio + 0.5))
    small = Piece(*(cv2.resize(plane, size, interpolation=cv2.INTER_CUBIC) for plane in (image, hole)))
    check([small.mask])
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
    """H x W or H x W x 3, mirrored at the bottom and the right up to multiples of `multiple`, for a network to
    `LEAST` at least; contiguous."""
    height, width = plane.shape[:2]
    least = LEAST if multiple > 1 else 1
    more = [*((0, max(least - side, -side % multiple)) for side in (height, width)), (0, 0)]
    if more[0][1] or more[1][1]:
        return np.pad(plane, more[: plane.ndim], mode="symmetric")
    return np.ascontiguousarray(plane)

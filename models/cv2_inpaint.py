"""IOPaint's weight-free model `cv2`: OpenCV's inpainting by Navier-Stokes (Bertalmio et al. 2001) or by fast marching
(Telea 2004), with the same ways of bringing a large picture to it as the networks have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np

from core.errors import InvalidParameter
from models.base import Adapter, Item, Output
from models.checkpoint import cancelled, next_part
from models.hd_strategy import Piece, Strategy, fill

MAX_RADIUS = 100  # OpenCV's own bound
MOST_LOOKS = 1 << 29  # at 30 to 45 ns each: about twenty seconds
LONG = 1 << 26  # looks of a call that may take seconds


class Cv2Inpaint(Adapter):
    """Params: `cv2_flag` INPAINT_NS or INPAINT_TELEA; `cv2_radius`, pixels around each that are looked at; IOPaint's
    `hd_strategy...` and `sd_keep_unmasked_area`, see `Strategy`. Holes are filled from their rims: smooth, without
    texture."""

    def run(self, items: Sequence[Item]) -> list[Output | Exception]:
        """Outputs in the items' order, `Cancelled` in place of those that nobody wants any more."""
        return [self._fill(item) for item in items]

    def _fill(self, item: Item) -> Output | Exception:
        assert item.image is not None and item.mask is not None
        flag, radius = str(item.params["cv2_flag"]), min(max(int(item.params["cv2_radius"]), 1), MAX_RADIUS)
        filling = fill(item.image, item.mask, Strategy.of(item.params, pad=1), partial(bound, radius))
        try:
            pieces = next(filling)
            while True:
                fillings = []
                for piece in pieces:
                    if item.cancelled():
                        return cancelled()
                    next_part(long=looks(piece.mask, radius) > LONG)
                    fillings.append(_inpaint(piece, flag, radius))
                pieces = filling.send(fillings)
        except StopIteration as end:
            return Output(end.value)
        except InvalidParameter as refused:
            return refused


def looks(mask: np.ndarray, radius: int) -> int:
    """How many pixels OpenCV looks at: all within the radius of each that is missing."""
    return int(np.count_nonzero(mask)) * (2 * radius + 1) ** 2


def bound(radius: int, masks: Sequence[np.ndarray]) -> None:
    """OpenCV cannot be stopped. Raises `InvalidParameter` for what would take it very long."""
    if (work := sum(looks(mask, radius) for mask in masks)) <= MOST_LOOKS:
        return
    most = (math.isqrt(MOST_LOOKS * (2 * radius + 1) ** 2 // work) - 1) // 2
    cure = f"send a cv2_radius of at most {most}, a " if most >= 1 else "send a "
    raise InvalidParameter(
        f"a hole of {work // (2 * radius + 1) ** 2:,} pixels with a cv2_radius of {radius} takes too long; {cure}"
        "smaller hole, or the hd_strategy Resize",
        parameter="cv2_radius", radius=radius, max_radius=most,
    )  # fmt: skip


def _inpaint(piece: Piece, flag: str, radius: int) -> np.ndarray:
    import cv2  # late: a model that is offered but not asked for costs nothing

    return cv2.inpaint(piece.image, piece.mask, radius, getattr(cv2, flag))

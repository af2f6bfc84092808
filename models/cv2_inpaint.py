"""IOPaint's weight-free model `cv2`: OpenCV's inpainting by Navier-Stokes (Bertalmio et al. 2001) or by fast marching
(Telea 2004), with the same ways of bringing a large picture to it as the networks have."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from models.base import Adapter, Item, Output
from models.checkpoint import cancelled
from models.hd_strategy import Piece, Strategy, fill

MAX_RADIUS = 100  # OpenCV's own bound


class Cv2Inpaint(Adapter):
    """Params: `cv2_flag` INPAINT_NS or INPAINT_TELEA; `cv2_radius`, pixels around each that are looked at; IOPaint's
    `hd_strategy...` and `sd_keep_unmasked_area`, see `Strategy`. Holes are filled from their rims: smooth, without
    texture."""

    def run(self, items: Sequence[Item]) -> list[Output | Exception]:
        """Outputs in the items' order, `Cancelled` in place of those that nobody wants any more."""
        return [self._fill(item) for item in items]

    def _fill(self, item: Item) -> Output | Exception:
        assert item.image is not None and item.mask is not None
        filling = fill(item.image, item.mask, Strategy.of(item.params, pad=1))
        try:
            pieces = next(filling)
            while True:
                fillings = []
                for piece in pieces:
                    if item.cancelled():
                        return cancelled()
                    fillings.append(_inpaint(piece, str(item.params["cv2_flag"]), int(item.params["cv2_radius"])))
                pieces = filling.send(fillings)
        except StopIteration as end:
            return Output(end.value)


def _inpaint(piece: Piece, flag: str, radius: int) -> np.ndarray:
    import cv2  # late: a model that is offered but not asked for costs nothing

    return cv2.inpaint(piece.image, piece.mask, min(max(radius, 1), MAX_RADIUS), getattr(cv2, flag))

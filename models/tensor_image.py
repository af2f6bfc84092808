"""`tensor_image`: a float tensor as an image, for clients that prepare the network's input themselves.

They padded it at the bottom and on the right; that is cut off, because the model that runs afterwards pads by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from core.errors import InvalidImage
from models.base import Adapter, Item, Output

FAR = 0.5  # outside of 0..1: what resizing overshoots is less, another scale is more
QUICKLY = (cv2.IMWRITE_PNG_COMPRESSION, 1)


class TensorImage(Adapter):
    """Raw: `data` is float32, little-endian, `channels` x `height` x `width` in 0..1 (3: RGB, rounded to 8 bits; 1: a
    mask, on from 0.5). The answer is a PNG of the first `rows` x `columns`."""

    def run(self, items: Sequence[Item]) -> list[Output]:
        """Raises `InvalidImage` for NaN, infinity and another scale; what is a little outside of 0..1 is clipped."""
        return [Output(data=_png(item)) for item in items]


def _png(item: Item) -> bytes:
    assert item.data is not None
    channels, height, width, rows, columns = (
        int(item.params[name]) for name in ("channels", "height", "width", "rows", "columns")
    )
    tensor = np.frombuffer(item.data, "<f4").reshape(channels, height, width)[:, :rows, :columns]
    if not np.isfinite(tensor).all():
        raise InvalidImage("the tensor holds NaN or infinity; its values must be from 0 to 1")
    if tensor.size and not (tensor.min() >= -FAR and tensor.max() <= 1 + FAR):
        ends = f"{tensor.min():g} to {tensor.max():g}"
        raise InvalidImage(f"the tensor goes from {ends}; scale it to 0 to 1 and resend it")
    tensor = tensor.clip(0, 1)
    if channels == 1:
        pixels = np.where(tensor[0] >= 0.5, 255, 0).astype(np.uint8)
    else:
        pixels = np.rint(tensor * 255).astype(np.uint8).transpose(1, 2, 0)[:, :, ::-1]
    done, png = cv2.imencode(".png", np.ascontiguousarray(pixels), QUICKLY)
    assert done
    return png.tobytes()

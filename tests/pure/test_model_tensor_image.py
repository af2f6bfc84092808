"""A client's float tensor becomes the image that it was made of."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from core.errors import InvalidImage
from models.base import Item
from models.tensor_image import TensorImage

MODEL = TensorImage({}, torch.device("cpu"))


def run(tensor: np.ndarray, rows: int, columns: int) -> np.ndarray:
    channels, height, width = tensor.shape
    params = {"channels": channels, "height": height, "width": width, "rows": rows, "columns": columns}
    (output,) = MODEL.run([Item(params, data=memoryview(tensor.astype("<f4").tobytes()))])
    assert isinstance(output.data, bytes)
    return np.asarray(Image.open(io.BytesIO(output.data)))


def test_every_byte_of_an_image_survives_the_way_through_floats() -> None:
    image = np.random.default_rng(0).integers(0, 256, (13, 21, 3), np.uint8)
    padded = np.pad(image, ((0, 3), (0, 3), (0, 0)), mode="symmetric")
    tensor = padded.transpose(2, 0, 1).astype(np.float32) / 255
    assert (run(tensor, 13, 21) == image).all()


def test_a_mask_is_on_from_one_half() -> None:
    tensor = np.array([[[0, 0.49, 0.5, 1, -0.3, 1.3, 0, 0]]], np.float32)
    assert run(tensor, 1, 6).tolist() == [[0, 0, 255, 255, 0, 255]]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_refused(value: float) -> None:
    with pytest.raises(InvalidImage, match="NaN"):
        run(np.full((3, 8, 8), value, np.float32), 8, 8)


@pytest.mark.parametrize("ends", [(0, 255), (-1, 1)])
def test_another_scale_is_refused(ends: tuple[float, float]) -> None:
    with pytest.raises(InvalidImage, match="scale it to 0 to 1"):
        run(np.linspace(*ends, 64, dtype=np.float32).reshape(1, 8, 8), 8, 8)

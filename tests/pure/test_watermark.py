"""A mark on a result: where it lies, how much it covers, and that nothing else changes."""

from __future__ import annotations

import base64
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from core.job import Job
from core.request import OutputFormat, Watermark
from store import codec
from tests.pure.dialect_kit import png
from tests.pure.engine_kit import request
from workers.watermark import draw

GREY = np.full((120, 160, 3), 100, np.uint8)
RED = base64.b64encode(png(20, 10, "red")).decode()


def touched(image: np.ndarray, before: np.ndarray = GREY) -> tuple[int, int, int, int]:
    """Top, left, bottom and right of what has changed."""
    rows, columns = np.nonzero((image[..., :3] != before[..., :3]).any(axis=2))
    return rows.min(), columns.min(), rows.max() + 1, columns.max() + 1


def test_an_image_is_scaled_to_the_result_and_put_in_its_corner() -> None:
    marked = draw(GREY, Watermark(image=RED, opacity=1, margin=5, scale=0.25))
    assert touched(marked) == (95, 115, 115, 155)
    assert (marked[100, 130] == (255, 0, 0)).all()
    assert (GREY == 100).all()


@pytest.mark.parametrize(
    ("position", "corner"),
    [("top-left", (5, 5)), ("top-right", (5, 115)), ("bottom-left", (95, 5)), ("center", (50, 60))],
)
def test_positions(position: str, corner: tuple[int, int]) -> None:
    mark = Watermark(image=RED, opacity=1, margin=5, scale=0.25, position=position)  # type: ignore[arg-type]
    assert touched(draw(GREY, mark))[:2] == corner


def test_opacity_mixes() -> None:
    marked = draw(GREY, Watermark(image=RED, opacity=0.5, scale=0.25))
    assert (marked[90, 130] == (178, 50, 50)).all()


def test_a_text_has_its_colour_and_size() -> None:
    small = touched(draw(GREY, Watermark("hello", opacity=1, font_size=12, colour="#FF0000")))
    marked = draw(GREY, Watermark("hello", opacity=1, font_size=24, colour="#FF0000"))
    large = touched(marked)
    assert large[2] - large[0] > 1.5 * (small[2] - small[0])
    assert (marked[..., 0] == 255).any() and marked[..., 2].min() == 0


def test_grey_and_transparent_results() -> None:
    mark = Watermark(image=RED, opacity=1, scale=0.25)
    assert draw(GREY[..., 0], mark).shape == GREY.shape
    clear = np.zeros((120, 160, 4), np.uint8)
    marked = draw(clear, mark)
    assert marked[95, 130, 3] == 255 and marked[0, 0, 3] == 0


@pytest.mark.parametrize("font", ["", "no such font", "../../etc/passwd"])
def test_a_mark_larger_than_the_result_is_cut_off(font: str) -> None:
    assert draw(GREY[:4, :4], Watermark("a long text", font=font)).shape == (4, 4, 3)


def test_it_is_kept_with_its_job() -> None:
    mark = Watermark("mine", position="center")
    asked = replace(request(output=OutputFormat("webp", 80, watermark=mark)), images=())
    kept = codec.decode(codec.encode(Job("0" * 8, asked, 1.0)))
    assert kept.request.output == asked.output


def test_a_thin_image_does_not_become_larger_than_the_result() -> None:
    thin = base64.b64encode(png(1, 2000, "red")).decode()
    tracemalloc.start()
    marked = draw(GREY[:4], Watermark(image=thin, opacity=1, scale=1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (marked == (255, 0, 0)).all()
    assert peak < 200_000  # bytes; the image in its whole length has more

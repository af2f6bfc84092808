"""Writing images: what the worker encodes is read back by somebody else, with its alpha, profile and quality."""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from core.errors import BadOutput, InvalidParameter
from core.header import read_header
from tests.pure.image_kit import PNG_SIGNATURE, SRGB, far, photo, pillow, save
from workers.codecs import MAX_ICC, Picture, decode, encode

RGB = photo(96, 64)
CLEAR = np.dstack((RGB, np.linspace(0, 255, 96 * 64).astype(np.uint8).reshape(64, 96)))
FORMATS = ("png", "jpeg", "webp", "avif")


def read(data: bytes) -> Picture:
    return decode(data, read_header(data))


def _drawing() -> np.ndarray:
    drawing = np.full((70, 90, 3), 255, np.uint8)
    drawing[10:30, 20:60] = (30, 90, 200)
    return drawing


@pytest.mark.parametrize(
    "image",
    [RGB, RGB[:, :, 0], CLEAR, _drawing(), _drawing()[:, :, 0], RGB[::-1, ::-1], RGB[:1], RGB[:, :1], RGB[:1, :1]],
    ids=["photo", "grey", "alpha", "drawing", "grey drawing", "not contiguous", "one row", "one column", "one pixel"],
)
def test_png_is_lossless_and_read_by_others(image: np.ndarray) -> None:
    data = encode(image)
    assert np.array_equal(np.array(Image.open(io.BytesIO(data))), image)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3, 4]), st.integers(0, 99))
def test_png_of_any_shape_comes_back_bit_for_bit(height: int, width: int, channels: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
    image = image[:, :, 0] if channels == 1 else image
    data = encode(image)
    assert np.array_equal(np.array(Image.open(io.BytesIO(data))), image)
    picture = read(data)
    assert np.array_equal(picture.image[:, :, 0], image if channels == 1 else image[:, :, 0])


def test_a_drawing_costs_few_bytes() -> None:
    assert len(encode(np.repeat(np.repeat(_drawing(), 8, 0), 8, 1))) < 30_000


@pytest.mark.parametrize("format", FORMATS)
def test_colour_comes_back_close(format: str) -> None:
    assert far(pillow(encode(RGB, format)), RGB) < (0.01 if format == "png" else 8)


@pytest.mark.parametrize("format", ["jpeg", "webp", "avif"])
def test_quality_is_obeyed(format: str) -> None:
    sizes = [len(encode(RGB, format, quality=quality)) for quality in (10, 50, 98)]
    assert sizes == sorted(sizes) and sizes[0] * 2 < sizes[2]


@pytest.mark.parametrize("format", ["png", "webp", "avif"])
def test_alpha_is_kept_where_the_format_has_it(format: str) -> None:
    picture = read(encode(RGB, format, alpha=CLEAR[:, :, 3]))
    assert picture.alpha is not None and far(picture.alpha, CLEAR[:, :, 3]) < 2


def test_alpha_is_flattened_on_white_in_jpeg() -> None:
    clear = np.zeros((32, 32, 4), np.uint8)
    clear[:, 16:] = (10, 120, 30, 255)
    picture = read(encode(clear, "jpeg", quality=100))
    assert far(picture.image[:, :14], np.full((32, 14, 3), 255)) < 2
    assert far(picture.image[:, 18:], np.full((32, 14, 3), (10, 120, 30))) < 3


def test_alpha_of_the_source_is_scaled_to_an_enlarged_result() -> None:
    picture = read(encode(photo(192, 128), alpha=CLEAR[:, :, 3]))
    assert picture.alpha is not None and picture.alpha.shape == (128, 192)
    assert far(picture.alpha[::2, ::2], CLEAR[:, :, 3]) < 2


def test_a_result_with_alpha_of_its_own_keeps_it() -> None:
    picture = read(encode(CLEAR, alpha=np.zeros((64, 96), np.uint8)))
    assert picture.alpha is not None and np.array_equal(picture.alpha, CLEAR[:, :, 3])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("profile", [SRGB, SRGB + bytes(200_000)], ids=["small", "of several JPEG segments"])
def test_colour_profiles_survive_both_ways(format: str, profile: bytes) -> None:
    data = encode(RGB, format, icc=profile)
    assert Image.open(io.BytesIO(data)).info["icc_profile"] == profile
    assert read(data).icc == profile
    assert read(save(RGB, format.upper(), icc_profile=profile)).icc == profile


def test_profiles_that_do_not_fit_the_pixels_are_dropped() -> None:
    grey = SRGB[:16] + b"GRAY" + SRGB[20:]
    assert read(save(RGB[:, :, 0], "JPEG", icc_profile=grey)).icc is None
    assert read(save(RGB, "JPEG", icc_profile=SRGB + bytes(MAX_ICC))).icc is None
    assert read(encode(RGB, icc=SRGB + bytes(MAX_ICC))).icc is None
    assert "icc_profile" not in Image.open(io.BytesIO(encode(RGB[:, :, 0], icc=SRGB))).info


@pytest.mark.parametrize("image", [RGB.astype(np.float32), RGB[:, :, :2], RGB[None], np.zeros(5, np.uint8)])
def test_what_is_no_image_is_bad_output(image: np.ndarray) -> None:
    with pytest.raises(BadOutput, match="no image"):
        encode(image)


def test_a_result_too_long_for_its_format_says_what_to_do() -> None:
    with pytest.raises(InvalidParameter, match=r"20000 × 1 pixels; WebP holds sides from 1 to 16383, ask for another"):
        encode(np.zeros((1, 20_000, 3), np.uint8), "webp")


# --- threads --------------------------------------------------------------------------------------------------------


def test_codec_threads_do_not_disturb_each_other() -> None:
    images = [photo(80 + n, 60, n) for n in range(4)]
    wrong: list[int] = []

    def work(n: int) -> None:
        wrong.extend(n for _ in range(5) if not np.array_equal(read(encode(images[n])).image, images[n]))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def frees_gil(work: Callable[[], object]) -> bool:
    """Whether another thread gets on while `work` runs; with an endless switch interval nobody takes the GIL away."""
    interval, counted, got_on = sys.getswitchinterval(), [0], [False]

    def other() -> None:
        before = counted[0]
        for _ in range(500):  # on a busy machine the other thread may be too late to take the GIL
            work()
            if counted[0] > before:
                got_on[0] = True
                return

    sys.setswitchinterval(60)
    try:
        thread = threading.Thread(target=other)
        thread.start()
        counted[0] += 1
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    return got_on[0]


@pytest.mark.parametrize("format", FORMATS)
def test_the_device_loop_runs_on_while_a_codec_works(format: str) -> None:
    data = encode(RGB, format)
    header = read_header(data)
    assert not frees_gil(lambda: sum(range(1000)))
    assert frees_gil(lambda: encode(RGB, format))
    assert frees_gil(lambda: decode(data, header))


def test_the_png_signature_is_the_first_thing_written() -> None:
    assert encode(RGB)[:8] == PNG_SIGNATURE

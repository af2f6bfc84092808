"""What travels from input to output beside the pixels when a client wants it: read here by Pillow, an outsider."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from core.header import read_header
from tests.pure.image_kit import SRGB, chunk, far, insert_after_header, photo, save
from workers.codecs import Picture, decode, encode
from workers.metadata import MAX_EXIF, MAX_TEXT, Metadata, read

RGB = photo(48, 32)
CLEAR = np.dstack((RGB, np.linspace(0, 255, 48 * 32).astype(np.uint8).reshape(32, 48)))
MAKER, MAKER_NOTE, ARTIST, ORIENTATION = "ImagePool & Söhne", 0x927C, 0x013B, 0x0112


def exif(orientation: int = 6, **more: Any) -> bytes:
    block = Image.Exif()
    block[ORIENTATION], block[0x010F] = orientation, "Camera"
    block.get_ifd(0x8769)[0x9003] = "2024:05:06 07:08:09"
    block.get_ifd(0x8769)[MAKER_NOTE] = b"\0\1secret of the maker\xff"
    block.get_ifd(0x8825)[1] = "N"
    return block.tobytes()


def kept(data: bytes) -> Picture:
    return decode(data, read_header(data), keep_metadata=True)


def again(data: bytes, format: Any, **how: Any) -> Image.Image:
    """The image as it comes out when nothing is done to it."""
    picture = kept(data)
    file = encode(picture.image, format, icc=picture.icc, alpha=picture.alpha, metadata=picture.metadata, **how)
    read_header(file)
    image = Image.open(io.BytesIO(file))
    image.load()
    return image


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_exif_is_kept_without_its_orientation(format: str) -> None:
    image = again(save(RGB, format.upper(), exif=exif()), format)
    assert image.size == (32, 48), "the pixels are upright"
    found = image.getexif()
    assert ORIENTATION not in found and found[0x010F] == "Camera"
    assert found.get_ifd(0x8769)[0x9003] == "2024:05:06 07:08:09"
    assert found.get_ifd(0x8769)[MAKER_NOTE] == b"\0\1secret of the maker\xff"
    assert found.get_ifd(0x8825)[1] == "N"


def test_exif_goes_into_avif_too() -> None:
    assert again(save(RGB, "JPEG", exif=exif()), "avif").getexif()[0x010F] == "Camera"


def test_the_thumbnail_that_would_show_what_was_removed_is_left_out() -> None:
    body = exif(1)[6:]
    order = "<" if body[:2] == b"II" else ">"
    (at,) = struct.unpack_from(order + "I", body, 4)
    (count,) = struct.unpack_from(order + "H", body, at)
    link = at + 2 + 12 * count
    thumbnail = save(photo(16, 16), "JPEG")
    second = struct.pack(order + "HHHIIHHIII", 2, 0x0201, 4, 1, len(body) + 30, 0x0202, 4, 1, len(thumbnail), 0)
    whole = body[:link] + struct.pack(order + "I", len(body)) + body[link + 4 :] + second + thumbnail
    data = save(RGB, "JPEG", exif=b"Exif\0\0" + whole)
    assert thumbnail in data
    metadata = kept(data).metadata
    assert metadata is not None and metadata.exif is not None and b"Camera" in metadata.exif
    assert b"\xff\xd8\xff" not in metadata.exif


@pytest.mark.parametrize("format", ["png", "jpeg"])
def test_the_resolution_is_kept(format: str) -> None:
    image = again(save(RGB, format.upper(), dpi=(300, 150)), format)
    assert [round(one) for one in image.info["dpi"]] == [300, 150]


def test_dots_per_centimetre_are_understood_and_an_aspect_without_unit_is_no_resolution() -> None:
    data = bytearray(save(RGB, "JPEG", dpi=(100, 100)))
    data[13] = 2
    assert [round(one) for one in again(bytes(data), "jpeg").info["dpi"]] == [254, 254]
    data[13] = 0
    assert kept(bytes(data)).metadata == Metadata()


@pytest.mark.parametrize("text", ["a cat\nNegative prompt: dogs\nSteps: 20", "ein Käse", "一只猫 🐈"])
@pytest.mark.parametrize("packed", [True, False])
def test_the_parameters_of_an_image_generator_are_kept(text: str, packed: bool) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("Other", "not this")
    if text.isascii() or "K" in text:
        info.add_text("parameters", text, zip=packed)
    else:
        info.add_itxt("parameters", text, zip=packed)
    image = again(save(RGB, "PNG", pnginfo=info), "png")
    assert image.info["parameters"] == text and "Other" not in image.info


def test_colour_profile_alpha_and_metadata_go_together() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "x")
    image = again(save(CLEAR, "PNG", pnginfo=info, icc_profile=SRGB, dpi=(72, 72), exif=exif(1)), "png")
    assert image.info["parameters"] == "x" and image.info["icc_profile"] == SRGB and "dpi" in image.info
    assert np.array_equal(np.array(image), CLEAR)
    photograph = again(save(RGB, "JPEG", icc_profile=SRGB, exif=exif(), dpi=(72, 72)), "jpeg")
    assert photograph.info["icc_profile"] == SRGB and photograph.getexif()[0x010F] == "Camera"


def test_an_alpha_channel_that_is_opaque_stays_one_when_metadata_is_kept() -> None:
    opaque = np.dstack((RGB, np.full(RGB.shape[:2], 255, np.uint8)))
    assert again(save(opaque, "PNG"), "png").mode == "RGBA"
    assert decode(save(opaque, "PNG"), read_header(save(opaque, "PNG"))).alpha is None


def test_nothing_is_read_or_written_unless_it_is_asked_for() -> None:
    data = save(RGB, "PNG", exif=exif(1), dpi=(72, 72))
    picture = decode(data, read_header(data))
    assert picture.metadata is None
    assert not {"dpi", "exif"} & Image.open(io.BytesIO(encode(picture.image))).info.keys()


# --- limits ---------------------------------------------------------------------------------------------------------


def test_text_that_is_too_long_is_left_out_packed_or_not() -> None:
    bomb = zlib.compress(b"x" * (64 << 20))
    for body in (b"parameters\0" + b"x" * (MAX_TEXT + 1), b"parameters\0" + b"\xe9" * (MAX_TEXT // 2 + 1)):
        assert kept(insert_after_header(save(RGB), chunk(b"tEXt", body))).metadata == Metadata()
    assert kept(insert_after_header(save(RGB), chunk(b"zTXt", b"parameters\0\0" + bomb))).metadata == Metadata()
    longest = insert_after_header(save(RGB), chunk(b"tEXt", b"parameters\0" + b"x" * MAX_TEXT))
    assert kept(longest).metadata == Metadata(parameters="x" * MAX_TEXT)


def test_exif_that_is_too_long_is_left_out() -> None:
    block = Image.Exif()
    block[ARTIST] = "x" * MAX_EXIF
    assert kept(save(RGB, "PNG", exif=block.tobytes())).metadata == Metadata()


@pytest.mark.parametrize("name", [b"eXIf", b"zTXt", b"iTXt", b"tEXt", b"pHYs"])
@pytest.mark.parametrize("body", [
    b"", b"parameters\0", b"parameters\0\0", b"parameters\0\1\0\0", b"II*\0\xff\xff\xff\xff",
])  # fmt: skip
def test_a_damaged_chunk_costs_the_metadata_and_not_the_image(name: bytes, body: bytes) -> None:
    picture = kept(insert_after_header(save(RGB), chunk(name, body)))
    assert np.array_equal(picture.image, RGB)
    assert picture.metadata == Metadata()


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 300), st.sampled_from(["PNG", "JPEG", "WEBP"]))
def test_no_damage_to_exif_ever_raises(noise: bytes, at: int, format: str) -> None:
    block = exif()
    damaged = block[:6] + (block[6:at] + noise + block[at + len(noise) :])[: MAX_EXIF - 8]
    data = save(RGB, format, exif=damaged)
    metadata = read(memoryview(data), read_header(data).format)
    if metadata.exif:
        Image.open(io.BytesIO(encode(RGB, "jpeg", metadata=metadata))).getexif()


# --- colour of a JPEG -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("subsampling", "layers"), [("420", (2, 2, 0)), ("444", (1, 1, 0)), (None, (1, 1, 0))])
def test_the_subsampling_of_a_jpeg_can_be_chosen(subsampling: Any, layers: tuple[int, int, int]) -> None:
    image = Image.open(io.BytesIO(encode(RGB, "jpeg", quality=100, subsampling=subsampling)))
    assert image.layer[0][1:3] == layers[:2]


def test_a_jpeg_of_quality_100_and_half_colour_has_the_pixels_of_pillows() -> None:
    """IOPaint writes its JPEGs so."""
    ours, theirs = encode(RGB, "jpeg", quality=100, subsampling="420"), save(RGB, "JPEG", quality=100)
    assert far(np.array(Image.open(io.BytesIO(ours))), np.array(Image.open(io.BytesIO(theirs)))) == 0


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "PNG"])
@pytest.mark.parametrize("quality", [60, 100])
def test_an_image_is_decoded_to_the_pixels_that_pillow_gives(format: str, quality: int) -> None:
    data = save(photo(131, 77), format, quality=quality)
    assert np.array_equal(kept(data).image, np.array(Image.open(io.BytesIO(data)).convert("RGB")))

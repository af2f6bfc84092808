"""The header reader: agrees with Pillow, refuses by name what is not served, and cannot be made to work hard."""

from __future__ import annotations

import io
import itertools
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from core.errors import InvalidImage, TooLarge, UnsupportedImage
from core.header import read_header
from core.headers import ACCEPTED
from tests.pure.image_kit import chunk, exif, insert_after_header, photo, png, png_header, save

PHOTO = Image.fromarray(photo(61, 37))
CLEAR = PHOTO.copy()
CLEAR.putalpha(77)
FILES = {
    "png": save(PHOTO), "jpeg": save(PHOTO, "JPEG", exif=exif(6)), "webp": save(PHOTO, "WEBP", exif=exif(3)),
    "webp lossless": save(CLEAR, "WEBP", lossless=True), "webp alpha": save(CLEAR, "WEBP"),
    "avif": save(CLEAR, "AVIF", speed=10, exif=exif(8)), "progressive": save(PHOTO, "JPEG", progressive=True),
    "palette": save(PHOTO.quantize(9), transparency=2),
}  # fmt: skip


MODES = [
    *(("PNG", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
    *(("JPEG", mode) for mode in ("L", "RGB", "CMYK")),
    *((format, mode) for format in ("WEBP", "AVIF") for mode in ("RGB", "RGBA")),
]


@pytest.mark.parametrize(("format", "mode"), MODES)
@pytest.mark.parametrize("size", [(1, 1), (3, 1), (17, 64), (640, 33)])
def test_agrees_with_pillow(format: str, mode: str, size: tuple[int, int]) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.full((size[1], size[0]), 40_000, np.uint16))
    else:
        image = Image.fromarray(photo(*size)).convert(mode)
        if image.mode in ("LA", "RGBA"):
            image.putalpha(9)
    data = save(image, format)
    theirs = Image.open(io.BytesIO(data))
    header = read_header(data)
    assert (header.format, header.width, header.height) == (format.lower(), *theirs.size)
    assert header.alpha == theirs.has_transparency_data
    assert header.orientation == 1


@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 400), height=st.integers(1, 400), format=st.sampled_from(["PNG", "JPEG", "WEBP"]))
def test_any_size_is_read_as_written(width: int, height: int, format: str) -> None:
    header = read_header(save(Image.new("RGB", (width, height)), format))
    assert (header.width, header.height, header.pixels) == (width, height, width * height)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "AVIF"])
def test_orientation_turns_the_upright_size(format: str, orientation: int) -> None:
    header = read_header(save(PHOTO, format, exif=exif(orientation)))
    assert (header.width, header.height, header.orientation) == (61, 37, orientation)
    assert (header.upright_width, header.upright_height) == ((37, 61) if orientation >= 5 else (61, 37))


def test_orientation_behind_the_pixels_of_a_png_counts() -> None:
    data = save(PHOTO)
    assert read_header(data[:-12] + chunk(b"eXIf", exif(6)[6:]) + data[-12:]).orientation == 6


@pytest.mark.parametrize("block", [b"", b"Exif\0\0", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff" + bytes(40)])
def test_broken_exif_does_not_cost_the_image(block: bytes) -> None:
    assert read_header(insert_after_header(save(PHOTO), chunk(b"eXIf", block))).orientation == 1


def test_stray_and_fill_bytes_between_jpeg_segments_are_skipped() -> None:
    data = save(PHOTO, "JPEG")
    assert read_header(data[:20] + b"\x12\x34\xff\xff" + data[20:]).width == 61


def test_a_memoryview_is_read_in_place() -> None:
    assert read_header(memoryview(bytearray(FILES["png"]))) == read_header(FILES["png"])


# --- refused by name ------------------------------------------------------------------------------------------------


def _frames(format: str, **options: object) -> bytes:
    more = [Image.fromarray(photo(20, 20, seed)) for seed in range(3)]
    return save(Image.fromarray(photo(20, 20, 9)), format, save_all=True, append_images=more, **options)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("animated AVIF", _frames("AVIF", speed=10)),
        ("BigTIFF", b"II+\0" + bytes(30)),
        ("PAM", b"P7\n"),
        ("JPEG 2000", save(PHOTO, "JPEG2000")),
        ("EPS", save(PHOTO, "EPS")),
        ("PDF", b"%PDF-1.7\n"),
        ("ICO", save(PHOTO, "ICO")),
        ("PSD", b"8BPS\0\x01" + bytes(30)),
        ("SVG", b'\n <svg xmlns="http://www.w3.org/2000/svg"/>'),
        ("SVG", b'\xef\xbb\xbf<?xml version="1.0"?><svg/>'),
        ("HEIC", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99)),
        ("HEIC", b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(99)),
        ("JPEG XL", b"\xff\x0a" + bytes(99)),
        ("JPEG XL", b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(99)),
        ("ISO media", b"\0\0\0\x18ftypisom\0\0\0\0isommp42" + bytes(99)),
        ("lossless JPEG", FILES["jpeg"].replace(b"\xff\xc0", b"\xff\xc3", 1)),
        ("arithmetic-coded JPEG", FILES["jpeg"].replace(b"\xff\xc0", b"\xff\xc9", 1)),
        ("12 bits", FILES["jpeg"].replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c", 1)),
        ("tiles", FILES["avif"].replace(b"av01Color", b"gridColor", 1)),
    ],
)  # fmt: skip
def test_what_is_not_served_is_named_with_what_is(name: str, data: bytes) -> None:
    with pytest.raises(UnsupportedImage) as refusal:
        read_header(data)
    assert name in refusal.value.message
    assert ACCEPTED in refusal.value.message or "baseline" in refusal.value.message


def test_one_frame_that_calls_itself_an_animation_is_a_picture() -> None:
    assert read_header(insert_after_header(save(PHOTO), chunk(b"acTL", struct.pack(">II", 1, 0)))).width == 61


@pytest.mark.parametrize("data", [b"", b"\x89", b"<html><body>", b"hello" * 99, bytes(100), b"\xff\xd8", b"MZ\x90"])
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidImage, match=f"send a {ACCEPTED} file"):
        read_header(data)


def test_polyglots_are_judged_by_their_first_bytes() -> None:
    html = b"<script>alert(1)</script>"
    assert read_header(save(PHOTO) + html).format == "png"
    with pytest.raises(InvalidImage):
        read_header(html + save(PHOTO))
    with pytest.raises(InvalidImage, match="GIF"):
        read_header(b"GIF89a" + save(PHOTO))


# --- limits ---------------------------------------------------------------------------------------------------------


def test_a_huge_claim_with_a_tiny_body_is_too_large() -> None:
    with pytest.raises(TooLarge, match=r"60000 × 60000 = 3,600,000,000 pixels; at most 25,000,000") as refusal:
        read_header(png_header(60_000, 60_000) + chunk(b"IDAT", bytes(1024)) + chunk(b"IEND", b""))
    assert refusal.value.details["pixels"] == 3_600_000_000 and refusal.value.details["max_pixels"] == 25_000_000


def test_a_50_megapixel_single_colour_png_is_too_large() -> None:
    with pytest.raises(TooLarge):
        read_header(save(Image.new("1", (10_000, 5_000))))


def test_the_limit_itself_is_allowed() -> None:
    assert read_header(FILES["png"], max_pixels=61 * 37).pixels == 61 * 37
    with pytest.raises(TooLarge):
        read_header(FILES["png"], max_pixels=61 * 37 - 1)


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (65_536, 1), (1, 2**31)])
def test_sides_of_zero_and_beyond_65535_are_invalid(size: tuple[int, int]) -> None:
    with pytest.raises(InvalidImage, match="a side must be from 1 to 65535"):
        read_header(png(*size, b""), max_pixels=2**40)


def test_a_jpeg_of_height_zero_is_invalid() -> None:
    sof = FILES["jpeg"].index(b"\xff\xc0")
    with pytest.raises(InvalidImage, match="61 × 0 pixels"):
        read_header(FILES["jpeg"][: sof + 5] + b"\0\0" + FILES["jpeg"][sof + 7 :])


def test_a_webp_canvas_that_lies_about_its_picture_is_invalid() -> None:
    data = bytearray(FILES["webp alpha"])
    data[24:27] = b"\x09\0\0"
    with pytest.raises(InvalidImage, match="differ in size"):
        read_header(bytes(data))


@pytest.mark.parametrize("claim", [(10, 10), (5_000, 5_000)])
def test_an_avif_box_that_lies_about_its_picture_is_invalid(claim: tuple[int, int]) -> None:
    data = bytearray(FILES["avif"])
    struct.pack_into(">II", data, data.index(b"ispe") + 8, *claim)
    with pytest.raises(InvalidImage, match="another size than its picture"):
        read_header(bytes(data))


@pytest.mark.parametrize("depth_and_colour", [(16, 3), (4, 2), (3, 0), (8, 5), (8, 1)])
def test_impossible_png_kinds_are_invalid(depth_and_colour: tuple[int, int]) -> None:
    depth, colour = depth_and_colour
    with pytest.raises(InvalidImage, match="header is not valid"):
        read_header(png(4, 4, b"", depth=depth, colour=colour))


def test_a_png_without_pixels_is_invalid() -> None:
    with pytest.raises(InvalidImage, match="no pixels"):
        read_header(png_header(4, 4) + chunk(b"IEND", b""))


@pytest.mark.parametrize("kind", FILES)
def test_cut_anywhere_in_the_header_is_invalid(kind: str) -> None:
    data = FILES[kind]
    for length in itertools.chain(range(min(len(data), 700)), range(700, len(data), 97)):
        try:
            read_header(data[:length])
        except InvalidImage as refusal:
            assert refusal.message
        else:
            assert kind in ("jpeg", "progressive", "avif") and length > 200  # they only show it in their pixels


# --- nothing makes it work hard or fail in another way --------------------------------------------------------------

HOSTILE = {
    "chunks without end": png_header(4, 4) + chunk(b"tEXt", b"") * 400_000,
    "eXIf without end": png_header(4, 4) + chunk(b"eXIf", b"MM\0*\0\0\0\x08\xff\xff" + bytes(6_144)) * 5_000,
    "fill bytes": b"\xff\xd8" + b"\xff" * 5_000_000,
    "empty segments": b"\xff\xd8" + b"\xff\xe0\0\x02" * 1_000_000,
    "segments of length 0": b"\xff\xd8" + b"\xff\xe0\0\0" * 1_000_000,
    "webp chunks": b"RIFF" + struct.pack("<I", 8_000_014 + 8) + b"WEBPVP8X" + struct.pack("<IB9x", 10, 0)
    + b"EXIF\0\0\0\0" * 1_000_000,
    "boxes": FILES["avif"][:32] + (b"\0\0\0\x08free" * 1_000_000),
    "links": FILES["avif"].replace(b"ipma\0\0\0\0\0\0\0\x02", b"ipma\0\0\0\0\xff\xff\xff\xff") + bytes(5_000_000),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.timeout(10)
def test_endless_structures_are_left_early(name: str) -> None:
    with pytest.raises(InvalidImage):
        read_header(HOSTILE[name])


def _judge(data: bytes) -> None:
    try:
        header = read_header(data)
    except (InvalidImage, UnsupportedImage, TooLarge) as refusal:
        assert refusal.message[-1] != "\n" and "/" not in refusal.message
    else:
        assert header.width > 0 and header.height > 0 and header.pixels <= 25_000_000
        assert 1 <= header.orientation <= 8


@settings(max_examples=300, deadline=None)
@given(
    tail=st.binary(max_size=300),
    magic=st.sampled_from([b"", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBPVP8X", *(file[:40] for file in FILES.values())]),
)
def test_arbitrary_bytes_raise_nothing_else(tail: bytes, magic: bytes) -> None:
    _judge(magic + tail)


@settings(max_examples=600, deadline=None)
@given(data=st.data(), kind=st.sampled_from(sorted(FILES)))
def test_mutated_files_raise_nothing_else(data: st.DataObject, kind: str) -> None:
    file = bytearray(FILES[kind])
    reach = min(len(file), 600)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, reach - 1))
        file[at] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, reach - 1))
        del file[at : at + data.draw(st.integers(1, 40))]
    _judge(bytes(file))

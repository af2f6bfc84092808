"""Reading images in the worker: every kind of file comes out right and upright, damage comes out as `InvalidImage`, and
memory stays bounded."""

from __future__ import annotations

import io
import re
import struct
import tracemalloc
import zlib
from dataclasses import replace

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from core.errors import InvalidImage, UnsupportedImage
from core.header import read_header
from tests.pure.image_kit import chunk, exif, far, insert_after_header, photo, png, png_header, save
from workers.codecs import MAX_ICC, Picture, decode, decode_mask, encode

RGB = photo(96, 64)
CLEAR = np.dstack((RGB, np.linspace(0, 255, 96 * 64).astype(np.uint8).reshape(64, 96)))
FORMATS = ("png", "jpeg", "webp", "avif")


def read(data: bytes) -> Picture:
    return decode(data, read_header(data))


# --- every kind of file ---------------------------------------------------------------------------------------------

IMAGE = Image.fromarray(RGB)
KINDS = {
    "RGB": save(IMAGE), "RGBA": save(CLEAR),
    "L": save(IMAGE.convert("L")), "LA": save(Image.fromarray(CLEAR).convert("LA")), "1 bit": save(IMAGE.convert("1")),
    "palette": save(IMAGE.quantize(200)), "palette 2 bits": save(IMAGE.quantize(4), bits=2),
    "palette + tRNS": save(IMAGE.quantize(16), transparency=3),
    "palette + tRNS table": save(IMAGE.quantize(4), transparency=b"\x00\x50\xff\x90"),
    "L + tRNS": save(IMAGE.convert("L"), transparency=90),
    "RGB + tRNS": save(IMAGE, transparency=tuple(int(v) for v in RGB[5, 5])),
    "L JPEG": save(IMAGE.convert("L"), "JPEG", quality=95),
    "progressive": save(IMAGE, "JPEG", quality=95, progressive=True), "4:4:4": save(IMAGE, "JPEG", subsampling=0),
    "CMYK JPEG, Adobe's inverted": save(IMAGE.convert("CMYK"), "JPEG", quality=95),
    "WebP": save(IMAGE, "WEBP"), "WebP + alpha": save(CLEAR, "WEBP"),
    "WebP lossless": save(CLEAR, "WEBP", lossless=True, exact=True),
    "AVIF": save(IMAGE, "AVIF", speed=10), "AVIF + alpha": save(CLEAR, "AVIF", speed=10),
}  # fmt: skip
CUT = ("RGB", "palette", "progressive", "4:4:4", "L JPEG", "CMYK JPEG, Adobe's inverted", "WebP", "WebP lossless",
       "WebP + alpha", "AVIF", "AVIF + alpha")  # fmt: skip
ADAM7 = (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("kind", KINDS)
def test_decodes_as_pillow_does(kind: str) -> None:
    theirs = Image.open(io.BytesIO(KINDS[kind]))
    ours = read(KINDS[kind])
    assert ours.image.dtype == np.uint8 and ours.image.shape == (64, 96, 3)
    assert ours.image.flags.c_contiguous and ours.image.flags.writeable
    assert far(ours.image, np.array(theirs.convert("RGB"))) <= (0.6 if "JPEG" in kind else 0)
    if theirs.has_transparency_data:
        assert ours.alpha is not None
        assert np.array_equal(ours.alpha, np.array(theirs.convert("RGBA"))[:, :, 3])
    else:
        assert ours.alpha is None


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_of_16_bits_the_high_8_count(channels: int) -> None:
    values = np.arange(0, 65_536, 65_535 // (32 * 24 - 1))[: 32 * 24].astype(np.uint16).reshape(24, 32)
    pixels = np.repeat(values[:, :, None], channels, 2)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    picture = read(png(32, 24, rows, depth=16, colour={1: 0, 2: 4, 3: 2, 4: 6}[channels]))
    expected = (values >> 8).astype(np.uint8)
    assert np.array_equal(picture.image, np.repeat(expected[:, :, None], 3, 2))
    assert (picture.alpha is None) == (channels in (1, 3))
    if picture.alpha is not None:
        assert np.array_equal(picture.alpha, expected)


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (5, 5), (8, 9), (33, 17)])
def test_interlaced_png_of_any_size(size: tuple[int, int]) -> None:
    width, height = size
    pixels, rows = photo(width, height), b""
    for x, y, across, down in ADAM7:
        part = pixels[y::down, x::across]
        rows += b"".join(b"\0" + row.tobytes() for row in part if part.shape[1])
    assert np.array_equal(read(png(width, height, rows, interlace=1)).image, pixels)


@pytest.mark.parametrize("size", [(1, 1), (1, 8192), (8191, 7), (3000, 1)])
@pytest.mark.parametrize("format", FORMATS)
def test_extreme_shapes_survive_both_ways(size: tuple[int, int], format: str) -> None:
    pixels = np.full((size[1], size[0], 3), (200, 90, 30), np.uint8)
    assert far(read(encode(pixels, format)).image, pixels) < 4


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_image_and_mask_stay_together_whatever_their_orientation(format: str, orientation: int) -> None:
    options = {"exif": exif(orientation), "quality": 100}
    image = np.zeros((40, 64, 3), np.uint8)
    image[:12, :20] = 255  # one bright corner shows every turn and mirror
    data = save(image, format, **options)
    header = read_header(data)
    upright = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert far(decode(data, header).image, upright) < 1
    size = (header.upright_width, header.upright_height)
    mask_data = save(image[:, :, 0], "PNG", exif=exif(orientation))
    mask = decode_mask(mask_data, read_header(mask_data), size)
    assert far(mask, upright[:, :, 0]) < 3


def test_an_opaque_alpha_channel_is_no_alpha() -> None:
    assert read(save(IMAGE.convert("RGBA"))).alpha is None


def test_a_memoryview_decodes_like_bytes() -> None:
    for data in (KINDS["RGB"], KINDS["4:4:4"], KINDS["WebP"], KINDS["AVIF"]):
        view = memoryview(bytearray(b"before" + data + b"behind"))[6:-6]
        assert np.array_equal(decode(view, read_header(view)).image, read(data).image)


# --- masks ----------------------------------------------------------------------------------------------------------


def mask_of(image: np.ndarray, **changes: bool) -> np.ndarray:
    data = save(image)
    header = read_header(data)
    header = replace(header, **changes)
    return decode_mask(data, header, (header.width, header.height))


@pytest.mark.parametrize("value", [0, 255, 127, 128])
def test_a_grey_mask_is_taken_as_it_is(value: int) -> None:
    assert np.array_equal(mask_of(np.full((5, 7), value, np.uint8)), np.full((5, 7), value))


def test_soft_edges_of_a_mask_stay_soft() -> None:
    ramp = np.tile(np.arange(256, dtype=np.uint8), (3, 1))
    assert np.array_equal(mask_of(ramp), ramp)


def test_a_colour_mask_is_its_luminance() -> None:
    assert np.array_equal(mask_of(RGB), np.array(IMAGE.convert("L")))


def test_openai_s_rule_transparent_means_change_whatever_the_colour() -> None:
    assert np.array_equal(mask_of(CLEAR), 255 - CLEAR[:, :, 3])
    hole = np.zeros((4, 6, 4), np.uint8)
    hole[:, 3:, 3] = 255
    assert np.array_equal(mask_of(hole)[0], [255, 255, 255, 0, 0, 0])


def test_an_opaque_mask_with_an_alpha_channel_is_its_luminance() -> None:
    opaque = np.dstack((RGB, np.full((64, 96), 255, np.uint8)))
    assert np.array_equal(mask_of(opaque), np.array(IMAGE.convert("L")))


def test_strokes_on_a_transparent_mask_are_luminance_when_the_dialect_says_so() -> None:
    strokes = np.zeros((4, 6, 4), np.uint8)
    strokes[1, 2:4] = (255, 203, 0, 186)  # IOPaint's brush
    expected = np.zeros((4, 6), np.uint8)
    expected[1, 2:4] = 195
    assert np.array_equal(mask_of(strokes, alpha=False), expected)


def test_a_mask_of_another_size_is_refused_with_both_sizes() -> None:
    data = save(RGB[:, :, 0])
    with pytest.raises(InvalidImage, match=r"the mask is 96 × 64 pixels and the image 64 × 96"):
        decode_mask(data, read_header(data), (64, 96))


# --- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sixteenths", range(16))
@pytest.mark.parametrize("kind", CUT)
def test_a_file_cut_off_anywhere_gives_no_half_picture(kind: str, sixteenths: int) -> None:
    data = KINDS[kind]
    cut = data[: len(data) * sixteenths // 16]
    with pytest.raises(InvalidImage, match=r"cut off|send|damaged|fewer"):
        decode(cut, read_header(data))
    with pytest.raises(InvalidImage):
        read(cut)


JPEGS = {kind: data for kind, data in KINDS.items() if data[:2] == b"\xff\xd8"} | {
    "CMYK, progressive": save(IMAGE.convert("CMYK"), "JPEG", quality=95, progressive=True)
}
SUBSAMPLED = {
    f"CMYK, {name}": save(IMAGE.convert("CMYK"), "JPEG", quality=90, subsampling=sub, progressive=name.endswith("ive"))
    for name, sub in (("4:2:2", 1), ("4:2:0", 2), ("4:2:0, progressive", 2))
}
JPEGS |= SUBSAMPLED


@pytest.mark.parametrize("kind", SUBSAMPLED)
def test_four_colours_in_fewer_samples_are_read_as_pillow_does(kind: str) -> None:
    expected = np.array(Image.open(io.BytesIO(SUBSAMPLED[kind])).convert("RGB"))
    assert np.array_equal(read(SUBSAMPLED[kind]).image, expected)


def with_the_unusual(jpeg: bytes) -> dict[str, bytes]:
    """The file with values that libjpeg warns of and reads over."""
    adobe = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0"
    scan = re.search(rb"\xff\xda\0(.).*?\x3f\0", jpeg, re.DOTALL)
    assert scan is not None
    plain = jpeg.replace(adobe, b"").replace(b"JFIF", b"jfif")
    return {
        "version": jpeg[:2] + b"\xff\xe0\0\x10JFIF\0\x09\1\0\0\1\0\1\0\0" + plain[2:],
        "transform": plain[:2] + adobe + b"\x07" + plain[2:],
        "coefficients": jpeg[: scan.end() - 2] + b"\x05\0" + jpeg[scan.end() :],
    }


@pytest.mark.parametrize("tenths", [3, 6, 9])
@pytest.mark.parametrize("kind", JPEGS)
def test_a_cut_jpeg_that_was_given_an_end_gives_no_half_picture(kind: str, tenths: int) -> None:
    data, scan = JPEGS[kind], JPEGS[kind].index(b"\xff\xda") + 14
    with pytest.raises(InvalidImage, match="damaged or cut off"):
        read(data[: scan + (len(data) - scan) * tenths // 10] + b"\xff\xd9")


@pytest.mark.parametrize("kind", JPEGS)
def test_a_jpeg_that_claims_more_lines_than_it_has_gives_no_half_picture(kind: str) -> None:
    data = re.sub(rb"(?<=\xff[\xc0\xc2]\0.\x08)\0\x40", b"\1\0", JPEGS[kind], count=1, flags=re.DOTALL)
    assert read_header(data).height == 256
    with pytest.raises(InvalidImage, match="damaged or cut off"):
        read(data)


@pytest.mark.parametrize("what", ["version", "transform", "coefficients"])
def test_unusual_values_in_a_jpeg_are_forgiven_and_hide_no_cut(what: str) -> None:
    data = with_the_unusual(KINDS["4:4:4"])[what]
    with pytest.raises(ValueError, match=r"Warning|Unknown|Invalid"):
        simplejpeg.decode_jpeg(data)
    assert np.array_equal(read(data).image, read(KINDS["4:4:4"]).image)
    with pytest.raises(InvalidImage, match="damaged or cut off"):
        read(data[: len(data) * 9 // 10] + b"\xff\xd9")


def test_a_cmyk_jpeg_of_an_unknown_transform_has_its_colours() -> None:
    data = KINDS["CMYK JPEG, Adobe's inverted"]
    assert data.count(b"Adobe\0\x64\0\0\0\0\0") == 1
    ycck = read(data.replace(b"Adobe\0\x64\0\0\0\0\0", b"Adobe\0\x64\0\0\0\0\x02")).image
    odd = read(data.replace(b"Adobe\0\x64\0\0\0\0\0", b"Adobe\0\x64\0\0\0\0\x07")).image
    assert np.array_equal(odd, ycck)


def test_harmless_extra_bytes_in_a_jpeg_are_forgiven() -> None:
    data = KINDS["4:4:4"]
    assert np.array_equal(read(data + b"trailer").image, read(data).image)
    assert np.array_equal(read(data[:-2] + b"\0\0\0" + data[-2:]).image, read(data).image)


@pytest.mark.parametrize("name", [b"IHDR", b"PLTE", b"tRNS", b"IDAT"])
def test_a_wrong_checksum_is_damage(name: bytes) -> None:
    data = bytearray(KINDS["palette + tRNS table"])
    at = data.index(name)
    (length,) = struct.unpack_from(">I", data, at - 4)
    data[at + 4 + length] ^= 1
    with pytest.raises(InvalidImage, match="checksum"):
        read(bytes(data))


def test_pixels_that_do_not_unpack_are_damage() -> None:
    rows = b"".join(b"\0" + row.tobytes() for row in RGB)
    for packed in (b"no deflate at all", zlib.compress(rows)[:-4] + b"sum!"):
        with pytest.raises(InvalidImage, match="do not unpack"):
            read(png_header(96, 64) + chunk(b"IDAT", packed) + chunk(b"IEND", b""))


@pytest.mark.parametrize(("rows", "what"), [(13 * 4 - 1, "fewer"), (13 * 4 + 1, "more")])
def test_a_png_with_too_few_or_too_many_pixels_is_refused(rows: int, what: str) -> None:
    assert read(png(4, 4, bytes(13 * 4))).image.shape == (4, 4, 3)
    with pytest.raises(InvalidImage, match=f"{what} pixels than its header says"):
        read(png(4, 4, bytes(rows)))


def test_an_unknown_row_filter_is_damage() -> None:
    with pytest.raises(InvalidImage):
        read(png(4, 4, b"\x09" + bytes(13 * 4 - 1)))


def test_a_palette_image_without_palette_is_damage() -> None:
    with pytest.raises(InvalidImage):
        read(png(4, 4, bytes(5 * 4), colour=3))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "AVIF"])
def test_a_file_of_another_size_than_its_header_said_is_refused(format: str) -> None:
    header = read_header(save(photo(64, 64), format))
    with pytest.raises(InvalidImage):
        decode(save(photo(64, 48), format), header)


def test_a_jpeg_with_hundreds_of_scans_is_refused_before_it_is_decoded() -> None:
    data = KINDS["progressive"]
    scan = data[data.index(b"\xff\xda") : data.index(b"\xff\xc4", data.index(b"\xff\xda"))]
    with pytest.raises(InvalidImage, match="scans"):
        read(data[:-2] + scan * 200 + data[-2:])


@settings(max_examples=300, deadline=None)
@given(data=st.data(), kind=st.sampled_from(sorted(KINDS)))
def test_mutated_files_decode_or_are_refused_and_nothing_else(data: st.DataObject, kind: str) -> None:
    file = bytearray(KINDS[kind])
    for _ in range(data.draw(st.integers(1, 5))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    try:
        picture = decode(bytes(file), read_header(KINDS[kind]))
    except (InvalidImage, UnsupportedImage) as refusal:
        assert "/" not in refusal.message and "Error" not in refusal.message
    else:
        assert picture.image.shape == (64, 96, 3)


# --- bounded memory -------------------------------------------------------------------------------------------------


def _bomb(megabytes: int) -> bytes:
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(megabytes)) + packer.flush()


def _peak(data: bytes) -> tuple[int, Picture | InvalidImage]:
    """Bytes that decoding took at most, and what came of it."""
    header = read_header(data)
    tracemalloc.start()
    try:
        result: Picture | InvalidImage = decode(data, header)
    except InvalidImage as refusal:
        result = refusal
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak, result


@pytest.mark.parametrize("name", [b"zTXt", b"iTXt", b"iCCP"])
def test_text_and_profile_bombs_do_not_unpack(name: bytes) -> None:
    body = b"x\0\0" + _bomb(256) if name != b"iTXt" else b"x\0\1\0\0\0" + _bomb(256)
    peak, result = _peak(insert_after_header(save(RGB), chunk(name, body)))
    assert isinstance(result, Picture) and np.array_equal(result.image, RGB) and result.icc is None
    assert peak < 4 * MAX_ICC


def test_a_pixel_bomb_stops_where_its_header_ends() -> None:
    peak, result = _peak(png_header(8, 8) + chunk(b"IDAT", _bomb(256)) + chunk(b"IEND", b""))
    assert isinstance(result, InvalidImage) and "more pixels" in result.message
    assert peak < 2 << 20

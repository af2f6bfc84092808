"""GIF, BMP, TIFF, PNM, and the first picture of animations: read as Pillow reads them, and no harm done."""

from __future__ import annotations

import io
import random
import struct

import numpy as np
import pytest
from PIL import Image

from core.errors import ImagePoolError, InvalidImage, TooLarge, UnsupportedImage
from core.header import read_header
from tests.pure.image_kit import photo, pillow, save
from workers.codecs import decode, encode

PHOTO = Image.fromarray(photo(61, 37))
MOVING = {"save_all": True, "append_images": [PHOTO.rotate(180)]}


def rle8(width: int, height: int, packed: bytes) -> bytes:
    """A BMP of run lengths, in greys."""
    palette = b"".join(bytes((grey, grey, grey, 0)) for grey in range(256))
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(packed), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 1078 + len(packed), 0, 0, 1078) + info + palette + packed


def tiff(*entries: tuple[int, int, int, int]) -> bytes:
    """A TIFF of nothing but these entries (tag, type, count, value)."""
    body = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + body + bytes(4)


FILES = {
    "GIF": save(PHOTO, "GIF"),
    "GIF animated": save(PHOTO, "GIF", **MOVING),
    "GIF clear, interlaced": save(PHOTO.convert("P"), "GIF", interlace=1, transparency=3),
    **{f"BMP {mode}": save(PHOTO.convert(mode), "BMP") for mode in ("1", "L", "P", "RGB", "RGBA")},
    "BMP RLE": rle8(64, 2, (b"\x20\x07\x20\x09\0\0") * 2 + b"\0\1"),
    **{f"TIFF {mode}": save(PHOTO.convert(mode), "TIFF") for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK")},
    **{f"TIFF {how}": save(PHOTO, "TIFF", compression=how)
       for how in ("tiff_lzw", "tiff_deflate", "tiff_adobe_deflate", "packbits", "jpeg")},
    "TIFF G4": save(PHOTO.convert("1"), "TIFF", compression="group4"),
    "TIFF turned": save(PHOTO, "TIFF", tiffinfo={274: 6}),
    **{f"PNM {mode}": save(PHOTO.convert(mode), "PPM") for mode in ("1", "L", "RGB")},
    "PNM plain": b"P3\n# a comment\n2 2\n255\n" + b" 1 2 3" * 4,
    "PNG animated": save(PHOTO, "PNG", **MOVING),
    "WebP animated": save(PHOTO, "WEBP", lossless=True, **MOVING),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_the_first_picture_is_read_as_pillow_reads_it(name: str) -> None:
    data = FILES[name]
    header = read_header(data)
    found = decode(data, header)
    assert np.array_equal(found.image, pillow(data))
    assert (header.upright_width, header.upright_height) == (found.image.shape[1], found.image.shape[0])
    assert header.alpha >= (found.alpha is not None)


@pytest.mark.parametrize("name", FILES)
def test_half_a_file_is_no_picture(name: str) -> None:
    data = FILES[name][: len(FILES[name]) * 2 // (5 if "animated" in name else 3)]
    with pytest.raises(InvalidImage):
        decode(data, read_header(data))


@pytest.mark.parametrize("format", ["gif", "bmp", "tiff", "ppm"])
def test_what_is_read_can_be_written(format: str) -> None:
    for shape in ((5, 7), (5, 7, 3), (5, 7, 4)):
        data = encode(np.full(shape, 200, np.uint8), format)  # type: ignore[arg-type]
        header = read_header(data)
        assert (header.format, header.width, header.height) == (format, 7, 5)
        assert (decode(data, header).image == 200).all()


def gif(side: int, left: int = 0) -> bytes:
    """A GIF up to its first picture's pixels."""
    picture = struct.pack("<HHHHBB", left, 0, side, side, 0, 8)
    return b"GIF89a" + struct.pack("<HHBBB", side, side, 0, 0, 0) + b"," + picture


SIZE = ((256, 4, 1, 9_000), (257, 4, 1, 9_000), (262, 3, 1, 1), (273, 4, 1, 8))


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (tiff(*SIZE), TooLarge),
        (rle8(9_000, 9_000, b"\0\1"), TooLarge),
        (gif(9_000), TooLarge),
        (b"P6 9000 9000 255 ", InvalidImage),
        (b"P3 9000 9000 255 ", TooLarge),
        (gif(9, 1), InvalidImage),
        (tiff((256, 4, 1, 9), (257, 4, 1, 9), (262, 3, 1, 1), (273, 4, 1, 8), (322, 4, 1, 9_000), (323, 4, 1, 9_000)),
         InvalidImage),
        (tiff((256, 4, 1, 9), (256, 4, 1, 9_000)), InvalidImage),  # which of them would a reader believe?
        (tiff((256, 4, 1, 9), (257, 4, 1, 9), (262, 3, 1, 1), (273, 4, 1 << 30, 8)), InvalidImage),
        (tiff((256, 4, 1, 9), (257, 4, 1, 9), (262, 3, 1, 1), (273, 4, 1, 8), (259, 3, 1, 50_000)), UnsupportedImage),
        (tiff((256, 4, 2, 9), (257, 4, 1, 9), (262, 3, 1, 1), (273, 4, 1, 8)), InvalidImage),
        (b"BM" + bytes(8) + struct.pack("<IIiiHHI", 54, 40, 9, 9, 1, 24, 5) + bytes(99), UnsupportedImage),
    ],
)  # fmt: skip
def test_the_door_refuses_before_a_worker_pays(data: bytes, error: type[ImagePoolError]) -> None:
    with pytest.raises(error):
        read_header(data)


def test_damage_costs_no_more_than_the_picture() -> None:
    """Only ever a picture or a refusal; 3,000 files are no proof; more were tried by hand."""
    chance = random.Random(7)
    names = list(FILES)
    for _ in range(3_000):
        data = bytearray(FILES[chance.choice(names)])
        for _ in range(chance.randint(1, 5)):
            data[chance.randrange(min(len(data), chance.choice((64, 512, 9_999))))] = chance.choice((0, 1, 127, 255))
        try:
            header = read_header(bytes(data), max_pixels=1_000_000)
            decode(bytes(data), header, keep_metadata=True)
        except ImagePoolError:
            pass


def test_sixteen_bits_are_taken_by_their_high_byte_as_pillow_does() -> None:
    import imagecodecs

    deep = np.random.default_rng(3).integers(0, 65_536, (9, 13, 3), dtype=np.uint16)
    data = imagecodecs.png_encode(deep)
    assert np.array_equal(decode(data, read_header(data)).image, np.array(Image.open(io.BytesIO(data))))

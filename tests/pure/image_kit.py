"""Image files for tests: made by Pillow or put together by hand, so that what reads them is not what wrote them."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image, ImageCms

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def photo(width: int, height: int, seed: int = 7) -> np.ndarray:
    """uint8 H x W x 3 with smooth areas, edges and noise, like a photograph."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    base = np.stack([128 + 90 * np.sin(x / (17 + c) + y / (29 - c) + c) for c in range(3)], axis=2)
    base[(x // 40 + y // 56) % 3 == 0] *= 0.6
    return np.clip(base + rng.normal(0, 4, base.shape), 0, 255).astype(np.uint8)


def save(image: Image.Image | np.ndarray, format: str = "PNG", **options: Any) -> bytes:
    """The image as Pillow writes it."""
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, format, **options)
    return file.getvalue()


def pillow(data: bytes) -> np.ndarray:
    """The file's pixels in RGB, as Pillow reads them."""
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


def exif(orientation: int) -> bytes:
    block = Image.Exif()
    block[0x0112] = orientation
    return block.tobytes()


def chunk(name: bytes, body: bytes) -> bytes:
    """One PNG chunk with its checksum."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_header(width: int, height: int, depth: int = 8, colour: int = 2, interlace: int = 0) -> bytes:
    return PNG_SIGNATURE + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace))


def png(width: int, height: int, rows: bytes, *, depth: int = 8, colour: int = 2, interlace: int = 0,
        extra: bytes = b"") -> bytes:  # fmt: skip
    """A PNG of filtered rows; `extra` chunks stand before the pixels."""
    header = png_header(width, height, depth, colour, interlace)
    return header + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def insert_after_header(file: bytes, extra: bytes) -> bytes:
    """A PNG with more chunks right behind IHDR."""
    return file[:33] + extra + file[33:]


def far(a: np.ndarray, b: np.ndarray) -> float:
    """Mean distance of two images in 8-bit steps."""
    assert a.shape == b.shape
    return float(np.abs(a.astype(int) - b.astype(int)).mean())

"""One reader per image format: bounded walks over a file's structure that never touch its pixels.

Each module has `read(data) -> Facts`. It may run off the end of `data`: `struct.error` and `IndexError` mean that the
file is cut off, and `core.header.read_header` says so. Every loop has a fixed bound.
"""

from __future__ import annotations

from typing import NamedTuple

ACCEPTED = "PNG, JPEG, WebP, AVIF, GIF, BMP, TIFF or PNM"


class Facts(NamedTuple):
    """Stored width and height in pixels (unchecked), EXIF orientation 1-8, and whether transparency is possible."""

    width: int
    height: int
    orientation: int = 1
    alpha: bool = False

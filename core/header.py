"""What an image's first bytes say about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ImageFormat = Literal["png", "jpeg", "webp", "avif"]


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """Facts read from the header alone, before any pixel is decoded.

    `width` and `height` are as stored, in pixels. `orientation` is EXIF's 1-8; `upright_width`/`upright_height` are
    the size after it has been applied. `alpha` says whether the file can carry transparency.
    """

    format: ImageFormat
    width: int
    height: int
    orientation: int = 1
    alpha: bool = False

    @property
    def pixels(self) -> int:
        return self.width * self.height

    @property
    def upright_width(self) -> int:
        return self.height if self.orientation >= 5 else self.width

    @property
    def upright_height(self) -> int:
        return self.width if self.orientation >= 5 else self.height


def read_header(data: bytes | memoryview, *, max_pixels: int = 25_000_000) -> ImageHeader:
    """Read the header of an encoded image. Never decodes, never allocates by what the header claims.

    Raises `InvalidImage`, `UnsupportedImage` or `TooLarge` (more than `max_pixels`).
    """
    raise InterruptedError  # replaced by the real reader

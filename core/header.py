"""What an image's first bytes say about it: its kind, size, orientation and whether it may be transparent.

This runs in the master, for every image of every request, so it takes a few microseconds, decodes nothing and
allocates nothing by what a file claims. A file is judged by its magic at offset 0 alone: its name and content type
count for nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from core.data import Data
from core.errors import InvalidImage, TooLarge, UnsupportedImage
from core.headers import ACCEPTED, Facts, avif, bmp, gif, jpeg, png, pnm, tiff, webp
from core.pickles import by_position

ImageFormat = Literal["png", "jpeg", "webp", "avif", "gif", "bmp", "tiff", "ppm"]
MAX_SIDE = 65_535
WRITTEN_SIDE: Mapping[ImageFormat, int] = {
    "png": 65_535, "jpeg": 65_500, "webp": 16_383, "avif": 65_535,
    "gif": 65_535, "bmp": 65_535, "tiff": 65_535, "ppm": 65_535,
}  # fmt: skip
"""The longest side, in pixels, that a file of the format can be given when it is written."""

NAMES: Mapping[ImageFormat, str] = {
    "png": "PNG", "jpeg": "JPEG", "webp": "WebP", "avif": "AVIF", "gif": "GIF", "bmp": "BMP", "tiff": "TIFF",
    "ppm": "PNM",
}  # fmt: skip


@by_position
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


def read_header(data: Data, *, max_pixels: int = 25_000_000) -> ImageHeader:
    """Read the header of an encoded image. Never decodes, never allocates by what the header claims.

    `data` is the whole file: one that visibly ends too early (PNG, WebP) is refused here, before it costs a worker.
    Raises `InvalidImage`, `UnsupportedImage` or `TooLarge` (more than `max_pixels`).
    """
    kind = _kind(bytes(data[:64]))
    try:
        width, height, orientation, alpha = _READERS[kind](memoryview(data))
    except (struct.error, IndexError):
        raise InvalidImage(f"the {NAMES[kind]} file is cut off; send the complete file") from None
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        raise InvalidImage(
            f"the image claims {width} × {height} pixels; a side must be from 1 to {MAX_SIDE}",
            width=width, height=height,
        )  # fmt: skip
    if width * height > max_pixels:
        raise TooLarge(
            f"the image has {width} × {height} = {width * height:,} pixels; at most {max_pixels:,} are accepted, "
            "scale it down first",
            width=width, height=height, pixels=width * height, max_pixels=max_pixels,
        )  # fmt: skip
    return ImageHeader(kind, width, height, orientation, alpha)


_READERS: Mapping[ImageFormat, Callable[[memoryview], Facts]] = {
    "png": png.read, "jpeg": jpeg.read, "webp": webp.read, "avif": avif.read, "gif": gif.read, "bmp": bmp.read,
    "tiff": tiff.read, "ppm": pnm.read,
}  # fmt: skip

# Kinds that are images (or look like one to their owner) and are refused by name.
_REFUSED: Mapping[str, tuple[bytes, ...]] = {
    "BigTIFF": (b"II+\0", b"MM\0+"),
    "JPEG XL": (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"),
    "JPEG 2000": (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51"),
    "JPEG XR": (b"II\xbc\x01",),
    "EPS": (b"%!PS", b"\xc5\xd0\xd3\xc6"),
    "PDF": (b"%PDF-",),
    "PSD": (b"8BPS",),
    "ICO": (b"\0\0\1\0", b"\0\0\2\0"),
    "MNG": (b"\x8aMNG", b"\x8bJNG"),
    "QOI": (b"qoif",),
    "OpenEXR": (b"\x76\x2f\x31\x01",),
    "DDS": (b"DDS ",),
}
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


def _kind(head: bytes) -> ImageFormat:
    """What the magic says. Raises `UnsupportedImage` with the kind's name, or `InvalidImage` when nobody knows it."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if head[4:8] == b"ftyp" and len(head) >= 12:
        brands = {head[8:12], *(head[i : i + 4] for i in range(16, len(head), 4))}
        if head[8:12] == b"avis":
            raise _refuse("an animated AVIF")
        if b"avif" in brands:
            return "avif"
        raise _refuse("a video or an unknown ISO media" if brands.isdisjoint(_HEIC) else "a HEIC")
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    if head.startswith((b"II*\0", b"MM\0*")):
        return "tiff"
    for name, magics in _REFUSED.items():
        if head.startswith(magics):
            raise _refuse(f"{'an' if name[0] in 'EIOM' else 'a'} {name}")
    if head[:2] == b"BM" and head[6:10] == b"\0\0\0\0":
        return "bmp"
    if head[:1] == b"P" and head[1:2] in b"123456" and head[2:3].isspace():
        return "ppm"
    if head[:2] == b"P7" and head[2:3].isspace():
        raise _refuse("a PAM")
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<svg", b"<?xml", b"<!doctype svg", b"<!--")):
        raise _refuse("an SVG (or other XML)")
    if not head:
        raise InvalidImage(f"the image is empty (0 bytes); send a {ACCEPTED} file")
    raise InvalidImage(f"the bytes are no image that can be recognised; send a {ACCEPTED} file")


def _refuse(what: str) -> UnsupportedImage:
    return UnsupportedImage(f"this is {what} file, which is not served; send a {ACCEPTED} file")

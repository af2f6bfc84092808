"""Encoded bytes to pixels and back, for the worker's codec threads. Every codec here frees the GIL; no torch.

Which library does what was chosen by measurement (docs/codecs.md): PNG by igzip and libpng, JPEG by libjpeg-turbo
through simplejpeg, WebP by libwebp, all else by Pillow.

Bad data never comes out as anything but `InvalidImage` or `UnsupportedImage`, and never as half a picture.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import cv2
import imagecodecs
import numpy as np
import simplejpeg
from PIL import AvifImagePlugin, Image

from core.errors import BadOutput, ImagePoolError, InvalidImage, InvalidParameter
from core.header import NAMES, WRITTEN_SIDE, ImageFormat, ImageHeader
from core.headers.webp import animated
from core.headers.webp import chunks as webp_chunks
from workers import jpeg, png
from workers import metadata as meta
from workers.metadata import Metadata
from workers.png import MAX_ICC

DEFAULT_QUALITY: Mapping[str, int] = {"jpeg": 90, "webp": 90, "avif": 75}
FULL_COLOUR = 95  # JPEG quality from which on colour is kept at full resolution (4:4:4 instead of 4:2:0)

Subsampling = Literal["420", "444"]

_ICC_HEAD = b"ICC_PROFILE\0"

Image.MAX_IMAGE_PIXELS = None  # the limit is ours, checked from the header before the job was accepted
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # many images at once are served by many codec threads


@dataclass(slots=True)
class Picture:
    """A decoded image, upright (its EXIF orientation has been applied).

    `image` is uint8 H x W x 3, RGB. `alpha` is uint8 H x W, None when every pixel is opaque. `icc` is the file's RGB
    colour profile, at most 4 MiB, or None. `metadata` is None when it was not asked for.
    """

    image: np.ndarray
    alpha: np.ndarray | None = None
    icc: bytes | None = None
    metadata: Metadata | None = None


@dataclass(slots=True)
class _Decoded:
    """As stored: `colour` uint8 H x W or H x W x 3, and the rest as in `Picture`, not yet upright."""

    colour: np.ndarray
    alpha: np.ndarray | None
    icc: bytes | None


def decode(data: bytes | memoryview, header: ImageHeader, *, keep_metadata: bool = False) -> Picture:
    """The picture in `data`, of which `header` was read. With `keep_metadata` an alpha channel that is opaque
    everywhere is told too. Raises `InvalidImage` when it is damaged, cut off or of another size than its header says.
    """
    found = _decode(data, header)
    alpha = None if found.alpha is None else _upright(found.alpha, header.orientation)
    return Picture(
        _upright(_rgb(found.colour), header.orientation),
        alpha if keep_metadata or not _opaque(alpha) else None,
        found.icc,
        meta.read(memoryview(data), header.format) if keep_metadata else None,
    )


def decode_mask(data: bytes | memoryview, header: ImageHeader, size: tuple[int, int]) -> np.ndarray:
    """A mask, uint8 H x W, upright: 255 = change here, 0 = keep, between: soft. `size` is the image's upright
    (width, height); a mask of another size raises `InvalidImage`.

    A file that has alpha and is not opaque everywhere follows OpenAI's rule, transparent = change: 255 - alpha,
    whatever its colours. All others: luminance (ITU-R 601, as Pillow's "L"). Clients that paint strokes onto a
    transparent mask want luminance too: their dialect passes a header with `alpha=False`.
    """
    found = _decode(data, header)
    if header.alpha and found.alpha is not None and not _opaque(found.alpha):
        mask = 255 - _upright(found.alpha, header.orientation)
    else:
        colour = found.colour
        grey = colour if colour.ndim == 2 else np.array(Image.fromarray(colour).convert("L"))
        mask = _upright(grey, header.orientation)
    if mask.shape != (size[1], size[0]):
        raise InvalidImage(
            f"the mask is {mask.shape[1]} × {mask.shape[0]} pixels and the image {size[0]} × {size[1]}; "
            "they must be the same size"
        )
    return mask


def encode(
    image: np.ndarray,
    format: ImageFormat = "png",
    *,
    quality: int | None = None,
    subsampling: Subsampling | None = None,
    icc: bytes | None = None,
    alpha: np.ndarray | None = None,
    metadata: Metadata | None = None,
) -> bytes:
    """The image as a file. `image` is uint8 H x W (grey), H x W x 3 (RGB) or H x W x 4 (RGBA); `quality` 1-100 counts
    for jpeg, webp and avif, `subsampling` for jpeg.

    `alpha` (uint8) is joined to an image that has none, scaled to its size where the two differ (upscalers). JPEG has
    no alpha: it is flattened on white. Raises `BadOutput` when `image` is none, `InvalidParameter` when the format
    cannot hold its size.
    """
    if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))):
        raise BadOutput(f"the model answered with {image.dtype} of shape {image.shape}, which is no image")
    if not 0 < min(image.shape[:2]) <= max(image.shape[:2]) <= WRITTEN_SIDE[format]:
        height, width = image.shape[:2]
        raise InvalidParameter(
            f"the result is {width} × {height} pixels; {NAMES[format]} holds sides from 1 to {WRITTEN_SIDE[format]}, "
            "ask for another output format",
            parameter="format",
        )
    if alpha is not None and (image.ndim == 2 or image.shape[2] == 3):
        image = _join(image, alpha)
    if quality is None:
        quality = DEFAULT_QUALITY.get(format, 0)
    image = np.ascontiguousarray(image)
    return _WRITERS[format](image, _Extras(quality, subsampling, icc if image.ndim == 3 else None, metadata))


# --- decoding -------------------------------------------------------------------------------------------------------


def _decode(data: bytes | memoryview, header: ImageHeader) -> _Decoded:
    try:
        found = _READERS[header.format](memoryview(data), header)
    except (ImagePoolError, MemoryError):
        raise
    except Exception as error:  # what decoders raise for bad data is theirs to choose
        raise InvalidImage(
            f"the {NAMES[header.format]} file cannot be decoded, it is damaged or cut off; save it again and resend it"
        ) from error
    _check_size(found.colour.shape[1], found.colour.shape[0], header)
    if found.icc is not None and not (len(found.icc) <= MAX_ICC and found.icc[16:20] == b"RGB "):
        found.icc = None  # a grey or CMYK profile does not describe the RGB that we hand on
    return found


def _check_size(width: int, height: int, header: ImageHeader) -> None:
    if (width, height) != (header.width, header.height):
        raise InvalidImage(
            f"the {NAMES[header.format]} file claims {header.width} × {header.height} pixels and holds "
            f"{width} × {height}; save it again and resend it"
        )


def _png(data: memoryview, header: ImageHeader) -> _Decoded:
    pixels, icc = png.read(data)
    if pixels.dtype == np.uint16:
        pixels = _high(pixels)
    return _split(pixels, icc)


def _high(pixels: np.ndarray) -> np.ndarray:
    """Samples of 16 bits as Pillow takes them, by their high byte."""
    return (pixels >> 8).clip(0, 255).astype(np.uint8)


def _jpeg(data: memoryview, header: ImageHeader) -> _Decoded:
    _check_size(*jpeg.size(data), header)
    return _split(*jpeg.read(data))


def _webp(data: memoryview, header: ImageHeader) -> _Decoded:
    if animated(data):
        return _pillow(data, header)
    profile = next(
        (bytes(data[at:end]) for name, at, end in webp_chunks(data) if name == b"ICCP" and end - at <= MAX_ICC), None
    )
    return _split(imagecodecs.webp_decode(bytes(data)), profile)


def _pillow(data: memoryview, header: ImageHeader) -> _Decoded:
    """The first picture of a file."""
    with Image.open(io.BytesIO(data), formats=(header.format.upper(),)) as image:
        _check_size(*image.size, header)
        deep = image.mode.startswith("I")
        plain = deep or image.mode in ("L", "RGB", "RGBA")
        pixels = np.array(image if plain else image.convert("RGBA" if image.has_transparency_data else "RGB"))
        return _split(_high(pixels) if deep else pixels, image.info.get("icc_profile"))


def _bmp(data: memoryview, header: ImageHeader) -> _Decoded:
    """Run lengths by OpenCV: Pillow undoes them in Python, 4 microseconds a run."""
    if data[14] < 40 or data[30] not in (1, 2):
        return _pillow(data, header)
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if pixels is None:
        raise ValueError("OpenCV says no more")
    return _split(np.ascontiguousarray(pixels[:, :, ::-1]), None)


_READERS: Mapping[str, Callable[[memoryview, ImageHeader], _Decoded]] = {
    "png": _png, "jpeg": _jpeg, "webp": _webp, "avif": _pillow, "gif": _pillow, "bmp": _bmp, "tiff": _pillow,
    "ppm": _pillow,
}  # fmt: skip


def _split(pixels: np.ndarray, icc: bytes | None) -> _Decoded:
    """Colour and alpha apart. `pixels` is uint8 H x W or H x W x 1, 2, 3, 4."""
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    alpha = np.ascontiguousarray(pixels[:, :, -1]) if channels in (2, 4) else None
    if channels <= 2:
        colour = pixels if pixels.ndim == 2 else np.ascontiguousarray(pixels[:, :, 0])
    else:
        colour = pixels if channels == 3 else np.ascontiguousarray(pixels[:, :, :3])
    return _Decoded(colour, alpha, icc)


def _rgb(colour: np.ndarray) -> np.ndarray:
    return colour if colour.ndim == 3 else np.repeat(colour[:, :, np.newaxis], 3, axis=2)


def _opaque(alpha: np.ndarray | None) -> bool:
    return alpha is None or alpha.min() == 255


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Apply EXIF orientation 1-8."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


# --- encoding -------------------------------------------------------------------------------------------------------


def _join(image: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    if alpha.shape != (height, width):
        alpha = np.asarray(Image.fromarray(alpha).resize((width, height), Image.Resampling.BICUBIC))
    return np.dstack((_rgb(image), alpha))


class _Extras(NamedTuple):
    """How to write, and what beside the pixels. No `icc` for a grey image: it would describe colours."""

    quality: int
    subsampling: Subsampling | None
    icc: bytes | None
    metadata: Metadata | None


def _write_png(image: np.ndarray, extras: _Extras) -> bytes:
    return png.write(image, extras.icc, meta.png_chunks(extras.metadata) if extras.metadata else ())


def _write_jpeg(image: np.ndarray, extras: _Extras) -> bytes:
    quality = extras.quality
    if image.ndim == 2:
        file = simplejpeg.encode_jpeg(image[:, :, np.newaxis], quality, "GRAY", "Gray")
    else:
        if image.shape[2] == 4:
            opacity = image[:, :, 3:].astype(np.uint16)
            image = ((image[:, :, :3] * opacity + 255 * (255 - opacity) + 127) // 255).astype(np.uint8)
        file = simplejpeg.encode_jpeg(image, quality, "RGB", extras.subsampling or _subsampling(quality))
        file = _with_icc(file, extras.icc)
    return meta.into_jpeg(file, extras.metadata) if extras.metadata else file


def _subsampling(quality: int) -> Subsampling:
    return "444" if quality >= FULL_COLOUR else "420"


def _with_icc(jpeg: bytes, icc: bytes | None) -> bytes:
    """The file with its profile behind SOI and JFIF, in as many APP2 segments as it needs."""
    if not icc:
        return jpeg
    pieces = [icc[at : at + 65_519] for at in range(0, len(icc), 65_519)]
    head = 4 + int.from_bytes(jpeg[4:6], "big")
    app2 = (
        b"\xff\xe2" + (16 + len(piece)).to_bytes(2, "big") + _ICC_HEAD + bytes((number, len(pieces))) + piece
        for number, piece in enumerate(pieces, 1)
    )
    return b"".join((jpeg[:head], *app2, jpeg[head:]))


def _write_webp(image: np.ndarray, extras: _Extras) -> bytes:
    return _save(image, extras, "WEBP", method=2)


def _write_plain(image: np.ndarray, extras: _Extras, format: str) -> bytes:
    """What has no quality: GIF (at most 256 colours), BMP, TIFF, PPM (without alpha)."""
    file = io.BytesIO()
    picture = Image.fromarray(image)
    if format == "PPM" and picture.mode == "RGBA":
        picture = picture.convert("RGB")
    more = {"icc_profile": extras.icc} if format == "TIFF" and extras.icc else {}
    picture.save(file, format, **more)
    return file.getvalue()


def _write_avif(image: np.ndarray, extras: _Extras) -> bytes:
    return _save(image, extras, "AVIF", speed=9, max_threads=1)


def _save(image: np.ndarray, extras: _Extras, format: str, **options: int) -> bytes:
    file = io.BytesIO()
    exif = (extras.metadata and extras.metadata.exif) or b""
    Image.fromarray(image).save(file, format, quality=extras.quality, icc_profile=extras.icc, exif=exif, **options)
    return file.getvalue()


_WRITERS: Mapping[str, Callable[[np.ndarray, _Extras], bytes]] = {
    "png": _write_png, "jpeg": _write_jpeg, "webp": _write_webp, "avif": _write_avif,
    **{kind: functools.partial(_write_plain, format=kind.upper()) for kind in ("gif", "bmp", "tiff", "ppm")},
}  # fmt: skip

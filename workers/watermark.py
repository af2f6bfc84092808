"""Draws a text or a small image onto a result, in the worker's codec threads: the master never sees a pixel."""

from __future__ import annotations

import base64
import re

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from core.header import read_header
from core.request import Watermark
from workers import codecs

FONT = re.compile(r"[\w][\w -]{0,63}")
ENDINGS = (".ttf", ".otf", ".ttc")
MAX_TEXT_PIXELS = 4096  # of a text's side; it is cut beyond


def draw(image: np.ndarray, mark: Watermark) -> np.ndarray:
    """A copy of the image (uint8 H x W, H x W x 3 or H x W x 4) with the mark on it. A grey one becomes RGB; what lies
    outside the mark keeps its bytes. A mark that is larger than the image is cut off at its edges."""
    stamp = _picture(mark, image.shape[:2]) if mark.image else _text(mark)
    result = np.stack([image] * 3, axis=2) if image.ndim == 2 else image.copy()
    top, left = _place(mark, result.shape[:2], stamp.shape[:2])
    there = result[top : top + stamp.shape[0], left : left + stamp.shape[1]]
    stamp = stamp[: there.shape[0], : there.shape[1]]
    cover = stamp[..., 3:].astype(np.float32) / 255 * mark.opacity
    there[..., :3] = np.rint(stamp[..., :3] * cover + there[..., :3] * (1 - cover)).astype(np.uint8)
    if there.shape[2] == 4:
        there[..., 3:] = np.rint(255 * cover + there[..., 3:] * (1 - cover)).astype(np.uint8)
    return result


def _picture(mark: Watermark, size: tuple[int, ...]) -> np.ndarray:
    """The image as RGBA, `scale` times as wide as the result of that height and width, and no higher than it."""
    data = base64.b64decode(mark.image)
    found = codecs.decode(data, read_header(data))
    alpha = found.alpha if found.alpha is not None else np.full(found.image.shape[:2], 255, np.uint8)
    stamp = Image.fromarray(np.dstack([found.image, alpha]))
    wide = max(1, round(size[1] * mark.scale))
    high = max(1, round(stamp.height * wide / stamp.width))
    shown = min(high, size[0])  # only that is made: a thin mark would become many times as large as the result
    box = (0, 0, stamp.width, stamp.height * shown / high)
    return np.asarray(stamp.resize((wide, shown), Image.Resampling.LANCZOS, box))


def _text(mark: Watermark) -> np.ndarray:
    """The text as RGBA, as large as its letters."""
    font = _font(mark)
    left, top, right, bottom = (int(side) for side in ImageDraw.Draw(Image.new("L", (1, 1))).textbbox(
        (0, 0), mark.text, font
    ))  # fmt: skip
    size = tuple(max(1, min(side, MAX_TEXT_PIXELS)) for side in (right - left, bottom - top))
    letters = Image.new("L", size)  # type: ignore[arg-type]
    ImageDraw.Draw(letters).text((-left, -top), mark.text, 255, font)
    stamp = np.empty((size[1], size[0], 4), np.uint8)
    stamp[..., :3] = [int(mark.colour[at : at + 2], 16) for at in (1, 3, 5)]
    stamp[..., 3] = np.asarray(letters)
    return stamp


def _font(mark: Watermark) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    if FONT.fullmatch(mark.font):
        for ending in ENDINGS:
            try:
                return ImageFont.truetype(mark.font + ending, mark.font_size)
            except OSError:
                continue
    return ImageFont.load_default(mark.font_size)


def _place(mark: Watermark, size: tuple[int, int], stamp: tuple[int, int]) -> tuple[int, int]:
    """The upper left corner, y and x, never outside."""
    free = [max(0, whole - part) for whole, part in zip(size, stamp, strict=True)]
    if mark.position == "center":
        return free[0] // 2, free[1] // 2
    margin = [min(mark.margin, room) for room in free]
    return (
        margin[0] if mark.position.startswith("top") else free[0] - margin[0],
        margin[1] if mark.position.endswith("left") else free[1] - margin[1],
    )

"""What a dialect parsed: an `ImageRequest`. Images stay encoded; only their headers have been read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Literal

from core.data import Data
from core.header import ImageFormat, ImageHeader
from core.pickles import by_position


class Priority(IntEnum):
    """P0 may go first; under load all four share the devices 5 : 3 : 1 : 1."""

    URGENT = 0
    PAID = 1
    NORMAL = 2
    TEST = 3


@by_position
@dataclass(frozen=True, slots=True)
class Span:
    """A piece of the shared arena: `size` bytes from `offset`; `capacity` bytes were reserved."""

    offset: int
    size: int
    capacity: int


Role = Literal["image", "mask", "control", "reference"]
ROLES: tuple[Role, ...] = ("image", "mask", "control", "reference")


@by_position
@dataclass(frozen=True, slots=True)
class ImagePart:
    """One encoded image of a request. Its role: the picture to change, what of it to change, a map that guides the
    drawing (edges, depth, a pose), or one more picture to look at. `data` is bytes fresh from a dialect (in memory
    or in a mapped file), a `Span` of the arena (ephemeral jobs) or the name of a file relative to the outputs folder
    (durable jobs)."""

    role: Role
    data: Data | Span | str
    header: ImageHeader
    size: int  # bytes, encoded


def unseen(height: int, width: int) -> ImagePart:
    """An image that is yet to be made: what a second job will be given."""
    return ImagePart("image", b"", ImageHeader("png", width, height), 0)


Corner = Literal["top-left", "top-right", "bottom-left", "bottom-right", "center"]


@dataclass(frozen=True, slots=True)
class Watermark:
    """What is drawn onto a result before it is encoded: `image` (an encoded image as base64), else `text`.

    `opacity` 0-1. `margin` and `font_size` are pixels; `colour` is #RRGGBB; `font` is the name of a font file that the
    host has, without its ending (empty: a built-in one, of Latin letters). `scale`: the image's width, as a part of
    the result's.
    """

    text: str = ""
    image: str = ""
    position: Corner = "bottom-right"
    opacity: float = 0.5
    margin: int = 20
    font: str = ""
    font_size: int = 24
    colour: str = "#FFFFFF"
    scale: float = 0.15


@by_position
@dataclass(frozen=True, slots=True)
class OutputFormat:
    """How the result is encoded. `quality` 1-100 counts for jpeg, webp and avif; None takes the codec's default.
    `keep_metadata`: the input's EXIF, resolution and PNG text "parameters" go into the result, and an alpha channel
    that is opaque everywhere stays one. `subsampling`: of a jpeg's colour; None goes by the quality."""

    format: ImageFormat = "png"
    quality: int | None = None
    keep_metadata: bool = False
    subsampling: Literal["420", "444"] | None = None
    watermark: Watermark | None = None


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """One request, whatever dialect it came in.

    `params` have been validated by the model's spec (`ModelSpec.check_params`). `deadline` is in seconds from
    submission. A durable job survives the server's death once its acceptance was told; an ephemeral one lives exactly
    as long as the client that waits for it. `previews`: the client wants to see a stepped model's image grow.
    """

    model: str
    images: tuple[ImagePart, ...]
    params: Mapping[str, Any] = field(default_factory=dict)
    output: OutputFormat = OutputFormat()
    priority: Priority = Priority.NORMAL
    tenant: str = "anonymous"
    deadline: float | None = None
    durable: bool = True
    previews: bool = False
    dialect: str = "jobs"
    idempotency_key: str | None = None
    client: Mapping[str, Any] = field(default_factory=dict)  # what the dialect wants back in its status answers

    @property
    def size(self) -> int:
        """Of its images, in encoded bytes."""
        return sum(image.size for image in self.images)

    @property
    def urgent(self) -> bool:
        return self.priority is Priority.URGENT

    @property
    def image(self) -> ImagePart | None:
        """The picture to change; None where one is made from words alone."""
        images = self.images
        if images and images[0].role == "image":  # nearly always; this is asked often
            return images[0]
        return next((part for part in images if part.role == "image"), None)

    @property
    def frame(self) -> ImagePart | None:
        """The picture whose size the result has, if not told otherwise: the image, or else the control map."""
        return self.image or next((part for part in self.images if part.role == "control"), None)

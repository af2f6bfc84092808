"""What a dialect parsed: an `ImageRequest`. Images stay encoded; only their headers have been read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Literal

from core.header import ImageHeader
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


@by_position
@dataclass(frozen=True, slots=True)
class ImagePart:
    """One encoded image of a request. `data` is bytes fresh from a dialect, a `Span` of the arena (ephemeral jobs) or
    the name of a file relative to the outputs folder (durable jobs)."""

    role: Literal["image", "mask"]
    data: bytes | Span | str
    header: ImageHeader
    size: int  # bytes, encoded


@by_position
@dataclass(frozen=True, slots=True)
class OutputFormat:
    """How the result is encoded. `quality` 1-100 counts for jpeg, webp and avif; None takes the codec's default.
    `keep_metadata`: the input's EXIF, resolution and PNG text "parameters" go into the result, and an alpha channel
    that is opaque everywhere stays one. `subsampling`: of a jpeg's colour; None goes by the quality."""

    format: Literal["png", "jpeg", "webp", "avif"] = "png"
    quality: int | None = None
    keep_metadata: bool = False
    subsampling: Literal["420", "444"] | None = None


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """One request, whatever dialect it came in.

    `params` have been validated by the model's spec (`ModelSpec.check_params`). `deadline` is in seconds from
    submission. A durable job survives the server's death once its acceptance was told; an ephemeral one lives exactly
    as long as the client that waits for it.
    """

    model: str
    images: tuple[ImagePart, ...]
    params: Mapping[str, Any] = field(default_factory=dict)
    output: OutputFormat = OutputFormat()
    priority: Priority = Priority.NORMAL
    tenant: str = "anonymous"
    deadline: float | None = None
    durable: bool = True
    dialect: str = "jobs"
    idempotency_key: str | None = None
    client: Mapping[str, Any] = field(default_factory=dict)  # what the dialect wants back in its status answers

"""Which errors a route may answer with, by what it takes and does: what the OpenAPI document tells of them.

Most follow from the route's own description: whether it takes a body, whether its path names something. The rest a
route says itself, with `raises`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from api.errors import (
    HeaderTooLarge,
    HostNotAllowed,
    LinkInvalid,
    NotImplementedHere,
    OriginNotAllowed,
    RangeNotSatisfiable,
    RequestTimeout,
    ValidationFailed,
)
from core import errors
from core.errors import ImagePoolError

MARK = "x-raises"
LOOKS_UP, SUBMITS, KEYED, WAITS, READS_FILE, SERVES_FILE, SIGNED = (
    "looks up", "submits", "keyed", "waits", "reads a file", "serves a file", "signed",
)  # fmt: skip
Kinds = tuple[type[ImagePoolError], ...]

ANYWHERE: Kinds = (errors.BadRequest, errors.InternalError)
BROWSERS: Kinds = (OriginNotAllowed, HostNotAllowed)
BEHIND_THE_DOOR: Kinds = (
    errors.Unauthorised, errors.TooLarge, errors.UnsupportedEncoding, RequestTimeout, errors.StorageFailed,
    LinkInvalid,
)  # fmt: skip
NAMED: Kinds = (errors.JobNotFound, errors.UnknownModel)
BODY: Kinds = (errors.InvalidParameter, errors.InvalidImage, errors.UnsupportedImage)
BY_MARK: Mapping[str, Kinds] = {
    LOOKS_UP: (errors.JobNotFound,),
    SUBMITS: (
        errors.UnknownModel, errors.Overloaded, errors.NoDevice, errors.Draining, errors.StorageFull,
        errors.RateLimited,
    ),
    KEYED: (errors.IdempotencyMismatch, errors.IdempotencyInFlight),
    WAITS: (
        errors.ModelFailed, errors.BadOutput, errors.OutOfMemory, errors.PoisonousJob, errors.DeadlineExceeded,
        errors.Cancelled, errors.WorkerLost,
    ),
    READS_FILE: (errors.JobNotFinished, errors.ResultGone),
    SERVES_FILE: (errors.JobNotFinished, errors.ResultGone, RangeNotSatisfiable),
}  # fmt: skip
ON_THE_LINE: Kinds = (errors.BadRequest, RequestTimeout, HeaderTooLarge, NotImplementedHere)
"""Before a path is known, and so in the shape of the native API whatever the path."""


def raises(*marks: str) -> dict[str, Any]:
    """A part of a route's `openapi_extra`: what it does that its description does not show. It `LOOKS_UP` a job that no
    path names, `SUBMITS` one (`KEYED`: once for each Idempotency-Key), `WAITS` for one (or tells of one that failed),
    reads the file that a job left (`READS_FILE`) or serves it, perhaps in parts (`SERVES_FILE`), at an address that may
    be `SIGNED`."""
    return {MARK: [*marks]}


def possible(
    method: str, operation: Mapping[str, Any], marks: Collection[str], public: bool, browsers: bool
) -> Iterator[ImagePoolError]:
    """An error of each kind that this operation may answer with. `public`: it needs no key. `browsers`: it looks at
    Host and Origin."""
    kinds = [*ANYWHERE, *(BROWSERS if browsers else ())]
    if not public:
        kinds += BEHIND_THE_DOOR
        yield errors.Unauthorised("", presented=True)
        if method == "post":
            kinds.append(errors.RateLimited)
    if any(parameter["in"] == "path" for parameter in operation.get("parameters", ())):
        kinds += NAMED
    if "requestBody" in operation:
        kinds += (*BODY, *BY_MARK[SUBMITS])
    for mark in marks:
        kinds += BY_MARK.get(mark, ())
    yield from (kind("") for kind in kinds)
    if operation.get("parameters") or "requestBody" in operation:
        yield ValidationFailed("", errors=[{"loc": ("body", "field"), "msg": "", "type": ""}])


def on_the_line() -> Iterator[ImagePoolError]:
    """An error of each kind that is told before the path is known."""
    yield from (kind("") for kind in ON_THE_LINE)

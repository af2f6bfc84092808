"""The tree of everything that can go wrong, said once.

An error carries a stable `code`, a sentence for the person who reads it (what happened, to what, what to do next) and
`retryable`: whether the same request may succeed later without a change. Dialects dress an error by its code; nothing
here knows HTTP. A message never holds a path, a trace or another tenant's data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True)
class ErrorInfo:
    """An error as data: it crosses the process line and is stored with its job."""

    code: str
    message: str
    retryable: bool = False
    details: Mapping[str, Any] = field(default_factory=dict)


class ImagePoolError(Exception):
    """Head of the tree. `retry_after` is in seconds, None when waiting does not help."""

    code: ClassVar[str] = "internal_error"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, retry_after: float | None = None, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after = retry_after
        self.details = details

    def info(self) -> ErrorInfo:
        """The error as plain data."""
        return ErrorInfo(self.code, self.message, self.retryable, self.details)


# --- the request is wrong: nothing was stored, no worker was touched ------------------------------------------------


class BadRequest(ImagePoolError):
    """The request cannot be understood at all (broken multipart, broken JSON, missing part)."""

    code = "bad_request"


class InvalidParameter(BadRequest):
    """A named parameter is missing, of the wrong type or out of range."""

    code = "invalid_parameter"


class InvalidImage(BadRequest):
    """The bytes are not an image that can be read."""

    code = "invalid_image"


class UnsupportedImage(BadRequest):
    """An image, but of a kind that is not served (SVG, HEIC, animations)."""

    code = "unsupported_image"


class UnsupportedEncoding(BadRequest):
    """The body has a content type or content encoding that is not served."""

    code = "unsupported_encoding"


class TooLarge(BadRequest):
    """The body has too many bytes or the image too many pixels."""

    code = "too_large"


class UnknownModel(ImagePoolError):
    """No model of that name (or not for that task)."""

    code = "unknown_model"


class JobNotFound(ImagePoolError):
    """No job of that id for this tenant: never existed, belongs to somebody else, or its time is over."""

    code = "job_not_found"


class ResultGone(ImagePoolError):
    """The job succeeded, but its result has been removed by retention."""

    code = "result_gone"


class JobNotFinished(ImagePoolError):
    """The result was asked for while the job has none (yet)."""

    code = "job_not_finished"


class Unauthorised(ImagePoolError):
    """No key, a wrong key or a revoked key."""

    code = "unauthorised"


class IdempotencyMismatch(ImagePoolError):
    """The same Idempotency-Key came with another payload."""

    code = "idempotency_mismatch"


class IdempotencyInFlight(ImagePoolError):
    """The first request with this Idempotency-Key is still being accepted."""

    code = "idempotency_in_flight"
    retryable = True


# --- not now: the request is right, the server cannot take it at present --------------------------------------------


class RateLimited(ImagePoolError):
    """This tenant asks faster than its tier allows."""

    code = "rate_limited"
    retryable = True


class Overloaded(ImagePoolError):
    """The bounded queue (jobs or bytes) is full."""

    code = "overloaded"
    retryable = True


class NoDevice(ImagePoolError):
    """No device can serve: all are still loading, restarting or given up."""

    code = "no_device"
    retryable = True


class Draining(ImagePoolError):
    """The server is shutting down and takes no new jobs."""

    code = "draining"
    retryable = True


class StorageFull(ImagePoolError):
    """The disk (or shared memory) has no room for a new job."""

    code = "storage_full"
    retryable = True


class StorageFailed(ImagePoolError):
    """The disk refuses to write for another reason than room."""

    code = "storage_failed"
    retryable = True


# --- the job was accepted and then failed ---------------------------------------------------------------------------


class ModelFailed(ImagePoolError):
    """The model raised while it ran this job alone."""

    code = "model_failed"


class BadOutput(ImagePoolError):
    """The model answered with something that is no image: NaN, a wrong shape, a wrong type."""

    code = "bad_output"


class OutOfMemory(ImagePoolError):
    """The job does not fit the device even alone."""

    code = "out_of_memory"


class PoisonousJob(ImagePoolError):
    """The job killed (or hung) the worker that ran it, again and again, the last time alone."""

    code = "poisonous_job"


class DeadlineExceeded(ImagePoolError):
    """The job's deadline passed before it could finish, or it ran for longer than its model gives one request."""

    code = "deadline_exceeded"


class Cancelled(ImagePoolError):
    """Somebody cancelled the job (or its client went away)."""

    code = "cancelled"


class WorkerLost(ImagePoolError):
    """The worker died under an ephemeral job and the server is going away."""

    code = "worker_lost"
    retryable = True


class InternalError(ImagePoolError):
    """A defect of ours. The details are in the server's log under the request id."""


def _tree(cls: type[ImagePoolError]) -> dict[str, type[ImagePoolError]]:
    found = {cls.code: cls}
    for sub in cls.__subclasses__():
        found |= _tree(sub)
    return found


BY_CODE: Mapping[str, type[ImagePoolError]] = _tree(ImagePoolError) | {"internal_error": InternalError}


def from_info(info: ErrorInfo) -> ImagePoolError:
    """The exception that an `ErrorInfo` was taken from."""
    return BY_CODE.get(info.code, InternalError)(info.message, **dict(info.details))

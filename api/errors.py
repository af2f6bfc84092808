"""How an error leaves by HTTP: one table of statuses, one problem document (RFC 9457), one dress per dialect.

A dialect with its own error shape hangs a `Dress` for its paths into the app's `Wardrobe`; everything else is told as
`application/problem+json`. Statuses, `Retry-After` and `x-should-retry` are the same for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from core.errors import BadRequest, ImagePoolError, InvalidParameter

STATUS: Mapping[str, int] = {
    "bad_request": 400,
    "invalid_parameter": 422,
    "invalid_image": 400,
    "unsupported_image": 415,
    "unsupported_encoding": 415,
    "too_large": 413,
    "not_implemented": 501,
    "request_timeout": 408,
    "header_too_large": 431,
    "range_not_satisfiable": 416,
    "not_found": 404,
    "method_not_allowed": 405,
    "unknown_model": 404,
    "job_not_found": 404,
    "result_gone": 410,
    "job_not_finished": 409,
    "unauthorised": 401,
    "link_invalid": 403,
    "origin_not_allowed": 403,
    "host_not_allowed": 421,
    "idempotency_mismatch": 422,
    "idempotency_in_flight": 409,
    "rate_limited": 429,
    "overloaded": 503,
    "no_device": 503,
    "draining": 503,
    "storage_full": 507,
    "storage_failed": 503,
    "model_failed": 500,
    "bad_output": 500,
    "out_of_memory": 500,
    "poisonous_job": 500,
    "deadline_exceeded": 504,
    "cancelled": 409,
    "worker_lost": 503,
    "internal_error": 500,
}
PROBLEM = "application/problem+json"
NOTHING_THERE = "nothing is served at this path; /openapi.json lists what is"


class RequestTimeout(BadRequest):
    """The client did not send its request in time."""

    code = "request_timeout"
    retryable = True


class NotImplementedHere(BadRequest):
    """HTTP has it, and this server does not do it."""

    code = "not_implemented"


class HeaderTooLarge(BadRequest):
    """The request line and headers have too many bytes or lines."""

    code = "header_too_large"


class RangeNotSatisfiable(ImagePoolError):
    """A part of a file was asked for that begins beyond its end. `size`: of the file, in bytes."""

    code = "range_not_satisfiable"


class LinkInvalid(ImagePoolError):
    """A signed address whose time is over, or that was changed."""

    code = "link_invalid"


class OriginNotAllowed(ImagePoolError):
    """A browser asks for a page of another origin, and this server asks nobody for a key."""

    code = "origin_not_allowed"


class HostNotAllowed(ImagePoolError):
    """The Host header names a host that this server, which asks nobody for a key, does not answer to."""

    code = "host_not_allowed"


class NotFound(ImagePoolError):
    """Nothing is served at this path."""

    code = "not_found"


class MethodNotAllowed(ImagePoolError):
    """The path exists, but not for this method. `allow` is the Allow header's value."""

    code = "method_not_allowed"


class ValidationFailed(InvalidParameter):
    """A typed field did not fit. `details["errors"]` lists them as FastAPI does: loc, msg, type (never the input)."""


def does_not_fit(fault: ValidationError) -> ValidationFailed:
    """What pydantic found in a JSON body, as an error that names the first field."""
    found = [
        {"loc": ("body", *item["loc"]), "msg": item["msg"], "type": item["type"]}
        for item in fault.errors(include_input=False, include_url=False, include_context=False)
    ]
    where = ".".join(str(part) for part in found[0]["loc"][1:]) or "body"
    what = str(found[0]["msg"]).removeprefix("Value error, ")
    if found[0]["type"] == "model_type":  # pydantic would name our class
        what = "must be an object"
    return ValidationFailed(f"'{where[:64]}': {what}", errors=found)


class HttpError(ImagePoolError):
    """An HTTP status that has no code of ours."""

    code = "http_error"

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def status_of(error: ImagePoolError) -> int:
    """The HTTP status of an error (by its code; 500 for one that the table does not know)."""
    return error.status if isinstance(error, HttpError) else STATUS.get(error.code, 500)


def from_http(fault: HTTPException) -> ImagePoolError:
    """A framework's exception as one of ours."""
    message = str(fault.detail)
    if fault.status_code == 404:
        return NotFound(NOTHING_THERE if message == "Not Found" else message)
    if fault.status_code == 405:
        allow = (fault.headers or {}).get("Allow", "")
        return MethodNotAllowed(f"this path does not take that method; it takes {allow or 'another'}", allow=allow)
    return BadRequest(message) if fault.status_code == 400 else HttpError(fault.status_code, message)


def from_validation(fault: RequestValidationError) -> ValidationFailed:
    """FastAPI's list of errors as one of ours, without the offending input."""
    errors = [{key: item[key] for key in ("loc", "msg", "type")} for item in fault.errors()]
    first = errors[0]
    where = ".".join(str(part) for part in first["loc"][1:]) or str(first["loc"][0])
    return ValidationFailed(f"'{where[:64]}': {first['msg']}", errors=errors)


Dress = Callable[[ImagePoolError, str], tuple[int, Any]]
"""(error, request id) -> (status, JSON body)."""


def problem(error: ImagePoolError, request_id: str) -> tuple[int, dict[str, Any]]:
    """The RFC 9457 document: type, title, status, detail, code, retryable, request_id, errors[] and the details."""
    status = status_of(error)
    body: dict[str, Any] = {
        "type": f"urn:imagepool:error:{error.code}",
        "title": error.code.replace("_", " ").capitalize(),
        "status": status,
        "detail": error.message,
        "code": error.code,
        "retryable": error.retryable,
        "request_id": request_id,
    }
    if isinstance(error, ValidationFailed):
        body["errors"] = [
            {"parameter": ".".join(map(str, item["loc"][1:])), "message": item["msg"]}
            for item in error.details["errors"]
        ]
    elif "parameter" in error.details:
        body["errors"] = [{"parameter": error.details["parameter"], "message": error.message}]
    return status, body | {name: told for name, told in error.details.items() if name not in body}


def headers_of(error: ImagePoolError, status: int) -> dict[str, str]:
    """Retry-After and retry-after-ms (429, 503, 507), x-should-retry (what clients would retry by themselves), Allow,
    Content-Range (416), WWW-Authenticate."""
    headers: dict[str, str] = {}
    if status in (429, 503, 507):
        wait = max(0.001, error.retry_after if error.retry_after is not None else 1.0)
        headers["retry-after"] = str(math.ceil(wait))
        headers["retry-after-ms"] = str(math.ceil(wait * 1000))
    if status in (408, 409, 429) or status >= 500:
        headers["x-should-retry"] = "true" if error.retryable else "false"
    if status == 401:
        headers["www-authenticate"] = 'Bearer realm="imagepool", ApiKey realm="imagepool"'
    if status == 416:
        headers["content-range"] = f"bytes */{error.details.get('size', '*')}"
    if error.details.get("allow"):
        headers["allow"] = error.details["allow"]
    return headers


@dataclass(frozen=True, slots=True)
class Outfit:
    """A dress, and the model of the bodies that it makes (None: the problem document)."""

    dress: Dress
    shape: type[BaseModel] | None


PLAIN = Outfit(problem, None)


class Wardrobe:
    """Which dress an error wears, by the path of the request. The longest prefix wins; none: a problem document."""

    def __init__(self) -> None:
        self._outfits: list[tuple[str, Outfit]] = []

    def hang(self, prefixes: tuple[str, ...], dress: Dress, shape: type[BaseModel] | None = None) -> None:
        """Errors under these path prefixes wear this dress, whose bodies are of this model."""
        self._outfits += [(prefix, Outfit(dress, shape)) for prefix in prefixes]
        self._outfits.sort(key=lambda pair: -len(pair[0]))

    def at(self, path: str) -> Outfit:
        """What an error at this path wears."""
        return next((outfit for prefix, outfit in self._outfits if path.startswith(prefix)), PLAIN)

    def respond(self, error: ImagePoolError, path: str, request_id: str) -> Response:
        """The whole answer to an error."""
        dress = self.at(path).dress
        status, body = dress(error, request_id)
        media_type = PROBLEM if dress is problem else "application/json"
        return Response(orjson.dumps(body, default=str), status, headers_of(error, status), media_type)

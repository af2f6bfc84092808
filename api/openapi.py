"""Words of the API's description: statuses, headers, the shapes of the native API, and `/run`, which the framework does
not see. `api.description` makes the document of them."""

from __future__ import annotations

from typing import Any

from api.errors import PROBLEM
from api.troubles import KEYED, SUBMITS, WAITS, raises
from core.states import State

DESCRIPTIONS = {
    200: "Done", 202: "Accepted", 206: "The part that was asked for", 304: "Not changed", 400: "Not understood",
    401: "No, wrong or revoked key", 403: "Not allowed", 404: "Not found", 408: "The request came too slowly",
    409: "Not in this state", 410: "The result was removed", 413: "Too many bytes or pixels",
    415: "A type or encoding that is not served", 416: "The file has no such part",
    421: "Not a host of this server", 422: "A parameter does not fit", 429: "Faster than the tier allows",
    431: "The headers are too long", 500: "The model or the server failed",
    501: "It is not served here", 502: "The model failed",
    503: "Not now; see Retry-After", 504: "The deadline passed", 507: "The disk has no room; see Retry-After",
}  # fmt: skip
FORMATS = ("png", "jpeg", "webp", "avif")
IMAGE = {f"image/{kind}": {"schema": {"type": "string", "format": "binary"}} for kind in FORMATS}
NUMBER, TEXT, WHOLE = {"type": "number"}, {"type": "string"}, {"type": "integer"}


def _nullable(kind: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [kind, {"type": "null"}]}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(needed: str = "", /, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": needed.split() or list(properties)}


ANY_OBJECT = {"type": "object", "additionalProperties": True}
OPTIONS = {
    "model": TEXT | {"description": "A name of GET /models."},
    "params": ANY_OBJECT | {"description": "The model's parameters. They may stand beside it as fields of their own."},
    "priority": {"anyOf": [TEXT, WHOLE], "description": "0-3, or urgent, paid, normal, test."},
    "deadline": NUMBER | {"description": "Seconds from now after which nobody wants the result."},
    "format": TEXT | {"enum": ["png", "jpeg", "jpg", "webp", "avif"], "default": "png"},
    "quality": WHOLE | {"minimum": 1, "maximum": 100},
}
BINARY = TEXT | {"contentMediaType": "application/octet-stream"}
BASE64 = TEXT | {"contentEncoding": "base64", "description": "base64, or a data: URL of an image."}

SCHEMAS: dict[str, Any] = {
    "Problem": _object(
        "type title status detail code retryable request_id",
        type=TEXT, title=TEXT, status=WHOLE, detail=TEXT, code=TEXT, retryable={"type": "boolean"}, request_id=TEXT,
        errors={"type": "array", "items": _object(parameter=TEXT, message=TEXT)},
    ),
    "Job": _object(
        id=TEXT | {"format": "uuid"}, model=TEXT, state=TEXT | {"enum": [state.value for state in State]},
        progress=NUMBER, position=_nullable(WHOLE), waits_for=_nullable(TEXT), priority=WHOLE,
        params=ANY_OBJECT, created_at=NUMBER, started_at=_nullable(NUMBER), ended_at=_nullable(NUMBER),
        device=_nullable(TEXT), attempts=WHOLE,
        batch_size=_nullable(WHOLE), width=_nullable(WHOLE), height=_nullable(WHOLE), timings=ANY_OBJECT,
        facts=ANY_OBJECT, error=_nullable(_object(code=TEXT, message=TEXT, retryable={"type": "boolean"})),
        history={"type": "array", "items": _object(at=NUMBER, state=TEXT, device=_nullable(TEXT), why=_nullable(TEXT))},
        links=_object(self=TEXT, result=TEXT, events=TEXT),
    ),
    "JobPage": _object(jobs={"type": "array", "items": _ref("Job")}, next=_nullable(TEXT)),
    "Model": _object(
        name=TEXT, version=TEXT, task=TEXT, description=TEXT, method=TEXT,
        needs_mask={"type": "boolean"}, takes=ANY_OBJECT, stepped={"type": "boolean"},
        params={"type": "object", "additionalProperties": ANY_OBJECT}, required={"type": "array", "items": TEXT},
        limits=ANY_OBJECT, refused=_nullable(TEXT),
    ),
    "ModelList": _object(models={"type": "array", "items": _ref("Model")}),
    "Alive": _object(status=TEXT),
    "Ready": _object(
        ready={"type": "boolean"}, reason=_nullable(TEXT), storage={"enum": ["ok", "full", "failed"]},
        storage_reason=_nullable(TEXT),
        devices={"type": "array", "items": _object(device=TEXT, state=TEXT, detail=TEXT, refused=ANY_OBJECT)},
    ),
}  # fmt: skip

HEADERS: dict[str, Any] = {
    "X-Request-ID": {"schema": TEXT, "required": True, "description": "The request's own, or a new one."},
    "X-Response-Time": {"schema": TEXT, "description": "As in `1.2ms`."},
    "Retry-After": {"schema": WHOLE | {"minimum": 1}, "required": True, "description": "Seconds."},
    "Retry-After-Ms": {"schema": WHOLE | {"minimum": 1}, "description": "The same, finer."},
    "X-Should-Retry": {
        "schema": TEXT | {"enum": ["true", "false"]}, "description": "Whether the same request may succeed later.",
    },
    "WWW-Authenticate": {"schema": TEXT, "required": True},
    "Content-Range": {"schema": TEXT, "description": "Which part of how many bytes."},
    "Accept-Ranges": {"schema": TEXT},
    "Content-Disposition": {"schema": TEXT, "description": "The name of the file."},
    "ETag": {"schema": TEXT},
    "Location": {"schema": TEXT, "required": True, "description": "The path of the job."},
    "Preference-Applied": {"schema": TEXT, "description": "What was heeded of `Prefer`."},
}  # fmt: skip
ALWAYS = ("X-Request-ID", "X-Response-Time")
RANGE = {
    "name": "Range", "in": "header", "required": False, "schema": TEXT,
    "description": "A part of the file, as in `bytes=0-99`; what cannot be read is passed over.",
}  # fmt: skip
IF_NONE_MATCH = {
    "name": "If-None-Match", "in": "header", "required": False, "schema": TEXT,
    "description": "An `ETag`; the file is not sent again.",
}  # fmt: skip
LAST_EVENT = {
    "name": "Last-Event-ID", "in": "header", "required": False, "schema": TEXT,
    "description": "The number of an event; those after it are told.",
}  # fmt: skip


def headers(*names: str) -> dict[str, Any]:
    """The headers of an answer, of those that `HEADERS` knows, in any spelling."""
    known = {name.lower(): name for name in HEADERS}
    return {known[name.lower()]: {"$ref": f"#/components/headers/{known[name.lower()]}"} for name in names}


PREVIEWS = {"type": "boolean", "description": "Show in the job's events how the image of a stepped model grows."}


def _form(**more: Any) -> dict[str, Any]:
    schema = _object("image", image=BINARY, mask=BINARY, **OPTIONS, **more)
    return {"multipart/form-data": {"schema": schema, "encoding": {"params": {"contentType": "application/json"}}}}




def _query(*options: str) -> list[dict[str, Any]]:
    """These options, and the model's parameters, as parameters of the query."""
    parameters = [{"name": name, "in": "query", "required": False, "schema": OPTIONS[name]} for name in options]
    parameters.append({
        "name": "params", "in": "query", "required": False, "schema": ANY_OBJECT, "style": "form", "explode": True,
        "description": "The model's parameters, each a field of its own.",
    })  # fmt: skip
    return parameters


RUN_OPTIONS = ("priority", "deadline", "format", "quality")
SUBMIT: dict[str, Any] = {
    "parameters": [
        *_query("model", *RUN_OPTIONS),
        {"name": "Prefer", "in": "header", "schema": TEXT, "description": "`respond-async` or `wait=N` (RFC 7240)."},
        {"name": "Idempotency-Key", "in": "header", "schema": TEXT | {"minLength": 1, "maxLength": 255}},
    ],
    "requestBody": {
        "required": True,
        "content": {
            **_form(previews=PREVIEWS),
            "application/json": {
                "schema": _object("model image", image=BASE64, mask=BASE64, previews=PREVIEWS, **OPTIONS)
            },
            **IMAGE,
        },
    },
}


def problem() -> dict[str, Any]:
    """The content of an error of the native API."""
    return {PROBLEM: {"schema": _ref("Problem")}}


def answers(schema: str, *statuses: int, **more: Any) -> dict[str, Any]:
    """Keyword arguments of a route: what it answers when all goes well. `schema`: a name of `SCHEMAS`, "image", "text"
    or "events"; `more`: further parts of its description."""
    content: dict[str, Any]
    match schema:
        case "image":
            content = IMAGE
        case "text":
            content = {"text/plain": {"schema": TEXT}}
        case "events":
            content = {"text/event-stream": {}}
        case _:
            content = {"application/json": {"schema": _ref(schema)}}
    told: dict[int | str, Any] = {
        status: {"description": DESCRIPTIONS[status]} | ({} if status == 304 else {"content": content})
        for status in statuses
    }
    return {"responses": told, "response_model": None, "openapi_extra": more}


def submits() -> dict[str, Any]:
    """Keyword arguments of the route that takes jobs."""
    told = answers("Job", 200, 202, **SUBMIT, **raises(KEYED, WAITS))
    for answer in told["responses"].values():
        answer["headers"] = headers("Location", "Preference-Applied")
    return told


def run() -> dict[str, Any]:
    """The path of `/run`, which is served around the framework."""
    parameters = [{"name": "model", "in": "path", "required": True, "schema": TEXT}, *_query(*RUN_OPTIONS)]
    names = ("X-Job-Id", "X-Device", "X-Batch-Size", "X-Compute-Ms", "Server-Timing")
    told: dict[str, Any] = {name: {"schema": TEXT, "required": True} for name in names}
    told["X-Ignored"] = {"schema": TEXT, "description": "Words of the prompt that had no effect, percent-encoded."}
    operation = {
        "tags": ["run"],
        "summary": "Run",
        "description": "One image in, one image out; nothing is stored. Going away cancels it.",
        "operationId": "run",
        "parameters": parameters,
        "requestBody": {"required": True, "content": {**IMAGE, "application/octet-stream": {}, **_form()}},
        "responses": {"200": {"description": "The resulting image", "content": IMAGE, "headers": told}},
        **raises(SUBMITS, WAITS),
    }
    return {"/run/{model}": {"post": operation}}

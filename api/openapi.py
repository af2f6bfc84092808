"""The description of the API: what routes answer, written once, and `/run`, which the framework does not see."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from core.settings import Settings
from core.states import State

DESCRIPTIONS = {
    200: "Done", 202: "Accepted", 304: "Not changed", 400: "Not understood", 401: "No, wrong or revoked key",
    404: "Not found", 405: "Another method is needed", 408: "The body came too slowly", 409: "Not in this state",
    410: "The result was removed",
    413: "Too many bytes or pixels", 415: "A type or encoding that is not served", 422: "A parameter does not fit",
    429: "Faster than the tier allows", 500: "The model or the server failed", 503: "Not now; see Retry-After",
    504: "The deadline passed",
}  # fmt: skip
REFUSALS = (400, 401, 408, 409, 413, 415, 422, 429, 500, 503)
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
        progress=NUMBER, position=_nullable(WHOLE), priority=WHOLE, params=ANY_OBJECT, created_at=NUMBER,
        started_at=_nullable(NUMBER), ended_at=_nullable(NUMBER), device=_nullable(TEXT), attempts=WHOLE,
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
        devices={"type": "array", "items": _object(device=TEXT, state=TEXT, detail=TEXT, refused=ANY_OBJECT)},
    ),
}  # fmt: skip

PREVIEWS = {"type": "boolean", "description": "Show in the job's events how the image of a stepped model grows."}


def _form(**more: Any) -> dict[str, Any]:
    schema = _object("image", image=BINARY, mask=BINARY, **OPTIONS, **more)
    return {"multipart/form-data": {"schema": schema, "encoding": {"params": {"contentType": "application/json"}}}}


SUBMIT: dict[str, Any] = {
    "parameters": [
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


def _problem(status: int) -> dict[str, Any]:
    content = {"application/problem+json": {"schema": _ref("Problem")}}
    return {"description": DESCRIPTIONS[status], "content": content}


def answers(schema: str, *statuses: int, submits: bool = False) -> dict[str, Any]:
    """Keyword arguments of a route: what it answers. `schema`: a name of `SCHEMAS`, "image", "text" or "events"."""
    content: dict[str, Any]
    match schema:
        case "image":
            content = IMAGE
        case "text":
            content = {"text/plain": {"schema": TEXT}}
        case "events":
            content = {"text/event-stream": {"schema": TEXT}}
        case _:
            content = {"application/json": {"schema": _ref(schema)}}
    told: dict[int | str, Any] = {}
    for status in sorted({*statuses, *((404, *REFUSALS) if submits else (401, 422))}):
        if status < 300 or (schema == "Ready" and status == 503):
            told[status] = {"description": DESCRIPTIONS[status], "content": content}
        else:
            told[status] = {"description": DESCRIPTIONS[status]} if status == 304 else _problem(status)
    return {"responses": told, "response_model": None}


def _run_path() -> dict[str, Any]:
    options = [name for name in OPTIONS if name not in ("model", "params")]
    parameters = [{"name": "model", "in": "path", "required": True, "schema": TEXT}]
    parameters += [{"name": name, "in": "query", "required": False, "schema": OPTIONS[name]} for name in options]
    parameters.append({
        "name": "params", "in": "query", "required": False, "schema": ANY_OBJECT, "style": "form", "explode": True,
        "description": "The model's parameters, each a field of its own.",
    })  # fmt: skip
    responses = {str(status): _problem(status) for status in (404, 405, 504, *REFUSALS)}
    names = ("X-Job-Id", "X-Device", "X-Batch-Size", "X-Compute-Ms", "Server-Timing", "X-Ignored")
    headers = {name: {"schema": TEXT} for name in names}
    responses["200"] = {"description": "The resulting image", "content": IMAGE, "headers": headers}
    return {
        "post": {
            "tags": ["run"],
            "summary": "Run",
            "description": "One image in, one image out; nothing is stored. Going away cancels it.",
            "operationId": "run",
            "parameters": parameters,
            "requestBody": {"required": True, "content": {**IMAGE, **_form()}},
            "responses": dict(sorted(responses.items())),
        }
    }


def describe(api: FastAPI, settings: Settings) -> dict[str, Any]:
    """The OpenAPI document of the whole server, made once."""
    if api.openapi_schema is None:
        document = get_openapi(title=api.title, version=api.version, description=api.description, routes=api.routes)
        document["paths"]["/run/{model}"] = _run_path()
        if settings.public_url:
            document["servers"] = [{"url": settings.public_url}]
        parts = document.setdefault("components", {})
        parts["schemas"] = {**parts.get("schemas", {}), **SCHEMAS}
        if settings.keys_file is not None:
            parts["securitySchemes"] = {
                "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
                "bearer": {"type": "http", "scheme": "bearer"},
            }
            document["security"] = [{"key": []}, {"bearer": []}]
        api.openapi_schema = document
    return api.openapi_schema

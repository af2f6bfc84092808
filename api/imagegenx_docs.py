"""How ImageGenX's routes are described: bodies and the envelope."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field
from starlette.responses import Response

from api.troubles import SERVES_FILE, raises


class Envelope(BaseModel):
    """Every answer, errors too."""

    code: int = Field(description="200; 500 for a task that failed; of an error, its HTTP status.")
    message: str
    data: dict[str, Any] | None = Field(description="null for an error.")


def takes(kind: type[BaseModel]) -> dict[str, Any]:
    """Keyword arguments of a route: the JSON body that it takes."""
    body = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    parts = body.pop("$defs", {})
    schema = _inlined(body, parts)
    return {"openapi_extra": {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}}


def _inlined(schema: Any, parts: dict[str, Any]) -> Any:
    """The schema with its parts where they are named."""
    if isinstance(schema, list):
        return [_inlined(one, parts) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(parts[schema["$ref"].rpartition("/")[2]], parts)
    return {name: _inlined(value, parts) for name, value in schema.items() if name != "default" or value is not None}


def answers(media_type: str = "", *marks: str) -> dict[str, Any]:
    """Keyword arguments of a route: the envelope, or a file of that type. `marks`: as in `api.troubles.raises`."""
    extra: dict[str, Any] = {"openapi_extra": raises(*marks)} if marks else {}
    if not media_type:
        return {"response_model": Envelope, **extra}
    content = {media_type: {"schema": {"type": "string", "format": "binary"}}}
    described: dict[int | str, dict[str, Any]] = {
        200: {"description": "The file", "content": content},
        403: {"description": "A wrong or revoked key; a signed address that is over or was changed"},
    }
    if SERVES_FILE in marks:
        described[304] = {"description": "Not changed"}
    return {"response_class": Response, "responses": described, **extra}

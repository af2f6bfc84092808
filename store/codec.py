"""Jobs as rows: what is searched is a column; the rest is two JSON texts, the request (written once) and the life.

Only plain data is stored. Parameters and facts come back as JSON knows them: a tuple returns as a list.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from core.errors import ErrorInfo, InternalError
from core.header import ImageHeader
from core.job import Job, Move, Result
from core.request import ImagePart, ImageRequest, OutputFormat, Priority, Watermark
from core.states import State

Row = dict[str, Any]
PLAIN = (ImageRequest, ImagePart, ImageHeader, OutputFormat, Watermark, Result, ErrorInfo, Move)
LIFE = ("asked_by", "started_at", "device", "attempts", "progress", "result", "error", "history")


def encode(job: Job, fingerprint: str | None = None) -> Row:
    """The whole row of a job. Raises `InternalError` for what cannot be kept (bytes, spans, foreign objects)."""
    request = job.request
    return encode_life(job) | {
        "number": job.number,
        "tenant": request.tenant,
        "model": request.model,
        "idempotency_key": request.idempotency_key,
        "fingerprint": fingerprint,
        "created_at": job.created_at,
        "request": _dump(request),
    }


def encode_life(job: Job) -> Row:
    """The columns that change while a job lives, and its id. `version` grows with every move, so that an older state
    can be told from a newer one. `bytes` is what its files take: the inputs while it lives, the result thereafter."""
    return {
        "id": job.id,
        "state": job.state.value,
        "version": len(job.history),
        "ended_at": job.ended_at,
        "bytes": _bytes(job),
        "life": _dump({name: getattr(job, name) for name in LIFE}),
    }


def decode(row: Mapping[str, Any]) -> Job:
    """The job of a row. Raises KeyError, TypeError or ValueError when the row was damaged."""
    life = json.loads(row["life"])
    return Job(
        id=row["id"],
        request=_request(json.loads(row["request"])),
        created_at=row["created_at"],
        number=row["number"],
        state=State(row["state"]),
        ended_at=row["ended_at"],
        **life
        | {
            "result": life["result"] and Result(**life["result"]),
            "error": life["error"] and ErrorInfo(**life["error"]),
            "history": [Move(**move | {"state": State(move["state"])}) for move in life["history"]],
        },
    )


def _request(raw: dict[str, Any]) -> ImageRequest:
    return ImageRequest(
        **raw
        | {
            "images": tuple(ImagePart(**part | {"header": ImageHeader(**part["header"])}) for part in raw["images"]),
            "output": _output(raw["output"]),
            "priority": Priority(raw["priority"]),
        }
    )


def _output(raw: dict[str, Any]) -> OutputFormat:
    mark = raw.get("watermark")
    return OutputFormat(**raw | {"watermark": mark and Watermark(**mark)})


def _bytes(job: Job) -> int:
    if job.state.ended:
        return job.result.size if job.result else 0
    return sum(part.size for part in job.request.images)


def _dump(value: Any) -> str:
    try:
        return json.dumps(value, default=_plain, separators=(",", ":"))
    except (TypeError, ValueError) as fault:
        raise InternalError(f"a durable job holds something that cannot be stored: {fault}") from fault


def _plain(value: Any) -> Any:
    if isinstance(value, PLAIN):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a {type(value).__name__} (images and results must be named files first)")

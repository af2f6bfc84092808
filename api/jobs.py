"""The native API: jobs that are accepted, watched, fetched and cancelled, and the models they may ask for."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from http import HTTPStatus
from pathlib import Path as FilePath
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Path, Query
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from api import openapi, sse
from api.answers import Part, PiecesResponse
from api.auth import caller
from api.files import ImageFile
from api.images import MEDIA_TYPES
from api.limits import content_length, file_limit
from api.submission import read_submission, shape_request
from api.troubles import LOOKS_UP, SERVES_FILE, WAITS, raises
from core.errors import BadRequest, JobNotFound, ResultGone
from core.job import Job
from core.model import ModelSpec, Param
from core.request import Priority
from core.settings import Settings
from core.states import State
from core.turns import Turn
from engine.engine import Engine
from engine.feed import JobEvent
from engine.results import ResultBody
from engine.stranded import waits_for

MAX_WAIT = 300.0  # seconds; a longer `Prefer: wait` is cut to it
MAX_PAGE = 200
JSON_TYPES = {"int": "integer", "float": "number", "bool": "boolean", "string": "string", "recipe": "string"}

JobId = Annotated[str, Path(alias="id", description="The job's id, a UUID.")]


def job_id(text: str) -> str:
    """The id in its one spelling. Raises `JobNotFound` for all that is no UUID, before anything is looked up."""
    try:
        found = str(uuid.UUID(text)) if len(text) == 36 else ""
    except ValueError:
        found = ""
    if not found or found != text.lower():
        raise JobNotFound("there is no job of that id; ended jobs are removed after a while")
    return found


def job_json(job: Job, position: int | None, waits_for: str | None = None) -> dict[str, Any]:
    """A job as clients see it. Times are unix seconds; `timings` seconds by stage; links are relative to the host."""
    result, path = job.result, f"/jobs/{job.id}"
    return {
        "id": job.id,
        "model": job.request.model,
        "state": job.state.value,
        "progress": round(job.progress, 4),
        "position": position,
        "waits_for": waits_for,
        "priority": int(job.request.priority),
        "params": dict(job.request.params),
        "created_at": job.created_at,
        "started_at": job.started_at,
        "ended_at": job.ended_at,
        "device": result.device if result else job.device,
        "attempts": job.attempts,
        "batch_size": result.batch_size if result else None,
        "width": result.width if result else None,
        "height": result.height if result else None,
        "timings": dict(result.timings) if result else {},
        "facts": dict(result.facts) if result else {},
        "error": None
        if job.error is None
        else {"code": job.error.code, "message": job.error.message, "retryable": job.error.retryable},
        "history": [
            {"at": move.at, "state": move.state.value, "device": move.device, "why": move.why} for move in job.history
        ],
        "links": {"self": path, "result": f"{path}/result", "events": f"{path}/events"},
    }


def model_json(spec: ModelSpec, settings: Settings, refused: str | None = None) -> dict[str, Any]:
    """A model as clients see it; `params` by name in the words of JSON Schema; `refused`: why no worker has it."""
    return {
        "name": spec.name,
        "version": spec.version,
        "task": spec.task,
        "description": spec.description,
        "method": spec.method,
        "needs_mask": spec.needs_mask,
        "takes": {role: list(counts) for role, counts in spec.parts.items()},
        "stepped": spec.stepped,
        "params": {name: _param_json(param) for name, param in spec.params.items()},
        "required": [name for name, param in spec.params.items() if param.required],
        "limits": {
            "max_body_bytes": settings.max_body,
            "max_pixels": settings.max_pixels,
            "max_output_pixels": spec.max_output_pixels,
            "max_batch": spec.max_batch,
            "timeout_seconds": spec.timeout,
            "formats": list(MEDIA_TYPES),
        },
        "refused": refused,
    }


def _param_json(param: Param) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": JSON_TYPES[param.type], "default": param.default}
    if param.min is not None:
        schema["minimum"] = param.min
    if param.max is not None:
        schema["maximum"] = param.max
    if param.choices:
        schema["enum"] = list(param.choices)
    if param.description:
        schema["description"] = param.description
    return schema


def read_prefer(values: list[str]) -> tuple[float, str | None]:
    """(seconds to wait, what Preference-Applied says) of RFC 7240 headers. What cannot be read is passed over."""
    for preference in ",".join(values).split(","):
        name, _, value = (word.strip() for word in preference.partition("="))
        value = value.strip('"')
        if name.lower() == "respond-async":
            return 0.0, "respond-async"
        if name.lower() == "wait" and value.isascii() and value.isdigit() and len(value) < 10:
            seconds = min(float(value), MAX_WAIT)
            return seconds, f"wait={seconds:.0f}"
    return 0.0, None


def read_idempotency_key(values: list[str]) -> str | None:
    """The Idempotency-Key. Raises `BadRequest` when it is empty, doubled, longer than 255 or not printable ASCII."""
    if not values:
        return None
    key = values[0].strip()
    if len(values) > 1 or not 1 <= len(key) <= 255 or not (key.isascii() and key.isprintable()):
        raise BadRequest("Idempotency-Key must be one header of 1 to 255 printable ASCII characters")
    return key


def router(engine: Engine, settings: Settings, keepalive: float = 15.0) -> APIRouter:
    """The routes. `keepalive`: seconds of silence after which an event stream shows that it is alive."""
    api = APIRouter(tags=["jobs"])

    def told(job: Job, status: int = 200, headers: dict[str, str] | None = None) -> Response:
        position = engine.position(job.id) if job.state is State.QUEUED else None
        return _json(job_json(job, position, waits_for(engine, job)), status, headers)

    @api.post("/jobs", **openapi.submits())
    async def submit(request: Request) -> Response:
        """Submit a job: 202 once it is safely stored, or `Prefer: wait=N` seconds later; 200 when it has ended."""
        who = caller(request)
        key = read_idempotency_key(request.headers.getlist("idempotency-key"))
        seconds, applied = read_prefer(request.headers.getlist("prefer"))
        max_file = file_limit(who, settings)
        length, urgent = content_length(dict(request.scope["headers"])) or 0, who.ceiling is Priority.URGENT
        engine.ask(length, who.tenant, urgent=urgent)
        found = await read_submission(request, max_file)
        asked = await shape_request(
            found, engine.catalogue, who, max_file=max_file, max_pixels=settings.max_pixels, idempotency_key=key
        )
        del found
        job = await engine.submit(asked)
        del asked  # its images are on the disk, and the client may wait for long
        request.scope["body"].settle()
        if seconds and not job.state.ended:
            job = await engine.wait(job.id, seconds)
        headers = {"location": f"{settings.public_url}/jobs/{job.id}"}
        if applied:
            headers["preference-applied"] = applied
        return told(job, 200 if job.state.ended else 202, headers)

    @api.get("/jobs", **openapi.answers("JobPage", 200, **raises(LOOKS_UP)))
    async def page(
        request: Request,
        state: State | None = None,
        model: Annotated[str | None, Query(max_length=128)] = None,
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 50,
        before: Annotated[str | None, Query(description="The `next` of the page before.")] = None,
    ) -> Response:
        """The caller's jobs, newest first."""
        after = job_id(before) if before is not None else None
        jobs = await engine.jobs(caller(request).tenant, state=state, model=model, limit=limit + 1, before=after)
        parts: list[Part] = []  # one by one: their parameters may be long texts
        turn = Turn()
        for job in jobs[:limit]:
            position = engine.position(job.id) if job.state is State.QUEUED else None
            parts += [b"," if parts else b'{"jobs":[', _dumps(job_json(job, position))]
            await turn.over()
        parts = parts or [b'{"jobs":[']
        parts.append(b'],"next":%b}' % _dumps(jobs[limit - 1].id if len(jobs) > limit else None))
        return PiecesResponse(parts, media_type="application/json")

    @api.get("/jobs/{id}", **openapi.answers("Job", 200))
    async def status(request: Request, id: JobId) -> Response:
        """One job, as it is now."""
        return told(await engine.job(job_id(id), caller(request).tenant))

    @api.get("/jobs/{id}/result", **openapi.answers("image", 200, 304, **raises(WAITS, SERVES_FILE)))
    async def result(request: Request, id: JobId) -> Response:
        """The finished image. 409 with the `state` while there is none; the job's own error when it failed."""
        found = job_id(id)
        body = await engine.result(found, caller(request).tenant)
        return await send_result(request, body, found)

    @api.get("/jobs/{id}/events", **openapi.answers("events", 200, parameters=[openapi.LAST_EVENT]))
    async def events(request: Request, id: JobId) -> Response:
        """Server-sent events `state`, `position`, `progress` and, where they were asked for, `preview` (base64 in
        `jpeg`), until the job has ended; `Last-Event-ID` resumes."""
        job = await engine.job(job_id(id), caller(request).tenant)
        last = request.headers.get("last-event-id", "")
        after = int(last) if last.isascii() and last.isdigit() and len(last) < 19 else 0
        lines = event_lines(engine.events(job.id, job.request.tenant, after), keepalive)
        return StreamingResponse(lines, headers={"cache-control": "no-store"}, media_type="text/event-stream")

    @api.delete("/jobs/{id}", **openapi.answers("Job", 200))
    async def cancel(request: Request, id: JobId) -> Response:
        """Cancel a job, in whatever state. A second time, or after the end, nothing changes."""
        return told(await engine.cancel(job_id(id), caller(request).tenant))

    @api.get("/models", **openapi.answers("ModelList", 200))
    async def models() -> Response:
        """Every model this server offers."""
        return _json({"models": [model_json(spec, settings, engine.refusal(spec.name)) for spec in engine.catalogue]})

    @api.get("/models/{name}", **openapi.answers("Model", 200))
    async def model(name: str) -> Response:
        """One model: its task, its parameters, its limits."""
        return _json(model_json(engine.catalogue[name], settings, engine.refusal(name)))

    return api


async def send_result(request: Request, body: ResultBody, name: str) -> Response:
    """A result as a download `<name>.<format>`; 304 when the client has it. Raises `ResultGone`."""
    etag = f'"{name}"'  # a job has one result, for ever
    headers = {"etag": etag, "cache-control": "private, immutable, max-age=3600"}
    known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
    if known & {etag, "*"}:
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
    filename = f"{name}.{'jpg' if body.format == 'jpeg' else body.format}"
    if not isinstance(body.data, FilePath):
        headers["content-disposition"] = f'attachment; filename="{filename}"'
        return PiecesResponse([body.data], headers=headers, media_type=body.media_type)
    try:
        stat = await asyncio.to_thread(body.data.stat)
    except OSError:
        raise ResultGone("the job succeeded, but its result has been removed; submit it again") from None
    return ImageFile(body.data, headers=headers, media_type=body.media_type, filename=filename, stat_result=stat)


async def event_lines(events: AsyncIterator[JobEvent], keepalive: float) -> AsyncIterator[bytes]:
    """Events as server-sent events, with a comment line whenever nothing came for `keepalive` seconds."""
    async with aclosing(sse.with_pauses(events, keepalive)) as coming:
        async for event in coming:
            yield sse.KEEPALIVE if event is None else sse.line(event.kind, event.data, event.number)


def _dumps(value: Any) -> bytes:
    return orjson.dumps(value, default=str)


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(_dumps(value), status, headers, "application/json")

"""The i2ii API: `/edit`, `/status/{id}`, `/result/{id}`, `/system/status`, `/health`, as its clients know them.

Their four status words stay: queued, running (new: they used to see "queued" while it ran), completed, error. A job
that was cancelled or expired is an "error" with its `error_type`, so that a client that polls for one of the two final
words always ends. Every error body is `{"detail": ...}`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Form, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse, Response

from api.auth import caller
from api.dialect import UploadRoute, image_response
from api.errors import ValidationFailed, status_of
from api.images import read_image
from core.errors import BY_CODE, BadRequest, ImagePoolError, JobNotFinished, JobNotFound, TooLarge
from core.job import Job
from core.request import ImagePart, ImageRequest, OutputFormat
from core.settings import Settings
from core.states import State
from engine.engine import Engine

PREFIXES = ("/edit", "/status/", "/result/", "/system/status", "/health")
MAX_FILE = 10 * 1024 * 1024
TOO_LARGE = "Image too large"
MODEL = "edit"
WORDS: Mapping[State, str] = {
    State.QUEUED: "queued",
    State.RUNNING: "running",
    State.PARKED: "running",
    State.SUCCEEDED: "completed",
    State.FAILED: "error",
    State.CANCELLED: "error",
    State.EXPIRED: "error",
}
WORKER_WORDS: Mapping[str, str] = {
    "starting": "starting",
    "ready": "worker_ready",
    "busy": "worker_ready",
    "restarting": "died",
    "given_up": "initialization_failed",
    "draining": "stopping",
    "stopped": "stopped",
}


def dress(error: ImagePoolError, request_id: str) -> tuple[int, dict[str, Any]]:
    """`{"detail": sentence}`; FastAPI's list for a field that does not fit; beside it the status dict for a 409."""
    if isinstance(error, ValidationFailed):
        return 422, {"detail": error.details["errors"]}
    match error.code:
        case "invalid_image" | "unsupported_image":
            return 400, {"detail": f"Invalid image: {error.message}"}
        case "invalid_parameter":
            return 400, {"detail": error.message}
        case "too_large":
            return 413, {"detail": error.message if error.message.startswith(TOO_LARGE) else TOO_LARGE}
        case "job_not_found":
            return 404, {"detail": "Request not found"}
        case "result_gone":
            return 404, {"detail": "Result file not found"}
        case "job_not_finished":
            return 409, {"detail": error.message, **error.details}
    return status_of(error), {"detail": error.message}


class EditForm(BaseModel):
    """The fields of `POST /edit`."""

    image: UploadFile = Field(description="PNG, JPEG, WebP or AVIF, at most 10 MiB.")
    prompt: str = Field(description="What to change, in English or Chinese.")
    negative_prompt: str = Field("", description="What to leave out.")
    num_inference_steps: int = Field(50, description="Clamped to 10-100.")
    true_cfg_scale: float = Field(4.0, allow_inf_nan=False, description="Clamped to 1.0-10.0.")
    seed: int = Field(0, description="Any integer; folded to 64 bits.")


class Submitted(BaseModel):
    """The answer of `POST /edit`."""

    request_id: UUID
    status: str = Field(examples=["submitted"])
    message: str
    ready_workers: int
    total_requests: int
    estimated_position: int


class Status(BaseModel):
    """A request's status; the last three groups of fields only in that state."""

    model_config = ConfigDict(extra="allow")

    request_id: UUID
    status: str = Field(description="queued, running, completed or error")
    progress: float = Field(ge=0, le=1)
    submitted_at: float = Field(description="Unix seconds.")
    request_number: int
    assigned_gpu: int | None = Field(description="null until a GPU has taken the request")
    history: list[dict[str, Any]]
    estimated_position: int | None = Field(None, description="queued")
    output_path: str | None = Field(None, description="completed")
    processing_time: float | None = Field(None, description="completed")
    gpu_id: int | None = Field(None, description="completed, error")
    completed_at: float | None = Field(None, description="completed")
    request_count: int | None = Field(None, description="completed")
    error: str | None = Field(None, description="error")
    error_type: str | None = Field(None, description="error")


class Detail(BaseModel):
    """Every error of this API."""

    detail: str | list[dict[str, Any]]


class EditRoute(UploadRoute):
    """`POST /edit`: 10 MiB of image at most."""

    def most(self, request: Request) -> int:
        return MAX_FILE

    def too_large(self, most: int) -> TooLarge:
        return TooLarge(TOO_LARGE)

    def complaint(self, fault: RequestValidationError) -> Exception:
        # FastAPI counts an empty field as a missing one; these clients are told the difference.
        blank = any(item["loc"] == ("body", "prompt") and item["type"] == "missing" for item in fault.errors())
        return BadRequest("Prompt cannot be empty") if blank and "prompt" in (fault.body or ()) else fault


def _errors(**described: str) -> dict[int | str, dict[str, Any]]:
    return {int(name[1:]): {"model": Detail, "description": text} for name, text in described.items()}


def router(engine: Engine, settings: Settings) -> APIRouter:
    """The five routes."""
    routes = APIRouter(tags=["i2ii"])
    uploads = APIRouter(tags=["i2ii"], route_class=EditRoute)
    devices = _Devices(engine.snapshot)

    @uploads.post(
        "/edit",
        operation_id="i2ii_edit",
        summary="Edit an image by a prompt",
        response_model=Submitted,
        responses=_errors(
            _400="The prompt is empty or cannot be read, or the file is no image.",
            _401="An API key is needed.",
            _413="The image has more than 10 MiB or too many pixels.",
            _422="A field is missing or is no number.",
            _429="Too many requests for this key's tier; see Retry-After.",
            _503="The queue is full or no device can serve; see Retry-After.",
        ),
    )
    async def edit(request: Request, form: Annotated[EditForm, Form(media_type="multipart/form-data")]) -> Response:
        who = caller(request)
        image, params = await parse(form)
        job = await engine.submit(
            ImageRequest(
                model=MODEL,
                images=(image,),
                params=engine.catalogue[MODEL].check_params(params),
                output=OutputFormat("png"),
                priority=who.priority,
                tenant=who.tenant,
                dialect="i2ii",
            )
        )
        now = engine.snapshot()
        return JSONResponse({
            "request_id": job.id,
            "status": "submitted",
            "message": "Request submitted successfully",
            "ready_workers": _ready(now),
            "total_requests": now["jobs"]["total"],
            "estimated_position": engine.position(job.id) or 1,
        })

    async def parse(form: EditForm) -> tuple[ImagePart, dict[str, Any]]:
        if not (prompt := form.prompt.strip()):
            raise BadRequest("Prompt cannot be empty")
        if (form.image.size or 0) > MAX_FILE:
            raise TooLarge(TOO_LARGE)
        try:
            image = read_image(await form.image.read(), max_pixels=settings.max_pixels)
        except TooLarge as fault:
            raise TooLarge(f"{TOO_LARGE}: {fault.message}") from None
        return image, {
            "prompt": prompt,
            "negative_prompt": form.negative_prompt.strip(),
            "steps": max(10, min(form.num_inference_steps, 100)),
            "guidance": max(1.0, min(form.true_cfg_scale, 10.0)),
            "seed": fold(form.seed),
        }

    @routes.get(
        "/status/{request_id}",
        operation_id="i2ii_status",
        summary="How far a request is",
        response_model=Status,
        responses=_errors(_401="An API key is needed.", _404="No such request."),
    )
    async def status(request: Request, request_id: str) -> Response:
        return JSONResponse(tell(await find(request, request_id)))

    @routes.get(
        "/result/{request_id}",
        operation_id="i2ii_result",
        summary="The edited image",
        response_class=Response,
        responses={
            200: {"content": {"image/png": {}}, "description": "The image."},
            **_errors(_401="An API key is needed.", _404="No such request, or its file has been removed."),
            409: {"model": Status, "description": "Not completed: `detail` and the fields of the status."},
        },
    )
    async def result(request: Request, request_id: str) -> Response:
        job = await find(request, request_id)
        if job.state is not State.SUCCEEDED:
            state = tell(job)
            raise JobNotFinished(f"Request is not completed (status: {state['status']})", **state)
        body = await engine.result(job.id, caller(request).tenant)
        return image_response(body, job.id)

    async def find(request: Request, request_id: str) -> Job:
        try:
            return await engine.job(str(UUID(request_id)), caller(request).tenant)
        except ValueError:
            raise JobNotFound("Request not found") from None

    def tell(job: Job) -> dict[str, Any]:
        told: dict[str, Any] = {
            "request_id": job.id,
            "status": WORDS[job.state],
            "progress": round(job.progress, 4),
            "submitted_at": job.created_at,
            "assigned_gpu": devices.index(job.device),
            "request_number": job.number,
            "history": [
                {"at": move.at, "status": WORDS[move.state], "gpu_id": devices.index(move.device), "why": move.why}
                for move in job.history
            ],
        }
        if job.state is State.QUEUED:
            return told | {"estimated_position": engine.position(job.id)}
        if not job.state.ended:
            return told | {"started_at": job.started_at}
        told |= {"gpu_id": devices.index(job.device), "attempts": job.attempts, "completed_at": job.ended_at}
        if job.error:
            return told | {
                "error": job.error.message,
                "error_type": BY_CODE.get(job.error.code, ImagePoolError).__name__,
                "retryable": job.error.retryable,
            }
        return told | (_completed(job) if job.result else {})

    @routes.get("/system/status", operation_id="i2ii_system_status", summary="Workers, devices and the queue")
    async def system_status() -> dict[str, Any]:
        return system(engine.snapshot())

    @routes.get(
        "/health",
        operation_id="i2ii_health",
        summary="Whether requests can be served",
        responses={503: {"description": "Nothing can serve: `status` is unhealthy, `error` says why."}},
    )
    async def health() -> Response:
        return healthy(engine.snapshot())

    routes.include_router(uploads)
    return routes


def fold(seed: int) -> int:
    """Any whole number as a signed 64-bit one; those that are one already stay as they are."""
    return (seed + 2**63) % 2**64 - 2**63


class _Devices:
    """Worker names ("cuda:1") as the numbers these clients know."""

    def __init__(self, snapshot: Callable[[], dict[str, Any]]) -> None:
        self._snapshot = snapshot
        self._known: dict[str, int] = {}

    def index(self, worker: str | None) -> int | None:
        if worker is None:
            return None
        if worker not in self._known:
            self._known = {each["worker"]: each["index"] for each in self._snapshot()["workers"]}
        return self._known.get(worker)


def _completed(job: Job) -> dict[str, Any]:
    assert job.result is not None and job.ended_at is not None
    name = job.result.data if isinstance(job.result.data, str) else f"{job.id}.png"
    return {
        "output_path": f"outputs/{name}",
        "processing_time": job.ended_at - (job.started_at or job.created_at),
        "request_count": job.number,
        "batch_size": job.result.batch_size,
        "timings": dict(job.result.timings),
        "facts": dict(job.result.facts),
    }


def _ready(now: Mapping[str, Any]) -> int:
    return sum(worker["state"] in ("ready", "busy") for worker in now["workers"])


def _totals(now: Mapping[str, Any]) -> dict[str, int]:
    jobs = now["jobs"]
    return {
        "total_requests": jobs["total"],
        "completed_requests": jobs["succeeded"],
        "failed_requests": jobs["failed"] + jobs["cancelled"] + jobs["expired"],
    }


def system(now: Mapping[str, Any]) -> dict[str, Any]:
    """`/system/status` from the engine's snapshot: the keys of old, then what is new."""
    workers = now["workers"]
    words = {str(worker["index"]): WORKER_WORDS.get(worker["state"], "unknown") for worker in workers}
    return {
        "total_gpus": len(workers),
        "alive_processes": sum(bool(worker["alive"]) for worker in workers),
        "ready_workers": _ready(now),
        **_totals(now),
        "queued_requests": now["jobs"]["queued"] + now["jobs"]["running"],  # of old, running ones count as queued
        "worker_status": words,
        "processes_info": {
            str(worker["index"]): {
                "is_alive": bool(worker["alive"]),
                "pid": worker["pid"],
                "status": words[str(worker["index"])],
            }
            for worker in workers
        },
        "running_requests": now["jobs"]["running"],
        "cancelled_requests": now["jobs"]["cancelled"],
        "expired_requests": now["jobs"]["expired"],
        "uptime": now["uptime"],
        "ready": now["ready"],
        "reason": now["reason"],
        "draining": now["draining"],
        "devices": [_device(worker) for worker in workers],
        "queue": now["queue"],
    }


def _device(worker: Mapping[str, Any]) -> dict[str, Any]:
    same = ("index", "name", "state", "detail", "memory_total", "memory_used", "utilisation", "temperature", "power",
            "incarnation", "restarts", "current_batch", "batches", "images", "pace")  # fmt: skip
    return {
        "device": worker["worker"],
        **{key: worker[key] for key in same},
        "mean_batch_size": worker["mean_batch"],
    }


def healthy(now: Mapping[str, Any]) -> JSONResponse:
    """200 healthy (every worker serves) or degraded (some do); 503 unhealthy when nothing can serve."""
    ready, total = _ready(now), len(now["workers"])
    able = bool(now["ready"])
    told = {
        "status": ("healthy" if ready == total else "degraded") if able else "unhealthy",
        "timestamp": time.time(),
        "ready_workers": ready,
        "total_gpus": total,
        **_totals(now),
    }
    if able:
        return JSONResponse(told)
    told["error"] = now["reason"] or "no worker is ready"
    return JSONResponse(told, 503, {"retry-after": "5"})

"""The i2ii API: `/edit`, `/status/{id}`, `/result/{id}`, `/system/status`, `/health`, as its clients know them.

Their status words stay: queued, running (new: they used to see "queued" while it ran), completed, error. A job that was
cancelled or expired is an "error" with its `error_type`, so that a client that polls for one of the two final words
always ends. Every error body is `{"detail": ...}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Form, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.responses import JSONResponse, Response

from api import i2ii_shapes as shapes
from api.auth import caller
from api.choice import check, takes
from api.dialect import UploadRoute, image_response
from api.errors import ValidationFailed, status_of
from api.fields import Real, Whole
from api.forms import content
from api.i2ii_shapes import WORDS
from api.images import read_image
from api.openapi import IMAGE
from api.troubles import SERVES_FILE, raises
from core.errors import BY_CODE, BadRequest, ImagePoolError, JobNotFinished, JobNotFound, TooLarge
from core.job import Job, Result
from core.model import Catalogue, ModelSpec
from core.request import ImagePart, ImageRequest, OutputFormat, Role
from core.settings import Settings
from core.states import State
from engine.engine import Engine

PREFIXES = ("/edit", "/status/", "/result/", "/system/status", "/health")
FAULT = shapes.Detail
MAX_FILE = 10 * 1024 * 1024
TOO_LARGE = "Image too large"
ONE_IMAGE: Mapping[Role, int] = {"image": 1}
CLASSICAL = "edit"  # the model that serves where no diffusion model does


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
            return 413, {"detail": f"{TOO_LARGE}: {error.message}" if "pixels" in error.details else TOO_LARGE}
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
    num_inference_steps: Whole = Field(50, description="Clamped to 10-100.")
    true_cfg_scale: Real = Field(4.0, allow_inf_nan=False, description="Clamped to 1.0-10.0.")
    seed: Whole = Field(0, description="Any integer; folded to 64 bits.")


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


def router(engine: Engine, settings: Settings) -> APIRouter:
    """The five routes."""
    routes = APIRouter(tags=["i2ii"])
    uploads = APIRouter(route_class=EditRoute)
    devices = _Devices(engine)
    model = edit_model(engine.catalogue, settings.edit_model)

    @uploads.post(
        "/edit",
        operation_id="i2ii_edit",
        summary="Edit an image by a prompt",
        response_model=shapes.Submitted,
        responses=shapes.errors({
            400: "The prompt is empty or cannot be read, or the file is no image.",
            413: "The image has more than 10 MiB or too many pixels.",
            422: "A field is missing or is no number.",
        }),
    )
    async def edit(request: Request, form: Annotated[EditForm, Form(media_type="multipart/form-data")]) -> Response:
        who = caller(request)
        spec, params = engine.catalogue[model], read_params(form)
        job = await engine.submit(
            ImageRequest(
                model=spec.name,
                images=(await read_file(form.image, settings.max_pixels),),
                params=fit(spec, params),
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
            "ready_workers": shapes.ready_workers(now),
            "total_requests": now["jobs"]["total"],
            "estimated_position": engine.position(job.id) or 1,
        })

    @routes.get(
        "/status/{request_id}",
        operation_id="i2ii_status",
        summary="How far a request is",
        response_model=shapes.Status,
        responses=shapes.errors({404: "No such request."}),
    )
    async def status(request: Request, request_id: str) -> Response:
        return JSONResponse(tell(await find(request, request_id)))

    @routes.get(
        "/result/{request_id}",
        operation_id="i2ii_result",
        summary="The edited image",
        response_class=Response,
        responses={
            200: {"content": IMAGE, "description": "The image: a PNG, unless another API made the job."},
            **shapes.errors({404: "No such request, or its file has been removed."}),
            409: {"model": shapes.NoResult, "description": "Not completed."},
        },
        openapi_extra=raises(SERVES_FILE),
    )
    async def result(request: Request, request_id: str) -> Response:
        job = await find(request, request_id)
        if job.state is not State.SUCCEEDED:
            state = tell(job)
            raise JobNotFinished(f"Request is not completed (status: {state['status']})", **state)
        return image_response(await engine.result(job.id, caller(request).tenant), job.id)

    @routes.get(
        "/system/status",
        operation_id="i2ii_system_status",
        summary="Workers, devices and the queue",
        response_model=shapes.SystemStatus,
    )
    async def system_status() -> Response:
        return JSONResponse(shapes.system_status(engine.snapshot()))

    @routes.get(
        "/health",
        operation_id="i2ii_health",
        summary="Whether requests can be served",
        response_model=shapes.Health,
        responses={503: {"model": shapes.Health, "description": "Nothing can serve: `error` says why."}},
    )
    async def health() -> Response:
        told = shapes.health(engine.snapshot())
        return JSONResponse(told, 503, {"retry-after": "5"}) if "error" in told else JSONResponse(told)

    async def find(request: Request, request_id: str) -> Job:
        try:
            return await engine.job(str(UUID(request_id)), caller(request).tenant)
        except ValueError:
            raise JobNotFound("there is no request of that id") from None

    def tell(job: Job) -> dict[str, Any]:
        told: dict[str, Any] = {
            "request_id": job.id,
            "status": WORDS[job.state],
            "progress": round(job.progress, 4),
            "submitted_at": job.created_at,
            "assigned_gpu": devices.number(job.device),
            "request_number": job.number,
            "history": [
                {"at": move.at, "status": WORDS[move.state], "gpu_id": devices.number(move.device), "why": move.why}
                for move in job.history
            ],
        }
        if job.state is State.QUEUED:
            return told | {"estimated_position": engine.position(job.id)}
        if not job.state.ended:
            return told | {"started_at": job.started_at}
        told |= {"gpu_id": devices.number(job.device), "attempts": job.attempts, "completed_at": job.ended_at}
        return told | (_completed(job, job.result) if job.result else _failed(job))

    routes.include_router(uploads)
    return routes


def edit_model(catalogue: Catalogue, wanted: str) -> str:
    """The name of `/edit`'s model: the one wanted, else the first diffusion model that edits an image, else the
    classical one. Raises ValueError for one that was wanted and cannot do it."""
    if wanted and (wanted not in catalogue or not takes(catalogue[wanted], ONE_IMAGE)):
        raise ValueError(f"--edit-model {wanted}: there is no model of that name that edits one image")
    stepped = (spec.name for spec in catalogue if spec.stepped and spec.task == "edit" and takes(spec, ONE_IMAGE))
    return wanted or next(stepped, CLASSICAL)


def fit(spec: ModelSpec, params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters as the model calls them: those it has no name for are left out. Raises `InvalidParameter`."""
    scale = "true_cfg_scale" if "true_cfg_scale" in spec.params else "guidance"
    usual = {name: value for name, value in params.items() if name not in ("prompt", "guidance")}
    return check(spec, {"prompt": params["prompt"]}, {**usual, scale: params["guidance"]})


def read_params(form: EditForm) -> dict[str, Any]:
    """The model's parameters: clamped, stripped, folded. Raises `BadRequest` for a blank prompt."""
    if not (prompt := form.prompt.strip()):
        raise BadRequest("Prompt cannot be empty")
    return {
        "prompt": prompt,
        "negative_prompt": form.negative_prompt.strip(),
        "steps": max(10, min(form.num_inference_steps, 100)),
        "guidance": max(1.0, min(form.true_cfg_scale, 10.0)),
        "seed": (form.seed + 2**63) % 2**64 - 2**63,  # those that are 64-bit numbers already stay as they are
    }


async def read_file(upload: UploadFile, max_pixels: int) -> ImagePart:
    """The image. Its size is looked at before its format; raises `TooLarge`, `InvalidImage`, `UnsupportedImage`."""
    if (upload.size or 0) > MAX_FILE:
        raise TooLarge(TOO_LARGE)
    return read_image(await content(upload), max_pixels=max_pixels)


class _Devices:
    """Worker names ("cuda:1") as the numbers that these clients know."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._known: dict[str, int] = {}

    def number(self, worker: str | None) -> int | None:
        if worker is not None and worker not in self._known:
            self._known = {each["worker"]: each["index"] for each in self._engine.snapshot()["workers"]}
        return self._known.get(worker or "")


def _completed(job: Job, result: Result) -> dict[str, Any]:
    return {
        "output_path": f"outputs/{result.data}",
        "processing_time": (job.ended_at or 0.0) - (job.started_at or job.created_at),
        "request_count": job.number,
        "batch_size": result.batch_size,
        "timings": dict(result.timings),
        "facts": dict(result.facts),
    }


def _failed(job: Job) -> dict[str, Any]:
    assert job.error is not None
    kind = BY_CODE.get(job.error.code, ImagePoolError).__name__
    return {"error": job.error.message, "error_type": kind, "retryable": job.error.retryable}

"""The imagen API: `/api/v1/images/*` puts a job in the queue, `/api/v1/jobs/{id}` tells what became of it.

Parameters (`api.imagen_params`) are taken from the query, as that service's code had it, and from the form, as its
README showed; the form wins. Errors wear the envelope `{"error": {"code", "message", "request_id", "details"?}}`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Form, Query, Request, UploadFile
from pydantic import BaseModel, Field
from starlette.responses import JSONResponse, Response

from api.auth import Caller, caller
from api.choice import takes
from api.dialect import UploadRoute, image_response
from api.errors import status_of
from api.forms import content
from api.imagen_params import (
    AGED,
    BACKGROUND,
    COMIC,
    ENHANCE,
    UPSCALE,
    EnhanceForm,
    EnhanceParams,
    Operation,
    PlainForm,
    StyleForm,
    StyleParams,
    UpscaleForm,
    UpscaleParams,
    drawn_by,
    merge,
)
from api.images import read_image
from api.limits import file_limit
from api.openapi import IMAGE
from api.troubles import SERVES_FILE, SIGNED, WAITS, raises
from core.errors import ImagePoolError, InvalidImage, JobNotFinished, JobNotFound, TooLarge, from_info
from core.job import Job
from core.model import Catalogue
from core.request import ImagePart, ImageRequest, OutputFormat
from core.settings import Settings, Tier
from core.states import State
from engine.engine import Engine

PREFIXES = ("/api/v1/images", "/api/v1/jobs", "/ready")
SMALLEST, LARGEST = 32, 8192  # pixels of a side
WORDS: Mapping[State, str] = {
    State.QUEUED: "queued",
    State.RUNNING: "processing",
    State.PARKED: "processing",
    State.SUCCEEDED: "completed",
    State.FAILED: "failed",
    State.CANCELLED: "failed",
    State.EXPIRED: "failed",
}
CODES: Mapping[str, tuple[int, str]] = {
    "bad_request": (422, "VALIDATION_ERROR"),
    "invalid_parameter": (422, "VALIDATION_ERROR"),
    "invalid_image": (400, "INVALID_IMAGE"),
    "unsupported_image": (400, "INVALID_IMAGE"),
    "job_not_found": (404, "JOB_NOT_FOUND"),
    "rate_limited": (429, "RATE_LIMIT_EXCEEDED"),
    "model_failed": (500, "JOB_PROCESSING_ERROR"),
    "bad_output": (500, "JOB_PROCESSING_ERROR"),
    "out_of_memory": (500, "JOB_PROCESSING_ERROR"),
    "poisonous_job": (500, "JOB_PROCESSING_ERROR"),
    "deadline_exceeded": (500, "JOB_PROCESSING_ERROR"),
    "cancelled": (500, "JOB_PROCESSING_ERROR"),
    "worker_lost": (500, "JOB_PROCESSING_ERROR"),
    "internal_error": (500, "INTERNAL_ERROR"),
}
A_DAY_S_QUOTA = 3600.0  # a wait beyond an hour means that the day's quota is used up


def dress(error: ImagePoolError, request_id: str) -> tuple[int, dict[str, Any]]:
    """The envelope with this API's codes; `ERR_<status>` for what has none."""
    status = status_of(error)
    status, code = CODES.get(error.code, (status, f"ERR_{status}"))
    if status == 429 and (error.retry_after or 0.0) > A_DAY_S_QUOTA:
        code = "QUOTA_EXCEEDED"
    told: dict[str, Any] = {"code": code, "message": error.message, "request_id": request_id}
    if error.details:
        told["details"] = error.details
    return status, {"error": told}


class Queued(BaseModel):
    """A job that was accepted."""

    job_id: UUID
    status: str = Field(examples=["queued"])
    message: str


class JobRecord(BaseModel):
    """A job as this API tells it."""

    job_id: UUID
    type: str = Field(description="upscale, enhance, style-comic, style-aged or background-remove")
    status: str = Field(description="queued, processing, completed or failed")
    input_path: str | None = Field(description="null once the job has ended: then it is removed.")
    output_path: str | None
    output_url: str | None = Field(description="Path to download the result from, once completed.")
    params: dict[str, Any]
    error: str | None
    created_at: datetime
    updated_at: datetime
    progress: float = Field(ge=0, le=1)


class RateLimits(BaseModel):
    """Requests per time; null: not limited."""

    requests_per_minute: int | None
    requests_per_hour: int | None
    requests_per_day: int | None


class Limits(BaseModel):
    """What this caller may send."""

    tier: str
    rate_limits: RateLimits
    max_file_size_mb: float
    max_image_dimension: int


class ErrorBody(BaseModel):
    """What went wrong."""

    code: str
    message: str
    request_id: str
    details: dict[str, Any] | None = Field(None, description="Facts; `errors` lists what does not fit.")


class Envelope(BaseModel):
    """Every error of this API."""

    error: ErrorBody


class Readiness(BaseModel):
    """Whether jobs can be served."""

    status: str = Field(description="ready or not ready")
    reason: str | None = Field(None, description="not ready: why")


def _errors(described: Mapping[int, str]) -> dict[int | str, dict[str, Any]]:
    return {status: {"description": text} for status, text in described.items()}


FAULT = Envelope
SUBMIT_ERRORS = _errors({
    400: "INVALID_IMAGE: the file is no image that is served, or its size is out of bounds.",
    413: "ERR_413: the file is larger than the tier allows, or has too many pixels.",
    422: "VALIDATION_ERROR: a parameter is missing, of the wrong type or out of range.",
    429: "RATE_LIMIT_EXCEEDED or QUOTA_EXCEEDED; see Retry-After.",
    503: "ERR_503: the queue is full or no device can serve; see Retry-After.",
})
JOB_ERRORS = {404: "JOB_NOT_FOUND"}


def tell(job: Job, link: Callable[[str, str], str]) -> dict[str, Any]:
    """A job's record. `link(path, tenant)`: the address at which its image can be had."""
    result, source = job.result, job.request.images[0].data if job.request.images else None
    return {
        "job_id": job.id,
        "type": job.request.client.get("type") or job.request.model.replace("_", "-"),
        "status": WORDS[job.state],
        "input_path": source if isinstance(source, str) and not job.state.ended else None,
        "output_path": f"outputs/{result.data}" if result and isinstance(result.data, str) else None,
        "output_url": link(f"/api/v1/jobs/{job.id}/result", job.request.tenant) if result else None,
        "params": dict(job.request.client.get("params", job.request.params)),
        "error": job.error.message if job.error else None,
        "created_at": _iso(job.created_at),
        "updated_at": _iso(job.history[-1].at),
        "progress": round(job.progress, 4),
        "history": [{"at": _iso(move.at), "status": WORDS[move.state], "why": move.why} for move in job.history],
    }


def _iso(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat()


def limits(who: Caller, settings: Settings) -> dict[str, Any]:
    """What this caller may send."""
    tier = settings.tiers.get(who.tier, Tier())
    return {
        "tier": who.tier or ("anonymous" if settings.keys_file is None else "unlimited"),
        "rate_limits": {
            "requests_per_minute": tier.per_minute,
            "requests_per_hour": tier.per_hour,
            "requests_per_day": tier.per_day,
        },
        "max_file_size_mb": _mb(file_limit(who, settings)),
        "max_image_dimension": LARGEST,
    }


def drawn_operations(catalogue: Catalogue, wanted: Sequence[str]) -> dict[str, Operation]:
    """By type, the operations that diffusion models do, from "enhance=NAME" and the like. Raises ValueError."""
    found = {}
    classical = {operation.model: operation for operation in (ENHANCE, COMIC, AGED)}
    for word in wanted:
        place, _, name = word.partition("=")
        if place not in classical or name not in catalogue or not takes(catalogue[name], {"image": 1}):
            raise ValueError(
                f"--imagen-models {word}: give {', '.join(classical)} as enhance=NAME, with the name of a model that "
                "takes one image"
            )
        found[classical[place].type] = drawn_by(classical[place], catalogue[name])
    return found


def _mb(size: int) -> int | float:
    mb = size / 2**20
    return int(mb) if mb.is_integer() else round(mb, 3)


def router(engine: Engine, settings: Settings) -> APIRouter:
    """All routes of this API."""

    class ImageRoute(UploadRoute):
        def most(self, request: Request) -> int:
            return file_limit(caller(request), settings)

        def too_large(self, most: int) -> TooLarge:
            return TooLarge(f"Request too large. Maximum size: {_mb(most)} MB")

    routes = APIRouter(tags=["imagen"])
    drawn = drawn_operations(engine.catalogue, settings.imagen_models)
    uploads = APIRouter(prefix="/api/v1/images", route_class=ImageRoute, responses=SUBMIT_ERRORS)

    async def read(request: Request, upload: UploadFile) -> ImagePart:
        most = file_limit(caller(request), settings)
        if (upload.size or 0) > most:
            raise TooLarge(f"Request too large. Maximum size: {_mb(most)} MB")
        image = read_image(await content(upload), max_pixels=settings.max_pixels)
        width, height = image.header.width, image.header.height
        if min(width, height) < SMALLEST or max(width, height) > LARGEST:
            raise InvalidImage(f"the image is {width}x{height}; each side must have {SMALLEST} to {LARGEST} pixels")
        return image

    async def submit(request: Request, operation: Operation, upload: UploadFile, asked: Mapping[str, Any]) -> Response:
        operation = drawn.get(operation.type, operation)
        spec = engine.catalogue[operation.model]
        params = spec.check_params(operation.params(asked))
        who = caller(request)
        job = await engine.submit(
            ImageRequest(
                model=operation.model,
                images=(await read(request, upload),),
                params=params,
                output=OutputFormat("png"),
                priority=who.priority,
                tenant=who.tenant,
                dialect="imagen",
                client={"type": operation.type, "params": dict(asked)},
            )
        )
        return JSONResponse({"job_id": job.id, "status": "queued", "message": "Job queued successfully"})

    @uploads.post("/upscale", operation_id="imagen_upscale", summary="Enlarge an image", response_model=Queued)
    async def upscale(
        request: Request,
        query: Annotated[UpscaleParams, Query()],
        form: Annotated[UpscaleForm, Form(media_type="multipart/form-data")],
    ) -> Response:
        return await submit(request, UPSCALE, form.file, merge(query, form))

    @uploads.post("/enhance", operation_id="imagen_enhance", summary="Raise an image's detail", response_model=Queued)
    async def enhance(
        request: Request,
        query: Annotated[EnhanceParams, Query()],
        form: Annotated[EnhanceForm, Form(media_type="multipart/form-data")],
    ) -> Response:
        return await submit(request, ENHANCE, form.file, merge(query, form))

    @uploads.post("/style/comic", operation_id="imagen_style_comic", summary="Draw as a comic", response_model=Queued)
    async def comic(
        request: Request,
        query: Annotated[StyleParams, Query()],
        form: Annotated[StyleForm, Form(media_type="multipart/form-data")],
    ) -> Response:
        return await submit(request, COMIC, form.file, merge(query, form))

    @uploads.post("/style/aged", operation_id="imagen_style_aged", summary="Age a photograph", response_model=Queued)
    async def aged(
        request: Request,
        query: Annotated[StyleParams, Query()],
        form: Annotated[StyleForm, Form(media_type="multipart/form-data")],
    ) -> Response:
        return await submit(request, AGED, form.file, merge(query, form))

    @uploads.post(
        "/background/remove",
        operation_id="imagen_background_remove",
        summary="Cut the subject out",
        response_model=Queued,
    )
    async def background(
        request: Request, form: Annotated[PlainForm, Form(media_type="multipart/form-data")]
    ) -> Response:
        return await submit(request, BACKGROUND, form.file, {})

    @routes.get(
        "/api/v1/images/limits",
        operation_id="imagen_limits",
        summary="What this caller may send",
        response_model=Limits,
    )
    async def tell_limits(request: Request) -> Response:
        return JSONResponse(limits(caller(request), settings))

    @routes.get(
        "/api/v1/jobs/{job_id}",
        operation_id="imagen_job",
        summary="A job's record",
        response_model=JobRecord,
        responses=_errors(JOB_ERRORS),
    )
    async def record(request: Request, job_id: str) -> Response:
        return JSONResponse(tell(await find(request, job_id), engine.link))

    @routes.get(
        "/api/v1/jobs/{job_id}/result",
        operation_id="imagen_job_result",
        summary="A completed job's image",
        response_class=Response,
        responses={
            200: {"content": IMAGE, "description": "The image: a PNG, unless another API made the job."},
            **_errors(JOB_ERRORS | {
                403: "ERR_403: the signed address is over or was changed.",
                409: "ERR_409: not completed yet; `details.status` says how far it is.",
                410: "ERR_410: the image has been removed.",
                500: "JOB_PROCESSING_ERROR: the job failed.",
            }),
        },
        openapi_extra=raises(WAITS, SERVES_FILE, SIGNED),
    )
    async def result(request: Request, job_id: str) -> Response:
        job = await find(request, job_id)
        if job.error:
            raise from_info(job.error)
        if job.state is not State.SUCCEEDED:
            raise JobNotFinished(f"the job is {WORDS[job.state]}; its image comes when it is completed",
                                 status=WORDS[job.state], progress=round(job.progress, 4))  # fmt: skip
        return image_response(await engine.result(job.id, caller(request).tenant), job.id)

    async def find(request: Request, job_id: str) -> Job:
        try:
            return await engine.job(str(UUID(job_id)), caller(request).tenant)
        except ValueError:
            raise JobNotFound("there is no job of that id") from None

    @routes.get(
        "/ready",
        operation_id="imagen_ready",
        summary="Whether jobs can be served",
        response_model=Readiness,
        responses={503: {"model": Readiness, "description": "Nothing can serve."}},
    )
    async def ready() -> Response:
        now = engine.snapshot()
        if now["ready"]:
            return JSONResponse({"status": "ready"})
        told = {"status": "not ready", "reason": now["reason"] or "no worker is ready"}
        return JSONResponse(told, 503, {"retry-after": "5"})

    routes.include_router(uploads)
    return routes

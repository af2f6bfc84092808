"""OpenAI's Images API: `/v1/images/generations`, `/edits`, `/variations` and `/v1/models`, for its own clients.

A request that wants base64 lives as long as its client waits; one that wants addresses makes durable jobs, whose images
can be fetched as long as retention keeps them. `n` images are `n` jobs. Errors are `{"error": {"message", "type",
"param", "code"}}`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from api import links, openai_cutouts, openai_requests, openai_shapes, sse
from api.answers import PLACE, json_with_images, pieces_of, with_images
from api.auth import caller
from api.choice import choose
from api.errors import ValidationFailed, status_of
from api.jobs import job_id, send_result
from api.limits import file_limit
from api.openai_requests import ImagesRequest
from api.run import Watch
from api.submission import Submission, read_parts
from core.data import Data
from core.errors import Draining, ImagePoolError, InvalidParameter, UnknownModel, from_info
from core.job import Job
from core.model import ModelSpec
from core.request import ROLES, ImagePart, ImageRequest
from core.settings import Settings
from core.states import State
from engine.engine import Engine

PREFIXES = ("/v1/",)
FAULT = openai_shapes.Error
GENERATE, EDIT = "generate", "edit"
CODES = {"unknown_model": "model_not_found", "unauthorised": "invalid_api_key", "rate_limited": "rate_limit_exceeded"}
KEEPALIVE = 15.0  # seconds of silence after which a stream shows that it is alive


def dress(error: ImagePoolError, request_id: str) -> tuple[int, dict[str, Any]]:
    """OpenAI's error object. What does not fit is a 400 there."""
    status = status_of(error)
    status = 400 if status in (415, 422) else status
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    parameter = error.details.get("parameter")
    if isinstance(error, ValidationFailed):
        parameter = ".".join(str(part) for part in error.details["errors"][0]["loc"][1:])
    told = {"message": error.message, "type": kind, "param": parameter, "code": CODES.get(error.code, error.code)}
    return status, {"error": told}


@dataclass(frozen=True, slots=True)
class Order:
    """A request that has been understood: the jobs it is to become, and what its answer tells."""

    asked: ImagesRequest
    kind: str  # of its stream's events
    requests: tuple[ImageRequest, ...]
    remover: ModelSpec | None  # cuts each image out, where a transparent background is wanted


class Counter:
    """Takes orders and runs them."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine, self._settings = engine, settings

    async def order(self, request: Request, tasks: Sequence[str], kind: str) -> Order:
        """Read a request. Raises what makes it one that cannot be run."""
        asked, found = await openai_requests.read(request, file_limit(caller(request), self._settings))
        if kind == "variation":
            asked = asked.model_copy(update={"prompt": ""})
        elif not asked.prompt.strip():
            raise InvalidParameter("Missing required parameter: 'prompt'.", parameter="prompt")
        if kind != "image_generation" and not found.images["image"]:
            raise InvalidParameter("Missing required parameter: 'image'.", parameter="image")
        openai_requests.check_number(len(found.images["image"]))
        remover = None
        if asked.background == "transparent":
            remover = openai_cutouts.remover(self._engine.offered, asked.output_format)
        spec = self._spec(asked, found, tasks)
        images = await read_parts(spec, found, file_limit(caller(request), self._settings), self._settings.max_pixels)
        requests = tuple(self._requests(request, asked, spec, images))
        if remover is not None:
            openai_cutouts.check_size(requests[0], spec, remover)
        return Order(asked, kind, requests, remover)

    def _spec(self, asked: ImagesRequest, found: Submission, tasks: Sequence[str]) -> ModelSpec:
        """The model. One that was named and is offered serves, or says what it does not take."""
        found.images["reference"] += found.images["image"][1:]
        del found.images["image"][1:]
        if asked.model and asked.model in self._engine.catalogue:
            return self._engine.catalogue[asked.model]
        count = {role: len(found.images[role]) for role in ROLES}
        catalogue, first = self._engine.offered, (self._settings.openai_model,)
        try:
            return choose(catalogue, tasks, count, first)
        except UnknownModel:
            for fewer in reversed(range(count["reference"])):  # is it that there are too many?
                with suppress(UnknownModel):
                    choose(catalogue, tasks, {**count, "reference": fewer}, first)
                    raise InvalidParameter(
                        f"Invalid 'image': {1 + count['reference']} images were sent; the models of this server take "
                        f"{1 + fewer} at most.", parameter="image"
                    ) from None
            raise

    def _requests(
        self, request: Request, asked: ImagesRequest, spec: ModelSpec, images: tuple[ImagePart, ...]
    ) -> list[ImageRequest]:
        who = caller(request)
        first = next((image for image in images if image.role == "image"), None)
        return [
            ImageRequest(
                model=spec.name, images=images, params=params, output=asked.output, priority=who.priority,
                tenant=who.tenant, deadline=self._settings.request_timeout, dialect="openai",
                durable=asked.as_url or asked.stream, previews=asked.stream and asked.partial_images > 0,
            )
            for params in asked.params(spec, first)
        ]  # fmt: skip

    async def images(self, order: Order) -> list[tuple[Job, Data]]:
        """Run an order's jobs while its client waits; all of them or, when one fails, its error."""
        return await _all([self._image(one, order.remover) for one in order.requests])

    async def _image(self, wanted: ImageRequest, remover: ModelSpec | None) -> tuple[Job, Data]:
        first = openai_cutouts.first(wanted) if remover else wanted
        job, body = await self._engine.run(replace(first, durable=False))
        data = await body.read()
        return await openai_cutouts.cut_out(self._engine, wanted, remover, data) if remover else (job, data)

    async def jobs(self, order: Order) -> list[Job]:
        """The same with jobs that are kept; of two after each other, the second."""
        return await _all([self._kept(one, order.remover) for one in order.requests])

    async def _kept(self, request: ImageRequest, remover: ModelSpec | None) -> Job:
        if remover is not None:
            _, drawn = await self._image(openai_cutouts.first(request), None)
            request = openai_cutouts.second(request, remover, drawn)
        job = await self._engine.submit(request)
        try:
            async for _ in self._engine.events(job.id):  # to its end, or to that of the server's grace
                pass
            job = await self._engine.job(job.id)
            if not job.state.ended:
                raise Draining("the server is shutting down; send it again", retry_after=10.0)
        finally:
            if not job.state.ended:  # the client is gone, a sister has failed, or the server goes away
                await self._engine.cancel(job.id)
        if job.error is not None:
            raise from_info(job.error)
        return job

    async def stream(self, order: Order, tenant: str) -> AsyncIterator[bytes]:
        """Previews and the image as server-sent events; an error is one too. The job is cancelled when nobody reads."""
        (request,) = order.requests
        job = await self._engine.submit(openai_cutouts.first(request) if order.remover else request)
        return self._events(order, job, tenant)

    async def _events(self, order: Order, job: Job, tenant: str) -> AsyncIterator[bytes]:
        shown = 0
        try:
            async for event in sse.with_pauses(self._engine.events(job.id, tenant), KEEPALIVE):
                if event is None:
                    yield sse.KEEPALIVE
                elif event.kind == "preview" and shown < order.asked.partial_images:
                    told = openai_shapes.partial_image(order.kind, order.asked, job, event.data["jpeg"], shown)
                    yield sse.line(told["type"], told)
                    shown += 1
            job = await self._engine.job(job.id, tenant)
            if job.state is not State.SUCCEEDED:
                raise from_info(job.error) if job.error else Draining("the server is shutting down; send it again")
            done = job
            body = await self._engine.result(job.id, tenant)
            data = await body.read()
            if order.remover is not None:
                done, data = await openai_cutouts.cut_out(self._engine, order.requests[0], order.remover, data)
            told = openai_shapes.completed(order.kind, order.asked, done, PLACE)
            for piece in pieces_of(with_images(sse.line(told["type"], told), [data])):
                yield piece
        except ImagePoolError as fault:
            yield sse.line("error", dress(fault, "")[1])
        finally:
            if not job.state.ended:
                await self._engine.cancel(job.id)


async def _all(runs: Sequence[Any]) -> list[Any]:
    """The results of all; when one fails the others are cancelled, and it is its error that is raised."""
    tasks = [asyncio.ensure_future(run) for run in runs]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def router(engine: Engine, settings: Settings) -> APIRouter:
    """All routes."""
    api = APIRouter(prefix="/v1", tags=["openai"])
    counter = Counter(engine, settings)

    async def answer(request: Request, tasks: Sequence[str], kind: str) -> Response:
        order = await counter.order(request, tasks, kind)
        who = caller(request)
        if order.asked.stream:
            lines = await counter.stream(order, who.tenant)
            return StreamingResponse(lines, headers={"cache-control": "no-store"}, media_type="text/event-stream")
        images: list[Data] = []
        with Watch(request.scope, request.receive):
            if order.asked.as_url:
                jobs = await counter.jobs(order)
                base = links.base(request, settings)
                data: list[Mapping[str, str]] = [
                    {"url": base + engine.link(f"/v1/images/{job.id}/content", who.tenant)} for job in jobs
                ]
            else:
                done = await counter.images(order)
                jobs = [job for job, _ in done]
                images = [image for _, image in done]
                data = [{"b64_json": PLACE}] * len(images)
        return json_with_images(openai_shapes.images(order.asked, jobs, data), images)

    @api.post("/images/generations", operation_id="openai_generate", summary="Draw images from words",
              **openai_shapes.answers("application/json"))
    async def generations(request: Request) -> Response:
        return await answer(request, (GENERATE,), "image_generation")

    @api.post("/images/edits", operation_id="openai_edit", summary="Change an image by words",
              **openai_shapes.answers("multipart/form-data", "image", "mask"))
    async def edits(request: Request) -> Response:
        return await answer(request, (EDIT, GENERATE), "image_edit")

    @api.post("/images/variations", operation_id="openai_vary", summary="Draw an image anew",
              **openai_shapes.answers("multipart/form-data", "image", prompt=False))
    async def variations(request: Request) -> Response:
        return await answer(request, (GENERATE,), "variation")

    @api.get("/images/{id}/content", operation_id="openai_content", response_class=Response,
             summary="An image that was answered as a URL", **openai_shapes.image_answers())
    async def content(request: Request, id: str) -> Response:
        found = job_id(id)
        return await send_result(request, await engine.result(found, caller(request).tenant), found)

    @api.get("/models", operation_id="openai_models", summary="All models",
             response_model=openai_shapes.ModelPage)
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [openai_shapes.model(spec, began) for spec in engine.offered]})

    @api.get("/models/{name}", operation_id="openai_model", summary="One model", response_model=openai_shapes.Model)
    async def model(name: str) -> Response:
        return JSONResponse(openai_shapes.model(engine.catalogue[name], began))

    began = int(time.time())
    return api

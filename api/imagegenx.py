"""ImageGenX's API: `/api/v1/image/*` takes tasks and tells of them, in the envelope `{"code", "message", "data"}`.

A task is a durable job. Its image, its thumbnail (made when it is asked for) and the ZIP file of a batch are served
here. Errors wear the envelope too, with `data: null`.
"""

from __future__ import annotations

import io
import re
import time
import zipfile
from collections import Counter
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter
from fastapi import Path as PathField
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from api import fetch, links, strict_json
from api import imagegenx_schema as schema
from api.answers import pieces_of
from api.auth import caller, read_priority
from api.choice import choose, named
from api.errors import status_of
from api.imagegenx_docs import Envelope, answers, takes
from api.imagegenx_tasks import DIALECT, Task, Tasks, batch_json, envelope, task_envelope
from api.images import check_mask, read_base64, read_image
from api.jobs import send_result
from api.limits import charge, file_limit
from api.pictures import Picture
from api.run import Watch
from api.submission import check_counts
from api.troubles import READS_FILE, SERVES_FILE, SIGNED, SUBMITS, WAITS
from core.data import Data
from core.errors import ImagePoolError, InvalidParameter, JobNotFound, Overloaded
from core.model import ModelSpec
from core.request import ImagePart, ImageRequest, OutputFormat, Role, unseen
from core.settings import Settings
from engine.engine import Engine

PREFIXES = ("/api/v1/image/", "/temp/")
FAULT = Envelope
NO_KEY = "X-API-Key header is required"
THUMBNAIL = 256  # pixels of its longest side
THUMB_NAME, FILE_NAME = re.compile(r"(img[0-9]{21})_thumb\.webp"), re.compile(r"(img[0-9]{21})_[0-9]+x[0-9]+\.[a-z]+")
OWN_FILE = re.compile(r"/api/v1/image/file/[0-9]{8}/" + FILE_NAME.pattern)
DRAW = ("generate", "edit")
MOST_FETCHES = 16  # of one tenant at a time
LONGEST_URL = 8 << 10  # bytes; longer is no address, but the image itself

Id = Annotated[str, PathField(alias="id", max_length=64)]


def dress(error: ImagePoolError, request_id: str) -> tuple[int, dict[str, Any]]:
    """The envelope. A missing key is a 401, one that does not hold (any more) a 403."""
    status, message = status_of(error), error.message
    if error.code == "unauthorised":
        status, message = (403, message) if error.details.get("presented") else (401, NO_KEY)
    return status, envelope(None, message, status) | {"request_id": request_id}


class Reader:
    """Makes requests of what clients send."""

    def __init__(self, engine: Engine, settings: Settings, tasks: Tasks) -> None:
        self._engine, self._settings, self._tasks = engine, settings, tasks
        self._fetching: Counter[str] = Counter()  # images on their way, by tenant

    async def body(self, request: Request, kind: type[schema.Body]) -> schema.Body:
        """Raises `BadRequest` and `ValidationFailed`."""
        return schema.read(kind, await strict_json.read(request.stream(), schema.LONG))

    async def picture(self, request: Request, given: Picture, parameter: str, role: Role = "image"
    ) -> ImagePart:  # fmt: skip
        """The image at a data: URL, an http(s) address or an address of our own, or base64 itself."""
        most = file_limit(caller(request), self._settings)
        url = given if isinstance(given, str) else strict_json.text_of(given) if given.size <= LONGEST_URL else ""
        data: Data
        # It may be signed; here the caller's key counts.
        if own := OWN_FILE.fullmatch(links.own_path(url, request, self._settings)):
            body = await self._tasks.result(await self._tasks.find(own[1], caller(request).tenant))
            data = await body.read()
        elif url.lower().startswith(("http://", "https://")):
            data = await self._fetch(url, parameter, caller(request).tenant, most)
        else:
            data = await read_base64(url or given, role, max_bytes=most)
        return read_image(data, role, max_pixels=self._settings.max_pixels)

    async def _fetch(self, url: str, parameter: str, tenant: str, max_bytes: int) -> Data:
        """Bounded for each tenant: a request of a few bytes has the server hold a whole image."""
        if self._fetching[tenant] >= MOST_FETCHES:
            raise Overloaded(f"{MOST_FETCHES} images are being fetched for you already; send it again", retry_after=1.0)
        self._fetching[tenant] += 1
        try:
            return await fetch.fetch(url, parameter, reach=self._settings.fetch, max_bytes=max_bytes, tenant=tenant)
        finally:
            self._fetching[tenant] -= 1

    def spec(self, asked: schema.Task, images: Sequence[ImagePart], params: Collection[str] = ()) -> ModelSpec:
        """The model named by `model_type`, the setting's, or the first that takes these images and parameters. Raises
        `UnknownModel`, or `InvalidParameter` when the one that was named does not take the images."""
        counts: dict[Role, int] = {image.role: 1 for image in images}
        if asked.model_type:
            spec = named(self._engine.catalogue, asked.model_type)
            check_counts(spec, counts)
            return spec
        return choose(self._engine.offered, DRAW, counts, (self._settings.imagegenx_model,), params)

    def requests(
        self, request: Request, asked: schema.Task, texts: Sequence[str], images: tuple[ImagePart, ...] = (),
        **more: Any,
    ) -> list[ImageRequest]:
        """The (first) jobs of as many tasks as there are texts; all else they share. `more`: model parameters that were
        asked for. Raises what makes it impossible."""
        who, params, spec = caller(request), asked.all_params(), self.spec(asked, images, more)
        if asked.callback_url:
            fetch.check_url(asked.callback_url, "callback_url", self._settings.fetch)
        output = params.postprocess.output()
        client: dict[str, Any] = {"base": links.base(request, self._settings), "callback": asked.callback_url}
        if params.postprocess.scale > 1:
            client["then"] = self._enlarge(params.postprocess.scale, output)
            output = OutputFormat()
        priority = who.grant(read_priority(asked.priority))
        found = [
            ImageRequest(
                model=spec.name,
                images=images,
                params=schema.model_params(spec, text, params, drawn=not images, **more),
                output=output,
                priority=priority,
                tenant=who.tenant,
                dialect=DIALECT,
                client=client,
            )
            for text in texts
        ]
        for first in found:
            self._check_second(spec, first)
        return found

    def _check_second(self, spec: ModelSpec, first: ImageRequest) -> None:
        """Raise `TooLarge` or `InvalidParameter` now for a second job that would be refused when the first is done."""
        if then := first.client.get("then"):
            spec.check_size(first.frame, first.params, first.output.format)
            made = unseen(*spec.canvas(first.frame, first.params))
            self._engine.catalogue[then["model"]].check_size(
                made, then["params"], then["output"]["format"]
            )

    def _enlarge(self, scale: int, output: OutputFormat) -> dict[str, Any]:
        """What the second job of a task is to be, as plain data."""
        spec = choose(self._engine.offered, ("upscale",), {"image": 1}, ("upscale",))
        return {"model": spec.name, "params": spec.check_params({"scale": scale}), "output": asdict(output)}


def router(engine: Engine, settings: Settings) -> APIRouter:
    """All routes."""
    api = APIRouter(prefix="/api/v1/image", tags=["imagegenx"])
    tasks = Tasks(engine, settings.fetch)
    reader = Reader(engine, settings, tasks)

    async def accept(requests: list[ImageRequest]) -> Response:
        _, (task,) = await tasks.submit(requests)
        thumbnail = tasks.link(task.thumbnail, task.last.request.tenant)
        more = {"estimated_time": tasks.estimate(task), **({"temp_url": thumbnail} if thumbnail else {})}
        return JSONResponse(envelope(task.tell(tasks.link) | more))

    @api.post("/generate", operation_id="imagegenx_generate", summary="Draw an image from words",
              **takes(schema.Generate), **answers())
    async def generate(request: Request) -> Response:
        asked = await reader.body(request, schema.Generate)
        return await accept(reader.requests(request, asked, [asked.text]))

    @api.post("/img2img", operation_id="imagegenx_img2img", summary="Draw an image over another",
              **takes(schema.Img2img), **answers())
    async def img2img(request: Request) -> Response:
        asked = await reader.body(request, schema.Img2img)
        with Watch(request.scope, request.receive):
            image = await reader.picture(request, asked.image_url, "image_url")
        return await accept(reader.requests(request, asked, [asked.text], (image,)))

    @api.post("/inpaint", operation_id="imagegenx_inpaint", summary="Draw anew what a mask covers",
              **takes(schema.Inpaint), **answers())
    async def inpaint(request: Request) -> Response:
        asked = await reader.body(request, schema.Inpaint)
        with Watch(request.scope, request.receive):
            image = await reader.picture(request, asked.image_url, "image_url")
            mask = await reader.picture(request, asked.mask_url, "mask_url", "mask")
        check_mask(image, mask)
        return await accept(reader.requests(request, asked, [asked.text], (image, mask)))

    @api.post("/controlnet", operation_id="imagegenx_controlnet", summary="Draw along lines, depth or a pose",
              **takes(schema.Control), **answers())
    async def controlnet(request: Request) -> Response:
        asked = await reader.body(request, schema.Control)
        if not asked.control_image_url and (asked.control_type != "canny" or not asked.image_url):
            raise InvalidParameter(
                f"control_type '{asked.control_type}' needs a control_image_url" if asked.control_type != "canny"
                else "canny needs an image_url to find edges in, or a control_image_url",
                parameter="control_image_url",
            )
        with Watch(request.scope, request.receive):
            if asked.control_image_url:
                image = await reader.picture(request, asked.control_image_url, "control_image_url", "control")
            else:
                image = await reader.picture(request, asked.image_url or "", "image_url")
        more = {"control_type": asked.control_type} | ({} if asked.control_image_url else {"strength": 1.0})
        return await accept(reader.requests(request, asked, [asked.text], (image,), **more))

    @api.post("/batch-generate", operation_id="imagegenx_batch", summary="Draw an image for each of many texts",
              **takes(schema.Batch), **answers())
    async def batch_generate(request: Request) -> Response:
        asked = await reader.body(request, schema.Batch)
        total = len(asked.texts)
        series, made = await tasks.submit(reader.requests(request, asked, asked.texts), batch=True)
        batch = f"batch{series}00"
        return JSONResponse(envelope({
            "batch_task_id": batch, "task_ids": [task.id for task in made], "total": total,
            "query_url": f"/api/v1/image/batch-task/{batch}",
        }))  # fmt: skip

    @api.get("/task/{id}", operation_id="imagegenx_task", summary="A task as it is now", **answers())
    async def task(request: Request, id: Id) -> Response:
        return JSONResponse(task_envelope(await tasks.find(id, caller(request).tenant), tasks.link))

    @api.delete("/task/{id}", operation_id="imagegenx_cancel", summary="Cancel a task", **answers("", SUBMITS))
    @api.post("/task/{id}/cancel", operation_id="imagegenx_cancel_post", summary="Cancel a task",
              **answers("", SUBMITS))
    async def cancel(request: Request, id: Id) -> Response:
        found = await tasks.cancel(await tasks.find(id, caller(request).tenant))
        return JSONResponse(task_envelope(found, tasks.link))

    @api.get("/batch-task/{id}", operation_id="imagegenx_batch_task", summary="A batch as it is now", **answers())
    async def batch_task(request: Request, id: Id) -> Response:
        return JSONResponse(envelope(batch_json(id, await tasks.batch(id, caller(request).tenant), tasks.link)))

    @api.delete("/batch-task/{id}", operation_id="imagegenx_cancel_batch", summary="Cancel a batch",
                **answers("", SUBMITS))
    @api.post("/batch-task/{id}/cancel", operation_id="imagegenx_cancel_batch_post", summary="Cancel a batch",
              **answers("", SUBMITS))
    async def cancel_batch(request: Request, id: Id) -> Response:
        found = await tasks.batch(id, caller(request).tenant)
        return JSONResponse(envelope(batch_json(id, [await tasks.cancel(one) for one in found], tasks.link)))

    @api.get("/batch-task/{id}/download", operation_id="imagegenx_zip", summary="A batch's images as a ZIP file",
             **answers("application/zip"))
    async def download(request: Request, id: Id) -> Response:
        found = [task for task in await tasks.batch(id, caller(request).tenant) if task.word == "success"]
        if not found:
            raise JobNotFound(f"no image of batch {id} is ready")
        headers = {"content-disposition": f'attachment; filename="{id}.zip"'}
        return StreamingResponse(_zip(tasks, found), headers=headers, media_type="application/zip")

    @api.get("/file/{day}/{name}", operation_id="imagegenx_file", summary="A task's image",
             **answers("image/*", WAITS, SERVES_FILE, SIGNED))
    async def file(request: Request, day: str, name: str) -> Response:
        match = FILE_NAME.fullmatch(name)
        if match is None:
            raise JobNotFound("there is no image of that name")
        found = await tasks.find(match[1], caller(request).tenant)
        body = await tasks.result(found)
        if f"{day}/{name}" != found.object_name():
            raise JobNotFound("there is no image of that name")
        return await send_result(request, body, found.id)

    whole = APIRouter()
    whole.include_router(api)

    @whole.get("/temp/{name}", tags=["imagegenx"], operation_id="imagegenx_thumbnail",
               summary="A thumbnail of a task's image", **answers("image/webp", SUBMITS, WAITS, READS_FILE, SIGNED))
    async def thumbnail(request: Request, name: str) -> Response:
        match = THUMB_NAME.fullmatch(name)
        if match is None:
            raise JobNotFound("there is no thumbnail of that name")
        found = await tasks.find(match[1], caller(request).tenant)
        body = await tasks.result(found)
        job, result = found.last.id, found.last.result
        assert result is not None and isinstance(result.data, str)

        async def make() -> bytes:
            _, small = await engine.run(_thumbnail(engine, found, await body.read(), result.width, result.height))
            return bytes(await small.read())

        with Watch(request.scope, request.receive):
            data = await engine.thumbnails.get(job, result.data, lambda: charge(request.scope), make)
        headers = {"cache-control": "private, immutable, max-age=3600"}
        return Response(data, headers=headers, media_type="image/webp")

    return whole


def _thumbnail(engine: Engine, task: Task, data: Data, width: int, height: int) -> ImageRequest:
    shrink = min(1.0, THUMBNAIL / max(width, height))
    size = {"width": max(1, round(width * shrink)), "height": max(1, round(height * shrink))}
    return ImageRequest(
        model="resize",
        images=(read_image(data, max_pixels=width * height),),
        params=engine.catalogue["resize"].check_params(size),
        output=OutputFormat("webp", 80),
        priority=task.last.request.priority,
        tenant=task.last.request.tenant,
        deadline=30.0,
        durable=False,
        dialect="imagegenx-thumbnail",
    )


class _Pieces(io.RawIOBase):
    """A file that can only be written; what has been written is taken piece by piece."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._pieces.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        pieces, self._pieces = self._pieces, []
        return b"".join(pieces)


async def _zip(tasks: Tasks, found: Sequence[Task]) -> AsyncIterator[bytes]:
    """The tasks' images, uncompressed (they are already), one after the other. One that retention took is left out."""
    pieces = _Pieces()
    with zipfile.ZipFile(pieces, "w", zipfile.ZIP_STORED) as archive:
        for task in found:
            try:
                data = await (await tasks.result(task)).read()
            except ImagePoolError:
                continue
            about = zipfile.ZipInfo(task.object_name().partition("/")[2], time.localtime()[:6])
            about.file_size = len(data)
            with archive.open(about, "w") as file:
                for piece in pieces_of([data]):
                    file.write(piece)
                    yield pieces.take()
    yield pieces.take()

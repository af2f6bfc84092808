"""Where a request of IOPaint's or the gateway's clients is admitted, its images read, its job run while they wait."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from starlette.requests import Request

from api.answers import held
from api.auth import Caller, caller
from api.images import read_image
from api.iopaint_images import read_part
from api.iopaint_schema import Body, read_body
from api.limits import content_length, file_limit
from api.pictures import Picture
from api.run import Watch
from core.errors import TooLarge, UnknownModel
from core.job import Job
from core.model import ModelSpec
from core.request import ImagePart, ImageRequest, OutputFormat, Role
from core.settings import Settings
from engine.engine import Engine
from engine.results import ResultBody

PNG = OutputFormat("png")
SHORT = 64 << 10  # bytes of a body that holds names alone
FIRST_CHOICE = ("lama", "inpaint")
INPAINT = "inpaint"


class Models:
    """The inpainting models, and which of them each tenant has chosen: for the requests that come after that."""

    def __init__(self, engine: Engine) -> None:
        self._specs = {spec.name: spec for spec in engine.catalogue if spec.task == INPAINT and spec.needs_mask}
        self._first = next((name for name in (*FIRST_CHOICE, *self._specs) if name in self._specs), None)
        self._chosen: dict[str, str] = {}

    def all(self) -> list[ModelSpec]:
        """All of them."""
        return list(self._specs.values())

    def of(self, tenant: str) -> ModelSpec:
        """The model in use. Raises `UnknownModel` when this server offers none."""
        name = self._chosen.get(tenant, self._first)
        if name is None:
            raise UnknownModel("this server offers no inpainting model; its operator chooses them (--models)")
        return self._specs[name]

    def choose(self, tenant: str, name: str) -> ModelSpec:
        """Use that one from now on. Raises `UnknownModel`, and then nothing has changed."""
        if name not in self._specs:
            there = ", ".join(self._specs) or "none"
            raise UnknownModel(f"there is no inpainting model of that name; there are: {there}")
        self._chosen[tenant] = name
        return self._specs[name]


class Desk:
    """What every route needs that runs a model."""

    def __init__(self, engine: Engine, settings: Settings, dialect: str) -> None:
        self.models = Models(engine)
        self._engine, self._settings, self._dialect = engine, settings, dialect

    def visit(self, request: Request) -> None:
        """Ask whether there is room for the request, before its body is read. Raises what `Engine.ask` raises."""
        self._engine.ask(content_length(dict(request.scope["headers"])) or 0, caller(request).tenant)

    async def read(self, request: Request, kind: type[Body]) -> Body:
        """The request's JSON. Raises `ValidationFailed` and `TooLarge`."""
        return await read_body(kind, request.stream())

    def watch(self, request: Request) -> Watch:
        """While it is open, a client that goes away cancels what is done for it. The body must have been read."""
        return Watch(request.scope, request.receive)

    async def part(self, request: Request, text: Picture | None, role: Role = "image") -> ImagePart:
        """An image of the body, within this caller's limits. Raises as `read_part`."""
        most = file_limit(caller(request), self._settings)
        return await read_part(text, role, max_bytes=most, max_pixels=self._settings.max_pixels)

    def again(self, result: ResultBody, role: Role = "image") -> ImagePart:
        """A result as an image of the next run."""
        return read_image(held(result), role, max_pixels=self._settings.max_pixels)

    async def run(
        self,
        request: Request,
        model: str,
        images: tuple[ImagePart, ...],
        params: Mapping[str, Any],
        output: OutputFormat = PNG,
        heard: Callable[[float], None] | None = None,
    ) -> tuple[Job, ResultBody]:
        """Run a job that nobody keeps. `params` are checked here. Raises `UnknownModel` and the job's own error."""
        who: Caller = caller(request)
        if model not in self._engine.catalogue:
            raise UnknownModel(f"this needs the model '{model}', which this server's operator has left out (--models)")
        job = ImageRequest(
            model=model,
            images=images,
            params=self._engine.catalogue[model].check_params(params),
            output=output,
            priority=who.priority,
            tenant=who.tenant,
            deadline=self._settings.request_timeout,
            durable=False,
            dialect=self._dialect,
        )
        request.scope["body"].settle()
        return await self._engine.run(job, heard=heard)


async def short_body(request: Request) -> bytes:
    """A body for which no room was asked, because it holds names alone. Raises `TooLarge`."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > SHORT:
            raise TooLarge(f"the request's body has more than {SHORT} bytes; it is to hold names alone")
    return bytes(body)

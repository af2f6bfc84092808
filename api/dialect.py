"""What the inherited dialects share: a route that measures its upload while it comes in, and small shapes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive

from api.answers import PiecesResponse
from api.files import ImageFile
from api.forms import FormRequest
from core.errors import TooLarge
from engine.results import ResultBody

FORM_ROOM = 1 << 20  # bytes of a multipart body that are not the file: boundaries, headers, the other fields


class UploadRoute(APIRoute, ABC):
    """A route with an upload of at most `most` bytes, measured and read in pieces while it comes in."""

    @abstractmethod
    def most(self, request: Request) -> int:
        """The largest file that this request may carry, in bytes."""

    @abstractmethod
    def too_large(self, most: int) -> TooLarge:
        """What a larger one is told."""

    def complaint(self, fault: RequestValidationError) -> Exception:
        """The error that a field which does not fit becomes."""
        return fault

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def measured(request: Request) -> Response:
            most = self.most(request)
            declared = request.headers.get("content-length", "")
            over = declared.isdecimal() and int(declared) > most + FORM_ROOM
            body = Meter(request.receive, -1 if over else most + FORM_ROOM, self.too_large(most))
            try:
                return await handle(FormRequest(request.scope, body))
            except RequestValidationError as fault:
                raise self.complaint(fault) from None

        return measured


class Meter:
    """An ASGI `receive` that lets at most `left` bytes of a body pass. The rest is read but thrown away, so that a
    client which is still sending lives to see its answer; then `refusal` is raised."""

    def __init__(self, receive: Receive, left: int, refusal: TooLarge) -> None:
        self._receive, self._left, self._refusal = receive, left, refusal

    async def __call__(self) -> Message:
        while True:
            message = await self._receive()
            self._left -= len(message.get("body", b""))
            if self._left >= 0 or message["type"] != "http.request":
                return message
            if not message.get("more_body", False):
                raise self._refusal


def image_response(body: ResultBody, job_id: str) -> Response:
    """A result as a download called after its job."""
    name = f"{job_id}.{body.format}"
    if isinstance(body.data, Path):
        return ImageFile(body.data, media_type=body.media_type, filename=name)
    disposition = {"content-disposition": f'attachment; filename="{name}"'}
    return PiecesResponse([body.data], headers=disposition, media_type=body.media_type)

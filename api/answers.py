"""Large answers leave in pieces: nothing of tens of MB is joined, copied or encoded in one go. Until their clients have
read them they are charged to the same budget as bodies, so nobody fills our memory by not reading."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api.base64_pieces import encoded, encoded_length
from core.data import Data
from core.errors import ImagePoolError
from core.turns import Turn
from engine.intake import Charge
from engine.results import ResultBody

WHOLE = 4 << 20    # bytes of an answer that is sent as one
SENT = 256 << 10   # bytes that are sent at a time of a larger one
PLACE = "$image$"  # where an image goes into an answer that is JSON


@dataclass(frozen=True, slots=True)
class Base64:
    """Bytes that are sent as base64."""

    data: Data


Part = Data | Base64


class PiecesResponse(Response):
    """An answer made of parts, one after the other; of known length."""

    def __init__(
        self, parts: Sequence[Part], status_code: int = 200, headers: Mapping[str, str] | None = None,
        media_type: str | None = None,
    ) -> None:  # fmt: skip
        self._parts = parts
        self._size = size = sum(map(_size, parts))
        super().__init__(None, status_code, {**(headers or {}), "content-length": str(size)}, media_type)
        self._whole = size <= WHOLE

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        if self._whole:
            await send(start)
            only = self._parts[0]
            whole = only if len(self._parts) == 1 and isinstance(only, bytes) else b"".join(pieces_of(self._parts))
            await send({"type": "http.response.body", "body": whole})
            return
        with owed(scope, self._size):
            await send(start)
            await send_pieces(self._parts, send)


def owed(scope: Scope, size: int) -> AbstractContextManager[object]:
    """Inside this block an answer of so many bytes is charged to whom it is sent. Raises `Overloaded` when that one, or
    all together, have too much on its way."""
    if (account := scope.get("owing")) is None:
        return nullcontext()
    charge: Charge = account()
    try:
        charge.add(size)
    except ImagePoolError:
        charge.close()
        raise
    return charge


async def send_pieces(parts: Sequence[Part], send: Send) -> None:
    """Send parts as the body of an answer that has begun."""
    turn = Turn()
    for piece in pieces_of(parts):
        await send({"type": "http.response.body", "body": piece, "more_body": True})
        await turn.over()
    await send({"type": "http.response.body", "body": b""})


def held(result: ResultBody) -> Data:
    """The bytes of a result that nobody keeps."""
    assert not isinstance(result.data, Path)
    return result.data


def image_response(result: ResultBody, headers: Mapping[str, str] | None = None) -> PiecesResponse:
    """A result that nobody keeps, as it is."""
    return PiecesResponse([held(result)], headers=headers, media_type=result.media_type)


def base64_response(result: ResultBody, headers: Mapping[str, str] | None = None) -> PiecesResponse:
    """A result that nobody keeps, as base64 text."""
    return PiecesResponse([Base64(held(result))], headers=headers, media_type="text/plain")


def _size(part: Part) -> int:
    return encoded_length(len(part.data)) if isinstance(part, Base64) else len(part)


def pieces_of(parts: Sequence[Part]) -> Iterator[bytes]:
    """The bytes of all parts, piece by piece."""
    for part in parts:
        if isinstance(part, Base64):
            yield from encoded(part.data)
        elif isinstance(part, bytes) and len(part) <= SENT:
            yield part
        else:
            with memoryview(part) as view:
                for at in range(0, len(view), SENT):
                    yield bytes(view[at : at + SENT])


def with_images(text: bytes, images: Sequence[Data]) -> list[Part]:
    """JSON text in which `PLACE` stands for each of the images in turn, as parts."""
    first, *others = text.split(orjson.dumps(PLACE)[1:-1])
    assert len(others) == len(images)
    parts: list[Part] = [first]
    for image, after in zip(images, others, strict=True):
        parts += [Base64(image), after]
    return parts


def json_with_images(value: Any, images: Sequence[Data]) -> PiecesResponse:
    """An answer as JSON, in which `PLACE` stands for each of the images in turn."""
    return PiecesResponse(with_images(orjson.dumps(value), images), media_type="application/json")

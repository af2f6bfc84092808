"""`POST /run/{model}`: one image in, one image out. The hot path: no framework, no copy but into shared memory.

The body is the encoded image and streams, as it arrives, into the memory that the worker will read. Options are in the
query. Nothing is stored; a client that goes away cancels its job at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import urllib.parse
from collections.abc import Callable, Sequence
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive, Scope, Send

from api.answers import WHOLE, owed, send_pieces
from api.auth import Caller
from api.errors import MethodNotAllowed
from api.limits import GONE, Body, content_length, file_limit, too_large, whole
from api.options import Options, read_options
from api.submission import Submission, media_type, read_form, read_parts, read_query
from core.data import Data
from core.errors import BadRequest, UnsupportedEncoding
from core.header import read_header
from core.job import Job
from core.model import ModelSpec
from core.request import ImagePart, ImageRequest, Priority
from core.settings import Settings
from core.turns import copied
from engine.engine import Engine
from engine.landing import Landing
from engine.permit import Permit
from engine.results import Loan

PREFIX = "/run/"
MOST_TOLD = 1024  # bytes of a header


class Run:
    """An ASGI application for the paths under `/run/`."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine, self._settings = engine, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "POST":
            raise MethodNotAllowed("/run/{model} takes POST with the image as its body", allow="POST")
        spec = self._engine.catalogue[scope["path"].removeprefix(PREFIX)]
        headers = dict(scope["headers"])
        kind = media_type(headers.get(b"content-type", b"").decode("latin-1"))
        if kind.startswith("image/") or kind == "application/octet-stream" or not kind:
            job, loan = await self._bare(spec, scope, headers, receive)
        elif kind == "multipart/form-data":
            job, loan = await self._form(spec, scope, receive)
        else:
            raise UnsupportedEncoding("send the image itself as image/*, or multipart/form-data with image and mask")
        start = {"type": "http.response.start", "status": 200, "headers": _headers(job, loan)}
        if loan.size > WHOLE:
            await self._send_large(start, loan, scope, send)
            return
        with loan:
            await send(start)
            ours = GONE in scope.get("extensions", {})  # our protocol has sent or copied it when `send` returns
            await send({"type": "http.response.body", "body": loan.data if ours else bytes(loan.data)})

    async def _send_large(self, start: Message, loan: Loan, scope: Scope, send: Send) -> None:
        """Where others need the shared memory, a client that reads slowly does not keep it."""
        copy: Data | None = None
        with contextlib.ExitStack() as stack:
            with loan:
                stack.enter_context(owed(scope, loan.size))
                if not self._engine.arena.plenty:
                    copy = await copied(loan.data)
                else:
                    await send(start)
                    await send_pieces([loan.data], send)
            if copy is not None:
                await send(start)
                await send_pieces([copy], send)

    async def _bare(
        self, spec: ModelSpec, scope: Scope, headers: dict[bytes, bytes], receive: Receive
    ) -> tuple[Job, Loan]:
        """The body is the image."""
        who: Caller = scope["caller"]
        fields = Submission()
        read_query(fields, scope["query_string"])
        options = read_options(spec, who, fields.fields)
        if spec.needs_mask:
            raise BadRequest(f"model '{spec.name}' needs a mask: send multipart/form-data with image and mask")
        most = file_limit(who, self._settings)
        length = content_length(headers)
        if length is not None and length > most:
            raise too_large(most)
        self._ask(length, who, options.priority)
        body: Body = scope["body"]
        with self._engine.land(most if length is None else length) as landing:
            if length is None:
                await body.gather(landing, most)
            else:
                await body.fill(landing, length)
            permit = self._admit(body.size, who, landing, options.priority)
        with permit:
            return await self._image(spec, scope, options, permit, body.size, receive)

    async def _form(self, spec: ModelSpec, scope: Scope, receive: Receive) -> tuple[Job, Loan]:
        """The body is a form with `image`, perhaps `mask`, and options."""
        who: Caller = scope["caller"]
        found = Submission()
        read_query(found, scope["query_string"])
        self._ask(content_length(dict(scope["headers"])), who, who.ceiling)
        most = file_limit(who, self._settings)
        await read_form(found, Headers(scope=scope), Request(scope, whole(receive)).stream(), most)
        options = read_options(spec, who, found.fields)
        parts = await read_parts(spec, found, most, self._settings.max_pixels)
        return await self._run(spec, who, options, parts, None, scope, receive)

    def _ask(self, length: int | None, who: Caller, priority: Priority) -> None:
        """Whether a body of that length may come; one of unknown length where any may. `priority`: the most urgent that
        the request may turn out to have."""
        if length == 0:
            raise _empty()
        self._engine.ask(length or 0, who.tenant, urgent=priority is Priority.URGENT)

    def _admit(self, size: int, who: Caller, landing: Landing, priority: Priority) -> Permit:
        if size == 0:
            raise _empty()
        return self._engine.admit(size, who.tenant, landing=landing, urgent=priority is Priority.URGENT)

    async def _image(
        self, spec: ModelSpec, scope: Scope, options: Options, permit: Permit, size: int, receive: Receive
    ) -> tuple[Job, Loan]:
        header = read_header(permit.buffer, max_pixels=self._settings.max_pixels)
        part = ImagePart("image", permit.span, header, size)
        return await self._run(spec, scope["caller"], options, (part,), permit, scope, receive)

    async def _run(
        self,
        spec: ModelSpec,
        who: Caller,
        options: Options,
        parts: tuple[ImagePart, ...],
        permit: Permit | None,
        scope: Scope,
        receive: Receive,
    ) -> tuple[Job, Loan]:
        request = ImageRequest(
            model=spec.name,
            images=parts,
            params=options.params,
            output=options.output,
            priority=options.priority,
            tenant=who.tenant,
            deadline=options.deadline or self._settings.request_timeout,
            durable=False,
            dialect="run",
        )
        scope["body"].settle()
        with Watch(scope, receive):
            return await self._engine.lend(request, permit)


class Watch:
    """While this block is open, a client that goes away cancels the task in it; outside, that is a `ClientDisconnect`.

    Our protocol calls back by itself. Another server's `receive` must be awaited by a task, which costs time.
    """

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self._watch: Callable[[Callable[[], None] | None], None] | None = scope.get("extensions", {}).get(GONE)
        self._receive = receive
        self._listener: asyncio.Task[Any] | None = None
        self._gone = False

    def __enter__(self) -> None:
        self._task = asyncio.current_task()
        if self._watch is not None:
            self._watch(self._on_gone)
        else:
            self._listener = asyncio.ensure_future(self._receive())
            self._listener.add_done_callback(self._on_heard)

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, trace: object) -> None:
        if self._watch is not None:
            self._watch(None)
        if self._listener is not None:
            self._listener.remove_done_callback(self._on_heard)
            self._listener.cancel()
        if self._gone and self._task is not None:
            self._task.uncancel()
            if kind is asyncio.CancelledError:
                raise ClientDisconnect from None

    def _on_gone(self) -> None:
        if self._task is not None and not self._gone:
            self._gone = True
            self._task.cancel()

    def _on_heard(self, listener: asyncio.Task[Any]) -> None:
        if not listener.cancelled():
            listener.exception()
            self._on_gone()


def _empty() -> BadRequest:
    return BadRequest("the body is empty; send the encoded image")


def _headers(job: Job, loan: Loan) -> list[tuple[bytes, bytes]]:
    result = job.result
    assert result is not None
    timings = result.timings
    told = ", ".join(f"{stage};dur={seconds * 1000:.2f}" for stage, seconds in timings.items())
    headers = [
        (b"content-type", loan.media_type.encode()),
        (b"content-length", b"%d" % loan.size),
        (b"x-job-id", job.id.encode()),
        (b"x-device", result.device.encode()),
        (b"x-batch-size", b"%d" % result.batch_size),
        (b"x-compute-ms", b"%.2f" % (timings.get("compute", 0.0) * 1000)),
        (b"server-timing", told.encode()),
    ]
    if ignored := result.facts.get("ignored"):
        headers.append((b"x-ignored", _quoted(ignored)))
    return headers


def _quoted(words: Sequence[str]) -> bytes:
    """Words percent-encoded, as many of the first ones as `MOST_TOLD` bytes hold."""
    told = urllib.parse.quote(words[0])[:MOST_TOLD]
    for word in words[1:]:
        if len(longer := f"{told}, {urllib.parse.quote(word)}") > MOST_TOLD:
            break
        told = longer
    return told.encode()

"""The door every request passes: who it is, how often it asks, how large and how slow its body may be.

Pure ASGI, one object for all of it, because each layer costs time on the hot path. What the door refuses, it refuses
before the body is read. It gives every answer `X-Request-ID` and `X-Response-Time`, and every error its dress.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.auth import Caller, Keys, presented_key
from api.errors import RequestTimeout, Wardrobe
from api.ratelimit import Header, RateLimiter
from core.errors import BadRequest, ImagePoolError, InternalError, RateLimited, TooLarge, UnsupportedEncoding
from core.settings import Settings
from engine.metrics import Metrics

log = logging.getLogger("imagepool.http")
MIN_RATE = 512  # bytes per second that a body must bring on average after its first silence
ENVELOPE = 64 << 10  # bytes a form or JSON may have beside the file itself
PUBLIC = frozenset({"/", "/health", "/ready", "/metrics", "/docs", "/openapi.json", "/favicon.ico"})
PUBLIC_UNDER = ("/health/", "/v2/health/", "/static/")
LORA_UPLOAD = "/api/v1/lora/upload"  # the one body that is no image
ID_CHARACTERS = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
NO_SNIFF = (b"x-content-type-options", b"nosniff")
GONE = "imagepool.gone"  # our protocol's extension of the scope: calls back when the client goes away
CLIENT_GONE = 499  # in the metrics only: nobody was there to be answered


def request_id(given: bytes | None) -> str:
    """The client's own id when it is 1-128 harmless characters, else a new one."""
    if given and len(given) <= 128 and ID_CHARACTERS.issuperset(given):
        return given.decode()
    return os.urandom(12).hex()


def route(scope: Scope) -> str:
    """The template of the path a request went to, for metrics: never the path itself."""
    found = scope.get("route")
    if found is None:
        return "/run/{model}" if scope["path"].startswith("/run/") else "none"
    return str(found.path)


def file_limit(caller: Caller, settings: Settings) -> int:
    """The most bytes one image of this caller may have."""
    tier = settings.tiers.get(caller.tier)
    return settings.max_body if tier is None or tier.max_file is None else min(tier.max_file, settings.max_body)


def whole(receive: Receive) -> Receive:
    """A `receive` for those who need chunks as bytes; our protocol gives views of what it read."""

    async def as_bytes() -> Message:
        message = await receive()
        if "body" in message:
            message["body"] = bytes(message["body"])
        return message

    return as_bytes


class Body:
    """A `receive` that counts: `TooLarge` beyond the limit, `RequestTimeout` after a silence or for a trickle."""

    __slots__ = ("_began", "_clock", "_complete", "_receive", "_silence", "limit", "size")

    def __init__(self, receive: Receive, silence: float, clock: Callable[[], float]) -> None:
        self._receive, self._silence, self._clock = receive, silence, clock
        self._began, self._complete = clock(), False
        self.limit = self.size = 0

    async def __call__(self) -> Message:
        if self._complete:
            return await self._receive()
        allowance = self._began + self._silence + self.size / MIN_RATE - self._clock()
        try:
            async with asyncio.timeout(min(self._silence, allowance)):
                message = await self._receive()
        except TimeoutError:
            raise RequestTimeout("the request's body did not arrive in time; send it again, faster") from None
        if message["type"] == "http.request":
            self.size += len(message.get("body", b""))
            self._complete = not message.get("more_body", False)
            if self.size > self.limit:
                raise too_large(self.limit)
        return message


def too_large(limit: int) -> TooLarge:
    """The refusal of a body."""
    return TooLarge(f"the request's body has more than {limit} bytes; send a smaller or better compressed image")


class Door:
    """ASGI middleware around everything. Sets `scope["caller"]` and `scope["request_id"]`."""

    def __init__(
        self,
        app: ASGIApp,
        settings: Settings,
        keys: Keys,
        wardrobe: Wardrobe,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.app, self._metrics = app, metrics
        self._settings, self._keys, self._wardrobe, self._clock = settings, keys, wardrobe, clock
        self._rates = RateLimiter(settings.tiers, clock)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began = time.perf_counter()
        headers = dict(scope["headers"])
        scope["request_id"] = name = request_id(headers.get(b"x-request-id") or headers.get(b"x-correlation-id"))
        extra: list[Header] = [(b"x-request-id", name.encode()), NO_SNIFF]
        status = sent = 0

        async def answer(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                took = f"{(time.perf_counter() - began) * 1000:.1f}ms".encode()
                message["headers"] = [*message.get("headers", ()), *extra, (b"x-response-time", took)]
            else:
                sent += len(message.get("body", b""))
            await send(message)

        body = Body(receive, self._settings.body_timeout, self._clock)
        self._metrics.http_in_progress.inc()
        try:
            body.limit = self._enter(scope, headers, extra)
            await self.app(scope, body, answer)
        except ClientDisconnect:
            status = status or CLIENT_GONE
        except Exception as fault:
            if not isinstance(fault, ImagePoolError):
                log.exception("request %s: %s %s raised", name, scope["method"], scope["path"][:200])
                fault = InternalError(f"the server has a defect; tell its operator the request id {name}")
            if not status:
                await self._wardrobe.respond(fault, scope["path"], name)(scope, receive, answer)
        finally:
            self._metrics.http_in_progress.dec()
            took = time.perf_counter() - began
            self._metrics.http(scope["method"], route(scope), status, took, received=body.size, sent=sent)

    def _enter(self, scope: Scope, headers: dict[bytes, bytes], extra: list[Header]) -> int:
        """Let the request in: the most bytes its body may have. Raises what keeps it out."""
        path = scope["path"]
        if path in PUBLIC or path.startswith(PUBLIC_UNDER):
            return 0 if scope["method"] in ("GET", "HEAD") else self._settings.max_body
        scope["caller"] = who = self._keys.caller(presented_key(headers))
        if scope["method"] == "POST":
            self._count(who, extra)
        encoding = headers.get(b"content-encoding", b"identity")
        if encoding.lower() != b"identity":
            raise UnsupportedEncoding("compressed request bodies are not taken; send it without Content-Encoding")
        limit = min(self._settings.max_body, file_limit(who, self._settings) * 4 // 3 + ENVELOPE)
        if path == LORA_UPLOAD:
            limit = self._settings.lora_max + ENVELOPE
        if (length := content_length(headers)) is not None and length > limit:
            raise too_large(limit)
        return limit

    def _count(self, who: Caller, extra: list[Header]) -> None:
        verdict = self._rates.check(who.tenant, who.tier)
        if verdict is None:
            return
        extra += verdict.headers
        if verdict.retry_after:
            raise RateLimited(f"the tier '{who.tier}' allows no more requests now", retry_after=verdict.retry_after)


def content_length(headers: dict[bytes, bytes]) -> int | None:
    """The announced length of the body; None when it is not announced. Raises `BadRequest` when it is no number."""
    text = headers.get(b"content-length")
    if text is None:
        return None
    if not text.isdigit() or len(text) > 18:
        raise BadRequest("the Content-Length header is not a number")
    return int(text)


"""The door every request passes: who it is, how often it asks, how large and how slow its body may be.

Pure ASGI, one object for all of it, because each layer costs time on the hot path. What the door refuses, it refuses
before the body is read. It gives every answer `X-Request-ID` and `X-Response-Time`, and every error its dress.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.access import AccessLog
from api.auth import Caller, Keys, presented_key
from api.errors import HostNotAllowed, LinkInvalid, OriginNotAllowed, RequestTimeout, Wardrobe
from api.hosts import Browsers
from api.ratelimit import Header, RateLimiter
from core.errors import (
    BadRequest,
    Draining,
    ImagePoolError,
    InternalError,
    RateLimited,
    TooLarge,
    Unauthorised,
    UnsupportedEncoding,
)
from core.settings import Settings
from core.signing import Signer, is_signed
from core.trace import CURRENT, Trace
from engine.intake import Charge, Intake, network
from engine.metrics import Metrics

log = logging.getLogger("imagepool.http")
MIN_RATE = 1024  # bytes per second that a body must bring on average in each window of `body_timeout`
PIECE = 1 << 20  # bytes that are received before others have their turn
ENVELOPE = 64 << 10  # bytes a form or JSON may have beside the file itself
PUBLIC = frozenset({"/", "/health", "/ready", "/metrics", "/docs", "/openapi.json", "/favicon.ico"})
PUBLIC_UNDER = ("/health/", "/v2/health/", "/static/", "/docs/")
HEALTH = frozenset({"/health", "/ready"})
HEALTH_UNDER = ("/health/", "/v2/health/")
PAGE_TALK = "/socket.io/"  # what a page's POSTs say keeps its session alive and begins no work
LORA_UPLOAD = "/api/v1/lora/upload"  # the one body that is no image
ID_CHARACTERS = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
NO_SNIFF = (b"x-content-type-options", b"nosniff")
GONE = "imagepool.gone"  # our protocol's extension of the scope: calls back when the client goes away
TAKE = "imagepool.take"  # another: what has come of the body goes into a buffer
CUT_OFF = Draining("the server was stopped before this was done; send the request again", retry_after=10.0)
NO_SOCKET = b"no web socket is opened here for this request; ask for another address, or with a key that is valid"
CLIENT_GONE = 499  # in the metrics only: nobody was there to be answered


def request_id(given: bytes | None) -> str:
    """The client's own id when it is 1-128 harmless characters, else a new one."""
    if given and len(given) <= 128 and ID_CHARACTERS.issuperset(given):
        return given.decode()
    return os.urandom(12).hex()


def given_id(headers: Mapping[bytes, bytes]) -> bytes | None:
    """What a client, or Google's load balancer in front of it, calls the request."""
    for name in (b"x-request-id", b"x-correlation-id"):
        if found := headers.get(name):
            return found
    return headers.get(b"x-cloud-trace-context", b"").partition(b"/")[0]


def route(scope: Scope) -> str:
    """The template of the path a request went to, for metrics: never the path itself."""
    found = scope.get("route")
    if found is None:
        return "/run/{model}" if scope["path"].startswith("/run/") else "none"
    return str(found.path)


def is_public(path: str) -> bool:
    """Whether everybody may look at this path, without a key."""
    return path in PUBLIC or path.startswith(PUBLIC_UNDER)


def is_health(path: str) -> bool:
    """Whether any Host and Origin may ask here."""
    return path in HEALTH or path.startswith(HEALTH_UNDER)


def file_limit(caller: Caller, settings: Settings) -> int:
    """The most bytes one image of this caller may have."""
    tier = settings.tiers.get(caller.tier)
    return settings.max_body if tier is None or tier.max_file is None else min(tier.max_file, settings.max_body)


def charge(scope: Scope) -> None:
    """Count a request that is no POST, and begins work all the same, against its tenant's rates. Raises
    `RateLimited`."""
    count: Callable[[], None] | None = scope.get("charge")
    if count is not None:
        count()


def whole(receive: Receive) -> Receive:
    """A `receive` for those who need chunks as bytes; our protocol gives views of what it read."""

    async def as_bytes() -> Message:
        message = await receive()
        if "body" in message:
            message["body"] = bytes(message["body"])
        return message

    return as_bytes


def _nothing(_: memoryview) -> int:
    return 0


class Room(Protocol):
    """Where a body is received: `buffer` has as many bytes as there is room for so far."""

    buffer: memoryview

    async def grow(self) -> memoryview:
        """The buffer made longer, with what it held at its beginning; up to the length that the room was made for."""


class Body:
    """A `receive` that counts: `TooLarge` beyond the limit, `Overloaded` when too much is on its way at once,
    `RequestTimeout` for a client that brings less than `MIN_RATE` in any `window` of seconds spent waiting for it.

    `take(buffer)` is our protocol's short way: it writes what is there into the buffer and says how many bytes.
    `payer()` gives the account that the bytes are charged to, asked once they come.
    """

    __slots__ = (
        "_charge", "_clock", "_complete", "_mark", "_payer", "_receive", "_take", "_waited", "_window", "limit", "size",
    )  # fmt: skip

    def __init__(
        self,
        receive: Receive,
        window: float,
        clock: Callable[[], float],
        take: Callable[[memoryview], int] = _nothing,
        payer: Callable[[], Charge] | None = None,
    ) -> None:
        self._receive, self._window, self._clock, self._take = receive, window, clock, take
        self._payer = payer
        self._charge: Charge | None = None
        self._complete = False
        self._waited = 0.0  # seconds of this window that passed
        self._mark = 0  # the size when it began
        self.limit = self.size = 0

    async def __call__(self) -> Message:
        if self._complete:
            return await self._receive()
        patience, began = self._patience(), self._clock()
        try:
            async with asyncio.timeout(patience):
                message = await self._receive()
        except TimeoutError:
            raise _too_slow() from None
        self._waited += self._clock() - began
        if message["type"] == "http.request":
            self._arrived(len(message.get("body", b"")))
            self._complete = not message.get("more_body", False)
            if self.size > self.limit:
                raise too_large(self.limit)
        return message

    async def fill(self, room: Room, length: int) -> None:
        """Receive the whole body, of the length that was announced. Raises `BadRequest` when it is of another one,
        `ClientDisconnect`, and what a call raises."""
        buffer, quiet = room.buffer, PIECE
        while not self._complete:
            if self.size == len(buffer) < length:
                buffer = await room.grow()
            if taken := self._take(buffer[self.size :]):
                self._arrived(taken)
                self._complete = self.size == length
                if self.size > quiet:
                    quiet = self.size + PIECE
                    await asyncio.sleep(0)
                continue
            begin, piece = self.size, await self._piece()
            self._check_length(length)
            while self.size > len(buffer):
                buffer = await room.grow()
            buffer[begin : self.size] = piece

    async def gather(self, room: Room, most: int) -> None:
        """Receive the whole body, when its length was not announced. Raises as `fill`, and `TooLarge` beyond `most`."""
        buffer = room.buffer
        while not self._complete:
            begin, piece = self.size, await self._piece()
            if self.size > most:
                raise too_large(most)
            while self.size > len(buffer):
                buffer = await room.grow()
            buffer[begin : self.size] = piece

    def settle(self) -> None:
        """What came is counted elsewhere from now on, or gone."""
        if self._charge is not None:
            self._charge.close()

    def _check_length(self, announced: int) -> None:
        if self.size > announced or (self._complete and self.size < announced):
            raise BadRequest("the body is not as long as its Content-Length says")

    async def _piece(self) -> bytes:
        message = await self()
        if message["type"] != "http.request":
            raise ClientDisconnect
        piece: bytes = message.get("body", b"")
        return piece

    def _patience(self) -> float:
        """Seconds that the next bytes may take: to the end of this window, or, where enough came in it, of the next."""
        enough = self.size - self._mark >= MIN_RATE * self._window
        if self._waited >= self._window:
            if not enough:
                raise _too_slow()
            self._mark, self._waited, enough = self.size, 0.0, False
        return self._window * (1 + enough) - self._waited

    def _arrived(self, size: int) -> None:
        self.size += size
        if self._charge is None:
            if self._payer is None or not size:
                return
            self._charge = self._payer()
        self._charge.add(size)


async def _say_no(send: Send) -> None:
    """Refuse a web socket with a sentence."""
    head = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", b"%d" % len(NO_SOCKET))]
    await send({"type": "websocket.http.response.start", "status": 403, "headers": head})
    await send({"type": "websocket.http.response.body", "body": NO_SOCKET})


def _too_slow() -> RequestTimeout:
    return RequestTimeout("the request's body did not arrive in time; send it again, faster")


def too_large(limit: int) -> TooLarge:
    """The refusal of a body."""
    return TooLarge(f"the request's body has more than {limit} bytes; send a smaller or better compressed image")


class Door:
    """ASGI middleware around everything. Sets `scope["caller"]`, `scope["charge"]`, `scope["request_id"]`,
    `scope["body"]` and `scope["owing"]`, which makes the account of an answer."""

    def __init__(
        self,
        app: ASGIApp,
        settings: Settings,
        keys: Keys,
        wardrobe: Wardrobe,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
        signer: Signer | None = None,
        leaving: Callable[[], bool] = lambda: False,
        intake: Intake | None = None,
    ) -> None:
        self.app, self._metrics, self._signer, self._leaving = app, metrics, signer, leaving
        self._intake = intake or Intake(settings.body_bytes)
        self._lora_intake = Intake(max(1, settings.lora_max))  # one may be larger than all else together
        self._settings, self._keys, self._wardrobe, self._clock = settings, keys, wardrobe, clock
        self._access = AccessLog(settings.access_log, clock)
        self._rates, self._browsers = RateLimiter(settings.tiers, clock), Browsers(settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await self._listen(scope, receive, send)
            else:
                await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        headers = dict(scope["headers"])
        scope["request_id"] = name = request_id(given_id(headers))
        scope["trace"] = trace = Trace(name, _caller(scope, headers))
        CURRENT.set(trace)
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

        take = scope.get("extensions", {}).get(TAKE, _nothing)
        scope["body"] = body = Body(
            receive, self._settings.body_timeout, self._clock, take, partial(self._charge, scope)
        )
        scope["owing"] = partial(self._charge, scope, leaving=True)
        self._metrics.http_in_progress += 1
        try:
            body.limit = self._enter(scope, headers, extra)
            await self.app(scope, body, answer)
        except ClientDisconnect:
            status = status or CLIENT_GONE
        except asyncio.CancelledError:  # the server's word, when it goes away and this has not ended in time
            if not self._leaving():
                raise
            if not status:
                await self._wardrobe.respond(CUT_OFF, scope["path"], name)(scope, receive, answer)
        except Exception as fault:
            if not isinstance(fault, ImagePoolError):
                log.exception("request %s: %s %s raised", name, scope["method"], scope["path"][:200])
                fault = InternalError(f"the server has a defect; tell its operator the request id {name}")
            if not status:
                await self._wardrobe.respond(fault, scope["path"], name)(scope, receive, answer)
        finally:
            body.settle()
            self._metrics.http_in_progress -= 1
            took = time.perf_counter() - began
            where = route(scope)
            self._metrics.http(scope["method"], where, status, took, received=body.size, sent=sent)
            if status >= self._access.least:
                self._access.note(scope, where, status, took, body.size, sent)

    def _charge(self, scope: Scope, *, leaving: bool = False) -> Charge:
        """The account that a request's bytes are charged to, or, `leaving`, those of its answer."""
        client, who = scope.get("client"), scope.get("caller")
        intake = self._lora_intake if scope["path"] == LORA_UPLOAD else self._intake
        return intake.charge(network(client[0]) if client else "", who.tenant if who else "", leaving=leaving)

    async def _listen(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A web socket. Its handshake has a line in the access log, as a GET has."""
        began, headers = time.perf_counter(), dict(scope["headers"])
        scope["trace"] = Trace(request_id(given_id(headers)))
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if not status:
                status = message.get("status", 101 if message["type"] == "websocket.accept" else 403)
                if status >= self._access.least:
                    took = time.perf_counter() - began
                    self._access.note({**scope, "method": "GET"}, route(scope), status, took, 0, 0)
                if message["type"] == "websocket.close":
                    await _say_no(send)
                    return
            await send(message)

        if self._may_listen(scope):
            await self.app(scope, receive, answer)
        else:
            await receive()
            await answer({"type": "websocket.close", "code": 1008, "reason": ""})

    def _may_listen(self, scope: Scope) -> bool:
        """Whether a web socket is let in. What is said on it is bounded by the protocol. Its origin always counts:
        browsers let any page open one anywhere."""
        headers = dict(scope["headers"])
        try:
            scope["caller"] = self._keys.caller(presented_key(headers))
            self._browsers.check_origin("GET", headers)
            if self._keys.open:
                self._browsers.check_host(headers)
        except (Unauthorised, OriginNotAllowed, HostNotAllowed):
            return False
        return True

    def _enter(self, scope: Scope, headers: dict[bytes, bytes], extra: list[Header]) -> int:
        """Let the request in: the most bytes its body may have. Raises what keeps it out."""
        path = scope["path"]
        if self._keys.open and not is_health(path):
            self._browsers.check(scope["method"], headers)
        if is_public(path):
            return 0 if scope["method"] in ("GET", "HEAD") else self._settings.max_body
        scope["caller"] = who = self._caller(scope, presented_key(headers))
        scope["charge"] = lambda: self._count(who, scope, extra)
        if scope["method"] == "POST" and path != PAGE_TALK:
            self._count(who, scope, extra)
        encoding = headers.get(b"content-encoding", b"identity")
        if encoding.lower() != b"identity":
            raise UnsupportedEncoding("compressed request bodies are not taken; send it without Content-Encoding")
        limit = min(self._settings.max_body, file_limit(who, self._settings) * 4 // 3 + ENVELOPE)
        if path == LORA_UPLOAD:
            limit = self._settings.lora_max + ENVELOPE
        if (length := content_length(headers)) is not None and length > limit:
            raise too_large(limit)
        return limit

    def _caller(self, scope: Scope, key: bytes | None) -> Caller:
        """By the key, or by the signature of the address, which holds for looking at it alone. Raises `Unauthorised`
        and `LinkInvalid`."""
        signer, query = self._signer, scope.get("query_string", b"")
        if key is not None or signer is None or scope["method"] not in ("GET", "HEAD") or not is_signed(query):
            return self._keys.caller(key)
        tenant = signer.tenant(scope["path"], query, self._keys.tenants)
        if tenant is None:
            raise LinkInvalid("this address does not hold, or not any more; ask for the image again with your API key")
        return Caller(tenant, self._keys.tier(tenant))

    def _count(self, who: Caller, scope: Scope, extra: list[Header]) -> None:
        """Count by the tenant; where nobody has a key, by the address."""
        client = scope.get("client")
        name = network(client[0]) if client and self._keys.open else who.tenant
        verdict = self._rates.check(name, who.tier)
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



def _caller(scope: Scope, headers: Mapping[bytes, bytes]) -> str:
    """By what a request is recognised that was refused and comes back: where from, to where, how long, which key."""
    address = (scope.get("client") or ("",))[0]
    told = (headers.get(name, b"")[:128].decode("latin-1") for name in (b"content-length", b"idempotency-key"))
    return " ".join((address, scope["path"][:128], *told))

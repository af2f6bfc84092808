"""uvicorn's HTTP protocol, hardened: slow and giant headers, floods of tiny chunks, bodies nobody reads any more.

And made quick for images. A large body does not pass through the parser: the application gets views of what was read,
or has it read from the socket to where it wants it (`scope["extensions"]["imagepool.take"]`). An answer of known length
leaves in one system call, so it may lie in shared memory. That a client went away is told by a callback
(`scope["extensions"]["imagepool.gone"]`), which spares the hot path a task per request.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import orjson
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from api.errors import PROBLEM, HeaderTooLarge, RequestTimeout, problem
from api.limits import GONE, TAKE, request_id
from core.errors import BadRequest, ImagePoolError
from core.settings import Settings

MAX_HEAD = 32 << 10   # bytes of request line and headers
MAX_LINES = 100       # headers
MAX_LEFT = 8 << 20    # bytes of a body that are still read after the answer was given
MAX_CHUNKS = 4096     # chunks a body may have before their size counts
MIN_CHUNK = 64        # bytes they must have on average from then on
DIRECT = 32 << 10     # bytes of a body from which on it goes around the parser
SOCKETS = b"/socket.io/"  # where web sockets are served; elsewhere an upgrade is not asked for
MAX_MESSAGE = 1_000_000   # bytes of a message on one

# Where every connection's bytes are put for the moment in which they are handed on. While a head is awaited little is
# read at once: what follows it of a large body is better read to where it is wanted.
HEAD_ROOM = memoryview(bytearray(16 << 10))
BODY_ROOM = memoryview(bytearray(256 << 10))


class Cycle(RequestResponseCycle):
    """One request and its answer. Its body is kept as the chunks that arrived: joining them costs as much as all the
    rest of a request with a large image."""

    chunks: deque[bytes | memoryview]
    waiting: int         # bytes of them
    fd: int              # the socket's, -1 where it must not be written to past the transport (TLS)
    start: Any           # of an answer of known length: its head leaves together with its body

    async def receive(self) -> Any:
        if self.waiting_for_100_continue and not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.waiting_for_100_continue = False
        if not self.chunks and not self.disconnected and not self.response_complete:
            self.flow.resume_reading()
            await self.message_event.wait()
        self.message_event.clear()  # whoever reads on after the last chunk waits for the end of the connection
        if self.disconnected or self.response_complete:
            return {"type": "http.disconnect"}
        chunk = self.chunks.popleft() if self.chunks else b""
        self.waiting -= len(chunk)
        return {"type": "http.request", "body": chunk, "more_body": self.more_body or bool(self.chunks)}

    def take(self, buffer: memoryview) -> int:
        """Move what has come of the body into `buffer`; how many bytes. A chunk that does not fit stays."""
        size = 0
        while self.chunks and size + len(self.chunks[0]) <= len(buffer):
            chunk = self.chunks.popleft()
            buffer[size : size + len(chunk)] = chunk
            size += len(chunk)
        self.waiting -= size
        return size

    async def send(self, message: Any) -> None:
        if self.start is None:
            if message["type"] == "http.response.start" and not self.response_started and _length(message) is not None:
                self.start = message
            else:
                await super().send(message)
            return
        start, self.start = self.start, None
        body = message.get("body", b"")
        if (
            len(body) == _length(start)
            and not message.get("more_body", False)
            and self.scope["method"] != "HEAD"
            and not self.flow.write_paused
            and not self.disconnected
        ):
            self._send_whole(self._head(start), body)
        else:
            message["body"] = bytes(body)
            await super().send(start)
            await super().send(message)

    def _head(self, start: Any) -> bytes:
        lines = [*self.default_headers, *start["headers"]]
        if not self.keep_alive:
            lines.append((b"connection", b"close"))
        head = b"%b%b\r\n" % (STATUS_LINE[start["status"]], b"".join([b"%b: %b\r\n" % line for line in lines]))
        if head.count(b"\n") != len(lines) + 2 or head.count(b"\r") != len(lines) + 2 or b"\0" in head:
            raise RuntimeError("a header of the answer holds a line break or NUL")
        return head

    def _send_whole(self, head: bytes, body: bytes | memoryview) -> None:
        """Write the answer. What the kernel does not take at once is copied: the body may change after this."""
        self.response_started = True
        self.waiting_for_100_continue = False
        sent = 0
        if self.fd >= 0 and not self.transport.get_write_buffer_size() and not self.transport.is_closing():
            try:
                sent = os.writev(self.fd, (head, body))
            except OSError:  # full or broken: the transport finds out which
                sent = 0
        if sent < len(head):
            self.transport.write(head[sent:])
        rest = max(0, sent - len(head))
        if rest < len(body):
            self.transport.write(bytes(memoryview(body)[rest:]))
        self.response_complete = True
        self.message_event.set()
        if not self.keep_alive:
            self.transport.close()
        self.on_response()


def _length(start: Any) -> int | None:
    """What an answer's head says of the length of its body; None when it says nothing, or speaks of the connection."""
    length = None
    for name, value in start.get("headers", ()):
        if name == b"content-length" and value.isdigit():
            length = int(value)
        elif name == b"connection" or name == b"transfer-encoding":
            return None
    return length


class Protocol(HttpToolsProtocol):
    """One connection. States: head (headers are coming), body, answered (the answer went out before the body ended).

    A client that gets its answer early keeps being read for a while, else the kernel would reset the connection and
    the answer would be lost with it.
    """

    header_timeout: ClassVar[float] = 10.0
    cycle: Cycle

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._in_head, self._in_body = True, False
        self._head = self._lines = self._chunks = self._size = self._left = 0
        self._rest = 0  # bytes of a body that goes around the parser
        socket = transport.get_extra_info("socket")
        self._fd = -1 if socket is None or transport.get_extra_info("sslcontext") else socket.fileno()
        self._refusal: ImagePoolError | None = None
        self._on_gone: Callable[[], None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._arm(self._slow_head)

    @property
    def in_head(self) -> bool:
        """Whether a head is awaited or coming."""
        return self._in_head

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)
        if self._on_gone is not None:
            self._on_gone()

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head += len(data)
        elif self._in_body and self.cycle.response_complete:
            self._left += len(data)
            if self._left > MAX_LEFT:
                self.transport.close()
                return
        self._unset_keepalive_if_required()
        beyond = memoryview(data)
        if not self._rest and self._in_head and (end := data.find(b"\r\n\r\n") + 4) > 3:
            super().data_received(data[:end])
            beyond = beyond[end:]
            if self._rest > len(beyond):
                self.flow.pause_reading()  # until the application says where the body goes
        if self._rest:
            beyond = self._read_body(beyond)
        if beyond and not self.transport.is_closing() and not self._upgrading():
            super().data_received(bytes(beyond))
        if self.transport.is_closing() or not self._in_head:
            return
        if self._head > MAX_HEAD:
            self._refuse(HeaderTooLarge(f"the request's headers have more than {MAX_HEAD} bytes"))
        elif self._head and self._timer is None:
            self._arm(self._slow_head)

    # --- the parser calls ---------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {GONE: self._watch}  # type: ignore[dict-item]

    def on_header(self, name: bytes, value: bytes) -> None:
        self._lines += 1
        if self._lines > MAX_LINES:
            self._give_up(HeaderTooLarge(f"the request has more than {MAX_LINES} headers"))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._head > MAX_HEAD and len(self.url) + sum(len(n) + len(v) for n, v in self.headers) > MAX_HEAD:
            self._give_up(HeaderTooLarge(f"the request's headers have more than {MAX_HEAD} bytes"))
        self._disarm()
        self._in_head, self._in_body = False, True
        self._chunks = self._size = self._left = 0
        super().on_headers_complete()
        if self._upgrading():  # uvicorn makes this connection a web socket; there is no cycle
            return
        self.cycle.__class__ = Cycle  # uvicorn leaves no other door open; its task has not begun yet
        self.cycle.chunks, self.cycle.waiting = deque(), 0
        self.cycle.fd, self.cycle.start = self._fd, None
        self.scope["extensions"][TAKE] = partial(self._take_now, self.cycle)  # type: ignore[assignment]
        self._rest = self._announced()

    def _should_upgrade(self) -> bool:
        return self.url.startswith(SOCKETS) and super()._should_upgrade()

    def _upgrading(self) -> bool:
        return bool(self.parser.should_upgrade()) and self._should_upgrade()

    def _announced(self) -> int:
        """The length of the body when it is to go around the parser, else 0."""
        headers = dict(self.headers)
        if b"transfer-encoding" in headers or b"upgrade" in headers:
            return 0
        length = int(headers.get(b"content-length", b"0"))
        return length if length >= DIRECT else 0

    def _read_body(self, data: memoryview) -> memoryview:
        """Take what belongs to the body; what is left belongs to the next request."""
        body, beyond = data[: self._rest], data[self._rest :]
        self._rest -= len(body)
        if body:
            self._take(body)
        if not self._rest and not self.transport.is_closing():
            self._end_body()
        return beyond

    def _end_body(self) -> None:
        self.parser = type(self.parser)(self)  # the one so far still waits for the body
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        self.on_message_complete()

    def _take_now(self, cycle: Cycle, buffer: memoryview) -> int:
        """What is there of the cycle's body goes into `buffer`, without waiting: first what was read, then what the
        socket holds, with no copy between. How many bytes; 0 is no end of the body, only nothing yet."""
        size = cycle.take(buffer)
        if cycle is not self.cycle or cycle.chunks or not self._rest or self._fd < 0 or self.transport.is_closing():
            return size
        try:
            read = os.readv(self._fd, (buffer[size:][: self._rest],))
        except OSError:  # nothing there, or broken: the transport finds out which
            return size
        self._size += read
        self._rest -= read
        if not self._rest:
            self._end_body()
        return size + read

    def on_body(self, body: bytes) -> None:
        if self._rest:  # the beginning of a body, when its head came in pieces
            self._rest -= len(body)
        self._take(body)

    def _take(self, body: bytes | memoryview) -> None:
        self._chunks += 1
        self._size += len(body)
        if self._chunks > MAX_CHUNKS and self._size < self._chunks * MIN_CHUNK:
            self.transport.abort()  # its task hears of a client that went away
            return
        cycle = self.cycle
        if not cycle.response_complete:
            cycle.chunks.append(body)
            cycle.waiting += len(body)
            if cycle.waiting > HIGH_WATER_LIMIT:
                self.flow.pause_reading()
            cycle.message_event.set()

    def on_message_complete(self) -> None:
        if self._upgrading():
            return
        self._in_head, self._in_body = True, False
        self._head = self._lines = 0
        if self.cycle.response_complete:
            self._disarm()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._in_body and not self.transport.is_closing():
            self._unset_keepalive_if_required()
            self._disarm()
            self._arm(self.transport.close)

    # --- and we answer ------------------------------------------------------------------------------------------------

    def send_400_response(self, msg: str) -> None:
        self._refuse(self._refusal or BadRequest("this is no valid HTTP request"))

    def _watch(self, on_gone: Callable[[], None] | None) -> None:
        self._on_gone = on_gone
        if on_gone is not None:
            if self.transport.is_closing():
                on_gone()
            self.flow.resume_reading()  # a connection that is not read does not tell of its end

    def _give_up(self, error: ImagePoolError) -> None:
        self._refusal = error
        raise ValueError(error.message)  # ends the parser, which ends in send_400_response

    def _slow_head(self) -> None:
        self._timer = None
        if not self.transport.is_closing():
            self._refuse(RequestTimeout("the request's headers did not arrive in time"))

    def _refuse(self, error: ImagePoolError) -> None:
        """Answer without the application. Where it still owes an answer, ours would be taken for it: then it gives its
        own and the connection ends, or (its body is broken off) hears that the client went away."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False
            if self._in_body:
                self.transport.close()
            return
        name = request_id(None)
        status, body = problem(error, name)
        content = orjson.dumps(body)
        head = b"content-type: %s\r\ncontent-length: %d\r\nconnection: close\r\nx-request-id: %s\r\n\r\n"
        self.transport.write(
            STATUS_LINE[status] + head % (PROBLEM.encode(), len(content), name.encode()) + content
        )
        self.transport.close()

    def _arm(self, then: Callable[[], None]) -> None:
        self._timer = self.loop.call_later(self.header_timeout, then)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Reader(asyncio.BufferedProtocol):
    """A connection as its transport knows it: what comes is read into a room of known size and handed on."""

    def __init__(self, http: Protocol) -> None:
        self.http = http

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.http.connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.http.connection_lost(exc)

    def get_buffer(self, sizehint: int) -> memoryview:
        return HEAD_ROOM if self.http.in_head else BODY_ROOM

    def buffer_updated(self, nbytes: int) -> None:
        self.http.data_received(bytes(self.get_buffer(-1)[:nbytes]))

    def eof_received(self) -> None:
        self.http.eof_received()

    def pause_writing(self) -> None:
        self.http.pause_writing()

    def resume_writing(self) -> None:
        self.http.resume_writing()


def uvicorn_config(settings: Settings, app: ASGIApp, **more: Any) -> uvicorn.Config:
    """How the server listens: our protocol, no access log, no trust in proxy headers, small web sockets (which the
    application pings)."""
    protocol = type("SettledProtocol", (Protocol,), {"header_timeout": settings.header_timeout})

    def connection(**given: Any) -> Reader:
        return Reader(protocol(**given))

    given: dict[str, Any] = {
        "host": settings.listen_host,
        "port": settings.port,
        "http": connection,
        "ws": "websockets-sansio",
        "ws_max_size": MAX_MESSAGE,
        "ws_ping_interval": None,
        "ws_per_message_deflate": False,
        "lifespan": "on",
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "proxy_headers": False,
        "timeout_keep_alive": 75,
        "timeout_graceful_shutdown": max(1, round(settings.shutdown_grace)),
    }
    return uvicorn.Config(app, **{**given, **more})

"""uvicorn's HTTP protocol, hardened: slow and giant headers, floods of tiny chunks, bodies nobody reads any more,
answers that nobody reads, requests in the body of a request, and requests that come before the answer to the one
before.

The parser is given heads alone, each its own one; bodies go around it. What comes after a request waits unparsed, and
unread beyond a bound, until its answer has gone. That a client went away is told by a callback
(`scope["extensions"]["imagepool.gone"]`), which spares the hot path a task per request.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NoReturn

import httptools
import orjson
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from api.addresses import Proxies
from api.answers import SENT
from api.chunks import Chunks
from api.connections import MOST_AWAY, Connections, Place
from api.cycle import Cycle, Flow, Gentle
from api.errors import PROBLEM, HeaderTooLarge, RequestTimeout, Wardrobe, headers_of, problem
from api.framing import Framing, read_framing, request_line
from api.limits import GONE, MIN_RATE, TAKE, request_id
from api.newcomers import Newcomers
from api.progress import Progress
from api.web_socket import WebSocket
from core.errors import BadRequest, ImagePoolError, Overloaded
from engine.intake import Charge, network

MAX_HEAD = 32 << 10   # bytes of request line and headers
MAX_LINES = 100       # headers
MAX_LEFT = 8 << 20    # bytes of a body that are still read after the answer was given
MAX_CHUNKS = 512      # chunks a body may have before their size counts
MIN_CHUNK = 64        # bytes they must have on average from then on
DIRECT = 32 << 10     # bytes of a body from which on the application may want it elsewhere
HEAD_END = b"\r\n\r\n"

# Where every connection's bytes are put for the moment in which they are handed on, and how much of it is used. While a
# head is awaited little is read at once: what follows it of a large body is better read to where it is wanted. Of a
# chunked body little is read too, for it may have many chunks and one turn of the loop is to be short.
ROOM = memoryview(bytearray(256 << 10))
HEAD_ROOM = ROOM[: 16 << 10]
CHUNK_ROOM = 32 << 10


class Protocol(HttpToolsProtocol):
    """One connection. States: head (awaited or coming), body, answer (the request is whole, its answer is owed), and
    parting (the last answer has gone; what still comes is thrown away).

    A client that gets its answer early, or its last one, keeps being read for a while, else the kernel would reset the
    connection and the answer would be lost with it.
    """

    header_timeout: ClassVar[float] = 10.0
    patience: ClassVar[float] = 10.0  # seconds in which something of an answer must be read, as of a body
    held: ClassVar[Connections]
    newcomers: ClassVar[Newcomers]
    proxies: ClassVar[Proxies]
    cycle: Cycle

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow: Flow = Flow(transport)
        self._in_head, self._in_body, self._parting, self._early = True, False, False, False
        self._head = self._lines = self._pieces = self._size = self._left = 0
        self._line, self._lined = b"", False  # the request line, until it has come whole
        self._tail = b""   # the last bytes of a head that has not come whole
        self._ahead = b""  # what has come of the next requests
        self._rest = 0     # bytes of the body that have not come
        self._chunks: Chunks | None = None
        self._framing: Framing | None = None
        socket = transport.get_extra_info("socket")
        self._fd = -1 if socket is None or transport.get_extra_info("sslcontext") else socket.fileno()
        self._progress = Progress(transport, self._fd, self.patience, MIN_RATE * self.patience)
        self._unread: Charge | None = None
        self._refusal: ImagePoolError | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._peer = self.client[0] if self.client else ""
        self._proxied = self.proxies.trusts(self._peer)
        self._place: Place | None = None
        address, now = network(self._peer), self.loop.time()
        wait = 0.0 if self._proxied else self.newcomers.wait(address, now)
        if wait is None:
            self.newcomers.tell(self._peer, now)
            transport.abort()
            return
        self._place = self.held.take(address, self._make_room, proxy=self._proxied)
        if self._place is None:
            self._turn_away()
        elif wait:
            self._early = True
            self.flow.hold()
            self._timer = self.loop.call_later(wait, self._let_in)
        else:
            self._arm(self._slow_head)

    def _let_in(self) -> None:
        """It came sooner than its address may: now it is heard."""
        self._early = False
        self._arm(self._slow_head)
        data, self._ahead = self._ahead, b""
        self.flow.release()
        self.data_received(data)

    @property
    def room(self) -> memoryview:
        """Where what comes next is to be read to. What follows a body of known length is not read with it, nor what
        follows a large chunk."""
        if self._in_body:
            return ROOM[: max(CHUNK_ROOM, self._chunks.ahead) if self._chunks is not None else self._rest]
        return ROOM if self._parting else HEAD_ROOM

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        self._was_read()
        self._leave()
        cycle = self.cycle
        super().connection_lost(exc)
        if cycle is not None and cycle.on_gone is not None:
            cycle.on_gone()

    def data_received(self, data: bytes) -> None:
        if self._early:  # uvloop reads after `connection_made`, whatever that said
            self._ahead += data
            self.transport.pause_reading()
            return
        self._unset_keepalive_if_required()
        at = 0
        while at < len(data) and not self.transport.is_closing():
            if self._parting:
                self._throw_away(len(data) - at)
                return
            if self._in_head:
                at = self._read_head(data, at)
                if self._rest >= DIRECT and self._rest > len(data) - at:
                    self.flow.pause_reading()  # until the application says where the body goes
            elif self._in_body:
                at = self._read_body(data, at)
            else:
                self._ahead += data[at:]
                self.flow.hold()
                return
        if self._in_head and self._head and self._timer is None and not self.transport.is_closing():
            self._arm(self._slow_head)

    def _read_head(self, data: bytes, at: int) -> int:
        """Parse what belongs to the head, at most; the position after it."""
        found = data.find(HEAD_END, at)
        whole = found >= 0
        if self._tail and (joint := (self._tail + data[at : at + 3]).find(HEAD_END)) >= 0:
            found, whole = at + joint - len(self._tail), True  # it began in the piece before
        piece = data[at : found + len(HEAD_END) if whole else len(data)]
        at += len(piece)
        self._head += len(piece)
        self._tail = b"" if whole else (self._tail + piece)[-3:]
        try:
            if not self._lined:
                self._line, self._lined = request_line(self._line, piece)
            if self._head > MAX_HEAD:
                raise HeaderTooLarge(f"the request's headers have more than {MAX_HEAD} bytes")
            self.parser.feed_data(piece)
            if whole and self._in_head:
                raise BadRequest("there is no request before the empty line")
        except httptools.HttpParserUpgrade:
            pass  # what that means is said by `read_framing`
        except httptools.HttpParserError:
            self._refuse(self._refusal or BadRequest("this is no valid HTTP request"))
        except ImagePoolError as fault:
            self._refuse(fault)
        if self._framing is not None and self._framing.socket and not self.transport.is_closing():
            self.handle_websocket_upgrade()
            return len(data)
        return at

    def _read_body(self, data: bytes, at: int) -> int:
        """Take what belongs to the body; the position after it."""
        begin = at
        try:
            if self._chunks is not None:
                at, part, pieces = self._chunks.read(data, at, MAX_CHUNKS)
                if pieces:
                    self._take(part, pieces)
            else:
                view = memoryview(data)[at : at + self._rest]
                at += len(view)
                self._rest -= len(view)
                self._take(view)
        except BadRequest as fault:
            self._refuse(fault)
            return len(data)
        if self.cycle.response_complete:
            self._left += at - begin
            if self._left > MAX_LEFT:
                self.transport.close()
                return len(data)
        if not self._rest and (self._chunks is None or self._chunks.done) and not self.transport.is_closing():
            self._end_body()
        return at

    def _end_body(self) -> None:
        """The request is whole."""
        self._in_body, self._chunks = False, None
        self.cycle.more_body = False
        self.cycle.message_event.set()
        if self.cycle.response_complete:
            self._next()

    def _next(self) -> None:
        """Await the next request, or begin with what has come of it."""
        self._disarm()
        self._in_head, self._framing, self._lined = True, None, False
        self._head = self._lines = 0
        self.parser = httptools.HttpRequestParser(self)
        self._idle()
        if self.flow.held:
            data, self._ahead = self._ahead, b""
            self.flow.release()
            self.data_received(data)

    # --- the parser calls ---------------------------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        self._lines += 1
        if self._lines > MAX_LINES:
            self._give_up(HeaderTooLarge(f"the request has more than {MAX_LINES} headers"))
        name, value = name.lower(), value.strip(b" \t")  # the parser leaves blanks at the end (RFC 9112, 5.1)
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        method, version = self.parser.get_method().decode(), self.parser.get_http_version()
        try:
            self._framing = framing = read_framing(method, self.url, version, self.headers)
        except BadRequest as fault:
            self._give_up(fault)
        self._disarm()
        self._in_head = False
        self._pieces = self._size = self._left = 0
        let_in = self._occupy()
        if framing.socket:
            return
        self.url = framing.target
        self.app = self.config.loaded_app if let_in else _too_many
        super().on_headers_complete()
        self._begin(framing)

    def on_body(self, body: bytes) -> None:
        raise AssertionError("bodies go around the parser")

    def on_message_complete(self) -> None:
        """The parser has no say in this: see `_end_body`."""

    def _should_upgrade(self) -> bool:
        return False

    def _occupy(self) -> bool:
        """The connection is busy, and the request has the address of whom it comes from; False when that one has too
        many in flight."""
        client = None
        if self._proxied:
            address = self.proxies.client(self._peer, self.headers)
            self.scope["client"] = (address, 0)
            client = network(address)
        return self._place is None or self.held.busy(self._place, client)

    def _begin(self, framing: Framing) -> None:
        """Make uvicorn's cycle ours. Its task has not begun yet."""
        cycle = self.cycle
        cycle.__class__ = Cycle  # uvicorn leaves no other door open
        cycle.chunks, cycle.waiting = deque(), 0
        cycle.fd, cycle.start = self._fd, None
        cycle.fault = cycle.on_gone = None
        extensions: Any = {GONE: partial(self._watch, cycle), TAKE: partial(self._take_now, cycle)}
        self.scope["extensions"] = extensions
        self._rest = framing.length
        self._chunks = Chunks() if framing.chunked else None
        self._in_body = framing.chunked or framing.length > 0
        if not self._in_body:
            cycle.more_body = False
            cycle.message_event.set()
        elif not cycle.keep_alive:
            cycle.transport = Gentle(self.transport, self._part)  # type: ignore[assignment]

    def handle_websocket_upgrade(self) -> None:
        """uvicorn's, and the web socket knows whose it is. What came behind the head is no frame: nobody has said yet
        that frames are understood."""
        self._disarm()
        self.connections.discard(self)
        socket = WebSocket(config=self.config, server_state=self.server_state, app_state=self.app_state)
        socket.connection_made(self.transport)
        socket.client = self.scope["client"]
        socket.on_lost, socket.progress = self._leave, self._progress
        lines = [b"%b: %b\r\n" % line for line in self.headers]
        socket.data_received(b"GET %b HTTP/1.1\r\n%b\r\n" % (self.url, b"".join(lines)))
        self.transport.set_protocol(socket)

    # --- the body -----------------------------------------------------------------------------------------------------

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

    def _take(self, body: bytes | memoryview, pieces: int = 1) -> None:
        """`body` has come, in so many pieces."""
        self._pieces += pieces
        self._size += len(body)
        if self._pieces > MAX_CHUNKS and self._size < self._pieces * MIN_CHUNK:
            raise BadRequest(f"the body comes in pieces of less than {MIN_CHUNK} bytes; send larger ones")
        cycle = self.cycle
        if not cycle.response_complete:
            cycle.chunks.append(body)
            cycle.waiting += len(body)
            if cycle.waiting > HIGH_WATER_LIMIT:
                self.flow.pause_reading()
            cycle.message_event.set()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            return
        if self._parting:
            self._unset_keepalive_if_required()
        elif self._in_body:
            self._unset_keepalive_if_required()
            self._disarm()
            self._arm(self.transport.close)
        else:
            self._next()

    # --- and we answer ------------------------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        """More of the answers has been written than the client takes now."""
        super().pause_writing()
        self._progress.watch()
        size = self.transport.get_write_buffer_size()
        scope: Any = self.scope
        owing: Callable[[], Charge] | None = scope.get("owing") if scope else None
        if owing is None or size <= 2 * SENT or self._unread is not None:  # a piece of a large one is paid for
            return
        self._unread = owing()
        try:
            self._unread.add(size)
        except Overloaded:
            self.transport.abort()  # the answer has begun: there is no other word for it

    def resume_writing(self) -> None:
        super().resume_writing()
        self._was_read()
        if self._parting or (self._in_head and not self._head):
            self._idle()

    def _was_read(self) -> None:
        """Little is left of the answers that were written."""
        self._progress.rest()
        if self._unread is not None:
            self._unread.close()
            self._unread = None

    def _idle(self) -> None:
        """The connection awaits a request, or its end, once its answer has been taken."""
        if self._place is not None and not self.flow.write_paused:
            self.held.idle(self._place)

    def _make_room(self) -> None:
        """Somebody else needs the place. What is still to be read would keep the connection after it was told to
        close."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self.transport.close()

    def _watch(self, cycle: Cycle, on_gone: Callable[[], None] | None) -> None:
        cycle.on_gone = on_gone
        if on_gone is not None:
            if self.transport.is_closing():
                on_gone()
            self.flow.resume_reading()  # a connection that is not read does not tell of its end

    def _give_up(self, error: ImagePoolError) -> NoReturn:
        self._refusal = error
        raise ValueError(error.message)  # ends the parser

    def _slow_head(self) -> None:
        self._timer = None
        if not self.transport.is_closing():
            self._refuse(RequestTimeout("the request's headers did not arrive in time"))

    def _turn_away(self) -> None:
        """There is no room for this connection. Beyond so many that are read on until they have our word, it is said
        and the connection closed: who has sent nothing yet gets it all the same."""
        full = Overloaded("too many connections are open; close some, or try again later", retry_after=1.0)
        if self.held.away >= MOST_AWAY:
            self._say(full)
            self.transport.close()
            return
        self.held.away += 1
        self._refuse(full)

    def _leave(self) -> None:
        """The connection has ended."""
        if self._place is not None:
            self.held.free(self._place)
        elif self._parting:
            self.held.away -= 1

    def _refuse(self, error: ImagePoolError) -> None:
        """Answer without the application, and part. Where the application still owes an answer, ours would be taken for
        it: then who reads the body hears of the error, and the connection ends after the answer."""
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            self._in_body, self._chunks, self._rest = False, None, 0
            cycle.keep_alive, cycle.fault = False, error
            cycle.transport = Gentle(self.transport, self._part)  # type: ignore[assignment]
            cycle.message_event.set()
            return
        if self._in_body:
            self.transport.close()
            return
        self._say(error)
        self._part()

    def _say(self, error: ImagePoolError) -> None:
        """Write an answer that is none of the application's."""
        name = request_id(None)
        status, body = problem(error, name)
        content = orjson.dumps(body)
        lines = {
            "content-type": PROBLEM, "content-length": len(content), "connection": "close", "x-request-id": name,
            **headers_of(error, status),
        }  # fmt: skip
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        self.transport.write(STATUS_LINE[status] + head.encode() + b"\r\n" + content)

    def _part(self) -> None:
        """End the connection when the client has ended it, or after a while."""
        if self._parting or self.transport.is_closing():
            return
        self._parting, self._in_head, self._in_body, self._left = True, False, False, 0
        self._ahead = b""
        self._disarm()
        self._unset_keepalive_if_required()
        if not self.transport.can_write_eof():
            self.transport.close()
            return
        self.transport.write_eof()
        self._idle()
        self.flow.release()
        self._arm(self.transport.close)

    def _throw_away(self, size: int) -> None:
        self._left += size
        if self._left > MAX_LEFT:
            self.transport.close()

    def _arm(self, then: Callable[[], None]) -> None:
        self._timer = self.loop.call_later(self.header_timeout, then)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


async def _too_many(scope: Scope, receive: Receive, send: Send) -> None:
    """The application of those whose address has too many requests in flight."""
    error = Overloaded("too many requests of this address are in flight; wait for their answers", retry_after=1.0)
    await Wardrobe().respond(error, scope["path"], request_id(None))(scope, receive, send)

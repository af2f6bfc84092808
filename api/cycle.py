"""uvicorn's cycle of one request and its answer, made quick for images.

A large body does not pass through the parser: the application gets views of what was read, or has it read from the
socket to where it wants it. An answer of known length leaves in one system call, so it may lie in shared memory.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from core.errors import ImagePoolError


class Flow(FlowControl):
    """Says whether the connection is read. While it is `held`, because more has come than is wanted before the answer
    has gone, nobody makes it read on."""

    held = False

    def hold(self) -> None:
        self.held = True
        self.pause_reading()

    def release(self) -> None:
        self.held = False
        self.resume_reading()

    def resume_reading(self) -> None:
        if not self.held:
            super().resume_reading()


class Gentle:
    """A transport that is closed so that the other side, though it still sends, can read what was written before."""

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]) -> None:
        self._transport, self.close = transport, close

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class Cycle(RequestResponseCycle):
    """One request and its answer. Its body is kept as the chunks that arrived: joining them costs as much as all the
    rest of a request with a large image."""

    chunks: deque[bytes | memoryview]
    waiting: int         # bytes of them
    fd: int              # the socket's, -1 where it must not be written to past the transport (TLS)
    start: Any           # of an answer of known length: its head leaves together with its body
    length: int          # of that body
    fault: ImagePoolError | None         # what is wrong with the body, for whoever reads it
    on_gone: Callable[[], None] | None   # called when the client goes away

    async def receive(self) -> Any:
        if self.waiting_for_100_continue and not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.waiting_for_100_continue = False
        if not self.chunks and self.fault is None and not self.disconnected and not self.response_complete:
            self.flow.resume_reading()
            await self.message_event.wait()
        self.message_event.clear()  # whoever reads on after the last chunk waits for the end of the connection
        if self.disconnected or self.response_complete:
            return {"type": "http.disconnect"}
        if self.fault is not None and not self.chunks:
            raise self.fault
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
            length = None
            if message["type"] == "http.response.start" and not self.response_started:
                length = _length(message)
            if length is None:
                await super().send(message)
            else:
                self.start, self.length = message, length
            return
        start, self.start = self.start, None
        body = message.get("body", b"")
        if (
            len(body) == self.length
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



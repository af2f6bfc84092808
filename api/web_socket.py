"""uvicorn's web socket, hardened: a client that floods frames holds neither the event loop nor our memory.

Each frame costs tens of microseconds and may have as few as six bytes, so what was read is handed on in small pieces,
one in a turn of the loop. What pages send here is a few words a minute: who sends many frames a second is closed.
uvicorn's lines about handshakes hold query strings, and anybody can make any number of them: the door writes its own.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from api.progress import Progress

PIECE = 1 << 10  # bytes handed on in one turn: at most 170 frames
RATE = 50        # frames a second that are sane
BURST = 500      # frames that may come at once
MAX_MESSAGE = 1_000_000  # bytes of a message
MAX_REST = 1 << 20       # bytes that may wait to be handed on
POLICY_VIOLATION = 1008

log = logging.getLogger("imagepool.web_socket")
log.setLevel(logging.WARNING)


class WebSocket(WebSocketsSansIOProtocol):
    """One web socket. `on_lost` is called when its connection has ended; `progress` watches whether it is read."""

    progress: Progress

    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__(*args, **given)
        self.logger = self.conn.logger = log
        self.conn.debug = False
        self.on_lost: Callable[[], None] | None = None
        self._rest = b""
        self._turn: asyncio.Handle | None = None
        self._due = 0.0  # when the frames so far would have come at the sane rate

    def data_received(self, data: bytes) -> None:
        if not self.handshake_initiated:
            super().data_received(data)
            return
        self._rest += data
        if len(self._rest) > MAX_REST:
            self.transport.abort()
        elif self._turn is None:
            self._hand_on()

    def _hand_on(self) -> None:
        self._turn = None
        piece, self._rest = self._rest[:PIECE], self._rest[PIECE:]
        super().data_received(piece)
        if self.transport.is_closing():
            self._rest = b""
        elif self._rest:
            self.transport.pause_reading()
            self._turn = self.loop.call_soon(self._hand_on)
        elif not self.read_paused:
            self.transport.resume_reading()

    async def send(self, message: Any) -> None:
        await super().send(message)
        if self.initial_response is not None and self.close_sent:
            self.handshake_complete = True  # uvicorn would take a refusal with a body for one that was forgotten

    def handle_events(self) -> None:
        now = self.loop.time()
        self._due = max(self._due, now) + len(self.conn.events) / RATE
        if self.handshake_initiated and self._due > now + BURST / RATE:
            self._end_flood()
        else:
            super().handle_events()

    def _end_flood(self) -> None:
        self.conn.fail(POLICY_VIOLATION, "too many frames")
        self.queue.put_nowait({"type": "websocket.disconnect", "code": POLICY_VIOLATION, "reason": ""})
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent = True
        self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.progress.watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.progress.rest()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._turn is not None:
            self._turn.cancel()
        self.progress.rest()
        super().connection_lost(exc)
        if self.on_lost is not None:
            self.on_lost()

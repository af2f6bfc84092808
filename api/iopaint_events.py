"""The events that IOPaint's page listens to: Socket.IO 5 over Engine.IO 4, by long polling here and by web sockets in
`iopaint_sockets.py`.

`diffusion_progress {"step"}` and `diffusion_finish` go from the server to the page, to that one whose request they are
about: a handshake sets a cookie, which the browser sends with its requests, too. What a request without it (a script's)
causes is told to the pages at its address. (IOPaint tells everybody everything.)
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import orjson
from fastapi import APIRouter, Request
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse, PlainTextResponse, Response

from api.auth import caller
from api.run import Watch
from engine.engine import Engine
from engine.intake import network

COOKIE = "imagepool_page"
PING_EVERY = 25.0  # seconds, as IOPaint has it
PING_TIMEOUT = 20.0
MAX_PAYLOAD = 1_000_000
MAX_SESSIONS = 1000
MAX_OF_BROWSER = 32  # of these, with one cookie
KEPT = 64  # packets that may wait for a page which does not poll
SEPARATOR = "\x1e"
FAULTS = {
    0: "Transport unknown", 1: "Session ID unknown", 2: "Bad handshake method", 3: "Bad request",
    5: "Unsupported protocol version",
}  # fmt: skip


@dataclass(slots=True)
class Session:
    """One open page. `browser` is its cookie, `peer` the address it comes from, `network` that of its client. `turn`
    counts its polls: only the last one is answered with packets; `open_polls` are those that wait. `moving`: from
    polling to a web socket, `moved`: it has done so."""

    id: str
    browser: str
    peer: str
    tenant: str
    seen: float
    ping_at: float
    network: str
    packets: deque[str] = field(default_factory=lambda: deque(maxlen=KEPT))
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    connected: bool = False
    closed: bool = False
    moving: bool = False
    moved: bool = False
    turn: int = 0
    open_polls: int = 0

    @property
    def live(self) -> bool:
        """Whether the page came back after its handshake."""
        return self.connected or self.moved or self.open_polls > 0

    def opening(self, *upgrades: str) -> str:
        """The first packet: what the page needs to know, and to which other transports it may change."""
        told = {
            "sid": self.id, "upgrades": upgrades, "pingInterval": int(PING_EVERY * 1000),
            "pingTimeout": int(PING_TIMEOUT * 1000), "maxPayload": MAX_PAYLOAD,
        }  # fmt: skip
        return "0" + orjson.dumps(told).decode()

    def send(self, packet: str) -> None:
        """Queue a packet for the next poll."""
        self.packets.append(packet)
        self.changed.set()

    def take(self) -> str:
        """Everything that waits, as one payload."""
        payload = SEPARATOR.join(self.packets)
        self.packets.clear()
        self.changed.clear()
        return payload


class Events:
    """All open pages."""

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine, self._clock = engine, clock
        self._sessions: dict[str, Session] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def emit(self, request: HTTPConnection, event: str, *data: object) -> None:
        """Send an event to the pages of whoever made this request."""
        packet = f"42{orjson.dumps([event, *data]).decode()}"
        browser, peer, tenant = request.cookies.get(COOKIE), peer_of(request), caller(request).tenant
        for session in self._sessions.values():
            same = session.browser == browser if browser else session.peer == peer
            if session.connected and session.tenant == tenant and same:
                session.send(packet)

    def open(self, request: HTTPConnection) -> Session:
        """A new session; those that nobody polls any more are forgotten, and one of whoever has too many."""
        now = self._clock()
        for session in [old for old in self._sessions.values() if now - old.seen > PING_EVERY + PING_TIMEOUT]:
            self.forget(session)
        browser = request.cookies.get(COOKIE) or secrets.token_urlsafe(16)
        peer, tenant = peer_of(request), caller(request).tenant
        made = Session(
            secrets.token_urlsafe(16), browser[:64], peer, tenant, now, now + PING_EVERY, network(peer)
        )
        others = list(self._sessions.values())
        if len(same := [old for old in others if old.browser == made.browser]) >= MAX_OF_BROWSER:
            self.forget(min(_idle(same), key=lambda old: old.seen))
        elif len(others) >= MAX_SESSIONS:
            self.forget(_surplus(_idle(others), made))
        self._sessions[made.id] = made
        return made

    def find(self, request: HTTPConnection) -> Session | None:
        """The session that a request names, if it is that caller's."""
        found = self._sessions.get(request.query_params.get("sid", ""))
        if found is None or found.tenant != caller(request).tenant:
            return None
        found.seen = self._clock()
        return found

    async def poll(self, session: Session) -> str:
        """What is to be said, as soon as there is something; now and then a ping."""
        session.turn += 1
        turn = session.turn
        session.changed.set()  # a poll that still waits ends
        if not session.packets:
            session.changed.clear()
            changed = asyncio.ensure_future(session.changed.wait())
            session.open_polls += 1
            try:
                await asyncio.wait({changed, self._engine.leaving}, timeout=max(0.0, session.ping_at - self._clock()),
                                   return_when=asyncio.FIRST_COMPLETED)  # fmt: skip
            finally:
                session.open_polls -= 1
                changed.cancel()
        session.seen = now = self._clock()
        if session.closed or self._engine.draining:
            self.forget(session)
            return "1"
        if turn != session.turn:
            return "6"
        if now >= session.ping_at:  # also a page that hears much must be pinged
            session.ping_at = now + PING_EVERY
            session.packets.append("2")
        return session.take() or "6"

    def end_polling(self, session: Session) -> None:
        """Until the page has moved to its web socket: a poll that waits ends, and so does every other."""
        session.moving = True
        session.turn += 1
        session.changed.set()

    def receive(self, session: Session, payload: str) -> None:
        """What the page says: it connects, answers a ping or leaves; events of its own mean nothing here."""
        for packet in payload.split(SEPARATOR)[:KEPT]:
            if packet.startswith("40/") and not packet.startswith("40/,"):
                namespace = packet[2:].partition(",")[0][:64]
                session.send(f'44{namespace},{{"message":"Invalid namespace"}}')
            elif packet.startswith("40"):
                session.connected = True
                session.send(f'40{{"sid":"{session.id}"}}')
            elif packet.startswith("41"):
                session.connected = False
            elif packet.startswith("1"):
                self.forget(session)

    def forget(self, session: Session) -> None:
        """It is over; whoever waits for its packets hears so."""
        session.closed = True
        session.changed.set()
        self._sessions.pop(session.id, None)


def _idle(sessions: list[Session]) -> list[Session]:
    """Those that only shook hands; all when there are none, for then a live one has to go."""
    return [one for one in sessions if not one.live] or sessions


def _surplus(others: list[Session], newcomer: Session) -> Session:
    """The one that has to go: of the tenant that has the most, of its network with the most, of its browser with the
    most, the one not heard of for the longest. Where the newcomer's has as many as any other, it is that one."""
    for mark in ("tenant", "network", "browser"):
        marks = [getattr(one, mark) for one in (newcomer, *others)]
        most, _ = Counter(marks).most_common(1)[0]  # of equals the first
        others = [one for one, of in zip(others, marks[1:], strict=True) if of == most] or others
    return min(others, key=lambda one: one.seen)


def peer_of(request: HTTPConnection) -> str:
    """The address a request comes from."""
    return request.client.host if request.client else ""


def router(events: Events) -> APIRouter:
    """`/socket.io/`."""
    routes = APIRouter(include_in_schema=False)

    @routes.get("/socket.io/")
    async def get(request: Request) -> Response:
        if (fault := _fault(request)) is not None:
            return fault
        if "sid" not in request.query_params:
            made = events.open(request)
            answer = _payload(made.opening("websocket"))
            answer.set_cookie(COOKIE, made.browser, httponly=True, samesite="lax")
            return answer
        session = events.find(request)
        if session is None:
            return _refusal(1)
        if session.moved:
            return _refusal(3)
        if session.moving:
            return _payload("6")
        await request.body()  # there is none, but a watch begins behind it
        with Watch(request.scope, request.receive):
            return _payload(await events.poll(session))

    @routes.post("/socket.io/")
    async def post(request: Request) -> Response:
        if (fault := _fault(request)) is not None:
            return fault
        if "sid" not in request.query_params:
            return _refusal(2)
        session = events.find(request)
        if session is None:
            return _refusal(1)
        payload = bytearray()
        async for chunk in request.stream():
            payload += chunk
            if len(payload) > MAX_PAYLOAD:
                return _refusal(3)
        events.receive(session, payload.decode("utf-8", "replace"))
        return PlainTextResponse("ok")

    return routes


def _fault(request: Request) -> Response | None:
    if request.query_params.get("EIO") != "4":
        return _refusal(5)
    return _refusal(0) if request.query_params.get("transport") != "polling" else None


def _payload(text: str) -> PlainTextResponse:
    return PlainTextResponse(text, headers={"cache-control": "no-store"})


def _refusal(code: int) -> JSONResponse:
    return JSONResponse({"code": code, "message": FAULTS[code]}, 400)

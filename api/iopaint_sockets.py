"""The page's events over a web socket: opened as one, or moved to from polling, as the page does when it can.

Every packet is a message of its own. A page that polls proves its socket with a probe (`2probe`, `3probe`); its polls
end, it says `5`, and from then on everything goes this way. Pings and events are those of `iopaint_events.py`.
"""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, WebSocket
from starlette.websockets import WebSocketDisconnect

from api.iopaint_events import COOKIE, PING_EVERY, PING_TIMEOUT, SEPARATOR, Events, Session

PROBE, PROVEN, UPGRADE, CLOSE = "2probe", "3probe", "5", "1"
GONE = (WebSocketDisconnect, TimeoutError, KeyError)  # the last: it sent something else than text


def router(events: Events) -> APIRouter:
    """`/socket.io/` as a web socket. Which pages may open one, the door has decided."""
    routes = APIRouter()

    @routes.websocket("/socket.io/")
    async def listen(socket: WebSocket) -> None:
        session = _session(socket, events)
        if session is None:
            await socket.close()  # before it is accepted: a 403
            return
        try:
            if "sid" in socket.query_params:
                await _move(socket, session, events)
            else:
                await _begin(socket, session)
            await _talk(socket, session, events)
        except GONE:
            pass
        finally:
            if session.moved:
                events.forget(session)

    return routes


def _session(socket: WebSocket, events: Events) -> Session | None:
    """The session that is to go on here, or a new one; None for what is not understood."""
    query = socket.query_params
    if query.get("EIO") != "4" or query.get("transport") != "websocket":
        return None
    if "sid" not in query:
        return events.open(socket)
    found = events.find(socket)
    return None if found is None or found.moved else found


async def _begin(socket: WebSocket, session: Session) -> None:
    """A page that never polled: what the answer to its first poll would have told it."""
    session.moved = True
    cookie = f"{COOKIE}={session.browser}; HttpOnly; Path=/; SameSite=lax"
    await socket.accept(headers=[(b"set-cookie", cookie.encode("latin-1", "replace"))])
    await socket.send_text(session.opening())


async def _move(socket: WebSocket, session: Session, events: Events) -> None:
    """Change from polling to this socket. Raises one of `GONE` when the page does not; then it goes on polling."""
    await socket.accept()
    upgrades = False
    try:
        async with asyncio.timeout(PING_TIMEOUT):
            if await socket.receive_text() == PROBE:
                await socket.send_text(PROVEN)
                events.end_polling(session)
                upgrades = await socket.receive_text() == UPGRADE
    finally:
        session.moving = False
    if session.moved or not upgrades:
        await socket.close()
        raise WebSocketDisconnect
    session.moved = True


async def _talk(socket: WebSocket, session: Session, events: Events) -> None:
    """Until one of the two leaves, or the page has been silent for too long. Raises one of `GONE` when the page did."""
    tasks = [asyncio.create_task(_hear(socket, session, events)), asyncio.create_task(_tell(socket, session, events))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
    for end in ends:
        if isinstance(end, Exception):
            raise end


async def _hear(socket: WebSocket, session: Session, events: Events) -> None:
    while True:
        async with asyncio.timeout(PING_EVERY + PING_TIMEOUT):
            said = await socket.receive_text()
        events.receive(session, said)


async def _tell(socket: WebSocket, session: Session, events: Events) -> None:
    packet = ""
    while packet != CLOSE:
        for packet in (await events.poll(session)).split(SEPARATOR):
            await socket.send_text(packet)
    await socket.close()

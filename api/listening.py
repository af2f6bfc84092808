"""How uvicorn listens: with our protocol on every connection."""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from api.addresses import Proxies
from api.connections import Connections
from api.newcomers import Newcomers
from api.protocol import ROOM, Protocol
from api.web_socket import MAX_MESSAGE, WebSocket
from core.settings import Settings


class Reader(asyncio.BufferedProtocol):
    """A connection as its transport knows it: what comes is read into a room of known size and handed on."""

    def __init__(self, http: Protocol) -> None:
        self.http = http

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.http.connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.http.connection_lost(exc)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.http.room

    def buffer_updated(self, nbytes: int) -> None:
        self.http.data_received(bytes(ROOM[:nbytes]))

    def eof_received(self) -> None:
        self.http.eof_received()

    def pause_writing(self) -> None:
        self.http.pause_writing()

    def resume_writing(self) -> None:
        self.http.resume_writing()


def uvicorn_config(
    settings: Settings, app: ASGIApp, connections: Connections | None = None, **more: Any
) -> uvicorn.Config:
    """How the server listens: our protocol, no access log, proxy headers as we read them, small web sockets (which the
    application pings)."""
    if connections is None:
        connections = Connections(settings.max_connections, settings.connections_per_address)
    settled: dict[str, Any] = {
        "header_timeout": settings.header_timeout, "patience": settings.body_timeout, "held": connections,
        "newcomers": Newcomers(settings.new_connections),
    }  # fmt: skip
    settled["proxies"] = Proxies(settings.trusted_proxies)
    protocol = type("SettledProtocol", (Protocol,), settled)

    def connection(**given: Any) -> Reader:
        return Reader(protocol(**given))

    given: dict[str, Any] = {
        "host": settings.listen_host,
        "port": settings.port,
        "http": connection,
        "ws": WebSocket,
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

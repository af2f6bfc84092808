"""Runs the application until it is told to stop: first signal, finish what runs; second signal, go now."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import resource
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from types import FrameType

import uvicorn

from api import iopaint_page
from api.app import create_app
from api.connections import Connections, share
from api.listening import uvicorn_config
from core.errors import ImagePoolError
from core.heap import keep_heap
from core.names import in_url, is_loopback
from core.settings import THIS_HOST, Settings
from engine import logs
from engine.build import build, temporary_folder
from engine.engine import Engine
from engine.shutdown import AFTER_GRACE, ANSWERS
from engine.startup import show_startup

log = logging.getLogger("imagepool.serve")
HANDLES = 32  # connections that are accepted in one turn of the event loop
OTHER_FILES = 512  # open files that are no connections: pipes, the database, images, what is fetched


def serve(settings: Settings) -> int:
    """Serve until stopped. 0, or 2 when the server cannot start (with one sentence on stderr)."""
    keep_heap()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there are workers to replace
    logs.set_up(settings.log_level, settings.log_format)
    logs.catch_strays()
    try:
        doors = [take_port(settings)]
        engine = build(settings)
        tempfile.tempdir = str(temporary_folder(settings))  # /tmp may be memory, or small
        app = create_app(engine, settings, lifespan=lambda _: life(engine))
        if settings.iopaint_port:
            doors.append(take_port(settings, "iopaint_port"))
            app = iopaint_page.OwnPort(app, settings.iopaint_port)
        warn_if_open(settings, doors[0])
    except (ValueError, ImagePoolError) as fault:
        if settings.log_format == "json":
            log.critical("The server cannot start: %s", fault)
        else:
            print(f"imagepool: {fault}", file=sys.stderr)
        return 2
    connections = Connections(most_connections(settings), settings.connections_per_address)
    engine.metrics.connections(connections.__len__)
    patience = settings.shutdown_grace + ANSWERS
    config = uvicorn_config(settings, app, connections, timeout_graceful_shutdown=patience)
    server = Server(config, engine)
    try:
        server.run(many_handles(doors))
    except SystemExit:  # uvicorn's own word; what keeps it from starting is in the log
        return 2
    return 0 if server.started else 2


def most_connections(settings: Settings) -> int:
    """How many connections may be open: what the settings say, or what the limit on open files allows, which is raised
    as far as this process may. Some files are left for everything else."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    allowed = settings.max_connections if hard == resource.RLIM_INFINITY else hard - min(OTHER_FILES, hard // 2)
    if allowed < settings.max_connections:
        log.warning(
            "Only %d connections may be open (--max-connections %d), and %d of one address, for this process may have "
            "%d files; raise its limit (ulimit -Hn)",
            allowed, settings.max_connections, share(allowed, settings.connections_per_address), hard,
        )  # fmt: skip
    return min(allowed, settings.max_connections)


def take_port(settings: Settings, name: str = "port") -> socket.socket:
    """The socket to listen on at the port of that setting, taken before a worker is started. Raises ValueError with a
    sentence."""
    port = getattr(settings, name)
    try:
        found = socket.getaddrinfo(settings.listen_host, port, type=socket.SOCK_STREAM)
    except OSError:
        raise ValueError(f"--host {settings.listen_host} is no address, and no name that has one") from None
    family, kind, _, _, address = found[0]
    try:
        door = socket.socket(family, kind)
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        door.bind(address)
    except OSError as fault:
        raise ValueError(
            f"port {port} of {settings.listen_host} cannot be taken: {(fault.strerror or str(fault)).lower()}; "
            f"stop who has it (perhaps a server that runs), or set --{name.replace('_', '-')} and --host"
        ) from None
    return door


def many_handles(doors: Sequence[socket.socket]) -> list[socket.socket]:
    """Each listening socket `HANDLES` times. The event loop accepts one connection a turn for each handle (libuv's
    rule): with a single one, whoever opens and leaves quickly keeps all others waiting outside."""
    return [handle for door in doors for handle in (door, *(door.dup() for _ in range(HANDLES - 1)))]


def warn_if_open(settings: Settings, door: socket.socket) -> None:
    """One line when others than this host can reach a server that asks nobody for a key."""
    host = str(door.getsockname()[0])
    if settings.keys_file is None and not is_loopback(host):
        log.warning(
            "OPEN TO EVERYBODY who reaches %s: no key is asked for; set --keys-file, or --host %s for this host alone",
            in_url(host), THIS_HOST,
        )  # fmt: skip


def _is_news(record: logging.LogRecord) -> bool:
    """False for uvicorn's line, as an error, that requests are ended when the grace is over: they are answered."""
    return "timeout graceful shutdown exceeded" not in str(record.msg)


def _give_up() -> None:
    log.error("The server could not end in good order in time; it ends now, and its workers with it")
    os._exit(1)


@asynccontextmanager
async def life(engine: Engine) -> AsyncIterator[None]:
    """The engine lives as long as the application. The server answers as soon as this has yielded; workers start
    meanwhile."""
    await engine.start()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, engine.roll)
    gc.collect()
    gc.freeze()  # what has been loaded stays: later collections need not look at it
    gc.set_threshold(20_000, 5, 5)  # requests leave next to no cycles behind: look for them seldom
    display = asyncio.create_task(show_startup(engine.pool))
    try:
        yield
    finally:
        display.cancel()
        await engine.stop()


class Server(uvicorn.Server):
    """uvicorn, with our word about signals: the first lets running batches finish and sends waiting clients away, the
    second ends at once. Durable jobs that wait are kept for the next start either way. (SIGHUP replaces the workers one
    after the other, see `Engine.roll`.)"""

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        super().__init__(config)
        self._engine = engine
        logging.getLogger("uvicorn.error").addFilter(_is_news)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Says where it listens, once it does; uvicorn is silent about sockets that were taken for it."""
        await super().startup(sockets)
        for host, port in dict.fromkeys(door.getsockname()[:2] for door in sockets or ()):
            log.info("Listening on http://%s:%d (Ctrl-C stops)", in_url(host), port)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Unlike uvicorn's own, the process ends with 0 after a signal that it has obeyed."""
        if self.started:  # before that there is nobody to tell
            asyncio.get_event_loop().call_soon_threadsafe(self._told_to_go)
        else:
            self.should_exit = True

    def _told_to_go(self) -> None:
        engine = self._engine
        if engine.announced:
            self.should_exit = self.force_exit = True
            self._leave_by(AFTER_GRACE)
            engine.hurry()
        elif delay := engine.settings.drain_delay:
            log.info("Serving on for %g s, while readiness says no; a second signal ends at once", delay)
            engine.announce()
            asyncio.get_running_loop().call_later(delay, self._drain)
        else:
            self._drain()

    def _drain(self) -> None:
        engine, grace = self._engine, self._engine.settings.shutdown_grace
        if engine.draining:
            return
        log.info("Finishing what runs, for %g s at most; jobs that wait are kept; a second signal ends at once", grace)
        self.should_exit = True
        self._leave_by(grace + AFTER_GRACE)
        engine.drain()

    def _leave_by(self, seconds: float) -> None:
        """Whatever hangs then (a disk, a driver) holds no service manager up: what was accepted is on disk."""
        last = threading.Timer(seconds, _give_up)
        last.daemon = True
        last.start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Also in a hurry the engine ends in good order, which uvicorn would leave out."""
        await super().shutdown(sockets)
        if self.force_exit:
            await self.lifespan.shutdown()

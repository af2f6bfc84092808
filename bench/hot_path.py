"""The way from HTTP byte to HTTP byte: what each stage of a W1 request costs the master, in microseconds of CPU.

    python -m bench.hot_path [--runs 5] [--seconds 4] [--quick] [--write-docs]

Each stage is timed alone with the real objects, batches of eight, in one thread; then a real server's master is
measured under the full load (64 connections). What the stages do not explain is the event loop, the network stack's own
work and caches that others emptied. Writes bench/results/hot_path.json and hot_path.png; --write-docs fills
docs/performance.md.
"""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import uvloop
from rich.progress import Progress
from uvicorn.server import ServerState

from api.app import create_app
from api.limits import GONE, TAKE
from api.listening import uvicorn_config
from bench import report
from bench.common import machine_facts, write_result
from bench.runs import load, noise_png, parser, plot, print_tables, save, show, spread, table
from bench.servers import ROOT, ours
from core.header import read_header
from core.request import ImagePart, ImageRequest, Span
from core.settings import Settings
from core.ticket import Group, Ticket
from engine import logs
from engine.build import build
from engine.engine import Engine
from scheduler.commands import Command, Dispatch
from scheduler.events import BatchEnded, ItemEnded, Submitted, WorkerReady
from scheduler.scheduler import Scheduler
from workers.arena import Arena
from workers.channel import Frames, pack
from workers.contract import PoolEvent, Said, WorkerUp, WorkerView
from workers.messages import BatchDone, Finished, ItemsDone, RunBatch, RunItem, ToWorker

BATCH = 8
FLOW = 64
READ = 256 << 10  # what is read at once of a body that nobody wants elsewhere
Stage = Callable[[], Awaitable[float]]


class InstantPool:
    """Answers a batch in the next turn of the event loop, with the bytes that lie there already."""

    async def start(self, listener: Callable[[PoolEvent], None]) -> None:
        self._listener, self._loop = listener, asyncio.get_running_loop()
        self._listener(WorkerUp("cpu:0", 1))

    def send(self, worker: str, incarnation: int, *messages: ToWorker) -> None:
        for message in messages:
            if isinstance(message, RunBatch):
                self._loop.call_soon(self._answer, message)

    def _answer(self, batch: RunBatch) -> None:
        items = tuple(finished(item) for item in batch.items)
        self._listener(Said("cpu:0", 1, ItemsDone(batch.batch, items)))
        self._listener(Said("cpu:0", 1, BatchDone(batch.batch, 0.009)))

    def kill(self, worker: str, incarnation: int, why: str) -> None: ...

    def retire(self, worker: str, incarnation: int) -> None: ...

    async def stop(self, grace: float) -> None: ...

    def view(self) -> list[WorkerView]:
        return []


def finished(item: RunItem) -> Finished:
    timings = {"decode": 1e-6, "wait": 0.009, "compute": 0.009, "encode": 3e-5}
    return Finished(item.job, item.images[0].size, "png", 0, 0, timings)


def each(work: Callable[[], object], count: int, per: int = 1) -> float:
    """Microseconds of CPU of one `work`, divided by `per`."""
    work()
    began = time.thread_time()
    for _ in range(count):
        work()
    return 1e6 * (time.thread_time() - began) / count / per


async def each_async(work: Callable[[], Awaitable[object]], count: int, per: int = 1) -> float:
    await work()
    began = time.thread_time()
    for _ in range(count):
        await work()
    return 1e6 * (time.thread_time() - began) / count / per


class Bench:
    """The real objects, around a pool that answers at once."""

    def __init__(self, engine: Engine, settings: Settings, count: int) -> None:
        self.engine, self.count, self.body = engine, count, noise_png()
        self.app = create_app(engine, settings)
        self.spec = engine.catalogue["echo"]
        self.header = read_header(self.body)
        self.settings = settings

    def request(self, span: Span) -> ImageRequest:
        part = ImagePart("image", span, self.header, len(self.body))
        return ImageRequest("echo", (part,), self.spec.check_params({}), deadline=300.0, durable=False, dialect="run")

    async def lend(self) -> None:
        permit = self.engine.admit(len(self.body))
        with permit:
            _, loan = await self.engine.lend(self.request(permit.span), permit)
        loan.__exit__()

    async def whole_app(self) -> None:
        def take(room: memoryview) -> int:
            room[:] = self.body
            return len(self.body)

        async def receive() -> Any:
            raise AssertionError("the whole body has been taken")

        async def send(_: Any) -> None: ...

        scope = {
            "type": "http", "method": "POST", "path": "/run/echo", "query_string": b"", "extensions": {
                GONE: lambda _: None, TAKE: take}, "headers": [(b"host", b"127.0.0.1"), (b"content-type", b"image/png"),
                                                               (b"content-length", b"%d" % len(self.body))],
        }  # fmt: skip
        await self.app(scope, receive, send)

    async def of_eight(self, one: Callable[[], Awaitable[None]]) -> None:
        await asyncio.gather(*(one() for _ in range(BATCH)))

    # --- the stages ---------------------------------------------------------------------------------------------------

    async def engine_whole(self) -> float:
        return await each_async(lambda: self.of_eight(self.lend), self.count, BATCH)

    async def app_whole(self) -> float:
        return await each_async(lambda: self.of_eight(self.whole_app), self.count, BATCH)

    def bodies(self) -> Iterator[memoryview]:
        """As many bodies in shared memory as are on their way at once, again and again: no cache holds 64 of them."""
        arena = Arena(128 << 20)
        bodies = [arena.view(arena.take(len(self.body))) for _ in range(FLOW)]
        for body in bodies:
            body[:] = self.body
        return cycle(bodies)

    async def fill(self) -> float:
        """What the kernel does in `kernel` and `whole_app` does here by itself."""
        arena = Arena(128 << 20)
        held = deque(arena.take(len(self.body)) for _ in range(BATCH))

        def work() -> None:
            arena.give(held.popleft())
            held.append(arena.take(len(self.body)))
            arena.view(held[-1])[:] = self.body

        return each(work, self.count)

    async def scheduler(self) -> float:
        scheduler, number, now = Scheduler(), 0, 0.0
        scheduler.handle(WorkerReady("cpu:0", 1), now)
        group = Group("echo", "1", 408, 408, limit=BATCH)

        def work() -> None:
            nonlocal number, now
            sent: list[Command] = []
            for _ in range(BATCH):
                number, now = number + 1, now + 1e-4
                sent += scheduler.handle(Submitted(Ticket(str(number), group, deadline=now + 300)), now)
            while sent:
                dispatch = sent.pop(0)
                assert isinstance(dispatch, Dispatch)
                now += 0.009
                for ticket in dispatch.tickets:
                    scheduler.handle(ItemEnded("cpu:0", 1, dispatch.batch, ticket.id), now)
                sent += scheduler.handle(BatchEnded("cpu:0", 1, dispatch.batch, 0.009), now)

        return each(work, self.count, BATCH)

    async def messages(self) -> float:
        span = Span(4096, len(self.body), 524_288)
        ids = [f"{number:08}-0000-4000-8000-000000000000" for number in range(BATCH)]
        request = self.request(span)
        items = tuple(RunItem(name, request.images, request.params, request.output, span, (512, 512)) for name in ids)
        batch = RunBatch(7, "echo", items)
        answer = pack([ItemsDone(7, tuple(map(finished, items))), BatchDone(7, 0.009)])
        frames = Frames()
        reader, writer = os.pipe()

        def work() -> None:
            os.write(writer, pack([batch]))
            os.read(reader, 1 << 18)
            frames.feed(answer)

        found = each(work, self.count, BATCH)
        os.close(reader)
        os.close(writer)
        return found

    async def protocol(self) -> float:
        """Parse the head, take the body, start the task, make the head of the answer."""
        config = uvicorn_config(self.settings, swallow)
        config.load()
        made: Any = config.http_protocol_class
        given = {"config": config, "server_state": ServerState(), "app_state": {}, "_loop": asyncio.get_running_loop()}
        connection = made(**given).http
        connection.connection_made(Nowhere())
        head = (
            b"POST /run/echo HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n"
            % len(self.body)
        )
        data = head + self.body
        pieces = [data[at : at + READ] for at in range(0, len(data), READ)]

        async def work() -> None:
            for piece in pieces:
                connection.data_received(piece)
            while not connection.cycle.response_complete:  # noqa: ASYNC110
                await asyncio.sleep(0)

        found = await each_async(work, self.count)
        connection.connection_lost(None)
        return found

    async def kernel(self) -> tuple[float, float]:
        """Reading the body from a socket into shared memory and writing it to one from there, over the loopback
        interface."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            left = socket.create_connection(server.getsockname())
            right, _ = server.accept()
        for end in (left, right):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        sent = received = 0.0
        bodies, places = self.bodies(), self.bodies()
        with left, right:
            for _ in range(self.count):
                start = time.thread_time()
                left.sendall(next(bodies))
                middle = time.thread_time()
                place, size = next(places), 0
                while size < len(self.body):
                    size += right.recv_into(place[size:])
                sent, received = sent + middle - start, received + time.thread_time() - middle
        return 1e6 * received / self.count, 1e6 * sent / self.count

    async def stages(self) -> dict[str, float]:
        received, sent = await self.kernel()
        whole, engine, scheduler = await self.app_whole(), await self.engine_whole(), await self.scheduler()
        return {
            "kernel: the body comes in, into shared memory": received,
            "protocol: head, body, task, answer's head": await self.protocol(),
            "door and dialect: ids, limits, options, image header": max(0.0, whole - engine - await self.fill()),
            "engine: admission, memory, job, states, metrics": max(0.0, engine - scheduler),
            "scheduler": scheduler,
            "messages to and from the worker": await self.messages(),
            "kernel: the answer goes out": sent,
        }


class Nowhere(asyncio.Transport):
    """A connection to nobody."""

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", 1) if name in ("sockname", "peername") else default

    def write(self, data: Any) -> None: ...

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def close(self) -> None: ...


async def swallow(_: Any, receive: Any, send: Any) -> None:
    """Reads the body and answers nothing."""
    while (await receive())["more_body"]:
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


async def take_apart(runs: int, count: int, tick: Callable[[], None]) -> list[dict[str, float]]:
    logs.set_up("info", "console")  # else every job's end would be printed, which no server does
    with tempfile.TemporaryDirectory(prefix="imagepool-bench-") as outputs:
        folder = ROOT / "models" / "repository_test"
        settings = Settings(outputs=Path(outputs), models_folder=folder, models=("echo",), devices="cpu:1")
        engine = build(settings, lambda *_: InstantPool())
        await engine.start()
        found = []
        for _ in range(runs):
            found.append(await Bench(engine, settings, count).stages())
            tick()
        await engine.stop(0.0)
    return found


def draw(medians: dict[str, float], total: float) -> None:
    figure, axis = plot().subplots(figsize=(9, 2.6), layout="constrained")
    left = 0.0
    colours = plot().get_cmap("tab10").colors
    for number, (name, value) in enumerate(medians.items()):
        axis.barh([0], [value], left=[left], color=colours[number % 10], label=f"{name}: {value:.0f}")
        left += value
    axis.axvline(total, color="#666666", linestyle=":", linewidth=1)
    axis.set_yticks([])
    axis.set_xlabel("microseconds of the master's CPU per request (dotted: measured under load)", fontsize=8)
    axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.35), ncols=2, frameon=False)
    axis.set_title("From HTTP byte to HTTP byte: a 500 KB image", fontsize=10, loc="left")
    save(figure, "hot_path")


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--seconds", type=float, default=4.0)
    arguments.add_argument("--write-docs", action="store_true", help="fill docs/performance.md")
    given = arguments.parse_args()
    runs, seconds, count = (2, 2.0, 100) if given.quick else (given.runs, given.seconds, 400)
    facts = machine_facts(("uvicorn", "uvloop", "httptools", "starlette"))
    with Progress(refresh_per_second=1) as progress:
        task = progress.add_task("hot path", total=2 * runs)
        found = uvloop.run(take_apart(runs, count, lambda: progress.advance(task)))
        whole = []
        with ours() as server:
            for _ in range(runs):
                whole.append(1e3 * load(server, noise_png(), 64, seconds).master_cpu_ms)
                progress.advance(task)
    spreads = {name: spread((one[name] for one in found), 1) for name in found[0]}
    total = spread(whole, 1)
    medians = {name: one["median"] for name, one in spreads.items()}
    rest = total["median"] - sum(medians.values())
    medians["event loop, network stack and all else"] = max(0.0, rest)
    rows = [
        [name, show(spreads[name], "{:.0f}") if name in spreads else f"{value:.0f}", f"{value / total['median']:.0%}"]
        for name, value in medians.items()
    ]
    rows.append(["measured under full load", show(total, "{:.0f}"), "100%"])
    tables = [table("The master's CPU per W1 request, c = 64", ["stage", "µs", "share"], rows)]
    print_tables(tables)
    write_result("hot_path", facts, {
        "about": "CPU of the master per W1 request, by stage", "runs": runs, "tables": tables, "stages_us": spreads,
        "total_us": total, "rest_us": round(rest, 1),
    })  # fmt: skip
    draw(medians, total["median"])
    if given.write_docs:
        report.write()


if __name__ == "__main__":
    main()

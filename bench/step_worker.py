"""W4 through the server itself: master, one worker process, its queues, seats and codecs; only the network's time and,
for rivals, the policy are not its own (`bench/step_curves.py`).

Requests come when they come, whether or not others are done (Poisson, as in the simulation). A latency counts from the
moment when the request was to come until its image is there. All is told in the seconds of the curves.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager
from typing import Any

import httpx
import orjson

from bench.runs import show, spread, table
from bench.servers import Server, ours, wait_until
from bench.step_curves import FASTER, POLICY
from bench.step_load import OURS, RIVALS, STEPS, Request, alone

SHIPPED = f"{OURS}, default seats"
NAMES = (OURS, *RIVALS, SHIPPED)
SEATS = 1_024  # more than requests in a run: whoever has come sits at the worker, and its policy sees all of them
PROBES = 5


@contextmanager
def server(name: str, faster: float) -> Iterator[Server]:
    """One that asks the policy of that name."""
    seats = () if name == SHIPPED else ("--seats", str(SEATS))
    environ = {POLICY: OURS if name == SHIPPED else name, FASTER: str(faster), "CUDA_VISIBLE_DEVICES": ""}
    with ours(
        *seats, "--threads", "1", models="bench/models", offer="curve_sd,curve_edit", path="/run/", devices="cpu:1",
        environ={**os.environ, **environ},
    ) as made:
        yield made


def on_workers(works: Mapping[str, Sequence[Request]], faster: float) -> dict[str, tuple[int, int]]:
    """Send each policy's requests to a server of its own, all at the same time, in real time; each request then knows
    when it ended. The servers are asleep for nearly all of it, and what disturbs one disturbs all. By policy, how many
    forwards of the denoiser there were, and their rows. Ends the program when a request is not answered."""
    with ExitStack() as open_ones:
        servers = {name: open_ones.enter_context(server(name, faster)) for name in works}
        asyncio.run(_send_all(servers, works, faster))
        return {name: _counted(made) for name, made in servers.items()}


def _counted(made: Server) -> tuple[int, int]:
    told: dict[str, int] = {}

    def at_rest() -> bool:
        (device,) = orjson.loads(made.get("/system/status"))["devices"]
        told.update(device["steps"])
        return not told["running"]

    wait_until(made, at_rest)
    return told["forwards"], told["rows"]


async def _send_all(servers: Mapping[str, Server], works: Mapping[str, Sequence[Request]], faster: float) -> None:
    async with AsyncExitStack() as open_ones:
        clients = {name: await open_ones.enter_async_context(_client(made)) for name, made in servers.items()}
        began = time.perf_counter()

        async def one(client: httpx.AsyncClient, request: Request) -> None:
            await asyncio.sleep(began + request.came / faster - time.perf_counter())
            await _send(client, request)
            request.ended = (time.perf_counter() - began) * faster

        await asyncio.gather(*(one(clients[name], request) for name, work in works.items() for request in work))


def _client(made: Server) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=made.url, timeout=600.0, limits=httpx.Limits(max_connections=None))


async def _send(client: httpx.AsyncClient, request: Request) -> httpx.Response:
    fields = {"steps": request.steps, "adapters": request.adapters, "priority": f"P{request.priority}"}
    parts: Any = {name: (None, str(value)) for name, value in fields.items()}  # a form without files: words only
    answer = await client.post(f"curve_{request.kind}", files=parts)
    if answer.status_code != 200:
        raise SystemExit(f"a request was not answered with its image: {answer.status_code} {answer.text[:500]}")
    request.done = request.calls
    return answer


def overhead(faster: float) -> dict[str, Any]:
    """What everything around the network costs a request that is alone: at the worker, and on the way there and back.
    Real time, not that of the curves."""
    with server(OURS, faster) as made:
        return asyncio.run(_overhead(made, faster))


async def _overhead(made: Server, faster: float) -> dict[str, Any]:
    rows = []
    async with _client(made) as client:
        for kind, steps in ((one, many) for one, both in STEPS.items() for many in both):
            calls, ways, parts = [], [], []
            for _ in range(PROBES):
                request, began = Request(0, 0.0, kind, steps, 0, 2), time.perf_counter()
                answer = await _send(client, request)
                whole, worker = time.perf_counter() - began, float(answer.headers["x-compute-ms"]) / 1e3
                network = alone(kind, steps) / faster
                calls.append(1e6 * (worker - network) / request.calls)
                parts.append(100 * (worker / network - 1))
                ways.append(1e3 * (whole - worker))
            rows.append([
                f"{kind}, {steps} steps", show(spread(calls, 0), "{:.0f}"), show(spread(parts, 1), "{:.1f}", " %"),
                show(spread(ways, 1), "{:.1f}"),
            ])
    head = ["class", "worker, µs a call", "of the network's time", "way there and back, ms a request"]
    return table(f"What is not the network, {faster:g} times as fast: a request that is alone", head, rows)

"""How soon `/health/live` answers while somebody attacks, beside an empty server on the same machine.

    python -m bench.liveness [--runs 3] [--seconds 5] [--quick]

Under each load one kept connection asks this server, and another one the empty server, every few milliseconds; what the
machine itself makes of the load (clients included) is seen by the second. The loads: none, 128 clients of `/run`, and
each of `bench.hostile`, from four connections. Writes bench/results/liveness.json and liveness.png.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

import uvloop
from rich.progress import Progress

from bench.common import machine_facts, write_result
from bench.hostile import ATTACKS
from bench.runs import OURS, goal, noise_png, parser, plot, print_tables, save, show, spread, table
from bench.servers import ROOT, Peer, Server, ours, peer

EMPTY = Peer("empty", "bench.peers.empty", (), "/", "/")
LIVE = b"GET /health/live HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
EVERY = 0.005  # seconds between two questions
GIVE_UP = 10.0  # seconds after which an answer is not waited for any more
MOST = 50.0  # milliseconds that 99 of 100 answers may take
QUIET, CLIENTS = "nothing", "128 clients of /run"
WARM_UP = 1.0
PACKAGES = ("uvicorn", "uvloop", "httptools", "starlette", "orjson")


class Waits(NamedTuple):
    """Milliseconds."""

    p50: float
    p99: float
    most: float


Found = dict[str, dict[str, list[Waits]]]  # by load and server, a measurement per round


async def ask(port: int, seconds: float) -> Waits:
    """One kept connection's questions."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    taken = []
    end = time.perf_counter() + seconds
    with contextlib.suppress(TimeoutError):
        while (began := time.perf_counter()) < end:
            async with asyncio.timeout(GIVE_UP):
                await _question(reader, writer)
            taken.append((time.perf_counter() - began) * 1e3)
            await asyncio.sleep(EVERY)
    if time.perf_counter() - began > GIVE_UP:
        taken.append(GIVE_UP * 1e3)
    writer.transport.abort()
    taken.sort()
    return Waits(*(round(taken[min(len(taken) - 1, int(len(taken) * part))], 2) for part in (0.5, 0.99, 1.0)))


async def _question(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(LIVE)
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    await reader.readexactly(length)


async def ask_both(server: Server, empty: Server, seconds: float) -> tuple[Waits, Waits]:
    """Both at the same time."""
    await asyncio.sleep(WARM_UP)
    mine, theirs = await asyncio.gather(ask(server.port, seconds), ask(empty.port, seconds))
    return mine, theirs


def attacker(name: str, server: Server, body: str, seconds: float) -> list[str]:
    """The command of the process that makes this load."""
    long = str(seconds + WARM_UP + 1.0)
    if name == CLIENTS:
        more = ("--body", body, "-c", "128", "--seconds", long, "--warm-up", "0")
        return [sys.executable, "-m", "bench.load", server.url, *more]
    return [sys.executable, "-m", "bench.hostile", f"http://127.0.0.1:{server.port}", name, "--seconds", long]


def measure(runs: int, seconds: float) -> Found:
    """Every round starts both servers anew and goes through all loads."""
    found: Found = {}
    loads = [QUIET, CLIENTS, *ATTACKS]
    with tempfile.NamedTemporaryFile(suffix=".png") as body, Progress(refresh_per_second=1) as progress:
        body.write(noise_png())
        body.flush()
        task = progress.add_task("", total=runs * len(loads))
        for number in range(runs):
            with ours("--dialects", "jobs,i2ii,openai") as server, peer(EMPTY, "echo") as empty:
                for name in loads:
                    progress.update(task, description=f"round {number + 1}: {name}")
                    process = None
                    if name != QUIET:
                        command = attacker(name, server, body.name, seconds)
                        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
                    mine, theirs = uvloop.run(ask_both(server, empty, seconds))
                    if process is not None:
                        process.wait()
                    told = found.setdefault(name, {OURS: [], EMPTY.name: []})
                    told[OURS].append(mine)
                    told[EMPTY.name].append(theirs)
                    progress.advance(task)
    return found


def rows(found: Found) -> list[list[str]]:
    """The table's."""
    return [
        [name, *(show(spread(getattr(one, what) for one in told[server]), "{:.1f}")
                 for server in (OURS, EMPTY.name) for what in ("p50", "p99", "most"))]
        for name, told in found.items()
    ]  # fmt: skip


def draw(found: Found) -> None:
    figure, axis = plot().subplots(figsize=(8, 4), layout="constrained")
    for number, (server, colour) in enumerate(((OURS, "#d1495b"), (EMPTY.name, "#9fb4c7"))):
        medians = [spread(one.p99 for one in told[server])["median"] for told in found.values()]
        places = [place + 0.4 * number for place in range(len(found))]
        axis.barh(places, medians, 0.4, color=colour, label=server)
    axis.set_yticks([place + 0.2 for place in range(len(found))], list(found), fontsize=8)
    axis.axvline(MOST, color="#666666", linestyle=":", linewidth=1)
    axis.set_xlabel("P99 of /health/live in milliseconds (dotted: the goal)", fontsize=8)
    axis.invert_yaxis()
    axis.legend(fontsize=8)
    save(figure, "liveness")


def main() -> None:
    arguments = parser(__doc__, runs=3)
    arguments.add_argument("--seconds", type=float, default=5.0)
    given = arguments.parse_args()
    runs, seconds = (1, 2.0) if given.quick else (given.runs, given.seconds)
    facts = machine_facts(PACKAGES)
    found = measure(runs, seconds)
    reached: list[dict[str, Any]] = []
    for name, told in found.items():
        tail = spread(one.p99 for one in told[OURS])
        beside = spread(one.p99 for one in told[EMPTY.name])["median"]
        what = f"P99 of /health/live under {name} (the empty server: {beside:.1f} ms)"
        reached.append(goal(what, f"< {MOST:g} ms", tail, tail["median"] < MOST, "{:.1f}", " ms"))
    head = ["load", "P50 ms", "P99 ms", "most ms", "empty: P50 ms", "P99 ms", "most ms"]
    shown = table("/health/live on a kept connection while somebody attacks", head, rows(found))
    print_tables([shown], reached)
    write_result("liveness", facts, {
        "about": "/health/live under attack, beside an empty server", "runs": runs, "seconds": seconds,
        "goals": reached, "tables": [shown], "waits": found,
    })  # fmt: skip
    draw(found)


if __name__ == "__main__":
    main()

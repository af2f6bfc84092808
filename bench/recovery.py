"""What a SIGKILL costs: how soon a dead worker is noticed, how soon its jobs run elsewhere, and whether a job is lost.

    python -m bench.recovery [--kills 100] [--quick]

Three workers under load of durable jobs. A random worker is killed again and again, and with every tenth kill the
master itself, which is then started on the same folder. In the end every job whose 202 was sent must have succeeded.
Times are read from the jobs' own histories. Writes bench/results/recovery.json and recovery.png.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import random
import signal
import tempfile
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import psutil
from PIL import Image
from rich.progress import Progress

from bench.common import machine_facts, photograph, write_result
from bench.runs import goal, parser, plot, print_tables, save, show, spread, table
from bench.servers import Server, ours, wait_until

CLIENTS = 12
MASTER_EVERY = 10
BATCH_MS = 60


@dataclass(slots=True)
class Told:
    """What was done and what came of it. Times are unix seconds."""

    accepted: list[str] = field(default_factory=list)
    kills: list[float] = field(default_factory=list)  # of workers
    masters: int = 0
    jobs: list[dict[str, Any]] = field(default_factory=list)


async def submit(server: Server, told: Told, body: bytes, until: asyncio.Event) -> None:
    """One client: the next job when this one is accepted and has ended, or the server is gone."""
    url = f"http://127.0.0.1:{server.port}/jobs?model=stub&base_ms={BATCH_MS}"
    async with httpx.AsyncClient(timeout=60) as client:
        while not until.is_set():
            with contextlib.suppress(httpx.HTTPError):
                answer = await client.post(url, content=body, headers={"content-type": "image/png"})
                if answer.status_code == 202:
                    told.accepted.append(answer.json()["id"])
                    await client.get(f"http://127.0.0.1:{server.port}/jobs/{told.accepted[-1]}/events")
                    continue
            await asyncio.sleep(0.05)


async def one_life(server: Server, told: Told, body: bytes, kills: int, tick: Any) -> None:
    """Kill workers under load, in the end the master."""
    over = asyncio.Event()
    clients = [asyncio.create_task(submit(server, told, body, over)) for _ in range(CLIENTS)]
    for _ in range(kills):
        await asyncio.sleep(0.3 + random.random() * 0.2)
        with contextlib.suppress(psutil.NoSuchProcess, IndexError):
            random.choice(server.workers()).send_signal(signal.SIGKILL)
            told.kills.append(time.time())
        tick()
        await asyncio.to_thread(wait_until, server, server.all_ready)
    over.set()
    server.process.kill()
    told.masters += 1
    tick()
    await asyncio.gather(*clients)


async def collect(server: Server, told: Told) -> None:
    """Wait for the end of every accepted job and read it."""
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=60) as client:
        for name in told.accepted:
            while True:
                answer = await client.get(f"/jobs/{name}")
                job = answer.json()
                if answer.status_code != 200 or job["state"] not in ("queued", "running"):
                    told.jobs.append(job)
                    break
                await asyncio.sleep(0.1)


def measure(kills: int) -> Told:
    told, body = Told(), io.BytesIO()
    Image.fromarray(photograph(64)).save(body, "PNG")
    lives = max(1, round(kills / MASTER_EVERY))
    flags = ("--restart-backoff", "100ms")
    with tempfile.TemporaryDirectory(prefix="imagepool-bench-") as folder, Progress(refresh_per_second=1) as progress:
        start = {"offer": "stub", "devices": "cpu:3", "outputs": Path(folder)}
        task = progress.add_task("kills", total=lives * MASTER_EVERY)
        for _ in range(lives):
            with ours(*flags, **start) as server:  # type: ignore[arg-type]
                asyncio.run(one_life(server, told, body.getvalue(), MASTER_EVERY - 1, lambda: progress.advance(task)))
        with ours(*flags, **start) as server:  # type: ignore[arg-type]
            asyncio.run(collect(server, told))
    return told


def delays(told: Told) -> tuple[list[float], list[float]]:
    """Milliseconds from each kill that hit a job until it waited again, and until the first of them ran elsewhere."""
    noticed: dict[float, float] = {}
    elsewhere: dict[float, float] = {}
    for job in told.jobs:
        history = job.get("history", [])
        for move, after in pairwise(history):
            if move["state"] != "queued" or "lost" not in (move["why"] or ""):
                continue
            kill = max((at for at in told.kills if at <= move["at"]), default=None)
            if kill is None:
                continue
            noticed[kill] = min(noticed.get(kill, 1e9), 1e3 * (move["at"] - kill))
            elsewhere[kill] = min(elsewhere.get(kill, 1e9), 1e3 * (after["at"] - kill))
    return list(noticed.values()), list(elsewhere.values())


def draw(noticed: list[float], elsewhere: list[float]) -> None:
    figure, axis = plot().subplots(figsize=(6, 3.2), layout="constrained")
    for values, name, colour in ((noticed, "noticed", "#30638e"), (elsewhere, "a job of it runs elsewhere", "#d1495b")):
        shares = [100 * (place + 1) / len(values) for place in range(len(values))]
        axis.step(sorted(values), shares, label=name, color=colour)
    axis.axvline(200, color="#666666", linestyle=":", linewidth=1, label="goal: noticed")
    axis.set_xscale("log")
    axis.set_xlabel("milliseconds after SIGKILL", fontsize=8)
    axis.set_ylabel("% of the kills", fontsize=8)
    axis.legend(fontsize=8)
    axis.set_title("Recovery from the death of a worker", fontsize=10, loc="left")
    save(figure, "recovery")


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--kills", type=int, default=100, help="of workers and of the master [100]")
    given = arguments.parse_args()
    facts = machine_facts(("uvicorn", "httpx"))
    told = measure(20 if given.quick else given.kills)
    noticed, elsewhere = delays(told)
    lost = [job for job in told.jobs if job.get("state") != "succeeded"]
    seen, ran = spread(noticed, 1), spread(elsewhere, 1)
    kills = len(told.kills) + told.masters
    none = {"median": len(lost), "min": len(lost), "max": len(lost)}
    goals = [
        goal("a SIGKILLed worker is noticed, the slowest", "< 200 ms", seen, seen["max"] < 200, "{:.1f}", " ms"),
        goal("jobs lost", f"0 of {len(told.accepted)} accepted in {kills} kills", none, not lost, "{:.0f}"),
    ]
    tables = [table("Recovery", ["", ""], [
        ["workers killed, of them while running jobs", f"{len(told.kills)}, {len(noticed)}"],
        ["masters killed and started again", str(told.masters)],
        ["jobs accepted / lost", f"{len(told.accepted)} / {len(lost)}"],
        ["noticed after", show(seen, "{:.1f}", " ms")],
        ["the first of its jobs runs elsewhere after", show(ran, "{:.1f}", " ms")],
    ])]  # fmt: skip
    print_tables(tables, goals)
    for job in lost[:5]:
        print("lost:", job)
    write_result("recovery", facts, {
        "about": "SIGKILL of workers and of the master under a load of durable jobs", "goals": goals, "tables": tables,
        "kills": len(told.kills), "masters": told.masters, "accepted": len(told.accepted), "lost": len(lost),
        "noticed_ms": seen, "elsewhere_ms": ran,
    })  # fmt: skip
    draw(noticed, elsewhere)


if __name__ == "__main__":
    main()

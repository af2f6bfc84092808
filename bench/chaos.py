"""Whether the pool keeps its word while somebody kills it: SIGKILL and SIGSTOP of workers, SIGKILL of the server.

    python -m bench.chaos [--kills 100] [--quick]

Four workers under load of durable jobs and of `/run`. Random workers are killed (one of eight is stopped instead) while
others are still starting; every fiftieth time it is the server itself, which is then started on the same folder. In the
end every job whose 202 was sent must have succeeded, once, with the bytes that an undisturbed server gives, and nobody
is blamed. Writes bench/results/chaos.json.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from PIL import Image
from rich.progress import Progress

from bench.common import machine_facts, photograph, write_result
from bench.runs import goal, parser, print_tables, table
from bench.servers import Server, ours

DURABLE, RUNNING = 8, 4  # clients
MASTER_EVERY, STOP_EVERY = 50, 8
VARIANTS = 16
ENDS = {"succeeded", "failed", "cancelled", "expired"}
HEADERS = {"content-type": "image/png"}


@dataclass(slots=True)
class Told:
    """What was done and what came of it. accepted: variants by job. counts: outcomes, of which only `right` and
    `refused` (a 503, or no server) are good ones."""

    accepted: dict[str, int] = field(default_factory=dict)
    done: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def note(self, outcome: str, detail: str = "") -> None:
        self.counts[outcome] += 1
        if outcome not in ("right", "refused", "run"):
            self.faults.append(f"{outcome}: {detail}")


def query(variant: int) -> dict[str, str]:
    return {"base_ms": "40", "per_item_ms": "5", "offset": str(variant)}


async def submit(client: httpx.AsyncClient, told: Told, body: bytes) -> None:
    """A durable job is accepted; its end is looked up later."""
    variant = random.randrange(VARIANTS)
    answer = await client.post("/jobs", params={"model": "stub", **query(variant)}, content=body, headers=HEADERS)
    if answer.status_code == 202:
        told.accepted[answer.json()["id"]] = variant
        await client.get(f"/jobs/{answer.json()['id']}", headers={"Prefer": "wait=2"})
    elif answer.status_code != 503:
        told.note("wrong", answer.text)


async def run(client: httpx.AsyncClient, told: Told, body: bytes, right: list[bytes]) -> None:
    """A request that waits for its result."""
    variant = random.randrange(VARIANTS)
    answer = await client.post("/run/stub", params=query(variant), content=body, headers=HEADERS)
    if answer.status_code == 200:
        told.note("run" if answer.content == right[variant] else "wrong", "bytes of /run")
    else:
        told.note("refused" if answer.status_code == 503 else "wrong", answer.text)


async def repeat(what: Callable[[], Any], told: Told, over: asyncio.Event) -> None:
    while not over.is_set():
        try:
            await what()
        except httpx.HTTPError:
            told.note("refused")
            await asyncio.sleep(0.05)


def works(server: Server) -> bool:
    """Whether a worker takes batches. The server is not ready (503) while none does."""
    with contextlib.suppress(OSError):
        return bool({"ready", "busy"} & set(server.devices().values()))
    return False


async def hurt(server: Server, told: Told) -> None:
    """Kill or stop a random worker as soon as one is there that takes batches."""
    while not await asyncio.to_thread(works, server):  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    stop = random.randrange(STOP_EVERY) == 0
    with contextlib.suppress(psutil.NoSuchProcess, IndexError):
        random.choice(server.workers()).send_signal(signal.SIGSTOP if stop else signal.SIGKILL)
        told.done["stopped" if stop else "killed"] += 1


async def one_life(server: Server, told: Told, body: bytes, right: list[bytes], kills: int, tick: Any) -> None:
    over = asyncio.Event()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=120) as client:
        clients = [asyncio.create_task(repeat(lambda: submit(client, told, body), told, over)) for _ in range(DURABLE)]
        clients += [asyncio.create_task(repeat(lambda: run(client, told, body, right), told, over))
                    for _ in range(RUNNING)]
        for _ in range(kills):
            await asyncio.sleep(random.uniform(0.2, 0.8))
            await hurt(server, told)
            tick()
        over.set()
        server.process.kill()
        told.done["server killed"] += 1
        tick()
        await asyncio.gather(*clients)


async def references(server: Server, body: bytes) -> list[bytes]:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=120) as client:
        answers = [await client.post("/run/stub", params=query(variant), content=body, headers=HEADERS)
                   for variant in range(VARIANTS)]
    return [answer.raise_for_status().content for answer in answers]


async def collect(server: Server, told: Told, right: list[bytes]) -> None:
    """Wait for the end of every accepted job, and look at it."""
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=120) as client:
        for name, variant in told.accepted.items():
            job: dict[str, Any] = {"state": "queued"}
            while job.get("state") in ("queued", "running"):
                job = (await client.get(f"/jobs/{name}", headers={"Prefer": "wait=10"})).json()
            ends = [move["state"] for move in job.get("history", ()) if move["state"] in ENDS]
            if "state" not in job:
                told.note("lost", name)
            elif job["state"] != "succeeded":
                told.note("blamed" if job["error"]["code"] == "poisonous_job" else "failed", str(job["error"]))
            elif len(ends) != 1:
                told.note("ended twice", f"{name} {ends}")
            else:
                same = (await client.get(f"/jobs/{name}/result")).content == right[variant]
                told.note("right" if same else "wrong", f"bytes of {name}")


def measure(kills: int, tick: Callable[[], object] = lambda: None) -> Told:
    """`kills` in all, of workers and of the server."""
    told, picture = Told(), io.BytesIO()
    Image.fromarray(photograph(64)).save(picture, "PNG")
    body, left = picture.getvalue(), kills
    with tempfile.TemporaryDirectory(prefix="imagepool-bench-") as folder:
        start: dict[str, Any] = {"offer": "stub", "devices": "cpu:4", "outputs": Path(folder)}
        with ours(**start) as server:
            right = asyncio.run(references(server, body))
        while left > 0:
            some = min(left, MASTER_EVERY)
            with ours(**start) as server:
                asyncio.run(one_life(server, told, body, right, some - 1, tick))
            left -= some
        with ours(**start) as server:
            asyncio.run(collect(server, told, right))
    return told


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--kills", type=int, default=100, help="of workers and of the server [100]")
    given = arguments.parse_args()
    facts, began, kills = machine_facts(("uvicorn", "httpx")), time.monotonic(), 20 if given.quick else given.kills
    with Progress(refresh_per_second=1) as progress:
        task = progress.add_task("kills", total=kills)
        told = measure(kills, lambda: progress.advance(task))
    bad = {kind: told.counts[kind] for kind in ("lost", "blamed", "failed", "ended twice", "wrong")}
    goals = [
        goal(kind, f"0 of {len(told.accepted)} durable jobs", dict.fromkeys(("median", "min", "max"), count), not count,
             "{:.0f}")
        for kind, count in bad.items()
    ]
    rows = [[what, str(count)] for what, count in (*told.done.items(), *told.counts.items())]
    tables = [table("Chaos", ["", ""], [*rows, ["seconds", f"{time.monotonic() - began:.0f}"]])]
    print_tables(tables, goals)
    for fault in told.faults[:5]:
        print(fault)
    write_result("chaos", facts, {
        "about": "workers killed and stopped, the server killed, under durable jobs and /run", "goals": goals,
        "tables": tables, "done": dict(told.done), "accepted": len(told.accepted), "counts": dict(told.counts),
    })  # fmt: skip


if __name__ == "__main__":
    main()

"""What the server takes while nobody asks: CPU of all its processes, memory of the master and of an idle CPU worker.

    python -m bench.idle [--runs 5] [--seconds 20] [--quick]

With its usual models, loaded and warm. Writes bench/results/idle.json and idle.png.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.progress import Progress

from bench.common import machine_facts, write_result
from bench.runs import goal, parser, plot, print_tables, save, show, spread, table
from bench.servers import ours

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Rest:
    """CPU in percent of a core, resident memory in MiB (that of a worker: the largest)."""

    cpu: float
    master_cpu: float
    master_rss: float
    worker_rss: float
    worker_own: float  # without pages shared with other processes


def rest(models: str, seconds: float) -> Rest:
    """A server that has started and is left alone."""
    with ours(models="models/repository", offer=models) as server:
        time.sleep(2.0)  # what belongs to the start is over
        before, began = server.cost(), time.perf_counter()
        time.sleep(seconds)
        after, took = server.cost(), time.perf_counter() - began
        memory = [worker.memory_full_info() for worker in server.workers()]
        return Rest(
            100 * (after.tree - before.tree) / took, 100 * (after.master - before.master) / took,
            after.master_rss / MIB, max(one.rss for one in memory) / MIB, max(one.uss for one in memory) / MIB,
        )  # fmt: skip


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--seconds", type=float, default=20.0)
    arguments.add_argument("--models", default="", help="names, separated by commas; all when empty")
    given = arguments.parse_args()
    runs, seconds = (2, 5.0) if given.quick else (given.runs, given.seconds)
    facts = machine_facts(("torch", "numpy", "fastapi", "uvicorn"))
    with Progress(refresh_per_second=1) as progress:
        found = [rest(given.models, seconds) for _ in progress.track(range(runs), description="idle")]
    cpu, master_cpu, master, worker, own = (
        spread(getattr(one, name) for one in found)
        for name in ("cpu", "master_cpu", "master_rss", "worker_rss", "worker_own")
    )
    whole = partial(show, form="{:.0f}", unit=" MiB")
    goals = [
        goal("CPU of the idle server", "< 1 % of a core", cpu, cpu["median"] < 1, unit=" %"),
        goal("memory of the master", "≤ 200 MB", master, master["median"] * MIB <= 200e6, "{:.0f}", " MiB"),
        goal("memory of an idle CPU worker", "≤ 450 MB", worker, worker["median"] * MIB <= 450e6, "{:.0f}", " MiB"),
    ]
    tables = [table("Idle, two CPU workers with all models", ["", ""], [
        ["CPU of all processes", show(cpu, unit=" %")], ["of it the master", show(master_cpu, unit=" %")],
        ["master, resident", whole(master)], ["a worker, resident", whole(worker)],
        ["of it shared with nobody", whole(own)],
    ])]  # fmt: skip
    print_tables(tables, goals)
    write_result("idle", facts, {
        "about": "two CPU workers with all models, left alone", "runs": runs, "seconds": seconds, "goals": goals,
        "tables": tables, "cpu_percent": cpu, "master_mib": master, "worker_mib": worker, "worker_own_mib": own,
    })  # fmt: skip
    draw(found)


def draw(found: list[Rest]) -> None:
    figure, (left, right) = plot().subplots(1, 2, figsize=(7, 3), layout="constrained")
    panels: tuple[tuple[Any, list[str], list[str], float, str], ...] = (
        (left, ["cpu", "master_cpu"], ["all processes", "master"], 1.0, "% of a core"),
        (right, ["master_rss", "worker_rss"], ["master", "a worker"], 450e6 / MIB, "MiB resident"),
    )
    for axis, names, labels, limit, unit in panels:
        values = [spread(getattr(one, name) for one in found)["median"] for name in names]
        bars = axis.bar(labels, values, color=["#d1495b", "#30638e"])
        axis.bar_label(bars, [f"{value:.2f}" if value < 10 else f"{value:.0f}" for value in values], fontsize=8)
        axis.axhline(limit, color="#666666", linestyle=":", linewidth=1)
        axis.set_ylabel(unit, fontsize=8)
    figure.suptitle("The idle server (dotted: the goal)", fontsize=10)
    save(figure, "idle")


if __name__ == "__main__":
    main()

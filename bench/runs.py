"""What benches of running servers have in common: the command line, one measured load, medians with their spread."""

from __future__ import annotations

import argparse
import asyncio
import io
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import uvloop
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench.common import RESULTS
from bench.load import Run
from bench.servers import Server

OURS = "ImagePool"
COLOURS = {OURS: "#d1495b", "mosec": "#30638e", "LitServe": "#9fb4c7", "naive FastAPI": "#c9ada7", "limit": "#666666"}


@dataclass(frozen=True, slots=True)
class Measured:
    """One load on one server. Seconds and requests per second; CPU milliseconds per request."""

    rate: float
    p50: float
    p99: float
    errors: int
    cpu_ms: float
    master_cpu_ms: float


Found = dict[str, dict[int, list[Measured]]]  # by server and connections, a measurement per round


def parser(about: str | None, runs: int = 5) -> argparse.ArgumentParser:
    """A command line with what every bench takes."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=runs, help=f"rounds, each of all servers in turn [{runs}]")
    parser.add_argument("--quick", action="store_true", help="two short rounds, for a look")
    return parser


def load(server: Server, body: bytes, connections: int, seconds: float, warm_up: float = 1.0) -> Measured:
    """A closed loop of so many connections for so long."""

    async def go() -> Measured:
        run = Run(server.url, body, "image/png", [])
        task = asyncio.create_task(run.go(connections, warm_up, seconds))
        await asyncio.sleep(warm_up)
        before = server.cost()
        await asyncio.sleep(seconds)
        after = server.cost()
        result = await task
        each = 1e3 / max(1, result.requests)
        return Measured(
            result.rate, result.p50, result.p99, result.errors,
            (after.tree - before.tree) * each, (after.master - before.master) * each,
        )

    return uvloop.run(go())


def rounds(
    makers: Mapping[str, Callable[[], AbstractContextManager[Server]]], body: bytes, runs: int, seconds: float,
    connections: Sequence[int],
) -> Found:
    """Every round starts each server anew, alone, and puts the same loads on it."""
    found: Found = {name: {count: [] for count in connections} for name in makers}
    with Progress(refresh_per_second=1) as progress:
        task = progress.add_task("", total=runs * len(makers) * len(connections))
        for number in range(runs):
            for name, make in makers.items():
                progress.update(task, description=f"round {number + 1}: {name}")
                with make() as server:
                    for count in connections:
                        found[name][count].append(load(server, body, count, seconds))
                        progress.advance(task)
    return found


def ratio(found: Found, count: int, other: str) -> dict[str, float]:
    """Our rate over another's, round by round."""
    pairs = zip(found[OURS][count], found[other][count], strict=True)
    return spread(mine.rate / max(theirs.rate, 1e-9) for mine, theirs in pairs)


def best_peer(found: Found, count: int) -> str:
    """Whoever has the highest median rate, us left out."""
    others = [name for name in found if name != OURS]
    return max(others, key=lambda name: spread(m.rate for m in found[name][count])["median"])


def as_data(found: Found) -> Mapping[str, Any]:
    """The measurements as they are written."""
    return {
        name: {
            str(count): {
                "rate": spread(m.rate for m in all_rounds), "p50_ms": spread(m.p50 * 1e3 for m in all_rounds),
                "p99_ms": spread(m.p99 * 1e3 for m in all_rounds), "cpu_ms": spread(m.cpu_ms for m in all_rounds),
                "master_cpu_ms": spread(m.master_cpu_ms for m in all_rounds),
                "errors": sum(m.errors for m in all_rounds),
            }
            for count, all_rounds in counts.items()
        }
        for name, counts in found.items()
    }  # fmt: skip


def noise_png(size: int = 500_000) -> bytes:
    """A PNG of about so many bytes, always the same one."""
    side = math.isqrt(size // 3)
    pixels = np.random.default_rng(7).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def spread(values: Iterable[float], digits: int = 2) -> dict[str, float]:
    """Median, least and most."""
    found = [value for value in values if not math.isnan(value)] or [math.nan]
    return {
        "median": round(statistics.median(found), digits), "min": round(min(found), digits),
        "max": round(max(found), digits),
    }


def show(found: Mapping[str, float], form: str = "{:.2f}", unit: str = "") -> str:
    """A spread as text: median (least–most)."""
    return f"{form.format(found['median'])}{unit} ({form.format(found['min'])}–{form.format(found['max'])})"


def goal(
    what: str, goal: str, found: Mapping[str, float], met: bool, form: str = "{:.2f}", unit: str = ""
) -> dict[str, Any]:
    """One line of the table of goals."""
    return {"what": what, "goal": goal, "measured": show(found, form, unit), "met": bool(met)}


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> dict[str, Any]:
    """A table for the console and for docs/performance.md."""
    return {"title": title, "head": list(head), "rows": [list(row) for row in rows]}


def print_tables(tables: Iterable[Mapping[str, Any]], goals: Iterable[Mapping[str, Any]] = ()) -> None:
    console = Console(width=140)
    for told in tables:
        shown = Table(*told["head"], title=told["title"], title_justify="left")
        for row in told["rows"]:
            shown.add_row(*row)
        console.print(shown)
    for one in goals:
        mark = "[green]met[/]" if one["met"] else "[red]not met[/]"
        console.print(f"{one['what']}: goal {one['goal']}, measured {one['measured']}: {mark}")


def plot() -> Any:
    """matplotlib's pyplot, drawing to files."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(figure: Any, name: str) -> None:
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / f"{name}.png", dpi=110)

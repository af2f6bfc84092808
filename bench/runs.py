"""What benches of running servers have in common: the command line, one measured load, medians with their spread."""

from __future__ import annotations

import argparse
import asyncio
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import uvloop
from PIL import Image

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


def noise_png(size: int = 500_000) -> bytes:
    """A PNG of about so many bytes, always the same one."""
    import io

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


def goal(what: str, goal: str, found: Mapping[str, float], met: bool, form: str = "{:.2f}", unit: str = "") -> dict[str, Any]:
    """One line of the table of goals."""
    return {"what": what, "goal": goal, "measured": show(found, form, unit), "met": bool(met)}


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> dict[str, Any]:
    """A table for the console and for docs/performance.md."""
    return {"title": title, "head": list(head), "rows": [list(row) for row in rows]}


def print_tables(tables: Iterable[Mapping[str, Any]], goals: Iterable[Mapping[str, Any]] = ()) -> None:
    from rich.console import Console
    from rich.table import Table

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

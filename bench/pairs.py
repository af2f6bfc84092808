"""This checkout against an older one: W1 and W3 in alternating pairs, to see whether a change made the server slower.

    git worktree add ../before <commit>
    python -m bench.pairs ../before [--runs 5] [--seconds 4] [--quick]

Each pair starts both servers anew, one after the other, the older first in every other pair, and puts the same loads on
them; a ratio is taken within a pair. Both run in this environment. Writes bench/results/pairs.json and pairs.png.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import uvloop
from rich.progress import Progress

from bench import inpaint
from bench.common import machine_facts, write_result
from bench.runs import goal, load, noise_png, parser, plot, print_tables, save, show, spread, table
from bench.servers import IOPAINT, Server, ours

BEFORE, NOW = "before", "now"
CONNECTIONS = (1, 6, 64)
LEAST = 0.97  # of the older one's requests a second
PACKAGES = ("uvicorn", "uvloop", "httptools", "starlette", "fastapi", "torch")



class Measured(NamedTuple):
    """Requests per second, and CPU milliseconds of all the server's processes per request."""

    rate: float
    cpu_ms: float


Found = dict[str, dict[str, list[Measured]]]  # by load and checkout, a measurement per pair
Start = Callable[..., AbstractContextManager[Server]]
Work = Callable[[Server], dict[str, Measured]]


def overhead(seconds: float) -> Work:
    """W1, by connections."""
    body = noise_png()

    def measured(server: Server, connections: int) -> Measured:
        told = load(server, body, connections, seconds)
        return Measured(told.rate, told.cpu_ms)

    return lambda server: {f"W1, c = {count}": measured(server, count) for count in CONNECTIONS}


def filling(picture: str) -> Work:
    """W3 with this picture: a fixed number of requests."""
    case = inpaint.PICTURES[picture]()

    def measured(server: Server, connections: int) -> Measured:
        count = inpaint.REQUESTS[connections][1]
        uvloop.run(inpaint.Fixed(server.url, case.body, inpaint.WARM).all(min(connections, inpaint.WARM)))
        before = server.cost()
        seconds, _ = uvloop.run(inpaint.Fixed(server.url, case.body, count).all(connections))
        return Measured(count / seconds, (server.cost().tree - before.tree) * 1e3 / count)

    return lambda server: {f"W3, {picture}, c = {count}": measured(server, count) for count in CONNECTIONS}


def works(cache: Path, seconds: float) -> Iterator[tuple[Start, Work]]:
    """What is measured, and how its server is started."""
    yield ours, overhead(seconds)
    start = partial(
        ours, models="models/repository", offer="lama", path=IOPAINT.path, devices=f"cpu:{psutil.cpu_count()}",
        environ={"XDG_CACHE_HOME": str(cache)},
    )  # fmt: skip
    for picture in inpaint.PICTURES:
        yield start, filling(picture)


def measure(roots: dict[str, Path], runs: int, seconds: float) -> Found:
    """The pairs."""
    found: Found = {}
    with inpaint.weights(4, 1) as (cache, _), Progress(refresh_per_second=1) as progress:
        all_works = list(works(cache, seconds))
        task = progress.add_task("", total=runs * len(all_works) * 2)
        for number in range(runs):
            for start, work in all_works:
                for name in (BEFORE, NOW) if number % 2 == 0 else (NOW, BEFORE):
                    progress.update(task, description=f"pair {number + 1}: {name}")
                    with start(root=roots[name]) as server:
                        for which, measured in work(server).items():
                            found.setdefault(which, {BEFORE: [], NOW: []})[name].append(measured)
                    progress.advance(task)
    return found


def ratios(pairs: dict[str, list[Measured]], what: str = "rate") -> list[float]:
    """Now over before, pair by pair."""
    return [
        getattr(now, what) / getattr(before, what) for now, before in zip(pairs[NOW], pairs[BEFORE], strict=True)
    ]


def rows(found: Found) -> Iterator[list[str]]:
    """The table's."""
    for which, pairs in found.items():
        rates = [show(spread(one.rate for one in pairs[name]), "{:,.1f}") for name in (BEFORE, NOW)]
        yield [which, *rates, *(show(spread(ratios(pairs, what), 3), "{:.3f}") for what in ("rate", "cpu_ms"))]


def draw(found: Found) -> None:
    figure, axis = plot().subplots(figsize=(7, 3.6), layout="constrained")
    axis.boxplot([ratios(pairs) for pairs in found.values()], tick_labels=list(found), orientation="horizontal")
    axis.axvline(1.0, color="#666666", linewidth=1)
    axis.axvline(LEAST, color="#d1495b", linestyle=":", linewidth=1)
    axis.set_xlabel("requests per second, now over before (dotted: the goal)", fontsize=8)
    axis.invert_yaxis()
    save(figure, "pairs")


def commit(root: Path) -> str:
    """What is checked out there."""
    told = subprocess.run(("git", "-C", str(root), "rev-parse", "--short", "HEAD"), capture_output=True, text=True)
    return told.stdout.strip() or "unknown"


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("before", type=Path, help="the older checkout")
    arguments.add_argument("--seconds", type=float, default=4.0)
    given = arguments.parse_args()
    runs, seconds = (2, 2.0) if given.quick else (given.runs, given.seconds)
    roots = {BEFORE: given.before.resolve(), NOW: Path(__file__).resolve().parent.parent}
    facts = machine_facts(PACKAGES)
    found = measure(roots, runs, seconds)
    reached: list[dict[str, Any]] = []
    for which, pairs in found.items():
        told = spread(ratios(pairs), 3)
        reached.append(goal(f"{which}: now over before", f"≥ {LEAST}", told, told["median"] >= LEAST, "{:.3f}"))
    head = ["load", "before, requests/s", "now, requests/s", "now over before", "CPU per request, now over before"]
    shown = table("This checkout against an older one", head, rows(found))
    print_tables([shown], reached)
    write_result("pairs", facts, {
        "about": f"W1 and W3 in alternating pairs: commit {commit(roots[NOW])} against {commit(roots[BEFORE])}",
        "runs": runs, "seconds": seconds, "goals": reached, "tables": [shown], "pairs": found,
    })  # fmt: skip
    draw(found)


if __name__ == "__main__":
    main()

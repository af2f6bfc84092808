"""This checkout against an older one: W1 and W3 in alternating slices, to see whether a change made the server slower.

    git worktree add ../before <commit>
    python -m bench.pairs ../before [--runs 5] [--quick]

A pair starts both servers, and both stand while short slices of one load go to the one and the other in turn, the older
first in every other slice: what the machine does meanwhile meets both. A ratio is taken of the sums within a pair. Both
run in this environment. Writes bench/results/pairs.json and pairs.png.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Sequence
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
SLICES = 10  # of W1, of each server
SECONDS = 0.4  # of such a slice
FILLED = {1: (4, 8), 6: (4, 18), 64: (2, 64)}  # W3, by connections: slices of each server, and requests of one
LEAST = 0.97  # of the older one's requests a second
PACKAGES = ("uvicorn", "uvloop", "httptools", "starlette", "fastapi", "torch")


class Measured(NamedTuple):
    """Requests, and the seconds and CPU seconds (of all the server's processes) that they took."""

    requests: float
    seconds: float
    cpu: float

    @property
    def rate(self) -> float:
        """Requests per second."""
        return self.requests / self.seconds

    @property
    def cpu_ms(self) -> float:
        """CPU milliseconds per request."""
        return self.cpu / self.requests * 1e3


class Load(NamedTuple):
    """`slice` puts it on a server once; so many slices are put on each of the two."""

    name: str
    slices: int
    slice: Callable[[Server], Measured]


Found = dict[str, dict[str, list[Measured]]]  # by load and checkout, a measurement per pair
Start = Callable[..., AbstractContextManager[Server]]


def overhead() -> Iterator[Load]:
    """W1, by connections."""
    body = noise_png()

    def measured(server: Server, connections: int) -> Measured:
        told = load(server, body, connections, SECONDS, warm_up=0.15)
        requests = told.rate * SECONDS
        return Measured(requests, SECONDS, told.cpu_ms * requests / 1e3)

    for count in CONNECTIONS:
        yield Load(f"W1, c = {count}", SLICES, partial(measured, connections=count))


def filling(picture: str) -> Iterator[Load]:
    """W3 with this picture, by connections: a fixed number of requests a slice."""
    case = inpaint.PICTURES[picture]()

    def measured(server: Server, connections: int, requests: int) -> Measured:
        before = server.cost()
        seconds, _ = uvloop.run(inpaint.Fixed(server.url, case.body, requests).all(connections))
        return Measured(requests, seconds, server.cost().tree - before.tree)

    for count in CONNECTIONS:
        slices, requests = FILLED[count]
        yield Load(f"W3, {picture}, c = {count}", slices, partial(measured, connections=count, requests=requests))


def works(cache: Path) -> Iterator[tuple[Start, list[Load]]]:
    """What is measured, and how its servers are started."""
    yield ours, list(overhead())
    start = partial(
        ours, models="models/repository", offer="lama", path=IOPAINT.path, devices=f"cpu:{psutil.cpu_count()}",
        environ={"XDG_CACHE_HOME": str(cache)},
    )  # fmt: skip
    yield start, [load for picture in inpaint.PICTURES for load in filling(picture)]


def measure(roots: dict[str, Path], runs: int) -> Found:
    """The pairs."""
    found: Found = {}
    with inpaint.weights(4, 1) as (cache, _), Progress(refresh_per_second=1) as progress:
        all_works = list(works(cache))
        task = progress.add_task("", total=runs * sum(len(loads) for _, loads in all_works))
        for number in range(runs):
            for start, loads in all_works:
                with start(root=roots[BEFORE]) as before, start(root=roots[NOW]) as now:
                    servers = {BEFORE: before, NOW: now}
                    for load in loads:
                        progress.update(task, description=f"pair {number + 1}: {load.name}")
                        sums = in_turn(load, servers)
                        for name, told in sums.items():
                            found.setdefault(load.name, {BEFORE: [], NOW: []})[name].append(told)
                        progress.advance(task)
    return found


def in_turn(load: Load, servers: dict[str, Server]) -> dict[str, Measured]:
    """The sums of the slices of one pair. The first slice of each server is not counted: it warms up."""
    taken: dict[str, list[Measured]] = {name: [] for name in servers}
    for number in range(load.slices + 1):
        for name in list(servers)[:: 1 if number % 2 else -1]:
            taken[name].append(load.slice(servers[name]))
    return {name: total(slices[1:]) for name, slices in taken.items()}


def total(slices: Sequence[Measured]) -> Measured:
    """All of them together."""
    return Measured(*map(sum, zip(*slices, strict=True)))


def ratios(pairs: dict[str, list[Measured]], what: str = "rate") -> list[float]:
    """Now over before, pair by pair."""
    return [getattr(now, what) / getattr(before, what) for now, before in zip(pairs[NOW], pairs[BEFORE], strict=True)]


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
    given = arguments.parse_args()
    runs = 2 if given.quick else given.runs
    roots = {BEFORE: given.before.resolve(), NOW: Path(__file__).resolve().parent.parent}
    facts = machine_facts(PACKAGES)
    found = measure(roots, runs)
    reached: list[dict[str, Any]] = []
    for which, pairs in found.items():
        told = spread(ratios(pairs), 3)
        reached.append(goal(f"{which}: now over before", f"≥ {LEAST}", told, told["median"] >= LEAST, "{:.3f}"))
    head = ["load", "before, requests/s", "now, requests/s", "now over before", "CPU per request, now over before"]
    shown = table("This checkout against an older one", head, rows(found))
    print_tables([shown], reached)
    write_result("pairs", facts, {
        "about": f"W1 and W3 in alternating slices: commit {commit(roots[NOW])} against {commit(roots[BEFORE])}",
        "runs": runs, "goals": reached, "tables": [shown], "pairs": found,
    })  # fmt: skip
    draw(found)


if __name__ == "__main__":
    main()

"""What a batch costs: processor seconds an image of every embedded model on a CPU, alone and with others.

    python -m bench.widths [--runs 3] [--side 640] [--models edit,upscale] [--quick]

The models run in this process, as a worker runs them, on one thread. Widths take turns, so that what else the machine
does meets all alike, and what counts is the time of this process, not that on the clock. Writes
bench/results/widths.json.
"""

from __future__ import annotations

import resource
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from rich.progress import Progress

from bench.common import machine_facts, photograph, write_result
from bench.runs import goal, parser, print_tables, spread, table
from core.heap import keep_heap
from core.model import ModelSpec, read_spec
from models.base import Adapter, Item
from models.classes import adapter_class

WIDTHS = (1, 4, 8)
NOISE = 1.10  # a batch costs no more than so many times what its images cost alone
FOLDER = Path(__file__).parents[1] / "models" / "repository"
SPECIAL: Mapping[str, Mapping[str, Any]] = {"edit": {"prompt": "oil painting"}, "upscale": {"steps": 10}}


@dataclass(frozen=True, slots=True)
class Cost:
    """Processor seconds an image: in all, and of them in the kernel (mostly for memory)."""

    seconds: float
    system: float


def measure(adapter: Adapter, items: list[Item]) -> Cost:
    """One batch."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    with torch.inference_mode():
        adapter.run(items)
    after = resource.getrusage(resource.RUSAGE_SELF)
    system = after.ru_stime - before.ru_stime
    return Cost((after.ru_utime - before.ru_utime + system) / len(items), system / len(items))


def batch(spec: ModelSpec, side: int, width: int) -> list[Item]:
    """So many photographs, with a hole each where the model wants one."""
    params = {name: param.default for name, param in spec.params.items()} | dict(SPECIAL.get(spec.name, {}))
    mask = np.zeros((side, side), np.uint8)
    mask[side // 3 : side // 2, side // 3 : side // 2] = 255
    size = (side // 2, side // 2) if spec.name == "resize" else (side, side)
    image = photograph(side)
    return [Item(dict(params), image.copy(), mask if spec.needs_mask else None, size=size) for _ in range(width)]


def main() -> None:
    arguments = parser(__doc__, runs=3)
    arguments.add_argument("--side", type=int, default=640, help="of the photograph, in pixels [640]")
    arguments.add_argument("--models", default="", help="names, separated by commas; all when empty")
    given = arguments.parse_args()
    runs, side = (1, 256) if given.quick else (given.runs, given.side)
    keep_heap()
    torch.set_num_threads(1)
    facts = machine_facts(("torch", "numpy", "opencv-python-headless"))
    names = given.models.split(",") if given.models else []
    found: dict[str, dict[int, list[Cost]]] = {}
    with Progress(refresh_per_second=1) as progress:
        for spec in progress.track(models(names), description="widths"):
            found[spec.name] = costs(spec, side, runs)
    report(facts, found, side, runs)


def models(names: list[str]) -> list[ModelSpec]:
    """Those that need no weights and take pixels."""
    specs = [read_spec(file.read_text(encoding="utf-8"), file.stem) for file in sorted(FOLDER.glob("*.toml"))]
    return [spec for spec in specs if not spec.raw and spec.weights is None and (not names or spec.name in names)]


def costs(spec: ModelSpec, side: int, runs: int) -> dict[int, list[Cost]]:
    """By width what each round measured; in every round the same number of images is computed at each width."""
    adapter = adapter_class(spec.adapter)(spec.options, torch.device("cpu"))
    adapter.load()
    measure(adapter, batch(spec, side, 1))  # what comes only once
    found: dict[int, list[Cost]] = {width: [] for width in WIDTHS}
    for _ in range(runs):
        for width in WIDTHS:
            some = [measure(adapter, batch(spec, side, width)) for _ in range(WIDTHS[-1] // width)]
            found[width].append(Cost(fmean(one.seconds for one in some), fmean(one.system for one in some)))
    return found


def ratio(by: Mapping[int, list[Cost]]) -> float:
    """What an image costs at the worst width against one alone, compared within each round; below a millisecond there
    is nothing to compare."""
    pairs = {width: zip(many, by[1], strict=True) for width, many in by.items() if width > 1}
    return max(
        median(max(one.seconds, 1e-3) / max(alone.seconds, 1e-3) for one, alone in both) for both in pairs.values()
    )


def report(facts: Mapping[str, Any], found: Mapping[str, Mapping[int, list[Cost]]], side: int, runs: int) -> None:
    ratios = {name: ratio(by) for name, by in found.items()}
    worst = max(ratios.values())
    goals = [goal("an image in a CPU batch against one alone, the worst model", f"≤ {NOISE:.2f} ×",
                  spread(ratios.values()) | {"median": round(worst, 2)}, worst <= NOISE, unit=" ×")]  # fmt: skip
    seconds = {
        name: {width: median(one.seconds for one in many) for width, many in by.items()} for name, by in found.items()
    }
    rows = [
        [name, *(f"{1e3 * each:.1f}" for each in seconds[name].values()),
         *(f"{1e3 * median(one.system for one in by[width]):.1f}" for width in (1, WIDTHS[-1])), f"{ratios[name]:.2f}"]
        for name, by in found.items()
    ]  # fmt: skip
    head = ["model", *(f"{width} wide" for width in WIDTHS), "kernel, 1 wide", f"kernel, {WIDTHS[-1]} wide", "ratio"]
    tables = [table(f"Processor milliseconds an image by the batch's width, {side} × {side}", head, rows)]
    print_tables(tables, goals)
    write_result("widths", facts, {
        "about": "batches of the embedded models on one CPU thread", "runs": runs, "side": side, "goals": goals,
        "tables": tables, "seconds": seconds,
    })  # fmt: skip


if __name__ == "__main__":
    main()

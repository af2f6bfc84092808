"""W4: how long images wait for their steps, by kind, steps and urgency, against three usual policies.

    python -m bench.diffusion [--runs 15] [--loads 0.3 0.6 0.9] [--quick] [--draw schedule.png]
    python -m bench.diffusion --worker [--runs 3] [--loads 0.3] [--append] [--faster 20] [--quick]

The real batcher, learning from nothing, on a fake clock with published step times (`bench/step_load.py`); each run is
another seed, and all policies get the same requests. `--worker` instead sends them to real servers, whose networks
sleep those times, twenty times as fast (`bench/step_worker.py`), and tells how far the simulation is from that; three
runs of all loads take twenty minutes, so it can measure one load after the other and add what it finds. `--draw` only
draws one schedule. Writes bench/results/diffusion.json and diffusion.png, or diffusion_worker.json and .png.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.progress import Progress

from bench.common import RESULTS, machine_facts, write_result
from bench.runs import goal, parser, plot, print_tables, save, show, spread, table
from bench.step_load import OURS, POLICIES, RIVALS, STEPS, Request, ours, requests, seconds, simulate
from models.stepping.batcher import Waiting
from models.stepping.costs import variety_of

LOADS = (0.3, 0.6, 0.9)
FIRST_SEED = 1_000  # the policy was made with smaller ones
FASTER, REAL_RUNS, REAL_COUNT = 20.0, 3, 150  # with a real worker
WORKER = RESULTS / "diffusion_worker.json"
COLOURS = ("#d1495b", "#30638e", "#9fb4c7", "#c9ada7", "#bbbbbb")
ALL, URGENT = "all", "P0"

Latencies = dict[str, tuple[float, float]]  # by class: mean and P95, seconds
Found = dict[float, dict[str, list[Latencies]]]  # by load and policy, one for each seed


def latencies(work: Sequence[Request]) -> Latencies:
    """The first tenth finds an emptier server than the others, and is left out."""
    classes: dict[str, list[float]] = {}
    for request in work[len(work) // 10:]:
        names = [ALL, f"{request.kind}, {request.steps} steps", *([URGENT] if request.priority == 0 else [])]
        for name in names:
            classes.setdefault(name, []).append(request.latency)
    return {
        name: (round(statistics.mean(found), 3), round(sorted(found)[int(0.95 * len(found))], 3))
        for name, found in sorted(classes.items(), key=lambda one: (one[0] != ALL, one[0] != URGENT, one[0]))
    }


def measure(
    runs: int, count: int, loads: Sequence[float], run: Callable[[dict[str, list[Request]]], object],
    policies: Sequence[str] = tuple(POLICIES), found: Found | None = None,
) -> Found:  # fmt: skip
    """So many runs more of every policy at each load, all on the same requests, seed by seed. They are added to what
    was `found` before."""
    found = {} if found is None else found
    with Progress(refresh_per_second=1) as progress:
        task = progress.add_task("", total=runs * len(loads))
        for load in [*loads] * runs:
            there = found.setdefault(load, {name: [] for name in policies})
            seed = FIRST_SEED + len(there[OURS])
            progress.update(task, description=f"seed {seed}, load {load}")
            works = {name: requests(seed, load, count) for name in policies}
            run(works)
            for name, work in works.items():
                there[name].append(latencies(work))
            progress.advance(task)
    return found


def on_clock(works: Mapping[str, list[Request]]) -> None:
    for name, work in works.items():
        simulate(work, POLICIES[name](work))


def ratio(all_seeds: Mapping[str, list[Latencies]], name: str, which: int) -> dict[str, float]:
    """Ours over the best of the three, seed by seed. The best: whose median is least in this class."""
    best = min(RIVALS, key=lambda rival: statistics.median(one[name][which] for one in all_seeds[rival]))
    return spread(
        mine[name][which] / theirs[name][which]
        for mine, theirs in zip(all_seeds[OURS], all_seeds[best], strict=True)
    )


def goals(found: Found) -> list[dict[str, Any]]:
    """At each load mean and P95 of the class that fares worst, and of all requests."""
    told = []
    for load, all_seeds in found.items():
        for which, what in enumerate(("mean", "P95")):
            ratios = {name: ratio(all_seeds, name, which) for name in all_seeds[OURS][0]}
            whole = ratios.pop(ALL)
            worst = max(ratios, key=lambda name: ratios[name]["median"])
            won = sum(one["median"] < 1 for one in ratios.values())
            about = f"W4 {what} latency at load {load} against the best of three"
            told.append(goal(
                f"{about}: the worst class ({worst}; {won} of {len(ratios)} are won)", "< 1x", ratios[worst],
                ratios[worst]["median"] < 1, unit="x",
            ))
            told.append(goal(f"{about}: all requests", "< 1x", whole, whole["median"] < 1, unit="x"))
    return told  # fmt: skip


def tables(found: Found) -> list[dict[str, Any]]:
    """One for each load: a line per class, mean / P95 of each policy, the ratios."""
    head = ["mean: ours / best of three", "P95: ours / best of three"]
    return [
        table(f"W4 at load {load}: seconds, mean / P95", ["class", *all_seeds, *head], (
            [name, *(_cell(seeds, name) for seeds in all_seeds.values()),
             show(ratio(all_seeds, name, 0)), show(ratio(all_seeds, name, 1))]
            for name in all_seeds[OURS][0]
        ))
        for load, all_seeds in found.items()
    ]  # fmt: skip


def _cell(seeds: Sequence[Latencies], name: str) -> str:
    mean, last = (statistics.median(one[name][which] for one in seeds) for which in (0, 1))
    return f"{mean:.1f} / {last:.1f}"


def decisions(quick: bool) -> dict[str, Any]:
    """What it costs to decide: microseconds of CPU for each call that goes, by how many wait."""
    rows = []
    for count in (1, 8, 64, 512):
        found = spread(_decision(count, 500 if quick else 2_000) for _ in range(5))
        rows.append([f"{count}", show(found, "{:.0f}")])
    return table("The batcher's CPU per call, µs", ["runs waiting, six keys", "µs"], rows)


def _decision(count: int, least: int) -> float:
    batcher, gone = ours(), 0
    keys = [(1, kind, size) for kind in STEPS for size in range(3)]
    variants = (None, 1, 2)
    calls = [Waiting(run, keys[run % len(keys)], 1, 1, 2, run % 30 + 1, run, variants[run % 5 % 3])
             for run in range(count)]
    for one in calls:
        batcher.add(one)
    for width in (1, 2, 4, 8) * 3:
        for key in keys:
            batcher.costs.learn(key, width, seconds(key[:2], width))
    began = time.process_time_ns()
    while gone < least:
        chosen = batcher.next()
        gone += len(chosen)
        key, width, variety = chosen[0].key, len(chosen), variety_of(one.variant for one in chosen)
        batcher.costs.learn(key, width, seconds(key[:2], width, variety), variety)
        for one in chosen:
            one.remaining = one.remaining % 30 + 1
            batcher.add(one)
    return (time.process_time_ns() - began) / 1e3 / gone


# --- the real worker --------------------------------------------------------------------------------------------------


def fidelity(found: Found, simulated: Found) -> dict[str, Any]:
    """How far the simulation is from the real worker, on the same requests."""
    rows = [
        [f"{load}", *(
            show(spread(real[ALL][0] / fake[ALL][0] for real, fake in zip(
                found[load][name], simulated[load][name], strict=True)))
            for name in simulated[load]
        )]
        for load in found
    ]  # fmt: skip
    policies = next(iter(simulated.values()))
    return table("Mean latency of all requests: real worker / simulation", ["load", *policies], rows)


def on_worker(given: argparse.Namespace, facts: dict[str, Any], about: str) -> None:
    """Measure, or measure more, and write all that is known."""
    from bench.step_worker import NAMES, SEATS, on_workers, overhead

    count, faster = (30, 40.0) if given.quick else (REAL_COUNT, given.faster)
    ways: dict[str, Any] = {"requests": count, "faster": faster}
    before = json.loads(WORKER.read_text("utf-8")) if given.append else {"ways": ways, "found": {}}
    if before["ways"] != ways:
        raise SystemExit(f"{WORKER.name} was measured with {before['ways']}; leave out --append to begin anew")
    found: Found = {float(load): seeds for load, seeds in before["found"].items()}
    around = overhead(faster)
    measure(min(given.runs, REAL_RUNS), count, given.loads, lambda works: on_workers(works, faster), NAMES, found)
    found = dict(sorted(found.items()))
    simulated: Found = {}
    for load, seeds in found.items():
        simulated |= measure(len(seeds[OURS]), count, (load,), on_clock, (OURS, *RIVALS))
    told = [fidelity(found, simulated), around, *tables(found)]
    print_tables(told)
    write_result(WORKER.stem, facts, {
        "about": f"server, worker process and queues are real, with {SEATS} seats but in one column, "
                 f"{faster:g} times as fast; {count} requests a run; {about}",
        "runs": min(len(seeds[OURS]) for seeds in found.values()), "ways": ways, "tables": told, "found": found,
    })  # fmt: skip
    draw(found, WORKER.stem)


# --- what is written --------------------------------------------------------------------------------------------------


def draw(found: Found, target: str) -> None:
    """Mean (bars) and P95 (marks) of each policy by class, one panel for each load."""
    figure, axes = plot().subplots(len(found), 1, figsize=(9, 2.6 * len(found)), layout="constrained", squeeze=False)
    for axis, (load, all_seeds) in zip(axes[:, 0], found.items(), strict=True):
        names = list(all_seeds[OURS][0])
        for place, (policy, colour) in enumerate(zip(all_seeds, COLOURS, strict=True)):
            at = [number + (place - 2) * 0.17 for number in range(len(names))]
            mean, last = ([statistics.median(one[name][which] for one in all_seeds[policy]) for name in names]
                          for which in (0, 1))
            axis.bar(at, mean, 0.16, color=colour, label=policy)
            axis.plot(at, last, "_", color=colour, markersize=7)
        axis.set_xticks(range(len(names)), names)
        axis.set_ylabel("seconds", fontsize=8)
        axis.set_title(f"load {load}", fontsize=9)
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", fontsize=7, ncols=5, frameon=False)
    figure.suptitle("Latency: mean (bar) and P95 (mark)", fontsize=10)
    save(figure, target)


def main() -> None:
    arguments = parser(__doc__, runs=15)
    arguments.add_argument("--loads", type=float, nargs="+", default=LOADS, help="those to measure [all three]")
    arguments.add_argument("--worker", action="store_true", help="with a real server and its worker, in real time")
    arguments.add_argument("--faster", type=float, default=FASTER, help=f"how much its network hurries [{FASTER:g}]")
    arguments.add_argument("--append", action="store_true", help="add runs to what --worker has written before")
    arguments.add_argument("--draw", type=Path, metavar="PNG", help="draw one schedule of the real batcher there")
    given = arguments.parse_args()
    if given.draw:
        from bench.schedule import draw_schedule

        draw_schedule(given.draw)
        return
    facts = machine_facts(("torch", "numpy"))
    about = "step times of an H200, both kinds bring half of the work"
    if given.worker:
        on_worker(given, facts, about)
        return
    runs, count = (2, 200) if given.quick else (given.runs, 1_000)
    found = measure(runs, count, given.loads, on_clock)
    told, aims = [*tables(found), decisions(given.quick)], goals(found)
    print_tables(told, aims)
    write_result("diffusion", facts, {
        "about": f"the real batcher on a fake clock, {count} requests a run; {about}", "runs": runs, "goals": aims,
        "tables": told, "found": found,
    })  # fmt: skip
    draw(found, "diffusion")


if __name__ == "__main__":
    main()

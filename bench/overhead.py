"""W1, the overhead: a 500 KB PNG goes to a worker and comes back unchanged; a batch takes 5 ms + 0.5 ms for each image.

    python -m bench.overhead [--runs 5] [--seconds 4] [--connections 1 6 64] [--quick]

Two workers, batches of at most 8: no server can do more than 2 x 8 / 9 ms = 1,778 requests per second. Every round
starts each server anew, alone, and puts the same closed loops of clients on it; ratios are taken within a round. Writes
bench/results/overhead.json and overhead.png.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from bench.common import machine_facts, write_result
from bench.runs import (
    COLOURS,
    OURS,
    Found,
    as_data,
    best_peer,
    goal,
    noise_png,
    parser,
    plot,
    print_tables,
    ratio,
    rounds,
    save,
    show,
    spread,
    table,
)
from bench.servers import NAIVE, PEERS, ours, peer

LIMIT = 2 * 8 / 0.009
PACKAGES = ("uvicorn", "uvloop", "httptools", "starlette", "fastapi", "torch")


def goals(found: Found, connections: list[int]) -> list[dict[str, Any]]:
    told = []
    for count, factor in ((6, 1.3), (64, 1.6)):
        if count in connections:
            best = best_peer(found, count)
            measured = ratio(found, count, best)
            what = f"W1 throughput against the best peer ({best}), c = {count}"
            told.append(goal(what, f"≥ {factor}x", measured, measured["median"] >= factor, unit="x"))
    if 1 in connections:
        measured = ratio(found, 1, NAIVE.name)
        told.append(goal("W1 throughput against the naive server, c = 1", "≥ 0.95x", measured,
                         measured["median"] >= 0.95, unit="x"))
    if 64 in connections:
        mine = found[OURS][64]
        share = spread(m.rate / LIMIT for m in mine)
        told.append(goal("W1 share of the physical limit, c = 64", "≥ 0.85", share, share["median"] >= 0.85))
        cost = spread(m.master_cpu_ms for m in mine)
        told.append(goal("CPU of the master per W1 request", "≤ 0.8 ms", cost, cost["median"] <= 0.8, unit=" ms"))
    for count in connections:
        tail = spread((m.p99 * 1e3 for m in found[OURS][count]), 1)
        peers = {name: spread((m.p99 * 1e3 for m in found[name][count]), 1)["median"] for name in found if name != OURS}
        best = min(peers, key=lambda name: peers[name])
        told.append(goal(f"W1 P99, c = {count}", f"below every peer's ({best}: {peers[best]:.1f} ms)", tail,
                         tail["median"] < peers[best], "{:.1f}", " ms"))
    return told


def tables(found: Found, connections: list[int]) -> list[dict[str, Any]]:
    head = ["server", "requests/s", "of the limit", "P50 ms", "P99 ms", "CPU ms/request", "of it the master"]
    return [
        table(f"W1, {count} connection{'s' * (count > 1)}", head, (
            [
                name, show(spread(m.rate for m in told[count]), "{:,.0f}"),
                f"{spread(m.rate / LIMIT for m in told[count])['median']:.2f}",
                show(spread((m.p50 * 1e3 for m in told[count]), 1), "{:.1f}"),
                show(spread((m.p99 * 1e3 for m in told[count]), 1), "{:.1f}"),
                show(spread(m.cpu_ms for m in told[count])),
                show(spread(m.master_cpu_ms for m in told[count])) if name == OURS else "",
            ]
            for name, told in found.items()
        ))
        for count in connections
    ]  # fmt: skip


def draw(found: Found, connections: list[int]) -> None:
    size = (4 * len(connections), 3.6)
    figure, axes = plot().subplots(1, len(connections), figsize=size, layout="constrained", squeeze=False)
    for axis, count in zip(axes[0], connections, strict=True):
        rates = [spread(m.rate for m in told[count]) for told in found.values()]
        medians = [rate["median"] for rate in rates]
        errors = [[rate["median"] - rate["min"] for rate in rates], [rate["max"] - rate["median"] for rate in rates]]
        bars = axis.bar(list(found), medians, yerr=errors, color=[COLOURS[name] for name in found], capsize=3)
        axis.bar_label(bars, [f"{rate:,.0f}" for rate in medians], fontsize=8, label_type="center", color="white")
        most = 1000 / 5.5 if count == 1 else LIMIT
        axis.axhline(most, color=COLOURS["limit"], linestyle=":", linewidth=1)
        axis.set_title(f"{count} connection{'s' * (count > 1)}", fontsize=9, loc="left")
        axis.set_xticks(range(len(found)), list(found), rotation=20, fontsize=8)
    axes[0][0].set_ylabel("requests per second", fontsize=8)
    figure.suptitle("W1: a 500 KB PNG to a worker and back (dotted: no server can do more)", fontsize=10)
    save(figure, "overhead")


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--seconds", type=float, default=4.0)
    arguments.add_argument("--connections", type=int, nargs="+", default=[1, 6, 64])
    given = arguments.parse_args()
    runs, seconds = (2, 2.0) if given.quick else (given.runs, given.seconds)
    facts = machine_facts(PACKAGES)
    makers = {which.name: partial(peer, which, "echo") for which in PEERS} | {OURS: ours}
    found = rounds(makers, noise_png(), runs, seconds, given.connections)
    reached, shown = goals(found, given.connections), tables(found, given.connections)
    print_tables(shown, reached)
    write_result("overhead", facts, {
        "about": "W1: a 500 KB PNG to a worker and back; a batch takes 5 ms + 0.5 ms an image; two workers",
        "runs": runs, "seconds": seconds, "limit": round(LIMIT), "peers": {one.name: one.version for one in PEERS},
        "goals": reached, "tables": shown, "servers": as_data(found),
    })  # fmt: skip
    draw(found, given.connections)


if __name__ == "__main__":
    main()

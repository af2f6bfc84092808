"""W2, images: decode a photographic PNG of 512², a small network, encode a PNG. Two workers on two cores.

    python -m bench.image [--runs 5] [--seconds 6] [--connections 6 64] [--quick]

Peers use Pillow's codecs, as most servers' examples do; the plain loop is two processes without any server. Writes
bench/results/image.json and image.png.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tempfile
from functools import partial
from typing import Any

from PIL import Image

from bench.common import machine_facts, photograph, write_result
from bench.runs import (
    COLOURS,
    OURS,
    Found,
    as_data,
    best_peer,
    goal,
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
from bench.servers import PEERS, ROOT, ours, peer

PACKAGES = ("torch", "numpy", "pillow", "isal", "imagecodecs")
LOOPS = {"plain loop, Pillow": (), "plain loop, our codecs": ("--ours",)}


def photo_png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(photograph(512)).save(file, "PNG")
    return file.getvalue()


def plain_loops(body: bytes, runs: int, seconds: float) -> dict[str, list[float]]:
    """Images per second of two processes together, without a server."""
    found: dict[str, list[float]] = {name: [] for name in LOOPS}
    with tempfile.NamedTemporaryFile(suffix=".png") as file:
        file.write(body)
        file.flush()
        for _ in range(runs):
            for name, flags in LOOPS.items():
                command = (sys.executable, "-m", "bench.peers.loop", str(seconds), file.name, *flags)
                both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
                found[name].append(sum(float(one.communicate()[0]) for one in both))
    return found


def goals(found: Found, loops: dict[str, list[float]], connections: list[int]) -> list[dict[str, Any]]:
    told = []
    for count in connections:
        best = best_peer(found, count)
        measured = ratio(found, count, best)
        what = f"W2 throughput against the best peer ({best}), c = {count}"
        told.append(goal(what, "≥ 1.5x", measured, measured["median"] >= 1.5, unit="x"))
    return told


def tables(found: Found, loops: dict[str, list[float]], connections: list[int]) -> list[dict[str, Any]]:
    head = ["server", "images/s", "P50 ms", "P99 ms", "CPU ms/image"]
    loop_rows = [[name, show(spread(rates), "{:.1f}"), "", "", ""] for name, rates in loops.items()]
    return [
        table(f"W2, {count} connections", head, [
            *loop_rows,
            *(
                [
                    name, show(spread(m.rate for m in told[count]), "{:.1f}"),
                    show(spread((m.p50 * 1e3 for m in told[count]), 1), "{:.0f}"),
                    show(spread((m.p99 * 1e3 for m in told[count]), 1), "{:.0f}"),
                    show(spread((m.cpu_ms for m in told[count]), 1), "{:.1f}"),
                ]
                for name, told in found.items()
            ),
        ])
        for count in connections
    ]  # fmt: skip


def draw(found: Found, loops: dict[str, list[float]], connections: list[int]) -> None:
    size = (4.5 * len(connections), 3.6)
    figure, axes = plot().subplots(1, len(connections), figsize=size, layout="constrained", squeeze=False)
    for axis, count in zip(axes[0], connections, strict=True):
        rates = [spread(m.rate for m in told[count]) for told in found.values()]
        medians = [rate["median"] for rate in rates]
        errors = [[rate["median"] - rate["min"] for rate in rates], [rate["max"] - rate["median"] for rate in rates]]
        bars = axis.bar(list(found), medians, yerr=errors, color=[COLOURS[name] for name in found], capsize=3)
        axis.bar_label(bars, [f"{rate:.1f}" for rate in medians], fontsize=8, label_type="center", color="white")
        for (name, loop), style in zip(loops.items(), (":", "--"), strict=True):
            axis.axhline(spread(loop)["median"], color=COLOURS["limit"], linestyle=style, linewidth=1, label=name)
        axis.set_title(f"{count} connections", fontsize=9, loc="left")
        axis.set_xticks(range(len(found)), list(found), rotation=20, fontsize=8)
    axes[0][0].set_ylabel("images per second", fontsize=8)
    axes[0][0].legend(fontsize=7)
    figure.suptitle("W2: decode 512², a small network, encode; two cores", fontsize=10)
    save(figure, "image")


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--seconds", type=float, default=6.0)
    arguments.add_argument("--connections", type=int, nargs="+", default=[6, 64])
    given = arguments.parse_args()
    runs, seconds = (2, 4.0) if given.quick else (given.runs, given.seconds)
    facts, body = machine_facts(PACKAGES), photo_png()
    mine = partial(ours, models="bench/models", offer="convnet", path="/run/convnet")
    makers = {which.name: partial(peer, which, "image") for which in PEERS} | {OURS: mine}
    loops = plain_loops(body, runs, seconds)
    found = rounds(makers, body, runs, seconds, given.connections)
    reached, shown = goals(found, loops, given.connections), tables(found, loops, given.connections)
    print_tables(shown, reached)
    write_result("image", facts, {
        "about": "W2: decode a 512² photographic PNG, a small network, encode a PNG; two workers on two cores",
        "runs": runs, "seconds": seconds, "peers": {one.name: one.version for one in PEERS}, "goals": reached,
        "tables": shown, "loops": {name: spread(rates) for name, rates in loops.items()}, "servers": as_data(found),
    })  # fmt: skip
    draw(found, loops, given.connections)


if __name__ == "__main__":
    main()

"""Turns everything in bench/results/ into the tables of docs/performance.md.

    python -m bench.report [--check]

A result's `goals` become lines of the table of goals, its `tables` a section with its plot. What stands between the
marks <!-- NAME --> and <!-- /NAME --> is replaced, everything else is left as it is written; `--check` only says
whether the page is up to date.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from bench.common import RESULTS
from bench.servers import ROOT

PAGE = ROOT / "docs" / "performance.md"
ORDER = (
    "overhead", "image", "widths", "inpaint", "scheduler", "diffusion", "diffusion_worker", "hub", "lora", "denoiser",
    "denoiser_cpu", "hot_path", "liveness", "pairs", "recovery", "idle", "memory",
)  # fmt: skip
Result = Mapping[str, Any]


def read_results() -> dict[str, Result]:
    """By name, the known ones first."""
    found = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.glob("*.json"))}
    names = [name for name in ORDER if name in found] + [name for name in found if name not in ORDER]
    return {name: found[name] for name in names}


def goals(results: Mapping[str, Result]) -> str:
    """Every goal of every result: what, how much, what was measured, and whether that is enough."""
    rows = (
        (one["what"], one["goal"], one["measured"], "met" if one["met"] else "**not met**")
        for result in results.values()
        for one in result.get("goals", ())
    )
    return markdown(("what", "goal", "measured: median (least–most)", ""), rows)


def section(name: str, result: Result) -> str:
    """A result's machine, tables and plot."""
    parts = [taken(result)]
    for one in result.get("tables", ()):
        parts += [f"**{one['title']}**", markdown(one["head"], one["rows"])]
    if (RESULTS / f"{name}.png").exists():
        parts.append(f"![{name}](../bench/results/{name}.png)")
    return "\n\n".join(parts)


def taken(result: Result) -> str:
    """When, on what and how often, in a line."""
    machine = result["machine"]
    gpus = ", ".join(machine["gpus"]) or "no GPU"
    runs = f", {result['runs']} runs" if "runs" in result else ""
    peers = "; peers: " + ", ".join(result["peers"].values()) if "peers" in result else ""
    about = f"{result['about'][:1].upper()}{result['about'][1:]}. " if "about" in result else ""
    return (
        f"{about}Taken {machine['date'][:10]} on {machine['cores']} cores ({machine['cpu']}), {gpus}, load "
        f"{machine['load']} at the start, Python {machine['python']}{runs}{peers}."
    )


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), *(list(row) for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def fill(page: str, parts: Mapping[str, str]) -> str:
    """The page with every marked part replaced. A part that the page has no marks for is left out."""
    for name, text in parts.items():
        mark = re.compile(f"(<!-- {name} -->).*?(<!-- /{name} -->)", re.DOTALL)
        text = text.replace("\\", "\\\\")  # as it stands, whatever `sub` would read into it
        page = mark.sub(f"\\1\n{text}\n\\2", page)
    return page


def write() -> str:
    """Fill the page from the results as they are; the page."""
    results = read_results()
    parts = {"goals": goals(results), **{name: section(name, result) for name, result in results.items()}}
    page = fill(PAGE.read_text(encoding="utf-8"), parts)
    PAGE.write_text(page, encoding="utf-8")
    return page


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    before = PAGE.read_text(encoding="utf-8")
    if write() == before:
        print("docs/performance.md is up to date")
        return 0
    if given.check:
        PAGE.write_text(before, encoding="utf-8")
        print("docs/performance.md is not what the results say: python -m bench.report", file=sys.stderr)
        return 1
    print("docs/performance.md written")
    return 0


if __name__ == "__main__":
    sys.exit(main())

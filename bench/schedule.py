"""Draws a schedule that the real batcher has made: who is aboard of which forward, and who waits meanwhile."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.runs import plot
from bench.step_load import DECODE, DECODES, DENOISE, ENCODE, ENCODES, STEP, Forward, Request, ours, seconds, simulate
from models.stepping.costs import Variety

SHARED = ("#d1495b", "#30638e", "#edae49", "#00798c", "#8d6a9f", "#b56b45")
ALONE, OTHER, INK = "#b8b8b8", "#5a5a5a", "#333333"

CAST = (  # came, kind, steps, LoRA set, priority
    (0.0, "edit", 16, 0, 2), (0.4, "sd", 12, 0, 2), (0.9, "sd", 16, 0, 2), (1.6, "sd", 4, 0, 2),
    (3.0, "edit", 5, 0, 0), (3.3, "sd", 8, 1, 2), (3.6, "sd", 8, 1, 1), (5.6, "sd", 4, 0, 2),
)  # fmt: skip
URGENCY = ("urgent", "paid", "", "test")


def warm() -> Any:
    """The batcher as after a warm-up: it has measured what forwards take, and has seen some work."""
    batcher = ours()
    for _ in range(3):
        for kind, curve in STEP.items():
            for width in curve:
                for variety in Variety:
                    key = (DENOISE, kind)
                    batcher.costs.learn(key, width, seconds(key, width, variety), variety)
            for lane, parts in ((ENCODE, ENCODES), (DECODE, DECODES)):
                for width in (1, 2):
                    batcher.costs.learn((lane, kind), width, parts[kind] * curve[1] * width)
    for _ in range(50):
        batcher.add(Request(0, 0.0, "edit", 12, 0, 2, done=1).waiting())
        batcher.next()
    return batcher


def draw_schedule(target: Path) -> None:
    """Simulate the cast and write the picture."""
    work = [Request(number, *one) for number, one in enumerate(CAST)]
    forwards = simulate(work, warm())
    figure, axis = plot().subplots(figsize=(11, 4.4), layout="constrained")
    for request in work:
        _line(axis, request, [one for one in forwards if request.id in one.aboard])
    for number, forward in enumerate(_merged(forwards)):
        for run in forward.aboard:
            _bar(axis, run, forward, SHARED[number % len(SHARED)])
    axis.set_yticks(range(len(work)), [_label(one) for one in work], fontsize=8)
    axis.set_ylim(len(work) - 0.4, -0.8)
    axis.set_xlabel("seconds", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.set_title(
        "One device, one forward at a time. Same colour at the same moment: one forward. Light grey: a step alone; "
        "dark: encode or decode; hatched: parked", fontsize=8, color=INK,
    )  # fmt: skip
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)


def _line(axis: Any, request: Request, own: list[Forward]) -> None:
    """One request: where it came, waited, stepped alone, and was parked."""
    axis.plot([request.came], [request.id], marker=">", color=INK, markersize=5)
    axis.plot([request.came, own[0].began], [request.id] * 2, color=INK, linewidth=0.8, linestyle=":")
    for before, after in pairwise(own):
        if after.began - before.ended > 1e-6:
            axis.barh(request.id, after.began - before.ended, left=before.ended, height=0.5, color="white",
                      edgecolor="#cccccc", hatch="////", linewidth=0)
    for forward in own:
        if forward.key[0] != DENOISE or len(forward.aboard) == 1:
            _bar(axis, request.id, forward, ALONE if forward.key[0] == DENOISE else OTHER)


def _bar(axis: Any, run: int, forward: Forward, colour: str) -> None:
    axis.barh(run, forward.ended - forward.began, left=forward.began, height=0.7, color=colour, edgecolor="white",
              linewidth=0.4)


def _merged(forwards: list[Forward]) -> list[Forward]:
    return [one for one in forwards if one.key[0] == DENOISE and len(one.aboard) > 1]


def _label(request: Request) -> str:
    words = [f"{request.kind}, {request.steps} steps", "LoRA" if request.adapters else "", URGENCY[request.priority]]
    return ", ".join(word for word in words if word)

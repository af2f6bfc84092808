"""The report of the benches: goals and tables of results, put between the marks of a page."""

from __future__ import annotations

import math

from bench.report import fill, goals, markdown, section
from bench.runs import goal, show, spread, table

MACHINE = {"date": "2026-01-02T03:04:05", "cores": 2, "cpu": "a CPU", "gpus": [], "load": 0.1, "python": "3.11"}


def test_a_part_is_replaced_between_its_marks_and_nothing_else() -> None:
    page = "before <!-- one -->\nold\n<!-- /one --> between <!-- two -->\nkept\n<!-- /two --> after"
    filled = fill(page, {"one": "new \\1 text", "three": "nowhere"})
    assert filled == "before <!-- one -->\nnew \\1 text\n<!-- /one --> between <!-- two -->\nkept\n<!-- /two --> after"
    assert fill(filled, {"one": "new \\1 text"}) == filled


def test_a_goal_that_was_not_met_is_told_so() -> None:
    measured = spread([3.0, 1.0, 2.0])
    result = {"goals": [goal("speed", "≥ 5", measured, False), goal("size", "≤ 5", measured, True, unit=" MB")]}
    told = goals({"x": result, "without": {}})
    assert "| speed | ≥ 5 | 2.00 (1.00–3.00) | **not met** |" in told
    assert "| size | ≤ 5 | 2.00 MB (1.00–3.00) | met |" in told


def test_a_section_tells_the_machine_the_peers_and_the_tables() -> None:
    result = {"machine": MACHINE, "runs": 5, "peers": {"other": "other==1"}, "about": "work",
              "tables": [table("T", ["a", "b"], [["1", "x|y"]])]}  # fmt: skip
    told = section("no such plot", result)
    assert told.startswith("Work. Taken 2026-01-02 on 2 cores (a CPU), no GPU, load 0.1")
    assert "5 runs; peers: other==1" in told and "**T**\n\n| a | b |\n| --- | --- |\n| 1 | x/y |" in told
    assert "png" not in told


def test_a_spread_leaves_out_what_was_not_measured() -> None:
    assert spread([1.0, math.nan, 3.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert show(spread([math.nan])) == "nan (nan–nan)"
    assert markdown(["h"], []) == "| h |\n| --- |"

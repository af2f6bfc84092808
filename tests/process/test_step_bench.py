"""The bench of stepped jobs at real servers: its model, its policies at the worker, and its runs that add up."""

from __future__ import annotations

import pytest

from bench.diffusion import fidelity, measure, on_clock
from bench.step_load import OURS, Request
from bench.step_worker import SHIPPED, on_workers

ALONE, CONTINUOUS, STATIC = "one at a time", "continuous ≤ 8", "static ≤ 8"
FASTER = 20.0  # long enough that requests of one moment meet


def work() -> list[Request]:
    """Three requests that may share forwards, two of them for as many steps, one of another kind, and an urgent one."""
    cast = [("sd", 24, 0, 2), ("sd", 24, 0, 2), ("sd", 12, 0, 1), ("edit", 5, 0, 3), ("sd", 4, 1, 0)]
    return [Request(number, 0.0, *one) for number, one in enumerate(cast)]


@pytest.fixture(scope="module")
def runs() -> tuple[dict[str, list[Request]], dict[str, tuple[int, int]]]:
    works = {name: work() for name in (OURS, ALONE, STATIC, CONTINUOUS, SHIPPED)}
    return works, on_workers(works, FASTER)


def test_every_request_has_its_image_and_every_step_its_forward(runs):
    works, counted = runs
    assert set(counted) == set(works)
    for name, requests in works.items():
        assert all(one.done == one.calls and one.ended > one.came for one in requests)
        assert counted[name][1] == sum(one.steps for one in requests)


def test_the_policy_that_was_asked_for_decides_at_the_worker(runs):
    _, counted = runs
    assert counted[ALONE][0] == counted[ALONE][1], "somebody shared a forward"
    for name in (OURS, CONTINUOUS, SHIPPED):
        assert counted[name][0] < counted[name][1], f"nobody shared a forward: {name}"


def test_runs_that_are_added_are_those_of_the_next_seeds():
    at_once = measure(2, 30, (0.6,), on_clock, (OURS, ALONE))
    added = measure(1, 30, (0.6,), on_clock, (OURS, ALONE))
    assert measure(1, 30, (0.6,), on_clock, (OURS, ALONE), added) is added and added == at_once
    assert at_once[0.6][OURS][0] != at_once[0.6][OURS][1]
    assert fidelity(added, at_once)["rows"] == [["0.6", "1.00 (1.00–1.00)", "1.00 (1.00–1.00)"]]

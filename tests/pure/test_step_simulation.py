"""The batcher at work for ten minutes of a fake clock: it learns the step times by itself and keeps its promises."""

from __future__ import annotations

import statistics

import pytest

from bench import step_load
from bench.step_load import DENOISE, OURS, POLICIES, RIVALS, Request, requests, simulate


@pytest.fixture(scope="module")
def runs() -> dict[str, list[Request]]:
    found = {name: requests(7, 0.9, 400) for name in POLICIES}
    for name, work in found.items():
        simulate(work, POLICIES[name](work))
    return found


def mean(work: list[Request], urgent: bool = False) -> float:
    return statistics.mean(one.latency for one in work[40:] if not urgent or one.priority == 0)


def test_everybody_ends_whatever_the_policy(runs: dict[str, list[Request]]) -> None:
    for work in runs.values():
        assert all(one.ended > one.came and one.done == one.calls for one in work)


def test_requests_wait_less_than_with_any_rival_and_the_urgent_half_as_long(runs: dict[str, list[Request]]) -> None:
    for rival in RIVALS:
        assert mean(runs[OURS]) < mean(runs[rival])
        assert mean(runs[OURS], urgent=True) < 0.6 * mean(runs[rival], urgent=True)


def test_what_it_learns_makes_forwards_wide_where_that_pays_and_only_there() -> None:
    work = requests(8, 0.9, 400)
    batcher = POLICIES[OURS](work)
    forwards = simulate(work, batcher)
    batcher.check()
    batcher.costs.check()
    assert sum(len(one.aboard) for one in forwards) == sum(one.calls for one in work)
    assert batcher.costs.seconds((DENOISE, "sd"), 3) == pytest.approx(0.186, rel=0.1)
    widths = {kind: [len(one.aboard) for one in forwards if one.key == (DENOISE, kind)] for kind in ("sd", "edit")}
    assert statistics.mean(widths["sd"]) > 1.3 and max(widths["sd"]) >= 4
    assert statistics.mean(widths["edit"]) < 1.1


@pytest.mark.parametrize(("dearer", "shares"), [(1.05, True), (4.0, False)])
def test_lora_sets_share_forwards_only_where_that_pays(
    dearer: float, shares: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_load, "MIX", dearer)
    work = requests(8, 0.9, 400)
    aboard = [one.aboard for one in simulate(work, POLICIES[OURS](work)) if one.key == (DENOISE, "sd")]
    shared = [runs for runs in aboard if len(runs) > 1]
    mixed = [runs for runs in shared if len({work[run].adapters for run in runs}) > 1]
    assert (len(mixed) > len(shared) / 2) if shares else (len(mixed) < len(shared) / 20)


def test_the_same_work_makes_the_same_schedule() -> None:
    first, second = (simulate(work, POLICIES[OURS](work)) for work in (requests(9, 0.6, 100), requests(9, 0.6, 100)))
    assert first == second

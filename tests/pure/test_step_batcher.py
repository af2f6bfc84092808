"""Which calls go next: by due, with whom, how wide; on costs like those published for an H200."""

from __future__ import annotations

import itertools
from collections.abc import Hashable

import pytest

from models.stepping.batcher import StepBatcher, Waiting
from models.stepping.costs import StepCosts, Variety

ENCODE, DENOISE, DECODE = range(3)
SMALL = {1: 0.167, 3: 0.186, 8: 0.425}  # seconds of a step at 512 x 512, by rows: wide pays
LARGE = {1: 0.243, 2: 0.474, 3: 0.711}  # at 1024 x 1024: two rows take as long as two forwards
numbers = itertools.count(1)


def batcher(**tunables: float) -> StepBatcher:
    """A batcher that knows what forwards cost and has seen some."""
    costs = StepCosts()
    for key, curve in {"small": SMALL, "large": LARGE, "text": {1: 0.01}, "vae": {1: 0.25, 2: 0.5}}.items():
        for _ in range(3):
            for rows, seconds in curve.items():
                costs.learn(key, rows, seconds)
    made = StepBatcher(costs, **tunables)
    for _ in range(100):
        made.add(call("large", remaining=20))
        made.next()
    return made


def call(
    key: Hashable = "small", remaining: float = 20, joined: float = 0.0, *, priority: int = 2, lane: int = DENOISE,
    rows: int = 1, run: int | None = None, variant: Hashable = None,
) -> Waiting:  # fmt: skip
    return Waiting(next(numbers) if run is None else run, key, rows, lane, priority, remaining, joined, variant)


def after(made: StepBatcher, *calls: Waiting) -> list[list[Waiting]]:
    """What goes, forward by forward, when these wait."""
    for one in calls:
        made.add(one)
    gone = []
    while len(made):
        made.check()
        gone.append(made.next())
    made.check()
    assert made.next() == []
    return gone


def test_short_work_goes_before_long_work_that_came_a_little_earlier() -> None:
    long, short = call("large", 50, 0.0), call("large", 4, 2.0)
    assert after(batcher(), long, short) == [[short], [long]]
    assert after(batcher(favour=0.0), long, short) == [[long], [short]]


def test_nobody_waits_for_ever_for_those_who_came_later() -> None:
    made, old = batcher(patience=30.0), call("large", 50, 0.0)
    made.add(old)
    for second in range(10_000):
        made.add(call("large", 1, float(second), priority=0))
        if old in made.next():
            break
    assert 30 < second < 300


def test_the_urgent_go_first_and_between_any_two_steps() -> None:
    made, late, early = batcher(), call("large", 50, 100.0, priority=0), call("large", 1, 0.0, priority=1)
    assert after(made, early, late) == [[late], [early]]


def test_weights_favour_who_pays() -> None:
    paid, usual = call("large", 20, 0.5, priority=1), call("large", 20, 0.0)
    assert after(batcher(), usual, paid) == [[paid], [usual]]


def test_an_urgent_run_is_joined_where_that_costs_it_little() -> None:
    urgent, usual, other = call(priority=0), call(), call("large")
    assert after(batcher(), other, usual, urgent) == [[urgent, usual], [other]]
    urgent, usual = call("large", priority=0), call("large")
    assert after(batcher(), usual, urgent) == [[urgent], [usual]]


def test_a_decode_ends_a_run_and_an_encode_finds_it_company_so_they_go_first() -> None:
    steps, decode, encode = call(remaining=2), call("vae", 0, 5.0, lane=DECODE), call("text", 20, 6.0, lane=ENCODE)
    gone = after(batcher(), steps, decode, encode)
    assert gone[2] == [steps] and {id(one) for forward in gone[:2] for one in forward} == {id(decode), id(encode)}


def test_decodes_are_merged_only_where_that_pays() -> None:
    assert [len(one) for one in after(batcher(), *(call("vae", 0, lane=DECODE) for _ in range(4)))] == [1] * 4
    made = batcher()
    for _ in range(9):
        made.costs.learn("vae", 2, 0.26)
        made.costs.learn("vae", 4, 0.28)
    assert [len(one) for one in after(made, *(call("vae", 0, lane=DECODE) for _ in range(4)))] == [4]


@pytest.mark.parametrize(
    ("key", "waiting", "behind", "first"),
    [
        ("small", 2, 0, 2),  # two rows take hardly longer than one
        ("small", 4, 0, 3),  # a fourth would delay three by more than it gains
        ("small", 4, 20, 4),  # unless many wait behind them
        ("small", 8, 60, 8),
        ("large", 2, 0, 1),
        ("large", 8, 10, 1),
        ("large", 2, 40, 2),  # 3 % are something to forty
    ],
)
def test_a_forward_is_as_wide_as_pays(key: str, waiting: int, behind: int, first: int) -> None:
    made = batcher()
    for _ in range(behind):
        made.add(call("other", 500, 1e6))
    for _ in range(waiting):
        made.add(call(key))
    assert len(made.next()) == first


def test_the_two_halves_of_a_guided_step_go_together_or_one_after_the_other() -> None:
    first, second = call("small", run=1), call("small", run=1)
    assert after(batcher(), first, second) == [[first, second]]
    others = [call("small", run=run) for run in (2, 2, 3, 3, 4, 4)]
    gone = after(batcher(), *others)
    assert all(len([one for one in forward if one.run == run]) in (0, 2) for forward in gone for run in (2, 3, 4))


def test_rows_that_did_not_fit_are_never_tried_again() -> None:
    made = batcher()
    made.limit("small", 2)
    made.limit("small", 5)
    assert [len(one) for one in after(made, *(call() for _ in range(5)))] == [2, 2, 1]
    wide = call(rows=4)
    assert after(made, wide) == [[wide]]  # alone, whatever it has


@pytest.mark.parametrize(
    ("dearer", "sets"),
    [
        (1.05, [["a", None, "a"], ["b", None, "a"]]),
        (3.0, [["a", "a", "a"], [None, None], ["b"]]),
    ],
)
def test_variants_share_a_forward_where_that_was_measured_to_pay(
    dearer: float, sets: list[list[str | None]]
) -> None:
    made = batcher()
    for _ in range(3):
        for rows, seconds in SMALL.items():
            made.costs.learn("small", rows, seconds * dearer, Variety.SEVERAL)
    gone = after(made, *(call(variant=one) for one in ("a", None, "a", "b", None, "a")))
    assert [[one.variant for one in calls] for calls in gone] == sets


def test_a_dear_variant_in_the_line_does_not_keep_the_others_from_going_together() -> None:
    """Those who stay behind are not as cheap as those who go."""
    made = batcher()
    for _ in range(3):
        made.costs.learn("small", 1, 2.0, Variety.ONE)
        made.costs.learn("small", 2, 4.0, Variety.SEVERAL)
    gone = after(made, *(call(variant=one) for one in (None, "a", None, None, None)))
    assert [[one.variant for one in calls] for calls in gone] == [[None] * 4, ["a"]]


def test_to_look_who_goes_along_does_not_take_longer_for_who_waits_far_behind() -> None:
    made, looked = batcher(), []

    class Counted(str):
        def __eq__(self, other: object) -> bool:
            looked.append(1)
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    for number in range(500):
        made.add(call(variant=Counted("ab"[number > 0])))
    made.next()
    assert len(looked) < 200


def test_a_mix_that_was_never_measured_is_tried() -> None:
    made = batcher()
    assert len(after(made, call(variant="a"), call(variant="b"), call())[0]) == 3


def test_who_comes_first_goes_first_also_when_variants_do_not_mix() -> None:
    made = batcher()
    for _ in range(3):
        made.costs.learn("small", 2, 9.0, Variety.SEVERAL)
    first, *others = call(variant="a"), *(call(variant="b") for _ in range(5))
    assert after(made, first, *others)[0] == [first]


def test_both_halves_of_a_guided_step_of_one_variant_go_together() -> None:
    made = batcher()
    for _ in range(3):
        made.costs.learn("small", 4, 9.0, Variety.SEVERAL)
    calls = [call(run=9_000 + number, variant=number) for number in (1, 2) for _ in range(2)]
    assert after(made, *calls) == [calls[:2], calls[2:]]


def test_an_unknown_network_is_tried_alone_then_ever_wider() -> None:
    made, widths = StepBatcher(StepCosts()), []
    for _ in range(12):
        for _ in range(8 - len(made)):
            made.add(call("new"))
        gone = made.next()
        widths.append(len(gone))
        made.costs.learn("new", len(gone), 1.0)
    assert widths[:2] == [1, 1] and widths[-1] == 8 and sorted(widths) == widths


def test_who_is_not_welcome_waits_while_somebody_else_is() -> None:
    """The weights of its network are not on the device, and those that would leave for them have just come."""
    made, first, second = batcher(), call("large", joined=0.0), call("small", joined=1.0)
    made.add(first)
    made.add(second)
    assert made.next(lambda one: one is second) == [second]
    assert made.next(lambda one: one is second) == [first]


def test_a_call_that_leaves_is_not_run() -> None:
    made, stays, leaves = batcher(), call(), call()
    made.add(stays)
    made.add(leaves)
    made.remove(leaves)
    assert made.next() == [stays] and len(made) == 0


def test_it_tells_what_waits() -> None:
    made = batcher()
    assert repr(made) == "StepBatcher(0 calls of 0 runs: nobody waits)"
    made.add(call(rows=2))
    assert repr(made) == "StepBatcher(1 calls of 1 runs: 1 x 2 rows)"

"""What forwards cost: measured, between measurements, beyond them, and what is not believed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.stepping.costs import KEPT_KEYS, STALE, StepCosts, Variety, variety_of


def costs_of(curve: dict[int, float], times: int = 3) -> StepCosts:
    """Every width measured so many times, in turn."""
    costs = StepCosts()
    for _ in range(times):
        for rows, seconds in curve.items():
            costs.learn("unet", rows, seconds)
    return costs


def test_nothing_is_known_of_what_never_ran() -> None:
    costs = costs_of({1: 1.0})
    assert costs.seconds("other", 1) is None and costs.price("other", 4) is None and costs.reach("other") == 0


def test_a_line_lies_between_measured_widths_and_goes_on_beyond_them() -> None:
    costs = costs_of({1: 0.167, 3: 0.186, 8: 0.425})
    assert costs.seconds("unet", 3) == pytest.approx(0.186)
    assert costs.seconds("unet", 2) == pytest.approx(0.1765)
    assert costs.seconds("unet", 10) == pytest.approx(0.425 + 2 * (0.425 - 0.186) / 5)
    assert costs.price("unet", 1) == pytest.approx(0.167)
    assert costs.price("unet", 8) == pytest.approx(0.425 / 8)


def test_less_than_the_narrowest_lies_between_its_time_and_its_share() -> None:
    assert 1.0 < costs_of({4: 4.0}).seconds("unet", 1) < 4.0


def test_a_price_is_that_of_the_best_width_that_fits() -> None:
    costs = costs_of({1: 1.0, 2: 1.0, 4: 4.0})
    assert [costs.price("unet", rows) for rows in (1, 2, 3, 4)] == [1.0, 0.5, 0.5, 0.5]


def test_a_wider_forward_is_hoped_for_until_it_was_measured_twice() -> None:
    costs = costs_of({1: 1.0})
    assert costs.seconds("unet", 2) == 1.0 and costs.reach("unet") == 2
    costs.learn("unet", 2, 9.0)  # it also chose its kernels
    assert costs.seconds("unet", 2) == 1.0 and costs.reach("unet") == 2
    costs.learn("unet", 2, 1.9)
    assert costs.seconds("unet", 2) == 1.9 and costs.reach("unet") == 4


def test_the_very_first_forward_is_forgiven_what_it_cost_more() -> None:
    costs = StepCosts()
    costs.learn("unet", 1, 30.0)
    costs.learn("unet", 1, 0.2)
    assert costs.seconds("unet", 1) == 0.2


def test_a_hiccup_moves_little_and_a_slower_clock_is_learned() -> None:
    costs = costs_of({1: 1.0})
    costs.learn("unet", 1, 100.0)
    assert costs.seconds("unet", 1) < 1.25
    for _ in range(40):
        costs.learn("unet", 1, 5.0)
    assert costs.seconds("unet", 1) == pytest.approx(5.0, rel=0.01)


def test_a_width_not_measured_for_long_is_hoped_for_again() -> None:
    costs = costs_of({1: 1.0, 2: 40.0})  # something else had the device
    for _ in range(2 * STALE):
        costs.learn("unet", 1, 1.0)
    assert costs.seconds("unet", 2) == 1.0


def test_a_variety_costs_what_the_others_do_until_it_was_measured_twice() -> None:
    costs = costs_of({1: 1.0, 4: 1.2})
    assert costs.seconds("unet", 4, Variety.SEVERAL) == 1.2 and costs.price("unet", 4, Variety.ONE) == 0.3
    costs.learn("unet", 4, 9.0, Variety.SEVERAL)
    assert costs.seconds("unet", 4, Variety.SEVERAL) == 1.2
    costs.learn("unet", 4, 3.0, Variety.SEVERAL)
    assert costs.seconds("unet", 4, Variety.SEVERAL) == 3.0
    assert costs.seconds("unet", 4) == 1.2 and costs.seconds("unet", 4, Variety.ONE) == 1.2


def test_a_variety_not_measured_for_long_is_hoped_for_again() -> None:
    costs = costs_of({1: 1.0})
    for _ in range(2):
        costs.learn("unet", 1, 40.0, Variety.SEVERAL)
    assert costs.seconds("unet", 1, Variety.SEVERAL) == 40.0
    for _ in range(201):
        costs.learn("unet", 1, 1.0)
    assert costs.seconds("unet", 1, Variety.SEVERAL) == 1.0
    costs.check()


@pytest.mark.parametrize(
    ("variants", "variety"),
    [([None, None], Variety.NONE), (["a", "a"], Variety.ONE), ([None, "a"], Variety.SEVERAL), ("ab", Variety.SEVERAL)],
)
def test_a_forward_carries_no_variant_one_or_several(variants: list[str | None], variety: Variety) -> None:
    assert variety_of(variants) is variety


def test_only_so_many_keys_are_kept() -> None:
    costs = StepCosts()
    for number in range(3 * KEPT_KEYS):
        costs.learn("often", 1, 1.0)
        costs.learn(number, 1, 1.0)
    costs.check()
    assert costs.seconds("often", 1) == 1.0 and costs.seconds(0, 1) is None


def test_a_width_that_a_hiccup_spoiled_is_tried_again_soon() -> None:
    costs = costs_of({1: 1.0})
    costs.learn("unet", 2, 1.1)
    costs.learn("unet", 2, 9.0)
    for _ in range(97):
        costs.learn("unet", 1, 1.0)
    assert costs.seconds("unet", 2) == 9.0
    for _ in range(101):
        costs.learn("unet", 1, 1.0)
    assert costs.seconds("unet", 2) == 1.0 and costs.reach("unet") == 2


@given(
    st.lists(st.tuples(st.integers(1, 16), st.floats(1e-6, 1e3), st.sampled_from(Variety)), min_size=1, max_size=60),
    st.integers(1, 40), st.sampled_from(Variety),
)  # fmt: skip
def test_whatever_was_measured_seconds_are_positive_and_prices_fall(
    measured: list[tuple[int, float, Variety]], rows: int, variety: Variety
) -> None:
    costs = StepCosts()
    for width, seconds, kind in measured:
        costs.learn("unet", width, seconds, kind)
        costs.check()
    found = costs.seconds("unet", rows, variety)
    price, wider = (costs.price("unet", most, variety) for most in (rows, rows + 1))
    assert found > 0 and 0 < price <= found / rows and wider <= price * (1 + 1e-9)

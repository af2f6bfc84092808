"""How fast one address may open connections: what is over the rate waits, and is closed where it would wait long."""

from __future__ import annotations

import pytest

from api.newcomers import BURST, MOST, PATIENCE, TELL, Newcomers


def test_a_burst_comes_at_once_then_some_wait_and_the_rest_is_closed() -> None:
    newcomers = Newcomers(100)
    waits = [newcomers.wait("a", 0.0) for _ in range(1000)]
    free, late = round(100 * BURST), round(100 * PATIENCE)
    assert waits[:free] == [0.0] * free
    assert [round(wait or 0, 6) for wait in waits[free : free + late]] == [(n + 1) / 100 for n in range(late)]
    assert set(waits[free + late + 1 :]) == {None}
    assert newcomers.wait("b", 0.0) == 0.0, "another address has its own"


def test_whoever_keeps_to_the_rate_never_waits_and_who_was_closed_is_not_punished() -> None:
    newcomers = Newcomers(100)
    assert {newcomers.wait("a", n / 100) for n in range(2000)} == {0.0}
    while newcomers.wait("a", 20.0) is not None:
        pass
    for _ in range(1000):
        assert newcomers.wait("a", 20.0) is None
    assert newcomers.wait("a", 20.0 + PATIENCE + 0.02) == 0.0


def test_no_number_no_limit() -> None:
    newcomers = Newcomers(0)
    assert {newcomers.wait("a", 0.0) for _ in range(10_000)} == {0.0} and len(newcomers) == 0


def test_addresses_are_forgotten() -> None:
    newcomers = Newcomers(100)
    for number in range(1000):
        newcomers.wait(str(number), number * 1.0)
    assert len(newcomers) < 5
    for number in range(MOST + 1000):
        newcomers.wait(str(number), 2000.0)
    assert len(newcomers) <= MOST


def test_the_log_is_told_once_in_a_while(caplog: pytest.LogCaptureFixture) -> None:
    newcomers = Newcomers(1)
    for now in (0.0, 1.0, TELL, TELL + 1):
        newcomers.tell("10.1.2.3", now)
    assert [record.getMessage().split()[0] for record in caplog.records] == ["10.1.2.3"] * 2

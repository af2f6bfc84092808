"""The budget of bytes on their way."""

from __future__ import annotations

import contextlib
import random

import pytest

from core.errors import Overloaded
from engine.intake import Charge, Intake, network


def test_bytes_are_charged_as_they_come_and_not_before() -> None:
    intake = Intake(100)
    for number in range(1000):
        intake.charge(f"10.0.0.{number}", "a")
    assert intake.bytes == 0
    intake.charge("10.1.0.1", "b").add(100)
    assert intake.bytes == 100


@pytest.mark.parametrize(
    ("shares", "mine", "other", "reason"),
    [
        ({}, ("a", "t"), ("b", "u"), "bodies_server"),
        ({"address_share": 0.5}, ("a", "t"), ("a", "u"), "bodies_address"),
        ({"tenant_share": 0.5}, ("a", "t"), ("b", "t"), "bodies_tenant"),
    ],
)
def test_what_is_over_the_budget_is_refused_and_told(
    shares: dict[str, float], mine: tuple[str, str], other: tuple[str, str], reason: str
) -> None:
    told: list[str] = []
    intake = Intake(100, refused=told.append, **shares)
    most = 50 if shares else 100
    first, second = intake.charge(*mine), intake.charge(*other)
    first.add(most - 1)
    second.add(1)
    with pytest.raises(Overloaded) as caught:
        second.add(1)
    assert caught.value.retry_after and told == [reason]
    assert intake.bytes == most, "what was refused is not counted"
    if shares:
        intake.charge("elsewhere", "another").add(50)
    first.close()
    second.add(most - 1)
    second.close()
    second.close()
    intake.check()


def test_the_only_body_of_an_account_always_passes() -> None:
    intake = Intake(100, address_share=0.1)
    alone = intake.charge("a", "t")
    alone.add(60)
    alone.add(60)
    other = intake.charge("b", "t")
    with pytest.raises(Overloaded):
        other.add(1)


def test_the_sums_hold_whatever_happens() -> None:
    chance, open_ = random.Random(4), list[Charge]()
    intake = Intake(1000, address_share=0.3, tenant_share=0.6)
    for _ in range(5000):
        move = chance.random()
        if move < 0.3 or not open_:
            open_.append(intake.charge(chance.choice("abcd"), chance.choice("tu")))
        elif move < 0.7:
            with contextlib.suppress(Overloaded):
                chance.choice(open_).add(chance.randrange(200))
        else:
            open_.pop(chance.randrange(len(open_))).close()
        intake.check()
    for charge in open_:
        charge.close()
    intake.check()
    assert intake.bytes == intake.bodies == 0


@pytest.mark.parametrize(
    ("host", "found"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::1", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::1", "2001:db8:1:3::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("testclient", "testclient"),
        ("a:b", "a:b"),
        ("", ""),
    ],
)
def test_an_ipv6_client_is_its_network(host: str, found: str) -> None:
    assert network(host) == found

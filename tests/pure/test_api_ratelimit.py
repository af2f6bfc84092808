"""Rate limits on a clock of our own."""

from __future__ import annotations

import pytest

from api.ratelimit import RateLimiter
from core.settings import Tier


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def limiter(clock: Clock, **quotas: int) -> RateLimiter:
    return RateLimiter({"free": Tier(**quotas)}, clock)


def allowed(limits: RateLimiter, tenant: str = "acme", most: int = 1000) -> int:
    """How many requests are let through now."""
    for count in range(most):
        verdict = limits.check(tenant, "free")
        assert verdict is not None
        if verdict.retry_after:
            return count
    return most


def test_a_burst_gets_the_whole_quota_and_then_one_each_interval(clock: Clock) -> None:
    limits = limiter(clock, per_minute=6)
    assert allowed(limits) == 6
    verdict = limits.check("acme", "free")
    assert verdict is not None and verdict.retry_after == pytest.approx(10.0)
    clock.now += 9.9
    assert allowed(limits) == 0
    clock.now += 0.2
    assert allowed(limits) == 1
    clock.now += 3600
    assert allowed(limits) == 6


def test_hours_and_days_are_enforced_beside_minutes(clock: Clock) -> None:
    limits = limiter(clock, per_minute=10, per_hour=15, per_day=16)
    assert allowed(limits) == 10
    clock.now += 60
    assert allowed(limits) == 5
    clock.now += 7200
    assert allowed(limits) <= 2


def test_a_refused_request_costs_nothing_of_any_window(clock: Clock) -> None:
    limits = limiter(clock, per_minute=1, per_hour=2)
    assert allowed(limits) == 1
    for _ in range(50):
        limits.check("acme", "free")
    clock.now += 60
    assert allowed(limits) == 1


def test_tenants_do_not_share_a_quota_and_other_tiers_have_none(clock: Clock) -> None:
    limits = limiter(clock, per_minute=2)
    assert allowed(limits, "acme") == 2
    assert allowed(limits, "zenith") == 2
    assert limits.check("acme", "unknown") is None


def test_a_clock_that_jumps_back_locks_nobody_out_for_longer_than_the_window(clock: Clock) -> None:
    limits = limiter(clock, per_minute=2)
    assert allowed(limits) == 2
    clock.now -= 1_000_000
    verdict = limits.check("acme", "free")
    assert verdict is not None and 0 < verdict.retry_after <= 60
    clock.now += 61
    assert allowed(limits) >= 1


def test_a_clock_that_jumps_ahead_gives_one_quota_not_more(clock: Clock) -> None:
    limits = limiter(clock, per_minute=3)
    allowed(limits)
    clock.now += 1_000_000
    assert allowed(limits) == 3


def test_headers_tell_quota_and_rest_of_the_tightest_window(clock: Clock) -> None:
    verdict = limiter(clock, per_minute=5, per_hour=20).check("acme", "free")
    assert verdict is not None
    headers = dict(verdict.headers)
    assert headers[b"ratelimit-policy"] == b'"minute";q=5;w=60, "hour";q=20;w=3600'
    assert headers[b"ratelimit"] == b'"minute";r=4;t=12'
    assert headers[b"x-ratelimit-limit"] == b"5"
    assert headers[b"x-ratelimit-remaining"] == b"4"


def test_who_has_a_whole_quota_again_is_forgotten(clock: Clock) -> None:
    limits = limiter(clock, per_minute=2, per_hour=5)
    for number in range(5_000):
        limits.check(f"2001:db8:{number:x}::/64", "free")
        clock.now += 1
    assert len(limits) < 4_000
    for number in range(2_000):
        limits.check(f"late {number}", "free")
        clock.now += 3600
    assert len(limits) <= 4


def test_forgetting_gives_nobody_a_new_quota(clock: Clock) -> None:
    limits = limiter(clock, per_hour=2)
    assert allowed(limits) == 2
    for number in range(1_000):
        limits.check(str(number), "free")
        clock.now += 1
    assert allowed(limits) == 0

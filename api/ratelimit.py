"""How fast a tenant may ask: the generic cell rate algorithm (GCRA) for the minutes, hours and days of its tier.

Each window keeps one number, the theoretical arrival time: a whole quota may come at once, then one request every
window / quota. Time is the caller's monotonic clock; should it jump back all the same, nobody waits longer than one
window.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from core.settings import Tier

Header = tuple[bytes, bytes]


@dataclass(frozen=True, slots=True)
class Verdict:
    """`retry_after`: seconds to wait, 0.0 when the request is let through. `headers` tell the quota and what is left:
    RateLimit-Policy and RateLimit (structured fields) and the older X-RateLimit-* of the tightest window."""

    retry_after: float
    headers: tuple[Header, ...]


@dataclass(frozen=True, slots=True)
class Window:
    name: str
    seconds: float
    quota: int

    @property
    def interval(self) -> float:
        return self.seconds / self.quota


def windows(tier: Tier) -> tuple[Window, ...]:
    """The windows a tier limits."""
    quotas = ("minute", 60.0, tier.per_minute), ("hour", 3600.0, tier.per_hour), ("day", 86_400.0, tier.per_day)
    return tuple(Window(name, seconds, quota) for name, seconds, quota in quotas if quota is not None)


class RateLimiter:
    """Counts by tenant. A refused request costs nothing of any window."""

    def __init__(self, tiers: Mapping[str, Tier], clock: Callable[[], float] = time.monotonic) -> None:
        self._tiers = {name: windows(tier) for name, tier in tiers.items()}
        self._clock = clock
        self._arrivals: dict[tuple[str, str, str], float] = {}

    def check(self, tenant: str, tier: str) -> Verdict | None:
        """Count one request of this tenant; None when its tier has no limits."""
        limits = self._tiers.get(tier)
        if not limits:
            return None
        now = self._clock()
        fills = [self._fill(tenant, tier, window, now) for window in limits]
        # How far each window would be filled beyond its whole length, were this request let through.
        waits = [fill + w.interval - w.seconds for fill, w in zip(fills, limits, strict=True)]
        retry_after = max(waits)
        if retry_after <= 1e-6:
            retry_after = 0.0
            fills = [fill + w.interval for fill, w in zip(fills, limits, strict=True)]
            for window, fill in zip(limits, fills, strict=True):
                self._arrivals[tenant, tier, window.name] = now + fill
        return Verdict(retry_after, _headers(limits, fills))

    def _fill(self, tenant: str, tier: str, window: Window, now: float) -> float:
        key = tenant, tier, window.name
        ahead = self._arrivals.get(key, now) - now
        if ahead > window.seconds:  # only a clock that jumped back
            ahead = window.seconds
            self._arrivals[key] = now + ahead
        return max(0.0, ahead)


def _headers(limits: tuple[Window, ...], fills: list[float]) -> tuple[Header, ...]:
    left = [int((w.seconds - fill) / w.interval + 1e-6) for w, fill in zip(limits, fills, strict=True)]
    tight = min(range(len(limits)), key=lambda index: left[index])
    reset = math.ceil(fills[tight])
    policy = ", ".join(f'"{w.name}";q={w.quota};w={w.seconds:.0f}' for w in limits)
    return (
        (b"ratelimit-policy", policy.encode()),
        (b"ratelimit", f'"{limits[tight].name}";r={left[tight]};t={reset}'.encode()),
        (b"x-ratelimit-limit", str(limits[tight].quota).encode()),
        (b"x-ratelimit-remaining", str(left[tight]).encode()),
        (b"x-ratelimit-reset", str(reset).encode()),
    )

"""How fast a tenant (or, without keys, an address) may ask: the generic cell rate algorithm (GCRA) for the minutes,
hours and days of its tier.

Each window keeps one number, the theoretical arrival time: a whole quota may come at once, then one request every
window / quota. Time is the caller's monotonic clock; should it jump back all the same, nobody waits longer than one
window. A bucket that is full again is forgotten.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from core.settings import Tier

Header = tuple[bytes, bytes]
WINDOWS = 3      # minute, hour, day
MOST = 300_000   # numbers that are kept at most: about 60 MiB


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
    """Counts by whoever is named. A refused request costs nothing of any window."""

    def __init__(self, tiers: Mapping[str, Tier], clock: Callable[[], float] = time.monotonic) -> None:
        self._tiers = {name: windows(tier) for name, tier in tiers.items()}
        self._clock = clock
        self._arrivals: OrderedDict[tuple[str, str, str], float] = OrderedDict()

    def __len__(self) -> int:
        """How many numbers are kept."""
        return len(self._arrivals)

    def check(self, who: str, tier: str) -> Verdict | None:
        """Count one request of this tenant or address; None when its tier has no limits."""
        limits = self._tiers.get(tier)
        if not limits:
            return None
        now = self._clock()
        fills = [self._fill(who, tier, window, now) for window in limits]
        # How far each window would be filled beyond its whole length, were this request let through.
        waits = [fill + w.interval - w.seconds for fill, w in zip(fills, limits, strict=True)]
        retry_after = max(waits)
        if retry_after <= 1e-6:
            retry_after = 0.0
            fills = [fill + w.interval for fill, w in zip(fills, limits, strict=True)]
            for window, fill in zip(limits, fills, strict=True):
                self._arrivals[who, tier, window.name] = now + fill
            self._forget(now)
        return Verdict(retry_after, _headers(limits, fills))

    def _forget(self, now: float) -> None:
        """Look at the oldest few: whoever has not asked for a whole window is as one who never did. More are looked at
        than a request adds, so the old ones are gone sooner than new ones come; beyond `MOST` the oldest go anyway."""
        for _ in range(min(2 * WINDOWS, len(self._arrivals))):
            oldest, arrival = self._arrivals.popitem(last=False)
            if arrival > now and len(self._arrivals) < MOST:
                self._arrivals[oldest] = arrival

    def _fill(self, who: str, tier: str, window: Window, now: float) -> float:
        key = who, tier, window.name
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

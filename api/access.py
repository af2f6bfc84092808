"""The access log: one line per request that was not answered well, or of every request.

A line holds neither query strings nor headers nor bodies: keys, signatures and prompts are there. What a stranger can
make happen a thousand times a second fills no disk: beyond so many lines a second the rest is counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

import structlog
from starlette.types import Scope

from core.trace import Trace

log = structlog.get_logger("http")
MOST_A_SECOND = 100  # lines of `errors`
MOST_JOBS = 16  # whose ids a line has
PROBES = frozenset({"/health", "/ready", "/metrics"})
PROBES_UNDER = ("/health/", "/v2/health/")
LEAST = {"off": 1000, "errors": 400, "all": 0}


class AccessLog:
    """`least` is the smallest status that has a line: whoever answers well need not even ask."""

    def __init__(self, which: Literal["off", "errors", "all"], clock: Callable[[], float] = time.monotonic) -> None:
        self.least = LEAST[which]
        self._all, self._clock = which == "all", clock
        self._second, self._lines = 0, 0

    def note(self, scope: Scope, route: str, status: int, seconds: float, received: int, sent: int) -> None:
        """A request was answered. Bytes are of the bodies; `route` is the path's template."""
        probe = scope["path"] in PROBES or scope["path"].startswith(PROBES_UNDER)
        if (probe and not self._all) or not self._has_room():
            return
        trace: Trace = scope["trace"]
        caller, client = scope.get("caller"), scope.get("client")
        tell = log.debug if probe else log.warning if status >= 500 else log.info
        tell(
            "request",
            request=trace.request,
            method=scope["method"],
            path=scope["path"][:200],
            route=route,
            status=status,
            seconds=round(seconds, 4),
            received=received,
            sent=sent,
            client=client[0] if client else None,
            tenant=caller.tenant if caller else None,
            **({"jobs": trace.jobs[:MOST_JOBS]} if trace.jobs else {}),
        )

    def _has_room(self) -> bool:
        if self._all:
            return True
        second = int(self._clock())
        if second != self._second:
            if self._lines > MOST_A_SECOND:
                log.warning("requests without a line", count=self._lines - MOST_A_SECOND)
            self._second, self._lines = second, 0
        self._lines += 1
        return self._lines <= MOST_A_SECOND

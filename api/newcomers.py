"""How fast one address may open connections: a token bucket for each (as GCRA, one number an address).

Who opens, sends and leaves again and again costs the event loop more than who asks on one connection, and is never in
anybody's way by how many he holds. What is over the rate is heard later, and closed unheard where that would be more
than `PATIENCE` later. Time is the caller's.
"""

from __future__ import annotations

import logging
from collections import OrderedDict

log = logging.getLogger("imagepool.http")
BURST = 5.0      # seconds' worth of connections that may come at once
PATIENCE = 1.0   # seconds that one is kept waiting at most
MOST = 100_000   # addresses that are remembered at most
TELL = 60.0      # seconds between two lines about it in the log


class Newcomers:
    """`per_second`: new connections of one address; 0: any number."""

    def __init__(self, per_second: int) -> None:
        self._interval = 1 / per_second if per_second else 0.0
        self._due: OrderedDict[str, float] = OrderedDict()  # when the bucket is full again, oldest newcomer first
        self._told = float("-inf")

    def __len__(self) -> int:
        """How many addresses are remembered."""
        return len(self._due)

    def wait(self, address: str, now: float) -> float | None:
        """Count a new connection of this address: in how many seconds it may be heard (0.0: now). None when it is to
        be closed; it is not counted then."""
        ahead = max(0.0, self._due.get(address, now) - now) + self._interval
        late = ahead - BURST
        if late > PATIENCE:
            return None
        if self._interval:
            self._due[address] = now + ahead
            self._forget(now)
        return max(0.0, late)

    def tell(self, peer: str, now: float) -> None:
        """A connection of this peer was closed: a line in the log, once in a while."""
        if now - self._told >= TELL:
            self._told = now
            log.warning("%s opens connections faster than --new-connections allows; some are closed", peer)

    def _forget(self, now: float) -> None:
        """Look at the two that were looked at longest ago: more than a newcomer adds. Beyond `MOST` they go anyway."""
        for _ in range(min(2, len(self._due))):
            address, due = self._due.popitem(last=False)
            if due > now and len(self._due) < MOST:
                self._due[address] = due

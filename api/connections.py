"""Who holds how many connections, and which is closed when there are too many.

Pure bookkeeping: no socket, no clock. A connection that awaits a request is idle; one whose request is not answered is
busy. When room is needed, the one that has been idle longest is closed, of the address that holds most. So whoever
opens connections and leaves them takes the room from himself first, and keeps nobody out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

MOST_AWAY = 64  # connections that were turned away and still read our word about it


def share(most: int, per_address: int) -> int:
    """How many of `most` connections one address may really hold, where the settings say `per_address`."""
    return min(per_address, max(1, most // 2))


class Holder:
    """What one address holds."""

    __slots__ = ("address", "count", "idle")

    def __init__(self, address: str) -> None:
        self.address, self.count = address, 0
        self.idle: OrderedDict[Place, None] = OrderedDict()  # idle for longest first


class Place:
    """The room of one connection. `close` is called when it is taken from it."""

    __slots__ = ("client", "close", "holder")

    def __init__(self, holder: Holder, close: Callable[[], None]) -> None:
        self.holder, self.close = holder, close
        self.client: str | None = None  # whose request a trusted proxy has in flight here


class Connections:
    """All connections of the server. `most`: in all; `per_address`: of one address (see `intake.network`), and never
    more than half of all."""

    def __init__(self, most: int, per_address: int) -> None:
        self._most, self._per_address = most, share(most, per_address)
        self._holders: dict[str, Holder] = {}
        self._by_count: dict[int, dict[Holder, None]] = {}  # those with idle connections, by how many they hold
        self._in_flight: dict[str, int] = {}  # requests, by the address that a trusted proxy names
        self._count = 0
        self.away = 0

    def __len__(self) -> int:
        return self._count

    def take(self, address: str, close: Callable[[], None], *, proxy: bool = False) -> Place | None:
        """Room for a new connection, which is idle; None when there is none. `proxy`: it may hold any number."""
        holder = self._holders.get(address)
        if holder is not None and not proxy and holder.count >= self._per_address:
            if not holder.idle:
                return None
            self._close(next(iter(holder.idle)))
        elif self._count >= self._most:
            if not self._by_count:
                return None
            largest = self._by_count[max(self._by_count)]
            self._close(next(iter(next(iter(largest)).idle)))
        holder = self._holders.setdefault(address, Holder(address))
        place = Place(holder, close)
        self._count += 1
        self._change(holder, +1)
        self.idle(place)
        return place

    def free(self, place: Place) -> None:
        """The connection has ended. Free already when it was closed for want of room."""
        self._leave(place)
        holder = place.holder
        if self._holders.get(holder.address) is holder and place.close is not _closed:
            place.close = _closed
            self.busy(place)
            self._count -= 1
            self._change(holder, -1)
            if not holder.count:
                del self._holders[holder.address]

    def busy(self, place: Place, client: str | None = None) -> bool:
        """A request has come on it. `client`: the address for which a trusted proxy asks; False when as many requests
        of it are in flight as one address may hold connections."""
        self._leave(place)  # the answer before may not have been taken yet
        holder = place.holder
        if holder.idle.pop(place, 0) is None and not holder.idle:
            self._unlist(holder)
        if client is None:
            return True
        if self._in_flight.get(client, 0) >= self._per_address:
            return False
        self._in_flight[client] = self._in_flight.get(client, 0) + 1
        place.client = client
        return True

    def idle(self, place: Place) -> None:
        """Its request is answered: it awaits the next."""
        self._leave(place)
        if place.close is _closed:
            return
        holder = place.holder
        if not holder.idle:
            self._by_count.setdefault(holder.count, {})[holder] = None
        holder.idle[place] = None

    def _close(self, place: Place) -> None:
        close = place.close
        self.free(place)
        close()

    def _leave(self, place: Place) -> None:
        if place.client is not None:
            self._in_flight[place.client] -= 1
            if not self._in_flight[place.client]:
                del self._in_flight[place.client]
            place.client = None

    def _change(self, holder: Holder, by: int) -> None:
        if holder.idle:
            self._unlist(holder)
        holder.count += by
        if holder.idle:
            self._by_count.setdefault(holder.count, {})[holder] = None

    def _unlist(self, holder: Holder) -> None:
        same = self._by_count[holder.count]
        del same[holder]
        if not same:
            del self._by_count[holder.count]


def _closed() -> None:
    """What a place calls that was given back."""

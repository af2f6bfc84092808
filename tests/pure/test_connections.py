"""Who may hold how many connections, and whose is closed when there are too many."""

from __future__ import annotations

from collections import Counter

import hypothesis.strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from api.connections import Connections, Place


class Crowd:
    """Connections by name, and which of them were closed to make room."""

    def __init__(self, most: int, per_address: int) -> None:
        self.all = Connections(most, per_address)
        self.closed: list[str] = []
        self.places: dict[str, Place] = {}

    def come(self, name: str, address: str, *, proxy: bool = False) -> bool:
        place = self.all.take(address, lambda: self.closed.append(name), proxy=proxy)
        if place is not None:
            self.places[name] = place
        return place is not None


def test_room_is_taken_from_who_holds_most_and_there_from_the_longest_idle() -> None:
    crowd = Crowd(6, 3)
    for name, address in [("old", "b"), ("a1", "a"), ("a2", "a"), ("a3", "a"), ("c1", "c"), ("e1", "e")]:
        assert crowd.come(name, address)
    crowd.all.busy(crowd.places["a1"])
    crowd.all.busy(crowd.places["a2"])
    crowd.all.idle(crowd.places["a2"])
    assert crowd.come("new", "d") and crowd.closed == ["a3"]
    assert crowd.come("newer", "d") and crowd.closed == ["a3", "a2"]
    assert len(crowd.all) == 6


def test_nobody_that_is_busy_is_closed() -> None:
    crowd = Crowd(2, 1)
    assert crowd.come("a1", "a") and crowd.come("c1", "c")
    for name in ("a1", "c1"):
        crowd.all.busy(crowd.places[name])
    assert not crowd.come("b1", "b")
    crowd.all.free(crowd.places["a1"])
    assert crowd.come("b1", "b") and crowd.closed == []


def test_an_address_beyond_its_own_share_takes_the_room_from_itself() -> None:
    crowd = Crowd(10, 2)
    assert crowd.come("b1", "b") and crowd.come("a1", "a") and crowd.come("a2", "a")
    crowd.all.busy(crowd.places["a1"])
    assert crowd.come("a3", "a") and crowd.closed == ["a2"]
    crowd.all.busy(crowd.places["a3"])
    assert not crowd.come("a4", "a") and crowd.come("b2", "b")


def test_no_address_holds_more_than_half_of_a_total_that_was_lowered() -> None:
    crowd = Crowd(6, 4096)
    for number in range(4):
        came = crowd.come(f"a{number}", "a")
        assert came == (number < 3)
        if came:
            crowd.all.busy(crowd.places[f"a{number}"])
    assert all(crowd.come(f"b{number}", "b") for number in range(3))
    assert all(Crowd(most, 4096).come("a", "a") for most in (1, 2))


def test_of_an_address_behind_a_proxy_no_more_requests_than_half_of_all_connections_are_in_flight() -> None:
    crowd = Crowd(6, 4096)
    for number in range(6):
        assert crowd.come(f"p{number}", "proxy", proxy=True)
    assert [crowd.all.busy(crowd.places[f"p{number}"], "x") for number in range(4)] == [True, True, True, False]
    assert crowd.all.busy(crowd.places["p4"], "y")


def test_a_request_that_follows_before_the_answer_was_taken_counts_once() -> None:
    crowd = Crowd(6, 3)
    assert crowd.come("p", "proxy", proxy=True)
    for _ in range(10):
        assert crowd.all.busy(crowd.places["p"], "x")
    crowd.all.idle(crowd.places["p"])
    assert crowd.come("q", "proxy", proxy=True) and crowd.all.busy(crowd.places["q"], "x")


def test_a_proxy_holds_any_number_and_the_requests_of_an_address_behind_it_are_bounded() -> None:
    crowd = Crowd(10, 2)
    for name in "abcd":
        assert crowd.come(name, "proxy", proxy=True)
    assert crowd.all.busy(crowd.places["a"], "x") and crowd.all.busy(crowd.places["b"], "x")
    assert not crowd.all.busy(crowd.places["c"], "x") and crowd.all.busy(crowd.places["d"], "y")
    crowd.all.idle(crowd.places["c"])
    crowd.all.idle(crowd.places["a"])
    crowd.all.free(crowd.places["b"])
    assert crowd.all.busy(crowd.places["a"], "x") and crowd.all.busy(crowd.places["c"], "x")


class Machine(RuleBasedStateMachine):
    """Any order of comings and goings: the books always agree with a plain count."""

    def __init__(self) -> None:
        super().__init__()
        self.books = Connections(6, 3)
        self.open: dict[int, tuple[str, Place, bool]] = {}  # address, place, busy
        self.number = 0

    @rule(address=st.sampled_from("abcd"))
    def come(self, address: str) -> None:
        number = self.number = self.number + 1
        place = self.books.take(address, lambda: self.was_closed(number))
        if place is not None:
            self.open[number] = address, place, False
        else:
            mine = [busy for who, _, busy in self.open.values() if who == address]
            everybody = [busy for _, _, busy in self.open.values()]
            assert (len(mine) == 3 and all(mine)) or (len(everybody) == 6 and all(everybody))

    def was_closed(self, number: int) -> None:
        address, _, busy = self.open.pop(number)
        assert not busy
        held = Counter(who for who, _, _ in self.open.values())
        assert held[address] + 1 == 3 or held[address] + 1 == max(
            held[who] + (who == address) for who, _, busy in [*self.open.values(), (address, None, False)] if not busy
        )

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def change(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.open)))
        address, place, busy = self.open[number]
        (self.books.idle if busy else self.books.busy)(place)
        self.open[number] = address, place, not busy

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def go(self, data: st.DataObject) -> None:
        _, place, _ = self.open.pop(data.draw(st.sampled_from(sorted(self.open))))
        self.books.free(place)
        self.books.free(place)

    @invariant()
    def counted(self) -> None:
        assert len(self.books) == len(self.open) <= 6
        assert max(Counter(address for address, _, _ in self.open.values()).values(), default=0) <= 3


TestMachine = Machine.TestCase

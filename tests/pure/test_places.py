"""Who is refused, waits as long as it was told and comes back, is let in: measured over crowds, on a fake clock."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import Overloaded
from scheduler.admission import Admission
from scheduler.places import EARLY, GRACE, Places
from tests.pure.api_kit import IMAGE, held, world


def first_returns(room: int, clients: int, each_second: float, batch: int, alike: bool = False) -> float:
    """Which part of those who were refused gets in when it first comes back. So many clients each want one job done
    after the other; jobs leave in batches, at random."""
    random, now, numbers = Random(1), [0.0], count()
    admission = Admission(room, 1 << 40, clock=lambda: now[0])
    happens: list[tuple[float, int, Callable[[], None]]] = []
    inside: list[tuple[object, int]] = []
    came, got_in = 0, 0

    def after(seconds: float, what: Callable[[], None]) -> None:
        heappush(happens, (now[0] + seconds, next(numbers), what))

    def arrive(client: int, again: int) -> None:
        nonlocal came, got_in
        caller = "" if alike else str(client)
        came += again == 1
        try:
            admission.ask(1, caller=caller)
            inside.append((admission.admit(1, caller=caller), client))
            got_in += again == 1
        except Overloaded as fault:
            assert fault.retry_after is not None and fault.retry_after == int(fault.retry_after)
            after(fault.retry_after + random.uniform(0.001, 0.02), lambda: arrive(client, again + 1))
        admission.check()

    def leave() -> None:
        for grant, client in inside[:batch]:
            grant.release()  # type: ignore[attr-defined]
            after(random.uniform(0.001, 0.01), lambda client=client: arrive(client, 0))  # type: ignore[misc]
        del inside[:batch]
        after(random.expovariate(each_second / batch), leave)

    for client in range(clients):
        after(random.uniform(0, 2), lambda client=client: arrive(client, 0))  # type: ignore[misc]
    after(0.5, leave)
    while now[0] < 100:
        now[0], _, what = heappop(happens)
        what()
    assert came > 30
    return got_in / came


@pytest.mark.parametrize(("crowd", "least"), [
    ((100, 170, 20, 1), 0.95), ((100, 170, 20, 8), 0.85), ((16, 80, 10, 4), 0.6), ((4, 12, 2, 1), 0.6),
    ((1000, 3000, 200, 16), 0.85),
])  # fmt: skip
def test_who_comes_back_when_told_is_let_in(crowd: tuple[int, int, int, int], least: float) -> None:
    assert first_returns(*crowd) > least


def test_even_those_who_look_alike_are_let_in_more_often_than_not() -> None:
    assert first_returns(100, 170, 20, 1, alike=True) > 0.35


def test_a_place_is_kept_for_its_caller_alone_and_not_for_ever() -> None:
    now = [0.0]
    admission = Admission(2, 1 << 20, clock=lambda: now[0])
    grants = [admission.admit(1, caller="first"), admission.admit(1, caller="second")]
    with pytest.raises(Overloaded) as refused:
        admission.admit(1, caller="patient")
    grants[0].release()
    now[0] = refused.value.retry_after or 0.0
    with pytest.raises(Overloaded):
        admission.admit(1, caller="newcomer")
    with pytest.raises(Overloaded):
        admission.admit(1, caller="patient", tenant="another")
    admission.admit(1, caller="patient").release()
    now[0] += 60 + GRACE
    admission.admit(1, caller="newcomer")


def test_who_comes_too_early_is_a_newcomer() -> None:
    places = Places()
    places.keep("a", 10.0)
    assert not places.has("a", 10.0 - 2 * EARLY) and places.has("a", 10.0) and not places.has("b", 10.0)
    assert (places.due(9.0), places.due(10.0), len(places)) == (0, 1, 1)
    assert not places.has("a", 10.1 + GRACE) and len(places) == 0


def test_who_does_not_wait_has_no_more_places_than_the_queue_has() -> None:
    admission = Admission(10, 1 << 20, clock=lambda: 0.0)
    for _ in range(10):
        admission.admit(1)
    for _ in range(100):
        with pytest.raises(Overloaded):
            admission.admit(1, caller="impatient")
    assert len(admission.places) == 10


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 50), st.booleans())))
def test_places_are_kept_once_and_taken_once(steps: list[tuple[str, int, bool]]) -> None:
    places, now, kept = Places(), 0.0, 0
    for caller, more, keeps in steps:
        now += more / 10
        if keeps:
            places.keep(caller, now + 3)
            kept += 1
        had = places.has(caller, now)
        before = len(places)
        places.take(caller, now)
        assert len(places) == before - had
    assert len(places) <= kept
    places.has("a", now + 10)
    assert len(places) == 0 and not places._of


async def test_a_request_is_recognised_by_where_from_where_to_how_long_and_its_key(tmp_path: Path) -> None:
    async with world(tmp_path, queue_jobs=1) as server, held(server):
        first = asyncio.create_task(server.client.post("/run/echo", content=IMAGE))
        await server.until_ran()
        headers = {"idempotency-key": "mine"}
        answer = await server.client.post("/run/echo", content=IMAGE, headers=headers)
        assert answer.status_code == 503 and float(answer.headers["retry-after"]) * 1000 == float(
            answer.headers["retry-after-ms"]
        )
        ((_, caller),) = server.engine.admission.places._callers
        assert caller == f"anonymous 127.0.0.1 /run/echo {len(IMAGE)} mine"
        server.pool.release()
        assert (await first).status_code == 200

"""Whose turn it is: the shares of priorities, the fairness among tenants, the order within one."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scheduler_kit import LARGE, SMALL, Play, names, shares

from core.request import Priority

ONE = replace(SMALL, limit=1)


def fill(play: Play, count: int, **ticket: object) -> None:
    prefix = "-".join(map(str, ticket.values()))
    for n in range(count):
        play.submit(f"{prefix}-{n}", **ticket)


@pytest.mark.parametrize("groups", [(SMALL,) * 4, (ONE, LARGE, replace(SMALL, width=256), replace(SMALL, width=128))])
def test_priorities_share_five_three_one_one_when_all_wait(groups):
    play = Play("a")
    for priority, group in zip(Priority, groups, strict=True):
        fill(play, 200, priority=priority, group=group)
    while sum(len(batch.tickets) for batch in play.sent) < 200:
        play.finish("a")
    got = shares(play.sent[1:], lambda ticket: ticket.priority)
    total = sum(got.values())
    for priority, share in zip(Priority, (0.5, 0.3, 0.1, 0.1), strict=True):
        assert got[priority] / total == pytest.approx(share, abs=0.06), got


def test_shares_are_by_cost_and_not_by_number():
    play = Play("a")
    fill(play, 300, priority=Priority.URGENT, cost=0.5, group=ONE)
    fill(play, 300, priority=Priority.PAID, cost=3.0, group=ONE)
    while len(play.sent) < 200:
        play.finish("a")
    got = shares(play.sent, lambda ticket: ticket.priority)
    assert got[Priority.URGENT] / got[Priority.PAID] == pytest.approx(5 / 3, rel=0.1)


def test_a_priority_that_idled_has_saved_up_no_credit():
    play = Play("a")
    fill(play, 300, priority=Priority.NORMAL, group=ONE)
    for _ in range(200):
        play.finish("a")
    fill(play, 100, priority=Priority.TEST, group=ONE)
    before = len(play.sent)
    for _ in range(40):
        play.finish("a")
    got = shares(play.sent[before:], lambda ticket: ticket.priority)
    assert got[Priority.TEST] == pytest.approx(20, abs=1)


def test_an_urgent_job_overtakes_all_that_waits():
    play = Play("a")
    play.submit("running")
    for priority in (Priority.PAID, Priority.NORMAL, Priority.TEST):
        fill(play, 20, priority=priority, group=ONE)
    play.submit("urgent", priority=Priority.URGENT, group=ONE)
    play.finish("a")
    assert play.running("a") == ["urgent"]


def test_the_least_priority_is_served_under_a_flood_of_urgent_jobs():
    play = Play("a")
    fill(play, 300, priority=Priority.URGENT, group=ONE)
    play.submit("least", priority=Priority.TEST, group=ONE)
    for _ in range(10):
        play.finish("a")
    assert "least" in play.ended or play.running("a") == ["least"]


def test_places_left_in_an_urgent_batch_are_filled_from_other_priorities():
    play = Play("a")
    play.submit("running")
    play.submit(*names("test", 10), priority=Priority.TEST)
    play.submit(*names("urgent", 2), priority=Priority.URGENT)
    play.finish("a")
    assert sorted(play.running("a")) == [*names("test", 6), *names("urgent", 2)]


def test_rides_in_others_batches_do_not_starve_the_rider_later():
    """P3 filled the empty places of P0's batches for long. When P1 comes it must not have to pay for all of them."""
    play = Play("a")
    fill(play, 300, priority=Priority.URGENT, group=ONE)
    fill(play, 300, priority=Priority.TEST)
    for n in range(20):
        play.submit(f"lone-{n}", priority=Priority.URGENT, tenant="lone")
        while f"lone-{n}" not in play.order():
            play.finish("a")
    assert shares(play.sent, lambda ticket: ticket.priority)[Priority.TEST] > 100, "it rode along"
    fill(play, 300, priority=Priority.PAID, group=ONE)
    before = len(play.sent)
    for _ in range(100):
        play.finish("a")
    assert Priority.TEST in {batch.tickets[0].priority for batch in play.sent[before:]}


def test_a_tenant_that_rode_along_is_soon_served_again_in_its_own_right():
    play = Play("a")
    fill(play, 300, tenant="busy", group=ONE)
    fill(play, 300, tenant="rider")
    for n in range(20):
        play.submit(f"lone-{n}", tenant="lone")
        while f"lone-{n}" not in play.order():
            play.finish("a")
    fill(play, 300, tenant="new", group=ONE)
    before = len(play.sent)
    for _ in range(60):
        play.finish("a")
    assert "rider" in {batch.tickets[0].tenant for batch in play.sent[before:]}


def test_a_tenant_that_idled_has_saved_up_no_credit():
    play = Play("a")
    play.submit("early", "early-too", tenant="idler", group=ONE)
    fill(play, 200, tenant="steady", group=ONE)
    for _ in range(100):
        play.finish("a")
    fill(play, 50, tenant="idler", group=ONE)
    before = len(play.sent)
    for _ in range(20):
        play.finish("a")
    got = shares(play.sent[before:], lambda ticket: ticket.tenant)
    assert got == {"idler": 10, "steady": 10}


def test_tenants_of_one_priority_share_equally_by_cost():
    play = Play("a")
    for n in range(200):
        play.submit(f"heavy-{n}", tenant="heavy", cost=4.0, group=ONE)
        play.submit(f"light-{n}", tenant="light", cost=1.0, group=ONE)
    for _ in range(100):
        play.finish("a")
    got = shares(play.sent, lambda ticket: ticket.tenant)
    assert got["heavy"] / got["light"] == pytest.approx(1.0, abs=0.1)


def test_a_tenant_that_queues_a_thousand_does_not_delay_one_that_queues_two():
    play = Play("a")
    play.submit(*names("many", 100), tenant="greedy", group=ONE)
    play.submit(*names("few", 2), tenant="modest", group=ONE)
    for _ in range(4):
        play.finish("a")
    assert {"few0", "few1"} <= {*play.ended, *play.running("a")}


def test_a_tenant_with_one_job_at_a_time_gets_no_more_than_its_share():
    play = Play("a")
    play.submit(*names("many", 100), tenant="steady", group=ONE)
    play.submit("blink0", tenant="blink", group=ONE)
    count = 1
    for _ in range(60):
        play.finish("a")
        if f"blink{count - 1}" in play.running("a"):
            play.submit(f"blink{count}", tenant="blink", group=ONE)
            count += 1
    got = shares(play.sent, lambda ticket: ticket.tenant)
    assert abs(got["blink"] - got["steady"]) <= 3, got


def test_a_tenants_jobs_go_in_the_order_in_which_they_came_whatever_their_group():
    play = Play("a")
    groups = [replace(SMALL, width=64 * n, limit=1) for n in range(1, 6)]
    play.submit("first", group=ONE)
    wanted = []
    for n in range(40):
        play.submit(f"job-{n}", group=groups[n * 7 % 5])
        wanted.append(f"job-{n}")
    play.finish_all()
    assert play.order()[1:] == wanted


def test_a_job_that_ran_before_a_restart_goes_first_in_its_queue():
    play = Play()
    play.submit("new-0", "new-1", group=ONE)
    play.submit("old-0", "old-1", group=ONE, front=True)
    play.ready("a")
    play.finish_all()
    assert play.order() == ["old-0", "old-1", "new-0", "new-1"]

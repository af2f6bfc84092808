"""Who goes where and when: round robin, batches, waiting, shares, deadlines and cancels, rule by rule."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scheduler_kit import LARGE, SMALL, Play, of, shares

from core.request import Priority
from core.states import State
from core.ticket import Ticket
from scheduler.commands import Dispatch, Finish, Revoke
from scheduler.events import BatchEnded, Cancelled, Drain, ItemEnded, LoadReport, Submitted, WorkerDraining, WorkerReady

ONE = replace(SMALL, limit=1)


def names(prefix: str, count: int) -> list[str]:
    return [f"{prefix}{n}" for n in range(count)]


# --- where ------------------------------------------------------------------------------------------------------------


def test_a_lone_job_goes_to_an_idle_worker_at_once():
    play = Play("a")
    [dispatch] = play.submit("one")
    assert dispatch == Dispatch("a", 1, dispatch.batch, (Ticket("one", SMALL),))


def test_equal_workers_take_turns():
    play = Play("a", "b", "c")
    for n in range(30):
        play.submit(f"job-{n}", after=10.0)
        play.finish(play.sent[-1].worker)
    assert [batch.worker for batch in play.sent] == ["a", "b", "c"] * 10


def test_a_slow_worker_gets_less_when_all_are_busy_and_nothing_when_a_quick_one_is_idle():
    play = Play("quick", "slow")
    seconds = {"quick": 0.1, "slow": 1.0}
    for n in range(40):
        play.submit(f"job-{n}", after=10.0)
        play.finish(play.sent[-1].worker, seconds[play.sent[-1].worker])
    assert {batch.worker for batch in play.sent[-30:]} == {"quick"}
    play.submit("first", after=10.0)
    play.submit("second", group=LARGE)
    assert play.running("quick") == ["first"] and play.running("slow") == ["second"]


def test_a_slow_worker_that_was_passed_over_for_long_is_tried_again():
    play = Play("quick", "slow")
    seconds = {"quick": 0.1, "slow": 1.0}
    for n in range(10):
        play.submit(f"job-{n}", after=10.0)
        play.finish(play.sent[-1].worker, seconds[play.sent[-1].worker])
    play.tell(LoadReport("slow"), after=400.0)
    play.submit("try")
    assert play.running("slow") == ["try"]


@pytest.mark.parametrize("report", [LoadReport("a", utilisation=0.8), LoadReport("a", None, 1 << 20, 8 << 30)])
def test_a_device_that_others_use_is_passed_over(report):
    play = Play("a", "b")
    for n in range(10):
        play.submit(f"job-{n}", after=10.0)
        play.finish(play.sent[-1].worker)
    play.tell(report)
    for n in range(10, 16):
        play.submit(f"job-{n}", after=10.0)
        play.finish(play.sent[-1].worker)
    assert {batch.worker for batch in play.sent[-6:]} == {"b"}


def test_a_draining_worker_finishes_what_it_holds_and_gets_nothing_more():
    play = Play("a")
    play.submit("held")
    play.tell(WorkerDraining("a", 1))
    assert not of(play.submit("later"), Dispatch)
    play.finish("a")
    assert play.ended == {"held": "done"} and play.scheduler.position("later") == 1
    play.ready("a")
    assert play.running("a") == ["later"]


def test_a_draining_server_lets_batches_finish_and_starts_none():
    play = Play("a", "b")
    play.submit("running")
    play.tell(Drain())
    play.submit("waiting")
    play.finish("a")
    assert play.ended == {"running": "done"} and play.order() == ["running"]


# --- batches ----------------------------------------------------------------------------------------------------------


def test_what_waits_when_a_worker_comes_free_goes_as_one_batch():
    play = Play("a")
    play.submit("first")
    play.submit(*names("next", 5))
    play.finish("a")
    assert play.running("a") == names("next", 5)


def test_a_batch_holds_one_group_and_never_more_than_its_limit():
    play = Play("a")
    play.submit("first")
    for n in range(20):
        play.submit(f"small-{n}")
        play.submit(f"large-{n}", group=LARGE)
    play.finish_all()
    assert len(play.ended) == 41
    sizes = {batch.tickets[0].group: len(batch.tickets) for batch in play.sent[3:8]}
    assert sizes == {SMALL: 8, LARGE: 2}


def test_a_full_batch_follows_a_running_one_before_that_ends_and_never_a_third():
    play = Play("a", prefetch_lead=0.1)
    play.warm("a", fixed=0.5, each=0.1)
    play.start("first", after=1000.0)
    play.submit(*names("next", 24))
    assert play.running("a") == ["first"] and not play.following("a"), "bound 0.6 s before it can run"
    play.wake()
    assert play.following("a") == names("next", 8)
    assert play.now == pytest.approx(play.scheduler.roster.workers["a"].ends - 0.1)
    play.tick(after=0.2)
    assert len(play.held["a"]) == 2


def test_a_partial_batch_follows_at_the_last_moment_so_that_late_comers_join_it():
    play = Play("a", max_queue_delay=0.0)
    play.warm("a", fixed=0.5, each=0.1)
    play.start("first", after=1000.0)
    play.submit("second")
    play.submit("third", after=0.2)
    assert not play.following("a")
    play.wake()
    assert play.following("a") == ["second", "third"]
    assert 0.0 < play.scheduler.roster.workers["a"].ends - play.now < 0.1


def test_nothing_follows_a_batch_whose_time_nobody_knows():
    play = Play("a")
    play.submit("first")
    play.submit(*names("next", 8))
    assert not play.following("a")
    assert play.scheduler.next_deadline() == pytest.approx(play.now + 600.0), "only its timeout is awaited"


def test_nothing_follows_a_batch_that_is_far_overdue():
    play = Play("a", "b")
    for n in range(6):
        play.submit(f"warm-{n}", after=1000.0)
        play.finish(play.sent[-1].worker, 1.0)
    play.submit("x", after=1000.0)
    play.submit("y", group=LARGE)
    play.tick(after=10.0)
    play.submit(*names("next", 8))
    assert [len(batches) for batches in play.held.values()] == [1, 1]


def test_no_job_waits_for_others_while_two_workers_are_idle():
    play = Play("a", "b")
    for n in range(20):
        play.submit(f"job-{n}", after=0.001)
        assert play.sent[-1].tickets[0].id == f"job-{n}"
        play.finish(play.sent[-1].worker, 0.5)


def test_a_client_alone_never_waits_even_when_it_comes_back_at_once():
    play = Play("a")
    for n in range(50):
        play.submit(f"job-{n}", after=0.0001)
        assert play.running("a") == [f"job-{n}"]
        play.finish("a", 0.5)


def come_back(play: Play, clients: int, rounds: int) -> list[int]:
    """Clients that come back 1 ms after their answer, 0.1 ms apart, to one worker of 0.5 s + 0.1 s per job. Gives the
    sizes of the batches."""
    left = [f"job-{n}" for n in range(clients * rounds)]
    play.submit(left.pop(0))
    play.submit(*(left.pop(0) for _ in range(clients - 1)), after=0.0001)
    while left or play.held["a"] or play.scheduler.holding:
        if not play.held["a"]:
            play.wake()
            continue
        size = len(play.held["a"][0].tickets)
        play.finish("a", 0.5 + 0.1 * size)
        for n in range(min(size, len(left))):
            play.submit(left.pop(0), after=0.001 if n == 0 else 0.0001)
    return [len(batch.tickets) for batch in play.sent]


def test_a_short_wait_for_the_clients_of_the_last_batch_makes_fuller_ones():
    assert come_back(Play("a"), clients=6, rounds=20)[-5:-1] == [6] * 4
    assert set(come_back(Play("a", max_queue_delay=0.0), clients=6, rounds=20)[-12:-4]) != {6}


def test_a_wait_is_never_longer_than_max_queue_delay():
    play = Play("a", max_queue_delay=0.05)
    come_back(play, clients=6, rounds=20)
    play.submit("alone", after=0.001)
    while not play.held["a"]:
        began = play.now
        play.wake()
        assert play.now - began <= 0.05 + 1e-9
    assert play.running("a") == ["alone"]


def test_nobody_waits_for_clients_to_come_back_while_another_group_waits():
    play = Play("a")
    come_back(play, clients=6, rounds=20)
    play.start("running", after=0.001)
    play.submit("small")
    play.submit("large", group=LARGE)
    play.wake()
    assert play.following("a") == ["small"]


def test_an_urgent_job_does_not_wait_for_others():
    play = Play("a")
    come_back(play, clients=6, rounds=20)
    play.submit("urgent", after=0.001, priority=Priority.URGENT)
    assert play.running("a") == ["urgent"]


# --- whose turn -------------------------------------------------------------------------------------------------------


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


# --- deadlines and cancels --------------------------------------------------------------------------------------------


def test_a_waiting_job_expires_at_its_deadline():
    play = Play("a")
    play.submit("running")
    play.submit("late", deadline=play.now + 5.0)
    assert play.scheduler.next_deadline() == play.now + 5.0
    [finish] = play.wake()
    assert finish.state is State.EXPIRED and finish.error.code == "deadline_exceeded"
    assert play.scheduler.position("late") is None


def test_a_job_whose_deadline_has_passed_already_is_never_handed_out():
    play = Play("a")
    assert [type(command) for command in play.submit("late", deadline=play.now - 1)] == [Finish]


def test_a_running_job_expires_and_is_revoked_and_its_mates_run_on():
    play = Play("a")
    play.submit("first")
    play.submit("mate", "late", deadline=None)
    play.submit("dying", deadline=play.now + 5.0)
    play.finish("a")
    assert set(play.running("a")) == {"mate", "late", "dying"}
    commands = play.wake()
    assert of(commands, Finish)[0].state is State.EXPIRED
    assert [(revoke.worker, revoke.job) for revoke in of(commands, Revoke)] == [("a", "dying")]
    play.finish("a")
    assert play.ended == {"first": "done", "mate": "done", "late": "done", "dying": "deadline_exceeded"}


def test_cancel_of_a_waiting_job():
    play = Play("a")
    play.submit("running", "waiting")
    [finish] = play.cancel("waiting")
    assert finish.state is State.CANCELLED and finish.error.code == "cancelled"
    play.finish_all()
    assert play.order() == ["running"]


def test_cancel_of_a_running_job_keeps_the_slot_until_the_batch_ends():
    play = Play("a")
    play.submit("running")
    commands = play.cancel("running")
    assert [type(command) for command in commands] == [Finish, Revoke]
    assert not play.submit("next"), "the worker is still busy with the batch"
    play.finish("a")
    assert play.running("a") == ["next"] and play.ended == {"running": "cancelled"}


def test_cancel_twice_of_an_ended_and_of_an_unknown_job_changes_nothing():
    play = Play("a")
    play.submit("one")
    play.cancel("one")
    assert play.cancel("one") == [] and play.cancel("never") == []
    play.finish("a")
    assert play.cancel("one") == []


def test_an_answer_that_crosses_a_cancel_is_ignored():
    play = Play("a")
    play.submit("one")
    play.cancel("one")
    assert play.tell(ItemEnded("a", 1, play.sent[0].batch, "one")) == []
    assert play.ended == {"one": "cancelled"}


def test_many_cancels_leave_no_corpses_behind():
    play = Play()
    for n in range(1000):
        play.scheduler.handle(Submitted(Ticket(f"job-{n}", SMALL, deadline=1e9)), play.now)
    for n in range(999):
        play.scheduler.handle(Cancelled(f"job-{n}"), play.now)
    [lane] = [lane for flow in play.scheduler.backlog.ranks[2].flows.values() for lane in flow.lanes.values()]
    assert len(lane.fresh) < 100 and len(play.scheduler._deadlines._heap) < 100
    play.ready("a")
    assert play.order() == ["job-999"]


def test_the_same_ticket_twice_is_one_job():
    play = Play("a")
    play.submit("busy", "one")
    play.submit("one")
    play.finish_all()
    assert play.order() == ["busy", "one"]


# --- told -------------------------------------------------------------------------------------------------------------


def test_time_never_runs_backwards():
    play = Play("a")
    play.submit("one", deadline=play.now + 10)
    play.now -= 50
    play.submit("two")
    assert play.scheduler.now == 100.0


def test_the_position_counts_down_and_knows_shares():
    play = Play("a")
    play.submit("running", group=ONE)
    play.submit(*names("job", 20), group=ONE)
    assert [play.scheduler.position(f"job{n}") for n in (0, 1, 10, 19)] == [1, 2, 11, 20]
    assert play.scheduler.position("running") is None
    play.finish("a")
    assert play.scheduler.position("job10") == 10
    play.submit("urgent", priority=Priority.URGENT, group=ONE)
    assert play.scheduler.position("urgent") <= 2
    play.submit("neighbour", tenant="other", group=ONE)
    assert play.scheduler.position("neighbour") <= 2


def test_repr_story_counts_and_views():
    play = Play("a")
    play.submit("one", "two", group=LARGE, priority=Priority.PAID)
    assert repr(play.scheduler) == "<Scheduler waiting [P1:1] workers [a#1 ready 1 pace ?]>"
    assert play.scheduler.waiting_by_priority() == {0: 0, 1: 1, 2: 0, 3: 0}
    assert play.scheduler.waiting_by_group() == {LARGE: 1}
    [view] = play.scheduler.workers()
    assert (view.worker, view.state, view.pace, view.held[0].jobs) == ("a", "ready", None, ("one",))
    play.finish("a", 2.0)
    story = play.scheduler.story("one")
    assert [line.split()[1] for line in story] == ["submitted", "dispatched", "succeeded"] and "+2.000" in story[2]
    assert play.scheduler.story("never") == []


def test_only_the_last_stories_are_kept():
    play = Play("a", kept_stories=3)
    for n in range(10):
        play.submit(f"job-{n}")
        play.finish("a")
    assert [bool(play.scheduler.story(f"job-{n}")) for n in (0, 6, 7, 9)] == [False, False, True, True]


def test_of_many_groups_the_idle_ones_are_forgotten():
    play = Play("a", kept_groups=10)
    for n in range(100):
        play.submit(f"job-{n}", group=replace(SMALL, width=n))
        play.finish_all()
    assert len(play.scheduler.backlog.groups) <= 20


def test_of_many_tenants_the_idle_ones_are_forgotten():
    play = Play("a")
    for n in range(1000):
        play.submit(f"job-{n}", tenant=f"tenant-{n}")
        play.finish_all()
    assert len(play.scheduler.backlog.ranks[2].flows) < 200


def test_check_tells_the_story_of_the_job_that_is_wrong():
    play = Play("a")
    play.submit("one", "two")
    play.scheduler.jobs["two"].deaths = 2
    with pytest.raises(AssertionError, match=r"a suspect waits among others\n\+0.000 submitted"):
        play.scheduler.check()


def test_messages_about_unknown_workers_and_batches_are_ignored():
    play = Play("a")
    play.submit("one")
    for event in (ItemEnded("b", 1, 1, "one"), ItemEnded("a", 1, 99, "one"), ItemEnded("a", 2, 1, "one"),
                  BatchEnded("a", 0, 1, 1.0), WorkerReady("a", 1), WorkerDraining("a", 7), LoadReport("b")):
        assert play.tell(event) == []
    assert play.scheduler.jobs["one"].batch is not None

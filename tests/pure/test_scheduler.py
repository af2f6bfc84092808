"""Who goes where and when: round robin, batches, waiting, deadlines and cancels, rule by rule."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from scheduler_kit import LARGE, SMALL, Play, names, of

from core.request import Priority
from core.states import State
from core.ticket import Ticket
from scheduler.backlog import GroupQueue
from scheduler.batching import portion
from scheduler.commands import Dispatch, Finish, Revoke
from scheduler.events import BatchEnded, Cancelled, Drain, ItemEnded, LoadReport, Submitted, WorkerDraining, WorkerReady
from scheduler.views import waiting_by_group, waiting_by_priority

ONE = replace(SMALL, limit=1)


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
    turns = [batch.worker for batch in play.sent]
    assert set(turns[:3]) == {"a", "b", "c"}
    assert turns[6:] == turns[6:9] * 8 and set(turns[6:9]) == {"a", "b", "c"}


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


def test_a_device_of_unknown_memory_counts_as_free():
    play = Play("a", "b")
    for n in range(10):
        play.submit(f"job-{n}", after=10.0)
        play.finish(play.sent[-1].worker)
        play.tell(LoadReport("a", None, None, 8 << 30))
    assert {batch.worker for batch in play.sent[-2:]} == {"a", "b"}


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
    assert waiting_by_priority(play.scheduler) == {0: 0, 1: 1, 2: 0, 3: 0}
    assert waiting_by_group(play.scheduler) == {LARGE: 1}
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


def test_jobs_that_wait_when_several_devices_become_idle_are_shared_among_them():
    play = Play()
    play.scheduler.draining = True  # nothing is handed out until both are there
    play.submit(*(f"job-{n}" for n in range(8)))
    play.ready("a")
    play.ready("b")
    play.scheduler.draining = False
    play.tick()
    assert [len(play.running(worker)) for worker in ("a", "b")] == [4, 4]


@pytest.mark.parametrize(
    ("fixed", "each", "waiting", "devices", "until_free", "taken"),
    [
        (0.0, 1.0, 6, 2, 0.5, 3),        # batches gain nothing: the other device, free soon, does its half
        (0.0, 1.0, 5, 2, 1.0, 3),
        (0.0, 1.0, 6, 2, math.inf, 3),   # nobody knows when it is free: soon, probably
        (0.0, 1.0, 6, 2, 4.0, 6),        # it is not free soon enough
        (5.0, 0.1, 6, 2, 0.5, 6),        # a batch costs what one job costs: all in one
        (0.0, 1.0, 6, 1, math.inf, 8),   # nobody to share with: all that fits
        (0.0, 1.0, 20, 2, 0.5, 8),       # enough for everybody: full batches
    ],
)
def test_a_busy_pool_shares_a_small_queue_only_if_batches_gain_little(
    fixed, each, waiting, devices, until_free, taken
):
    queue = GroupQueue(SMALL)
    for cost in (1.0, 4.0, 8.0):
        queue.curve.learn(cost, fixed + each * cost)
    queue.count = waiting
    assert portion(queue, 8, 1, devices, until_free) == taken

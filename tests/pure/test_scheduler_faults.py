"""Workers that die, hang, lie and run out of memory: nothing is lost, the guilty job is found, its mates are spared."""

from __future__ import annotations

import pytest
from scheduler_kit import LARGE, Play, of

from core.errors import BY_CODE, ErrorInfo, from_info
from core.request import Priority
from core.states import State
from scheduler.commands import Dispatch, Finish, Requeue, Restart
from scheduler.events import (
    Alive,
    BatchEnded,
    BatchOutOfMemory,
    ItemEnded,
    Tick,
    WorkerDraining,
    WorkerLost,
    WorkerReady,
)
from scheduler.views import waiting_by_priority
from scheduler.work import LEAVE

# --- a worker is lost -------------------------------------------------------------------------------------------------


def test_the_jobs_of_a_lost_worker_go_first_and_in_order():
    play = Play("a")
    play.submit("first")
    play.submit(*(f"lost-{n}" for n in range(8)))
    play.finish("a")
    play.submit(*(f"new-{n}" for n in range(8)))
    commands = play.die("a")
    assert [requeue.job for requeue in of(commands, Requeue)] == [f"lost-{n}" for n in range(8)]
    play.ready("a")
    assert play.running("a") == [f"lost-{n}" for n in range(8)]


def test_jobs_of_two_workers_lost_one_after_the_other_keep_their_order():
    play = Play("a", "b")
    play.submit("one", group=LARGE)
    play.submit("two", group=LARGE)
    play.submit("three", group=LARGE)
    play.die("b")
    play.die("a")
    play.ready("a")
    play.finish_all()
    assert play.order()[2:] == ["one", "two", "three"]


def test_cancelled_and_answered_jobs_do_not_come_back_from_a_lost_worker():
    play = Play("a")
    play.submit("first")
    play.submit("answered", "cancelled", "left")
    play.finish("a")
    batch = play.held["a"][0]
    play.tell(ItemEnded("a", 1, batch.batch, "answered"))
    play.cancel("cancelled")
    assert [requeue.job for requeue in of(play.die("a"), Requeue)] == ["left"]


def test_a_retried_job_is_not_charged_twice():
    """A tenant whose worker died must not wait for it with its share."""
    play = Play("a")
    play.submit("unlucky-0", tenant="unlucky", group=LARGE, cost=10.0)
    for _ in range(1):
        play.die("a")
        play.ready("a")
    tags = {flow.tenant: flow.tag for flow in play.scheduler.backlog.ranks[Priority.NORMAL].flows.values()}
    assert tags["unlucky"] == pytest.approx(10.0)


@pytest.mark.parametrize("late", [
    ItemEnded("a", 1, 1, "one"),
    BatchEnded("a", 1, 1, 1.0),
    BatchOutOfMemory("a", 1, 1),
    WorkerLost("a", 1, "again"),
    WorkerReady("a", 1),
    WorkerDraining("a", 1),
])
@pytest.mark.parametrize("reborn", [False, True])
def test_a_message_of_an_old_incarnation_changes_nothing(late, reborn):
    play = Play("a", "b")
    play.submit("one")
    play.die("a")
    if reborn:
        play.ready("a")
        play.submit("two")
    before = repr(play.scheduler)
    assert play.tell(late) == []
    assert repr(play.scheduler) == before


def test_a_new_incarnation_that_comes_before_the_news_of_the_old_ones_death_takes_nothing_with_it():
    play = Play("a")
    play.submit("one")
    play.incarnation["a"] = 2
    play.held["a"] = []
    commands = play.tell(WorkerReady("a", 2))
    assert [type(command) for command in commands] == [Requeue, Dispatch]
    assert play.tell(WorkerLost("a", 1, "killed")) == []


def test_a_worker_that_died_while_booting_is_not_ready_afterwards():
    play = Play("a")
    play.die("a")
    play.tell(WorkerLost("a", 2, "out of host memory"))
    assert play.tell(WorkerReady("a", 2)) == []
    assert not play.submit("one")
    play.incarnation["a"] = 2
    play.ready("a")
    assert play.running("a") == ["one"]


# --- the guilty job ---------------------------------------------------------------------------------------------------


def crash_until_done(play: Play, poison: set[str], limit: int = 60) -> None:
    """Workers die whenever a poisonous job is in their running batch, and come back at once."""
    for _ in range(limit):
        busy = next((worker for worker, batches in play.held.items() if batches), None)
        if busy is None:
            return
        if poison & set(play.running(busy)):
            play.die(busy)
            play.ready(busy)
        else:
            play.finish(busy)
    raise AssertionError("it never ends")


@pytest.mark.parametrize("workers", [("a",), ("a", "b", "c")])
def test_a_job_that_kills_three_workers_is_blamed_and_its_batch_mates_finish(workers):
    play = Play(*workers)
    play.submit("first", "second", "third")
    play.submit(*(f"job-{n}" for n in range(20)), "poison", *(f"after-{n}" for n in range(20)))
    crash_until_done(play, {"poison"})
    assert play.ended.pop("poison") == "poisonous_job"
    assert set(play.ended.values()) == {"done"} and len(play.ended) == 43
    error = play.finishes["poison"].error
    assert error.details["deaths"] == 3 and "nothing else" in error.message
    assert isinstance(from_info(error), BY_CODE["poisonous_job"])


def test_several_poisonous_jobs_are_told_from_their_mates():
    play = Play("a", "b")
    play.submit(*(f"job-{n}" for n in range(30)))
    crash_until_done(play, {"job-3", "job-4", "job-20"}, limit=200)
    assert {job for job, how in play.ended.items() if how == "poisonous_job"} == {"job-3", "job-4", "job-20"}
    assert len(play.ended) == 30


def test_a_suspect_runs_alone_and_nothing_is_sent_beside_it():
    play = Play("a", prefetch_lead=1e9)
    play.warm("a")
    play.start("poison", after=1000.0)
    for _ in range(2):
        play.die("a")
        play.ready("a")
    assert play.running("a") == ["poison"]
    play.submit(*(f"next-{n}" for n in range(16)))
    assert not play.following("a")
    play.finish("a")
    assert play.ended["poison"] == "done", "it was innocent after all"


def test_under_load_a_suspect_still_finds_a_worker_of_its_own():
    play = Play("a", prefetch_lead=1e9)
    play.warm("a")
    play.start("suspect", after=1000.0)
    play.submit(*(f"load-{n}" for n in range(100)))
    for _ in range(2):
        play.die("a")
        play.ready("a")
    assert play.running("a") == ["suspect"] and not play.following("a")


def test_a_prefetched_batch_is_not_blamed_for_the_one_that_ran():
    play = Play("a", prefetch_lead=1e9)
    play.warm("a")
    play.start("poison", after=1000.0)
    play.submit(*(f"next-{n}" for n in range(8)))
    assert len(play.held["a"]) == 2
    play.die("a")
    assert {job.ticket.id: job.deaths for job in play.scheduler.jobs.values()} == {
        "poison": 1, **{f"next-{n}": 0 for n in range(8)}
    }


def test_a_worker_stopped_on_purpose_blames_nobody():
    play = Play("a")
    play.submit("one")
    for _ in range(5):
        play.die("a", blame="none")
        play.ready("a")
    play.finish("a")
    assert play.ended == {"one": "done"}


def test_a_suspect_can_be_cancelled_while_it_waits_for_a_worker():
    play = Play("a")
    play.submit("one", deadline=play.now + 10.0)
    play.die("a")
    play.ready("a")
    play.die("a")
    assert play.scheduler.position("one") == 1 and waiting_by_priority(play.scheduler)[2] == 1
    play.cancel("one")
    assert play.ended == {"one": "cancelled"} and not play.scheduler.suspects


# --- memory -----------------------------------------------------------------------------------------------------------


def test_a_batch_that_does_not_fit_is_halved_and_the_cap_remembered_for_that_group_and_worker():
    play = Play("a")
    play.submit("first")
    play.submit(*(f"job-{n}" for n in range(40)))
    play.finish("a")
    commands = play.out_of_memory("a")
    assert [requeue.job for requeue in of(commands, Requeue)] == [f"job-{n}" for n in range(8)]
    assert play.running("a") == ["job-0", "job-1", "job-2", "job-3"]
    play.out_of_memory("a")
    assert play.running("a") == ["job-0", "job-1"]
    before = len(play.sent)
    play.finish_all()
    assert {len(batch.tickets) for batch in play.sent[before:]} == {2}
    play.die("a")
    play.ready("a")
    play.submit("again", *(f"more-{n}" for n in range(8)))
    play.finish("a")
    assert len(play.running("a")) == 2, "a new incarnation has no more memory"
    play.submit("other", *(f"large-{n}" for n in range(4)), group=LARGE)
    play.ready("b")
    assert play.finish_all() is None and max(len(batch.tickets) for batch in play.sent[-12:]) >= 2


def test_another_worker_keeps_the_full_size():
    play = Play("a")
    play.submit("first")
    play.submit(*(f"job-{n}" for n in range(40)))
    play.finish("a")
    play.out_of_memory("a")
    play.ready("b")
    assert len(play.running("a")) == 4 and len(play.running("b")) == 8


def test_a_job_that_does_not_fit_alone_fails_with_what_it_lacked_and_what_to_do():
    play = Play("a")
    play.submit("huge", group=LARGE)
    text = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has ... in /secret/path/file.py"
    [finish] = of(play.out_of_memory("a", text), Finish)
    assert finish.state is State.FAILED and finish.error.code == "out_of_memory"
    assert "2.50 GiB" in finish.error.message and "1024x1024" in finish.error.message
    assert "smaller" in finish.error.message and "secret" not in str(finish.error)


def test_a_cancelled_job_does_not_come_back_from_a_batch_that_did_not_fit():
    play = Play("a")
    play.submit("first")
    play.submit("one", "two")
    play.finish("a")
    play.cancel("one")
    assert [requeue.job for requeue in of(play.out_of_memory("a"), Requeue)] == ["two"]


# --- hangs ------------------------------------------------------------------------------------------------------------


def test_a_batch_of_unknown_pace_hangs_after_its_timeout():
    play = Play("a")
    play.submit("one", timeout=7.0)
    began = play.now
    [restart] = play.wake()
    assert isinstance(restart, Restart) and (restart.worker, restart.incarnation) == ("a", 1)
    assert play.now == began + 7.0 and "7.0 s" in restart.why


def test_a_batch_of_known_pace_hangs_after_a_multiple_of_it_but_not_before_the_floor():
    for floor, limit in ((2.0, 8 * 0.6), (30.0, 30.0)):
        play = Play("a", hang_floor=floor, quiet_floor=floor)
        play.warm("a", fixed=0.5, each=0.1)
        play.start("one", after=1000.0)
        began = play.now
        assert of(play.wake(), Restart)
        assert play.now - began == pytest.approx(limit, rel=0.1)


def test_a_model_that_a_new_incarnation_has_not_run_yet_has_time_to_load():
    """It may bring gigabytes from disk: what it takes later says nothing about that."""
    play = Play("a", hang_floor=2.0)
    play.warm("a", fixed=0.5, each=0.1)
    play.die("a")
    play.ready("a")
    play.start("one", after=1000.0)
    assert play.scheduler.next_deadline() == pytest.approx(play.now + 600.0)
    play.finish("a", 60.0)
    play.start("two", after=1000.0)
    assert play.scheduler.next_deadline() < play.now + 6.0, "the load taught nothing"


def test_the_timeout_bounds_the_measured_limit():
    play = Play("a", hang_floor=30.0, quiet_floor=30.0)
    play.warm("a", fixed=0.5, each=0.1)
    play.start("one", after=1000.0, timeout=3.0)
    began = play.now
    assert of(play.wake(), Restart) and play.now - began == pytest.approx(3.0)


def test_a_batch_that_shows_that_it_goes_on_is_not_taken_to_hang():
    play = Play("a", hang_floor=30.0, quiet_floor=30.0)
    play.warm("a", fixed=0.5, each=0.1)
    play.start("one", after=1000.0, timeout=300.0)
    began = play.now
    for _ in range(14):
        assert not of(play.live("a", "one", after=20.0), Restart)
    assert of(play.wake(), Restart) and play.now - began == pytest.approx(14 * 20.0 + 30.0)


def test_a_batch_that_said_how_long_its_next_part_may_take_has_that_time():
    play = Play("a", hang_floor=30.0)
    play.warm("a", fixed=0.5, each=0.1)
    play.start("one", after=1000.0, timeout=120.0)
    play.live("a", "one", patience=120.0, after=5.0)
    assert not of(play.tick(after=119.0), Restart)
    assert of(play.tick(after=2.0), Restart)


@pytest.mark.parametrize("event", [Alive("a", 0, 1), Alive("a", 1, 77), Alive("nobody", 1, 1)])
def test_a_sign_of_a_former_life_or_of_no_batch_changes_nothing(event):
    play = Play("a", hang_floor=30.0)
    play.start("one", timeout=40.0)
    limit = play.scheduler.next_deadline()
    play.tell(event, 10.0)
    assert play.scheduler.next_deadline() == limit


def test_the_time_of_a_prefetched_batch_counts_from_when_it_starts():
    play = Play("a", prefetch_lead=1e9, hang_floor=5.0)
    play.warm("a")
    play.start("one", after=1000.0)
    play.submit(*(f"next-{n}" for n in range(8)))
    assert len(play.held["a"]) == 2
    play.finish("a", after=4.9)
    began = play.now
    commands = []
    while not of(commands, Restart):
        commands = play.wake()
    assert play.now - began >= 5.0


def test_a_hung_worker_is_restarted_once_gets_nothing_more_and_its_job_is_retried():
    play = Play("a", "b")
    play.submit("one", timeout=5.0)
    assert [type(command) for command in play.wake()] == [Restart]
    assert play.tick(after=100.0) == []
    play.submit("two", group=LARGE)
    assert play.running("b") == ["two"]
    assert [requeue.job for requeue in of(play.die("a"), Requeue)] == ["one"]
    play.ready("a")
    assert play.running("a") == ["one"]


def test_a_worker_that_is_to_be_restarted_gets_nothing_even_when_its_batch_ends_after_all():
    play = Play("a")
    play.submit("one", timeout=5.0)
    assert of(play.wake(), Restart)
    play.submit("two")
    assert not of(play.finish("a"), Dispatch)
    play.die("a")
    play.ready("a")
    assert play.ended == {"one": "done"} and play.running("a") == ["two"]


def test_a_worker_that_does_not_leave_what_nobody_wants_is_replaced_when_others_wait():
    play = Play("a", prefetch_lead=0.0)
    play.submit("one", timeout=300.0)
    play.submit("other", group=LARGE, timeout=300.0)
    play.cancel("one")
    began = play.now
    [restart] = of(play.wake(), Restart)
    assert play.now - began == pytest.approx(LEAVE) and "nobody wants it" in restart.why
    assert not of(play.die("a"), Finish)
    play.ready("a")
    assert play.running("a") == ["other"]


def test_while_nobody_else_waits_it_may_go_on_and_whoever_comes_gets_another_worker_soon():
    play = Play("a")
    play.submit("one", timeout=300.0)
    play.cancel("one")
    for _ in range(5):
        assert play.wake() == []
    play.submit("other", after=2.0)
    assert of(play.wake(), Restart)


@pytest.mark.parametrize("spare", ["a mate is wanted", "another worker is free", "signs", "loads"])
def test_a_batch_is_left_alone_when(spare):
    play = Play(*(["a", "b"] if "free" in spare else ["a"]), max_queue_delay=0.0, hang_floor=300.0)
    if spare == "a mate is wanted":
        play.start("first")
        play.submit("one", "two", timeout=300.0)
        play.finish("a")
    else:
        play.submit("one", timeout=300.0)
    play.submit("other", group=LARGE, timeout=300.0)
    if spare == "loads":
        play.load("a", "one")
    number = play.held["a"][0].batch
    play.cancel("one")
    for _ in range(6):
        sign = Alive("a", 1, number) if spare == "signs" else Tick()
        assert not of(play.tell(sign, LEAVE / 2), Restart)


def test_when_the_last_that_was_wanted_has_been_answered_the_rest_has_to_end_soon():
    play = Play("a", hang_floor=300.0)
    play.start("first")
    play.submit("one", "two", timeout=300.0)
    play.finish("a")
    assert play.running("a") == ["one", "two"]
    play.submit("other", group=LARGE)
    play.cancel("one")
    play.tick(after=60.0)
    play._end("two", "done")
    play.tell(ItemEnded("a", 1, play.held["a"][0].batch, "two"))
    began = play.now
    assert of(play.wake(), Restart) and play.now - began == pytest.approx(LEAVE)


def test_a_job_that_hangs_every_worker_is_poisonous_too():
    play = Play("a")
    play.submit("one", timeout=5.0)
    for _ in range(3):
        assert of(play.wake(), Restart)
        play.die("a")
        play.ready("a")
    assert play.ended == {"one": "poisonous_job"}


# --- lies -------------------------------------------------------------------------------------------------------------


def test_a_job_that_its_batch_left_out_goes_back_to_the_front_and_not_for_ever():
    play = Play("a")
    play.submit("left-out")
    for turn in range(3):
        batch = play.held["a"].pop(0)
        commands = play.tell(BatchEnded("a", 1, batch.batch, 1.0))
        assert [type(command) for command in commands] == ([Requeue, Dispatch] if turn < 2 else [Finish])
    assert play.ended == {"left-out": "poisonous_job"}


def test_a_second_batch_that_ends_before_the_first_is_taken_as_told():
    play = Play("a", prefetch_lead=1e9)
    play.warm("a")
    play.start("one", after=1000.0)
    play.submit(*(f"next-{n}" for n in range(8)))
    first, second = play.held["a"]
    play.held["a"] = [second, first]
    play.finish("a")
    assert play.running("a") == ["one"]
    play.finish("a")
    assert len(play.ended) == len(play.order())


@pytest.mark.parametrize("spoil", ["cancel", "fail", "leave out"])
def test_a_batch_with_failed_or_revoked_jobs_teaches_nothing_about_time(spoil):
    play = Play("a")
    play.warm("a")
    play.start("one", after=1000.0)
    batch = play.held["a"].pop(0)
    curve = play.scheduler.backlog.groups[batch.tickets[0].group].curve
    before = curve.count, play.scheduler.roster.workers["a"].pace
    if spoil == "cancel":
        play.cancel("one")
        play.tell(ItemEnded("a", 1, batch.batch, "one"))
    elif spoil == "fail":
        play.tell(ItemEnded("a", 1, batch.batch, "one", ErrorInfo("model_failed", "no")))
    play.tell(BatchEnded("a", 1, batch.batch, 1e-6), after=1e-6)
    assert (curve.count, play.scheduler.roster.workers["a"].pace) == before


@pytest.mark.parametrize(("sign", "limit"), [(0.5, 10.0), (5.0, 40.0)])
def test_batches_that_show_signs_are_missed_in_seconds_and_those_that_are_silent_for_long_are_let_be(sign, limit):
    play = Play("a")
    play.warm("a", fixed=20.0, each=0.0)
    for number in range(30):  # what the silent ones taught is forgotten by and by
        play.start(f"seen-{number}", after=1000.0, timeout=1e6)
        for _ in range(int(20.0 / sign)):
            play.live("a", f"seen-{number}", after=sign)
        play.finish("a", 20.0, after=0.0)
    play.start("one", after=1000.0, timeout=1e6)
    play.live("a", "one", after=1.0)
    began = play.now
    assert of(play.wake(), Restart) and play.now - began == pytest.approx(limit, rel=0.1)

"""Stepped jobs: who gets a seat, where, beside whom, and what becomes of those whose worker is lost."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scheduler_kit import STEPPED, Play, names, of

from core.request import Priority
from scheduler.commands import Dispatch, Requeue, Restart, Revoke
from scheduler.scheduler import Scheduler
from scheduler.simulator import Device, Mix, Simulation


def sit(play: Play, *jobs: str, **more) -> None:
    play.submit(*jobs, group=STEPPED, **more)


def doubled(play: Play, worker: str) -> None:
    """The worker is lost twice, with all that it holds, and is back."""
    for _ in range(2):
        play.die(worker)
        play.ready(worker)


# --- who sits where ---------------------------------------------------------------------------------------------------


def test_each_stepped_job_is_handed_out_at_once_and_alone_until_the_seats_are_taken():
    play = Play("a", seats=3)
    sit(play, *names("job", 5))
    assert [len(batch.tickets) for batch in play.sent] == [1, 1, 1] and list(play.seated["a"]) == names("job", 3)
    assert play.scheduler.position("job3") == 1 and play.scheduler.position("job4") == 2
    play.stand_up("a", "job1")
    assert list(play.seated["a"]) == ["job0", "job2", "job3"]


def test_an_urgent_job_gets_a_seat_that_others_do_not():
    play = Play("a", seats=2, urgent_seats=1)
    sit(play, *names("job", 3))
    sit(play, "urgent", priority=Priority.URGENT)
    sit(play, "late", priority=Priority.URGENT)
    assert list(play.seated["a"]) == ["job0", "job1", "urgent"]
    play.stand_up("a", "job0")
    assert list(play.seated["a"]) == ["job1", "urgent", "late"], "the usual seats are full"
    play.stand_up("a", "urgent")
    play.stand_up("a", "late")
    assert list(play.seated["a"]) == ["job1", "job2"]


def test_equal_workers_take_turns_and_the_least_laden_comes_first():
    play = Play("a", "b", "c")
    sit(play, *names("job", 6))
    assert [batch.worker for batch in play.sent] == ["a", "b", "c"] * 2
    sit(play, "long", cost=50.0)
    assert play.sent[-1].worker == "a"
    sit(play, *names("short", 4))
    assert [batch.worker for batch in play.sent[-4:]] == ["b", "c", "b", "c"]


def test_a_slow_worker_is_found_out_by_its_part_of_the_time_and_gets_less():
    devices = [Device("quick"), Device("slow", slowness=3.0)]
    simulation = Simulation(Scheduler(), devices, seed=1)
    simulation.closed_loop(16, 400, Mix(groups=(STEPPED,), cost=20.0))
    report = simulation.run()
    simulation.scheduler.check()
    assert report.ends == {"succeeded": 400}
    assert report.done["quick"] > 1.8 * report.done["slow"]


def test_what_a_job_had_of_the_device_is_its_part_while_it_was_not_parked():
    play = Play("a")
    sit(play, "one", "two")
    batch = play.scheduler.jobs["one"].batch
    play.tick(after=4.0)  # two share: 2 s each
    play.park("a", "two")
    play.tick(after=3.0)  # the first has it for itself
    play.park("a", "two", False)
    play.park("a", "one")
    play.stand_up("a", "two", after=5.0)
    play.stand_up("a", "one")
    assert batch is not None and batch.share == pytest.approx(2.0 + 3.0)


def test_who_sits_and_who_runs_in_a_batch_do_not_block_each_other():
    play = Play("a", seats=2)
    sit(play, *names("job", 4))
    play.submit("plain")
    assert play.running("a") == ["plain"] and len(play.seated["a"]) == 2
    sit(play, "more")
    play.finish("a")
    assert play.ended == {"plain": "done"} and list(play.seated["a"]) == ["job0", "job1"]


def test_seats_are_shared_fairly_among_priorities_and_tenants():
    play = Play("a", seats=1, urgent_seats=0)
    for priority in Priority:
        for tenant in "xy":
            sit(play, *(f"{tenant}{priority}-{n}" for n in range(40)), priority=priority, tenant=tenant)
    for _ in range(100):
        play.stand_up("a", next(iter(play.seated["a"])))
    sent = [batch.tickets[0] for batch in play.sent[1:]]
    by_priority = [sum(ticket.priority == priority for ticket in sent) for priority in Priority]
    assert by_priority == pytest.approx([50, 30, 10, 10], abs=2)
    assert sum(ticket.tenant == "x" for ticket in sent) == pytest.approx(50, abs=4)


# --- cancel, deadline, drain ------------------------------------------------------------------------------------------


def test_a_seated_job_that_is_cancelled_or_expires_is_revoked_and_keeps_its_seat_until_it_has_left():
    play = Play("a", seats=2, urgent_seats=0)
    sit(play, "one")
    sit(play, "two", deadline=play.now + 5.0)
    sit(play, "next")
    assert of(play.cancel("one"), Revoke) and of(play.tick(after=5.0), Revoke)
    assert play.ended == {"one": "cancelled", "two": "deadline_exceeded"}
    assert "next" not in play.seated["a"]
    play.stand_up("a", "one")
    assert "next" in play.seated["a"]


def test_a_waiting_stepped_job_can_be_cancelled():
    play = Play("a", seats=1)
    sit(play, "one", "two")
    play.cancel("two")
    play.stand_up("a", "one")
    assert play.ended == {"two": "cancelled", "one": "done"} and not play.seated["a"]


def test_a_worker_that_is_to_go_gets_no_more_and_finishes_what_sits_there():
    from scheduler.events import WorkerDraining

    play = Play("a", "b")
    sit(play, "one", "two")
    play.tell(WorkerDraining("a", 1))
    sit(play, *names("job", 4))
    assert list(play.seated["a"]) == ["one"] and len(play.seated["b"]) == 5
    play.stand_up("a", "one")
    assert play.ended == {"one": "done"}


# --- hangs ------------------------------------------------------------------------------------------------------------


def test_a_worker_whose_seats_make_no_step_within_the_timeout_is_restarted_once():
    play = Play("a")
    sit(play, "one", "two", timeout=10.0)
    play.step("a", after=9.0)
    assert not of(play.tick(after=9.9), Restart)
    (restart,) = of(play.wake(), Restart)
    assert "2 stepped jobs" in restart.why and play.now == pytest.approx(119.0)
    assert not of(play.tick(after=100.0), Restart)
    sit(play, "three")
    assert not play.seated["a"].get("three")
    play.die("a")
    play.ready("a")
    assert set(play.seated["a"]) == {"one", "two", "three"}


def test_one_who_sits_down_later_starts_no_new_patience_and_an_empty_worker_needs_none():
    play = Play("a")
    sit(play, "one", timeout=10.0)
    play.tick(after=6.0)
    sit(play, "two", timeout=10.0)
    assert of(play.tick(after=4.5), Restart)
    play = Play("a")
    sit(play, "one", timeout=10.0)
    play.stand_up("a", "one")
    assert play.scheduler.next_deadline() is None


def test_steps_may_wait_for_a_batch_and_a_batch_for_a_step():
    play = Play("a", hang_floor=5.0)
    sit(play, "one", timeout=10.0)
    play.submit("plain", timeout=30.0)
    assert not of(play.tick(after=39.0), Restart), "nothing like the batch was measured: it has its whole timeout"
    play.finish("a", seconds=39.5, after=0.5)
    assert not of(play.tick(after=9.0), Restart), "the step had to wait for the batch"
    assert of(play.tick(after=1.5), Restart)


def test_steps_that_go_on_do_not_hide_a_batch_that_never_ends():
    play = Play("a")
    sit(play, "one", timeout=10.0)
    play.submit("plain", timeout=30.0)
    restarts = []
    for _ in range(12):
        restarts += of(play.step("a", after=4.0), Restart)
    assert len(restarts) == 1 and "batch" in restarts[0].why


def test_who_leaves_after_a_long_forward_does_not_make_the_others_late():
    play = Play("a")
    sit(play, "large", timeout=600.0)
    sit(play, "small", timeout=10.0)
    assert not of(play.tick(after=100.0), Restart)
    assert not of(play.stand_up("a", "large"), Restart), "the small one's first step had to wait for the large one"
    assert not of(play.tick(after=9.0), Restart)
    assert of(play.tick(after=1.5), Restart)


def test_a_batch_that_waited_for_a_long_forward_is_not_late_when_that_was_the_last():
    play = Play("a")
    sit(play, "large", timeout=600.0)
    play.submit("plain", timeout=30.0)
    assert not of(play.tick(after=100.0), Restart)
    assert not of(play.stand_up("a", "large"), Restart), "the batch begins only now"
    play.finish("a", seconds=20.0)
    assert play.ended == {"large": "done", "plain": "done"}


def test_jobs_that_come_and_go_do_not_hide_a_batch_that_never_ends():
    play = Play("a")
    play.submit("plain", timeout=30.0)
    for number in range(20):
        if not of(play.log, Restart):
            sit(play, f"job{number}", timeout=10.0)
            play.stand_up("a", f"job{number}", after=4.0)
    (restart,) = of(play.log, Restart)
    assert "batch" in restart.why and play.now == pytest.approx(140.0, abs=4.0)


def test_a_step_told_by_a_former_incarnation_counts_for_nothing():
    from scheduler.events import Stepped

    play = Play("a")
    sit(play, "one", timeout=10.0)
    play.die("a")
    play.ready("a")
    play.tell(Stepped("a", 1), after=9.0)
    assert of(play.tick(after=2.0), Restart)


# --- a worker is lost -------------------------------------------------------------------------------------------------


def test_who_stepped_is_blamed_and_who_was_parked_is_not_and_all_go_back_to_the_front():
    play = Play("a", seats=2)
    sit(play, *names("job", 3))
    play.park("a", "job1")
    commands = play.die("a")
    assert {command.job for command in of(commands, Requeue)} == {"job0", "job1"}
    assert {job.ticket.id: job.deaths for job in play.scheduler.jobs.values()} == {"job0": 1, "job1": 0, "job2": 0}
    play.ready("a")
    assert list(play.seated["a"]) == ["job0", "job1"]
    assert "parked for others" in "\n".join(play.scheduler.story("job1"))


def test_a_suspect_sits_alone_and_no_batch_runs_beside_it():
    play = Play("a")
    sit(play, "poison")
    doubled(play, "a")
    play.submit("plain")
    sit(play, "other")
    assert list(play.seated["a"]) == ["poison"] and not play.held["a"]
    play.die("a")
    assert play.ended == {"poison": "poisonous_job"}
    play.ready("a")
    assert list(play.seated["a"]) == ["other"] and play.running("a") == ["plain"]


def test_a_suspect_of_a_batch_gets_no_seated_company():
    play = Play("a")
    play.submit("poison")
    doubled(play, "a")
    sit(play, "one")
    assert play.running("a") == ["poison"] and not play.seated["a"]
    play.finish("a")
    assert list(play.seated["a"]) == ["one"]


def test_for_a_suspect_one_worker_is_kept_free_while_the_others_go_on():
    play = Play("a", "b", seats=2, urgent_seats=0)
    sit(play, "suspect", cost=10.0)
    sit(play, *names("job", 3))
    worker = play.scheduler.jobs["suspect"].batch.worker.name
    play.park(worker, *[job for job in play.seated[worker] if job != "suspect"])
    play.die(worker)
    play.ready(worker)
    worker = play.scheduler.jobs["suspect"].batch.worker.name
    for job in play.seated[worker]:
        if job != "suspect":
            play.park(worker, job)
    play.die(worker, blame="running")
    assert play.scheduler.jobs["suspect"].suspect
    sit(play, *names("load", 8))
    (other,) = {"a", "b"} - {worker}
    for _ in range(3):  # its seats are not filled again, until the suspect has had it
        if play.seated[other] and "suspect" not in play.seated[other]:
            play.stand_up(other, next(iter(play.seated[other])))
    assert list(play.seated[other]) == ["suspect"]
    play.ready(worker)
    assert len(play.seated[worker]) == 2
    play.stand_up(other, "suspect")
    assert len(play.seated[other]) == 2


def test_of_many_seated_jobs_the_one_that_kills_is_found():
    simulation = Simulation(Scheduler(), [Device("a"), Device("b")], seed=3)
    simulation.poisson(20.0, 60, Mix(groups=(STEPPED,), cost=5.0, poison=0.05))
    report = simulation.run()
    simulation.scheduler.check()
    assert report.ends["failed"] >= 1 and report.ends["failed"] + report.ends["succeeded"] == 60
    assert report.ends["succeeded"] >= 50


def test_mixed_work_on_devices_that_crash_and_hang_ends_exactly_once():
    devices = [Device("a", jitter=0.2, crash=0.004), Device("b", slowness=2.0, hang=0.002), Device("c")]
    wide = replace(STEPPED, width=1024)
    groups = (STEPPED, wide, *Mix().groups)
    mix = Mix(groups=groups, priorities=tuple(Priority), tenants=("x", "y"), cost=4.0, cancel=0.1, cancel_after=0.2,
              deadline=600.0)
    simulation = Simulation(Scheduler(), devices, seed=11, latency=0.001)
    simulation.poisson(60.0, 1500, mix)
    report = simulation.run()
    simulation.scheduler.check()
    assert sum(report.ends.values()) == 1500 and report.ends["succeeded"] > 1200
    assert report.restarts > 0 and report.requeues > 0 and report.rows > 1.2 * report.forwards


def test_a_seated_job_whose_batch_ends_without_an_answer_comes_back_and_cannot_circle_for_ever():
    from scheduler.events import BatchEnded

    play = Play("a")
    sit(play, "one")
    for _ in range(3):
        batch = play.seated["a"].pop("one")
        play.tell(BatchEnded("a", 1, batch.batch, 0.1))
    assert play.ended == {"one": "poisonous_job"}


def test_a_dispatch_says_which_worker_and_what_it_may_cost():
    play = Play("a")
    sit(play, "one", cost=30.0)
    (dispatch,) = of(play.log, Dispatch)
    assert (dispatch.worker, dispatch.incarnation, dispatch.tickets[0].cost) == ("a", 1, 30.0)
    (view,) = play.scheduler.workers()
    assert [seat.jobs for seat in view.seated] == [("one",)] and not view.held and "1 seated" in repr(play.scheduler)

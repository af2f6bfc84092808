"""Batches that pay: no longer than they may be, no wider than gains, and left for who is urgent or idle."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scheduler_kit import SMALL, Play, names, of

from core.errors import Overloaded
from core.request import Priority
from scheduler.admission import Admission
from scheduler.commands import Dispatch, Recall, Requeue
from scheduler.config import SchedulerConfig
from scheduler.events import BatchEnded, ItemEnded
from scheduler.pace import DOUBTED, Widths
from scheduler.scheduler import Scheduler
from scheduler.simulator import GROUP, Device, Mix, Simulation

OTHER = replace(SMALL, model="other")


def give_back(play: Play, worker: str, answered: int, seconds: float = 1.0) -> list:
    """The worker's running batch is left after so many of its jobs."""
    batch = play.held[worker].pop(0)
    for ticket in batch.tickets[:answered]:
        play._end(ticket.id, "done")
        play.tell(ItemEnded(worker, batch.incarnation, batch.batch, ticket.id))
    left = tuple(ticket.id for ticket in batch.tickets[answered:])
    return play.tell(BatchEnded(worker, batch.incarnation, batch.batch, seconds, left))


def busy(**config) -> Play:
    """One worker with eight slow jobs, and two that wait."""
    play = Play("a", **config)
    play.warm("a", fixed=0.0, each=1.0)
    play.start("first")
    play.submit(*names("slow", 10))
    play.finish("a", 1.0)
    assert len(play.running("a")) == 8
    return play


def test_a_p0_job_has_a_long_batch_recalled_and_goes_next_and_the_rest_goes_before_all_others() -> None:
    play = busy()
    running = play.running("a")
    (recall,) = of(play.submit("urgent", group=OTHER, priority=Priority.URGENT), Recall)
    assert (recall.worker, recall.batch) == ("a", play.held["a"][0].batch)
    assert not of(play.submit("urgent2", group=OTHER, priority=Priority.URGENT), Recall), "it was asked already"
    commands = give_back(play, "a", 1)
    assert [one.job for one in of(commands, Requeue)] == running[1:]
    assert play.running("a") == ["urgent", "urgent2"]
    play.finish("a")
    assert play.running("a")[:7] == running[1:], "they kept their places"
    play.finish_all()
    assert len(play.ended) == len(play.scheduler._ended) == len(set(play.ended))


def test_a_returned_job_is_charged_once_and_not_blamed() -> None:
    play = busy()
    job = play.running("a")[3]
    play.submit("urgent", group=OTHER, priority=Priority.URGENT)
    tag = play.scheduler.backlog.ranks[Priority.NORMAL].tag
    give_back(play, "a", 1)
    assert play.scheduler.jobs[job].deaths == 0 and not play.scheduler.jobs[job].suspect
    play.finish("a")
    assert job in play.running("a") and play.scheduler.backlog.ranks[Priority.NORMAL].tag <= tag + 1 / 1 + 1e-9


def test_a_job_cancelled_while_its_batch_is_recalled_ends_once() -> None:
    play = busy()
    job = play.running("a")[5]
    play.submit("urgent", group=OTHER, priority=Priority.URGENT)
    play.cancel(job)
    commands = give_back(play, "a", 1)
    assert job not in [one.job for one in of(commands, Requeue)] and play.ended[job] == "cancelled"
    play.finish_all()


def test_a_short_batch_is_let_be() -> None:
    play = busy(recall_from=60.0)
    assert not of(play.submit("urgent", group=OTHER, priority=Priority.URGENT), Recall)


def test_p0_that_has_had_its_share_recalls_nothing() -> None:
    play = busy()
    play.scheduler.backlog.ranks[Priority.URGENT].tag = 1e6
    assert not of(play.submit("urgent", group=OTHER, priority=Priority.URGENT), Recall)


def test_an_idle_worker_gets_a_part_of_a_long_batch() -> None:
    play = Play("a")
    play.warm("a", fixed=0.0, each=1.0)
    play.start("first")
    play.submit(*names("slow", 7))
    play.finish("a", 1.0)
    assert len(play.running("a")) == 7
    commands = play.ready("b")
    assert len(of(commands, Recall)) == 1
    give_back(play, "a", 1)
    assert min(len(play.running("a")), len(play.running("b"))) >= 2


def test_what_is_lost_after_a_recall_is_put_back_once() -> None:
    play = busy()
    play.submit("urgent", group=OTHER, priority=Priority.URGENT)
    play.die("a")
    play.ready("a")
    play.finish_all()
    assert set(play.ended.values()) == {"done"}


def test_a_batch_is_no_longer_than_the_setting_allows() -> None:
    play = Play("a", longest_batch=3.0)
    play.warm("a", fixed=0.0, each=1.0)
    play.start("first")
    play.submit(*names("slow", 10))
    play.finish("a", 1.0)
    assert len(play.running("a")) == 3


def test_without_the_setting_it_depends_on_who_waits() -> None:
    play = Play("a")
    play.warm("a", fixed=0.0, each=0.9)
    play.start("first")
    play.submit(*names("slow", 10))
    play.submit("stranger", group=OTHER)
    play.finish("a", 1.0)
    assert len(play.running("a")) == 2


def test_widths_at_which_a_job_costs_more_are_left_and_tried_again_later() -> None:
    widths = Widths()
    for _ in range(3):
        widths.learn(1, 0.6, 0.0)
        widths.learn(4, 0.65, 0.0)
    assert widths.most(16, 1.0) == 16, "noise is no loss, and wider was never measured"
    for _ in range(3):
        widths.learn(7, 1.31, 0.0)
    assert widths.most(16, 1.0) == 4
    assert widths.most(16, DOUBTED + 1) == 16


def test_a_width_that_gains_is_kept() -> None:
    widths = Widths()
    for size, each in ((1, 1.0), (2, 0.6), (8, 0.2)):
        for _ in range(3):
            widths.learn(size, each, 0.0)
    assert widths.most(8, 1.0) == 8


def test_a_simulated_device_whose_batches_do_not_pay_gets_narrow_ones() -> None:
    def each_second(crowding: float) -> tuple[float, float]:
        simulation = Simulation(Scheduler(), [Device("a", fixed=0.0, each=0.01, crowding=crowding)], seed=1)
        simulation.closed_loop(1, 20)
        simulation.run()
        simulation.closed_loop(8, 400)
        report = simulation.run()
        return report.throughput, report.batch_size

    slow, narrow = each_second(0.2)
    assert narrow < 2.5 and slow > 0.8 * 100
    assert each_second(0.0)[1] > 3


def test_simulated_p0_waits_for_one_image_and_not_for_a_batch_and_all_devices_work_to_the_end() -> None:
    devices = [Device(name, fixed=0.0, each=0.6, one_by_one=True) for name in "ab"]
    scheduler = Scheduler(SchedulerConfig())
    simulation = Simulation(scheduler, devices, seed=3)
    simulation.closed_loop(16, 64, Mix())
    urgent = Mix((replace(GROUP, model="small"),), (Priority.URGENT,), cost=0.1)
    for second in range(2, 16, 2):
        simulation.at(float(second), lambda: simulation.submit(urgent))
    report = simulation.run()
    scheduler.check()
    assert report.ends == {"succeeded": 71}
    assert max(report.waited[Priority.URGENT]) <= 0.75
    assert report.utilisation > 0.95


@pytest.mark.parametrize("jobs", [16, 64])
def test_p0_finds_room_in_a_full_queue(jobs: int) -> None:
    admission = Admission(jobs, 1000)
    for _ in range(jobs):
        admission.admit(1)
    with pytest.raises(Overloaded):
        admission.ask(1)
    for _ in range(4):
        admission.admit(1, urgent=True)
    admission.check()
    for _ in range(jobs):
        try:
            admission.admit(1, urgent=True)
        except Overloaded:
            break
    else:
        pytest.fail("its room is bounded too")


def test_p0_finds_room_where_the_bytes_are_used_up() -> None:
    admission = Admission(100, 1600)
    admission.admit(1600)
    admission.admit(100, urgent=True)
    with pytest.raises(Overloaded):
        admission.admit(1, urgent=True)


def test_a_dispatch_after_a_recall_holds_what_was_returned() -> None:
    play = busy()
    play.submit("urgent", group=OTHER, priority=Priority.URGENT)
    sent = give_back(play, "a", 0)
    assert [one.tickets[0].id for one in of(sent, Dispatch)] == ["urgent"]

"""Models that are loaded for a batch, and images that keep a thread: whose time it is, and who is to blame."""

from __future__ import annotations

import pytest
from scheduler_kit import SMALL, STEPPED, Play, of

from scheduler.commands import Requeue, Restart
from scheduler.events import Loading, Stuck


def deaths(play: Play) -> dict[str, int]:
    return {job.ticket.id: job.deaths for job in play.scheduler.jobs.values()}


# --- loading ----------------------------------------------------------------------------------------------------------


def test_a_batch_s_own_time_counts_from_when_its_model_is_loaded():
    play = Play("a")
    play.submit("one", timeout=10.0)
    play.load("a", "one")
    assert not of(play.tick(after=500.0), Restart)
    play.load("a", "one", done=True, after=50.0)
    assert not of(play.tick(after=9.9), Restart)
    (restart,) = of(play.tick(after=0.2), Restart)
    assert "did not end within 10.0 s" in restart.why


def test_a_stepped_job_s_own_time_counts_from_when_its_model_is_loaded_and_so_does_that_of_those_beside_it():
    play = Play("a")
    play.submit("one", "two", group=STEPPED, timeout=10.0)
    play.load("a", "two", after=9.0)
    assert not of(play.tick(after=100.0), Restart), "nobody can step while a model is loaded"
    play.load("a", "two", done=True)
    assert not of(play.tick(after=9.9), Restart)
    (restart,) = of(play.wake(), Restart)
    assert "none of 2 stepped jobs" in restart.why


def test_loading_has_a_bound_of_its_own_and_only_who_wanted_the_model_is_blamed():
    play = Play("a", load_timeout=60.0)
    play.submit("steps", "wants", group=STEPPED, timeout=10.0)
    play.submit("plain", timeout=10.0)
    play.load("a", "wants")
    assert not of(play.tick(after=59.0), Restart)
    (restart,) = of(play.wake(), Restart)
    assert restart.why == "model 'draw' was not loaded within 60.0 s"
    assert not of(play.tick(after=100.0), Restart)
    assert {command.job for command in of(play.die("a"), Requeue)} == {"steps", "wants", "plain"}
    assert deaths(play) == {"steps": 0, "wants": 1, "plain": 0}


def test_a_worker_that_dies_while_it_loads_is_held_against_who_wanted_the_model():
    play = Play("a")
    play.submit("plain")
    play.submit("wants", group=STEPPED)
    play.load("a", "wants")
    play.die("a")
    assert deaths(play) == {"plain": 0, "wants": 1}
    play.ready("a")
    play.submit("more", timeout=10.0)
    assert play.scheduler.roster.workers["a"].loading is None


def test_what_is_learnt_of_time_holds_no_loading():
    play = Play("a")
    play.submit("steps", group=STEPPED)
    play.submit("plain")
    steps = play.scheduler.jobs["steps"].batch
    play.load("a", "plain", after=1.0)
    play.submit("later", group=STEPPED, after=30.0)
    play.load("a", "plain", done=True, after=70.0)
    play.finish("a", seconds=102.0, after=2.0)
    assert play.scheduler.roster.workers["a"].pace == 1.0
    assert play.scheduler.backlog.group(SMALL).curve.seconds(1.0) == pytest.approx(2.0)
    play.stand_up("a", "steps")
    assert steps.share == pytest.approx(1.0 + 2.0 / 2)


def test_loading_that_is_told_of_a_former_life_or_of_no_batch_changes_nothing():
    play = Play("a")
    play.submit("one", timeout=10.0)
    play.tell(Loading("a", 0, 1))
    play.tell(Loading("a", 1, 77))
    play.tell(Loading("nobody", 1, 1))
    assert of(play.tick(after=10.1), Restart)


def test_a_batch_that_ends_unheard_ends_the_loading_too():
    play = Play("a")
    play.submit("one", "two", timeout=10.0)
    play.load("a", "one")
    play.finish("a")
    assert play.running("a") == ["two"]
    assert of(play.tick(after=10.1), Restart)


# --- threads that are kept --------------------------------------------------------------------------------------------


def test_a_job_whose_image_keeps_a_thread_costs_the_worker_and_is_blamed_alone():
    play = Play("a")
    play.submit("good", "stuck", group=STEPPED, timeout=10.0)
    play.submit("plain")
    (restart,) = of(play.stick("a", "stuck", after=12.0), Restart)
    assert restart.why == "the image of job stuck kept a thread for longer than 10.0 s"
    assert not of(play.stick("a", "stuck"), Restart), "once is enough"
    play.die("a")
    assert deaths(play) == {"good": 0, "stuck": 1, "plain": 0}


def test_a_worker_that_says_so_of_an_ordinary_batch_is_believed():
    play = Play("a")
    play.submit("one")
    play.submit("two", "three")
    play.finish("a")
    (restart,) = of(play.stick("a", "two"), Restart)
    assert "the image of job two" in restart.why
    play.die("a")
    assert deaths(play) == {"two": 1, "three": 1}


def test_one_that_does_so_again_and_again_is_found_out_and_its_company_ends_well():
    play = Play("a")
    play.submit("good", "stuck", group=STEPPED, timeout=10.0)
    for _ in range(2):
        play.stick("a", "stuck")
        play.die("a")
        play.ready("a")
    assert list(play.seated["a"]) == ["stuck"], "it is a suspect, and alone"
    assert of(play.tick(after=10.1), Restart)
    play.die("a")
    play.ready("a")
    play.stand_up("a", "good")
    assert play.ended == {"stuck": "poisonous_job", "good": "done"}


@pytest.mark.parametrize("event", [Stuck("a", 0, 1), Stuck("a", 1, 77), Stuck("nobody", 1, 1)])
def test_a_thread_of_a_former_life_or_of_no_batch_changes_nothing(event):
    play = Play("a")
    play.submit("one", group=STEPPED)
    assert not of(play.tell(event), Restart)


def test_what_a_worker_loads_while_it_is_being_ended_is_blamed_on_nobody():
    play = Play("a")
    play.submit("stuck", "wants", group=STEPPED, timeout=10.0)
    assert of(play.stick("a", "stuck"), Restart)
    play.load("a", "wants")
    play.die("a")
    assert deaths(play) == {"stuck": 1, "wants": 0}


def test_a_model_that_is_loaded_too_late_is_still_to_blame_for_the_restart():
    play = Play("a", load_timeout=60.0)
    play.submit("steps", "wants", group=STEPPED, timeout=10.0)
    play.load("a", "wants")
    assert of(play.tick(after=61.0), Restart)
    play.load("a", "wants", done=True)
    play.die("a")
    assert deaths(play) == {"steps": 0, "wants": 1}

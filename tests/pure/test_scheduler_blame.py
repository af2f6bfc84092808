"""Who is blamed for a lost worker, and that nobody waits for the suspects."""

from __future__ import annotations

from scheduler_kit import Play

from scheduler.work import GUILTY


def test_a_suspect_whose_worker_lacked_memory_gets_a_second_chance_and_no_third():
    play = Play("a")
    play.submit("one")
    for deaths in range(1, 4):
        play.die("a", blame="memory")
        play.ready("a")
        assert play.running("a") == ["one"], f"after {deaths} deaths"
    play.die("a", blame="memory")
    assert play.ended == {"one": "poisonous_job"}


def test_workers_killed_from_outside_blame_nobody_unless_it_is_one_job_alone_every_time():
    play = Play("a", "b")
    play.start("innocent")
    for _ in range(20):
        (busy,) = (worker for worker in ("a", "b") if play.running(worker) == ["innocent"])
        for _ in range(2):  # the second time it is idle, for the other has the job
            play.die(busy, blame="outside")
            play.ready(busy)
    job = play.scheduler.jobs["innocent"]
    assert job.deaths == 0 and not job.suspect
    play.finish_all()
    assert play.ended == {"innocent": "done"}


def test_a_job_that_is_always_the_one_whose_worker_is_killed_is_blamed_in_the_end():
    play = Play("a")
    play.submit("one")
    for strikes in range(1, GUILTY):
        play.die("a", blame="outside")
        play.ready("a")
        assert play.running("a") == ["one"], f"after {strikes}"
    play.die("a", blame="outside")
    assert play.ended == {"one": "poisonous_job"}
    assert play.finishes["one"].error.details["deaths"] == GUILTY


def suspects(*names: str) -> Play:
    """One worker, dead: a batch of these has killed it twice."""
    play = Play("a")
    play.start("first", timeout=1e6)
    play.submit(*names, timeout=1e6)
    play.finish("a")
    for turn in range(2):
        assert play.running("a") == list(names)
        play.die("a")
        if turn == 0:
            play.ready("a")
    assert len(play.scheduler.suspects) == len(names)
    return play


def test_suspects_have_one_worker_of_several_while_others_wait():
    play = suspects("s1", "s2", "s3")
    play.submit(*(f"good-{n}" for n in range(40)), timeout=1e6)
    for worker in ("a", "b", "c"):
        play.ready(worker)
    runs = [play.running(worker) for worker in ("a", "b", "c")]
    assert [run[0][0] for run in runs] == ["s", "g", "g"]
    play.finish_all()
    assert set(play.ended.values()) == {"done"} and len(play.ended) == 44


def test_a_single_worker_takes_turns_between_suspects_and_the_rest():
    play = suspects("s1", "s2")
    play.submit(*(f"good-{n}" for n in range(4)), timeout=1e6)
    play.ready("a")
    kinds = ""
    for _ in range(3):
        kinds += play.running("a")[0][0]
        play.finish("a")
    assert kinds == "sgs"

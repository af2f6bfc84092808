"""Supervision as pure reconciliation: cannot boot differs from died, restarts back off, the hopeless are given up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.supervisor import Kill, Start, Supervisor, SupervisorConfig, WorkerState

CONFIG = SupervisorConfig(boot_timeout=60, backoff=1, backoff_max=8, give_up_after=3)


def one(state=None):
    supervisor = Supervisor.of(["gpu"], CONFIG)
    assert supervisor.tick(0) == [Start("gpu", 1)]
    if state == "ready":
        supervisor.ready("gpu")
    return supervisor


def test_all_devices_are_started_at_once():
    supervisor = Supervisor.of(["a", "b", "c"], CONFIG)
    assert supervisor.tick(0) == [Start("a", 1), Start("b", 1), Start("c", 1)]
    assert supervisor.tick(1) == []


def test_a_worker_that_died_after_good_work_is_started_again_at_once():
    supervisor = one("ready")
    supervisor.worked("gpu")
    supervisor.exited("gpu", 100, "killed by SIGKILL", failed_to_boot=False)
    assert supervisor.tick(100) == [Start("gpu", 2)]
    assert supervisor.lives["gpu"].restarts == 1


def test_a_worker_that_dies_again_and_again_without_working_backs_off_but_is_never_given_up():
    supervisor = one("ready")
    now, waits = 0.0, []
    for _ in range(8):
        supervisor.exited("gpu", now, "killed by SIGKILL", failed_to_boot=False)
        waits.append(supervisor.next_at() - now)
        now = supervisor.next_at()
        assert supervisor.tick(now)
        supervisor.ready("gpu")
    assert waits == [0, 1, 2, 4, 8, 8, 8, 8]


def test_a_device_that_cannot_boot_is_given_up_and_reported_while_others_go_on():
    supervisor = Supervisor.of(["bad", "good"], CONFIG)
    supervisor.tick(0)
    supervisor.ready("good")
    now = 0.0
    for _ in range(3):
        supervisor.exited("bad", now, "no driver", failed_to_boot=True)
        now += 100
        supervisor.tick(now)
    life = supervisor.lives["bad"]
    assert life.state is WorkerState.GIVEN_UP and life.detail == "no driver" and life.incarnation == 3
    assert supervisor.lives["good"].state is WorkerState.READY
    assert supervisor.tick(now + 1) == []


def test_a_boot_that_hangs_is_killed_and_counts_as_a_failure_to_boot():
    supervisor = one()
    assert supervisor.next_at() == 60
    (kill,) = supervisor.tick(60)
    assert isinstance(kill, Kill) and "60 s" in kill.why
    assert supervisor.lives["gpu"].boot_failures == 1


def test_a_device_whose_boots_hang_is_given_up_too():
    supervisor = one()
    now = 0.0
    for _ in range(3):
        now = supervisor.next_at()
        assert isinstance(supervisor.tick(now)[0], Kill)
        supervisor.exited("gpu", now, "did not become ready", failed_to_boot=False)
        if supervisor.lives["gpu"].state is WorkerState.WAITING:
            now = supervisor.next_at()
            supervisor.tick(now)
    assert supervisor.lives["gpu"].state is WorkerState.GIVEN_UP


def test_a_successful_boot_forgives_earlier_failures():
    supervisor = one()
    supervisor.exited("gpu", 0, "x", failed_to_boot=True)
    supervisor.tick(100)
    supervisor.ready("gpu")
    assert supervisor.lives["gpu"].boot_failures == 0


def test_nothing_is_started_while_the_server_goes_away():
    supervisor = one("ready")
    supervisor.stop()
    supervisor.exited("gpu", 1, "stopped", failed_to_boot=False)
    assert supervisor.tick(1000) == [] and supervisor.lives["gpu"].state is WorkerState.STOPPED


@given(st.lists(st.sampled_from(["ready", "worked", "died", "boot", "time"]), max_size=60))
def test_whatever_happens_a_device_is_live_or_has_a_time_to_start_or_is_given_up(steps):
    supervisor, now = one(), 0.0
    for step in steps:
        life = supervisor.lives["gpu"]
        running = life.state in (WorkerState.STARTING, WorkerState.READY, WorkerState.DYING)
        if step == "ready" and life.state is WorkerState.STARTING:
            supervisor.ready("gpu")
        elif step == "worked" and life.state is WorkerState.READY:
            supervisor.worked("gpu")
        elif step == "died" and running:
            supervisor.exited("gpu", now, "x", failed_to_boot=False)
        elif step == "boot" and life.state is WorkerState.STARTING:
            supervisor.exited("gpu", now, "x", failed_to_boot=True)
        elif step == "time":
            now += 5
            supervisor.tick(now)
        if life.state is WorkerState.WAITING:
            assert life.at <= now + CONFIG.backoff_max and supervisor.next_at() is not None


def test_each_part_of_a_boot_may_take_its_time_and_a_hanging_one_may_not():
    supervisor = one()
    for now in (50, 100, 150):
        supervisor.booting("gpu", now)
        assert supervisor.tick(now + 59) == [] and supervisor.next_at() == now + 60
    (killed,) = supervisor.tick(210)
    assert isinstance(killed, Kill) and "60 s" in killed.why
    supervisor.booting("gpu", 211)
    assert supervisor.lives["gpu"].state is WorkerState.DYING, "too late"
    supervisor = one("ready")
    supervisor.booting("gpu", 1)
    assert supervisor.next_at() is None, "a model that is loaded later is no boot"


def given_up():
    supervisor = Supervisor.of(["gpu"], CONFIG)
    for now in (0, 100, 200):
        assert supervisor.tick(now)
        supervisor.exited("gpu", now, "no driver", failed_to_boot=True)
    assert supervisor.lives["gpu"].state is WorkerState.GIVEN_UP
    return supervisor


def test_a_device_that_was_given_up_is_tried_once_after_each_long_pause():
    supervisor = given_up()
    for now in (500, 800):
        assert supervisor.next_at() == now and supervisor.tick(now - 1) == []
        assert len(supervisor.tick(now)) == 1
        supervisor.exited("gpu", now, "no driver", failed_to_boot=True)
        assert supervisor.lives["gpu"].state is WorkerState.GIVEN_UP
    supervisor.tick(1100)
    supervisor.ready("gpu")
    assert supervisor.lives["gpu"].boot_failures == 0


def test_a_device_that_was_given_up_starts_when_it_is_asked_for_with_a_clean_slate():
    supervisor = given_up()
    assert supervisor.revive(201) == ["gpu"] and supervisor.revive(201) == []
    assert supervisor.tick(201) == [Start("gpu", 4)]
    supervisor.exited("gpu", 202, "no driver", failed_to_boot=True)
    assert supervisor.lives["gpu"].state is WorkerState.WAITING


@pytest.mark.parametrize(("served", "wait"), [(True, 0), (False, CONFIG.backoff)])
def test_what_others_kill_starts_again_at_once_and_teaches_nothing(served, wait):
    supervisor, now = one(), 0.0
    for _ in range(20):
        if served:
            supervisor.ready("gpu")
        supervisor.exited("gpu", now, "killed by SIGKILL", outside=True)
        assert supervisor.next_at() == now + wait
        now += wait
        assert supervisor.tick(now)
    life = supervisor.lives["gpu"]
    assert life.quick_deaths == life.boot_failures == 0

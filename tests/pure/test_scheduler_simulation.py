"""The scheduler as a whole, on simulated devices: throughput, fairness, and survival of crashes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from core.request import Priority
from scheduler.config import SchedulerConfig
from scheduler.scheduler import Scheduler
from scheduler.simulator import GROUP, Device, Mix, Simulation

PAIR = [Device("a", jitter=0.05), Device("b", jitter=0.05)]
REAL = {"latency": 0.0003, "spacing": 0.0004}  # seconds: what a message and a submission cost on a real server


def closed_loop(clients: int, devices: list[Device] = PAIR, think: float = 0.0015, jobs: int = 1500, **config: float):
    simulation = Simulation(Scheduler(SchedulerConfig(**config)), devices, **REAL)
    simulation.closed_loop(clients, jobs, think=think)
    report = simulation.run()
    simulation.scheduler.check()
    assert report.ends == {"succeeded": jobs}
    return report


def test_64_clients_keep_two_devices_busy_with_full_batches():
    report = closed_loop(64)
    assert report.throughput >= 0.9 * 2 * 8 / 0.009
    assert report.batch_size >= 7.8 and report.utilisation >= 0.97


def test_one_client_waits_for_nothing():
    report = closed_loop(1, jobs=200)
    assert report.waits()[Priority.NORMAL][1] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("clients", [6, 8, 12])
def test_a_wait_that_pays_raises_throughput_and_one_that_does_not_is_not_made(clients):
    waiting, greedy = closed_loop(clients), closed_loop(clients, max_queue_delay=0.0)
    assert waiting.throughput >= 1.03 * greedy.throughput
    assert waiting.waits()[2][0] <= 1.3 * greedy.waits()[2][0]


@pytest.mark.parametrize("load", [0.3, 0.6, 0.9])
def test_at_random_arrivals_nothing_is_lost_by_the_hope_for_fuller_batches(load):
    means = []
    for delay in (0.05, 0.0):
        simulation = Simulation(Scheduler(SchedulerConfig(max_queue_delay=delay)), PAIR, **REAL)
        simulation.poisson(load * 2 / 0.0055, 2000)
        means.append(simulation.run().waits()[2][0])
    assert means[0] <= 1.15 * means[1] + 1e-4


def test_two_clients_of_one_slow_device_meet_in_one_batch():
    device = [Device("a", fixed=0.1, each=0.02)]
    assert closed_loop(2, device, think=0.01, jobs=200).batch_size > 1.9


def test_a_device_three_times_slower_does_a_third_of_the_work():
    report = closed_loop(64, [Device("quick"), Device("slow", slowness=3.0)])
    assert report.done["quick"] / report.done["slow"] == pytest.approx(3.0, rel=0.15)


def test_equal_devices_do_equal_work():
    simulation = Simulation(Scheduler(), [Device(f"d{n}", jitter=0.1) for n in range(8)])
    simulation.closed_loop(200, 8000)
    report = simulation.run()
    assert max(report.done.values()) <= 1.1 * min(report.done.values()), report.done


def test_tenants_get_the_same_and_priorities_their_shares_while_all_wait():
    simulation = Simulation(Scheduler(), PAIR, seed=3)
    for priority in Priority:
        for tenant in "vwxyz":
            simulation.closed_loop(12, 10_000, Mix(priorities=(priority,), tenants=(tenant,)))
    report = simulation.run(until=3.0)
    assert report.fairness > 0.99
    total = sum(report.served_by_priority.values())
    got = [report.served_by_priority[priority] / total for priority in Priority]
    assert got == pytest.approx([0.5, 0.3, 0.1, 0.1], abs=0.03)
    waits = report.waits()
    assert waits[0][0] < waits[1][0] < waits[2][0]


@pytest.mark.parametrize("seed", range(3))
def test_every_job_ends_once_through_crashes_hangs_full_memory_poison_cancels_and_deadlines(seed):
    scheduler = Scheduler(SchedulerConfig(hang_floor=0.2))
    devices = [Device("a", crash=0.02, hang=0.01, boot=0.1, jitter=0.3), Device("b", crash=0.02, boot=0.1, memory=5),
               Device("c", slowness=4.0, hang=0.02, boot=0.3)]
    simulation = Simulation(scheduler, devices, seed=seed, latency=0.0005)
    groups = (GROUP, replace(GROUP, width=1024, limit=2), replace(GROUP, model="other", limit=4))
    mix = Mix(groups, tuple(Priority), ("x", "y", "z"), poison=0.002, cancel=0.05, deadline=5.0)
    simulation.closed_loop(40, 2000, mix)
    report = simulation.run()
    scheduler.check()
    assert sum(report.ends.values()) == 2000 and not scheduler.jobs
    assert report.restarts and report.requeues and report.ends["cancelled"]
    assert report.ends["succeeded"] >= 1850


def test_a_thousand_devices_are_all_put_to_work():
    simulation = Simulation(Scheduler(), [Device(f"d{n}", boot=1.0) for n in range(1000)])
    simulation.closed_loop(16_000, 32_000)
    report = simulation.run()
    assert report.ends["succeeded"] == 32_000 and min(report.done.values()) > 0 and report.batch_size > 5.5


def test_a_simulation_with_the_same_seed_is_the_same():
    def run() -> str:
        simulation = Simulation(Scheduler(), [Device("a", crash=0.05, jitter=0.5), Device("b")], seed=7)
        simulation.poisson(300.0, 500, Mix(priorities=tuple(Priority), cancel=0.1))
        return str(simulation.run())

    assert run() == run()

"""W5: what the scheduler itself costs, and how well it decides, on a fake clock.

    python -m bench.scheduler [--quick] [--rounds 5] [--million]

First the cost of an event, in CPU time of one core: the backlog is kept at a given length while batches end, jobs come,
are cancelled and workers crash; cases take turns, ratios are taken within a round. Then simulations of whole servers.
Writes bench/results/scheduler.json and scheduler.png.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import tracemalloc
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import matplotlib as mpl
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench.common import RESULTS, machine_facts, write_result
from bench.runs import goal, spread, table
from bench.runs import show as show_spread
from core.request import Priority
from core.ticket import Group, Ticket
from scheduler.commands import Dispatch
from scheduler.config import SchedulerConfig
from scheduler.events import BatchEnded, Cancelled, Event, ItemEnded, Submitted, WorkerLost, WorkerReady
from scheduler.scheduler import Scheduler
from scheduler.simulator import Device, Mix, Simulation

GROUPS = [Group("model", "1", 64 * n, 512, limit=8) for n in range(1, 9)]
BASE = (1, 1_000)  # devices, queued
BATCH_SECONDS = 0.009


class Churn:
    """A scheduler in steady state: whatever ends, is cancelled or crashes is made up for by a new submission."""

    def __init__(self, devices: int, queued: int) -> None:
        self.scheduler = Scheduler()
        self.devices = devices
        self.now = 0.0
        self.number = 0
        self.sent: deque[Dispatch] = deque()
        self.incarnations = dict.fromkeys((f"cuda:{n}" for n in range(devices)), 1)
        for worker in self.incarnations:
            self.tell(WorkerReady(worker, 1))
        for _ in range(queued + 8 * devices):
            self.tell(Submitted(self.ticket()))

    def ticket(self) -> Ticket:
        self.number = n = self.number + 1
        deadline = self.now + 1e6 if n % 10 == 0 else None
        return Ticket(f"job-{n}", GROUPS[n * 7 % 8], 1.0, Priority(n % 4), f"tenant-{n * 13 % 100}", deadline)

    def tell(self, event: Event) -> None:
        for command in self.scheduler.handle(event, self.now):
            if isinstance(command, Dispatch):
                self.sent.append(command)

    def events(self) -> list[Event]:
        """The next batch ends, with what a server would hear meanwhile: 5 % cancels, one crash in 1,000 batches."""
        self.now += BATCH_SECONDS / self.devices
        while (batch := self.sent.popleft()).incarnation != self.incarnations[batch.worker]:
            pass
        worker, number = batch.worker, batch.batch
        if number % 1_000 == 999:
            born = self.incarnations[worker] = batch.incarnation + 1
            return [WorkerLost(worker, batch.incarnation, "killed"), WorkerReady(worker, born)]
        events: list[Event] = [ItemEnded(worker, batch.incarnation, number, ticket.id) for ticket in batch.tickets]
        events.append(BatchEnded(worker, batch.incarnation, number, BATCH_SECONDS))
        if number % 2 == 0:
            events += [Cancelled(f"job-{self.number - number % 100}"), Submitted(self.ticket())]
        return events + [Submitted(self.ticket()) for _ in batch.tickets]

    def measure(self, least: int) -> float:
        """CPU microseconds per event over at least so many events."""
        spent, count = 0.0, 0
        while count < least:
            events = self.events()
            began = time.process_time_ns()
            for event in events:
                self.tell(event)
            self.scheduler.next_deadline()
            spent += time.process_time_ns() - began
            count += len(events)
        return spent / count / 1e3


def cost_per_event(cases: list[tuple[int, int]], rounds: int, least: int, progress: Progress) -> dict[Any, list[float]]:
    """CPU microseconds per event of each case, round by round."""
    task = progress.add_task("cost of an event", total=rounds * len(cases))
    found: dict[Any, list[float]] = {case: [] for case in cases}
    for number in range(rounds):
        for case in cases[number % len(cases):] + cases[: number % len(cases)]:
            churn = Churn(*case)
            churn.measure(least // 4)
            gc.collect()
            found[case].append(churn.measure(least))
            if case[1] <= 10_000:
                churn.scheduler.check()
            del churn
            gc.collect()
            progress.advance(task)
    return found


def bytes_per_ticket(queued: int = 20_000) -> float:
    """What the scheduler remembers of a waiting ticket, beside the ticket itself."""
    tickets = [Ticket(f"job-{n}", GROUPS[n % 8], 1.0, Priority(n % 4), f"tenant-{n % 100}") for n in range(queued)]
    scheduler = Scheduler()
    tracemalloc.start()
    for ticket in tickets:
        scheduler.handle(Submitted(ticket), 1.0)
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return size / queued


def simulate(quick: bool, million: bool, progress: Progress) -> dict[str, dict[str, Any]]:
    """Whole servers. Each row: what came out, and what could have come out at best where that is known."""
    pair = [Device(f"cuda:{n}", jitter=0.05) for n in range(2)]
    real = {"latency": 0.0003, "spacing": 0.0004}
    jobs = 1_000 if quick else 5_000
    limit = 2 * 8 / 0.009
    runs: dict[str, tuple[Callable[[], Simulation], float | None]] = {}

    def closed(clients: int, delay: float, devices: list[Device] = pair) -> Callable[[], Simulation]:
        def make() -> Simulation:
            simulation = Simulation(Scheduler(SchedulerConfig(max_queue_delay=delay)), devices, **real)
            simulation.closed_loop(clients, jobs, think=0.0015)
            return simulation
        return make

    def mixed(devices: list[Device], each: int, mix: Mix, **config: float) -> Callable[[], Simulation]:
        def make() -> Simulation:
            simulation = Simulation(Scheduler(SchedulerConfig(**config)), devices, seed=1)
            simulation.closed_loop(16 * len(devices), each, mix)
            return simulation
        return make

    for clients in (1, 6, 12, 64):
        runs[f"W1 at c={clients}"] = closed(clients, 0.05), limit
        runs[f"W1 at c={clients}, never waiting"] = closed(clients, 0.0), limit
    everybody = Mix(GROUPS[:3], tuple(Priority), tuple("vwxyz"))
    runs["one of two devices 4x slower"] = closed(64, 0.05, [pair[0], Device("slow", slowness=4.0)]), 8 / 0.009 * 1.25
    runs["4 priorities, 5 tenants, 3 sizes"] = mixed([*pair], 4 * jobs, everybody), limit
    frail = [Device(f"cuda:{n}", crash=0.01, hang=0.002, boot=0.2, memory=6 if n else 8) for n in range(8)]
    faulty = replace(everybody, poison=0.001, cancel=0.05)
    runs["8 devices that crash, hang, run out of memory"] = mixed(frail, 4 * jobs, faulty, hang_floor=0.2), None
    many = [Device(f"cuda:{n}", slowness=1 + n % 3, boot=0.5) for n in range(1_000)]
    runs["1,000 devices of 3 speeds"] = mixed(many, 100_000 if quick else 300_000, everybody), None
    if million:
        runs["1,000 devices, a million jobs, crashes"] = (
            mixed([replace(device, crash=0.001) for device in many], 1_000_000, faulty), None)

    found: dict[str, dict[str, Any]] = {}
    task = progress.add_task("simulations", total=len(runs))
    for name, (make, best) in runs.items():
        simulation = make()
        began = time.process_time()
        report = simulation.run()
        seconds = time.process_time() - began
        simulation.scheduler.check()
        assert not simulation.scheduler.jobs, "a job was lost"
        found[name] = {
            "jobs": sum(report.ends.values()), "ends": dict(report.ends), "makespan": report.makespan,
            "throughput": report.throughput, "of_limit": report.throughput / best if best else None,
            "batch_size": report.batch_size, "utilisation": report.utilisation, "fairness": report.fairness,
            "waits": {f"P{p}": wait for p, wait in report.waits().items()}, "restarts": report.restarts,
            "requeues": report.requeues, "events": report.events, "cpu_us_per_event": 1e6 * seconds / report.events,
        }
        progress.advance(task)
    return found


def draw(cost: dict[tuple[int, int], list[float]], simulations: dict[str, dict[str, Any]]) -> None:
    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for devices in sorted({devices for devices, _ in cost}):
        points = sorted((queued, values) for (at, queued), values in cost.items() if at == devices)
        middle = [statistics.median(values) for _, values in points]
        spread = [[m - min(v) for m, (_, v) in zip(middle, points, strict=True)],
                  [max(v) - m for m, (_, v) in zip(middle, points, strict=True)]]
        lengths, label = [queued for queued, _ in points], f"{devices:,} device{'s' if devices > 1 else ''}"
        left.errorbar(lengths, middle, spread, marker="o", capsize=3, label=label)
    left.axhline(20, color="grey", linestyle=":", label="50,000 events/s")
    left.set(xscale="log", xlabel="jobs waiting", ylabel="CPU µs per event", title="Cost of an event", ylim=(0, None))
    left.legend()
    names = [name for name, run in simulations.items() if run["of_limit"] is not None]
    right.barh(names, [simulations[name]["of_limit"] for name in names])
    right.axvline(1, color="grey", linestyle=":")
    right.invert_yaxis()
    right.set(title="Throughput, as part of what the devices can do", xlim=(0, 1.05))
    figure.savefig(RESULTS / "scheduler.png", dpi=110)


def show(console: Console, cost: dict[tuple[int, int], list[float]], simulations: dict[str, dict[str, Any]]) -> None:
    table = Table("devices", "waiting", "CPU µs/event", "range", "events/s", "x base", title="Cost of an event")
    for (devices, queued), values in cost.items():
        middle = statistics.median(values)
        ratio = statistics.median(mine / base for mine, base in zip(values, cost[BASE], strict=True))
        table.add_row(f"{devices:,}", f"{queued:,}", f"{middle:.2f}", f"{min(values):.2f}-{max(values):.2f}",
                      f"{1e6 / middle:,.0f}", f"{ratio:.2f}")
    console.print(table)
    table = Table("", "jobs/s", "of limit", "batch", "busy", "Jain", "wait mean/P95 ms", title="Simulations")
    for name, run in simulations.items():
        waits = "  ".join(f"{p} {1e3 * mean:.1f}/{1e3 * p95:.1f}" for p, (mean, p95) in run["waits"].items())
        of_limit = "" if run["of_limit"] is None else f"{run['of_limit']:.2f}"
        table.add_row(name, f"{run['throughput']:,.0f}", of_limit, f"{run['batch_size']:.2f}",
                      f"{run['utilisation']:.2f}", f"{run['fairness']:.3f}", waits)
    console.print(table)


def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the project asks of the scheduler, and what was measured; ratios are taken within a round."""
    cost = {(row["devices"], row["queued"]): row["cpu_us_per_event"] for row in rows}
    slowest = max(cost, key=lambda case: statistics.median(cost[case]))
    rate = spread(1e6 / value for value in cost[slowest])
    longest = max(queued for devices, queued in cost if devices == 1)
    queue = spread(a / b for a, b in zip(cost[1, longest], cost[BASE], strict=True))
    devices = spread(a / b for a, b in zip(cost[1_000, 1_000], cost[BASE], strict=True))
    return [
        goal("W5 events a second on one core, the slowest case", "≥ 50,000", rate, rate["median"] >= 5e4, "{:,.0f}"),
        goal(f"W5 cost of an event, {longest:,} queued against 1,000", "≤ 1.5x", queue, queue["median"] <= 1.5,
             unit="x"),
        goal("W5 cost of an event, 1,000 devices against one", "≤ 2x", devices, devices["median"] <= 2, unit="x"),
    ]  # fmt: skip


def tables(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [table("W5, cost of an event", ["devices", "queued", "CPU µs", "events/s"], (
        [f"{row['devices']:,}", f"{row['queued']:,}", show_spread(spread(row["cpu_us_per_event"])),
         f"{row['events_per_second']:,.0f}"]
        for row in sorted(rows, key=lambda row: (row["devices"], row["queued"]))
    ))]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="shorter queues and fewer events: a minute")
    parser.add_argument("--million", action="store_true", help="also simulate a million jobs on 1,000 devices")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    most = [1_000, 10_000, 100_000] if given.quick else [1_000, 10_000, 100_000, 1_000_000]
    cases = [BASE, *((devices, queued) for devices in (1, 8, 1_000) for queued in most if (devices, queued) != BASE)]
    if not given.quick:
        cases.remove((8, 1_000_000))
    console = Console()
    with Progress(console=console) as progress:
        cost = cost_per_event(cases, given.rounds, 10_000 if given.quick else 40_000, progress)
        simulations = simulate(given.quick, given.million, progress)
    size = bytes_per_ticket()
    show(console, cost, simulations)
    console.print(f"memory per waiting ticket, beside the ticket itself: {size:.0f} bytes")
    rows = [{"devices": devices, "queued": queued, "cpu_us_per_event": values, "median": statistics.median(values),
             "events_per_second": 1e6 / statistics.median(values),
             "ratio_to_base": statistics.median(a / b for a, b in zip(values, cost[BASE], strict=True))}
            for (devices, queued), values in cost.items()]
    result = {"unit": "CPU time of one core", "rounds": given.rounds, "quick": given.quick, "base": BASE,
              "goals": goals(rows), "tables": tables(rows),
              "bytes_per_ticket": size, "cost": rows, "simulations": simulations}
    console.print(f"written: {write_result('scheduler', machine_facts(), result).name}, scheduler.png")
    draw(cost, simulations)


if __name__ == "__main__":
    main()

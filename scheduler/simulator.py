"""The real scheduler on a fake clock: devices that are slow, run out of memory, crash and hang, and their clients.

A device's loop takes turns, as a real one does: a batch, then forwards that all its seated jobs share, for as long.

    simulation = Simulation(Scheduler(), [Device("cuda:0"), Device("cuda:1", slowness=3.0)])
    simulation.closed_loop(clients=64, jobs=10_000)
    print(simulation.run())

Everything random comes from one seeded generator, so a run can be repeated exactly.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from random import Random

from core.request import Priority
from core.ticket import Group, Ticket
from scheduler.commands import Command, Dispatch, Finish, Recall, Requeue, Restart, Revoke
from scheduler.events import (
    BatchEnded,
    BatchOutOfMemory,
    Cancelled,
    Event,
    ItemEnded,
    Stepped,
    Submitted,
    Tick,
    WorkerLost,
    WorkerReady,
)
from scheduler.scheduler import Scheduler

GROUP = Group("simulated", "1", 512, 512, limit=8)


@dataclass(frozen=True, slots=True)
class Device:
    """A device that takes `slowness x (fixed + each x cost)` seconds for a batch, and for a forward of its stepped jobs
    `slowness x (forward + row x jobs)`, give or take `jitter` of it. A stepped job needs as many forwards as it costs.

    one_by_one: the jobs of a batch run one behind the other, and what is not begun of a recalled batch comes back.
    crowding: by how much of `each` a job costs more for every companion.
    crash, hang: the chance of either per batch and per forward. memory: batches of more items do not fit. boot: seconds
    that a restart takes.
    """

    name: str
    slowness: float = 1.0
    fixed: float = 0.005
    each: float = 0.0005
    forward: float = 0.01
    row: float = 0.002
    jitter: float = 0.0
    one_by_one: bool = False
    crowding: float = 0.0
    crash: float = 0.0
    hang: float = 0.0
    memory: int = 1_000
    boot: float = 1.0


@dataclass(frozen=True, slots=True)
class Mix:
    """What clients ask for: each job draws its group, priority and tenant evenly from these.

    poison: the chance that a job kills whatever runs it. cancel: that it is cancelled `cancel_after` seconds after
    submission. deadline: seconds after submission."""

    groups: Sequence[Group] = (GROUP,)
    priorities: Sequence[Priority] = (Priority.NORMAL,)
    tenants: Sequence[str] = ("anonymous",)
    cost: float = 1.0
    poison: float = 0.0
    cancel: float = 0.0
    cancel_after: float = 0.01
    deadline: float | None = None


@dataclass(slots=True)
class Report:
    """What a simulation came to. Times are simulated seconds.

    busy, done: how long each device ran batches, and how many items. served: the cost that each tenant got. waited: by
    priority, how long each job waited for its last dispatch."""

    makespan: float = 0.0
    events: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    batches: int = 0
    items: int = 0
    forwards: int = 0
    rows: int = 0
    restarts: int = 0
    requeues: int = 0
    busy: Counter[str] = field(default_factory=Counter)
    done: Counter[str] = field(default_factory=Counter)
    served: Counter[str] = field(default_factory=Counter)
    served_by_priority: Counter[int] = field(default_factory=Counter)
    waited: dict[int, array[float]] = field(default_factory=lambda: {p: array("d") for p in Priority})

    @property
    def throughput(self) -> float:
        """Jobs that succeeded per second."""
        return self.ends["succeeded"] / self.makespan if self.makespan else 0.0

    @property
    def batch_size(self) -> float:
        return self.items / self.batches if self.batches else 0.0

    @property
    def utilisation(self) -> float:
        """The mean part of the time that the devices were busy, 0-1."""
        return sum(self.busy.values()) / (len(self.busy) * self.makespan) if self.busy and self.makespan else 0.0

    @property
    def fairness(self) -> float:
        """Jain's index over what the tenants got: 1 when all got the same, 1/n when one got everything."""
        got = self.served.values()
        return sum(got) ** 2 / (len(got) * sum(x * x for x in got)) if sum(got) else 1.0

    def waits(self) -> Mapping[int, tuple[float, float]]:
        """Mean and 95th percentile of the waiting time by priority."""
        return {p: (sum(w) / len(w), sorted(w)[int(0.95 * (len(w) - 1))]) for p, w in self.waited.items() if w}

    def __str__(self) -> str:
        waits = ", ".join(f"P{p} {1e3 * mean:.1f}/{1e3 * p95:.1f} ms" for p, (mean, p95) in self.waits().items())
        return (f"{sum(self.ends.values())} jobs in {self.makespan:.3f} s: {self.throughput:.0f}/s, "
                f"batches of {self.batch_size:.2f}, utilisation {self.utilisation:.3f}, fairness {self.fairness:.3f}, "
                f"waited (mean/P95) {waits}; {dict(self.ends)}, {self.restarts} restarts, {self.requeues} requeues")


@dataclass(slots=True)
class _Seat:
    """A stepped job at a simulated worker; `left`: forwards that it still needs."""

    order: Dispatch
    left: int


class _Life:
    """One incarnation of a simulated worker. `owed`: seconds of forwards until a batch may go."""

    def __init__(self, device: Device, incarnation: int) -> None:
        self.device = device
        self.incarnation = incarnation
        self.held: deque[Dispatch] = deque()
        self.seats: dict[int, _Seat] = {}
        self.owed = 0.0
        self.recalled: set[int] = set()
        self.busy = False
        self.dead = False


class Simulation:
    """Plays clients, engine and workers. `latency`: seconds that a message takes between master and worker; `spacing`:
    the least seconds between two submissions (what the master itself needs for each)."""

    def __init__(self, scheduler: Scheduler, devices: Sequence[Device], *, seed: int = 0, latency: float = 0.0,
                 spacing: float = 0.0) -> None:
        self.scheduler = scheduler
        self.report = Report()
        self.now = 0.0
        self._random = Random(seed)
        self._latency = latency
        self._spacing = spacing
        self._door = 0.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._turn = 0
        self._submitted: dict[str, tuple[Ticket, float]] = {}
        self._dispatched: dict[str, float] = {}
        self._then: dict[str, Callable[[], None]] = {}
        self._poison: set[str] = set()
        self._jobs = 0
        self._lives: dict[str, _Life] = {}
        for device in devices:
            self._lives[device.name] = life = _Life(device, 1)
            self.report.busy[device.name] = 0
            self.at(0.0, lambda life=life: self._boot(life))  # type: ignore[misc]

    # --- clients ------------------------------------------------------------------------------------------------------

    def poisson(self, rate: float, jobs: int, mix: Mix | None = None) -> None:
        """`jobs` arrive at random, `rate` per second."""
        mix = mix or Mix()

        def arrive(left: int) -> None:
            self.submit(mix)
            if left > 1:
                self.at(self.now + self._random.expovariate(rate), lambda: arrive(left - 1))

        self.at(self._random.expovariate(rate), lambda: arrive(jobs))

    def closed_loop(self, clients: int, jobs: int, mix: Mix | None = None, think: float = 0.0) -> None:
        """`clients` that each send the next job `think` seconds after the last ended, `jobs` in all."""
        mix = mix or Mix()
        left = jobs

        def send() -> None:
            nonlocal left
            if left > 0:
                left -= 1
                self.submit(mix, then=lambda: self.at(self.now + think, send))

        for _ in range(clients):
            self.at(0.0, send)

    def submit(self, mix: Mix, then: Callable[[], None] | None = None) -> None:
        """One job of the mix, now. `then` is called when it has ended."""
        pick = self._random
        self._jobs += 1
        name = f"job-{self._jobs}"
        self._door = at = max(self.now, self._door + self._spacing)
        ticket = Ticket(
            name,
            pick.choice(mix.groups),
            mix.cost,
            pick.choice(mix.priorities),
            pick.choice(mix.tenants),
            None if mix.deadline is None else at + mix.deadline,
        )
        self._submitted[name] = ticket, at
        if then is not None:
            self._then[name] = then
        if mix.poison and pick.random() < mix.poison:
            self._poison.add(name)
        if mix.cancel and pick.random() < mix.cancel:
            self.at(at + mix.cancel_after, lambda: self._tell(Cancelled(name)))
        if at > self.now:
            self.at(at, lambda: self._tell(Submitted(ticket)))
        else:
            self._tell(Submitted(ticket))

    # --- the clock ----------------------------------------------------------------------------------------------------

    def at(self, when: float, call: Callable[[], None]) -> None:
        """Do something later."""
        self._turn += 1
        heappush(self._heap, (when, self._turn, call))

    def run(self, until: float = math.inf) -> Report:
        """Until nothing is left to happen, or the clock reaches `until`."""
        while True:
            deadline = self.scheduler.next_deadline()
            event = self._heap[0][0] if self._heap else math.inf
            moment = min(event, math.inf if deadline is None else deadline)
            if moment > until or moment == math.inf:
                break
            self.now = moment
            if event <= moment:
                heappop(self._heap)[2]()
            else:
                self._tell(Tick())
        self.report.makespan = self.now
        return self.report

    def _tell(self, event: Event) -> None:
        self.report.events += 1
        for command in self.scheduler.handle(event, self.now):
            self._perform(command)

    # --- the engine's part --------------------------------------------------------------------------------------------

    def _perform(self, command: Command) -> None:
        if isinstance(command, Dispatch):
            for ticket in command.tickets:
                self._dispatched[ticket.id] = self.now
            life = self._lives[command.worker]
            if life.incarnation == command.incarnation:
                self.at(self.now + self._latency, lambda: self._receive(life, command))
        elif isinstance(command, Finish):
            self._ended(command.job, str(command.state))
        elif isinstance(command, Revoke):
            seat = self._lives[command.worker].seats.get(command.batch)
            if seat is not None:
                seat.left = min(seat.left, 1)
        elif isinstance(command, Recall):
            self._lives[command.worker].recalled.add(command.batch)
        elif isinstance(command, Restart):
            self.report.restarts += 1
            self._die(self._lives[command.worker], "hung")
        elif isinstance(command, Requeue):
            self.report.requeues += 1

    def _ended(self, job: str, how: str) -> None:
        if job not in self._submitted:
            assert how == "succeeded", f"{job} ended twice"
            return  # its answer crossed a cancel
        ticket, since = self._submitted.pop(job)
        self.report.ends[how] += 1
        if how == "succeeded":
            self.report.served[ticket.tenant] += ticket.cost  # type: ignore[assignment]
            self.report.served_by_priority[ticket.priority] += ticket.cost  # type: ignore[assignment]
            self.report.waited[ticket.priority].append(self._dispatched[job] - since)
        self._dispatched.pop(job, None)
        self._poison.discard(job)
        if (then := self._then.pop(job, None)) is not None:
            then()

    # --- the workers' part --------------------------------------------------------------------------------------------

    def _boot(self, life: _Life) -> None:
        self._lives[life.device.name] = life
        self._tell(WorkerReady(life.device.name, life.incarnation))

    def _receive(self, life: _Life, batch: Dispatch) -> None:
        if life.dead:
            return
        if batch.tickets[0].group.stepped:
            life.seats[batch.batch] = _Seat(batch, max(1, round(batch.tickets[0].cost)))
        else:
            life.held.append(batch)
        self._next(life)

    def _next(self, life: _Life) -> None:
        if life.busy or life.dead or not (life.held or life.seats):
            return
        life.busy = True
        device = life.device
        if life.held and (life.owed <= 0 or not life.seats):
            batch = life.held[0]
            self.report.batches += 1
            self.report.items += len(batch.tickets)
            crowded = device.each * (1 + device.crowding * (len(batch.tickets) - 1))
            seconds = device.fixed + crowded * sum(ticket.cost for ticket in batch.tickets)
            if device.one_by_one:
                self._one(life, batch, 0, 0.0)
            elif len(batch.tickets) > device.memory:
                self.at(self.now + self._latency, lambda: self._answer_no_memory(life))
            else:
                self._compute(life, batch.tickets, seconds, lambda took: self._finish(life, took))
        else:
            seats = list(life.seats.values())
            self.report.forwards += 1
            self.report.rows += len(seats)
            tickets = [seat.order.tickets[0] for seat in seats]
            seconds = device.forward + device.row * len(seats)
            self._compute(life, tickets, seconds, lambda took: self._step(life, seats, took))

    def _compute(
        self, life: _Life, tickets: Sequence[Ticket], seconds: float, then: Callable[[float], None]
    ) -> None:
        """A batch or a forward, on a device that may hang or die of it. `then` is told how long it took."""
        device, chance = life.device, self._random
        seconds *= device.slowness * (1.0 + device.jitter * chance.uniform(-1, 1))
        if device.hang and chance.random() < device.hang:
            pass  # only a Restart helps
        elif any(ticket.id in self._poison for ticket in tickets) or (device.crash and chance.random() < device.crash):
            self.at(self.now + seconds / 2, lambda: self._die(life, "crashed"))
        else:
            self.at(self.now + seconds, lambda: then(seconds))

    def _one(self, life: _Life, batch: Dispatch, number: int, before: float) -> None:
        """The next job of a batch whose jobs run one by one, if there is one and the batch was not recalled."""
        if life.dead:
            return
        if number == len(batch.tickets) or batch.batch in life.recalled:
            self._finish(life, before, number)
            return
        ticket, device = batch.tickets[number], life.device
        seconds = device.each * ticket.cost + (0.0 if number else device.fixed)
        self._compute(life, [ticket], seconds, lambda took: self._one(life, batch, number + 1, before + took))

    def _step(self, life: _Life, seats: Sequence[_Seat], seconds: float) -> None:
        if life.dead:
            return
        life.busy = False
        life.owed -= seconds
        self.report.busy[life.device.name] += seconds  # type: ignore[assignment]
        self._tell(Stepped(life.device.name, life.incarnation))
        for seat in seats:
            seat.left -= 1
            if seat.left <= 0:
                del life.seats[seat.order.batch]
                self.report.done[life.device.name] += 1
                self.at(self.now + self._latency, lambda seat=seat: self._answer(life, seat.order, 0.0))  # type: ignore[misc]
        self._next(life)

    def _finish(self, life: _Life, seconds: float, begun: int | None = None) -> None:
        """The batch is through, or its first `begun` jobs are and the others go back."""
        if life.dead:
            return
        batch = life.held.popleft()
        done = batch.tickets[:begun]
        life.busy, life.owed = False, seconds
        self.report.busy[life.device.name] += seconds  # type: ignore[assignment]
        self.report.done[life.device.name] += len(done)
        self._next(life)
        self.at(self.now + self._latency, lambda: self._answer(life, batch, seconds, begun))

    def _answer(self, life: _Life, batch: Dispatch, seconds: float, begun: int | None = None) -> None:
        name, incarnation = life.device.name, life.incarnation
        done, left = batch.tickets[:begun], batch.tickets[len(batch.tickets) if begun is None else begun :]
        for ticket in done:
            self._tell(ItemEnded(name, incarnation, batch.batch, ticket.id))
        self._tell(BatchEnded(name, incarnation, batch.batch, seconds, tuple(ticket.id for ticket in left)))
        if not life.dead:
            for ticket in done:
                self._ended(ticket.id, "succeeded")

    def _answer_no_memory(self, life: _Life) -> None:
        if not life.dead:
            batch = life.held.popleft()
            life.busy = False
            self._next(life)
            self._tell(BatchOutOfMemory(life.device.name, life.incarnation, batch.batch))

    def _die(self, life: _Life, cause: str) -> None:
        if life.dead:
            return
        life.dead = True
        new = _Life(life.device, life.incarnation + 1)
        self._tell(WorkerLost(life.device.name, life.incarnation, cause))
        self.at(self.now + life.device.boot, lambda: self._boot(new))

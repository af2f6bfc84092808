"""Whatever happens in whatever order: every ticket ends exactly once, and every invariant holds after every step."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scheduler_kit import LARGE, SMALL, STEPPED

from core.errors import ErrorInfo
from core.request import Priority
from core.ticket import Ticket
from scheduler.commands import Command, Dispatch, Finish, Requeue, Restart, Revoke
from scheduler.config import SchedulerConfig
from scheduler.events import (
    Alive,
    BatchEnded,
    BatchOutOfMemory,
    Cancelled,
    Drain,
    Event,
    ItemEnded,
    Loading,
    LoadReport,
    Parked,
    Stepped,
    Stuck,
    Submitted,
    Tick,
    WorkerDraining,
    WorkerLost,
    WorkerReady,
)
from scheduler.scheduler import Scheduler
from scheduler.views import waiting_by_priority

WORKERS = ["a", "b", "c"]
SEATS, URGENT_SEATS = 2, 1
GROUPS = [SMALL, LARGE, replace(SMALL, model="other", limit=3), STEPPED, replace(STEPPED, width=1024)]
workers = st.sampled_from(WORKERS)
fractions = st.floats(0, 1, exclude_max=True)


class SchedulerMachine(RuleBasedStateMachine):
    """The model: which tickets live, what each incarnation holds, which jobs wait by what the commands said."""

    @initialize(delay=st.sampled_from([0.0, 0.05]), lead=st.sampled_from([0.0, 0.1, 1e9]))
    def start(self, delay: float, lead: float) -> None:
        self.scheduler = Scheduler(SchedulerConfig(
            max_queue_delay=delay, prefetch_lead=lead, hang_floor=1.0, seats=SEATS, urgent_seats=URGENT_SEATS,
            load_timeout=5.0,
        ))
        self.now = 0.0
        self.count = 0
        self.alive: dict[str, int] = {}
        self.born = dict.fromkeys(WORKERS, 0)
        self.held: dict[str, list[tuple[int, dict[str, Ticket]]]] = {worker: [] for worker in WORKERS}
        self.living: dict[str, Ticket] = {}
        self.in_flight: set[str] = set()
        self.restarted: set[tuple[str, int]] = set()
        self.past: list[Event] = []
        self.draining = False

    # --- the engine's part --------------------------------------------------------------------------------------------

    def tell(self, event: Event) -> None:
        for command in self.scheduler.handle(event, self.now):
            self.perform(command)

    def perform(self, command: Command) -> None:
        match command:
            case Dispatch(worker, incarnation, batch, tickets):
                assert self.alive.get(worker) == incarnation, "sent to the dead"
                assert not self.draining
                assert len({ticket.group for ticket in tickets}) == 1
                assert 0 < len(tickets) <= tickets[0].group.limit
                for ticket in tickets:
                    assert ticket.id in self.living and ticket.id not in self.in_flight, "handed out twice"
                    self.in_flight.add(ticket.id)
                self.held[worker].append((batch, {ticket.id: ticket for ticket in tickets}))
                stepped = sum(self.is_stepped(held) for held in self.held[worker])
                assert len(self.held[worker]) - stepped <= 2 and stepped <= SEATS + URGENT_SEATS
                assert stepped <= SEATS or not tickets[0].group.stepped or tickets[0].priority == Priority.URGENT
            case Finish(job, _, error):
                assert error.message
                del self.living[job]
                self.in_flight.discard(job)
            case Revoke(worker, incarnation, batch, job):
                assert self.alive[worker] == incarnation
                assert any(number == batch and job in jobs for number, jobs in self.held[worker])
            case Requeue(job, why):
                assert why and job in self.living
                self.in_flight.remove(job)
            case Restart(worker, incarnation, why):
                assert why and (worker, incarnation) not in self.restarted, "restarted twice"
                assert self.alive[worker] == incarnation
                self.restarted.add((worker, incarnation))

    @staticmethod
    def is_stepped(held: tuple[int, dict[str, Ticket]]) -> bool:
        return next(iter(held[1].values())).group.stepped

    # --- what happens -------------------------------------------------------------------------------------------------

    @rule(group=st.sampled_from(GROUPS), priority=st.sampled_from(Priority), tenant=st.sampled_from("xyz"),
          cost=st.sampled_from([0.1, 1.0, 5.0]), deadline=st.sampled_from([None, None, 0.3, 20.0]),
          timeout=st.sampled_from([0.5, 600.0]), front=st.booleans(), number=st.integers(1, 6))
    def submit(self, group, priority, tenant, cost, deadline, timeout, front, number):
        for _ in range(number):
            self.count += 1
            ticket = Ticket(f"job-{self.count}", group, cost, priority, tenant,
                            None if deadline is None else self.now + deadline, 0, timeout)
            self.living[ticket.id] = ticket
            self.tell(Submitted(ticket, front))

    @precondition(lambda self: self.count)
    @rule(which=fractions)
    def cancel(self, which):
        self.tell(Cancelled(f"job-{1 + int(which * self.count)}"))

    @rule(worker=workers)
    def ready(self, worker):
        if worker not in self.alive:
            self.born[worker] += 1
            self.alive[worker] = self.born[worker]
            self.tell(WorkerReady(worker, self.born[worker]))

    @rule(worker=workers, which=fractions, fails=st.booleans(), forget=st.sampled_from([False] * 9 + [True]),
          seconds=st.sampled_from([0.001, 0.1, 1.0]))
    def end_batch(self, worker, which, fails, forget, seconds):
        if not self.held[worker]:
            return
        batch, jobs = held = self.held[worker][int(which * len(self.held[worker]))]
        self.now += seconds
        incarnation = self.alive[worker]
        for job in list(jobs)[forget:]:
            event = ItemEnded(worker, incarnation, batch, job, ErrorInfo("model_failed", "no") if fails else None)
            if job in self.living and job in self.in_flight:
                del self.living[job]
                self.in_flight.remove(job)
            self.past.append(event)
            self.tell(event)
        self.held[worker].remove(held)
        self.past.append(BatchEnded(worker, incarnation, batch, seconds))
        self.tell(self.past[-1])

    @rule(worker=workers, which=fractions)
    def end_one_item(self, worker, which):
        if self.held[worker]:
            batch, jobs = self.held[worker][0]
            job = list(jobs)[int(which * len(jobs))]
            if job in self.living and job in self.in_flight:
                del self.living[job]
                self.in_flight.remove(job)
            self.tell(ItemEnded(worker, self.alive[worker], batch, job))

    @rule(worker=workers, seconds=st.sampled_from([0.01, 1.0]), stale=st.booleans())
    def step(self, worker, seconds, stale):
        self.now += seconds
        self.tell(Stepped(worker, self.born[worker] - stale))

    @rule(worker=workers, which=fractions, parked=st.booleans(), stale=st.booleans())
    def park(self, worker, which, parked, stale):
        jobs = [job for _, held in self.held[worker] for job in held]
        if jobs:
            self.past.append(Parked(worker, self.born[worker] - stale, jobs[int(which * len(jobs))], parked))
            self.tell(self.past[-1])

    @rule(worker=workers, which=fractions, done=st.booleans(), stale=st.booleans())
    def load(self, worker, which, done, stale):
        if self.held[worker]:
            batch, _ = self.held[worker][int(which * len(self.held[worker]))]
            self.past.append(Loading(worker, self.born[worker] - stale, batch, done))
            self.tell(self.past[-1])

    @rule(worker=workers, which=fractions, patience=st.floats(0.0, 20.0), stale=st.booleans())
    def show_life(self, worker, which, patience, stale):
        if self.held[worker]:
            batch, _ = self.held[worker][int(which * len(self.held[worker]))]
            self.past.append(Alive(worker, self.born[worker] - stale, batch, patience))
            self.tell(self.past[-1])

    @rule(worker=workers, which=fractions, stale=st.booleans())
    def get_stuck(self, worker, which, stale):
        if self.held[worker]:
            batch, _ = self.held[worker][int(which * len(self.held[worker]))]
            self.past.append(Stuck(worker, self.born[worker] - stale, batch))
            self.tell(self.past[-1])

    @rule(worker=workers)
    def out_of_memory(self, worker):
        if self.held[worker]:
            batch, _ = self.held[worker].pop(0)
            self.past.append(BatchOutOfMemory(worker, self.alive[worker], batch))
            self.tell(self.past[-1])

    @rule(worker=workers, blame=st.sampled_from(["running", "memory", "outside", "none"]))
    def lose(self, worker, blame):
        if worker in self.alive:
            self.held[worker].clear()
            self.past.append(WorkerLost(worker, self.alive.pop(worker), "killed", blame))
            self.tell(self.past[-1])

    @rule(worker=workers)
    def drain_worker(self, worker):
        if worker in self.alive:
            self.tell(WorkerDraining(worker, self.alive[worker]))

    @rule(worker=workers, utilisation=st.sampled_from([None, 0.0, 1.0]), free=st.sampled_from([None, 0, 100]))
    def report(self, worker, utilisation, free):
        self.tell(LoadReport(worker, utilisation, free, 100 if free is not None else None))

    @precondition(lambda self: self.past)
    @rule(which=fractions)
    def hear_an_old_message_again(self, which):
        self.tell(self.past[int(which * len(self.past))])

    @rule(seconds=st.sampled_from([0.0, 0.01, 1.0, 30.0]))
    def time_passes(self, seconds):
        self.now += seconds
        self.tell(Tick())

    @rule()
    def sleep_until_woken(self):
        deadline = self.scheduler.next_deadline()
        if deadline is not None:
            self.now = deadline
            self.tell(Tick())

    @precondition(lambda self: self.count > 30)
    @rule()
    def drain(self):
        self.draining = True
        self.tell(Drain())

    # --- what must hold -----------------------------------------------------------------------------------------------

    @invariant()
    def agrees_with_the_model(self):
        self.scheduler.check()
        assert set(self.scheduler.jobs) == set(self.living)
        assert {name for name, job in self.scheduler.jobs.items() if job.batch} == self.in_flight & set(self.living)
        assert sum(waiting_by_priority(self.scheduler).values()) == len(self.living) - len(self.in_flight)
        for name in self.living:
            position = self.scheduler.position(name)
            assert (position is None) == (name in self.in_flight)
            assert position is None or 1 <= position <= len(self.living) + 1

    def teardown(self):
        """Healthy workers from now on: everything that is left ends."""
        if not hasattr(self, "scheduler") or self.draining:
            return
        for worker in WORKERS:
            if worker in self.alive:
                self.lose(worker, "none")
            self.ready(worker)
        for _ in range(10 * self.count + 10):
            busy = [worker for worker in WORKERS if self.held[worker]]
            if busy:
                self.end_batch(busy[0], 0.0, False, False, 0.01)
            elif self.living:
                self.sleep_until_woken()
            else:
                break
        assert not self.living, [self.scheduler.story(job) for job in self.living]
        self.scheduler.check()
        assert not self.scheduler.backlog.count and not self.scheduler.jobs


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),
)

"""A scheduler, a fake clock and obedient workers: what scheduler tests are written with. Every step is checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from core.ticket import Group, Ticket
from scheduler.commands import Command, Dispatch, Finish
from scheduler.config import SchedulerConfig
from scheduler.events import (
    Alive,
    BatchEnded,
    BatchOutOfMemory,
    Cancelled,
    Event,
    ItemEnded,
    Loading,
    Parked,
    Stepped,
    Stuck,
    Submitted,
    Tick,
    WorkerLost,
    WorkerReady,
)
from scheduler.scheduler import Scheduler

SMALL = Group("paint", "1", 512, 512, limit=8)
LARGE = Group("paint", "1", 1024, 1024, limit=2)
STEPPED = Group("draw", "1", 512, 512, stepped=True)


class Play:
    """`now` moves only when told. `held`: the batches of each worker, running first; `seated`: its stepped jobs, by id;
    `ended`: how each job ended, by ItemEnded ("done") or Finish (its code), exactly once."""

    def __init__(self, *workers: str, **config: Any) -> None:
        self.scheduler = Scheduler(SchedulerConfig(**config))
        self.now = 100.0
        self.held: dict[str, list[Dispatch]] = {}
        self.seated: dict[str, dict[str, Dispatch]] = {}
        self.incarnation: dict[str, int] = {}
        self.ended: dict[str, str] = {}
        self.finishes: dict[str, Finish] = {}
        self.sent: list[Dispatch] = []
        self.log: list[Command] = []
        for worker in workers:
            self.ready(worker)

    def tell(self, event: Event, after: float = 0.0) -> list[Command]:
        self.now += after
        commands = self.scheduler.handle(event, self.now)
        for command in commands:
            if isinstance(command, Dispatch):
                assert command.incarnation == self.incarnation[command.worker]
                assert len({ticket.group for ticket in command.tickets}) == 1, "a batch mixes groups"
                if command.tickets[0].group.stepped:
                    self.seated[command.worker][command.tickets[0].id] = command
                else:
                    self.held[command.worker].append(command)
                self.sent.append(command)
            elif isinstance(command, Finish):
                self._end(command.job, command.error.code)
                self.finishes[command.job] = command
        self.log += commands
        self.scheduler.check()
        return commands

    def _end(self, job: str, how: str) -> None:
        assert job not in self.ended, f"{job} ended twice: {self.ended[job]}, {how}"
        self.ended[job] = how

    # --- what happens -------------------------------------------------------------------------------------------------

    def ready(self, worker: str) -> list[Command]:
        self.incarnation[worker] = self.incarnation.get(worker, 0) + 1
        self.held[worker], self.seated[worker] = [], {}
        return self.tell(WorkerReady(worker, self.incarnation[worker]))

    def submit(
        self, *names: str, group: Group = SMALL, after: float = 0.0, front: bool = False, **more: Any
    ) -> list[Command]:
        commands: list[Command] = []
        for name in names:
            commands += self.tell(Submitted(Ticket(name, group, **more), front), after)
        return commands

    def cancel(self, job: str) -> list[Command]:
        return self.tell(Cancelled(job))

    def tick(self, after: float = 0.0) -> list[Command]:
        return self.tell(Tick(), after)

    def wake(self) -> list[Command]:
        """Sleep until the scheduler wants to be woken."""
        deadline = self.scheduler.next_deadline()
        assert deadline is not None and deadline > self.now
        self.now = deadline
        return self.tick()

    def finish(self, worker: str, seconds: float = 1.0, after: float | None = None) -> list[Command]:
        """The worker's running batch ends well, `seconds` later by default."""
        batch = self.held[worker].pop(0)
        self.now += seconds if after is None else after
        for ticket in batch.tickets:
            if ticket.id not in self.ended:
                self._end(ticket.id, "done")
            self.tell(ItemEnded(worker, batch.incarnation, batch.batch, ticket.id))
        return self.tell(BatchEnded(worker, batch.incarnation, batch.batch, seconds))

    def step(self, worker: str, after: float = 0.0) -> list[Command]:
        """The worker's seated jobs make a step."""
        return self.tell(Stepped(worker, self.incarnation[worker]), after)

    def park(self, worker: str, job: str, parked: bool = True, after: float = 0.0) -> list[Command]:
        return self.tell(Parked(worker, self.incarnation[worker], job, parked), after)

    def load(self, worker: str, job: str, done: bool = False, after: float = 0.0) -> list[Command]:
        """The worker begins to load the model of a job that it holds, or is through with it."""
        return self.tell(Loading(worker, self.incarnation[worker], self._batch(job), done), after)

    def live(self, worker: str, job: str, patience: float = 0.0, after: float = 0.0) -> list[Command]:
        """The worker says that a job's batch goes on."""
        return self.tell(Alive(worker, self.incarnation[worker], self._batch(job), patience), after)

    def stick(self, worker: str, job: str, after: float = 0.0) -> list[Command]:
        """The image of a job keeps a thread of the worker."""
        return self.tell(Stuck(worker, self.incarnation[worker], self._batch(job)), after)

    def _batch(self, job: str) -> int:
        batch = self.scheduler.jobs[job].batch
        assert batch is not None
        return batch.number

    def stand_up(self, worker: str, job: str, after: float = 0.0) -> list[Command]:
        """A seated job has ended well."""
        batch = self.seated[worker].pop(job)
        self.now += after
        if job not in self.ended:
            self._end(job, "done")
        self.tell(ItemEnded(worker, batch.incarnation, batch.batch, job))
        return self.tell(BatchEnded(worker, batch.incarnation, batch.batch, 0.1))

    def out_of_memory(self, worker: str, message: str = "") -> list[Command]:
        batch = self.held[worker].pop(0)
        return self.tell(BatchOutOfMemory(worker, batch.incarnation, batch.batch, message))

    def die(self, worker: str, blame: Any = "running") -> list[Command]:
        self.held[worker], self.seated[worker] = [], {}
        return self.tell(WorkerLost(worker, self.incarnation[worker], "killed by signal 9", blame))

    def finish_all(self) -> None:
        """Until nothing runs and nothing waits that could run."""
        while any(self.held.values()) or self.scheduler.holding:
            busy = [worker for worker, batches in self.held.items() if batches]
            if busy:
                self.finish(busy[0])
            else:
                self.wake()

    # --- what is asked ------------------------------------------------------------------------------------------------

    def running(self, worker: str) -> list[str]:
        return [ticket.id for ticket in self.held[worker][0].tickets] if self.held[worker] else []

    def following(self, worker: str) -> list[str]:
        return [ticket.id for ticket in self.held[worker][1].tickets] if len(self.held[worker]) > 1 else []

    def order(self) -> list[str]:
        """All jobs in the order in which they were handed out."""
        return [ticket.id for batch in self.sent for ticket in batch.tickets]

    def warm(self, worker: str, group: Group = SMALL, fixed: float = 0.5, each: float = 0.1) -> None:
        """Let the scheduler measure an idle worker: its batches take fixed + each x size seconds."""
        for size in (1, 4, 8):
            self.start(f"blocker-{worker}-{size}", group=group, after=1000.0)
            self.submit(*(f"warm-{worker}-{size}-{n}" for n in range(size)), group=group)
            while self.held[worker] or self.scheduler.holding:
                if self.held[worker]:
                    self.finish(worker, fixed + each * len(self.held[worker][0].tickets))
                else:
                    self.wake()

    def start(self, name: str, **more: Any) -> None:
        """Submit a job, and wait for others with it if the scheduler does, until it runs."""
        self.submit(name, **more)
        while name not in self.order():
            self.wake()


def of(commands: Iterable[Command], kind: type) -> list[Any]:
    """The commands of one kind."""
    return [command for command in commands if isinstance(command, kind)]


def shares(batches: Iterable[Dispatch], key: Any) -> Counter[Any]:
    """The cost handed out, by a key of the tickets."""
    got: Counter[Any] = Counter()
    for batch in batches:
        for ticket in batch.tickets:
            got[key(ticket)] += ticket.cost
    return got


def names(prefix: str, count: int) -> list[str]:
    """prefix0, prefix1, ..."""
    return [f"{prefix}{n}" for n in range(count)]

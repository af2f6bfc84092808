"""What an operator may change about the scheduler's decisions."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """All times are seconds.

    max_queue_delay: the longest a job is held back for a fuller batch while a device is idle (0: never held).
    longest_batch: no batch of several jobs is expected to take longer (0: 2 s while several groups wait, else 10 s).
    recall_from: of a batch that goes on for longer than this, the rest is recalled for a P0 job or for an idle worker.
    shares: how the priorities P0-P3 share the devices by cost when all of them wait.
    margin: an idle device more than this many times slower than the quickest idle one is passed over.
    prefetch_lead: how long before its running batch ends a worker may be given a full one to follow.
    hang_floor, hang_factor: a batch counts as hung when it has shown no sign of life for `hang_factor` times its
    expected time, but never before `hang_floor`, and always after its tickets' own timeout.
    quiet_floor: where it is known how long a group's batches show nothing, `hang_factor` times that is enough, but
    never less than this.
    load_timeout: how long a worker may take to load a model for a batch; the batch's own time counts from then on.
    seats: how many stepped jobs a worker runs at once. urgent_seats: how many more, for P0 alone.
    kept_stories: how many ended jobs `story` still knows.
    kept_groups: of how many groups the learned pace, arrivals and memory caps are kept.
    """

    max_queue_delay: float = 0.05
    longest_batch: float = 0.0
    recall_from: float = 0.5
    shares: tuple[float, float, float, float] = (5.0, 3.0, 1.0, 1.0)
    margin: float = 1.5
    prefetch_lead: float = 0.1
    hang_floor: float = 30.0
    hang_factor: float = 8.0
    quiet_floor: float = 10.0
    load_timeout: float = 600.0
    seats: int = 32
    urgent_seats: int = 4
    kept_stories: int = 1_000
    kept_groups: int = 4_096

    def __post_init__(self) -> None:
        if min(self.shares) <= 0:
            raise ValueError("every priority needs a share above 0, or it would starve")
        if self.seats < 1 or self.urgent_seats < 0:
            raise ValueError("a worker needs at least one seat")
        if self.margin < 1 or self.hang_factor < 1:
            raise ValueError("margin and hang_factor are multiples and must be at least 1")

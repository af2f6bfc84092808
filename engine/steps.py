"""What the workers tell of their steps, kept per device over all incarnations."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from workers.messages import StepReport

LATELY = 20  # reports; half a second apart while there is work


@dataclass(slots=True)
class DeviceSteps:
    """`forwards`, `rows` and `preemptions` grow for ever. `latest`: what the present incarnation has told last;
    `lately`: (forwards, rows) after each of the last reports."""

    forwards: int = 0
    rows: int = 0
    preemptions: int = 0
    latest: StepReport | None = None
    lately: deque[tuple[int, int]] = field(default_factory=lambda: deque([(0, 0)], LATELY))


class StepBook:
    def __init__(self) -> None:
        self._devices: dict[str, DeviceSteps] = {}

    def heard(self, worker: str, report: StepReport) -> None:
        """Take in a report; the counts of an incarnation begin at 0."""
        device = self._devices.setdefault(worker, DeviceSteps())
        last = device.latest or StepReport(0, 0, 0, 0.0, 0, 0)
        device.forwards += report.forwards - last.forwards
        device.rows += report.rows - last.rows
        device.preemptions += report.preemptions - last.preemptions
        device.lately.append((device.forwards, device.rows))
        device.latest = report

    def lost(self, worker: str) -> None:
        """Its incarnation is gone."""
        if worker in self._devices:
            self._devices[worker].latest = None

    def told(self, worker: str) -> dict[str, Any]:
        """A device's part of the status. `rows_per_forward` is that of the last seconds of work, None before any."""
        device = self._devices.get(worker) or DeviceSteps()
        latest = device.latest or StepReport(0, 0, 0, 0.0, 0, 0)
        busy = latest.running + latest.parked > 0
        forwards, rows = (last - first for first, last in zip(device.lately[0], device.lately[-1], strict=True))
        return {
            "forwards": device.forwards,
            "rows": device.rows,
            "rows_per_forward": round(rows / forwards, 3) if forwards else None,
            "steps_per_second": round(latest.steps_per_second, 3) if busy else 0.0,
            "preemptions": device.preemptions,
            "running": latest.running,
            "parked": latest.parked,
        }

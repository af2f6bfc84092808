"""Which networks are on the device, when not all of them fit: a pure policy.

The least recently used one leaves first. One that has just come in stays for some forwards or seconds, even if it is
the least recently used: else models that are asked by turns would do nothing but travel. It leaves all the same where
nothing else can make room; whoever orders the work can avoid that by asking `welcome` first.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

SETTLE_SECONDS = 2.0
SETTLE_FORWARDS = 8


@dataclass(eq=False, slots=True)
class _Unit:
    size: int
    used: int = 0  # the tick of its last forward
    came: float | None = None  # since when it is on the device, in seconds; None: it is not
    forwards: int = 0  # since it came


class Residency:
    """Bytes of networks against a budget. `moves` counts how often one was brought in."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.moves = 0
        self._units: dict[Hashable, _Unit] = {}
        self._tick = 0

    @property
    def crowded(self) -> bool:
        """Whether not everything that is known fits at once, so that what comes in will have to leave again."""
        return sum(unit.size for unit in self._units.values()) > self.budget

    @property
    def used(self) -> int:
        """Bytes on the device."""
        return sum(unit.size for unit in self._units.values() if unit.came is not None)

    def __contains__(self, name: Hashable) -> bool:
        """Whether it is on the device."""
        unit = self._units.get(name)
        return unit is not None and unit.came is not None

    def enter(self, name: Hashable, size: int) -> None:
        """Tell of a network, or of its new size in bytes. Raises ValueError if it never fits."""
        if size > self.budget:
            raise ValueError(f"{size} bytes do not fit {self.budget}")
        unit = self._units.setdefault(name, _Unit(size))
        unit.size = size

    def left(self, name: Hashable) -> None:
        """It is not on the device after all."""
        self._units[name].came = None

    def forget(self, name: Hashable) -> None:
        """It is gone for good."""
        self._units.pop(name, None)

    def use(self, name: Hashable, now: float) -> list[Hashable]:
        """It is about to run: those that have to leave first, in this order. From now on it counts as being there."""
        unit = self._units[name]
        self._tick += 1
        unit.used = self._tick
        unit.forwards += 1
        leaving: list[Hashable] = []
        if unit.came is None:
            leaving = self._victims(self.used + unit.size - self.budget, now)
            unit.came, unit.forwards = now, 1
            self.moves += 1
        elif self.used > self.budget:  # something has grown
            leaving = self._victims(self.used - self.budget, now, but=name)
        for victim in leaving:
            self._units[victim].came = None
        return leaving

    def welcome(self, name: Hashable, now: float) -> bool:
        """Whether it can run now without driving out one that has just come."""
        unit = self._units[name]
        if unit.came is not None:
            return True
        victims = self._victims(self.used + unit.size - self.budget, now)
        return all(self._settled(self._units[victim], now) for victim in victims)

    def _victims(self, excess: int, now: float, but: Hashable = None) -> list[Hashable]:
        """Who makes room for so many bytes: those who have settled before those who have just come, and of either the
        least recently used first."""
        present = [(name, unit) for name, unit in self._units.items() if unit.came is not None and name != but]
        present.sort(key=lambda entry: (not self._settled(entry[1], now), entry[1].used))
        victims = []
        for name, unit in present:
            if excess <= 0:
                break
            victims.append(name)
            excess -= unit.size
        return victims

    def _settled(self, unit: _Unit, now: float) -> bool:
        assert unit.came is not None
        return unit.forwards >= SETTLE_FORWARDS or now - unit.came >= SETTLE_SECONDS

"""Memory for forwards on CPUs, where one too many wakes the kernel's killer instead of raising an error.

What a forward takes is estimated before it runs, from what earlier ones took. All workers of this installation share
the machine: small forwards run side by side, a large one runs alone, and each waits until what it takes is free. What
can never fit raises MemoryError, as a GPU would.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

from models.checkpoint import next_part

FIRST = 128  # bytes for each input element, until measured: LaMa's
SMALL = 256 << 20  # bytes that are always there
MEASURED = 1 << 22  # elements from which on a forward says something about others
MOST = 0.9  # of the memory
LOOK_EVERY = 0.02  # seconds
PATIENCE = 60.0  # seconds for which a forward waits until others give back memory
HERE = Path(__file__)  # locked by large forwards; its folder, by whoever is next
FILES = {  # of a cgroup, versions 2 and 1: its limit, what it uses, and what of that is a cache
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


class Memory(NamedTuple):
    """Bytes: all that this process and its neighbours may have, and what of that is free."""

    limit: int
    free: int


def memory(root: Path = Path("/")) -> Memory:
    """The machine's, cut by the cgroups that this process is in."""
    machine = psutil.virtual_memory()
    limit, free = machine.total, machine.available
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, kind, place = line.split(":", 2)
        if kind not in FILES:
            continue
        mount = root / "sys/fs/cgroup" / kind
        within = mount / place.strip("/")
        for folder in (within, *within.parents):
            with contextlib.suppress(OSError, ValueError, StopIteration):
                most, used = _cgroup(folder, *FILES[kind])
                limit, free = min(limit, most), min(free, most - used)
            if folder == mount:
                break
    return Memory(limit, max(0, free))


def _cgroup(folder: Path, most: str, used: str, cache: str) -> tuple[int, int]:
    """The limit of one cgroup, and what is used of it. Raises ValueError where there is none."""
    limit = int((folder / most).read_text())
    told = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return limit, int((folder / used).read_text()) - next(int(value) for name, value in told if name == cache)


class Forwards:
    """What forwards of one adapter take, and their turns. `look` says what memory there is."""

    def __init__(self, look: Callable[[], Memory] = memory) -> None:
        self._look = look
        self._each = float(FIRST)
        self._largest = 0

    def needs(self, elements: int) -> int:
        """Bytes that a forward of so many input elements takes, beside what its process has already."""
        return int(elements * self._each)

    @contextlib.contextmanager
    def turn(self, elements: int) -> Iterator[None]:
        """The block in which a forward runs. Waits for its memory; raises MemoryError where it never comes, and what
        checkpoints raise."""
        need = self.needs(elements)
        if need <= SMALL:
            yield
            return
        limit = self._look().limit
        if need > MOST * limit:
            raise MemoryError(f"{need >> 20:,} MiB do not fit {limit >> 20:,} MiB")
        alone = need > limit / (2 * (os.cpu_count() or 1))  # as many as there are cores fit half of the memory
        with contextlib.ExitStack() as held:
            with _locked(HERE.parent, fcntl.LOCK_EX):  # kept while waiting, so that small ones do not overtake for ever
                held.enter_context(_locked(HERE, fcntl.LOCK_EX if alone else fcntl.LOCK_SH))
                self._wait_for(need)
            before = _reset_peak()
            yield
            self._learn(elements, _status("VmHWM") - before if before else 0)

    def _wait_for(self, need: int) -> None:
        until = time.monotonic() + PATIENCE
        while need > (free := self._look().free):
            if time.monotonic() > until:
                raise MemoryError(f"{need >> 20:,} MiB do not fit the {free >> 20:,} MiB that others leave")
            _pause()

    def _learn(self, elements: int, taken: int) -> None:
        """The largest forwards say most: small ones have their fixed part, and are lost among what else is taken."""
        if taken > 0 and elements >= max(MEASURED, self._largest):
            self._each, self._largest = taken / elements, elements


@contextlib.contextmanager
def _locked(path: Path, kind: int) -> Iterator[None]:
    """Holds a lock, which the kernel takes back when this process dies."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, kind | fcntl.LOCK_NB)
                break
            _pause()
        yield
    finally:
        os.close(file)


def _pause() -> None:
    next_part()
    time.sleep(LOOK_EVERY)


def _reset_peak() -> int:
    """What this process has now, from which on its peak counts anew; 0 where the kernel does not let it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return 0


def _status(name: str) -> int:
    """Bytes, of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))

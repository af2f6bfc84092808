"""Forwards on CPUs take turns by memory: nothing overlaps that does not fit, nothing runs that never fits."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch

from core.errors import OutOfMemory
from models import room
from models.base import Item, Output
from models.calls import Call, CallAdapter
from models.checkpoint import Abandoned, wanted_for
from models.room import Forwards, Memory, memory

GIB = 1 << 30
PLENTY = Memory(1 << 50, 1 << 50)


@pytest.fixture(autouse=True)
def own_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No server of this machine is waited for, and what these forwards do not take is not learned."""
    (tmp_path / "lock").touch()
    monkeypatch.setattr(room, "HERE", tmp_path / "lock")
    monkeypatch.setattr(room, "LOOK_EVERY", 0.001)
    monkeypatch.setattr(room, "MEASURED", 1 << 60)
    monkeypatch.setattr(room.os, "cpu_count", lambda: 2)


def elements(size: int) -> int:
    return size // room.FIRST


def test_what_never_fits_is_refused_and_what_fits_later_waits() -> None:
    with pytest.raises(MemoryError, match="23,552 MiB do not fit 24,576 MiB"), Forwards(
        lambda: Memory(24 * GIB, 24 * GIB)
    ).turn(elements(23 * GIB)):
        pytest.fail("it ran")
    free: Iterator[int] = iter([0, 1, 2, 3, 4, 5])
    with Forwards(lambda: Memory(24 * GIB, next(free) * GIB)).turn(elements(4 * GIB)):
        assert next(free) == 5, "it waited for four"


def test_it_does_not_wait_for_ever_for_memory_that_others_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "PATIENCE", 0.01)
    with pytest.raises(MemoryError, match="others leave"), Forwards(
        lambda: Memory(24 * GIB, GIB)
    ).turn(elements(4 * GIB)):
        pytest.fail("it ran")


def test_a_large_forward_runs_alone_and_small_ones_side_by_side() -> None:
    one, other = (Forwards(lambda: Memory(24 * GIB, 24 * GIB)) for _ in range(2))
    with ExitStack() as held:
        for forwards in (one, other):
            held.enter_context(forwards.turn(elements(GIB)))
    running, most = 0, 0

    def large(forwards: Forwards) -> None:
        nonlocal running, most
        for _ in range(5):
            with forwards.turn(elements(13 * GIB)):
                running += 1
                most = max(most, running)
                time.sleep(0.002)
                running -= 1

    threads = [threading.Thread(target=large, args=(forwards,)) for forwards in (one, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_another_process_is_waited_for_until_it_ends_however_it_does() -> None:
    hold = "import fcntl, sys, time; file = open(sys.argv[1]); fcntl.flock(file, 2); print(flush=True); time.sleep(99)"
    other = subprocess.Popen((sys.executable, "-c", hold, str(room.HERE)), stdout=subprocess.PIPE)
    assert other.stdout is not None and other.stdout.readline()
    end = threading.Timer(0.1, other.kill)
    end.start()
    with Forwards(lambda: Memory(24 * GIB, 24 * GIB)).turn(elements(GIB)):
        assert other.wait(30) == -signal.SIGKILL
    other.stdout.close()


def test_who_waits_leaves_when_nobody_wants_it_and_lets_the_next_one_through() -> None:
    large = elements(13 * GIB)
    look = lambda: Memory(24 * GIB, 24 * GIB)  # noqa: E731
    gone = wanted_for([Item({}, cancelled=lambda: True)])
    with Forwards(look).turn(large), gone, pytest.raises(Abandoned), Forwards(look).turn(large):
        pytest.fail("it ran")
    with Forwards(look).turn(large):
        pass


def test_what_a_large_forward_took_is_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MEASURED", 1 << 22)
    forwards = Forwards(lambda: PLENTY)
    assert forwards.needs(1000) == 1000 * room.FIRST
    for size in (room.MEASURED, 2 * room.MEASURED):
        with forwards.turn(size):
            np.ones(50 * size, np.uint8)
        assert 45 * 1000 < forwards.needs(1000) < 70 * 1000
    with forwards.turn(room.MEASURED):  # a smaller one says less
        np.ones(150 * room.MEASURED, np.uint8)
    assert forwards.needs(1000) < 70 * 1000


@pytest.mark.parametrize(("line", "files"), [
    ("0::/pool/x", {"pool/memory.max": "1000", "pool/memory.current": "700", "pool/memory.stat": "inactive_file 200",
                    "pool/x/memory.max": "max", "pool/x/memory.current": "1", "pool/x/memory.stat": "inactive_file 0"}),
    ("4:memory:/far/away", {"memory/memory.limit_in_bytes": "1000", "memory/memory.usage_in_bytes": "700",
                            "memory/memory.stat": "total_inactive_file 200"}),
])  # fmt: skip
def test_a_container_s_memory_counts(tmp_path: Path, line: str, files: dict[str, str]) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"5:cpuset:/\n{line}\n")
    for name, text in files.items():
        file = tmp_path / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    assert memory(tmp_path) == Memory(1000, 500)


def test_the_machine_s_memory_counts_where_there_is_no_cgroup(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("")
    found = memory(tmp_path)
    assert 0 < found.free <= found.limit and memory().limit <= found.limit


class Sums(CallAdapter):
    def start(self, item):
        answer = yield Call("net", (torch.zeros(1, item.params["elements"], dtype=torch.uint8),))
        return Output(facts={"rows": len(answer)})

    def forward(self, network, rows):
        self.forwards = [*getattr(self, "forwards", []), len(rows)]
        return rows


def test_rows_that_do_not_fit_together_run_apart_and_one_that_never_fits_fails_alone() -> None:
    model = Sums({}, torch.device("cpu"))
    model._room = Forwards(lambda: Memory(3 * room.SMALL, 3 * room.SMALL))
    good = [Item({"elements": elements(2 * room.SMALL)}) for _ in range(2)]
    first, second, never = model.run([*good, Item({"elements": elements(4 * room.SMALL)})])
    assert isinstance(first, Output) and isinstance(second, Output) and model.forwards == [1, 1]
    assert isinstance(never, OutOfMemory)

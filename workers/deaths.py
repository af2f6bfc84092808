"""Why a process ended, as far as it can be told from outside: by itself, for its memory, or by somebody else."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path
from typing import Literal

import psutil


def oom_kills() -> int | None:
    """How many processes of this cgroup (where there is none: of this host) the kernel has ended for their memory.
    None where that cannot be read."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        group = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
        events = Path("/sys/fs/cgroup", group[3:].lstrip("/"), "memory.events")
        if events.exists():
            return _count(events)
    with contextlib.suppress(OSError, ValueError, StopIteration):
        return _count(Path("/proc/vmstat"))
    return None


def _count(file: Path) -> int | None:
    counts = (line.split() for line in file.read_text().splitlines())
    return next((int(count) for name, count in counts if name == "oom_kill"), None)


def blamed_on(
    code: int | None, *, frozen: bool, before: int | None, after: int | None
) -> Literal["killed", "memory", "died"]:
    """`killed` by somebody else, or ended by us because somebody had stopped it (`frozen`); `memory` when the kernel
    may have done it; else `died`. `before`, `after`: `oom_kills` when the last process ended, and now."""
    if frozen or code == -signal.SIGTERM:
        return "killed"
    if code != -signal.SIGKILL:
        return "died"
    return "killed" if before is not None and before == after else "memory"


def is_stopped(pid: int | None) -> bool:
    """Somebody has sent it SIGSTOP. A debugger's halt does not count."""
    try:
        return pid is not None and psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.Error:
        return False

"""Whether memory grows: resident bytes of master and workers over many requests, and shared memory left at the end.

    python -m bench.memory [--requests 100000] [--quick]

Small images through two models in turn: `echo` (bytes) and `stub` (decode, compute, encode), without pauses. The slope
is that of a line through the second half. Writes bench/results/memory.json and memory.png.
"""

from __future__ import annotations

import io
import time
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import uvloop
from PIL import Image
from rich.progress import Progress

from bench.common import machine_facts, photograph, write_result
from bench.load import Run
from bench.runs import goal, parser, plot, print_tables, save, table
from bench.servers import Server, ours

CONNECTIONS = 32
PATHS = ("/run/echo?base_ms=0&per_item_ms=0", "/run/stub")
FLAT = 20.0  # bytes a request: below the noise of an allocator


@dataclass(slots=True)
class Course:
    """Samples over time: requests answered so far, and MiB resident of the master and of each worker."""

    requests: list[int] = field(default_factory=list)
    master: list[float] = field(default_factory=list)
    workers: list[list[float]] = field(default_factory=list)

    def slope(self, values: list[float]) -> float:
        """Bytes for each further request, over the second half."""
        half = len(values) // 2
        return float(np.polyfit(self.requests[half:], values[half:], 1)[0] * (1 << 20))


def sample(server: Server, course: Course, requests: int) -> None:
    course.requests.append(requests)
    course.master.append(psutil.Process(server.process.pid).memory_info().rss / (1 << 20))
    course.workers.append([worker.memory_info().rss / (1 << 20) for worker in server.workers()])


def drive(server: Server, course: Course, body: bytes, requests: int, progress: Progress) -> int:
    """Loads of two seconds, each on connections of its own, with a sample after each. How many requests failed."""
    task = progress.add_task("requests", total=requests)
    base = server.url.removesuffix(server.path)
    done = errors = 0
    for path in cycle(PATHS):
        result = uvloop.run(Run(base + path, body, "image/png", []).go(CONNECTIONS, 0.0, 2.0))
        done, errors = done + result.requests, errors + result.errors
        progress.update(task, completed=min(done, requests))
        sample(server, course, done)
        if done >= requests:
            break
    return errors


def shared(server: Server) -> float:
    """MiB of shared memory that the master has touched and not given back to the system."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return next((int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("RssShmem")), 0.0)


def named() -> set[str]:
    """Files of shared memory that have a name, and so could be left behind."""
    folder = Path("/dev/shm")
    return {file.name for file in folder.iterdir()} if folder.is_dir() else set()


def draw(course: Course) -> None:
    figure, axis = plot().subplots(figsize=(7, 3.2), layout="constrained")
    axis.plot(course.requests, course.master, color="#d1495b", label="master")
    for number in range(len(course.workers[0])):
        axis.plot(course.requests, [one[number] for one in course.workers], color="#30638e", label=f"worker {number}")
    axis.set_ylim(0, None)
    axis.set_xlabel("requests answered", fontsize=8)
    axis.set_ylabel("MiB resident", fontsize=8)
    axis.legend(fontsize=8)
    axis.set_title("Memory over many requests", fontsize=10, loc="left")
    save(figure, "memory")


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--requests", type=int, default=100_000)
    given = arguments.parse_args()
    requests = 10_000 if given.quick else given.requests
    facts, file, course = machine_facts(("uvicorn", "uvloop", "numpy", "torch")), io.BytesIO(), Course()
    Image.fromarray(photograph(128)).save(file, "PNG")
    before = named()
    with Progress(refresh_per_second=1) as progress, ours(offer="echo,stub") as server:
        errors = drive(server, course, file.getvalue(), requests, progress)
        time.sleep(3.0)
        warm = shared(server)
    remains = sorted(named() - before)
    slopes = {"master": course.slope(course.master)}
    for number in range(len(course.workers[0])):
        slopes[f"worker {number}"] = course.slope([one[number] for one in course.workers])
    steepest = max(slopes.values())
    goals: list[dict[str, Any]] = [
        goal("memory over requests, the steepest slope", "0 (± 20 bytes a request)", _one(steepest), steepest < FLAT,
             "{:.1f}", " B"),
        goal("shared memory left", "nothing", _one(len(remains)), not remains, "{:.0f}", " files"),
    ]  # fmt: skip
    shown = [table(f"Memory over {course.requests[-1]:,} requests", ["process", "at first", "at last", "slope"], [
        ["master", f"{course.master[0]:.0f} MiB", f"{course.master[-1]:.0f} MiB", f"{slopes['master']:.1f} B/request"],
        ["of it shared memory at rest", "", f"{warm:.0f} MiB", ""],
        *(
            [f"worker {number}", f"{course.workers[0][number]:.0f} MiB", f"{course.workers[-1][number]:.0f} MiB",
             f"{slopes[f'worker {number}']:.1f} B/request"]
            for number in range(len(course.workers[0]))
        ),
    ])]  # fmt: skip
    print_tables(shown, goals)
    write_result("memory", facts, {
        "about": "small images through the models echo and stub, without pauses", "requests": course.requests[-1],
        "errors": errors, "goals": goals, "tables": shown, "slopes": slopes, "shared_mib_at_rest": warm,
        "shared_files_left": remains, "course": {"requests": course.requests, "master": course.master,
                                                 "workers": course.workers},
    })  # fmt: skip
    draw(course)


def _one(value: float) -> dict[str, float]:
    return {"median": value, "min": value, "max": value}


if __name__ == "__main__":
    main()

"""Shows how workers load: one progress bar each on a terminal, nothing otherwise (the log has the milestones)."""

from __future__ import annotations

import asyncio
import sys

from workers.contract import WorkerPool

SETTLED = {"ready", "given_up", "stopped", "draining"}


async def show_startup(pool: WorkerPool) -> None:
    """Until every worker is ready or given up."""
    if not sys.stderr.isatty():
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.fields[worker]:>8}"), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bars = {view.worker: progress.add_task("", total=1.0, worker=view.worker) for view in pool.view()}
        while True:
            views = pool.view()
            for view in views:
                progress.update(bars[view.worker], completed=view.progress, description=view.detail)
            if all(view.state in SETTLED for view in views):
                return
            await asyncio.sleep(0.2)

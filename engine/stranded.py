"""When no device can serve any more: who waits is told so, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

from core.errors import NoDevice

if TYPE_CHECKING:
    from engine.engine import Engine


def no_device(engine: Engine) -> NoDevice | None:
    """Why nothing can run here; None while any device serves, or may come to."""
    views = [] if engine.up else engine.pool.view()
    if not views or any(view.state not in ("given_up", "stopped") for view in views):
        return None
    return NoDevice(
        f"no device can serve: every worker has been given up ({views[0].worker}: {views[0].detail or 'stopped'}); "
        "they are tried again every few minutes",
        retry_after=60.0,
    )


def send_away(engine: Engine) -> None:
    """A worker has gone. If nothing can run any more, ephemeral jobs end at once; durable ones wait."""
    if engine.draining or (fault := no_device(engine)) is None:
        return
    for live in list(engine.register.live.values()):
        if not live.job.request.durable:
            engine.send_away(live, fault)

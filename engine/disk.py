"""How the outputs folder is: whether new durable jobs find room there, and since when they do not.

`/run` needs no disk, so a full one does not make the server unready: it is told beside readiness, as a gauge and in the
log, when it begins and when it ends.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import structlog

from core.errors import StorageFailed, StorageFull
from engine.keeper import Keeper

if TYPE_CHECKING:
    from engine.engine import Engine

log = structlog.get_logger("engine")
LOOK_EVERY = 2.0  # seconds


@dataclass(frozen=True, slots=True)
class Storage:
    """`state`: new durable jobs are taken (ok), refused for want of room (full), or because it cannot be written
    (failed); `why` is a sentence then. `free`: bytes that are left on the disk, None where it does not say; `promised`:
    of these to results of accepted jobs. `waiting`: finished jobs that it does not take yet."""

    state: Literal["ok", "full", "failed"] = "ok"
    free: int | None = None
    why: str | None = None
    promised: int = 0
    waiting: int = 0


def look(keeper: Keeper) -> Storage:
    """How it is now. Touches the disk."""
    free, promised, waiting = None, int(keeper.promises.bytes), keeper.waiting
    try:
        if again := keeper.mend():
            log.error("SOMEBODY REMOVED FILES OF THE RUNNING SERVER from its outputs folder; they were made again",
                      what=again)
        free = keeper.files.free()
        if keeper.refused:
            keeper.files.try_write()
        keeper.check_room()
        keeper.files.room(promised)
        keeper.files.keep_reserve()
        keeper.refused = False
    except StorageFull as fault:
        return Storage("full", free, fault.message, promised, waiting)
    except StorageFailed as fault:
        return Storage("failed", free, fault.message, promised, waiting)
    return Storage("ok", free, None, promised, waiting)


async def watch(engine: Engine, keeper: Keeper) -> None:
    """Look now and then, and say in the log when it changes."""
    while True:
        now = await asyncio.to_thread(look, keeper)
        if now.state != engine.storage.state:
            if now.state == "ok":
                log.info("new durable jobs are taken again", free_bytes=now.free)
            else:
                log.error("new durable jobs are refused", why=now.why, free_bytes=now.free,
                          min_free_bytes=keeper.files.min_free)
        engine.storage = now
        await asyncio.sleep(LOOK_EVERY)

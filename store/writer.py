"""Group commit: one thread writes, and everything that waits while one commit reaches the disk shares the next."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, Literal

from core.errors import ImagePoolError, InternalError, StorageFailed
from store.codec import Row

MOST = 512  # writes of one transaction
log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Write:
    """One write that waits. `outcome` is its value or its own error, valid once the transaction has committed."""

    kind: Literal["insert", "save", "delete", "count"]
    rows: Sequence[Row]
    outcome: Any = None
    done: Future[Any] = field(default_factory=Future)


class GroupWriter:
    """Owns the writer thread. `transact(writes)` performs them in one transaction and sets their outcomes; when it
    raises, nothing of the group was written.

    `commits` counts the transactions that succeeded.
    """

    def __init__(self, transact: Callable[[Sequence[Write]], None]) -> None:
        self.commits = 0
        self._transact = transact
        self._waiting: SimpleQueue[Write | None] = SimpleQueue()
        self._closed = False
        self._door = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="job-store", daemon=True)
        self._thread.start()

    def submit(self, write: Write) -> Future[Any]:
        """Queue a write. The future resolves after the commit and cannot be cancelled: who stops waiting changes
        nothing about what was asked for."""
        write.done.set_running_or_notify_cancel()
        with self._door:
            if self._closed:
                raise StorageFailed("the job store is closed because the server is going away; try again later")
            self._waiting.put(write)
        return write.done

    def close(self) -> None:
        """Finish what waits, then end the thread. A second time changes nothing."""
        with self._door:
            if not self._closed:
                self._closed = True
                self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        while True:
            group, more = self._next_group()
            if group:
                self._commit(group)
            if not more:
                return

    def _next_group(self) -> tuple[list[Write], bool]:
        group: list[Write] = []
        try:
            while len(group) < MOST:
                write = self._waiting.get(block=not group)
                if write is None:
                    return group, False
                group.append(write)
        except Empty:
            pass
        return group, True

    def _commit(self, group: Sequence[Write]) -> None:
        try:
            self._transact(group)
        except Exception as fault:
            if len(group) > 1 and not isinstance(fault, StorageFailed):
                for write in group:  # one by one, so that a bad or a big write cannot fail its neighbours
                    self._commit([write])
                return
            error = fault if isinstance(fault, ImagePoolError) else self._defect(fault)
            for write in group:
                write.done.set_exception(error)
            return
        self.commits += 1
        for write in group:
            if isinstance(write.outcome, Exception):
                write.done.set_exception(write.outcome)
            else:
                write.done.set_result(write.outcome)

    def _defect(self, fault: Exception) -> InternalError:
        log.error("the job store could not perform a write", exc_info=fault)
        return InternalError("the job could not be stored; the server's log says why")

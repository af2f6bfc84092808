"""A page that costs time to make, for which many may ask at once and which anybody may ask for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

Made = TypeVar("Made")


class SharedPage(Generic[Made]):
    """`make` is called at most once in `lifetime` seconds; whoever asks meanwhile gets what it made, or is making. What
    fails is not kept."""

    def __init__(
        self, make: Callable[[], Coroutine[Any, Any, Made]], lifetime: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._make, self._lifetime, self._clock = make, lifetime, clock
        self._page: asyncio.Future[Made] | None = None
        self._until = 0.0

    async def __call__(self) -> Made:
        if self._page is None or self._is_over(self._page):
            self._until = self._clock() + self._lifetime
            self._page = asyncio.create_task(self._make())
        return await asyncio.shield(self._page)  # who goes away takes it from nobody

    def _is_over(self, page: asyncio.Future[Made]) -> bool:
        return page.done() and (page.cancelled() or page.exception() is not None or self._clock() >= self._until)

"""Server-sent events: waiting for the next one without falling silent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, TypeVar

import orjson

Event = TypeVar("Event")
KEEPALIVE = b":keepalive\n\n"


async def with_pauses(events: AsyncIterator[Event], seconds: float) -> AsyncGenerator[Event | None, None]:
    """The events as they come, and None whenever nothing came for so many seconds. The iterator is closed at the
    end."""
    coming: asyncio.Task[Any] | None = None
    try:
        while True:
            coming = coming or asyncio.ensure_future(_next(events))
            await asyncio.wait([coming], timeout=seconds)
            if not coming.done():
                yield None
                continue
            done, coming = coming, None
            try:
                event = done.result()
            except StopAsyncIteration:
                return
            yield event
    finally:
        if coming is not None:
            coming.cancel()
            await asyncio.wait([coming])
        await events.aclose()  # type: ignore[attr-defined]


async def _next(events: AsyncIterator[Event]) -> Event:
    return await anext(events)


def line(kind: str, data: Any, number: int | None = None) -> bytes:
    """One event as it is sent; `number` is its id."""
    head = b"" if number is None else b"id: %d\n" % number
    return b"%sevent: %s\ndata: %s\n\n" % (head, kind.encode(), orjson.dumps(data))

"""Room in shared memory that grows with what has come."""

from __future__ import annotations

import asyncio
import mmap
import random

import pytest

from core.errors import StorageFull
from core.header import ImageHeader
from core.request import ImagePart
from engine.landing import FIRST, SCARCE, Landing, images_into_arena
from workers.arena import PLENTY, Arena

MIB = 1 << 20
DATA = random.Random(1).randbytes(5 * MIB + 12_345)


async def receive(landing: Landing, data: bytes) -> None:
    """Write `data` as far as there is room, again and again."""
    done = 0
    while done < len(data):
        if done == len(landing.buffer):
            await landing.grow()
        step = min(len(landing.buffer), len(data))
        landing.buffer[done:step] = data[done:step]
        done = step


@pytest.mark.parametrize("scarce", [False, True])
@pytest.mark.parametrize("size", [1, SCARCE, SCARCE + 1, 500_000, FIRST, FIRST + 1, 3 * MIB + 7, len(DATA)])
async def test_what_was_received_lies_in_one_span_whichever_way_it_grew(size: int, scarce: bool) -> None:
    arena = Arena(64 * MIB)
    others = [arena.take(arena.size // PLENTY)] if scarce else []
    data = DATA[:size]
    with Landing(arena, size) as landing:
        assert len(landing.buffer) == min(size, SCARCE if scarce else FIRST)
        await receive(landing, data)
        span = landing.hand_over(size)
    assert bytes(arena.view(span)) == data
    for taken in (span, *others):
        arena.give(taken)
    assert arena.spans == arena.used == 0


async def test_a_body_of_unknown_length_may_end_before_its_room() -> None:
    arena = Arena(64 * MIB)
    with Landing(arena, 60 * MIB) as landing:
        landing.buffer[:3] = b"abc"
        span = landing.hand_over(3)
    assert bytes(arena.view(span)) == b"abc" and arena.used < 2 * MIB
    arena.give(span)


async def test_room_is_at_most_twice_what_came() -> None:
    arena = Arena(256 * MIB)
    with Landing(arena, 64 * MIB) as landing:
        for _ in range(5):
            before = len(landing.buffer)
            await landing.grow()
            assert len(landing.buffer) == 2 * before
            assert arena.spans == 1
    assert arena.spans == 0


async def test_a_body_that_finds_no_more_room_holds_nothing_after_that() -> None:
    arena = Arena(8 * MIB)
    with pytest.raises(StorageFull), Landing(arena, 8 * MIB) as landing:
        await receive(landing, DATA)
    assert arena.spans == 0


async def test_a_client_that_leaves_while_its_body_is_moved_leaves_nothing() -> None:
    arena = Arena(64 * MIB)

    async def work() -> None:
        with Landing(arena, 16 * MIB) as landing:
            while True:
                await landing.grow()

    task = asyncio.create_task(work())
    for _ in range(3):  # within the copy of two MiB
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert arena.spans == 0


def part(data: bytes | memoryview | mmap.mmap) -> ImagePart:
    return ImagePart("image", data, ImageHeader("png", 1, 1), len(data))


async def test_images_of_every_buffer_are_copied_while_others_run() -> None:
    arena, turns = Arena(64 * MIB), 0
    mapped = mmap.mmap(-1, len(DATA))
    mapped[:] = DATA

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    running = asyncio.create_task(others())
    parts, spans = await images_into_arena(arena, [part(DATA), part(memoryview(DATA)[1:]), part(mapped), part(b"a")])
    running.cancel()
    assert [bytes(arena.view(span)) for span in spans] == [DATA, DATA[1:], DATA, b"a"]
    assert [one.data for one in parts] == spans
    assert turns >= 3 * (len(DATA) // MIB)
    assert (await images_into_arena(arena, parts)) == (parts, [])


async def test_images_that_find_no_room_hold_none() -> None:
    arena = Arena(16 * MIB)
    with pytest.raises(StorageFull):
        await images_into_arena(arena, [part(DATA), part(DATA)])
    assert arena.spans == 0

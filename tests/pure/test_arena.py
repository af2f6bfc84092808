"""The shared arena: nothing is handed out twice, what is given back is used again, memory returns to the system."""

from __future__ import annotations

import os
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import StorageFull
from core.request import Span
from workers.arena import PAGE, Arena, ArenaView, size_class

MIB = 1 << 20


@pytest.fixture
def arena():
    made = Arena(64 * MIB, keep=1 * MIB)
    yield made
    made.close()


@given(st.integers(1, 1 << 31))
def test_a_size_class_holds_its_size_and_wastes_at_most_a_quarter(size):
    capacity = size_class(size)
    assert capacity >= size and capacity % PAGE == 0
    assert capacity <= max(PAGE, size * 1.25 + PAGE)
    assert size_class(capacity) == capacity


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 3 * MIB)), max_size=60))
def test_spans_that_are_out_never_overlap_and_all_come_back(steps):
    arena = Arena(64 * MIB, keep=1 * MIB)
    out: list[Span] = []
    for take, size in steps:
        if take or not out:
            try:
                out.append(arena.take(size))
            except StorageFull:
                continue
        else:
            arena.give(out.pop(size % len(out)))
        places = sorted((span.offset, span.offset + span.capacity) for span in out)
        assert all(a[1] <= b[0] for a, b in pairwise(places))
        assert all(end <= arena.size for _, end in places)
        assert arena.used == sum(span.capacity for span in out)
    for span in out:
        arena.give(span)
    assert arena.used == 0 and arena.spans == 0
    arena.close()


def test_a_span_given_twice_is_a_defect_that_is_heard(arena):
    span = arena.take(100)
    arena.give(span)
    with pytest.raises(KeyError):
        arena.give(span)


def test_a_full_arena_refuses_and_serves_again_after_something_came_back(arena):
    spans = []
    with pytest.raises(StorageFull):
        while True:
            spans.append(arena.take(4 * MIB))
    arena.give(spans.pop())
    assert arena.take(4 * MIB)


def test_classes_carved_for_small_images_do_not_keep_out_a_large_one_for_ever(arena):
    small = []
    with pytest.raises(StorageFull):
        while True:
            small.append(arena.take(MIB))
    for span in small:
        arena.give(span)
    assert arena.take(32 * MIB).capacity == 32 * MIB


def test_pages_beyond_the_warm_share_go_back_to_the_system(arena):
    def resident():
        return os.fstat(arena.fd).st_blocks * 512

    spans = [arena.take(4 * MIB) for _ in range(8)]
    for span in spans:
        arena.view(span)[:] = b"x" * span.size
    assert resident() >= 32 * MIB
    for span in spans:
        arena.give(span)
    assert resident() <= 1 * MIB


@pytest.mark.alone
def test_another_mapping_of_the_same_file_sees_the_bytes_and_no_name_is_left_anywhere(arena):
    before = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()  # noqa: PTH112, PTH208
    other = ArenaView(os.dup(arena.fd), arena.size)
    span = arena.take(5)
    arena.view(span)[:] = b"hello"
    assert bytes(other.view(span)) == b"hello"
    other.close()
    assert (set(os.listdir("/dev/shm")) if before else set()) <= before  # noqa: PTH208


def test_images_that_wait_leave_room_for_results(arena):
    with pytest.raises(StorageFull):
        while True:
            arena.take_input(MIB)
    assert arena.used <= arena.size // 2
    assert arena.take(16 * MIB)

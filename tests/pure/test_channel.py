"""The channel between master and worker: whole messages or none, never a blocked event loop."""

from __future__ import annotations

import asyncio
import multiprocessing
import os

from hypothesis import given
from hypothesis import strategies as st

from workers.channel import Frames, MasterEnd, WorkerEnd, pack
from workers.messages import BatchDone, Drop, Ping, Pong


@given(st.lists(st.lists(st.integers(), max_size=4), max_size=8), st.integers(1, 50))
def test_messages_survive_any_cutting_of_the_stream(groups, cut):
    stream = b"".join(pack(group) for group in groups)
    frames = Frames()
    got = [message for start in range(0, len(stream), cut) for message in frames.feed(stream[start : start + cut])]
    assert got == [message for group in groups for message in group]


def test_a_frame_that_was_cut_off_never_comes_out():
    frames = Frames()
    assert frames.feed(pack([Ping(1)])[:-1]) == []


def pair(on_message=lambda _: None, on_closed=lambda: None):
    context = multiprocessing.get_context("spawn")
    child_requests, requests = context.Pipe(duplex=False)
    results, child_results = context.Pipe(duplex=False)
    master = MasterEnd(requests, results, on_message, on_closed)
    return master, WorkerEnd(child_requests, child_results), child_requests, child_results


async def test_messages_arrive_in_order_both_ways():
    got = []
    master, worker, *_ = pair(got.append)
    master.send(Ping(1), Drop(2, "a"))
    assert await asyncio.to_thread(worker.receive) == [Ping(1), Drop(2, "a")]
    worker.send(Pong(1, 2), BatchDone(3, 0.5))
    while len(got) < 2:  # noqa: ASYNC110
        await asyncio.sleep(0)
    assert got == [Pong(1, 2), BatchDone(3, 0.5)]
    master.close()


async def test_a_message_that_cannot_be_taken_in_does_not_lose_those_behind_it():
    got, faults = [], []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context["exception"]))

    def take_in(message):
        got.append(message)
        if message == Pong(1, 2):
            raise ZeroDivisionError

    master, worker, *_ = pair(take_in)
    worker.send(Pong(1, 2), BatchDone(3, 0.5))
    worker.send(BatchDone(4, 0.5))
    async with asyncio.timeout(5):
        while len(got) < 3:  # noqa: ASYNC110
            await asyncio.sleep(0)
    assert got == [Pong(1, 2), BatchDone(3, 0.5), BatchDone(4, 0.5)] and list(map(type, faults)) == [ZeroDivisionError]
    master.close()


async def test_a_worker_that_reads_no_more_does_not_block_the_master_and_loses_nothing():
    master, worker, *_ = pair()
    many = [Drop(number, "x" * 1000) for number in range(1000)]  # far more than a pipe holds
    for message in many:
        master.send(message)
    got = []
    while len(got) < len(many):
        got += await asyncio.to_thread(worker.receive)
    assert got == many
    master.close()


async def test_the_death_of_a_worker_in_mid_message_is_seen_at_once():
    closed = asyncio.Event()
    got = []
    _, _, child_requests, child_results = pair(got.append, closed.set)
    frame = pack([Pong(1, 2)])
    os.write(child_results.fileno(), frame + frame[:7])  # one whole message and a torn one
    child_results.close()
    child_requests.close()
    await asyncio.wait_for(closed.wait(), 5)
    assert got == [Pong(1, 2)]


async def test_sending_to_a_dead_worker_is_no_error():
    closed = asyncio.Event()
    master, _, child_requests, child_results = pair(on_closed=closed.set)
    child_requests.close()
    master.send(Ping(1))
    child_results.close()
    await asyncio.wait_for(closed.wait(), 5)
    master.send(Ping(2))

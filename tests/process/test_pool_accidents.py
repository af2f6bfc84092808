"""The pool when the machine refuses, or when a worker does not do what it is told."""

from __future__ import annotations

import asyncio
import errno
import os
import signal

import pytest
from test_pool import Bench, specs

from workers.contract import WorkerDown, WorkerUp
from workers.messages import Ready


async def started(bench: Bench) -> int:
    """The first worker's process, as soon as there is one."""
    while bench.pool.view()[0].pid is None:  # noqa: ASYNC110
        await asyncio.sleep(0)
    return bench.pid()


async def test_a_machine_that_cannot_start_processes_for_a_while_costs_no_device(tmp_path, monkeypatch):
    bench = Bench(1, specs(), tmp_path)
    real, refusals = bench.pool._spawn, [OSError(errno.EMFILE, os.strerror(errno.EMFILE)) for _ in range(4)]

    def spawn(boot):
        if refusals:
            raise refusals.pop()
        return real(boot)

    monkeypatch.setattr(bench.pool, "_spawn", spawn)
    async with bench:
        up = await bench.next(WorkerUp)
        assert up.incarnation == 5 and not refusals, "two boots that fail by themselves would have been the end"


async def test_a_process_that_can_never_be_made_is_given_up_with_a_reason(tmp_path, monkeypatch):
    bench = Bench(1, specs(), tmp_path)

    def spawn(boot):
        raise TypeError("cannot pickle")

    monkeypatch.setattr(bench.pool, "_spawn", spawn)
    async with bench:
        for _ in range(2):
            down = await bench.next(WorkerDown)
            assert down.kind == "boot_failed" and "TypeError" in down.cause
        assert bench.pool.view()[0].state == "given_up"


async def test_a_stop_does_not_wait_for_models_that_still_load(tmp_path):
    async with Bench(1, specs(), tmp_path) as bench:
        os.kill(await started(bench), signal.SIGSTOP)  # it loads for ever
        async with asyncio.timeout(60):
            await bench.pool.stop(3600)
        assert (await bench.next(WorkerDown)).kind == "stopped"


async def test_a_retired_worker_that_does_not_go_is_killed_and_replaced(tmp_path):
    async with Bench(1, specs(), tmp_path, retire_timeout=0.2) as bench:
        up = await bench.next(WorkerUp)
        os.kill(bench.pid(), signal.SIGSTOP)
        bench.pool.retire("cpu:0", up.incarnation)
        assert (await bench.next(WorkerDown)).kind == "stopped"
        assert (await bench.next(WorkerUp)).incarnation == 2


async def test_a_worker_that_becomes_ready_when_it_was_killed_already_gets_no_work(tmp_path):
    async with Bench(1, specs(), tmp_path) as bench:
        os.kill(await started(bench), signal.SIGSTOP)
        living = bench.pool._living["cpu:0"]
        bench.pool.kill("cpu:0", 1, "took too long")
        bench.pool._on_message(living, Ready({}))
        assert (await bench.next((WorkerUp, WorkerDown))) == WorkerDown("cpu:0", 1, "took too long", "hung")
        assert (await bench.next(WorkerUp)).incarnation == 2


@pytest.mark.parametrize("times", [3])
async def test_starting_and_stopping_leaves_no_file_descriptor_behind(tmp_path, times):
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208

    async with Bench(1, specs(), tmp_path) as bench:
        await bench.next(WorkerUp)
        before = open_files()
        for incarnation in range(1, times + 1):
            bench.pool.kill("cpu:0", incarnation, "test")
            await bench.next(WorkerUp)
        assert open_files() == before

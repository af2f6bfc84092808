"""Real worker processes, started, killed and stopped by the pool alone."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from kit import ROOT, TEST_MODELS, photo, pixels

from core.header import read_header
from core.model import ModelSpec, read_spec
from core.request import ImagePart, OutputFormat
from tests.process import compile_model
from workers.arena import Arena
from workers.contract import Said, WorkerDown, WorkerUp
from workers.devices import DevicePlan
from workers.messages import BatchDidNotFit, BatchDone, Drop, ItemsDone, RunBatch, RunItem
from workers.pool import Pool, PoolConfig
from workers.supervisor import Supervisor, SupervisorConfig

SECONDS = 60


def specs(*names: str) -> list[ModelSpec]:
    return [read_spec((TEST_MODELS / f"{name}.toml").read_text(), name) for name in names or ("stub", "echo")]


class Bench:
    """A pool, and everything that it said."""

    def __init__(self, workers: int, models: list[ModelSpec], root: Path, **config) -> None:
        self.arena = Arena(256 << 20)
        plans = [DevicePlan(f"cpu:{n}", n, "cpu", threads=1) for n in range(workers)]
        supervision = SupervisorConfig(backoff=0.05, backoff_max=0.2, give_up_after=2, boot_timeout=60)
        self.pool = Pool(plans, models, self.arena, PoolConfig(str(root), supervisor=supervision, **config))
        self.events: asyncio.Queue = asyncio.Queue()
        self.batches = 0

    async def __aenter__(self) -> Bench:
        await self.pool.start(self.events.put_nowait)
        return self

    async def __aexit__(self, *_: object) -> None:
        children = psutil.Process().children(recursive=True)
        await self.pool.stop(5)
        self.arena.close()
        left = [child for child in children if child.is_running() and "imagepool" in " ".join(child.cmdline())]
        assert not left

    async def next(self, kind: type, seconds: float = SECONDS):
        """The next event (or message) of that kind; others are passed over."""
        async with asyncio.timeout(seconds):
            while True:
                event = await self.events.get()
                if isinstance(event, kind):
                    return event
                if isinstance(event, Said) and isinstance(event.message, kind):
                    return event.message

    def batch(self, items: list[dict], model: str = "stub", seeds: list[int] | None = None) -> RunBatch:
        self.batches += 1
        made = []
        for number, params in enumerate(items):
            data = photo(seeds[number] if seeds else number)
            span = self.arena.take(len(data))
            self.arena.view(span)[:] = data
            spec = next(spec for spec in specs() if spec.name == model)
            image = ImagePart("image", span, read_header(data), len(data))
            checked = spec.check_params(params)
            made.append(
                RunItem(
                    f"job{number}", (image,), checked, OutputFormat(), self.arena.take(1 << 20),
                    spec.canvas(image, checked),
                )
            )
        return RunBatch(self.batches, model, tuple(made))

    def image(self, batch: RunBatch, finished):
        place = next(item.output for item in batch.items if item.job == finished.job)
        return pixels(bytes(self.arena.view(replace(place, size=finished.size))))

    async def answers(self) -> dict:
        """What became of every item of the last batch that was made."""
        found = {}
        while True:
            message = (await self.next(Said)).message
            if getattr(message, "batch", None) != self.batches:
                continue
            if isinstance(message, ItemsDone):
                found |= {item.job: item for item in message.items}
            elif isinstance(message, BatchDone | BatchDidNotFit):
                return found

    def pid(self, worker: int = 0) -> int:
        return self.pool.view()[worker].pid


async def test_a_worker_boots_runs_a_batch_and_answers_each_item(tmp_path):
    async with Bench(1, specs(), tmp_path) as bench:
        up = await bench.next(WorkerUp)
        batch = bench.batch([{}, {}, {}])
        bench.pool.send("cpu:0", up.incarnation, batch)
        answers = await bench.answers()
        assert sorted(answers) == ["job0", "job1", "job2"]
        images = [bench.image(batch, answers[f"job{n}"]) for n in range(3)]
        assert all((images[n] == 255 - pixels(photo(n))).mean() > 0.9 for n in range(3)), "each its own image"
        assert {"decode", "compute", "encode", "wait"} <= set(answers["job0"].timings)


async def test_sigkill_is_noticed_at_once_and_the_next_incarnation_works(tmp_path):
    async with Bench(1, specs(), tmp_path) as bench:
        up = await bench.next(WorkerUp)
        bench.pool.send("cpu:0", up.incarnation, bench.batch([{"act": "hang"}]))
        os.kill(bench.pid(), signal.SIGKILL)
        down = await bench.next(WorkerDown)
        assert down.incarnation == 1 and "SIGKILL" in down.cause and down.kind == "killed"
        again = await bench.next(WorkerUp)
        assert again.incarnation == 2
        late, batch = bench.batch([{}]), bench.batch([{}])
        bench.pool.send("cpu:0", 1, late)  # to a dead incarnation: a no-op
        bench.pool.send("cpu:0", 2, batch)
        assert (await bench.next(ItemsDone)).batch == batch.batch


async def test_an_idle_worker_that_was_stopped_is_found_out_and_replaced(tmp_path):
    async with Bench(1, specs(), tmp_path, ping_interval=0.2, ping_timeout=0.4) as bench:
        await bench.next(WorkerUp)
        os.kill(bench.pid(), signal.SIGSTOP)
        assert (await bench.next(WorkerDown)).kind == "killed"
        assert (await bench.next(WorkerUp)).incarnation == 2


async def test_a_guilty_item_fails_alone_and_its_batch_mates_succeed(tmp_path):
    async with Bench(1, specs(), tmp_path) as bench:
        up = await bench.next(WorkerUp)
        bench.pool.send("cpu:0", up.incarnation, bench.batch([{}, {"act": "raise"}, {}]))
        answers = await bench.answers()
        assert answers["job1"].error.code == "model_failed"
        assert answers["job0"].error is None and answers["job2"].error is None


@pytest.mark.parametrize("act", ["nan", "black", "garbage"])
async def test_an_answer_that_is_no_image_is_told_as_such(tmp_path, act):
    async with Bench(1, specs(), tmp_path) as bench:
        up = await bench.next(WorkerUp)
        bench.pool.send("cpu:0", up.incarnation, bench.batch([{"act": act}, {}]))
        answers = await bench.answers()
        assert answers["job0"].error.code == "bad_output" and answers["job1"].error is None


async def test_out_of_memory_is_an_answer_not_a_death(tmp_path):
    async with Bench(1, specs(), tmp_path) as bench:
        up = await bench.next(WorkerUp)
        bench.pool.send("cpu:0", up.incarnation, bench.batch([{"act": "oom"}, {"act": "oom"}]))
        assert (await bench.next(BatchDidNotFit)).batch == 1
        bench.pool.send("cpu:0", up.incarnation, bench.batch([{}]))
        assert len(await bench.answers()) == 1


async def test_a_damaged_image_fails_its_job_alone(tmp_path):
    async with Bench(1, specs(), tmp_path) as bench:
        up = await bench.next(WorkerUp)
        batch = bench.batch([{}, {}])
        bench.arena.view(batch.items[0].images[0].data)[60:90] = b"\0" * 30
        bench.pool.send("cpu:0", up.incarnation, batch)
        answers = await bench.answers()
        assert answers["job0"].error.code == "invalid_image" and answers["job1"].error is None


async def test_a_dropped_job_is_left_out(tmp_path):
    async with Bench(1, specs(), tmp_path) as bench:
        up = await bench.next(WorkerUp)
        bench.pool.send("cpu:0", up.incarnation, bench.batch([{"act": "sleep", "seconds": 0.5}]))
        second = bench.batch([{}, {}])
        bench.pool.send("cpu:0", up.incarnation, second, Drop(second.batch, "job1"))
        answers = await bench.answers()
        assert answers["job0"].error is None and answers["job1"].error.code == "cancelled"


async def test_a_model_that_cannot_load_is_reported_and_its_device_given_up(tmp_path):
    broken = replace(specs("stub")[0], adapter="models.no_such_module:Model")
    async with Bench(1, [broken], tmp_path) as bench:
        for _ in range(2):
            down = await bench.next(WorkerDown)
            assert down.kind == "boot_failed" and "models.no_such_module" in down.cause
        assert bench.pool.view()[0].state == "given_up"


@pytest.mark.parametrize("moment", [0.0, 0.3, 0.8])
async def test_a_worker_killed_while_it_boots_is_started_again(tmp_path, moment):
    async with Bench(1, specs(), tmp_path) as bench:
        while bench.pool.view()[0].pid is None:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        await asyncio.sleep(moment)  # somewhere between exec and ready
        os.kill(bench.pid(), signal.SIGKILL)
        assert (await bench.next(WorkerDown)).incarnation == 1
        assert (await bench.next(WorkerUp)).incarnation == 2


async def test_workers_die_with_their_master_even_when_they_are_stopped(tmp_path):
    code = (
        "import asyncio, os, signal, sys\n"
        "from test_pool import Bench, specs, WorkerUp\n"
        "from pathlib import Path\n"
        "async def main():\n"
        "    bench = await Bench(2, specs(), Path('.')).__aenter__()\n"
        "    await bench.next(WorkerUp); await bench.next(WorkerUp)\n"
        "    os.kill(bench.pid(0), signal.SIGSTOP)\n"
        "    print(bench.pid(0), bench.pid(1), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "if __name__ == '__main__':\n"
        "    asyncio.run(main())\n"
    )
    script = tmp_path / "master.py"
    script.write_text(code)
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "process")])}
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(script), stdout=asyncio.subprocess.PIPE, env=environ
    )
    out, _ = await process.communicate()
    pids = [int(word) for word in out.splitlines()[-1].split()]
    assert len(pids) == 2
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=10)
    assert not alive


async def test_a_worker_compiles_before_it_is_ready_and_keeps_no_process_for_it(tmp_path, monkeypatch):
    booting, boots = Supervisor.booting, []

    async with Bench(1, [read_spec(compile_model.SPEC, "compiled")], tmp_path) as bench:

        def watched(supervisor: Supervisor, worker: str, now: float) -> None:
            boots.append(bench.pool._living[worker].what)
            booting(supervisor, worker, now)

        monkeypatch.setattr(Supervisor, "booting", watched)
        up = await bench.next(WorkerUp, 120)
        assert boots[-2:] == [f"compiled: compiling linear for {rows} rows" for rows in (1, 2)]
        assert not psutil.Process(bench.pid()).children(recursive=True), "what compiled is still there"
        batch = bench.batch([{}])
        bench.pool.send("cpu:0", up.incarnation, replace(batch, model="compiled"))
        assert (await bench.answers())["job0"].error is None

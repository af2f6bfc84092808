"""A session with stepped jobs: how they share the device loop with each other, with batches and with pings."""

from __future__ import annotations

import io
import os
import threading
from dataclasses import replace
from itertools import pairwise
from multiprocessing import Pipe
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engine_kit import STUB, png
from PIL import Image

from core.header import read_header
from core.model import read_spec
from core.request import ImagePart, OutputFormat
from models.stub import Stub
from tests import step_model
from workers import codecs
from workers.arena import Arena
from workers.channel import Frames, WorkerEnd, pack
from workers.messages import (
    BatchDone,
    Boot,
    Drop,
    ItemsDone,
    JobParked,
    JobPreview,
    JobProgress,
    Ping,
    Pong,
    RunBatch,
    RunItem,
    StepReport,
    Stop,
    Stuck,
)
from workers.session import Session
from workers.session_steps import Steps, small_jpeg

torch.set_num_threads(1)
OPEN = []  # the masters' ends of channels: a session whose master goes away ends its process


class Bench:
    """A session that runs in a thread; its two ends of the channel are the test's."""

    def __init__(self, tmp_path):
        self.arena = Arena(64 << 20)
        self.adder = read_spec(step_model.SPEC.format(folder=tmp_path, timeout=30.0), "adder")
        stub = replace(STUB, options={"folder": str(tmp_path)})
        requests, self.requests = Pipe(duplex=False)
        OPEN.append(self.requests)
        self.results, results = Pipe(duplex=False)
        boot = Boot("cpu:0", 1, "cpu", "", 1, 2, (), (self.adder, stub), str(tmp_path), self.arena.size, warm_up=False)
        self.session = Session(boot, WorkerEnd(requests, results), os.dup(self.arena.fd))
        self.session.load()
        self.frames, self.said, self.outputs, self.batches = Frames(), [], {}, 0
        self.thread = threading.Thread(target=self.session.run, daemon=True)
        self.thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.send(Stop())
        self.thread.join(20)
        assert not self.thread.is_alive(), "it did not stop"
        assert not self.session._dropped and not self.session._steps.holding

    @property
    def network(self):
        return self.session.adapter(self.adder).network

    def send(self, *messages):
        os.write(self.requests.fileno(), pack(messages))

    def order(self, job, model="adder", data=None, previews=False, priority=2, **params):
        """A batch of one job; hand it to `send`."""
        data = data or png()
        span = self.arena.take(len(data))
        self.arena.view(span)[:] = data
        part = ImagePart("image", span, read_header(data), len(data))
        spec = self.adder if model == "adder" else STUB
        checked = spec.check_params(params)
        self.outputs[job] = self.arena.take(1 << 20)
        item = RunItem(job, (part,), checked, OutputFormat(), self.outputs[job], spec.canvas(part, checked), priority,
                       previews)
        self.batches += 1
        return RunBatch(self.batches, model, (item,))

    def hear(self, until):
        """All that was said, once `until` (a function of it) is true."""
        while not until(self.said):
            self.said += self.frames.feed(os.read(self.results.fileno(), 1 << 18))
        return self.said

    def answers(self, *jobs):
        """What became of these jobs, when their batches have ended."""
        def ended(said):
            return sum(isinstance(message, BatchDone) for message in said) >= len(jobs) and jobs_of(said) >= {*jobs}
        self.hear(ended)
        return {done.job: done for message in self.said if isinstance(message, ItemsDone) for done in message.items}

    def image(self, job, done):
        return np.asarray(Image.open(io.BytesIO(bytes(self.arena.view(self.outputs[job])[: done.size]))))


def jobs_of(said):
    return {done.job for message in said if isinstance(message, ItemsDone) for done in message.items}


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)))


def damaged():
    data = bytearray(png())
    data[-30] ^= 0xFF
    return bytes(data)


def progress(job, least):
    return lambda said: any(isinstance(m, JobProgress) and m.job == job and m.fraction >= least for m in said)


@pytest.fixture
def bench(tmp_path):
    with Bench(tmp_path) as made:
        yield made


def test_jobs_that_come_at_different_times_share_forwards_and_each_gets_its_own_image(bench):
    bench.send(bench.order("a", data=png(1), steps=200, add=3))
    bench.hear(progress("a", 0.01))
    bench.send(bench.order("b", data=png(2), steps=6, add=5), bench.order("c", data=png(3), steps=6))
    done = bench.answers("a", "b", "c")
    assert np.array_equal(bench.image("a", done["a"]), step_model.expected(pixels(png(1)), 200, 3))
    assert np.array_equal(bench.image("b", done["b"]), step_model.expected(pixels(png(2)), 6, 5))
    assert np.array_equal(bench.image("c", done["c"]), step_model.expected(pixels(png(3)), 6, 1))
    assert max(bench.network.forwards) >= 2 and len(bench.network.forwards) < 212
    assert done["a"].facts == {"steps": 200} and done["a"].timings["compute"] > 0


def test_the_last_report_tells_what_was_done_and_that_nobody_is_left(bench):
    bench.send(bench.order("a", steps=4), bench.order("b", steps=4, data=png(2)))
    bench.answers("a", "b")
    bench.hear(lambda said: any(isinstance(m, StepReport) and m.running == 0 for m in said))
    last = [message for message in bench.said if isinstance(message, StepReport)][-1]
    assert last.rows == 8 and 4 <= last.forwards <= 8 and (last.running, last.parked) == (0, 0)


def test_batches_and_pings_are_served_between_two_steps(bench):
    bench.send(bench.order("long", steps=200, forward_ms=5.0))
    bench.hear(progress("long", 0.02))
    bench.send(Ping(7), bench.order("plain", model="stub"), bench.order("second", model="stub"))
    bench.hear(lambda said: Pong in map(type, said) and jobs_of(said) >= {"plain", "second"})
    assert "long" not in jobs_of(bench.said)
    bench.send(Drop(1, "long"))
    assert bench.answers("long", "plain", "second")["plain"].error is None


def forwards_before_each_batch(bench, monkeypatch) -> list[int]:
    """How many there had been when each ordinary batch ran."""
    seen, run = [], Stub.run

    def noted(stub, items):
        seen.append(len(bench.network.forwards))
        return run(stub, items)

    monkeypatch.setattr(Stub, "run", noted)
    return seen


def test_between_two_steps_there_is_at_most_one_batch(bench, monkeypatch):
    seen = forwards_before_each_batch(bench, monkeypatch)
    bench.send(bench.order("long", steps=60, forward_ms=5.0))
    bench.hear(progress("long", 0.02))
    bench.send(*(bench.order(f"plain{n}", model="stub") for n in range(6)))
    bench.answers("long", *(f"plain{n}" for n in range(6)))
    assert len(set(seen)) == 6, "a step was made after each"


def test_after_a_long_batch_steps_have_as_long_before_the_next(bench, monkeypatch):
    seen = forwards_before_each_batch(bench, monkeypatch)
    bench.send(bench.order("long", steps=500, forward_ms=1.0))
    bench.hear(progress("long", 0.01))
    bench.send(*(bench.order(f"plain{n}", model="stub", base_ms=100) for n in range(5)))
    bench.hear(lambda said: jobs_of(said) >= {f"plain{n}" for n in range(5)})
    assert all(after - before >= 5 for before, after in pairwise(seen)), seen
    bench.send(Ping(1), Drop(1, "long"))
    bench.answers("long", *(f"plain{n}" for n in range(5)))


def test_a_dropped_job_leaves_in_mid_run_and_its_companions_go_on(bench):
    bench.send(bench.order("a", steps=500), bench.order("b", data=png(2), steps=60))
    bench.hear(progress("a", 0.01))
    bench.send(Drop(1, "a"))
    done = bench.answers("a", "b")
    assert done["a"].error.code == "cancelled" and len(bench.network.forwards) < 300
    assert np.array_equal(bench.image("b", done["b"]), step_model.expected(pixels(png(2)), 60))


def test_a_drop_is_remembered_though_later_batches_end_first(bench):
    slow = bench.order("slow", steps=500)
    bench.send(slow)
    bench.hear(progress("slow", 0.01))
    bench.send(bench.order("plain", model="stub", base_ms=30.0), Drop(1, "slow"))
    done = bench.answers("slow", "plain")
    assert done["slow"].error.code == "cancelled" and done["plain"].error is None


def test_a_job_that_fails_at_a_step_or_cannot_start_fails_alone(bench):
    bench.send(bench.order("good", steps=10), bench.order("bad", steps=10, act="raise", at=4),
               bench.order("never", act="start"), bench.order("broken", data=damaged()))
    done = bench.answers("good", "bad", "never", "broken")
    codes = {job: answer.error and answer.error.code for job, answer in done.items()}
    assert codes == {"good": None, "bad": "model_failed", "never": "model_failed", "broken": "invalid_image"}
    assert "told" not in done["bad"].error.message
    assert np.array_equal(bench.image("good", done["good"]), step_model.expected(pixels(png()), 10))


def test_the_log_of_a_step_that_fails_tells_of_nothing_else(bench, capfd):
    bench.send(bench.order("bad", act="raise", steps=3))
    bench.answers("bad")
    told = capfd.readouterr().err
    assert "adder: told to raise" in told and "During handling" not in told and "Empty" not in told


def test_what_does_not_fit_together_is_run_apart_and_what_does_not_fit_alone_fails(bench):
    orders = [bench.order(str(n), data=png(n), steps=8, act="oom", at=3, fits=1) for n in range(3)]
    bench.send(*orders, bench.order("large", steps=8, act="oom", at=3))
    done = bench.answers("0", "1", "2", "large")
    assert done["large"].error.code == "out_of_memory" and "smaller" in done["large"].error.message
    for n in range(3):
        assert np.array_equal(bench.image(str(n), done[str(n)]), step_model.expected(pixels(png(n)), 8))


def test_previews_come_only_when_they_are_asked_for_and_seldom(bench):
    bench.send(bench.order("seen", steps=30, previews=True), bench.order("unseen", data=png(2), steps=30))
    bench.answers("seen", "unseen")
    bench.hear(lambda said: any(isinstance(message, JobPreview) for message in said))
    shown = [message for message in bench.said if isinstance(message, JobPreview)]
    assert {message.job for message in shown} == {"seen"} and len(shown) < 10
    assert Image.open(io.BytesIO(shown[0].jpeg)).size == pixels(png()).shape[1::-1]


def test_a_large_preview_is_made_small():
    picture = Image.open(io.BytesIO(small_jpeg(np.zeros((700, 1500, 3), np.uint8))))
    assert max(picture.size) <= 512 and picture.format == "JPEG"


def test_a_codec_thread_that_is_kept_for_too_long_is_told_while_others_step(bench, monkeypatch):
    kept, let_go, decode = png(7, width=20, height=10), threading.Event(), codecs.decode

    def slow(data, *args, **more):
        if bytes(data) == kept:
            let_go.wait(20)
        return decode(data, *args, **more)

    monkeypatch.setattr(codecs, "decode", slow)
    bench.session._specs["adder"] = replace(bench.adder, timeout=0.2)
    bench.send(bench.order("good", steps=400), bench.order("stuck", data=kept))
    bench.hear(lambda said: Stuck(2) in said)
    let_go.set()
    done = bench.answers("good", "stuck")
    assert not done["good"].error and not done["stuck"].error
    assert [message for message in bench.said if isinstance(message, Stuck)] == [Stuck(2)], "once, and only of that one"


def test_a_thread_that_ends_at_the_moment_at_which_it_is_found_to_be_stuck_is_not():
    class Racing(set):
        """The thread ends, and perhaps another begins with the job's result, between a look and the next."""

        def copy(self):
            seen = set(self)
            self.clear()
            self.update(after)
            return seen

    told = []
    steps = Steps(torch.device("cpu"), None, SimpleNamespace(send=told.append), None)
    for after, found in (set(), []), ({(7, 100.0)}, []), ({(7, 1.0)}, [Stuck(7)]):
        steps._in_codecs = Racing({(7, 1.0)})
        steps._tell_stuck(2.0)
        assert told == found and steps._in_codecs == (set() if found else after)


def test_who_comes_when_nobody_waits_owes_and_is_owed_nothing(bench):
    bench.send(bench.order("plain", model="stub", base_ms=100))
    bench.answers("plain")
    bench.send(Ping(1))
    bench.hear(lambda said: any(isinstance(message, Pong) for message in said))
    assert bench.session._steps._owed == 0.0, "a batch for which nobody waited"


def test_an_urgent_job_goes_first_and_the_parked_one_is_told_and_goes_on(bench, monkeypatch):
    monkeypatch.setattr("models.stepping.stepper.PARKED_AFTER", 0.05)
    bench.send(bench.order("plain", data=png(1), steps=40, forward_ms=5.0))
    bench.hear(progress("plain", 0.05))
    other_size = png(2, width=32, height=8)  # of the same size it would just come aboard
    bench.send(bench.order("urgent", data=other_size, steps=60, priority=0, forward_ms=5.0))
    done = bench.answers("plain", "urgent")
    told = [message.parked for message in bench.said if isinstance(message, JobParked)]
    assert told[0] is True and told[-1] is False
    assert {message.job for message in bench.said if isinstance(message, JobParked)} == {"plain"}
    assert np.array_equal(bench.image("plain", done["plain"]), step_model.expected(pixels(png(1)), 40))
    bench.hear(lambda said: any(isinstance(m, StepReport) and m.running == 0 for m in said))
    assert [message for message in bench.said if isinstance(message, StepReport)][-1].preemptions >= 1


def test_told_to_stop_it_finishes_who_sits_there_those_still_being_decoded_too(tmp_path):
    with Bench(tmp_path) as bench:
        bench.send(bench.order("a", steps=40), bench.order("b", data=png(2), steps=5), Stop())
        bench.thread.join(20)
        done = bench.answers("a", "b")
        assert done["a"].error is None and done["b"].error is None


def test_a_job_without_an_image_is_drawn_on_its_canvas(bench):
    spec = bench.adder
    params = spec.check_params({"width": 24, "height": 8, "steps": 3})
    bench.outputs["a"] = bench.arena.take(1 << 20)
    bench.batches += 1
    item = RunItem("a", (), params, OutputFormat(), bench.outputs["a"], spec.canvas(None, params))
    bench.send(RunBatch(bench.batches, "adder", (item,)))
    done = bench.answers("a")
    assert np.array_equal(bench.image("a", done["a"]), step_model.expected(np.zeros((8, 24, 3), np.uint8), 3))


def test_a_model_said_to_be_stepped_that_is_not_fails_its_jobs_with_a_word(bench):
    bench.session._models._loaded["adder"] = Stub({}, torch.device("cpu"))
    bench.send(bench.order("a"))
    assert bench.answers("a")["a"].error.code == "model_failed"

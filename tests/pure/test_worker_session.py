"""A worker's session without its process: one channel, one arena, models that do what the tests tell them."""

from __future__ import annotations

import io
import os
import sys
import threading
import weakref
from dataclasses import replace
from multiprocessing import Pipe
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engine_kit import STUB, png
from image_kit import chunk, insert_after_header
from PIL import Image

from core.errors import BadRequest, Cancelled, OutOfMemory
from core.header import read_header
from core.request import ImagePart, OutputFormat
from models.base import Adapter, Output
from models.calls import Call, CallAdapter
from models.checkpoint import checkpoint
from workers import session as session_module
from workers import session_pulse
from workers.arena import Arena
from workers.channel import Frames, WorkerEnd
from workers.drops import Drops
from workers.messages import (
    Alive,
    BatchDidNotFit,
    BatchDone,
    Boot,
    ItemsDone,
    Progress,
    Ready,
    RunBatch,
    RunItem,
    Stop,
)
from workers.session import Session


class Model(Adapter):
    def run(self, items):
        return [Output(np.full_like(item.image, 7)) for item in items]


class Bench:
    """A session whose device loop the test turns by hand."""

    def __init__(self, tmp_path, model=Model, **spec):
        torch.set_num_threads(1)
        self.arena = Arena(64 << 20)
        requests, _ = Pipe(duplex=False)
        self.results, results = Pipe(duplex=False)
        self.spec = replace(STUB, adapter="tests:none", preload=False, **spec)
        boot = Boot("cpu:0", 1, "cpu", "", 1, 1, (), (self.spec,), str(tmp_path), self.arena.size, warm_up=False)
        self.session = Session(boot, WorkerEnd(requests, results), os.dup(self.arena.fd))
        self.frames = Frames()
        self.session.load()
        self.frames.feed(os.read(self.results.fileno(), 1 << 18))  # that it is ready
        self.adapter = model({}, torch.device("cpu"))
        self.session._models._loaded["stub"] = self.adapter

    def item(self, job, data=None):
        data = data if data is not None else png()
        named = data if isinstance(data, str) else self._span(data)
        part = ImagePart("image", named, read_header(png()), 1)
        params = self.spec.check_params({})
        return RunItem(job, (part,), params, OutputFormat(), self.arena.take(1 << 20), self.spec.canvas(part, params))

    def _span(self, data):
        span = self.arena.take(len(data))
        self.arena.view(span)[:] = data
        return span

    def run(self, *items):
        """The batch's messages up to its end."""
        self.session._dropped.hold(1)
        self.session._compute(self.session._prepare(RunBatch(1, "stub", items)))
        said = []
        while not (said and isinstance(said[-1], BatchDone | BatchDidNotFit)):
            said += self.frames.feed(os.read(self.results.fileno(), 1 << 18))
        return said

    def answers(self, *items):
        said = self.run(*items)
        return {done.job: done for message in said if isinstance(message, ItemsDone) for done in message.items}


def test_memory_is_freed_after_what_filled_it_is_gone(tmp_path, monkeypatch):
    left = []

    class Greedy(Adapter):
        def run(self, items):
            tensor = torch.zeros(8)
            left.append(weakref.ref(tensor))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB. GPU 0 has ...")

    bench = Bench(tmp_path, Greedy)
    alive = []
    monkeypatch.setattr(bench.session._models, "free_memory", lambda: alive.append(left[0]() is not None))
    (told,) = bench.run(bench.item("a"), bench.item("b"))
    assert isinstance(told, BatchDidNotFit) and alive == [False]
    assert "allocate 3.00 GiB" in told.message, "the scheduler tells how much was lacking"


@pytest.mark.parametrize("words", ["CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when ..."])
def test_a_library_that_has_no_memory_is_understood_too(tmp_path, words):
    class Library(Adapter):
        def run(self, items):
            raise RuntimeError(words)

    bench = Bench(tmp_path, Library)
    assert isinstance(bench.run(bench.item("a"))[-1], BatchDidNotFit)


def test_a_raw_job_whose_stored_input_is_gone_fails_alone(tmp_path):
    class Echo(Adapter):
        def run(self, items):
            return [Output(data=item.data) for item in items]

    bench = Bench(tmp_path, Echo, raw=True)
    answers = bench.answers(bench.item("good"), bench.item("bad", "inputs/gone.png"))
    assert answers["bad"].error.code == "storage_failed" and answers["good"].error is None
    assert str(tmp_path) not in answers["bad"].error.message


def test_facts_leave_the_process_as_plain_data_or_not_at_all(tmp_path):
    class Talker(Adapter):
        def run(self, items):
            facts = [{"seed": np.int64(7), "scores": np.array([1.0, 2.0])}, {"what": object()}]
            return [Output(np.full_like(item.image, 7), facts=fact) for item, fact in zip(items, facts, strict=True)]

    bench = Bench(tmp_path, Talker)
    answers = bench.answers(bench.item("a"), bench.item("b"))
    assert answers["a"].facts == {"seed": 7, "scores": [1.0, 2.0]} and type(answers["a"].facts["seed"]) is int
    assert answers["b"].error.code == "bad_output"


def test_a_cancel_that_comes_while_a_batch_is_forgotten_disturbs_nothing():
    drops = Drops()
    stop = threading.Event()

    def cancel():
        number = 0
        while not stop.is_set():
            number += 1
            drops.drop(number % 3, f"job{number % 5000}")

    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=cancel)
    thread.start()
    try:
        for number in range(300):
            drops.hold(number % 2)
            drops.forget(number % 2)
            drops.forget(1)
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(switch)
    drops.forget(0)
    assert not drops


def test_a_job_stays_dropped_until_its_own_batch_has_ended_whatever_order_they_end_in():
    drops = Drops()
    drops.hold(1)
    drops.hold(2)
    drops.drop(1, "a")
    drops.drop(3, "never held")
    drops.forget(2)
    assert (1, "a") in drops and (1, "b") not in drops and (3, "never held") not in drops
    drops.forget(1)
    assert (1, "a") not in drops and not drops


def test_a_model_that_cannot_load_is_tried_once_for_the_whole_batch(tmp_path):
    bench, tries = Bench(tmp_path), []

    def load(spec):
        tries.append(spec.name)
        raise OSError("no weights")

    bench.session._models._loaded.clear()
    bench.session._models._load = load
    answers = bench.answers(*(bench.item(job) for job in "abc"))
    assert {answer.error.code for answer in answers.values()} == {"model_failed"} and tries == ["stub"]


@pytest.mark.parametrize("broken", [True, False])
def test_a_device_that_answers_every_call_with_an_error_ends_its_process(tmp_path, monkeypatch, broken):
    class Faulty(Adapter):
        def run(self, items):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def synchronize(_):
        if broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def ends(code):
        raise SystemExit(code)

    bench = Bench(tmp_path, Faulty)
    bench.session._device = torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(session_module.os, "_exit", ends)
    if broken:
        with pytest.raises(SystemExit) as left:
            bench.run(bench.item("a"))
        assert left.value.code
    else:
        assert bench.answers(bench.item("a"))["a"].error.code == "model_failed"


def test_an_exception_in_place_of_an_output_fails_that_item_alone_without_a_second_run(tmp_path):
    runs = []

    class Frail(Adapter):
        def run(self, items):
            runs.append(len(items))
            faults = [None, ValueError("secret"), Cancelled("gone"), OutOfMemory("too large; send a smaller one")]
            return [fault or Output(np.full_like(item.image, 7)) for item, fault in zip(items, faults, strict=True)]

    bench = Bench(tmp_path, Frail)
    answers = bench.answers(*(bench.item(job) for job in "abcd"))
    codes = {job: answer.error and answer.error.code for job, answer in answers.items()}
    assert codes == {"a": None, "b": "model_failed", "c": "cancelled", "d": "out_of_memory"} and runs == [4]
    assert "secret" not in answers["b"].error.message


def test_a_fault_that_only_one_item_was_told_still_ends_a_process_whose_device_is_beyond_repair(tmp_path, monkeypatch):
    class Faulty(Adapter):
        def run(self, items):
            return [RuntimeError("CUDA error: an illegal memory access was encountered")]

    def ends(*_):
        raise SystemExit(70)

    bench = Bench(tmp_path, Faulty)
    bench.session._device = torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: (_ for _ in ()).throw(RuntimeError("CUDA error")))
    monkeypatch.setattr(session_module.os, "_exit", ends)
    with pytest.raises(SystemExit):
        bench.run(bench.item("a"))


@pytest.mark.parametrize("keep", [True, False])
def test_metadata_goes_from_input_to_output_when_it_is_to_be_kept(tmp_path, keep):
    data = insert_after_header(png(), chunk(b"tEXt", b"parameters\0a cat"))
    bench = Bench(tmp_path)
    item = bench.item("a", data)
    (done,) = bench.answers(replace(item, format=OutputFormat(keep_metadata=keep))).values()
    result = bytes(bench.arena.view(item.output)[: done.size])
    assert (b"parameters\0a cat" in result) is keep


@pytest.mark.parametrize("left", [None, b"", png()[:-1]])
def test_an_input_that_the_server_has_lost_is_no_fault_of_its_image(tmp_path, left):
    bench = Bench(tmp_path)
    item = bench.item("a")
    if left is not None:
        (tmp_path / "0-image.png").write_bytes(left)
    part = replace(item.images[0], data="0-image.png", size=len(png()))
    (done,) = bench.answers(replace(item, images=(part,))).values()
    assert (done.error.code, done.error.retryable) == ("storage_failed", True)
    assert "submit it again" in done.error.message and str(tmp_path) not in done.error.message


class Early(Adapter):
    """Hands its items over one by one, and does `then` behind the first."""

    then = staticmethod(lambda item: None)

    def run(self, items):
        outputs = []
        for item in items:
            outputs.append(Output(np.full_like(item.image, 7)))
            item.done(outputs[-1])
            self.then(item)
        return outputs


def test_the_first_result_is_answered_while_the_device_computes_the_second(tmp_path):
    bench = Bench(tmp_path, Early)
    heard = []

    def listen(item):
        if not heard:  # here the second is not computed yet; the first one's answer comes all the same
            heard.extend(bench.frames.feed(os.read(bench.results.fileno(), 1 << 18)))

    bench.adapter.then = listen
    said = bench.run(bench.item("a"), bench.item("b"))
    assert [done.job for message in heard for done in message.items] == ["a"]
    assert [done.job for message in said[:-1] for done in message.items] == ["b"]
    assert said[-1].seconds > 0, "and each only once"


def test_after_a_fault_what_is_handed_over_does_not_run_again(tmp_path):
    bench = Bench(tmp_path, Early)
    ran = []

    def stumble(item):
        ran.append(item)
        if len(ran) == 1:
            raise ValueError("between two items")

    bench.adapter.then = stumble
    answers = bench.answers(bench.item("a"), bench.item("b"))
    assert len(ran) == 2 and all(one.error is None for one in answers.values()) and set(answers) == {"a", "b"}


def test_when_memory_runs_out_the_results_so_far_are_written_before_the_master_hears_of_it(tmp_path):
    bench = Bench(tmp_path, Early)

    def run_out(item):
        raise torch.OutOfMemoryError("CUDA out of memory")

    bench.adapter.then = run_out
    first, last = bench.run(bench.item("a"), bench.item("b"))
    assert [done.job for done in first.items] == ["a"] and isinstance(last, BatchDidNotFit)


def test_a_model_may_prepare_an_item_where_it_is_decoded_and_what_it_raises_fails_that_item(tmp_path):
    class Careful(Model):
        def prepare(self, item):
            prepared.append((threading.current_thread().name, item.image.shape))
            if len(prepared) == 2:
                raise BadRequest("not this one")

    prepared, bench = [], Bench(tmp_path, Careful)
    answers = bench.answers(*(bench.item(job) for job in "abc"))
    assert [answers[job].error is None for job in "abc"] == [True, False, True]
    assert "not this one" in answers["b"].error.message
    assert all(name.startswith("codec") and len(shape) == 3 for name, shape in prepared)


@pytest.mark.parametrize("warm_up", [True, False])
def test_what_takes_minutes_is_done_and_told_before_the_worker_is_ready(tmp_path, monkeypatch, warm_up):
    class Slow(Adapter):
        def run(self, items):
            return []

        def compile(self, spec, tell):
            tell("compiling unet for 2 rows")

    monkeypatch.setitem(sys.modules, "slow_model", SimpleNamespace(Slow=Slow))
    bench = Bench(tmp_path)
    named = (replace(bench.spec, name=name, adapter="slow_model:Slow", preload=name != "late")
             for name in ("a", "b", "late"))
    specs = tuple(named)
    boot = replace(bench.session._boot, specs=specs, warm_up=warm_up)
    session = Session(boot, bench.session._channel, os.dup(bench.arena.fd))
    session.load()
    said = bench.frames.feed(os.read(bench.results.fileno(), 1 << 18))
    told = [message.what for message in said if isinstance(message, Progress)]
    compiled = [f"{name}: compiling unet for 2 rows" for name in "ab"]
    assert [what for what in told if "compiling" in what] == (compiled if warm_up else [])
    assert isinstance(said[-1], Ready)
    session.adapter(specs[2])
    bench.session._channel.send(Stop())
    assert [type(one) for one in bench.frames.feed(os.read(bench.results.fileno(), 1 << 18))] == [Stop]


def test_what_was_dropped_while_it_ran_is_not_encoded(tmp_path, monkeypatch):
    encoded, runs = [], []
    monkeypatch.setattr(session_module.codecs, "encode", lambda image, *_, **__: encoded.append(image) or b"x")

    class Dropping(Adapter):
        def run(self, items):
            runs.append(len(items))
            bench.session._dropped.drop(1, "a")
            checkpoint()  # somebody is still wanted
            return [Output(np.full_like(item.image, 7)) for item in items]

    bench = Bench(tmp_path, Dropping)
    bench.session._dropped.hold(1)
    answers = bench.answers(bench.item("a"), bench.item("b"))
    assert answers["a"].error.code == "cancelled" and answers["b"].error is None
    assert len(encoded) == 1 and runs == [2]


def test_a_batch_that_nobody_wants_ends_at_the_next_checkpoint_and_is_not_tried_again(tmp_path):
    runs = []

    class Dropping(Adapter):
        def run(self, items):
            runs.append(len(items))
            for job in "ab":
                bench.session._dropped.drop(1, job)
            checkpoint()
            raise AssertionError("it went on")

    bench = Bench(tmp_path, Dropping)
    bench.session._dropped.hold(1)
    answers = bench.answers(bench.item("a"), bench.item("b"))
    assert {answer.error.code for answer in answers.values()} == {"cancelled"} and runs == [2]


class Slow(Adapter):
    """Passes checkpoints; `rounds` of them for all but the job whose picture is dark."""

    clock = 0.0
    rounds = 1

    def run(self, items):
        for item in items:
            for _ in range(100 if item.image.max() < 50 else self.rounds):
                Slow.clock += 1.0
                checkpoint()
        return [Output(np.full_like(item.image, 7)) for item in items]


@pytest.fixture
def slow(tmp_path, monkeypatch):
    """A bench whose model takes a second between its checkpoints and may take 20."""
    monkeypatch.setattr(Slow, "clock", 0.0)
    monkeypatch.setattr(session_pulse.time, "monotonic", lambda: Slow.clock)
    return Bench(tmp_path, Slow, timeout=20.0, steps_param="steps")


def dark():
    file = io.BytesIO()
    Image.new("RGB", (16, 12), (9, 9, 9)).save(file, "PNG")
    return file.getvalue()


def test_a_job_that_takes_too_long_fails_with_what_to_ask_less_of_and_the_worker_goes_on(slow):
    error = slow.answers(slow.item("long", dark()))["long"].error
    assert error.code == "deadline_exceeded" and not error.retryable and Slow.clock < 25
    assert "20 s" in error.message and "fewer steps" in error.message and "a smaller image" in error.message
    assert slow.answers(slow.item("short"))["short"].error is None


def test_of_a_batch_that_takes_too_long_only_the_guilty_job_fails(slow):
    slow.adapter.rounds = 15
    answers = slow.answers(slow.item("a"), slow.item("long", dark()), slow.item("b"))
    assert {job: done.error and done.error.code for job, done in answers.items()} == {
        "a": None, "long": "deadline_exceeded", "b": None,
    }  # fmt: skip


def test_a_long_batch_shows_that_it_goes_on_and_a_short_one_says_nothing(slow):
    slow.adapter.rounds = 15
    signs = [message for message in slow.run(slow.item("a")) if isinstance(message, Alive)]
    assert len(signs) >= 10 and {sign.batch for sign in signs} == {1}
    slow.adapter.rounds = 0
    assert not [message for message in slow.run(slow.item("b")) if isinstance(message, Alive)]


class Forwards(CallAdapter):
    """Asks for one forward after the other, each of which takes 15 seconds."""

    def start(self, item):
        for _ in range(9):
            yield Call("net", (torch.zeros(1, *self.options.get("shape", (4,))),))
        return Output(np.full_like(item.image, 7))

    def forward(self, network, rows):
        Slow.clock += 15.0
        return rows


def test_forwards_that_end_are_progress_each_has_the_whole_time_and_is_a_sign(slow):
    slow.session._models._loaded["stub"] = Forwards({}, torch.device("cpu"))
    said = slow.run(slow.item("a"))
    (answer,) = (done for message in said if isinstance(message, ItemsDone) for done in message.items)
    assert answer.error is None and Slow.clock >= 9 * 15
    assert [one for one in said if isinstance(one, Alive)] == [Alive(1)] * 8


def test_a_large_forward_is_told_before_it_begins(slow):
    slow.session._models._loaded["stub"] = Forwards({"shape": (1 << 24,)}, torch.device("cpu"))
    assert slow.run(slow.item("a"))[0] == Alive(1, 20.0)


def test_the_encoding_of_a_large_result_is_told_before_it_begins(tmp_path, monkeypatch):
    monkeypatch.setattr(session_module, "LARGE", 100)
    bench = Bench(tmp_path, timeout=77.0)
    said = bench.run(bench.item("a"))
    assert said[0] == Alive(1, 77.0)

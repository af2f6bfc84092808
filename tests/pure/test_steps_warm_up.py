"""What forwards cost is measured before anybody waits, and the first burst is as wide as pays."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from multiprocessing import Pipe
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusion_kit import CPU, build, example_spec, folder_of, picture
from step_kit import Told, spied

from core.errors import ModelFailed, OutOfMemory
from core.model import ModelSpec, read_spec
from models.base import Item, Output
from models.stepping import trial, warm_up
from models.stepping.batcher import StepBatcher
from models.stepping.contract import Lane, StepAdapter, StepCall
from models.stepping.costs import StepCosts
from models.stepping.stepper import Stepper
from models.stepping.warm_up import Measured, measure
from tests import step_model
from workers.arena import Arena
from workers.channel import Frames, WorkerEnd
from workers.messages import Boot, Progress, Ready
from workers.session import Session
from workers.session_steps import Steps

SMALL = {1: 0.120, 2: 0.160, 4: 0.230, 8: 0.380, 16: 0.700}  # seconds by rows: wider pays
LARGE = {1: 0.243, 2: 0.474, 4: 0.940, 8: 1.870, 16: 3.700}  # it does not
FOREVER = float("inf")


class Curve(StepAdapter):
    """A model whose forwards take the seconds of a curve, on the test's clock; `fits`: rows that its memory holds."""

    name = "curve"

    def __init__(self, seconds: dict[int, float], fits: int = 99, rows: int = 1) -> None:
        super().__init__({}, CPU)
        self.seconds, self.fits, self.rows, self.now = seconds, fits, rows, 0.0
        self.widths: list[int] = []

    def forward(self, calls):
        if calls[0].lane is Lane.DENOISE:
            rows = sum(call.rows for call in calls)
            if rows > self.fits:
                raise torch.OutOfMemoryError("CUDA out of memory")
            self.widths.append(len(calls))
            self.now += float(np.interp(rows, list(self.seconds), list(self.seconds.values())))
        else:
            self.now += 0.01
        return [call.args[0] for call in calls]

    def clock(self) -> float:
        return self.now

    def start(self, item: Item):
        yield StepCall(self, (0,), {}, 1, (self, "encode"), Lane.ENCODE)
        for _ in range(int(item.params.get("steps", trial.STEPS))):
            yield StepCall(self, (0,), {}, self.rows, (self, "denoise"), Lane.DENOISE)
        yield StepCall(self, (0,), {}, 1, (self, "decode"), Lane.DECODE)
        return Output(np.zeros((8, 8, 3), np.uint8))

    def measured(self, batcher: StepBatcher, until: float = FOREVER) -> list[Measured]:
        return measure(CPU, batcher, lambda: (self.start(Item({})), 2.0), until, clock=self.clock)

    def burst(self, batcher: StepBatcher, jobs: int = 8, steps: int = 20) -> list[int]:
        """The widths of the denoiser's forwards for so many requests that come at once."""
        stepper, told = Stepper(CPU, batcher, (seen := Told()).events(), self.clock), len(self.widths)
        for job in range(jobs):
            stepper.join(job, self.start(Item({"steps": steps})), priority=2, remaining=20, cancelled=lambda: False)
        run(stepper)
        assert not [end for end in seen.ends.values() if isinstance(end, Exception)]
        return self.widths[told:]


def run(stepper: Stepper) -> None:
    try:
        while stepper.busy:
            stepper.advance()
    finally:
        torch.set_grad_enabled(True)


def fresh() -> StepBatcher:
    return StepBatcher(StepCosts())


# --- the measurement --------------------------------------------------------------------------------------------------


def test_widths_are_tried_as_long_as_the_time_of_a_row_falls():
    model, batcher = Curve(SMALL), fresh()
    found = model.measured(batcher)
    assert [(one.calls, one.rows, round(one.seconds, 3)) for one in found] == [
        (1, 1, 0.12), (2, 2, 0.16), (4, 4, 0.23), (8, 8, 0.38)
    ]  # fmt: skip
    assert model.widths == [1, 1, 1, 2, 2, 2, 4, 4, 4, 8, 8, 8]
    learnt = [batcher.costs.seconds((model, "denoise"), rows) for rows in (1, 2, 4, 8)]
    assert learnt == pytest.approx([0.12, 0.16, 0.23, 0.38])
    assert batcher.costs.seconds((model, "decode"), 1) == pytest.approx(0.01)
    model, batcher = Curve(LARGE), fresh()
    assert [one.calls for one in model.measured(batcher)] == [1, 2]


def test_the_first_burst_is_as_wide_as_pays():
    for curve, wide in ((SMALL, True), (LARGE, False)):
        cold = Curve(curve)
        learnt = fresh()
        cold_widths = cold.burst(learnt)
        assert cold_widths[0] == 1, "it knows nothing"
        model, batcher = Curve(curve), fresh()
        model.measured(batcher)
        widths = model.burst(batcher)
        assert (widths[0] > 2) == wide
        assert widths[0] == Curve.burst(cold, learnt)[0], "as after a burst of traffic"


def test_what_was_measured_is_not_doubted_for_long_silence():
    """A width that was measured twice only is forgotten after a hundred forwards of others."""
    model, batcher = Curve(SMALL), fresh()
    model.measured(batcher)
    for _ in range(200):
        batcher.costs.learn((model, "denoise"), 1, 0.12)
    assert batcher.costs.seconds((model, "denoise"), 8) == pytest.approx(0.38)


def test_rows_beyond_what_the_batcher_takes_are_not_measured():
    model, batcher = Curve({2: 0.1, 16: 0.2, 32: 0.3}, rows=4), fresh()
    assert [one.rows for one in model.measured(batcher)] == [4, 8, 16]


def test_a_width_that_does_not_fit_is_the_last_and_never_tried_again():
    model, batcher = Curve(SMALL, fits=3), fresh()
    assert [one.calls for one in model.measured(batcher)] == [1, 2]
    model.fits = 99
    assert max(model.burst(batcher)) <= 2


def test_a_request_that_does_not_fit_alone_ends_it_with_its_reason():
    with pytest.raises(OutOfMemory):
        Curve(SMALL, fits=0).measured(fresh())


def test_it_ends_when_its_time_is_over_and_leaves_nothing_under_way():
    model, batcher = Curve(SMALL), fresh()
    assert [one.calls for one in model.measured(batcher, until=1.3)] == [1, 2]
    assert model.now < 1.3
    model = Curve(SMALL)
    assert model.measured(fresh(), until=0.05) == [] and len(model.widths) <= 1


# --- requests ---------------------------------------------------------------------------------------------------------


def test_without_the_option_a_gpu_measures_the_usual_size_and_a_cpu_nothing():
    spec = example_spec("sd15")
    assert trial.usual_size(spec) == (512, 512)
    gpu = torch.device("cuda:0")
    assert warm_up.sizes(spec.options, (512, 512), gpu) == [(512, 512)] and not warm_up.wanted(spec, CPU)
    assert warm_up.sizes({"warm_up": ["768x512"]}, (1, 1), CPU) == [(512, 768)]
    assert warm_up.sizes({"warm_up": []}, (1, 1), gpu) == []


@pytest.mark.parametrize("bad", ["512x512", ["512"], [[512, 512]], ["0x5"], 3, ["512x512", "512 x 512"]])
def test_an_option_that_names_no_sizes_is_refused_with_an_example(bad):
    with pytest.raises(ModelFailed, match="1024x768"):
        warm_up.sizes({"warm_up": bad}, (1, 1), CPU)


def test_a_request_has_what_a_real_one_must_have_and_the_defaults():
    drawn = trial.request(example_spec("sd15"), (64, 48))
    assert drawn.size == (64, 48) and drawn.image is None and drawn.control is None and not drawn.references
    assert drawn.params["guidance"] == 7.5 and drawn.params["prompt"] and drawn.params["seed"] == 0
    filled = trial.request(example_spec("sd15-inpaint"), (64, 48))
    assert filled.image.shape == (64, 48, 3) and filled.mask.shape == (64, 48) and {*filled.mask.flat} == {0, 255}
    edited = trial.request(example_spec("qwen-image-edit"), (64, 48))
    assert edited.image.shape == (64, 48, 3) and edited.params["true_cfg_scale"] == 4.0
    partly = example_spec("sd15-inpaint")
    partly = replace(partly, params={**partly.params, "strength": replace(partly.params["strength"], default=0.3)})
    assert int(trial.request(partly, (64, 48)).params["steps"] * 0.3) >= 2


def counted() -> Callable[[], float]:
    """A clock on which every forward takes as long as any other, so that wider always pays."""
    ticks = count()
    return lambda: float(next(ticks))


KINDS = {
    "sd15": "sd15", "sdxl": "sdxl", "flux-dev": "flux", "qwen-image": "qwen-image", "sd15-inpaint": "sd15-inpaint",
    "qwen-image-edit": "qwen-image-edit",
}  # fmt: skip


@pytest.mark.parametrize("example", KINDS)
def test_what_was_measured_holds_for_real_requests_of_the_model(example, monkeypatch):
    import diffusers.pipelines.qwenimage.pipeline_qwenimage_edit as edit

    real = edit.calculate_dimensions  # it looks at a megapixel, which takes a CPU half a minute
    monkeypatch.setattr(edit, "calculate_dimensions", lambda area, ratio: real(64 * 64, ratio))
    kind = KINDS[example]
    spec = example_spec(example, source=str(folder_of(kind)), warm_up=["64x48"], controlnets={}, variant=None)
    model, batcher = build(kind), fresh()
    measured = warm_up.warm_up(model, spec, batcher, FOREVER, clock=counted())
    assert [one.calls for one in measured[48, 64]] == ([1, 2, 4, 8] if measured[48, 64][0].rows <= 2 else [1, 2, 4])
    given = {"prompt": "a dog", "negative_prompt": "a cat"}
    params = spec.check_params({name: value for name, value in given.items() if name in spec.params}) | {"steps": 3}
    whole = np.full((48, 64), 255, np.uint8)
    images = {"image": picture(1, 64, 48)} if spec.parts["image"][0] else {}
    images |= {"mask": whole} if example == "sd15-inpaint" else {}
    stepper = Stepper(CPU, batcher, (told := Told()).events(), counted())
    for job in range(4):
        item = Item({**params, "seed": job}, size=(48, 64), **images)
        stepper.join(job, model.start(item), priority=2, remaining=3.0, cancelled=item.cancelled)
    with spied() as seen:
        run(stepper)
    assert not [end for end in told.ends.values() if isinstance(end, Exception)]
    assert next(calls for _, lane, calls in seen if lane is Lane.DENOISE) == 4, "all of the first burst at once"


# --- in the worker ----------------------------------------------------------------------------------------------------


class Worker:
    """A session at its start."""

    def __init__(self, tmp_path: Path, *specs: ModelSpec, **boot: object) -> None:
        self.arena = Arena(1 << 20)
        requests, self.requests = Pipe(duplex=False)
        self.results, results = Pipe(duplex=False)
        made = Boot("cpu:0", 1, "cpu", "", 1, 2, (), specs, str(tmp_path), self.arena.size, **boot)
        self.session = Session(made, WorkerEnd(requests, results), os.dup(self.arena.fd))

    def load(self) -> list[object]:
        """What it says until it is ready."""
        self.session.load()
        frames, said = Frames(), []
        while not any(isinstance(message, Ready) for message in said):
            said += frames.feed(os.read(self.results.fileno(), 1 << 18))
        return said


def adder(tmp_path: Path, **options: object) -> ModelSpec:
    spec = read_spec(step_model.SPEC.format(folder=tmp_path, timeout=30.0), "adder")
    return replace(spec, options={**spec.options, **options})


def test_a_worker_measures_before_it_is_ready_and_says_what_it_does(tmp_path):
    spec = adder(tmp_path, warm_up=["16x12"])
    worker = Worker(tmp_path, spec)
    said = worker.load()
    lines = [message for message in said if isinstance(message, Progress)]
    assert [line.what for line in lines] == [
        "loading adder", *(f"measuring adder at 16x12, {width} at once" for width in (1, 2, 4, 8))
    ]  # fmt: skip
    assert all(0 < line.fraction < 1 for line in lines)
    model, steps = worker.session.adapter(spec), worker.session._steps
    assert model.network.forwards == [1, 1, 1, 2, 2, 2, 4, 4, 4, 8, 8, 8]
    stepper = Stepper(CPU, steps._the_batcher(), Told().events())
    for job in range(8):
        item = Item(spec.check_params({"steps": 3}), picture(job, 16, 12), size=(12, 16))
        stepper.join(job, model.start(item), priority=2, remaining=3.0, cancelled=item.cancelled)
    run(stepper)
    assert model.network.forwards[8] > 1, "who knows nothing tries one alone"


@pytest.mark.parametrize("how", [{"warm_up": False}, {"boot_timeout": 0.0}, {}])
def test_nothing_is_measured_where_it_is_not_wanted_or_there_is_no_time(tmp_path, how):
    worker = Worker(tmp_path, adder(tmp_path, **({"warm_up": ["16x12"]} if how else {})), **how)
    worker.load()
    assert worker.session.adapter(worker.session._specs["adder"]).network.forwards == []


def test_a_measurement_that_fails_is_told_to_the_log_and_keeps_nobody_from_working(tmp_path, capsys):
    spec = adder(tmp_path, warm_up=["16x12"])
    spec = replace(spec, params={**spec.params, "act": replace(spec.params["act"], default="raise")})
    assert any(isinstance(message, Ready) for message in Worker(tmp_path, spec).load())
    assert "'adder' could not be warmed up" in capsys.readouterr().err


def test_an_option_that_cannot_be_read_keeps_the_model_from_loading(tmp_path):
    with pytest.raises(ModelFailed, match="warm_up"):
        Worker(tmp_path, adder(tmp_path, warm_up="16x12")).session.load()


def test_what_a_closed_model_s_forwards_cost_is_forgotten(tmp_path):
    class Owner(step_model.Adder):
        def owns(self, part: object) -> bool:
            return part is self.network

    steps = Steps(CPU, None, None, ThreadPoolExecutor(1))
    spec = adder(tmp_path, warm_up=["16x12"])
    models = [Owner(spec.options, CPU) for _ in range(2)]
    for model in models:
        model.load()
        steps.measure(model, spec, FOREVER, lambda _: None)
    batcher = steps._the_batcher()
    keys = [(model.network, (12, 16, 3)) for model in models]
    batcher.limit(keys[0], 4)
    assert all(batcher.costs.seconds(key, 1) for key in keys)
    steps.forget(models[0])
    assert batcher.costs.seconds(keys[0], 1) is None and batcher.costs.seconds(keys[1], 1) and not batcher._limits

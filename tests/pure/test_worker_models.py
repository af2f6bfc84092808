"""The models of a worker: loaded when they are needed, closed when room is needed, and nothing of them is left."""

from __future__ import annotations

import gc
import os
import weakref
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path

import pytest
import torch
from diffusion_kit import CPU, folder_of, item
from engine_kit import STUB

from core.errors import ModelFailed, OutOfMemory
from core.model import ModelSpec, read_spec
from models.base import Adapter, Output
from models.diffusion import adapter as diffusion
from models.diffusion.memory import DeviceMemory, refuse_without_room
from models.stepping.contract import StepAdapter
from workers import session_models
from workers.channel import Frames, WorkerEnd
from workers.messages import Boot, Loading
from workers.session_models import Models
from workers.session_steps import Seated, Steps

LIFE: list[str] = []  # what happened to models, in order
FAULTS: list[Exception] = []  # of the next loads


class Noted(Adapter):
    def load(self) -> None:
        LIFE.append(f"load {self.options['name']}")
        if FAULTS:
            raise FAULTS.pop(0)

    def close(self) -> None:
        LIFE.append(f"close {self.options['name']}")

    def run(self, items):
        return [Output() for _ in items]


class Stubborn(Noted):
    def close(self) -> None:
        super().close()
        raise RuntimeError("it will not go")


class Desk:
    """The models of a worker, and what it says of them."""

    def __init__(self, *specs: ModelSpec, **boot: object) -> None:
        requests, self.requests = Pipe(duplex=False)
        self.results, results = Pipe(duplex=False)
        channel = WorkerEnd(requests, results)
        self.steps = Steps(CPU, None, channel, None)
        made = Boot("cpu:0", 1, "cpu", "", 1, 1, (), specs, ".", 0, **boot)
        self.models = Models(made, CPU, channel, self.steps)
        LIFE.clear()
        FAULTS.clear()

    def said(self, count: int) -> list[object]:
        frames, said = Frames(), []
        while len(said) < count:
            said += frames.feed(os.read(self.results.fileno(), 1 << 18))
        return said


def noted(name: str, kind: str = "Noted", preload: bool = False) -> ModelSpec:
    return replace(STUB, name=name, adapter=f"{__name__}:{kind}", options={"name": name}, preload=preload)


A, B, C, STAYS = noted("a"), noted("b"), noted("c"), noted("stays", preload=True)


# --- which models are loaded ------------------------------------------------------------------------------------------


def test_a_model_is_loaded_once_and_the_master_hears_for_which_batch():
    desk = Desk(A)
    assert desk.models.get(A, 7) is desk.models.get(A, 8) and LIFE == ["load a"]
    assert desk.said(2) == [Loading(7, "a", False), Loading(7, "a", True)]


def test_the_master_hears_also_when_a_model_does_not_load_and_the_next_batch_tries_again():
    desk = Desk(A)
    FAULTS.append(ModelFailed("no weights"))
    with pytest.raises(ModelFailed):
        desk.models.get(A, 7)
    assert "a" not in desk.models and LIFE == ["load a", "close a"], "what it had loaded so far must go"
    assert desk.models.get(A, 8) and len(desk.said(4)) == 4


def test_beyond_the_most_the_one_not_used_for_longest_is_closed_and_preloaded_ones_stay():
    desk = Desk(STAYS, A, B, C, loaded_models=2)
    desk.models.preload()
    for spec in (A, B, A, C, STAYS, A):
        desk.models.get(spec, 1)
    assert LIFE == ["load stays", "load a", "load b", "close b", "load c"]
    desk.models.get(B, 1)
    assert LIFE[5:] == ["close c", "load b"] and len(desk.models) == 3


def test_without_a_most_nothing_is_closed():
    desk = Desk(A, B, C)
    for spec in (A, B, C):
        desk.models.get(spec, 1)
    assert len(desk.models) == 3


def test_a_model_whose_jobs_step_is_not_closed():
    desk = Desk(A, B, C, loaded_models=1)
    desk.models.get(A, 1)
    desk.steps._seated[1] = Seated(None, None, A, None, 0.0)
    desk.models.get(B, 2)
    desk.models.get(C, 3)
    assert LIFE == ["load a", "load b", "close b", "load c"]


@pytest.mark.parametrize("fault", [OutOfMemory("no room"), MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_who_finds_no_memory_is_loaded_again_with_less_company(fault):
    desk = Desk(A, B, C, STAYS)
    desk.models.preload()
    for spec in (A, B):
        desk.models.get(spec, 1)
    FAULTS.extend([fault, fault])
    desk.models.get(C, 1)
    assert LIFE[3:] == ["load c", "close c", "close a", "load c", "close c", "close b", "load c"]
    FAULTS.extend([fault, fault])
    with pytest.raises(type(fault)):
        desk.models.get(A, 1)
    assert LIFE[-3:] == ["close c", "load a", "close a"], "nobody is left that could go"


def test_a_fault_that_is_not_about_memory_costs_nobody_his_place():
    desk = Desk(A, B)
    desk.models.get(A, 1)
    FAULTS.append(ModelFailed("no weights"))
    with pytest.raises(ModelFailed):
        desk.models.get(B, 1)
    assert "close a" not in LIFE


def test_a_model_that_cannot_be_closed_is_told_to_the_log(capsys):
    desk = Desk(noted("a", "Stubborn"), B, loaded_models=1)
    desk.models.get(noted("a", "Stubborn"), 1)
    desk.models.get(B, 1)
    assert "b" in desk.models and "it will not go" in capsys.readouterr().err


# --- diffusion models -------------------------------------------------------------------------------------------------


@pytest.fixture
def memory(monkeypatch) -> DeviceMemory:
    """A device of its own for all diffusion models of a test."""
    made = DeviceMemory(CPU, 10**9)
    monkeypatch.setattr(diffusion, "memory_of", lambda _: made)
    return made


def drawing(kind: str = "sd15") -> ModelSpec:
    text = (Path(__file__).resolve().parents[2] / "examples" / "models" / "sd15.toml").read_text("utf-8")
    options = {"source": str(folder_of(kind)), "warm_up": ["64x64"]}
    return replace(read_spec(text, kind), options=options, preload=False)


def test_nothing_of_a_closed_model_is_left(memory):
    desk, spec = Desk(drawing()), drawing()
    model = desk.models.get(spec, 1)
    assert isinstance(model, StepAdapter)
    assert isinstance(model.run([item()])[0], Output)
    batcher = desk.steps._the_batcher()
    assert memory._modules and memory.residency.used and len(batcher.costs._keys) > 2
    weights = [weakref.ref(tensor) for module in model._entered for tensor in module.parameters()]
    assert len(weights) > 100
    del model
    desk.models.close("sd15")
    assert not memory._modules and not memory.residency._units and not batcher.costs._keys
    assert not [weight for weight in weights if weight() is not None]


def test_nothing_is_left_of_a_model_that_fails_in_the_middle_of_loading(memory, monkeypatch):
    entered, enter = [], memory.enter

    def full(module):
        if len(entered) == 2:
            raise OutOfMemory("a network of 9.0 GB does not fit this device")
        entered.append(weakref.ref(module))
        enter(module)

    monkeypatch.setattr(memory, "enter", full)
    desk = Desk(drawing())
    with pytest.raises(OutOfMemory):
        desk.models.get(drawing(), 1)
    gc.collect()
    assert len(entered) == 2 and not any(module() for module in entered) and not memory._modules


def test_a_model_for_which_the_host_has_no_memory_is_not_even_read(memory, monkeypatch):
    monkeypatch.setattr(diffusion, "available", lambda: 1000)
    monkeypatch.setattr(diffusion.loading, "load_pipeline", lambda *_: pytest.fail("it was read"))
    desk = Desk(drawing())
    with pytest.raises(OutOfMemory, match=r"need .* MB of the host's memory, of which 0\.0 MB .*--loaded-models"):
        desk.models.get(drawing(), 1)
    refuse_without_room({"unet": 5, "vae": 5}, 10)


def test_a_model_for_which_the_host_has_no_memory_has_an_idle_one_closed(memory, monkeypatch):
    desk, free = Desk(A, drawing()), [1000]
    desk.models.get(A, 1)
    monkeypatch.setattr(diffusion, "available", lambda: free.pop() if free else 10**12)
    assert desk.models.get(drawing(), 2) and LIFE == ["load a", "close a"]


def test_while_others_wait_for_a_model_only_little_is_measured(memory, monkeypatch):
    times = []
    monkeypatch.setattr(Steps, "measure", lambda self, adapter, spec, until, tell: times.append(until))
    monkeypatch.setattr(session_models.time, "monotonic", lambda: 0.0)
    monkeypatch.setattr(session_models.time, "time", lambda: 0.0)
    Desk(replace(drawing(), preload=True)).models.preload()
    Desk(drawing()).models.get(drawing(), 1)
    assert times == [session_models.LONGEST, session_models.BRIEF] and times[1] <= 10.0

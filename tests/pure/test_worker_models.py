"""A worker's models: one that cannot be loaded is refused with a sentence, and the others serve."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from engine_kit import STUB

from core.errors import ModelFailed, OutOfMemory
from models.base import Adapter
from workers.session_models import Shelf

CPU = torch.device("cpu")


class Good(Adapter):
    def run(self, items):
        return []


class Bad(Good):
    fault: Exception = ModelFailed("its weights are damaged; fetch them again")

    def load(self):
        raise self.fault


class BadAtWarmUp(Good):
    def warm_up(self):
        raise ValueError("this text is for the log alone")


def shelf(*names: str, alike: bool = True, preload: bool = True) -> Shelf:
    specs = [replace(STUB, name=name, adapter=f"{__name__}:{name}", preload=preload) for name in names]
    return Shelf(specs, warm_up=True, alike=alike)


def fill(made: Shelf) -> list[str]:
    told: list[str] = []
    made.fill(CPU, lambda name, fraction: told.append(name))
    return told


def test_a_model_that_cannot_be_loaded_leaves_the_others_alone():
    made = shelf("Bad", "Good", "BadAtWarmUp")
    assert fill(made) == ["Bad", "Good", "BadAtWarmUp"]
    assert list(made.adapters) == ["Good"]
    assert made.refused == {
        "Bad": "model 'Bad' cannot be loaded: its weights are damaged; fetch them again",
        "BadAtWarmUp": "model 'BadAtWarmUp' cannot be loaded: ValueError while loading; the worker's log has the "
                       "details",
    }
    with pytest.raises(ModelFailed, match="its weights are damaged; fetch them again"):
        made.adapter(made._specs[0], CPU)


@pytest.mark.parametrize("names", [("Bad",), ("Bad", "BadAtWarmUp")])
def test_a_worker_without_any_model_does_not_start(names):
    with pytest.raises(ModelFailed, match=f"model '{names[-1]}' cannot be loaded"):
        fill(shelf(*names))


def test_a_model_that_is_loaded_when_asked_for_may_still_be_good():
    made = shelf("Good", preload=False)
    assert fill(made) == [] and not made.adapters
    assert made.adapter(made._specs[0], CPU) is made.adapters["Good"]


def test_what_does_not_fit_one_of_several_kinds_of_devices_gives_that_device_up(monkeypatch):
    monkeypatch.setattr(Bad, "fault", OutOfMemory("its weights need 20 GB and this device has 8 GB for weights"))
    made = shelf("Bad", "Good")
    fill(made)
    assert "need 20 GB" in made.refused["Bad"] and list(made.adapters) == ["Good"]
    with pytest.raises(ModelFailed, match="need 20 GB"):
        fill(shelf("Bad", "Good", alike=False))


def test_memory_that_runs_out_is_the_device_s(monkeypatch):
    monkeypatch.setattr(Bad, "fault", MemoryError())
    with pytest.raises(ModelFailed, match="do not fit the device's memory"):
        fill(shelf("Bad", "Good"))

"""A worker's models: one that cannot be loaded is refused with a sentence, and the others serve."""

from __future__ import annotations

import os
import random
import sys
from dataclasses import replace
from multiprocessing import Pipe

import pytest
import torch
from engine_kit import STUB

from core.errors import ModelFailed, OutOfMemory
from models.base import Adapter, DoesNotFit
from workers.channel import Frames, WorkerEnd
from workers.messages import Boot
from workers.session_models import Models
from workers.session_steps import Steps

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


class Shelf:
    """The models of a worker with these adapters, and what it tells of loading them."""

    def __init__(self, *names: str, alike: bool = True, preload: bool = True, folder: str = "") -> None:
        self.specs = [
            replace(STUB, name=name, adapter=name if ":" in name else f"{__name__}:{name}", preload=preload)
            for name in names
        ]
        requests, self._requests = Pipe(duplex=False)
        self._results, results = Pipe(duplex=False)
        channel = WorkerEnd(requests, results)
        boot = Boot("cpu:0", 1, "cpu", "", 1, 1, (), tuple(self.specs), ".", 0, alike=alike, models_folder=folder)
        self.models = Models(boot, CPU, channel, Steps(CPU, None, channel, None))

    def told(self) -> list[str]:
        return [one.what for one in Frames().feed(os.read(self._results.fileno(), 1 << 18))]


def test_a_model_that_cannot_be_loaded_leaves_the_others_alone():
    shelf = Shelf("Bad", "Good", "BadAtWarmUp")
    shelf.models.preload()
    assert shelf.told() == ["loading Bad", "loading Good", "loading BadAtWarmUp"]
    assert "Good" in shelf.models and len(shelf.models) == 1
    assert shelf.models.refused == {
        "Bad": "model 'Bad' cannot be loaded: its weights are damaged; fetch them again",
        "BadAtWarmUp": "model 'BadAtWarmUp' cannot be loaded: ValueError while loading; the worker's log has the "
                       "details",
    }
    with pytest.raises(ModelFailed, match="its weights are damaged; fetch them again"):
        shelf.models.get(shelf.specs[0], 1)


@pytest.mark.parametrize("names", [("Bad",), ("Bad", "BadAtWarmUp")])
def test_a_worker_without_any_model_does_not_start(names):
    with pytest.raises(ModelFailed, match=f"model '{names[-1]}' cannot be loaded"):
        Shelf(*names).models.preload()


def test_a_model_that_is_loaded_when_asked_for_may_still_be_good():
    shelf = Shelf("Good", preload=False)
    shelf.models.preload()
    assert len(shelf.models) == 0
    assert shelf.models.get(shelf.specs[0]) is shelf.models.ready("Good")


def test_what_does_not_fit_one_of_several_kinds_of_devices_gives_that_device_up(monkeypatch):
    monkeypatch.setattr(Bad, "fault", DoesNotFit("its weights need 20 GB and this device has 8 GB for weights"))
    shelf = Shelf("Bad", "Good")
    shelf.models.preload()
    assert "need 20 GB" in shelf.models.refused["Bad"] and "Good" in shelf.models
    with pytest.raises(ModelFailed, match="need 20 GB"):
        Shelf("Bad", "Good", alike=False).models.preload()


def test_memory_that_runs_out_is_the_device_s(monkeypatch):
    monkeypatch.setattr(Bad, "fault", MemoryError())
    with pytest.raises(ModelFailed, match="do not fit the device's memory"):
        Shelf("Bad", "Good").models.preload()


def test_for_what_the_host_has_no_memory_now_its_first_request_tries_again(monkeypatch, capsys):
    monkeypatch.setattr(Bad, "fault", OutOfMemory("its weights need 9 GB of the host's memory, of which 1 GB are free"))
    shelf = Shelf("Bad", "Good")
    shelf.models.preload()
    assert not shelf.models.refused and len(shelf.models) == 1
    assert "of which 1 GB are free; its first request tries again" in capsys.readouterr().err
    monkeypatch.setattr(Bad, "load", lambda self: None)
    assert shelf.models.get(shelf.specs[0], 1) is shelf.models.ready("Bad")
    monkeypatch.undo()
    monkeypatch.setattr(Bad, "fault", OutOfMemory("no room"))
    with pytest.raises(ModelFailed, match="no room"):
        Shelf("Bad").models.preload()


def test_a_device_that_breaks_while_a_model_is_warmed_up_is_to_blame(monkeypatch):
    monkeypatch.setattr(Models, "_broken", lambda self: True)
    with pytest.raises(ModelFailed, match="the device failed while"):
        Shelf("Good", "Good").models.preload()


# --- models of one's own ----------------------------------------------------------------------------------------------

MINE = """
import {helper}
from models.base import Adapter

class Mine(Adapter):
    def run(self, items):
        return []
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of models, forgotten when the test ends."""
    monkeypatch.setattr(sys, "path", sys.path[:])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_class_beside_its_file_is_found_with_what_it_imports(folder):
    (folder / "mine_here.py").write_text(MINE.format(helper="its_helper"))
    (folder / "its_helper.py").write_text("")
    shelf = Shelf("mine_here:Mine", folder=str(folder))
    shelf.models.preload()
    assert "mine_here:Mine" in shelf.models


@pytest.mark.parametrize("preload", [True, False])
@pytest.mark.parametrize(
    ("adapter", "sentence"),
    [
        ("nowhere_here:Mine", "there is no module 'nowhere_here'; put nowhere_here.py beside the model's TOML file"),
        ("nowhere_here.deep:Mine", "put nowhere_here/deep.py beside"),
        ("random:Mine", "random.py beside its TOML file is hidden by another module 'random'; rename it"),
        ("core:Mine", "core.py beside its TOML file is hidden by another module 'core'; rename it"),
    ],
)
def test_code_that_is_not_there_or_hidden_is_refused_at_the_start(folder, adapter, sentence, preload):
    for name in ("random", "core"):
        (folder / f"{name}.py").write_text(MINE.format(helper="os"))
    shelf = Shelf(adapter, "Good", folder=str(folder), preload=preload)
    shelf.models.preload()
    assert sentence in shelf.models.refused[adapter] and str(folder) not in shelf.models.refused[adapter]
    with pytest.raises(ModelFailed, match="cannot be loaded"):
        Shelf(adapter, folder=str(folder), preload=preload).models.preload()
    assert random.random() < 1, "nothing of ours or Python's is hidden by it"


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("class Mine: ...", "'mine_wrong:Mine' is no subclass of models.base.Adapter"),
        ("", "module 'mine_wrong' has no class 'Mine'"),
        ("class Mine(:", "mine_wrong.py, line 1: "),
        ("import not_installed_here", "the package 'not_installed_here' is missing"),
        ("raise ValueError('private')", "ValueError while loading; the worker's log has the details"),
    ],
)
def test_code_that_is_wrong_is_refused_with_what_to_mend(folder, code, sentence):
    (folder / "mine_wrong.py").write_text(code)
    shelf = Shelf("mine_wrong:Mine", "Good", folder=str(folder))
    shelf.models.preload()
    assert sentence in shelf.models.refused["mine_wrong:Mine"]

"""A thousand switches between models that do not fit together leave no more memory in use than a hundred did."""

from __future__ import annotations

import ctypes
import gc
import re
from pathlib import Path

import pytest
import torch
from diffusion_kit import CPU, build, images, item, model, same
from torch import nn

from models.diffusion import adapter
from models.diffusion.memory import DeviceMemory, sizes_of
from tests.diffusion_models import Copied

WARM, SWITCHES = 100, 1000


def allocated() -> int:
    """Bytes of all tensors that live, each memory counted once."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, nn.Parameter) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def anonymous() -> int:
    """Bytes of this process's memory that no file is behind, free ones given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return 1024 * int(re.search(r"RssAnon:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])


def switch(made: list, memory: DeviceMemory, moves: int) -> None:
    """Pictures by turns, until networks have come to the device so often."""
    turn = 0
    while memory.residency.moves < moves:
        images(made[turn % 2], item(steps=1, seed=turn))
        turn += 1
        assert memory.residency.used <= memory.residency.budget


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_thousand_switches_between_real_models_do_not_creep(monkeypatch):
    sizes = [sum(sizes_of(model(kind)._base.components).values()) for kind in ("sd15", "sdxl")]
    memory = DeviceMemory(CPU, max(sizes) + 1000, clock=lambda: 0.0, host=Copied)
    monkeypatch.setattr(adapter, "memory_of", lambda _: memory)
    made = [build("sd15"), build("sdxl")]
    switch(made, memory, WARM)
    before, resident = allocated(), anonymous()
    switch(made, memory, WARM + SWITCHES)
    assert allocated() <= before + min(sizes), "what lies on the device now may be the other model"
    assert anonymous() - resident < 2 * max(sizes), "less than once a switch by far"
    slope = (anonymous() - resident) / SWITCHES
    assert slope < 4096, f"{slope:.0f} bytes stay for each switch"
    for kind, one in zip(("sd15", "sdxl"), made, strict=True):
        assert same(images(one, item(seed=3))[0], images(model(kind), item(seed=3))[0])


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_models_that_are_loaded_and_closed_again_and_again_do_not_creep(monkeypatch):
    memory = DeviceMemory(CPU, 10**9, clock=lambda: 0.0, host=Copied)
    monkeypatch.setattr(adapter, "memory_of", lambda _: memory)

    def live() -> None:
        one = build("sd15")
        images(one, item(steps=1))
        one.close()

    for _ in range(5):
        live()
    before, resident = allocated(), anonymous()
    for _ in range(30):
        live()
    weights = sum(sizes_of(model("sd15")._base.components).values())
    assert allocated() - before < weights / 2 and not memory._modules and not memory.residency._units
    assert anonymous() - resident < 5 * weights, "thirty times the weights would have stayed"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_thousand_switches_on_a_gpu_leave_its_memory_as_it_was(monkeypatch):
    gpu = torch.device("cuda:0")
    sizes = [sum(sizes_of(model(kind)._base.components).values()) for kind in ("sd15", "sdxl")]
    memory = DeviceMemory(gpu, max(sizes) + 1000, clock=lambda: 0.0)
    monkeypatch.setattr(adapter, "memory_of", lambda _: memory)
    made = []
    for kind in ("sd15", "sdxl"):
        options = {**model(kind).options, "dtype": "float32"}
        made.append(adapter.Diffusion(options, gpu))
        made[-1].load()
    switch(made, memory, WARM)
    before, reserved, resident = torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), anonymous()
    switch(made, memory, WARM + SWITCHES)
    assert torch.cuda.memory_allocated() <= before + max(sizes)
    assert torch.cuda.memory_reserved() <= reserved + max(sizes) and anonymous() - resident < 4096 * SWITCHES
    for one in made:
        one.close()
    made.clear()
    gc.collect()
    assert torch.cuda.memory_allocated() < before, "closed models leave the device"

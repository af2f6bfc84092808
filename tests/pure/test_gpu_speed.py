"""On a GPU: compiled and recorded forwards, weights that travel, and that no step makes the host wait.

    python -m pytest -m gpu
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from diffusion_kit import example_spec, folder_of, item, model, outputs, picture
from torch import nn

from models.diffusion.adapter import Diffusion
from models.diffusion.memory import DeviceMemory
from models.stepping.compiled import MODES, CompiledForward
from models.stepping.contract import Lane, StepCall
from models.stepping.merge import MergedNetwork

pytestmark = [
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.timeout(600),
]
NEAR = 0.004  # of the range, on average: a GPU's kernels against a CPU's


def on_gpu(kind: str, **options: Any) -> Diffusion:
    made = Diffusion({"source": str(folder_of(kind)), "dtype": "float32", **options}, torch.device("cuda:0"))
    made.load()
    return made


def apart(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(int) - other.astype(int)).mean()) / 255


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["sd15", "flux"])
def test_compiled_pictures_are_the_plain_ones(mode, kind, monkeypatch):
    made = on_gpu(kind, compile=mode, compile_sizes=["64x64"], row_sizes=[4])
    made.compile(example_spec({"flux": "flux-dev"}.get(kind, kind)), lambda _: None)
    used: list[int] = []
    run = CompiledForward._run
    monkeypatch.setattr(CompiledForward, "_run", lambda self, arguments: used.append(1) or run(self, arguments))
    wanted = [item(seed=seed, steps=6) for seed in range(3)]
    found = [output.image for output in outputs(made, *wanted)]
    assert used, "nothing ran compiled"
    for one, other in zip(found, outputs(model(kind), *wanted), strict=True):
        assert apart(one, other.image) < NEAR


@pytest.mark.parametrize(("kind", "sampler"), [
    ("sd15", "DDIM"), ("sd15", "Euler"), ("sd15", "DPM++ 2M"), ("sd15", "PNDM"), ("sdxl", "Heun"), ("flux", ""),
    ("flux-kontext", ""),
])
def test_no_step_makes_the_host_wait(kind, sampler, monkeypatch):
    """torch raises wherever it would wait, during the steps in the middle."""
    made, forwards, plain = on_gpu(kind), [0], MergedNetwork.forward
    steps, quiet = 10, range(4, 9)
    given = {"steps": steps, "scheduler": sampler, **({"image": picture(1)} if "kontext" in kind else {})}
    outputs(made, item(**given))

    def forward(self: MergedNetwork, calls: Sequence[StepCall]) -> list[Any]:
        if calls[0].lane is Lane.DENOISE:
            forwards[0] += 1
            torch.cuda.set_sync_debug_mode("error" if forwards[0] in quiet else "default")
        return plain(self, calls)

    monkeypatch.setattr(MergedNetwork, "forward", forward)
    try:
        outputs(made, item(**given))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert forwards[0] >= steps


def test_a_thousand_switches_leave_no_memory_behind():
    """Two networks that do not fit together, by turns."""
    networks = [nn.Sequential(nn.Linear(1024, 1024), nn.Conv2d(8, 8, 3)) for _ in range(2)]
    size = sum(weight.numel() * 4 for weight in networks[0].parameters())
    memory = DeviceMemory(torch.device("cuda:0"), size + 1000)
    for network in networks:
        memory.enter(network)
    used = []
    for turn in range(1000):
        memory.bring(networks[turn % 2])
        if turn in (100, 999):
            torch.cuda.synchronize()
            used.append(torch.cuda.memory_allocated())
    assert used[0] == used[1] and memory.residency.moves == 1000


def test_channels_last_stays_on_the_way_to_the_device_and_back():
    network = nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last)
    memory = DeviceMemory(torch.device("cuda:0"), 4000)
    other = nn.Linear(28, 28)
    for one in (network, other):
        memory.enter(one)
    for one in (network, other, network):
        memory.bring(one)
        assert network.weight.is_contiguous(memory_format=torch.channels_last)
        assert one.weight.is_cuda


def test_eight_bits_on_the_device():
    pytest.importorskip("torchao")
    made = on_gpu("flux", quantize="int8", dtype="bfloat16")
    usual = on_gpu("flux", dtype="bfloat16")
    wanted = item(seed=1, steps=4)
    assert apart(outputs(made, wanted)[0].image, outputs(usual, wanted)[0].image) < 5 * NEAR

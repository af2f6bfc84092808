"""Denoisers in eight bits: how much less memory they take, how near their pictures are, how they travel."""

from __future__ import annotations

import builtins
from typing import Any

import numpy as np
import pytest
import torch
from diffusion_kit import CPU, build, images, item, model, picture
from test_diffusion_lora import kohya
from test_diffusion_memory import pretended
from torch import nn

from core.errors import ModelFailed
from models.base import DoesNotFit
from models.diffusion import lora_mix, quantizing, sources
from models.diffusion.lora_mix import LoraMix
from models.diffusion.memory import HostedModule, sizes_of
from models.stepping.compiled import CompiledForward

torch.set_num_threads(1)
pytest.importorskip("torchao")
NEAR = 0.002  # of the range, on average: what eight bits may change


def apart(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(int) - other.astype(int)).mean()) / 255


@pytest.mark.parametrize(("kind", "part", "share"), [
    ("flux", "transformer", 0.35), ("qwen-image", "transformer", 0.35), ("sd15", "unet", 0.8),
])
def test_the_picture_is_near_and_the_denoiser_is_smaller(kind, part, share):
    made, usual = build(kind, quantize="int8"), model(kind)
    small, whole = sizes_of(made._base.components), sizes_of(usual._base.components)
    assert small[part] < share * whole[part]
    assert {name: size for name, size in small.items() if name != part} == {
        name: size for name, size in whole.items() if name != part}
    wanted = item(seed=1), item(seed=2, steps=4)
    for one, other in zip(images(made, *wanted), images(usual, *wanted), strict=True):
        assert 0 < apart(one, other) < NEAR
    assert apart(*images(usual, *wanted)) > 10 * NEAR, "another picture would be seen"


def test_requests_share_forwards_of_eight_bits():
    made = build("flux", quantize="int8")
    wanted = item(seed=1), item(seed=2), item(seed=3)
    for one, other in zip(images(made, *wanted), [images(made, each)[0] for each in wanted], strict=True):
        assert apart(one, other) < 1e-3


def test_it_fits_where_the_whole_would_not(monkeypatch):
    whole = sizes_of(model("flux")._base.components)
    budget = int(sum(whole.values()) - 0.6 * whole["transformer"])
    pretended(monkeypatch, budget)
    with pytest.raises(DoesNotFit, match="need"):
        build("flux")
    assert build("flux", quantize="int8")
    pretended(monkeypatch, budget // 3)
    with pytest.raises(DoesNotFit, match=r"need .* MB and this device has"):
        build("flux", quantize="int8")


def test_what_it_will_need_is_told_from_the_files():
    source = sources.Source(_folder("flux"))
    told = source.sizes(4, quantizing.NETWORKS)
    there = sizes_of(build("flux", quantize="int8")._base.components)
    assert there["transformer"] * 0.8 < told["transformer"] <= there["transformer"] * 1.05
    assert told["vae"] == source.sizes(4)["vae"] > source.sizes(2, quantizing.NETWORKS)["vae"]


def test_the_denoiser_in_a_single_file_is_known_by_its_names(tmp_path):
    from safetensors.torch import save_file

    matrix, kernel = torch.zeros(10, 20), torch.zeros(4, 4, 3, 3)
    file = tmp_path / "model.safetensors"
    save_file({
        "model.diffusion_model.out.weight": matrix, "model.diffusion_model.conv.weight": kernel,
        "cond_stage_model.layer.weight": matrix.clone(),
    }, file)  # fmt: skip
    source = sources.Source(file)
    assert source.sizes(2) == {"everything": 2 * (200 + 144 + 200)}
    assert source.sizes(2, quantizing.NETWORKS) == {"everything": 200 + 2 * (144 + 200)}


def _folder(kind: str) -> Any:
    from diffusion_kit import folder_of

    return folder_of(kind)


def test_quantized_weights_travel_and_come_back_as_they_were():
    """To the device "meta", where there is nothing: what does not come from the host would be noticed."""
    network = nn.Sequential(nn.Linear(32, 32, bias=False), nn.ReLU(), nn.Linear(32, 32, bias=False)).eval()
    quantizing.quantize("int8", {"unet": network})
    given, hosted = torch.randn(2, 32), HostedModule(network, torch.device("meta"))
    size, expected = hosted.size(), network(given)
    for keep in (True, False):
        hosted.bring(keep=True)
        places = {weight.device.type for weight in network.parameters()}
        assert places == {"meta"} and hosted.size() == size
        hosted.drop()
        assert torch.equal(network(given), expected), keep
        with torch.inference_mode():
            hosted.bring(keep=True)
        hosted.drop()
        assert not network[0].weight.is_inference()


@torch.no_grad()
def test_a_compiled_twin_sees_quantized_weights_that_were_replaced():
    class UNet2DConditionModel(nn.Sequential):
        def forward(self, sample: torch.Tensor) -> torch.Tensor:
            return super().forward(sample)

    network = UNet2DConditionModel(nn.Linear(32, 32, bias=False)).eval()
    quantizing.quantize("int8", {"unet": network})
    twins: list[nn.Module] = []
    compiled = CompiledForward("unet", network, "default", lambda twin, **_: twins.append(twin) or twin)
    given = {"sample": torch.randn(2, 32)}
    assert compiled.prepare(given)
    hosted = HostedModule(network, torch.device("meta"))
    hosted.bring(keep=True)
    assert twins[0][0].weight.device.type == "meta"
    hosted.drop()
    assert torch.equal(compiled(given), network(**given)) and twins[0] is not network


def test_one_network_at_a_time_in_eight_bits(monkeypatch):
    made = build("flux", quantize="int8")
    sizes = sizes_of(made._base.components)
    memory = pretended(monkeypatch, max(sizes.values()) + 1)
    travelling = build("flux", quantize="int8", offload=True)
    assert apart(images(travelling, item())[0], images(made, item())[0]) < 1e-3 and memory.residency.moves >= 3


def test_loras_go_with_eight_bits(tmp_path):
    kohya(tmp_path / "ink.safetensors", 0)
    made, usual = (build("sd15", lora_folder=str(tmp_path), **more) for more in ({"quantize": "int8"}, {}))
    wanted = item(), item(lora_name="ink"), item(picture(1), strength=0.7, lora_name="ink", lora_weight=0.5)
    for one, other in zip(images(made, *wanted), images(usual, *wanted), strict=True):
        assert apart(one, other) < NEAR
    with_lora, without = images(usual, *wanted[:2])
    assert apart(with_lora, without) > NEAR


def test_what_cannot_be_is_refused():
    for options, sentence in (
        ({"quantize": "int3"}, "'quantize' is 'int3'; it must be empty or one of int8"),
        ({"quantize": "int8", "dtype": "float16"}, 'choose dtype = "bfloat16"'),
    ):
        with pytest.raises(ModelFailed, match=sentence):
            build("sd15", **options)
    assert build("sd15", quantize="").device == CPU


def test_a_missing_package_is_named(monkeypatch):
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("torchao"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModelFailed, match=r"pip install torchao==\d"):
        quantizing.kind_of({"quantize": "int8"})


def test_joined_loras_may_take_a_part_of_what_the_weights_take_not_of_what_they_took():
    made = build("flux", quantize="int8")
    took = sizes_of(made._base.components)["transformer"]
    assert LoraMix(made._base.transformer)._room == lora_mix.SHARE * took

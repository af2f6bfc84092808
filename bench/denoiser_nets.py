"""Denoisers of real size with random weights, made where they run, and what their pipelines call them with.

Sizes are those of the published configurations; nothing is downloaded. On a CPU small ones of the same kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.base import Output
from models.stepping.contract import StepCall
from models.stepping.merge import MergedNetwork

SHARE = 0.7  # of the device's memory that a network's weights may take in float32; the same layers whatever the type
TOKENS = 64


@dataclass(frozen=True, slots=True)
class Kind:
    """A denoiser. `make(device, dtype)`: with random weights. `inputs(seed, device, dtype)`: one sample's arguments, of
    which `latents` names the one that each step changes."""

    name: str
    make: Callable[[torch.device, torch.dtype], nn.Module]
    inputs: Callable[[int, torch.device, torch.dtype], dict[str, Any]]
    latents: str
    convolutions: bool


@contextmanager
def _born(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            torch.manual_seed(0)
            yield
    finally:
        torch.set_default_dtype(before)


def unet(name: str, side: int, **config: Any) -> Kind:
    """Stable Diffusion's kind, at latents of side x side."""
    width = int(config["cross_attention_dim"])

    def make(device: torch.device, dtype: torch.dtype) -> nn.Module:
        from diffusers import UNet2DConditionModel

        with _born(device, dtype):
            return UNet2DConditionModel(sample_size=side, **config).eval()

    def inputs(seed: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        return {
            "sample": _noise(seed, (1, 4, side, side), device, dtype),
            "timestep": torch.tensor(500 + seed, device=device),
            "encoder_hidden_states": _noise(seed + 99, (1, 77, width), device, dtype), "return_dict": False,
        }

    return Kind(name, make, inputs, "sample", True)


def qwen(name: str, side: int, **config: Any) -> Kind:
    """Qwen-Image's kind, at side x side image tokens; with fewer layers where the device has no room for all."""
    width = int(config["joint_attention_dim"])

    def make(device: torch.device, dtype: torch.dtype) -> nn.Module:
        from diffusers import QwenImageTransformer2DModel

        inner = config["num_attention_heads"] * config["attention_head_dim"]
        each = 36 * inner * inner * 4  # bytes of a layer: two streams of attention, mlp and modulation
        layers = config["num_layers"]
        if device.type == "cuda":
            layers = min(layers, int(SHARE * torch.cuda.mem_get_info(device)[0] / each))
        with _born(device, dtype):
            return QwenImageTransformer2DModel(**{**config, "num_layers": layers}).eval()

    def inputs(seed: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        return {
            "hidden_states": _noise(seed, (1, side * side, config["in_channels"]), device, dtype),
            "timestep": torch.full((1,), 0.5, device=device, dtype=dtype),
            "encoder_hidden_states": _noise(seed + 99, (1, TOKENS, width), device, dtype),
            "encoder_hidden_states_mask": torch.ones(1, TOKENS, dtype=torch.bool, device=device),
            "img_shapes": [[(1, side, side)]], "return_dict": False,
        }

    return Kind(name, make, inputs, "hidden_states", False)


def kinds(device: torch.device) -> list[Kind]:
    """Those that fit the device."""
    usual: Mapping[str, Any] = {
        "in_channels": 4, "out_channels": 4,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    }
    if device.type == "cuda":
        return [
            unet("SD 1.5, 512²", 64, cross_attention_dim=768, attention_head_dim=8, layers_per_block=2,
                 block_out_channels=(320, 640, 1280, 1280), **usual),
            qwen("Qwen-Image, 512²", 32, patch_size=2, in_channels=64, out_channels=16, num_layers=60,
                 attention_head_dim=128, num_attention_heads=24, joint_attention_dim=3584, axes_dims_rope=(16, 56, 56)),
        ]  # fmt: skip
    return [
        unet("small UNet", 32, cross_attention_dim=64, attention_head_dim=8, layers_per_block=1, norm_num_groups=8,
             block_out_channels=(32, 64), in_channels=4, out_channels=4,
             down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
             up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")),
        qwen("small Qwen-Image", 16, patch_size=2, in_channels=64, out_channels=16, num_layers=2, attention_head_dim=64,
             num_attention_heads=4, joint_attention_dim=128, axes_dims_rope=(16, 24, 24)),
    ]  # fmt: skip


def denoise(network: MergedNetwork, kind: Kind, given: dict[str, Any], steps: int) -> Generator[StepCall, Any, Output]:
    """What a pipeline does: a call, a little arithmetic, the next call."""
    arguments = dict(given)
    for _ in range(steps):
        answer = (yield network.call((), arguments))[0]
        arguments[kind.latents] = arguments[kind.latents] - 0.02 * _fitting(answer, arguments[kind.latents])
    return Output()


def _fitting(answer: Tensor, latents: Tensor) -> Tensor:
    return answer if answer.shape == latents.shape else answer.expand_as(latents)


def _noise(seed: int, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)

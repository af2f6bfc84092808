"""How networks lie in memory and what computes their attention: the fast ways are taken, and nothing undoes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusion_kit import build, folder_of, images, item, model, same
from test_diffusion_lora import kohya
from torch import nn

torch.set_num_threads(1)


def layouts(network: nn.Module) -> set[bool]:
    """Whether the weights of its convolutions are channels last; those of one pixel or channel are both."""
    kernels = [part.weight for part in network.modules() if isinstance(part, nn.Conv2d)]
    return {
        weight.is_contiguous(memory_format=torch.channels_last) for weight in kernels
        if weight.shape[1] > 1 and weight.shape[2] > 1
    }


def test_channels_last_stays_when_loras_come(tmp_path):
    kohya(tmp_path / "ink.safetensors", 0)
    net = {"canny": str(folder_of("sd15-controlnet") / "controlnet")}
    made = build("sd15", channels_last=True, controlnets=net, lora_folder=str(tmp_path))
    unet = made._base.unet
    assert layouts(unet) == layouts(made._control_nets["canny"]) == {True}
    assert layouts(model("sd15")._base.unet) == {False}
    assert same(images(made, item())[0], images(model("sd15"), item())[0])
    images(made, item(lora_name="ink"))
    assert layouts(unet) == {True}


def test_a_copy_on_another_device_lies_as_it_lay():
    """Of one convolution, to the device "meta" and back: what brings weights must not lay them out anew."""
    weight = torch.randn(8, 4, 3, 3).to(memory_format=torch.channels_last)
    there = weight.to(torch.device("meta"), non_blocking=True)
    assert there.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "flux", "flux2-klein", "qwen-image"])
def test_attention_is_computed_by_torch_s_own_kernels(kind, monkeypatch):
    """Those are flash attention and the like on a GPU. Every attention of every denoiser goes there."""
    calls: list[torch.Size] = []
    real = torch.nn.functional.scaled_dot_product_attention

    def counted(query: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(query.shape)
        return real(query, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    made = model(kind)
    network = getattr(made._base, "unet", None) or made._base.transformer
    seen: list[int] = []
    hooks = [network.register_forward_pre_hook(lambda *_: calls.clear()),
             network.register_forward_hook(lambda *_: seen.append(len(calls)))]
    try:
        images(made, item(steps=2))
    finally:
        for hook in hooks:
            hook.remove()
    attentions = [part for part in network.modules() if hasattr(part, "processor")]
    assert set(seen) == {len(attentions)} != {0}

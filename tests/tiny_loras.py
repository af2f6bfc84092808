"""LoRA files for the tiny models, as the trainers of the community write them."""

from __future__ import annotations

from pathlib import Path

import torch

from tests import tiny_models

LAYERS = "down_blocks_0_attentions_0_transformer_blocks_0", "up_blocks_1_attentions_0_transformer_blocks_0"


def kohya(file: Path, seed: int, width: int = 32, text: bool = True, layers: tuple[str, ...] = LAYERS) -> Path:
    """A file in kohya's format for the tiny SD 1.5; `text`: for its text encoder too."""
    from safetensors.torch import save_file

    chance = torch.Generator().manual_seed(seed)
    unet = dict(tiny_models.load("sd15").unet.named_modules())
    pairs: dict[str, tuple[int, int]] = {}
    for block in layers:
        for part in ("attn1_to_q", "attn1_to_out_0", "attn2_to_k"):
            path = f"{block}_{part}"
            found = next((module for name, module in unet.items() if name.replace(".", "_") == path), None)
            rows, columns = (64, width) if found is None else found.weight.shape
            pairs[f"lora_unet_{path}"] = (rows, width if part == "attn2_to_k" else columns)
    if text:
        pairs |= {
            f"lora_te_text_model_encoder_layers_{n}_self_attn_{part}_proj": (32, 32) for n in range(2) for part in "qkv"
        } | {f"lora_te_text_model_encoder_layers_{n}_self_attn_out_proj": (32, 32) for n in range(2)}
    tensors: dict[str, torch.Tensor] = {}
    for name, (rows, columns) in pairs.items():
        tensors[f"{name}.lora_down.weight"] = torch.randn(4, columns, generator=chance)
        tensors[f"{name}.lora_up.weight"] = torch.randn(rows, 4, generator=chance) * 0.2
        tensors[f"{name}.alpha"] = torch.tensor(2.0)
    save_file(tensors, file)
    return file

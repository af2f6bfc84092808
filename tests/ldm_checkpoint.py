"""One file with all weights of a tiny Stable Diffusion 1.5, under the names that its makers gave them.

Such files are what model sites offer: `model.diffusion_model.*`, `first_stage_model.*` and `cond_stage_model.*` instead
of diffusers' folders. The names are made here from diffusers' own; 1 x 1 convolutions of the VAE's attention come back.
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0", "conv_out": "out.2",
}
UNET_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
BLOCKS = 4  # of a UNet and of each half of a VAE


def write(folder: Path, file: Path, layers: int = 1) -> Path:
    """Write the checkpoint of a tiny model in diffusers' layout; `layers`: residual layers of a UNet's block."""
    from safetensors.torch import load_file, save_file

    found: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "unet" / "diffusion_pytorch_model.safetensors").items():
        found[f"model.diffusion_model.{unet(name, layers)}"] = tensor
    for name, tensor in load_file(folder / "vae" / "diffusion_pytorch_model.safetensors").items():
        linear = ".attentions." in name and tensor.ndim == 2
        found[f"first_stage_model.{vae(name)}"] = tensor[:, :, None, None] if linear else tensor
    for name, tensor in load_file(folder / "text_encoder" / "model.safetensors").items():
        found[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = tensor
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, file)
    return file


def unet(name: str, layers: int) -> str:
    """What the makers of the UNet called a weight."""
    stem, _, kind = name.rpartition(".")
    if stem in UNET_ENDS:
        return f"{UNET_ENDS[stem]}.{kind}"
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", stem):
        part, number, rest = match.groups()
        place = f"middle_block.{1 if part == 'attentions' else 2 * int(number)}"
    else:
        match = re.fullmatch(r"(down|up)_blocks\.(\d)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.+)", stem)
        assert match is not None, name
        way, block, part, layer, rest = match.groups()
        each = layers + 1  # of a going down: its layers and what shrinks; of one going up: one layer more
        if part == "downsamplers":
            return f"input_blocks.{(int(block) + 1) * each}.0.op.{kind}"
        if part == "upsamplers":  # after the last layer, and after its attention where there is one
            return f"output_blocks.{int(block) * each + layers}.{1 if block == '0' else 2}.conv.{kind}"
        index = int(block) * each + int(layer) + (1 if way == "down" else 0)
        place = f"{'input' if way == 'down' else 'output'}_blocks.{index}.{1 if part == 'attentions' else 0}"
    return f"{place}.{UNET_RESNET[rest] if part == 'resnets' else rest}.{kind}"


def vae(name: str) -> str:
    """What the makers of the VAE called a weight."""
    stem, _, kind = name.rpartition(".")
    stem = stem.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    stem = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", stem)
    if match := re.search(r"mid_block\.attentions\.0\.(.+)", stem):
        stem = stem.replace(match[0], f"mid.attn_1.{VAE_ATTENTION[match[1]]}")
    stem = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", stem)
    stem = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", stem)
    for old, new in ((r"resnets", "block"), (r"upsamplers\.0", "upsample")):
        stem = re.sub(rf"up_blocks\.(\d)\.{old}", lambda m, new=new: f"up.{BLOCKS - 1 - int(m[1])}.{new}", stem)
    return f"{stem}.{kind}"

"""Tiny models of every kind of pipeline, as ordinary diffusers folders: random weights, a few megabytes, no downloads.

`folder("sd15")` is where one lies, built at first use and kept until the test run ends; `load("sd15")` is the pipeline.
Results are noise, but as sensitive to prompt, guidance and step as those of the real ones.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tests import tiny_text as text


def kl_vae(channels: int = 4, scale: float = 0.18215, shift: float | None = None, quant: bool = True) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=channels, block_out_channels=(8, 8, 16, 16), layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=4,
        sample_size=512, scaling_factor=scale, use_quant_conv=quant, use_post_quant_conv=quant,
        **({} if shift is None else {"shift_factor": shift}),
    ).eval()


def unet(channels: int = 4, **changes: Any) -> Any:
    from diffusers import UNet2DConditionModel

    usual: dict[str, Any] = {
        "sample_size": 64, "in_channels": channels, "out_channels": 4, "layers_per_block": 1,
        "block_out_channels": (16, 32, 32, 32), "cross_attention_dim": 32, "attention_head_dim": 8,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**(usual | changes)).eval()


def sdxl_unet(channels: int = 4) -> Any:
    return unet(
        channels, sample_size=128, block_out_channels=(16, 32, 32), transformer_layers_per_block=(1, 1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=64,
        attention_head_dim=(2, 4, 4), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=32 + 6 * 8,
    )


def controlnet(network: Any) -> Any:
    """Its last convolutions are zero before training, and the map's are small: no control would be seen."""
    from diffusers import ControlNetModel

    made = ControlNetModel.from_unet(network, conditioning_embedding_out_channels=(4, 8, 8, 16))
    for module in (made.controlnet_mid_block, *made.controlnet_down_blocks):
        torch.nn.init.normal_(module.weight, std=0.05)
    embedding = made.controlnet_cond_embedding
    for module in (embedding.conv_in, *embedding.blocks, embedding.conv_out):
        torch.nn.init.kaiming_normal_(module.weight)  # in the usual small ones the map would get lost on its way
    return made.eval()


def qwen_vae() -> Any:
    from diffusers import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage(
        base_dim=8, z_dim=16, dim_mult=[1, 1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 16, latents_std=[1.0] * 16,
    ).eval()


def qwen_transformer(**changes: Any) -> Any:
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(
        patch_size=2, in_channels=64, out_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=32, axes_dims_rope=(4, 6, 6), **changes,
    ).eval()


def flow_scheduler(**changes: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **changes)


def qwen_scheduler() -> Any:
    return flow_scheduler(
        base_image_seq_len=256, base_shift=0.5, max_image_seq_len=8192, max_shift=0.9, shift=1.0, shift_terminal=0.02,
        time_shift_type="exponential",
    )


def qwen_processor(tokenizer: Any) -> Any:
    from models.diffusion.qwen_processor import make_processor

    return make_processor(tokenizer, text.CHAT, min_pixels=56 * 56, max_pixels=28 * 28 * 1280)


# --- pipelines ------------------------------------------------------------------------------------------------------


def sd15(channels: int = 4) -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    tokenizer = text.clip_tokenizer()
    return StableDiffusionPipeline(
        vae=kl_vae(), text_encoder=text.clip_text(tokenizer), tokenizer=tokenizer, unet=unet(channels),
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
            set_alpha_to_one=False, steps_offset=1,
        ),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )


def sd15_inpaint() -> Any:
    """The network of nine channels, made for inpainting."""
    from diffusers import StableDiffusionInpaintPipeline

    return StableDiffusionInpaintPipeline(**sd15(9).components, requires_safety_checker=False)


def sd15_controlnet() -> Any:
    from diffusers import StableDiffusionControlNetPipeline

    plain = sd15()
    return StableDiffusionControlNetPipeline(
        **plain.components, controlnet=controlnet(plain.unet), requires_safety_checker=False
    )


def sdxl(channels: int = 4) -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    first, second = text.clip_tokenizer(), text.clip_tokenizer()
    return StableDiffusionXLPipeline(
        vae=kl_vae(scale=0.13025), text_encoder=text.clip_text(first), tokenizer=first,
        text_encoder_2=text.clip_text(second, projected=True), tokenizer_2=second, unet=sdxl_unet(channels),
        force_zeros_for_empty_prompt=True, add_watermarker=False,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading",
            steps_offset=1,
        ),
    )


def sdxl_inpaint() -> Any:
    from diffusers import StableDiffusionXLInpaintPipeline

    return StableDiffusionXLInpaintPipeline(**sdxl(9).components, add_watermarker=False)


def sdxl_controlnet() -> Any:
    from diffusers import StableDiffusionXLControlNetPipeline

    plain = sdxl()
    return StableDiffusionXLControlNetPipeline(
        **plain.components, controlnet=controlnet(plain.unet), add_watermarker=False
    )


def flux() -> Any:
    from diffusers import FluxPipeline, FluxTransformer2DModel

    first, second = text.clip_tokenizer(), text.t5_tokenizer()
    return FluxPipeline(
        scheduler=flow_scheduler(shift=3.0, base_shift=0.5, max_shift=1.15, base_image_seq_len=256,
                                 max_image_seq_len=4096),
        vae=kl_vae(16, 0.3611, 0.1159, quant=False), text_encoder=text.clip_text(first), tokenizer=first,
        text_encoder_2=text.t5_text(second), tokenizer_2=second,
        transformer=FluxTransformer2DModel(
            patch_size=1, in_channels=64, num_layers=1, num_single_layers=2, attention_head_dim=16,
            num_attention_heads=4, joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        ).eval(),
    )


def flux_kontext() -> Any:
    from diffusers import FluxKontextPipeline

    return FluxKontextPipeline(**flux().components)


def flux2_klein() -> Any:
    from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel

    tokenizer = text.qwen_tokenizer()
    return Flux2KleinPipeline(
        scheduler=flow_scheduler(shift=3.0), text_encoder=text.qwen3_text(tokenizer), tokenizer=tokenizer,
        vae=AutoencoderKLFlux2(
            latent_channels=32, block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        ).eval(),
        transformer=Flux2Transformer2DModel(
            patch_size=1, in_channels=128, num_layers=1, num_single_layers=2, attention_head_dim=16,
            num_attention_heads=4, joint_attention_dim=48, timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
        ).eval(),
    )


def qwen_image() -> Any:
    from diffusers import QwenImagePipeline

    tokenizer = text.qwen_tokenizer()
    return QwenImagePipeline(
        scheduler=qwen_scheduler(), vae=qwen_vae(), text_encoder=text.qwen_vision_text(tokenizer), tokenizer=tokenizer,
        transformer=qwen_transformer(),
    )


def qwen_image_edit() -> Any:
    from diffusers import QwenImageEditPipeline

    plain = qwen_image().components
    return QwenImageEditPipeline(**plain, processor=qwen_processor(plain["tokenizer"]))


def qwen_image_edit_plus() -> Any:
    """As of 2511: condition images are modulated as if at timestep zero."""
    from diffusers import QwenImageEditPlusPipeline

    plain = qwen_image().components | {"transformer": qwen_transformer(zero_cond_t=True)}
    return QwenImageEditPlusPipeline(**plain, processor=qwen_processor(plain["tokenizer"]))


KINDS: dict[str, Callable[[], Any]] = {
    made.__name__.replace("_", "-"): made
    for made in (
        sd15, sd15_inpaint, sd15_controlnet, sdxl, sdxl_inpaint, sdxl_controlnet, flux, flux_kontext, flux2_klein,
        qwen_image, qwen_image_edit, qwen_image_edit_plus,
    )
}


def quiet() -> None:
    """No progress bars and no advice of the libraries in the tests' output; nothing is looked for on the network."""
    import diffusers
    import transformers

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


@cache
def folder(kind: str) -> Path:
    """Where the tiny model of this kind (see `KINDS`) lies, in the layout of `save_pretrained`."""
    quiet()
    torch.manual_seed(0)
    place = _root() / kind
    KINDS[kind]().save_pretrained(place)
    return place


@cache
def _root() -> Path:
    place = Path(tempfile.mkdtemp(prefix="tiny-models-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    return place


@cache
def load(kind: str) -> Any:
    """The pipeline of this kind, loaded from its folder as a user's is; one for all tests of a run."""
    from diffusers import DiffusionPipeline

    from models.diffusion.qwen_processor import load_processor

    place = folder(kind)
    more = {"processor": load_processor(place)} if (place / "processor").is_dir() else {}
    pipeline = DiffusionPipeline.from_pretrained(place, local_files_only=True, **more)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline

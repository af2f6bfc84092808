"""What tests of LoRAs need: files for tiny models of every family, requests that wear them, their images made alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from step_kit import CPU, Fifo, Request, Told

from core.loras import LoraFolder
from models.base import Output
from models.diffusion.lora import LoraRack
from models.diffusion.memory import DeviceMemory
from models.diffusion.networks import HostedNetworks
from models.stepping.rendezvous import SharedPipeline
from models.stepping.stepper import StepCounters, Stepper
from tests import tiny_models

Worn = tuple[tuple[str, float], ...]
NONE: Worn = ()

TARGETS = {  # attention, and whatever of the network is not per token: times, convolutions, modulation
    "sd15": ["to_q", "to_v", "to_out.0", "conv1", "conv_in", "time_emb_proj", "proj_in", "conv"],
    "sdxl": ["to_q", "to_v", "conv2", "time_emb_proj", "linear_1", "proj_in", "ff.net.0.proj"],
    "flux": ["to_q", "to_k", "add_v_proj", "norm1.linear", "proj_mlp", "x_embedder", "context_embedder"],
    "flux2-klein": ["to_q", "to_k", "to_out.0", "to_qkv_mlp_proj"],
    "qwen-image": ["to_q", "to_k", "add_v_proj", "img_mod.1", "txt_mod.1", "img_in"],
    "qwen-image-edit-plus": ["to_q", "add_v_proj", "img_mod.1", "txt_mod.1"],
}


def fresh(kind: str) -> Any:
    """The tiny pipeline, loaded anew: LoRAs that are attached to it are nobody else's."""
    from diffusers import DiffusionPipeline

    from models.diffusion.qwen_processor import load_processor

    place = tiny_models.folder(kind)
    more = {"processor": load_processor(place)} if (place / "processor").is_dir() else {}
    pipeline = DiffusionPipeline.from_pretrained(place, local_files_only=True, **more)
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return pipeline


def denoiser(pipeline: Any) -> tuple[str, torch.nn.Module]:
    name = "unet" if hasattr(pipeline, "unet") else "transformer"
    return name, getattr(pipeline, name)


def train(kind: str, folder: Path, name: str, seed: int, rank: int = 4, size: float = 0.1, **config: Any) -> Path:
    """A LoRA of the denoiser as diffusers' own scripts save it. `size`: of its second matrices' values."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline = fresh(kind)
    part_name, part = denoiser(pipeline)
    usual = {"r": rank, "lora_alpha": rank, "target_modules": TARGETS[kind], "init_lora_weights": "gaussian"}
    torch.manual_seed(seed)
    part.add_adapter(LoraConfig(**usual | config))
    with torch.no_grad():
        for parameter_name, weight in part.named_parameters():
            if "lora_B" in parameter_name:
                weight.normal_(std=size, generator=torch.Generator().manual_seed(seed))
    layers = {f"{part_name}_lora_layers": get_peft_model_state_dict(part)}
    type(pipeline).save_lora_weights(str(folder), **layers, weight_name=f"{name}.safetensors")
    return folder / f"{name}.safetensors"


class Wardrobe:
    """A tiny model whose requests wear LoRAs and share forwards as widely as they can."""

    def __init__(
        self, kind: str, folder: Path, row_sizes: Sequence[int] = (), memory: DeviceMemory | None = None, most: int = 8,
    ) -> None:
        self.pipeline = fresh(kind)
        self.memory = memory or DeviceMemory(CPU, 10**12)
        self.rack = LoraRack(self.pipeline, LoraFolder(folder), self.memory, most)
        self._row_sizes = row_sizes
        self._shared: dict[Any, SharedPipeline] = {}

    def run(self, request: Request, worn: Worn) -> Any:
        chosen = self.rack.take(worn)
        shared = self._shared.get(chosen.adapters)
        if shared is None:
            networks = HostedNetworks(self.memory, self.rack, chosen.adapters, self._row_sizes)
            shared = self._shared[chosen.adapters] = SharedPipeline(self.pipeline, networks)

        def finish(result: Any) -> Output:
            return Output(facts={"image": result.images, "worn": chosen.adapters})

        return shared.start(request.call(), finish, request.scheduler)

    def together(
        self, *wanted: tuple[Request, Worn], between: Callable[[int], None] = lambda _: None
    ) -> list[torch.Tensor]:
        """Their images, 3 x height x width from 0.0 to 1.0, made side by side. `between` is told of each turn, before
        those join whose turn it is."""
        told = Told()
        self.batcher = Fifo()
        stepper = Stepper(CPU, self.batcher, told.events())
        joining, turn = dict(enumerate(wanted)), 0
        try:
            while joining or stepper.busy:
                between(turn)
                for number in [number for number, (request, _) in joining.items() if request.turn <= turn]:
                    request, worn = joining.pop(number)
                    stepper.join(number, self.run(request, worn), priority=2, remaining=1.0, cancelled=lambda: False)
                stepper.advance()
                turn += 1
                assert turn < 2000
        finally:
            torch.set_grad_enabled(True)  # other tests share this thread
        self.counters: StepCounters = stepper.counters()
        return [told.image(number) for number in range(len(wanted))]


    def mixes(self, *sets: Worn) -> bool:
        """Whether rows with these sets may share forwards of the denoiser."""
        _, module = denoiser(self.pipeline)
        return all(self.rack.mixes(module, self.rack.take(worn).adapters) for worn in sets)


def alone(kind: str, folder: Path, request: Request, worn: Worn) -> torch.Tensor:
    """The image that the stock pipeline makes with these LoRAs and no others."""
    pipeline = fresh(kind)
    for name, _ in worn:
        pipeline.load_lora_weights(str(folder), weight_name=f"{name}.safetensors", adapter_name=name)
    if worn:
        pipeline.set_adapters([name for name, _ in worn], [weight for _, weight in worn])
    return pipeline(**request.call()).images


def apart(first: torch.Tensor, second: torch.Tensor) -> float:
    """The largest difference of any sample."""
    return float((first - second).abs().max())

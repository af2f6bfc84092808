"""Diffusion models as an operator offers them, by the ready files of `examples/models`, but with tiny weights."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn

from models.base import Item
from models.diffusion.adapter import Diffusion
from models.diffusion.memory import HostedModule, memory_of
from models.stepping.rendezvous import PipelineRun
from tests import tiny_models

EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "models"


class Copied(HostedModule):
    """On a CPU nothing travels. Here weights that come are a copy, which is given back when they leave; the forward of
    a network whose weights are away raises, since they have no shape."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        super().__init__(module, device)
        self.host: dict[torch.Tensor, torch.Tensor] = {}
        self.drop()

    def size(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.host.values(), *self._here()))

    def bring(self, keep: bool) -> None:
        for tensor in self._tensors():
            if tensor in self.host:
                tensor.data = self.host[tensor].clone()

    def drop(self) -> None:
        for tensor in self._tensors():
            self.host.setdefault(tensor, tensor.data)
            tensor.data = tensor.data.new_empty(0)

    def _here(self) -> list[torch.Tensor]:
        return [tensor for tensor in self._tensors() if tensor not in self.host]


class Crowded(Diffusion):
    """A model on a device that is too small for the next one: their weights come and go. How often is noted in the file
    of the option `moves` whenever a request starts."""

    def load(self) -> None:
        memory_of(self.device)._host = Copied
        super().load()

    def start(self, item: Item) -> PipelineRun:
        Path(str(self.options["moves"])).write_text(str(memory_of(self.device).residency.moves))
        return super().start(item)


class SmallConditions(Diffusion):
    """Qwen's editing pipelines look at a picture of a megapixel, which takes a CPU half a minute: here at 64 x 64."""

    def load(self) -> None:
        import diffusers.pipelines.qwenimage.pipeline_qwenimage_edit as edit

        real = edit.calculate_dimensions
        edit.calculate_dimensions = lambda area, ratio: real(64 * 64, ratio)
        super().load()


def write_specs(folder: Path) -> Path:
    """A model folder that offers `qwen-image-edit`, and `sd15` with ControlNets."""
    folder.mkdir()
    edit = _with_source("qwen-image-edit", tiny_models.folder("qwen-image-edit"))
    edit = edit.replace("models.diffusion.adapter:Diffusion", f"{__name__}:SmallConditions")
    (folder / "qwen-image-edit.toml").write_text(edit)
    drawing = _with_source("sd15", tiny_models.folder("sd15"))
    controlnet = tiny_models.folder("sd15-controlnet") / "controlnet"
    drawing = re.sub(r'(?m)^(canny|depth|openpose) = ".*"$', rf'\1 = "{controlnet}"', drawing)
    (folder / "sd15.toml").write_text(drawing)
    return folder


def write_crowded(folder: Path) -> Path:
    """A model folder that offers `sd15` and `sdxl` on a device with room for the weights of one; how often weights have
    travelled will be in its file `moves`."""
    folder.mkdir()
    for name in ("sd15", "sdxl"):
        text = _with_source(name, tiny_models.folder(name))
        text = text.replace("models.diffusion.adapter:Diffusion", f"{__name__}:Crowded")
        text = re.sub(r"(?ms)^\[options.controlnets\].*?(?=^\[)", "", text)
        options = f'[options]\nmemory_gb = 0.003\nmoves = "{folder / "moves"}"\n'
        (folder / f"{name}.toml").write_text(text.replace("[options]\n", options))
    return folder


def _with_source(name: str, weights: Path) -> str:
    text = (EXAMPLES / f"{name}.toml").read_text()
    text = re.sub(r"(?m)^variant = .*\n", "", text)
    return re.sub(r"(?m)^source = .*$", f'source = "{weights}"', text)

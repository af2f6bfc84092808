"""Diffusion models as an operator offers them, by the ready files of `examples/models`, but with tiny weights."""

from __future__ import annotations

import re
from pathlib import Path

from models.diffusion.adapter import Diffusion
from tests import tiny_models

EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "models"


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


def _with_source(name: str, weights: Path) -> str:
    text = (EXAMPLES / f"{name}.toml").read_text()
    text = re.sub(r"(?m)^variant = .*\n", "", text)
    return re.sub(r"(?m)^source = .*$", f'source = "{weights}"', text)

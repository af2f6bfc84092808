"""Denoisers whose weights lie in eight bits: a quarter of float32's memory, half of bfloat16's.

Only the weights of linear layers (torchao, int8, one scale for each row of a matrix); what is computed keeps its type.
Text encoders and VAEs stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from core.errors import ModelFailed

KINDS = ("int8",)
NETWORKS = ("unet", "transformer", "controlnet")  # by how a component's name begins
PACKAGE = "torchao==0.18.0"


def kind_of(options: Mapping[str, Any]) -> str:
    """The option `quantize`; empty: nothing is. Raises `ModelFailed`, also where the package is missing."""
    kind = str(options.get("quantize") or "")
    if kind and kind not in KINDS:
        raise ModelFailed(
            f"the model's option 'quantize' is '{kind[:50]}'; it must be empty or one of {', '.join(KINDS)}"
        )
    if kind:
        _library()
    return kind


def refuse_half(kind: str, dtype: torch.dtype) -> None:
    """Raises `ModelFailed` for float16: a product with whole numbers up to 127, scaled afterwards, leaves its range."""
    if kind and dtype is torch.float16:
        raise ModelFailed(
            f"quantize = \"{kind}\" does not go with float16, whose range is too small for it; choose dtype = "
            "\"bfloat16\" or \"float32\""
        )


def quantize(kind: str, parts: Mapping[str, Any]) -> None:
    """The denoisers among the parts, in place."""
    if not kind:
        return
    convert, config = _library()
    for name, part in parts.items():
        if isinstance(part, nn.Module) and quantized(name):
            with torch.inference_mode(False), torch.no_grad():
                convert(part, config())


def quantized(name: str) -> bool:
    """Whether a component of that name is a denoiser."""
    return name.lower().startswith(NETWORKS)


def _library() -> tuple[Any, Any]:
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError:
        raise ModelFailed(
            f"the model's option 'quantize' needs a package that is missing or too old: pip install {PACKAGE}"
        ) from None
    return quantize_, Int8WeightOnlyConfig

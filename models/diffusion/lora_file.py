"""What is looked at in a LoRA's file before it is attached."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from core.errors import BadRequest
from core.loras import LoraFacts, inspect

LARGEST = 1e6  # of a value; trained ones are far below 100


def examine(file: Path) -> LoraFacts:
    """Read all of it. Raises `BadRequest` with what it is instead of a LoRA.

    Values that are no numbers, or beyond all measure, would reach the rows of other requests: in a shared forward they
    are multiplied by zero there, and zero times infinity is not zero.
    """
    try:
        facts = inspect(file)
        with safe_open(file, framework="pt", device="cpu") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (it is no dictionary)
                tensor = tensors.get_tensor(name)
                if tensor.is_floating_point() and tensor.numel() and not tensor.float().abs().max() <= LARGEST:
                    raise BadRequest("this file is not usable as a LoRA: some of its values are infinite or no numbers")
    except (SafetensorError, OSError):
        raise BadRequest("this file is not usable as a LoRA: it cannot be read; upload it again") from None
    return facts

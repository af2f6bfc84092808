"""The text-and-picture processor of Qwen-Image-Edit without torchvision.

transformers' `Qwen2VLProcessor` insists on a video processor, which exists for torchvision only. No edit sends a video.
The processor here has none, and resizes pictures with Pillow on every machine: torchvision's resizing differs by up to
0.23 in normalised units, so the same request would give another picture where torchvision happens to be installed.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any


@cache
def _kind() -> type:
    from transformers import Qwen2VLProcessor

    class WithoutVideo(Qwen2VLProcessor):
        """transformers takes a processor's parts from the signature of its constructor."""

        def __init__(
            self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None, **more: Any
        ) -> None:
            more.pop("video_processor", None)
            super().__init__(image_processor, tokenizer, None, chat_template=chat_template, **more)

    WithoutVideo.__name__ = Qwen2VLProcessor.__name__  # what a saved pipeline says that it holds
    WithoutVideo.__module__ = Qwen2VLProcessor.__module__
    return WithoutVideo


def load_processor(folder: Path) -> Any:
    """The processor of the model in `folder` (a diffusers folder with `processor/`): pass it to `from_pretrained` as
    `processor`. It does not matter whether a video processor was saved with it. Raises OSError if it is not there."""
    from transformers import AutoTokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    place = folder / "processor"
    tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True)
    pictures = Qwen2VLImageProcessorPil.from_pretrained(place, local_files_only=True)
    return _kind()(image_processor=pictures, tokenizer=tokenizer, chat_template=tokenizer.chat_template)


def make_processor(tokenizer: Any, chat_template: str, **sizes: int) -> Any:
    """A new one; `sizes`: what `Qwen2VLImageProcessorPil` takes, as min_pixels and max_pixels."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    pictures = Qwen2VLImageProcessorPil(patch_size=14, temporal_patch_size=2, merge_size=2, **sizes)
    return _kind()(image_processor=pictures, tokenizer=tokenizer, chat_template=chat_template)

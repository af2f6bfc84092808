"""The model's denoisers are compiled for the shapes that an operator expects, by way of a small picture of each kind.

The pipelines make the calls themselves, so what is compiled is what they will ask for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from core.errors import ModelFailed
from models.base import Item
from models.stepping.compiled import GRAPHS, MODES
from models.stepping.contract import Lane, StepCall, StepRun
from models.stepping.merge import TEXT_MULTIPLE, MergedNetwork

SIZE = re.compile(r"(\d{2,5})x(\d{2,5})")
USUAL_SIDE = 512


def compile_mode(options: Mapping[str, Any]) -> str:
    """The option `compile`; empty: nothing is compiled. Raises `ModelFailed`."""
    mode = str(options.get("compile") or "")
    if mode and mode not in MODES:
        raise ModelFailed(
            f"the model's option 'compile' is '{mode[:50]}'; it must be empty or one of {', '.join(MODES)}"
        )
    if mode in GRAPHS and options.get("offload"):
        raise ModelFailed(
            f"compile = \"{mode}\" needs weights that stay where they are, and 'offload' moves them; choose compile = "
            "\"default\", or leave 'offload' out"
        )
    sizes_of(options, USUAL_SIDE)
    tokens_of(options)
    return mode


def sizes_of(options: Mapping[str, Any], side: int) -> list[tuple[int, int]]:
    """The option `compile_sizes`, texts WIDTHxHEIGHT in pixels, as (height, width); else one square of that side.
    Raises `ModelFailed`."""
    named = options.get("compile_sizes") or [f"{side}x{side}"]
    found = [SIZE.fullmatch(str(one)) for one in named] if isinstance(named, (list, tuple)) else [None]
    if not all(found):
        raise ModelFailed("the model's option 'compile_sizes' must be a list of sizes like \"768x512\" (width, height)")
    return [(int(match[2]), int(match[1])) for match in found if match]


def tokens_of(options: Mapping[str, Any]) -> list[int]:
    """The option `compile_tokens`: lengths of text for which to compile too. Raises `ModelFailed`."""
    found = options.get("compile_tokens") or []
    if not isinstance(found, (list, tuple)) or not all(type(one) is int and 0 < one <= 8192 and one % TEXT_MULTIPLE == 0
                                                       for one in found):
        raise ModelFailed(f"the model's option 'compile_tokens' must be a list of multiples of {TEXT_MULTIPLE}")
    return list(found)


def usual_side(pipeline: Any) -> int:
    """The side in pixels that a pipeline makes its pictures with unless asked for another."""
    scale = int(getattr(pipeline, "vae_scale_factor", 8))
    sample = getattr(getattr(getattr(pipeline, "unet", None), "config", None), "sample_size", None)
    sample = sample or getattr(pipeline, "default_sample_size", None)
    return int(sample) * scale if isinstance(sample, int) else USUAL_SIDE


def test_items(
    sizes: Sequence[tuple[int, int]], picture: bool, mask: bool, control: Sequence[str], **params: Any
) -> Iterator[Item]:
    """Requests for two steps at each size: plain ones with what the model needs, and one with each kind of control."""
    for height, width in sizes:
        grey = np.full((height, width, 3), 128, np.uint8)
        for kind in (None, *control):
            item = Item({"prompt": "test", "steps": 2, "seed": 0, **params}, size=(height, width))
            item.image = grey if picture or mask else None
            item.mask = grey[..., 0] if mask else None
            if kind is not None:
                item.params, item.control = {**item.params, "control_type": kind}, grey
            yield item


def prepare(run: StepRun, tell: Callable[[str], None], tokens: Sequence[int] = ()) -> None:
    """Compile for every denoiser call that the run makes, and give it its answers. `tokens`: see
    `MergedNetwork.prepare`. Raises what the run raises."""
    answer: Any = None
    done: set[Any] = set()
    with torch.inference_mode(False), torch.no_grad():
        while True:
            try:
                asked = run.send(answer)
            except StopIteration:
                return
            calls = [asked] if isinstance(asked, StepCall) else asked
            for call in calls:
                if call.lane is Lane.DENOISE and call.key not in done and isinstance(call.network, MergedNetwork):
                    done.add(call.key)
                    call.network.prepare(call, tell, tokens)
            answers = [call.network.forward([call])[0] for call in calls]
            answer = answers[0] if isinstance(asked, StepCall) else answers

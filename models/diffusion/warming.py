"""The model's denoisers are compiled for the shapes that an operator expects, by way of a small picture of each kind.

The pipelines make the calls themselves, so what is compiled is what they will ask for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from core.errors import ModelFailed
from core.model import ModelSpec
from models.base import Item
from models.stepping import trial
from models.stepping.compiled import GRAPHS, MODES
from models.stepping.contract import Lane, StepCall, StepRun
from models.stepping.merge import TEXT_MULTIPLE, MergedNetwork

WORDS = "test"  # short: what texts are padded to is named by `compile_tokens`


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
    sizes_of(options)
    tokens_of(options)
    return mode


def sizes_of(options: Mapping[str, Any]) -> list[tuple[int, int]]:
    """The heights and widths that the option `compile_sizes` names, if any. Raises `ModelFailed`."""
    return trial.named_sizes(options, "compile_sizes") or []


def tokens_of(options: Mapping[str, Any]) -> list[int]:
    """The option `compile_tokens`: lengths of text for which to compile too. Raises `ModelFailed`."""
    found = options.get("compile_tokens") or []
    if not isinstance(found, (list, tuple)) or not all(type(one) is int and 0 < one <= 8192 and one % TEXT_MULTIPLE == 0
                                                       for one in found):
        raise ModelFailed(f"the model's option 'compile_tokens' must be a list of multiples of {TEXT_MULTIPLE}")
    return list(found)


def test_items(spec: ModelSpec, sizes: Sequence[tuple[int, int]], control: Sequence[str]) -> Iterator[Item]:
    """Requests at each of these heights and widths, or else at the usual one: one with what a request must have, and
    one with each of these kinds of control beside."""
    for size in sizes or [trial.usual_size(spec)]:
        plain = trial.request(spec, size, WORDS)
        yield plain
        for kind in control:
            grey = np.full((*size, 3), 128, np.uint8)
            yield replace(plain, params={**plain.params, "control_type": kind}, control=grey)


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

"""The prompt of `upscale` and `enhance`: what it names is done, what it does not name is left alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from models.base import Adapter, Item
from models.enhance import Enhance
from models.upscale import Upscale
from models.wishes import granted

torch.set_num_threads(1)
CPU = torch.device("cpu")
PICTURE = np.random.default_rng(5).integers(0, 256, (24, 32, 3), dtype=np.uint8)
MODELS: list[tuple[type[Adapter], dict[str, Any]]] = [
    (Upscale, {"scale": 2, "steps": 2, "sharpness": 0.5}), (Enhance, {"strength": 0.3, "guidance": 7.5})
]  # fmt: skip


def run(model: type[Adapter], *params: dict[str, Any]) -> list[np.ndarray]:
    outputs = model({}, CPU).run([Item(own, PICTURE.copy()) for own in params])
    return [output.image for output in outputs if output.image is not None]


@pytest.mark.parametrize("model, params", MODELS)
def test_a_prompt_changes_the_result_and_a_negative_prompt_takes_it_back(
    model: type[Adapter], params: dict[str, Any]
) -> None:
    bare, asked, undone = run(
        model, params, params | {"prompt": "black and white"},
        params | {"prompt": "black and white", "negative_prompt": "black and white"},
    )  # fmt: skip
    assert np.array_equal(bare, undone) and not np.array_equal(bare, asked)
    assert np.ptp(asked.astype(int), axis=2).max() <= 2, "black and white it is"


@pytest.mark.parametrize("model, params", MODELS)
def test_a_wish_does_not_spread_to_companions(model: type[Adapter], params: dict[str, Any]) -> None:
    wishes = ["", "sunset", "", "night, grain"]
    together = run(model, *[params | {"prompt": wish} for wish in wishes])
    alone = [run(model, params | {"prompt": wish})[0] for wish in wishes]
    assert all(np.array_equal(one, other) for one, other in zip(together, alone, strict=True))


@pytest.mark.parametrize("prompt", ["", "qwertz", "high quality, detailed, sharp", "mirror"])
def test_words_that_wish_for_nothing_leave_every_byte(prompt: str) -> None:
    item = Item({"prompt": prompt}, PICTURE)
    assert granted([item], CPU)[0].image is PICTURE

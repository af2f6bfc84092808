"""A job that nobody wants any more leaves its model between two parts of the work; its companions lose nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from core.errors import Cancelled
from models.base import Item, Output
from models.checkpoint import Abandoned, Later, OutOfTime, beating, checkpoint, parts, recallable, wanted_for
from tests.pure.model_kit import adapter, item, photo, photo_mask

SIZE = (208, 144)
LONG: dict[str, dict[str, Any]] = {
    "upscale": {"scale": 4}, "inpaint": {}, "enhance": {}, "edit": {"prompt": "oil painting"}, "style_comic": {},
    "style_aged": {}, "background_remove": {},
}  # fmt: skip


class Wish:
    """Says that its job is wanted, the first `lasts` times it is asked."""

    def __init__(self, lasts: float = float("inf")) -> None:
        self.lasts, self.asked = lasts, 0

    def gone(self) -> bool:
        self.asked += 1
        return self.asked > self.lasts


def ask(name: str, wish: Wish, picture: str = "rocket", **params: Any) -> Item:
    mask = photo_mask("rocket", SIZE) if name == "inpaint" else None
    one = item(name, photo(picture, SIZE), mask, **{**LONG[name], **params})
    one.cancelled = wish.gone
    return one


@pytest.mark.parametrize("name", LONG)
def test_a_model_looks_often_whether_it_is_still_wanted_and_leaves_when_it_is_not(name: str) -> None:
    model, whole = adapter(name), Wish()
    (done,) = model.run([ask(name, whole)])
    assert isinstance(done, Output) and whole.asked >= 4
    for share in (0, 0.3, 0.7):
        wish = Wish(int(whole.asked * share))
        (left,) = model.run([ask(name, wish)])
        assert isinstance(left, Cancelled)
        assert wish.asked <= wish.lasts + 4, "it went on though nobody wanted it"


@pytest.mark.parametrize("name", LONG)
def test_companions_of_a_cancelled_job_go_on_with_the_same_bytes(name: str) -> None:
    model = adapter(name)
    (alone,) = model.run([ask(name, Wish())])
    for lasts in (5, 40):
        outputs = model.run([ask(name, Wish(lasts), "cat"), ask(name, Wish()), ask(name, Wish(lasts), "coffee")])
        assert isinstance(alone, Output) and isinstance(outputs[1], Output)
        assert alone.image is not None and outputs[1].image is not None
        assert np.array_equal(alone.image, outputs[1].image)


def test_of_parameters_that_are_not_computed_together_one_kind_may_leave() -> None:
    outputs = adapter("upscale").run([ask("upscale", Wish(3), steps=7), ask("upscale", Wish(), steps=2)])
    assert isinstance(outputs[0], Cancelled) and isinstance(outputs[1], Output)


def test_a_checkpoint_asks_for_all_that_are_computed_and_for_none_outside() -> None:
    checkpoint()
    gone, here = Item({}, cancelled=lambda: True), Item({})
    with wanted_for([gone, here]):
        checkpoint()
        with wanted_for([gone]), pytest.raises(Abandoned):
            checkpoint()
        checkpoint()
    with wanted_for([]):
        checkpoint()


@pytest.mark.parametrize("name", LONG)
def test_a_model_that_takes_too_long_is_ended_at_a_checkpoint(name: str) -> None:
    beats = 0

    def beat() -> None:
        nonlocal beats
        beats += 1
        if beats == 4:
            raise OutOfTime

    with beating(beat), pytest.raises(OutOfTime):
        adapter(name).run([ask(name, Wish()), ask(name, Wish())])
    checkpoint()
    assert beats == 4, "outside of the block nobody counts"


@pytest.mark.parametrize("name", LONG)
def test_items_run_one_by_one_on_a_cpu_are_handed_over_one_by_one_and_the_rest_can_be_recalled(name: str) -> None:
    handed: list[Any] = []
    asked = [ask(name, Wish(), picture) for picture in ("cat", "rocket", "coffee")]
    for one in asked:
        one.done = handed.append
    with recallable(lambda: len(handed) >= 2):
        outputs = adapter(name).run(asked)
    assert len(handed) == 2, "each was handed over before the next began"
    assert isinstance(outputs[0], Output) and isinstance(outputs[1], Output) and isinstance(outputs[2], Later)


def test_the_first_part_is_always_run_so_that_a_recalled_batch_has_done_something() -> None:
    with recallable(lambda: True):
        outputs = adapter("style_aged").run([ask("style_aged", Wish()) for _ in range(2)])
    assert isinstance(outputs[0], Output) and isinstance(outputs[1], Later)


def test_a_gpu_still_computes_as_many_together_as_fit() -> None:
    items = [Item({}) for _ in range(5)]
    assert [len(part) for part in parts(items, torch.device("cuda"), 2)] == [2, 2, 1]
    assert [len(part) for part in parts(items, torch.device("cuda"), 0)] == [1] * 5
    assert [len(part) for part in parts(items, torch.device("cpu"), 4)] == [1] * 5

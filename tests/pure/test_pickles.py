"""Dataclasses that are pickled by position come back as they were."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from typing import Any

import pytest

from core.header import ImageHeader
from core.pickles import by_position
from core.request import ImagePart, OutputFormat, Span
from workers.messages import BatchDone, Drop, Finished, ItemsDone, RunBatch, RunItem


@by_position
@dataclass(frozen=True, slots=True)
class Single:
    """One field only."""

    values: tuple[int, ...]


SPAN = Span(4096, 100, 8192)
PART = ImagePart("image", SPAN, ImageHeader("png", 3, 4, orientation=6, alpha=True), 100)
ITEM = RunItem("a", (PART,), {"seed": 1}, OutputFormat("jpeg", quality=70), SPAN, (480, 640))


@pytest.mark.parametrize("whole", [
    Single((1, 2)), Single(()), SPAN, PART, RunBatch(7, "echo", (ITEM, ITEM)), Drop(7, "a"),
    ItemsDone(7, (Finished("a", 5, "png", 3, 4, {"decode": 0.5}, {"seed": 1}),)), BatchDone(7, 0.25),
])  # fmt: skip
def test_what_is_pickled_by_position_comes_back_equal(whole: Any) -> None:
    assert pickle.loads(pickle.dumps(whole, protocol=5)) == whole
    assert copy.deepcopy(whole) == whole
    assert b"dataclass" not in pickle.dumps(whole, protocol=5)
    kind, values = whole.__reduce__()
    assert kind is type(whole) and kind(*values) == whole

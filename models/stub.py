"""Stand-ins for tests and benches: `Stub` takes a known time and can misbehave on command, `Echo` gives bytes back."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from models.base import Adapter, Item, Output

TOKEN = re.compile(r"[a-z0-9-]{1,64}")


class Stub(Adapter):
    """Inverts colours and adds `offset` to every byte (modulo 256); see `expected`. A batch takes max(base_ms) +
    sum(per_item_ms) over its items.

    `act` says what else happens, before the result: none; sleep (`seconds` longer); hang (for ever); crash (SIGSEGV to
    its own process); exit (os._exit(1)); oom (does not fit while the batch has more than `fits` items); raise; garbage
    (an array that is no picture); nan (floats, all NaN); black (zeros, the right shape); slow_progress (reports tenths
    over `seconds`). With `once`, a token, an act happens only for the first that names it: a marker file in the folder
    of the option `folder` remembers it across processes.
    """

    @torch.inference_mode()
    def run(self, items: Sequence[Item]) -> list[Output]:
        acts = [str(item.params.get("act", "none")) if self._first(item) else "none" for item in items]
        for item, act in zip(items, acts, strict=True):
            self._misbehave(item, act, len(items))
        base = max(float(item.params.get("base_ms", 0.0)) for item in items)
        each = sum(float(item.params.get("per_item_ms", 0.0)) for item in items)
        time.sleep((base + each) / 1000)
        return [self._output(item, act) for item, act in zip(items, acts, strict=True)]

    def _misbehave(self, item: Item, act: str, size: int) -> None:
        seconds = float(item.params.get("seconds", 0.0))
        if act == "sleep":
            _wait(item, seconds)
        elif act == "slow_progress":
            for tenth in range(1, 11):
                _wait(item, seconds / 10)
                item.report(tenth / 10)
        elif act == "hang":
            while True:
                time.sleep(3600)
        elif act == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif act == "exit":
            os._exit(1)
        elif act == "oom" and size > int(item.params.get("fits", 0)):
            raise torch.cuda.OutOfMemoryError(f"stub: a batch of {size} does not fit")
        elif act == "raise":
            raise RuntimeError("stub: told to raise")

    def _output(self, item: Item, act: str) -> Output:
        assert item.image is not None
        h, w = item.image.shape[:2]
        wrong = {
            "garbage": lambda: np.zeros((3, h + 1, w, 2), np.uint8),
            "nan": lambda: np.full((h, w, 3), np.nan, np.float32),
            "black": lambda: np.zeros((h, w, 3), np.uint8),
        }
        image = wrong[act]() if act in wrong else expected(item.image, int(item.params.get("offset", 0)))
        return Output(image, facts={"act": act})

    def _first(self, item: Item) -> bool:
        """Whether the item's act is due: always without `once`, else for the first who makes the marker."""
        token = str(item.params.get("once", ""))
        if not token:
            return True
        if not TOKEN.fullmatch(token) or not self.options.get("folder"):
            raise ValueError("stub: `once` needs a token of a-z, 0-9 and -, and the model's option `folder`")
        try:
            (Path(str(self.options["folder"])) / f"{token}.once").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


def expected(image: np.ndarray, offset: int = 0) -> np.ndarray:
    """What `Stub` makes of uint8 H x W x 3; applied twice with offset 0 it gives the picture back."""
    return (255 - image.astype(np.int16) + offset).astype(np.uint8)


def _wait(item: Item, seconds: float) -> None:
    """Sleep, ended early when nobody wants the result."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and not item.cancelled():
        time.sleep(min(left, 0.02))


class Echo(Adapter):
    """Gives every item's bytes back, after base_ms + per_item_ms x items: the overhead benchmark. The options hold the
    times; a parameter other than -1 overrides them."""

    def run(self, items: Sequence[Item]) -> list[Output]:
        base = max(self._time(item, "base_ms") for item in items)
        time.sleep((base + sum(self._time(item, "per_item_ms") for item in items)) / 1000)
        return [Output(data=item.data) for item in items if item.data is not None]

    def _time(self, item: Item, name: str) -> float:
        own = float(item.params.get(name, -1))
        return own if own >= 0 else float(self.options.get(name, 0.0))

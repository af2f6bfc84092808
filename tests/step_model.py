"""A stepped model for tests: it takes a known time per forward, adds up what it is told, and misbehaves on command.

Each step makes of every byte x the byte 3 x + add (modulo 256), so a result tells how often it was stepped and with
what, and whether rows were mixed up. Calls of pictures of one size share a forward.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.base import Adapter, Item, Output
from models.stepping.contract import Lane, StepAdapter, StepCall
from models.stub import Stub

SPEC = """
adapter = "tests.step_model:Adder"
task = "stub"
stepped = true
steps_param = "steps"
timeout = {timeout}
takes = {{image = [0, 1]}}
[options]
folder = "{folder}"
[params.steps]
type = "int"
default = 5
min = 1
max = 1000
[params.add]
type = "int"
default = 1
[params.forward_ms]
type = "float"
default = 5.0
[params.act]
type = "string"
default = "none"
choices = ["none", "hang", "crash", "raise", "oom", "slow", "start", "encode"]
[params.at]
type = "int"
default = 0
[params.fits]
type = "int"
default = 0
[params.once]
type = "string"
default = ""
[params.width]
type = "int"
default = 0
[params.height]
type = "int"
default = 0
"""


def write_spec(models: Path, timeout: float = 30.0) -> None:
    """A model folder that offers `adder`; its memory of acts that were to happen once lies there too."""
    models.mkdir(exist_ok=True)
    (models / "adder.toml").write_text(SPEC.format(folder=models, timeout=timeout))


def expected(image: np.ndarray, steps: int = 5, add: int = 1) -> np.ndarray:
    """What `Adder` makes of uint8 H x W x 3."""
    for _ in range(steps):
        image = (image.astype(np.int64) * 3 + add).astype(np.uint8)
    return image


class Network:
    """Sleeps as long as the slowest of its calls wants."""

    name = "adder"

    def __init__(self, folder: str) -> None:
        self.forwards: list[int] = []  # the rows of each
        self._folder = folder

    def forward(self, calls: Sequence[StepCall]) -> list[Any]:
        self.forwards.append(len(calls))
        for call in calls:
            self._misbehave(call, len(calls))
        time.sleep(max(call.kwargs["forward_ms"] for call in calls) / 1000)
        return [(call.args[0] * 3 + call.kwargs["add"]) % 256 for call in calls]

    def _misbehave(self, call: StepCall, rows: int) -> None:
        act, token = call.kwargs["act"], call.kwargs["once"]
        if act == "none" or not self._first(token):
            return
        if act == "hang":
            time.sleep(3600)
        elif act == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif act == "oom" and rows > call.kwargs["fits"]:
            raise torch.OutOfMemoryError("adder: told not to fit")
        elif act == "raise":
            raise RuntimeError("adder: told to raise")
        elif act == "slow":
            time.sleep(0.5)

    def _first(self, token: str) -> bool:
        if not token:
            return True
        try:
            (Path(self._folder) / f"{token}.once").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


class Endless(Mapping[str, Any]):
    """Facts that nobody comes to the end of: whoever encodes the result hangs."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, name: str) -> Any:
        return name

    def __iter__(self) -> Iterator[str]:
        time.sleep(3600)
        yield "never"


class Adder(StepAdapter):
    """Options: `folder`, where it notes what happened; `load_seconds` that its weights take; while the file `stay` is
    there, they never come."""

    def load(self) -> None:
        note(self, "loading")
        time.sleep(float(self.options.get("load_seconds", 0.0)))
        linger(self)
        self.network = Network(str(self.options.get("folder", "")))

    def close(self) -> None:
        note(self, "closed")

    def start(self, item: Item) -> Drawing:
        if item.params["act"] == "start":
            raise RuntimeError("adder: told not to start")
        return Drawing(item, self.network)

    def remaining(self, item: Item) -> float:
        return float(item.params["steps"])


class Drawing:
    """One picture's run; `progress` and `preview` as a pipeline's run has them."""

    def __init__(self, item: Item, network: Network) -> None:
        self.progress = 0.0
        self.preview: np.ndarray | None = None
        self._run = self._draw(item, network)

    def send(self, answer: Any, /) -> Any:
        return self._run.send(answer)

    def throw(self, fault: BaseException, /) -> Any:
        return self._run.throw(fault)

    def close(self) -> None:
        self._run.close()

    def _draw(self, item: Item, network: Network) -> Generator[StepCall, Any, Output]:
        params = item.params
        image = item.image if item.image is not None else np.zeros((*item.size, 3), np.uint8)
        state = torch.from_numpy(image.astype(np.int64))
        for step in range(int(params["steps"])):
            wanted = {name: params[name] for name in ("add", "forward_ms", "fits", "once")}
            wanted["act"] = params["act"] if step == params["at"] else "none"
            key = (network, tuple(state.shape))
            state = yield StepCall(network, (state,), wanted, 1, key, Lane.DENOISE)
            self.progress = (step + 1) / int(params["steps"])
            self.preview = state.numpy().astype(np.uint8)
        facts = Endless() if params["act"] == "encode" else {"steps": int(params["steps"])}
        return Output(state.numpy().astype(np.uint8), facts=facts)


class SlowStub(Stub):
    """The ordinary model for tests; it loads as `Adder` does."""

    def load(self) -> None:
        note(self, "loading")
        time.sleep(float(self.options.get("load_seconds", 0.0)))
        linger(self)

    def close(self) -> None:
        note(self, "closed")


def note(adapter: Adapter, what: str) -> None:
    """A line in the folder, for tests to read."""
    if folder := str(adapter.options.get("folder", "")):
        with Path(folder, "life.txt").open("a") as file:
            file.write(f"{what} {type(adapter).__name__}\n")


def linger(adapter: Adapter) -> None:
    """As long as the file is there; it is taken away so that the next life does better."""
    stay = Path(str(adapter.options.get("folder", "")), "stay")
    if stay.is_file():
        stay.unlink()
        time.sleep(3600)

"""The stub keeps its promises, so that tests built on it mean something. Crashes and hangs act in a child process."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.base import Item
from models.stub import Echo, Stub, expected
from tests.pure.picture_kit import ROOT, params, random_picture, spec

CPU = torch.device("cpu")
STUB = Stub({}, CPU)


def item(image: np.ndarray | None = None, **given: Any) -> Item:
    return Item(params("stub", given), random_picture(8, 9) if image is None else image)


def test_the_result_tells_which_image_it_was_made_of() -> None:
    images = [random_picture(5, 7, seed) for seed in range(3)]
    outputs = STUB.run([item(image, offset=i) for i, image in enumerate(images)])
    for i, (image, output) in enumerate(zip(images, outputs, strict=True)):
        assert output.image is not None and np.array_equal(output.image, expected(image, i))
        assert not np.array_equal(output.image, image)
    assert np.array_equal(expected(expected(images[0])), images[0])


def test_a_batch_takes_the_longest_base_and_the_sum_of_the_items(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("models.stub.time.sleep", slept.append)
    STUB.run([item(base_ms=5, per_item_ms=1), item(base_ms=20, per_item_ms=2), item()])
    assert slept == [pytest.approx(0.023)]


def test_oom_only_while_the_batch_is_too_large() -> None:
    with pytest.raises(torch.cuda.OutOfMemoryError):
        STUB.run([item(act="oom", fits=1), item()])
    assert STUB.run([item(act="oom", fits=1)])[0].image is not None


def test_told_to_raise_it_raises() -> None:
    with pytest.raises(RuntimeError, match="told to raise"):
        STUB.run([item(), item(act="raise")])


def test_bad_outputs_are_bad_in_the_way_they_say() -> None:
    garbage, nan, black = (STUB.run([item(act=act)])[0].image for act in ("garbage", "nan", "black"))
    assert garbage is not None and garbage.ndim == 4
    assert nan is not None and np.isnan(nan).all()
    assert black is not None and black.shape == (8, 9, 3) and not black.any()


def test_slow_progress_tells_every_tenth_and_a_cancelled_sleep_ends() -> None:
    told: list[float] = []
    slow = item(act="slow_progress")
    slow.report = told.append
    STUB.run([slow])
    assert told == [pytest.approx(n / 10) for n in range(1, 11)]
    gone = item(act="sleep", seconds=3000)
    gone.cancelled = lambda: True
    assert STUB.run([gone])[0].image is not None


def test_once_acts_for_the_first_and_for_nobody_else(tmp_path: Path) -> None:
    stub = Stub({"folder": str(tmp_path)}, CPU)
    with pytest.raises(RuntimeError):
        stub.run([item(act="raise", once="job-1")])
    assert stub.run([item(act="raise", once="job-1")])[0].image is not None
    with pytest.raises(RuntimeError):
        stub.run([item(act="raise", once="job-2")])


@pytest.mark.parametrize("token", ["../up", "A", "a/b", "a.b", "x" * 65])
def test_a_token_that_could_be_a_path_is_refused(token: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="token"):
        Stub({"folder": str(tmp_path)}, CPU).run([item(act="raise", once=token)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("act", "code"), [("crash", -signal.SIGSEGV), ("exit", 1)])
def test_crash_and_exit_end_the_process_and_no_clean_up_runs(act: str, code: int) -> None:
    program = (
        "import atexit, numpy, torch; from models.base import Item; from models.stub import Stub\n"
        "atexit.register(print, 'cleaned up')\n"
        f"Stub({{}}, torch.device('cpu')).run([Item({{'act': {act!r}}}, numpy.zeros((2, 2, 3), numpy.uint8))])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, timeout=120, check=False)
    assert done.returncode == code, done.stderr
    assert b"cleaned up" not in done.stdout


def test_the_stubs_are_not_offered_beside_the_real_models() -> None:
    assert not {"stub", "echo"} & {file.stem for file in (ROOT / "models" / "repository").glob("*.toml")}
    assert spec("echo").raw and spec("echo").max_batch == 8


def test_echo_gives_equal_bytes_and_its_times_come_from_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("models.stub.time.sleep", slept.append)
    bodies = [bytes([i]) * 1000 for i in range(4)]
    echo = Echo(spec("echo").options, CPU)
    outputs = echo.run([Item(params("echo", {}), data=memoryview(body)) for body in bodies])
    assert [output.data for output in outputs] == bodies
    echo.run([Item(params("echo", {"base_ms": 0.0, "per_item_ms": 0.0}), data=memoryview(bodies[0]))])
    assert slept == [pytest.approx(0.007), 0.0]

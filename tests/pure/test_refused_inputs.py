"""What a stock pipeline itself finds wrong with a request is told so, in its words; what comes later is a failure."""

from __future__ import annotations

from typing import Any

import pytest
from diffusion_kit import item, model, outputs, stock

from core.errors import InvalidParameter
from models.base import Output
from models.stepping.contract import Lane, StepCall
from models.stepping.rendezvous import Networks, PipelineRun, SharedPipeline


def run_of(**arguments: Any) -> PipelineRun:
    shared = SharedPipeline(stock("sd15"), Networks())
    usual = {"prompt": "a cat", "num_inference_steps": 2, "height": 64, "width": 64}
    return shared.start({**usual, **arguments}, lambda result: Output())


def drive(run: PipelineRun, fault: Exception | None = None, at: Lane | None = None) -> None:
    """To its end; `fault` is what the first call of the lane comes to."""
    answer: Any = None
    call = run.send(None)
    while True:
        try:
            if call.lane is at and fault is not None:
                raised, fault = fault, None
                call = run.throw(raised)
                continue
            answer = call.network.forward([call])[0]
            call = run.send(answer)
        except StopIteration:
            return


def refusal(**arguments: Any) -> str:
    with pytest.raises(InvalidParameter) as refused:
        drive(run_of(**arguments))
    assert not refused.value.retryable and refused.value.code == "invalid_parameter"
    return refused.value.message


def test_what_a_pipeline_refuses_is_told_in_its_words() -> None:
    told = refusal(height=65)
    assert told == ("the model does not take this request: `height` and `width` have to be divisible by 8 but are 65 "
                    "and 64.")
    assert "`prompt` has to be of type" in refusal(prompt=7)
    assert "num_inference_steps" in refusal(num_inference_steps=2000)  # the scheduler's own word, after the encoder


def test_folders_in_its_words_stay_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def check_inputs(self: Any, *_: Any, **__: Any) -> None:
        raise TypeError("cannot use /home/me/models/tiny/unet\nand more")

    monkeypatch.setattr(type(stock("sd15")), "check_inputs", check_inputs)
    assert refusal() == "the model does not take this request: cannot use 'unet'"


def test_after_the_first_step_it_is_a_failure() -> None:
    def late(*_: Any) -> dict[str, Any]:
        raise ValueError("too late")

    with pytest.raises(ValueError, match=r"^too late$"):
        drive(run_of(callback_on_step_end=late))


@pytest.mark.parametrize("lane", [Lane.ENCODE, Lane.DENOISE, Lane.DECODE])
def test_what_a_network_raises_is_a_failure(lane: Lane) -> None:
    with pytest.raises(ValueError, match=r"^of the network$"):
        drive(run_of(), ValueError("of the network"), lane)


def test_other_exceptions_and_our_own_mistakes_are_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="no_such_argument"):
        shared = SharedPipeline(stock("flux"), Networks())
        drive(shared.start({"prompt": "a cat", "no_such_argument": 1}, lambda result: Output()))

    def check_inputs(self: Any, *_: Any, **__: Any) -> None:
        raise KeyError("defect")

    monkeypatch.setattr(type(stock("sd15")), "check_inputs", check_inputs)
    with pytest.raises(KeyError):
        drive(run_of())


def test_a_refused_request_leaves_the_others_alone() -> None:
    ends = model("flux").run([item(), item(max_sequence_length=4000), item(seed=1)])
    assert isinstance(ends[1], InvalidParameter) and "`max_sequence_length`" in ends[1].message
    assert [type(end) for end in (ends[0], ends[2])] == [Output, Output]
    assert outputs(model("flux"), item())


def test_a_call_is_what_it_waits_for_until_then() -> None:
    run = run_of()
    assert isinstance(run.send(None), StepCall)
    run.close()

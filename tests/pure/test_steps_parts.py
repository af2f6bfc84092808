"""The parts of the step machinery by themselves: a pipeline's run, columns, filled rows, moving out to the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from step_kit import CPU, Desk, alone, of, picture, stock
from torch import nn

from core.errors import Cancelled, InvalidParameter
from models.base import Item, Output
from models.diffusion.qwen_processor import load_processor
from models.stepping.columns import Alone, OnePerSample, OneShape, Private, Samples, Shared
from models.stepping.contract import Lane, StepAdapter, StepCall
from models.stepping.merge import MergedNetwork, each_tensor
from models.stepping.rendezvous import Networks, SharedPipeline
from models.stepping.shelter import Shelter
from models.stepping.stepper import run_all
from tests import tiny_models

# --- a run ----------------------------------------------------------------------------------------------------------


class Half(nn.Module):
    """A network of no known class."""

    dtype = torch.float32

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return sample / 2


class Pipeline:
    """What a run needs of a diffusers pipeline: components, and a call."""

    def __init__(self, unet: Any) -> None:
        self.unet = unet
        self.cleaned = 0

    @property
    def components(self) -> dict[str, Any]:
        return {"unet": self.unet}

    def __call__(self, steps: int, stubborn: bool = False) -> list[torch.Tensor]:
        assert isinstance(self.unet, Half) and self.unet.dtype is torch.float32
        self.unet.to("meta")
        sample = torch.ones(1, 2)
        try:
            for _ in range(steps):
                try:
                    sample = self.unet(sample)
                except ZeroDivisionError:
                    sample = sample * 0
        finally:
            type(self).cleaned_up.append(steps)
            if stubborn:
                self.unet(sample)
        return [sample]

    cleaned_up: list[int] = []  # noqa: RUF012


def start(**arguments: Any):
    Pipeline.cleaned_up.clear()
    return SharedPipeline(Pipeline(Half()), Networks()).start(
        arguments, lambda result: Output(facts={"value": float(result[0][0, 0])})
    )


def answered(call: StepCall) -> Any:
    return call.network.forward([call])[0]


def finish(run: Any, call: StepCall) -> Output:
    with pytest.raises(StopIteration) as end:
        while True:
            call = run.send(answered(call))
    return end.value.value


def test_a_run_stops_at_each_call_and_ends_with_its_output():
    run = start(steps=3)
    call = run.send(None)
    assert (call.rows, call.lane, call.network.name) == (1, Lane.DENOISE, "unet")
    assert finish(run, call).facts == {"value": 0.125}


def test_runs_take_turns_in_any_order():
    first, second = start(steps=2), start(steps=3)
    one, two = first.send(None), second.send(None)
    two = second.send(answered(two))
    assert finish(first, one).facts == {"value": 0.25}
    assert finish(second, two).facts == {"value": 0.125}


def test_a_fault_is_raised_where_the_pipeline_waits():
    run = start(steps=3)
    run.send(None)
    call = run.throw(ZeroDivisionError())
    assert finish(run, call).facts == {"value": 0}
    run = start(steps=3)
    run.send(None)
    with pytest.raises(Cancelled):
        run.throw(Cancelled("by somebody"))
    assert Pipeline.cleaned_up == [3]


@pytest.mark.parametrize("stubborn", [False, True])
def test_a_closed_run_leaves_and_is_refused_further_calls(stubborn):
    run = start(steps=3, stubborn=stubborn)
    run.send(None)
    run.close()
    assert Pipeline.cleaned_up == [3]
    run.close()
    run = start(steps=1)
    run.close()  # it had not begun
    assert Pipeline.cleaned_up == []


def test_what_a_pipeline_says_of_its_arguments_comes_out():
    run = start(steps=None)
    with pytest.raises(InvalidParameter, match="NoneType"):
        run.send(None)


def test_pipelines_that_share_a_module_share_its_network():
    networks = Networks()
    unet = stock("sd15").unet
    assert networks.of("unet", unet, Lane.DENOISE) is networks.of("unet", unet, Lane.DENOISE)
    assert networks.of("unet", unet, Lane.DENOISE) is not networks.of("unet", stock("sdxl").unet, Lane.DENOISE)


# --- columns --------------------------------------------------------------------------------------------------------


def test_samples_are_joined_in_whatever_holds_them():
    column, one, two = Samples(), torch.zeros(1, 3), torch.ones(2, 3)
    assert column.key(one, 1) == column.key(two, 2) != column.key(two.double(), 2)
    assert column.key({"a": [one], "b": None}, 1) == column.key({"b": None, "a": [two]}, 2)
    assert column.key([one], 1) != column.key([one, one], 1)
    joined = column.join([{"a": (one, one)}, {"a": (two, two)}], [1, 2], CPU)
    assert joined["a"][1].tolist() == [[0] * 3, [1] * 3, [1] * 3]
    for value in (torch.tensor(1.0), two, object()):
        with pytest.raises(Alone):
            column.key(value, 1)


def test_one_number_or_one_for_each_sample():
    column = OnePerSample()
    values = [torch.tensor(7), torch.tensor([1.5, 2.5]), 3, torch.tensor([4])]
    assert column.join(values, [2, 2, 1, 2], CPU).tolist() == [7, 7, 1.5, 2.5, 3, 4, 4]
    assert len({column.key(value, rows) for value, rows in zip(values, [2, 2, 1, 2], strict=True)}) == 1
    for value in (torch.zeros(3), torch.zeros(2, 1)):
        with pytest.raises(Alone):
            column.key(value, 2)


def test_shared_tensors_are_compared_by_what_is_in_them():
    column, ids = Shared(), torch.arange(6.0).reshape(2, 3)
    assert column.key(ids, 1) == column.key(ids.clone(), 2)
    assert column.key(ids, 1) != column.key(ids + 1, 1)
    assert column.key(ids, 1) != column.key(ids.reshape(3, 2), 1)
    assert column.key(ids[None], 1) == column.key(ids[None].expand(4, 2, 3), 4) != column.key(ids, 1)
    before = column.key(ids, 1)
    ids += 1
    assert column.key(ids, 1) != before
    with torch.inference_mode():
        assert column.key(torch.ones(2), 1) == column.key(torch.ones(2), 1)
    assert column.key(torch.ones(2, dtype=torch.bfloat16), 1) is not None


def test_one_shape_for_all_samples_or_none_at_all():
    column = OneShape()
    assert column.key([[(1, 4, 8)]], 2) == column.key([[(1, 4, 8)]] * 3, 3) != column.key([[(1, 8, 4)]], 1)
    assert column.join([[[(1, 4, 8)]], [[(1, 4, 8)]] * 2], [2, 2], CPU) == [[(1, 4, 8)]] * 4
    with pytest.raises(Alone):
        column.key([[(1, 4, 8)], [(1, 8, 4)]], 2)
    with pytest.raises(Alone):
        Private().key("extract", 1)


# --- merged forwards ------------------------------------------------------------------------------------------------


class UNet2DConditionModel(nn.Module):
    """Of a known class's name and parameters, so that its table is used; it remembers what it was given."""

    def forward(self, sample, timestep, encoder_hidden_states=None, return_dict=True):
        self.given = sample, timestep
        answer = sample + timestep.reshape(-1, 1)
        return UNet2DConditionOutput(sample=answer) if return_dict else (answer,)


def calls(network: MergedNetwork, *rows: int, **more: Any) -> list[StepCall]:
    return [network.call((torch.full((count, 2), float(n)), torch.tensor(10 * n)), more)
            for n, count in enumerate(rows)]


def test_an_answer_keeps_its_class_and_is_cut_into_everybodys_rows():
    network = MergedNetwork("unet", UNet2DConditionModel(), Lane.DENOISE)
    answers = network.forward(calls(network, 1, 2, 1))
    assert [type(one) for one in answers] == [UNet2DConditionOutput] * 3
    assert [one.sample.tolist() for one in answers] == [[[0, 0]], [[11, 11]] * 2, [[22, 22]]]
    ((first,), (second,)) = network.forward(calls(network, 1, 1, return_dict=False))
    assert (first.tolist(), second.tolist()) == ([[0, 0]], [[11, 11]])
    assert network.given[1].tolist() == [0, 10] if hasattr(network, "given") else True


@pytest.mark.parametrize(("rows", "wanted"), [((1,), 2), ((2,), 2), ((2, 1), 6), ((2, 2, 2), 6), ((2, 4, 1), 12)])
def test_rows_are_filled_up_to_a_size(rows, wanted):
    module = UNet2DConditionModel()
    network = MergedNetwork("unet", module, Lane.DENOISE, row_sizes=(6, 2))
    answers = network.forward(calls(network, *rows))
    assert len(module.given[0]) == len(module.given[1]) == wanted
    assert [one.sample.tolist() for one in answers] == [[[11 * n] * 2] * count for n, count in enumerate(rows)]


def test_an_answer_that_is_not_by_rows_is_not_handed_out():
    class Odd(UNet2DConditionModel):
        def forward(self, sample, timestep, encoder_hidden_states=None, return_dict=True):
            return (sample.sum(),)

    Odd.__name__ = "UNet2DConditionModel"
    network = MergedNetwork("unet", Odd(), Lane.DENOISE)
    with pytest.raises(ValueError, match="not one entry for each of 2 rows"):
        network.forward(calls(network, 1, 1))
    assert each_tensor({"a": None}, torch.neg) == {"a": None}


# --- to the host and back -------------------------------------------------------------------------------------------


def call_with(**tensors: torch.Tensor) -> StepCall:
    return StepCall(None, (), {"nested": [tensors], "number": 3}, 1, "key", Lane.DENOISE)  # type: ignore[arg-type]


def test_where_the_device_is_the_host_nothing_moves():
    shelter, tensor = Shelter(CPU), torch.ones(3)
    address = tensor.data_ptr()
    assert shelter.move_out([call_with(a=tensor)]) == 0
    assert shelter.bring_back([call_with(a=tensor)]) == 0
    assert tensor.data_ptr() == address


class Elsewhere(Shelter):
    """Moves to other host memory, and counts. What is away is of no use."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self._needed = True
        self.out = self.back = 0

    def _out(self, tensor: torch.Tensor) -> torch.Tensor:
        self.out += 1
        self.kept = getattr(self, "kept", {}) | {id(tensor): tensor.clone()}
        return torch.full_like(tensor, 99)

    def _back(self, tensor: torch.Tensor) -> torch.Tensor:
        self.back += 1
        return self.kept.pop(id(tensor))


def test_tensors_move_in_place_once_and_weights_stay():
    shelter, shared, own, weight = Elsewhere(), torch.ones(3), torch.ones(4), nn.Parameter(torch.ones(5))
    one, two = call_with(a=shared, b=own, c=weight), call_with(a=shared)
    assert shelter.move_out([one, two]) == 4 * 7 and shelter.out == 2
    assert shelter.move_out([one]) == 0
    assert (float(shared[0]), float(own[0]), float(weight[0])) == (99, 99, 1)
    assert shelter.bring_back([two]) == 1 and float(shared[0]) == 1
    assert shelter.bring_back([one]) == 1 and float(own[0]) == 1 and shelter.back == 2
    assert shelter.bring_back([one, two]) == 0


def test_what_finds_no_room_on_its_way_back_is_still_away_and_comes_later():
    shelter, tensor = Elsewhere(), torch.ones(3)
    call, back = call_with(a=tensor), shelter._back
    shelter.move_out([call])

    def no_room(_):
        raise torch.OutOfMemoryError

    shelter._back = no_room
    with pytest.raises(torch.OutOfMemoryError):
        shelter.bring_back([call])
    shelter._back = back
    assert shelter.bring_back([call]) == 1 and float(tensor[0]) == 1


@pytest.mark.parametrize("step", range(3))
def test_a_request_that_waits_on_the_host_at_any_step_has_the_same_image(step):
    request = of(prompt="a cat", num_inference_steps=3, seed=1, width=64, height=64)
    shelter = Elsewhere()
    desk = Desk("sd15", shelter=shelter)
    desk.join(0, request)
    for _ in range(step + 2):
        desk.stepper.advance()
    assert shelter.move_out(one.call for one in desk.stepper._parked.values()) > 0
    assert torch.equal(desk.until_done().image(0), alone("sd15", request))
    assert shelter.out == shelter.back == 3  # latents, timestep, words


def test_when_a_call_does_not_fit_alone_the_others_make_room(monkeypatch):
    requests = [of(prompt="a cat", num_inference_steps=2, seed=n, width=64, height=64) for n in range(3)]
    shelter, plain = Elsewhere(), MergedNetwork.forward
    desk = Desk("sd15", shelter=shelter)

    def forward(network, aboard):
        if aboard[0].lane is Lane.DENOISE and (len(aboard) > 1 or not shelter.out):
            raise torch.OutOfMemoryError("out of memory")
        return plain(network, aboard)

    desk.batcher._most_rows = 2
    monkeypatch.setattr(MergedNetwork, "forward", forward)
    told = desk.until_done(requests)
    assert shelter.out == shelter.back > 0
    assert all(float((told.image(n) - alone("sd15", one)).abs().max()) <= 1e-5 for n, one in enumerate(requests))


# --- a whole batch --------------------------------------------------------------------------------------------------


class Doubling(StepAdapter):
    """Doubles a number so often as an item wants."""

    def start(self, item):
        network = MergedNetwork("unet", UNet2DConditionModel(), Lane.DENOISE)
        value = torch.zeros(1, 1)
        for _ in range(item.params["steps"]):
            value = (yield network.call((value, torch.tensor(1)), {"return_dict": False}))[0]
        return Output(facts={"value": float(value)})


def test_an_adapter_runs_a_batch_by_itself_and_leaves_gradients_as_they_were():
    torch.set_grad_enabled(True)  # other tests' steppers have switched them off in this thread
    ends = Doubling({}, CPU).run([Item({"steps": 2}), Item({"steps": 5}), Item({"steps": 1}, cancelled=lambda: True)])
    assert [one.facts["value"] for one in ends[:2]] == [2, 5] and isinstance(ends[2], Cancelled)
    assert torch.is_grad_enabled()
    with torch.inference_mode():  # as a worker calls models
        assert Doubling({}, CPU).run([Item({"steps": 3})])[0].facts["value"] == 3
    assert run_all(Doubling({}, CPU), []) == []


# --- Qwen's processor -----------------------------------------------------------------------------------------------


def test_qwens_processor_reads_text_and_pictures_and_saves_as_the_usual_one():
    processor = load_processor(tiny_models.folder("qwen-image-edit"))
    read = processor(text=["<|vision_start|><|image_pad|><|vision_end|>a cat"], images=[picture(1, 56, 84)],
                     return_tensors="pt")
    assert read["image_grid_thw"].tolist() == [[1, 6, 4]]
    assert (read["input_ids"] == processor.image_token_id).sum() == 6 * 4 // 4
    assert not hasattr(processor, "video_processor") or processor.video_processor is None
    assert (type(processor).__name__, type(processor).__module__.split(".")[0]) == ("Qwen2VLProcessor", "transformers")



"""Which weights are on the device: the policy, the moves, models that share a device or are larger than it."""

from __future__ import annotations

import gc

import pytest
import torch
from diffusion_kit import CPU, build, folder_of, hole, images, item, model, picture, same
from hypothesis import given
from hypothesis import strategies as st
from step_kit import Fifo
from torch import nn

from core.errors import OutOfMemory
from models.base import DoesNotFit
from models.diffusion import adapter
from models.diffusion.memory import DeviceMemory, HostedModule, refuse_too_large, sizes_of
from models.diffusion.residency import SETTLE_FORWARDS, SETTLE_SECONDS, Residency
from models.stepping.stepper import StepEvents, Stepper


class Travelling(HostedModule):
    """On a CPU nothing travels. Here weights that are away are NaN, so a forward without them is noticed."""

    def __init__(self, module, device):
        super().__init__(module, device)
        self.away = {}
        self.drop()

    def bring(self, keep):
        for tensor in self._tensors():
            tensor.data = self.away.pop(tensor, tensor.data)

    def drop(self):
        for tensor in self._tensors():
            self.away[tensor] = tensor.data
            tensor.data = torch.full_like(tensor.data, float("nan") if tensor.is_floating_point() else 1)


def pretended(monkeypatch, budget: int) -> DeviceMemory:
    """A device of so many bytes for all models that are loaded from now on."""
    memory = DeviceMemory(CPU, budget, clock=lambda: 0.0, host=Travelling)
    monkeypatch.setattr(adapter, "memory_of", lambda device: memory)
    return memory


def weights(kind: str) -> dict[str, int]:
    return sizes_of(model(kind)._base.components)


# --- the policy -------------------------------------------------------------------------------------------------------


@given(st.integers(10, 100), st.lists(st.tuples(st.integers(0, 7), st.floats(0, 3)), max_size=200), st.data())
def test_the_budget_is_never_exceeded_and_who_runs_is_there(budget, uses, data):
    residency, now = Residency(budget), 0.0
    for name in range(8):
        residency.enter(name, data.draw(st.integers(1, budget)))
    for name, pause in uses:
        now += pause
        before = {other for other in range(8) if other in residency}
        leaving = residency.use(name, now)
        assert name in residency and residency.used <= budget
        assert set(leaving) <= before - {name} and not any(other in residency for other in leaving)
        assert before - set(leaving) <= {other for other in range(8) if other in residency}


def test_the_least_recently_used_leaves_first():
    residency = Residency(30)
    for name in "abcd":
        residency.enter(name, 10)
    for step, name in enumerate("abcabca"):
        assert residency.use(name, 100.0 * step) == []
    assert residency.use("d", 1000.0) == ["b"] and residency.use("b", 2000.0) == ["c"]
    assert residency.moves == 5


def test_what_has_just_come_stays_for_some_forwards_or_seconds():
    residency = Residency(20)
    for name in "abc":
        residency.enter(name, 10)
    residency.use("a", 0.0)
    residency.use("b", 10.0)
    residency.use("a", 10.1)
    assert residency.use("c", 10.2) == ["a"], "b is used less recently, but has just come"
    assert not residency.welcome("a", 10.3), "both that are there have just come"
    assert residency.welcome("b", 10.3) and residency.welcome("a", 10.3 + SETTLE_SECONDS)
    for _ in range(SETTLE_FORWARDS):
        residency.use("b", 10.3)
    assert residency.welcome("a", 10.4) and residency.use("a", 10.4) == ["b"]


def test_what_grows_drives_others_out_and_what_never_fits_is_refused():
    residency = Residency(30)
    residency.enter("a", 10)
    residency.enter("b", 15)
    assert not residency.crowded
    residency.use("a", 0.0)
    residency.use("b", 0.0)
    residency.enter("b", 25)
    assert residency.crowded and residency.use("b", 1.0) == ["a"] and residency.used == 25
    with pytest.raises(ValueError, match="31"):
        residency.enter("c", 31)
    residency.forget("b")
    assert residency.used == 0 and "b" not in residency


# --- real modules -----------------------------------------------------------------------------------------------------


def test_a_thousand_switches_leave_nothing_behind():
    memory = DeviceMemory(CPU, 3000, host=Travelling)
    modules = [nn.Linear(16, 32), nn.Linear(16, 32)]
    given_ = torch.randn(1, 16)
    with torch.no_grad():
        expected = [module(given_) for module in modules]
        for module in modules:
            memory.enter(module)
        counts = []
        for turn in range(1000):
            module = modules[turn % 2]
            memory.bring(module)
            assert torch.equal(module(given_), expected[turn % 2])
            assert modules[1 - turn % 2].weight.isnan().all()
            if turn in (100, 999):
                gc.collect()
                counts.append(sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()))
    assert counts[0] == counts[1] and memory.residency.moves == 1000
    assert len(memory._modules) == len(memory.residency._units) == 2
    memory.leave(modules[0])
    assert len(memory._modules) == 1


def test_weights_that_did_not_arrive_are_not_taken_to_be_there():
    class Stranded(Travelling):
        def bring(self, keep):
            raise torch.OutOfMemoryError("CUDA out of memory")

    memory = DeviceMemory(CPU, 5000, host=Stranded)
    module = nn.Linear(8, 8)
    memory.enter(module)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            memory.bring(module)
        assert memory.residency.used == 0


def test_a_model_larger_than_the_device_runs_one_network_at_a_time(monkeypatch):
    sizes = weights("sd15")
    memory = pretended(monkeypatch, max(sizes.values()) + 1)
    made = build("sd15", offload=True)
    wanted = item(seed=1), item(picture(1), strength=0.7), item(picture(1), hole())
    for there, usual in zip(images(made, *wanted), images(model("sd15"), *wanted), strict=True):
        assert same(there, usual)
    assert memory.residency.moves > 3 and memory.residency.used <= memory.residency.budget


def test_models_that_do_not_fit_together_take_turns(monkeypatch):
    first, second = sum(weights("sd15").values()), sum(weights("sdxl").values())
    memory = pretended(monkeypatch, max(first, second) + 1000)
    made = build("sd15"), build("sdxl")
    for kind, one in zip(("sd15", "sdxl", "sd15"), (*made, made[0]), strict=True):
        assert same(images(one, item())[0], images(model(kind), item())[0])
    assert memory.residency.crowded


class ByTurns(Fifo):
    """Whoever was served longest ago: the worst order for weights that do not fit together."""

    def __init__(self):
        super().__init__()
        self.served: list[int] = []

    def next(self, welcome=None):
        rather = [one for one in self.waiting if welcome(one)] or self.waiting
        chosen = max(rather, key=lambda one: self.served[::-1].index(one.run) if one.run in self.served else 99)
        self.served.append(chosen.run)
        self.waiting.remove(chosen)
        return [chosen]


def travels(monkeypatch, steps: int) -> int:
    """How often networks came to the device for two models that are asked by turns."""
    memory = pretended(monkeypatch, max(weights("sd15")["unet"], weights("sdxl")["unet"]) + 1)
    ends: list[object] = []
    stepper = Stepper(CPU, ByTurns(), StepEvents(lambda _, end: ends.append(end)))
    for number, kind in enumerate(("sd15", "sdxl")):
        wanted, made = item(steps=steps), build(kind, offload=True)
        stepper.join(number, made.start(wanted), priority=2, remaining=1.0, cancelled=wanted.cancelled)
    with torch.no_grad():
        while stepper.busy:
            stepper.advance()
    assert [end.image.shape for end in ends] == [(64, 64, 3)] * 2
    return memory.residency.moves


def test_models_that_are_asked_by_turns_do_not_travel_at_every_step(monkeypatch):
    assert travels(monkeypatch, 24) < 20
    monkeypatch.setattr(DeviceMemory, "welcome", lambda *_: True)
    assert travels(monkeypatch, 24) > 40


def test_what_does_not_fit_is_refused_with_the_numbers(monkeypatch):
    sizes = weights("sd15")
    pretended(monkeypatch, sum(sizes.values()) - 1)
    with pytest.raises(DoesNotFit, match=r"need .* MB and this device has .* MB .*'offload'") as refused:
        build("sd15")
    assert "dtype" in str(refused.value)
    build("sd15", offload=True)
    pretended(monkeypatch, max(sizes.values()) - 1)
    with pytest.raises(DoesNotFit, match=r"even alone, its \w+ needs"):
        build("sd15", offload=True)
    refuse_too_large({}, 0, offload=False)


def test_a_controlnet_counts_too(monkeypatch):
    pretended(monkeypatch, sum(weights("sd15").values()) + 1000)
    build("sd15")
    net = {"canny": str(folder_of("sd15-controlnet") / "controlnet")}
    with pytest.raises(DoesNotFit, match="need"):
        build("sd15", controlnets=net)
    made = build("sd15", controlnets=net, offload=True)
    assert images(made, item(picture(1), control_type="canny"))[0].shape == (64, 64, 3)


def test_half_the_bits_are_half_the_need(monkeypatch):
    sizes = weights("sd15")
    pretended(monkeypatch, int(sum(sizes.values()) * 0.6))
    made = build("sd15", dtype="bfloat16")
    assert images(made, item())[0].shape == (64, 64, 3)


def test_a_budget_of_the_operators_counts(monkeypatch):
    memory = pretended(monkeypatch, 10**12)
    with pytest.raises(DoesNotFit, match="need"):
        build("sd15", memory_gb=0.0001)
    assert memory.residency.budget == 100_000


def test_the_least_of_the_operators_budgets_counts_as_long_as_its_model_is_loaded(monkeypatch):
    memory = pretended(monkeypatch, 10**12)
    first, second = build("sd15", memory_gb=2), build("sd15", memory_gb=1)
    assert memory.residency.budget == 10**9
    second.close()
    assert memory.residency.budget == 2 * 10**9 and first._entered
    first.close()
    assert memory.residency.budget == 10**12 and not memory._modules


def test_loras_count_as_weights(monkeypatch, tmp_path):
    from test_diffusion_lora import kohya

    kohya(tmp_path / "ink.safetensors", 0)
    memory = pretended(monkeypatch, 10**9)
    made = build("sd15", lora_folder=str(tmp_path))
    with pytest.raises(OutOfMemory):
        memory.residency.budget, kept = 1, memory.residency.budget
        made.start(item(lora_name="ink"))
    memory.residency.budget = kept
    before = memory.residency._units[id(made._base.unet)].size
    assert same(*images(made, item(lora_name="ink"), item(lora_name="ink")))
    assert memory.residency._units[id(made._base.unet)].size > before


def test_weights_that_came_under_inference_mode_serve_elsewhere_too():
    memory = DeviceMemory(torch.device("cpu"), 10**6)
    module = nn.Linear(4, 4)
    memory.enter(module)
    with torch.inference_mode():
        memory.bring(module)
    assert not module.weight.is_inference() and module(torch.ones(1, 4)).requires_grad

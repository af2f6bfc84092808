"""One network whose rows have different LoRAs, against peft's own way with each row's set alone."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from models.diffusion import lora_mix
from models.diffusion.lora_mix import Adapters, LoraMix, Unmixable

torch.set_num_threads(1)
NAMES = "lora1", "lora2", "lora3"
RANKS = {"lora1": 4, "lora2": 2, "lora3": 8}


class Net(nn.Module):
    """Convolutions with strides and without, and linear layers over tokens and over samples."""

    def __init__(self) -> None:
        super().__init__()
        self.entry = nn.Conv2d(3, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.mix = nn.Linear(12, 12, bias=False)
        self.time = nn.Linear(5, 12)

    def forward(self, image: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        hidden = self.down(torch.tanh(self.entry(image))) + self.time(times)[:, :, None, None]
        return self.mix(torch.tanh(hidden).flatten(2).transpose(1, 2).contiguous())


def attach(net: nn.Module, name: str, seed: int, targets: list[str] | None = None, **more: object) -> None:
    rank = RANKS[name]
    config = LoraConfig(r=rank, lora_alpha=2 * rank + 1, target_modules=targets or ["entry", "down", "mix", "time"],
                        **{"init_lora_weights": "gaussian"} | more)
    inject_adapter_in_model(config, net, adapter_name=name)
    chance = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, weight in net.named_parameters():
            if "lora_B" in path and f".{name}." in path:
                weight.normal_(std=0.3, generator=chance)


def dressed(seed: int = 0, dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(seed)
    net = Net()
    for number, name in enumerate(NAMES):
        attach(net, name, number, ["down", "mix"] if name == "lora2" else None)
    return net.to(dtype).eval()


def inputs(rows: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    chance = torch.Generator().manual_seed(rows)
    return (torch.randn(rows, 3, 6, 10, generator=chance, dtype=dtype),
            torch.randn(rows, 5, generator=chance, dtype=dtype))


@torch.no_grad()
def by_peft(net: nn.Module, rows: list[Adapters], *given_: torch.Tensor) -> torch.Tensor:
    """Row by row, by peft's own code."""
    answers = []
    for place, adapters in enumerate(rows):
        for layer in lora_mix.tuner_layers(net):
            layer.__dict__.pop("forward", None)
            layer.set_adapter([name for name, _ in adapters], inference_mode=True)
            for name, weight in adapters:
                layer.set_scale(name, weight)
        answers.append(net(*(one[place : place + 1] for one in given_)))
    return torch.cat(answers)


@torch.no_grad()
def mixed(mix: LoraMix, net: nn.Module, rows: list[Adapters], *given_: torch.Tensor) -> torch.Tensor:
    mix.wear(rows)
    return net(*given_)


def gap(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).abs().max())


A, B, THREE = (("lora1", 1.0),), (("lora2", 0.5),), (("lora1", 0.25), ("lora2", 2.0), ("lora3", 1.0))
COMPANY: list[Adapters] = [A, (), THREE, B, A, (("lora1", 0.7),)]
weights = st.floats(0.0, 2.0, allow_subnormal=False)
sets = st.lists(st.sampled_from(NAMES), unique=True, max_size=3).flatmap(
    lambda names: st.tuples(*(st.tuples(st.just(name), weights) for name in sorted(names)))
)
NET = dressed()


@settings(deadline=None, max_examples=60)
@given(st.lists(sets, min_size=1, max_size=6))
def test_any_company_is_what_each_row_is_alone(rows):
    given_ = inputs(len(rows))
    expected = by_peft(NET, rows, *given_)
    mix = LoraMix(NET)
    assert gap(mixed(mix, NET, rows, *given_), expected) < 1e-5 * max(1.0, float(expected.abs().max()))
    mix.release()
    assert gap(by_peft(NET, rows, *given_), expected) == 0, "peft's own way is as it was"


def test_in_twice_the_precision_nothing_is_left_but_rounding():
    net, given_ = dressed(dtype=torch.float64), inputs(6, torch.float64)
    assert gap(by_peft(net, COMPANY, *given_), mixed(LoraMix(net), net, COMPANY, *given_)) < 1e-13


def test_a_weight_that_is_off_by_a_tenth_or_a_set_in_the_wrong_row_would_be_seen():
    net, given_ = dressed(), inputs(6)
    mix, expected = LoraMix(net), by_peft(net, COMPANY, *given_)
    heavier = [tuple((name, weight + 0.1) for name, weight in adapters) for adapters in COMPANY]
    assert gap(mixed(mix, net, heavier, *given_), expected) > 1e-2
    assert gap(mixed(mix, net, COMPANY[::-1], *given_), expected) > 1e-2


def test_rows_without_any_have_the_bare_networks_bits():
    net, given_ = dressed(), inputs(3)
    torch.manual_seed(0)
    bare = Net().eval()
    mix = LoraMix(net)
    mixed(mix, net, [A, THREE, ()], *given_)
    with torch.no_grad():
        assert torch.equal(mixed(mix, net, [()], *given_), bare(*given_))


@pytest.mark.parametrize(("dtype", "close"), [(torch.bfloat16, 0.15), (torch.float16, 0.02)])
def test_half_precision_with_loras_in_half_and_in_full(dtype, close):
    """A LoRA's matrices may be more precise than the network's; its sum is rounded at the end, as peft does."""
    exact = dressed()
    expected = by_peft(exact, COMPANY, *inputs(6))
    for full in (False, True):
        net = dressed(dtype=dtype)
        if full:
            for path, weight in net.named_parameters():
                if "lora_" in path:
                    weight.data = weight.data.float()
        found = mixed(LoraMix(net), net, COMPANY, *(one.to(dtype) for one in inputs(6)))
        assert found.dtype == dtype and gap(found.float(), expected) < close


def test_one_that_overflows_spoils_nobody_elses_row():
    net, given_ = dressed(dtype=torch.float16), [one.half() for one in inputs(3)]
    mix, rows = LoraMix(net), [A, (("lora3", 1.0),), ()]
    expected = mixed(mix, net, rows, *given_)
    with torch.no_grad():
        net.down.lora_A["lora3"].weight.fill_(6e4)
    found = mixed(LoraMix(net), net, rows, *given_)
    assert not found[1].isfinite().all() and gap(found[[0, 2]], expected[[0, 2]]) < 5e-3


class Kernels(TorchDispatchMode):
    """Counts the operations that run kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not any(word in str(func) for word in ("view", "reshape", "transpose", ".t.", "unsqueeze", "slice")):
            self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_a_mix_of_five_runs_as_many_kernels_as_one_lora(monkeypatch):
    monkeypatch.setattr(lora_mix, "SHARE", 100.0)  # the network is small, and its LoRAs are large
    net, given_ = dressed(), inputs(6)
    mix, counts = LoraMix(net), []
    for rows in (COMPANY, [A], []):
        mixed(mix, net, rows or [()], *given_)  # joins the matrices
        with Kernels() as kernels:
            mixed(mix, net, rows or [()], *given_)
        counts.append(kernels.seen.total())
    several, one, bare = counts
    assert several == one and one <= bare + 4 * len(lora_mix.tuner_layers(net)), counts


def test_matrices_stay_joined_for_a_few_unions_and_within_their_share(monkeypatch):
    monkeypatch.setattr(lora_mix, "SHARE", 100.0)
    net, given_ = dressed(), inputs(2)
    mix = LoraMix(net)
    pairs: list[list[Adapters]] = [[((one, 1.0),), ((other, 1.0),)] for one in NAMES for other in NAMES if one < other]
    for rows in (*pairs, [THREE, A], [THREE, B], *pairs):
        mixed(mix, net, rows, *given_)
    assert len(mix._unions) == lora_mix.KEPT
    kept = mix._unions["lora1", "lora2"]
    mixed(mix, net, [(("lora2", 0.1),), (("lora1", 2.0),)], *given_)
    assert mix._unions["lora1", "lora2"] is kept, "other weights are no other union"
    expected = by_peft(net, COMPANY, *inputs(6))
    monkeypatch.setattr(lora_mix, "SHARE", 0.0)
    tight = LoraMix(net)
    assert gap(mixed(tight, net, COMPANY, *inputs(6)), expected) < 1e-5
    assert tight._used() == 0


def test_forgetting_leaves_nothing_beside_the_weights():
    net, given_ = dressed(), inputs(6)
    mix = LoraMix(net)
    expected = mixed(mix, net, COMPANY, *given_)
    mix.forget()
    slots = [getattr(layer, slot) for *_, layer, _ in mix._mixed for slot in ("_down", "_up", "_scales")]
    assert not mix._unions and not any(slots)
    assert torch.equal(mixed(mix, net, COMPANY, *given_), expected)


def test_other_kinds_of_layers_are_told_from_what_mixes():
    torch.manual_seed(0)
    net = Net()
    attach(net, "lora1", 1)
    attach(net, "lora2", 2, ["mix"], use_dora=True)
    attach(net, "lora3", 3, ["time"], lora_bias=True, init_lora_weights=True)
    net.eval()
    mix = LoraMix(net)
    assert [mix.mixes(((name, 1.0),)) for name in NAMES] == [True, False, False] and mix.mixes(())
    given_ = inputs(2)
    for rows in ([(("lora2", 0.5), ("lora3", 2.0))] * 2, [A, ()], [(("lora2", 1.0),)] * 2):
        assert gap(mixed(LoraMix(net), net, rows, *given_), by_peft(net, rows, *given_)) < 1e-5
    with pytest.raises(Unmixable):
        mix.wear([A, B])


def test_what_changes_nothing_is_not_worn():
    net = dressed()
    assert LoraMix(net).of((("lora1", 0.0), ("lora2", 0.5), ("strange", 1.0))) == (("lora2", 0.5),)
    assert LoraMix(Net()).of(A) == ()


class Folded(nn.Module):
    """Lays entries of a sample behind each other, as networks of video do: whose they are cannot be told."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mix(x.flatten(0, 1)).unflatten(0, x.shape[:2])


@pytest.mark.parametrize("entries", [2, 3])
def test_a_layer_that_cannot_tell_rows_apart_says_so(entries):
    net = Folded()
    for number, name in enumerate(NAMES[:2]):
        attach(net, name, number, ["mix"])
    net.eval()
    mix, given_ = LoraMix(net), torch.randn(2, entries, 4)
    with pytest.raises(Unmixable, match=f"{2 * entries} entries for 2 rows"):
        mixed(mix, net, [A, B], given_)
    run = partial(mixed, mix, net)
    assert gap(run([A], given_), by_peft(net, [A, A], given_)) < 1e-5, "one set needs not tell rows apart"
    mix.separate()
    with pytest.raises(Unmixable, match="cannot be mixed"):
        mix.wear([A, B])
    assert not mix.mixes(A) and math.isfinite(gap(run([B], given_), given_))

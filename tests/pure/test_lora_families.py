"""Requests with different LoRAs in one forward: each image is the one that the stock pipeline makes with its LoRAs."""

from __future__ import annotations

from importlib import import_module

import pytest
from lora_kit import NONE, Wardrobe, Worn, alone, apart, train
from step_kit import CLOSE, WORDS, Request, of, picture

SMALL = {"width": 64, "height": 64}
SETS: list[Worn] = [NONE, (("ink", 1.0),), (("oil", 0.4), ("ink", 1.6)), (("oil", 2.0),),
                    (("neon", 1.0), ("ink", 0.3), ("oil", 0.5))]
KINDS = ["sd15", "sdxl", "flux", "flux2-klein", "qwen-image", "qwen-image-edit-plus"]


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch):
    module = import_module("diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus")
    plain = module.calculate_dimensions
    monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio: plain(min(area, 64 * 64), ratio))


@pytest.fixture(scope="module")
def dressed(request, tmp_path_factory):
    """A family of models, and a folder with three LoRAs of different ranks for it."""
    folder = tmp_path_factory.mktemp(request.param)
    for seed, (name, rank) in enumerate((("ink", 4), ("oil", 2), ("neon", 8))):
        train(request.param, folder, name, seed, rank)
    return request.param, folder


def wish(kind: str, number: int) -> Request:
    wanted = {"prompt": WORDS[number % 4], "num_inference_steps": 3 + number % 2, **SMALL}
    if kind == "qwen-image-edit-plus":  # half of what its blocks see is a picture at timestep zero
        wanted |= {"image": [picture(number)]}
    if kind.startswith("qwen"):
        wanted |= {"negative_prompt": "blurry", "true_cfg_scale": 3.0} if number == 1 else {}
    return of(seed=number, turn=number % 3, **wanted)


@pytest.mark.parametrize("dressed", KINDS, indirect=True)
def test_every_row_has_its_own_loras(dressed):
    kind, folder = dressed
    wishes = [(wish(kind, number), worn) for number, worn in enumerate(SETS)]
    made = Wardrobe(kind, folder)
    differences = [apart(image, alone(kind, folder, request, worn))
                   for image, (request, worn) in zip(made.together(*wishes), wishes, strict=True)]
    assert max(differences) <= CLOSE, differences
    assert made.counters.rows_per_forward > 2, made.counters
    assert made.mixes(*SETS), "they went by themselves after all"
    plain = alone(kind, folder, wishes[1][0], NONE)
    more = alone(kind, folder, wishes[1][0], (("ink", 1.1),))
    told = alone(kind, folder, wishes[1][0], wishes[1][1])
    assert apart(told, plain) > 100 * CLOSE, "a LoRA that changes nothing proves nothing"
    assert apart(told, more) > 10 * CLOSE, "the comparison would not see a weight that is off by a tenth"


@pytest.mark.parametrize("dressed", ["qwen-image-edit-plus"], indirect=True)
def test_where_rows_cannot_be_told_apart_sets_go_one_by_one(dressed, monkeypatch):
    """As if nobody had said that this network gives some layers all rows twice. The others give each row once."""
    kind, folder = dressed
    monkeypatch.setattr("models.diffusion.lora_mix.DOUBLING", set())
    wishes = [(wish(kind, number).but(num_inference_steps=3), worn) for number, worn in enumerate(SETS[:3])]
    made = Wardrobe(kind, folder)
    for image, (request, worn) in zip(made.together(*wishes), wishes, strict=True):
        assert apart(image, alone(kind, folder, request, worn)) <= CLOSE
    assert not made.mixes(*SETS)

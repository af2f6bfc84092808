"""What happens around requests that share forwards with different LoRAs: files come and go, weights travel, sets do not
mix."""

from __future__ import annotations

import gc
import os

import pytest
import torch
from diffusion_kit import build, item
from lora_kit import NONE, Wardrobe, Worn, alone, apart, denoiser, train
from step_kit import CLOSE, CPU, WORDS, Request, of, spied
from test_diffusion_memory import Travelling

from core.errors import InvalidParameter
from models.diffusion import lora as lora_module
from models.diffusion.memory import DeviceMemory
from models.stepping.contract import Lane
from tests.tiny_loras import kohya

INK: Worn = (("ink", 1.0),)
OIL: Worn = (("oil", 0.6),)


@pytest.fixture
def folder(tmp_path):
    """LoRAs that are for the text encoder, too."""
    for seed, name in enumerate(("ink", "oil")):
        kohya(tmp_path / f"{name}.safetensors", seed)
    return tmp_path


def wish(number: int, turn: int = 0, steps: int = 4) -> Request:
    return of(prompt=WORDS[number % 4], num_inference_steps=steps, seed=number, turn=turn, width=64, height=64)


def compare(folder, wishes, images) -> None:
    for (request, worn), image in zip(wishes, images, strict=True):
        assert apart(image, alone("sd15", folder, request, worn)) <= CLOSE, worn


def test_text_encoders_mix_too(folder):
    wishes = [(wish(0), INK), (wish(1), NONE), (wish(2), (*INK, *OIL)), (wish(3), OIL)]
    with spied() as seen:
        compare(folder, wishes, Wardrobe("sd15", folder).together(*wishes))
    assert ("text_encoder", Lane.ENCODE, 4) in seen and ("unet", Lane.DENOISE, 4) in seen


def test_what_only_the_text_encoder_wears_keeps_nobody_apart_at_the_denoiser(folder):
    kohya(folder / "words.safetensors", 5, layers=())
    made, asked = build("sd15", lora_folder=str(folder)), {}
    run = made.start(item(lora_name="words"))
    call = run.send(None)
    while call.network.name != "unet":
        asked[call.network.name] = call.variant
        call = run.send(call.network.forward([call])[0])
    run.close()
    assert asked["text_encoder"] is not None and call.variant is None and call.network.adapters == ()


def test_a_file_that_comes_while_others_run_is_worn_by_who_names_it(folder):
    wishes = [(wish(0, steps=6), INK), (wish(1, steps=6), OIL), (wish(2, turn=5), (("late", 1.5),)), (wish(3), NONE)]

    def upload(turn: int) -> None:
        if turn == 4:
            kohya(folder / "late.safetensors", 9)

    made = Wardrobe("sd15", folder)
    compare(folder, wishes, made.together(*wishes, between=upload))
    assert made.counters.rows_per_forward > 4


def test_who_began_with_a_file_ends_with_it_though_it_was_replaced_meanwhile(folder):
    first, second = wish(0, steps=6), wish(1, turn=5)
    before = alone("sd15", folder, first, INK)
    other = alone("sd15", folder, wish(2, steps=6), OIL)

    def replace(turn: int) -> None:
        if turn == 4:
            kohya(folder / "ink.safetensors", 8)
            os.utime(folder / "ink.safetensors", (1, 1))

    made = Wardrobe("sd15", folder)
    old, new, neighbour = made.together((first, INK), (second, INK), (wish(2, steps=6), OIL), between=replace)
    assert apart(old, before) <= CLOSE and apart(neighbour, other) <= CLOSE
    assert apart(new, alone("sd15", folder, second, INK)) <= CLOSE
    assert apart(before, alone("sd15", folder, first, INK)) > 100 * CLOSE


def test_one_that_is_taken_off_while_others_run_is_missed_by_nobody(folder):
    for seed in range(3):
        kohya(folder / f"n{seed}.safetensors", 20 + seed)
    made = Wardrobe("sd15", folder, most=1)
    wishes = [(wish(0, steps=8), INK), (wish(1, steps=8), NONE),
              *((wish(2, turn=3 + 2 * number, steps=2), ((f"n{number}", 1.0),)) for number in range(3))]
    compare(folder, wishes, made.together(*wishes, between=lambda _: gc.collect()))
    made.together((wish(0), OIL))
    gc.collect()
    made.rack.take(OIL)
    assert len(made.rack) == 1


def test_a_set_that_does_not_mix_runs_apart_and_right(tmp_path):
    train("sd15", tmp_path, "ink", 0)
    train("sd15", tmp_path, "dora", 1, use_dora=True)
    dora: Worn = (("dora", 0.7),)
    wishes = [(wish(0), INK), (wish(1), dora), (wish(2), NONE), (wish(3), (*dora, *INK)), (wish(4), dora)]
    made = Wardrobe("sd15", tmp_path)
    compare(tmp_path, wishes, made.together(*wishes))
    assert made.mixes(INK, NONE) and not made.mixes(dora)
    assert 2 < made.counters.rows_per_forward < 6, "ink with none, dora with dora"


def test_joined_matrices_leave_the_device_with_the_weights(tmp_path):
    for seed, name in enumerate(("ink", "oil")):
        train("sd15", tmp_path, name, seed)
    memory = DeviceMemory(CPU, 10**12, clock=lambda: 0.0, host=Travelling)
    made = Wardrobe("sd15", tmp_path, memory=memory)
    made.rack.take((*INK, *OIL))
    _, unet = denoiser(made.pipeline)
    memory.residency.budget = memory.residency._units[id(unet)].size + 1
    wishes = [(wish(0), INK), (wish(1), OIL), (wish(2), NONE)]
    compare(tmp_path, wishes, made.together(*wishes))
    assert id(unet) not in memory.residency and memory.residency.moves > 2, "the decoder has driven it out"
    mix = made.rack._mix(unet)
    assert not mix._unions and mix._worn is None
    memory.leave(unet)
    assert not memory._companions.get(id(unet))


def test_with_fixed_numbers_of_rows_sets_go_apart_and_bits_do_not_depend_on_the_company(folder):
    made = Wardrobe("sd15", folder, row_sizes=(4,))
    alone_, = made.together((wish(0), INK))
    in_company, *_ = made.together((wish(0), INK), (wish(1), OIL), (wish(2), INK), (wish(3), NONE))
    assert torch.equal(alone_, in_company)
    assert made.counters.rows_per_forward < 4


def test_values_that_are_no_numbers_are_refused_before_they_reach_anybody(folder):
    from safetensors.torch import load_file, save_file

    for name, value in (("nan", float("nan")), ("huge", 1e30)):
        tensors = load_file(folder / "ink.safetensors")
        next(tensor for key, tensor in tensors.items() if "lora_down" in key).view(-1)[3] = value
        save_file(tensors, folder / f"{name}.safetensors")
        made = build("sd15", lora_folder=str(folder))
        for _ in range(2):
            with pytest.raises(InvalidParameter, match="infinite or no numbers"):
                made.prepare(item(lora_name=name))
            with pytest.raises(InvalidParameter, match="infinite or no numbers"):
                made.start(item(lora_name=f"{name},ink"))


def test_files_are_read_before_the_device_has_time_for_them(folder, monkeypatch):
    made, read = build("sd15", lora_folder=str(folder)), []
    examine = lora_module.examine
    monkeypatch.setattr(lora_module, "examine", lambda file: read.append(file.stem) or examine(file))
    wanted = item(lora_name="ink,oil")
    made.prepare(wanted)
    assert read == ["ink", "oil"] and not len(made._rack)
    made.start(wanted)
    made.prepare(wanted)
    assert read == ["ink", "oil"] and len(made._rack) == 2
    with pytest.raises(InvalidParameter, match="no LoRA 'nobody'"):
        made.prepare(item(lora_name="nobody"))
    build("sd15").prepare(item())

"""LoRA files: each request's image is that of the stock pipeline with its LoRAs alone, whatever comes and goes."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusion_kit import build, images, item, model, only, outputs, picture, same, stock

from core.errors import InvalidParameter
from tests import tiny_models
from tests.tiny_loras import kohya

SIZED = {"height": 64, "width": 64}


@pytest.fixture
def folder(tmp_path):
    for seed, name in enumerate(("ink", "oil", "neon")):
        kohya(tmp_path / f"{name}.safetensors", seed)
    return tmp_path


def original(folder: Path, *worn: tuple[str, float], seed: int = 0) -> np.ndarray:
    """The stock pipeline's own image with these LoRAs and no others."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_models.folder("sd15"), local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    for name, _ in worn:
        pipeline.load_lora_weights(str(folder), weight_name=f"{name}.safetensors", adapter_name=name)
    if worn:
        pipeline.set_adapters([name for name, _ in worn], [weight for _, weight in worn])
    made = pipeline("a cat", num_inference_steps=3, generator=torch.Generator().manual_seed(seed), **SIZED)
    return np.asarray(made.images[0])


def test_requests_with_different_sets_run_beside_each_other(folder):
    made = build("sd15", lora_folder=str(folder))
    bare, ink, both, weak, other = images(
        made, item(), item(lora_name="ink"), item(lora_name="ink,oil", lora_weight="0.5,1.5"),
        item(lora_name="ink", lora_weight="0.3"), item(lora_name="neon", seed=5),
    )
    assert same(bare, original(folder))
    assert same(ink, original(folder, ("ink", 1.0)))
    assert same(both, original(folder, ("ink", 0.5), ("oil", 1.5)))
    assert same(weak, original(folder, ("ink", 0.3)))
    assert same(other, original(folder, ("neon", 1.0), seed=5))
    differences = [np.abs(one.astype(int) - bare).max() for one in (ink, both, weak)]
    assert min(differences) > 10, "a LoRA that changes nothing proves nothing"
    assert np.array_equal(only(made, item()), only(model("sd15"), item())), "attached, but not worn"


def test_the_text_encoders_part_counts_too(folder):
    without = kohya(folder / "mute.safetensors", 0, text=False)
    made = build("sd15", lora_folder=str(folder))
    spoken, mute = images(made, item(lora_name="ink"), item(lora_name=without.stem))
    assert not same(spoken, mute)


def test_requests_share_forwards_and_tell_which_set_they_wear(folder):
    made = build("sd15", lora_folder=str(folder))
    keys, variants = [], []
    for wanted in (item(lora_name="ink"), item(lora_name="ink", seed=1), item(lora_name="oil"), item()):
        run = made.start(wanted)
        asked = run.send(None)
        while asked.network.name != "unet":
            asked = run.send(asked.network.forward([asked])[0])
        keys.append(asked.key)
        variants.append(asked.variant)
        run.close()
    assert len(set(keys)) == 1, "whatever they wear"
    assert variants[0] == variants[1] and len(set(variants)) == 3 and variants[3] is None


def test_files_come_change_and_go_without_a_restart(folder):
    made = build("sd15", lora_folder=str(folder))
    before = only(made, item(lora_name="ink"))
    kohya(folder / "late.safetensors", 9)
    assert same(only(made, item(lora_name="late")), original(folder, ("late", 1.0)))
    kohya(folder / "ink.safetensors", 8)
    os.utime(folder / "ink.safetensors", (1, 1))
    after = only(made, item(lora_name="ink"))
    assert same(after, original(folder, ("ink", 1.0))) and not same(after, before)
    (folder / "ink.safetensors").unlink()
    with pytest.raises(InvalidParameter, match="no LoRA 'ink'"):
        made.start(item(lora_name="ink"))


def test_a_broken_file_and_one_for_another_model_are_refused_and_nobody_else_notices(folder):
    (folder / "torn.safetensors").write_bytes((folder / "ink.safetensors").read_bytes()[:-50])
    kohya(folder / "large.safetensors", 3, width=48)
    strange = tuple(f"joint_blocks_{n}_context" for n in range(3))
    kohya(folder / "strange.safetensors", 4, text=False, layers=strange)
    made = build("sd15", lora_folder=str(folder))
    expected = only(made, item(lora_name="ink"))
    for name, about in (("torn", "cut off"), ("large", "another"), ("strange", "another|layers have a place")):
        running = made.start(item(lora_name="ink"))
        running.send(None)
        for _ in range(2):
            with pytest.raises(InvalidParameter, match=about) as refused:
                made.start(item(lora_name=name))
            assert str(folder) not in str(refused.value)
        running.close()
        assert np.array_equal(only(made, item(lora_name="ink")), expected)
    assert np.array_equal(only(made, item()), only(model("sd15"), item()))


def test_only_so_many_stay_attached_but_never_less_than_are_worn(folder):
    for seed in range(10, 16):
        kohya(folder / f"n{seed}.safetensors", seed)
    made = build("sd15", lora_folder=str(folder), max_loras=2)
    first = only(made, item(lora_name="ink"))
    running = [made.start(item(lora_name=f"n{seed}")) for seed in range(10, 16)]
    assert len(made._rack) >= 6
    for run in running:
        run.close()
    del running, run
    gc.collect()
    assert same(only(made, item(lora_name="ink")), first)
    assert len(made._rack) == 2
    attached = {name for part in made._base.unet.modules() for name in getattr(part, "lora_A", {})}
    assert len(attached) == 2


@pytest.mark.parametrize(("params", "about"), [
    ({"lora_name": "../ink"}, "name has"), ({"lora_name": "nobody"}, "no LoRA"),
    ({"lora_name": "ink", "lora_weight": "3"}, "0 to 2"), ({"lora_name": "a,b,c,d"}, "most is 3"),
])
def test_what_cannot_be_worn_is_refused(folder, params, about):
    with pytest.raises(InvalidParameter, match=about):
        build("sd15", lora_folder=str(folder)).start(item(**params))


def test_a_model_without_a_folder_takes_none():
    with pytest.raises(InvalidParameter, match="takes no LoRA"):
        model("sd15").start(item(lora_name="ink"))


@pytest.mark.parametrize(
    ("kind", "network"), [("flux", "transformer"), ("qwen-image", "transformer"), ("sdxl", "unet")]
)
def test_loras_of_other_families(tmp_path, kind, network):
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    trained = stock(kind)
    part = getattr(build(kind)._base, network)
    part.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=["to_q", "to_k"]))
    with torch.no_grad():
        for name, weight in part.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.5, generator=torch.Generator().manual_seed(1))
    layers = {f"{network}_lora_layers": get_peft_model_state_dict(part)}
    type(trained).save_lora_weights(str(tmp_path), **layers, weight_name="own.safetensors")
    made = build(kind, lora_folder=str(tmp_path))
    bare, worn, changed = outputs(
        made, item(), item(lora_name="own"), item(picture(1), lora_name="own", strength=0.7)
    )
    assert same(bare.image, only(model(kind), item())) and not same(worn.image, bare.image)
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(tiny_models.folder(kind), local_files_only=True)
    pipeline.load_lora_weights(str(tmp_path), weight_name="own.safetensors")
    pipeline.set_progress_bar_config(disable=True)
    made_alone = pipeline("a cat", num_inference_steps=3, generator=torch.Generator().manual_seed(0), **SIZED)
    assert same(worn.image, np.asarray(made_alone.images[0]))
    assert changed.image.shape == (64, 64, 3)

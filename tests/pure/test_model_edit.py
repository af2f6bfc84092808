"""`edit`: every operation does something, the sixteen prompts of the old client look different, nobody is disturbed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from core.errors import Cancelled, InvalidParameter
from core.vocabulary import STAGES
from models.base import Item
from models.edit import Edit, working_size
from models.effects import EFFECTS
from models.scene import strips
from tests.pure.picture_kit import ODD_SIZES, change, params, photo, random_picture, run
from tests.pure.test_recipe import CLIENT_PROMPTS

EDIT = Edit({}, torch.device("cpu"))
PHRASES = {name: name.replace("_", " ") for name in STAGES} | {
    "tint": "purple and gold", "rotate": "upside down", "retro80s": "80s", "blur_background": "blur the background",
    "flat": "low contrast",
}  # fmt: skip


@pytest.fixture(scope="module")
def cat() -> np.ndarray:
    return photo("astronaut", 96)


def test_every_operation_of_the_vocabulary_has_an_effect_and_the_other_way_round() -> None:
    assert list(EFFECTS) == [name for name in EFFECTS if name in STAGES]
    assert set(EFFECTS) == set(STAGES)


@pytest.mark.parametrize("name", STAGES)
def test_an_operation_changes_the_picture_and_says_so(name: str, cat: np.ndarray) -> None:
    output = EDIT.run([Item(params("edit", {"prompt": PHRASES[name]}), cat)])[0]
    assert [step["operation"] for step in output.facts["recipe"]] == [name]
    assert output.image is not None and output.image.shape == cat.shape
    assert change(output.image, cat) > 1.0


@pytest.mark.parametrize("name", [n for n in STAGES if STAGES[n] != "geometry" and n != "pixelate"])
def test_more_strength_is_more_change(name: str, cat: np.ndarray) -> None:
    steps = [change(run(EDIT, "edit", cat, prompt=PHRASES[name], guidance=g), cat) for g in (1.0, 4.0, 9.0)]
    assert steps[0] < steps[1] <= steps[2] * 1.02, steps


@pytest.mark.parametrize(
    ("prompt", "check"),
    [
        ("brighter", lambda old, new: new.mean() > old.mean() + 10),
        ("darker", lambda old, new: new.mean() < old.mean() - 10),
        ("warmer", lambda old, new: (new[..., 0] - new[..., 2]).mean() > (old[..., 0] - old[..., 2]).mean() + 5),
        ("cooler", lambda old, new: (new[..., 0] - new[..., 2]).mean() < (old[..., 0] - old[..., 2]).mean() - 5),
        ("contrast", lambda old, new: new.std() > old.std() + 5),
        ("flat look, matte", lambda old, new: new.std() < old.std() - 5),
        ("black and white", lambda _, new: np.ptp(new, axis=2).max() < 3),
        ("vivid", lambda old, new: np.ptp(new, axis=2).mean() > np.ptp(old, axis=2).mean() + 5),
        ("muted", lambda old, new: np.ptp(new, axis=2).mean() < np.ptp(old, axis=2).mean() - 5),
        ("invert", lambda old, new: np.abs(new - (255 - old)).max() < 3),
        ("blur", lambda old, new: roughness(new) < roughness(old) * 0.6),
        ("sharpen", lambda old, new: roughness(new) > roughness(old) * 1.2),
        ("smooth", lambda old, new: roughness(new) < roughness(old)),
        ("grain", lambda old, new: roughness(new) > roughness(old) * 1.2),
        ("sepia", lambda _, new: (new[..., 0] - new[..., 2]).mean() > 10 and np.ptp(new, axis=2).max() < 90),
        ("mirror", lambda old, new: np.array_equal(new, old[:, ::-1])),
        ("flip", lambda old, new: np.array_equal(new, old[::-1])),
        ("upside down", lambda old, new: np.array_equal(new, old[::-1, ::-1])),
        ("vignette", lambda old, new: new[0, 0].mean() < old[0, 0].mean() * 0.6),
        ("vignette", lambda old, new: change(new[40:56, 40:56], old[40:56, 40:56]) < 3),
        ("night", lambda old, new: new.mean() < old.mean() * 0.6),
    ],
)  # fmt: skip
def test_an_operation_does_what_its_word_says(prompt: str, check, cat: np.ndarray) -> None:  # type: ignore[no-untyped-def]
    assert check(cat.astype(np.float32), run(EDIT, "edit", cat, prompt=prompt).astype(np.float32))


def roughness(image: np.ndarray) -> float:
    return float(np.abs(np.diff(image, axis=0)).mean() + np.abs(np.diff(image, axis=1)).mean())


def test_the_background_blurs_and_the_subject_does_not() -> None:
    image = random_picture(120, 120, 3) // 3 + 40
    image[40:80, 40:80] = random_picture(40, 40, 4) // 4 + np.array([190, 20, 20], np.uint8)
    blurred = run(EDIT, "edit", image, prompt="blur the background").astype(np.float32)
    assert roughness(blurred[:30]) < roughness(image[:30].astype(np.float32)) * 0.4
    assert change(blurred[48:72, 48:72], image[48:72, 48:72]) < 8


def test_the_sixteen_prompts_of_the_old_client_all_look_different(cat: np.ndarray) -> None:
    looks = [run(EDIT, "edit", cat, prompt=prompt, seed=i * 42, steps=30) for i, prompt in enumerate(CLIENT_PROMPTS)]
    assert all(change(look, cat) > 8 for look in looks)
    moods = [look.astype(np.float32).reshape(-1, 3).mean(0) for look in looks]
    for (one, a), (other, b) in itertools.combinations(zip(looks, moods, strict=True), 2):
        assert change(one, other) > 5
        assert np.abs(a - b).max() > 4


@pytest.mark.parametrize(
    ("given", "prompt"),
    [({"steps": 100}, "snow"), ({"steps": 10}, "oil painting"), ({"guidance": 8.0}, "sepia"), ({"seed": 9}, "grain"),
     ({"max_side": 24}, "sharpen"), ({"negative_prompt": "sepia"}, "sepia, vivid"), ({"prompt": "vivid"}, "sepia")],
)  # fmt: skip
def test_every_parameter_has_an_effect(given: dict[str, object], prompt: str, cat: np.ndarray) -> None:
    plain = run(EDIT, "edit", cat, prompt=prompt)
    assert change(plain, run(EDIT, "edit", cat, **({"prompt": prompt} | given))) > 0.3


def test_seeds_of_64_bits_and_beyond_zero_are_all_different(cat: np.ndarray) -> None:
    seeds = (0, 1, -1, 2**32, 2**63 - 1, 2**64 - 1025, -(2**63))
    looks = {run(EDIT, "edit", cat, prompt="grain", seed=seed).tobytes() for seed in seeds}
    assert len(looks) == len(seeds)


def test_the_working_size_never_enlarges() -> None:
    assert working_size(100, 200, 0) == (100, 200)
    assert working_size(100, 200, 4000) == (100, 200)
    assert working_size(100, 200, 50) == (25, 50)
    assert working_size(1, 3000, 100) == (1, 100)


@pytest.mark.parametrize("size", ODD_SIZES)
def test_odd_sizes_pass_through_every_operation(size: tuple[int, int]) -> None:
    image = random_picture(*size)
    for name in STAGES:
        out = run(EDIT, "edit", image, prompt=PHRASES[name])
        assert out.shape == image.shape and out.dtype == np.uint8, name


def test_a_result_is_the_same_bytes_alone_and_in_any_company() -> None:
    names = [n for n in STAGES if STAGES[n] != "geometry"]
    image = photo("coffee", 90)
    items = [
        Item(params("edit", {"prompt": f"{PHRASES[a]}, {PHRASES[b]}, {PHRASES[c]}", "seed": i, "guidance": 1 + i % 9,
                             "steps": 10 + (i * 37) % 91, "max_side": (0, 0, 60)[i % 3]}), np.roll(image, i * 7, 1))
        for i, (a, b, c) in enumerate(zip(names, names[11:] + names, names[23:] + names, strict=False))
    ]  # fmt: skip
    alone = [EDIT.run([item])[0].image for item in items]
    again = [EDIT.run([item])[0].image for item in items[:4]]
    together = [output.image for output in EDIT.run(items)]
    pairs = [output.image for i in range(0, len(items) - 1, 2) for output in EDIT.run([items[i + 1], items[i]])[::-1]]
    assert all(np.array_equal(a, b) for a, b in zip(alone, again, strict=False))
    assert [np.array_equal(a, b) for a, b in zip(alone, together, strict=True)] == [True] * len(items)
    assert [np.array_equal(a, b) for a, b in zip(alone, pairs, strict=False)] == [True] * len(pairs)


def test_a_picture_of_many_strips_has_no_seams(monkeypatch: pytest.MonkeyPatch, cat: np.ndarray) -> None:
    prompt = "winter, vivid, grain, vignette, sparkles, purple"
    whole = run(EDIT, "edit", cat, prompt=prompt)
    monkeypatch.setattr("models.scene.STRIP_PIXELS", 96 * 7)
    assert len(list(strips(96, 96, 1))) == 14
    assert np.array_equal(whole, run(EDIT, "edit", cat, prompt=prompt))


def test_a_mirrored_picture_mirrors_its_transparency(cat: np.ndarray) -> None:
    alpha = np.zeros(cat.shape[:2], np.uint8)
    alpha[:, :20] = 200
    turned = EDIT.run([Item(params("edit", {"prompt": "mirror"}), cat, alpha=alpha)])[0].image
    plain = EDIT.run([Item(params("edit", {"prompt": "sepia"}), cat, alpha=alpha)])[0].image
    assert turned is not None and np.array_equal(turned[..., 3], alpha[:, ::-1])
    assert plain is not None and plain.shape[2] == 3


def test_progress_rises_and_a_cancelled_item_costs_no_further_work(cat: np.ndarray) -> None:
    told: list[float] = []
    wanted = Item(params("edit", {"prompt": "sunset, warmer, vignette"}), cat, report=told.append)
    gone = Item(params("edit", {"prompt": "oil painting"}), cat, cancelled=lambda: True)
    outputs = EDIT.run([wanted, gone])
    assert told == sorted(told) and len(told) == 3 and 0 < told[-1] <= 1
    assert isinstance(outputs[1], Cancelled)


def test_a_negative_prompt_that_leaves_nothing_leaves_the_picture(cat: np.ndarray) -> None:
    assert np.array_equal(run(EDIT, "edit", cat, prompt="sepia", negative_prompt="sepia"), cat)


@pytest.mark.parametrize("prompt", ["make her eyes green", "眼睛变绿", "a red dress", "sharpen the eyes"])
def test_a_prompt_for_one_thing_is_refused_before_any_worker_sees_it(prompt: str) -> None:
    with pytest.raises(InvalidParameter, match="whole picture"):
        params("edit", {"prompt": prompt})


def test_what_was_not_understood_is_told_beside_the_recipe(cat: np.ndarray) -> None:
    asked = params("edit", {"prompt": "a castle with dragons, and make their eyes green"})
    facts = EDIT.run([Item(asked, cat)])[0].facts
    assert [step["operation"] for step in facts["recipe"]] == ["medieval"]
    assert facts["ignored"] == ["dragons", "eyes", "green"]
    assert EDIT.run([Item(params("edit", {"prompt": "sepia"}), cat)])[0].facts["ignored"] == []


def test_a_prompt_that_means_nothing_is_refused_before_any_worker_sees_it() -> None:
    with pytest.raises(InvalidParameter, match="watercolour"):
        params("edit", {"prompt": "make me rich"})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_pictures_up_to_rounding(cat: np.ndarray) -> None:
    cuda = Edit({}, torch.device("cuda"))
    looks = {n: [run(model, "edit", cat, prompt=PHRASES[n], seed=5) for model in (EDIT, cuda)] for n in STAGES}
    assert [name for name, (cpu, gpu) in looks.items() if change(cpu, gpu) > 1.0] == []

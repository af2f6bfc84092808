"""Flux and Qwen-Image requests that share steps: each image is the one that the stock pipeline makes of it alone."""

from __future__ import annotations

from importlib import import_module

import pytest
from diffusers import (
    FluxImg2ImgPipeline,
    FluxPipeline,
    QwenImageImg2ImgPipeline,
    QwenImageInpaintPipeline,
    QwenImagePipeline,
)
from step_kit import WORDS, Request, compare, hole, of, picture, prove

SMALL = {"width": 64, "height": 64}
LONG = "a photo of a cat, a dog and a red house, " * 6  # many more tokens than the others


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch):
    """The edit pipelines bring what they are shown to a megapixel, which takes a CPU half a minute."""
    for name in ("qwenimage.pipeline_qwenimage_edit", "qwenimage.pipeline_qwenimage_edit_plus"):
        module = import_module(f"diffusers.pipelines.{name}")
        plain = module.calculate_dimensions
        monkeypatch.setattr(
            module, "calculate_dimensions",
            lambda area, ratio, plain=plain: plain(min(area, 64 * 64), ratio),
        )


# --- Flux -----------------------------------------------------------------------------------------------------------


def flux() -> list[Request]:
    return [
        of(FluxPipeline, prompt=WORDS[0], num_inference_steps=4, guidance_scale=3.5, seed=0, **SMALL),
        of(FluxPipeline, prompt=WORDS[1], num_inference_steps=3, guidance_scale=2.0, seed=1, turn=2, **SMALL),
        of(FluxPipeline, prompt=WORDS[2], negative_prompt="blurry", true_cfg_scale=3.0, num_inference_steps=3, seed=2,
           turn=1, **SMALL),
        of(FluxImg2ImgPipeline, prompt=WORDS[3], image=picture(1), strength=0.7, num_inference_steps=4, seed=3, turn=1,
           **SMALL),
    ]


def test_flux_with_distilled_and_true_guidance_and_from_pictures():
    prove("flux", flux())


@pytest.mark.parametrize("change", [{"guidance_scale": 3.6}, {"prompt": "a dog"}, {"num_inference_steps": 5}], ids=str)
def test_the_comparison_would_see_another_flux_request(change):
    requests = flux()
    assert not compare("flux", [requests[0].but(**change), *requests[1:]], requests).equal()


def test_the_same_number_of_tokens_in_another_shape_is_another_forward():
    """Flux takes the position ids of the first sample for all: 128 x 64 and 64 x 128 must not meet."""
    requests = [of(FluxPipeline, prompt=WORDS[n], num_inference_steps=3, seed=n, width=width, height=192 - width)
                for n, width in enumerate([128, 64, 128, 64])]
    found = prove("flux", requests, rows_per_forward=2)
    assert found.counters.rows_per_forward == 2


def test_kontext_with_pictures_of_one_size_and_of_another():
    found = prove("flux-kontext", [
        of(prompt=WORDS[n], image=picture(n, *size), num_inference_steps=3 + n, guidance_scale=2.0 + n, seed=n, turn=n,
           _auto_resize=False, max_area=64 * 64, **SMALL)
        for n, size in enumerate([(64, 64), (64, 64), (96, 64)])
    ], rows_per_forward=1.2)
    assert found.counters.merged > 0


def test_flux2_klein_from_text_and_from_pictures():
    found = prove("flux2-klein", [
        of(prompt=WORDS[0], num_inference_steps=3, guidance_scale=3.0, seed=0, **SMALL),
        of(prompt=WORDS[1], num_inference_steps=4, guidance_scale=1.0, seed=1, turn=1, **SMALL),
        of(prompt=WORDS[2], image=picture(1), num_inference_steps=3, guidance_scale=1.0, seed=2, **SMALL),
        of(prompt=WORDS[3], image=picture(2), num_inference_steps=3, guidance_scale=1.0, seed=3, turn=1, **SMALL),
    ], rows_per_forward=1.4)
    assert found.counters.merged > 8


# --- Qwen-Image -----------------------------------------------------------------------------------------------------


def qwen() -> list[Request]:
    """Short and long prompts, with and without guidance: they meet in one forward, padded and masked."""
    return [
        of(QwenImagePipeline, prompt=WORDS[0], negative_prompt=" ", true_cfg_scale=4.0, num_inference_steps=3, seed=0,
           **SMALL),
        of(QwenImagePipeline, prompt=LONG, negative_prompt="low quality", true_cfg_scale=2.0, num_inference_steps=4,
           seed=1, turn=2, **SMALL),
        of(QwenImagePipeline, prompt=WORDS[2], num_inference_steps=3, true_cfg_scale=1.0, seed=2, turn=1, **SMALL),
        of(QwenImageImg2ImgPipeline, prompt=WORDS[3], image=picture(1), strength=0.7, num_inference_steps=4, seed=3,
           true_cfg_scale=1.0, turn=1, **SMALL),
        of(QwenImageInpaintPipeline, prompt=WORDS[1], image=picture(2), mask_image=hole(), strength=0.9, seed=4,
           num_inference_steps=3, true_cfg_scale=1.0, turn=2, **SMALL),
    ]


def test_qwen_from_text_of_any_length_from_pictures_and_with_masks():
    prove("qwen-image", qwen(), rows_per_forward=2)


@pytest.mark.parametrize("change", [{"true_cfg_scale": 4.1}, {"prompt": "a dog"}, {"num_inference_steps": 4}], ids=str)
def test_the_comparison_would_see_another_qwen_request(change):
    requests = qwen()
    assert not compare("qwen-image", [requests[0].but(**change), *requests[1:]], requests).equal()


def test_qwen_in_two_aspects_of_as_many_tokens():
    requests = [of(QwenImagePipeline, prompt=WORDS[n], num_inference_steps=2, true_cfg_scale=1.0, seed=n, width=width,
                   height=192 - width) for n, width in enumerate([128, 64, 128, 64])]
    assert prove("qwen-image", requests).counters.rows_per_forward == 2


def test_qwen_edit():
    prove("qwen-image-edit", [
        of(prompt=WORDS[n], image=picture(n), negative_prompt=" " if n % 2 else None, true_cfg_scale=2.0 + n,
           num_inference_steps=2 + n, seed=n, turn=n, **SMALL)
        for n in range(3)
    ])


def test_qwen_edit_plus_with_one_picture_and_with_two():
    found = prove("qwen-image-edit-plus", [
        of(prompt=WORDS[n], image=[picture(n + k) for k in range(count)], negative_prompt=" ", true_cfg_scale=2.0 + n,
           num_inference_steps=2 + n % 2, seed=n, turn=n // 2, **SMALL)
        for n, count in enumerate([1, 1, 2, 2])
    ], rows_per_forward=1.4)
    assert found.counters.merged > 10


def test_the_comparison_would_see_another_picture_to_edit():
    requests = [of(prompt=WORDS[n], image=picture(n), num_inference_steps=2, seed=n, **SMALL) for n in range(2)]
    assert not compare("qwen-image-edit", [requests[0].but(image=picture(7)), requests[1]], requests).equal()

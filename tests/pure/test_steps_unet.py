"""Stable Diffusion requests that share steps: each image is the one that the stock pipeline makes of it alone."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
from diffusers import (
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from step_kit import WORDS, Request, compare, hole, of, picture, prove, stock

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of numpy, about diffusers
SMALL = {"width": 64, "height": 64}
TEXT = StableDiffusionPipeline
IMAGE = StableDiffusionImg2ImgPipeline
PAINT = StableDiffusionInpaintPipeline
CONTROL = StableDiffusionControlNetPipeline


def text(number: int, steps: int, guidance: float, turn: int = 0, **more: Any) -> Request:
    return of(
        prompt=WORDS[number % 4], num_inference_steps=steps, guidance_scale=guidance, seed=number, turn=turn,
        **(SMALL | more),
    )


def mixed() -> list[Request]:
    """Text, picture and mask, with and without guidance, that come and go at different turns."""
    return [
        text(0, 5, 7.5, negative_prompt="blurry"),
        text(1, 4, 3.0, turn=2),
        text(2, 3, 1.0, turn=4),
        of(IMAGE, prompt=WORDS[3], image=picture(1), strength=0.6, num_inference_steps=6, seed=4, turn=3),
        of(IMAGE, prompt=WORDS[0], image=picture(2), strength=1.0, num_inference_steps=3, seed=5, turn=1),
        of(PAINT, prompt=WORDS[1], image=picture(3), mask_image=hole(), strength=0.9, num_inference_steps=5, seed=6,
           turn=1, **SMALL),
    ]


def test_text_picture_and_mask_share_the_network():
    prove("sd15", mixed(), rows_per_forward=4)


def test_pictures_of_another_size_have_forwards_of_their_own():
    prove("sd15", [text(n, 3, 5.0, turn=n % 2, **size) for n, size in enumerate(
        [{"width": 64, "height": 128}, {"width": 128, "height": 64}] * 2
    )], rows_per_forward=2)


@pytest.mark.parametrize(
    "change", [{"prompt": "a cat."}, {"guidance_scale": 7.6}, {"num_inference_steps": 6}, {"negative_prompt": "red"}],
    ids=str,
)
def test_the_comparison_would_see_another(change):
    requests = mixed()[:3]
    found = compare("sd15", [requests[0].but(**change), *requests[1:]], requests)
    assert not found.equal() and max(found.differences[1:]) < 1e-5


def test_the_comparison_would_see_another_seed_or_strength():
    requests = mixed()
    other = of(seed=99, turn=requests[1].turn, **requests[1].arguments)
    changed = [requests[0], other, requests[2], requests[3].but(strength=0.7), *requests[4:]]
    differences = compare("sd15", changed, requests).differences
    assert min(differences[1], differences[3]) > 1e-3 and max(differences[0], differences[2], *differences[4:]) < 1e-5


def test_the_network_of_nine_channels():
    prove("sd15-inpaint", [
        of(prompt=WORDS[n], image=picture(n), mask_image=hole(), strength=1.0 - n / 10, num_inference_steps=3 + n,
           guidance_scale=2.0 + n, seed=n, turn=n, **SMALL) for n in range(3)
    ])


def controlled(number: int, turn: int = 0, **more: Any) -> Request:
    return of(
        CONTROL, prompt=WORDS[number], image=picture(number), num_inference_steps=4, guidance_scale=4.0, seed=number,
        turn=turn, **more,
    )


def test_control_with_a_scale_and_an_end_for_each_beside_requests_without():
    found = prove("sd15-controlnet", [
        controlled(0, controlnet_conditioning_scale=0.5),
        controlled(1, turn=1, controlnet_conditioning_scale=1.3, control_guidance_end=0.5),
        controlled(2, turn=1),
        of(TEXT, prompt=WORDS[3], num_inference_steps=5, seed=3, **SMALL),
        of(IMAGE, prompt=WORDS[3], image=picture(1), strength=0.8, num_inference_steps=4, seed=4, turn=2),
    ], rows_per_forward=2.5)
    assert found.counters.steps == 3 * 2 * 4 + 5 + 3


def test_guess_mode_makes_a_ladder_of_the_scale():
    prove("sd15-controlnet", [
        controlled(0, guess_mode=True, controlnet_conditioning_scale=0.5),
        controlled(1, guess_mode=True, controlnet_conditioning_scale=0.9),
        controlled(2, controlnet_conditioning_scale=0.7),
    ])


def test_the_comparison_would_see_another_control():
    requests = [controlled(0, controlnet_conditioning_scale=0.5), controlled(1)]
    assert not compare("sd15-controlnet", [requests[0].but(controlnet_conditioning_scale=0.6), requests[1]],
                       requests).equal()


def test_sdxl_text_picture_and_mask():
    # Guidance is mild: it multiplies the rounding of these random networks, too.
    found = prove("sdxl", [
        of(StableDiffusionXLPipeline, prompt=WORDS[0], num_inference_steps=4, guidance_scale=3.0, seed=0, **SMALL),
        of(StableDiffusionXLPipeline, prompt=WORDS[1], prompt_2=WORDS[2], num_inference_steps=3, guidance_scale=1.0,
           seed=1, turn=2, **SMALL),
        of(StableDiffusionXLImg2ImgPipeline, prompt=WORDS[2], image=picture(1), strength=0.7, num_inference_steps=4,
           guidance_scale=3.0, seed=2, turn=1),
        of(StableDiffusionXLInpaintPipeline, prompt=WORDS[3], image=picture(2), mask_image=hole(), strength=0.9,
           num_inference_steps=4, guidance_scale=2.5, seed=3, turn=1, **SMALL),
    ], rows_per_forward=3)
    assert found.counters.forwards < 11


def test_sdxl_of_nine_channels():
    prove("sdxl-inpaint", [
        of(prompt=WORDS[n], image=picture(n), mask_image=hole(), strength=0.8, num_inference_steps=3 + n, seed=n,
           turn=n, **SMALL) for n in range(2)
    ])


def test_sdxl_with_control():
    prove("sdxl-controlnet", [
        of(prompt=WORDS[n], image=picture(n), controlnet_conditioning_scale=0.4 + n, num_inference_steps=3 + n, seed=n,
           turn=n) for n in range(2)
    ] + [of(StableDiffusionXLPipeline, prompt=WORDS[3], num_inference_steps=4, seed=3, **SMALL)])


# --- schedulers -----------------------------------------------------------------------------------------------------

SCHEDULERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}, {}),
    "ddim eta": ("DDIMScheduler", {}, {"eta": 1.0}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}, {}),
    "ddpm": ("DDPMScheduler", {}, {}),
    "euler": ("EulerDiscreteScheduler", {}, {}),
    "euler ancestral": ("EulerAncestralDiscreteScheduler", {}, {}),
    "heun": ("HeunDiscreteScheduler", {}, {}),
    "lms": ("LMSDiscreteScheduler", {}, {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}, {}),
    "dpm++ 2m": ("DPMSolverMultistepScheduler", {}, {}),
    "dpm++ 2m karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, {}),
    "dpm++ 2m sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}),
    "dpm++ single": ("DPMSolverSinglestepScheduler", {}, {}),
    "unipc": ("UniPCMultistepScheduler", {}, {}),
    "deis": ("DEISMultistepScheduler", {}, {}),
    "lcm": ("LCMScheduler", {}, {}),
    "tcd": ("TCDScheduler", {}, {}),
}


def scheduled(name: str, number: int, turn: int, steps: int) -> Request:
    kind, config, arguments = SCHEDULERS[name]
    scheduler = getattr(diffusers, kind).from_config(stock("sd15").scheduler.config, **config)
    return of(
        prompt=WORDS[number % 4], num_inference_steps=steps, guidance_scale=5.0, seed=number, turn=turn,
        scheduler=scheduler, **(SMALL | arguments),
    )


@pytest.mark.parametrize("name", SCHEDULERS)
def test_each_scheduler_keeps_its_own_state(name):
    prove("sd15", [scheduled(name, 0, 0, 4), scheduled(name, 1, 2, 3)], rows_per_forward=2.4)


def test_seventeen_schedulers_in_one_batch():
    found = prove("sd15", [scheduled(name, n, n % 5, 3 + n % 3) for n, name in enumerate(SCHEDULERS)])
    assert found.counters.rows_per_forward > 12

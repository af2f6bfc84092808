"""Every kind of pipeline through the adapter: the task follows from the request, the image is the stock pipeline's."""

from __future__ import annotations

import numpy as np
import pytest
from diffusion_kit import (
    alone,
    build,
    folder_of,
    hole,
    images,
    item,
    model,
    only,
    picture,
    pil,
    same,
    stock,
)

from core.errors import InvalidParameter
from models.diffusion.pixels import canny

PHOTO, MASK = picture(1), hole()
SIZED = {"height": 64, "width": 64}


@pytest.fixture(autouse=True)
def small_conditions(monkeypatch):
    """The Qwen edit pipelines bring every picture to a megapixel, which takes a CPU half a minute."""
    import diffusers.pipelines.qwenimage.pipeline_qwenimage_edit as edit
    import diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus as plus

    real = edit.calculate_dimensions
    monkeypatch.setattr(edit, "calculate_dimensions", lambda area, ratio: real(64 * 64, ratio))
    monkeypatch.setattr(plus, "VAE_IMAGE_SIZE", 64 * 64)
    monkeypatch.setattr(plus, "CONDITION_IMAGE_SIZE", 64 * 64)


@pytest.mark.parametrize(("kind", "family"), [("sd15", "StableDiffusion"), ("sdxl", "StableDiffusionXL")])
def test_words_an_image_or_a_mask_decide_what_stable_diffusion_does_and_all_share_one_batch(kind, family):
    drawn, changed, filled = images(
        model(kind), item(seed=2, guidance=5.0), item(PHOTO, strength=0.7, seed=3, negative_prompt="a dog"),
        item(PHOTO, MASK, strength=0.9, seed=4),
    )
    assert same(drawn, alone(stock(kind), 2, guidance_scale=5.0, **SIZED))
    assert same(changed, alone(
        stock(kind, f"{family}Img2ImgPipeline"), 3, image=pil(PHOTO), strength=0.7, negative_prompt="a dog"
    ))
    whole = alone(
        stock(kind, f"{family}InpaintPipeline"), 4, image=pil(PHOTO), mask_image=pil(MASK), strength=0.9, **SIZED
    )
    assert same(filled[MASK == 255], whole[MASK == 255])
    assert (filled[MASK == 0] == PHOTO[MASK == 0]).all() and not (whole[MASK == 0] == PHOTO[MASK == 0]).all()


@pytest.mark.parametrize("kind", ["sd15-inpaint", "sdxl-inpaint"])
def test_a_network_with_nine_channels_fills_masks_and_nothing_else(kind):
    filled = only(model(kind), item(PHOTO, MASK, strength=1.0, keep_unmasked=False))
    more = {"image": pil(PHOTO), "mask_image": pil(MASK), "strength": 1.0, **SIZED}
    assert same(filled, alone(stock(kind), **more))
    for wanted in (item(), item(PHOTO)):
        with pytest.raises(InvalidParameter, match="mask"):
            model(kind).start(wanted)


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_control_maps_are_drawn_by_us_or_sent(kind):
    net = str(folder_of(f"{kind}-controlnet") / "controlnet")
    made = build(kind, controlnets={"canny": net, "depth": net})
    edges, sent, started, filled = images(
        made, item(PHOTO, control_type="canny"), item(control=PHOTO, control_type="depth", controlnet_scale=0.5),
        item(PHOTO, control=picture(5), control_type="depth", strength=0.7),
        item(PHOTO, MASK, control_type="canny", keep_unmasked=False, strength=1.0),
    )
    family = "StableDiffusionXL" if kind == "sdxl" else "StableDiffusion"
    original = stock(f"{kind}-controlnet")
    lines = pil(canny(PHOTO))
    assert same(edges, alone(original, image=lines, **SIZED))
    assert not same(edges, alone(original, image=pil(np.zeros_like(PHOTO)), **SIZED)), "the comparison is sensitive"
    assert same(sent, alone(original, image=pil(PHOTO), controlnet_conditioning_scale=0.5, **SIZED))
    assert same(started, alone(
        stock(f"{kind}-controlnet", f"{family}ControlNetImg2ImgPipeline"), image=pil(PHOTO),
        control_image=pil(picture(5)), strength=0.7,
    ))
    assert same(filled, alone(
        stock(f"{kind}-controlnet", f"{family}ControlNetInpaintPipeline"), image=pil(PHOTO), mask_image=pil(MASK),
        control_image=lines, strength=1.0, **SIZED,
    ))


def test_a_pipeline_that_brings_its_controlnet_needs_no_type():
    made = model("sd15-controlnet")
    guided, free = images(made, item(control=PHOTO), item())
    assert same(guided, alone(stock("sd15-controlnet"), image=pil(PHOTO), **SIZED))
    assert same(free, alone(stock("sd15-controlnet", "StableDiffusionPipeline"), **SIZED))


@pytest.mark.parametrize("kind", ["flux", "qwen-image"])
def test_flow_models_draw_change_and_fill(kind):
    family = "Flux" if kind == "flux" else "QwenImage"
    drawn, changed, filled = images(
        model(kind), item(true_cfg_scale=2.0, negative_prompt="a dog"), item(PHOTO, strength=0.7, seed=3),
        item(PHOTO, MASK, strength=0.9, seed=4, keep_unmasked=False),
    )
    assert same(drawn, alone(stock(kind), true_cfg_scale=2.0, negative_prompt="a dog", **SIZED))
    assert same(changed, alone(stock(kind, f"{family}Img2ImgPipeline"), 3, image=pil(PHOTO), strength=0.7, **SIZED))
    more = {"image": pil(PHOTO), "mask_image": pil(MASK), "strength": 0.9, **SIZED}
    assert same(filled, alone(stock(kind, f"{family}InpaintPipeline"), 4, **more))


def test_kontext_and_klein_look_at_pictures_or_draw_from_words():
    drawn, edited = images(model("flux-kontext"), item(), item(PHOTO, guidance=2.0))
    exact = {"max_area": 64 * 64, "_auto_resize": False, **SIZED}
    assert same(drawn, alone(stock("flux-kontext"), **exact))
    assert same(edited, alone(stock("flux-kontext"), image=pil(PHOTO), guidance_scale=2.0, **exact))
    drawn, edited, both = images(
        model("flux2-klein"), item(), item(PHOTO), item(PHOTO, references=[picture(6, 64, 96)])
    )
    assert same(drawn, alone(stock("flux2-klein"), **SIZED))
    assert same(edited, alone(stock("flux2-klein"), image=[pil(PHOTO)], **SIZED))
    assert same(both, alone(stock("flux2-klein"), image=[pil(PHOTO), pil(picture(6, 64, 96))], **SIZED))


def test_qwen_edits_with_a_negative_prompt_and_edit_plus_takes_references():
    wished = {"true_cfg_scale": 3.0, "negative_prompt": "blurry"}
    edited = only(model("qwen-image-edit"), item(PHOTO, **wished))
    assert same(edited, alone(stock("qwen-image-edit"), image=pil(PHOTO), **wished, **SIZED))
    other = picture(7, 48, 80)
    first, second = images(model("qwen-image-edit-plus"), item(PHOTO, **wished), item(PHOTO, references=[other]))
    assert same(first, alone(stock("qwen-image-edit-plus"), image=[pil(PHOTO)], **wished, **SIZED))
    assert same(second, alone(stock("qwen-image-edit-plus"), image=[pil(PHOTO), pil(other)], **SIZED))


def test_any_other_pipeline_runs_too():
    """Kinds without a merge table or a naming rule go the same road, with the arguments that they take."""
    made = build("sd15", pipeline="StableDiffusionSAGPipeline")
    drawn = only(made, item(sag_scale=0.0, guidance=3.0))
    assert drawn.shape == (64, 64, 3)


@pytest.mark.parametrize(("kind", "wanted", "about"), [
    ("sd15", item(mask=MASK), "mask belongs to an image"),
    ("sd15", item(control=PHOTO), "no ControlNet"),
    ("sd15", item(PHOTO, control_type="canny"), "no ControlNet"),
    ("sd15", item(PHOTO, references=[PHOTO]), "one picture"),
    ("sd15-controlnet", item(control_type="depth"), "needs a control map"),
    ("qwen-image-edit", item(), "words alone"),
])
def test_what_a_model_cannot_do_is_refused_in_a_sentence(kind, wanted, about):
    with pytest.raises(InvalidParameter, match=about):
        model(kind).start(wanted)


def test_the_weights_are_there_once_for_all_tasks():
    made = model("sd15")
    images(made, item(), item(PHOTO, strength=0.8), item(PHOTO, MASK))
    networks = {id(shared._pipeline.unet) for shared in made._shared.values()}
    assert len(made._shared) >= 3 and len(networks) == 1


def test_requests_that_share_steps_have_the_images_they_have_alone():
    wanted = [item(PHOTO, strength=0.6, seed=1), item(seed=2, steps=4, guidance=3.0), item(PHOTO, MASK, seed=3)]
    together = images(model("sd15"), *wanted)
    for shared, one in zip(together, wanted, strict=True):
        assert same(shared, only(model("sd15"), one))
    assert np.std(together[1]) > 1

"""Parameters of a diffusion request: each has its effect; sizes, seeds, samplers, edges, masks, examples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusion_kit import alone, build, hole, images, item, model, only, outputs, picture, pil, same, stock

from core.errors import BadOutput, InvalidParameter
from core.model import Catalogue
from models.diffusion import pixels, samplers
from models.diffusion.requests import control_of, seed_of

PHOTO, MASK = picture(1), hole()
EXAMPLES = Path(__file__).parents[2] / "examples" / "models"


def differs(kind: str, base: dict, change: dict) -> bool:
    first, second = images(model(kind), item(**base), item(**{**base, **change}))
    return not same(first, second)


@pytest.mark.parametrize("change", [
    {"prompt": "a red house"}, {"negative_prompt": "a dog"}, {"steps": 5}, {"guidance": 3.0}, {"seed": 1},
    {"scheduler": "Euler a"}, {"sampler": "DPM++ 2M Karras"}, {"eta": 1.0}, {"guidance_rescale": 0.7},
], ids=str)
def test_each_parameter_of_text_to_image_has_its_effect(change):
    assert differs("sd15", {"guidance": 7.5}, change)


@pytest.mark.parametrize(("kind", "wanted", "about"), [
    ("sd15-controlnet", {"control": PHOTO, "control_start": 0.9, "control_end": 0.1}, "0.9 cannot be larger"),
    ("flux2-klein", {"image": picture(1)[:32]}, "Image too small"),
])
def test_what_the_pipeline_s_own_checks_refuse_is_told_in_their_words(kind, wanted, about):
    with pytest.raises(InvalidParameter, match=f"the model does not take this request: .*{about}"):
        only(model(kind), item(**wanted))


def test_a_fault_in_the_pipeline_is_not_told_as_the_request_s(monkeypatch):
    made = build("sd15")
    monkeypatch.setattr(type(made._base.unet), "forward", lambda *_, **__: [].index(1))
    with pytest.raises(ValueError, match="is not in list"):
        only(made, item())


def test_a_control_map_is_worked_on_within_the_longest_side():
    made = build("sd15-controlnet", max_side=64)
    wide = np.zeros((48, 96, 3), np.uint8)
    for sized, worked_at in (({}, [64, 32]), ({"width": 96, "height": 48}, [96, 48])):
        (output,) = outputs(made, item(control=wide, size=(48, 96), steps=1, **sized))
        assert output.facts["worked_at"] == worked_at and output.image.shape == (48, 96, 3)


@pytest.mark.parametrize("change", [{"strength": 0.9}, {"seed": 3}, {"prompt": "a dog"}], ids=str)
def test_each_parameter_of_image_to_image_has_its_effect(change):
    assert differs("sd15", {"image": PHOTO, "strength": 0.5}, change)


@pytest.mark.parametrize("change", [
    {"controlnet_scale": 0.2}, {"control_start": 0.5}, {"control_end": 0.4},
    {"control": np.zeros_like(PHOTO)},
], ids=lambda change: next(iter(change)))
def test_each_parameter_of_control_has_its_effect(change):
    assert differs("sd15-controlnet", {"control": PHOTO}, change)


def test_a_parameter_that_a_task_has_no_use_for_does_nothing():
    first, second = images(model("sd15"), item(), item(strength=0.3, true_cfg_scale=9.0))
    assert same(first, second)


def test_the_seed_is_the_whole_of_chance_and_is_told():
    torch.manual_seed(1)
    first = outputs(model("sd15"), item(seed=7))[0]
    torch.manual_seed(2)
    again = outputs(model("sd15"), item(seed=7))[0]
    assert np.array_equal(first.image, again.image) and first.facts["seed"] == 7
    one, two = outputs(model("sd15"), item(seed=-1), item(seed=None))
    assert one.facts["seed"] != two.facts["seed"]
    repeated = only(model("sd15"), item(seed=one.facts["seed"]))
    assert same(repeated, one.image)
    assert seed_of({"seed": 2**64 - 1}) == 2**64 - 1 and 0 <= seed_of({}) < 2**32


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_every_sampler_gives_the_image_of_its_scheduler(name):
    pipeline = stock("sd15")
    pipeline.__dict__["scheduler"] = samplers.make(name, pipeline.scheduler)
    kind, _ = samplers.SAMPLERS[name]
    assert type(pipeline.scheduler).__name__ == kind
    made = only(model("sd15"), item(scheduler=name, steps=4, guidance=5.0))
    assert same(made, alone(pipeline, num_inference_steps=4, guidance_scale=5.0, height=64, width=64))


@pytest.mark.parametrize("name", samplers.FLOW_SAMPLERS)
def test_flow_models_have_samplers_of_their_own(name):
    pipeline = stock("flux")
    pipeline.__dict__["scheduler"] = samplers.make(name, pipeline.scheduler)
    assert same(only(model("flux"), item(scheduler=name)), alone(pipeline, height=64, width=64))


def test_a_sampler_has_many_spellings_and_an_unknown_one_is_refused_with_the_list():
    own = stock("sd15").scheduler
    for spelling in ("DPM++ 2M Karras", "dpmpp_2m_karras", "dpm++2mkarras"):
        assert samplers.make(spelling, own).config.use_karras_sigmas
    assert type(samplers.make("EulerAncestralDiscreteScheduler", own)) is type(samplers.make("euler_a", own))
    assert samplers.make("", own) is None
    with pytest.raises(InvalidParameter, match="it has Euler, Euler a"):
        samplers.make("magic", own)
    with pytest.raises(InvalidParameter, match="no sampler 'DDIM'"):
        model("flux").start(item(scheduler="DDIM"))


def test_a_results_size_is_what_was_asked_whatever_multiples_the_network_needs():
    drawn, odd, edited = outputs(
        model("sd15"), item(size=(72, 96)), item(size=(70, 101)), item(picture(2, 101, 70), strength=0.7)
    )
    assert drawn.image.shape == (72, 96, 3) and drawn.facts["worked_at"] == [96, 72]
    assert odd.image.shape == (70, 101, 3) and odd.facts["worked_at"] == [104, 72]
    assert edited.image.shape == (70, 101, 3)


def test_edits_work_at_the_longest_side_that_is_allowed_and_return_to_the_inputs_size():
    wide = picture(3, 200, 80)
    made = build("flux-kontext", max_side=96)
    usual, larger = outputs(made, item(wide), item(wide, max_side=160))
    assert usual.image.shape == larger.image.shape == (80, 200, 3)
    assert usual.facts["worked_at"] == [96, 32] and larger.facts["worked_at"] == [160, 64]
    assert pixels.working_size((4000, 3000), 768, 16) == (768, 576)
    assert pixels.working_size((3000, 1), 768, 16) == (768, 16)
    assert pixels.working_size((500, 300), 768, 8) == (496, 304)
    assert pixels.working_size((4000, 3000), 0, 8) == (4000, 3000)


def test_a_strength_of_less_than_one_step_is_refused():
    with pytest.raises(InvalidParameter, match="less than one step"):
        model("sd15").start(item(PHOTO, strength=0.2, steps=3))


def test_edges_are_found_at_the_thresholds_that_were_asked():
    soft = np.tile(np.linspace(0, 255, 64, dtype=np.uint8)[:, None, None], (1, 64, 3))
    assert not pixels.canny(soft).any()
    assert pixels.canny(PHOTO).any() and set(np.unique(pixels.canny(PHOTO))) <= {0, 255}
    net = build("sd15-controlnet")
    net._control_nets = {"canny": net._control_nets[""]}
    first, second = images(net, item(PHOTO, control_type="canny"),
                           item(PHOTO, control_type="canny", canny_low=10, canny_high=900))
    assert not np.array_equal(first, second)


def test_a_threshold_of_0_is_one():
    for low, high in ((0, 0), (0, 200), (100, 0)):
        found = control_of(item(PHOTO, control_type="canny", canny_low=low, canny_high=high), ["canny"])
        assert np.array_equal(found.map, pixels.canny(PHOTO, low, high))


def test_outside_the_mask_every_byte_stays_and_between_it_blends():
    result, original = np.full((1, 3, 3), 200, np.uint8), np.full((1, 3, 3), 100, np.uint8)
    mask = np.array([[0, 128, 255]], np.uint8)
    assert pixels.outside_kept(result, original, mask)[0, :, 0].tolist() == [100, 150, 200]


def test_bytes_are_rounded_as_diffusers_rounds():
    from diffusers.image_processor import VaeImageProcessor

    floats = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = np.asarray(VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(floats))[0])
    assert np.array_equal(pixels.to_bytes(floats), expected)
    assert np.array_equal(pixels.to_bytes([pil(PHOTO)]), PHOTO)
    assert np.array_equal(pixels.to_bytes(floats.permute(0, 2, 3, 1).numpy()), expected)


def test_what_is_no_picture_is_said():
    with pytest.raises(BadOutput, match="NaN"):
        pixels.to_bytes(torch.full((1, 3, 8, 8), float("nan")))
    with pytest.raises(BadOutput, match="all-black"):
        pixels.to_bytes(torch.zeros(1, 3, 8, 8))
    with pytest.raises(BadOutput, match="shape"):
        pixels.to_bytes(torch.zeros(1, 7, 8, 8))
    with pytest.raises(BadOutput, match="no picture"):
        pixels.to_bytes("nothing")


def test_a_network_that_answers_nan_fails_its_own_request(monkeypatch):
    made = build("sd15")
    weight = next(made._base.vae.decoder.parameters())
    weight.data = torch.full_like(weight.data, float("nan"))
    (end,) = made.run([item()])
    assert isinstance(end, BadOutput)


@pytest.mark.parametrize(("wanted", "least", "most"), [
    (item(steps=10), 10, 10), (item(steps=10, scheduler="Heun"), 10, 19),
    (item(PHOTO, steps=10, strength=0.5), 5, 5),
])
def test_what_remains_is_estimated(wanted, least, most):
    assert least <= model("sd15").remaining(wanted) <= most


def test_the_examples_are_model_files_that_the_catalogue_reads():
    catalogue = Catalogue.read([EXAMPLES])
    assert {"sd15", "sdxl", "sdxl-turbo", "flux-dev", "flux-kontext", "qwen-image", "qwen-image-edit",
            "qwen-image-edit-plus"} <= {spec.name for spec in catalogue}
    for spec in catalogue:
        if not spec.stepped:
            continue
        assert spec.adapter == "models.diffusion.adapter:Diffusion" and spec.steps_param == "steps"
        params = spec.check_params({"prompt": "a cat"})
        assert params["steps"] >= 1 and spec.options["source"]
    assert catalogue["sdxl"].canvas(None, {}) == (1024, 1024) and catalogue["sd15"].canvas(None, {}) == (512, 512)
    assert catalogue["sdxl"].canvas(None, {"height": 640, "width": 960}) == (640, 960)

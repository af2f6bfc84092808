"""Between two forwards nobody waits for the device: no value is asked for, nothing is copied that one would wait for.

What the libraries do all the same is listed here, so that it cannot grow unseen.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import diffusers
import pytest
import torch
from diffusion_kit import hole, item, model, picture
from sync_kit import Far, Watch, far, steady
from test_steps_unet import SCHEDULERS

from models.diffusion import samplers
from models.stepping.columns import OnePerSample, Shared

torch.set_num_threads(1)
STEPS, SETTLED = 8, 3  # the first steps fetch what is needed once for each request

# What draws noise at each step draws it on the host, so that it is the same on every device.
NOISE = {"ddim eta", "ddpm", "euler ancestral", "dpm++ 2m sde", "lcm"}
# What is outside of the mask gets the noise of each step by a way that asks for the timestep.
INPAINTING = {"tensor in pipeline_stable_diffusion_inpaint.py", "to the device in scheduling_"}
QWEN = {"as_tensor to the device in transformer_qwenimage.py", "tensor to the device in transformer_qwenimage.py"}


def waits(made: Any, *items: Any) -> Counter[str]:
    """What the steps in the middle of the requests wait for."""
    told = steady(made, *items)
    assert len(told) > SETTLED + 2
    return sum(told[SETTLED:-2], Counter())


def unknown(found: Counter[str], known: set[str]) -> list[str]:
    return [what for what in found if not what.startswith(tuple(known) or ("nothing",))]


def sampled(monkeypatch: Any, name: str) -> dict[str, Any]:
    """Have all requests use that scheduler; the arguments it is tested with."""
    kind, config, arguments = SCHEDULERS[name]
    made = getattr(diffusers, kind).from_config(model("sd15")._scheduler.config, **config)
    monkeypatch.setattr(samplers, "make", lambda *_: made)
    return arguments


@pytest.mark.parametrize("name", SCHEDULERS)
def test_no_step_of_any_scheduler_waits_for_the_device(name, monkeypatch):
    arguments = sampled(monkeypatch, name)
    known = {"noise to the device in torch_utils.py"} if name in NOISE else set()
    known |= {"to the device in scheduling_unipc_multistep.py"} if name == "unipc" else set()
    usual = {"steps": STEPS, **arguments}
    found = waits(model("sd15"), item(**usual), item(seed=2, prompt="a dog", **usual))
    assert not unknown(found, known), found
    assert bool(found) == bool(known), "what is listed here is gone; take it off the list"


@pytest.mark.parametrize("name", ["ddim", "euler", "dpm++ 2m"])
def test_pictures_to_start_from_and_masks_bring_what_is_known(name, monkeypatch):
    usual = {"steps": STEPS + 2, "strength": 0.9, **sampled(monkeypatch, name)}
    assert not waits(model("sd15"), item(picture(1), **usual))
    found = waits(model("sd15"), item(picture(1), hole(), **usual))
    assert found and not unknown(found, INPAINTING), found


@pytest.mark.parametrize("kind", [
    "sd15-inpaint", "sd15-controlnet", "sdxl", "sdxl-inpaint", "sdxl-controlnet", "flux", "flux-kontext", "flux2-klein",
    "qwen-image", "qwen-image-edit", "qwen-image-edit-plus",
])
def test_no_step_of_any_kind_waits_for_the_device(kind):
    given: dict[str, Any] = {"steps": STEPS}
    if any(word in kind for word in ("inpaint", "edit", "kontext")):
        given["image"] = picture(1)
    if "inpaint" in kind:
        given["mask"] = hole()
    if "controlnet" in kind:
        given["control"] = picture(2)
    words = "a photo of a red house, low quality"
    found = waits(model(kind), item(**given), item(seed=1, prompt=words, **given))
    assert not unknown(found, QWEN if "qwen" in kind else set()), found


def test_the_watch_sees_every_way_of_waiting():
    device, here = torch.device("cpu"), far(torch.arange(4.0))
    ways: list[Any] = [
        lambda: here[0].item(), lambda: bool(here[0] > 1), lambda: float(here[1]), lambda: here.tolist(),
        lambda: here.cpu(), lambda: here.to("cpu"), lambda: here.nonzero(), lambda: here[here > 1],
        lambda: torch.arange(9)[here.long()], lambda: torch.tensor([here[0]]), lambda: here.numpy(),
        lambda: torch.ones(3).to(device), lambda: torch.tensor([1.0], device=device), lambda: (here * 2)[0].item(),
    ]  # fmt: skip
    for number, way in enumerate(ways):
        with Watch() as watch:
            way()
        assert sum(watch.waits.values()) == 1, (number, watch.waits)
    free: list[Any] = [
        lambda: here * 2 + 1, lambda: here[1:], lambda: here.to(torch.float16), lambda: here.to(device),
        lambda: torch.full((2,), 1.0, device=device), lambda: torch.ones(3)[1].item(), lambda: here[torch.tensor([1])],
        lambda: torch.ones(2).to(device, non_blocking=True), lambda: here.shape[0] + here.ndim,
    ]  # fmt: skip
    for number, way in enumerate(free):
        with Watch() as watch:
            way()
        assert not watch.waits, (number, watch.waits)


def test_keys_and_columns_ask_for_no_value_twice():
    ids, column = far(torch.arange(12.0).reshape(6, 2)), Shared()
    with Watch() as watch:
        first = column.key(ids, 1)
    assert sum(watch.waits.values()) == 1
    with Watch() as watch:
        assert column.key(ids, 1) == first
        joined = OnePerSample().join([far(torch.tensor(7)), 3.5, far(torch.tensor([1.0, 2.0]))], [2, 1, 2], ids.device)
    assert not watch.waits and isinstance(joined, Far)
    ids.add_(1)
    assert column.key(ids, 1) != first, "what was changed in place is looked at again"

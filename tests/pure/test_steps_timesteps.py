"""Schedulers get their timesteps on the host: none of them fetches one from where the networks' are."""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar

import pytest
import torch
from diffusion_kit import model

from models.diffusion import samplers
from models.stepping.timesteps import HostTimesteps

FETCHES = {"item", "nonzero", "__bool__", "__int__", "__float__", "__index__", "tolist", "numpy"}


class Far(torch.Tensor):
    """Timesteps that count how often their values are fetched, as from a device, by themselves or to index a table."""

    fetched: ClassVar[Counter[str]] = Counter()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in FETCHES or (name == "__getitem__" and not isinstance(args[0], Far)):
            cls.fetched[name] += 1
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("sampler", ["DDIM", "PNDM", "LCM", "TCD", "DDPM", "Euler", "DPM++ 2M", "UniPC"])
def test_no_step_but_the_first_fetches_its_timestep(sampler):
    assert torch.equal(denoised(sampler, far=True), denoised(sampler, far=False))


def denoised(sampler: str, far: bool) -> torch.Tensor:
    """What the sampler makes of noise; `far`: of timesteps that are on a device, by our way."""
    scheduler = samplers.make(sampler, model("sd15")._scheduler)
    scheduler.set_timesteps(6)
    if far:
        scheduler.timesteps = scheduler.timesteps.as_subclass(Far)
    timesteps, chance = HostTimesteps(scheduler), torch.Generator().manual_seed(0)
    more = {"generator": chance} if sampler in ("LCM", "TCD", "DDPM") else {}
    latents = torch.randn(1, 4, 8, 8, generator=chance)
    for number, timestep in enumerate(scheduler.timesteps):
        guess = 0.5 * scheduler.scale_model_input(latents, timestep)
        Far.fetched.clear()
        if far:
            with timesteps.during_step(timestep) as near:
                latents = scheduler.step(guess, near, latents, return_dict=False, **more)[0]
            assert number == 0 or not Far.fetched, Far.fetched
        else:
            latents = scheduler.step(guess, timestep, latents, return_dict=False, **more)[0]
    return latents


def test_the_test_sees_a_fetch():
    scheduler = samplers.make("DDIM", model("sd15")._scheduler)
    scheduler.set_timesteps(6)
    Far.fetched.clear()
    timesteps = scheduler.timesteps.as_subclass(Far)
    scheduler.step(torch.zeros(1, 4, 8, 8), timesteps[0], torch.zeros(1, 4, 8, 8))
    assert Far.fetched


def test_what_is_not_the_scheduler_s_stays_as_it_is():
    scheduler = samplers.make("DDIM", model("sd15")._scheduler)
    scheduler.set_timesteps(6)
    timesteps = HostTimesteps(scheduler)
    late, other = scheduler.timesteps[2:], torch.tensor(7)
    for given, wanted in ((other, 7), (7, 7), (late[1], int(scheduler.timesteps[3]))):  # image-to-image begins later
        with timesteps.during_step(given) as near:
            assert near == wanted
    far = scheduler.timesteps
    with pytest.raises(ZeroDivisionError), timesteps.during_step(far[0]):
        assert scheduler.timesteps is not far
        raise ZeroDivisionError
    assert scheduler.timesteps is far
    scheduler.set_timesteps(3)
    with timesteps.during_step(scheduler.timesteps[1]) as near:
        assert near == scheduler.timesteps[1]

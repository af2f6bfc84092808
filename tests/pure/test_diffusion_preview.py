"""Previews: what a step guesses is what the picture becomes, and nothing is computed when nobody looks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusion_kit import alone, build, item, model, same, stock

from models.base import Item, Output
from models.diffusion import preview
from models.diffusion.adapter import Diffusion
from models.diffusion.pixels import resized

WIDE = (64, 96)  # height and width


def run_and_watch(made: Diffusion, wanted: Item) -> tuple[Output, list[np.ndarray]]:
    """The output, and the previews on the way."""
    run, shown = made.start(wanted), []
    with torch.no_grad():
        try:
            call = run.send(None)
            while True:
                call = run.send(call.network.forward([call])[0])
                if run.preview is not None:
                    shown.append(run.preview)
                    run.preview = None
        except StopIteration as end:
            return end.value, shown


def looked_at(**params: Any) -> Item:
    return replace(item(size=WIDE, steps=6, **params), previews=True)


def make_linear(vae: Any) -> None:
    """A decoder that a linear map can follow, in place of the random one, which follows nothing."""
    channels = getattr(vae.config, "latent_channels", None) or vae.config.z_dim
    colours = torch.randn(3, channels, generator=torch.Generator().manual_seed(0)) * 0.3 / channels**0.5

    def decode(z: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
        made = torch.einsum("kc,nc...->nk...", colours, _unscaled(vae, z)) + 0.1
        return (made.repeat_interleave(8, -1).repeat_interleave(8, -2),)

    vae.decode = decode


def _unscaled(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """To values about 1, whatever the VAE's scale."""
    scale = getattr(vae.config, "scaling_factor", None) or 1.0
    return (latents - (getattr(vae.config, "shift_factor", None) or 0.0)) * scale


def likeness(first: np.ndarray, second: np.ndarray) -> float:
    """Correlation of two pictures, as coarse as latents are."""
    small = [resized(one, (8, 12)).astype(float).ravel() for one in (first, second)]
    return float(np.corrcoef(*small)[0, 1])


@pytest.mark.parametrize(("kind", "sampler"), [
    ("sd15", "DDIM"), ("sd15", "Euler"), ("sd15", "Euler Karras"), ("sd15", "DPM++ 2M Karras"), ("sd15", "UniPC"),
    ("sd15", "Heun"), ("sd15", "PNDM"), ("sd15", "LCM"), ("sdxl", ""), ("flux", ""), ("flux2-klein", ""),
    ("qwen-image", ""), ("qwen-image", "UniPC"),
])  # fmt: skip
def test_the_last_preview_is_the_picture(kind, sampler, monkeypatch):
    monkeypatch.setattr(preview, "EVERY", 0.0)
    made = build(kind)
    make_linear(made._base.vae)
    output, shown = run_and_watch(made, looked_at(scheduler=sampler))
    assert len(shown) >= 6 and shown[-1].shape == output.image.shape == (*WIDE, 3)
    assert output.image.std() > 5, "a grey picture proves nothing"
    assert likeness(shown[-1], output.image) > 0.95 > 0.5 > likeness(shown[-1][::-1], output.image)
    assert abs(shown[-1].mean() - output.image.mean()) < 5


def test_a_request_that_is_looked_at_gets_the_same_picture():
    output, shown = run_and_watch(model("sd15"), replace(item(seed=4), previews=True))
    assert len(shown) == 1, "the first step's; the others came within a second"
    assert same(output.image, alone(stock("sd15"), 4, height=64, width=64))


def test_a_preview_that_cannot_be_made_costs_nobody_the_picture(monkeypatch, capsys):
    monkeypatch.setattr(preview, "EVERY", 0.0)
    made = build("sd15")
    made._base.vae.decode = lambda *_, **__: 1 / 0
    run = made.start(looked_at())
    with torch.no_grad():
        call = run.send(None)
        while run.progress < 0.5:  # more than one step
            call = run.send(call.network.forward([call])[0])
    assert run.preview is None and capsys.readouterr().err.count("ZeroDivisionError:") == 1
    run.close()


def test_nothing_is_computed_when_nobody_looks(monkeypatch):
    monkeypatch.setattr(preview, "guess", lambda *_: pytest.fail("nobody looks"))
    made = build("sd15")
    _, shown = run_and_watch(made, item())
    assert not shown and made._colours._map is None


def test_previews_are_small_and_come_at_most_once_a_second(monkeypatch):
    ticks = iter([0.0, 0.5, 0.9, 1.2, 1.3])
    colours = preview.LatentColours(model("sd15")._base.vae, lambda vae: None)
    look = preview.Look(colours, (512, 1024), lambda: next(ticks))
    scheduler, latents = model("sd15")._scheduler, torch.randn(1, 4, 64, 128)
    shown = [look(scheduler, latents, 500, latents) for _ in range(5)]
    assert [one is not None for one in shown] == [True, False, False, True, False]
    assert shown[0].shape == (256, 512, 3) and shown[0].dtype == np.uint8


def test_what_a_sampler_of_an_unknown_kind_guesses_is_not_shown():
    class Unknown:
        config = type("Config", (), {})()

    look = preview.Look(preview.LatentColours(None, lambda vae: None), (64, 64))
    assert look(Unknown(), torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 4, 8, 8)) is None
    assert preview.unpacked(torch.zeros(1, 7, 64), (64, 64)) is None


def test_v_and_noise_guess_alike():
    class Scheduler:
        def __init__(self, kind: str) -> None:
            self.config = type("Config", (), {"prediction_type": kind})()
            self.alphas_cumprod, self.init_noise_sigma = torch.linspace(0.99, 0.01, 1000), 1.0

    clean, noise = torch.randn(2, 1, 4, 8, 8)
    signal, share = preview._shares(torch.linspace(0.99, 0.01, 1000), 300.5)
    mixed, velocity = signal * clean + share * noise, signal * noise - share * clean
    for kind, told in (("epsilon", noise), ("v_prediction", velocity), ("sample", clean)):
        assert torch.allclose(preview.guess(Scheduler(kind), told, 300.5, mixed), clean, atol=1e-5)

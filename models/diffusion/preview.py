"""What a picture will become, seen while it is being made.

Each step of a sampler has a guess of the finished latents. Through a linear map it becomes a small picture at next to
no cost; the VAE itself takes as long as a step or two. The map is fitted, once, to what it makes of random latents.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from models.diffusion import pixels

EVERY = 1.1  # seconds between two previews of a request; the worker drops what comes more often than once a second
FITTED_SIDE = 24  # of the random latents
LONGEST = 512  # side of a preview in pixels


class LatentColours:
    """The linear map from the latents of one VAE, as the denoiser sees them, to colours. It is fitted when it is first
    needed. `bring`: has the VAE's weights on the device."""

    def __init__(self, vae: Any, bring: Callable[[Any], None]) -> None:
        self._vae, self._bring = vae, bring
        self._map: Tensor | None = None  # (channels + 1) x 3, the last row a constant

    def picture(self, latents: Tensor) -> np.ndarray:
        """Latents (channels x h x w) as uint8 h x w x 3."""
        if self._map is None:
            self._map = self._fit(len(latents)).to(latents.device, torch.float32)
        colours = latents.float().permute(1, 2, 0) @ self._map[:-1] + self._map[-1]
        picture: np.ndarray = ((colours + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
        return picture

    def _fit(self, channels: int) -> Tensor:
        """By least squares, from latents that are random, but as smooth as those of pictures."""
        chance = torch.Generator("cpu").manual_seed(0)
        coarse = torch.randn(1, channels, 4, 4, generator=chance)
        fine = torch.randn(1, channels, FITTED_SIDE, FITTED_SIDE, generator=chance)
        latents = functional.interpolate(coarse, size=fine.shape[2:], mode="bilinear") + 0.5 * fine
        self._bring(self._vae)
        decoded = self._decode(latents.to(self._vae.device, torch.float32)).float().cpu()
        wanted = functional.adaptive_avg_pool2d(decoded, FITTED_SIDE)[0].flatten(1).T
        known = functional.pad(latents[0].flatten(1).T, (0, 1), value=1.0)
        return torch.linalg.lstsq(known.double(), wanted.nan_to_num().double()).solution

    def _decode(self, latents: Tensor) -> Tensor:
        """Latents (1 x channels x h x w) as 1 x 3 x H x W, -1 to 1."""
        scaled = _as_the_vae_takes_them(self._vae, latents).to(self._vae.dtype)
        if not hasattr(self._vae.config, "temperal_downsample"):
            return torch.as_tensor(self._vae.decode(scaled, return_dict=False)[0])
        film = self._vae.decode(scaled.unsqueeze(2), return_dict=False)[0]  # a picture is a film of one frame
        return torch.as_tensor(film[:, :, 0])


class Look:
    """What a run shows of one request: called with each step of its sampler, it answers with a picture now and then.
    `size`: height and width in pixels at which the pipeline works."""

    def __init__(
        self, colours: LatentColours, size: tuple[int, int], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._colours, self._size, self._clock = colours, size, clock
        self._shown = float("-inf")

    def __call__(self, scheduler: Any, prediction: Tensor, timestep: Any, sample: Tensor) -> np.ndarray | None:
        """The picture that this step guesses (uint8, at most 512 pixels a side); None: not now, or not known."""
        now = self._clock()
        if now - self._shown < EVERY:
            return None
        self._shown = now
        guessed = guess(scheduler, prediction[:1], timestep, sample[:1])
        latents = None if guessed is None else unpacked(guessed, self._size)
        if latents is None:
            return None
        return pixels.resized(self._colours.picture(latents), pixels.working_size(self._size, LONGEST, 1))


def guess(scheduler: Any, prediction: Tensor, timestep: Any, sample: Tensor) -> Tensor | None:
    """The finished latents that a prediction means, of the samples that it was made for; None where the sampler is of
    another kind than those known (noise, v of Salimans & Ho 2022, the sample itself, the flow of Liu et al. 2022)."""
    kind = getattr(scheduler.config, "prediction_type", None)
    at = float(timestep)
    if kind == "flow_prediction" or (kind is None and type(scheduler).__name__.startswith("FlowMatch")):
        return sample - at / scheduler.config.num_train_timesteps * prediction
    if kind == "sample":
        return prediction
    if not hasattr(scheduler, "alphas_cumprod"):
        return None
    signal, noise = _shares(scheduler.alphas_cumprod, at)
    if float(scheduler.init_noise_sigma) > 1.01:  # it works on pictures with noise added, not mixed in
        sample = sample * signal
    if kind == "v_prediction":
        return signal * sample - noise * prediction
    return (sample - noise * prediction) / signal if kind == "epsilon" else None


def unpacked(latents: Tensor, size: tuple[int, int]) -> Tensor | None:
    """The first sample's latents as channels x h x w. Transformers have them as tokens, each a square of four; for a
    picture of another aspect than `size` their places are not known: None."""
    if latents.ndim == 4:
        return latents[0]
    if latents.ndim != 3:
        return None
    count, width = latents.shape[1:]
    rows = round((count * size[0] / size[1]) ** 0.5)
    columns = count // max(1, rows)
    if rows * columns != count or width % 4:
        return None
    squares = latents[0].reshape(rows, columns, width // 4, 2, 2).permute(2, 0, 3, 1, 4)
    return squares.reshape(width // 4, 2 * rows, 2 * columns)


def _shares(kept: Tensor, at: float) -> tuple[float, float]:
    """How much of picture and of noise there is at a timestep, which may lie between two whole ones."""
    low = min(max(int(at), 0), len(kept) - 1)
    high = min(low + 1, len(kept) - 1)
    alpha = float(kept[low]) + (at - int(at)) * (float(kept[high]) - float(kept[low]))
    return alpha**0.5, (1 - alpha) ** 0.5


def _as_the_vae_takes_them(vae: Any, latents: Tensor) -> Tensor:
    """Latents with the mean and the scale that the VAE knows; a denoiser's are of mean 0 and scale 1."""
    config = vae.config
    if (norm := getattr(vae, "bn", None)) is not None:  # Flux.2 has it for squares of four
        mean = norm.running_mean.view(-1, 4).mean(1)
        scale = (norm.running_var.view(-1, 4).mean(1) + config.batch_norm_eps).sqrt()
    else:
        mean, scale = (
            torch.tensor(getattr(config, name, None) or [usual])
            for name, usual in (("latents_mean", 0.0), ("latents_std", 1.0))
        )
        scale = scale / (getattr(config, "scaling_factor", None) or 1.0)
        mean = mean + (getattr(config, "shift_factor", None) or 0.0)
    mean, scale = (one.view(1, -1, 1, 1).to(latents) for one in (mean, scale))
    return latents * scale + mean

"""Enhancement without weights: less noise, more local contrast, crisper edges, fuller range.

Noise is measured (Immerkaer 1996, at the lower quartile instead of the mean, which texture would spoil) and smoothed by
guided filters (He, Sun, Tang 2010) in proportion. Local contrast is raised by fast local Laplacian filters (Paris,
Hasinoff, Kautz 2011; Aubry et al. 2014), which give detail without halos. Then come a mild stretch of the tones
between the darkest and the lightest half per cent, and an unsharp mask that may not overshoot its surroundings.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.base import Adapter, Item, Output
from models.checkpoint import checkpoint, in_parts, parts
from models.tensors import blur, guided_filter, per_item, rgb_to_ycbcr, stack, to_uint8, ycbcr_to_rgb
from models.wishes import granted

TILE, MARGIN = 704, 160  # pixels; five levels and the filters beside them reach no further than the margin
DEPTH = 5  # levels of detail; tiles begin at multiples of 2**DEPTH, so that all share one pyramid
SHADES = 8  # grey values at which the local Laplacian is sampled
DETAIL = 0.15  # a difference from the surroundings of this size is still detail, a greater one an edge
BINOMIAL = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)


class Enhance(Adapter):
    """Params: `strength` 0.1-1, how much of everything; `guidance` 1-20, how strongly detail is raised."""

    def warm_up(self) -> None:
        self.run([Item({"strength": 0.3, "guidance": 7.5}, np.zeros((64, 64, 3), np.uint8))])

    def run(self, items: Sequence[Item]) -> list[Output | Exception]:
        """Outputs of the items' size."""
        assert items[0].image is not None
        height, width = items[0].image.shape[:2]
        most = (TILE + 2 * MARGIN) ** 2 // (height * width)
        return in_parts(parts(items, self.device, most), self._run_part)

    def _run_part(self, items: Sequence[Item]) -> list[Output]:
        items = granted(items, self.device)
        images = [item.image for item in items if item.image is not None]
        batch = stack(images, self.device)
        height, width = batch.shape[2:]
        numbers = torch.zeros(0, device=self.device)
        strength = per_item((float(item.params["strength"]) for item in items), numbers)
        guidance = per_item((float(item.params["guidance"]) for item in items), numbers)
        noise, tones = survey(batch)
        results = [np.empty_like(image) for image in images]
        corners = [(y, x) for y in range(0, height, TILE) for x in range(0, width, TILE)]
        for done, (y, x) in enumerate(corners, 1):
            checkpoint()
            top, left = max(0, y - MARGIN), max(0, x - MARGIN)
            tile = batch[:, :, top : y + TILE + MARGIN, left : x + TILE + MARGIN].contiguous().float().div_(255)
            tile = enhance(tile, strength, guidance, noise, tones)
            tile = tile[:, :, y - top : y - top + TILE, x - left : x - left + TILE]
            for result, pixels in zip(results, to_uint8(tile), strict=True):
                result[y : y + TILE, x : x + TILE] = pixels
            for item in items:
                item.report(done / len(corners))
        return [Output(result) for result in results]


def enhance(rgb: Tensor, strength: Tensor, guidance: Tensor, noise: Tensor, tones: Tensor) -> Tensor:
    """N x 3 x H x W in 0..1; the parameters N x 1 x 1 x 1, `noise` and `tones` as `survey` finds them."""
    luma, colour = rgb_to_ycbcr(rgb).split((1, 2), 1)
    calm = (strength * 2).clamp_max(1)
    eps = noise * noise * 6.25 + 1e-6
    smooth = guided_filter(luma, luma, 2, eps)
    colour = colour + (guided_filter(smooth, colour, 3, eps) - colour) * calm
    before = luma = luma + (smooth - luma) * calm
    boost = strength * guidance / 7.5
    luma = local_laplacian(luma, boost * 1.5, noise)
    luma = stretch(luma, tones, strength)
    luma = sharpen(luma, boost, noise)
    gain = ((luma + 0.1) / (before + 0.1)).clamp_(0.7, 1.5)  # lighter places need more colour to look as colourful
    return ycbcr_to_rgb(torch.cat([luma, colour * (gain * (1 + strength * 0.15))], 1))


def survey(batch: Tensor) -> tuple[Tensor, Tensor]:
    """What must be known of the whole image, from uint8 N x 3 x H x W, counted in whole numbers: the standard deviation
    of its noise (N x 1 x 1 x 1, 0..0.1), and the darkest and lightest half per cent (N x 2 x 1 x 1, 0..1).

    The noise is what a second difference in both directions leaves, which is next to nothing of edges and slopes."""
    noises, tones = [], []
    pixels = batch.shape[2] * batch.shape[3]
    for item in batch:
        grey = item[0].int() * 77 + item[1].int() * 150 + item[2].int() * 29  # 256 steps to one of 0..255
        shades = torch.bincount((grey >> 8).flatten(), minlength=256).cumsum(0)
        tones.append(torch.stack([(shades * 200 <= pixels).sum(), (shades * 200 < pixels * 199).sum()]))
        rows = grey[:-2] - grey[1:-1] * 2 + grey[2:]
        left = (rows[:, :-2] - rows[:, 1:-1] * 2 + rows[:, 2:]).abs_().flatten() >> 6  # 4 steps to one of 0..255
        noises.append((torch.bincount(left, minlength=1).cumsum(0) * 4 < left.numel()).sum())
    noise = torch.stack(noises).float() / (0.3186 * 6 * 4 * 255)
    return noise.clamp_max_(0.1).view(-1, 1, 1, 1), torch.stack(tones).float().div_(255).view(-1, 2, 1, 1)


def local_laplacian(luma: Tensor, gain: Tensor, noise: Tensor) -> Tensor:
    """Multiplies detail (differences from the surroundings up to about `DETAIL`, at every scale) by 1 + gain, leaves
    edges and what is no more than noise as they are."""
    guides = [luma]
    for _ in range(DEPTH):
        guides.append(reduce(guides[-1]))
    bands = [torch.zeros_like(guide) for guide in guides[:-1]]
    floor = noise * noise * 4 + 1e-8
    for shade in (number / (SHADES - 1) for number in range(SHADES)):
        checkpoint()
        distance = luma - shade
        square = distance * distance
        level = luma + distance * torch.exp(square / (-2 * DETAIL * DETAIL)) * (square / (square + floor)) * gain
        del distance, square
        for guide, band in zip(guides, bands, strict=False):
            coarse = reduce(level)
            share = (1 - (guide - shade).abs_() * (SHADES - 1)).clamp_min_(0)  # linear between two sampled shades
            band += (level - expand(coarse, level)) * share
            level = coarse
    result = guides[-1]
    for band in reversed(bands):
        result = expand(result, band) + band
    return result


def reduce(image: Tensor) -> Tensor:
    """The next level of a Gaussian pyramid: half the size, rounded up."""
    for axis in (2, 3):
        wide = F.pad(image, (0, 0, 2, 2) if axis == 2 else (2, 2, 0, 0), mode="replicate")
        length = image.shape[axis]
        image = torch.zeros_like(wide.narrow(axis, 0, length)[(slice(None),) * axis + (slice(None, None, 2),)])
        for at, weight in enumerate(BINOMIAL):
            image += wide.narrow(axis, at, length)[(slice(None),) * axis + (slice(None, None, 2),)] * weight
    return image


def expand(image: Tensor, like: Tensor) -> Tensor:
    """The way back: an image of `like`'s size, interpolated by the same kernel."""
    for axis in (2, 3):
        wide = F.pad(image, (0, 0, 1, 1) if axis == 2 else (1, 1, 0, 0), mode="replicate")
        length = image.shape[axis]
        before, here, after = (wide.narrow(axis, at, length) for at in range(3))
        pair = torch.stack([(before + here * 6 + after) / 8, (here + after) / 2], axis + 1)
        image = pair.flatten(axis, axis + 1).narrow(axis, 0, like.shape[axis])
    return image


def stretch(luma: Tensor, tones: Tensor, strength: Tensor) -> Tensor:
    """Moves the darkest and lightest half per cent towards black and white, by at most a factor of 1.5 in contrast."""
    low, high = tones[:, :1], tones[:, 1:]
    span = (high - low).clamp_min(2 / 3)
    start = torch.minimum((low + high - span).clamp_min_(0) / 2, 1 - span)  # a narrow range widens around its middle
    start = torch.where(high - low >= 2 / 3, low, start)
    return luma + ((luma - start) / span - luma) * strength


def sharpen(luma: Tensor, amount: Tensor, noise: Tensor) -> Tensor:
    """Unsharp mask; differences of the noise's size are left out, and no pixel leaves its neighbours' range by more
    than a sixteenth of it."""
    detail = luma - blur(luma, 1.0)
    square = detail * detail
    sharp = luma + detail * (square / (square + noise * noise + 1e-8)) * amount
    highest, lowest = F.max_pool2d(luma, 3, 1, 1), -F.max_pool2d(-luma, 3, 1, 1)
    room = (highest - lowest) / 16
    return torch.minimum(torch.maximum(sharp, lowest - room), highest + room)

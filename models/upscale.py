"""Upscaling by 2 or 4 without weights: sharper than bicubic, true to the pixels it came from, free of rings and stairs.

Starts bicubic (Keys 1981) and repeats three moves on the luminance: level lines are smoothed along themselves
(level-set reconstruction, Morse and Schwartzwald 2001), edges are steepened (shock filter, Osher and Rudin 1990), and
the difference that would remain after scaling down again is projected back (Irani and Peleg 1991). Values stay inside
what the neighbourhood of their source pixel holds. Colour differences are bicubic.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.base import Adapter, Item, Output
from models.checkpoint import Abandoned, cancelled, checkpoint, in_parts, parts
from models.tensors import pad, per_item, rgb_to_ycbcr, stack, to_uint8, ycbcr_to_rgb
from models.wishes import granted

TILE, MARGIN = 384, 16  # source pixels; what lies further than the margin has no visible influence
AT_ONCE = 2 * (TILE + 2 * MARGIN) ** 2 * 4  # result pixels worked on at a time
SMOOTHING, SHOCK, SLACK = 0.2, 0.04, 0.02
FLAT = 0.02  # gradient per pixel below which a place counts as flat and is left alone


class Upscale(Adapter):
    """Params: `scale` 2 or 4; `steps` 1-100, rounds of the three moves; `sharpness` 0-2, the weight of the shock."""

    def warm_up(self) -> None:
        self.run([Item({"scale": 2, "steps": 1, "sharpness": 0.5}, np.zeros((32, 32, 3), np.uint8))])

    def run(self, items: Sequence[Item]) -> list[Output | Exception]:
        """Outputs of `scale` times the items' size. Items that share scale and steps run as one tensor."""
        groups: dict[tuple[int, int], list[Item]] = defaultdict(list)
        for item in items:
            groups[int(item.params["scale"]), int(item.params["steps"])].append(item)
        assert items[0].image is not None
        sides, some = items[0].image.shape[:2], []
        for (scale, _), group in groups.items():
            tile = math.prod(min(TILE + 2 * MARGIN, side) * scale for side in sides)
            some += parts(group, self.device, AT_ONCE // tile)
        outputs = in_parts(some, self._run_part)
        by_item = {id(item): output for item, output in zip(itertools.chain(*some), outputs, strict=True)}
        return [by_item[id(item)] for item in items]

    def _run_part(self, items: Sequence[Item]) -> list[Output | Exception]:
        """Items of one scale and as many steps. One that is cancelled is left out of the tiles that follow."""
        items = granted(items, self.device)
        scale, steps = int(items[0].params["scale"]), int(items[0].params["steps"])
        small = stack([item.image for item in items if item.image is not None], self.device)
        height, width = small.shape[2:]
        sharpness = per_item((float(item.params["sharpness"]) for item in items), torch.zeros(0, device=self.device))
        results = [np.empty((height * scale, width * scale, 3), np.uint8) for _ in items]
        boxes = [(y, x) for y in range(0, height, TILE) for x in range(0, width, TILE)]
        for done, (y, x) in enumerate(boxes, 1):
            rows = [row for row, item in enumerate(items) if not item.cancelled()]
            if not rows:
                raise Abandoned
            top, left = max(0, y - MARGIN), max(0, x - MARGIN)
            tile = small[:, :, top : y + TILE + MARGIN, left : x + TILE + MARGIN].contiguous().float().div_(255)
            tile = upscale(tile[rows], scale, steps, sharpness[rows])
            tile = tile[:, :, (y - top) * scale :, (x - left) * scale :][:, :, : TILE * scale, : TILE * scale]
            for row, pixels in zip(rows, to_uint8(tile), strict=True):
                results[row][y * scale : (y + TILE) * scale, x * scale : (x + TILE) * scale] = pixels
            for item in items:
                item.report(done / len(boxes))
        return [
            cancelled() if item.cancelled() else Output(result) for item, result in zip(items, results, strict=True)
        ]


def upscale(rgb: Tensor, scale: int, steps: int, sharpness: Tensor) -> Tensor:
    """N x 3 x H x W in 0..1 to N x 3 x (scale·H) x (scale·W); `sharpness` is N x 1 x 1 x 1."""
    ycc = rgb_to_ycbcr(rgb)
    luma = ycc[:, :1]
    lowest = spread(-F.max_pool2d(-luma, 3, 1, 1), scale) - SLACK
    highest = spread(F.max_pool2d(luma, 3, 1, 1), scale) + SLACK
    large = bicubic(ycc, scale)
    fine = large[:, :1]
    for _ in range(steps):
        checkpoint()
        along, across, steepness = curvatures(fine)
        edge = steepness / (steepness + FLAT**2)
        shock = torch.tanh(across / FLAT) * steepness.sqrt() * (sharpness * SHOCK)
        fine = fine + edge * (along * SMOOTHING - shock)
        fine = fine + bicubic(luma - shrink(fine, scale), scale)
        fine = torch.minimum(torch.maximum(fine, lowest), highest)
    return ycbcr_to_rgb(torch.cat([fine, large[:, 1:]], 1))


def curvatures(image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Second derivatives along and across the level line of every pixel, and the squared gradient."""
    wide = pad(image, 1)
    left, right = wide[:, :, 1:-1, :-2], wide[:, :, 1:-1, 2:]
    above, below = wide[:, :, :-2, 1:-1], wide[:, :, 2:, 1:-1]
    dx, dy = (right - left) / 2, (below - above) / 2
    dxx, dyy = right - image * 2 + left, below - image * 2 + above
    cross = (wide[:, :, 2:, 2:] - wide[:, :, 2:, :-2] - wide[:, :, :-2, 2:] + wide[:, :, :-2, :-2]) / 2 * dx * dy
    xx, yy = dx * dx, dy * dy
    steepness = xx + yy
    along = (dxx * yy - cross + dyy * xx) / (steepness + 1e-5)
    return along, dxx + dyy - along, steepness


def bicubic(image: Tensor, scale: int) -> Tensor:
    """Interpolation by Keys' kernel (a = -1/2), pixel centres aligned, edges replicated."""
    for axis in (2, 3):
        length = image.shape[axis]
        wide = F.pad(image, (0, 0, 2, 2) if axis == 2 else (2, 2, 0, 0), mode="replicate")
        phases = []
        for taps in _phases(scale):
            first, *others = (wide.narrow(axis, at, length) * weight for at, weight in taps)
            for other in others:
                first += other
            phases.append(first)
        image = torch.stack(phases, axis + 1).flatten(axis, axis + 1)
    return image


def _phases(scale: int) -> Iterator[list[tuple[int, float]]]:
    """For each of the `scale` results per source pixel: where its four taps lie in a line padded by two, and weigh."""
    for phase in range(scale):
        centre = (phase + 0.5) / scale - 0.5
        first = -2 if centre < 0 else -1
        yield [(2 + first + k, _keys(abs(centre - first - k))) for k in range(4)]


def _keys(t: float) -> float:
    return (1.5 * t - 2.5) * t * t + 1 if t < 1 else ((-0.5 * t + 2.5) * t - 4) * t + 2


def shrink(image: Tensor, scale: int) -> Tensor:
    """Means of scale x scale pixels: how a camera of that resolution would have seen it."""
    total = torch.zeros_like(image[:, :, ::scale, ::scale])
    for y in range(scale):
        for x in range(scale):
            total += image[:, :, y::scale, x::scale]
    return total / (scale * scale)


def spread(image: Tensor, scale: int) -> Tensor:
    """Each pixel repeated scale x scale times."""
    return image.repeat_interleave(scale, 2).repeat_interleave(scale, 3)

"""Inpainting without weights: removes what the mask covers and goes on with the texture around it.

Patch-based completion (Wexler et al. 2007, Barnes et al. 2009, Newson et al. 2014), see `patchmatch.py`. Outside the
mask every byte stays; a soft mask blends. Where a picture has no known patch to copy from, the hole is filled smoothly
(pull-push, Gortler et al. 1996).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.base import Adapter, Item, Output
from models.checkpoint import Abandoned, cancelled, checkpoint, in_parts, parts, wanted_for
from models.patchmatch import Level, complete, dilate, mix, pull_push, pyramid
from models.tensors import stack

SMALL = 160 * 128  # pixels of a level that may be the first: it is searched exhaustively
PEELED = 50_000  # targets up to which a level may be the first
THICK = 3
NOISE = 8  # mask values below this count as 0: the ripples that JPEG leaves in a black mask
SEARCHED = 300_000  # hole pixels up to which a level is searched; finer ones copy along the field of a coarser level


class Inpaint(Adapter):
    """Params: `seed`; `patch`, the side of the patches compared (3, 5 or 7); `rounds` 1-5 of search and vote per level;
    `mask_threshold`: above it a mask's value counts as 255, up to it as 0 (0: values between blend)."""

    def warm_up(self) -> None:
        image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
        mask = np.zeros((64, 64), np.uint8)
        mask[24:40, 24:40] = 255
        self.run([Item({"seed": 0, "patch": 5, "rounds": 1}, image, mask)])

    def run(self, items: Sequence[Item]) -> list[Output | Exception]:
        """Outputs of the items' size, `Cancelled` in place of those that nobody wants any more. On a GPU items that
        share patch and rounds are searched together."""
        return in_parts(parts(items, self.device, len(items)), self._run_part)

    def _run_part(self, items: Sequence[Item]) -> list[Output | Exception]:
        images = [item.image for item in items if item.image is not None]
        blank = np.zeros(images[0].shape[:2], np.uint8)
        masks = [blank if item.mask is None else _sharpened(item.mask, item.params) for item in items]
        rgb = stack(images, self.device)
        hole = stack(masks, self.device)[:, 0] >= NOISE
        fillings = self._fill(items, rgb, hole)
        outputs: list[Output | Exception] = []
        for item, image, mask, filling in zip(items, images, masks, fillings, strict=True):
            if item.cancelled():
                outputs.append(cancelled())
            else:
                outputs.append(Output(image.copy() if filling is None else _blend(image, mask, filling)))
        return outputs

    def _fill(self, items: Sequence[Item], rgb: Tensor, hole: Tensor) -> list[np.ndarray | None]:
        """uint8 H x W x 3 per item, None where there is nothing to fill, or nobody who wants it."""
        fillings: list[np.ndarray | None] = [None] * len(items)
        plans: dict[tuple[int, ...], list[int]] = defaultdict(list)
        sizes = hole.flatten(1).sum(1).tolist()
        for number, size in enumerate(sizes):
            if size:
                patch = min(int(items[number].params["patch"]), (min(hole.shape[1:]) - 1) // 2 * 2 + 1)
                plans[patch, int(items[number].params["rounds"])].append(number)
        for (patch, rounds), numbers in plans.items():
            levels = pyramid(rgb[numbers], hole[numbers], 4 * patch)
            starts = _starts(levels, patch)
            groups: dict[tuple[int, int], list[int]] = defaultdict(list)
            for row, number in enumerate(numbers):
                stop, size = 0, sizes[number]
                while size > SEARCHED and stop < starts[row]:
                    stop, size = stop + 1, size // 4
                groups[starts[row], stop].append(row)
            for (start, stop), rows in groups.items():
                some = [items[numbers[row]] for row in rows]
                part = [Level(level.planes[rows], level.hole[rows]) for level in levels]
                try:
                    with wanted_for(some):
                        checkpoint()
                        filled = self._run_group(some, part, patch, rounds, start, stop)
                except Abandoned:
                    continue
                pixels = filled.permute(0, 2, 3, 1).contiguous().cpu().numpy()
                for row, filling in zip(rows, pixels, strict=True):
                    fillings[numbers[row]] = filling
        return fillings

    def _run_group(
        self, items: Sequence[Item], levels: list[Level], patch: int, rounds: int, start: int, stop: int
    ) -> Tensor:
        if start < 0:
            known = (~levels[0].hole)[:, None].float()
            planes = levels[0].planes[:, :3].split(1, 1)
            return torch.cat([pull_push(plane.float(), known).to(torch.uint8) for plane in planes], 1)
        seeds = [int(item.params["seed"]) & 0xFFFFFFFFFFFFFFFF for item in items]
        folded = torch.tensor([seed & 0xFFFFFFFF ^ seed >> 32 for seed in seeds], device=self.device)

        def report(fraction: float) -> None:
            for item in items:
                item.report(fraction)

        return complete(levels, patch, mix(folded), rounds, start, stop, report)


def _starts(levels: list[Level], patch: int) -> list[int]:
    """Per item the level to start on: the finest small one on which the hole is at most `THICK` patches thick, else the
    coarsest that has sources enough; -1 where none has. Patches below 3 x 3 compare nothing, so they count as none."""
    r = patch // 2
    starts = torch.full((len(levels[0].hole),), -1)
    thin = starts > 0
    for depth, level in enumerate(levels if patch >= 3 else ()):
        height, width = level.hole.shape[1:]
        touched = dilate(level.hole, r)[:, r : height - r, r : width - r].flatten(1)
        targets, sources = touched.sum(1).cpu(), (~touched).sum(1).cpu()
        enough = (sources >= (1 if depth == 0 else 64)) & (targets <= PEELED)
        starts[enough & ~thin] = depth
        if height * width <= SMALL or depth == len(levels) - 1:
            core = ~dilate(~level.hole, patch * THICK // 2)
            thin |= enough & ~core.flatten(1).any(1).cpu()
    return starts.tolist()


def _sharpened(mask: np.ndarray, params: Mapping[str, Any]) -> np.ndarray:
    threshold = int(params.get("mask_threshold", 0))
    return np.where(mask > threshold, 255, 0).astype(np.uint8) if threshold else mask


def _blend(image: np.ndarray, mask: np.ndarray, filling: np.ndarray) -> np.ndarray:
    """The filling where the mask is 255, the image's own bytes where it is 0, their mix between."""
    share = np.where(mask >= NOISE, mask, 0)[..., None].astype(np.int32)
    mixed = (filling * share + image * (255 - share) + 127) // 255
    return np.where(share > 0, mixed, image).astype(np.uint8)

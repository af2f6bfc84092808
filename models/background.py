"""`background_remove`: the subject cut out (RGBA), or its mask. The cut itself is `models.saliency`.

Colours at the soft edge are cleared of the old background by blur-fusion foreground estimation (Forte 2021), so that
the cut-out has no halo before a new one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from models.base import Adapter, Item, Output
from models.checkpoint import in_parts
from models.filters import reduced, wide_blur
from models.saliency import foreground
from models.tensors import to_float, to_uint8


class BackgroundRemove(Adapter):
    """`output` rgba: H x W x 4, alpha 255 = subject; mask: H x W, 255 = subject. The image's own alpha bounds both.
    `threshold` 0-1: how much a thing must stand out; `softness` 0-1: from a hard edge to a wide, feathered one.
    `facts["subject"]` is the share of the picture that was kept."""

    def warm_up(self) -> None:
        image = np.zeros((48, 48, 3), np.uint8)
        image[16:32, 16:32] = 255
        self.run([Item({}, image)])

    @torch.inference_mode()
    def run(self, items: Sequence[Item]) -> list[Output | Exception]:
        """The cut is a global problem per picture (regions, colour models), so items are solved one after another."""
        return in_parts(([item] for item in items), lambda part: [self._cut(item) for item in part])

    def _cut(self, item: Item) -> Output:
        image = to_float([item], self.device)
        alpha = foreground(image, float(item.params.get("threshold", 0.5)))
        item.report(0.8)
        alpha = _edge(alpha, float(item.params.get("softness", 0.3)))
        if item.alpha is not None:
            own = torch.tensor(item.alpha, device=self.device).float().div_(255)[None, None]
            alpha = torch.minimum(alpha, own)
        facts = {"subject": round(float(alpha.mean()), 4)}
        if item.params.get("output", "rgba") == "mask":
            return Output(to_uint8(alpha)[0], facts=facts)
        return Output(to_uint8(torch.cat([_cleared(image, alpha), alpha], 1))[0], facts=facts)


def _edge(alpha: Tensor, softness: float) -> Tensor:
    """The edge steepened around one half (softness 0: almost a step) or feathered (1)."""
    if softness > 0.5:
        alpha = wide_blur(alpha, (softness - 0.5) * 0.02 * max(alpha.shape[2:]))
    width = 0.04 + 1.2 * min(softness, 0.5)
    return ((alpha - 0.5) / width + 0.5).clamp(0, 1)


def _cleared(image: Tensor, alpha: Tensor) -> Tensor:
    """Foreground colour F of I = alpha F + (1 - alpha) B, where alpha is neither 0 nor 1; the picture elsewhere."""

    def estimate(both: Tensor) -> Tensor:
        colour, share = both[:, :3], both[:, 3:]
        sigma = max(both.shape[2:]) / 90
        front = wide_blur(colour * share, sigma) / wide_blur(share, sigma).clamp_min(1e-3)
        back = wide_blur(colour * (1 - share), sigma) / wide_blur(1 - share, sigma).clamp_min(1e-3)
        return (front + share * (colour - share * front - (1 - share) * back)).clamp(0, 1)

    clean = reduced(torch.cat([image, alpha], 1), estimate)
    mixed = ((alpha > 0.02) & (alpha < 0.98)).float()
    return image + (clean - image) * mixed

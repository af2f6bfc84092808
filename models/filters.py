"""The painterly filters that styles and edits are built from: Kuwahara, edge flow, lines along it, soft quantisation.

All take float32 N x C x H x W in 0..1 and treat each item alone. Costly ones work on a reduced copy of large pictures
(`reduced`), so that time and memory stay bounded up to 25 megapixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from models.checkpoint import checkpoint
from models.scene import strips
from models.tensors import blur, box, luminance, pad

WORKING_PIXELS = 2_500_000


def resize(batch: Tensor, height: int, width: int) -> Tensor:
    """Bilinear enlarging, or the mean over each new pixel's area when both sides shrink."""
    h, w = batch.shape[2:]
    if (h, w) == (height, width):
        return batch
    if height <= h and width <= w:
        return F.adaptive_avg_pool2d(batch, (height, width))
    rows, row, fy = _taps(h, height, batch)
    columns, column, fx = _taps(w, width, batch)
    out = batch.new_empty((*batch.shape[:2], height, width))
    for top, bottom in strips(height, width, len(batch)):
        low, high, share = rows[top:bottom], row[top:bottom], fy[top:bottom].view(-1, 1)
        part = batch[:, :, low] * (1 - share) + batch[:, :, high] * share
        out[:, :, top:bottom] = part[..., columns] * (1 - fx) + part[..., column] * fx
    return out


def _taps(old: int, new: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    at = ((torch.arange(new, device=like.device, dtype=torch.float32) + 0.5) * (old / new) - 0.5).clamp(0, old - 1)
    low = at.floor().long()
    return low, (low + 1).clamp_max(old - 1), at - low


def reduced(batch: Tensor, work: Callable[[Tensor], Tensor], pixels: int = WORKING_PIXELS) -> Tensor:
    """`work` done on a copy of at most about `pixels` pixels, the result brought back to full size."""
    h, w = batch.shape[2:]
    factor = max(1.0, (h * w / pixels) ** 0.5)
    small = resize(batch, max(1, round(h / factor)), max(1, round(w / factor)))
    return resize(work(small), h, w)


def wide_blur(batch: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of any width: beyond 3 pixels it works on a copy made smaller, where no finer detail is left."""
    h, w = batch.shape[2:]
    factor = max(1, int(sigma / 2))
    if factor == 1:
        return blur(batch, sigma)
    small = resize(batch, max(1, h // factor), max(1, w // factor))
    return resize(blur(small, sigma / factor), h, w)


def repeat(batch: Tensor, times: Sequence[int], work: Callable[[Tensor], Tensor]) -> Tensor:
    """`work` applied to each item as often as `times` says for it."""
    for step in range(max(times)):
        active = [i for i, count in enumerate(times) if count > step]
        if len(active) == len(times):
            batch = work(batch)
        else:
            batch = batch.clone()
            batch[active] = work(batch[active])
    return batch


def kuwahara(batch: Tensor, radius: int) -> Tensor:
    """Generalised Kuwahara filter (Papari, Petkov, Campisi 2007): eight windows around each pixel, weighted by how
    even they are, so that edges stay and texture turns into strokes."""
    if radius < 1:
        return batch
    mean = box(batch, radius)
    spread = (box(batch * batch, radius) - mean * mean).clamp_min_(0).sum(1, keepdim=True)
    diagonal = max(1, round(radius * 0.7))
    offsets = [(dy * radius, dx * radius) for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0))]
    offsets += [(dy * diagonal, dx * diagonal) for dy, dx in ((1, 1), (1, -1), (-1, 1), (-1, -1))]
    h, w = batch.shape[2:]
    weight = (1 / (spread * 400 + 0.02)).square_().square_()
    mean, weight = pad(mean, radius), pad(weight, radius)
    total = torch.zeros_like(batch)
    share = torch.zeros_like(spread)
    for dy, dx in offsets:
        checkpoint()
        y, x = radius + dy, radius + dx
        part = weight[:, :, y : y + h, x : x + w]
        total += mean[:, :, y : y + h, x : x + w] * part
        share += part
    return total / share


def gradient(grey: Tensor) -> tuple[Tensor, Tensor]:
    """Scharr derivatives (down, across) of N x 1 x H x W, per pixel."""
    p = pad(grey, 1)
    rows = p[:, :, :, :-2] * 3 + p[:, :, :, 1:-1] * 10 + p[:, :, :, 2:] * 3
    columns = p[:, :, :-2] * 3 + p[:, :, 1:-1] * 10 + p[:, :, 2:] * 3
    return (rows[:, :, 2:] - rows[:, :, :-2]) / 32, (columns[..., 2:] - columns[..., :-2]) / 32


def edge_flow(grey: Tensor, sigma: float) -> Tensor:
    """Unit vectors (across, down) along the edges, N x 2 x H x W: the minor eigenvector of the smoothed structure
    tensor (Brox et al. 2006; the smooth cousin of the edge tangent flow of Kang et al. 2007)."""
    gy, gx = gradient(grey)
    tensor = blur(torch.cat([gx * gx, gx * gy, gy * gy], 1), sigma)
    e, f, g = tensor[:, 0:1], tensor[:, 1:2], tensor[:, 2:3]
    minor = (e + g - ((e - g) * (e - g) + f * f * 4).sqrt()) / 2
    steep = e >= g
    flow = torch.cat([torch.where(steep, f, minor - g), torch.where(steep, minor - e, f)], 1)
    flow = torch.where(flow.abs().sum(1, keepdim=True) < 1e-12, torch.ones_like(flow), flow)
    return flow / (flow * flow).sum(1, keepdim=True).sqrt()


def along(batch: Tensor, flow: Tensor, reach: int, step: float = 1.0) -> Tensor:
    """Line integral convolution (Cabral and Leedom 1993): the mean of `batch` along the flow, `reach` steps of `step`
    pixels both ways, weights falling to the ends."""
    h, w = batch.shape[2:]
    y = torch.arange(h, device=batch.device, dtype=torch.float32).view(1, 1, h, 1)
    x = torch.arange(w, device=batch.device, dtype=torch.float32).view(1, 1, 1, w)
    start = torch.cat([(x + 0 * y).expand(len(batch), 1, h, w), (y + 0 * x).expand(len(batch), 1, h, w)], 1)
    size = torch.tensor([w, h], device=batch.device, dtype=torch.float32).view(1, 2, 1, 1)
    both = torch.cat([batch, flow], 1)
    total, share = batch.clone(), 1.0
    for way in (step, -step):
        at, heading = start, flow * way
        for number in range(1, reach + 1):
            checkpoint()
            at = at + heading
            grid = ((at * 2 + 1) / size - 1).permute(0, 2, 3, 1)
            seen = F.grid_sample(both, grid, mode="bilinear", padding_mode="border", align_corners=False)
            onward = seen[:, -2:]
            same = (onward * heading).sum(1, keepdim=True) >= 0
            heading = torch.where(same, onward, -onward) * abs(step)
            weight = 1 - number / (reach + 1)
            total += seen[:, :-2] * weight
            share += weight
    return total / share


def dog_response(grey: Tensor, flow: Tensor, sigma: float) -> Tensor:
    """Difference of Gaussians smoothed along the edges (flow-based DoG, Kang et al. 2007): negative on the dark side
    of an edge; about -0.1..0.1."""
    return along(blur(grey, sigma) - blur(grey, sigma * 1.6), flow, 4)


def lines(response: Tensor, gain: Tensor | float, threshold: float = 0.012, sharpness: float = 60.0) -> Tensor:
    """XDoG's soft threshold (Winnemoeller, Kyprianidis, Olsen 2012): 1 on paper, to 0 where a dark line runs. `gain`
    weighs the response: more gain, more and blacker lines."""
    return 1 + torch.tanh((response * gain + threshold).clamp_max(0) * sharpness)


def quantise(values: Tensor, levels: int, sharpness: float) -> Tensor:
    """Soft quantisation (Winnemoeller, Olsen, Gooch 2006): `levels` steps whose borders are `sharpness` steep."""
    scaled = values * levels
    nearest = scaled.floor() + 0.5
    return (nearest + torch.tanh((scaled - nearest) * sharpness) * 0.5) / levels


def saturate(rgb: Tensor, factor: Tensor | float) -> Tensor:
    """Colours moved away from (factor > 1) or towards (< 1) their grey; not clipped."""
    grey = luminance(rgb)
    return grey + (rgb - grey) * factor

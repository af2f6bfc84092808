"""The few tensor helpers that the models share: pixels in and out, luminance, colour spaces, blurs, guided filter.

Everything works on float32 N x C x H x W in 0..1 and treats each item and each plane alone. Blurs are sums of shifted
planes in a fixed order, never convolutions or running sums: a pixel's bits then depend neither on its batch companions
nor on the distance from the image's corner, and CPU and CUDA take the same road. Beware of `pow`, `sigmoid` and `atan2`
on the CPU: their vector and scalar forms differ in the last bit, and which one a pixel gets depends on its place in the
batch. Use `power` here, `exp` and `tanh`, which do not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.base import Item
from models.checkpoint import checkpoint

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as JPEG uses it


def stack(arrays: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """uint8 arrays of one shape, H x W x C or H x W, as one uint8 tensor N x C x H x W on the device."""
    batch = torch.from_numpy(np.stack(arrays))
    if device.type == "cuda":
        batch = batch.pin_memory().to(device, non_blocking=True)
    return batch[:, None] if batch.ndim == 3 else batch.permute(0, 3, 1, 2)


def to_float(items: Sequence[Item], device: torch.device) -> Tensor:
    """The items' images as float32 N x 3 x H x W in 0..1 on the device."""
    images = [item.image for item in items if item.image is not None]
    return stack(images, device).contiguous().float().div_(255)


def to_uint8(batch: Tensor) -> list[np.ndarray]:
    """N x C x H x W in 0..1 as uint8 arrays H x W x C (H x W where C is 1), rounded to nearest, clipped."""
    pixels = (batch * 255).round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return list(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def per_item(values: Iterable[float], like: Tensor) -> Tensor:
    """One number per item as N x 1 x 1 x 1, to be multiplied with a batch."""
    return torch.tensor(list(values), dtype=like.dtype, device=like.device).view(-1, 1, 1, 1)


def luminance(rgb: Tensor) -> Tensor:
    """N x 3 x H x W -> N x 1 x H x W."""
    return rgb[:, 0:1] * LUMA[0] + rgb[:, 1:2] * LUMA[1] + rgb[:, 2:3] * LUMA[2]


def rgb_to_ycbcr(rgb: Tensor) -> Tensor:
    """BT.601, full range; Y in 0..1, Cb and Cr in -0.5..0.5."""
    y = luminance(rgb)
    return torch.cat([y, (rgb[:, 2:3] - y) / 1.772, (rgb[:, 0:1] - y) / 1.402], 1)


def ycbcr_to_rgb(ycc: Tensor) -> Tensor:
    """The inverse of `rgb_to_ycbcr`; colours outside the cube come out below 0 or above 1."""
    y, cb, cr = ycc[:, 0:1], ycc[:, 1:2], ycc[:, 2:3]
    green = y - cb * (0.114 * 1.772 / 0.587) - cr * (0.299 * 1.402 / 0.587)
    return torch.cat([y + cr * 1.402, green, y + cb * 1.772], 1)


def power(batch: Tensor, exponent: float) -> Tensor:
    """`batch ** exponent`, each item alone, so that its bits are the same in every batch."""
    return torch.cat([item**exponent for item in batch.split(1)])


def rgb_to_lab(rgb: Tensor) -> Tensor:
    """sRGB in 0..1 to CIE L*a*b* (D65): L in 0..100, a and b about -110..110."""
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, power((rgb.clamp_min(0) + 0.055) / 1.055, 2.4))
    r, g, b = linear[:, 0:1], linear[:, 1:2], linear[:, 2:3]
    x = (r * 0.4124564 + g * 0.3575761 + b * 0.1804375) / 0.95047
    y = r * 0.2126729 + g * 0.7151522 + b * 0.0721750
    z = (r * 0.0193339 + g * 0.1191920 + b * 0.9503041) / 1.08883
    cube = [power(t.clamp_min(1e-8), 1 / 3) for t in (x, y, z)]
    fx, fy, fz = (torch.where(c > 6 / 29, c, t * (841 / 108) + 4 / 29) for t, c in zip((x, y, z), cube, strict=True))
    return torch.cat([fy * 116 - 16, (fx - fy) * 500, (fy - fz) * 200], 1)


def lab_to_rgb(lab: Tensor) -> Tensor:
    """The inverse of `rgb_to_lab`; colours outside sRGB come out below 0 or above 1."""
    fy = (lab[:, 0:1] + 16) / 116
    fx, fz = fy + lab[:, 1:2] / 500, fy - lab[:, 2:3] / 200
    x, y, z = (torch.where(t > 6 / 29, t * t * t, (t - 4 / 29) * (108 / 841)) for t in (fx, fy, fz))
    x, z = x * 0.95047, z * 1.08883
    linear = torch.cat(
        [
            x * 3.2404542 - y * 1.5371385 - z * 0.4985314,
            y * 1.8760108 - x * 0.9692660 + z * 0.0415560,
            x * 0.0556434 - y * 0.2040259 + z * 1.0572252,
        ],
        1,
    )
    return torch.where(linear <= 0.0031308, linear * 12.92, power(linear.clamp_min(0.0031308), 1 / 2.4) * 1.055 - 0.055)


def pad(batch: Tensor, r: int) -> Tensor:
    """`r` more pixels on every side, each the nearest edge pixel's copy; any size, even 1 x 1."""
    return F.pad(batch, (r, r, r, r), mode="replicate")


def blur(batch: Tensor, sigma: float) -> Tensor:
    """Gaussian blur, separable, cut off at 3 sigma; edges replicate. `sigma` in pixels; 0 gives the batch back."""
    if sigma <= 0:
        return batch
    r = max(1, math.ceil(3 * sigma))
    taps = [math.exp(-0.5 * (i / sigma) ** 2) for i in range(-r, r + 1)]
    taps = [tap / sum(taps) for tap in taps]
    for axis, length in ((2, batch.shape[2]), (3, batch.shape[3])):
        wide = F.pad(batch, (0, 0, r, r) if axis == 2 else (r, r, 0, 0), mode="replicate")
        batch = wide.narrow(axis, r, length) * taps[r]
        for i in range(r):  # a symmetric kernel: one product for the two taps of equal weight
            checkpoint()
            batch += (wide.narrow(axis, i, length) + wide.narrow(axis, 2 * r - i, length)) * taps[i]
    return batch


def box(batch: Tensor, r: int) -> Tensor:
    """Mean over the (2r+1)² window; edges replicate. Windows grow by doubling: 2·log2(r) additions, whatever r is."""
    if r <= 0:
        return batch
    size = 2 * r + 1
    for axis, length in ((2, batch.shape[2]), (3, batch.shape[3])):
        power = F.pad(batch, (0, 0, r, r) if axis == 2 else (r, r, 0, 0), mode="replicate")
        total, at, width = None, 0, 1  # `power` holds sums of `width` neighbours, `total` of the first `at` of a window
        while True:
            checkpoint()
            if size & width:
                part = power.narrow(axis, at, length)
                total, at = part if total is None else total + part, at + width
            if (width := width * 2) > size:
                break
            power = power.narrow(axis, 0, power.shape[axis] - width // 2) + power.narrow(
                axis, width // 2, power.shape[axis] - width // 2
            )
        batch = total / size
    return batch


def guided_filter(guide: Tensor, batch: Tensor, r: int, eps: float | Tensor) -> Tensor:
    """Edge-preserving smoothing of `batch` (N x C) along the edges of `guide` (N x 1 or N x C), He et al. 2010.

    `eps` is the variance below which the guide counts as flat (guide in 0..1; 0.01² is fine noise, 0.1² strong
    smoothing); a tensor N x 1 x 1 x 1 gives each item its own."""
    mean_guide, mean = box(guide, r), box(batch, r)
    variance = (box(guide * guide, r) - mean_guide * mean_guide).clamp_min(0)
    covariance = box(guide * batch, r) - mean_guide * mean
    slope = covariance / (variance + eps)
    return box(slope, r) * guide + box(mean - slope * mean_guide, r)

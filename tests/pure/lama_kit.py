"""A tiny network with LaMa's signature, and IOPaint's way to its pixels, written down a second time.

`IOPaint` takes one image at a time, in numpy and OpenCV, as IOPaint 1.6.0 does; it shares no line with the models that
it is compared with. Where IOPaint's bytes wrap round (cubic overshoot), it clips, as ours do.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.model import ModelSpec, read_spec
from models.base import Item

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[2]
WIDTH = 8


class Net(nn.Module):
    """Convolutions, one step down and up three times, and a Fourier unit, so that every pixel sees every other."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(4, WIDTH, 3, padding=1, padding_mode="reflect")
        self.down = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 3, 2, 1) for _ in range(3))
        self.spectral = nn.Conv2d(2 * WIDTH, 2 * WIDTH, 1)
        self.up = nn.ModuleList(nn.ConvTranspose2d(WIDTH, WIDTH, 3, 2, 1, output_padding=1) for _ in range(3))
        self.tail = nn.Conv2d(WIDTH, 3, 3, padding=1)

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        x = F.relu(self.head(torch.cat([image * (1 - mask), mask], 1)))
        for down in self.down:
            x = F.relu(down(x))
        waves = torch.fft.rfftn(x, dim=(-2, -1), norm="ortho")
        waves = F.relu(self.spectral(torch.cat([waves.real, waves.imag], 1)))
        waves = torch.complex(waves[:, :WIDTH], waves[:, WIDTH:])
        x = x + torch.fft.irfftn(waves, s=x.shape[-2:], dim=(-2, -1), norm="ortho")
        for up in self.up:
            x = F.relu(up(x))
        return mask * torch.sigmoid(self.tail(x) * 4) + (1 - mask) * image * 0.97  # outside, bytes change too


def save_network(file: Path) -> Path:
    """The network as TorchScript, traced like the published one; the same weights every time."""
    torch.manual_seed(4)
    net = Net().eval()
    with torch.no_grad():
        for weights in net.parameters():
            if weights.dim() > 1:
                nn.init.kaiming_normal_(weights, nonlinearity="relu")
        example = torch.rand(1, 3, 120, 120), (torch.rand(1, 1, 120, 120) > 0.5).float()
        torch.jit.trace(net, example, check_trace=False).save(str(file))
    return file


@cache
def spec(name: str) -> ModelSpec:
    return read_spec((ROOT / "models" / "repository" / f"{name}.toml").read_text(encoding="utf-8"), name)


def item(name: str, image: np.ndarray, mask: np.ndarray, **params: Any) -> Item:
    return Item(spec(name).check_params(params), image, mask)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Waves, edges and noise, uint8 H x W x 3; contrasts that make cubic filters overshoot."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = np.stack([128 + 120 * np.sin(x / (9 + c) + seed) * np.cos(y / (13 - c)) for c in range(3)], 2)
    waves[(x // 24 + y // 32) % 4 == 0] = (255, 0, 128)
    return np.clip(waves + rng.normal(0, 10, waves.shape), 0, 255).astype(np.uint8)


def mask_of(height: int, width: int, *boxes: tuple[int, int, int, int]) -> np.ndarray:
    """White rectangles (top, left, bottom, right) on black."""
    mask = np.zeros((height, width), np.uint8)
    for top, left, bottom, right in boxes:
        mask[top:bottom, left:right] = 255
    return mask


class IOPaint:
    """`forward(image, mask)`: RGB and mask, padded, H x W x 3 and H x W x 1, to RGB uint8."""

    def __init__(self, forward: Any, modulus: int) -> None:
        self.forward, self.modulus = forward, modulus
        self.overshot = 0  # samples beyond a byte, which IOPaint lets wrap round

    def __call__(
        self, image: np.ndarray, mask: np.ndarray, strategy: str = "Crop", trigger: int = 800, margin: int = 128,
        limit: int = 1280, keep: bool = True,
    ) -> np.ndarray:
        mask = cv2.threshold(mask, 127, 255, cv2.THRESH_BINARY)[1]
        height, width = mask.shape
        if strategy == "Crop" and max(image.shape) > trigger:
            crops = []
            contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
            for x, y, w, h in map(cv2.boundingRect, contours):
                left, right = self.span(x, x + w, margin, width)
                top, bottom = self.span(y, y + h, margin, height)
                part = self.padded(image[top:bottom, left:right], mask[top:bottom, left:right], keep)
                crops.append((top, bottom, left, right, part))
            result = image.copy()
            for top, bottom, left, right, part in crops:
                result[top:bottom, left:right] = part.astype(np.uint8)
            return result
        if strategy == "Resize" and max(image.shape) > limit:
            ratio = limit / max(height, width)
            size = int(width * ratio + 0.5), int(height * ratio + 0.5)
            small = cv2.resize(image, size, interpolation=cv2.INTER_CUBIC)
            small_mask = cv2.resize(mask, size, interpolation=cv2.INTER_CUBIC)
            large = cv2.resize(self.padded(small, small_mask, keep), (width, height), interpolation=cv2.INTER_CUBIC)
            large[mask < 127] = image[mask < 127]
            self.overshot += np.count_nonzero((large < 0) | (large >= 256))
            return np.clip(large, 0, 255).astype(np.uint8)
        return self.padded(image, mask, keep).astype(np.uint8)

    @staticmethod
    def span(start: int, end: int, margin: int, length: int) -> tuple[int, int]:
        centre, size = (start + end) // 2, end - start + margin * 2
        low, high = centre - size // 2, centre + size // 2
        first, last = max(low, 0), min(high, length)
        if low < 0:
            last += abs(low)
        if high > length:
            first -= high - length
        return max(first, 0), min(last, length)

    def padded(self, image: np.ndarray, mask: np.ndarray, keep: bool) -> np.ndarray:
        height, width = mask.shape
        least = 16 if self.modulus > 1 else 1  # IOPaint's LaMa raises for less
        more = *((0, max(least - side, -side % self.modulus)) for side in (height, width)), (0, 0)
        wide = np.pad(image, more, mode="symmetric")
        result = self.forward(wide, np.pad(mask[:, :, None], more, mode="symmetric"))[:height, :width]
        if keep:
            share = mask[:, :, None] / 255
            return result * share + image * (1 - share)
        return result


def lama_forward(file: Path) -> Any:
    """How IOPaint calls the TorchScript network."""
    network = torch.jit.load(str(file), map_location="cpu").eval()

    def norm(plane: np.ndarray) -> np.ndarray:
        return np.transpose(plane, (2, 0, 1)).astype("float32") / 255

    @torch.inference_mode()
    def forward(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
        hole = (norm(mask) > 0) * 1
        result = network(torch.from_numpy(norm(image)).unsqueeze(0), torch.from_numpy(hole).unsqueeze(0))
        return np.clip(result[0].permute(1, 2, 0).numpy() * 255, 0, 255).astype("uint8")

    return forward


def cv2_forward(flag: int, radius: int) -> Any:
    """How IOPaint calls OpenCV, in its order of channels."""
    return lambda image, mask: cv2.inpaint(image[:, :, ::-1], mask, radius, flag)[:, :, ::-1]

"""A small convolutional network with fixed weights, for W2: the same one for ours, the peers and the plain loop."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from models.base import Adapter, Item, Output


class Net(nn.Module):
    """A residual of two 3x3 convolutions at a quarter of the resolution. 0.45 G multiplications at 512²."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(48, 32, 3, padding=1), nn.Conv2d(32, 48, 3, padding=1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = torch.relu(self.down(pixel_unshuffle(images, 4)))
        return (images + 0.1 * pixel_shuffle(self.up(features), 4)).clamp(0, 1)


def build() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@torch.inference_mode()
def forward(net: Net, images: np.ndarray) -> np.ndarray:
    """uint8 N x H x W x 3 to the same; H and W are multiples of 4."""
    batch = torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(255)
    result: np.ndarray = net(batch).mul_(255).round_().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    return result


class ConvNet(Adapter):
    """The network as a model of ours (bench/models/convnet.toml)."""

    def load(self) -> None:
        self.net = build()

    def warm_up(self) -> None:
        forward(self.net, np.zeros((1, 512, 512, 3), np.uint8))

    def run(self, items: Sequence[Item]) -> list[Output]:
        images = np.stack([item.image for item in items if item.image is not None])
        return [Output(image) for image in forward(self.net, images)]

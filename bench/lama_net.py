"""A network with LaMa's signature and random weights, as TorchScript, and what one forward of it costs.

    python -m bench.lama_net FILE HEIGHT WIDTH SECONDS

prints the wall and CPU seconds per forward of FILE at that size, on one thread. Image float32 N x 3 x H x W in
0..1 and mask N x 1 x H x W of 0 and 1, sides multiples of 8, to the image with the hole filled: convolutions, three
halvings, residual blocks with a Fourier unit each (Suvorov et al. 2022), and back. A small one lets the server around
it be seen.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from models.lama import JIT_FLAGS

EXAMPLE = 120  # pixels, as the published network was traced


class Fourier(nn.Module):
    """A convolution of the picture's waves: every pixel sees every other."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolve = nn.Conv2d(2 * channels, 2 * channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        waves = torch.fft.rfftn(x, dim=(-2, -1), norm="ortho")
        real, imaginary = relu(self.convolve(torch.cat([waves.real, waves.imag], 1))).chunk(2, 1)
        return torch.fft.irfftn(torch.complex(real, imaginary), s=x.shape[-2:], dim=(-2, -1), norm="ortho")


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, padding_mode="reflect")
        self.second = nn.Conv2d(channels, channels, 3, padding=1, padding_mode="reflect")
        self.fourier = Fourier(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(relu(self.first(x) + self.fourier(x)))


class Generator(nn.Module):
    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.head = nn.Conv2d(4, width, 3, padding=1, padding_mode="reflect")
        self.down = nn.Sequential(*(
            layer for step in range(3) for layer in (nn.Conv2d(width << step, width << step + 1, 3, 2, 1), nn.ReLU())
        ))  # fmt: skip
        self.body = nn.Sequential(*(Block(width << 3) for _ in range(blocks)))
        self.up = nn.Sequential(*(
            layer for step in (2, 1, 0)
            for layer in (nn.ConvTranspose2d(width << step + 1, width << step, 3, 2, 1, output_padding=1), nn.ReLU())
        ))  # fmt: skip
        self.tail = nn.Conv2d(width, 3, 3, padding=1, padding_mode="reflect")

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        features = relu(self.head(torch.cat([image * (1 - mask), mask], 1)))
        painted = torch.sigmoid(self.tail(self.up(self.body(self.down(features)))) * 6)
        return mask * painted + (1 - mask) * image


def save(file: Path, width: int, blocks: int) -> int:
    """Write the network, traced like the published one, the same weights every time; how many those are."""
    torch.manual_seed(1234)
    network = Generator(width, blocks).eval()
    with torch.no_grad():
        for weights in network.parameters():
            if weights.dim() > 1:
                nn.init.kaiming_normal_(weights, nonlinearity="relu")
        example = torch.rand(1, 3, EXAMPLE, EXAMPLE), (torch.rand(1, 1, EXAMPLE, EXAMPLE) > 0.5).float()
        torch.jit.trace(network, example, check_trace=False).save(str(file))
    return sum(weights.numel() for weights in network.parameters())


@torch.inference_mode()
def cost(file: Path, height: int, width: int, seconds: float) -> tuple[float, float]:
    """Wall and CPU seconds per forward, measured for so long after as long a warm-up of a third."""
    for flag in JIT_FLAGS:
        getattr(torch._C, flag, bool)(False)
    network = torch.jit.load(str(file)).eval()
    image, mask = torch.rand(1, 3, height, width), torch.zeros(1, 1, height, width).long()
    mask[..., height // 4 : height // 2, width // 4 : width // 2] = 1
    _repeat(network, image, mask, seconds / 3)
    used, began = time.process_time(), time.perf_counter()
    count = _repeat(network, image, mask, seconds)
    return (time.perf_counter() - began) / count, (time.process_time() - used) / count


def _repeat(network: torch.jit.ScriptModule, image: Tensor, mask: Tensor, seconds: float) -> int:
    count, end = 0, time.perf_counter() + seconds
    while count < 3 or time.perf_counter() < end:
        network(image, mask)
        count += 1
    return count


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(*cost(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])))

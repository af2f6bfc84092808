"""Upscaling by a trained network (ESRGAN, Compact, SPAN, SwinIR, HAT, ...) from a file that spandrel reads.

Large pictures are enlarged in tiles, each with a margin of its neighbours around it that is cut off again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from core.errors import BadOutput
from models import spandrel_file
from models.base import Item, Output
from models.calls import Call, CallAdapter, Run

NETWORK = "enlarge"


class Tile(NamedTuple):
    """Of a picture's rows or columns those from `start` to `end` are made out of `length` ones from `first` on."""

    start: int
    end: int
    first: int
    length: int

    @property
    def seen(self) -> slice:
        """What the network sees."""
        return slice(self.first, self.first + self.length)

    def place(self, scale: int) -> slice:
        """Where it belongs in the large picture."""
        return slice(self.start * scale, self.end * scale)

    def part(self, scale: int) -> slice:
        """Which part of what the network gave belongs there."""
        return slice((self.start - self.first) * scale, (self.end - self.first) * scale)


class Enlarge(CallAdapter):
    """Options: `weights`, the file; `tile`, the side of a tile in source pixels (0: never in tiles), and `margin`;
    `max_rows`, see `CallAdapter`. Params: `scale`, which must be the network's own."""

    def __init__(self, options: Mapping[str, Any], device: torch.device) -> None:
        super().__init__(options, device)
        self._tile, self._margin = int(options.get("tile", 512)), int(options.get("margin", 32))

    def usual_rows(self) -> int:
        """On a CPU a row costs the more, the more rows run with it."""
        return 4 if self.device.type == "cuda" else 1

    def load(self) -> None:
        """Raises FileNotFoundError or ValueError with a sentence that names the file but not its folder."""
        file = Path(str(self.options.get("weights", "")))
        if not file.is_file():
            raise FileNotFoundError(f"the weights {file.name} are not there; bring the file and restart the server")
        self._network = spandrel_file.read(file)
        if self._network.purpose == "Inpainting" or self._network.input_channels != 3:
            raise ValueError(f"{file.name} is no network that takes a colour picture and gives one")
        self._network.to(self.device)

    def warm_up(self) -> None:
        self.forward(NETWORK, torch.zeros((1, 64, 64, 3), dtype=torch.uint8))

    def start(self, item: Item) -> Run:
        """One call for every tile, all at the same time."""
        assert item.image is not None
        scale = self._network.scale
        if item.params.get("scale", scale) != scale:
            raise BadOutput(f"these weights enlarge {scale} times; the model's file must offer that scale and no other")
        height, width = item.image.shape[:2]
        result = np.empty((height * scale, width * scale, 3), np.uint8)
        tiles = [(y, x) for y in self._tiles(height) for x in self._tiles(width)]
        pieces = [np.ascontiguousarray(item.image[y.seen, x.seen]) for y, x in tiles]
        answers: Any = yield [Call(NETWORK, (torch.from_numpy(piece)[None],)) for piece in pieces]
        for (y, x), (pixels, finite) in zip(tiles, answers, strict=True):
            if not finite:
                raise BadOutput("the network answered NaN instead of an image; its weights may be damaged")
            result[y.place(scale), x.place(scale)] = pixels[0, y.part(scale), x.part(scale)].numpy()
        return Output(result)

    def _tiles(self, length: int) -> Iterator[Tile]:
        """Of a side. All are seen with the same length, so that they can share forwards."""
        tile = self._tile or length
        seen = min(length, tile + 2 * self._margin)
        if seen == length:
            tile = length
        for start in range(0, length, tile):
            first = min(max(0, start - self._margin), length - seen)
            yield Tile(start, min(start + tile, length), first, seen)

    def forward(self, network: str, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Images uint8 N x H x W x 3 to uint8 N x scale·H x scale·W x 3, rounded, and whether each of them was made of
        numbers only, bool N; both on the host, where a GPU's come a little later."""
        (pixels,) = (tensor.to(self.device, non_blocking=True) for tensor in inputs)
        large = self._network(pixels.permute(0, 3, 1, 2).float() / 255)
        finite = large.isfinite().flatten(1).all(1)
        result = (large * 255).round_().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
        return result.to("cpu", non_blocking=True), finite.to("cpu", non_blocking=True)

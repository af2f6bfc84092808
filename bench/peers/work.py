"""What a worker does in the benchmarks, the same for every peer: bytes in, bytes out, batch by batch."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Sequence

BATCH = 8
WORKERS = 2
Batch = Sequence[bytes]


def echo() -> Callable[[Batch], list[bytes]]:
    """W1: the bytes unchanged, after 5 ms + 0.5 ms for each."""

    def run(batch: Batch) -> list[bytes]:
        time.sleep(0.005 + 0.0005 * len(batch))
        return list(batch)

    return run


def image() -> Callable[[Batch], list[bytes]]:
    """W2: decode with Pillow, a small network, encode with Pillow; what most servers' examples do."""
    import numpy as np
    import torch
    from PIL import Image

    from bench.convnet import build, forward

    torch.set_num_threads(1)
    net = build()

    def decode(data: bytes) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

    def encode(pixels: np.ndarray) -> bytes:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        return file.getvalue()

    def run(batch: Batch) -> list[bytes]:
        return [encode(pixels) for pixels in forward(net, np.stack([decode(data) for data in batch]))]

    return run


def work() -> Callable[[Batch], list[bytes]]:
    """The work that the environment asks for (BENCH_WORK)."""
    return {"echo": echo, "image": image}[os.environ["BENCH_WORK"]]()


def port() -> int:
    return int(os.environ["BENCH_PORT"])

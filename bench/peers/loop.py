"""No server at all: one process that decodes, computes and encodes the same image again and again.

    python -m bench.peers.loop SECONDS FILE [--ours]

Prints how many images a second it did. `--ours`: with this server's codecs instead of Pillow's.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch

from bench.peers.work import image


def main(seconds: float, file: Path, ours: bool) -> float:
    data = file.read_bytes()
    run = image()
    if ours:
        from bench.convnet import build, forward
        from core.header import read_header
        from workers.codecs import decode, encode

        torch.set_num_threads(1)
        net, header = build(), read_header(data)

        def run(batch: list[bytes]) -> list[bytes]:
            pixels = np.stack([decode(one, header).image for one in batch])
            return [bytes(encode(one)) for one in forward(net, pixels)]

    run([data])
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        count += len(run([data]))
    return count / (time.perf_counter() - began)


if __name__ == "__main__":
    print(main(float(sys.argv[1]), Path(sys.argv[2]), "--ours" in sys.argv))

"""`python -m models.diffusion.fetch my-models/sdxl.toml`: bring a diffusion model's weights before the server starts.

They go into the cache of the hub that they come from. What would be refused at the start is refused here too.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from core.errors import ModelFailed
from core.model import read_spec
from models.diffusion.memory import readable
from models.diffusion.sources import configuration, find


def main(files: Sequence[str]) -> int:
    """The exit status: 0 when all weights are there, 1 with a sentence on stderr, 2 for a wrong call."""
    if not files:
        print("usage: python -m models.diffusion.fetch MODEL.toml ...", file=sys.stderr)
        return 2
    for file in map(Path, files):
        try:
            options = read_spec(file.read_text("utf-8"), file.stem).options
            source = find(options)
            if not options.get("trust_pickle"):
                source.refuse_pickles()
            if source.single_file:
                configuration(source, options)
            for named in options.get("controlnets", {}).values():
                find({**options, "source": named, "variant": None, "revision": None}, one_network=True)
            parts = ", ".join(f"{part} {readable(size)}" for part, size in source.sizes().items())
            print(f"{file.stem}: {source.path} ({parts})")
        except (ModelFailed, OSError, ValueError) as fault:
            print(f"{file.stem}: {fault}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

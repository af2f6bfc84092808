"""`python -m models.download lama`: fetch a model's weights into torch's cache folder, where the server looks for them.

The file is written beside its place, its md5 compared, and only then renamed: what lies there is always whole.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from core.model import Catalogue
from core.weights import Weights, intact, why_unusable

REPOSITORY = Path(__file__).resolve().parent / "repository"
PIECE = 1 << 20
PATIENCE = 60.0  # seconds without a byte


def main(names: Sequence[str]) -> int:
    """The exit status: 0 when all weights are there, 1 with a sentence on stderr, 2 for a wrong call."""
    known = {spec.name: spec.weights for spec in Catalogue.read([REPOSITORY]) if spec.weights}
    if not names or not set(names) <= known.keys():
        print(f"usage: python -m models.download MODEL ..., where MODEL is one of: {', '.join(known)}", file=sys.stderr)
        return 2
    for name in names:
        weights = known[name]
        assert weights is not None
        file = weights.file()
        try:
            if why_unusable(file) is not None:
                fetch(weights, file)
        except (OSError, ValueError) as fault:
            print(f"{name}: {fault}", file=sys.stderr)
            return 1
        print(f"{name}: {file}")
    return 0


def fetch(weights: Weights, file: Path) -> None:
    """Download to `file`. Raises ValueError when what comes is not what it should be, OSError when nothing comes."""
    source, wanted = weights.source(), weights.checksum()
    if not source.startswith(("https://", "http://")):
        raise ValueError(f"{source} is neither a file nor an address that can be fetched")
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".", suffix=f".{file.name}", dir=file.parent)
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as out:
            found = _receive(source, file.name, out)
            os.fsync(out.fileno())
        if wanted and found != wanted:
            raise ValueError(f"what came for {file.name} has the md5 {found} instead of {wanted}; nothing was kept")
        if not intact(part):
            raise ValueError(f"what came for {file.name} is no TorchScript file, or not all of it; nothing was kept")
        part.chmod(0o644)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def _receive(source: str, name: str, out: BinaryIO) -> str:
    """Write what comes, with a progress bar; its md5."""
    digest = hashlib.md5(usedforsecurity=False)
    columns = TextColumn(name), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with urllib.request.urlopen(source, timeout=PATIENCE) as answer, Progress(*columns) as progress:
        size = int(answer.headers.get("Content-Length") or 0)
        task = progress.add_task(name, total=size or None)
        while piece := answer.read(PIECE):
            digest.update(piece)
            out.write(piece)
            progress.advance(task, len(piece))
        out.flush()
        if size and out.tell() != size:
            raise ValueError(f"only {out.tell()} of {size} bytes of {name} came; try again")
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

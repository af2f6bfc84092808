"""What every benchmark needs: the machine's facts, one way to write a result, and a photograph."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

RESULTS = Path(__file__).parent / "results"
PHOTO = Path(__file__).parent / "photos" / "astronaut.jpg"


def machine_facts(packages: Sequence[str] = ()) -> dict[str, Any]:
    """Date, cores, CPU, GPUs and versions, for the head of a result file. A missing package has version None."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),  # of the last minute: was the machine ours alone?
        "cpu": _cpu(),
        "gpus": _gpus(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {name: _version(name) for name in packages},
    }


def write_result(name: str, facts: Mapping[str, Any], result: Mapping[str, Any]) -> Path:
    """Write `bench/results/NAME.json`; its plot belongs beside it as NAME.png."""
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}.json"
    file.write_text(json.dumps({"machine": facts, **result}, indent=1) + "\n", encoding="utf-8")
    return file


def photograph(side: int) -> np.ndarray:
    """uint8 side x side x 3: the photograph, tiled by mirroring where more than its 512 pixels are asked for."""
    photo = np.array(Image.open(PHOTO))
    beyond = max(0, side - 512)
    return np.ascontiguousarray(np.pad(photo, ((0, beyond), (0, beyond), (0, 0)), mode="symmetric")[:side, :side])


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _gpus() -> list[str]:
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = (pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount()))
        return [str(pynvml.nvmlDeviceGetName(handle)) for handle in handles]
    except Exception:  # no driver, no library: no GPU
        return []


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None

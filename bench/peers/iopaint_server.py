"""IOPaint itself, started as its command line does (`iopaint start --model lama`), from the weights in its usual place.

    python -m bench.peers.iopaint_server

BENCH_PORT is its port; BENCH_WORK=inpaint-no-gc leaves out the full garbage collection that it does after every
request, and nothing else. It imports torchvision for plugins that are not used here; so that none has to be fetched
that fits this torch, empty modules stand in for it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
import types
from collections.abc import Sequence


class Empty(types.ModuleType):
    """Has every name that is asked for: an empty class."""

    __path__: Sequence[str] = ()

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds torchvision and everything in it."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return Empty(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def main() -> None:
    import diffusers
    import transformers  # noqa: F401  (both before the stand-in, whose presence they would take for torchvision's)

    assert diffusers.__version__.startswith("0.27."), "IOPaint must find its own packages"
    sys.meta_path.append(StandIn())
    import iopaint
    import iopaint.api

    if os.environ["BENCH_WORK"] == "inpaint-no-gc":
        iopaint.api.torch_gc = lambda: None
    sys.argv = ["iopaint", "start", "--model", "lama", "--device", "cpu", "--port", os.environ["BENCH_PORT"]]
    iopaint.entry_point()


if __name__ == "__main__":
    main()

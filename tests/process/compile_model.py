"""A model of one small network that is compiled, by torch's own compiler, before its worker is ready."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence

import torch
from torch import nn

from core.model import ModelSpec
from models.base import Adapter, Item, Output
from models.stepping.compiled import Compilers

SPEC = """
adapter = "tests.process.compile_model:Compiled"
task = "stub"
"""


class Compiled(Adapter):
    def load(self) -> None:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")
        self._network = nn.Linear(8, 8).eval()
        self._compilers = Compilers("default")
        self._forward = self._compilers.of("linear", self._network)

    def compile(self, spec: ModelSpec, tell: Callable[[str], None]) -> None:
        assert self._forward is not None
        for rows in (1, 2):
            tell(f"compiling linear for {rows} rows")
            self._forward.prepare({"input": torch.ones(rows, 8)})
        self._compilers.done()

    def run(self, items: Sequence[Item]) -> list[Output]:
        assert self._forward is not None and self._forward.shapes == 2
        return [Output(item.image) for item in items]

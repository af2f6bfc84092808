"""LaMa (Suvorov et al. 2022) from a TorchScript file or a file of weights, with IOPaint's pixels.

The file is the usual `big-lama.pt`, the authors' `best.ckpt` (see `spandrel_file.py`), or any network of its signature:
image float32 N x 3 x H x W in 0..1 and mask N x 1 x H x W of 0 and 1, sides multiples of 8, to N x 3 x H x W in 0..1.
Bytes go to the device as they are and come back as bytes: it is there that they are divided by 255, and multiplied, cut
off (not rounded) and narrowed again.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.errors import BadOutput
from models import spandrel_file
from models.base import Item, Output
from models.calls import Call, CallAdapter, Run
from models.hd_strategy import Strategy, fill

MODULUS = 8  # three halvings on the way down, and back
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
EXACT, REDUCED = "float32", "reduced precision"  # the two ways to run the one network
TRIALS = ((64, 64), (72, 104))  # what some libraries only do for powers of two is found out by the second
JIT_FLAGS = (  # as IOPaint sets them: no fusion, no profiling runs
    "_jit_override_can_fuse_on_cpu", "_jit_override_can_fuse_on_gpu", "_jit_set_texpr_fuser_enabled",
    "_jit_set_profiling_mode",
)  # fmt: skip


class Lama(CallAdapter):
    """Options: `weights`, the file; `bucket` (0: off), pads pieces up to multiples of it, so that more of them share a
    forward; `dtype` float32, float16 or bfloat16: autocast, with Fourier transforms in float32, and all in float32
    where the network does not bear it or a number runs over; `channels_last`; `warm_up`, [height, width] pairs that are
    run at the start; `max_rows`, see `CallAdapter`.

    Params: IOPaint's `hd_strategy...` and `sd_keep_unmasked_area`, see `Strategy`.
    """

    def __init__(self, options: Mapping[str, Any], device: torch.device) -> None:
        super().__init__(options, device)
        self._dtype = DTYPES[str(options.get("dtype", "float32"))]
        self._network = EXACT if self._dtype is torch.float32 else REDUCED
        self._multiple = max(MODULUS, -(-int(options.get("bucket", 0)) // MODULUS) * MODULUS)
        self._layout = torch.channels_last if options.get("channels_last") else torch.contiguous_format

    def usual_rows(self) -> int:
        """On a CPU a row costs the more, the more rows run with it, and alone it has IOPaint's very bits."""
        return 16 if self.device.type == "cuda" else 1

    def load(self) -> None:
        """Raises FileNotFoundError or ValueError with a sentence that names the file but not its folder."""
        file = Path(str(self.options.get("weights", "")))
        if not file.is_file():
            raise FileNotFoundError(f"the weights {file.name} are not there; bring the file and restart the server")
        network = _weights(file) if file.suffix in spandrel_file.SUFFIXES else _torchscript(file)
        self._lama = network.to(self.device).eval().to(memory_format=self._layout)
        self._white = torch.tensor(255.0, device=self.device)  # CUDA divides by a tensor, but multiplies for a number
        if self._network == REDUCED:
            _keep_fourier_exact(self.device.type)
        if self._network == REDUCED and not self._bears(REDUCED):
            print(f"{file.name} does not run in {self._dtype}; it runs in float32", file=sys.stderr)
            self._network = EXACT

    def warm_up(self) -> None:
        """A network's first calls of a shape cost more than the others."""
        for height, width in self.options.get("warm_up", [[512, 512]] if self.device.type == "cuda" else [[64, 64]]):
            self._sample(self._network, height, width)

    def _bears(self, network: str) -> bool:
        try:
            return all(self._sample(network, *size) for size in TRIALS)
        except RuntimeError:
            return False

    @torch.inference_mode()
    def _sample(self, network: str, height: int, width: int) -> bool:
        """Whether the network answers a grey picture with numbers."""
        size = (1, -(-height // self._multiple) * self._multiple, -(-width // self._multiple) * self._multiple)
        grey = torch.full((*size, 3), 128, dtype=torch.uint8)
        return bool(self.forward(network, grey, torch.full(size, 255, dtype=torch.uint8))[1].all())

    def start(self, item: Item) -> Run:
        """One call, or one for every crop, all at the same time."""
        assert item.image is not None and item.mask is not None
        filling = fill(item.image, item.mask, Strategy.of(item.params, self._multiple))
        try:
            pieces = next(filling)
            while True:
                calls = [_call(self._network, piece.image, piece.mask) for piece in pieces]
                answers: Any = yield calls
                for place, (_, finite) in enumerate(answers):
                    if not finite and self._network == REDUCED:  # a half-precision number ran over
                        answers[place] = yield Call(EXACT, calls[place].inputs)
                if not all(finite for _, finite in answers):
                    raise BadOutput("the network answered NaN instead of an image; its weights may be damaged")
                pieces = filling.send([pixels[0].numpy() for pixels, _ in answers])
        except StopIteration as end:
            return Output(end.value)

    def forward(self, network: str, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Images uint8 N x H x W x 3 and masks uint8 N x H x W (not 0 = hole) to uint8 N x H x W x 3, and whether each
        of them was made of numbers only, bool N; both on the host, where a GPU's come a little later."""
        pixels, hole = (tensor.to(self.device, non_blocking=True) for tensor in inputs)
        image = pixels.permute(0, 3, 1, 2).contiguous(memory_format=self._layout).float() / self._white
        with contextlib.nullcontext() if network == EXACT else torch.autocast(self.device.type, self._dtype):
            filled = self._lama(image, (hole > 0).long()[:, None]).float()
        finite = filled.isfinite().flatten(1).all(1)
        result = (filled * 255).clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
        return result.to("cpu", non_blocking=True), finite.to("cpu", non_blocking=True)


def _torchscript(file: Path) -> Any:
    for flag in JIT_FLAGS:
        getattr(torch._C, flag, bool)(False)
    try:
        return torch.jit.load(file, map_location="cpu")
    except RuntimeError:
        raise ValueError(f"{file.name} is no TorchScript file, or a damaged one; fetch it again") from None


def _weights(file: Path) -> torch.nn.Module:
    found = spandrel_file.read(file)
    if found.purpose != "Inpainting":
        raise ValueError(f"{file.name} is no network that inpaints, but one for: {found.purpose}")
    module: torch.nn.Module = found.model  # the descriptor takes one image at a time
    return module


def _call(network: str, image: np.ndarray, mask: np.ndarray) -> Call:
    return Call(network, (torch.from_numpy(image)[None], torch.from_numpy(mask)[None]))


@functools.cache
def _keep_fourier_exact(device: str) -> torch.library.Library:
    """Let autocast compute Fourier transforms in float32: in 16 bits there are none for every size. TorchScript calls
    them by itself, so they are caught in the dispatcher, for as long as the library that is returned lives."""
    library = torch.library.Library("aten", "IMPL")
    for name in ("fft_rfftn", "fft_irfftn", "fft_rfft2", "fft_irfft2", "complex"):
        exact = functools.partial(_in_float32, getattr(torch.ops.aten, name).default, device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch tells what is replaced
            library.impl(name, exact, f"Autocast{device.upper()}", allow_override=True)
    return library


def _in_float32(operation: Any, device: str, *given: Any, **named: Any) -> Any:
    with torch.autocast(device, enabled=False):
        half = (torch.float16, torch.bfloat16)
        wide = [x.float() if isinstance(x, Tensor) and x.dtype in half else x for x in given]
        return operation(*wide, **named)

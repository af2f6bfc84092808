"""Networks from .safetensors, .pth and .ckpt files: spandrel knows some forty architectures by the names of weights.

    pip install --no-deps spandrel==0.4.2 einops safetensors

(without what it depends on, which would bring torchvision, and with that perhaps another torch). Pickled files are read
by its restricted unpickler: one that would run code is refused.
"""

from __future__ import annotations

import contextlib
import importlib.util
import pickle
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SUFFIXES = frozenset({".safetensors", ".pth", ".ckpt"})
INSTALL = "pip install --no-deps spandrel==0.4.2 einops safetensors"
TORCHVISION = {  # the names that two of its architectures import; no network that is served here calls them
    "torchvision.transforms.functional": ("InterpolationMode", "rotate", "normalize"),
    "torchvision.transforms": (),
    "torchvision": (),
}


def read(file: Path) -> Any:
    """spandrel's descriptor of the network: `.model` is the module, on the CPU, in evaluation mode, float32. Raises
    ValueError with a sentence that names the file but not its folder."""
    if importlib.util.find_spec("spandrel") is None:
        raise ValueError(f"{file.name} is read by spandrel, which is not installed: {INSTALL}")
    with torchvision_stood_in():
        import spandrel
    try:
        found = spandrel.ModelLoader("cpu").load_from_file(file)
    except spandrel.UnsupportedModelError:
        raise ValueError(f"{file.name} holds the weights of no network that spandrel knows") from None
    except pickle.UnpicklingError:
        raise ValueError(f"{file.name} is damaged, or holds code beside weights; bring it as .safetensors") from None
    except Exception as fault:  # of the many that torch and safetensors have for damaged files
        raise ValueError(f"{file.name} cannot be read ({type(fault).__name__}); fetch it again") from None
    return found.float().eval()  # it comes in training mode, where batch norms depend on an image's companions


@contextlib.contextmanager
def torchvision_stood_in() -> Iterator[None]:
    """Something that can be imported in torchvision's place, for a moment, where it is not installed."""
    if "spandrel" in sys.modules or importlib.util.find_spec("torchvision") is not None:
        yield
        return
    for name, contents in TORCHVISION.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(dict.fromkeys(contents))
    try:
        yield
    finally:
        for name in TORCHVISION:
            del sys.modules[name]

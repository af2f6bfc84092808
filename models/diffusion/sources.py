"""Where a diffusion model's files lie, what of them would be loaded, and why a model is refused before it is loaded.

A source is a folder in diffusers' layout, one .safetensors file, a repository on the Hugging Face hub ("owner/name") or
on ModelScope ("modelscope:owner/name", looked for in MODELSCOPE_CACHE first). Weights count as safe when they are
.safetensors: pickles (.bin, .ckpt, .pt) run whatever code was put into them. How hubs are asked: `hubs.py`. A single
file holds weights alone; sizes of layers and vocabularies come from a pipeline's configuration (`configuration`).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import ModelFailed
from core.tensorfile import TensorFile
from models.diffusion import hubs
from models.diffusion.hubs import INDEX, PICKLES, SAFE

MODELSCOPE = "modelscope:"
SINGLE_FILE_DENOISERS = ("model.diffusion_model.", "double_blocks.", "single_blocks.", "transformer_blocks.")
WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model|pytorch_model)(?:\.(?P<before>[\w-]+?))?(?:-\d{5}-of-\d{5})?(?:\.(?P<after>\w+))?\.\w+"
)


@dataclass(frozen=True, slots=True)
class Source:
    """A model's files on this machine: a folder or a single file."""

    path: Path
    variant: str | None = None

    @property
    def single_file(self) -> bool:
        return self.path.is_file()

    @property
    def is_pipeline(self) -> bool:
        """Whether it is a folder with several networks, rather than a single file or network."""
        return (self.path / INDEX).is_file()

    def index(self) -> dict[str, Any]:
        """The folder's list of components. Raises `ModelFailed`."""
        try:
            index = json.loads((self.path / INDEX).read_text("utf-8"))
        except FileNotFoundError:
            raise ModelFailed(f"the folder '{self.path.name}' has no {INDEX}; it is no diffusers pipeline") from None
        except (OSError, ValueError):
            raise ModelFailed(f"{INDEX} of '{self.path.name}' cannot be read") from None
        if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str | list):
            raise ModelFailed(f"{INDEX} of '{self.path.name}' names no pipeline class")
        return index

    def components(self) -> list[str]:
        """The folders of its networks (and of all else that it is made of)."""
        return [
            name for name, entry in self.index().items()
            if isinstance(entry, list) and entry and entry[0] and (self.path / name).is_dir()
        ]

    def weights(self) -> dict[str, list[Path]]:
        """By component, the files of weights that would be loaded. A single file is all there is of "everything".

        Raises `ModelFailed` where files are only there as another variant than was asked for.
        """
        if self.single_file:
            return {"everything": [self.path]}
        found = {name: self._files(self.path / name) for name in self.components()}
        return {name: files for name, files in found.items() if files}

    def _files(self, folder: Path) -> list[Path]:
        variants: dict[str, list[Path]] = {}
        for file in sorted(folder.iterdir()):
            match = WEIGHTS.fullmatch(file.name)
            if match and file.suffix in (SAFE, *PICKLES):
                variants.setdefault(match["before"] or match["after"] or "", []).append(file)
        wanted = self.variant if self.variant in variants else ""
        if variants and wanted not in variants:
            raise ModelFailed(
                f"the {folder.name} of '{self.path.name}' is only there as {', '.join(sorted(variants))}; "
                "name one of these as the model's option 'variant'"
            )
        files = variants.get(wanted or "", [])
        safe = [file for file in files if file.suffix == SAFE]
        return safe or files

    def refuse_pickles(self) -> None:
        """Raises `ModelFailed` when one of the files that would be loaded is a pickle."""
        for name, files in self.weights().items():
            for file in files:
                if file.suffix in PICKLES:
                    raise ModelFailed(
                        f"{file.name} ({name}) is a pickle, which can run code when it is loaded; convert the weights "
                        "to .safetensors, or set the model's option 'trust_pickle' if you know where they come from"
                    )

    def sizes(self, item_bytes: int | None = None, eight_bits: tuple[str, ...] = ()) -> dict[str, int]:
        """By component, the bytes of its weights. `item_bytes`: those of one number once it is loaded; None: as it
        lies there. `eight_bits`: how the names begin of those whose matrices will take one byte a number. Pickles count
        by the length of their files."""
        found = {}
        for name, files in self.weights().items():
            small = ("",) if name.startswith(eight_bits) else SINGLE_FILE_DENOISERS if self.single_file else ()
            found[name] = sum(_size(file, item_bytes, small if eight_bits else ()) for file in files)
        return found


def find(
    options: Mapping[str, Any], environ: Mapping[str, str] = os.environ, *, one_network: bool = False
) -> Source:
    """The files of the option `source`, downloaded first if they may be and need to. Options: `source`, `variant`,
    `revision`, `offline`, `trust_pickle`. `one_network`: it is a ControlNet, not a pipeline. Raises `ModelFailed` with
    what is missing and what to do."""
    named = str(options.get("source", "")).strip()
    variant = str(options.get("variant") or "") or None
    if not named:
        raise ModelFailed("the model's option 'source' is missing: a folder, a .safetensors file or a hub id")
    if named.startswith(MODELSCOPE):
        return Source(hubs.modelscope(named.removeprefix(MODELSCOPE), options, environ, one_network), variant)
    local = Path(named).expanduser()
    if local.exists():
        return Source(local, variant)
    if not hubs.ID.fullmatch(named) or local.suffix in (SAFE, *PICKLES):
        raise ModelFailed(f"the model's source '{local.name}' is not there; bring the folder or file, or name a hub id")
    return Source(hubs.hugging_face(named, variant, options, one_network), variant)


def configuration(source: Source, options: Mapping[str, Any]) -> Path:
    """The folder with the configuration of a single file's pipeline: the option `config` (a folder in diffusers'
    layout, of which the weights are not looked at, or a hub id), else that of the model that diffusers takes the
    weights for, from the hub or its cache. Raises `ModelFailed`."""
    named = str(options.get("config") or "").strip()
    local = Path(named).expanduser()
    if named and (local / INDEX).is_file():
        return local
    if named and (local.exists() or not hubs.ID.fullmatch(named)):
        what = f"has no {INDEX}" if local.exists() else "is not there"
        raise ModelFailed(f"the model's option 'config', '{local.name}', {what}; name a folder in diffusers' layout")
    try:
        return hubs.configuration(named or _usual_model(source), options)
    except ModelFailed as fault:
        raise ModelFailed(
            f"the configuration for {source.path.name} is missing: {fault.message}; or name a folder that has it (as "
            "diffusers saves a pipeline, weights may be left out) as the model's option 'config'"
        ) from None


def _usual_model(source: Source) -> str:
    """The hub id of the model that weights of these names and shapes are usually of."""
    from diffusers.loaders import single_file_utils

    guess: Any = single_file_utils  # which has no types
    try:
        weights = guess.load_single_file_checkpoint(str(source.path))
        return str(guess.fetch_diffusers_config(weights)["pretrained_model_name_or_path"])
    except Exception:  # damaged, empty, of no known kind: many errors, which loading it will tell of in its turn
        raise ModelFailed("diffusers does not know weights of these names") from None


def _size(file: Path, item_bytes: int | None, eight_bits: tuple[str, ...]) -> int:
    """`eight_bits`: how the names begin of tensors whose matrices take one byte a number."""
    if file.suffix != SAFE:
        return file.stat().st_size
    try:
        tensors = TensorFile.read(file).tensors
    except ValueError as fault:
        raise ModelFailed(f"the weights {file.name} are damaged: {fault}; fetch them again") from None
    total = 0
    for name, tensor in tensors.items():
        floating = tensor.dtype.startswith(("F", "BF"))
        small = floating and len(tensor.shape) == 2 and name.startswith(eight_bits)
        total += tensor.elements if small else tensor.elements * item_bytes if item_bytes and floating else tensor.size
    return total


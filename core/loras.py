"""The folder of LoRAs: small .safetensors files that change what a diffusion model draws, by name.

The master lists and checks them without torch; the worker loads them. A file that appears, changes or goes away is
seen at the next look: nothing is remembered here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from core.errors import BadRequest, InvalidParameter
from core.tensorfile import TensorFile, TensorHeader

SUFFIX = ".safetensors"
NAME = re.compile(r"[^\W_](?:[\w .+-]{0,98}[\w+-])?")  # letters of any script; no separators, no dots at the ends
LONGEST_NAME = 200  # bytes; file systems allow 255 with the suffix
# Tensors and notes of a file's header. The most that is known: four tensors (DoRA's) in each of the 986 layers of SDXL
# with its text encoders, of Qwen-Image's 840. Notes of trainers are about a hundred.
MOST_ENTRIES = 8192
# Its bytes. A tensor takes about 130, so the above are half a MB; trainers' notes (kohya: the counts of all tags,
# twice) may be as much again.
LONGEST_HEADER = 2 << 20
MOST = 3  # LoRAs of one request
LEAST_WEIGHT, MOST_WEIGHT = 0.0, 2.0
DOWN = ("lora_down.weight", "lora_A.weight", "lora.down.weight", "lora_A.default.weight")
TEXT_WIDTHS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL"}


@dataclass(frozen=True, slots=True)
class Lora:
    """One file. `size` in bytes, `modified` in nanoseconds since 1970, its number on the disk: a file that was replaced
    has others."""

    name: str
    size: int
    modified: int
    inode: int = 0


@dataclass(frozen=True, slots=True)
class LoraFacts:
    """What a file says of itself: the highest rank of its layers, how many there are, and the family of models that it
    was made for, as far as its names and shapes tell ("" if not)."""

    rank: int
    layers: int
    base: str


class LoraFolder:
    """The files of one folder, which may be missing as long as there are none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def list(self) -> list[Lora]:
        """All of them, by name. Files of other kinds and of names that no request could say are passed over."""
        files = self.folder.glob(f"*{SUFFIX}") if self.folder.is_dir() else ()
        found = (self._look(file.stem) for file in files if NAME.fullmatch(file.stem))
        return sorted((lora for lora in found if lora), key=lambda lora: lora.name)

    def get(self, name: str) -> Lora:
        """Raises `InvalidParameter` when there is none of that name."""
        lora = self._look(checked_name(name))
        if lora is None:
            near = difflib.get_close_matches(name, [known.name for known in self.list()], n=1)
            hint = f"did you mean '{near[0]}'?" if near else "upload its file first"
            raise InvalidParameter(f"there is no LoRA '{name}'; {hint}", parameter="lora_name")
        return lora

    def file(self, name: str) -> Path:
        """Where a LoRA of that name lies, or would lie. Raises `InvalidParameter` for what is no name."""
        return self.folder / f"{checked_name(name)}{SUFFIX}"

    def _look(self, name: str) -> Lora | None:
        try:
            state = self.file(name).stat()
        except OSError:
            return None
        return Lora(name, state.st_size, state.st_mtime_ns, state.st_ino)


def checked_name(name: str) -> str:
    """The name, without the suffix of a file. Raises `InvalidParameter` for one that could lead out of the folder."""
    name = name.strip().removesuffix(SUFFIX)
    if not NAME.fullmatch(name) or len(name.encode()) > LONGEST_NAME:
        raise InvalidParameter(
            "a LoRA's name has 1 to 100 letters, digits, blanks and . _ + - (at most 200 bytes), and begins with a "
            "letter or digit",
            parameter="lora_name",
        )
    return name


def inspect(file: Path, pause: Callable[[], None] = lambda: None) -> LoraFacts:
    """Look into a file before it is offered; `pause()` is called now and then. Raises `BadRequest` with what it is
    instead of a LoRA."""
    try:
        tensors = TensorFile.read(file, LONGEST_HEADER, MOST_ENTRIES, pause).tensors
    except ValueError as fault:
        raise BadRequest(f"this file is not usable as a LoRA: {fault}") from None
    ranks = [tensor.shape[0] for name, tensor in tensors.items() if name.endswith(DOWN) and len(tensor.shape) >= 2]
    if not ranks or not all(ranks):
        raise BadRequest("this file is not usable as a LoRA: it has no pairs of low-rank matrices (lora_down/lora_up)")
    return LoraFacts(max(ranks), len(ranks), _base(tensors))


def wanted(
    names: str | Iterable[str] | None, weights: str | float | Iterable[float | str] | None
) -> list[tuple[str, float]]:
    """The LoRAs of a request with their weights. Both may be texts with commas; a missing weight is 1, one weight
    counts for all. Raises `InvalidParameter`."""
    given = [name for name in _parts(names) if name]
    if len(given) > MOST:
        raise InvalidParameter(f"{len(given)} LoRAs; the most is {MOST}", parameter="lora_name")
    if len(set(given)) != len(given):
        raise InvalidParameter("a LoRA is named twice; give it one weight instead", parameter="lora_name")
    numbers = [_weight(weight) for weight in _parts(weights) if weight != ""]
    if len(numbers) <= 1:
        numbers = (numbers or [1.0]) * len(given)
    if len(numbers) != len(given):
        raise InvalidParameter(f"{len(numbers)} weights for {len(given)} LoRAs", parameter="lora_weight")
    return [(checked_name(name), weight) for name, weight in zip(given, numbers, strict=True)]


def _parts(given: object) -> list[str]:
    if given is None:
        return []
    parts = given if isinstance(given, list | tuple) else str(given).split(",")
    return [str(part).strip() for part in parts]


def _weight(given: str) -> float:
    try:
        weight = float(given)
    except ValueError:
        weight = -1.0
    if not LEAST_WEIGHT <= weight <= MOST_WEIGHT:
        raise InvalidParameter(
            f"a LoRA's weight is a number from {LEAST_WEIGHT:g} to {MOST_WEIGHT:g}", parameter="lora_weight"
        )
    return weight


def _base(tensors: Mapping[str, TensorHeader]) -> str:
    """The family, by what only its networks have: layers of that name, or text of that width."""
    names = " ".join(tensors)
    if "double_blocks" in names or "single_transformer_blocks" in names:
        return "Flux"
    if "img_mlp" in names or "txt_mlp" in names:
        return "Qwen-Image"
    for name, tensor in tensors.items():
        if "attn2" in name and "to_k" in name and name.endswith(DOWN):
            return TEXT_WIDTHS.get(tensor.shape[1], "")
    return ""

"""What a .safetensors file says of itself, read without torch and without its tensors.

The format (Hugging Face, safetensors 0.x): 8 bytes, little-endian, the length of a JSON header; the header, which gives
each tensor's dtype, shape and place; then the tensors' bytes without gaps. Such a file holds no code.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LONGEST_HEADER = 100_000_000  # bytes; what the format's own library allows
MOST_SIDES = 16
LONGEST_SIDE = 1 << 62
BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "I16": 16, "U16": 16, "F16": 16,
    "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """One tensor of a file: its dtype as the format names it ("F16"), its shape, its bytes."""

    dtype: str
    shape: tuple[int, ...]
    size: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class TensorFile:
    """The header of a file: its tensors by name, and the texts that its maker left."""

    tensors: Mapping[str, TensorHeader]
    notes: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path, longest: int = LONGEST_HEADER) -> TensorFile:
        """`longest`: the most bytes that its header may have. Raises ValueError with half a sentence (what the file is
        instead), OSError when it cannot be read."""
        whole = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(longest, whole - 8):
                raise ValueError("it is no safetensors file, or a damaged one")
            raw = stream.read(length)
        try:
            header = json.loads(raw)
            notes = header.pop("__metadata__", None) or {}
            tensors = {name: _tensor(entry) for name, entry in header.items()}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise ValueError("its safetensors header cannot be read") from None
        if 8 + length + sum(tensor.size for tensor in tensors.values()) != whole:
            raise ValueError("it was cut off, or has more bytes than its header tells of")
        return cls(tensors, {str(key): str(value) for key, value in notes.items()})


def _tensor(entry: Mapping[str, Any]) -> TensorHeader:
    shape, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
    whole = all(type(number) is int and 0 <= number <= LONGEST_SIDE for number in (*shape, start, end))
    if not whole or len(shape) > MOST_SIDES:  # before anything is computed: "a" * side would be a text of that length
        raise ValueError
    if BITS[entry["dtype"]] * math.prod(shape) != 8 * (end - start):
        raise ValueError
    return TensorHeader(entry["dtype"], shape, end - start)

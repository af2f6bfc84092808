"""How people write sizes, durations and lists in settings ("64MiB", "7d", "a,b"), and how they are shown again.

Every reader takes what a flag, an environment variable or a TOML file may hold and raises ValueError with a sentence.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_network
from typing import Annotated, Any

from pydantic import BeforeValidator

_SIZES = {
    "": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40, "kib": 1 << 10, "mib": 1 << 20,
    "gib": 1 << 30, "tib": 1 << 40, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
}  # fmt: skip
_SECONDS = {"us": 1e-6, "ms": 1e-3, "": 1, "s": 1, "m": 60, "min": 60, "h": 3_600, "d": 86_400, "w": 604_800}
_QUANTITY = re.compile(r"([0-9][0-9_]*(?:\.[0-9]+)?)\s*([a-z]*)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Form:
    """How a setting is written: the placeholder of its flag and the way back from value to text."""

    metavar: str
    show: Callable[[Any], str]


def read_count(value: Any) -> int:
    """A whole number from 10000 or "10_000"."""
    if isinstance(value, bool) or not re.fullmatch(r"[+-]?[0-9]{1,20}(_[0-9]{3}){0,6}", str(value).strip()):
        raise ValueError("should be a whole number")
    return int(value)


def read_size(value: Any) -> int:
    """Bytes from 4096, "64MiB", "2 GB", "1.5g". A bare K, M, G or T is binary."""
    number, unit = _quantity(value, "a size such as 64MiB or 2GiB")
    if unit not in _SIZES:
        raise ValueError("should be a size such as 64MiB or 2GiB (units: B, KiB, MiB, GiB, TiB, KB, MB, GB, TB)")
    return round(number * _SIZES[unit])


def show_size(size: int) -> str:
    """The shortest exact writing of a size: 67108864 -> "64MiB"."""
    for name, factor in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size and size % factor == 0:
            return f"{size // factor}{name}"
    return str(size)


def read_duration(value: Any) -> float:
    """Seconds from 0.05, "50ms", "30s", "5min", "2h", "7d"."""
    number, unit = _quantity(value, "a duration such as 50ms, 30s, 5min, 2h or 7d")
    if unit not in _SECONDS:
        raise ValueError("should be a duration such as 50ms, 30s, 5min, 2h or 7d")
    return number * _SECONDS[unit]


def show_duration(seconds: float) -> str:
    """The shortest exact writing of a duration: 604800.0 -> "7d"."""
    if 0 < seconds < 1:
        return f"{seconds * 1000:g}ms"
    for name, factor in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds and seconds % factor == 0:
            return f"{seconds / factor:g}{name}"
    return f"{seconds:g}s"


def read_words(value: Any) -> Any:
    """A tuple of words from "a, b" or a list."""
    return tuple(word for word in re.split(r"[,\s]+", value) if word) if isinstance(value, str) else value


def read_networks(value: Any) -> Any:
    """A tuple of networks from "10.0.0.0/8, ::1" or a list."""
    try:
        return tuple(str(ip_network(word, strict=False)) for word in read_words(value))
    except ValueError:
        raise ValueError("should be networks such as 10.0.0.0/8,fd00::/8 or addresses") from None


def read_caps(value: Any) -> Any:
    """(side, items) pairs from "512:16,1024:8" or a list of pairs; sides must ascend."""
    if isinstance(value, str):
        try:
            value = tuple(tuple(int(part) for part in pair.split(":")) for pair in read_words(value))
        except ValueError:
            raise ValueError("should be side:items pairs such as 512:16,1024:8,2048:2") from None
    try:
        sides = [side for side, items in value if side >= 1 and items >= 1]
    except (TypeError, ValueError):
        raise ValueError("should be side:items pairs such as 512:16,1024:8,2048:2") from None
    if len(sides) < len(value) or sides != sorted(set(sides)):
        raise ValueError("should have ascending sides and at least one item each, such as 512:16,1024:8,2048:2")
    return value


def _quantity(value: Any, wanted: str) -> tuple[float, str]:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return value, ""
    found = _QUANTITY.fullmatch(value.strip()) if isinstance(value, str) and len(value) < 32 else None
    if found is None:
        raise ValueError(f"should be {wanted}")
    text = found[1].replace("_", "")
    return float(text) if "." in text else int(text), found[2].lower()


Count = Annotated[int, BeforeValidator(read_count), Form("N", str)]
Size = Annotated[int, BeforeValidator(read_size), Form("SIZE", show_size)]
Duration = Annotated[float, BeforeValidator(read_duration), Form("TIME", show_duration)]
Words = Annotated[tuple[str, ...], BeforeValidator(read_words), Form("A,B", ",".join)]
Networks = Annotated[tuple[str, ...], BeforeValidator(read_networks), Form("CIDR,..", ",".join)]
Caps = Annotated[
    tuple[tuple[int, int], ...],
    BeforeValidator(read_caps),
    Form("SIDE:N,..", lambda caps: ",".join(f"{side}:{items}" for side, items in caps)),
]

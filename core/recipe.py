"""Reads a prompt (English or Chinese) into a recipe of image operations. Stub until the real one is written."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Operation:
    """One image operation: its name and its strength and parameters."""

    name: str
    params: dict[str, Any] = field(default_factory=dict)


def read_recipe(prompt: str) -> tuple[Operation, ...]:
    """The operations a prompt asks for, in the order in which they apply. Raises `InvalidParameter` when no word of it
    is understood, with the list of what is."""
    return ()

"""Makes frozen dataclasses quick to pickle: those that cross the process line with every request."""

from __future__ import annotations

from dataclasses import fields
from operator import attrgetter
from typing import Any, TypeVar

T = TypeVar("T")


def by_position(cls: type[T]) -> type[T]:
    """Class decorator for a dataclass: it is pickled as a call of the class with the values of its fields.

    A frozen dataclass with slots gets methods of its own for this, in Python, which look every field up anew, at both
    ends. Measured with the messages of one image: 43 µs for writing and reading them all, 24 µs with this.
    """
    names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    values = attrgetter(*names)

    def reduce(self: T) -> tuple[type[T], tuple[Any, ...]]:
        return cls, values(self) if len(names) > 1 else (values(self),)

    cls.__reduce__ = reduce  # type: ignore[assignment, method-assign]
    return cls

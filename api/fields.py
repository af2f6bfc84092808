"""Number fields of pydantic models that come as text, from forms and queries: plain numbers alone."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator


def _plain(value: Any) -> Any:
    """pydantic takes "1_0" for 10, and blanks of any script around it."""
    odd = isinstance(value, str) and ("_" in value or not value.isascii())
    return "no number" if odd else value


Whole = Annotated[int, BeforeValidator(_plain)]
Real = Annotated[float, BeforeValidator(_plain)]

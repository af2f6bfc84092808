"""Numbers that come as text, from forms and queries: plain ASCII ones, as JSON has them, and nothing else."""

from __future__ import annotations

import re

MOST = 64  # characters
_PLAIN = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")


def is_number(value: object) -> bool:
    """Whether it is a number or the text of a plain one: no truth value, no space, no underscore, no other script's
    digits, no infinity, at most `MOST` characters."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return False
    return len(str(value)) <= MOST and (not isinstance(value, str) or _PLAIN.fullmatch(value) is not None)

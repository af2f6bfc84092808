"""JSON as a careful reader takes it: what two parsers could understand differently is refused with a sentence.

Refused are doubled keys, NaN and Infinity, numbers beyond a double or of more than 64 digits, nesting deeper than
`MAX_DEPTH`, halves of surrogate pairs, and bytes that are not UTF-8.
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from core.errors import BadRequest

MAX_DEPTH = 32
MAX_DIGITS = 64


def loads(data: bytes | bytearray) -> Any:
    """The value of a JSON text. Raises `BadRequest`."""
    try:
        value = _DECODER.decode(data.decode("utf-8"))
    except UnicodeDecodeError:
        raise BadRequest("the JSON is not valid UTF-8") from None
    except json.JSONDecodeError as fault:
        raise BadRequest(f"the JSON cannot be read: {fault.msg} at character {fault.pos}") from None
    except RecursionError:
        raise _too_deep() from None
    _check(value, 1)
    return value


def _check(value: Any, depth: int) -> None:
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise BadRequest("the JSON holds half of a surrogate pair, which is no text")
    elif isinstance(value, (dict, list)):
        if depth > MAX_DEPTH:
            raise _too_deep()
        for item in value:
            _check(item, depth + 1)
        if isinstance(value, dict):
            for item in value.values():
                _check(item, depth + 1)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        doubled = next(name for name in names if names.count(name) > 1)
        raise BadRequest(f"the JSON has the key {json.dumps(doubled[:64])} twice in one object")
    return found


def _float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number) or len(text) > MAX_DIGITS:
        raise BadRequest("the JSON holds a number that is too large or too long")
    return number


def _int(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise BadRequest(f"the JSON holds a whole number of more than {MAX_DIGITS} digits")
    return int(text)


def _constant(text: str) -> NoReturn:
    raise BadRequest(f"the JSON holds {text}, which is no number")


def _too_deep() -> BadRequest:
    return BadRequest(f"the JSON is nested deeper than {MAX_DEPTH} levels")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_float=_float, parse_int=_int, parse_constant=_constant, strict=True
)

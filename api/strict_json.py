"""JSON as a careful reader takes it: what two parsers could understand differently is refused with a sentence.

Refused are doubled keys, NaN and Infinity, numbers beyond a double or of more than 64 digits, nesting deeper than
`MAX_DEPTH`, halves of surrogate pairs, and bytes that are not UTF-8; and more than `api.json_pieces` takes. A body is
read while it comes, in pieces: none keeps the event loop for long, whatever it holds.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import AsyncIterator, Collection
from typing import Any, NoReturn

from api.json_pieces import MAX_TEXT, LongText, Scanner
from core.errors import BadRequest, InvalidParameter
from core.turns import Turn, pieces

MAX_DEPTH = 32
MAX_DIGITS = 64
_HALF = re.compile("[\ud800-\udfff]")


def loads(data: bytes | bytearray) -> Any:
    """The value of a short JSON text, as a form or a query may hold one. Raises `BadRequest`, `TooLarge`."""
    scanner = Scanner()
    for piece in pieces(bytes(data)):
        scanner.feed(piece)
    value, texts = _parse(scanner, frozenset(), lenient=False)
    for place in texts:
        place.settle()
    return value[0]


async def read(body: AsyncIterator[bytes], long: Collection[str] = (), *, lenient: bool = False) -> Any:
    """The value of a JSON body. A long string under one of the names `long` stays a `LongText`, for whoever wants its
    pieces. `lenient`: of doubled keys the last one counts, whole numbers are as long as Python reads them, and a string
    that is too long for a text stays as it is. Raises `BadRequest`, `TooLarge`."""
    scanner, turn = Scanner(), Turn()
    try:
        async for chunk in body:
            for piece in pieces(chunk):
                scanner.feed(piece)
                await turn.over()
            for text in scanner.texts[-1:]:
                await text.spill()
        value, texts = _parse(scanner, frozenset(long), lenient)
        for place in texts:
            await turn.over()
            place.settle()
        return value[0]
    except BaseException:
        scanner.close()
        raise


def text_of(text: LongText) -> str:
    """A long string that is short enough to be text. Raises `BadRequest`."""
    found: str = _decode(text.quoted(), _STRICT)
    _check_text(found)
    return found


class _Place:
    """Where a text stands that came as a long string."""

    __slots__ = ("_holder", "_key", "_text")

    def __init__(self, holder: Any, key: Any, text: LongText) -> None:
        self._holder, self._key, self._text = holder, key, text

    def settle(self) -> None:
        """Put the text itself there."""
        self._holder[self._key] = text_of(self._text)


def _parse(scanner: Scanner, long: frozenset[str], lenient: bool) -> tuple[list[Any], list[_Place]]:
    """A list that holds the value, and the places in it that are still to be settled."""
    scanner.end()
    texts = iter(scanner.texts)
    decoder = json.JSONDecoder(
        object_pairs_hook=None if lenient else _object, parse_float=_float, parse_int=_long_int if lenient else _int,
        parse_constant=lambda _: next(texts), strict=True,
    )  # fmt: skip
    value = [_decode(bytes(scanner.skeleton), decoder, whole=not scanner.texts)]
    places: list[_Place] = []
    _check(value, 0, places, long, lenient)
    return value, places


def _decode(data: bytes, decoder: json.JSONDecoder, whole: bool = False) -> Any:
    """`whole`: nothing was lifted out, so a position means something to who sent it."""
    try:
        return decoder.decode(data.decode("utf-8"))
    except UnicodeDecodeError:
        raise BadRequest("the JSON is not valid UTF-8") from None
    except json.JSONDecodeError as fault:
        where = f" at character {fault.pos}" if whole else ""
        raise BadRequest(f"the JSON cannot be read: {fault.msg}{where}") from None
    except RecursionError:
        raise _too_deep() from None


def _check(holder: Any, depth: int, places: list[_Place], long: frozenset[str], lenient: bool, keep: bool = False
           ) -> None:  # fmt: skip
    """Look at all that an object or a list holds. `keep`: it stands under a name whose strings may be long."""
    if depth > MAX_DEPTH:
        raise _too_deep()
    key: Any
    named = isinstance(holder, dict)
    for key, item in holder.items() if named else enumerate(holder):
        if named:
            _check_text(key)
        if isinstance(item, str):
            _check_text(item)
        elif isinstance(item, LongText):
            if keep or key in long:
                continue
            if item.size <= MAX_TEXT:
                places.append(_Place(holder, key, item))
            elif not lenient:
                what = f"'{key[:64]}'" if named else "a text in a list"
                raise InvalidParameter(f"{what} has more than {MAX_TEXT} bytes", parameter=str(key)[:64])
        elif isinstance(item, (dict, list)):
            _check(item, depth + 1, places, long, lenient, keep or (isinstance(item, list) and key in long))


def _check_text(text: str) -> None:
    if not text.isascii() and _HALF.search(text):
        raise BadRequest("the JSON holds half of a surrogate pair, which is no text")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        doubled = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
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


def _long_int(text: str) -> int:
    try:
        return int(text)
    except ValueError:  # Python's own bound
        raise BadRequest("the JSON holds a whole number of too many digits") from None


def _constant(text: str) -> NoReturn:
    raise BadRequest(f"the JSON holds {text}, which is no number")


def _too_deep() -> BadRequest:
    return BadRequest(f"the JSON is nested deeper than {MAX_DEPTH} levels")


_STRICT = json.JSONDecoder(parse_constant=_constant, strict=True)

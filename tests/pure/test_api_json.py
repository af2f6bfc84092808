"""JSON as a careful reader takes it."""

from __future__ import annotations

import pytest

from api.strict_json import MAX_DEPTH, loads
from core.errors import BadRequest


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "Infinity"),
        (b'{"a": 1e400}', "too large"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b'{"x": {"b": 1, "b": 1}}', "twice"),
        (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"\\udfff": 1}', "surrogate"),
        (b'{"a": "\xff"}', "UTF-8"),
        (b"[" * 40 + b"]" * 40, "deeper"),
        (b"[" * 9_000, "deeper"),
        (b'{"a":' * 4_000, "deeper"),
        (b"[" * 100_000, "more than"),
        (b'{"a":' * 100_000, "more than"),
        (b"", "cannot be read"),
        (b'{"a": 1} tail', "cannot be read"),
        (b'{"a": "\n"}', "cannot be read"),
        (b"\xef\xbb\xbf{}", "cannot be read"),
    ],
)
def test_what_two_readers_could_take_differently_is_refused(text: bytes, word: str) -> None:
    with pytest.raises(BadRequest, match=word):
        loads(text)


def test_ordinary_json_is_read() -> None:
    text = '{"a": [1, 2.5, true, null, "Grüße 🎈"], "b": {"c": -0.0}}'
    assert loads(text.encode()) == {"a": [1, 2.5, True, None, "Grüße 🎈"], "b": {"c": -0.0}}
    assert loads(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)

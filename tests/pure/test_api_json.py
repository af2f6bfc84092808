"""JSON as a careful reader takes it."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.base64_pieces import Decoder, characters
from api.json_pieces import MAX_LONG, MAX_TEXT, MAX_VALUES, LongText
from api.strict_json import MAX_DEPTH, loads, read
from core.errors import BadRequest, InvalidImage, InvalidParameter, TooLarge


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


async def pieces(data: bytes, size: int) -> AsyncIterator[bytes]:
    for at in range(0, len(data), size):
        yield data[at : at + size]


@pytest.mark.parametrize(("text", "fault"), [
    (b"[" + b"0," * 40_000 + b"0]", TooLarge),
    (b"[" + b"0," * MAX_VALUES + b"0]", TooLarge),
    (b"[" + b'"%b",' % (b"a" * 300) * (MAX_LONG + 2) + b"0]", TooLarge),
    (b'{"prompt": "%b"}' % (b"a" * (MAX_TEXT + 1)), InvalidParameter),
    (b'["%b"]' % (b"a" * (MAX_TEXT + 1)), InvalidParameter),
    (b'{"%b": 1}' % (b"a" * 1000), BadRequest),
    (b'{"a": "%b' % (b"a" * 1000), BadRequest),
    (b'{"a": "%b\n"}' % (b"a" * 1000), BadRequest),
    (b'{"a": "%b\xff"}' % (b"a" * 1000), BadRequest),
    (b'{"a": "%b\\ud800"}' % (b"a" * 1000), BadRequest),
    (b'{"a": "%b", "b": NaN}' % (b"a" * 1000), BadRequest),
    (b'{"a": NaN"%b"}' % (b"a" * 1000), BadRequest),
])  # fmt: skip
async def test_more_than_is_looked_at_is_refused(text: bytes, fault: type[BadRequest]) -> None:
    for size in (1000, 1 << 20):
        with pytest.raises(fault):
            await read(pieces(text, size))


LONG = "Grüße \U0001f388 \"\\/\n" * 60
FOUND = {"a": LONG, "b": [LONG, 1, {"c": LONG}], "short": "a\"b\\", "n": -1.5e-3, "t": [True, None, {}, []]}


@given(st.integers(1, 3000), st.booleans())
async def test_a_text_is_the_same_wherever_its_pieces_end(size: int, escaped: bool) -> None:
    text = json.dumps(FOUND, ensure_ascii=escaped).encode()
    assert await read(pieces(text, size)) == FOUND == loads(text)


@given(st.binary(max_size=3000), st.integers(1, 5000), st.sampled_from(["plain", "url", "lines", "slashes", "codes"]))
async def test_base64_in_a_body_is_the_same_wherever_its_pieces_end(data: bytes, size: int, taste: str) -> None:
    text = base64.urlsafe_b64encode(data).rstrip(b"=") if taste == "url" else base64.b64encode(data)
    if taste == "lines":
        text = base64.encodebytes(data).replace(b"\n", b"\\r\\n")
    elif taste == "slashes":
        text = text.replace(b"/", b"\\/")
    elif taste == "codes":
        text = b"".join(b"\\u%04x" % code for code in text)
    body = await read(pieces(b'{"model": "x", "image": "%b"}' % text, size), ("image",))
    decoder = Decoder("image")
    found = [decoder.feed(piece) async for piece in characters(body["image"])]
    assert b"".join([*found, decoder.end()]) == data


async def test_a_long_text_under_a_name_for_images_stays_in_pieces_and_no_other() -> None:
    text = base64.b64encode(os.urandom(3_000_000))
    body = b'{"image": "%b", "list": {"image": ["%b"]}, "prompt": "%b"}' % (text, text, b"a" * 1000)
    found = await read(pieces(body, 65_536), ("image",))
    assert isinstance(found["image"], LongText) and isinstance(found["list"]["image"][0], LongText)
    assert found["image"].size == len(text) and found["prompt"] == "a" * 1000


@pytest.mark.parametrize("end", ["\\", "\\u00", "\\x41", "é", "!", "\\u00e9"])
async def test_a_long_text_that_is_no_base64_is_refused(end: str) -> None:
    body = b'{"image": "%b"}' % (b"A" * 1000 + end.encode() + b"A" * 8)
    found = await read(pieces(body, 100), ("image",))
    decoder = Decoder("image")
    with pytest.raises((BadRequest, InvalidImage)):
        [decoder.feed(piece) async for piece in characters(found["image"])]
        decoder.end()

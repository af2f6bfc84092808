"""base64 as clients write it: what IOPaint's decoder takes, ours takes, and gives the same bytes."""

from __future__ import annotations

import asyncio
import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.base64_pieces import ENCODED, encoded
from api.iopaint_images import decode
from core.errors import InvalidImage
from core.turns import PIECE

DATA = bytes(range(256)) * 3 + b"\xfb\xff\xfe?"
TEXT = base64.b64encode(DATA).decode()


@pytest.mark.parametrize("text", [
    TEXT,
    base64.encodebytes(DATA).decode(),
    TEXT.rstrip("="),
    TEXT + "\n",
    TEXT + "garbage after the end",
    base64.urlsafe_b64encode(DATA).decode(),
    "*" + TEXT[:9] + "$\u00e9 \t\r\n猫" + TEXT[9:],
    f"data:image/png;base64,{TEXT}",
    f"DATA:image/anything;BASE64,{TEXT}",
    f"data:image/png;charset=utf-8;name=a.png;base64,{TEXT}",
    f"data:application/octet-stream;base64,{TEXT}",
])
async def test_every_way_of_writing_base64_is_read(text: str) -> None:
    assert TEXT.endswith("=") and "+" in TEXT and "/" in TEXT
    assert await decode(text, "image") == DATA


@pytest.mark.parametrize("text", [
    "A", "AAAAA", "data:image/png,abcd", "data:text/html;base64,abcd", "data:image/png",
    f"data:image/png;{'x' * 300};base64,abcd",
])  # fmt: skip
async def test_what_is_no_base64_is_refused(text: str) -> None:
    with pytest.raises(InvalidImage, match="mask"):
        await decode(text, "mask")


async def test_a_long_text_is_decoded_in_pieces_even_when_it_must_be_cleaned_first(monkeypatch) -> None:
    monkeypatch.setattr("core.turns.TURN", 0.0)
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    data = bytes(12 * PIECE)
    task = asyncio.create_task(others())
    assert await decode(base64.encodebytes(data).decode(), "image") == data
    task.cancel()
    assert turns >= len(data) // PIECE * 4 // 3


@given(st.binary(max_size=200), st.integers(-2, 2))
def test_pieces_join_without_a_seam(data: bytes, off: int) -> None:
    whole = data + b"\x55" * (ENCODED + off)
    assert asyncio.run(decode(base64.b64encode(whole).decode(), "image")) == whole
    assert b"".join(encoded(whole)) == base64.b64encode(whole)

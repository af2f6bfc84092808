"""The chunked coding undone, whatever way it is cut on its way here."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.chunks import MAX_LINE, MAX_TRAILER, Chunks
from core.errors import BadRequest

AFTER = b"GET / HTTP/1.1\r\n"


def read(data: bytes, cuts: tuple[int, ...] = ()) -> tuple[bytes, bytes]:
    """(body, what does not belong to it) of data that comes cut at these places."""
    body, chunks, at = bytearray(), Chunks(), 0
    for end in (*sorted(cuts), len(data)):
        if not chunks.done:
            read, part, _ = chunks.read(data[at:end], 0)
            at += read
            body += part
    assert chunks.done
    return bytes(body), data[at:]


@given(st.lists(st.binary(min_size=1, max_size=40)), st.sets(st.integers(0, 200)))
def test_a_body_is_the_same_wherever_it_is_cut(pieces: list[bytes], cuts: set[int]) -> None:
    data = b"".join(b"%X;a=\"b\"\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\nX-Sum: 1\r\n\r\n"
    assert read(data + AFTER, tuple(cut for cut in cuts if cut < len(data))) == (b"".join(pieces), AFTER)


@given(st.binary(max_size=60), st.sets(st.integers(0, 60)))
def test_whatever_comes_is_read_or_refused_the_same_wherever_it_is_cut(data: bytes, cuts: set[int]) -> None:
    def outcome(*cuts: int) -> object:
        chunks, body, at = Chunks(), bytearray(), 0
        try:
            for end in (*cuts, len(data)):
                if not chunks.done:
                    read, part, _ = chunks.read(data[at:end], 0)
                    at += read
                    body += part
        except BadRequest:
            return None
        return chunks.done, bytes(body)

    assert outcome() == outcome(*sorted(cut for cut in cuts if cut < len(data)))


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n", b"x\r\n", b"3 \r\nabc", b"+3\r\nabc", b"3\nabc", b"3\r\nabcd\r\n",
        b"3\r\nab\r\n0\r\n\r\n", b"3;\x00\r\n",
        b"0\r\nno field\r\n\r\n", b"0\r\nX : a\r\n\r\n", b"0\r\n a\r\n\r\n", b"0\r\nX: a\n\r\n",
        b"0" * (MAX_LINE + 1), b"0\r\n" + b"X: " + b"a" * MAX_TRAILER, b"0\r\n" + b"X: a\r\n" * MAX_TRAILER,
    ],
)  # fmt: skip
def test_what_is_no_chunk_is_refused(data: bytes) -> None:
    with pytest.raises(BadRequest):
        read(data)
    with pytest.raises(BadRequest):
        read(data, tuple(range(len(data))))


def test_tiny_chunks_that_came_at_once_are_one_piece_and_still_counted() -> None:
    data = b"1\r\na\r\n" * 5_000
    assert Chunks().read(data + b"0\r\n", 0) == (len(data) + 3, b"a" * 5_000, 5_000)


def test_what_is_left_of_a_chunk_is_told_so_that_it_can_be_read_at_once():
    body = Chunks()
    assert body.ahead == 0
    at, part, _ = body.read(b"40000\r\nabc", 0)
    assert (at, part, body.ahead) == (10, b"abc", 0x40000 - 3)
    body.read(bytes(0x40000 - 3), 0)
    assert body.ahead == 0 and not body.done


def test_no_more_pieces_are_read_at_once_than_are_wanted():
    data = b"1\r\na\r\n" * 100 + b"0\r\n\r\n"
    body, at, sizes = Chunks(), 0, []
    while not body.done:
        at, part, pieces = body.read(data, at, 30)
        assert len(part) == pieces
        sizes.append(pieces)
    assert (at, sizes) == (len(data), [30, 30, 30, 10])

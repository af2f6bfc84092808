"""Headers of .safetensors files: whatever the format's own library refuses is refused, and told in a sentence."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from core.tensorfile import BITS, LONGEST_ENTRY, TensorFile

Entry = tuple[str, tuple[int, ...], tuple[int, int]]
LAXER = {  # what that library takes and two readers could take differently, or no writer writes
    '{"a":%s,"a":%s}', '{"__metadata__":{"a":"1","a":"2"}}', '{"a":["U8",[2],[0,2]]}',
    '{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2],"more":1}}',
}  # fmt: skip
WHOLE = '{"dtype":"U8","shape":[2],"data_offsets":[0,2]}'


def write(file: Path, header: str | bytes, body: int = 0) -> bytes:
    text = header.encode() if isinstance(header, str) else header
    data = struct.pack("<Q", len(text)) + text + bytes(body)
    file.write_bytes(data)
    return data


def taken(file: Path) -> bool:
    try:
        TensorFile.read(file)
    except ValueError as fault:
        assert str(fault) and str(file) not in str(fault)
        return False
    return True


def library_takes(data: bytes) -> bool:
    try:
        deserialize(data)
    except SafetensorError:
        return False
    return True


@pytest.mark.parametrize(("header", "body"), [
    ('{"__metadata__":[1,2]}', 0), ('{"__metadata__":"a"}', 0), ('{"__metadata__":{"a":1}}', 0),
    ('{"__metadata__":{"a":null}}', 0), ('{"__metadata__":{},"__metadata__":{}}', 0),
    ('{"a":null}', 0), ('{"a":[]}', 0), ('{"a":{}}', 0), ("[]", 0), ('"a"', 0), ("{}{}", 0), (b"{}\0", 0),
    ('{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,0]}}', 0),
    ('{"a":{"dtype":"U8","shape":[2.0],"data_offsets":[0,2]}}', 2),
    ('{"a":{"dtype":"U8","shape":[1e0],"data_offsets":[0,1]}}', 1),
    ('{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}', 0),
    ('{"a":{"dtype":"U8","shape":[true],"data_offsets":[0,1]}}', 1),
    ('{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2,3]}}', 2),
    ('{"a":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}', 3),
    ('{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,9]}}', 9),
    ('{"a":{"dtype":"U7","shape":[2],"data_offsets":[0,2]}}', 2),
    ('{"a":{"dtype":"F4","shape":[1],"data_offsets":[0,0]}}', 0),
    ('{"a":{"dtype":"U8","shape":[4611686018427387904,4,0],"data_offsets":[0,0]}}', 0),
    ('{"a":{"dtype":"U8","shape":[18446744073709551616,0],"data_offsets":[0,0]}}', 0),
    (f'{{"a":{WHOLE},"b":{WHOLE}}}', 2), (f'{{"a":{WHOLE},"b":{WHOLE}}}', 4),
    (f'{{"a":{WHOLE},"b":{{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}}}', 2),
    (f'{{"a":{WHOLE},"b":{{"dtype":"U8","shape":[0],"data_offsets":[1,1]}}}}', 2),
    (f'{{"a":{WHOLE},"b":{{"dtype":"U8","shape":[1],"data_offsets":[3,4]}}}}', 4),
    ('{"\\ud800":' + WHOLE + "}", 2), (b'{"\xff":' + WHOLE.encode() + b"}", 2), (b'{"__metadata__":{"a":"\1"}}', 0),
    ("\ufeff{}", 0), (f'{{"a":{WHOLE},}}', 2), (f"{{'a':{WHOLE}}}", 2), ("{}".encode("utf-16-le"), 0),
])  # fmt: skip
def test_what_the_format_s_library_refuses_is_refused(tmp_path: Path, header: str | bytes, body: int) -> None:
    data = write(tmp_path / "a.safetensors", header, body)
    assert not library_takes(data) and not taken(tmp_path / "a.safetensors")


@pytest.mark.parametrize("header", sorted(LAXER))
def test_what_two_readers_could_take_differently_is_refused(tmp_path: Path, header: str) -> None:
    data = write(tmp_path / "a.safetensors", header.replace("%s", WHOLE), 0 if "__meta" in header else 2)
    assert library_takes(data) and not taken(tmp_path / "a.safetensors")


@pytest.mark.parametrize(("header", "body"), [
    ("{}", 0), (' {\n"a" : {"shape":[2] , "data_offsets":[0,2],"dtype":"U8"}\t}   ', 2), ('{"__metadata__":null}', 0),
    (f'{{"b":{{"dtype":"F16","shape":[],"data_offsets":[2,4]}},"":{WHOLE}}}', 4),
    (f'{{"a":{WHOLE},"z":{{"dtype":"U8","shape":[0,3],"data_offsets":[2,2]}}}}', 2),
    ('{"\\u0061":{"\\u0064type":"U8","shape":[1],"data_offsets":[0,1]}}', 1),
    ('{"__metadata__":{"a":"{\\"b\\": [1, \\ud83d\\ude00]}"}}', 0),
])  # fmt: skip
def test_what_is_unusual_and_right_is_taken(tmp_path: Path, header: str, body: int) -> None:
    data = write(tmp_path / "a.safetensors", header, body)
    assert library_takes(data) and taken(tmp_path / "a.safetensors")


def test_an_entry_without_end_is_not_read_to_its_end(tmp_path: Path) -> None:
    for filling in ("[" * 200_000, "0," * 200_000, " " * LONGEST_ENTRY):
        write(tmp_path / "a.safetensors", f'{{"a":{{"dtype":"U8","shape":{filling}[0],"data_offsets":[0,0]}}}}')
        assert not taken(tmp_path / "a.safetensors")


def entries() -> st.SearchStrategy[list[Entry]]:
    sides = st.lists(st.sampled_from([0, 1, 2, 3, 8, 1 << 31, (1 << 64) - 1]), max_size=3).map(tuple)
    offsets = st.tuples(st.integers(0, 24), st.integers(0, 24))
    dtypes = st.sampled_from([*BITS, "F8", "I4", "c64"])
    return st.lists(st.tuples(dtypes, sides, offsets), max_size=3)


def laid_out(chosen: list[tuple[str, tuple[int, ...]]]) -> list[Entry]:
    """Tensors one behind the other, as a writer would lay them."""
    place, found = 0, []
    for dtype, shape in chosen:
        size = BITS[dtype]
        for side in shape:
            size *= side
        found.append((dtype, shape, (place, place + size // 8)))
        place += size // 8
    return found


good = st.lists(st.tuples(st.sampled_from(list(BITS)), st.lists(st.integers(0, 4), max_size=3).map(tuple)), max_size=4)


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """Whole files: right ones, some with a number changed, some with a byte of the header changed."""
    told = draw(st.one_of(good.map(laid_out), entries()))
    header: dict[str, Any] = {
        f"t{number}": {"dtype": dtype, "shape": shape, "data_offsets": place}
        for number, (dtype, shape, place) in enumerate(told)
    }
    names = draw(st.permutations(list(header)))
    header = {name: header[name] for name in names}
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.sampled_from([{}, {"a": "b"}, {"a": 1}, [1, 2], None, "a", {"a": "{é"}]))
    text = bytearray(json.dumps(header, ensure_ascii=draw(st.booleans())).encode())
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        text[draw(st.integers(0, len(text) - 1))] = draw(st.sampled_from(list(b'{}[]",:0123459-.eE\\u \n\0\xc3n')))
    body = max([end for _, _, (_, end) in told if end < 4096], default=0) + draw(st.sampled_from([0, 0, 0, 1]))
    return struct.pack("<Q", len(text)) + bytes(text) + bytes(body)


@hypothesis_settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files())
def test_whatever_is_taken_the_format_s_library_takes(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(data)
    if taken(file):
        assert library_takes(data)
        assert {name: told.size for name, told in TensorFile.read(file).tensors.items()} == {
            name: len(told["data"]) for name, told in deserialize(data)
        }


@hypothesis_settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(good.map(laid_out))
def test_what_a_writer_writes_is_taken(tmp_path: Path, told: list[Entry]) -> None:
    header = {str(n): {"dtype": d, "shape": s, "data_offsets": p} for n, (d, s, p) in enumerate(told)}
    data = write(tmp_path / "a.safetensors", json.dumps(header), told[-1][2][1] if told else 0)
    assert taken(tmp_path / "a.safetensors") == library_takes(data)

"""The folder of LoRAs as the master sees it: names, weights, headers; no torch."""

from __future__ import annotations

import json
import struct
from types import SimpleNamespace

import pytest

from core import turns
from core.errors import BadRequest, InvalidParameter
from core.loras import LONGEST_HEADER, MOST_ENTRIES, LoraFolder, checked_name, inspect, wanted
from core.tensorfile import TensorFile
from store.loras import StoredLoras


def write(file, shapes, cut=0, dtype="F16"):
    """A .safetensors file with zeros in the given shapes."""
    header, place = {"__metadata__": {"made": "here"}}, 0
    for name, shape in shapes.items():
        size = 2
        for side in shape:
            size *= side
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header).encode()
    data = struct.pack("<Q", len(text)) + text + bytes(place)
    file.write_bytes(data[: len(data) - cut])
    return file


KOHYA = {
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight": [8, 768],
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_up.weight": [320, 8],
}


def test_a_file_tells_its_rank_its_layers_and_its_family(tmp_path):
    facts = inspect(write(tmp_path / "a.safetensors", KOHYA))
    assert (facts.rank, facts.layers, facts.base) == (8, 1, "Stable Diffusion 1")
    flux = {"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": [4, 64]}
    assert inspect(write(tmp_path / "b.safetensors", flux)).base == "Flux"
    assert TensorFile.read(tmp_path / "a.safetensors").notes == {"made": "here"}


@pytest.mark.parametrize(("content", "about"), [
    (b"", "no safetensors"), (b"PK\x03\x04" + bytes(100), "no safetensors"),
    (struct.pack("<Q", 1 << 60) + b"{}", "no safetensors"),
    (struct.pack("<Q", 4) + b"{]}}" + bytes(8), "header"),
    (struct.pack("<Q", 20000) + b"[" * 20000, "header"),
    (struct.pack("<Q", 12) + b'{"a": [1, 2]}'[:12], "header"),
    (struct.pack("<Q", 2) + b"{}", "low-rank"),
])
def test_what_is_no_lora_is_refused_in_a_sentence_without_a_path(tmp_path, content, about):
    file = tmp_path / "secret.safetensors"
    file.write_bytes(content)
    with pytest.raises(BadRequest, match=about) as refused:
        inspect(file)
    assert str(tmp_path) not in str(refused.value)


def test_a_file_that_was_cut_off_or_lies_about_its_shapes_is_refused(tmp_path):
    with pytest.raises(BadRequest, match="cut off"):
        inspect(write(tmp_path / "a.safetensors", KOHYA, cut=1))
    with pytest.raises(BadRequest, match="header"):
        inspect(write(tmp_path / "a.safetensors", KOHYA, dtype="F32"))
    with pytest.raises(BadRequest, match="low-rank"):
        inspect(write(tmp_path / "a.safetensors", {"unet.weight": [3, 3]}))


@pytest.mark.parametrize("name", [
    "../secret", "..", ".", "", " ", "a/b", "a\\b", "/etc/passwd", "a\0b", ".hidden", "a.", "x" * 101, "~", "C:evil",
    "a\nb", "水" * 80,
])
def test_a_name_cannot_lead_out_of_the_folder(tmp_path, name):
    with pytest.raises(InvalidParameter):
        checked_name(name)
    with pytest.raises(InvalidParameter):
        LoraFolder(tmp_path).file(name)


@pytest.mark.parametrize("name", ["a", "Detail v1.2", "水彩", "a-b_c+d", "x" * 100])
def test_ordinary_names_are_taken_with_or_without_the_suffix(name):
    assert checked_name(f"{name}.safetensors") == checked_name(f" {name} ") == name


def test_the_folder_is_looked_at_each_time(tmp_path):
    folder = LoraFolder(tmp_path / "loras")
    assert folder.list() == []
    (tmp_path / "loras").mkdir()
    write(tmp_path / "loras" / "b.safetensors", KOHYA)
    write(tmp_path / "loras" / "a.safetensors", KOHYA)
    (tmp_path / "loras" / "notes.txt").write_text("no")
    (tmp_path / "loras" / "..bad.safetensors").write_text("no")
    assert [lora.name for lora in folder.list()] == ["a", "b"]
    before = folder.get("a")
    write(tmp_path / "loras" / "a.safetensors", {**KOHYA, "more": [1]})
    assert folder.get("a") != before
    (tmp_path / "loras" / "a.safetensors").unlink()
    with pytest.raises(InvalidParameter, match="no LoRA 'a'"):
        folder.get("a")


def test_names_and_weights_belong_together():
    assert wanted("", None) == wanted(None, 1.5) == []
    assert wanted("a", None) == [("a", 1.0)]
    assert wanted("a, b", "0.5") == [("a", 0.5), ("b", 0.5)]
    assert wanted(["a", "b"], [2, 0]) == [("a", 2.0), ("b", 0.0)]
    for names, weights in [("a,b,c,d", None), ("a,a", None), ("a", "1,2"), ("a", 2.1), ("a", -0.1), ("a", "much"),
                           ("a", "nan"), ("../a", 1)]:
        with pytest.raises(InvalidParameter):
            wanted(names, weights)


@pytest.mark.parametrize("entry", [
    {"dtype": "F16", "shape": [1 << 40, "a"], "data_offsets": [0, 0]},  # 1 TiB, were it computed
    {"dtype": "F16", "shape": [1 << 40, []], "data_offsets": [0, 0]},
    {"dtype": "F16", "shape": [1] * 17, "data_offsets": [0, 2]},
    {"dtype": "F16", "shape": [-1, -1], "data_offsets": [0, 2]},
    {"dtype": "F16", "shape": [1], "data_offsets": [0.0, 2.0]},
])
def test_a_header_s_numbers_are_looked_at_before_they_are_computed_with(tmp_path, entry):
    text = json.dumps({"x.lora_down.weight": entry}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(2))
    with pytest.raises(BadRequest, match="header"):
        inspect(tmp_path / "a.safetensors")


def test_a_header_is_not_read_when_it_is_far_longer_than_a_lora_s(tmp_path):
    file = write(tmp_path / "a.safetensors", KOHYA)
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    padded = data[8 : 8 + length] + b" " * (LONGEST_HEADER - length)
    file.write_bytes(struct.pack("<Q", len(padded)) + padded + data[8 + length :])
    assert inspect(file).rank == 8
    padded += b" "
    file.write_bytes(struct.pack("<Q", len(padded)) + padded + data[8 + length :])
    with pytest.raises(BadRequest):
        inspect(file)


def test_a_file_of_more_tensors_or_notes_than_any_lora_has_is_refused(tmp_path):
    layers = MOST_ENTRIES - 2  # the notes are an entry, and have one
    shapes = {f"layer{number}.lora_down.weight": [1, 1] for number in range(layers)}
    assert inspect(write(tmp_path / "a.safetensors", shapes)).layers == layers
    with pytest.raises(BadRequest, match=f"more than {MOST_ENTRIES} tensors and notes"):
        inspect(write(tmp_path / "a.safetensors", {**shapes, "more.lora_down.weight": [1, 1]}))
    text = json.dumps({"__metadata__": {str(number): "" for number in range(MOST_ENTRIES)}}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(BadRequest, match="tensors and notes"):
        inspect(tmp_path / "a.safetensors")


def test_a_check_lets_the_event_loop_go_after_each_millisecond(tmp_path, monkeypatch):
    now, slept = 0.0, []

    def perf_counter():
        nonlocal now
        now += 0.0001  # so long does a tensor take
        return now

    monkeypatch.setattr(turns, "time", SimpleNamespace(perf_counter=perf_counter, sleep=slept.append))
    shapes = {f"layer{number}.lora_down.weight": [1, 1] for number in range(1000)}
    loras = StoredLoras(tmp_path, 1 << 20, most=9, most_bytes=1 << 20, min_free=0)
    write(tmp_path / "a.safetensors", shapes)
    assert len(loras.list()) == 1
    assert len(slept) >= 80 and set(slept) == {0.001}

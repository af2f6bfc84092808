"""Files that claim a small picture and hold a large one: refused, and memory stays what the claim allows."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from core.errors import ImagePoolError, InvalidImage, UnsupportedImage
from core.header import read_header
from core.headers import av1
from tests.pure.image_kit import chunk, png_header, save
from workers.codecs import decode

ROOT = Path(__file__).resolve().parents[2]
LARGE = 6_000  # a side; 36 megapixels
ROOM = 64 << 20  # bytes that a refused file may cost at the most, beside itself


def picture(side: int, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (side, side), "teal" if mode == "RGB" else 90)


# --- AVIF, put together box by box ------------------------------------------------------------------------------------


def box(name: bytes, *bodies: bytes) -> bytes:
    body = b"".join(bodies)
    return struct.pack(">I4s", 8 + len(body), name) + body


def find(data: bytes, name: bytes) -> bytes:
    """The body of the first box of that name."""
    at = data.index(name)
    (size,) = struct.unpack_from(">I", data, at - 4)
    return data[at + 4 : at - 4 + size]


def stream(side: int) -> tuple[bytes, bytes]:
    """An AV1 stream of one grey square, and its `av1C`."""
    data = save(picture(side, "L"), "AVIF", speed=10)
    return find(data, b"mdat"), find(data, b"av1C")


SMALL, CONFIG = stream(64)


def avif(
    extents: Sequence[bytes] = (SMALL,), side: int = 64, more: Sequence[tuple[bytes, bytes, int]] = (),
    alpha: bool = False, doubled: bytes = b"", locate_twice: bool = False,
) -> bytes:
    """An AVIF whose primary picture lies in these extents and claims `side`; `more`: further items as (type, bytes,
    side), alpha of the first where so said. `doubled`: a box to be there twice."""
    items = [(b"av01", extents, side), *((kind, (body,), own) for kind, body, own in more)]
    properties = [box(b"av1C", CONFIG), box(b"pixi", bytes(4), b"\1\x08")]
    properties += [box(b"auxC", bytes(4), b"urn:mpeg:mpegB:cicp:systems:auxiliary:alpha\0")]
    properties += [box(b"ispe", bytes(4), struct.pack(">II", own, own)) for _, _, own in items]

    def meta(start: int) -> bytes:
        entries, at = b"", start
        for number, (_, parts, _) in enumerate(items, 1):
            entries += struct.pack(">HHH", number, 0, len(parts))
            for part in parts:
                entries += struct.pack(">II", at, len(part))
                at += len(part)
        count = len(items)
        if locate_twice:
            entries, count = entries + struct.pack(">HHHII", 1, 0, 1, start, 9), count + 1
        infes = [box(b"infe", b"\2\0\0\0", struct.pack(">HH", number, 0), kind, b"\0")
                 for number, (kind, _, _) in enumerate(items, 1)]  # fmt: skip
        links = b"".join(
            struct.pack(">HB", number, 4 if number > 1 else 3) + bytes([0x81, 2, 3 + number])
            + (b"\3" if number > 1 else b"")
            for number in range(1, len(items) + 1)
        )
        boxes = {
            b"hdlr": box(b"hdlr", bytes(8), b"pict", bytes(13)),
            b"pitm": box(b"pitm", bytes(4), b"\0\1"),
            b"iloc": box(b"iloc", bytes(4), b"\x44\0", struct.pack(">H", count), entries),
            b"iinf": box(b"iinf", bytes(4), struct.pack(">H", len(items)), *infes),
            b"iref": box(b"iref", bytes(4), box(b"auxl", struct.pack(">HHH", 2, 1, 1))) if alpha else b"",
            b"iprp": box(b"iprp", box(b"ipco", *properties),
                         box(b"ipma", bytes(4), struct.pack(">I", len(items)), links)),
        }  # fmt: skip
        return box(b"meta", bytes(4), *boxes.values(), boxes.get(doubled, b""))

    head = box(b"ftyp", b"avif", bytes(4), b"avifmif1miaf")
    start = len(head) + len(meta(0)) + 8
    return head + meta(start) + box(b"mdat", *(part for _, parts, _ in items for part in parts))


BIG, _ = stream(LARGE)
HEADER = SMALL[SMALL.index(b"\x0a") :][: 2 + SMALL[SMALL.index(b"\x0a") + 1]]  # its sequence header alone
AVIFS = {
    "a small sequence header, then a large picture": avif((HEADER + BIG,)),
    "the same in two extents": avif((HEADER, BIG)),
    "a second sequence header behind the first": avif((SMALL + BIG,)),
    "a second sequence header in a second extent": avif((SMALL, BIG)),
    "a second sequence header behind many empty units": avif((SMALL + b"\x7a\0" * 200 + BIG,)),
    "more units than are read": avif((SMALL + b"\x7a\0" * 300 + BIG,)),
    "the first header is the large one": avif((BIG,)),
    "alpha that is larger than its picture": avif(more=[(b"av01", BIG, LARGE)], alpha=True),
    "alpha that claims to be small": avif(more=[(b"av01", BIG, 64)], alpha=True),
    "alpha made of tiles": avif(more=[(b"grid", b"\0\0\0\0\x17\x70\x17\x70", 64)], alpha=True),
    "a place that is told twice": avif(locate_twice=True),
    "two tables of places": avif(doubled=b"iloc"),
    "two tables of properties": avif(doubled=b"iprp"),
    "an empty extent": avif((SMALL, b"")),
}


def test_the_files_put_together_here_are_what_decoders_take() -> None:
    for honest in (avif(), avif((SMALL[:9], SMALL[9:])), avif(more=[(b"av01", SMALL, 64)], alpha=True)):
        header = read_header(honest)
        assert (header.width, header.height) == (64, 64)
        assert decode(honest, header).image.shape == (64, 64, 3)


@pytest.mark.parametrize("name", AVIFS)
def test_an_avif_that_holds_more_than_it_claims_is_refused_by_its_header(name: str) -> None:
    with pytest.raises((InvalidImage, UnsupportedImage)):
        read_header(AVIFS[name], max_pixels=1 << 30)


def moving() -> bytes:
    """The first picture of an animation, as a still one: its stream has whole headers."""
    out = io.BytesIO()
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("teal", "navy")]
    frames[0].save(out, "AVIF", save_all=True, append_images=frames[1:], speed=10)
    return out.getvalue().replace(b"ftypavis", b"ftypavif", 1)


def test_a_stream_with_whole_headers_is_read_too() -> None:
    data = moving()
    assert read_header(data).pixels == 64 * 64
    assert decode(data, read_header(data)).image.shape == (64, 64, 3)


def test_a_frame_that_overrides_its_sequence_s_size_is_refused() -> None:
    data = moving()
    body = find(data, b"mdat")
    at = body.index(b"\x0a") + 1  # the sequence header, with its size
    sequence = body[at - 1 : at + 1 + body[at]]
    shown_key_frame, its_own_size = 0b0001_0000, 0b0000_0010
    plain, overriding = (b"\x32\x03" + bytes([bits, 0xFF, 0xFF]) for bits in
                         (shown_key_frame, shown_key_frame | its_own_size))  # fmt: skip
    av1.check(memoryview(sequence + plain), 64, 64)
    with pytest.raises(InvalidImage, match="several sizes"):
        av1.check(memoryview(sequence + overriding), 64, 64)
    with pytest.raises(UnsupportedImage, match="video"):
        av1.check(memoryview(sequence + plain * 5), 64, 64)


# --- all formats: what a refusal, or a decode, costs ------------------------------------------------------------------


def idat(side: int) -> bytes:
    return chunk(b"IDAT", zlib.compress(bytes((side * 3 + 1) * side), 9))


def bomb(name: bytes, head: bytes) -> bytes:
    return png_header(64, 64) + chunk(name, head + zlib.compress(bytes(500 << 20), 1)) + idat(64) + chunk(b"IEND", b"")


def sof(side: int) -> bytes:
    return b"\xff\xc0" + struct.pack(">HBHHB", 17, 8, side, side, 3) + bytes((1, 0x22, 0, 2, 0x11, 1, 3, 0x11, 1))


def before_scan(data: bytes, more: bytes) -> bytes:
    at = data.index(b"\xff\xda")
    return data[:at] + more + data[at:]


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"".join(name + struct.pack("<I", len(part)) + part + b"\0" * (len(part) & 1) for name, part in chunks)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def vp8x(side: int, flags: int = 0) -> tuple[bytes, bytes]:
    return b"VP8X", bytes([flags, 0, 0, 0]) + (side - 1).to_bytes(3, "little") * 2


def webp(side: int) -> tuple[bytes, bytes]:
    data = save(picture(side), "WEBP", lossless=True, method=0)
    return data[12:16], data[20 : 20 + int.from_bytes(data[16:20], "little")]


JPEG, LARGE_JPEG = save(picture(64), "JPEG"), save(picture(LARGE), "JPEG", progressive=True)
IHDR = struct.pack(">IIBBBBB", LARGE, LARGE, 8, 2, 0, 0, 0)
FILES = {
    **{f"avif, {name}": data for name, data in AVIFS.items()},
    "png, a second header": png_header(64, 64) + chunk(b"IHDR", IHDR) + idat(64) + chunk(b"IEND", b""),
    "png, a second header and its pixels":
        png_header(64, 64) + chunk(b"IHDR", IHDR) + idat(LARGE) + chunk(b"IEND", b""),
    "png, pixels of a larger picture": png_header(64, 64) + idat(LARGE) + chunk(b"IEND", b""),
    "png, a second file behind": save(picture(64)) + save(picture(LARGE)),
    "png, a bomb as profile": bomb(b"iCCP", b"a\0\0"),
    "png, a bomb as text": bomb(b"zTXt", b"a\0\0"),
    "png, a bomb as other text": bomb(b"iTXt", b"a\0\1\0\0\0"),
    "jpeg, a second frame before the scan": before_scan(JPEG, sof(LARGE)),
    "jpeg, a large frame first": before_scan(JPEG, b"").replace(b"\xff\xc0", sof(LARGE) + b"\xff\xc0", 1),
    "jpeg, a second frame behind the scan": JPEG[:-2] + LARGE_JPEG[2:],
    "jpeg, lines that are told later": JPEG.replace(b"\xff\xc0\0\x11\x08\0\x40", b"\xff\xc0\0\x11\x08\0\0", 1)[:-2]
    + b"\xff\xdc\0\4" + struct.pack(">H", LARGE) + b"\xff\xd9",
    "jpeg, more lines than it has": JPEG[:-2] + b"\xff\xdc\0\4" + struct.pack(">H", LARGE) + b"\xff\xd9",
    "jpeg, two of them": JPEG + LARGE_JPEG,
    "webp, a canvas smaller than its picture": riff(vp8x(64), webp(LARGE)),
    "webp, a second picture": riff(vp8x(64), webp(64), webp(LARGE)),
    "webp, a second canvas": riff(vp8x(64), vp8x(LARGE), webp(64)),
    "webp, transparency of a larger picture":
        riff(vp8x(64, 0x10), (b"ALPH", b"\1" + webp(LARGE)[1][5:]), webp(64)),
    "webp, frames without the flag": riff(vp8x(64), (b"ANIM", bytes(6)), (b"ANMF", bytes(16) + riff(webp(LARGE))[12:])),
    "webp, plain, and another behind": riff(webp(64), webp(LARGE)),
    "webp, a profile": riff(vp8x(64, 0x20), (b"ICCP", bytes(30 << 20)), webp(64)),
}  # fmt: skip

LOOK = """
import json, re, sys
from pathlib import Path
from core.errors import ImagePoolError
from core.header import read_header
from workers import codecs

def peak():  # of this program's memory alone; getrusage tells its parent's, too
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10

for warm in sorted(Path(sys.argv[1]).glob("warm*")):
    data = warm.read_bytes()
    codecs.decode(data, read_header(data))
told = {}
for file in sorted(Path(sys.argv[1]).glob("hostile*")):
    data = file.read_bytes()
    before = peak()
    try:
        header = read_header(data)
        assert header.pixels <= 64 * 64, header
        shape = codecs.decode(data, header, keep_metadata=True).image.shape
        assert shape == (64, 64, 3), shape
        what = "decoded"
    except ImagePoolError as fault:
        what = fault.code
    told[file.name] = what, peak() - before
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, int]]:
    """What a fresh process made of each file, and by how much its peak memory has grown, in bytes."""
    folder = tmp_path_factory.mktemp("hostile")
    for kind in ("PNG", "JPEG", "WEBP", "AVIF"):
        (folder / f"warm.{kind}").write_bytes(save(picture(64), kind))
    names = {f"hostile{number:03}": name for number, name in enumerate(FILES)}
    for file, name in names.items():
        (folder / file).write_bytes(FILES[name])
    done = subprocess.run([sys.executable, "-c", LOOK, str(folder)], cwd=ROOT, capture_output=True, check=True)
    return {names[file]: tuple(what) for file, what in json.loads(done.stdout).items()}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_holds_more_than_it_claims_costs_no_more_than_it_claims(
    told: dict[str, tuple[str, int]], name: str
) -> None:
    what, grown = told[name]
    assert grown < ROOM, f"{what}, {grown >> 20} MiB"
    if name.startswith("avif"):
        assert what in ("invalid_image", "unsupported_image")


def test_mutated_streams_of_avifs_raise_nothing_else() -> None:
    chance = np.random.default_rng(5)
    for honest in (avif((SMALL[:9], SMALL[9:])), moving()):
        for _ in range(2_000):
            data = bytearray(honest)
            for at in chance.integers(0, len(data), 3):
                data[at] = chance.integers(0, 256)
            try:
                read_header(bytes(data))
            except ImagePoolError as refusal:
                assert refusal.message



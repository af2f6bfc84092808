"""No input keeps the event loop for more than 20 ms: what a stranger might send, to every route that reads it."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path

import pytest
import pytest_asyncio

from tests.pure.dialect_kit import png
from tests.pure.engine_kit import TEST_MODELS
from tests.pure.loop_watch import LIMIT, Watch, ask, post, server, watch

MODELS = ("paint", "edit", "upscale", "enhance", "resize", "style_comic", "background_remove", "inpaint", "mask_tools",
          "tensor_image")  # fmt: skip
IMAGE = png()
TEXT = base64.b64encode(IMAGE).decode()
LARGE = IMAGE + bytes(range(256)) * (24 << 12)  # 24 MiB; what follows an image is nobody's
SIZE = 700_000  # bytes of most inputs


pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.alone]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def port(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[int]:
    given = {"models_folder": TEST_MODELS, "models": MODELS, "max_body": 128 << 20, "arena_bytes": 1 << 30}
    async with server(tmp_path_factory.mktemp("server"), **given) as made:
        for warm in range(2):
            for path in JSON_ROUTES:
                await ask(made, *post(path, b'{"prompt": "warm", "text": "warm", "model": "edit"}'))
            for path in FORM_ROUTES:
                await ask(made, *post(path, form(part("a", b"%d" % warm)), FORM))
        yield made


async def quick(send: Callable[[], Awaitable[bytes]]) -> tuple[Watch, bytes]:
    """What it cost; again where it was slow, for a machine has moods."""
    for _ in range(4):
        with watch() as found:
            answer = await send()
        if found.longest <= LIMIT:
            break
    return found, answer


async def check(port: int, requests: Mapping[str, tuple[bytes, bytes]]) -> None:
    """All of them are answered (never with a 5xx but 501 to 507), and none is slow."""
    slow = []
    for name, (head, body) in requests.items():
        found, answer = await quick(lambda head=head, body=body: ask(port, head, body))  # type: ignore[misc]
        if found.longest > LIMIT:
            slow.append(f"{name}: {found.longest * 1000:.0f} ms in {found.what}")
        assert b" 500 " not in answer.partition(b"\r\n")[0], f"{name}: {answer.decode('latin-1')}"
    assert not slow, "\n".join(slow)


# --- JSON -------------------------------------------------------------------------------------------------------------

JSON_ROUTES = (
    "/jobs", "/v1/images/generations", "/v1/images/edits", "/api/v1/image/generate", "/api/v1/image/img2img",
    "/api/v1/image/batch-generate", "/api/v1/inpaint", "/api/v1/run_plugin_gen_image", "/api/v1/adjust_mask",
    "/api/v1/model", "/api/v1/inpaint/preprocessed",
)  # fmt: skip


def keys(size: int, end: str = "") -> bytes:
    """An object of as many bytes, whose last key is doubled."""
    names = [f'"k{number}":0' for number in range(size // 11)]
    return ("{" + ",".join([*names, names[-1]]) + "}" + end).encode()


def within(name: str, text: bytes) -> bytes:
    """Such a value in an object that asks for something."""
    return b'{"model":"edit","prompt":"x","text":"x","%b":%b}' % (name.encode(), text)


JSON: Mapping[str, bytes] = {
    "doubled keys, 8 KB": keys(8_000),
    "doubled keys, 55 KB": keys(55_000),
    "doubled keys, 220 KB": keys(220_000),
    "doubled keys, 660 KB": keys(660_000),
    "zeros": b"[" + b"0," * (SIZE // 2) + b"0]",
    "as many zeros as are taken": b"[" + b"0," * 9_900 + b"0]",
    "objects": b"[" + b"{}," * (SIZE // 3) + b"{}]",
    "as many objects as are taken": b"[" + b"{}," * 4_900 + b"{}]",
    "empty texts": b"[" + b'"",' * (SIZE // 3) + b'""]',
    "deep": b"[" * SIZE,
    "deep objects": b'{"a":' * (SIZE // 5),
    "a number": b"[" + b"9" * SIZE + b"]",
    "a fraction": b"[0." + b"9" * SIZE + b"]",
    "exponents": b"[" + b"1e-9," * 9_000 + b"1]",
    "slashes": b'["' + b"\\/" * (SIZE // 2) + b'"]',
    "escapes": b'["' + b"\\u0041" * (SIZE // 6) + b'"]',
    "surrogates": b'["' + b"\\ud800" * (SIZE // 6) + b'"]',
    "quotes": b'["' + b'\\"' * (SIZE // 2) + b'"]',
    "backslashes": b'["' + b"\\\\" * (SIZE // 2),
    "only quotes": b'"' * SIZE,
    "long texts": b"[" + (b'"' + b"\\n" * 300 + b'",') * 1_500 + b"0]",
    "white space": b" " * SIZE,
    "no JSON": bytes(range(256)) * (SIZE >> 8),
    "a long prompt": within("negative_prompt", b'"' + "雪".encode() * 90_000 + b'"'),
    "a prompt of escapes": within("negative_prompt", b'"' + b"\\u96ea" * 50_000 + b'"'),
    "an image of slashes": within("image", b'"' + b"\\/" * (SIZE // 2) + b'"'),
    "an image of escapes": within("image_url", b'"data:image/png;base64,' + b"\\u0041" * (SIZE // 6) + b'"'),
    "an image that is none": within("image", b'"' + "雪".encode() * (SIZE // 3) + b'"'),
    "an image of line ends": within("image", b'"' + (b"A" * 9 + b"\\n") * (SIZE // 11) + b'"'),
    "wrong texts": within("texts", b"[" + b"0," * 9_000 + b"0]"),
    "wrong clicks": within("name", b'"RemoveBG","image":"x","clicks":[' + b'["a"],' * 4_000 + b"[1]]"),
    "many commas in lora_name": within("lora_name", b'"' + b"," * 60_000 + b'"'),
    "many LoRAs": within("params", b'{"lora_name":"' + b"a," * 100_000 + b'"}'),
    "params as text": within("params", json.dumps(keys(60_000).decode()).encode()),
}  # fmt: skip


@pytest.mark.parametrize("name", JSON)
async def test_no_json_keeps_the_loop(port: int, name: str) -> None:
    await check(port, {path: post(path, JSON[name]) for path in JSON_ROUTES})


@pytest.mark.parametrize(("path", "body"), [
    ("/jobs", '{"model": "edit", "prompt": "snow", "image": "%"}'),
    ("/api/v1/inpaint", '{"image": "%", "mask": "%"}'),
    ("/v1/images/edits", '{"prompt": "snow", "model": "edit", "images": [{"image_url": "data:image/png;base64,%"}]}'),
    ("/api/v1/image/img2img", '{"text": "snow", "image_url": "%"}'),
    ("/api/v1/run_plugin_gen_image", '{"name": "RealESRGAN", "image": "%"}'),
])
async def test_a_large_image_as_base64_is_taken_in_pieces(port: int, path: str, body: str) -> None:
    sent = body.replace("%", base64.b64encode(LARGE).decode(), 1).replace("%", TEXT).encode()
    found, answer = await quick(lambda: ask(port, *post(path, sent)))
    assert answer.split(b" ")[1] in (b"200", b"202"), answer.decode("latin-1")
    assert found.longest <= LIMIT, f"{found.longest * 1000:.0f} ms in {found.what}"


# --- forms ------------------------------------------------------------------------------------------------------------

FORM = "multipart/form-data; boundary=B"
FORM_ROUTES = (
    "/jobs", "/run/edit", "/edit", "/api/v1/images/upscale", "/api/v1/images/enhance", "/api/v1/images/style/comic",
    "/v1/images/edits", "/api/v1/gen-info", "/api/v1/save_image", "/api/v1/lora/upload",
)  # fmt: skip


def part(name: str, data: bytes, *headers: str, file: bool = False) -> bytes:
    more = '; filename="a.png"' if file else ""
    head = "\r\n".join([f'Content-Disposition: form-data; name="{name}"{more}', *headers]).encode("latin-1")
    return b"--B\r\n" + head + b"\r\n\r\n" + data + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--B--\r\n"


PROMPT = part("prompt", b"snow")
FILE = part("image", IMAGE, file=True) + part("file", IMAGE, file=True)
KNOWN = "not too very snow by 20%, 雪 一点 亮 不要太 "
FORMS: Mapping[str, tuple[str, bytes]] = {
    f"charset {name}": (f"{FORM}; charset={name}", form(FILE, part("prompt", b"a-" * 100_000), part("prompt", b"x")))
    for name in ("punycode", "utf-7", "idna", "unicode_escape", "utf-16", "zlib", "hz", "nothing")
} | {
    "nearly boundaries": (FORM, form(part("image", b"\r\n--Bx" * (SIZE // 6), file=True))),
    "beginnings of boundaries": (FORM, form(part("image", b"\r\n-" * (SIZE // 3), file=True))),
    "boundaries with blanks": (FORM, form(part("image", b"\r\n--B " * (SIZE // 6), file=True))),
    "line ends": (FORM, b"\r\n" * (SIZE // 2)),
    "carriage returns in a file": (FORM, form(part("image", b"\r" * SIZE, file=True))),
    "blanks after a boundary": (FORM, b"--B" + b" " * SIZE),
    "parts": (FORM, form(part("a", b"") * 10_000)),
    "files": (FORM, form(part("a", b"", file=True) * 10_000)),
    "part headers": (FORM, form(part("a", b"", *["X: 1"] * 100_000))),
    "a long part header": (FORM, form(part("a", b"", "X: " + "a" * 1_000_000))),
    "the name of a part header": (FORM, form(part("a", b"", "X" * 1_000_000 + ": a"))),
    "semicolons in a name": (FORM, form(part('a"' + ";" * 4000 + '"', b"") * 60)),
    "a long field": (FORM, form(FILE, part("params", b"{" * 1_000_000))),
    "params of many keys": (FORM, form(FILE, part("model", b"edit"), part("params", keys(64_000)))),
    "params of zeros": (FORM, form(FILE, part("params", b"[" + b"0," * 120_000 + b"0]"))),
    "params of escapes": (FORM, form(FILE, part("params", b'["' + b"\\u0041" * 43_000 + b'"]'))),
    "a prompt of known words": (FORM, form(FILE, part("model", b"edit"), part("prompt", (KNOWN * 50).encode()))),
    "a prompt of letters": (FORM, form(FILE, part("model", b"edit"), part("prompt", "不".encode() * 2_000))),
    "a prompt of digits": (FORM, form(FILE, part("model", b"edit"), part("prompt", b"snow " + b"9" * 2_000 + b"%"))),
    "a prompt beyond all": (FORM, form(FILE, part("model", b"edit"), part("prompt", KNOWN.encode() * 5_000))),
    "a prompt of ligatures": (FORM, form(FILE, part("model", b"edit"), part("prompt", "ﷺ".encode() * 2_000))),
    "two prompts": (FORM, form(FILE, *[part(name, (KNOWN * 50).encode()) for name in ("prompt", "negative_prompt")])),
    "no text at all": (FORM, form(FILE, part("prompt", b"\xff" * 250_000))),
    "pairs": ("application/x-www-form-urlencoded", b"a=b&" * (SIZE // 4)),
    "escaped pairs": ("application/x-www-form-urlencoded", b"a=" + b"%41" * (SIZE // 3)),
    "a long content type": ("multipart/form-data; boundary=B" + ';"' * 7_000, form(FILE)),
    "quotes in a content type": ('multipart/form-data; boundary=B; a="' + ";" * 14_000 + '"', form(FILE)),
    "a long boundary": ("multipart/form-data; boundary=" + "-" * 250, b"--" + b"-" * SIZE),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
async def test_no_form_keeps_the_loop(port: int, name: str) -> None:
    kind, body = FORMS[name]
    await check(port, {path: post(path, body, kind) for path in FORM_ROUTES})


@pytest.mark.parametrize(("path", "field"), [
    ("/jobs?model=edit&prompt=snow", "image"), ("/run/edit?prompt=snow", "image"), ("/api/v1/images/upscale", "file"),
    ("/v1/images/edits?", "image"), ("/api/v1/save_image", "file"),
])
async def test_a_large_file_of_a_form_is_taken_in_pieces(port: int, path: str, field: str) -> None:
    body = form(part(field, LARGE, file=True), PROMPT if path.startswith("/v1/") else b"")
    found, answer = await quick(lambda: ask(port, *post(path, body, FORM)))
    assert answer.split(b" ")[1] in (b"200", b"202"), answer.decode("latin-1")
    assert found.longest <= LIMIT, f"{found.longest * 1000:.0f} ms in {found.what}"


# --- images, heads ----------------------------------------------------------------------------------------------------


def chunk(name: bytes, data: bytes = b"") -> bytes:
    return len(data).to_bytes(4, "big") + name + data + bytes(4)


IMAGES: Mapping[str, bytes] = {
    "as many chunks of a PNG as are taken": IMAGE[:33] + chunk(b"eXIf") * 9_900 + IMAGE[33:],
    "chunks of a PNG": IMAGE[:33] + chunk(b"eXIf") * 200_000,
    "segments of a JPEG": b"\xff\xd8" + b"\xff\xe1\0\x02" * 500_000,
    "filling of a JPEG": b"\xff\xd8" + b"\xff" * 2_000_000,
    "chunks of a WebP": b"RIFF" + (2_000_000).to_bytes(4, "little") + b"WEBPVP8X" + (10).to_bytes(4, "little")
    + bytes(10) + (b"EXIF" + bytes(4)) * 200_000,
    "boxes of an AVIF": b"\0\0\0\x14ftypavif\0\0\0\0avif" + b"\0\0\0\x08free" * 200_000,
    "bytes of nothing": bytes(2_000_000),
}  # fmt: skip


@pytest.mark.parametrize("name", IMAGES)
async def test_no_image_keeps_the_loop(port: int, name: str) -> None:
    data = IMAGES[name]
    routes = ("/jobs?model=edit&prompt=snow", "/run/edit?prompt=snow")
    requests = {path: post(path, data, "image/png") for path in routes}
    many = form(*[part("image", data[:119_000], file=True)] * 16, PROMPT)
    await check(port, requests | {"many": post("/v1/images/edits", many, FORM)})


HEADS: Mapping[str, str] = {
    "Cookie": "a=b;" * 7_000, "Prefer": "a=b," * 7_000, "Accept": "image/png;q=1," * 2_000,
    "If-None-Match": '"a",' * 7_000, "Authorization": "Bearer " + "a" * 28_000, "X-Request-ID": "a" * 28_000,
    "Idempotency-Key": "a" * 28_000, "Last-Event-ID": "9" * 28_000, "Range": "bytes=" + "0-1," * 6_000,
    "X-Forwarded-For": "1.1.1.1," * 3_500, "Content-Encoding": "gzip," * 5_000, "Origin": "http://" + "a" * 28_000,
}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
async def test_no_header_keeps_the_loop(port: int, name: str) -> None:
    routes = ("/jobs", "/run/edit?prompt=snow", "/api/v1/inpaint", "/socket.io/?EIO=4&transport=polling")
    requests = {path: post(path, b"{}", "application/json", f"{name}: {HEADS[name]}") for path in routes}
    lines = f"GET /jobs HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{name}: {HEADS[name]}\r\n\r\n"
    await check(port, requests | {"GET": (lines.encode(), b"")})


@pytest.mark.parametrize("query", [
    "a=b&" * 2_000, "&" * 8_000, "prompt=" + "%41" * 2_600, "prompt=" + "%E9%9B%AA" * 900, "%" * 8_000,
    "a" * 8_000 + "=1", "limit=" + "9" * 8_000, "state=" + "a" * 8_000,
])  # fmt: skip
async def test_no_query_keeps_the_loop(port: int, query: str) -> None:
    routes = ("/jobs", "/run/edit", "/api/v1/images/enhance", "/edit", "/socket.io/")
    requests = {path: post(f"{path}?{query}", IMAGE, "image/png") for path in routes}
    head = f"GET /jobs?{query} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    await check(port, requests | {"GET": (head.encode(), b"")})


@pytest_asyncio.fixture(loop_scope="module")
async def large(tmp_path: Path) -> AsyncIterator[int]:
    """A server whose results are large."""
    given = {"models_folder": TEST_MODELS, "models": MODELS, "arena_bytes": 1 << 30}
    async with server(tmp_path, lambda item, data: LARGE, **given) as made:
        yield made


async def test_a_large_answer_leaves_in_pieces(large: int) -> None:
    """As base64 in JSON and as text, as bytes, from memory and from a file."""
    wide = png(4000, 3000)  # there is room for as much as its pixels may need
    text = base64.b64encode(wide).decode()
    shot, edit = f'{{"image": "{text}", "mask": "{text}"}}'.encode(), form(PROMPT, part("image", wide, file=True))
    requests = {
        "/v1/images/edits": (*post("/v1/images/edits", edit, FORM), b'"b64_json":"iVBOR'),
        "text": (*post("/api/v1/inpaint", shot, "application/json", "Accept: text/plain"), b"iVBOR"),
        "/api/v1/inpaint": (*post("/api/v1/inpaint", shot), b"PNG"),
        "/run": (*post("/run/edit?prompt=snow", wide, "image/png"), b"PNG"),
    }
    for name, (head, body, begin) in requests.items():
        found, answer = await quick(lambda head=head, body=body: ask(large, head, body))  # type: ignore[misc]
        assert answer.split(b" ")[1] == b"200" and begin in answer, answer.decode("latin-1")
        assert found.longest <= LIMIT, f"{name}: {found.longest * 1000:.0f} ms in {found.what}"

"""Bad input: a typed 4xx with a sentence, nothing stored, no worker touched, no room kept."""

from __future__ import annotations

import base64
import io
import re
import struct
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import pytest_asyncio
from PIL import Image

from tests.pure.api_kit import IMAGE, TEXT, ended, nothing_happens, problem, submit, world
from tests.pure.dialect_kit import Server, png

HEADER = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
WAIT = {"prefer": "wait=30"}

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("world")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(folder: Path) -> AsyncIterator[Server]:
    async with world(folder, max_body=1 << 20, max_pixels=1_000_000) as server:
        yield server


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def encode(image: Image.Image, kind: str, **more: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **more)
    return out.getvalue()


def animation(kind: str) -> bytes:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    return encode(frames[0], kind, save_all=True, append_images=frames[1:])


JPEG = encode(Image.new("RGB", (64, 48)), "JPEG")
IMAGES = {
    "a header that claims 60000x60000": (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", HEADER) + bytes(1000), (400, 413)),
    "one colour, too many pixels": (encode(Image.new("1", (2000, 1000)), "PNG"), (413,)),
    "GIF cut off": (animation("GIF")[:20], (400,)),
    "TIFF cut off": (animation("TIFF")[:8], (400,)),
    "animated AVIF": (animation("AVIF"), (415,)),
    "JPEG cut in its header": (JPEG[: len(JPEG) // 16], (400,)),
    "PNG cut off": (IMAGE[: len(IMAGE) // 2], (400,)),
    "PNG without pixels": (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", HEADER[:4] + HEADER[:4]), (400,)),
    "PNG and HTML": (b"<html>" + IMAGE, (400, 415)),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', (415,)),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n", (415,)),
    "BMP cut off": (encode(Image.new("RGB", (8, 8)), "BMP")[:-9], (400,)),
    "HEIC": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", (415,)),
    "JPEG XL": (b"\xff\x0a" + bytes(20), (415,)),
    "one byte": (b"\x89", (400,)),
    "nothing": (b"", (400,)),
    "noise": (bytes(range(256)), (400,)),
}


@pytest.mark.parametrize("name", IMAGES)
async def test_a_bad_image_is_refused(server: Server, name: str) -> None:
    async with nothing_happens(server):
        data, statuses = IMAGES[name]
        files = {"image": ("x.png", data, "image/png")}
        answer = await server.client.post("/jobs", data={"model": "echo"}, files=files)
        told = problem(answer)
        assert answer.status_code in statuses, told
        assert told["code"] in ("invalid_image", "unsupported_image", "too_large")


async def test_a_wrong_content_type_and_extension_do_not_matter(server: Server) -> None:
    files = {"image": ("../../etc/x.gif\r\nX-Evil: 1", JPEG, "text/html")}
    answer = await server.client.post("/jobs", data={"model": "echo"}, files=files)
    assert answer.status_code == 202
    job = await ended(server, answer.json())
    result = await server.client.get(job["links"]["result"])
    assert "x-evil" not in result.headers
    assert "etc" not in result.headers["content-disposition"]


@pytest.mark.parametrize("size", [(1, 1), (1, 8192), (8191, 7), (3000, 1)])
async def test_an_extreme_but_legal_size_is_served(server: Server, size: tuple[int, int]) -> None:
    files = {"image": png(*size)}
    answer = await server.client.post("/jobs", data={"model": "echo"}, files=files, headers=WAIT)
    assert (answer.status_code, answer.json()["state"]) == (200, "succeeded")


@pytest.mark.parametrize("orientation", range(1, 9))
async def test_image_and_mask_must_match_upright(server: Server, orientation: int) -> None:
    async with nothing_happens(server):
        exif = Image.Exif()
        exif[0x0112] = orientation
        image = encode(Image.new("RGB", (40, 30)), "JPEG", exif=exif)
        upright, lying = ((30, 40), (40, 30)) if orientation >= 5 else ((40, 30), (30, 40))
        form = {"model": "fill", "seed": "1"}
        wrong = await server.client.post("/jobs", data=form, files={"image": image, "mask": png(*lying)})
        assert (wrong.status_code, problem(wrong)["errors"][0]["parameter"]) == (422, "mask")
    right = await server.client.post("/jobs", data=form, files={"image": image, "mask": png(*upright)}, headers=WAIT)
    assert right.status_code == 200


FILE = {"image": IMAGE}
PARAMETERS = {
    "no model": ({}, FILE, 422),
    "unknown model": ({"model": "ecko"}, FILE, 404),
    "a model that is a path": ({"model": "../../etc/passwd"}, FILE, 404),
    "a model with NUL": ({"model": "echo\0"}, FILE, 404),
    "no image": ({"model": "echo"}, {"other": IMAGE}, 422),
    "an image without a filename": ({"model": "echo", "image": "text"}, FILE, 422),
    "a mask nobody asked for": ({"model": "echo"}, {**FILE, "mask": IMAGE}, 422),
    "no mask": ({"model": "fill", "seed": "1"}, FILE, 422),
    "no required parameter": ({"model": "fill"}, {**FILE, "mask": IMAGE}, 422),
    "unknown field": ({"model": "echo", "stesp": "3"}, FILE, 422),
    "steps 0": ({"model": "echo", "steps": "0"}, FILE, 422),
    "steps 10^6": ({"model": "echo", "steps": "1000000"}, FILE, 422),
    "steps in words": ({"model": "echo", "steps": "1e9x1"}, FILE, 422),
    "seed 2^70": ({"model": "fill", "seed": str(2**70) + ".5"}, {**FILE, "mask": IMAGE}, 422),
    "a choice that is none": ({"model": "echo", "mode": "odd"}, FILE, 422),
    "NUL in a prompt": ({"model": "echo", "prompt": "a\0b"}, FILE, 422),
    "a long prompt": ({"model": "echo", "prompt": "a" * 200_000}, FILE, 422),
    "an endless prompt": ({"model": "echo", "prompt": "a" * 500_000}, FILE, 400),
    "params that are no JSON": ({"model": "echo", "params": "{"}, FILE, 400),
    "params doubled": ({"model": "echo", "params": '{"steps": 1, "steps": 2}'}, FILE, 400),
}


@pytest.mark.parametrize("name", PARAMETERS)
async def test_a_bad_form_is_refused(server: Server, name: str) -> None:
    async with nothing_happens(server):
        data, files, status = PARAMETERS[name]
        answer = await server.client.post("/jobs", data=data, files=files)
        assert answer.status_code == status, answer.text
        problem(answer)


@pytest.mark.parametrize("count", [2, 16, 17, 18])
async def test_more_images_than_the_model_takes_are_refused(server: Server, count: int) -> None:
    async with nothing_happens(server):
        answer = await server.client.post("/jobs", data={"model": "echo"}, files=[("image[]", IMAGE)] * count)
        assert (answer.status_code, problem(answer)["errors"][0]["parameter"]) == (422, "image")
        answer = await server.client.post("/jobs", json={"model": "echo", "image[]": [TEXT] * count})
        assert answer.status_code == 422


def body(**fields: Any) -> bytes:
    return orjson.dumps({"model": "echo", "image": TEXT, **fields})


JSON = {
    "nothing": (b"", 400),
    "a list": (b"[]", 400),
    "deep": (b'{"model":' + b"[" * 5_000, 400),
    "deeper than anybody looks": (b'{"model":' + b"[" * 100_000, 413),
    "deep but whole": (body(params={"x": 1}).replace(b'{"x":1}', b'{"x":' + b"[" * 60 + b"]" * 60 + b"}"), 400),
    "NaN": (body(strength=-0.5).replace(b"-0.5", b"NaN"), 400),
    "Infinity": (body(strength=-0.5).replace(b"-0.5", b"Infinity"), 400),
    "1e400": (body(strength=-0.5).replace(b"-0.5", b"1e400"), 400),
    "doubled keys": (body()[:-1] + b',"model":"echo"}', 400),
    "a huge whole number": (body(steps=1).replace(b'"steps":1', b'"steps":' + b"1" * 5000), 400),
    "half a surrogate pair": (body(prompt="X").replace(b'"X"', b'"\\ud800"'), 400),
    "NUL in a prompt": (body(prompt="a\0b"), 422),
    "a long prompt": (body(prompt="a" * 500_000), 422),
    "not UTF-8": (body(prompt="X").replace(b'"X"', b'"\xff"'), 400),
    "an image that is a number": (body(image=5), 422),
    "an image that is an object": (body(image={"a": 1}), 422),
    "no image": (body(image=None), 422),
    "an image that is no base64": (body(image="!!"), 400),
    "a data URL of another type": (body(image="data:text/html;base64," + TEXT), 415),
    "a model that is a number": (body(model=5), 422),
    "params that are a list": (body(params=[1]), 422),
    "a field with surrogates in its name": (body()[:-1] + b',"\\udead":1}', 400),
    "a parameter that is an object": (body(steps={"a": 1}), 422),
    "unknown": (body(imge="x"), 422),
}


@pytest.mark.parametrize("name", JSON)
async def test_bad_json_is_refused(server: Server, name: str) -> None:
    async with nothing_happens(server):
        data, status = JSON[name]
        answer = await server.client.post("/jobs", content=data, headers={"content-type": "application/json"})
        assert answer.status_code == status, answer.text
        problem(answer)


@pytest.mark.parametrize(
    "text",
    [
        TEXT.rstrip("="),
        base64.urlsafe_b64encode(IMAGE).decode(),
        "\n".join(TEXT[i : i + 60] for i in range(0, len(TEXT), 60)),
    ],
)
async def test_base64_in_another_taste_is_taken(server: Server, text: str) -> None:
    answer = await server.client.post("/jobs", json={"model": "echo", "image": text}, headers=WAIT)
    assert answer.json()["state"] == "succeeded"


def part(name: str, data: bytes, *headers: str, filename: str | None = None) -> bytes:
    disposition = f'Content-Disposition: form-data; name="{name}"' + (f'; filename="{filename}"' if filename else "")
    return b"--B\r\n" + "\r\n".join([disposition, *headers]).encode() + b"\r\n\r\n" + data + b"\r\n"


GOOD = part("model", b"echo") + part("image", IMAGE, filename="a.png")
MULTIPART = {
    "no boundary": ("multipart/form-data", GOOD + b"--B--\r\n"),
    "another boundary": ("multipart/form-data; boundary=C", GOOD + b"--B--\r\n"),
    "a part of a million bytes without a filename": (None, GOOD + part("prompt", b"a" * 1_040_000)),
    "a hundred thousand parts": (None, part("a", b"") * 12_000),
    "too many files": (None, part("image", b"a", filename="a") * 100),
    "a giant part header": (None, part("model", b"echo", "X-Giant: " + "a" * 100_000)),
    "many part headers": (None, part("model", b"echo", *["X-Many: 1"] * 1000)),
    "a part without a name": (None, b"--B\r\nContent-Disposition: form-data\r\n\r\nx\r\n--B--\r\n"),
    "a part without headers": (None, b"--B\r\n\r\nx\r\n--B--\r\n"),
    "a charset that is none": ("multipart/form-data; boundary=B; charset=undefined", GOOD + b"--B--\r\n"),
    "garbage": (None, b"\x00\xff" * 100),
    "nothing": (None, b""),
    "the model twice": (None, part("model", b"echo") + GOOD + b"--B--\r\n"),
}


@pytest.mark.parametrize("name", MULTIPART)
async def test_bad_multipart_is_refused(server: Server, name: str) -> None:
    async with nothing_happens(server):
        kind, data = MULTIPART[name]
        headers = {"content-type": kind or "multipart/form-data; boundary=B"}
        answer = await server.client.post("/jobs", content=data, headers=headers)
        assert answer.status_code in (400, 413, 422), answer.text
        problem(answer)


@pytest.mark.parametrize("charset", ["punycode", "utf-16", "latin-1", "nothing", "x" * 2000])
async def test_a_form_in_another_charset_is_refused(server: Server, charset: str) -> None:
    async with nothing_happens(server):
        headers = {"content-type": f"multipart/form-data; boundary=B; charset={charset}"}
        answer = await server.client.post("/jobs", content=GOOD + b"--B--\r\n", headers=headers)
        assert answer.status_code == 400, answer.text
        problem(answer)


@pytest.mark.parametrize("path", ["/jobs", "/edit", "/api/v1/images/style/aged", "/v1/images/edits"])
async def test_a_field_that_is_not_utf_8_is_refused(server: Server, path: str) -> None:
    async with nothing_happens(server):
        files = {"image": IMAGE, "file": IMAGE, "prompt": (None, b"warm\xff\xfe\xed\xa0\x80")}
        answer = await server.client.post(path, files=files)
        assert answer.status_code in (400, 422) and "not UTF-8" in answer.text, answer.text


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded", "application/xml", "imag/png"])
async def test_a_body_of_another_type_is_refused(server: Server, kind: str) -> None:
    async with nothing_happens(server):
        answer = await server.client.post("/jobs?model=echo", content=IMAGE, headers={"content-type": kind})
        assert (answer.status_code, problem(answer)["code"]) == (415, "unsupported_encoding")


async def test_a_body_over_the_limit_is_refused_with_and_without_its_length(server: Server) -> None:
    async with nothing_happens(server):
        async def pieces() -> AsyncIterator[bytes]:
            for _ in range(300):
                yield bytes(4096)

        for content in (bytes(1_100_000), pieces()):
            headers = {"content-type": "image/png"}
            answer = await server.client.post("/jobs?model=echo", content=content, headers=headers)
            assert (answer.status_code, problem(answer)["code"]) == (413, "too_large")
            files = {"image": bytes(1_100_000)}
            answer = await server.client.post("/jobs", data={"model": "echo"}, files=files)
            assert answer.status_code == 413


async def test_a_form_too_large_without_a_length_is_a_413_not_a_400(server: Server) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b'--B\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        for _ in range(300):
            yield bytes(4096)

    headers = {"content-type": "multipart/form-data; boundary=B"}
    answer = await server.client.post("/jobs", content=pieces(), headers=headers)
    assert (answer.status_code, problem(answer)["code"]) == (413, "too_large")


PNG_TYPE = {"content-type": "image/png"}


@pytest.mark.parametrize(
    "odd",
    [
        "%2e%2e", "%2e%2e%2fjobs.sqlite", "..%5c..%5cjobs", "%00", "a" * 10_000, "x", "urn:uuid:" + "0" * 32,
        "{6f1b9e0e-0000-4000-8000-000000000000}", "6f1b9e0e00004000800000000000000",
        "6f1b9e0e-0000-4000-8000-00000000000g", "６f1b9e0e-0000-4000-8000-000000000000",
    ],
)  # fmt: skip
async def test_what_is_no_id_is_not_found_without_a_look_at_the_store(
    server: Server, odd: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.engine, "job", None)
    for path in (f"/jobs/{odd}", f"/jobs/{odd}/result", f"/jobs/{odd}/events"):
        answer = await server.client.get(path)
        assert answer.status_code == 404
        assert problem(answer)["code"] in ("job_not_found", "not_found")


@pytest.mark.parametrize("name", ["ecko", "%2e%2e", "%2e%2e%2fecho", "a" * 500, "%00"])
async def test_an_unknown_model_is_not_found(server: Server, name: str) -> None:
    answer = await server.client.get(f"/models/{name}")
    assert answer.status_code == 404
    if name == "ecko":
        assert "did you mean 'echo'" in problem(answer)["detail"]



@pytest.mark.parametrize("key", [b"", b" ", b"a" * 256, b"\xe4", b"a\tb"])
async def test_an_idempotency_key_must_be_short_text(server: Server, key: bytes) -> None:
    headers = [(b"content-type", b"image/png"), (b"idempotency-key", key)]
    answer = await server.client.post("/jobs", params={"model": "echo"}, content=IMAGE, headers=headers)
    assert (answer.status_code, problem(answer)["code"]) == (400, "bad_request")


@pytest.mark.parametrize("query", [{"limit": 0}, {"limit": 1000}, {"limit": "x"}, {"state": "odd"}])
async def test_a_list_query_that_does_not_fit_names_the_parameter(server: Server, query: dict[str, Any]) -> None:
    answer = await server.client.get("/jobs", params=query)
    told = problem(answer)
    assert answer.status_code == 422
    assert told["errors"][0]["parameter"] == next(iter(query))


@pytest.mark.parametrize(
    ("path", "headers", "content", "status", "code"),
    [
        ("/run/ecko", PNG_TYPE, IMAGE, 404, "unknown_model"),
        ("/run/", PNG_TYPE, IMAGE, 404, "unknown_model"),
        ("/run/../echo", PNG_TYPE, IMAGE, 404, "not_found"),
        ("/run/%2e%2e%2fecho", PNG_TYPE, IMAGE, 404, "unknown_model"),
        ("/run/echo/x", PNG_TYPE, IMAGE, 404, "unknown_model"),
        ("/run/echo", {"content-type": "text/html"}, IMAGE, 415, "unsupported_encoding"),
        ("/run/echo", {"content-type": "application/json"}, b"{}", 415, "unsupported_encoding"),
        ("/run/echo", PNG_TYPE, b"", 400, "bad_request"),
        ("/run/echo", PNG_TYPE, b"a", 400, "invalid_image"),
        ("/run/echo", PNG_TYPE, b"8BPS" + bytes(50), 415, "unsupported_image"),
        ("/run/echo?steps=0", PNG_TYPE, IMAGE, 422, "invalid_parameter"),
        ("/run/echo?steps=1&steps=2", PNG_TYPE, IMAGE, 422, "invalid_parameter"),
        ("/run/echo?stesp=1", PNG_TYPE, IMAGE, 422, "invalid_parameter"),
        ("/run/echo?model=fill", PNG_TYPE, IMAGE, 422, "invalid_parameter"),
        ("/run/echo?prompt=%ff", PNG_TYPE, IMAGE, 400, "bad_request"),
        ("/run/fill?seed=1", PNG_TYPE, IMAGE, 400, "bad_request"),
    ],
)
async def test_a_wrong_request_to_run_is_refused(
    server: Server, path: str, headers: dict[str, str], content: bytes, status: int, code: str
) -> None:
    async with nothing_happens(server):
        answer = await server.client.post(path, headers=headers, content=content)
    assert (answer.status_code, problem(answer)["code"]) == (status, code), answer.text
    assert server.engine.arena.spans == 0


async def test_after_all_that_a_good_job_still_runs(server: Server) -> None:
    assert (await ended(server, await submit(server)))["state"] == "succeeded"


@pytest.mark.parametrize(("path", "field"), [
    ("/edit", "num_inference_steps"), ("/edit", "true_cfg_scale"), ("/edit", "seed"),
    ("/api/v1/images/upscale", "num_inference_steps"), ("/api/v1/images/enhance", "guidance_scale"),
    ("/v1/images/edits", "n"), ("/v1/images/edits", "guidance_scale"),
])  # fmt: skip
@pytest.mark.parametrize("number", ["1_0", "2\u00a0", "\u0662"])
async def test_a_number_of_a_form_is_a_plain_one(server: Server, path: str, field: str, number: str) -> None:
    async with nothing_happens(server):
        image = {"file" if path.startswith("/api") else "image": IMAGE}
        fields = {"prompt": (None, b"snow"), field: (None, number.encode())}
        answer = await server.client.post(path, files={**image, **fields})
        assert answer.status_code in (400, 422) and re.search(rf"\b{field}\b", answer.text), answer.text

"""With API keys, an answered address of an image serves whoever has it, for a while, and nothing else."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request

from api import links
from core import signing
from core.settings import Settings
from tests.pure.dialect_kit import KEY, OTHER_KEY, Server, keys_file, png, serve
from tests.pure.engine_kit import TEST_MODELS

ACME, ZENITH = {"x-api-key": KEY}, {"x-api-key": OTHER_KEY}
MODELS = {"models_folder": TEST_MODELS, "models": ("paint", "repaint", "resize", "enhance", "upscale")}


def with_keys(folder: Path, **settings: Any) -> Any:
    return serve(folder, keys_file=keys_file(folder, tier="pro"), work=lambda item, data: png(), **MODELS, **settings)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with with_keys(tmp_path) as made:
        yield made


async def openai_url(server: Server, headers: dict[str, str] = ACME) -> str:
    body = {"prompt": "x", "response_format": "url"}
    answer = await server.client.post("/v1/images/generations", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["data"][0]["url"])


async def imagegenx_result(server: Server) -> dict[str, Any]:
    answer = await server.client.post("/api/v1/image/generate", json={"text": "x"}, headers=ACME)
    data = answer.json()["data"]
    job = await server.engine.register.keyed("acme", data["task_id"])
    await server.engine.wait(job[0].id)
    told = (await server.client.get(data["query_url"], headers=ACME)).json()["data"]
    return {**told["result"], "temp_url": data["temp_url"]}


async def imagen_url(server: Server) -> str:
    files = {"file": ("a.png", png(), "image/png")}
    answer = await server.client.post("/api/v1/images/enhance", files=files, headers=ACME)
    job = await server.engine.wait(answer.json()["job_id"])
    return str((await server.client.get(f"/api/v1/jobs/{job.id}", headers=ACME)).json()["output_url"])


async def test_every_dialect_s_addresses_serve_without_a_key(server: Server) -> None:
    result = await imagegenx_result(server)
    for url in (await openai_url(server), await imagen_url(server), result["original_url"]):
        answer = await server.client.get(url)
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("image/"), url
        assert "acme" not in url and KEY not in url
        assert (await server.client.head(url)).status_code == 200
        bare = url.partition("?")[0]
        assert (await server.client.get(bare)).status_code == 401
        assert (await server.client.get(bare, headers=ACME)).status_code == 200
        assert (await server.client.get(bare, headers=ZENITH)).status_code == 404
        assert (await server.client.get(url, headers=ZENITH)).status_code == 404, "a key that is shown counts"


async def test_thumbnails_are_let_through(server: Server) -> None:
    """This client without a socket looks as if it had left while they are made (499)."""
    result = await imagegenx_result(server)
    for url in (result["thumb_url"], result["temp_url"]):
        assert (await server.client.get(url)).status_code in (200, 499)
        assert (await server.client.get(url.partition("?")[0])).status_code == 401
        assert (await server.client.get(f"{url[:-4]}0000")).status_code == 403


async def test_what_was_changed_is_told_in_the_dialect_s_shape(server: Server) -> None:
    url, other = await openai_url(server), await openai_url(server, ZENITH)
    mixed = f"{other.partition('?')[0]}?{url.partition('?')[2]}"
    for wrong in (f"{url[:-4]}0000", mixed, url.replace("expires=", "expires=9")):
        answer = await server.client.get(wrong)
        assert answer.status_code == 403
        told = answer.json()["error"]
        assert (told["type"], told["code"]) == ("invalid_request_error", "link_invalid")
    result = await imagegenx_result(server)
    answer = await server.client.get(f"{result['original_url'][:-4]}0000")
    assert answer.status_code == 403 and answer.json()["code"] == 403 and answer.json()["data"] is None


async def test_the_time_of_an_address_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with with_keys(tmp_path, url_lifetime="10min") as server:
        assert server.engine.signer is not None
        now = [time.time()]
        monkeypatch.setattr(server.engine.signer, "_clock", lambda: now[0])
        url, result = await openai_url(server), await imagegenx_result(server)
        now[0] += 599
        assert (await server.client.get(url)).status_code == 200
        now[0] += 3
        assert (await server.client.get(url)).status_code == 403
        now[0] += 6 * 86_400
        assert (await server.client.get(result["original_url"])).status_code == 200, "of ImageGenX: seven days"
        now[0] += 86_400
        assert (await server.client.get(result["original_url"])).status_code == 403


async def test_it_is_for_looking_at_and_for_that_path(server: Server) -> None:
    url = await openai_url(server)
    query = url.partition("?")[2]
    assert (await server.client.post(f"/v1/images/generations?{query}", json={"prompt": "x"})).status_code == 401
    for path in ("/v1/models", "/jobs", "/system/status"):
        assert (await server.client.get(f"{path}?{query}")).status_code in (401, 403)


async def test_an_address_outlives_a_restart_but_not_its_tenant_s_last_key(tmp_path: Path) -> None:
    async with with_keys(tmp_path) as server:
        url = await openai_url(server)
    async with with_keys(tmp_path) as server:
        assert (await server.client.get(url)).status_code == 200
    keys = keys_file(tmp_path)
    keys.write_text(keys.read_text().replace('tenant = "acme"', 'tenant = "acme"\nrevoked = true'))
    settings = {**MODELS, "keys_file": keys}
    async with serve(tmp_path, **settings) as server:
        assert (await server.client.get(url)).status_code == 403


async def test_a_given_secret_signs(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("ab" * 32)
    async with with_keys(tmp_path, url_secret=file) as server:
        url = await openai_url(server)
        path, _, query = url.removeprefix("http://pool").partition("?")
        mine = signing.Signer(b"\xab" * 32)
        assert mine.tenant(path, query.encode(), frozenset({"acme"})) == "acme"
        assert not (tmp_path / "outputs" / ".secret").exists()


async def test_a_signed_address_of_ours_is_an_image_to_go_on_from(server: Server) -> None:
    result = await imagegenx_result(server)
    body = {"image_url": result["original_url"], "text": "x"}
    assert (await server.client.post("/api/v1/image/img2img", json=body, headers=ACME)).status_code == 200
    assert (await server.client.post("/api/v1/image/img2img", json=body, headers=ZENITH)).status_code == 404


async def test_the_description_of_each_signed_route_names_the_refusal(server: Server) -> None:
    paths = (await server.client.get("/openapi.json")).json()["paths"]
    for path in ("/v1/images/{id}/content", "/api/v1/image/file/{day}/{name}", "/temp/{name}",
                 "/api/v1/jobs/{job_id}/result"):
        told = paths[path]["get"]["responses"]
        assert "signed address" in told["403"]["description"], path
        assert {"200", "401", "404", "409", "410"} <= told.keys(), path
        assert all(kind.startswith("image/") for kind in told["200"]["content"]), path


async def test_where_nobody_needs_a_key_addresses_are_plain(tmp_path: Path) -> None:
    async with serve(tmp_path, **MODELS, work=lambda item, data: png()) as server:
        url = await openai_url(server, {})
        assert "?" not in url and (await server.client.get(url)).status_code == 200
        assert (await server.client.get(f"{url}?signature=old&expires=1&holder=x")).status_code == 200
        assert not (tmp_path / "outputs" / ".secret").exists()


PUBLIC = "https://images.example.com/pool"


def through_proxy(url: str) -> str:
    """What arrives of a request for it behind a proxy that answers at the public address."""
    assert url.startswith(f"{PUBLIC}/"), url
    return url.removeprefix(PUBLIC)


async def test_whole_addresses_begin_with_the_public_one_and_serve_behind_its_proxy(tmp_path: Path) -> None:
    async with with_keys(tmp_path, public_url=PUBLIC) as server:
        result = await imagegenx_result(server)
        for url in (await openai_url(server), result["original_url"]):
            assert (await server.client.get(through_proxy(url))).status_code == 200
        through_proxy(result["thumb_url"])
        body = {"image_url": result["original_url"], "text": "x"}
        assert (await server.client.post("/api/v1/image/img2img", json=body, headers=ACME)).status_code == 200
        headers = ACME | {"content-type": "image/png"}
        answer = await server.client.post("/jobs?model=resize&width=8&height=8", content=png(), headers=headers)
        assert through_proxy(answer.headers["location"]) == answer.json()["links"]["self"]
        assert (await server.client.get("/openapi.json")).json()["servers"] == [{"url": PUBLIC}]


@pytest.mark.parametrize("public", ["", PUBLIC])
async def test_no_address_is_made_from_a_host_header(tmp_path: Path, public: str) -> None:
    odd = {"host": "evil.example", "x-forwarded-host": "evil.example", "forwarded": "host=evil.example;proto=https"}
    async with with_keys(tmp_path, public_url=public) as server:
        server.client.headers.update(odd)
        result = await imagegenx_result(server)
        for url in (await openai_url(server), *(result[name] for name in ("original_url", "thumb_url"))):
            assert url.startswith(f"{public or 'http://pool'}/"), url


async def test_an_address_of_ours_is_known_by_the_name_that_its_client_calls_us_by(tmp_path: Path) -> None:
    async with with_keys(tmp_path, fetch="off") as server:
        path = (await imagegenx_result(server))["original_url"].removeprefix("http://pool")
        for host, url, status in (
            ("localhost:8000", f"http://localhost:8000{path}", 200), ("localhost:8000", f"http://other{path}", 422),
        ):  # fmt: skip
            body = {"image_url": url, "text": "x"}
            headers = ACME | {"host": host}
            answer = await server.client.post("/api/v1/image/img2img", json=body, headers=headers)
            assert answer.status_code == status, answer.text


@pytest.mark.parametrize(("server", "base"), [
    (("127.0.0.1", 8000), "http://127.0.0.1:8000"), (("::1", 8000), "http://[::1]:8000"),
    (("::ffff:10.0.0.5", 80), "http://10.0.0.5:80"), (("pool", None), "http://pool"),
])  # fmt: skip
def test_without_a_public_address_they_begin_with_the_one_that_was_connected_to(
    server: tuple[str, int | None], base: str
) -> None:
    scope = {"type": "http", "server": server, "headers": [(b"host", b"evil.example")]}
    assert links.base(Request(scope), Settings()) == base

"""A thumbnail is made once, counts against the rates of its tenant when it is, and goes with its job."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from api.limits import GONE
from core.settings import Tier
from tests.pure.dialect_kit import KEY, OTHER_KEY, Server, keys_file, png, serve, until
from tests.pure.engine_kit import TEST_MODELS
from workers.messages import RunItem

ACME, ZENITH = {"x-api-key": KEY}, {"x-api-key": OTHER_KEY}


def picture(item: RunItem, _: bytes) -> bytes:
    return png(item.size[1], item.size[0])


@asynccontextmanager
async def world(folder: Path, **settings: Any) -> AsyncIterator[tuple[Server, httpx.AsyncClient]]:
    """A server, and a client of it that is there until it has its answer."""
    models = {"models_folder": TEST_MODELS, "models": ("paint", "resize"), "min_free_disk": 0}
    async with serve(folder, work=picture, **models | settings) as server:
        app: Any = server.client._transport.app  # type: ignore[attr-defined]

        async def stays(scope: Any, receive: Any, send: Any) -> None:
            await app({**scope, "extensions": {GONE: lambda _: None}}, receive, send)

        async with httpx.AsyncClient(transport=httpx.ASGITransport(stays), base_url="http://pool") as client:
            yield server, client


async def drawn(server: Server, client: httpx.AsyncClient, tenant: str = "anonymous", **more: Any) -> tuple[str, str]:
    """The job of a task that is done, and the address of its thumbnail."""
    body = {"text": "x", "params": {"resolution": "512x256"}}
    answer = await client.post("/api/v1/image/generate", json=body, **more)
    assert answer.status_code == 200, answer.text
    (job,) = await server.engine.register.keyed(tenant, answer.json()["data"]["task_id"])
    await server.engine.wait(job.id)
    return job.id, answer.json()["data"]["temp_url"]


def made(server: Server) -> int:
    return sum(item.size == (128, 256) for item in server.ran)


async def test_where_nothing_makes_thumbnails_no_address_of_one_is_told(tmp_path: Path) -> None:
    async with world(tmp_path, models=("paint",)) as (server, client):
        told = (await client.post("/api/v1/image/generate", json={"text": "x"})).json()["data"]
        (job,) = await server.engine.register.keyed("anonymous", told["task_id"])
        await server.engine.wait(job.id)
        result = (await client.get(told["query_url"])).json()["data"]["result"]
        assert "temp_url" not in told and "thumb_url" not in result
        assert (await client.get(result["original_url"])).status_code == 200


async def test_a_thumbnail_is_made_once_and_kept_beside_its_result(tmp_path: Path) -> None:
    async with world(tmp_path) as (server, client):
        job, url = await drawn(server, client)
        first = await client.get(url)
        assert first.status_code == 200 and first.headers["content-type"] == "image/webp"
        assert (await client.get(url)).content == first.content
        assert made(server) == 1
        assert {file.name.partition(".")[0] for file in (tmp_path / "outputs").glob(f"{job}*")} == {job, f"{job}_thumb"}
    async with world(tmp_path) as (server, client):
        assert (await client.get(url)).content == first.content
        assert made(server) == 0


async def test_who_asks_at_the_same_time_shares_one(tmp_path: Path) -> None:
    async with world(tmp_path) as (server, client):
        _, url = await drawn(server, client)
        server.pool.hold()
        asking = [asyncio.ensure_future(client.get(url)) for _ in range(6)]
        await until(lambda: made(server) == 1)
        asking[0].cancel()  # it was the first's wish that began it
        server.pool.release()
        answers = await asyncio.gather(*asking[1:])
        assert {answer.status_code for answer in answers} == {200} and len({a.content for a in answers}) == 1
        assert made(server) == 1


async def test_when_all_have_left_it_is_given_up_and_made_for_the_next(tmp_path: Path) -> None:
    async with world(tmp_path) as (server, client):
        _, url = await drawn(server, client)
        server.pool.hold()
        asking = [asyncio.ensure_future(client.get(url)) for _ in range(2)]
        await until(lambda: made(server) == 1)
        for one in asking:
            one.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        await until(lambda: server.engine.snapshot()["jobs"]["cancelled"] == 1)
        server.pool.release()
        assert (await client.get(url)).status_code == 200
        assert made(server) == 2


async def test_it_goes_with_its_job(tmp_path: Path) -> None:
    async with world(tmp_path, retention_age=1000.0) as (server, client):
        job, url = await drawn(server, client)
        assert (await client.get(url)).status_code == 200
        monotonic = time.time() + 2000
        for id_ in await server.engine._keeper.forget_old(monotonic):
            server.engine.register.forget(id_)
        assert not list((tmp_path / "outputs").glob(f"{job}*"))
        assert (await client.get(url)).status_code == 404


async def test_a_disk_that_is_full_keeps_none_and_shows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with world(tmp_path) as (server, client):
        job, url = await drawn(server, client)
        server.engine._keeper.files.min_free = 1 << 60
        assert (await client.get(url)).status_code == 200
        assert not list((tmp_path / "outputs").glob(f"{job}_thumb*"))


@pytest.mark.parametrize("signed", [True, False])
async def test_making_one_counts_against_its_tenant_s_rates_and_a_kept_one_is_free(
    tmp_path: Path, signed: bool
) -> None:
    headers = None if signed else ACME
    rates = {"tiers": {"small": Tier(per_day=3)}, "keys_file": keys_file(tmp_path, tier="small")}
    async with world(tmp_path, **rates) as (server, client):
        (_, one), (_, two) = [await drawn(server, client, "acme", headers=ACME) for _ in range(2)]
        if not signed:
            one, two = one.partition("?")[0], two.partition("?")[0]
            assert (await client.get(one, headers=ZENITH)).status_code == 404
        for _ in range(5):
            assert (await client.get(one, headers=headers)).status_code == 200
        refused = await client.get(two, headers=headers)
        assert refused.status_code == 429 and refused.json()["code"] == 429 and int(refused.headers["retry-after"]) > 0
        assert made(server) == 1
        assert (await client.get(one, headers=headers)).status_code == 200
        post = await client.post("/api/v1/image/generate", json={"text": "x"}, headers=ACME)
        assert post.status_code == 429

"""The whole application: health, origins, hosts, dialects, its description."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from api.app import create_app
from api.shared_page import SharedPage
from core.settings import Settings
from tests.pure.api_kit import IMAGE, problem, submit, world
from tests.pure.dialect_kit import Server
from tests.pure.key_kit import keys_file


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with world(tmp_path, cors_origins=("https://good.example",)) as server:
        yield server


async def test_it_is_alive_and_ready_and_says_so(server: Server) -> None:
    assert (await server.client.get("/health/live")).json() == {"status": "alive"}
    answer = await server.client.get("/health/ready")
    assert (answer.status_code, answer.json()["ready"]) == (200, True)
    assert [device["device"] for device in answer.json()["devices"]] == ["cpu:0", "cpu:1"]


async def test_it_is_alive_but_not_ready_while_no_worker_is(tmp_path: Path) -> None:
    async with world(tmp_path, boots=False) as server:
        assert (await server.client.get("/health/live")).status_code == 200
        answer = await server.client.get("/health/ready")
        assert (answer.status_code, answer.json()["ready"]) == (503, False)
        assert answer.json()["reason"]
        assert int(answer.headers["retry-after"]) >= 1


async def test_metrics_are_a_page_for_prometheus(server: Server) -> None:
    await submit(server)
    answer = await server.client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    assert 'route="/jobs"' in answer.text


async def test_a_stranger_gets_no_permission_from_cors(tmp_path: Path) -> None:
    async with world(tmp_path) as server:
        answer = await server.client.get("/models", headers={"origin": "https://evil.example"})
        assert not [name for name in answer.headers if name.startswith("access-control")]
        preflight = {"origin": "https://evil.example", "access-control-request-method": "POST"}
        answer = await server.client.options("/jobs", headers=preflight)
        assert answer.status_code == 403
        assert not [name for name in answer.headers if name.startswith("access-control")]


async def test_only_a_configured_origin_gets_permission(server: Server) -> None:
    good = {"origin": "https://good.example"}
    evil = {"origin": "https://evil.example"}
    assert (await server.client.get("/models", headers=good)).headers["access-control-allow-origin"] == good["origin"]
    assert "access-control-allow-origin" not in (await server.client.get("/models", headers=evil)).headers
    asks = {"access-control-request-method": "DELETE", "access-control-request-headers": "x-api-key,x-request-id"}
    allowed = await server.client.options("/jobs/x", headers={**good, **asks})
    assert allowed.status_code == 200 and "x-request-id" in allowed.headers["access-control-allow-headers"]
    answer = await server.client.options("/jobs/x", headers={**evil, **asks})
    assert "access-control-allow-origin" not in answer.headers
    refused = await server.client.post("/run/nothing", content=IMAGE, headers=good)
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (404, good["origin"])


async def test_a_spoofed_host_appears_nowhere_in_an_answer(server: Server) -> None:
    refused = await server.client.get("/models", headers={"host": "evil.example"})
    assert refused.status_code == 421 and "evil" not in refused.text + str(refused.headers)
    headers = {"x-forwarded-host": "evil.example", "x-forwarded-for": "6.6.6.6", "forwarded": "host=evil.example"}
    answer = await server.client.get("/models", headers=headers)
    assert answer.status_code == 200
    job = await submit(server, headers=headers)
    found = await server.client.get(job["links"]["self"], headers=headers)
    assert "evil" not in found.text + str(found.headers) + answer.text


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("GET", "/jobs/", 404, None),
        ("PUT", "/jobs", 405, "method_not_allowed"),
        ("GET", "//evil.example/%2e%2e", 404, "not_found"),
        ("GET", "/a\\b", 404, "not_found"),
    ],
)
async def test_a_path_that_is_not_served_is_a_problem(
    server: Server, method: str, path: str, status: int, code: str | None
) -> None:
    answer = await server.client.request(method, path)
    told = problem(answer)
    assert answer.status_code == status
    assert code is None or told["code"] == code


async def test_a_dialect_that_does_not_exist_stops_the_start(server: Server) -> None:
    with pytest.raises(ValueError, match="no dialect 'odd'"):
        create_app(server.engine, Settings(outputs=server.engine.settings.outputs, dialects=("odd",)))


async def test_only_the_wanted_dialects_are_served(tmp_path: Path) -> None:
    async with world(tmp_path, dialects=("jobs",)) as server:
        paths = (await server.client.get("/openapi.json")).json()["paths"]
        assert "/jobs" in paths and "/edit" not in paths


# --- the description -----------------------------------------------------------------------------------------------


async def test_every_operation_is_described_once_with_all_its_answers(tmp_path: Path) -> None:
    async with world(tmp_path, keys_file=keys_file(tmp_path)) as server:
        document = (await server.client.get("/openapi.json")).json()
    operations = [
        (path, method, told)
        for path, item in document["paths"].items()
        for method, told in item.items()
        if method in ("get", "post", "put", "delete", "patch")
    ]
    twice = [name for name, count in Counter(told["operationId"] for _, _, told in operations).items() if count > 1]
    assert twice == []
    assert document["info"]["title"] == "ImagePool"
    assert set(document["components"]["securitySchemes"]) == {"key", "bearer", "signature"}
    paths = document["paths"]
    assert {"/jobs", "/jobs/{id}", "/jobs/{id}/result", "/jobs/{id}/events", "/models", "/run/{model}"} <= set(paths)
    wanted = {"400", "401", "404", "408", "409", "413", "415", "422", "429", "500", "503"}
    assert wanted | {"200", "202"} <= set(paths["/jobs"]["post"]["responses"])
    assert wanted | {"200", "504"} <= set(paths["/run/{model}"]["post"]["responses"])
    assert {"200", "304", "404", "409", "410"} <= set(paths["/jobs/{id}/result"]["get"]["responses"])


async def test_every_reference_of_the_description_leads_somewhere(server: Server) -> None:
    document = (await server.client.get("/openapi.json")).json()

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            if isinstance(reference := value.get("$ref"), str):
                kind, name = reference.removeprefix("#/components/").split("/")
                assert name in document["components"][kind]
            for item in value.values():
                walk(item)
        elif isinstance(value, list):
            for item in value:
                walk(item)

    walk(document)


async def test_answers_have_the_shape_that_is_described(server: Server) -> None:
    schemas = (await server.client.get("/openapi.json")).json()["components"]["schemas"]
    job = await submit(server)
    assert set(job) == set(schemas["Job"]["properties"])
    assert set(job["links"]) == set(schemas["Job"]["properties"]["links"]["properties"])
    model = (await server.client.get("/models/echo")).json()
    assert set(model) == set(schemas["Model"]["properties"])
    told = problem(await server.client.post("/run/echo?steps=0", content=IMAGE))
    assert set(schemas["Problem"]["required"]) <= set(told)
    ready = (await server.client.get("/health/ready")).json()
    assert set(ready) == set(schemas["Ready"]["properties"])


async def test_the_description_can_be_closed(tmp_path: Path) -> None:
    async with world(tmp_path, docs=False) as server:
        for path in ("/docs", "/docs/start.js", "/docs/swagger-ui-bundle.js"):
            assert (await server.client.get(path)).status_code == 404


async def test_however_many_ask_at_once_the_metrics_are_made_once_a_second() -> None:
    now, made = 0.0, 0

    async def make() -> int:
        nonlocal made
        made += 1
        await asyncio.sleep(0)
        if made == 2:
            raise OSError
        return made

    page = SharedPage(make, 1.0, lambda: now)
    assert await asyncio.gather(*(page() for _ in range(20))) == [1] * 20
    now = 0.9
    assert await page() == 1
    now = 1.0
    with pytest.raises(OSError):
        await page()
    assert await page() == 3, "a failure is not kept"


async def test_who_leaves_while_the_page_is_made_takes_it_from_nobody() -> None:
    go = asyncio.Event()

    async def make() -> int:
        await go.wait()
        return 1

    page = SharedPage(make, 1.0)
    first, second = asyncio.create_task(page()), asyncio.create_task(page())
    await asyncio.sleep(0)
    first.cancel()
    go.set()
    assert await second == 1


async def test_the_metrics_page_is_shared(server: Server) -> None:
    async def ask() -> bytes:
        return (await server.client.get("/metrics")).content

    assert len(set(await asyncio.gather(*(ask() for _ in range(20))))) == 1

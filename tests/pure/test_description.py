"""The OpenAPI document: whole, valid, and made without holding anybody up. Whether it is true,
`test_openapi_conformance.py` asks the server."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import schemathesis
from fastapi import APIRouter
from pydantic import BaseModel

from api.app import create_api
from api.description import Components, Description, Part
from api.errors import PROBLEM, STATUS, ValidationFailed, Wardrobe, problem
from api.troubles import ANYWHERE, BEHIND_THE_DOOR, BODY, BROWSERS, BY_MARK, NAMED, ON_THE_LINE
from core.errors import BY_CODE, ImagePoolError
from tests.pure.api_kit import IMAGE, ended, submit, world
from tests.pure.dialect_kit import Server, keys_file, png, serve
from tests.pure.engine_kit import TEST_MODELS

METHODS = ("get", "post", "put", "delete")
DOOR = {"400", "401", "403", "408", "413", "415", "431", "500", "503"}


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with world(tmp_path) as made:
        yield made


async def document(server: Server) -> dict[str, Any]:
    found: dict[str, Any] = (await server.client.get("/openapi.json")).json()
    return found


def operations(told: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in told["paths"].items():
        yield from ((path, method, item[method]) for method in METHODS if method in item)


def schema_of(told: dict[str, Any], path: str, status: str = "200", method: str = "get") -> dict[str, Any]:
    """The schema of an answer in JSON, with all that it refers to."""
    content = told["paths"][path][method]["responses"][status]["content"]
    (schema,) = (each["schema"] for kind, each in content.items() if kind == "application/json")
    return {**schema, "components": told["components"]}


# --- the document ---------------------------------------------------------------------------------------------------


async def test_the_document_is_valid_openapi(server: Server) -> None:
    schemathesis.openapi.from_dict(await document(server)).validate()


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/echo", "/models", "/models/echo"])
async def test_two_dialects_may_call_different_things_a_model(server: Server, path: str) -> None:
    told, answer = await document(server), await server.client.get(path)
    assert answer.status_code == 200
    template = path.replace("echo", "{name}")
    jsonschema_rs.validator_for(schema_of(told, template)).validate(answer.json())


def test_a_component_that_would_overwrite_another_stops_the_making() -> None:
    class Job(BaseModel):
        mine: int

    api = APIRouter(tags=["mine"])
    api.add_api_route("/mine", lambda: None, response_model=Job)
    with pytest.raises(ValueError, match="two components called 'Job'"):
        Description(Wardrobe(), keys=False).make("t", "1", "", [Part("", api, "Mine.")])
    told = Description(Wardrobe(), keys=False).make("t", "1", "", [Part("mine", api, "Mine.")])
    assert {"Job", "mine.Job"} <= set(told["components"]["schemas"])


def test_two_operations_at_one_address_or_of_one_name_stop_the_making() -> None:
    def part(name: str, path: str) -> Part:
        api = APIRouter(tags=["mine"])
        api.add_api_route(path, lambda: None, operation_id="same", response_model=None)
        return Part(name, api, "")

    for second, about in (("/mine", "twice"), ("/other", "operations called same")):
        with pytest.raises(ValueError, match=about):
            Description(Wardrobe(), keys=False).make("t", "1", "", [part("a", "/mine"), part("b", second)])


def test_the_same_component_may_come_twice() -> None:
    found = Components()
    found.add("A", {"type": "string"})
    found.add("A", {"type": "string"})
    assert list(found) == ["A"]


async def test_every_tag_says_what_it_is(server: Server) -> None:
    told = await document(server)
    described = {tag["name"]: tag["description"] for tag in told["tags"]}
    used = {tag for *_, each in operations(told) for tag in each["tags"]}
    assert used == set(described)
    assert used >= {"jobs", "run", "system", "i2ii", "imagen", "openai", "imagegenx", "iopaint", "lora"}
    assert all(len(text) > 20 for text in described.values())


async def test_every_operation_tells_what_the_door_refuses(server: Server) -> None:
    """In the status that its dialect's dress has for it: OpenAI's clients know neither 415 nor 422."""
    told = await document(server)
    for path, method, each in operations(told):
        if each.get("security") == []:
            continue
        wanted = DOOR - ({"415"} if path.startswith("/v1/") else set())
        wanted |= {"404", "507"} if "requestBody" in each else set()
        wanted |= {"421"}  # without keys
        wanted |= {"429"} if method == "post" else set()
        assert wanted <= set(each["responses"]), (path, method)
        assert "default" not in each["responses"]


async def test_every_refusal_has_a_body_and_says_when_to_come_back(server: Server) -> None:
    for path, method, each in operations(await document(server)):
        for status, answer in each["responses"].items():
            where = f"{method} {path} {status}"
            assert {"X-Request-ID"} <= set(answer["headers"]), where
            if int(status) >= 400:
                assert all("$ref" in kind["schema"] for kind in answer["content"].values()), where
            if status in ("429", "503", "507"):
                assert "Retry-After" in answer["headers"], where
            assert status != "401" or "WWW-Authenticate" in answer["headers"], where


async def test_every_error_of_every_dialect_has_the_shape_that_is_described(server: Server) -> None:
    wardrobe = Wardrobe()
    told = create_api(server.engine, server.engine.settings, wardrobe).openapi()
    faults = [kind("a sentence") for kind in BY_CODE.values() if kind is not ImagePoolError]
    faults.append(ValidationFailed("a sentence", errors=[{"loc": ("body", "size"), "msg": "wrong", "type": "size"}]))
    checked = set()
    for path, _, each in operations(told):
        for fault in faults if each.get("security") != [] else ():
            dress = wardrobe.at(path).dress
            status, body = dress(fault, "id")
            content = each["responses"].get(str(status), {}).get("content", {})
            described = content.get(PROBLEM if dress is problem else "application/json")
            if described is None or (dress, status, fault.code) in checked:
                continue
            schema = {**described["schema"], "components": told["components"]}
            if "NoResult" not in schema["$ref"]:  # holds more than the error
                jsonschema_rs.validator_for(schema).validate(body)
                checked.add((dress, status, fault.code))
    assert len(checked) > 120


def test_every_error_that_there_is_has_its_place() -> None:
    """A new one is told of by some operation, or is one that no operation answers with."""
    told = (ANYWHERE, BROWSERS, BEHIND_THE_DOOR, NAMED, BODY, ON_THE_LINE, *BY_MARK.values())
    nowhere = {"not_found", "method_not_allowed"}  # what is served at no path, or by another method
    assert {kind.code for kinds in told for kind in kinds} | nowhere == set(STATUS)


async def test_who_may_look_without_a_key_is_told(tmp_path: Path) -> None:
    async with world(tmp_path, keys_file=keys_file(tmp_path)) as server:
        told = await document(server)
    assert told["security"] == [{"key": []}, {"bearer": []}]
    for path, method, each in operations(told):
        public = path == "/health" or path == "/ready" or path == "/metrics" or path.startswith("/health/")
        assert (each.get("security") == []) == public, (path, method)
    assert {"signature": []} in told["paths"]["/v1/images/{id}/content"]["get"]["security"]


async def test_without_a_keys_file_a_key_is_known_and_needs_not_be(server: Server) -> None:
    told = await document(server)
    assert set(told["components"]["securitySchemes"]) == {"key", "bearer", "signature"}
    assert told["security"][0] == {} and {"key": []} in told["security"]


async def test_names_of_components_are_names(server: Server) -> None:
    names = [name for kind in (await document(server))["components"].values() for name in kind]
    assert all(re.fullmatch(r"[\w.-]+", name) and "__" not in name for name in names)


async def test_the_document_is_made_beside_the_event_loop(server: Server) -> None:
    """No turn of the loop makes it: the loop's own thread spends next to no time."""
    began = time.thread_time()
    told = await document(server)
    assert len(told["paths"]) > 50
    assert time.thread_time() - began < 0.1


async def test_it_is_whole_for_all_who_ask_at_once(server: Server) -> None:
    found = await asyncio.gather(*(server.client.get("/openapi.json") for _ in range(4)))
    assert len({answer.content for answer in found}) == 1 and found[0].status_code == 200


async def test_once_it_is_made_it_is_sent_without_a_thread(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    told = await document(server)
    monkeypatch.setattr(asyncio, "to_thread", None)
    assert await document(server) == told


# --- what it turned up ----------------------------------------------------------------------------------------------


async def test_a_part_beyond_the_file_is_an_error_like_others(server: Server) -> None:
    job = await ended(server, await submit(server))
    answer = await server.client.get(job["links"]["result"], headers={"range": "bytes=999999-"})
    assert (answer.status_code, answer.json()["code"]) == (416, "range_not_satisfiable")
    assert answer.headers["content-range"] == f"bytes */{len(IMAGE)}"
    part = await server.client.get(job["links"]["result"], headers={"range": "bytes=0-9"})
    assert (part.status_code, part.content) == (206, IMAGE[:10])


@pytest.mark.parametrize("wrong", ["bytes", "bytes=", "lines=1-2", "bytes=9-2", "bytes=x-y"])
async def test_a_range_that_cannot_be_read_is_passed_over(server: Server, wrong: str) -> None:
    job = await ended(server, await submit(server))
    answer = await server.client.get(job["links"]["result"], headers={"range": wrong})
    assert (answer.status_code, answer.content) == (200, IMAGE)


async def test_a_job_that_was_given_no_image_can_be_looked_at_by_every_api(tmp_path: Path) -> None:
    options = {"models_folder": TEST_MODELS, "models": ("paint", "upscale", "resize")}
    async with serve(tmp_path, work=lambda item, data: png(), **options) as server:
        answer = await server.client.post("/v1/images/generations", json={"prompt": "x", "response_format": "url"})
        job = answer.json()["data"][0]["url"].split("/")[-2]
        for path in ("/jobs/", "/status/", "/api/v1/jobs/"):
            assert (await server.client.get(path + job)).status_code == 200, path

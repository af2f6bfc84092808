"""What an answer must never tell: paths, traces, other tenants' jobs; asked of every route that there is."""

from __future__ import annotations

import hmac
import json
import os
import re
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from api import auth
from core.errors import Unauthorised
from tests.pure.dialect_kit import KEY, OTHER_KEY, Server, keys_file, png, serve

ROOT = Path(__file__).resolve().parents[2]
MINE, THEIRS = {"x-api-key": KEY}, {"x-api-key": OTHER_KEY}
SECRETS = re.compile(rf"Traceback|File \"|\.py\b|site-packages|0x[0-9a-f]{{6,}}|{re.escape(str(ROOT))}|{sys.prefix}")
METHODS = ("get", "put", "post", "delete", "patch")
HOSTILE_PATHS = ("x", str(uuid.uuid4()), "..%2f..%2fetc%2fpasswd", "%00", "%ff", "a" * 10_000, "{0.__class__}", "%s%n")
HOSTILE_BODIES: list[dict[str, Any]] = [
    {},
    {"content": b"\xff\xfe\x00", "headers": {"content-type": "application/json"}},
    {"content": b"[" * 100_000, "headers": {"content-type": "application/json"}},
    {"json": {"model": ["x"], "image": {"a": 1}, "params": "\\", "n": 1e308}},
    {"content": b"--x\r\nbroken", "headers": {"content-type": "multipart/form-data; boundary=x"}},
    {"content": b"no image", "headers": {"content-type": "image/png"}},
    {"files": {"image": ("/etc/passwd", b"\x89PNG\r\n\x1a\n" + bytes(99)), "file": b"x"}, "data": {"model": "../x"}},
    {"files": {"image": png(), "file": png(16, 16)}, "data": {"prompt": "\0", "model": "edit", "scale": "1e400"}},
]

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    folder = tmp_path_factory.mktemp("answers")
    async with serve(folder, keys_file=keys_file(folder), body_timeout=60.0) as made:
        yield made


async def routes(server: Server) -> list[tuple[str, str]]:
    """(method, path template) of every operation that is described."""
    paths = (await server.client.get("/openapi.json")).json()["paths"]
    found = [(method, path) for path, methods in paths.items() for method in methods if method in METHODS]
    assert len(found) > 15
    return found


def fill(template: str, word: str) -> str:
    return re.sub(r"\{[^}]+\}", word.replace("\\", r"\\"), template)


def harmless(answer: httpx.Response, folder: Path) -> None:
    told = answer.text + json.dumps(dict(answer.headers))
    assert not (found := SECRETS.search(told)), f"{answer.request.method} {answer.request.url}: {found}: {told[:500]}"
    assert str(folder) not in told


def attempts(method: str, template: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Hostile paths, then hostile bodies."""
    if "{" in template:
        yield from ((fill(template, word), {}) for word in HOSTILE_PATHS)
    plain = fill(template, "edit")
    yield plain + "?limit=x&before=..&state=%00&model=" + "a" * 5000, {}
    if method in ("post", "put", "patch"):
        yield from ((plain, body) for body in HOSTILE_BODIES)


async def test_no_answer_of_any_route_tells_a_path_or_a_trace(server: Server) -> None:
    folder, refused = server.engine.settings.outputs.parent, 0
    for method, template in await routes(server):
        for path, more in attempts(method, template):
            headers = {**MINE, **more.get("headers", {})}
            answer = await server.client.request(method, path, **{**more, "headers": headers})
            if answer.status_code >= 400:
                refused += 1
                harmless(answer, folder)
                assert answer.status_code < 500 or answer.status_code == 503, f"{method} {path[:99]}: {answer.text}"
    assert refused > 60


async def test_a_defect_in_any_route_is_told_without_its_message(server: Server, monkeypatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError(f"secret {ROOT} of {KEY}")

    for name in ("job", "jobs", "submit", "cancel", "result", "admit", "snapshot", "render_metrics", "position"):
        monkeypatch.setattr(server.engine, name, broken)
    defects = 0
    for method, template in await routes(server):
        if method == "get" or "{" in template:
            answer = await server.client.request(method, fill(template, str(uuid.uuid4())), headers=MINE)
        else:
            answer = await server.client.request(
                method, template, headers=MINE, files={"image": png(), "file": png(64, 64)},
                data={"model": "enhance", "prompt": "make it warmer"},
            )
        defects += answer.status_code == 500
        harmless(answer, server.engine.settings.outputs.parent)
        assert "secret" not in answer.text and KEY not in answer.text
    assert defects > 8


async def submitted(server: Server) -> dict[str, str]:
    """A job of the first tenant by each dialect that has jobs."""
    image = png(600, 600)
    native = await server.client.post("/jobs", data={"model": "enhance"}, files={"image": image}, headers=MINE)
    i2ii = await server.client.post("/edit", data={"prompt": "make it warmer"}, files={"image": image}, headers=MINE)
    found = {"jobs": native.json()["id"], "i2ii": i2ii.json()["request_id"]}
    for method, path in await routes(server):
        if method == "post" and path.startswith("/api/v1/images/"):
            answer = await server.client.post(path, files={"file": image}, headers=MINE)
            assert answer.status_code < 300, answer.text
            found["imagen"] = re.search(r"[0-9a-f-]{36}", answer.text)[0]  # type: ignore[index]
    return found


def told(answer: httpx.Response) -> tuple[int, str]:
    """An answer without what differs from call to call."""
    return answer.status_code, re.sub(r"[0-9a-f]{24}|\d{4}-\d\d-\d\dT[\d:.]+|[0-9a-f-]{36}|[\d.]{12,}", "", answer.text)


async def test_on_every_route_another_tenants_job_is_the_same_as_none(server: Server) -> None:
    server.pool.hold()
    jobs = await submitted(server)
    asked = 0
    for ended in (False, True):
        for method, template in await routes(server):
            names = re.findall(r"\{(\w*id)\}", template)
            if not names:
                continue
            for id_ in jobs.values():
                theirs = await server.client.request(method, template.replace(f"{{{names[0]}}}", id_), headers=THEIRS)
                none = await server.client.request(
                    method, template.replace(f"{{{names[0]}}}", str(uuid.uuid4())), headers=THEIRS
                )
                assert theirs.status_code == 404, f"{method} {template}: {theirs.text}"
                assert told(theirs) == told(none)
                asked += 1
        listed = await server.client.get("/jobs", headers=THEIRS)
        assert listed.json()["jobs"] == []
        if not ended:
            server.pool.release()
            for id_ in jobs.values():
                assert (await server.engine.wait(id_, 30)).state.value == "succeeded", "a stranger's DELETE did nothing"
    assert asked > 20


async def test_a_key_is_compared_whole_and_in_constant_time(tmp_path: Path, monkeypatch) -> None:
    keys = auth.Keys(keys_file(tmp_path))
    assert KEY not in repr(vars(keys)), "only hashes are kept"
    compared: list[tuple[int, int]] = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return False

    monkeypatch.setattr(hmac, "compare_digest", compare)
    for key in (KEY, "unknown"):
        with pytest.raises(Unauthorised):
            keys.caller(key)
    assert compared == [(32, 32), (32, 32)], "for a known and an unknown beginning alike"


async def test_two_keys_whose_hashes_begin_alike_are_told_apart(tmp_path: Path) -> None:
    keys = auth.Keys(keys_file(tmp_path))
    digest, found = next(iter(keys._keys.values()))
    keys._keys = {digest[:8]: (digest[:8] + os.urandom(24), found)}
    with pytest.raises(Unauthorised):
        keys.caller(KEY)

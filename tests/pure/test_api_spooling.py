"""Large bodies lie on the disk while they come; when it is full, that is told as such, whatever the dialect."""

from __future__ import annotations

import errno
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.pure.api_kit import IMAGE, nothing_happens, world

LARGE = IMAGE + bytes(5 << 20)  # what follows a PNG is nobody's
FILE = {"image": ("a.png", LARGE)}
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "jobs": ("/jobs?model=echo", {"content": LARGE, "headers": {"content-type": "image/png"}}),
    "jobs form": ("/jobs", {"data": {"model": "echo"}, "files": FILE}),
    "run form": ("/run/echo", {"files": FILE}),
    "openai": ("/v1/images/edits", {"data": {"prompt": "a", "model": "echo"}, "files": FILE}),
    "i2ii": ("/edit", {"data": {"prompt": "a"}, "files": FILE}),
    "imagen": ("/api/v1/images/enhance", {"files": {"file": ("a.png", LARGE)}}),
    "iopaint": ("/api/v1/gen-info", {"files": {"file": ("a.png", LARGE)}}),
}


@pytest.mark.parametrize("dialect", REQUESTS)
async def test_a_full_disk_under_a_spooled_body_is_a_507(
    dialect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    path, request = REQUESTS[dialect]
    async with world(tmp_path) as server, nothing_happens(server):
        answer = await server.client.post(path, **request)
        assert answer.status_code == 507, answer.text
        assert int(answer.headers["retry-after"]) >= 1
        assert str(tmp_path) not in answer.text


@pytest.mark.parametrize("dialect", ["jobs", "jobs form", "run form"])
async def test_a_spooled_image_arrives_whole(dialect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = tmp_path / "spool"
    spool.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(spool))
    path, request = REQUESTS[dialect]
    async with world(tmp_path) as server:
        request = {**request, "headers": {**request.get("headers", {}), "prefer": "wait=30", "idempotency-key": "a"}}
        for _ in range(2):
            answer = await server.client.post(path, **request)
            assert answer.status_code == 200, answer.text
        if dialect.startswith("jobs"):
            assert len(server.ran) == 1, "the second was told to be the same by its bytes"
            answer = await server.client.get(answer.json()["links"]["result"])
        assert answer.content == LARGE
        assert server.engine.arena.spans == 0
    assert list(spool.iterdir()) == []

"""A disk without room: told beside readiness, as gauges and in the log, when it begins and when it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core.errors import StorageFailed
from engine import disk
from tests.pure.api_kit import IMAGE, world

HUGE = 1 << 60


async def until(what: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not what():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def test_a_full_disk_is_told_and_does_not_make_the_server_unready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(disk, "LOOK_EVERY", 0.001)
    async with world(tmp_path, min_free_disk=HUGE) as server:
        await until(lambda: server.engine.storage.state == "full")
        ready = await server.client.get("/health/ready")
        assert ready.status_code == 200 and ready.json()["storage"] == "full"
        refused = await server.client.post("/jobs?model=echo", content=IMAGE, headers={"content-type": "image/png"})
        run = await server.client.post("/run/echo", content=IMAGE, headers={"content-type": "image/png"})
        assert (refused.status_code, run.status_code) == (507, 200)
        page = (await server.client.get("/metrics")).text
        assert "imagepool_storage_full 1.0" in page and "imagepool_disk_free_bytes" in page
        assert 'imagepool_refusals_total{reason="storage_full"} 1.0' in page
        server.engine._keeper.files.min_free = 0
        await until(lambda: server.engine.storage.state == "ok")
        assert (await server.client.get("/health/ready")).json()["storage"] == "ok"
        assert b"imagepool_storage_full 0.0" in (await server.engine.render_metrics())[0]
        assert (await server.client.get("/system/status")).json()["storage"]["state"] == "ok"
    told = capsys.readouterr().out
    assert told.count("new durable jobs are refused") == told.count("new durable jobs are taken again") == 1


async def test_a_folder_that_cannot_be_written_is_told_until_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise StorageFailed("the disk refuses to write")

    monkeypatch.setattr(disk, "LOOK_EVERY", 0.001)
    async with world(tmp_path) as server:
        files = server.engine._keeper.files
        with monkeypatch.context() as broken:
            broken.setattr(files, "put_inputs", refuse)
            broken.setattr(files, "try_write", refuse)
            refused = await server.client.post("/jobs?model=echo", content=IMAGE, headers={"content-type": "image/png"})
            assert refused.status_code == 503
            await until(lambda: server.engine.storage.state == "failed")
        await until(lambda: server.engine.storage.state == "ok")

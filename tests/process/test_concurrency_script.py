"""The black-box script against a real socket: it must pass on a good server and fail on every kind of bad one."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from PIL import Image

import test_concurrency
from api.app import create_app
from core.errors import ModelFailed
from tests.pure.dialect_kit import Server, serve, until
from workers.messages import RunItem

SCRIPT = Path(__file__).resolve().parents[2] / "test_concurrency.py"


@dataclass(slots=True)
class Outcome:
    code: int
    said: str
    report: dict[str, Any] | None


@contextlib.asynccontextmanager
async def listening(server: Server) -> AsyncIterator[str]:
    app = create_app(server.engine, server.engine.settings)
    door = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        serving = asyncio.create_task(door.serve([listener]))
        await until(lambda: door.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        door.should_exit = True
        await serving


async def perform(url: str, *arguments: str) -> Outcome:
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(SCRIPT), "--url", url, "--json", "--timeout", "60", *arguments,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await process.communicate()
    assert process.returncode is not None
    return Outcome(process.returncode, err.decode(), json.loads(out) if out else None)


async def test_it_passes_on_a_good_server_and_reports(tmp_path: Path) -> None:
    async with serve(tmp_path) as server, listening(server) as url:
        plot, kept = tmp_path / "latency.png", tmp_path / "kept"
        done = await perform(url, "--sizes", "64x48,48x64", "--plot", str(plot), "--keep", str(kept))
        assert done.code == 0, done.said
        for line in ("=== Multi-GPU Concurrent Test ===", "Total GPUs: 2", "Ready Workers: 2", "Alive Processes: 2",
                     "GPU usage distribution: {", "Concurrency efficiency: ", "Successful requests: 4"):  # fmt: skip
            assert line in done.said
        assert done.report is not None
        assert done.report["summary"]["requests"] == 4 and done.report["summary"]["failed"] == 0
        assert len({item.params["prompt"] for item in server.ran}) == 4
        assert sorted(item.params["seed"] for item in server.ran) == [0, 42, 84, 126]
        with Image.open(plot) as picture:
            assert picture.format == "PNG"
        assert len(list(kept.glob("concurrent_test_*.png"))) == len(list(kept.glob("concurrent_result_*.png"))) == 4


def resize(item: RunItem, data: bytes, scale: int) -> bytes:
    out = io.BytesIO()
    with Image.open(io.BytesIO(data)) as picture:
        picture.resize((picture.width * scale, picture.height * scale)).save(out, "PNG")
    return out.getvalue()


async def test_another_model_is_asked_through_the_native_api(tmp_path: Path) -> None:
    def enlarge(item: RunItem, data: bytes) -> bytes:
        return resize(item, data, item.params["scale"])

    async with serve(tmp_path, work=enlarge) as server, listening(server) as url:
        done = await perform(url, "--model", "upscale", "--count", "3", "--sizes", "32x24", "--steps", "7")
        assert done.code == 0, done.said
        assert {item.params["steps"] for item in server.ran} == {7}
        unknown = await perform(url, "--model", "upscael")
        assert unknown.code == 1 and "Cannot use model upscael" in unknown.said


@pytest.mark.parametrize("how", ["wrong size", "no picture", "failed"])
async def test_one_bad_result_fails_the_whole_test(tmp_path: Path, how: str) -> None:
    def spoil(item: RunItem, data: bytes) -> bytes:
        if item.params["seed"] != 42:
            return data
        if how == "failed":
            raise ModelFailed("the model raised")
        return resize(item, data, 2) if how == "wrong size" else b'{"status": "queued"}'

    async with serve(tmp_path, work=spoil) as server, listening(server) as url:
        done = await perform(url, "--count", "3", "--concurrency", "2", "--sizes", "32x32")
        assert done.code == 1 and done.report is not None
        assert [trial["ok"] for trial in done.report["requests"]] == [True, False, True]
        told = {"wrong size": "expected (32, 32)", "no picture": "no valid PNG", "failed": "the model raised"}
        assert told[how] in done.report["requests"][1]["error"]


async def test_without_ready_workers_it_says_so(tmp_path: Path) -> None:
    async with serve(tmp_path, boots=False) as server, listening(server) as url:
        done = await perform(url)
        assert done.code == 1 and "No ready workers available" in done.said


async def test_without_a_server_it_says_so() -> None:
    done = await perform("http://127.0.0.1:9")
    assert done.code == 1 and "Cannot get system status: is the server running at http://127.0.0.1:9" in done.said


def test_what_a_plot_needs_is_told_before_anything_is_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        test_concurrency.read_options(["--plot", "latency.png"])
    assert "pip install matplotlib" in capsys.readouterr().err


async def test_a_client_that_sends_too_much_lives_to_read_its_413(tmp_path: Path) -> None:
    import httpx

    async with serve(tmp_path) as server, listening(server) as url, httpx.AsyncClient(base_url=url) as client:
        files = {"image": ("big.png", bytes(40 << 20))}
        answer = await client.post("/edit", files=files, data={"prompt": "sunset"})
        assert (answer.status_code, answer.json()) == (413, {"detail": "Image too large"})

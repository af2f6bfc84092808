"""IOPaint's own page: its files, its two places, and what is said where it is not installed."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest
from starlette.types import Receive, Scope, Send

from api import iopaint_page
from api.iopaint_page import OwnPort
from api.serve import take_port
from core.settings import Settings
from tests.pure.iopaint_kit import world


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with a page, which must not be imported."""
    app = tmp_path / "site" / "iopaint" / "web_app"
    (app / "assets").mkdir(parents=True)
    (app.parent / "__init__.py").write_text("raise AssertionError('was imported')")
    (app / "index.html").write_text("<!doctype html><title>IOPaint</title>")
    (app / "favicon.ico").write_bytes(b"icon")
    (app / "assets" / "index-abc.js").write_text("let a;")
    (app.parent / "secret.py").write_text("secret")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "iopaint", raising=False)
    return app


async def test_the_page_is_served_with_its_assets_where_it_looks_for_them(tmp_path: Path, installed: Path) -> None:
    async with world(tmp_path, cors_origins=("https://portal.example",)) as server:
        for path in ("/iopaint", "/iopaint/"):
            page = await server.client.get(path)
            assert page.headers["content-security-policy"] == "frame-ancestors 'self' https://portal.example"
            assert page.text == (installed / "index.html").read_text()
            assert page.headers["content-type"].startswith("text/html")
        assert (await server.client.get("/iopaint/favicon.ico")).content == b"icon"
        script = await server.client.get("/assets/index-abc.js")
        assert script.text == "let a;" and "javascript" in script.headers["content-type"]
        assert "immutable" in script.headers["cache-control"]
        for path in ("/assets/..%2Findex.html", "/assets/..%2f..%2fsecret.py", "/assets/%00", "/assets/none.js"):
            assert (await server.client.get(path)).status_code == 404


async def test_without_the_package_the_way_to_get_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iopaint_page, "files", dict)
    async with world(tmp_path) as server:
        answer = await server.client.get("/iopaint/")
        assert answer.status_code == 404 and "pip install --no-deps iopaint" in answer.json()["detail"]
        assert (await server.client.get("/api/v1/server-config")).status_code == 200


@pytest.mark.parametrize(("path", "port", "seen"), [
    ("/", 8090, "/iopaint/"), ("/favicon.ico", 8090, "/iopaint/favicon.ico"), ("/api/v1/model", 8090, "/api/v1/model"),
    ("/index.html", 8090, "/iopaint/"), ("/", 8000, "/"), ("/favicon.ico", 8000, "/favicon.ico"),
])  # fmt: skip
async def test_the_page_is_at_the_root_of_its_own_port_alone(path: str, port: int, seen: str) -> None:
    went: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        went.append(scope["path"])

    scope = {"type": "http", "path": path, "server": ("127.0.0.1", port)}
    await OwnPort(app, 8090)(scope, None, None)  # type: ignore[arg-type]
    assert went == [seen] and scope["path"] == path


def test_a_port_that_cannot_be_had_stops_the_start_with_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"port {port} of 127\.0\.0\.1 .* --iopaint-port"):
            take_port(Settings(host="127.0.0.1", port=0, iopaint_port=port), "iopaint_port")

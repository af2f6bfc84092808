"""Every example of the manual that talks to a server does what it says, pasted as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit import ROOT, TEST_MODELS, RunningServer, free_port, running

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
PAGES = ("README.md", *(f"docs/{name}.md" for name in (
    "api", "i2ii", "imagen", "imagegenx", "iopaint", "models", "openai",
)))  # fmt: skip
IOPAINT = free_port()
STRICT = 'set -euo pipefail\ncurl() { command curl --fail --max-time 30 "$@"; }\n'


def blocks(page: str, *languages: str) -> list[str]:
    """The fenced blocks of a page in these languages."""
    found = BLOCK.findall((ROOT / page).read_text("utf-8"))
    return [text for language, text in found if language in languages]


def own_model(folder: Path) -> Path:
    """The model of docs/models.md, written as it stands there; and one that draws, for what needs a diffusion model."""
    for text in blocks("docs/models.md", "toml", "python"):
        if name := re.match(r"# my_models/(\S+)\n", text):
            folder.mkdir(exist_ok=True)
            (folder / name[1]).write_text(text, "utf-8")
    (folder / "paint.toml").write_text((TEST_MODELS / "paint.toml").read_text())
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("docs")
    flags = "--models-folder", str(own_model(folder / "my_models")), "--iopaint-port", str(IOPAINT), "--no-warm-up"
    with running(folder / "outputs", *flags, models="", devices="cpu:2") as made:
        assert not any(worker["refused"] for worker in made.workers())
        yield made


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """A folder as the repository's is to who pastes there, which does not matter when files are left in it."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    return tmp_path


def told(text: str, server: RunningServer) -> str:
    return text.replace("localhost:8000", f"127.0.0.1:{server.port}").replace("localhost:8080", f"127.0.0.1:{IOPAINT}")


@pytest.mark.parametrize("page", PAGES)
def test_every_line_with_curl_is_answered_with_success(page: str, server: RunningServer, desk: Path) -> None:
    found = [text for text in blocks(page, "sh", "") if "curl" in text]
    found = ["\n".join(line for line in text.splitlines() if not line.startswith("python ")) for text in found]
    assert found or page == "docs/openai.md"
    for text in found:
        command = ["bash", "-c", STRICT + told(text, server)]
        done = subprocess.run(command, cwd=desk, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def test_the_model_of_one_s_own_paints(server: RunningServer) -> None:
    photo = (ROOT / "examples" / "cat.jpg").read_bytes()
    whole, none = (
        server.client.post(f"/run/duotone?strength={strength}", content=photo, headers={"content-type": "image/jpeg"})
        for strength in (1, 0)
    )
    assert whole.status_code == none.status_code == 200 and whole.content != none.content


@pytest.mark.parametrize("page", PAGES)
def test_every_python_example_runs(page: str, server: RunningServer, desk: Path) -> None:
    for text in blocks(page, "python"):
        if "localhost" in text:
            command = [sys.executable, "-c", told(text, server)]
            done = subprocess.run(command, cwd=desk, capture_output=True, text=True, timeout=150, check=False)
            assert done.returncode == 0, done.stderr[-2000:]

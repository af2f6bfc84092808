"""The manual and the code say the same: states, routes, links and the names of tests."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from api.app import create_api
from api.errors import Wardrobe
from core.states import MOVES
from tests.pure.engine_kit import engine
from workers.supervisor import Start, Supervisor, SupervisorConfig, WorkerState

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CURL = re.compile(r"curl\b(?P<options>[^|\n]*?)['\"]?http://localhost:8000(?P<path>/[^\s?'\"#]*)(?P<rest>[^|\n)]*)")


def drawing(number: int) -> tuple[set[tuple[str, str]], list[str]]:
    """The arrows of the n-th drawing in docs/states.md and their letters."""
    blocks = re.findall(r"```mermaid\n(.*?)```", (ROOT / "docs" / "states.md").read_text("utf-8"), re.DOTALL)
    found = re.findall(r"^\s*(\w+) --> (\w+): (\w)$", blocks[number], re.MULTILINE)
    return {(old, new) for old, new, _ in found}, [letter for *_, letter in found]


def test_the_arrows_of_a_job_are_the_table_of_moves() -> None:
    arrows, letters = drawing(0)
    assert arrows == {(old.value, new.value) for old, news in MOVES.items() for new in news}
    assert len(set(letters)) == len(arrows)


def test_every_arrow_has_its_line() -> None:
    text = (ROOT / "docs" / "states.md").read_text("utf-8")
    cells = re.findall(r"^\| ([A-Za-z](?:, [A-Za-z])*) \|", text, re.MULTILINE)
    assert {letter for cell in cells for letter in cell.split(", ")} == {*drawing(0)[1], *drawing(1)[1]}


def test_the_arrows_of_a_worker_are_what_a_supervisor_does() -> None:
    seen: set[tuple[str, str]] = set()
    for seed in range(400):
        seen |= set(wander(random.Random(seed)))
    assert seen == drawing(1)[0]


def wander(chance: random.Random) -> Iterator[tuple[str, str]]:
    """The moves of one device in a life full of accidents, as the pool may tell of them."""
    supervisor = Supervisor.of(["gpu"], SupervisorConfig(boot_timeout=1, backoff=0.5, backoff_max=4, give_up_after=2))
    life, now, living = supervisor.lives["gpu"], 0.0, False
    deeds = ["tick"] * 6 + ["ready", "worked", "kill", "exit", "fail", "stop"]
    for _ in range(60):
        old, now = life.state, now + chance.random()
        deed = chance.choice(deeds)
        if deed == "tick":
            living = any(isinstance(action, Start) for action in supervisor.tick(now)) or living
        elif deed == "ready" and life.state is WorkerState.STARTING and not supervisor.draining:
            supervisor.ready("gpu")
        elif deed == "worked" and life.state is WorkerState.READY:
            supervisor.worked("gpu")
        elif deed == "kill" and life.state is WorkerState.READY:
            supervisor.dying("gpu", "hangs, or makes place for its successor")
        elif deed in ("exit", "fail") and living:
            living, failed = False, deed == "fail" and life.state is WorkerState.STARTING
            supervisor.exited("gpu", now, "gone", failed_to_boot=failed, on_purpose=chance.random() < 0.1)
        elif deed == "stop" and chance.random() < 0.2:
            supervisor.stop()
            if living and (life.state is WorkerState.READY or chance.random() < 0.5):  # not told while still being made
                supervisor.dying("gpu", "stopping")
        if life.state is not old:
            yield old.value, life.state.value


def calls() -> list[tuple[str, str]]:
    """(method, path) of every curl line of the README."""
    found = []
    for line in (ROOT / "README.md").read_text("utf-8").splitlines():
        for match in CURL.finditer(line):
            options = match["options"] + match["rest"]
            asked = re.search(r"-X (\w+)", options)
            posts = re.search(r"(^|\s)(-F|-d|--data-binary)\s", options)
            found.append((asked[1] if asked else "POST" if posts else "GET", match["path"]))
    return found


async def test_every_curl_line_of_the_readme_goes_to_a_route_that_exists(tmp_path: Path) -> None:
    async with engine(tmp_path) as (made, _):
        served: dict[str, Any] = create_api(made, made.settings, Wardrobe()).openapi()["paths"]
    routes = {
        (method.upper(), re.compile(re.sub(r"\\{\w+\\}", "[^/]+", re.escape(path))))
        for path, methods in served.items()
        for method in methods
    }
    asked = calls()
    assert len(asked) > 15
    lost = [one for one in asked if not any(one[0] == method and route.fullmatch(one[1]) for method, route in routes)]
    assert not lost


def test_the_examples_of_the_readme_are_there() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    named = set(re.findall(r"@(examples/[\w.]+)", text))
    assert named and not [name for name in named if not (ROOT / name).is_file()]
    asked = set(re.findall(r"/run/(\w+)|model=(\w+)", text))
    models = {path.stem for path in (ROOT / "models" / "repository").glob("*.toml")}
    assert {name for pair in asked for name in pair if name} <= models


def links(page: Path) -> list[str]:
    """What a page links to."""
    return re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8"))


def anchors(page: Path) -> set[str]:
    """The anchors that a page's headings get."""
    heads = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head).strip().lower().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    lost = []
    for target in links(page):
        if re.match(r"[a-z]+:", target):
            continue
        place, _, anchor = target.partition("#")
        file = (page.parent / place).resolve() if place else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            lost.append(target)
    assert not lost


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_and_test_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text("utf-8")
    source = "\n".join(file.read_text("utf-8") for file in (ROOT / "tests").rglob("test_*.py"))
    tests = set(re.findall(r"`(test_\w+)`", text))
    assert not {name for name in tests if f"def {name}(" not in source}
    files = set(re.findall(r"`((?:core|scheduler|workers|models|store|engine|api|tests|bench)/[\w/]+\.\w+)`", text))
    assert not {name for name in files if not (ROOT / name).exists()}


def test_every_page_can_be_reached_from_the_readme() -> None:
    linked = {ROOT / target.partition("#")[0] for target in links(PAGES[0])}
    assert not [page.name for page in PAGES[1:] if page not in linked]

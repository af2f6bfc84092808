"""What is kept belongs to the server's user alone, whatever the umask, also what an older server left."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from store import sqlite
from store.modes import tighten, tighten_all
from tests.pure.dialect_kit import keys_file, png, serve
from tests.pure.test_loras import KOHYA, write

JOB = "11111111-2222-4333-8444-555555555555"


@pytest.fixture(autouse=True)
def lax() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    """Of all that is there; a file that is being written may go meanwhile."""
    found = {}
    for path in [folder, *folder.rglob("*")]:
        with suppress(FileNotFoundError):
            found[str(path.relative_to(folder))] = stat.S_IMODE(path.lstat().st_mode)
    return found


def assert_private(folder: Path, *but: str) -> set[str]:
    found = modes(folder)
    open_ = {name: oct(mode) for name, mode in found.items() if mode & 0o077 and name not in but}
    assert not open_, open_
    return set(found)


async def test_every_file_of_the_outputs_folder_is_the_server_s_alone(tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    lora = write(tmp_path / "ink.safetensors", KOHYA).read_bytes()
    keys, key = keys_file(tmp_path, priority="paid"), {"x-api-key": "key-of-acme"}
    async with serve(tmp_path, models=("edit", "inpaint"), keys_file=keys, min_free_disk=0) as server:
        server.client.headers.update(key)
        server.pool.hold()
        form = {"model": "edit", "prompt": "winter"}
        answers = [
            await server.client.post("/jobs", data=form, files={"image": png()}),
            await server.client.post("/api/v1/lora/upload", files={"file": ("ink.safetensors", lora)}),
            await server.client.post("/api/v1/save_image", files={"file": ("cat.png", png())}),
        ]
        assert [answer.status_code for answer in answers] == [202, 200, 200], [one.text for one in answers]
        await server.until_ran()
        waiting = assert_private(outputs)
        server.pool.release()
        job = answers[0].json()["id"]
        assert (await server.client.get(f"/jobs/{job}?wait=10")).status_code == 200
        there = assert_private(outputs)
    assert {"jobs.sqlite", "jobs.sqlite-wal", "jobs.sqlite-shm", ".lock", ".secret", "tmp", "inputs"} <= there
    assert "loras/ink.safetensors" in there and any(name.endswith("cat.png") for name in there)
    assert any(name.startswith("inputs/") for name in waiting)


async def test_what_an_older_server_left_open_is_closed_and_what_is_a_stranger_s_is_not(tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    for name in (f"{JOB}.png", f"inputs/{JOB}/0-image.png", "saved/of-acme/cat.png", "loras/ink.safetensors",
                 "jobs.sqlite", ".lock", "notes.txt", "mine/plan.txt"):  # fmt: skip
        outputs.joinpath(name).parent.mkdir(parents=True, exist_ok=True)
        outputs.joinpath(name).touch()
    async with serve(tmp_path, models=("edit",)):
        assert_private(outputs, "notes.txt", "mine", "mine/plan.txt")
        found = modes(outputs)
    assert found["."] == 0o700 and found["notes.txt"] == 0o666 and found["mine/plan.txt"] == 0o666


async def test_a_folder_of_loras_elsewhere_stays_as_its_operator_made_it(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    write(folder / "own.safetensors", KOHYA)
    async with serve(tmp_path, models=("edit",), lora_folder=folder):
        assert modes(folder) == {".": 0o777, "own.safetensors": 0o666}


def test_links_second_names_and_folders_of_all_are_left_alone(tmp_path: Path) -> None:
    for name in ("far", "twice"):
        tmp_path.joinpath(name).touch()
    (ours := tmp_path / "ours").mkdir()
    (ours / "link").symlink_to(tmp_path / "far")
    (ours / "second").hardlink_to(tmp_path / "twice")
    (ours / "all").mkdir()
    (ours / "all").chmod(0o1777)
    (ours / "file").touch()
    tighten_all(ours)
    found = modes(tmp_path)
    assert found["ours"] == 0o700 and found["ours/file"] == 0o600
    assert found["far"] == found["twice"] == 0o666 and found["ours/all"] == 0o1777
    tighten(ours / "link")
    assert modes(tmp_path)["far"] == 0o666


def test_what_sqlite_makes_gets_the_rights_of_its_database(tmp_path: Path) -> None:
    file = tmp_path / "jobs.sqlite"
    sqlite.keep_private(file)
    with sqlite.open_writer(file, 1.0).begin() as db:
        db.exec_driver_sql("CREATE TABLE a (b)")
        assert {name: mode for name, mode in modes(tmp_path).items() if name != "."} == dict.fromkeys(
            ("jobs.sqlite", "jobs.sqlite-wal", "jobs.sqlite-shm"), 0o600
        )

"""LoRAs by HTTP: what is taken, under which name, and that a refused file leaves nothing behind."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest

from store.loras import StoredLoras
from tests.pure.dialect_kit import KEY, OTHER_KEY, Server, keys_file, serve
from tests.pure.engine_kit import TEST_MODELS
from tests.pure.test_loras import KOHYA, write


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with serve(tmp_path, models=("edit",), lora_max="1MiB") as made:
        yield made


@pytest.fixture
def lora(tmp_path: Path) -> bytes:
    data: bytes = write(tmp_path / "made.safetensors", KOHYA).read_bytes()
    return data


async def upload(server: Server, data: bytes, filename: str = "ink.safetensors", **more: str) -> httpx.Response:
    headers = {"x-api-key": more.pop("key")} if "key" in more else {}
    return await server.client.post(
        "/api/v1/lora/upload", files={"file": (filename, data)}, data=more, headers=headers
    )


async def names(server: Server) -> list[str]:
    told = (await server.client.get("/api/v1/lora/list")).json()["data"]
    assert told["total"] == len(told["loras"])
    return [one["name"] for one in told["loras"]]


def files(folder: Path) -> list[str]:
    return sorted(file.name for file in (folder / "outputs" / "loras").glob("*"))


async def test_upload_list_replace_and_remove(server: Server, lora: bytes, tmp_path: Path) -> None:
    told = (await upload(server, lora)).json()
    assert told["code"] == 200
    assert (told["data"]["name"], told["data"]["rank"], told["data"]["base"]) == ("ink", 8, "Stable Diffusion 1")
    assert told["data"]["size"] == len(lora) and (tmp_path / "outputs/loras/ink.safetensors").read_bytes() == lora
    await upload(server, lora)
    await upload(server, lora, name="墨 1.5")
    assert await names(server) == ["ink", "墨 1.5"]
    assert (await server.client.delete("/api/v1/lora/ink")).status_code == 200
    assert await names(server) == ["墨 1.5"]
    assert (await server.client.delete("/api/v1/lora/ink")).status_code == 404


@pytest.mark.parametrize("name", ["../../etc/x", "a/b", "..", ".hidden", "a\0b", "x" * 101, "水" * 80])
async def test_names_do_not_lead_out_of_the_folder(server: Server, lora: bytes, tmp_path: Path, name: str) -> None:
    answer = await upload(server, lora, name=name)
    assert answer.status_code == answer.json()["code"] == 422
    assert not files(tmp_path)
    assert (await server.client.delete(f"/api/v1/lora/{quote(name, safe='')}")).status_code in (404, 422)


async def test_of_a_file_s_own_name_only_the_last_part_counts(server: Server, lora: bytes, tmp_path: Path) -> None:
    await upload(server, lora, "../../ink.safetensors")
    await upload(server, lora, "C:\\loras\\oil.safetensors")
    assert files(tmp_path) == ["ink.safetensors", "oil.safetensors"]


async def test_what_is_no_lora_leaves_nothing(server: Server, lora: bytes, tmp_path: Path) -> None:
    for data, filename, status in (
        (b"PK\x03\x04" + bytes(100), "a.safetensors", 400), (lora[:-1], "a.safetensors", 400),
        (b"", "a.safetensors", 400), (lora, "a.ckpt", 422), (bytes(1 << 20) + b"x", "a.safetensors", 413),
    ):  # fmt: skip
        answer = await upload(server, data, filename)
        assert answer.status_code == answer.json()["code"] == status, answer.text
        assert str(tmp_path) not in answer.text
    assert not files(tmp_path) and await names(server) == []


async def test_a_broken_upload_does_not_replace_a_good_one(server: Server, lora: bytes, tmp_path: Path) -> None:
    await upload(server, lora)
    await upload(server, lora[:-1])
    assert (tmp_path / "outputs/loras/ink.safetensors").read_bytes() == lora


async def test_a_large_one_may_be_larger_than_an_image(tmp_path: Path, lora: bytes) -> None:
    async with serve(tmp_path, models=("edit",), max_body=1024, lora_max="1MiB") as server:
        assert len(lora) > 1024
        assert (await upload(server, lora)).status_code == 200
        assert (await upload(server, bytes(2 << 20))).status_code == 413


async def test_with_keys_only_those_who_pay_change_it(tmp_path: Path, lora: bytes) -> None:
    keys = keys_file(tmp_path, priority="paid")
    async with serve(tmp_path, models=("edit",), keys_file=keys) as server:
        assert (await upload(server, lora)).status_code == 401
        assert (await upload(server, lora, key=OTHER_KEY)).status_code == 403
        assert (await upload(server, lora, key=KEY)).status_code == 200
        gone = await server.client.delete("/api/v1/lora/ink", headers={"x-api-key": OTHER_KEY})
        assert gone.status_code == 403


async def test_none_are_taken_when_the_operator_says_so(tmp_path: Path, lora: bytes) -> None:
    async with serve(tmp_path, models=("edit",), lora_max=0) as server:
        assert (await upload(server, lora)).status_code in (403, 413)


async def test_models_are_told_where_they_lie(tmp_path: Path) -> None:
    async with serve(tmp_path, models_folder=TEST_MODELS, models=("paint", "edit")) as server:
        assert server.engine.catalogue["paint"].options["lora_folder"] == str(tmp_path / "outputs" / "loras")
        assert "lora_folder" not in server.engine.catalogue["edit"].options


async def test_what_a_dead_server_left_half_written_is_removed(tmp_path: Path, server: Server) -> None:
    folder = tmp_path / "left"
    folder.mkdir()
    (folder / f".{'0' * 32}").write_bytes(b"half")
    (folder / ".mine").write_bytes(b"a stranger's")
    StoredLoras(folder, 1, most=1, most_bytes=1, min_free=0)
    assert [file.name for file in folder.glob("*")] == [".mine"]

"""The folder of LoRAs under strangers' hands: bounded, looked into once, written once, and never a defect."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import struct
import tempfile
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

import store.files
import store.loras
from core.loras import LONGEST_HEADER, LoraFacts
from tests.pure.dialect_kit import Server, serve, until
from tests.pure.test_api_lora import files, names, upload
from tests.pure.test_loras import KOHYA, write

BOUNDARY = "edge"
TYPE = f"multipart/form-data; boundary={BOUNDARY}"


@pytest.fixture
def lora(tmp_path: Path) -> bytes:
    data: bytes = write(tmp_path / "made.safetensors", KOHYA).read_bytes()
    return data


class Looked:
    """Which files were looked into; while `free` is not set, whoever looks waits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.files: list[Path] = []
        self.now, self.most = 0, 0
        self.free = threading.Event()
        self.free.set()
        self._inspect = store.loras.inspect
        monkeypatch.setattr(store.loras, "inspect", self)

    def __call__(self, file: Path, *more: Any) -> LoraFacts:
        self.files.append(file)
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            assert self.free.wait(10)
            return self._inspect(file, *more)
        finally:
            self.now -= 1


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> Looked:
    return Looked(monkeypatch)


def server(folder: Path, **settings: Any) -> Any:
    return serve(folder, **{"models": ("edit",), "lora_max": "1MiB", "min_free_disk": 0, **settings})


def form(data: bytes, filename: str = "ink.safetensors") -> bytes:
    head = f'--{BOUNDARY}\r\ncontent-disposition: form-data; name="file"; filename="{filename}"\r\n\r\n'
    return head.encode() + data + f"\r\n--{BOUNDARY}--\r\n".encode()


async def send(server: Server, pieces: list[bytes], taken: list[int], **headers: str) -> httpx.Response:
    """An upload in pieces, without a length unless one is given. `taken`: what has been read of it."""

    async def body() -> AsyncIterator[bytes]:
        for number, piece in enumerate(pieces):
            taken.append(number)
            yield piece

    headers = {"content-type": TYPE, **headers}
    return await server.client.post("/api/v1/lora/upload", content=body(), headers=headers)


async def test_a_file_is_looked_into_once_as_long_as_it_stays_the_same(
    tmp_path: Path, lora: bytes, looked: Looked
) -> None:
    folder = tmp_path / "outputs" / "loras"
    async with server(tmp_path) as made:
        await upload(made, lora)
        folder.joinpath("own.safetensors").write_bytes(lora)
        folder.joinpath("broken.safetensors").write_bytes(b"no LoRA")
        looked.files.clear()
        for _ in range(3):
            assert await names(made) == ["ink", "own"]
        assert sorted(file.name for file in looked.files) == ["broken.safetensors", "own.safetensors"]
        write(folder / "broken.safetensors", KOHYA)
        folder.joinpath("own.safetensors").unlink()
        looked.files.clear()
        for _ in range(3):
            assert await names(made) == ["broken", "ink"]
        assert [file.name for file in looked.files] == ["broken.safetensors"]


async def test_lists_at_once_share_a_look_and_one_file_is_looked_into_at_a_time(
    tmp_path: Path, lora: bytes, looked: Looked
) -> None:
    folder = tmp_path / "outputs" / "loras"
    async with server(tmp_path) as made:
        await upload(made, lora)
        for number in range(5):
            folder.joinpath(f"own{number}.safetensors").write_bytes(lora)
        looked.files.clear()
        looked.free.clear()
        asked = [asyncio.create_task(names(made)) for _ in range(20)]
        asked += [asyncio.create_task(upload(made, lora, f"more{number}.safetensors")) for number in range(5)]
        await until(lambda: len(looked.files) == 1)
        folder.joinpath("late.safetensors").write_bytes(lora)
        asked.append(late := asyncio.create_task(names(made)))
        looked.free.set()
        await asyncio.gather(*asked)
        assert "late" in await late, "who asks later sees what was there when it asked"
        assert looked.most == 1 and len(looked.files) == len({*looked.files}) == 11


async def test_a_list_waits_for_no_upload(tmp_path: Path, lora: bytes, looked: Looked) -> None:
    async with server(tmp_path) as made:
        await upload(made, lora)
        looked.free.clear()
        asked = [asyncio.create_task(upload(made, lora, f"more{number}.safetensors")) for number in range(6)]
        await until(lambda: looked.now == 1)
        assert await names(made) == ["ink"] and looked.now == 1
        looked.free.set()
        await asyncio.gather(*asked)
        count = len(looked.files)
        assert len(await names(made)) == 7 and len(looked.files) == count, "what was checked is remembered"


async def test_who_uploads_many_holds_back_nobody_else_s(tmp_path: Path, lora: bytes, looked: Looked) -> None:
    folder, ended = tmp_path / "outputs" / "loras", []

    async def send_from(address: str, name: str) -> None:
        app = made.client._transport.app
        transport = httpx.ASGITransport(app, client=(address, 50_000))
        async with httpx.AsyncClient(transport=transport, base_url="http://pool") as client:
            made_here = SimpleNamespace(client=client)
            assert (await upload(made_here, lora, f"{name}.safetensors")).status_code == 200  # type: ignore[arg-type]
        ended.append(name)

    async with server(tmp_path) as made:
        looked.free.clear()
        many = [asyncio.create_task(send_from("10.0.0.1", f"many{number}")) for number in range(8)]
        await until(lambda: looked.now == 1 and len(list(folder.glob(".*"))) == 8)
        one = asyncio.create_task(send_from("10.0.0.2", "one"))
        await until(lambda: len(list(folder.glob(".*"))) == 9)
        for _ in range(20):
            await asyncio.sleep(0.001)
        looked.free.set()
        await asyncio.gather(*many, one)
    assert ended.index("one") <= 2, "behind the check under way and the one that waits"
    assert looked.most == 1


async def test_notes_that_are_a_list_are_refused(tmp_path: Path) -> None:
    text = b'{"__metadata__":[1,2]}'
    async with server(tmp_path) as made:
        answer = await upload(made, struct.pack("<Q", len(text)) + text)
        assert answer.status_code == answer.json()["code"] == 400 and "header" in answer.text
        assert not files(tmp_path)


async def test_a_header_longer_than_any_lora_needs_is_refused(tmp_path: Path) -> None:
    text = json.dumps({"__metadata__": {"a": "x" * LONGEST_HEADER}}).encode()
    async with server(tmp_path, lora_max="16MiB") as made:
        answer = await upload(made, struct.pack("<Q", len(text)) + text)
        assert answer.status_code == 400 and str(LONGEST_HEADER) in answer.text
        assert not files(tmp_path)


async def test_a_folder_that_is_full_takes_nothing_and_reads_nothing(tmp_path: Path, lora: bytes) -> None:
    async with server(tmp_path, lora_bytes=len(lora) + 1000) as made:
        assert (await upload(made, lora)).status_code == 200
        body, taken = form(bytes(200_000)), []
        announced = await send(made, [body], taken, **{"content-length": str(len(body))})
        assert announced.status_code == 507 and "--lora-bytes" in announced.text and not taken
        assert "retry-after" in announced.headers
        assert files(tmp_path) == ["ink.safetensors"]
        assert (await made.client.delete("/api/v1/lora/ink")).status_code == 200
        assert (await upload(made, lora)).status_code == 200


async def test_of_a_length_that_nobody_told_as_much_is_taken_as_there_is_room(tmp_path: Path) -> None:
    async with server(tmp_path, lora_bytes=100_000) as made:
        pieces, taken = [form(b"")[:-12], *[bytes(40_000)] * 10], []
        answer = await send(made, pieces, taken)
        assert answer.status_code == 507 and len(taken) == 4
        assert not files(tmp_path)


async def test_uploads_at_once_fill_one_folder(tmp_path: Path) -> None:
    stored = store.loras.StoredLoras(tmp_path / "loras", 1 << 20, most=9, most_bytes=100_000, min_free=0)
    stored.expect(60_000)
    stored.expect(60_000)
    first, second = stored.receive(), stored.receive()
    first.write(bytes(60_000))
    with pytest.raises(store.loras.StorageFull):
        second.write(bytes(60_000))
    first.close()
    second.write(bytes(60_000))
    second.close()
    assert not list((tmp_path / "loras").iterdir())


async def test_so_many_files_and_no_more(tmp_path: Path, lora: bytes) -> None:
    async with server(tmp_path, lora_files=2) as made:
        assert (await upload(made, lora, "a.safetensors")).status_code == 200
        assert (await upload(made, lora, "b.safetensors")).status_code == 200
        answer = await upload(made, lora, "c.safetensors")
        assert answer.status_code == 507 and "--lora-files" in answer.text
        assert files(tmp_path) == ["a.safetensors", "b.safetensors"]


async def test_of_uploads_at_once_no_more_are_kept_than_the_folder_may_hold(
    tmp_path: Path, lora: bytes, looked: Looked
) -> None:
    async with server(tmp_path, lora_files=2) as made:
        looked.free.clear()
        asked = [asyncio.create_task(upload(made, lora, f"{number}.safetensors")) for number in range(6)]
        await until(lambda: bool(looked.files))
        looked.free.set()
        answers = [answer.status_code for answer in await asyncio.gather(*asked)]
        assert set(answers) == {200, 507} and answers.count(200) == len(files(tmp_path)) <= 2


async def test_the_disk_s_reserve_is_left_alone(tmp_path: Path, lora: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def statvfs(folder: Path) -> SimpleNamespace:  # the disk on which the LoRAs lie is the full one
        return SimpleNamespace(f_bavail=300_000 if Path(folder) == tmp_path / "elsewhere" else 1 << 40, f_frsize=1)

    async with server(tmp_path, min_free_disk=150_000, lora_folder=tmp_path / "elsewhere") as made:
        monkeypatch.setattr(store.files.os, "statvfs", statvfs)
        body, taken = form(bytes(250_000)), []
        assert (await send(made, [body], taken, **{"content-length": str(len(body))})).status_code == 507
        assert not taken
        assert (await upload(made, lora)).status_code == 200


async def test_what_comes_is_written_once_and_where_it_will_live(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))  # a write there would fail
    folder, there = tmp_path / "outputs" / "loras", []
    notes = {f"layer{number}.lora_down.weight": [4, 70_000] for number in range(4)}
    data = write(tmp_path / "large.safetensors", notes).read_bytes()

    class Pieces(list[bytes]):
        def __iter__(self) -> Any:
            for piece in super().__iter__():
                yield piece
                there.append([(file.name[0], file.stat().st_size) for file in folder.iterdir()])

    body = form(data)
    pieces = Pieces(body[at : at + 500_000] for at in range(0, len(body), 500_000))
    async with server(tmp_path, lora_max="16MiB") as made:
        assert (await send(made, pieces, [])).status_code == 200
    sizes = [size for (sign, size), *more in there[:-1] if sign == "." and not more]
    assert len(sizes) >= 3 and sizes == sorted(sizes)
    assert files(tmp_path) == ["ink.safetensors"] and (folder / "ink.safetensors").read_bytes() == data
    assert stat.S_IMODE((folder / "ink.safetensors").stat().st_mode) == 0o600


@pytest.mark.parametrize("body", [
    lambda data: form(data)[:-30], lambda data: form(data).replace(b'name="file"', b'name="other"'),
    lambda data: form(data, "a.ckpt"), lambda data: b"", lambda data: b"\r\n" * 99,
])  # fmt: skip
async def test_a_form_that_is_refused_leaves_nothing(
    tmp_path: Path, lora: bytes, body: Callable[[bytes], bytes]
) -> None:
    async with server(tmp_path) as made:
        answer = await send(made, [body(lora)], [])
        assert answer.status_code in (400, 422) and not files(tmp_path)


@pytest.mark.parametrize("charset", ["charset=punycode", 'CHARSET="idna"'])
async def test_a_form_is_read_as_utf_8_alone(tmp_path: Path, lora: bytes, charset: str) -> None:
    async with server(tmp_path) as made:
        answer = await send(made, [form(lora)], [], **{"content-type": f"{TYPE}; {charset}"})
        assert answer.status_code == 415 and not files(tmp_path)


async def test_a_lora_that_is_replaced_by_one_of_its_size_and_time_is_another(tmp_path: Path, lora: bytes) -> None:
    stored = store.loras.StoredLoras(tmp_path, 1 << 20, most=9, most_bytes=1 << 20, min_free=0)
    file, other = tmp_path / "a.safetensors", tmp_path / "new"
    file.write_bytes(lora)
    ((before, _),) = [one for one in stored.list() if one[0].name == "a"]
    other.write_bytes(lora)
    os.utime(other, ns=(before.modified, before.modified))
    other.replace(file)
    assert stored._folder.get("a") != before

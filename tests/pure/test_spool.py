"""Bodies as they arrive: small ones in memory, large ones in files without names."""

from __future__ import annotations

import asyncio
import errno
import mmap
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from tempfile import SpooledTemporaryFile

import pytest

from api import spool
from api.spool import IN_MEMORY, Spool, collect, spooled
from core.errors import StorageFailed, StorageFull

PIECE = bytes(range(256)) * 1024  # 256 KiB


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def open_files(folder: Path) -> int:
    """How many files of that folder this process has open, those without a name too."""
    fds = list(Path("/proc/self/fd").iterdir())
    return sum(str(fd.readlink()).startswith(str(folder)) for fd in fds if fd.is_symlink())


def names(folder: Path) -> list[str]:
    return [file.name for file in folder.iterdir()]


async def pieces(count: int) -> AsyncIterator[bytes]:
    for number in range(count):
        yield bytes([number % 256]) + PIECE[1:]


async def test_a_small_body_stays_in_memory(folder: Path) -> None:
    with Spool() as body:
        await body.write(b"ab")
        await body.write(memoryview(b"cd"))
        assert body.size == 4
        assert await body.finish() == b"abcd"
    assert not open_files(folder)
    with Spool() as nothing:
        assert await nothing.finish() == b""


async def test_a_large_body_is_on_the_disk_while_it_comes_and_has_no_name(folder: Path) -> None:
    with Spool() as body:
        async for piece in pieces(30):
            await body.write(piece)
        assert open_files(folder) == 1
        assert names(folder) == []
        data = await body.finish()
    assert bytes(data) == b"".join([piece async for piece in pieces(30)])
    assert isinstance(data, mmap.mmap) and memoryview(data).readonly
    del data
    async with asyncio.timeout(10):
        while open_files(folder):  # noqa: ASYNC110 - until loop and thread have let go of it
            await asyncio.sleep(0.01)


async def test_an_ordinary_photograph_never_sees_the_disk(folder: Path) -> None:
    with Spool() as body:
        for _ in range(3):
            await body.write(bytes(1 << 20))
            assert not open_files(folder)
        assert await body.finish() == bytes(3 << 20)


async def test_what_is_not_finished_is_freed(folder: Path) -> None:
    with pytest.raises(KeyError), Spool() as body:
        await body.write(bytes(2 * IN_MEMORY))
        raise KeyError
    assert not open_files(folder)


async def test_a_body_is_collected_whole_at_every_size() -> None:
    for count in (0, 1, 4, 17, 30):
        assert bytes(await collect(pieces(count))) == b"".join([piece async for piece in pieces(count)])


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, StorageFull), (errno.EIO, StorageFailed)])
async def test_a_disk_that_refuses_has_its_own_word(
    number: int, kind: type[Exception], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(number, "no")

    monkeypatch.setattr(spool, "_write", refuse)
    with pytest.raises(kind) as caught:
        await collect(pieces(20))
    assert str(folder) not in str(caught.value)
    assert not open_files(folder)


@pytest.mark.parametrize("size", [10, 3 * IN_MEMORY])
def test_a_file_of_a_form_outlives_the_form(size: int, folder: Path) -> None:
    with SpooledTemporaryFile(max_size=IN_MEMORY) as file:
        file.write(PIECE[:10] * (size // 10))
        file.seek(0)
        data = spooled(file)
    assert data[:10] == PIECE[:10] and len(data) == size // 10 * 10
    assert names(folder) == []

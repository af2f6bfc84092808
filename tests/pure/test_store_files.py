"""The file store on a real folder: files appear whole or not at all, names never lead elsewhere, usage is exact."""

import errno
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import InternalError, JobNotFound, StorageFailed, StorageFull
from store.files import FileStore
from store.names import is_id
from tests.pure.store_kit import new_id

ID = "0f8b5c1e-52d3-4b0a-9f63-7c1d2e3f4a5b"  # a good one
HOSTILE = ["", "../etc", "%2e%2e%2fetc", "a\0b", "x" * 10_240, ID.upper(), ID + "\n", ID + "/..",
           "/" + ID, "\ud800", "00000000-0000-1000-8000-000000000000"]


@pytest.fixture
def files(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "outputs", min_free=0)


def everything(files: FileStore) -> dict[str, bytes]:
    return {str(path.relative_to(files.root)): path.read_bytes() for path in files.root.rglob("*") if path.is_file()}


def test_results_and_inputs_lie_where_the_layout_says(files):
    job = new_id()
    names = [
        files.put_result(job, "jpeg", b"result"),
        files.put_input(job, 0, "image", "png", memoryview(b"image")),
        files.put_input(job, 1, "mask", "webp", bytearray(b"mask")),
    ]
    assert names == [f"{job}.jpg", f"inputs/{job}/0-image.png", f"inputs/{job}/1-mask.webp"]
    assert everything(files) == dict(zip(names, [b"result", b"image", b"mask"], strict=True))
    assert [files.path(name).read_bytes() for name in names] == [b"result", b"image", b"mask"]


def test_all_inputs_of_a_request_are_kept_with_one_call(files):
    job = new_id()
    names = files.put_inputs(job, [("image", "png", b"a"), ("mask", "png", b"b"), ("image", "avif", b"c")])
    assert names == [f"inputs/{job}/0-image.png", f"inputs/{job}/1-mask.png", f"inputs/{job}/2-image.avif"]
    assert everything(files) == dict(zip(names, [b"a", b"b", b"c"], strict=True))
    assert files.put_inputs(new_id(), []) == []


def test_wide_memoryviews_are_written_by_their_bytes(files):
    assert files.path(files.put_result(new_id(), "png", memoryview(b"12345678").cast("Q"))).read_bytes() == b"12345678"


def test_a_file_is_flushed_before_it_is_named_and_its_folder_after(files, monkeypatch):
    """In this order power may fail at any point: a name never leads to a file that is not whole."""
    happened: list[str] = []

    def place(fd: int) -> str:
        path = Path(f"/proc/self/fd/{fd}").readlink().relative_to(files.root)
        return "temporary" if path.parts[:1] == ("tmp",) else str(path)

    flush, rename = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (happened.append(f"flush {place(fd)}"), flush(fd))[1])
    monkeypatch.setattr(Path, "replace", lambda old, new: (happened.append(f"name {new.name}"), rename(old, new))[1])
    job = new_id()
    files.put_result(job, "png", b"x")
    assert happened == ["flush temporary", f"name {job}.png", "flush ."]
    happened.clear()
    files.put_inputs(job, [("image", "png", b"x"), ("mask", "png", b"y")])
    assert happened == ["flush temporary", "flush temporary", "name 0-image.png", "name 1-mask.png",
                        f"flush inputs/{job}", "flush inputs"]


def test_short_writes_of_the_kernel_are_completed(files, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:7]))
    assert files.path(files.put_result(new_id(), "png", bytes(range(100)))).read_bytes() == bytes(range(100))


@pytest.mark.parametrize("job_id", HOSTILE)
def test_hostile_ids_are_refused_everywhere_and_touch_nothing(files, job_id):
    for attempt in (
        lambda: files.put_result(job_id, "png", b"x"),
        lambda: files.put_input(job_id, 0, "image", "png", b"x"),
        lambda: files.put_inputs(job_id, [("image", "png", b"x")]),
        lambda: files.delete(job_id),
        lambda: files.path(f"{job_id}.png"),
        lambda: files.path(f"inputs/{job_id}/0-image.png"),
    ):
        with pytest.raises(JobNotFound):
            attempt()
    assert everything(files) == {}


@pytest.mark.parametrize("name", ["", ".", "..", "/etc/passwd", "jobs.sqlite", ".lock", "tmp/1", "inputs", "a\0b",
                                  f"{ID}.png/../../x", f"inputs/{ID}/../../x.png", f"./{ID}.png",
                                  f"inputs/{ID}/0-image.sqlite", f"{ID}.png\n", "x" * 10_240])
def test_names_that_were_never_given_lead_nowhere(files, name):
    with pytest.raises(JobNotFound) as caught:
        files.path(name)
    assert str(files.root) not in caught.value.message


@given(st.text(alphabet="./%\\0123456789abcdef-imagesktpnoru\0\n", max_size=80))
def test_whatever_the_name_it_never_leaves_the_root(name):
    files = FileStore.__new__(FileStore)
    files.root = Path("/nowhere/root")
    try:
        path = files.path(name)
    except JobNotFound:
        return
    assert Path(os.path.normpath(path)) == path
    assert path.is_relative_to(files.root)


def test_unknown_formats_roles_and_numbers_are_refused(files):
    for attempt in (
        lambda: files.put_result(new_id(), "../png", b"x"),
        lambda: files.put_result(new_id(), "sqlite", b"x"),
        lambda: files.put_input(new_id(), 0, "../image", "png", b"x"),
        lambda: files.put_input(new_id(), -1, "image", "png", b"x"),
    ):
        with pytest.raises(InternalError):
            attempt()
    assert everything(files) == {}


def test_ids_are_uuid4_as_python_writes_them():
    assert all(is_id(new_id()) for _ in range(200))
    assert not any(is_id(hostile) for hostile in HOSTILE)


# --- room and usage ---------------------------------------------------------------------------------------------------


def test_usage_follows_every_write_replacement_and_removal_and_a_restart(files):
    job, other = new_id(), new_id()
    files.put_result(job, "png", b"x" * 100)
    files.put_input(job, 0, "image", "png", b"x" * 10)
    files.put_inputs(other, [("image", "png", b"x" * 7), ("mask", "png", b"x" * 3)])
    assert files.usage() == 120
    files.put_result(job, "png", b"x" * 40)
    assert files.usage() == 60
    assert FileStore(files.root).usage() == 60
    files.delete(job)
    assert files.usage() == 10
    files.delete(job)
    assert files.usage() == 10
    files.put_result(other, "png", b"x" * 4)
    files.delete_inputs(other)
    assert files.usage() == 4
    files.delete(other)
    assert files.usage() == 0
    assert everything(files) == {}
    assert list((files.root / "inputs").iterdir()) == []


def test_usage_stays_exact_when_threads_write_and_delete_at_once(files):
    def work():
        for n in range(10):
            job = new_id()
            files.put_inputs(job, [("image", "png", b"x" * n), ("mask", "png", b"x")])
            files.put_result(job, "png", b"x" * 5)
            files.put_result(job, "png", b"x" * 6)
            if n % 2:
                files.delete(job)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert files.usage() == sum(map(len, everything(files).values())) == 4 * sum(n + 7 for n in range(0, 10, 2))


def test_room_is_refused_when_the_disk_would_fall_under_its_reserve(files):
    free = os.statvfs(files.root).f_bavail * os.statvfs(files.root).f_frsize
    files.room(1_000)
    with pytest.raises(StorageFull) as caught:
        files.room(free + (1 << 40))
    assert caught.value.retry_after
    files.min_free = free + (1 << 40)
    with pytest.raises(StorageFull):
        files.room()


def test_room_is_refused_beyond_the_bound_and_given_again_after_removal(tmp_path):
    files = FileStore(tmp_path, min_free=0, max_bytes=100)
    job = new_id()
    files.put_result(job, "png", b"x" * 60)
    files.room(40)
    with pytest.raises(StorageFull):
        files.room(41)
    files.delete(job)
    files.room(100)


# --- faults -----------------------------------------------------------------------------------------------------------


def refusing(number: int, after: int = 0):
    """A stand-in for a system call: refuses with that errno after so many calls, which are lost."""
    calls = iter(range(10**6))

    def call(*arguments, **keywords):
        if next(calls) >= after:
            raise OSError(number, os.strerror(number), "/secret/path")
        return os.stat_result.n_fields

    return call


@pytest.mark.parametrize(("number", "error"), [
    (errno.ENOSPC, StorageFull), (errno.EDQUOT, StorageFull), (errno.EFBIG, StorageFull),
    (errno.EIO, StorageFailed), (errno.EROFS, StorageFailed), (errno.EMFILE, StorageFailed),
])
@pytest.mark.parametrize(("call", "after"), [
    ("os.write", 0), ("os.open", 0), ("os.fsync", 0), ("os.fsync", 1), ("os.fsync", 2), ("os.fsync", 3),
    ("pathlib.Path.replace", 0), ("pathlib.Path.mkdir", 0),
])
def test_a_refusal_at_any_step_is_told_and_leaves_no_part_of_a_file(files, monkeypatch, number, error, call, after):
    old = new_id()
    files.put_result(old, "png", b"before")
    before = everything(files)
    with monkeypatch.context() as patch:
        patch.setattr(call, refusing(number, after))
        with pytest.raises(error) as caught:
            files.put_inputs(new_id(), [("image", "png", b"x"), ("mask", "png", b"y")])
    assert "/secret" not in caught.value.message
    assert everything(files) == before
    assert files.usage() == len(b"before")
    assert list((files.root / "inputs").iterdir()) == []
    files.put_inputs(new_id(), [("image", "png", b"x")])


def test_a_result_that_could_not_be_replaced_is_the_old_one_whole(files, monkeypatch):
    job = new_id()
    files.put_result(job, "png", b"first")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refusing(errno.ENOSPC))
        with pytest.raises(StorageFull):
            files.put_result(job, "png", b"second")
    assert everything(files) == {f"{job}.png": b"first"}
    assert files.usage() == 5


def test_a_folder_that_cannot_be_made_stops_the_start_with_a_sentence(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageFailed) as caught:
        FileStore(tmp_path / "file" / "outputs")
    assert str(tmp_path) not in caught.value.message


# --- sweep ------------------------------------------------------------------------------------------------------------


def test_a_sweep_removes_leftovers_moves_orphans_and_touches_nothing_else(files):
    known, orphan = new_id(), new_id()
    for job in (known, orphan):
        files.put_result(job, "png", b"result")
        files.put_inputs(job, [("image", "png", b"image")])
    (files.root / "tmp" / "1").write_bytes(b"half a fi")
    (files.root / "tmp" / "folder").mkdir()
    strangers = {"README.md": b"words", "jobs.sqlite": b"jobs", "jobs.sqlite-wal": b"wal", ".lock": b"1",
                 f"{orphan}.txt": b"mine", "inputs/notes": b"mine"}
    for name, data in strangers.items():
        (files.root / name).write_bytes(data)
    assert files.sweep({known}) == (2, 2)
    assert everything(files) == strangers | {
        f"{known}.png": b"result", f"inputs/{known}/0-image.png": b"image",
        f"orphans/{orphan}/{orphan}.png": b"result", f"orphans/{orphan}/0-image.png": b"image",
    }
    assert not (files.root / "inputs" / orphan).exists()
    assert list((files.root / "tmp").iterdir()) == []
    assert files.usage() == len(b"result") + len(b"image")
    assert files.sweep({known}) == (0, 0)


def test_a_sweep_removes_inputs_of_jobs_that_ended_before_a_crash(files):
    ended, waiting = new_id(), new_id()
    for job in (ended, waiting):
        files.put_result(job, "png", b"result")
        files.put_inputs(job, [("image", "png", b"image"), ("mask", "png", b"mask")])
    assert files.sweep({ended, waiting}, waiting={waiting}) == (2, 0)
    assert sorted(everything(files)) == sorted([
        f"{ended}.png", f"{waiting}.png", f"inputs/{waiting}/0-image.png", f"inputs/{waiting}/1-mask.png"])
    assert not (files.root / "inputs" / ended).exists()


def test_a_sweep_follows_no_link_out_of_the_root(files, tmp_path):
    treasure = tmp_path / "treasure"
    treasure.mkdir()
    (treasure / "0-image.png").write_bytes(b"gold")
    (files.root / "inputs" / new_id()).symlink_to(treasure)
    (files.root / f"{new_id()}.png").symlink_to(treasure / "0-image.png")
    (files.root / "tmp" / "link").symlink_to(treasure)
    files.sweep(set())
    assert (treasure / "0-image.png").read_bytes() == b"gold"
    assert files.usage() == 0

"""A database that is missing, damaged, cut or gone: nothing is deleted, what was told comes back, and it is said."""

from __future__ import annotations

import io
import json
import os
import shutil
import sqlite3
from pathlib import Path

import pytest
from PIL import Image

from core.errors import StorageFailed, StorageFull
from core.job import Job
from core.states import State
from store import codec
from store.files import FileStore
from store.jobs import JobStore
from store.lock import LOCK, FolderLock
from store.orphans import Orphans
from store.recovery import Found, open_jobs, recover
from store.retention import expired
from tests.pure.store_kit import WAIT, a_job, finish, put, rows


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (7, 5)).save(file, "PNG")
    return file.getvalue()


def accept(store: JobStore, files: FileStore, told: bool = True, inserted: bool = True, **request: object) -> Job:
    """A job as the keeper accepts it, as far as that has come."""
    job = a_job(**request)
    files.put_inputs(job.id, [("image", "png", b"image")], lambda _: json.dumps(codec.encode(job, "print")).encode())
    if inserted:
        put(store, job, "print")
    if told:
        files.tell(job.id)
    return job


def end(store: JobStore, files: FileStore, job: Job) -> Job:
    files.put_result(job.id, "png", png())
    store.save(finish(job)).result(WAIT)
    files.delete_inputs(job.id)
    return job


def opened(root: Path) -> tuple[JobStore, FileStore, Found]:
    files = FileStore(root, min_free=0)
    store, found = open_jobs(files)
    return store, files, recover(store, files, found)


def crash(store: JobStore, root: Path, to: Path) -> Path:
    """The folder as SIGKILL would leave it, with all commits in the -wal file."""
    shutil.copytree(root, to)
    store.close()
    return to


def lose(root: Path) -> None:
    for name in ("jobs.sqlite", "jobs.sqlite-wal", "jobs.sqlite-shm"):
        (root / name).unlink(missing_ok=True)


def orphans(root: Path) -> set[str]:
    return {str(file.relative_to(root / "orphans")) for file in (root / "orphans").rglob("*") if file.is_file()}


def test_a_new_folder_and_a_healthy_one_have_nothing_to_tell(tmp_path):
    store, files, found = opened(tmp_path)
    assert found.told() is None
    waits, done = accept(store, files), end(store, files, accept(store, files))
    store.close()
    store, files, found = opened(tmp_path)
    assert (found.told(), [job.id for job in found.jobs]) == (None, [waits.id])
    assert files.path(done.result.data).exists() and not (tmp_path / "orphans").exists()
    store.close()


def test_without_its_database_a_start_rebuilds_what_waited_and_deletes_nothing(tmp_path):
    store, files, _ = opened(tmp_path)
    waits = [accept(store, files, idempotency_key=str(n)) for n in range(3)]
    done = end(store, files, accept(store, files))
    store.close()
    lose(tmp_path)
    store, files, found = opened(tmp_path)
    assert found.jobs == waits == store.unfinished(), "in their order, and with all they were asked"
    assert store.find_key("anonymous", "1") == (waits[1].id, "print")
    assert (found.rebuilt, found.moved) == (3, 1)
    assert orphans(tmp_path) == {f"{done.id}/{done.id}.png"}
    assert "MISSING" in found.told() and "orphans" in found.told() and str(tmp_path) not in found.told()
    store.close()
    store, _, found = opened(tmp_path)
    assert found.told() is None and found.jobs == waits, "a second start has nothing to do"
    store.close()


def test_a_wal_cut_to_half_costs_no_accepted_job(tmp_path):
    store, files, _ = opened(tmp_path / "live")
    done = [end(store, files, accept(store, files)) for _ in range(10)]
    waits = [accept(store, files) for _ in range(45)]
    dead = crash(store, tmp_path / "live", tmp_path / "dead")
    wal = dead / "jobs.sqlite-wal"
    os.truncate(wal, wal.stat().st_size // 2)
    store, _, found = opened(dead)
    assert [job.id for job in found.jobs] == [job.id for job in waits]
    assert found.rebuilt > 10 and "LOST JOBS" in found.told()
    known = {id_ for id_, _, _ in store.kept()}
    kept = {job.id for job in done if (dead / f"{job.id}.png").exists()}
    assert kept | {Path(name).parts[0] for name in orphans(dead)} == {job.id for job in done}
    assert kept <= known
    store.close()


def test_a_job_whose_end_was_lost_but_whose_result_is_there_has_succeeded(tmp_path):
    store, files, _ = opened(tmp_path)
    job = accept(store, files)
    files.put_result(job.id, "png", png())
    files.delete_inputs(job.id)  # its end was stored before that, and then cut off
    store.close()
    store, files, found = opened(tmp_path)
    assert (found.jobs, found.ended) == ([], 1)
    again = store.load(job.id)
    assert again.state is State.SUCCEEDED and again.result.data == f"{job.id}.png"
    assert (again.result.width, again.result.height, again.result.format) == (7, 5, "png")
    store.close()


def test_jobs_that_were_never_told_or_were_deleted_do_not_come_back(tmp_path):
    store, files, _ = opened(tmp_path)
    untold = accept(store, files, told=False, inserted=False)
    ended = end(store, files, accept(store, files))
    store.delete([ended.id]).result(WAIT)  # and the server died before it could remove the files
    store.close()
    store, files, found = opened(tmp_path)
    assert (found.jobs, found.rebuilt, found.moved) == ([], 0, 3)
    assert orphans(tmp_path) == {f"{untold.id}/0-image.png", f"{untold.id}/record.new", f"{ended.id}/{ended.id}.png"}
    assert not list((tmp_path / "inputs").iterdir())
    store.close()


def test_a_job_that_died_before_it_was_told_is_told_by_the_next_start(tmp_path):
    store, files, _ = opened(tmp_path)
    job = accept(store, files, told=False)
    store.close()
    opened(tmp_path)[0].close()
    lose(tmp_path)
    store, _, found = opened(tmp_path)
    assert [each.id for each in found.jobs] == [job.id]
    store.close()


def test_a_damaged_page_costs_its_rows_and_of_those_nothing_that_waits(tmp_path):
    store, files, _ = opened(tmp_path)
    done = [end(store, files, accept(store, files)) for _ in range(60)]
    waits = [accept(store, files) for _ in range(60)]
    store.close()
    database = tmp_path / "jobs.sqlite"
    with sqlite3.connect(database) as db:
        page = db.execute("PRAGMA page_size").fetchone()[0]
        pages = db.execute("PRAGMA page_count").fetchone()[0]
    db.close()
    with database.open("r+b") as file:  # in the middle lie rows and indexes
        file.seek(page * (pages // 2))
        file.write(b"\xa5" * page * 3)
    store, files, found = opened(tmp_path)
    assert {job.id for job in found.jobs} == {job.id for job in waits}
    assert found.rows > 30 and "DAMAGED" in found.told()
    kept = {id_ for id_, _, _ in store.kept()}
    for job in done:
        place = tmp_path / f"{job.id}.png" if job.id in kept else tmp_path / "orphans" / job.id / f"{job.id}.png"
        assert place.exists()
    assert any(name.startswith("database-") and name.endswith("jobs.sqlite") for name in orphans(tmp_path))
    store.close()


@pytest.mark.parametrize("garbage", [b"", b"no database, only text long enough to be read " * 100, b"\0" * 8192])
def test_a_file_that_is_no_database_is_put_aside_and_its_jobs_come_back(tmp_path, garbage):
    store, files, _ = opened(tmp_path)
    waits = accept(store, files)
    store.close()
    (tmp_path / "jobs.sqlite").write_bytes(garbage)
    store, _, found = opened(tmp_path)
    assert [job.id for job in found.jobs] == [waits.id] and found.told()
    store.close()


def test_a_record_that_is_not_whole_is_moved_with_its_inputs(tmp_path):
    store, files, _ = opened(tmp_path)
    job = accept(store, files)
    store.close()
    lose(tmp_path)
    os.truncate(tmp_path / "inputs" / job.id / "record.json", 100)
    store, _, found = opened(tmp_path)
    assert (found.jobs, found.moved) == ([], 2)
    store.close()


def test_a_disk_without_room_to_move_orphans_does_not_keep_a_start_from_its_work(tmp_path, monkeypatch):
    store, files, _ = opened(tmp_path)
    waits, untold = accept(store, files), accept(store, files, told=False, inserted=False)
    store.close()
    with monkeypatch.context() as full:
        full.setattr(Orphans, "place", lambda *_: (_ for _ in ()).throw(StorageFull("the disk is full")))
        store, _, found = opened(tmp_path)
    assert ([job.id for job in found.jobs], found.moved) == ([waits.id], 0)
    assert (tmp_path / "inputs" / untold.id / "0-image.png").exists()
    store.close()
    store, _, found = opened(tmp_path)
    assert found.moved == 2
    store.close()


def test_orphans_obey_retention(tmp_path):
    files = FileStore(tmp_path, min_free=0)
    for name, at in (("old", 1_000.0), ("new", 9_000.0)):
        (files.orphans.place(name) / "a.png").write_bytes(b"x" * 10)
        os.utime(tmp_path / "orphans" / name, (at, at))
    assert sorted(files.orphans.kept()) == [("orphans/new", 9_000.0, 10), ("orphans/old", 1_000.0, 10)]
    for name in expired(files.orphans.kept(), 10_000.0, 5_000.0, None):
        files.orphans.delete(name)
    assert orphans(tmp_path) == {"new/a.png"}


# --- while it runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gone", [("",), ("", "-wal", "-shm"), ("-wal",), ("-wal", "-shm")])
def test_a_database_that_was_unlinked_while_it_ran_is_made_again_with_all_that_was_in_it(tmp_path, gone):
    store, files, _ = opened(tmp_path)
    jobs = [put(store, a_job()) for _ in range(10)]
    reader = store._readers.connect()  # somebody reads meanwhile
    reader.exec_driver_sql("SELECT id FROM jobs").fetchone()
    assert not store.is_gone()
    for ending in gone:
        (tmp_path / f"jobs.sqlite{ending}").unlink()
    jobs.append(put(store, a_job()))  # written, and told, to a file that nobody finds again
    assert store.is_gone()
    store.make_again(files.temporary(), files.orphans.take_database)
    jobs.append(put(store, a_job()))
    reader.close()
    jobs.append(put(store, a_job()))
    assert not store.is_gone() and store.unfinished() == jobs
    assert rows(tmp_path / "jobs.sqlite") == [job.id for job in jobs]
    store.close()
    assert rows(tmp_path / "jobs.sqlite") == [job.id for job in jobs]


def test_another_database_in_the_place_of_ours_is_put_aside(tmp_path):
    store, files, _ = opened(tmp_path)
    job = put(store, a_job())
    lose(tmp_path)
    (tmp_path / "jobs.sqlite").write_bytes(b"a stranger's")
    assert store.is_gone()
    store.make_again(files.temporary(), files.orphans.take_database)
    assert rows(tmp_path / "jobs.sqlite") == [job.id]
    (name,) = orphans(tmp_path)
    assert (tmp_path / "orphans" / name).read_bytes() == b"a stranger's"
    store.close()


def test_a_database_that_is_gone_does_not_come_back_empty(tmp_path):
    store, _, _ = opened(tmp_path)
    put(store, a_job())
    lose(tmp_path)
    store._engine.dispose()  # as after a fault of the disk
    with pytest.raises(StorageFailed):
        store.insert(a_job()).result(WAIT)
    assert not (tmp_path / "jobs.sqlite").exists()
    store.close()


def test_a_lock_that_was_removed_is_taken_anew(tmp_path):
    with FolderLock(tmp_path) as lock:
        assert not lock.renew()
        (tmp_path / LOCK).unlink()
        assert lock.renew() and not lock.renew()
        with pytest.raises(StorageFailed, match="another server"):
            FolderLock(tmp_path)
        (tmp_path / LOCK).unlink()
        with FolderLock(tmp_path), pytest.raises(StorageFailed, match="another server"):
            lock.renew()
        assert lock.renew(), "when the other is gone"


def test_folders_that_were_removed_are_made_again(tmp_path):
    files = FileStore(tmp_path, min_free=0)
    (tmp_path / "tmp").rmdir()
    (tmp_path / "inputs").rmdir()
    assert files.make_folders() == ["inputs", "tmp"] and files.make_folders() == []
    files.put_inputs(a_job().id, [("image", "png", b"x")])

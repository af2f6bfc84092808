"""The store on a disk that is really full, really limited or really read-only."""

import os
import pwd
from pathlib import Path

import pytest

from core.errors import StorageFull
from store.files import FileStore
from store.jobs import JobStore
from tests.process.store_kit_process import run, small_disk
from tests.pure.store_kit import WAIT, a_job, finish, put


def ballast(folder: Path) -> Path:
    """Fills the disk to the last byte."""
    file = folder / "ballast"
    with file.open("wb", buffering=0) as stream:
        for size in (65_536, 1):
            try:
                while stream.write(b"x" * size):
                    pass
            except OSError:
                pass
    return file


def test_a_full_disk_refuses_jobs_keeps_the_accepted_ones_and_recovers_when_there_is_room(tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        store = JobStore(disk / "jobs.sqlite")
        kept = [put(store, a_job()) for _ in range(5)]
        room = ballast(disk)
        refused = 0
        for _ in range(300):  # what SQLite holds in reserve may take a few
            fault = store.insert(job := a_job()).exception(WAIT)
            if fault is None:
                kept.append(job)
            else:
                assert isinstance(fault, StorageFull), fault
                assert str(disk) not in fault.message
                refused += 1
        assert refused > 100
        assert store.unfinished() == kept
        kept[0].progress = 0.5
        assert isinstance(store.save(kept[0]).exception(WAIT), StorageFull)
        room.unlink()
        store.save(kept[0]).result(WAIT)
        kept.append(put(store, a_job()))
        assert store.unfinished() == kept
        store.close()
        store = JobStore(disk / "jobs.sqlite")
        assert store.unfinished() == kept
        store.close()


def test_a_store_on_a_disk_that_is_full_from_the_start_says_full(tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        room = ballast(disk)
        with pytest.raises(StorageFull):
            JobStore(disk / "jobs.sqlite")
        room.unlink()
        store = JobStore(disk / "jobs.sqlite")
        job = put(store, a_job())
        store.close()
        room = ballast(disk)
        with pytest.raises(StorageFull):
            store = JobStore(disk / "jobs.sqlite")
        room.unlink()
        store = JobStore(disk / "jobs.sqlite")
        assert store.unfinished() == [job]
        store.close()


def test_a_crash_on_a_full_disk_keeps_what_was_accepted(tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        said = run("""
store = JobStore(root / "jobs.sqlite")
while True:
    job = a_job(params={"prompt": "x" * 3000})
    fault = store.insert(job).exception(WAIT)
    if fault:
        assert isinstance(fault, StorageFull), fault
        say(type(fault).__name__)
        os._exit(0)
    say(job.id)
""", disk)
        assert said[-1] == "StorageFull"
        (disk / "jobs.sqlite-shm").unlink()  # as after a restart of the machine
        store = JobStore(disk / "jobs.sqlite")
        assert {job_id for job_id, _, _ in store.kept()} == set(said[:-1])
        store.close()


def test_files_on_a_full_disk_are_refused_whole_and_accepted_again_after_removal(tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        files = FileStore(disk, min_free=0)
        jobs = []
        with pytest.raises(StorageFull):
            while True:
                job = a_job()
                files.put_inputs(job.id, [("image", "png", b"x" * 150_000), ("mask", "png", b"y" * 150_000)])
                jobs.append(job.id)
        assert 3 <= len(jobs) <= 7
        with pytest.raises(StorageFull):
            files.put_result(jobs[0], "png", b"z" * 2_000_000)
        assert list((disk / "tmp").iterdir()) == []
        assert sorted(folder.name for folder in (disk / "inputs").iterdir()) == sorted(jobs)
        assert files.usage() == 300_000 * len(jobs) == FileStore(disk, min_free=0).usage()
        files.delete(jobs[0])
        files.put_result(jobs[1], "png", b"z" * 200_000)


def test_room_refuses_before_the_disk_does(tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        files = FileStore(disk, min_free=1_000_000)
        files.room(500_000)
        with pytest.raises(StorageFull):
            files.room(1_500_000)
        store = JobStore(disk / "jobs.sqlite")
        with pytest.raises(StorageFull):
            while True:
                files.room(100_000)
                job = a_job()
                files.put_inputs(job.id, [("image", "png", b"x" * 100_000)])
                put(store, job)
        for job in store.unfinished():  # the reserve is there so that these can end
            files.put_result(job.id, "png", b"y" * 20_000)
            store.save(finish(job)).result(WAIT)
        assert store.unfinished() == []
        store.close()


def test_writes_that_fail_in_the_middle_of_a_file_are_told_and_survived(tmp_path):
    """The kernel's limit on file sizes makes real writes fail, also where no disk may be mounted."""
    said = run("""
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store, files = JobStore(root / "jobs.sqlite"), FileStore(root, min_free=0)
kept = [put(store, a_job()) for _ in range(5)]
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, ((root / "jobs.sqlite-wal").stat().st_size + 5000, hard))
refused = set()
for job in [a_job(params={"prompt": "x" * 20_000}) for _ in range(8)]:
    if fault := store.insert(job).exception(WAIT):
        refused.add(type(fault).__name__)
    else:
        kept.append(job)  # the log of writes may have begun anew
say("jobs", *refused)
try:
    files.put_result(kept[0].id, "png", b"x" * 1_000_000)
except ImagePoolError as fault:
    say("files", type(fault).__name__, files.usage(), len(list((root / "tmp").iterdir())))
assert store.unfinished() == kept
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
kept.append(put(store, a_job(params={"prompt": "x" * 20_000})))
files.put_result(kept[0].id, "png", b"x" * 1_000_000)
assert store.unfinished() == kept
store.close()
store = JobStore(root / "jobs.sqlite")
assert store.unfinished() == kept
say("whole")
""", tmp_path)
    assert said[0] in ("jobs StorageFailed", "jobs StorageFull")
    assert said[1:] == ["files StorageFull 0 0", "whole"]


def test_a_read_only_folder_stops_the_start_with_a_sentence_and_no_path(tmp_path):
    folder = tmp_path / "outputs"
    store = JobStore(folder_made(folder) / "jobs.sqlite")
    put(store, a_job())
    store.close()
    nobody = pwd.getpwnam("nobody").pw_uid if os.getuid() == 0 else os.getuid()
    for path in (folder, *folder.iterdir()):
        path.chmod(0o555)
    for parent in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        if os.getuid() == 0:
            parent.chmod(0o755)
    said = run("""
if os.getuid() == 0:
    os.setuid(int(sys.argv[2]))
for start in (lambda: JobStore(root / "jobs.sqlite"), lambda: FileStore(root), lambda: FolderLock(root)):
    try:
        start()
    except StorageFailed as fault:
        say("StorageFailed", str(root) in fault.message)
""", folder, nobody)
    assert said == ["StorageFailed False"] * 3
    folder.chmod(0o755)


def folder_made(folder: Path) -> Path:
    folder.mkdir()
    return folder

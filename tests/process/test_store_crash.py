"""The store after SIGKILL and power loss: what was acknowledged is there, everything else is whole or gone."""

import os
import random
import shutil
import signal
import sqlite3
from pathlib import Path

import pytest

from core.states import State
from store.files import FileStore
from store.jobs import JobStore
from tests.process.store_kit_process import program
from tests.pure.store_kit import a_job, finish, put, rows

INSERT_FOR_EVER = """
store = JobStore(root / "jobs.sqlite")
files = FileStore(root, min_free=0)

def work():
    while True:
        job = a_job()
        files.put_inputs(job.id, [("image", "png", b"x" * 1000)])
        put(store, job)
        say("accepted", job.id)
        files.put_result(job.id, "png", b"y" * 500)
        store.save(finish(job)).result(WAIT)
        say("ended", job.id)

for _ in range(6):
    threading.Thread(target=work).start()
"""


@pytest.mark.parametrize("lines", [1, 40, 150, 400, 900])
def test_after_sigkill_every_acknowledged_job_is_there(tmp_path, lines):
    with program(INSERT_FOR_EVER, tmp_path) as process:
        said = [process.stdout.readline() for _ in range(lines)]
        os.kill(process.pid, signal.SIGKILL)
        said += process.stdout.readlines()
    told = [line.split() for line in said if line.endswith("\n")]
    accepted = {words[1] for words in told if words[0] == "accepted"}
    ended = {words[1] for words in told if words[0] == "ended"}
    assert len(told) >= lines

    store, files = JobStore(tmp_path / "jobs.sqlite"), FileStore(tmp_path, min_free=0)
    stored = {job_id for job_id, _, _ in store.kept()}
    assert accepted <= stored
    files.sweep(stored)
    assert list((tmp_path / "tmp").iterdir()) == []
    for job_id in accepted:
        job = store.load(job_id)
        assert files.path(job.request.images[0].data).read_bytes() == b"x" * 1000
        if job_id in ended:
            assert job.state is State.SUCCEEDED
        if job.state is State.SUCCEEDED:
            assert files.path(job.result.data).read_bytes() == b"y" * 500
    succeeded = set(rows(tmp_path / "jobs.sqlite", "SELECT id FROM jobs WHERE state = 'succeeded'"))
    assert {job.id for job in store.unfinished()} == stored - succeeded
    put(store, a_job())
    store.close()


def crashed(tmp_path: Path) -> tuple[Path, list[str]]:
    """A copy of a database as SIGKILL would leave it: ten jobs, each its own commit, all still in the -wal file."""
    store = JobStore(tmp_path / "live.sqlite")
    ids = [put(store, a_job()).id for _ in range(10)]
    for suffix in ("", "-wal"):
        shutil.copyfile(tmp_path / f"live.sqlite{suffix}", tmp_path / f"dead.sqlite{suffix}")
    store.close()
    return tmp_path / "dead.sqlite", ids


def recovered(database: Path) -> list[str]:
    store = JobStore(database)
    ids = [job.id for job in store.unfinished()]
    new = put(store, a_job())
    assert store.load(new.id) == new
    store.close()
    with sqlite3.connect(database) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    db.close()
    return ids


def test_a_whole_wal_is_recovered(tmp_path):
    database, ids = crashed(tmp_path)
    assert recovered(database) == ids


def test_garbage_after_the_last_record_costs_nothing(tmp_path):
    database, ids = crashed(tmp_path)
    with Path(f"{database}-wal").open("ab") as wal:
        wal.write(random.Random(1).randbytes(10_000))
    assert recovered(database) == ids


@pytest.mark.parametrize("cut", [1, 100, 4_000, 5_000, 20_000, 40_000])
def test_a_torn_last_record_costs_only_what_was_not_yet_told(tmp_path, cut):
    """Cutting into the -wal file undoes whole commits from its end, never half of one and never one before."""
    database, ids = crashed(tmp_path)
    wal = Path(f"{database}-wal")
    os.truncate(wal, wal.stat().st_size - cut)
    left = recovered(database)
    assert left == ids[: len(left)]
    assert len(left) < 10
    assert left or cut > 5_000


def test_a_record_overwritten_with_garbage_ends_the_history_before_it(tmp_path):
    database, ids = crashed(tmp_path)
    wal = Path(f"{database}-wal")
    with wal.open("r+b") as file:
        file.seek(wal.stat().st_size - 3_000)
        file.write(b"\xa5" * 3_000)
    left = recovered(database)
    assert left == ids[: len(left)]
    assert 0 < len(left) < 10


def test_an_end_that_was_saved_twice_around_a_crash_is_one_end(tmp_path):
    store = JobStore(tmp_path / "jobs.sqlite")
    job = put(store, a_job())
    store.save(finish(job)).result(30)
    store.close()
    store = JobStore(tmp_path / "jobs.sqlite")
    store.save(job).result(30)
    assert store.counts()[State.SUCCEEDED] == 1
    assert store.load(job.id) == job
    store.close()

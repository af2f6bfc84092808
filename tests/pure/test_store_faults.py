"""The job store when the disk, a stranger or an older server stands in its way: it says so, loses nothing, goes on."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import event

from core.errors import StorageFailed, StorageFull
from store import schema
from store.jobs import JobStore
from tests.pure.store_kit import WAIT, a_job, held, put, rows


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "jobs.sqlite"


@pytest.fixture
def store(database: Path) -> Iterator[JobStore]:
    store = JobStore(database, busy_timeout=20.0)
    yield store
    store.close()


# --- faults -----------------------------------------------------------------------------------------------------------


def test_a_database_that_finds_no_room_says_full_loses_nothing_and_recovers(store):
    kept = [put(store, a_job()) for _ in range(3)]
    with store._engine.connect() as db:
        pages = db.exec_driver_sql("PRAGMA page_count").scalar()
        db.exec_driver_sql(f"PRAGMA max_page_count = {pages + 2}")
    for _ in range(3):
        with pytest.raises(StorageFull) as caught:
            store.insert(a_job(params={"prompt": "x" * 60_000})).result(WAIT)
        assert caught.value.retry_after
    small = [put(store, a_job())]  # a big one that does not fit does not keep out a small one
    assert store.unfinished() == kept + small
    with store._engine.connect() as db:
        db.exec_driver_sql("PRAGMA max_page_count = 1000000")
    big = put(store, a_job(params={"prompt": "x" * 60_000}))
    assert store.load(big.id) == big


def test_a_big_write_without_room_does_not_fail_the_small_ones_of_its_commit(store, database):
    put(store, a_job())
    with store._engine.connect() as db:
        pages = db.exec_driver_sql("PRAGMA page_count").scalar()
        db.exec_driver_sql(f"PRAGMA max_page_count = {pages + 2}")
    with held(store):
        small = [store.insert(a_job())]
        big = store.insert(a_job(params={"prompt": "x" * 60_000}))
        small.append(store.insert(a_job()))
    for future in small:
        future.result(WAIT)
    with pytest.raises(StorageFull):
        big.result(WAIT)


def test_a_winner_that_found_no_room_leaves_its_key_to_the_next(store, database):
    put(store, a_job())
    with store._engine.connect() as db:
        pages = db.exec_driver_sql("PRAGMA page_count").scalar()
        db.exec_driver_sql(f"PRAGMA max_page_count = {pages + 2}")
    with held(store):
        big = store.insert(a_job(idempotency_key="k", params={"prompt": "x" * 60_000}), "f")
        small = store.insert(job := a_job(idempotency_key="k"), "f")
    assert isinstance(big.exception(WAIT), StorageFull)
    assert small.exception(WAIT) is None
    assert store.find_key("anonymous", "k") == (job.id, "f")


def test_after_a_refusal_the_database_is_opened_anew(database):
    store = JobStore(database, busy_timeout=0.01)
    with held(store), pytest.raises(StorageFailed):
        store.insert(a_job()).result(WAIT)
    opened = []
    event.listen(store._engine, "connect", lambda connection, _: opened.append(connection))
    put(store, a_job())
    put(store, a_job())
    assert len(opened) == 1
    store.close()


def test_a_stranger_who_holds_the_database_too_long_fails_the_write_and_not_the_store(database):
    store = JobStore(database, busy_timeout=0.01)
    with held(store), pytest.raises(StorageFailed, match="SQLITE_BUSY"):
        store.insert(a_job()).result(WAIT)
    put(store, a_job())
    store.close()


@pytest.mark.parametrize("garbage", [b"not a database, only text that is long enough to be read " * 100, b"\0" * 8192])
def test_a_file_that_is_no_database_stops_the_start_with_a_sentence(database, garbage):
    database.write_bytes(garbage)
    with pytest.raises(StorageFailed) as caught:
        JobStore(database)
    assert str(database.parent) not in caught.value.message
    assert database.read_bytes() == garbage


def test_a_missing_folder_stops_the_start_with_a_sentence(tmp_path):
    with pytest.raises(StorageFailed) as caught:
        JobStore(tmp_path / "nowhere" / "jobs.sqlite")
    assert "nowhere" not in caught.value.message


def test_a_damaged_record_is_told_by_its_id_alone(store, database):
    job = put(store, a_job(params={"prompt": "secret"}))
    with sqlite3.connect(database) as db:
        db.execute("UPDATE jobs SET life = '{'")
    db.close()
    with pytest.raises(StorageFailed, match=job.id) as caught:
        store.load(job.id)
    assert "secret" not in caught.value.message


def test_other_databases_than_sqlite_are_refused_with_a_sentence(tmp_path):
    for where in ("postgresql://host/db", "postgresql:///db", "sqlite://", "sqlite:///", "sqlite:///:memory:"):
        with pytest.raises(StorageFailed, match="must be a file"):
            JobStore(where)


def test_a_store_opens_from_a_path_and_from_a_url(tmp_path):
    database = tmp_path / "a b?c.sqlite"
    store = JobStore(f"sqlite:///{database}")
    job = put(store, a_job())
    store.close()
    store = JobStore(str(database))
    assert store.load(job.id) == job
    store.close()


# --- schema -----------------------------------------------------------------------------------------------------------


def test_an_older_database_is_brought_up_and_keeps_its_jobs(database, monkeypatch):
    store = JobStore(database)
    job = put(store, a_job(number=5))
    store.close()
    monkeypatch.setattr(schema, "UPGRADES", [("ALTER TABLE jobs ADD COLUMN region TEXT",)])
    for _ in range(2):  # the second start has nothing to do
        store = JobStore(database)
        assert [kept.id for kept in store.unfinished()] == [job.id]
        assert store.total() == 5
        assert rows(database, "SELECT region FROM jobs") == [None]
        assert rows(database, "SELECT value FROM facts WHERE name = 'schema'") == [2]
        store.close()


def test_an_upgrade_that_fails_half_way_changes_nothing(database, monkeypatch):
    JobStore(database).close()
    monkeypatch.setattr(schema, "UPGRADES", [("ALTER TABLE jobs ADD COLUMN region TEXT", "ALTER TABLE nothing ADD x")])
    with pytest.raises(StorageFailed):
        JobStore(database)
    assert rows(database, "SELECT count(*) FROM pragma_table_info('jobs') WHERE name = 'region'") == [0]
    assert rows(database, "SELECT value FROM facts WHERE name = 'schema'") == [1]


def test_a_database_of_a_newer_server_is_left_alone(database):
    JobStore(database).close()
    with sqlite3.connect(database) as db:
        db.execute("UPDATE facts SET value = 99 WHERE name = 'schema'")
    db.close()
    with pytest.raises(StorageFailed, match="newer"):
        JobStore(database)

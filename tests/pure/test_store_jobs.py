"""The job store on a real SQLite file: what it promises about writes, ends, keys, pages and order."""

import dataclasses
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

import pytest
from hypothesis import HealthCheck, given, settings
from sqlalchemy import event

from core.errors import IdempotencyInFlight, IdempotencyMismatch, InternalError, JobNotFound, StorageFailed
from core.states import State
from store.jobs import JobStore
from tests.pure.store_kit import WAIT, a_job, any_job, finish, held, new_id, put, rows

ID = "0f8b5c1e-52d3-4b0a-9f63-7c1d2e3f4a5b"  # a good one
HOSTILE = ["", "../etc/passwd", "%2e%2e%2f", "a\0b", "x" * 10_240, ID.upper(), ID + "\n", "\ud800",
           "' OR 1=1 --", ID.replace("-", ""), "../" + ID]


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "jobs.sqlite"


@pytest.fixture
def store(database: Path) -> Iterator[JobStore]:
    store = JobStore(database, busy_timeout=20.0)
    yield store
    store.close()


# --- writing ----------------------------------------------------------------------------------------------------------


def test_any_job_is_loaded_as_it_was_saved(store):
    @given(any_job)
    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    def check(job):
        fresh = new_id()
        request = dataclasses.replace(job.request, tenant=job.request.tenant + fresh)  # its keys meet nobody's
        start = dataclasses.replace(job, id=fresh, request=request, state=State.QUEUED, history=job.history[:1])
        end = dataclasses.replace(job, id=fresh, request=request)
        put(store, start)
        assert store.load(fresh) == start
        store.save(end).result(WAIT)
        assert store.load(fresh) == end

    check()


def test_a_write_is_told_only_after_a_stranger_can_see_it(store, database):
    job = a_job()
    seen: SimpleQueue[list[str]] = SimpleQueue()
    with held(store):
        future = store.insert(job)
        future.add_done_callback(lambda _: seen.put(rows(database)))
        assert rows(database) == []
        assert not future.done()
    assert seen.get(timeout=WAIT) == [job.id]


def test_commits_reach_the_disk_before_they_are_told(store):
    with store._engine.connect() as db:
        assert db.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL
        assert db.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"


def test_writes_that_wait_share_one_commit(store, database):
    commits = []
    event.listen(store._engine, "commit", commits.append)
    before = store.commits
    with held(store):
        futures = [store.insert(a_job(number=n)) for n in range(300)]
    for future in futures:
        future.result(WAIT)
    assert len(rows(database)) == 300
    assert len(commits) == 2  # the one that held the writer up, and all the others
    assert store.commits - before == len(commits)


def test_a_write_that_cannot_be_written_fails_alone(store, database):
    good = [a_job(), a_job()]
    twice = put(store, a_job())
    with held(store):
        first = store.insert(good[0])
        surrogate = store.insert(a_job(tenant="\ud800"))
        again = store.insert(twice)
        second = store.insert(good[1])
    first.result(WAIT)
    second.result(WAIT)
    with pytest.raises(InternalError):
        surrogate.result(WAIT)
    with pytest.raises(InternalError, match="same id"):
        again.result(WAIT)
    assert set(rows(database)) == {twice.id, good[0].id, good[1].id}


def test_who_stops_waiting_does_not_undo_the_write(store, database):
    job = a_job()
    with held(store):
        future = store.insert(job)
        assert not future.cancel()
    future.result(WAIT)
    assert store.load(job.id) == job


def test_a_job_is_written_as_it_was_when_it_was_handed_over(store, database):
    job = a_job()
    with held(store):
        future = store.insert(job)
        job.move(State.RUNNING, 5.0, device="cpu:0")
    future.result(WAIT)
    assert store.load(job.id).state is State.QUEUED


def test_an_older_state_never_overwrites_a_newer_one(store):
    job = put(store, a_job())
    job.move(State.RUNNING, 1.0, device="cpu:0")
    older = dataclasses.replace(job, history=list(job.history))
    job.move(State.QUEUED, 2.0, why="worker lost")
    store.save(job).result(WAIT)
    store.save(older).result(WAIT)
    assert store.load(job.id) == job


def test_an_end_is_never_overwritten_by_another_end_or_by_life(store):
    job = put(store, a_job())
    other = dataclasses.replace(job, history=list(job.history))
    store.save(finish(job)).result(WAIT)
    other.move(State.RUNNING, 1.0)
    other.move(State.QUEUED, 2.0)
    other.move(State.RUNNING, 3.0)
    store.save(other).result(WAIT)
    other.move(State.CANCELLED, 4.0)
    store.save(other).result(WAIT)
    assert store.load(job.id) == job


def test_an_end_and_the_state_before_it_may_share_a_commit_in_any_order(store, database):
    job = put(store, a_job())
    running = dataclasses.replace(job, history=list(job.history))
    running.move(State.RUNNING, 1.0)
    finish(job)
    with held(store):
        futures = [store.save(running), store.save(job), store.save(running)]
    for future in futures:
        future.result(WAIT)
    assert store.load(job.id) == job


def test_progress_is_saved_without_a_move(store):
    job = put(store, a_job())
    job.progress = 0.5
    store.save(job).result(WAIT)
    assert store.load(job.id).progress == 0.5


def test_saving_a_job_that_was_never_stored_is_told_and_hurts_no_neighbour(store, database):
    known = put(store, a_job())
    known.progress = 0.25
    with held(store):
        lost, fine = store.save(a_job()), store.save(known)
    with pytest.raises(JobNotFound):
        lost.result(WAIT)
    fine.result(WAIT)
    assert store.load(known.id).progress == 0.25


def test_delete_takes_ended_jobs_only(store):
    waiting, ended = put(store, a_job()), put(store, a_job())
    store.save(finish(ended)).result(WAIT)
    assert store.delete([waiting.id, ended.id, new_id()]).result(WAIT) == 1
    assert store.delete([]).result(WAIT) == 0
    assert store.load(ended.id) is None
    assert store.load(waiting.id) == waiting


def test_close_writes_what_waits_and_then_refuses(store, database):
    with held(store):
        futures = [store.insert(a_job()) for _ in range(20)]
        closing = threading.Thread(target=store.close)
        closing.start()
    closing.join(WAIT)
    assert all(future.result(0) is None for future in futures)
    assert len(rows(database)) == 20
    with pytest.raises(StorageFailed, match="closed"):
        store.insert(a_job())
    store.close()


def test_many_threads_lose_nothing(store, database):
    def work():
        for _ in range(25):
            job = put(store, a_job(tenant="t"))
            assert store.load(job.id) == job
            store.save(finish(job)).result(WAIT)
            ids.add(job.id)

    ids: set[str] = set()
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert len(ids) == 200
    assert set(rows(database)) == ids
    assert store.counts()[State.SUCCEEDED] == 200
    assert store.unfinished() == []


# --- idempotency keys -------------------------------------------------------------------------------------------------


def test_a_key_finds_its_job_and_only_for_its_tenant(store):
    job = put(store, a_job(tenant="a", idempotency_key="k"), "f")
    assert store.find_key("a", "k") == (job.id, "f")
    assert store.find_key("b", "k") is None
    assert store.find_key("a", "other") is None
    put(store, a_job(tenant="b", idempotency_key="k"), "g")
    assert store.find_key("a", "k") == (job.id, "f")


def test_the_same_key_with_another_payload_is_a_mismatch(store):
    put(store, a_job(idempotency_key="k"), "f")
    with pytest.raises(IdempotencyMismatch):
        store.insert(a_job(idempotency_key="k"), "g").result(WAIT)
    assert len(store.unfinished()) == 1


def test_the_same_key_with_the_same_payload_names_the_winner(store):
    job = put(store, a_job(idempotency_key="k"), "f")
    with pytest.raises(IdempotencyInFlight) as caught:
        store.insert(a_job(idempotency_key="k"), "f").result(WAIT)
    assert caught.value.details == {"job": job.id}
    assert len(store.unfinished()) == 1


def test_of_two_equal_requests_in_one_commit_one_wins(store, database):
    with held(store):
        futures = [store.insert(a_job(idempotency_key="k"), "f") for _ in range(5)]
        stranger = store.insert(a_job(idempotency_key="k"), "g")
    faults = [future.exception(WAIT) for future in futures]
    assert [type(fault) for fault in faults] == [type(None)] + [IdempotencyInFlight] * 4
    assert isinstance(stranger.exception(WAIT), IdempotencyMismatch)
    assert store.find_key("anonymous", "k") == (rows(database)[0], "f")


def test_a_loser_in_a_commit_that_has_to_be_repeated_one_by_one_still_loses(store, database):
    with held(store):
        winner, loser = (store.insert(a_job(idempotency_key="k"), "f") for _ in range(2))
        surrogate = store.insert(a_job(tenant="\ud800"))
    assert winner.exception(WAIT) is None
    assert isinstance(loser.exception(WAIT), IdempotencyInFlight)
    assert isinstance(surrogate.exception(WAIT), InternalError)


def test_of_two_threads_with_one_key_exactly_one_wins(store, database):
    for n in range(25):
        barrier = threading.Barrier(2)
        outcomes: list[Exception | None] = []

        def race(key=f"k{n}", barrier=barrier, outcomes=outcomes):
            barrier.wait(WAIT)
            outcomes.append(store.insert(a_job(idempotency_key=key), "f").exception(WAIT))

        threads = [threading.Thread(target=race) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT)
        assert sorted(type(outcome).__name__ for outcome in outcomes) == ["IdempotencyInFlight", "NoneType"]
    assert len(rows(database)) == 25


def test_the_database_itself_refuses_a_key_twice(store, database):
    put(store, a_job(idempotency_key="k"))
    put(store, a_job())
    with sqlite3.connect(database) as db, pytest.raises(sqlite3.IntegrityError):
        db.execute("UPDATE jobs SET idempotency_key = 'k'")
    db.close()


def test_a_key_is_free_again_when_its_job_is_deleted(store):
    job = put(store, a_job(idempotency_key="k"), "f")
    store.save(finish(job)).result(WAIT)
    store.delete([job.id]).result(WAIT)
    assert store.find_key("anonymous", "k") is None
    put(store, a_job(idempotency_key="k"), "g")


# --- reading ----------------------------------------------------------------------------------------------------------


def test_pages_show_every_job_once_newest_first_while_new_ones_arrive(store):
    stored = [put(store, a_job(tenant="t")).id for _ in range(23)]
    seen: list[str] = []
    before = None
    while page := store.page("t", limit=5, before=before):
        seen += [job.id for job in page]
        before = page[-1].id
        put(store, a_job(tenant="t"))
    assert seen == stored[::-1]


def test_pages_filter_by_tenant_state_and_model(store):
    wanted = put(store, a_job(tenant="a", model="edit"))
    store.save(finish(wanted)).result(WAIT)
    put(store, a_job(tenant="a", model="edit"))
    put(store, a_job(tenant="b", model="edit"))
    put(store, a_job(tenant="a", model="lama"))
    assert [job.id for job in store.page("a", State.SUCCEEDED, "edit")] == [wanted.id]
    assert len(store.page("a", model="edit")) == 2
    assert len(store.page("a", State.QUEUED)) == 2
    assert len(store.page(None, model="edit")) == 3
    assert len(store.page(None)) == 4
    assert store.page("c") == []
    assert store.page("a", limit=0) == []
    assert store.page("a", limit=-1) == []


def test_a_page_after_a_strangers_a_deleted_or_a_hostile_id_is_refused(store):
    mine, theirs = put(store, a_job(tenant="a")), put(store, a_job(tenant="b"))
    store.save(finish(mine)).result(WAIT)
    store.delete([mine.id]).result(WAIT)
    for before in (theirs.id, mine.id, "../x"):
        with pytest.raises(JobNotFound):
            store.page("a", before=before)


def test_unfinished_jobs_come_in_the_order_of_acceptance_even_when_the_clock_went_back(store):
    ids = []
    for created_at in (5_000.0, 1_000.0, 9_000.0, 1_000.0):
        job = a_job()
        job.created_at = created_at
        ids.append(put(store, job).id)
    parked, ended = store.load(ids[2]), store.load(ids[1])
    parked.move(State.RUNNING, 1.0)
    parked.move(State.PARKED, 2.0)
    store.save(parked).result(WAIT)
    store.save(finish(ended)).result(WAIT)
    assert [job.id for job in store.unfinished()] == [ids[0], ids[2], ids[3]]


def test_counts_name_every_state(store):
    assert store.counts() == dict.fromkeys(State, 0)
    put(store, a_job())
    for state in (State.FAILED, State.FAILED, State.EXPIRED):
        store.save(finish(put(store, a_job()), state)).result(WAIT)
    assert store.counts() == dict.fromkeys(State, 0) | {State.QUEUED: 1, State.FAILED: 2, State.EXPIRED: 1}


def test_numbering_goes_on_after_the_jobs_are_gone_and_the_server_restarted(database):
    store = JobStore(database)
    assert store.total() == 0
    jobs = [put(store, a_job(number=number)) for number in (1, 7, 3)]
    for job in jobs:
        store.save(finish(job)).result(WAIT)
    store.delete([job.id for job in jobs]).result(WAIT)
    store.close()
    store = JobStore(database)
    assert store.total() == 7
    store.close()


def test_kept_tells_retention_the_ends_and_bytes(store):
    waiting, ended = put(store, a_job()), put(store, a_job())
    store.save(finish(ended, at=42.0)).result(WAIT)
    assert sorted(store.kept(), key=str) == sorted([(waiting.id, None, 1_000), (ended.id, 42.0, 500)], key=str)


@pytest.mark.parametrize("job_id", HOSTILE)
def test_hostile_ids_are_refused(store, job_id):
    assert store.load(job_id) is None
    with pytest.raises(JobNotFound):
        store.insert(a_job(job_id=job_id))
    assert store.counts()[State.QUEUED] == 0


def test_a_reader_does_not_wait_for_a_writer(store, database):
    job = put(store, a_job())
    with held(store):
        assert store.load(job.id) == job

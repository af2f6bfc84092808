"""The memory of jobs: every accepted job, from before its acceptance is told until retention takes it.

Writes return futures that resolve after their commit reached the disk; reads block and may be called from any thread.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import cast

from sqlalchemy import Connection, Executable, bindparam, delete, func, insert, or_, select, update

from core.errors import IdempotencyInFlight, IdempotencyMismatch, ImagePoolError, JobNotFound, StorageFailed
from core.job import Job
from core.states import State
from store import codec, schema, sqlite
from store.codec import Row
from store.faults import DatabaseDamaged, database_faults, disk_faults, raw_database_faults
from store.names import check_id, is_id
from store.schema import facts, jobs
from store.writer import GroupWriter, Write

OPEN = [state.value for state in State if not state.ended]
ENDS = [state.value for state in State if state.ended]
LONGEST_PAGE = 1_000
PAST = "past_"  # what the names of facts begin with that count ended jobs without a row, by state

_INSERT = insert(jobs)
_SAVE = (  # an older state never overwrites a newer one, and one end never another
    update(jobs)
    .where(jobs.c.id == bindparam("of"), jobs.c.version <= bindparam("version"))
    .where(or_(*(jobs.c.state == state for state in (*OPEN, bindparam("state")))))
    .values({name: bindparam(name) for name in ("state", "version", "ended_at", "bytes", "life")})
)
_DELETE = delete(jobs).where(jobs.c.id == bindparam("of"), or_(*(jobs.c.state == state for state in ENDS)))
_HOLDER = select(jobs.c.id, jobs.c.fingerprint).where(
    jobs.c.tenant == bindparam("tenant"), jobs.c.idempotency_key == bindparam("key")
)
_ADD = (
    update(facts).where(facts.c.name == bindparam("fact")).values(value=facts.c.value + bindparam("more"))
)
_COUNT_ON = (
    update(facts).where(facts.c.name == "last_number", facts.c.value < bindparam("number")).values(
        value=bindparam("number")
    )
)


class JobStore:
    """Jobs in a SQLite file. `where` is its path, or a URL `sqlite:///path`. `busy_timeout` is how many seconds a
    write waits for a stranger (a backup) that holds the database.

    Every method raises `StorageFull` or `StorageFailed` (writes: through their future) when the disk or the database
    refuses; the store stays usable and works again when the disk does. Raises `StorageFailed` when it cannot be opened.
    """

    def __init__(self, where: str | Path, *, busy_timeout: float = 10.0) -> None:
        self._path = _database_path(where)
        with disk_faults():
            sqlite.keep_private(self._path)
        self._engine = sqlite.open_writer(self._path, busy_timeout)
        self._readers = sqlite.open_readers(self._path, busy_timeout)
        try:
            with database_faults(self._path), self._engine.begin() as db:
                schema.prepare(db)
        except ImagePoolError:
            self._engine.dispose()
            raise
        self._turn = threading.Lock()  # of who writes, or makes the database again
        self._files = sqlite.identity(self._path)
        self.damaged = False  # seen since it was opened
        self._reopened = False  # by a fault, and not written since
        self._writer = GroupWriter(self._transact)

    @property
    def commits(self) -> int:
        """Transactions written so far; many writes share one."""
        return self._writer.commits

    # --- writes: resolved after the commit ----------------------------------------------------------------------------

    def insert(self, job: Job, fingerprint: str | None = None) -> Future[None]:
        """Remember a new job. `fingerprint` is a hash of the payload, kept with the request's idempotency key.

        When an earlier job of the tenant has the key, the future raises `IdempotencyMismatch` (another fingerprint) or
        `IdempotencyInFlight` (the same: another request won the race; `find_key` now tells its job). Raises
        `InternalError` at once for a job that is no plain data.
        """
        check_id(job.id)
        return self._writer.submit(Write("insert", [codec.encode(job, fingerprint)]))

    def insert_row(self, row: Row) -> Future[None]:
        """The same for a row, as `codec.encode` gave it."""
        return self._writer.submit(Write("insert", [row]))

    def save(self, job: Job) -> Future[None]:
        """Remember how far a job has come. A state older than the stored one, or another end, changes nothing. The
        future raises `JobNotFound` when the job was never inserted or has been deleted."""
        row = codec.encode_life(job)
        row["of"] = row.pop("id")
        return self._writer.submit(Write("save", [row]))

    def delete(self, ids: Iterable[str]) -> Future[int]:
        """Forget ended jobs; how many there were. A job that has not ended stays."""
        return self._writer.submit(Write("delete", [{"of": job_id} for job_id in ids]))

    def is_gone(self) -> bool:
        """Whether its files are no longer those that were opened: what is written now ends with this process."""
        with disk_faults():
            database, wal = sqlite.identity(self._path)
        return database != self._files[0] or (wal != self._files[1] and not self._reopened)

    def make_again(self, fresh: Path, take_aside: Callable[[Path], object]) -> None:
        """Write all that was in the files that are gone to new ones, by way of `fresh`, a name on the same disk.
        `take_aside(path)` moves what lies at their places now. Blocks; raises `StorageFull` or `StorageFailed`."""
        with self._turn, disk_faults(), database_faults(self._path):
            with closing(self._engine.raw_connection()) as db, raw_database_faults(self._path):
                sqlite.copy(cast("sqlite3.Connection", db.driver_connection), fresh)
            take_aside(self._path)
            fresh.replace(self._path)
            self._engine.dispose()
            self._readers.dispose()
            with self._engine.begin():  # makes its log
                self._files = sqlite.identity(self._path)

    def count_past(self, ended: Mapping[State, int]) -> Future[None]:
        """Jobs that ended and were never stored: `counts` tells them, too, from now on."""
        return self._writer.submit(Write("count", [_past(state.value, number) for state, number in ended.items()]))

    def close(self) -> None:
        """Write what waits, then close. Later writes raise `StorageFailed`. A second time changes nothing."""
        self._writer.close()
        self._readers.dispose()
        self._engine.dispose()

    # --- reads: from any thread ---------------------------------------------------------------------------------------

    def load(self, job_id: str) -> Job | None:
        """The job as last saved."""
        if not is_id(job_id):
            return None
        found = self._read(select(jobs).where(jobs.c.id == job_id))
        return _decode(found[0]) if found else None

    def page(
        self,
        tenant: str | None = None,
        state: State | None = None,
        model: str | None = None,
        limit: int = 50,
        before: str | None = None,
    ) -> list[Job]:
        """Up to `limit` (at most 1,000) jobs, newest first; None for `tenant`, `state` or `model` means any. `before`
        is the id of the last job of the page before; raises `JobNotFound` when that has been deleted meanwhile."""
        query = select(jobs).order_by(jobs.c.seq.desc()).limit(max(0, min(limit, LONGEST_PAGE)))
        for column, wanted in ((jobs.c.tenant, tenant), (jobs.c.state, state and state.value), (jobs.c.model, model)):
            if wanted is not None:
                query = query.where(column == wanted)
        if before is not None:
            query = query.where(jobs.c.seq < self._place(before, tenant))
        return [_decode(row) for row in self._read(query)]

    def unfinished(self) -> list[Job]:
        """All jobs that have not ended, in the order of their acceptance. A record that is damaged cannot keep the
        others from running: it is passed over, and stays where it is for a person to look at."""
        rows = self._read(select(jobs).where(jobs.c.state.in_(OPEN)).order_by(jobs.c.seq))
        found = []
        for row in rows:
            with suppress(StorageFailed):
                found.append(_decode(row))
        return found

    def find_key(self, tenant: str, key: str) -> tuple[str, str | None] | None:
        """(job id, fingerprint) of the tenant's job with that idempotency key."""
        found = self._read(_HOLDER.params(tenant=tenant, key=key))
        return (found[0]["id"], found[0]["fingerprint"]) if found else None

    def keyed(self, tenant: str, prefix: str) -> list[Job]:
        """The tenant's jobs whose idempotency keys begin so, in the order of the keys. At most 1,000."""
        key = jobs.c.idempotency_key
        query = select(jobs).where(jobs.c.tenant == tenant, key >= prefix, key < prefix + "\U0010ffff")
        return [_decode(row) for row in self._read(query.order_by(key).limit(LONGEST_PAGE))]

    def counts(self) -> dict[State, int]:
        """How many jobs are in each state, with those that ended and have been deleted since."""
        found = dict.fromkeys(State, 0)
        for row in self._read(select(jobs.c.state, func.count().label("jobs")).group_by(jobs.c.state)):
            found[State(row["state"])] += row["jobs"]
        for row in self._read(select(facts).where(facts.c.name.in_([PAST + state for state in ENDS]))):
            found[State(row["name"].removeprefix(PAST))] += row["value"]
        return found

    def total(self) -> int:
        """The highest job number ever inserted, also when that job is gone: numbering goes on from here."""
        return int(self._read(select(facts.c.value).where(facts.c.name == "last_number"))[0]["value"])

    def kept(self) -> list[tuple[str, float | None, int]]:
        """(id, ended_at or None, bytes of its files) of every job: what `retention.expired` and a sweep want."""
        rows = self._read(select(jobs.c.id, jobs.c.ended_at, jobs.c.bytes).order_by(jobs.c.ended_at))
        return [(row["id"], row["ended_at"], row["bytes"]) for row in rows]

    def _place(self, job_id: str, tenant: str | None) -> int:
        query = select(jobs.c.seq).where(jobs.c.id == job_id)
        found = self._read(query if tenant is None else query.where(jobs.c.tenant == tenant)) if is_id(job_id) else []
        if not found:
            raise JobNotFound("the job after which the page should start is not there; ask for the first page again")
        return int(found[0]["seq"])

    def _read(self, query: Executable) -> list[Row]:
        with self._noting_damage(), database_faults(self._path), self._readers.connect() as db:
            return [row._asdict() for row in db.execute(query)]

    @contextmanager
    def _noting_damage(self) -> Iterator[None]:
        try:
            yield
        except DatabaseDamaged:
            self.damaged = True
            raise

    # --- the transaction: on the writer thread ------------------------------------------------------------------------

    def _transact(self, writes: Sequence[Write]) -> None:
        """All writes of a group, by kind: nobody has been told of any of them yet, so their order among each other is
        free, and each kind is one statement."""
        for write in writes:
            write.outcome = None  # of an attempt that was rolled back
        with (
            self._turn, self._noting_damage(), self._reopened_on_fault(), database_faults(self._path),
            self._engine.begin() as db,
        ):
            _insert_all(db, [write for write in writes if write.kind == "insert"])
            _save_all(db, [write for write in writes if write.kind == "save"])
            for write in writes:
                if write.kind == "delete":
                    write.outcome = _delete(db, write.rows)
                elif write.kind == "count":
                    _add_up(db, write.rows)
        if self._reopened and not self.is_gone():
            self._reopened, self._files = False, sqlite.identity(self._path)

    @contextmanager
    def _reopened_on_fault(self) -> Iterator[None]:
        try:
            yield
        except StorageFailed:
            self._reopened = True
            self._engine.dispose()  # a connection that saw an I/O error may keep its broken view of the file
            raise


def _insert_all(db: Connection, writes: Sequence[Write]) -> None:
    holders: dict[tuple[str, str], tuple[str, str | None]] = {}
    rows = []
    for write in writes:
        (row,) = write.rows
        if row["idempotency_key"] is not None:
            key = row["tenant"], row["idempotency_key"]
            if key not in holders and (found := db.execute(_HOLDER, {"tenant": key[0], "key": key[1]}).first()):
                holders[key] = found.id, found.fingerprint
            holder, fingerprint = holders.setdefault(key, (row["id"], row["fingerprint"]))
            if holder != row["id"]:
                write.outcome = _key_taken(holder, fingerprint == row["fingerprint"])
                continue
        rows.append(row)
    if rows:
        db.execute(_INSERT, rows)
        db.execute(_COUNT_ON, {"number": max(row["number"] for row in rows)})


def _delete(db: Connection, rows: Sequence[Row]) -> int:
    """Deletes ended jobs, and counts them on by their states."""
    ids = [row["of"] for row in rows]
    gone = select(jobs.c.state, func.count().label("jobs")).where(jobs.c.state.in_(ENDS)).group_by(jobs.c.state)
    for start in range(0, len(ids), LONGEST_PAGE):
        found = db.execute(gone.where(jobs.c.id.in_(ids[start : start + LONGEST_PAGE]))).all()
        _add_up(db, [_past(row.state, row.jobs) for row in found])
    return db.execute(_DELETE, rows).rowcount if rows else 0


def _past(state: str, number: int) -> Row:
    return {"fact": PAST + state, "more": number}


def _add_up(db: Connection, rows: Sequence[Row]) -> None:
    for row in rows:
        if not db.execute(_ADD, row).rowcount:
            db.execute(insert(facts).values(name=row["fact"], value=row["more"]))


def _key_taken(holder: str, same: bool) -> ImagePoolError:
    if same:
        return IdempotencyInFlight("an equal request with this Idempotency-Key was accepted just before", job=holder)
    return IdempotencyMismatch(
        "this Idempotency-Key was used before with another payload; send the same payload, or a new key"
    )


def _save_all(db: Connection, writes: Sequence[Write]) -> None:
    rows = [row for write in writes for row in write.rows]
    if not rows or db.execute(_SAVE, rows).rowcount == len(rows):
        return
    ids = {row["of"] for row in rows}
    there = set(db.execute(select(jobs.c.id).where(jobs.c.id.in_(ids))).scalars())
    for write in writes:
        if write.rows[0]["of"] not in there:
            write.outcome = JobNotFound("there is no such job: it was never stored, or its time is over")


def _decode(row: Row) -> Job:
    try:
        return codec.decode(row)
    except (KeyError, TypeError, ValueError) as fault:
        raise StorageFailed(f"the stored record of job {row['id']} is damaged and cannot be read") from fault


def _database_path(where: str | Path) -> Path:
    if isinstance(where, Path):
        return where
    scheme, is_url, rest = where.partition("://")
    if not is_url:
        return Path(where)
    if scheme != "sqlite" or not rest.startswith("/") or rest in ("/", "/:memory:"):
        raise StorageFailed("the job database must be a file: a path, or a URL such as sqlite:///outputs/jobs.sqlite")
    return Path(rest[1:])

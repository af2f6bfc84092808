"""How a start finds the outputs folder again: nothing that is there is lost, and what had to be done is said.

The rows of the database are what counts. Beside the inputs of each job lies its record, so a job whose acceptance was
told, and that the database has lost, comes back. Nothing else does: files alone tell not whether their job was told.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

from core.errors import ImagePoolError
from core.header import read_header
from core.job import Job, Result
from core.states import State
from store import codec
from store.codec import Row
from store.faults import DAMAGED
from store.files import FileStore
from store.jobs import JobStore
from store.names import DATABASE, EXTENSIONS
from store.sqlite import open_file

MISSING = "was missing or empty"
LARGEST = 1 << 32  # pixels: what was made here is not refused
WAIT = 60.0  # seconds for the database to take rows


@dataclass(slots=True)
class Found:
    """What a start came upon. `jobs` have not ended, oldest first. `database`: what was wrong with it. `rows` were read
    from a damaged one; `rebuilt` jobs came from the records beside their inputs, `ended` are those whose result was
    there although their end was not; `moved` files belong to no job, `unreadable` jobs stay as they are."""

    database: str | None = None
    rows: int = 0
    jobs: list[Job] = field(default_factory=list)
    rebuilt: int = 0
    ended: int = 0
    moved: int = 0
    unreadable: int = 0

    def told(self) -> str | None:
        """All of it in one paragraph; None when there is nothing to say."""
        words = [f"THE JOB DATABASE {self.database.upper()}. A new one was made." if self.database else ""]
        if self.database and self.database != MISSING:
            words.append(f"{self.rows} jobs could be read from the old one, which lies in outputs/orphans now.")
        if self.rebuilt:
            lost = "" if self.database else "THE JOB DATABASE HAS LOST JOBS THAT WERE ACCEPTED. "
            words.append(f"{lost}{self.rebuilt} jobs were rebuilt from the records beside their inputs and run again.")
        if self.ended:
            words.append(f"{self.ended} jobs whose result is there count as succeeded, though that was not stored.")
        if self.moved:
            words.append(
                f"{self.moved} files that belong to no job were moved to outputs/orphans, a folder for each job; take "
                "what you want to keep from there before retention removes it."
            )
        if self.unreadable:
            words.append(f"{self.unreadable} stored jobs cannot be read and do not run.")
        return " ".join(filter(None, words)) or None


def open_jobs(files: FileStore) -> tuple[JobStore, Found]:
    """The job database of the folder. One that is damaged is moved to the orphans, and what can be read of it goes into
    a new one. Raises `StorageFull` or `StorageFailed`."""
    database = files.root / DATABASE
    damage = _damage(database)
    if damage is None or (damage == MISSING and not files.usage()):  # healthy, or a folder that is new
        return JobStore(database), Found()
    found = Found(damage)
    old = files.orphans.take_database(database)
    store = JobStore(database)
    for written in [store.insert_row(row) for row in _readable(old)]:
        written.result(WAIT)
        found.rows += 1
    return store, found


def recover(store: JobStore, files: FileStore, found: Found) -> Found:
    """Bring rows and files together: to be called once, before jobs are accepted."""
    known = {id_ for id_, _, _ in store.kept()}
    lost = [row for id_, record in files.records() if id_ not in known and (row := _row(id_, record))]
    for row in sorted(lost, key=lambda row: (row["created_at"], row["number"])):
        with suppress(ImagePoolError):  # another job has its key by now: its files go to the orphans
            store.insert_row(row).result(WAIT)
            found.rebuilt += 1
    kept = store.kept()
    waiting = {id_ for id_, ended_at, _ in kept if ended_at is None}
    jobs = store.unfinished()
    found.unreadable = len(waiting) - len(jobs)
    _, found.moved = files.sweep({id_ for id_, _, _ in kept}, waiting)
    for job in jobs:
        if _has_ended(job, files):
            store.save(job).result(WAIT)
            found.ended += 1
        else:
            found.jobs.append(job)
    return found


def _damage(database: Path) -> str | None:
    """What is wrong with the file. What only keeps it from being read (rights, room) is told by whoever opens it."""
    if not database.is_file() or not database.stat().st_size:
        return MISSING
    try:
        with closing(open_file(database)) as db:
            said = db.execute("PRAGMA quick_check(1)").fetchone()[0]
    except sqlite3.Error as fault:
        code = getattr(fault, "sqlite_errorcode", None)
        damaged = code is not None and code & 0xFF in DAMAGED
        return f"is damaged ({getattr(fault, 'sqlite_errorname', '')})" if damaged else None
    return None if said == "ok" else "is damaged (its pages contradict each other)"


def _readable(database: Path) -> Iterator[Row]:
    """Every row that a damaged database still gives, one by one, for a page that cannot be read ends a query."""
    if not database.is_file():
        return
    with suppress(sqlite3.Error), closing(open_file(database)) as db:
        db.row_factory = sqlite3.Row
        for seq in range(1, _last(db) + 1):
            with suppress(sqlite3.Error, KeyError, TypeError, ValueError, AttributeError):
                if row := db.execute("SELECT * FROM jobs WHERE seq = ?", (seq,)).fetchone():
                    codec.decode(row)
                    yield {name: row[name] for name in row.keys() if name != "seq"}  # noqa: SIM118  (no mapping)


def _last(db: sqlite3.Connection) -> int:
    for question in ("SELECT max(seq) FROM jobs", "SELECT seq FROM sqlite_sequence WHERE name = 'jobs'"):
        with suppress(sqlite3.Error):
            if (found := db.execute(question).fetchone()) and found[0]:
                return int(found[0])
    return 0


def _row(job_id: str, record: bytes) -> Row | None:
    """A record as a row of the database; None when it is not whole."""
    try:
        row: Row = json.loads(record)
        return row if codec.decode(row).id == job_id else None
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _has_ended(job: Job, files: FileStore) -> bool:
    """Whether its inputs are gone and its result is there: the end was stored, and the database has lost it."""
    place = files.result(job.id)
    if place is None or files.has_inputs(job.id):
        return False
    with suppress(OSError, ImagePoolError):
        data = place.read_bytes()
        header = read_header(data, max_pixels=LARGEST)
        at = place.stat().st_mtime
        if job.state is State.QUEUED:
            job.move(State.RUNNING, at, device=job.device)
        format = next(name for name, extension in EXTENSIONS.items() if place.suffix == f".{extension}")
        job.result = Result(place.name, len(data), format, header.width, header.height, job.device or "unknown", 1)
        job.move(State.SUCCEEDED, at, device=job.device, why="found after the job database had lost its end")
        return True
    return False

"""How the embedded database is opened: one connection that writes, a few that read beside it and never wait for it."""

from __future__ import annotations

import os
import sqlite3
import urllib.parse
from contextlib import closing
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event

from store.modes import make_file, tighten

WRITER = (
    "PRAGMA journal_mode = WAL",  # readers see the last commit while the next one is written
    "PRAGMA synchronous = FULL",  # a commit has reached the disk before it is told
    "PRAGMA journal_size_limit = 16777216",
)
BESIDE = ("", "-wal", "-shm", "-journal")  # what the database's files end in
READER = ("PRAGMA query_only = ON",)


def keep_private(path: Path) -> None:
    """Have the database's file belong to its user alone, before it is opened: those beside it get its rights. Raises
    OSError."""
    make_file(path)
    for ending in BESIDE:
        tighten(f"{path}{ending}")


def place(path: Path) -> str:
    """The database as a URI. It is never made by opening it: one that somebody has removed must not come back empty."""
    return f"file:{urllib.parse.quote(str(path))}?mode=rw"


def open_file(path: Path) -> sqlite3.Connection:
    """The database without any of the rest, to look at it. Raises `sqlite3.Error`."""
    return sqlite3.connect(place(path), uri=True)


def identity(path: Path) -> tuple[tuple[int, int] | None, ...]:
    """Which files lie at the places of the database and of its log; None for one that is not there."""
    return tuple(_identity(f"{path}{ending}") for ending in ("", "-wal"))


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)  # noqa: PTH116
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def copy(db: sqlite3.Connection, path: Path) -> None:
    """Write all that an open database holds to a new file, whether or not its own still has a name. Raises
    `sqlite3.Error`, OSError."""
    make_file(path)
    with closing(sqlite3.connect(path)) as new:
        db.backup(new)


def open_writer(path: Path, timeout: float) -> Engine:
    """One connection; each transaction begins with the write lock, waiting for it up to `timeout` seconds."""
    engine = _open(path, WRITER, timeout, pool_size=1, max_overflow=0)

    @event.listens_for(engine, "begin")
    def begin(db: Connection) -> None:
        db.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def open_readers(path: Path, timeout: float) -> Engine:
    """A small pool, usable from any thread; each statement sees everything that was committed before it."""
    return _open(path, READER, timeout, pool_size=4, max_overflow=12, isolation_level="AUTOCOMMIT")


def _open(path: Path, pragmas: tuple[str, ...], timeout: float, **options: Any) -> Engine:
    url = URL.create("sqlite", database=place(path), query={"uri": "true"})
    arguments = {"timeout": timeout, "check_same_thread": False}
    engine = create_engine(url, connect_args=arguments, hide_parameters=True, **options)  # no tenant's data in a log

    @event.listens_for(engine, "connect")
    def connect(connection: sqlite3.Connection, _: Any) -> None:
        connection.isolation_level = None  # transactions begin when we say so, not when the driver guesses
        for pragma in pragmas:
            connection.execute(pragma).close()

    return engine

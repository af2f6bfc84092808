"""How the embedded database is opened: one connection that writes, a few that read beside it and never wait for it."""

from __future__ import annotations

import sqlite3
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
    url = URL.create("sqlite", database=str(path))
    arguments = {"timeout": timeout, "check_same_thread": False}
    engine = create_engine(url, connect_args=arguments, hide_parameters=True, **options)  # no tenant's data in a log

    @event.listens_for(engine, "connect")
    def connect(connection: sqlite3.Connection, _: Any) -> None:
        connection.isolation_level = None  # transactions begin when we say so, not when the driver guesses
        for pragma in pragmas:
            connection.execute(pragma).close()

    return engine

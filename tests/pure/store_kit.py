"""Jobs for the store's tests: a plain one, and Hypothesis's idea of any."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from hypothesis import strategies as st

from core.errors import ErrorInfo
from core.header import ImageHeader
from core.job import Job, Move, Result
from core.request import ImagePart, ImageRequest, OutputFormat, Priority
from core.states import State
from store.jobs import JobStore
from store.writer import Write

WAIT = 30.0  # seconds: a failure, not a measure
HEADER = ImageHeader("png", 512, 512)


def new_id() -> str:
    return str(uuid4())


def a_job(*, job_id: str | None = None, number: int = 0, **request: Any) -> Job:
    """A job with one stored image; keywords are of its request."""
    job_id = new_id() if job_id is None else job_id
    image = ImagePart("image", f"inputs/{job_id}/0-image.png", HEADER, 1_000)
    return Job(job_id, ImageRequest(**{"model": "lama", "images": (image,), **request}), time.time(), number)


def finish(job: Job, state: State = State.SUCCEEDED, at: float = 2_000_000_000.0) -> Job:
    """Run it to an end."""
    job.move(State.RUNNING, at - 1, device="cpu:0")
    if state is State.SUCCEEDED:
        job.result = Result(f"{job.id}.png", 500, "png", 512, 512, "cpu:0", 4, {"compute": 0.25}, {"seed": 7})
    job.move(state, at)
    return job


def put(store: JobStore, job: Job, fingerprint: str | None = None) -> Job:
    """Insert and wait."""
    store.insert(job, fingerprint).result(WAIT)
    return job


@contextmanager
def held(store: JobStore) -> Iterator[None]:
    """A stranger holds the write lock and the writer waits for it, so that everything submitted inside is one group."""
    stranger = sqlite3.connect(store._path, isolation_level=None)
    stranger.execute("BEGIN IMMEDIATE")
    waits = threading.Event()
    transact = store._writer._transact

    def begin(writes: Sequence[Write]) -> None:
        waits.set()
        transact(writes)

    store._writer._transact = begin
    try:
        store.delete([new_id()])
        assert waits.wait(WAIT)
        yield
    finally:
        stranger.rollback()
        stranger.close()


def rows(database: Path, query: str = "SELECT id FROM jobs ORDER BY seq") -> list[Any]:
    """What a stranger sees in the database: the first column of each row."""
    connection = sqlite3.connect(database)
    try:
        return [row[0] for row in connection.execute(query)]
    finally:
        connection.close()


_finite = st.floats(allow_nan=False, allow_infinity=False)
_text = st.text(max_size=30)  # any character but halves of surrogate pairs
_name = _text.filter(lambda text: not any(0xD800 <= ord(c) <= 0xDFFF for c in text))
_plain = st.recursive(
    st.none() | st.booleans() | st.integers() | _finite | _text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_text, inner, max_size=3),
    max_leaves=6,
)
_facts = st.dictionaries(_text, _plain, max_size=4)
_bytes = st.integers(0, 1 << 40)
_format = st.sampled_from(["png", "jpeg", "webp", "avif"])
_parts = st.builds(
    ImagePart,
    role=st.sampled_from(["image", "mask"]),
    data=_text,
    header=st.builds(ImageHeader, format=_format, width=_bytes, height=_bytes, orientation=st.integers(1, 8),
                     alpha=st.booleans()),
    size=_bytes,
)
_requests = st.builds(
    ImageRequest,
    model=_name,
    images=st.lists(_parts, max_size=3).map(tuple),
    params=_facts,
    output=st.builds(OutputFormat, format=_format, quality=st.none() | st.integers(1, 100)),
    priority=st.sampled_from(Priority),
    tenant=_name,
    deadline=st.none() | _finite,
    durable=st.booleans(),
    dialect=_text,
    idempotency_key=st.none() | _name,
    client=_facts,
)
any_job = st.builds(
    Job,
    id=st.uuids(version=4).map(str),
    request=_requests,
    created_at=_finite,
    number=st.integers(0, 2**62),
    state=st.sampled_from(State),
    started_at=st.none() | _finite,
    ended_at=st.none() | _finite,
    device=st.none() | _text,
    attempts=st.integers(0, 100),
    progress=_finite,
    result=st.none()
    | st.builds(Result, data=_text, size=_bytes, format=_text, width=_bytes, height=_bytes, device=_text,
                batch_size=st.integers(1, 64), timings=st.dictionaries(_text, _finite, max_size=3), facts=_facts),
    error=st.none() | st.builds(ErrorInfo, code=_text, message=_text, retryable=st.booleans(), details=_facts),
    history=st.lists(st.builds(Move, at=_finite, state=st.sampled_from(State), device=st.none() | _text,
                               why=st.none() | _text), min_size=1, max_size=4),
)

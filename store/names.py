"""How jobs and their files are named. Every name is checked against a whole pattern, so none can point elsewhere."""

from __future__ import annotations

import re

from core.errors import InternalError, JobNotFound
from core.request import ROLES

DATABASE = "jobs.sqlite"
INPUTS = "inputs"
TEMPORARY = "tmp"
ORPHANS = "orphans"
RESERVE = ".reserve"
RECORD = "record.json"
UNTOLD = "record.new"  # a record whose job nobody has been told of yet
EXTENSIONS = {"jpeg": "jpg"} | {kind: kind for kind in ("png", "webp", "avif", "gif", "bmp", "tiff", "ppm")}

_ID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
_EXTENSION = rf"(?:{'|'.join(EXTENSIONS.values())})"
JOB_ID = re.compile(_ID)
RESULT = re.compile(rf"({_ID})(?:_thumb)?\.{_EXTENSION}")
INPUT = re.compile(rf"{INPUTS}/({_ID})/[0-9]{{1,3}}-(?:{'|'.join(ROLES)})\.{_EXTENSION}")


def is_id(job_id: str) -> bool:
    """Whether this is a uuid4 as this server writes it: lower case, with dashes."""
    return JOB_ID.fullmatch(job_id) is not None


def check_id(job_id: str) -> str:
    """The id itself. Raises `JobNotFound` when no job can have it."""
    if not is_id(job_id):
        raise JobNotFound("there is no job of that id: an id is a uuid such as the server gave when it took the job")
    return job_id


def check_name(name: str) -> str:
    """The name itself. Raises `JobNotFound` unless it is the name of a result, of its thumbnail or of an input."""
    if not (RESULT.fullmatch(name) or INPUT.fullmatch(name)):
        raise JobNotFound("no file of that name is kept here")
    return name


def result_name(job_id: str, format: str) -> str:
    """`{job_id}.{ext}`, relative to the outputs folder."""
    return f"{check_id(job_id)}.{_extension(format)}"


def thumbnail_name(job_id: str) -> str:
    """`{job_id}_thumb.webp`, relative to the outputs folder."""
    return f"{check_id(job_id)}_thumb.webp"


def input_name(job_id: str, n: int, role: str, format: str) -> str:
    """`inputs/{job_id}/{n}-{role}.{ext}`, relative to the outputs folder; `n` counts the parts of a request from 0."""
    name = f"{INPUTS}/{check_id(job_id)}/{n}-{role}.{_extension(format)}"
    if not INPUT.fullmatch(name):
        raise InternalError("an input is named by a number from 0 to 999 and a known role")
    return name


def _extension(format: str) -> str:
    if format not in EXTENSIONS:
        raise InternalError(f"images are kept as one of: {', '.join(EXTENSIONS)}")
    return EXTENSIONS[format]

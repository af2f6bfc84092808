"""The memory of images: inputs and results as files that appear whole or not at all.

Layout under the root: `{job}.{ext}` results, `{job}_thumb.webp` small copies of them, `inputs/{job}/{n}-{role}.{ext}`
and the job's record beside them, `tmp/` for files being written, `orphans/` for what no record knows. A file is written
in `tmp/`, flushed, renamed into place, and its folder flushed: after that, power may go.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from core.data import Data
from core.errors import StorageFull
from store.faults import RETRY_AFTER, disk_faults
from store.modes import FILE_MODE, make_folder, tighten, tighten_all
from store.names import (
    EXTENSIONS,
    INPUTS,
    JOB_ID,
    ORPHANS,
    RECORD,
    RESERVE,
    RESULT,
    TEMPORARY,
    UNTOLD,
    check_id,
    check_name,
    input_name,
    result_name,
    thumbnail_name,
)
from store.orphans import Orphans

RESERVED = 1 << 20  # bytes: a few hundred ends of jobs


class FileStore:
    """The images under `root`, named relative to it with '/' between the parts. All methods block and may be called
    from any thread.

    `min_free` bytes of the disk are left alone, so that jobs already accepted can still end; `max_bytes` bounds the
    images themselves (None: no bound). Everything raises `StorageFull` when room is missing and `StorageFailed` when
    the disk refuses for another reason; then no part of a file stays behind.
    """

    def __init__(self, root: Path | str, *, min_free: int = 256 << 20, max_bytes: int | None = None) -> None:
        self.root = Path(root)
        self.min_free = min_free
        self.max_bytes = max_bytes
        self.orphans = Orphans(self.root / ORPHANS)
        self._inputs = self.root / INPUTS
        self._temporary = self.root / TEMPORARY
        self._lock = threading.Lock()
        made = self.make_folders()
        with disk_faults():
            for folder in (self._inputs, self._temporary):
                if folder.name not in made:
                    tighten_all(folder)
            _flush_folder(self.root)
            self._used = 0
            for _, entry in self._images():
                tighten(entry.path)
                self._used += entry.stat().st_size

    def make_folders(self) -> list[str]:
        """Make the folders that are not there; their names."""
        with disk_faults():
            return [folder.name for folder in (self.root, self._inputs, self._temporary) if make_folder(folder)]

    # --- writing ------------------------------------------------------------------------------------------------------

    def put_result(self, job_id: str, format: str, data: Data) -> str:
        """Keep a result; its name. A result that is there already is replaced in one step."""
        name = result_name(job_id, format)
        self._put({name: data})
        return name

    def put_thumbnail(self, job_id: str, data: Data) -> None:
        """Keep a small copy (WebP) of a result beside it."""
        self._put({thumbnail_name(job_id): data})

    def put_input(self, job_id: str, n: int, role: str, format: str, data: Data) -> str:
        """Keep the n-th image of a request; its name."""
        name = input_name(job_id, n, role, format)
        self._put({name: data})
        return name

    def put_inputs(
        self, job_id: str, parts: Sequence[tuple[str, str, Data]], record: Callable[[list[str]], bytes] | None = None
    ) -> list[str]:
        """Keep all images of a request, given as (role, format, data): all or none; their names. Cheaper than one by
        one, because the folder is flushed once. `record(names)` is what is kept beside them in case the database is
        lost; it is not flushed, for then two things have to go wrong."""
        files = {input_name(job_id, n, role, format): data for n, (role, format, data) in enumerate(parts)}
        if files:
            self._put(files)
        if record is not None:
            self._put_record(job_id, record(list(files)))
        return list(files)

    def _put_record(self, job_id: str, record: bytes) -> None:
        """Neither flushed nor made whole elsewhere: it counts from `tell` on."""
        folder = self._inputs / check_id(job_id)
        with disk_faults():
            make_folder(folder)
            _write(folder / UNTOLD, record, flush=False)
        with self._lock:
            self._used += len(record)

    def tell(self, job_id: str) -> None:
        """The job is in the database, and its acceptance may be told: should its row be missing later, the database has
        lost it."""
        folder = self._inputs / check_id(job_id)
        with disk_faults():
            os.replace(folder / UNTOLD, folder / RECORD)  # noqa: PTH105  (for each job)

    def delete(self, job_id: str) -> None:
        """Remove all files of a job. What is not there is fine."""
        check_id(job_id)
        with disk_faults():
            for extension in EXTENSIONS.values():
                self._remove(self.root / f"{job_id}.{extension}")
            self._remove(self.root / thumbnail_name(job_id))
        self.delete_inputs(job_id)

    def delete_inputs(self, job_id: str) -> None:
        """Remove the inputs of a job that has ended; its result stays. What is not there is fine."""
        check_id(job_id)
        folder = self._inputs / job_id
        with disk_faults():
            for file in sorted(_files_of(folder), key=lambda file: file.name != RECORD):
                self._remove(file)  # the record first: what remains then is no job that was lost
            with suppress(FileNotFoundError):
                folder.rmdir()

    def sweep(self, known: Collection[str], waiting: Collection[str] | None = None) -> tuple[int, int]:
        """Remove what a crash left: unfinished writes, and inputs of `known` jobs that are not among the `waiting` ones
        (None: all known). Files of jobs that are not known are moved to `orphans/`, each job's to a folder of its own.
        How many files were removed, and how many moved. To be called while nothing else writes, after the lock was
        taken and before jobs are accepted. Files that this server would not have named are left alone."""
        waiting = known if waiting is None else waiting
        removed = moved = 0
        with disk_faults():
            for leftover in list(self._temporary.iterdir()):
                _remove_leftover(leftover)
                removed += 1
            for job_id, file in [(job_id, Path(entry.path)) for job_id, entry in self._images()]:
                if job_id not in known:
                    with suppress(StorageFull):  # then it stays where it is, and the next start tries again
                        self._move(file, self.orphans.place(job_id))
                        moved += 1
                elif file.parent != self.root and job_id not in waiting:
                    self._remove(file)
                    removed += 1
            for folder in list(self._inputs.iterdir()):
                if not JOB_ID.fullmatch(folder.name):
                    continue
                with suppress(OSError):  # no record to rename; not empty: it holds a stranger's file
                    if folder.name in waiting:  # it died before it could tell
                        (folder / UNTOLD).replace(folder / RECORD)
                    else:
                        folder.rmdir()
        return removed, moved

    # --- asking -------------------------------------------------------------------------------------------------------

    def path(self, name: str) -> Path:
        """Where the file of that name is (or would be). Raises `JobNotFound` for a name that this store never gives."""
        return self.root / check_name(name)

    def records(self) -> Iterator[tuple[str, bytes]]:
        """(job id, record) of the jobs whose acceptance was told and whose inputs are here."""
        for folder in list(self._inputs.iterdir()):
            if JOB_ID.fullmatch(folder.name) and not folder.is_symlink():
                with suppress(FileNotFoundError, NotADirectoryError):
                    yield folder.name, (folder / RECORD).read_bytes()

    def temporary(self) -> Path:
        """A place for a file that is being written; a start sweeps what is left there."""
        return self._temporary / uuid4().hex

    def has_inputs(self, job_id: str) -> bool:
        """Whether a folder of inputs is there."""
        return (self._inputs / check_id(job_id)).is_dir()

    def result(self, job_id: str) -> Path | None:
        """The result of a job, if one is there."""
        places = (self.root / result_name(job_id, format) for format in EXTENSIONS)
        return next((place for place in places if place.is_file()), None)

    def thumbnail(self, job_id: str) -> bytes | None:
        """The small copy of a result, if one is kept."""
        try:
            return self.path(thumbnail_name(job_id)).read_bytes()
        except FileNotFoundError:
            return None

    def usage(self) -> int:
        """Bytes of all inputs and results."""
        return self._used

    def free(self) -> int:
        """Bytes that are left on the disk."""
        return _free(self.root)

    def try_write(self) -> None:
        """Raise what keeps a file from being written. Nothing stays."""
        with disk_faults(), tempfile.TemporaryFile(dir=self._temporary) as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())

    def keep_reserve(self) -> None:
        """Have a file that takes room only to give it back (`spend_reserve`), so that on a full disk the database still
        takes what frees room: ends of jobs, and retention. It is no part of what is left alone."""
        size, place = min(RESERVED, self.min_free), self.root / RESERVE
        if size and not place.exists() and self.free() >= self.min_free + size:
            temporary = self.temporary()
            with disk_faults():
                _write(temporary, bytes(size))
                temporary.replace(place)

    def spend_reserve(self) -> None:
        """Give the reserve's room back to the disk."""
        with disk_faults():
            (self.root / RESERVE).unlink(missing_ok=True)

    def room(self, extra: int = 0) -> None:
        """Raise `StorageFull` when `extra` more bytes would take the disk's reserve or exceed the bound."""
        check_disk(self.root, extra, self.min_free, "another job")
        if self.max_bytes is not None and self._used + extra > self.max_bytes:
            raise StorageFull(
                f"the images kept have reached the {self.max_bytes >> 20} MiB set for them; "
                "try again when older results have been removed",
                retry_after=RETRY_AFTER,
            )

    # --- files --------------------------------------------------------------------------------------------------------

    def _put(self, files: Mapping[str, Data]) -> None:
        """Write files of one folder: every one flushed under a temporary name, then all renamed, then the folder."""
        places = [self.root / name for name in files]
        folder = places[0].parent
        temporaries: list[Path] = []
        placed: list[Path] = []
        new = False
        try:
            with disk_faults():
                for data in files.values():
                    temporaries.append(self.temporary())
                    _write(temporaries[-1], data)
                new = folder != self.root and make_folder(folder)
                for temporary, place in zip(temporaries, places, strict=True):
                    if self._rename(temporary, place):
                        placed.append(place)
                _flush_folder(folder)
                if new:
                    _flush_folder(self._inputs)
        except BaseException:
            with suppress(OSError):
                for temporary in temporaries:
                    temporary.unlink(missing_ok=True)
                for place in placed:
                    self._remove(place)
                if new:
                    folder.rmdir()
            raise

    def _rename(self, temporary: Path, place: Path) -> bool:
        """Whether nothing was at that place before."""
        with self._lock:
            before = _size(place)
            size = temporary.stat().st_size
            temporary.replace(place)
            self._used += size - (before or 0)
            return before is None

    def _remove(self, file: Path) -> None:
        with self._lock:
            if (size := _size(file)) is not None:
                file.unlink()
                self._used -= size

    def _move(self, file: Path, folder: Path) -> None:
        with self._lock, disk_faults():
            size = _size(file) or 0
            file.replace(folder / file.name)
            self._used -= size

    def _images(self) -> Iterator[tuple[str, os.DirEntry[str]]]:
        """(job id, file) of every image kept, and of the records beside inputs."""
        with os.scandir(self.root) as entries:
            for entry in entries:
                if (match := RESULT.fullmatch(entry.name)) and entry.is_file(follow_symlinks=False):
                    yield match[1], entry
        with os.scandir(self._inputs) as folders:
            for folder in folders:
                if JOB_ID.fullmatch(folder.name) and folder.is_dir(follow_symlinks=False):
                    with os.scandir(folder) as entries:
                        yield from ((folder.name, entry) for entry in entries if entry.is_file(follow_symlinks=False))


def check_disk(folder: Path, extra: int, min_free: int, what: str) -> None:
    """Raise `StorageFull` when `extra` more bytes, `what`, would leave fewer than `min_free` on the folder's disk, and
    `StorageFailed` when it cannot be asked."""
    if _free(folder) - extra < min_free:
        raise StorageFull(
            f"the server's disk has no room for {what}; try again later, or let the operator make room",
            retry_after=RETRY_AFTER,
        )


def _free(folder: Path) -> int:
    with disk_faults():
        disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize


def _write(file: Path, data: Data, flush: bool = True) -> None:
    fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, FILE_MODE)
    try:
        rest = memoryview(data).cast("B")
        while rest:
            rest = rest[os.write(fd, rest) :]
        if flush:
            os.fsync(fd)
    finally:
        os.close(fd)


def _remove_leftover(leftover: Path) -> None:
    if leftover.is_dir() and not leftover.is_symlink():
        shutil.rmtree(leftover)
    else:
        leftover.unlink()


def _flush_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _files_of(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []


def _size(file: Path) -> int | None:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return None

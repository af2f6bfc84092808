"""Programs that the store's process tests start, kill and starve; and a small real disk to fill."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PRELUDE = """
import os, resource, signal, sys, threading
from pathlib import Path
from core.errors import ImagePoolError, StorageFailed, StorageFull
from core.states import State
from store.files import FileStore
from store.jobs import JobStore
from store.lock import FolderLock
from tests.pure.store_kit import WAIT, a_job, finish, new_id, put

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

root = Path(sys.argv[1])
"""


@contextmanager
def program(body: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A Python program of its own, in the project's root; killed at the end if it still lives."""
    process = subprocess.Popen(
        [sys.executable, "-c", PRELUDE + body, *map(str, arguments)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def run(body: str, *arguments: object) -> list[str]:
    """What a program says, line by line, once it ended well."""
    with program(body, *arguments) as process:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        return out.splitlines()


@contextmanager
def small_disk(folder: Path, size: str = "2m") -> Iterator[Path]:
    """A real file system of that size, mounted at the folder; lazily unmounted, as a failed test may still hold files.
    Skips the test where mounting is not permitted."""
    folder.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder],
                             capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip("mounting is not permitted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], capture_output=True, check=True)

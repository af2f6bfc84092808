"""Two servers never share an outputs folder, and a dead one never keeps it."""

import multiprocessing
import os
import signal

import pytest

from core.errors import StorageFailed
from store.lock import FolderLock
from tests.process.store_kit_process import program, run

HOLD = """
lock = FolderLock(root)
say("held")
signal.pause()
"""


def test_a_second_server_is_told_who_holds_the_folder_and_what_to_do(tmp_path):
    with FolderLock(tmp_path / "outputs"):
        said = run("""
try:
    FolderLock(root)
except StorageFailed as fault:
    say(fault.message)
""", tmp_path / "outputs")
    assert f"process {os.getpid()}" in said[0]
    assert "stop it" in said[0]
    assert str(tmp_path) not in said[0]


def test_the_same_process_cannot_take_it_twice_either(tmp_path):
    with FolderLock(tmp_path), pytest.raises(StorageFailed, match="another server"):
        FolderLock(tmp_path)


def test_sigkill_of_the_holder_frees_the_folder(tmp_path):
    with program(HOLD, tmp_path) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(StorageFailed):
            FolderLock(tmp_path)
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        FolderLock(tmp_path).close()


def test_closing_frees_the_folder_and_closing_twice_is_fine(tmp_path):
    lock = FolderLock(tmp_path)
    lock.close()
    lock.close()
    with FolderLock(tmp_path), pytest.raises(StorageFailed):
        FolderLock(tmp_path)


def test_other_folders_are_free(tmp_path):
    with FolderLock(tmp_path / "a"), FolderLock(tmp_path / "b"):
        pass


def _pause() -> None:
    signal.pause()


def test_a_spawned_worker_that_outlives_the_server_does_not_keep_the_folder(tmp_path):
    lock = FolderLock(tmp_path)
    worker = multiprocessing.get_context("spawn").Process(target=_pause, daemon=True)
    worker.start()
    try:
        lock.close()
        FolderLock(tmp_path).close()
    finally:
        worker.kill()
        worker.join()

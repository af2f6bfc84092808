"""The machine runs out, or refuses: memory of the host, /dev/shm, a file system that has become read-only."""

from __future__ import annotations

import concurrent.futures
import io
import os
import resource
import shutil
import subprocess

import httpx
import numpy as np
import psutil
import pytest
from kit import RunningServer, eventually, photo, pixels, running
from PIL import Image

PLAIN = {"Content-Type": "image/png"}


def run(server: RunningServer, data: bytes) -> httpx.Response:
    return httpx.post(f"{server.url}/run/stub", content=data, headers=PLAIN, timeout=60)


def served(server: RunningServer, seed: int) -> bool:
    answer = run(server, photo(seed))
    return answer.status_code == 200 and np.array_equal(pixels(answer.content), 255 - pixels(photo(seed)))


def one_colour(side: int) -> bytes:
    """A small file that is a large picture."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), "teal").save(file, "PNG")
    return file.getvalue()


def pids(server: RunningServer) -> list[int]:
    return [told["pid"] for told in server.status()["processes_info"].values()]


def test_a_host_without_memory_for_an_image_says_so_and_serves_the_others(tmp_path):
    with running(tmp_path / "outputs", models="stub") as server:
        server.wait_all_ready()
        workers = [psutil.Process(pid) for pid in pids(server)]
        assert all(served(server, seed) for seed in range(4)), "threads and heaps are there before the limit is"
        for worker in workers:
            most = worker.memory_info().vms + (100 << 20)
            resource.prlimit(worker.pid, resource.RLIMIT_AS, (most, most))
        large = one_colour(4900)
        with concurrent.futures.ThreadPoolExecutor(5) as threads:
            too_much = [threads.submit(run, server, large) for _ in range(2)]
            others = [threads.submit(served, server, seed) for seed in range(20)]
            told = [future.result() for future in too_much]
            assert all(future.result() for future in others)
        assert {answer.json()["code"] for answer in told} == {"out_of_memory"}
        assert all("smaller" in answer.json()["detail"] for answer in told)
        server.wait_all_ready()
        assert served(server, 99)


def in_namespace(server: RunningServer, script: str) -> None:
    """Let the server begin behind a shell script in a mount namespace of its own."""
    server._command = ["unshare", "--mount", "sh", "-e", "-c", f'{script}; exec "$@"', "sh", *server._command]


def may_mount() -> bool:
    probe = ["unshare", "--mount", "sh", "-c", "mount -t tmpfs tmpfs /dev/shm"]
    return bool(shutil.which("unshare")) and subprocess.run(probe, check=False, capture_output=True).returncode == 0


@pytest.mark.skipif(not may_mount(), reason="a mount namespace needs root")
def test_a_full_dev_shm_does_not_matter(tmp_path):
    server = RunningServer(tmp_path / "outputs", models="stub")
    fill = "mount -t tmpfs -o size=4k tmpfs /dev/shm; (dd if=/dev/zero of=/dev/shm/full || true) 2> /dev/null"
    in_namespace(server, fill)
    try:
        server.start()
        assert server.process is not None
        disk = os.statvfs(f"/proc/{server.process.pid}/root/dev/shm")
        assert disk.f_bavail == 0, "it is full for the server"
        assert all(served(server, seed) for seed in range(20))
        assert served(server, 1) and run(server, photo(1, 1500, 1000)).status_code == 200
        assert server.wait_job(server.submit(2))["state"] == "succeeded"
    finally:
        tree = server.tree()
        server.stop()
        server.client.close()
    assert not psutil.wait_procs(tree, timeout=10)[1]


@pytest.mark.skipif(not may_mount(), reason="mounting needs root")
def test_a_folder_that_becomes_read_only_refuses_new_jobs_and_loses_none(tmp_path):
    with running(tmp_path / "outputs", models="stub") as server:
        job = server.submit(1, act="sleep", seconds="1")
        eventually(lambda: server.job(job)["state"] == "running")
        place = str(tmp_path / "outputs" / "tmp")
        subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", place], check=True)
        try:
            refused = server.client.post("/jobs", files={"image": photo(2)}, data={"model": "stub"})
            assert (refused.status_code, refused.json()["code"]) == (503, "storage_failed")
            assert refused.json()["retryable"] and str(tmp_path) not in refused.text
            assert served(server, 3), "requests that store nothing are served all the same"
            eventually(lambda: "cannot be stored" in server.log.read_text())
            assert server.job(job)["state"] == "running"
        finally:
            subprocess.run(["umount", "-l", place], check=True)
        assert server.wait_job(job)["state"] == "succeeded"
        assert np.array_equal(pixels(server.get(f"/jobs/{job}/result").content), 255 - pixels(photo(1)))
        assert server.wait_job(server.submit(4))["state"] == "succeeded"
        assert not list((tmp_path / "outputs" / "inputs").iterdir())

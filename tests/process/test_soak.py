"""Thousands of requests and model switches leave no memory and no file behind, in the master and in the worker."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import psutil
from kit import photo, pixels, running

WARM, MEASURED = 1000, 3000
PLAIN = {"Content-Type": "image/png"}


def footprint(processes: list[psutil.Process]) -> np.ndarray:
    """Anonymous bytes and open files of each process. Pages of libraries do not count: they become private, without any
    growth, when another process that has mapped them ends."""
    return np.array([[anonymous(process.pid), process.num_fds()] for process in processes])


def anonymous(pid: int) -> int:
    """Bytes of resident memory that no file is behind."""
    return 1024 * int(re.search(r"RssAnon:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text())[1])


def test_three_thousand_requests_that_switch_models_each_time_leave_nothing_behind(tmp_path):
    with running(tmp_path / "outputs", devices="cpu:1") as server:
        images = [photo(seed, 64, 64) for seed in range(8)]
        inverted = [255 - pixels(image) for image in images]

        def ask(number: int) -> None:
            image, which = images[number % 8], number % 8
            model = "stub" if number % 2 else "echo"
            answer = server.client.post(f"/run/{model}?base_ms=0", content=image, headers=PLAIN)
            assert answer.status_code == 200
            if model == "echo":
                assert answer.content == image
            elif number % 50 == 1:
                assert np.array_equal(pixels(answer.content), inverted[which])
            if number % 100 == 0:
                assert server.wait_job(server.submit(which))["state"] == "succeeded"

        for number in range(WARM):
            ask(number)
        processes = [process for process in server.tree() if process.num_threads() > 1]
        assert len(processes) == 2, "the master and its worker"
        before = footprint(processes)
        for number in range(MEASURED):
            ask(number)
        grown = footprint(processes) - before
        assert (grown[:, 0] / MEASURED < 1024).all(), f"bytes that stayed for each request: {grown[:, 0] / MEASURED}"
        assert (grown[:, 1] <= 3).all(), f"files left open: {grown[:, 1]}"
        (device,) = server.workers()
        assert device["restarts"] == 0

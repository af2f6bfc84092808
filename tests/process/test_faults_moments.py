"""A worker is killed or stopped at every moment of its life, under load: every job ends once, with the right image."""

from __future__ import annotations

import concurrent.futures
import os
import signal

import httpx
import numpy as np
import pytest
from kit import RunningServer, eventually, photo, pixels, running
from trap_model import MOMENTS, write_spec

ENDS = ("succeeded", "failed", "cancelled", "expired")


@pytest.fixture(scope="module")
def traps(tmp_path_factory):
    return tmp_path_factory.mktemp("moments") / "traps"


@pytest.fixture(scope="module")
def server(traps):
    write_spec(traps.parent / "models", traps)
    flags = {
        "models-folder": traps.parent / "models", "hang-floor": "500ms", "ping-interval": "100ms",
        "restart-backoff": "20ms", "restart-backoff-max": "200ms", "boot-timeout": "8s", "give-up-after": 50,
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    with running(traps.parent / "outputs", *words, models="trap") as made:
        yield made


def right(seed: int, data: bytes) -> bool:
    return np.array_equal(pixels(data), 255 - pixels(photo(seed)))


def ask(server: RunningServer, seed: int) -> str:
    """A request whose client waits: "right" when it got its own image, else what it got."""
    headers = {"Content-Type": "image/png"}
    answer = httpx.post(f"{server.url}/run/trap", content=photo(seed), headers=headers, timeout=60)
    if answer.status_code != 200:
        return answer.text
    return "right" if right(seed, answer.content) else "another image"


def pids(server: RunningServer) -> dict[str, int]:
    """The process of each device that takes batches."""
    told = server.status()
    ready = [device for device in told["devices"] if device["state"] in ("ready", "busy")]
    return {device["device"]: told["processes_info"][str(device["index"])]["pid"] for device in ready}


@pytest.mark.parametrize("how", ["kill", "stop"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_worker_lost_at_any_moment_under_load_costs_no_job(server, traps, moment, how):
    server.wait_all_ready()
    before = pids(server)
    (traps / f"{moment}.{how}").touch()
    if moment in ("load", "warm-up"):
        os.kill(next(iter(before.values())), signal.SIGKILL)  # its successor comes by
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        waiting = [threads.submit(ask, server, seed) for seed in range(8)]
        jobs = [server.submit(seed, "trap") for seed in range(8, 24)]
        assert [future.result() for future in waiting] == ["right"] * 8
    told = [server.wait_job(job) for job in jobs]
    assert {job["state"] for job in told} == {"succeeded"}, told
    assert all(len([move for move in job["history"] if move["state"] in ENDS]) == 1 for job in told)
    assert all(right(seed, server.get(job["links"]["result"]).content) for seed, job in enumerate(told, 8))
    eventually(lambda: not any(traps.iterdir()))
    eventually(lambda: (now := pids(server)).keys() == before.keys() and now != before)
    assert server.status()["queue"]["bytes"] == 0

"""Readings: NVML's numbers per device, psutil's per process, and what is told when either is gone."""

from __future__ import annotations

import os
import sys

import pytest

from tests.pure.fake_nvml import Board, FakeNvml, Part
from workers.devices import DevicePlan
from workers.monitor import Monitor, Reading

NOBODY = 2**22 - 1


def watch(monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml | None, *uuids: str) -> Monitor:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    return Monitor([DevicePlan(f"cuda:{index}", index, "cuda", uuid=uuid) for index, uuid in enumerate(uuids)])


def test_a_gpu_tells_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml(Board("GPU-a"))
    monitor = watch(monkeypatch, nvml, "GPU-a")
    assert monitor.read({}) == {"cuda:0": Reading(0.37, 8 << 30, 80 << 30, 61, 350.5)}
    monitor.close()
    monitor.close()
    assert nvml.open == 0


def test_what_a_gpu_cannot_tell_is_unknown_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = watch(monkeypatch, FakeNvml(Board("GPU-a", unsupported={"power", "utilisation"})), "GPU-a")
    assert monitor.read({})["cuda:0"] == Reading(None, 8 << 30, 80 << 30, 61, None)


def test_a_mig_instance_has_its_own_memory_and_its_boards_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = watch(monkeypatch, FakeNvml(Board("GPU-a", parts=[Part("MIG-1")])), "MIG-1")
    assert monitor.read({})["cuda:0"] == Reading(None, 1 << 30, 10 << 30, 61, 350.5)


def test_a_lost_gpu_is_told_and_comes_back_and_its_neighbour_is_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = Board("GPU-a")
    monitor = watch(monkeypatch, FakeNvml(bad, Board("GPU-b")), "GPU-a", "GPU-b")
    healthy = monitor.read({})
    bad.lost = True
    for _ in range(2):
        now = monitor.read({"cuda:0": os.getpid()})
        assert now["cuda:0"].lost and now["cuda:0"].utilisation is None and now["cuda:0"].rss
        assert now["cuda:1"] == healthy["cuda:1"]
    bad.lost = False
    assert monitor.read({}) == healthy


def test_without_nvml_devices_are_unknown_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    assert watch(monkeypatch, None, "GPU-a").read({}) == {"cuda:0": Reading()}


def test_processes_tell_memory_and_after_the_second_look_their_cpu_share() -> None:
    monitor = Monitor([DevicePlan("cpu:0", 0, "cpu"), DevicePlan("cpu:1", 1, "cpu")])
    first = monitor.read({"cpu:0": os.getpid(), "cpu:1": None})
    assert first["cpu:0"].rss and first["cpu:0"].rss > 1 << 20 and first["cpu:0"].cpu_percent is None
    assert first["cpu:1"] == Reading()
    second = monitor.read({"cpu:0": os.getpid()})["cpu:0"]
    assert second.cpu_percent is not None and second.cpu_percent >= 0
    assert second.memory_total is None


def test_a_process_that_is_gone_is_unknown_and_its_successor_starts_anew() -> None:
    monitor = Monitor([DevicePlan("cpu:0", 0, "cpu")])
    monitor.read({"cpu:0": os.getpid()})
    assert monitor.read({"cpu:0": NOBODY})["cpu:0"] == Reading()
    assert monitor.read({"cpu:0": os.getppid()})["cpu:0"].cpu_percent is None

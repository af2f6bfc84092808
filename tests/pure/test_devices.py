"""Which workers there will be for a setting, an environment and a host; and what NVML is asked."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.pure.fake_nvml import Board, FakeNvml, Part
from workers.devices import DevicePlan, Gpu, Mig, available_cores, list_gpus, plan, unused

TWO = [Gpu(0, "GPU-1234aaaa", "H100", 80 << 30, (0, 1)), Gpu(1, "GPU-1239bbbb", "H100", 80 << 30, (2, 3))]
FOUR = [Gpu(index, f"GPU-{index}{index}{index}{index}") for index in range(4)]
PARTS = (Mig("MIG-1111", "1g.5gb", 5 << 30), Mig("MIG-2222", "2g.10gb", 10 << 30))
PARTED = [
    Gpu(0, "GPU-aaaa", "A100", 40 << 30, (5,), PARTS),
    Gpu(1, "GPU-bbbb"),
    Gpu(2, "GPU-cccc", mig=()),
]


def workers(plans: list[DevicePlan]) -> list[tuple[str, str]]:
    return [(item.worker, item.visible) for item in plans]


def test_auto_takes_every_gpu_by_its_uuid_when_nothing_is_listed() -> None:
    plans = plan("auto", None, TWO, 8)
    assert workers(plans) == [("cuda:0", "GPU-1234aaaa"), ("cuda:1", "GPU-1239bbbb")]
    assert plans[1] == DevicePlan(
        "cuda:1", 1, "cuda", "GPU-1239bbbb", 1, (2, 3), "H100", 80 << 30, "GPU-1239bbbb"
    )


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("1,0", [("1", "GPU-1239bbbb"), ("0", "GPU-1234aaaa")]),
        (" 1 ", [("1", "GPU-1239bbbb")]),
        ("GPU-1239", [("GPU-1239", "GPU-1239bbbb")]),
        ("GPU-1234aaaa,GPU-1239bbbb", [("GPU-1234aaaa", "GPU-1234aaaa"), ("GPU-1239bbbb", "GPU-1239bbbb")]),
        ("0,-1,1", [("0", "GPU-1234aaaa")]),
        ("0,7,1", [("0", "GPU-1234aaaa")]),
        ("GPU-1234,nonsense,GPU-1239", [("GPU-1234", "GPU-1234aaaa")]),
        ("0,GPU-123", [("0", "GPU-1234aaaa")]),  # a beginning that two share names neither
    ],
)
def test_what_the_parent_lists_is_handed_on_exactly(visible: str, expected: list[tuple[str, str]]) -> None:
    plans = plan("auto", visible, TWO, 8)
    assert [(item.visible, item.uuid) for item in plans] == expected
    assert [item.worker for item in plans] == [f"cuda:{number}" for number in range(len(expected))]


@pytest.mark.parametrize("visible", ["", "-1", "NoDevFiles", "9", ",0"])
def test_hidden_gpus_leave_cpu_workers(visible: str) -> None:
    assert {item.kind for item in plan("auto", visible, TWO, 2)} == {"cpu"}


@pytest.mark.parametrize("visible", ["0,0", "0,GPU-1234", "GPU-1234,GPU-1234aaaa"])
def test_a_gpu_listed_twice_is_told(visible: str) -> None:
    with pytest.raises(ValueError, match=r"CUDA_VISIBLE_DEVICES names .* twice"):
        plan("auto", visible, TWO, 2)


def test_mig_instances_are_devices_and_a_bare_partitioned_gpu_is_none() -> None:
    plans = plan("auto", None, PARTED, 8)
    assert workers(plans) == [("cuda:0", "MIG-1111"), ("cuda:1", "MIG-2222"), ("cuda:2", "GPU-bbbb")]
    assert (plans[1].name, plans[1].memory_total, plans[1].uuid) == ("2g.10gb", 10 << 30, "MIG-2222")
    assert plans[0].cpus == plans[1].cpus == (5,)
    assert workers(plan("cuda:1", "MIG-2222,MIG-11", PARTED, 8)) == [("cuda:1", "MIG-11")]


def test_a_partitioned_gpu_named_as_a_whole_shows_its_first_instance() -> None:
    (only,) = plan("auto", "0", PARTED, 8)
    assert (only.visible, only.uuid, only.memory_total) == ("0", "MIG-1111", 5 << 30)
    assert plan("auto", "2", PARTED, 8)[0].kind == "cpu"
    with pytest.raises(ValueError, match="GPU 2 is in MIG mode without an instance"):
        plan("cuda", None, PARTED[2:], 8)


def test_two_mig_instances_of_one_gpu_are_not_the_same_device() -> None:
    assert len(plan("auto", "MIG-1111,MIG-2222", PARTED, 8)) == 2


def test_chosen_and_mixed_devices() -> None:
    assert workers(plan("cuda:2,cuda:0", None, FOUR, 8)) == [("cuda:2", "GPU-2222"), ("cuda:0", "GPU-0000")]
    assert workers(plan("cuda:1", "3,2", FOUR, 8)) == [("cuda:1", "2")]
    mixed = plan("cuda:0,cpu:2", None, FOUR, 9)
    assert workers(mixed) == [("cuda:0", "GPU-0000"), ("cpu:0", ""), ("cpu:1", "")]
    assert [(item.index, item.kind, item.threads) for item in mixed] == [(0, "cuda", 1), (1, "cpu", 4), (2, "cpu", 4)]
    assert len(plan("cuda", None, FOUR, 8)) == 4
    assert {item.kind for item in plan("cpu", None, FOUR, 8)} == {"cpu"}


@pytest.mark.parametrize(
    ("setting", "cores", "workers", "threads"),
    [("auto", 1, 1, 1), ("auto", 2, 2, 1), ("auto", 3, 3, 1), ("auto", 8, 4, 2), ("auto", 64, 4, 16),
     ("cpu", 2, 2, 1), ("cpu:1", 8, 1, 8), ("cpu:3", 8, 3, 2), ("cpu:4", 2, 4, 1), ("CPU:2", 4, 2, 2)],
)  # fmt: skip
def test_cpu_workers_share_the_cores(setting: str, cores: int, workers: int, threads: int) -> None:
    plans = plan(setting, None, [], cores)
    assert [item.worker for item in plans] == [f"cpu:{number}" for number in range(workers)]
    assert {(item.threads, item.visible, item.cpus) for item in plans} == {(threads, "", ())}


def test_threads_can_be_set() -> None:
    assert [item.threads for item in plan("cpu:2", None, [], 8, threads=3)] == [3, 3]


@pytest.mark.parametrize(
    ("setting", "visible", "gpus", "why"),
    [
        ("auto", "0", [], "is '0', but the NVIDIA driver lists none"),
        ("auto", "GPU-abc,1", [], "is 'GPU-abc,1', but the NVIDIA driver lists none"),
        ("auto", "7", TWO, "is '7', but this host has 2"),
        ("auto", "1", TWO, None),
        ("auto", "", TWO, None),
        ("auto", "-1", TWO, None),
        ("auto", None, [], None),
        ("cpu:2", "0", [], None),
    ],
)
def test_gpus_that_are_named_and_cannot_be_used_are_told(
    setting: str, visible: str | None, gpus: list[Gpu], why: str | None
) -> None:
    told = unused(setting, visible, gpus)
    assert told is None if why is None else told and why in told


@pytest.mark.parametrize(
    ("setting", "visible", "gpus", "sentence"),
    [
        ("cuda:7", None, TWO, r"there is no cuda:7; there are cuda:0 to cuda:1 \(H100\)"),
        ("cuda:1", "0", TWO, "cuda:0 is the only GPU .* CUDA_VISIBLE_DEVICES is '0' on a host with 2"),
        ("cuda:0", "", TWO, "no GPU is visible .* CUDA_VISIBLE_DEVICES is '' on a host with 2"),
        ("cuda:0", None, [], "no GPU is visible .* the NVIDIA driver lists none"),
        ("cuda", None, [], "'cuda' asks for GPUs; no GPU is visible"),
        ("cuda:0,cuda:0", None, TWO, "cuda:0 is named twice"),
        ("cuda,cuda:1", None, TWO, "cuda:1 is named twice"),
        ("cpu:0", None, [], "from 1 to 64"),
        ("cpu:65", None, [], "from 1 to 64"),
        ("cpu:1,cpu:1", None, [], "write cpu:N once"),
        ("auto,cpu:1", None, [], "'auto' is no device"),
        ("gpu:0", None, TWO, "'gpu:0' is no device; write auto"),
        ("cuda:-1", None, TWO, "is no device"),
        ("cuda:99999", None, TWO, "is no device"),
        ("", None, TWO, "is no device"),
        ("cuda:0,,cuda:1", None, TWO, "is no device"),
    ],
)
def test_the_impossible_is_a_sentence(setting: str, visible: str | None, gpus: list[Gpu], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        plan(setting, visible, gpus, 4)


def test_nvml_lists_boards_their_cores_and_their_mig_instances(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 70})
    nvml = FakeNvml(
        Board("GPU-a", b"Fake A", near=0b0110 | 1 << 70, unsupported={"mig"}),
        Board("GPU-b", lost=True),
        Board("GPU-c", near=0b1000, parts=[Part("MIG-1"), Part("MIG-2", total=20 << 30)]),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert list_gpus() == [
        Gpu(0, "GPU-a", "Fake A", 80 << 30, (1, 2, 70), None),
        Gpu(2, "GPU-c", "Fake H100", 80 << 30, (),  # the cores beside it are not ours
            (Mig("MIG-1", "Fake MIG 1g.10gb", 10 << 30), Mig("MIG-2", "Fake MIG 1g.10gb", 20 << 30))),
    ]  # fmt: skip
    assert nvml.open == 0


@pytest.mark.parametrize("module", [None, FakeNvml(Board("GPU-a"), driver=False)])
def test_no_library_or_no_driver_means_no_gpu(module: FakeNvml | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", module)  # None: importing it raises ImportError
    assert list_gpus() == []


@pytest.mark.parametrize(("quota", "expected"), [("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1), ("", 8)])
def test_cores_are_cut_by_a_containers_quota(quota: str, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(Path, "read_text", lambda *_: quota)
    assert available_cores() == expected

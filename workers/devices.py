"""Which workers there will be, and what each is pinned to.

`plan` is pure: the setting, the parent's CUDA_VISIBLE_DEVICES, what NVML lists and the number of cores go in, one
`DevicePlan` per worker comes out. cuda:N is the N-th device that CUDA would show this process: the N-th entry of
CUDA_VISIBLE_DEVICES, else the N-th GPU (or MIG instance) in NVML's order. Without a GPU, `auto` takes up to four CPU
workers that share the cores.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

MAX_CPU_WORKERS = 64
AUTO_CPU_WORKERS = 4


@dataclass(frozen=True, slots=True)
class Mig:
    """One MIG instance: a slice of a GPU. Memory in bytes."""

    uuid: str
    name: str = "MIG"
    memory_total: int | None = None


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU as NVML lists it. `cpus` are the cores near it that this process may use; `mig` is None when the GPU is
    not partitioned (an empty tuple: partitioned, but without an instance, so it cannot be used)."""

    index: int
    uuid: str
    name: str = "GPU"
    memory_total: int | None = None
    cpus: tuple[int, ...] = ()
    mig: tuple[Mig, ...] | None = None


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """What one worker is pinned to. `index` is its place in the plan; `visible` the exact CUDA_VISIBLE_DEVICES of its
    process ("" for a CPU worker); `threads` torch's intra-op threads; `cpus` the affinity (empty: leave it)."""

    worker: str
    index: int
    kind: Literal["cuda", "cpu"]
    visible: str = ""
    threads: int = 1
    cpus: tuple[int, ...] = ()
    name: str = "CPU"
    memory_total: int | None = None
    uuid: str | None = None


@dataclass(frozen=True, slots=True)
class _Slot:
    """One device that a child can be shown: under which text, and what it is."""

    visible: str
    gpu: Gpu
    part: Mig | None = None


def plan(setting: str, visible: str | None, gpus: Sequence[Gpu], cores: int, threads: int = 0) -> list[DevicePlan]:
    """One plan per worker. `setting`: auto, cuda, cuda:0,cuda:2, cpu, cpu:4 (four workers), or a mixture. `visible`:
    the parent's CUDA_VISIBLE_DEVICES, None when unset. `threads` is per CPU worker, 0 shares the cores.

    Raises ValueError with a sentence that says what exists when the setting asks for something that does not."""
    slots = _slots(visible, gpus)
    chosen, cpu_workers = _choose(setting, slots, max(1, cores), _why_hidden(visible, gpus))
    share = threads or max(1, (max(1, cores) - len(chosen)) // max(1, cpu_workers))
    plans = [_gpu_plan(place, number, slots[number]) for place, number in enumerate(chosen)]
    for number in range(cpu_workers):
        plans.append(DevicePlan(f"cpu:{number}", len(plans), "cpu", threads=share))
    return plans


def unused(setting: str, visible: str | None, gpus: Sequence[Gpu]) -> str | None:
    """Why CPUs serve although somebody named GPUs; None when that is not so."""
    named = [word.strip() for word in (visible or "").split(",")]
    if setting.strip().lower() != "auto" or _slots(visible, gpus) or not re.match(r"\+?[0-9]|GPU-|MIG-", named[0]):
        return None
    have = f"this host has {len(gpus)}, and none of that name" if gpus else "the NVIDIA driver lists none"
    return f"CUDA_VISIBLE_DEVICES is '{(visible or '')[:64]}', but {have}"


def _choose(setting: str, slots: Sequence[_Slot], cores: int, hint: str) -> tuple[list[int], int]:
    """The numbers of the CUDA devices and the number of CPU workers that the setting asks for."""
    few = min(cores, AUTO_CPU_WORKERS)
    words = [word.strip().lower() for word in setting.split(",")]
    if words == ["auto"]:
        return list(range(len(slots))), 0 if slots else few
    chosen: list[int] = []
    cpu_workers = 0
    for word in words:
        form = re.fullmatch(r"(cuda|cpu)(?::([0-9]{1,4}))?", word)
        if form is None:
            raise ValueError(f"devices: '{word[:64]}' is no device; write auto, cuda, cuda:0,cuda:2, cpu:4 or a mix")
        kind, number = form[1], form[2]
        if kind == "cpu":
            if cpu_workers or (number and not 0 < int(number) <= MAX_CPU_WORKERS):
                raise ValueError(f"devices: write cpu:N once, for N CPU workers from 1 to {MAX_CPU_WORKERS}")
            cpu_workers = int(number) if number else few
            continue
        wanted = [int(number)] if number else list(range(len(slots)))
        for index in wanted:
            if index in chosen:
                raise ValueError(f"devices: cuda:{index} is named twice in '{setting[:64]}'")
            if index >= len(slots):
                raise ValueError(f"devices: there is no cuda:{index}; {_exists(slots)}{hint}")
        if not wanted:
            raise ValueError(f"devices: 'cuda' asks for GPUs; {_exists(slots)}{hint}")
        chosen += wanted
    return chosen, cpu_workers


def _slots(visible: str | None, gpus: Sequence[Gpu]) -> list[_Slot]:
    """What CUDA shows this process, in its order."""
    if visible is None:
        return [slot for gpu in gpus for slot in _parts(gpu)]
    slots: list[_Slot] = []
    for word in (entry.strip() for entry in visible.split(",")):
        slot = _find(word, gpus)
        if slot is None:
            break  # CUDA's own rule: an entry it does not know hides everything after it ("-1" hides all that follows)
        if any((slot.gpu.uuid, slot.part) == (other.gpu.uuid, other.part) for other in slots):
            raise ValueError(f"CUDA_VISIBLE_DEVICES names {word[:64]} twice; CUDA would show no device at all")
        slots.append(slot)
    return slots


def _parts(gpu: Gpu) -> list[_Slot]:
    if gpu.mig is not None:
        return [_Slot(part.uuid, gpu, part) for part in gpu.mig]
    return [_Slot(gpu.uuid, gpu)]


def _find(word: str, gpus: Sequence[Gpu]) -> _Slot | None:
    """The device behind one entry of CUDA_VISIBLE_DEVICES: an index, or (the unique beginning of) a UUID."""
    number = re.match(r"\+?([0-9]+)", word)  # CUDA reads it like strtoul: "1x" is 1
    if number:
        found = [_first_part(word, gpu) for gpu in gpus if gpu.index == int(number[1])]
    elif word.startswith("GPU-"):
        found = [_first_part(word, gpu) for gpu in gpus if gpu.uuid.lower().startswith(word.lower())]
    elif word.startswith("MIG-"):
        parts = [(gpu, part) for gpu in gpus for part in gpu.mig or ()]
        found = [_Slot(word, gpu, part) for gpu, part in parts if part.uuid.lower().startswith(word.lower())]
    else:
        return None
    return found[0] if len(found) == 1 else None


def _first_part(word: str, gpu: Gpu) -> _Slot | None:
    """A partitioned GPU, named as a whole, shows its first instance only."""
    if gpu.mig is None:
        return _Slot(word, gpu)
    return _Slot(word, gpu, gpu.mig[0]) if gpu.mig else None


def _gpu_plan(place: int, number: int, slot: _Slot) -> DevicePlan:
    device = slot.part or slot.gpu
    return DevicePlan(
        f"cuda:{number}", place, "cuda", visible=slot.visible, cpus=slot.gpu.cpus, name=device.name,
        memory_total=device.memory_total, uuid=device.uuid,
    )  # fmt: skip


def _exists(slots: Sequence[_Slot]) -> str:
    if not slots:
        return "no GPU is visible (cpu and cpu:N exist)"
    last = len(slots) - 1
    names = ", ".join(sorted({(slot.part or slot.gpu).name for slot in slots}))
    return f"cuda:0 is the only GPU ({names})" if not last else f"there are cuda:0 to cuda:{last} ({names})"


def _why_hidden(visible: str | None, gpus: Sequence[Gpu]) -> str:
    if visible is not None and gpus:
        return f"; CUDA_VISIBLE_DEVICES is '{visible[:64]}' on a host with {len(gpus)}"
    if not gpus:
        return "; the NVIDIA driver lists none"
    bare = [str(gpu.index) for gpu in gpus if gpu.mig == ()]
    return f"; GPU {', '.join(bare)} is in MIG mode without an instance" if bare else ""


# --- what this host has -----------------------------------------------------------------------------------------------


def list_gpus() -> list[Gpu]:
    """Every GPU that NVML lists, [] without a driver (or without the NVML library). Never raises."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:
        return []
    try:
        return [gpu for index in range(pynvml.nvmlDeviceGetCount()) if (gpu := _read_gpu(pynvml, index))]
    except Exception:
        return []
    finally:
        _ask(pynvml.nvmlShutdown)


def _read_gpu(nvml: Any, index: int) -> Gpu | None:
    """One GPU, None when it does not answer (lost, in reset): the others still serve."""
    handle = _ask(nvml.nvmlDeviceGetHandleByIndex, index)
    uuid = _ask(nvml.nvmlDeviceGetUUID, handle) if handle is not None else None
    if uuid is None:
        return None
    return Gpu(
        index, _text(uuid), _text(_ask(nvml.nvmlDeviceGetName, handle) or "GPU"), _memory(nvml, handle),
        _near_cpus(nvml, handle), _migs(nvml, handle),
    )  # fmt: skip


def _migs(nvml: Any, handle: Any) -> tuple[Mig, ...] | None:
    mode = _ask(nvml.nvmlDeviceGetMigMode, handle)
    if not mode or mode[0] != 1:
        return None
    count = _ask(nvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0
    handles = (_ask(nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, number) for number in range(count))
    found = ((part, _ask(nvml.nvmlDeviceGetUUID, part)) for part in handles if part is not None)
    return tuple(
        Mig(_text(uuid), _text(_ask(nvml.nvmlDeviceGetName, part) or "MIG"), _memory(nvml, part))
        for part, uuid in found
        if uuid is not None
    )


def _memory(nvml: Any, handle: Any) -> int | None:
    info = _ask(nvml.nvmlDeviceGetMemoryInfo, handle)
    return int(info.total) if info is not None else None


def _near_cpus(nvml: Any, handle: Any) -> tuple[int, ...]:
    """The cores near a GPU; empty when that is no choice (all of ours, or none of ours)."""
    ours = os.sched_getaffinity(0)
    words = _ask(nvml.nvmlDeviceGetCpuAffinity, handle, (max(os.cpu_count() or 1, max(ours) + 1) + 63) // 64)
    near = _bits(words or ()) & ours
    return tuple(sorted(near)) if near != ours else ()


def _bits(words: Iterable[int]) -> set[int]:
    return {64 * place + bit for place, word in enumerate(words) for bit in range(64) if word >> bit & 1}


def _ask(question: Any, *arguments: Any) -> Any:
    """The answer, None when NVML cannot give it (each GPU and driver lacks another part of the API)."""
    try:
        return question(*arguments)
    except Exception:
        return None


def _text(name: bytes | str) -> str:
    return name.decode(errors="replace") if isinstance(name, bytes) else name


def available_cores() -> int:
    """Cores that this process may really use: its affinity, cut by a container's CPU quota."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores

"""What the devices and the workers say of themselves: NVML's numbers per device, psutil's per process.

Called every couple of seconds in a thread. It never raises: what is unknown is None, a GPU that fell off the bus is
`lost`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psutil

from workers.devices import DevicePlan


@dataclass(frozen=True, slots=True)
class Reading:
    """One look at a worker. utilisation 0-1, memory in bytes, temperature in degrees Celsius, power in watts are the
    device's, by whoever uses it; rss in bytes and cpu_percent (100 = one core, since the look before) the process's.
    None: unknown. `lost`: the GPU does not answer any more."""

    utilisation: float | None = None
    memory_used: int | None = None
    memory_total: int | None = None
    temperature: float | None = None
    power: float | None = None
    rss: int | None = None
    cpu_percent: float | None = None
    lost: bool = False


class _Lost(Exception):
    """NVML knows the GPU no more."""


class Monitor:
    """Reads all devices of a plan. One thread at a time."""

    def __init__(self, plans: Iterable[DevicePlan]) -> None:
        self._plans = tuple(plans)
        self._nvml: Any = _start_nvml() if any(plan.uuid for plan in self._plans) else None
        self._handles: dict[str, Any] = {}
        self._processes: dict[str, psutil.Process] = {}

    def read(self, pids: Mapping[str, int | None]) -> dict[str, Reading]:
        """One reading per worker of the plan. `pids`: its process at present, None (or missing) when it has none."""
        return {plan.worker: self._read(plan, pids.get(plan.worker)) for plan in self._plans}

    def close(self) -> None:
        """Let go of NVML."""
        if self._nvml is not None:
            nvml, self._nvml = self._nvml, None
            with suppress(nvml.NVMLError):
                nvml.nvmlShutdown()

    def _read(self, plan: DevicePlan, pid: int | None) -> Reading:
        rss, cpu_percent = self._process(plan.worker, pid)
        if self._nvml is None or plan.uuid is None:
            return Reading(memory_total=plan.memory_total, rss=rss, cpu_percent=cpu_percent)
        try:
            return self._device(plan.uuid, rss, cpu_percent)
        except _Lost:
            self._handles.pop(plan.uuid, None)  # asked for anew each time: a reset GPU comes back under a new handle
            return Reading(memory_total=plan.memory_total, rss=rss, cpu_percent=cpu_percent, lost=True)

    def _device(self, uuid: str, rss: int | None, cpu_percent: float | None) -> Reading:
        nvml = self._nvml
        if uuid not in self._handles:
            self._handles[uuid] = self._handle(uuid)
        handle, whole = self._handles[uuid]
        rates = self._ask(nvml.nvmlDeviceGetUtilizationRates, handle)
        memory = self._ask(nvml.nvmlDeviceGetMemoryInfo, handle)
        power = self._ask(nvml.nvmlDeviceGetPowerUsage, whole)
        return Reading(
            utilisation=None if rates is None else rates.gpu / 100,
            memory_used=None if memory is None else int(memory.used),
            memory_total=None if memory is None else int(memory.total),
            temperature=self._ask(nvml.nvmlDeviceGetTemperature, whole, nvml.NVML_TEMPERATURE_GPU),
            power=None if power is None else power / 1000,
            rss=rss,
            cpu_percent=cpu_percent,
        )

    def _handle(self, uuid: str) -> tuple[Any, Any]:
        """The device and the board it is on: a MIG instance has no thermometer of its own."""
        nvml = self._nvml
        handle = self._ask(nvml.nvmlDeviceGetHandleByUUID, uuid)
        if handle is None:
            raise _Lost
        if not uuid.startswith("MIG-"):
            return handle, handle
        return handle, self._ask(nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle, handle) or handle

    def _ask(self, question: Any, *arguments: Any) -> Any:
        """The answer; None when this device has no such number. Any other refusal means that the GPU is gone."""
        nvml = self._nvml
        try:
            return question(*arguments)
        except nvml.NVMLError as fault:
            harmless = (
                nvml.NVML_ERROR_NOT_SUPPORTED, nvml.NVML_ERROR_NO_PERMISSION, nvml.NVML_ERROR_FUNCTION_NOT_FOUND,
                nvml.NVML_ERROR_INVALID_ARGUMENT, nvml.NVML_ERROR_NO_DATA, nvml.NVML_ERROR_TIMEOUT,
            )  # fmt: skip
            if fault.value in harmless:
                return None
            raise _Lost from None

    def _process(self, worker: str, pid: int | None) -> tuple[int | None, float | None]:
        """Resident bytes and CPU percent; a process that is new has no percentage yet."""
        if pid is None:
            self._processes.pop(worker, None)
            return None, None
        process = self._processes.get(worker)
        try:
            if process is None or process.pid != pid or not process.is_running():
                process = self._processes[worker] = psutil.Process(pid)
                process.cpu_percent()
                return process.memory_info().rss, None
            return process.memory_info().rss, process.cpu_percent()
        except psutil.Error:
            self._processes.pop(worker, None)
            return None, None


def _start_nvml() -> Any:
    """The NVML module, ready; None without a driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:
        return None
    return pynvml

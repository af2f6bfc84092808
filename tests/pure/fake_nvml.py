"""A pynvml in memory: boards with MIG instances, numbers that are not supported, boards that fall off the bus."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any


class NVMLError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__(value)
        self.value = value


@dataclass
class Part:
    uuid: str
    name: str = "Fake MIG 1g.10gb"
    total: int = 10 << 30
    board: Board | None = None
    parts: list[Part] | None = None


@dataclass
class Board:
    uuid: str
    name: str | bytes = "Fake H100"
    total: int = 80 << 30
    used: int = 8 << 30
    near: int = 0  # bits of the cores beside it
    parts: list[Part] | None = None
    unsupported: set[str] = field(default_factory=set)
    lost: bool = False


class FakeNvml:
    """Put it into sys.modules["pynvml"]."""

    NVMLError = NVMLError
    NVML_TEMPERATURE_GPU = 0
    NVML_ERROR_INVALID_ARGUMENT = 2
    NVML_ERROR_NOT_SUPPORTED = 3
    NVML_ERROR_NO_PERMISSION = 4
    NVML_ERROR_NOT_FOUND = 6
    NVML_ERROR_TIMEOUT = 10
    NVML_ERROR_FUNCTION_NOT_FOUND = 13
    NVML_ERROR_GPU_IS_LOST = 15
    NVML_ERROR_NO_DATA = 21

    def __init__(self, *boards: Board, driver: bool = True) -> None:
        self.boards = boards
        self.driver = driver
        self.open = 0
        for board in boards:
            for part in board.parts or ():
                part.board = board

    def nvmlInit(self) -> None:
        if not self.driver:
            raise NVMLError(9)
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return len(self.boards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any:
        return self._living(self.boards[index])

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Any:
        for device in [*self.boards, *(part for board in self.boards for part in board.parts or ())]:
            if device.uuid == uuid:
                return self._living(device)
        raise NVMLError(self.NVML_ERROR_NOT_FOUND)

    def nvmlDeviceGetUUID(self, device: Any) -> Any:
        return self._living(device).uuid

    def nvmlDeviceGetName(self, device: Any) -> Any:
        return self._living(device).name

    def nvmlDeviceGetMemoryInfo(self, device: Any) -> Any:
        self._supported(device, "memory")
        return SimpleNamespace(total=device.total, used=getattr(device, "used", 1 << 30))

    def nvmlDeviceGetCpuAffinity(self, device: Any, words: int) -> list[int]:
        return [device.near >> 64 * word & (1 << 64) - 1 for word in range(words)]

    def nvmlDeviceGetMigMode(self, device: Any) -> list[int]:
        self._supported(device, "mig")
        return [0, 0] if device.parts is None else [1, 1]

    def nvmlDeviceGetMaxMigDeviceCount(self, device: Any) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, device: Any, index: int) -> Any:
        if index >= len(device.parts):
            raise NVMLError(self.NVML_ERROR_NOT_FOUND)
        return device.parts[index]

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, part: Any) -> Any:
        return part.board

    def nvmlDeviceGetUtilizationRates(self, device: Any) -> Any:
        self._supported(device, "utilisation")
        if isinstance(device, Part):
            raise NVMLError(self.NVML_ERROR_NOT_SUPPORTED)
        return SimpleNamespace(gpu=37, memory=5)

    def nvmlDeviceGetTemperature(self, device: Any, sensor: int) -> int:
        self._supported(device, "temperature")
        return 61

    def nvmlDeviceGetPowerUsage(self, device: Any) -> int:
        self._supported(device, "power")
        return 350_500

    def _supported(self, device: Any, what: str) -> None:
        if what in getattr(self._living(device), "unsupported", ()):
            raise NVMLError(self.NVML_ERROR_NOT_SUPPORTED)

    def _living(self, device: Any) -> Any:
        board = device if isinstance(device, Board) else device.board
        if board.lost:
            raise NVMLError(self.NVML_ERROR_GPU_IS_LOST)
        return device

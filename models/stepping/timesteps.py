"""Timesteps where they are needed: networks take theirs on the device, a scheduler's step gets them on the host.

Schedulers with tables by timestep (DDIM, PNDM, LCM, TCD, DDPM) would fetch it from the device at every step, and the
host would wait there for all that the device has still to do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor


class HostTimesteps:
    """The timesteps of one run's scheduler, fetched once."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._far: Tensor | None = None
        self._near: Tensor | None = None

    @contextmanager
    def during_step(self, timestep: Any) -> Iterator[Any]:
        """Has all of the scheduler's timesteps on the host meanwhile; the value is the one given, there. Timesteps that
        no table is indexed by, because they are no whole numbers, stay where they are."""
        far = getattr(self._scheduler, "timesteps", None)
        if not isinstance(far, Tensor) or far.is_floating_point():
            yield timestep
            return
        if far is not self._far:
            self._far, self._near = far, far.to("cpu", copy=True).as_subclass(Tensor)
        self._scheduler.timesteps = self._near
        try:
            yield self._found(far, timestep)
        finally:
            self._scheduler.timesteps = far

    def _found(self, far: Tensor, timestep: Any) -> Any:
        """The timestep's copy on the host. Which it is tells its place in memory: its value need not be fetched."""
        if not isinstance(timestep, Tensor) or timestep.ndim or timestep.dtype != far.dtype or self._near is None:
            return timestep
        place = timestep.storage_offset() - far.storage_offset()
        same = timestep.untyped_storage().data_ptr() == far.untyped_storage().data_ptr() and far.is_contiguous()
        return self._near[place] if same and 0 <= place < len(self._near) else timestep

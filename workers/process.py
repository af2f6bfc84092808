"""The first lines of a worker process. Its surroundings are fixed here, before torch is imported: which device it sees,
how many threads it takes, on which cores it runs, and that it dies with its master."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import multiprocessing
import os
import signal
import sys
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any

from core.errors import ErrorInfo, ImagePoolError
from core.heap import keep_heap
from workers.channel import WorkerEnd
from workers.messages import Boot, BootFailed, Progress

PR_SET_PDEATHSIG = 1


class SharedFd:
    """A file descriptor that travels into a spawned child."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (reduction.DupFd(self.fd),)


def _received(duplicate: Any) -> SharedFd:
    return SharedFd(duplicate.detach())


def child_main(
    boot: Boot, requests: Connection, results: Connection, arena: SharedFd, printed: SharedFd | None = None
) -> None:
    """Entry of the spawned process: settle in, load, run batches until told to stop or the master is gone. `printed`
    is where stdout and stderr go, None: where the master's go."""
    die_with_master()
    if printed is not None:
        for fd in (1, 2):
            os.dup2(printed.fd, fd)
        os.close(printed.fd)
    faulthandler.enable()
    for meant_for_master in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(meant_for_master, signal.SIG_IGN)  # terminals and service managers send them to all processes
    settle(boot)
    keep_heap()
    channel = WorkerEnd(requests, results)
    channel.send(Progress("importing torch", 0.0))
    try:
        from workers.session import Session

        session = Session(boot, channel, arena.fd)
        session.load()
    except BaseException as fault:
        channel.send(BootFailed(ErrorInfo("boot_failed", boot_failure_words(fault))))
        if not isinstance(fault, Exception):
            raise
        import traceback

        traceback.print_exc()
        sys.exit(1)
    session.run()


def die_with_master() -> None:
    """Ask the kernel to kill this process when the thread that started it ends, even while it is stopped."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    master = multiprocessing.parent_process()
    if master is not None and os.getppid() != master.pid:  # it died before the line above
        os._exit(1)


def settle(boot: Boot) -> None:
    """Pin the process to its device and cores. Must run before torch, numpy or OpenCV are imported."""
    os.environ["CUDA_VISIBLE_DEVICES"] = boot.visible
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # indices mean what NVML means by them
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(max(1, boot.threads))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # else threads spin for one whose core is taken
    if boot.cpus and hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(OSError):  # a container may not own those cores: slower, not wrong
            os.sched_setaffinity(0, boot.cpus)


def boot_failure_words(fault: BaseException) -> str:
    """Why a worker cannot start, or a model not be loaded, without paths."""
    if isinstance(fault, ImagePoolError):  # written for people: what is missing or refused, and what to do
        return fault.message
    if isinstance(fault, ModuleNotFoundError):
        return f"the package '{fault.name}' is missing; install the requirements of its model"
    if type(fault).__name__ == "OutOfMemoryError" or isinstance(fault, MemoryError):
        return "the models do not fit the device's memory; offer fewer of them (--models) or free the device"
    return f"{type(fault).__name__} while loading; the worker's log has the details"

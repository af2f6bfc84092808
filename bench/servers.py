"""Starts the servers that are measured, ours and the peers, each alone, and reads what its processes cost.

A peer lives in a virtual environment of its own, made at its first start: its own packages in pinned versions, and
after them this one's, so that all run the same torch, numpy and Pillow.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import orjson
import psutil

ROOT = Path(__file__).resolve().parent.parent
STARTS_WITHIN = 120.0
STOPS_WITHIN = 10.0


@dataclass(frozen=True, slots=True)
class Peer:
    """A server to compare with. `path` takes the POST, `ready` answers 200 to a GET when it can; no `packages`: those
    that we have serve. `bare` are installed without what they depend on, which would be another torch."""

    name: str
    module: str
    packages: tuple[str, ...]
    path: str
    ready: str
    bare: tuple[str, ...] = ()

    @property
    def version(self) -> str:
        return self.packages[0] if self.packages else "the same packages as ours"


NAIVE = Peer("naive FastAPI", "bench.peers.naive", (), "/run", "/ready")
MOSEC = Peer("mosec", "bench.peers.mosec_server", ("mosec==0.9.8",), "/inference", "/")
LITSERVE = Peer("LitServe", "bench.peers.litserve_server", ("litserve==0.2.19",), "/predict", "/health")
PEERS = (NAIVE, MOSEC, LITSERVE)
IOPAINT = Peer(
    "IOPaint", "bench.peers.iopaint_server",
    (
        "diffusers==0.27.2", "huggingface-hub==0.25.2", "transformers==4.44.2", "fastapi==0.108.0",
        "python-socketio==5.7.2", "Pillow==9.5.0", "piexif==1.1.3", "typer-config==1.4.0", "loguru==0.7.3",
        "omegaconf==2.3.0", "einops==0.8.2", f"numpy=={metadata.version('numpy')}",
    ),
    "/api/v1/inpaint", "/api/v1/model", ("iopaint==1.6.0", "peft==0.7.1", "accelerate==0.34.2"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Cost:
    """CPU seconds used so far, and resident bytes now: of the whole tree of processes, and of its root alone."""

    tree: float
    master: float
    rss: int
    master_rss: int


@dataclass(slots=True)
class Server:
    """One that runs."""

    name: str
    port: int
    path: str
    process: subprocess.Popen[bytes]
    log: Path
    _gone: dict[int, float] = field(default_factory=dict)  # CPU seconds of processes that have ended since

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}{self.path}"

    def get(self, path: str) -> bytes:
        """Raises OSError while nobody answers or the answer is no 200."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
            found: bytes = answer.read()
        return found

    def devices(self) -> dict[str, str]:
        """Ours only: the state of each device's worker."""
        told = orjson.loads(self.get("/health/ready"))
        return {device["device"]: device["state"] for device in told["devices"]}

    def all_ready(self) -> bool:
        """Ours only."""
        return all(state in ("ready", "busy") for state in self.devices().values())

    def workers(self) -> list[psutil.Process]:
        """Ours only: the processes of the workers."""
        children = psutil.Process(self.process.pid).children()
        return [child for child in children if "--multiprocessing-fork" in child.cmdline()]

    def cost(self) -> Cost:
        """Of now. What a child used that has died in between still counts."""
        master = psutil.Process(self.process.pid)
        own, total = _seconds(master), 0.0
        resident = own_resident = master.memory_info().rss
        for child in master.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                self._gone[child.pid] = _seconds(child)
                resident += child.memory_info().rss
        total = own + sum(self._gone.values())
        return Cost(total, own, resident, own_resident)


def _seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


@contextlib.contextmanager
def ours(
    *flags: str, models: str = "models/repository_test", offer: str = "echo", path: str = "/run/echo",
    devices: str = "cpu:2", outputs: Path | None = None, environ: Mapping[str, str] | None = None, root: Path = ROOT,
) -> Iterator[Server]:  # fmt: skip
    """This server with one model, up and with every worker ready. Without `outputs`, in a folder for this time only.
    `root`: the checkout that it is started from."""
    with tempfile.TemporaryDirectory(prefix="imagepool-bench-") as passing:
        port = free_port()
        command = (
            sys.executable, "server.py", "--port", str(port), "--host", "127.0.0.1", "--devices", devices,
            "--models-folder", models, "--models", offer, "--outputs", str(outputs or passing), *flags,
        )  # fmt: skip
        with _started("ImagePool", command, port, path, environ or {}, root) as server:
            wait_until(server, server.all_ready)
            yield server


@contextlib.contextmanager
def peer(which: Peer, work: str, environ: Mapping[str, str] | None = None) -> Iterator[Server]:
    """A peer that does `work` (see peers/work.py), up and ready."""
    port = free_port()
    environ = {**(environ or {}), "BENCH_WORK": work, "BENCH_PORT": str(port)}
    with _started(which.name, (_python(which), "-m", which.module), port, which.path, environ) as server:
        wait_until(server, lambda: bool(server.get(which.ready)) or True)
        yield server


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _started(
    name: str, command: Sequence[str], port: int, path: str, environ: Mapping[str, str], root: Path = ROOT
) -> Iterator[Server]:
    """The process in a group of its own, so that nothing of it stays behind."""
    with tempfile.NamedTemporaryFile(prefix="imagepool-bench-", suffix=".log") as log:
        process = subprocess.Popen(
            command, cwd=root, env={**os.environ, **environ}, stdout=log, stderr=log, start_new_session=True
        )
        try:
            yield Server(name, port, path, process, Path(log.name))
        finally:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOPS_WITHIN)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_until(server: Server, ready: Callable[[], bool]) -> None:
    """Until the server is ready; an OSError counts as no. Ends the program when that never comes."""
    end = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < end and server.process.poll() is None:
        with contextlib.suppress(OSError):
            if ready():
                return
        time.sleep(0.1)
    told = server.log.read_text(errors="replace")[-2000:]
    raise SystemExit(f"{server.name} did not start; it said:\n{told}")


def _python(which: Peer) -> str:
    """The interpreter of the peer's environment, which is made if need be."""
    if not which.packages:
        return sys.executable
    home = ROOT / f".venv-bench-{which.name.lower()}"
    python, stamp, wanted = home / "bin" / "python", home / ".installed", " ".join(which.packages + which.bare)
    if not stamp.exists() or stamp.read_text() != wanted:
        shutil.rmtree(home, ignore_errors=True)
        subprocess.run((sys.executable, "-m", "venv", str(home)), check=True)
        _install(python, *which.packages)
        if which.bare:
            _install(python, "--no-deps", *which.bare)
        site = subprocess.run(
            (str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"),
            check=True, capture_output=True, text=True,
        ).stdout.strip()  # fmt: skip
        Path(site, "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")
        stamp.write_text(wanted)
    return str(python)


def _install(python: Path, *what: str) -> None:
    """Ends the program with pip's own words when that fails."""
    install = subprocess.run((str(python), "-m", "pip", "install", *what), capture_output=True, text=True)
    if install.returncode:
        raise SystemExit(f"{' '.join(what)} cannot be installed:\n{install.stderr}")

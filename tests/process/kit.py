"""A real server in a process of its own, for tests that talk to it, kill parts of it, and look at what is left."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
TEST_MODELS = ROOT / "models" / "repository_test"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def eventually(what: Callable[[], Any], seconds: float = 60.0, every: float = 0.05) -> Any:
    """Wait until `what()` is true and return it; fail when it does not become so."""
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(httpx.TransportError):
            if found := what():
                return found
        if time.monotonic() > end:
            raise AssertionError(f"did not become true within {seconds:g} s: {what}")
        time.sleep(every)


def photo(seed: int, width: int = 48, height: int = 32) -> bytes:
    """A small PNG that no other seed gives."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


class RunningServer:
    """`python server.py` with its workers. `args` are further flags."""

    def __init__(
        self, outputs: Path, *args: str, devices: str = "cpu:2", models: str = "stub,echo", **environ: str
    ) -> None:
        self.outputs, self.port = outputs, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = outputs.parent / f"{outputs.name}.log"
        self._command = [
            sys.executable, str(ROOT / "server.py"), "--host", "127.0.0.1", "--port", str(self.port),
            "--devices", devices, "--threads", "1", "--outputs", str(outputs), "--models-folder", str(TEST_MODELS),
            *(("--models", models) if models else ()), "--min-free-disk", "1MiB",
            "--allowed-hosts", "here,x", *args,
        ]  # fmt: skip
        self._environ = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **environ}
        self.client = httpx.Client(base_url=self.url, timeout=60)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, ready: bool = True) -> RunningServer:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self._command, cwd=ROOT, env=self._environ, stdout=log, stderr=log)
        eventually(self._answers)
        if ready:
            eventually(lambda: self.get("/health/ready").status_code == 200, 90)
        return self

    def _answers(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise AssertionError(f"the server ended with {self.process.returncode}:\n{self.log.read_text()[-3000:]}")
        return self.get("/health/live").status_code == 200

    def get(self, path: str, **more: Any) -> httpx.Response:
        return self.client.get(path, **more)

    def status(self) -> dict[str, Any]:
        return self.get("/system/status").json()

    def workers(self) -> list[dict[str, Any]]:
        """The per-device part of the status."""
        return self.status()["devices"]

    def wait_all_ready(self) -> None:
        eventually(lambda: all(worker["state"] in ("ready", "busy") for worker in self.workers()), 90)

    def submit(self, seed: int, model: str = "stub", **fields: Any) -> str:
        """A durable job; its id."""
        answer = self.client.post("/jobs", files={"image": ("a.png", photo(seed))}, data={"model": model, **fields})
        assert answer.status_code in (200, 202), answer.text
        return answer.json()["id"]

    def job(self, job_id: str) -> dict[str, Any]:
        return self.get(f"/jobs/{job_id}").json()

    def wait_job(self, job_id: str, seconds: float = 90) -> dict[str, Any]:
        """The job when it has ended."""
        ends = ("succeeded", "failed", "cancelled", "expired")
        return eventually(lambda: (job := self.job(job_id))["state"] in ends and job, seconds)

    def tree(self) -> list[psutil.Process]:
        """The master and every process below it."""
        assert self.process is not None
        with contextlib.suppress(psutil.NoSuchProcess):
            master = psutil.Process(self.process.pid)
            return [master, *master.children(recursive=True)]
        return []

    def kill(self) -> None:
        """SIGKILL to the master alone."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self, sig: int = signal.SIGTERM, seconds: float = 60) -> int:
        """Ask it to go; its exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(sig)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise


@contextlib.contextmanager
def running(outputs: Path, *args: str, ready: bool = True, **more: Any) -> Iterator[RunningServer]:
    """A server that is stopped at the end, its log printed when the test fails, and of which nothing may be left."""
    server = RunningServer(outputs, *args, **more).start(ready)
    try:
        yield server
    except BaseException:
        print(server.log.read_text()[-6000:])
        raise
    finally:
        tree = server.tree()
        if server.process is not None and server.process.poll() is None:
            server.stop()
        server.client.close()
        _, alive = psutil.wait_procs(tree, timeout=10)
        assert not alive, f"processes left behind: {alive}"

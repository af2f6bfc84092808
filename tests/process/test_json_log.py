"""With --log-format json every line of the log is one JSON object, whatever prints, warns, raises or crashes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from typing import Any

from kit import TEST_MODELS, RunningServer, eventually, running

LOUD = """
import os, sys, threading, warnings

from models.base import Adapter, Output

print("printed to stdout", flush=True)
os.write(2, b"written past Python\\n")
warnings.warn("a warning\\nof two lines", stacklevel=1)


def fail():
    raise RuntimeError("in a thread\\nof the model")


class Loud(Adapter):
    def load(self):
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()

    def run(self, items):
        raise ValueError("while it runs\\nand another line")
"""


def lines(text: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in text.splitlines()]
    assert all(isinstance(line, dict) and line["event"] for line in found)
    return found


def test_whatever_prints_warns_raises_or_crashes_each_line_is_one_object(tmp_path):
    models = tmp_path / "models"
    models.mkdir()
    (models / "stub.toml").write_text((TEST_MODELS / "stub.toml").read_text())
    (models / "loud.toml").write_text('adapter = "loud:Loud"\ntask = "style"\n')
    (models / "loud.py").write_text(LOUD)
    flags = "--models-folder", str(models), "--log-format", "json"
    with running(tmp_path / "outputs", *flags, models="stub,loud", devices="cpu:1") as server:
        assert server.wait_job(server.submit(1, model="loud"))["state"] == "failed"
        pid = server.status()["processes_info"]["0"]["pid"]
        os.kill(pid, signal.SIGSEGV)
        eventually(lambda: server.workers()[0]["restarts"] == 1 and server.workers()[0]["state"] == "ready")
        assert server.stop() == 0
        told = lines(server.log.read_text())
    written = [line for line in told if line["event"] == "worker wrote"]
    assert all(line["device"] == "cpu:0" for line in written)
    text = [line.get("text") or line["exception"] for line in written]
    for part in (
        "printed to stdout", "written past Python", "while it runs\nand another line", "in a thread\nof the model",
        "Fatal Python error: Segmentation fault",
    ):  # fmt: skip
        assert any(part in said for said in text), part


def test_a_start_that_fails_is_an_object_too(tmp_path):
    server = RunningServer(tmp_path / "outputs", "--log-format", "json")
    with socket.create_server(("127.0.0.1", server.port)):
        done = subprocess.run(
            server._command, env=server._environ, capture_output=True, text=True, timeout=60, check=False
        )
    server.client.close()
    assert done.returncode == 2
    (line,) = lines(done.stderr)
    assert "address already in use" in line["event"] and line["level"] == "critical"

"""Signals and starts that fail: what the process does, what it says, and what it leaves."""

from __future__ import annotations

import os
import signal
import socket
import subprocess

import psutil
import pytest
from kit import RunningServer, eventually, running


def test_a_second_signal_ends_in_good_order_and_the_running_job_is_kept(tmp_path):
    with running(tmp_path / "outputs", devices="cpu:1") as server:
        job = server.submit(1, act="sleep", seconds="60")
        eventually(lambda: server.job(job)["state"] == "running")
        tree = server.tree()
        server.process.send_signal(signal.SIGINT)
        eventually(lambda: "Shutting down" in server.log.read_text(), 10)
        assert server.stop(signal.SIGINT) == 0
        _, alive = psutil.wait_procs(tree, timeout=10)
        assert not alive
        told = server.log.read_text()
        assert f"Listening on http://127.0.0.1:{server.port}" in told and "Finishing what runs, for 15 s" in told
        assert "Application shutdown complete" in told and "Traceback" not in told, told[-3000:]


def test_a_port_that_is_taken_ends_the_start_with_a_reason_and_leaves_nothing(tmp_path):
    server = RunningServer(tmp_path / "outputs")
    with socket.create_server(("127.0.0.1", server.port)):
        done = subprocess.run(
            server._command, env=server._environ, capture_output=True, text=True, timeout=60, check=False
        )
    server.client.close()
    assert done.returncode == 2
    assert "address already in use" in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1, "nothing was started that had to be stopped"


@pytest.mark.parametrize("sig", [signal.SIGHUP, signal.SIGINT])
def test_signals_meant_for_the_master_do_not_end_a_worker(tmp_path, sig):
    with running(tmp_path / "outputs", devices="cpu:1") as server:
        pid = server.status()["processes_info"]["0"]["pid"]
        os.kill(pid, sig)
        job = server.submit(1)
        assert server.wait_job(job)["state"] == "succeeded"
        assert server.workers()[0]["restarts"] == 0 and psutil.pid_exists(pid)


def test_shared_memory_that_cannot_be_had_is_a_sentence(tmp_path):
    server = RunningServer(tmp_path / "outputs", "--arena-bytes", "4096TiB")
    done = subprocess.run(server._command, env=server._environ, capture_output=True, text=True, timeout=60, check=False)
    server.client.close()
    assert done.returncode == 2
    assert "arena_bytes" in done.stderr and "Traceback" not in done.stderr

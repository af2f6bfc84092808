"""A real server, real processes: what goes wrong, and what its clients then see."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import signal
import subprocess
import time

import httpx
import numpy as np
import psutil
import pytest
from kit import ROOT, RunningServer, eventually, photo, pixels, running


def worker_pids(server: RunningServer) -> list[int]:
    told = server.status()["processes_info"]
    return [told[index]["pid"] for index in sorted(told) if told[index]["pid"]]


def right(seed: int, data: bytes) -> bool:
    return np.array_equal(pixels(data), 255 - pixels(photo(seed)))


def run(server: RunningServer, seed: int, **params: str) -> httpx.Response:
    headers = {"Content-Type": "image/png"}
    return httpx.post(f"{server.url}/run/stub", content=photo(seed), headers=headers, params=params, timeout=60)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    outputs = tmp_path_factory.mktemp("faults") / "outputs"
    with running(outputs, "--hang-floor", "1s", "--ping-interval", "200ms", "--restart-backoff", "50ms") as made:
        made.wait_all_ready()
        yield made


# --- one bad job ------------------------------------------------------------------------------------------------------


def test_a_poison_job_is_blamed_and_its_neighbours_succeed(server):
    good = [server.submit(seed, base_ms="30") for seed in range(4)]
    poison = server.submit(99, act="crash")
    good += [server.submit(seed, base_ms="30") for seed in range(4, 8)]
    told = server.wait_job(poison)
    assert told["state"] == "failed" and told["error"]["code"] == "poisonous_job"
    assert [server.wait_job(job)["state"] for job in good] == ["succeeded"] * 8
    assert all(right(seed, server.get(f"/jobs/{job}/result").content) for seed, job in enumerate(good))
    server.wait_all_ready()


def test_a_job_that_hangs_is_ended_by_its_batch_deadline_and_blamed(server):
    bystander = server.submit(1, base_ms="10")
    job = server.submit(2, act="hang")
    told = server.wait_job(job, 120)
    assert told["state"] == "failed" and told["error"]["code"] == "poisonous_job"
    assert told["attempts"] >= 3, "it deserves another try before it is blamed"
    assert server.wait_job(bystander)["state"] == "succeeded"
    server.wait_all_ready()


def test_out_of_memory_halves_the_batch_until_it_fits(server):
    jobs = [server.submit(seed, act="oom", fits="2", base_ms="50") for seed in range(8)]
    told = [server.wait_job(job) for job in jobs]
    assert {job["state"] for job in told} == {"succeeded"}
    assert max(job["batch_size"] for job in told) <= 2


def test_a_job_that_does_not_fit_even_alone_is_told_what_to_change(server):
    told = server.wait_job(server.submit(1, act="oom", fits="0"))
    assert told["error"]["code"] == "out_of_memory" and told["error"]["message"]


@pytest.mark.parametrize(("act", "code"), [("nan", "bad_output"), ("black", "bad_output"), ("garbage", "bad_output"),
                                           ("raise", "model_failed")])
def test_a_model_that_lies_or_raises_is_told_as_such_and_harms_nobody(server, act, code):
    bad, good = server.submit(1, act=act), server.submit(2)
    assert server.wait_job(bad)["error"]["code"] == code
    assert server.wait_job(good)["state"] == "succeeded"
    message = server.job(bad)["error"]["message"]
    assert "/" not in message.replace("and/or", "") and "Traceback" not in message


def test_what_a_worker_logs_of_a_job_never_shows_in_an_answer(server):
    job = server.submit(1, act="raise")
    assert server.wait_job(job)["state"] == "failed"
    eventually(lambda: f"job {job}" in server.log.read_text() and "stub: told to raise" in server.log.read_text())
    at_once = run(server, 2, act="raise")
    paths = [f"/jobs/{job}{more}" for more in ("", "/result", "/events")]
    paths += ["/jobs", "/system/status", "/health/ready", "/metrics", f"/status/{job}", f"/result/{job}"]
    for answer in [at_once, *(server.get(path) for path in paths)]:
        for word in ("told to raise", "Traceback", 'File "', ".py", str(ROOT)):
            assert word not in answer.text, answer.url
    assert at_once.json()["code"] == "model_failed" and at_once.json()["detail"]


# --- workers ----------------------------------------------------------------------------------------------------------


def test_a_worker_stopped_in_mid_batch_is_replaced_and_its_job_runs_elsewhere(server):
    job = server.submit(5, act="sleep", seconds="0.5")
    eventually(lambda: server.job(job)["state"] == "running")
    device = server.job(job)["device"]
    index = next(d["index"] for d in server.workers() if d["name"] and d["device"] == device)
    os.kill(server.status()["processes_info"][str(index)]["pid"], signal.SIGSTOP)
    assert server.wait_job(job, 120)["state"] == "succeeded"
    assert right(5, server.get(f"/jobs/{job}/result").content)
    server.wait_all_ready()


def test_an_idle_worker_that_is_killed_is_back_soon_and_health_tells_the_truth(server):
    server.wait_all_ready()
    for pid in worker_pids(server):
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: server.get("/health").status_code == 503, 5, 0.002)
    assert server.get("/health/live").status_code == 200
    eventually(lambda: server.get("/health").status_code == 200)
    server.wait_all_ready()
    assert all(device["restarts"] >= 1 for device in server.workers())


def test_a_request_survives_the_death_of_every_worker(server):
    with concurrent.futures.ThreadPoolExecutor() as threads:
        answer = threads.submit(run, server, 7, act="sleep", seconds="0.3")
        eventually(lambda: server.status()["queue"]["running"] == 1, 10, 0.005)
        for pid in worker_pids(server):
            os.kill(pid, signal.SIGKILL)
        assert answer.result().status_code == 200
        assert right(7, answer.result().content)
    server.wait_all_ready()


# --- clients ----------------------------------------------------------------------------------------------------------


def test_clients_that_leave_free_their_place_and_their_memory(server):
    def impatient(seed: int) -> None:
        with contextlib.suppress(httpx.TimeoutException):
            httpx.post(f"{server.url}/run/stub", content=photo(seed), headers={"Content-Type": "image/png"},
                       params={"act": "sleep", "seconds": "3"}, timeout=0.3)

    with concurrent.futures.ThreadPoolExecutor(40) as threads:
        list(threads.map(impatient, range(40)))
    eventually(lambda: server.status()["queue"]["queued"] == 0 and server.status()["queue"]["bytes"] == 0, 10)
    assert run(server, 3).status_code == 200


def test_a_client_that_leaves_in_the_middle_of_its_upload_costs_nothing(server):
    import socket

    for _ in range(20):
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            head = b"POST /run/stub HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/png\r\n"
            sock.sendall(head + b"Content-Length: 500000\r\n\r\n" + photo(1)[:100])
    eventually(lambda: server.status()["queue"]["bytes"] == 0, 10)
    assert server.status()["queue"]["queued"] == 0


def test_liveness_answers_while_every_device_is_busy(server):
    with concurrent.futures.ThreadPoolExecutor(64) as threads:
        busy = [threads.submit(run, server, seed, base_ms="20") for seed in range(200)]
        waits = []
        while not all(future.done() for future in busy):
            began = time.perf_counter()
            assert server.get("/health/live").status_code == 200
            waits.append(time.perf_counter() - began)
        assert all(future.result().status_code == 200 for future in busy)
    assert waits


def test_cancel_of_a_running_job_frees_the_client_at_once_and_twice_is_no_error(server):
    job = server.submit(1, act="sleep", seconds="5")
    eventually(lambda: server.job(job)["state"] == "running")
    for _ in range(2):
        assert server.client.delete(f"/jobs/{job}").json()["state"] == "cancelled"
    assert server.get(f"/jobs/{job}/result").json()["code"] == "cancelled"


# --- start and stop ---------------------------------------------------------------------------------------------------


def test_http_answers_before_any_worker_is_ready_and_says_why_it_is_not(tmp_path):
    with running(tmp_path / "outputs", ready=False) as server:
        answer = server.get("/health/ready")
        if answer.status_code == 503:  # on a quick machine a worker may be ready already
            assert "starting" in answer.json()["reason"]
        job = server.submit(1)
        assert server.wait_job(job)["state"] == "succeeded", "what is accepted while workers load runs when they have"


def test_sigterm_lets_running_jobs_finish_keeps_waiting_ones_and_leaves_nothing_behind(tmp_path):
    outputs = tmp_path / "outputs"
    with running(outputs, devices="cpu:1") as server:
        runs = server.submit(1, act="sleep", seconds="1")
        eventually(lambda: server.job(runs)["state"] == "running")
        waits = [server.submit(seed, shape="other", base_ms="5") for seed in range(2, 6)]
        tree = server.tree()
        assert server.stop(signal.SIGTERM) == 0
        _, alive = psutil.wait_procs(tree, timeout=10)
        assert not alive
    with running(outputs, devices="cpu:1") as server:
        assert server.job(runs)["state"] == "succeeded" and server.job(runs)["attempts"] == 1
        assert [server.wait_job(job)["state"] for job in waits] == ["succeeded"] * 4


def test_a_second_signal_ends_at_once_and_even_the_running_job_is_not_lost(tmp_path):
    outputs = tmp_path / "outputs"
    with running(outputs, devices="cpu:1") as server:
        job = server.submit(1, act="sleep", seconds="20")
        eventually(lambda: server.job(job)["state"] == "running")
        tree = server.tree()
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        began = time.monotonic()
        server.stop(signal.SIGINT)
        assert time.monotonic() - began < 15
        _, alive = psutil.wait_procs(tree, timeout=10)
        assert not alive
    with running(outputs, devices="cpu:1", ready=False) as server:
        assert server.job(job)["state"] in ("queued", "running")


def test_two_servers_cannot_share_an_outputs_folder(tmp_path):
    with running(tmp_path / "outputs") as server:
        second = RunningServer(tmp_path / "outputs")
        done = subprocess.run(
            second._command, env=second._environ, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 2 and "another server" in done.stderr and "Traceback" not in done.stderr
        assert server.get("/health/live").status_code == 200
        second.client.close()


# --- the machine runs out ---------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 3 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)], check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_refuses_new_jobs_and_loses_none(small_disk):
    with running(small_disk / "outputs", "--min-free-disk", "256KiB") as server:
        job = server.submit(1, act="sleep", seconds="2")
        eventually(lambda: server.job(job)["state"] == "running")
        filler = small_disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)
        refused = server.client.post("/jobs", files={"image": ("a.png", photo(2))}, data={"model": "stub"})
        assert (refused.status_code, refused.json()["code"]) == (507, "storage_full"), refused.text
        assert run(server, 3).status_code == 200, "requests that store nothing are served all the same"
        eventually(lambda: "cannot be stored" in server.log.read_text(), 30)
        assert server.job(job)["state"] == "running"
        filler.unlink()
        assert server.wait_job(job)["state"] == "succeeded"
        assert right(1, server.get(f"/jobs/{job}/result").content)
        assert server.wait_job(server.submit(4))["state"] == "succeeded"


def test_file_descriptors_exhausted_by_connections_do_not_end_the_server(tmp_path):
    import resource
    import socket

    with running(tmp_path / "outputs") as server:
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (80, 80))
        flood = []
        for _ in range(150):
            sock = socket.socket()
            sock.settimeout(1)
            try:
                sock.connect(("127.0.0.1", server.port))
            except OSError:
                break
            flood.append(sock)
        assert len(flood) > 60
        for sock in flood:
            sock.close()
        eventually(lambda: run(server, 1).status_code == 200, 30)


def test_a_rolling_restart_under_load_fails_no_request(tmp_path):
    with running(tmp_path / "outputs") as server:
        server.wait_all_ready()
        old = set(worker_pids(server))
        with concurrent.futures.ThreadPoolExecutor(8) as threads:
            server.process.send_signal(signal.SIGHUP)
            answers = []

            def fresh() -> bool:
                answers.extend(threads.map(lambda seed: (seed, run(server, seed, base_ms="10")), range(16)))
                return "rolling restart is done" in server.log.read_text()

            eventually(fresh, 120)
        assert all(answer.status_code == 200 and right(seed, answer.content) for seed, answer in answers)
        assert not old & set(worker_pids(server))
        assert [device["incarnation"] for device in server.workers()] == [2, 2]


def test_a_service_manager_that_sends_sigterm_to_every_process_still_lets_running_jobs_finish(tmp_path):
    with running(tmp_path / "outputs", devices="cpu:1") as server:
        job = server.submit(1, act="sleep", seconds="1")
        eventually(lambda: server.job(job)["state"] == "running")
        for process in reversed(server.tree()):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        assert server.process.wait(60) == 0
    with running(tmp_path / "outputs", devices="cpu:1") as server:
        assert server.job(job)["state"] == "succeeded" and server.job(job)["attempts"] == 1


def test_head_is_answered_like_get_without_a_body(server):
    for path in ("/health", "/health/live", "/models", "/system/status"):
        answer = server.client.head(path)
        assert answer.status_code == 200 and not answer.content and server.get(path).content

"""A real server whose outputs folder loses files: under it, while it runs, and between two lives."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
from pathlib import Path

from kit import eventually, running


def lose_database(outputs: Path) -> None:
    for ending in ("", "-wal", "-shm"):
        (outputs / f"jobs.sqlite{ending}").unlink(missing_ok=True)


def spoil(database: Path) -> None:
    """Garbage over all pages but the first."""
    with sqlite3.connect(database) as db:
        page, pages = (db.execute(f"PRAGMA page_{what}").fetchone()[0] for what in ("size", "count"))
    db.close()
    with database.open("r+b") as file:
        file.seek(page)
        file.write(b"\xa5" * page * (pages - 1))


def pictures(outputs: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in outputs.rglob("*.png")}


def test_an_outputs_folder_that_loses_what_it_can_loses_no_image_and_no_job_that_waits(tmp_path):
    outputs = tmp_path / "outputs"
    with running(outputs, devices="cpu:1", models="stub") as server:
        log = server.log.read_text

        blocker = server.submit(0, act="sleep", seconds="3")
        eventually(lambda: server.job(blocker)["state"] == "running")
        lost, kept = server.submit(2), server.submit(3)
        shutil.rmtree(outputs / "inputs" / lost)
        lose_database(outputs)
        unseen = server.submit(4)  # its 202 comes from a file that has no name any more
        shutil.rmtree(outputs / "tmp")
        (outputs / ".lock").unlink()
        eventually(lambda: "SOMEBODY REMOVED FILES" in log(), 20)
        eventually(lambda: (outputs / "tmp").is_dir() and (outputs / ".lock").exists())
        told = server.wait_job(lost)
        assert (told["state"], told["error"]["code"], told["error"]["retryable"]) == ("failed", "storage_failed", True)
        done = [blocker, kept, unseen, server.submit(5)]
        assert all(server.wait_job(job)["state"] == "succeeded" for job in done)

        last = server.submit(0, act="sleep", seconds="60")
        eventually(lambda: server.job(last)["state"] == "running")
        waiting = [server.submit(seed) for seed in range(10, 40)]
        server.client.delete(f"/jobs/{last}")
        server.process.send_signal(signal.SIGSTOP)
        server.kill()
        os.truncate(outputs / "jobs.sqlite-wal", (outputs / "jobs.sqlite-wal").stat().st_size // 2)
        server.start()
        assert "LOST JOBS" in log()
        done += waiting
        assert {job: server.wait_job(job)["state"] for job in done} == dict.fromkeys(done, "succeeded")

        assert server.stop() == 0
        server.start(ready=False)
        spoil(outputs / "jobs.sqlite")
        answers = [server.get("/jobs"), *(server.get(f"/jobs/{job}") for job in done[:3])]
        assert {answer.status_code for answer in answers} == {503}
        assert all("damaged" in answer.json()["detail"] and str(tmp_path) not in answer.text for answer in answers)
        eventually(lambda: server.get("/health/ready").json()["storage"] == "failed")
        assert "damaged" in server.get("/health/ready").json()["storage_reason"]
        server.kill()
        images = pictures(outputs)
        assert images.keys() == {f"{job}.png" for job in done}
        server.start(ready=False)
        assert "THE JOB DATABASE IS DAMAGED" in log()
        assert pictures(outputs) == images
        server.submit(99)
        server.kill()
        lose_database(outputs)
        server.start(ready=False)
        told = [line for line in log().splitlines() if "THE JOB DATABASE WAS MISSING" in line]
        assert len(told) == 1 and "rebuilt" in told[0]
        assert images.items() <= pictures(outputs).items()
        assert "Traceback" not in log()



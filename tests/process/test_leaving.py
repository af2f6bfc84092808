"""Who leaves, or cancels, frees the worker: long work on one image ends between two parts of it."""

from __future__ import annotations

import io
import socket

import pytest
from kit import RunningServer, eventually, photo, pixels, running
from PIL import Image

SOON = 20.0  # seconds; what is asked for below takes minutes
WIDTH, HEIGHT = 1000, 800


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("leaving")
    with running(folder / "outputs", "--hang-floor", "90", devices="cpu:1", models="upscale,inpaint,stub") as made:
        yield made


def mask() -> bytes:
    file = io.BytesIO()
    white = Image.new("L", (WIDTH, HEIGHT))
    white.paste(255, (100, 100, 900, 700))
    white.save(file, "PNG")
    return file.getvalue()


UPSCALE = {"model": "upscale", "scale": "4", "steps": "100"}
INPAINT = {"model": "inpaint", "rounds": "5", "patch": "7"}


def files(fields: dict[str, str]) -> dict[str, tuple[str, bytes, str]]:
    sent = {"image": ("a.png", photo(1, WIDTH, HEIGHT), "image/png")}
    return sent | ({"mask": ("m.png", mask(), "image/png")} if fields is INPAINT else {})


def busy(server: RunningServer) -> bool:
    return server.workers()[0]["state"] == "busy"


def is_free(server: RunningServer) -> None:
    """The worker has done with what was left, is the same process, and serves the next one as ever."""
    eventually(lambda: not busy(server), SOON)
    data = photo(2)
    answer = server.client.post("/run/stub", content=data, headers={"content-type": "image/png"})
    assert (pixels(answer.content) == 255 - pixels(data)).all()
    assert server.workers()[0]["restarts"] == 0


@pytest.mark.parametrize("fields", [UPSCALE, INPAINT], ids=["upscale", "inpaint"])
def test_a_client_that_leaves_frees_the_worker(server, fields):
    request = server.client.build_request(
        "POST", f"/run/{fields['model']}", files=files(fields), data={k: v for k, v in fields.items() if k != "model"}
    )
    head = f"POST /run/{fields['model']} HTTP/1.1\r\nhost: localhost\r\n"
    head += "".join(f"{name}: {request.headers[name]}\r\n" for name in ("content-type", "content-length"))
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(head.encode() + b"\r\n" + request.read())
        eventually(lambda: busy(server))
    is_free(server)


@pytest.mark.parametrize("fields", [UPSCALE, INPAINT], ids=["upscale", "inpaint"])
def test_a_running_job_that_is_deleted_frees_the_worker(server, fields):
    job = server.client.post("/jobs", files=files(fields), data=fields).json()["id"]
    eventually(lambda: busy(server) and server.job(job)["state"] == "running")
    assert server.client.delete(f"/jobs/{job}").status_code == 200
    is_free(server)
    assert server.job(job)["state"] == "cancelled"


def test_a_worker_that_cannot_leave_what_was_deleted_is_replaced_when_another_waits(server):
    job = server.submit(3, act="hang")
    eventually(lambda: busy(server) and server.job(job)["state"] == "running")
    assert server.client.delete(f"/jobs/{job}").status_code == 200
    data = photo(4)
    answer = server.client.post("/run/stub", content=data, headers={"content-type": "image/png"})
    assert (pixels(answer.content) == 255 - pixels(data)).all()
    assert "nobody wants it any more" in server.log.read_text() and server.workers()[0]["restarts"] == 1

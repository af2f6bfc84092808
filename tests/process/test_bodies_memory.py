"""What large bodies that come slowly cost a real server: disk, and next to no memory."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.process.kit import RunningServer, eventually, running

SIZE = 32 << 20
NUMBER = 4
FORM = "multipart/form-data; boundary=b"
OPENING = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
JSON = "application/json"
BODIES = [
    ("/jobs?model=echo", "image/png", b""),
    ("/jobs", FORM, OPENING),
    ("/jobs", JSON, b'{"image": "'),
    ("/run/echo", FORM, OPENING),
    ("/v1/images/edits", FORM, OPENING),
    ("/v1/images/edits", JSON, b'{"images": [{"image_url": "data:image/png;base64,'),
    ("/api/v1/image/generate", JSON, b'{"image_url": "'),
    ("/api/v1/inpaint", JSON, b'{"image": "'),
    ("/api/v1/inpaint/preprocessed", JSON, b'{"image_tensor_b64": "'),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running(tmp_path_factory.mktemp("bodies") / "outputs", devices="cpu:1", models="echo", ready=False) as server:
        yield server


def send(server: RunningServer, path: str, kind: str, opening: bytes) -> socket.socket:
    """A chunked request of which all came but the end."""
    client = socket.create_connection(("127.0.0.1", server.port))
    client.sendall(f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {kind}\r\n"
                   "Transfer-Encoding: chunked\r\n\r\n".encode())
    for data in (opening, *[b"A" * (1 << 20)] * (SIZE >> 20)):
        if data:
            client.sendall(b"%x\r\n%b\r\n" % (len(data), data))
    return client


def receiving(server: RunningServer) -> float:
    """Bytes on their way."""
    page = server.get("/metrics").text
    return float(page.partition("\nimagepool_receiving_bytes ")[2].partition("\n")[0])


def resident(server: RunningServer) -> int:
    assert server.process is not None
    return psutil.Process(server.process.pid).memory_info().rss


@pytest.mark.parametrize(("path", "kind", "opening"), BODIES)
def test_large_bodies_that_come_slowly_do_not_fill_the_memory(
    server: RunningServer, path: str, kind: str, opening: bytes
) -> None:
    assert receiving(server) == 0
    before = resident(server)
    with contextlib.ExitStack() as stack:
        for _ in range(NUMBER):
            stack.enter_context(send(server, path, kind, opening))
        eventually(lambda: receiving(server) >= NUMBER * SIZE)
        assert resident(server) - before < NUMBER * SIZE // 3
    eventually(lambda: receiving(server) == 0)


def test_nothing_of_a_body_is_left_when_the_server_is_killed(tmp_path: Path) -> None:
    server = RunningServer(tmp_path / "outputs", devices="cpu:1", models="echo").start(ready=False)
    with send(server, "/jobs?model=echo", "image/png", b""), send(server, "/jobs", FORM, OPENING):
        eventually(lambda: receiving(server) >= 2 * SIZE)
        tree = server.tree()
        server.kill()
    server.client.close()
    psutil.wait_procs(tree, timeout=10)
    assert list((tmp_path / "outputs" / "tmp").iterdir()) == []

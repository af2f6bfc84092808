"""IOPaint's clients against real workers on real sockets: the pixels, and what a client that leaves costs."""

from __future__ import annotations

import base64
import io
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
import pytest
from kit import RunningServer, eventually, free_port, running
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.pure.image_kit import SRGB, exif, photo, save
from tests.pure.iopaint_kit import page_body, text, url

MODELS = "cv2,inpaint,background_remove,upscale,mask_tools,tensor_image"
SLOW = """
adapter = "models.stub:Stub"
task = "inpaint"
needs_mask = true
max_batch = 2
[params.base_ms]
type = "float"
default = 2000.0
"""
OWN_PORT = free_port()
HOLE = np.zeros((90, 131), np.uint8)
HOLE[20:50, 30:90] = 255
PICTURE = photo(131, 90)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    flags = ("--iopaint-port", str(OWN_PORT))
    with running(tmp_path_factory.mktemp("iopaint") / "outputs", *flags, devices="cpu:1", models=MODELS) as made:
        assert made.client.post("/api/v1/model", json={"name": "cv2"}).status_code == 200
        yield made


def inpaint(server: RunningServer, image: bytes, mask: np.ndarray = HOLE, **more: Any) -> httpx.Response:
    answer = server.client.post("/api/v1/inpaint", json={"image": text(image), "mask": text(save(mask)), **more})
    assert answer.status_code == 200, answer.text
    return answer


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def painted(hole: np.ndarray = HOLE) -> bytes:
    """The hole as the page draws it."""
    mask = np.zeros((*hole.shape, 4), np.uint8)
    mask[hole > 0] = (255, 204, 0, 187)
    return save(mask)


def test_the_page_s_body_fills_the_hole_and_leaves_every_other_byte(server: RunningServer) -> None:
    body = page_body(image=url(save(PICTURE)), mask=url(painted()))
    answer = server.client.post("/api/v1/inpaint", json=body)
    found = np.asarray(opened(answer.content))
    assert answer.headers["content-type"] == "image/png" and found.shape == PICTURE.shape
    assert (found[HOLE == 0] == PICTURE[HOLE == 0]).all() and (found[HOLE > 0] != PICTURE[HOLE > 0]).mean() > 0.5
    wanted = cv2.inpaint(PICTURE[..., ::-1].copy(), HOLE, 5, cv2.INPAINT_NS)[..., ::-1]
    assert (found == wanted).all()


def test_a_stroke_is_a_hole_and_not_a_veil_for_every_model(server: RunningServer) -> None:
    image = save(PICTURE)
    server.client.post("/api/v1/model", json={"name": "inpaint"})
    try:
        body = {"image": text(image), "mask": text(painted())}
        by_stroke = server.client.post("/api/v1/inpaint", json=body).content
        assert (np.asarray(opened(by_stroke)) == np.asarray(opened(inpaint(server, image).content))).all()
        kept = inpaint(server, image, np.where(HOLE, 127, 0).astype(np.uint8)).content
        assert (np.asarray(opened(kept)) == PICTURE).all()
    finally:
        server.client.post("/api/v1/model", json={"name": "cv2"})


def test_alpha_colour_profile_and_text_survive(server: RunningServer) -> None:
    notes = PngInfo()
    notes.add_text("parameters", "a cat\nNegative prompt: dog")
    alpha = np.random.default_rng(5).integers(0, 256, HOLE.shape, np.uint8)
    image = save(np.dstack([PICTURE, alpha]), pnginfo=notes, icc_profile=SRGB, dpi=(300, 300))
    found = opened(inpaint(server, image).content)
    assert found.mode == "RGBA" and (np.asarray(found)[..., 3] == alpha).all()
    assert (np.asarray(found)[HOLE == 0][:, :3] == PICTURE[HOLE == 0]).all()
    assert found.info["icc_profile"] == SRGB and found.info["parameters"].startswith("a cat")
    assert round(found.info["dpi"][0]) == 300


def test_a_jpeg_comes_back_upright_and_sharp(server: RunningServer) -> None:
    stored = np.ascontiguousarray(np.rot90(PICTURE))  # orientation 6: turn it clockwise
    image = save(stored, "JPEG", quality=95, exif=exif(6))
    answer = inpaint(server, image)
    found = opened(answer.content)
    assert answer.headers["content-type"] == "image/jpeg" and found.size == (131, 90)
    assert found.getexif().get(0x0112, 1) == 1
    original = np.rot90(np.asarray(opened(image).convert("RGB")), -1)
    assert np.abs(np.asarray(found).astype(int) - original)[HOLE == 0].mean() < 3


def test_masks_are_adjusted_and_found(server: RunningServer) -> None:
    body = {"mask": url(painted()), "operate": "expand", "kernel_size": 3}
    grown = np.asarray(opened(server.client.post("/api/v1/adjust_mask", json=body).content))
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (7, 7))
    assert grown.shape == (*HOLE.shape, 4)
    assert ((grown == (255, 203, 0, 186)).all(axis=2) == (cv2.dilate(HOLE, kernel) > 0)).all()
    subject = np.full((90, 131, 3), 30, np.uint8)
    cv2.circle(subject, (65, 45), 25, (230, 60, 40), -1)
    body = {"name": "RemoveBG", "image": url(save(subject))}
    mask = np.asarray(opened(server.client.post("/api/v1/run_plugin_gen_mask", json=body).content))
    assert tuple(mask[45, 65]) == (255, 203, 0, 186) and mask[2, 2, 3] == 0
    cut = np.asarray(opened(server.client.post("/api/v1/run_plugin_gen_image", json=body).content))
    assert cut.shape == (90, 131, 4) and cut[45, 65, 3] == 255 and cut[2, 2, 3] == 0


def test_enlarging_keeps_the_transparency(server: RunningServer) -> None:
    alpha = np.zeros(HOLE.shape, np.uint8)
    alpha[:, 60:] = 255
    body = {"name": "RealESRGAN", "image": url(save(np.dstack([PICTURE, alpha])))}
    large = np.asarray(opened(server.client.post("/api/v1/run_plugin_gen_image", json=body).content))
    assert large.shape == (180, 262, 4) and large[:, 140:, 3].min() > 250 and large[:, :100, 3].max() < 5


def test_tensors_give_the_picture_that_the_image_gives(server: RunningServer) -> None:
    padding = ((0, 6), (0, 5))
    image = np.pad(PICTURE, (*padding, (0, 0)), mode="symmetric").transpose(2, 0, 1)[None].astype(np.float32) / 255
    mask = np.pad(HOLE, padding, mode="symmetric")[None, None].astype(np.float32) / 255
    body = {
        "image_tensor_b64": text(image.tobytes()), "mask_tensor_b64": text(mask.tobytes()),
        "image_shape": image.shape, "mask_shape": mask.shape, "original_height": 90, "original_width": 131,
    }  # fmt: skip
    plain = server.client.post("/api/v1/inpaint/preprocessed", json=body)
    head = json.dumps({name: value for name, value in body.items() if "b64" not in name}).encode()
    raw = server.client.post(
        "/api/v1/inpaint/preprocessed",
        content=head + image.tobytes() + mask.tobytes(),
        headers={"inference-header-content-length": str(len(head))},
    )
    assert plain.status_code == raw.status_code == 200, plain.text
    assert base64.b64decode(plain.text) == raw.content
    server.client.post("/api/v1/model", json={"name": "inpaint"})  # the gateway's choice: there is no LaMa here
    wanted = inpaint(server, save(PICTURE)).content
    server.client.post("/api/v1/model", json={"name": "cv2"})
    assert (np.asarray(opened(raw.content)) == np.asarray(opened(wanted))).all()


def test_a_tensor_of_nan_is_the_client_s_fault(server: RunningServer) -> None:
    tensor = np.full((1, 3, 8, 8), np.nan, np.float32)
    body = {
        "image_tensor_b64": text(tensor.tobytes()), "mask_tensor_b64": text(tensor[:, :1].tobytes()),
        "image_shape": [1, 3, 8, 8], "mask_shape": [1, 1, 8, 8], "original_height": 8, "original_width": 8,
    }  # fmt: skip
    answer = server.client.post("/api/v1/inpaint/preprocessed", json=body)
    assert answer.status_code == 400 and "NaN" in answer.json()["detail"]


def test_the_own_port_serves_the_same_api(server: RunningServer) -> None:
    there = f"http://127.0.0.1:{OWN_PORT}"
    assert httpx.get(f"{there}/api/v1/model").json() == server.get("/api/v1/model").json()
    assert httpx.get(f"{there}/health/ready").status_code == 200
    page = httpx.get(f"{there}/")
    assert "IOPaint" in page.text and page.status_code in (200, 404)  # 404: with the way to install it
    assert server.client.get("/", follow_redirects=False).status_code in (307, 404)


def test_forty_clients_that_leave_cost_the_forwards_that_had_begun(tmp_path: Path) -> None:
    (tmp_path / "slow.toml").write_text(SLOW)
    flags = ("--models-folder", str(tmp_path), "--models", "slow")
    with running(tmp_path / "outputs", *flags, devices="cpu:1", models="") as server:
        body = json.dumps({"image": text(save(PICTURE)), "mask": text(save(HOLE))}).encode()
        head = b"POST /api/v1/inpaint HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
        clients = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(40)]
        for client in clients:
            client.sendall(head + body)
        eventually(lambda: server.status()["running_requests"] > 0)
        eventually(lambda: server.status()["total_requests"] == 40)
        for client in clients:
            client.close()
        eventually(lambda: server.status()["queued_requests"] == 0)
        assert server.client.post("/api/v1/inpaint", content=body).status_code == 200
        (device,) = server.workers()
    assert device["images"] <= 2 * 2 + 1, "only the batch that ran and the one that waited at the worker"

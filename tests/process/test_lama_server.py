"""LaMa behind a real server: two hundred clients at once, each with its own image, hole and size."""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import httpx
import numpy as np
import pytest
from kit import RunningServer, pixels
from lama_kit import IOPaint, cv2_forward, lama_forward, mask_of, picture, save_network
from PIL import Image

COUNT = 200


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_network(tmp_path_factory.mktemp("weights") / "tiny-lama.pt")


@pytest.fixture(scope="module")
def server(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    running = RunningServer(
        tmp_path_factory.mktemp("lama") / "outputs", models="lama,cv2", LAMA_MODEL_URL=str(weights)
    )
    try:
        yield running.start()
    finally:
        running.stop()


def file(image: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()


def case(number: int) -> tuple[np.ndarray, np.ndarray]:
    """An image and a mask that no other number has; few sizes, so that many share a forward."""
    height, width = ((64, 96), (90, 71), (150, 160))[number % 3]
    top, left = 8 + number % 11, 8 + number % 13
    return picture(height, width, number), mask_of(height, width, (top, left, top + 24, left + 24), (40, 50, 47, 61))


def test_two_hundred_simultaneous_requests_get_each_the_image_that_it_would_get_alone(
    server: RunningServer, weights: Path
) -> None:
    lama, plain = IOPaint(lama_forward(weights), 8), IOPaint(cv2_forward(cv2.INPAINT_NS, 4), 1)

    def ask(number: int) -> httpx.Response:
        image, mask = case(number)
        model = "cv2" if number % 10 == 9 else "lama"
        return client.post(
            f"/run/{model}", files={"image": file(image), "mask": file(mask)},
            params={"hd_strategy_crop_trigger_size": 100, "hd_strategy_crop_margin": 20},
        )  # fmt: skip

    with httpx.Client(base_url=server.url, timeout=120) as client, ThreadPoolExecutor(64) as clients:
        answers = list(clients.map(ask, range(COUNT)))
    apart = total = 0
    for number, answer in enumerate(answers):
        assert answer.status_code == 200, answer.text
        image, mask = case(number)
        alone = (plain if number % 10 == 9 else lama)(image, mask, trigger=100, margin=20)
        found = pixels(answer.content)
        distance = np.abs(found.astype(int) - alone)
        assert distance.max() <= 1, f"request {number} got another's pixels"
        assert np.array_equal(found[mask == 0], image[mask == 0])
        apart, total = apart + np.count_nonzero(distance), total + distance.size
    assert apart <= 1e-4 * total
    batches, images = (sum(one[name] for one in server.workers()) for name in ("batches", "images"))
    assert images >= COUNT and batches < COUNT, "and they shared batches"


def test_models_whose_weights_are_there_are_offered(server: RunningServer) -> None:
    offered = {model["name"] for model in server.get("/models").json()["models"]}
    assert offered == {"lama", "cv2"}

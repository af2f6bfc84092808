"""ImageGenX's API on the real server: every parameter reaches the model, and tasks outlive the server."""

from __future__ import annotations

import base64
import io
import json
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from core.model import read_spec
from models.paint import colour
from tests.process.kit import TEST_MODELS, RunningServer, eventually, photo, pixels, running

PAINT = read_spec((TEST_MODELS / "paint.toml").read_text(), "paint")
MODELS = "paint,repaint,upscale,resize"
ENDS = ("success", "failed", "cancelled")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    outputs = tmp_path_factory.mktemp("imagegenx") / "outputs"
    with running(outputs, "--fetch", "any", devices="cpu:1", models=MODELS) as started:
        yield started


class Ears(BaseHTTPRequestHandler):
    """Hears callbacks, and gives an image away."""

    def do_POST(self) -> None:
        heard: list[Any] = self.server.heard  # type: ignore[attr-defined]
        heard.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(503 if len(heard) == 1 else 204)
        self.end_headers()

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(photo(7))

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def elsewhere() -> Iterator[HTTPServer]:
    """Another host."""
    other = HTTPServer(("127.0.0.1", 0), Ears)
    other.heard = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=other.serve_forever)
    thread.start()
    yield other
    other.shutdown()
    thread.join()
    other.server_close()


def post(server: RunningServer, route: str, status: int = 200, **body: Any) -> dict[str, Any]:
    answer = server.client.post(f"/api/v1/image/{route}", json=body)
    assert answer.status_code == status, answer.text
    told = answer.json()
    assert told["code"] == status
    found: dict[str, Any] = told["data"] if status == 200 else told
    return found


def ended(server: RunningServer, task: dict[str, Any]) -> dict[str, Any]:
    """The task's data when it has ended."""
    return eventually(lambda: (told := server.get(task["query_url"]).json()["data"])["status"] in ENDS and told)


def image_of(server: RunningServer, task: dict[str, Any]) -> np.ndarray:
    told = ended(server, task)
    assert told["status"] == "success", told
    answer = server.client.get(told["result"]["original_url"])
    assert len(answer.content) == told["result"]["size"]
    return pixels(answer.content)


def painted(**params: Any) -> tuple[int, int, int]:
    return colour(PAINT.check_params(params))


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


PNG = {"postprocess": {"format": "png"}}


def test_defaults(server: RunningServer) -> None:
    task = post(server, "generate", text="a cat", params={"seed": 1})
    assert task["task_id"].startswith("img") and len(task["task_id"]) == 24
    assert task["status"] in ("waiting", "processing") and task["estimated_time"] >= 1
    assert task["temp_url"] == f"/temp/{task['task_id']}_thumb.webp"
    told = ended(server, task)
    assert told["progress"] == 100 and told["finish_time"] >= told["create_time"]
    assert told["result"]["resolution"] == "512×512" and told["result"]["format"] == "webp"
    day = task["task_id"][3:11]
    assert told["result"]["original_url"].endswith(f"/{day}/{task['task_id']}_512x512.webp")
    thumb = server.client.get(told["result"]["thumb_url"])
    assert thumb.headers["content-type"] == "image/webp" and pixels(thumb.content).shape == (256, 256, 3)
    want = painted(prompt="a cat", seed=1, steps=50, guidance=7.5, scheduler="Euler", width=512, height=512)
    assert np.abs(image_of(server, task).astype(int) - want).max() < 6  # WebP is lossy


@pytest.mark.parametrize("spelling", ["postprocess", "post_process"])
@pytest.mark.parametrize("cross", "×xX*")
def test_every_parameter_in_both_spellings(server: RunningServer, spelling: str, cross: str) -> None:
    params = {
        "resolution": f"96{cross}64", "style": "oil", "steps": 9, "cfg_scale": 3.5, "sampler": "dpmpp_2m_karras",
        "lora_name": "ink", "lora_weight": 0.5, "seed": 3, "negative_prompt": "fog", spelling: {"format": "png"},
    }  # fmt: skip
    want = painted(
        prompt="a cat, oil", width=96, height=64, steps=9, guidance=3.5, scheduler="DPM++ 2M Karras", lora_name="ink",
        lora_weight="0.5", seed=3, negative_prompt="fog",
    )  # fmt: skip
    image = image_of(server, post(server, "generate", text="a cat", params=params, model_type="Paint"))
    assert image.shape == (64, 96, 3) and (image == want).all()


def test_img2img_and_its_own_results_as_input(server: RunningServer) -> None:
    first = post(server, "img2img", image_url=data_url(photo(1)), text="x", strength=0, params=PNG)
    assert (image_of(server, first) == pixels(photo(1))).all()
    url = ended(server, first)["result"]["original_url"]
    again = post(server, "img2img", image_url=url, text="x", strength=0, params=PNG)
    assert (image_of(server, again) == pixels(photo(1))).all()
    plain = base64.b64encode(photo(2)).decode()
    assert (image_of(server, post(server, "img2img", image_url=plain, text="x", strength=0.0, params=PNG))
            == pixels(photo(2))).all()  # fmt: skip


def test_inpaint_keeps_what_the_mask_does_not_cover(server: RunningServer) -> None:
    mask = np.zeros((32, 48), np.uint8)
    mask[:16] = 255
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "PNG")
    task = post(server, "inpaint", image_url=data_url(photo(1)), mask_url=data_url(file.getvalue()), text="x",
                strength=1, params=PNG)  # fmt: skip
    image = image_of(server, task)
    assert (image[16:] == pixels(photo(1))[16:]).all() and (image[:16] != pixels(photo(1))[:16]).any()


def test_controlnet(server: RunningServer) -> None:
    edges = post(server, "controlnet", image_url=data_url(photo(1)), text="x", params={"seed": 1, **PNG})
    want = painted(prompt="x", control_type="canny", strength=1.0, seed=1, steps=50, guidance=7.5, scheduler="Euler")
    assert (image_of(server, edges) == want).all()
    depth = post(server, "controlnet", control_image_url=data_url(photo(1)), control_type="depth", text="x",
                 params={"resolution": "64x64", **PNG})  # fmt: skip
    assert image_of(server, depth).shape == (64, 64, 3)
    post(server, "controlnet", 422, image_url=data_url(photo(1)), control_type="openpose", text="x")


def test_enlarged_and_marked(server: RunningServer) -> None:
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 255
    file = io.BytesIO()
    Image.fromarray(red).save(file, "PNG")
    mark = {"enable": True, "type": "image", "image_path": data_url(file.getvalue()), "transparency": 1,
            "position": "top_left", "margin": 4, "scale": 0.25}  # fmt: skip
    params = {"resolution": "64x48", "postprocess": {"super_resolution": "2x", "format": "png", "watermark": mark}}
    task = post(server, "generate", text="x", params=params)
    image = image_of(server, task)
    assert image.shape == (96, 128, 3)
    assert (image[8:32, 8:32] == (255, 0, 0)).all() and not (image[60, 60] == (255, 0, 0)).all()


def test_a_batch_its_counts_and_its_zip(server: RunningServer) -> None:
    texts = ["a", "b", "fail", "c"]
    batch = post(server, "batch-generate", texts=texts, resolution="32x32", batch_size=4)
    assert batch["total"] == 4 and len(batch["task_ids"]) == 4
    done = eventually(lambda: (now := server.get(batch["query_url"]).json()["data"])["waiting_count"] == 0 and now)
    assert (done["success_count"], done["failed_count"], done["progress"], done["total"]) == (3, 1, 100, 4)
    assert [task["task_id"] for task in done["tasks"]] == batch["task_ids"]
    failed = server.get(f"/api/v1/image/task/{batch['task_ids'][2]}")
    assert failed.status_code == 200 and failed.json()["code"] == 500
    assert failed.json()["data"]["error_msg"] == "this prompt was told to fail"
    archive = zipfile.ZipFile(io.BytesIO(server.client.get(done["download_url"]).content))
    assert archive.testzip() is None and len(archive.namelist()) == 3
    assert pixels(archive.read(archive.namelist()[0])).shape == (32, 32, 3)


def test_cancel(server: RunningServer) -> None:
    slow = post(server, "generate", text="slowly", params={"resolution": "32x32", "steps": 100})
    told = server.client.delete(f"/api/v1/image/task/{slow['task_id']}").json()["data"]
    assert told["status"] == "cancelled"
    batch = post(server, "batch-generate", texts=["slowly"] * 3, resolution="32x32", params={"steps": 100})
    told = server.client.post(f"{batch['query_url']}/cancel").json()["data"]
    assert told["failed_count"] == 3 and {task["status"] for task in told["tasks"]} == {"cancelled"}


def test_another_host_gives_the_image_and_hears_of_the_end(server: RunningServer, elsewhere: HTTPServer) -> None:
    url = f"http://127.0.0.1:{elsewhere.server_port}/"
    task = post(server, "img2img", image_url=url, text="x", strength=0, params=PNG, callback_url=url)
    assert (image_of(server, task) == pixels(photo(7))).all()
    heard: list[Any] = elsewhere.heard  # type: ignore[attr-defined]
    eventually(lambda: len(heard) == 2)  # the first time it was not taken
    assert heard[0] == heard[1] and heard[1]["data"]["task_id"] == task["task_id"]
    assert heard[1]["data"]["status"] == "success" and heard[1]["data"]["result"]["original_url"].startswith("http://")
    batch = post(server, "batch-generate", texts=["a", "b"], resolution="32x32", callback_url=url)
    eventually(lambda: len(heard) == 3)
    assert heard[2]["data"]["batch_task_id"] == batch["batch_task_id"] and heard[2]["data"]["success_count"] == 2


def test_tasks_and_batches_outlive_the_server(tmp_path: Path) -> None:
    enlarged = {"resolution": "32x32", "steps": 20, "postprocess": {"super_resolution": "2x", "format": "png"}}
    with running(tmp_path / "outputs", devices="cpu:1", models=MODELS) as server:
        batch = post(server, "batch-generate", texts=["slowly a", "slowly b", "slowly c"], params=enlarged)
        server.kill()
        server.start()
        done = eventually(lambda: (now := server.get(batch["query_url"]).json()["data"])["waiting_count"] == 0 and now)
        assert done["success_count"] == done["total"] == 3
        assert [task["task_id"] for task in done["tasks"]] == batch["task_ids"]
        assert {task["result"]["resolution"] for task in done["tasks"]} == {"64×64"}
        assert len(server.get("/jobs").json()["jobs"]) == 6

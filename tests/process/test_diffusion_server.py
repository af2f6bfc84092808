"""Diffusion in the real server, by its clients' own words: each image is the one that the request gets alone."""

from __future__ import annotations

import base64
import concurrent.futures
import io
import json
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from tests.diffusion_models import write_specs
from tests.process.kit import RunningServer, eventually, photo, pixels, running
from tests.tiny_loras import kohya

SIDE = 64
LONG = 100  # steps; the tiny networks take some milliseconds for one
EDITS = [{"num_inference_steps": 20 + 5 * n, "seed": n, "true_cfg_scale": 2.0 + n} for n in range(4)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("diffusion")
    imagen = "enhance=sd15,style_comic=sd15,style_aged=sd15"
    flags = ("--models-folder", str(write_specs(folder / "models")), "--restart-backoff", "50ms",
             "--imagen-models", imagen)
    with running(folder / "outputs", *flags, devices="cpu:1", models="qwen-image-edit,sd15") as started:
        yield started


# --- clients --------------------------------------------------------------------------------------------------------


def edit(server: RunningServer, **fields: Any) -> str:
    """What i2ii's client posts; the request's id."""
    answer = server.client.post(
        "/edit", files={"image": ("photo.png", photo(1, SIDE, 48), "image/png")},
        data={"prompt": "a red cat", "negative_prompt": "a dog", "num_inference_steps": LONG, "true_cfg_scale": 4.0,
              **fields},
    )  # fmt: skip
    assert answer.status_code == 200, answer.text
    return str(answer.json()["request_id"])


def edited(server: RunningServer, request: str) -> np.ndarray:
    """The image, by i2ii's client's way of waiting."""
    told = eventually(lambda: (now := i2ii_status(server, request))["status"] in ("completed", "error") and now)
    assert told["status"] == "completed" and told["progress"] == 1.0, told
    answer = server.get(f"/result/{request}")
    assert answer.headers["content-type"] == "image/png"
    return pixels(answer.content)


def i2ii_status(server: RunningServer, request: str) -> dict[str, Any]:
    return server.get(f"/status/{request}").json()


def at_once(server: RunningServer, edits: Sequence[dict[str, Any]]) -> list[str]:
    """Edits posted by as many clients; the requests' ids."""
    with concurrent.futures.ThreadPoolExecutor(len(edits)) as clients:
        return list(clients.map(lambda fields: edit(server, **fields), edits))


def draw(server: RunningServer, **fields: Any) -> str:
    """A job of the native API that draws from words; its id."""
    usual = {"model": "sd15", "prompt": "a cat", "steps": LONG, "seed": 1, "width": SIDE, "height": SIDE}
    answer = server.client.post("/jobs", json={**usual, **fields})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def send(server: RunningServer, files: Sequence[Any], **params: Any) -> str:
    """A short job of the native API, with pictures; its id."""
    data = {"model": "sd15", "prompt": "a cat", "steps": "3", "seed": "1", **params}
    answer = server.client.post("/jobs", **({"data": data, "files": files} if files else {"json": data}))
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def drawn(server: RunningServer, job: str) -> np.ndarray:
    told = server.wait_job(job)
    assert told["state"] == "succeeded", told
    return pixels(server.get(f"/jobs/{job}/result").content)


def generate(server: RunningServer, route: str, **body: Any) -> np.ndarray:
    """The image of an ImageGenX task."""
    params = {"steps": 6, "seed": 3, "postprocess": {"format": "png"}, **body.pop("params", {})}
    answer = server.client.post(f"/api/v1/image/{route}", json={"text": "a cat", "params": params, **body})
    assert answer.status_code == 200, answer.text
    query = answer.json()["data"]["query_url"]
    ends = ("success", "failed", "cancelled")
    told = eventually(lambda: (now := server.get(query).json()["data"])["status"] in ends and now)
    assert told["status"] == "success", told
    return pixels(server.client.get(told["result"]["original_url"]).content)


def png(mask: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "PNG")
    return file.getvalue()


def mask_png() -> bytes:
    """48 x 32, the middle covered."""
    mask = np.zeros((32, 48), np.uint8)
    mask[8:24, 12:36] = 255
    return png(mask)


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def steps_of(server: RunningServer) -> dict[str, Any]:
    """What the only device tells of its steps."""
    found: dict[str, Any] = server.workers()[0]["steps"]
    return found


def alike(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether they are the same picture, up to rounding."""
    return first.shape == second.shape and int(np.abs(first.astype(int) - second).max()) <= 1


def until_it_steps(server: RunningServer, job: str) -> None:
    eventually(lambda: server.job(job)["progress"] > 0.05, every=0.01)


# --- sharing --------------------------------------------------------------------------------------------------------


def test_edits_at_once_share_steps_and_each_gets_the_image_that_it_gets_alone(server: RunningServer) -> None:
    alone = [edited(server, edit(server, **fields)) for fields in EDITS]
    assert alone[0].shape == (48, SIDE, 3) and not alike(alone[0], alone[1])
    for _ in range(5):  # on a loaded machine a wider forward may seem not to pay, for the next hundred
        before = steps_of(server)
        requests = at_once(server, EDITS)
        assert all(map(alike, [edited(server, request) for request in requests], alone))
        after = eventually(lambda: (now := steps_of(server))["running"] == 0 and now)
        forwards, rows = after["forwards"] - before["forwards"], after["rows"] - before["rows"]
        assert rows == sum(2 * fields["num_inference_steps"] for fields in EDITS)
        if rows > 1.5 * forwards:
            break
    assert rows > 1.5 * forwards and after["rows_per_forward"] > 1


def test_the_pace_is_told_while_edits_run(server: RunningServer) -> None:
    requests = at_once(server, [{"seed": seed} for seed in range(8)])
    eventually(lambda: (now := steps_of(server))["steps_per_second"] > 0 and now["running"], every=0.01)
    for request in requests:
        server.client.delete(f"/jobs/{request}")
    eventually(lambda: steps_of(server)["running"] == 0)


def test_an_urgent_job_overtakes_between_two_steps(server: RunningServer) -> None:
    before = steps_of(server)["preemptions"]
    plain = draw(server, priority="test")
    until_it_steps(server, plain)
    urgent = draw(server, steps=10, priority="urgent", width=2 * SIDE)  # of another size, it cannot come aboard
    assert drawn(server, urgent).shape == (SIDE, 2 * SIDE, 3)
    assert server.job(plain)["state"] in ("running", "parked")
    after = drawn(server, plain)
    assert eventually(lambda: steps_of(server)["preemptions"] > before)
    assert alike(after, drawn(server, draw(server)))


def test_all_tasks_of_one_model_meet_and_bring_their_pictures(server: RunningServer) -> None:
    image, covered = ("image", ("a.png", photo(1))), mask_png()
    mask = ("mask", ("b.png", covered))
    words, changed, filled, guided = (
        send(server, files, **params) for files, params in (
            ([], {"width": 64, "height": 40}), ([image], {"strength": 0.9}), ([image, mask], {}),
            ([image], {"control_type": "canny"}),
        )
    )  # fmt: skip
    assert drawn(server, words).shape == (40, 64, 3)
    assert drawn(server, changed).shape == drawn(server, guided).shape == (32, 48, 3)
    outside = np.asarray(Image.open(io.BytesIO(covered))) == 0
    assert (drawn(server, filled)[outside] == pixels(photo(1))[outside]).all()
    assert (drawn(server, filled)[~outside] != pixels(photo(1))[~outside]).any()


@pytest.mark.parametrize(("params", "about"), [
    ({"lora_name": "nobody"}, "no LoRA"), ({"scheduler": "magic"}, "no sampler"),
    ({"control_type": "depth"}, "needs a control map"), ({"strength": 0.1}, "less than one step"),
])  # fmt: skip
def test_what_cannot_be_done_fails_its_job_with_a_sentence(
    server: RunningServer, params: dict[str, Any], about: str
) -> None:
    files = [("image", ("a.png", photo(2)))] if "strength" in params else []
    told = server.wait_job(send(server, files, **params))
    assert told["state"] == "failed" and told["error"]["code"] == "invalid_parameter", told
    assert about in told["error"]["message"]


# --- leaving and coming back ----------------------------------------------------------------------------------------


def test_a_cancelled_job_leaves_between_two_steps_and_its_companion_goes_on(server: RunningServer) -> None:
    alone = drawn(server, draw(server, seed=2, steps=40))
    before = steps_of(server)["rows"]
    leaves, stays = draw(server), draw(server, seed=2, steps=40)
    until_it_steps(server, leaves)
    assert server.client.delete(f"/jobs/{leaves}").json()["state"] == "cancelled"
    assert alike(drawn(server, stays), alone)
    after = eventually(lambda: (now := steps_of(server))["running"] == 0 and now)
    assert 2 * 40 < after["rows"] - before < 2 * (40 + LONG)


def test_a_worker_killed_in_mid_run_costs_nobody_the_image(server: RunningServer) -> None:
    alone = edited(server, edit(server, seed=5))
    requests = at_once(server, [{"seed": 5}, {"seed": 6}, {"seed": 7}])
    until_it_steps(server, requests[0])
    os.kill(server.status()["processes_info"]["0"]["pid"], signal.SIGKILL)
    images = [edited(server, request) for request in requests]
    assert i2ii_status(server, requests[0])["attempts"] == 2
    assert [alike(image, alone) for image in images] == [True, False, False]


# --- other dialects -------------------------------------------------------------------------------------------------


def test_openai_s_client_draws_and_sees_the_picture_grow(server: RunningServer) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
    more = {"seed": 3, "num_inference_steps": 6, "guidance_scale": 7.5}
    answer = client.images.generate(prompt="a cat", size="64x64", extra_body=more)
    image = pixels(base64.b64decode(answer.data[0].b64_json))
    assert alike(image, drawn(server, draw(server, seed=3, steps=6, guidance=7.5)))
    more["num_inference_steps"] = LONG
    events = list(client.images.generate(
        prompt="a cat", size="64x64", stream=True, partial_images=1, extra_body=more
    ))  # fmt: skip
    assert [event.type for event in events] == ["image_generation.partial_image", "image_generation.completed"]
    assert pixels(base64.b64decode(events[0].b64_json)).shape == (SIDE, SIDE, 3)
    final = pixels(base64.b64decode(events[1].b64_json))
    assert alike(final, drawn(server, draw(server, seed=3, guidance=7.5)))


def test_a_job_s_previews_are_in_its_event_stream(server: RunningServer) -> None:
    shown, silent = (
        server.get(f"/jobs/{draw(server, previews=previews)}/events", headers={"accept": "text/event-stream"}).text
        for previews in (True, False)
    )
    assert "event: preview" in shown and "event: preview" not in silent
    line = next(line for line in shown.partition("event: preview")[2].splitlines() if line.startswith("data:"))
    assert pixels(base64.b64decode(json.loads(line[5:])["jpeg"])).shape == (SIDE, SIDE, 3)


def imagen(server: RunningServer, route: str, **fields: Any) -> tuple[np.ndarray, int]:
    """What imagen's client gets for its picture, and the seed that was drawn for it."""
    files = {"file": ("a.png", photo(1, SIDE, SIDE), "image/png")}
    answer = server.client.post(f"/api/v1/images/{route}", files=files, data=fields)
    assert answer.status_code == 200, answer.text
    told = server.wait_job(answer.json()["job_id"])
    assert told["state"] == "succeeded", told
    picture = pixels(server.get(f"/api/v1/jobs/{told['id']}/result").content)
    return picture, told["facts"]["seed"]


@pytest.mark.parametrize(("route", "words", "steps"), [
    ("style/comic", "a cat, ghibli style, comic, cartoon, vibrant colors", 30),
    ("enhance", "a cat", 20),
])  # fmt: skip
def test_imagen_s_prompt_and_strength_are_the_diffusion_model_s(
    server: RunningServer, route: str, words: str, steps: int
) -> None:
    picture, seed = imagen(server, route, prompt="a cat", strength="0.4", guidance_scale="9")
    files = [("image", ("a.png", photo(1, SIDE, SIDE), "image/png"))]
    same = {"prompt": words, "strength": "0.4", "guidance": "9", "steps": str(steps), "seed": str(seed)}
    assert alike(picture, drawn(server, send(server, files, **same)))
    for changed in ({"prompt": "a dog"}, {"strength": "0.8"}, {"guidance": "3"}):
        assert not alike(picture, drawn(server, send(server, files, **{**same, **changed})))


def test_imagegenx_draws_fills_and_follows_edges(server: RunningServer) -> None:
    plain = generate(server, "generate", params={"resolution": "64x64", "sampler": "DDIM"})
    assert alike(plain, drawn(server, draw(server, seed=3, steps=6, guidance=7.5, scheduler="DDIM")))
    image, mask = photo(1, SIDE, SIDE), np.zeros((SIDE, SIDE), np.uint8)
    mask[16:32] = 255
    filled = generate(server, "inpaint", image_url=data_url(image), mask_url=data_url(png(mask)), strength=0.9)
    assert (filled[mask == 0] == pixels(image)[mask == 0]).all()
    assert (filled[mask == 255] != pixels(image)[mask == 255]).any()
    followed = generate(server, "controlnet", image_url=data_url(image), control_type="canny")
    loose = generate(
        server, "controlnet", image_url=data_url(image), control_type="canny", params={"resolution": "64x64"}
    )
    assert followed.shape == (SIDE, SIDE, 3) and alike(followed, loose) and not alike(followed, plain)


def test_a_lora_that_is_uploaded_serves_the_next_request(server: RunningServer, tmp_path: Path) -> None:
    short = {"resolution": "64x64"}
    bare, worker = generate(server, "generate", params=short), server.status()["processes_info"]["0"]["pid"]
    refused = server.client.post("/jobs", json={"model": "sd15", "prompt": "a cat", "lora_name": "ink", "steps": 2})
    assert server.wait_job(refused.json()["id"])["error"]["code"] == "invalid_parameter"
    with kohya(tmp_path / "ink.safetensors", 1).open("rb") as file:
        answer = server.client.post("/api/v1/lora/upload", files={"file": file})
    assert answer.status_code == 200, answer.text
    inked = generate(server, "generate", params={**short, "lora_name": "ink", "lora_weight": 1.0})
    assert int(np.abs(inked.astype(int) - bare).max()) > 10
    assert alike(generate(server, "generate", params=short), bare)
    assert server.status()["processes_info"]["0"]["pid"] == worker

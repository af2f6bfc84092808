"""Schemathesis against a whole server: the real door, protocol and dialects on a socket, over a pool in memory.

What it draws by itself seldom gets beyond the first check: no random bytes are an image, no random id is a job's. So a
part of what it sends that should fit is given real images, models and jobs (`Deepener`).
"""

from __future__ import annotations

import asyncio
import base64
import functools
import hashlib
import io
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import schemathesis
import uvicorn
from hypothesis import strategies
from PIL import Image
from schemathesis import hooks
from schemathesis.engine import events, from_schema

from api.app import create_app
from api.listening import uvicorn_config
from core.settings import Settings
from engine.build import build
from tests.pure.dialect_kit import KEY, keys_file, png
from tests.pure.engine_kit import TEST_MODELS
from workers.memory_pool import MemoryPool
from workers.messages import RunItem

PICTURE = png(64, 48)
TEXT = base64.b64encode(PICTURE).decode()
CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance",
    "response_headers_conformance", "unsupported_method", "allow_header_conformance", "negative_data_rejection",
)  # fmt: skip
WITH_KEYS = ("ignored_auth",)
FILES = ("image", "mask", "file", "reference", "control", "image_url", "mask_url", "control_image_url")
MODELS = ("stub", "upscale", "inpaint", "edit", "paint", "resize")
WORDS: Mapping[str, tuple[Any, ...]] = {
    "model": MODELS, "prompt": ("a warm sunset", "水彩画"), "text": ("a hill",), "texts": (["a hill"], ["a", "lake"]),
    "operate": ("expand", "reverse"), "priority": (2, 3), "size": ("512x512", "auto"), "scale": (2, 4), "params": ({},),
}  # fmt: skip
OWN_WORDS: Mapping[str, Mapping[str, tuple[Any, ...]]] = {  # by path
    "/api/v1/run_plugin_gen_image": {"name": ("RemoveBG", "RealESRGAN")},
    "/api/v1/run_plugin_gen_mask": {"name": ("RemoveBG",)},
    "/v1/images/generations": {"model": ("paint", "dall-e-3"), "n": (1, 2), "response_format": ("b64_json", "url")},
    "/v1/images/edits": {"model": ("edit", "other"), "n": (1, 2), "response_format": ("b64_json", "url")},
    "/v1/images/variations": {"model": ("repaint", "other"), "response_format": ("b64_json", "url")},
    "/jobs": {"model": ("stub", "resize")},
    "/api/v1/model": {"name": ("inpaint", "cv2")},
}
TENSORS = {
    "image_shape": [1, 3, 16, 16], "mask_shape": [1, 1, 16, 16], "original_height": 16, "original_width": 16,
    "image_tensor_b64": base64.b64encode(bytes(3 * 16 * 16 * 4)).decode(),
    "mask_tensor_b64": base64.b64encode(bytes(16 * 16 * 4)).decode(),
}  # fmt: skip
Counts = dict[str, dict[str, int]]
OFTEN = 235  # of 256
NO_DEFECT = ["2xx", "3xx", "4xx", "503", "507"]


@functools.lru_cache(maxsize=64)
def picture(item_size: tuple[int, int], format: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (item_size[1], item_size[0]), "teal").save(out, format)
    return out.getvalue()


def work(item: RunItem, _: bytes) -> bytes:
    """An image of the right size and format, without a model."""
    return picture(item.size, item.format.format)


@dataclass(slots=True)
class Live:
    """A server that listens. `ids`: by the name of a path's parameter, jobs and tasks that are there."""

    url: str
    headers: Mapping[str, str]
    ids: dict[str, list[str]]


@contextmanager
def live(folder: Path, *, keys: bool) -> Iterator[Live]:
    """Serve in a thread of its own."""
    more = {"keys_file": keys_file(folder, priority="paid")} if keys else {}
    settings = Settings(
        outputs=folder / "outputs", models_folder=TEST_MODELS, min_free_disk=0, devices="cpu:2",
        arena_bytes=256 << 20, body_timeout=2.0, request_timeout=10.0, **more,
    )  # fmt: skip
    started: list[int] = []
    ready, stop = threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(_serve(settings, started, ready, stop)))
    thread.start()
    try:
        assert ready.wait(30) and started, "the server did not start"
        url = f"http://127.0.0.1:{started[0]}"
        headers = {"X-API-Key": KEY} if keys else {}
        yield Live(url, headers, _fill(url, headers))
    finally:
        stop.set()
        thread.join()


async def _serve(settings: Settings, started: list[int], ready: threading.Event, stop: threading.Event) -> None:
    def make_pool(plans: object, catalogue: object, arena: Any) -> MemoryPool:
        return MemoryPool(arena, ("cpu:0", "cpu:1"), work, root=str(settings.outputs))

    engine = build(settings, make_pool)
    await engine.start()
    config = uvicorn_config(settings, create_app(engine, settings), lifespan="off", timeout_graceful_shutdown=1)
    config.port = 0
    server = uvicorn.Server(config)
    task = asyncio.create_task(server._serve())
    try:
        while not (server.started and engine.snapshot()["ready"]):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        started.append(server.servers[0].sockets[0].getsockname()[1])
        ready.set()
        while not stop.is_set():  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    finally:
        ready.set()
        server.should_exit = True
        await task
        await engine.stop(0.0)


def _fill(url: str, headers: Mapping[str, str]) -> dict[str, list[str]]:
    """Put something into every dialect; what can be looked for there."""
    with httpx.Client(base_url=url, headers=headers) as client:
        file = ("a.png", PICTURE, "image/png")
        done = [client.post("/jobs", data={"model": "stub"}, files={"image": file}, headers={"Prefer": "wait=9"})]
        done += [client.post("/edit", data={"prompt": "sunset"}, files={"image": file})]
        done += [client.post("/api/v1/images/upscale", files={"file": file})]
        task = client.post("/api/v1/image/generate", json={"text": "a hill"})
        batch = client.post("/api/v1/image/batch-generate", json={"texts": ["a hill", "a lake"]})
        drawn = client.post("/v1/images/generations", json={"prompt": "a hill", "response_format": "url"})
        lora = client.post("/api/v1/lora/upload", files={"file": ("soft.safetensors", _lora())})
        for answer in (*done, lora, task, batch, drawn):
            assert answer.status_code < 300, (answer.request.url, answer.text)
        jobs = [done[0].json()["id"], done[1].json()["request_id"], done[2].json()["job_id"]]
        jobs.append(drawn.json()["data"][0]["url"].split("/")[-2])
        told = task.json()["data"]
        while "result" not in (now := client.get(told["query_url"]).json()["data"]):
            assert now["status"] != "failed", now
        day, name = now["result"]["original_url"].partition("?")[0].rsplit("/", 2)[1:]
        return {
            "id": jobs, "job_id": jobs, "request_id": jobs, "model": ["stub", "upscale"], "name": [*MODELS],
            "task": [told["task_id"]], "batch-task": [batch.json()["data"]["batch_task_id"]], "day": [day],
            "file": [name], "temp": [f"{told['task_id']}_thumb.webp"], "lora": ["soft", "none"],
        }  # fmt: skip


def _lora() -> bytes:
    """The smallest LoRA that there is."""
    layers = {"unet.to_q.lora_A.weight": [1, 2], "unet.to_q.lora_B.weight": [2, 1]}
    head = {
        name: {"dtype": "F16", "shape": shape, "data_offsets": [4 * number, 4 * number + 4]}
        for number, (name, shape) in enumerate(layers.items())
    }
    text = json.dumps(head).encode()
    return len(text).to_bytes(8, "little") + text + bytes(8)


class Deepener:
    """Makes most cases that should fit reach what lies behind the first check. It chooses by the case itself, so that
    the same seed makes the same requests."""

    def __init__(self, server: Live) -> None:
        self._ids = server.ids

    def __call__(self, case: Any) -> None:
        parts = case.meta.components.values() if case.meta else ()
        if any(part.mode.is_negative for part in parts) or (case.meta and case.meta.generation.mode.is_negative):
            return
        text = repr((case.operation.label, case.path_parameters, case.query, case.body))
        chance = hashlib.sha256(text.encode("utf-8", "replace")).digest()
        if chance[0] < OFTEN:
            self._path(case, chance)
        if case.query and chance[1] < OFTEN:  # few wishes fit together
            wishes = [*case.query]
            case.query = {name: case.query[name] for name in wishes[: chance[3] % 3]}
        if case.operation.label == "POST /jobs":
            case.query = {} if isinstance(case.body, dict) else {"model": "stub"}
        if chance[1] < OFTEN and isinstance(case.body, dict):
            self._body(case, chance)

    def _path(self, case: Any, chance: bytes) -> None:
        for number, name in enumerate(case.path_parameters or {}):
            words = case.operation.path.split("/")
            place = words[words.index(f"{{{name}}}") - 1] if name in ("id", "name") else name
            known = self._ids.get("file" if place == "{day}" else place) or self._ids[name]
            case.path_parameters[name] = known[chance[2 + number] % len(known)]

    def _body(self, case: Any, chance: bytes) -> None:
        words, form = WORDS | OWN_WORDS.get(case.operation.path, {}), case.media_type == "multipart/form-data"
        if "image_tensor_b64" in case.body and chance[2] < OFTEN:
            case.body = dict(TENSORS)
            return
        if case.operation.path in ("/jobs", "/run/{model}"):
            case.body.pop("mask", None)
        if case.operation.path == "/api/v1/inpaint":
            case.body |= dict.fromkeys(("image", "mask"), TEXT)
        optional = [name for name in case.body if name not in words and name not in FILES]
        kept = optional if chance[2] > OFTEN else optional[: chance[3] % 3]  # few wishes fit together
        case.body = {name: value for name, value in case.body.items() if name in kept or name not in optional}
        for name in case.body:
            if name in FILES:
                case.body[name] = PICTURE if form else TEXT if isinstance(case.body[name], str) else case.body[name]
            elif name in words:
                case.body[name] = words[name][chance[4] % len(words[name])]


def run(server: Live, seed: int, **phases: Any) -> tuple[list[str], Counts]:
    """Everything that is wrong, in words, and how often which status came from which operation. `phases`: as
    schemathesis' own file of settings has them."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json", config=_config(server, seed, phases))
    deepen = Deepener(server)

    def before_call(context: Any, case: Any, kwargs: Any) -> None:
        deepen(case)

    schemathesis.hook("before_call")(before_call)
    try:
        return _heard(from_schema(schema).execute())
    finally:
        hooks.unregister(before_call)


def _config(server: Live, seed: int, phases: dict[str, Any]) -> schemathesis.Config:
    wanted = [*CHECKS, *(WITH_KEYS if server.headers else ())]
    paths = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    forms = [
        path for path, item in paths.items()
        if any("multipart/form-data" in each.get("requestBody", {}).get("content", {}) for each in item.values())
    ]  # fmt: skip
    return schemathesis.Config.from_dict({
        "seed": seed,
        "headers": dict(server.headers),
        "request-timeout": 20,
        "continue-on-failure": True,
        "generation": {"deterministic": True, "database": "none", "no-shrink": True},
        "checks": {
            "enabled": False,
            **{name: {"enabled": True} for name in wanted},
            "not_a_server_error": {"enabled": True, "expected-statuses": NO_DEFECT},
        },
        "phases": phases,
        "operations": [
            # In a form everything is text, and what should not fit does.
            *({"include-path": path, "checks": {"negative_data_rejection": {"enabled": False}}} for path in forms),
            # DELETE removes a LoRA of that name there.
            *({"include-path": f"/api/v1/lora/{word}", "checks": {"allow_header_conformance": {"enabled": False}}}
              for word in ("upload", "list")),
        ],
    })


def _heard(stream: Iterator[Any]) -> tuple[list[str], Counts]:
    wrong: dict[str, str] = {}
    statuses: Counts = {}
    for event in stream:
        if isinstance(event, events.ScenarioFinished):
            for each_id, each in event.recorder.interactions.items():
                status = str(each.response.status_code) if each.response else "none"
                label = event.recorder.cases[each_id].value.operation.label
                counts = statuses.setdefault(label, {})
                counts[status] = counts.get(status, 0) + 1
            for case in event.recorder.checks:
                for check in event.recorder.checks[case]:
                    if check.failure_info is not None:
                        failure = check.failure_info.failure
                        key = f"{event.label} {check.name} {failure.title}"
                        wrong.setdefault(key, f"{key}: {failure.message}\n{check.failure_info.code_sample[:600]}")
        elif isinstance(event, events.NonFatalError):
            wrong.setdefault(event.label + repr(event.value)[:99], f"{event.label}: {event.value!r} {event.info}")
        elif isinstance(event, events.FatalError):
            raise event.exception
    return list(wrong.values()), statuses


for _kind in ("png", "jpeg", "webp", "avif"):
    schemathesis.openapi.media_type(f"image/{_kind}", strategies.sampled_from([PICTURE, PICTURE[:40], b"", b"GIF89a"]))
schemathesis.openapi.media_type("application/octet-stream", strategies.just(PICTURE))

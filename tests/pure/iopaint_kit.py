"""IOPaint's clients for tests: the bodies that they send, over the real engine and a pool in memory."""

from __future__ import annotations

import base64
import json
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from tests.pure.dialect_kit import Server, png, serve
from tests.pure.image_kit import save

MODELS = ("inpaint", "cv2", "background_remove", "upscale", "mask_tools", "tensor_image")
IMAGE = png(64, 48)
MASK = save(Image.fromarray(np.pad(np.full((10, 12), 255, np.uint8), ((5, 33), (6, 46)))))
STROKE = (255, 204, 0, 187)  # of the page's brush, ffcc00bb


def world(folder: Path, **given: Any) -> AbstractAsyncContextManager[Server]:
    """A server with the models that matter here."""
    return serve(folder, **{"models": MODELS, "arena_bytes": 256 << 20, "min_free_disk": 0, **given})


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{text(data)}"


def painted(width: int = 64, height: int = 48) -> bytes:
    """A mask as the page draws it: a stroke on nothing."""
    pixels = np.zeros((height, width, 4), np.uint8)
    pixels[10:20, 10:30] = STROKE
    return save(pixels)


def page_body(**more: Any) -> dict[str, Any]:
    """What IOPaint 1.6's own page sends, with its two misspelt names."""
    return {
        "image": url(IMAGE), "mask": url(painted()), "ldm_steps": 30, "ldm_sampler": "ddim", "zits_wireframe": True,
        "cv2_flag": "INPAINT_NS", "cv2_radius": 5, "hd_strategy": "Crop", "hd_strategy_crop_triger_size": 640,
        "hd_strategy_crop_margin": 128, "hd_trategy_resize_imit": 2048, "prompt": "", "negative_prompt": "out of frame",
        "use_croper": False, "croper_x": 0, "croper_y": 0, "croper_height": 512, "croper_width": 512,
        "use_extender": False, "extender_x": 0, "extender_y": 0, "extender_height": 512, "extender_width": 512,
        "sd_mask_blur": 12, "sd_strength": 1, "sd_steps": 50, "sd_guidance_scale": 7.5,
        "sd_sampler": "DPM++ 2M", "sd_seed": -1, "sd_match_histograms": False, "sd_lcm_lora": False,
        "paint_by_example_example_image": None, "p2p_image_guidance_scale": 1.5, "enable_controlnet": False,
        "controlnet_conditioning_scale": 0.4, "controlnet_method": "", "enable_brushnet": False,
        "brushnet_method": "random_mask", "brushnet_conditioning_scale": 1, "enable_powerpaint_v2": False,
        "powerpaint_task": "text-guided",
        **more,
    }  # fmt: skip


async def inpaint(server: Server, headers: dict[str, str] | None = None, **more: Any) -> httpx.Response:
    """`POST /api/v1/inpaint` with image, mask and these fields."""
    body = {"image": text(IMAGE), "mask": text(MASK), **more}
    return await server.client.post("/api/v1/inpaint", json=body, headers=headers)


def refusal(answer: httpx.Response, status: int) -> dict[str, Any]:
    """IOPaint's error body, checked for its shape."""
    assert answer.status_code == status, answer.text
    told: dict[str, Any] = json.loads(answer.content)
    assert set(told) == {"error", "detail", "body", "errors"} and isinstance(told["errors"], str) and told["errors"]
    assert "Traceback" not in answer.text and "/" not in told["errors"].replace("/api/v1", "").replace("image/", "")
    return told

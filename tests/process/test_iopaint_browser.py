"""IOPaint's own page in a real browser against a real server: upload, stroke, result, undo, another model.

Needs Chromium, and the page: `pip install --no-deps iopaint==1.6.0`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
from browser_kit import CHROMIUM, Page, browse
from kit import ROOT, free_port, running

pytestmark = [
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine"),
    pytest.mark.skipif(importlib.util.find_spec("iopaint") is None, reason="IOPaint's page is not installed"),
]
CANVAS = "document.querySelector('canvas')"
PIXELS = f"{CANVAS}.toDataURL()"
ENTRY = "[...document.querySelectorAll('[role=dialog] *')].find(e => !e.children.length && e.innerText === '{}')"
INPAINT = ("POST", "/api/v1/inpaint")


def stroke(page: Page, height: float) -> None:
    """Paint from left to right over the middle of the picture, as soon as nothing lies over it."""
    x, y, w, h = page.js(f"(b => [b.x, b.y, b.width, b.height])({CANVAS}.getBoundingClientRect())")
    points = [(x + w * (0.4 + 0.02 * step), y + h * height) for step in range(10)]
    page.until(f"document.elementFromPoint({points[0][0]}, {points[0][1]})?.tagName === 'CANVAS'")
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=points[0][0], y=points[0][1])
    page.mouse("mousePressed", *points[0])
    for point in points:
        page.mouse("mouseMoved", *point)
    page.mouse("mouseReleased", *points[-1])


def insist(page: Page, act: Callable[[], None], done: Callable[[], bool]) -> None:
    """Do it until it has its effect: what comes while the page is busy with the last thing is passed over by it."""
    for last in (False, False, True):
        try:
            act()
            page.until(done, seconds=20)
            return
        except AssertionError:
            if last:
                raise


def undo(page: Page) -> None:
    page.key("z", "KeyZ", modifiers=2)


def choose(page: Page, model: str) -> None:
    """In the page's settings. A click that comes while they slide in is not noticed."""
    entry = ENTRY.format(model)
    if not page.js(f"!!{entry}"):
        page.key("s", "KeyS")
        page.until(entry, seconds=20)
    page.click(entry)
    page.click(ENTRY.format("Ok"))


def test_the_page_works(tmp_path: Path) -> None:
    port = free_port()
    flags = ("--iopaint-port", str(port))
    with (
        running(tmp_path / "outputs", *flags, devices="cpu:1", models="inpaint,cv2,upscale,mask_tools") as server,
        browse(tmp_path) as page,
    ):
        page.open(f"http://127.0.0.1:{port}/")
        page.until("document.querySelector('input[type=file]')")
        for path in ("server-config", "model", "inputimage"):
            page.until(lambda path=path: page.asked("GET", f"/api/v1/{path}"))
        page.until(lambda: page.asked("WS", "/socket.io/"))

        page.choose_file("input[type=file]", ROOT / "examples" / "coffee.jpg")
        page.until(f"{CANVAS} && {CANVAS}.width === 512")
        page.until(lambda: page.asked("POST", "/api/v1/gen-info"))
        original = page.js(PIXELS)

        insist(page, lambda: stroke(page, 0.5), lambda: page.asked(*INPAINT) == 1)
        page.until(lambda: page.js(PIXELS) != original)
        first = page.js(PIXELS)
        page.until(lambda: '42["diffusion_finish"]' in page.heard)

        insist(page, lambda: stroke(page, 0.7), lambda: page.asked(*INPAINT) == 2)
        page.until(lambda: page.js(PIXELS) not in (original, first))
        insist(page, lambda: undo(page), lambda: page.js(PIXELS) == first)
        insist(page, lambda: undo(page), lambda: page.js(PIXELS) == original)

        insist(page, lambda: choose(page, "cv2"), lambda: page.asked("POST", "/api/v1/model"))
        assert server.get("/api/v1/model").json()["name"] == "cv2"
        page.until(f"!{ENTRY.format('Ok')} && {ENTRY.format('CV2 Radius')}")  # this model's own settings are shown
        insist(page, lambda: stroke(page, 0.5), lambda: page.asked(*INPAINT) == 3)
        page.open(f"{server.url}/iopaint")  # the same page, beside everything else
        page.until("document.querySelector('input[type=file]')")
        assert not page.errors and not [one for one in page.requests if one[2] >= 400], (page.errors, page.requests)

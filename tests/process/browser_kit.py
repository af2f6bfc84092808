"""A headless Chromium, driven by its DevTools protocol: as much of it as a test of a page needs."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((found for name in NAMES if (found := shutil.which(name))), "")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
    "--remote-debugging-port=0", "--window-size=1400,1000", "--force-device-scale-factor=1",
)  # fmt: skip


class Page:
    """One tab. `requests` are (method, path, status) of everything it asked for, `heard` what its web sockets were
    told, `errors` what its scripts threw."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._numbers = socket, itertools.count(1)
        self.requests: list[tuple[str, str, int]] = []
        self.heard: list[str] = []
        self.errors: list[str] = []
        self._asked: dict[str, tuple[str, str]] = {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "DOM"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command and its answer; events that come before it are taken note of."""
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if hasattr(self, "_session"):
            message["sessionId"] = self._session
        self._socket.send(json.dumps(message))
        while True:
            heard = json.loads(self._socket.recv(60))
            if heard.get("id") == number:
                assert "error" not in heard, heard["error"]
                return heard["result"]
            self._note(heard.get("method", ""), heard.get("params", {}))

    def _note(self, event: str, params: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            path = re.sub(r"^https?://[^/]*|\?.*", "", params["request"]["url"])
            self._asked[params["requestId"]] = params["request"]["method"], path
        elif event == "Network.responseReceived" and params["requestId"] in self._asked:
            self.requests.append((*self._asked[params["requestId"]], params["response"]["status"]))
        elif event == "Network.webSocketCreated":
            self._asked[params["requestId"]] = "WS", re.sub(r"^wss?://[^/]*|\?.*", "", params["url"])
        elif event == "Network.webSocketHandshakeResponseReceived":
            self.requests.append((*self._asked[params["requestId"]], params["response"]["status"]))
        elif event == "Network.webSocketFrameReceived":
            self.heard.append(params["response"]["payloadData"])
        elif event == "Runtime.exceptionThrown":
            self.errors.append(params["exceptionDetails"].get("exception", {}).get("description", "?"))

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def js(self, expression: str) -> Any:
        """The value of an expression (a promise is waited for)."""
        told = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def until(self, what: str | Callable[[], Any], seconds: float = 60) -> Any:
        """Wait until an expression is true, or a function's value, which it returns."""
        end = time.monotonic() + seconds
        while not (found := self.js(f"!!({what})") if isinstance(what, str) else what()):
            assert time.monotonic() < end, f"did not become true: {what}; {self.errors}; {self.requests[-20:]}"
            time.sleep(0.05)
            self.js("0")  # hears what has happened meanwhile
        return found

    def asked(self, method: str, path: str) -> int:
        """How often it got a good answer there."""
        return sum(one[:2] == (method, path) and one[2] < 400 for one in self.requests)

    def choose_file(self, selector: str, file: Path) -> None:
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file)])

    def mouse(self, kind: str, x: float, y: float) -> None:
        buttons = 0 if kind == "mouseReleased" else 1
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=buttons, clickCount=1)

    def click(self, expression: str) -> None:
        """Click on the middle of the element that an expression gives."""
        script = (f"(() => {{ const e = {expression}; if (!e) return null; const b = e.getBoundingClientRect();"
                  " return b.width ? [b.x + b.width / 2, b.y + b.height / 2] : null; })()")
        box = self.until(lambda: self.js(script))
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])
        self.mouse("mousePressed", *box)
        self.mouse("mouseReleased", *box)

    def key(self, key: str, code: str, modifiers: int = 0) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=code, modifiers=modifiers,
                      windowsVirtualKeyCode=ord(key.upper()) if len(key) == 1 else 0)

    def screenshot(self, file: Path) -> None:
        import base64

        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


@contextlib.contextmanager
def browse(folder: Path, *flags: str) -> Iterator[Page]:
    """An empty tab of a browser with a profile of its own under `folder`; `flags` are further ones of its own."""
    log = folder / "chromium.log"
    with log.open("wb") as sink:
        command = [CHROMIUM, *FLAGS, *flags, f"--user-data-dir={folder / 'profile'}"]
        browser = subprocess.Popen(command, stderr=sink, stdout=sink)
    try:
        end = time.monotonic() + 60
        while not (found := re.search(r"ws://\S+", log.read_text())):
            assert time.monotonic() < end and browser.poll() is None, log.read_text()[-2000:]
            time.sleep(0.05)
        with connect(found[0], max_size=None) as socket:
            yield Page(socket)
    finally:
        browser.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            browser.wait(10)
        if browser.poll() is None:
            browser.kill()
            browser.wait()

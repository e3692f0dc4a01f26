"""Headless Chromium, driven over its debugging protocol, for tests of the page."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from waiting import SECONDS, wait_until
from websockets.sync import client

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
COIN = (101, 57)


class Browser:
    """One tab, driven over Chromium's debugging protocol."""

    def __init__(self, folder: Path) -> None:
        self.downloads = folder / "downloads"
        self.downloads.mkdir()
        profile = folder / "profile"
        self._process = subprocess.Popen(
            [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0",
             f"--user-data-dir={profile}", "--force-color-profile=srgb", "about:blank"],
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        port_file = profile / "DevToolsActivePort"
        wait_until(lambda: port_file.is_file() and len(port_file.read_text().split()) == 2)
        port = port_file.read_text().split()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
            target = next(tab for tab in json.load(answer) if tab["type"] == "page")
        self._open = contextlib.ExitStack()
        self._socket = self._open.enter_context(client.connect(target["webSocketDebuggerUrl"], max_size=None))
        self._count = 0
        self.problems: list[Any] = []
        self.requests: list[tuple[str, int]] = []
        for domain in ("Page", "Runtime", "DOM", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(self.downloads))

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._count += 1
        self._socket.send(json.dumps({"id": self._count, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=SECONDS))
            self._note(message)
            if message.get("id") == self._count:
                assert "error" not in message, message
                return message["result"]

    def _note(self, message: dict[str, Any]) -> None:
        parameters = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown" or (
            message.get("method") == "Log.entryAdded" and parameters["entry"]["level"] == "error"
        ):
            self.problems.append(parameters)
        elif message.get("method") == "Network.requestWillBeSent":
            request = parameters["request"]
            self.requests.append((request["url"], len(request.get("postData", ""))))

    def run(self, script: str) -> Any:
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def open(self, url: str) -> None:
        self.send("Page.navigate", url=url)
        wait_until(lambda: self.run("document.readyState") == "complete")

    def size(self, width: int, height: int) -> None:
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 700
        )

    def choose_file(self, selector: str, *paths: Path) -> None:
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=node, files=list(map(str, paths)))

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where a pixel of the image is in the window."""
        box = self.run("(() => { const r = marks.getBoundingClientRect(); return [r.x, r.y, r.width, r.height]; })()")
        return box[0] + x / 384 * box[2], box[1] + y / 303 * box[3]

    def mouse(self, kind: str, at: tuple[float, float], button: str = "left", modifiers: int = 0) -> None:
        held = {"left": 1, "right": 2}[button]
        self.send(
            "Input.dispatchMouseEvent", type=kind, x=at[0], y=at[1], button=button, clickCount=1,
            buttons=0 if kind == "mouseReleased" else held, modifiers=modifiers,
        )  # fmt: skip

    def click(self, x: float, y: float, button: str = "left", modifiers: int = 0) -> None:
        for kind in ("mousePressed", "mouseReleased"):
            self.mouse(kind, self.place(x, y), button, modifiers)

    def drag(self, x0: float, y0: float, x1: float, y1: float) -> None:
        self.mouse("mousePressed", self.place(x0, y0))
        for share in (0.5, 1.0):
            self.mouse("mouseMoved", self.place(x0 + share * (x1 - x0), y0 + share * (y1 - y0)))
        self.mouse("mouseReleased", self.place(x1, y1))

    def key(self, key: str, modifiers: int = 0) -> None:
        text = {"text": "\r" if key == "Enter" else key} if key == "Enter" or len(key) == 1 else {}
        for kind in ("keyDown", "keyUp"):
            extra = text if kind == "keyDown" else {}
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, modifiers=modifiers, **extra)

    @property
    def status(self) -> str:
        return str(self.run("document.getElementById('status').textContent"))

    def covered(self) -> int:
        """Pixels of the overlay that are painted."""
        return int(
            self.run(
                "(() => { const c = overlay, d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
                "let n = 0; for (let i = 3; i < d.length; i += 4) n += d[i] > 0; return n; })()"
            )
        )

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        self._open.close()
        self._process.terminate()
        self._process.wait(SECONDS)


@contextlib.contextmanager
def tab_at(url: str, folder: Path) -> Iterator[Browser]:
    tab = Browser(folder)
    tab.size(1280, 860)
    tab.open(url)
    yield tab
    tab.close()
    assert not tab.problems


def after(browser: Browser, action: Any) -> int:
    """Do it, and wait until the status speaks of the answer; returns what the overlay covers."""
    before = browser.status
    action()
    wait_until(lambda: browser.status != before and "…" not in browser.status)
    return browser.covered()


def picture(browser: Browser, name: str) -> None:
    """Kept where ``PAGE_PICTURES`` says, for a look at it."""
    if folder := os.environ.get("PAGE_PICTURES"):
        browser.screenshot(Path(folder) / f"{name}.png")

"""The page in headless Chromium: load, click, correct, undo, everything, download. Needs Chromium."""

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

import numpy as np
import pytest
from clips import write_clip
from coins import photograph
from models import SMALL_2, TINY_2, draw_weights_that_see, random_model
from PIL import Image
from waiting import SECONDS, wait_until

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("httptools", reason="needs the extra serve")
client = pytest.importorskip("websockets.sync.client")
from serving import Server  # noqa: E402

import sam  # noqa: E402
from sam import save_checkpoint  # noqa: E402
from sam.masks import rle  # noqa: E402
from sam.modeling.build import build_from_config  # noqa: E402
from sam.modeling.sam2_base import SAM2Base  # noqa: E402

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
]
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


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


@contextlib.contextmanager
def tab_at(url: str, folder: Path) -> Iterator[Browser]:
    tab = Browser(folder)
    tab.size(1280, 860)
    tab.open(url)
    yield tab
    tab.close()
    assert not tab.problems


@pytest.fixture
def browser(tmp_path: Path, server: Server) -> Iterator[Browser]:
    with tab_at(server.url, tmp_path) as tab:
        yield tab


@pytest.fixture
def photo_file(tmp_path: Path) -> Path:
    path = tmp_path / "coins.png"
    Image.fromarray(photograph()).save(path)
    return path


def load(browser: Browser, photo_file: Path) -> None:
    browser.choose_file("#file", photo_file)
    wait_until(lambda: "embedded in" in browser.status)


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


def test_a_visit(browser: Browser, photo_file: Path) -> None:
    picture(browser, "page_empty")
    load(browser, photo_file)
    assert browser.covered() == 0
    one = after(browser, lambda: browser.click(*COIN))
    assert 400 < one < 4000  # a coin, of an image of 116,352 pixels
    picture(browser, "page_click")
    assert browser.run("document.querySelectorAll('#choices input').length") == 3
    corrected = after(browser, lambda: browser.click(70, 90, "right"))
    picture(browser, "page_corrected")
    assert browser.run("document.getElementById('undo').disabled") is False
    assert after(browser, lambda: browser.key("z")) == one
    assert after(browser, lambda: browser.click(70, 90, modifiers=1)) == corrected  # Alt, as the right button
    assert after(browser, lambda: browser.key("Escape")) == 0
    assert browser.run("document.getElementById('undo').disabled") is True

    assert after(browser, lambda: browser.drag(78, 30, 126, 82)) > 400
    picture(browser, "page_box")
    everything = after(browser, lambda: browser.run("document.getElementById('everything').click()"))
    assert everything > 4 * one
    assert int(browser.status.split()[0]) > 5
    picture(browser, "page_everything")

    uploads = [size for url, size in browser.requests if url.endswith("/v1/embed")]
    assert len(uploads) == 1  # the image travelled once
    assert all(url.startswith(("http://127.0.0.1", "blob:", "data:")) for url, _ in browser.requests)


def test_a_visit_to_sam_2(tmp_path: Path, photo_file: Path) -> None:
    """The masks of drawn weights mean nothing, but each is shown and corrected as any."""
    save_checkpoint(random_model(TINY_2), tmp_path / "weights.safetensors")
    with (
        Server("--checkpoint", str(tmp_path / "weights.safetensors"), "--device", "cpu") as server,
        tab_at(server.url, tmp_path) as browser,
    ):
        load(browser, photo_file)
        assert after(browser, lambda: browser.click(*COIN)) > 0
        assert "px, predicted IoU 0." in browser.status
        assert browser.run("document.querySelectorAll('#choices input').length") == 3
        after(browser, lambda: browser.click(70, 90, "right"))
        assert browser.run("document.getElementById('undo').disabled") is False
        after(browser, lambda: browser.drag(78, 30, 126, 82))
        browser.key("j")
        wait_until((browser.downloads / "coins.json").is_file)
        (prompt,) = json.loads((browser.downloads / "coins.json").read_text())["prompts"]
        assert ("no object seen" in browser.status) == (prompt["object_score"] <= 0)
        after(browser, lambda: browser.run("document.getElementById('everything').click()"))
        assert " masks" in browser.status
        assert len([url for url, _ in browser.requests if url.endswith("/v1/embed")]) == 1


@pytest.fixture(scope="module")
def tracker() -> SAM2Base:
    return draw_weights_that_see(build_from_config(SMALL_2))


@pytest.fixture(scope="module")
def tracking(tracker: SAM2Base, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    path = tmp_path_factory.mktemp("model") / "weights.safetensors"
    save_checkpoint(tracker, path)
    with Server("--checkpoint", str(path), "--device", "cpu") as running:
        yield running


def is_shown(browser: Browser, frame: int) -> bool:
    return str(browser.run("document.getElementById('at').textContent")).startswith(f"{frame} /")


def test_a_visit_with_a_video(tracking: Server, tracker: SAM2Base, tmp_path: Path) -> None:
    """Its frames are pictures; what the page saves is what Python tracks from the same clicks."""
    frames = [np.roll(photograph(), 9 * index, 1) for index in range(4)]
    paths = [tmp_path / f"{index}.png" for index in (8, 9, 10, 11)]
    for path, frame in zip(paths, frames, strict=True):
        Image.fromarray(frame).save(path)
    with tab_at(tracking.url, tmp_path) as browser:
        browser.choose_file("#file", *paths)
        wait_until(lambda: browser.status == "Frame 1 of 4, click on an object")
        assert after(browser, lambda: browser.click(*COIN)) > 0
        assert browser.status.startswith("Frame 1 of 4, object 1: ")
        after(browser, lambda: browser.click(70, 90, "right"))
        browser.key("n")
        after(browser, lambda: browser.drag(178, 130, 226, 182))
        assert browser.status.startswith("Frame 1 of 4, object 2: ")
        picture(browser, "page_video_click")
        browser.key("t")
        wait_until(lambda: browser.status == "4 frames tracked. Play them.")
        covered = browser.covered()
        picture(browser, "page_video_tracked")
        browser.key(" ")
        wait_until(lambda: is_shown(browser, 2))
        wait_until(lambda: browser.run("document.getElementById('play').textContent") == "Play")
        assert is_shown(browser, 4)
        assert browser.covered() == covered
        browser.run("seek.value = 1; seek.dispatchEvent(new Event('input'))")
        wait_until(lambda: is_shown(browser, 2))
        after(browser, lambda: browser.click(*COIN))
        assert "went by" in browser.status
        browser.key("j")
        wait_until((browser.downloads / "8.json").is_file)
        told = json.loads((browser.downloads / "8.json").read_text())["frames"]
        first, box = told[0]["prompts"]["1"], told[0]["prompts"]["2"]["box"]
        assert first["labels"] == [1, 0]
        session = sam.TrackingSession(tracker)
        for frame, document in zip(frames, told, strict=True):
            result = session.step(frame)
            if document["frame"] == 0:
                for point, label in zip(first["points"], first["labels"], strict=True):
                    session.add("1", sam.Prompt([point], [label]))
                session.add("2", sam.Prompt(box=box))
                result = session.result()
            masks = [rle.decode(record["segmentation"]) for record in document["objects"]]
            np.testing.assert_array_equal(masks, result.masks.numpy())
        assert covered == result.masks.any(0).sum()
        after(browser, lambda: browser.key("Escape"))  # forgets the second object
        assert browser.covered() == result.masks[0].sum()
        browser.choose_file("#file", paths[0])
        wait_until(lambda: "embedded in" in browser.status)
        assert after(browser, lambda: browser.click(*COIN)) > 0
        wait_until(lambda: b"sam_video_sessions 0.0" in tracking.get("/metrics")[1])


def test_frames_are_taken_from_a_video_file(tracking: Server, tmp_path: Path) -> None:
    pytest.importorskip("av", reason="the test makes a video")
    clip = write_clip(tmp_path / "clip.webm", [photograph()[:302]] * 5, "libvpx")  # a second of it
    with tab_at(tracking.url, tmp_path) as browser:
        browser.choose_file("#file", clip)
        wait_until(lambda: browser.status == "Frame 1 of 10, click on an object")
        assert after(browser, lambda: browser.click(*COIN)) > 0
        browser.key("t")
        wait_until(lambda: browser.status == "10 frames tracked. Play them.")
        assert is_shown(browser, 10)
        assert browser.covered() > 0
        picture(browser, "page_video_file")


def test_a_model_of_images_says_that_it_cannot_track(browser: Browser, photo_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.png"
    other.write_bytes(photo_file.read_bytes())
    browser.choose_file("#file", photo_file, other)
    wait_until(lambda: "This model cannot track" in browser.status)
    browser.problems.clear()  # the browser logs the refusal
    load(browser, photo_file)
    assert after(browser, lambda: browser.click(*COIN)) > 400


def test_downloads(browser: Browser, photo_file: Path) -> None:
    load(browser, photo_file)
    after(browser, lambda: browser.click(*COIN))
    for key, name in (("p", "coins_mask.png"), ("j", "coins.json")):
        browser.key(key)
        wait_until((browser.downloads / name).is_file)  # Chromium gives a file its name once it is whole
    mask = np.array(Image.open(browser.downloads / "coins_mask.png").convert("L"))
    document = json.loads((browser.downloads / "coins.json").read_text())
    record = document["prompts"][0]["masks"][document["chosen"]]
    np.testing.assert_array_equal(mask == 255, rle.decode(record["segmentation"]))
    assert set(np.unique(mask)) == {0, 255}
    np.testing.assert_allclose(document["prompt"]["points"], [COIN], atol=1)


def test_keyboard_alone(browser: Browser, photo_file: Path) -> None:
    load(browser, photo_file)
    assert browser.run("document.activeElement.id") == "marks"
    for _ in range(24):
        browser.key("ArrowLeft")
    for _ in range(24):
        browser.key("ArrowUp")
    assert after(browser, lambda: browser.key("Enter")) > 100
    best = browser.run("document.querySelector('#choices input:checked').parentElement.title")
    other = "1" if "1" not in best else "2"
    browser.key(other)
    assert other in browser.run("document.querySelector('#choices input:checked').parentElement.title")


def test_narrow_screen(browser: Browser, photo_file: Path) -> None:
    browser.size(390, 780)
    load(browser, photo_file)
    after(browser, lambda: browser.click(*COIN))
    picture(browser, "page_narrow")
    assert browser.run("document.documentElement.scrollWidth") <= 390
    assert browser.run("document.documentElement.scrollHeight") <= 780


def test_the_server_forgot_the_image(
    browser: Browser,
    photo_file: Path,
) -> None:
    """The page sends it again by itself."""
    load(browser, photo_file)
    browser.run(
        """{
          const real = window.fetch;
          let first = true;
          window.fetch = (path, options) => {
            if (first) options.body = options.body.replace(/"[0-9a-f]{32}"/, `"${"0".repeat(32)}"`);
            first = false;
            return real(path, options);
          };
        }"""
    )
    assert after(browser, lambda: browser.click(*COIN)) > 400
    assert len([url for url, _ in browser.requests if url.endswith("/v1/embed")]) == 2
    browser.problems.clear()  # the browser logs the 404

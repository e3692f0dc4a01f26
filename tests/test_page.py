"""The page in headless Chromium: load, click, correct, undo, everything, download. Needs Chromium."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from coins import photograph
from models import TINY_2, random_model
from PIL import Image
from waiting import wait_until

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("httptools", reason="needs the extra serve")
pytest.importorskip("websockets.sync.client")
from browser import CHROMIUM, COIN, Browser, after, picture, tab_at
from serving import Server

from sam import save_checkpoint
from sam.masks import rle

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


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

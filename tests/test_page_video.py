"""Videos on the page in headless Chromium: click, track, play, correct, download. Needs Chromium."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from clips import write_clip
from coins import photograph
from models import SMALL_2, draw_weights_that_see
from PIL import Image
from waiting import wait_until

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("httptools", reason="needs the extra serve")
pytest.importorskip("websockets.sync.client")
from browser import CHROMIUM, COIN, Browser, after, picture, tab_at
from serving import Server

import sam
from sam import save_checkpoint
from sam.masks import rle
from sam.modeling.build import build_from_config
from sam.modeling.sam2_base import SAM2Base

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
]


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

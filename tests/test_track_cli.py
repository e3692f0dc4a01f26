"""``python -m sam track``: results of a video, and a run that is killed and goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import TINY_2, draw_weights_that_see
from PIL import Image

import sam
from sam.cli import main
from sam.masks import rle
from sam.masks.palette import read_labels, voc_palette, write_labels
from sam.modeling.sam2_base import SAM2Base

SIZE, FRAMES = (45, 70), 6


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = draw_weights_that_see(sam.build_from_config(replace(TINY_2, image_size=64)))
    path = tmp_path_factory.mktemp("weights") / "two.safetensors"
    sam.save_checkpoint(model, path)
    return path


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of JPEG files: noise, and a square that moves."""
    folder = tmp_path_factory.mktemp("video")
    generator = np.random.default_rng(0)
    for frame in range(FRAMES):
        image = generator.integers(0, 120, (*SIZE, 3), np.uint8)
        image[10:30, 10 + 4 * frame : 30 + 4 * frame] = (220, 40, 60)
        Image.fromarray(image).save(folder / f"{frame:05d}.jpg", quality=95)
    return folder


def options(video: Path, out: Path, weights: Path) -> list[str]:
    model = ["--checkpoint", str(weights), "--device", "cpu"]
    return ["track", str(video), "--point", "20,20", "--out", str(out), "--save-every", "2", *model]


def results(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "frames.jsonl").read_text().splitlines()]


def test_results_of_a_video(video: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mask = np.zeros((1, *SIZE), bool)
    mask[0, 25:40, 30:60] = True
    write_labels(tmp_path / "labels.png", mask, [7], SIZE)
    out, more = tmp_path / "out", ["--box", "cat@2:30,5,60,40", "--mask", f"@1:{tmp_path / 'labels.png'}", "--overlay"]
    assert main([*options(video, out, weights), *more]) == 0
    assert "6 frames, 3 objects" in capsys.readouterr().out
    frames = lines(out)
    ids = [[each["id"] for each in frame["objects"]] for frame in frames]
    assert ids == [["1"], ["1", "7"], *[["1", "7", "cat"]] * 4]
    seen = Counter(each["object_score"] > 0 for frame in frames for each in frame["objects"])
    assert seen[True] / seen.total() > 0.8
    values = json.loads((out / "track.json").read_text())["objects"]
    assert sorted(values) == ["1", "7", "cat"]
    for frame in frames:
        with Image.open(out / "masks" / f"{frame['frame']:05d}.png") as image:
            assert image.mode == "P"
            assert bytes(image.getpalette()[:768]) == voc_palette().tobytes()
            labels = np.array(image)
        expected = np.zeros(SIZE, np.uint8)
        for each in frame["objects"]:
            expected[rle.decode(each["segmentation"])] = each["value"]
        assert (labels == expected).all()
    with Image.open(out / "overlay.gif") as overlay:
        assert (overlay.n_frames, overlay.size) == (FRAMES, SIZE[::-1])
    assert not (out / "state.pt").exists()
    assert main([*options(video, out, weights), *more]) == 0
    assert "is finished" in capsys.readouterr().out
    assert main([*options(video, out, weights), "--point", "50,20"]) == 2
    assert "was made with another points" in capsys.readouterr().err


def test_a_mask_of_a_palette_is_read_as_written(tmp_path: Path) -> None:
    masks = np.zeros((2, *SIZE), bool)
    masks[0, :20], masks[1, 10:30, 20:] = True, True
    write_labels(tmp_path / "labels.png", masks, [3, 200], SIZE)
    found = read_labels(tmp_path / "labels.png")
    assert list(found) == [3, 200]
    assert (found[200] == masks[1]).all()
    assert (found[3] == (masks[0] & ~masks[1])).all()
    assert voc_palette()[[0, 1, 2, 3, 8, 255]].tolist() == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [64, 0, 0], [224, 224, 192]
    ]  # fmt: skip
    Image.new("RGB", (4, 4)).save(tmp_path / "colours.png")
    with pytest.raises(ValueError, match="mode RGB"):
        read_labels(tmp_path / "colours.png")
    Image.new("L", (4, 4)).save(tmp_path / "empty.png")
    with pytest.raises(ValueError, match="has no mask"):
        read_labels(tmp_path / "empty.png")


KILLED = """
import os, signal, sys
from sam.cli import main, track
write = track._Folder.write
def killing(self, result):
    write(self, result)
    if result.frame == 4:
        os.kill(os.getpid(), signal.SIGKILL)
track._Folder.write = killing
main(sys.argv[1:])
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_run_goes_on_from_its_last_state(
    video: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", KILLED, *options(video, out, weights)], env=dict(os.environ))
    assert killed.returncode == -signal.SIGKILL
    assert [line["frame"] for line in lines(out)] == [0, 1, 2, 3, 4]
    encoded: list[int] = []
    encode = SAM2Base.forward_image
    monkeypatch.setattr(
        SAM2Base, "forward_image", lambda self, images: (encoded.append(len(images)), encode(self, images))[1]
    )
    assert main(options(video, out, weights)) == 0
    assert "going on after frame 3" in capsys.readouterr().out
    assert encoded == [1, 1]  # frames 4 and 5
    assert main(options(video, whole, weights)) == 0
    assert results(out) == results(whole)


def test_what_cannot_be_tracked_is_said(
    video: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(*arguments: str) -> str:
        assert main(["track", *arguments]) == 2
        return capsys.readouterr().err

    model = ["--checkpoint", str(weights), "--out", str(tmp_path / "out")]
    assert "the embedded model and SAM do not track" in error(str(video), "--point", "1,1")
    assert "nothing to track" in error(str(video), *model)
    assert "must be a folder of JPEG files or a video" in error(str(weights), "--point", "1,1", *model)
    assert "no such video" in error("missing.mp4", "--point", "1,1", *model)
    assert "frame 9 cannot be prompted" in error(str(video), "--point", "@9:1,1", *model)
    broken = tmp_path / "broken"
    broken.mkdir()
    for frame in range(2):
        (broken / f"{frame}.jpg").write_bytes((video / f"0000{frame}.jpg").read_bytes())
    (broken / "2.jpg").write_bytes(b"no picture")
    assert "2.jpg" in error(str(broken), "--point", "1,1", *model)
    assert len(lines(tmp_path / "out")) == 2  # what came before it stays
    assert "holds something else" in error(str(video), "--point", "1,1", *model[:2], "--out", str(broken))

"""MP4 files, through the official predictor and from the command line; one that is damaged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import without_frame, write_clip
from models import SMALL_2, draw_weights_that_see

import sam
import sam.sam2.sam2_video_predictor as face
from sam.cli import main
from sam.modeling.build import build_from_config, sam2_arguments
from sam.modeling.sam2_base import SAM2Base
from sam.sam2.utils.misc import load_video_frames
from sam.video.frames import open_frames
from sam.video.tracking import Tracking

av = pytest.importorskip("av", reason="reading video files needs the extra 'video'")
FRAMES, HEIGHT, WIDTH = 4, 48, 64


@pytest.fixture(scope="module")
def model() -> SAM2Base:
    return draw_weights_that_see(build_from_config(SMALL_2))


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MP4 file of noise, each frame of which is encoded by itself."""
    generator = np.random.default_rng(0)
    pictures = [generator.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8) for _ in range(FRAMES)]
    return write_clip(tmp_path_factory.mktemp("video") / "clip.mp4", pictures)


@pytest.fixture
def damaged(video: Path, tmp_path: Path) -> Path:
    """The file with zeros in place of its third frame."""
    path = tmp_path / "damaged.mp4"
    path.write_bytes(without_frame(video, 2))
    return path


def options(video: Path, model: SAM2Base, folder: Path) -> list[str]:
    sam.save_checkpoint(model, folder / "weights.safetensors")
    model_options = ["--checkpoint", str(folder / "weights.safetensors"), "--device", "cpu"]
    return ["track", str(video), "--point", "20,20", "--out", str(folder / "out"), *model_options]


def test_a_file_is_tracked_as_its_frames(model: SAM2Base, video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(face, "tqdm", lambda frames, desc: frames)
    predictor = face.SAM2VideoPredictor(**sam2_arguments(SMALL_2) | {"binarize_mask_from_pts_for_mem_enc": True}).eval()
    predictor.load_state_dict(model.state_dict())
    state = predictor.init_state(str(video))
    assert (state["num_frames"], state["video_height"], state["video_width"]) == (FRAMES, HEIGHT, WIDTH)
    predictor.add_new_points_or_box(state, 0, 1, points=[[20, 20]], labels=[1])
    masks = [masks[:, 0] > 0 for _, _, masks in predictor.propagate_in_video(state)]
    # A session reads a file frame by frame, and does not know how many there are: these are fewer than 16.
    session = sam.TrackingSession(model, num_frames=FRAMES, fill_hole_area=0)
    session.add(1, sam.Prompt([[20, 20]], [1]))
    results = list(Tracking(session, open_frames(model, str(video))[0]))
    assert len(results) == FRAMES
    assert all(torch.equal(result.masks, mask) for result, mask in zip(results, masks, strict=True))


def test_a_file_from_the_command_line(
    model: SAM2Base, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(options(video, model, tmp_path)) == 0
    assert f"{FRAMES} frames, 1 objects" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "out" / "frames.jsonl").read_text().splitlines()]
    assert [(line["frame"], line["height"], line["width"]) for line in lines] == [
        (frame, HEIGHT, WIDTH) for frame in range(FRAMES)
    ]


def test_a_damaged_frame_is_named_and_those_before_it_are_kept(
    model: SAM2Base, damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results: list[sam.FrameResult] = []
    with pytest.raises(OSError, match=r"damaged\.mp4 cannot be decoded, frame 2"):
        results.extend(sam.track(model, damaged, {0: {1: sam.Prompt([[20, 20]], [1])}}))
    assert [result.frame for result in results] == [0, 1]
    with pytest.raises(OSError, match=r"damaged\.mp4 cannot be decoded, frame 2"):
        load_video_frames(str(damaged), SMALL_2.image_size, True)
    assert main(options(damaged, model, tmp_path)) == 2
    assert "damaged.mp4 cannot be decoded, frame 2" in capsys.readouterr().err
    assert len((tmp_path / "out" / "frames.jsonl").read_text().splitlines()) == 2
    assert sorted(path.name for path in (tmp_path / "out" / "masks").iterdir()) == ["00000.png", "00001.png"]

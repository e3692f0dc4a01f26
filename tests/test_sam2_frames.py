"""Frames of videos: folders of JPEG files, read at once or in a thread, and video files."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from models import TINY_2
from PIL import Image

from benchmarks.official_sam2 import draw_weights
from sam.modeling.build import sam2_arguments
from sam.sam2.sam2_video_predictor import SAM2VideoPredictor
from sam.sam2.utils import misc


def save_frames(folder: Path, names: list[str]) -> None:
    for index, name in enumerate(names):
        pixels = np.random.default_rng(index).integers(0, 60, (30, 40, 3), dtype=np.uint8) + np.uint8(15 * index)
        Image.fromarray(pixels).save(folder / name, format="JPEG", quality=95)


@pytest.mark.parametrize("loads_in_thread", [False, True])
def test_frames_of_a_folder_are_in_the_order_of_their_numbers(tmp_path: Path, loads_in_thread: bool) -> None:
    save_frames(tmp_path, [f"{i}.jpg" for i in range(1, 11)] + ["0011.JPEG"])
    (tmp_path / "notes.txt").touch()
    images, height, width = misc.load_video_frames(
        str(tmp_path), 32, False, async_loading_frames=loads_in_thread, compute_device="cpu"
    )
    frames = torch.stack([images[i] for i in range(len(images))])
    assert (frames.shape, frames.dtype, height, width) == ((11, 3, 32, 32), torch.float32, 30, 40)
    means = frames.flatten(1).mean(1)
    assert torch.equal(means, means.sort().values)
    pixels = np.array(Image.open(tmp_path / "3.jpg").convert("RGB").resize((32, 32))) / 255.0  # Pillow's bicubic
    expected = (torch.from_numpy(pixels).permute(2, 0, 1) - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / (
        torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    )
    assert (frames[2] - expected).abs().max() < 1e-6


def test_names_with_a_number_have_an_order_and_others_none(tmp_path: Path) -> None:
    save_frames(tmp_path, [f"frame_{i}.jpg" for i in range(11)])
    images, _, _ = misc.load_video_frames(str(tmp_path), 32, True)
    assert torch.equal(images.flatten(1).mean(1).argsort(), torch.arange(11))
    save_frames(tmp_path, ["cover.jpg"])
    with pytest.raises(ValueError, match=r"cover\.jpg and frame_0\.jpg have no order"):
        misc.load_video_frames(str(tmp_path), 32, True)
    with pytest.raises(ValueError, match="no images found"):
        misc.load_video_frames(str(make(tmp_path / "empty")), 32, True)
    with pytest.raises(NotImplementedError, match="folder of JPEG files"):
        misc.load_video_frames("clip.txt", 32, True)


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_a_broken_frame_is_named_and_those_before_it_are_tracked(tmp_path: Path) -> None:
    predictor = SAM2VideoPredictor(**sam2_arguments(TINY_2)).eval()
    draw_weights(predictor)
    save_frames(tmp_path, [f"{i:05d}.jpg" for i in range(4)])
    (tmp_path / "00002.jpg").write_bytes(b"no picture")
    with pytest.raises(OSError, match=r"00002\.jpg"):
        predictor.init_state(str(tmp_path))
    state = predictor.init_state(str(tmp_path), async_loading_frames=True)
    state["images"].thread.join()
    assert isinstance(state["images"].exception, OSError)
    predictor.add_new_points_or_box(state, 0, 1, points=[[10, 10]], labels=[1])
    seen = []
    with pytest.raises(OSError, match=r"00002\.jpg"):
        seen.extend(frame for frame, _, _ in predictor.propagate_in_video(state))
    assert list(state["frames_tracked_per_obj"][0]) == [0, 1]
    assert state["images"][3].shape == (3, TINY_2.image_size, TINY_2.image_size)


def test_a_video_file_is_read_with_pyav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    av = pytest.importorskip("av")
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(4):
            picture = np.full((48, 64, 3), 40 + 50 * index, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    for source in (str(path), path, path.read_bytes()):
        images, height, width = misc.load_video_frames(source, 32, True)
        assert (images.shape, images.dtype, height, width) == ((4, 3, 32, 32), torch.float32, 48, 64)
        levels = images * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1) + torch.tensor([0.485, 0.456, 0.406]).view(
            3, 1, 1
        )
        torch.testing.assert_close(255 * levels.flatten(1).mean(1), torch.tensor([40.0, 90, 140, 190]), atol=4, rtol=0)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(OSError, match=r"broken\.mp4"):
        misc.load_video_frames(str(tmp_path / "broken.mp4"), 32, True)


def test_without_pyav_its_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"fastsam-kernels\[video\]"):
        misc.load_video_frames(str(tmp_path / "clip.MP4"), 32, True)

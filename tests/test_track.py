"""``sam.track``: objects through frames that come one by one, in bounded memory."""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import TINY_2, draw_weights_that_see, randomise
from PIL import Image
from torch import Tensor

import sam
import sam.sam2.sam2_video_predictor as face
from benchmarks.official_sam2 import draw_weights
from benchmarks.official_sam2_video import start
from fastsam_kernels.numerics import relative_error
from sam import FrameResult, Prompt, TrackingSession
from sam.masks import rle
from sam.modeling.build import build_from_config, sam2_arguments
from sam.modeling.sam2_base import SAM2Base
from sam.sam2.sam2_video_predictor import SAM2VideoPredictor
from sam.sam2.utils.misc import load_video_frames
from sam.video.frames import open_frames

SMALL = replace(TINY_2, image_size=64)
HEIGHT, WIDTH = 45, 70
CLICK = Prompt([[15, 20]], [1])
BOX = Prompt(box=[30, 20, 55, 40])


@pytest.fixture(scope="module")
def model() -> SAM2Base:
    return draw_weights_that_see(build_from_config(SMALL))


def frames(count: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8) for _ in range(count)]


def logits(results: Any) -> list[Tensor]:
    return [result.low_res_logits for result in results]


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def test_results_are_those_of_the_predictor(model: SAM2Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the settings that it is built with: the memory of a prompted frame is made of its mask."""
    monkeypatch.setattr(face, "tqdm", lambda frames, desc: frames)
    predictor = SAM2VideoPredictor(**sam2_arguments(SMALL) | {"binarize_mask_from_pts_for_mem_enc": True}).eval()
    predictor.load_state_dict(model.state_dict())
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[10:30, 15:45] = True
    results = list(sam.track(model, frames(4), {0: {1: CLICK, "m": mask}, 2: {"late": BOX}}, fill_hole_area=0))
    state = start(predictor, torch.stack([frame.pixels for frame in open_frames(model, frames(4))[0]]))
    state["video_height"], state["video_width"] = HEIGHT, WIDTH
    predictor.add_new_points_or_box(state, 0, 1, points=[[15, 20]], labels=[1])
    predictor.add_new_mask(state, 0, "m", mask)
    truth = {frame: masks for frame, _, masks in predictor.propagate_in_video(state, max_frame_num_to_track=1)}
    predictor.add_new_points_or_box(state, 2, "late", box=[30, 20, 55, 40])
    truth |= {frame: masks for frame, _, masks in predictor.propagate_in_video(state, start_frame_idx=2)}
    assert [result.objects for result in results] == [(1, "m")] * 2 + [(1, "m", "late")] * 2
    for result in results:
        assert torch.equal(result.masks, truth[result.frame][:, 0] > 0)
        assert result.size == (HEIGHT, WIDTH)
        for row, mask in enumerate(result.masks.numpy()):
            assert (rle.decode(result.rles()[row]) == mask).all()
            rows, columns = np.nonzero(mask)
            assert result.boxes[row].tolist() == [columns.min(), rows.min(), columns.max(), rows.max()]
        assert result.predicted_iou.shape == result.object_scores.shape == (len(result.objects),)
        assert (result.object_scores > 0).all()


def without_forgetting(session: TrackingSession) -> TrackingSession:
    session._forget = lambda: None  # type: ignore[method-assign]
    return session


def bounded_is_unbounded(model: SAM2Base, count: int, stride: int = 1) -> None:
    model = copy.deepcopy(model)
    model.memory_temporal_stride_for_eval = stride
    sessions = TrackingSession(model), without_forgetting(TrackingSession(model))
    results: list[list[Tensor]] = [[], []]
    for found, session in zip(results, sessions, strict=True):
        session.add(1, CLICK)
        session.add("b", BOX, 3)
        for frame in frames(count):
            found.append(session.step(frame).low_res_logits)
            if session.frame == count - 3:
                corrected = session.add(1, Prompt([[50, 30]], [0]))
                assert corrected is not None
                found.append(corrected.low_res_logits)
    assert same(*results)
    kept, everything = (session._objects[1].outputs["non_cond_frame_outputs"] for session in sessions)
    assert len(everything) == count - 1
    reach = 6 if stride == 1 else 16  # from the frame of the furthest memory
    assert len(kept) == max(15, reach) + 1  # as many pointers, and the current frame
    assert sum("maskmem_features" in output for output in kept.values()) == reach + 1


def test_what_is_forgotten_is_not_needed(model: SAM2Base) -> None:
    bounded_is_unbounded(model, 20)


@pytest.mark.slow
@pytest.mark.parametrize("stride", [1, 3])
def test_what_is_forgotten_is_not_needed_over_64_frames(model: SAM2Base, stride: int) -> None:
    bounded_is_unbounded(model, 64, stride)


def test_one_memory_fewer_is_missed(model: SAM2Base) -> None:
    session, other = TrackingSession(model), TrackingSession(model)
    for each in (session, other):
        each.add(1, CLICK)
        for frame in frames(8):
            each.step(frame)
    outputs = session._objects[1].outputs["non_cond_frame_outputs"]
    outputs[2]["maskmem_features"] = torch.full_like(outputs[2]["maskmem_features"], torch.nan)
    assert session.step(frames(9)[8]).object_scores.isnan().all()
    assert (other.step(frames(9)[8]).object_scores > 0).all()


def test_objects_come_and_go_while_it_runs(model: SAM2Base) -> None:
    tracking = sam.track(model, iter(frames(6)))
    first = next(tracking)
    assert first.objects == ()
    assert first.masks.shape == (0, HEIGHT, WIDTH)
    added = tracking.session.add("a", CLICK)
    assert added is not None
    assert (added.frame, added.objects) == (0, ("a",))
    again = tracking.session.add("a", Prompt([[50, 30]], [0]))  # joins the first click
    assert again is not None
    assert relative_error(again.low_res_logits, added.low_res_logits) > 1e-3
    assert next(tracking).objects == ("a",)
    tracking.session.add("b", BOX, 3)
    assert [next(tracking).objects, next(tracking).objects] == [("a",), ("a", "b")]
    tracking.session.remove("a")
    assert [result.objects for result in tracking] == [("b",)] * 2
    with pytest.raises(KeyError, match="no object 'a'"):
        tracking.session.remove("a")


def test_a_correction_changes_what_follows(model: SAM2Base) -> None:
    def run(corrects: bool) -> list[Tensor]:
        tracking, found = sam.track(model, frames(4), {0: {1: CLICK}}), []
        for result in tracking:
            found.append(result.low_res_logits)
            if result.frame == 1 and corrects:
                answer = tracking.session.add(1, Prompt([[50, 30]], [0]))
                assert answer is not None
                assert relative_error(answer.low_res_logits, result.low_res_logits) > 1e-3
        return found

    plain, corrected = run(False), run(True)
    assert same(plain[:2], corrected[:2])
    assert relative_error(corrected[2], plain[2]) > 1e-4


def test_what_was_forgotten_cannot_be_asked_for(model: SAM2Base) -> None:
    session = TrackingSession(model, num_frames=4)
    for frame in frames(3):
        session.step(frame)
    with pytest.raises(
        LookupError, match="frame 1 cannot be prompted: the next one is 3, and frames that went by were"
    ):
        session.add(1, CLICK, 1)
    with pytest.raises(ValueError, match="frame 4 cannot be prompted: the video has frames 0 to 3"):
        session.add(1, CLICK, 4)
    session.step(frames(4)[3])
    with pytest.raises(IndexError, match="the video has 4 frames"):
        session.step(frames(1)[0])


def test_a_fork_goes_on_by_itself(model: SAM2Base) -> None:
    session = TrackingSession(model)
    with pytest.raises(LookupError, match="no frame has been tracked yet"):
        session.result()
    session.add_all({1: CLICK, 2: BOX}, 0)
    session.add("late", BOX, 2)
    clip, truth = frames(4), list(sam.track(model, iter(frames(4)), {0: {1: CLICK, 2: BOX}, 2: {"late": BOX}}))
    session.step(clip[0])
    fork = session.fork()
    fork.remove(1)
    fork.remove("late")
    fork.add(3, Prompt([[50, 30]], [1]))
    for frame in (3, 2, 1):  # others than the session's
        fork.step(clip[frame])
    assert (fork.frame, fork.objects) == (3, (2, 3))
    assert same([session.result().low_res_logits], [truth[0].low_res_logits])
    assert same([session.step(frame).low_res_logits for frame in clip[1:]], logits(truth[1:]))
    assert session.objects == (1, 2, "late")


def test_memory_that_is_shared_counts_once(model: SAM2Base) -> None:
    session = TrackingSession(model)
    assert session.nbytes == 0
    session.step(frames(1)[0])
    empty = session.nbytes
    assert empty >= sum(x.nbytes for x in session._features.tokens)  # type: ignore[union-attr]
    session.add(1, CLICK)
    grown = session.nbytes
    output = session._objects[1].outputs["cond_frame_outputs"][0]
    assert empty < grown
    output["again"] = output["maskmem_features"][0]
    assert session.nbytes == grown
    output["again"] = output["maskmem_features"].clone()
    assert session.nbytes == grown + output["again"].nbytes


def test_backwards(model: SAM2Base) -> None:
    """It is forwards on the mirrored clip, but for the numbers of the frames."""
    clip = frames(4)
    mirrored = list(sam.track(model, clip[::-1], {0: {1: CLICK}}))
    results = list(sam.track(model, clip, {3: {1: CLICK}}, reverse=True))
    assert [result.frame for result in results] == [3, 2, 1, 0]
    assert same(logits(results), logits(mirrored))
    with pytest.raises(ValueError, match="cannot be tracked backwards"):
        sam.track(model, iter(clip), {0: {1: CLICK}}, reverse=True)


def test_several_videos_are_one_batch(model: SAM2Base) -> None:
    clips = frames(5), frames(8)[5:]
    prompts: list[Any] = [{0: {1: CLICK}, 1: {"b": BOX}}, {0: {7: BOX}}]
    together = list(sam.track_together(model, clips, prompts))
    assert [len([result for result in results if result is not None]) for results in together] == [2, 2, 2, 1, 1]
    for index, (clip, of_clip) in enumerate(zip(clips, prompts, strict=True)):
        alone = list(sam.track(model, clip, of_clip))
        found = [results[index] for results in together if results[index] is not None]
        assert [result.objects for result in found] == [result.objects for result in alone]
        assert max(map(relative_error, logits(found), logits(alone))) <= 1e-3  # memories are of bf16
        assert relative_error(found[1].low_res_logits, alone[1].low_res_logits) <= 2e-5


def test_changed_parts_are_called_as_officially(model: SAM2Base) -> None:
    changed, calls = copy.deepcopy(model), []
    changed.memory_attention.register_forward_hook(lambda *_: calls.append(1))
    found = list(sam.track(changed, frames(3), {0: {1: CLICK, 2: BOX}}))
    truth = list(sam.track(model, frames(3), {0: {1: CLICK, 2: BOX}}))
    assert len(calls) == 4
    assert max(map(relative_error, logits(found), logits(truth))) <= 1e-3
    assert relative_error(found[2].predicted_iou, truth[2].predicted_iou) <= 1e-3


def test_a_session_goes_on_in_another_process(model: SAM2Base, tmp_path: Path) -> None:
    prompts = {0: {1: CLICK}, 1: {"b": BOX}, 3: {"c": np.eye(HEIGHT, WIDTH) > 0}}
    truth = list(sam.track(model, frames(5), prompts))
    tracking = sam.track(model, frames(5), prompts)
    list(itertools.islice(tracking, 2))
    sam.save_session(tracking.session, tmp_path / "state.pt")
    session = sam.load_session(tmp_path / "state.pt", copy.deepcopy(model))
    with pytest.raises(LookupError, match="frame 1 was not saved"):
        session.add(1, CLICK)
    assert same([session.step(frame).low_res_logits for frame in frames(5)[2:]], logits(truth[2:]))
    other = copy.deepcopy(model)
    randomise(other)
    with pytest.raises(ValueError, match="the session was made by model"):
        sam.load_session(tmp_path / "state.pt", other)
    (tmp_path / "torn.pt").write_bytes((tmp_path / "state.pt").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"torn\.pt is no saved session"):
        sam.load_session(tmp_path / "torn.pt", model)
    session.add((1, 2), BOX)
    with pytest.raises(ValueError, match=r"ids are text or whole numbers are saved, got \(1, 2\)"):
        sam.save_session(session, tmp_path / "state.pt")


def test_frames_come_from_folders_and_files(model: SAM2Base, tmp_path: Path) -> None:
    for index, image in enumerate(frames(3)):
        Image.fromarray(image).save(tmp_path / f"{index}.jpg", quality=100)
        Image.fromarray(image).save(tmp_path / f"{index}.png")
    arrays = list(sam.track(model, frames(3), {0: {1: CLICK}}))
    files = list(sam.track(model, [tmp_path / f"{index}.png" for index in range(3)], {0: {1: CLICK}}))
    folder, _ = open_frames(model, tmp_path)
    assert same(logits(files), logits(arrays))
    official = load_video_frames(str(tmp_path), SMALL.image_size, True)[0]
    for frame, pixels in zip(folder, official, strict=True):
        assert frame.size == (HEIGHT, WIDTH)
        assert relative_error(frame.pixels, pixels) <= 1e-6


def test_a_broken_frame_is_named_after_those_before_it(model: SAM2Base, tmp_path: Path) -> None:
    for index, image in enumerate(frames(3)):
        Image.fromarray(image).save(tmp_path / f"{index}.jpg")
    (tmp_path / "2.jpg").write_bytes(b"no picture")
    results: list[FrameResult] = []
    with pytest.raises(OSError, match=r"2\.jpg"):
        results.extend(sam.track(model, tmp_path, {0: {1: CLICK}}))
    tracking = sam.track(model, [*frames(2), "missing.png"], {0: {1: CLICK}})
    assert next(tracking).frame == 0
    assert next(tracking).frame == 1
    with pytest.raises(FileNotFoundError, match=r"frame 2: .*missing\.png"):
        next(tracking)


def test_frames_are_encoded_ahead_where_a_pass_takes_several(model: SAM2Base, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    encode = type(model).forward_image

    def noted(self: Any, images: Tensor) -> dict[str, Any]:
        passes.append(len(images))
        return encode(self, images)

    truth = list(sam.track(model, frames(5), {0: {1: CLICK}}))
    monkeypatch.setattr(SAM2Base, "forward_image", noted)
    tracking = sam.track(model, frames(5), {0: {1: CLICK}})
    tracking._per_pass = 3
    assert max(map(relative_error, logits(tracking), logits(truth))) <= 1e-3
    assert passes == [3, 2]


@pytest.mark.parametrize(
    ("error", "words", "prompt"),
    [
        (ValueError, "the prompt is empty", Prompt()),
        (ValueError, "not as mask_input", Prompt(box=[0, 0, 9, 9], mask_input=np.zeros((1, 16, 16)))),
        (TypeError, "a sam.Prompt or a mask", [[1, 2]]),
        (TypeError, r"got shape \[1, 45, 70\]", np.zeros((1, HEIGHT, WIDTH), bool)),
    ],
)
def test_bad_prompts_are_named(model: SAM2Base, error: type[Exception], words: str, prompt: Any) -> None:
    session = TrackingSession(model)
    with pytest.raises(error, match=words):
        session.add(1, prompt)
    assert session.step(frames(1)[0]).objects == ()
    with pytest.raises(error, match=words):
        session.add(1, prompt)
    assert session.objects == ()


def test_models_that_cannot_track_say_so(nano: Any, model: SAM2Base) -> None:
    with pytest.raises(TypeError, match="the embedded model and SAM do not track"):
        sam.track(nano, frames(1))
    with pytest.raises(TypeError, match="of images alone"):
        TrackingSession(build_from_config(replace(SMALL, has_memory=False)))
    with pytest.raises(ValueError, match="needs num_frames"):
        TrackingSession(model, reverse=True)
    with pytest.raises(ValueError, match="at least 0, got -1"):
        TrackingSession(model, fill_hole_area=-1)
    with pytest.raises(TypeError, match="frames must be"):
        sam.track(model, 7)


def test_holes_are_filled(model: SAM2Base) -> None:
    """Of 256 low-resolution pixels no hole is larger."""
    filled, plain = (logits(sam.track(model, frames(2), {0: {1: CLICK}}, fill_hole_area=area))[0] for area in (256, 0))
    assert (plain <= 0).any()
    assert torch.equal(filled, torch.where(plain > 0, plain, 0.1))


def endless() -> Iterator[np.ndarray]:
    clip = frames(8)
    while True:
        yield from clip


def resident() -> int:
    """Bytes of memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_a_stream_runs_in_constant_memory() -> None:
    """2,000 frames of the real tiny model at 256 px; an object that is added at frame 1,000 is tracked."""
    model = draw_weights(build_from_config(sam.SAM2_VARIANTS["sam2.1_tiny"].with_image_size(256)))
    tracking = sam.track(model, endless(), {0: {1: CLICK}})
    for result in itertools.islice(tracking, 2000):
        if result.frame == 50:
            before = resident()
        if result.frame == 1000:
            tracking.session.add(2, BOX)
    assert result.objects == (1, 2)
    assert resident() - before <= 20 * 2**20

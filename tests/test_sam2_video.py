"""Tracking with SAM 2: what users and programs do with a predictor of videos and a state."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import warnings
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from models import TINY_2, draw_weights_that_see
from torch import Tensor

import sam.sam2.sam2_video_predictor as face
from benchmarks.official_sam2_video import HEIGHT, WIDTH, clip, start
from fastsam_kernels.numerics import relative_error
from sam.modeling.build import sam2_arguments
from sam.sam2.sam2_video_predictor import SAM2VideoPredictor
from sam.sam2.utils import misc

CLICK = {"points": [[30, 40]], "labels": [1]}
FRAMES, SIZE = 5, TINY_2.image_size


@pytest.fixture(autouse=True)
def _without_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(face, "tqdm", lambda frames, desc: frames)
    monkeypatch.setattr(misc, "tqdm", lambda frames, desc: frames)


@pytest.fixture(scope="module")
def built() -> SAM2VideoPredictor:
    return draw_weights_that_see(SAM2VideoPredictor(**sam2_arguments(TINY_2)).eval())


@pytest.fixture
def predictor(built: SAM2VideoPredictor, monkeypatch: pytest.MonkeyPatch) -> SAM2VideoPredictor:
    for name in ("add_all_frames_to_correct_as_cond", "clear_non_cond_mem_around_input", "non_overlap_masks"):
        monkeypatch.setattr(built, name, False)
    return built


def begin(predictor: Any, frames: int = FRAMES) -> dict[str, Any]:
    return start(predictor, clip(predictor.image_size, frames))


def track(predictor: Any, state: dict[str, Any], **kwargs: Any) -> dict[int, Tensor]:
    return {frame: masks for frame, _, masks in predictor.propagate_in_video(state, **kwargs)}


def clicked(predictor: Any, frames: int = FRAMES) -> dict[str, Any]:
    state = begin(predictor, frames)
    predictor.add_new_points_or_box(state, 0, 1, **CLICK)
    return state


def apart(found: dict[int, Tensor], truth: dict[int, Tensor]) -> float:
    assert list(found) == list(truth)
    return max(relative_error(found[frame], truth[frame]) for frame in truth)


def test_the_state_is_the_official_dictionary(predictor: SAM2VideoPredictor) -> None:
    state = clicked(predictor)
    assert list(state) == [
        *("images", "num_frames", "offload_video_to_cpu", "offload_state_to_cpu", "video_height", "video_width"),
        *("device", "storage_device", "point_inputs_per_obj", "mask_inputs_per_obj", "cached_features", "constants"),
        *("obj_id_to_idx", "obj_idx_to_id", "obj_ids", "output_dict_per_obj", "temp_output_dict_per_obj"),
        "frames_tracked_per_obj",
    ]
    image, features = state["cached_features"][0]
    assert image.shape == (1, 3, SIZE, SIZE)
    assert [len(features[name]) for name in ("vision_pos_enc", "backbone_fpn")] == [3, 3]
    assert state["point_inputs_per_obj"][0][0]["point_labels"].tolist() == [[1]]
    masks = track(predictor, state)
    assert all(x.shape == (1, 1, HEIGHT, WIDTH) and x.dtype == torch.float32 for x in masks.values())
    kept = state["output_dict_per_obj"][0]
    assert [list(kept[kind]) for kind in kept] == [[0], [1, 2, 3, 4]]
    output = kept["non_cond_frame_outputs"][2]
    assert list(output) == ["maskmem_features", "maskmem_pos_enc", "pred_masks", "obj_ptr", "object_score_logits"]
    assert output["maskmem_features"].dtype == torch.bfloat16
    assert state["frames_tracked_per_obj"][0][3] == {"reverse": False}
    for value in (pickle.dumps(state), pickle.dumps(predictor)):
        pickle.loads(value)
    torch.save(state, io.BytesIO())
    assert apart(track(copy.deepcopy(predictor), clicked(predictor)), masks) == 0


def test_states_that_callers_make_and_edit(predictor: SAM2VideoPredictor) -> None:
    positions: list[Tensor] = []  # of the pointers, per tracked frame

    def take_down(_: object, __: object, options: dict[str, Any]) -> None:
        positions.append(options["memory_pos"][-options["num_obj_ptr_tokens"] :])

    hook = predictor.memory_attention.register_forward_pre_hook(take_down, with_kwargs=True)
    truth = track(predictor, clicked(predictor))  # by the official calls, as there is a hook
    of_truth = positions.pop(0)
    positions.clear()
    state = begin(predictor)
    for name in ("offload_video_to_cpu", "offload_state_to_cpu", "frames_tracked_per_obj"):
        del state[name]  # as in states for the first release
    images = list(state["images"])
    state["images"], state["num_frames"], state["output_dict"] = images[:1], 1, {}
    predictor.add_new_points_or_box(state, 0, 1, **CLICK)
    found = {}
    for frame in range(FRAMES):  # a frame arrives, and is tracked
        if frame:
            state["images"].append(images[frame].double().numpy())
            state["num_frames"] += 1
        found |= track(predictor, state, start_frame_idx=frame, max_frame_num_to_track=0)
    assert list(found) == list(truth)
    assert torch.equal(found[0], truth[0])
    assert not torch.equal(found[1], truth[1])
    assert relative_error(positions[0], of_truth) > 0.1  # pointers are timed by the length of the clip
    hook.remove()
    truth, state = track(predictor, clicked(predictor)), clicked(predictor)
    store = type("Store", (dict,), {})
    state["output_dict_per_obj"][0] = {name: store() for name in state["output_dict_per_obj"][0]}
    assert apart(track(predictor, state), truth) == 0


def test_objects_do_not_see_each_other(predictor: SAM2VideoPredictor) -> None:
    """One prompted later than another, in fp32, is as if it were alone; so is the one before it."""
    state = clicked(predictor)
    predictor.add_new_points_or_box(state, 2, "late", box=[60, 40, 110, 80])
    found = track(predictor, state)
    assert state["obj_ids"] == [1, "late"]
    assert apart({t: x[:1] for t, x in found.items()}, track(predictor, clicked(predictor))) < 1e-6
    alone = begin(predictor)
    predictor.add_new_points_or_box(alone, 2, "late", box=[60, 40, 110, 80])
    assert apart({t: x[1:] for t, x in found.items()}, track(predictor, alone, start_frame_idx=0)) < 1e-6


def test_backwards_is_forwards_on_the_mirrored_clip(predictor: SAM2VideoPredictor) -> None:
    def both(images: Tensor, frame: int, reverse: bool) -> list[dict[int, Tensor]]:
        state = start(predictor, images)
        predictor.add_new_points_or_box(state, frame, 1, **CLICK)
        passes = (reverse, not reverse)
        return [track(predictor, state, start_frame_idx=frame, reverse=side) for side in passes]

    images = clip(SIZE, FRAMES)
    mirrored = both(images.flip(0), FRAMES - 2, False)
    for ours, theirs in zip(both(images, 1, True), mirrored, strict=True):
        assert apart(ours, {FRAMES - 1 - frame: x for frame, x in theirs.items()}) < 1e-5


def test_a_pass_in_pieces_is_one_pass(predictor: SAM2VideoPredictor) -> None:
    truth, state, found = track(predictor, clicked(predictor)), clicked(predictor), {}
    for frame, _, masks in predictor.propagate_in_video(state):
        found[frame] = masks
        if frame == 1:
            break
    found |= track(predictor, state, start_frame_idx=2, max_frame_num_to_track=0)
    found |= track(predictor, state, start_frame_idx=3)
    assert apart(found, truth) < 1e-6
    assert track(predictor, state, start_frame_idx=0, reverse=True) == {}


def test_an_object_is_removed_while_a_pass_runs(predictor: SAM2VideoPredictor) -> None:
    truth, state, found = track(predictor, clicked(predictor)), begin(predictor), {}
    predictor.add_new_points_or_box(state, 0, "leaves", box=[60, 40, 110, 80])
    predictor.add_new_points_or_box(state, 0, 1, **CLICK)
    handed_out = []
    for frame, ids, masks in predictor.propagate_in_video(state):
        found[frame] = masks[-1:]
        handed_out.append(ids)
        if frame == 2:
            remaining, updated = predictor.remove_object(state, "leaves")
            assert remaining == [1]
            assert [(t, x.shape) for t, x in updated] == [(0, (1, 1, HEIGHT, WIDTH))]
    assert handed_out == [["leaves", 1]] * 3 + [[1]] * 2
    assert apart(found, truth) < 1e-6
    assert predictor.remove_object(state, "unknown") == ([1], [])
    with pytest.raises(RuntimeError, match="'unknown'"):
        predictor.remove_object(state, "unknown", strict=True)
    predictor.reset_state(state)
    assert handed_out[-1] == [1]  # what was handed out is the caller's
    assert state["obj_ids"] == []
    with pytest.raises(RuntimeError, match="No input points"):
        track(predictor, state)


@pytest.mark.parametrize(
    ("error", "words", "arguments"),
    [
        (ValueError, "labels", {"points": [[30, 40]]}),
        (ValueError, "points or box", {}),
        (ValueError, "clear_old_points", {"box": [5, 5, 50, 50], "clear_old_points": False}),
        (ValueError, "labels must be one per point", {"points": [[30, 40], [50, 50]], "labels": [1]}),
        (ValueError, "box must be", {"box": [[5, 5, 50, 50], [5, 5, 60, 60]]}),
        (ValueError, "points must", {"points": [[float("nan"), 40]], "labels": [1]}),
        (ValueError, "labels must be", {"points": [[30, 40]], "labels": [7]}),
        (ValueError, "frame_idx must be", {**CLICK, "frame_idx": FRAMES}),
        (TypeError, "integer", {**CLICK, "frame_idx": 0.5}),
    ],
)
def test_a_refused_prompt_leaves_the_state_as_it_was(
    predictor: SAM2VideoPredictor, error: type[Exception], words: str, arguments: dict[str, Any]
) -> None:
    state = begin(predictor)
    with pytest.raises(error, match=words):
        predictor.add_new_points_or_box(state, **{"frame_idx": 0, "obj_id": 2, **arguments})
    assert (state["obj_ids"], state["output_dict_per_obj"]) == ([], {})


def test_a_frame_that_fails_leaves_no_object(predictor: SAM2VideoPredictor) -> None:
    state = begin(predictor)
    state["images"] = {0: state["images"][0]}
    with pytest.raises(KeyError):
        predictor.add_new_points_or_box(state, 3, 2, **CLICK)
    assert (state["obj_ids"], state["output_dict_per_obj"]) == ([], {})
    assert predictor.clear_all_prompts_in_frame(state, 0, "unknown")[1] == []
    assert state["obj_ids"] == []


def test_a_correction_is_kept_or_the_flag_that_keeps_it_named(
    predictor: SAM2VideoPredictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def corrected() -> tuple[Tensor, dict[int, Tensor]]:
        state = clicked(predictor)
        track(predictor, state)
        answer = predictor.add_new_points_or_box(state, 2, 1, points=[[100, 20], [40, 60]], labels=[0, 1])
        return answer[2], track(predictor, state)

    before = track(predictor, clicked(predictor))
    with pytest.warns(UserWarning, match="add_all_frames_to_correct_as_cond"):
        answer, after = corrected()
    assert relative_error(answer, before[2]) > 1e-3
    assert apart(after, before) < 1e-6
    monkeypatch.setattr(predictor, "add_all_frames_to_correct_as_cond", True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answer, after = corrected()
    assert torch.equal(after[2], answer)
    assert min(relative_error(after[frame], before[frame]) for frame in (1, 3, 4)) > 1e-4


def test_memories_around_a_prompt_are_forgotten(predictor: SAM2VideoPredictor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictor, "add_all_frames_to_correct_as_cond", True)

    def corrected(by_hand: bool) -> dict[int, Tensor]:
        state = clicked(predictor)
        track(predictor, state)
        predictor.add_new_points_or_box(state, 2, 1, points=[[100, 20]], labels=[0])
        if by_hand:
            state["output_dict_per_obj"][0]["non_cond_frame_outputs"].clear()
        return track(predictor, state, start_frame_idx=2)

    kept, forgotten = corrected(False), corrected(True)
    monkeypatch.setattr(predictor, "clear_non_cond_mem_around_input", True)
    found = corrected(False)
    assert apart(found, forgotten) < 1e-6
    assert apart(kept, forgotten) > 1e-4


def test_a_clip_of_one_frame(predictor: SAM2VideoPredictor) -> None:
    def refined(frames: int) -> Tensor:
        state = clicked(predictor, frames)
        assert list(track(predictor, state, max_frame_num_to_track=0)) == [0]
        more = {"points": [[100, 20]], "labels": [0], "clear_old_points": False}
        return predictor.add_new_points_or_box(state, 0, 1, **more)[2]

    assert relative_error(refined(1), refined(2)) < 1e-6


def test_a_mask_is_the_same_in_every_form(predictor: SAM2VideoPredictor) -> None:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[20:60, 30:90] = True
    forms = [mask, mask.astype(np.uint8) * 255, mask[::-1, ::-1][::-1, ::-1], torch.tensor(mask)]
    forms += [torch.tensor(mask).float(), torch.tensor(mask).byte() * 255, torch.tensor(mask) * 255.0]
    state = begin(predictor)
    given = [predictor.add_new_mask(state, 0, 1, form)[2] for form in forms]
    assert all(torch.equal(answer, given[0]) for answer in given)
    assert 0.9 < float((given[0] > 0).sum()) / mask.sum() < 1.1
    with pytest.raises(ValueError, match=r"mask must be \[H, W\]"):
        predictor.add_new_mask(state, 0, 2, mask[None])
    assert state["obj_ids"] == [1]


def test_answers_are_ordinary_tensors(predictor: SAM2VideoPredictor) -> None:
    state = begin(predictor)
    state["video_height"] = state["video_width"] = SIZE // 4  # nothing is resized
    first = predictor.add_new_points_or_box(state, 0, 1, **CLICK)[2]
    tracked = track(predictor, state)
    for masks in (first, *tracked.values()):
        weight = torch.ones(1, requires_grad=True)
        (masks * weight).sum().backward()
        masks[:] = 7  # in place
    assert not any(
        (x["pred_masks"] == 7).any() for x in state["output_dict_per_obj"][0]["non_cond_frame_outputs"].values()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_narrow_weights_track(predictor: SAM2VideoPredictor, dtype: torch.dtype) -> None:
    truth = track(predictor, clicked(predictor, 3))
    found = track(copy.deepcopy(predictor).to(dtype), clicked(copy.deepcopy(predictor).to(dtype), 3))
    assert apart(found, truth) < 0.2
    assert found[2].dtype == torch.float32


def test_autocast_is_that_of_the_call(predictor: SAM2VideoPredictor) -> None:
    state, truth = clicked(predictor, 3), track(predictor, clicked(predictor, 3))
    running = predictor.propagate_in_video(state)
    next(running)
    with torch.autocast("cpu", torch.bfloat16):
        masks = next(running)[2]
    outputs = state["output_dict_per_obj"][0]["non_cond_frame_outputs"]
    assert (masks.dtype, outputs[1]["object_score_logits"].dtype) == (torch.float32, torch.bfloat16)
    assert 1e-5 < relative_error(masks, truth[1]) < 0.2
    assert next(running)[2].dtype == torch.float32
    assert outputs[2]["object_score_logits"].dtype == torch.float32


def test_two_videos_in_two_threads(predictor: SAM2VideoPredictor) -> None:
    truth, found = track(predictor, clicked(predictor)), {}
    states = [clicked(predictor), clicked(predictor)]
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: track(predictor, states[i])}))  # type: ignore[misc]
        for i in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    turns = zip(*(predictor.propagate_in_video(clicked(predictor)) for _ in range(2)), strict=True)
    by_turns = [{t: x for t, _, x in frames} for frames in zip(*turns, strict=True)]
    assert [apart(masks, truth) for masks in (*found.values(), *by_turns)] == [0.0] * 4


def test_programs_patch_what_a_frame_calls(predictor: SAM2VideoPredictor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Per tracked frame and object the official calls with their official arguments."""
    calls: list[tuple[str, int, tuple[str, ...]]] = []

    def noted(name: str) -> None:
        method = getattr(predictor, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append((name, len(args), tuple(kwargs)))
            return method(*args, **kwargs)

        monkeypatch.setattr(predictor, name, call)

    state = clicked(predictor, 2)
    predictor.propagate_in_video_preflight(state)
    official = {
        "_run_single_frame_inference": (0, 9),
        "_get_image_feature": (3, 0),
        "forward_image": (1, 0),
        "track_step": (0, 12),
        "_track_step": (11, 0),
        "_prepare_memory_conditioned_features": (0, 8),
        "_forward_sam_heads": (0, 5),
        "_encode_memory_in_output": (7, 0),
        "_encode_new_memory": (0, 5),
        "_get_maskmem_pos_enc": (2, 0),
        "_get_orig_video_res_output": (2, 0),
    }
    for name in official:
        noted(name)
    bars: list[str] = []
    with mock.patch.object(face, "tqdm", lambda frames, desc: (bars.append(desc), frames)[1]):
        track(predictor, state, start_frame_idx=1)
    assert {name: (count, len(names)) for name, count, names in calls} == official
    assert [name for name, _, _ in calls] == list(official)
    assert bars == ["propagate in video"]


def test_masks_that_do_not_overlap(predictor: SAM2VideoPredictor, monkeypatch: pytest.MonkeyPatch) -> None:
    def both() -> Tensor:
        state = clicked(predictor, 2)
        predictor.add_new_points_or_box(state, 0, 2, points=[[32, 42]], labels=[1])
        return track(predictor, state)[1]

    free = both()
    monkeypatch.setattr(predictor, "non_overlap_masks", True)
    apart = both()
    best = free == free.amax(dim=0)
    assert ((free > 0).sum(dim=0) == 2).any()
    assert torch.equal(apart[best], free[best])
    assert (apart[~best] <= -10).all()


def test_what_is_compiled_gives_tensors_of_its_own(
    predictor: SAM2VideoPredictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    compiled = face.SAM2VideoPredictorVOS(**sam2_arguments(TINY_2)).eval()
    compiled.load_state_dict(predictor.state_dict())
    assert apart(track(compiled, clicked(compiled, 3)), track(predictor, clicked(predictor, 3))) < 1e-4

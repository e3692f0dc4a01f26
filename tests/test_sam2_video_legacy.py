"""The first release's predictor of videos: what it lets programs do, and where its state keeps what."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from models import SMALL_2, draw_weights_that_see
from test_sam2_build import SMALL

import sam.sam2.sam2_video_predictor_legacy as face
from benchmarks.official_sam2_video import clip, start
from sam.modeling.build import sam2_arguments
from sam.sam2.build_sam import build_sam2_video_predictor

CLICK = {"points": [[30, 40]], "labels": [1]}


@pytest.fixture(scope="module")
def predictor() -> face.SAM2VideoPredictor:
    return draw_weights_that_see(face.SAM2VideoPredictor(**sam2_arguments(SMALL_2)).eval())


@pytest.fixture
def state(predictor: face.SAM2VideoPredictor, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Of two objects, prompted on the first frame."""
    monkeypatch.setattr(face, "tqdm", lambda frames, desc: frames)
    state = start(predictor, clip(predictor.image_size, 4))
    for obj_id in ("a", "b"):
        predictor.add_new_points_or_box(state, 0, obj_id, **CLICK)
    return state


def test_the_state_is_the_official_dictionary(predictor: face.SAM2VideoPredictor, state: dict[str, Any]) -> None:
    assert list(state) == [
        *("images", "num_frames", "offload_video_to_cpu", "offload_state_to_cpu", "video_height", "video_width"),
        *("device", "storage_device", "point_inputs_per_obj", "mask_inputs_per_obj", "cached_features", "constants"),
        *("obj_id_to_idx", "obj_idx_to_id", "obj_ids", "output_dict", "output_dict_per_obj"),
        *("temp_output_dict_per_obj", "consolidated_frame_inds", "tracking_has_started", "frames_already_tracked"),
    ]
    for _ in predictor.propagate_in_video(state):
        pass
    assert state["frames_already_tracked"] == {frame: {"reverse": False} for frame in range(4)}
    assert state["consolidated_frame_inds"] == {"cond_frame_outputs": {0}, "non_cond_frame_outputs": set()}
    output, own = (x["non_cond_frame_outputs"][2] for x in (state["output_dict"], state["output_dict_per_obj"][1]))
    assert list(own) == list(output)
    for name in ("maskmem_features", "pred_masks", "obj_ptr", "object_score_logits"):
        assert own[name].data_ptr() == output[name][1:].data_ptr()
        assert (len(own[name]), len(output[name])) == (1, 2)


def test_no_object_is_added_after_tracking_began(predictor: face.SAM2VideoPredictor, state: dict[str, Any]) -> None:
    next(predictor.propagate_in_video(state))
    with pytest.raises(RuntimeError, match=r"new object id c after tracking .* \['a', 'b'\]; call 'reset_state'"):
        predictor.add_new_points_or_box(state, 2, "c", **CLICK)
    assert state["obj_ids"] == ["a", "b"]
    predictor.reset_state(state)
    assert predictor.add_new_points_or_box(state, 2, "c", **CLICK)[1] == ["c"]


def test_a_box_after_tracking_began_is_taken_with_a_warning(
    predictor: face.SAM2VideoPredictor, state: dict[str, Any]
) -> None:
    """Before it, and of points, there is none; the next video begins without."""
    box = [20, 20, 60, 70]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predictor.add_new_points_or_box(state, 0, "a", box=box)
        next(predictor.propagate_in_video(state))
        before = predictor.add_new_points_or_box(state, 2, "a", **CLICK)[2]
    with pytest.warns(UserWarning, match=r"a box for object 'a' after tracking began .* 'reset_state'") as warned:
        after = predictor.add_new_points_or_box(state, 2, "a", box=box)[2]
    assert warned[0].filename == __file__
    assert not torch.equal(after[0], before[0])
    with pytest.warns(UserWarning, match="a box for object 'b'"):
        predictor.add_new_points(state, 0, "b", [[30, 40]], [1], box=torch.tensor(box))
    predictor.reset_state(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predictor.add_new_points_or_box(state, 0, "b", box=box)


def test_without_a_prompt_left_nothing_is_tracked(predictor: face.SAM2VideoPredictor, state: dict[str, Any]) -> None:
    for _ in predictor.propagate_in_video(state):
        pass
    predictor.clear_all_prompts_in_frame(state, 0, "a")
    assert list(state["output_dict"]["cond_frame_outputs"]) == [0]
    masks = predictor.clear_all_prompts_in_frame(state, 0, "b")[2]
    assert (masks == -1024).all()
    assert state["output_dict"] == {"cond_frame_outputs": {}, "non_cond_frame_outputs": {}}
    assert not state["tracking_has_started"]
    with pytest.raises(RuntimeError, match="No points are provided"):
        next(predictor.propagate_in_video(state))


def test_prompts_forget_for_a_lone_object_unless_told(
    predictor: face.SAM2VideoPredictor, state: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictor, "clear_non_cond_mem_around_input", True)
    monkeypatch.setattr(predictor, "add_all_frames_to_correct_as_cond", True)
    kept = []
    for several in (False, True):
        monkeypatch.setattr(predictor, "clear_non_cond_mem_for_multi_obj", several)
        for _ in predictor.propagate_in_video(state):
            pass
        predictor.add_new_points_or_box(state, 2, "a", **CLICK)
        predictor.propagate_in_video_preflight(state)
        kept.append(list(state["output_dict"]["non_cond_frame_outputs"]))
    assert kept == [[1, 3], []]


def test_configs_name_it() -> None:
    target = "++model._target_=sam2.sam2_video_predictor_legacy.SAM2VideoPredictor"
    overrides = [*SMALL, target, "++model.clear_non_cond_mem_for_multi_obj=true"]
    built: Any = build_sam2_video_predictor("sam2.1_hiera_t", device="cpu", hydra_overrides_extra=overrides)
    assert type(built) is face.SAM2VideoPredictor
    assert built.clear_non_cond_mem_for_multi_obj
    assert torch.is_tensor(built.no_mem_embed)

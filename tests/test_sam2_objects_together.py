"""Objects of a video tracked together and fused, against the official calls one by one."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import TINY_2, draw_weights_that_see
from test_sam2_video import CLICK, _without_bars, apart, begin, clicked, track
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import sam.video.frame_steps as steps
from fastsam_kernels.memory_attention.api import MEMORY_ATTENTION
from fastsam_kernels.numerics import Budget, relative_error
from sam.modeling.build import sam2_arguments
from sam.sam2.sam2_video_predictor import SAM2VideoPredictor
from sam.system import device_profile
from sam.video.object_batch import why_not_batched

__all__ = ["_without_bars"]
_KEPT = ("maskmem_features", "pred_masks", "obj_ptr", "object_score_logits")


@pytest.fixture(scope="module")
def predictor() -> SAM2VideoPredictor:
    return draw_weights_that_see(SAM2VideoPredictor(**sam2_arguments(TINY_2)).eval())


def by_modules(predictor: SAM2VideoPredictor) -> SAM2VideoPredictor:
    stock = copy.deepcopy(predictor)
    stock.kernels = "reference"
    return stock


def several(predictor: Any, frames: int = 5) -> dict[str, Any]:
    """A state with an object of one click, one that begins later, and one of a mask."""
    state = clicked(predictor, frames)
    predictor.add_new_points_or_box(state, 1, "late", box=[60, 40, 110, 80])
    mask = torch.zeros(90, 140, dtype=torch.bool)
    mask[20:60, 30:90] = True
    predictor.add_new_mask(state, 0, "given", mask)
    return state


@contextmanager
def wide_memories(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep memories as they were made: what bf16 rounds either way would hide all else."""

    def stored(self: Any, state: Any, memory: Tensor | None) -> Tensor | None:
        return None if memory is None else memory.to(state["storage_device"])

    with monkeypatch.context() as patch:
        patch.setattr(steps.FrameSteps, "_stored", stored)
        patch.setitem(steps._CALLS._functions, "_stored", stored)
        yield


@pytest.mark.parametrize("absent", [False, True])
def test_together_is_one_by_one(predictor: SAM2VideoPredictor, absent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if absent:  # some of them
        predictor = copy.deepcopy(predictor)
        predictor.get_parameter("sam_mask_decoder.pred_obj_score_head.layers.2.bias").sub_(4)
    assert why_not_batched(predictor) is None
    stock = by_modules(predictor)
    runs, states = [], []
    with wide_memories(monkeypatch):
        for each in (predictor, stock, copy.deepcopy(stock).double()):
            states.append(several(each))
            runs.append(track(each, states[-1], start_frame_idx=0))
    assert list(runs[0]) == list(runs[1]) == list(runs[2])
    # Of the video as a whole: what a frame's memories round to is drawn anew on each, and on each CPU.
    whole, official, exact = (torch.stack(list(run.values())) for run in runs)
    assert relative_error(whole, exact) <= Budget(relative_error(official, exact), torch.float32).limit
    seen = set()
    for index in range(3):
        outputs = [state["output_dict_per_obj"][index]["non_cond_frame_outputs"] for state in states]
        assert list(outputs[0]) == list(outputs[1])
        for found, official in zip(outputs[0].values(), outputs[1].values(), strict=True):
            assert list(found) == list(official)
            assert all(found[name].shape == official[name].shape for name in _KEPT)
            assert all(found[name].dtype == official[name].dtype for name in _KEPT)
            assert max(relative_error(found[name], official[name]) for name in _KEPT) <= 1e-3
            assert torch.equal(found["maskmem_pos_enc"][0], official["maskmem_pos_enc"][0])
            seen.add(bool(found["object_score_logits"] > 0))
    assert True in seen
    assert (False in seen) == absent


def test_memories_of_bf16_are_where_the_difference_comes_from(
    predictor: SAM2VideoPredictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = apart(track(predictor, clicked(predictor)), track(by_modules(predictor), clicked(by_modules(predictor))))
    with wide_memories(monkeypatch):
        wide = apart(track(predictor, clicked(predictor)), track(by_modules(predictor), clicked(by_modules(predictor))))
    assert wide < kept / 3


class _Calls(TorchDispatchMode):
    """Counts what is no view; an operation of ours is one, as its kernel is."""

    VIEWS = (
        *("view", "reshape", "permute", "transpose", "t", "expand", "unsqueeze", "squeeze", "slice", "select", "alias"),
        *("as_strided", "detach", "unbind", "split", "_unsafe_view", "unflatten", "lift_fresh", "empty", "empty_like"),
        *("new_empty", "_local_scalar_dense", "view_as_complex", "view_as_real", "promote_types"),
    )

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.inside = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[-1].split(".")[0]
        if name not in self.VIEWS and not self.inside:
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


def calls_of_a_frame(predictor: Any, objects: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """What a tracked frame calls beyond its image encoder."""
    state = begin(predictor)
    for index in range(objects):
        predictor.add_new_points_or_box(state, 0, index, **CLICK)
    track(predictor, state, max_frame_num_to_track=2)
    predictor._get_image_feature(state, 3, 1)
    calls, run = _Calls(), type(MEMORY_ATTENTION).run

    def one(self: Any, *arguments: Any) -> Any:
        calls.names[self.name] += not calls.inside
        calls.inside += 1
        try:
            return run(self, *arguments)
        finally:
            calls.inside -= 1

    with monkeypatch.context() as patch, calls, torch.no_grad():
        patch.setattr(type(MEMORY_ATTENTION), "run", one)
        predictor._track_objects(state, list(range(objects)), 3, False)
    return calls.names.total()


def test_few_calls(predictor: SAM2VideoPredictor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of the 920 of Meta's package for a frame of one object, and little more for each other on a GPU."""
    monkeypatch.setattr(device_profile, "_CPU", replace(device_profile._CPU, objects_per_chunk=64))
    one, two, four = (calls_of_a_frame(predictor, objects, monkeypatch) for objects in (1, 2, 4))
    assert one <= 230
    assert four - two <= 2 * 45
    assert calls_of_a_frame(by_modules(predictor), 1, monkeypatch) > 1.5 * one


CHANGES = {
    "obj_ptr_proj": lambda p: p.obj_ptr_proj.layers[0].register_forward_hook(lambda *_: None),
    "memory_encoder.fuser": lambda p: p.memory_encoder.fuser.layers[1].register_forward_hook(lambda *_: None),
    "_forward_sam_heads": lambda p: setattr(p, "_forward_sam_heads", p._forward_sam_heads),
    "mask_decoder.iou": lambda p: p.sam_mask_decoder.iou_prediction_head.register_forward_pre_hook(lambda *_: None),
    "training": lambda p: p.train(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_keeps_objects_apart_is_named(predictor: SAM2VideoPredictor, name: str) -> None:
    changed = copy.deepcopy(predictor)
    CHANGES[name](changed)
    reason = why_not_batched(changed)
    assert reason is not None
    assert name in reason

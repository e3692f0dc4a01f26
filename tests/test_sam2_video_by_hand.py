"""Programs that call the steps of SAM 2's tracking by hand, train or export them, or build a predictor of their own."""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from comparison import assert_close_l2
from models import randomise
from test_sam2_build import SMALL
from test_sam2_video import _without_bars, apart, clicked, track
from test_sam2_video_parts import by_official_calls
from test_sam2_video_programs import CLICK, FRAMES, KINDS, SIZE, built, predictor, truth
from torch import Tensor, nn

import sam.sam2.sam2_video_predictor as face
from benchmarks.official_sam2_video import HEIGHT, WIDTH, clip
from fastsam_kernels.numerics import relative_error
from sam.modeling.sam2_base import SAM2Base
from sam.sam2 import build_sam
from sam.sam2.modeling.sam2_utils import get_next_point
from sam.sam2.sam2_video_predictor import SAM2VideoPredictor
from sam.sam2.utils import misc

__all__ = ["_without_bars", "built", "predictor", "truth"]


# Trackers without a state ----------------------------------------------------------------------------------------


def steps_by_hand(model: Any, images: Tensor, kept: int) -> Iterator[dict[str, Any]]:
    """Track as servers do that keep of each object what ``track_step`` reads, and nothing else between requests."""
    scale = torch.tensor([SIZE / WIDTH, SIZE / HEIGHT])
    click = {"point_coords": torch.tensor([[[30.0, 40.0]]]) * scale, "point_labels": torch.tensor([[1]])}
    memory: dict[str, dict[int, Any]] = {}
    for frame, image in enumerate(images):
        encoded = model.forward_image(image[None])
        maps = encoded["backbone_fpn"][-model.num_feature_levels :]
        positions = encoded["vision_pos_enc"][-model.num_feature_levels :]
        output = model.track_step(
            frame_idx=frame,
            is_init_cond_frame=frame == 0,
            current_vision_feats=[x.flatten(2).permute(2, 0, 1) for x in maps],
            current_vision_pos_embeds=[x.flatten(2).permute(2, 0, 1) for x in positions],
            feat_sizes=[x.shape[-2:] for x in positions],
            point_inputs=click if frame == 0 else None,
            mask_inputs=None,
            output_dict=memory,
            num_frames=len(images),
            track_in_reverse=False,
            run_mem_encoder=True,
            prev_sam_mask_logits=None,
        )
        yield output
        memory = memory or {kind: {} for kind in KINDS}
        own = {name: output[name] for name in ("maskmem_features", "maskmem_pos_enc", "obj_ptr")}
        memory[KINDS[frame > 0]][frame] = own | {"maskmem_features": own["maskmem_features"].bfloat16()}
        memory[KINDS[1]].pop(frame - kept, None)


@torch.no_grad()
def test_a_tracker_that_keeps_seven_frames(predictor: SAM2VideoPredictor, truth: dict[int, Tensor]) -> None:
    found = {}
    for frame, output in enumerate(steps_by_hand(predictor, clip(SIZE, FRAMES), 7)):
        assert list(output) == [
            *("point_inputs", "mask_inputs", "pred_masks", "pred_masks_high_res", "obj_ptr", "object_score_logits"),
            *("maskmem_features", "maskmem_pos_enc"),
        ]
        assert output["maskmem_features"].dtype == torch.float32
        state = {"device": predictor.device, "video_height": HEIGHT, "video_width": WIDTH}
        found[frame] = predictor._get_orig_video_res_output(state, output["pred_masks"])[1]
        filled = misc.fill_holes_in_mask_scores(output["pred_masks"], 8)
        assert (filled[filled != output["pred_masks"]] == 0.1).all()
    assert apart(found, truth) < 1e-3


# Training and export ---------------------------------------------------------------------------------------------


def test_steps_by_hand_are_trained(predictor: SAM2VideoPredictor) -> None:
    """After a use in inference mode; a step is there for the next frame that is tracked."""
    with torch.inference_mode():
        before = track(predictor, clicked(predictor))
    predictor.requires_grad_(True)
    outputs = list(steps_by_hand(predictor, clip(SIZE, 3), 7))
    loss = sum(output[name].square().mean() for output in outputs for name in ("pred_masks", "obj_ptr"))
    loss.backward()  # type: ignore[union-attr]
    reached = {name for name, weight in predictor.named_parameters() if weight.grad is not None}
    parts = ("trunk.patch_embed", "trunk.blocks.6", "neck.convs.0", "memory_attention.layers.0", "memory_encoder.fuser")
    more = ("prompt_encoder.point_embeddings", "obj_ptr_proj", "obj_ptr_tpos_proj", "maskmem_tpos_enc", "no_mem_embed")
    missing = [part for part in (*parts, *more, "mask_decoder.conv_s0") if not any(part in name for name in reached)]
    assert missing == []
    with torch.no_grad():
        for weight in predictor.parameters():
            if weight.grad is not None:
                weight -= 1e-3 * weight.grad
    found = track(predictor, clicked(predictor))
    assert relative_error(found[1], before[1]) > 1e-4
    assert apart(found, by_official_calls(predictor)) < 1e-3


class Trained(SAM2Base):
    """A model that a trainer subclasses: all frames are encoded at once, and a click corrects a tracked one."""

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        _, maps, positions, sizes = self._prepare_backbone_features(self.forward_image(images))
        memory: dict[str, dict[int, Any]] = {kind: {} for kind in KINDS}
        loss = images.new_zeros(())
        for frame in range(len(images)):
            own = [x[:, frame : frame + 1] for x in maps], [x[:, frame : frame + 1] for x in positions], sizes
            given = (None, mask if frame == 0 else None, memory, len(images), False, None)
            current, heads, high_res, pixels = self._track_step(frame, frame == 0, *own, *given)
            clicks = None
            if frame == 1:
                points, labels = get_next_point(mask > 0, heads[4] > 0, "uniform")
                clicks = misc.concat_points(None, points, labels)
                heads = self._forward_sam_heads(
                    backbone_features=pixels,
                    point_inputs=clicks,
                    mask_inputs=heads[3],
                    high_res_features=high_res,
                    multimask_output=self._use_multimask(False, clicks),
                )
            current["obj_ptr"] = heads[5]
            self._encode_memory_in_output(own[0], sizes, clicks, True, heads[4], heads[6], current)
            memory[KINDS[frame > 0]][frame] = current
            loss = loss + heads[4].sigmoid().sub(mask).square().mean() + heads[6].square().mean()
        return loss


def test_a_trainer_subclasses_the_model(built: SAM2VideoPredictor) -> None:
    model = copy.deepcopy(built)
    model.__class__ = Trained  # type: ignore[assignment]
    model.requires_grad_(True).train()
    mask = torch.zeros(1, 1, SIZE, SIZE)
    mask[..., 16:40, 8:32] = 1
    torch.manual_seed(0)
    model(clip(SIZE, 3), mask).backward()
    without = {name for name, weight in model.named_parameters() if weight.grad is None}
    # Nothing is absent in a mask that is given, and no frame is without memory; boxes and clicks beside are not drawn.
    assert {name.split(".")[0] for name in without} <= {
        *("sam_prompt_encoder", "no_mem_embed", "no_mem_pos_enc", "no_obj_ptr", "no_obj_embed_spatial"),
        *("mask_downsample", "sam_mask_decoder"),
    }
    assert all(weight.grad.isfinite().all() for weight in model.parameters() if weight.grad is not None)


class ToExport(nn.Module):
    """A call of a model as a module that is traced."""

    def __init__(self, model: Any, call: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, *given: Tensor) -> Any:
        return self.call(self.model, *given)


def memory_attention_call(model: Any, curr: Tensor, memory: Tensor, curr_pos: Tensor, memory_pos: Tensor) -> Tensor:
    return model.memory_attention(
        curr=curr, curr_pos=curr_pos, memory=memory, memory_pos=memory_pos, num_obj_ptr_tokens=3
    )


def new_memory_call(model: Any, features: Tensor, masks: Tensor, scores: Tensor) -> Any:
    return model._encode_new_memory([features], [(4, 4)], masks, scores, False)


def heads_call(model: Any, features: Tensor, s0: Tensor, s1: Tensor, coords: Tensor, labels: Tensor) -> Any:
    points = {"point_coords": coords, "point_labels": labels}
    return model._forward_sam_heads(features, points, None, [s0, s1], True)


EXPORTS: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "memory attention": (memory_attention_call, [(16, 1, 64), (35, 1, 64), (16, 1, 64), (35, 1, 64)]),
    "new memory": (new_memory_call, [(16, 1, 64), (1, 1, 64, 64), (1, 1)]),
    "heads": (heads_call, [(1, 64, 4, 4), (1, 8, 16, 16), (1, 16, 8, 8), (1, 2, 2)]),
}


@pytest.mark.parametrize("what", EXPORTS)
@torch.no_grad()
def test_what_exporters_trace(predictor: SAM2VideoPredictor, what: str) -> None:
    """The official operations are recorded, and answer other inputs as the model does."""
    call, sizes = EXPORTS[what]

    def inputs(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.randn(size, generator=generator) for size in sizes]
        return [*drawn, torch.tensor([[1, 0]], dtype=torch.int32)] if what == "heads" else drawn

    traced = torch.jit.trace(ToExport(predictor, call), tuple(inputs(0)), check_trace=False)
    found, expected = traced(*inputs(1)), call(predictor, *inputs(1))
    found, expected = (flat(x) for x in (found, expected))
    assert len(found) == len(expected)
    for ours, plain in zip(found, expected, strict=True):
        assert_close_l2(ours, plain, 1e-5, what)


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [x for each in value for x in flat(each)]


# Configs ---------------------------------------------------------------------------------------------------------


class OfVolumes(SAM2VideoPredictor):
    """A predictor of the program's own: slices of a volume are its frames, encoded beforehand."""

    def init_state(self, volume: Tensor) -> dict[str, Any]:  # type: ignore[override]
        with mock.patch.object(face, "load_video_frames", return_value=(list(volume), HEIGHT, WIDTH)):
            state = super().init_state("")
        state["slices"] = {index: self.forward_image(image[None]) for index, image in enumerate(volume)}
        return state

    def _get_image_feature(self, inference_state: dict[str, Any], frame_idx: int, batch_size: int) -> Any:
        if "slices" not in inference_state:
            return super()._get_image_feature(inference_state, frame_idx, batch_size)
        encoded = inference_state["slices"][frame_idx]
        inference_state["cached_features"] = {frame_idx: (inference_state["images"][frame_idx][None], encoded)}
        return super()._get_image_feature(inference_state, frame_idx, batch_size)


@pytest.fixture
def target() -> Any:
    """The name by which configs find :class:`OfVolumes`."""
    own = types.ModuleType("of_volumes")
    own.OfVolumes = OfVolumes  # type: ignore[attr-defined]
    with mock.patch.dict(sys.modules, {"of_volumes": own}):
        yield "++model._target_=of_volumes.OfVolumes"


@torch.no_grad()
def test_a_subclass_of_the_program_with_frames_of_its_own(target: str, tmp_path: Any) -> None:
    """Built by hand: a target, and weights by ``_load_checkpoint``."""
    plain: Any = build_sam.build_sam2_video_predictor("sam2.1_hiera_t", device="cpu", hydra_overrides_extra=SMALL)
    randomise(plain)
    torch.save({"model": plain.state_dict()}, tmp_path / "weights.pt")
    made: Any = build_sam.build_sam2_video_predictor(
        "sam2.1_hiera_t", device="cpu", hydra_overrides_extra=[*SMALL, target]
    )
    build_sam._load_checkpoint(made, tmp_path / "weights.pt")
    assert (type(made), made.fill_hole_area) == (OfVolumes, 8)
    made.fill_hole_area = plain.fill_hole_area = 0
    state = made.init_state(clip(SIZE, 3))
    made.add_new_points_or_box(state, 0, 1, **CLICK)
    with mock.patch.object(type(made.image_encoder), "forward", None):
        found = track(made, state)
    assert apart(found, track(plain, clicked(plain, 3))) < 1e-3


def test_overrides_that_programs_give() -> None:
    """What ``apply_postprocessing`` sets, by hand; sizes of attention; and options of the tracker."""
    by_hand = [
        "++model.sam_mask_decoder_extra_args.dynamic_multimask_via_stability=true",
        "++model.sam_mask_decoder_extra_args.dynamic_multimask_stability_delta=0.05",
        "++model.sam_mask_decoder_extra_args.dynamic_multimask_stability_thresh=0.98",
        "++model.binarize_mask_from_pts_for_mem_enc=true",
        "++model.fill_hole_area=8",
    ]
    sizes = [f"++model.memory_attention.layer.{name}_attention.feat_sizes=[4,4]" for name in ("self", "cross")]
    options = ["++model.non_overlap_masks=true", "++model.memory_temporal_stride_for_eval=2"]
    options.append("++model.compile_image_encoder=true")

    def build(*overrides: str, apply: bool = False) -> Any:
        return build_sam.build_sam2_video_predictor(
            "configs/sam2.1/sam2.1_hiera_t.yaml",
            device="cpu",
            hydra_overrides_extra=[*SMALL, *overrides],
            apply_postprocessing=apply,
        )

    with mock.patch.object(torch, "compile", side_effect=lambda forward, **_: forward) as compiled:
        made = build(*by_hand, *sizes, *options)
    assert compiled.call_count == 1
    usual, bare = build(apply=True), build()
    names = ("fill_hole_area", "binarize_mask_from_pts_for_mem_enc")
    assert [getattr(made, name) for name in names] == [getattr(usual, name) for name in names] == [8, True]
    assert [getattr(bare, name) for name in names] == [0, False]
    decoders = [each.sam_mask_decoder.dynamic_multimask_via_stability for each in (made, usual, bare)]
    assert decoders == [True, True, False]
    assert (made.non_overlap_masks, made.memory_temporal_stride_for_eval) == (True, 2)
    attention = made.memory_attention.layers[0]
    assert [len(each.freqs_cis) for each in (attention.self_attn, attention.cross_attn_image)] == [16, 16]

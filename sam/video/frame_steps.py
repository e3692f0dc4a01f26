"""Steps of tracking on one frame: its features, a step of an object, its memory, the masks of all objects."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..modeling.sam2_base import NO_OBJ_SCORE, SAM2Base
from ..system.methods import WrittenMethods
from . import state as states
from .object_batch import ObjectBatch, why_not_batched
from .state import Output, State

Answer = tuple[int, list[Any], Tensor]


class FrameSteps(SAM2Base):
    """The part of :class:`~sam.video.predictor.VideoPredictor` that is about single frames, by its official names."""

    fill_hole_area: int
    non_overlap_masks: bool
    clear_non_cond_mem_around_input: bool

    def _fill_holes(self, masks: Tensor) -> Tensor:
        raise NotImplementedError

    # Objects -----------------------------------------------------------------------------------------------

    def _obj_id_to_idx(self, inference_state: State, obj_id: Hashable) -> int:
        """Return the index of an object; one that is new gets the next."""
        index = inference_state["obj_id_to_idx"].get(obj_id)
        return states.add_object(inference_state, obj_id) if index is None else index

    def _obj_idx_to_id(self, inference_state: State, obj_idx: int) -> Any:
        return inference_state["obj_idx_to_id"][obj_idx]

    def _get_obj_num(self, inference_state: State) -> int:
        return len(inference_state["obj_idx_to_id"])

    # Features ----------------------------------------------------------------------------------------------

    def _get_image_feature(self, inference_state: State, frame_idx: int, batch_size: int) -> tuple[Any, ...]:
        """Return the features of a frame, which the state keeps for the last one.

        Returns:
            the frame [B, 3, S, S] and what :meth:`_prepare_backbone_features` gives, for ``batch_size`` objects.
        """
        image, backbone_out = inference_state["cached_features"].get(frame_idx, (None, None))
        if backbone_out is None:
            pixels = torch.as_tensor(inference_state["images"][frame_idx])
            image = pixels.to(inference_state["device"]).float()[None]
            backbone_out = self.forward_image(image.to(self.dtype))
            if self.dtype != torch.float32:  # the neck widens narrow maps, and weights of other modules take none
                for name in ("backbone_fpn", "vision_pos_enc"):
                    backbone_out[name] = [x.to(self.dtype) for x in backbone_out[name]]
            inference_state["cached_features"] = {frame_idx: (image, backbone_out)}
        names = ("backbone_fpn", "vision_pos_enc")
        expanded = {name: [x.expand(batch_size, -1, -1, -1) for x in backbone_out[name]] for name in names}
        return image.expand(batch_size, -1, -1, -1), *self._prepare_backbone_features(expanded)

    # One object --------------------------------------------------------------------------------------------

    def _run_single_frame_inference(
        self,
        inference_state: State,
        output_dict: Mapping[str, Any],
        frame_idx: int,
        batch_size: int,
        is_init_cond_frame: bool,
        point_inputs: Mapping[str, Tensor] | None,
        mask_inputs: Tensor | None,
        reverse: bool,
        run_mem_encoder: bool,
        prev_sam_mask_logits: Tensor | None = None,
    ) -> tuple[Output, Tensor]:
        """Predict an object on a frame.

        Returns:
            the output that the state keeps, and the mask's logits [B, 1, h, w] on the device of the model.
        """
        _, _, features, positions, sizes = self._get_image_feature(inference_state, frame_idx, batch_size)
        step = self.track_step(
            frame_idx=frame_idx,
            is_init_cond_frame=is_init_cond_frame,
            current_vision_feats=features,
            current_vision_pos_embeds=positions,
            feat_sizes=sizes,
            point_inputs=point_inputs,
            mask_inputs=mask_inputs,
            output_dict=output_dict,
            num_frames=inference_state["num_frames"],
            track_in_reverse=reverse,
            run_mem_encoder=run_mem_encoder,
            prev_sam_mask_logits=prev_sam_mask_logits,
        )
        masks = step["pred_masks"]
        if self.fill_hole_area > 0:
            masks = self._fill_holes(masks)
        output = {
            "maskmem_features": self._stored(inference_state, step["maskmem_features"]),
            "maskmem_pos_enc": self._get_maskmem_pos_enc(inference_state, step),
            "pred_masks": masks.to(inference_state["storage_device"]),
            "obj_ptr": step["obj_ptr"],
            "object_score_logits": step["object_score_logits"],
        }
        return output, masks

    def _run_memory_encoder(
        self,
        inference_state: State,
        frame_idx: int,
        batch_size: int,
        high_res_masks: Tensor,
        object_score_logits: Tensor,
        is_mask_from_pts: bool,
    ) -> tuple[Tensor | None, list[Tensor] | None]:
        """Make the memory of a frame and masks [B, 1, S, S]; returns features and positions as the state keeps them."""
        _, _, features, _, sizes = self._get_image_feature(inference_state, frame_idx, batch_size)
        memory, positions = self._encode_new_memory(
            current_vision_feats=features,
            feat_sizes=sizes,
            pred_masks_high_res=high_res_masks,
            object_score_logits=object_score_logits,
            is_mask_from_pts=is_mask_from_pts,
        )
        shared = self._get_maskmem_pos_enc(inference_state, {"maskmem_pos_enc": positions})
        return self._stored(inference_state, memory), shared

    def _stored(self, state: State, memory: Tensor | None) -> Tensor | None:
        return None if memory is None else memory.to(torch.bfloat16).to(state["storage_device"])

    def _get_maskmem_pos_enc(self, inference_state: State, current_out: Mapping[str, Any]) -> list[Tensor] | None:
        """Return the positions of a memory, of which the state keeps one copy for all."""
        positions = current_out["maskmem_pos_enc"]
        if positions is None:
            return None
        constants = inference_state["constants"]
        if "maskmem_pos_enc" not in constants:
            constants["maskmem_pos_enc"] = [x[:1].clone() for x in positions]
        return [x.expand(len(positions[0]), -1, -1, -1) for x in constants["maskmem_pos_enc"]]

    def _track_object(self, state: State, index: int, frame: int, reverse: bool) -> Tensor:
        """Return the low-resolution logits of an object on a frame, found by memory where it has no prompt there."""
        outputs = state["output_dict_per_obj"][index]
        if frame in outputs["cond_frame_outputs"]:
            masks = outputs["cond_frame_outputs"][frame]["pred_masks"].to(state["device"], non_blocking=True)
            if self.clear_non_cond_mem_around_input:
                self._clear_obj_non_cond_mem_around_input(state, frame, index)
        else:
            output, masks = self._run_single_frame_inference(
                inference_state=state,
                output_dict=outputs,
                frame_idx=frame,
                batch_size=1,
                is_init_cond_frame=False,
                point_inputs=None,
                mask_inputs=None,
                reverse=reverse,
                run_mem_encoder=True,
            )
            outputs["non_cond_frame_outputs"][frame] = output
        states.tracked_frames(state, index)[frame] = {"reverse": reverse}
        return masks

    def _track_objects(self, state: State, indices: Sequence[int], frame: int, reverse: bool) -> list[Tensor]:
        """Return the low-resolution logits [1, 1, h, w] of each object on a frame.

        Those without a prompt there are tracked together, by the official calls where a program changed any of them.
        """
        outputs = state["output_dict_per_obj"]
        tracked = [index for index in indices if frame not in outputs[index]["cond_frame_outputs"]]
        if tracked and _CALLS.replaced_in(self) is None and why_not_batched(self) is None:
            masks = dict(zip(tracked, self._track_together(state, tracked, frame, reverse), strict=True))
        else:
            masks = {}
        return [
            masks[index] if index in masks else self._track_object(state, index, frame, reverse) for index in indices
        ]

    def _track_together(self, state: State, indices: Sequence[int], frame: int, reverse: bool) -> Sequence[Tensor]:
        _, backbone_out, *_ = self._get_image_feature(state, frame, 1)
        outputs, frames = [state["output_dict_per_obj"][index] for index in indices], state["num_frames"]
        choices = [self._choose_memories(frame, output, frames, reverse) for output in outputs]
        count = len(choices)
        maps, positions = backbone_out["backbone_fpn"], backbone_out["vision_pos_enc"][-1]
        found = ObjectBatch(self).track(maps, positions, choices, [frames] * count, [0] * count)
        if self.fill_hole_area > 0:
            found = found._replace(masks=self._fill_holes(found.masks))
        positions = {"maskmem_pos_enc": [found.positions]}
        for index, output, own in zip(indices, outputs, found.one_by_one(), strict=True):
            output["non_cond_frame_outputs"][frame] = {
                "maskmem_features": self._stored(state, own.memories),
                "maskmem_pos_enc": self._get_maskmem_pos_enc(state, positions),
                "pred_masks": own.masks.to(state["storage_device"]),
                "obj_ptr": own.pointers,
                "object_score_logits": own.scores,
            }
            states.tracked_frames(state, index)[frame] = {"reverse": reverse}
        return found.masks.split(1)

    def _clear_obj_non_cond_mem_around_input(self, inference_state: State, frame_idx: int, obj_idx: int) -> None:
        """Forget what was tracked of an object on the frames around one with a prompt."""
        outputs = inference_state["output_dict_per_obj"][obj_idx]["non_cond_frame_outputs"]
        for frame in self._frames_around(frame_idx):
            outputs.pop(frame, None)

    def _frames_around(self, frame: int) -> range:
        reach = self.memory_temporal_stride_for_eval * self.num_maskmem
        return range(frame - reach, frame + reach + 1)

    # All objects -------------------------------------------------------------------------------------------

    def _masks_on(self, state: State, frame: int, is_cond: bool | None = None) -> Answer:
        """Return a frame, the ids of all objects and their logits on it; by default of the prompts as they are."""
        if is_cond is None:
            prompted = state["temp_output_dict_per_obj"].values()
            is_cond = any(frame in outputs["cond_frame_outputs"] for outputs in prompted)
        _, video_masks = self._get_orig_video_res_output(state, self._prompted_masks(state, frame, is_cond))
        return frame, list(state["obj_ids"]), video_masks

    def _prompted_masks(self, state: State, frame: int, is_cond: bool) -> Tensor:
        masks = self._consolidate_temp_output_across_obj(state, frame, is_cond=is_cond, consolidate_at_video_res=True)
        return masks["pred_masks_video_res"]

    def _consolidate_temp_output_across_obj(
        self, inference_state: State, frame_idx: int, is_cond: bool, consolidate_at_video_res: bool = False
    ) -> dict[str, Tensor]:
        """Return the newest logits of all objects on a frame [O, 1, H, W], -1024 where an object has none.

        They are called "pred_masks_video_res" at the size of the video, else "pred_masks" at the low resolution.
        """
        name, size = "pred_masks", (self.image_size // 4, self.image_size // 4)
        if consolidate_at_video_res:
            name, size = "pred_masks_video_res", (inference_state["video_height"], inference_state["video_width"])
        kind = "cond_frame_outputs" if is_cond else "non_cond_frame_outputs"
        objects, device = self._get_obj_num(inference_state), inference_state["storage_device"]
        masks = torch.full((objects, 1, *size), NO_OBJ_SCORE, dtype=torch.float32, device=device)
        for index in range(objects):
            output = states.output_of(inference_state, index, frame_idx, kind)
            if output is not None:
                masks[index] = _resized(output["pred_masks"], size)[0]
        return {name: masks}

    def _get_orig_video_res_output(self, inference_state: State, any_res_masks: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits [O, 1, h, w] on the device of the model, and at the size of the video."""
        any_res_masks = any_res_masks.to(inference_state["device"], non_blocking=True)
        size = (inference_state["video_height"], inference_state["video_width"])
        video_masks = _resized(any_res_masks, size)
        if self.non_overlap_masks:
            video_masks = self._apply_non_overlapping_constraints(video_masks)
        return any_res_masks, video_masks


def _resized(masks: Tensor, size: tuple[int, int]) -> Tensor:
    if masks.shape[-2:] == size:
        return masks
    return F.interpolate(masks, size=size, mode="bilinear", align_corners=False)


_CALLS = WrittenMethods(
    FrameSteps,
    *("_track_object", "_run_single_frame_inference", "_get_image_feature", "_stored", "_get_maskmem_pos_enc"),
)

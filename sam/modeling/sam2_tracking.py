"""One step of tracking objects with SAM 2: which memories a frame attends to, and what memory it leaves.

Throughout: B objects, N tokens of a frame, C channels. ``output_dict`` is the official record of earlier frames:
"cond_frame_outputs" and "non_cond_frame_outputs", each a dictionary of frame numbers, of what :meth:`track_step`
returned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .memory_choice import MemoryChoice, Outputs, frame_at, output_of, select_closest_cond_frames
from .position_encoding import get_1d_sine_pe

NO_OBJ_SCORE = -1024.0  # the logits of the mask of an object that is not in the frame

Size = tuple[int, int]


class TrackingSteps(nn.Module):
    """The part of :class:`~sam.modeling.sam2_base.SAM2Base` that is about frames of a video, by its official names."""

    hidden_dim: int
    mem_dim: int
    num_maskmem: int
    maskmem_tpos_enc: Tensor
    no_mem_embed: Tensor
    no_mem_pos_enc: Tensor
    no_obj_embed_spatial: Tensor | None
    max_cond_frames_in_attn: int
    memory_temporal_stride_for_eval: int
    use_obj_ptrs_in_encoder: bool
    max_obj_ptrs_in_encoder: int
    only_obj_ptrs_in_the_past_for_eval: bool
    use_signed_tpos_enc_to_obj_ptrs: bool
    add_tpos_enc_to_obj_ptrs: bool
    proj_tpos_enc_in_obj_ptrs: bool
    directly_add_no_mem_embed: bool
    non_overlap_masks_for_mem_enc: bool
    binarize_mask_from_pts_for_mem_enc: bool
    sigmoid_scale_for_mem_enc: float
    sigmoid_bias_for_mem_enc: float
    use_mask_input_as_output_without_sam: bool
    multimask_output_in_sam: bool
    multimask_output_for_tracking: bool
    multimask_min_pt_num: int
    multimask_max_pt_num: int

    def track_step(
        self,
        frame_idx: int,
        is_init_cond_frame: bool,
        current_vision_feats: list[Tensor],
        current_vision_pos_embeds: list[Tensor],
        feat_sizes: list[Size],
        point_inputs: Mapping[str, Tensor] | None,
        mask_inputs: Tensor | None,
        output_dict: Mapping[str, Outputs],
        num_frames: int,
        track_in_reverse: bool = False,
        run_mem_encoder: bool = True,
        prev_sam_mask_logits: Tensor | None = None,
    ) -> dict[str, Any]:
        """Predict the masks of B objects on a frame, and the memory that it leaves.

        Args:
            frame_idx: the number of the frame.
            is_init_cond_frame: the objects begin here: no memory is read.
            current_vision_feats, current_vision_pos_embeds, feat_sizes: from :meth:`_prepare_backbone_features`.
            point_inputs: ``point_coords`` [B, N, 2] in pixels of the square and ``point_labels`` [B, N].
            mask_inputs: [B, 1, H, W] masks that are given.
            output_dict: what earlier frames returned.
            num_frames: frames of the video; it scales the times of pointers.
            track_in_reverse: the earlier frames are those of higher numbers.
            run_mem_encoder: make the memory.
            prev_sam_mask_logits: [B, 1, h, w] logits of an earlier prediction on this frame, for more clicks.

        Returns:
            point_inputs, mask_inputs, pred_masks, pred_masks_high_res, obj_ptr, object_score_logits (in eval mode),
            maskmem_features and maskmem_pos_enc.
        """
        current_out, sam_outputs, _, _ = self._track_step(
            frame_idx,
            is_init_cond_frame,
            current_vision_feats,
            current_vision_pos_embeds,
            feat_sizes,
            point_inputs,
            mask_inputs,
            output_dict,
            num_frames,
            track_in_reverse,
            prev_sam_mask_logits,
        )
        _, _, _, low_res, high_res, pointer, scores = sam_outputs
        current_out["pred_masks"] = low_res
        current_out["pred_masks_high_res"] = high_res
        current_out["obj_ptr"] = pointer
        if not self.training:  # an output that no loss reads upsets checkpointed activations
            current_out["object_score_logits"] = scores
        self._encode_memory_in_output(
            current_vision_feats, feat_sizes, point_inputs, run_mem_encoder, high_res, scores, current_out
        )
        return current_out

    def _track_step(
        self,
        frame_idx: int,
        is_init_cond_frame: bool,
        current_vision_feats: list[Tensor],
        current_vision_pos_embeds: list[Tensor],
        feat_sizes: list[Size],
        point_inputs: Mapping[str, Tensor] | None,
        mask_inputs: Tensor | None,
        output_dict: Mapping[str, Outputs],
        num_frames: int,
        track_in_reverse: bool,
        prev_sam_mask_logits: Tensor | None,
    ) -> tuple[dict[str, Any], tuple[Tensor, ...], list[Tensor] | None, Tensor]:
        """Return the beginning of what :meth:`track_step` does, what the heads predict, and the features they read."""
        current_out: dict[str, Any] = {"point_inputs": point_inputs, "mask_inputs": mask_inputs}
        high_res_features = None
        if len(current_vision_feats) > 1:
            finer = zip(current_vision_feats[:-1], feat_sizes[:-1], strict=True)
            high_res_features = [_as_map(x, size) for x, size in finer]
        if mask_inputs is not None and self.use_mask_input_as_output_without_sam:
            features = _as_map(current_vision_feats[-1], feat_sizes[-1])
            outputs = self._use_mask_as_output(features, high_res_features, mask_inputs)  # type: ignore[operator]
            return current_out, outputs, high_res_features, features
        features = self._prepare_memory_conditioned_features(
            frame_idx=frame_idx,
            is_init_cond_frame=is_init_cond_frame,
            current_vision_feats=current_vision_feats[-1:],
            current_vision_pos_embeds=current_vision_pos_embeds[-1:],
            feat_sizes=feat_sizes[-1:],
            output_dict=output_dict,
            num_frames=num_frames,
            track_in_reverse=track_in_reverse,
        )
        if prev_sam_mask_logits is not None:
            if point_inputs is None or mask_inputs is not None:
                raise ValueError("prev_sam_mask_logits go with points, and with no mask_inputs")
            mask_inputs = prev_sam_mask_logits
        outputs = self._forward_sam_heads(  # type: ignore[operator]
            backbone_features=features,
            point_inputs=point_inputs,
            mask_inputs=mask_inputs,
            high_res_features=high_res_features,
            multimask_output=self._use_multimask(is_init_cond_frame, point_inputs),
        )
        return current_out, outputs, high_res_features, features

    def _use_multimask(self, is_init_cond_frame: bool, point_inputs: Mapping[str, Tensor] | None) -> bool:
        """Return whether the heads shall choose among three masks."""
        points = 0 if point_inputs is None else point_inputs["point_labels"].shape[1]
        asks = self.multimask_output_in_sam and (is_init_cond_frame or self.multimask_output_for_tracking)
        return asks and self.multimask_min_pt_num <= points <= self.multimask_max_pt_num

    # What a frame reads ------------------------------------------------------------------------------------

    def _prepare_memory_conditioned_features(
        self,
        frame_idx: int,
        is_init_cond_frame: bool,
        current_vision_feats: list[Tensor],
        current_vision_pos_embeds: list[Tensor],
        feat_sizes: list[Size],
        output_dict: Mapping[str, Outputs],
        num_frames: int,
        track_in_reverse: bool = False,
    ) -> Tensor:
        """Return the features [B, C, h, w] of a frame, conditioned on the memories of other frames."""
        features, size = current_vision_feats[-1], feat_sizes[-1]
        if self.num_maskmem == 0:
            return _as_map(features, size)
        pointer_tokens = 0
        if is_init_cond_frame:
            if self.directly_add_no_mem_embed:
                return _as_map(features + self.no_mem_embed, size)
            shape = (1, features.shape[1], self.mem_dim)
            memories, positions = [self.no_mem_embed.expand(shape)], [self.no_mem_pos_enc.expand(shape)]
        else:
            choice = self._choose_memories(frame_idx, output_dict, num_frames, track_in_reverse)
            memories, positions = self._spatial_memories(choice, features.device)
            if choice.pointers:
                of_pointers = self._pointer_memories(choice, num_frames, features.shape[1], features.device)
                memories.append(of_pointers[0])
                positions.append(of_pointers[1])
                pointer_tokens = of_pointers[0].shape[0]
        memory, memory_pos = torch.cat(memories, dim=0), torch.cat(positions, dim=0)
        if not torch.is_autocast_enabled(memory.device.type):  # memories are kept in bf16
            memory, memory_pos = memory.to(features.dtype), memory_pos.to(features.dtype)
        learnt = self.memory_attention(  # type: ignore[operator]
            curr=current_vision_feats,
            curr_pos=current_vision_pos_embeds,
            memory=memory,
            memory_pos=memory_pos,
            num_obj_ptr_tokens=pointer_tokens,
        )
        return _as_map(learnt, size)

    def _choose_memories(
        self, frame_idx: int, output_dict: Mapping[str, Outputs], num_frames: int, track_in_reverse: bool
    ) -> MemoryChoice:
        """Choose what a frame attends to among the outputs of other frames.

        Conditioning frames come first and share the last slot of time; a tracked frame has that of its distance.

        Raises:
            ValueError: no conditioning frame.
        """
        chosen, others = select_closest_cond_frames(
            frame_idx, output_dict["cond_frame_outputs"], self.max_cond_frames_in_attn
        )
        if not chosen:
            raise ValueError("no frame has a prompt yet: there is no memory to track with")
        tracked = (output_dict["non_cond_frame_outputs"], others)
        maps = [(self.num_maskmem - 1, output) for output in chosen.values()]
        stride = 1 if self.training else self.memory_temporal_stride_for_eval
        for distance in range(self.num_maskmem - 1, 0, -1):
            output = output_of(frame_at(frame_idx, distance, stride, track_in_reverse), tracked)
            if output is not None:
                maps.append((distance - 1, output))
        pointers: list[tuple[int, Tensor]] = []
        if not self.use_obj_ptrs_in_encoder:
            return MemoryChoice(maps, pointers)
        sign = -1 if track_in_reverse else 1
        for frame, conditioning in chosen.items():
            distance = (frame_idx - frame) * sign
            if self.training or not self.only_obj_ptrs_in_the_past_for_eval or distance >= 0:
                signed = distance if self.use_signed_tpos_enc_to_obj_ptrs else abs(distance)
                pointers.append((signed, conditioning["obj_ptr"]))
        for distance in range(1, self._pointer_limit(num_frames)):
            frame = frame_idx - distance * sign
            if not 0 <= frame < num_frames:
                break
            output = output_of(frame, tracked)
            if output is not None:
                pointers.append((distance, output["obj_ptr"]))
        return MemoryChoice(maps, pointers)

    def _pointer_limit(self, num_frames: int) -> int:
        """Return the number of frames by which pointers are timed."""
        return min(num_frames, self.max_obj_ptrs_in_encoder)

    def _memory_reach(self) -> int:
        """Return how many frames away the furthest memory is that :meth:`_choose_memories` looks for, or more."""
        stride = self.memory_temporal_stride_for_eval
        return 2 + (stride - 1) + max(self.num_maskmem - 3, 0) * stride

    def _spatial_memories(self, choice: MemoryChoice, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
        """Return the maps of memory that a frame attends to, [N, B, mem_dim] each, and their positions."""
        memories, positions = [], []
        for slot, output in choice.maps:
            memories.append(_as_tokens(output["maskmem_features"].to(device, non_blocking=True)))
            position = _as_tokens(output["maskmem_pos_enc"][-1].to(device))
            positions.append(position + self.maskmem_tpos_enc[slot])
        return memories, positions

    def _pointer_memories(
        self, choice: MemoryChoice, num_frames: int, objects: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Return the object pointers that a frame attends to as tokens [K, B, mem_dim], and their positions."""
        pointers = torch.stack([pointer for _, pointer in choice.pointers])  # [frames, B, C]
        position = self._pointer_positions([distance for distance, _ in choice.pointers], num_frames, device)
        position = position[:, None].expand(-1, objects, self.mem_dim)
        if self.mem_dim < self.hidden_dim:  # one pointer is several tokens
            pointers = pointers.unflatten(2, (-1, self.mem_dim)).transpose(1, 2).flatten(0, 1)
            position = position.repeat_interleave(self.hidden_dim // self.mem_dim, dim=0)
        return pointers, position

    def _pointer_positions(self, distances: Sequence[int], num_frames: int, device: torch.device) -> Tensor:
        """Return the positions [P, mem_dim] of pointers from so many frames away."""
        if not self.add_tpos_enc_to_obj_ptrs:
            return torch.zeros(len(distances), self.mem_dim, dtype=self.maskmem_tpos_enc.dtype, device=device)
        dim = self.hidden_dim if self.proj_tpos_enc_in_obj_ptrs else self.mem_dim
        away = torch.tensor(distances).to(device=device, non_blocking=True)
        sines = get_1d_sine_pe(away / max(self._pointer_limit(num_frames) - 1, 1), dim=dim)
        return self.obj_ptr_tpos_proj(sines.to(self.maskmem_tpos_enc.dtype))  # type: ignore[operator]

    # What a frame leaves -----------------------------------------------------------------------------------

    def _encode_memory_in_output(
        self,
        current_vision_feats: list[Tensor],
        feat_sizes: list[Size],
        point_inputs: Mapping[str, Tensor] | None,
        run_mem_encoder: bool,
        high_res_masks: Tensor,
        object_score_logits: Tensor,
        current_out: dict[str, Any],
    ) -> None:
        """Store the memory of a frame in ``current_out``, or None where no memory is made."""
        features = positions = None
        if run_mem_encoder and self.num_maskmem > 0:
            features, positions = self._encode_new_memory(
                current_vision_feats=current_vision_feats,
                feat_sizes=feat_sizes,
                pred_masks_high_res=high_res_masks,
                object_score_logits=object_score_logits,
                is_mask_from_pts=point_inputs is not None,
            )
        current_out["maskmem_features"], current_out["maskmem_pos_enc"] = features, positions

    def _encode_new_memory(
        self,
        current_vision_feats: list[Tensor],
        feat_sizes: list[Size],
        pred_masks_high_res: Tensor,
        object_score_logits: Tensor,
        is_mask_from_pts: bool,
    ) -> tuple[Tensor, list[Tensor]]:
        """Encode a frame and the logits [B, 1, H, W] of its masks as memories [B, mem_dim, h, w], and positions."""
        if self.non_overlap_masks_for_mem_enc and not self.training:
            pred_masks_high_res = self._apply_non_overlapping_constraints(pred_masks_high_res)
        if self.binarize_mask_from_pts_for_mem_enc and is_mask_from_pts and not self.training:
            masks = (pred_masks_high_res > 0).float()
        else:
            masks = pred_masks_high_res.sigmoid()
        if self.sigmoid_scale_for_mem_enc != 1.0:
            masks = masks * self.sigmoid_scale_for_mem_enc
        if self.sigmoid_bias_for_mem_enc != 0.0:
            masks = masks + self.sigmoid_bias_for_mem_enc
        pixels = _as_map(current_vision_feats[-1], feat_sizes[-1])
        if not torch.is_autocast_enabled(masks.device.type):
            masks = masks.to(pixels.dtype)
        memory = self.memory_encoder(pixels, masks, skip_mask_sigmoid=True)  # type: ignore[operator]
        features, positions = memory["vision_features"], memory["vision_pos_enc"]
        if self.no_obj_embed_spatial is not None:
            absent = 1 - (object_score_logits > 0).float()
            added = absent[..., None, None] * self.no_obj_embed_spatial[..., None, None]
            features = (features + added).to(features.dtype)  # autocast narrows them, and not what is added
        return features, positions

    def _apply_non_overlapping_constraints(self, pred_masks: Tensor) -> Tensor:
        """Give each pixel to the object of the highest logit; the others' are at most -10 there."""
        if len(pred_masks) == 1:
            return pred_masks
        best = pred_masks.argmax(dim=0, keepdim=True)
        own = torch.arange(len(pred_masks), device=pred_masks.device)[:, None, None, None]
        return torch.where(best == own, pred_masks, pred_masks.clamp(max=-10.0))


def _as_map(tokens: Tensor, size: Sequence[int]) -> Tensor:
    """Return tokens [h * w, B, C] as a map [B, C, h, w]."""
    return tokens.permute(1, 2, 0).unflatten(2, tuple(size))


def _as_tokens(features: Tensor) -> Tensor:
    """Return a map [B, C, h, w] as tokens [h * w, B, C]."""
    return features.flatten(2).permute(2, 0, 1)

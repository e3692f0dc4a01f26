"""A frame of a video for several objects at once, fused: what each remembers, its mask, and the memory that it leaves.

Objects may remember different numbers of frames. Of the three masks of an object only the one of the best predicted IoU
is made, and none of an object that is not seen. What the frame alone decides is computed once for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..inference import fused_decoder
from ..inference.decode import fused_parts
from ..inference.eligibility import has_no_hooks, look, why_not_fused
from ..inference.fused_memory_attention import (
    FrameQueries,
    Memories,
    PackedMemoryAttention,
    frame_queries,
    learn_from_memories,
    pack_memory_attention,
)
from ..inference.fused_memory_encoder import PackedMemoryEncoder, encode_memories, pack_memory_encoder, project_frame
from ..inference.parts import FusedParts
from ..modeling.common import uncompiled
from ..modeling.memory_choice import MemoryChoice
from ..modeling.sam2_base import NO_OBJ_SCORE, SAM2Base
from ..modeling.sam2_mask_decoder import seen_for_sure
from ..system.device_profile import device_profile
from ..system.methods import WrittenMethods

# What stands behind the official call of a tracked frame. Who replaces one of them is called.
_STEPS = WrittenMethods(
    SAM2Base,
    *("track_step", "_track_step", "_use_multimask", "_prepare_memory_conditioned_features", "_choose_memories"),
    *("_pointer_limit", "_spatial_memories", "_pointer_memories", "_pointer_positions", "_forward_sam_heads"),
    *("_without_absent", "_encode_memory_in_output", "_encode_new_memory", "_prepare_backbone_features"),
)


class TrackedObjects(NamedTuple):
    """B objects on a frame.

    Attributes:
        masks: low-resolution logits [B, 1, h, w] fp32, -1024 where an object is not seen.
        iou: [B], predicted, of the mask.
        scores: logits [B, 1], above 0 where the object is seen.
        pointers: [B, C].
        memories: [B, M, h, w].
        positions: [1, M, h, w], of the memories.
    """

    masks: Tensor
    iou: Tensor
    scores: Tensor
    pointers: Tensor
    memories: Tensor
    positions: Tensor

    def one_by_one(self) -> Iterator[TrackedObjects]:
        """Yield each object with memory of its own."""
        for row in range(len(self.masks)):
            rows = slice(row, row + 1)
            own = {name: getattr(self, name)[rows] for name in self._fields[:-1]}
            yield self if len(self.masks) == 1 else self._replace(**{name: x.clone() for name, x in own.items()})

    def rows(self, start: int, stop: int) -> TrackedObjects:
        """Return some of the objects."""
        return self._replace(**{name: getattr(self, name)[start:stop] for name in self._fields[:-1]})


@dataclass(frozen=True)
class _Frames:
    """The features of V frames, which all objects share.

    Attributes:
        remembered: their part of a memory, [V, h, w, C].
        high_res: maps of finer grids.
        queries: of the first layer to memories.
    """

    remembered: Tensor
    high_res: tuple[Tensor, ...]
    queries: FrameQueries

    def of(self, rows: Sequence[int]) -> _Frames:
        """Return the frame of each object; one frame serves all."""
        if len(self.remembered) == 1:
            return self
        index = torch.tensor(rows).to(self.remembered.device, non_blocking=True)
        maps = [x.index_select(0, index) for x in (self.remembered, *self.high_res)]
        return _Frames(maps[0], tuple(maps[1:]), FrameQueries(*(x.index_select(0, index) for x in self.queries)))


def why_not_batched(model: SAM2Base) -> str | None:
    """Return a sentence on what keeps objects from being tracked together and fused; None where nothing does."""
    replaced = _STEPS.replaced_in(model)
    if replaced is not None:
        return f"{replaced} was replaced"
    if model.kernels == "reference":
        return "kernels='reference' asks for the official modules"
    if model.training:
        return "the model is in training mode"
    if model.num_maskmem == 0:
        return "the model remembers nothing"
    for name in ("obj_ptr_proj", "obj_ptr_tpos_proj"):
        if not has_no_hooks(getattr(model, name)):
            return f"{name} has a forward hook or another forward"
    return why_not_fused(
        prompt_encoder=model.prompt_encoder,
        mask_decoder=model.mask_decoder,
        memory_attention=model.memory_attention,
        memory_encoder=model.memory_encoder,
    )


class ObjectBatch:
    """The weights of a model as they are now, for one frame."""

    def __init__(self, model: SAM2Base) -> None:
        """Look at a model of which :func:`why_not_batched` has no objection."""
        self._model: Any = model
        parts = fused_parts(model)
        assert parts is not None
        self._decoder: FusedParts = parts
        attention, encoder = uncompiled(model.memory_attention), uncompiled(model.memory_encoder)
        device = model.device
        self._attention: PackedMemoryAttention = look(attention).packed(pack_memory_attention, attention).now(device)
        self._encoder: PackedMemoryEncoder = look(encoder).packed(pack_memory_encoder, encoder).now(device)
        self._position_encoding = encoder.position_encoding

    def track(
        self,
        maps: Sequence[Tensor],
        positions: Tensor,
        choices: Sequence[MemoryChoice],
        num_frames: Sequence[int],
        rows: Sequence[int],
    ) -> TrackedObjects:
        """Track objects where none of them has a prompt, on one frame or on one of each of V videos.

        Args:
            maps: of the frames, the finest first; the last one is the embedding [V, C, h, w].
            positions: [1, C, h, w], of the embedding.
            choices: for each object, what it attends to.
            num_frames: for each object, of its video; pointers are timed by it.
            rows: for each object, which of the frames is its own.
        """
        queries = frame_queries(self._attention, _tokens(maps[-1]), _tokens(positions), self._model.kernels)
        high_res = tuple(maps[-3:-1]) if self._model.use_high_res_features_in_sam else ()
        frames = _Frames(project_frame(self._encoder, maps[-1]), high_res, queries)
        size, parts = device_profile(self._model.device).objects_per_chunk, []
        for start in range(0, len(choices), size):
            chunk = slice(start, start + size)
            memories = self._memories(choices[chunk], num_frames[chunk])
            parts.append(self._track(frames.of(rows[chunk]), memories))
        if len(parts) == 1:
            return parts[0]
        joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in TrackedObjects._fields[:-1]}
        return parts[0]._replace(**joined)

    def _track(self, frames: _Frames, memories: Memories) -> TrackedObjects:
        model = self._model
        learnt = learn_from_memories(self._attention, frames.queries, memories, model.kernels)
        learnt = learnt.to(self._decoder.packed.dtype).transpose(1, 2).unflatten(2, frames.remembered.shape[1:3])
        masks, iou, tokens, scores = self._masks(learnt, frames.high_res)
        pointers, present = model.obj_ptr_proj(tokens), scores > 0
        if model.pred_obj_scores:
            pointers = model._without_absent(pointers, scores.sigmoid() if model.soft_no_obj_ptr else present)
        remembered = self._remember(frames.remembered, masks, present)
        places = self._position_encoding(remembered)[:1].to(remembered.dtype)
        return TrackedObjects(masks, iou, scores, pointers, remembered, places)

    # What objects remember ---------------------------------------------------------------------------------

    def _memories(self, choices: Sequence[MemoryChoice], num_frames: Sequence[int]) -> Memories:
        """Put what objects attend to one behind the other, with the positions that keys are made with."""
        model, device = self._model, self._model.device
        maps = [each for choice in choices for each in choice.maps]
        tokens = [_tokens(output["maskmem_features"].to(device, non_blocking=True))[0] for _, output in maps]
        places = torch.cat([_tokens(output["maskmem_pos_enc"][-1].to(device)) for _, output in maps])
        slots = torch.tensor([slot for slot, _ in maps]).to(device, non_blocking=True)
        places = places + model.maskmem_tpos_enc.flatten(1)[slots][:, None]
        values, sources = tokens, [*places.unbind()]
        if pointers := [pointer for choice in choices for _, pointer in choice.pointers]:
            away = [[distance for distance, _ in choice.pointers] for choice in choices]
            where = torch.cat(
                [
                    model._pointer_positions([each for _, of_object in alike for each in of_object], count, device)
                    for count, alike in groupby(zip(num_frames, away, strict=True), key=lambda pair: pair[0])
                ]
            )
            each = model.hidden_dim // model.mem_dim  # one pointer is several tokens
            values += torch.cat(pointers).view(-1, each, model.mem_dim).unbind()
            sources += where[:, None].expand(-1, each, -1).unbind()
        order = list(_object_by_object(choices))
        together = torch.cat([values[index].to(places.dtype) for of_object in order for index in of_object])
        return Memories(
            values=together,
            sources=together + torch.cat([sources[index] for of_object in order for index in of_object]),
            grids=tuple(len(choice.maps) for choice in choices),
            lengths=tuple(sum(len(values[index]) for index in of_object) for of_object in order),
        )

    # Masks -------------------------------------------------------------------------------------------------

    def _masks(self, learnt: Tensor, high_res: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Predict the masks of objects [B, C, h, w] that nobody prompts.

        Returns:
            logits [B, 1, 4h, 4w] fp32, predicted IoU [B], tokens of the objects [B, C], object scores [B, 1].
        """
        model, parts = self._model, self._decoder
        encoder, objects = parts.prompt_encoder, len(learnt)
        decoded = fused_decoder.decode_tokens(
            parts.packed,
            learnt,
            parts.image_pe,
            encoder.not_a_point_embed.weight.expand(objects, 2, -1),  # a point that is none, and one of padding
            encoder.no_mask_embed.weight.view(1, -1, 1, 1),
            high_res=[features.to(parts.packed.dtype) for features in high_res],
            kernels=model.kernels,
        )
        scores = seen_for_sure(decoded.iou) if decoded.object_scores is None else decoded.object_scores
        multimask = model._use_multimask(False, None)
        best = decoded.iou[:, 1:].argmax(dim=1) + 1
        rows = None
        if model.pred_obj_scores and learnt.device.type == "cpu":  # elsewhere the host would wait for them
            rows = (scores[:, 0] > 0).nonzero()[:, 0]
            rows = None if len(rows) == objects else rows
        if rows is not None and len(rows) == 0:
            logits, iou = learnt.new_zeros((0, 1, *model.low_res_size)), decoded.iou[:0, :1]
        elif multimask:
            chosen = best[:, None] if rows is None else best[rows][:, None]
            logits = fused_decoder.decode_masks(decoded, chosen, rows, model.kernels)
            iou = decoded.iou.gather(1, best[:, None])
        else:
            logits, iou = fused_decoder.choose_masks(decoded, False, rows, model.kernels)
        logits = logits.float()
        if rows is not None:
            masks = logits.new_full((objects, *logits.shape[1:]), NO_OBJ_SCORE)
            masks[rows] = logits
            if len(iou) < objects:
                iou = decoded.iou[:, :1].index_copy(0, rows, iou)
        elif model.pred_obj_scores:
            masks = torch.where((scores > 0)[:, None, None], logits, NO_OBJ_SCORE)
        else:
            masks = logits
        own = multimask and model.use_multimask_token_for_obj_ptr
        index = best[:, None, None].expand(-1, 1, decoded.mask_tokens.shape[2])
        tokens = decoded.mask_tokens.gather(1, index)[:, 0] if own else decoded.mask_tokens[:, 0]
        return masks, iou[:, 0].float(), tokens, scores

    def _remember(self, of_frame: Tensor, masks: Tensor, present: Tensor) -> Tensor:
        """Encode masks [B, 1, 4h, 4w] of a frame as memories [B, M, h, w], given which objects [B, 1] are seen."""
        model, size = self._model, (self._model.image_size,) * 2
        large = F.interpolate(masks, size, mode="bilinear", align_corners=False).sigmoid_()
        large = large.mul_(model.sigmoid_scale_for_mem_enc).add_(model.sigmoid_bias_for_mem_enc)
        memories = encode_memories(self._encoder, of_frame, large)
        if model.no_obj_embed_spatial is not None:
            of_absent = (memories + model.no_obj_embed_spatial[..., None, None]).to(memories.dtype)
            memories = torch.where(present[..., None, None], memories, of_absent)
        return memories


def _tokens(maps: Tensor) -> Tensor:
    """Return maps [B, C, h, w] as tokens [B, h * w, C]."""
    return maps.flatten(2).transpose(1, 2)


def _object_by_object(choices: Sequence[MemoryChoice]) -> Iterator[list[int]]:
    """Yield where the maps of each object, then its pointers, stand in a list of all maps, then all pointers."""
    maps = list(accumulate((len(choice.maps) for choice in choices), initial=0))
    pointers = list(accumulate((len(choice.pointers) for choice in choices), initial=maps[-1]))
    for of_maps, of_pointers in zip(pairwise(maps), pairwise(pointers), strict=True):
        yield [*range(*of_maps), *range(*of_pointers)]

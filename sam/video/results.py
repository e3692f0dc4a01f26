"""The answers of tracking: the masks of all objects on a frame."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastsam_kernels import mask_statistics, unpack_masks

from ..masks.rle_encode import encode_packed
from ..masks.upscale import resizing_of
from ..modeling.promptable import PromptableModel
from .tracked_object import TrackedObject


@dataclass(frozen=True)
class FrameResult:
    """O objects on a frame.

    Attributes:
        frame: its number.
        objects: the ids of the objects, in the order in which they were added.
        packed: [O, width, ceil(height / 32)] int32; bit b of word k of column x is the pixel in row 32 k + b.
        size: (height, width) of the frame.
        boxes: [O, 4] int64, x0, y0, x1, y1 around each mask, last row and column included; zeros for an empty mask.
        object_scores: [O] fp32 logits, above 0 where the object is seen.
        predicted_iou: [O] fp32, the model's own estimate of each mask's IoU.
        low_res_logits: [O, h, w] fp32, -1024 where an object is not seen.
    """

    frame: int
    objects: tuple[Hashable, ...]
    packed: Tensor
    size: tuple[int, int]
    boxes: Tensor
    object_scores: Tensor
    predicted_iou: Tensor
    low_res_logits: Tensor

    @property
    def masks(self) -> Tensor:
        """Return the masks, [O, height, width] bool."""
        return unpack_masks(self.packed, self.size[0])

    def rles(self) -> list[dict[str, Any]]:
        """Return the masks as uncompressed run lengths, see :mod:`sam.masks.rle`."""
        return encode_packed(self.packed, self.size)


def frame_result(
    model: PromptableModel, frame: int, objects: Sequence[TrackedObject], size: tuple[int, int]
) -> FrameResult:
    """Return the last answers of objects, at the (height, width) of their frame."""
    nothing = torch.zeros(0, device=model.device)
    low_res = torch.cat([nothing.view(0, 1, 1, 1).expand(0, 1, *model.low_res_size), *(each.masks for each in objects)])
    geometry = model.image_geometry(*size)
    statistics = mask_statistics(
        low_res[:, 0], resizing_of(geometry, model.low_res_size), offset=0.0, kernels=model.kernels
    )
    return FrameResult(
        frame=frame,
        objects=tuple(each.id for each in objects),
        packed=model.packed_masks(low_res, geometry),
        size=size,
        boxes=statistics.boxes,
        object_scores=torch.cat([nothing, *(each.scores[0].float() for each in objects)]),
        predicted_iou=torch.cat([nothing, *(each.iou.float() for each in objects)]),
        low_res_logits=low_res[:, 0],
    )

"""The helper functions of automatic masks: ``sam2.utils.amg``, which are SAM's but for one method."""

from __future__ import annotations

from torch import Tensor

from ...utils import amg
from ...utils.amg import (
    area_from_rle,
    batch_iterator,
    batched_mask_to_box,
    box_xyxy_to_xywh,
    build_all_layer_point_grids,
    build_point_grid,
    calculate_stability_score,
    coco_encode_rle,
    generate_crop_boxes,
    is_box_near_crop_edge,
    mask_to_rle_pytorch,
    remove_small_regions,
    rle_to_mask,
    uncrop_boxes_xyxy,
    uncrop_masks,
    uncrop_points,
)

__all__ = [
    "MaskData",
    "area_from_rle",
    "batch_iterator",
    "batched_mask_to_box",
    "box_xyxy_to_xywh",
    "build_all_layer_point_grids",
    "build_point_grid",
    "calculate_stability_score",
    "coco_encode_rle",
    "generate_crop_boxes",
    "is_box_near_crop_edge",
    "mask_to_rle_pytorch",
    "remove_small_regions",
    "rle_to_mask",
    "uncrop_boxes_xyxy",
    "uncrop_masks",
    "uncrop_points",
]


class MaskData(amg.MaskData):
    """Lists, arrays and tensors of the same length under names; as arrays, all tensors are of floats."""

    def to_numpy(self) -> None:
        for key, value in self._stats.items():
            if isinstance(value, Tensor):
                self._stats[key] = value.float().detach().cpu().numpy()

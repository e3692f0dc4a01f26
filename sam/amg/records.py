"""From a table of masks to the records that automatic masks return."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsam_kernels import choice_for, nms

from ..masks import rle as run_lengths
from ..masks.regions import remove_small_regions
from ..utils.amg import (
    MaskData,
    area_from_rle,
    batched_mask_to_box,
    box_xyxy_to_xywh,
    mask_to_rle_pytorch,
    rle_to_mask,
)

OUTPUT_MODES = ("binary_mask", "uncompressed_rle", "coco_rle")


def records_of(data: MaskData, output_mode: str) -> list[dict[str, Any]]:
    """Return one dictionary per mask, as :meth:`sam.SamAutomaticMaskGenerator.generate` describes them."""
    columns = {
        "segmentation": _segmentations(data["rles"], output_mode),
        "area": [area_from_rle(rle) for rle in data["rles"]],
        "bbox": box_xyxy_to_xywh(data["boxes"]).tolist(),
        "predicted_iou": data["iou_preds"].tolist(),
        "point_coords": data["points"][:, None].tolist(),
        "stability_score": data["stability_score"].tolist(),
        "crop_box": box_xyxy_to_xywh(data["crop_boxes"]).tolist(),
    }
    return [dict(zip(columns, record, strict=True)) for record in zip(*columns.values(), strict=True)]


def _segmentations(rles: list[dict[str, Any]], output_mode: str) -> list[Any]:
    if output_mode == "binary_mask":
        return [rle_to_mask(rle) for rle in rles]
    if output_mode == "uncompressed_rle":
        return rles
    strings = run_lengths.compress_all([rle["counts"] for rle in rles])
    return [{"size": rle["size"], "counts": string} for rle, string in zip(rles, strings, strict=True)]


def on_the_host(kernels: str) -> str:
    """Return what ``kernels`` of a model means for boxes that are on the host already."""
    return "reference" if choice_for(kernels, "nms") == "reference" else "torch"


def _tensor(column: Tensor | np.ndarray) -> Tensor:
    return column if isinstance(column, Tensor) else torch.from_numpy(column)


def drop_duplicates_of_crops(data: MaskData, threshold: float, kernels: str) -> None:
    """Drop masks that overlap a mask of a smaller crop."""
    boxes, crops = _tensor(data["boxes"]), _tensor(data["crop_boxes"])
    x0, y0, x1, y1 = crops.to(boxes.device).unbind(1)
    smaller_first = 1 / ((x1 - x0) * (y1 - y0)).float()
    data.filter(nms(boxes, smaller_first, threshold, kernels=on_the_host(kernels)))


def clean_regions(
    data: MaskData, min_area: int, nms_threshold: float, device: torch.device, kernels: str = "auto"
) -> MaskData:
    """Fill holes and drop islands of fewer than ``min_area`` pixels, then drop masks that became duplicates.

    Components are found on ``device``. Masks that were clean win over those that had to be changed.
    """
    if not data["rles"]:
        return data
    rles, boxes = list(data["rles"]), _tensor(data["boxes"]).clone()
    untouched = torch.ones(len(rles), dtype=torch.float32, device=boxes.device)
    for index, rle in enumerate(rles):
        mask = torch.from_numpy(rle_to_mask(rle))[None].to(device)
        mask, filled = remove_small_regions(mask, min_area, "holes", kernels)
        mask, dropped = remove_small_regions(mask, min_area, "islands", kernels)
        if filled or dropped:
            untouched[index] = 0
            (rles[index],) = mask_to_rle_pytorch(mask)
            boxes[index] = batched_mask_to_box(mask)[0]
    data["rles"], data["boxes"] = rles, boxes
    data.filter(nms(boxes, untouched, nms_threshold, kernels=on_the_host(kernels)))
    return data
